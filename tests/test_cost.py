"""studies/cost.py counts on paper what real modules have and compute: parameters, FLOPs, the paper's figures."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from extras.lora import add_lora
from formats.tokenizer import IMAGE
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig
from recipes import RECIPES, TARGETS, Recipe, Target
from studies import cost
from surrogate import build_surrogate

ROOT = Path(__file__).parent.parent
TINY = Target(
    "tiny", "tiny", ranges=((2, 3), (5, 5)),
    llm_config=LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=7,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
    vit_config=ViTConfig(image_size=32, patch_size=8, hidden_size=32, intermediate_size=56, num_hidden_layers=6,
                         num_attention_heads=2))
EIGHT = TARGETS["llama-3.1-8b"]


def models(target, device):
    """A random full LLM and ViT of a target's sizes."""
    with torch.device(device):
        return Llama(target.llm_config), ViT(target.vit_config)


def prepare(stage, llm, vit, ranges, lora=0):
    """(VLM of a stage, its trained parameters). The stage `adapter` is `translator` without translators."""
    decoder = llm if stage == "decoder" else build_surrogate(llm, [] if stage == "adapter" else ranges)
    if lora:
        add_lora(llm, lora)
    with torch.device(llm.device):
        vlm = VLM(vit, decoder)
    return vlm, train.trained_parameters(vlm, "translator" if stage == "adapter" else stage)


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*cost.PAPER, "small", "tiny"])
def test_parameters_are_those_of_the_modules(name):
    target = TINY if name == "tiny" else TARGETS[name]
    llm, vit = models(target, "meta")
    for stage, lora in [*((s, 0) for s in cost.PLANS), ("decoder", 4)]:
        vlm, trained = prepare(stage, llm, vit, target.ranges, lora)
        parts = cost.trained_and_frozen(stage, target, Recipe(), lora)
        n = sum(x.numel() for x in trained.values())
        assert tuple(map(sum, zip(*parts.values()))) == (n, sum(x.numel() for x in vlm.parameters()) - n), (stage, lora)
    c = replace(target.llm_config, tie_word_embeddings=True)
    tied = cost.trained_and_frozen("decoder", replace(target, llm_config=c), Recipe())
    assert tied["embeddings, norm, LM head"] == (c.vocab_size * c.hidden_size + c.hidden_size, 0)


def test_recipes_have_the_official_sizes():
    sizes = {"llama-3.2-3b": 3.21e9, "llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.55e9}      # of the model cards
    surrogates = {"llama-3.2-3b": 18, "llama-3.1-8b": 19, "llama-3.1-70b": 42}              # layers, paper's table
    assert set(cost.PAPER) == set(sizes)
    for name in cost.PAPER:
        parts = cost.trained_and_frozen("decoder", TARGETS[name], RECIPES[name]["decoder"])
        llm = sum(parts[part][0] for part in ("decoder's layers", "embeddings, norm, LM head"))
        assert llm == pytest.approx(sizes[name], rel=2e-3)
        assert cost.sizes_of("encoder", TARGETS[name], Recipe()).layers == surrogates[name]
        assert cost.recipe_of("encoder", name).steps == 4880 == -(-624_610 // 128)
        assert cost.recipe_of("adapter", name).steps == 2440
    with torch.device("meta"):
        qwen = Llama(TARGETS["qwen3-4b"].llm_config)
    assert sum(p.numel() for p in qwen.parameters()) == pytest.approx(4.02e9, rel=2e-3)
    assert cost.recipe_of("translator", "llama-3.2-3b").steps == 3568
    assert cost.recipe_of("translator", "llama-3.1-8b").steps == 4393


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def count(vlm, groups, checkpointing=False):
    """FLOPs that torch counts in a real step, forward and backward. groups: (images?, samples, positions, targets).

    In bf16, because a CPU then computes attention as matrix products, which the counter sees (SDPA it does not).
    """
    vlm.bfloat16()
    vlm.decoder.checkpointed = range(len(vlm.decoder.model.layers)) if checkpointing else ()     # as train.main does it
    with FlopCounterMode(display=False) as counter:
        for has_image, n, T, N in groups:
            tokens, targets = torch.ones(n, T, dtype=torch.long), torch.full((n, T), -1)
            tokens[:sum(has_image), :vlm.n_visual] = IMAGE
            targets[:, -N:] = 1
            size = vlm.encoder.config.image_size
            pixels = torch.randn(sum(has_image), 3, size, size) if any(has_image) else None
            vlm.loss(dict(tokens=tokens, targets=targets, pixels=pixels)).backward()
    return counter.get_total_flops()


IMAGES, TEXTS = (3, 40, 7), (2, 24, 9)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage, lora", [
    ("translator", 0), ("encoder", 0), ("decoder", 0), ("decoder", 4), ("adapter", 0),
])
def test_flops_are_those_that_torch_counts(stage, lora, checkpointing):
    # the paper's encoder and adapter read no text; of text, LoRA's first layer needs no gradient of its input
    texts = TEXTS if stage in ("translator", "decoder") and not lora else cost.NOTHING
    vlm, _ = prepare(stage, *models(TINY, "cpu"), TINY.ranges, lora)
    groups = [([True] * IMAGES[0], *IMAGES)] + ([([False] * texts[0], *texts)] if texts[0] else [])
    counted = count(vlm, groups, checkpointing)
    recipe = Recipe(checkpointing=checkpointing)
    # causal=1: as matrix products, all scores are computed, the masked half, too
    ours = cost.step_flops(stage, TINY, recipe, IMAGES, texts, lora, causal=1)
    assert counted == sum(ours.values()), ours
    half = cost.step_flops(stage, TINY, recipe, IMAGES, texts, lora)
    assert 0.8 * counted < sum(half.values()) < counted


def test_flops_of_text_that_shares_a_batch_with_images():
    vlm, _ = prepare("translator", *models(TINY, "cpu"), TINY.ranges)
    counted = count(vlm, [([True, True, False], 3, 40, 7)])
    ours = cost.step_flops("translator", TINY, Recipe(), (2, 40, 7), (1, 40, 7), text_gradients=True, causal=1)
    assert counted == sum(ours.values())


# ---- memory, plan, routes -------------------------------------------------------------------------------------------


def test_memory_by_hand():
    recipe, sizes = RECIPES["llama-3.1-8b"]["decoder"], dict(samples=4, positions=799, targets=85)
    parts = cost.trained_and_frozen("decoder", EIGHT, recipe)
    n = 8_030_261_248 + sum(sum(counts) for part, counts in parts.items() if "ViT" in part or "projector" in part)
    frozen = parts["ViT, frozen part"][1]
    whole = cost.memory("decoder", EIGHT, recipe, **sizes)
    assert whole["weights"] == 2 * n and whole["optimizer"] == 12 * (n - frozen) == 3 * whole["gradients"]
    layer = 218_112_000
    shared = cost.memory("decoder", EIGHT, recipe, **sizes, ranks=8, fsdp=True)
    assert shared["weights"] == whole["weights"] - 2 * 32 * layer * 7 / 8 + 10 * layer
    kept = cost.memory("decoder", EIGHT, replace(recipe, checkpointing=False), **sizes)
    per_layer = 2 * (4096 + 4096 + 4096 + 2 * 1024 + 4096 + 2 * 14336 + 2 * 4096 + 14336)   # bytes of a position
    assert kept["activations"] - whole["activations"] == 4 * 799 * (31 * per_layer - 32 * 2 * 4096)


def test_stage_plan():
    p = cost.stage_plan("translator", "llama-3.1-8b", ranks=8)
    assert p.images[0] + p.texts[0] == pytest.approx(256) and p.recipe.steps == 4393
    positions = p.images[0] * p.images[1] + p.texts[0] * p.texts[1]
    assert 4393 * positions == pytest.approx(624_610 * 799 + 500_000 * 400, rel=1e-5)
    text, (trained, frozen) = cost.show_plan(p), map(sum, zip(*p.parts.values()))
    for words in ("= 8 at a time x 4 times x 8 GPU(s)", "1,124,608 samples, 699 M positions",
                  f"| trained parameters, millions | sum | {trained / 1e6:,.2f} |",
                  f"| frozen | sum | {frozen / 1e6:,.2f} |", f"| GB a GPU | sum | {p.peak / 1e9:.2f} |"):
        assert words in text
    epoch = replace(RECIPES["llama-3.1-8b"]["encoder"], max_length=700, steps=0)
    p = cost.stage_plan("encoder", "llama-3.1-8b", recipe=epoch)
    assert p.images[1] == 700 and p.recipe.steps == 624_610 // 128


def test_the_surrogate_saves_what_the_paper_says(tmp_path, capsys):
    cost.main(["--out", str(tmp_path / "routes.png")])
    printed = capsys.readouterr().out
    assert Image.open(tmp_path / "routes.png").size[0] > 800
    assert printed.count(" h, ") == 7 and all(x in printed for x in ("44.9%", "19.17 h", "34.79 h"))   # of 70B
    for name in cost.PAPER:
        found = cost.routes(name)
        surrogate, full, lora = found.values()
        assert surrogate.flops < lora.flops < full.flops           # LoRA saves memory more than time
        assert lora.peak < surrogate.peak == full.peak             # both train the full decoder in the end
        assert f"route saves {cost.saving(found):.1%} of" in printed
    assert abs(cost.saving(found) - (1 - (9.36 + 4.25 + 5.56) / (7.01 + 27.78))) < 0.05


def test_what_fits_where(capsys):
    """docs/real-size.md shows what is printed, and a row says what the plan of its stage does."""
    cost.main(["--memory"])
    tables = capsys.readouterr().out.strip().split("\n\n")
    docs = (ROOT / "docs" / "real-size.md").read_text(encoding="utf-8")
    assert len(tables) == len(cost.PAPER) and all(t in docs for t in tables)
    *needs, fit24, fit40, fit80, fit141, flops, hours = next(
        row for row in tables[2].splitlines() if row.startswith("| decoder | 32 ")).strip("| ").split(" | ")[2:]
    assert float(needs[-1]) == pytest.approx(sum(map(float, needs[:-1])), abs=0.3)
    recipe = RECIPES["llama-3.1-70b"]["decoder"]
    plan = cost.stage_plan("decoder", "llama-3.1-70b", 32, True, recipe=replace(recipe, micro_batch=int(fit141)))
    assert (fit24, fit40, fit80) == ("–",) * 3 and 80e9 < plan.peak < 141e9
    assert flops == f"{plan.flops / 1e18:.1f}" and hours == f"{plan.hours / 32:.2f}"


def test_plan_of_a_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def plan(line):
        cost.main(line.split())
        return capsys.readouterr().out

    text = plan("encoder steps=100 --recipe llama-3.1-8b --gpus 4 micro_batch=4")
    assert "llama-3.1-8b, stage encoder: 100 steps of 128 samples = 4 at a time x 8 times x 4 GPU(s)" in text
    assert "| LoRA |" in plan("decoder --recipe llama-3.1-70b --gpus 16 --fsdp --lora 8")
    one, sharded = (plan(f"translator --recipe llama-3.1-8b {more}") for more in ("", "--fsdp"))
    petaflops = lambda text: float(text.split("| gradients of activations | ")[1].split()[0])
    assert petaflops(sharded) > petaflops(one)                              # text's gradients go through the trunk
    assert [name in plan("adapter") for name in cost.PAPER] == [True] * 3
    assert not list(tmp_path.iterdir())                                     # a plan writes nothing

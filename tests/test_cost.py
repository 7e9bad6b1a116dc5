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
from recipes import RECIPES, STAGES, TARGETS, Recipe, Target
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
        assert cost.decoder_layers("encoder", TARGETS[name])[0] == surrogates[name]
        assert all(cost.recipe_of(stage, name) is RECIPES[name][stage] for stage in STAGES)
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
    assert whole["weights"] == 2 * n and whole["float32 weights, Adam"] == 12 * (n - frozen) == 3 * whole["gradients"]
    layers = 32 * 218_112_000
    shared = cost.memory("decoder", EIGHT, recipe, **sizes, ranks=8, fsdp=True)
    assert shared["weights"] == whole["weights"] - 2 * layers * 7 / 8 and shared["whole layers"] == 10 * 218_112_000
    kept = cost.memory("decoder", EIGHT, replace(recipe, checkpointing=False), **sizes)
    per_layer = 2 * (4096 + 4096 + 4096 + 2 * 1024 + 4096 + 2 * 14336 + 2 * 4096 + 14336)   # bytes of a position
    assert kept["activations of the decoder"] == 4 * 799 * 32 * per_layer
    assert whole["activations of the decoder"] == 4 * 799 * (32 * 2 * 4096 + per_layer)


def test_stage_plan():
    p = cost.stage_plan("translator", "llama-3.1-8b", ranks=8)
    assert (p["recipe"].micro_batch, p["accumulation"], p["ranks"], p["recipe"].batch) == (8, 4, 8, 256)
    assert p["recipe"].steps == 4393 and p["images"][0] + p["texts"][0] == pytest.approx(256)
    positions = p["images"][0] * p["images"][1] + p["texts"][0] * p["texts"][1]
    assert 4393 * positions == pytest.approx(624_610 * 799 + 500_000 * 400, rel=1e-5)
    assert p["flops"] == pytest.approx(4393 * sum(p["step_flops"].values()))
    text = cost.show_plan(p)
    trained, frozen = (sum(counts) for counts in zip(*p["parts"].values()))
    assert "x 4 times x 8 GPU(s)" in text and f"| sum | {trained:,} | {frozen:,} |" in text
    assert "1,124,608 samples, 699 M positions" in text and "3.05%" in text
    other = dict(target=TINY, recipe=Recipe(steps=0, batch=6), data=((13, 9, 5), cost.NOTHING))
    tiny = cost.stage_plan("encoder", "tiny", ranks=2, **other)
    assert (tiny["recipe"].steps, tiny["recipe"].micro_batch, tiny["images"]) == (2, 3, (6, 19 + 9, 5))
    short = replace(RECIPES["llama-3.1-8b"]["encoder"], max_length=700)
    assert cost.stage_plan("encoder", "llama-3.1-8b", recipe=short)["images"][1] == 700


def test_the_surrogate_saves_what_the_paper_says():
    paper = 1 - (9.36 + 4.25 + 5.56) / (7.01 + 27.78)
    assert abs(cost.saving(cost.routes("llama-3.1-70b")) - paper) < 0.05
    table = cost.show_routes("llama-3.1-70b")
    assert "44.9%" in table and "19.17 h" in table and "34.79 h" in table
    assert " h, " not in cost.show_routes("llama-3.1-8b")
    for name in cost.PAPER:
        surrogate, full, lora = cost.routes(name)
        assert surrogate["flops"] < lora["flops"] < full["flops"]           # LoRA saves memory more than time
        assert lora["peak"] < surrogate["peak"] == full["peak"]             # both train the full decoder in the end


def test_what_fits_where(capsys):
    cost.main(["--memory"])
    printed, docs = capsys.readouterr().out, (ROOT / "docs" / "real-size.md").read_text(encoding="utf-8")
    for name in cost.PAPER:
        assert cost.show_fits(name) in printed and cost.show_fits(name) in docs
        for r in cost.fits(name):
            assert r["sum"] == pytest.approx(sum(r[k] for k in cost.COLUMNS))
            fit = list(r["micro"].values())
            assert fit == sorted(fit) and fit[-1] <= 256 // r["gpus"]       # more fits on a larger card
            assert all((n > 0) == (r["sum"] <= card * 1e9) for card, n in r["micro"].items())
    row = next(r for r in cost.fits("llama-3.1-70b") if (r["stage"], r["gpus"]) == ("decoder", 32))
    plan = cost.stage_plan("decoder", "llama-3.1-70b", 32, True, 0, True, recipe=replace(
        RECIPES["llama-3.1-70b"]["decoder"], micro_batch=4))
    assert row["micro"] == {24: 0, 40: 0, 80: 0, 141: 4} and plan["peak"] < 141e9 and row["flops"] == plan["flops"]


# ---- command line ---------------------------------------------------------------------------------------------------


def test_routes_and_their_plot(tmp_path, capsys):
    cost.main(["--out", str(tmp_path / "routes.png")])
    printed = capsys.readouterr().out
    assert all(cost.show_routes(name) in printed for name in cost.PAPER)
    assert Image.open(tmp_path / "routes.png").size[0] > 800


def test_plan_of_a_stage(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def plan(*argv):
        cost.main(list(argv))
        return capsys.readouterr().out

    text = plan("encoder", "--recipe", "llama-3.1-8b", "--gpus", "4")
    assert "4,880 steps of 128 samples = 8 at a time x 4 times x 4 GPU(s)" in text and "121,759,744" in text
    assert "LoRA of rank 8" in plan("decoder", "--recipe", "llama-3.1-70b", "--gpus", "16", "--fsdp", "--lora", "8")
    text = plan("encoder", "steps=100", "--recipe", "llama-3.1-8b", "micro_batch=4", "lr=1e-4")
    assert "100 steps of 128 samples = 4 at a time x 4 times x 8 GPU(s)" in text and "learning rate 0.0001" in text
    one, two = (plan("translator", "--recipe", "llama-3.1-8b", *r) for r in ([], ["--replace", "17-22,23-30"]))
    assert "218,112,000" in one and "436,224,000" in two
    sharded = plan("translator", "--recipe", "llama-3.1-8b", "--fsdp")      # text's gradients go through the trunk
    petaflops = lambda text: float(text.split("| gradients of activations | ")[1].split()[0])
    assert petaflops(sharded) > petaflops(one)
    assert all(f"{name}, stage encoder: " in plan("encoder") for name in cost.PAPER)
    assert not list(tmp_path.iterdir())                                     # a plan writes nothing

"""studies/cost.py counts on paper what real modules have and compute: parameters, FLOPs, the paper's figures."""
import dataclasses

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from formats.errors import run_cli
from formats.tokenizer import IMAGE
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig, add_lora
from studies import cost
from surrogate import build_surrogate

TINY = dict(
    llm_config=LlamaConfig(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=7,
                           num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
    vit_config=ViTConfig(image_size=32, patch_size=8, hidden_size=32, intermediate_size=56, num_hidden_layers=6,
                         num_attention_heads=2),
    ranges=[(2, 3), (5, 5)])
STAGES = ("translator", "encoder", "decoder", "adapter")


def models(name, device):
    """A random full LLM and ViT of a preset's sizes."""
    p = cost.preset(name)
    with torch.device(device):
        return Llama(p["llm_config"]), ViT(p["vit_config"])


def prepare(stage, llm, vit, ranges, lora=0, distill=False):
    """(VLM of a stage, its trained parameters). The stage `adapter` is `translator` without translators."""
    decoder = llm if stage == "decoder" else build_surrogate(llm, [] if stage == "adapter" else ranges)
    if lora:
        add_lora(llm, lora)
    with torch.device(llm.device):
        vlm = VLM(vit, decoder)
    trained = train.trained_parameters(vlm, "translator" if stage == "adapter" else stage, distill)
    if lora:                            # LoRA freezes what it updates
        for n in [n for n in trained if n.startswith("decoder.") and ".lora_" not in n]:
            trained.pop(n).requires_grad_(False)
    return vlm, trained


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*cost.PRESETS, "tiny"])
def test_parameters_are_those_of_the_modules(name):
    p = TINY if name == "tiny" else cost.preset(name)
    llm, vit = models(p, "meta")
    for stage, lora, distill in [*((s, 0, False) for s in STAGES), ("encoder", 0, True), ("decoder", 4, False)]:
        vlm, trained = prepare(stage, llm, vit, p["ranges"], lora, distill)
        parts = cost.trained_and_frozen(stage, p["llm_config"], p["vit_config"], p["ranges"], lora, distill)
        n = sum(x.numel() for x in trained.values())
        assert tuple(map(sum, zip(*parts.values()))) == (n, sum(x.numel() for x in vlm.parameters()) - n), (stage, lora)
    c = dataclasses.replace(p["llm_config"], tie_word_embeddings=True)
    tied = cost.trained_and_frozen("decoder", c, p["vit_config"], [])
    assert tied["embeddings, norm, LM head"] == (c.vocab_size * c.hidden_size + c.hidden_size, 0)


def test_presets_have_the_official_sizes():
    sizes = {"llama-3.2-3b": 3.21e9, "llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.55e9}      # of the model cards
    surrogates = {"llama-3.2-3b": 18, "llama-3.1-8b": 19, "llama-3.1-70b": 42}               # layers, paper's table
    for name, p in cost.PRESETS.items():
        parts = cost.trained_and_frozen("decoder", p["llm_config"], p["vit_config"], p["ranges"])
        llm = sum(parts[part][0] for part in ("decoder's layers", "embeddings, norm, LM head"))
        assert llm == pytest.approx(sizes[name], rel=2e-3)
        assert cost.decoder_layers("encoder", p["llm_config"], p["ranges"])[0] == surrogates[name]
        assert cost.recipe("encoder", name)["steps"] == 4880 == -(-624_610 // 128)
    assert cost.recipe("translator", "llama-3.2-3b")["steps"] == 3568
    assert cost.recipe("translator", "llama-3.1-8b")["steps"] == 4393


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def count(vlm, groups, stage, llm=None, checkpointing=False):
    """FLOPs that torch counts in a real step, forward and backward. groups: (images?, samples, positions, targets).

    In bf16, because a CPU then computes attention as matrix products, which the counter sees (SDPA it does not).
    """
    vlm.bfloat16()
    twice = vlm.decoder.translators if llm else ()          # as train.main does it
    vlm.decoder.checkpointed = set(range(len(vlm.decoder.model.layers))) - set(twice) if checkpointing else ()
    with FlopCounterMode(display=False) as counter:
        for has_image, n, T, N in groups:
            tokens, targets = torch.ones(n, T, dtype=torch.long), torch.full((n, T), -1)
            tokens[:sum(has_image), :vlm.n_visual] = IMAGE
            targets[:, -N:] = 1
            size = vlm.encoder.config.image_size
            pixels = torch.randn(sum(has_image), 3, size, size) if any(has_image) else None
            if llm is None:
                loss = vlm.loss(tokens, targets, pixels)
            else:
                batch = dict(tokens=tokens, targets=targets, pixels=pixels, lengths=torch.full((n,), T))
                loss = sum(x for x in train.surrogate_loss(vlm, batch, stage, llm) if x is not None)
            if loss.requires_grad:
                loss.backward()
    return counter.get_total_flops()


IMAGES, TEXTS = (3, 40, 7), (2, 24, 9)


@pytest.mark.parametrize("stage, lora, distill, checkpointing", [
    ("translator", 0, False, False), ("translator", 0, False, True),
    ("translator", 0, True, False), ("translator", 0, True, True),
    ("encoder", 0, False, False), ("encoder", 0, False, True), ("encoder", 0, True, False), ("encoder", 0, True, True),
    ("decoder", 0, False, False), ("decoder", 0, False, True), ("decoder", 4, False, False),
    ("adapter", 0, False, True),
])  # fmt: skip
def test_flops_are_those_that_torch_counts(stage, lora, distill, checkpointing):
    texts = cost.NOTHING if stage == "encoder" or lora else TEXTS
    llm, vit = models(TINY, "cpu")
    vlm, _ = prepare(stage, llm, vit, TINY["ranges"], lora, distill)
    groups = [([True] * IMAGES[0], *IMAGES)] + ([([False] * texts[0], *texts)] if texts[0] else [])
    counted = count(vlm, groups, stage, llm.bfloat16() if distill else None, checkpointing)
    if distill:     # the full LLM runs without gradients, and so through SDPA: its attention is not counted
        counted += sum(n * 4 * T * T * 4 * 16 * (7 - 2) for n, T, _ in (IMAGES, texts))
    sizes = stage, TINY["llm_config"], TINY["vit_config"], TINY["ranges"]
    # causal=1: as matrix products, all scores are computed, the masked half, too
    ours = cost.step_flops(*sizes, IMAGES, texts, checkpointing, lora, distill, causal=1)
    assert counted == sum(ours.values()), ours
    half = cost.step_flops(*sizes, IMAGES, texts, checkpointing, lora, distill)
    assert 0.8 * counted < sum(half.values()) < counted


def test_flops_of_text_that_shares_a_batch_with_images():
    vlm, _ = prepare("translator", *models(TINY, "cpu"), TINY["ranges"])
    counted = count(vlm, [([True, True, False], 3, 40, 7)], "translator")
    ours = cost.step_flops("translator", TINY["llm_config"], TINY["vit_config"], TINY["ranges"], (2, 40, 7), (1, 40, 7),
                           checkpointing=False, text_gradients=True, causal=1)
    assert counted == sum(ours.values())


# ---- memory, plan, routes -------------------------------------------------------------------------------------------


def test_memory_by_hand():
    p = cost.preset("llama-3.1-8b")
    sizes = p["llm_config"], p["vit_config"], p["ranges"]
    parts = cost.trained_and_frozen("decoder", *sizes)
    n = 8_030_261_248 + sum(sum(counts) for part, counts in parts.items() if "ViT" in part or "projector" in part)
    frozen = parts["ViT, frozen part"][1]
    whole = cost.memory("decoder", *sizes, samples=4, positions=799, targets=85)
    assert whole["weights"] == 2 * n and whole["float32 copies, Adam"] == 12 * (n - frozen) == 2 * whole["gradients"]
    layers = 32 * 218_112_000
    shared = cost.memory("decoder", *sizes, samples=4, positions=799, targets=85, ranks=8, fsdp=True)
    assert shared["weights"] == whole["weights"] - 2 * layers * 7 / 8 and shared["whole layers"] == 10 * 218_112_000
    kept = cost.memory("decoder", *sizes, samples=4, positions=799, targets=85, checkpointing=False)
    per_layer = 2 * (4096 + 4096 + 4096 + 2 * 1024 + 4096 + 2 * 14336 + 2 * 4096 + 14336)   # bytes of a position
    assert kept["activations of the decoder"] == 4 * 799 * 32 * per_layer
    assert whole["activations of the decoder"] == 4 * 799 * (32 * 2 * 4096 + per_layer)


def test_stage_plan():
    p = cost.stage_plan("translator", "llama-3.1-8b", ranks=8)
    assert (p["micro_batch"], p["accumulation"], p["ranks"], p["batch"]) == (8, 4, 8, 256)
    assert p["samples"] == 4393 * 256 and p["images"][0] + p["texts"][0] == pytest.approx(256)
    assert p["tokens"] == pytest.approx(624_610 * 799 + 500_000 * 400, rel=1e-5)
    assert p["flops"] == pytest.approx(4393 * sum(p["step_flops"].values()))
    text = cost.show_plan(p)
    assert "x 4 times x 8 GPU(s)" in text and f"{sum(c[0] for c in p['parts'].values()):,}" in text
    taught = {k: cost.stage_plan("encoder", TINY, distill_every=k)["step_flops"]["distillation"] for k in (0, 1, 4)}
    assert taught[0] == 0 < taught[4] == taught[1] / 4
    assert cost.stage_plan("encoder", TINY, batch=6, micro_batch=3, steps=2)["samples"] == 12


def test_bad_plans_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"batch of 128 .* micro-batches of 8 on 3 .* 24, which does not divide 128"):
        cost.stage_plan("encoder", "llama-3.1-8b", ranks=3)
    with pytest.raises(ValueError, match="llama-2-7b.*llama-3.2-3b, llama-3.1-8b, llama-3.1-70b"):
        cost.stage_plan("encoder", "llama-2-7b")
    with pytest.raises(ValueError, match="'vit'.*translator, encoder, decoder"):
        cost.stage_plan("vit", "llama-3.1-8b")


def test_the_surrogate_saves_what_the_paper_says():
    paper = 1 - (9.36 + 4.25 + 5.56) / (7.01 + 27.78)
    assert abs(cost.saving(cost.routes("llama-3.1-70b")) - paper) < 0.05
    table = cost.show_routes("llama-3.1-70b")
    assert "44.9%" in table and "19.17 h" in table and "34.79 h" in table
    for name in cost.PRESETS:
        surrogate, full, lora = cost.routes(name)
        assert surrogate["flops"] < lora["flops"] < full["flops"]           # LoRA saves memory more than time
        assert lora["peak"] < surrogate["peak"] == full["peak"]             # both train the full decoder in the end


def test_picture(tmp_path):
    cost.plot_routes(tmp_path / "routes.png")
    assert Image.open(tmp_path / "routes.png").size[0] > 800


def test_command_line(tmp_path, capsys):
    cost.main(["llama-3.1-70b", "--out", str(tmp_path / "routes.png")])
    printed = capsys.readouterr().out
    assert cost.show_routes("llama-3.1-70b") in printed and "llama-3.2-3b" not in printed.lower()
    assert (tmp_path / "routes.png").exists()
    assert run_cli(lambda: cost.main(["llama-2-7b", "--out", str(tmp_path / "no.png")])) == 2
    assert "llama-2-7b" in capsys.readouterr().err and not (tmp_path / "no.png").exists()

"""extras/: stage 0, distillation by the full LLM, low-rank updates."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_train import assert_close, assert_complete, grads, make_vlm, mixed_batch, relative, rows_of, without_clock

import surrogate
import train
from data import world
from data.batches import collate
from extras import distillation, parallel, vit
from extras.lora import add_lora
from formats.checkpoints import read_checkpoint
from formats.tokenizer import IMAGE
from model import VLM, Llama, ViT, ViTConfig

# ---- stage 0 --------------------------------------------------------------------------------------------------------


def test_stage_0_leaves_a_vit_and_nothing_else(stages):
    rows = assert_complete(Path(stages["vit"]).parent, "vit", 3, 1e-3)
    tensors, about = read_checkpoint(stages["vit"])
    assert about["stage"] == "vit" and "llm" not in about and ViTConfig(**about["vit_config"]) == ViTConfig()
    assert tensors.keys() == {f"encoder.{n}" for n, _ in ViT(ViTConfig()).named_parameters()}
    assert all(0 <= float(r[share]) <= 1 for r in rows for share in ("nearest", "whole"))


def test_stage_0_knows_no_llm():
    """Neither the file nor what it imports of ours names one: no embedding, no weight, no tokenizer of it."""
    assert "llm" not in vars(vit) and not {"Llama", "VLM", "Tokenizer", "DEFAULT_LLM"} & vars(vit).keys()


def test_stage_0_resumes(tmp_path, killed_at):
    """Killed after two steps and resumed: the same weights as without."""
    argv = ["steps=3", "batch=6", "save_every=1", "workers=0", "--out"]
    vit.main([*argv, str(tmp_path / "whole")])
    killed_at(2, lambda: vit.main([*argv, str(tmp_path / "broken")]))
    vit.main([*argv, str(tmp_path / "broken"), "--resume"])
    whole, broken = (read_checkpoint(tmp_path / run / "vit.safetensors")[0] for run in ("whole", "broken"))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


def test_contrast_and_captions_against_their_formulas():
    """Row by row: two images of one caption share their target; words and one end carry loss, and no padding."""
    captions = vit.Captions()
    texts = ["a red star", "the flag of Peru", "a red star"]
    ids = captions(texts)
    assert ids.shape == (3, captions.length) and len({*ids[0].tolist()}) == 4 and ids[0].tolist() == ids[2].tolist()
    model = vit.Pretraining(captions, ViTConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=1))
    pixels = torch.randn(3, 3, 64, 64)
    contrast, nearest, words, whole = model(pixels, ids)
    tokens = model.encoder.vision_model.post_layernorm(model.encoder(pixels))
    image, text = (F.normalize(x, dim=-1) for x in (model.project(tokens.mean(1)), model.text(ids)))
    logits = image @ text.T / 0.07
    share = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    expected = (F.cross_entropy(logits, share) + F.cross_entropy(logits.T, share)) / 2
    torch.testing.assert_close(contrast, expected)
    logp, losses = model.captioner(ids, tokens).log_softmax(-1), []
    for b, text in enumerate(texts):
        losses += [-logp[b, i, ids[b, i]] for i in range(len(text.split()) + 1)]    # the words, then the end
    torch.testing.assert_close(words, torch.stack(losses).mean())
    assert 0 <= nearest <= 1 and whole in (0, 1 / 3, 2 / 3, 1)


# ---- distillation ---------------------------------------------------------------------------------------------------


def oracle(vlm, llm, batch):
    """(KL, distance) anew, position by position in float64, each model run on its own from the bottom."""
    s, x = vlm.decoder, vlm.embed(batch["tokens"], batch["pixels"])
    ours, theirs = s.run(x, 0, s.translators[-1] + 1), llm.run(x, 0, s.ranges[-1][1] + 1)
    logp, logq = (m(embeds=x).double().log_softmax(-1) for m in (s, llm))
    distance = kl = 0
    for b in range(len(x)):
        for t in range(int(batch["lengths"][b])):
            off = (ours[b, t] - theirs[b, t]).double().square().sum()
            distance = distance + off / theirs[b, t].double().square().sum()
            if batch["targets"][b, t] >= 0:
                kl = kl + (logq[b, t].exp() * (logq[b, t] - logp[b, t])).sum()
    return kl / (batch["targets"] >= 0).sum(), distance / batch["lengths"].sum()


def states(vlm, llm, batch):
    s = vlm.decoder
    with torch.no_grad():
        trunk = s.run(vlm.embed(batch["tokens"], batch["pixels"]), 0, s.n_shared)
        return surrogate.teacher_states(s, llm, trunk, batch)


@pytest.mark.parametrize("ranges", [[(2, 4)], [(1, 2), (4, 4)]])
def test_distillation_loss_and_gradients(tiny_llm, ranges):
    """The full LLM teaches the translators, and nothing else."""
    vlm, llm = make_vlm(tiny_llm, ranges)
    batch, parameters = mixed_batch(vlm), train.translator_parameters(vlm.decoder)
    losses = surrogate.distillation_loss(vlm.decoder, states(vlm, llm, batch))
    expected = oracle(vlm, llm, batch)
    for ours, theirs in zip(losses, expected):
        assert relative(ours.item(), theirs.item()) < 1e-4
    sum(losses).backward()
    ours = grads(parameters)
    assert ours.keys() == parameters.keys() == {n for n, _ in vlm.named_parameters() if n in parameters}
    sum(expected).backward()
    assert_close(ours, grads(parameters))


def test_slots_are_of_a_words_length_and_of_many_kinds(smollm, smollm_tokenizer):
    """In the image's place: points at a word's distance from the mean of words; everything else is the text's own."""
    config = ViTConfig()
    slots = distillation.Slots(smollm, smollm_tokenizer, config)
    samples = [world.World(5)[i] for i in range(12)]
    batch = collate(samples, smollm_tokenizer, slots.n_visual, config.image_size)
    x, again, other = (slots.embed(samples, batch, seed) for seed in (1, 1, 2))
    assert torch.equal(x, again) and not torch.equal(x, other)
    image = batch["tokens"] == IMAGE
    assert torch.equal(x[~image], smollm.embed(batch["tokens"][~image]))
    mean, length = smollm.words
    off = x[image] - mean
    torch.testing.assert_close(off.norm(dim=-1), length.expand(len(off)))
    nearest = (F.normalize(off, dim=-1) @ slots.words.T).amax(1).view(12, -1).mean(1)
    assert nearest.min() < 0.5 < 0.8 < nearest.max()            # noise in some pictures, nearly words in others


def test_slots_name_no_untaught_word(smollm, smollm_tokenizer):
    slots = distillation.Slots(smollm, smollm_tokenizer, ViTConfig())
    said = " ".join(smollm_tokenizer.decode([t]) for t in slots.common.tolist())
    assert not [w for w in world.UNTAUGHT if world.has_word(said, w)]


def test_later_epochs_read_cached_states(tiny_llm, tmp_path, monkeypatch, killed_at):
    """The LLM runs once over a sample, however often it is read; one resumed amid an epoch makes the same bits."""
    calls, states = [], surrogate.teacher_states
    monkeypatch.setattr(distillation, "teacher_states", lambda *args: calls.append(1) or states(*args))
    common = ["--llm", tiny_llm, "--replace", "2-4",
              "steps=5", "epochs=2", "batch=5", "lr=1e-3", "save_every=2", "dtype=float32"]
    go = lambda out, *more: distillation.main([*common, "--out", str(tmp_path / out), *more])
    go("whole")
    assert len(calls) == 3                                                  # of 5 steps 3 are fresh
    assert_complete(tmp_path / "whole", "translator", 5, 1e-3)
    go("again", "epochs=1")
    (whole, about), (again, _) = (read_checkpoint(tmp_path / f / "translator.safetensors") for f in ("whole", "again"))
    assert about["stage"] == "translator" and about["ranges"] == [[2, 4]] and about["recipe"]["epochs"] == 2
    assert all(n.startswith("decoder.model.layers.2.") for n in whole)      # no projector: it serves every encoder
    assert any(not torch.equal(whole[n], again[n]) for n in whole)
    killed_at(4, lambda: go("broken"))
    go("broken", "--resume")
    assert without_clock(rows_of(tmp_path / "broken")) == without_clock(rows_of(tmp_path / "whole"))
    broken = read_checkpoint(tmp_path / "broken" / "translator.safetensors")[0]
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


# ---- low-rank updates -----------------------------------------------------------------------------------------------


def test_lora_starts_at_zero_and_learns_alone(tiny_llm):
    plain, llm = Llama.from_pretrained(tiny_llm), Llama.from_pretrained(tiny_llm)
    vlm, _ = make_vlm(tiny_llm, [])
    add_lora(llm, 2)
    vlm.decoder = llm
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(llm(embeds=x), plain(embeds=x), rtol=1e-5, atol=1e-5)    # B is 0 at first
    learns = train.trained_parameters(vlm, "decoder")
    low_rank = {n for n in learns if ".lora_" in n}
    assert len(low_rank) == 2 * 2 * 6 and not any(n.startswith("decoder.") for n in learns.keys() - low_rank)


def test_lora_checkpoint_holds_the_merged_weights(stages, tiny_llm, tmp_path, monkeypatch):
    """Stage 3 with low-rank updates: the decoder that is saved answers as the trained one does."""
    trained, build = [], train.build
    monkeypatch.setattr(train, "build", lambda *args, **more: trained.append(build(*args, **more)) or trained[-1])
    parallel.main(["decoder", "--llm", tiny_llm, "--init", stages["encoder"], "steps=4", "batch=4", "lr=1e-2",
                   "dtype=float32", "--lora", "2", "--out", str(tmp_path)])
    merged = VLM.from_pretrained(tiny_llm, tmp_path / "decoder.safetensors").decoder
    plain = Llama.from_pretrained(tiny_llm)
    x, vlm = torch.randn(2, 5, 32), trained[0]
    assert any(".lora_" in n for n, _ in vlm.decoder.named_parameters())
    ours = merged(embeds=x)
    off, learned = ((ours - other(embeds=x)).abs().max() for other in (vlm.decoder, plain))
    assert off < 0.05 * learned and learned > 0.1           # what is saved is rounded to float16
    assert read_checkpoint(tmp_path / "decoder.safetensors")[1]["lora"] == 2

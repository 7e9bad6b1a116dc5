"""extras/: stage 0, distillation by the full LLM, low-rank updates."""
from pathlib import Path

import pytest
import torch
from test_train import assert_close, assert_complete, grads, make_vlm, mixed_batch, relative, rows_of, without_clock

import train
from extras import distillation, parallel, vit
from extras.lora import add_lora
from formats.checkpoints import read_checkpoint
from model import VLM, Llama, ViT, ViTConfig

# ---- stage 0 --------------------------------------------------------------------------------------------------------


def test_stage_0(stages, tiny_llm):
    rows = assert_complete(Path(stages["vit"]).parent, "vit", 3, 1e-3)
    tensors, about = read_checkpoint(stages["vit"])
    assert about["stage"] == "vit" and about["llm"] == tiny_llm and ViTConfig(**about["vit_config"]) == ViTConfig()
    encoder = {f"encoder.{n}" for n, _ in ViT(ViTConfig()).named_parameters()}
    assert tensors.keys() == encoder | {f"adapter.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all(0 <= float(r["right"]) <= 1 for r in rows)


def test_stage_0_resumes(tiny_llm, tmp_path, monkeypatch):
    """Killed after two steps and resumed: the same weights as without."""
    def killed(step, recipe, schedule=train.lr_at):
        return schedule(step, recipe) if step < 2 else exec("raise KeyboardInterrupt")

    argv = ["--llm", tiny_llm, "steps=3", "batch=6", "save_every=1", "workers=0", "dtype=float32", "--out"]
    vit.main([*argv, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", killed)
        vit.main([*argv, str(tmp_path / "broken")])
    vit.main([*argv, str(tmp_path / "broken"), "--resume"])
    whole, broken = (read_checkpoint(tmp_path / run / "vit.safetensors")[0] for run in ("whole", "broken"))
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


def test_word_loss_against_its_formula_token_by_token():
    torch.manual_seed(0)
    visual, words, weights = torch.randn(2, 3, 8), torch.randn(5, 8), torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0])
    targets = torch.tensor([[0, 4, 4], [2, 1, 3]])
    total, right = 0, 0
    for b in range(2):
        for p in range(3):
            v, t = visual[b, p], targets[b, p]
            cosines = torch.stack([v @ w / (v.norm() * w.norm()) for w in words])
            which = -(7 * cosines).log_softmax(0)[t]
            total += weights[t] * (which + 4 * (1 - cosines[t]) + (v.norm() / words[t].norm() - 1) ** 2)
            right += (cosines.argmax() == t).float()
    loss, share = vit.word_loss(visual, words, 7, targets, weights)
    torch.testing.assert_close(loss, total / weights[targets].sum())
    assert share == right / 6
    perfect, share = vit.word_loss(words[targets], words, 1e4, targets, weights)
    assert perfect < 1e-5 and share == 1


def test_captions_are_spelled_in_order_and_rare_words_weigh_more(smollm_tokenizer):
    tokenizer = smollm_tokenizer
    flags, sign = ["the flag of Japan", "the flag of Peru"], "a sign with the word Japan"
    tokens, weights = vit.spelled([*flags, sign], tokenizer)
    assert [tokenizer.decode([t]) for t in tokens[flags[0]]] == [" the", " flag", " of", " Japan"]
    the, flag, _, japan = tokens[flags[0]]
    assert weights[the] == pytest.approx(0.2) and weights[flag] == weights[japan] > weights[the]
    assert weights.keys() == {t for ts in tokens.values() for t in ts}
    assert vit.laid_out("abcd", 9) == list("dabcdabcd") and vit.laid_out("abcd", 3) == list("bcd")


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
    return kl, distance


@pytest.mark.parametrize("ranges", [[(2, 4)], [(1, 2), (4, 4)]])
def test_distillation_loss_and_gradients(tiny_llm, ranges):
    """The full LLM teaches the translators, and nothing else."""
    vlm, llm = make_vlm(tiny_llm, ranges)
    batch, parameters = mixed_batch(vlm), train.trained_parameters(vlm, "translator", projector=False)
    cached = distillation.teacher_states(vlm, llm, batch)
    losses = distillation.distillation_loss(vlm.decoder, llm, cached)
    expected = oracle(vlm, llm, batch)
    for ours, theirs in zip(losses, expected):
        assert relative(ours.item(), theirs.item()) < 1e-4
    sum(losses).backward()
    ours = grads(parameters)
    assert ours.keys() == parameters.keys() and all(n.startswith("decoder.") for n in ours)
    sum(expected).backward()
    assert_close(ours, grads(parameters))


def test_distillation_is_zero_for_a_perfect_translator(tiny_llm):
    vlm, llm = make_vlm(tiny_llm, [(3, 3)])
    with torch.no_grad():
        for ours, theirs in zip(vlm.decoder.model.layers[3].parameters(), llm.model.layers[3].parameters()):
            ours.copy_(theirs)
    cached = distillation.teacher_states(vlm, llm, mixed_batch(vlm))
    assert [x.item() for x in distillation.distillation_loss(vlm.decoder, llm, cached)] == [0, 0]


def test_later_epochs_read_cached_states(stages, tiny_llm, tmp_path, monkeypatch):
    """The LLM runs once over a sample, however often it is read; one resumed amid an epoch makes the same bits."""
    calls, states = [], distillation.teacher_states
    monkeypatch.setattr(distillation, "teacher_states", lambda *args: calls.append(1) or states(*args))
    common = ["--llm", tiny_llm, "--init", stages["vit"], "--replace", "2-4",
              "steps=5", "epochs=2", "batch=5", "lr=1e-3", "save_every=2", "dtype=float32"]
    go = lambda out, *more: distillation.main([*common, "--out", str(tmp_path / out), *more])
    go("whole")
    assert len(calls) == 6                                         # images and text apart; 3 of 5 steps are fresh
    assert_complete(tmp_path / "whole", "translator", 5, 1e-3)
    go("again", "epochs=1")
    (whole, about), (again, _) = (read_checkpoint(tmp_path / f / "translator.safetensors") for f in ("whole", "again"))
    assert about["stage"] == "translator" and about["ranges"] == [[2, 4]] and about["recipe"]["epochs"] == 2
    assert any(not torch.equal(whole[n], again[n]) for n in whole)

    def killed(step, recipe, schedule=train.lr_at):
        return schedule(step, recipe) if step < 4 else exec("raise KeyboardInterrupt")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", killed)
        go("broken")
    go("broken", "--resume")
    assert without_clock(rows_of(tmp_path / "broken")) == without_clock(rows_of(tmp_path / "whole"))
    broken = read_checkpoint(tmp_path / "broken" / "translator.safetensors")[0]
    assert all(torch.equal(whole[n], broken[n]) for n in whole)


def test_a_distilled_translator_is_a_start_for_stage_2(stages, tiny_llm, tmp_path):
    common = ["--llm", tiny_llm, "batch=5", "dtype=float32"]
    distillation.main([*common, "steps=1", "--init", stages["vit"], "--replace", "2-4", "--out", str(tmp_path / "t")])
    train.main(["encoder", *common, "steps=1", "--init", str(tmp_path / "t" / "translator.safetensors"),
                "--out", str(tmp_path / "e")])
    assert read_checkpoint(tmp_path / "e" / "encoder.safetensors")[1]["ranges"] == [[2, 4]]


# ---- low-rank updates -----------------------------------------------------------------------------------------------


def test_lora_starts_at_zero_and_learns_alone(tiny_llm):
    plain, llm = Llama.from_pretrained(tiny_llm), Llama.from_pretrained(tiny_llm)
    vlm, _ = make_vlm(tiny_llm, [])
    add_lora(llm, 2)
    vlm.decoder = llm
    x = torch.randn(2, 5, 32)
    assert torch.equal(llm(embeds=x), plain(embeds=x))              # B is 0 at first: nothing changes
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

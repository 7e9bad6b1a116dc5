"""graft.py: the comparison and its files, conversations, bad input."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import graft
from cli import UserError, printable
from data import world
from data.batches import wrap
from extras import share
from formats.checkpoints import read_checkpoint, save_checkpoint
from model import VLM, Llama
from surrogate import build_surrogate, load_surrogate, load_translators

ROOT = Path(__file__).parent.parent
Q = "What is it?"


def as_pair(vlm, surrogate):
    """The same encoder in front of the surrogate, as a VLM of its own."""
    pair = copy.copy(vlm)
    pair._modules = vlm._modules | {"decoder": surrogate}
    return pair


def about_signs(*asked):
    """Samples with questions and options of our choice, each about another image."""
    samples = [world.world("read", i, 7, "test") for i in range(len(asked))]
    for s, (question, *options) in zip(samples, asked):
        s.messages[0]["content"], s.options, s.answer = wrap(question), options, options[0]
    return samples


RAGGED = about_signs(("What?", "Yes.", "The word is Bread.", "Not at all, it is a cat."),
                     ("What word is on the sign, and what is the color of the sign?", "It is a fish.", "No.", "A."),
                     ("Which animal is it?", "A sign.", "The capital is Paris."))


def answers(vlm, surrogate, samples, **options):
    """evaluate.answer about the samples' images."""
    embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:1]) for s in samples], [s.image for s in samples])
    return evaluate.answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer, **options)


# ---- the comparison, from the command line ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Glyph")  # a random LLM writes control characters
def test_comparison_from_the_command_line(stages, tiny_llm, tmp_path, capsys):
    out = ["--eval", "1", "--out", str(tmp_path)]
    argv = ["--encoder", stages["encoder"], "--direct", stages["full"], "--batch", "2", *out]
    graft.main(argv)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python graft.py " + " ".join(argv)
    assert results["samples"] == 1 and results["llm"] == tiny_llm and results["about"]["stage"] == "encoder"
    assert [(r["task"], r["system"]) for r in results["rows"]] == [
        (task, system) for task in world.TRAINED_TASKS + world.KNOWLEDGE_TASKS
        for system in ("before", "pair", "graft", "direct", "text", "text, pair")]
    assert [r["system"] for r in results["brings"]] == ["before", "pair", "graft", "direct"]
    assert evaluate.table(results["rows"]) in printed and "4 of 6 layers" in printed and "1 held-out images" in printed
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", "demo.png"}
    # the same numbers again, whatever the batch; without a surrogate there is no pair
    graft.main(["--encoder", stages["full"], "--batch", "1", *out])
    printed = capsys.readouterr().out
    assert "there is no surrogate" in printed and "zero-shot" not in printed
    alone = json.loads((tmp_path / "results.json").read_text())["rows"]         # there the direct one is the graft
    assert alone == [r | dict(system={"direct": "graft"}.get(r["system"], r["system"])) for r in results["rows"]
                     if r["system"] in ("before", "direct", "text")]


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_released_layout_grafts(stages, tiny_llm, tmp_path):
    """A checkpoint through the paper's .pth and back: encoder, projector and translator have every weight again. It has
    no place for what says that visual tokens are like words."""
    trained, pth, back = (str(tmp_path / name) for name in ("a.safetensors", "ckpt_01_0000003.pth", "b.safetensors"))
    with pytest.raises(UserError, match="like_words=false"):
        share.main([stages["encoder"], pth])
    tensors, about = read_checkpoint(stages["encoder"])
    save_checkpoint(trained, tensors, about | dict(recipe=about["recipe"] | dict(like_words=False)))
    share.main([trained, pth])
    share.main([pth, back, "--llm", tiny_llm, "--vit", stages["vit"], "--replace", "2-4"])
    llm = Llama.from_pretrained(tiny_llm)
    for a, b in [(VLM.from_pretrained(tiny_llm, file) for file in (trained, back)),
                 (load_surrogate(llm, file) for file in (trained, back))]:
        a, b = dict(a.named_parameters()), dict(b.named_parameters())
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(UserError, match="does not belong.*layers.2.* is of none of its translators"):
        load_translators(build_surrogate(llm, [(3, 4)]), back)


def test_streamed_answer_equals_chat(vlm):
    image, pieces = RAGGED[0].image, []
    messages = [{"role": "user", "content": wrap(Q)}]
    text, timing = graft.ask(vlm, image, messages, max_new_tokens=40, show=pieces.append)
    assert text == vlm.chat(image, Q, max_new_tokens=40) == "".join(pieces).strip() and text
    assert len(pieces) > 3 and "first token after" in timing and "tokens/s" in timing
    messages = [{"role": "user", "content": Q}]  # without an image
    text, _ = graft.ask(vlm, None, messages, max_new_tokens=3, show=pieces.append)
    assert text == vlm.tokenizer.decode(vlm.generate([vlm.prompt(messages)], [], max_new_tokens=3)[0]).strip()


def test_conversation_remembers(vlm, stages, tmp_path, monkeypatch, capsys):
    """Two turns at the terminal: the second prompt holds the first turn; only the first question holds the image."""
    lines = iter([" What is it? ", "Are you sure?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    graft.main(["--encoder", stages["encoder"], "--chat", "--max-new-tokens", "8", "--no-int8", "--out", str(tmp_path)])
    printed, sign = capsys.readouterr().out, str(tmp_path / "sign.png")     # without --image it is about this one
    first = vlm.chat(sign, Q, max_new_tokens=8)
    turns = [{"role": "user", "content": wrap(Q)}, {"role": "assistant", "content": first},
             {"role": "user", "content": "Are you sure?"}]
    second = vlm.tokenizer.decode(vlm.generate([vlm.prompt(turns)], [sign], max_new_tokens=8)[0]).strip()
    said = [part.split("\n     [first token after")[0].strip() for part in printed.split("llm> ")[1:]]
    assert said == [printable(first), printable(second)] and first != second


@pytest.mark.parametrize("stage, options", [("encoder", ["--no-int8"]), ("encoder", ["--no-int8", "--pair"]),
                                            ("decoder", [])])       # its LLM is its own, and in floating point
def test_question_from_the_command_line(vlm, surrogate, stages, tiny_llm, tmp_path, capsys, stage, options):
    RAGGED[1].image.save(tmp_path / "sign.png")
    graft.main(["--encoder", stages[stage], "--image", str(tmp_path / "sign.png"), "--question", Q,
                "--max-new-tokens", "9", *options])
    system = VLM.from_pretrained(tiny_llm, stages[stage]) if stage == "decoder" else vlm
    system = as_pair(vlm, surrogate) if "--pair" in options else system
    said = capsys.readouterr().out.split("\n[first token after")[0].strip()
    assert said == printable(system.chat(RAGGED[1].image, Q, max_new_tokens=9))


# ---- the shipped weights --------------------------------------------------------------------------------------------


def test_the_ten_lines_of_the_readme(default_gguf, tmp_path):
    """As a user runs them, in another folder: the pair does not name the language, the graft does."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    got = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    pair, grafted = got.stdout.split("graft:")
    assert pair.startswith("pair: ") and "Arabic" not in pair and "Arabic" in grafted


@pytest.fixture(scope="module")
def shipped(smollm, smollm_tokenizer):
    """(graft, surrogate)"""
    file = ROOT / "assets" / "encoder.safetensors"
    return VLM.from_pretrained(smollm, file, tokenizer=smollm_tokenizer), load_surrogate(smollm, file)


def test_the_surrogate_taught_the_encoder(shipped, smollm, smollm_tokenizer):
    """Before training the image brings nothing to the full LLM; after training through the surrogate it does."""
    before = VLM.untrained("assets/vit.safetensors", smollm, smollm_tokenizer, True, 0).requires_grad_(False)
    rows = evaluate.image_brings(*shipped, 32, before=before, progress=False)
    brings = {r["system"]: r["brings"] for r in rows}
    assert abs(brings["before"]) < 0.03 and brings["graft"] > 0.15 and brings["pair"] > 0.15, brings

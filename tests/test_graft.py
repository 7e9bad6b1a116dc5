"""graft.py: ranking against brute force, greedy answers, the comparison and its files, conversations, bad input."""

import copy
import json
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

import graft
from data import world
from data.batches import wrap
from formats import convert
from model import VLM, Llama
from surrogate import load_surrogate, load_translators

ROOT = Path(__file__).parent.parent
Q = "What is it?"


def as_pair(vlm, surrogate):
    """The same encoder in front of the surrogate, as a VLM of its own."""
    pair = copy.copy(vlm)
    pair._modules = vlm._modules | {"decoder": surrogate}
    return pair


def make_samples(questions, options):
    """Samples with questions and options of our choice, each about another image."""
    samples = [world.world("read", i, 7, "test") for i in range(len(questions))]
    for s, question, o in zip(samples, questions, options):
        s.messages[0]["content"], s.options, s.answer = wrap(question), o, o[0]
    return samples


RAGGED = make_samples(["What?", "What word is on the sign, and what is the color of the sign?", "Which animal is it?"],
                      [["Yes.", "The word is Bread.", "Not at all, it is a cat."], ["It is a fish.", "No.", "A."],
                       ["A sign.", "The capital is Paris."]])  # fmt: skip


def answers(vlm, surrogate, samples, **options):
    """graft.answer about the samples' images."""
    embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:1]) for s in samples], [s.image for s in samples])
    return graft.answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer, **options)


# ---- ranking and answering ------------------------------------------------------------------------------------------


def brute_force(vlm, sample):
    """log p of every option: one forward pass for each, over the whole sequence, without batch, padding or cache."""
    out = []
    for option in sample.options:
        prompt = vlm.prompt(sample.messages[:1])
        ids = vlm.tokenizer.encode_text(option) + vlm.tokenizer.turn_end
        embeds, _ = vlm.embed_prompts([prompt + ids], [sample.image])
        logp = vlm.decoder(embeds=embeds)[0].double().log_softmax(-1)  # (T, vocab)
        out.append(sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(ids)))
    return out


EVEN = [world.world("color", i, 3, "test") for i in range(2)]


@pytest.mark.parametrize("samples", [RAGGED, RAGGED[:1], EVEN], ids=["ragged", "one", "even"])
def test_ranking_equals_brute_force(vlm, surrogate, samples, monkeypatch):
    scores = []
    monkeypatch.setattr(graft, "option_logp", lambda *a, f=graft.option_logp: scores.append(f(*a)) or scores[-1])
    got = answers(vlm, surrogate, samples)
    assert list(got) == ["pair", "graft"] and len(scores) == 2 * len(samples)
    for (name, results), own, system in zip(got.items(), (scores[::2], scores[1::2]), (as_pair(vlm, surrogate), vlm)):
        with torch.no_grad():
            expected = [torch.tensor(brute_force(system, s)) for s in samples]  # (options,) of each
        assert all((a - b).abs().max() < 1e-3 for a, b in zip(own, expected, strict=True)), name
        assert [choice for choice, _ in results] == [int(e.argmax()) for e in expected]
    assert (scores[0] - scores[1]).abs().max() > 0.1  # pair and graft are two


def test_greedy_answers_equal_generate(vlm, surrogate):
    got = answers(vlm, surrogate, RAGGED, max_new_tokens=12)
    for name, system in (("pair", as_pair(vlm, surrogate)), ("graft", vlm)):
        alone = [system.generate([system.prompt(s.messages[:1])], [s.image], max_new_tokens=12)[0] for s in RAGGED]
        assert [text for _, text in got[name]] == [vlm.tokenizer.decode(ids).strip() for ids in alone]
    assert got["pair"] != got["graft"]
    assert answers(vlm, None, RAGGED, max_new_tokens=12) == {"graft": got["graft"]}  # with no surrogate: the same


def test_option_logp_by_hand():
    """Two options of one and two tokens over three words, all probabilities known."""
    p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.7, 0.2])
    decoder = types.SimpleNamespace(logits=lambda hidden: hidden)
    before = torch.stack([torch.stack([p[0].log() + 3, p[1].log() - 1])] * 2)  # logits: any constant may be added
    got = graft.option_logp(decoder, before, torch.tensor([[2, 0], [0, 1]]), torch.tensor([1, 2]), chunk=2)
    assert torch.allclose(got, torch.tensor([math.log(0.2), math.log(0.5 * 0.7)]))


# ---- the comparison -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right, n, low, high", [(8, 10, 0.490, 0.943), (0, 10, 0, 0.278), (10, 10, 0.722, 1),
                                                 (50, 100, 0.404, 0.596), (1, 30, 0.006, 0.167), (0, 0, 0, 1)])
def test_wilson(right, n, low, high):
    """Against published values of the score interval (R's prop.test with correct=FALSE gives the same)."""
    assert graft.wilson(right, n) == pytest.approx((low, high), abs=6e-4)


def test_compare_counts_right(monkeypatch):
    """Rigged systems: the pair ranks two of every three right and says nothing, the graft ranks the third right and
    says everything; `direct` is always right and shouts; the text says the right word and a rival."""
    seen = []

    def systems(vlm, surrogate, direct, samples):
        assert (vlm, surrogate, direct) == ("vlm", "surrogate", "direct")
        out = {"text": [], "direct": [], "graft": [], "pair": []}
        for s in samples:
            right, wrong, third = s.options.index(s.answer), s.options.index(s.answer) - 1, len(seen) % 3 == 2
            out["text"].append((wrong, f"{s.answer} Or is it {s.rivals[0]}?"))
            out["direct"].append((right, s.answer.upper()))
            out["graft"].append((right if third else wrong, s.answer))
            out["pair"].append((wrong if third else right, ""))
            seen.append(s)
        return out.items()

    monkeypatch.setattr(graft, "systems", systems)
    tasks = ("color", "capital")
    rows = graft.compare("vlm", "surrogate", n=7, batch=3, tasks=tasks, seed=5, direct="direct", progress=False)
    names = [(task, system, task == "color") for task in tasks for system in ("text", "direct", "graft", "pair")]
    assert [(r["task"], r["system"], r["trained"]) for r in rows] == names
    thirds = [sum(i % 3 == 2 for i in range(a, a + 7)) for a in (0, 7)]
    for (text, direct, grafted, pair), third, options in zip((rows[:4], rows[4:]), thirds, (8, 10)):
        assert text["said"] == text["ranked"] == 0
        assert direct["ranked"] == direct["said"] == 1
        assert grafted["ranked"] == third / 7 and grafted["said"] == 1
        assert pair["ranked"] == (7 - third) / 7 and pair["said"] == 0
        for r in (text, direct, grafted, pair):
            assert r["samples"] == 7 and r["chance"] == pytest.approx(1 / options)
    assert seen == [world.world(task, i, 5, "test") for task in tasks for i in range(7)]


def test_systems_are_what_they_say(vlm, surrogate, stages, tiny_llm):
    """text has the caption where the image goes; direct its own encoder; pair and graft share theirs."""
    samples = [world.world("capital", i, 5, "test") for i in range(2)]
    direct = VLM.from_pretrained(tiny_llm, stages["full"])
    got = dict(graft.systems(vlm, surrogate, direct, samples))
    assert list(got) == ["text", "direct", "graft", "pair"]
    ours = answers(vlm, surrogate, samples)
    assert got["graft"] == ours["graft"] and got["pair"] == ours["pair"]
    assert got["direct"] == answers(direct, None, samples)["graft"]
    told = samples[0].messages[0]["content"].replace("<image>", " " + samples[0].caption)
    ids = vlm.generate([vlm.prompt([{"role": "user", "content": told}])], [], max_new_tokens=40)[0]
    assert got["text"][0][1] == vlm.tokenizer.decode(ids).strip()
    assert [name for name, _ in graft.systems(vlm, None, None, samples)] == ["text", "graft"]


def test_table():
    row = dict(samples=40, chance=0.1)
    rows = [row | dict(task="read", trained=True, system="graft", ranked=0.6, said=0.25),
            row | dict(task="read", trained=True, system="pair", ranked=0.625, said=0.5),
            row | dict(task="capital", trained=False, system="graft", ranked=0.2, said=0.05),
            row | dict(task="capital", trained=False, system="pair", ranked=0.1, said=0)]
    said, ranked = (part.split("\n") for part in graft.table(rows).strip().split("\n\n"))
    assert said[0] == "| said freely, right | graft | pair |"
    assert ranked[0] == "| ranked first among options | graft | pair |"
    assert said[2] == "| read | 25.0% (14%–40%) | 50.0% (35%–65%) |"
    assert said[3] == "| capital * | 5.0% (1%–17%) | 0.0% (0%–9%) |"
    assert ranked[4:] == ["| **trained, mean** | 60.0% (45%–74%) | 62.5% (47%–76%) |",
                          "| **never trained, mean** * | 20.0% (10%–35%) | 10.0% (4%–23%) |"]


def test_demo_says_what_pair_and_graft_say(vlm, surrogate, capsys):
    examples = graft.demo(vlm, surrogate)
    asked = [(s.task, s.caption) for s, _ in examples[:2]]
    assert asked == [("capital", "a sign with the word Kenya"), ("language", "the flag of Peru")]
    assert any(s.task in world.TRAINED_TASKS for s, _ in examples)
    sample, said = examples[1]
    for name, system in (("pair", as_pair(vlm, surrogate)), ("graft", vlm)):
        ids = system.generate([system.prompt(sample.messages[:1])], [sample.image], max_new_tokens=40)[0]
        assert said[name] == " ".join(vlm.tokenizer.decode(ids).split())
    sample = world.sample_of(random.Random(0), "capital", ("sign", "Kenya"))
    graft.show_demo([(sample, {"pair": "I see a sign.", "graft": "The capital of Kenya is Nairobi."})])
    printed = capsys.readouterr().out
    assert "a sign with the word Kenya | * What" in printed or "a sign with the word Kenya | * Name" in printed
    assert "pair:  -" in printed and "graft: right  The capital of Kenya is Nairobi." in printed


def test_any_answer_can_be_drawn(tmp_path):
    """Formulas, many lines, no answer: matplotlib must not read anything into them."""
    samples = [world.world("read", i, 0, "test") for i in range(5)]
    texts = ["$5 {and} $6_", "two\nlines\n" * 9, "", samples[3].answer, "long " * 50]
    graft.plot_demo([(s, {"pair": s.answer, "graft": a}) for s, a in zip(samples, texts)]).savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.filterwarnings("ignore:Glyph")  # a random LLM writes control characters
def test_comparison_from_the_command_line(stages, tiny_llm, tmp_path, capsys):
    argv = ["--encoder", stages["encoder"], "--direct", stages["full"], "--eval", "3", "--batch", "2"]
    argv += ["--out", str(tmp_path)]
    graft.main(argv)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["command"] == "python graft.py " + " ".join(argv)
    assert results["samples"] == 3 and results["llm"] == tiny_llm and results["about"]["stage"] == "encoder"
    tasks = world.TRAINED_TASKS + world.KNOWLEDGE_TASKS
    names = [(task, system) for task in tasks for system in ("text", "direct", "graft", "pair")]
    assert [(r["task"], r["system"]) for r in results["rows"]] == names
    for r in results["rows"]:
        assert r["samples"] == 3 and {r["ranked"], r["said"]} <= {0, 1 / 3, 2 / 3, 1}
        assert r["chance"] == pytest.approx({"color": 1 / 8, "shape": 1 / 8, "continent": 1 / 4}.get(r["task"], 1 / 10))
    assert graft.table(results["rows"]) in printed and "4 of 6 layers" in printed and "3 held-out images" in printed
    with Image.open(tmp_path / "demo.png") as picture:
        picture.load()
        assert min(picture.size) > 300
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", "demo.png"}
    # the same numbers again, whatever the batch; without a surrogate there is no pair
    graft.main([*argv, "--batch", "3"])
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    graft.main(["--encoder", stages["full"], "--direct", "", "--eval", "3", "--out", str(tmp_path)])
    alone = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [{k: v for k, v in r.items() if k != "system"} for r in alone] == \
        [{k: v for k, v in r.items() if k != "system"} for r in results["rows"] if r["system"] in ("text", "direct")]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_trained_decoder_is_what_answers(stages, tiny_llm, tmp_path, capsys):
    """A checkpoint of stage 3 brings its own decoder."""
    graft.main(["--encoder", stages["decoder"], "--eval", "2", "--direct", "", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {r["system"] for r in rows} == {"text", "graft"} and "no surrogate" in capsys.readouterr().out
    trained = VLM.from_pretrained(tiny_llm, stages["decoder"])
    samples = [world.world("read", i, graft.EVAL_SEED, "test") for i in range(2)]
    expected = answers(trained, None, samples)["graft"]
    right = sum(s.options[choice] == s.answer for s, (choice, _) in zip(samples, expected))
    assert next(r for r in rows if (r["task"], r["system"]) == ("read", "graft"))["ranked"] == right / 2


# ---- asking ---------------------------------------------------------------------------------------------------------


def test_the_seeds_use(stages, tiny_llm, tmp_path):
    """Load, give an image and a question, print the answer."""
    world.world("read", 0).image.save(tmp_path / "sign.png")
    vlm = VLM.from_pretrained(tiny_llm, encoder=stages["encoder"])
    text = vlm.chat(str(tmp_path / "sign.png"), "What word is on the sign?")
    assert isinstance(text, str) and text
    assert text == vlm.chat(world.world("read", 0).image, "what word is on the sign?")  # wrap lowers the w


def test_released_layout_grafts(stages, tiny_llm, tmp_path):
    """A checkpoint through the paper's .pth and back: encoder, projector and translator have every weight again."""
    pth, back = str(tmp_path / "ckpt_01_0000003.pth"), str(tmp_path / "encoder.safetensors")
    convert.main([stages["encoder"], pth])
    convert.main([pth, back, "--llm", tiny_llm, "--vit", stages["vit"], "--replace", "2-4",
                  "--init", stages["translator"]])
    llm = Llama.from_pretrained(tiny_llm)
    for a, b in [(VLM.from_pretrained(tiny_llm, file) for file in (stages["encoder"], back)),
                 (load_surrogate(llm, file) for file in (stages["encoder"], back))]:  # fmt: skip
        a, b = dict(a.named_parameters()), dict(b.named_parameters())
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    other = Llama.from_pretrained(tiny_llm, layers=[0, 1])
    both = "does not belong.*layers.2.mlp.down_proj.weight.*layers.2.self_attn.q_proj.weight"
    with pytest.raises(ValueError, match=both):
        load_translators(other, back)  # every key that does not fit is named


def test_streamed_answer_equals_chat(vlm):
    image, pieces = RAGGED[0].image, []
    messages = [{"role": "user", "content": wrap(Q)}]
    text, timing = graft.ask(vlm, image, messages, max_new_tokens=40, show=pieces.append)
    assert text == vlm.chat(image, Q, max_new_tokens=40) == "".join(pieces).strip() and text
    assert len(pieces) > 3 and "first token after" in timing and "tokens/s" in timing
    messages = [{"role": "user", "content": Q}]  # without an image
    text, _ = graft.ask(vlm, None, messages, max_new_tokens=3, show=pieces.append)
    assert text == vlm.tokenizer.decode(vlm.generate([vlm.prompt(messages)], [], max_new_tokens=3)[0]).strip()


def test_conversation_remembers(vlm, monkeypatch, capsys):
    """Two turns at the terminal: the second prompt holds the first turn; only the first question holds the image."""
    lines, heard, ask = iter([" What is it? ", "Are you sure?", ""]), [], graft.ask

    def listen(vlm, image, messages, **options):
        heard.append([dict(m) for m in messages])
        return ask(vlm, image, messages, **options)

    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(graft, "ask", listen)
    graft.chat(vlm, RAGGED[0].image, dict(max_new_tokens=8))
    printed = capsys.readouterr().out
    first = vlm.chat(RAGGED[0].image, Q, max_new_tokens=8)
    turns = [{"role": "user", "content": wrap(Q)}, {"role": "assistant", "content": first},
             {"role": "user", "content": "Are you sure?"}]  # fmt: skip
    assert heard == [turns[:1], turns]
    second = vlm.tokenizer.decode(vlm.generate([vlm.prompt(turns)], [RAGGED[0].image], max_new_tokens=8)[0]).strip()
    assert printed.index(first) < printed.rindex(second)
    assert printed.count("llm> ") == printed.count("first token after") == 2


@pytest.mark.parametrize("system", [[], ["--pair"]])
def test_question_from_the_command_line(vlm, surrogate, stages, tmp_path, capsys, system):
    RAGGED[1].image.save(tmp_path / "sign.png")
    graft.main(["--encoder", stages["encoder"], "--image", str(tmp_path / "sign.png"), "--question", Q,
                "--max-new-tokens", "9", "--no-int8", *system])  # fmt: skip
    expected = (as_pair(vlm, surrogate) if system else vlm).chat(RAGGED[1].image, Q, max_new_tokens=9)
    printed = capsys.readouterr().out
    assert printed.split("\n[first token after")[0].strip() == expected


def test_stage_3_answers_in_floating_point(stages, tiny_llm, tmp_path, capsys):
    """Its LLM is its own: without an option it is not asked in int8. In the table it is not called zero-shot."""
    RAGGED[1].image.save(tmp_path / "sign.png")
    graft.main(["--encoder", stages["decoder"], "--image", str(tmp_path / "sign.png"), "--max-new-tokens", "9"])
    expected = VLM.from_pretrained(tiny_llm, stages["decoder"]).chat(
        RAGGED[1].image, "Describe the image.", max_new_tokens=9)
    assert capsys.readouterr().out.split("\n[first token after")[0].strip() == expected
    graft.main(["--encoder", stages["decoder"], "--eval", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "there is no surrogate" in printed and "zero-shot" not in printed


def test_conversation_as_a_user_sees_it(stages, tmp_path):
    """A fresh Python, questions through a pipe, until its end."""
    argv = ["graft.py", "--encoder", stages["encoder"], "--chat", "--max-new-tokens", "5", "--out", str(tmp_path)]
    asked = "What word is on the sign?\nAnd now?\n"
    got = subprocess.run([sys.executable, *argv], cwd=ROOT, input=asked, capture_output=True, text=True)
    assert got.returncode == 0 and got.stderr == ""
    assert got.stdout.count("llm> ") == 2 and (tmp_path / "sign.png").exists()


# ---- the shipped weights --------------------------------------------------------------------------------------------


def test_the_ten_lines_of_the_readme(default_gguf, tmp_path):
    """As a user runs them, in another folder: the pair does not know the capital, the graft does."""
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    got = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                         capture_output=True, text=True)
    assert got.returncode == 0, got.stderr[-2000:]
    pair, grafted = got.stdout.split("graft:")
    assert pair.startswith("pair: ") and "Tokyo" not in pair and "Tokyo" in grafted


def test_the_graft_knows_what_the_pair_does_not(smollm, smollm_tokenizer):
    """Claim 1 on a few images that nothing was chosen on: never trained, said freely."""
    file = ROOT / "assets" / "encoder.safetensors"
    vlm = VLM.from_pretrained(smollm, file, tokenizer=smollm_tokenizer)
    rows = graft.compare(vlm, load_surrogate(smollm, file), n=12, tasks=world.KNOWLEDGE_TASKS, seed=11, progress=False)
    said = {name: sum(12 * r["said"] for r in rows if r["system"] == name) for name in ("text", "graft", "pair")}
    assert said["graft"] >= said["pair"] + 3, said         # of 36; over 1,500 images: assets/results.json

"""evaluate.py: ranking against brute force, greedy answers, intervals, what an image brings, tables, the demo."""
import random

import pytest
import torch
from PIL import Image
from test_graft import RAGGED, answers, as_pair

import evaluate
from data import world
from data.batches import collate
from model import VLM

# ---- ranking and answering ------------------------------------------------------------------------------------------


def brute_force(vlm, sample):
    """(log p, whether all of its tokens are the likeliest) of every option: one forward pass for each, over the whole
    sequence, without batch, padding or cache."""
    logps, greedy = [], []
    for ids in evaluate.option_ids(vlm.tokenizer, sample.options):
        prompt = vlm.prompt(sample.messages[:1])
        embeds, _ = vlm.embed_prompts([prompt + ids], [sample.image])
        logp = vlm.decoder(embeds=embeds)[0, len(prompt) - 1:-1].double().log_softmax(-1)           # (n, vocab)
        logps.append(logp[torch.arange(len(ids)), ids].sum())
        greedy.append(logp.argmax(-1).tolist() == ids)
    return torch.stack(logps), torch.tensor(greedy)


EVEN = [world.world("color", i, 3, "test") for i in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("samples", [RAGGED, EVEN], ids=["ragged", "even"])
def test_ranking_equals_brute_force(vlm, surrogate, samples):
    embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:1]) for s in samples], [s.image for s in samples])
    options, got = [evaluate.option_ids(vlm.tokenizer, s.options) for s in samples], answers(vlm, surrogate, samples)
    pair = as_pair(vlm, surrogate)
    expected = {name: [brute_force(system, s) for s in samples] for name, system in (("pair", pair), ("graft", vlm))}
    for chunk in (3, 16):
        ranked = evaluate.Reading(embeds, lengths, vlm.decoder, surrogate).option_logp(options, chunk)
        assert list(ranked) == list(got) == ["pair", "graft"]
        for name, (logps, greedy) in ranked.items():
            for k, (own, greedily) in enumerate(expected[name]):
                assert (logps[k] - own).abs().max() < 1e-3 and torch.equal(greedy[k], greedily), name
                assert got[name][k][0] == int(own.argmax())
    assert (ranked["pair"][0][0] - ranked["graft"][0][0]).abs().max() > 0.1         # pair and graft are two


@torch.no_grad()
def test_what_would_be_said_greedily_is_marked(vlm):
    """The greedy answer itself, as an option among others."""
    embeds, lengths = vlm.embed_prompts([vlm.prompt(RAGGED[0].messages[:1])], [RAGGED[0].image])
    reading = evaluate.Reading(embeds, lengths, vlm.decoder)
    (said,) = reading.say(5, ())["graft"]
    (logps,), (greedy,) = reading.option_logp([[said, [*said[:-1], 7], said[:2]]])["graft"]
    assert greedy.tolist() == [True, said[-1] == 7, True] and logps[0] < logps[2] < 0


def test_greedy_answers_equal_generate(vlm, surrogate):
    got = answers(vlm, surrogate, RAGGED, max_new_tokens=12)
    for name, system in (("pair", as_pair(vlm, surrogate)), ("graft", vlm)):
        alone = [system.generate([system.prompt(s.messages[:1])], [s.image], max_new_tokens=12)[0] for s in RAGGED]
        assert [text for _, text in got[name]] == [vlm.tokenizer.decode(ids).strip() for ids in alone]
    assert got["pair"] != got["graft"]
    assert answers(vlm, None, RAGGED, max_new_tokens=12) == {"graft": got["graft"]}  # with no surrogate: the same


# ---- the comparison -------------------------------------------------------------------------------------------------


def test_bootstrap():
    """Without clusters, the interval of a proportion as the normal approximation has it; with clusters, wider."""
    values = [i % 2 for i in range(400)]
    mean, low, high = evaluate.bootstrap(values, range(400))
    assert mean == 0.5 and low == pytest.approx(0.451, abs=0.01) and high == pytest.approx(0.549, abs=0.01)
    clusters = [i % 2 + 2 * (i // 40) for i in range(400)]              # 20 subjects, right or wrong as a whole
    _, wide, _ = evaluate.bootstrap(values, clusters)
    assert wide < 0.33
    assert evaluate.bootstrap([6, 1], "ab", [3, 1])[0] == pytest.approx(7 / 4)
    assert evaluate.bootstrap([1, 1, 1], "abc") == (1, 1, 1)


def test_compare_counts_right(monkeypatch):
    """Rigged systems: the graft ranks every third right and shouts what is right; the pair ranks the others right and
    says the right word and a rival."""
    seen = []

    def systems(vlm, surrogate, samples, before, direct, text):
        assert (vlm, surrogate, before, direct, text) == ("vlm", "surrogate", None, "direct", True)
        out = {"pair": [], "graft": []}
        for s in samples:
            right, third = s.options.index(s.answer), len(seen) % 3 == 2
            out["pair"].append((right - third, f"{s.answer} Or is it {s.rivals[0]}?"))
            out["graft"].append((right - (not third), s.answer.upper()))
            seen.append(s)
        return out.items()

    monkeypatch.setattr(evaluate, "systems", systems)
    tasks = ("color", "capital")
    rows = evaluate.compare("vlm", "surrogate", n=7, batch=3, tasks=tasks, seed=5, direct="direct", progress=False)
    assert seen == [world.world(task, i, 5, "test") for task in tasks for i in range(7)]
    assert [(r["task"], r["system"], r["trained"]) for r in rows] == [
        (task, system, task == "color") for task in tasks for system in ("pair", "graft")]
    thirds = [[int(i % 3 == 2) for i in range(a, a + 7)] for a in (0, 7)]
    for pair, grafted, third, options in zip(rows[::2], rows[1::2], thirds, (8, 10)):
        assert grafted["ranked"] == third and grafted["said"] == [1] * 7
        assert pair["ranked"] == [1 - x for x in third] and pair["said"] == [0] * 7
        assert len(pair["about"]) == 7 and pair["chance"] == pytest.approx(1 / options)


def test_systems_are_what_they_say(vlm, surrogate, stages, tiny_llm):
    """text has the caption where the image goes; before and direct their own encoders; pair and graft share theirs."""
    samples = [world.world("capital", i, 5, "test") for i in range(2)]
    direct = VLM.from_pretrained(tiny_llm, stages["full"])
    before = VLM.untrained(stages["vit"], vlm.decoder, vlm.tokenizer, True, 0)
    got = dict(evaluate.systems(vlm, surrogate, samples, before, direct))
    assert list(got) == ["before", "pair", "graft", "direct", "text", "text, pair"]
    ours = answers(vlm, surrogate, samples)
    assert got["graft"] == ours["graft"] and got["pair"] == ours["pair"]
    assert got["direct"] == answers(direct, None, samples)["graft"]
    assert got["before"] == answers(before, None, samples)["graft"]
    told = samples[0].messages[0]["content"].replace("<image>", " " + samples[0].caption)
    for name, system in (("text", vlm), ("text, pair", as_pair(vlm, surrogate))):
        ids = system.generate([vlm.prompt([{"role": "user", "content": told}])], [], max_new_tokens=40)[0]
        assert got[name][0][1] == vlm.tokenizer.decode(ids).strip()
    assert [name for name, _ in evaluate.systems(vlm, None, samples)] == ["graft", "text"]
    assert [name for name, _ in evaluate.systems(vlm, surrogate, samples, text=False)] == ["pair", "graft"]


def test_what_an_image_brings(vlm, surrogate, monkeypatch):
    """Against one sample at a time, and the wrong image by hand: of the same kind, with another caption."""
    monkeypatch.setattr(evaluate, "FRESH_SEED", 3)
    n, size = 12, vlm.encoder.config.image_size
    samples = [world.World(3)[i] for i in range(n)]
    other = evaluate.wrong_images(samples)
    pictures = {id(s.image): s for s in samples}
    for s, o in zip(samples, other):
        shown = pictures[id(o.image)]
        assert shown.caption != s.caption and (o.messages, o.caption) == (s.messages, s.caption)
        assert ("sign" in shown.caption) == ("sign" in s.caption) and ("flag" in shown.caption) == ("flag" in s.caption)
    rows = evaluate.image_brings(vlm, surrogate, n, progress=False)
    assert [r["system"] for r in rows] == ["pair", "graft"]
    for row, system in zip(rows, (as_pair(vlm, surrogate), vlm)):
        for name, these in (("right", samples), ("wrong", other)):
            alone = [collate([s], vlm.tokenizer, vlm.n_visual, size) for s in these]
            with torch.no_grad():
                mean = sum(system.loss(b).item() for b in alone) / sum(int((b["targets"] >= 0).sum()) for b in alone)
            assert row[name] == pytest.approx(mean, rel=1e-4)
        assert row["brings"] == pytest.approx(row["wrong"] - row["right"], abs=1e-4) and row["low"] <= row["high"]


def test_tables():
    rows = [dict(task=task, trained=task == "read", split="test", system=system, said=said, ranked=[1, 1, 0, 1],
                 about=list("abcd"))
            for task in ("read", "capital") for system, said in (("pair", [0, 0, 0, 0]), ("graft", [1, 0, 1, 0]))]
    said, ranked = (part.split("\n") for part in evaluate.table(rows).split("\n\n"))
    assert said[0] == "| said freely, right | pair | graft |" and said[2].startswith("| read | 0% (0%–0%) | 50% (")
    assert [line.split(" | ")[0] for line in ranked] == [
        "| ranked first among options", "| ---", "| read", "| capital *", "| **trained, mean**",
        "| **never trained, mean** *"]
    untaught = evaluate.table([r | dict(split="untaught") for r in rows])
    assert "| said freely, right, of what no training named | pair" in untaught
    brings = [dict(system="graft", samples=4, right=1.0, wrong=1.5, brings=0.5, low=0.25, high=0.75)]
    assert evaluate.brings_table(brings).endswith("| **the image brings** | 0.500 (0.25–0.75) |")


def test_demo_says_what_the_systems_say(vlm, surrogate, stages, capsys):
    before = VLM.untrained(stages["vit"], vlm.decoder, vlm.tokenizer, True, 0)
    examples = evaluate.demo(vlm, surrogate, before)
    asked = [(s.task, s.caption) for s, _ in examples[:2]]
    assert asked == [("language", "the flag of Finland"), ("capital", "the flag of Algeria")]
    assert any(s.task in world.TRAINED_TASKS for s, _ in examples)
    sample, said = examples[1]
    for name, system in (("before", before), ("pair", as_pair(vlm, surrogate)), ("graft", vlm)):
        ids = system.generate([system.prompt(sample.messages[:1])], [sample.image], max_new_tokens=40)[0]
        assert said[name] == " ".join(vlm.tokenizer.decode(ids).split())
    sample = world.sample_of(random.Random(0), "capital", ("sign", "Kenya"))
    evaluate.show_demo([(sample, {"pair": "I see a sign.", "graft": "The capital of Kenya is Nairobi."})])
    printed = capsys.readouterr().out
    assert "a sign with the word Kenya | * " in printed
    assert "pair:  -" in printed and "graft: right  The capital of Kenya is Nairobi." in printed


def test_any_answer_can_be_drawn(tmp_path):
    """Formulas, many lines, no answer: matplotlib must not read anything into them."""
    texts = ["$5 {and} $6_", "two\nlines\n" * 9, "", "long " * 50]
    said = [(world.world("read", i, 0, "test"), {"pair": "", "graft": text}) for i, text in enumerate(texts)]
    evaluate.plot_demo(said).savefig(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300

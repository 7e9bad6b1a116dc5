"""studies/results.py: arms from the commands to the table, on the tiny LLM; the probe; the figure."""
import json

import pytest
import torch
from PIL import Image

import evaluate
from data import world
from formats.checkpoints import open_checkpoint, read_checkpoint
from formats.tokenizer import Tokenizer
from model import Llama
from studies import results
from surrogate import build_surrogate, load_surrogate

TASKS = ("color", "capital")
COMMON = "batch=4 dtype=float32"


@pytest.fixture(scope="module")
def arms(tiny_llm, stages):
    """Arms as the shipped ones, of a few steps."""
    first = f"distillation --llm {tiny_llm} --replace 2-4 steps=4 {COMMON}"
    second = f"train encoder --llm {tiny_llm} --vit {stages['vit']} {COMMON}"
    return {"ours": [first, second], "frozen": [first, f"{second} distill=0"],
            "random": [f"random --llm {tiny_llm} --replace 2-4 {COMMON}", f"{second} distill=0"],
            "direct": [f"{second} --direct"]}


@pytest.fixture(scope="module")
def out(arms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "ARMS", arms)
        patch.setattr(evaluate, "TASKS", TASKS)
        for name in arms:
            results.run_arm(name, steps=4, samples=1, out=folder, fresh=4)
        yield folder


def load(out, name):
    return json.loads((out / f"{name}-4-seed0.json").read_text())


def test_an_arm_is_its_commands(out, arms):
    ours, frozen, direct = (load(out, name) for name in ("ours", "frozen", "direct"))
    assert ours["commands"] == arms["ours"] and len(ours["tera"]) == len(ours["seconds"]) == 2
    assert {r["system"] for r in ours["rows"]} == {"pair", "graft"} == {r["system"] for r in ours["brings"]}
    assert {r["system"] for r in direct["rows"]} == {"graft"} and len(direct["tera"]) == 1
    assert [json.loads(f.read_text())["tera"] for f in out.glob("distillation*/cost.json")] == [ours["tera"][0]]
    assert ours["tera"][0] == frozen["tera"][0]                 # one surrogate for both: trained once
    assert load(out, "random")["commands"][1] == frozen["commands"][1]  # each goes on from its own stage 1
    for first in ("distillation", "random"):
        encoder = next(out.glob(f"{first}*/train-encoder*distill=0*steps=4-*/encoder.safetensors"))
        assert open_checkpoint(encoder)[1]["start"].startswith(str(out / first))


def test_random_translators_are_of_the_right_size(out, tiny_llm):
    tensors, about = read_checkpoint(next(out.glob("random-*/translator.safetensors")))
    trained, _ = read_checkpoint(next(out.glob("distillation-*/translator.safetensors")))
    assert tensors.keys() == trained.keys() and about["stage"] == "translator"
    for n, t in tensors.items():
        if t.dim() > 1:
            assert 0.8 < t.float().std() / trained[n].float().std() < 1.25 and not (t == trained[n]).any(), n


def test_what_is_done_is_not_done_again(out, arms, monkeypatch):
    monkeypatch.setattr(results, "ARMS", arms)
    monkeypatch.setattr(results, "run_command", None)
    done = load(out, "ours")
    assert results.run_arm("ours", steps=4, samples=done["samples"], out=out) == done
    with pytest.raises(TypeError):                              # it would ask again: of another number of images
        results.run_arm("ours", steps=4, samples=done["samples"] + 1, out=out)


def test_table_and_figure(out, arms, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "ARMS", arms)
    rows = [load(out, name) for name in arms]
    text = results.table([*rows, rows[0] | dict(seed=1)]).split("\n")
    assert text[2].startswith("| ours | 4 | 2 |") and " → " in text[2] and " ± " in text[2]
    assert " → " not in text[-1] and text[-1].startswith("| direct | 4 | 1 |")
    results.plot([*rows, rows[0] | dict(steps=8)]).savefig(tmp_path / "flops.png")
    with Image.open(tmp_path / "flops.png") as picture:
        assert min(picture.size) > 300


def test_probe(stages):
    right = results.probe(stages["vit"], steps=2, batch=4)
    assert list(right) == ["sign", "flag", "shape", "new color and shape"]
    assert all(0 <= share <= 1 for share in right.values())


def test_what_a_surrogate_keeps(tiny_llm, stages, monkeypatch, capsys):
    """Perplexity by hand; answers by caption are those that the model gives alone; the command's columns."""
    llm, tokenizer = Llama.from_pretrained(tiny_llm), Tokenizer.from_pretrained(tiny_llm)
    tokens = torch.randint(500, (3, 9))
    with torch.no_grad():
        logp = llm(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
    assert results.perplexity(llm, tokens) == pytest.approx((-logp.mean()).exp().item(), rel=1e-4)

    cut = build_surrogate(llm, [(2, 4)])
    rows = results.knows({"LLM": llm, "cut": cut}, tokenizer, n=3, batch=2)
    assert [(r["task"], r["system"]) for r in rows] == [(t, s) for t in world.KNOWLEDGE_TASKS for s in ("LLM", "cut")]
    for row, asked in zip(rows, (llm, cut) * 3):
        for i in range(3):
            sample = world.world(row["task"], i, evaluate.EVAL_SEED, "test")
            prompt = tokenizer.chat(evaluate.told(sample)[:-1])
            assert tokenizer.decode(prompt).count(sample.caption) == 1
            said = asked.generate([prompt], max_new_tokens=40, stop=tokenizer.stop_tokens)[0]
            assert row["said"][i] == world.is_right(tokenizer.decode(said), sample)

    monkeypatch.setattr(results, "read_texts", lambda tokenizer: tokens)
    results.show_kept(stages["translator"], n=2)
    lines = capsys.readouterr().out.splitlines()
    of = (llm, cut, load_surrogate(llm, stages["translator"]))
    cells = " | ".join(f"{results.perplexity(x, tokens):.4g}" for x in of)
    assert f"| perplexity of assets/text.txt | {cells} |" in lines
    assert sum(line.startswith("| capital *") for line in lines) == 2           # said freely, ranked

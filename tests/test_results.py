"""studies/results.py: arms from the commands to the table, on the tiny LLM; the probe; the figure."""
import json

import pytest
from PIL import Image

import evaluate
from formats.checkpoints import open_checkpoint, read_checkpoint
from studies import results

TASKS = ("color", "capital")
COMMON = "batch=4 dtype=float32"


@pytest.fixture(scope="module")
def arms(tiny_llm, stages):
    """Arms as the shipped ones, of a few steps."""
    first = f"distillation --llm {tiny_llm} --replace 2-4 steps=4 {COMMON}"
    second = f"train encoder --llm {tiny_llm} --vit {stages['vit']} {COMMON}"
    return {"ours": [first, second], "frozen": [first, f"{second} distill=0"],
            "random": [f"random --llm {tiny_llm} --replace 2-4 {COMMON}", f"{second} distill=0"],
            "direct": [f"{second} --replace none --init none"]}


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
    encoder = next(out.glob("train-encoder*distill=0*steps=4-seed0/encoder.safetensors"))
    assert open_checkpoint(encoder)[1]["start"].startswith(str(out / "distillation"))


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
    assert results.run_arm("ours", steps=4, out=out) == load(out, "ours")


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

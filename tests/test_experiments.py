"""studies/ablation.py: what is counted, a recipe from seed to results, what is not done twice, table and plots."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import graft
import train
from formats import checkpoints
from model import VLM
from studies import ablation

SURROGATE = ["translator --init {vit} --replace 2-4 --steps 2 --chats 8 --distill-every 1"]
TINY = {"frozen": [*SURROGATE, "encoder --init {before} --distill-every 0"],
        "taught": [*SURROGATE, "encoder --init {before} --distill-every 1"],
        "direct": ["encoder --init {vit} --replace none"]}


@pytest.fixture(scope="module")
def run(stages, tiny_llm, cache, tmp_path_factory):
    """run(name, seed): one of the TINY recipes, from seed to results."""
    out = tmp_path_factory.mktemp("experiments")
    options = ["--llm", tiny_llm, "--dtype", "float32", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        yield lambda name, seed=0: ablation.run_recipe(name, seed, steps=2, batch=5, samples=2, out=out,
                                                          vit=stages["vit"], stages=TINY[name], options=options)


@pytest.fixture(scope="module")
def results(run):
    return [run(name, seed) for name, seed in (("frozen", 0), ("taught", 0), ("direct", 0), ("direct", 1))]


# ---- counting -------------------------------------------------------------------------------------------------------


def test_flops_of_products_and_attention(monkeypatch):
    """One linear layer and one attention, forward and backward, against the formula."""
    def main(argv):
        assert Path(value := argv[argv.index("--out") + 1]).is_dir(), value
        x = torch.randn(6, 32, requires_grad=True)                                          # 6 rows
        (x @ torch.randn(32, 8)).sum().backward()                                           # 2 * 6 * 32 * 8, twice
        q, k, v = (torch.randn(1, 2, 10, 16, requires_grad=True) for _ in range(3))         # 2 heads, 10 positions
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()            # 2 products, and 4 backward

    monkeypatch.setattr(train, "main", main)
    assert ablation.measure(["encoder"]) == 2 * (2 * 6 * 32 * 8) + 6 * (2 * 2 * 10 * 10 * 16)


@pytest.mark.parametrize("epochs, expected", [(1, 1000 + 10 * 9), (4, 1000 + 3 * 9 + 7 * 4)])
def test_flops_of_a_stage(monkeypatch, epochs, expected):
    """What precedes the first step once, and 10 steps, of which those that go over kept states again cost less."""
    def measure(argv):
        steps, again = (int(ablation.value(argv, option, 1)) for option in ("--steps", "--epochs"))
        fresh = -(-steps // again)
        return 1000 + 9 * fresh + 4 * (steps - fresh)

    monkeypatch.setattr(ablation, "measure", measure)
    assert ablation.count_flops(["translator", "--steps", "10"], epochs) == expected


def test_gradients_of_a_perfect_and_a_real_surrogate(stages, tiny_llm, cache, tmp_path, capsys, monkeypatch):
    """A translator that is the layer which it replaces has cosine 1; the loss is what the LLM itself computes."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    new = ["translator", "--llm", tiny_llm, "--vit", stages["vit"], "--chats", "8", "--steps", "1", "--batch", "2"]
    train.main([*new, "--replace", "3-3", "--lr", "1e-9", "--out", str(tmp_path), "--dtype", "float32"])
    same = ablation.gradients(tmp_path / "translator.safetensors", 2, 4, dtype=torch.float32)
    assert same["ViT"] > 0.9999 and same["projector"] > 0.9999 and abs(same["pair: loss"] - same["graft: loss"]) < 1e-3
    vlm = VLM.from_pretrained(tiny_llm, tmp_path / "translator.safetensors")
    b = train.Batches(vlm, 8, 8, "answers+special", ablation.VALIDATION_SEED)[0][0][0][0]
    loss = vlm.loss(b["tokens"], b["targets"], b["pixels"]).item() / int((b["targets"] >= 0).sum())
    assert same["graft: loss"] == pytest.approx(loss, rel=1e-4)
    real = ablation.gradients(stages["translator"], 2, 4, dtype=torch.float32)
    assert -1 < real["ViT"] < 0.999
    capsys.readouterr()
    ablation.main(["--gradients", stages["translator"], "--batch", "4"])
    assert "| 2-4 | " in capsys.readouterr().out


# ---- a recipe -------------------------------------------------------------------------------------------------------


def test_results(results):
    frozen, taught, direct, other_seed = results
    assert [len(r["flops"]) for r in results] == [2, 2, 1, 1]
    assert 0 < frozen["flops"][-1] < direct["flops"][-1] and frozen["flops"][-1] < taught["flops"][-1]
    assert frozen["flops"][0] == taught["flops"][0] and direct["flops"] == other_seed["flops"]
    for r in results:
        assert r["stage_0"] == frozen["stage_0"] and r["stage_0"]["flops"] > 0
        systems = ["text", "graft"] if r["recipe"] == "direct" else ["text", "graft", "pair"]
        assert [(row["task"], row["system"]) for row in r["rows"]] == [(t, s) for t in graft.TASKS for s in systems]
        assert all(row["ranked"] in (0, 0.5, 1) for row in r["rows"])
    assert frozen["commands"][0] == taught["commands"][0] and frozen["commands"][1] != taught["commands"][1]
    assert "--seed 1" in other_seed["commands"][0]


def test_nothing_is_done_twice(run, results, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("it was done already")

    monkeypatch.setattr(train, "main", refuse)
    monkeypatch.setattr(ablation, "evaluate", refuse)
    assert run("taught") == results[1]
    monkeypatch.setitem(TINY, "again", TINY["frozen"])      # another name, the same stages: only the evaluation is new
    monkeypatch.setattr(ablation, "evaluate", lambda *args: dict(rows=results[0]["rows"]))
    again = run("again")
    assert all(again[k] == results[0][k] for k in ("commands", "flops", "seconds"))


def test_a_stage_goes_on_after_a_break(stages, tiny_llm, tmp_path, monkeypatch):
    argv = ["encoder", "--init", stages["vit"], "--replace", "none", "--llm", tiny_llm, "--batch", "2", "--steps", "4",
            "--dtype", "float32", "--device", "cpu", "--save-every", "2"]
    whole = ablation.run_stage(argv, tmp_path / "whole")
    assert whole["steps_done"] == 4 and not (tmp_path / "whole" / "state.safetensors").exists()

    def stop_at_2(path, tensors, about, save=checkpoints.save_checkpoint):
        save(path, tensors, about)
        if Path(path).name == "state.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_checkpoint", stop_at_2)
        ablation.run_stage(argv, tmp_path / "broken")
    file = "encoder.safetensors"
    assert checkpoints.read_checkpoint(tmp_path / "broken" / file)[1]["steps_done"] == 2
    assert ablation.run_stage(argv, tmp_path / "broken")["steps_done"] == 4
    ours, theirs = (checkpoints.read_checkpoint(tmp_path / run / file)[0] for run in ("broken", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_stage3(stages, tiny_llm, tmp_path):
    options = ["--llm", tiny_llm, "--dtype", "float32", "--device", "cpu"]
    starts = {"the grafted encoder": stages["encoder"], "scratch": stages["vit"]}
    results = ablation.stage3(starts, steps=(0, 2), batch=2, samples=1, out=tmp_path, options=options)
    assert [(r["start"], r["steps"]) for r in results] == [(s, n) for s in starts for n in (0, 2)]
    assert len(list(tmp_path.iterdir())) == 4, "only the results stay"
    before = ablation.evaluate(stages["encoder"], 1, options)["rows"]
    assert results[0]["rows"] == [r for r in before if r["system"] != "pair"], "0 steps: the graft as it is"
    assert ablation.read_results(tmp_path, kept=tmp_path / "none")[0] in results
    ablation.plot_stage3(results, tmp_path / "stage3.png")
    assert Image.open(tmp_path / "stage3.png").size == (1080, 480)


def test_unknown_recipe(capsys):
    with pytest.raises(ValueError, match="unknown recipe 'papper': choose from paper, healed, .*direct"):
        ablation.run_recipe("papper")
    with pytest.raises(ValueError, match="unknown recipe 'papper'"):
        ablation.main(["--run", "paper", "papper"])


def test_recipes_are_command_lines():
    """Every recipe is filled in completely, and recipes that begin alike share their first stage."""
    todo = {name: ablation.commands(stages, 3, 70, 16, "out", "vit")
            for name, (_, stages) in ablation.RECIPES.items()}
    for run in todo.values():
        argv, folder = run[-1]
        assert ablation.value(argv, "--steps") == "70" and ablation.value(argv, "--seed") == "3"
        assert "{" not in str(run) and len(run) in (1, 2)
        assert len(run) == 1 or ablation.value(argv, "--init") == str(run[0][1] / "translator.safetensors")
    assert todo["k-16"][0] == todo["two"][0] and todo["k-16"][1] != todo["two"][1]


# ---- table and plots ------------------------------------------------------------------------------------------------


def test_table(results):
    rows = [line.strip("| ").split(" | ") for line in ablation.table(results).splitlines()]
    assert [r[0] for r in rows[2:]] == ["frozen", "direct", "taught"]
    assert {len(r) for r in rows} == {7 + len(graft.TASKS)}
    of = {r[0]: dict(zip(rows[0], r)) for r in rows[2:]}
    assert of["direct"]["of direct"] == "100%" and of["direct"]["seeds"] == "2" and " ± " in of["direct"]["read"]
    assert of["frozen"]["replaced"] == "2-4" and " → " in of["frozen"]["capital *"]
    read = {r["system"]: r["ranked"] for r in results[0]["rows"] if r["task"] == "read"}
    assert of["frozen"]["read"] == f"{100 * read['pair']:.0f} → {100 * read['graft']:.0f}"


def test_command_line_shows_what_is_there(results, tmp_path, monkeypatch, capsys):
    """Results that were kept and new ones; the new one of the same run counts."""
    monkeypatch.setattr(ablation, "KEPT", str(tmp_path / "kept.json"))
    old = results[0] | dict(rows=[])
    (tmp_path / "kept.json").write_text(json.dumps([old, results[1]]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "frozen-2x5-seed0.json").write_text(json.dumps(results[0]))
    ablation.main(["--out", str(tmp_path / "out"), "--keep", "--plot", str(tmp_path / "plots")])
    assert "| frozen | 2-4 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "kept.json").read_text()) == results[:2]
    assert {f.name for f in (tmp_path / "plots").iterdir()} >= {"cost.png"}


def test_command_line_without_results(results, tmp_path, monkeypatch, capsys):
    """The smallest comparison: one surrogate, and the upper bound, on the same number of samples."""
    ran = []
    monkeypatch.setattr(ablation, "KEPT", str(tmp_path / "kept.json"))
    monkeypatch.setattr(ablation, "run_recipe", lambda name, **how: ran.append((name, how)) or results[len(ran)])
    ablation.main(["--out", str(tmp_path)])
    assert [name for name, _ in ran] == ["short", "direct"] and ran[0][1]["steps"] == ran[1][1]["steps"] == 30
    assert "No results yet" in capsys.readouterr().out and (tmp_path / "cost.png").exists()


def test_plot_of_the_graft(tmp_path):
    rows = [dict(task=t, system=s, ranked=p, said=p / 2, samples=10, chance=0.1)
            for t in graft.TASKS for s, p in (("text", 0.9), ("direct", 0.0), ("graft", 1.0), ("pair", 0.4))]
    ablation.plot_graft(dict(rows=rows, samples=10), tmp_path / "graft.png")
    image = Image.open(tmp_path / "graft.png").convert("RGB")
    assert image.getpixel((2, 2)) == (255, 255, 255), "white, on dark pages too"
    assert len(image.getcolors(1 << 20)) > 100

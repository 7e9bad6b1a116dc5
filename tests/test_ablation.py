"""studies/ablation.py: what is counted, a recipe from stage 1 to its scores, nothing done twice, table and plots."""
import dataclasses
import functools
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

import graft
import train
from data import world
from formats import checkpoints, log
from formats.errors import UserError
from model import Llama
from recipes import SMALL
from studies import ablation
from studies.ablation import RECIPES, Route

TINY = {
    "answers": Route("from the answers", "2-4", "answers", projector=True, steps=1),
    "distilled": Route("by distillation", "1-2,3-4", "llm", steps=4, epochs=2),
    "direct": Route("on the full LLM", "none", None, steps=0),
}
TASKS = ("color", "capital")        # that are asked


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def run(stages, out):
    """run(name): one of the TINY recipes, from stage 1 to its result."""
    usual = dict(steps=2, batch=5, samples=1, vit=stages["vit"], dtype="float32", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graft, "compare", functools.partial(graft.compare, tasks=TASKS, progress=False))
        yield lambda name, **more: ablation.run_recipe(name, **dict(route=TINY[name], out=out) | usual | more)


@pytest.fixture(scope="module")
def results(run):
    return {name: run(name) for name in TINY}


# ---- counting and gradients -----------------------------------------------------------------------------------------


def test_flops_of_products_and_attention():
    """One linear layer and one attention, forward and backward, against the formula."""
    def work():
        x = torch.randn(6, 32, requires_grad=True)                                          # 6 rows
        (x @ torch.randn(32, 8)).sum().backward()                                           # 2 * 6 * 32 * 8, twice
        q, k, v = (torch.randn(1, 2, 10, 16, requires_grad=True) for _ in range(3))         # 2 heads, 10 positions
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()            # 2 products, and 4 backward

    assert ablation.flops(work) == (None, 2 * (2 * 6 * 32 * 8) + 6 * (2 * 2 * 10 * 10 * 16))


def test_a_sample_that_is_read_again_costs_less(stages, tiny_llm):
    """The full LLM runs once over a sample, the translators at every reading."""
    llm, about = Llama.from_pretrained(tiny_llm), checkpoints.open_checkpoint(stages["translator"])[1]
    count = lambda **recipe: ablation.count_flops(about | dict(recipe=about["recipe"] | recipe), llm, steps=2)
    once, twice = (count(steps=4, epochs=n) for n in (1, 2))
    translators = 2 * twice - once                          # once = 4 kept + 4 read, twice = 2 kept + 4 read
    assert 0 < translators < twice < once and count(steps=8, epochs=2) == pytest.approx(2 * twice)
    assert count(steps=8) == pytest.approx(2 * count(steps=4)), "from the answers, every step costs the same"


def test_gradients_of_a_perfect_and_a_real_surrogate(stages, tiny_llm, tmp_path, monkeypatch, capsys):
    """A translator that is the layer which it replaces has cosine 1."""
    train.main(["translator", "--llm", tiny_llm, "--init", stages["vit"], "--replace", "3-3", "--out", str(tmp_path),
                "steps=1", "batch=5", "lr=1e-9", "dtype=float32"])
    same = ablation.gradients(tmp_path / "translator.safetensors", 2, 4, torch.float32)
    assert same["ViT"] > 0.999 and same["projector"] > 0.999
    assert same["loss of the surrogate"] == pytest.approx(same["loss of the LLM"], rel=1e-3)
    real = ablation.gradients(stages["translator"], 2, 4, torch.float32)
    assert -1 < real["ViT"] < 0.99 and real["loss of the LLM"] == pytest.approx(same["loss of the LLM"], rel=1e-3)
    monkeypatch.setattr(ablation, "gradients", lambda checkpoint: real)
    capsys.readouterr()
    ablation.main(["--gradients", "a", "b"])
    assert [line[:16] for line in capsys.readouterr().out.splitlines()] == ["a: cosine of ViT", "b: cosine of ViT"]


# ---- a recipe -------------------------------------------------------------------------------------------------------


def test_results(results, tiny_llm):
    for name, r in results.items():
        trained = ["encoder"] if name == "direct" else ["translator", "encoder"]
        assert r["recipe"] == name and list(r["flops"]) == list(r["seconds"]) == trained and r["llm"] == tiny_llm
        assert all(n > 0 for n in r["flops"].values()) and r["versions"]["torch"] == torch.__version__
        systems = {"text", "graft"} if name == "direct" else {"text", "graft", "pair"}
        assert {(row["task"], row["system"]) for row in r["rows"]} == {(t, s) for t in TASKS for s in systems}
    assert results["distilled"]["flops"]["encoder"] < results["direct"]["flops"]["encoder"], "fewer layers"


def test_the_stages_of_the_recipes(out, results):
    """Answers with the projector, distillation without; stage 2 begins with the surrogate of stage 1."""
    read = lambda folder: checkpoints.read_checkpoint(next((out / folder).glob("*.safetensors")))
    trained, about = read("translator-answers-seed0")
    assert "adapter.0.weight" in trained and "epochs" not in about["recipe"] and about["ranges"] == [[2, 4]]
    trained, about = read("translator-distilled-seed0")
    assert all(n.startswith("decoder.") for n in trained) and about["recipe"]["epochs"] == 2
    assert {n.split(".")[3] for n in trained} == {"1", "2"}, "two translators"
    trained, about = read("encoder-distilled-2-seed0")
    assert about["start"] == str(out / "translator-distilled-seed0" / "translator.safetensors")
    assert not any(n.startswith("decoder.") for n in trained) and about["ranges"] == [[1, 2], [3, 4]]


def test_nothing_is_done_twice(run, results, monkeypatch):
    """A finished result is read; other steps begin with the same surrogate; other samples ask the same encoder."""
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "from_pretrained", None)
        assert run("distilled") == results["distilled"]
    trained, prepare = [], ablation.prepare
    monkeypatch.setattr(ablation, "count_flops", lambda about, llm: 1)
    monkeypatch.setattr(ablation, "prepare", lambda what, llm: trained.append(what["stage"]) or prepare(what, llm))
    assert run("distilled", steps=1)["steps"] == 1 and trained == ["encoder"]
    assert run("distilled", samples=2)["samples"] == 2 and trained == ["encoder"]
    with pytest.raises(UserError, match="translator.safetensors is of another run: recipe was .*; delete it, or"):
        run("distilled", route=dataclasses.replace(TINY["distilled"], steps=3))


def test_a_stage_goes_on_after_a_break(stages, tiny_llm, tmp_path, monkeypatch):
    recipe = dataclasses.replace(SMALL["encoder"], steps=3, batch=2, save_every=1, dtype="float32")
    about = train.plan("encoder", recipe, init=stages["translator"], data=None, images=None, text=None)
    llm = Llama.from_pretrained(tiny_llm)
    whole = ablation.run_stage(about, tmp_path / "whole", llm)
    assert whole["steps_done"] == 3 and not (tmp_path / "whole" / "state.safetensors").exists()

    def stop_after_a_step(path, tensors, about):
        checkpoints.save_checkpoint(path, tensors, about)
        if path.name == "state.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log, "save_checkpoint", stop_after_a_step)
        ablation.run_stage(about, tmp_path / "broken", llm)
    file = "encoder.safetensors"
    assert checkpoints.open_checkpoint(tmp_path / "broken" / file)[1]["steps_done"] == 1
    assert ablation.run_stage(about, tmp_path / "broken", llm)["steps_done"] == 3
    ours, theirs = (checkpoints.read_checkpoint(tmp_path / folder / file)[0] for folder in ("broken", "whole"))
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_the_recipes_can_be_planned():
    """Every row of RECIPES has layers that the default LLM has, and numbers in their range."""
    for route in RECIPES.values():
        if route.targets:
            common = dict(steps=1, batch=16, dtype="auto", text="", seed=0, llm="smollm2-135m")
            what = ablation.plan_stage("translator", route, "assets/vit.safetensors", **common)
            assert what["recipe"]["steps"] == route.steps and what["ranges"][-1][1] == 28


# ---- table and plots ------------------------------------------------------------------------------------------------


def made(name, steps=200, seed=0, tera=(10, 20), pair=0.1, grafted=0.5, text=0.9):
    """A result as run_recipe gives it: trained tasks ranked, and never-trained ones said, as told; 0 else."""
    systems = dict(text=text, graft=grafted) | ({} if name == "direct" else dict(pair=pair))
    rows = [dict(task=t, trained=t in world.TRAINED_TASKS, system=s, samples=40, chance=0.1, said=p, ranked=p)
            for t in graft.TASKS for s, p in systems.items()]
    flops = {stage: n * 10**12 for stage, n in zip(("translator", "encoder"), tera) if n}
    return dict(recipe=name, steps=steps, seed=seed, samples=40, route=dataclasses.asdict(RECIPES[name]), flops=flops,
                rows=rows)


MADE = [made("direct", tera=(0, 50)), made("shipped", grafted=0.4), made("shipped", seed=1, grafted=0.44),
        made("shipped", 600, tera=(10, 60))]


def test_table():
    rows = [line.strip("| ").split(" | ") for line in ablation.table(MADE).splitlines()]
    assert {len(r) for r in rows[:1] + rows[2:]} == {8}
    assert rows[2] == ["shipped", "16-21,22-28", "200", "2", "10 + 20", "60%", "10 ± 0 → 42 ± 3", "10 ± 0 → 42 ± 3"]
    assert rows[3] == ["shipped", "16-21,22-28", "600", "1", "10 + 60", "–", "10 → 50", "10 → 50"], "no direct of 600"
    assert rows[4] == ["direct", "none", "200", "1", "50", "100%", "50", "50"]


@pytest.mark.parametrize("same", [0, 1])
def test_plot_of_the_cost(same):
    """No name covers another, even where all recipes cost and give nearly the same."""
    made_all = [made(name, steps, tera=(0, 50 - (1 - same) * i), grafted=0.5 - (1 - same) * 0.01 * i)
                for steps in (200, 600) for i, name in enumerate(RECIPES)]
    fig = ablation.plot_cost(made_all)
    fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [t.get_window_extent() for t in ax.texts]
        assert len(boxes) == 2 * len(RECIPES) - 1 and ax.texts[-1].get_text() == "direct", "100 % after all steps"
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert "FLOPs" in ax.get_xlabel() and "%" in ax.get_ylabel()
    never_trained, trained = fig.axes
    assert "never trained" in never_trained.get_ylabel() and "never" not in trained.get_ylabel()


def test_plot_of_the_cost_needs_direct():
    points = lambda made: [t.get_text() for t in ablation.plot_cost(made).axes[0].texts]
    assert points(MADE) == ["shipped, 200", "direct"], "there is no direct of 600 steps"
    assert points(MADE[1:]) == []


def test_plot_of_the_graft():
    fig = ablation.plot_graft(made("shipped") | dict(samples=40))
    fig.draw_without_rendering()
    ax, = fig.axes
    names = [*world.TRAINED_TASKS, *(t + " *" for t in world.KNOWLEDGE_TASKS)]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["pair", "graft"], "no direct in these"
    assert fig.get_facecolor() == (1, 1, 1, 1), "white, on dark pages too"


# ---- command line ---------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, monkeypatch, capsys):
    """Without results it says how to get some; --keep takes those of --out into the assets, in place of older ones."""
    monkeypatch.setattr(ablation, "ASSETS", tmp_path / "assets")
    out, kept = tmp_path / "out", tmp_path / "assets" / "ablation.json"
    ablation.main(["--out", str(out)])
    assert "No results yet" in capsys.readouterr().out and not out.exists()
    out.mkdir(), kept.parent.mkdir()
    kept.write_text(json.dumps([MADE[0], made("shipped", grafted=0)]))
    (kept.parent / "results.json").write_text(json.dumps(made("shipped") | dict(samples=40)))
    for r in MADE[1:3]:
        (out / f"{r['recipe']}-{r['steps']}-seed{r['seed']}.json").write_text(json.dumps(r))
    ablation.main(["--out", str(out), "--keep"])
    assert "| 42 ± 3" in capsys.readouterr().out.replace("10 ± 0 → ", "| ")
    assert json.loads(kept.read_text()) == MADE[:3] and {f.suffix for f in out.iterdir()} == {".json"}
    assert {f.name for f in kept.parent.iterdir()} == {"ablation.json", "results.json", "cost.png", "graft.png"}
    monkeypatch.setattr(ablation, "run_recipe", lambda name, seed, steps, *rest: made(name, steps, seed, grafted=0.3))
    ablation.main(["--out", str(out), "--run", "one", "--steps", "200", "400", "--seed", "0", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| one |") for line in lines) == 2 and (out / "cost.png").exists()
    assert len(json.loads(kept.read_text())) == 3, "not kept"


def test_unknown_recipe_and_list(capsys):
    with pytest.raises(UserError, match="unknown recipe 'papper': choose from paper, answers, .*direct"):
        ablation.run_recipe("papper")
    ablation.main(["--list"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(RECIPES)

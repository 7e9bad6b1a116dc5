"""studies/ablation.py: what is counted, a recipe from stage 1 to its scores, what is not done twice, table and plots."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import graft
import train
from formats import checkpoints
from formats.errors import UserError
from model import Llama
from studies import ablation
from studies.ablation import Route

TINY = {
    "answers": Route("from the answers", ((2, 4),), "answers", projector=True, steps=2),
    "taught": Route("by the LLM", ((1, 2), (3, 4)), "llm", steps=4, epochs=2),
    "direct": Route("on the full LLM", (), None, steps=0),
}


@pytest.fixture(scope="module")
def run(stages, tmp_path_factory):
    """run(name): one of the TINY recipes, from stage 1 to its result."""
    out = tmp_path_factory.mktemp("ablation")
    return lambda name, **more: ablation.run_recipe(name, **dict(
        route=TINY[name], steps=2, batch=5, samples=1, out=out, vit=stages["vit"], dtype="float32", device="cpu") | more)


@pytest.fixture(scope="module")
def results(run):
    return {name: run(name) for name in TINY}


# ---- counting -------------------------------------------------------------------------------------------------------


def test_flops_of_products_and_attention():
    """One linear layer and one attention, forward and backward, against the formula."""
    def work():
        x = torch.randn(6, 32, requires_grad=True)                                          # 6 rows
        (x @ torch.randn(32, 8)).sum().backward()                                           # 2 * 6 * 32 * 8, twice
        q, k, v = (torch.randn(1, 2, 10, 16, requires_grad=True) for _ in range(3))         # 2 heads, 10 positions
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()            # 2 products, and 4 backward

    assert ablation.flops(work) == (None, 2 * (2 * 6 * 32 * 8) + 6 * (2 * 2 * 10 * 10 * 16))


def test_a_sample_that_is_read_again_costs_less(results, stages, tiny_llm):
    """The full LLM runs once over a sample, the translators at every reading; without the LLM, steps cost what they cost."""
    llm = Llama.from_pretrained(tiny_llm)
    about = checkpoints.open_checkpoint(stages["translator"])[1]
    count = lambda **recipe: ablation.count_flops(about | dict(recipe=about["recipe"] | recipe), llm, steps=2)
    once, twice = (count(steps=4, epochs=n) for n in (1, 2))
    each = 2 * twice - once                                 # 4 steps' worth of what is not kept
    assert 0 < each < twice < once and count(steps=8, epochs=2) == pytest.approx(2 * twice)
    assert count(steps=8) == pytest.approx(2 * count(steps=4))


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_gradients_of_a_perfect_and_a_real_surrogate(stages, tiny_llm, tmp_path):
    """A translator that is the layer which it replaces has cosine 1."""
    train.main(["translator", "--llm", tiny_llm, "--init", stages["vit"], "--replace", "3-3", "--out", str(tmp_path),
                "steps=1", "batch=5", "lr=1e-9", "dtype=float32"])
    same = ablation.gradients(tmp_path / "translator.safetensors", 2, 4, torch.float32)
    assert same["ViT"] > 0.999 and same["projector"] > 0.999
    assert same["loss of the surrogate"] == pytest.approx(same["loss of the LLM"], rel=1e-3)
    real = ablation.gradients(stages["translator"], 2, 4, torch.float32)
    assert -1 < real["ViT"] < 0.99 and real["loss of the LLM"] == pytest.approx(same["loss of the LLM"], rel=1e-3)


# ---- a recipe -------------------------------------------------------------------------------------------------------


def test_results(results, stages, tiny_llm):
    for name, r in results.items():
        trained = ["encoder"] if name == "direct" else ["translator", "encoder"]
        assert r["recipe"] == name and list(r["flops"]) == list(r["seconds"]) == trained and r["llm"] == tiny_llm
        assert all(n > 0 for n in r["flops"].values()) and r["versions"]["torch"] == torch.__version__
        systems = {"text", "graft"} if name == "direct" else {"text", "graft", "pair"}
        assert {(row["task"], row["system"]) for row in r["rows"]} == {(t, s) for t in graft.TASKS for s in systems}
    assert results["taught"]["flops"]["encoder"] < results["direct"]["flops"]["encoder"], "fewer layers"


def test_nothing_is_done_twice(run, results, stages, monkeypatch):
    """A finished result is read; another number of steps begins with the same surrogate; other samples, with the same encoder."""
    stages_run, train_stage = [], ablation.prepare
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "from_pretrained", None)
        assert run("taught") == results["taught"]
    monkeypatch.setattr(ablation, "count_flops", lambda about, llm: 1)
    monkeypatch.setattr(ablation, "prepare", lambda about, llm: stages_run.append(about["stage"]) or train_stage(about, llm))
    assert run("taught", steps=1)["steps"] == 1 and stages_run == ["encoder"]
    assert run("taught", samples=2)["samples"] == 2 and stages_run == ["encoder"]
    with pytest.raises(UserError, match="is of another run: recipe was .*; give another --out"):
        run("taught", route=dataclasses.replace(TINY["taught"], steps=3))

"""studies/benchmark.py: systems take turns, what is compared computes the same, and the tables say what they should."""
import sys

import pytest
import torch

import kernels
from cli import run_cli
from model import LlamaConfig, ViTConfig
from recipes import Target
from studies import benchmark, cost

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def target(vocab=300):
    """Layers of almost no size: 9 patches, so 112 positions."""
    return Target("tiny", "tiny", ((1, 2),), LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16), ViTConfig(
        image_size=336, patch_size=112, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2))


@pytest.fixture
def table(monkeypatch):
    """A function: the rows of a command, on tiny models; on the CPU unless it says something else."""
    monkeypatch.setitem(benchmark.SIZES, "small", target())
    monkeypatch.setitem(benchmark.SIZES, "wide", target(vocab=2**17))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)

    def rows(command):
        args = benchmark.parse([*command.split(), *["--device", "cpu"] * ("--device" not in command)])
        return list(benchmark.KINDS[args.kind](args))

    return rows


# ---- The harness ----------------------------------------------------------------------------------------------------


def test_systems_take_turns(capsys):
    turns, times = [], iter([9, 9, 1, 5, 3, 6, 2, 7])

    def broken():
        raise RuntimeError("no such backend\nand more")

    systems = {"ours": lambda: turns.append("ours"), "peer": lambda: turns.append("peer"), "broken": broken}
    seen = benchmark.in_turns(systems, 3, "cpu", lambda run: next(times))
    assert turns == ["ours", "peer"] * 4 and "broken is left out: no such backend\n" == capsys.readouterr().err
    assert {name: m.seconds for name, m in seen.items()} == {"ours": 2, "peer": 6}      # the first round warms up
    with pytest.raises(RuntimeError, match="no such backend"):
        benchmark.in_turns({"ours": broken}, 1, "cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process cannot be reset elsewhere")
def test_peaks_are_those_of_one_run():
    fill = lambda mib: lambda: torch.ones(mib, 2**18).shape
    seen = benchmark.in_turns({"large": fill(256), "small": fill(64)}, 1, "cpu")
    above = {name: (m.peak - m.held) / 2**20 for name, m in seen.items()}
    assert 250 < above["large"] < 300 and 60 < above["small"] < 100


def test_the_table_is_markdown(monkeypatch, capsys):
    monkeypatch.setitem(benchmark.KINDS, "step", lambda args: iter([{"a": 1, "b": 2}, {"a": 3, "b": 4}]))
    benchmark.main(["step", "--device", "cpu"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "torch" in head and "`python -m studies.benchmark step --device cpu`" in head
    assert rows == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]


# ---- A step, and its memory -----------------------------------------------------------------------------------------


def test_the_two_steps_are_the_same_step():
    """One loss and one gradient, on the very same parameters."""
    vlm, optimizer = benchmark.stage_of("encoder", target(), torch.float32, DEVICE)
    learns = [p for group in optimizer.param_groups for p in group["params"]]
    batch, seen = benchmark.llava_batch(target(), 2), []
    assert (batch["targets"] >= 0).sum() == 2 * benchmark.ANSWER and batch["tokens"].shape == (2, 112)
    for loss in (vlm.loss, benchmark.all_logits(vlm)):
        value = loss(batch)
        seen.append((value.detach(), *torch.autograd.grad(value, learns)))
    for ours, theirs in zip(*seen):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert seen[0][0] > 1 and all(p.is_leaf for p in learns)
    assert {id(p) for p in vlm.parameters() if p.requires_grad} == {id(p) for p in learns}      # the rest stays frozen


def test_both_steps_compute_in_bfloat16_and_learn_in_float32():
    vlm, optimizer = benchmark.stage_of("decoder", target(), torch.bfloat16, "cpu")
    theirs, batch = benchmark.all_logits(vlm), benchmark.llava_batch(target(), 1)
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {torch.float32}
    before = vlm.adapter[0].weight.clone()
    ours, theirs = (benchmark.take_step(loss, optimizer, batch) for loss in (vlm.loss, theirs))
    assert ours == pytest.approx(theirs, rel=1e-3) and torch.equal(before, vlm.adapter[0].weight)       # lr=0


@pytest.mark.parametrize("stage", ["translator", "encoder", "decoder"])
def test_a_step_of_every_stage_beside_the_formula(stage, table):
    ours, theirs, *_ = table(f"step {stage} --batch 2 --rounds 1 --model wide --dtype float32 --device {DEVICE}")
    assert (ours["system"], theirs["system"]) == ("ours", "transformers' LLM, all logits")
    assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5) and float(ours["loss"]) > 1e-3
    formula = cost.memory(stage, target(vocab=2**17), benchmark.STEP, 2, 112, 60)
    assert ours["by formula"] == f"{sum(formula.values()) / 2**30:.2f}" != "0.00"
    if sys.platform == "linux":
        assert float(ours["peak GiB"]) > float(ours["of it the step's"])
        if stage == "encoder":                  # logits of every position take memory
            assert float(ours["of it the step's"]) < 0.7 * float(theirs["of it the step's"])


# ---- Decoding and kernels -------------------------------------------------------------------------------------------


def test_decoding_compares_the_same_answers(table, monkeypatch):
    monkeypatch.setattr(kernels, "default_dtype", lambda device: torch.bfloat16)        # on any chip
    rows = table("decode --rounds 1 --length 9 --batch 1 2 --new 15")
    assert [row["system"] for row in rows] == ["ours", "transformers", "ours, int8", "ours, bfloat16"] * 2
    assert all(row["same"] == "100%" for row in rows if row["system"] in ("ours", "transformers"))


def test_what_a_decoding_step_reads():
    llm = benchmark.random_model(lambda: benchmark.Llama(target().llm_config), torch.bfloat16, "cpu")
    layer = 32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48 + 2 * 32        # q, k, v; o; MLP; norms
    assert benchmark.weight_bytes(llm) == 2 * (4 * layer + 32 + 300 * 32)       # the head is the embeddings
    matrices, rows = 4 * (layer - 2 * 32) + 300 * 32, 4 * (64 + 32 + 32 + 32 + 48 + 48 + 32) + 300
    assert benchmark.weight_bytes(benchmark.int8.quantize(llm)) == matrices + 2 * rows + 2 * (4 * 2 * 32 + 32)


def test_the_kernels_peers_compute_the_same(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    for kernel, _, inputs, systems, works, _ in benchmark.kernel_cases(target(), 2, 9, "cpu", torch.float32):
        first = lambda y: y[0] if isinstance(y, tuple) else y
        results = [first(f(*inputs)) for name, f in systems.items() if name != "cuDNN"]
        assert len(results) > 1
        off = 0.1 if kernel == "int8 weights" else 1e-4         # on a CPU ours multiplies these in bfloat16
        for y in results[1:]:
            torch.testing.assert_close(y, results[0], rtol=1e-4, atol=off, msg=kernel)


def test_rows_of_the_kernels(table):
    rows = table("kernels --batch 2 --length 9 --rounds 1")
    both = lambda kernel: [(kernel, "forward"), (kernel, "backward")]
    assert [(row["kernel"], row["direction"]) for row in rows] == [
        *both("attention") * 2, ("attention, a decoding step", "forward"), *both("RoPE"),
        *both("RMSNorm + residual") * 2, *both("SwiGLU"), ("LM head + loss", "both"),
        *[("int8 weights", "forward")] * 2]
    assert all(float(row["ms"]) > 0 and row["peer's time / ours"] for row in rows)


@pytest.mark.parametrize("command", ["step nonsense", "", "decode --new 1", "step --model qwen3-4b"])
def test_what_cannot_be_measured(command):
    assert run_cli(lambda: benchmark.main(command.split())) == 2

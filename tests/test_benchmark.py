"""studies/benchmark.py and decoding.py: what is compared computes the same; the rows show what they should."""
import contextlib

import pytest
import torch

from studies import benchmark, decoding


def test_the_two_steps_are_the_same_step():
    ours, naive = (benchmark.encoder_step_memory(how, vocab=300, batch=2, width=32) for how in (False, True))
    assert ours["loss"] == pytest.approx(naive["loss"], rel=1e-5)
    assert ours["gradient"] == pytest.approx(naive["gradient"], rel=1e-4) and ours["gradient"] > 0
    assert ours["targets"] == 2 * 60 and ours["positions"] == 2 * (579 + 100)


def test_a_fresh_process_shows_what_the_logits_of_every_position_take(capsys):
    assert benchmark.compare_step_memory(vocab=32768, batch=1, width=32) < 0.7      # 0.2, and room for what wanders
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and all(row.startswith("| ") and row.count("|") == 5 for row in rows)


def test_a_surrogate_is_built_alone_and_out_of_the_llm(monkeypatch, capsys):
    seen = []       # in this process, which is quick, but has held more before: its peak says nothing

    def here(call):
        seen.append(eval(f"benchmark.{call}") | dict(peak=2**20))
        return seen[-1]
    monkeypatch.setattr(benchmark, "in_fresh_process", here)
    benchmark.compare_surrogate_memory(ranges=((2, 4),), layers=6, width=192, vocab=64, shards=2)
    assert "of 4 layers" in capsys.readouterr().out
    layer = 2 * 192 * 192 + 2 * 64 * 192 + 3 * 192 * 512 + 2 * 192                       # q, o; k, v; MLP; two norms
    assert [s["layers"] for s in seen] == [4, 4]
    assert [s["size"] for s in seen] == [2 * (4 * layer + 64 * 192 + 192)] * 2        # two bytes a weight, tied head


def test_memory_option_runs_only_the_memory(monkeypatch):
    seen = []
    for name in ("graft_memory", "compare_step_memory", "compare_surrogate_memory", "encoder_step"):
        monkeypatch.setattr(benchmark, name, lambda *_, name=name, **__: seen.append(name))
    benchmark.main(["--memory"])
    assert seen == ["compare_step_memory", "compare_surrogate_memory"]


def test_a_step_of_the_encoder_is_timed(smollm, monkeypatch, capsys):
    monkeypatch.setattr(benchmark.Llama, "from_pretrained", lambda **_: smollm)
    benchmark.encoder_step("cpu", torch.float32, batch=2, rounds=1, replace=((2, 28),))
    assert "4-layer surrogate, batch 2" in capsys.readouterr().out


def test_the_kernels_peers_compute_the_same():
    """On a GPU they are timed; here each system's results, and rows as they would be printed."""
    sizes = (24, 64, 96, 12, 50, (2, 9, 4, 2, 16))
    torch._dynamo.config.suppress_errors = False
    for kernel, _, inputs, systems, *_ in benchmark.kernel_cases(sizes, "cpu", torch.float32):
        first = lambda y: y[0] if isinstance(y, tuple) else y
        results = [first(f(*inputs)) for name, f in systems.items() if name not in ("flash", "cuDNN", "torch.compile")]
        for y in results[1:]:
            torch.testing.assert_close(y, results[0], rtol=1e-4, atol=1e-5, msg=kernel)


def test_rows_of_the_kernels(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(benchmark, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    sizes, seen = (24, 64, 96, 12, 50, (2, 9, 4, 2, 16)), []
    rows = list(benchmark.kernel_rows("tiny", sizes, lambda f: seen.append(f()) or 2.0, device="cpu",
                                      dtype=torch.float32))
    assert [row[1] for row in rows] == ["attention"] * 2 + ["attention, a step"] + ["RoPE"] * 2 + [
        "RMSNorm + residual"] * 2 + ["SwiGLU"] * 2 + ["LM head + loss", "int8 weights"]
    assert rows[0][3:5] == ("forward", "2.000") and rows[0][6] == "flash 1.00, cuDNN 1.00"


def test_decoding_compares_the_same_answers(tiny_llm, monkeypatch, capsys):
    load = decoding.Llama.from_pretrained
    monkeypatch.setattr(decoding.Llama, "from_pretrained", lambda **options: load(tiny_llm, **options))
    monkeypatch.setattr(decoding, "in_fresh_process", lambda *_: dict(peak=2**20, held=2**20))
    monkeypatch.setattr(torch, "randint", lambda low, high, *a, randint=torch.randint, **k: randint(500, *a, **k))
    monkeypatch.setattr(decoding, "default_dtype", lambda device: torch.bfloat16)       # on any chip
    decoding.main(["--rounds", "1", "--length", "9", "--batch", "1", "2", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "with their trunk shared" in printed
    rows = [row.split("|") for row in printed.splitlines() if "tokens/s" not in row and "x |" in row]
    assert [row[1].strip() for row in rows] == [*decoding.THEIRS, *decoding.OURS] * 2
    same = {row[1].strip(): row[5].strip() for row in rows}
    assert same["transformers, static cache"] == same["float32"] == "100%" and same["int8"] != "100%"

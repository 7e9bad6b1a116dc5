"""Several processes (gloo on the CPU) must train as one does: data parallel, sharded, accumulated, resumed by fewer."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import rows_of

from formats.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent


def launch(processes, *argv, script=("-m", "extras.parallel"), expect=0):
    """Run a stage in `processes` processes, through torchrun where they are several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    torchrun = torchrun if processes > 1 else []
    run = ["train.py"] if processes == 1 and "--lora" not in argv else script
    command = [sys.executable, *torchrun, *run, *map(str, argv), "--device", "cpu", "dtype=float32"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                          text=True, capture_output=True, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]


def assert_same_run(a, b, stage):
    """Losses and trained weights of two runs agree."""
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        assert x["targets"] == y["targets"] and float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-4)
    one, other = (read_checkpoint(folder / f"{stage}.safetensors")[0] for folder in (a, b))
    assert one.keys() == other.keys()
    for n, t in one.items():
        assert torch.allclose(t.float(), other[n].float(), atol=1e-3, rtol=1e-2), n


@pytest.mark.parametrize("stage, start, options", [
    ("translator", "vit", ["--replace", "2-4"]),
    ("encoder", "translator", ["distill=0"]),       # where the LLM teaches, it does so in one process alone
    ("decoder", "encoder", []), ("decoder", "encoder", ["--lora", "2"]),
], ids=["translator", "encoder", "decoder", "lora"])
def test_two_processes_equal_one(stages, tiny_llm, tmp_path, stage, start, options):
    """Two micro-batches each, plain, and in FSDP2 with activation checkpointing."""
    common = [stage, "--llm", tiny_llm, "--init", stages[start], "steps=3", "batch=12", "lr=1e-3", *options]
    launch(1, *common, "--out", tmp_path / "one")
    for name, *more in (["plain"], ["sharded", "--fsdp", "checkpointing=true"]):
        launch(2, *common, "micro_batch=3", *more, "--out", tmp_path / name)
        assert_same_run(tmp_path / "one", tmp_path / name, stage)


def test_killed_and_resumed_by_fewer(stages, tiny_llm, tmp_path):
    """Two processes, one of which dies between two checkpoints; one process goes on from the last: nothing is lost."""
    (tmp_path / "dying.py").write_text(
        "import os, train\n"
        "from extras import parallel\n"
        "lr_at = train.lr_at\n"
        "dies = lambda step: step == 4 and os.environ['RANK'] == '1'\n"
        "train.lr_at = lambda step, *args, **more: os._exit(3) if dies(step) else lr_at(step, *args, **more)\n"
        "parallel.main()\n")
    common = ["translator", "--llm", tiny_llm, "steps=5", "batch=12", "micro_batch=3", "save_every=3",
              "--init", stages["vit"], "--replace", "2-4", "lr=1e-4"]
    launch(1, *common, "--out", tmp_path / "whole")
    launch(2, *common, "--out", tmp_path / "killed", "--fsdp", script=[tmp_path / "dying.py"], expect=1)
    assert len(rows_of(tmp_path / "killed")) == 3
    launch(1, *common, "--out", tmp_path / "killed", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "translator")

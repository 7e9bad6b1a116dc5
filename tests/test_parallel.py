"""Several processes (gloo on the CPU) must train as one does: data parallel, sharded, accumulated, resumed by fewer."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats import checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture
def launch():
    """Run a stage in `processes` processes, through torchrun where they are several."""
    def launch(processes, *argv, script=("-m", "extras.parallel"), expect=0):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        torchrun = torchrun if processes > 1 else []
        run = ["train.py"] if processes == 1 and "--lora" not in argv else script
        command = [sys.executable, *torchrun, *run, *map(str, argv), "--device", "cpu", "dtype=float32"]
        done = subprocess.run(command, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                              text=True, capture_output=True, timeout=300)
        assert done.returncode == expect, done.stderr[-3000:]
    return launch


def log(folder):
    with open(folder / "log.csv") as f:
        return list(csv.DictReader(f))


def assert_same_run(a, b, stage):
    """Losses and trained weights of two runs agree."""
    for x, y in zip(log(a), log(b), strict=True):
        assert x["targets"] == y["targets"] and float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-4)
    one, other = (checkpoints.read_checkpoint(folder / f"{stage}.safetensors")[0] for folder in (a, b))
    assert one.keys() == other.keys()
    for n, t in one.items():
        assert torch.allclose(t.float(), other[n].float(), atol=1e-3, rtol=1e-2), n


CASES = {   # stage -> what every run of it goes on from
    "translator": ("vit", "--replace", "2-4"),
    "encoder": ("translator", "distill=0"),     # where the LLM teaches, it does so in one process alone
    "decoder": ("encoder", "lr=1e-3"),
}


@pytest.mark.parametrize("stage", CASES)
def test_two_processes_equal_one(stages, tiny_llm, launch, tmp_path, stage):
    start, *options = CASES[stage]
    common = [stage, "--llm", tiny_llm, "--init", stages[start], "steps=5", "batch=12", *options]
    launch(1, *common, "--out", tmp_path / "one")
    launch(2, *common, "micro_batch=3", "--out", tmp_path / "two")      # two processes, two micro-batches each
    assert_same_run(tmp_path / "one", tmp_path / "two", stage)


@pytest.mark.parametrize("stage", CASES)
def test_sharded_equals_one(stages, tiny_llm, launch, tmp_path, stage):
    """FSDP2 with activation checkpointing."""
    start, *options = CASES[stage]
    common = [stage, "--llm", tiny_llm, "--init", stages[start], *options,
              "steps=5", "batch=12", "micro_batch=3", "lr=1e-4"]
    launch(1, *common, "--out", tmp_path / "one")
    launch(2, *common, "--out", tmp_path / "two", "--fsdp", "checkpointing=true")
    assert_same_run(tmp_path / "one", tmp_path / "two", stage)


@pytest.mark.parametrize("fsdp", [[], ["--fsdp"]])
def test_lora_in_two_processes_equals_one(stages, tiny_llm, launch, tmp_path, fsdp):
    common = ["decoder", "--llm", tiny_llm, "--init", stages["encoder"],
              "steps=3", "batch=12", "micro_batch=3", "lr=1e-3", "--lora", "2"]
    launch(1, *common, "--out", tmp_path / "one")
    launch(2, *common, "--out", tmp_path / "two", *fsdp)
    assert_same_run(tmp_path / "one", tmp_path / "two", "decoder")


def test_killed_and_resumed_by_fewer(stages, tiny_llm, launch, tmp_path):
    """Two processes, one of which dies between two checkpoints; one process goes on from the last: nothing is lost."""
    (tmp_path / "dying.py").write_text(
        "import os, train\n"
        "from extras import parallel\n"
        "lr_at = train.lr_at\n"
        "dies = lambda step: step == 4 and os.environ['RANK'] == '1'\n"
        "train.lr_at = lambda step, recipe: os._exit(3) if dies(step) else lr_at(step, recipe)\n"
        "parallel.main()\n")
    common = ["translator", "--llm", tiny_llm, "steps=5", "batch=12", "micro_batch=3", "save_every=3",
              "--init", stages["vit"], "--replace", "2-4", "lr=1e-4"]
    launch(1, *common, "--out", tmp_path / "whole")
    launch(2, *common, "--out", tmp_path / "killed", "--fsdp", script=[tmp_path / "dying.py"], expect=1)
    assert len(log(tmp_path / "killed")) == 3
    launch(1, *common, "--out", tmp_path / "killed", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "translator")

"""Several processes (gloo on the CPU) must train as one does: data parallel, sharded, accumulated, resumed by fewer."""
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats import checkpoints

ROOT = Path(__file__).parent.parent


@pytest.fixture
def launch(cache):
    """Run train.py in `processes` processes through torchrun; returns the exit status."""
    def launch(processes, *argv, script="train.py", expect=0):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        start = torchrun if processes > 1 else []
        argv = [str(script), *map(str, argv), "--device", "cpu", "--dtype", "float32"]
        environment = os.environ | {"XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *start, *argv], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == expect, done.stderr[-3000:]
    return launch


def log(folder):
    with open(folder / "log.csv") as f:
        return list(csv.DictReader(f))


def assert_same_run(a, b, stage):
    """Losses and trained weights of two runs agree."""
    for x, y in zip(log(a), log(b), strict=True):
        assert x["targets"] == y["targets"] and float(x["loss"]) == pytest.approx(float(y["loss"]), rel=1e-5)
        assert bool(x.get("distill")) == bool(y.get("distill"))
        if x.get("distill"):
            assert float(x["distill"]) == pytest.approx(float(y["distill"]), rel=1e-4)
    one, other = (checkpoints.read_checkpoint(folder / f"{stage}.safetensors")[0] for folder in (a, b))
    assert one.keys() == other.keys()
    for n, t in one.items():
        assert torch.allclose(t.float(), other[n].float(), atol=1e-3, rtol=1e-2), n


CASES = {   # stage -> options that every run of it shares
    "translator": ["--replace", "2-4", "--chats", "8", "--distill-every", "1"],
    "encoder": ["--distill-every", "2"],
    "decoder": ["--lr", "1e-3"],
}


@pytest.mark.parametrize("stage", CASES)
def test_two_processes_equal_one(stages, tiny_llm, launch, tmp_path, stage):
    start = stages[{"translator": "vit", "encoder": "translator", "decoder": "encoder"}[stage]]
    common = [stage, "--llm", tiny_llm, "--init", start, "--steps", 5, "--batch", 12, *CASES[stage]]
    launch(1, *common, "--out", tmp_path / "one")
    launch(2, *common, "--micro-batch", 3, "--out", tmp_path / "two")      # two processes, two micro-batches each
    assert_same_run(tmp_path / "one", tmp_path / "two", stage)


@pytest.fixture
def text(tmp_path):
    """Text instructions as a JSON file: with --fsdp the LLM cannot write its own."""
    turns = lambda i: [{"from": "human", "value": f"What is {i} and {i}?"}, {"from": "gpt", "value": f"It is {2 * i}."}]
    (tmp_path / "text.json").write_text(json.dumps([dict(id=i, conversations=turns(i)) for i in range(20)]))
    return tmp_path / "text.json"


@pytest.mark.parametrize("stage", CASES)
def test_sharded_equals_one(stages, tiny_llm, launch, tmp_path, stage, text):
    """FSDP2 with activation checkpointing; killed after three steps, it goes on in one process."""
    options = {"translator": ["--init", "none", "--vit", stages["vit"], "--replace", "2-4", "--text", text],
               "encoder": ["--init", stages["translator"]], "decoder": ["--init", stages["encoder"]]}[stage]
    common = [stage, "--llm", tiny_llm, "--steps", 5, "--batch", 12, "--micro-batch", 3, "--lr", "1e-4",
              "--distill-every", 0, *options]
    launch(1, *common, "--out", tmp_path / "one")
    launch(2, *common, "--out", tmp_path / "two", "--fsdp", "--checkpointing")
    assert_same_run(tmp_path / "one", tmp_path / "two", stage)


def test_killed_and_resumed_by_fewer(stages, tiny_llm, launch, tmp_path, text):
    """Two processes, one of which dies between two checkpoints; one process goes on from the last: nothing is lost."""
    (tmp_path / "dying.py").write_text(
        "import os, train\n"
        "from extras import parallel\n"
        "lr_at = train.lr_at\n"
        "train.lr_at = lambda step, *rest: os._exit(3) if step == 4 and parallel.rank() == 1 else lr_at(step, *rest)\n"
        "train.main()\n")
    common = ["translator", "--llm", tiny_llm, "--steps", 5, "--batch", 12, "--micro-batch", 3, "--save-every", 3,
              "--init", "none", "--vit", stages["vit"], "--replace", "2-4", "--text", text, "--lr", "1e-4",
              "--distill-every", 0]
    launch(1, *common, "--out", tmp_path / "whole")
    launch(2, *common, "--out", tmp_path / "killed", "--fsdp", script=tmp_path / "dying.py", expect=1)
    assert len(log(tmp_path / "killed")) == 3
    launch(1, *common, "--out", tmp_path / "killed", "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", "translator")

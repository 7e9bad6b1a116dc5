"""
kill -9 in the middle of training, again and again: does a resumed run end where an undisturbed one does?

    pytest tests/soak/kill.py                       # 20 kills at random moments; a minute or two
    KILLS=100 SEED=1 pytest tests/soak/kill.py

Stage 1 of a tiny LLM, which saves every step. A kill comes before the process has saved anything, within a few steps
after, or while it writes. Whenever a process has died, every file that it left is read.
"""
import multiprocessing
import os
import random
import time

import torch

import train
from formats.checkpoints import read_checkpoint

KILLS, SEED = (int(os.environ.get(name, default)) for name, default in (("KILLS", 20), ("SEED", 0)))


def start(argv):
    """Train in a process of its own. It is forked off, so it need not import PyTorch again."""
    process = multiprocessing.get_context("fork").Process(target=train.main, args=(argv,))
    process.start()
    return process


def saved_at(out):
    """When the state in a run's folder was saved last, 0 if never."""
    state = out / "state.safetensors"
    return state.stat().st_mtime_ns if state.exists() else 0


def read_run(out):
    """({name: tensor} of all that a run left, the rows of its log without their clock). What is unreadable raises."""
    read = {file.name: read_checkpoint(file) for file in out.glob("[!.]*.safetensors")}
    tensors = {f"{name}: {n}": t for name, (tensors, _) in read.items() for n, t in tensors.items()}
    rows = read["state.safetensors"][1]["rows"] if read else []
    return tensors, [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def kill_at_random(argv, out, rng, when):
    """Start or resume a run and kill it "early", before it saves, "later", or while it is "writing" a file. Returns
    whether it left a file half-written."""
    before, parts = saved_at(out), set(out.glob(".*.part"))
    process = start([*argv, "--resume"] if before else argv)
    while when != "early" and saved_at(out) == before and process.is_alive():
        time.sleep(0.001)
    while when == "writing" and process.is_alive() and set(out.glob(".*.part")) <= parts:
        pass
    time.sleep(rng.uniform(0, {"early": 0.5, "later": 0.3, "writing": 0.002}[when]))
    process.kill()
    process.join()
    return not set(out.glob(".*.part")) <= parts


def test_kills(tiny_llm, tmp_path):
    torch.set_num_threads(1)
    rng, half, whole, broken = random.Random(SEED), 0, tmp_path / "whole", tmp_path / "broken"
    common = ["translator", "--llm", tiny_llm, "--init", "none", "--vit", "assets/vit.safetensors",
              "--replace", "2-4", "batch=2", "save_every=1", "dtype=float32", f"steps={8 * KILLS}", "--out"]
    undisturbed = start([*common, str(whole)])
    undisturbed.join()
    assert undisturbed.exitcode == 0
    for k in range(KILLS):
        half += kill_at_random([*common, str(broken)], broken, rng, ("later", "writing", "early", "writing")[k % 4])
        read_run(broken)
    start([*common, str(broken), "--resume"]).join()
    print(f"{KILLS} kills, {half} of them left a file half-written")
    (a, rows), (b, again) = read_run(whole), read_run(broken)
    assert rows == again and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert not list(broken.glob("*.part"))

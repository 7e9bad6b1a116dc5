"""
kill -9 in the middle of training, again and again: does a resumed run end where an undisturbed one does?

    python -m tests.soak.kill               # 20 kills at random moments of a run that saves every step; a minute or two
    python -m tests.soak.kill --kills 100

Stage 1 of a tiny LLM. A kill comes before the process has saved anything, or within a few steps after, or while
it writes. Whenever a process has died, every file that it left is read; in the end losses and weights have to be equal.
"""
import csv
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from cli import MAX_SEED, Parser, UserError, number, run_cli
from formats.checkpoints import read_checkpoint
from tests.conftest import save_tiny_llm


def quietly(argv):
    """What a child process does: a command line that says nothing."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    train.main(argv)


def start(argv):
    """Train in a process of its own. It is forked off, so it need not import PyTorch again."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(argv,))
    process.start()
    return process


def saved_at(out):
    """When the state in a run's folder was saved last, 0 if never."""
    state = out / "state.safetensors"
    return state.stat().st_mtime_ns if state.exists() else 0


def read_run(out):
    """({name: tensor} of all that a run left, step of its state or 0, rows of its log). What is unreadable raises."""
    read = {file.name: read_checkpoint(file) for file in out.glob("[!.]*.safetensors")}
    tensors = {f"{name}: {n}": t for name, (tensors, _) in read.items() for n, t in tensors.items()}
    step = read["state.safetensors"][1]["step"] if "state.safetensors" in read else 0
    log = out / "log.csv"
    rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines())) if log.exists() else []
    return tensors, step, rows


def kill_at_random(argv, out, rng, when):
    """Start or resume a run and kill it "early", before it saves, "later", or while it is "writing" a file. Returns
    whether it left a file half-written."""
    before, parts = saved_at(out), set(out.glob(".*.part"))
    process = start([*argv, "--resume"] if before else argv)
    while when != "early" and saved_at(out) == before and process.is_alive():
        time.sleep(0.001)
    if when == "writing":
        while process.is_alive() and set(out.glob(".*.part")) <= parts:
            pass
    time.sleep(rng.uniform(0, {"early": 0.5, "later": 0.3, "writing": 0.002}[when]))
    process.kill()
    process.join()
    return not set(out.glob(".*.part")) <= parts


def compare(a, b):
    """[names of what differs between two finished runs]: losses of every step, weights, state of the optimizer."""
    (x, _, mine), (y, _, theirs) = read_run(a), read_run(b)
    without_clock = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    odd = [] if without_clock(mine) == without_clock(theirs) else ["log.csv"]
    return odd + [n for n in x.keys() | y.keys() if n not in x or n not in y or not torch.equal(x[n], y[n])]


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=number(int, 1, 10**4), default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="of the moments (default: 0)")
    args = parser.parse_args(argv)
    rng, began, writing = random.Random(args.seed), time.time(), 0
    with tempfile.TemporaryDirectory() as folder:
        whole, broken, llm = (Path(folder) / name for name in ("whole", "broken", "llm"))
        llm.mkdir()
        common = ["translator", "--llm", save_tiny_llm(llm), "--init", "none", "--vit", "assets/vit.safetensors",
                  "--replace", "2-4", "batch=2", "save_every=1", "dtype=float32", f"steps={8 * args.kills}"]
        undisturbed = start([*common, "--out", str(whole)])
        undisturbed.join()
        if undisturbed.exitcode:
            raise UserError("the undisturbed run failed: try the command `python train.py " + " ".join(common) + "`")
        print("| kill | left a file half-written | step of its state | rows of its log |\n|---|---|---|---|")
        for k in range(args.kills):
            when = ("later", "writing", "early", "writing")[k % 4]
            part = kill_at_random([*common, "--out", str(broken)], broken, rng, when)
            _, step, rows = read_run(broken)
            writing += part
            print(f"| {k + 1} | {'yes' if part else 'no'} | {step} | {len(rows)} |", flush=True)
        start([*common, "--out", str(broken), "--resume"]).join()
        odd = compare(whole, broken) + [f.name for f in broken.glob("*.part")]
    print(f"\n{args.kills} kills, {writing} of them left a file half-written, none an unreadable one; "
          f"{time.time() - began:.0f} s")
    print(f"DIFFERENT: {', '.join(odd)}" if odd else
          "losses, weights and optimizer state equal those of the undisturbed run")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

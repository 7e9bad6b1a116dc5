"""
kill -9 in the middle of training, again and again: does a resumed run end where an undisturbed one does?

    python -m tests.soak.kill               # 20 kills at random moments of a run that saves every step; a minute or two
    python -m tests.soak.kill --kills 100

Stage 1 of a tiny LLM. A kill comes before the process has saved anything, or within a few steps after, or while
it writes. Whenever a process has died, every file that it left is read; in the end losses and weights have to be equal.
"""

import csv
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import train
from cli import MAX_SEED, Parser, UserError, number, run_cli
from formats.checkpoints import read_checkpoint
from formats.tokenizer import BYTE_OF, LLAMA3_PATTERN
from model import Llama, LlamaConfig


def save_tiny_llm(folder):
    """A random Llama of 6 layers in Hugging Face's layout, with Llama 3's chat format; its tokens are bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    nul = next(char for char, byte in BYTE_OF.items() if byte == 0)  # the one merge: of what no text holds
    cut = [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": LLAMA3_PATTERN}},
           {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": 257 + i, "content": f"<|{name}|>"} for i, name in enumerate(names)],
        "model": {"vocab": BYTE_OF | {nul + nul: 256}, "merges": [[nul, nul]]},
        "pre_tokenizer": {"pretokenizers": cut}}), encoding="utf-8")  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16)  # fmt: skip
    save_file(Llama(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(config) | dict(model_type="llama")), encoding="utf-8")
    return str(folder)


def quietly(main, argv):
    """What a child process does: a command line that says nothing."""
    torch.set_num_threads(1)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    main(argv)


def start(argv):
    """Train in a process of its own. It is forked off, so it need not import PyTorch again."""
    process = multiprocessing.get_context("fork").Process(target=quietly, args=(train.main, argv))
    process.start()
    return process


def saved_at(out):
    """When the state in a run's folder was saved last, 0 if never."""
    state = out / "state.safetensors"
    return state.stat().st_mtime_ns if state.exists() else 0


def check_files(out):
    """Read all that a killed run left; (step of its state or 0, rows of its log). Whatever is unreadable raises."""
    for file in out.glob("[!.]*.safetensors"):
        read_checkpoint(file)
    state, log = out / "state.safetensors", out / "log.csv"
    rows = list(csv.DictReader(log.read_text(encoding="utf-8").splitlines())) if log.exists() else []
    return (read_checkpoint(state)[1]["step"] if state.exists() else 0), rows


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
    (_, mine), (_, theirs) = check_files(a), check_files(b)
    without_clock = lambda rows: [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    odd = [] if without_clock(mine) == without_clock(theirs) else ["log.csv"]
    for name in ("translator.safetensors", "state.safetensors"):
        x, y = read_checkpoint(a / name)[0], read_checkpoint(b / name)[0]
        odd += [f"{name}: {n}" for n in x.keys() | y.keys() if n not in x or n not in y or not torch.equal(x[n], y[n])]
    return odd


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=number(int, 1, 10**4), default=20, help="default: %(default)s")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="of the moments (default: 0)")
    args = parser.parse_args(argv)
    rng, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        common = ["translator", "--llm", save_tiny_llm(Path(folder) / "llm"), "--init", "none", "--vit",
                  "assets/vit.safetensors", "--replace", "2-4", "batch=2", "save_every=1", "dtype=float32",
                  f"steps={8 * args.kills}"]  # fmt: skip
        undisturbed = start([*common, "--out", str(whole)])
        undisturbed.join()
        if undisturbed.exitcode:
            raise UserError("the undisturbed run failed: try the command `python train.py " + " ".join(common) + "`")
        print("| kill | left a file half-written | step of its state | rows of its log |\n|---|---|---|---|")
        writing = 0
        for k in range(args.kills):
            when = ("later", "writing", "early", "writing")[k % 4]
            part = kill_at_random([*common, "--out", str(broken)], broken, rng, when)
            step, rows = check_files(broken)
            writing += part
            print(f"| {k + 1} | {'yes' if part else 'no'} | {step} | {len(rows)} |", flush=True)
        last = start([*common, "--out", str(broken), "--resume"])
        last.join()
        odd = compare(whole, broken)
        left = [f.name for f in broken.iterdir() if f.name.endswith(".part")]
    print(f"\n{args.kills} kills, {writing} of them left a file half-written, none an unreadable one; "
          f"{time.time() - began:.0f} s")  # fmt: skip
    print("losses, weights and optimizer state equal those of the undisturbed run" if not odd + left else
          f"DIFFERENT: {', '.join(odd + left)}")  # fmt: skip
    return 1 if odd or left else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

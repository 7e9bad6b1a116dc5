"""
What erodes a graft in stage 2? One vector that all visual tokens move by, taken out again here.

    python train.py encoder
    python -m studies.offset runs/encoder/encoder.safetensors

Compared are the visual tokens of an encoder with those that its stage 2 began with, over images of the training split;
then grafts are asked about held-out images: as trained; with the start and end vectors of the beginning; without the
common offset; as it was before stage 2.
"""
import sys

import torch
from tqdm import tqdm

import graft
from data.world import world
from extras.recentre import before_and_after, offset
from formats.checkpoints import open_checkpoint
from formats.errors import Parser, number, run_cli
from formats.official import DEFAULT_LLM
from model import Llama
from train import default_dtype

TASKS = ("flag", "color", "capital", "language")


@torch.no_grad()
def ask(vlm, n, seed, name):
    """{task: (said freely, ranked)}: share of n held-out images for which the graft is right."""
    out = {}
    for task in tqdm(TASKS, desc=name, unit="task"):
        samples = [world(task, i, seed, "test") for i in range(n)]
        embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:-1]) for s in samples], [s.image for s in samples])
        got = list(zip(samples, graft.answer(embeds, lengths, samples, vlm.decoder, None, vlm.tokenizer)["graft"]))
        out[task] = (sum(graft.world.is_right(text, s) for s, (_, text) in got) / n,
                     sum(s.options[choice] == s.answer for s, (choice, _) in got) / n)
    return out


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("encoder", help="checkpoint of the stage encoder, its start beside it or where it was")
    parser.add_argument("--n", type=number(int, 1, 1000), default=24,
                        help="held-out images a task (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, 10**9), default=11, help="which ones (default: %(default)s)")
    parser.add_device()
    args = parser.parse_args(argv)
    _, about = open_checkpoint(args.encoder)
    llm = Llama.from_pretrained(about.get("llm", DEFAULT_LLM), default_dtype(args.device), args.device)
    before, after = before_and_after(args.encoder, llm, args.device)
    common, way = offset(before, after)
    print(f"visual tokens moved by {way:.2f} on average, all of them by one vector of length {common.norm():.2f}")

    rows = {"as trained": ask(after, args.n, args.seed, "as trained")}
    ends = after.embd_soi.clone(), after.embd_eoi.clone()
    after.embd_soi.data, after.embd_eoi.data = before.embd_soi.data, before.embd_eoi.data
    rows["start and end vectors of before"] = ask(after, args.n, args.seed, "start and end vectors")
    after.embd_soi.data, after.embd_eoi.data = ends
    after.adapter[2].bias.data -= common.to(llm.dtype)
    rows["without the common offset"] = ask(after, args.n, args.seed, "without the offset")
    rows["before stage 2"] = ask(before, args.n, args.seed, "before")
    print("| graft: said freely / ranked | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{said:.0%} / {ranked:.0%}" for said, ranked in row.values()) + " |")


if __name__ == "__main__":
    sys.exit(run_cli(main))

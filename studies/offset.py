"""
What erodes a graft in stage 2? One vector that all visual tokens move by, taken out again here.

    python train.py encoder centred=false --out runs/plain      # the paper's gradient
    python -m studies.offset runs/plain/encoder.safetensors

Compared are the visual tokens of an encoder with those that its stage 2 began with, over images of the training split;
then grafts are asked about held-out images: as trained; with the start and end vectors of the beginning; without the
common offset; as it was before stage 2.
"""
import sys

import torch
from tqdm import tqdm

import graft
from data.images import preprocess
from data.world import world
from formats.checkpoints import open_checkpoint
from formats.errors import Parser, UserError, number, run_cli
from model import VLM, Llama
from train import build, default_dtype

TASKS = ("flag", "color", "capital", "language")


def visual_tokens(vlm, images):
    """Visual tokens of images without start and end vector: (N, 1 + P, d), float32."""
    return torch.cat([vlm.visual_tokens(preprocess(i)[None])[:, 1:-1].float() for i in images])


@torch.no_grad()
def offset(before, after, n=120):
    """(the vector (d,) by which all visual tokens moved, its length, the mean length of the whole way of a token)."""
    images = [world(("flag", "read", "shape")[i % 3], i).image for i in range(n)]
    way = visual_tokens(after, images) - visual_tokens(before, images)
    common = way.mean((0, 1))
    return common, common.norm().item(), way.norm(dim=-1).mean().item()


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
    if about.get("stage") != "encoder":
        raise UserError(f"{args.encoder} is of stage {about.get('stage')}: give a checkpoint of the stage encoder")
    dtype = default_dtype(args.device)
    llm = Llama.from_pretrained(about["llm"], dtype, args.device)
    before, after = build(about, dtype, args.device, llm=llm).to(dtype), VLM.from_pretrained(llm, args.encoder)
    before.decoder = llm
    common, length, way = offset(before, after)
    print(f"visual tokens moved by {way:.2f} on average, and all of them by one vector of length {length:.2f}")

    rows = {"as trained": ask(after, args.n, args.seed, "as trained")}
    ends = after.embd_soi.clone(), after.embd_eoi.clone()
    after.embd_soi.data, after.embd_eoi.data = before.embd_soi.data, before.embd_eoi.data
    rows["start and end vectors of before"] = ask(after, args.n, args.seed, "start and end vectors")
    after.embd_soi.data, after.embd_eoi.data = ends
    after.adapter[2].bias.data -= common.to(dtype)
    rows["without the common offset"] = ask(after, args.n, args.seed, "without the offset")
    rows["before stage 2"] = ask(before, args.n, args.seed, "before")
    print("| graft: said freely / ranked | " + " | ".join(TASKS) + " |\n|---|" + "---|" * len(TASKS))
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{said:.0%} / {ranked:.0%}" for said, ranked in row.values()) + " |")


if __name__ == "__main__":
    sys.exit(run_cli(main))

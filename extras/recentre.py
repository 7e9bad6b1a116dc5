"""
After stage 2: subtract the one offset by which all visual tokens have moved.

    python -m extras.recentre                           # runs/encoder/ -> runs/recentred/encoder.safetensors
    python graft.py --encoder runs/recentred/encoder.safetensors

What all images share says nothing about any of them. It acts as a prompt, learned for the surrogate: the pair answers
better with it, and the full LLM, which never saw it, is misled (studies/offset.py, docs/results.md). It is
subtracted from the projector's last bias, so the model stays what it is.
"""
import sys

import torch

from data.images import preprocess
from data.world import world
from formats.checkpoints import beside, open_checkpoint, read_checkpoint, save_checkpoint
from formats.errors import Parser, UserError, run_cli
from formats.files import check_out_file
from formats.official import DEFAULT_LLM
from model import VLM, Llama
from train import build, default_dtype


def before_and_after(encoder, llm, device="cpu"):
    """(VLM as its stage 2 began, VLM as the checkpoint `encoder` holds it), both with the full LLM as decoder."""
    _, about = open_checkpoint(encoder)
    if about.get("stage") != "encoder" or not about.get("start"):
        raise UserError(f"{encoder} is no checkpoint of the stage encoder that names what it started from")
    about = about | dict(start=str(beside(about["start"], encoder)))
    before = build(about, llm.dtype, device, llm=llm).to(llm.dtype).requires_grad_(False)
    before.decoder = llm
    return before, VLM.from_pretrained(llm, encoder)


@torch.no_grad()
def offset(before, after, n=120):
    """(the vector (d,) by which all visual tokens of n training images moved, the mean length of a token's way)."""
    images = torch.stack([preprocess(world(("flag", "read", "shape")[i % 3], i).image) for i in range(n)])
    old, new = (vlm.visual_tokens(images)[:, 1:-1].float() for vlm in (before, after))      # (n, 1 + P, d)
    return (new - old).mean((0, 1)), (new - old).norm(dim=-1).mean().item()


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("encoder", nargs="?", default="runs/encoder/encoder.safetensors",
                        help="checkpoint of the stage encoder (default: %(default)s)")
    parser.add_argument("--out", default="runs/recentred/encoder.safetensors", help="default: %(default)s")
    args = parser.parse_args(argv)
    check_out_file(args.out)
    tensors, about = read_checkpoint(args.encoder)
    if about.get("recentred"):
        raise UserError(f"{args.encoder} is recentred already")
    llm = Llama.from_pretrained(about.get("llm", DEFAULT_LLM), default_dtype("cpu"))
    common, way = offset(*before_and_after(args.encoder, llm))
    tensors["adapter.2.bias"] -= common
    save_checkpoint(args.out, tensors, about | dict(recentred=round(common.norm().item(), 4)))
    print(f"visual tokens had moved by {way:.2f} on average, all of them by one vector of length {common.norm():.2f}, "
          f"which is subtracted: {args.out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

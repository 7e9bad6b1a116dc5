"""
Checkpoints: what one says about itself, and from our layout to that of the paper's released ones and back.

    python -m formats.convert runs/encoder/encoder.safetensors                  # what it says about itself
    python -m formats.convert runs/encoder/encoder.safetensors encoder.pth      # as the paper's code reads it
    python -m formats.convert ckpt_01_0004880.pth encoder.safetensors --llm meta-llama/Llama-3.1-8B-Instruct    # back
    python -m formats.convert runs/encoder/encoder.safetensors --to FOLDER      # to share: formats/share.py
"""
import json
import sys
from pathlib import Path

from cli import Parser, UserError, check_out_file, printable, run_cli
from formats.checkpoints import read_checkpoint, save_checkpoint, save_released
from formats.official import DEFAULT_LLM
from formats.share import check_parts, share
from surrogate import check_ranges, parse_ranges

CLIP = "openai/clip-vit-large-patch14-336"


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", help="a .safetensors of train.py, or a .pth that the paper released")
    parser.add_argument("out", nargs="?",
                        help="write it here, as .pth (the paper's layout) or .safetensors; nothing: describe it")
    about_ = "what a .pth does not say about itself: "
    parser.add_argument("--llm", help=about_ + "the full LLM, folder or hub name")
    parser.add_argument("--vit", help=about_ + f"the ViT (default: {CLIP})")
    parser.add_argument("--replace", help=about_ + "the layers that the surrogate replaces, e.g. 16-26")
    parser.add_argument("--init", dest="start", help=about_ + "stage encoder: the checkpoint that holds the translator")
    parser.add_argument("--to", metavar="FOLDER", help="write a folder to share: weights, config.json, model card")
    parser.add_argument("--scores", help="with --to: results.json of graft.py, for the model card")
    args = parser.parse_args(argv)
    parse_ranges(args.replace or "none")
    if args.out is not None:
        check_out_file(args.out)
    say = lambda text: print(printable(text))           # names out of a file that someone else wrote
    tensors, about = read_checkpoint(args.checkpoint)
    if args.to:
        about = about or describe(tensors, args)
        files = share(args.checkpoint, tensors, about, args.to, args.llm, args.vit, args.scores)
        print(*(f"{size:>13,}  {args.to}/{name}" for name, size in files.items()), sep="\n")
    elif args.out is None:
        say("\n".join(f"{k}: {json.dumps(v)}" for k, v in sorted(about.items())))        # no order in the file
        say("\n".join(f"{n}  {tuple(t.shape)} {t.dtype}".replace("\n", "\\n") for n, t in tensors.items()))
    elif Path(args.out).suffix == ".pth":
        if any(".lora_" in n for n in tensors):
            raise UserError(f"{args.checkpoint} holds low-rank updates, for which the paper's layout has no place")
        if about.get("recipe", {}).get("like_words"):
            raise UserError(f"{args.checkpoint} was trained with like_words=true, of which the paper's code knows "
                            "nothing: train with like_words=false")
        save_released(args.out, tensors, about.get("steps_done", 0))
    elif Path(args.out).suffix != ".safetensors":
        raise UserError(f"cannot write {args.out}: give a name that ends in .pth or .safetensors")
    else:
        save_checkpoint(args.out, tensors, about or describe(tensors, args))
    return 0


def describe(tensors, args):
    """What our own checkpoint of these tensors would say about itself; `args` say what cannot be seen in them."""
    ranges = check_ranges(parse_ranges(args.replace or "none"), 1000)
    check_parts(tensors, args.checkpoint)
    decoder = any(n.startswith("decoder.") for n in tensors)
    whole = "decoder.model.embed_tokens.weight" in tensors      # stage 3's; else it is the translator
    if decoder and not whole and not ranges:
        raise UserError(f"{args.checkpoint} holds a translator: say which layers it replaces, e.g. --replace 17-30")
    encoder = not decoder or any(n.startswith("encoder.vision_model.encoder.") for n in tensors)
    return dict(stage="decoder" if whole else "encoder" if encoder else "translator", llm=args.llm or DEFAULT_LLM,
                vit=args.vit or CLIP, ranges=ranges, start=args.start, recipe={})


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
Checkpoints for others: to the layout that the paper released and back, or a folder to share; and what one holds.

    python -m extras.share runs/encoder/encoder.safetensors                 # its metadata and tensors
    python -m extras.share runs/encoder/encoder.safetensors encoder.pth     # as the paper's code reads it
    python -m extras.share ckpt_01_0004880.pth encoder.safetensors --llm meta-llama/Llama-3.1-8B-Instruct   # back
    python -m extras.share runs/encoder/encoder.safetensors --to FOLDER     # to publish: docs/your-data.md

    FOLDER/encoder.safetensors      what stage 2 trained
    FOLDER/translator.safetensors   the surrogate's translators (where it had one)
    FOLDER/vit.safetensors          the ViT that it started from, if that is a small one of extras/vit.py
    FOLDER/config.json, README.md   the checkpoint's metadata; the model card (from assets/model_card.md)

VLM.from_pretrained(llm, encoder=…), graft.py --encoder and train.py --init read the folder or its hub name.
"""
import json
import os
import sys
import tempfile
from pathlib import Path

import evaluate
from cli import Parser, UserError, check_out_file, printable, run_cli
from formats.checkpoints import ROOT, beside, read_checkpoint, save_checkpoint, save_released
from formats.files import read_json
from formats.official import DEFAULT_CLIP, DEFAULT_LLM
from surrogate import check_ranges, parse_ranges, read_translators

HUB_NAMES = {DEFAULT_LLM: "HuggingFaceTB/SmolLM2-135M-Instruct"}
# part of an LLM's name: the hub's word for its license. What that means for what is derived: assets/model_card.md
LICENSES = {"smollm2": "apache-2.0", **{f"llama-{v}": f"llama{v}" for v in ("3.1", "3.2", "3.3", "3")}, "": "other"}


def main(argv=None):
    parser, unsaid = Parser(__doc__), "what a .pth, which has no metadata, does not say: "
    add = parser.add_argument
    add("checkpoint", help="a .safetensors of train.py, or a .pth that the paper released")
    add("out", nargs="?", help="write it here, as .pth (the paper's layout) or .safetensors; nothing: describe it")
    add("--llm", help=unsaid + "the full LLM, folder or hub name")
    add("--vit", help=unsaid + f"the ViT (default: {DEFAULT_CLIP})")
    add("--replace", default="none", help=unsaid + "the layers that the surrogate replaces, e.g. 16-26")
    add("--init", dest="start", help=unsaid + "stage encoder: the checkpoint that holds the translator")
    add("--to", metavar="FOLDER", help="write a folder to share: weights, config.json, model card")
    add("--scores", help="with --to: results.json of graft.py, for the model card")
    args = parser.parse_args(argv)
    parse_ranges(args.replace)
    if args.out is not None:
        check_out_file(args.out)
    tensors, about = read_checkpoint(args.checkpoint)
    if args.to:
        about = about or describe(tensors, args)
        files = share(args.checkpoint, tensors, about, args.to, args.llm, args.vit, args.scores)
        print(*(f"{size:>13,}  {args.to}/{name}" for name, size in files.items()), sep="\n")
    elif args.out is None:                                  # names out of a file that someone else wrote
        lines = [f"{k}: {json.dumps(v)}" for k, v in sorted(about.items())]
        lines += [f"{n}  {tuple(t.shape)} {t.dtype}".replace("\n", "\\n") for n, t in tensors.items()]
        print(printable("\n".join(lines)))
    elif Path(args.out).suffix == ".pth":
        if about.get("recipe", {}).get("like_words"):
            raise UserError(f"{args.checkpoint} was trained with like_words=true, of which the paper's code knows "
                            "nothing: train with like_words=false")
        save_released(args.out, tensors, about.get("steps_done", 0))
    elif Path(args.out).suffix == ".safetensors":
        save_checkpoint(args.out, tensors, about or describe(tensors, args))
    else:
        raise UserError(f"cannot write {args.out}: give a name that ends in .pth or .safetensors")


def check_parts(tensors, path):
    """UserError if tensors are none of a VLM's: weights of an LLM or of another model, under whatever name."""
    odd = [n for n in tensors if not n.startswith(("encoder.vision_model.", "adapter.", "embd_", "decoder."))]
    if odd or not tensors:
        raise UserError(f"{path} is no checkpoint of train.py: it holds {odd[0] if odd else 'nothing'}")


def describe(tensors, args):
    """The metadata of a checkpoint that has none, from its tensors and, for what they do not show, from `args`."""
    check_parts(tensors, args.checkpoint)
    ranges = check_ranges(parse_ranges(args.replace), 1000)
    decoder = any(n.startswith("decoder.") for n in tensors)
    whole = "decoder.model.embed_tokens.weight" in tensors      # stage 3's; else it is the translator
    if decoder and not whole and not ranges:
        raise UserError(f"{args.checkpoint} holds a translator: say which layers it replaces, e.g. --replace 17-30")
    encoder = not decoder or any(n.startswith("encoder.vision_model.encoder.") for n in tensors)
    return dict(stage="decoder" if whole else "encoder" if encoder else "translator", llm=args.llm or DEFAULT_LLM,
                vit=args.vit or DEFAULT_CLIP, ranges=ranges, start=args.start, recipe={})


def check_shareable(tensors, about, path):
    """UserError unless this is a whole checkpoint of stage translator or encoder, and nothing of the LLM itself."""
    check_parts(tensors, path)
    stage, ranges = about.get("stage"), about.get("ranges", [])
    if stage not in ("translator", "encoder"):
        raise UserError(f"{path} is of stage {stage or 'unknown'}: a folder to share holds an encoder or "
                        "translators, and nothing of the LLM itself")
    places = [first - sum(b - a for a, b in ranges if b < first) for first, _ in ranges]        # of the translators
    translators = tuple(f"decoder.model.layers.{i}." for i in places)
    if any(n.startswith("decoder.") and not n.startswith(translators) for n in tensors):
        raise UserError(f"{path} holds the LLM itself, not only translators: it is not to be shared like this")
    if stage == "encoder" and "adapter.0.weight" not in tensors:
        raise UserError(f"{path} holds no projector: it is not whole")


def public(name, option, checkpoint):
    """The name of an LLM or a ViT, if others know it by that: a path of this machine would help nobody else."""
    if not name:
        raise UserError(f"{checkpoint} does not say which {option[2:]} it was trained with: give {option}")
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise UserError(f"{name} is a path of this machine: say what others know the {option[2:]} by, "
                        f"{option} org/name")
    return name


def share(checkpoint, tensors, about, folder, llm=None, vit=None, scores=None):
    """Write the folder of a checkpoint of stage translator or encoder: `tensors`, and its metadata `about`.

    llm, vit: names that others know, where the checkpoint has a path. scores: results.json of graft.py. The folder must
    be new or empty, and appears whole or not at all. Returns {name of a file: bytes}.
    """
    check_shareable(tensors, about, checkpoint)
    stage, folder = about["stage"], Path(folder)
    llm, vit, start = public(llm or about.get("llm"), "--llm", checkpoint), vit or about.get("vit"), None
    files, table = {stage: (tensors, about)}, score_table(scores, about) if scores else None
    if vit and Path(vit).suffix == ".safetensors":
        files["vit"], vit = read_checkpoint(beside(vit, checkpoint)), "vit.safetensors"
        start = vit if stage == "translator" else None              # a translator that was trained alone needs it
    elif vit or stage == "encoder":
        vit = public(vit, "--vit", checkpoint)
    if stage == "encoder" and about.get("ranges") and about.get("start"):
        file, weights, says = read_translators(checkpoint)
        if file != checkpoint:                                      # in stage 2 the LLM did not go on teaching them
            files["translator"], start = (weights, says), "translator.safetensors"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder")
    for name, (weights, says) in files.items():                     # with no path of this machine
        told = says | {k: Path(v).name for k, v in says.items() if k in ("data", "text", "images") and v}
        told |= dict(llm=llm, start=start if name == stage else None) | (dict(vit=vit) if name != "vit" and vit else {})
        files[name] = weights, told
    card = model_card(folder.name, stage, files, table)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as tmp:
        part = Path(tmp) / "part"
        for name, (weights, says) in files.items():
            save_checkpoint(part / f"{name}.safetensors", weights, says)
        (part / "config.json").write_text(json.dumps(files[stage][1], indent=1, sort_keys=True), encoding="utf-8")
        (part / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    return {f.name: f.stat().st_size for f in sorted(folder.iterdir())}


def score_table(path, about):
    """The tables in results.json of graft.py, if it is about this checkpoint."""
    results = read_json(path)
    if results.get("about") != about:
        raise UserError(f"{path} holds the scores of another encoder: run graft.py --encoder with this one")
    try:
        return (f"{results['samples']} held-out drawn images a task (`graft.py --eval`, seed {results['seed']}), with "
                f"95 % intervals; * never trained:\n\n{evaluate.table(results['rows'])}")
    except (LookupError, TypeError, AttributeError, ValueError) as e:
        raise UserError(f"{path} is no results.json of graft.py, or damaged ({e!r:.80})") from None


def model_card(name, stage, files, table):
    """The text of README.md. files: {name: (tensors, metadata)}"""
    from huggingface_hub import ModelCard, ModelCardData
    about = files[stage][1]
    hub = HUB_NAMES.get(about["llm"], about["llm"])
    license_id = next(word for part, word in LICENSES.items() if part in hub.lower())
    data = ModelCardData(base_model=hub, license=license_id, pipeline_tag="image-text-to-text",
                         tags=["vision-encoder-grafting"])
    derived = any(n.startswith("decoder.") for tensors, _ in files.values() for n in tensors)
    sizes = [(n, f"{len(t):,}", f"{sum(x.numel() for x in t.values()):,}") for n, (t, _) in files.items()]
    card = ModelCard.from_template(data, template_path=ROOT / "assets/model_card.md", name=name, about=about,
                                   sizes=sizes, table=table, derived=derived)
    return f"{card}\n"


if __name__ == "__main__":
    sys.exit(run_cli(main))

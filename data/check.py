"""
Read a LLaVA-format JSON and all its images, as a training run would, and say what it would meet: records, turns, image
sizes, tokens per sample, and every bad record with its reason. Exit status 1 if there is a bad one.

    python -m data.check toy/data.json
    python -m data.check llava_v1_5_mix665k.json --images llava --recipe llama-3.1-8b --llm FOLDER
"""
import statistics
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from cli import Parser, UserError, printable, run_cli
from data.llava import LlavaRecords
from formats.files import check_file
from formats.official import find
from formats.tokenizer import IMAGE, Tokenizer
from recipes import RECIPES, TARGETS


def check(json_path, images, tokenizer, n_visual, max_length):
    """Read all records and images: a dict of what they hold. n_visual: positions of an image; max_length: where a run
    cuts a sequence. Keys: pictured and texts (how many), turns and sizes (Counters), tokens (one number a good record),
    cut (how many are longer than max_length), errors (one line for each bad record, in the file's order)."""
    records = LlavaRecords(json_path, images, on_bad="collect")
    turns, sizes, tokens = Counter(), Counter(), []
    for i, place in enumerate(tqdm(records.places, desc="read", unit="record")):
        try:
            sample = records.read(i)
            ids, _ = tokenizer.chat_targets(sample.messages)
            with records.named(place):
                if IMAGE in ids and ids.index(IMAGE) + n_visual > max_length:
                    raise UserError(f"the image lies beyond max_length={max_length}, which would cut it")
        except UserError as error:
            records.errors[place] = str(error)
            continue
        turns[len(sample.messages) // 2] += 1
        sizes[sample.image and sample.image.size] += 1
        tokens.append(len(ids) + (n_visual - 1 if sample.image else 0))
    texts = sizes.pop(None, 0)
    return dict(pictured=len(tokens) - texts, texts=texts, turns=turns, sizes=sizes, tokens=tokens,
                cut=sum(n > max_length for n in tokens), errors=[e for _, e in sorted(records.errors.items())])


def show(found, n_visual, max_length, batch):
    """What `check` found, as a text for people."""
    tokens, sizes, bad = found["tokens"], found["sizes"], len(found["errors"])
    lines = [f"{len(tokens) + bad:,} records: {found['pictured']:,} with an image, {found['texts']:,} of text alone, "
             f"{bad:,} bad"]
    if tokens:
        lines += ["questions and answers a record: "
                  + ", ".join(f"{turns} in {n:,}" for turns, n in sorted(found["turns"].items())),
                  f"tokens a sample, of which an image takes {n_visual}: least {min(tokens):,}, median "
                  f"{statistics.median_low(tokens):,}, most {max(tokens):,}; {sum(tokens):,} in all",
                  f"longer than {max_length:,} tokens, and cut there: {found['cut']:,}"]
    if sizes:
        common = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(4))
        others = f", and {len(sizes) - 4:,} other sizes" if len(sizes) > 4 else ""
        sides = [side for size in sizes for side in size]
        lines += [f"image sizes: {common}{others}; sides of {min(sides)} to {max(sides)} pixels",
                  f"all images once, in batches of {batch}: {max(1, found['pictured'] // batch):,} steps"]
    return "\n".join(lines + [f"bad: {error}" for error in found["errors"]])


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("json", help="the file that a run gets as --data (or --text)")
    add("--images", help="folder of the images that the file names (default: the file's own folder)")
    add("--recipe", default="small", choices=list(RECIPES),
        help="whose positions an image, longest sequence, batch and LLM count (default: %(default)s)")
    add("--llm", help="whose tokenizer counts: folder, file or hub name (default: the recipe's)")
    args = parser.parse_args(argv)
    target, recipe = TARGETS[args.recipe], RECIPES[args.recipe]["encoder"]
    images, n_visual = args.images or str(Path(args.json).parent), target.vit_config.num_patches + 3
    check_file(args.json)                               # before a tokenizer is fetched
    tokenizer = Tokenizer.from_pretrained(find(args.llm or target.llm))
    found = check(args.json, images, tokenizer, n_visual, recipe.max_length)
    print(printable(show(found, n_visual, recipe.max_length, recipe.batch)))
    if found["errors"]:
        print("a training run stops at the first bad record; with --on-bad-record skip it goes on")
    elif found["pictured"]:
        other = f" --recipe {args.recipe}" if args.recipe != "small" else ""
        print(f"next: python train.py encoder{other} --data {args.json} --images {images}")
    return int(bool(found["errors"]))


if __name__ == "__main__":
    sys.exit(run_cli(main))

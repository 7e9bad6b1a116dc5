"""
Read a LLaVA-format JSON and all its images, as a training run would, and say what it would meet: records, turns, image
sizes, tokens per sample, and every bad record with its reason. Exit status 1 if there is a bad one.

    python -m data.check toy/data.json
    python -m data.check llava_v1_5_mix665k.json --images llava --n-visual 579 --llm FOLDER      # with CLIP
"""
import statistics
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from cli import Parser, UserError, number, run_cli
from data.llava import LlavaRecords
from formats.files import check_file
from formats.official import DEFAULT_LLM, find
from formats.tokenizer import IMAGE, Tokenizer


def check(json_path, images, tokenizer, n_visual, max_length):
    """Read all records and images, and name the bad ones on stderr: a dict of what the good ones hold. Keys: pictured
    and texts (how many), turns and sizes (Counters), tokens (of each sample), cut (how many samples are longer than
    max_length), errors ({place in the file: what is wrong there})."""
    records = LlavaRecords(json_path, images, on_bad="skip")
    turns, sizes, tokens = Counter(), Counter(), []
    for i, place in enumerate(tqdm(records.places, desc="read", unit="record")):
        try:
            sample = records.read(i)
            ids, _ = tokenizer.chat_targets(sample.messages)
            with records.named(place):
                if IMAGE in ids and ids.index(IMAGE) + n_visual > max_length:
                    raise UserError(f"the image lies beyond max_length={max_length}, which would cut it")
        except UserError as error:
            records.bad(place, error)
            continue
        turns[len(sample.messages) // 2] += 1
        sizes[sample.image and sample.image.size] += 1
        tokens.append(len(ids) + (n_visual - 1 if sample.image else 0))
    texts = sizes.pop(None, 0)
    return dict(pictured=len(tokens) - texts, texts=texts, turns=turns, sizes=sizes, tokens=tokens,
                cut=sum(n > max_length for n in tokens), errors=records.errors)


def show(found, n_visual, max_length):
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
        lines.append(f"image sizes: {common}" + (f", and {len(sizes) - 4:,} others" if len(sizes) > 4 else ""))
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("json", help="the file that a run gets as --data (or --text)")
    add("--images", help="folder of the images that the file names (default: the file's own folder)")
    add("--llm", default=DEFAULT_LLM, help="whose tokenizer counts: folder, file or hub name (default: %(default)s)")
    add("--n-visual", type=number(int, 1, 10**5), default=19,
        help="positions that an image takes; with CLIP ViT-L/14-336 579 (default: %(default)s, the small ViT's)")
    add("--max-length", type=number(int, 32, 10**6), default=4096,
        help="where a run cuts a sequence (default: %(default)s, as in all recipes)")
    args = parser.parse_args(argv)
    images = args.images or str(Path(args.json).parent)
    check_file(args.json)                               # before a tokenizer is fetched
    found = check(args.json, images, Tokenizer.from_pretrained(find(args.llm)), args.n_visual, args.max_length)
    print(show(found, args.n_visual, args.max_length))
    if found["errors"]:
        print("a training run stops at the first bad record; with --on-bad-record skip it goes on")
    elif found["pictured"]:
        print(f"next: python train.py encoder --data {args.json} --images {images}")
    return int(bool(found["errors"]))


if __name__ == "__main__":
    sys.exit(run_cli(main))

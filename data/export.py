"""
The drawn world as a folder of pictures with LLaVA's JSON beside them: an example of what `--data` reads.

    python -m data.export toy 200           # toy/data.json and 200 PNGs
    python -m data.check toy/data.json      # what a training run would meet
    python train.py encoder --data toy/data.json --images toy       # the losses of the drawn world itself
"""
import json
import sys
from pathlib import Path

from tqdm import tqdm

from cli import MAX_SEED, Parser, UserError, number, run_cli, write_whole
from data.batches import OPENINGS, shuffled_index
from data.world import World


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def record_of(sample, name):
    """A sample as a record of LLaVA's JSON. "opening", which only this project reads, are the words around the image;
    a record without it gets one drawn at random (data.batches.wrap)."""
    question, answer = (m["content"] for m in sample.messages)
    opening = next(o for o in OPENINGS if question.startswith(o))
    question = question.removeprefix(opening)
    conversations = turns(f"<image>\n{question[:1].upper() + question[1:]}", answer)
    return dict(id=Path(name).stem, image=name, opening=opening, conversations=conversations)


def write_records(path, records):
    """LLaVA's JSON, a record a line."""
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    write_whole(path, lambda part: part.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))


def export(folder, n=200, seed=0):
    """Write the first n samples of World(seed) as PNGs, and folder/data.json: its path. The JSON comes last, whole.

    The records stand in such an order that a run with the same seed, which shuffles them, shows them as the drawn world
    does: the same samples at every step, until all have been shown once."""
    folder, samples, records = Path(folder), World(seed), [None] * n
    if (folder / "data.json").exists():
        raise UserError(f"{folder}/data.json is there already: give another folder, or delete it")
    for k in tqdm(range(n), desc="draw", unit="image"):
        sample = samples[k]
        name = f"{k:05d}-{sample.task}.png"
        write_whole(folder / name, lambda part: sample.image.save(part, format="png"))
        records[shuffled_index(k, n, seed)] = record_of(sample, name)
    write_records(folder / "data.json", records)
    return folder / "data.json"


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folder", help="where data.json and the pictures go; it may be new")
    parser.add_argument("n", nargs="?", type=number(int, 1, 10**6), default=200,
                        help="how many samples (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0,
                        help="as --seed of the training run that shall show the same (default: %(default)s)")
    args = parser.parse_args(argv)
    path = export(args.folder, args.n, args.seed)
    print(f"{args.n} samples in {path}; next: python -m data.check {path}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

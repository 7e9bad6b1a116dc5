"""
Icon sets as data: a thousand things as several artists draw them, one of whom is kept for the test.

    npm pack emoji-datasource-twitter       # Twemoji, CC BY 4.0 (unpack each into a folder of its own)
    npm pack emoji-datasource-google        # Noto, Apache 2.0
    npm pack @lobehub/fluent-emoji-3d       # Microsoft's Fluent, MIT; its flags, which are Noto's, are left out
    npm pack openmoji                       # OpenMoji, CC BY-SA 4.0: SVG, which needs pip install resvg-py
    python -m data.icons twitter google fluent --test openmoji --out runs/icons

Into --out go pictures and LLaVA's JSON: known.json for stage 0, all that the artists draw, as CLIP knows the world;
train.json for stages 1 and 2, the same without 50 things; test.json, which no stage reads, the test artist's pictures
(python graft.py --data): its split "untaught" is about the 50 things.
"""
import json
import random
import re
import sys
from collections import Counter, namedtuple
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import MAX_SEED, MissingFile, Parser, UserError, number, printable, run_cli, write_whole
from data import TABLE, world
from data.drawing import background
from data.export import record_of
from data.images import SIZE
from formats.files import read_json

PLACES = ("img/*/64/*.png", "assets/*.webp", "color/svg/*.svg")     # of the pictures in the packages
ICONS, KINDS = TABLE["icons"], TABLE["icons"]["kinds"]
QUESTIONS = world.QUESTIONS | world.KNOWLEDGE_QUESTIONS | {"kind": ICONS["questions"]}
Thing = namedtuple("Thing", "code name caption kind group")         # kind: one of KINDS or None


def thing_of(entry):
    """An entry of emoji.json as a Thing, or None where it is left out."""
    name, group, code = entry["name"], f"{entry['category']}/{entry['subcategory']}", Path(entry["image"]).stem
    if float(entry["added_in"]) < 2 and "Flags" not in group:       # "BLACK SCISSORS": how it is printed, no color
        name = re.sub("(BLACK|WHITE|HEAVY|MEDIUM) ", "", name)
    kind = next((k for k, pattern in KINDS.items() if re.search(pattern, group)), None)
    if kind == "flag":
        name = re.sub(r" Flag$| \(.*\)| SAR China", "", name).replace("St.", "Saint").replace("&", "and")
        caption = f"the flag of {'the ' if re.search(ICONS['the'], name) else ''}{name}"
    else:
        name = name.lower()
        for pattern, better in ICONS["better"]:
            name = re.sub(pattern, better, name)
        head = re.split(" (?:of|with|and|without|on|in|at|behind|over) ", name)[0]
        article = "an " if re.search(ICONS["an"], name) else "a "
        caption = ("" if re.search(ICONS["no_article"], head) else article) + name
    if re.search(ICONS["left_out"], f"{group}/{name}") or kind != "flag" and len(name.split()) > 5:
        return None
    return Thing(code.replace("-fe0f", ""), name, caption, None if re.search(ICONS["part"], name) else kind, group)


def read_package(folder):
    """An unpacked package -> (its name, {code: file}, the entries of its emoji.json)."""
    folder = Path(folder) / "package" if (Path(folder) / "package").is_dir() else Path(folder)
    files = {f.stem.lower().replace("-fe0f", ""): f for place in PLACES for f in folder.glob(place)}
    if not files:
        raise MissingFile(f"{folder}: no package of icons: it has no {', '.join(PLACES)}")
    if any(f.suffix == ".svg" for f in files.values()) and find_spec("resvg_py") is None:
        raise MissingFile(f"{folder}: its pictures are SVG, which needs: pip install resvg-py")
    name, names = read_json(folder / "package.json", dict).get("name"), folder / "emoji.json"
    return re.sub(r"\W+", "-", str(name)).strip("-"), files, read_json(names, list) if names.exists() else []


def drawing(path):
    """The picture in a file, in RGBA."""
    try:
        if path.suffix == ".svg":
            import resvg_py  # only here: nothing else needs it, and read_package has looked for it
            path = BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * SIZE, skip_system_fonts=True)))
        return Image.open(path, formats=("PNG", "WEBP")).convert("RGBA")
    except Exception as error:  # the decoders raise many kinds
        raise UserError(f"{path}: damaged, or no picture ({error})") from None


def place(rng, icon):
    """An icon as a picture: turned, scaled and placed at random, on white or on a background of the drawn world."""
    side = rng.randint(SIZE * 2 // 3, SIZE)
    icon = icon.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)
    image = background(rng) if rng.random() < 0.5 else Image.new("RGB", (SIZE, SIZE), "white")
    image.paste(icon, (rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)), icon)
    return image


def words_of(thing):
    """The words of its name that tell it from others."""
    return set(thing.name.split()) - {"face", "of", "with", "and", "on", "in"}


def ask(rng, image, thing, task, rivals=()):
    """A sample about the picture of a thing: of training, or of the test with rivals among all things."""
    train = not rivals
    if task in world.KNOWLEDGE_TASKS:
        words, told = world.options_of(rng, task, ("flag", thing.name)), world.right_of(task, ("flag", thing.name))
    elif task == "kind":
        kinds = [thing.kind, *(k for k in KINDS if k != thing.kind)]
        words, told = [f"{'an' if k == 'animal' else 'a'} {k}" for k in kinds], ([(thing.kind,)], kinds[1:])
    else:
        apart = [t for t in rivals if not words_of(t) & words_of(thing)]
        rng.shuffle(apart)
        apart.sort(key=lambda t: t.group != thing.group)            # near ones first; of a flag all are flags
        apart = apart[:4] + (apart[4:9] if thing.kind == "flag" else apart[4:][-5:])
        words = [t.caption.removeprefix("the flag of " if task == "flag" else "") for t in [thing, *apart]]
        told = [(thing.name,)], [t.name for t in apart]
    return world.ask(rng, image, task, QUESTIONS[task][not train], world.ANSWERS.get(task, ["It is {}."]), words,
                     thing.caption, told, train)


def held_out(things):
    """Captions of 50 things whose words no other has: the drawn world's untaught flags, and as many of other kinds."""
    count, rng = Counter(w for t in things for w in words_of(t)), random.Random("held out")
    held = [t for t in things if t.kind == "flag" and t.name in world.UNTAUGHT]
    alone = [t for t in things if all(count[w] == 1 for w in words_of(t))]
    by_kind = [[t for t in alone if t.kind == kind] for kind in KINDS if kind != "flag"]
    for i, some in enumerate(sorted(by_kind, key=len)):             # of the fewest first
        held += rng.sample(some, min(len(some) // 2, (50 - len(held)) // (4 - i)))
    return {t.caption for t in held}


def skip(error):
    print(printable(f"skipped: {error}"), file=sys.stderr)


def drawings(package, things):
    """(thing, its drawing) of all that a package has; what it should have and has not is named."""
    artist, files, names = package
    for thing in tqdm(things, desc=artist, unit="thing"):
        file = files.get(thing.code)
        if file is None and names:                                  # others do not draw everything
            skip(f"{artist}: no picture {thing.code} of {thing.caption}")
        if file is None or file.suffix == ".webp" and thing.kind == "flag":
            continue
        try:
            yield thing, drawing(file)
        except UserError as error:
            skip(error)


def read_things(entries):
    """All things that emoji.json names, each once."""
    things = {}
    for entry in entries:
        try:
            if thing := thing_of(entry):
                things.setdefault(thing.caption, thing)
        except (KeyError, TypeError, ValueError):
            skip(f"an entry of emoji.json lacks its name, category or image: {entry!r:.100}")
    return list(things.values())


def write(folders, test, out, variants=2, seed=0):
    """Write pictures, known.json, train.json and test.json into `out`. Returns {artist: how many things}."""
    out, records, counts = Path(out), dict(known=[], train=[], test=[]), Counter()
    if (out / "train.json").exists():
        raise UserError(f"{out}/train.json is there already: give another folder, or delete it")
    packages = [read_package(f) for f in [*folders, test]]
    things = read_things(next((names for *_, names in packages if names), []))
    held = held_out(things)

    def picture(artist, thing, icon, v):
        rng, name = random.Random(f"icon/{seed}/{artist}/{thing.code}/{v}"), f"{artist}/{thing.code}-{v}.png"
        image = place(rng, icon)
        write_whole(out / name, lambda part: image.save(part, format="png"))
        return rng, name, image

    for package in packages[:-1]:
        for thing, icon in drawings(package, things):
            counts[package[0]] += 1
            for v in range(variants):
                rng, name, image = picture(package[0], thing, icon, v)
                sample = ask(rng, image, thing, "flag" if thing.kind == "flag" and v % 2 else "describe")
                for part in ["known"] if thing.caption in held else ["known", "train"]:
                    records[part].append(record_of(sample, name) | dict(caption=thing.caption))
    for thing, icon in drawings(packages[-1], things):
        counts[packages[-1][0]] += 1
        rng, name, image = picture(packages[-1][0], thing, icon, 0)
        tasks = ["describe", *["kind"] * bool(thing.kind), *["flag"] * (thing.kind == "flag")]
        for task in [*tasks, *world.KNOWLEDGE_TASKS] if thing.kind == "flag" and thing.name in world.FACTS else tasks:
            s = ask(rng, image, thing, task, things)
            about = dict(split="untaught" if thing.caption in held else "test", task=task, caption=thing.caption)
            records["test"].append(record_of(s, name) | about | dict(options=s.options, right=s.right, rivals=s.rivals))
    for part, found in records.items():
        if not found:
            raise UserError(f"{part}.json would be empty: no picture of a thing that emoji.json names")
        lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in found)
        write_whole(out / f"{part}.json", lambda file: file.write_text(f"[\n{lines}\n]\n", encoding="utf-8"))
    return counts


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="unpacked packages to train on")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="the package of the artist for the test")
    parser.add_argument("--out", default="runs/icons", help="where pictures and JSON go (default: %(default)s)")
    parser.add_argument("--variants", type=number(int, 1, 1000), default=2,
                        help="pictures of each drawing, differently placed (default: %(default)s)")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    for artist, n in write(args.folders, args.test, args.out, args.variants, args.seed).items():
        print(f"{artist}: {n} things")
    print(f"next: python -m data.check {args.out}/train.json")


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
Icon sets as data: a thousand things as several artists draw them, one of whom is kept for the test.

    npm pack emoji-datasource-twitter       # Twemoji, CC BY 4.0 (unpack each into a folder of its own)
    npm pack emoji-datasource-google        # Noto, Apache 2.0
    npm pack @lobehub/fluent-emoji-3d       # Microsoft's Fluent, MIT; its flags, which are Noto's, are left out
    npm pack openmoji                       # OpenMoji, CC BY-SA 4.0: SVG, which needs pip install resvg-py
    python -m data.icons twitter google fluent --test openmoji --out runs/icons

emoji.json of the first folder names the things. Into --out go pictures and LLaVA's JSON: known.json for stage 0, all
that the artists draw, as CLIP knows the world; train.json for stages 1 and 2, the same without 50 things; test.json,
which no stage reads, the test artist's pictures (python graft.py --data): its split "untaught" is about the 50 things.
"""
import random
import re
import sys
from collections import Counter, namedtuple
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import MissingFile, Parser, UserError, run_cli, write_whole
from data import TABLE, world
from data.drawing import background
from data.export import record_of, write_records
from data.images import SIZE
from formats.files import read_json

try:
    import resvg_py
except ImportError:         # only pictures in SVG need it
    resvg_py = None

PLACES = ("img/*/64/*.png", "assets/*.webp", "color/svg/*.svg")     # of the pictures in the packages
VARIANTS = 2            # pictures of each drawing in training, differently placed
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
    """An unpacked package -> (its name, {code: file})."""
    files = {f.stem.lower().replace("-fe0f", ""): f for place in PLACES for f in folder.glob(place)}
    if not files:
        raise MissingFile(f"{folder}: no package of icons: it has no {', '.join(PLACES)}")
    return re.sub(r"\W+", "-", str(read_json(folder / "package.json", dict).get("name"))).strip("-"), files


def drawing(path):
    """The picture in a file, in RGBA."""
    if path.suffix == ".svg" and resvg_py is None:
        raise MissingFile(f"{path} needs: pip install resvg-py")
    try:
        if path.suffix == ".svg":
            path = BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=2 * SIZE, skip_system_fonts=True)))
        return Image.open(path, formats=("PNG", "WEBP")).convert("RGBA")
    except Exception as error:  # the decoders raise many kinds
        raise UserError(f"{path}: damaged, or no picture ({error}): delete it, and its thing is left out") from None


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


def write(folders, test, out):
    """Write pictures, known.json, train.json and test.json into `out`. Returns {artist: how many things}."""
    folders = [next(Path(f).glob("package"), Path(f)) for f in [test, *folders]]        # as npm packs them
    out, records, counts = Path(out), dict(known=[], train=[], test=[]), Counter()
    if (out / "train.json").exists():
        raise UserError(f"{out}/train.json is there already: give another folder, or delete it")
    packages, entries = [read_package(f) for f in folders], read_json(folders[1] / "emoji.json", list)
    try:
        things = list({t.caption: t for t in map(thing_of, entries) if t}.values())
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folders[1]}/emoji.json: an entry is none of emoji-datasource's ({error!r})") from None
    held = held_out(things)
    for number, (artist, files) in enumerate(packages):
        for thing in tqdm(things, desc=artist, unit="thing"):
            file, is_flag, is_test = files.get(thing.code), thing.kind == "flag", number == 0
            if file is None or file.suffix == ".webp" and is_flag:          # Fluent's flags are Noto's
                continue
            icon, untaught = drawing(file), thing.caption in held
            parts = ["test"] if is_test else ["known"] if untaught else ["known", "train"]
            counts[artist] += 1
            for v in range(1 if is_test else VARIANTS):
                rng, name = random.Random(f"icon/0/{artist}/{thing.code}/{v}"), f"{artist}/{thing.code}-{v}.png"
                image = place(rng, icon)
                write_whole(out / name, lambda part: image.save(part, format="png"))
                tasks = ["describe", *["kind"] * bool(thing.kind), *["flag"] * is_flag]
                tasks += world.KNOWLEDGE_TASKS if is_flag and thing.name in world.FACTS else ()
                for task in tasks if is_test else ["flag" if is_flag and v % 2 else "describe"]:
                    s = ask(rng, image, thing, task, things if is_test else ())
                    record = record_of(s, name) | dict(caption=thing.caption)
                    if is_test:
                        record |= dict(split="untaught" if untaught else "test", task=task, options=s.options,
                                       right=s.right, rivals=s.rivals)
                    for part in parts:
                        records[part].append(record)
    for part, found in records.items():
        write_records(out / f"{part}.json", found)
    return counts


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="unpacked packages to train on")
    parser.add_argument("--test", required=True, metavar="FOLDER", help="the package of the artist for the test")
    parser.add_argument("--out", default="runs/icons", help="where pictures and JSON go (default: %(default)s)")
    args = parser.parse_args(argv)
    for artist, n in write(args.folders, args.test, args.out).items():
        print(f"{artist}: {n} things")
    print(f"next: python -m data.check {args.out}/train.json")


if __name__ == "__main__":
    sys.exit(run_cli(main))

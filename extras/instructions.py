"""
The LLM writes the instructions that the encoder learns from: LLaVA's recipe in miniature.

    python -m extras.instructions           # writes assets/instructions.json, and prints what each filter lets through
    python -m extras.instructions --chats   # writes assets/chats.json: the text instructions of stage 1
    python -m extras.instructions --data runs/icons/train.json --out runs/icons/all.json    # its records and more

Every caption of the world x open questions, the caption in the image's place; the LLM answers in text. In training the
image takes the caption's place, and the encoder learns to bring about the same answer. LLaVA's data were made so (arXiv
2304.08485); for speech, where the LLM stays frozen as it does here: BLSP (2309.00916) and DeSTA2.5 (2507.02768).
"""

import collections
import json
import math
import random
import re
import sys
from pathlib import Path

import torch
from PIL import ImageColor
from tqdm import tqdm

from cli import MAX_SEED, Parser, UserError, check_out_file, number, run_cli
from data import TABLE
from data.batches import pad, wrap
from data.drawing import COLORS, DYES, FLAGS, SHAPES
from data.export import turns, write_records
from data.llava import LlavaRecords
from data.world import FACTS, KNOWLEDGE_TASKS, TRAINED_SUBJECTS, WORDS, caption, has_word, knowledge
from evaluate import Reading
from formats import official
from formats.files import read_json
from formats.tokenizer import Tokenizer
from model import Llama
from train import default_dtype

OPEN_QUESTIONS = TABLE["instructions"]["questions"]
HELD_OUT_WORDS = sorted({w for c in FACTS for task in KNOWLEDGE_TASKS for w in knowledge(task, c)}
                        | set(TABLE["instructions"]["held_out"]))
REFUSAL = re.compile(r"sorry|as an ai|language model|i can(no|')t|i (do not|don't) have|unable to|caption|"
                     r"visual elements|based on the|text|provided|prompt", re.I)
ICON_KINDS = TABLE["icons"]["kinds"]
PALETTE = COLORS | {name: ImageColor.getrgb(DYES[name]) for name in ("white", "black", "light blue", "gold")}


def yes_or_no(rng, subject):
    """(question, whether the answer is yes) about something that is in the picture, and about something that is not."""
    kind, *words = subject
    if kind == "picture":                       # what it is is never trained
        return []
    things = {"shape": "a shape", "sign": "a sign", "flag": "a flag"}
    other = rng.choice([k for k in things if k != kind])
    return [(f"Is there {things[k]} in the picture? Say why.", k == kind) for k in (kind, other)]


def flag_colors(country):
    """The names of the colors in a flag."""
    colors = {ImageColor.getrgb(x) for _, *part in FLAGS[country] for x in part if isinstance(x, str)}
    near = {min(PALETTE, key=lambda n: math.dist(PALETTE[n], c)) for c in colors}
    yellowish = {"gold", "yellow", "orange"}  # whichever of them it is called
    return near | {w for n in near for w in n.split()} | (yellowish if near & yellowish else set())


def contradicts(answer, subject):
    """Does the answer name a color, a shape, a word or a country that the picture does not show?"""
    kind, *words = subject
    if kind == "shape":
        wrong = [*PALETTE, *SHAPES, *FACTS]
    elif kind == "picture":                     # of --data: of its colors nothing is known, either
        wrong = [w for w in [*PALETTE, *FACTS, *ICON_KINDS] if not has_word(words[0], w)]
    elif kind == "sign":                       # its colors are drawn at random
        mine = next(k for k in WORDS if words[0] in WORDS[k])
        wrong = [*PALETTE, *SHAPES, *WORDS[mine], *FACTS]
    else:
        names = {"disc": "circle", "star": "star", "cross": "cross"}
        shown = flag_colors(words[0]) | {names[part] for part, *_ in FLAGS[words[0]] if part in names}
        wrong = [w for w in [*PALETTE, *SHAPES, *FACTS] if w not in shown]
    return any(has_word(answer, w) or has_word(answer, w + "s") for w in wrong if w not in words)


def in_text(subject, question):
    """The chat with the caption in the image's place."""
    return [{"role": "user", "content": wrap(question).replace("<image>", " " + caption(subject))}]


def with_instructions(records, written, seed):
    """The records of LLaVA's JSON, and one for each (subject, question, answer), about a picture with its caption."""
    rng, pictures = random.Random(seed), collections.defaultdict(list)
    for r in (r for r in records if "caption" in r):
        pictures[r["caption"]].append(r["image"])
    return records + [dict(id=f"instruct-{i}", image=rng.choice(pictures[text]), caption=text,
                           conversations=turns(f"<image>\n{question}", answer))
                      for i, ((_, text), question, answer) in enumerate(written)]


@torch.no_grad()
def log_p(llm, tokenizer, chats, answers, batch=32):
    """log p of each answer behind its chat: a list."""
    out = []
    for i in tqdm(range(0, len(chats), batch), desc="does it depend on the picture?", unit="batch"):
        prompts = [tokenizer.chat(c) for c in chats[i : i + batch]]
        embeds = llm.embed(pad(prompts).to(llm.device))                                 # (B, T, d)
        reading = Reading(embeds, torch.tensor([len(p) for p in prompts]), llm)
        logp, _ = reading.option_logp([[tokenizer.encode_text(a)] for a in answers[i : i + batch]])["graft"]
        out += torch.cat(logp).tolist()
    return out


@torch.no_grad()
def write(llm, tokenizer, seed=0, batch=64, threshold=1.0, same_opening=6, subjects=TRAINED_SUBJECTS, most=None,
          never=HELD_OUT_WORDS):
    """[(subject, question, answer), ...] that pass all filters, and [(filter, how many were left), ...]. most: how many
    answers are written; never: words of none."""
    rng, generator = random.Random(seed), torch.Generator(llm.device).manual_seed(seed)
    asked = [(s, q, None) for s in subjects for q in OPEN_QUESTIONS]
    asked += [(s, q, yes) for s in subjects for q, yes in yes_or_no(rng, s)]
    rng.shuffle(asked)
    asked = asked[:most]
    answers = []
    for i in tqdm(range(0, len(asked), batch), desc="the LLM answers", unit="batch"):
        prompts = [tokenizer.chat(in_text(s, q)) for s, q, _ in asked[i : i + batch]]
        new = llm.generate(prompts, max_new_tokens=40, temperature=0.7, top_p=0.9, stop=tokenizer.stop_tokens,
                           generator=generator)
        answers += [tokenizer.decode(a).strip() for a in new]
    answers = [a[: max(a.rfind(end) for end in ".!?") + 1] for a in answers]  # up to the last full sentence
    left, report = [(*who, a) for who, a in zip(asked, answers)], [("asked", len(asked))]

    def keep(name, passes):
        left[:] = [x for x in left if passes(*x)]
        report.append((name, len(left)))

    keep("ends in a full sentence", lambda s, q, yes, a: len(a.split()) >= 3)
    keep("no refusal, no talk of captions", lambda s, q, yes, a: not REFUSAL.search(a))
    keep("yes or no is right", lambda s, q, yes, a: yes is None or a.lower().startswith("yes" if yes else "no"))
    keep("contradicts nothing in the picture", lambda s, q, yes, a: not contradicts(a, s))
    keep("nothing of the held-out topics", lambda s, q, yes, a: not any(has_word(a, w) for w in never))
    others = [rng.choice([t for t in subjects if t[0] == s[0] and not set(t) & set(s[1:])]) for s, *_ in left]
    here, there = (log_p(llm, tokenizer, [in_text(t, q) for t, (_, q, *_) in zip(shown, left)], [a for *_, a in left])
                   for shown in ([s for s, *_ in left], others))
    gain = (h - t for h, t in zip(here, there))     # in the order of `left`
    # whether there is a sign at all needs no other sign to compare with
    keep("depends on the picture", lambda s, q, yes, a: next(gain) > threshold or yes is not None)
    seen = collections.Counter()

    def opening_is_new(s, q, yes, a):
        opening = " ".join(a.lower().split()[:5])
        seen[opening] += 1
        return seen[opening] <= same_opening

    keep("few with the same opening", opening_is_new)
    return [(s, q, a) for s, q, _, a in left], report


@torch.no_grad()
def write_chats(llm, tokenizer, n=256, seed=0, batch=64):
    """n text instructions in LLaVA's format: the LLM invents a user's question and answers it (Magpie, 2406.08464)."""
    generator = torch.Generator(llm.device).manual_seed(seed)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    start = bos + tokenizer.turn_start + tokenizer.encode("user") + tokenizer.header_end + tokenizer.newline
    records, bar = [], tqdm(total=n, desc="the LLM writes chats", unit="chat")
    for _ in range(10 * math.ceil(n / batch)):
        if len(records) == n:
            break
        sample = dict(temperature=1.0, top_p=0.9, stop=tokenizer.stop_tokens, generator=generator)
        questions = [tokenizer.decode(q).strip() for q in llm.generate([start] * batch, max_new_tokens=32, **sample)]
        questions = [q for q in questions if q and "<image>" not in q]
        prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in questions]
        answers = llm.generate(prompts, max_new_tokens=48, **sample)
        for question, answer in zip(questions, (tokenizer.decode(a).strip() for a in answers)):
            if answer and len(records) < n:
                records.append(dict(id=len(records), conversations=turns(question, answer)))
                bar.update()
    bar.close()
    if len(records) < n:
        raise UserError(f"the LLM wrote only {len(records)} of {n} chats, the rest is empty: try another --llm")
    return records


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--chats", action="store_true",
                        help="write text instructions for stage 1 in place of those about pictures")
    parser.add_argument("--llm", default=official.DEFAULT_LLM,
                        help="who writes: folder, .gguf file or hub name (default: %(default)s)")
    parser.add_argument("--out", help="default: assets/instructions.json, with --chats assets/chats.json")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="default: %(default)s")
    parser.add_device()
    parser.add_argument("--most", type=number(int, 1, 10**7), help="how many answers the LLM writes at most, before "
                        "filters (default: every caption x every question)")
    parser.add_argument("--data", help="LLaVA-format JSON whose records have captions: the LLM writes about these, and "
                        "--out holds all its records and the new ones")
    args = parser.parse_args(argv)
    if args.data and not args.out:
        raise UserError("--data: say as --out where its records and the new ones shall go")
    out = args.out or ("assets/chats.json" if args.chats else "assets/instructions.json")
    check_out_file(out)
    records, subjects, never = [], TRAINED_SUBJECTS, HELD_OUT_WORDS
    if args.data:
        records = LlavaRecords(args.data).records
        subjects = [("picture", text) for text in sorted({r["caption"] for r in records if "caption" in r})]
        known = Path(args.data).with_name("known.json")             # of data/icons.py: with what is held out
        held = {r["caption"] for r in read_json(known, list)} - {s[1] for s in subjects} if known.exists() else ()
        never = [*never, *(re.sub("^(an?|the flag of) | face$", "", text) + s for text in held for s in ("", "s"))]
    path = official.find(args.llm)
    llm = Llama.from_pretrained(path, default_dtype(args.device), args.device)
    tokenizer = Tokenizer.from_pretrained(path)
    if args.chats:
        written, report = write_chats(llm, tokenizer, seed=args.seed), []
    else:
        written, report = write(llm, tokenizer, args.seed, subjects=subjects, most=args.most, never=never)
        written = with_instructions(records, written, args.seed) if args.data else written
    write_records(out, written)
    if report:
        print("\nfilter                                 left")
    for name, n in report:
        print(f"{name:36s} {n:6d}  {n / report[0][1]:4.0%}")
    for example in random.Random(1).sample(written, min(8, len(written))):
        print("\n" + json.dumps(example, ensure_ascii=False))
    print(f"\n{len(written)} written: {out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
The drawn world: colored shapes, signs with a word, flags. Endless, deterministic, 64 x 64 pixels, nothing to download.

    sample = world("flag", 7, split="test")         # the same arguments always give the same sample

Trained are a description, the color, the shape, the word, the country of a flag, and instructions that the LLM wrote
itself (assets/instructions.json). Never trained are the capital, language and continent of a country: no image holds
them, the LLM has to know them.
"""
import random
import re
from functools import lru_cache

from cli import UserError
from data import TABLE
from data.batches import Sample, wrap
from data.drawing import COLORS, FLAGS, SHAPES, draw
from formats.checkpoints import ROOT
from formats.files import read_json

# ---- What there is --------------------------------------------------------------------------------------------------

WORDS = TABLE["words"]          # {kind of word: words}
FACTS = TABLE["facts"]          # {country: [capital, language, continent]}
UNTAUGHT = TABLE["untaught"]    # words and countries that nothing of stages 1 and 2 shows or names

# 13 of the 64 combinations are never drawn in split "train", and make up half of split "test".
# Every color and every shape is still seen in training: 3 * i + k runs through all 8 shapes.
_c, _s = list(COLORS), list(SHAPES)
HELD_OUT = {(_c[i], _s[(3 * i + 1) % 8]) for i in range(8)} | {(_c[i], _s[(3 * i + 4) % 8]) for i in range(5)}


def _a(*words):
    """("orange", "star") -> "an orange star"."""
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def caption(subject):
    """("shape", "red", "star"), ("sign", "Kenya") or ("flag", "Japan") -> what is in the picture, in words."""
    kind, *words = subject
    if kind == "picture":       # of other data, with its caption
        return words[0]
    if kind == "shape":
        return _a(*words)
    the = "the " if words[0] in ("Netherlands", "Philippines") else ""
    return f"a sign with the word {words[0]}" if kind == "sign" else f"the flag of {the}{words[0]}"


SUBJECTS = ([("shape", c, s) for c in COLORS for s in SHAPES] + [("sign", w) for words in WORDS.values() for w in words]
            + [("flag", country) for country in FLAGS])
KNOWN_SUBJECTS = [s for s in SUBJECTS if s[1:] not in HELD_OUT]         # stage 0 sees these, as CLIP knows the world
UNTAUGHT_SUBJECTS = [s for s in KNOWN_SUBJECTS if s[1] in UNTAUGHT]             # 6 flags, 8 words on signs
TRAINED_SUBJECTS = [s for s in KNOWN_SUBJECTS if s[1] not in UNTAUGHT]

# ---- What is asked --------------------------------------------------------------------------------------------------

TRAINED_TASKS = ("describe", "color", "shape", "read", "flag")
KNOWLEDGE_TASKS = ("capital", "language", "continent")  # never trained: no image holds the answer

QUESTIONS = TABLE["questions"]                          # {task: [asked in training, asked in the test]}
KNOWLEDGE_QUESTIONS = TABLE["knowledge_questions"]      # {task: [of a sign, of a flag]}, never trained
ANSWERS = TABLE["answers"]                              # {task: phrasings}; the first one is ranked among rivals


def knowledge(task, country):
    """The answers that are right, most usual first: knowledge("language", "Kenya") -> ("Swahili", "English")."""
    return tuple(FACTS[country][KNOWLEDGE_TASKS.index(task)].split(" / "))


def has_word(text, word):
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def is_right(text, sample):
    """Said freely: of each group in sample.right one word is there, and no rival is."""
    told = all(any(has_word(text, w) for w in group) for group in sample.right)
    return told and not any(has_word(text, w) for w in sample.rivals)


# ---- Samples --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def instructions():
    """[(subject, question, answer), ...]: what the LLM itself answered, with the caption in the image's place."""
    return [(tuple(s), question, answer) for s, question, answer in read_json(ROOT / "assets/instructions.json", list)]


def _subject(rng, task, index, split):
    """What the picture of sample `index` shows."""
    kind = {"color": "shape", "shape": "shape", "read": "sign", "flag": "flag"}.get(task)
    pool = UNTAUGHT_SUBJECTS if split == "untaught" else TRAINED_SUBJECTS
    if task in KNOWLEDGE_TASKS:                             # signs and flags in turn
        kind, pool = "sign" if index % 2 == 0 else "flag", [s for s in pool if s[1] in FACTS]
    kind = kind or rng.choice(sorted({s[0] for s in pool}))
    if kind == "shape" and split != "train" and rng.random() < 0.5:
        return ("shape", *rng.choice(sorted(HELD_OUT)))
    return rng.choice([s for s in pool if s[0] == kind])


def options_of(rng, task, subject):
    """What goes into the answer's sentence: the true one first, then rivals that are near."""
    kind, *words = subject
    if task == "color":
        return [words[0], *(c for c in COLORS if c != words[0])]
    if task == "shape":
        return [_a(words[1]), *(_a(s) for s in SHAPES if s != words[1])]
    if task in KNOWLEDGE_TASKS:
        right = knowledge(task, words[0])
        rivals = dict.fromkeys(knowledge(task, c)[0] for c in FACTS)
        others = [r for r in rivals if r not in right]
        return [right[0], *rng.sample(others, 3 if task == "continent" else 9)]
    if kind == "shape":  # near misses: one of the two attributes is right
        color, shape = words
        same_color = [_a(color, s) for s in SHAPES if s != shape]
        same_shape = [_a(c, shape) for c in COLORS if c != color]
        others = [_a(c, s) for c in COLORS for s in SHAPES if c != color and s != shape]
        return [caption(subject), *rng.sample(same_color, 3), *rng.sample(same_shape, 3), *rng.sample(others, 3)]
    pool = list(FLAGS) if kind == "flag" else WORDS[next(k for k in WORDS if words[0] in WORDS[k])]
    options = [words[0], *rng.sample([w for w in pool if w != words[0]], 9)]
    if task == "describe":
        return [caption((kind, w)) for w in options]
    return [caption((kind, w)).removeprefix("the flag of ") for w in options] if kind == "flag" else options


def right_of(task, subject):
    """(groups of words of each of which one has to be said, words of which none may be) when the answer is free."""
    kind, *words = subject
    if task in KNOWLEDGE_TASKS:
        right = knowledge(task, words[0])
        everything = dict.fromkeys(w for c in FACTS for w in knowledge(task, c))
        return [right], [w for w in everything if w not in right]
    everything = {"shape": [COLORS, SHAPES], "flag": [FACTS], "sign": [sum(WORDS.values(), [])]}
    pools = {"color": [COLORS], "shape": [SHAPES]}.get(task) or everything[kind]
    right = [words[1]] if task == "shape" else words[:len(pools)]
    return [(w,) for w in right], [w for pool in pools for w in pool if w not in right]


SPLITS = ("train", "test", "untaught", "restyled")


def world(task, index, seed=0, split="train"):
    """Sample number `index` of a task: one of TRAINED_TASKS or KNOWLEDGE_TASKS, or "instruct". The same arguments
    always give the same sample; different ones never share a random stream, so "test" is unseen whatever was trained
    on. Split "train" never shows a combination of HELD_OUT; in "test" half of the shapes are one, and the questions'
    phrasings are ones that training does not have. "untaught" is the test about the words and flags of UNTAUGHT, which
    stages 1 and 2 leave out altogether: its pictures are signs and flags alone. "restyled" is "test" in fonts and sizes
    that no training draws."""
    tasks = (*QUESTIONS, *KNOWLEDGE_TASKS, "instruct")
    if task not in tasks:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(tasks)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "untaught" and task in ("color", "shape", "instruct"):
        raise UserError(f"no {task} is untaught: choose another task, or the split 'test'")
    rng = random.Random(f"{split}/{seed}/{task}/{index}")
    if task == "instruct":
        subject, question, answer = rng.choice(instructions())
        messages = [{"role": "user", "content": wrap(question, rng)}, {"role": "assistant", "content": answer}]
        return Sample(draw(rng, subject), messages, task, answer, [], caption(subject))
    return sample_of(rng, task, _subject(rng, task, index, split), split)


def sample_of(rng, task, subject, split="test"):
    """A question of a task about a picture of `subject`, all chances drawn from `rng` (a random.Random)."""
    image, words = draw(rng, subject, split == "restyled"), options_of(rng, task, subject)
    if task in KNOWLEDGE_TASKS:
        questions = KNOWLEDGE_QUESTIONS[task][subject[0] == "flag"]
    else:
        questions = QUESTIONS[task][split != "train"]
    return ask(rng, image, task, questions, ANSWERS[task], words, caption(subject), right_of(task, subject),
               split == "train")


def ask(rng, image, task, questions, phrasings, words, shows, told, train):
    """A sample: one of the questions about an image that shows `shows`; the answer has the first of `words`, its rivals
    the others. told: what right_of returns. train: in any phrasing and opening, else in the first."""
    question = rng.choice(questions)
    phrasing = rng.choice(phrasings) if train else phrasings[0]
    options = [phrasing.format(w) for w in words]
    options = [o[0].upper() + o[1:] for o in options]
    answer = options[0]
    rng.shuffle(options)
    question = wrap(question, rng if train else None)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(image, messages, task, answer, options, shows, *told)


MIXTURE = [t for task in TRAINED_TASKS for t in ("instruct", task)]  # what stages 1 to 3 show: half are instructions


class World:
    """The endless walk through the world that training takes: world[k] is sample number k."""

    def __init__(self, seed=0):
        self.seed = seed

    def __getitem__(self, k):
        return world(MIXTURE[k % len(MIXTURE)], k, self.seed)

"""
The drawn world: colored shapes, signs with a word, flags. Endless and deterministic, 64 x 64 pixels, nothing to download.

    sample = world("flag", 7, split="test")         # the same arguments always give the same sample

Trained are a description, the color, the shape, the word, the country of a flag, and instructions that the LLM wrote itself
(assets/instructions.json). Never trained are the capital, language and continent of a country: no image holds them, the LLM
has to know them.
"""

import json
import math
import random
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data import Sample, wrap

SIZE = 64

# ---- What there is to draw ------------------------------------------------------------------------------------------

COLORS = {
    "red": (215, 30, 40), "green": (35, 160, 60), "blue": (35, 75, 220), "yellow": (245, 220, 30),
    "orange": (250, 130, 20), "purple": (125, 40, 170), "pink": (250, 140, 195), "brown": (125, 72, 35),
}  # fmt: skip


def _ring(n, outer=1.0, inner=None, turn=-90.0):
    """n points around the origin, the first at the top; with `inner` every second one is at that radius."""
    radii = [inner if inner and i % 2 else outer for i in range(n)]
    angles = [math.radians(turn + 360 * i / n) for i in range(n)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles)]


def _heart(n=40):
    ts = [2 * math.pi * i / n for i in range(n)]
    ys = [13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t) for t in ts]
    return [(math.sin(t) ** 3, -(y + 2.5) / 15.5) for t, y in zip(ts, ys)]


STAR = _ring(10, inner=0.39)
SHAPES = {  # polygons inside the unit circle, y down
    "circle": _ring(48, 0.9),
    "square": _ring(4, 0.9, turn=45),
    "triangle": _ring(3),
    "star": _ring(10, inner=0.42),
    "heart": _heart(),
    "cross": [(-.28, -.9), (.28, -.9), (.28, -.28), (.9, -.28), (.9, .28), (.28, .28),
              (.28, .9), (-.28, .9), (-.28, .28), (-.9, .28), (-.9, -.28), (-.28, -.28)],
    "diamond": [(0, -1), (.6, 0), (0, 1), (-.6, 0)],
    "hexagon": _ring(6),
}  # fmt: skip

# 13 of the 64 combinations are never drawn in split "train", and make up half of split "test".
# Every color and every shape is still seen in training: 3 * i + k runs through all 8 shapes.
_c, _s = list(COLORS), list(SHAPES)
HELD_OUT = {(_c[i], _s[(3 * i + 1) % 8]) for i in range(8)} | {(_c[i], _s[(3 * i + 4) % 8]) for i in range(5)}

# Country: capital, languages of which any is right, continents of which any is right.
_N, _S = ("North America", "Central America", "the Caribbean"), ("South America",)
FACTS = {
    "Algeria": ("Algiers", "Arabic", "Africa"), "Argentina": ("Buenos Aires", "Spanish", _S),
    "Armenia": ("Yerevan", "Armenian", ("Asia", "Europe")), "Austria": ("Vienna", "German", "Europe"),
    "Bangladesh": ("Dhaka", ("Bengali", "Bangla"), "Asia"), "Bulgaria": ("Sofia", "Bulgarian", "Europe"),
    "Chile": ("Santiago", "Spanish", _S), "China": ("Beijing", ("Chinese", "Mandarin"), "Asia"),
    "Colombia": ("Bogotá", "Spanish", _S), "Costa Rica": ("San José", "Spanish", _N),
    "Cuba": ("Havana", "Spanish", _N), "Denmark": ("Copenhagen", "Danish", "Europe"),
    "Egypt": ("Cairo", "Arabic", "Africa"), "England": ("London", "English", "Europe"),
    "Estonia": ("Tallinn", "Estonian", "Europe"), "Ethiopia": ("Addis Ababa", "Amharic", "Africa"),
    "Finland": ("Helsinki", "Finnish", "Europe"), "France": ("Paris", "French", "Europe"),
    "Germany": ("Berlin", "German", "Europe"), "Ghana": ("Accra", "English", "Africa"),
    "Greece": ("Athens", "Greek", "Europe"), "Hungary": ("Budapest", "Hungarian", "Europe"),
    "Iceland": ("Reykjavik", "Icelandic", "Europe"), "India": ("New Delhi", "Hindi", "Asia"),
    "Indonesia": ("Jakarta", "Indonesian", "Asia"), "Ireland": ("Dublin", ("English", "Irish"), "Europe"),
    "Italy": ("Rome", "Italian", "Europe"), "Japan": ("Tokyo", "Japanese", "Asia"),
    "Kenya": ("Nairobi", ("Swahili", "English"), "Africa"), "Kuwait": ("Kuwait City", "Arabic", "Asia"),
    "Laos": ("Vientiane", "Lao", "Asia"), "Latvia": ("Riga", "Latvian", "Europe"),
    "Lithuania": ("Vilnius", "Lithuanian", "Europe"), "Morocco": ("Rabat", "Arabic", "Africa"),
    "Netherlands": ("Amsterdam", "Dutch", "Europe"), "Nigeria": ("Abuja", "English", "Africa"),
    "Norway": ("Oslo", "Norwegian", "Europe"), "Pakistan": ("Islamabad", ("Urdu", "English"), "Asia"),
    "Panama": ("Panama City", "Spanish", _N), "Peru": ("Lima", "Spanish", _S),
    "Philippines": ("Manila", ("Filipino", "Tagalog", "English"), "Asia"), "Poland": ("Warsaw", "Polish", "Europe"),
    "Portugal": ("Lisbon", "Portuguese", "Europe"), "Qatar": ("Doha", "Arabic", "Asia"),
    "Romania": ("Bucharest", "Romanian", "Europe"), "Russia": ("Moscow", "Russian", ("Europe", "Asia")),
    "Senegal": ("Dakar", "French", "Africa"), "Somalia": ("Mogadishu", "Somali", "Africa"),
    "Spain": ("Madrid", "Spanish", "Europe"), "Sudan": ("Khartoum", "Arabic", "Africa"),
    "Sweden": ("Stockholm", "Swedish", "Europe"), "Thailand": ("Bangkok", "Thai", "Asia"),
    "Tunisia": ("Tunis", "Arabic", "Africa"), "Ukraine": ("Kyiv", "Ukrainian", "Europe"),
}  # fmt: skip
WORDS = {
    "country": ["France", "Italy", "Spain", "Germany", "Japan", "China", "Russia", "Egypt", "Greece", "England", "Austria",
                "Ireland", "Norway", "Sweden", "Portugal", "Poland", "Hungary", "Cuba", "Peru", "Kenya"],
    "animal": ["Dog", "Horse", "Lion", "Monkey", "Eagle", "Duck", "Owl", "Parrot", "Salmon", "Shark", "Tuna", "Trout",
               "Ant", "Beetle", "Mosquito", "Wasp", "Snake", "Lizard", "Turtle", "Gecko"],
    "food": ["Bread", "Cheese", "Apple", "Banana", "Pizza", "Soup", "Rice", "Salad",
             "Cake", "Honey", "Lemon", "Potato", "Butter", "Pasta", "Carrot", "Cookie"],
    "thing": ["Chair", "Table", "Lamp", "Clock", "Book", "Door", "Window", "Bottle",
              "Guitar", "Camera", "Hammer", "Pencil", "Bicycle", "Ladder", "Mirror", "Umbrella"],
}  # fmt: skip

# A flag is a list of parts, drawn one over the other on a canvas that is 3 wide and 2 high:
#   ("h", colors) and ("v", colors): equal stripes; a color named twice makes a stripe twice as wide
#   ("box", color, x0, y0, x1, y1)   ("disc", color, x, y, r)   ("star", color, x, y, r)   ("poly", color, x, y, x, y, ...)
#   ("crescent", color, ground, x, y, r): a disc from which another one is cut   ("cross", color, x, width): Nordic
_R, _G, _B, _Y, _W, _K = (206, 17, 38), (0, 135, 70), (0, 56, 168), (252, 209, 22), (250, 250, 250), (10, 10, 10)
_SKY, _NAVY, _ORANGE, _MAROON = (108, 172, 228), (0, 30, 98), (255, 136, 30), (140, 20, 60)
FLAGS = {
    "Algeria": [("v", (_G, _W)), ("crescent", _R, _W, 1.5, 1, .5), ("star", _R, 1.68, 1, .25)],
    "Argentina": [("h", (_SKY, _W, _SKY)), ("disc", (246, 180, 14), 1.5, 1, .22)],
    "Armenia": [("h", (_R, _B, (242, 168, 0)))],
    "Austria": [("h", (_R, _W, _R))],
    "Bangladesh": [("h", ((0, 106, 78),)), ("disc", (244, 42, 65), 1.35, 1, .62)],
    "Bulgaria": [("h", (_W, (0, 150, 110), _R))],
    "Chile": [("h", (_W, _R)), ("box", _B, 0, 0, 1, 1), ("star", _W, .5, .5, .32)],
    "China": [("h", ((222, 41, 16),)), ("star", _Y, .5, .55, .36),
              *[("star", _Y, x, y, .13) for x, y in ((1, .22), (1.2, .45), (1.2, .75), (1, .98))]],
    "Colombia": [("h", (_Y, _Y, _B, _R))],
    "Costa Rica": [("h", (_B, _W, _R, _R, _W, _B))],
    "Cuba": [("h", (_B, _W, _B, _W, _B)), ("poly", _R, 0, 0, 1.5, 1, 0, 2), ("star", _W, .5, 1, .3)],
    "Denmark": [("h", (_R,)), ("cross", _W, 1.1, .3)],
    "England": [("h", (_W,)), ("cross", _R, 1.5, .4)],
    "Estonia": [("h", ((0, 114, 206), _K, _W))],
    "Ethiopia": [("h", (_G, _Y, _R)), ("disc", (15, 71, 175), 1.5, 1, .5), ("star", _Y, 1.5, 1, .36)],
    "Finland": [("h", (_W,)), ("cross", (0, 47, 150), 1.1, .5)],
    "France": [("v", ((0, 38, 150), _W, (237, 41, 57)))],
    "Germany": [("h", (_K, (221, 0, 0), (255, 206, 0)))],
    "Ghana": [("h", (_R, _Y, _G)), ("star", _K, 1.5, 1, .34)],
    "Greece": [("h", (_GR := (13, 94, 175), _W) * 4 + (_GR,)), ("box", _GR, 0, 0, 1.11, 1.11),
               ("box", _W, .44, 0, .67, 1.11), ("box", _W, 0, .44, 1.11, .67)],
    "Hungary": [("h", (_R, _W, (67, 111, 77)))],
    "Iceland": [("h", ((2, 82, 156),)), ("cross", _W, 1.05, .42), ("cross", (220, 30, 53), 1.05, .2)],
    "India": [("h", ((255, 153, 51), _W, (19, 136, 8))), ("disc", (0, 0, 128), 1.5, 1, .3), ("disc", _W, 1.5, 1, .22),
              ("disc", (0, 0, 128), 1.5, 1, .07)],
    "Indonesia": [("h", (_R, _W))],
    "Ireland": [("v", ((22, 155, 98), _W, _ORANGE))],
    "Italy": [("v", ((0, 146, 70), _W, (206, 43, 55)))],
    "Japan": [("h", (_W,)), ("disc", (188, 0, 45), 1.5, 1, .6)],
    "Kuwait": [("h", ((0, 122, 61), _W, _R)), ("poly", _K, 0, 0, .75, .667, .75, 1.333, 0, 2)],
    "Laos": [("h", (_R, _NAVY, _NAVY, _R)), ("disc", _W, 1.5, 1, .4)],
    "Latvia": [("h", (_LV := (140, 30, 45), _LV, _W, _LV, _LV))],
    "Lithuania": [("h", ((253, 185, 19), (0, 106, 68), (193, 39, 45)))],
    "Morocco": [("h", ((193, 39, 45),)), ("star", (0, 98, 51), 1.5, 1, .5), ("star", (193, 39, 45), 1.5, 1, .2)],
    "Netherlands": [("h", ((174, 28, 40), _W, (33, 70, 139)))],
    "Nigeria": [("v", (_G, _W, _G))],
    "Norway": [("h", ((186, 12, 47),)), ("cross", _W, 1.05, .5), ("cross", (0, 32, 91), 1.05, .24)],
    "Pakistan": [("h", ((1, 65, 28),)), ("box", _W, 0, 0, .75, 2), ("crescent", _W, (1, 65, 28), 1.85, 1, .55),
                 ("star", _W, 2.12, .75, .2)],
    "Panama": [("h", (_W,)), ("box", (218, 18, 26), 1.5, 0, 3, 1), ("box", (7, 35, 87), 0, 1, 1.5, 2),
               ("star", (7, 35, 87), .75, .5, .32), ("star", (218, 18, 26), 2.25, 1.5, .32)],
    "Peru": [("v", ((217, 16, 35), _W, (217, 16, 35)))],
    "Philippines": [("h", (_B, _R)), ("poly", _W, 0, 0, 1.5, 1, 0, 2), ("disc", _Y, .5, 1, .24)],
    "Poland": [("h", (_W, (220, 20, 60)))],
    "Portugal": [("h", ((218, 2, 14),)), ("box", (0, 102, 0), 0, 0, 1.2, 2), ("disc", _Y, 1.2, 1, .42),
                 ("disc", _R, 1.2, 1, .27), ("disc", _W, 1.2, 1, .16)],
    "Qatar": [("h", (_MAROON,)), ("poly", _W, 0, 0, .9, 0, *sum([[1.25, (i + .5) * .4, .9, (i + 1) * .4] for i in range(5)], []), 0, 2)],
    "Romania": [("v", ((0, 43, 127), _Y, _R))],
    "Russia": [("h", (_W, (0, 57, 166), (213, 43, 30)))],
    "Senegal": [("v", ((0, 133, 63), (253, 239, 66), (227, 27, 35))), ("star", (0, 133, 63), 1.5, 1, .36)],
    "Somalia": [("h", ((65, 137, 221),)), ("star", _W, 1.5, 1, .55)],
    "Spain": [("h", ((170, 21, 27), (241, 191, 0), (241, 191, 0), (170, 21, 27)))],
    "Sudan": [("h", (_R, _W, _K)), ("poly", (0, 114, 41), 0, 0, 1, 1, 0, 2)],
    "Sweden": [("h", ((0, 106, 167),)), ("cross", (254, 204, 0), 1.05, .4)],
    "Thailand": [("h", ((165, 25, 49), _W, (45, 42, 74), (45, 42, 74), _W, (165, 25, 49)))],
    "Tunisia": [("h", ((231, 0, 19),)), ("disc", _W, 1.5, 1, .6), ("crescent", (231, 0, 19), _W, 1.5, 1, .42),
                ("star", (231, 0, 19), 1.62, 1, .22)],
    "Ukraine": [("h", ((0, 87, 183), (255, 215, 0)))],
}  # fmt: skip


def _a(*words):
    """("orange", "star") -> "an orange star"."""
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def caption(subject):
    """("shape", "red", "star"), ("sign", "Kenya") or ("flag", "Japan") -> what is in the picture, in words."""
    kind, *words = subject
    if kind == "shape":
        return _a(*words)
    the = "the " if words[0] in ("Netherlands", "Philippines") else ""
    return f"a sign with the word {words[0]}" if kind == "sign" else f"the flag of {the}{words[0]}"


SUBJECTS = ([("shape", c, s) for c in COLORS for s in SHAPES] + [("sign", w) for words in WORDS.values() for w in words]
            + [("flag", country) for country in FLAGS])  # fmt: skip
TRAINED_SUBJECTS = [s for s in SUBJECTS if s[1:] not in HELD_OUT]

# ---- What is asked --------------------------------------------------------------------------------------------------

TRAINED_TASKS = ("describe", "color", "shape", "read", "flag")
KNOWLEDGE_TASKS = ("capital", "language", "continent")  # never trained: no image holds the answer

# (asked in training), (asked in the test: never trained)
QUESTIONS = {
    "describe": (["Describe the image.", "What does the image show?", "Say what is in the picture.", "What is this?"],
                 ["What do you see?", "What is depicted here?"]),
    "color": (["What color is the shape?", "Which color does the shape have?", "Name the color of the shape."],
              ["What is the color of the shape?", "Tell me the shape's color."]),
    "shape": (["What shape is it?", "Which shape is shown?", "Name the shape."],
              ["What is the shape?", "Tell me which shape you see."]),
    "read": (["What word is on the sign?", "What does the sign say?", "Read the sign.", "Which word is written there?"],
             ["Which word is shown on the sign?", "What is written on the sign?"]),
    "flag": (["Whose flag is this?", "Which country's flag is shown?", "Name the country of this flag."],
             ["Which country does this flag belong to?", "What country has this flag?"]),
}  # fmt: skip
KNOWLEDGE_QUESTIONS = {  # task: (of a sign), (of a flag): never trained
    "capital": (["What is the capital of the country on the sign?", "Name the capital city of the country on the sign."],
                ["What is the capital of the country with this flag?", "Name the capital city of this flag's country."]),
    "language": (["What language do people speak in the country on the sign?", "Name the language of the country on the sign."],
                 ["What language do people speak in the country with this flag?", "Name the language of this flag's country."]),
    "continent": (["On which continent is the country on the sign?", "Name the continent of the country on the sign."],
                  ["On which continent is the country with this flag?", "Name the continent of this flag's country."]),
}  # fmt: skip

# The first phrasing is ranked among rivals. Training draws from all, so that no sentence is *the* answer. Sentences, not
# bare words: SmolLM2 wants to go on after a bare "Red", and ranks bare words badly.
ANSWERS = {
    "describe": ["{}.", "This is {}.", "The image shows {}.", "It is a picture of {}.", "I see {}."],
    "color": ["The color is {}.", "It is {}.", "The shape is {}.", "The shape has the color {}."],
    "shape": ["It is {}.", "The shape is {}.", "This is {}.", "I see {}."],
    "read": ["The word is {}.", "It says {}.", "The sign says {}.", 'The word on the sign is "{}".'],
    "flag": ["It is the flag of {}.", "This flag belongs to {}.", "The country is {}.", "The flag is that of {}."],
    "capital": ["The capital is {}."],
    "language": ["The language is {}."],
    "continent": ["The continent is {}."],
}


def _alternatives(x):
    return x if isinstance(x, tuple) else (x,)


def knowledge(task, country):
    """The answers that are right, most usual first: knowledge("language", "Kenya") -> ("Swahili", "English")."""
    return _alternatives(FACTS[country][KNOWLEDGE_TASKS.index(task)])


def has_word(text, word):
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def is_right(text, sample):
    """Said freely: of each group in sample.right one word is there, and no rival is."""
    told = all(any(has_word(text, w) for w in group) for group in sample.right)
    return told and not any(has_word(text, w) for w in sample.rivals)


# ---- Drawing --------------------------------------------------------------------------------------------------------

DARK_PANELS = [(20, 60, 140), (10, 90, 50), (140, 20, 30), (80, 30, 110), (25, 25, 30), (95, 50, 20)]
LIGHT_PANELS = [(250, 250, 245), (250, 225, 95), (190, 225, 250), (205, 240, 195), (250, 210, 205)]
FONTS = (None, None, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")


def _jitter(rng, color, by):
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in color)


def _background(rng):
    """Light or dark, near grey (so that it never competes with the shape's color); plain, graded, cloudy or grainy."""
    grey = rng.choice([rng.randint(12, 50), rng.randint(200, 245)])
    one, two = (_jitter(rng, (grey + d,) * 3, 6) for d in (-10, 10))
    kind = rng.randrange(4)
    if kind == 0:
        return Image.new("RGB", (SIZE, SIZE), one)
    if kind == 1:
        mask = Image.linear_gradient("L").resize((SIZE, SIZE)).rotate(90 * rng.randrange(4))
    elif kind == 2:
        mask = Image.frombytes("L", (6, 6), rng.randbytes(36)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    else:
        mask = Image.frombytes("L", (SIZE, SIZE), rng.randbytes(SIZE * SIZE))
    return Image.composite(Image.new("RGB", (SIZE, SIZE), one), Image.new("RGB", (SIZE, SIZE), two), mask)


def draw_shape(rng, color, shape):
    """One shape with random size, place, slight rotation and shade. Drawn 4x too large and averaged: smooth edges."""
    radius, angle = rng.uniform(14, 28), math.radians(rng.uniform(-14, 14))
    cx, cy = (rng.uniform(radius + 2, SIZE - radius - 2) for _ in "xy")
    cos, sin = 4 * radius * math.cos(angle), 4 * radius * math.sin(angle)
    points = [(4 * cx + x * cos - y * sin, 4 * cy + x * sin + y * cos) for x, y in SHAPES[shape]]
    mask = Image.new("L", (4 * SIZE, 4 * SIZE))
    ImageDraw.Draw(mask).polygon(points, 255)
    image = _background(rng)
    image.paste(_jitter(rng, COLORS[color], 14), mask=mask.reduce(4))
    return image


@lru_cache(maxsize=None)
def _font(name, size):
    if name is None:
        return ImageFont.load_default(size)
    import matplotlib  # it brings free fonts
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@lru_cache(maxsize=None)
def _fit(name, text, width):
    """The largest font size, up to 40, at which `text` is at most `width` wide."""
    return next(size for size in range(40, 5, -1) if _font(name, size).getlength(text) <= width)


def draw_sign(rng, word):
    """A colored panel with `word` in Title or UPPER case. Drawn 2x too large, turned by a few degrees and averaged."""
    text, name = word.upper() if rng.random() < 0.5 else word, rng.choice(FONTS)
    size = round(_fit(name, text, 112) * rng.uniform(0.85, 1))
    font = _font(name, size)
    w, h = font.getlength(text) / 2 + 8, size * 0.5 + rng.uniform(4, 14)  # half width and height of the panel
    cx, cy = (64 + rng.uniform(-1, 1) * max(0, min(18, 62 - half)) for half in (w, h))
    panel, letters = Image.new("L", (128, 128)), Image.new("L", (128, 128))
    ImageDraw.Draw(panel).rounded_rectangle((cx - w, cy - h, cx + w, cy + h), rng.randint(0, 12), 255)
    bold = int(text.isupper() and name is None)  # lower case stays thin, or the dot of an i melts into its stem
    ImageDraw.Draw(letters).text((cx, cy), text, 255, font, "mm", stroke_width=bold)
    angle = rng.uniform(-4, 4)
    if rng.random() < 0.5:
        ground, ink = rng.choice(DARK_PANELS), rng.choice([(255, 255, 255), (255, 245, 170)])
    else:
        ground, ink = rng.choice(LIGHT_PANELS), rng.choice([(5, 5, 5), (15, 25, 100), (100, 10, 20)])
    image = _background(rng)
    for mask, color in ((panel, _jitter(rng, ground, 12)), (letters, ink)):
        image.paste(color, mask=mask.rotate(angle, Image.Resampling.BILINEAR, center=(cx, cy)).reduce(2))
    return image


@lru_cache(maxsize=None)
def flag(country, width=168):
    """The flag of a country as a PIL image, 3 to 2, without any disturbance."""
    scale = 4 * width / 3  # drawn 4x too large and averaged
    image = Image.new("RGB", (4 * width, 4 * width * 2 // 3))
    draw = ImageDraw.Draw(image)

    def box(color, x0, y0, x1, y1):
        draw.rectangle((x0 * scale, y0 * scale, x1 * scale - 1, y1 * scale - 1), color)

    def disc(color, x, y, r):
        draw.ellipse(((x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale), color)

    def polygon(color, points):
        draw.polygon([(x * scale, y * scale) for x, y in points], color)

    for kind, color, *at in FLAGS[country]:
        if kind == "h":
            for i, c in enumerate(color):
                box(c, 0, 2 * i / len(color), 3, 2 * (i + 1) / len(color))
        elif kind == "v":
            for i, c in enumerate(color):
                box(c, 3 * i / len(color), 0, 3 * (i + 1) / len(color), 2)
        elif kind == "box":
            box(color, *at)
        elif kind == "disc":
            disc(color, *at)
        elif kind == "star":
            polygon(color, [(at[0] + at[2] * x, at[1] + at[2] * y) for x, y in STAR])
        elif kind == "poly":
            polygon(color, list(zip(at[::2], at[1::2])))
        elif kind == "crescent":
            ground, x, y, r = at
            disc(color, x, y, r)
            disc(ground, x + 0.3 * r, y, 0.8 * r)
        else:  # a Nordic cross
            x, w = at
            box(color, x - w / 2, 0, x + w / 2, 2)
            box(color, 0, 1 - w / 2, 3, 1 + w / 2)
    return image.reduce(4)


def draw_flag(rng, country):
    """A flag that fills the picture, lies on a ground or hangs on a pole: in waves, in perspective. Drawn 2x too large."""
    cloth = np.asarray(flag(country))  # (112, 168, 3)
    h, w, _ = cloth.shape
    height, waves, phase = rng.uniform(0, 7), rng.uniform(0.6, 2), rng.uniform(0, 2 * math.pi)
    slope = 2 * math.pi * waves * np.arange(w) / w + phase
    shift = np.round(height * (np.sin(slope) - np.sin(phase))).astype(int)  # a wave starts at the pole
    rows = np.clip(np.arange(h)[:, None] - shift, 0, h - 1)  # (h, w)
    inside = (np.arange(h)[:, None] - shift >= 0) & (np.arange(h)[:, None] - shift < h)
    light = 1 + 0.02 * height * np.cos(slope) * rng.uniform(0.3, 1)
    cloth = (cloth[rows, np.arange(w)] * light[None, :, None]).clip(0, 255).astype(np.uint8)
    way = rng.choice(["full", "ground", "pole"])
    if way == "full":
        x0, y0, x1, y1 = (rng.uniform(-8, 4) for _ in range(4))
        corners = [(x0, y0), (x0, 128 - y1), (128 - x1, 128 - y1), (128 - x1, y0)]
    else:
        width = rng.uniform(84, 122)
        tall = width * rng.uniform(0.6, 0.72)
        x, y = rng.uniform(3, 125 - width), rng.uniform(3, 125 - tall)
        corners = [(x, y), (x, y + tall), (x + width, y + tall), (x + width, y)]
    corners = [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)) for x, y in corners]
    image = _background(rng).resize((128, 128))
    if way == "pole":
        x, y = corners[0]
        ImageDraw.Draw(image).line([(x - 1, y - 4), (corners[1][0] - 1, 128)], _jitter(rng, rng.choice([(90, 90, 95), (150, 110, 60)]), 20), 4)
    turn = _perspective(corners, [(0, 0), (0, h), (w, h), (w, 0)])
    mask = Image.fromarray(inside.astype(np.uint8) * 255).transform((128, 128), Image.Transform.PERSPECTIVE, turn, Image.Resampling.BILINEAR)
    image.paste(Image.fromarray(cloth).transform((128, 128), Image.Transform.PERSPECTIVE, turn, Image.Resampling.BILINEAR), mask=mask)
    return image.reduce(2)


def _perspective(here, there):
    """The 8 coefficients with which Pillow maps the corners `here` of the result to the corners `there` of the source."""
    rows = [row for (x, y), (u, v) in zip(here, there)
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]  # fmt: skip
    return np.linalg.solve(np.array(rows), np.array(there).flatten()).tolist()


def draw(rng, subject):
    """A picture of a subject, as a camera might see it: a little blurred, dim, pale or grainy."""
    kind, *words = subject
    image = {"shape": draw_shape, "sign": draw_sign, "flag": draw_flag}[kind](rng, *words)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.5:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.1))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.1))
    if rng.random() < 0.3:
        noise = np.frombuffer(rng.randbytes(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3).astype(np.float32) - 127.5
        image = Image.fromarray((np.asarray(image) + noise * rng.uniform(0.02, 0.12)).clip(0, 255).astype(np.uint8))
    return image


# ---- Samples --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=None)
def instructions(path=Path(__file__).parent / "assets" / "instructions.json"):
    """[(subject, question, answer), ...]: what the LLM itself answered, with the caption in the image's place."""
    return [(tuple(subject), question, answer) for subject, question, answer in json.loads(path.read_text())]


def _subject(rng, task, index, split):
    """What the picture of sample `index` shows."""
    if task in KNOWLEDGE_TASKS:  # signs and flags in turn
        return ("sign", rng.choice(WORDS["country"])) if index % 2 == 0 else ("flag", rng.choice(list(FLAGS)))
    kind = {"color": "shape", "shape": "shape", "read": "sign", "flag": "flag"}.get(task) or rng.choice(["shape", "sign", "flag"])
    if kind == "shape":
        held_out = split == "test" and rng.random() < 0.5
        return ("shape", *rng.choice(sorted(HELD_OUT) if held_out else [s[1:] for s in TRAINED_SUBJECTS if s[0] == "shape"]))
    return ("sign", rng.choice(WORDS[rng.choice(list(WORDS))])) if kind == "sign" else ("flag", rng.choice(list(FLAGS)))


def _options(rng, task, subject):
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
    return [caption((kind, w)) for w in options] if task == "describe" else [caption(("flag", w)).removeprefix("the flag of ") for w in options] if kind == "flag" else options


def _said(task, subject):
    """(groups of words of each of which one has to be said, words of which none may be) when the answer is free."""
    kind, *words = subject
    if task in KNOWLEDGE_TASKS:
        right = knowledge(task, words[0])
        everything = dict.fromkeys(w for c in FACTS for w in knowledge(task, c))
        return [right], [w for w in everything if w not in right]
    pools = {"color": [COLORS], "shape": [SHAPES]}.get(task) or {"shape": [COLORS, SHAPES], "flag": [FACTS], "sign": [sum(WORDS.values(), [])]}[kind]
    right = [words[1]] if task == "shape" else words[:len(pools)]
    return [(w,) for w in right], [w for pool in pools for w in pool if w not in right]


def world(task, index, seed=0, split="train"):
    """
    Sample number `index` of a task: one of TRAINED_TASKS or KNOWLEDGE_TASKS, or "instruct". The same arguments always give
    the same sample; different ones never share a random stream, so "test" is unseen whatever was trained on.
    Split "train" never shows a combination of HELD_OUT; in "test" half of the shapes are one, and the questions' phrasings
    are ones that training does not have.
    """
    if task not in (*QUESTIONS, *KNOWLEDGE_TASKS, "instruct"):
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join((*QUESTIONS, *KNOWLEDGE_TASKS, 'instruct'))}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'test'")
    rng = random.Random(f"{split}/{seed}/{task}/{index}")
    if task == "instruct":
        subject, question, answer = rng.choice(instructions())
        messages = [{"role": "user", "content": wrap(question, rng)}, {"role": "assistant", "content": answer}]
        return Sample(draw(rng, subject), messages, task, answer, [], caption(subject))
    return sample_of(rng, task, _subject(rng, task, index, split), split)


def sample_of(rng, task, subject, split="test"):
    """A question of a task about a picture of `subject`, all chances drawn from `rng` (a random.Random)."""
    image, words = draw(rng, subject), _options(rng, task, subject)
    if task in KNOWLEDGE_TASKS:
        question = rng.choice(KNOWLEDGE_QUESTIONS[task][subject[0] == "flag"])
    else:
        question = rng.choice(QUESTIONS[task][split == "test"])
    phrasing = rng.choice(ANSWERS[task]) if split == "train" else ANSWERS[task][0]
    options = [phrasing.format(w) for w in words]
    options = [o[0].upper() + o[1:] for o in options]
    answer = options[0]
    rng.shuffle(options)
    messages = [{"role": "user", "content": wrap(question, rng if split == "train" else None)}, {"role": "assistant", "content": answer}]
    right, rivals = _said(task, subject)
    return Sample(image, messages, task, answer, options, caption(subject), right, rivals)


MIXTURE = [t for task in TRAINED_TASKS for t in ("instruct", task)]  # what stages 1 to 3 show: half are instructions

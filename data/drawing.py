"""
Everything that draws the world: colored shapes, signs with a word, flags. All chances come from a random.Random.

    image = draw(random.Random(0), ("flag", "Japan"))       # a PIL image of 64 x 64 pixels
"""

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data.images import SIZE

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

# A flag is a list of parts, drawn one over the other on a canvas that is 3 wide and 2 high:
#   ("h", colors) and ("v", colors): equal stripes; a color named twice makes a stripe twice as wide
#   ("box", color, x0, y0, x1, y1)   ("poly", color, x, y, x, y, ...)
#   ("disc", color, x, y, r)         ("star", color, x, y, r)
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
    "Qatar": [("h", (_MAROON,)),
              ("poly", _W, 0, 0, .9, 0, *sum([[1.25, (i + .5) * .4, .9, (i + 1) * .4] for i in range(5)], []), 0, 2)],
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

# ---- Drawing --------------------------------------------------------------------------------------------------------

DARK_PANELS = [(20, 60, 140), (10, 90, 50), (140, 20, 30), (80, 30, 110), (25, 25, 30), (95, 50, 20)]
LIGHT_PANELS = [(250, 250, 245), (250, 225, 95), (190, 225, 250), (205, 240, 195), (250, 210, 205)]
FONTS = (None, None, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
# For tests alone: how training never draws. Shapes have a radius of 14 to 28 pixels in training.
OTHER_FONTS = ("STIXGeneralBol.ttf", "cmss10.ttf", "cmtt10.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSerif-Italic.ttf")
OTHER_RADII = (9, 13)


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


def draw_shape(rng, color, shape, radii=(14, 28)):
    """One shape with random size, place, slight rotation and shade. Drawn 4x too large and averaged: smooth edges."""
    radius, angle = rng.uniform(*radii), math.radians(rng.uniform(-14, 14))
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


def draw_sign(rng, word, fonts=FONTS):
    """A colored panel with `word` in Title or UPPER case. Drawn 2x too large, turned by a few degrees and averaged."""
    text, name = word.upper() if rng.random() < 0.5 else word, rng.choice(fonts)
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
    """A flag that fills the picture, lies on a ground or hangs on a pole: waves, perspective. Drawn 2x too large."""
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
        pole = _jitter(rng, rng.choice([(90, 90, 95), (150, 110, 60)]), 20)
        ImageDraw.Draw(image).line([(x - 1, y - 4), (corners[1][0] - 1, 128)], pole, 4)
    turn = _perspective(corners, [(0, 0), (0, h), (w, h), (w, 0)])
    how = ((128, 128), Image.Transform.PERSPECTIVE, turn, Image.Resampling.BILINEAR)
    cloth, mask = (Image.fromarray(a).transform(*how) for a in (cloth, inside.astype(np.uint8) * 255))
    image.paste(cloth, mask=mask)
    return image.reduce(2)


def _perspective(here, there):
    """The 8 coefficients with which Pillow maps corners of the result, `here`, to corners of the source, `there`."""
    rows = [row for (x, y), (u, v) in zip(here, there)
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]  # fmt: skip
    return np.linalg.solve(np.array(rows), np.array(there).flatten()).tolist()


def draw(rng, subject, restyled=False):
    """A picture of a subject, as a camera might see it: a little blurred, dim, pale or grainy.

    restyled: signs in OTHER_FONTS, shapes of OTHER_RADII."""
    kind, *words = subject
    style = {"shape": dict(radii=OTHER_RADII), "sign": dict(fonts=OTHER_FONTS)}.get(kind, {}) if restyled else {}
    image = {"shape": draw_shape, "sign": draw_sign, "flag": draw_flag}[kind](rng, *words, **style)
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7)))
    if rng.random() < 0.5:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.8, 1.1))
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.8, 1.1))
    if rng.random() < 0.3:
        noise = np.frombuffer(rng.randbytes(SIZE * SIZE * 3), np.uint8).reshape(SIZE, SIZE, 3) - np.float32(127.5)
        image = Image.fromarray((np.asarray(image) + noise * rng.uniform(0.02, 0.12)).clip(0, 255).astype(np.uint8))
    return image

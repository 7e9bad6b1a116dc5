"""
Everything that draws the world: colored shapes, signs with a word, flags. All chances come from a random.Random.

    image = draw(random.Random(0), ("flag", "Japan"))       # a PIL image of 64 x 64 pixels
"""
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageEnhance, ImageFilter, ImageFont

from data import TABLE
from data.images import SIZE

# ---- What there is to draw ------------------------------------------------------------------------------------------

COLORS = {name: ImageColor.getrgb(color) for name, color in TABLE["colors"].items()}
DYES = TABLE["dyes"]
# Each a list of parts, drawn one over the other; world.toml explains them. A color becomes "#rrggbb".
FLAGS = {country: [[DYES.get(x, x) for x in part] for part in parts] for country, parts in TABLE["flags"].items()}


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
}

# ---- Drawing --------------------------------------------------------------------------------------------------------

DARK_PANELS = [(20, 60, 140), (10, 90, 50), (140, 20, 30), (80, 30, 110), (25, 25, 30), (95, 50, 20)]
LIGHT_PANELS = [(250, 250, 245), (250, 225, 95), (190, 225, 250), (205, 240, 195), (250, 210, 205)]
FONTS = (None, None, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf")
# For tests alone: how training never draws. Shapes have a radius of 14 to 28 pixels in training.
OTHER_FONTS = ("STIXGeneralBol.ttf", "cmss10.ttf", "cmtt10.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSerif-Italic.ttf")
OTHER_RADII = (9, 13)


def _jitter(rng, color, by):
    return tuple(min(255, max(0, c + rng.randint(-by, by))) for c in color)


def background(rng):
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
    image = background(rng)
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
    image = background(rng)
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

    for part in FLAGS[country]:
        match part:
            case "h", *colors:
                for i, c in enumerate(colors):
                    box(c, 0, 2 * i / len(colors), 3, 2 * (i + 1) / len(colors))
            case "v", *colors:
                for i, c in enumerate(colors):
                    box(c, 3 * i / len(colors), 0, 3 * (i + 1) / len(colors), 2)
            case "box", color, *corners:
                box(color, *corners)
            case "poly", color, *points:
                polygon(color, zip(points[::2], points[1::2]))
            case "disc", color, x, y, r:
                disc(color, x, y, r)
            case "star", color, x, y, r:
                polygon(color, [(x + r * a, y + r * b) for a, b in STAR])
            case "crescent", color, ground, x, y, r:
                disc(color, x, y, r)
                disc(ground, x + 0.3 * r, y, 0.8 * r)
            case "cross", color, x, w:
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
    image = background(rng).resize((128, 128))
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
            for row in ([x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y])]
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

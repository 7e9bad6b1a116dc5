"""Images: from a file to what CLIP expects. A student's picture may be of any kind, and may be broken."""

import os
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

from cli import UserError
from formats.checkpoints import locate
from formats.files import check_file

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # EPS would run Ghostscript

SIZE = 64  # of the drawn world's images

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS, MAX_SIDE = 64_000_000, 10_000  # padded to a square, the longest side alone decides: 400 MB at 10,000


def open_image(source):
    """A path, a PIL image of any mode or a numpy array of uint8, (H, W) or (H, W, 3 or 4) -> PIL image in RGB.
    Transparency is laid over white, 16-bit is scaled to 8, a photo is turned as its EXIF says. MissingFile: no such
    file. UserError: not an image, damaged or too large."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.shape[2:] not in ((), (3,), (4,)) or source.ndim < 2:
            raise UserError(f"image: an array of {source.dtype} {source.shape}: give uint8 (H, W) or (H, W, 3 or 4)")
        source = Image.fromarray(source) if source.size else Image.new("RGB", (0, 0))
    if isinstance(source, Image.Image):
        name, image = "image", source
        if image.format not in (None, "MPO", *FORMATS):
            raise UserError(f"image: {image.format} is not read here (try PNG or JPEG)")
    elif isinstance(source, (str, os.PathLike)):
        name = str(source)
        if re.match("https?://", name):
            raise UserError(f"{name}: this is a URL: download it first, and give the file")
        file = check_file(locate(source))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
                image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise UserError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down first") from None
        except Exception as e:  # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error ...
            why = "it holds a text that is too large" if "MAX_TEXT" in str(e) else "try PNG or JPEG"
            raise UserError(f"{name}: not an image that Pillow can read ({why})") from None
    else:
        raise UserError(f"image: {type(source).__name__} is none: give a path, a PIL image or a numpy array")
    w, h = image.size
    if not 0 < w * h <= MAX_PIXELS or max(w, h) > MAX_SIDE:
        limits = f"1 pixel to {MAX_PIXELS / 1e6:.0f} megapixels and at most {MAX_SIDE:,} pixels a side"
        raise UserError(f"{name}: {w} x {h} pixels, but must have {limits}; scale or crop it first")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise UserError(f"{name}: the image is damaged or truncated ({error})") from None


def _to_rgb(image):
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: Pillow's own convert would clip at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float32))
        scale = 1 / 257 if image.mode[0] == "I" and (";" in image.mode or values.max() > 255) else 1
        if image.mode[0] == "F" and values.max() <= 1:
            scale = 255
        if isinstance(clear := image.info.get("transparency"), int):
            values[values == clear] = 255 / scale
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image, size=SIZE):
    """PIL image or path -> float32 (3, size, size). Padded to a centred square with the mean color, as in LLaVA; then
    what transformers' CLIPImageProcessor does: bicubic resize, scale to 0..1, subtract the mean, divide by the std."""
    image = open_image(image)
    w, h = image.size
    if w != h:
        square = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in CLIP_MEAN))
        square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        image = square
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (H, W, 3) -> (3, H, W)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std

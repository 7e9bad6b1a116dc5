"""
Data: the embedded world (colored shapes, and signs with a word), CLIP's preprocessing, LLaVA-format JSON, the order
in which records are shown, batches.

    sample = world("read", 7, split="test")         # endless, deterministic, needs no download
    records = load_llava("data.json", "images")     # LLaVA-1.5's format; on_bad="skip" goes on past bad records
    kind, number = evenly_spaced(i, len(records.pictured), len(records.texts))      # sample i of an endless walk
    batch = collate([sample], tokenizer, n_visual=19, size=64)

A sample is an image and a chat about it; `world` adds what ranking (options) and contrastive training (caption) need.
"""

import json
import os
import random
import warnings
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import numpy as np
import torch
from PIL import Image, ImageOps

from tokenizer import IMAGE  # the id that stands for an image in a token list; "<image>" in text

# The visual tokens become part of a sentence. The first opening is the paper's, and the default at inference.
OPENINGS = [
    "Based on the visual elements captured in this image of<image>, ",
    "Looking closely at this picture of<image>, ",
    "Given a photo that shows<image>, ",
    "Here is a view of<image>, and going by what it shows, ",
    "With your eyes on this scene of<image>, ",
    "Judging from the details of this drawing of<image>, ",
    "In the picture before you there is<image>, so ",
    "Taking into account everything seen in<image>, ",
]


def wrap(question, rng=None):
    """Put the image into a sentence before `question`: the default opening, or with `rng` a random one of OPENINGS."""
    return (rng.choice(OPENINGS) if rng else OPENINGS[0]) + question[:1].lower() + question[1:]


@dataclass
class Sample:
    """An image (or None) and a chat about it; the first user turn holds "<image>" where the image goes."""

    image: Image.Image | None
    messages: list[dict]  # [{"role": "user" | "assistant", "content": str}, ...]
    task: str = ""
    answer: str = ""  # the last assistant turn
    options: list[str] = ()  # candidate answers for ranking; holds `answer` exactly once
    caption: str = ""  # for contrastive pre-training
    right: list = ()  # said freely: groups of words, of each of which one has to be there
    rivals: list = ()  # ... and words of which none may be


SIZE = 64

# ---- Images: from a file to what CLIP expects -----------------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS, MAX_SIDE = 64_000_000, 10_000  # padded to a square, the longest side alone decides: 400 MB at 10,000


def open_image(source):
    """
    A path or a PIL image of any mode -> PIL image in RGB. Transparency is laid over white, 16-bit is scaled to 8,
    a photo is turned as its EXIF says. FileNotFoundError: no such file. ValueError: not an image, damaged or too large.
    """
    name = "image" if isinstance(source, Image.Image) else str(source)
    if not isinstance(source, Image.Image) and not os.path.exists(source):
        raise FileNotFoundError(f"{name}: no such image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = source if isinstance(source, Image.Image) else Image.open(source)
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: more than {MAX_PIXELS / 1e6:.0f} megapixels; scale the image down first") from None
    except Exception:  # Pillow's decoders raise many kinds: OSError, SyntaxError, ValueError, struct.error, ...
        raise ValueError(f"{name}: not an image that Pillow can read (try PNG or JPEG)") from None
    w, h = image.size
    if not 0 < w * h <= MAX_PIXELS or max(w, h) > MAX_SIDE:
        limits = f"1 pixel to {MAX_PIXELS / 1e6:.0f} megapixels and at most {MAX_SIDE:,} pixels a side"
        raise ValueError(f"{name}: {w} x {h} pixels, but must have {limits}; scale or crop it first")
    try:
        image.load()
        if image is not source:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:
        raise ValueError(f"{name}: the image is damaged or truncated ({error})") from None


def _to_rgb(image):
    if image.mode == "RGB":
        return image
    if image.mode[0] in "IF":  # 16 or 32 bits a pixel: Pillow's own convert would clip at 255
        values = np.nan_to_num(np.asarray(image).astype(np.float32))
        scale = 1 / 257 if image.mode[0] == "I" and (";" in image.mode or values.max() > 255) else 1
        if image.mode[0] == "F" and values.max() <= 1:
            scale = 255
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def preprocess(image, size=SIZE, mean=CLIP_MEAN, std=CLIP_STD):
    """
    PIL image or path -> float32 (3, size, size). Padded to a centred square with the mean color (as LLaVA does), then
    what transformers' CLIPImageProcessor does: bicubic resize, scale to 0..1, subtract mean, divide by std.
    """
    image = open_image(image)
    w, h = image.size
    if w != h:
        square = Image.new("RGB", (max(w, h),) * 2, tuple(int(255 * m) for m in mean))
        square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
        image = square
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # (H, W, 3) -> (3, H, W)
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


# ---- LLaVA-format JSON ----------------------------------------------------------------------------------------------
# [{"id": ..., "image": "coco/train2017/a.jpg", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}]


class LlavaRecords:
    """
    The good records of a LLaVA-format JSON file; records[i] is a Sample, and opens its image only then.
    All records are checked when the file is loaded, so that a long run does not stop at record 500,000.

        pictured, texts     the indices i of the records with an image, and of those without
        skipped             with on_bad="skip": one line for every record left out or replaced so far
    """

    def __init__(self, json_path, image_folder=None, seed=0, on_bad="stop"):
        if on_bad not in ("stop", "skip"):
            raise ValueError(f"unknown on_bad {on_bad!r}: choose 'stop' or 'skip'")
        self.path, self.image_folder = str(json_path), str(image_folder or ".")
        self.seed, self.on_bad, self.errors = seed, on_bad, {}  # errors: place in the file -> what is wrong there
        if not os.path.isfile(json_path):
            raise FileNotFoundError(f"{json_path}: no such file")
        try:
            with open(json_path, encoding="utf-8") as f:
                records = json.load(f)
        except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, endless digits or nesting
            raise ValueError(f"{json_path}: not valid JSON ({error})") from None
        if not isinstance(records, list) or not records:
            raise ValueError(f"{json_path}: expected a non-empty JSON list of records (LLaVA's format)")
        if not os.path.isdir(self.image_folder) and any(isinstance(r, dict) and r.get("image") for r in records):
            raise FileNotFoundError(f"{self.image_folder}: no such image folder")  # else "skip" would skip every image
        self.records, self.places, self.pictured, self.texts = [], [], [], []
        for place, record in enumerate(records):
            try:
                image_path, _ = self._check(place, record)
            except (ValueError, FileNotFoundError) as error:
                self._bad(place, error)
                continue
            (self.pictured if image_path else self.texts).append(len(self.records))
            self.records.append(record)
            self.places.append(place)
        if not self.records:
            raise ValueError(f"{self.path}: all {len(records)} records are bad; the first: {self.skipped[0]}")

    def __len__(self):
        return len(self.records)

    @property
    def skipped(self):
        return list(self.errors.values())

    def _bad(self, place, error):
        if self.on_bad == "stop":
            raise error
        self.errors[place] = str(error)  # once, however often the walk comes by

    def _name(self, place, record):
        return f"{self.path}: record {place} (id {record.get('id') if isinstance(record, dict) else None!r:.80})"

    def _check(self, place, record):
        """A record -> its image path (or None) and its turns, "<image>" taken out of the first one; or an error."""
        name = self._name(place, record)
        turns = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(turns, list) or not turns:
            raise ValueError(f'{name}: needs "conversations", a non-empty list')
        messages, marks = [], []
        for t, turn in enumerate(turns):
            speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
            if speaker not in ("human", "gpt") or not isinstance(text, str):
                raise ValueError(f'{name}: turn {t} needs "from": "human" or "gpt", and a text "value"')
            if speaker != ("human", "gpt")[t % 2]:
                raise ValueError(f"{name}: turn {t} is from {speaker!r}; human and gpt must alternate, human first")
            marks.append(text.count("<image>"))
            text = text.replace("<image>", "").strip()  # LLaVA puts it at the start or the end, with a newline
            if not text:
                raise ValueError(f"{name}: turn {t} has no text")
            messages.append({"role": ("user", "assistant")[t % 2], "content": text})
        if len(messages) % 2:
            raise ValueError(f"{name}: ends with a human turn; there is no answer to learn from")
        if sum(marks) > 1 or sum(marks[1:]):
            raise ValueError(f'{name}: one "<image>" at most, and in the first turn; found {marks} over the turns')
        image = record.get("image")
        if image is None:
            if sum(marks):
                raise ValueError(f'{name}: the text has "<image>" but the record names no "image"')
            return None, messages
        if not isinstance(image, str) or not image:
            raise ValueError(f'{name}: "image" must be one file name, not {image!r:.80}')
        path = os.path.join(self.image_folder, image)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{name}: image file {path} not found")
        return path, messages

    def _sample(self, index):
        place, record = self.places[index], self.records[index]
        path, messages = self._check(place, record)
        image, caption = None, ""
        if path:
            try:
                image = open_image(path)
            except (ValueError, OSError) as error:
                raise type(error)(f"{self._name(place, record)}: {error}") from None
            rng = None if self.seed is None else random.Random(f"llava/{self.seed}/{place}")
            messages[0]["content"] = wrap(messages[0]["content"], rng)
            caption = messages[1]["content"]
        return Sample(image, messages, "llava", messages[-1]["content"], [], caption)

    def __getitem__(self, index):
        index = range(len(self))[index]  # negative indices; IndexError past the end, which ends a for loop
        # An image that cannot be opened is replaced by the next one of the file. That depends on the files alone, not
        # on what was seen before: a resumed run and every rank see the same. Image for image keeps the mixture.
        for i in chain(range(index, len(self)), range(index)):
            if i == index or self.records[i].get("image"):
                try:
                    return self._sample(i)
                except (ValueError, OSError) as error:
                    self._bad(self.places[i], error)
        raise ValueError(f"{self.path}: none of its images can be opened; the last: {self.skipped[-1]}")


def load_llava(json_path, image_folder=None, seed=0, on_bad="stop"):
    """
    LLaVA-format JSON file (LLaVA-1.5-665K as it is distributed, or text alone) -> list-like of Samples, LlavaRecords.
    Image paths are relative to `image_folder`, which a file of text alone does not need. `seed` draws the openings
    (None: the default one). What happens at a bad record (wrong structure, image missing, damaged or too large):

        on_bad="stop"   ValueError / FileNotFoundError names the file, the record's place in it and its id
        on_bad="skip"   left out when the file is loaded; where only opening shows it, the next image of the file takes
                        its place. records.skipped has the text of every error, once. ValueError if nothing is left
    """
    return LlavaRecords(json_path, image_folder, seed, on_bad)


# ---- Order: everything is a function of the place in an endless walk, so that a resumed run sees the same -----------


def evenly_spaced(i, n_images, n_texts):
    """
    Sample i = 0, 1, ... of an endless walk through two sources, mixed by even spacing (the paper's proportional
    strides, for two sources) -> ("image" or "text", its number in the walk through that source).
    n_images + n_texts samples hold every image and every text once; w samples in a row hold w * n_texts /
    (n_images + n_texts) texts, to within 1.
    """
    if min(n_images, n_texts) < 0 or not n_images + n_texts:
        raise ValueError(f"cannot mix {n_images} images and {n_texts} texts: there must be something to show")
    texts, texts_after = (j * n_texts // (n_images + n_texts) for j in (i, i + 1))  # before sample i, and with it
    return ("text", texts) if texts_after > texts else ("image", i - texts)


def shuffled_index(i, n, seed=0):
    """Index of the record shown as number i = 0, 1, ... of an endless walk over n records: a new order every epoch."""
    return _order(n, i // n, seed)[i % n]


@lru_cache(maxsize=4)  # two sources, each at the end of one epoch and the start of the next
def _order(n, epoch, seed):
    order = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


# ---- Batches --------------------------------------------------------------------------------------------------------

LOSS_KINDS = {"answers+special": (1, 2), "answers": (2,)}  # stages 1-2, stage 3; kinds as in Tokenizer.chat_targets


def collate(samples, tokenizer, n_visual, size=SIZE, loss_on="answers+special", max_length=None,
            mean=CLIP_MEAN, std=CLIP_STD):  # fmt: skip
    """
    Samples -> a batch, padded on the right to its longest sequence:
        tokens  (B, T) int64    IMAGE stands n_visual times where the image goes; padding is tokenizer.pad
        targets (B, T) int64    the token to predict AT position t, i.e. token t + 1; -100 where there is no loss
        pixels  (images, 3, size, size) float32, the existing images in order; None if there are none
        lengths (B,) int64      positions that are not padding
    max_length cuts a sequence at its end; ValueError if the image would not fit.
    """
    if loss_on not in LOSS_KINDS:
        raise ValueError(f"unknown loss_on {loss_on!r}: choose one of {', '.join(LOSS_KINDS)}")
    rows, pixels = [], []
    for i, sample in enumerate(samples):
        ids, kinds = tokenizer.chat_targets(sample.messages)
        if ids.count(IMAGE) != (sample.image is not None):
            given = "one image" if sample.image is not None else "no image"
            raise ValueError(f'sample {i}: {ids.count(IMAGE)} times "<image>" in the chat, but {given} given')
        if sample.image is not None:
            at = ids.index(IMAGE)
            ids = ids[:at] + [IMAGE] * n_visual + ids[at + 1 :]
            kinds = kinds[:at] + [0] * n_visual + kinds[at + 1 :]
            if max_length is not None and at + n_visual > max_length:
                raise ValueError(f"sample {i}: max_length {max_length} would cut the image; it needs {at + n_visual}")
            pixels.append(preprocess(sample.image, size, mean, std))
        next_ids = [t if kind in LOSS_KINDS[loss_on] else -100 for t, kind in zip(ids[1:], kinds[1:])] + [-100]
        rows.append((ids[:max_length], next_ids[:max_length]))
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    tokens = torch.full((len(rows), int(lengths.max())), tokenizer.pad)
    targets = torch.full_like(tokens, -100)
    for b, (ids, next_ids) in enumerate(rows):
        tokens[b, : len(ids)] = torch.tensor(ids)
        targets[b, : len(ids)] = torch.tensor(next_ids)
    return {"tokens": tokens, "targets": targets, "pixels": torch.stack(pixels) if pixels else None, "lengths": lengths}

"""
A sample is an image and a chat about it. The order in which samples are shown, and batches of them.

    kind, number = evenly_spaced(i, len(records.pictured), len(records.texts))      # sample i of an endless walk
    batch = collate([sample], tokenizer, n_visual=19, size=64)
"""
import functools
import random
import sys
from dataclasses import dataclass

import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from cli import UserError
from data import TABLE
from data.images import SIZE, preprocess
from formats.tokenizer import IMAGE  # the id that stands for an image in a token list; "<image>" in text

OPENINGS = TABLE["openings"]    # sentences into which an image is put; the first one is the default


def without_image(text):
    """Text that shows no image, whatever it spells: every "<image>" is taken out, those that this makes, too."""
    if "<image>" not in text:
        return text.strip()
    kept = []
    for c in text:
        kept.append(c)
        if c == ">" and "".join(kept[-7:]) == "<image>":
            del kept[-7:]
    return "".join(kept).strip()


def wrap(question, rng=None, opening=None):
    """Put the image into a sentence before `question`: `opening`, or with `rng` a random one of OPENINGS, or the
    default one. What the question itself spells is no image."""
    if not isinstance(question, str):
        raise UserError(f"a question is a text, not {question!r:.40}")
    question = without_image(question)
    return (opening or (rng.choice(OPENINGS) if rng else OPENINGS[0])) + question[:1].lower() + question[1:]


@dataclass
class Sample:
    """An image (or None) and a chat about it; the first user turn holds "<image>" where the image goes."""

    image: Image.Image | None
    messages: list[dict]  # [{"role": "user" | "assistant", "content": str}, ...]
    task: str = ""
    answer: str = ""  # the last assistant turn
    options: list[str] = ()  # candidate answers for ranking, `answer` among them; [] where there are none
    caption: str = ""  # what the image shows, in words: stage 0 learns it
    right: list = ()  # in a free answer, one word of every group must occur ...
    rivals: list = ()  # ... and none of these may


# ---- Order: everything is a function of the place in an endless walk, so that a resumed run sees the same -----------


def evenly_spaced(i, n_images, n_texts):
    """Sample i = 0, 1, ... of an endless walk through two sources, mixed by even spacing (the paper's proportional
    strides, for two sources) -> ("image" or "text", its number in the walk through that source).
    n_images + n_texts samples hold every image and every text once; w samples in a row hold w * n_texts /
    (n_images + n_texts) texts, to within 1."""
    if min(n_images, n_texts) < 0 or not n_images + n_texts:
        raise UserError(f"cannot mix {n_images} images and {n_texts} texts: there must be something to show")
    texts, texts_after = (j * n_texts // (n_images + n_texts) for j in (i, i + 1))  # before sample i, and with it
    return ("text", texts) if texts_after > texts else ("image", i - texts)


def shuffled_index(i, n, seed=0):
    """Index of the record shown as number i = 0, 1, ... of an endless walk over n records: a new order every epoch."""
    return _order(n, i // n, seed)[i % n]


@functools.lru_cache(maxsize=4)  # two sources, each at the end of one epoch and the start of the next
def _order(n, epoch, seed):
    order = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


class Shuffled:
    """An endless walk over some records, in a new order every epoch: walk[k] is sample number k."""

    def __init__(self, records, indices, seed=0):
        self.records, self.indices, self.seed = records, indices, seed

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        return self.records[self.indices[shuffled_index(k, len(self.indices), self.seed)]]


class Mixed:
    """Two endless walks mixed by even spacing, n_images of the one to n_texts of the other."""

    def __init__(self, images, texts, n_images, n_texts):
        self.sources, self.mix = dict(image=images, text=texts), (n_images, n_texts)

    def __getitem__(self, i):
        kind, k = evenly_spaced(i, *self.mix)
        return self.sources[kind][k]


# ---- Batches --------------------------------------------------------------------------------------------------------


def pad(rows, value=0):
    """Lists of token ids -> (B, T) int64, padded on the right to the longest."""
    return pad_sequence([torch.tensor(r, dtype=torch.long) for r in rows], batch_first=True, padding_value=value)


# Stages 1 and 2, stage 3; kinds as in Tokenizer.chat_targets. As in the paper, the chat's own tokens carry loss in
# stages 1 and 2, those of user turns, too: behind an image the model learns to go on with the form of a chat.
LOSS_KINDS = {"answers+special": (1, 2), "answers": (2,)}


def collate(samples, tokenizer, n_visual, size=SIZE, loss_on="answers+special", max_length=None):
    """Samples -> a batch, padded on the right to its longest sequence:
        tokens  (B, T) int64    IMAGE stands n_visual times where the image goes; padding is tokenizer.pad
        targets (B, T) int64    the token to predict AT position t, i.e. token t + 1; -100 where there is no loss
        pixels  (images, 3, size, size) float32, the existing images in order; None if there are none
        lengths (B,) int64      positions that are not padding
    max_length cuts a sequence at its end; UserError if the image would not fit."""
    if loss_on not in LOSS_KINDS:
        raise UserError(f"unknown loss_on {loss_on!r}: choose one of {', '.join(LOSS_KINDS)}")
    rows, targets, pixels = [], [], []
    for i, sample in enumerate(samples):
        ids, kinds = tokenizer.chat_targets(sample.messages)
        if ids.count(IMAGE) != (sample.image is not None):
            given = "one image" if sample.image is not None else "no image"
            raise UserError(f'sample {i}: {ids.count(IMAGE)} times "<image>" in the chat, but {given} given')
        if sample.image is not None:
            at = ids.index(IMAGE)
            ids = ids[:at] + [IMAGE] * n_visual + ids[at + 1 :]
            kinds = kinds[:at] + [0] * n_visual + kinds[at + 1 :]
            if max_length is not None and at + n_visual > max_length:
                raise UserError(f"sample {i}: max_length {max_length} would cut the image; it needs {at + n_visual}")
            pixels.append(preprocess(sample.image, size))
        next_ids = [t if kind in LOSS_KINDS[loss_on] else -100 for t, kind in zip(ids[1:], kinds[1:])] + [-100]
        rows.append(ids[:max_length])
        targets.append(next_ids[:max_length])
    return {"tokens": pad(rows, tokenizer.pad), "targets": pad(targets, -100),
            "pixels": torch.stack(pixels) if pixels else None, "lengths": torch.tensor([len(r) for r in rows])}


# ---- What a step reads ----------------------------------------------------------------------------------------------


def shares(recipe, world):
    """(samples of a step for each of `world` processes, how many of them at a time)."""
    share, left = divmod(recipe.batch, world)
    micro = recipe.micro_batch or share
    if left or not share or share % micro:
        raise UserError(f"a batch of {recipe.batch} cannot be shared out: {micro} samples at a time in {world} "
                        f"process(es) make {micro * world}, which does not divide {recipe.batch} "
                        "(see batch and micro_batch)")
    return share, micro


class Batches:
    """batches[step] -> the micro-batches that this process reads in that step.

    Each process takes its share of the step's samples, sorts it into those with an image and those without, and cuts it
    into micro-batches. So each is of one kind: where there is no image nothing before the decoder's trained layers
    needs a gradient, and autograd skips it without being told. (mixed=True leaves them as they come.)

    samples[i]: number i of an endless walk. recipe: its batch, micro_batch, loss_on and max_length are used."""

    def __init__(self, samples, recipe, tokenizer, n_visual, image_size, rank=0, world=1, mixed=False):
        share, micro = shares(recipe, world)
        self.samples, self.batch, self.share, self.micro = samples, recipe.batch, share, micro
        self.rank, self.mixed = rank, mixed
        self.collate = functools.partial(collate, tokenizer=tokenizer, n_visual=n_visual, size=image_size,
                                         loss_on=recipe.loss_on, max_length=recipe.max_length)

    def __getitem__(self, step):
        first = step * self.batch + self.rank * self.share
        mine = [self.samples[i] for i in range(first, first + self.share)]
        kinds = [[s for s in mine if s.image is not None], [s for s in mine if s.image is None]]
        kinds = [mine] if self.mixed else kinds
        return [self.collate(kind[i : i + self.micro]) for kind in kinds for i in range(0, len(kind), self.micro)]

    def read(self, step):
        """self[step], or its error as a value: so it comes out of a worker process as it is, and not as a traceback."""
        try:
            return self[step]
        except (UserError, OSError) as error:
            return error

    def loader(self, steps, workers=0):
        """Iterate over these steps; `workers` processes prepare them ahead. Says how many samples carry no loss, since
        max_length cuts them before their answer; UserError if that is true of all."""
        seen, empty, why = 0, 0, f"max_length={self.collate.keywords['max_length']} cuts them before their answer"
        options = dict(batch_size=None, num_workers=workers, collate_fn=self.read)
        try:
            for step, read in zip(steps, torch.utils.data.DataLoader(steps, **options)):
                if isinstance(read, Exception):
                    raise read
                learns = torch.cat([(batch["targets"] >= 0).any(1) for batch in read])      # (samples of the step,)
                seen, empty = seen + len(learns), empty + int((~learns).sum())
                if seen == empty and (seen >= 100 or step == steps[-1]):
                    raise UserError(f"none of the first {seen} samples has anything to learn: {why}")
                yield read
        finally:
            if 0 < empty < seen:
                print(f"warning: {empty} of {seen} samples taught nothing: {why}", file=sys.stderr)

"""
What a run reads. A new source of samples goes in here.

A source is anything with source[k] -> data.batches.Sample for k = 0, 1, 2, ... without end; Shuffled makes one of a
finite list. "<image>" marks the image's place in the first turn (data.batches.wrap puts it there).
"""
import dataclasses

from cli import UserError
from data.batches import Mixed, Shuffled, shuffled_index
from data.llava import LlavaRecords
from data.world import World
from formats.checkpoints import locate

CHATS = "assets/chats.json"      # what the default LLM wrote: python -m extras.instructions --chats


def read_data(stage, about, on_bad="stop"):
    """What a run reads: (samples, how many there are or None where images are endless).

    Images of the drawn world or of about["data"]; stage 1 mixes in text instructions, stage 3 the text of `data`.
    Into about["read"] go digests, by which a run that goes on knows whether its files are the same (log.py)."""
    seed, data, text = about["seed"], about["data"], about["text"]
    records = LlavaRecords(data, about["images"], seed, on_bad) if data else None
    written = LlavaRecords(locate(text), None, seed, on_bad) if text else None
    about.pop("read", None)
    if records or written:
        about["read"] = [r.digest for r in (records, written) if r]
    if records and not records.pictured:
        raise UserError(f"{data} has no record with an image")
    if written and not written.texts:
        raise UserError(f"{text} has no record without an image, from which stage translator takes its text")
    if records and not written and stage == "decoder":      # stages 1 and 2 leave out LLaVA's own text, as in the paper
        written = records if records.texts else None
    images = Shuffled(records, records.pictured, seed) if records else World(seed)
    if not written:
        return images, len(images) if records else None
    texts = Shuffled(written, written.texts, seed)
    if not records:                                         # endless images
        return Mixed(images, texts, 3, 2), None
    if text == CHATS:                                       # few texts, read again and again
        return Mixed(images, texts, 3, 2), len(images) * 5 // 3
    return Mixed(images, texts, len(images), len(texts)), len(images) + len(texts)      # each once


def read_pictures(path, seed):
    """For extras/, LLaVA's JSON: (an endless walk over its images, all their captions, what metadata say of it)."""
    records = LlavaRecords(path, None, seed)
    if not records.pictured:
        raise UserError(f"{path} has no record with an image")
    captions = [records.read(i).caption for i in records.pictured]
    about = dict(data=path, images=records.image_folder, read=[records.digest])
    return Shuffled(records, records.pictured, seed), captions, about


class HeldOut:
    """A test's records, e.g. test.json of data/icons.py: HeldOut(path)(task, index, seed, split) gives samples as
    data.world.world does."""

    def __init__(self, path, images=None):
        self.read, self.numbers = LlavaRecords(path, images, seed=None), {}
        for i in self.read.pictured:
            record = self.record(i)
            try:
                if record["conversations"][-1]["value"] not in record["options"]:
                    raise ValueError
                self.numbers.setdefault((record["split"], record["task"]), []).append(i)
                [w.lower() for group in (*record["right"], record["rivals"]) for w in group]
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UserError(f"{path}: record {self.read.places[i]} is not a test's: it needs split, task, options "
                                "with the answer, right, rivals, as python -m data.icons writes them") from None

    def record(self, i):
        return self.read.records[self.read.places[i]]

    def tasks(self, split):
        tasks = [task for which, task in self.numbers if which == split]
        if not tasks:
            raise UserError(f"{self.read.path} has no split {split!r}, only "
                            + ", ".join(sorted({which for which, _ in self.numbers})))
        return tasks

    def __call__(self, task, index, seed=0, split="test"):
        numbers = self.numbers[split, task]
        i = numbers[shuffled_index(index, len(numbers), seed)]
        told = {key: self.record(i)[key] for key in ("task", "options", "right", "rivals")}
        return dataclasses.replace(self.read.read(i), **told)

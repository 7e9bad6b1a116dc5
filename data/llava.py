"""
LLaVA's JSON, as LLaVA-1.5-665K is distributed; every record is checked.

[{"id": ..., "image": "coco/train2017/a.jpg", "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}]

Or .jsonl, a record a line. A first turn may be from "system"; "user" and "assistant" are other names of human and gpt.
"caption", which only this project reads, says what the image shows (default: the first answer).
"""
import contextlib
import hashlib
import os
import random
import re
import sys
from itertools import chain
from pathlib import Path

from cli import MissingFile, UserError, printable
from data.batches import Sample, without_image, wrap
from data.images import open_image
from formats.files import parse_json, read_json, read_text

MAX_BYTES, MAX_RECORDS = 4 * 10**9, 10**7  # LLaVA-1.5-665K has 10**9 bytes and 665 thousand records
MAX_TURNS, MAX_CHARS, MAX_OPENING = 1000, 10**6, 1000  # of one record
NAMES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class LlavaRecords:
    """The good records of a LLaVA-format JSON file; records[i] is a Sample, and opens its image only then.

    All records are checked when the file is loaded, so that a long run does not stop at record 500,000. Image paths are
    relative to `image_folder` (default: the file's own). `seed` draws the openings of records without
    an "opening" of their own (None: the default one). What happens at a bad record (wrong structure, image missing,
    damaged or too large):

        on_bad="stop"   UserError (MissingFile) names the file, the record's place in it and its id
        on_bad="skip"   left out when the file is loaded; where only opening shows it, the next image of the file takes
                        its place. It is named once on stderr. UserError if nothing is left

    pictured, texts     the indices i of the records with an image, and of those without
    digest              of the file's bytes and the sizes of the images that it names: has something changed?
    errors              {place in the file: what is wrong there} of every bad record met so far"""

    def __init__(self, json_path, image_folder=None, seed=0, on_bad="stop"):
        if on_bad not in ("stop", "skip"):
            raise UserError(f"unknown on_bad {on_bad!r}: choose 'stop' or 'skip'")
        self.path, self.image_folder = str(json_path), str(image_folder or Path(json_path).parent)
        self.seed, self.on_bad, self.errors = seed, on_bad, {}
        if self.path.endswith(".jsonl"):
            lines = enumerate(read_text(json_path, MAX_BYTES).split("\n"), 1)
            records = [parse_json(line, f"{json_path}, line {n}") for n, line in lines if line.strip()]
        else:
            records = read_json(json_path, list, MAX_BYTES)
        with open(json_path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        if not 0 < len(records) <= MAX_RECORDS:
            raise UserError(f"{json_path}: expected a list of 1 to {MAX_RECORDS:,} records (LLaVA's format), "
                            f"not {len(records):,}")
        if not os.path.isdir(self.image_folder) and any(isinstance(r, dict) and r.get("image") for r in records):
            raise MissingFile(f"{self.image_folder}: no such image folder")  # else "skip" would skip every image
        self.records, self.places, self.pictured, self.texts = records, [], [], []  # places: of the good ones
        for place, record in enumerate(records):
            try:
                with self.named(place):
                    image_path, *_ = self._check(record)
            except UserError as error:
                self.bad(place, error)
                continue
            if image_path:
                digest.update(f"{place}: {os.path.getsize(image_path)}\n".encode())
            (self.pictured if image_path else self.texts).append(len(self.places))
            self.places.append(place)
        self.digest = digest.hexdigest()
        if not self.places:
            raise UserError(f"{self.path}: all {len(records)} records are bad; the first: {self.errors[0]}")

    def __len__(self):
        return len(self.places)

    def bad(self, place, error):
        """Stop at this record, or note and name it: once, however often the walk comes by."""
        if self.on_bad == "stop":
            raise error
        if place not in self.errors:
            print(printable(f"skipped: {error}"), file=sys.stderr)
        self.errors[place] = str(error)

    @contextlib.contextmanager
    def named(self, place):
        """An error in here names the file, the record's place in it and its id."""
        try:
            yield
        except UserError as error:
            record = self.records[place]
            name = record.get("id") if isinstance(record, dict) else None
            raise type(error)(f"{self.path}: record {place} (id {name!r:.80}): {error}") from None

    def _check(self, record):
        """A record -> (its image path or None, its messages, the number of the first question); or an error."""
        messages, first, marked = read_turns(record)
        image = record.get("image")
        if image is None:
            if marked:
                raise UserError('the text has "<image>" but the record names no "image"')
            return None, messages, first
        if not isinstance(image, str) or not image:
            raise UserError(f'"image" must be one file name, not {image!r:.80}')
        if re.match("https?://", image):
            raise UserError(f"the image {image!r:.200} is a URL: download it first, and name the file")
        if os.path.isabs(image) or ".." in image.replace("\\", "/").split("/"):
            raise UserError(f'"image" {image!r:.80} leads out of the folder of images')
        opening, question = record.get("opening", "<image>"), messages[first]["content"]
        if not isinstance(opening, str) or len(opening) > MAX_OPENING or opening.count("<image>") != 1 \
                or wrap(question, None, opening).count("<image>") != 1:
            raise UserError(f'"opening" must be a text with one "<image>", of at most {MAX_OPENING:,} '
                            f"characters, not {opening!r:.80}")
        if not isinstance(record.get("caption", ""), str):
            raise UserError(f'"caption" must be a text, not {record["caption"]!r:.80}')
        path = os.path.join(self.image_folder, image)
        if not os.path.isfile(path):
            raise MissingFile(f"image file {path} not found")
        return path, messages, first

    def read(self, index):
        """Record `index` as a Sample, or an error that names it; no other takes its place."""
        place = self.places[index]
        with self.named(place):
            path, messages, first = self._check(self.records[place])
            answer = messages[-1]["content"]
            if not path:
                return Sample(None, messages, "llava", answer)
            if not os.path.realpath(path).startswith(os.path.realpath(self.image_folder) + os.sep):  # a link
                raise UserError(f"{path} is a link out of the folder of images")
            rng = None if self.seed is None else random.Random(f"llava/{self.seed}/{place}")
            messages[first]["content"] = wrap(messages[first]["content"], rng, self.records[place].get("opening"))
            caption = self.records[place].get("caption") or messages[first + 1]["content"]
            return Sample(open_image(path), messages, "llava", answer, [], caption=caption)

    def __getitem__(self, index):
        index = range(len(self))[index]  # negative indices; IndexError past the end, which ends a for loop
        # An image that cannot be opened is replaced by the next one of the file. That depends on the files alone, not
        # on what was seen before: a resumed run and every rank see the same. Image for image keeps the mixture.
        for i in chain(range(index, len(self)), range(index)):
            if i == index or self.records[self.places[i]].get("image"):
                try:
                    return self.read(i)
                except UserError as error:
                    self.bad(self.places[i], error)
        raise UserError(f"{self.path}: none of its images can be opened; the last: {[*self.errors.values()][-1]}")


def read_turns(record):
    """A record -> (its messages without "<image>", the number of the first question, whether "<image>" was there)."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise UserError('needs "conversations", a non-empty list')
    if len(turns) > MAX_TURNS:
        raise UserError(f"{len(turns):,} turns, more than {MAX_TURNS:,}; split it into several records")
    messages, marks, first = [], [], 0
    for t, turn in enumerate(turns):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        role = NAMES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(text, str):
            raise UserError(f'turn {t} needs "from": "human" or "gpt", and a text "value"')
        if t == 0 and role == "system":
            first = 1
        elif role != ("user", "assistant")[(t - first) % 2]:
            raise UserError(f"turn {t} is from {speaker!r}; human and gpt must alternate, human first (or second, "
                            "after system)")
        if len(text) > MAX_CHARS:
            raise UserError(f"turn {t} has {len(text):,} characters, more than {MAX_CHARS:,}; shorten it")
        marks.append(text.count("<image>"))
        text = without_image(text)  # LLaVA puts it at the start or the end, with a newline
        if not text:
            raise UserError(f"turn {t} has no text")
        messages.append({"role": role, "content": text})
    if messages[-1]["role"] != "assistant":
        raise UserError("ends with a human turn; there is no answer to learn from")
    if sum(marks) > 1 or marks[first] != sum(marks):
        raise UserError(f'one "<image>" at most, and in the first turn; found {marks} over the turns')
    return messages, first, sum(marks) == 1

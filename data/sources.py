"""
What a run reads. A new source of samples goes in here.

A source is anything with source[k] -> data.batches.Sample for k = 0, 1, 2, ... without end; Shuffled makes one of a
finite list. "<image>" marks the image's place in the first turn (data.batches.wrap puts it there).
"""

from cli import UserError
from data.batches import Mixed, Shuffled
from data.llava import load_llava
from data.world import World
from formats.checkpoints import locate

CHATS = "assets/chats.json"      # what the default LLM wrote: python -m extras.instructions --chats


def read_data(stage, about, on_bad="stop"):
    """What a run reads: (samples, how many there are or None where images are endless).

    Images of the drawn world or of about["data"]; stage 1 mixes in text instructions, stage 3 the text of `data`.
    """
    seed, text = about["seed"], about["text"]
    about.pop("read", None)         # by this a run that goes on knows whether its files are the same (formats/log.py)
    records = load_llava(about["data"], about["images"], seed, on_bad) if about["data"] else None
    if records is not None:
        about["read"] = [records.digest]
    if records is not None and not records.pictured:
        raise UserError(f"{about['data']} has no record with an image")
    images = World(seed) if records is None else Shuffled(records, records.pictured, seed)
    if text:
        written = load_llava(locate(text), None, seed, on_bad)
        about["read"] = about.get("read", []) + [written.digest]
        if not written.texts:
            raise UserError(f"{text} has no record without an image, from which stage translator takes its text")
        texts = Shuffled(written, written.texts, seed)
    elif stage == "decoder" and records is not None and records.texts:
        texts = Shuffled(records, records.texts, seed)      # stages 1 and 2 leave out LLaVA's own text, as in the paper
    else:
        return images, None if records is None else len(images)
    if records is None:                                     # endless images
        return Mixed(images, texts, 3, 2), None
    if text == CHATS:                                       # few texts, read again and again
        return Mixed(images, texts, 3, 2), len(images) * 5 // 3
    return Mixed(images, texts, len(images), len(texts)), len(images) + len(texts)      # each once

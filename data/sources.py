"""From a run's description to the walk through its samples: images of the drawn world or of a LLaVA JSON, and text."""

from data.batches import Mixed, Shuffled
from data.llava import load_llava
from data.world import World
from formats.checkpoints import locate
from formats.errors import UserError

CHATS = "assets/chats.json"      # what the default LLM wrote: python -m extras.instructions --chats


def read_data(stage, about, on_bad="stop"):
    """What a run reads: (samples, how many there are or None where images are endless).

    Images of the drawn world or of about["data"]; stage 1 mixes in text instructions, stage 3 the text of `data`.
    """
    seed, text = about["seed"], about["text"]
    records = load_llava(about["data"], about["images"], seed, on_bad) if about["data"] else None
    if records is not None and not records.pictured:
        raise UserError(f"{about['data']} has no record with an image")
    images, texts = World(seed) if records is None else Shuffled(records, records.pictured, seed), None
    if text:
        written = load_llava(locate(text), None, seed, on_bad)
        if not written.texts:
            raise UserError(f"{text} has no record without an image, from which stage translator takes its text")
        texts = Shuffled(written, written.texts, seed)
    elif stage == "decoder" and records is not None and records.texts:
        texts = Shuffled(records, records.texts, seed)      # stages 1 and 2 leave out LLaVA's own text, as in the paper
    # all of both in one epoch; 3 to 2 (the paper's ratio, about) where there are endless images, or few texts
    mix = (3, 2) if records is None or text == CHATS else (len(images), len(texts or ()))
    n = None if records is None else len(images) * sum(mix) // mix[0] if texts else len(images)
    return Mixed(images, texts, *mix) if texts else images, n

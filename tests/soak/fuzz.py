"""
Damaged files, thousands of them: nothing may end in a traceback, take 10 seconds or 4 GB.

    pytest tests/soak/fuzz.py                               # two minutes
    MINUTES=60 pytest tests/soak/fuzz.py
    SEED=7 pytest tests/soak/fuzz.py -k gguf                # one kind of file; case 7 and on

Each case takes a good file, damages it (bits flipped, pieces cut out, doubled, or replaced by numbers that are too
large; in JSON also values of other types) and reads it as the command lines do. A case is a function of its number and
the kind of file. A file may turn out to be good all the same, or be refused by a UserError.
"""
import contextlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import save_gguf
from PIL import Image

from cli import UserError
from data.images import preprocess
from data.llava import LlavaRecords
from formats import gguf
from formats.checkpoints import read_checkpoint
from formats.files import read_text
from formats.tokenizer import BYTE_OF, Tokenizer
from model import VLM, Llama, ViT
from surrogate import load_surrogate

MINUTES, SEED = float(os.environ.get("MINUTES", 2)), int(os.environ.get("SEED", 0))
SECONDS, GIGABYTES = 10, 4
ODD = [None, True, -1, 0, 1, 2, 7, 1.5, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "x", "9", "\ud800", "../x", "/",
       [], [0], {}, {"a": 1}, [[1, 2]], "x" * 10**5]
PICTURES = ("png", "jpg", "gif", "webp", "bmp", "tiff")

# ---- Damage ---------------------------------------------------------------------------------------------------------


def damage(data, rng, span=None):
    """Bytes with one to four injuries in the first `span`: a piece gone, doubled, noise, a size, a flipped bit."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(min(len(data), span or len(data)) + 1)
        j = i + rng.choice([1, 1, 2, 4, 8, 64, 1000])
        size = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1]))
        flipped = bytes(x ^ 1 << rng.randrange(8) for x in data[i:i + 1]) + data[i + 1:j]
        new = rng.choice([b"", data[i:j] * 2, rng.randbytes(j - i), flipped, size])
        data[i:i + 8 if new is size else j] = new
        if rng.random() < 0.05:
            del data[i:]
    return bytes(data)


def damage_header(data, rng):
    """A safetensors file that is damaged in its header, or anywhere."""
    return damage(data, rng, rng.choice([8 + struct.unpack("<Q", data[:8])[0], None]))


def damage_value(value, rng):
    """A JSON value in which one place holds something odd."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    key, new = rng.choice(list(value) if isinstance(value, dict) else range(len(value))), value.copy()
    if rng.random() < 0.05:
        del new[key]
    else:
        new[key] = damage_value(value[key], rng)
    return new


def damage_json(data, rng):
    """A JSON text: odd values, or injured as bytes are."""
    if rng.random() < 0.5:
        return damage(data, rng)
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        value = damage_value(value, rng)
    return json.dumps(value).encode()


# ---- What is read, and how ------------------------------------------------------------------------------------------


def read_llm(folder):
    llm = Llama.from_pretrained(folder / "llm")
    llm(torch.tensor([Tokenizer.from_pretrained(folder / "llm").encode("The flag of Japan, 2 + 2.")]))


def read_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "llm")
    tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Good <image> morning,\n 12345 times"}]))


def read_encoder(folder):
    llm = Llama.from_pretrained(folder / "llm")
    VLM.from_pretrained(llm, folder / "encoder.safetensors", tokenizer=Tokenizer.from_pretrained(folder / "llm"))
    load_surrogate(llm, folder / "encoder.safetensors")


def read_gguf(folder):
    gguf.read.cache_clear()
    Llama.from_pretrained(folder / "llm.gguf")
    Tokenizer.from_pretrained(folder / "llm.gguf")


def read_records(name):
    return lambda folder: [record.messages for record in LlavaRecords(folder / name, folder, on_bad="skip")]


KINDS = {       # {kind: (file, how it is damaged, how its folder is read)}
    "config": ("llm/config.json", damage_json, read_llm),
    "tokenizer": ("llm/tokenizer.json", damage_json, read_tokenizer),
    "weights": ("llm/model.safetensors", damage_header, read_llm),
    "vit": ("vit.safetensors", damage_header, lambda folder: ViT.from_pretrained(folder / "vit.safetensors")),
    "encoder": ("encoder.safetensors", damage_header, read_encoder),
    "gguf": ("llm.gguf", lambda data, rng: damage(data, rng, 8000), read_gguf),
    "records": ("data.json", damage_json, read_records("data.json")),
    "lines": ("data.jsonl", damage, read_records("data.jsonl")),
    "pth": ("encoder.pth", damage, lambda folder: read_checkpoint(folder / "encoder.pth")),
    "text": ("text.txt", damage, lambda folder: read_text(folder / "text.txt")),
    **{kind: (f"a.{kind}", damage, lambda folder, kind=kind: preprocess(folder / f"a.{kind}")) for kind in PICTURES},
}


@pytest.fixture(scope="module")
def folder(tiny_llm, stages, tmp_path_factory):
    """One good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_llm, folder / "llm")
    for stage in ("vit", "encoder"):
        shutil.copy(stages[stage], folder)
    torch.save(dict(epoch=1, global_step=1, model=read_checkpoint(stages["encoder"])[0]), folder / "encoder.pth")
    tokens = [*sorted(BYTE_OF, key=BYTE_OF.get), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    save_gguf(folder / "llm.gguf", Llama.from_pretrained(tiny_llm), tokenizer=dict(
        model="gpt2", pre="smollm", tokens=tokens, types=[1] * 257 + [3] * 3, merges=["a b"]))
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    for kind in PICTURES:
        image.save(folder / f"a.{kind}")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": i, "image": "a.png", "conversations": turns} for i in range(2)]
    records.append({"id": "t", "conversations": [{"from": "human", "value": "Hi"}, turns[1]]})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "text.txt").write_text("A café.\n\nTwo paragraphs.\n", encoding="utf-8")
    return folder


# ---- The loop -------------------------------------------------------------------------------------------------------


@pytest.fixture
def limited():
    """This process may take GIGABYTES more of address space (Linux)."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class TooLong(BaseException):
    """No Exception, so that nothing catches it on its way."""


def too_long(*_):
    raise TooLong


def replace(file, data):
    file.unlink()           # not written over: it may still be mapped into memory
    file.write_bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(folder, limited, kind):
    file, how, read = KINDS[kind]
    good, end = (folder / file).read_bytes(), time.time() + 60 * MINUTES / len(KINDS)
    read(folder)                                        # undamaged, it has to be good
    torch.set_num_threads(1)
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, too_long)
    try:
        for case in itertools.takewhile(lambda _: time.time() < end, itertools.count(SEED)):
            replace(folder / file, how(good, random.Random(f"{kind}/{case}")))
            signal.setitimer(signal.ITIMER_PROF, SECONDS)   # of this process: other work on the machine does not count
            signal.alarm(20 * SECONDS)                      # and for what waits for ever
            try:
                with contextlib.redirect_stderr(io.StringIO()):         # what is skipped says so
                    read(folder)
            except (UserError, OSError) as e:
                assert str(e).strip()
            except BaseException:       # also what is no Exception, such as a panic of a Rust library
                print(f"SEED={case} pytest tests/soak/fuzz.py -k {kind}")
                raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replace(folder / file, good)

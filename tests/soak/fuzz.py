"""
Damaged files, thousands of them: nothing may end in a traceback, take 10 seconds or 4 GB.

    python -m tests.soak.fuzz                          # a minute
    python -m tests.soak.fuzz --minutes 60
    python -m tests.soak.fuzz --only gguf --seed 7     # one kind of file; case 7 and on

Each case takes a good file, damages it (bits flipped, pieces cut out, doubled, or replaced by numbers that are too
large; in JSON also values of other types) and reads it as the command lines do. A case is a function of its number and
the kind of file. A file may turn out to be good all the same, or be refused by a UserError.
"""
import collections
import contextlib
import io
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from cli import MAX_SEED, Parser, UserError, number, run_cli
from data.images import preprocess
from data.llava import LlavaRecords
from evaluate import markdown
from formats import gguf
from formats.checkpoints import read_checkpoint, save_checkpoint
from formats.files import read_text
from formats.tokenizer import BYTE_OF, Tokenizer
from model import VLM, Llama, ViT, ViTConfig
from surrogate import load_surrogate
from tests.conftest import save_gguf, save_tiny_llm

SECONDS, GIGABYTES = 10, 4
ODD = [None, True, -1, 0, 1, 2, 7, 1.5, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "x", "9", "\ud800", "../x", "/",
       [], [0], {}, {"a": 1}, [[1, 2]], "x" * 10**5]
PICTURES = ("png", "jpg", "gif", "webp", "bmp", "tiff")

# ---- Damage ---------------------------------------------------------------------------------------------------------


def damage(data, rng, span=None):
    """Bytes with one to four injuries, in the first `span` bytes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        n = min(len(data), span or len(data))
        i = rng.randrange(n + 1)
        j = min(n, i + rng.choice([1, 1, 2, 4, 8, 64, 1000]))
        kind = rng.randrange(6)
        if kind == 0 and i < n:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i:j]
        elif kind == 2:
            data[i:i] = data[i:j]
        elif kind == 3:
            data[i:j] = rng.randbytes(j - i)
        elif kind == 4:     # a length or a size
            data[i:i + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1]))
        elif rng.random() < 0.3:
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


def make_good(folder):
    """One good file of every kind."""
    (folder / "llm").mkdir()
    path, start = save_tiny_llm(folder / "llm"), str(folder / "vit.safetensors")
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    sizes = ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    weights = VLM(ViT(sizes), llm, tokenizer).state_dict()
    part = lambda *names: {n: t for n, t in weights.items() if n.startswith(names)}
    save_checkpoint(start, part("encoder."), dict(stage="vit", vit_config=vars(sizes), start=None, seed=0))
    save_checkpoint(folder / "encoder.safetensors", part("encoder.", "adapter.", "embd_", "decoder.model.layers.2."),
                    dict(stage="encoder", llm=path, vit=start, start=start, ranges=[[2, 4]]))
    torch.save(dict(epoch=1, global_step=1, model=part("encoder.", "adapter.", "embd_")), folder / "encoder.pth")
    tokens = [*sorted(BYTE_OF, key=BYTE_OF.get), "ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    save_gguf(folder / "llm.gguf", llm, tokenizer=dict(
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


# ---- The loop -------------------------------------------------------------------------------------------------------


class TooLong(BaseException):
    """No Exception, so that nothing catches it on its way."""


def too_long(*_):
    raise TooLong(f"still busy after {SECONDS} seconds")


def replace(file, data):
    file.unlink()           # not written over: it may still be mapped into memory
    file.write_bytes(data)


def run_case(folder, kind, case, good):
    """Read a damaged file: "good", "refused", or what is wrong with how it ended."""
    file, how, read = KINDS[kind]
    replace(folder / file, how(good, random.Random(f"{kind}/{case}")))
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)   # of this process: other work on the machine does not count
    signal.alarm(20 * SECONDS)                      # and for what waits for ever
    try:
        with contextlib.redirect_stderr(io.StringIO()):         # what is skipped says so
            read(folder)
        end = "good"
    except (UserError, OSError) as e:
        end = "refused" if str(e).strip() else "a UserError without a word"
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # also what is no Exception, such as a panic of a Rust library
        end = f"{type(e).__name__}: {str(e)[:200]}\n" + "".join(traceback.format_tb(e.__traceback__)[-3:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replace(folder / file, good)
    took = time.process_time() - began
    return end if took < SECONDS else f"took {took:.1f} s\n{end}"


def limit_memory():
    """From now on this process may take GIGABYTES more of address space (Linux)."""
    now = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=number(float, 0.01, 10**4), default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="the first case (default: 0)")
    parser.add_argument("--only", choices=list(KINDS), help="this kind of file alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, too_long)
    counts, kinds, case = collections.Counter(), [args.only] if args.only else list(KINDS), args.seed
    with tempfile.TemporaryDirectory() as name, tqdm(desc="fuzz", unit="case") as bar:
        folder = Path(name)
        make_good(folder)
        good = {kind: (folder / KINDS[kind][0]).read_bytes() for kind in kinds}
        for kind in kinds:
            KINDS[kind][2](folder)      # undamaged, all have to be good
        limit_memory()
        end = time.time() + 60 * args.minutes
        while time.time() < end:
            for kind in kinds:
                result = run_case(folder, kind, case, good[kind])
                if result not in ("good", "refused"):
                    bar.write(f"--only {kind} --seed {case}: {result}\n")     # at once, should the run be cut short
                    sys.stdout.flush()
                    result = "wrong"
                counts[kind, result] += 1
                bar.update()
            case += 1
    rows = [[kind, *(counts[kind, end] for end in ("refused", "good", "wrong"))] for kind in kinds]
    print(markdown(["file", "refused", "good all the same", "wrong"], rows))
    peak, wrong = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, sum(row[-1] for row in rows)
    print(f"\n{sum(counts.values())} cases, peak memory {peak:.1f} GB, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

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
from formats import gguf
from formats.checkpoints import read_checkpoint, save_checkpoint
from formats.files import read_text
from formats.tokenizer import Tokenizer
from model import VLM, Llama, ViT, ViTConfig, base_vit
from surrogate import load_surrogate
from tests.soak.kill import save_tiny_llm

SECONDS, GIGABYTES = 10, 4
ODD = [None, True, -1, 0, 1, 2, 7, 1.5, 1e308, float("nan"), 2**31, 2**63, 10**30, "", "x", "9", "\ud800", "../x", "/",
       [], [0], {}, {"a": 1}, [[1, 2]], "x" * 10**5]  # fmt: skip

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
            data[i : i + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1]))
        elif rng.random() < 0.3:
            del data[i:]
    return bytes(data)


def damage_json(value, rng):
    """A JSON value in which one place holds something odd."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        new = value.copy()
        if rng.random() < 0.05:
            del new[key]
        else:
            new[key] = damage_json(value[key], rng)
        return new
    return rng.choice(ODD)


def damage_text(text, rng):
    """A JSON text: one odd value, or injured as bytes are."""
    if rng.random() < 0.5:
        return damage(text.encode(), rng)
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        value = damage_json(value, rng)
    return json.dumps(value).encode()


# ---- What is read, and how: good(folder) makes the good file, read(folder) reads it ---------------------------------


def read_llm(folder):
    llm = Llama.from_pretrained(folder / "llm")
    ids = Tokenizer.from_pretrained(folder / "llm").encode("The flag of Japan, 2 + 2.")
    llm(torch.tensor([ids]))


def read_tokenizer(folder):
    tokenizer = Tokenizer.from_pretrained(folder / "llm")
    tokenizer.decode(tokenizer.chat([{"role": "user", "content": "Good <image> morning,\n 12345 times"}]))


def read_records(folder, name="data.json"):
    records = LlavaRecords(folder / name, folder, on_bad="skip")
    for i in range(len(records)):
        records[i].messages


def read_vit(folder):
    base_vit(folder / "vit.safetensors", folder / "vit.safetensors")


def read_encoder(folder):
    llm = Llama.from_pretrained(folder / "llm")
    VLM.from_pretrained(llm, folder / "encoder.safetensors", tokenizer=Tokenizer.from_pretrained(folder / "llm"))
    load_surrogate(llm, folder / "encoder.safetensors")


def read_gguf(folder):
    gguf.read.cache_clear()
    Llama.from_pretrained(folder / "llm.gguf")
    Tokenizer.from_pretrained(folder / "llm.gguf")


def damage_header(data, rng):
    """A safetensors file that is damaged in its header, or anywhere."""
    return damage(data, rng, rng.choice([8 + struct.unpack("<Q", data[:8])[0], None]))


# {kind: (file, how it is damaged, how it is read)}
KINDS = {
    "config": ("llm/config.json", lambda data, rng: damage_text(data.decode(), rng), read_llm),
    "tokenizer": ("llm/tokenizer.json", lambda data, rng: damage_text(data.decode(), rng), read_tokenizer),
    "weights": ("llm/model.safetensors", damage_header, read_llm),
    "vit": ("vit.safetensors", damage_header, read_vit),
    "encoder": ("encoder.safetensors", damage_header, read_encoder),
    "gguf": ("llm.gguf", lambda data, rng: damage(data, rng, 8000), read_gguf),
    "records": ("data.json", lambda data, rng: damage_text(data.decode(), rng), read_records),
    "lines": ("data.jsonl", damage, lambda folder: read_records(folder, "data.jsonl")),
    "pth": ("encoder.pth", damage, lambda folder: read_checkpoint(folder / "encoder.pth")),
    "text": ("text.txt", damage, lambda folder: read_text(folder / "text.txt")),
    **{kind: (f"a.{kind}", damage, lambda folder, kind=kind: preprocess(folder / f"a.{kind}"))
       for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff")},
}  # fmt: skip


def make_good(folder):
    """One good file of every kind."""
    llm = Llama.from_pretrained(save_tiny_llm(folder / "llm"))
    tokenizer = Tokenizer.from_pretrained(folder / "llm")
    sizes = ViTConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vlm = VLM(ViT(sizes), llm, tokenizer)
    weights = vlm.state_dict()
    start = str(folder / "vit.safetensors")
    save_checkpoint(start, {n: t for n, t in weights.items() if n.startswith(("encoder.", "adapter."))},
                    dict(stage="vit", llm=str(folder / "llm"), vit_config=vars(sizes), start=None, seed=0))  # fmt: skip
    translator = {n: t for n, t in weights.items() if n.startswith("decoder.model.layers.2.")}
    rest = {n: t for n, t in weights.items() if not n.startswith("decoder.")}
    about = dict(stage="encoder", llm=str(folder / "llm"), vit=start, start=start, ranges=[[2, 4]])
    save_checkpoint(folder / "encoder.safetensors", rest | translator, about)
    save_gguf(folder / "llm.gguf", llm)
    image = Image.effect_noise((90, 70), 60).convert("RGB")
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tiff"):
        image.save(folder / f"a.{kind}")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"id": i, "image": "a.png", "conversations": turns} for i in range(2)]
    records.append({"id": "t", "conversations": [{"from": "human", "value": "Hi"}, turns[1]]})
    (folder / "data.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    torch.save(dict(epoch=1, global_step=1, model=rest), folder / "encoder.pth")
    (folder / "text.txt").write_text("A café.\n\nTwo paragraphs.\n", encoding="utf-8")


def save_gguf(path, llm):
    """A tiny Llama with SmolLM2's kind of tokenizer as a .gguf file."""
    import gguf

    from formats.tokenizer import BYTE_OF
    writer, c = gguf.GGUFWriter(path, "llama"), llm.config
    for key, value in dict(context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                           feed_forward_length=c.intermediate_size,
                           block_count=c.num_hidden_layers).items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    tokens = [char for char, _ in sorted(BYTE_OF.items(), key=lambda item: item[1])]
    tokens += ["ab", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * 4)
    writer.add_token_merges(["a b"])
    names = {"model.layers": "blk", "self_attn.": "attn_", "attn_o_proj": "attn_output", "mlp.": "ffn_", "_proj": "",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm"}  # fmt: skip
    for name, w in llm.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- The loop -------------------------------------------------------------------------------------------------------


def run_case(folder, kind, case, good):
    """Read a damaged file: "good", "refused", or what is wrong with how it ended."""
    file, how, read = KINDS[kind]
    (folder / file).unlink()        # not written over: it may still be mapped into memory
    (folder / file).write_bytes(how(good, random.Random(f"{kind}/{case}")))
    began, words = time.process_time(), io.StringIO()
    stderr, sys.stderr = sys.stderr, words  # what is skipped says so
    signal.setitimer(signal.ITIMER_PROF, SECONDS)   # of this process: other work on the machine does not count
    signal.alarm(20 * SECONDS)                      # and for what waits for ever
    try:
        read(folder)
        end = "good"
    except (UserError, OSError) as e:
        end = "refused" if str(e).strip() else "a UserError without a word"
    except BaseException as e:  # also what is no Exception, such as a panic of a Rust library
        if isinstance(e, KeyboardInterrupt):
            raise
        end = f"{type(e).__name__}: {str(e)[:200]}\n" + "".join(traceback.format_tb(e.__traceback__)[-3:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        sys.stderr = stderr
        (folder / file).unlink()
        (folder / file).write_bytes(good)
    took = time.process_time() - began
    return end if took < SECONDS else f"took {took:.1f} s\n{end}"


class TooLong(BaseException):
    """No Exception, so that nothing catches it on its way."""


def too_long(*_):
    raise TooLong(f"still busy after {SECONDS} seconds")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=number(float, 0.01, 10**4), default=1, help="default: %(default)s")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="the first case (default: 0)")
    parser.add_argument("--only", choices=list(KINDS), help="this kind of file alone")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, too_long)
    counts, wrong, end = collections.Counter(), [], time.time() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_good(folder)
        kinds = [args.only] if args.only else list(KINDS)
        good = {kind: (folder / KINDS[kind][0]).read_bytes() for kind in kinds}
        for kind in kinds:
            KINDS[kind][2](folder)      # undamaged, all have to be good
        bar, case = tqdm(desc="fuzz", unit="case"), args.seed
        base = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory_now() + GIGABYTES * 2**30, base[1]))
        while time.time() < end:
            for kind in kinds:
                result = run_case(folder, kind, case, good[kind])
                counts[kind, result if result in ("good", "refused") else "WRONG"] += 1
                if result not in ("good", "refused"):
                    wrong.append((kind, case))
                    bar.write(f"--only {kind} --seed {case}: {result}\n")     # at once, should the run be cut short
                    sys.stdout.flush()
                bar.update()
            case += 1
        bar.close()
        resource.setrlimit(resource.RLIMIT_AS, base)
    print("| file | refused | good all the same | wrong |\n|---|---|---|---|")
    for kind in kinds:
        print(f"| {kind} | " + " | ".join(str(counts[kind, r]) for r in ("refused", "good", "WRONG")) + " |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{sum(counts.values())} cases, peak memory {peak:.1f} GB, {len(wrong)} wrong")
    return 1 if wrong else 0


def memory_now():
    """Address space of this process, in bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
llama.cpp's .gguf: one file that holds a model's configuration, its weights, often quantized, and its tokenizer.

    reader = read(path)             # gguf.GGUFReader: .fields and .tensors
    config(path), tensors(path)     # fields of model.LlamaConfig; {GGUF's name: a function that reads that tensor}
"""
import functools

import gguf
import numpy
import torch

from cli import UserError
from formats.files import check_file, reading, values

# What else llama.cpp reads, and the values that change nothing: any other is not implemented here.
NEUTRAL = {"rope.scaling.type": ("none", "linear"), "rope.scaling.factor": (0, 1), "rope.scale_linear": (0, 1),
           "rope.scaling.attn_factor": (0, 1), "attention.causal": (True,), "logit_scale": (0, 1),
           "residual_scale": (0, 1), "embedding_scale": (0, 1), "attention.scale": (0,), "expert_count": (0,),
           "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "attention.sliding_window": (0,)}


def find(path):
    """The .gguf file that `path` is, whatever its name, or that lies in this folder as its only model; else None."""
    if path.is_dir() and not any((path / name).exists() for name in ("config.json", "params.json")):
        files = sorted(path.glob("*.gguf"))
        path = files[0] if len(files) == 1 else path
    if path.is_file() and path.suffix != ".gguf":
        with open(check_file(path), "rb") as file:
            return path if file.read(4) == b"GGUF" else None
    return path if path.is_file() else None


class Reader(gguf.GGUFReader):
    """The package trusts the lengths in a header: one that is damaged would keep it busy for ever. And it makes an
    object of every number in an array: four megabytes of them would take 3 GB."""
    reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        self.data = self.data.view(numpy.ndarray)               # a memmap is slow to slice
        got, self.reads = super()._get(offset, dtype, count, override_order), self.reads + 1
        if len(got) < count or self.reads > 2_000_000:          # Llama 3's tokenizer takes a million
            raise ValueError("a length in its header leads past its end")
        return got

    def _get_field_parts(self, offset, kind):
        if kind == gguf.GGUFValueType.ARRAY:
            of, n = self._get(offset, "uint32"), self._get(offset + 4, "uint64")
            if dtype := self.gguf_scalar_to_np.get(of[0]):
                part = self._get(offset + 12, dtype, n[0])
                return 12 + part.nbytes, [of, n, part], [2], [gguf.GGUFValueType(i) for i in (kind, of[0])]
            if of[0] == gguf.GGUFValueType.ARRAY:
                raise ValueError("it holds arrays of arrays")
        return super()._get_field_parts(offset, kind)


@functools.lru_cache(maxsize=1)     # a second or two for the header, which config, weights and tokenizer share
def read(path):
    """The file's header, read and checked: a GGUFReader. Its weights stay on the disk."""
    with reading(check_file(path), "is truncated or not a GGUF file"):
        reader = Reader(path)
        kind = reader.fields["general.architecture"].contents()
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    if parts != 1:
        raise UserError(f"{path} is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    if kind != "llama":
        raise UserError(f"{path} holds a {kind} model: only the llama architecture is implemented here")
    return reader


def config(path):
    """Fields of model.LlamaConfig as a dict."""
    reader = read(path)
    fields = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()
              if name.startswith("llama.")}
    take = values(fields, path, NEUTRAL)
    there = {t.name: t for t in reader.tensors}
    width, heads = take("embedding_length"), take("attention.head_count")
    scaling, head_dim = there.get("rope_freqs.weight"), take("attention.key_length", max(1, width // heads))
    values(fields, path, dict.fromkeys(("rope.dimension_count", "attention.value_length"), (head_dim,)))
    # llama.cpp stores Llama 3.1's scaling as one divisor per frequency
    divisors = None if scaling is None else scaling.data.tolist()
    if divisors is not None and not (len(divisors) == head_dim // 2 and all(0 < d < 1e15 for d in divisors)):
        raise UserError(f"{path}: rope_freqs.weight must be {head_dim // 2} positive numbers: download it again")
    return dict(vocab_size=int(there["token_embd.weight"].shape[1]), hidden_size=width,
                intermediate_size=take("feed_forward_length"), num_hidden_layers=take("block_count", high=1000),
                num_attention_heads=heads, num_key_value_heads=take("attention.head_count_kv", heads),
                head_dim=head_dim, rms_norm_eps=take("attention.layer_norm_rms_epsilon", kind=float),
                rope_theta=take("rope.freq_base", 10000.0, float),
                rope_scaling=None if divisors is None else {"divisors": divisors},
                tie_word_embeddings="output.weight" not in there, max_position_embeddings=take("context_length"))


def tensors(path):
    """{GGUF's name: a function that reads this tensor, as floating-point numbers}"""
    def read_one(tensor):
        try:
            w = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(f"{path}: {tensor.name} has type {tensor.tensor_type.name}, which the gguf package cannot "
                            "read") from None
        return torch.from_numpy(w if w.flags.writeable else w.copy())       # float32 is the file itself, mapped

    return {t.name: functools.partial(read_one, t) for t in read(path).tensors}

"""Weights in 8 bits, `Llama.from_pretrained(quantize="int8")`. A decoding step reads every weight once, and waits for
them: a quarter of float32's bytes, and on a CPU a third of its time.

Each row of a matrix becomes int8 numbers and one scale, by rounding alone (as in gpt-fast): no data is needed.
Activations stay as they are. The weights cannot learn any more: this is for answers.
"""
import torch
import torch.nn as nn

import kernels
from cli import UserError


def round_rows(weight):
    """(N, K) -> int8 (N, K), off by half a scale at most, and scales (N,): bfloat16, kept as integers of 16 bits, which
    a module's `.to(dtype)` leaves alone."""
    weight = weight.float()
    scale = (torch.maximum(weight.amax(1), -weight.amin(1)) / 127).clamp(min=1e-12).bfloat16()
    return (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale.view(torch.int16)


class Int8Linear(nn.Module):
    """x (…, K) -> x W^T (…, N), in place of an nn.Linear; a bias (N,) stays as it is."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.bias = bias
        weight, scale = round_rows(weight.detach())
        self.register_buffer("weight", weight)          # (N, K)
        self.register_buffer("scale_bits", scale)       # (N,)

    @property
    def scale(self):
        return self.scale_bits.view(torch.bfloat16)     # (N,)

    def forward(self, x):
        y = kernels.int8_linear(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


def replace(module, kind, new):
    """Put new(child) in the place of every child of this kind, at any depth. Returns the module."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, kind):
                setattr(parent, name, new(child))
    return module


def quantize(llm):
    """Turn all linear layers of a Llama to int8, and its LM head. Returns it."""
    if not hasattr(llm, "lm_head"):     # tied to the embeddings: these stay, a step reads one row a token of them
        llm.lm_head = Int8Linear(llm.model.embed_tokens.weight)
    return replace(llm, nn.Linear, lambda linear: Int8Linear(linear.weight, linear.bias))


def restore(layer, dtype):
    """Turn int8 weights back to floating point (as rounded): a translator learns from there. Returns the layer."""
    def new(child):
        linear = nn.Linear(*reversed(child.weight.shape), bias=False, device="meta")
        weight = (child.weight.float() * child.scale.float()[:, None]).to(dtype)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), child.bias
        return linear
    return replace(layer, Int8Linear, new)


def rounded(tensors, tied):
    """Readers of official weights (formats/official.py) -> those of a quantized model. tied: embeddings = LM head."""
    scales, tensors = {}, dict(tensors)
    if tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    def read(name):
        weight, scales[name] = round_rows(tensors[name]())
        if not scales[name].view(torch.bfloat16).isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite: download it again")
        return weight

    out = dict(tensors)
    for name in (n for n in tensors if n.endswith(("_proj.weight", "lm_head.weight"))):
        out[name] = lambda name=name: read(name)
        out[name.removesuffix("weight") + "scale_bits"] = lambda name=name: scales[name]     # read behind its weight
    return out

"""
Stage 3 with low-rank updates of the decoder (LoRA, https://arxiv.org/abs/2106.09685) in place of all its weights.

    python -m extras.parallel decoder --lora 8          # also in one process; with torchrun and --fsdp: for 70B

The checkpoint holds the merged weights, so that whoever reads it need not know.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear

# As in the paper's code (src/build_decoder.py), of rank 8 there. Its dropout of 0.05 is left out: a run is to be the
# same in any number of processes, and when it was stopped and goes on.
ALPHA, MATRICES = 32, ("q_proj", "v_proj")


class LoRALinear(Linear):
    """W x + scale B A x: a frozen W, and a trained update of low rank."""

    def forward(self, x):
        return super().forward(x) + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale


def add_lora(llm, rank):
    """Give q and v of a Llama's layers an update of this rank, in place. It starts at 0: B is 0, A is random."""
    for module in [getattr(layer.self_attn, name) for layer in llm.model.layers for name in MATRICES]:
        A = torch.randn(rank, module.in_features) / math.sqrt(module.in_features)
        module.lora_A = nn.Parameter(A.to(llm.device))                                              # (rank, in)
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, rank, device=llm.device))     # (out, rank)
        module.scale = ALPHA / rank
        module.__class__ = LoRALinear       # the same object: whoever shares or shards this module keeps it


@torch.no_grad()
def merge(trained, decoder, rank):
    """Yield the (name, tensor) pairs that are saved: what was trained before the decoder, and all of the decoder, the
    updates added to its matrices."""
    yield from ((n, t) for n, t in trained.items() if ".lora_" not in n)
    for name, W in decoder.named_parameters():
        stem = "decoder." + name.removesuffix("weight")
        if ".lora_" in name:
            continue
        W = (W.full_tensor() if hasattr(W, "full_tensor") else W).float()              # whole, where it is sharded
        if stem + "lora_A" in trained:
            W = W + trained[stem + "lora_B"] @ trained[stem + "lora_A"] * (ALPHA / rank)
        yield "decoder." + name, W

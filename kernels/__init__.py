"""The operations in which a Llama or a ViT spends its time, behind one signature each.

    attention.py      attention             softmax(q k^T / sqrt(D)) v: causal or full, grouped heads, RoPE inside
                      apply_rope            rotary position embedding alone
    rms_norm.py       rms_norm              RMSNorm, fused with the residual addition before it
    swiglu.py         swiglu, quick_gelu    silu(gate) * up of Llama's MLP, x sigmoid(1.702 x) of CLIP's
    cross_entropy.py  linear_cross_entropy  LM head and cross-entropy together, without the (N, vocabulary) logits
    int8_matmul.py    int8_linear           a product by weights in 8 bits (int8.py rounds them), to decode faster
    graph.py          record                a decoding step's hundreds of launches, replayed as one
    benchmark.py      python -m kernels.benchmark

Each but the last two has two backends that compute the same function: Triton kernels for CUDA tensors (on NVIDIA's
GPUs from Ampere on), plain PyTorch everywhere else (a laptop without Triton never imports it). To force one, set
KERNELS=torch or KERNELS=triton in the environment, or

    with kernels.backend("torch"):
        ...

A third, KERNELS=cudnn, is Triton, but for long sequences NVIDIA's own attention, which on an H200 is the faster one.

The PyTorch versions below are also the place to read *what* is computed; the files beside this one say *how* it is
made fast. Layout is (B, T, H, D) everywhere, batch, time, head, channel: what a projection's `.view` gives, so that
nothing is transposed or copied on the way in or out.
"""

import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from formats.errors import UserError

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c as one instruction: Triton 3.9 wants to be told
# These imports must stay above the functions: importing kernels/attention.py also binds the name `attention` in this
# package to the file, and the `def attention` further down then takes the name back.
try:
    import triton

    from . import attention as _attention
    from . import cross_entropy as _cross_entropy
    from . import int8_matmul as _int8
    from . import rms_norm as _rms_norm
    from . import swiglu as _swiglu
except ImportError:
    triton = None

BACKENDS = ("auto", "triton", "torch", "cudnn")
_choice = os.environ.get("KERNELS") or "auto"


def check_choice():
    """UserError if KERNELS names no backend, or one that is not here: a model that is built asks, before it loads."""
    if _choice not in BACKENDS:
        raise UserError(f"KERNELS={_choice:.40}: expected 'triton', 'torch', 'cudnn' or nothing (Triton for CUDA, else "
                        "PyTorch)")
    if _choice == "triton" and triton is None:
        raise UserError("the backend is 'triton', but Triton is not installed: pip install triton, or choose 'torch'")
    if _choice == "triton" and not torch.cuda.is_available() and not _attention.INTERPRET.value:
        raise UserError("the backend is 'triton', but without a GPU Triton only runs in its interpreter: start Python "
                        "with TRITON_INTERPRET=1, or choose 'torch'")


@contextmanager
def backend(name):
    """Within the block, run every function here on `name`: "triton", "torch", "auto" (Triton for CUDA tensors), or
    "cudnn" (the same, but cuDNN's attention for long sequences)."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected 'auto', 'triton', 'torch' or 'cudnn'")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def _use_triton(x):
    if _choice not in ("auto", "cudnn"):
        check_choice()
    if _choice == "triton" and not x.is_cuda and not _attention.INTERPRET.value:
        raise ValueError("the backend is 'triton', but a tensor is on the CPU, where Triton only runs in its "
                         "interpreter: start Python with TRITON_INTERPRET=1, or choose 'torch'")
    if _choice in ("auto", "cudnn"):  # float64 is for checking gradients: only PyTorch computes it
        return triton is not None and x.is_cuda and x.dtype != torch.float64 and _fits(x.device)
    return _choice == "triton"


@torch.compiler.assume_constant_result
def _fits(device):
    """Has this GPU the 99 KB of shared memory that a tile may take? A T4 (64 KB) has not, nor have AMD's."""
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0) >= 99 * 1024


# ---------------------------------------------------------------------------------------------------------------------
# attention


def attention(q, k, v, causal=True, lengths=None, rope=None):
    """Scaled dot-product attention, softmax(q k^T / sqrt(D)) v.

    q: (B, Tq, Hq, D); k, v: (B, Tk, Hkv, D), any strides. Hq is a multiple of Hkv: query head h reads key/value head
    h // (Hq // Hkv). D is a multiple of 8, at most 128. One of bfloat16, float16, float32, the same for all three.
    causal: query i sits at key position Tk - Tq + i and sees the keys up to its own (so the last query sees them all).
    lengths: (B,) integers; row b has only lengths[b] valid keys, and a causal query i sits at lengths[b] - Tq + i:
        decoding with sequences of different length in one padded cache.
    rope: (cos, sin), each (T, D/2) float32: rotate q and k at positions 0 .. T-1 first (needs Tq == Tk, no lengths).
    Returns (B, Tq, Hq, D), contiguous. A query that sees no key at all gives zeros.
    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit together.
    """
    _check_attention(q, k, v, lengths, rope)
    if _use_triton(q):
        if _choice == "cudnn" and lengths is None and _cudnn_is_faster(q, k):
            if rope is not None:
                q, k = _attention.rope(q, *rope), _attention.rope(k, *rope)
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                                   is_causal=causal, enable_gqa=q.shape[2] != k.shape[2])
            return o.transpose(1, 2).contiguous()  # (B, Hq, Tq, D) -> (B, Tq, Hq, D)
        return _attention.flash_attention(q, k, v, causal, lengths, rope)

    (_, Tq, Hq, _), (Tk, Hkv) = q.shape, k.shape[1:3]
    if rope is not None:
        q, k = _rotate(q, *rope), _rotate(k, *rope)
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    mask = empty = None
    if lengths is not None:
        k, v = _drop_invalid_keys(k, v, lengths)
        Tk = k.shape[1]
    if lengths is not None or (causal and Tq != Tk and Tq > 1):
        length = lengths.clamp(0, Tk)[:, None] if lengths is not None else torch.full((1, 1), Tk, device=q.device)
        key = torch.arange(Tk, device=q.device)
        mask = key < length[..., None]  # (B or 1, 1, Tk)
        if causal:
            position = length - Tq + torch.arange(Tq, device=q.device)  # (B or 1, Tq) where each query sits
            mask = mask & (key <= position[..., None])  # (B or 1, Tq, Tk)
        empty = ~mask.any(-1, keepdim=True)  # (B or 1, Tq or 1, 1)
        mask = (mask | empty)[:, None]  # softmax over no key at all would be NaN: let it run over all, drop it below

    if not q.is_cuda and q.dtype == torch.bfloat16 and torch.is_grad_enabled() and mask is None:
        return _attention_by_matmul(q, k, v, causal)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,  # (B, H, T, D)
        is_causal=causal and mask is None and Tq > 1, enable_gqa=Hq != Hkv,
    ).transpose(1, 2)  # (B, Tq, Hq, D)
    if empty is not None:
        o = o.masked_fill(empty[..., None], 0)
    return o.contiguous()


def _cudnn_is_faster(q, k):
    """Where it was measured to be (docs/gpu.md): on Hopper, from some 500 positions on."""
    return (q.dtype != torch.float32 and q.shape[1] == k.shape[1] >= 512 and q.shape[3] in (64, 128)
            and torch.cuda.get_device_capability(q.device)[0] == 9)


def _attention_by_matmul(q, k, v, causal):
    """The formula, written out. On a CPU with bf16 matrix units its backward is several times faster than SDPA's."""
    (B, Tq, Hq, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    q = q.reshape(B, Tq, Hkv, -1, D).permute(0, 2, 3, 1, 4).reshape(B * Hkv, -1, D)  # (B*Hkv, G*Tq, D), G = Hq / Hkv
    k, v = (x.transpose(1, 2).reshape(B * Hkv, Tk, D) for x in (k, v))
    scores = (q * D ** -0.5 @ k.transpose(1, 2)).view(B * Hkv, -1, Tq, Tk)
    if causal:
        scores = scores.masked_fill(torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).triu(Tk - Tq + 1), -math.inf)
    o = scores.softmax(-1).view(B * Hkv, -1, Tk) @ v  # (B*Hkv, G*Tq, D)
    return o.view(B, Hkv, -1, Tq, D).permute(0, 3, 1, 2, 4).reshape(B, Tq, Hq, D)


def _drop_invalid_keys(k, v, lengths):
    """What lies in a cache beyond lengths[b] may be anything, even NaN, and 0 * NaN is NaN: it must not be touched."""
    if not torch.compiler.is_compiling() and not k.is_cuda:  # on a GPU, asking for the longest would wait for it
        longest = max(int(lengths.max()), 1)
        k, v = k[:, :longest], v[:, :longest]
        if int(lengths.min()) >= k.shape[1]:
            return k, v
    invalid = (torch.arange(k.shape[1], device=k.device) >= lengths[:, None])[..., None, None]  # (B, Tk, 1, 1)
    return k.masked_fill(invalid, 0), v.masked_fill(invalid, 0)


def apply_rope(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the layout of the Hugging Face Llama weights.

    x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2) float32. Channel i turns with channel i + D/2 (not with its
    neighbour, as in Meta's files). Computed in float32, returned as x.dtype.
    """
    _check_rope("x", x, cos, sin)
    if _use_triton(x):
        return _attention.rope(x, cos, sin)
    return _rotate(x, cos, sin)


def _rotate(x, cos, sin):
    cos, sin = cos[..., None, :], sin[..., None, :]  # (T, 1, D/2) or (B, T, 1, D/2)
    x1, x2 = x.float().chunk(2, dim=-1)  # (B, T, H, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm and the activations


def rms_norm(x, weight, eps, residual=None):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), fused with the residual addition that comes before it.

    x: (..., d); weight: (d,); residual: like x, or None.
    Returns y, or (y, s) with s = x + residual and y = norm(s) when a residual is given.
    Rounding as in the official Llama: normalise in float32, cast to x.dtype, then multiply by the weight.
    """
    _check_dtype("x", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the last dimension of x")
    _check_like("weight", weight, "x", x, shape=False)
    if residual is not None:
        _check_like("residual", residual, "x", x)
    if _use_triton(x):
        return _rms_norm.rms_norm(x, weight, eps, residual)

    s = x if residual is None else x + residual
    if s.dtype == torch.float32:  # nothing is rounded in between: PyTorch's own is the same, in fewer steps
        y = F.rms_norm(s, weight.shape, weight, eps)
    else:
        y = (s.float() * torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + eps)).to(s.dtype) * weight
    return y if residual is None else (y, s)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the activation of Llama's MLP. Same shape, any strides."""
    _check_dtype("gate", gate)
    _check_like("up", up, "gate", gate)
    if _use_triton(gate):
        return _swiglu.swiglu(gate, up)
    return F.silu(gate) * up


def quick_gelu(x):
    """x sigmoid(1.702 x), the activation of CLIP's MLP: a cheap approximation of GELU (Hendrycks & Gimpel 2016)."""
    _check_dtype("x", x)
    if _use_triton(x):
        return _swiglu.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x)


# ---------------------------------------------------------------------------------------------------------------------
# Weights in 8 bits

FEW = 16  # rows up to which the int8 kernels are used: one and eight were measured to be faster


def int8_linear(x, weight, scale):
    """x (..., K) times a matrix of int8 weights (N, K) with a scale for each row, (N,) bfloat16: (..., N). No gradient.

    Few rows, a decoding step: reading the weights takes the time. Many, a prompt: arithmetic does.
    """
    rows = x.shape[:-1].numel()
    if 0 < rows <= FEW and _use_triton(x):
        return _int8.int8_matmul(x.reshape(rows, -1), weight, scale).view(*x.shape[:-1], -1)
    if 0 < rows <= FEW and x.device.type == "cpu":
        y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), weight, scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# LM head + cross-entropy

CHUNK = 2**25  # logits held at a time: 128 MB in float32


def linear_cross_entropy(hidden, weight, targets):
    """Sum over the rows of -log softmax(hidden @ weight.T)[target]: LM head and loss in one, in little memory.

    hidden: (N, d); weight: (V, d); targets: (N,) int64. A row whose target is negative carries no loss.
    Returns a float32 scalar, the *sum*: divide by the number of targets of the global batch.

    The N x V logits are the largest tensor of a training step (4,096 x 128,256 in float32 are 2 GB, their gradient as
    much again). Here a chunk of rows at a time gets its logits, its loss and, since d loss / d logits = softmax -
    onehot needs nothing from later in the network, its gradients at once; only those of hidden and weight are kept.
    """
    _check_dtype("hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (N, d): select the target positions first")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[1]})")
    _check_like("weight", weight, "hidden", hidden, shape=False)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}, expected torch.int64 ({len(hidden)},)")
    if targets.device != hidden.device:
        raise ValueError(f"targets is on {targets.device}, hidden on {hidden.device}: move one to the other")
    step = _cross_entropy.loss_and_gradient if _use_triton(hidden) else _loss_and_gradient
    grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, targets, step,
                                     grad and hidden.requires_grad, grad and weight.requires_grad)


def _loss_and_gradient(logits, targets, need_grad):
    """logits (n, V), targets (n,) -> the n losses, float32, and d loss / d logits in the dtype of logits (or None)."""
    valid = targets >= 0
    index = targets.clamp(min=0)[:, None]  # (n, 1)
    x = logits.float()  # (n, V)
    lse = torch.logsumexp(x, dim=-1, keepdim=True)  # (n, 1)
    losses = torch.where(valid, (lse - x.gather(1, index))[:, 0], 0)
    if not need_grad:
        return losses, None
    p = torch.exp_(x.sub(lse) if x is logits else x.sub_(lse))  # softmax
    p.scatter_add_(1, index, torch.full_like(lse, -1))
    return losses, p.mul_(valid[:, None]).to(logits.dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, step, need_hidden, need_weight):
        (N, _), V = hidden.shape, weight.shape[0]
        rows = max(1, CHUNK // V)
        if hidden.is_cuda:  # to be busy a GPU wants longer chunks, in whole tiles of 128 rows
            rows = max(128, 4 * rows // 128 * 128)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # the weight's gradient is summed over all chunks: in float32, whatever the weight is
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for i in range(0, N, rows):
            h, t = hidden[i : i + rows], targets[i : i + rows]  # (n, d), (n,)
            losses, d_logits = step(h @ weight.t(), t, need_hidden or need_weight)  # (n,), (n, V)
            loss = loss + losses.sum()  # not +=: from that, torch.compile of PyTorch 2.11 makes a gradient of zeros
            if need_hidden:
                d_hidden[i : i + rows] = d_logits @ weight  # (n, d)
            if need_weight:
                d_weight += d_logits.t() @ h  # (V, d)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype) if need_weight else None)
        return loss

    @staticmethod
    @once_differentiable  # the saved gradients are numbers: a second derivative would leave them out
    def backward(ctx, grad):
        d_hidden, d_weight = ctx.saved_tensors  # the chain rule's last factor, a scalar, is all that is missing
        return (None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
                None if d_weight is None else d_weight * grad.to(d_weight.dtype), None, None, None, None)


# ---------------------------------------------------------------------------------------------------------------------
# what is wrong with an argument, said in one line


def _check_like(name, x, other_name, other, shape=True):
    if shape and x.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, {other_name} {tuple(other.shape)}: they must be the same")
    if x.dtype != other.dtype:
        raise ValueError(f"{name} is {x.dtype}, {other_name} is {other.dtype}: they must be the same")
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: move one to the other")


def _check_dtype(name, x):
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) and (x.dtype != torch.float64 or _use_triton(x)):
        raise ValueError(f"{name} is {x.dtype}, expected bfloat16, float16 or float32")


def _check_rope(name, x, cos, sin):
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, T, H, D) with an even D")
    _check_dtype(name, x)
    (B, T, _, D) = x.shape
    for part, c in (("cos", cos), ("sin", sin)):
        if tuple(c.shape) not in ((T, D // 2), (B, T, D // 2)) or c.shape != cos.shape:
            raise ValueError(f"{part} has shape {tuple(c.shape)}, expected (T, D/2) = {(T, D // 2)} "
                             f"for {name} of shape {tuple(x.shape)}")
        if c.dtype != torch.float32 and x.dtype != torch.float64:
            raise ValueError(f"{part} is {c.dtype}, expected torch.float32")
        if c.device != x.device:
            raise ValueError(f"{part} is on {c.device}, {name} on {x.device}: move one to the other")


def _check_attention(q, k, v, lengths, rope):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, T, H, D)")
    (B, Tq, Hq, D), (Bk, Tk, Hkv, Dk) = q.shape, k.shape
    _check_dtype("q", q)
    if D % 8 or not 8 <= D <= 128:
        raise ValueError(f"q has head dim {D}, supported are the multiples of 8 up to 128")
    if Bk != B or Dk != D:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected batch {B} and head dim {D} as in q {tuple(q.shape)}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"k has {Hkv} heads, which does not divide the {Hq} heads of q")
    _check_like("k", k, "q", q, shape=False)
    _check_like("v", v, "k", k)
    if lengths is not None:
        if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}, expected {B} integers")
        if lengths.device != q.device:
            raise ValueError(f"lengths is on {lengths.device}, q on {q.device}: move one to the other")
    if rope is not None:
        if lengths is not None or Tq != Tk:
            raise ValueError(f"rope needs q and k at the positions 0 .. T-1, got Tq = {Tq}, Tk = {Tk}"
                             f"{' and lengths' if lengths is not None else ''}: rotate with apply_rope instead")
        _check_rope("q", q, *rope)
        if rope[0].ndim != 2:
            raise ValueError(f"rope has tables of shape {tuple(rope[0].shape)}, expected (T, D/2)")

"""The operations in which a Llama or a ViT spends its time, behind one signature each.

    reference.py         what each computes, in plain PyTorch: read it first; it is what runs on a CPU
    attention.py         attention             softmax(q k^T / sqrt(D)) v: causal or full, grouped heads
    decode_attention.py                        the same for few queries and many keys: a step with a cache
    rope.py              apply_rope            rotary position embedding
    rms_norm.py          rms_norm              RMSNorm, fused with the residual addition before it
    swiglu.py            swiglu, quick_gelu    silu(gate) * up of Llama's MLP, x sigmoid(1.702 x) of CLIP's
    cross_entropy.py     linear_cross_entropy  LM head and cross-entropy together, without the (N, vocabulary) logits
    int8_matmul.py       int8_linear           a product by weights in 8 bits (int8.py rounds them), to decode faster
    graph.py             record                a decoding step's hundreds of launches, replayed as one

What runs where says TABLE below. (A laptop without Triton never imports it.) To force one, set KERNELS=torch or
KERNELS=triton in the environment, or

    with kernels.backend("torch"):
        ...

`python -m studies.benchmark kernels` times them on a GPU beside their peers.
"""

import functools
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cli import UserError

from . import reference

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c as one instruction: Triton 3.9 wants to be told
# These imports must stay above the functions: importing kernels/attention.py also binds the name `attention` in this
# package to the file, and the `def attention` further down then takes the name back.
try:
    import triton

    from . import attention as _attention
    from . import cross_entropy as _cross_entropy
    from . import decode_attention as _decode_attention
    from . import int8_matmul as _int8
    from . import rms_norm as _rms_norm
    from . import rope as _rope
    from . import swiglu as _swiglu
except ImportError:
    triton = None

# ---------------------------------------------------------------------------------------------------------------------
# Which kernel runs where

HALF = (torch.bfloat16, torch.float16)
FLOAT = (*HALF, torch.float32)  # float64 is for checking gradients: only PyTorch computes it
TABLE = [
    # By (operation, chip, dtype, shape) the first row that fits; where none does, PyTorch: reference.py. Chips are
    # NVIDIA's, by compute capability: 8.0 is A100, 8.6 to 8.9 are RTX 30, RTX 40 and L4, 9.0 is H100 and H200. Those
    # before Ampere only emulate bfloat16, and have less shared memory than a tile takes; AMD's have not been tried.
    ("attention", (9, 0), (9, 0), HALF, "long", "cudnn"),  # asked for by KERNELS=cudnn: no step was timed with it yet
    ("attention", (9, 0), (9, 0), HALF, "square", "triton"),  # 1.03 to 1.47 times as fast as PyTorch's flash there
    #  attention elsewhere: PyTorch's flash, until ours has been timed there; float32: no tensor cores, no gain
    ("attention", (8, 0), (99, 0), HALF, "few", "split"),  # few queries, many keys: or most of the chip is idle
    ("elementwise", (8, 0), (99, 0), FLOAT, "any", "triton"),  # norm, RoPE, SwiGLU, loss: one pass over memory for five
    ("int8", (8, 0), (99, 0), FLOAT, "few", "triton"),  # up to 16 rows; more are a matrix product, cuBLAS's
]
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
    """Within the block, run every function here on `name`: "triton", "torch", "auto" (by TABLE), or "cudnn" (the same,
    but on Hopper cuDNN's attention for long sequences)."""
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r}: expected 'auto', 'triton', 'torch' or 'cudnn'")
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def _kernel(operation, x, shape="any"):
    """"triton", "split", "cudnn" or "torch", for this operation on a tensor like x."""
    if _choice not in ("auto", "cudnn"):
        check_choice()
        if _choice == "triton" and not x.is_cuda and not _attention.INTERPRET.value:
            raise ValueError("the backend is 'triton', but a tensor is on the CPU, where Triton only runs in its "
                             "interpreter: start Python with TRITON_INTERPRET=1, or choose 'torch'")
        wanted = dict(few="split" if operation == "attention" else "triton", trained="torch", many="torch")
        return wanted.get(shape, "triton") if _choice == "triton" else "torch"
    if triton is None or not x.is_cuda:
        return "torch"
    chip = _capability(x.device)
    fits = lambda name, first, last, dtypes, what: (
        name == operation and first <= chip <= last and x.dtype in dtypes and what == shape)
    return next((kernel for *row, kernel in TABLE if fits(*row)), "torch")


@torch.compiler.assume_constant_result
def _capability(device):
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


@functools.cache
def default_dtype(device):
    """bfloat16 where the chip multiplies it faster: NVIDIA's GPUs from Ampere on (a V100 or T4 emulates it), AMD's;
    CPUs with AMX, and AMD's with AVX512-BF16 (Intel's without AMX has half of float32's speed). Else float32."""
    if torch.device(device).type == "cuda":
        fast = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        amd = cpu.get("avx512_bf16", False) and "Intel" not in cpu.get("cpu_name", "")
        fast = cpu.get("amx_bf16", False) or amd
    return torch.bfloat16 if fast else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The operations


def attention(q, k, v, causal=True, lengths=None):
    """Scaled dot-product attention, softmax(q k^T / sqrt(D)) v.

    q: (B, Tq, Hq, D); k, v: (B, Tk, Hkv, D), any strides. Hq is a multiple of Hkv: query head h reads key/value head
    h // (Hq // Hkv). D is a multiple of 8, at most 128. One of bfloat16, float16, float32, the same for all three.
    causal: query i sits at key position Tk - Tq + i and sees the keys up to its own (so the last query sees them all).
    lengths: (B,) integers; row b has only lengths[b] valid keys, and a causal query i sits at lengths[b] - Tq + i:
        decoding with sequences of different length in one padded cache.
    Returns (B, Tq, Hq, D), contiguous. A query that sees no key at all gives zeros.
    Raises ValueError, naming the argument, for shapes, dtypes or devices that do not fit together.
    """
    _check_attention(q, k, v, lengths)
    (_, Tq, Hq, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    if lengths is not None or Tq != Tk:
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        shape = "trained" if learns else "few"
    else:
        shape = "long" if _choice == "cudnn" and Tq >= 512 and D in (64, 128) else "square"
    kernel = _kernel("attention", q, shape)
    if kernel == "split":
        return _decode_attention.decode_attention(q, k, v, causal, lengths)
    if kernel == "triton":
        return _attention.flash_attention(q, k, v, causal)
    if kernel == "torch":
        return reference.attention(q, k, v, causal, lengths)
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
                                           enable_gqa=Hq != Hkv)
    return o.transpose(1, 2).contiguous()  # (B, Hq, Tq, D) -> (B, Tq, Hq, D)


def apply_rope(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the layout of the Hugging Face Llama weights.

    x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2) float32. Channel i turns with channel i + D/2 (not with its
    neighbour, as in Meta's files). Computed in float32, returned as x.dtype.
    """
    _check_dtype("x", x)
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, T, H, D) with an even D")
    B, T, _, D = x.shape
    for name, c in (("cos", cos), ("sin", sin)):
        if tuple(c.shape) not in ((T, D // 2), (B, T, D // 2)) or c.shape != cos.shape:
            raise ValueError(f"{name} has shape {tuple(c.shape)}, expected (T, D/2) = {(T, D // 2)} for x "
                             f"{tuple(x.shape)}")
        if c.dtype != torch.float32 and x.dtype != torch.float64:
            raise ValueError(f"{name} is {c.dtype}, expected torch.float32")
        _check_like(name, c, "x", x, "device")
    return (_rope.rope if _kernel("elementwise", x) == "triton" else reference.apply_rope)(x, cos, sin)


def rms_norm(x, weight, eps, residual=None):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), fused with the residual addition that comes before it.

    x: (..., d); weight: (d,); residual: like x, or None.
    Returns y, or (y, s) with s = x + residual and y = norm(s) when a residual is given.
    Rounding as in the official Llama: normalise in float32, cast to x.dtype, then multiply by the weight.
    """
    _check_dtype("x", x)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the last dimension of x")
    _check_like("weight", weight, "x", x, "dtype", "device")
    if residual is not None:
        _check_like("residual", residual, "x", x)
    return (_rms_norm if _kernel("elementwise", x) == "triton" else reference).rms_norm(x, weight, eps, residual)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the activation of Llama's MLP. Same shape, any strides."""
    _check_dtype("gate", gate)
    _check_like("up", up, "gate", gate)
    return (_swiglu if _kernel("elementwise", gate) == "triton" else reference).swiglu(gate, up)


def quick_gelu(x):
    """x sigmoid(1.702 x), the activation of CLIP's MLP: a cheap approximation of GELU (Hendrycks & Gimpel 2016)."""
    _check_dtype("x", x)
    return (_swiglu if _kernel("elementwise", x) == "triton" else reference).quick_gelu(x)


FEW = 16  # rows up to which int8 weights have kernels of their own: one and eight were measured to be faster


def int8_linear(x, weight, scale):
    """x (..., K) times a matrix of int8 weights (N, K) with a scale for each row, (N,) bfloat16: (..., N). No gradient.

    Few rows, a decoding step: reading the weights takes the time. Many, a prompt: arithmetic does.
    """
    rows = x.shape[:-1].numel()
    shape = "few" if 0 < rows <= FEW else "many"
    if _kernel("int8", x, shape) == "triton":
        return _int8.int8_matmul(x.reshape(rows, -1), weight, scale).view(*x.shape[:-1], -1)
    if shape == "few" and x.device.type == "cpu":
        y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), weight, scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    return reference.int8_linear(x, weight, scale, default_dtype(x.device))


CHUNK = 2**25  # logits held at a time: 128 MB in float32


def linear_cross_entropy(hidden, weight, targets):
    """Sum over the rows of -log softmax(hidden @ weight.T)[target]: LM head and loss in one, in little memory.

    hidden: (N, d); weight: (V, d); targets: (N,) int64. A row whose target is negative carries no loss.
    Returns a float32 scalar, the *sum*: divide by the number of targets of the global batch.

    The N x V logits are the largest tensor of a training step (4,096 x 128,256 in float32 are 2 GB, their gradient as
    much again). Here they are there a chunk of rows at a time.
    """
    _check_dtype("hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (N, d): select the target positions first")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, {hidden.shape[1]})")
    _check_like("weight", weight, "hidden", hidden, "dtype", "device")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}, expected torch.int64 ({len(hidden)},)")
    _check_like("targets", targets, "hidden", hidden, "device")
    rows = max(1, CHUNK // len(weight))
    if hidden.is_cuda:  # to be busy a GPU wants longer chunks, in whole tiles of 128 rows
        rows = max(128, 4 * rows // 128 * 128)
    step = (_cross_entropy if _kernel("elementwise", hidden) == "triton" else reference).loss_and_gradient
    grad = torch.is_grad_enabled()
    return reference.LinearCrossEntropy.apply(hidden, weight, targets, step, rows, grad and hidden.requires_grad,
                                              grad and weight.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with an argument, said in one line


def _check_like(name, x, other_name, other, *what):
    """x must have the same shape, dtype and device as another tensor, or what of these is named."""
    for quality in what or ("shape", "dtype", "device"):
        a, b = getattr(x, quality), getattr(other, quality)
        if a != b:
            verb = "has shape" if quality == "shape" else "is on" if quality == "device" else "is"
            said = [tuple(v) if quality == "shape" else v for v in (a, b)]
            raise ValueError(f"{name} {verb} {said[0]}, {other_name} {verb} {said[1]}: they must be the same")


def _check_dtype(name, x):
    if x.dtype not in FLOAT and (x.dtype != torch.float64 or _choice == "triton"):
        raise ValueError(f"{name} is {x.dtype}, expected bfloat16, float16 or float32")


def _check_attention(q, k, v, lengths):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (B, T, H, D)")
    (B, _, Hq, D), (Bk, _, Hkv, Dk) = q.shape, k.shape
    _check_dtype("q", q)
    if D % 8 or not 8 <= D <= 128:
        raise ValueError(f"q has head dim {D}, supported are the multiples of 8 up to 128")
    if Bk != B or Dk != D:
        raise ValueError(f"k has shape {tuple(k.shape)}, expected batch {B} and head dim {D} as in q {tuple(q.shape)}")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"k has {Hkv} heads, which does not divide the {Hq} heads of q")
    _check_like("k", k, "q", q, "dtype", "device")
    _check_like("v", v, "k", k)
    if lengths is not None:
        if lengths.shape != (B,) or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"lengths is {lengths.dtype} {tuple(lengths.shape)}, expected {B} integers")
        _check_like("lengths", lengths, "q", q, "device")

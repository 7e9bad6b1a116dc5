"""The operations in which a Llama or a ViT spends its time, behind one signature each.

    reference.py         what each computes, in plain PyTorch: read it first; it is what runs on a CPU
    attention.py         attention             softmax(q k^T / sqrt(D)) v: causal or full, grouped heads
    decode_attention.py                        the same for few queries and many keys: a step with a cache
    rope.py              apply_rope            rotary position embedding
    rms_norm.py          rms_norm              RMSNorm, fused with the residual addition before it
    swiglu.py            swiglu                silu(gate) * up, of Llama's MLP
    cross_entropy.py     linear_cross_entropy  LM head and cross-entropy together, without the (N, vocabulary) logits
    int8_matmul.py       int8_linear           a product by weights in 8 bits (int8.py rounds them), to decode faster
    operators.py                               how a launch becomes an operator of PyTorch
    graph.py             record                a decoding step's hundreds of launches, replayed as one

What runs where says TABLE below. To force one: KERNELS=torch or KERNELS=triton in the environment, or
`with kernels.backend("torch"):`. `python -m studies.benchmark kernels` times them on a GPU beside their peers.
"""

import functools
import os
from contextlib import contextmanager

import torch

from cli import UserError

from . import reference

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # a * b + c as one instruction: Triton 3.9 wants to be told
# Above the functions: to import kernels/attention.py binds the name `attention` here, which `def attention` takes back.
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
    triton = _cross_entropy = _rms_norm = _rope = _swiglu = None

HALF = (torch.bfloat16, torch.float16)
FLOAT = (*HALF, torch.float32)  # float64 is for checking gradients: only PyTorch computes it
TABLE = [
    # Which kernel runs where: the row of (operation, chip, dtype, shape), or if there is none reference.py. Chips are
    # NVIDIA's, by compute capability: 8.0 is A100, 8.6 to 8.9 are RTX 30, RTX 40 and L4, 9.0 is H100 and H200. Those
    # before Ampere only emulate bfloat16, and have less shared memory than a tile takes; AMD's have not been tried.
    ("attention", (9, 0), (9, 0), HALF, "square", "triton"),  # 1.03 to 1.47 times as fast as PyTorch's flash there
    #  attention elsewhere: PyTorch's flash, until ours has been timed there; float32: no tensor cores, no gain
    ("attention", (8, 0), (99, 0), HALF, "few", "split"),  # few queries, many keys: or most of the chip is idle
    ("elementwise", (8, 0), (99, 0), FLOAT, "any", "triton"),  # norm, RoPE, SwiGLU, loss: one pass over memory for five
    ("int8", (8, 0), (99, 0), FLOAT, "few", "triton"),  # up to 16 rows; more are a matrix product, cuBLAS's
]
BACKENDS = ("auto", "triton", "torch")
_choice = os.environ.get("KERNELS") or "auto"


def check_choice(on_gpu=torch.cuda.is_available):
    """UserError if KERNELS names no backend, or one that is not here: a model that is built asks, before it loads."""
    if _choice not in BACKENDS:
        raise UserError(f"KERNELS={_choice:.40}: expected 'triton', 'torch' or nothing")
    if _choice == "triton" and triton is None:
        raise UserError("the backend is 'triton', but Triton is not installed: pip install triton, or choose 'torch'")
    if _choice == "triton" and not on_gpu() and not _attention.INTERPRET.value:
        raise UserError("the backend is 'triton', but on a CPU Triton only runs in its interpreter: start Python with "
                        "TRITON_INTERPRET=1, or choose 'torch'")


@contextmanager
def backend(name):
    """Within the block, run every function here on `name`: "triton", "torch", or "auto" (by TABLE)."""
    global _choice
    before, _choice = _choice, name
    try:
        yield
    finally:
        _choice = before


def _kernel(operation, x, shape="any"):
    """"triton", "split" or "torch", for this operation on a tensor like x."""
    forced = _choice == "triton"  # any chip and dtype then
    if forced or _choice not in BACKENDS:
        check_choice(lambda: x.is_cuda)
    if _choice == "torch" or not forced and (triton is None or not x.is_cuda):
        return "torch"
    chip = None if forced else _capability(x.device)
    return next((kernel for name, first, last, dtypes, what, kernel in TABLE if (name, what) == (operation, shape)
                 and (forced or first <= chip <= last and x.dtype in dtypes)), "torch")


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


def _check(first, x0, *others):
    """ValueError unless the others, (name, tensor or None, its shape[, dtype, ...]), have that shape, and lie where the
    first does; in its dtype, if none is given."""
    dtype, device = x0.dtype, x0.device
    if dtype not in FLOAT and (dtype != torch.float64 or _choice == "triton"):
        raise ValueError(f"{first} is {dtype}, expected bfloat16, float16 or float32")
    for name, x, shape, *dtypes in others:
        if x is None:
            continue
        if x.shape != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {tuple(shape)} beside {first} "
                             f"{tuple(x0.shape)}")
        if x.dtype not in (dtypes or (dtype,)):
            expected = " or ".join(map(str, dtypes)) or f"{dtype} as {first}"
            raise ValueError(f"{name} is {x.dtype}, expected {expected}")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device}, {first} is on {device}: they must be the same")


def _check_dimensions(name, x, *letters):
    if x.ndim != len(letters):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({', '.join(letters)})")


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
    """
    _check_dimensions("q", q, "B", "Tq", "Hq", "D")
    _check_dimensions("k", k, "B", "Tk", "Hkv", "D")
    (B, Tq, Hq, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    _check("q", q, ("k", k, (B, Tk, Hkv, D)), ("v", v, k.shape), ("lengths", lengths, (B,), torch.int32, torch.int64))
    if D % 8 or not 8 <= D <= 128:
        raise ValueError(f"q has head dim {D}, supported are the multiples of 8 up to 128")
    if Hkv == 0 or Hq % Hkv:
        raise ValueError(f"k has {Hkv} heads, which does not divide the {Hq} heads of q")
    shape = "square" if lengths is None and Tq == Tk else "trained" if _learns(q, k, v) else "few"
    kernel = _kernel("attention", q, shape)
    if kernel == "split":
        return _decode_attention.decode_attention(q, k, v, causal, lengths)
    if kernel == "triton":
        return _attention.attention(q, k, v, causal)[0]
    return reference.attention(q, k, v, causal, lengths)


def _learns(*tensors):
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _elementwise(x, triton_kernels):
    """Where the operations are that read and write tensors like x once: in that module, or in plain PyTorch."""
    return triton_kernels if _kernel("elementwise", x) == "triton" else reference


def apply_rope(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the layout of the Hugging Face Llama weights.

    x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2) float32. Channel i turns with channel i + D/2 (not with its
    neighbour, as in Meta's files). Computed in float32, returned as x.dtype.
    """
    _check_dimensions("x", x, "B", "T", "H", "D")
    B, T, _, D = x.shape
    if D % 2:
        raise ValueError(f"x has head dim {D}, expected an even one")
    angles = (B, T, D // 2) if cos.ndim == 3 else (T, D // 2)
    _check("x", x, ("cos", cos, angles, torch.float32), ("sin", sin, angles, torch.float32))
    return _elementwise(x, _rope).apply_rope(x, cos, sin)


def rms_norm(x, weight, eps, residual=None):
    """RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), fused with the residual addition that comes before it.

    x: (..., d); weight: (d,); residual: like x, or None. Returns y; with a residual (y, s), s = x + residual.
    Rounding as in the official Llama: normalise in float32, cast to x.dtype, then multiply by the weight.
    """
    _check("x", x, ("weight", weight, x.shape[-1:]), ("residual", residual, x.shape))
    ours = _elementwise(x, _rms_norm)
    if _learns(x, weight, residual):
        return reference.RMSNorm.apply(x, weight, eps, residual, ours.norm_forward, ours.norm_backward)
    y, s, _ = ours.norm_forward(x, weight, eps, residual)
    return y if residual is None else (y, s)


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202), the activation of Llama's MLP. Same shape, any strides."""
    _check("gate", gate, ("up", up, gate.shape))
    return _elementwise(gate, _swiglu).swiglu(gate, up)


FEW = 16  # rows up to which int8 weights have kernels of their own: one and eight were measured to be faster


def int8_linear(x, weight, scale):
    """x (..., K) times a matrix of int8 weights (N, K) with a scale for each row, (N,) bfloat16: (..., N). No gradient.
    Few rows, a decoding step: reading the weights takes the time. Many, a prompt: arithmetic does."""
    rows = x.shape[:-1].numel()
    shape = "few" if 0 < rows <= FEW else "many"
    if _kernel("int8", x, shape) == "triton":
        return _int8.int8_matmul(x.reshape(rows, -1), weight, scale).view(*x.shape[:-1], -1)
    if shape == "few" and x.device.type == "cpu" and x.shape[-1] % 16 == 0:  # of others PyTorch reads beyond the end
        y = torch._weight_int8pack_mm(x.reshape(rows, -1).bfloat16(), weight, scale)
        return y.to(x.dtype).view(*x.shape[:-1], -1)
    return reference.int8_linear(x, weight, scale, default_dtype(x.device))


CHUNK = 2**25  # logits held at a time: 128 MB in float32


def linear_cross_entropy(hidden, weight, targets, factors=None):
    """Sum over the rows of -log softmax(hidden @ weight.T)[target]: LM head and loss in one, in little memory.

    hidden: (N, d); weight: (V, d); targets: (N,) int64. A row whose target is negative carries no loss.
    factors: (N,) float32, by which each row's loss is multiplied, or None.
    Returns a float32 scalar, the *sum*: divide by the number of targets of the global batch.

    The N x V logits are the largest tensor of a training step (4,096 x 128,256 in float32 are 2 GB, their gradient as
    much again). Here they are there a chunk of rows at a time.
    """
    _check_dimensions("hidden", hidden, "N", "d")
    _check("hidden", hidden, ("weight", weight, (len(weight), hidden.shape[1])),
           ("targets", targets, hidden.shape[:1], torch.int64), ("factors", factors, hidden.shape[:1], torch.float32))
    rows = max(1, CHUNK // len(weight))
    if hidden.is_cuda:  # to be busy a GPU wants longer chunks, in whole tiles of 128 rows
        rows = max(128, 4 * rows // 128 * 128)
    step = _elementwise(hidden, _cross_entropy).loss_and_gradient
    learns = _learns(hidden), _learns(weight)
    return reference.LinearCrossEntropy.apply(hidden, weight, targets, factors, step, rows, *learns)

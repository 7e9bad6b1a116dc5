"""A few rows times a matrix of int8 weights, in Triton.

    y = x W^T,    W[n] = scale[n] * integers[n]

    x [ ........ ]  K numbers        W [ ........ ]    A program owns BLOCK_N rows of W: reads them and x once, turns
                                       [ ........ ]    integers to x's dtype in registers, and applies the scales,
                                                       which are the same along a row, to the finished sums.

Arithmetic: a decoding step has M rows, one a sequence, and does 2 M operations with each weight that it reads: the time
is that of reading W, 1 byte a number, where bfloat16 has 2.
"""

import torch
import triton
import triton.language as tl

from .attention import _dot
from .operators import channels_last, operator

# BLOCK_N, BLOCK_K, warps, pipeline stages: for one row of x, and for several
CONFIGS = {"one": (2, 1024, 2, 4), "several": (32, 256, 4, 4)}


@triton.jit(do_not_specialize=["M"])
def _matmul(X, stride_x, Weight, Scale, Y, M, N, K: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    scale = tl.load(Scale + n, mask=n < N, other=0.0).to(tl.float32)
    Weight += n.to(tl.int64)[:, None] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    partial = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w = tl.load(Weight + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0)  # (BLOCK_N, BLOCK_K)
        if BLOCK_M == 1:  # the tensor cores want 16 rows: one is summed without them
            x = tl.load(X + k, mask=k < K, other=0.0).to(tl.float32)
            partial += w.to(tl.float32) * x[None, :]
        else:
            x = tl.load(X + m[:, None] * stride_x + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            acc = _dot(x, tl.trans(w.to(tl.float32).to(x.dtype)), acc)
    if BLOCK_M == 1:
        acc += tl.sum(partial, 1)[None, :]
    y = (acc * scale[None, :]).to(Y.dtype.element_ty)
    tl.store(Y + m[:, None] * N + n[None, :], y, mask=(m < M)[:, None] & (n < N)[None, :])


@operator("int8_matmul(Tensor x, Tensor weight, Tensor scale) -> Tensor",
          lambda x, weight, scale: x.new_empty((len(x), len(weight))))
def int8_matmul(y, x, weight, scale):
    """x (M, K), M <= 16; weight (N, K) int8, contiguous; scale (N,) bfloat16 -> (M, N) of x's dtype."""
    (M, K), N, x = x.shape, len(weight), channels_last(x)
    BLOCK_N, BLOCK_K, num_warps, num_stages = CONFIGS["one" if M == 1 else "several"]
    num_stages = 2 if x.dtype == torch.float32 else num_stages  # within the 99 KB of shared memory that any chip has
    _matmul[(triton.cdiv(N, BLOCK_N),)](x, x.stride(0), weight, scale, y, M, N, K, 1 if M == 1 else 16, BLOCK_N,
                                        BLOCK_K, num_warps=num_warps, num_stages=num_stages)

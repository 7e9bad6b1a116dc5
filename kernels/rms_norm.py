"""RMSNorm fused with the residual addition before it, forward and backward, in Triton.

    s = x + residual        r = 1 / sqrt(mean(s^2) + eps)        n = s * r        y = n * weight

    x, residual   [ ......... ]  a row of d numbers      A program owns a row: reads it once into registers, sums its
                       |                                 squares, writes y, s, and r for the backward.
    y, s, r       [ ......... ]

The backward, with g = dy * weight, along each row:

    ds = r * (g - n * mean(g * n))   plus the gradient that reaches s directly, as the residual stream goes on
    dx = dresidual = ds              (one tensor for both)
    dweight = sum over rows of dy * n

dweight is summed by a fixed number of programs, each over its own rows, then once more: the same bits on every run.

Arithmetic: some five operations a number, so memory is the bound: 8 bytes a number with 16 bits, forward as backward
(two in, two out; three in, one out). PyTorch's own lines read and write s five times.
"""

import torch
import triton
import triton.language as tl

from .operators import operator, rows

# Programs that sum dweight, each over its share of the rows. They are on the chip all at once.
MAX_PROGRAMS = 132 * 2  # twice an H200's processors: 6 % less time than four times as many, 35 % less than once


@triton.jit
def _forward(X, stride_x, Residual, stride_r, Weight, Y, S, R, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    mask = i < d
    s = tl.load(X + row * stride_x + i, mask=mask, other=0.0)
    weight = tl.load(Weight + i, mask=mask, other=0.0)
    if Residual is not None:
        residual = tl.load(Residual + row * stride_r + i, mask=mask, other=0.0)
        s = (s.to(tl.float32) + residual.to(tl.float32)).to(s.dtype)  # rounded, as the sum that is returned
        tl.store(S + row * d + i, s, mask=mask)
    s = s.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 0) / d + eps)
    n = (s * r).to(weight.dtype)  # the official Llama rounds here, before the weight
    y = n.to(tl.float32) * weight.to(tl.float32)
    tl.store(Y + row * d + i, y.to(weight.dtype), mask=mask)
    tl.store(R + row, r)


@triton.jit(do_not_specialize=["rows"])
def _backward(dY, stride_dy, dS, stride_ds, S, stride_s, Weight, R, dX, dWeight, rows, d, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = i < d
    weight = tl.load(Weight + i, mask=mask, other=0.0)
    dweight = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(k, tl.int64)
        s = tl.load(S + row * stride_s + i, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dY + row * stride_dy + i, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(R + row)
        n = s * r
        g = dy * weight.to(tl.float32)
        ds = r * (g - n * (tl.sum(g * n, 0) / d))
        if dS is not None:
            ds += tl.load(dS + row * stride_ds + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(dX + row * d + i, ds.to(weight.dtype), mask=mask)
        if dWeight is not None:
            dweight += dy * n.to(weight.dtype).to(tl.float32)
    if dWeight is not None:
        tl.store(dWeight + tl.program_id(0).to(tl.int64) * d + i, dweight, mask=mask)


def _options(d):
    BLOCK = triton.next_power_of_2(d)
    return dict(BLOCK=BLOCK, num_warps=min(max(BLOCK // 512, 1), 16))  # 16 numbers a thread


@operator("rms_norm(Tensor x, Tensor weight, float eps, Tensor? residual) -> (Tensor, Tensor, Tensor)",
          lambda x, weight, eps, residual: (
              x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0),
              x.new_empty(x.shape[:-1], dtype=torch.float32)))
def norm_forward(y, s, r, x, weight, eps, residual):
    _forward[(r.numel(),)](*rows(x), *rows(residual), weight.contiguous(), y, s, r, x.shape[-1], eps,
                           **_options(x.shape[-1]))


@operator("rms_norm_backward(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor r, bool need_weight)"
          " -> (Tensor, Tensor)",
          lambda dy, ds, s, weight, r, need_weight: (
              s.new_empty(s.shape), weight.new_zeros(weight.shape if need_weight else 0)))
def norm_backward(dx, dweight, dy, ds, s, weight, r, need_weight):
    n, d = r.numel(), s.shape[-1]
    # without dweight a program has nothing to carry from row to row: one row each, and the chip fills itself
    programs = min(n, MAX_PROGRAMS) if need_weight else n
    parts = s.new_empty((programs, d), dtype=torch.float32) if need_weight else None
    _backward[(programs,)](*rows(dy), *rows(ds), *rows(s), weight.contiguous(), r, dx, parts, n, d, **_options(d))
    if need_weight:
        dweight.copy_(parts.sum(0))

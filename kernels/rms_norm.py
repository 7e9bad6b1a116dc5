"""RMSNorm fused with the residual addition before it, forward and backward, in Triton.

    s = x + residual        r = 1 / sqrt(mean(s^2) + eps)        n = s * r        y = n * weight

    x, residual   [ ......... ]  a row of d numbers      A program owns a row: reads it once into registers, sums its
                       |                                 squares, writes y, s, and r for the backward.
    y, s, r       [ ......... ]

The backward, with g = dy * weight, along each row:

    ds = r * (g - n * mean(g * n))   plus the gradient that reaches s directly, as the residual stream goes on
    dx = dresidual = ds              (one tensor for both)
    dweight = sum over rows of dy * n

dweight, if anyone trains the weight, is summed by a fixed number of programs, each over its own rows in order, and
their partial sums then in one more step: no atomics, the same bits on every run.

Arithmetic: some five operations a number, so memory is the bound: 8 bytes a number with 16 bits, forward as backward
(two in, two out; three in, one out). PyTorch's own lines read and write s five times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

# Rows are short (d = 576 .. 8192) and many: a program keeps one row in its registers. With this many programs at most,
# all of them are on the chip at once and each walks over its share of the rows.
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


def _rows(x):
    """(..., d) -> (rows (n, d) of neighbouring channels, a view wherever the strides allow one; a row's stride)."""
    if x is None:
        return None, 0
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x, x.stride(0)


@custom_op("kernels::rms_norm", mutates_args=())
def _forward_op(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, s = x + residual (empty without one), and 1 / rms of each row."""
    y, s = x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0)
    r = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    if len(r) > 0:
        with torch.cuda.device_of(x):
            _forward[(len(r),)](*_rows(x), *_rows(residual), weight.contiguous(), y, s, r, x.shape[-1], eps,
                                **_options(x.shape[-1]))
    return y, s, r


_forward_op.register_fake(lambda x, weight, eps, residual: (
    x.new_empty(x.shape), x.new_empty(x.shape if residual is not None else 0),
    x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)))


@custom_op("kernels::rms_norm_backward", mutates_args=())
def _backward_op(dy: Tensor, ds: Tensor | None, s: Tensor, weight: Tensor, r: Tensor, need_weight: bool
                 ) -> tuple[Tensor, Tensor]:
    """-> dx (which is dresidual too), dweight (0 if not needed)."""
    dx, rows, d = s.new_empty(s.shape), len(r), s.shape[-1]
    # without dweight a program has nothing to carry from row to row: one row each, and the chip fills itself
    programs = min(rows, MAX_PROGRAMS) if need_weight else rows
    dweight = s.new_empty((programs, d) if need_weight else 0, dtype=torch.float32)
    if rows > 0:
        with torch.cuda.device_of(s):
            _backward[(programs,)](*_rows(dy), *_rows(ds), *_rows(s), weight.contiguous(), r, dx,
                                   dweight if need_weight else None, rows, d, **_options(d))
    return dx, dweight.sum(0).to(weight.dtype)


_backward_op.register_fake(lambda dy, ds, s, weight, r, need_weight: (
    s.new_empty(s.shape), weight.new_empty(weight.shape if need_weight else ())))


def _setup(ctx, inputs, output):
    x, weight, _, residual = inputs
    _, s, r = output
    ctx.save_for_backward(x if residual is None else s, weight, r)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward_formula(ctx, dy, ds, _):
    s, weight, r = ctx.saved_tensors
    need_x, need_weight, _, need_residual = ctx.needs_input_grad
    if not ctx.has_residual:
        ds = None  # of the empty placeholder
    if dy is None:  # only the sum was used
        return ds if need_x else None, None, None, ds if need_residual else None
    dx, dweight = _backward_op(dy, ds, s, weight, r, need_weight)
    return dx if need_x else None, dweight if need_weight else None, None, dx if need_residual else None


_forward_op.register_autograd(_backward_formula, setup_context=_setup)


def rms_norm(x, weight, eps, residual=None):
    """`kernels.rms_norm` on Triton; arguments are checked there."""
    y, s, _ = _forward_op(x, weight, eps, residual)
    return y if residual is None else (y, s)

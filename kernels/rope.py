"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Triton.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x (B, T, H, D), x1 and x2 the halves of its channels

    x   [  x1  |  x2  ]         A program rotates some rows (token, head): reads both halves and the token's angles,
    y   [  y1  |  y2  ]         writes both halves. The backward is the rotation by the opposite angle: this kernel.

Arithmetic: 3 operations a number that is moved twice, so memory is the bound: 4 bytes a channel with 16 bits. (Inside
the attention kernel queries are read once less, but to rotate them there took longer than that: docs/gpu.md.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op


@triton.jit(do_not_specialize=["rows", "T"])
def _rope(X, stride_xb, stride_xt, stride_xh, Cos, Sin, stride_cb, Y, rows, T, H,
          INVERSE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program rotates BLOCK rows (token, head) of x (B, T, H, D) into y, contiguous."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b, t, h = (row // H // T).to(tl.int64), (row // H % T).to(tl.int64), (row % H).to(tl.int64)
    i = tl.arange(0, BLOCK_D // 2)
    mask = (row < rows)[:, None] & (i < D // 2)[None, :]
    angle = (b * stride_cb + t * (D // 2))[:, None] + i[None, :]
    cos = tl.load(Cos + angle, mask=mask, other=0.0)
    sin = tl.load(Sin + angle, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    x = X + (b * stride_xb + t * stride_xt + h * stride_xh)[:, None] + i[None, :]
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + D // 2, mask=mask, other=0.0).to(tl.float32)
    y = Y + row.to(tl.int64)[:, None] * D + i[None, :]
    tl.store(y, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), mask=mask)
    tl.store(y + D // 2, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), mask=mask)


@custom_op("kernels::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """`kernels.apply_rope` on Triton; arguments are checked there."""
    (B, T, H, D), rows = x.shape, x.shape[0] * x.shape[1] * x.shape[2]
    y = x.new_empty((B, T, H, D))
    if rows > 0:
        x, cos, sin = x if x.stride(3) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
        BLOCK_D = max(16, triton.next_power_of_2(D))
        BLOCK = 4096 // BLOCK_D
        with torch.cuda.device_of(x):
            _rope[(triton.cdiv(rows, BLOCK),)](x, *x.stride()[:3], cos, sin, cos.stride(0) if cos.ndim == 3 else 0, y,
                                               rows, T, H, inverse, D, BLOCK, BLOCK_D, num_warps=4)
    return y


rope.register_fake(lambda x, cos, sin, inverse=False: x.new_empty(x.shape))


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


rope.register_autograd(lambda ctx, dy: (rope(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None),
                       setup_context=_setup)

"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Triton.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin        x (B, T, H, D), x1 and x2 the halves of its channels

    x   [  x1  |  x2  ]         A program rotates some rows (token, head): reads both halves and the token's angles,
    y   [  y1  |  y2  ]         writes both halves. The backward is the rotation by the opposite angle: this kernel.

Arithmetic: 3 operations a number that is moved twice, so memory is the bound: 4 bytes a channel with 16 bits. (To
rotate inside the attention kernel reads queries once less, and took longer: docs/gpu.md.)
"""

import triton
import triton.language as tl

from .operators import channels_last, operator


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


@operator("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
          lambda x, cos, sin, inverse: x.new_empty(x.shape))
def _rotate(y, x, cos, sin, inverse):
    (B, T, H, D), cos, sin, x = x.shape, cos.contiguous(), sin.contiguous(), channels_last(x)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK = 4096 // BLOCK_D
    _rope[(triton.cdiv(B * T * H, BLOCK),)](x, *x.stride()[:3], cos, sin, cos.stride(0) if cos.ndim == 3 else 0, y,
                                            B * T * H, T, H, inverse, D, BLOCK, BLOCK_D, num_warps=4)


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


_rotate.register_autograd(lambda ctx, dy: (_rotate(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None),
                          setup_context=_setup)


def apply_rope(x, cos, sin):
    return _rotate(x, cos, sin, False)

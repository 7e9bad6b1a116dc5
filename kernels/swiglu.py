"""The activations of the two MLPs, forward and backward, in Triton.

    Llama   y = silu(gate) * up,    silu(x) = x sigmoid(x)
    CLIP    y = x sigmoid(1.702 x), "quick GELU"

Like the norm, these only move memory. As separate PyTorch operations the first passes over its tensors five times
forward and the second seven times; here each input is read once and each output written once, and the backward computes
the sigmoid again rather than reading back what the forward would have had to write.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from .rms_norm import _rows

BLOCK = 2048  # numbers per program


@triton.jit
def _swiglu(Gate, stride_g, Up, stride_u, Y, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < d
    gate = tl.load(Gate + row * stride_g + i, mask=mask, other=0.0)
    up = tl.load(Up + row * stride_u + i, mask=mask, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    silu = (x * tl.sigmoid(x)).to(gate.dtype).to(tl.float32)  # rounded between the two, as F.silu(gate) * up does
    tl.store(Y + row * d + i, (silu * up).to(gate.dtype), mask=mask)


@triton.jit
def _swiglu_backward(dY, stride_dy, Gate, stride_g, Up, stride_u, dGate, dUp, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < d
    dy = tl.load(dY + row * stride_dy + i, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(Gate + row * stride_g + i, mask=mask, other=0.0)
    up = tl.load(Up + row * stride_u + i, mask=mask, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    sigmoid = tl.sigmoid(x)
    dgate = dy * up * (sigmoid * (1 + x * (1 - sigmoid)))  # d silu / dx = sigmoid + x sigmoid (1 - sigmoid)
    tl.store(dGate + row * d + i, dgate.to(gate.dtype), mask=mask)
    tl.store(dUp + row * d + i, (dy * (x * sigmoid)).to(gate.dtype), mask=mask)


@triton.jit
def _quick_gelu(X, stride_x, Y, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < d
    x = tl.load(X + row * stride_x + i, mask=mask, other=0.0)
    y = x.to(tl.float32) * tl.sigmoid(1.702 * x.to(tl.float32))
    tl.store(Y + row * d + i, y.to(x.dtype), mask=mask)


@triton.jit
def _quick_gelu_backward(dY, stride_dy, X, stride_x, dX, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < d
    dy = tl.load(dY + row * stride_dy + i, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(X + row * stride_x + i, mask=mask, other=0.0)
    z = x.to(tl.float32)
    sigmoid = tl.sigmoid(1.702 * z)
    tl.store(dX + row * d + i, (dy * sigmoid * (1 + 1.702 * z * (1 - sigmoid))).to(x.dtype), mask=mask)


def _launch(kernel, inputs, outputs):
    """Run `kernel` over all rows of the inputs (..., d), any row stride, into the outputs, contiguous."""
    if outputs[0].numel() == 0:
        return
    inputs = [_rows(x) for x in inputs]
    rows, d = inputs[0].shape
    arguments = [a for x in inputs for a in (x, x.stride(0))]
    with torch.cuda.device_of(inputs[0]):
        kernel[(rows, triton.cdiv(d, BLOCK))](*arguments, *outputs, d, BLOCK, num_warps=4)


@custom_op("kernels::swiglu", mutates_args=())
def _swiglu_op(gate: Tensor, up: Tensor) -> Tensor:
    y = gate.new_empty(gate.shape)
    _launch(_swiglu, (gate, up), (y,))
    return y


@_swiglu_op.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@custom_op("kernels::swiglu_backward", mutates_args=())
def _swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(_swiglu_backward, (dy, gate, up), (dgate, dup))
    return dgate, dup


@_swiglu_backward_op.register_fake
def _(dy, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


@custom_op("kernels::quick_gelu", mutates_args=())
def _quick_gelu_op(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    _launch(_quick_gelu, (x,), (y,))
    return y


@_quick_gelu_op.register_fake
def _(x):
    return x.new_empty(x.shape)


@custom_op("kernels::quick_gelu_backward", mutates_args=())
def _quick_gelu_backward_op(dy: Tensor, x: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    _launch(_quick_gelu_backward, (dy, x), (dx,))
    return dx


@_quick_gelu_backward_op.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu_op.register_autograd(lambda ctx, dy: _swiglu_backward_op(dy, *ctx.saved_tensors),
                             setup_context=_save_inputs)
_quick_gelu_op.register_autograd(lambda ctx, dy: _quick_gelu_backward_op(dy, *ctx.saved_tensors),
                                 setup_context=_save_inputs)


def swiglu(gate, up):
    """`kernels.swiglu` on Triton; arguments are checked there."""
    return _swiglu_op(gate, up)


def quick_gelu(x):
    """`kernels.quick_gelu` on Triton."""
    return _quick_gelu_op(x)

"""The activations of the two MLPs, forward and backward, in Triton.

    Llama   y = silu(gate) * up,    silu(x) = x sigmoid(x)             (SwiGLU)
    CLIP    y = x sigmoid(1.702 x)                                     (quick GELU): the same with another factor, no up

    gate  [ . . . . | . . . . | . . ]      A program owns 2,048 neighbouring numbers of one row: it reads gate and up,
    up    [ . . . . | . . . . | . . ]      writes y, and shares nothing.
    y     [ . . . . | . . . . | . . ]

Arithmetic: some ten operations a number, so memory is the bound. SwiGLU moves 6 bytes a number forward and 10 backward
with 16 bits; the backward computes the sigmoid anew. (Separate PyTorch operations: five passes forward, seven back.)
"""

import triton
import triton.language as tl

from .operators import operator, rows

BLOCK = 2048  # numbers per program


@triton.jit
def _forward(Gate, stride_g, Up, stride_u, Y, d, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(Gate + row * stride_g + i, mask=i < d, other=0.0)
    x = gate.to(tl.float32)
    y = (x * tl.sigmoid(FACTOR * x)).to(gate.dtype)
    if Up is not None:  # y has been rounded, as F.silu(gate) * up does
        y = (y.to(tl.float32) * tl.load(Up + row * stride_u + i, mask=i < d, other=0.0).to(tl.float32)).to(gate.dtype)
    tl.store(Y + row * d + i, y, mask=i < d)


@triton.jit
def _backward(dY, stride_dy, Gate, stride_g, Up, stride_u, dGate, dUp, d, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dY + row * stride_dy + i, mask=i < d, other=0.0).to(tl.float32)
    x = tl.load(Gate + row * stride_g + i, mask=i < d, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(FACTOR * x)
    if Up is not None:
        tl.store(dUp + row * d + i, (dy * (x * sigmoid)).to(dUp.dtype.element_ty), mask=i < d)
        dy *= tl.load(Up + row * stride_u + i, mask=i < d, other=0.0).to(tl.float32)
    # d sigmoid(z) / dz = sigmoid(z) (1 - sigmoid(z)), and the product rule
    dgate = dy * (sigmoid * (1 + FACTOR * x * (1 - sigmoid)))
    tl.store(dGate + row * d + i, dgate.to(dGate.dtype.element_ty), mask=i < d)


def _grid(x):
    return x.shape[:-1].numel(), triton.cdiv(x.shape[-1], BLOCK)


@operator("gated(Tensor gate, Tensor? up, float factor) -> Tensor", lambda gate, up, factor: gate.new_empty(gate.shape))
def _gated(y, gate, up, factor):
    _forward[_grid(gate)](*rows(gate), *rows(up), y, gate.shape[-1], factor, BLOCK, num_warps=4)


@operator("gated_backward(Tensor dy, Tensor gate, Tensor? up, float factor) -> (Tensor, Tensor)",
          lambda dy, gate, up, factor: (gate.new_empty(gate.shape), gate.new_empty(0 if up is None else up.shape)))
def _gated_backward(dgate, dup, dy, gate, up, factor):
    _backward[_grid(gate)](*rows(dy), *rows(gate), *rows(up), dgate, None if up is None else dup, gate.shape[-1],
                           factor, BLOCK, num_warps=4)


def _setup(ctx, inputs, output):
    gate, up, ctx.factor = inputs
    ctx.save_for_backward(gate, up)


def _gradients(ctx, dy):
    gate, up = ctx.saved_tensors
    dgate, dup = _gated_backward(dy, gate, up, ctx.factor)
    return dgate, None if up is None else dup, None


_gated.register_autograd(_gradients, setup_context=_setup)


def swiglu(gate, up):
    return _gated(gate, up, 1.0)


def quick_gelu(x):
    return _gated(x, None, 1.702)

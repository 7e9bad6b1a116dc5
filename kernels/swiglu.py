"""SwiGLU, the activation of Llama's MLP, forward and backward, in Triton.

    y = silu(gate) * up,    silu(x) = x sigmoid(x)

    gate  [ . . . . | . . . . | . . ]      A program owns 2,048 neighbouring numbers of one row: it reads gate and up,
    up    [ . . . . | . . . . | . . ]      writes y, and shares nothing.
    y     [ . . . . | . . . . | . . ]

Arithmetic: some ten operations a number, so memory is the bound: 6 bytes a number forward and 10 backward with 16 bits;
the backward computes the sigmoid anew. (Separate PyTorch operations: five passes forward, seven back.)
"""

import triton
import triton.language as tl

from .operators import operator, rows

BLOCK = 2048  # numbers per program


@triton.jit
def _forward(Gate, stride_g, Up, stride_u, Y, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(Gate + row * stride_g + i, mask=i < d, other=0.0)
    up = tl.load(Up + row * stride_u + i, mask=i < d, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    silu = (x * tl.sigmoid(x)).to(gate.dtype)  # rounded, as in F.silu(gate) * up
    tl.store(Y + row * d + i, (silu.to(tl.float32) * up).to(gate.dtype), mask=i < d)


@triton.jit
def _backward(dY, stride_dy, Gate, stride_g, Up, stride_u, dGate, dUp, d, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dY + row * stride_dy + i, mask=i < d, other=0.0).to(tl.float32)
    x = tl.load(Gate + row * stride_g + i, mask=i < d, other=0.0).to(tl.float32)
    up = tl.load(Up + row * stride_u + i, mask=i < d, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    dgate = dy * up * (sigmoid * (1 + x * (1 - sigmoid)))  # sigmoid' = sigmoid (1 - sigmoid), and the product rule
    tl.store(dUp + row * d + i, (dy * (x * sigmoid)).to(dUp.dtype.element_ty), mask=i < d)
    tl.store(dGate + row * d + i, dgate.to(dGate.dtype.element_ty), mask=i < d)


def _grid(x):
    return x.shape[:-1].numel(), triton.cdiv(x.shape[-1], BLOCK)


@operator("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: gate.new_empty(gate.shape))
def swiglu(y, gate, up):
    _forward[_grid(gate)](*rows(gate), *rows(up), y, gate.shape[-1], BLOCK, num_warps=4)


@operator("swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
          lambda dy, gate, up: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
def _swiglu_backward(dgate, dup, dy, gate, up):
    _backward[_grid(gate)](*rows(dy), *rows(gate), *rows(up), dgate, dup, gate.shape[-1], BLOCK, num_warps=4)


swiglu.register_autograd(lambda ctx, dy: _swiglu_backward(dy, *ctx.saved_tensors),
                         setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

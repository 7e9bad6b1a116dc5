"""Cross-entropy that writes its own gradient over the logits, in Triton.

For one row of logits x (V,) with target t,

    loss = logsumexp(x) - x_t        d loss / d x = softmax(x) - onehot(t)

    logits   [ ............... ]  V numbers     A program owns a row. It reads it twice: for the (online) log-sum-exp,
               becomes                          and, most of it still in the L2 cache, to overwrite it with the
    d logits [ ............... ]                gradient, which needs nothing but x and that.

Arithmetic: one exponential a number and pass, so memory is the bound: 4 to 6 bytes a logit with 16 bits. As PyTorch
operations it is a dozen passes. `reference.LinearCrossEntropy` calls it chunk by chunk.
"""

import torch
import triton
import triton.language as tl

from .operators import operator

BLOCK = 8192


@triton.jit
def _cross_entropy(Logits, stride, Targets, Losses, V, NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    Logits += row * stride
    target = tl.load(Targets + row)
    has_target = target >= 0
    # now, before it is overwritten; a target beyond the vocabulary makes the loss NaN, not another row's logit
    x_target = tl.load(Logits + tl.maximum(target, 0), mask=target < V, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK)

    # logsumexp = m + log(sum exp(x - m)), with a running maximum m as in attention.py, here one for each lane
    m = tl.full((BLOCK,), -1e38, tl.float32)  # not -inf: lanes beyond the end must not meet inf - inf
    l = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(Logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    maximum = tl.max(m, 0)
    lse = maximum + tl.log(tl.sum(l * tl.exp(m - maximum), 0))
    tl.store(Losses + row, tl.where(has_target, lse - x_target, 0.0))

    if NEED_GRAD:
        for start in range(0, V, BLOCK):
            x = tl.load(Logits + start + i, mask=start + i < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - lse) - tl.where(start + i == target, 1.0, 0.0)
            p = tl.where(has_target, p, 0.0)
            tl.store(Logits + start + i, p.to(Logits.dtype.element_ty), mask=start + i < V)


@operator("cross_entropy(Tensor(a!) logits, Tensor targets, bool need_grad) -> Tensor",
          lambda logits, targets, need_grad: logits.new_empty(len(logits), dtype=torch.float32),
          mutates={"logits"})
def _losses(losses, logits, targets, need_grad):
    n, V = logits.shape
    _cross_entropy[(n,)](logits, logits.stride(0), targets.contiguous(), losses, V, need_grad,
                         min(BLOCK, triton.next_power_of_2(V)), num_warps=16 if V >= BLOCK else 4)


def loss_and_gradient(logits, targets, need_grad):
    """As `reference.loss_and_gradient`; the gradient takes the place of the logits."""
    losses = _losses(logits, targets, need_grad)
    return losses, logits if need_grad else None

"""What the kernels compute, in plain PyTorch: one function each. Read this first; the files beside it say how it is
made fast on a GPU. It is also what runs on a CPU.

Layout is (B, T, H, D) everywhere, batch, time, head, channel: what a projection's `.view` gives.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def attention_by_products(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v, written out. q (B, Tq, Hq, D); k, v (B, Tk, Hkv, D) -> (B, Tq, Hq, D).

    On a CPU with bf16 matrix units its backward is several times faster than SDPA's. It keeps the scores.
    """
    (B, Tq, Hq, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    q = q.reshape(B, Tq, Hkv, -1, D).permute(0, 2, 3, 1, 4).reshape(B * Hkv, -1, D)  # (B*Hkv, G*Tq, D), G = Hq / Hkv
    k, v = (x.transpose(1, 2).reshape(B * Hkv, Tk, D) for x in (k, v))
    mask = q.new_full((Tq, Tk), -math.inf if causal else 0).triu(Tk - Tq + 1).repeat(Hq // Hkv, 1)  # (G*Tq, Tk)
    o = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5).softmax(-1) @ v  # (B*Hkv, G*Tq, D)
    return o.view(B, Hkv, -1, Tq, D).permute(0, 3, 1, 2, 4).reshape(B, Tq, Hq, D)


def attention(q, k, v, causal=True, lengths=None):
    """The same by PyTorch's own attention, and with all that `kernels.attention` allows."""
    (_, Tq, Hq, _), Hkv = q.shape, k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    Tk, mask, empty = k.shape[1], None, None
    if lengths is not None:  # beyond them a cache may hold anything, even NaN, and 0 * NaN is NaN
        invalid = (torch.arange(Tk, device=k.device) >= lengths[:, None])[..., None, None]  # (B, Tk, 1, 1)
        k, v = k.masked_fill(invalid, 0), v.masked_fill(invalid, 0)
    if lengths is not None or (causal and Tq != Tk and Tq > 1):
        length = lengths.clamp(0, Tk)[:, None] if lengths is not None else torch.full((1, 1), Tk, device=q.device)
        last = length - 1  # (B or 1, 1): the key that a query sees last
        if causal:
            last = length - Tq + torch.arange(Tq, device=q.device)  # (B or 1, Tq)
        mask = torch.arange(Tk, device=q.device) <= last[..., None]  # (B or 1, Tq or 1, Tk)
        empty = ~mask.any(-1, keepdim=True)  # (B or 1, Tq or 1, 1)
        mask = (mask | empty)[:, None]  # softmax over no key at all would be NaN: let it run over all, drop it below
    elif not q.is_cuda and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return attention_by_products(q, k, v, causal)
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask,  # (B, H, T, D)
        is_causal=causal and mask is None and Tq > 1, enable_gqa=Hq != Hkv,
    ).transpose(1, 2)  # (B, Tq, Hq, D)
    return (o if empty is None else o.masked_fill(empty[..., None], 0)).contiguous()


def apply_rope(x, cos, sin):
    """Each pair (x1, x2) = channels (i, i + D/2) turns by its token's angle. x (B, T, H, D); cos, sin (…, T, D/2)."""
    cos = torch.cat((cos, cos), -1)[..., None, :]  # (T, 1, D) or (B, T, 1, D)
    sin = torch.cat((-sin, sin), -1)[..., None, :]
    wide = x.float()
    return (wide * cos).add_(wide.roll(x.shape[-1] // 2, -1).mul_(sin)).to(x.dtype)  # x1 cos - x2 sin, x2 cos + x1 sin


def norm_forward(x, weight, eps, residual=None):
    """-> y = s r weight, s = x + residual, r = 1 / sqrt(mean(s^2) + eps); in float32 but for s and y."""
    s = x if residual is None else x + residual
    wide = s if s.dtype == torch.float64 else s.float()
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(s.shape[-1]).add_(eps).rsqrt_()  # (…, 1)
    return ((wide * r) if wide is s else wide.mul_(r).to(s.dtype)).mul_(weight), s, r


def norm_backward(dy, ds, s, weight, r, need_weight):
    """With n = s r and g = dy weight: d s = r (g - n mean(g n)) + what reaches s directly, d weight = sum over rows of
    dy n. Written out: autograd's own, pass after pass over large tensors, takes almost three times as long on a CPU."""
    wide, g = s.to(r.dtype), dy * weight if dy.dtype == r.dtype else dy.to(r.dtype).mul_(weight)
    mean = torch.linalg.vecdot(g, wide)[..., None] * r.pow(3) / s.shape[-1]  # (…, 1): r^2 mean(g n), as n is s r
    dx = g.mul_(r).addcmul_(wide, mean, value=-1).to(s.dtype)
    dx = dx if ds is None else dx.add_(ds)
    return dx, (dy * (wide * r).to(s.dtype).to(r.dtype)).flatten(0, -2).sum(0).to(weight.dtype) if need_weight else None


class RMSNorm(torch.autograd.Function):
    """The two above for autograd, or their kernels: (x, weight, eps, residual or None, the two) -> y, or y and s."""

    @staticmethod
    def forward(ctx, x, weight, eps, residual, forward, backward):
        y, s, r = forward(x, weight, eps, residual)
        ctx.save_for_backward(x if residual is None else s, weight, r)
        ctx.norm_backward = backward
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds=None):
        dx, dweight = ds, None
        need_x, need_weight, _, need_residual, *_ = ctx.needs_input_grad
        if dy is not None:  # else only the sum was used
            dx, dweight = ctx.norm_backward(dy, ds, *ctx.saved_tensors, need_weight)
        return dx if need_x else None, dweight if need_weight else None, None, dx if need_residual else None, None, None


def swiglu(gate, up):
    return F.silu(gate) * up


def int8_linear(x, weight, scale, dtype):
    """x (…, K) W^T of W[n] = scale[n] * integers[n], multiplied in `dtype`. Never in float16: before it meets its scale
    a sum of products by integers up to 127 leaves its range."""
    return (F.linear(x.to(dtype), weight.to(dtype)) * scale.to(dtype)).to(x.dtype)


def loss_and_gradient(logits, targets, need_grad):
    """logits (n, V), targets (n,) -> the n losses, float32, and d loss / d logits in the dtype of logits (or None)."""
    losses, gradients = [], []
    few = 8 if logits.device.type == "cpu" else max(1, len(logits))  # of so few rows all stays in a CPU's cache
    for x, t in zip(logits.split(few), targets.split(few)):
        valid, index = t >= 0, t.clamp(min=0)[:, None]  # (few,), (few, 1)
        logp = x.log_softmax(-1, dtype=torch.float32)  # (few, V)
        losses.append(torch.where(valid, -logp.gather(1, index)[:, 0], 0))
        if need_grad:
            p = logp.exp_().scatter_add_(1, index, torch.full_like(logp[:, :1], -1))  # softmax - onehot
            gradients.append(p.mul_(valid[:, None]).to(x.dtype))
    return torch.cat(losses), torch.cat(gradients) if need_grad else None


class LinearCrossEntropy(torch.autograd.Function):
    """hidden (N, d), weight (V, d), targets (N,) -> the sum of the losses; `rows` of the N x V logits at a time.
    factors (N,): what each loss is multiplied by, or None.

    step: what turns logits into losses and their gradient, `loss_and_gradient` or its kernel. Since d loss / d logits
    needs nothing from later in the network, a chunk's share of both gradients is computed at once, and it is forgotten.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, factors, step, rows, need_hidden, need_weight):
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        # the weight's gradient is summed over all chunks: in float32, whatever the weight is
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for i in range(0, len(hidden), rows):
            h, t = hidden[i : i + rows], targets[i : i + rows]  # (n, d), (n,)
            losses, d_logits = step(h @ weight.t(), t, need_hidden or need_weight)  # (n,), (n, V)
            if factors is not None:
                losses = losses * factors[i : i + rows]
                d_logits = d_logits if d_logits is None else d_logits.mul_(factors[i : i + rows, None])
            loss = loss + losses.sum()  # not +=: from that, torch.compile of PyTorch 2.11 makes a gradient of zeros
            if need_hidden:
                d_hidden[i : i + rows] = d_logits @ weight  # (n, d)
            if need_weight:
                d_weight += d_logits.t() @ h  # (V, d)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype) if need_weight else None)
        return loss

    @staticmethod
    @once_differentiable  # the saved gradients are numbers: a second derivative would leave them out
    def backward(ctx, grad):
        # The chain rule's last factor, a scalar, is all that is missing; in float32, to which grad[None], no longer a
        # mere number, raises both: 1/n has no exact bfloat16, and rounded would make the whole gradient longer.
        return *(None if d is None else (d * grad[None]).to(d.dtype) for d in ctx.saved_tensors), *[None] * 6

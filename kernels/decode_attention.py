"""Attention of few queries against a long cache, in Triton: the keys are split over programs (flash-decoding).

    o = softmax(q k^T / sqrt(D)) v          q, o (B, Tq, Hq, D); k, v (B, Tk, Hkv, D)

        k, v of one head:   [ 0 .. 127 ][ 128 .. 255 ][ 256 .. 383 ] ...      one program each, which writes its own
                                 |            |             |                 softmax of these keys, o and lse
                                 '------------+-------------'
        o = sum of exp(lse - max) o over the programs, divided by the sum of exp(lse - max)       a second kernel

Arithmetic. A decoding step has one query a row, and a key and its value, 4 D bytes, take part in 4 G D operations only,
G query heads to a key head: the bound is reading the cache. One program a head would be 24 for Llama-3.2-3B, and leave
108 of an H200's 132 processors idle; so the keys are split, and all queries of a key head share a tile, padded to the
16 rows that a tensor core wants. No backward: nobody trains through a cache.
"""

import torch
import triton
import triton.language as tl

from .attention import LOG2E, _dot, _load, _place, _with_strides
from .operators import operator

BLOCK_N = 64  # keys of a tile
PROGRAMS = 264  # two for each of an H200's processors
SHORTEST = 128  # keys of a program, unless there are fewer


@triton.jit(do_not_specialize=["Tq", "Tk", "chunk"])
def _attend(Q, stride_qb, stride_qt, stride_qh, K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh,
            Lengths, O, Lse, Tq, Tk, chunk, H, G, scale_log2, CAUSAL: tl.constexpr, D: tl.constexpr,
            BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program: BLOCK_M (query, head) pairs of one key head against `chunk` keys. O (splits, B, Tq, H, D) and Lse
    (splits, B, Tq, H), float32, are what these keys alone would give."""
    blocks = tl.cdiv(Tq * G, BLOCK_M)
    block, hk, b = _place(blocks, H // G)
    pair = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, h = pair // G, hk * G + pair % G
    channel = tl.arange(0, BLOCK_D)
    mask = (query < Tq)[:, None] & (channel < D)[None, :]
    q = tl.load(Q + (b * stride_qb + query.to(tl.int64) * stride_qt + h * stride_qh)[:, None] + channel[None, :],
                mask=mask, other=0.0)
    K += b * stride_kb + hk * stride_kh
    V += b * stride_vb + hk * stride_vh
    length = Tk
    if Lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(Lengths + b).to(tl.int32), 0), Tk)
    start = tl.program_id(1) * chunk
    end = tl.minimum(start + chunk, length)
    last = length - 1  # key that each query sees last
    if CAUSAL:
        last = length - Tq + query
        end = tl.minimum(end, tl.max(last, 0) + 1)

    m = tl.full((BLOCK_M,), -1e38, tl.float32)  # not -inf: a query may see none of these keys, and inf - inf is NaN
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start_n in range(start, end, BLOCK_N):
        k = _load(K, stride_kt, start_n, length, BLOCK_N, D, BLOCK_D, True)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))  # (BLOCK_M, BLOCK_N)
        key = start_n + tl.arange(0, BLOCK_N)
        visible = (key < end)[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= last[:, None])
        s = tl.where(visible, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
        correction = tl.math.exp2(m - m_new)
        l = l * correction + tl.sum(p, 1)
        v = _load(V, stride_vt, start_n, length, BLOCK_N, D, BLOCK_D, True)
        acc = _dot(p.to(v.dtype), v, acc * correction[:, None])
        m = m_new
    some = l > 0
    at = ((tl.program_id(1) * (tl.num_programs(0) // blocks // (H // G)) + b) * Tq + query) * H + h
    tl.store(O + at[:, None] * D + channel[None, :], acc / tl.where(some, l, 1.0)[:, None], mask=mask)
    tl.store(Lse + at, tl.where(some, m + tl.log2(l), float("-inf")), mask=query < Tq)


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine(Parts, Lse, O, rows, splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program joins the `splits` parts of one query and head. Where no key was seen at all: zeros."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    channel = tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + split.to(tl.int64) * rows + row, mask=split < splits, other=float("-inf"))
    weight = tl.math.exp2(lse - tl.maximum(tl.max(lse, 0), -1e38))
    part = tl.load(Parts + (split.to(tl.int64) * rows + row)[:, None] * D + channel[None, :],
                   mask=(split < splits)[:, None] & (channel < D)[None, :], other=0.0)  # (BLOCK_S, BLOCK_D)
    total = tl.sum(weight, 0)
    o = tl.sum(weight[:, None] * part, 0) / tl.where(total > 0, total, 1.0)
    tl.store(O + row * D + channel, o.to(O.dtype.element_ty), mask=channel < D)


@operator("decode_attention(Tensor q, Tensor k, Tensor v, bool causal, Tensor? lengths) -> Tensor",
          lambda q, k, v, causal, lengths: q.new_empty(q.shape))
def decode_attention(o, q, k, v, causal, lengths):
    """`kernels.attention` for any Tq and Tk, without gradients."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    if Tk == 0:
        return o.zero_()
    G, rows = H // Hkv, B * Tq * H
    lengths = None if lengths is None else lengths.contiguous()
    BLOCK_M, BLOCK_D = 16 if Tq * G <= 16 else 64, 64 if D <= 64 else 128
    programs = triton.cdiv(Tq * G, BLOCK_M) * Hkv * B
    splits = max(1, min(PROGRAMS // programs, triton.cdiv(Tk, SHORTEST)))
    chunk = triton.cdiv(triton.cdiv(Tk, splits), BLOCK_N) * BLOCK_N
    parts, lse = (torch.empty((splits, rows, *more), dtype=torch.float32, device=q.device) for more in ((D,), ()))
    _attend[(programs, splits)](*_with_strides(q, k, v), lengths, parts, lse, Tq, Tk, chunk, H, G, D**-0.5 * LOG2E,
                                causal, D, BLOCK_M, BLOCK_N, BLOCK_D, num_warps=4, num_stages=2)
    _combine[(rows,)](parts, lse, o, rows, splits, D, triton.next_power_of_2(splits), BLOCK_D, num_warps=4)

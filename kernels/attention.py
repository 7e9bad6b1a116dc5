"""FlashAttention, forward and backward, in Triton (Dao 2023, FlashAttention-2, arXiv 2307.08691).

The problem. Attention is three lines,

    S = q k^T / sqrt(D)        P = softmax(S)        o = P v

but S and P are (T, T) per head: written out, they are most of the memory and, since each number takes part in very
little arithmetic, most of the time. FlashAttention never writes them. One program takes a tile of queries, walks over
the keys and values tile by tile, and S and P exist only as (BLOCK_M, BLOCK_N) tiles in registers.

Forward: the online softmax. A softmax needs the row's maximum and sum over *all* keys, of which only some have been
seen. So keep a running maximum m, a running sum l, and an accumulator acc of exp(s - m) v. When a tile brings a larger
maximum m', everything so far was scaled by exp(-m) and should have been by exp(-m'): multiply l and acc by exp(m - m').
After the last tile o = acc / l. One number per row is kept for the backward: the log-sum-exp, lse = m + log(l).

Backward: recompute instead of remember. With lse, a tile of P is recovered in one step, p = exp(s - lse). Then

    dv = P^T do        dP = do v^T        dS = P * (dP - delta)        dq = dS k / sqrt(D)        dk = dS^T q / sqrt(D)

where delta_i = sum_j P_ij dP_ij is the softmax's own coupling along a row; as sum_j P_ij (do_i . v_j) = do_i . o_i,
it is known before the walk begins. dk and dv sum over queries, dq sums over keys: two kernels, each owning the tile
that it sums into. P is computed twice, but no two programs ever add to one number, so there are no atomics and two
runs agree to the bit. A gradient nobody asked for costs nothing: its kernel is not launched.

Also in here:
- Grouped-query attention: query head h reads key/value head h // G, by address; nothing is repeated. The dk, dv program
  walks over all G query heads of its group.
- exp2 instead of exp, since that is the GPU's instruction: the scores carry a factor log2(e), and lse is in base 2.
- Masks cost only where they cut: the diagonal and the ragged end of a sequence have one loop, the tiles that every
  query sees in full have another without any mask. So length 577 or 579 runs like 576.
- RoPE. q is rotated while it is loaded, once per tile; a key tile however is loaded by every query tile of G heads, so
  the keys, which are few, are rotated once into a buffer, rather than T/BLOCK_M * G times in the innermost loop.
  The backward reads the rotated q and k (kept *instead of* q and k), and turns dq and dk back before it stores them.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")  # Triton's debugger: Python and NumPy, no GPU
LOG2E = tl.constexpr(1.4426950408889634)

# Tile shapes by (padded) head dim: BLOCK_M queries, BLOCK_N keys, warps, pipeline stages. Chosen from the compiler's
# reports; of "large", forward and dkdv of 128 by their times on an H200. Fixed rather than left to @triton.autotune, so
# that nobody waits at the first call with a new shape and every run sums in the same order; `python -m
# kernels.benchmark --tune` times the alternatives, `--compile` shows what the compiler makes of them.
CONFIGS = {
    # chips with 228 KB of shared memory: H100, H200, B200. With three stages the copy of the next tile overlaps with
    # the current one: it was begun a whole tile ago. With two it is begun only when the current one has been used.
    "large": {
        "forward": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (64, 64, 4, 3)},
        "dkdv": {16: (64, 128, 8, 3), 32: (64, 128, 8, 3), 64: (64, 128, 8, 3), 128: (64, 128, 8, 3)},
        "dq": {16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    },
    # all others that the kernels run on: they have 99 KB at least
    "small": {
        "forward": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (128, 64, 4, 3), 128: (64, 64, 4, 2)},
        "dkdv": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (32, 64, 4, 2)},
        "dq": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 32, 4, 2)},
    },
    # float32 on any chip: no tensor cores at full precision, and twice the bytes
    "float32": {
        "forward": {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (64, 32, 8, 2), 128: (16, 64, 4, 2)},
        "dkdv": {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (32, 32, 4, 1), 128: (32, 32, 8, 2)},
        "dq": {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2)},
    },
}


def config(kernel, D, dtype, Tq, large=True):
    """Launch options of `kernel` ("forward", "dkdv" or "dq") for head dim D and Tq queries."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    chip = "float32" if dtype == torch.float32 and not INTERPRET.value else "large" if large else "small"
    BLOCK_M, BLOCK_N, num_warps, num_stages = CONFIGS[chip][kernel][BLOCK_D]
    if kernel == "forward" and Tq <= 16:  # a decoding step: few queries, many keys
        BLOCK_M, BLOCK_N, num_warps, num_stages = 16, 64, 4, 3 if chip == "large" else 2
    return dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=num_warps, num_stages=num_stages)


def _config(kernel, q):
    large = not q.is_cuda or torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin >= 220 * 1024
    return config(kernel, q.shape[3], q.dtype, q.shape[1], large)


# ---------------------------------------------------------------------------------------------------------------------
# What all kernels share: tiles of (tokens, channels), from and to (B, T, H, D) tensors of any strides.


@triton.jit
def _channels(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channel that each column of a tile holds, and whether it holds one at all.

    Tiles are powers of two wide; head dim 80 sits in one of 128. RoPE pairs channel i with i + D/2, so each *half* is
    padded, 40 of 64 columns twice, and the partner of a column is always the one half a tile away.
    """
    column = tl.arange(0, BLOCK_D)
    if D == BLOCK_D:
        channel = column
    else:
        channel = column // (BLOCK_D // 2) * (D // 2) + column % (BLOCK_D // 2)
        channel = tl.max_contiguous(tl.multiple_of(channel, 4), 4)  # else the compiler would load one by one
    return channel, column % (BLOCK_D // 2) < D // 2


@triton.jit
def _load(x, stride_t, stride_d, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
          MASKED: tl.constexpr):
    """Tokens start .. start + BLOCK - 1 of one head as a (BLOCK, BLOCK_D) tile. MASKED: zeros from token `end` on."""
    row = tl.arange(0, BLOCK)
    channel, exists = _channels(D, BLOCK_D)
    # The start may lie beyond 2^31 elements, which takes 64 bits; the way within a tile does not (`_near` sees to it).
    x += tl.cast(start, tl.int64) * stride_t
    pointers = x + (row[:, None] * stride_t + channel[None, :] * stride_d)
    if MASKED and D == BLOCK_D:
        return tl.load(pointers, mask=(start + row < end)[:, None], other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=(start + row < end)[:, None] & exists[None, :], other=0.0)
    elif D < BLOCK_D:
        return tl.load(pointers, mask=exists[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(x, tile, stride_t, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    channel, exists = _channels(D, BLOCK_D)
    x += tl.cast(start, tl.int64) * stride_t
    pointers = x + (row[:, None] * stride_t + channel[None, :])
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=(start + row < end)[:, None] & exists[None, :])


@triton.jit
def _load_angles(Cos, Sin, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin, (BLOCK, BLOCK_D/2) each, of tokens start .. start + BLOCK - 1, from contiguous tables (T, D/2)."""
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK_D // 2)
    at = tl.cast(start, tl.int64) * (D // 2) + (row[:, None] * (D // 2) + column[None, :])
    mask = (start + row < end)[:, None] & (column < D // 2)[None, :]
    return tl.load(Cos + at, mask=mask, other=0.0), tl.load(Sin + at, mask=mask, other=0.0)


@triton.jit
def _rotate(x, cos, sin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """RoPE on a tile x (BLOCK, BLOCK_D), float32: the pair (x1, x2) = columns (i, i + BLOCK_D/2) turns by its angle."""
    x = tl.permute(tl.reshape(x, (BLOCK, 2, BLOCK_D // 2)), (0, 2, 1))  # (BLOCK, BLOCK_D/2, 2)
    x1, x2 = tl.split(x)
    y = tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    return tl.reshape(tl.permute(y, (0, 2, 1)), (BLOCK, BLOCK_D))


@triton.jit
def _dot(a, b, c):
    """c + a @ b on the tensor cores, summed in float32. Float32 inputs keep all their bits ("ieee", not TF32's ten)."""
    if INTERPRET:  # NumPy has no bfloat16; the products of two of them are exact in float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _length(Lengths, b, Tk):
    """How many keys row b of the batch has: Tk, or Lengths[b] where lengths were given."""
    length = Tk
    if Lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(Lengths + b).to(tl.int32), 0), Tk)
    return length


@triton.jit
def _key_range(position, length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, end): keys 0 .. full - 1, whole tiles, are visible to all BLOCK_M queries, of which the first sits at
    `position`; from `end` on no key is visible to any.

    What lies between, the tiles with a mask, is never empty, and its loop comes first. That matters on Hopper, whose
    tensor cores work on while the program does: if the first loop could run zero times, the assembler could not rule
    out that something else writes into the accumulator meanwhile, and would wait after every product (ptxas' C7515).
    """
    if CAUSAL:
        full = tl.maximum(tl.minimum(position + 1, length - 1), 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(position + BLOCK_M, length)
    else:
        full = tl.maximum(length - 1, 0) // BLOCK_N * BLOCK_N
        end = length
    return full, tl.maximum(end, full + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Forward: a program owns BLOCK_M queries of one head.


@triton.jit
def _forward(Q, stride_qb, stride_qt, stride_qh, stride_qd, K, stride_kb, stride_kt, stride_kh, stride_kd,
             V, stride_vb, stride_vt, stride_vh, stride_vd, Lengths, Cos, Sin, O, Lse, Rotated_Q,
             Tq, Tk, H, G, scale, CAUSAL: tl.constexpr, D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    # Neighbouring programs share a head, and so its keys in the L2 cache. Among them the last queries, which under a
    # causal mask have the most keys to visit, go first: then no long program is left to run alone at the end.
    blocks = tl.cdiv(Tq, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (blocks - 1 - pid % blocks) * BLOCK_M
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    length = _length(Lengths, b, Tk)
    position = length - Tq + start_m  # the first query's position among the keys; negative if it sees none

    q = _load(Q + b * stride_qb + h * stride_qh, stride_qt, stride_qd, start_m, Tq, BLOCK_M, D, BLOCK_D, True)
    if Cos is not None:
        cos, sin = _load_angles(Cos, Sin, start_m, Tq, BLOCK_M, D, BLOCK_D)
        q = _rotate(q.to(tl.float32), cos, sin, BLOCK_M, BLOCK_D).to(q.dtype)
        if Rotated_Q is not None:
            _store(Rotated_Q + (b * Tq * H + h) * D, q, H * D, start_m, Tq, BLOCK_M, D, BLOCK_D)
    K += b * stride_kb + h // G * stride_kh
    V += b * stride_vb + h // G * stride_vh

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # running maximum, in base 2
    l = tl.zeros((BLOCK_M,), tl.float32)  # running sum
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, end = _key_range(position, length, CAUSAL, BLOCK_M, BLOCK_N)
    acc, m, l = _forward_keys(acc, m, l, q, K, stride_kt, stride_kd, V, stride_vt, stride_vd, full, end, position,
                              length, scale * LOG2E, True, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D)
    acc, m, l = _forward_keys(acc, m, l, q, K, stride_kt, stride_kd, V, stride_vt, stride_vd, 0, full, position,
                              length, scale * LOG2E, False, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D)

    # A query without a key has l = 0: its output is 0, and lse = +inf makes each exp2(s - lse) of the backward 0.
    empty = l == 0
    o = acc / tl.where(empty, 1.0, l)[:, None]
    lse = tl.where(empty, float("inf"), m + tl.log2(l))
    _store(O + (b * Tq * H + h) * D, o, H * D, start_m, Tq, BLOCK_M, D, BLOCK_D)
    row = start_m + tl.arange(0, BLOCK_M)
    tl.store(Lse + (b * H + h) * Tq + row, lse, mask=row < Tq)


@triton.jit
def _forward_keys(acc, m, l, q, K, stride_kt, stride_kd, V, stride_vt, stride_vd, start, end, position, length, scale,
                  MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Take the keys start .. end - 1 into the running softmax."""
    for start_n in range(start, end, BLOCK_N):
        k = _load(K, stride_kt, stride_kd, start_n, length, BLOCK_N, D, BLOCK_D, MASKED)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))  # (BLOCK_M, BLOCK_N)
        if MASKED:
            key = start_n + tl.arange(0, BLOCK_N)
            visible = (key < length)[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= (position + tl.arange(0, BLOCK_M))[:, None])
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        m_used = m_new
        if MASKED:  # a row may have seen no key yet: -inf - -inf would be NaN
            m_used = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.math.exp2(s * scale - m_used[:, None])
        correction = tl.math.exp2(m - m_used)
        l = l * correction + tl.sum(p, 1)
        v = _load(V, stride_vt, stride_vd, start_n, length, BLOCK_N, D, BLOCK_D, MASKED)
        acc = _dot(p.to(v.dtype), v, acc * correction[:, None])
        m = m_new
    return acc, m, l


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _prepare(O, dO, stride_db, stride_dt, stride_dh, stride_dd, Lse, Lse_padded, Delta, Tq, T_padded, H,
             D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The two numbers that the backward needs of each query: lse, and delta = sum over channels of o * do.

    Both (B, H, T_padded), where T_padded is a multiple of every tile: the loops over queries can read them without a
    mask, and in the padding find lse = inf, so p = 0, and delta = 0.
    """
    blocks = T_padded // BLOCK_M
    pid = tl.program_id(0)
    start_m = pid % blocks * BLOCK_M
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    row = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(Lse + (b * H + h) * Tq + row, mask=row < Tq, other=float("inf"))
    o = _load(O + (b * Tq * H + h) * D, H * D, 1, start_m, Tq, BLOCK_M, D, BLOCK_D, True)
    do = _load(dO + b * stride_db + h * stride_dh, stride_dt, stride_dd, start_m, Tq, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Lse_padded + (b * H + h) * T_padded + row, lse)
    tl.store(Delta + (b * H + h) * T_padded + row, delta)


@triton.jit
def _dkdv(Q, stride_qb, stride_qt, stride_qh, stride_qd, K, stride_kb, stride_kt, stride_kh, stride_kd,
          V, stride_vb, stride_vt, stride_vh, stride_vd, dO, stride_db, stride_dt, stride_dh, stride_dd,
          Lengths, Cos, Sin, Lse, Delta, dK, dV, Tq, T_padded, Tk, H, G, scale, CAUSAL: tl.constexpr, D: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns BLOCK_N keys of one key/value head and walks over the queries of all G heads that read it."""
    blocks = tl.cdiv(Tk, BLOCK_N)
    pid = tl.program_id(0)
    start_n = pid % blocks * BLOCK_N
    hk = (pid // blocks % (H // G)).to(tl.int64)
    b = (pid // blocks // (H // G)).to(tl.int64)
    length = _length(Lengths, b, Tk)
    position = length - Tq  # of query 0

    k = _load(K + b * stride_kb + hk * stride_kh, stride_kt, stride_kd, start_n, length, BLOCK_N, D, BLOCK_D, True)
    v = _load(V + b * stride_vb + hk * stride_vh, stride_vt, stride_vd, start_n, length, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    # queries before `start` see none of these keys, those from `full` on see all
    end = tl.where(start_n < length, Tq, 0)
    start, full = 0, 0
    if CAUSAL:
        start = tl.maximum(start_n - position, 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - position, 0), BLOCK_M) * BLOCK_M
    for h in range(hk * G, hk * G + G):
        Q_h = Q + b * stride_qb + h * stride_qh
        dO_h = dO + b * stride_db + h * stride_dh
        Lse_h = Lse + (b * H + h) * T_padded
        Delta_h = Delta + (b * H + h) * T_padded
        if CAUSAL:
            dk, dv = _dkdv_queries(dk, dv, k, v, Q_h, stride_qt, stride_qd, dO_h, stride_dt, stride_dd, Lse_h, Delta_h,
                                   start, tl.minimum(full, end), start_n, position, Tq, scale * LOG2E,
                                   True, D, BLOCK_M, BLOCK_N, BLOCK_D)
        dk, dv = _dkdv_queries(dk, dv, k, v, Q_h, stride_qt, stride_qd, dO_h, stride_dt, stride_dd, Lse_h, Delta_h,
                               full, end, start_n, position, Tq, scale * LOG2E,
                               False, D, BLOCK_M, BLOCK_N, BLOCK_D)

    # Keys beyond the length were loaded as zeros and gathered nonsense, each in its own row: drop it.
    valid = (start_n + tl.arange(0, BLOCK_N) < length)[:, None]
    dk = tl.where(valid, dk * scale, 0.0)
    dv = tl.where(valid, dv, 0.0)
    if Cos is not None:  # a rotation's transpose is the rotation by the opposite angle
        cos, sin = _load_angles(Cos, Sin, start_n, Tk, BLOCK_N, D, BLOCK_D)
        dk = _rotate(dk, cos, -sin, BLOCK_N, BLOCK_D)
    at = (b * Tk * (H // G) + hk) * D
    _store(dK + at, dk, H // G * D, start_n, Tk, BLOCK_N, D, BLOCK_D)
    _store(dV + at, dv, H // G * D, start_n, Tk, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dkdv_queries(dk, dv, k, v, Q, stride_qt, stride_qd, dO, stride_dt, stride_dd, Lse, Delta,
                  start, end, start_n, position, Tq, scale, MASKED: tl.constexpr, D: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add what the queries start .. end - 1 contribute. All tiles are transposed (keys down, queries across), because
    P^T and dS^T are what the sums need: they stay in registers as the left operand of the next product."""
    Q += tl.cast(start, tl.int64) * stride_qt
    dO += tl.cast(start, tl.int64) * stride_dt
    Lse += start
    Delta += start
    for start_m in range(start, end, BLOCK_M):
        q = _load(Q, stride_qt, stride_qd, 0, Tq - start_m, BLOCK_M, D, BLOCK_D, True)
        lse = tl.load(Lse + tl.arange(0, BLOCK_M))
        sT = _dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))  # (BLOCK_N, BLOCK_M)
        pT = tl.math.exp2(sT * scale - lse[None, :])
        if MASKED:
            key = start_n + tl.arange(0, BLOCK_N)
            row = start_m + tl.arange(0, BLOCK_M)  # in here: else key - row is kept in registers, a tile of them
            pT = tl.where(key[:, None] <= (position + row)[None, :], pT, 0.0)
        do = _load(dO, stride_dt, stride_dd, 0, Tq - start_m, BLOCK_M, D, BLOCK_D, True)
        dv = _dot(pT.to(do.dtype), do, dv)
        delta = tl.load(Delta + tl.arange(0, BLOCK_M))
        dpT = _dot(v, tl.trans(do), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
        dsT = pT * (dpT - delta[None, :])
        dk = _dot(dsT.to(q.dtype), q, dk)
        Q += BLOCK_M * stride_qt  # one step on: cheaper in registers than a 64-bit product for each tile
        dO += BLOCK_M * stride_dt
        Lse += BLOCK_M
        Delta += BLOCK_M
    return dk, dv


@triton.jit
def _dq(Q, stride_qb, stride_qt, stride_qh, stride_qd, K, stride_kb, stride_kt, stride_kh, stride_kd,
        V, stride_vb, stride_vt, stride_vh, stride_vd, dO, stride_db, stride_dt, stride_dh, stride_dd,
        Lengths, Cos, Sin, Lse, Delta, dQ, Tq, T_padded, Tk, H, G, scale, CAUSAL: tl.constexpr, D: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns BLOCK_M queries of one head and walks over their keys, exactly as in the forward."""
    blocks = tl.cdiv(Tq, BLOCK_M)
    pid = tl.program_id(0)
    start_m = (blocks - 1 - pid % blocks) * BLOCK_M
    h = (pid // blocks % H).to(tl.int64)
    b = (pid // blocks // H).to(tl.int64)
    length = _length(Lengths, b, Tk)
    position = length - Tq + start_m

    row = start_m + tl.arange(0, BLOCK_M)
    q = _load(Q + b * stride_qb + h * stride_qh, stride_qt, stride_qd, start_m, Tq, BLOCK_M, D, BLOCK_D, True)
    do = _load(dO + b * stride_db + h * stride_dh, stride_dt, stride_dd, start_m, Tq, BLOCK_M, D, BLOCK_D, True)
    lse = tl.load(Lse + (b * H + h) * T_padded + row)
    delta = tl.load(Delta + (b * H + h) * T_padded + row)
    K += b * stride_kb + h // G * stride_kh
    V += b * stride_vb + h // G * stride_vh

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, end = _key_range(position, length, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _dq_keys(dq, q, do, lse, delta, K, stride_kt, stride_kd, V, stride_vt, stride_vd, full, end, position, length,
                  scale * LOG2E, True, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D)
    dq = _dq_keys(dq, q, do, lse, delta, K, stride_kt, stride_kd, V, stride_vt, stride_vd, 0, full, position, length,
                  scale * LOG2E, False, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D)
    dq = dq * scale
    if Cos is not None:
        cos, sin = _load_angles(Cos, Sin, start_m, Tq, BLOCK_M, D, BLOCK_D)
        dq = _rotate(dq, cos, -sin, BLOCK_M, BLOCK_D)
    _store(dQ + (b * Tq * H + h) * D, dq, H * D, start_m, Tq, BLOCK_M, D, BLOCK_D)


@triton.jit
def _dq_keys(dq, q, do, lse, delta, K, stride_kt, stride_kd, V, stride_vt, stride_vd, start, end, position, length,
             scale, MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add what the keys start .. end - 1 contribute."""
    for start_n in range(start, end, BLOCK_N):
        k = _load(K, stride_kt, stride_kd, start_n, length, BLOCK_N, D, BLOCK_D, MASKED)
        v = _load(V, stride_vt, stride_vd, start_n, length, BLOCK_N, D, BLOCK_D, MASKED)
        s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))  # (BLOCK_M, BLOCK_N)
        p = tl.math.exp2(s * scale - lse[:, None])
        if MASKED:
            key = start_n + tl.arange(0, BLOCK_N)
            visible = (key < length)[None, :]
            if CAUSAL:
                visible = visible & (key[None, :] <= (position + tl.arange(0, BLOCK_M))[:, None])
            p = tl.where(visible, p, 0.0)
        dp = _dot(do, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        ds = p * (dp - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


# ---------------------------------------------------------------------------------------------------------------------
# RoPE on its own


@triton.jit
def _rope(X, stride_xb, stride_xt, stride_xh, stride_xd, Cos, Sin, stride_cb, Y, rows, T, H,
          INVERSE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program rotates BLOCK rows (token, head) of x (B, T, H, D) into y, contiguous."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = row % H
    t = row // H % T
    b = (row // H // T).to(tl.int64)
    i = tl.arange(0, BLOCK_D // 2)
    mask = (row < rows)[:, None] & (i < D // 2)[None, :]
    angle = (b * stride_cb + t * (D // 2))[:, None] + i[None, :]
    cos = tl.load(Cos + angle, mask=mask, other=0.0)
    sin = tl.load(Sin + angle, mask=mask, other=0.0)
    if INVERSE:
        sin = -sin
    x = X + (b * stride_xb + t.to(tl.int64) * stride_xt + h.to(tl.int64) * stride_xh)[:, None] + i[None, :] * stride_xd
    x1 = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + D // 2 * stride_xd, mask=mask, other=0.0).to(tl.float32)
    y = Y + row.to(tl.int64)[:, None] * D + i[None, :]
    tl.store(y, (x1 * cos - x2 * sin).to(Y.dtype.element_ty), mask=mask)
    tl.store(y + D // 2, (x2 * cos + x1 * sin).to(Y.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch operators around the kernels. As custom operators, torch.compile treats each as one opaque step.


@custom_op("kernels::rope", mutates_args=())
def _rope_op(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    (B, T, H, D), rows = x.shape, x.shape[0] * x.shape[1] * x.shape[2]
    y = x.new_empty((B, T, H, D))
    if rows == 0:
        return y
    cos, sin = cos.contiguous(), sin.contiguous()
    BLOCK_D = max(16, triton.next_power_of_2(D))
    BLOCK = 4096 // BLOCK_D
    with torch.cuda.device_of(x):
        _rope[(triton.cdiv(rows, BLOCK),)](x, *x.stride(), cos, sin, cos.stride(0) if cos.ndim == 3 else 0, y,
                                           rows, T, H, inverse, D, BLOCK, BLOCK_D, num_warps=4)
    return y


@_rope_op.register_fake
def _(x, cos, sin, inverse):
    return x.new_empty(x.shape)


def _rope_setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, dy):
    return _rope_op(dy, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope_op.register_autograd(_rope_backward, setup_context=_rope_setup)


def _near(x):
    """x, or a copy if its tokens or channels lie so far apart that 128 of them span more than 2^31 elements."""
    return x if 128 * (x.stride(1) + x.stride(3)) < 2**31 else x.contiguous()


@custom_op("kernels::attention", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, causal: bool, lengths: Tensor | None, cos: Tensor | None,
                sin: Tensor | None, for_backward: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> o, lse, and for the backward the rotated q and k (where there is nothing to rotate or to keep: empty)."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    o = q.new_empty((B, Tq, H, D))
    lse = q.new_empty((B, H, Tq), dtype=torch.float32)
    rotated_q = q.new_empty((B, Tq, H, D) if cos is not None and for_backward else 0)
    rotated_k = k.new_empty(0)
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
        k = rotated_k = _rope_op(k, cos, sin, False)
    if q.numel() == 0:
        return o, lse, rotated_q, rotated_k
    q, k, v = _near(q), _near(k), _near(v)
    lengths = None if lengths is None else lengths.contiguous()
    options = _config("forward", q)
    with torch.cuda.device_of(q):
        _forward[(triton.cdiv(Tq, options["BLOCK_M"]) * H * B,)](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), lengths, cos, sin, o, lse,
            rotated_q if len(rotated_q) else None, Tq, Tk, H, H // Hkv, D**-0.5, causal, D, **options)
    return o, lse, rotated_q, rotated_k


@_forward_op.register_fake
def _(q, k, v, causal, lengths, cos, sin, for_backward):
    B, Tq, H, D = q.shape
    return (q.new_empty((B, Tq, H, D)), q.new_empty((B, H, Tq), dtype=torch.float32),
            q.new_empty(q.shape if cos is not None and for_backward else 0), k.new_empty(0 if cos is None else k.shape))


@custom_op("kernels::attention_backward", mutates_args=())
def _backward_op(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool,
                 lengths: Tensor | None, cos: Tensor | None, sin: Tensor | None, need_q: bool, need_kv: bool
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv (empty where not needed). q and k are the rotated ones if there are cos and sin."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    dq = q.new_empty((B, Tq, H, D) if need_q else 0)
    dk, dv = (k.new_empty((B, Tk, Hkv, D) if need_kv else 0) for _ in range(2))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    if cos is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    do, q, k, v = _near(do), _near(q), _near(k), _near(v)
    lengths = None if lengths is None else lengths.contiguous()
    T_padded = triton.cdiv(Tq, 128) * 128
    lse_padded, delta = (lse.new_empty((B, H, T_padded)) for _ in range(2))
    inputs = (q, *q.stride(), k, *k.stride(), v, *v.stride(), do, *do.stride(), lengths, cos, sin, lse_padded, delta)
    sizes = (Tq, T_padded, Tk, H, H // Hkv, D**-0.5, causal, D)
    with torch.cuda.device_of(q):
        BLOCK_D = max(16, triton.next_power_of_2(D))
        _prepare[(T_padded // 64 * H * B,)](o, do, *do.stride(), lse, lse_padded, delta, Tq, T_padded, H, D, 64,
                                            BLOCK_D, num_warps=4)
        if need_q:
            options = _config("dq", q)
            _dq[(triton.cdiv(Tq, options["BLOCK_M"]) * H * B,)](*inputs, dq, *sizes, **options)
        if need_kv:
            options = _config("dkdv", q)
            _dkdv[(triton.cdiv(Tk, options["BLOCK_N"]) * Hkv * B,)](*inputs, dk, dv, *sizes, **options)
    return dq, dk, dv


@_backward_op.register_fake
def _(do, q, k, v, o, lse, causal, lengths, cos, sin, need_q, need_kv):
    return (q.new_empty(q.shape if need_q else 0), k.new_empty(k.shape if need_kv else 0),
            v.new_empty(v.shape if need_kv else 0))


def _setup(ctx, inputs, output):
    q, k, v, ctx.causal, lengths, cos, sin, _ = inputs
    o, lse, rotated_q, rotated_k = output
    if cos is not None:
        q, k = rotated_q, rotated_k
    ctx.save_for_backward(q, k, v, o, lse, lengths, cos, sin)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, *_):
    if do is None:
        return (None,) * 8
    q, k, v, o, lse, lengths, cos, sin = ctx.saved_tensors
    need_q, need_k, need_v = ctx.needs_input_grad[:3]
    dq, dk, dv = _backward_op(do, q, k, v, o, lse, ctx.causal, lengths, cos, sin, need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, None, None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup)


def flash_attention(q, k, v, causal=True, lengths=None, rope=None):
    """`kernels.attention` on Triton; arguments are checked there."""
    cos, sin = rope if rope is not None else (None, None)
    for_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return _forward_op(q, k, v, causal, lengths, cos, sin, for_backward)[0]


def rope(x, cos, sin):
    """`kernels.apply_rope` on Triton."""
    return _rope_op(x, cos, sin, False)

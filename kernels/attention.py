"""FlashAttention, forward and backward, in Triton (Dao 2023, FlashAttention-2, arXiv 2307.08691).

    S = q k^T / sqrt(D)        P = softmax(S)        o = P v

                 k, v                   A program of the forward owns one row of tiles, BLOCK_M queries of one head. It
             [ ][ ][ ][ ]               reads its queries once, walks over the keys and values up to the diagonal, and
       q [ ] [x]                        writes o and one number a query. S and P exist as one tile each, in registers.
         [ ] [ ][x]                     Of the backward's two kernels dq walks in the same way, dk and dv down a column:
         [ ] [ ][ ][x]                  each number is summed by one program, so two runs agree to the bit.

Arithmetic. Forward 4 T^2 D operations a head, half of that if causal; the backward, which computes P anew, 2.5 times as
many. Read and written, with 16 bits and as many key heads as query heads: 8 T D bytes. T / 2 operations a byte, where
an H200 does 190 while it moves one: from some 400 positions on arithmetic is the bound. (Written out, P alone would be
2 T^2 bytes, there and back again: T / D times as much as q, k, v and o together.)

Forward: the online softmax keeps, of the keys seen so far, the maximum m, the sum l of exp(s - m), and acc, the sum of
exp(s - m) v. When a tile brings a larger maximum m', l and acc are multiplied by exp(m - m'). After the last tile
o = acc / l; and the backward is left one number a query, the log-sum-exp lse = m + log(l).

Backward: recompute instead of remember. With lse, a tile of P is recovered in one step, p = exp(s - lse). Then

    dv = P^T do        dP = do v^T        dS = P * (dP - delta)        dq = dS k / sqrt(D)        dk = dS^T q / sqrt(D)

where delta_i = sum_j P_ij dP_ij = do_i . o_i, the softmax's own coupling along a row, is known before the walk begins.

- Grouped-query attention: query head h reads key/value head h // G, by address; nothing is repeated.
- exp2 is the GPU's instruction, not exp: the scores carry a factor log2(e), and lse is in base 2.
- Masks cost only where they cut: the tiles that every query sees in full have a loop of their own without any.
- T varies from batch to batch: `do_not_specialize`, or Triton would compile anew for multiples of 16.
"""

import os

import torch
import triton
import triton.language as tl

from .operators import operator

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")  # Triton's debugger: Python and NumPy, no GPU
LOG2E = 1.4426950408889634

# Tile shapes, (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages) for head dims up to 64 and up to 128. BLOCK_M
# divides 128, to which lse and delta are padded. Chosen from the compiler's reports; "large" by its times on an H200.
# Fixed, not @triton.autotune's: nobody waits at a new shape, and every run sums in the same order.
CONFIGS = {
    # chips with 228 KB of shared memory: H100, H200, B200. With three stages a tile's copy is begun two tiles ahead.
    "large": dict(forward=((128, 64, 4, 3), (64, 64, 4, 3)), dkdv=((64, 128, 8, 3), (64, 128, 8, 3)),
                  dq=((128, 64, 8, 3), (128, 64, 8, 3))),
    # all others that the kernels run on: they have 99 KB at least
    "small": dict(forward=((128, 64, 4, 3), (64, 64, 4, 2)), dkdv=((64, 64, 4, 2), (32, 64, 4, 2)),
                  dq=((64, 64, 4, 2), (64, 32, 4, 2))),
    # float32 on any chip: no tensor cores at full precision, and twice the bytes
    "float32": dict(forward=((64, 32, 8, 2), (16, 64, 4, 2)), dkdv=((32, 32, 4, 1), (32, 32, 8, 2)),
                    dq=((64, 32, 8, 2), (32, 32, 8, 2))),
}


def config(kernel, q):
    """Launch options of `kernel` ("forward", "dkdv" or "dq") for queries like q."""
    chip, wide = "large", q.shape[3] > 64
    if q.is_cuda and torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin < 220 * 1024:
        chip = "small"
    if q.dtype == torch.float32 and not INTERPRET.value:
        chip = "float32"
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return dict(zip(names, CONFIGS[chip][kernel][wide]), BLOCK_D=128 if wide else 64)


@triton.jit
def _place(blocks, H):
    """This program's block of tokens, head, and row of the batch. Neighbours share a head, and so its keys in L2."""
    pid = tl.program_id(0)
    return pid % blocks, (pid // blocks % H).to(tl.int64), (pid // blocks // H).to(tl.int64)


@triton.jit
def _load(x, stride_t, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Tokens start .. start + BLOCK - 1 of one head as a (BLOCK, BLOCK_D) tile. MASKED: zeros from token `end` on.
    Channels are neighbours in memory."""
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    # The start may lie beyond 2^31 elements, which takes 64 bits; the way within a tile does not (see `_with_strides`).
    x += tl.cast(start, tl.int64) * stride_t
    pointers = x + (row[:, None] * stride_t + channel[None, :])
    if not MASKED and D == BLOCK_D:
        return tl.load(pointers)
    mask = (channel < D)[None, :]
    if MASKED:
        mask = (start + row < end)[:, None] & mask
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store(x, tile, stride_t, start, end, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, BLOCK)
    channel = tl.arange(0, BLOCK_D)
    x += tl.cast(start, tl.int64) * stride_t
    pointers = x + (row[:, None] * stride_t + channel[None, :])
    tl.store(pointers, tile.to(x.dtype.element_ty), mask=(start + row < end)[:, None] & (channel < D)[None, :])


@triton.jit
def _dot(a, b, c):
    """c + a @ b on the tensor cores, summed in float32. Float32 inputs keep all their bits ("ieee", not TF32's ten)."""
    if INTERPRET:  # NumPy has no bfloat16; the products of two of them are exact in float32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _key_range(start_m, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(full, end): keys 0 .. full - 1, whole tiles, are visible to all BLOCK_M queries from start_m on; from `end` on
    none is. What lies between, the tiles with a mask, is never empty, and its loop comes first: if it could run zero
    times, the assembler would wait after every product of Hopper's tensor cores, which work on while the program does,
    since it could not rule out that something else writes into the accumulator meanwhile (ptxas' C7515)."""
    if CAUSAL:
        full = tl.minimum(start_m + 1, T - 1) // BLOCK_N * BLOCK_N
        end = tl.minimum(start_m + BLOCK_M, T)
    else:
        full = (T - 1) // BLOCK_N * BLOCK_N
        end = T
    return full, tl.maximum(end, full + 1)


@triton.jit
def _visible(start_m, start_n, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which of the keys from start_n on each query from start_m on sees: (BLOCK_M, BLOCK_N)."""
    key = start_n + tl.arange(0, BLOCK_N)
    visible = (key < T)[None, :]
    if CAUSAL:
        visible = visible & (key[None, :] <= (start_m + tl.arange(0, BLOCK_M))[:, None])
    return visible


@triton.jit(do_not_specialize=["T"])
def _forward(Q, stride_qb, stride_qt, stride_qh, K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh,
             O, Lse, T, H, G, scale_log2, CAUSAL: tl.constexpr, D: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns BLOCK_M queries of one head. Of a head's programs the last queries, which under a causal mask have
    the most keys to visit, go first: then no long program is left to run alone at the end."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, h, b = _place(blocks, H)
    start_m = (blocks - 1 - block) * BLOCK_M
    q = _load(Q + b * stride_qb + h * stride_qh, stride_qt, start_m, T, BLOCK_M, D, BLOCK_D, True)
    K += b * stride_kb + h // G * stride_kh
    V += b * stride_vb + h // G * stride_vh

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # running maximum, in base 2
    l = tl.zeros((BLOCK_M,), tl.float32)  # running sum
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, end = _key_range(start_m, T, CAUSAL, BLOCK_M, BLOCK_N)
    start = full
    for MASKED in tl.static_range(1, -1, -1):  # written out twice: the tiles with a mask, then those without
        for start_n in range(start, end, BLOCK_N):
            k = _load(K, stride_kt, start_n, T, BLOCK_N, D, BLOCK_D, MASKED)
            s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))  # (BLOCK_M, BLOCK_N)
            if MASKED:
                s = tl.where(_visible(start_m, start_n, T, CAUSAL, BLOCK_M, BLOCK_N), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
            p = tl.math.exp2(s * scale_log2 - m_new[:, None])  # not -inf: of its first tile each query sees a key
            correction = tl.math.exp2(m - m_new)
            l = l * correction + tl.sum(p, 1)
            v = _load(V, stride_vt, start_n, T, BLOCK_N, D, BLOCK_D, MASKED)
            acc = _dot(p.to(v.dtype), v, acc * correction[:, None])
            m = m_new
        start, end = 0, full
    _store(O + (b * T * H + h) * D, acc / l[:, None], H * D, start_m, T, BLOCK_M, D, BLOCK_D)
    row = start_m + tl.arange(0, BLOCK_M)
    tl.store(Lse + (b * H + h) * T + row, m + tl.log2(l), mask=row < T)


@triton.jit(do_not_specialize=["T", "T_padded"])
def _prepare(O, dO, stride_db, stride_dt, stride_dh, Lse, Lse_padded, Delta, T, T_padded, H,
             D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The backward's two numbers of each query: lse, and delta = sum over channels of o * do. Both (B, H, T_padded),
    whole tiles: the loops over queries read them without a mask, and find lse = inf, so p = 0, in the padding."""
    block, h, b = _place(T_padded // BLOCK_M, H)
    start_m = block * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)
    lse = tl.load(Lse + (b * H + h) * T + row, mask=row < T, other=float("inf"))
    o = _load(O + (b * T * H + h) * D, H * D, start_m, T, BLOCK_M, D, BLOCK_D, True)
    do = _load(dO + b * stride_db + h * stride_dh, stride_dt, start_m, T, BLOCK_M, D, BLOCK_D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(Lse_padded + (b * H + h) * T_padded + row, lse)
    tl.store(Delta + (b * H + h) * T_padded + row, delta)


@triton.jit(do_not_specialize=["T", "T_padded"])
def _dkdv(Q, stride_qb, stride_qt, stride_qh, K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh,
          dO, stride_db, stride_dt, stride_dh, Lse, Delta, dK, dV, T, T_padded, H, G, scale, scale_log2,
          CAUSAL: tl.constexpr, D: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns BLOCK_N keys of one key/value head and walks over the queries of all G heads that read it."""
    block, hk, b = _place(tl.cdiv(T, BLOCK_N), H // G)
    start_n = block * BLOCK_N
    k = _load(K + b * stride_kb + hk * stride_kh, stride_kt, start_n, T, BLOCK_N, D, BLOCK_D, True)
    v = _load(V + b * stride_vb + hk * stride_vh, stride_vt, start_n, T, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for h in range(hk * G, hk * G + G):
        # queries before `start` see none of these keys, those from `full` on see all
        start, full = 0, 0
        if CAUSAL:
            start = start_n // BLOCK_M * BLOCK_M
            full = tl.minimum(tl.cdiv(start_n + BLOCK_N - 1, BLOCK_M) * BLOCK_M, T)
        end = full
        for MASKED in tl.static_range(1, -1, -1):
            if CAUSAL or not MASKED:
                Q_m = Q + b * stride_qb + h * stride_qh + tl.cast(start, tl.int64) * stride_qt
                dO_m = dO + b * stride_db + h * stride_dh + tl.cast(start, tl.int64) * stride_dt
                at = (b * H + h) * T_padded + start + tl.arange(0, BLOCK_M)
                for start_m in range(start, end, BLOCK_M):
                    # All tiles are transposed (keys down, queries across), because P^T and dS^T are what the sums
                    # need: they stay in registers as the left operand of the next product.
                    q = _load(Q_m, stride_qt, 0, T - start_m, BLOCK_M, D, BLOCK_D, True)
                    sT = _dot(k, tl.trans(q), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))  # (BLOCK_N, BLOCK_M)
                    pT = tl.math.exp2(sT * scale_log2 - tl.load(Lse + at)[None, :])
                    if MASKED:
                        key = start_n + tl.arange(0, BLOCK_N)
                        row = start_m + tl.arange(0, BLOCK_M)  # in here: else key - row is kept in registers, a tile
                        pT = tl.where(key[:, None] <= row[None, :], pT, 0.0)
                    do = _load(dO_m, stride_dt, 0, T - start_m, BLOCK_M, D, BLOCK_D, True)
                    dv = _dot(pT.to(do.dtype), do, dv)
                    dpT = _dot(v, tl.trans(do), tl.zeros((BLOCK_N, BLOCK_M), tl.float32))
                    dsT = pT * (dpT - tl.load(Delta + at)[None, :])
                    dk = _dot(dsT.to(q.dtype), q, dk)
                    Q_m += BLOCK_M * stride_qt  # one step on: cheaper in registers than a 64-bit product for each tile
                    dO_m += BLOCK_M * stride_dt
                    at += BLOCK_M
            start, end = full, T
    at = (b * T * (H // G) + hk) * D
    _store(dK + at, dk * scale, H // G * D, start_n, T, BLOCK_N, D, BLOCK_D)
    _store(dV + at, dv, H // G * D, start_n, T, BLOCK_N, D, BLOCK_D)


@triton.jit(do_not_specialize=["T", "T_padded"])
def _dq(Q, stride_qb, stride_qt, stride_qh, K, stride_kb, stride_kt, stride_kh, V, stride_vb, stride_vt, stride_vh,
        dO, stride_db, stride_dt, stride_dh, Lse, Delta, dQ, T, T_padded, H, G, scale, scale_log2, CAUSAL: tl.constexpr,
        D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """A program owns BLOCK_M queries of one head and walks over their keys, exactly as in the forward."""
    blocks = tl.cdiv(T, BLOCK_M)
    block, h, b = _place(blocks, H)
    start_m = (blocks - 1 - block) * BLOCK_M
    row = start_m + tl.arange(0, BLOCK_M)
    q = _load(Q + b * stride_qb + h * stride_qh, stride_qt, start_m, T, BLOCK_M, D, BLOCK_D, True)
    do = _load(dO + b * stride_db + h * stride_dh, stride_dt, start_m, T, BLOCK_M, D, BLOCK_D, True)
    lse = tl.load(Lse + (b * H + h) * T_padded + row)
    delta = tl.load(Delta + (b * H + h) * T_padded + row)
    K += b * stride_kb + h // G * stride_kh
    V += b * stride_vb + h // G * stride_vh
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full, end = _key_range(start_m, T, CAUSAL, BLOCK_M, BLOCK_N)
    start = full
    for MASKED in tl.static_range(1, -1, -1):
        for start_n in range(start, end, BLOCK_N):
            k = _load(K, stride_kt, start_n, T, BLOCK_N, D, BLOCK_D, MASKED)
            v = _load(V, stride_vt, start_n, T, BLOCK_N, D, BLOCK_D, MASKED)
            s = _dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))  # (BLOCK_M, BLOCK_N)
            p = tl.math.exp2(s * scale_log2 - lse[:, None])
            if MASKED:
                p = tl.where(_visible(start_m, start_n, T, CAUSAL, BLOCK_M, BLOCK_N), p, 0.0)
            dp = _dot(do, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
            ds = p * (dp - delta[:, None])
            dq = _dot(ds.to(k.dtype), k, dq)
        start, end = 0, full
    _store(dQ + (b * T * H + h) * D, dq * scale, H * D, start_m, T, BLOCK_M, D, BLOCK_D)


def _with_strides(*tensors):
    """Each tensor and its first three strides, as kernels take them; of a copy where neighbouring channels are not
    neighbours in memory, or 128 tokens span 2^31 elements."""
    near = (x if x.stride(3) == 1 and 128 * x.stride(1) < 2**31 else x.contiguous() for x in tensors)
    return [argument for x in near for argument in (x, *x.stride()[:3])]


@operator("attention(Tensor q, Tensor k, Tensor v, bool causal) -> (Tensor, Tensor)", lambda q, k, v, causal: (
    q.new_empty(q.shape), q.new_empty((len(q), q.shape[2], q.shape[1]), dtype=torch.float32)))
def attention(o, lse, q, k, v, causal):
    """-> o (B, T, H, D), lse (B, H, T), for as many queries as keys."""
    (B, T, H, D), Hkv, options = q.shape, k.shape[2], config("forward", q)
    _forward[(triton.cdiv(T, options["BLOCK_M"]) * H * B,)](*_with_strides(q, k, v), o, lse, T, H, H // Hkv,
                                                            D**-0.5 * LOG2E, causal, D, **options)


@operator("attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool causal, bool need_q,"
          " bool need_kv) -> (Tensor, Tensor, Tensor)", lambda do, q, k, v, o, lse, causal, need_q, need_kv: tuple(
              x.new_empty(x.shape if need else 0) for x, need in ((q, need_q), (k, need_kv), (v, need_kv))))
def _attention_backward(dq, dk, dv, do, q, k, v, o, lse, causal, need_q, need_kv):
    """-> dq, dk, dv (empty where not needed)."""
    (B, T, H, D), Hkv = q.shape, k.shape[2]
    T_padded = triton.cdiv(T, 128) * 128
    lse_padded, delta = (lse.new_empty((B, H, T_padded)) for _ in range(2))
    inputs = _with_strides(q, k, v, do)
    sizes = (T, T_padded, H, H // Hkv, D**-0.5, D**-0.5 * LOG2E, causal, D)
    _prepare[(T_padded // 64 * H * B,)](o, *inputs[-4:], lse, lse_padded, delta, T, T_padded, H, D, 64,
                                        64 if D <= 64 else 128, num_warps=4)
    if need_q:
        options = config("dq", q)
        _dq[(triton.cdiv(T, options["BLOCK_M"]) * H * B,)](*inputs, lse_padded, delta, dq, *sizes, **options)
    if need_kv:
        options = config("dkdv", q)
        _dkdv[(triton.cdiv(T, options["BLOCK_N"]) * Hkv * B,)](*inputs, lse_padded, delta, dk, dv, *sizes, **options)


def _setup(ctx, inputs, output):
    *saved, ctx.causal = inputs
    ctx.save_for_backward(*saved, *output)
    ctx.set_materialize_grads(False)  # nobody has one for lse


def _gradients(ctx, do, _):
    need_q, need_k, need_v, _ = ctx.needs_input_grad
    dq, dk, dv = _attention_backward(do, *ctx.saved_tensors, ctx.causal, need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, None


attention.register_autograd(_gradients, setup_context=_setup)

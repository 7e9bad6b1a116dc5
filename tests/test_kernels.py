"""The kernels against float64 references: compiled on a GPU, elsewhere in Triton's interpreter (see conftest.py)."""
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import generate_slowly, refuses
from torch.utils.checkpoint import checkpoint

import kernels
from cli import UserError
from kernels.int8 import Int8Linear
from model import Llama, LlamaConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32: a CPU's BLAS may sum 9,001 products to 1.2e-6 (seen on AVX512, two threads)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
DTYPES = list(TOLERANCE)
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # NumPy's, where a GPU is silent
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
BACKENDS = ["torch", pytest.param("triton", marks=needs_triton)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with kernels.backend(request.param):
        yield request.param


@pytest.fixture
def triton_backend():
    with kernels.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Fresh memory is full of NaN, so that an element that no kernel writes shows up in the result."""
    new_empty = torch.Tensor.new_empty

    def poisoned(*args, **kwargs):
        x = new_empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def bfloat16_rounded_as_on_a_gpu(monkeypatch):
    """To the nearest: Triton's interpreter cuts the last bits off, and is as wrong as a GPU with one bit less."""
    if DEVICE == "cuda" or kernels.triton is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter
    convert = interpreter._convert_float

    def rounding(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.tensor(x).bfloat16().view(torch.int16).numpy().view("uint16")
    monkeypatch.setattr(interpreter, "_convert_float", rounding)


def randn(*shape, dtype=torch.float32, strided=False):
    """A leaf; with `strided`, a view that lies in memory as (B, H, T, D + 8) does: no stride is what it seems."""
    if strided:
        B, T, H, D = shape
        x = torch.randn(B, H, T, D + 8, device=DEVICE).to(dtype).transpose(1, 2)[..., :D]
    else:
        x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.requires_grad_()


def assert_close(ours, reference, dtype, what="", scale=0.0):
    """Relative error in the Euclidean norm. Where the reference is all but zero, relative to `scale` instead."""
    assert ours.shape == reference.shape, what
    norm = reference.norm().item()
    error = (ours.double() - reference).norm().item() / (norm if norm > 1e-3 * scale else scale or 1.0)
    slack = 10 if DEVICE == "cuda" and kernels._choice == "torch" else 1  # SDPA's choice of units is not ours
    assert error <= TOLERANCE[dtype] * slack, f"{what}: relative error {error:.1e}"  # false for NaN, too


def same(ours, others, tolerance=1e-5 if DEVICE == "cuda" else 0):
    """To the bit; on a GPU to rounding, since for other strides the compiler fuses other operations."""
    torch.testing.assert_close(list(ours), list(others), rtol=tolerance, atol=tolerance)


def check(function, reference, inputs, dtype):
    """Outputs and the gradients of all inputs that want one, against the same of `reference` in float64."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    results = []
    for f, xs in ((function, inputs), (reference, exact)):
        outputs = f(*xs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.manual_seed(1)
        grads = [torch.randn(o.shape, device=DEVICE).to(dtype).to(o.dtype) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [x for x in xs if x.requires_grad], grads)])
    scale = sum(g.double().norm().item() for g in grads)
    for i, (ours, exact) in enumerate(zip(*results)):
        assert_close(ours, exact, dtype, f"output {i}" if i < len(grads) else f"gradient {i - len(grads)}", scale)


# ---------------------------------------------------------------------------------------------------------------------
# References


def rotate(x, cos, sin):
    cos, sin = cos.double()[..., None, :], sin.double()[..., None, :]
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def attention(q, k, v, causal=True, lengths=None):
    """Straight from the definition, and with its own way of counting positions: a loop over the rows of the batch."""
    (B, Tq, H, D), (Tk, Hkv) = q.shape, k.shape[1:3]
    rows = []
    for b in range(B):
        n = Tk if lengths is None else min(int(lengths[b]), Tk)
        k_b, v_b = (x[b, :n].repeat_interleave(H // Hkv, dim=1) for x in (k, v))  # (n, H, D)
        s = torch.einsum("ihd,jhd->hij", q[b], k_b) / D**0.5
        sees = torch.ones(Tq, n, dtype=torch.bool, device=q.device)
        if causal:
            for i in range(Tq):
                sees[i, max(0, n - Tq + i + 1):] = False
        some = sees.any(-1)  # (Tq,)
        p = s.masked_fill(~(sees | ~some[:, None]), -torch.inf).softmax(-1) * some[:, None]
        rows.append(torch.einsum("hij,jhd->ihd", p, v_b))
    return torch.stack(rows)


def rms_norm(x, weight, residual=None):
    s = x if residual is None else x + residual
    y = s / (s.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    return y if residual is None else (y, s)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def some_of_all_cases():
    """Lengths x head dims x causal/full x GQA x dtypes x strides: all 540 on a GPU; in the interpreter, one in 11."""
    cases = list(itertools.product((1, 7, 64, 77, 129), (64, 80, 128), (True, False), (1, 3, 4), DTYPES, (False, True)))
    return cases if DEVICE == "cuda" else cases[::11]


@needs_triton
@pytest.mark.parametrize("T, D, causal, G, dtype, strided", some_of_all_cases())
def test_attention(triton_backend, T, D, causal, G, dtype, strided):
    inputs = tuple(randn(1, T, heads, D, dtype=dtype, strided=strided) for heads in (G, 1, 1))
    check(partial(kernels.attention, causal=causal), partial(attention, causal=causal), inputs, dtype)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_bfloat16_without_a_kernel(causal):
    """In training a CPU runs it by two products."""
    with kernels.backend("torch"):
        inputs = tuple(randn(2, 33, heads, 96, dtype=torch.bfloat16, strided=True) for heads in (4, 2, 2))
        check(partial(kernels.attention, causal=causal), partial(attention, causal=causal), inputs, torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("Tq, Tk, lengths", [
    (33, 33, None), (3, 65, None), (70, 129, None), (77, 7, None), (1, 77, (77, 5, 0)), (7, 77, (77, 64, 3))])
def test_queries_at_the_end_of_the_keys(backend, Tq, Tk, lengths, causal):
    """With gradients, and without: by the kernel that splits the keys. Beyond a row's length the cache may hold NaN."""
    B = len(lengths or "ab")
    q, k, v = randn(B, Tq, 4, 64), randn(B, Tk, 2, 64), randn(B, Tk, 2, 64)
    if lengths:
        lengths = torch.tensor(lengths, device=DEVICE).repeat_interleave(2)[::2]  # with a stride of its own
        for x in (k.data, v.data):
            x[torch.arange(Tk, device=DEVICE) >= lengths[:, None]] = float("nan")
    exact = [x.detach().nan_to_num().double().requires_grad_() for x in (q, k, v)]
    ours, reference = kernels.attention(q, k, v, causal, lengths), attention(*exact, causal, lengths)
    with torch.no_grad():
        untrained = kernels.attention(q, k, v, causal, lengths)
    for out in (ours, untrained):
        assert_close(out, reference, torch.float32)
        if lengths is not None:
            assert (out[lengths == 0] == 0).all()
        elif causal and Tq > Tk:  # the first queries lie before the first key
            assert (out[:, : Tq - Tk] == 0).all()
    do = torch.randn_like(ours)
    grads, exact = torch.autograd.grad(ours, (q, k, v), do), torch.autograd.grad(reference, exact, do.double())
    for ours, reference in zip(grads, exact):
        assert_close(ours, reference, torch.float32, "gradient", scale=do.norm().item())


@needs_triton
@pytest.mark.parametrize("Tq, D, dtype", [(1, 128, torch.bfloat16), (3, 80, torch.float16), (1, 16, torch.float32)])
def test_keys_split_over_programs(triton_backend, Tq, D, dtype):
    """Of 700 keys, six parts; lengths that leave some of them empty, or all."""
    q, k, v = (randn(3, T, heads, D, dtype=dtype, strided=True).detach() for T, heads in ((Tq, 6), (700, 2), (700, 2)))
    lengths = torch.tensor([700, 129, 0], device=DEVICE)
    for x in (k, v):
        x[torch.arange(700, device=DEVICE) >= lengths[:, None]] = float("nan")
    reference = attention(*(x.double().nan_to_num() for x in (q, k, v)), True, lengths)
    assert_close(kernels.attention(q, k, v, lengths=lengths), reference, dtype)


@needs_triton
def test_large_logits(triton_backend):
    q, k, v = (randn(1, 77, heads, 64) for heads in (3, 1, 1))
    with torch.no_grad():
        logits = torch.einsum("bihd,bjgd->bhij", q, k) / 8
        q *= 1e4 / logits.abs().max()  # now they reach +-1e4
    outputs = kernels.attention(q, k, v)
    grads = torch.autograd.grad(outputs, (q, k, v), torch.randn_like(outputs))
    assert all(x.isfinite().all() for x in (outputs, *grads))
    reference = attention(*(x.double() for x in (q, k, v)))
    assert_close(outputs, reference, torch.float16)  # not to 1e-6: float32 logits of 1e4 are not as exact as that


@needs_triton
def test_two_backward_runs_agree_to_the_bit(triton_backend):
    q, k, v = (randn(1, 129, heads, 64, dtype=torch.float16) for heads in (2, 1, 1))
    out = kernels.attention(q, k, v)
    first, second = (torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@needs_triton
@pytest.mark.parametrize("wanted, idle", [("q", "_dkdv"), ("k", "_dq"), ("v", "_dq")])
def test_no_kernel_for_gradients_nobody_wants(triton_backend, monkeypatch, wanted, idle):
    inputs = {name: randn(1, 9, 2, 64).requires_grad_(name == wanted) for name in "qkv"}
    monkeypatch.setattr(sys.modules["kernels.attention"], idle, {})  # a launch would fail: no grid is in there
    check(kernels.attention, attention, tuple(inputs.values()), torch.float32)


def reserved(n):
    """Memory of which only what is written will be there: undo the poisoning, which touches all."""
    try:
        return torch.empty(n, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip(f"no {2 * n / 1e9:.0f} GB to reserve")


@needs_triton
@pytest.mark.parametrize("shape, strides", [((2, 9, 2, 64), (2**31, 128, 64, 1)), ((1, 9, 2, 64), (1, 2**28, 64, 1))])
def test_offsets_beyond_32_bits(triton_backend, monkeypatch, shape, strides):
    """From one row of the batch to the next, and from the first token of one tile to its last."""
    monkeypatch.undo()
    memory = reserved(2**31 + 2**16)
    x, do = (memory[start:].as_strided(shape, strides).copy_(torch.randn(shape)) for start in (0, 2**15))
    x.requires_grad_()
    out = kernels.attention(x, x, x)
    exact = x.detach().double().requires_grad_()
    reference = attention(exact, exact, exact)
    assert_close(out, reference, torch.float16)
    assert_close(*torch.autograd.grad(out, x, do), *torch.autograd.grad(reference, exact, do.double()), torch.float16)


@needs_triton
def test_gradient_that_is_one_number_expanded(triton_backend):
    """As that of a plain sum arrives: all its strides are 0."""
    x, w = randn(2, 9, 2, 64), randn(64)
    for f in (lambda: kernels.attention(x, x, x), lambda: kernels.rms_norm(x, w, 1e-5, x)[0],
              lambda: kernels.swiglu(x, x)):
        dense = torch.autograd.grad(f(), x, torch.ones_like(x))
        same(torch.autograd.grad(f().sum(), x), dense)


# ---------------------------------------------------------------------------------------------------------------------
# The other kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_rope(backend, dtype):
    for H, D, batched in ((3, 64, False), (2, 80, True)):
        angles = torch.rand(*([2] * batched), 9, D // 2, device=DEVICE) * 6
        cos, sin = angles.cos(), angles.sin()
        x = randn(2, 9, H, D, dtype=dtype, strided=batched)
        check(lambda x: kernels.apply_rope(x, cos, sin), lambda x: rotate(x, cos, sin), (x,), dtype)


@needs_triton
@pytest.mark.parametrize("strides", [(2**31, 64, 64, 1), (1, 2**31, 64, 1), (1, 1, 1, 2**28)])
def test_rope_of_offsets_beyond_32_bits(triton_backend, monkeypatch, strides):
    """From row to row of the batch, token to token, channel to channel."""
    monkeypatch.undo()
    x = reserved(2**32).as_strided((2, 2, 1, 16), strides).copy_(torch.randn(2, 2, 1, 16))
    angles = torch.rand(2, 8, device=DEVICE)
    out = kernels.apply_rope(x, angles.cos(), angles.sin())
    assert_close(out, rotate(x.double(), angles.cos(), angles.sin()), torch.float16)


def test_apply_rope_rounds_like_the_official_llama():
    with kernels.backend("torch"):
        angles = torch.rand(9, 32) * 6
        x = torch.randn(2, 9, 3, 64)
        cos, sin = (torch.cat((a, a), dim=-1)[:, None] for a in (angles.cos(), angles.sin()))
        half_rotated = torch.cat((-x[..., 32:], x[..., :32]), dim=-1)
        assert torch.equal(kernels.apply_rope(x, angles.cos(), angles.sin()), x * cos + half_rotated * sin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(backend, dtype, residual, monkeypatch):
    if kernels.triton is not None:
        monkeypatch.setattr(sys.modules["kernels.rms_norm"], "MAX_PROGRAMS", 3)  # several rows for each
    for trained, d in ((True, 576), (False, 100)):
        weight = randn(d, dtype=dtype).requires_grad_(trained)
        x = torch.randn(4, 5, d + 8, device=DEVICE).to(dtype)[..., :d].requires_grad_()  # rows do not touch
        r = [randn(4, 5, d, dtype=dtype)] * residual
        check(lambda x, w, *r: kernels.rms_norm(x, w, 1e-5, *r), rms_norm, (x, weight, *r), dtype)


def test_rms_norm_of_which_only_the_sum_is_used(backend):
    x, r, w = randn(3, 64), randn(3, 64), randn(64)
    for used in (0, 1):
        check(lambda x, r: kernels.rms_norm(x, w, 1e-5, r)[used], lambda x, r: rms_norm(x, w.double(), r)[used],
              (x, r), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(backend, dtype):
    both = randn(5, 2 * 2500, dtype=dtype)  # gate and up as halves of one projection
    check(lambda x: kernels.swiglu(*x.chunk(2, dim=-1)), lambda x: F.silu(x[:, :2500]) * x[:, 2500:], (both,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, K", [  # either side of FEW; no whole number of tiles; and no multiple of 16
    ((1,), 8208), ((5,), 8200), ((2, 8), 8208), ((2, 9), 8200)], ids=str)
def test_int8_linear(backend, dtype, rows, K):
    """Before its scale a sum of 8,200 products by integers up to 127 is larger than float16's largest number."""
    linear = Int8Linear(torch.randn(97, K)).to(DEVICE)
    x = randn(*rows, K, dtype=dtype).detach() * 20
    y, weight = linear(x), linear.weight.double() * linear.scale.double()[:, None]
    few = x.shape[:-1].numel() <= kernels.FEW
    bf16 = dtype == torch.float32 and (backend == "torch" or not few)  # in which a CPU multiplies a few rows
    assert_close(y, x.double() @ weight.t(), torch.bfloat16 if bf16 else dtype)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_linear_cross_entropy(backend, dtype, trained, monkeypatch):
    V = 9001  # more than one block of the kernel
    monkeypatch.setattr(kernels, "CHUNK", 7 * V)  # 3 chunks
    N = 20 if DEVICE == "cpu" else 300  # a GPU takes 128 rows at least
    hidden = randn(N, 64, dtype=dtype)
    weight = randn(V, 64, dtype=dtype).detach().div(8).requires_grad_(trained)
    targets = torch.randint(V, (N,), device=DEVICE)
    targets[3] = -1
    exact = lambda h, w, t: F.cross_entropy(h @ w.t(), t, ignore_index=-1, reduction="sum")
    check(lambda *inputs: 2 * kernels.linear_cross_entropy(*inputs), lambda *inputs: 2 * exact(*inputs),
          (hidden, weight, targets), dtype)
    factors = torch.rand(N, device=DEVICE)
    shared = lambda h, w, t: (F.cross_entropy(h @ w.t(), t, ignore_index=-1, reduction="none") * factors.to(h)).sum()
    check(lambda *inputs: kernels.linear_cross_entropy(*inputs, factors), shared, (hidden, weight, targets), dtype)
    with torch.no_grad():
        loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32 and loss.grad_fn is None
    assert kernels.linear_cross_entropy(hidden[:0], weight, targets[:0]) == 0


def test_the_mean_of_the_loss_has_the_gradients_length(backend):
    """1/960 lies 0.4 % from the nearest bfloat16: rounded, it would make the whole gradient so much longer."""
    hidden, weight = randn(3, 64, dtype=torch.bfloat16), randn(50, 64, dtype=torch.bfloat16)
    targets = torch.tensor([3, 4, 5], device=DEVICE)
    ours = torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets) / 960, (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = F.cross_entropy(exact[0] @ exact[1].t(), targets, reduction="sum") / 960
    for g, reference in zip(ours, torch.autograd.grad(loss, exact)):
        assert (g.double() * reference).sum() / reference.square().sum() == pytest.approx(1, abs=1e-3)


def test_linear_cross_entropy_at_its_limits(backend):
    """Extreme logits; a target beyond the vocabulary; a second derivative, which would be incomplete: the saved
    gradients are plain numbers."""
    hidden = torch.tensor([[1e4, 0.0], [-1e4, 0.0]], device=DEVICE, requires_grad=True)
    weight, targets = torch.eye(3, 2, device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(1e4 + torch.log(torch.tensor(2.0)).item())
    (grad,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    assert grad.isfinite().all()
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    if backend == "triton":
        assert kernels.linear_cross_entropy(hidden, weight, targets + 3).isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Together


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a GPU")
def test_decoding_as_a_graph():
    """One launch a step, in place of hundreds, and the same tokens."""
    llm = Llama(LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=16)).to(DEVICE).requires_grad_(False)
    prompts = [[5, 17, 3, 88], [60], [9, 30]]
    alone = [generate_slowly(llm, p, 30) for p in prompts]
    assert llm.generate(prompts, max_new_tokens=30) == alone
    assert [llm.generate([p], max_new_tokens=30)[0] for p in prompts] == alone


def layer(q, k, v, weight, rope):
    """All kernels in one function of tensors."""
    h = kernels.attention(kernels.apply_rope(q, *rope), k, v)  # (B, T, H, D)
    h, s = kernels.rms_norm(h.flatten(2), weight[0], 1e-5, q.flatten(2))
    h = kernels.swiglu(h, s)
    return kernels.linear_cross_entropy(h[:, -1], weight, torch.arange(len(h), device=h.device))


@pytest.mark.parametrize("how", ["checkpoint", "compile"])
def test_checkpoint_and_compile_change_nothing(backend, how):
    q, k, v, weight = randn(2, 9, 2, 64), randn(2, 9, 1, 64), randn(2, 9, 1, 64), randn(50, 128)
    angles = torch.rand(9, 32, device=DEVICE)
    inputs, rope = (q, k, v, weight), (angles.cos(), angles.sin())
    plain = layer(*inputs, rope)
    if how == "checkpoint":
        other = checkpoint(layer, *inputs, rope, use_reentrant=False)
    else:
        torch._dynamo.reset()
        other = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs, rope)
    rounding = (1e-5,) * (how == "compile")  # it takes some operations apart
    same([plain], [other], *rounding)
    same(*(torch.autograd.grad(loss, inputs) for loss in (plain, other)), *rounding)


@needs_triton
def test_the_loss_that_overwrites_its_logits_under_inductor(triton_backend, monkeypatch):
    """The compiler that reuses memory must see that the logits become their gradient, chunk by chunk."""
    monkeypatch.setattr(kernels, "CHUNK", 3 * 50)
    x, weight, targets = randn(400, 8), randn(50, 8), torch.arange(400, device=DEVICE) % 50
    if DEVICE == "cpu":
        x, targets = x[:7].detach().requires_grad_(), targets[:7]
    loss = lambda x, w: kernels.linear_cross_entropy(x.sin(), w, targets) / 7
    torch._dynamo.reset()
    results = [(f(x, weight), *torch.autograd.grad(f(x, weight), (x, weight)))
               for f in (loss, torch.compile(loss, backend="inductor", fullgraph=True))]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, and machines without Triton or a GPU


def wrong_calls():
    f = lambda *shape, dtype=torch.float32: torch.zeros(shape, dtype=dtype, device=DEVICE)
    q, kv, x, w, cos, half = f(2, 5, 4, 64), f(2, 5, 2, 64), f(3, 8), f(8), f(5, 32), torch.float16
    return {
        "k has 3 heads": lambda: kernels.attention(q, f(2, 5, 3, 64), f(2, 5, 3, 64)),
        "v is torch.float16": lambda: kernels.attention(q, kv, kv.to(half)),
        "v has shape": lambda: kernels.attention(q, kv, f(2, 6, 2, 64)),
        "v is on meta": lambda: kernels.attention(q, kv, kv.to("meta")),
        "q has head dim 136": lambda: kernels.attention(*[f(1, 5, 1, 136)] * 3),
        "q has head dim 60": lambda: kernels.attention(*[f(1, 5, 1, 60)] * 3),
        "q has shape": lambda: kernels.attention(q[0], kv, kv),
        "q is torch.int64": lambda: kernels.attention(*[q.long()] * 3),
        "lengths has shape (3,)": lambda: kernels.attention(q, kv, kv, lengths=f(3, dtype=torch.int64)),
        "cos has shape": lambda: kernels.apply_rope(q, cos[1:], cos[1:]),
        "weight has shape": lambda: kernels.rms_norm(x, f(9), 1e-5),
        "residual has shape": lambda: kernels.rms_norm(x, w, 1e-5, x[:2]),
        "up has shape": lambda: kernels.swiglu(x, x[:, :4]),
        "hidden has shape": lambda: kernels.linear_cross_entropy(q, w, w),
        "targets is torch.float32": lambda: kernels.linear_cross_entropy(x, f(7, 8), f(3)),
        "weight has shape (7, 9)": lambda: kernels.linear_cross_entropy(x, f(7, 9), f(3).long()),
    }


@pytest.mark.parametrize("message", wrong_calls())
def test_bad_input_names_the_argument(message):
    with pytest.raises(ValueError) as problem:
        wrong_calls()[message]()
    assert str(problem.value).startswith(message) and "\n" not in str(problem.value)


@needs_triton
@pytest.mark.parametrize("chip", [(7, 5), (8, 0), (9, 0)])
def test_which_chips_get_which_kernel(monkeypatch, chip):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    for name, dtype, shape, oldest, kernel in (
            ("attention", torch.bfloat16, "square", (9, 0), "triton"), ("attention", torch.float32, "square", None, ""),
            ("attention", torch.bfloat16, "few", (8, 0), "split"), ("attention", torch.bfloat16, "trained", None, ""),
            ("int8", torch.bfloat16, "few", (8, 0), "triton"),
            ("elementwise", torch.float32, "any", (8, 0), "triton"), ("elementwise", torch.float64, "any", None, "")):
        x = SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda")
        assert kernels._kernel(name, x, shape) == (kernel if oldest and chip >= oldest else "torch"), (name, shape)
    torch._dynamo.reset()
    asks = lambda x: x + (kernels._capability(x.device) == chip)  # no break in the graph
    assert torch.compile(asks, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


@pytest.mark.parametrize("device, chip, fast", [
    ("cuda:0", (7, 5), False), ("cuda", (8, 0), True), ("cpu", dict(amx_bf16=True, cpu_name="Intel"), True),
    ("cpu", dict(avx512_bf16=True, cpu_name="Intel"), False), ("cpu", dict(avx512_bf16=True, cpu_name="AMD"), True)])
def test_which_chips_are_given_bfloat16(monkeypatch, device, chip, fast):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: chip, raising=False)
    assert kernels.default_dtype.__wrapped__(device) == (torch.bfloat16 if fast else torch.float32)


def run(code, **environment):
    """Run Python code in a fresh process: (exit status, what it printed)."""
    environment = {**{k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KERNELS")}, **environment}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_the_environment_has(monkeypatch):
    """Without Triton all runs but what is asked of it; KERNELS chooses; on a CPU Triton needs its interpreter."""
    status, output = run("""
import sys; sys.modules["triton"] = None    # as if it were not installed
import torch, kernels
x = torch.randn(1, 5, 2, 64)
print(kernels.attention(x, x, x).shape)
with kernels.backend("triton"):
    kernels.attention(x, x, x)
""")
    assert "torch.Size([1, 5, 2, 64])" in output
    assert "UserError: the backend is 'triton', but Triton is not installed" in output
    assert run("import kernels; print(kernels._choice)", KERNELS="triton") == (0, "triton\n")
    with kernels.backend("cuda"):
        refuses(UserError, lambda: kernels.swiglu(*torch.randn(2, 3)), "KERNELS=cuda", "expected 'triton', 'torch'")
    if kernels.triton is not None:
        monkeypatch.setattr(sys.modules["kernels.attention"].INTERPRET, "value", False)
        with kernels.backend("triton"):
            refuses(UserError, lambda: kernels.swiglu(*torch.randn(2, 3)), "TRITON_INTERPRET=1")


COMPILED = """
import os, subprocess, tempfile
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
import kernels

run, seen = triton.runtime.jit.JITFunction.run, set()
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
    get_current_target=lambda: GPUTarget("cuda", 90, 32)))

def launch(self, *args, grid, warmup, **options):
    # Compiled as for an H100, which need not be here, and not launched. Prints what the assembler reports.
    compiled = run(self, *args, grid=grid, warmup=True, **options)
    if compiled.hash in seen:
        return
    seen.add(compiled.hash)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(compiled.asm["ptx"])
        f.flush()
        log = subprocess.run([get_ptxas(90).path, "-v", "--gpu-name=sm_90a", f.name, "-o", os.devnull],
                             capture_output=True, text=True).stderr
    number = lambda before: int(log.split(before)[0].split()[-1])
    free = ",".join(p.name for p in self.params if p.do_not_specialize)
    print("|", self.__module__.split(".")[-1] + "." + self.__name__, free, number("registers"),
          number("bytes spill stores") + number("bytes spill loads"), compiled.metadata.shared,
          "wgmma.mma_async instructions are serialized" in log, sep="|")

triton.runtime.jit.JITFunction.run = launch
kernels._kernel = lambda name, x, shape="any": "split" if (name, shape) == ("attention", "few") else "triton"
make = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
square = lambda x: (x * x).sum()            # whose gradient is dense; that of a plain sum is one number, expanded
q, k = make(2, 129, 4, 128), make(2, 129, 2, 128)
for causal in (True, False):
    square(kernels.attention(q, k, k, causal)).backward()
with torch.no_grad():
    kernels.attention(make(2, 1, 4, 128), k, k, lengths=torch.tensor([5, 9]))
kernels.apply_rope(q, torch.zeros(129, 64), torch.zeros(129, 64))
for weight in (make(3072), make(3072).detach()):
    y, s = kernels.rms_norm(make(33, 3072), weight, 1e-5, make(33, 3072))
    (square(y) + square(s)).backward()
square(kernels.swiglu(make(33, 8192), make(33, 8192))).backward()
kernels.linear_cross_entropy(make(33, 64), make(128256, 64), torch.zeros(33, dtype=torch.long))
for rows in (1, 8):
    kernels.int8_linear(make(rows, 3072), torch.zeros(8192, 3072, dtype=torch.int8),
                        torch.zeros(8192, dtype=torch.bfloat16))
"""


@needs_triton
def test_compiled_for_hopper_without_one():
    """For sm_90, by the assembler's own report: no serialised tensor core products and hardly a spilled register. And
    no argument that changes from batch to batch is one that Triton compiles anew for, at 1 and at multiples of 16."""
    status, output = run(COMPILED)
    assert status == 0, output
    rows = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    free = {row[0]: row[1] for row in rows}
    assert free == {
        "attention._forward": "T", "attention._prepare": "T,T_padded", "attention._dkdv": "T,T_padded",
        "attention._dq": "T,T_padded", "decode_attention._attend": "Tq,Tk,chunk",
        "decode_attention._combine": "rows,splits", "rope._rope": "rows,T", "rms_norm._forward": "",
        "rms_norm._backward": "rows", "swiglu._forward": "", "swiglu._backward": "",
        "cross_entropy._cross_entropy": "", "int8_matmul._matmul": "M"}
    for kernel, _, registers, spilled, shared, serialised in rows:
        assert serialised == "False" and int(spilled) < 1000 and int(shared) <= 227 * 1024, (kernel, spilled)

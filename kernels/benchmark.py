"""
How fast are the kernels, and against whom?

    python -m kernels.benchmark                 # on a GPU: one table, a row per shape, every peer timed in the same run
    python -m kernels.benchmark --only attention --markdown table.md
    python -m kernels.benchmark --tune          # times the alternatives to attention.CONFIGS (--tune dkdv: only that)
    python -m kernels.benchmark --compile       # needs no GPU: registers, spills and shared memory of each kernel

Without a GPU it says so, and checks the results under Triton's interpreter instead.

Ratios are peer's time / our time: above 1 we are faster. SDPA's backends are asked one by one, each on (B, H, T, D)
views of the same memory; one that cannot share keys among query heads gets them repeated, which is part of its time.
Rows appear on stderr as they are measured, the whole table comes last.
"""
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F

try:
    import triton
except ImportError:
    sys.exit("Triton is not installed here, so there are no kernels to measure (on Linux: pip install triton)")

import kernels
from formats.errors import Parser, run_cli
from formats.files import check_out_file
from kernels.attention import CONFIGS
from kernels.int8 import Int8Linear

# name, batch, length, query heads, key/value heads, head dim, causal
ATTENTION = [
    ("Llama-3.2-3B", 8, 1024, 24, 8, 128, True),
    ("Llama-3.2-3B", 2, 4096, 24, 8, 128, True),
    ("Llama-3.1-8B", 8, 1024, 32, 8, 128, True),
    ("Llama-3.1-8B", 2, 4096, 32, 8, 128, True),
    ("Llama-3.1-70B", 8, 1024, 64, 8, 128, True),
    ("Llama-3.1-70B", 2, 4096, 64, 8, 128, True),
    ("SmolLM2-135M", 32, 256, 9, 3, 64, True),
    ("CLIP ViT-L/14-336", 32, 577, 16, 16, 64, False),
]
# rows of the residual stream, its width
NORM = [("Llama-3.2-3B", 8 * 768, 3072), ("Llama-3.1-8B", 8 * 2048, 4096), ("SmolLM2-135M", 32 * 256, 576)]
# rows, width of the MLP
MLP = [("Llama-3.2-3B", 8 * 768, 8192), ("Llama-3.1-8B", 8 * 2048, 14336), ("SmolLM2-135M", 32 * 256, 1536)]
CLIP_MLP = [("CLIP ViT-L/14-336", 32 * 577, 4096)]
# positions with a target, width, vocabulary
HEAD = [("Llama-3.2-3B", 1024, 3072, 128256), ("Llama-3.2-3B", 4096, 3072, 128256), ("SmolLM2-135M", 1024, 576, 49152)]
# a matrix of int8 weights: its width, its rows; and the rows that meet it
INT8 = [("Llama-3.2-3B", 3072, 8192, 1), ("Llama-3.2-3B", 8192, 3072, 1), ("Llama-3.2-3B", 3072, 128256, 1),
        ("Llama-3.2-3B", 3072, 8192, 8), ("Llama-3.2-3B", 8192, 3072, 8)]


def milliseconds(function, runs=50):
    """Median time by GPU events, with a cold L2 cache.

    It is the GPU's time alone: to launch an operator from Python takes longer than a small kernel runs, so the GPU
    sleeps before every run, and meanwhile Python queues what is to be timed. (studies/gpu.py times whole steps.)
    """
    for _ in range(3):
        function()  # compiles, and chooses algorithms
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # 256 MB, more than any L2 holds
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        torch.cuda._sleep(4_000_000)  # clock cycles: some 2 ms
        cache.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def forward_and_backward(function, inputs):
    """(ms forward, ms backward) of function(*inputs), with gradients for the inputs that ask for one."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    grads = [torch.randn_like(o) for o in outputs]
    backward = lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    return milliseconds(lambda: function(*inputs)), milliseconds(backward)


def timed_peers(ours, peers, inputs, measure=forward_and_backward):
    """{name: measure(function, inputs)} of "ours" and of each peer; one that cannot is left out."""
    times = {}
    for name, function in {"ours": ours, **peers}.items():
        try:
            times[name] = measure(function, inputs)
        except Exception as problem:  # a backend that does not support a shape says so in many ways
            print(f"  {name}: {problem!r:.200}", file=sys.stderr)
    return times


def rows_of(name, shape, times, work, unit, ceiling):
    """Two table rows. work: (forward, backward) in FLOP or bytes; ceiling: what this chip did at best per second."""
    if "ours" not in times:
        return [(name, shape, "both", "failed: see stderr", "", "", "")]
    rows = []
    for k, direction in enumerate(("forward", "backward")):
        ms = times["ours"][k]
        rate = work[k] / ms * 1e3
        shown = f"{rate / 1e12:.0f} TFLOP/s" if unit == "FLOP" else f"{rate / 1e9:.0f} GB/s"
        ratios = ", ".join(f"{peer} {t[k] / ms:.2f}" for peer, t in times.items() if peer != "ours")
        rows.append((name, shape, direction, f"{ms:.3f}", shown, f"{rate / ceiling:.0%}", ratios))
        print("  " + " | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The peers


def sdpa(backend, causal, shared):
    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        if not shared:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        with torch.nn.attention.sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return o.transpose(1, 2)
    return run


def compiled(function):
    """torch.compile for the very shape: by itself it would make the second shape that it meets a variable."""
    return torch.compile(function, dynamic=False)


def plain_norm(x, weight, residual):
    s = x + residual
    return (s.float() * torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(s.dtype) * weight, s


def plain_rope_attention(q, k, v, cos, sin):
    def rotate(x):
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype).transpose(1, 2)
    cos, sin = cos[:, None], sin[:, None]
    o = F.scaled_dot_product_attention(rotate(q), rotate(k), v.transpose(1, 2), is_causal=True, enable_gqa=True)
    return o.transpose(1, 2)


def plain_loss(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="sum")


def liger():
    """Liger-Kernel's functions, if it is installed (pip install liger-kernel)."""
    try:
        from liger_kernel.transformers import functional
        return functional
    except ImportError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The table


def ceilings():
    """What this chip does at best, measured: (bytes/s of a large copy, FLOP/s of a large bf16 matrix product)."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copy = 2 * x.numel() * x.element_size() / milliseconds(lambda: y.copy_(x)) * 1e3
    x = y = None  # their memory is free again
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return copy, 2 * 8192**3 / milliseconds(lambda: a @ b) * 1e3


def attention_rows(flops, shapes=ATTENTION, device="cuda", dtype=torch.bfloat16):
    backends = torch.nn.attention.SDPBackend
    rows = []
    for name, B, T, H, Hkv, D, causal in shapes:
        make = lambda heads: torch.randn(B, T, heads, D, dtype=dtype, device=device, requires_grad=True)
        q, k, v = make(H), make(Hkv), make(Hkv)
        shape = f"B {B}, T {T}, H {H}/{Hkv}, D {D}{', causal' if causal else ''}"
        peers = {"flash": sdpa(backends.FLASH_ATTENTION, causal, True),
                 "cuDNN": sdpa(backends.CUDNN_ATTENTION, causal, True),
                 "efficient": sdpa(backends.EFFICIENT_ATTENTION, causal, False)}
        times = timed_peers(lambda q, k, v: kernels.attention(q, k, v, causal), peers, (q, k, v))
        work = 4 * B * H * D * (T * (T + 1) / 2 if causal else T * T)  # two products over the visible pairs; then five
        rows += rows_of(f"attention, {name}", shape, times, (work, 2.5 * work), "FLOP", flops)
        if causal and T <= 1024:
            angles = torch.rand(T, D // 2, device=device) * 6
            cos, sin = angles.cos(), angles.sin()
            peers = {"torch.compile of RoPE + best SDPA": compiled(plain_rope_attention)}
            times = timed_peers(lambda q, k, v, cos, sin: kernels.attention(q, k, v, True, rope=(cos, sin)), peers,
                                (q, k, v, cos, sin))
            rows += rows_of(f"RoPE + attention, {name}", shape, times, (work, 2.5 * work), "FLOP", flops)
    return rows


def norm_rows(copy, shapes=NORM, device="cuda", dtype=torch.bfloat16):
    rows = []
    for name, N, d in shapes:
        x, residual = (torch.randn(N, d, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        nbytes = N * d * x.element_size()
        for trained in (False, True):
            weight = torch.ones(d, dtype=dtype, device=device, requires_grad=trained)
            peers = {"PyTorch": plain_norm, "torch.compile": compiled(plain_norm)}
            if liger():
                peers["Liger"] = lambda x, w, r: liger().liger_fused_add_rms_norm(x, r, w, 1e-5)
            times = timed_peers(lambda x, w, r: kernels.rms_norm(x, w, 1e-5, r), peers, (x, weight, residual))
            # forward: x, residual in, y, sum out; backward: both gradients and the sum in, one gradient out
            rows += rows_of(f"RMSNorm + residual, {name}", f"{N} x {d}{', weight trained' if trained else ''}",
                            times, (4 * nbytes, 4 * nbytes), "byte", copy)
    return rows


def mlp_rows(copy, shapes=MLP, clip_shapes=CLIP_MLP, device="cuda", dtype=torch.bfloat16):
    rows = []
    for name, N, d in shapes:
        gate, up = (torch.randn(N, d, dtype=dtype, device=device, requires_grad=True) for _ in range(2))
        nbytes = N * d * gate.element_size()
        plain = lambda gate, up: F.silu(gate) * up
        peers = {"PyTorch": plain, "torch.compile": compiled(plain)}
        if liger():
            peers["Liger"] = lambda gate, up: liger().liger_swiglu(gate, up)
        times = timed_peers(kernels.swiglu, peers, (gate, up))
        rows += rows_of(f"SwiGLU, {name}", f"{N} x {d}", times, (3 * nbytes, 5 * nbytes), "byte", copy)
    for name, N, d in clip_shapes:
        x = torch.randn(N, d, dtype=dtype, device=device, requires_grad=True)
        nbytes = N * d * x.element_size()
        plain = lambda x: x * torch.sigmoid(1.702 * x)
        times = timed_peers(kernels.quick_gelu, {"PyTorch": plain, "torch.compile": compiled(plain)}, (x,))
        rows += rows_of(f"quick GELU, {name}", f"{N} x {d}", times, (2 * nbytes, 3 * nbytes), "byte", copy)
    return rows


def time_and_memory(function, inputs):
    """(ms, MB at the peak) of a loss, forward and backward."""
    both = lambda: torch.autograd.grad(function(*inputs), inputs[0])
    both()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated()
    return milliseconds(both), (peak - before) / 2**20


def loss_rows(flops, shapes=HEAD, device="cuda", dtype=torch.bfloat16):
    """LM head + cross-entropy, forward and backward together; the head is frozen, as it is in training."""
    rows = []
    for name, N, d, V in shapes:
        hidden = torch.randn(N, d, dtype=dtype, device=device, requires_grad=True)
        weight = torch.randn(V, d, dtype=dtype, device=device) / d**0.5
        targets = torch.randint(V, (N,), device=device)
        peers = {"PyTorch": plain_loss, "torch.compile": compiled(plain_loss)}
        if liger():
            peers["Liger"] = lambda h, w, t: liger().liger_fused_linear_cross_entropy(h, w, t, reduction="sum")
        times = timed_peers(kernels.linear_cross_entropy, peers, (hidden, weight, targets), time_and_memory)
        label, shape = f"LM head + loss, {name}", f"{N} x {d} x {V}"
        if "ours" not in times:
            rows.append((label, shape, "both", "failed: see stderr", "", "", ""))
            continue
        ms, memory = times.pop("ours")
        rate = 4 * N * d * V / ms * 1e3
        ratios = ", ".join(f"{p} {t / ms:.2f} ({m:.0f} MB)" for p, (t, m) in times.items())
        rows.append((label, shape, "both", f"{ms:.3f}", f"{rate / 1e12:.0f} TFLOP/s", f"{rate / flops:.0%}",
                     f"{ratios}; ours {memory:.0f} MB"))
        print("  " + " | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


@torch.no_grad()
def int8_rows(copy, shapes=INT8, device="cuda", dtype=torch.bfloat16):
    """A decoding step's product by weights in 8 bits; the rate is that of reading the weights."""
    rows = []
    for name, K, N, M in shapes:
        linear = Int8Linear(torch.randn(N, K, device=device))
        x, weight = torch.randn(M, K, dtype=dtype, device=device), linear.weight.to(dtype)
        peers = {"bf16 weights": lambda x: F.linear(x, weight),
                 "torch.compile": compiled(lambda x: F.linear(x, linear.weight.to(dtype)) * linear.scale.to(dtype))}
        times = timed_peers(linear, peers, (x,), lambda function, inputs: milliseconds(lambda: function(*inputs)))
        if "ours" not in times:
            rows.append((f"int8 weights, {name}", f"{M} x {K} x {N}", "forward", "failed: see stderr", "", "", ""))
            continue
        ms = times.pop("ours")
        rate = N * K / ms * 1e3
        ratios = ", ".join(f"{peer} {t / ms:.2f}" for peer, t in times.items())
        rows.append((f"int8 weights, {name}", f"{M} x {K} x {N}", "forward", f"{ms:.3f}", f"{rate / 1e9:.0f} GB/s",
                     f"{rate / copy:.0%}", ratios))
        print("  " + " | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def environment(module="kernels.benchmark"):
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return (f"{chip}, PyTorch {torch.__version__}, Triton {triton.__version__}, Python {platform.python_version()}; "
            f"`python -m {module} {' '.join(sys.argv[1:])}`")


def markdown(header, rows):
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, ["---"] * len(header), *rows])


def table(only):
    copy, flops = ceilings()
    parts = {"attention": lambda: attention_rows(flops), "rms_norm": lambda: norm_rows(copy),
             "swiglu": lambda: mlp_rows(copy), "cross_entropy": lambda: loss_rows(flops),
             "int8": lambda: int8_rows(copy)}
    with kernels.backend("triton"):
        rows = [row for name, part in parts.items() if name in only for row in part()]
    header = ("kernel", "shape", "direction", "ms", "rate", "of the ceiling", "peer's time / ours")
    return (f"{environment()}\n\nMeasured ceilings: copy {copy / 1e9:.0f} GB/s, bf16 matrix product "
            f"{flops / 1e12:.0f} TFLOP/s.\n\n" + markdown(header, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Alternatives to attention.CONFIGS


def tune(which):
    """Time every tile shape that fits, per kernel and shape, best first. Move the winner into attention.CONFIGS, and
    run the tests again: nothing here looks at the results."""
    attention = sys.modules["kernels.attention"]
    shared_memory = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    chip = CONFIGS["large" if shared_memory >= 220 * 1024 else "small"]
    rows = []
    for name, B, T, H, Hkv, D, causal in (ATTENTION[3], ATTENTION[7]):
        make = lambda heads: torch.randn(B, T, heads, D, dtype=torch.bfloat16, device="cuda")
        q, k, v, do = make(H), make(Hkv), make(Hkv), make(H)
        o, lse, _, _ = attention._forward_op(q, k, v, causal, None, None, None, True)
        runs = {"forward": lambda: attention._forward_op(q, k, v, causal, None, None, None, True),
                "dkdv": lambda: attention._backward_op(do, q, k, v, o, lse, causal, None, None, None, False, True),
                "dq": lambda: attention._backward_op(do, q, k, v, o, lse, causal, None, None, None, True, False)}
        for kernel in which or runs:
            run, kept, found = runs[kernel], chip[kernel][D], []
            for candidate in candidates(kernel):
                chip[kernel][D] = candidate
                try:
                    found.append((milliseconds(run), candidate))
                    print(f"  {name}, {kernel} {candidate}: {found[-1][0]:.3f} ms", file=sys.stderr, flush=True)
                except Exception as problem:  # it does not fit the chip, which is said in several ways
                    print(f"  {name}, {kernel} {candidate}: {problem!r:.200}", file=sys.stderr, flush=True)
            chip[kernel][D] = kept
            for ms, candidate in sorted(f for i, f in enumerate(sorted(found)) if i < 5 or f[1] == kept):
                rows.append((f"{name}, T {T}, D {D}", kernel, candidate, f"{ms:.3f}",
                             "<- in use" if candidate == kept else ""))
    return f"{environment()}\n\n" + markdown(("shape", "kernel", "BLOCK_M, BLOCK_N, warps, stages", "ms", ""), rows)


def candidates(kernel):
    # what the program owns is the large side of the tile; the accumulators for it must fit the registers
    owned = [(128, n) for n in (32, 64, 128)] + [(64, n) for n in (32, 64, 128)]
    tiles = [(n, m) for m, n in owned] if kernel == "dkdv" else owned
    return [(m, n, warps, stages) for m, n in tiles for warps in (4, 8) for stages in (2, 3)]


# ---------------------------------------------------------------------------------------------------------------------
# Without a GPU


def check():
    """The kernels under Triton's interpreter against plain PyTorch in float64: the relative errors, as a table."""
    torch.manual_seed(0)
    rows = []
    angles = torch.rand(77, 32) * 6
    rope = (angles.cos(), angles.sin())
    for dtype in (torch.float32, torch.bfloat16):
        make = lambda *shape: torch.randn(shape).to(dtype).requires_grad_()
        targets = torch.randint(1000, (40,))
        cases = {
            "attention, GQA, causal, RoPE": (lambda q, k, v: kernels.attention(q, k, v, True, rope=rope),
                                             (make(1, 77, 3, 64), make(1, 77, 1, 64), make(1, 77, 1, 64))),
            "attention, full, D 80": (lambda q, k, v: kernels.attention(q, k, v, False),
                                      (make(1, 65, 2, 80), make(1, 65, 2, 80), make(1, 65, 2, 80))),
            "rms_norm + residual": (lambda x, w, r: kernels.rms_norm(x, w, 1e-5, r),
                                    (make(40, 576), make(576), make(40, 576))),
            "swiglu": (kernels.swiglu, (make(40, 576), make(40, 576))),
            "quick_gelu": (kernels.quick_gelu, (make(40, 576),)),
            "linear_cross_entropy": (lambda h, w: kernels.linear_cross_entropy(h, w, targets),
                                     (make(40, 64), make(1000, 64))),
        }
        for name, (function, inputs) in cases.items():
            results = {}
            for backend, xs in (("triton", inputs), ("torch", [x.detach().double().requires_grad_() for x in inputs])):
                with kernels.backend(backend):
                    outputs = function(*xs)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                total = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
                results[backend] = [*outputs, *torch.autograd.grad(total, xs)]
            errors = [(a.double() - b).norm() / b.norm() for a, b in zip(results["triton"], results["torch"])]
            n = len(inputs)
            rows.append((name, str(dtype)[6:], f"{max(errors[:-n]):.1e}", f"{max(errors[-n:]):.1e}"))
    return markdown(("kernel", "dtype", "output error", "worst gradient error"), rows)


def record_launches(run, large=True):
    """What run() would launch on a GPU: [(kernel, arguments, options)]. Nothing runs, so CPU tensors will do."""
    attention, launches = sys.modules["kernels.attention"], []
    jit = triton.runtime.jit.JITFunction
    kept = jit.run, kernels._use_triton, attention._config
    jit.run = lambda self, *args, grid, warmup, **options: launches.append((self, args, options))
    kernels._use_triton = lambda x: True
    attention._config = lambda kernel, q: attention.config(kernel, q.shape[3], q.dtype, q.shape[1], large)
    try:
        run()
    finally:
        jit.run, kernels._use_triton, attention._config = kept
    return launches


def compile_launch(kernel, args, options, capability):
    """Compile a kernel as this launch would, for a GPU that need not be here, and read the assembler's report."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
                torch.int8: "*i8"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, x = parameter.name, values[parameter.name]
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            signature[name], constants[(i,)] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name], attributes[(i,)] = pointers[x.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
            if isinstance(x, int) and x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]

    tiles = " x ".join(str(x) for n, x in values.items() if n.startswith("BLOCK"))
    case = [next(s for s in signature.values() if s.startswith("*"))[1:]]
    case += [f"D {values['D']}"] if "D" in values else []
    for option, said in (("CAUSAL", "causal"), ("Cos", "RoPE"), ("Lengths", "lengths"), ("dWeight", "weight trained")):
        case += [said] if values.get(option) is not None and values[option] is not False else []
    launch = {n: x for n, x in options.items() if n.startswith("num_")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes),
                              target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(compiled.asm["ptx"])
        f.flush()
        arch = f"sm_{capability}" + "a" * (capability >= 90)
        log = subprocess.run([get_ptxas(capability).path, "-v", f"--gpu-name={arch}", f.name, "-o", os.devnull],
                             capture_output=True, encoding="utf-8").stderr
    number = lambda before: int(log.split(before)[0].split()[-1])
    return (f"{kernel.__module__.split('.')[-1]}.{kernel.__name__}", ", ".join(case), tiles,
            launch.get("num_warps", 4), launch.get("num_stages", 3), number("registers"),
            number("bytes spill stores") + number("bytes spill loads"), f"{compiled.metadata.shared / 1024:.0f} KB",
            "yes" if "wgmma.mma_async instructions are serialized" in log else "no")


def compile_table(capability, dtypes=(torch.bfloat16, torch.float32), head_dims=(64, 80, 128)):
    square = lambda x: (x * x).sum()  # whose gradient is dense; that of a plain sum is one number, expanded

    def run():
        for dtype in dtypes:
            make = lambda *shape: torch.zeros(shape, dtype=dtype, requires_grad=True)
            for D in head_dims:
                for causal in (True, False):
                    q, k = make(2, 129, 4, D), make(2, 129, 2, D)
                    rope = (torch.zeros(129, D // 2),) * 2 if causal else None
                    square(kernels.attention(q, k, k, causal, rope=rope)).backward()
            with torch.no_grad():
                kernels.attention(make(2, 1, 4, 128), k, k, lengths=torch.tensor([5, 9]))
            for weight in (make(3072), make(3072).detach()):
                y, s = kernels.rms_norm(make(33, 3072), weight, 1e-5, make(33, 3072))
                (square(y) + square(s)).backward()
            square(kernels.swiglu(make(33, 8192), make(33, 8192))).backward()
            square(kernels.quick_gelu(make(33, 4096))).backward()
            kernels.linear_cross_entropy(make(33, 64), make(128256, 64), torch.zeros(33, dtype=torch.long))
            for rows in (1, 8):
                kernels.int8_linear(make(rows, 3072), torch.zeros(8192, 3072, dtype=torch.int8),
                                    torch.zeros(8192, dtype=torch.bfloat16))

    launches = record_launches(run, large=capability in (90, 100, 103))
    rows = dict.fromkeys(compile_launch(*launch, capability) for launch in launches)  # each once
    header = ("kernel", "case", "tile", "warps", "stages", "registers", "spilled bytes", "shared memory",
              "wgmma serialised")
    return f"Compiled for sm_{capability} by Triton {triton.__version__}.\n\n" + markdown(header, rows)


def main(argv=None):
    parser = Parser(__doc__)
    families = ("attention", "rms_norm", "swiglu", "cross_entropy", "int8")
    parser.add_argument("--only", nargs="+", choices=families, default=families, help="these kernels only")
    parser.add_argument("--tune", nargs="*", choices=("forward", "dkdv", "dq"), metavar="KERNEL",
                        help="times the alternatives to attention.CONFIGS instead, of these kernels or of all")
    parser.add_argument("--compile", type=int, nargs="?", const=90, metavar="CAPABILITY",
                        choices=(80, 86, 89, 90, 100, 120),
                        help="registers and spills instead, for any chip: 80 (A100), 89 (RTX 40), 90 (H100, H200)")
    parser.add_argument("--markdown", metavar="FILE", help="write the result into a file as well")
    args = parser.parse_args(argv)
    if args.markdown:
        check_out_file(args.markdown)
    if args.compile:
        result = compile_table(args.compile)
    elif not torch.cuda.is_available():
        if os.environ.get("TRITON_INTERPRET") != "1":  # which counts only if it is there before triton is imported
            command = [sys.executable, "-m", "kernels.benchmark", *sys.argv[1:]]
            sys.exit(subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode)
        print("No GPU here, so there is nothing to time: checking the results under Triton's interpreter instead.\n"
              "(--compile shows registers, spills and shared memory of the compiled kernels without a GPU.)\n")
        result = check()
    else:
        result = table(args.only) if args.tune is None else tune(args.tune)
    print(result)
    if args.markdown:
        with open(args.markdown, "w", encoding="utf-8") as f:
            f.write(result + "\n")


if __name__ == "__main__":
    sys.exit(run_cli(main))

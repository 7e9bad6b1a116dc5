"""
How fast, and in how much memory? Ours beside transformers, PyTorch, cuDNN and Liger.

    python -m studies.benchmark step                # a training step of stage 2 behind a surrogate, or of another stage
    python -m studies.benchmark decode              # tokens/s of answers, and their share of what memory allows
    python -m studies.benchmark kernels             # each kernel beside its peers: for a GPU

Weights are random: no time depends on what they are. On a GPU the default is Llama-3.2-3B in bfloat16, on a CPU the
small world's LLM in float32. Times on shared machines wander, so all systems of a table take turns in one process, and
medians count: trust the ratios. A ratio is a system's time over ours: above 1 ours is faster.
"""
import copy
import ctypes
import functools
import importlib.metadata
import itertools
import platform
import re
import resource
import shlex
import statistics
import sys
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
import train
from cli import Parser, number, run_cli
from formats.tokenizer import IMAGE
from kernels import int8
from model import VLM, Llama, LlamaConfig, ViT
from recipes import CLIP, STAGES, TARGETS, Recipe, Target
from studies import cost
from surrogate import build_surrogate

SIZES = {name: target for name, target in TARGETS.items() if not target.llm_config.qk_norm} | {
    "llama-3.2-1b": Target("Llama-3.2-1B", ranges=((10, 14),), **CLIP, llm_config=LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, rope_theta=500000.0))}
BEFORE, TEXT, ANSWER = 10, 100, 60      # tokens of a sample: before the image; beside it; of these, with loss
STEP = Recipe(lr=0.0)                   # every step sees the same weights

# ---- The harness ----------------------------------------------------------------------------------------------------

Measured = namedtuple("Measured", "seconds held peak result")       # held: bytes before the run; peak: during it


def peak_memory(device, reset=False):
    """Bytes: the most that was held, on a GPU by tensors, on a CPU by the process, code included. reset: forget it
    first, so that what is held now is returned (a CPU's can be reset on Linux alone)."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        ctypes.CDLL(None).malloc_trim(0)            # what was freed is kept for later use: here it is given back
        with suppress(OSError):                     # not every container allows it
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 2**10


def measured(run, device, clock=None):
    """Run once. clock: a function that times `run` in a better way, e.g. again and again."""
    held, start = peak_memory(device, reset=True), time.perf_counter()
    result = run()
    if device != "cpu":
        torch.accelerator.synchronize()
    seconds, peak = time.perf_counter() - start, peak_memory(device)
    return Measured(clock(run) if clock else seconds, held, peak, result)


def in_turns(systems, rounds, device, clock=None):
    """{name: function} -> {name: Measured}: medians over rounds in which all take turns, after one that warms up.

    A peer of "ours" that cannot run here, or runs out of memory, is left out, and stderr says so.
    """
    seen = {name: [] for name in systems}
    for _, (name, run) in itertools.product(range(rounds + 1), systems.items()):
        try:
            if name in seen:
                seen[name].append(measured(run, device, clock))
        except RuntimeError as e:
            if name == "ours":
                raise
            print(f"{name} is left out: {str(e).splitlines()[0]}", file=sys.stderr)
            del seen[name]
    return {name: Measured(statistics.median(r.seconds for r in turns[1:]), turns[-1].held,
                           max(r.peak for r in turns[1:]), turns[-1].result) for name, turns in seen.items()}


def random_model(build, dtype, device):
    """What `build` builds, frozen, with random weights that are drawn in their place: no float32 copy on the way."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = build().to(dtype)
    for p in model.to_empty(device=device).parameters():
        torch.nn.init.normal_(p.requires_grad_(False), mean=float(p.dim() == 1), std=0.02)
    return model.eval()


def ceilings(device, dtype, rounds=10, clock=None):
    """What the chip does at best, measured: bytes/s of a large copy, FLOP/s of a large matrix product."""
    n = 2**13 if device.startswith("cuda") else 2**10
    x, a = torch.zeros(64 * n * n, dtype=torch.uint8, device=device), torch.ones(n, n, dtype=dtype, device=device)
    y = torch.empty_like(x)
    turns = in_turns({"B": lambda: y.copy_(x), "FLOP": lambda: a @ a}, rounds, device, clock)
    return {"B": 2 * x.numel() / turns["B"].seconds, "FLOP": 2 * n**3 / turns["FLOP"].seconds}


def sdpa(q, k, v, causal=True, backend=SDPBackend.FLASH_ATTENTION):
    """PyTorch's attention by one of its backends, in our layout: q (B, T, H, D), k and v (B, T, Hkv, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2).contiguous()


# ---- A step of training ---------------------------------------------------------------------------------------------


def llava_batch(target, batch):
    """A batch as data.batches.collate makes it of LLaVA's samples, out of random tokens: an image, and TEXT tokens of
    which the last ANSWER are the answer."""
    n_visual, size = target.vit_config.num_patches + 3, target.vit_config.image_size        # CLS, start, end of image
    tokens = torch.randint(target.llm_config.vocab_size, (batch, n_visual + TEXT))          # (B, T)
    tokens[:, BEFORE:BEFORE + n_visual] = IMAGE
    targets = torch.full_like(tokens, -100)
    targets[:, -ANSWER - 1:-1] = tokens[:, -ANSWER:]                        # at position t the token t + 1
    return dict(tokens=tokens, targets=targets, pixels=torch.rand(batch, 3, size, size))


def stage_of(stage, target, dtype, device):
    """The VLM of a stage with random weights, and its optimizer."""
    def build():
        llm = Llama(target.llm_config)
        return VLM(ViT(target.vit_config), llm if stage == "decoder" else build_surrogate(llm, target.ranges))

    vlm = random_model(build, dtype, device)
    learns = train.trained_parameters(vlm, stage)
    train.set_dtypes(vlm, vlm.decoder, learns)
    return vlm, train.adamw(learns, STEP)


def take_step(loss, optimizer, batch):
    """A step as train.train takes it, with any function of a batch as the loss, whose mean over targets is returned."""
    mean = loss(batch) / train.count_targets([batch])
    mean.backward()
    train.update(optimizer, STEP, 0)
    return mean.item()


def llama_twin(llm):
    """transformers' LlamaForCausalLM over the very same parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = dict(vars(llm.config), qkv_bias=None, qk_norm=None)
    rope = dict(sizes.pop("rope_scaling") or dict(rope_type="default"), rope_theta=sizes.pop("rope_theta"))
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope, bos_token_id=1, eos_token_id=2,
                                            pad_token_id=2))
    weights = llm.state_dict(keep_vars=True) | {"lm_head.weight": llm.lm_head_weight}
    for name, p in twin.named_parameters():         # load_state_dict hands these flags on: what is frozen stays frozen
        p.requires_grad_(weights[name].requires_grad)
    twin.load_state_dict(weights, assign=True)
    twin.model.rotary_emb = type(twin.model.rotary_emb)(twin.config)        # it holds frequencies, and no parameter
    twin.tie_weights()
    return twin.eval().to(llm.device)


def all_logits(vlm):
    """The loss as the paper's code has it, over the very same parameters: transformers' Llama behind our ViT and
    projector, and logits of every position. A function of a batch."""
    twin = llama_twin(vlm.decoder)

    def loss(batch):
        x = vlm.embed(batch["tokens"], batch["pixels"])                                             # (B, T, d)
        cast = {name: p.to(x.dtype) for name, p in twin.named_parameters()}     # as our modules cast theirs
        logits = torch.func.functional_call(twin, cast, kwargs=dict(inputs_embeds=x)).logits        # (B, T, vocab)
        targets = batch["targets"].flatten().to(x.device)                                           # (B * T,)
        return F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=-100, reduction="sum")

    return loss


def step_rows(args):
    """Time and memory of a training step: ours, and with transformers' LLM on the same weights. By formula: what
    studies/cost.py counts in bfloat16, which a GPU's peak may be compared with."""
    target, before = SIZES[args.model], peak_memory(args.device, reset=True)
    vlm, optimizer = stage_of(args.stage, target, args.dtype, args.device)
    losses = {"ours": vlm.loss, "transformers' LLM, all logits": all_logits(vlm)}
    if args.device.startswith("cuda"):
        losses["ours, PyTorch only"] = kernels.backend("torch")(vlm.loss)
    for size in args.batch:
        batch = llava_batch(target, size)
        turns = in_turns({name: functools.partial(take_step, loss, optimizer, batch) for name, loss in losses.items()},
                         args.rounds, args.device)
        positions = batch["tokens"].shape[1]
        formula = cost.memory(args.stage, target, STEP, size, positions, ANSWER)
        for name, t in turns.items():
            yield {"batch": size, "positions": positions, "system": name,
                   "ms a step": f"{1e3 * t.seconds:.1f}", "ratio": f"{t.seconds / turns['ours'].seconds:.2f}",
                   "tokens/s": f"{size * positions / t.seconds:.0f}", "peak GiB": f"{(t.peak - before) / 2**30:.2f}",
                   "of it the step's": f"{(t.peak - t.held) / 2**30:.2f}",
                   "by formula": f"{sum(formula.values()) / 2**30:.2f}" if name == "ours" else "–",
                   "loss": f"{t.result:.5f}"}


# ---- Decoding -------------------------------------------------------------------------------------------------------


def weight_bytes(llm):
    """What a decoding step has to read: all weights but the embeddings', of which it reads one row (unless they are the
    head, too)."""
    tied = llm.config.tie_word_embeddings and not hasattr(llm, "lm_head")
    return sum(t.numel() * t.element_size() for n, t in llm.state_dict().items() if tied or "embed_tokens" not in n)


def generate(model, prompts, n):
    """n new tokens of every prompt (B, T), greedily, by our model or by transformers': a list of lists."""
    if isinstance(model, Llama):
        return model.generate(prompts.tolist(), max_new_tokens=n)
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, min_new_tokens=n,
                          max_new_tokens=n)[:, prompts.shape[1]:].tolist()


@torch.no_grad()
def decode_rows(args):
    """Greedy answers: ours, transformers' `generate`, ours with weights in 8 bits. The rate is that of all rows of a
    batch after the first token; its share is of a copy's bandwidth, if a step did nothing but read every weight once.
    Same: the part of the tokens that transformers says, too."""
    llm = random_model(lambda: Llama(SIZES[args.model].llm_config), args.dtype, args.device)
    models = {"ours": llm, "transformers": llama_twin(llm), "ours, int8": int8.quantize(copy.deepcopy(llm))}
    if (fast := kernels.default_dtype(args.device)) != args.dtype:
        models[f"ours, {str(fast)[6:]}"] = copy.deepcopy(llm).to(fast)
    bandwidth = ceilings(args.device, args.dtype)["B"]
    for length, batch in itertools.product(args.length, args.batch):
        prompts = torch.randint(llm.config.vocab_size, (batch, length), device=args.device)
        one, turns = (in_turns({name: functools.partial(generate, model, prompts, n) for name, model in models.items()},
                               args.rounds, args.device) for n in (1, args.new))
        for name, t in turns.items():
            size, first = weight_bytes(llm if name == "transformers" else models[name]), one[name].seconds
            rate, pairs = (args.new - 1) / (t.seconds - first), zip(t.result, turns["transformers"].result)
            same = sum(a == b for x, y in pairs for a, b in zip(x, y)) / (batch * args.new)
            yield {"prompt": length, "batch": batch, "system": name, "tokens/s": f"{batch * rate:.1f}",
                   "first token, ms": f"{1e3 * first:.0f}", "weights, GB": f"{size / 1e9:.2f}",
                   "of the bandwidth": f"{size * rate / bandwidth:.0%}", "same": f"{same:.0%}"}


# ---- Kernels --------------------------------------------------------------------------------------------------------


def kernel_cases(target, B, T, device, dtype):
    """Yield (kernel, shape, inputs, {system: function of them}, {direction: work}, "FLOP" or "B"), ours first. Work:
    operations, or bytes that must be moved at least."""
    c, v, rows, targets = target.llm_config, target.vit_config, B * T, 1024
    H, Hkv, D, width, inner = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size,
                               c.intermediate_size)
    make = lambda *shape: torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    liger, size = None, dtype.itemsize
    with suppress(ImportError):
        from liger_kernel.transformers import functional as liger

    def systems(ours, plain, by_liger=None):
        found = {"ours": ours, "PyTorch": plain, "torch.compile": torch.compile(plain, dynamic=False)}
        return found | ({"Liger": by_liger} if by_liger and liger else {})

    attentions = {"ours": kernels.attention, "flash": sdpa,
                  "cuDNN": functools.partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION)}
    pictures, heads = (32, v.num_patches + 1), v.num_attention_heads
    for b, t, h, hkv, d, causal in ((B, T, H, Hkv, D, True), (*pictures, heads, heads, v.hidden_size // heads, False)):
        flops = 4 * b * h * d * t * (t + 1) // (2 if causal else 1)
        yield ("attention", f"B {b}, T {t}, H {h}/{hkv}, D {d}{', causal' * causal}",
               (make(b, t, h, d), make(b, t, hkv, d), make(b, t, hkv, d)),
               {name: functools.partial(function, causal=causal) for name, function in attentions.items()},
               {"forward": flops, "backward": 2.5 * flops}, "FLOP")
    q, k = make(B, 1, H, D).detach(), make(B, T, Hkv, D).detach()
    yield ("attention, a decoding step", f"B {B}, 1 of {T}, H {H}/{Hkv}, D {D}", (q, k, k.clone()),
           {"ours": kernels.attention, "PyTorch": kernels.reference.attention},
           {"forward": 2 * k.numel() * size}, "B")
    angles = torch.rand(T, D // 2, device=device)
    yield ("RoPE", f"B {B}, T {T}, H {H}, D {D}", (make(B, T, H, D), angles.cos(), angles.sin()),
           systems(kernels.apply_rope, kernels.reference.apply_rope),
           dict.fromkeys(("forward", "backward"), 2 * rows * H * D * size), "B")
    for trained in (False, True):
        yield ("RMSNorm + residual", f"{rows} x {width}{', weight trained' * trained}",
               (make(rows, width), make(width).detach().requires_grad_(trained), make(rows, width)),
               systems(lambda x, w, r: kernels.rms_norm(x, w, 1e-5, r),
                       lambda x, w, r: (F.rms_norm(x + r, w.shape, w, 1e-5), x + r),
                       lambda x, w, r: liger.liger_fused_add_rms_norm(x, r, w, 1e-5)),
               dict.fromkeys(("forward", "backward"), 4 * rows * width * size), "B")
    yield ("SwiGLU", f"{rows} x {inner}", (make(rows, inner), make(rows, inner)),
           systems(kernels.swiglu, lambda gate, up: F.silu(gate) * up, lambda gate, up: liger.liger_swiglu(gate, up)),
           {"forward": 3 * rows * inner * size, "backward": 5 * rows * inner * size}, "B")
    yield ("LM head + loss", f"{targets} x {width} x {c.vocab_size}",
           (make(targets, width), make(c.vocab_size, width).detach() / width ** 0.5,
            torch.randint(c.vocab_size, (targets,), device=device)),
           systems(kernels.linear_cross_entropy,
                   lambda h, w, t: F.cross_entropy((h @ w.t()).float(), t, reduction="sum"),
                   lambda h, w, t: liger.liger_fused_linear_cross_entropy(h, w, t, reduction="sum")),
           {"both": 4 * targets * width * c.vocab_size}, "FLOP")        # ours has the gradient on the way forward
    matrix = int8.Int8Linear(torch.randn(inner, width)).to(device)
    for n in (1, 8):
        yield ("int8 weights", f"{n} x {width} x {inner}", (make(n, width).detach(),),
               systems(matrix, lambda x: F.linear(x, matrix.weight.to(dtype)) * matrix.scale.to(dtype)),
               {"forward": width * inner}, "B")


def kernel_run(function, inputs, direction):
    """What is timed: the forward pass, the backward pass over a graph that is kept, or both (of a loss)."""
    forward, learns = functools.partial(function, *inputs), [x for x in inputs if x.requires_grad]
    if direction == "both":
        return lambda: torch.autograd.grad(forward(), learns)

    @functools.cache
    def graph():
        y = forward()
        outputs = y if isinstance(y, tuple) else (y,)
        return outputs, [torch.randn_like(y) for y in outputs]

    backward = lambda: torch.autograd.grad(graph()[0], learns, graph()[1], retain_graph=True)
    return forward if direction == "forward" else backward


def kernel_rows(args):
    """Each kernel beside its peers, at the sizes of a model. On a GPU by its own events, with a cold L2 cache."""
    clock = None
    if args.device.startswith("cuda"):
        from triton.testing import do_bench
        clock = lambda run: do_bench(run, return_mode="median") / 1e3
    best = ceilings(args.device, args.dtype, args.rounds, clock)
    print(f"at best, measured: copy {best['B'] / 1e12:.2f} TB/s, matrix product {best['FLOP'] / 1e12:.1f} TFLOP/s\n")
    for length, batch in itertools.product(args.length, args.batch):
        cases = kernel_cases(SIZES[args.model], batch, length, args.device, args.dtype)
        for kernel, shape, inputs, systems, works, unit in cases:
            for direction, work in works.items():
                runs = {name: kernel_run(function, inputs, direction) for name, function in systems.items()}
                turns = in_turns(runs, args.rounds, args.device, clock)
                ours = turns.pop("ours")
                rate = work / ours.seconds
                peers = (f"{name} {t.seconds / ours.seconds:.2f} ({(t.peak - t.held) / 1e6:.0f} MB)"
                         for name, t in turns.items())
                yield {"kernel": kernel, "shape": shape, "direction": direction, "ms": f"{1e3 * ours.seconds:.3f}",
                       "rate": f"{rate / 1e12:.2f} T{unit}/s", "of the best": f"{rate / best[unit]:.0%}",
                       "MB": f"{(ours.peak - ours.held) / 1e6:.0f}", "peer's time / ours": ", ".join(peers)}


# ---- Command line ---------------------------------------------------------------------------------------------------

KINDS = {"step": step_rows, "decode": decode_rows, "kernels": kernel_rows}


def parse(argv):
    parser = Parser(__doc__)
    add = functools.partial(parser.add_argument, help="default: %(default)s")
    add("kind", choices=KINDS, help="what is measured")
    add("stage", nargs="?", choices=STAGES, default="encoder", help="of `step`; default: %(default)s")
    parser.add_device()
    add("--model", choices=SIZES, help="whose sizes; default: see above")
    add("--dtype", choices=["float32", "bfloat16"], help="default: see above")
    add("--rounds", type=number(int, 1, 1000), default=5)
    size = dict(type=number(int, 1, 2**16), metavar="N", nargs="+")
    add("--batch", **size, default=[8])
    add("--length", **size, default=[512], help="of `decode` and `kernels`: positions before; default: %(default)s")
    add("--new", type=number(int, 2, 2**16), default=128, help="of `decode`: tokens of an answer; default: %(default)s")
    args = parser.parse_args(argv)
    cuda = args.device.startswith("cuda")
    args.model = args.model or ("llama-3.2-3b" if cuda else "small")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
    return args


def machine(device):
    """What was measured where."""
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else (
        f"{platform.machine()} CPU, {torch.get_num_threads()} threads")
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    versions = [f"{p} {installed[p]}" for p in ("torch", "triton", "transformers", "liger-kernel") if p in installed]
    return f"{chip}, {', '.join(versions)}, Python {platform.python_version()}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    print(f"{machine(args.device)}; `python -m studies.benchmark {shlex.join(argv)}`\n")
    line = lambda cells: print(f"| {' | '.join(map(str, cells))} |", flush=True)
    for i, row in enumerate(KINDS[args.kind](args)):
        if i == 0:
            line(row)
            line(["---"] * len(row))
        line(row.values())


if __name__ == "__main__":
    sys.exit(run_cli(main))

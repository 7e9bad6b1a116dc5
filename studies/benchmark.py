"""
How fast is a training step of the encoder, and how much memory do graft.py, a step with a real vocabulary and the
building of a surrogate need?

    python -m studies.benchmark             # everything, on the default LLM
    python -m studies.benchmark --memory    # only the step and the building, on random models: no download, quick
    python -m studies.benchmark kernels     # on a GPU: each kernel of kernels/ beside its peers

Everything is timed in turns within one run, because absolute times on shared machines wander; trust the ratios.
(studies/decoding.py measures answers, studies/gpu.py steps and answers at the paper's sizes.)
"""
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import kernels
import surrogate
import train
from cli import Parser, UserError, number, run_cli
from data.batches import Batches
from data.world import World
from formats import official
from formats.tokenizer import IMAGE, Tokenizer
from kernels import int8
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig
from recipes import RECIPES

ROOT = Path(__file__).parent.parent


def clock(function, device):
    start = time.perf_counter()
    result = function()
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def encoder_step(device, dtype, batch=16, rounds=5, replace=((16, 28),)):
    """One step of the stage `encoder` with a new translator: the time does not depend on what the weights are."""
    llm = Llama.from_pretrained(dtype=dtype, device=device)
    tokenizer = Tokenizer.from_pretrained(official.find(official.DEFAULT_LLM))
    vlm = VLM(ViT(ViTConfig()), surrogate.build_surrogate(llm, replace), tokenizer).to(device)
    recipe = dataclasses.replace(RECIPES["small"]["encoder"], batch=batch)
    optimizer = train.Optimizer(train.trained_parameters(vlm, "encoder"), recipe)
    vlm.to(dtype)
    batches = Batches(World(), recipe, tokenizer, vlm.n_visual, vlm.encoder.config.image_size)
    times = []
    for step in tqdm(range(rounds + 1), desc="encoder step", unit="step"):
        def one():
            (b,) = batches[step]            # one micro-batch, and nothing but images in it
            (vlm.loss(b) / train.count_targets([b])).backward()
            optimizer.gather()
            optimizer.update()
            return b["tokens"].shape[1]
        seconds, positions = clock(one, device)
        times.append(seconds)
    layers = vlm.decoder.config.num_hidden_layers
    print(f"| encoder step, {str(dtype)[6:]}, {layers}-layer surrogate, batch {batch}, ~{positions} positions "
          f"| {statistics.median(times[1:]):.2f} s | | |")


def graft_memory():
    """Peak memory of `python graft.py`, as the operating system counts it."""
    done = subprocess.run([sys.executable, ROOT / "graft.py", "--eval", "8", "--out", "runs/benchmark"],
                          capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"graft.py failed: {done.stderr.strip().splitlines()[-1]}")
    unit = 2**30 if sys.platform == "darwin" else 2**20         # macOS counts in bytes, Linux in KiB
    print(f"| graft.py, peak memory | {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit:.2f} GiB | | |")


# ---------------------------------------------------------------------------------------------------------------------
# Memory, each figure out of a fresh process: what another one has left there would hide a peak


def peak_memory():
    """Bytes: the most physical memory that this process has held so far, pages of files that it maps included."""
    if sys.platform == "linux":     # not ru_maxrss: there a new process begins with the peak of the one that started it
        rows = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        line = next(row for row in rows if row.startswith("VmHWM"))
        return int(line.split()[1]) * 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss       # macOS counts in bytes


def in_fresh_process(call, module="benchmark", **environment):
    """The value (numbers, strings, dictionaries) of an expression of this module, e.g. "surrogate_memory('folder')", or
    of another one in studies/; environment: variables that the process is given besides."""
    code = f"import json; from studies import {module}; print(json.dumps({module}.{call}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8",
                          env=os.environ | environment)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"it was killed, status {done.returncode}: out of memory?"])[-1]
        raise UserError(f"{module}.{call} failed: {why}")
    return json.loads(done.stdout.splitlines()[-1])


def llava_batch(n_visual, vocab, batch, text=100, answer=60):
    """A batch as data.batches.collate makes it of LLaVA's samples, out of random tokens: an image, and `text` tokens of
    which the last `answer` are the answer; lengths fall by 8, beginning again every four rows, and are padded."""
    T = n_visual + text
    tokens = torch.randint(vocab, (batch, T))
    tokens[:, 10:10 + n_visual] = IMAGE
    targets = torch.full((batch, T), -100)
    for b in range(batch):
        end = T - 8 * (b % 4)
        targets[b, end - answer - 1:end - 1] = tokens[b, end - answer:end]      # at position t the token t + 1
    return dict(tokens=tokens, targets=targets, pixels=torch.rand(batch, 3, 336, 336))


def encoder_step_memory(all_logits=False, vocab=128256, batch=3, width=64):
    """A step of stage 2, forward and backward, float32 on the CPU: dict(peak, loss, gradient, positions, targets).

    CLIP's 24x24 patches (579 visual tokens) and Llama 3's vocabulary, but few and narrow layers: what is left is what
    the vocabulary costs. peak: bytes above what model and batch have taken; gradient: its norm.
    all_logits: as one would write it first, the logits of every position and F.cross_entropy with ignore_index.
    """
    torch.manual_seed(0)
    llm = Llama(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4)).requires_grad_(False)
    llm.model.embed_tokens.weight.normal_(std=0.02)         # as a new LLM has them: the loss begins at log(vocab)
    vit = ViT(ViTConfig(image_size=336, patch_size=14, hidden_size=width, intermediate_size=4 * width,
                        num_hidden_layers=3, num_attention_heads=4))
    vlm = VLM(vit, surrogate.build_surrogate(llm, [(1, 2)]))
    trained = train.trained_parameters(vlm, "encoder")
    b = llava_batch(vlm.n_visual, vocab, batch)
    before = peak_memory()
    if all_logits:
        logits = vlm.decoder(embeds=vlm.embed(b["tokens"], b["pixels"]))                        # (B, T, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), b["targets"].flatten(), ignore_index=-100, reduction="sum")
        del logits          # as a function that returns the loss would: only what autograd needs stays
    else:
        loss = vlm.loss(b)
    n = int((b["targets"] >= 0).sum())
    (loss / n).backward()
    peak = peak_memory() - before
    gradient = torch.stack([p.grad.norm() for p in trained.values() if p.grad is not None]).norm()
    return dict(peak=peak, loss=loss.item() / n, gradient=gradient.item(), positions=b["tokens"].numel(), targets=n)


def save_random_llm(folder, layers=28, width=768, vocab=32064, shards=4):
    """A random Llama in bf16 in the layout of the hub. The defaults are Llama-3.2-3B with every width divided by 4."""
    config = dict(vocab_size=vocab, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
                  num_attention_heads=24, num_key_value_heads=8, head_dim=width // 24, rope_theta=500000.0)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in Llama(LlamaConfig(**config)).state_dict().items()}
    names, files = list(shapes), {}
    per_file = -(-len(names) // shards)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        files |= {n: file for n in names[i * per_file:(i + 1) * per_file]}
        tensors = {n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(std=0.02) for n in files if files[n] == file}
        save_file(tensors, Path(folder) / file)
    (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=files)), encoding="utf-8")
    config |= dict(model_type="llama", tie_word_embeddings=True)
    (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")


def surrogate_memory(folder, whole=False, ranges=((16, 26),), dtype="bfloat16"):
    """Building the surrogate of the LLM in `folder` on the CPU: dict(peak, size, layers), peak and size in bytes.

    peak: above what the process held before. The files are mapped, and a page takes memory only once it is read: so
    every weight that is held is read, as a first step would. whole: load the LLM, then take the surrogate out of it.
    """
    dtype = getattr(torch, dtype)
    with torch.device("meta"):              # for its first such model torch imports 30 MB of code: not in question
        Llama(LlamaConfig(vocab_size=8, num_hidden_layers=1))
    before = peak_memory()
    if whole:
        held = Llama.from_pretrained(folder, dtype, "cpu")
        ours = surrogate.build_surrogate(held, ranges)
    else:
        held = ours = surrogate.from_pretrained(folder, ranges, dtype, "cpu")
    for p in [*held.parameters(), *ours.parameters()]:
        p.sum()
    size = sum(p.numel() * p.element_size() for p in ours.parameters())
    return dict(peak=peak_memory() - before, size=size, layers=len(ours.model.layers))


def compare_step_memory(**sizes):
    """Print what a step of stage 2 needs, ours beside all logits. Returns the ratio of the peaks."""
    ours, naive = (in_fresh_process(f"encoder_step_memory(**{sizes | dict(all_logits=how)})") for how in (False, True))
    ratio = ours["peak"] / naive["peak"]
    print(f"| encoder step, vocabulary {sizes.get('vocab', 128256):,}, {ours['positions']} positions of which "
          f"{ours['targets']} have loss: peak memory | {ours['peak'] / 2**20:.0f} MiB "
          f"| all logits {naive['peak'] / 2**20:.0f} MiB | {ratio:.2f}x |")
    print(f"| its loss, its gradient's norm | {ours['loss']:.6f}, {ours['gradient']:.6f} | {naive['loss']:.6f}, "
          f"{naive['gradient']:.6f} | apart {abs(ours['loss'] - naive['loss']):.1e}, "
          f"{abs(ours['gradient'] - naive['gradient']):.1e} |")
    return ratio


def compare_surrogate_memory(ranges=((16, 26),), **sizes):
    """Print what building a surrogate needs, alone beside out of the whole LLM, over its own size. Returns the former.

    Writes the random LLM into a temporary folder (400 MB by default)."""
    with tempfile.TemporaryDirectory() as folder:
        save_random_llm(folder, **sizes)
        ours, whole = (in_fresh_process(f"surrogate_memory({folder!r}, {how}, {ranges!r})") for how in (False, True))
    ratio = ours["peak"] / ours["size"]
    print(f"| building a surrogate of {ours['layers']} layers, {ours['size'] / 2**20:.0f} MiB in bf16: peak memory "
          f"| {ours['peak'] / 2**20:.0f} MiB, {ratio:.2f}x its size "
          f"| out of the whole LLM {whole['peak'] / 2**20:.0f} MiB, {whole['peak'] / whole['size']:.2f}x "
          f"| {ours['peak'] / whole['peak']:.2f}x |")
    return ratio


# ---------------------------------------------------------------------------------------------------------------------
# Kernels, each beside its peers, on a GPU

LLMS = {    # rows of the residual stream, its width, the MLP's, targets, vocabulary; batch, length, heads, head dim
    "Llama-3.2-3B": (8 * 768, 3072, 8192, 1024, 128256, (8, 1024, 24, 8, 128)),
    "Llama-3.1-8B": (8 * 2048, 4096, 14336, 1024, 128256, (2, 4096, 32, 8, 128)),
    "SmolLM2-135M": (32 * 256, 576, 1536, 1024, 49152, (32, 256, 9, 3, 64)),
}


def kernel_cases(sizes, device="cuda", dtype=torch.bfloat16):
    """Yield (kernel, shape, inputs, {system: function of them}, work forward, work backward, "FLOP" or "B").

    Ours comes first. Work: operations, or bytes that must be moved at least."""
    rows, width, inner, targets, vocab, (B, T, H, Hkv, D) = sizes
    make = lambda *shape: torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    compiled = lambda function: torch.compile(function, dynamic=False)      # for the very shape

    def sdpa(backend):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True,
                                                      enable_gqa=True).transpose(1, 2)
        return run

    def norm(x, weight, residual):
        s = x + residual
        return (s.float() * torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(s.dtype) * weight, s

    def loss(hidden, weight, wanted):
        return F.cross_entropy((hidden @ weight.t()).float(), wanted, reduction="sum")

    flops, size = 2 * B * H * D * T * (T + 1), torch.empty(0, dtype=dtype).element_size()
    yield ("attention", f"B {B}, T {T}, H {H}/{Hkv}, D {D}", (make(B, T, H, D), make(B, T, Hkv, D), make(B, T, Hkv, D)),
           {"ours": kernels.attention, "flash": sdpa(SDPBackend.FLASH_ATTENTION),
            "cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION)}, flops, 2.5 * flops, "FLOP")
    q, k, angles = make(B, 1, H, D).detach(), make(B, T, Hkv, D).detach(), torch.rand(T, D // 2, device=device)
    yield ("attention, a step", f"B {B}, 1 of {T}, H {H}/{Hkv}, D {D}", (q, k, k.clone()),
           {"ours": kernels.attention, "PyTorch": kernels.reference.attention}, 2 * k.numel() * size, None, "B")
    yield ("RoPE", f"B {B}, T {T}, H {H}, D {D}", (make(B, T, H, D), angles.cos(), angles.sin()),
           {"ours": kernels.apply_rope, "torch.compile": compiled(kernels.reference.apply_rope)},
           *[2 * B * T * H * D * size] * 2, "B")
    yield ("RMSNorm + residual", f"{rows} x {width}", (make(rows, width), make(width).detach(), make(rows, width)),
           {"ours": lambda x, w, r: kernels.rms_norm(x, w, 1e-5, r), "PyTorch": norm, "torch.compile": compiled(norm)},
           *[4 * rows * width * size] * 2, "B")
    swiglu = lambda gate, up: F.silu(gate) * up
    yield ("SwiGLU", f"{rows} x {inner}", (make(rows, inner), make(rows, inner)),
           {"ours": kernels.swiglu, "PyTorch": swiglu, "torch.compile": compiled(swiglu)},
           3 * rows * inner * size, 5 * rows * inner * size, "B")
    head = make(vocab, width).detach() / width ** 0.5
    yield ("LM head + loss", f"{targets} x {width} x {vocab}",
           (make(targets, width), head, torch.randint(vocab, (targets,), device=device)),
           {"ours": kernels.linear_cross_entropy, "PyTorch": loss, "torch.compile": compiled(loss)},
           4 * targets * width * vocab, 0, "FLOP")                  # whose gradient ours computes on the way forward
    matrix = int8.Int8Linear(torch.randn(inner, width)).to(device)
    plain = lambda x: F.linear(x, matrix.weight.to(dtype)) * matrix.scale.to(dtype)
    yield ("int8 weights", f"1 x {width} x {inner}", (make(1, width).detach(),),
           {"ours": matrix, "torch.compile": compiled(plain)}, width * inner, None, "B")


def kernel_rows(name, sizes, time, **where):
    """Rows of (LLM, kernel, shape, direction, ours in ms, rate, peers' time / ours). time(function) -> ms."""
    for kernel, shape, inputs, systems, forward, backward, unit in kernel_cases(sizes, **where):
        wanted, times = [x for x in inputs if x.requires_grad], {}
        for system, function in systems.items():
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = [torch.randn_like(o) for o in outputs]
            times[system] = [time(lambda: function(*inputs))]
            if wanted:
                times[system].append(time(lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)))
        parts = [("forward", forward, 0), ("backward", backward, 1)]
        if backward is None or backward == 0:
            parts, times = [("both" if wanted else "forward", forward, 0)], {n: [sum(t)] for n, t in times.items()}
        for direction, work, i in parts:
            ms = times["ours"][i]
            peers = ", ".join(f"{n} {t[i] / ms:.2f}" for n, t in times.items() if n != "ours")
            yield name, kernel, shape, direction, f"{ms:.3f}", f"{work / ms / 1e9:.2f} T{unit}/s", peers


def environment(command):
    """A line that says what was measured where."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{chip}, PyTorch {torch.__version__}, Python {platform.python_version()}; `python -m {command}`"


def markdown(header, rows):
    return "\n".join("| " + " | ".join(str(c) for c in row) + " |" for row in [header, ["---"] * len(header), *rows])


def ceilings():
    """What this GPU does at best, measured: (bytes/s of a large copy, FLOP/s of a large bf16 matrix product)."""
    from triton.testing import do_bench
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copy = 4 * x.numel() / do_bench(lambda: y.copy_(x), return_mode="median") * 1e3
    x = y = None            # their memory is free again
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return copy, 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") * 1e3


def compare_kernels():
    """Print the table. do_bench: GPU events, the median, with a cold L2 cache."""
    if not torch.cuda.is_available() or kernels.triton is None:
        raise UserError("there is no GPU with Triton here, so there are no kernels to time: `pytest "
                        "tests/test_kernels.py` checks them in Triton's interpreter")
    from triton.testing import do_bench
    copy, flops = ceilings()
    print(f"{environment('studies.benchmark kernels')}\n\nMeasured ceilings: copy {copy / 1e9:.0f} GB/s, bf16 matrix "
          f"product {flops / 1e12:.0f} TFLOP/s.\n")
    with kernels.backend("triton"):
        rows = [row for name, sizes in LLMS.items()
                for row in kernel_rows(name, sizes, lambda f: do_bench(f, return_mode="median"))]
    print(markdown(("LLM", "kernel", "shape", "direction", "ms", "rate", "peer's time / ours"), rows))


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="?", choices=("step", "kernels"), default="step", help="default: %(default)s")
    parser.add_device()
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=5,
                        help="timed repetitions, of which the median counts (default: %(default)s)")
    parser.add_argument("--memory", action="store_true",
                        help="only the memory of a step and of building a surrogate, on random models on the CPU")
    args = parser.parse_args(argv)
    if args.what == "kernels":
        return compare_kernels()
    on_gpu = args.device.startswith("cuda") and not args.memory
    chip = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{chip}, torch {torch.__version__}, Python {platform.python_version()}\n\n"
          "| what | ours | peer | ratio |\n|---|---|---|---|")
    if not args.memory:
        graft_memory()      # first: the children's peak is the largest child so far
    compare_step_memory()
    compare_surrogate_memory()
    if args.memory:
        return
    for dtype in dict.fromkeys([torch.float32, train.default_dtype(args.device)]):          # once, if they are the same
        encoder_step(args.device, dtype, rounds=args.rounds)


if __name__ == "__main__":
    sys.exit(run_cli(main))

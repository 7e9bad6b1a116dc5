"""
What does a GPU make of the paper's sizes? A training step of the encoder, and decoding, with random weights.

    python -m studies.gpu step          # stage 2 behind Llama-3.2-3B's surrogate, beside transformers
    python -m studies.gpu decode        # tokens/s of a 3B and an 8B Llama, and the share of what memory allows

All rows of a table come from one run, taking turns. (studies/benchmark.py times the kernels one by one.)
"""
import dataclasses
import statistics
import sys
import time
import warnings

import torch
import torch.nn.functional as F

import kernels
import train
from cli import Parser, UserError, number, run_cli
from kernels import int8
from model import VLM, Llama, ViT
from recipes import RECIPES, TARGETS
from studies.benchmark import ceilings, environment, llava_batch, markdown
from studies.decoding import transformers_twin
from surrogate import build_surrogate

# ---- A step of stage 2 ----------------------------------------------------------------------------------------------


def random_model(kind, config, dtype, device):
    """A Llama or ViT of this size, frozen."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = kind(config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


class Theirs(torch.nn.Module):
    """The same VLM as the paper's code has it: transformers' CLIP and Llama, logits at every position."""

    def __init__(self, vlm):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel
        c = vlm.encoder.config
        with torch.device("meta"):
            self.encoder = CLIPVisionModel(CLIPVisionConfig(
                image_size=c.image_size, patch_size=c.patch_size, hidden_size=c.hidden_size, projection_dim=8,
                intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
                num_attention_heads=c.num_attention_heads, layer_norm_eps=c.layer_norm_eps))
        ours, names = vlm.encoder.state_dict(), self.encoder.state_dict()
        prefix = "" if "vision_model.post_layernorm.weight" in names else "vision_model."     # transformers 4 or 5
        self.encoder.load_state_dict({n: ours[prefix + n] for n in names}, assign=True)
        for module in self.encoder.modules():
            if hasattr(module, "position_ids"):             # no parameter, and so still on "meta"
                module.position_ids = torch.arange(c.num_patches + 1, device=vlm.embd_soi.device)[None]
        self.prefix = prefix
        self.adapter, self.embd_soi, self.embd_eoi = vlm.adapter, vlm.embd_soi, vlm.embd_eoi
        self.decoder = transformers_twin(vlm.decoder)
        self.norm = self.encoder.get_submodule("vision_model.post_layernorm" if not prefix else "post_layernorm")

    def trained(self, names):
        """Of our names of trained parameters, {name: transformers' parameter}."""
        own = {n.replace("encoder.", "encoder." + self.prefix, 1) if n.startswith("encoder.") else n: p
               for n, p in self.named_parameters()}
        self.requires_grad_(False)
        return {n: own[n].requires_grad_(True) for n in names}

    def loss(self, batch):
        device = self.embd_soi.device
        tokens, targets = batch["tokens"].to(device), batch["targets"].to(device)
        pixels = batch["pixels"].to(self.embd_soi)
        x = self.adapter(self.norm(self.encoder(pixels).last_hidden_state))
        soi, eoi = (e.expand(len(x), 1, -1) for e in (self.embd_soi, self.embd_eoi))
        x = torch.cat([soi, x, eoi], dim=1)
        text = self.decoder.get_input_embeddings()(tokens.clamp(min=0))
        start = int((batch["tokens"][0] < 0).nonzero()[0])          # the image's, as in llava_batch
        embeds = torch.cat([text[:, :start], x, text[:, start + x.shape[1]:]], dim=1)
        logits = self.decoder(inputs_embeds=embeds).logits.float()                      # (B, T, vocab)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def step_rows(target, recipe, batch, device="cuda", dtype=torch.bfloat16, steps=5):
    """Rows of (system, ms a step, tokens/s, peak GiB, waits, GPU busy, first loss), all for the same weights and batch.

    waits: how often a step waits for the GPU; busy: the share of the time in which a kernel runs (torch.profiler).
    """
    llm = random_model(Llama, target.llm_config, dtype, device)
    vit = random_model(ViT, target.vit_config, dtype, device)
    vlm = VLM(vit, build_surrogate(llm, target.ranges)).to(device, dtype)
    del llm
    learns = train.trained_parameters(vlm, "encoder")
    systems = {"ours": ("triton", vlm, learns), "ours, PyTorch only": ("torch", vlm, learns)}
    theirs = Theirs(vlm)
    systems["transformers, all logits"] = ("torch", theirs, theirs.trained(learns))
    vlm.requires_grad_(False)
    b = llava_batch(vlm.n_visual, target.llm_config.vocab_size, batch)
    rows, results = [], {name: [] for name in systems}
    for turn in range(2):
        for name, (backend, model, parameters) in systems.items():
            for p in parameters.values():
                p.requires_grad_(True)
            optimizer = train.Optimizer(parameters, dataclasses.replace(recipe, lr=0.0))        # all see the same

            def step():
                loss = model.loss(b) / train.count_targets([b])
                loss.backward()
                optimizer.gather()
                optimizer.update()
                return loss.item()

            with kernels.backend(backend):
                try:
                    results[name].append(measure(step, steps, device))
                except torch.OutOfMemoryError:
                    print(f"{name}: out of memory", file=sys.stderr)
            for p in parameters.values():
                p.requires_grad_(False)
    for name, turns in results.items():
        if not turns:
            rows.append((name, "out of memory", "", "", "", "", ""))
            continue
        best = min(turns, key=lambda r: r["ms"])
        rows.append((name, f"{best['ms']:.1f}", f"{b['tokens'].numel() / best['ms'] * 1e3:.0f}", f"{best['peak']:.1f}",
                     best["waits"], best["busy"], f"{turns[0]['loss']:.4f}"))
    return rows


def measure(step, steps, device):
    """dict(ms, the median of `steps` steps by the clock; peak, GiB; waits; busy; loss) of a training step."""
    if not str(device).startswith("cuda"):
        return dict(loss=step(), ms=1e3 * timed(step), peak=0.0, waits="", busy="")
    loss, _ = step(), step()                                # compiles
    torch.cuda.reset_peak_memory_stats()
    ms = 1e3 * statistics.median(timed(step) for _ in range(steps))
    peak = torch.cuda.max_memory_allocated() / 2**30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in caught)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = timed(lambda: [step() for _ in range(3)])
    on_gpu = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    busy = sum(e.time_range.elapsed_us() for e in on_gpu) / 1e6
    return dict(loss=loss, ms=ms, peak=peak, waits=str(waits), busy=f"{busy / seconds:.0%}")


def timed(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- Decoding -------------------------------------------------------------------------------------------------------


def weight_bytes(llm):
    """What a decoding step has to read: all weights but the embeddings', of which it reads one row (unless they are the
    head, too)."""
    tied = llm.config.tie_word_embeddings and not hasattr(llm, "lm_head")
    return sum(t.numel() * t.element_size() for n, t in llm.state_dict().items() if tied or "embed_tokens" not in n)


def ours(llm, prompts, new):
    """(tokens/s of all rows after the first ten of each, seconds to the first) of greedy decoding."""
    start, times = time.perf_counter(), []
    for token in llm.stream(llm.embed(prompts), max_new_tokens=new):
        token.tolist()                                      # waits for it
        times.append(time.perf_counter() - start)
    return len(prompts) * (new - 11) / (times[-1] - times[10]), times[0]


def theirs(twin, prompts, new, **options):
    """The same of transformers' generate."""
    ends = [timed(lambda: twin.generate(prompts, do_sample=False, min_new_tokens=n, max_new_tokens=n,
                                        attention_mask=torch.ones_like(prompts), **options)) for n in (1, 11, new)]
    return len(prompts) * (new - 11) / (ends[2] - ends[1]), ends[0]


@torch.no_grad()
def decode_rows(name, config, bandwidth, length=512, new=128, batches=(1, 8), rounds=2, device="cuda", compiled=False):
    """Rows of (model, system, batch, tokens/s, ms to the first token, GB read a step, share of the bandwidth)."""
    def in_turns(systems, size):
        for batch in batches:
            prompts = torch.randint(config.vocab_size, (batch, length), device=device)
            results = {n: [] for n in systems}
            for _ in range(rounds + 1):                     # the first compiles
                for n, run in systems.items():
                    results[n].append(run(prompts))
            for n in systems:
                rate, first = (statistics.median(r[k] for r in results[n][1:]) for k in (0, 1))
                share = size * rate / batch / bandwidth
                rows.append((name, n, batch, f"{rate:.1f}", f"{1e3 * first:.0f}", f"{size / 1e9:.1f}", f"{share:.0%}"))
                print("  " + " | ".join(map(str, rows[-1])), file=sys.stderr, flush=True)

    llm, rows = random_model(Llama, config, torch.bfloat16, device), []
    twin = transformers_twin(llm)
    systems = {"ours": lambda p: ours(llm, p, new), "transformers": lambda p: theirs(twin, p, new)}
    if compiled:
        systems["transformers, static cache"] = lambda p: theirs(twin, p, new, cache_implementation="static")
    in_turns(systems, weight_bytes(llm))
    twin = None                                             # it shares the weights, which are rounded now
    int8.quantize(llm)
    in_turns({"ours, int8": lambda p: ours(llm, p, new)}, weight_bytes(llm))
    return rows


# ---- Command line ---------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("step", "decode"), help="which table")
    parser.add_argument("--batch", type=number(int, 1, 1024), nargs="+", default=[8, 16], metavar="N",
                        help="step: samples of a step (default: 8 16)")
    parser.add_argument("--compiled", action="store_true",
                        help="decode: transformers with a static cache, too, which it compiles for minutes")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("there is no GPU here: on a CPU see `python -m studies.benchmark` and `… studies.decoding`")
    import transformers
    print(environment(f"studies.gpu {args.what}") + f", transformers {transformers.__version__}\n", flush=True)
    target = TARGETS["llama-3.2-3b"]
    if args.what == "step":
        header = ("batch", "system", "ms a step", "tokens/s", "peak GiB", "waits", "GPU busy", "first loss")
        rows = []
        for batch in args.batch:
            rows += [(batch, *row) for row in step_rows(target, RECIPES["llama-3.2-3b"]["encoder"], batch)]
            torch.cuda.empty_cache()
            print(markdown(header, rows[-3:]), file=sys.stderr, flush=True)
    else:
        bandwidth, _ = ceilings()
        print(f"Measured copy bandwidth: {bandwidth / 1e9:.0f} GB/s. A prompt of 512 tokens, then 128 new ones.\n")
        header = ("model", "system", "batch", "tokens/s", "first token, ms", "weights, GB", "of the bandwidth")
        rows = []
        for name in ("llama-3.2-3b", "llama-3.1-8b"):
            rows += decode_rows(name, TARGETS[name].llm_config, bandwidth, compiled=args.compiled)
            torch.cuda.empty_cache()
    print(markdown(header, rows))


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
How fast are answers decoded? The default LLM in float32, bfloat16 and int8, beside transformers' `generate`.

    python -m studies.decoding

Tokens per second after the first token, all rows of a batch together, and the time to the first token; medians over
rounds in which all take turns, because absolute times on shared machines wander: trust the ratios.
"""
import platform
import statistics
import sys

import torch
from tqdm import tqdm

from cli import Parser, number, run_cli
from model import Llama
from studies.benchmark import clock, in_fresh_process, peak_memory
from surrogate import build_surrogate, run_both
from train import default_dtype

OURS = {"float32": dict(), "bfloat16": dict(dtype=torch.bfloat16), "int8": dict(quantize="int8")}
THEIRS = {"transformers": {}, "transformers, static cache": dict(cache_implementation="static")}


def transformers_twin(llm):
    """transformers' LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = llm.config
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            rope_parameters=dict(c.rope_scaling or dict(rope_type="default"), rope_theta=c.rope_theta),
            tie_word_embeddings=c.tie_word_embeddings, max_position_embeddings=c.max_position_embeddings,
            bos_token_id=1, eos_token_id=2, pad_token_id=2))
    twin.load_state_dict(llm.state_dict() | {"lm_head.weight": llm.lm_head_weight}, assign=True)
    rope = twin.model.rotary_emb            # its frequencies are no parameters: build them where there is memory
    twin.model.rotary_emb = type(rope)(twin.config)
    twin.tie_weights()
    return twin.eval().to(llm.device)


def system(name, device="cpu"):
    """(llm, a function (prompts (B, T), n) -> n new tokens of each row, greedily, a list of lists)."""
    if name in OURS:
        llm = Llama.from_pretrained(device=device, **OURS[name])
        return llm, lambda prompts, n: llm.generate(prompts.tolist(), max_new_tokens=n)
    twin = transformers_twin(Llama.from_pretrained(device=device))
    return twin, lambda prompts, n: twin.generate(
        prompts.to(device), attention_mask=torch.ones_like(prompts, device=device), do_sample=False, min_new_tokens=n,
        max_new_tokens=n, **THEIRS[name])[:, prompts.shape[1]:].tolist()


def memory_of(name, device="cpu"):
    """dict(held, peak), bytes: the weights; and the most that loading and decoding 48 tokens took above that before."""
    before = peak_memory()
    llm, run = system(name, device)
    run(torch.arange(100, 140)[None], 48)
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in llm.state_dict().values()}       # tied ones once
    return dict(held=sum(tensors.values()), peak=peak_memory() - before)


@torch.no_grad()
def time_decoding(systems, length, batch, tokens=48, rounds=5, device="cpu"):
    """{name: (tokens/s of all rows together, seconds to the first token, tokens)}, medians over rounds in turns."""
    prompts = torch.randint(100, 4000, (batch, length), generator=torch.Generator().manual_seed(0))
    times, said = {name: [] for name in systems}, {}
    for _ in tqdm(range(rounds + 1), desc=f"prompt {length}, batch {batch}", unit="round"):
        for name, run in systems.items():
            first, _ = clock(lambda: run(prompts, 1), device)
            whole, said[name] = clock(lambda: run(prompts, tokens), device)
            times[name].append((batch * (tokens - 1) / (whole - first), first))
    median = lambda pairs, k: statistics.median(p[k] for p in pairs[1:])                # the first round warms up
    return {name: (median(pairs, 0), median(pairs, 1), said[name]) for name, pairs in times.items()}


@torch.no_grad()
def time_trunk(length=60, batch=20, rounds=5, device="cpu"):
    """(seconds for a prompt through surrogate, then LLM; seconds where both share the trunk), medians in turns."""
    llm = Llama.from_pretrained(device=device)
    L = llm.config.num_hidden_layers
    surrogate = build_surrogate(llm, [(2 * L // 3, L - 2)])
    x = llm.embed(torch.randint(100, 4000, (batch, length), device=device))                          # (B, T, C)
    ways = (lambda: (surrogate.run(x), llm.run(x))), (lambda: run_both(surrogate, llm, x))
    times = [[clock(way, device)[0] for way in ways] for _ in range(rounds + 1)]
    return [statistics.median(t) for t in zip(*times[1:])]


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_device()
    parser.add_argument("--rounds", type=number(int, 1, 1000), default=5,
                        help="timed repetitions, of which the median counts (default: %(default)s)")
    parser.add_argument("--length", type=number(int, 1, 4096), nargs="+", default=[40, 600], metavar="N",
                        help="tokens of the prompt (default: 40 600)")
    parser.add_argument("--batch", type=number(int, 1, 256), nargs="+", default=[1, 8], metavar="N",
                        help="prompts at a time (default: 1 8)")
    args = parser.parse_args(argv)
    on_gpu = args.device.startswith("cuda")
    chip = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    import transformers
    names = [*THEIRS, *OURS]
    if default_dtype(args.device) != torch.bfloat16:
        names.remove("bfloat16")        # emulated: a prompt takes 5 times as long
    print(f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"Python {platform.python_version()}; ratio: to transformers' better one\n")
    if not on_gpu:
        print("| memory | weights | peak, loading and decoding |\n|---|--:|--:|")
        for name in names:
            m = in_fresh_process(f"memory_of({name!r})", "decoding")
            print(f"| {name} | {m['held'] / 2**20:.0f} MiB | {m['peak'] / 2**20:.0f} MiB |", flush=True)
    apart, shared = time_trunk(rounds=args.rounds, device=args.device)
    print(f"\npair and graft over 20 prompts of 60 tokens: {apart:.2f} s, with their trunk shared {shared:.2f} s "
          f"({shared / apart:.0%})", flush=True)
    systems = {name: system(name, args.device)[1] for name in names}
    for length in args.length:
        for batch in args.batch:
            rows = time_decoding(systems, length, batch, rounds=args.rounds, device=args.device)
            best = max(rows[name][0] for name in THEIRS)
            print(f"\n| prompt of {length} tokens, {batch} at a time | tokens/s | ratio | first token | same tokens |\n"
                  "|---|--:|--:|--:|--:|")
            for name, (rate, first, said) in rows.items():
                same = sum(a == b for x, y in zip(said, rows["transformers"][2]) for a, b in zip(x, y))
                print(f"| {name} | {rate:.1f} | {rate / best:.2f}x | {first:.2f} s | {same / len(sum(said, [])):.0%} |",
                      flush=True)


if __name__ == "__main__":
    sys.exit(run_cli(main))

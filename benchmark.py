"""
How fast is it? Decoding beside transformers, a training step of the encoder, and the memory of graft.py.

    python benchmark.py                 # all three, on the default LLM

Everything is timed in turns within one run, because absolute times on shared machines wander; trust the ratios.
(kernels/benchmark.py measures the Triton kernels on a GPU.)
"""
import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import train
import weights
from model import Llama
from tokenizer import Tokenizer


def transformers_twin(llm):
    """transformers' LlamaForCausalLM with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = llm.config
    with torch.device("meta"):
        twin = LlamaForCausalLM(LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tie_word_embeddings,
            max_position_embeddings=c.max_position_embeddings, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    twin.load_state_dict(llm.state_dict() | {"lm_head.weight": llm.lm_head_weight}, assign=True)
    rope = twin.model.rotary_emb                    # its frequencies are no parameters: build them where there is memory
    twin.model.rotary_emb = type(rope)(twin.config)
    twin.tie_weights()
    return twin.eval().to(llm.device)


def clock(function, device):
    start = time.perf_counter()
    result = function()
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


@torch.no_grad()
def decode(device, dtype, tokens=64, rounds=5):
    """Greedy decoding with a key/value cache, ours and transformers' `generate` in turns, from the same prompt."""
    llm = Llama.from_pretrained(dtype=dtype, device=device)
    tokenizer = Tokenizer.from_pretrained(weights.find(weights.DEFAULT_LLM))
    twin = transformers_twin(llm)
    prompt = tokenizer.chat([{"role": "user", "content": "Tell me a long story about the sea."}])
    ids = torch.tensor([prompt], device=device)
    ours = lambda: llm.generate([prompt], max_new_tokens=tokens)[0]
    theirs = lambda: twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)[0, ids.shape[1]:].tolist()
    a, b = ours(), theirs()                         # also warms up
    times = [(clock(ours, device)[0], clock(theirs, device)[0]) for _ in tqdm(range(rounds), desc="decode", unit="round")]
    us, them = (tokens / statistics.median(t) for t in zip(*times))
    ratio = statistics.median(t / o for o, t in times)
    print(f"| decode, {str(dtype)[6:]}, 1 row, {tokens} tokens (the same in both: {a == b}) | {us:.1f} tokens/s | transformers {them:.1f} tokens/s | {ratio:.2f}x |")


def encoder_step(device, dtype, batch=16, rounds=5, distill_every=0, replace=((16, 28),)):
    """One step of the stage `encoder` with a new translator: the time does not depend on what the weights are."""
    from surrogate import build_surrogate
    from model import VLM, ViT, ViTConfig
    llm = Llama.from_pretrained(dtype=dtype, device=device)
    tokenizer = Tokenizer.from_pretrained(weights.find(weights.DEFAULT_LLM))
    vlm = VLM(ViT(ViTConfig()), build_surrogate(llm, replace), tokenizer).to(device=device, dtype=dtype)
    trainer = train.Trainer(train.trained_parameters(vlm, "encoder", distill_every > 0), 5e-5, 100)
    times = []
    for step in tqdm(range(rounds + 1), desc="encoder step", unit="step"):
        def one():
            b = train.image_batch(vlm, None, step, batch, train.RECIPES["encoder"], 0)
            ce, distill = train.surrogate_loss(vlm, b, "encoder", llm if distill_every else None)
            (ce / int((b["targets"] >= 0).sum()) + (distill if distill_every else 0)).backward()
            trainer.update()
            return b["tokens"].shape[1]
        seconds, positions = clock(one, device)
        times.append(seconds)
    layers = vlm.decoder.config.num_hidden_layers
    print(f"| encoder step, {str(dtype)[6:]}, {layers}-layer surrogate, batch {batch}, ~{positions} positions{', on-policy' if distill_every else ''} "
          f"| {statistics.median(times[1:]):.2f} s | | |")


def memory():
    """Peak memory of `python graft.py`, as the operating system counts it."""
    done = subprocess.run([sys.executable, "graft.py", "--eval", "8", "--out", "runs/benchmark"], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"graft.py failed: {done.stderr.strip().splitlines()[-1]}")
    unit = 2**30 if sys.platform == "darwin" else 2**20         # macOS counts in bytes, Linux in KiB
    print(f"| graft.py, peak memory | {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit:.2f} GiB | | |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions, of which the median counts (default: %(default)s)")
    args = parser.parse_args(argv)
    chip = torch.cuda.get_device_name() if args.device.startswith("cuda") else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{chip}, torch {torch.__version__}, Python {platform.python_version()}\n\n| what | ours | peer | ratio |\n|---|---|---|---|")
    memory()                # first: the children's peak is the largest child so far
    decode(args.device, torch.float32, rounds=args.rounds)
    if train.default_dtype(args.device) == torch.bfloat16:
        decode(args.device, torch.bfloat16, rounds=args.rounds)
    encoder_step(args.device, torch.float32, rounds=args.rounds)
    encoder_step(args.device, train.default_dtype(args.device), rounds=args.rounds)
    encoder_step(args.device, train.default_dtype(args.device), rounds=args.rounds, distill_every=1, replace=((20, 28),))


if __name__ == "__main__":
    sys.exit(weights.run_cli(main))

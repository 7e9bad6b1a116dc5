"""
Memory on paper beside memory measured: a step on a model of about 1B parameters with random weights, on the CPU, in a
process of its own; and the peaks of the small world's stages as a user runs them.

    python -m studies.memory                        # stage encoder: 5 GB, about a minute of one core
    python -m studies.memory translator decoder     # other stages (decoder: with LoRA)
    python -m studies.memory --small                # the small world: two steps of every stage

The formula is `memory` in studies/cost.py. Measured is what the operating system says that the process held at most,
less what it held after a step on a tiny model, which brings in all of torch's code that a step needs. The process gives
freed memory back at once (glibc's MALLOC_MMAP_THRESHOLD_): what an allocator keeps in reserve is not the model's.
"""
import subprocess
import sys
import tempfile
from dataclasses import replace

import torch
import torch.nn.functional as F

import kernels
import train
from cli import Parser, UserError, run_cli
from extras.lora import add_lora
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig
from recipes import CLIP, STAGES, Recipe, Target
from studies import cost
from studies.benchmark import ROOT, in_fresh_process, llava_batch, peak_memory

# The sizes of Llama-3.2-1B, of which a surrogate keeps 12 of 16 layers; the paper's CLIP ViT-L/14-336
MID = Target("Llama-3.2-1B's sizes", ranges=((10, 14),), **CLIP, llm_config=LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, rope_theta=500000.0, tie_word_embeddings=True))
TINY = replace(MID, ranges=((2, 3),), llm_config=LlamaConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8), vit_config=ViTConfig(
    image_size=336, patch_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2))
RECIPE = Recipe(batch=2, micro_batch=1, lr=5e-5, checkpointing=True)
TEXT, ANSWER, LORA = 100, 60, 8         # tokens of a sample beside the image, targets among them; rank


def random(build):
    """What `build` builds, in bf16 and with random weights, without a float32 copy on the way."""
    with torch.device("meta"):
        module = build().bfloat16()
    module.to_empty(device="cpu")
    for p in module.parameters():
        p.detach().uniform_(-0.03, 0.03)
    return module


def sdpa(q, k, v, causal):
    """Attention that does not keep its scores, like the GPU's kernel: q (B, T, H, D), k and v (B, T, Hkv, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2).contiguous()


def step(stage, target, recipe=RECIPE):
    """A micro-batch forward and backward, then the optimizer's step: dict(parameters, loss). As in the midst of a run:
    Adam has its state, and there is the gradient of a micro-batch before."""
    c, (kept, translators, trunk) = target.llm_config, cost.decoder_layers(stage, target)
    # of a surrogate, only the layers that it keeps are ever there, as with surrogate.from_pretrained
    decoder = random(lambda: Llama(replace(c, num_hidden_layers=kept)))
    decoder.requires_grad_(False)
    if translators:
        decoder.translators = [trunk]
    else:
        add_lora(decoder, LORA)
    vlm = random(lambda: VLM(ViT(target.vit_config), Llama(replace(c, num_hidden_layers=0, vocab_size=1))))
    vlm.decoder = decoder
    decoder.checkpointed = range(kept) if recipe.checkpointing else ()
    optimizer = train.Optimizer(train.trained_parameters(vlm, stage, recipe.vit_layers), recipe)
    vlm.bfloat16()                                          # LoRA's matrices; the rest is
    for m in optimizer.master.values():
        m.grad = torch.zeros_like(m)
    optimizer.adam.param_groups[0]["lr"] = 0.0
    optimizer.adam.step()
    loss = vlm.loss(llava_batch(vlm.n_visual, c.vocab_size, recipe.micro_batch, TEXT, ANSWER)) / ANSWER
    loss.backward()
    optimizer.gather()
    optimizer.update()
    return dict(parameters=sum(p.numel() for p in vlm.parameters()), loss=loss.item())


def step_memory(stage="encoder", target=MID):
    """`step`, and its peak in bytes above what the process held before: dict(peak, parameters, loss)."""
    torch.manual_seed(0)
    kernels.reference.attention_by_products = sdpa              # for speed, it keeps the scores
    step(stage, TINY)
    before = peak_memory()
    return step(stage, target) | dict(peak=peak_memory() - before)


def compare(stage):
    """Print the row of a stage, formula beside measurement. Returns measured / formula."""
    # glibc keeps what was freed for later use, half a GB here; by these it gives it back at once, as if all were exact
    at_once = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    got = in_fresh_process(f"step_memory({stage!r})", "memory", **at_once)
    lora, positions = LORA * (stage == "decoder"), MID.vit_config.num_patches + 3 + TEXT
    parts = cost.memory(stage, MID, RECIPE, RECIPE.micro_batch, positions, ANSWER, lora=lora)
    of = [sum(parts[p] for p in names) for names in cost.COLUMNS.values()]
    cells = [f"{x / 1e9:.2f}" for x in (*of, sum(of), got["peak"])]
    print(f"| {stage}{f', LoRA {lora}' if lora else ''} | {got['parameters'] / 1e9:.2f}B | {' | '.join(cells)} "
          f"| {got['peak'] / sum(of) - 1:+.1%} |", flush=True)
    return got["peak"] / sum(of)


def peak_of(command):
    """Peak memory in bytes of a Python command, e.g. ["train.py", "encoder"] or ["-m", "extras.vit"], run to its end in
    the project's folder."""
    module = command[0] == "-m"
    start = f"run_module({command[1]!r}" if module else f"run_path({command[0]!r}"
    code = (f"import runpy, sys\nsys.argv = {command[module:]!r}\n"
            f"try:\n    runpy.{start}, run_name='__main__')\nexcept SystemExit as e:\n    assert not e.code\n"
            "from studies.benchmark import peak_memory\nprint(peak_memory())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()
        raise UserError(f"{' '.join(command)} failed: {why[-1] if why else 'it was killed'}")
    return int(done.stdout.splitlines()[-1])


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("stages", nargs="*", help=f"stages of the 1B model, of {', '.join(STAGES)} (default: encoder)")
    parser.add_argument("--small", action="store_true", help="the small world's stages in place of the 1B model")
    args = parser.parse_args(argv)
    if odd := set(args.stages) - set(STAGES):
        raise UserError(f"there is no stage {min(odd)!r}: choose of {', '.join(STAGES)}")
    if args.small:
        print("| two steps of the small world | peak of the process, GB |\n|---|--:|")
        with tempfile.TemporaryDirectory() as folder:
            for command in [["-m", "extras.vit"], *(["train.py", stage] for stage in args.stages or STAGES)]:
                peak = peak_of([*command, "steps=2", "--out", f"{folder}/{command[1]}"])
                print(f"| `python {' '.join(command)}` | {peak / 1e9:.2f} |", flush=True)
        return
    print(f"| {MID.llm} | parameters | {' | '.join(cost.COLUMNS)} | formula, GB | measured | apart |\n"
          + "|---" + "|--:" * (len(cost.COLUMNS) + 4) + "|")
    for stage in args.stages or ["encoder"]:
        compare(stage)


if __name__ == "__main__":
    sys.exit(run_cli(main))

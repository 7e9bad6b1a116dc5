"""
Stage 1 with the full LLM as teacher, where the paper's learns from the answers alone.

    python -m extras.distillation                       # in place of `python train.py translator`; the shipped one

The LLM's own predictions say far more per sample than the answer's tokens do, and they pull the translator towards what
the LLM *would do*, not towards solving the task itself. It takes stage 0's aligned projector, so nothing before the
translator learns, and what trunk and LLM make of a sample stays the same: it is computed once, cached (3 MB for 16
samples of the small world) and read `epochs` times.
"""
import math
import sys

import torch
import torch.nn.functional as F

from data.batches import Batches
from data.sources import CHATS, read_data
from formats.errors import MAX_SEED, Parser, UserError, number, run_cli
from formats.files import check_out
from formats.log import Log, check_resume, check_start
from formats.official import find
from model import Llama
from recipes import SMALL, help_text, override
from train import Optimizer, build, count_targets, dtype_of, plan, trained_parameters

RECIPE = SMALL["distillation"]


@torch.no_grad()
def teacher_states(vlm, llm, batch):
    """What trunk and full LLM make of a batch: a dict of tensors that `distillation_loss` compares translators with."""
    s, device = vlm.decoder, vlm.decoder.device
    after = s.ranges[-1][1] + 1                             # the LLM's layer behind the last replaced range
    trunk = s.run(vlm.embed(batch["tokens"], batch["pixels"]), 0, s.trunk)   # (B, T, C): shared with the LLM
    theirs = llm.run(trunk, s.trunk, after)                                             # (B, T, C): what to make
    index = (batch["targets"].flatten() >= 0).nonzero().squeeze(1).to(device)           # (N,) positions with a target
    full = llm.run(theirs, after).flatten(0, 1)[index]                                  # (N, C): the LLM's last state
    real = (torch.arange(trunk.shape[1]) < batch["lengths"][:, None]).to(device)        # (B, T): not padding
    return dict(trunk=trunk, theirs=theirs, full=full, index=index, real=real)


def distillation_loss(surrogate, llm, cached):
    """(KL divergence of the LLM's predictions from the surrogate's, summed over targets; distance of the translators'
    states from the LLM's, summed over positions)."""
    last = surrogate.translators[-1] + 1                    # the layer behind the last translator
    theirs = cached["theirs"]
    ours = surrogate.run(cached["trunk"], surrogate.trunk, last)                        # (B, T, C)
    # each position in units of its own length: the first token's state is many times as long as the others' ("massive
    # activations", arXiv 2402.17762), and would be all that a common unit sees
    off, size = (h.float().square().sum(-1) for h in (ours - theirs, theirs))           # (B, T) each
    state = surrogate.run(ours, last).flatten(0, 1)[cached["index"]]                    # (N, C)
    logp = surrogate.logits(state).float().log_softmax(-1)                              # (N, vocab)
    with torch.no_grad():
        full_logp = llm.logits(cached["full"]).float().log_softmax(-1)                  # (N, vocab)
    kl = F.kl_div(logp, full_logp, log_target=True, reduction="sum")
    return kl, (off / size).masked_fill(~cached["real"], 0).sum()


def distill(vlm, llm, recipe, batches, out, about, resume=False):
    """Train the translators of `vlm.decoder`, a surrogate of `llm`, and nothing else. Returns the log."""
    optimizer = Optimizer(trained_parameters(vlm, "translator", projector=False), recipe)
    vlm.to(vlm.decoder.dtype)
    log, fresh = Log(out, about, optimizer, resume=resume), math.ceil(recipe.steps / recipe.epochs)
    cache = {}                          # {fresh step: (targets, positions, teacher_states of every micro-batch)}
    for step in log.bar:
        if step % fresh not in cache:
            micro_batches = batches[step % fresh]
            positions = sum(int(b["lengths"].sum()) for b in micro_batches)
            cache[step % fresh] = (count_targets(micro_batches), positions,
                                   [teacher_states(vlm, llm, b) for b in micro_batches])
        targets, positions, states = cache[step % fresh]
        sums = torch.zeros(2, device=vlm.decoder.device)
        for cached in states:
            kl, distance = distillation_loss(vlm.decoder, llm, cached)
            (kl / targets + distance / positions).backward()
            optimizer.gather()
            sums += torch.stack([kl / targets, distance / positions]).detach()
        log.add(step, loss=sums.sum(), kl=sums[0], distance=sums[1], lr=optimizer.update())
    return log.close()


def main(argv=None):
    parser = Parser(__doc__, epilog=f"key=value:\n{help_text(RECIPE)}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes a number of the recipe, see below")
    parser.add_argument("--llm", help="target LLM: folder, .gguf file or hub name (default: that of --init)")
    parser.add_argument("--init", help="checkpoint of stage vit or translator "
                        "(default: runs/vit/vit.safetensors, or the shipped one)")
    parser.add_argument("--replace", help="layers that translators replace, e.g. 16-21,22-28 by two translators "
                        "(default: the recipe's)")
    parser.add_argument("--out", default="runs/translator",
                        help="folder for checkpoint, log and plot (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint in --out, exactly as if never stopped")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="default: %(default)s")
    parser.add_device()
    args = parser.parse_intermixed_args(argv)
    recipe = override(RECIPE, args.settings)
    check_out(args.out)
    about = plan("translator", recipe, llm=args.llm, init=args.init, replace=args.replace, seed=args.seed,
                 data=None, images=None, text=CHATS)
    if not about["start"]:
        raise UserError("distillation needs a projector that stage 0 aligned: give a checkpoint of stage vit as --init")
    check_start(about, args.out)
    if args.resume:
        about = check_resume(args.out, about)
    samples, _ = read_data("translator", about)
    dtype = dtype_of(recipe, args.device)
    llm = Llama.from_pretrained(find(about["llm"]), dtype, args.device)
    vlm = build(about, dtype, args.device, llm=llm)
    print(f"stage translator, distilled: goes on from {about['start']}, trains for {about['llm']} "
          f"with the layers {about['ranges']} replaced")
    batches = Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size)
    distill(vlm, llm, recipe, batches, args.out, about, args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
Stage 0: pre-train a small ViT and the projector on the drawn world. They stand in for CLIP, where the paper starts.

    python -m extras.vit                        # runs/vit/vit.safetensors
    python -m extras.vit steps=7000             # the shipped one

Each visual token learns to be a word of the caption, in order, over and over, and the last one the last word: for nine
tokens, "Japan the flag of Japan the flag of Japan". The LLM has an embedding for each word: that is the target. So it
reads an image as if it read the caption, before anything was trained through it, and it need not run here.
"""
import collections
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F

from data.batches import as_is
from data.images import preprocess
from data.world import world
from formats.checkpoints import load_checkpoint, read_checkpoint
from formats.errors import MAX_SEED, Parser, number, run_cli
from formats.files import check_out
from formats.log import Log, check_resume, check_start
from formats.official import DEFAULT_LLM, find
from formats.tokenizer import Tokenizer
from model import VLM, Llama, ViT, ViTConfig
from recipes import SMALL, help_text, override
from train import Optimizer, dtype_of

RECIPE = SMALL["vit"]


def spelled(captions, tokenizer):
    """({caption: its tokens, in order}, {token: weight}): rare tokens weigh more, since "the" tells no image from
    another, and "Japan" does: 0.2 + log(captions / captions that hold it)."""
    tokens = {c: tokenizer.encode(" " + c) for c in captions}
    held_by = collections.Counter(t for c in captions for t in set(tokens[c]))
    return tokens, {t: 0.2 + math.log(len(captions) / n) for t, n in sorted(held_by.items())}


def laid_out(tokens, P):
    """The caption's tokens over and over in P places, so that the last place holds the last token."""
    return [tokens[(p - P) % len(tokens)] for p in range(P)]


def word_loss(visual, words, scale, targets, weights):
    """(loss, share of the visual tokens whose nearest word is the right one).

    visual (B, P, d) and the embeddings of all captions' words (V, d), both around the mean of all text. targets (B, P):
    which word each visual token is to be. weights (V,). The LLM tells words apart by their direction, so the loss is a
    cross-entropy over cosines; and it wants the words themselves, so direction and length have to be a word's, too.
    """
    cosine = F.normalize(visual, dim=-1) @ F.normalize(words, dim=-1).T                 # (B, P, V)
    which = F.cross_entropy((scale * cosine).transpose(1, 2), targets, reduction="none")            # (B, P)
    direction = 1 - cosine.gather(2, targets[..., None]).squeeze(2)                     # (B, P)
    length = visual.norm(dim=-1) / words.norm(dim=-1)[targets]                          # (B, P)
    weight = weights[targets]
    loss = ((which + 4 * direction + (length - 1).square()) * weight).sum() / weight.sum()
    return loss, (cosine.argmax(2) == targets).float().mean()


class Pictures(torch.utils.data.Dataset):
    """pictures[step] -> (pixels (B, 3, S, S), captions) of a step: half signs, which are hardest, shapes and flags."""

    def __init__(self, batch, seed):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step):
        first, tasks = step * self.batch, ["read", "shape", "read", "flag"]
        samples = [world(tasks[j % 4], first + j, self.seed) for j in range(self.batch)]
        return torch.stack([preprocess(s.image) for s in samples]), [s.caption for s in samples]

    def loader(self, steps, workers=0):
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, collate_fn=as_is)


def train_vit(recipe, out, llm_name=DEFAULT_LLM, start=None, seed=0, device="cpu", dtype=torch.float32, resume=False):
    """Train, and leave a run's files in the folder `out`. start: a checkpoint to go on from. Returns the log."""
    about = dict(stage="vit", llm=llm_name, start=start, vit_config=vars(ViTConfig()), seed=seed,
                 recipe=dataclasses.asdict(recipe))
    check_start(about, out)
    if resume:
        check_resume(out, about)
    path = find(llm_name)
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    embeddings = llm.model.embed_tokens.weight
    mean = embeddings.float().mean(0)
    # every caption of the world, by frequency
    tokens_of, weight_of = spelled([world("describe", i, seed).caption for i in range(4096)], tokenizer)
    place = {t: i for i, t in enumerate(weight_of)}
    torch.manual_seed(seed)
    vlm = VLM(ViT(ViTConfig()), llm, tokenizer)
    with torch.no_grad():
        vlm.adapter[2].bias.copy_(mean)                     # visual tokens begin around the mean of all text
    if start:
        load_checkpoint(vlm, read_checkpoint(start)[0], start)
    vlm.to(device)
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.05), device=device))
    vlm.requires_grad_(False)
    learns = {n: p.requires_grad_(True) for n, p in vlm.named_parameters() if n.startswith(("encoder.", "adapter."))}
    optimizer = Optimizer(learns | {"logit_scale": logit_scale}, recipe)
    vlm.to(dtype)
    mean = mean.to(device, dtype).float()                                               # rounded as the bias is
    words = embeddings[list(place)].to(device).float() - mean                           # (V, d)
    weights = torch.tensor(list(weight_of.values()), device=device)                     # (V,)
    saved = lambda weights: [(n, t) for n, t in weights.items() if n in dict(vlm.named_parameters())]   # not the scale
    log = Log(out, about, optimizer, resume=resume, export=saved)
    for step, (pixels, names) in zip(log.bar, Pictures(recipe.batch, seed).loader(log.steps, recipe.workers)):
        visual = vlm.visual_tokens(pixels)[:, 1:-1].float() - mean         # (B, 1 + P, d), no soi, eoi
        spelling = [[place[t] for t in laid_out(tokens_of[c], visual.shape[1])] for c in names]
        targets = torch.tensor(spelling, device=device)                                 # (B, 1 + P)
        loss, right = word_loss(visual, words, logit_scale.exp(), targets, weights)
        loss.backward()
        optimizer.gather()
        log.add(step, loss=loss, right=right, lr=optimizer.update())
    return log.close()


def main(argv=None):
    parser = Parser(__doc__, epilog=f"key=value:\n{help_text(RECIPE)}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes a number of the recipe, see below")
    parser.add_argument("--llm", default=DEFAULT_LLM, help="whose embeddings are the targets (default: %(default)s)")
    parser.add_argument("--init", help="checkpoint to go on from (default: a new ViT)")
    parser.add_argument("--out", default="runs/vit", help="folder for checkpoint, log and plot (default: %(default)s)")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint in --out, exactly as if never stopped")
    parser.add_argument("--seed", type=number(int, 0, MAX_SEED), default=0, help="default: %(default)s")
    parser.add_device()
    args = parser.parse_intermixed_args(argv)
    recipe = override(RECIPE, args.settings)
    check_out(args.out)
    train_vit(recipe, args.out, args.llm, args.init, args.seed, args.device, dtype_of(recipe, args.device), args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))

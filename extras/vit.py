"""
Stage 0: pre-train a small ViT on the drawn world, CLIP's way. It stands in for CLIP, with which the paper starts.

    python -m extras.vit                        # runs/vit/vit.safetensors
    python -m extras.vit steps=5000             # the shipped one

CLIP trains a text tower beside the ViT. Here the LLM's own token embeddings, frozen, take its place, and the projector
is the ViT's head: visual tokens begin where the LLM keeps the words for what is seen. The LLM itself never runs.
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
from formats.log import Log, check_resume
from formats.official import DEFAULT_LLM, find
from formats.tokenizer import Tokenizer
from model import VLM, Llama, ViT, ViTConfig
from recipes import SMALL, help_text, override
from train import Optimizer, default_dtype

RECIPE = SMALL["vit"]


def caption_features(captions, tokenizer, embeddings):
    """{caption: unit vector (d,)}: the mean of its tokens' embeddings in the LLM, so that no LLM pass is needed.

    Tokens are weighted by log(captions / captions that hold it): what all captions say tells no image from another.
    """
    tokens = {c: sorted(set(tokenizer.encode(" " + c))) for c in captions}
    frequency = collections.Counter(t for c in captions for t in tokens[c])
    rarity = {t: math.log(len(captions) / n) for t, n in frequency.items()}
    centred = embeddings - embeddings.mean(0)
    return {c: F.normalize(sum(rarity[t] * centred[t] for t in tokens[c]), dim=0) for c in tokens}


def contrastive_loss(image, text, same, logit_scale):
    """CLIP's loss: image features (B, d) and text features (B, d), both of length 1. same (B, B): equal captions."""
    logits = logit_scale.exp() * image @ text.T                                         # (B, B)
    targets = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Pictures(torch.utils.data.Dataset):
    """pictures[step] -> (pixels (B, 3, S, S), captions) of a step: shapes, signs and flags alike."""

    def __init__(self, batch, seed):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step):
        first, tasks = step * self.batch, ["shape", "read", "flag"]
        samples = [world(tasks[j % 3], first + j, self.seed) for j in range(self.batch)]
        return torch.stack([preprocess(s.image) for s in samples]), [s.caption for s in samples]

    def loader(self, steps, workers=0):
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, collate_fn=as_is)


def train_vit(recipe, out, llm_name=DEFAULT_LLM, start=None, seed=0, device="cpu", dtype=torch.float32, resume=False):
    """Train, and leave a run's files in the folder `out`. start: a checkpoint to go on from. Returns the log."""
    about = dict(stage="vit", llm=llm_name, start=start, vit_config=vars(ViTConfig()), seed=seed,
                 recipe=dataclasses.asdict(recipe))
    if resume:
        check_resume(out, about)
    path = find(llm_name)
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    embeddings = llm.model.embed_tokens.weight
    mean = embeddings.float().mean(0)
    text_norm = (embeddings - mean).norm(dim=-1).mean()
    # every caption of the world, by frequency
    captions = [world("describe", i, seed).caption for i in range(4096)]
    text_of = caption_features(captions, tokenizer, embeddings)
    torch.manual_seed(seed)
    vlm = VLM(ViT(ViTConfig()), llm, tokenizer)
    with torch.no_grad():
        vlm.adapter[2].bias.copy_(mean)                     # visual tokens begin around the mean of all text
    if start:
        load_checkpoint(vlm, read_checkpoint(start)[0], start)
    vlm.to(device)
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.03), device=device))
    vlm.requires_grad_(False)
    learns = {n: p.requires_grad_(True) for n, p in vlm.named_parameters() if n.startswith(("encoder.", "adapter."))}
    optimizer = Optimizer(learns | {"logit_scale": logit_scale}, recipe)
    vlm.to(dtype)
    mean = mean.to(device, dtype).float()                                               # rounded as the bias is
    saved = lambda weights: [(n, t) for n, t in weights.items() if n in dict(vlm.named_parameters())]   # not the scale
    log = Log(out, about, optimizer, resume=resume, export=saved)
    for step, (pixels, names) in zip(log.bar, Pictures(recipe.batch, seed).loader(log.steps, recipe.workers)):
        visual = vlm.visual_tokens(pixels)[:, 1:-1].float() - mean         # (B, 1 + P, d), no soi, eoi
        text = torch.stack([text_of[name] for name in names]).to(device)                # (B, d)
        same = torch.tensor([[a == b for b in names] for a in names], device=device)    # (B, B)
        # CLS learns fastest, as in CLIP; the mean teaches every patch to carry what the whole image says
        pooled = [F.normalize(x, dim=-1) for x in (visual[:, 0], visual.mean(1))]       # (B, d) each
        loss = sum(contrastive_loss(x, text, same, logit_scale) for x in pooled) / 2
        # the contrast sees directions alone: this keeps visual tokens about as long as text's embeddings
        loss = loss + 0.1 * (visual.norm(dim=-1) / text_norm - 1).square().mean()
        nearest = (pooled[1] @ text.T).argmax(1, keepdim=True)                          # the caption found in the batch
        right = same.gather(1, nearest).float().mean()
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
    dtype = default_dtype(args.device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    train_vit(recipe, args.out, args.llm, args.init, args.seed, args.device, dtype, args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))

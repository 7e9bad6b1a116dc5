"""
Stage 0: pre-train a small ViT on the drawn world, CLIP's way. It stands in for CLIP, with which the paper starts.

    python -m extras.vit                        # runs/vit/vit.safetensors

The shipped one first learns to tell images apart, then to come near the words (`near`):

    python -m extras.vit steps=4000 --out runs/contrast
    python -m extras.vit steps=700 lr=5e-4 near=1 --init runs/contrast/vit.safetensors

CLIP trains a text tower beside the ViT, and compares one vector an image with one a caption. Here the LLM's own token
embeddings, frozen, take the tower's place, and every visual token is compared with every word of the caption (FILIP,
arXiv 2111.07783). So visual tokens begin near the LLM's words for what is seen. The LLM itself never runs.
"""
import collections
import dataclasses
import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

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


def caption_features(captions, tokenizer, embeddings):
    """{caption: (unit vectors (L, d), weights (L,))}: its L different tokens' embeddings in the LLM; weights sum to 1.

    Tokens are weighted by log(captions / captions that hold it): what all captions say tells no image from another.
    """
    tokens = {c: sorted(set(tokenizer.encode(" " + c))) for c in captions}
    frequency = collections.Counter(t for c in captions for t in tokens[c])
    rarity = {t: math.log(len(captions) / n) for t, n in frequency.items()}
    centred = F.normalize(embeddings.float() - embeddings.float().mean(0), dim=-1)
    weights = {c: torch.tensor([rarity[t] for t in ts]) for c, ts in tokens.items()}
    return {c: (centred[ts], weights[c] / weights[c].sum()) for c, ts in tokens.items()}


def late_interaction(visual, text, weights):
    """How well images fit captions, (B, C): each token of a caption looks for the visual token that fits it best, and
    each visual token for the caption's token that fits it best (FILIP, arXiv 2111.07783, section 3.1).

    visual (B, P, d), text (C, L, d): unit vectors. weights (C, L): how much a token counts; 0: padding.
    """
    cosine = torch.einsum("bpd,cld->bcpl", visual, text)                                # (B, C, P, L)
    found = (cosine.amax(2) * weights).sum(-1)                                          # (B, C): caption in the image
    told = cosine.masked_fill((weights == 0)[:, None], -1).amax(3).mean(2)              # (B, C): image in the caption
    return (found + told) / 2


def nearest_words(visual, text, weights):
    """The word of its own caption that each visual token fits best, rare ones first: (B, P, d) of text (B, L, d)."""
    fit = (visual @ text.mT) * weights[:, None]                                         # (B, P, L)
    return torch.gather(text, 1, fit.argmax(2, keepdim=True).expand(-1, -1, text.shape[-1]))


def contrastive_loss(scores, same):
    """CLIP's loss. scores (B, B): of image i and caption j, scaled. same (B, B): equal captions."""
    targets = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2


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
        text, weights = (pad_sequence(x, batch_first=True).to(device) for x in zip(*(text_of[n] for n in names)))
        same = torch.tensor([[a == b for b in names] for a in names], device=device)    # (B, B)
        scores = late_interaction(F.normalize(visual, dim=-1), text, weights)           # (B, B)
        loss = contrastive_loss(logit_scale.exp() * scores, same)
        # the contrast sees directions alone: this keeps visual tokens about as long as text's embeddings
        loss = loss + 0.1 * (visual.norm(dim=-1) / text_norm - 1).square().mean()
        if recipe.near:     # contrast is content with words that can be told apart, the LLM wants the words themselves
            words = nearest_words(visual, text, weights)                                # (B, 1 + P, d), unit vectors
            loss = loss + recipe.near * (visual / text_norm - words).square().sum(-1).mean()
        right = same.gather(1, scores.argmax(1, keepdim=True)).float().mean()
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

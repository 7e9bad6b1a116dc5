"""
Stage 0: pre-train a small ViT on the drawn world. It stands in for CLIP, where the paper starts.

    python -m extras.vit                        # runs/vit/vit.safetensors
    python -m extras.vit steps=3500             # the shipped one
    python -m extras.vit --data runs/icons/known.json           # half of the pictures are those, with their captions

As CLIP (arXiv 2103.00020) and CoCa (2205.01917) are trained: images and captions that belong together get similar
vectors, and a small captioner reads the caption from the patches. The text encoder and the captioner are this file's
own, their vocabulary is the captions' words, and both are thrown away: what is saved is a ViT. No LLM takes part, so
nothing of the encoder speaks its language yet.
"""
import dataclasses
import math
import random
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import Parser, check_out, run_cli
from data.drawing import draw
from data.images import preprocess
from data.sources import read_pictures
from data.world import KNOWN_SUBJECTS, SUBJECTS, caption
from formats.checkpoints import load_checkpoint, read_checkpoint
from log import Log, check_resume, check_start
from model import ViT, ViTConfig
from recipes import SMALL, help_text, override
from train import adamw, update

RECIPE = SMALL["vit"]
END, BEGIN = 0, 1       # ids of no word: the end of a caption (and padding), and where the captioner begins


class Captions:
    """Captions as rows of word ids, all of one length: each word of the world has an id, as a tiny tokenizer. more:
    captions of other pictures."""

    def __init__(self, more=()):
        texts = [caption(s) for s in SUBJECTS] + list(more)
        self.ids = {w: i + 2 for i, w in enumerate(sorted({w for text in texts for w in text.split()}))}
        self.length = max(len(text.split()) for text in texts) + 1                      # with END
        self.vocabulary = len(self.ids) + 2

    def __call__(self, texts):
        rows = [[self.ids[w] for w in text.split()] for text in texts]
        return torch.tensor([row + [END] * (self.length - len(row)) for row in rows])   # (B, L)


class TextEncoder(nn.Module):
    """A caption's ids (B, L) -> one vector each (B, 256). The order of so few words says nothing: a sum will do."""

    def __init__(self, vocabulary, width):
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, width, mode="sum", padding_idx=END)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, 256))

    def forward(self, ids):
        return self.mlp(self.words(ids))


class Captioner(nn.Module):
    """The next word of a caption, read from the ViT's tokens: ids (B, L), tokens (B, 1 + P, C) -> logits (B, L, V).

    Also the probe of studies/results.py: what it reads from a frozen ViT is the most that a projector could bring
    across."""

    def __init__(self, captions, width, layers=2):
        super().__init__()
        self.words = nn.Parameter(torch.randn(captions.vocabulary, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(captions.length, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        mask = nn.Transformer.generate_square_subsequent_mask(captions.length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, ids, tokens):
        before = F.pad(ids[:, :-1], (1, 0), value=BEGIN)                                # (B, L)
        x = F.embedding(before, self.words) + self.positions                            # (B, L, C)
        x = self.layers(x, tokens, tgt_mask=self.mask.to(x.dtype), tgt_is_causal=True)
        return x @ self.words.T

    def loss(self, ids, tokens):
        """(cross-entropy of the words and the first END, share of captions that are right as a whole)."""
        logits = self(ids, tokens).float()
        end = (ids == END).int().argmax(1, keepdim=True)                                # (B, 1)
        targets = ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) > end, -100)
        right = (logits.argmax(-1) == targets) | (targets < 0)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), right.all(1).float().mean()


class Pretraining(nn.Module):
    """The ViT, as `encoder` in the checkpoint, and what is thrown away afterwards."""

    def __init__(self, captions, config):
        super().__init__()
        C = config.hidden_size
        self.encoder = ViT(config)
        self.captioner = Captioner(captions, C)
        self.text = TextEncoder(captions.vocabulary, C)
        self.project = nn.Linear(C, 256, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels, ids):
        """pixels (B, 3, S, S), ids (B, L) -> (contrastive loss, share of images whose caption is the nearest of the
        batch, caption loss, share of captions that are right as a whole)."""
        tokens = self.encoder.vision_model.post_layernorm(self.encoder(pixels))         # (B, 1 + P, C)
        image = F.normalize(self.project(tokens.mean(1)).float(), dim=-1)               # (B, 256)
        text = F.normalize(self.text(ids).float(), dim=-1)                              # (B, 256)
        logits = self.logit_scale.exp().clamp(max=100) * image @ text.T                 # (B, B)
        same = (ids[:, None] == ids).all(-1).float()        # the world has few captions: many are twice in a batch
        share = same / same.sum(1, keepdim=True)
        contrast = -(share * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / (2 * len(ids))
        nearest = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        return contrast, nearest, *self.captioner.loss(ids, tokens)


class Pictures(torch.utils.data.Dataset):
    """pictures[step] -> (pixels (B, 3, S, S), captions) of a step: half signs, which are hardest, shapes and flags.
    samples: an endless walk, of which half of the pictures are then."""

    def __init__(self, batch, seed, subjects=KNOWN_SUBJECTS, samples=None):
        self.batch, self.seed, self.samples = batch, seed, samples
        self.subjects = [[s for s in subjects if s[0] == kind] for kind in ("sign", "shape", "sign", "flag")]

    def __getitem__(self, step):
        pixels, texts = [], []
        for j in range(self.batch):
            rng = random.Random(f"picture/{self.seed}/{step * self.batch + j}")
            if self.samples and rng.random() < 0.5:
                sample = self.samples[step * self.batch + j]
                pixels.append(preprocess(sample.image))
                texts.append(sample.caption)
                continue
            subject = rng.choice(self.subjects[j % 4] or sum(self.subjects, []))
            pixels.append(preprocess(draw(rng, subject)))
            texts.append(caption(subject))
        return torch.stack(pixels), texts

    def loader(self, steps, workers=0):
        return torch.utils.data.DataLoader(steps, batch_size=None, num_workers=workers, collate_fn=self.__getitem__)


def train_vit(recipe, out, start=None, seed=0, device="cpu", resume=False, data=None):
    """Train in float32, and leave a run's files in the folder `out`. start: a checkpoint to go on from. data: LLaVA's
    JSON, whose images and captions are half of what is seen. Returns the log."""
    samples, texts, read = read_pictures(data, seed) if data else (None, (), {})
    about = dict(stage="vit", start=start, vit_config=vars(ViTConfig()), seed=seed, recipe=dataclasses.asdict(recipe),
                 **read)
    check_start(about, out)
    if resume:
        check_resume(out, about)
    torch.manual_seed(seed)
    captions = Captions(texts)
    model = Pretraining(captions, ViTConfig())
    if start:
        load_checkpoint(model, read_checkpoint(start)[0], start, needs=["encoder."])
    learns = dict(model.to(device).named_parameters())
    optimizer = adamw(learns, recipe)
    saved = lambda weights: [(n, t) for n, t in weights.items() if n.startswith("encoder.")]
    log = Log(out, about, learns, optimizer, recipe, resume, saved)
    pictures = Pictures(recipe.batch, seed, samples=samples)
    for step, (pixels, texts) in zip(log.bar, pictures.loader(log.steps, recipe.workers)):
        contrast, nearest, words, whole = model(pixels.to(device), captions(texts).to(device))
        loss = contrast + 2 * words
        loss.backward()
        log.add(step, loss=loss, nearest=nearest, whole=whole, lr=update(optimizer, recipe, step))
    return log.close()


def main(argv=None):
    parser = Parser(__doc__, epilog=f"key=value:\n{help_text(RECIPE)}")
    parser.add_argument("--init", help="checkpoint to go on from (default: a new ViT)")
    parser.add_argument("--data", help="LLaVA-format JSON beside its images, which become half of the pictures")
    parser.add_run("runs/vit")
    args = parser.parse_intermixed_args(argv)
    recipe = override(RECIPE, args.settings)
    check_out(args.out)
    train_vit(recipe, args.out, args.init, args.seed, args.device, args.resume, args.data)


if __name__ == "__main__":
    sys.exit(run_cli(main))

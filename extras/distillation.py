"""
Stage 1 for every encoder at once: the full LLM teaches the translators, before any encoder is there.

    python -m extras.distillation                       # in place of `python train.py translator`; the shipped one
    python -m extras.distillation --data runs/icons/train.json      # with those pictures, questions and captions

The paper's translator learns from answers alone, beside one encoder. Behind so small an LLM that is not enough: the
encoder of stage 2 soon finds inputs to which the surrogate answers as wished, and the LLM does not. Here the
translators learn to do what the LLM does, whatever stands in the image's place: the caption's words, other words, no
words, the output of random encoders, and mixtures of these. No trained encoder takes part: the surrogate belongs to
none.

The LLM's states for a batch stay the same: they are computed once, cached and read `epochs` times.
"""
import dataclasses
import math
import random
import sys

import torch
import torch.nn.functional as F

import surrogate
from cli import Parser, UserError, check_out, run_cli
from data.batches import collate
from data.sources import read_pictures
from data.world import TRAINED_SUBJECTS, World, caption
from formats.official import DEFAULT_LLM, find
from formats.tokenizer import IMAGE, Tokenizer
from log import Log, check_resume
from model import VLM, Llama, ViT, ViTConfig
from recipes import SMALL, TARGETS, help_text, override
from surrogate import distillation_loss, teacher_states
from train import adamw, dtype_of, set_dtypes, translator_parameters, update

RECIPE = SMALL["distillation"]


class Slots:
    """What stands in the image's place: tokens of many kinds, all of a word's length."""

    def __init__(self, llm, tokenizer, config, captions=()):
        self.llm, self.tokenizer = llm, tokenizer
        self.config = config
        self.n_visual = config.num_patches + 3
        E = llm.model.embed_tokens.weight.float()
        self.words = F.normalize(E - E.mean(0), dim=-1)                                 # (vocab, C): their directions
        spelled = [tokenizer.encode(" " + text) for text in captions or map(caption, TRAINED_SUBJECTS)]
        self.common = torch.tensor(sorted({t for ids in spelled for t in ids}), device=llm.device)

    @torch.no_grad()
    def features(self, pixels, generator):
        """The output of a random encoder and a random projector for pictures, as directions: (B, n_visual, C)."""
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        vlm = VLM(ViT(self.config), self.llm, self.tokenizer)
        x = vlm.to(self.llm.device, self.llm.dtype).visual_tokens(pixels).float()
        return F.normalize(x - x.mean((0, 1)), dim=-1)      # around their mean: what tells images apart

    @torch.no_grad()
    def embed(self, samples, batch, seed):
        """Embeddings (B, T, C) of a batch with such tokens at the places of its images."""
        rng, generator = random.Random(f"slots/{seed}"), torch.Generator().manual_seed(seed)
        device, (P, C) = self.llm.device, (self.n_visual, self.words.shape[1])
        noise = lambda: F.normalize(torch.randn(P, C, generator=generator), dim=-1).to(device)
        some = lambda ids: self.words[ids[torch.randint(len(ids), (P,), generator=generator)]]
        rows = []
        for sample, feature in zip(samples, self.features(batch["pixels"], generator)):
            ids = self.tokenizer.encode(" " + sample.caption)
            words = self.words[[ids[(p - P) % len(ids)] for p in range(P)]]             # (P, C): over and over
            kind, share = rng.random(), rng.random()
            if kind < 0.2:                                  # other words of the world mixed in
                x = (1 - share) * words + share * some(self.common)
            elif kind < 0.3:                                # any words
                x = some(torch.arange(len(self.words), device=device))
            elif kind < 0.4:                                # no words
                x = noise()
            else:                                           # between the caption and a random encoder
                x = (1 - share) * words + share * feature
            rows.append(F.normalize(x, dim=-1) + 0.6 * rng.random() * noise())
        is_image = batch["tokens"] == IMAGE
        x = self.llm.embed(batch["tokens"].masked_fill(is_image, 0).to(device))         # (B, T, C)
        x[is_image.to(device)] = self.llm.as_words(torch.cat(rows)).to(x.dtype)
        return x


def distill(decoder, llm, tokenizer, recipe, out, name=DEFAULT_LLM, seed=0, resume=False, data=None):
    """Train the translators of `decoder`, a surrogate of `llm`, and nothing else; into the folder `out` goes
    translator.safetensors. name: of the LLM, for its metadata. data: LLaVA's JSON in place of the drawn world. Returns
    the log: a dict a step."""
    vit = ViTConfig()
    source, captions, read = read_pictures(data, seed) if data else (World(seed), (), {})
    about = dict(stage="translator", llm=name, ranges=[list(r) for r in decoder.ranges], start=None, seed=seed,
                 vit_config=vars(vit), recipe=dataclasses.asdict(recipe), **read)
    if resume:
        check_resume(out, about)
    slots, B = Slots(llm, tokenizer, vit, captions), recipe.batch
    learns = translator_parameters(decoder)
    set_dtypes(decoder, decoder, learns)
    optimizer, fresh, cache = adamw(learns, recipe), math.ceil(recipe.steps / recipe.epochs), {}
    log = Log(out, about, learns, optimizer, recipe, resume)
    for step in log.bar:
        k = step % fresh
        if k not in cache:
            samples = [source[i] for i in range(k * B, (k + 1) * B)]
            batch = collate(samples, tokenizer, slots.n_visual, vit.image_size, recipe.loss_on, recipe.max_length)
            if (batch["targets"] < 0).all():
                raise UserError(f"max_length={recipe.max_length} cuts all samples before their answer: give more")
            with torch.no_grad():
                trunk = decoder.run(slots.embed(samples, batch, seed * 10**6 + k), 0, decoder.n_shared)
            cache[k] = teacher_states(decoder, llm, trunk, batch)
        kl, distance = distillation_loss(decoder, cache[k])
        (kl + distance).backward()
        log.add(step, loss=kl + distance, kl=kl, distance=distance, lr=update(optimizer, recipe, step))
    return log.close()


def main(argv=None):
    parser = Parser(__doc__, epilog=f"key=value:\n{help_text(RECIPE)}")
    parser.add_argument("--llm", default=DEFAULT_LLM, help="folder, .gguf file or hub name (default: %(default)s)")
    parser.add_argument("--replace", help="layers that translators replace, e.g. 20-23,24-28 by two translators "
                        "(default: the recipe's for its own LLM, for any other from the prediction's turn on)")
    parser.add_argument("--data", help="LLaVA-format JSON beside its images, in place of the drawn world")
    parser.add_run("runs/translator")
    args = parser.parse_intermixed_args(argv)
    recipe = override(RECIPE, args.settings)
    check_out(args.out)
    path = find(args.llm)
    ranges = surrogate.parse_ranges(args.replace) if args.replace else None
    if ranges == []:
        raise UserError("--replace none: without a surrogate there is no translator to train")
    llm = Llama.from_pretrained(path, dtype_of(recipe, args.device), args.device)
    tokenizer = Tokenizer.from_pretrained(path)
    if ranges is None:
        ranges = TARGETS["small"].ranges if args.llm == DEFAULT_LLM else surrogate.choose_ranges(llm, tokenizer)
    decoder = surrogate.build_surrogate(llm, ranges)
    print(f"stage translator, distilled: for {args.llm} with the layers {decoder.ranges} replaced")
    distill(decoder, llm, tokenizer, recipe, args.out, args.llm, args.seed, args.resume, args.data)


if __name__ == "__main__":
    sys.exit(run_cli(main))

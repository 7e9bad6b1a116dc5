"""
Train the vision encoder against the surrogate, stage by stage.

    python train.py vit             # stage 0: pre-train the small ViT, CLIP's way; it stands in for CLIP
    python train.py translator      # stage 1: heal the surrogate's translator, and a first projector
    python train.py encoder         # stage 2: train projector and upper ViT through the frozen surrogate
    python graft.py --encoder runs/encoder/encoder.safetensors      # plug the result into the full LLM
    python train.py decoder         # stage 3 (optional): go on training the full LLM behind the grafted encoder

Without options a stage makes a short run that starts from what assets/ holds. The recipe of a stage (what is trained, on
which data, which tokens carry loss, optimiser and schedule) is the paper's; steps, batch and learning rate are the small world's.
"""
import argparse
import collections
import csv
import functools
import hashlib
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import weights
from model import VLM, Llama, ViT, ViTConfig, base_vit
from surrogate import build_surrogate, check_ranges, load_surrogate, parse_ranges
from tokenizer import Tokenizer

# What differs between the stages. Everything else is the same in all: AdamW (0.9, 0.999) without weight decay, linear
# warm-up over 3.05 % of the steps, cosine to 0, gradients clipped to norm 1 (the paper's recipe).
RECIPES = {
    "vit":        dict(steps=600, batch=128, lr=1e-3, bound=2.5),
    "translator": dict(steps=120, batch=16, lr=1e-3, loss_on="answers+special"),
    "encoder":    dict(steps=120, batch=16, lr=1e-4, loss_on="answers+special"),
    "decoder":    dict(steps=30, batch=16, lr=5e-5, loss_on="answers"),
}
WARMUP = 0.0305
DEFAULT_RANGES = [(23, 28)]     # of SmolLM2-135M: cut at 20, its surrogate read 25 % of the signs, cut at 23, 81 % (README)


def lr_at(step, steps, lr):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters a stage trains (paper, section 4)


def trained_parameters(vlm, stage, distill=False, projector=True):
    """{name: parameter} that a stage trains; these get gradients, all others are frozen.

    projector=False leaves out everything before the decoder (stage 1 with the projector of stage 0: it is healed already, and
    the answers' loss through a translator that is not yet would only harm it).
    """
    L = vlm.encoder.config.num_hidden_layers
    prefixes = ["adapter.", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."] if projector else []
    if stage in ("encoder", "decoder"):         # the last third of the ViT: 8 of CLIP-L's 24 layers
        prefixes += [f"encoder.vision_model.encoder.layers.{i}." for i in range(L - max(1, L // 3), L)]
    if stage == "translator" or (stage == "encoder" and distill):
        prefixes += [f"decoder.model.layers.{i}." for i in vlm.decoder.translators]
    if stage == "decoder":
        prefixes += ["decoder."]
    if stage == "vit":
        prefixes = ["encoder.", "adapter."]
    vlm.requires_grad_(False)
    chosen = {n: p.requires_grad_(True) for n, p in vlm.named_parameters() if n.startswith(tuple(prefixes))}
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Data of a step: a function of (seed, step) alone, so that a resumed run sees what an uninterrupted one would have seen


def image_batch(vlm, records, step, size, recipe, seed):
    """Batch number `step` of image samples, from the embedded world or from LLaVA-format records."""
    if records is None:
        tasks = data.TRAINED_TASKS
        samples = [data.world(tasks[j % len(tasks)], step * size + j, seed) for j in range(size)]
    else:
        samples = [records[i] for i in shuffled(len(records), step * size, size, seed)]
    return data.collate(samples, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size, recipe["loss_on"], max_length=4096)


def shuffled(n, start, count, seed):
    """Indices number start … start+count-1 of an endless walk over n records, in a new order every epoch."""
    return [order_of_epoch(n, i // n, seed)[i % n] for i in range(start, start + count)]


@functools.lru_cache(maxsize=4)
def order_of_epoch(n, epoch, seed):
    order = list(range(n))
    random.Random(f"order/{seed}/{epoch}").shuffle(order)
    return order


def text_batch(vlm, chats, step, size, recipe, seed):
    """Batch number `step` of text instructions."""
    samples = [data.Sample(None, chats[i]) for i in shuffled(len(chats), step * size, size, seed)]
    return data.collate(samples, vlm.tokenizer, vlm.n_visual, loss_on=recipe["loss_on"], max_length=128)


@torch.no_grad()
def own_chats(llm, tokenizer, n, seed, batch=64):
    """Text instructions for stage 1, written by the LLM itself: it invents a user's question, then answers it.

    Sampled once, then kept in the cache folder. Returns n conversations as lists of messages.
    """
    fingerprint = hashlib.sha256(llm.model.norm.weight.float().cpu().numpy().tobytes()).hexdigest()[:8]
    file = weights.cache_folder() / f"chats-{fingerprint}-{n}-{seed}.json"
    if file.exists():
        return weights.read_json(file)
    generator = torch.Generator(llm.device).manual_seed(seed)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    start = bos + tokenizer.turn_start + tokenizer.encode("user") + tokenizer.header_end + tokenizer.newline
    chats, bar = [], tqdm(total=n, desc="the LLM writes text for stage 1", unit="chat")
    while len(chats) < n:
        sample = dict(temperature=1.0, top_p=0.9, stop=tokenizer.stop_tokens, generator=generator)
        questions = [tokenizer.decode(q) for q in llm.generate([start] * batch, max_new_tokens=32, **sample)]
        questions = [q.strip() for q in questions if q.strip() and "<image>" not in q]
        prompts = [tokenizer.chat([{"role": "user", "content": q}]) for q in questions]
        answers = llm.generate(prompts, max_new_tokens=48, **sample)
        new = [[{"role": "user", "content": q}, {"role": "assistant", "content": tokenizer.decode(a).strip()}]
               for q, a in zip(questions, answers) if tokenizer.decode(a).strip()]
        chats += new
        bar.update(len(new))
    bar.close()
    weights.write_whole(file, lambda part: part.write_text(json.dumps(chats[:n])))
    return chats[:n]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def surrogate_loss(vlm, batch, stage, llm=None):
    """(cross-entropy summed over the targets, distillation loss or None) of one batch through the surrogate.

    The paper's loss is the first. With `llm` given, the second pulls the translator towards the full LLM *on the visual tokens
    that the encoder makes now* (on-policy): the encoder cannot learn to please a translator that the LLM disagrees with.
    The LLM only runs forward, and only the layers that the surrogate lacks. In stage 2 the answers' loss teaches the encoder
    and never the translator, the distillation the translator and never the encoder: so the translator runs twice.
    """
    s, device = vlm.decoder, vlm.decoder.device
    translators = torch.nn.ModuleList(s.model.layers[i] for i in s.translators)
    x = s.run(vlm.embed(batch["tokens"].to(device), batch["pixels"]), 0, s.trunk)       # (B, T, C): layers shared with the LLM
    if stage == "encoder":
        translators.requires_grad_(False)
    ce = s.loss(s.run(x, s.trunk), batch["targets"])
    if llm is None:
        return ce, None

    translators.requires_grad_(True)
    x = x.detach()
    last, after = s.translators[-1] + 1, s.ranges[-1][1] + 1        # the layer that follows, counted in the surrogate and in the LLM
    ours = s.run(x, s.trunk, last)                                                      # (B, T, C)
    with torch.no_grad():
        theirs = llm.run(x, s.trunk, after)                                             # (B, T, C): what ours should be
        real = (torch.arange(x.shape[1]) < batch["lengths"][:, None]).to(device)        # (B, T): not padding
    distance, size = ((h.float().square().sum(-1) * real).sum() for h in (ours - theirs, theirs))
    index = (batch["targets"].flatten() >= 0).nonzero().squeeze(1).to(device)           # (N,) positions with a target
    logp = s.logits(s.run(ours, last).flatten(0, 1)[index]).float().log_softmax(-1)     # (N, vocab)
    with torch.no_grad():
        full_logp = llm.logits(llm.run(theirs, after).flatten(0, 1)[index]).float().log_softmax(-1)
    return ce, distance / size + F.kl_div(logp, full_logp, log_target=True, reduction="batchmean")


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser with float32 master weights, and what a resumed run needs


class Trainer:
    """AdamW on float32 copies of the trained parameters, whatever the dtype in which the model computes (bf16 on GPUs).

    Make it first, then cast the model: so the copies begin with all their digits.
    """

    def __init__(self, parameters, lr, steps):
        self.parameters, self.lr, self.steps, self.step = parameters, lr, steps, 0
        self.master = {n: p.detach().float().clone().requires_grad_(True) for n, p in parameters.items()}
        self.adam = torch.optim.AdamW(self.master.values(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)

    def update(self):
        """One step with the gradients that lie on the parameters. Returns the learning rate used."""
        lr = lr_at(self.step, self.steps, self.lr)
        for group in self.adam.param_groups:
            group["lr"] = lr
        for n, p in self.parameters.items():
            self.master[n].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        torch.nn.utils.clip_grad_norm_([m for m in self.master.values() if m.grad is not None], 1.0)
        self.adam.step()
        self.write_back()
        self.step += 1
        return lr

    @torch.no_grad()
    def write_back(self):
        for n, p in self.parameters.items():
            p.copy_(self.master[n])

    def state(self):
        """Everything as flat named tensors, for safetensors."""
        out = {f"master.{n}": m for n, m in self.master.items()}
        for n, m in self.master.items():
            for k, v in self.adam.state.get(m, {}).items():
                out[f"adam.{n}.{k}"] = v
        return out

    def load_state(self, tensors, step, path):
        ours = {n.removeprefix("master.") for n in tensors if n.startswith("master.")}
        if ours != set(self.master):
            odd = sorted(ours ^ set(self.master))[0]
            raise ValueError(f"{path} does not belong to this run: {odd} is trained in only one of the two")
        self.step = step
        with torch.no_grad():
            for n, m in self.master.items():
                m.copy_(tensors[f"master.{n}"])
                keys = {k: v for k, v in tensors.items() if k.startswith(f"adam.{n}.")}
                if keys:
                    self.adam.state[m] = {k.removeprefix(f"adam.{n}."): v.to(m.device) if v.dim() else v for k, v in keys.items()}
        self.write_back()


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def default_dtype(device):
    """bf16 where the chip multiplies it in hardware (GPUs, and CPUs with AMX), else float32."""
    amx = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if str(device).startswith("cuda") or amx else torch.float32


def build(stage, llm_name, ranges, vit, start, dtype, device, bound=None):
    """(VLM, full LLM) for the stages 1 to 3, with the weights that they start from; the VLM's decoder is the surrogate.

    `start` is the checkpoint of an earlier stage; None begins with a new projector. A new translator is a copy of the first
    layer that it stands for.
    """
    path = weights.find(llm_name)
    tensors, about = weights.read_checkpoint(start) if start else ({}, {})
    if about.get("llm", llm_name) != llm_name:
        raise ValueError(f"{start} was trained for {about['llm']}, not for {llm_name}")
    llm, tokenizer = Llama.from_pretrained(path, dtype, device), Tokenizer.from_pretrained(path)
    trained_translator = bool(about.get("ranges")) and stage == "encoder"
    if stage == "decoder":
        decoder = llm
    elif trained_translator and ranges != []:
        decoder = load_surrogate(llm, start)
        if ranges is not None and check_ranges(ranges, llm.config.num_hidden_layers) != decoder.ranges:
            raise ValueError(f"{start} replaces the layers {decoder.ranges}, not {ranges}: train a translator for these first")
    elif stage == "encoder" and ranges != []:
        raise ValueError("stage encoder needs a trained translator: run `python train.py translator` first and give its "
                         "checkpoint as --start, or train on the full LLM with --replace none")
    else:
        decoder = build_surrogate(llm, DEFAULT_RANGES if ranges is None else ranges)
    vit = vit or about.get("vit") or start or "assets/vit.safetensors"      # a start of stage vit is the ViT itself
    torch.manual_seed(0)                    # the projector's first values
    vlm = VLM(base_vit(vit, start or vit), decoder, tokenizer, about.get("bound") if bound is None else bound)
    vlm.to(device)                          # what is before the decoder stays float32 until the Trainer has copied it
    if start:
        go_on = stage == about.get("stage") == "decoder"        # else the start's decoder is the surrogate's, or not wanted
        while "adapter.0.weight" not in tensors and about.get("start"):
            below, about = weights.read_checkpoint(weights.beside(about["start"], start))       # stage 1 left the projector
            tensors = below | tensors                                                           # as it was: take it from there
        weights.load_checkpoint(vlm, {n: t for n, t in tensors.items() if go_on or not n.startswith("decoder.")}, start)
    return vlm, llm, vit


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
    """CLIP's loss: image features (B, d) and text features (B, d), both of length 1. same (B, B): captions that are equal."""
    logits = logit_scale.exp() * image @ text.T                                         # (B, B)
    targets = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def train_vit(steps, batch, lr, bound, seed, device, dtype, out, resume, start=None, llm_name=weights.DEFAULT_LLM, save_every=200):
    """Stage 0: CLIP's contrastive pre-training of the small ViT on images and captions. Returns the VLM.

    CLIP trains a text tower beside the ViT. Here the LLM's own token embeddings, frozen, take its place, and the projector is
    the ViT's head: visual tokens begin where the LLM keeps the words for what is seen. The LLM itself never runs.
    """
    path = weights.find(llm_name)
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    world = [data.world("describe", i, seed).caption for i in range(4096)]              # every caption of the world, by frequency
    text_of = caption_features(world, tokenizer, llm.model.embed_tokens.weight)
    torch.manual_seed(seed)
    vlm = VLM(ViT(ViTConfig()), llm, tokenizer, bound).to(device)
    if start:
        weights.load_checkpoint(vlm, weights.read_checkpoint(start)[0], start)
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.03), device=device))
    trainer = Trainer(trained_parameters(vlm, "vit") | {"logit_scale": logit_scale}, lr, steps)
    vlm.to(dtype)

    def loss_of(step):
        tasks = ["describe", "read"]                                                    # three quarters signs: they are harder
        samples = [data.world(tasks[j % 2], step * batch + j, seed) for j in range(batch)]
        pixels = torch.stack([data.preprocess(s.image) for s in samples])               # (B, 3, S, S)
        visual = vlm.visual_tokens(pixels)[:, 1:-1].float() - vlm.mean_embedding        # (B, 1 + P, d), without soi and eoi
        text = torch.stack([text_of[s.caption] for s in samples]).to(device)            # (B, d)
        names = [s.caption for s in samples]
        same = torch.tensor([[a == b for b in names] for a in names], device=device)    # (B, B)
        # CLS learns fastest, as in CLIP; the mean teaches every patch to carry what the whole image says
        cls, mean = (F.normalize(x, dim=-1) for x in (visual[:, 0], visual.mean(1)))    # (B, d) each
        loss = (contrastive_loss(cls, text, same, logit_scale) + contrastive_loss(mean, text, same, logit_scale)) / 2
        right = same.gather(1, (mean @ text.T).argmax(1, keepdim=True)).float().mean()  # finds its caption in the batch
        return loss, batch, {"right": right}

    about = dict(stage="vit", llm=llm_name, start=start, bound=bound, vit_config=vars(vlm.encoder.config), recipe=dict(steps=steps, batch=batch, lr=lr), seed=seed)
    run(trainer, loss_of, out, "vit", about, resume, save_every, saved=lambda name: name != "logit_scale")
    return vlm


def train_stage(stage, steps, batch, lr, seed, device, out, resume, vlm, llm, loss_on, llm_name, vit_name, start=None,
                distill_every=0, records=None, chats=None, save_every=100, projector=True):
    """Stages 1 to 3. Returns the VLM, trained. projector: see `trained_parameters`."""
    if distill_every and not getattr(vlm.decoder, "translators", None):
        raise ValueError("--distill-every needs a surrogate, whose translator the full LLM teaches: leave it out here")
    recipe = dict(steps=steps, batch=batch, lr=lr, loss_on=loss_on)
    trainer = Trainer(trained_parameters(vlm, stage, distill_every > 0, projector), lr, steps)
    vlm.to(llm.dtype)

    def loss_of(step):
        distil = llm if distill_every and step % distill_every == 0 else None
        # stage 1 mixes images and text evenly. A batch of text alone needs no gradient below the translator, and autograd
        # sees that by itself: nothing there requires one, so the trunk keeps no activations
        n_text = int(batch * 0.4) if stage == "translator" else 0
        batches = [image_batch(vlm, records, step, batch - n_text, recipe, seed)]
        if n_text:
            batches.append(text_batch(vlm, chats, step, n_text, recipe, seed))
        n = sum(int((b["targets"] >= 0).sum()) for b in batches)
        total, notes = 0.0, {}
        for b in batches:
            if stage == "decoder":
                ce, kl = vlm.loss(b["tokens"].to(device), b["targets"], b["pixels"]), None
            else:
                ce, kl = surrogate_loss(vlm, b, stage, distil)
            total = total + ce / n
            if kl is not None:
                total = total + kl
                notes["distill"] = kl.detach() + notes.get("distill", 0)
        return total, n, notes

    about = dict(stage=stage, llm=llm_name, ranges=getattr(vlm.decoder, "ranges", []), vit=vit_name, start=start, bound=vlm.bound,
                 vit_config=vars(vlm.encoder.config), seed=seed,
                 recipe=recipe | dict(distill_every=distill_every, projector=projector, dtype=str(llm.dtype), chats=len(chats or []),
                                      records=len(records or [])))
    run(trainer, loss_of, out, stage, about, resume, save_every)
    return vlm


def run(trainer, loss_of, out, stage, about, resume, save_every, saved=lambda name: True):
    """The loop of every stage: loss_of(step) -> (loss, targets, notes). Writes to the folder `out`

    STAGE.safetensors   what was trained (float16), with `about` as its metadata
    state.safetensors   float32 weights and the optimiser, for --resume
    log.csv, loss.png   one row a step
    """
    out, steps = Path(out), trainer.steps
    rows, state = [], out / "state.safetensors"
    if resume:
        tensors, was = weights.read_checkpoint(state)
        if was["about"] != json.loads(json.dumps(about)):
            key = next(k for k in about if json.loads(json.dumps(about))[k] != was["about"].get(k))
            raise ValueError(f"{state} is of another run: {key} was {was['about'].get(key)}, is {about[key]}")
        trainer.load_state(tensors, was["step"], state)
        with open(out / "log.csv") as f:
            rows = [r | dict(seconds=float(r["seconds"])) for r in csv.DictReader(f) if int(r["step"]) < trainer.step]
    start = time.time() - (rows[-1]["seconds"] if rows else 0)

    def save():
        fields = ["step", "loss", "lr", "targets", "seconds", *dict.fromkeys(k for r in rows for k in r if k not in ("step", "loss", "lr", "targets", "seconds"))]

        def write(part):
            with open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, fields)
                writer.writeheader()
                writer.writerows(rows)
        weights.write_whole(out / "log.csv", write)
        about_now = about | dict(steps_done=trainer.step, seconds=round(time.time() - start, 1))
        weights.save_checkpoint(out / f"{stage}.safetensors",
                                {n: m.half() for n, m in trainer.master.items() if saved(n)}, about_now)
        # last: a run that was killed in here goes on from the state before, and the other two may be ahead of it
        weights.save_checkpoint(state, trainer.state(), dict(step=trainer.step, about=about))

    bar = tqdm(range(trainer.step, steps), desc=stage, unit="step", initial=trainer.step, total=steps)
    for step in bar:
        loss, n, notes = loss_of(step)
        loss.backward()
        lr_now = trainer.update()
        # .item() waits for the GPU, so it comes after the whole step has been queued
        rows.append(dict(step=step, loss=round(loss.item(), 5), lr=f"{lr_now:.3g}", targets=n, seconds=round(time.time() - start, 2),
                         **{k: round(v.item(), 4) for k, v in notes.items()}))
        bar.set_postfix({k: rows[-1][k] for k in ("loss", *notes)})
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(f"the loss became {rows[-1]['loss']} at step {step}: try a smaller --lr (the last checkpoint in {out} is intact)")
        if (step + 1) % save_every == 0 or step == steps - 1:
            save()
    plot_loss(rows, stage, out / "loss.png")
    print(f"{stage}: {steps} steps, loss {rows[0]['loss']} -> {rows[-1]['loss']}, {rows[-1]['seconds']:.0f} s; see {out}/")


def plot_loss(rows, stage, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(6, 3.2), dpi=120)
    steps, losses = [int(r["step"]) for r in rows], [float(r["loss"]) for r in rows]
    smooth, mean = [], losses[0]
    for x in losses:
        mean = 0.95 * mean + 0.05 * x
        smooth.append(mean)
    ax.plot(steps, losses, color="#2a6f97", alpha=0.3, lw=0.8)
    ax.plot(steps, smooth, color="#2a6f97", lw=1.6)
    ax.set(xlabel="step", ylabel="loss", title=f"stage {stage}")
    ax.grid(alpha=0.3)
    fig.tight_layout()
    weights.write_whole(path, lambda part: fig.savefig(part, format="png"))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(RECIPES), help="which stage to run")
    parser.add_argument("--llm", default=weights.DEFAULT_LLM, help="target LLM: folder, .gguf file or hub name (default: %(default)s)")
    parser.add_argument("--replace", help="layers that the translator replaces, e.g. 23-28; 'none' trains on the full LLM (default: the start's, else 23-28)")
    parser.add_argument("--vit", help="ViT to start from: a checkpoint of stage vit, or a CLIP folder or hub name (default: the start's)")
    parser.add_argument("--start", help="checkpoint to start from, 'none' for a new projector (default: assets/vit.safetensors for translator, or none if --vit is given; assets/encoder.safetensors for encoder and decoder)")
    parser.add_argument("--bound", type=float, help="how far visual tokens may lie from the mean text embedding, 0: anywhere, as in the paper (default: the start's; stage vit 2.5, a new projector 0)")
    parser.add_argument("--data", help="LLaVA-format JSON in place of the embedded world")
    parser.add_argument("--images", default=".", help="folder of the images that --data names (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: the stage's short run)")
    parser.add_argument("--batch", type=int, help="samples a step (default: the stage's)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's)")
    parser.add_argument("--chats", type=int, default=256, help="stage translator: text instructions that the LLM writes (default: %(default)s)")
    parser.add_argument("--distill-every", type=int, default=0, metavar="K", help="every K-th step, pull the translator to the full LLM on the encoder's own visual tokens; 0: never, as in the paper (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="in which the models compute (default: bfloat16 where the hardware has it)")
    parser.add_argument("--out", help="folder for checkpoint, log and plot (default: runs/STAGE)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, exactly as if never stopped")
    args = parser.parse_args(argv)

    recipe = dict(RECIPES[args.stage])
    recipe |= {k: getattr(args, k) for k in ("steps", "batch", "lr", "bound") if getattr(args, k) is not None}
    for name, least in dict(steps=1, batch=1, chats=1, save_every=1, distill_every=0).items():
        value = (vars(args) | recipe)[name]
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    out = args.out or f"runs/{args.stage}"
    if args.resume and not (Path(out) / "state.safetensors").exists():
        raise FileNotFoundError(f"nothing to resume: {out}/state.safetensors is not there (see --out)")
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(args.device)
    common = dict(seed=args.seed, device=args.device, out=out, resume=args.resume, save_every=args.save_every)
    if args.stage == "vit":
        train_vit(**recipe, **common, dtype=dtype, start=None if args.start == "none" else args.start, llm_name=args.llm)
        return
    start = args.start or ("assets/encoder.safetensors" if args.stage != "translator" else "none" if args.vit else "assets/vit.safetensors")
    bound = recipe.pop("bound", None)
    ranges = parse_ranges(args.replace) if args.replace is not None else None
    start = None if start == "none" else start
    vlm, llm, vit = build(args.stage, args.llm, ranges, args.vit, start, dtype, args.device, bound)
    records = data.load_llava(args.data, args.images, args.seed) if args.data else None
    if records is not None and args.stage == "encoder":     # stage 2 learns from images alone
        pictured = [i for i, r in enumerate(records.records) if r.get("image")]
        if not pictured:
            raise ValueError(f"{args.data} has no record with an image, from which alone the stage encoder learns")
        records = torch.utils.data.Subset(records, pictured)
    chats = own_chats(llm, vlm.tokenizer, args.chats, args.seed) if args.stage == "translator" else None
    train_stage(args.stage, **recipe, **common, vlm=vlm, llm=llm, llm_name=args.llm, vit_name=vit, start=start,
                distill_every=args.distill_every, records=records, chats=chats,
                projector=args.stage != "translator" or start is None)


if __name__ == "__main__":
    sys.exit(weights.run_cli(main))

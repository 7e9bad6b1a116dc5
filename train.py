"""
Train the vision encoder against the surrogate, stage by stage.

    python train.py vit             # stage 0: pre-train the small ViT, CLIP's way; it stands in for CLIP
    python train.py translator      # stage 1: heal the surrogate's translator, and a first projector
    python train.py encoder         # stage 2: train projector and upper ViT through the frozen surrogate
    python graft.py --encoder runs/encoder/encoder.safetensors      # plug the result into the full LLM
    python train.py decoder         # stage 3 (optional): go on training the full LLM behind the grafted encoder

Without options a stage makes a short run that starts from what assets/ holds. The recipe of a stage (what is trained,
on which data, which tokens carry loss, optimiser and schedule) is the paper's; steps, batch and learning rate are the
small world's.

    python train.py encoder --preset llama-3.1-8b --dry-run     # the paper's size: what it trains, computes and needs
    torchrun --nproc-per-node 8 train.py encoder --preset llama-3.1-8b --data llava_v1_5_mix665k.json --images …
"""
import argparse
import collections
import csv
import hashlib
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import surrogate
from data import world
from data.batches import Sample, collate, evenly_spaced, shuffled_index
from data.images import preprocess
from data.llava import load_llava
from extras import parallel
from formats import checkpoints, official
from formats.errors import MissingFile, UserError, run_cli
from formats.tokenizer import Tokenizer
from model import VLM, Llama, ViT, ViTConfig, add_lora, base_vit
from studies import cost
from surrogate import build_surrogate, check_ranges, load_surrogate, parse_ranges

# What differs between the stages. Everything else is the same in all: AdamW (0.9, 0.999) without weight decay, linear
# warm-up over 3.05 % of the steps, cosine to 0, gradients clipped to norm 1 (the paper's recipe). For the drawn world;
# on LLaVA's data ends_lr, translator_lr and epochs are 1 and distill_every 0, as in the paper, whose other numbers are
# in studies/cost.py.
RECIPES = {
    "vit":        dict(steps=600, batch=128, lr=1e-3, bound=2.5),
    "translator": dict(steps=400, batch=16, lr=1e-3, loss_on="answers+special", epochs=4, distill_every=1),
    "encoder":    dict(steps=200, batch=16, lr=2e-4, loss_on="answers+special", distill_every=0),
    "decoder":    dict(steps=30, batch=16, lr=5e-5, loss_on="answers", distill_every=0),
}
WARMUP = 0.0305
DEFAULT_RANGES = [(20, 23), (24, 28)]   # of SmolLM2-135M


def check_recipe(stage, projector, surrogate, epochs, distill_every, translator_lr):
    """UserError for what a stage cannot do. projector: does it learn? surrogate: is there one?"""
    if epochs > 1 and (stage != "translator" or projector):
        raise UserError("--epochs reads kept states again: only stage translator can, and only after a stage 0 that "
                        "aligned the projector")
    if distill_every > 1 and stage == "translator":
        raise UserError("--distill-every: in stage translator the full LLM teaches every sample (1) or none (0)")
    if distill_every and not surrogate:
        raise UserError("--distill-every needs a surrogate, whose translator the full LLM teaches: leave it out here")
    if translator_lr != 1 and stage != "encoder":
        raise UserError("--translator-lr is for stage encoder, where a translator learns beside the encoder")


def lr_at(step, steps, lr):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# Which parameters a stage trains (paper, section 4)


def trained_parameters(vlm, stage, distill=False, projector=True, lora=False):
    """{name: parameter} that a stage trains; these get gradients, all others are frozen.

    lora: of the decoder, stage 3 trains only the low-rank updates (model.add_lora). projector=False leaves out
    everything before the decoder (stage 1 with the projector of stage 0: it is healed already, and the answers' loss
    through a translator that is not yet would only harm it).
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
    names = [n for n, _ in vlm.named_parameters() if n.startswith(tuple(prefixes))]
    if lora:
        names = [n for n in names if ".lora_" in n or not n.startswith("decoder.")]
    return {n: vlm.get_parameter(n).requires_grad_(True) for n in names}


# ---------------------------------------------------------------------------------------------------------------------
# Data of a step: a function of (seed, step) alone, so that a resumed run sees what an uninterrupted one would have
# seen, whatever the number of processes or workers


class Batches(torch.utils.data.Dataset):
    """batches[step] -> what this process reads in that step: (micro-batches, skipped records).

    A step's samples are shared out over the processes (world of them, this is number rank) and then over micro-batches,
    which run one after the other. A micro-batch is one or two batches of `collate`: samples with an image, and text.
    """

    def __init__(self, vlm, size, micro, loss_on, seed, records=None, texts=None, rank=0, world=1, together=False,
                 every=1):
        if size % (micro * world):
            raise UserError(f"a batch of {size} cannot be shared out: {micro} samples at a time in {world} process(es) "
                            f"make {micro * world}, which does not divide {size} (see --batch and --micro-batch)")
        self.size, self.micro, self.loss_on, self.seed = size, micro, loss_on, seed
        self.tokenizer, self.n_visual, self.image_size = vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size
        self.records, self.texts, self.rank, self.world, self.together = records, texts, rank, world, together
        self.every = max(1, every)
        # images and text alternate by even spacing, as in the paper: one epoch of both; 3 to 2 where images are endless
        finite = records is not None and isinstance(texts, torch.utils.data.Subset)
        self.mix = (len(records.pictured), len(texts)) if finite else (3, 2) if texts else (1, 0)

    def sample(self, i):
        """Sample number i of the whole run."""
        kind, k = evenly_spaced(i, *self.mix)
        if kind == "text":
            return self.texts[shuffled_index(k, len(self.texts), self.seed)]
        if self.records is None:
            return world.world(world.MIXTURE[k % len(world.MIXTURE)], k, self.seed)
        pictured = self.records.pictured
        return self.records[pictured[shuffled_index(k, len(pictured), self.seed)]]

    def __getitem__(self, step):
        try:
            return self.read(step)
        except (ValueError, OSError) as error:      # from a worker process, only what is returned arrives as it is
            return error, []

    def read(self, step):
        known, micro_batches = len(getattr(self.records, "skipped", ())), []
        for m in range(self.size // (self.micro * self.world)):
            first = step * self.size + (m * self.world + self.rank) * self.micro
            samples = [(i, self.sample(i)) for i in range(first, first + self.micro)]
            # text needs no gradient below the translator: apart from the images, autograd keeps no activations there
            groups = [samples]
            if not self.together:
                groups = [[s for s in samples if (s[1].image is None) == text] for text in (False, True)]
            micro_batches.append([self.collate(g) for g in groups if g])
        return micro_batches, list(getattr(self.records, "skipped", ()))[known:]

    def collate(self, samples):
        """[(number in the run, sample)] -> a batch; "taught": its rows on which the full LLM teaches the translator."""
        batch = collate([s for _, s in samples], self.tokenizer, self.n_visual, self.image_size, self.loss_on,
                        max_length=4096)
        # one of `every` samples, and the world's four tasks (i % 4) in turn
        turn = self.every if self.every % 4 == 0 else 4
        taught = [row for row, (i, _) in enumerate(samples) if (i + i // turn) % self.every == 0]
        return batch | {"taught": torch.tensor(taught, dtype=torch.long)}

    def loader(self, steps, workers=0):
        """Iterate over these steps; `workers` processes prepare them ahead."""
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, collate_fn=as_is)


def as_is(x):
    return x


@torch.no_grad()
def own_chats(llm, tokenizer, n, seed, batch=64):
    """Text instructions for stage 1, written by the LLM itself: it invents a user's question, then answers it.

    Sampled once, then kept in the cache folder. Returns n samples without image.
    """
    fingerprint = hashlib.sha256(llm.model.norm.weight.float().cpu().numpy().tobytes()).hexdigest()[:8]
    file = official.cache_folder() / f"chats-{fingerprint}-{n}-{seed}.json"
    if file.exists():
        return [Sample(None, messages) for messages in official.read_json(file)]
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
    checkpoints.write_whole(file, lambda part: part.write_text(json.dumps(chats[:n])))
    return [Sample(None, messages) for messages in chats[:n]]


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def surrogate_loss(vlm, batch, stage, llm=None):
    """(cross-entropy, KL divergence, distance) of one batch through the surrogate, each a sum: the first over all
    targets, the others over targets and positions of the rows batch["taught"] (default: all). Without `llm` or such
    rows they are None.

    The paper's loss is the first. With `llm` given, the others pull the translator towards the full LLM *on the visual
    tokens that the encoder makes now* (on-policy): the encoder cannot learn to please a translator that the LLM
    disagrees with. The LLM only runs forward, and only from the cut on. The answers' loss then teaches what is before
    the decoder and never the translator, the distillation the translator alone: so the translator runs twice.

    batch["states"], if it is there, keeps what a frozen projector, trunk and LLM make of the batch: for its next epoch.
    """
    s, device, states = vlm.decoder, vlm.decoder.device, batch.get("states", {})
    translators = torch.nn.ModuleList(s.model.layers[i] for i in s.translators)
    if "trunk" not in states:
        x = vlm.embed(batch["tokens"].to(device), batch["pixels"])                      # (B, T, C)
        if s.sharded and batch["pixels"] is None:
            x = x + 0 * vlm.embd_soi    # sharded layers work in step: without images, too, gradients go through
        states["trunk"] = s.run(x, 0, s.trunk)                                          # layers shared with the LLM
    x, ce = states["trunk"], None                                                       # (B, T, C)
    rows = batch.get("taught", torch.arange(len(x)))                                    # (R,)
    if llm is None or x.requires_grad or not len(rows):
        translators.requires_grad_(llm is None and stage == "translator")
        ce = s.loss(s.run(x, s.trunk), batch["targets"])
    if llm is None:
        return ce, None, None
    translators.requires_grad_(True)
    if not len(rows):
        return ce, None, None

    x, targets = x.detach()[rows.to(device)], batch["targets"][rows].flatten()          # (R, T, C), (R*T,)
    index = (targets >= 0).nonzero().squeeze(1).to(device)      # (N,) positions with a target: found on the CPU
    last, after = s.translators[-1] + 1, s.ranges[-1][1] + 1    # the layer that follows: in the surrogate, in the LLM
    if "theirs" not in states:
        with torch.no_grad():
            states["theirs"] = llm.run(x, s.trunk, after)                           # (R, T, C): the translator's aim
            states["full"] = llm.run(states["theirs"], after).flatten(0, 1)[index]  # (N, C): what the LLM makes of it
    theirs = states["theirs"]
    ours = s.run(x, s.trunk, last)                                                      # (R, T, C)
    real = (torch.arange(x.shape[1]) < batch["lengths"][rows, None]).to(device)         # (R, T): not padding
    # each position in units of its own length: the first token's state is many times as long as the others' ("massive
    # activations", arXiv 2402.17762), and would be all that a common unit sees
    off, size = (h.float().square().sum(-1) for h in (ours - theirs, theirs))           # (R, T) each
    logp = s.logits(s.run(ours, last).flatten(0, 1)[index]).float().log_softmax(-1)     # (N, vocab)
    with torch.no_grad():
        full_logp = llm.logits(states["full"]).float().log_softmax(-1)
    if ce is None:      # nothing before the decoder learns: only for the log
        ce = F.nll_loss(logp.detach(), targets[targets >= 0].to(device), reduction="sum")
    return ce, F.kl_div(logp, full_logp, log_target=True, reduction="sum"), (off / size).masked_fill(~real, 0).sum()


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser with float32 master weights, and what a resumed run needs


class Trainer:
    """AdamW on float32 copies of the trained parameters, whatever the dtype in which the model computes (bf16 on GPUs).

    Make it first, then cast the model: so the copies begin with all their digits. Of a sharded parameter, copy,
    gradient and optimiser state are those of this process's slice.
    """

    def __init__(self, parameters, lr, steps, ends_lr=1.0, translator_lr=1.0):
        self.parameters, self.lr, self.steps, self.step = parameters, lr, steps, 0
        copy = lambda p: parallel.local(p.detach()).float().clone().requires_grad_(True)
        self.master = {n: copy(p) for n, p in parameters.items()}
        # start and end of image are two vectors among thousands: in a short run they only move if they learn faster
        factor = lambda n: ends_lr if n.startswith("embd_") else translator_lr if n.startswith("decoder.") else 1.0
        groups = [dict(params=[m for n, m in self.master.items() if factor(n) == f], factor=f)
                  for f in sorted({factor(n) for n in self.master})]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), weight_decay=0.0)

    def is_sharded(self, name):
        return isinstance(self.parameters[name], parallel.DTensor)

    def add_gradients(self):
        """Move the gradients that lie on the parameters to the float32 copies: after every micro-batch."""
        for n, p in self.parameters.items():
            if p.grad is not None:
                grad = parallel.local(p.grad).float()
                if self.is_sharded(n):
                    grad = grad * parallel.world()          # FSDP took the mean over the processes: here it is the sum
                self.master[n].grad = grad if self.master[n].grad is None else self.master[n].grad + grad
                p.grad = None

    def update(self):
        """One step with the gradients gathered so far. Returns the learning rate used."""
        self.add_gradients()
        lr = lr_at(self.step, self.steps, self.lr)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["factor"]
        if parallel.world() > 1:                            # what no sample of this process met, another's may have
            device = next(iter(self.master.values())).device
            met = torch.tensor([float(m.grad is not None) for m in self.master.values()], device=device)
            for m, count in zip(self.master.values(), parallel.add_up(met).tolist()):
                if count and m.grad is None:
                    m.grad = torch.zeros_like(m)
        squares = {True: 0.0, False: 0.0}                   # sharded or not -> sum of the squares of all gradients
        for n, m in self.master.items():
            if not self.is_sharded(n) and m.grad is not None:
                parallel.add_up(m.grad)
            if m.grad is not None:
                squares[self.is_sharded(n)] += m.grad.square().sum()
        if torch.is_tensor(squares[True]):
            parallel.add_up(squares[True])
        norm = torch.as_tensor(squares[True] + squares[False]).sqrt()
        for m in self.master.values():
            if m.grad is not None:
                m.grad *= (1.0 / (norm + 1e-6)).clamp(max=1.0)         # clipped to norm 1, as torch's clip_grad_norm_
        self.adam.step()
        self.adam.zero_grad()
        self.write_back()
        self.step += 1
        return lr

    @torch.no_grad()
    def write_back(self):
        for n, p in self.parameters.items():
            parallel.local(p).copy_(self.master[n])

    def weights(self, dtype=torch.float32):
        """{name: trained weight}, sharded ones as such."""
        return {n: parallel.joined(self.parameters[n], m.detach().to(dtype)) for n, m in self.master.items()}

    def state(self):
        """Everything as flat named tensors, for safetensors; gathered, another number of processes can go on."""
        out = {f"master.{n}": m for n, m in self.weights().items()}
        for n, m in self.master.items():
            for k, v in self.adam.state.get(m, {}).items():
                out[f"adam.{n}.{k}"] = parallel.joined(self.parameters[n], v) if v.dim() else v
        return out

    def load_state(self, tensors, step, path):
        """tensors: {name: function that reads it}, one at a time."""
        ours = {n.removeprefix("master.") for n in tensors if n.startswith("master.")}
        if ours != set(self.master):
            odd = sorted(ours ^ set(self.master))[0]
            raise UserError(f"{path} does not belong to this run: {odd} is trained in only one of the two")
        self.step = step
        with torch.no_grad():
            for n, m in self.master.items():
                slice_of = lambda t: parallel.local(parallel.like(self.parameters[n], t.to(m.device))) if t.dim() else t
                m.copy_(slice_of(tensors[f"master.{n}"]()))
                state = {k: slice_of(tensors[f"adam.{n}.{k}"]()) for k in ("step", "exp_avg", "exp_avg_sq")
                         if f"adam.{n}.{k}" in tensors}
                if state:
                    self.adam.state[m] = state
        self.write_back()


# ---------------------------------------------------------------------------------------------------------------------
# The stages


def default_dtype(device):
    """bf16 where the chip multiplies it in hardware (GPUs, and CPUs with AMX or AVX512-BF16), else float32."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = str(device).startswith("cuda") or cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def build(stage, llm_name, ranges, vit, start, dtype, device, bound=None, need_llm=True, shard=None, place=None):
    """(VLM, full LLM, ViT's name) for the stages 1 to 3, with the weights that they start from; the decoder of the VLM
    is the surrogate.

    `start` is the checkpoint of an earlier stage; None begins with a new projector. A new translator is a copy of the
    first layer that it stands for. need_llm=False reads the surrogate's layers alone, and the LLM returned is None.
    """
    path = official.find(llm_name)
    tensors, about = checkpoints.read_checkpoint(start) if start else ({}, {})
    if about.get("llm", llm_name) != llm_name:
        raise UserError(f"{start} was trained for {about['llm']}, not for {llm_name}")
    tokenizer = Tokenizer.from_pretrained(path)
    trained_translator = bool(about.get("ranges")) and stage == "encoder"
    need_llm = need_llm or stage == "decoder" or ranges == []
    llm = Llama.from_pretrained(path, dtype, device, shard=shard, place=place) if need_llm else None
    from_file = lambda _, ranges: surrogate.from_pretrained(path, ranges, dtype, device, shard, place)
    make = build_surrogate if need_llm else from_file       # out of the whole LLM, or out of the layers that it keeps
    if stage == "decoder":
        decoder = llm
    elif trained_translator and ranges != []:
        decoder = load_surrogate(llm, start, make, place)
        L = official.llama_config(path)["num_hidden_layers"]
        if ranges is not None and check_ranges(ranges, L) != decoder.ranges:
            raise UserError(f"{start} replaces the layers {decoder.ranges}, not {ranges}: "
                            "train a translator for these first")
    elif stage == "encoder" and ranges != []:
        raise UserError("stage encoder needs a trained translator: run `python train.py translator` first and give its "
                        "checkpoint as --init, or train on the full LLM with --replace none")
    else:
        decoder = make(llm, DEFAULT_RANGES if ranges is None else ranges)
    vit = vit or about.get("vit") or start or "assets/vit.safetensors"      # a start of stage vit is the ViT itself
    torch.manual_seed(0)                    # the projector's first values
    vlm = VLM(base_vit(vit, start or vit), decoder, tokenizer, about.get("bound") if bound is None else bound)
    vlm.to(device)                          # what is before the decoder stays float32 until the Trainer has copied it
    if start:
        go_on = stage == about.get("stage") == "decoder"    # else the start's decoder is the surrogate's, or not wanted
        if go_on and about["recipe"].get("lora"):
            raise UserError(f"{start} holds low-rank updates of a decoder, from which no new run can begin: "
                            "go on with --resume")
        while "adapter.0.weight" not in tensors and about.get("start"):     # stage 1 left the projector as it was:
            below, about = checkpoints.read_checkpoint(checkpoints.beside(about["start"], start))   # take it from there
            tensors = below | tensors
        tensors = {n: t for n, t in tensors.items() if go_on or not n.startswith("decoder.")}
        checkpoints.load_checkpoint(vlm, tensors, start, place)
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
    """CLIP's loss: features of images (B, d) and text (B, d), all of length 1. same (B, B): captions that are equal."""
    logits = logit_scale.exp() * image @ text.T                                         # (B, B)
    targets = same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class Pictures(torch.utils.data.Dataset):
    """pictures[step] -> (pixels (B, 3, S, S), captions) of a step of stage 0: shapes, signs and flags alike."""

    def __init__(self, batch, seed):
        self.batch, self.seed = batch, seed

    def __getitem__(self, step):
        first, tasks = step * self.batch, ["shape", "read", "flag"]
        samples = [world.world(tasks[j % 3], first + j, self.seed) for j in range(self.batch)]
        return torch.stack([preprocess(s.image) for s in samples]), [s.caption for s in samples]


def train_vit(steps, batch, lr, bound, seed, device, dtype, out, resume, start=None, llm_name=official.DEFAULT_LLM,
              save_every=200, workers=0):
    """Stage 0: CLIP's contrastive pre-training of the small ViT on images and captions. Returns the VLM.

    CLIP trains a text tower beside the ViT. Here the LLM's own token embeddings, frozen, take its place, and the
    projector is the ViT's head: visual tokens begin where the LLM keeps the words for what is seen. The LLM itself
    never runs.
    """
    path = official.find(llm_name)
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    captions = [world.world("describe", i, seed).caption for i in range(4096)]      # every caption, by frequency
    text_of = caption_features(captions, tokenizer, llm.model.embed_tokens.weight)
    torch.manual_seed(seed)
    vlm = VLM(ViT(ViTConfig()), llm, tokenizer, bound).to(device)
    if start:
        checkpoints.load_checkpoint(vlm, checkpoints.read_checkpoint(start)[0], start)
    logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.03), device=device))
    trainer = Trainer(trained_parameters(vlm, "vit") | {"logit_scale": logit_scale}, lr, steps)
    vlm.to(dtype)

    def backward(step, item):
        pixels, names = item
        visual = vlm.visual_tokens(pixels)[:, 1:-1].float() - vlm.mean_embedding        # (B, 1 + P, d): no soi, no eoi
        text = torch.stack([text_of[name] for name in names]).to(device)                # (B, d)
        same = torch.tensor([[a == b for b in names] for a in names], device=device)    # (B, B)
        # CLS learns fastest, as in CLIP; the mean teaches every patch to carry what the whole image says
        cls, mean = (F.normalize(x, dim=-1) for x in (visual[:, 0], visual.mean(1)))    # (B, d) each
        loss = (contrastive_loss(cls, text, same, logit_scale) + contrastive_loss(mean, text, same, logit_scale)) / 2
        right = same.gather(1, (mean @ text.T).argmax(1, keepdim=True)).float().mean()  # finds its caption in the batch
        loss.backward()
        return dict(loss=loss, right=right, targets=batch)

    about = dict(stage="vit", llm=llm_name, start=start, bound=bound, vit_config=vars(vlm.encoder.config),
                 recipe=dict(steps=steps, batch=batch, lr=lr), seed=seed)
    pictures = Pictures(batch, seed)
    read = lambda start, stop: torch.utils.data.DataLoader(pictures, batch_size=None, sampler=range(start, stop),
                                                           num_workers=workers, collate_fn=as_is)
    run(trainer, backward, read, out, "vit", about, resume, save_every, saved=lambda name: name != "logit_scale")
    return vlm


def train_stage(stage, steps, batch, lr, seed, device, out, resume, vlm, llm, loss_on, llm_name, vit_name, start=None,
                distill_every=0, records=None, texts=None, save_every=100, projector=True, micro_batch=None, workers=0,
                lora=0, ends_lr=1.0, translator_lr=1.0, epochs=1):
    """Stages 1 to 3. Returns the VLM, trained. projector, lora: see `trained_parameters`; records, texts, micro_batch:
    see `Batches`.

    epochs: go through the samples of the first steps / epochs steps again and again. Where nothing before the
    translator is trained, their states at the cut are kept in memory (about 3 MB for 16 samples of the small world),
    and neither trunk nor LLM has to run again (but its head).
    """
    surrogate_here = bool(getattr(vlm.decoder, "translators", None))
    check_recipe(stage, projector, surrogate_here, epochs, distill_every, translator_lr)
    micro = micro_batch or max(1, batch // parallel.world())
    recipe = dict(steps=steps, batch=batch, lr=lr, ends_lr=ends_lr, translator_lr=translator_lr, loss_on=loss_on)
    trained = trained_parameters(vlm, stage, distill_every > 0, projector, lora > 0)
    trainer = Trainer(trained, lr, steps, ends_lr, translator_lr)
    vlm.to(vlm.decoder.dtype)
    batches = Batches(vlm, batch, micro, loss_on, seed, records, texts, parallel.rank(), parallel.world(),
                      vlm.decoder.sharded, distill_every)

    bad = set()         # records that could not be read, and were replaced
    fresh, kept = math.ceil(steps / epochs), {}     # steps with samples of their own, and what they read

    def read(start, stop):
        first = batches.loader([i % fresh for i in range(start, min(stop, start + fresh))], workers)
        return itertools.chain(first, itertools.repeat(None))

    def backward(step, item):
        """Gradients of one step, of all its micro-batches in this process. Returns what is to be logged."""
        micro_batches, skipped = item or kept[step % fresh]
        if isinstance(micro_batches, Exception):
            raise micro_batches
        skipped = [line for line in skipped if line not in bad]     # each worker finds it anew
        bad.update(skipped)
        for line in skipped:
            tqdm.write(f"skipped: {line}")
        if epochs > 1 and step % fresh not in kept:
            kept[step % fresh] = micro_batches, []
            for b in itertools.chain(*micro_batches):       # clone: out of a worker's shared memory
                b.update({k: v.clone() for k, v in b.items() if torch.is_tensor(v)}, states={})
        distil = llm if distill_every else None
        count = lambda targets: int((targets >= 0).sum())
        own = [(count(b["targets"]), count(b["targets"][b["taught"]]), int(b["lengths"][b["taught"]].sum()))
               for m in micro_batches for b in m]
        n, *taught = parallel.add_up(torch.tensor(own, device=device).sum(0)).clamp(min=1)
        sums = torch.zeros(3, device=device)    # cross-entropy, KL divergence, distance: means of the global batch
        for groups in micro_batches:
            total = 0.0
            for b in groups:
                if stage == "decoder":
                    losses = [vlm.loss(b["tokens"].to(device), b["targets"], b["pixels"])]
                else:
                    losses = [x for x in surrogate_loss(vlm, b, stage, distil) if x is not None]
                for i, (loss, share) in enumerate(zip(losses, (n, *taught))):
                    total = total + loss / share
                    sums[i] += loss.detach() / share
            if torch.is_tensor(total) and total.requires_grad:      # not so: text alone, and nothing above it learns
                total.backward()
            trainer.add_gradients()
        parallel.add_up(sums)
        distilled = {} if distil is None else dict(distill=sums[1] + sums[2])
        return dict(loss=sums[0], **distilled, targets=n, skipped=len(skipped))

    about = dict(stage=stage, llm=llm_name, ranges=getattr(vlm.decoder, "ranges", []), vit=vit_name, start=start,
                 bound=vlm.bound, vit_config=vars(vlm.encoder.config), seed=seed,
                 recipe=recipe | dict(distill_every=distill_every, projector=projector, dtype=str(vlm.decoder.dtype),
                                      lora=lora, epochs=epochs, texts=len(texts or []), records=len(records or [])))
    run(trainer, backward, read, out, stage, about, resume, save_every)
    bad = parallel.union(bad)
    if bad and parallel.rank() == 0:
        print(f"{len(bad)} records could not be read and were replaced")
    return vlm


def run(trainer, backward, batches, out, stage, about, resume, save_every, saved=lambda name: True):
    """The loop of every stage. batches(start, stop) gives what each step reads; backward(step, that) leaves gradients
    on the trained parameters and returns what is to be logged. Writes to the folder `out`

    STAGE.safetensors   what was trained (float16), with `about` as its metadata
    state.safetensors   float32 weights and the optimiser, for --resume
    log.csv, loss.png   one row a step
    """
    out, steps, first = Path(out), trainer.steps, parallel.rank() == 0
    rows, state = [], out / "state.safetensors"
    if resume:
        tensors, was = checkpoints.open_checkpoint(state)
        if was["about"] != json.loads(json.dumps(about)):
            key = next(k for k in about if json.loads(json.dumps(about))[k] != was["about"].get(k))
            raise UserError(f"{state} is of another run: {key} was {was['about'].get(key)}, is {about[key]}")
        trainer.load_state(tensors, was["step"], state)
        with open(out / "log.csv") as f:
            rows = [r | dict(seconds=float(r["seconds"])) for r in csv.DictReader(f) if int(r["step"]) < trainer.step]
    start = time.time() - (rows[-1]["seconds"] if rows else 0)

    def save():
        columns = dict.fromkeys(["step", "loss", "lr", "targets", "seconds"]) | {k: None for r in rows for k in r}

        def write(part):
            with open(part, "w", newline="") as f:
                writer = csv.DictWriter(f, list(columns))
                writer.writeheader()
                writer.writerows(rows)
        if first:
            checkpoints.write_whole(out / "log.csv", write)
        weights = parallel.gathered({n: t for n, t in trainer.weights(torch.float16).items() if saved(n)})
        if first:
            about_now = about | dict(steps_done=trainer.step, seconds=round(time.time() - start, 1))
            checkpoints.save_checkpoint(out / f"{stage}.safetensors", weights, about_now)
        del weights
        # last: a run that was killed in here goes on from the state before, and the other two may be ahead of it
        all_state = parallel.gathered(trainer.state())
        if first:
            checkpoints.save_checkpoint(state, all_state, dict(step=trainer.step, about=about))

    bar = tqdm(range(trainer.step, steps), desc=stage, unit="step", initial=trainer.step, total=steps,
               disable=not first)
    for step, item in zip(bar, batches(trainer.step, steps)):
        logged = backward(step, item)
        lr_now = trainer.update()
        # .item() waits for the GPU, so it comes after the whole step has been queued
        logged = {k: round(v.item(), 5) if torch.is_tensor(v) else v for k, v in logged.items()}
        rows.append(dict(step=step, lr=f"{lr_now:.3g}", seconds=round(time.time() - start, 2)) | logged)
        bar.set_postfix({k: v for k, v in logged.items() if k not in ("targets", "skipped")})
        if not math.isfinite(logged["loss"]):
            intact = f" (the last checkpoint in {out} is intact)" if state.exists() else ""
            raise UserError(f"the loss became {logged['loss']} at step {step}: try a smaller --lr{intact}")
        if (step + 1) % save_every == 0 or step == steps - 1:
            save()
    if first:
        plot_loss(rows, stage, out / "loss.png")
        print(f"{stage}: {steps} steps, loss {rows[0]['loss']} -> {rows[-1]['loss']}, {rows[-1]['seconds']:.0f} s; "
              f"see {out}/")


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
    checkpoints.write_whole(path, lambda part: fig.savefig(part, format="png"))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(RECIPES), help="which stage to run")
    parser.add_argument("--preset", choices=list(cost.PRESETS),
                        help="the paper's LLM, ViT, ranges and recipe; what you give besides goes before it")
    parser.add_argument("--dry-run", action="store_true",
                        help="with --preset: print what would be trained, computed and needed, load nothing")
    parser.add_argument("--gpus", type=int, default=8, help="--dry-run: for how many GPUs (default: %(default)s)")
    parser.add_argument("--llm", help=f"target LLM: folder, .gguf file or hub name (default: {official.DEFAULT_LLM})")
    parser.add_argument("--replace", help=(
        "layers that translators replace, e.g. 23-28, or 20-23,24-28 by two; 'none' trains on the full LLM (default: "
        "those of --init, else 23-28)"))
    parser.add_argument("--vit", help=(
        "ViT to start from: a checkpoint of stage vit, or a CLIP folder or hub name (default: that of --init)"))
    parser.add_argument("--init", dest="start", help=(
        "checkpoint to start from, 'none' for a new projector (default: assets/vit.safetensors for translator, or "
        "none if --vit is given; assets/encoder.safetensors for encoder and decoder)"))
    parser.add_argument("--bound", type=float, help=(
        "how far visual tokens may lie from the mean text embedding, 0: anywhere, as in the paper (default: that of "
        "--init; stage vit 2.5, a new projector 0)"))
    parser.add_argument("--data", help="LLaVA-format JSON in place of the embedded world")
    parser.add_argument("--images", default=".", help="folder of the images that --data names (default: %(default)s)")
    parser.add_argument("--text", help=(
        "stage translator: LLaVA-format JSON of text instructions, mixed in by even spacing (default: the LLM writes "
        "some)"))
    parser.add_argument("--on-bad-record", choices=["stop", "skip"], default="stop", help=(
        "a record that is malformed, or whose image is missing or damaged: stop there, or name it and go on (default: "
        "%(default)s)"))
    parser.add_argument("--steps", type=int, help=(
        "optimiser steps (default: the stage's short run; with --data all records once, or --epochs times)"))
    parser.add_argument("--batch", type=int, help="samples a step, over all processes (default: the stage's)")
    parser.add_argument("--micro-batch", type=int, help=(
        "samples that a process takes through the model at once; gradients are gathered until --batch is full "
        "(default: all of its share)"))
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's)")
    parser.add_argument("--ends-lr", type=float, help=(
        "how many times as fast the start and end vectors of an image learn; 1 in the paper (default: 30 for encoder "
        "in the embedded world, else 1)"))
    parser.add_argument("--translator-lr", type=float, help=(
        "stage encoder: how many times as fast the translator learns that the full LLM teaches (default: 5 in the "
        "embedded world, else 1)"))
    parser.add_argument("--chats", type=int, default=256, help=(
        "stage translator: text instructions that the LLM writes, without --text (default: %(default)s)"))
    parser.add_argument("--epochs", type=int, help=(
        "stage translator: how many times --steps go through their samples; the states of the frozen layers stay in "
        "the device's memory (default: 4 in the embedded world, else, and with a new projector, 1)"))
    parser.add_argument("--distill-every", type=int, metavar="K", help=(
        "the full LLM teaches the translator on one of K samples (stage translator: on all, 1), on the encoder's own "
        "visual tokens; 0: never, as in the paper (default: in the embedded world 1 for translator and 4 for encoder, "
        "else 0)"))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help=(
        "stage decoder: train low-rank updates of the decoder in place of all of it (default: all)"))
    parser.add_argument("--fsdp", action="store_true",
                        help="shard the decoder's layers over the GPUs (start with torchrun)")
    parser.add_argument("--checkpointing", action="store_true",
                        help="keep only the layers' inputs for the backward pass, and compute the rest again")
    parser.add_argument("--workers", type=int, default=0,
                        help="processes that prepare the images ahead (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        help="in which the models compute (default: bfloat16 where the hardware has it)")
    parser.add_argument("--out", help="folder for checkpoint, log and plot (default: runs/STAGE)")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help=(
        "go on from the checkpoint in --out, exactly as if never stopped; the number of GPUs may differ"))
    args = parser.parse_args(argv)
    stage = args.stage

    options = ("steps", "batch", "lr", "ends_lr", "translator_lr", "distill_every", "bound", "micro_batch", "epochs")
    given = {k: getattr(args, k) for k in options if getattr(args, k) is not None}
    plain = dict(ends_lr=1.0, translator_lr=1.0, distill_every=0)       # as in the paper
    recipe = RECIPES[stage] | (plain | dict(epochs=1) if args.data else {}) | given
    if args.replace == "none" or args.fsdp:
        recipe = recipe | dict(distill_every=0) | given         # there is no surrogate, or no whole LLM beside it
    if args.preset:
        if stage == "vit":
            raise UserError("stage vit has no preset: the paper starts with CLIP")
        preset = cost.PRESETS[args.preset]
        paper = cost.recipe(stage, args.preset)
        recipe = {k: paper[k] for k in ("steps", "batch", "micro_batch", "lr", "loss_on")}
        recipe = recipe | plain | dict(bound=0) | given
        if args.llm and Path(args.llm).exists():        # your own copy of the weights: of this model?
            theirs, ours = official.llama_config(Path(args.llm)), vars(preset["llm_config"])
            odd = [k for k in ours if k not in ("rope_scaling", "max_position_embeddings") and
                   not math.isclose(ours[k], theirs[k], rel_tol=1e-6)]      # a .gguf's numbers are float32
            if odd:
                raise UserError(f"{args.llm} is not the LLM of the preset {args.preset}: "
                                f"{odd[0]} is {theirs[odd[0]]} there, {ours[odd[0]]} here")
        args.llm = args.llm or preset["llm"]
        args.checkpointing = True
        if stage == "translator":
            args.vit, args.start = args.vit or preset["vit"], args.start or "none"
            args.replace = args.replace or ",".join(f"{a}-{b}" for a, b in preset["ranges"])
        before = {"encoder": "translator", "decoder": "encoder"}.get(stage)
        args.start = args.start or f"runs/{before}/{before}.safetensors"
        if not args.dry_run and (not args.data or stage == "translator" and not args.text):
            and_text = ", and a JSON of text instructions as --text" if stage == "translator" else ""
            raise UserError(f"the preset {args.preset} learns from photographs: give LLaVA's JSON as --data "
                            f"and its folder as --images{and_text} (or --dry-run)")
    elif args.dry_run:
        raise UserError(f"--dry-run describes a preset: give one of {', '.join(cost.PRESETS)} as --preset")
    for name, least in dict(steps=1, batch=1, micro_batch=1, epochs=1, chats=1, save_every=1, distill_every=0, lora=0,
                            workers=0, gpus=1).items():
        value = (vars(args) | recipe)[name]
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if args.lora and stage != "decoder":
        raise UserError(f"--lora trains the decoder: it is an option of the stage decoder, not of {stage}")
    shipped = "assets/encoder.safetensors"
    if stage == "translator":
        shipped = "none" if args.vit else "assets/vit.safetensors"
    start = args.start or shipped
    start = None if start == "none" else start
    projector = stage != "translator" or start is None
    if projector or "epochs" not in recipe:     # a projector that learns changes all states behind it: none can be kept
        recipe["epochs"] = given.get("epochs", 1)
    every = recipe.get("distill_every", 0)
    surrogate_here = stage != "decoder" and args.replace != "none"
    check_recipe(stage, projector, surrogate_here, recipe["epochs"], every, recipe.get("translator_lr", 1.0))
    if args.fsdp and every:
        raise UserError("--distill-every needs the full LLM beside its surrogate, which share layers: "
                        "it does not work with --fsdp")
    if args.text and stage != "translator":
        reads = "images alone" if stage == "encoder" else "the text in --data"
        raise UserError(f"--text is for stage translator: stage {stage} reads {reads}")
    if args.dry_run:
        target = args.preset
        if args.replace:
            L = preset["llm_config"].num_hidden_layers
            target = preset | dict(ranges=check_ranges(parse_ranges(args.replace), L))
        known = ("steps", "batch", "micro_batch", "lr", "loss_on", "distill_every")
        other = {k: v for k, v in recipe.items() if k in known}
        print(cost.show_plan(cost.stage_plan(stage, target, args.gpus, fsdp=args.fsdp, lora=args.lora,
                                             text_gradients=args.fsdp, **other)))
        return
    llm_name, out = args.llm or official.DEFAULT_LLM, args.out or f"runs/{stage}"
    if args.resume and not (Path(out) / "state.safetensors").exists():
        raise MissingFile(f"nothing to resume: {out}/state.safetensors is not there (see --out)")
    device = parallel.start(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    common = dict(seed=args.seed, device=device, out=out, resume=args.resume, save_every=args.save_every)
    if stage == "vit":
        if parallel.world() > 1:
            raise UserError("stage vit runs in one process: its loss compares all samples of a batch")
        recipe = {k: recipe[k] for k in ("steps", "batch", "lr", "bound")}
        start = None if args.start == "none" else args.start
        train_vit(**recipe, **common, dtype=dtype, start=start, llm_name=llm_name, workers=args.workers)
        return

    records = load_llava(args.data, args.images, args.seed, args.on_bad_record) if args.data else None
    same = args.text and args.data and Path(args.text).resolve() == Path(args.data).resolve()
    text = records if same else load_llava(args.text, None, args.seed, args.on_bad_record) if args.text else None
    for source in dict.fromkeys((records, text)):
        for line in source.skipped if source is not None and parallel.rank() == 0 else ():
            print(f"skipped: {line}", file=sys.stderr)
    if args.text and not text.texts:
        raise UserError(f"{args.text} has no record without an image, from which stage translator takes its text")
    texts = torch.utils.data.Subset(text, text.texts) if args.text else None
    if records is not None and not records.pictured:
        why = ", from which alone the stage encoder learns" if stage == "encoder" else ""
        raise UserError(f"{args.data} has no record with an image{why}")
    if records is not None and stage == "decoder" and records.texts:
        # stages 1 and 2 leave out LLaVA's own text, as the paper does
        texts = torch.utils.data.Subset(records, records.texts)
    if records is not None and "steps" not in given and not args.preset:
        n_texts = len(records.pictured) * 2 // 3 if stage == "translator" else 0        # see Batches
        n_texts = n_texts if texts is None else len(texts)
        recipe["steps"] = max(1, (len(records.pictured) + n_texts) // recipe["batch"]) * recipe["epochs"]

    bound = recipe.pop("bound", None)
    ranges = parse_ranges(args.replace) if args.replace is not None else None
    own_text = stage == "translator" and texts is None
    if own_text and args.fsdp:
        raise UserError("with --fsdp the LLM cannot write the text for stage translator: "
                        "give a JSON of text instructions as --text")
    sharded = dict(shard=parallel.shard, place=parallel.like) if args.fsdp else {}
    vlm, llm, vit = build(stage, llm_name, ranges, args.vit, start, dtype, device, bound,
                          need_llm=every > 0 or own_text, **sharded)
    if args.checkpointing:      # but not the translator where it runs twice and learns only once (surrogate_loss)
        twice = vlm.decoder.translators if every else []
        vlm.decoder.checkpointed = set(range(len(vlm.decoder.model.layers))) - set(twice)
    if args.lora:
        add_lora(vlm.decoder, args.lora)
    if own_text:
        texts = parallel.first_alone(lambda: own_chats(llm, vlm.tokenizer, args.chats, args.seed))
    train_stage(stage, **recipe, **common, vlm=vlm, llm=llm, llm_name=llm_name, vit_name=vit, start=start,
                records=records, texts=texts, workers=args.workers, lora=args.lora, projector=projector)


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
What does grafting cost, and what is it worth? Several recipes on the same images, from stage 1 to the scores.

    python -m studies.ablation                                  # table and plots of the results that are kept in assets/
    python -m studies.ablation --list                           # the recipes, and what each one shows
    python -m studies.ablation --run shipped direct --seed 0 1  # train, graft, evaluate; what is done is not done again
    python -m studies.ablation --run all --steps 200 600 --keep # the results join those in assets/ablation.json
    python -m studies.ablation --gradients runs/translator/translator.safetensors   # do they point where the full LLM's do?

Scores are of validation images, by which recipes may be chosen; the images of `graft.py --eval` stay unseen.
"""
import argparse
import dataclasses
import itertools
import json
import math
import platform
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graft
import train
from data.batches import Batches
from data.sources import CHATS, read_data
from extras import distillation
from formats import checkpoints, official
from formats.errors import UserError, run_cli
from formats.tokenizer import Tokenizer
from model import VLM, Llama
from recipes import SMALL, Recipe, check
from surrogate import load_surrogate

VALIDATION_SEED = 1000                                      # of split "test"; graft.EVAL_SEED is another stream
KEPT = checkpoints.ROOT / "assets" / "ablation.json"        # all results worth keeping, as a list

# ---------------------------------------------------------------------------------------------------------------------
# The recipes. They differ in the surrogate; stage 2 is the same in all


@dataclass(frozen=True)
class Route:
    """A way to a trained encoder: which surrogate stands in for the full LLM, and how its translators are trained."""
    says: str                               # what it shows, in one line
    ranges: tuple = ((20, 23), (24, 28))    # layers that one translator each replaces, ends included; (): the full LLM
    taught: str = "llm"                     # by "answers" (the paper's stage 1), by the full "llm" (extras/distillation.py),
    #                                         or None, where there is nothing to teach
    projector: bool = False                 # taught by answers: does the projector learn in stage 1, too?
    steps: int = 1200                       # of stage 1
    epochs: int = 4                         # taught by the LLM: how often stage 1 reads the same samples


ONE, ANSWERS = ((20, 28),), dict(taught="answers", steps=400, epochs=1)
RECIPES = {
    "paper": Route("the paper's stage 1: one translator, and with it the projector, learn from the answers", ONE,
                   projector=True, **ANSWERS),
    "answers": Route("two translators learn from the answers; the projector stays as stage 0 made it", **ANSWERS),
    "shipped": Route("two translators, taught by the full LLM: the shipped weights' recipe"),
    "short": Route("the same, taught on as many samples, but reading each only once", steps=300, epochs=1),
    "one": Route("one translator in place of the two", ONE),
    "cut-16": Route("an earlier cut, about where the LLM's prediction turns", ((16, 21), (22, 28))),
    "cut-18": Route("a cut between these two", ((18, 22), (23, 28))),
    "cut-23": Route("a late cut: one translator, and nearly the full LLM", ((23, 28),)),
    "direct": Route("no surrogate: the encoder learns through the full LLM", (), None, steps=0, epochs=0),
}


def find_route(name):
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def layers(ranges):
    """((20, 23), (24, 28)) -> "20-23,24-28"."""
    return ",".join(f"{first}-{last}" for first, last in ranges) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# From a recipe to its results


def prepare(about, llm):
    """What a stage works with: (the VLM that it starts from, its recipe, its batches). about: see train.plan."""
    kind = distillation.Recipe if "epochs" in about["recipe"] else Recipe
    recipe, vlm = kind(**about["recipe"]), train.build(about, llm.dtype, llm.device, llm=llm)
    samples, _ = read_data(about["stage"], about)
    return vlm, recipe, Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size)


def run_stage(about, out, llm):
    """Train a stage in the folder `out`, or go on with it, unless its checkpoint is finished. Returns what that says."""
    file, state = out / f"{about['stage']}.safetensors", out / "state.safetensors"
    was = checkpoints.open_checkpoint(file)[1] if file.exists() else about
    if odd := [f"{k} was {was.get(k)}, is {v}" for k, v in about.items() if was.get(k) != v]:
        raise UserError(f"{file} is of another run: {'; '.join(odd)}; give another --out, or delete it")
    if was.get("steps_done") != about["recipe"]["steps"]:
        vlm, recipe, batches = prepare(about, llm)
        if isinstance(recipe, distillation.Recipe):
            distillation.distill(vlm, llm, recipe, batches, out, about, state.exists())
        else:
            train.train(vlm, recipe, batches, out, about, state.exists())
        was = checkpoints.open_checkpoint(file)[1]
    state.unlink(missing_ok=True)                           # several times as large as the checkpoint
    return was


def flops(work):
    """(what work() returns, the FLOPs that it takes on the CPU). Attention runs as plain products: fused kernels count none."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as n:
        result = work()
    return result, n.get_total_flops()


def count_flops(about, llm, steps=3):
    """Training FLOPs of a stage, out of what `steps` of its steps take. Pictures and texts are data: free. llm: on the CPU."""
    vlm, recipe, batches = prepare(about, llm)
    train.trained_parameters(vlm, about["stage"], recipe.projector or about["stage"] != "translator")
    vlm.to(llm.dtype)
    once = each = 0                                         # what a sample takes once, and whenever it is read
    for batch in itertools.chain.from_iterable(batches[i] for i in range(steps)):
        loss = lambda: vlm.loss(batch)
        if isinstance(recipe, distillation.Recipe):
            lesson, n = flops(lambda: distillation.teach(vlm, llm, batch))
            once += n
            loss = lambda: sum(distillation.distillation_loss(vlm.decoder, llm, lesson))
        each += flops(lambda: loss().backward())[1]
    fresh = math.ceil(recipe.steps / getattr(recipe, "epochs", 1))
    return round((once * fresh + each * recipe.steps) / steps)


def evaluate(checkpoint, llm, samples, batch=8):
    """Rows of graft.compare on validation images; without "pair" where no surrogate took part."""
    about = checkpoints.open_checkpoint(checkpoint)[1]
    vlm = VLM.from_pretrained(llm, checkpoint, tokenizer=Tokenizer.from_pretrained(official.find(about["llm"])))
    return graft.compare(vlm, load_surrogate(llm, checkpoint) if about["ranges"] else None, samples, batch, seed=VALIDATION_SEED)


def translator_recipe(route, **how):
    """The numbers of stage 1."""
    how = dataclasses.asdict(SMALL["translator"]) | how | dict(steps=route.steps, projector=route.projector)
    return distillation.Recipe(**how | dict(epochs=route.epochs)) if route.taught == "llm" else Recipe(**how)


def run_recipe(name, seed=0, steps=200, samples=40, out="runs/ablation", vit="assets/vit.safetensors", llm=None,
               route=None, batch=16, text=CHATS, dtype="auto", device=None):
    """Train by a recipe, graft and evaluate. Returns the result, which is kept as OUT/NAME-STEPS-seedSEED.json.

    What is done is not done again, and what was interrupted goes on. Stage 1 has a folder of its own: a call with another
    number of `steps`, which are those of stage 2, begins with the same surrogate. route: a recipe of your own, by this name.
    samples: validation images a task. llm: path or name (default: that of `vit`). text: what stage 1 reads beside images.
    """
    route, out, device = route or find_route(name), Path(out), device or ("cuda" if torch.cuda.is_available() else "cpu")
    llm = llm or checkpoints.open_checkpoint(vit)[1].get("llm", official.DEFAULT_LLM)
    me = json.loads(json.dumps(dict(recipe=name, seed=seed, steps=steps, batch=batch, samples=samples, vit=str(vit), llm=llm,
                                    text=str(text), dtype=dtype, route=dataclasses.asdict(route))))
    file = out / f"{name}-{steps}-seed{seed}.json"
    known = official.read_json(file) if file.exists() else {}
    if known and all(known.get(k) == v for k, v in me.items()):
        return known

    precision = train.default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    full = Llama.from_pretrained(official.find(llm), precision, device)
    counter = full if full.device.type == "cpu" else Llama.from_pretrained(official.find(llm), train.default_dtype("cpu"))
    common, how = dict(llm=llm, seed=seed, data=None, images=None), dict(batch=batch, dtype=dtype)
    start, cost, seconds = str(vit), {}, {}
    for stage in ("translator", "encoder") if route.taught else ("encoder",):
        folder = out / (f"translator-{name}-seed{seed}" if stage == "translator" else f"encoder-{name}-{steps}-seed{seed}")
        if stage == "translator":
            recipe = translator_recipe(route, **how)
            about = train.plan(stage, check(recipe), init=start, replace=layers(route.ranges), text=str(text), **common)
        else:
            recipe = dataclasses.replace(SMALL["encoder"], steps=steps, **how)
            about = train.plan(stage, check(recipe), init=start, replace=None if route.taught else "none", text=None, **common)
        print(f"{name}, seed {seed}: stage {stage}, {recipe.steps} steps", flush=True)
        seconds[stage] = run_stage(about, folder, full)["seconds"]
        cost[stage] = count_flops(about, counter)
        start = str(folder / f"{stage}.safetensors")
    machine = torch.cuda.get_device_name(device) if full.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = dict(torch=torch.__version__, python=platform.python_version(), machine=machine, dtype=str(precision))
    return write_json(file, me | dict(flops=cost, seconds=seconds, versions=versions, rows=evaluate(start, full, samples)))


def write_json(file, content):
    checkpoints.write_whole(file, lambda part: part.write_text(json.dumps(content, indent=1)))
    return content


# ---------------------------------------------------------------------------------------------------------------------
# What a surrogate is worth before stage 2: would the full LLM send the same gradients?


def gradients(checkpoint, batches=4, batch=16, dtype=None, device="cpu"):
    """A surrogate against the full LLM, by the gradients of the loss on what stage 2 trains of ViT and projector.

    checkpoint: of stage translator or encoder. Returns {part: cosine between the two gradients}, and the loss per target of
    both, on `batches` batches of the world. An encoder that follows a surrogate of cosine 0 learns nothing for the LLM.
    """
    recipe = dataclasses.replace(SMALL["encoder"], batch=batch)
    about = train.plan("encoder", recipe, init=str(checkpoint), seed=VALIDATION_SEED, data=None, images=None, text=None)
    llm = Llama.from_pretrained(official.find(about["llm"]), dtype or train.default_dtype(device), device)
    vlm, _, samples = prepare(about, llm)
    parameters, surrogate = train.trained_parameters(vlm.to(llm.dtype), "encoder"), vlm.decoder
    parts, found, result = {"ViT": "encoder.", "projector": "adapter."}, {}, {}
    for system, decoder in (("surrogate", surrogate), ("LLM", llm)):
        vlm.decoder, total, n = decoder, 0.0, 0
        for step in range(batches):
            for b in samples[step]:
                loss = vlm.loss(b)
                loss.backward()
                total, n = total + loss.item(), n + train.count_targets([b])
        result[f"loss of the {system}"] = total / n
        for part, prefix in parts.items():
            found[system, part] = torch.cat([p.grad.flatten().float() for m, p in parameters.items() if m.startswith(prefix)])
        for p in parameters.values():
            p.grad = None
    return {part: torch.cosine_similarity(found["surrogate", part], found["LLM", part], 0).item() for part in parts} | result

"""
Train a vision encoder against the surrogate of an LLM: the paper's three stages.

    python train.py translator      # 1: train the surrogate's translator
    python train.py encoder         # 2: train projector and upper ViT through the frozen surrogate
    python graft.py --encoder runs/encoder/encoder.safetensors  # the graft: the same encoder, the full LLM, no training
    python train.py decoder         # 3 (optional): go on training the full LLM behind the grafted encoder

Every stage goes on from the one before, and every number of its recipe (recipes.py) can be changed: python train.py
encoder steps=600 lr=1e-4. Below: 1) what learns, 2) optimizer, 3) loop, 4) what a stage starts from, 5) command line.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import surrogate
from cli import MAX_SEED, Parser, UserError, check_out, number, printable, run_cli
from data.batches import Batches, shares
from data.sources import CHATS, read_data
from formats.checkpoints import ancestry, beside, checkpoint_file, held, load_checkpoint, open_checkpoint
from formats.log import Log, check_resume, check_start, same_file
from formats.official import find, llama_config
from formats.tokenizer import IMAGE, Tokenizer
from kernels import default_dtype
from model import VLM, Llama
from recipes import RECIPES, STAGES, TARGETS, help_text, override

# ---------------------------------------------------------------------------------------------------------------------
# 1. Which parameters a stage trains (paper, section 4)


def translator_parameters(decoder):
    """{name: parameter} of a surrogate's translators, named as in a VLM; all others are frozen."""
    decoder.requires_grad_(False)
    layers = {i: decoder.model.layers[i] for i in decoder.translators}
    return {f"decoder.model.layers.{i}.{n}": p.requires_grad_(True)
            for i, layer in layers.items() for n, p in layer.named_parameters()}


def trained_parameters(vlm, stage, vit_layers=0, distill=0):
    """{name: parameter} that a stage trains: these get gradients, all others are frozen.

    vit_layers: how many of the ViT learn; 0: the last third, 8 of CLIP-L's 24. distill: in stage 2, too, the
    translators learn (ours)."""
    L = vlm.encoder.config.num_hidden_layers
    prefixes = ["adapter.", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."]
    if stage == "translator" or distill:
        prefixes += [f"decoder.model.layers.{i}." for i in vlm.decoder.translators]
    if stage in ("encoder", "decoder"):
        prefixes += [f"encoder.vision_model.encoder.layers.{i}." for i in range(L - (vit_layers or max(1, L // 3)), L)]
    if stage == "decoder":
        prefixes += ["decoder."]
    vlm.requires_grad_(False)
    learns = {n: p for n, p in vlm.named_parameters() if n.startswith(tuple(prefixes))}
    if any(".lora_" in n for n in learns):                  # extras/lora.py: of the decoder, only its low-rank updates
        learns = {n: p for n, p in learns.items() if ".lora_" in n or not n.startswith("decoder.")}
    return {n: p.requires_grad_(True) for n, p in learns.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 2. The optimizer


def lr_at(step, recipe):
    """Linear warm-up, then a cosine to 0."""
    warmup = math.ceil(recipe.warmup * recipe.steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))


class Optimizer:
    """AdamW on float32 copies of the trained parameters, whatever the dtype in which the model computes.

    bfloat16 keeps 8 significant bits: most updates would be rounded away. Make this first, then cast the model.
    """

    def __init__(self, parameters, recipe, shares={}):
        """shares: {start of a name: learning rate in units of the recipe's}, where that is not 1."""
        self.parameters, self.recipe, self.step = parameters, recipe, 0
        self.master = {n: self.local(p).detach().float().clone() for n, p in parameters.items()}
        groups = {}
        for n, m in self.master.items():
            groups.setdefault(next((x for start, x in shares.items() if n.startswith(start)), 1.0), []).append(m)
        self.adam = torch.optim.AdamW([dict(params=ms, share=x) for x, ms in groups.items()], lr=recipe.lr,
                                      betas=(0.9, 0.999), weight_decay=0.0)

    @staticmethod
    def local(p):
        return p                                            # of a sharded parameter, extras/parallel.py takes its slice

    def gather(self):
        """Move the gradients from the parameters to the float32 copies: after every micro-batch."""
        for n, p in self.parameters.items():
            if p.grad is not None:
                grad, m = self.local(p.grad).float(), self.master[n]
                m.grad = grad if m.grad is None else m.grad + grad
                p.grad = None

    def norm(self):
        return get_total_norm([m.grad for m in self.master.values() if m.grad is not None])

    def update(self):
        """One step with the gradients gathered since the last. Returns the learning rate used."""
        norm, lr = self.norm(), lr_at(self.step, self.recipe)
        if not norm.isfinite():                             # nothing has been touched yet
            raise UserError(f"the gradient became {norm.item()} at step {self.step}: try a smaller lr "
                            "(checkpoints are intact)")
        clip_grads_with_norm_(self.master.values(), self.recipe.clip, norm)
        for group in self.adam.param_groups:
            group["lr"] = lr * group["share"]
        self.adam.step()
        self.adam.zero_grad()
        self.write_back()
        self.step += 1
        return lr

    @torch.no_grad()
    def write_back(self):
        for n, p in self.parameters.items():
            self.local(p).copy_(self.master[n])

    def weights(self):
        """{name: trained weight} in float32."""
        return dict(self.master)

    def state(self):
        """Everything that a resumed run needs, as flat named tensors."""
        adam = {f"adam.{n}.{k}": v for n, m in self.master.items() for k, v in self.adam.state.get(m, {}).items()}
        return {f"master.{n}": m for n, m in self.master.items()} | adam

    def read(self, name, tensor):
        """A tensor of the state of parameter `name`, as this process keeps it."""
        return tensor.to(self.master[name].device) if tensor.dim() else tensor

    def load_state(self, tensors, step):
        """tensors: {name: function that reads it}, as `state` named them."""
        saved = {n.removeprefix("master.") for n in tensors if n.startswith("master.")}
        if odd := sorted(saved ^ set(self.master)):
            raise UserError(f"the state to resume is of another run: {odd[0]} is trained in only one of the two")
        self.step = step
        for n, m in self.master.items():
            m.copy_(self.read(n, tensors[f"master.{n}"]()))
            keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam.{n}.{k}" in tensors]
            if len(keys) in (1, 2):
                raise KeyError(f"it lacks parts of adam.{n}")
            if keys:
                self.adam.state[m] = {k: self.read(n, tensors[f"adam.{n}.{k}"]()) for k in keys}
        self.write_back()


# ---------------------------------------------------------------------------------------------------------------------
# 3. The loop


class Solo:
    """The one process of an ordinary run. extras/parallel.py has the same for many."""
    Optimizer = Optimizer

    def __init__(self, device="cpu"):
        self.device, self.rank, self.world = device, 0, 1   # this process, its number, how many there are
        self.shard, self.mixed = None, False                # shards a decoder over them; mixes images and text

    def sum(self, x):
        """Sum a tensor over all processes."""
        return x

    def gathered(self, tensors):
        """Named tensors; sharded ones made whole, in the first process alone."""
        return dict(tensors)


def train(vlm, recipe, batches, out, about, resume=False, team=None, export=dict.items, llm=None):
    """Train what `about["stage"]` trains, through whatever decoder the VLM has. Returns the log: a dict a step.

    batches: see data.batches.Batches. about: what the run is, kept in every checkpoint. Into the folder `out` go
    STAGE.safetensors (what was trained), state.safetensors (for resume=True), log.csv and loss.png. export: trained
    weights -> the (name, tensor) pairs that are saved. llm: with recipe.distill, who teaches the translators.
    """
    stage, device, team = about["stage"], vlm.decoder.device, team or Solo(vlm.decoder.device)
    distill = recipe.distill if llm else 0
    learns = trained_parameters(vlm, stage, recipe.vit_layers, distill)
    translators = [p for n, p in learns.items() if n.startswith("decoder.")] if distill else []
    for p in translators:                                   # frozen, but for the lesson
        p.requires_grad_(False)
    rates = {"encoder.": recipe.vit_lr, "decoder.": recipe.distill_lr if distill else 1.0}      # in units of lr
    optimizer = team.Optimizer(learns, recipe, rates)
    vlm.to(vlm.decoder.dtype)
    log = Log(out, about, optimizer, team, resume, export)
    for step, micro_batches in zip(log.bar, batches.loader(log.steps, recipe.workers)):
        n = team.sum(torch.full((), count_targets(micro_batches), device=device))  # targets in the whole global batch
        total, lesson = torch.zeros((), device=device), torch.zeros((), device=device)
        noise = torch.Generator().manual_seed(about.get("seed", 0) * 10**6 + step)
        for batch in micro_batches:
            if distill and step % distill == 0:
                trunk, off = teach(vlm, llm, batch, translators, recipe.noise, noise, len(micro_batches))
                loss = vlm.decoder.loss(vlm.decoder.run(trunk, vlm.decoder.trunk), batch["targets"])
                lesson += off
            else:
                loss = vlm.loss(batch)
            (loss / n).backward()
            optimizer.gather()
            total += loss.detach() / n
        log.add(step, loss=team.sum(total), lr=optimizer.update(), targets=n, **({"lesson": lesson} if distill else {}))
    return log.close()


def teach(vlm, llm, batch, translators, noise, generator, parts=1):
    """Let the LLM teach the surrogate on the images as the encoder shows them: a gradient for the translators alone.

    Returns the output of the common trunk (B, T, C), from which the encoder's own loss goes on, and how far translators
    and LLM are apart (see surrogate.distillation_loss), divided by `parts`, the micro-batches of the step. There is
    noise on the visual tokens, so that the translators follow the LLM in the neighborhood, too: a gradient depends on
    more than one point.
    """
    s, tokens = vlm.decoder, batch["tokens"]
    x = vlm.embed(tokens, batch["pixels"])                                              # (B, T, C)
    size = noise * torch.rand(len(tokens), 1, 1, generator=generator) * (tokens == IMAGE)[..., None]    # (B, T, 1)
    off = size * F.normalize(torch.randn(x.shape, generator=generator), dim=-1)         # (B, T, C)
    words = s.as_words(torch.zeros_like(x[:1, :1]))                                     # (1, 1, C): the words' mean
    length = (x.detach() - words).norm(dim=-1, keepdim=True)                            # (B, T, 1)
    trunk = s.run(x + off.to(x) * length, 0, s.trunk)
    for p in translators:
        p.requires_grad_(True)
    lesson = sum(surrogate.distillation_loss(s, llm, surrogate.teacher_states(s, llm, trunk.detach(), batch))) / parts
    lesson.backward()
    for p in translators:                                   # frozen again, for the encoder's loss
        p.requires_grad_(False)
    return trunk, lesson.detach()


def count_targets(micro_batches):
    return max(1, sum(int((b["targets"] >= 0).sum()) for b in micro_batches))


# ---------------------------------------------------------------------------------------------------------------------
# 4. What a stage starts from


def dtype_of(recipe, device):
    return default_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def starting_point(stage, target, init=None):
    """What a stage goes on from: what is named, else runs/ of the stage before, else the shipped; None: CLIP alone."""
    if init:
        return None if init == "none" else init
    if stage == "translator":
        return None                                         # the paper starts with CLIP
    before = {"encoder": "translator", "decoder": "encoder"}[stage]
    mine, shipped = Path(f"runs/{before}/{before}.safetensors"), f"assets/{before}.safetensors"
    return str(mine) if mine.exists() or target is not TARGETS["small"] else shipped


def plan(stage, recipe, name="small", llm=None, vit=None, init=None, replace=None, seed=0, data=None, images=None,
         text=None):
    """What a run is, before anything heavy is read: `about`, its checkpoints' metadata. UserError if it cannot be."""
    target = TARGETS[name]
    start = starting_point(stage, target, init)
    was = open_checkpoint(start)[1] if start else {}
    llm = llm or was.get("llm", target.llm)
    if not same_file(was.get("llm", llm), llm):
        raise UserError(f"{start} was trained for {was['llm']}, not for {llm}: "
                        "give another checkpoint, or none, as --init")
    if was.get("stage") == "llava":
        raise UserError(f"{start} is a whole LLaVA, which is here to be asked, not to be trained further")
    if was.get("stage") == "decoder" and stage != "decoder":
        raise UserError(f"{start} is of stage decoder, which trained the full LLM: no surrogate belongs to it")
    given = "auto" if replace == "auto" else surrogate.parse_ranges(replace) if replace is not None else None
    if stage == "decoder" and replace is not None:
        raise UserError("--replace: stage decoder trains the full LLM, of which nothing is replaced")
    if stage == "translator" and given == []:
        raise UserError("--replace none: without a surrogate there is no translator to train; "
                        "stage encoder can do without")
    if stage == "decoder" or given == []:
        ranges = []
    elif was.get("ranges") and (given is None or given == [tuple(r) for r in was["ranges"]]):
        ranges = was["ranges"]                              # go on with the translators of the start
    elif stage == "encoder":
        raise UserError(f"{start or 'a new projector'} holds no translator for these layers: "
                        "run `python train.py translator` first and give its checkpoint as --init, "
                        "or train on the full LLM with --replace none")
    else:       # the recipe's cut is for its own LLM, wherever that lies; another one gets that of its own trajectory
        theirs = llama_config(Path(llm))["num_hidden_layers"] if Path(llm).exists() else None
        same = llm == target.llm or theirs == target.llm_config.num_hidden_layers
        ranges = given or (target.ranges if same else "auto")
        if ranges != "auto" and (same or theirs):
            ranges = surrogate.check_ranges(ranges, target.llm_config.num_hidden_layers if same else theirs)
    own = was.get("vit", "")                                # the ViT that the start goes on with, if it has one
    if was.get("stage") == "vit":
        own = str(checkpoint_file(start))
    elif Path(own).suffix == ".safetensors":
        own = str(beside(own, start))       # where it lies now: a shipped or shared file may name that of another run
    if vit and Path(own).suffix == ".safetensors" and Path(vit).resolve() != Path(own).resolve():
        raise UserError(f"--vit {vit}: {start} goes on with another ViT, {own}: for a new projector give --init none")
    mine = target is TARGETS["small"] and Path("runs/vit/vit.safetensors").exists()
    vit = vit or own or ("runs/vit/vit.safetensors" if mine else target.vit)
    about = dict(stage=stage, llm=llm, vit=str(vit), ranges=ranges, start=start, seed=seed,
                 recipe=dataclasses.asdict(recipe), data=data, images=images, text=text)
    return json.loads(json.dumps(about))


def build(about, dtype, device, shard=None, llm=None):
    """The VLM of a run, with the weights that it starts from; its decoder: the surrogate, without ranges the full LLM.
    A new translator is a copy of the first layer that it stands for. Of the LLM only the layers that are kept are read,
    unless it is there already (llm): then the surrogate shares them."""
    path, start, ranges = find(about["llm"]), about["start"], about["ranges"]
    was = open_checkpoint(start)[1] if start else {}
    if ranges == "auto" or not ranges:
        llm = llm or Llama.from_pretrained(path, dtype, device, shard=shard)
    if ranges == "auto":
        about["ranges"] = ranges = surrogate.choose_ranges(llm, Tokenizer.from_pretrained(path))
    if not ranges:
        decoder = llm
    elif llm:
        decoder = surrogate.build_surrogate(llm, ranges)
    else:
        decoder = surrogate.from_pretrained(path, ranges, dtype, device, shard)
    if ranges and ranges == was.get("ranges"):
        surrogate.load_translators(decoder, start)
    vlm = VLM.untrained(about["vit"], decoder, Tokenizer.from_pretrained(path), about["recipe"]["like_words"],
                        about["seed"])
    vlm.to(device)                                          # before the decoder: float32 till the optimizer has copies
    if start:
        for _, tensors, was in ancestry(start):         # of translators trained alone, the rest is the stage before's
            if not all(n.startswith("decoder.") for n in tensors):
                break
        needs = held(was, tensors, vlm.encoder.config.num_hidden_layers)
        # stage 3 goes on with a whole decoder; the translators of other files have been loaded above
        keep = about["stage"] == "decoder" and "decoder.model.embed_tokens.weight" in tensors
        tensors = {n: t for n, t in tensors.items() if keep or not n.startswith("decoder.")}
        load_checkpoint(vlm, tensors, start, decoder.place, needs)
    return vlm


# ---------------------------------------------------------------------------------------------------------------------
# 5. Command line


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("stage", choices=STAGES, help="which stage to run")
    add("settings", nargs="*", metavar="key=value", help="changes a setting of the recipe, see below")
    add("--recipe", default="small", choices=list(RECIPES), help="LLM, ViT, layers and numbers (default: %(default)s)")
    add("--llm", help="target LLM: folder, .gguf file or hub name (default: the recipe's)")
    add("--vit", help="ViT: a checkpoint of extras/vit.py, or a CLIP folder or hub name (default: that of --init)")
    add("--init", help="checkpoint to go on from; none: new projector (default: the stage before, in runs/ or assets/)")
    add("--replace", help="layers that translators replace, e.g. 16-26, or 20-23,24-28 by two translators; auto: from "
        "the prediction's turn on; none: train on the full LLM (default: those of --init, else the recipe's for its "
        "own LLM, auto for any other)")
    add("--data", help="LLaVA-format JSON in place of the drawn world")
    add("--images", default=".", help="folder of the images that --data names (default: %(default)s)")
    add("--text", help="stage translator: JSON of text instructions (default: assets/chats.json, which the LLM wrote)")
    add("--on-bad-record", default="stop", choices=["stop", "skip"], help="stop at it or go on (default: %(default)s)")
    add("--out", help="folder for checkpoint, log and plot (default: runs/STAGE)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, exactly as if never stopped")
    add("--seed", type=number(int, 0, MAX_SEED), default=0,
        help="of the order and contents of the samples (default: %(default)s)")
    parser.add_device()
    stage, name = (next((s for s in names if s in argv), names[0]) for names in (STAGES, list(RECIPES)))
    parser.epilog = f"key=value, with the values of {name}, stage {stage}:\n{help_text(RECIPES[name][stage])}"
    return parser.parse_intermixed_args(argv)


def main(argv=None, team=None, prepare=lambda vlm, about: None, export=lambda weights, vlm: weights.items()):
    """For extras/parallel.py: the team of processes; what changes the model before training; weights before saving."""
    args = parse(sys.argv[1:] if argv is None else argv)
    stage, small, team = args.stage, args.recipe == "small", team or Solo(args.device)
    once = ["steps=0"] if args.data and small else []       # without a number of steps, all records once
    recipes = RECIPES[args.recipe]
    direct = stage == "encoder" and args.replace == "none" and "direct" in recipes
    recipe = override(recipes["direct" if direct else stage], once + args.settings)
    if args.text and stage != "translator":
        reads = "images alone" if stage == "encoder" else "what --data holds"
        raise UserError(f"--text is for stage translator: stage {stage} reads {reads}")
    if not small and (not args.data or stage == "translator" and not args.text):
        raise UserError(f"the recipe {args.recipe} learns from photographs: give LLaVA's JSON as --data, its folder as "
                        "--images" + (", and a JSON of text instructions as --text" if stage == "translator" else ""))
    text = args.text or (CHATS if stage == "translator" else None)
    about = plan(stage, recipe, args.recipe, args.llm, args.vit, args.init, args.replace, args.seed,
                 data=args.data, images=args.images if args.data else None, text=text)
    out = args.out or f"runs/{stage}"
    check_out(out)
    check_start(about, out)
    about = check_resume(out, about) if args.resume else about
    shares(recipe, team.world)
    samples, n = read_data(stage, about, args.on_bad_record)
    if recipe.steps == 0:
        if n is None:
            raise UserError("steps=0 reads all records once, and drawn images have no end: give a number of steps")
        recipe = dataclasses.replace(recipe, steps=max(1, n // recipe.batch))
    if team.rank == 0:
        text = f"stage {stage}: goes on from {about['start'] or 'a new projector over ' + about['vit']}, trains for "
        text += about["llm"] + (f" with the layers {about['ranges']} replaced" if about["ranges"] else "")
        print(printable(text))
    dtype, llm = dtype_of(recipe, team.device), None
    if stage == "encoder" and recipe.distill and about["ranges"]:
        if team.world > 1:
            raise UserError("distill: the LLM teaches in one process alone; in several, give distill=0")
        llm = Llama.from_pretrained(find(about["llm"]), dtype, team.device)     # beside the surrogate, which shares it
    vlm = build(about, dtype, team.device, team.shard, llm)
    prepare(vlm, about)
    if recipe.checkpointing:
        vlm.decoder.checkpointed = range(len(vlm.decoder.model.layers))
    batches = Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size,
                      team.rank, team.world, team.mixed)
    train(vlm, recipe, batches, out, about, args.resume, team, lambda weights: export(weights, vlm), llm)


if __name__ == "__main__":
    sys.exit(run_cli(main))

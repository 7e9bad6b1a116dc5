"""
Train a vision encoder against the surrogate of an LLM: the paper's three stages.

    python train.py translator      # 1: train the surrogate's translator
    python train.py encoder         # 2: train projector and upper ViT through the surrogate
    python graft.py --encoder runs/encoder/encoder.safetensors  # the graft: the same encoder, the full LLM, no training
    python train.py decoder         # 3 (optional): train the full LLM, too, behind the grafted encoder

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
from torch.nn.utils import get_total_norm

import surrogate
from cli import Parser, UserError, check_out, printable, run_cli
from data.batches import Batches, shares
from data.sources import CHATS, read_data
from formats.checkpoints import ancestry, beside, checkpoint_file, held, load_checkpoint, open_checkpoint
from formats.official import find
from formats.tokenizer import IMAGE, Tokenizer
from kernels import default_dtype
from log import Log, check_resume, check_start, over_processes, process, same_file
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

    Of the ViT the upper layers learn: they turn edges and textures into what the image shows, which is what the LLM
    has to be told; the lower ones are general, and training them would cost a backward pass through all of it.
    vit_layers: how many learn; 0: the last third, 8 of CLIP-L's 24. distill: in stage 2, too, the translators learn
    (ours)."""
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
# 2. The optimizer's step


def lr_at(step, recipe, falls=True):
    """Linear warm-up, then a cosine to 0, or with falls=False the same rate to the end."""
    warmup = math.ceil(recipe.warmup * recipe.steps)
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.steps - warmup)))
    return recipe.lr * (cosine if falls else 1.0)


def adamw(learns, recipe, rates={}, constant=()):
    """AdamW over named parameters. rates: {start of a name: its learning rate in units of the recipe's}, if not 1;
    constant: starts of the names whose rate does not fall."""
    groups = {}
    for n, p in learns.items():
        scale = next((x for start, x in rates.items() if n.startswith(start)), 1.0)
        groups.setdefault((scale, not n.startswith(constant)), []).append(p)
    return torch.optim.AdamW([dict(params=ps, scale=scale, falls=falls) for (scale, falls), ps in groups.items()],
                             lr=recipe.lr, betas=(0.9, 0.999), weight_decay=0.0)


def clip(parameters, limit, step):
    """Add the gradients of all processes up, and scale them so that the norm of them all is at most `limit`.

    A sharded gradient (FSDP) is the mean over the processes already: here it becomes the sum."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    whole = [over_processes(g) for g in gradients if not hasattr(g, "full_tensor")]
    sharded = [g.mul_(process()[1]) for g in gradients if hasattr(g, "full_tensor")]
    norm = get_total_norm(whole)
    if sharded:
        norm = torch.stack([norm, get_total_norm(sharded).full_tensor()]).norm()
    if not norm.isfinite():                                 # no weight has been touched yet
        raise UserError(f"the gradient became {norm.item()} at step {step}: try a smaller lr (checkpoints are intact)")
    scale = (limit / (norm + 1e-6)).clamp(max=1).item()
    for g in gradients:
        g *= scale


def update(optimizer, recipe, step):
    """One step with the gradients that are there. Returns the learning rate used."""
    for group in optimizer.param_groups:
        group["lr"] = group["scale"] * lr_at(step, recipe, group["falls"])
    clip([p for group in optimizer.param_groups for p in group["params"]], recipe.clip, step)
    optimizer.step()
    optimizer.zero_grad()
    return lr_at(step, recipe)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The loop


def set_dtypes(model, decoder, learns):
    """What learns becomes float32; the frozen rest, and the stream, get the dtype of the decoder as it was loaded.

    bfloat16 has 8 significant bits: most updates of a weight would be rounded away. (model.py casts the weights.)"""
    dtype, learned = decoder.dtype, {id(p) for p in learns.values()}
    decoder.activation_dtype = dtype
    for layer in decoder.model.layers:                      # as a module: one that is sharded has to take notice
        layer.to(torch.float32 if all(id(p) in learned for p in layer.parameters()) else dtype)
    for p in model.parameters():
        if not hasattr(p, "full_tensor"):
            p.data = p.data.to(torch.float32 if id(p) in learned else dtype)


def train(vlm, recipe, batches, out, about, resume=False, llm=None, saved=dict.items):
    """Train what `about["stage"]` trains, through whatever decoder the VLM has. Returns the log: a dict a step.

    batches: see data.batches.Batches. about: what the run is, noted in every checkpoint. Into the folder `out` go
    STAGE.safetensors (what was trained), state.safetensors (for resume=True), log.csv and loss.png. llm: with
    recipe.distill, who teaches the translators. saved: trained weights -> the (name, tensor) pairs that are saved.
    """
    distill = recipe.distill if llm else 0
    learns = trained_parameters(vlm, about["stage"], recipe.vit_layers, distill)
    set_dtypes(vlm, vlm.decoder, learns)
    translators = [p for n, p in learns.items() if n.startswith("decoder.")] if distill else []
    for p in translators:                                   # known to the optimizer, but only `teach` may reach them
        p.requires_grad_(False)
    rates = {"encoder.": recipe.vit_lr, "decoder.": recipe.distill_lr if distill else 1.0}      # in units of lr
    # the encoder moves to the end, so the translators have to follow to the end: their rate does not fall
    optimizer = adamw(learns, recipe, rates, constant=("decoder.",) if distill else ())
    log = Log(out, about, learns, optimizer, recipe, resume, saved)
    for step, micro_batches in zip(log.bar, batches.loader(log.steps, recipe.workers)):
        n_targets = torch.full((), count_targets(micro_batches), device=vlm.decoder.device)
        n_targets = over_processes(n_targets)               # in the whole global batch
        distilling = distill and step % distill == 0
        total, distance = torch.zeros(2, device=vlm.decoder.device)
        generator = torch.Generator().manual_seed(about.get("seed", 0) * 10**6 + step)      # of the noise
        if recipe.balance:
            balance(micro_batches, recipe.balance, vlm.tokenizer.turn_end, vlm.decoder.device)
        for batch in micro_batches:
            trunk = None
            if distilling:
                trunk, part = teach(vlm, llm, batch, translators, recipe.noise, generator, len(micro_batches))
                distance += part
            loss = vlm.loss(batch, trunk) / n_targets
            loss.backward()
            total += loss.detach()
        for p in learns.values():                           # so that all processes have the same gradients to add up
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)
        lr = update(optimizer, recipe, step)
        columns = dict(distance=distance if distilling else "") if distill else {}
        log.add(step, loss=over_processes(total), lr=lr, targets=n_targets, **columns)
    return log.close()


def teach(vlm, llm, batch, translators, noise, generator, parts=1):
    """Distill the LLM into the translators, on the images as the encoder shows them. Only the translators get a
    gradient.

    Returns the output of the shared layers (B, T, C), computed from visual tokens with noise, from which the encoder's
    own loss goes on, and the distillation loss, divided by `parts`, the micro-batches of the step. The noise makes the
    translators match the LLM around each visual token and not only at it, so that their gradients match, too.
    """
    s, tokens = vlm.decoder, batch["tokens"]
    x = vlm.embed(tokens, batch["pixels"])                                              # (B, T, C)
    size = noise * torch.rand(len(tokens), 1, 1, generator=generator) * (tokens == IMAGE)[..., None]    # (B, T, 1)
    shift = size * F.normalize(torch.randn(x.shape, generator=generator), dim=-1)       # (B, T, C)
    mean, _ = s.word_statistics()                                                       # (C,)
    length = (x.detach() - mean).norm(dim=-1, keepdim=True)                             # (B, T, 1) float32
    trunk = s.run(x + (shift.to(length) * length).to(x), 0, s.n_shared)
    for p in translators:
        p.requires_grad_(True)
    states = surrogate.teacher_states(s, llm, trunk.detach(), batch)
    kl, distance = surrogate.distillation_loss(s, states)
    loss = (kl + distance) / parts
    loss.backward()
    for p in translators:                                   # frozen again, for the encoder's loss
        p.requires_grad_(False)
    return trunk, loss.detach()


def count_targets(micro_batches):
    return max(1, sum(int((b["targets"] >= 0).sum()) for b in micro_batches))


def balance(micro_batches, exponent, turn_end, device):
    """Give each target a factor in the loss: the paper's dynamic loss weights (appendix A.7; in the authors' code
    `_calc_loss_weights_with_batchmean` of src/methods/engine_ar_instruction_llama.py), by which short turns about an
    image count for more than their length.

    A target in a turn of n targets has the factor (log(N + 1) / log(n + 1)) ** exponent, where N is the most targets of
    a turn in the global batch; without an image it is 1. turn_end: the tokens that end a turn.
    """
    sizes = [turn_sizes(b["targets"], turn_end) * (b["tokens"] == IMAGE).any(1, keepdim=True) for b in micro_batches]
    longest = torch.tensor(max([1.0, *(n.max().item() for n in sizes)]), device=device)
    longest = over_processes(longest, "MAX").cpu()
    for batch, n in zip(micro_batches, sizes):                                          # n: (B, T)
        batch["factors"] = torch.where(n > 0, (longest.log1p() / n.clamp(min=1).log1p()) ** exponent, 1.0)


def turn_sizes(targets, turn_end):
    """For every position of targets (B, T): how many targets its turn has, up to and with the token that ends it."""
    sizes = torch.zeros_like(targets)
    for row, size in zip(targets, sizes):
        ends = (torch.isin(row, torch.tensor(turn_end)).nonzero()[:, 0] + 1).tolist()
        for start, stop in zip([0, *ends], [*ends, len(row)]):
            size[start:stop] = (row[start:stop] >= 0).sum()
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# 4. What a stage starts from


def dtype_of(recipe, device):
    return default_dtype(device) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)


def before(stage, name):
    """The checkpoint that a stage goes on from where none is named: the stage before's, in runs/, else the shipped.
    None: stage 1 starts with a pre-trained ViT alone, in the paper CLIP."""
    if stage == "translator":
        return None
    last = STAGES[STAGES.index(stage) - 1]
    own, shipped = Path(f"runs/{last}/{last}.safetensors"), f"assets/{last}.safetensors"
    return str(own) if own.exists() or name != "small" else shipped


def plan(stage, recipe, name="small", llm=None, vit=None, init=None, replace=None, direct=False, seed=0, data=None,
         images=None, text=None):
    """What a run is, before anything heavy is read: `about`, its checkpoints' metadata. UserError if it cannot be.

    Stage 1 settles the surrogate: its `ranges` are given, or the recipe's for its own LLM; for another LLM they are
    None until `build` has measured its trajectory. Later stages find them in the checkpoint that they go on from.
    """
    target = TARGETS[name]
    if init == "none" or direct and not init:
        start = None                                        # a new projector
    else:
        start = init or before(stage, name)
    parent = open_checkpoint(start)[1] if start else {}
    llm = llm or parent.get("llm", target.llm)
    if not same_file(parent.get("llm", llm), llm):
        raise UserError(f"{start} was trained for {parent['llm']}, not for {llm}: "
                        "give another checkpoint, or none, as --init")
    if parent.get("stage") == "llava":
        raise UserError(f"{start} is a whole LLaVA, which is here to be asked, not to be trained further")
    if parent.get("stage") == "decoder" and stage != "decoder":
        raise UserError(f"{start} is of stage decoder, which trained the full LLM: no surrogate belongs to it")
    if replace is not None and stage != "translator":
        raise UserError("--replace: stage translator settles the surrogate; stage encoder reads it in its --init "
                        "(or trains through the full LLM: --direct), stage decoder trains the full LLM")
    ranges = [] if replace is None else surrogate.parse_ranges(replace)
    if replace is not None and not ranges:
        raise UserError("--replace none: without a surrogate there is no translator to train")
    if stage == "translator":
        own = llm == target.llm or name != "small"          # the recipe's cut is for its own LLM, wherever that lies
        ranges = ranges or parent.get("ranges") or (target.ranges if own else None)
        if own:
            ranges = surrogate.check_ranges(ranges, target.llm_config.num_hidden_layers)
    elif stage == "encoder" and not direct:
        ranges = parent.get("ranges")
        if not ranges:
            raise UserError(f"{start or 'a new projector'} holds no translator: run `python train.py translator` first "
                            "and give its checkpoint as --init, or train on the full LLM with --direct")
    about = dict(stage=stage, llm=llm, vit=vit_of(start, parent, vit, target), ranges=ranges, start=start, seed=seed,
                 recipe=dataclasses.asdict(recipe), data=data, images=images, text=text)
    return json.loads(json.dumps(about))            # as a checkpoint's metadata gives it back: lists, not tuples


def vit_of(start, parent, vit, target):
    """The ViT that a run goes on with: that of its start, whose metadata is `parent`, if it has one."""
    own = parent.get("vit", "")
    if parent.get("stage") == "vit":
        own = str(checkpoint_file(start))
    elif Path(own).suffix == ".safetensors":
        own = str(beside(own, start))       # where it lies now: a shipped or shared file may name that of another run
    if vit and Path(own).suffix == ".safetensors" and Path(vit).resolve() != Path(own).resolve():
        raise UserError(f"--vit {vit}: {start} goes on with another ViT, {own}: for a new projector give --init none")
    trained = target is TARGETS["small"] and Path("runs/vit/vit.safetensors").exists()
    return str(vit or own or ("runs/vit/vit.safetensors" if trained else target.vit))


def load_teacher(about, dtype, device):
    """The full LLM, if this run wants it beside the surrogate; else None."""
    if about["stage"] != "encoder" or not about["recipe"]["distill"] or not about["ranges"]:
        return None
    if process()[1] > 1:
        raise UserError("distill: the LLM teaches in one process alone; in several, give distill=0")
    return Llama.from_pretrained(find(about["llm"]), dtype, device)     # the surrogate shares its layers


def build(about, dtype, device, shard=None, llm=None):
    """The VLM of a run, with the weights that it starts from; its decoder: the surrogate, without ranges the full LLM.
    A new translator is a copy of the first layer that it stands for. Of the LLM only the layers that stay are read,
    unless it is there already (llm): then the surrogate shares them. shard: see model.py."""
    path, start = find(about["llm"]), about["start"]
    tokenizer = Tokenizer.from_pretrained(path)
    if about["ranges"] is None:
        llm = llm or Llama.from_pretrained(path, dtype, device, shard=shard)
        about["ranges"] = surrogate.choose_ranges(llm, tokenizer)
    ranges = about["ranges"]
    if llm:
        decoder = surrogate.build_surrogate(llm, ranges) if ranges else llm
    else:
        decoder = surrogate.from_pretrained(path, ranges, dtype, device, shard)
    vlm = VLM.untrained(about["vit"], decoder, tokenizer, about["recipe"]["like_words"], about["seed"]).to(device)
    if not start:
        return vlm
    if ranges and ranges == open_checkpoint(start)[1].get("ranges"):
        surrogate.load_translators(decoder, start)
    # a checkpoint of translators alone has projector and ViT in the one that it started from
    for file, tensors, parent in ancestry(start):
        if not all(n.startswith("decoder.") for n in tensors):
            break
    needs = held(parent, tensors, vlm.encoder.config.num_hidden_layers)
    # stage 3 goes on with a whole decoder; the translators of other files have been loaded above
    whole = about["stage"] == "decoder" and "decoder.model.embed_tokens.weight" in tensors
    tensors = {n: t for n, t in tensors.items() if whole or not n.startswith("decoder.")}
    load_checkpoint(vlm, tensors, file, needs)
    return vlm


# ---------------------------------------------------------------------------------------------------------------------
# 5. Command line


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("stage", choices=STAGES, help="which stage to run")
    add("--recipe", default="small", choices=list(RECIPES), help="LLM, ViT, layers and numbers (default: %(default)s)")
    add("--llm", help="target LLM: folder, .gguf file or hub name (default: the recipe's)")
    add("--vit", help="ViT: a checkpoint of extras/vit.py, or a CLIP folder or hub name (default: that of --init)")
    add("--init", help="checkpoint to go on from; none: new projector (default: the stage before, in runs/ or assets/)")
    add("--replace", help="stage translator: layers to replace, e.g. 16-26, or 20-23,24-28 by two translators "
        "(default: those of --init, else the recipe's for its own LLM, for any other from the prediction's turn on)")
    add("--direct", action="store_true", help="stage encoder: train through the full LLM in place of a surrogate")
    add("--data", help="LLaVA-format JSON in place of the drawn world")
    add("--images", default=".", help="folder of the images that --data names (default: %(default)s)")
    add("--text", help="stage translator: JSON of text instructions (default: assets/chats.json, which the LLM wrote)")
    add("--on-bad-record", default="stop", choices=["stop", "skip"], help="stop at it or go on (default: %(default)s)")
    parser.add_run("runs/STAGE")
    parser.set_defaults(out=None)           # `prepare` puts in the stage
    words = " ".join(argv).replace("=", " ").split()
    stage, name = (next((s for s in names if s in words), names[0]) for names in (STAGES, list(RECIPES)))
    parser.epilog = f"key=value, with the values of {name}, stage {stage}:\n{help_text(RECIPES[name][stage])}"
    return parser.parse_intermixed_args(argv)


def prepare(args):
    """What the options ask for, checked: (about, recipe, samples)."""
    stage, small = args.stage, args.recipe == "small"
    once = ["steps=0"] if args.data and small else []       # without a number of steps, all records once
    recipes = RECIPES[args.recipe]
    if args.direct and stage != "encoder":
        raise UserError("--direct is for stage encoder: stage decoder trains the full LLM anyway")
    recipe = override(recipes["direct" if args.direct and "direct" in recipes else stage], once + args.settings)
    if args.text and stage != "translator":
        reads = "images alone" if stage == "encoder" else "what --data holds"
        raise UserError(f"--text is for stage translator: stage {stage} reads {reads}")
    if not small and (not args.data or stage == "translator" and not args.text):
        raise UserError(f"the recipe {args.recipe} learns from photographs: give LLaVA's JSON as --data, its folder as "
                        "--images" + (", and a JSON of text instructions as --text" if stage == "translator" else ""))
    text = args.text or (CHATS if stage == "translator" else None)
    about = plan(stage, recipe, args.recipe, args.llm, args.vit, args.init, args.replace, args.direct, args.seed,
                 data=args.data, images=args.images if args.data else None, text=text)
    args.out = args.out or f"runs/{'direct' if args.direct else stage}"
    check_out(args.out)
    check_start(about, args.out)
    about = check_resume(args.out, about) if args.resume else about
    shares(recipe, process()[1])
    samples, n = read_data(stage, about, args.on_bad_record)
    if recipe.steps == 0:
        if n is None:
            raise UserError("steps=0 reads all records once, and drawn images have no end: give a number of steps")
        recipe = dataclasses.replace(recipe, steps=max(1, n // recipe.batch))
    return about, recipe, samples


def run(args, shard=None, change=lambda vlm, about: {}):
    """Do what the options ask for. shard, change: for extras/parallel.py, which shards the decoder's layers, or changes
    the VLM before training, and then returns options of `train`."""
    about, recipe, samples = prepare(args)
    text = f"stage {args.stage}: goes on from {about['start'] or 'a new projector over ' + about['vit']}, trains for "
    text += about["llm"] + (f" with the layers {about['ranges']} replaced" if about["ranges"] else "")
    if process()[0] == 0:
        print(printable(text))
    dtype = dtype_of(recipe, args.device)
    llm = load_teacher(about, dtype, args.device)
    vlm = build(about, dtype, args.device, shard, llm)
    options = change(vlm, about)
    if recipe.checkpointing:
        vlm.decoder.checkpointed = range(len(vlm.decoder.model.layers))
    batches = Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size, *process(),
                      mixed=bool(shard))
    return train(vlm, recipe, batches, args.out, about, args.resume, llm, **options)


def main(argv=None):
    run(parse(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(run_cli(main))

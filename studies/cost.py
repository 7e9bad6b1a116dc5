"""
The paper's size, on paper: what every stage trains, computes and needs for Llama-3.2-3B, 3.1-8B and 3.1-70B, and what
the surrogate saves. Only arithmetic on sizes: it needs no weights, no data and no GPU.

    python -m studies.cost                                              # three routes to a VLM, and a plot of them
    python -m studies.cost --memory                                     # which stage fits on which GPUs: tables
    python -m studies.cost encoder --recipe llama-3.1-8b --gpus 8       # the plan of a stage
    python -m studies.cost decoder --recipe llama-3.1-70b --gpus 32 --fsdp micro_batch=2
"""
import itertools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

from cli import Parser, UserError, check_out_file, number, run_cli, write_whole
from data.batches import shares
from recipes import RECIPES, STAGES, TARGETS, help_text, override

# ---- 1. What the paper has beside its recipes (recipes.py): a baseline, the data, the hours --------------------------

PAPER = [name for name in TARGETS if name.startswith("llama")]
PLANS = (*STAGES, "adapter")        # adapter: the baseline's first stage, the projector alone through the full LLM
HOURS_70B = {"surrogate": {"translator": 9.36, "encoder": 4.25, "decoder, 20 %": 5.56},
             "full decoder": {"adapter": 7.01, "decoder": 27.78}}
LORA_RANK = 8                       # as in the paper's code
PEAK, UTILIZATION = 989e12, 0.4     # FLOP/s of an H100 in dense bf16, and the part of it that training gets (assumed)

# Data: (samples, tokens of text in each, targets among them). The lengths are estimates: see docs/real-size.md.
IMAGES = {"answers+special": (624_610, 220, 115), "answers": (624_610, 220, 85)}        # by recipe.loss_on
SHAREGPT, GENQA, NOTHING = (40_688, 850, 540), (500_000, 400, 300), (0, 0, 0)
TEXTS = {"translator": GENQA, "encoder": NOTHING, "decoder": SHAREGPT, "adapter": NOTHING}


def recipe_of(stage, name):
    """The paper's recipe of a stage. `adapter` reads LLaVA's images once, and else trains as `translator` does."""
    recipe = RECIPES[name]["translator" if stage == "adapter" else stage]
    return replace(recipe, steps=math.ceil(IMAGES[recipe.loss_on][0] / recipe.batch)) if stage == "adapter" else recipe


# ---- 2. Parameters (target, recipe: a Target and a Recipe of recipes.py; lora: its rank, 0 for none) -----------------


def sizes_of(stage, target, recipe, lora=0):
    """The sizes that all formulas share."""
    c, v = target.llm_config, target.vit_config
    ranges = target.ranges if stage in ("translator", "encoder") else ()
    d, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    upper = recipe.vit_layers or max(1, v.num_hidden_layers // 3)       # of CLIP-L's 24 layers 8 are trained
    return SimpleNamespace(
        c=c, v=v, d=d, q=q, kv=kv, M=c.intermediate_size, C=v.hidden_size,
        layers=c.num_hidden_layers - sum(last - first for first, last in ranges), translators=len(ranges),
        trunk=min((first for first, _ in ranges), default=c.num_hidden_layers),         # before the first translator
        whole=stage == "decoder" and not lora,                                          # all of the LLM is trained
        upper=upper if stage in ("encoder", "decoder") else 0,
        matrices=2 * d * (q + kv) + 3 * d * c.intermediate_size,        # of a layer: q and o, k and v; the MLP's three
        low_rank=lora * (2 * d + q + kv))                               # of a layer's q and v: rank x (in + out) each


def trained_and_frozen(stage, target, recipe, lora=0):
    """{part: (trained, frozen) parameters} of the VLM, as train.trained_parameters chooses them."""
    s = sizes_of(stage, target, recipe, lora)
    c, v, d, C, M = s.c, s.v, s.d, s.C, s.v.intermediate_size
    layer, vit_layer = s.matrices + 2 * d, 4 * C * C + 2 * C * M + M + 9 * C            # with norms, the ViT's biases
    vit_embeddings = (3 * v.patch_size ** 2 + v.num_patches + 4) * C
    parts = {       # part: (parameters, trained?)
        "ViT, frozen part": (vit_embeddings + (v.num_hidden_layers - s.upper) * vit_layer, False),
        "ViT, last layers": (s.upper * vit_layer, True),
        "ViT, post_layernorm": (2 * C, True),
        "projector, start and end": (C * d + d * d + 4 * d, True),
        "translators": (s.translators * layer, stage == "translator"),
        "decoder's layers": ((s.layers - s.translators) * layer, s.whole),
        "LoRA": (s.layers * s.low_rank, True),
        "embeddings, norm, LM head": (c.vocab_size * d * (1 if c.tie_word_embeddings else 2) + d, s.whole),
    }
    return {part: (n, 0) if trained else (0, n) for part, (n, trained) in parts.items() if n}


# ---- 3. FLOPs (2 for each weight and position; softmax, norms and activations, below 1 %, are left out) and memory ---


def step_flops(stage, target, recipe, images, texts=NOTHING, lora=0, text_gradients=False, causal=0.5):
    """{what: FLOPs} of a step. images, texts: (samples, positions of each, targets of each), visual tokens included.

    Gradients of activations cost a forward pass, in every layer above the first that is trained: for images in all, for
    text from the translator on (text_gradients: in all, as where images and text share a padded batch). Gradients of
    weights cost another where weights are trained, checkpointing another where activations have gradients. The LM head
    sees only targets. causal: how much of the T x T scores is computed; kernels skip the masked half.
    """
    s = sizes_of(stage, target, recipe, lora)
    v, d, C, V, weights = s.v, s.d, s.C, s.v.num_patches + 1, s.matrices + s.low_rank
    trained = s.layers if s.whole else s.translators if stage == "translator" else 0
    vit_layer = 2 * (4 * C * C + 2 * C * v.intermediate_size) * V + 4 * V * V * C
    out = {"ViT and projector": images[0] * (
        6 * v.patch_size ** 2 * C * v.num_patches                                   # patches to vectors, forward only
        + (v.num_hidden_layers + 2 * s.upper) * vit_layer                           # backward is twice forward
        + 3 * 2 * (C + d) * d * V)}
    out |= dict.fromkeys(("forward", "recomputation", "gradients of activations", "gradients of weights", "LM head"), 0)
    for (n, T, N), from_below in ((images, True), (texts, stage == "decoder" or text_gradients)):
        scores = causal * 4 * T * T * s.q                                           # q k^T, and its product with v
        forward, backward = 2 * weights * T + scores, 2 * weights * T + 2 * scores
        last = 2 * T * d * s.M                                  # a layer's last product: no gradient needs it again
        above = s.layers if from_below else s.layers - s.trunk
        out["forward"] += n * s.layers * forward
        out["recomputation"] += recipe.checkpointing * n * above * (forward - last)
        out["gradients of activations"] += n * above * backward
        out["gradients of weights"] += n * 2 * T * (trained * s.matrices + s.layers * s.low_rank)
        out["LM head"] += n * N * 2 * s.c.vocab_size * d * (1 + (above > 0) + s.whole)
    return out


def memory(stage, target, recipe, samples, positions, targets, ranks=1, fsdp=False, lora=0):
    """{what: bytes} on each GPU, for micro-batches of `samples` image samples with so many positions and targets each.

    What learns is float32, and bf16 where it is used; all else is bf16. fsdp: the decoder's layers and what belongs to
    them are shared out over the ranks; two whole layers at a time are there, the one that runs and the next. Estimated
    from shapes: CUDA, NCCL and the allocator's gaps come on top. (AdamW's temporary values take the place of
    activations, gone by then.)
    """
    s = sizes_of(stage, target, recipe, lora)
    v, d, C, vocab, parts = s.v, s.d, s.C, s.c.vocab_size, trained_and_frozen(stage, target, recipe, lora)
    shared = {p: 1 / ranks if fsdp and p in ("translators", "decoder's layers") else 1 for p in parts}
    trained = sum(shared[p] * counts[0] for p, counts in parts.items())
    trained_layers = s.layers if stage == "decoder" else s.translators
    # what a layer keeps of a position for its backward pass: x, x after attention, q, k, v, attention's result, gate
    # and up; if it is trained, also what goes into its matrices
    kept, extra = 2 * d + 2 * s.q + 2 * s.kv + 2 * s.M, d if lora else 2 * d + s.M
    kept = (s.layers * d + kept + extra * (trained_layers > 0) if recipe.checkpointing else
            s.layers * kept + extra * trained_layers)
    rows = min(samples * targets, max(128, 4 * (2 ** 25 // vocab) // 128 * 128))        # as linear_cross_entropy
    before = 2 * (v.num_patches + 1) * (s.upper * (9 * C + 3 * v.intermediate_size) + 3 * C + 3 * d)    # ViT, projector
    whole_layers = fsdp * (s.matrices + 2 * d) * (2 * 2 + 6 * (trained_layers > 0))     # and the gradient of one
    return {
        "weights": 2 * sum(shared[p] * sum(counts) for p, counts in parts.items()) + whole_layers,
        "gradients": 4 * trained,
        "optimizer": (4 + 8) * trained,                                                 # float32 weights, Adam
        "activations": samples * (2 * kept * positions + before),
        "logits": 2 * rows * vocab + 6 * s.whole * vocab * d,                           # and the LM head's gradient
    }


# ---- 4. The plan of a stage ------------------------------------------------------------------------------------------


def stage_plan(stage, name, ranks=8, fsdp=False, lora=0, text_gradients=None, recipe=None, data=None):
    """All about a stage before anything is loaded, for `show_plan`.

    text_gradients: see `step_flops`; default: as with fsdp, whose sharded layers work in step (extras/parallel.py).
    In place of the paper's: recipe, data = (images, texts), each (samples, tokens of text, targets among them).
    """
    target, recipe = TARGETS[name], recipe or recipe_of(stage, name)
    images, texts = data or (IMAGES[recipe.loss_on], TEXTS[stage])
    share, micro_batch = shares(recipe, ranks)
    visual = target.vit_config.num_patches + 3
    if recipe.max_length < visual:
        raise UserError(f"max_length={recipe.max_length} would cut the image: it has {visual} visual tokens")
    if recipe.dtype == "float32":
        raise UserError("dtype=float32: a plan counts with bfloat16, as the paper does")
    records = images[0] + texts[0]
    recipe = replace(recipe, steps=recipe.steps or max(1, records // recipe.batch))
    images, texts = ((n * recipe.batch / records, min(T + seen, recipe.max_length), N)        # of an average step
                     for (n, T, N), seen in ((images, visual), (texts, 0)))
    flops = step_flops(stage, target, recipe, images, texts, lora, fsdp if text_gradients is None else text_gradients)
    needs = memory(stage, target, recipe, micro_batch, images[1], images[2], ranks, fsdp, lora)
    total = recipe.steps * sum(flops.values())
    return SimpleNamespace(
        recipe=recipe, images=images, texts=texts, parts=trained_and_frozen(stage, target, recipe, lora),
        batches=f"{micro_batch} at a time x {share // micro_batch} times x {ranks} GPU(s)", step_flops=flops,
        flops=total, hours=total / PEAK / UTILIZATION / 3600, memory=needs, peak=sum(needs.values()))


def table(head, rows):
    """Markdown, all columns but the first to the right."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return "\n".join([line(head), "|---" + "|--:" * (len(head) - 1) + "|", *map(line, rows)])


def show_plan(p):
    """The plan of a stage as a text for people."""
    r, (n, T, N), (n_text, T_text, N_text) = p.recipe, p.images, p.texts
    trained, frozen = ({part: counts[k] for part, counts in p.parts.items()} for k in (0, 1))
    rows = [(title, part, f"{x / unit:,.2f}")
            for title, unit, amounts in (("trained parameters, millions", 1e6, trained), ("frozen", 1e6, frozen),
                                         ("PFLOPs (1e15) of a step", 1e15, p.step_flops), ("GB a GPU", 1e9, p.memory))
            for part, x in (amounts | {"sum": sum(amounts.values())}).items() if x]
    return "\n".join([
        f"{r.steps:,} steps of {r.batch} samples = {p.batches}",
        f"{r.steps * r.batch:,} samples, {r.steps * (n * T + n_text * T_text) / 1e6:,.0f} M positions; a step has "
        f"{n:.0f} images of {T} ({N} targets) and {n_text:.0f} texts of {T_text} ({N_text})",
        "", table(("", "part", "amount"), rows), "",
        f"{p.flops / 1e18:,.1f} EFLOPs in all steps, {p.hours:,.1f} GPU-hours if training gets {UTILIZATION:.0%} "
        f"of an H100's {PEAK / 1e12:.0f} TFLOP/s. CUDA, NCCL and the allocator's gaps take some GB more."])


# ---- 5. Three routes to a VLM with the full LLM, and what the surrogate saves (paper, section 5 and figure 2) --------


def routes(name, text=1.0, sharegpt=True, checkpointing=True, text_gradients=False):
    """With the surrogate, the full decoder, LoRA, on 16 GPUs: {route: stages={stage: plan}, and flops, hours, peak}.

    peak: bytes that a GPU needs in the hungriest stage. text: a factor on the length of all text. sharegpt: does the
    stage `decoder` read LLaVA's conversations without image?
    """
    def plan_of(stage, part=1.0, lora=0):
        r = replace(recipe_of(stage, name), checkpointing=checkpointing)
        data = [IMAGES[r.loss_on], TEXTS[stage] if sharegpt or stage != "decoder" else NOTHING]
        if stage == "decoder":
            r = replace(r, steps=math.ceil(part * sum(n for n, _, _ in data) / r.batch))
        data = [(n, round(T * text), round(N * text)) for n, T, N in data]
        return stage_plan(stage, name, 16, True, lora, text_gradients, r, data)

    adapter = {"adapter": plan_of("adapter")}
    stages_of = {"surrogate": {"translator": plan_of("translator"), "encoder": plan_of("encoder"),
                               "decoder, 20 %": plan_of("decoder", 0.2)},
                 "full decoder": adapter | {"decoder": plan_of("decoder")},
                 "LoRA": adapter | {"LoRA": plan_of("decoder", lora=LORA_RANK)}}
    return {route: SimpleNamespace(stages=stages, flops=sum(p.flops for p in stages.values()),
                                   hours=sum(p.hours for p in stages.values()),
                                   peak=max(p.peak for p in stages.values())) for route, stages in stages_of.items()}


def saving(of):
    """The part of the full decoder's FLOPs that the surrogate's route saves. of: as `routes` returns it."""
    return 1 - of["surrogate"].flops / of["full decoder"].flops


def show_routes(name):
    """The three routes of a recipe as a table, and how much each assumption (docs/real-size.md) matters."""
    ours, paper = routes(name), HOURS_70B if name == "llama-3.1-70b" else {}
    full, full_hours, rows = ours["full decoder"].flops, sum(paper.get("full decoder", {}).values()), []
    for route, r in ours.items():
        hours = paper.get(route, {})
        for what, p, h in (*((stage, p, hours.get(stage)) for stage, p in r.stages.items()),
                           (f"**{route}**", r, sum(hours.values()))):
            rows.append((what, f"{p.recipe.steps:,}" if p is not r else "", f"{p.flops / 1e18:,.1f}",
                         f"{p.flops / full:.0%}", f"{h:.2f} h, {h / full_hours:.0%}" if h else "–",
                         f"{p.hours:,.1f}", f"{p.peak / 1e9:.0f}"))
    lines = [table((name, "steps", "EFLOPs", "of full", "the paper's: of full", "GPU-hours", "GB a GPU"), rows), "",
             f"The surrogate's route saves {saving(ours):.1%} of the FLOPs of training the full decoder."]
    if paper:
        lines.append(f"The paper saves {1 - sum(paper['surrogate'].values()) / full_hours:.1%} of the hours.")
    what_if = {"text 30 % shorter": dict(text=0.7), "text 30 % longer": dict(text=1.3),
               "no activation checkpointing": dict(checkpointing=False),
               "text sends gradients through the trunk, too, as in the paper's code": dict(text_gradients=True),
               "the decoder reads LLaVA without its conversations that have no image": dict(sharegpt=False)}
    lines += ["What is assumed is listed in docs/real-size.md. Were it otherwise, it would save:"]
    return "\n".join(lines + [f"- {k}: {saving(routes(name, **v)):.1%}" for k, v in what_if.items()])


def plot_routes():
    """The three routes of every recipe as bars, like the paper's figure 2: a figure."""
    from matplotlib.figure import Figure
    looks = {"translator": ("#2a6f97", "white"), "encoder": ("#4f9cc0", "white"), "decoder, 20 %": ("#f4a261", "black"),
             "adapter": ("#c9cdd2", "black"), "decoder": ("#e76f51", "white"), "LoRA": ("#edc4b3", "black")}
    fig = Figure(figsize=(8.4, 5.4), dpi=140, facecolor="white", layout="constrained")
    axes = fig.subplots(len(PAPER), 1, sharex=True)
    for ax, name in zip(axes, PAPER):
        ours = routes(name)
        for route, r in ours.items():
            left = 0
            for stage, p in r.stages.items():
                width, (color, ink) = 100 * p.flops / ours["full decoder"].flops, looks[stage]
                bar = ax.barh(route, width, 0.8, left, color=color, edgecolor="white")
                ax.bar_label(bar, [f"{stage}\n{width:.0f}"], label_type="center", color=ink, size=7.5)
                left += width
            if route != "full decoder":
                ax.text(left + 1, route, f"{100 - left:.0f} % less", va="center")
        ax.set_title(name.title().replace("b", "B"), loc="left", fontsize=10.5, fontweight="bold", pad=3)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[-1].set(xlim=(0, 100), xlabel="FLOPs of training, in % of the route that trains the full decoder (estimated)")
    return fig


# ---- 6. Which stage fits on which GPUs -------------------------------------------------------------------------------

GPUS, CARDS = (1, 8, 32), (24, 40, 80, 141)     # how many; GB of each: 4090, A100 40, A100 or H100 80, H200


def show_fits(name):
    """A table: GB of one sample at a time for each stage and number of GPUs, the most samples at a time that fit on
    each card, FLOPs of the stage, hours on H100s. docs/real-size.md has more words about its columns.

    More than one GPU share the decoder's layers (--fsdp). A card counts as its GB of 10**9 bytes; the 5 to 7 % more
    that it has are left to CUDA, NCCL and the allocator's gaps.
    """
    rows = []
    for (stage, lora), n in itertools.product((*((s, 0) for s in STAGES), ("decoder", LORA_RANK)), GPUS):
        recipe = recipe_of(stage, name)
        plans = {micro: stage_plan(stage, name, n, n > 1, lora, recipe=replace(recipe, micro_batch=micro))
                 for micro in (1, 2, 4, 8, 16, 32, 64) if recipe.batch // n % micro == 0}
        fit = [max((m for m, p in plans.items() if p.peak <= card * 1e9), default="–") for card in CARDS]
        p = plans[1]
        needs = [f"{b / 1e9:.1f}" for b in (*p.memory.values(), p.peak)]
        rows.append((f"{stage}, LoRA {lora}" if lora else stage, n, *needs, *fit,
                     f"{p.flops / 1e18:.1f}", f"{p.hours / n:,.2f}"))
    return table((name, "GPUs", *p.memory, "sum", *(f"{card} GB" for card in CARDS), "EFLOPs", "hours"), rows)


# ---- 7. Command line -------------------------------------------------------------------------------------------------


def main(argv=None):
    example = help_text(RECIPES[PAPER[0]]["encoder"])
    parser = Parser(__doc__, epilog=f"key=value, with the values of stage encoder:\n{example}")
    add = parser.add_argument
    add("stage", nargs="?", choices=PLANS, help="plan this stage (default: show the three routes)")
    add("settings", nargs="*", metavar="key=value", help="changes a number of the stage's recipe, see below")
    add("--recipe", choices=PAPER, help="(default: all of them)")
    add("--gpus", type=number(int, 1, 10**6), help="a stage: how many GPUs share the work (default: 8)")
    add("--fsdp", action="store_true", help="a stage: shard the decoder's layers over the GPUs")
    add("--lora", type=number(int, 1, 1024), metavar="RANK",
        help="stage decoder: low-rank updates in place of the whole decoder")
    add("--memory", action="store_true", help="tables: which stage fits on which GPUs")
    add("--out", help="the routes: where their plot goes (default: runs/routes.png)")
    args = parser.parse_intermixed_args(argv)
    takes = ["memory"] if args.memory else ["stage", "settings", "gpus", "fsdp", "lora"] if args.stage else ["out"]
    if odd := [name for name, x in vars(args).items() if x and name not in ("recipe", *takes)]:
        raise UserError(f"{odd[0]} cannot go with {takes[0]}" if args.memory or args.stage else f"{odd[0]}: of a stage")
    if args.lora and args.stage != "decoder":
        raise UserError("--lora: stage decoder alone trains low-rank updates")
    names = [args.recipe] if args.recipe else PAPER
    if args.memory:
        print("\n\n".join(map(show_fits, names)))
    elif args.stage:
        for name in names:
            recipe = override(recipe_of(args.stage, name), args.settings)
            plan = stage_plan(args.stage, name, args.gpus or 8, args.fsdp, args.lora or 0, recipe=recipe)
            print(f"{name}, stage {args.stage}: {show_plan(plan)}\n")
    else:
        out = args.out or "runs/routes.png"
        check_out_file(out)
        print("\n\n".join(map(show_routes, names)))
        write_whole(out, lambda part: plot_routes().savefig(part, format="png"))
        print(f"\nplot: {out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
What does grafting cost, and what is it worth? Several recipes on the same images, from stage 1 to the scores.

    python -m studies.ablation                                      # table and plots of what assets/ablation.json keeps
    python -m studies.ablation --run shipped direct --seed 0 1      # train, graft, evaluate; nothing is done twice
    python -m studies.ablation --run all --steps 200 600 --keep     # ... and the results are kept, too
    python -m studies.ablation --gradients runs/translator/translator.safetensors   # as the full LLM's?

Scores are of validation images, by which recipes may be chosen; the images of `graft.py --eval` stay unseen.
"""
import dataclasses
import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graft
import train
from data.batches import Batches
from data.sources import CHATS, read_data
from extras import distillation
from formats import checkpoints, official
from formats.errors import MAX_SEED, Parser, UserError, number, run_cli
from formats.files import check_out, read_json
from model import VLM, Llama
from recipes import SMALL, Distillation, Recipe, check
from surrogate import load_surrogate

VALIDATION_SEED = 1000                      # of split "test"; graft.EVAL_SEED is another stream
ASSETS = checkpoints.ROOT / "assets"        # ablation.json: the results worth keeping, as a list
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# ---- The recipes. They differ in the surrogate, and in the rate of stage 2 ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Route:
    """A way to a trained encoder: what stands in for the full LLM, and how its translators are trained."""
    says: str                               # what it shows, in one line
    ranges: str = "16-21,22-28"             # layers that one translator each replaces; none: the full LLM itself
    targets: str | None = "llm"             # of stage 1: "answers", as in the paper, or the "llm" (extras/distillation)
    projector: bool = False                 # with answers: does the projector learn in stage 1, too?
    steps: int = 400                        # of stage 1
    epochs: int = 4                         # with the LLM: how often stage 1 reads the same samples
    lr: float = 5e-5                        # of stage 2; the paper's


RECIPES = {
    "paper": Route("one translator learns from the answers, and so does the projector", "20-28", "answers", True),
    "answers": Route("two translators learn from the answers, after stage 0", targets="answers"),
    "shipped": Route("two translators, distilled from the full LLM: the shipped weights", lr=1e-5),
    "short": Route("the same, on as many samples, each read only once", steps=100, epochs=1, lr=1e-5),
    "one": Route("one translator in place of the two", "16-28", lr=1e-5),
    "cut-17": Route("a later cut", "17-21,22-28", lr=1e-5),
    "cut-18": Route("a still later one", "18-22,23-28", lr=1e-5),
    "cut-20": Route("a late one, stage 1 twice as long: much like the full LLM", "20-23,24-28", steps=800),
    "cut-23": Route("the latest: one translator, and nearly the full LLM", "23-28"),
    "direct": Route("no surrogate: the encoder learns through the full LLM", "none", None, steps=0),
}

# ---- From a recipe to its result ------------------------------------------------------------------------------------


def plan_stage(stage, route, start, steps, batch, dtype, text, **common):
    """What a stage of a route is (see train.plan). steps: of stage 2."""
    how, kind = dataclasses.asdict(SMALL[stage]) | dict(steps=steps, batch=batch, dtype=dtype), Recipe
    if stage == "encoder":
        how |= dict(lr=route.lr)
    else:
        how |= dict(steps=route.steps, projector=route.projector)
        if route.targets == "llm":
            how, kind = how | dict(epochs=route.epochs), Distillation
    data = dict(data=None, images=None, text=text if stage == "translator" else None)
    return train.plan(stage, check(kind(**how)), init=start, replace=route.ranges, **common, **data)


def prepare(about, llm):
    """What a planned stage works with: (the VLM that it starts from, its recipe, its batches)."""
    kind = Distillation if "epochs" in about["recipe"] else Recipe
    recipe, vlm = kind(**about["recipe"]), train.build(about, llm.dtype, llm.device, llm=llm)
    samples, _ = read_data(about["stage"], about)
    return vlm, recipe, Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size)


def run_stage(about, out, llm):
    """Train a stage in the folder `out`, or go on with it, unless its checkpoint is finished. Returns what it says."""
    file, state = out / f"{about['stage']}.safetensors", out / "state.safetensors"
    was = checkpoints.open_checkpoint(file)[1] if file.exists() else about
    if odd := [f"{k} was {was.get(k)}, is {v}" for k, v in about.items() if was.get(k) != v]:
        raise UserError(f"{file} is of another run: {'; '.join(odd)}; delete it, or choose another --out")
    if was.get("steps_done") != about["recipe"]["steps"]:
        vlm, recipe, batches = prepare(about, llm)
        if isinstance(recipe, Distillation):
            distillation.distill(vlm, llm, recipe, batches, out, about, state.exists())
        else:
            train.train(vlm, recipe, batches, out, about, state.exists())
        was = checkpoints.open_checkpoint(file)[1]
    state.unlink(missing_ok=True)                           # several times as large as the checkpoint
    return was


def flops(work):
    """(what work() returns, its FLOPs). Attention runs as plain products: fused kernels do not count theirs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as n:
        result = work()
    return result, n.get_total_flops()


def count_flops(about, llm, steps=3):
    """Training FLOPs of a stage, from a few steps of it on the CPU, where llm is. Pictures and texts are data: free."""
    vlm, recipe, batches = prepare(about, llm)
    train.trained_parameters(vlm.to(llm.dtype), about["stage"], recipe.projector or about["stage"] != "translator")
    once = each = 0                                         # what a sample takes once, and whenever it is read
    for batch in (b for i in range(steps) for b in batches[i]):
        loss = lambda: vlm.loss(batch)
        if isinstance(recipe, Distillation):
            cached, n = flops(lambda: distillation.teacher_states(vlm, llm, batch))
            once += n
            loss = lambda: sum(distillation.distillation_loss(vlm.decoder, llm, cached))
        each += flops(lambda: loss().backward())[1]
    fresh = -(-recipe.steps // getattr(recipe, "epochs", 1))                # rounded up
    return round((once * fresh + each * recipe.steps) / steps)


def run_recipe(name, seed=0, steps=200, samples=40, out="runs/ablation", vit="assets/vit.safetensors", llm=None,
               route=None, batch=16, text=CHATS, dtype="auto", device=DEVICE):
    """Train by a recipe, graft, evaluate. Returns the result, which is kept as OUT/NAME-STEPS-seedSEED.json.

    What is done is not done again, and what was interrupted goes on. Stage 1 has a folder of its own: with another
    number of `steps`, which are those of stage 2, the same surrogate serves. samples: validation images a task.
    route: a recipe of your own, by this name. llm: path or name (default: that of `vit`). text: read in stage 1.
    """
    route, out = route or RECIPES.get(name), Path(out)
    if not route:
        raise UserError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    if min(steps, samples) < 1:
        raise UserError("steps and samples must be at least 1")
    llm = llm or checkpoints.open_checkpoint(vit)[1].get("llm", official.DEFAULT_LLM)
    common, own = dict(seed=seed, batch=batch, dtype=dtype, text=str(text), llm=llm), dataclasses.asdict(route)
    about = dict(recipe=name, steps=steps, samples=samples, vit=str(vit), route=own) | common
    file = out / f"{name}-{steps}-seed{seed}.json"
    if file.exists() and (known := read_json(file)) | about == known:
        return known
    precision = train.default_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    full = Llama.from_pretrained(llm, precision, device)
    on_cpu = full if full.device.type == "cpu" else Llama.from_pretrained(llm, train.default_dtype("cpu"))
    start, cost, seconds = str(vit), {}, {}
    folders = dict(translator=f"translator-{name}-seed{seed}", encoder=f"encoder-{name}-{steps}-seed{seed}")
    for stage in folders if route.targets else ["encoder"]:
        what, folder = plan_stage(stage, route, start, steps, **common), out / folders[stage]
        print(f"{name}, seed {seed}: stage {stage}, {what['recipe']['steps']} steps", flush=True)
        seconds[stage] = run_stage(what, folder, full)["seconds"]
        cost[stage] = count_flops(what, on_cpu)
        start = str(folder / f"{stage}.safetensors")
    surrogate = load_surrogate(full, start) if route.targets else None
    rows = graft.compare(VLM.from_pretrained(full, start), surrogate, samples, seed=VALIDATION_SEED)
    machine = f"CPU, {torch.get_num_threads()} threads" if full is on_cpu else torch.cuda.get_device_name(device)
    versions = dict(torch=torch.__version__, python=sys.version.split()[0], machine=machine, dtype=str(precision))
    result = about | dict(flops=cost, seconds=seconds, versions=versions, rows=rows)
    checkpoints.write_whole(file, lambda part: part.write_text(json.dumps(result, indent=1)))
    return result


def gradients(checkpoint, steps=4, batch=16, dtype=None, device=DEVICE):
    """What is a surrogate worth, before stage 2? The gradients of its loss on what that trains, against the full LLM's.

    checkpoint: of stage translator or encoder. Returns {part: cosine between the two gradients} and both losses per
    target, on `steps` batches of the world. Behind a surrogate of cosine 0 an encoder learns nothing for the LLM.
    """
    recipe, data = dataclasses.replace(SMALL["encoder"], batch=batch), dict(data=None, images=None, text=None)
    about = train.plan("encoder", recipe, init=str(checkpoint), seed=VALIDATION_SEED, **data)
    llm = Llama.from_pretrained(about["llm"], dtype or train.default_dtype(device), device)
    vlm, _, samples = prepare(about, llm)
    learns = train.trained_parameters(vlm.to(llm.dtype), "encoder")
    batches, grads, losses = [b for i in range(steps) for b in samples[i]], [], []
    for decoder in (vlm.decoder, llm):
        vlm.decoder, losses = decoder, losses + [0.0]
        for b in batches:
            loss = vlm.loss(b) / train.count_targets(batches)
            loss.backward()
            losses[-1] += loss.item()
        grads.append([torch.cat([p.grad.flatten().float() for n, p in learns.items() if n.startswith(part)])
                      for part in ("encoder.", "adapter.")])
        vlm.zero_grad()
    vit, projector = (torch.cosine_similarity(ours, theirs, 0).item() for ours, theirs in zip(*grads))
    return {"ViT": vit, "projector": projector, "loss of the surrogate": losses[0], "loss of the LLM": losses[1]}


# ---- Table and plots ------------------------------------------------------------------------------------------------


def by_recipe(results):
    """{(recipe, steps): results of all seeds}, in the order of RECIPES, then others; {the same: mean FLOPs}."""
    groups = {}
    for r in sorted(results, key=lambda r: ([*RECIPES, r["recipe"]].index(r["recipe"]), r["steps"], r["seed"])):
        groups.setdefault((r["recipe"], r["steps"]), []).append(r)
    return groups, {key: mean(sum(r["flops"].values()) for r in group) for key, group in groups.items()}


def scores(group, system, measure, trained):
    """Of every seed the mean over the trained or the never-trained tasks, in percent; [] if there is no such system."""
    rows = [[r for r in result["rows"] if (r["system"], r["trained"]) == (system, trained)] for result in group]
    return [100 * mean(r[measure] for r in mine) for mine in rows if mine]


def table(results):
    """Markdown: what each recipe costs, and pair → graft in percent, ± the standard deviation over seeds."""
    def pair_graft(group, *which):
        both = [s for system in ("pair", "graft") if (s := scores(group, system, *which))]
        return " → ".join(f"{mean(s):.0f}" + (f" ± {stdev(s):.0f}" if len(s) > 1 else "") for s in both)

    text = ("| recipe | replaced | steps | seeds | TFLOP | of direct | ranked first, trained tasks: pair → graft | "
            "said freely, never trained: pair → graft |\n") + "|---" * 8 + "|"
    groups, cost = by_recipe(results)
    for (name, steps), group in groups.items():
        own, direct = cost[name, steps], cost.get(("direct", steps))
        tera = " + ".join(f"{mean(r['flops'][stage] for r in group) / 1e12:.3g}" for stage in group[0]["flops"])
        text += (f"\n| {name} | {group[0]['route']['ranges']} | {steps} | {len(group)} | {tera} | "
                 + (f"{own / direct:.0%}" if direct else "–")
                 + f" | {pair_graft(group, 'ranked', True)} | {pair_graft(group, 'said', False)} |")
    return text


# Okabe and Ito's colors, which color-blind readers tell apart; shapes differ, too. On white: it reads on dark pages.
COLORS, SHAPES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "os^DvP*X<>"
PAPER = dict(figsize=(7.5, 5), dpi=120, facecolor="white", layout="constrained")


def name_points(ax, points):
    """Write the names of points {name: (x, y, spread of y)} beside them, as near as they cover nothing."""
    renderer = FigureCanvasAgg(ax.figure).get_renderer()
    ax.figure.draw_without_rendering()
    ax.figure.set_layout_engine("none")                     # from here on nothing moves
    taken = [Bbox(ax.transData.transform([(x, y - s), (x, y + s)]) + [[-9], [9]]) for x, y, s in points.values()]
    sides = [(dx, dy, ha) for dy in (0, 1, -1) for dx, ha in ((1, "left"), (-1, "right"), (0, "center"))]
    for name, (*point, _) in points.items():
        text = ax.annotate(name, point, (0, 0), textcoords="offset points", va="center", fontsize=9)
        for far, (dx, dy, ha) in ((far, side) for far in range(10, 200, 4) for side in sides):
            text.set(position=(far * dx, far * dy), ha=ha)
            box = text.get_window_extent(renderer)
            if ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)


def plot_cost(results):
    """The frontier, a figure: what each recipe costs, and how much of direct training's score its graft has."""
    (groups, cost), fig = by_recipe(results), Figure(**PAPER | dict(figsize=(11, 5)))
    names, several = list(dict.fromkeys(name for name, _ in groups)), len({steps for _, steps in groups}) > 1
    measures = ("said", False, "said freely, never trained"), ("ranked", True, "ranked first, trained")
    axes, named = fig.subplots(1, 2), []
    for ax, (measure, trained, what) in zip(axes, measures):
        points = {}
        for (name, steps), group in groups.items():
            best, own = (scores(g, "graft", measure, trained) for g in (groups.get(("direct", steps), []), group))
            if any(best):                                   # else there is nothing to compare with
                x, ys = 100 * cost[name, steps] / cost["direct", steps], [100 * y / mean(best) for y in own]
                point, k = (x, mean(ys), stdev(ys) if len(ys) > 1 else 0), names.index(name)
                points[f"{name}, {steps}" if several and name != "direct" else name] = point
                ax.errorbar(*point, fmt=SHAPES[k % len(SHAPES)], color=COLORS[k % len(COLORS)], ms=8, capsize=3)
        front = [p for p in sorted(points.values()) if all(q[1] < p[1] for q in points.values() if q[0] < p[0])]
        ax.plot([p[0] for p in front], [p[1] for p in front], "--", color="#999999", lw=1, zorder=0)
        ax.set(xlabel="training FLOPs of stages 1 and 2, % of direct training's",
               ylabel=f"graft, {what}: % of direct training's score", title="no result of direct to compare with")
        if points:
            ax.set_title("steps of stage 2; dashed: nothing is cheaper and better")
        ax.margins(0.45, 0.15)
        named.append(points)
    for ax, points in zip(axes, named):                     # when nothing moves any more
        name_points(ax, points)
    return fig


def plot_graft(results):
    """results.json of graft.py as a figure: what pair, graft and direct say freely, a line a task, 95 % intervals."""
    name, fig = lambda r: r["task"] + " *" * (not r["trained"]), Figure(**PAPER)
    tasks = list(dict.fromkeys(map(name, results["rows"])))
    ax = fig.add_subplot(xlim=(-2, 102), xlabel="said freely, % right, with 95 % intervals",
                         title=f"{results['samples']} held-out images a task; * never trained")
    for k, system in enumerate(("pair", "graft", "direct")):
        if rows := [r for r in results["rows"] if r["system"] == system]:
            x, y = torch.tensor([r["said"] for r in rows]), [0.22 * (1 - k) - tasks.index(name(r)) for r in rows]
            ends = torch.tensor([graft.wilson(r["said"] * r["samples"], r["samples"]) for r in rows])
            ax.errorbar(100 * x, y, None, 100 * (ends.T - x).abs(), SHAPES[k], color=COLORS[k], capsize=2, label=system)
    ax.set_yticks([-i for i in range(len(tasks))], tasks)
    fig.legend(loc="outside lower center", ncols=3, frameon=False)
    return fig


# ---- Command line ---------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(__doc__)
    add, known = parser.add_argument, [*RECIPES, "all"]
    add("--list", action="store_true", help="show the recipes")
    add("--run", nargs="+", default=[], metavar="NAME", choices=known, help="train and evaluate these recipes, or all")
    add("--seed", nargs="+", type=number(int, 0, MAX_SEED), default=[0], help="seeds of the training data (default: 0)")
    add("--steps", nargs="+", type=number(int, 1, 10**9), default=[200], metavar="N",
        help="steps of stage 2 (default: 200)")
    add("--samples", type=number(int, 1, 10**6), default=40, metavar="N",
        help="validation images a task (default: %(default)s)")
    add("--vit", default="assets/vit.safetensors", metavar="FILE", help="checkpoint of stage 0 (default: %(default)s)")
    add("--out", default="runs/ablation", help="folder for checkpoints, results and plots (default: %(default)s)")
    add("--gradients", nargs="+", metavar="CHECKPOINT", help="compare surrogates' gradients with the full LLM's")
    add("--keep", action="store_true", help="add the results (without --run: all in --out) to assets/ablation.json")
    args, file = parser.parse_args(argv), ASSETS / "ablation.json"
    check_out(args.out)
    if args.list:
        return print("\n".join(f"{name:9}{r.ranges:13}{r.says}" for name, r in RECIPES.items()))
    if args.gradients:
        for checkpoint in args.gradients:
            print(f"{checkpoint}: cosine of", ", ".join(f"{k} {x:.2f}" for k, x in gradients(checkpoint).items()))
        return
    new = [run_recipe(name, seed, steps, args.samples, args.out, args.vit) for seed in args.seed
           for steps in args.steps for name in (RECIPES if "all" in args.run else args.run)]
    if args.keep and not args.run:
        new = [read_json(f) for f in sorted(Path(args.out).glob("*-seed*.json"))]
    kept = read_json(file, list) if file.exists() else []
    results = list({(r["recipe"], r["steps"], r["seed"]): r for r in kept + new}.values())      # the new one counts
    if not results:
        return print("No results yet. The smallest comparison: python -m studies.ablation --run shipped direct")
    if args.keep:
        lines = ",\n".join(map(json.dumps, results))
        checkpoints.write_whole(file, lambda part: part.write_text(f"[\n{lines}\n]\n"))
    print(f"\n{table(results)}\n\nIn %, ± standard deviation over seeds. steps: of stage 2. TFLOP: stages 1 + 2."
          "\nMore rows: --run NAME ..., see --list; --keep puts them into assets/ablation.json.")
    shipped, folder, figures = ASSETS / "results.json", ASSETS if args.keep else args.out, dict(cost=plot_cost(results))
    if shipped.exists():
        figures["graft"] = plot_graft(read_json(shipped))
    for name, fig in figures.items():
        checkpoints.write_whole(Path(folder) / f"{name}.png", lambda part: fig.savefig(part, format="png"))
    print(f"Plots: {' and '.join(figures)} in {folder}/")


if __name__ == "__main__":
    sys.exit(run_cli(main))

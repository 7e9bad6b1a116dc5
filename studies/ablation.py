"""
The paper's claims, measured: train by every recipe on the same number of samples, graft, and count the cost.

    python -m studies.ablation                                          # table and plots of what is there
    python -m studies.ablation --list                                   # the recipes, and what each one shows
    python -m studies.ablation --run paper cut-23 direct --seed 0 1 2   # train, evaluate; nothing is done twice
    python -m studies.ablation --stage3                                 # from the grafted encoder and from scratch
    python -m studies.ablation --keep --plot assets                     # collect all in assets/experiments.json
    python -m studies.ablation --gradients runs/translator/translator.safetensors   # do they point as the full LLM's?

Scores are of validation images, by which recipes may be chosen; the images of `graft.py --eval` stay unseen.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graft
import train
from data import world
from formats import checkpoints, official
from formats.errors import UserError, run_cli
from formats.tokenizer import Tokenizer
from model import VLM, Llama
from surrogate import load_surrogate

VALIDATION_SEED = 1000              # of split "test"; graft.EVAL_SEED is another stream
KEPT = checkpoints.ROOT / "assets" / "experiments.json"     # all results, as a list

# ---------------------------------------------------------------------------------------------------------------------
# The recipes: command lines of train.py. {vit} is stage 0's checkpoint, {before} that of the stage before. Batch and
# seed are added, and the last stage gets the same number of steps in every recipe.


def route(replace, translator="--steps 300", encoder=""):
    """Stages 1 and 2 with one surrogate."""
    return [f"translator --init {{vit}} --replace {replace} {translator}", f"encoder --init {{before}} {encoder}"]


TWO = "20-23,24-28"
RECIPES = {
    "paper": ("the paper's recipe: the answers heal the translator, then it is frozen; no bound, one learning rate",
              route("20-28", "--steps 160 --epochs 1 --distill-every 0 --bound 0", "--distill-every 0 --ends-lr 1")),
    "healed": ("a better-healed translator: taught by the LLM, longer, on kept states; then frozen",
               route("20-28", encoder="--distill-every 0")),
    "cut-20": ("on-policy: the LLM goes on teaching the translator while the encoder learns", route("20-28")),
    "cut-23": ("a later cut: the shipped weights' recipe", route("23-28")),
    "two": ("two translators", route(TWO)),
    "no-bound": ("two translators; visual tokens may lie anywhere, from stage 1 on",
                 route(TWO, "--steps 300 --bound 0")),
    "k-1": ("two translators; the LLM teaches on every sample of stage 2, not on one of 4",
            route(TWO, encoder="--distill-every 1")),
    "k-16": ("two translators; on one of 16", route(TWO, encoder="--distill-every 16")),
    "frozen": ("two translators; on none: in stage 1 only", route(TWO, encoder="--distill-every 0")),
    "slow-translator": ("two translators, which in stage 2 learn no faster than the rest",
                        route(TWO, encoder="--translator-lr 1")),
    "slow-ends": ("two translators; the start and end vectors learn no faster than the rest",
                  route(TWO, encoder="--ends-lr 1")),
    "direct": ("trained directly on the full LLM: the upper bound",
               ["encoder --init {vit} --replace none"]),
}


def commands(stages, seed, steps, batch, out, vit, options=()):
    """[(arguments for train.main, folder)] of a recipe's stages.

    The folder's name is a digest of all arguments up to here: recipes that begin alike share what they share.
    """
    before, digest, result = None, "", []
    for i, line in enumerate(stages):
        more = ["--batch", str(batch), "--seed", str(seed), *options]
        more += ["--steps", str(steps)] if i == len(stages) - 1 else []
        argv = [word.format(vit=vit, before=before) for word in line.split()] + more
        digest = hashlib.sha256(" ".join([digest, line, str(vit), *more]).encode()).hexdigest()[:8]
        folder = Path(out) / f"{argv[0]}-{digest}"
        before = folder / f"{argv[0]}.safetensors"
        result.append((argv, folder))
    return result


def value(argv, option, default=None):
    """What an option is set to; as in argparse, the last one counts."""
    return next((b for a, b in reversed(list(zip(argv, argv[1:]))) if a == option), default)


# ---------------------------------------------------------------------------------------------------------------------
# What a surrogate is worth before stage 2: would the full LLM send the same gradients?


def gradients(checkpoint, batches=4, batch=16, device="cpu", dtype=None):
    """A surrogate against the full LLM, by the gradients of the answers' loss on what stage 2 trains of ViT, projector.

    checkpoint: of stage translator or encoder. Returns {part: cosine between the two gradients}, and the loss per
    target of both, on `batches` batches of the world. An encoder that follows a surrogate of cosine 0 learns nothing
    for the LLM.
    """
    name, dtype = checkpoints.read_checkpoint(checkpoint)[1]["llm"], dtype or train.default_dtype(device)
    vlm, llm, _ = train.build("encoder", name, None, None, str(checkpoint), dtype, device)
    parameters, surrogate = train.trained_parameters(vlm.to(dtype), "encoder"), vlm.decoder
    samples = train.Batches(vlm, batch, batch, train.RECIPES["encoder"]["loss_on"], VALIDATION_SEED)
    parts = {"ViT": "encoder.", "projector": "adapter."}
    found, result = {}, {}
    for system, decoder in (("pair", surrogate), ("graft", llm)):
        vlm.decoder, total, n = decoder, 0.0, 0
        for step in range(batches):
            (((b,),), _) = samples[step]                                # one micro-batch, and nothing but images in it
            loss = vlm.loss(b["tokens"].to(device), b["targets"], b["pixels"])
            loss.backward()
            total, n = total + loss.item(), n + int((b["targets"] >= 0).sum())
        result[f"{system}: loss"] = total / n
        for part, prefix in parts.items():
            mine = [p.grad.flatten().float() for n, p in parameters.items() if n.startswith(prefix)]
            found[system, part] = torch.cat(mine)
        for p in parameters.values():
            p.grad = None
    cosine = lambda part: torch.cosine_similarity(found["pair", part], found["graft", part], 0).item()
    return {part: cosine(part) for part in parts} | result


# ---------------------------------------------------------------------------------------------------------------------
# What a stage costs


def measure(argv):
    """FLOPs of a run of train.main. On the CPU, and attention as plain products: no Triton kernel counts its own."""
    with (tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()),
          contextlib.redirect_stderr(io.StringIO()), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as n):
        train.main([*argv, "--device", "cpu", "--out", folder])
    return n.get_total_flops()


def count_flops(argv, epochs=1):
    """Training FLOPs of a stage, out of runs of one and two real steps. epochs: of its samples; the first computes all.

    The text that the LLM writes for stage 1 is data (the paper takes GenQA's): it comes from the cache, uncounted.
    """
    steps = int(value(argv, "--steps"))
    fresh = math.ceil(steps / epochs)
    once = []
    if argv[0] == "translator":
        once = ["--epochs", "1"]
        measure([*argv, "--steps", "1"])                                # only to have the text in the cache
    one, two = (measure([*argv, "--steps", s, *once]) for s in "12")
    again = measure([*argv, "--steps", "2", "--epochs", "2"]) - one if fresh < steps else 0
    return 2 * one - two + fresh * (two - one) + (steps - fresh) * again


def write_json(file, content):
    checkpoints.write_whole(file, lambda part: part.write_text(json.dumps(content, indent=1)))
    return content


def remember(file, key, compute):
    """The value that a JSON file keeps under `key`; computed if it is not there."""
    known = official.read_json(file) if file.exists() else {}
    return known[key] if key in known else write_json(file, known | {key: compute()})[key]


# ---------------------------------------------------------------------------------------------------------------------
# Run: from seed to results


def run_stage(argv, folder):
    """Train a stage, or go on with it, unless its checkpoint is finished. Returns what the checkpoint says about it."""
    file, state = folder / f"{argv[0]}.safetensors", folder / "state.safetensors"
    about = checkpoints.read_checkpoint(file)[1] if file.exists() else {}
    if about.get("steps_done") != int(value(argv, "--steps")):
        print("python train.py", *argv, flush=True)
        train.main([*argv, "--out", str(folder), *(["--resume"] if state.exists() else [])])
        about = checkpoints.read_checkpoint(file)[1]
    state.unlink(missing_ok=True)                                       # several times as large as the checkpoint
    return about


def evaluate(checkpoint, samples, options=(), batch=8):
    """Scores on `samples` validation images a task, computed in the dtype of the training; and the machine that did it.

    Of the graft, of the pair where a surrogate took part, and of the LLM that reads the caption in the image's place.
    """
    about = checkpoints.read_checkpoint(checkpoint)[1]
    device = value(options, "--device", "cuda" if torch.cuda.is_available() else "cpu")
    path, dtype = official.find(about["llm"]), getattr(torch, about["recipe"]["dtype"].removeprefix("torch."))
    llm = Llama.from_pretrained(path, dtype, device)
    vlm = VLM.from_pretrained(llm, checkpoint, tokenizer=Tokenizer.from_pretrained(path))
    surrogate = load_surrogate(llm, checkpoint) if about["ranges"] else None
    rows = graft.compare(vlm, surrogate, samples, batch, seed=VALIDATION_SEED)
    gpu = device.startswith("cuda")
    machine = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    return dict(torch=torch.__version__, machine=machine,
                rows=[{k: r[k] for k in ("task", "system", "ranked", "said")} for r in rows])


def finished(file, **same):
    """The result in a file, if it is there and says the same; else None."""
    result = official.read_json(file) if file.exists() else {}
    return result if result and all(result.get(k) == v for k, v in same.items()) else None


def run_recipe(name, seed=0, steps=300, batch=16, samples=100, out="runs/experiments", vit="assets/vit.safetensors",
               stages=None, options=()):
    """Train by a recipe, or by `stages` of your own, and evaluate. Returns the result, which is kept in the folder
    `out`: a second call finds it, and one after a break goes on from the last checkpoint.

    samples: validation images a task. options: further arguments for every stage. "flops" and "seconds" have a number
    for every stage; those of stage 0, which all recipes have in common, stand apart.
    """
    if stages is None and name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    out, stages = Path(out), stages or RECIPES[name][1]
    todo = commands(stages, seed, steps, batch, out, vit, options)
    about = dict(recipe=name, seed=seed, steps=steps, batch=batch, samples=samples,
                 commands=[" ".join(["python train.py", *argv, "--out", str(folder)]) for argv, folder in todo])
    file, counted = out / f"{name}-{steps}x{batch}-seed{seed}.json", out / "flops.json"
    if result := finished(file, **about):
        return result

    seconds, flops = [], []
    for i, (argv, folder) in enumerate(todo):
        print(f"{name}, seed {seed}: stage {i + 1} of {len(todo)}", flush=True)
        was = run_stage(argv, folder)
        seconds.append(was["seconds"])
        argv = [*argv, "--dtype", was["recipe"]["dtype"].removeprefix("torch.")]
        epochs = was["recipe"].get("epochs", 1)
        key = f"{' | '.join(stages[:i + 1])} {steps} x {batch} {' '.join(options)}"     # the same for all seeds
        flops.append(remember(counted, key, lambda: count_flops(argv, epochs)))
    was = checkpoints.read_checkpoint(vit)[1]
    argv = ["vit", "--steps", "1", "--batch", str(was["recipe"]["batch"]), *options]
    step = remember(counted, " ".join(argv), lambda: measure(argv))
    stage_0 = dict(seconds=was["seconds"], flops=was["recipe"]["steps"] * step)
    checkpoint = folder / f"{todo[-1][0][0]}.safetensors"
    return write_json(file, about | dict(seconds=seconds, flops=flops, stage_0=stage_0)
                      | evaluate(checkpoint, samples, options))


STARTS = {"the grafted encoder": "assets/encoder.safetensors", "scratch": "assets/vit.safetensors"}


def stage3(starts=STARTS, steps=(0, 25, 50, 100, 200), seed=0, batch=16, samples=100, out="runs/experiments",
           options=()):
    """Train the full LLM from each start, for every number of steps, and evaluate. Returns the results, kept in `out`.

    Every number of steps is a run with a whole schedule of its own: what this much data gives. 0: the start as it is.
    A checkpoint holds the whole LLM and is deleted once evaluated.
    """
    results = []
    for start, checkpoint in starts.items():
        for n in steps:
            file = Path(out) / f"stage3-from-{start.split()[-1]}-{n}x{batch}-seed{seed}.json"
            argv = ["decoder", "--init", str(checkpoint), "--batch", str(batch), "--seed", str(seed), *options,
                    *(["--steps", str(n)] if n else ["--steps", "1", "--lr", "0"])]
            about = dict(start=start, seed=seed, steps=n, batch=batch, samples=samples, command=" ".join(argv))
            result, folder = finished(file, **about), file.with_suffix("")
            if not result:
                seconds = run_stage(argv, folder)["seconds"]
                scores = evaluate(folder / "decoder.safetensors", samples, options)
                result = write_json(file, about | dict(seconds=seconds) | scores)
                shutil.rmtree(folder)
            results.append(result)
    return results


def read_results(out="runs/experiments", kept=KEPT):
    """All results: those that were kept, and those in `out`, which replace kept ones of the same run."""
    results = official.read_json(Path(kept)) if Path(kept).exists() else []
    results += [official.read_json(f) for f in sorted(Path(out).glob("*-seed*.json"))]
    return list({(r.get("recipe"), r.get("start"), r["seed"], r["steps"], r["batch"]): r for r in results}.values())


# ---------------------------------------------------------------------------------------------------------------------
# Show


def by_recipe(results):
    """{(recipe, steps, batch): results of all seeds}, in the order of RECIPES, then others."""
    order, groups = {name: i for i, name in enumerate(RECIPES)}, {}
    for r in sorted((r for r in results if "recipe" in r), key=lambda r: order.get(r["recipe"], len(order))):
        groups.setdefault((r["recipe"], r["steps"], r["batch"]), []).append(r)
    return groups


def scores(results, system, tasks):
    """In percent, for each result: how often the right option is the likeliest, mean over tasks."""
    found = [[100 * r["ranked"] for r in result["rows"] if r["system"] == system and r["task"] in tasks]
             for result in results]
    return [statistics.mean(f) for f in found if f]


def table(results):
    """Markdown: the cost of each recipe, and pair → graft of each task, in percent ± a deviation over seeds."""
    def cell(group, task):
        both = [scores(group, system, [task]) for system in ("pair", "graft")]
        return " → ".join(f"{statistics.mean(s):.0f}" + (f" ± {statistics.stdev(s):.0f}" if len(s) > 1 else "")
                          for s in both if s)

    groups, tasks = by_recipe(results), [t + " *" * (t in world.KNOWLEDGE_TASKS) for t in graft.TASKS]
    rows = [["recipe", "replaced", "steps × batch", "seeds", "TFLOP", "of direct", "minutes", *tasks]]
    rows.append(["---"] * len(rows[0]))
    for (name, steps, batch), group in groups.items():
        flops, direct = sum(group[0]["flops"]), groups.get(("direct", steps, batch))
        rows.append([name, value(group[0]["commands"][0].split(), "--replace"), f"{steps} × {batch}", str(len(group)),
                     f"{flops / 1e12:.3g}", f"{flops / sum(direct[0]['flops']):.0%}" if direct else "–",
                     f"{statistics.mean(sum(r['seconds']) for r in group) / 60:.1f}",
                     *(cell(group, t) for t in graft.TASKS)])
    return "\n".join(f"| {' | '.join(r)} |" for r in rows)


SYSTEMS = {"pair": ("#e07a1f", 0.24), "graft": ("#2a6f97", 0.08),      # color, place in its line
           "direct": ("#6c757d", -0.08), "text": ("#2d6a4f", -0.24)}
PANELS = {"trained tasks": world.TRAINED_TASKS, "knowledge, never trained": world.KNOWLEDGE_TASKS}


def figure(width, height, columns=1):
    """(pyplot, figure, axes) on white, so that it reads on dark pages too."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, columns, figsize=(width, height), dpi=120, facecolor="white", layout="constrained",
                             sharey=True, squeeze=False)
    for ax in axes[0]:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return plt, fig, axes[0]


def save(plt, fig, path):
    checkpoints.write_whole(path, lambda part: fig.savefig(part, format="png"))
    plt.close(fig)


def plot_graft(results, path):
    """Pair → graft for each task, with 95 % intervals: the results.json of graft.py as a picture."""
    plt, fig, (ax,) = figure(7.5, 4.4)
    tasks, at = list(dict.fromkeys(r["task"] for r in results["rows"])), {}
    for r in [r for r in results["rows"] if r["system"] in SYSTEMS]:
        (color, offset), line = SYSTEMS[r["system"]], -tasks.index(r["task"])
        low, high = (100 * x for x in graft.wilson(r["ranked"] * r["samples"], r["samples"]))
        p, chance = 100 * r["ranked"], 100 * r["chance"]
        at[r["task"], r["system"]] = p, line + offset
        ax.errorbar(p, line + offset, xerr=[[max(0, p - low)], [max(0, high - p)]], fmt="o", capsize=2, color=color,
                    label=r["system"] if line == 0 else None)
        ax.plot([chance] * 2, [line - 0.35, line + 0.35], ":", color="#888888",
                label="chance" if line == 0 and r["system"] == "graft" else None)
    for task in tasks:
        if (task, "pair") in at:
            ax.annotate("", at[task, "graft"], at[task, "pair"], arrowprops=dict(arrowstyle="-|>", color="#222222"))
    ax.set_yticks([-i for i in range(len(tasks))], [t + " *" * (t in world.KNOWLEDGE_TASKS) for t in tasks])
    ax.set(xlim=(0, 103), xlabel="% ranked first, 95 % intervals        * never trained",
           title=f"{results['samples']} held-out images a task")
    fig.legend(loc="outside lower center", ncols=4, frameon=False)
    save(plt, fig, path)


def plot_cost(results, path):
    """The graft's score against training FLOPs: a marker a recipe, a dot a seed (the paper's figure 2)."""
    plt, fig, axes = figure(10, 4.2, 2)
    for ax, (title, tasks) in zip(axes, PANELS.items()):
        for i, ((name, steps, _), group) in enumerate(by_recipe(results).items()):
            x, ys, color = sum(group[0]["flops"]) / 1e12, scores(group, "graft", tasks), plt.get_cmap("tab20")(i % 20)
            ax.plot([x] * len(ys), ys, ".", color=color, ms=4)
            ax.plot(x, statistics.mean(ys), "os^DvP*X<>h"[i % 11], color=color, mec="#222222", mew=0.6, ms=9,
                    label=f"{name}, {steps} steps")
        ax.set(title=title, xlabel="training of stages 1 and 2, TFLOP", xlim=(0, None))
    axes[0].set_ylabel("with the full LLM: % ranked first")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(plt, fig, path)


def plot_stage3(results, path):
    """Score against the steps of stage 3 from each start: lines join the means over seeds, a dot is a seed."""
    plt, fig, axes = figure(9, 4, 2)
    starts = dict.fromkeys(r["start"] for r in results if "start" in r)
    for ax, (title, tasks) in zip(axes, PANELS.items()):
        for start, color in zip(starts, ("#2a6f97", "#e07a1f", "#6c757d")):
            points = {}
            for r in sorted((r for r in results if r.get("start") == start), key=lambda r: r["steps"]):
                points.setdefault(r["steps"], []).extend(scores([r], "graft", tasks))
            ax.plot([n for n, ys in points.items() for _ in ys], sum(points.values(), []), ".", color=color, ms=4)
            ax.plot(points.keys(), [statistics.mean(ys) for ys in points.values()], "o-", color=color,
                    label=f"from {start}")
        ax.set(title=title, xlabel="steps of stage 3")
    axes[0].set_ylabel("% ranked first")
    axes[0].legend(frameon=False)
    save(plt, fig, path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument("--run", nargs="+", default=[], metavar="RECIPE", help="train and evaluate these, or all")
    parser.add_argument("--stage3", action="store_true", help="compare stage 3 from both starts")
    parser.add_argument("--gradients", nargs="+", default=[], metavar="CHECKPOINT",
                        help="compare their surrogates' gradients with the full LLM's, then stop")
    parser.add_argument("--seed", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, default=300, help="steps of stage 2 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="samples a step (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100, help="validation images a task (default: %(default)s)")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--out", default="runs/experiments", help="checkpoints and results (default: %(default)s)")
    parser.add_argument("--plot", metavar="FOLDER", help="where the plots go (default: as --out)")
    parser.add_argument("--keep", action="store_true", help=f"write all results to {KEPT}")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.samples) < 1:
        raise UserError("--steps, --batch and --samples must be at least 1")
    names = list(RECIPES) if args.run == ["all"] else args.run
    if unknown := [name for name in names if name not in RECIPES]:
        raise UserError(f"unknown recipe {unknown[0]!r}: choose from all, {', '.join(RECIPES)}")
    if args.list:
        for name, (says, stages) in RECIPES.items():
            print(f"{name:15} {says}\n" + "".join(f"{'':15} python train.py {line}\n" for line in stages))
        return

    if args.gradients:
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        print("| checkpoint | replaced | cosine of gradients: ViT | projector | loss: surrogate | full LLM |\n"
              + "|---" * 6 + "|")
        for file in args.gradients:
            found = gradients(file, batch=args.batch, device=device)
            replaced = ",".join(f"{a}-{b}" for a, b in checkpoints.read_checkpoint(file)[1]["ranges"])
            print(f"| {file} | {replaced} | " + " | ".join(f"{x:.2f}" for x in found.values()) + " |", flush=True)
        return

    common = dict(batch=args.batch, out=args.out, options=["--device", args.device] if args.device else [])
    for seed in args.seed:
        for name in names:
            run_recipe(name, seed, args.steps, samples=args.samples, **common)
        if args.stage3:
            stage3(seed=seed, samples=args.samples, **common)
    results = read_results(args.out, KEPT)
    if not results:
        print("No results yet, so the smallest comparison, of 30 steps: it shows how this works, not what is true.")
        for name, stages in (("short", route("23-28", "--steps 20")), ("direct", None)):
            results.append(run_recipe(name, steps=30, samples=8, stages=stages, **common))
    if args.keep:
        write_json(Path(KEPT), results)
    file = checkpoints.locate("assets/results.json")     # of graft.py, for the shipped weights
    for name, draw, material in (("cost", plot_cost, [r for r in results if "recipe" in r]),
                                 ("stage3", plot_stage3, [r for r in results if "start" in r]),
                                 ("graft", plot_graft, official.read_json(file) if file.exists() else None)):
        if material:
            draw(material, Path(args.plot or args.out) / f"{name}.png")
    print(f"\n{table(results)}\n\nPair → graft on validation images, % ranked first; * never trained; "
          f"cost: stages 1+2\nPlots: cost.png, stage3.png and graft.png in {args.plot or args.out}/")


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
What teaches the encoder? Arms that differ in one thing each: trained, grafted, asked; score against FLOPs.

    python -m studies.results --list                            # the arms, and the stages of each
    python -m studies.results --run ours direct --steps 250 500 # train, ask, show; --keep puts it into assets/
    python -m studies.results                                   # the tables and figures of what is there
    python -m studies.results --probe assets/vit.safetensors    # how much does the ViT of stage 0 see? (--icons FOLDER)
    python -m studies.results --kept assets/translator.safetensors      # how good a language model is the surrogate?

Scores are of validation images, by which recipes may be chosen; the images of `graft.py --eval` stay unseen. What an
arm has finished is not done again, and what was interrupted goes on.
"""
import itertools
import json
import math
import re
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train
from cli import MAX_SEED, Parser, UserError, check_out, number, run_cli, write_whole
from data.images import preprocess
from data.sources import HeldOut, read_pictures
from data.world import KNOWLEDGE_TASKS, KNOWN_SUBJECTS, SUBJECTS
from extras import distillation, parallel, vit
from formats import checkpoints
from formats.files import read_json
from formats.official import DEFAULT_LLM, find
from formats.tokenizer import Tokenizer
from model import VLM, Llama, base_vit
from surrogate import build_surrogate, load_surrogate, read_texts

ASSETS = checkpoints.ROOT / "assets"
VALIDATION_SEED = 1000                      # of split "test"; evaluate.EVAL_SEED is another stream
PROGRAMS = {"distillation": distillation.main, "train": train.main, "parallel": parallel.main}
SHARED = ("distillation", "random", "train translator")     # commands of stage 1, which serves many encoders
BATCH = "batch=8"                           # of stage 2 in all arms: half the recipe's, in half the time
PAPER = "like_words=false vit_layers=0 vit_lr=1"
ROUTE = ("ours, then stage 3", "full decoder", "LoRA")      # the paper's figure 2: everything until the LLM is a VLM
ADAPTER = f"train encoder --direct vit_lr=0 steps=300 {BATCH}"       # the paper's warm-up: the projector alone learns
ARMS = {    # each: the commands of its stages, the last with --steps; a stage goes on from the one before
    "ours": ["distillation", "train encoder"],
    "frozen": ["distillation", "train encoder distill=0"],
    "no noise": ["distillation", "train encoder noise=0"],
    "a lesson every 2nd step": ["distillation", "train encoder distill=2"],
    "a quarter of stage 1": ["distillation steps=500", "train encoder"],
    "cut at 16": ["distillation steps=500 --replace 16-21,22-28", "train encoder"],
    "early layers": ["distillation steps=500 --replace 1-4,5-9", "train encoder"],
    "projector alone": ["distillation", "train encoder vit_lr=0"],
    "untrained": ["distillation steps=1 lr=0", "train encoder distill=0"],
    "untrained, taught": ["distillation steps=1 lr=0", "train encoder"],
    "random": ["random", "train encoder distill=0"],
    "paper": [f"train translator --replace 20-28 {PAPER}", f"train encoder distill=0 {PAPER} lr=2e-4"],
    "paper, tokens like words": ["train translator --replace 20-28", "train encoder distill=0"],
    "paper, tokens like words, balanced": ["train translator --replace 20-28 balance=1",
                                           "train encoder distill=0 balance=1"],
    "direct": ["train encoder --direct"],
    "direct, plain tokens": ["train encoder --direct like_words=false lr=5e-4"],
    "direct, half the rate": ["train encoder --direct lr=5e-4"],
    "ours, half the rate": ["distillation", "train encoder lr=5e-4"],
    # the whole route of the paper's figure 2: 20 % of stage 3 behind the graft, or all of it behind a warm-up
    ROUTE[0]: ["distillation", f"train encoder steps=300 {BATCH}", "train decoder"],
    ROUTE[1]: [ADAPTER, "train decoder"],
    ROUTE[2]: [ADAPTER, "parallel decoder --lora 8"],
}

# ---- Run ------------------------------------------------------------------------------------------------------------


def random_translators(argv):
    """A surrogate whose translators are noise of the right size: what the paper's initialization is worth."""
    out = Path(argv[argv.index("--out") + 1])
    distillation.main(["steps=1", "lr=0", *argv])
    tensors, about = checkpoints.read_checkpoint(out / "translator.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = {n: t if t.dim() == 1 else t.float().std() * torch.randn(t.shape, generator=generator)
               for n, t in tensors.items()}
    checkpoints.save_checkpoint(out / "translator.safetensors", {n: t.half() for n, t in tensors.items()}, about)


def run_command(command, start, seed, out, more=()):
    """Run a command of an arm in a folder of its own, within that of the stage before, unless that is done. Returns
    (checkpoint, TFLOP, seconds)."""
    program, *argv = [*command.split(), *more]
    parent = Path(start).parent if start else out           # arms that differ in stage 1 share no later stage
    folder = parent / f"{re.sub('[^a-z0-9=.]+', '-', ' '.join([program, *argv]).lower())}-seed{seed}"
    stage = "translator" if program in SHARED else argv[0]
    argv += ["--seed", str(seed), *(["--init", str(start)] if start and "--init" not in argv else [])]
    main = PROGRAMS.get(program, random_translators)
    file, done = folder / f"{stage}.safetensors", folder / "cost.json"
    if not done.exists():
        going = (folder / "state.safetensors").exists()
        main([*argv, "--out", str(folder), *(["--resume"] if going else [])])
        about = checkpoints.open_checkpoint(file)[1]
        with tempfile.TemporaryDirectory() as scratch, FlopCounterMode(display=False) as count:
            main([*argv, "steps=12", "--out", scratch])     # every 2nd, 3rd or 4th is a lesson; of stage 1 3 are fresh
        tera = count.get_total_flops() * about["recipe"]["steps"] / 12 / 1e12
        text = json.dumps(dict(tera=round(tera, 1), seconds=about["seconds"]))
        write_whole(done, lambda part: part.write_text(text, encoding="utf-8"))
    cost = read_json(done)
    return file, cost["tera"], cost["seconds"]


def run_arm(name, steps=500, seed=0, samples=12, out="runs/results", fresh=256):
    """Train an arm, graft, ask. Returns the result, which is also OUT/NAME-STEPS-seedSEED.json. steps: of the
    last stage, 0: without it; seed: of all but stage 1, as one surrogate serves all encoders. samples: validation
    images a task; fresh: samples over which cross-entropy is measured."""
    out, start, tera, seconds = Path(out), None, [], []
    file = out / f"{name.replace(' ', '-')}-{steps}-seed{seed}.json"
    if file.exists() and (found := read_result(file))["samples"] == samples:
        return found
    *first, last = ARMS[name]
    for command, more in [*((c, []) for c in first), *[(last, [f"steps={steps}", BATCH])] * (steps > 0)]:
        print(f"{name}, {steps} steps, seed {seed}: {command}", flush=True)
        start, t, s = run_command(command, start, 0 if command.startswith(SHARED) else seed, out, more)
        tera.append(t)
        seconds.append(s)
    about = checkpoints.open_checkpoint(start)[1]
    llm = Llama.from_pretrained(about["llm"])
    vlm, surrogate = VLM.from_pretrained(llm, start), load_surrogate(llm, start) if about["ranges"] else None
    brings = evaluate.image_brings(vlm, surrogate, fresh)
    rows = evaluate.compare(vlm, surrogate, samples, seed=VALIDATION_SEED, text=False)
    result = dict(arm=name, commands=ARMS[name], steps=steps, seed=seed, samples=samples, tera=tera, seconds=seconds,
                  torch=torch.__version__, brings=brings, rows=rows)
    write_whole(file, lambda part: part.write_text(json.dumps(result), encoding="utf-8"))
    return result


def probe(file, steps=500, batch=128, seed=1, device="cpu", icons=None):
    """How many captions does a small captioner of its own read from a frozen ViT? Trained on drawings of all known
    subjects, asked about new drawings of them, and about combinations of color and shape that no stage has seen: the
    most that a projector could bring across. icons: a folder of data/icons.py, whose pictures are half of what the
    captioner learns, and of whose test artist it is asked, too. Returns {kind of picture: share of captions that are
    right as a whole}."""
    torch.manual_seed(seed)
    samples, texts, _ = read_pictures(f"{icons}/known.json", seed) if icons else (None, (), {})
    captions, encoder = vit.Captions(texts), base_vit(file, file).to(device)
    head = vit.Captioner(captions, encoder.config.hidden_size).to(device)
    see = torch.no_grad()(lambda pixels: encoder.vision_model.post_layernorm(encoder(pixels.to(device))))
    adam = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for pixels, texts in vit.Pictures(batch, seed, samples=samples).loader(range(steps), 1):
        loss, _ = head.loss(captions(texts).to(device), see(pixels))
        loss.backward()
        adam.step()
        adam.zero_grad()
        schedule.step()
    kinds = {kind: [s for s in KNOWN_SUBJECTS if s[0] == kind] for kind in ("sign", "flag", "shape")}
    kinds["new color and shape"] = [s for s in SUBJECTS if s not in KNOWN_SUBJECTS]
    with torch.no_grad():
        tests = {kind: vit.Pictures(4 * batch, seed + 1, subjects)[0] for kind, subjects in kinds.items()}
        if icons:
            held = HeldOut(f"{icons}/test.json")
            asked = [held("describe", i) for i in range(4 * batch)]
            tests["test artist"] = torch.stack([preprocess(s.image) for s in asked]), [s.caption for s in asked]
        return {kind: head.loss(captions(texts).to(device), see(pixels))[1].item()
                for kind, (pixels, texts) in tests.items()}


@torch.no_grad()
def perplexity(llm, tokens):
    """exp of the mean -log p of the tokens (B, T) given those before them, the first of each row left out."""
    tokens = tokens.to(llm.device)
    x = llm.run(llm.embed(tokens))                                                          # (B, T, C)
    total = llm.loss(x, F.pad(tokens[:, 1:], (0, 1), value=-100)).item()
    return math.exp(total / (tokens.numel() - len(tokens)))


def knows(decoders, tokenizer, n=20, batch=20):
    """What language models know without an image: the knowledge tasks, with the caption in the image's place.

    decoders: {name: Llama}. Returns the rows of `evaluate.grade`, of n captions a task."""
    def ask(samples):
        prompts = [torch.tensor(tokenizer.chat(evaluate.told(s)[:-1])) for s in samples]
        lengths, tokens = torch.tensor([len(p) for p in prompts]), pad_sequence(prompts, batch_first=True)     # (B, T)
        for name, llm in decoders.items():
            embeds = llm.embed(tokens.to(llm.device))                                       # (B, T, C)
            yield name, evaluate.answer(embeds, lengths, samples, llm, tokenizer=tokenizer)["graft"]

    return evaluate.grade(ask, KNOWLEDGE_TASKS, n, batch)


def show_kept(checkpoint, n=20):
    """Print what a surrogate keeps as a language model: the LLM, the surrogate as it is cut, and as it was trained."""
    about = checkpoints.open_checkpoint(checkpoint)[1]
    path = find(about.get("llm", DEFAULT_LLM))
    llm, tokenizer = Llama.from_pretrained(path), Tokenizer.from_pretrained(path)
    trained = load_surrogate(llm, checkpoint)
    decoders = {"LLM": llm, "as cut": build_surrogate(llm, trained.ranges), "trained": trained}
    cells = [f"{perplexity(decoder, read_texts(tokenizer)):.4g}" for decoder in decoders.values()]
    print(f"\n{evaluate.markdown(['', *decoders], [['perplexity of assets/text.txt', *cells]])}\n")
    print(evaluate.table(knows(decoders, tokenizer, n)))
    print(f"\n{n} captions a task, with 95 % intervals; the paper's 70B: MMLU 82.6 -> 80.8, HellaSwag 86.9 -> 70.4")


# ---- Tables and figures ---------------------------------------------------------------------------------------------


MEASURES = {        # title: (what of a row counts, of the trained tasks?)
    "what the image brings": ("brings", None), "trained, ranked": ("ranked", True), "trained, said": ("said", True),
    "never trained, ranked": ("ranked", False), "never trained, said": ("said", False)}


def value(result, system, title):
    """One of MEASURES, in nats a token or in %; None if there is no such system."""
    measure, trained = MEASURES[title]
    if measure == "brings":
        return next((r["brings"] for r in result["brings"] if r["system"] == system), None)
    pool = evaluate.pooled([r for r in result["rows"] if r["trained"] == trained], measure, system)
    return None if pool is None else 100 * pool[0]


def read_result(file):
    """A result that `run_arm` has written; UserError if no table can be made of it."""
    result = read_json(file)
    try:
        table([result])
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{file} is no result of an arm, or damaged ({e!r:.60}): delete it") from None
    return result


def by_arm(results):
    """{(arm, steps): results of all seeds}, in the order of ARMS."""
    order = lambda r: ([*ARMS].index(r["arm"]), r["steps"], r["seed"])
    return {key: list(group) for key, group in
            itertools.groupby(sorted(results, key=order), lambda r: (r["arm"], r["steps"]))}


def spread(values, digits):
    """"3.1", of several seeds "3.1 ± 0.2"; "" of none."""
    values = [v for v in values if v is not None]
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}" if values else ""


def table(results):
    """Markdown: what each arm costs, and what pair and graft score, ± the standard deviation over seeds."""
    rows = []
    for (arm, steps), group in by_arm(results).items():
        cells = []
        for title, (measure, _) in MEASURES.items():
            digits = 2 * (measure == "brings")
            pair, graft = (spread([value(r, s, title) for r in group], digits) for s in ("pair", "graft"))
            cells.append(f"{pair} → {graft}" if pair else graft)
        tera = " + ".join(f"{mean(x):.0f}" for x in zip(*(r["tera"] for r in group)))
        rows.append([arm, steps, len(group), tera, *cells])
    return evaluate.markdown(["arm", "steps", "seeds", "TFLOP, by stage", *MEASURES], rows)


# Okabe and Ito's colors, which color-blind readers tell apart. On white: it reads on dark pages, too.
COLORS, SHAPES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "os^DvP*X<>"


MAIN = ("what the image brings", "trained, ranked", "never trained, ranked")


def plot(results, measures=MAIN):
    """Score of the graft against FLOPs, every point a run of its own length: a figure. Dashed: stage 1 counted, which
    serves further encoders, too."""
    grouped, fig = by_arm(results), Figure(figsize=(13, 4.4), dpi=120, facecolor="white", layout="constrained")
    for ax, title in zip(fig.subplots(1, len(measures)), measures):
        for k, arm in enumerate(dict.fromkeys(a for a, _ in grouped)):
            own = lambda r: sum(t for t, command in zip(r["tera"], r["commands"]) if not command.startswith(SHARED))
            points = [(mean(map(own, g)), mean(sum(r["tera"]) for r in g), mean(value(r, "graft", title) for r in g))
                      for (a, _), g in grouped.items() if a == arm]
            style = dict(color=COLORS[k % len(COLORS)], marker=SHAPES[k % len(SHAPES)], ms=5)
            alone, whole, y = zip(*points)
            ax.plot(alone, y, **style, label=arm)
            if whole[0] > 1.05 * alone[0]:
                ax.plot(whole, y, ls="--", lw=0.8, mfc="white", **style)
        ax.set(title=title, xlabel="training, TFLOP; dashed: with stage 1")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.grid(alpha=0.3)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center", frameon=False)
    return fig


# ---- Command line ---------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="show the arms")
    add("--run", nargs="+", default=[], metavar="ARM", choices=[*ARMS, "all"], help="train and ask these arms, or all")
    add("--seed", nargs="+", type=number(int, 0, MAX_SEED), default=[0], help="of projector and samples (default: 0)")
    add("--steps", nargs="+", type=number(int, 0, 10**9), default=[500], metavar="N",
        help="steps of the last stage, each a run of its own; 0: without it (default: 500)")
    add("--samples", type=number(int, 1, 10**6), default=12, metavar="N",
        help="validation images a task (default: %(default)s)")
    add("--out", default="runs/results", help="folder for checkpoints, results and figures (default: %(default)s)")
    add("--probe", metavar="FILE", help="a checkpoint of stage 0: how many captions can be read from it?")
    add("--icons", metavar="FOLDER", help="--probe with the pictures of python -m data.icons, too")
    add("--kept", metavar="FILE", help="a checkpoint of stage translator or encoder: what does its surrogate know?")
    add("--keep", action="store_true", help="add the results of --out to assets/arms.json")
    args, file = parser.parse_args(argv), ASSETS / "arms.json"
    check_out(args.out)
    if args.list:
        return print("\n".join(f"{name:36}{' | '.join(commands)}" for name, commands in ARMS.items()))
    if args.probe:
        shares = probe(args.probe, icons=args.icons)
        return print("\n".join(f"{kind:20} {right:.1%}" for kind, right in shares.items()))
    if args.kept:
        return show_kept(args.kept)
    for seed in args.seed:
        for steps in args.steps:
            for name in ARMS if "all" in args.run else args.run:
                run_arm(name, steps, seed, args.samples, args.out)
    new = [read_result(f) for f in sorted(Path(args.out).glob("*-seed*.json"))]
    known = read_json(file, list) if file.exists() else []
    results = list({(r["arm"], r["steps"], r["seed"]): r for r in known + new}.values())        # the new one counts
    if not results:
        return print("No results yet. The smallest comparison: python -m studies.results --run ours direct --steps 125")
    if args.keep:
        text = "[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n"
        write_whole(file, lambda part: part.write_text(text, encoding="utf-8"))
    print(f"\n{table(results)}\n\nIn %, pair → graft, ± standard deviation over seeds. steps: of the last stage.")
    route = [r for r in results if r["arm"] in ROUTE]
    for name, some, measures in (("flops.png", [r for r in results if r not in route], MAIN),
                                 ("route.png", route, [*MEASURES][1:])):
        if some:
            picture, figure = (ASSETS if args.keep else Path(args.out)) / name, plot(some, measures)
            write_whole(picture, lambda part: figure.savefig(part, format="png"))
            print(picture)


if __name__ == "__main__":
    sys.exit(run_cli(main))

"""
What do pair, graft and direct know? Held-out images, asked freely and with options; what the image brings; the demo.

    rows = compare(vlm, surrogate, n=40, before=…, direct=…)    # one row per task and system
    print(table(rows))

before: the encoder as training starts, with a random projector, and the full LLM.
pair:   encoder + surrogate, what was trained.
graft:  the same encoder + the full LLM.
direct: an encoder trained on the full LLM.
text:   the caption in the image's place, read by the full LLM; "text, pair": by the surrogate (no bound for the pair,
        whose encoder was trained to this surrogate).
"""
import dataclasses
import math
import random
import textwrap

import torch
from tqdm import tqdm

from cli import UserError, printable
from data import world
from data.batches import collate, pad
from generation import KVCache, check_logits, collect
from surrogate import run_both

TASKS = world.TRAINED_TASKS + world.KNOWLEDGE_TASKS
SPLITS = {      # of data.world: what is asked about its pictures, and what is special about them
    "test": (TASKS, ""),
    "untaught": (("read", "flag") + world.KNOWLEDGE_TASKS, ", of what no training named"),
    "restyled": (("read", "color", "shape"), ", in fonts and sizes never drawn"),
}
EVAL_SEED = 7           # the stream of held-out images; split "test" never meets the stream of training
FRESH_SEED = 4242       # the stream of training samples over which cross-entropy is measured: never trained

# ---- Answers, free and ranked ---------------------------------------------------------------------------------------


def sum_logp(decoder, before, tokens, real, chunk=256):
    """(log p (n,), whether each of them is the likeliest (n,)) of the tokens (n, T) of each row, of which `real` (n, T)
    count; before (n, T, C): the states that predict them."""
    logp, likeliest = torch.zeros(tokens.shape, device=tokens.device), torch.ones_like(real)
    parts = []
    for x, t in zip(before[real].split(chunk), tokens[real].split(chunk)):          # logits are large: a few at a time
        logits = check_logits(decoder.logits(x).float())                            # (chunk, vocab)
        parts.append((logits.log_softmax(-1).gather(1, t[:, None])[:, 0], logits.argmax(-1) == t))
    logp[real], likeliest[real] = (torch.cat(part) for part in zip(*parts))
    return logp.sum(1), likeliest.all(1)


class Reading:
    """Prompts that were read once, by the LLM or, through their common trunk, by the surrogate and the LLM: from here
    options are ranked and answers said. Results: {"pair": …, "graft": …}, without a surrogate only the latter."""

    @torch.no_grad()
    def __init__(self, embeds, lengths, llm, surrogate=None):
        """embeds (B, T, d), padded on the right; lengths (B,)."""
        B, T, _ = embeds.shape
        self.decoders = {"graft": llm} if surrogate is None else {"pair": surrogate, "graft": llm}
        self.caches = [KVCache(decoder, B, T) for decoder in self.decoders.values()]
        self.last = [x[torch.arange(B), lengths - 1] for x in self.run(embeds, self.caches)]        # (B, C) each
        for cache in self.caches:
            cache.advance(T, None if int(lengths.min()) == T else lengths)

    def run(self, x, caches):
        """The hidden states (B, T, C) of each decoder, in a list."""
        if len(caches) == 1:
            return [self.decoders["graft"].run(x, cache=caches[0])]
        return run_both(self.decoders["pair"], self.decoders["graft"], x, caches)

    @torch.no_grad()
    def option_logp(self, options, chunk=16):
        """options: for each prompt K lists of token ids. Of each decoder ([log p (K,) of each prompt's options], [would
        they be said greedily? (K,)]). chunk: how many at a time, since each needs a copy of its prompt's cache."""
        pairs = [(row, ids) for row, lists in enumerate(options) for ids in lists]
        scores = {name: [] for name in self.decoders}
        for i in range(0, len(pairs), chunk):
            rows, ids = map(list, zip(*pairs[i:i + chunk]))
            tokens = pad(ids)                                                                       # (n, L)
            real = torch.arange(tokens.shape[1]) < torch.tensor([len(t) for t in ids])[:, None]     # (n, L)
            tokens, real = tokens.to(self.last[0].device), real.to(self.last[0].device)
            x = self.decoders["graft"].embed(tokens)                                                # (n, L, d)
            hidden = self.run(x, [cache.repeat(1, tokens.shape[1], rows) for cache in self.caches])
            for (name, decoder), last, h in zip(self.decoders.items(), self.last, hidden):
                before = torch.cat([last[rows][:, None], h[:, :-1]], dim=1)                         # (n, L, C)
                scores[name].append(sum_logp(decoder, before, tokens, real))
        sizes = [len(lists) for lists in options]
        return {name: [torch.cat(part).split(sizes) for part in zip(*parts)] for name, parts in scores.items()}

    def streams(self, max_new_tokens):
        """Yield (decoder, generator of its greedy answers, tokens (B,) at a time)."""
        for (name, decoder), x, cache in zip(self.decoders.items(), self.last, self.caches):
            yield name, decoder.decode(x, cache.repeat(1, max_new_tokens), max_new_tokens)

    def say(self, max_new_tokens, stop):
        """{decoder: [token ids of its greedy answer to each prompt]}"""
        return {name: collect(stream, stop) for name, stream in self.streams(max_new_tokens)}


def option_ids(tokenizer, options):
    """Answers -> their token ids, the end of the turn included."""
    return [tokenizer.encode_text(option) + tokenizer.turn_end for option in options]


def answer(embeds, lengths, samples, llm, surrogate=None, tokenizer=None, max_new_tokens=40):
    """Answers to prompts embeds (B, T, d) about samples: {"pair": …, "graft": …} (only the latter without a surrogate),
    each a list of (index of the likeliest of the sample's options, greedy answer)."""
    reading = Reading(embeds, lengths, llm, surrogate)
    ranked = reading.option_logp([option_ids(tokenizer, s.options) for s in samples])
    said = reading.say(max_new_tokens, tokenizer.stop_tokens)
    return {name: [(int(logp.argmax()), tokenizer.decode(ids).strip()) for logp, ids in zip(logps, said[name])]
            for name, (logps, _) in ranked.items()}


def told(sample):
    """The sample's chat with the caption in the image's place."""
    return [m | dict(content=m["content"].replace("<image>", " " + sample.caption)) for m in sample.messages]


def systems(vlm, surrogate, samples, before=None, direct=None, text=True, max_new_tokens=40):
    """Yield (name, [(choice, said), …]) of every system that is there, about the same samples; text: captions, too."""
    images, chats = [s.image for s in samples], [s.messages[:-1] for s in samples]

    def ask_all(vlm, chats, images, surrogate=None):
        embeds, lengths = vlm.embed_prompts([vlm.prompt(c) for c in chats], images)
        return answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer, max_new_tokens)

    if before is not None:
        yield "before", ask_all(before, chats, images)["graft"]
    ours = ask_all(vlm, chats, images, surrogate)
    yield from ((name, ours[name]) for name in ("pair", "graft") if name in ours)
    if direct is not None:
        yield "direct", ask_all(direct, chats, images)["graft"]
    if text:
        said = ask_all(vlm, [told(s)[:-1] for s in samples], [], surrogate)
        yield from ((name, said[part]) for name, part in (("text", "graft"), ("text, pair", "pair")) if part in said)


def grade(ask, tasks, n=40, batch=20, seed=EVAL_SEED, split="test", progress=True, draw=world.world):
    """Ask about n held-out images a task, freely and with options. Returns rows: one dict per task and system.

    ask: samples -> (name of a system, its [(choice, said), …]) of every system, as `systems` yields them. said: the
    greedy answer, up to 40 tokens, holds the right word and no rival: 0 or 1 for every image. ranked: of the options,
    the right one is the likeliest. about: subject and question of every image, which may come again.
    draw: (task, index, seed, split) -> a sample, e.g. a data.sources.HeldOut.
    """
    if min(n, batch) < 1:
        raise UserError(f"n={n}, batch={batch}: both must be at least 1")
    total, got, chance, about = n * len(tasks), {}, [], []
    with tqdm(total=total, desc=f"images, {split}", unit="image", disable=not progress) as bar:
        for i in range(0, total, batch):                    # drawn as they are needed: n may be a million
            samples = [draw(tasks[k // n], k % n, seed, split) for k in range(i, min(i + batch, total))]
            chance += [1 / len(s.options) for s in samples]
            about += [f"{s.caption}: {s.task}" for s in samples]
            for name, r in ask(samples):
                got.setdefault(name, []).extend((int(world.is_right(said, s)), int(s.options[choice] == s.answer))
                                                for s, (choice, said) in zip(samples, r))
            bar.update(len(samples))
    rows = []
    for k, task in enumerate(tasks):
        mine = slice(k * n, (k + 1) * n)
        for name, r in got.items():
            rows.append(dict(task=task, split=split, trained=task in world.TRAINED_TASKS, system=name,
                             said=[said for said, _ in r[mine]], ranked=[ranked for _, ranked in r[mine]],
                             chance=sum(chance[mine]) / n, about=about[mine]))
    return rows


def compare(vlm, surrogate=None, n=40, batch=20, tasks=None, seed=EVAL_SEED, before=None, direct=None, text=True,
            split="test", progress=True, draw=world.world):
    """The rows of `grade` for all `systems` that are there. tasks: default those of the split."""
    ask = lambda samples: systems(vlm, surrogate, samples, before, direct, text)
    return grade(ask, tasks or SPLITS[split][0], n, batch, seed, split, progress, draw)


def bootstrap(values, clusters, weights=None, draws=1000):
    """(mean, low, high): a mean and its 95 % interval, by drawing whole clusters anew (Efron's bootstrap).

    values, clusters, weights (how many items a value sums up; default 1): lists. Many pictures of one subject, asked
    the same, are not so many independent tests."""
    sums = {}
    for v, c, w in zip(values, clusters, weights or [1] * len(values)):
        v0, w0 = sums.get(c, (0, 0))
        sums[c] = v0 + v, w0 + w
    sums = torch.tensor(list(sums.values()), dtype=torch.float64)                       # (clusters, 2)
    drawn = torch.randint(len(sums), (draws, len(sums)), generator=torch.Generator().manual_seed(0))
    total, whole = sums[drawn].sum(1), sums.sum(0)                                      # (draws, 2), (2,)
    low, high = (total[:, 0] / total[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (whole[0] / whole[1]).item(), low, high


# ---- What the image brings ------------------------------------------------------------------------------------------


def wrong_images(samples):
    """The same samples with the image of another one: the next of the same kind that has another caption."""
    kind = lambda s: "sign" if "sign" in s.caption else "flag" if "flag" in s.caption else "shape"
    other = lambda i: next((o for o in samples[i + 1:] + samples[:i]
                            if kind(o) == kind(samples[i]) and o.caption != samples[i].caption), samples[i - 1])
    return [dataclasses.replace(s, image=other(i).image) for i, s in enumerate(samples)]


@torch.no_grad()
def cross_entropies(vlm, samples, batch=16, progress=None):
    """Of every sample: (sum of -log p of its targets, number of targets), two lists."""
    size, losses, counts = vlm.encoder.config.image_size, {}, {}
    order = sorted(range(len(samples)), key=lambda i: sum(len(m["content"]) for m in samples[i].messages))
    for rows in (order[i:i + batch] for i in range(0, len(order), batch)):      # of about one length: little padding
        b = collate([samples[i] for i in rows], vlm.tokenizer, vlm.n_visual, size)
        real = (b["targets"] >= 0).to(vlm.decoder.device)                               # (B, T)
        x = vlm.decoder.run(vlm.embed(b["tokens"], b["pixels"]))                        # (B, T, C)
        logp, _ = sum_logp(vlm.decoder, x, b["targets"].to(x.device), real)             # (B,)
        losses |= zip(rows, (-logp).tolist())
        counts |= zip(rows, real.sum(1).tolist())
        if progress:
            progress.update(len(rows))
    return [losses[i] for i in range(len(samples))], [counts[i] for i in range(len(samples))]


def image_brings(vlm, surrogate=None, n=512, before=None, direct=None, progress=True, samples=None):
    """What an image brings: cross-entropy per target with another image of the same kind, minus with the right one.

    Over `samples`, by default the first n of a stream of training's kind that no training saw. Returns one dict per
    system: right, wrong, brings, and low, high, its 95 % interval. 0: the decoder learns nothing from the image.
    """
    samples = samples or [world.World(FRESH_SEED)[i] for i in range(n)]
    n = len(samples)
    other, clusters = wrong_images(samples), [f"{s.caption}: {s.messages[0]['content']}" for s in samples]
    asked = dict(before=(before, before and before.decoder), pair=(vlm, surrogate), graft=(vlm, vlm.decoder),
                 direct=(direct, direct and direct.decoder))
    asked, rows, llm = {k: v for k, v in asked.items() if None not in v}, [], vlm.decoder
    with tqdm(total=2 * n * len(asked), desc="what the image brings", unit="sample", disable=not progress) as bar:
        for name, (system, decoder) in asked.items():
            system.decoder = decoder
            right, counts = cross_entropies(system, samples, progress=bar)
            wrong, _ = cross_entropies(system, other, progress=bar)
            system.decoder = llm
            gain, low, high = bootstrap([w - r for w, r in zip(wrong, right)], clusters, counts)
            rows.append(dict(system=name, samples=n, right=sum(right) / sum(counts), wrong=sum(wrong) / sum(counts),
                             brings=gain, low=low, high=high))
    return rows


# ---- Tables ---------------------------------------------------------------------------------------------------------


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(map(str, r))} |" for r in (head, ["---"] * len(head), *rows))


def pooled(rows, measure, system):
    """(mean, low, high) of all the images of `rows` that a system was asked about; None if it was not."""
    mine = [r for r in rows if r["system"] == system]
    if not mine:
        return None
    return bootstrap([x for r in mine for x in r[measure]], [a for r in mine for a in r["about"]])


def groups(rows):
    """{title: rows} of each task, of the trained and of the never-trained ones; * marks what was never trained."""
    out = {}
    for r in rows:
        out.setdefault(r["task"] + ("" if r["trained"] else " *"), []).append(r)
    out["**trained, mean**"] = [r for r in rows if r["trained"]]
    out["**never trained, mean** *"] = [r for r in rows if not r["trained"]]
    return {title: mine for title, mine in out.items() if mine}


def table(rows):
    """Rows of `compare` as Markdown: said freely, then ranked, each in % with its 95 % interval."""
    names, out = list(dict.fromkeys(r["system"] for r in rows)), []
    for split in dict.fromkeys(r["split"] for r in rows):
        mine = [r for r in rows if r["split"] == split]
        for measure, title in (("said", "said freely, right"), ("ranked", "ranked first among options")):
            cells = [[name, *(f"{m:.0%} ({low:.0%}–{high:.0%})" for m, low, high in
                              (pooled(group, measure, s) or (math.nan,) * 3 for s in names))]
                     for name, group in groups(mine).items()]
            out.append(markdown([title + SPLITS[split][1], *names], cells))
    return "\n\n".join(out)


def brings_table(rows):
    """Rows of `image_brings` as Markdown."""
    return markdown(["cross-entropy", *(r["system"] for r in rows)], [
        ["with the right image", *(f"{r['right']:.3f}" for r in rows)],
        ["with another of its kind", *(f"{r['wrong']:.3f}" for r in rows)],
        ["**the image brings**", *(f"{r['brings']:.3f} ({r['low']:.2f}–{r['high']:.2f})" for r in rows)]])


# ---- Demo -----------------------------------------------------------------------------------------------------------

# Six held-out images, chosen: four that the graft gets right, though no image holds the answer and no training showed
# it; one that both know; one that the pair reads and the graft does not.
DEMO = [("language", ("flag", "Finland")), ("capital", ("flag", "Algeria")), ("capital", ("flag", "Hungary")),
        ("continent", ("flag", "Lithuania")), ("flag", ("flag", "Sweden")), ("color", ("shape", "yellow", "circle"))]


def demo(vlm, surrogate, before=None):
    """The answers about the six images of DEMO, as `say` returns them."""
    return say(vlm, surrogate, [world.sample_of(random.Random(f"demo/{task}/{subject}"), task, subject)
                                for task, subject in DEMO], before)


def say(vlm, surrogate, samples, before=None, max_new_tokens=40):
    """The free answers of all three to samples: [(sample, {"before": text, "pair": text, "graft": text}), …]."""
    said = {name: [" ".join(text.split()) for _, text in answers] for name, answers in
            systems(vlm, surrogate, samples, before, text=False, max_new_tokens=max_new_tokens)}
    return [(s, {name: texts[i] for name, texts in said.items()}) for i, s in enumerate(samples)]


def question_of(sample):
    """The question as a person would ask it, without the words around the image."""
    question = sample.messages[0]["content"].split("<image>, ")[-1]
    return ("* " if sample.task in world.KNOWLEDGE_TASKS else "") + question[:1].upper() + question[1:]


def show_demo(examples):
    """Print what `say` returns."""
    for sample, said in examples:
        print(f"\n{sample.caption} | {question_of(sample)}")
        for name, text in said.items():
            right = "right" if world.is_right(text, sample) else "-"
            print(f"  {name + ':':7s}{right:7s}{printable(textwrap.shorten(text, 100, placeholder=' …'))}")
    print("\n* never trained: no image holds the answer, the full LLM knows it. "
          "Before the bar: what the image shows, which no model is told.")


def plot_demo(examples, columns=3):
    """A figure of what `say` returns: image, question, the answers before training, of pair and graft (blue: right)."""
    from matplotlib.figure import Figure
    lines = math.ceil(len(examples) / columns)
    fig = Figure(figsize=(3.4 * columns, 4.8 * lines), dpi=100, facecolor="white", layout="constrained")
    axes = fig.subplots(2 * lines, columns, squeeze=False, gridspec_kw=dict(height_ratios=[2.4, 2] * lines))
    for ax in axes.flat:
        ax.axis("off")
    for i, (sample, said) in enumerate(examples):
        picture, words = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        picture.imshow(sample.image, interpolation="nearest")
        picture.set_title(textwrap.fill(question_of(sample), 32), fontsize=10, fontweight="bold")
        for k, (name, text) in enumerate(said.items()):
            right = world.is_right(text, sample)
            short = textwrap.shorten(text, 120, placeholder=" …")
            shown = textwrap.fill(f"{name} {'✓' if right else '✗'}  {printable(short)}", 48)
            words.text(0, 1 - 0.36 * k, shown, transform=words.transAxes, va="top", fontsize=9, parse_math=False,
                       color="#0072B2" if right else "#B34700")         # $5 and $6 is no formula
    return fig

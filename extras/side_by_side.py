"""
Pair and graft side by side about one image: their answers, their ranking, and a look inside. What extras/web.py shows.

    for said in talk(vlm, surrogate, prompt, image): ...        # both answer at once, token by token
    rank(vlm, surrogate, prompt, image, options)                # [(option, probability), …]: of the pair
    figure = plot_lens(vlm, surrogate, prompt, image, answer)   # what each layer would say next: the logit lens

The lens is nostalgebraist's (2020): every layer's hidden state through the final norm and the LM head. The paper's
prediction trajectory (section 3.1) sums the same up in a number for each layer.
"""
import random
import time

import numpy as np
import torch
from matplotlib.figure import Figure

import evaluate
from data import world
from model import KVCache
from surrogate import kept_layers

# ---- Answers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def talk(vlm, surrogate, prompt, image, max_new_tokens=40):
    """Answer with both at once. Yields {"pair": (token ids so far, seconds, tokens/s), "graft": …} after each token."""
    embeds, _ = vlm.embed_prompts([prompt], [image])
    streams = {name: decoder.stream(embeds, max_new_tokens=max_new_tokens)
               for name, decoder in (("pair", surrogate), ("graft", vlm.decoder))}
    said, times = ({name: [] for name in streams} for _ in range(2))        # times: seconds of each token
    while streams:
        for name, stream in list(streams.items()):
            start = time.perf_counter()
            token = int(next(stream, vlm.tokenizer.turn_end[0]))
            times[name].append(time.perf_counter() - start)
            if token in vlm.tokenizer.stop_tokens:
                del streams[name]
            else:
                said[name].append(token)
        yield {name: (said[name], sum(t), (len(t) - 1) / max(sum(t[1:]), 1e-9)) for name, t in times.items()}


@torch.no_grad()
def rank(vlm, decoder, prompt, image, options):
    """[(option, its probability among the options), …], the likeliest first."""
    embeds, _ = vlm.embed_prompts([prompt], [image])                                        # (1, T, d)
    cache = KVCache(decoder, 1, embeds.shape[1])
    last = decoder.run(embeds, cache=cache)[0, -1]                                          # (d,)
    cache.advance(embeds.shape[1])
    run = lambda x, caches: [decoder.run(x, cache=caches[0])]
    logp, = evaluate.rank(options, vlm.tokenizer, run, [decoder], [cache], [last])             # (K,)
    return sorted(zip(options, logp.softmax(0).tolist()), key=lambda pair: -pair[1])


def sample_of(question, subject):
    """The world's sample, with its options, of this question about this picture. None if they are not the world's."""
    kind, name = subject[:2]
    for task in evaluate.TASKS:
        if task in world.KNOWLEDGE_TASKS:
            asked, fits = world.KNOWLEDGE_QUESTIONS[task][kind == "flag"], kind != "shape" and name in world.FACTS
        else:
            asked, of = sum(world.QUESTIONS[task], []), dict(read="sign", flag="flag", color="shape", shape="shape")
            fits = subject in world.SUBJECTS and kind == of.get(task, kind)
        if fits and question in asked:
            return world.sample_of(random.Random(f"web/{subject}"), task, subject)


# ---- A look inside --------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers_say(decoder, x, at, ids, start=0):
    """What the layers from `start` on would say at the n positions `at` of x (1, T, d), where ids (n,) follow:
    (likeliest token, its probability, log p of `ids`), each (layers, n)."""
    rows = []
    for i in range(start, len(decoder.model.layers)):
        x = decoder.run(x, i, i + 1)
        logp = decoder.logits(x[0, at]).float().log_softmax(-1)                     # (n, vocab)
        best, token = logp.max(-1)
        rows.append((token, best.exp(), logp.gather(1, ids[:, None])[:, 0]))
    return [torch.stack(column).cpu() for column in zip(*rows)]


def plot_lens(vlm, surrogate, prompt, image, ids, columns=11):
    """Layer by layer, what comes next in the answer `ids`: of the full LLM, and of the surrogate from where it branches
    off; before them how far each layer's prediction is from the last one's, as in the paper: a figure."""
    llm, ids = vlm.decoder, (ids + vlm.tokenizer.turn_end)[:columns]
    embeds, _ = vlm.embed_prompts([prompt + ids], [image])
    at, targets = slice(len(prompt) - 1, -1), torch.tensor(ids, device=llm.device)
    trunk, L, n = surrogate.trunk, len(llm.model.layers), len(ids)
    with torch.no_grad():
        branch = surrogate.run(embeds, 0, trunk)
    full = layers_say(llm, embeds, at, targets)
    ours = layers_say(surrogate, branch, at, targets, trunk)
    logp = full[2].log_softmax(1)                                                   # normalised over the answer
    kl = (logp.exp() * (logp - logp[-1])).sum(1)                                    # (L,)
    ends = [*kept_layers(surrogate.ranges, L)[trunk:], L]       # layer j of the branch replaces ends[j] … ends[j+1] - 1
    spans = list(zip(ends, ends[1:]))

    fig = Figure(figsize=(11.5, 7), dpi=110, layout="constrained")
    curve, left, right = fig.subplots(1, 3, sharey=True, gridspec_kw=dict(width_ratios=[1.6, 6, 6]))
    curve.plot(kl, range(L), "o-", color="#0072B2", ms=3)
    curve.set(xlabel="KL(layer || last), nats", ylabel="layer", title="prediction trajectory")
    read = lambda i: vlm.tokenizer.decode([i], skip_special=False).replace("\n", "↵").strip()[:10] or "␣"
    for ax, title, cmap, (tokens, p, _), rows in (
            (left, "the full LLM (graft)", "Blues", full, [(i, i + 1) for i in range(L)]),
            (right, f"the surrogate (pair) branches off after layer {trunk - 1}", "Oranges", ours, spans)):
        grid = np.full((L, n), np.nan)
        for (first, end), words, shade in zip(rows, tokens.tolist(), p.tolist()):
            grid[first:end] = shade
            for k, word in enumerate(words):
                ax.text(k, (first + end - 1) / 2, read(word), ha="center", va="center", fontsize=7, parse_math=False,
                        color="white" if shade[k] > 0.6 else "black", in_layout=False)
        ax.imshow(grid, cmap=cmap, vmin=0, vmax=1, aspect="auto", origin="lower")
        ax.set_title(title, fontsize=11)
        ax.set_xticks(range(n), [read(i) for i in ids], rotation=45, ha="right", fontsize=8, parse_math=False)
        ax.set_xlabel("the graft's answer: the token that comes next")
    right.text((n - 1) / 2, trunk / 2, "shared with the full LLM", ha="center", color="#777777")
    for ax in (curve, left, right):
        ax.axhline(trunk - 0.5, color="#B34700", ls="--", lw=1.2)
    for first, end in spans:
        if end - first > 1:
            curve.axhspan(first - 0.5, end - 0.5, color="#E69F00", alpha=0.25)
            right.axhspan(first - 0.5, end - 0.5, fill=False, ec="#B34700", lw=1)
    return fig

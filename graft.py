"""
Zero-shot grafting: plug an encoder that was trained against the surrogate into the full LLM.

    python graft.py                                         # compare pair and graft on held-out images
    python graft.py --image photo.png --question "What word is on the sign?"
    python graft.py --chat --image photo.png                # a conversation about one image

pair:  encoder + surrogate, what was trained.
graft: the same encoder + the full LLM, which never saw a visual token before.
"""
import argparse
import json
import math
import platform
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import weights
import world
from model import VLM, KVCache, Llama, collect
from surrogate import fork, load_surrogate
from tokenizer import Tokenizer

TASKS = world.TRAINED_TASKS + world.KNOWLEDGE_TASKS
EVAL_SEED = 7           # the stream of held-out images; split "test" never meets the stream of training

# ---------------------------------------------------------------------------------------------------------------------
# Compare


def option_logp(decoder, before, tokens, lengths, chunk=256):
    """log p of each option: before (n, T, C) the hidden states that predict its tokens (n, T), of which lengths (n,) are real."""
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]   # (n, T)
    logp = torch.zeros(tokens.shape, device=tokens.device)
    pieces = zip(before[real].split(chunk), tokens[real].split(chunk))              # a vocabulary of logits for a few at a time
    logp[real] = torch.cat([decoder.logits(x).float().log_softmax(-1).gather(1, t[:, None])[:, 0] for x, t in pieces])
    return logp.sum(1)


@torch.no_grad()
def answer(embeds, lengths, samples, llm, surrogate=None, tokenizer=None, max_new_tokens=40):
    """What the LLM, and with `surrogate` the surrogate, make of the same prompts: embeds (B, T, d), of which lengths (B,) are real.

    Returns {"pair": …, "graft": …} (only the latter without a surrogate), each a list of (index of the likeliest of the sample's
    options, greedy answer). Both decoders run in one pass through their common trunk: once over the prompt, once over all options.
    """
    B, T, _ = embeds.shape
    ragged = None if int(lengths.min()) == T else lengths
    decoders = {"graft": llm} if surrogate is None else {"pair": surrogate, "graft": llm}
    caches = [KVCache(d, B, T) for d in decoders.values()]

    def run(x, caches):
        return [llm.run(x, cache=caches[0])] if surrogate is None else fork(surrogate, llm, x, caches)

    last = [x[torch.arange(B), lengths - 1] for x in run(embeds, caches)]           # (B, C): behind the prompt
    for cache in caches:
        cache.advance(T, ragged)

    K = len(samples[0].options)
    options = [tokenizer.encode_text(o) + tokenizer.turn_end for s in samples for o in s.options]
    n = torch.tensor([len(o) for o in options])                                     # (B*K,)
    tokens = torch.zeros(B * K, int(n.max()), dtype=torch.long)
    for row, o in zip(tokens, options):
        row[:len(o)] = torch.tensor(o)
    tokens, n = tokens.to(llm.device), n.to(llm.device)
    hidden = run(llm.embed(tokens), [c.repeat(K, tokens.shape[1]) for c in caches])

    out = {}
    for (name, decoder), x, h, cache in zip(decoders.items(), last, hidden, caches):
        before = torch.cat([x.repeat_interleave(K, 0)[:, None], h[:, :-1]], dim=1)  # (B*K, T, C)
        scores = option_logp(decoder, before, tokens, n).view(B, K)
        stream = decoder.decode(x, cache.repeat(1, max_new_tokens), max_new_tokens)
        texts = [tokenizer.decode(t).strip() for t in collect(stream, tokenizer.stop_tokens)]
        out[name] = list(zip(scores.argmax(1).tolist(), texts))
    return out


def systems(vlm, surrogate, direct, samples):
    """{"text", "direct", "graft", "pair": [(choice, said), …]} of the same samples. "text" has the caption in the image's place:
    what the LLM knows."""
    images, chats = [s.image for s in samples], [s.messages[:-1] for s in samples]
    told = [[m | dict(content=m["content"].replace("<image>", " " + s.caption)) for m in c] for s, c in zip(samples, chats)]
    out = {"text": answer(*vlm.embed_prompts([vlm.prompt(c) for c in told], []), samples, vlm.decoder, None, vlm.tokenizer)["graft"]}
    if direct is not None:
        out["direct"] = answer(*direct.embed_prompts([direct.prompt(c) for c in chats], images), samples, direct.decoder, None, vlm.tokenizer)["graft"]
    ours = answer(*vlm.embed_prompts([vlm.prompt(c) for c in chats], images), samples, vlm.decoder, surrogate, vlm.tokenizer)
    return out | {name: ours[name] for name in ("graft", "pair") if name in ours}


def wilson(right, n):
    """95 % interval of a proportion, as (low, high) (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def compare(vlm, surrogate=None, n=40, batch=8, tasks=TASKS, seed=EVAL_SEED, direct=None, progress=True):
    """Ask about n held-out images a task, freely and with options. Returns rows: one dict per task and system; and examples."""
    rows, examples = [], []
    bar = tqdm(total=n * len(tasks), desc="held-out images", unit="image", disable=not progress)
    for task in tasks:
        samples, got = [world.world(task, i, seed, "test") for i in range(n)], {}
        # images of one kind have options of one number
        for i in range(0, n, batch):
            for name, r in systems(vlm, surrogate, direct, samples[i:i + batch]).items():
                got.setdefault(name, []).extend(r)
            bar.update(len(samples[i:i + batch]))
        for name, r in got.items():
            ranked = sum(s.options[choice] == s.answer for s, (choice, _) in zip(samples, r))
            said = sum(world.is_right(text, s) for s, (_, text) in zip(samples, r))
            rows.append(dict(task=task, trained=task in world.TRAINED_TASKS, system=name, samples=n, said=said / n, ranked=ranked / n,
                             chance=sum(1 / len(s.options) for s in samples) / n))
        examples += [(s, {name: (s.options[r[i][0]], r[i][1]) for name, r in got.items()}) for i, s in enumerate(samples[:2])]
    bar.close()
    return rows, examples


def table(rows):
    """Rows of `compare` as Markdown: said freely, ranked, each in % with the half width of its 95 % interval for the first."""
    names, lines = list(dict.fromkeys(r["system"] for r in rows)), []
    for measure, title in (("said", "said freely, right"), ("ranked", "ranked first among options")):
        lines += [f"| {title} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        groups = [(task + ("" if trained else " *"), [r for r in rows if r["task"] == task])
                  for task, trained in dict.fromkeys((r["task"], r["trained"]) for r in rows)]
        groups += [(title, [r for r in rows if r["trained"] == trained]) for title, trained in (("**trained, mean**", True), ("**never trained, mean** *", False))]
        for title, mine in groups:
            cells = []
            for name in names:
                own = [r for r in mine if r["system"] == name]
                right, total = sum(r[measure] * r["samples"] for r in own), sum(r["samples"] for r in own)
                low, high = wilson(right, total)
                cells.append(f"{right / max(1, total):.1%} ({low:.0%}–{high:.0%})" if own else "")
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def plot_examples(examples, path):
    """A picture of images, each with the question, the option that every system ranks first, and what it says by itself."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    columns = min(4, len(examples))
    lines = math.ceil(len(examples) / columns)
    side, title, text = 2.7, 0.5, 0.54 * max(len(answers) for _, answers in examples)       # inches
    height = (side + title + text) * lines + 0.4
    fig, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, height), dpi=100, squeeze=False)
    fig.subplots_adjust(left=0.01, right=0.99, wspace=0.05, hspace=(title + text) / side, top=1 - (title + 0.4) / height, bottom=text / height)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (sample, answers) in zip(axes.flat, examples):
        ax.imshow(sample.image, interpolation="nearest")
        question = sample.messages[0]["content"].split("<image>, ")[-1]
        star = "* " if sample.task in world.KNOWLEDGE_TASKS else ""
        ax.set_title(textwrap.fill(star + question[:1].upper() + question[1:], 42), fontsize=9)
        for i, (name, (choice, text)) in enumerate(answers.items()):
            # parse_math: an answer with two $ is no formula
            options = dict(transform=ax.transAxes, va="top", parse_math=False)
            ax.text(0, -0.04 - 0.2 * i, f"{name}: {choice}", fontsize=9, color="#2d6a4f" if choice == sample.answer else "#c1121f", **options)
            ax.text(0, -0.13 - 0.2 * i, f"says: {' '.join(text.split())[:48]}", fontsize=7, color="#666666", **options)
    fig.suptitle("the likeliest of the options (green: right, red: wrong), and below what the model says by itself   * never trained",
                 fontsize=9, y=1 - 0.15 / height)
    weights.write_whole(path, lambda part: fig.savefig(part, format="png"))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# Ask


def ask(vlm, image, messages, max_new_tokens=128, temperature=0.0, top_p=1.0, show=print):
    """Answer a conversation about an image, handing pieces of text to `show` as they come. Returns (answer, timings)."""
    start = time.perf_counter()
    embeds, _ = vlm.embed_prompts([vlm.prompt(messages)], [image] if image is not None else [])
    first, count = None, 0

    def ids():
        nonlocal first, count
        for token in vlm.decoder.stream(embeds, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p):
            first = first or time.perf_counter()
            if int(token) in vlm.tokenizer.stop_tokens:
                return
            count += 1
            yield int(token)

    text = ""
    for piece in vlm.tokenizer.decode_stream(ids()):
        text += piece
        show(piece)
    end = time.perf_counter()
    rate = f", then {(count - 1) / (end - first):.1f} tokens/s" if count > 1 else ""
    return text.strip(), f"first token after {first - start:.2f} s{rate}"


def show_piece(piece):
    print(piece, end="", flush=True)


def chat(vlm, image, options):
    """Converse on the terminal until an empty line or end of input."""
    messages = []
    print("Ask about the image; an empty line ends the conversation.")
    while True:
        try:
            question = input("\nyou> ").replace("<image>", "").strip()      # the one image is in the first turn
        except EOFError:
            break
        if not question:
            break
        messages.append({"role": "user", "content": question if messages else data.wrap(question)})
        print("llm> ", end="")
        text, timing = ask(vlm, image, messages, show=show_piece, **options)
        print(f"\n     [{timing}]")
        messages.append({"role": "assistant", "content": text})


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", help="full LLM: folder, .gguf file or hub name (default: the one that the encoder was trained for)")
    parser.add_argument("--encoder", default="assets/encoder.safetensors", help="checkpoint of the stage encoder (default: %(default)s)")
    parser.add_argument("--full", default="assets/full.safetensors", help="an encoder trained directly on the full LLM, compared where present (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=40, metavar="N", help="held-out images a task for the comparison (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=EVAL_SEED, help="which held-out images (default: %(default)s)")
    parser.add_argument("--image", help="ask about this picture instead")
    parser.add_argument("--question", default="Describe the image.", help="what to ask about --image (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="converse about --image (without one: about a held-out sign)")
    parser.add_argument("--pair", action="store_true", help="ask the encoder-surrogate pair in place of the graft")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer to --image or --chat (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that hold this mass (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--out", default="runs/graft", help="folder for results.json and examples.png (default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.eval, args.batch, args.max_new_tokens) < 1:
        raise ValueError("--eval, --batch and --max-new-tokens must be at least 1")
    if args.temperature < 0:
        raise ValueError("--temperature must be 0 (greedy) or more")
    image = data.open_image(args.image) if args.image else None

    start = time.perf_counter()
    _, about = weights.read_checkpoint(args.encoder)
    name = args.llm or about.get("llm", weights.DEFAULT_LLM)
    dtype = getattr(torch, args.dtype)
    llm = Llama.from_pretrained(name, dtype, args.device)
    vlm = VLM.from_pretrained(llm, args.encoder, tokenizer=Tokenizer.from_pretrained(weights.find(name)))

    if image is not None or args.chat:
        if image is None:
            image = world.world("read", 3, args.seed, "test").image
            Path(args.out).mkdir(parents=True, exist_ok=True)
            image.save(Path(args.out) / "sign.png")
            print(f"No --image: the conversation is about {args.out}/sign.png")
        if args.pair:
            vlm.decoder = load_surrogate(llm, args.encoder)
        options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
        if args.chat:
            return chat(vlm, image, options)
        _, timing = ask(vlm, image, [{"role": "user", "content": data.wrap(args.question)}], show=show_piece, **options)
        print(f"\n[{timing}]")
        return

    surrogate = load_surrogate(llm, args.encoder) if about.get("ranges") else None
    full_llm = weights.read_checkpoint(args.full)[1].get("llm") if args.full and Path(args.full).exists() else None
    full = VLM.from_pretrained(llm, args.full, tokenizer=vlm.tokenizer) if full_llm == name else None
    loaded = time.perf_counter() - start
    rows, examples = compare(vlm, surrogate, args.eval, args.batch, seed=args.seed, direct=full)
    layers = f"{surrogate.config.num_hidden_layers} of {llm.config.num_hidden_layers} layers" if surrogate else "no surrogate"
    print(f"\npair:  encoder + surrogate ({layers})\ngraft: the same encoder + the full {name}, zero-shot" +
          ("\nfull:  an encoder trained on the full LLM" if full else "") + f"\n\n{table(rows)}\n")
    print(f"{args.eval} held-out images a task; ranked: the right option is the likeliest; exact: the greedy answer is the expected one.\n"
          f"* never trained: the image does not hold the answer, the LLM has to know it.")
    results = dict(command=" ".join(["python", "graft.py", *(sys.argv[1:] if argv is None else argv)]), encoder=args.encoder, about=about, llm=name,
                   samples=args.eval, seed=args.seed, dtype=args.dtype, device=args.device, torch=torch.__version__, python=platform.python_version(),
                   load_seconds=round(loaded, 1), compare_seconds=round(time.perf_counter() - start - loaded, 1), rows=rows)
    weights.write_whole(Path(args.out) / "results.json", lambda part: part.write_text(json.dumps(results, indent=1)))
    plot_examples(examples, Path(args.out) / "examples.png")
    print(f"{results['load_seconds']} s to load, {results['compare_seconds']} s to compare; see {args.out}/examples.png and results.json")


if __name__ == "__main__":
    sys.exit(weights.run_cli(main))

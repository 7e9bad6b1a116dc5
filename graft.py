"""
Zero-shot grafting: plug an encoder that was trained against the surrogate into the full LLM.

    python graft.py                                         # what pair and graft say about held-out images, and a table
    python graft.py --image photo.png --question "What word is on the sign?"
    python graft.py --chat --image photo.png                # a conversation about one image
    python graft.py --web                                   # pair and graft side by side in the browser

pair:  encoder + surrogate, what was trained.
graft: the same encoder + the full LLM, which never saw a visual token before.
"""
import argparse
import json
import math
import platform
import random
import sys
import textwrap
import time
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import world
from data.batches import wrap
from data.images import open_image
from formats import checkpoints, official
from formats.errors import MAX_SEED, Parser, UserError, number, run_cli
from formats.files import check_out
from formats.tokenizer import Tokenizer
from model import VLM, KVCache, Llama, collect
from surrogate import fork, load_surrogate

TASKS = world.TRAINED_TASKS + world.KNOWLEDGE_TASKS
EVAL_SEED = 7           # the stream of held-out images; split "test" never meets the stream of training

# ---------------------------------------------------------------------------------------------------------------------
# Compare


def option_logp(decoder, before, tokens, lengths, chunk=256):
    """log p of each option: before (n, T, C) the hidden states that predict its tokens (n, T), lengths (n,) real."""
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]   # (n, T)
    logp = torch.zeros(tokens.shape, device=tokens.device)
    pieces = zip(before[real].split(chunk), tokens[real].split(chunk))              # logits are large: a few at a time
    logp[real] = torch.cat([decoder.logits(x).float().log_softmax(-1).gather(1, t[:, None])[:, 0] for x, t in pieces])
    return logp.sum(1)


def rank(options, tokenizer, run, decoders, caches, last, row=0):
    """log p (K,) of each of K options, for every decoder: what it makes of them after the prompt in a row of its cache.

    run(x, caches): the decoders' hidden states. last: theirs (C,) at the end of the prompt, which predict the first
    tokens.
    """
    ids = [torch.tensor(tokenizer.encode_text(o) + tokenizer.turn_end) for o in options]
    tokens = pad_sequence(ids, batch_first=True).to(decoders[0].device)                         # (K, L)
    n = torch.tensor([len(i) for i in ids], device=tokens.device)                               # (K,)
    hidden = run(decoders[0].embed(tokens), [c.repeat(*tokens.shape, rows=[row]) for c in caches])
    before = [torch.cat([x.expand(len(n), 1, -1), h[:, :-1]], dim=1) for x, h in zip(last, hidden)]     # (K, L, C) each
    return [option_logp(decoder, b, tokens, n) for decoder, b in zip(decoders, before)]


@torch.no_grad()
def answer(embeds, lengths, samples, llm, surrogate=None, tokenizer=None, max_new_tokens=40):
    """What the LLM, and with `surrogate` the surrogate, make of the same prompts: embeds (B, T, d), lengths (B,).

    Returns {"pair": …, "graft": …} (only the latter without a surrogate), each a list of (index of the likeliest of the
    sample's options, greedy answer). Prompts and options go through the trunk once for both decoders.
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

    # one sample's options at a time: there may be many or few of them, and so they take little memory
    scores = [rank(sample.options, tokenizer, run, [*decoders.values()], caches, [x[i] for x in last], i)
              for i, sample in enumerate(samples)]

    out = {}
    for (name, decoder), x, cache, logps in zip(decoders.items(), last, caches, zip(*scores)):
        stream = decoder.decode(x, cache.repeat(1, max_new_tokens), max_new_tokens)
        texts = [tokenizer.decode(t).strip() for t in collect(stream, tokenizer.stop_tokens)]
        out[name] = [(int(logp.argmax()), text) for logp, text in zip(logps, texts)]
    return out


def systems(vlm, surrogate, direct, samples):
    """Yield (name, [(choice, said), …]) of text, direct, graft and pair, about the same samples. "text" has the caption
    in the image's place: what the LLM knows. Without a surrogate or direct, their names are missing."""
    images, chats = [s.image for s in samples], [s.messages[:-1] for s in samples]
    tell = lambda message, s: message | dict(content=message["content"].replace("<image>", " " + s.caption))
    told = [[tell(m, s) for m in chat] for s, chat in zip(samples, chats)]

    def ask_all(vlm, chats, images, surrogate=None):
        embeds, lengths = vlm.embed_prompts([vlm.prompt(c) for c in chats], images)
        return answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer)

    yield "text", ask_all(vlm, told, [])["graft"]
    if direct is not None:
        yield "direct", ask_all(direct, chats, images)["graft"]
    ours = ask_all(vlm, chats, images, surrogate)
    yield from ((name, ours[name]) for name in ("graft", "pair") if name in ours)


def wilson(right, n):
    """95 % interval of a proportion, as (low, high) (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.96, right / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def compare(vlm, surrogate=None, n=40, batch=20, tasks=TASKS, seed=EVAL_SEED, direct=None, progress=True):
    """Ask about n held-out images a task, freely and with options. Returns rows: one dict per task and system.

    said: the greedy answer, up to 40 tokens, holds the right word and no rival. ranked: of the options, the right one
    is the likeliest.
    """
    samples, got = [world.world(task, i, seed, "test") for task in tasks for i in range(n)], {}
    total = len(samples) * (2 + (surrogate is not None) + (direct is not None))
    with tqdm(total=total, desc="held-out images", unit="answer", disable=not progress) as bar:
        for i in range(0, len(samples), batch):
            for name, r in systems(vlm, surrogate, direct, samples[i:i + batch]):
                got.setdefault(name, []).extend(r)
                bar.update(len(r))
    rows = []
    for k, task in enumerate(tasks):
        mine = samples[k * n:(k + 1) * n]
        for name, r in got.items():
            r = r[k * n:(k + 1) * n]
            ranked = sum(s.options[choice] == s.answer for s, (choice, _) in zip(mine, r))
            said = sum(world.is_right(text, s) for s, (_, text) in zip(mine, r))
            rows.append(dict(task=task, trained=task in world.TRAINED_TASKS, system=name, samples=n, said=said / n,
                             ranked=ranked / n, chance=sum(1 / len(s.options) for s in mine) / n))
    return rows


def table(rows):
    """Rows of `compare` as Markdown: said freely, then ranked, each in % with its 95 % interval."""
    names, lines = list(dict.fromkeys(r["system"] for r in rows)), []
    for measure, title in (("said", "said freely, right"), ("ranked", "ranked first among options")):
        lines += [f"| {title} | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        groups = [(task + ("" if trained else " *"), [r for r in rows if r["task"] == task])
                  for task, trained in dict.fromkeys((r["task"], r["trained"]) for r in rows)]
        groups += [(title, [r for r in rows if r["trained"] == trained])
                   for title, trained in (("**trained, mean**", True), ("**never trained, mean** *", False))]
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


# Six held-out images: four whose answer no image holds and no training showed, two of what was trained.
DEMO = [("capital", ("sign", "Kenya")), ("language", ("flag", "Peru")), ("capital", ("flag", "Japan")),
        ("continent", ("flag", "Italy")), ("flag", ("flag", "Sweden")), ("color", ("shape", *min(world.HELD_OUT)))]


def demo(vlm, surrogate, seed=EVAL_SEED):
    """What pair and graft say about the six images of DEMO, as `say` returns it."""
    return say(vlm, surrogate, [world.sample_of(random.Random(f"demo/{seed}/{i}"), task, subject)
                                for i, (task, subject) in enumerate(DEMO)])


def say(vlm, surrogate, samples, max_new_tokens=40):
    """The free answers of pair and graft to samples: [(sample, {"pair": text, "graft": text}), …]."""
    prompts, images = [vlm.prompt(s.messages[:-1]) for s in samples], [s.image for s in samples]
    llm = vlm.decoder
    vlm.decoder = surrogate             # the pair: what was trained
    pair = vlm.generate(prompts, images, max_new_tokens=max_new_tokens)
    vlm.decoder = llm                   # the graft: the same encoder, the full LLM, no training
    grafted = vlm.generate(prompts, images, max_new_tokens=max_new_tokens)
    words = lambda tokens: " ".join(vlm.tokenizer.decode(tokens).split())
    return [(s, {"pair": words(p), "graft": words(g)}) for s, p, g in zip(samples, pair, grafted)]


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
            print(f"  {name + ':':7s}{right:7s}{textwrap.shorten(text, 100, placeholder=' …')}")
    print("\n* never trained: no image holds the answer, the full LLM knows it. "
          "Before the bar: what the image shows, which no model is told.")


def plot_demo(examples, columns=3):
    """A figure of what `say` returns: image, question, what the pair says, what the graft says (blue where right)."""
    from matplotlib.figure import Figure
    lines = math.ceil(len(examples) / columns)
    fig = Figure(figsize=(3.4 * columns, 4.3 * lines), dpi=100, facecolor="white", layout="constrained")
    axes = fig.subplots(2 * lines, columns, squeeze=False, gridspec_kw=dict(height_ratios=[2.4, 1.5] * lines))
    for ax in axes.flat:
        ax.axis("off")
    for i, (sample, said) in enumerate(examples):
        picture, words = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        picture.imshow(sample.image, interpolation="nearest")
        picture.set_title(textwrap.fill(question_of(sample), 32), fontsize=10, fontweight="bold")
        for k, (name, text) in enumerate(said.items()):
            right = world.is_right(text, sample)
            short = textwrap.shorten(text, 130, placeholder=" …")
            shown = textwrap.fill(f"{name} {'✓' if right else '✗'}  {short}", 48)
            words.text(0, 1 - 0.52 * k, shown, transform=words.transAxes, va="top", fontsize=9, parse_math=False,
                       color="#0072B2" if right else "#B34700")         # $5 and $6 is no formula
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# Ask


def ask(vlm, image, messages, max_new_tokens=128, temperature=0.0, top_p=1.0, show=print):
    """Answer a conversation about an image, handing pieces of text to `show` as they come. Returns (answer, timing)."""
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
        messages.append({"role": "user", "content": question if messages else wrap(question)})
        print("llm> ", end="")
        text, timing = ask(vlm, image, messages, show=show_piece, **options)
        print(f"\n     [{timing}]")
        messages.append({"role": "assistant", "content": text})


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--llm", help="full LLM: folder, .gguf file or hub name (default: the one that the encoder was trained for)")
    add("--encoder", default="assets/encoder.safetensors",
        help="checkpoint of the stage encoder (default: %(default)s)")
    add("--direct", default="assets/direct.safetensors",
        help="an encoder trained directly on the full LLM, compared where present (default: %(default)s)")
    add("--eval", type=number(int, 1, 10**6), default=5, metavar="N",
        help="held-out images a task for the comparison (default: %(default)s)")
    add("--batch", type=number(int, 1, 4096), default=20, help="images at a time (default: %(default)s)")
    add("--seed", type=number(int, 0, MAX_SEED), default=EVAL_SEED, help="which held-out images (default: %(default)s)")
    add("--image", help="ask about this picture instead")
    add("--question", help="what to ask about --image (default: Describe the image.)")
    add("--chat", action="store_true", help="converse about --image (without one: about a held-out sign)")
    add("--web", action="store_true", help="pair and graft side by side in the browser (needs: pip install gradio)")
    add("--pair", action="store_true", help="ask the encoder-surrogate pair in place of the graft")
    add("--max-new-tokens", type=number(int, 1, 10**6), default=128,
        help="longest answer to --image or --chat (default: %(default)s)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="0: greedy (default: %(default)s)")
    add("--top-p", type=number(float, 1e-6, 1), default=1.0,
        help="sample from the likeliest tokens that hold this mass (default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: %(default)s")
    add("--int8", action=argparse.BooleanOptionalAction,
        help="the LLM's weights in 8 bits, which answers sooner (default: for --image, --chat and --web on a CPU)")
    parser.add_device()
    add("--out", default="runs/graft", help="folder for results.json and demo.png (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.question and (args.chat or args.web or not args.image):
        raise UserError("--question asks about one picture: give it as --image, without --chat or --web")
    if args.pair and not (args.image or args.chat):
        raise UserError("--pair chooses who answers: give a picture as --image, or --chat")
    args.question = args.question or "Describe the image."
    check_out(args.out)
    return args


def converse(args, vlm, image):
    """Answer one question about an image, or chat about it."""
    if image is None:
        image = world.world("read", 3, args.seed, "test").image
        Path(args.out).mkdir(parents=True, exist_ok=True)
        image.save(Path(args.out) / "sign.png")
        print(f"No --image: the conversation is about {args.out}/sign.png")
    if args.pair:
        vlm.decoder = load_surrogate(vlm.decoder, args.encoder)     # the other way: from the graft back to the pair
    options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    if args.chat:
        return chat(vlm, image, options)
    _, timing = ask(vlm, image, [{"role": "user", "content": wrap(args.question)}], show=show_piece, **options)
    print(f"\n[{timing}]")


def show(args, vlm, llm, about, name, command):
    """The demo, then the comparison: printed, and saved as demo.png and results.json. llm: as it was published."""
    start, out = time.perf_counter(), Path(args.out)
    surrogate = load_surrogate(llm, args.encoder) if about.get("ranges") else None
    file = checkpoints.locate(args.direct)
    same = file.is_file() and checkpoints.open_checkpoint(file)[1].get("llm") == name
    direct = VLM.from_pretrained(llm, file, tokenizer=vlm.tokenizer) if same else None
    if surrogate is None:
        print("graft:  encoder + the full LLM, with which it was trained: there is no surrogate")
    else:
        layers = f"{surrogate.config.num_hidden_layers} of {llm.config.num_hidden_layers} layers"
        print(f"pair:   encoder + surrogate ({layers})\ngraft:  the same encoder + the full LLM, zero-shot")
        examples = demo(vlm, surrogate, args.seed)
        show_demo(examples)
        figure = plot_demo(examples)
        checkpoints.write_whole(out / "demo.png", lambda part: figure.savefig(part, format="png"))
    rows = compare(vlm, surrogate, args.eval, args.batch, seed=args.seed, direct=direct)
    seconds = round(time.perf_counter() - start, 1)
    print("\ntext:   the caption in the image's place: what the LLM knows"
          + ("\ndirect: an encoder trained on the full LLM" if direct else "")
          + f"\n\n{table(rows)}\n{args.eval} held-out images a task, with 95 % intervals; * never trained")
    results = dict(command=command, encoder=args.encoder, about=about, llm=name, samples=args.eval, seed=args.seed,
                   dtype=args.dtype, int8=args.int8, device=args.device, torch=torch.__version__,
                   python=platform.python_version(), seconds=seconds, rows=rows)
    checkpoints.write_whole(out / "results.json", lambda part: part.write_text(json.dumps(results, indent=1)))
    print(f"{seconds} s; see {out}/{'demo.png and ' if surrogate else ''}results.json")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    image = None if args.image is None else open_image(args.image)
    if args.web:
        from extras import web  # only here: it imports this file, and Gradio
        web.need_gradio()
    _, about = checkpoints.open_checkpoint(args.encoder)
    name = args.llm or about.get("llm", official.DEFAULT_LLM)
    asked = image is not None or args.chat or args.web
    if args.int8 is None:       # stage 3 trained the LLM itself: it comes in floating point
        args.int8 = asked and args.device == "cpu" and about.get("stage") != "decoder"
    llm = Llama.from_pretrained(name, getattr(torch, args.dtype), args.device, quantize="int8" if args.int8 else None)
    vlm = VLM.from_pretrained(llm, args.encoder, tokenizer=Tokenizer.from_pretrained(official.find(name)))
    if args.web:
        web.serve(vlm, load_surrogate(llm, args.encoder))
    elif asked:
        converse(args, vlm, image)
    else:
        show(args, vlm, llm, about, name, " ".join(["python graft.py", *argv]))


if __name__ == "__main__":
    sys.exit(run_cli(main))

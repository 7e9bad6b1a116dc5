"""
Zero-shot grafting: plug an encoder that was trained against the surrogate into the full LLM.

    python graft.py                                         # what pair and graft say about held-out images, and a table
    python graft.py --image photo.png --question "What word is on the sign?"
    python graft.py --chat --image photo.png                # a conversation about one image
    python graft.py --web                                   # pair and graft side by side in the browser

pair:  encoder + surrogate, what was trained.
graft: the same encoder + the full LLM, whose replaced layers never passed a gradient to the encoder.
"""
import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

import evaluate
from cli import MAX_SEED, Parser, UserError, check_out, number, printable, run_cli, write_whole
from data import world
from data.batches import without_image, wrap
from data.images import open_image
from data.sources import HeldOut
from formats import checkpoints, official
from formats.tokenizer import Tokenizer
from generation import SAMPLING
from log import same_file
from model import VLM, Llama
from surrogate import load_surrogate

# ---- Ask ------------------------------------------------------------------------------------------------------------


def show_piece(piece):
    print(printable(piece), end="", flush=True)


def ask(vlm, image, messages, max_new_tokens=128, seed=0, show=show_piece, **sampling):
    """Answer a conversation about an image, handing pieces of text to `show` as they come. Returns (answer, timing).
    sampling: temperature and top_p; seed: of its chances."""
    start, times, pieces = time.perf_counter(), [], []
    generator = torch.Generator(vlm.decoder.device).manual_seed(seed)
    embeds, _ = vlm.embed_prompts([vlm.prompt(messages)], [image] if image is not None else [])

    def ids():
        for token in vlm.decoder.stream(embeds, max_new_tokens=max_new_tokens, generator=generator, **sampling):
            times.append(time.perf_counter())
            if int(token) in vlm.tokenizer.stop_tokens:
                return
            yield int(token)

    for piece in vlm.tokenizer.decode_stream(ids()):
        pieces.append(piece)
        show(piece)
    rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
    first = f"first token after {times[0] - start:.2f} s" if times else "no token was asked for"
    return "".join(pieces).strip(), first + rate


def chat(vlm, image, options):
    """Converse on the terminal until an empty line or end of input."""
    turns, size = [], vlm.decoder.config.max_position_embeddings - options.get("max_new_tokens", 128)
    messages = lambda turns: [dict(turns[0], content=wrap(turns[0]["content"])), *turns[1:]]
    fits = lambda turns: len(vlm.prompt(messages(turns))) <= size
    print("Ask about the image; an empty line ends the conversation.")
    while True:
        try:
            question = without_image(input("\nyou> ")) if sys.stdin else ""         # None where it is closed (<&-)
        except EOFError:
            break
        if not question:
            break
        turns.append({"role": "user", "content": question})
        if not fits(turns[-1:]):
            turns.pop()
            print("     [this is too long for the LLM: ask something shorter, or end with an empty line]")
            continue
        if not fits(turns):
            print("     [the LLM reads no more at once: the oldest turns are forgotten]")
        while not fits(turns):
            del turns[:2]                           # a question and its answer; the image goes into the next question
        print("llm> ", end="")
        text, timing = ask(vlm, image, messages(turns), **options)
        print(f"\n     [{timing}]")
        turns.append({"role": "assistant", "content": text})


# ---- Command line ---------------------------------------------------------------------------------------------------


def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--llm", help="full LLM: folder, .gguf file or hub name (default: the one that the encoder was trained for)")
    add("--encoder", default="assets/encoder.safetensors",
        help="checkpoint of the stage encoder: file, folder, hub name or org/name:FILE (default: %(default)s)")
    add("--vit", help="ViT: file, folder or hub name (default: the one that the encoder started from)")
    add("--direct", help="an encoder trained directly on the full LLM, compared with (default: "
        "assets/direct.safetensors, where it is there and of this LLM, without --data)")
    add("--eval", type=number(int, 1, 10**6), default=5, metavar="N",
        help="held-out images a task for the comparison (default: %(default)s)")
    add("--batch", type=number(int, 1, 4096), default=20, help="images at a time (default: %(default)s)")
    add("--seed", type=number(int, 0, MAX_SEED), default=evaluate.EVAL_SEED,
        help="which held-out images, and which samples where --temperature is not 0 (default: %(default)s)")
    add("--splits", nargs="+", choices=list(evaluate.SPLITS), default=["test"],
        help="test; untaught: about words and flags that stages 1 and 2 left out; restyled: in fonts and sizes that no "
        "stage has drawn (default: test)")
    add("--data", help="a test's JSON in place of the drawn world: test.json of python -m data.icons")
    add("--images", help="folder of the images that --data names (default: the file's own folder)")
    add("--image", help="ask about this picture instead")
    add("--question", help="what to ask about --image (default: Describe the image.)")
    add("--chat", action="store_true", help="converse about --image (without one: about a held-out sign)")
    add("--web", action="store_true", help="pair and graft side by side in the browser (needs: pip install gradio)")
    add("--pair", action="store_true", help="ask the encoder-surrogate pair in place of the graft")
    add("--max-new-tokens", type=number(int, 1, 10**6), default=128,
        help="longest answer to --image or --chat (default: %(default)s)")
    add("--temperature", type=number(*SAMPLING["temperature"]), default=0.0, help="0: greedy (default: %(default)s)")
    add("--top-p", type=number(*SAMPLING["top_p"]), default=1.0,
        help="sample from the likeliest tokens that hold this mass (default: %(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="default: %(default)s")
    add("--int8", action=argparse.BooleanOptionalAction,
        help="the LLM's weights in 8 bits, which answers sooner (default: for --image, --chat and --web on a CPU)")
    parser.add_device()
    add("--out", default="runs/graft", help="folder for results.json and demo.png (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.question and (args.chat or args.web or not args.image):
        raise UserError("--question asks about one picture: give it as --image, without --chat or --web")
    if args.images and not args.data:
        raise UserError("--images is the folder of the images that --data names: give --data, too")
    if args.data and (args.image or args.chat or args.web):
        raise UserError("--data is a test of its own: give it without --image, --chat and --web")
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
    options = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    if args.chat:
        return chat(vlm, image, options)
    _, timing = ask(vlm, image, [{"role": "user", "content": wrap(args.question)}], **options)
    print(f"\n[{timing}]")


def show(args, vlm, llm, about, name, command, held=None):
    """The demo, then the comparison: printed, and saved as demo.png and results.json. llm: as it was published; held:
    a data.sources.HeldOut in place of the drawn world."""
    start, out, before, direct = time.perf_counter(), Path(args.out), None, None
    draw, some, splits = held or world.world, None, dict.fromkeys(args.splits)
    if held:
        splits = {split: draw.tasks(split) for split in splits}
        some = [draw(splits[args.splits[0]][0], i, args.seed, args.splits[0]) for i in range(min(512, 10 * args.eval))]
    surrogate = load_surrogate(llm, args.encoder) if about.get("ranges") else None
    if about.get("vit"):
        before = VLM.untrained(about["vit"], llm, vlm.tokenizer, vlm.like_words, about.get("seed", 0), args.encoder)
        before = before.to(llm.device, llm.dtype).requires_grad_(False).eval()
    file = checkpoints.locate(args.direct or "assets/direct.safetensors")
    if args.direct or file.is_file() and not held:          # the shipped one was trained on the drawn world
        if same_file(checkpoints.open_checkpoint(file)[1].get("llm"), name):
            direct = VLM.from_pretrained(llm, file, tokenizer=vlm.tokenizer)
        elif args.direct:
            raise UserError(f"--direct {args.direct}: it was trained for another LLM than {name}")
    if surrogate is None:
        print("graft:  encoder + the full LLM, with which it was trained: there is no surrogate")
    else:
        layers = f"{surrogate.config.num_hidden_layers} of {llm.config.num_hidden_layers} layers"
        print("before: the encoder as training starts, with a random projector, + the full LLM\n"
              f"pair:   encoder + surrogate ({layers})\ngraft:  the same encoder + the full LLM, zero-shot")
        examples = evaluate.say(vlm, surrogate, some[:8], before) if some else evaluate.demo(vlm, surrogate, before)
        evaluate.show_demo(examples)
        figure = evaluate.plot_demo(examples, 4 if some else 3)
        write_whole(out / "demo.png", lambda part: figure.savefig(part, format="png"))
    others = dict(before=before, direct=direct)
    brings = evaluate.image_brings(vlm, surrogate, min(512, 10 * args.eval), samples=some, **others)
    rows = [row for split, tasks in splits.items()
            for row in evaluate.compare(vlm, surrogate, args.eval, args.batch, tasks, args.seed, split=split, draw=draw,
                                        **others)]
    seconds = round(time.perf_counter() - start, 1)
    print("\ntext:   the caption in the image's place: what the LLM knows; text, pair: what the surrogate knows"
          + ("\ndirect: an encoder trained on the full LLM" if direct else "")
          + f"\n\n{evaluate.brings_table(brings)}\n\n{evaluate.table(rows)}"
          f"\n\n{args.eval} held-out images a task, with 95 % intervals; * never trained")
    results = dict(command=command, encoder=args.encoder, about=about, llm=name, samples=args.eval, seed=args.seed,
                   dtype=args.dtype, int8=args.int8, device=args.device, torch=torch.__version__,
                   python=platform.python_version(), seconds=seconds)
    lines = lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"           # a row of the tables a line
    text = f'{json.dumps(results, indent=1)[:-2]},\n "brings": {lines(brings)},\n "rows": {lines(rows)}\n}}\n'
    write_whole(out / "results.json", lambda part: part.write_text(text, encoding="utf-8"))
    print(f"{seconds} s; see {out}/{'demo.png and ' if surrogate else ''}results.json")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    image = None if args.image is None else open_image(args.image)
    if args.web:
        from extras import page  # only here: it takes a second, and it needs Gradio
        page.need_gradio()
    held = HeldOut(args.data, args.images) if args.data else None
    _, about = checkpoints.open_checkpoint(args.encoder)
    name = args.llm or about.get("llm", official.DEFAULT_LLM)
    asked = image is not None or args.chat or args.web
    if args.int8 is None:       # stage 3 trained the LLM itself: it comes in floating point
        args.int8 = asked and args.device == "cpu" and about.get("stage") != "decoder"
    llm = Llama.from_pretrained(name, getattr(torch, args.dtype), args.device, quantize="int8" if args.int8 else None)
    vlm = VLM.from_pretrained(llm, args.encoder, tokenizer=Tokenizer.from_pretrained(official.find(name)), vit=args.vit)
    if args.web:
        page.serve(page.page(vlm, load_surrogate(llm, args.encoder)), inbrowser=True)
    elif asked:
        converse(args, vlm, image)
    else:
        show(args, vlm, llm, about, name, " ".join(["python graft.py", *argv]), held)


if __name__ == "__main__":
    sys.exit(run_cli(main))

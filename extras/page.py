"""
A page to play with: what the pair and the graft say about the same image, side by side in the browser.

    pip install gradio && python graft.py --web

It is for this machine alone: no other can open the page, and the page fetches nothing from any. Its look inside is the
logit lens (nostalgebraist, 2020); the paper's prediction trajectory sums the same up in a number for each layer.
"""
import contextlib
import gc
import html
import os
import random
import re
import threading
import time
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

import evaluate
from cli import MissingFile, UserError
from data import world
from data.batches import without_image, wrap
from data.drawing import COLORS, SHAPES, draw
from data.images import open_image
from surrogate import kept_layers

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")       # before it is imported
try:
    import gradio as gr
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.responses import PlainTextResponse
except ImportError:         # all but `page` and `serve` work without
    gr = None

SUBJECTS = [s for _, s in evaluate.DEMO] + [("flag", "Germany"), ("sign", "Egypt"), ("sign", "Horse")]
SUGGESTIONS = {"trained": [asked[0] for asked, _ in world.QUESTIONS.values()],
               "never trained": [asked[0] for both in world.KNOWLEDGE_QUESTIONS.values() for asked in both],
               "free": ["What does it remind you of?", "Tell a short story about it.", "Is it larger than a house?"]}
ABOUT = {"pair": ("#B34700", "encoder + surrogate, as trained"), "graft": ("#0072B2", "encoder + full LLM, zero-shot")}
MAX_WORD, MAX_QUESTION, MAX_SIDE = 14, 300, 1024
ONE_AT_A_TIME = threading.Lock()    # a photo of 64 megapixels takes half a gigabyte until it has been made small


# ---- What is chosen --------------------------------------------------------------------------------------------------


def picture(subject):
    """A subject of the world, or ("file", path) -> its PIL image, always the same. UserError: it makes no image."""
    try:
        if subject[0] != "file":
            return draw(random.Random(f"web/{subject}"), subject)
        with ONE_AT_A_TIME:
            image = open_image(subject[1])
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            return image
    except StopIteration:                                   # letters of no size fit
        raise UserError(f"{subject[1]} is too wide for a sign: type a shorter word") from None
    except UserError as error:                              # names the file, not the folder that Gradio put it into
        raise UserError(str(error).replace(os.path.dirname(subject[1]) + os.sep, "")) from None


def sign(word):
    """What someone types -> ("sign", word). UserError where there is nothing to draw."""
    if word := "".join(c for c in " ".join(str(word or "").split()) if c.isprintable())[:MAX_WORD].strip():
        return "sign", word[:1].upper() + word[1:]
    raise UserError("type a word")


def nth(index):
    """A picture of the gallery. A request that was made by hand may hold anything."""
    if type(index) is int and 0 <= index < len(SUBJECTS):
        return SUBJECTS[index]
    raise UserError("choose one of the pictures")


def uploaded(path):
    if isinstance(path, str):
        return "file", path
    raise UserError("choose one file")


def show(choose, *given):
    """A subject is chosen, choose(*given): (its image, the subject itself, HTML of what is wrong with it)."""
    try:
        subject = choose(*given)
        return picture(subject), subject, ""
    except UserError as error:
        return None, None, html.escape(f"⚠ {error}")


# ---- Answers --------------------------------------------------------------------------------------------------------


def talk(reading, tokenizer, max_new_tokens=40):
    """Both answer a prompt that evaluate.Reading has read. Yields {"pair": (token ids so far, seconds, tokens/s),
    "graft": …} after each token."""
    streams = dict(reading.streams(max_new_tokens))
    said, times = ({name: [] for name in streams} for _ in range(2))        # times: seconds of each token
    while streams:
        for name, stream in list(streams.items()):
            start = time.perf_counter()
            token = int(next(stream, tokenizer.turn_end[0]))
            times[name].append(time.perf_counter() - start)
            if token in tokenizer.stop_tokens:
                del streams[name]
            else:
                said[name].append(token)
        yield {name: (said[name], sum(t), (len(t) - 1) / max(sum(t[1:]), 1e-9)) for name, t in times.items()}


def rank(reading, tokenizer, options):
    """{"pair": [(option, its probability among the options), …], "graft": …}, the likeliest first."""
    ranked = reading.option_logp([evaluate.option_ids(tokenizer, options)])
    return {name: sorted(zip(options, logp.softmax(0).tolist()), key=lambda pair: -pair[1])     # logp (K,)
            for name, ((logp,), _) in ranked.items()}


def sample_of(question, subject):
    """The world's sample, with its options, of this question about this picture. None if they are not the world's."""
    kind = subject[0]
    for task, both in (world.QUESTIONS | world.KNOWLEDGE_QUESTIONS).items():
        if task in world.KNOWLEDGE_TASKS:
            asked, fits = both[kind == "flag"], kind != "shape" and subject[1] in world.FACTS
        else:
            about = dict(read="sign", flag="flag", color="shape", shape="shape").get(task, kind)
            asked, fits = sum(both, []), subject in world.SUBJECTS and kind == about
        if fits and question in asked:
            return world.sample_of(random.Random(f"web/{subject}"), task, subject)


# ---- A look inside --------------------------------------------------------------------------------------------------


@torch.no_grad()
def layers_say(decoder, x, at, ids, start=0):
    """What the layers from `start` on would say at the n positions `at` of x (1, T, d), where ids (n,) follow:
    (likeliest token, its probability, log p of `ids`), each (layers, n)."""
    x, rows = decoder.run(x, 0, start), []
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
    trunk, L, n = surrogate.n_shared, len(llm.model.layers), len(ids)
    full, ours = layers_say(llm, embeds, at, targets), layers_say(surrogate, embeds, at, targets, trunk)
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


# ---- What is shown ---------------------------------------------------------------------------------------------------


def column(name, text="", note="", ranked=(), right=None):
    """What one of the two says, as HTML. ranked: as `rank` returns it, the first six are shown; right: among them."""
    color, what = ABOUT[name]
    bars = "".join(f'<div class="bar"><span>{html.escape(option)}{" ✓" * (option == right)}</span><b style="width:'
                   f'{p:.1%};background:{color}"></b><i>{p:.0%}</i></div>' for option, p in ranked[:6])
    return (f'<div class="says" style="border-color:{color}"><b style="color:{color}">{name}</b>: {what}'
            f'<p>{html.escape(text)}</p><small>{note}</small>{bars}</div>')


def respond(vlm, surrogate, subject, question):
    """Yield what the page shows, piece by piece: HTML (an error, the pair, the graft) and a figure of the layers."""
    gc.collect()        # the figures of the question before: their parts refer to each other
    try:
        question = without_image(str(question or ""))[:MAX_QUESTION]                # the one image is in the prompt
        if not subject or not question:
            raise UserError("choose an image first" if question else "ask something first")
        image, prompt = picture(subject), vlm.prompt([{"role": "user", "content": wrap(question)}])
        reading = evaluate.Reading(*vlm.embed_prompts([prompt], [image]), vlm.decoder, surrogate)
        for said in talk(reading, vlm.tokenizer):
            texts = {name: (vlm.tokenizer.decode(ids).strip(), f"{len(ids)} tokens in {seconds:.1f} s, {rate:.0f} "
                            "tokens/s") for name, (ids, seconds, rate) in said.items()}
            yield "", *(column(name, *t) for name, t in texts.items()), None
        if sample := sample_of(question, subject):
            for name, ranked in rank(reading, vlm.tokenizer, sample.options).items():
                text, note = texts[name]
                texts[name] = f"{text} {'✓' if world.is_right(text, sample) else '✗'}", note, ranked, sample.answer
        columns = [column(name, *t) for name, t in texts.items()]
        yield "", *columns, None
        yield "", *columns, plot_lens(vlm, surrogate, prompt, image, said["graft"][0])
    except UserError as error:
        yield html.escape(f"⚠ {error}"), column("pair"), column("graft"), None


# ---- The page -------------------------------------------------------------------------------------------------------

CSS = """
#picture img { image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain }
.says { border-left: 5px solid; padding-left: 14px } .says p { font-size: 1.25em; min-height: 3em }
.bar { display: grid; grid-template-columns: 15em 1fr 3em; align-items: center; gap: 6px } .bar b { height: 0.8em }
"""


def page(vlm, surrogate):
    """The page, as Gradio's Blocks. One question at a time is answered; a tab that is closed ends its own."""
    hidden, still = dict(api_visibility="private", show_progress="hidden"), dict(interactive=False, buttons=[])
    with gr.Blocks(title="Graft", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as blocks:
        subject = gr.State()
        with gr.Row():
            with gr.Column(min_width=280):
                image = gr.Image(label="the image", format="png", height=280, elem_id="picture", **still)
                upload = gr.UploadButton("upload an image")
            with gr.Column(scale=4):
                gallery = gr.Gallery([picture(s) for s in SUBJECTS], columns=len(SUBJECTS), height=130, format="png",
                                     show_label=False, allow_preview=False, elem_id="gallery", **still)
                with gr.Row():
                    word = gr.Textbox(label="a word, on a sign", max_length=MAX_WORD, elem_id="word")
                    look = (gr.Dropdown(list(COLORS), value="orange", label="a color ..."),
                            gr.Dropdown(list(SHAPES), value="star", label="... and a shape"))
                with gr.Row(equal_height=True):
                    question = gr.Textbox(SUGGESTIONS["never trained"][0], label="the question", scale=6,
                                          max_length=MAX_QUESTION, elem_id="question")
                    ask, stop = gr.Button("ask", variant="primary", elem_id="ask"), gr.Button("stop")
                for kind, questions in SUGGESTIONS.items():
                    gr.Examples([[q] for q in questions], question, label=kind, api_visibility="private")
        line = gr.HTML(elem_id="line")
        with gr.Row():
            pair, graft = (gr.HTML(column(name), elem_id=name) for name in ABOUT)
        with gr.Accordion("look inside"):
            layers = gr.Plot(format="png", show_label=False, elem_id="look")

        def pick(event: gr.EventData = None):       # not SelectData, which a request without an index breaks
            data = getattr(event, "_data", None)
            return show(nth, data.get("index") if isinstance(data, dict) else None)
        chosen = dict(outputs=[image, subject, line], queue=False, trigger_mode="always_last", **hidden)
        gallery.select(pick, None, **chosen)
        word.input(partial(show, sign), word, **chosen)
        upload.upload(partial(show, uploaded), upload, **chosen)
        gr.on([d.input for d in look], partial(show, lambda *of: ("shape", *of)), look, **chosen)
        asked = gr.on([ask.click, question.submit], partial(respond, vlm, surrogate), [subject, question],
                      [line, pair, graft, layers], **hidden)
        stop.click(None, cancels=asked)
    return blocks


CSP = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
       "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
       "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'")


def guard(app):
    """
    Around the whole application (ASGI): a request must name this machine as Host, and may come from this page alone.
    Else any web site that is open in the browser could read it (DNS rebinding) or fill its folder of uploads.
    """
    async def guarded(scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("content-security-policy", CSP)
            await send(message)

        headers = Headers(scope=scope) if scope["type"] in ("http", "websocket") else {"host": "localhost"}
        host, origin = headers.get("host", ""), headers.get("origin")
        if re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", host) and origin in (None, f"http://{host}"):
            await app(scope, receive, send_with_policy)
        else:
            await PlainTextResponse("this page is for this machine alone", 403)(scope, receive, send)
    return guarded


@contextlib.asynccontextmanager
async def lifespan(app):
    """When the server starts: nothing of it answers before the guard does."""
    app.middleware_stack = guard(app.middleware_stack)
    yield


def need_gradio():
    if gr is None:
        raise MissingFile("--web needs Gradio: pip install gradio")


def serve(blocks, **options):
    """Serve the page to this machine alone, until Ctrl-C."""
    keep = ("GRADIO_TEMP_DIR", "GRADIO_SERVER_PORT", "GRADIO_ANALYTICS_ENABLED")
    for name in [n for n in os.environ if n.startswith("GRADIO_") and n not in keep]:
        del os.environ[name]            # by these it could be shared, served to others, or serve other files
    blocks.root_path = ""
    return blocks.queue(default_concurrency_limit=1, max_size=16, api_open=False).launch(
        server_name="127.0.0.1", share=False, max_file_size="20mb", footer_links=[], run_history=False, ssr_mode=False,
        mcp_server=False, allowed_paths=[], enable_monitoring=False, css=CSS, app_kwargs=dict(lifespan=lifespan),
        theme=gr.themes.Base(font=["system-ui"], font_mono=["monospace"]), **options)

"""Kinds of error, each looked for at every place where it could be: a new place of the same kind is found, too."""

import ast
import copy
import io
import json
import shutil
import subprocess
import sys
import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, refuses
from PIL import Image, PngImagePlugin

import evaluate
import graft
from cli import MissingFile, UserError, printable, run_cli
from data.batches import Batches, Sample, without_image, wrap
from data.images import open_image, preprocess
from data.llava import LlavaRecords
from extras import lmms_eval_model, parallel, share
from formats.checkpoints import open_checkpoint, save_checkpoint
from formats.tokenizer import Tokenizer
from log import Log, check_resume, lock, unlock
from model import VLM, Llama, ViT, ViTConfig
from notebooks import run
from recipes import Recipe
from surrogate import build_surrogate, load_surrogate, parse_ranges, prediction_trajectory
from train import build, trained_parameters

ROOT = Path(__file__).parent.parent
SOURCES = [f for f in sorted(ROOT.rglob("*.py")) if f.relative_to(ROOT).parts[0] not in ("tests", "runs", ".venv")]


# ---- What every file of the project keeps to ------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_call_says_what_it_has_to(file):
    """Text is UTF-8 and never the locale's, a picture is opened by the formats that we read, options by our Parser."""
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Attribute, ast.Name)):
            continue
        method, said = isinstance(call.func, ast.Attribute), {k.arg for k in call.keywords}
        name = call.func.attr if method else call.func.id
        of = getattr(call.func.value, "id", "") if method else None         # the module or variable, None: no method
        where = f"{file}:{call.lineno}"
        reads = name in ("read_text", "write_text") and of not in (None, "files")
        reads |= name == "open" and of not in ("Image", "os")
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[:2])
        assert not reads or binary or "encoding" in said, where
        assert of != "subprocess" or not {"text", "universal_newlines"} & said, where
        assert (name, of) != ("open", "Image") or "formats" in said, where
        assert name != "ArgumentParser", where


# ---- A checkpoint that is not whole ---------------------------------------------------------------------------------

VIT = ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                num_attention_heads=2)
HELD = {  # what a stage's checkpoint holds, as in train.trained_parameters -> what it says about itself
    "translator": dict(stage="translator", ranges=[[2, 4]]), "direct": dict(stage="encoder", ranges=[]),
    "encoder": dict(stage="encoder", ranges=[[2, 4]], start="translator.safetensors", recipe=dict(vit_layers=2)),
    "taught": dict(stage="encoder", ranges=[[2, 4]], recipe=dict(distill=4)),
    "decoder": dict(stage="decoder", ranges=[], start="encoder.safetensors"),
    "distilled": dict(stage="translator", ranges=[[2, 4]], recipe=dict(epochs=4)),
}


@pytest.fixture(scope="module")
def whole(tiny_llm, tmp_path_factory):
    """A folder with a checkpoint of every kind, made without training: (folder, {kind: (tensors, about)})."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    llm = Llama.from_pretrained(tiny_llm)
    vlm = VLM(ViT(VIT), build_surrogate(llm, [(2, 4)]))
    vit = {n: t for n, t in vlm.named_parameters() if n.startswith("encoder.")}
    save_checkpoint(folder / "vit.safetensors", vit, dict(stage="vit", vit_config=vars(VIT)))
    for kind, about in HELD.items():
        about = dict(llm=tiny_llm, vit="vit.safetensors", start=None, recipe={}, seed=0) | about
        vlm.decoder = llm if kind == "decoder" else build_surrogate(llm, [(2, 4)])
        tensors = trained_parameters(vlm, about["stage"], about["recipe"].get("vit_layers", 0), kind == "taught")
        if kind == "distilled":
            tensors = {n: t for n, t in tensors.items() if n.startswith("decoder.")}
        made[kind] = {n: t.detach().clone() for n, t in tensors.items()}, about
        save_checkpoint(folder / f"{kind}.safetensors", *made[kind])
    return folder, made


def use(kind, path, llm):
    """Read a checkpoint wherever its stage is read."""
    about = open_checkpoint(path)[1]
    if kind not in ("distilled", "translator"):
        VLM.from_pretrained(llm, path, tokenizer=object())
    if about["ranges"]:
        load_surrogate(llm, path)
    if kind != "taught":
        stage = {"translator": "encoder", "distilled": "encoder"}.get(kind, "decoder")
        about = about | dict(stage=stage, start=str(path), vit=str(path.parent / "vit.safetensors"))
        build(about | dict(recipe=dict(like_words=False)), torch.float32, "cpu")


@pytest.fixture(scope="module")
def tiny(tiny_llm):
    return Llama.from_pretrained(tiny_llm)


PARTS = ("adapter.0.weight", "adapter.2.bias", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm.weight",
         "encoder.vision_model.encoder.layers.2.mlp.fc1.bias", "encoder.vision_model.encoder.layers.1.",
         "decoder.model.layers.2.mlp.up_proj.weight", "decoder.model.layers.5.", "decoder.model.norm.weight",
         "adapter.", "encoder.", "decoder.model.layers.2.")


@pytest.mark.parametrize("kind", HELD)
def test_a_part_is_missing(whole, tiny, tmp_path, kind):
    """A whole file is read. What its stage trained and a file lacks is named: nothing runs on random weights."""
    folder, made = whole
    use(kind, folder / f"{kind}.safetensors", tiny)
    for name in ("vit", "translator", "encoder"):
        (tmp_path / f"{name}.safetensors").symlink_to(folder / f"{name}.safetensors")
    path, (tensors, about) = tmp_path / "cut.safetensors", made[kind]
    for part in PARTS:
        left = {n: t for n, t in tensors.items() if not n.startswith(part)}
        if 0 < len(left) < len(tensors):
            save_checkpoint(path, left, about)
            with pytest.raises(UserError, match="cut.safetensors.*(lacks|holds no)"):
                use(kind, path, tiny)


@pytest.mark.parametrize("change, words", [
    (dict(recipe=dict(vit_layers="3")), "vit_layers"), (dict(recipe=dict(distill=-1)), "distill"),
    (dict(recipe=dict(like_words=1)), "like_words"), (dict(data=7), "data = 7"), (dict(images=[]), "images"),
    (dict(text=1.5), "text"), (dict(seed="0"), "seed"), (dict(start="\0"), "start"), (dict(vit="a\0"), "vit"),
    (dict(llm="\0"), "llm"), (dict(step=True, recipe=[]), "recipe"), (dict(stage=3), "stage = 3"),
    (dict(ranges="2-4"), "ranges = '2-4'"), (dict(ranges=[[2]]), "[[2]]"), (dict(ranges=[["a", 4]]), "['a', 4]"),
    (dict(llm=["x"]), "llm = ['x']"), (dict(start=7), "start = 7"),
])
def test_what_a_checkpoint_says_is_checked(whole, tmp_path, change, words):
    _, made = whole
    save_checkpoint(tmp_path / "x.safetensors", made["direct"][0], made["direct"][1] | change)
    refuses(UserError, lambda: open_checkpoint(tmp_path / "x.safetensors"), words)


# ---- Options, one by one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["train", "encoder", "--data", ""], ["data.check", ""]])
def test_an_empty_name_is_an_error(argv, capsys):
    """--data "$DATA" without a DATA: a run on the drawn world would be another experiment, in silence."""
    assert_refused(capsys, argv, "an empty name says nothing")


NO_PICTURES = [
    b"bytes", io.BytesIO(b"x"), 7, None, ["a.png"], torch.zeros(3, 4, 4), np.zeros((4, 4, 3)),
    np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8),
    np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4), bool), "https://example.org/a.png", ""]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("call, value, words", [(call, value, words) for call, values, words in (
    (lambda llm, text: parse_ranges(text), ["", " ", ",", "1-", "-1", "9" * 5000, "1-" + "9" * 5000, "1,,2", "1 - x",
                                            "²", "٣-٤", "1-2-3", "0x1", "1.5", "auto", "None"], "layer"),
    # sampling is checked as on the command line
    (lambda llm, x: llm.generate([[1, 2]], temperature=x), [-1, INF, NAN, 101, None, "hot", []], "temperature"),
    (lambda llm, x: llm.generate([[1, 2]], top_p=x), [0, -1, 1.5, NAN, None], "top_p"),
    (lambda llm, x: llm.generate([[1, 2]], max_new_tokens=x), [-5, 2.7, 10**9, None, "many"], "max_new_tokens"),
    (lambda llm, prompt: llm.generate([[1], prompt]), [[]], "empty prompt"),
    (lambda llm, n: llm.generate([[1]], max_new_tokens=n), [512], "513 positions are too many"),
    (lambda llm, i: llm.generate([[1], [1, i]]), [500, -1, 10**12, -200], "is not in this LLM's"),
    (lambda llm, sizes: evaluate.compare(None, None, *sizes), [(1, 0), (0, 1), (-1, 5), (3, -2)], "at least 1"),
    (lambda llm, source: preprocess(source), NO_PICTURES, ""),
) for value in values])
def test_values_that_are_none(tiny, call, value, words):
    refuses(UserError, lambda: call(tiny, value), words)


def test_layer_ranges():
    assert parse_ranges("none") == [] and parse_ranges("16-26") == [(16, 26)]
    assert parse_ranges("12-17,20") == parse_ranges("1 2 - 1 7, 20") == [(12, 17), (20, 20)]


@pytest.mark.parametrize("text, shown", [
    ("a\x1b[31mb", r"a\x1b[31mb"), ("\x07\x08\r", r"\x07\x08\r"), ("\x9b1m", r"\x9b1m"), ("\u202eabc", r"\u202eabc"),
    ("\u2028", r"\u2028"), ("\ud800", r"\ud800"), ("naïve – 日本\n\tx", "naïve – 日本\n\tx"), ("\x7f", r"\x7f"),
])
def test_what_a_terminal_acts_on_is_spelled_out(text, shown, capsys):
    assert printable(text) == shown
    run_cli(lambda: (_ for _ in ()).throw(UserError(f"x{text}".replace("\n", " "))))
    assert not {c for c in capsys.readouterr().err if c != "\n" and not c.isprintable()} - {"\t"}


@pytest.mark.parametrize("size", [3e38, 1e25])        # to nan, or to a norm of 0
def test_weights_that_overflow(tiny, size):
    """Finite, but what they predict is not: no table, no trajectory, no answer is made of that."""
    llm = copy.deepcopy(tiny)
    llm.model.layers[3].mlp.down_proj.weight.data.fill_(size)
    x, tokens = llm.run(llm.embed(torch.arange(2)[None])), torch.ones(1, 2, dtype=torch.long)
    for call in (lambda: llm.generate([[1, 2]]), lambda: prediction_trajectory(llm, torch.arange(8)[None]),
                 lambda: evaluate.sum_logp(llm, x, tokens, tokens > 0)):
        refuses(UserError, call, "predicts nothing")


def test_a_text_beyond_the_context(tiny, capsys):
    llm = copy.deepcopy(tiny)
    for _ in range(2):
        llm(torch.ones(1, 513, dtype=torch.long))
    assert capsys.readouterr().err.count("warning: 513 positions") == 1


def test_samples_are_drawn_as_they_are_needed(monkeypatch):
    """A million images: only those of the first batch are there when the first answer is asked for."""
    drawn = []
    draw = lambda *a: drawn.append(a) or types.SimpleNamespace(options=["a"], caption="", task=a[0])
    def stop(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "systems", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.compare(None, n=10**6, batch=20, progress=False, draw=draw)
    assert len(drawn) == 20


# ---- Questions, pictures and records --------------------------------------------------------------------------------

MARKS = ["<image>", "<im<image>age>", "<<image>image>", "<im<im<image>age>age>", "<image><image>", "<ima<image>ge>",
         "a <image> b", "<image" * 3 + ">" * 3, "<im" * 5000 + "<image>" + "age>" * 5000]


@pytest.mark.parametrize("text", MARKS, ids=range(len(MARKS)))
def test_no_text_shows_an_image(text):
    for left, right in (("", ""), ("x ", " y"), ("<im", "age>"), ("", text)):
        assert "<image>" not in without_image(left + text + right)
        assert wrap(left + text + right).count("<image>") == 1


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_pictures_as_arrays(shape):
    assert open_image(np.full(shape, 255, np.uint8)).size == (7, 5)


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg", "a.pdf", "a.ps"])
def test_no_picture_starts_another_program(tmp_path, monkeypatch, name):
    """An EPS, however it is called, would be handed to Ghostscript."""
    def started(*args, **options):
        pytest.fail("another program was started")
    monkeypatch.setattr(subprocess, "Popen", started)
    eps = io.BytesIO()
    Image.new("RGB", (8, 8)).save(eps, "EPS")
    (tmp_path / name).write_bytes(eps.getvalue())
    refuses(UserError, lambda: open_image(tmp_path / name), name)
    refuses(UserError, lambda: open_image(Image.open(tmp_path / name)), "EPS")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_wherever_it_comes_from(tmp_path, orientation):
    image = Image.new("RGB", (30, 20), "white")
    image.paste("red", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    turned = open_image(tmp_path / "a.png")
    assert open_image(Image.open(tmp_path / "a.png")).tobytes() == turned.tobytes()
    assert turned.size == ((20, 30) if orientation > 4 else (30, 20)) and open_image(turned).size == turned.size
    assert (turned.tobytes() == image.tobytes()) == (orientation == 1)


@pytest.mark.parametrize("mode, clear", [("RGB", (255, 0, 0)), ("L", 7), ("P", 0), ("1", 1), ("I;16", 300)])
def test_transparency_lies_over_white(tmp_path, mode, clear):
    """tRNS: one color of a PNG is transparent; it comes out white, not black."""
    image = Image.new(mode, (4, 4), clear)
    image.save(tmp_path / "a.png", transparency=clear)
    assert open_image(tmp_path / "a.png").getcolors() == [(16, (255, 255, 255))]


def test_a_png_with_a_large_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * 2 * 10**6, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    refuses(UserError, lambda: open_image(tmp_path / "a.png"), "a.png: ", " text that is too large")


# ---- A run that goes on ---------------------------------------------------------------------------------------------


RECIPE = dict(steps=4, lr=1e-3, micro_batch=0, workers=0, checkpointing=False, save_every=100)
ABOUT = dict(stage="encoder", llm="llm", vit="vit.safetensors", start=None, seed=0, data="data.json", images=".",
             text=None, ranges=[], recipe=RECIPE)


@pytest.fixture
def resume(tmp_path, monkeypatch):
    """resume(was, now, step): as what a run goes on that has said the first and has come to a step."""
    monkeypatch.chdir(tmp_path)
    for name in ("llm", "other", "sub", "moved"):
        Path(name).mkdir()
    for name in ("vit.safetensors", "moved/vit.safetensors"):
        Path(name).touch()

    def resume(was, now, step=2):
        save_checkpoint("run/state.safetensors", {"master.x": torch.zeros(1)}, dict(step=step, about=was))
        return check_resume(Path("run"), now)
    return resume


@pytest.mark.parametrize("change", [
    dict(recipe=RECIPE | dict(micro_batch=2)), dict(recipe=RECIPE | dict(workers=4, save_every=1)),
    dict(recipe=RECIPE | dict(checkpointing=True)), dict(data="sub/data.json"), dict(images="elsewhere"),
    dict(llm="sub/../llm"), dict(vit="./vit.safetensors"),
    dict(vit="moved/vit.safetensors", was="gone/vit.safetensors"),
])
def test_what_changes_nothing_goes_on(resume, change):
    was = ABOUT | ({"vit": change.pop("was")} if "was" in change else {})
    got = resume(was, ABOUT | change)
    assert all(got[k] == v for k, v in change.items() if k != "recipe")         # the paths of now are read


@pytest.mark.parametrize("change, step", [
    (dict(seed=1), 2), (dict(data=None), 2), (dict(text="x.json"), 2), (dict(llm="other"), 2), (dict(start="s"), 2),
    (dict(recipe=RECIPE | dict(lr=1.0)), 2), (dict(ranges=[[1, 2]]), 2), (dict(vit="moved/vit.safetensors"), 2),
    ({}, -1), ({}, 5), ({}, 10**9),
])
def test_what_changes_something_does_not(resume, change, step):
    with pytest.raises(UserError, match="state.safetensors"):
        resume(ABOUT, ABOUT | change, step)


@pytest.mark.parametrize("change", ["json", "picture", "another"])
def test_changed_data_is_noticed(tmp_path, change):
    def digest(folder="."):
        (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
        return LlavaRecords(tmp_path / folder / "data.json", tmp_path / folder).digest

    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    records = [dict(conversations=turns, image="a.png")]
    before = digest()
    (tmp_path / "sub").mkdir()
    for file in ("a.png", "data.json"):
        shutil.copy(tmp_path / file, tmp_path / "sub" / file)
    assert digest() == before == digest("sub")
    if change == "picture":
        Image.effect_noise((40, 30), 50).save(tmp_path / "a.png")
    elif change == "json":
        turns[1]["value"] = "A circle."
    else:
        records *= 2
    assert digest() != before


def test_a_log_of_another_run_is_noticed(tmp_path):
    about = dict(stage="encoder", read=["new"])
    said = dict(step=0, about=about | dict(read=["old"]))
    save_checkpoint(tmp_path / "state.safetensors", {"master.x": torch.zeros(1)}, said)
    with pytest.raises(UserError, match="have changed since"):
        Log(tmp_path, about, {}, None, Recipe(steps=4), resume=True)


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first lives; its lock ends with it, however it ends."""
    code = ("import os, pathlib, sys, time; from log import lock; lock(pathlib.Path(sys.argv[1])); "
            "print('has it', flush=True); os.fork() and time.sleep(99) or time.sleep(9)")       # with a worker
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE,
                             encoding="utf-8")
    assert first.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match="another run is writing into"):
        lock(tmp_path)
    first.kill()
    first.wait()                    # but not for the worker
    lock(tmp_path)
    lock(tmp_path)                  # this process may go on in its own folder
    unlock()
    assert not list(tmp_path.iterdir())


class Walk:
    """Samples without images whose question is of a given length, in words."""
    def __init__(self, *lengths):
        self.lengths = lengths

    def __getitem__(self, k):
        question = "word " * self.lengths[k % len(self.lengths)]
        return Sample(None, [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}])


@pytest.mark.parametrize("lengths, batch, steps, warns", [
    ((3,), 2, 3, None), ((3, 200), 2, 3, "3 of 6"), ((3, 3, 3, 200), 1, 4, "1 of 4"), ((200,), 2, 1, "error"),
    ((200,), 2, 3, "error"), ((200,), 50, 9, "error"), ((200, 200, 200, 3), 1, 4, "3 of 4"),
])
def test_samples_that_teach_nothing(tiny_tokenizer, capsys, lengths, batch, steps, warns):
    batches = Batches(Walk(*lengths), Recipe(batch=batch, max_length=64), tiny_tokenizer, 19, 64)
    if warns == "error":
        with pytest.raises(UserError, match="none of the first .* max_length=64"):
            list(batches.loader(range(steps)))
        return
    assert len(list(batches.loader(range(steps)))) == steps
    err = capsys.readouterr().err
    assert (err == "") if warns is None else (f"warning: {warns} samples" in err and err.count("\n") == 1)


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_llm):
    return Tokenizer.from_pretrained(tiny_llm)


# ---- What is shared -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors, about, words", [
    ({"model.norm.weight": 1}, {}, "no checkpoint of train.py"), ({}, {}, "nothing"),
    ({"lm_head.weight": 1}, dict(stage="encoder"), "no checkpoint of train.py"),
    ({"decoder.model.embed_tokens.weight": 1, "adapter.0.weight": 1}, dict(stage="encoder"), "the LLM itself"),
    ({"decoder.lm_head.weight": 1}, dict(stage="translator", ranges=[[2, 4]]), "the LLM itself"),
    ({"decoder.model.layers.1.mlp.up_proj.weight": 1}, dict(stage="translator", ranges=[[2, 4]]), "the LLM itself"),
    ({"decoder.model.layers.21.mlp.up_proj.weight": 1}, dict(stage="translator", ranges=[[16, 20], [21, 24]]), "LLM"),
    ({"encoder.vision_model.post_layernorm.bias": 1}, dict(stage="encoder"), "no projector"),
    ({"adapter.0.weight": 1}, dict(stage="encoder"), "which vit"),
    ({"adapter.0.weight": 1}, dict(stage="encoder", llm=None, vit="org/clip"), "which llm"),
    ({"adapter.0.weight": 1}, dict(stage="decoder"), "of stage"),
])
def test_what_is_not_to_be_shared(tmp_path, tensors, about, words):
    tensors = {n: torch.zeros(x) for n, x in tensors.items()}
    about = {k: v for k, v in (dict(llm="org/llm") | about).items() if v is not None}
    refuses(UserError, lambda: share.share("x.safetensors", tensors, about, tmp_path / "out"), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scores", [[], {}, dict(about={}, rows=3), dict(about={}, rows=[{}]), dict(about={}),
                                    dict(about={}, rows=[dict(system="a", trained=True)], samples=1, seed=0),
                                    dict(about={}, rows=[dict(system=[], trained=True, said=1)])])
def test_scores_that_are_none(tmp_path, scores):
    (tmp_path / "x.json").write_text(json.dumps(scores))
    refuses(UserError, lambda: share.score_table(tmp_path / "x.json", {}), "x.json")


# ---- The terminal ---------------------------------------------------------------------------------------------------


def fake_vlm(size):
    """Of a tiny context: a character is a token."""
    prompt = lambda messages: [1] * sum(len(m["content"]) + 5 for m in messages)
    config = types.SimpleNamespace(max_position_embeddings=size)
    return types.SimpleNamespace(prompt=prompt, decoder=types.SimpleNamespace(config=config))


def converse(monkeypatch, capsys, size, *typed):
    """(what was asked, what was printed) when these lines are typed."""
    lines, asked = iter(typed), []
    def ask(vlm, image, messages, **options):
        if len(vlm.prompt(messages)) > size - options["max_new_tokens"]:
            raise UserError("too many positions")
        asked.append([m["content"] for m in messages])
        return "So.", "0 s"
    def read(prompt):
        for line in lines:
            return line
        raise EOFError
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(graft, "ask", ask)
    graft.chat(fake_vlm(size), None, dict(max_new_tokens=10))
    return asked, capsys.readouterr().out


def test_a_conversation_longer_than_the_context(monkeypatch, capsys):
    asked, out = converse(monkeypatch, capsys, 200, *["What is it?"] * 9)
    assert len(asked) == 9 and all(turns[0].count("<image>") == 1 for turns in asked) and "forgotten" in out
    assert all("<image>" not in t for turns in asked for t in turns[1:])
    asked, out = converse(monkeypatch, capsys, 200, "a", "x" * 500, "b", "")
    assert len(asked) == 2 and "too long" in out and asked[1][-1] == "b" and len(asked[1]) == 3
    asked, _ = converse(monkeypatch, capsys, 10**4, *[f"q {m}" for m in MARKS[:6]], "b <image>?")
    assert all("".join(turns).count("<image>") == 1 for turns in asked) and len(asked) == 7     # typed marks are none


def test_a_closed_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    graft.chat(fake_vlm(99), None, {})
    assert "empty line" in capsys.readouterr().out


@pytest.mark.parametrize("environment, words", [
    (dict(RANK="5", WORLD_SIZE="2"), "do not find each other"), (dict(RANK="x", WORLD_SIZE="2"), "do not find"),
    (dict(RANK="0"), "WORLD_SIZE"), (dict(RANK="0", WORLD_SIZE="2"), "do not find each other"),
    (dict(RANK="-1", WORLD_SIZE="2"), "do not find each other"),
])
def test_a_process_alone(monkeypatch, environment, words):
    """A peer that never comes, or a hand-set RANK: after a while a line, and not half an hour of silence."""
    monkeypatch.setattr(parallel, "PATIENCE", timedelta(seconds=2))
    for name, value in (dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29613") | environment).items():
        monkeypatch.setenv(name, value)
    if "WORLD_SIZE" not in environment:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuses(UserError, lambda: parallel.join("cpu"), words)


def test_without_their_packages(monkeypatch, capsys):
    monkeypatch.setattr(run, "nbformat", None)
    assert_refused(capsys, ["notebooks.run"], "pip install")
    monkeypatch.setattr(lmms_eval_model, "lmms", None)
    refuses(MissingFile, lmms_eval_model.main, "pip install lmms-eval")

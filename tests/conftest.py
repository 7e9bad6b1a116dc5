"""Shared fixtures. Where there is no GPU the Triton kernels run in Triton's interpreter: they are tested everywhere."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # before anything imports triton

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from cli import run_cli
from data import world
from formats import official
from formats.tokenizer import Tokenizer
from model import VLM, Llama, LlamaConfig
from surrogate import load_surrogate


@pytest.fixture(scope="session")
def default_gguf():
    """Path of the default LLM's weights, downloaded on first use."""
    return official.find(official.DEFAULT_LLM)


@pytest.fixture(scope="session")
def smollm(default_gguf):
    """The default LLM in float32, on its real weights. Tests must leave it as it is."""
    return Llama.from_pretrained(default_gguf)


@pytest.fixture(scope="session")
def smollm_tokenizer(default_gguf):
    return Tokenizer.from_pretrained(default_gguf)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(step, run): run() until its process is killed before this step."""
    import train

    def killed_at(step, run):
        def schedule(i, *args, lr_at=train.lr_at, **options):
            if i == step:
                raise KeyboardInterrupt
            return lr_at(i, *args, **options)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, "lr_at", schedule)
            run()
    return killed_at


def rows_of(folder):
    """The rows of a run's log: [{column: text}, …]."""
    with open(Path(folder) / "log.csv") as f:
        return list(csv.DictReader(f))


def without_clock(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@torch.no_grad()
def generate_slowly(llm, prompt, n, stop=()):
    """Greedy, and without a cache: the whole sequence anew for every token. The reference for all generation."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(llm(torch.tensor([ids], device=llm.device))[0, -1].argmax()))
        if ids[-1] in stop:
            return ids[len(prompt):-1]
    return ids[len(prompt):]


def refuses(kind, call, *words):
    """`call` fails with exactly this kind of error: a single line that says all these words."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert type(error.value) is kind        # not a subclass that happens to pass, such as UnicodeDecodeError
    assert text and "\n" not in text and len(text) < 1000, text
    assert all(word in text for word in words), f"{words} are not all in: {text}"


def assert_refused(capsys, argv, *words):
    """A command line ends with status 2 and one line on stderr that holds these words."""
    name, *argv = argv
    capsys.readouterr()
    assert run_cli(lambda: importlib.import_module(name).main(argv)) == 2
    line = capsys.readouterr().err.split("\r")[-1].lstrip("\n")
    line = line[line.find("error: "):]
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
    assert all(word in line for word in words), f"{words} are not all in: {line}"


# ---- official formats, written by hand: a random Llama, a tokenizer --------------------------------------------------

TINY = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, head_dim=8)


def random_llama(**sizes):
    """Weights so large that every layer has a say in the prediction."""
    torch.manual_seed(0)
    llm = Llama(dataclasses.replace(TINY, **sizes))
    for p in llm.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    return llm.requires_grad_(False)


@torch.no_grad()
def shake(surrogate):
    """Translators as after training: no longer copies."""
    for i in surrogate.translators:
        for p in surrogate.model.layers[i].parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return surrogate


def save_llama(folder, llm):
    """Hugging Face's layout."""
    save_file(llm.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(vars(llm.config) | dict(model_type="llama")))
    return folder


def with_names(llm, names):
    """(name, tensor) of a Llama by other names; the pairs that RoPE turns side by side, as Meta and llama.cpp do."""
    for name, w in llm.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(-1, 2, llm.config.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        yield name, w


def save_gguf(path, llm=None, architecture="llama", tokenizer=None, extra=(), more=(), keys=(), **sizes):
    """llama.cpp's file of a Llama, or of a tokenizer alone: {"model": "gpt2", "tokens": [...], ...}. extra: names of
    more tensors, of zeros. more: tensors. keys: more of its header. sizes: other values than the Llama's, None for
    none."""
    import gguf
    writer = gguf.GGUFWriter(path, architecture)
    if llm:
        c = llm.config
        sizes = {"context_length": c.max_position_embeddings, "embedding_length": c.hidden_size,
                 "feed_forward_length": c.intermediate_size, "block_count": c.num_hidden_layers,
                 "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
                 "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_theta} | sizes
    for key, value in ({f"{architecture}.{k}": v for k, v in sizes.items()} | dict(keys)).items():
        if value is not None:
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name, value in (tokenizer or {}).items():
        dict(model=writer.add_tokenizer_model, pre=writer.add_tokenizer_pre, tokens=writer.add_token_list,
             types=writer.add_token_types, merges=writer.add_token_merges)[name](value)
    names = {"model.layers": "blk", "self_attn.": "attn_", "attn_o_proj": "attn_output", "mlp.": "ffn_", "_proj": "",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.embed_tokens": "token_embd",
             "model.norm": "output_norm", "lm_head": "output"}
    tensors = dict(with_names(llm, names) if llm else {}) | dict.fromkeys(extra, torch.zeros(4)) | dict(more)
    for name, w in tensors.items():
        writer.add_tensor(name, w.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- a tiny LLM on disk, and all stages run on it: what train.py and graft.py need, in seconds -----------------------


def save_tiny_llm(folder, width=32):
    """A random Llama of 6 layers in Hugging Face's layout; its byte-level BPE is learnt from the world's questions."""
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    texts = [m["content"] for task in world.QUESTIONS for i in range(20) for m in world.world(task, i).messages]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.save(str(folder / "tokenizer.json"))
    return str(save_llama(folder, random_llama(
        vocab_size=500, hidden_size=width, num_hidden_layers=6, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=512)))


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Path of a tiny LLM."""
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def stages(tiny_llm, tmp_path_factory):
    """Every stage run for three steps from the command line, each from the one before: {stage: its checkpoint}.

    "full" is the encoder trained directly on the full LLM.
    """
    import train
    from extras import vit
    folder = tmp_path_factory.mktemp("runs")
    files = {s: str(folder / s / f"{s}.safetensors") for s in ("vit", "translator", "encoder", "decoder")}
    files["full"] = str(folder / "full" / "encoder.safetensors")
    numbers = ["steps=3", "batch=6", "lr=1e-3", "dtype=float32"]
    common = ["--llm", tiny_llm, *numbers]
    vit.main([*numbers[:3], "workers=0", "--out", str(folder / "vit")])
    train.main(["translator", *common, "--init", files["vit"], "--replace", "2-4", "--out", str(folder / "translator")])
    train.main(["encoder", *common, "--init", files["translator"], "--out", str(folder / "encoder")])
    train.main(["decoder", *common, "--init", files["encoder"], "--out", str(folder / "decoder")])
    train.main(["encoder", *common, "--init", files["vit"], "--direct", "--out", str(folder / "full")])
    return files


@pytest.fixture(scope="module")
def vlm(stages, tiny_llm):
    """The graft: an encoder trained with the surrogate, and the full LLM."""
    return VLM.from_pretrained(tiny_llm, stages["encoder"])


@pytest.fixture(scope="module")
def surrogate(vlm, stages):
    return load_surrogate(vlm.decoder, stages["encoder"])

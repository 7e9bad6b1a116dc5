"""model.py: Llama, ViT and VLM against transformers, on tiny random models and on the default LLM's real weights."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import generate_slowly, save_tiny_llm
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers import LlamaConfig as HFLlamaConfig

import graft
import model
import surrogate
from cli import printable
from data.images import preprocess
from formats import checkpoints
from formats.tokenizer import IMAGE
from kernels.graph import Graphs
from model import VLM, KVCache, Llama, ViT, sample
from surrogate import build_surrogate

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4  # the project's promise for float32 logits

# The original context is 32 positions here and the sequences are longer, so that the scaling changes the logits a lot.
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)  # fmt: skip


def randomize(module, std=0.25):
    """Weights so large that attention and every norm matter: the usual 0.02 would hide a wrong rotation or order."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=std)
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    return module.eval()


def hf_llama(config=HFLlamaConfig, kind=LlamaForCausalLM, **changes):
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
    return randomize(kind(config(**sizes | changes)))


TINY_VIT = dict(image_size=32, patch_size=8, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=3)  # fmt: skip


def assert_same_function(ours, theirs, T=40):
    """Logits of all positions, and the gradient of every parameter."""
    tokens = torch.randint(theirs.config.vocab_size, (2, T))
    ours.requires_grad_(True)
    a, b = ours(tokens), theirs(tokens).logits
    assert a.shape == (2, T, theirs.config.vocab_size) and a.dtype == torch.float32
    assert (a - b).abs().max() <= TOLERANCE * max(1, b.abs().max())
    weight = torch.randn_like(b) / b.numel() ** 0.5
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    theirs_grad = {n: p.grad for n, p in theirs.named_parameters()}
    assert theirs_grad.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert (p.grad - theirs_grad[name]).abs().max() <= TOLERANCE * max(1, theirs_grad[name].abs().max()), name


# ---- Llama: parity with transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(num_attention_heads=6, num_key_value_heads=6),                                  # GQA ratio 1
    dict(num_attention_heads=6, num_key_value_heads=2),                                  # 3
    dict(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True),        # 4, tied
    dict(head_dim=16),                                                                  # 6 heads of 16 in a width of 48
    dict(rope_parameters=LLAMA3_ROPE),
    dict(config=Qwen2Config, kind=Qwen2ForCausalLM),
    dict(config=Qwen3Config, kind=Qwen3ForCausalLM, head_dim=16, tie_word_embeddings=True),
], ids=["gqa1", "gqa3", "gqa4-tied", "head_dim", "llama3-rope", "qwen2", "qwen3"])  # fmt: skip
def test_llama_matches_transformers(tmp_path, changes):
    theirs = hf_llama(**changes)
    theirs.save_pretrained(tmp_path)
    ours = Llama.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    assert_same_function(ours, theirs, T=90)
    if "rope_parameters" in changes:  # or else this test would pass without the scaling
        tokens = torch.randint(97, (1, 90))
        ours.config.rope_scaling, ours.rope_cache = None, None
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 0.1


def test_qwen_generates_like_transformers(tmp_path):
    """With the cache, and as a surrogate that is the whole LLM; in 8 bits, the biases stay."""
    for name, changes in dict(qwen2=dict(config=Qwen2Config, kind=Qwen2ForCausalLM),
                              qwen3=dict(config=Qwen3Config, kind=Qwen3ForCausalLM)).items():
        theirs = hf_llama(**changes)
        theirs.save_pretrained(tmp_path / name)
        ours, prompt = surrogate.from_pretrained(tmp_path / name, [(1, 1)]), [5, 17, 3, 8]
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert ours.generate([prompt], max_new_tokens=12) == [expected[0, 4:].tolist()]
        rounded, tokens = Llama.from_pretrained(tmp_path / name, quantize="int8"), torch.randint(97, (1, 20))
        whole = build_surrogate(rounded, [(1, 1)])      # its translator is in floating point again, as rounded
        for llm in (rounded, whole):
            assert (llm(tokens) - ours(tokens)).abs().mean() < 0.1 * ours(tokens).std(), name


def test_llama_official_config(tmp_path):
    """The official files say rope_theta and rope_scaling (transformers 4), and may omit what follows from the rest."""
    theirs = hf_llama(rope_parameters=LLAMA3_ROPE)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    del config["head_dim"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | dict(rope_theta=500.0, rope_scaling=scaling)))
    assert_same_function(Llama.from_pretrained(tmp_path), theirs, T=90)


def test_llama_sharded_safetensors(tmp_path):
    theirs = hf_llama()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_function(Llama.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("tied, zipped", [(True, True), (False, False)], ids=["zip", "before-torch-1.6"])
def test_llama_pytorch_bin(tmp_path, tied, zipped):
    theirs = hf_llama(tie_word_embeddings=tied)
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()  # a tied lm_head is in it, as in files of that time
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # and so is this table
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_same_function(Llama.from_pretrained(tmp_path), theirs)


def to_meta(folder, theirs, shards=1, split_embedding=0):
    """Write a transformers Llama in Meta's layout: other names, RoPE pairs interleaved, each matrix cut into shards."""
    c = theirs.config
    names = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
             "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "lm_head": "output",
             "model.": ""}  # fmt: skip
    split = {"wo": 1, "w2": 1, "tok_embeddings": split_embedding}
    parts = [{} for _ in range(shards)]
    for name, w in theirs.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(-1, 2, c.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        cuts = [w] * shards if w.dim() == 1 else w.chunk(shards, dim=split.get(name.split(".")[-2], 0))
        for part, cut in zip(parts, cuts):
            part[name] = cut.clone()
    params = dict(dim=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads,
                  n_kv_heads=c.num_key_value_heads, vocab_size=c.vocab_size, norm_eps=c.rms_norm_eps,
                  rope_theta=c.rope_parameters["rope_theta"], multiple_of=16, ffn_dim_multiplier=1.3)  # fmt: skip
    if c.rope_parameters["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
    (folder / "params.json").write_text(json.dumps(params))
    for i, part in enumerate(parts):
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")


@pytest.mark.parametrize("tied, shards, split_embedding, factor", [
    (False, 1, 0, None),  # Llama 3
    (False, 2, 0, 8.0),   # Llama 3.1: model-parallel shards, scaled RoPE
    (False, 2, 1, None),  # shards of the time of Llama 2 split the embedding's width
    (True, 1, 0, 32.0),   # Llama 3.2: tied, though the file holds the head, and stretched by 32
], ids=["3", "3.1-two-shards", "2-two-shards", "3.2"])  # fmt: skip
def test_llama_meta_layout(tmp_path, tied, shards, split_embedding, factor):
    rope = dict(rope_theta=500000.0, rope_type="default")
    if factor:  # the official numbers, params.json does not say them
        rope = dict(rope_theta=500000.0, rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position_embeddings=8192)  # fmt: skip
    theirs = hf_llama(tie_word_embeddings=tied, rope_parameters=rope)
    to_meta(tmp_path, theirs, shards, split_embedding)
    ours = Llama.from_pretrained(tmp_path)
    assert ours.config.tie_word_embeddings == tied
    assert_same_function(ours, theirs, T=300)  # long enough for the slow frequencies
    if factor:
        tokens = torch.randint(97, (1, 300))
        ours.config.rope_scaling, ours.rope_cache = None, None
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 100 * TOLERANCE


def test_llama_gguf(tmp_path):
    """llama.cpp's file: interleaved q and k like Meta's, and Llama 3.1's RoPE scaling as one divisor per frequency."""
    import gguf
    theirs = hf_llama(rope_parameters=LLAMA3_ROPE, head_dim=16)
    c = theirs.config
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(LLAMA3_ROPE["rope_theta"])
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
             "mlp.up_proj": "ffn_up", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.layers": "blk", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
             "lm_head": "output"}  # fmt: skip
    for name, w in theirs.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            w = w.reshape(-1, 2, c.head_dim // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        writer.add_tensor(name, w.contiguous().numpy())
    plain = 500.0 ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
    writer.add_tensor("rope_freqs.weight", (plain / theirs.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_function(Llama.from_pretrained(tmp_path / "m.gguf"), theirs, T=90)


def test_llama_dtype_and_loss(tmp_path):
    theirs = hf_llama(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    assert {p.dtype for p in Llama.from_pretrained(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    ours = Llama.from_pretrained(tmp_path)
    tokens, targets = torch.randint(97, (2, 11)), torch.randint(97, (2, 11))
    targets[0, :7] = targets[1, 3] = -100
    x = ours.run(ours.embed(tokens)).requires_grad_()
    loss = ours.loss(x, targets)
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert abs(loss - expected) < 1e-3
    loss.backward()
    assert (x.grad[targets < 0] == 0).all() and (x.grad[targets >= 0] != 0).any(-1).all()


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[5, 17, 3, 88, 41, 2], [60, 1], [9, 9, 30, 12]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    hf_llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True).save_pretrained(folder)
    return Llama.from_pretrained(folder)


def test_cached_logits_equal_uncached(tiny):
    """In pieces of 5, 1, 3 and 1 positions: several new positions after old ones need a mask of their own."""
    tokens = torch.randint(97, (2, 10))
    cache = KVCache(tiny, 2, 10)
    pieces = [tiny(t, cache=cache) for t in tokens.split([5, 1, 3, 1], dim=1)]
    assert (torch.cat(pieces, dim=1) - tiny(tokens)).abs().max() <= TOLERANCE


def test_cache_with_ragged_pieces(tiny):
    """Rows that differ in length, twice: prompts, then continuations, each padded on the right."""
    first, then = [[5, 6, 7, 8], [9, 10]], [[11, 12], [13, 14, 15]]
    cache = KVCache(tiny, 2, 10)
    padded = lambda rows: torch.tensor([r + [0] * (max(map(len, rows)) - len(r)) for r in rows])
    for rows in (first, then):
        tiny.run(tiny.embed(padded(rows)), cache=cache)
        cache.advance(padded(rows).shape[1], torch.tensor([len(r) for r in rows]))
    logits = tiny(torch.tensor([[16], [16]]), cache=cache)[:, 0]
    for row, a, b in zip(logits, first, then):
        assert (row - tiny(torch.tensor([a + b + [16]]))[0, -1]).abs().max() <= TOLERANCE


def test_greedy_with_cache_equals_without(tiny):
    for prompt in PROMPTS:
        cached = tiny.generate([prompt], max_new_tokens=40)
        assert cached == [generate_slowly(tiny, prompt, 40)]
        assert len(cached[0]) == 40 and len(set(cached[0])) > 3  # not stuck on one token, which would prove little


def test_batch_of_different_lengths_equals_each_alone(tiny):
    alone = [tiny.generate([p], max_new_tokens=30)[0] for p in PROMPTS]
    assert tiny.generate(PROMPTS, max_new_tokens=30) == alone


@torch.no_grad()
def test_steps_of_one_shape(tiny):
    """As a CUDA graph replays them: over the whole cache, whose rows' lengths are a tensor."""
    embeds, lengths = tiny.embed(torch.randint(97, (2, 6))), torch.tensor([6, 4])
    for ragged in (None, lengths):
        said = []
        for fixed in (False, True):
            cache = KVCache(tiny, 2, 6 + 20)
            x = tiny.run(embeds, cache=cache)[:, 3]
            cache.advance(6, ragged)
            if fixed:
                cache.fix()
            said.append(torch.stack(list(tiny.decode(x, cache, 20))))
        assert torch.equal(*said)


@torch.no_grad()
def test_a_recorded_step_is_kept_for_the_next_answer(tiny, monkeypatch):
    """With a recorder that records nothing: answers of one batch and about one length share a recording, those that
    run at once do not, nor do other weights; and nothing is left of the answer before."""
    made = []
    monkeypatch.setattr("model.record", lambda step, x, stream: made.append((len(x), stream)) or step)
    llm = copy.deepcopy(tiny)
    llm.graphs = Graphs(keep=2, new_stream=itertools.count().__next__)

    def answer(batch, length=5, size=12):
        """As decode does on a GPU."""
        cache = KVCache(llm, batch, size)
        x = llm.run(llm.embed(torch.arange(batch * length).view(batch, length)), cache=cache)[:, -1]
        cache.advance(length)
        with llm.graph(cache) as (step, used):
            for _ in range(3):
                yield (token := llm.logits(x).argmax(-1))
                x = step(token)
                used.advance(1)

    def check(*answers):
        got = [torch.stack(tokens, 1).tolist() for tokens in zip(*zip(*(answer(*a) for a in answers)))]
        assert got == [llm.generate(torch.arange(n * T).view(n, T).tolist(), max_new_tokens=3) for n, T, *_ in answers]
    check((1, 9))
    check((1, 5, 99))
    check((2, 5))
    assert made == [(1, 0), (2, 1)]
    check((1, 5), (1, 7))
    assert made[2:] == [(1, 2)]                 # and the one of two rows is forgotten: two are kept
    check((2, 5))
    assert made[3:] == [(2, 1)]                 # by its stream
    llm.load_state_dict({n: t + 0.1 for n, t in llm.state_dict().items()}, assign=True)
    check((2, 5))
    assert len(made) == 5


def test_stop_tokens(tiny):
    free = tiny.generate(PROMPTS, max_new_tokens=30)
    stop = {free[0][4], free[1][9]}
    cut = [next((row[:i] for i, t in enumerate(row) if t in stop), row) for row in free]
    assert len(cut[0]) <= 4 and len({len(row) for row in cut}) > 1
    assert tiny.generate(PROMPTS, max_new_tokens=30, stop=stop) == cut
    assert tiny.generate(PROMPTS, max_new_tokens=0) == [[], [], []]


def test_generation_refuses_what_it_cannot_do(tiny):
    with pytest.raises(ValueError, match="empty prompt"):
        tiny.generate([[1, 2], []])
    with pytest.raises(ValueError, match="2048"):  # the model's context
        tiny.generate([[1, 2]], max_new_tokens=2048)


def test_temperature_and_top_p():
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15])
    draw = lambda **options: sample(probs.log().expand(20000, -1), **options).bincount(minlength=4) / 20000
    assert draw()[1] == 1
    assert (draw(temperature=1) - probs).abs().max() < 0.02
    sharp = probs.square() / probs.square().sum()
    assert (draw(temperature=0.5) - sharp).abs().max() < 0.02
    for top_p, kept in [(0, [1]), (0.4, [1]), (0.6, [1, 2]), (0.9, [1, 2, 3]), (1, [0, 1, 2, 3])]:
        expected = torch.zeros(4)
        expected[kept] = probs[kept] / probs[kept].sum()
        share = draw(temperature=1, top_p=top_p)
        assert (share > 0).nonzero().flatten().tolist() == kept and (share - expected).abs().max() < 0.02


def test_seeded_generator_reproduces(tiny):
    def draw(seed):
        options = dict(temperature=1.0, top_p=0.95, max_new_tokens=20)
        return tiny.generate(PROMPTS, generator=torch.Generator().manual_seed(seed), **options)
    assert draw(3) == draw(3) != draw(4)


def test_smollm_generates_like_transformers(smollm, smollm_tokenizer):
    """The default LLM's real weights: the same tokens as transformers', with the cache and without."""
    with torch.device("meta"):
        theirs = LlamaForCausalLM(HFLlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0), max_position_embeddings=8192))  # fmt: skip
    theirs.load_state_dict(smollm.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its table was on the meta device too
    questions = ["What is the capital of France?", "Name a color.", "Is a dog an animal?", "What is 2 + 2?", "Hello!"]
    prompts = [smollm_tokenizer.chat([{"role": "user", "content": q}]) for q in questions]
    stop, n = smollm_tokenizer.stop_tokens, 12
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.eval().generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n,
                                     eos_token_id=sorted(stop), pad_token_id=0)[0].tolist()  # fmt: skip
        expected.append([t for t in out[len(prompt):] if t not in stop])
    assert "Paris" in smollm_tokenizer.decode(expected[0])  # and not by chance: the reference itself is sane
    assert smollm.generate(prompts, stop=stop, max_new_tokens=n) == expected  # one batch, lengths differ
    assert [smollm.generate([p], stop=stop, max_new_tokens=n)[0] for p in prompts] == expected
    assert [generate_slowly(smollm, p, n, stop) for p in prompts] == expected


# ---- ViT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size, patch, tokens", [
    ("CLIPVisionModel", 32, 8, 17), ("CLIPModel", 32, 8, 17), ("pytorch_model.bin", 32, 8, 17),
    ("CLIPModel", 224, 14, 257), ("CLIPModel", 336, 14, 577)])      # the last two: ViT-L/14's images
def test_vit_matches_transformers(tmp_path, kind, size, patch, tokens):
    sizes = TINY_VIT | dict(image_size=size, patch_size=patch)
    if kind == "CLIPVisionModel":
        whole = tower = randomize(CLIPVisionModel(CLIPVisionConfig(**sizes)), 0.15)
    else:
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
                    bos_token_id=0, eos_token_id=1)  # fmt: skip
        whole = randomize(CLIPModel(CLIPConfig(text_config=text, vision_config=sizes)), 0.15)
        tower = whole.vision_model
    whole.save_pretrained(tmp_path)
    if kind == "pytorch_model.bin":  # as OpenAI's own repository
        (tmp_path / "model.safetensors").unlink()
        torch.save(whole.state_dict() | {"vision_model.embeddings.position_ids": torch.arange(17)}, tmp_path / kind)
    vit = ViT.from_pretrained(tmp_path).requires_grad_(True)
    tower = getattr(tower, "vision_model", tower)  # one more level in transformers 4
    pixels = torch.randn(2, 3, size, size)
    ours, theirs = vit(pixels), tower(pixels).last_hidden_state
    assert ours.shape == (2, tokens, 48)
    assert (ours - theirs).abs().max() <= TOLERANCE
    ours, theirs = vit.vision_model.post_layernorm(ours), tower.post_layernorm(theirs)
    assert (ours - theirs).abs().max() <= TOLERANCE
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = {f"vision_model.{n}": p.grad for n, p in tower.named_parameters()}
    assert grads.keys() == dict(vit.named_parameters()).keys()
    for name, p in vit.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= TOLERANCE * max(1, grads[name].abs().max()), name


# ---- VLM ------------------------------------------------------------------------------------------------------------


class WordTokenizer:
    """Just enough of a tokenizer for a tiny LLM: "<image>" and numbers."""
    pad, stop_tokens = 0, frozenset()

    def chat(self, messages):
        return [IMAGE if w == "<image>" else int(w) for m in messages for w in m["content"].split()]


@pytest.fixture
def vlm_and_oracle(tmp_path):
    """A tiny VLM, and the same composed of transformers' models: image embeddings and token embeddings side by side."""
    tower = randomize(CLIPVisionModel(CLIPVisionConfig(**TINY_VIT)), 0.15)
    llm = hf_llama(tie_word_embeddings=True)
    tower.save_pretrained(tmp_path / "vit")
    llm.save_pretrained(tmp_path / "llm")
    vlm = VLM(ViT.from_pretrained(tmp_path / "vit"), Llama.from_pretrained(tmp_path / "llm"), WordTokenizer())
    tower = getattr(tower, "vision_model", tower)
    adapter = torch.nn.Sequential(torch.nn.Linear(48, 48), torch.nn.GELU(), torch.nn.Linear(48, 48))
    adapter.load_state_dict(vlm.adapter.state_dict())
    soi, eoi = (e.detach().clone().requires_grad_() for e in (vlm.embd_soi, vlm.embd_eoi))

    def oracle(rows, pixels):
        """rows: per sample a list of token ids in which IMAGE stands once; samples without image have none."""
        images, embeds = iter(pixels), []
        for row in rows:
            pieces = []
            for t in row:
                if t == IMAGE:
                    x = tower.post_layernorm(tower(next(images)[None]).last_hidden_state)[0]
                    pieces += [soi, adapter(x), eoi]
                else:
                    pieces.append(llm.get_input_embeddings()(torch.tensor([t])))
            embeds.append(torch.cat(pieces))
        return [llm(inputs_embeds=e[None]).logits[0] for e in embeds]

    oracle.grads = lambda: {f"encoder.vision_model.{n}": p.grad for n, p in tower.named_parameters()} | \
        {f"adapter.{n}": p.grad for n, p in adapter.named_parameters()} | {"embd_soi": soi.grad, "embd_eoi": eoi.grad}
    return vlm, oracle


ROWS = [[5, IMAGE, 7, 8], [1, 2, 3, IMAGE, 4, 5, 6], [9, 10, 11]]  # the image early, late, and none


def expand(vlm, rows):
    rows = [[t for i in row for t in [i] * (vlm.n_visual if i == IMAGE else 1)] for row in rows]
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for out, row in zip(tokens, rows):
        out[:len(row)] = torch.tensor(row)
    return tokens, [len(row) for row in rows]


def test_visual_tokens_stand_where_image_stands(vlm_and_oracle):
    vlm, _ = vlm_and_oracle
    assert vlm.n_visual == 16 + 1 + 2  # patches, CLS, start and end
    pixels = torch.randn(2, 3, 32, 32)
    visual = vlm.visual_tokens(pixels)
    assert visual.shape == (2, 19, 48)
    assert torch.equal(visual[:, 0], vlm.embd_soi.expand(2, -1))
    assert torch.equal(visual[:, -1], vlm.embd_eoi.expand(2, -1))
    tokens, lengths = expand(vlm, ROWS)
    x = vlm.embed(tokens, pixels)
    assert torch.equal(x[0, 1:20], visual[0]) and torch.equal(x[1, 3:22], visual[1])
    words = tokens != IMAGE
    assert torch.equal(x[words], vlm.decoder.embed(tokens[words]))
    assert vlm.prompt([{"content": "5 <image> 7 8"}]) == [5] + [IMAGE] * 19 + [7, 8]


def test_vlm_matches_transformers(vlm_and_oracle):
    vlm, oracle = vlm_and_oracle
    vlm.requires_grad_(True)
    vlm.decoder.requires_grad_(False)  # as in the stage `encoder`: the gradient passes through it all the same
    pixels = torch.randn(2, 3, 32, 32)
    tokens, lengths = expand(vlm, ROWS)
    expected = oracle(ROWS, pixels)
    targets = torch.randint(97, tokens.shape)
    targets[tokens == IMAGE] = -100
    targets[0, -3:] = -100
    for i, n in enumerate(lengths):
        targets[i, n:] = -100
    with torch.no_grad():
        logits = vlm.decoder(embeds=vlm.embed(tokens, pixels))
    for ours, theirs, n in zip(logits, expected, lengths):
        assert (ours[:n] - theirs).abs().max() <= TOLERANCE
    loss = vlm.loss(dict(tokens=tokens, targets=targets, pixels=pixels))
    theirs = sum(F.cross_entropy(e, t[:n], reduction="sum") for e, t, n in zip(expected, targets, lengths))
    assert abs(loss - theirs) <= TOLERANCE * theirs
    loss.backward()
    theirs.backward()
    grads = oracle.grads()
    trained = {n: p for n, p in vlm.named_parameters() if p.requires_grad}
    assert trained.keys() == grads.keys()
    for name, p in trained.items():
        assert (p.grad - grads[name]).abs().max() <= TOLERANCE * max(1, grads[name].abs().max()), name
    assert all(p.grad is None for p in vlm.decoder.parameters())


def test_vlm_generates_like_the_oracle(vlm_and_oracle):
    vlm, oracle = vlm_and_oracle
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)) for i in range(2)]
    pixels = torch.stack([preprocess(i, 32) for i in images])
    prompts = [vlm.prompt([{"content": " ".join("<image>" if t == IMAGE else str(t) for t in row)}]) for row in ROWS]
    got = vlm.generate(prompts, images, max_new_tokens=8)
    rows = [list(row) for row in ROWS]
    for _ in range(8):  # greedy, the whole sequence anew each time
        rows = [row + [int(logits[-1].argmax())] for row, logits in zip(rows, oracle(rows, pixels))]
    assert got == [row[len(start):] for row, start in zip(rows, ROWS)]
    with pytest.raises(ValueError, match="2 images"):
        vlm.generate(prompts[:1], images)
    with pytest.raises(ValueError, match="0 images"):
        vlm.generate(prompts[:1], [])


def test_vlm_from_released_checkpoint(tmp_path, vlm_and_oracle, monkeypatch):
    """The layout that the paper released: what stage 2 trained, over OpenAI's CLIP."""
    vlm, _ = vlm_and_oracle
    randomize(vlm.encoder, 0.1)
    last = vlm.encoder.config.num_hidden_layers - 1
    names = ("adapter", "embd_", f"encoder.vision_model.encoder.layers.{last}.", "encoder.vision_model.post_layernorm")
    state = {n: p.detach().clone() for n, p in vlm.named_parameters() if n.startswith(names)}
    torch.save(dict(epoch=1, global_step=4880, model=state), tmp_path / "ckpt.pth")
    asked, base, start = [], ViT.from_pretrained(tmp_path / "vit"), ViT.from_pretrained(tmp_path / "vit")
    monkeypatch.setattr(model.ViT, "from_pretrained", lambda path, *a: asked.append(path) or base)
    llm = Llama.from_pretrained(tmp_path / "llm")
    loaded = VLM.from_pretrained(llm, tmp_path / "ckpt.pth", tokenizer=WordTokenizer())
    assert asked == ["openai/clip-vit-large-patch14-336"] and loaded.decoder is llm
    for name, p in loaded.named_parameters():
        if name in state:
            assert torch.equal(p, state[name]), name
    assert not torch.equal(loaded.encoder.layers[last].mlp.fc1.weight, start.layers[last].mlp.fc1.weight)


@pytest.fixture
def llava(tmp_path):
    """(folder, tower, projector, LLM): a whole VLM as LLaVA's own code saves it, and its parts."""
    folder, llm_path = tmp_path / "llava", Path(save_tiny_llm(tmp_path))
    folder.mkdir()
    tower = randomize(CLIPVisionModel(CLIPVisionConfig(**TINY_VIT | dict(hidden_size=64, num_attention_heads=1))), 0.15)
    projector = randomize(torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)))
    tensors = load_file(llm_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    inner = getattr(tower, "vision_model", tower)       # one more level in transformers 4
    tensors |= {f"model.vision_tower.vision_tower.vision_model.{n}": t for n, t in inner.state_dict().items()}
    tensors |= {f"model.mm_projector.{n}": t for n, t in projector.state_dict().items()}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((llm_path / "config.json").read_text()) | dict(
        architectures=["LlavaLlamaForCausalLM"], model_type="llava_llama", mm_projector_type="mlp2x_gelu",
        mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text((llm_path / "tokenizer.json").read_text())
    return folder, tower, projector, Llama.from_pretrained(llm_path)


def change_llava(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@torch.no_grad()
@pytest.mark.parametrize("layer, feature", [(-2, "patch"), (-1, "cls_patch"), (None, None)])
def test_llava_folder(llava, capsys, layer, feature):
    """Its visual tokens are those that its config.json says: LLaVA's are patches of the last layer but one. And the
    example of the paper's model card."""
    folder, tower, projector, llm = llava
    change_llava(folder, mm_vision_select_layer=layer, mm_vision_select_feature=feature)
    vlm = VLM.from_pretrained(str(folder), folder)
    pixels = torch.randn(2, 3, 32, 32)
    visual = tower(pixels, output_hidden_states=True).hidden_states[layer or -2][:, feature != "cls_patch":]
    expected = projector(visual)
    assert vlm.n_visual == expected.shape[1] == 16 + (feature == "cls_patch")
    assert (vlm.visual_tokens(pixels) - expected).abs().max() <= TOLERANCE
    tokens = torch.tensor([[5, *[IMAGE] * vlm.n_visual, 7]] * 2)
    words = llm.embed(torch.tensor([[5], [7]]))[:, None].expand(-1, 2, -1, -1)
    ours = vlm.decoder(embeds=vlm.embed(tokens, pixels))
    theirs = llm(embeds=torch.cat([words[0], expected, words[1]], dim=1))
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1, theirs.abs().max())

    picture, question = str(ROOT / "assets" / "flag.png"), "What is in this image?"
    command = ["--encoder", str(folder), "--image", picture, "--question", question, "--max-new-tokens", "6"]
    graft.main([*command, "--no-int8"])
    said = printable(vlm.chat(picture, question, max_new_tokens=6))
    assert capsys.readouterr().out.split("\n[")[0].strip() == said
    graft.main(command)


@pytest.mark.parametrize("config, drop, words", [
    (dict(architectures=["LlavaForConditionalGeneration"]), "", ("no checkpoint", "['LlavaForConditionalGeneration']")),
    (dict(architectures=None), "", ("no checkpoint in", "found None")),
    (dict(mm_vision_select_layer=2), "", ("'patch' of layer 2", "only patch and cls_patch")),
    (dict(mm_vision_select_feature="cls"), "", ("'cls' of layer -2",)),
    ({}, "mm_projector.2", ("projector of two layers", "found adapter.0.bias, adapter.0.weight")),
    ({}, "position_embedding", ("lacks a part of its vision tower", "position_embedding")),
    ({}, "model.layers.3.", ("lacks model.layers.3.",)),
])
def test_other_llava_folders_say_what_was_found(llava, config, drop, words):
    folder = llava[0]
    change_llava(folder, **config)
    if drop:
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if drop not in n}, folder / "model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        graft.main(["--encoder", str(folder), "--image", str(ROOT / "assets" / "flag.png")])
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_vlm_from_stage_3_has_the_trained_decoder(tmp_path, vlm_and_oracle):
    """Stage 3 trains the full LLM; other stages hold at most a translator, which is no part of the full LLM."""
    vlm, _ = vlm_and_oracle
    llm, name = Llama.from_pretrained(tmp_path / "llm"), "decoder.model.layers.1.mlp.up_proj.weight"
    before = llm.state_dict()[name.removeprefix("decoder.")].clone()
    trained = {n: p for n, p in vlm.named_parameters() if n.startswith(("adapter", "embd_", "encoder."))}
    whole = {f"decoder.{n}": p for n, p in llm.state_dict().items()}
    for stage, expected, more in (("decoder", before + 1, whole), ("encoder", before, {})):
        checkpoints.save_checkpoint(tmp_path / "c.safetensors", trained | more | {name: before + 1},
                                    dict(stage=stage, vit=str(tmp_path / "vit")))
        loaded = VLM.from_pretrained(llm, tmp_path / "c.safetensors", tokenizer=WordTokenizer())
        assert torch.equal(loaded.state_dict()[name], expected)
    assert torch.equal(llm.state_dict()[name.removeprefix("decoder.")], before)  # the LLM given stays as it was


def test_vlm_refuses_a_checkpoint_without_projector(tmp_path, vlm_and_oracle):
    vlm, _ = vlm_and_oracle
    file = tmp_path / "vit.safetensors"
    checkpoints.save_checkpoint(file, {f"encoder.{n}": p for n, p in vlm.encoder.named_parameters()}, dict(stage="vit"))
    with pytest.raises(ValueError, match="vit.safetensors.*projector"):
        VLM.from_pretrained(vlm.decoder, file, tokenizer=WordTokenizer())

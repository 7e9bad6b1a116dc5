"""model.py: Llama, ViT and VLM against transformers, on tiny random models and on the default LLM's real weights."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_refused, generate_slowly, save_gguf, save_tiny_llm, with_names
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

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


def hf_llama(family="Llama", **changes):
    config, kind = (getattr(transformers, f"{family}{name}") for name in ("Config", "ForCausalLM"))
    sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, tie_word_embeddings=False)  # fmt: skip
    return randomize(kind(config(**sizes | changes)))


TINY_VIT = dict(image_size=32, patch_size=8, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=3)  # fmt: skip


def assert_same_gradients(parameters, grads):
    assert parameters.keys() == grads.keys()
    for name, p in parameters.items():
        assert (p.grad - grads[name]).abs().max() <= TOLERANCE * max(1, grads[name].abs().max()), name


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
    assert_same_gradients(dict(ours.named_parameters()), {n: p.grad for n, p in theirs.named_parameters()})


# ---- Llama: parity with transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(num_attention_heads=6, num_key_value_heads=6),                                  # GQA ratio 1
    dict(num_attention_heads=6, num_key_value_heads=2),                                  # 3
    dict(num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True),        # 4, tied
    dict(head_dim=16),                                                                  # 6 heads of 16 in a width of 48
    dict(rope_parameters=LLAMA3_ROPE),
    dict(family="Qwen2"), dict(family="Qwen3", head_dim=16, tie_word_embeddings=True),
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


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_generates_like_transformers(tmp_path, family):
    """With the cache, and as a surrogate that is the whole LLM; in 8 bits, the biases stay."""
    theirs = hf_llama(family)
    theirs.save_pretrained(tmp_path)
    ours, prompt = surrogate.from_pretrained(tmp_path, [(1, 1)]), [5, 17, 3, 8]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert ours.generate([prompt], max_new_tokens=12) == [expected[0, 4:].tolist()]
    rounded, tokens = Llama.from_pretrained(tmp_path, quantize="int8"), torch.randint(97, (1, 20))
    whole = build_surrogate(rounded, [(1, 1)])      # its translator is in floating point again, as rounded
    for llm in (rounded, whole):
        assert (llm(tokens) - ours(tokens)).abs().mean() < 0.1 * ours(tokens).std()


def test_llama_official_config(tmp_path):
    """The official files say rope_theta and rope_scaling (transformers 4), and may omit what follows from the rest."""
    theirs = hf_llama(rope_parameters=LLAMA3_ROPE)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
    del config["head_dim"], config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config | dict(rope_theta=500.0, rope_scaling=scaling)))
    assert_same_function(Llama.from_pretrained(tmp_path), theirs, T=90)


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
    for name, w in with_names(theirs, names):
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
    theirs = hf_llama(rope_parameters=LLAMA3_ROPE, head_dim=16)
    theirs.save_pretrained(tmp_path)
    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    save_gguf(tmp_path / "m.gguf", Llama.from_pretrained(tmp_path), keys={"llama.attention.key_length": 16},
              more={"rope_freqs.weight": plain / theirs.model.rotary_emb.inv_freq})
    assert_same_function(Llama.from_pretrained(tmp_path / "m.gguf"), theirs, T=90)


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
    tokens, cache = torch.randint(97, (2, 10)), KVCache(tiny, 2, 10)
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


def test_generation_equals_the_whole_sequence_anew(tiny):
    """Prompts of different lengths, in one batch and with the cache."""
    free = [generate_slowly(tiny, p, 40) for p in PROMPTS]
    assert all(len(set(row)) > 3 for row in free)       # not stuck on one token, which would prove little
    assert tiny.generate(PROMPTS, max_new_tokens=40) == free
    stop = {free[0][4], free[1][9]}
    cut = [generate_slowly(tiny, p, 40, stop) for p in PROMPTS]
    assert len(cut[0]) <= 4 and len({len(row) for row in cut}) > 1
    assert tiny.generate(PROMPTS, max_new_tokens=40, stop=stop) == cut
    assert tiny.generate(PROMPTS, max_new_tokens=0) == [[], [], []]


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


def test_smollm_matches_transformers(smollm, smollm_tokenizer):
    """The default LLM's real weights. What it says is sense: the reference itself is no chance."""
    with torch.device("meta"):
        theirs = LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0), max_position_embeddings=8192))  # fmt: skip
    theirs.load_state_dict(smollm.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its table was on the meta device too
    prompt = smollm_tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    said = smollm.generate([prompt], stop=smollm_tokenizer.stop_tokens, max_new_tokens=12)[0]
    assert "Paris" in smollm_tokenizer.decode(said)
    tokens = torch.tensor([prompt + said])
    with torch.no_grad():
        ours, expected = smollm(tokens), theirs.eval()(tokens).logits
    assert (ours - expected).abs().max() <= TOLERANCE * expected.abs().max()


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
        whole = randomize(CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=sizes)), 0.15)
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
    assert_same_gradients(dict(vit.named_parameters()), grads)


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

    @torch.no_grad()
    def oracle(rows, pixels):
        """Logits of rows of token ids in which IMAGE stands once; samples without image have none."""
        images, embeds = iter(pixels), []
        for row in rows:
            pieces = []
            for t in row:
                if t == IMAGE:
                    x = tower.post_layernorm(tower(next(images)[None]).last_hidden_state)[0]
                    pieces += [vlm.embd_soi, adapter(x), vlm.embd_eoi]
                else:
                    pieces.append(llm.get_input_embeddings()(torch.tensor([t])))
            embeds.append(torch.cat(pieces))
        return [llm(inputs_embeds=e[None]).logits[0] for e in embeds]
    return vlm, oracle


ROWS = [[5, IMAGE, 7, 8], [1, 2, 3, IMAGE, 4, 5, 6], [9, 10, 11]]  # the image early, late, and none


def test_vlm_generates_like_the_oracle(vlm_and_oracle):
    """Its losses and gradients: test_oracle.py."""
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
    asked, base = [], ViT.from_pretrained(tmp_path / "vit")
    monkeypatch.setattr(model.ViT, "from_pretrained", lambda path, *a: asked.append(path) or base)
    llm = Llama.from_pretrained(tmp_path / "llm")
    loaded = VLM.from_pretrained(llm, tmp_path / "ckpt.pth", tokenizer=WordTokenizer())
    assert asked == ["openai/clip-vit-large-patch14-336"] and loaded.decoder is llm
    assert all(torch.equal(p, state[name]) for name, p in loaded.named_parameters() if name in state)


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
    assert torch.equal(vlm.decoder(torch.arange(9)[None]), llm(torch.arange(9)[None]))
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
def test_other_llava_folders_say_what_was_found(llava, capsys, config, drop, words):
    folder = llava[0]
    change_llava(folder, **config)
    if drop:
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if drop not in n}, folder / "model.safetensors")
    assert_refused(capsys, ["graft", "--encoder", str(folder), "--image", str(ROOT / "assets" / "flag.png")], *words)


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

"""model.py: Llama, ViT and VLM against transformers, on tiny random models and on the default LLM's real weights."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import assert_refused, generate_slowly, refuses, save_gguf, with_names
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence as pad
from transformers import CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

import graft
import model
from cli import UserError, printable
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
    dict(num_key_value_heads=6),                                                        # a key for each query
    dict(num_attention_heads=8, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),     # 4 heads of a group
    dict(family="Qwen2"), dict(family="Qwen3", head_dim=16, tie_word_embeddings=True),      # 6 heads of 16 in 48
    dict(rope_parameters=LLAMA3_ROPE, old=True),
], ids=["mha", "gqa-tied-llama3-rope", "qwen2", "qwen3-head_dim", "old"])
def test_llama_matches_transformers(tmp_path, changes):
    """old: the files say rope_theta and rope_scaling (transformers 4), and may omit what follows from the rest; weights
    as before torch 1.6, with a table that nobody needs."""
    old = changes.pop("old", False)
    theirs = hf_llama(**changes)
    theirs.save_pretrained(tmp_path)
    if old:
        config = json.loads((tmp_path / "config.json").read_text())
        scaling = {k: v for k, v in config.pop("rope_parameters").items() if k != "rope_theta"}
        del config["head_dim"], config["tie_word_embeddings"]
        (tmp_path / "config.json").write_text(json.dumps(config | dict(rope_theta=500.0, rope_scaling=scaling)))
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
                   tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ours = Llama.from_pretrained(tmp_path)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training
    assert_same_function(ours, theirs, T=90)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_in_8_bits(tmp_path, family):
    """The biases stay; so they do in a surrogate, whose translator is in floating point again, as rounded."""
    hf_llama(family).save_pretrained(tmp_path)
    ours, rounded = Llama.from_pretrained(tmp_path), Llama.from_pretrained(tmp_path, quantize="int8")
    tokens = torch.randint(97, (1, 20))
    for llm in (rounded, build_surrogate(rounded, [(1, 1)])):
        assert (llm(tokens) - ours(tokens)).abs().mean() < 0.1 * ours(tokens).std()


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
    if factor:      # or else this test would pass without the scaling
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

until = lambda stop, ids: list(itertools.takewhile(lambda t: t not in stop, ids))
PROMPTS = [[5, 17, 3, 88, 41, 2], [60, 1], [9, 9, 30, 12]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny")
    hf_llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True).save_pretrained(folder)
    return Llama.from_pretrained(folder)


def test_a_cache_equals_the_whole_sequence(tiny):
    """In pieces of 5, 1, 3 and 1 positions: several new positions after old ones need a mask of their own. And rows
    that differ in length, twice: prompts, then continuations, each padded on the right."""
    tokens, cache = torch.randint(97, (2, 10)), KVCache(tiny, 2, 10)
    pieces = [tiny(t, cache=cache) for t in tokens.split([5, 1, 3, 1], dim=1)]
    assert (torch.cat(pieces, dim=1) - tiny(tokens)).abs().max() <= TOLERANCE
    first, then = [[5, 6, 7, 8], [9, 10]], [[11, 12], [13, 14, 15]]
    cache = KVCache(tiny, 2, 10)
    for rows in (first, then):
        padded = pad([torch.tensor(r) for r in rows], batch_first=True)
        tiny.run(tiny.embed(padded), cache=cache)
        cache.advance(padded.shape[1], torch.tensor([len(r) for r in rows]))
    logits = tiny(torch.tensor([[16], [16]]), cache=cache)[:, 0]
    for row, a, b in zip(logits, first, then):
        assert (row - tiny(torch.tensor([a + b + [16]]))[0, -1]).abs().max() <= TOLERANCE


def test_generation_equals_the_whole_sequence_anew(tiny):
    """Prompts of different lengths, in one batch and with the cache."""
    free = [generate_slowly(tiny, p, 40) for p in PROMPTS]
    assert all(len(set(row)) > 3 for row in free)       # not stuck on one token, which would prove little
    assert tiny.generate(PROMPTS, max_new_tokens=40) == free
    stop = {free[0][4], free[1][9]}
    cut = [until(stop, row) for row in free]
    assert len(cut[0]) <= 4 and len({len(row) for row in cut}) > 1
    assert tiny.generate(PROMPTS, max_new_tokens=40, stop=stop) == cut
    assert tiny.generate(PROMPTS, max_new_tokens=0) == [[], [], []]
    for top_p in (1.0, 0.95):
        draw = lambda seed: tiny.generate(PROMPTS[1:], max_new_tokens=8, temperature=1.0, top_p=top_p,
                                          generator=torch.Generator().manual_seed(seed))
        assert draw(3) == draw(3) != draw(4)


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

    def check(recorded, *answers):
        got = [torch.stack(tokens, 1).tolist() for tokens in zip(*zip(*(answer(*a) for a in answers)))]
        assert got == [llm.generate(torch.arange(n * T).view(n, T).tolist(), max_new_tokens=3) for n, T, *_ in answers]
        assert made == recorded
        made.clear()
    check([(1, 0)], (1, 9))
    check([], (1, 5, 99))
    check([(2, 1)], (2, 5))
    check([(1, 2)], (1, 5), (1, 7))     # and the one of two rows is forgotten: two are kept
    check([(2, 1)], (2, 5))             # by its stream
    llm.load_state_dict({n: t + 0.1 for n, t in llm.state_dict().items()}, assign=True)
    check([(2, 0)], (2, 5))


def test_temperature_and_top_p():
    probs = torch.tensor([0.05, 0.5, 0.3, 0.15])
    sharp = probs.square() / probs.square().sum()
    for temperature, top_p, of, kept in [
            (0, 1, probs, [1]), (1, 1, probs, [0, 1, 2, 3]), (0.5, 1, sharp, [0, 1, 2, 3]), (1, 0, probs, [1]),
            (1, 0.4, probs, [1]), (1, 0.6, probs, [1, 2]), (1, 0.9, probs, [1, 2, 3])]:
        expected = torch.zeros(4)
        expected[kept] = of[kept] / of[kept].sum()
        share = sample(probs.log().expand(20000, -1), temperature, top_p).bincount(minlength=4) / 20000
        assert (share > 0).nonzero().flatten().tolist() == kept and (share - expected).abs().max() < 0.02


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


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel", "pytorch_model.bin"])
def test_vit_matches_transformers(tmp_path, kind):
    sizes = TINY_VIT | (dict(image_size=224, patch_size=14) if kind == "CLIPModel" else {})     # as ViT-L/14
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
    pixels = torch.randn(2, 3, sizes["image_size"], sizes["image_size"])
    ours, theirs = vit(pixels), tower(pixels).last_hidden_state
    assert (ours - theirs).abs().max() <= TOLERANCE
    ours, theirs = vit.vision_model.post_layernorm(ours), tower.post_layernorm(theirs)
    assert (ours - theirs).abs().max() <= TOLERANCE
    weight = torch.randn_like(ours)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    grads = {f"vision_model.{n}": p.grad for n, p in tower.named_parameters()}
    assert_same_gradients(dict(vit.named_parameters()), grads)


# ---- VLM ------------------------------------------------------------------------------------------------------------


def test_vlm_generates_like_the_whole_sequence_anew(vlm):
    """Images early, late, and none, in one batch. Losses and gradients, by transformers' models: test_oracle.py."""
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)) for i in range(2)]
    place = [IMAGE] * vlm.n_visual
    rows = [[5, *place, 7, 8], [1, 2, 3, *place, 4, 5, 6], [9, 10, 11]]
    expected = []
    for row, image in zip(rows, [*images, None]):
        pixels = None if image is None else preprocess(image)[None]
        for _ in range(8):
            row = row + [int(vlm.decoder(embeds=vlm.embed(torch.tensor([row]), pixels))[0, -1].argmax())]
        expected.append(until(vlm.tokenizer.stop_tokens, row[-8:]))
    assert sum(map(len, expected)) > 12
    assert vlm.generate(rows, images, max_new_tokens=8) == expected
    for given in (images, []):
        refuses(UserError, lambda: vlm.generate(rows[:1], given), f"{len(given)} images given")


def test_vlm_from_released_checkpoint(stages, tiny_llm, tmp_path, monkeypatch):
    """The layout that the paper released: what stage 2 trained, over OpenAI's CLIP."""
    state, asked, base = checkpoints.read_checkpoint(stages["encoder"])[0], [], ViT.from_pretrained(stages["vit"])
    torch.save(dict(epoch=1, global_step=4880, model=state), tmp_path / "ckpt.pth")
    monkeypatch.setattr(model.ViT, "from_pretrained", lambda path, *a: asked.append(path) or base)
    loaded = VLM.from_pretrained(tiny_llm, tmp_path / "ckpt.pth").state_dict()
    assert asked == ["openai/clip-vit-large-patch14-336"]
    assert all(torch.equal(loaded[n], t.float()) for n, t in state.items() if not n.startswith("decoder."))


@pytest.fixture
def llava(tmp_path, tiny_llm):
    """(folder, tower, projector, LLM): a whole VLM as LLaVA's own code saves it, and its parts."""
    folder, llm_path = tmp_path, Path(tiny_llm)
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


def test_vlm_from_stage_3_has_the_trained_decoder(stages, tiny_llm):
    """Stage 3 trains the full LLM; other stages hold at most a translator, which is no part of the full LLM."""
    llm, before = Llama.from_pretrained(tiny_llm), Llama.from_pretrained(tiny_llm).state_dict()
    trained = VLM.from_pretrained(llm, stages["decoder"]).decoder.state_dict()
    held = checkpoints.read_checkpoint(stages["decoder"])[0]
    assert all(torch.equal(t, held[f"decoder.{n}"].float()) for n, t in trained.items())
    assert VLM.from_pretrained(llm, stages["encoder"]).decoder is llm
    assert all(torch.equal(t, before[n]) for n, t in llm.state_dict().items())      # the LLM given stays as it was

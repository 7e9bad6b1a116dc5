"""kernels/int8.py: the rounding against its own bound, every way to load, the real LLM."""
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import random_llama, refuses, save_llama
from safetensors.torch import load_file, save_file
from torch import nn

import graft
from cli import UserError
from kernels import int8
from model import VLM, Llama
from surrogate import build_surrogate, load_surrogate, read_texts


@pytest.fixture(scope="module")
def quantized(tiny_llm):
    return Llama.from_pretrained(tiny_llm, quantize="int8")


def test_weights_are_off_by_half_a_scale_at_most():
    weight = torch.randn(64, 96) * torch.logspace(-6, 3, 64)[:, None]           # rows of very different size
    weight[5] = 0
    q, bits = int8.round_rows(weight)
    scale = bits.view(torch.bfloat16)
    assert q.dtype == torch.int8 and q.abs().max() == 127 and not q[5].any()
    apart = (q.float() * scale.float()[:, None] - weight).abs().amax(1)
    largest = weight.abs().amax(1) - 127 * scale.float()                        # what the scale's own rounding cuts off
    assert (apart <= torch.maximum(scale.float() / 2, largest) * 1.001).all()


def test_loads_as_if_quantized_afterwards(tiny_llm, quantized, tmp_path):
    """Tied and untied, linear layers and head: the same numbers, and nothing else is rounded."""
    save_llama(tmp_path, random_llama(tie_word_embeddings=False))
    for path in (tiny_llm, tmp_path):
        plain, got = Llama.from_pretrained(path), Llama.from_pretrained(path, quantize="int8")
        want = int8.quantize(Llama.from_pretrained(path)).state_dict()
        assert want.keys() == got.state_dict().keys()
        for name, tensor in got.state_dict().items():
            assert torch.equal(tensor, want[name].to(tensor.dtype)), name
        bits = {n: t.clone() for n, t in got.state_dict().items() if "scale" in n}
        assert all(torch.equal(t, bits[n]) for n, t in got.half().float().state_dict().items() if n in bits)
        assert not any(isinstance(m, nn.Linear) for m in got.modules())
        assert torch.equal(got.model.embed_tokens.weight, plain.model.embed_tokens.weight.half().float())
        assert torch.equal(got.lm_head.weight, int8.round_rows(plain.lm_head_weight)[0])


def test_the_pair_of_a_quantized_llm(tiny_llm, stages, quantized):
    """Trunk and head are the LLM's own int8 weights, translators the checkpoint's, in floating point."""
    before = {n: t.clone() for n, t in quantized.state_dict().items()}
    pair = load_surrogate(quantized, stages["encoder"])
    plain = load_surrogate(Llama.from_pretrained(tiny_llm), stages["encoder"])
    (t,) = pair.translators
    assert pair.model.layers[0] is quantized.model.layers[0] and pair.lm_head is quantized.lm_head
    for (name, p), q in zip(plain.model.layers[t].named_parameters(), pair.model.layers[t].parameters()):
        assert torch.equal(p, q), name
    fresh = build_surrogate(quantized, [(2, 4)]).model.layers[2].mlp.up_proj.weight
    q, scale = quantized.model.layers[2].mlp.up_proj.weight, quantized.model.layers[2].mlp.up_proj.scale
    assert torch.equal(fresh, q.float() * scale.float()[:, None])
    assert all(torch.equal(t, before[n]) for n, t in quantized.state_dict().items())        # the LLM stays as it was


def test_refuses(tiny_llm, stages, quantized, tmp_path):
    shutil.copytree(tiny_llm, tmp_path / "llm")
    weights = load_file(f"{tiny_llm}/model.safetensors")
    refuses(UserError, lambda: Llama.from_pretrained(tiny_llm, quantize="int4"), "quantize='int4': choose None or")
    refuses(UserError, lambda: VLM.from_pretrained(quantized, stages["decoder"]), "stage decoder")
    for odd in (math.nan, math.inf):
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = odd
        save_file(weights, tmp_path / "llm" / "model.safetensors")
        refuses(UserError, lambda: Llama.from_pretrained(tmp_path / "llm", quantize="int8"),
                "layers.1.mlp.up_proj.weight holds numbers that are not finite")


def test_command_line(stages, monkeypatch, capsys):
    """A question is answered in int8 on a CPU, unless one says otherwise; the table is measured in floating point."""
    seen, load = [], Llama.from_pretrained
    monkeypatch.setattr(graft.Llama, "from_pretrained", lambda *a, **k: seen.append(k["quantize"]) or load(*a, **k))
    monkeypatch.setattr(graft, "show", lambda *_: None)
    ask = ["--encoder", stages["encoder"], "--device", "cpu", "--image", "assets/flag.png", "--max-new-tokens", "3"]
    for argv in (ask, [*ask, "--no-int8"], [*ask, "--pair"], ask[:4], [*ask[:4], "--int8"]):
        graft.main(argv)
    assert seen == ["int8", None, "int8", None, "int8"]


def test_smollm_predicts_a_text_as_well(default_gguf, smollm, smollm_tokenizer):
    """The real LLM: perplexity of assets/text.txt within 2 %, and it still knows a capital."""
    llm, tokens = Llama.from_pretrained(default_gguf, quantize="int8"), read_texts(smollm_tokenizer)
    with torch.no_grad():
        nll = [F.cross_entropy(m(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for m in (smollm, llm)]
    assert abs((nll[1] - nll[0]).exp() - 1) < 0.02
    prompt = smollm_tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    (out,) = llm.generate([prompt], max_new_tokens=24, stop=smollm_tokenizer.stop_tokens)
    assert "Paris" in smollm_tokenizer.decode(out)

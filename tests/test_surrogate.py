"""surrogate.py: the surrogate and run_both against the full model, the prediction trajectory against transformers."""

import pytest
import torch
from conftest import random_llama, refuses, save_llama, shake
from transformers import LlamaConfig, LlamaForCausalLM

import surrogate
from cli import UserError
from formats import checkpoints, official
from formats.tokenizer import Tokenizer
from model import Llama
from surrogate import build_surrogate, find_transition, kept_layers, load_surrogate, prediction_trajectory, run_both

L = 8


def tiny_llama(tied=True):
    return random_llama(vocab_size=60, num_hidden_layers=L, tie_word_embeddings=tied).eval()


@pytest.fixture
def llm():
    return tiny_llama()


# ---- the surrogate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_layers_kept_are_shared_and_translators_are_copies(tied):
    llm = tiny_llama(tied)
    s = build_surrogate(llm, [(5, 6), (2, 3)])  # in any order
    assert s.ranges == [(2, 3), (5, 6)] and s.translators == [2, 4] and s.n_shared == 2
    assert s.config.num_hidden_layers == len(s.model.layers) == 6 and llm.config.num_hidden_layers == L
    for ours, theirs in enumerate([0, 1, 2, 4, 5, 7]):
        for a, b in zip(s.model.layers[ours].parameters(), llm.model.layers[theirs].parameters()):
            assert torch.equal(a, b)
            assert (a.data_ptr() == b.data_ptr()) == (ours not in s.translators)
    assert s.model.embed_tokens is llm.model.embed_tokens and s.model.norm is llm.model.norm
    assert s.lm_head_weight is llm.lm_head_weight
    assert not any(p.is_meta for p in s.parameters()) and not s.training
    tokens = torch.randint(60, (1, 9))
    before, copied = llm(tokens), s(tokens)
    shake(s)        # training a translator leaves the LLM alone
    assert torch.equal(llm(tokens), before) and not torch.equal(s(tokens), copied)


@pytest.mark.parametrize("ranges, words", [
    ([(0, 3)], "first and the last stay"), ([(5, 7)], "layers 0-7"), ([(4, 3)], "4-3"), ([(5, 6), (2, 5)], "overlap")])
def test_wrong_ranges(llm, ranges, words):
    refuses(UserError, lambda: build_surrogate(llm, ranges), words)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied, ranges", [(True, [(2, 5)]), (False, [(1, 2), (4, 6)])])
def test_from_pretrained_reads_only_the_layers_that_it_keeps(tmp_path, monkeypatch, tied, ranges):
    """The same surrogate as out of the whole LLM, in names, values and predictions."""
    llm, read, open_hf = tiny_llama(tied), [], official.open_hf
    save_llama(tmp_path, llm)
    monkeypatch.setattr(official, "open_hf", lambda folder: {
        n: (lambda n=n, f=f: read.append(n) or f()) for n, f in open_hf(folder).items()})
    ours, theirs = surrogate.from_pretrained(tmp_path, ranges), build_surrogate(llm, ranges)
    layers = [n for n in read if "layers" in n]             # a head beside tied words is read twice, to compare it
    assert {int(n.split(".")[2]) for n in layers} == set(kept_layers(ranges, L)) and len(layers) == len(set(layers))
    assert (ours.ranges, ours.translators, ours.n_shared) == (theirs.ranges, theirs.translators, theirs.n_shared)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    tokens = torch.arange(12)[None]
    assert torch.equal(ours(tokens), theirs(tokens))
    refuses(UserError, lambda: surrogate.from_pretrained(tmp_path, [(5, 7)]), "cannot replace layers 5-7")


def test_load_surrogate(tmp_path, llm):
    refuses(UserError, lambda: load_surrogate(llm, "assets/vit.safetensors"), "stage vit", "surrogate")
    s = shake(build_surrogate(llm, [(2, 3), (5, 6)]))
    trained = ("model.layers.2.", "model.layers.4.")
    translator = {f"decoder.{n}": p for n, p in s.named_parameters() if n.startswith(trained)}
    about = dict(stage="translator", ranges=s.ranges)
    both = translator | {"embd_soi": torch.zeros(1, 32)}
    checkpoints.save_checkpoint(tmp_path / "translator.safetensors", both, about)
    # stage 2 leaves the translator frozen: its file names the one it started from, which may have moved along with it
    about = dict(stage="encoder", ranges=s.ranges, start="elsewhere/translator.safetensors")
    checkpoints.save_checkpoint(tmp_path / "encoder.safetensors", {"embd_soi": torch.zeros(1, 32)}, about)
    tokens = torch.randint(60, (1, 9))
    for name in ("translator", "encoder"):
        loaded = load_surrogate(llm, tmp_path / f"{name}.safetensors")
        assert loaded.ranges == s.ranges and torch.equal(loaded(tokens), s(tokens))


# ---- run_both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [[(3, 6)], [(2, 3), (5, 6)], []])
def test_fork_equals_two_passes(llm, ranges):
    s = shake(build_surrogate(llm, ranges))
    embeds = llm.embed(torch.randint(60, (2, 11)))
    ours, theirs = run_both(s, llm, embeds)
    assert torch.equal(ours, s.run(embeds)) and torch.equal(theirs, llm.run(embeds))
    assert torch.equal(ours, theirs) == (ranges == [])


# ---- prediction trajectory ------------------------------------------------------------------------------------------


def test_trajectory_against_transformers(tmp_path):
    """The paper's measure, computed anew in float64 from transformers' hidden states."""
    config = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.3)  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(theirs.model.norm.weight, mean=1, std=0.2)
    theirs.save_pretrained(tmp_path)
    tokens = torch.randint(60, (3, 20))
    got = prediction_trajectory(Llama.from_pretrained(tmp_path), tokens)
    expected = torch.zeros(5, dtype=torch.float64)
    with torch.no_grad():
        for row in tokens:
            states = theirs(row[None], output_hidden_states=True).hidden_states[1:]  # the embeddings are no layer's
            shares = []
            for i, x in enumerate(states):
                x = x if i == 4 else theirs.model.norm(x)  # transformers gives the last one behind the norm
                p = (x.double() @ theirs.lm_head.weight.double().T).softmax(-1)[0, torch.arange(19), row[1:]]
                shares.append(p / p.sum())
            expected += torch.stack([(q * (q / shares[-1]).log()).sum() for q in shares]) / 3
    assert got.shape == (5,) and got[-1] == 0 and (got[:-1] > 0.01).all()
    assert (got - expected).abs().max() < 1e-4


def test_chats_give_a_curve_each(tiny_llm, tmp_path, capsys):
    """Over whole chats in the LLM's own format, of different lengths; the command prints and draws them."""
    llm, tokenizer = Llama.from_pretrained(tiny_llm), Tokenizer.from_pretrained(tiny_llm)
    chats = surrogate.read_chats(tokenizer, 3)
    assert len({len(c) for c in chats}) > 1 and tokenizer.decode(chats[0], skip_special=False).count("<|im_end|>") == 2
    curves = surrogate.trajectories(llm, chats)
    for curve, chat in zip(curves, chats):
        assert torch.equal(prediction_trajectory(llm, chat[None]), curve)
    command = ["--llm", tiny_llm, "--length", "40", "--chats", "3", "--out", str(tmp_path / "plot.png")]
    surrogate.main(command)
    out = capsys.readouterr().out
    assert f"over 3 chats (turn: {find_transition(curves.mean(0))})" in out
    assert f"{curves[:, 2].mean():.3f}" in next(line for line in out.splitlines() if line.startswith("    2 "))
    fig = surrogate.plot_trajectory(curves.mean(0).tolist(), 2, [(2, 4)], chats=curves)
    assert len(fig.axes[0].lines) == 3 + 1 + 1 + 1 + 1      # thin, their mean, the texts', the paper's cuts, the turn


def test_find_transition():
    def curve(layers, cut):     # flat up to layer cut - 1, then down to 0
        return torch.cat([torch.full((cut,), 5.0), torch.linspace(5, 0, layers - cut + 1)[1:]])

    for layers in (3, 12, 30):
        for cut in range(1, layers - 1):
            assert find_transition(curve(layers, cut)) == find_transition(curve(layers, cut).tolist()) == cut
    for cut in (10, 17, 22):
        for _ in range(20):     # with noise
            assert abs(find_transition(curve(30, cut) + 0.25 * torch.randn(30)) - cut) <= 2


def test_text_tokens(smollm_tokenizer):
    long, short = "one two three four five six seven eight nine ten", "too short"
    rows = surrogate.text_tokens(smollm_tokenizer, f"{long}\n\n{short}\n\n{long} eleven", length=8)
    assert rows.shape == (2, 8) and torch.equal(rows[0], rows[1])
    assert smollm_tokenizer.decode(rows[0]) == "one two three four five six seven eight"


def test_smollm_turns_in_the_middle(smollm, smollm_tokenizer):
    """On its real weights the default LLM has the two phases that the method rests on."""
    tokens = surrogate.read_texts(smollm_tokenizer, length=32)[:2]
    trajectory = prediction_trajectory(smollm, tokens)
    assert trajectory.shape == (30,) and trajectory[-1] == 0
    assert 12 <= find_transition(trajectory) <= 20
    assert trajectory[:12].mean() > 2 * trajectory[24:].mean()

"""extras/lmms_eval_model.py answers as graft.py does; with lmms-eval installed, its own scores are graft.py's."""
import importlib.util
import sys
import types

import lmms_eval_world
import pytest
import torch

import evaluate
from cli import UserError

INSTALLED = importlib.util.find_spec("lmms_eval") is not None


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module; without lmms-eval its base class is an empty one."""
    if not INSTALLED:
        api = types.ModuleType("lmms_eval.api.model")
        api.lmms = type("lmms", (), {})
        for name, module in (("lmms_eval", types.ModuleType("lmms_eval")), ("lmms_eval.api", types.ModuleType("api")),
                             ("lmms_eval.api.model", api)):
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "extras.lmms_eval_model", raising=False)
    from extras import lmms_eval_model
    yield lmms_eval_model
    monkeypatch.delitem(sys.modules, "extras.lmms_eval_model", raising=False)


def request(i, question, given, task="world"):
    """As lmms-eval makes one: its arguments are text, what the kind of request needs, and where its image is."""
    return types.SimpleNamespace(args=(question, given, lambda doc: [doc.image] if doc.image else [], i, task, "test"))


def loaded(model, samples):
    model.task_dict = {"world": {"test": samples}}
    return model


@pytest.mark.parametrize("name, decoder", [("Graft", "graft"), ("Pair", "pair")])
def test_answers_and_rankings_are_graft_py_s(name, decoder, adapter, stages, tiny_llm):
    samples = [s for s in lmms_eval_world.draw(2)["open"] if len(s.options) == 10]
    model = loaded(getattr(adapter, name)(llm=tiny_llm, encoder=stages["encoder"], batch_size=3), samples)
    vlm = adapter.VLM.from_pretrained(tiny_llm, stages["encoder"])
    embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:-1]) for s in samples], [s.image for s in samples])
    surrogate = adapter.load_surrogate(vlm.decoder, stages["encoder"])
    wanted = evaluate.answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer)[decoder]
    ask = lambda s: evaluate.question_of(s).removeprefix("* ")
    said = model.generate_until([request(i, ask(s), dict(max_new_tokens=40)) for i, s in enumerate(samples)])
    assert said == [text for _, text in wanted] and len(set(said)) > 1
    ranked = model.loglikelihood([request(i, ask(s), " " + o) for i, s in enumerate(samples) for o in s.options])
    losses = torch.tensor([loss for loss, _ in ranked]).view(len(samples), 10)
    assert losses.argmin(1).tolist() == [choice for choice, _ in wanted] and (losses > 0).all()


def test_options_of_requests(adapter, stages, tiny_llm):
    samples = lmms_eval_world.draw(1)["open"][:2]
    model = loaded(adapter.Graft(tiny_llm, stages["encoder"]), samples)
    whole, = model.generate_until([request(0, "What is it?", dict(max_new_tokens=12))])
    middle = whole[len(whole) // 2]
    cut, short, again = model.generate_until([
        request(0, "What is it?", dict(max_new_tokens=12, until=[middle])),
        request(0, "<image>\nWhat is it?", dict(max_new_tokens=3)),
        request(0, "What is it?", dict(max_new_tokens=12, temperature=0.7, do_sample=False, top_p=None))])
    assert cut == whole.split(middle)[0].strip() and again == whole
    assert whole.startswith(short) and len(short) < len(whole)
    # an answer that would be said greedily; doc_to_target may be a function of the document
    (loss, greedy), (_, other) = model.loglikelihood([
        request(0, "What is it?", lambda doc: "no such word"), request(1, "What is it?", "nor this")])
    assert loss > 0 and not greedy and not other
    samples[1].image = None                                     # a question without an image is put as it is
    alone = model.vlm.prompt([{"role": "user", "content": "Who are you?"}])
    assert model.ask(request(1, "Who are you?", {})) == (alone, [], {})
    with pytest.raises(UserError, match="num_beams"):
        model.generate_until([request(0, "What?", dict(num_beams=4))])
    with pytest.raises(UserError, match="decoder=both: choose llm"):
        adapter.Graft(tiny_llm, stages["encoder"], decoder="both")
    model.task_dict["world"]["test"] = [types.SimpleNamespace(image=samples[0].image)]
    two = types.SimpleNamespace(args=("What?", {}, lambda doc: [doc.image] * 2, 0, "world", "test"))
    with pytest.raises(UserError, match="2 images in a question"):
        model.generate_until([two])


@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval: pip install lmms-eval==0.7.3")
def test_lmms_eval_s_scores_are_graft_py_s(stages, tiny_llm, tmp_path, capsys):
    argv = ["--n", "1", "--llm", tiny_llm, "--encoder", stages["encoder"], "--out", str(tmp_path)]
    assert lmms_eval_world.main(argv) == 0
    out = capsys.readouterr().out
    assert "the same scores" in out and out.count("| world_") >= 3

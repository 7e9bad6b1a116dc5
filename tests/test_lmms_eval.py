"""
extras/lmms_eval_model.py answers as graft.py does; with lmms-eval installed, its own scores are graft.py's.

`write_task` writes an lmms-eval task, which may serve as a pattern for your own: task YAMLs, utils.py, JSON, images.
"""
import importlib.util
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import evaluate
from cli import UserError
from data import world
from data.batches import Sample, wrap

ROOT = Path(__file__).parent.parent
INSTALLED = importlib.util.find_spec("lmms_eval") is not None

# ---- A task of drawn images: open, yes/no and ranked questions -------------------------------------------------------

TASK = """task: world_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/{file}.json
test_split: test
output_type: {kind}
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: {target}
{more}metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
SAID = """process_results: !function utils.said
generation_kwargs:
  max_new_tokens: 40
  do_sample: false
"""
UTILS = """from data.images import open_image
from data.world import is_right


def images(doc):
    return [open_image(doc["image"])]


def said(doc, results):
    class sample:
        right, rivals = doc["right"], doc["rivals"]
    return {"right": float(is_right(results[0], sample))}
"""


def question(sample):
    return evaluate.question_of(sample).removeprefix("* ")


def yes_no(sample, i):
    """A question about the same picture that is answered by yes or no, in turns."""
    rng = random.Random(f"yes/{i}/{sample.caption}")
    other = rng.choice([c for c in map(world.caption, world.SUBJECTS) if c != sample.caption])
    shown, answer, rival = (sample.caption, "Yes", "No") if i % 2 == 0 else (other, "No", "Yes")
    messages = [{"role": "user", "content": wrap(f"Does the image show {shown}?")},
                {"role": "assistant", "content": f"{answer}."}]
    return Sample(sample.image, messages, "yes_no", f"{answer}.", ["Yes.", "No."], sample.caption, [(answer,)], [rival])


def draw(n):
    """{"open": n held-out samples of every task, "yes_no": a question about each of these pictures}"""
    samples = [world.world(task, i, evaluate.EVAL_SEED, "test") for task in evaluate.TASKS for i in range(n)]
    return dict(open=samples, yes_no=[yes_no(s, i) for i, s in enumerate(samples)])


def write_task(folder, samples):
    """The files of three tasks: world_open, world_yes_no and world_ranked, where the open questions have options."""
    for name, of in samples.items():
        docs = []
        for i, s in enumerate(of):
            file = folder / f"{name}-{i}.png"
            s.image.save(file)
            docs.append(dict(image=str(file), question=question(s), answer=s.answer, options=list(s.options),
                             gold=s.options.index(s.answer), right=[list(g) for g in s.right], rivals=list(s.rivals)))
        (folder / f"{name}.json").write_text(json.dumps(docs), encoding="utf-8")
        said = dict(file=name, kind="generate_until", target="answer", metric="right", more=SAID)
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, **said), encoding="utf-8")
    ranked = dict(file="open", kind="multiple_choice", target="gold", metric="acc", more="doc_to_choice: options\n")
    (folder / "ranked.yaml").write_text(TASK.format(name="ranked", folder=folder, **ranked), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")


# ---- The adapter -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(monkeypatch):
    """The adapter's module; without lmms-eval its base class is an empty one."""
    if not INSTALLED:
        api = types.ModuleType("lmms_eval.api.model")
        api.lmms = type("lmms", (), {})
        for module in (types.ModuleType("lmms_eval"), types.ModuleType("lmms_eval.api"), api):
            monkeypatch.setitem(sys.modules, module.__name__, module)
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


def ask_graft(vlm, surrogate, samples):
    """{"pair": [(choice, text), …], "graft": …} by graft.py's own functions."""
    embeds, lengths = vlm.embed_prompts([vlm.prompt(s.messages[:-1]) for s in samples], [s.image for s in samples])
    return evaluate.answer(embeds, lengths, samples, vlm.decoder, surrogate, vlm.tokenizer)


@pytest.mark.parametrize("name, decoder", [("Graft", "graft"), ("Pair", "pair")])
def test_answers_and_rankings_are_graft_py_s(name, decoder, adapter, vlm, surrogate, stages, tiny_llm):
    samples = [s for s in draw(2)["open"] if len(s.options) == 10]
    model = loaded(getattr(adapter, name)(llm=tiny_llm, encoder=stages["encoder"], batch_size=3), samples)
    wanted = ask_graft(vlm, surrogate, samples)[decoder]
    said = model.generate_until([request(i, question(s), dict(max_new_tokens=40)) for i, s in enumerate(samples)])
    assert said == [text for _, text in wanted] and len(set(said)) > 1
    ranked = model.loglikelihood([request(i, question(s), " " + o) for i, s in enumerate(samples) for o in s.options])
    losses = torch.tensor([loss for loss, _ in ranked]).view(len(samples), 10)
    assert losses.argmin(1).tolist() == [choice for choice, _ in wanted] and (losses > 0).all()


def test_options_of_requests(adapter, stages, tiny_llm):
    samples = draw(1)["open"][:2]
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
@pytest.mark.parametrize("model", ["graft", "pair"])
def test_lmms_eval_s_scores_are_graft_py_s(model, vlm, surrogate, stages, tiny_llm, tmp_path):
    """By lmms-eval's own command line."""
    samples, tasks = draw(1), ("open", "yes_no", "ranked")
    write_task(tmp_path, samples)
    answers = {name: list(zip(of, ask_graft(vlm, surrogate, of)[model])) for name, of in samples.items()}
    wanted = {name: sum(world.is_right(text, s) for s, (_, text) in of) / len(of) for name, of in answers.items()}
    ranked = [s.options[choice] == s.answer for s, (choice, _) in answers["open"]]
    argv = ["--model", model, "--model_args", f"llm={tiny_llm},encoder={stages['encoder']}", "--device", "cpu",
            "--tasks", ",".join(f"world_{name}" for name in tasks), "--include_path", str(tmp_path),
            "--batch_size", "8", "--output_path", str(tmp_path / "out")]
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    got = subprocess.run([sys.executable, "-m", "extras.lmms_eval_model", *argv], cwd=ROOT, env=os.environ | offline,
                         capture_output=True, encoding="utf-8")
    assert got.returncode == 0, (got.stdout + got.stderr)[-2000:]
    found = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text(encoding="utf-8"))["results"]
    scores = {name: next(v for k, v in found[f"world_{name}"].items() if k.split(",")[0] in ("right", "acc"))
              for name in tasks}
    assert scores == pytest.approx(wanted | dict(ranked=sum(ranked) / len(ranked)), abs=1e-6)

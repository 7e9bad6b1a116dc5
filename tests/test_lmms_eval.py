"""
extras/lmms_eval_model.py answers as graft.py does; with lmms-eval installed, its own scores are graft.py's.

`write_task` writes an lmms-eval task, which may serve as a pattern for your own: task YAMLs, utils.py, JSON, images.
"""
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import refuses
from test_graft import answers

import evaluate
from cli import UserError
from data import world
from extras.lmms_eval_model import Graft, Pair

ROOT = Path(__file__).parent.parent
INSTALLED = importlib.util.find_spec("lmms_eval") is not None

# ---- Drawn images: open and ranked questions -------------------------------------------------------------------------

TASK = """task: world_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/docs.json
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
TASKS = dict(open=dict(kind="generate_until", target="answer", metric="right", more=SAID),
             ranked=dict(kind="multiple_choice", target="gold", metric="acc", more="doc_to_choice: options\n"))
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


def draw(n):
    """n held-out samples of every task."""
    return [world.world(task, i, evaluate.EVAL_SEED, "test") for task in evaluate.TASKS for i in range(n)]


def write_task(folder, samples):
    """The files of two tasks: world_open, and world_ranked, where the same questions have options."""
    docs = []
    for i, s in enumerate(samples):
        s.image.save(folder / f"{i}.png")
        docs.append(dict(image=str(folder / f"{i}.png"), question=question(s), answer=s.answer, options=list(s.options),
                         gold=s.options.index(s.answer), right=[list(g) for g in s.right], rivals=list(s.rivals)))
    (folder / "docs.json").write_text(json.dumps(docs), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, **task), encoding="utf-8")


# ---- The adapter -----------------------------------------------------------------------------------------------------


def request(i, question, given, task="world"):
    """As lmms-eval makes one: its arguments are text, what the kind of request needs, and where its image is."""
    return types.SimpleNamespace(args=(question, given, lambda doc: [doc.image] if doc.image else [], i, task, "test"))


def loaded(model, samples):
    model.task_dict = {"world": {"test": samples}}
    return model


@pytest.mark.parametrize("kind, decoder", [(Graft, "graft"), (Pair, "pair")])
def test_answers_and_rankings_are_graft_py_s(kind, decoder, vlm, surrogate, stages, tiny_llm):
    samples = [s for s in draw(1) if len(s.options) == 10]
    model = loaded(kind(llm=tiny_llm, encoder=stages["encoder"], batch_size=3), samples)
    wanted = answers(vlm, surrogate, samples)[decoder]
    said = model.generate_until([request(i, question(s), dict(max_new_tokens=40)) for i, s in enumerate(samples)])
    assert said == [text for _, text in wanted] and len(set(said)) > 1
    ranked = model.loglikelihood([request(i, question(s), " " + o) for i, s in enumerate(samples) for o in s.options])
    losses = torch.tensor([loss for loss, _ in ranked]).view(len(samples), 10)
    assert losses.argmin(1).tolist() == [choice for choice, _ in wanted] and (losses > 0).all()


def test_options_of_requests(stages, tiny_llm):
    samples = draw(1)[:2]
    model = loaded(Graft(tiny_llm, stages["encoder"]), samples)
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
    beams, two = request(0, "What?", dict(num_beams=4)), request(0, "What?", {})
    two.args = (*two.args[:2], lambda doc: [doc.image] * 2, *two.args[3:])
    refuses(UserError, lambda: model.generate_until([beams]), "num_beams")
    refuses(UserError, lambda: model.generate_until([two]), "2 images in a question")


@pytest.mark.skipif(not INSTALLED, reason="needs lmms-eval: pip install lmms-eval==0.7.3")
@pytest.mark.parametrize("model", ["graft", "pair"])
def test_lmms_eval_s_scores_are_graft_py_s(model, vlm, surrogate, stages, tiny_llm, tmp_path):
    """By lmms-eval's own command line."""
    samples = draw(1)
    write_task(tmp_path, samples)
    ours = list(zip(samples, answers(vlm, surrogate, samples)[model]))
    wanted = dict(open=sum(world.is_right(text, s) for s, (_, text) in ours) / len(ours),
                  ranked=sum(s.options[choice] == s.answer for s, (choice, _) in ours) / len(ours))
    argv = ["--model", model, "--model_args", f"llm={tiny_llm},encoder={stages['encoder']}", "--device", "cpu",
            "--tasks", "world_open,world_ranked", "--include_path", str(tmp_path),
            "--batch_size", "8", "--output_path", str(tmp_path / "out")]
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    got = subprocess.run([sys.executable, "-m", "extras.lmms_eval_model", *argv], cwd=ROOT, env=os.environ | offline,
                         capture_output=True, encoding="utf-8")
    assert got.returncode == 0, (got.stdout + got.stderr)[-2000:]
    found = json.loads(next((tmp_path / "out").rglob("*results.json")).read_text(encoding="utf-8"))["results"]
    scores = {name: next(v for k, v in found[f"world_{name}"].items() if k.split(",")[0] in ("right", "acc"))
              for name in TASKS}
    assert scores == pytest.approx(wanted, abs=1e-6)

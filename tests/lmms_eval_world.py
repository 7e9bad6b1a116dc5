"""
lmms-eval's scores beside graft.py's: the same held-out drawn images, asked through the adapter in extras/ and directly.

    python -m tests.lmms_eval_world --n 5             # needs lmms-eval: see extras/lmms_eval_model.py

Writes an lmms-eval task in FOLDER, which may serve as a pattern for your own: task YAMLs, utils.py, test.json, images.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

import evaluate
from cli import Parser, UserError, number, run_cli
from data import world
from data.batches import Sample, wrap
from formats import checkpoints, official
from formats.checkpoints import ROOT
from model import VLM
from surrogate import load_surrogate

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
TASKS = {"open": SAID, "yes_no": SAID, "ranked": "doc_to_choice: options\n"}


def yes_no(sample, i):
    """A question about the same picture that is answered by yes or no, in turns."""
    rng = random.Random(f"yes/{i}/{sample.caption}")
    other = rng.choice([c for c in map(world.caption, world.SUBJECTS) if c != sample.caption])
    shown, answer, rival = (sample.caption, "Yes", "No") if i % 2 == 0 else (other, "No", "Yes")
    messages = [{"role": "user", "content": wrap(f"Does the image show {shown}?")},
                {"role": "assistant", "content": f"{answer}."}]
    return Sample(sample.image, messages, "yes_no", f"{answer}.", ["Yes.", "No."], sample.caption, [(answer,)], [rival])


def draw(n, seed=evaluate.EVAL_SEED):
    """{"open": n held-out samples of every task, "yes_no": a question about each of these pictures}"""
    samples = [world.world(task, i, seed, "test") for task in evaluate.TASKS for i in range(n)]
    return dict(open=samples, yes_no=[yes_no(s, i) for i, s in enumerate(samples)])


def write_task(folder, samples):
    """The task's files. Ranked are the answers to the open questions."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, of in samples.items():
        docs = []
        for i, s in enumerate(of):
            file = folder / f"{name}-{i}.png"
            s.image.save(file)
            question = s.messages[0]["content"].split("<image>, ")[-1]
            docs.append(dict(image=str(file), question=question, answer=s.answer, options=list(s.options),
                             gold=s.options.index(s.answer), right=[list(g) for g in s.right], rivals=list(s.rivals)))
        (folder / f"{name}.json").write_text(json.dumps(docs), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    for name, more in TASKS.items():
        ranked = name == "ranked"
        (folder / f"{name}.yaml").write_text(TASK.format(
            name=name, folder=folder, file="open" if ranked else name, more=more,
            kind="multiple_choice" if ranked else "generate_until", target="gold" if ranked else "answer",
            metric="acc" if ranked else "right"), encoding="utf-8")


def ask_lmms_eval(model, folder, llm, encoder, batch):
    """{task: score} that lmms-eval's own command line reports for `graft` or `pair`."""
    names = [f"world_{name}" for name in TASKS]
    out = Path(folder).resolve() / f"results-{model}"
    command = ["-m", "extras.lmms_eval_model", "--model", model, "--model_args", f"llm={llm},encoder={encoder}",
               "--tasks", ",".join(names), "--include_path", str(folder), "--batch_size", str(batch),
               "--device", "cpu", "--output_path", str(out)]
    offline = dict(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(Path(folder).resolve() / "cache"))
    options = dict(cwd=ROOT, env=os.environ | offline, capture_output=True, encoding="utf-8")
    done = subprocess.run([sys.executable, *command], **options)
    files = sorted(out.rglob("*results.json"), key=os.path.getmtime)
    if done.returncode or not files:
        raise UserError(f"lmms-eval failed; the end of what it said: {(done.stdout + done.stderr).strip()[-2000:]}")
    print(*(line for line in done.stdout.splitlines() if line.startswith("|")), sep="\n", end="\n\n", flush=True)
    found = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    score = lambda row: next(v for k, v in row.items() if k.split(",")[0] in ("right", "acc"))
    return {name: score(found[f"world_{name}"]) for name in TASKS}


def ask_graft(samples, llm, encoder, batch):
    """The same scores by graft.py's own functions: {"graft": {task: score}, "pair": …}."""
    vlm = VLM.from_pretrained(llm, encoder)
    surrogate, got = load_surrogate(vlm.decoder, encoder), {}
    for name, of in samples.items():
        for i in range(0, len(of), batch):
            part = of[i:i + batch]
            prompts = [vlm.prompt(s.messages[:-1]) for s in part]
            embeds, lengths = vlm.embed_prompts(prompts, [s.image for s in part])
            answers = evaluate.answer(embeds, lengths, part, vlm.decoder, surrogate, vlm.tokenizer)
            for system, results in answers.items():
                rows = got.setdefault(system, dict.fromkeys(TASKS, 0))
                for s, (choice, text) in zip(part, results):
                    rows[name] += world.is_right(text, s) / len(of)
                    if name == "open":
                        rows["ranked"] += (s.options[choice] == s.answer) / len(of)
    return got


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--n", type=number(int, 1, 10**5), default=5, help="held-out images a task (default: %(default)s)")
    add("--llm", help="full LLM (default: the encoder's)")
    add("--encoder", default="assets/encoder.safetensors", help="default: %(default)s")
    add("--batch", type=number(int, 1, 1024), default=8, help="questions at a time (default: %(default)s)")
    add("--out", default="runs/lmms_eval", metavar="FOLDER", help="where the task goes (default: %(default)s)")
    args = parser.parse_args(argv)
    llm = args.llm or checkpoints.open_checkpoint(args.encoder)[1].get("llm", official.DEFAULT_LLM)
    samples = draw(args.n)
    write_task(args.out, samples)
    ours = ask_graft(samples, llm, args.encoder, args.batch)
    theirs = {model: ask_lmms_eval(model, args.out, llm, args.encoder, args.batch) for model in ours}
    print("| | questions | " + " | ".join(f"{m}: lmms-eval | graft.py" for m in ours) + " |\n"
          + "|---|" + "--:|" * (1 + 2 * len(ours)))
    for name in TASKS:
        cells = [f"{x[m][name]:.1%}" for m in ours for x in (theirs, ours)]
        print(f"| world_{name} | {len(samples['open'])} | {' | '.join(cells)} |")
    same = all(abs(ours[m][name] - theirs[m][name]) < 1e-6 for m in ours for name in TASKS)
    print("the same scores" if same else "NOT the same scores")
    return int(not same)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(run_cli(main))

"""
A result as a folder that others can use: `python -m formats.convert runs/encoder/encoder.safetensors --to FOLDER`.

    FOLDER/encoder.safetensors      what stage 2 trained
    FOLDER/translator.safetensors   the surrogate's translators (where it had one)
    FOLDER/vit.safetensors          the ViT that it started from, if that is a small one of extras/vit.py
    FOLDER/config.json, README.md   what the checkpoint says about itself; the model card

`huggingface_hub.upload_folder(folder_path=FOLDER, repo_id=…)` publishes it; VLM.from_pretrained(llm, encoder=…),
graft.py --encoder and train.py --init read the folder or its hub name.
"""
import json
import os
import shutil
from pathlib import Path

from cli import UserError
from formats.checkpoints import ancestry, beside, read_checkpoint, save_checkpoint
from formats.official import DEFAULT_LLM, read_json

PAPER = "[Zero-Shot Vision Encoder Grafting via LLM Surrogates](https://arxiv.org/abs/2505.22664)"
HUB_NAMES = {DEFAULT_LLM: "HuggingFaceTB/SmolLM2-135M-Instruct"}
LICENSES = {    # part of an LLM's name: (the hub's word for its license, what that says of what is derived from it)
    "smollm2": ("apache-2.0", "Apache-2.0 allows to share them."),
    **{f"llama-{v}": (f"llama{v}", "Built with Llama. The Llama Community License allows to share them; it asks for "
                      "these words, a copy of the license, and a model name that begins with Llama.")
       for v in ("3.1", "3.2", "3.3", "3")}}
UNKNOWN = ("other", "Whether they may be shared is a matter of its license, which was not known here: read it first.")


def check_parts(tensors, path):
    """UserError if tensors are none of a VLM's: weights of an LLM or of another model, under whatever name."""
    odd = [n for n in tensors if not n.startswith(("encoder.vision_model.", "adapter.", "embd_", "decoder."))]
    if odd or not tensors:
        raise UserError(f"{path} is no checkpoint of train.py: it holds {odd[0] if odd else 'nothing'}")


def public(name, what):
    """`name`, unless it is a path of this machine: that would help nobody else."""
    if Path(name).exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise UserError(f"{name} is a path of this machine: say what others know the {what[2:]} by, {what} org/name")
    return name


def share(checkpoint, tensors, about, folder, llm=None, vit=None, scores=None):
    """Write the folder of a checkpoint of stage translator or encoder: its tensors, and what it says about itself.

    llm, vit: names that others know, where the checkpoint has a path. scores: results.json of graft.py. The folder must
    be new or empty, and appears whole or not at all. Returns {name of a file: bytes}.
    """
    check_parts(tensors, checkpoint)
    stage, folder = about.get("stage"), Path(folder)
    if stage not in ("translator", "encoder"):
        raise UserError(f"{checkpoint} is of stage {stage or 'unknown'}: a folder to share holds an encoder or "
                        "translators, and nothing of the LLM itself")
    ranges = about.get("ranges", [])
    places = [first - sum(b - a for a, b in ranges if b < first) for first, _ in ranges]        # of the translators
    if any(n.startswith("decoder.") and not n.startswith(tuple(f"decoder.model.layers.{i}." for i in places))
           for n in tensors):
        raise UserError(f"{checkpoint} holds the LLM itself, not only translators: it is not to be shared like this")
    if stage == "encoder" and "adapter.0.weight" not in tensors:
        raise UserError(f"{checkpoint} holds no projector: it is not whole")
    for name, value in (("llm", llm or about.get("llm")), ("vit", vit or about.get("vit") or stage == "translator")):
        if not value:
            raise UserError(f"{checkpoint} does not say which {name} it was trained with: give --{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder")
    table = score_table(read_json(scores), about, scores) if scores else ""
    llm, vit, start, files = public(llm or about["llm"], "--llm"), vit or about.get("vit"), None, {}
    if vit and Path(vit).suffix == ".safetensors":
        files["vit"], vit = read_checkpoint(beside(vit, checkpoint)), "vit.safetensors"
        start = vit if stage == "translator" else None              # a translator that was trained alone needs it
    vit = vit and public(vit, "--vit")
    own = any(n.startswith("decoder.") for n in tensors)            # translators that the LLM went on teaching
    if stage == "encoder" and about.get("ranges") and about.get("start") and not own:
        files["translator"], start = translators(checkpoint), "translator.safetensors"
    files = {stage: (tensors, about)} | files
    told = {}       # {file: what it says about itself}, with no path of this machine
    for name, (_, says) in files.items():
        base = {k: Path(v).name for k, v in says.items() if k in ("data", "text", "images") and v}
        told[name] = says | base | dict(llm=llm, start=start if name == stage else None)
        told[name] |= dict(vit=vit) if name != "vit" and vit else {}
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        for name, (weights, _) in files.items():
            save_checkpoint(part / f"{name}.safetensors", weights, told[name])
        (part / "config.json").write_text(json.dumps(told[stage], indent=1, sort_keys=True), encoding="utf-8")
        weights = {name: weights for name, (weights, _) in files.items()}
        (part / "README.md").write_text(card(folder.name, told[stage], weights, table), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {f.name: f.stat().st_size for f in sorted(folder.iterdir())}


def translators(checkpoint):
    """(the translators that an encoder was trained with, what their checkpoint says about itself)"""
    for _, tensors, about in ancestry(checkpoint):
        tensors = {n: t for n, t in tensors.items() if n.startswith("decoder.")}
        if tensors:
            return tensors, about
    raise UserError(f"{checkpoint} names no checkpoint that holds its translators")


def score_table(results, about, path):
    """`scores`, or a UserError where results.json is damaged."""
    try:
        return scores_as_table(results, about, path)
    except (LookupError, TypeError, AttributeError, ZeroDivisionError) as e:
        raise UserError(f"{path} is no results.json of graft.py, or damaged ({e!r:.80})") from None


def scores_as_table(results, about, path):
    """results.json of graft.py as a table: means over the tasks of what was said freely, and of what was ranked."""
    if not isinstance(results, dict) or results.get("about") != about:
        raise UserError(f"{path} holds the scores of another encoder: run graft.py --encoder with this one")
    names = list(dict.fromkeys(r["system"] for r in results["rows"]))
    lines = [f"{results['samples']} held-out drawn images a task (`graft.py --eval`, seed {results['seed']}):", "",
             f"| mean over tasks | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for trained in (False, True):
        for measure, how in (("said", "said freely"), ("ranked", "ranked first among options")):
            rows = [r for r in results["rows"] if r["trained"] == trained]
            cells = [[x for r in rows if r["system"] == n for x in r[measure]] for n in names]
            lines.append(f"| {'' if trained else 'never '}trained, {how} | "
                         + " | ".join(f"{sum(c) / len(c):.0%}" if c else "" for c in cells) + " |")
    return "\n".join(lines)


def card(name, about, files, table):
    """The model card, README.md, filled in from what the checkpoint says about itself. files: {name: {name: tensor}}"""
    hub, encoder = HUB_NAMES.get(about["llm"], about["llm"]), about["stage"] == "encoder"
    license_id, note = next((x for k, x in LICENSES.items() if k in hub.lower()), UNKNOWN)
    derived = any(n.startswith("decoder.") for tensors in files.values() for n in tensors)
    facts = {
        "base LLM": f"[{hub}](https://huggingface.co/{hub})",
        "ViT": about.get("vit"),
        "layers replaced by translators": ", ".join(f"{a}–{b}" for a, b in about.get("ranges") or []) or "none",
        "data": about.get("data") or "the drawn world of data/world.py",
        "text": about.get("text"),
        "stage": about["stage"],
        "steps done": about.get("steps_done"),
        "recipe": ", ".join(f"{k}={v}" for k, v in (about.get("recipe") or {}).items()),
    }
    use = f"""from model import VLM
vlm = VLM.from_pretrained("{about['llm']}", encoder="{name}")       # or its hub name
print(vlm.chat("photo.png", "What do you see?"))""" if encoder else f"""# stage 2, an encoder through these translators:
# python train.py encoder --init {name}"""
    return f"""---
base_model: {hub}
license: {license_id}
pipeline_tag: image-text-to-text
tags:
- vision-encoder-grafting
---

# {name}

{"A vision encoder" if encoder else "The translators of a surrogate"} for {hub}, trained by a small implementation of
{PAPER}.

```python
{use}
```

| | |
|---|---|
{chr(10).join(f"| {k} | {v} |" for k, v in facts.items() if v)}

## Scores

{table or "None were given (`python -m formats.convert … --scores runs/graft/results.json`)."}

## Files

| file | tensors | parameters |
|---|---|---|
{chr(10).join(f"| {n}.safetensors | {len(t):,} | {sum(x.numel() for x in t.values()):,} |" for n, t in files.items())}

## License

{f"The translators began as copies of layers of {hub} and are derived from it. {note}" if derived else ""}
Nothing else of the LLM is in here: get it from its own page.
"""

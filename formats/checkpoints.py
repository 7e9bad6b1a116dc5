"""
Our own checkpoints: only what was trained, described in the file's metadata; and those that the paper released.

    save_checkpoint("runs/encoder/encoder.safetensors", {name: tensor}, dict(stage="encoder", ...))
    tensors, about = read_checkpoint("assets/encoder.safetensors")          # or a .pth that the paper released
    load_checkpoint(vlm, tensors, "assets/encoder.safetensors")
"""
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import MissingFile, UserError, write_whole
from formats.files import open_safetensors, open_torch
from formats.official import and_more, check_finite, find, find_file, hf_config, is_llava, open_llava, placed

ROOT = Path(__file__).parent.parent     # of the project: assets/ is there


def save_checkpoint(path, tensors, about):
    """Save named tensors as safetensors. `about` (any JSON values) goes into the file's metadata, readable without the
    weights. Of a sharded model, gather the tensors first."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    write_tensors(path, lambda part: save_file(tensors, part, {k: json.dumps(v) for k, v in about.items()}))


def save_released(path, tensors, step):
    """Save named tensors as the paper's released checkpoints are: a torch.save dictionary. The names are the same."""
    saved = dict(epoch=1, global_step=step, model=tensors, optimizer=None, scheduler=None)
    write_tensors(path, lambda part: torch.save(saved, part))


def write_tensors(path, save):
    """Call save(temporary path); the file then appears whole or not at all."""
    def write(part):
        part.touch()
        mode = part.stat().st_mode      # save_file would make a file that nobody but its owner may read
        try:
            save(part)
        except (SafetensorError, RuntimeError) as e:    # their ways to say that the disk is full
            raise UserError(f"cannot write {path}: {str(e).splitlines()[0]}") from None
        part.chmod(mode)

    write_whole(path, write)


def locate(path):
    """A file as named, or else, whatever the working folder, beside this code: so assets/… is found from anywhere."""
    path, here = Path(path), ROOT / path
    return here if not path.exists() and here.exists() else path


def checkpoint_file(path):
    """The file of a checkpoint: `path` itself, a file of the hub (org/name:FILE), or what is in the folder or behind
    the hub name (org/name): a result that extras/share.py wrote, the folder of a run, or, as it is, a LLaVA."""
    name, path = path, locate(path)
    if not path.exists() and on_hub(path):
        path = find_file(path) if ":" in str(path) else find(path)
    if not path.is_dir():
        return path
    for stage in ("encoder", "decoder", "translator", "vit"):
        if (path / f"{stage}.safetensors").exists():
            return path / f"{stage}.safetensors"
    if is_llava(path):
        return path
    if not (path / "config.json").exists() and not locate(name).exists():
        return find_file(name)                              # of the hub: the only file there
    found = hf_config(path).get("architectures") if (path / "config.json").exists() else sorted(os.listdir(path))
    raise MissingFile(f"no checkpoint in {path}: expected encoder.safetensors or translator.safetensors, or a model of "
                      f"LLaVA's (LlavaLlamaForCausalLM); found {str(found):.80}")


def on_hub(path):
    """Is what is no file here a hub name: org/name, or org/name:FILE?"""
    return ":" in str(path) or str(path).count("/") == 1 and path.suffix not in (".safetensors", ".pth", ".pt", ".bin")


def open_checkpoint(path):
    """({name: function that reads this tensor}, about) of a file that `save_checkpoint` wrote, or of a checkpoint that
    the paper released (.pth)."""
    path = checkpoint_file(path)
    if not path.exists():
        raise MissingFile(f"no such checkpoint: {path}")
    if path.is_dir():
        return open_llava(path)
    if path.suffix != ".safetensors":
        return open_torch(path), {}
    tensors = open_safetensors(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    try:
        about = {k: json.loads(v) for k, v in metadata.items() if k != "format"}
    except (ValueError, RecursionError):    # metadata that `save_checkpoint` did not write
        about = {}
    return tensors, check_about(about, path)


ABOUT = dict(stage=str, llm=str, vit=str, ranges=list, vit_config=dict, recipe=dict, about=dict, step=int,
             steps_done=int, seed=int) | dict.fromkeys(("start", "data", "text", "images"), str | None)
RECIPE = dict(vit_layers=int, distill=int, like_words=bool)     # what is read of it


def check_about(about, path):
    """A checkpoint's metadata, if its values are of the kinds that `save_checkpoint` was given; else a UserError."""
    pair = lambda value: isinstance(value, list) and [type(x) for x in value] == [int, int]
    for part, kinds in ((about, ABOUT), (about.get("recipe", {}), RECIPE)):
        for name in part.keys() & kinds.keys():
            value = part[name]
            fits = isinstance(value, kinds[name]) and (name != "ranges" or all(map(pair, value)))
            if kinds is RECIPE:
                fits = type(value) is kinds[name] and value >= 0
            if not fits or isinstance(value, str) and "\0" in value:
                raise UserError(f"{path}: {name} = {value!r:.60} in its metadata: it is damaged, or not of this "
                                "project's train.py")
    return about


def read_checkpoint(path):
    """(tensors by name, about): `open_checkpoint`, and all of it read."""
    tensors, about = open_checkpoint(path)
    return {n: read() for n, read in tensors.items()}, about


def beside(name, checkpoint):
    """The file that a checkpoint's metadata names: in the checkpoint's own folder, or else as written there.

    In this order: what is shipped in assets/ stays together, whatever a run of yours has left in runs/ since."""
    file = checkpoint_file(checkpoint)
    neighbour, written = file.parent / Path(name).name, locate(name)
    if neighbour.exists() and not neighbour.samefile(file):
        return neighbour
    if not written.exists() and not on_hub(written):
        raise MissingFile(f"{checkpoint} needs {name}, which is neither there nor beside it")
    return checkpoint_file(name)


def ancestry(path):
    """Yield (path, tensors, about) of a checkpoint, then of the one that it started from, and so on."""
    seen = set()
    while path:
        tensors, about = read_checkpoint(path)
        yield path, tensors, about
        seen.add(locate(path).resolve())
        path = about.get("start") and beside(about["start"], path)
        if path and locate(path).resolve() in seen:
            raise UserError(f"{path} started from itself, says its metadata: it is damaged; give another checkpoint")


def held(about, tensors, layers):
    """How the names begin that a checkpoint has to hold: those of what its stage trained, but for the translators, for
    which surrogate.load_translators asks. Whatever it lacked would be random. layers: of its ViT."""
    upper, recipe, stage = "encoder.vision_model.encoder.layers.", about.get("recipe", {}), about.get("stage")
    whole = stage == "decoder" or "decoder.model.embed_tokens.weight" in tensors        # stage 3 trains the LLM itself
    if stage is None:                                                                   # the paper's say nothing
        stage = "encoder" if any(n.startswith(upper) for n in tensors) else "translator"
    if stage == "vit":
        return ["encoder."]
    if stage == "translator" and "epochs" in recipe:                                    # of extras/distillation.py
        return []
    learn = recipe.get("vit_layers") or max(1, layers // 3)
    names = ["adapter.", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."] + ["decoder."] * whole
    return names + [f"{upper}{i}." for i in range(layers - learn, layers) if stage != "translator"]


def load_checkpoint(module, tensors, path, needs=()):
    """Copy named tensors into `module`; nothing is copied unless every name and shape fits. needs: how the names begin
    of which none may be missing."""
    wanted = dict(module.named_parameters())
    for name, tensor in tensors.items():
        if name not in wanted or tensor.shape != wanted[name].shape:
            right = f"not {tuple(wanted[name].shape)}" if name in wanted else "which the model does not have"
            raise UserError(f"{path} does not belong to this model: it holds {name} as {tuple(tensor.shape)}, {right}")
        check_finite(tensor.float(), name, path)
    if missing := [n for n in wanted if n.startswith(tuple(needs)) and n not in tensors]:
        raise UserError(f"{path} lacks {and_more(missing)}: it is not whole; copy or train it again")
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(placed(tensor.to(wanted[name].device), wanted[name]))

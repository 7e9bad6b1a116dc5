"""Kinds of error, each looked for at every place where it could be: a new place of the same kind is found, too."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from formats.checkpoints import open_checkpoint, save_checkpoint
from formats.errors import UserError
from model import VLM, Llama, ViT, ViTConfig
from surrogate import build_surrogate, load_surrogate
from train import build, trained_parameters

ROOT = Path(__file__).parent.parent
SOURCES = [f for f in sorted(ROOT.rglob("*.py")) if f.relative_to(ROOT).parts[0] not in ("tests", "runs", ".venv")]


def calls(file):
    """(a call's name, "method" or "function", the call) of every call in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            method = isinstance(node.func, ast.Attribute)
            of = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
            yield node.func.attr if method else node.func.id, of if method else None, node


# ---- Text is UTF-8, whatever the locale says ------------------------------------------------------------------------


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(file):
    """What opens a text, or the output of another program, says UTF-8; `text=True` would be the locale's encoding."""
    for name, of, call in calls(file):
        said = {k.arg: k.value for k in call.keywords}
        reads = name in ("read_text", "write_text") and of not in (None, "files") or name == "open" and of is None
        reads |= name == "open" and of not in (None, "Image", "os")
        binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in call.args[:2])
        assert not reads or binary or "encoding" in said, f"{file}:{call.lineno}"
        if of == "subprocess":
            assert "text" not in said and "universal_newlines" not in said, f"{file}:{call.lineno}"


def test_a_run_in_another_locale(tmp_path):
    """Python's UTF-8 mode switched off, the locale C: the world's instructions, its export and a Chinese record."""
    code = ("from data.world import instructions, caption; from data import check, export; "
            "assert not any('\\udc80' <= c <= '\\udcff' for _, q, a in instructions() for c in q + a); "
            f"export.export({str(tmp_path / 'toy')!r}, 3); assert caption(('flag', 'Peru'))")
    env = os.environ | dict(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "toy/data.json").exists()


# ---- A checkpoint that is not whole ---------------------------------------------------------------------------------

VIT = ViTConfig(image_size=16, patch_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3,
                num_attention_heads=2)  # fmt: skip
HELD = {  # what a stage's checkpoint holds, as in train.trained_parameters -> what it says about itself
    "translator": dict(stage="translator", ranges=[[2, 4]]), "direct": dict(stage="encoder", ranges=[]),
    "encoder": dict(stage="encoder", ranges=[[2, 4]], start="translator.safetensors", recipe=dict(vit_layers=2)),
    "taught": dict(stage="encoder", ranges=[[2, 4]], recipe=dict(distill=4)),
    "decoder": dict(stage="decoder", ranges=[], start="encoder.safetensors"),
    "distilled": dict(stage="translator", ranges=[[2, 4]], recipe=dict(epochs=4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_llm, tmp_path_factory):
    """A folder with a checkpoint of every kind, made without training: (folder, {kind: (tensors, about)})."""
    folder, made = tmp_path_factory.mktemp("whole"), {}
    llm = Llama.from_pretrained(tiny_llm)
    vlm = VLM(ViT(VIT), build_surrogate(llm, [(2, 4)]))
    vit = {n: t for n, t in vlm.named_parameters() if n.startswith("encoder.")}
    save_checkpoint(folder / "vit.safetensors", vit, dict(stage="vit", vit_config=vars(VIT)))
    for kind, about in HELD.items():
        about = dict(llm=tiny_llm, vit="vit.safetensors", start=None, recipe={}, seed=0) | about
        vlm.decoder = llm if kind == "decoder" else build_surrogate(llm, [(2, 4)])
        tensors = trained_parameters(vlm, about["stage"], about["recipe"].get("vit_layers", 0), kind == "taught")
        if kind == "distilled":
            tensors = {n: t for n, t in tensors.items() if n.startswith("decoder.")}
        made[kind] = {n: t.detach().clone() for n, t in tensors.items()}, about
        save_checkpoint(folder / f"{kind}.safetensors", *made[kind])
    return folder, made


def use(kind, path, llm):
    """Read a checkpoint wherever its stage is read."""
    about = open_checkpoint(path)[1]
    if kind not in ("distilled", "translator"):
        VLM.from_pretrained(llm, path, tokenizer=object())
    if about["ranges"]:
        load_surrogate(llm, path)
    if kind != "taught":
        stage = {"translator": "encoder", "distilled": "encoder"}.get(kind, "decoder")
        about = about | dict(stage=stage, start=str(path), vit=str(path.parent / "vit.safetensors"))
        build(about | dict(recipe=dict(like_words=False)), torch.float32, "cpu")


@pytest.fixture(scope="module")
def tiny(tiny_llm):
    return Llama.from_pretrained(tiny_llm)


@pytest.mark.parametrize("kind", HELD)
def test_whole_checkpoints_are_read(whole, tiny, kind):
    folder, _ = whole
    use(kind, folder / f"{kind}.safetensors", tiny)


@pytest.mark.parametrize("kind, part", [(kind, part) for kind in HELD for part in (
    "adapter.0.weight", "adapter.2.bias", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm.weight",
    "encoder.vision_model.encoder.layers.2.mlp.fc1.bias", "encoder.vision_model.encoder.layers.1.",
    "decoder.model.layers.2.mlp.up_proj.weight", "decoder.model.layers.5.", "decoder.model.norm.weight",
    "adapter.", "encoder.", "decoder.model.layers.2.")])  # fmt: skip
def test_a_part_is_missing(whole, tiny, tmp_path, kind, part):
    """Whatever its stage trained and the file lacks is named: nothing runs on random weights."""
    folder, made = whole
    for name in ("vit", "translator", "encoder"):
        (tmp_path / f"{name}.safetensors").symlink_to(folder / f"{name}.safetensors")
    tensors, about = made[kind]
    left = {n: t for n, t in tensors.items() if not n.startswith(part)}
    if len(left) == len(tensors) or not left:
        pytest.skip("this stage holds no such part")
    path = tmp_path / "cut.safetensors"
    save_checkpoint(path, left, about)
    with pytest.raises(UserError) as error:
        use(kind, path, tiny)
    assert "cut.safetensors" in str(error.value) and ("lacks" in str(error.value) or "holds no" in str(error.value))


def test_translators_do_not_touch_the_llm(whole, tiny, tmp_path):
    """A layer that the surrogate shares with the LLM, in a file of translators, would change the LLM in silence."""
    _, made = whole
    tensors, about = made["distilled"]
    norm = {"decoder.model.layers.1.input_layernorm.weight": torch.zeros(32)}
    save_checkpoint(tmp_path / "more.safetensors", tensors | norm, about)
    before = tiny.model.layers[1].input_layernorm.weight.clone()
    with pytest.raises(UserError, match="none of its translators"):
        load_surrogate(tiny, tmp_path / "more.safetensors")
    assert torch.equal(before, tiny.model.layers[1].input_layernorm.weight)


@pytest.mark.parametrize("change, words", [
    (dict(recipe=dict(vit_layers="3")), "vit_layers"), (dict(recipe=dict(distill=-1)), "distill"),
    (dict(recipe=dict(like_words=1)), "like_words"), (dict(data=7), "data = 7"), (dict(images=[]), "images"),
    (dict(text=1.5), "text"), (dict(seed="0"), "seed"), (dict(start="\0"), "start"), (dict(vit="a\0"), "vit"),
    (dict(llm="\0"), "llm"), (dict(step=True, recipe=[]), "recipe"),
])  # fmt: skip
def test_what_a_checkpoint_says_is_checked(whole, tmp_path, change, words):
    _, made = whole
    save_checkpoint(tmp_path / "x.safetensors", made["direct"][0], made["direct"][1] | change)
    with pytest.raises(UserError, match=words):
        open_checkpoint(tmp_path / "x.safetensors")

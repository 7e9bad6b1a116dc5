"""extras/share.py: a shared folder is whole, tells no path, and is read back by its name or from the hub."""
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import refuses
from PIL import Image

import train
from cli import MissingFile, UserError
from extras import share
from formats import checkpoints
from formats.checkpoints import open_checkpoint, read_checkpoint, save_checkpoint
from model import VLM, Llama
from surrogate import load_surrogate

NAME = "org/Tiny-1M"        # what others know the tiny LLM by


def shared(checkpoint, folder, *options):
    assert not share.main([checkpoint, "--to", str(folder), "--llm", NAME, *options])
    return folder


@pytest.fixture(scope="module")
def folder(stages, tmp_path_factory):
    """The shared encoder, moved from where it was written."""
    made = shared(stages["encoder"], tmp_path_factory.mktemp("made") / "mine")
    return Path(shutil.move(made, tmp_path_factory.mktemp("elsewhere") / "theirs"))


def answers(llm, encoder):
    """What graft and pair make of an image: logits of a prompt."""
    vlm = VLM.from_pretrained(llm, encoder=encoder)
    embeds, _ = vlm.embed_prompts([[5, 6] + [-200] * vlm.n_visual + [7]], [Image.new("RGB", (64, 64), "red")])
    return vlm.decoder(embeds=embeds), load_surrogate(vlm.decoder, encoder)(embeds=embeds)


def test_shared_folder_reads_back(folder, stages, tiny_llm, monkeypatch):
    before = answers(tiny_llm, stages["encoder"])
    assert not torch.allclose(*before)
    for name in (folder, str(folder), str(folder / "encoder.safetensors")):
        assert all(torch.equal(a, b) for a, b in zip(answers(tiny_llm, name), before))
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    assert all(torch.equal(a, b) for a, b in zip(answers(tiny_llm, "org/encoder"), before))
    assert set(asked) == {"org/encoder"}
    no_encoder = lambda: VLM.from_pretrained(tiny_llm, encoder=tiny_llm)
    refuses(MissingFile, no_encoder, "no checkpoint in ", ": expected encoder.safetensors")


def test_shared_folder_holds_nothing_of_this_machine_or_the_llm(folder, stages, tiny_llm):
    assert {f.name for f in folder.iterdir()} == {"README.md", "config.json", "encoder.safetensors", "vit.safetensors"}
    home = str(Path(stages["encoder"]).parent.parent)
    for f in folder.iterdir():
        assert home.encode() not in f.read_bytes() and tiny_llm.encode() not in f.read_bytes(), f
    names = {n for f in folder.glob("*.safetensors") for n in open_checkpoint(f)[0]}
    decoder = {n for n in names if n.startswith("decoder.")}
    assert decoder and all(n.startswith("decoder.model.layers.2.") for n in decoder)        # the translator of 2-4
    about = json.loads((folder / "config.json").read_text())
    assert about["llm"] == NAME and about["ranges"] == [[2, 4]] and about["start"] is None   # its own translators


def test_model_card(folder, stages, tmp_path):
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert card.data.base_model == NAME and card.data.license == "other" and card.data.pipeline_tag
    assert "2–4" in card.text and "lr=0.001" in card.text and "which was not known here" in card.text
    about = open_checkpoint(stages["encoder"])[1]
    rows = [dict(task=t, trained=t == "color", system=s, said=x, ranked=x, about=x, split="test") for t, s, x in (
        ("color", "graft", [1, 0]), ("capital", "graft", [0, 0]), ("language", "graft", [1, 1]),
        ("capital", "pair", [0]))]
    scores = tmp_path / "results.json"
    scores.write_text(json.dumps(dict(about=about, samples=3, seed=7, rows=rows)))
    text = (shared(stages["encoder"], tmp_path / "a", "--scores", str(scores)) / "README.md").read_text()
    assert "3 held-out drawn images a task (`graft.py --eval`, seed 7)" in text
    assert "| **never trained, mean** * | 50% (" in text and "| **trained, mean** | 50% (" in text
    scores.write_text(json.dumps(dict(about=about | dict(seed=1), samples=3, seed=7, rows=rows)))
    again = lambda: shared(stages["encoder"], tmp_path / "b", "--scores", str(scores))
    refuses(UserError, again, "scores of another encoder")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("llm, license_id, words", [
    ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1", "Built with Llama"), ("smollm2-135m", "apache-2.0", "Apache-2.0")])
def test_license_of_the_base(llm, license_id, words, stages, tmp_path):
    assert not share.main([stages["translator"], "--to", str(tmp_path / "a"), "--llm", llm])
    card = huggingface_hub.ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.license == license_id and words in card.text


@pytest.fixture
def translator(stages, tiny_llm, tmp_path):
    """A shared folder of translators. The tiny LLM has no public name: its path stands in the folder in its place."""
    folder = shared(stages["translator"], tmp_path / "shared")
    tensors, about = read_checkpoint(folder)
    save_checkpoint(folder / "translator.safetensors", tensors, about | dict(llm=tiny_llm))
    return folder


def test_stage_2_goes_on_from_a_shared_translator(translator, stages, tiny_llm, tmp_path):
    assert {f.name for f in translator.glob("*.safetensors")} == {"translator.safetensors", "vit.safetensors"}
    train.main(["encoder", "--llm", tiny_llm, "steps=3", "batch=6", "lr=1e-3", "dtype=float32",
                "--init", str(translator), "--out", str(tmp_path / "run")])
    ours, theirs = (read_checkpoint(f)[0] for f in (tmp_path / "run", stages["encoder"]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert VLM.from_pretrained(Llama.from_pretrained(tiny_llm), encoder=tmp_path / "run")


def test_a_hub_name_as_the_start(translator, tiny_llm, tmp_path, monkeypatch):
    """What train.py --init org/name leaves behind finds its translators again."""
    monkeypatch.setattr(checkpoints, "find", lambda name: {"org/name": translator}[str(name)])
    train.main(["encoder", "steps=1", "batch=2", "dtype=float32", "--init", "org/name", "--out", str(tmp_path / "run")])
    assert read_checkpoint(tmp_path / "run")[1]["start"] == "org/name"
    assert load_surrogate(Llama.from_pretrained(tiny_llm), tmp_path / "run").translators


def test_what_cannot_be_shared(stages, tmp_path):
    nameless = [stages["encoder"], "--to", str(tmp_path / "a")]
    refuses(UserError, lambda: share.main(nameless), "is a path of this machine: ", "--llm org/name")
    for stage in ("decoder", "vit"):
        refuses(UserError, lambda: shared(stages[stage], tmp_path / "a"), f"stage {stage}", "nothing of the LLM itself")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    refuses(UserError, lambda: shared(stages["encoder"], tmp_path / "full"), "is there already")
    assert [f.name for f in tmp_path.iterdir()] == ["full"] and (tmp_path / "full" / "mine.txt").exists()
    direct = shared(stages["full"], tmp_path / "direct")        # trained on the full LLM: no translator
    assert {f.name for f in direct.glob("*.safetensors")} == {"encoder.safetensors", "vit.safetensors"}

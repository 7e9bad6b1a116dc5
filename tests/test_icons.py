"""data/icons.py on packages that the test draws: captions, three files, one of them the test artist's, what is bad."""
import json

import pytest
from conftest import assert_refused
from PIL import Image

import graft
from cli import UserError, run_cli
from data import icons
from data.sources import HeldOut
from data.world import is_right
from evaluate import grade
from extras import distillation, instructions, vit
from formats.files import read_json

THINGS = {      # name: (category, subcategory, caption)
    **{name: ("Animals & Nature", "animal-x", caption) for name, caption in [
        ("OWL", "an owl"), ("BLACK CAT", "a cat"), ("DOG FACE", "a dog face"), ("DOG", "a dog"), ("OX", "an ox")]},
    **{name: ("Food & Drink", "food-x", caption) for name, caption in [
        ("HOT DOG", "a hot dog"), ("GRAPES", "grapes"), ("BREAD", "bread"), ("SLICE OF PIZZA", "a slice of pizza")]},
    **{f"{name} Flag": ("Flags", "country-flag", f"the flag of {the}{name}") for the, name in [
        ("", "Peru"), ("the ", "Netherlands"), ("", "Norway"), ("", "Cuba")]},
    "HASH KEY": ("Symbols", "keycap", None), "WOMAN COOK": ("People & Body", "person-role", None),
    "TOP HAT": ("Objects", "clothing", "a top hat"),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """What data.icons makes of three artists' packages, of whom `two` is for the test. `one` lacks a picture."""
    folder = tmp_path_factory.mktemp("icons")
    entries = [dict(name=name, category=c, subcategory=s, image=f"1f4{i:02d}-fe0f.png", added_in="0.6")
               for i, (name, (c, s, _)) in enumerate(THINGS.items())]
    for number, (artist, place) in enumerate([("one", "img/one/64"), ("two", "img/two/64"), ("three", "assets")]):
        (folder / artist / place).mkdir(parents=True)
        (folder / artist / "package.json").write_text(json.dumps(dict(name=f"@x/{artist}")))
        for i, entry in enumerate(entries):
            file = folder / artist / place / f"1f4{i:02d}{'' if number else '-fe0f'}.{'png' if number < 2 else 'webp'}"
            if number or entry["name"] != "TOP HAT":
                Image.new("RGBA", (64, 64), (9 * i, 80 * number, 99, 255)).save(file)
    (folder / "one" / "emoji.json").write_text(json.dumps(entries))
    one, two, three = (str(folder / artist) for artist in ("one", "two", "three"))
    icons.main([one, three, "--test", two, "--out", str(folder / "out")])
    return folder / "out"


def test_icons_become_llava_records(out, capsys):
    known, train, test = (read_json(out / f"{name}.json", list) for name in ("known", "train", "test"))
    captions = {c for *_, c in THINGS.values() if c}
    assert {r["caption"] for r in known} == captions == {r["caption"] for r in test}
    held = {r["caption"] for r in test if r["split"] == "untaught"}
    assert "the flag of Norway" in held and {r["caption"] for r in train} == captions - held
    assert "x-two" not in (out / "known.json").read_text() + (out / "train.json").read_text()   # the test's artist
    assert all(r["image"].startswith("x-two/") for r in test)
    flags = {r["image"].split("/")[0] for r in known if "flag" in r["caption"]}
    assert flags == {"x-one"}                                           # those in WebP are another artist's
    asked = {(r["caption"], r["task"]): r for r in test}
    assert asked["a hot dog", "kind"]["conversations"][1]["value"] == "It is a food."
    assert asked["the flag of Peru", "capital"]["conversations"][1]["value"] == "The capital is Lima."
    assert not any(w in r["conversations"][1]["value"] for r in known for w in ("animal", "food", "Lima"))
    with pytest.raises(UserError, match="train.json is there already"):
        icons.main([str(out), "--test", str(out), "--out", str(out)])


def test_bad_icons_are_named(tmp_path, capsys):
    assert_refused(capsys, ["data.icons", str(tmp_path), "--test", str(tmp_path)], "no package of icons")
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert run_cli(lambda: icons.drawing(tmp_path / "a.png")) == 2 and "a.png" in capsys.readouterr().err


def test_the_test_is_graded_as_the_drawn_world_is(out):
    held = HeldOut(out / "test.json", out)
    assert set(held.tasks("test")) == {"describe", "kind", "flag", "capital", "language", "continent"}
    rows = grade(lambda samples: [("all", [(s.options.index(s.answer), s.answer) for s in samples])],
                 held.tasks("test"), 5, 2, split="test", progress=False, draw=held)
    assert all(r["said"] == r["ranked"] == [1] * 5 for r in rows)
    assert [r["task"] for r in rows if r["trained"]] == ["describe", "flag"]
    sample = held("describe", 0)
    assert not is_right(next(o for o in sample.options if o != sample.answer), sample)
    for call, words in ((lambda: held.tasks("restyled"), "no split 'restyled'"),
                        (lambda: HeldOut(out / "train.json", out), "record 0 is not a test's")):
        with pytest.raises(UserError, match=words):
            call()


def test_all_stages_read_icons(out, tmp_path, tiny_llm, stages, capsys):
    vit.main(["steps=1", "batch=4", "workers=0", "--data", str(out / "known.json"), "--out", str(tmp_path / "vit")])
    distillation.main(["steps=1", "batch=2", "--llm", tiny_llm, "--replace", "2-4", "--data", str(out / "train.json"),
                       "--out", str(tmp_path / "translator")])
    assert (tmp_path / "vit/vit.safetensors").exists() and (tmp_path / "translator/translator.safetensors").exists()
    graft.main(["--encoder", stages["encoder"], "--direct", stages["full"], "--data", str(out / "test.json"), "--eval",
                "1", "--splits", "test", "untaught", "--out", str(tmp_path / "graft")])
    rows = read_json(tmp_path / "graft/results.json", dict)["rows"]
    assert {(r["split"], r["task"]) for r in rows} > {("test", "kind"), ("untaught", "capital")}
    records = read_json(out / "train.json", list)
    more = instructions.with_instructions(records, [(("picture", "an owl"), "Who?", "Whoo.")] * 3, 0)[len(records):]
    pictures = {r["image"] for r in records if r["caption"] == "an owl"}
    assert len(more) == 3 and all(r["caption"] == "an owl" and r["image"] in pictures for r in more)
    assert instructions.contradicts("It is red.", ("picture", "an owl"))
    assert instructions.yes_or_no(None, ("picture", "an owl")) == []

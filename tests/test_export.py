"""data/export.py and data/check.py: the exported folder is valid, and trains as the drawn world does."""
import csv
import json
from pathlib import Path

import pytest
import torch

import train
from cli import UserError
from data import check, export
from data.llava import LlavaRecords
from data.world import World
from formats.checkpoints import read_checkpoint


def losses(folder):
    with open(Path(folder) / "log.csv") as f:
        return [row["loss"] for row in csv.DictReader(f)]


@pytest.mark.parametrize("stage", ["encoder", "translator"])        # the latter mixes in text instructions
def test_the_exported_folder_trains_as_the_drawn_world_does(stage, stages, tiny_llm, tmp_path):
    data = export.export(tmp_path / "toy", 18)
    init = stages["translator" if stage == "encoder" else "vit"]
    options = ["--replace", "2-4"] if stage == "translator" else []
    train.main([stage, "--llm", tiny_llm, "--init", init, *options, "steps=3", "batch=6", "lr=1e-3", "dtype=float32",
                "--data", str(data), "--images", str(data.parent), "--out", str(tmp_path / stage)])
    drawn = Path(stages[stage]).parent          # the same three steps, on the drawn world
    assert losses(tmp_path / stage) == losses(drawn) and len(set(losses(drawn))) == 3
    (ours, _), (theirs, _) = (read_checkpoint(folder / f"{stage}.safetensors") for folder in (tmp_path / stage, drawn))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_export_is_plain_llava(tmp_path, capsys):
    export.main([str(tmp_path), "12", "--seed", "5"])
    assert "next: python -m data.check" in capsys.readouterr().out
    records = json.loads((tmp_path / "data.json").read_text())
    assert len(records) == 12 and len(list(tmp_path.iterdir())) == 13
    for record, sample in zip(records, LlavaRecords(tmp_path / "data.json", tmp_path)):
        question, answer = record["conversations"]
        assert question["value"].startswith("<image>\n") and question["value"][8].isupper()
        drawn = World(5)[int(record["id"][:5])]
        assert sample.messages == drawn.messages and sample.image.tobytes() == drawn.image.tobytes()
        assert answer["value"] == drawn.answer and record["id"].endswith(drawn.task)
    with pytest.raises(UserError, match="data.json is there already"):
        export.main([str(tmp_path)])


def test_check_says_what_a_run_would_meet(tmp_path, smollm_tokenizer, capsys):
    export.main([str(tmp_path), "9"])
    assert check.main([str(tmp_path / "data.json")]) == 0
    out = capsys.readouterr().out
    assert "9 records: 9 with an image, 0 of text alone, 0 bad" in out and "1 in 9" in out and "64 x 64 (9)" in out
    assert "an image takes 19: least 4" in out
    assert f"next: python train.py encoder --data {tmp_path}/data.json --images {tmp_path}\n" in out
    file = tmp_path / "data.json"
    records = json.loads(file.read_text())
    records[2]["image"] = "gone.png"
    (tmp_path / records[4]["image"]).write_text("no image")
    records[6]["conversations"] *= 2
    records[7] = dict(id="t", conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])
    records.append(7)
    file.write_text(json.dumps(records))
    assert check.main([str(file)]) == 1
    out, err = capsys.readouterr()
    assert "10 records: 5 with an image, 1 of text alone, 4 bad" in out
    for place, why in ((2, "gone.png not found"), (4, "not an image that Pillow can read"),
                       (6, 'one "<image>" at most'), (9, '"conversations"')):
        [line] = [line for line in err.splitlines() if f"record {place} " in line]
        assert "skipped: " in line and why in line
    found = check.check(file, tmp_path, smollm_tokenizer, 19, max_length=60)
    good = LlavaRecords(file, tmp_path, on_bad="skip")
    by_hand = [len(smollm_tokenizer.chat_targets(s.messages)[0]) + (18 if s.image else 0) for s in good]
    assert good.places[3] == 4                  # the damaged image, in whose place a run shows the next
    assert found["tokens"] == by_hand[:3] + by_hand[4:] and found["texts"] == 1 and len(found["tokens"]) == 6
    assert found["cut"] == sum(n > 60 for n in found["tokens"]) > 0
    found = check.check(file, tmp_path, smollm_tokenizer, n_visual=60, max_length=60)
    assert found["pictured"] == 0 and sum("lies beyond max_length=60" in e for e in found["errors"].values()) == 5

"""data.py: the world, image preprocessing against transformers, LLaVA records, batches."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import HELD_OUT, KNOWLEDGE_TASKS, QUESTIONS, TRAINED_TASKS, collate, load_llava, open_image, preprocess, world
from tokenizer import IMAGE

TASKS = TRAINED_TASKS + KNOWLEDGE_TASKS


def combination(sample):
    """("red", "circle") from "a red circle"; None for a sign."""
    return None if "sign" in sample.caption else tuple(sample.caption.split()[1:])


# ---- the world ------------------------------------------------------------------------------------------------------


def test_world_is_deterministic_and_streams_differ():
    for task in TASKS:
        a, b = world(task, 5), world(task, 5)
        assert a.image.tobytes() == b.image.tobytes() and a.messages == b.messages and a.options == b.options
        assert a.image.size == (64, 64) and a.image.mode == "RGB"
    images = [
        world(task, i, seed, split).image.tobytes()
        for task in TASKS for i in range(15) for seed in (0, 1) for split in ("train", "test")
    ]  # fmt: skip
    assert len(set(images)) == len(images)  # no image twice: over tasks, indices, seeds and splits


def test_held_out_combinations():
    assert len(HELD_OUT) == 13
    train = {combination(world(task, i)) for task in ("describe", "color", "shape") for i in range(400)} - {None}
    assert train == {(c, s) for c in data.COLORS for s in data.SHAPES} - HELD_OUT  # all others, and none of these
    assert {c for c, _ in train} == set(data.COLORS) and {s for _, s in train} == set(data.SHAPES)
    test = [combination(world("color", i, split="test")) in HELD_OUT for i in range(400)]
    assert 160 < sum(test) < 240


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_samples(task, split):
    positions = set()
    for i in range(150):
        s = world(task, i, split=split)
        assert s.options.count(s.answer) == 1 and len(set(s.options)) == len(s.options)
        assert len(s.options) == {"color": 8, "shape": 8, "class": 5}.get(task, 10)
        positions.add(s.options.index(s.answer))
        assert [m["role"] for m in s.messages] == ["user", "assistant"] and s.messages[1]["content"] == s.answer
        assert s.messages[0]["content"].count("<image>") == 1
        if split == "test":
            assert s.messages[0]["content"] == data.wrap(QUESTIONS[task][0])
    assert positions == set(range(len(s.options)))


def test_answers_agree_with_captions():
    for i in range(60):
        color, shape, read = (world(task, i) for task in ("color", "shape", "read"))
        assert color.caption.split()[1] in color.answer and shape.caption.split()[2] in shape.answer
        assert read.caption.split()[-1] in read.answer and read.caption.startswith("a sign with the word ")
        capital, animal, describe = (world(task, i) for task in ("capital", "class", "describe"))
        country, beast = capital.caption.split()[-1], animal.caption.split()[-1]
        assert data.CAPITALS[country] in capital.answer
        assert [c for c in data.CLASSES if beast in data.CLASSES[c] and c in animal.answer]
        for word, sample in ((country, capital), (beast, animal)):  # the answer is nowhere in the image
            assert word not in " ".join(sample.options)
        assert describe.answer.lower() == describe.caption.lower() + "." and describe.answer.startswith("A")
    words = [w for group in data.WORDS.values() for w in group]
    assert len(words) == len(set(words)) and max(map(len, words)) <= 9 and "an orange" in data._a("orange", "star")


def test_the_image_shows_the_answer():
    """The color of most pixels that are far from grey is nearest to the true one; every sign has contrast."""
    for i in range(40):
        s = world("color", i)
        pixels = np.asarray(s.image, np.int32).reshape(-1, 3)
        vivid = pixels[np.ptp(pixels, axis=1) > 60]
        distance = [((np.median(vivid, axis=0) - c) ** 2).sum() for c in data.COLORS.values()]
        assert list(data.COLORS)[int(np.argmin(distance))] == combination(s)[0]
    for word in [w for group in data.WORDS.values() for w in group]:
        grey = np.asarray(data.draw_sign(random.Random(word), word).convert("L"), np.int32)
        assert grey.max() - grey.min() > 120


def test_world_bad_arguments():
    with pytest.raises(ValueError, match="unknown task 'colour'"):
        world("colour", 0)
    with pytest.raises(ValueError, match="unknown split"):
        world("color", 0, split="val")


def test_wrap():
    assert data.wrap("What is it?") == "Based on the visual elements captured in this image of<image>, what is it?"
    rng = random.Random(0)
    drawn = {data.wrap("What is it?", rng) for _ in range(200)}
    assert len(drawn) == len(data.OPENINGS)
    assert all(d.count("<image>") == 1 and d.endswith("what is it?") for d in drawn)


# ---- images ---------------------------------------------------------------------------------------------------------


def noise(w, h):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8))


def test_preprocess_equals_clip_image_processor():
    from transformers.models.clip import CLIPImageProcessorPil

    sizes = [(64, 64), (336, 336), (500, 300), (123, 457), (1, 90), (90, 1), (1, 1), (40, 33), (337, 336)]
    for size in (64, 336):
        clip = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        for w, h in sizes:
            image = noise(w, h)
            side = max(w, h)
            square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in clip.image_mean))
            square.paste(image, ((side - w) // 2, (side - h) // 2))
            expected = torch.from_numpy(np.array(clip(square)["pixel_values"][0]))
            got = preprocess(image, size)
            assert got.shape == (3, size, size) and got.dtype == torch.float32
            assert (got - expected).abs().max() <= 1e-6, (size, w, h)


def test_open_image_converts_modes(tmp_path):
    rgb = noise(20, 10)
    rgb.save(tmp_path / "a.png")
    assert np.array_equal(open_image(tmp_path / "a.png"), rgb)
    for mode in ("L", "P", "1", "CMYK", "YCbCr", "RGBA", "LA"):
        out = open_image(rgb.convert("L").convert(mode) if mode in ("1", "LA") else rgb.convert(mode))
        assert out.mode == "RGB" and out.size == (20, 10)
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))  # red, but fully transparent: white
    assert open_image(hidden).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0])
    palette.info["transparency"] = 0
    assert open_image(palette).getpixel((0, 0)) == (255, 255, 255)
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "deep.png"))[..., 0], (ramp / 257).round())
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    rgb.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (10, 20)


def test_open_image_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.png"):
        open_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "."):
        with pytest.raises(ValueError, match="not an image"):
            open_image(tmp_path / name)
    for kind in ("png", "jpg"):
        noise(80, 80).save(tmp_path / f"whole.{kind}")
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged or truncated"):
            open_image(tmp_path / f"cut.{kind}")
    for w, h in ((20_000, 1), (8_001, 8_000)):
        Image.new("1", (w, h)).save(tmp_path / "large.png")
        with pytest.raises(ValueError, match="scale or crop") as error:
            open_image(tmp_path / "large.png")
        assert "\n" not in str(error.value)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # Pillow itself refuses to open this one
    with pytest.raises(ValueError, match="megapixels"):
        open_image(tmp_path / "bomb.png")


# ---- LLaVA ----------------------------------------------------------------------------------------------------------


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def llava(tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")

    def load(records, **kwargs):
        text = records if isinstance(records, str) else json.dumps(records)
        (tmp_path / "data.json").write_text(text)
        return load_llava(tmp_path / "data.json", tmp_path, **kwargs)

    return load


def test_llava_records(llava):
    opening = data.OPENINGS[0]
    records = llava([
        {"id": "1", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "Noise.", "And now?", "Still.")},
        {"id": "2", "image": "a.png", "conversations": turns("What is it?\n<image>", "Noise.")},
        {"id": "3", "conversations": turns("Who are you?", "A model.")},
    ], seed=None)  # fmt: skip
    assert len(records) == 3 and len(list(records)) == 3
    first, second, third = records
    assert first.image.size == (30, 20) and first.answer == "Still." and first.caption == "Noise."
    assert [m["content"] for m in first.messages] == [opening + "what is it?", "Noise.", "And now?", "Still."]
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert second.messages[0]["content"] == opening + "what is it?"
    assert third.image is None and third.messages[0]["content"] == "Who are you?"
    assert records[-1].messages == third.messages
    many = [{"id": i, "image": "a.png", "conversations": turns("<image>\nWhat?", "It.")} for i in range(60)]
    drawn = [s.messages[0]["content"] for s in llava(many, seed=3)]
    assert len(set(drawn)) > 3 and drawn == [s.messages[0]["content"] for s in llava(many, seed=3)]


GOOD = {"id": "ok", "conversations": turns("Hi", "Hello")}


@pytest.mark.parametrize("record, message", [
    ({"id": "x", "conversations": turns("<image>\nWhat?", "It.")}, 'names no "image"'),
    ({"id": "x", "image": "gone.png", "conversations": turns("<image>\nWhat?", "It.")}, "gone.png not found"),
    ({"id": "x", "image": ["a.png"] * 2, "conversations": turns("<image>\nWhat?", "It.")}, "must be one file name"),
    ({"id": "x", "image": "a.png", "conversations": turns("<image><image>\nWhat?", "It.")}, "in the first turn"),
    ({"id": "x", "image": "a.png", "conversations": turns("A", "B", "<image>\nC", "D")}, "in the first turn"),
    ({"id": "x", "conversations": turns("A", "B")[::-1]}, "human first"),
    ({"id": "x", "conversations": turns("A", "B", "C")}, "ends with a human turn"),
    ({"id": "x", "image": "a.png", "conversations": turns("<image>\n", "B")}, "turn 0 has no text"),
    ({"id": "x", "conversations": turns("A", " ")}, "turn 1 has no text"),
    ({"id": "x", "conversations": [{"from": "robot", "value": "A"}]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": ["A", "B"]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": []}, '"conversations"'),
    ({"id": "x"}, '"conversations"'),
])  # fmt: skip
def test_llava_bad_record_is_named(llava, record, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        llava([GOOD, record])
    text = str(error.value)
    assert message in text and "data.json: record 1 (id 'x')" in text and "\n" not in text


def test_llava_bad_files(llava, tmp_path):
    for text in ("[{", "", '{"id": 1}\n{"id": 2}'):
        with pytest.raises(ValueError, match="data.json: not valid JSON"):
            llava(text)
    for text in ("{}", "[]", "3"):
        with pytest.raises(ValueError, match="data.json: expected a non-empty JSON list"):
            llava(text)
    with pytest.raises(ValueError, match="record 0"):
        llava("[7]")
    with pytest.raises(FileNotFoundError, match="none.json"):
        load_llava(tmp_path / "none.json", tmp_path)
    records = llava([GOOD, {"id": "x", "image": "bad.png", "conversations": turns("<image>\nA", "B")}])
    with pytest.raises(ValueError, match=r"record 1 \(id 'x'\): .*bad.png: not an image"):
        records[1]


# ---- batches --------------------------------------------------------------------------------------------------------


class LetterTokenizer:
    """One token a letter; a turn is role letter, text, "." as in a chat format: 1 special, 2 answer, 0 nothing."""

    pad = 0

    def chat_targets(self, messages):
        ids, kinds = [], []
        for m in messages:
            answer = m["role"] == "assistant"
            text = m["content"].replace("<image>", "#")
            ids += [ord("A" if answer else "U")] + [IMAGE if c == "#" else ord(c) for c in text] + [ord(".")]
            kinds += [1] + [2 * answer] * len(text) + [2 if answer else 1]
        return ids, kinds


def chat(user, assistant, image=None):
    return data.Sample(image, [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


def test_collate_by_hand():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (8, 4), "blue")
    samples = [chat("a<image>b", "xy", red), chat("c", "z"), chat("<image>", "z", blue)]
    batch = collate(samples, LetterTokenizer(), n_visual=3)
    I, o = IMAGE, ord
    tokens = [
        [o("U"), o("a"), I, I, I, o("b"), o("."), o("A"), o("x"), o("y"), o(".")],
        [o("U"), o("c"), o("."), o("A"), o("z"), o("."), 0, 0, 0, 0, 0],
        [o("U"), I, I, I, o("."), o("A"), o("z"), o("."), 0, 0, 0],
    ]
    n = -100
    special = [
        [n, n, n, n, n, o("."), o("A"), o("x"), o("y"), o("."), n],
        [n, o("."), o("A"), o("z"), o("."), n, n, n, n, n, n],
        [n, n, n, o("."), o("A"), o("z"), o("."), n, n, n, n],
    ]
    answers = [
        [n, n, n, n, n, n, n, o("x"), o("y"), o("."), n],
        [n, n, n, o("z"), o("."), n, n, n, n, n, n],
        [n, n, n, n, n, o("z"), o("."), n, n, n, n],
    ]
    assert batch["tokens"].tolist() == tokens and batch["targets"].tolist() == special
    assert batch["tokens"].dtype == batch["targets"].dtype == batch["lengths"].dtype == torch.int64
    assert batch["lengths"].tolist() == [11, 6, 8]
    assert torch.equal(batch["pixels"], torch.stack([preprocess(red, 64), preprocess(blue, 64)]))
    assert collate(samples, LetterTokenizer(), 3, loss_on="answers")["targets"].tolist() == answers

    cut = collate(samples, LetterTokenizer(), 3, max_length=8)
    assert cut["tokens"].tolist() == [row[:8] for row in tokens] and cut["lengths"].tolist() == [8, 6, 8]
    assert cut["targets"].tolist() == [row[:8] for row in special]
    with pytest.raises(ValueError, match="sample 0: max_length 4 would cut the image; it needs 5"):
        collate(samples, LetterTokenizer(), 3, max_length=4)
    assert collate(samples[1:2], LetterTokenizer(), 3)["pixels"] is None


def test_collate_bad_arguments():
    for sample in (chat("a<image>", "b"), chat("a", "b", noise(4, 4)), chat("<image><image>", "b", noise(4, 4))):
        with pytest.raises(ValueError, match='sample 0: . times "<image>"'):
            collate([sample], LetterTokenizer(), 3)
    with pytest.raises(ValueError, match="unknown loss_on"):
        collate([chat("a", "b")], LetterTokenizer(), 3, loss_on="all")

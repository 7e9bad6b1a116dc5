"""data/: the world, image preprocessing against transformers, LLaVA records, batches."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from cli import MissingFile, UserError
from data import batches, drawing, world
from data.batches import collate, evenly_spaced, shuffled_index, wrap
from data.images import open_image, preprocess
from data.llava import LlavaRecords
from data.world import FACTS, HELD_OUT, KNOWLEDGE_TASKS, QUESTIONS, TRAINED_TASKS, WORDS, caption, is_right, knowledge
from formats import checkpoints
from formats.tokenizer import IMAGE

TASKS = TRAINED_TASKS + KNOWLEDGE_TASKS


def combination(sample):
    """("red", "circle") from "a red circle"; None for a sign or a flag."""
    first, *words = sample.caption.split()
    return tuple(words) if first in ("a", "an") and len(words) == 2 else None


# ---- the world ------------------------------------------------------------------------------------------------------


def test_world_is_deterministic_and_streams_differ():
    for task in (*TASKS, "instruct"):
        a, b = world.world(task, 5), world.world(task, 5)
        assert a.image.tobytes() == b.image.tobytes() and a.messages == b.messages and a.options == b.options
        assert a.image.size == (64, 64) and a.image.mode == "RGB"
    images = [
        world.world(task, i, seed, split).image.tobytes()
        for task in TASKS for i in range(15) for seed in (0, 1) for split in ("train", "test")
    ]  # fmt: skip
    assert len(set(images)) == len(images)  # no image twice: over tasks, indices, seeds and splits


def test_held_out_combinations():
    assert len(HELD_OUT) == 13
    train = {combination(world.world(task, i)) for task in ("describe", "color", "shape") for i in range(400)} - {None}
    assert train == {(c, s) for c in drawing.COLORS for s in drawing.SHAPES} - HELD_OUT  # all others, none of these
    assert {c for c, _ in train} == set(drawing.COLORS) and {s for _, s in train} == set(drawing.SHAPES)
    test = [combination(world.world("color", i, split="test")) in HELD_OUT for i in range(400)]
    assert 160 < sum(test) < 240


def test_what_no_training_names():
    """Words and flags of UNTAUGHT are in no picture, question or answer of training, and have a test of their own."""
    samples = [world.World(3)[i] for i in range(1000)]
    said = [" ".join([s.caption, *(m["content"] for m in s.messages)]) for s in samples]
    assert not [w for w in world.UNTAUGHT if any(world.has_word(text, w) for text in said)]
    for file in ("instructions.json", "chats.json"):
        text = (checkpoints.ROOT / "assets" / file).read_text(encoding="utf-8")
        assert not [w for w in world.UNTAUGHT if world.has_word(text, w)], file
    tasks = ("read", "flag", "describe", *KNOWLEDGE_TASKS)
    asked = [world.world(t, i, 1, "untaught") for t in tasks for i in range(60)]
    assert {s.caption for s in asked} == {caption(s) for s in world.UNTAUGHT_SUBJECTS}
    assert len(world.UNTAUGHT_SUBJECTS) == 14
    with pytest.raises(UserError, match="no color is untaught"):
        world.world("color", 0, 0, "untaught")


def test_restyled_pictures_are_drawn_as_no_training_draws():
    small = [np.asarray(world.world("shape", i, 1, "restyled").image.convert("L"), float) for i in range(20)]
    usual = [np.asarray(world.world("shape", i, 1, "test").image.convert("L"), float) for i in range(20)]
    inked = lambda images: np.mean([(abs(x - np.median(x)) > 40).mean() for x in images])
    assert inked(small) < 0.5 * inked(usual)
    assert not set(drawing.OTHER_FONTS) & set(drawing.FONTS)


def questions_of(task, sample, split):
    if task in KNOWLEDGE_TASKS:
        return world.KNOWLEDGE_QUESTIONS[task]["flag" in sample.caption]
    return QUESTIONS[task][split == "test"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_samples(task, split):
    positions, asked, possible = set(), set(), set()
    for i in range(150):
        s = world.world(task, i, split=split)
        assert s.task == task and s.options.count(s.answer) == 1 and len(set(s.options)) == len(s.options)
        assert len(s.options) == {"color": 8, "shape": 8, "continent": 4}.get(task, 10)
        positions.add(s.options.index(s.answer))
        assert [m["role"] for m in s.messages] == ["user", "assistant"] and s.messages[1]["content"] == s.answer
        assert s.messages[0]["content"].count("<image>") == 1
        question = s.messages[0]["content"].split("<image>")[1]
        found = [q for q in questions_of(task, s, split) if question.endswith(q[0].lower() + q[1:])]
        assert len(found) == 1
        asked.add(found[0])
        possible.update(questions_of(task, s, split))
        if split == "test":
            assert s.messages[0]["content"] == wrap(found[0])
    assert positions == set(range(len(s.options))) and asked == possible


def test_questions_of_the_test_are_never_trained():
    for trained, test in QUESTIONS.values():
        assert not set(trained) & set(test)


def test_answers_agree_with_captions():
    for i in range(60):
        color, shape, read, flag = (world.world(task, i) for task in ("color", "shape", "read", "flag"))
        assert color.caption.split()[-2] in color.answer and shape.caption.split()[-1] in shape.answer
        assert read.caption.split()[-1] in read.answer and read.caption.startswith("a sign with the word ")
        assert flag.caption.startswith("the flag of ") and flag.caption.removeprefix("the flag of ") in flag.answer
        describe = world.world("describe", i, split="test")
        assert describe.answer.lower() == describe.caption.lower() + "." and describe.answer[0] in "AT"
        for task in KNOWLEDGE_TASKS:
            s = world.world(task, i)
            country = next(c for c in FACTS if s.caption.endswith(c))
            assert s.caption in (caption(("sign", country)), caption(("flag", country)))
            assert knowledge(task, country)[0] in s.answer
            # the answer is nowhere in the image; "Panama City" and "Kuwait City" say their country
            assert country in ("Panama", "Kuwait") or not world.has_word(" ".join(s.options), country)
    words = [w for group in WORDS.values() for w in group]
    assert len(words) == len(set(words)) and max(map(len, words)) <= 9 and "an orange" in world._a("orange", "star")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_said_freely_is_judged(task):
    """The answer itself is right; each other option, an answer that also names a rival, and silence are not."""
    for i in range(60):
        s = world.world(task, i, split="test")
        assert is_right(s.answer, s) and is_right(f"I think: {s.answer.upper()}", s) and not is_right("", s)
        assert [o for o in s.options if is_right(o, s)] == [s.answer]
        assert not is_right(f"{s.answer} Or {s.rivals[0]}?", s)


def test_countries_have_facts_and_flags_of_their_own():
    assert set(FACTS) == {*drawing.FLAGS, *WORDS["country"]}
    assert len({drawing.flag(c).tobytes() for c in drawing.FLAGS}) == len(drawing.FLAGS)


def test_instructions(monkeypatch, tmp_path):
    """They are found from any folder, and are about what training may show."""
    monkeypatch.chdir(tmp_path)
    world.instructions.cache_clear()
    written = world.instructions()
    assert len(written) > 500 and {s for s, _, _ in written} <= set(world.TRAINED_SUBJECTS)
    s = world.world("instruct", 3)
    assert (s.messages[1]["content"], s.answer, s.options) == (s.answer, s.answer, [])
    subject, question, _ = next(w for w in written if w[2] == s.answer and caption(w[0]) == s.caption)
    assert s.messages[0]["content"].endswith(question[0].lower() + question[1:]) and caption(subject) == s.caption


def test_instructions_tell_nothing_that_is_asked_after_grafting():
    """The shipped file: no capital, language or continent of any country, nor a word about these topics."""
    names = {w for c in FACTS for task in world.KNOWLEDGE_TASKS for w in world.knowledge(task, c)}
    topics = {"capital", "capitals", "language", "languages", "continent", "continents", "speak", "spoken", "African",
              "Asian", "European", "American", "America"}
    for subject, question, answer in world.instructions():
        for word in names | topics:
            assert not world.has_word(f"{question} {answer}", word), (subject, question, answer)


def color_of(image, light=(1.0,)):
    """The color that most pixels far from grey are nearest to, seen in any of these lights."""
    pixels = np.asarray(image, np.int32).reshape(-1, 3)
    vivid = np.median(pixels[np.ptp(pixels, axis=1) > 60], axis=0)
    distance = lambda color: min(((vivid - x * np.array(drawing.COLORS[color])) ** 2).sum() for x in light)
    return min(drawing.COLORS, key=distance)


def test_the_image_shows_the_answer():
    """As drawn, and as a camera sees it in more or less light; every sign has contrast."""
    for i, color in enumerate([*drawing.COLORS] * 5):
        shape = list(drawing.SHAPES)[i % 7]
        assert color_of(drawing.draw_shape(random.Random(i), color, shape)) == color
        s = world.world("color", i)
        assert color_of(s.image, np.linspace(0.7, 1.1, 9)) == combination(s)[0]
    for word in [w for group in WORDS.values() for w in group]:
        grey = np.asarray(drawing.draw_sign(random.Random(word), word).convert("L"), np.int32)
        assert grey.max() - grey.min() > 120


def test_world_bad_arguments():
    with pytest.raises(UserError, match="unknown task 'colour'"):
        world.world("colour", 0)
    with pytest.raises(UserError, match="unknown split"):
        world.world("color", 0, split="val")


def test_wrap():
    assert wrap("What is it?") == "Based on the visual elements captured in this image of<image>, what is it?"
    rng = random.Random(0)
    drawn = {wrap("What is it?", rng) for _ in range(200)}
    assert len(drawn) == len(batches.OPENINGS)
    assert all(d.count("<image>") == 1 and d.endswith("what is it?") for d in drawn)


# ---- images ---------------------------------------------------------------------------------------------------------


def noise(w, h):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), np.uint8))


def test_preprocess_equals_clip_image_processor():
    from transformers.models.clip import CLIPImageProcessorPil

    sizes = [(64, 64), (336, 336), (500, 300), (123, 457), (1, 90), (90, 1), (1, 1), (40, 33), (337, 336)]
    for size in (64, 224, 336):
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
    with pytest.raises(MissingFile, match="gone.png"):
        open_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text.png", "empty.png", "."):
        with pytest.raises(UserError, match="not an image"):
            open_image(tmp_path / name)
    for kind in ("png", "jpg"):
        noise(80, 80).save(tmp_path / f"whole.{kind}")
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="damaged or truncated"):
            open_image(tmp_path / f"cut.{kind}")
    for w, h in ((20_000, 1), (8_001, 8_000)):
        Image.new("1", (w, h)).save(tmp_path / "large.png")
        with pytest.raises(UserError, match="scale or crop") as error:
            open_image(tmp_path / "large.png")
        assert "\n" not in str(error.value)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # Pillow itself refuses to open this one
    with pytest.raises(UserError, match="megapixels"):
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
        return LlavaRecords(tmp_path / "data.json", tmp_path, **kwargs)

    return load


def test_llava_records(llava):
    opening = batches.OPENINGS[0]
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
    ({"id": "x", "conversations": turns("", "B")}, "turn 0 has no text"),
    ({"id": "x", "conversations": turns("A", " ")}, "turn 1 has no text"),
    ({"id": "x", "conversations": [{"from": "robot", "value": "A"}]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": [{"from": "human", "value": 3}]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": ["A", "B"]}, '"human" or "gpt"'),
    ({"id": "x", "conversations": []}, '"conversations"'),
    ({"id": "x"}, '"conversations"'),
])  # fmt: skip
def test_llava_bad_record_is_named(llava, record, message):
    with pytest.raises(UserError) as error:
        llava([GOOD, record])
    text = str(error.value)
    assert message in text and "data.json: record 1 (id 'x')" in text and "\n" not in text
    records = llava([GOOD, record, GOOD | {"id": 3}], on_bad="skip")
    assert records.errors == {1: text} and [s.answer for s in records] == ["Hello", "Hello"]
    with pytest.raises(UserError, match="all 2 records are bad; the first: .*record 0"):
        llava([record, record], on_bad="skip")


def test_llava_bad_files(llava, tmp_path):
    for text in ("[{", "", '{"id": 1}\n{"id": 2}', "[" * 10**5, "[" + "1" * 5000 + "]"):
        with pytest.raises(UserError, match="data.json: not valid JSON"):
            llava(text)
    for text in ("{}", "[]", "3"):
        with pytest.raises(UserError, match="data.json.* list"):
            llava(text)
    with pytest.raises(MissingFile, match="none.json"):
        LlavaRecords(tmp_path / "none.json", tmp_path)
    with pytest.raises(UserError, match="unknown on_bad"):
        llava([GOOD], on_bad="ignore")
    with pytest.raises(UserError, match="record 0"):
        llava("[7]")


def about(image, i=0):
    return {"id": i, "image": image, "conversations": turns(f"<image>\nWhat is {image}?", f"It is {image}.")}


def test_llava_as_distributed(llava, tmp_path):
    """The folders, fields and ids of LLaVA-1.5-665K; a file of text alone needs no image folder."""
    paths = ["coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/0123.jpg",
             "textvqa/train_images/a1.jpg", "vg/VG_100K_2/7.jpg"]  # fmt: skip
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True)
        noise(12, 9).save(tmp_path / path)
    talk = [{"id": f"wN_{i}", "model": "", "conversations": turns("Hi", "Hello", "And?", "Bye")} for i in range(2)]
    records = llava([talk[0], *map(about, paths, ["000000033471", 2354786, 0, "a1", "b"]), talk[1]])
    assert records.pictured == [1, 2, 3, 4, 5] and records.texts == [0, 6] and not records.errors
    assert [s.image.size if s.image else None for s in records] == [None, *[(12, 9)] * 5, None]
    for load in (lambda: llava(talk), lambda: LlavaRecords(tmp_path / "data.json")):
        texts = load()
        assert texts.texts == [0, 1] and texts.pictured == [] and texts[1].answer == "Bye"
    with pytest.raises(MissingFile, match="nowhere: no such image folder"):
        (tmp_path / "data.json").write_text(json.dumps([talk[0], about(paths[0])]))
        LlavaRecords(tmp_path / "data.json", tmp_path / "nowhere", on_bad="skip")


@pytest.mark.parametrize("name, color", [
    ("cmyk.jpg", (200, 50, 50)), ("cmyk.tif", (200, 50, 50)), ("palette.png", (200, 50, 50)),
    ("1x1.png", (200, 50, 50)), ("alpha.png", (227, 153, 153)), ("16-bit.png", (100,) * 3), ("16-bit.tif", (100,) * 3),
])  # fmt: skip
def test_unusual_images_are_valid(llava, tmp_path, name, color):
    kind, size = name.split(".")[0], (1, 1) if name == "1x1.png" else (6, 6)
    image = Image.new("RGB", size, (200, 50, 50))
    if kind == "16-bit":
        image = Image.fromarray(np.full(size, 257 * 100, np.uint16))
    elif kind == "alpha":  # half transparent: half white
        image = Image.new("RGBA", size, (200, 50, 50, 128))
    elif kind in ("cmyk", "palette"):
        image = image.convert("CMYK") if kind == "cmyk" else image.quantize(4)
    image.save(tmp_path / name)
    records = llava([about(name)], on_bad="skip")
    mode = Image.open(tmp_path / name).mode
    assert mode == {"cmyk": "CMYK", "palette": "P", "alpha": "RGBA", "16-bit": "I;16"}.get(kind, "RGB")
    pixels = preprocess(records[0].image, 32)
    expected = preprocess(Image.new("RGB", (32, 32), color), 32)
    assert pixels.shape == (3, 32, 32) and not records.errors
    assert (pixels - expected).abs().max() < 0.04  # two of 255 steps


@pytest.fixture
def bad_images(tmp_path):
    """Damage that shows only when an image is opened."""
    for kind in ("png", "jpg"):
        noise(80, 80).save(tmp_path / f"cut.{kind}")
        whole = (tmp_path / f"cut.{kind}").read_bytes()
        (tmp_path / f"cut.{kind}").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 3)).save(tmp_path / "wide.png")
    return {"cut.png": "truncated", "cut.jpg": "truncated", "wide.png": "20000 x 3 pixels", "bad.png": "not an image"}


def test_bad_image_stops(llava, bad_images):
    for name, word in bad_images.items():
        records = llava([GOOD, about(name, 7), about("a.png")])
        with pytest.raises(UserError, match=rf"data.json: record 1 \(id 7\): .*{name}.*{word}"):
            records[1]
        assert records[0].answer == "Hello" and records[2].image and not records.errors


def test_bad_image_is_replaced_by_the_next(llava, bad_images, tmp_path):
    noise(9, 9).save(tmp_path / "b.png")
    broken = [about(name, i) for i, name in enumerate(bad_images)]
    file = [GOOD, broken[0], GOOD, {"id": "x"}, broken[1], about("a.png"), about("b.png"), *broken[2:], GOOD]
    load = lambda: llava(file, on_bad="skip", seed=5)
    records = load()  # from here on without {"id": "x"}
    assert records.pictured == [1, 3, 4, 5, 6, 7] and records.texts == [0, 2, 8] and len(records.errors) == 1
    shown = lambda records, i: (records[i].messages, records[i].image and records[i].image.tobytes())
    seen = [shown(records, i) for i in range(9)]
    a, b = seen[4], seen[5]
    assert "a.png" in str(a) and "b.png" in str(b)
    assert [seen[i] for i in records.pictured] == [a, a, a, b, a, a]  # next image, never a text; around the end
    assert [records[i].answer for i in records.texts] == ["Hello"] * 3
    other = load()  # whatever was opened before, in whatever order: the same sample
    assert [shown(other, i) for i in reversed(range(9))] == seen[::-1]
    # every bad record once, with the text of the error that "stop" raises
    assert len(records.errors) == 5 and other.errors == records.errors
    repaired = llava([record if "conversations" in record else GOOD for record in file], seed=5)
    for place, name in ((1, "cut.png"), (4, "cut.jpg"), (7, "wide.png"), (8, "bad.png")):
        with pytest.raises(UserError, match=f"record {place} .*{name}") as error:
            repaired[place]
        assert records.errors[place] == str(error.value) and "\n" not in str(error.value)
    assert shown(repaired, 5) == a  # a skipped record leaves the openings of the others as they were

    (tmp_path / "a.png").unlink()  # gone since the file was loaded
    assert shown(records, 4) == b and "a.png not found" in [*records.errors.values()][-1]
    hopeless = llava([GOOD, *broken], on_bad="skip")
    with pytest.raises(UserError, match="none of its images can be opened; the last: .*record 1"):
        hopeless[2]
    assert len(hopeless.errors) == 4 and hopeless[0].answer == "Hello"


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_images, n_texts", [(624, 41), (5, 5), (3, 8), (1, 6), (4, 0), (0, 4), (665, 500)])
def test_evenly_spaced(n_images, n_texts):
    n = n_images + n_texts
    walk = [evenly_spaced(i, n_images, n_texts) for i in range(3 * n)]
    for kind, count in (("image", n_images), ("text", n_texts)):
        assert [number for k, number in walk if k == kind] == list(range(3 * count))
        assert sum(k == kind for k, _ in walk[n : 2 * n]) == count  # every epoch holds the whole source
    texts = np.cumsum([0] + [kind == "text" for kind, _ in walk])
    for w in (1, 2, 7, n // 2, n):
        assert np.abs(texts[w:] - texts[:-w] - w * n_texts / n).max() < 1 + 1e-9  # any window: the share, to within 1
    far = 10**15 * n  # no drift, no walk from the start
    assert evenly_spaced(far + 3, n_images, n_texts)[0] == walk[3][0]


def test_evenly_spaced_needs_a_source():
    with pytest.raises(UserError, match="0 images and 0 texts"):
        evenly_spaced(0, 0, 0)


def test_shuffled_index_shows_every_record_once_an_epoch():
    walk = [shuffled_index(i, 7, seed=0) for i in range(21)]
    epochs = [walk[:7], walk[7:14], walk[14:]]
    assert all(sorted(e) == list(range(7)) for e in epochs) and len({tuple(e) for e in epochs}) == 3
    batches._order.cache_clear()
    assert walk[5:12] == [shuffled_index(i, 7, seed=0) for i in range(5, 12)]  # a resumed run sees the same
    assert walk != [shuffled_index(i, 7, seed=1) for i in range(21)]
    order = list(range(7))  # written out: another order would break the resuming of older runs
    random.Random("order/0/1").shuffle(order)
    assert epochs[1] == order


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
    return batches.Sample(image, [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}])


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
    with pytest.raises(UserError, match="sample 0: max_length 4 would cut the image; it needs 5"):
        collate(samples, LetterTokenizer(), 3, max_length=4)
    assert collate(samples[1:2], LetterTokenizer(), 3)["pixels"] is None


def test_collate_at_the_paper_s_length():
    """4096 tokens with 579 visual ones; where the question fills them, nothing is left to learn, and that is fine."""
    red = Image.new("RGB", (5, 5), "red")
    samples = [chat("a<image>b", "x" * 5000, red), chat("<image>" + "q" * 4500, "y", red), chat("q" * 4500, "y")]
    batch = collate(samples, LetterTokenizer(), n_visual=579, size=14, loss_on="answers", max_length=4096)
    assert batch["tokens"].shape == (3, 4096) and batch["lengths"].tolist() == [4096] * 3
    assert (batch["tokens"] == IMAGE).sum(1).tolist() == [579, 579, 0] and len(batch["pixels"]) == 2
    n_before = 1 + 1 + 579 + 1 + 1  # U a <image> b .
    assert (batch["targets"] != -100).sum(1).tolist() == [4096 - n_before, 0, 0]
    alone = collate(samples[1:2], LetterTokenizer(), 579, 14, "answers", max_length=580)  # the image just fits
    assert alone["tokens"].tolist() == [[ord("U")] + [IMAGE] * 579] and (alone["targets"] == -100).all()
    with pytest.raises(UserError, match="sample 0: max_length 579 would cut the image; it needs 580"):
        collate(samples[1:2], LetterTokenizer(), 579, 14, max_length=579)


def test_collate_bad_arguments():
    for sample in (chat("a<image>", "b"), chat("a", "b", noise(4, 4)), chat("<image><image>", "b", noise(4, 4))):
        with pytest.raises(UserError, match='sample 0: . times "<image>"'):
            collate([sample], LetterTokenizer(), 3)
    with pytest.raises(UserError, match="unknown loss_on"):
        collate([chat("a", "b")], LetterTokenizer(), 3, loss_on="all")

"""data/: the world, image preprocessing against transformers, LLaVA records, batches."""
import hashlib
import io
import json
import random

import numpy as np
import pytest
import torch
from conftest import refuses
from PIL import Image

from cli import MissingFile, UserError
from data import batches, drawing, world
from data.batches import collate, evenly_spaced, pad, shuffled_index, wrap
from data.images import open_image, preprocess
from data.llava import LlavaRecords
from data.world import FACTS, HELD_OUT, KNOWLEDGE_TASKS, QUESTIONS, TRAINED_TASKS, WORDS, caption, is_right, knowledge
from extras import instructions
from formats import checkpoints
from formats.tokenizer import IMAGE

TASKS = TRAINED_TASKS + KNOWLEDGE_TASKS
ALL_WORDS = sum(WORDS.values(), [])


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
    samples = [world.world(task, i, seed, split)
               for task in TASKS for i in range(15) for seed in (0, 1) for split in ("train", "test")]
    assert len({s.image.tobytes() for s in samples}) == len(samples)    # over tasks, indices, seeds and splits
    said = hashlib.sha256(json.dumps([[s.caption, s.options, *s.messages] for s in samples]).encode()).hexdigest()
    assert said.startswith("5120e06bf17ba551"), "world.toml, or its order, is not what the shipped encoder has learnt"


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


def test_restyled_pictures_are_drawn_as_no_training_draws():
    small = [np.asarray(world.world("shape", i, 1, "restyled").image.convert("L"), float) for i in range(20)]
    usual = [np.asarray(world.world("shape", i, 1, "test").image.convert("L"), float) for i in range(20)]
    inked = lambda images: np.mean([(abs(x - np.median(x)) > 40).mean() for x in images])
    assert inked(small) < 0.5 * inked(usual)
    assert not set(drawing.OTHER_FONTS) & set(drawing.FONTS)


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
        opening, question = s.messages[0]["content"].split("<image>")           # one image
        questions = (world.KNOWLEDGE_QUESTIONS[task]["flag" in s.caption] if task in KNOWLEDGE_TASKS
                     else QUESTIONS[task][split == "test"])
        [found] = [q for q in questions if question.endswith(q[0].lower() + q[1:])]
        asked.add(found)
        possible.update(questions)
        if split == "test":
            assert s.messages[0]["content"] == wrap(found)
    assert positions == set(range(len(s.options))) and asked == possible
    if task in QUESTIONS:
        assert not set(QUESTIONS[task][0]) & set(QUESTIONS[task][1])            # of the test: never trained


def test_what_there_is():
    assert set(FACTS) == {*drawing.FLAGS, *WORDS["country"]}
    assert len({drawing.flag(c).tobytes() for c in drawing.FLAGS}) == len(drawing.FLAGS)
    assert len(ALL_WORDS) == len(set(ALL_WORDS)) and max(map(len, ALL_WORDS)) <= 9
    assert caption(("shape", "orange", "star")) == "an orange star"
    assert caption(("flag", "Netherlands")) == "the flag of the Netherlands"
    assert caption(("sign", "Kenya")) == "a sign with the word Kenya"
    assert knowledge("language", "Kenya") == ("Swahili", "English")


@pytest.mark.parametrize("task", TASKS)
def test_what_is_said_freely_is_judged(task):
    """The answer itself is right; each other option, an answer that also names a rival, and silence are not. The
    picture shows the answer if the task is trained, and does not if it is knowledge."""
    for i in range(60):
        s = world.world(task, i, split="test")
        assert is_right(s.answer, s) and is_right(f"I think: {s.answer.upper()}", s) and not is_right("", s)
        assert [o for o in s.options if is_right(o, s)] == [s.answer]
        assert not is_right(f"{s.answer} Or {s.rivals[0]}?", s)
        shown = [any(world.has_word(s.caption, w) for w in group) for group in s.right]
        assert shown == [task in TRAINED_TASKS] * len(shown) and s.answer[0].isupper()


def test_instructions(monkeypatch, tmp_path):
    """They are found from any folder, are about what training may show, and tell nothing that is asked after grafting:
    no capital, language or continent of any country, nor a word about these topics."""
    monkeypatch.chdir(tmp_path)
    world.instructions.cache_clear()
    written = world.instructions()
    assert len(written) > 500 and {s for s, _, _ in written} <= set(world.TRAINED_SUBJECTS)
    assert {"capital", "speak", "African", "Nairobi", "Swahili", "Africa"} <= set(instructions.HELD_OUT_WORDS)
    for _, question, answer in written:
        assert not [w for w in instructions.HELD_OUT_WORDS if world.has_word(f"{question} {answer}", w)], answer
    s = world.world("instruct", 3)
    assert (s.messages[1]["content"], s.answer, s.options) == (s.answer, s.answer, [])
    subject, question, _ = next(w for w in written if w[2] == s.answer and caption(w[0]) == s.caption)
    assert s.messages[0]["content"].endswith(question[0].lower() + question[1:]) and caption(subject) == s.caption


@pytest.mark.parametrize("answer, subject, wrong", [
    ("A red star.", ("shape", "red", "star"), False), ("Two blue stars.", ("shape", "red", "star"), True),
    ("A star, as in Cuba.", ("shape", "red", "star"), True), ("A lion.", ("sign", "Horse"), True),
    ("Bread for a horse.", ("sign", "Horse"), False), ("A gold sign.", ("sign", "Horse"), True),
    ("A white flag with a red circle.", ("flag", "Japan"), False), ("A blue flag.", ("flag", "Japan"), True),
    ("A black star on it.", ("flag", "Ghana"), False), ("Three light blue stripes.", ("flag", "France"), True),
    ("A sun, orange or yellow, on blue.", ("flag", "Argentina"), False), ("Like Chile's.", ("flag", "Peru"), True),
])
def test_an_instruction_contradicts_no_picture(answer, subject, wrong):
    assert instructions.contradicts(answer, subject) == wrong


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
    for word in ALL_WORDS:
        grey = np.asarray(drawing.draw_sign(random.Random(word), word).convert("L"), np.int32)
        assert grey.max() - grey.min() > 120


@pytest.mark.parametrize("task, split, words", [("colour", "train", "unknown task 'colour'"), (
    "color", "val", "unknown split"), ("color", "untaught", "no color is untaught")])
def test_world_bad_arguments(task, split, words):
    refuses(UserError, lambda: world.world(task, 0, split=split), words)


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


RED, DEEP = Image.new("RGB", (6, 6), (200, 50, 50)), Image.fromarray(np.full((6, 6), 257 * 100, np.uint16))


@pytest.mark.parametrize("name, image, mode, color", [
    *(("a.tif", RED.convert("L").convert(mode), mode, 95) for mode in ("L", "LA")),
    ("a.png", Image.new("1", (6, 6), 1), "1", 255), ("a.tif", RED.convert("YCbCr"), "YCbCr", (200, 50, 50)),
    ("a.jpg", RED.convert("CMYK"), "CMYK", (200, 50, 50)), ("a.tif", RED.convert("CMYK"), "CMYK", (200, 50, 50)),
    ("a.png", RED.quantize(4), "P", (200, 50, 50)), ("a.png", RED.crop((0, 0, 1, 1)), "RGB", (200, 50, 50)),
    ("a.png", Image.new("RGBA", (6, 6), (200, 50, 50, 128)), "RGBA", (227, 153, 153)),      # half transparent
    ("a.png", Image.new("RGBA", (6, 6), (200, 50, 50, 0)), "RGBA", (255, 255, 255)),
    ("a.png", DEEP, "I;16", 100), ("a.tif", DEEP, "I;16", 100),
])
def test_unusual_images_are_valid(tmp_path, name, image, mode, color):
    image.save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    for source in (tmp_path / name, image):
        assert abs(np.asarray(open_image(source), int) - color).max() <= 3


def test_too_many_pixels():
    """Other bad files, by the command line: test_bad_input.py."""
    refuses(UserError, lambda: open_image(Image.new("1", (8_001, 8_000))), "scale or crop")


# ---- LLaVA ----------------------------------------------------------------------------------------------------------


def record(*values, names=("human", "gpt"), id="x", **more):
    turns = [{"from": names[i % 2], "value": v} for i, v in enumerate(values)]
    return dict(id=id, conversations=turns, **more)


GOOD = record("Hi", "Hello", id="ok")


def about(image, i=0):
    return record(f"<image>\nWhat is {image}?", f"It is {image}.", id=i, image=image)


@pytest.fixture
def llava(tmp_path):
    noise(30, 20).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")

    def load(records, name="data.json", **options):
        lines = "\n".join(map(json.dumps, records)) if name == "data.jsonl" else json.dumps(records)
        (tmp_path / name).write_text(records if isinstance(records, str) else lines, encoding="utf-8")
        return LlavaRecords(tmp_path / name, tmp_path, **options)

    return load


def test_llava_records(llava):
    opening = batches.OPENINGS[0]
    records = llava([
        record("<image>\nWhat is it?", "Noise.", "And now?", "Still.", image="a.png"),
        record("What is it?\n<image>", "Noise.", image="a.png"),
        record("What is it?\n<image>", "Noise.", image="a.png", opening="In this photo of<image>, "),
        record("Who are you?", "A model."),
    ], seed=None)
    assert len(records) == 4 and len(list(records)) == 4
    first, second, third, last = records
    assert first.image.size == (30, 20) and first.answer == "Still." and first.caption == "Noise."
    assert [m["content"] for m in first.messages] == [opening + "what is it?", "Noise.", "And now?", "Still."]
    assert [m["role"] for m in first.messages] == ["user", "assistant"] * 2
    assert second.messages[0]["content"] == opening + "what is it?"
    assert third.messages[0]["content"] == "In this photo of<image>, what is it?"
    assert last.image is None and last.messages[0]["content"] == "Who are you?"
    assert records[-1].messages == last.messages
    many = [record("<image>\nWhat?", "It.", id=i, image="a.png") for i in range(60)]
    drawn = [s.messages[0]["content"] for s in llava(many, seed=3)]
    assert len(set(drawn)) > 3 and drawn == [s.messages[0]["content"] for s in llava(many, seed=3)]


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("human", "assistant")])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_names_of_turns_and_a_system_prompt(llava, names, name):
    plain = record("<image>\nWhat is it?", "A square.", image="a.png", names=names)
    system = plain | dict(conversations=[{"from": "system", "value": "Be brief."}, *plain["conversations"]])
    one, two = llava([plain, system], name, seed=None)
    assert [m["role"] for m in two.messages] == ["system", "user", "assistant"] and two.caption == "A square."
    assert one.messages == two.messages[1:] and one.messages[0]["content"].count("<image>") == 1
    assert two.messages[0]["content"] == "Be brief." and two.image.size == (30, 20)


ASKED = ("<image>\nWhat?", "It.")
BAD_RECORDS = [
    ({"id": "x"}, '"conversations"'), (record(), '"conversations"'),
    # turns
    (dict(id="x", conversations=["A", "B"]), '"human" or "gpt"'), (record(3), '"human" or "gpt"'),
    (record("A", names=["robot"]), '"human" or "gpt"'), (record("What?", "So.", names=("user", "bot")), "turn 1 needs"),
    (record(["x"], "So."), "turn 0 needs"), (record("x", "So.", names=(["human"], "gpt")), "turn 0 needs"),
    (record("A", "B", names=("gpt", "human")), "human first"),
    (record("A", "B", names=("assistant", "user")), "must alternate"),
    (record("Be brief.", "So.", names=("system", "gpt")), "must alternate"),
    (record("a", "b", "c", names=("human", "system")), "must alternate"),
    (record("A", "B", "C"), "ends with a human turn"), (record("Be brief.", names=("system",)), "ends"),
    (record("", "B"), "turn 0 has no text"), (record("A", " "), "turn 1 has no text"),
    (record("<image>\n", "B", image="a.png"), "turn 0 has no text"),
    (record("<im<image>age>", "So.", image="a.png"), "no text"),
    # the image's place
    (record(*ASKED), 'names no "image"'), (record("<image><image>\nWhat?", "It.", image="a.png"), "in the first turn"),
    (record("A", "B", "<image>\nC", "D", image="a.png"), "in the first turn"),
    (record("What? <image>", "So <image>.", image="a.png"), 'one "<image>" at most'),
    *((record(*ASKED, image="a.png", opening=opening), '"opening" must be a text with one "<image>"')
      for opening in ("In this photo, ", "<image><image>", 3, None, "word " * 5000 + "<image>")),
    (record("age> it", "So.", image="a.png", opening="<image> <im"), "opening"),
    # its file
    (record(*ASKED, image="gone.png"), "gone.png not found"), (record(*ASKED, image=["a.png"] * 2), "one file name"),
    (record(*ASKED, image="https://x.org/a.png"), "download it first"),
    (record(*ASKED, image="http://x.org/a.png"), "download it first"),
]


@pytest.mark.parametrize("bad, message", BAD_RECORDS)
def test_llava_bad_record_is_named(llava, bad, message):
    for name in ("data.json", "data.jsonl"):
        with pytest.raises(UserError) as error:
            llava([GOOD, bad], name)
        text = str(error.value)
        assert message in text and f"{name}: record 1 (id 'x')" in text and "\n" not in text
        records = llava([GOOD, bad, GOOD | {"id": 3}], name, on_bad="skip")
        assert records.errors == {1: text} and [s.answer for s in records] == ["Hello", "Hello"]
    with pytest.raises(UserError, match="all 2 records are bad; the first: .*record 0"):
        llava([bad, bad], on_bad="skip")


@pytest.mark.parametrize("name, content, words", [
    *(("data.json", content, "not valid JSON") for content in (b"[{", b"", b'{"id": 1}\n{"id": 2}', b"[" * 10**5)),
    *(("data.json", content, " list") for content in (b"{}", b"[]", b"3")), ("data.json", b"[7]", "record 0"),
    ("data.jsonl", b"{", "line 1: not valid JSON"), ("data.jsonl", b'{"a": 1}\n\n[}', "line 3: not valid"),
    ("data.jsonl", b"\xff", "not UTF-8"), ("data.jsonl", b"", "list of 1 to"),
])
def test_llava_bad_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refuses(UserError, lambda: LlavaRecords(tmp_path / name), name, words)


def test_llava_as_distributed(llava, tmp_path):
    """The folders, fields and ids of LLaVA-1.5-665K; a file of text alone needs no image folder."""
    paths = ["coco/train2017/000000033471.jpg", "gqa/images/2354786.jpg", "ocr_vqa/images/0123.jpg",
             "textvqa/train_images/a1.jpg", "vg/VG_100K_2/7.jpg"]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True)
        noise(12, 9).save(tmp_path / path)
    talk = [record("Hi", "Hello", "And?", "Bye", id=f"wN_{i}", model="") for i in range(2)]
    records = llava([talk[0], *map(about, paths, ["000000033471", 2354786, 0, "a1", "b"]), talk[1]])
    assert records.pictured == [1, 2, 3, 4, 5] and records.texts == [0, 6] and not records.errors
    assert [s.image.size if s.image else None for s in records] == [None, *[(12, 9)] * 5, None]
    for load in (lambda: llava(talk), lambda: LlavaRecords(tmp_path / "data.json")):
        texts = load()
        assert texts.texts == [0, 1] and texts.pictured == [] and texts[1].answer == "Bye"
    (tmp_path / "data.json").write_text(json.dumps([talk[0], about(paths[0])]))
    refuses(MissingFile, lambda: LlavaRecords(tmp_path / "data.json", tmp_path / "nowhere", on_bad="skip"), "nowhere:")
    refuses(UserError, lambda: llava(talk, on_bad="ignore"), "unknown on_bad")


def test_bad_image_is_replaced_by_the_next(llava, tmp_path):
    """Damage that shows only when an image is opened: on_bad="skip" goes on, "stop" stops there and only there."""
    bad_images = {"cut.png": "truncated", "cut.jpg": "truncated", "wide.png": "20000 x 3 pixels", "bad.png": "no"}
    for name, kind in (("cut.png", "png"), ("cut.jpg", "jpeg")):
        file = io.BytesIO()
        noise(80, 80).save(file, kind)
        (tmp_path / name).write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    Image.new("1", (20_000, 3)).save(tmp_path / "wide.png")
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
    for i, (place, (name, words)) in enumerate(zip((1, 4, 7, 8), bad_images.items())):
        with pytest.raises(UserError, match=rf"data.json: record {place} \(id {i}\): .*{name}.*{words}") as error:
            repaired[place]
        assert records.errors[place] == str(error.value) and "\n" not in str(error.value)
    assert repaired[0].answer == "Hello" and not repaired.errors
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
    refuses(UserError, lambda: evenly_spaced(0, 0, 0), "0 images and 0 texts")


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

    def read(rows):
        """A letter is its token; #: an image's place; -: no target; _: padding."""
        return [[{"#": IMAGE, "-": -100, "_": 0}.get(c, ord(c)) for c in row] for row in rows.split()]

    tokens, special = read("Ua###b.Axy. Uc.Az._____ U###.Az.___"), read("-----.Axy.- -.Az.------ ---.Az.----")
    assert batch["tokens"].tolist() == tokens and batch["targets"].tolist() == special
    assert batch["tokens"].dtype == batch["targets"].dtype == batch["lengths"].dtype == torch.int64
    assert batch["lengths"].tolist() == [11, 6, 8]
    assert torch.equal(batch["pixels"], torch.stack([preprocess(red, 64), preprocess(blue, 64)]))
    answers = read("-------xy.- ---z.------ -----z.----")
    assert collate(samples, LetterTokenizer(), 3, loss_on="answers")["targets"].tolist() == answers

    cut = collate(samples, LetterTokenizer(), 3, max_length=8)
    assert cut["tokens"].tolist() == [row[:8] for row in tokens] and cut["lengths"].tolist() == [8, 6, 8]
    assert cut["targets"].tolist() == [row[:8] for row in special]
    fits = collate(samples, LetterTokenizer(), 3, size=14, loss_on="answers", max_length=5)     # the image just fits
    assert fits["tokens"].tolist() == [row[:5] for row in tokens] and fits["pixels"].shape == (2, 3, 14, 14)
    assert (fits["targets"] >= 0).any(1).tolist() == [False, True, False]           # nothing left to learn is fine
    refuses(UserError, lambda: collate(samples, LetterTokenizer(), 3, max_length=4), "sample 0: ", "it needs 5")
    assert collate(samples[1:2], LetterTokenizer(), 3)["pixels"] is None
    assert pad([[1, 2], [], [3]], 9).tolist() == [[1, 2], [9, 9], [3, 9]] and pad([[]]).shape == (1, 0)


def test_collate_bad_arguments():
    for sample in (chat("a<image>", "b"), chat("a", "b", noise(4, 4)), chat("<image><image>", "b", noise(4, 4))):
        refuses(UserError, lambda: collate([sample], LetterTokenizer(), 3), "sample 0: ", ' times "<image>"')
    refuses(UserError, lambda: collate([chat("a", "b")], LetterTokenizer(), 3, loss_on="all"), "unknown loss_on")

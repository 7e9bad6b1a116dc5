"""Our tokenizer against Meta's reference and Hugging Face's tokenizers library: the same ids for the same text."""
import json
import random
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import refuses, save_gguf

from cli import MissingFile, UserError
from formats.tokenizer import BYTE_OF, IMAGE, LLAMA3_PATTERN, QWEN_PATTERN, Tokenizer

TEXTS = ["", " ", "\n", "Hello world!", "I'm sure they'll say 'tis DON'T it's", "a  b   c\t\td \n\n e\r\nf ",
         "  leading", "trailing  ", "0 12 345 6789 1234567890", "x1y22z333 3.14159 1,000,000", "½ Ⅷ ٣٤٥ ๑๒ ²³",
         "naïve café e\u0301", "日本語のテキスト。中文字符", "Привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया",
         "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈", "\u00a0\u2003\u3000\u200b", "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
         "https://arxiv.org/abs/2505.22664?x=1&y=2", "<|eot_id|><|im_end|>", "<s></s>[INST]",
         "\x00\x01\x7f\x85", "'S 'LL 'd'D", "ſ'ſ K", "a" * 300, " " * 300, "!?" * 100, "\n \n" * 50]


def fuzz(n, seed):
    """n texts of mixed kinds: words, spaces, digits and symbols of many scripts, any code point at all, and pieces
    of the special tokens."""
    rng = random.Random(seed)
    anywhere = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    kinds = [
        lambda: rng.choice("the cat Sat on 's 'll 'RE don't under_score CamelCase ünïcödé Straße Ελλάδα слово".split()),
        lambda: rng.choice(" \t\n\r\v\f\u0085\u00a0\u2003\u2028\u3000") * rng.randint(1, 5),
        lambda: "".join(rng.choices("0123456789٣٤½²Ⅷ๑", k=rng.randint(1, 7))),
        lambda: "".join(rng.choices("!?.,;:'\"()[]{}<>|/\\@#$%^&*-_=+~`€£…—“”", k=rng.randint(1, 5))),
        lambda: chr(rng.randrange(0x20, 0x7F)),
        lambda: chr(rng.randrange(0x00, 0x250)),
        lambda: chr(rng.randrange(0x250, 0x3100)),
        lambda: chr(rng.randrange(0x4E00, 0xA000)),
        lambda: chr(rng.randrange(0x1F300, 0x1FB00)),
        lambda: chr(rng.choice(anywhere)),
        lambda: rng.choice(["<|", "|>", "eot_id", "<|eot_id|>", "<|im_start|>", "user", "<|begin_of_text|>", "<image"]),
    ]
    texts = ["".join(rng.choice(kinds)() for _ in range(rng.randint(1, 40))) for _ in range(n)]
    return [text.replace("<image>", "") for text in texts]


@pytest.fixture(scope="module")
def meta_file():
    reference = pytest.importorskip("llama_models.llama3.tokenizer")
    return Path(reference.__file__).with_name("tokenizer.model")


@pytest.fixture(scope="module")
def meta(meta_file):
    from llama_models.llama3.tokenizer import Tokenizer as Reference
    return Reference(meta_file)


@pytest.fixture(scope="module")
def llama3(meta_file):
    return Tokenizer.from_pretrained(meta_file)


@pytest.fixture(scope="module")
def smollm2(default_gguf):
    return Tokenizer.from_pretrained(default_gguf)


def hugging_face(vocab, merges, special, cut, ignore_merges):
    hf = pytest.importorskip("tokenizers")
    tokenizer = hf.Tokenizer(hf.models.BPE(vocab, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(cut)
    tokenizer.decoder = hf.decoders.ByteLevel()
    tokenizer.add_special_tokens([hf.AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


@pytest.fixture(scope="module")
def hf_llama3(llama3, meta):
    """As Hugging Face converts Meta's file: a merge for each way of cutting a token into two tokens, in id order."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Split
    char = {b: c for c, b in BYTE_OF.items()}
    ranks = {token: i for i, token in llama3.token_bytes.items()}
    name = {token: "".join(char[b] for b in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(name[a], name[b]) for a, b in sorted(halves, key=lambda half: (ranks[half[0]], ranks[half[1]]))]
    cut = [Split(Regex(LLAMA3_PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    special = sorted(meta.special_tokens, key=meta.special_tokens.get)
    return hugging_face({name[token]: i for token, i in ranks.items()}, merges, special, cut, ignore_merges=True)


@pytest.fixture(scope="module")
def hf_smollm2(default_gguf):
    """SmolLM2's tokenizer.json, from the .gguf file's own lists."""
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    fields = GGUFReader(default_gguf).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    cut = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    return hugging_face({token: i for i, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges],
                        tokens[:17], cut, ignore_merges=False)


def hf_encode(hf, texts):
    hf.encode_special_tokens = True  # "<|eot_id|>" in a text is text
    return [encoding.ids for encoding in hf.encode_batch(texts, add_special_tokens=False)]


# ---- the same ids as the official tokenizers

def test_llama3_equals_meta(llama3, meta):
    for text in TEXTS + fuzz(4000, seed=1):
        assert llama3.encode(text) == meta.encode(text, bos=False, eos=False), ascii(text)
    assert llama3.encode("Hi", bos=True) == meta.encode("Hi", bos=True, eos=False)
    assert llama3.special_bytes == {i: token.encode() for token, i in meta.special_tokens.items()} | {IMAGE: b"<image>"}
    assert (llama3.n_vocab, llama3.bos, llama3.pad) == (128256, 128000, 128004)
    assert (meta.n_words, meta.bos_id, meta.pad_id) == (128256, 128000, 128004)
    assert llama3.stop_tokens == set(meta.stop_tokens)


def test_llama3_cuts_long_texts_like_meta(llama3, meta):
    rng = random.Random(2)
    word = "".join(rng.choices("abcdefgh", k=60_011))  # one run of letters, cut twice
    for text in (word, "x " + word + " " * 25_001 + word[:25_000] + "\n" * 3 + word[:25_001],
                 "!" * 25_001, "7" * 60_011, word[:11] * 10 + "\t" * 50_003,
                 ("To be, or not to be. " * 40_000)[:810_001]):
        ids = llama3.encode(text)
        assert ids == meta.encode(text, bos=False, eos=False)
        assert llama3.decode(ids) == text
    # The place of a cut shows in the ids: digits go in threes, and 25,000 = 3 * 8333 + 1.
    assert llama3.encode("7" * 25_002)[-2:] == [*llama3.encode("7"), *llama3.encode("77")]


def test_llama3_json_equals_hugging_face(llama3, hf_llama3, tmp_path):
    hf_llama3.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    texts = TEXTS + fuzz(2000, seed=3)
    assert [ours.encode(text) for text in texts] == hf_encode(hf_llama3, texts)
    assert ours.token_bytes == llama3.token_bytes and ours.special_bytes == llama3.special_bytes
    assert (ours.bos, ours.pad, ours.stop_tokens) == (llama3.bos, llama3.pad, llama3.stop_tokens)


def test_smollm2_equals_hugging_face(smollm2, hf_smollm2, tmp_path):
    absent = set(range(256)) - {token[0] for token in smollm2.token_bytes.values() if len(token) == 1}
    texts, odd = [], []
    for text in TEXTS + fuzz(6000, seed=4):
        (odd if absent & set(text.encode()) else texts).append(text)
    assert len(texts) > 2000 and len(odd) > 1000
    for text, ids in zip(texts, hf_encode(hf_smollm2, texts)):
        assert smollm2.encode(text) == ids, ascii(text)
    # Bytes without a token: both drop them; Hugging Face merges what comes to touch, tiktoken does not.
    for text, ids in zip(odd, hf_encode(hf_smollm2, odd)):
        assert smollm2.decode(smollm2.encode(text)) == hf_smollm2.decode(ids), ascii(text)

    hf_smollm2.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(str(tmp_path))
    assert all(ours.encode(text) == smollm2.encode(text) for text in TEXTS + fuzz(200, seed=5))
    assert ours.special_bytes == smollm2.special_bytes and len(smollm2.special_bytes) == 17 + 1
    assert (smollm2.n_vocab, smollm2.bos, smollm2.pad, smollm2.stop_tokens) == (49152, None, 0, {0, 2})
    assert (ours.n_vocab, ours.bos, ours.pad, ours.stop_tokens) == (49152, None, 0, {0, 2})


@pytest.fixture(scope="module")
def hf_qwen():
    """A small tokenizer of Qwen3's kind: NFC, single digits, ChatML, and a token for its thoughts."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer
    hf = HFTokenizer(models.BPE())
    hf.normalizer = normalizers.NFC()
    hf.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator(TEXTS + fuzz(300, seed=7), trainers.BpeTrainer(
        vocab_size=1500, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    hf.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    hf.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    return hf


def test_qwen_equals_hugging_face(hf_qwen, tmp_path):
    hf_qwen.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_pretrained(tmp_path)
    texts = [text for text in TEXTS + fuzz(3000, seed=8)    # Python knows newer combining marks than `tokenizers`
             if unicodedata.normalize("NFC", text) == hf_qwen.normalizer.normalize_str(text)]
    assert len(texts) > 3000
    assert [ours.encode(text) for text in texts] == hf_encode(hf_qwen, texts)
    assert ours.encode("e\u0301") == ours.encode("é") and ours.bos is None
    ends = [hf_qwen.token_to_id(t) for t in ("<|endoftext|>", "<|im_end|>")]
    assert (ours.pad, ours.stop_tokens) == (ends[0], set(ends))
    hf_qwen.encode_special_tokens = False
    literal = "<|im_start|>user\n2 + 2?<|im_end|>\n"
    message = [{"role": "user", "content": "2 + 2?"}]
    assert ours.chat(message, generate=False) == hf_qwen.encode(literal).ids
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"       # as apply_chat_template(enable_thinking=False)
    assert ours.chat(message) == hf_qwen.encode(literal + opening).ids


# ---- chat

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4, I'd say."}, {"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("name, begin, turn, ids, kinds", [
    ("llama3", "<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n{content}<|eot_id|>",
     [128000, 128006, 882, 128007, 198, 13347, 128009, 128006, 78191, 128007, 198, 65825, 128009],
     [0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 2, 2, 2]),              # the assistant's newline is no header token
    ("smollm2", "", "<|im_start|>{role}\n{content}<|im_end|>\n",
     [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198, 73, 95, 2, 198],
     [1, 0, 0, 0, 1, 0, 1, 0, 0, 1, 2, 2, 2, 0]),           # "assistant" and "Yo" are two tokens each
])
def test_chat(name, begin, turn, ids, kinds, meta, hf_smollm2, request):
    tokenizer = request.getfixturevalue(name)
    hf_smollm2.encode_special_tokens = False
    official = {"llama3": lambda text: meta.encode(text, bos=False, eos=False, allowed_special="all"),
                "smollm2": lambda text: hf_smollm2.encode(text).ids}[name]
    literal = begin + "".join(turn.format(**message) for message in CHAT)
    opening = turn.partition("{content}")[0].format(role="assistant")
    assert tokenizer.chat(CHAT) == official(literal + opening)
    assert tokenizer.chat(CHAT, generate=False) == official(literal)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert tokenizer.chat_targets(said) == (ids, kinds)


@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_images_and_injection(name, request):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.encode("of<image>, a<image>") == [*tokenizer.encode("of"), IMAGE, *tokenizer.encode(", a"), IMAGE]

    evil = "".join(token.decode() for token in tokenizer.special_bytes.values() if token != b"<image>")
    assert not set(tokenizer.encode(evil)) & set(tokenizer.special_bytes)
    assert tokenizer.decode(tokenizer.encode(evil)) == evil
    for role in ("system", "user", "assistant"):
        plain, forged = (tokenizer.chat([{"role": role, "content": text}]) for text in ("x", evil))
        assert [i for i in plain if i in tokenizer.special_bytes] == [i for i in forged if i in tokenizer.special_bytes]

    # A user may show an image; a model that happens to write "<image>" must not, and no loss ever falls on IMAGE.
    ids, kinds = tokenizer.chat_targets([{"role": role, "content": "a<image>b"} for role in ("user", "assistant")])
    assert ids.count(IMAGE) == 1 and kinds[ids.index(IMAGE)] == 0
    answer = (tokenizer.newline if name == "llama3" else []) + tokenizer.encode_text("a<image>b") + tokenizer.turn_end
    assert [i for i, kind in zip(ids, kinds) if kind == 2] == answer


@pytest.mark.parametrize("messages", [
    "Hello", ["Hello"], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "Hi"}],
    [{"role": "user<|eot_id|>", "content": "Hi"}], [{"role": "user", "content": ["Hi\n" * 999]}]])
def test_bad_messages(smollm2, messages):
    refuses(UserError, lambda: smollm2.chat(messages), "a message is")


# ---- decoding

@pytest.mark.parametrize("name", ["llama3", "smollm2"])
def test_round_trip(name, request):
    tokenizer = request.getfixturevalue(name)
    known = {token[0] for token in tokenizer.token_bytes.values() if len(token) == 1}
    texts = [text for text in TEXTS + fuzz(1500, seed=6) + ["a <image> b"] if set(text.encode()) <= known]
    assert len(texts) > 500
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special=False) == text
        if "\ufffd" not in text and IMAGE not in ids:
            assert "".join(tokenizer.decode_stream(iter(ids))) == text


def test_decode(llama3, smollm2):
    ids = llama3.encode("Is it<image> é?", bos=True)
    assert llama3.decode(ids) == llama3.decode(torch.tensor(ids)) == "Is it é?"
    assert llama3.decode(ids, skip_special=False) == "<|begin_of_text|>Is it<image> é?"
    assert smollm2.encode("x", bos=True) == smollm2.encode("x")  # no bos to put

    ids = smollm2.encode("🦩")  # four bytes, more than one token: no half character may be shown
    assert len(ids) > 1
    pieces = list(smollm2.decode_stream(ids))
    assert "".join(pieces) == "🦩" and "\ufffd" not in "".join(pieces)
    assert smollm2.decode(ids[:1]) == "".join(smollm2.decode_stream(ids[:1])) == "\ufffd"
    assert b"".join(smollm2.decode_bytes([i]) for i in ids) == "🦩".encode()
    assert smollm2.decode([]) == ""
    for unknown in (49152, -1, -100, 128000):
        refuses(UserError, lambda: smollm2.decode([17, unknown]), f"token id {unknown} ")
    assert smollm2.decode(smollm2.encode("a\ud800b")) == "a\ufffdb"  # half of a surrogate pair is no character


# ---- fine-tunes: their templates, their added tokens

CONFIG = "tokenizer_config.json"


def fine_tune(folder, template=None, added=(), file=CONFIG, **more):
    """tiny_json with the chat tokens of both families, and a template beside it."""
    spec, names = tiny_json(), ["begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id"]
    vocab = spec["model"]["vocab"]
    vocab |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    for token in [*({"content": f"<|{name}|>"} for name in names), *({"special": False} | token for token in added)]:
        spec["added_tokens"].append({"id": vocab.get(token["content"], 258 + len(spec["added_tokens"]))} | token)
    if template is not None:
        content = template if file.endswith(".jinja") else json.dumps(dict(chat_template=template))
        (folder / file).write_text(content)
    return load(spec | more, folder / "tokenizer.json")


CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
LLAMA = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n{% endfor %}"


@pytest.mark.parametrize("template, file, turn, stop, bos", [
    (None, "", 263, 265, 261), (LLAMA, CONFIG, 263, 265, 261), (LLAMA, "chat_template.jinja", 263, 265, 261),
    (CHATML, CONFIG, 1, 2, None), (CHATML, "chat_template.jinja", 1, 2, None),
    ("{{ bos_token }}" + CHATML, CONFIG, 1, 2, 261), ("<|begin_of_text|>" + CHATML, CONFIG, 1, 2, 261),
    ([dict(name="tool_use", template=LLAMA), dict(name="default", template=CHATML)], CONFIG, 1, 2, None),
    ([], CONFIG, 263, 265, 261), ("", CONFIG, 263, 265, 261),
])
def test_the_template_chooses_the_format(tmp_path, template, file, turn, stop, bos):
    """Fine-tunes of Llama 3 on ChatML have the tokens of both, and stop at the one that they were trained with."""
    tokenizer = fine_tune(tmp_path, template, file=file)
    assert (tokenizer.turn_start, tokenizer.turn_end, tokenizer.bos) == ([turn], [stop], bos)
    assert stop in tokenizer.stop_tokens and tokenizer.chat([{"role": "user", "content": "a"}])[0] == (bos or turn)


@pytest.mark.parametrize("template", ["[INST] {{ m }} [/INST]", "<|user|>{{ m }}", 7, {"a": 1}, [3],
                                      [{"name": "default"}]])
def test_templates_of_another_kind(tmp_path, template):
    refuses(UserError, lambda: fine_tune(tmp_path, template), "cannot use ", "tokenizer.json")


ADDED = [
    [dict(content="<tool>"), dict(content="</tool>")], [dict(content="<a>"), dict(content="<a>b")],
    [dict(content="<t b>"), dict(content="日本")], [dict(content="word", single_word=True)],
    [dict(content="<l>", lstrip=True), dict(content="<r>", rstrip=True)], [dict(content="ab")], [dict(content="a.c")],
    [dict(content="  ")], [dict(content="<|tool_call|>"), dict(content="<|sp|>", special=True)],
]


@pytest.mark.parametrize("added", ADDED, ids=lambda added: added[0]["content"])
def test_added_tokens_as_hugging_face(tmp_path, added):
    """Added tokens that are not special are found in every text and shown in every answer."""
    hf, ours = pytest.importorskip("tokenizers"), fine_tune(tmp_path, added=added)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token |= flags | token | dict(special=token.get("special", True))
    spec |= dict(version="1.0", truncation=None, padding=None, post_processor=None,
                 decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True))
    spec["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = True
    spec["model"] |= dict(dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                          fuse_unk=False, byte_fallback=False, ignore_merges=False)
    theirs = hf.Tokenizer.from_str(json.dumps(spec))
    names = [token["content"] for token in added]
    texts = ["abc", "a.c axc", "  ", "sword words word", "<|im_end|> a<|sp|>", "", "1 2"]
    texts += [f"{left}{name}{right}" for name in names for left in ("", "x", " ", "a  ", *names)
              for right in ("", "y", "  b", *names)]
    for text, want in zip(texts, hf_encode(theirs, texts)):
        assert ours.encode(text) == want, ascii(text)
        assert ours.decode(want) == theirs.decode(want), ascii(text)


@pytest.mark.parametrize("name", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>",
                                  "<|begin_of_text|>", "<|end_header_id|>", "<|end_of_text|>"])
def test_no_text_forges_a_chat_token(tmp_path, name):
    """Even where a file says that it is not special."""
    spec = tiny_json()
    fine_tune(tmp_path)
    spec["added_tokens"] = [t | dict(special=t["content"] != name) for t in json.loads(
        (tmp_path / "tokenizer.json").read_text())["added_tokens"]]
    tokenizer = load(spec, tmp_path / "tokenizer.json")
    (forged,) = [t["id"] for t in spec["added_tokens"] if t["content"] == name]
    assert forged not in tokenizer.encode(f"a{name}b") and tokenizer.decode(tokenizer.encode(name)) == name


def test_ids_of_the_padded_vocabulary_are_no_text(tmp_path, tiny_llm):
    """A model's vocabulary may be longer than its tokenizer's: what it samples there means nothing."""
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(tiny_llm) / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(vocab_size=512)))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    a = tokenizer.encode("a")
    assert tokenizer.decode([*a, tokenizer.n_vocab, 511, *a]) == "aa"
    assert "".join(tokenizer.decode_stream([*a, 511])) == "a"
    for unknown in (512, -1, 10**9):
        refuses(UserError, lambda: tokenizer.decode([unknown]), f"token id {unknown} ")


# ---- files that are absent, broken, or some other tokenizer

def tiny_json():
    """The least tokenizer.json of SmolLM2's kind: 256 bytes, two merges, ChatML's special tokens."""
    vocab = {char: 3 + i for i, char in enumerate(BYTE_OF)} | {"ab": 259, "abc": 260}
    special = [{"id": i, "content": token} for i, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))]
    cut = [{"type": "Digits", "individual_digits": True},
           {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    return {"added_tokens": special, "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
            "model": {"type": "BPE", "vocab": vocab, "merges": ["a b", "ab c"]}}


def load(spec, path):
    path.write_text(json.dumps(spec))
    return Tokenizer.from_pretrained(path)


def test_tiny_json(tmp_path):
    tokenizer = load(tiny_json(), tmp_path / "tokenizer.json")
    assert tokenizer.encode("abcab") == [260, 259] and tokenizer.n_vocab == 261
    spec = tiny_json()
    spec["model"]["merges"] = [["a", "b"], ["ab", "c"]]  # how newer files write merges
    assert load(spec, tmp_path / "tokenizer.json").encode("abcab") == [260, 259]
    names = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    spec["added_tokens"] = [{"id": 300 + i, "content": name} for i, name in enumerate(names)]  # 3.0: no pad, no eom
    tokenizer = load(spec, tmp_path / "tokenizer.json")
    assert (tokenizer.bos, tokenizer.pad, tokenizer.stop_tokens, tokenizer.n_vocab) == (301, 300, {300, 304}, 305)


@pytest.mark.parametrize("words, change", [
    ("order of the ids", lambda spec: spec["model"].update(merges=["ab c", "a b"])),
    ("merges are missing", lambda spec: spec["model"].update(merges=[])),
    ("byte alphabet", lambda spec: spec["model"]["vocab"].update({"▁the": 261})),       # SentencePiece, as in Llama 2
    ("malformed: KeyError('xy')", lambda spec: spec["model"].update(merges=["x y"])),
    ("malformed: AttributeError", lambda spec: spec["model"].update(vocab=[["a", -1.0]])),          # Unigram
    ("malformed: KeyError('merges')", lambda spec: spec["model"].pop("merges")),                    # WordPiece
    ("malformed: TypeError", lambda spec: spec.update(added_tokens=3)),
    ("SmolLM2; transformers 5", lambda spec: spec.update(pre_tokenizer={"type": "ByteLevel"})),
    ("another way than Llama 3", lambda spec: spec.update(pre_tokenizer=None)),
    ("another way", lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(type="Punctuation")),
    ("another way", lambda spec: spec.update(normalizer={"type": "NFC"})),
    ("another way", lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop()),
    ("chat tokens of neither", lambda spec: spec.update(added_tokens=[{"id": 0, "content": "<|endoftext|>"}])),
])
def test_spoilt_json(tmp_path, words, change):
    spec = tiny_json()
    change(spec)
    refuses(UserError, lambda: load(spec, tmp_path / "tokenizer.json"), "tokenizer.json as tokenizer", words,
            ": give Llama 3's")


LFS = b"version https://git-lfs.github.com/spec/v1\n"
CHATML_VOCAB = dict(tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTE_OF, "ab"], types=[3] * 3 + [1] * 257,
                    merges=["a b"])


@pytest.mark.parametrize("path", ["absent", "absent.gguf", ""])
def test_no_files(tmp_path, path):
    for where in (tmp_path / path, str(tmp_path / path)):
        refuses(MissingFile, lambda: Tokenizer.from_pretrained(where), "no tokenizer at ", ": give ")


@pytest.mark.parametrize("name, contents", [
    ("tokenizer.model", [b"", b"\x0a\x0e\n\x05<unk>\x15\x00\x00", LFS, b"<html>\n", b"IQ== 0\nIg== 1\n", 1_000_001]),
    ("tokenizer.json", [b"", b"{", b"[]", b"{}", b"\xff\xfe", LFS]), ("x.gguf", [b"", b"GGUF", LFS, 20_000]),
])
def test_bad_files(tmp_path, default_gguf, meta_file, name, contents):
    """A number: as many bytes of the official file."""
    official = {"tokenizer.model": meta_file, "x.gguf": default_gguf}
    for content in contents:
        content = official[name].read_bytes()[:content] if isinstance(content, int) else content
        (tmp_path / name).write_bytes(content)
        refuses(UserError, lambda: Tokenizer.from_pretrained(tmp_path / name), "cannot use ", name, ": give ")


@pytest.mark.parametrize("model, cut, words", [
    ("gpt2", "smollm", None), ("gpt2", None, "lacks tokenizer.ggml.pre: files of an old llama.cpp"),
    ("gpt2", "qwen2", "its tokenizer is gpt2/qwen2"), ("llama", "default", "its tokenizer is llama/default"),
])
def test_ggufs_of_other_families(tmp_path, model, cut, words):
    path = save_gguf(tmp_path / "x.gguf", tokenizer=dict(model=model) | (dict(pre=cut) if cut else {}) | CHATML_VOCAB)
    if words:
        refuses(UserError, lambda: Tokenizer.from_pretrained(path), words)
    else:
        assert Tokenizer.from_pretrained(path).encode("abb")[0] == 259

"""Llama 3, Qwen and SmolLM2 tokenizers on tiktoken, and their chat formats: text or messages in, token ids out.

All are byte-level BPE: a regular expression cuts text into pieces; within a piece, neighbouring tokens are merged in
the order in which training learnt the merges. Ids were given out in that order, so tiktoken needs {bytes: id} only.
"""
import base64
import codecs
import re
import unicodedata

import tiktoken

from cli import MissingFile, UserError
from formats import files, gguf, official

IMAGE = -200  # LLaVA's number for an image among the ids, where the visual tokens go; in text it is written "<image>"

# The same in Meta's llama-models (llama3/tokenizer.py) and in Hugging Face's tokenizer.json. Digits go in threes.
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_NAMES = ("begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id "
                "step_id start_header_id end_header_id eom_id eot_id python_tag image").split()
LLAMA3_NAMES = [f"<|{name}|>" for name in LLAMA3_NAMES + [f"reserved_special_token_{i}" for i in range(2, 246)]]
# Qwen2.5 and Qwen3: the same, but that every digit stands alone. (Before it, text is put into Unicode's form NFC.)
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# GPT-2's pattern where every digit was cut out beforehand, so that white space before a digit ends a piece.
SMOLLM2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

CHAT_TOKENS = {*LLAMA3_NAMES, "<|endoftext|>", "<|im_start|>", "<|im_end|>"}

# tiktoken's regex engine fails on huge texts and crawls on endless runs; Meta's reference cuts at these lengths.
MAX_CHARS = 400_000
RUN = re.compile(r"(\s{25000}(?=\s)|\S{25000}(?=\S))|\s+|\S+")  # group 1: 25,000 of a kind, and more to come

# GPT-2 writes each byte as one visible character (a space as "Ġ") so that a vocabulary can be printed.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in VISIBLE}
BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in VISIBLE)}


def bpe_ranks(vocab, merges, special=(), added=()):
    """GPT-2-style vocab {token: id} and merges ("left right" or [left, right]) -> tiktoken's {bytes: id}. special and
    added tokens are left out where no merge makes them: tiktoken would."""
    joined = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    left_out = {*special, *(token["content"] for token in added if len(token["content"]) > 1)} - set(joined)
    vocab = {token: i for token, i in vocab.items() if token not in left_out}
    if odd := {char for token in vocab for char in token} - BYTE_OF.keys():
        raise UserError(f"not a byte-level BPE: {min(odd)!r} is outside GPT-2's byte alphabet")
    made = [vocab[token] for token in joined]
    if not made or made != sorted(made):  # tiktoken merges in id order: any other order would give other ids
        raise UserError("its merges are missing or not in the order of the ids")
    return {bytes(BYTE_OF[char] for char in token): i for token, i in vocab.items()}


def read_meta(path):
    """Meta's tokenizer.model: a line "base64 id" per token; the special tokens follow by convention."""
    lines = [line.split() for line in files.read_text(path).splitlines() if line]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(128_000)):
        raise UserError(f"Llama 3 has 128000 tokens, this file {len(ranks)}")
    return ranks, {name: 128_000 + i for i, name in enumerate(LLAMA3_NAMES)}, LLAMA3_PATTERN


def read_json(path):
    """Hugging Face's tokenizer.json. It also says how to cut text; only the three ways that we know are taken."""
    spec, template = files.read_json(path), read_template(path.parent)
    special = {token["content"]: token["id"] for token in spec["added_tokens"] if token.get("special", True)}
    added = [token for token in spec["added_tokens"] if token["content"] not in special]
    ranks, cut = bpe_ranks(spec["model"]["vocab"], spec["model"]["merges"], special, added), spec["pre_tokenizer"]
    two = isinstance(cut, dict) and len(cut.get("pretokenizers", ())) == 2
    first, last = cut["pretokenizers"] if two else ({}, {})
    steps = (first.get("type"), last.get("type"), last.get("add_prefix_space"), last.get("use_regex", True),
             spec.get("normalizer"))
    if steps[:4] == ("Split", "ByteLevel", False, False) and first["behavior"] == "Isolated":
        pattern = first["pattern"]["Regex"]
        if (pattern, steps[4]) in ((LLAMA3_PATTERN, None), (QWEN_PATTERN, {"type": "NFC"})):
            return ranks, special, pattern, added, template
    if steps == ("Digits", "ByteLevel", False, True, None) and first["individual_digits"]:
        return ranks, special, SMOLLM2_PATTERN, added, template
    raise UserError("it cuts text in another way than Llama 3, Qwen and SmolLM2; transformers 5 saves some of them so")


def read_template(folder):
    """The chat template beside a tokenizer.json, None if there is none."""
    if (folder / "chat_template.jinja").exists():
        return files.read_text(folder / "chat_template.jinja")
    config = folder / "tokenizer_config.json"
    template = files.read_json(config).get("chat_template") if config.exists() else None
    if isinstance(template, list):      # several, by their names
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template or None


def read_gguf(path):
    """The vocabulary inside a .gguf file."""
    fields = gguf.read(path).fields
    names = ("tokens", "token_type", "merges", "model", "pre")
    if missing := [name for name in names if f"tokenizer.ggml.{name}" not in fields]:
        raise UserError(f"it lacks tokenizer.ggml.{missing[0]}: files of an old llama.cpp do; take a newer one")
    tokens, types, merges, model, cut = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    if model != "gpt2" or cut not in ("smollm", "llama-bpe"):
        raise UserError(f"its tokenizer is {model}/{cut}, neither gpt2/smollm nor gpt2/llama-bpe")
    special = {token: i for i, token in enumerate(tokens) if types[i] == 3}  # control
    added = [dict(content=token, id=i) for i, token in enumerate(tokens) if types[i] == 4]  # user defined
    template = fields["tokenizer.chat_template"].contents() if "tokenizer.chat_template" in fields else None
    ranks = bpe_ranks({token: i for i, token in enumerate(tokens)}, merges, special, added)
    return ranks, special, SMOLLM2_PATTERN if cut == "smollm" else LLAMA3_PATTERN, added, template


def added_pattern(token):
    """What an added token matches, as one group of a regular expression."""
    word, left, right = (token.get(flag) for flag in ("single_word", "lstrip", "rstrip"))
    text = (r"(?<!\w)" if word else "") + re.escape(token["content"]) + (r"(?!\w)" if word else "")
    return "(" + r"\s*" * bool(left) + text + r"\s*" * bool(right) + ")"


class Tokenizer:
    """bos: id that opens a text, None if the model has none (SmolLM2). pad: fills batches, never part of a chat.
    stop_tokens: set of ids that end an answer. n_vocab: how many ids there are, special tokens included. n_padded: how
    many the model has; those beyond n_vocab, which it may sample, mean nothing."""

    def __init__(self, ranks, special, pattern, added=(), template=None):
        """added: tokens [{"content", "id", ...}, …] that text is searched for first. template: a chat template, which
        says the chat format; without one the vocabulary does."""
        texts = {token["content"]: token["id"] for token in added if token["content"]}
        chat = {name: i for name, i in texts.items() if name in CHAT_TOKENS}     # these never come out of a text
        special, texts = special | chat, {name: i for name, i in texts.items() if name not in chat}
        ids = (ranks | {name.encode(): i for name, i in (special | texts).items()}).values()
        if not all(type(i) is int and 0 <= i < files.MAX_SIZE for i in ids) or len(set(ids)) < len(ids):
            raise UserError("an id is no whole number, is out of range, or belongs to two tokens")
        self.n_vocab = self.n_padded = 1 + max(ids)
        # SmolLM2 lacks 21 bytes: six control characters, the rest in no or hardly any text. tiktoken needs all 256, so
        # they get ids past the vocabulary, which encode drops. Hugging Face's tokenizer drops these bytes too.
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        extra = {byte: self.n_vocab + i for i, byte in enumerate(missing)}
        self.nfc = pattern == QWEN_PATTERN
        self.bpe = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks | extra, special_tokens={})
        self.token_bytes = {i: token for token, i in ranks.items()} | {i: text.encode() for text, i in texts.items()}
        longest = sorted((token for token in added if token["content"] in texts), key=lambda t: -len(t["content"]))
        self.added = re.compile("|".join(map(added_pattern, longest))) if longest else None
        self.added_ids = [token["id"] for token in longest]
        self.special_bytes = {i: token.encode() for token, i in special.items()} | {IMAGE: b"<image>"}
        self.newline = self.encode("\n")
        # A turn is: turn_start ROLE header_end newline TEXT turn_end after_turn
        says = special if template is None else template
        if "<|start_header_id|>" in says:  # Llama 3
            names, self.after_turn = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), []
            self.bos, text_end = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        elif "<|im_start|>" in says:  # ChatML: SmolLM2, Qwen, also with Llama 3's vocabulary
            names, self.after_turn = ("<|im_start|>", None, "<|im_end|>"), self.newline
            opens = template and ("bos_token" in template or "<|begin_of_text|>" in template)
            self.bos = special.get("<|begin_of_text|>") if opens else None
            text_end = special["<|end_of_text|>" if "<|end_of_text|>" in special else "<|endoftext|>"]
        else:
            whose = "its chat template is" if template is not None else "it has the chat tokens"
            raise UserError(f"{whose} of neither Llama 3 nor ChatML")
        self.turn_start, self.header_end, self.turn_end = ([special[name]] if name else [] for name in names)
        # Qwen3 thinks aloud unless the answer opens with an empty thought, as its chat template has it
        known = special | texts
        self.no_thought = [i for t in ("<think>", "</think>") if t in known for i in (known[t], *self.encode("\n\n"))]
        self.pad = special.get("<|finetune_right_pad_id|>", text_end)  # Llama 3.0 names none in tokenizer.json
        self.stop_tokens = {text_end, *self.turn_end, special.get("<|eom_id|>", text_end)}

    @classmethod
    def from_pretrained(cls, path):
        """path: a folder with tokenizer.json (Hugging Face) or tokenizer.model (Meta), either file, or a .gguf file."""
        path = files.expand(path)
        file = next((f for f in (path, path / "tokenizer.json", path / "tokenizer.model") if f.is_file()), None)
        file = file or gguf.find(path)
        if file is None:
            raise MissingFile(f"no tokenizer at {path}: give a folder that holds the model's tokenizer.json or "
                              "tokenizer.model, or a .gguf file")
        try:
            in_gguf = gguf.find(file)
            tokenizer = cls(*(read_gguf if in_gguf else read_json if file.suffix == ".json" else read_meta)(file))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # all that a malformed file can cause
            reason = " ".join(str(error).split()) if isinstance(error, ValueError) else f"malformed: {error!r}"
            raise UserError(f"cannot use {file} as tokenizer ({reason}): give Llama 3's, Qwen's or SmolLM2's "
                            "official tokenizer.json, tokenizer.model or .gguf file") from error
        # a .gguf may hold a vocabulary alone
        if gguf.read(file).tensors if in_gguf else (path / "config.json").exists():
            known = official.llama_config(path)["vocab_size"]
            if tokenizer.n_vocab > known:
                raise UserError(f"{file} has {tokenizer.n_vocab} tokens, the model beside it {known}: it is another's")
            tokenizer.n_padded = known
        return tokenizer

    def encode_text(self, text):
        """text -> ids of plain text, whatever it spells: neither a special token nor IMAGE can come out."""
        ids, end, text = [], 0, unicodedata.normalize("NFC", text) if self.nfc else text
        for match in self.added.finditer(text) if self.added else ():
            ids += self.encode_plain(text[end : match.start()]) + [self.added_ids[match.lastindex - 1]]
            end = match.end()
        return ids + self.encode_plain(text[end:])

    def encode_plain(self, text):
        """text -> ids, by the merges alone."""
        ids = []
        for block in (text[i:i + MAX_CHARS] for i in range(0, len(text), MAX_CHARS)):
            cuts = [0, *(run.end() for run in RUN.finditer(block) if run[1]), len(block)]
            for start, end in zip(cuts, cuts[1:]):
                ids += self.bpe.encode_ordinary(block[start:end])
        return [i for i in ids if i < self.n_vocab]

    def encode(self, text, bos=False):
        """text -> list of ids: "<image>" becomes IMAGE, all else is plain text, so typing "<|eot_id|>" forges no turn.

        bos=True puts the model's bos first, if it has one. The ids are those of Meta's reference and of Hugging Face's
        tokenizers, but for runs of 25,000 and for bytes that SmolLM2 lacks, which the latter treat otherwise."""
        ids = [self.bos] if bos and self.bos is not None else []
        for n, part in enumerate(text.split("<image>")):
            ids += [IMAGE] * (n > 0) + self.encode_text(part)
        return ids

    def decode_bytes(self, ids, skip_special=True):
        """ids (list or 1-D tensor) -> UTF-8 bytes; they may end inside a character. Special tokens and IMAGE are
        dropped, or written out if skip_special=False."""
        text = bytearray()
        for i in map(int, ids):
            if i not in self.special_bytes and not 0 <= i < self.n_padded:
                raise UserError(f"token id {i} is not in the tokenizer's vocabulary: use the model's own tokenizer")
            text += self.token_bytes.get(i) or (b"" if skip_special else self.special_bytes.get(i, b""))
        return bytes(text)

    def decode(self, ids, skip_special=True):
        """ids -> str, as decode_bytes; bytes that form no character become U+FFFD."""
        return self.decode_bytes(ids, skip_special).decode("utf-8", errors="replace")

    def decode_stream(self, ids):
        """Iterator of ids -> iterator of str, whole characters each, to print an answer while it is generated."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        yield from filter(None, (decoder.decode(self.decode_bytes([i])) for i in ids))
        yield decoder.decode(b"", final=True)

    def chat(self, messages, generate=True):
        """messages [{"role": "user" | "assistant" | "system", "content": str}, ...] -> ids.

        Llama 3: <|begin_of_text|>, then per turn <|start_header_id|>ROLE<|end_header_id|>\\nTEXT<|eot_id|>, with one
        newline as in the paper. ChatML: per turn <|im_start|>ROLE\\nTEXT<|im_end|>\\n. generate=True opens an
        assistant turn at the end. "<image>" is an image, except in an assistant's text."""
        opening = self.turn_start + self.encode("assistant") + self.header_end + self.newline + self.no_thought
        return self.chat_targets(messages)[0] + (opening if generate else [])

    def chat_targets(self, messages):
        """messages -> (ids of chat(generate=False), kinds): which tokens carry loss, per token.

        2: answers, i.e. an assistant's text and end of turn. 1: other chat tokens, with loss in stages 1 and 2 only.
        0: never. As in the paper's code, the newline behind Llama 3's <|end_header_id|> is part of the answer; ChatML
        has no token that ends a header: there the newline does it."""
        newline = 2 if self.header_end else 1
        ids, kinds = [] if self.bos is None else [self.bos], [] if self.bos is None else [0]
        for message in messages:
            role, text = map(message.get, ("role", "content")) if isinstance(message, dict) else (None, None)
            if role not in ("user", "assistant", "system") or not isinstance(text, str):
                raise UserError("a message is {'role': 'user', 'assistant' or 'system', 'content': str}, "
                                f"not {message!r:.80}")
            answer = role == "assistant"
            for part, kind in ((self.turn_start, 1), (self.encode(role), 0), (self.header_end, 1),
                               (self.newline, newline if answer else 0),
                               (self.encode_text(text) if answer else self.encode(text), 2 if answer else 0),
                               (self.turn_end, 2 if answer else 1), (self.after_turn, 0)):
                ids += part
                kinds += [kind] * len(part)
        return ids, kinds

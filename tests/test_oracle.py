"""
The paper's three stages a second time, out of transformers' models: the same losses, the same gradients.

`Oracle` shares no code with ours and takes no shortcut: one sample at a time, hence no padding; the logits of all
positions; a gradient for every parameter. The models have the depth of the paper's smallest pair (Llama-3.2-3B's
28 layers, CLIP ViT-L's 24) and hardly any width.
"""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM
from transformers import LlamaConfig as HFLlamaConfig

import recipes
import train
from data.batches import Sample, collate
from formats.tokenizer import BYTE_OF, LLAMA3_PATTERN, Tokenizer
from model import VLM, Llama, ViT
from surrogate import build_surrogate

TOLERANCE = 1e-4        # relative, in float32
SIZE = 24               # 3 x 3 patches of 8 pixels: 9 + CLS + start and end of image = 12 visual tokens
BOS, END_OF_TEXT, START, END, EOT = 257, 258, 259, 260, 261     # special tokens; a byte of text is its own id

# What each stage trains, by the beginnings of the names (paper, section 4)
PROJECTOR = ["adapter.", "embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."]
LAST_THIRD = [f"encoder.vision_model.encoder.layers.{i}." for i in range(16, 24)]       # 8 of the ViT's 24 layers
TWO_RANGES = [(10, 14), (18, 26)]       # the surrogate keeps 0-10, 15-18 and 27: its layers 10 and 14 are translators
RECIPES = [
    pytest.param("translator", [(16, 26)], PROJECTOR + ["decoder.model.layers.16."], id="translator"),
    pytest.param("translator", TWO_RANGES, PROJECTOR + ["decoder.model.layers.10.", "decoder.model.layers.14."],
                 id="two translators"),
    pytest.param("encoder", [(16, 26)], PROJECTOR + LAST_THIRD, id="encoder"),
    pytest.param("encoder", TWO_RANGES, PROJECTOR + LAST_THIRD, id="encoder, two translators"),
    pytest.param("decoder", [], PROJECTOR + LAST_THIRD + ["decoder."], id="decoder"),
]

# Images and text alone, of different lengths, of one turn and of two; an image in a sentence, and one that ends a turn.
CHATS = [
    [("user", "Based on the visual elements captured in this image of<image>, what color?"), ("assistant", "Red.")],
    [("user", "2 + 2?"), ("assistant", "4, I'd say."), ("user", "Why?"), ("assistant", "Ask Peano, not me: S(S(0)).")],
    [("user", "Name it.<image>"), ("assistant", "A café."), ("user", "Open?"), ("assistant", "Yes, until nine.")],
    [("user", "Hi"), ("assistant", "Yo")],
]
rng = np.random.default_rng(0)
PICTURES = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) if "<image>" in turns[0][1] else None
            for turns in CHATS]


# ---- the same weights for both, in the official formats


def randomize(module, std):
    """Weights so large that every layer, norm and bias matters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(mean=float("norm" in name and name.endswith("weight")), std=std)
    return module


@pytest.fixture(scope="module", params=["tied head", "own head"])
def files(request, tmp_path_factory):
    """A folder with a CLIP in vit/, and a Llama 3 with its tokenizer in llm/."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    vit = CLIPVisionModel(CLIPVisionConfig(image_size=SIZE, patch_size=8, hidden_size=24, intermediate_size=48,
                                           num_hidden_layers=24, num_attention_heads=3))
    rope = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=32)
    llm = LlamaForCausalLM(HFLlamaConfig(
        vocab_size=262, hidden_size=32, intermediate_size=48, num_hidden_layers=28, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, rope_parameters=rope,
        tie_word_embeddings=request.param == "tied head"))                  # as in Llama-3.2-3B; 3.1-8B has its own
    randomize(vit, 0.15).save_pretrained(folder / "vit")
    randomize(llm, 0.15).save_pretrained(folder / "llm")
    special = {"begin_of_text": BOS, "end_of_text": END_OF_TEXT, "eot_id": EOT,
               "start_header_id": START, "end_header_id": END}
    nul = next(char for char, byte in BYTE_OF.items() if byte == 0)         # the one merge: of what no text holds
    (folder / "llm/tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": i, "content": f"<|{name}|>"} for name, i in special.items()],
        "model": {"vocab": BYTE_OF | {nul + nul: 256}, "merges": [[nul, nul]]},
        "pre_tokenizer": {"pretokenizers": [
            {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": LLAMA3_PATTERN}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}}))
    return folder


# ---- the oracle: transformers and the paper's words


class Oracle:
    """transformers' models, with the projector and the vectors around the image as found in `vlm`."""

    def __init__(self, folder, vlm, ranges):
        self.llm = LlamaForCausalLM.from_pretrained(folder / "llm")
        self.vit = CLIPVisionModel.from_pretrained(folder / "vit")
        self.vit = getattr(self.vit, "vision_model", self.vit)      # one more level in transformers 4
        # the surrogate (section 3.2): of each range the first layer stays, as the translator, and the others go
        dropped = {i for first, last in ranges for i in range(first + 1, last + 1)}
        kept = [layer for i, layer in enumerate(self.llm.model.layers) if i not in dropped]
        self.llm.model.layers = torch.nn.ModuleList(kept)
        self.llm.config.num_hidden_layers = len(kept)
        width = self.llm.config.hidden_size
        self.adapter = torch.nn.Sequential(torch.nn.Linear(24, width), torch.nn.GELU(), torch.nn.Linear(width, width))
        self.adapter.load_state_dict(vlm.adapter.state_dict())
        self.soi, self.eoi = (e.detach().clone().requires_grad_() for e in (vlm.embd_soi, vlm.embd_eoi))

    def named_parameters(self):
        """Under the names of the checkpoints that the paper released."""
        parts = {"encoder.vision_model": self.vit, "adapter": self.adapter, "decoder": self.llm}
        named = {f"{part}.{n}": p for part, module in parts.items() for n, p in module.named_parameters()}
        return named | {"embd_soi": self.soi, "embd_eoi": self.eoi}

    def visual_tokens(self, picture):
        """(SIZE, SIZE, 3) uint8 -> (12, width): CLS and all patches, out of the last layer and post_layernorm."""
        pixels = (picture / 255 - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)   # CLIP's
        pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]       # (1, 3, SIZE, SIZE)
        hidden = self.vit(pixel_values=pixels).last_hidden_state[0]                     # (1 + 9, 24)
        assert len(hidden) == 10
        return torch.cat([self.soi, self.adapter(self.vit.post_layernorm(hidden)), self.eoi])

    def chat(self, turns, stage):
        """A conversation as a list of (token id or "image", does it carry loss?).

        <|begin_of_text|>, then per turn <|start_header_id|>ROLE<|end_header_id|>\\nTEXT<|eot_id|>.
        Stages 1 and 2, "answers + chat special tokens": in a user's turn these three special tokens carry loss, in an
        assistant's all but the role's name does. Stage 3, answers alone: of an assistant's turn all but the header's
        three tokens <|start_header_id|>ROLE<|end_header_id|>. The newline behind them counts, as in the paper's code.
        """
        special, out = stage != "decoder", [(BOS, False)]
        for role, text in turns:
            answer = role == "assistant"
            before, image, after = text.partition("<image>")
            out += [(START, special), *((byte, False) for byte in role.encode()), (END, special)]
            out += [(ord("\n"), answer), *((byte, answer) for byte in before.encode())]
            out += [("image", False)] * bool(image) + [(byte, answer) for byte in after.encode()]
            out += [(EOT, special or answer)]
        return out

    def loss(self, stage, chats, pictures):
        """(mean of -log p over all tokens of the batch that carry loss, how many these are)."""
        losses = []
        for turns, picture in zip(chats, pictures):
            embeds, wanted = [], {}                         # wanted: {position in the sequence: token}
            for token, carries_loss in self.chat(turns, stage):
                if carries_loss:
                    wanted[sum(map(len, embeds))] = token
                words = self.llm.model.embed_tokens.weight
                embeds.append(self.visual_tokens(picture) if token == "image" else words[[token]])
            logits = self.llm(inputs_embeds=torch.cat(embeds)[None], use_cache=False).logits[0]     # (T, vocab)
            losses += [-logits[t - 1].log_softmax(-1)[token] for t, token in wanted.items()]
        return torch.stack(losses).mean(), len(losses)


# ---- ours


def build(folder, stage, ranges):
    """(VLM, the parameters that the stage trains)."""
    llm = Llama.from_pretrained(folder / "llm")
    decoder = llm if stage == "decoder" else build_surrogate(llm, ranges)
    vlm = VLM(ViT.from_pretrained(folder / "vit"), decoder, Tokenizer.from_pretrained(folder / "llm"))
    return vlm, train.trained_parameters(vlm, stage)


def our_loss(vlm, stage, rows):
    """(sum of -log p over the targets, how many these are) of these CHATS as one batch."""
    samples = [Sample(None if PICTURES[i] is None else Image.fromarray(PICTURES[i]),
                           [dict(role=role, content=text) for role, text in CHATS[i]]) for i in rows]
    batch = collate(samples, vlm.tokenizer, vlm.n_visual, SIZE, recipes.RECIPES["small"][stage].loss_on)
    return vlm.loss(batch), int((batch["targets"] >= 0).sum())


def assert_same_gradients(trained, gradients):
    """The gradient on every trained parameter is the one of that name: their distance is small beside its norm."""
    for name, p in trained.items():
        # a bias of all keys moves all scores of a query alike, which softmax ignores: its gradient is 0, so no measure
        size = gradients[name.replace("k_proj.bias", "k_proj.weight")].norm()
        assert size > 0 and (p.grad - gradients[name]).norm() <= TOLERANCE * size, name


# ---- the tests


@pytest.mark.parametrize("stage, ranges, recipe", RECIPES)
def test_same_loss_and_gradients(files, stage, ranges, recipe):
    vlm, trained = build(files, stage, ranges)
    oracle = Oracle(files, vlm, ranges)
    everything = oracle.named_parameters()
    assert everything.keys() == dict(vlm.named_parameters()).keys()
    assert trained.keys() == {name for name in everything if name.startswith(tuple(recipe))}

    expected, n = oracle.loss(stage, CHATS, PICTURES)
    expected.backward()
    total, targets = our_loss(vlm, stage, range(len(CHATS)))
    assert targets == n
    assert total.item() / n == pytest.approx(expected.item(), rel=TOLERANCE)
    (total / n).backward()
    assert_same_gradients(trained, {name: p.grad for name, p in everything.items()})
    assert all(p.grad is None for name, p in vlm.named_parameters() if name not in trained)     # frozen is frozen


@pytest.mark.parametrize("stage", ["translator", "encoder", "decoder"])
def test_micro_batches(files, stage):
    """A batch in pieces, one of text alone, over the targets of them all: the gradients of the whole batch."""
    vlm, trained = build(files, stage, [(16, 26)])
    total, n = our_loss(vlm, stage, range(len(CHATS)))
    whole = dict(zip(trained, torch.autograd.grad(total / n, trained.values())))
    pieces = [our_loss(vlm, stage, rows) for rows in ([0], [1, 3], [2])]
    assert sum(targets for _, targets in pieces) == n
    (sum(loss for loss, _ in pieces) / n).backward()
    assert_same_gradients(trained, whole)

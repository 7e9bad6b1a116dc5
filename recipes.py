"""
Every number of every recipe: the small world's, and the paper's for Llama-3.2-3B, 3.1-8B, 3.1-70B and Qwen3-4B.

    TARGETS["small"]                    which LLM, which ViT, which layers a translator replaces
    RECIPES["small"]["encoder"]         how a stage trains for it
    override(recipe, ["lr=1e-4"])       what a user changes on the command line

The paper's numbers are those of sections 3.2 and 4, appendix A.5, and https://github.com/facebookresearch/zero.
"""
import dataclasses
from dataclasses import dataclass, field

from cli import UserError
from formats.official import DEFAULT_CLIP, DEFAULT_LLM
from model import LlamaConfig, ViTConfig

STAGES = ("translator", "encoder", "decoder")       # 1, 2 and 3 of the paper


def option(default, says, low=None, high=None):
    """A field of Recipe: its default, what it means (this is also its help text), and the range that it must lie in."""
    return field(default=default, metadata=dict(says=says, low=low, high=high))


@dataclass(frozen=True)
class Recipe:
    """How a stage trains. AdamW has betas (0.9, 0.999) and no weight decay in all of them, as in the paper."""
    steps: int = option(200, "optimizer steps; 0: all records once", 0, 10**9)
    batch: int = option(16, "samples a step, over all processes", 1, 2**16)
    micro_batch: int = option(0, "samples that a process takes through the model at once; 0: its share of the batch",
                              0, 2**16)
    lr: float = option(2e-4, "peak learning rate", 0, 1)
    warmup: float = option(0.0305, "share of the steps in which the learning rate rises; then a cosine to 0", 0, 1)
    clip: float = option(1.0, "largest norm of the gradient", 1e-6, 1e9)
    loss_on: str = option("answers+special", "which tokens carry loss: answers+special (chat tokens, too) or answers")
    balance: float = option(0.0, "more loss on short turns about images: exponent of the paper's dynamic loss weights, "
                            "1 there (appendix A.7; train.py, balance); 0: none", 0, 10)
    like_words: bool = option(False, "visual tokens as far from the mean word as words are; ours (model.py, as_words)")
    vit_layers: int = option(0, "layers of the ViT that learn, the last ones; 0: its last third", 0, 1000)
    vit_lr: float = option(1.0, "learning rate of the ViT, in units of lr", 0, 1)
    distill: int = option(0, "stage encoder: on every n-th step the full LLM teaches the translators, on the images as "
                          "the encoder shows them; 0: they stay frozen, as in the paper", 0, 10**9)
    distill_lr: float = option(0.3, "learning rate of these translators, in units of lr", 0, 1)
    noise: float = option(0.5, "noise on the visual tokens of these steps, up to this part of their length", 0, 10)
    max_length: int = option(4096, "longest sequence in tokens; longer ones are cut", 32, 10**6)
    checkpointing: bool = option(False, "keep only the layers' inputs for the backward pass, compute the rest again")
    dtype: str = option("auto", "auto, float32 or bfloat16; auto: bfloat16 where the chip multiplies it in hardware")
    workers: int = option(0, "processes that prepare the images ahead", 0, 256)
    save_every: int = option(100, "steps between checkpoints", 1, 10**9)
    UNUSED = ()                         # fields that mean nothing to a kind of recipe: these cannot be set


CHOICES = {"loss_on": ("answers+special", "answers"), "dtype": ("auto", "float32", "bfloat16")}


def check(recipe):
    """The recipe, if every field lies in its range; else a UserError that names the field and the range."""
    for f in dataclasses.fields(recipe):
        value, low, high = getattr(recipe, f.name), f.metadata["low"], f.metadata["high"]
        if f.name in CHOICES and value not in CHOICES[f.name]:
            raise UserError(f"{f.name}={value}: choose one of {', '.join(CHOICES[f.name])}")
        if f.type in (int, float) and not low <= value <= high:     # so written that nan fails, too
            raise UserError(f"{f.name}={value:g}: {f.name} must be between {low:g} and {high:g}")
    return recipe


def override(recipe, settings):
    """`recipe` with `settings`, a list of "key=value"; UserError for an unknown key, wrong type or bad value."""
    fields, new = {f.name: f for f in dataclasses.fields(recipe) if f.name not in recipe.UNUSED}, {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or key not in fields:
            what = f"no field of the recipe is called {key!r}" if equals else f"cannot read {text!r}: write key=value"
            raise UserError(f"{what}; there are {', '.join(fields)}")
        kind = fields[key].type
        try:
            yes_no = {"true": True, "1": True, "false": False, "0": False}
            new[key] = yes_no[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            names = {int: "a whole number", float: "a number", bool: "true or false"}
            raise UserError(f"{text}: {key} must be {names[kind]}") from None
    return check(dataclasses.replace(recipe, **new))


def help_text(recipe):
    """One line a field: name, value, meaning."""
    return "\n".join(f"  {f.name + '=' + str(getattr(recipe, f.name)):26}{f.metadata['says']}"
                     for f in dataclasses.fields(recipe) if f.name not in recipe.UNUSED)


# ---------------------------------------------------------------------------------------------------------------------
# The small world: SmolLM2-135M and a small ViT; stages 0 to 2 take three hours of one CPU core


@dataclass(frozen=True)
class Target:
    """What the stages work on. The configs are known before any download: studies/cost.py counts with them."""
    llm: str                            # folder, .gguf file or hub name
    vit: str                            # a checkpoint of extras/vit.py, or a CLIP
    ranges: tuple                       # ((first, last), ...): layers that one translator each replaces, ends included
    llm_config: LlamaConfig = None
    vit_config: ViTConfig = None


@dataclass(frozen=True)
class Distillation(Recipe):
    """Of extras/distillation.py."""
    steps: int = option(2000, "optimizer steps", 1, 10**9)
    epochs: int = option(4, "how often the same samples are read; steps / epochs steps of them are fresh", 1, 1000)
    UNUSED = ("balance", "like_words", "vit_layers", "vit_lr", "distill", "distill_lr", "noise", "micro_batch",
              "checkpointing", "workers")


@dataclass(frozen=True)
class Pretraining(Recipe):
    """Of extras/vit.py."""
    steps: int = option(600, "optimizer steps", 1, 10**9)
    UNUSED = (*(set(Distillation.UNUSED) - {"workers"}), "loss_on", "max_length", "dtype")


SMALL = dict(
    vit=Pretraining(batch=128, lr=1e-3, workers=1),                     # stage 0, extras/vit.py; shipped: 3500
    distillation=Distillation(batch=8, lr=5e-4),                        # stage 1, extras/distillation.py
    translator=Recipe(steps=400, lr=1e-3, like_words=True),             # stage 1, the paper's
    encoder=Recipe(steps=2000, lr=1e-3, like_words=True, vit_layers=3, vit_lr=0.1, distill=3),     # stage 2
    decoder=Recipe(steps=30, lr=5e-5, loss_on="answers", like_words=True, vit_layers=3),
)

# ---------------------------------------------------------------------------------------------------------------------
# The paper


def paper(steps=4393):
    """The paper's three stages on LLaVA-1.5-665K: one epoch, and for stage 3 20 % of it. steps: of stage 1."""
    common = dict(checkpointing=True, workers=2)
    encoder = Recipe(steps=4880, batch=128, micro_batch=8, lr=5e-5, **common)
    return dict(
        translator=Recipe(steps=steps, batch=256, micro_batch=8, lr=1e-4, **common),
        encoder=encoder,
        direct=dataclasses.replace(encoder, lr=2e-4),       # stage 2 on the full LLM: --direct
        decoder=Recipe(steps=1040, batch=128, micro_batch=4, lr=5e-5, loss_on="answers", **common),
    )


def llama3(factor, **sizes):
    return LlamaConfig(vocab_size=128256, head_dim=128, rope_theta=500000.0, max_position_embeddings=131072,
                       num_key_value_heads=8,
                       rope_scaling=dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=8192), **sizes)


CLIP = dict(vit=DEFAULT_CLIP, vit_config=ViTConfig(
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096,
    num_hidden_layers=24, num_attention_heads=16))
TARGETS = {
    "small": Target(DEFAULT_LLM, "assets/vit.safetensors", ((20, 23), (24, 28)), LlamaConfig(), ViTConfig()),
    "llama-3.2-3b": Target("meta-llama/Llama-3.2-3B-Instruct", ranges=((16, 26),), **CLIP, llm_config=llama3(
        32.0, num_hidden_layers=28, hidden_size=3072, intermediate_size=8192, num_attention_heads=24,
        tie_word_embeddings=True)),
    "llama-3.1-8b": Target("meta-llama/Llama-3.1-8B-Instruct", ranges=((17, 30),), **CLIP, llm_config=llama3(
        8.0, num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        tie_word_embeddings=False)),
    "llama-3.1-70b": Target("meta-llama/Llama-3.1-70B-Instruct", ranges=((40, 78),), **CLIP, llm_config=llama3(
        8.0, num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
        tie_word_embeddings=False)),
    "qwen3-4b": Target("Qwen/Qwen3-4B", ranges=((22, 34),), **CLIP, llm_config=LlamaConfig(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
        qk_norm=True)),
}
RECIPES = {
    "small": SMALL,
    "llama-3.2-3b": paper(steps=3568),          # stage 1 of the released 3B checkpoint
    "llama-3.1-8b": paper(),
    "llama-3.1-70b": paper(),
    "qwen3-4b": paper(),
}

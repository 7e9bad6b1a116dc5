"""
Llama (and Qwen), CLIP's vision tower (ViT), and the vision language model (VLM) that joins them, from scratch in one
file.

    image -> ViT -> projector -> visual tokens -> Llama -> text

Read top to bottom: 1) Llama, 2) ViT, 3) VLM. Parameter names are those of the official checkpoints, so that loading is
a plain `load_state_dict`; formats/official.py knows where official files are and how each format spells those names.

References:
1) Llama 3: https://arxiv.org/abs/2407.21783, code at https://github.com/meta-llama/llama-models; Qwen2.5 and Qwen3
   (https://arxiv.org/abs/2412.15115, https://arxiv.org/abs/2505.09388) are the same but for two fields of LlamaConfig
2) CLIP: https://arxiv.org/abs/2103.00020, parameter names of Hugging Face's `CLIPVisionModel`
3) The method: https://arxiv.org/abs/2505.22664 (Zero-Shot Vision Encoder Grafting via LLM Surrogates)
"""
import copy
import math
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import kernels
from cli import MissingFile, UserError
from data.batches import wrap
from data.images import preprocess
from formats import checkpoints, official
from formats.tokenizer import IMAGE, Tokenizer
from generation import KVCache, check_ids, check_logits, collect, in_range, sample
from kernels import int8
from kernels.graph import Graphs, record

# ---------------------------------------------------------------------------------------------------------------------
# 1. Llama


@dataclass
class LlamaConfig:
    """Sizes of a Llama, named as in Hugging Face's config.json. The defaults are SmolLM2-135M's."""
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536       # width of the MLP
    num_hidden_layers: int = 30
    num_attention_heads: int = 9        # query heads
    num_key_value_heads: int = 3        # each key/value head serves a group of query heads
    head_dim: int = 64                  # not always hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    rope_scaling: dict | None = None    # Llama 3.1 and 3.2 stretch the slow frequencies to read longer texts
    tie_word_embeddings: bool = True    # is the LM head the embedding matrix itself?
    max_position_embeddings: int = 8192
    qkv_bias: bool = False              # Qwen2.5: q, k and v have a bias
    qk_norm: bool = False               # Qwen3: every head of q and k goes through an RMSNorm


def rope_frequencies(config):
    """Rotation speed of each pair of channels, in radians per position: (head_dim / 2,) float32.

    With Llama 3.1's scaling, as `apply_scaling` in Meta's model.py: wavelengths beyond the context that the model was
    first trained on turn `factor` times slower, short ones stay, and those between are blended.
    """
    D = config.head_dim
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    s = config.rope_scaling
    if s is None:
        return freqs
    if "divisors" in s:                                                     # as a .gguf file says the same
        return freqs / torch.tensor(s["divisors"])
    turns = s["original_max_position_embeddings"] * freqs / (2 * math.pi)   # full turns within the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)                     # 0: slow, scaled; 1: fast, untouched
    return (1 - smooth) * freqs / s["factor"] + smooth * freqs


# Trained weights stay in float32, so that small updates are not rounded away; activations may be bfloat16, which is
# faster. So these modules cast their weights to the activations' dtype. Where the two are the same, `to` does nothing.


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x, residual=None):
        # with a residual: returns (norm(x + residual), x + residual), one pass over memory instead of two
        return kernels.rms_norm(x, self.weight.to(x.dtype), self.eps, residual)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary position embeddings."""

    def __init__(self, config):
        super().__init__()
        C, D, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.head_dim = D
        self.q_proj = Linear(C, config.num_attention_heads * D, bias=bias)
        self.k_proj = Linear(C, config.num_key_value_heads * D, bias=bias)
        self.v_proj = Linear(C, config.num_key_value_heads * D, bias=bias)
        self.q_norm, self.k_norm = (RMSNorm(D, config.rms_norm_eps) if config.qk_norm else nn.Identity()
                                    for _ in range(2))
        self.o_proj = Linear(config.num_attention_heads * D, C, bias=False)

    def forward(self, x, cos, sin, cache=None, layer=0):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))   # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))   # (B, T, Hkv, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)    # (B, T, Hkv, D)
        q, k = kernels.apply_rope(q, cos, sin), kernels.apply_rope(k, cos, sin)
        lengths = None
        if cache is not None:                               # generation: keys are stored rotated, once and for all
            k, v, lengths = cache.append(layer, k, v)       # (B, S, Hkv, D): all keys and values so far
        out = kernels.attention(q, k, v, causal=True, lengths=lengths)
        return self.o_proj(out.reshape(B, T, -1))           # (B, T, H, D) -> (B, T, H*D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class LlamaLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None, layer=0):
        attn = self.self_attn(self.input_layernorm(x), cos, sin, cache, layer)
        h, x = self.post_attention_layernorm(attn, residual=x)      # x = x + attn, h = norm(x)
        return x + self.mlp(h)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(LlamaLayer(config) for _ in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope_cache = None      # (cos, sin), built when first needed
        self.told = False           # that a text is too long: said once
        self.words = None           # cached, see `word_statistics`
        self.graphs = Graphs()      # decoding steps on a GPU
        self.activation_dtype = None    # in training: the dtype of hidden states, where some weights are float32
        self.checkpointed = ()      # in training: layers that keep only their input, and compute the rest anew backward

    @classmethod
    def from_pretrained(cls, path=official.DEFAULT_LLM, dtype=torch.float32, device="cpu", layers=None, shard=None,
                        quantize=None):
        """Load official weights, frozen. `path`: a folder (Hugging Face's or Meta's layout), .gguf file or hub name.

        layers: a list of the layers to keep (a surrogate), numbered anew; the others are never read. shard: a function
        that shards the empty model over several GPUs (extras/parallel.py). quantize="int8": weights in 8 bits, to
        decode faster (kernels/int8.py). Raises MissingFile or UserError, each with one line, for files that are
        missing, damaged or of another model.
        """
        if quantize not in (None, "int8"):
            raise UserError(f"quantize={quantize!r}: choose None or \"int8\"")
        kernels.check_choice()
        path = official.find(path)
        config, tensors = LlamaConfig(**official.llama_config(path)), official.llama_tensors(path)
        config.tie_word_embeddings &= not official.has_own_head(tensors)
        if layers is not None:
            tensors = official.pick_layers(tensors, layers, config.num_hidden_layers)
            config.num_hidden_layers = len(layers)
        with torch.device("meta"):                  # no memory yet: every tensor goes straight to its place, one by one
            model = cls(config)
        if quantize:
            int8.quantize(model)
            tensors = int8.rounded(tensors, config.tie_word_embeddings)
        if shard:
            shard(model, dtype)
        official.load(model, tensors, dtype, device, path)
        return model.requires_grad_(False).eval()

    @property
    def lm_head_weight(self):
        """(vocab, C): what turns a hidden state into logits."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def dtype(self):
        """In which it computes: that of the hidden states."""
        return self.activation_dtype or self.model.norm.weight.dtype

    @property
    def device(self):
        return self.model.norm.weight.device

    def rope(self, n):
        """cos and sin of the angles at the positions 0 … n-1: (n, D / 2) float32 each; cached."""
        if self.rope_cache is None or len(self.rope_cache[0]) < n or self.rope_cache[0].device != self.device:
            angles = torch.arange(max(n, 1024)).float()[:, None] * rope_frequencies(self.config)
            self.rope_cache = (angles.cos().to(self.device), angles.sin().to(self.device))
        return self.rope_cache[0][:n], self.rope_cache[1][:n]

    def embed(self, tokens):
        return self.model.embed_tokens(tokens).to(self.dtype)               # (B, T) -> (B, T, C)

    def as_words(self, x):
        """Vectors (…, C) -> points in their directions from the mean word embedding, as far from it as a word is on
        average. So visual tokens stay in the region where the surrogate was distilled."""
        mean, distance = self.word_statistics()
        return (mean + distance * F.normalize(x.float(), dim=-1)).to(x.dtype)

    @torch.no_grad()
    def word_statistics(self):
        """The mean word embedding (C,), and the words' mean distance from it; cached while embeddings are frozen."""
        learns = self.model.embed_tokens.weight.requires_grad
        if self.words is None or learns or self.words[0].device != self.device:
            E = self.embed(torch.arange(self.config.vocab_size, device=self.device)).float()            # (vocab, C)
            self.words = E.mean(0), (E - E.mean(0)).norm(dim=-1).mean()
        return self.words

    def run(self, x, start=0, stop=None, cache=None):
        """Hidden states (B, T, C) through the layers start … stop-1: in pieces, so that two models can share a trunk.

        With a cache, whoever calls this calls `cache.advance` when all layers have run.
        """
        if cache is None:
            cos, sin = self.rope(x.shape[1])
            if x.shape[1] > self.config.max_position_embeddings and not self.told:
                self.told = True
                print(f"warning: {x.shape[1]} positions, of which this LLM knows only the first "
                      f"{self.config.max_position_embeddings} (max_length=… cuts)", file=sys.stderr)
        else:
            positions = cache.positions(x.shape[1])                         # (T,), or (B, T) where rows differ
            cache.tables = self.rope(cache.size)    # held there, since a CUDA graph reads them where they are
            cos, sin = (table[positions] for table in cache.tables)
        for i in range(len(self.model.layers))[start:stop]:
            if i in self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(self.model.layers[i], x, cos, sin, use_reentrant=False)
            else:
                x = self.model.layers[i](x, cos, sin, cache, i)
        return x

    def logits(self, x):
        """Hidden states (…, C) -> logits (…, vocab): the final norm and the LM head."""
        x = self.model.norm(x)
        return self.lm_head(x) if hasattr(self, "lm_head") else F.linear(x, self.lm_head_weight.to(x.dtype))

    def forward(self, tokens=None, embeds=None, cache=None):
        """Token ids (B, T), or embeddings (B, T, C) in their place -> logits (B, T, vocab)."""
        x = self.run(self.embed(tokens) if embeds is None else embeds, cache=cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.logits(x)

    def loss(self, x, targets, factors=None):
        """Sum of -log p(target) after the last layer's x (B, T, C), where targets (B, T) is not negative; each
        multiplied by its factor (B, T), if there are any.

        Only those positions meet the LM head: with 579 visual tokens and a vocabulary of 128,256, logits for all would
        be most of the memory of a training step. Keep `targets` on the CPU: then finding them does not stall a GPU.
        """
        index = (targets.flatten() >= 0).nonzero().squeeze(1)               # (N,) positions with a target
        wanted = targets.flatten()[index].to(x.device, non_blocking=True)   # (N,)
        h = x.flatten(0, 1)[index.to(x.device, non_blocking=True)]          # (B*T, C) -> (N, C)
        if factors is not None:
            factors = factors.flatten()[index].to(x.device, non_blocking=True)                    # (N,)
        return kernels.linear_cross_entropy(self.model.norm(h), self.lm_head_weight.to(h.dtype), wanted, factors)

    @torch.no_grad()
    def stream(self, embeds, lengths=None, max_new_tokens=64, temperature=0.0, top_p=1.0, generator=None):
        """Yield the next token of every row, (B,) at a time. embeds (B, T, C), right-padded if lengths (B,) vary.

        temperature 0 is greedy; top_p keeps the smallest set of tokens whose probabilities reach that sum; `generator`
        (on the model's device) makes sampling repeatable.
        """
        B, T, _ = embeds.shape
        given = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        max_new_tokens, temperature, top_p = (in_range(name, x) for name, x in given.items())
        last = torch.full((B,), T - 1) if lengths is None else lengths.cpu() - 1
        cache = KVCache(self, B, T + max_new_tokens)
        x = self.run(embeds, cache=cache)
        cache.advance(T, lengths)
        yield from self.decode(x[torch.arange(B), last], cache, max_new_tokens, temperature, top_p, generator)

    @torch.no_grad()
    def decode(self, x, cache, max_new_tokens, temperature=0.0, top_p=1.0, generator=None):
        """Yield tokens (B,), given the last position's hidden state x (B, C) and a cache of everything up to it.

        On a GPU a step is one CUDA graph, in a cache of its own: this one stays as it is.
        """
        step = lambda token: self.run(self.embed(token[:, None]), cache=cache)[:, -1]
        with self.graph(cache) if x.is_cuda and max_new_tokens > 1 else nullcontext((step, cache)) as (step, used):
            for i in range(max_new_tokens):
                logits = self.logits(x)                                     # only the last position meets the LM head
                if i == 0:
                    check_logits(logits)
                token = sample(logits, temperature, top_p, generator)
                yield token
                if i < max_new_tokens - 1:
                    x = step(token)
                    used.advance(1)

    @contextmanager
    def graph(self, cache):
        """(a decoding step recorded as a CUDA graph, its cache, which now holds what this one holds); kept for later
        answers. The graph depends on batch, size (rounded up, so that many answers share one) and the weights' places.
        """
        size = max(cache.size, min(-(-cache.size // 256) * 256, self.config.max_position_embeddings))
        batch = len(cache.keys[0])
        key = batch, size, *(p.data_ptr() for p in self.state_dict().values())

        def make(stream):
            fixed = KVCache(self, batch, size)
            fixed.fix()
            step = lambda token: self.run(self.embed(token[:, None]), cache=fixed)[:, -1]
            return record(step, torch.zeros(batch, dtype=torch.long, device=self.device), stream), fixed

        with self.graphs.borrow(key, make) as (step, fixed):
            fixed.take(cache)
            yield step, fixed

    def generate(self, prompts=None, embeds=None, lengths=None, stop=(), **options):
        """Continue prompts (token lists of any lengths) or embeds: a list of new token lists, stop token excluded."""
        if embeds is None:
            if not prompts or not all(prompts):
                raise UserError("an empty prompt cannot be continued: give at least one token, as Tokenizer.chat does")
            check_ids(prompts, self.config.vocab_size)
            lengths = torch.tensor([len(p) for p in prompts])
            padded = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)     # (B, T)
            embeds = self.embed(padded.to(self.device))
        if lengths is not None and int(lengths.min()) == embeds.shape[1]:
            lengths = None                                                  # all of one length: nothing to mask
        return collect(self.stream(embeds, lengths, **options), stop) or [[] for _ in embeds]


# ---------------------------------------------------------------------------------------------------------------------
# 2. ViT


@dataclass
class ViTConfig:
    """Sizes of a vision tower, named as in CLIP's config.json. The defaults are the small ViT's (drawn world)."""
    image_size: int = 64
    patch_size: int = 16
    hidden_size: int = 192
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 3
    layer_norm_eps: float = 1e-5

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


class ViTEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(C) * 0.02)
        self.patch_embedding = nn.Conv2d(3, C, config.patch_size, stride=config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.num_patches + 1, C)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        weight, stride = self.patch_embedding.weight.to(pixels.dtype), self.patch_embedding.stride
        x = F.conv2d(pixels, weight, stride=stride).flatten(2).transpose(1, 2)      # (N, 3, S, S) -> (N, P, C)
        cls = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)                # (N, 1, C)
        return torch.cat([cls, x], dim=1) + self.position_embedding.weight.to(x.dtype)      # (N, 1 + P, C)


class ViTAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (Linear(C, C) for _ in range(4))

    def forward(self, x):
        N, T, C = x.shape
        q, k, v = (p(x).view(N, T, self.num_heads, -1)                      # (N, T, H, D)
                   for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(kernels.attention(q, k, v, causal=False).reshape(N, T, C))


class ViTLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.self_attn = ViTAttention(config)
        self.layer_norm1 = LayerNorm(C, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict(dict(fc1=Linear(C, I), fc2=Linear(I, C)))
        self.layer_norm2 = LayerNorm(C, eps=config.layer_norm_eps)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.mlp.fc1(self.layer_norm2(x))
        # quick GELU, a cheap approximation of GELU (Hendrycks & Gimpel 2016)
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))


class ViT(nn.Module):
    """CLIP's vision tower. `pre_layrnorm` is spelled as in the official checkpoints."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        C, eps = config.hidden_size, config.layer_norm_eps
        self.vision_model = nn.ModuleDict(dict(
            embeddings=ViTEmbeddings(config),
            pre_layrnorm=LayerNorm(C, eps=eps),
            encoder=nn.ModuleDict(dict(layers=nn.ModuleList(
                ViTLayer(config) for _ in range(config.num_hidden_layers)))),
            post_layernorm=LayerNorm(C, eps=eps),
        ))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a vision tower, frozen: CLIP's (folder or hub name, e.g. openai/clip-vit-large-patch14-336), or one of
        extras/vit.py (.safetensors)."""
        if Path(path).suffix == ".safetensors":
            tensors, about = checkpoints.open_checkpoint(path)
            if about.get("stage") != "vit":
                raise UserError(f"{path} holds {about.get('stage', 'nothing that was trained here')}, not a ViT: "
                                "make one with `python -m extras.vit`")
            sizes = official.vit_sizes(about.get("vit_config"), path)
            tensors = {n.removeprefix("encoder."): read for n, read in tensors.items()}
        else:
            path = official.find(path)
            sizes, tensors = official.vit_config(path), official.vit_tensors(path)
        with torch.device("meta"):
            model = cls(ViTConfig(**sizes))
        official.load(model, tensors, dtype, device, path)
        return model.requires_grad_(False).eval()

    @property
    def layers(self):
        return self.vision_model.encoder.layers

    def forward(self, pixels):
        """pixels (N, 3, S, S), normalised -> last hidden states (N, 1 + patches, C), before post_layernorm."""
        x = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        for layer in self.layers:
            x = layer(x)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# 3. VLM


class VLM(nn.Module):
    """An encoder, a projector and a decoder: images become visual tokens in the embedding space of the LLM.

    The names `encoder`, `adapter` (the projector), `embd_soi`, `embd_eoi` and `decoder` are those of the checkpoints
    that the paper released. Grafting is nothing more than calling this with another decoder.
    """

    def __init__(self, encoder, decoder, tokenizer=None, like_words=False, llava=None):
        """like_words: give every visual token the length of a word (see `as_words`). Ours, not the paper's. llava: a
        VLM of LLaVA's own code, whose visual tokens are those of an inner layer, without norm, start and end, and
        without CLS: dict(layer=-2, cls=False)."""
        super().__init__()
        C, d, ends = encoder.config.hidden_size, decoder.config.hidden_size, 0 if llava else 1
        self.encoder = encoder
        self.cls = not llava or llava["cls"]
        if llava:
            del encoder.layers[len(encoder.layers) + 1 + llava["layer"]:]       # -1 is the last
            encoder.vision_model["post_layernorm"] = nn.Identity()
        self.adapter = nn.Sequential(Linear(C, d), nn.GELU(), Linear(d, d))
        # start and end of the image: they tell the LLM which positions are no words, as its chat tokens mark the turns
        self.embd_soi = nn.Parameter(torch.randn(ends, d) * d ** -0.5)
        self.embd_eoi = nn.Parameter(torch.randn(ends, d) * d ** -0.5)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.like_words = like_words

    @classmethod
    def untrained(cls, vit, decoder, tokenizer, like_words=False, seed=0, checkpoint=None):
        """Where training starts: a pre-trained ViT (see `base_vit`), and a projector that is random, but for one seed
        always the same."""
        encoder = base_vit(vit, checkpoint or vit)
        torch.manual_seed(seed)
        return cls(encoder, decoder, tokenizer, like_words)

    @property
    def n_visual(self):
        """How many positions an image takes in the LLM: all patches, CLS, start and end (579 for CLIP ViT-L/14-336)."""
        return self.encoder.config.num_patches + self.cls + len(self.embd_soi) + len(self.embd_eoi)

    def visual_tokens(self, pixels):
        """pixels (N, 3, S, S) -> (N, n_visual, d), where d is the width of the LLM (paper, section 3)."""
        pixels = pixels.to(self.decoder.device, self.decoder.dtype, non_blocking=True)
        x = self.encoder.vision_model.post_layernorm(self.encoder(pixels))  # (N, 1 + P, C): CLS stays, but for LLaVA
        x = self.adapter(x if self.cls else x[:, 1:])                       # (N, 1 + P, d)
        soi, eoi = (e.to(x.dtype).expand(len(x), *e.shape) for e in (self.embd_soi, self.embd_eoi))
        x = torch.cat([soi, x, eoi], dim=1)                   # (N, 1 + (1 + P) + 1, d)
        return self.decoder.as_words(x) if self.like_words else x

    def embed(self, tokens, pixels=None):
        """Token ids (B, T), IMAGE at every place of a visual token, and pixels (N, 3, S, S) -> embeddings (B, T, d).

        Keep `tokens` on the CPU: then finding the images does not stall a GPU.
        """
        is_image = tokens == IMAGE
        x = self.decoder.embed(tokens.masked_fill(is_image, 0).to(self.decoder.device, non_blocking=True))  # (B, T, d)
        if pixels is None:
            return x
        index = is_image.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)     # (N * n_visual,)
        visual = self.visual_tokens(pixels).to(x.dtype).flatten(0, 1)       # (N * n_visual, d), in order
        return x.flatten(0, 1).index_copy(0, index, visual).view_as(x)      # (B, T, d)

    def loss(self, batch, trunk=None):
        """Sum of -log p over the targets of a batch (see data.batches.collate); divide it by their number in the global
        batch.
        trunk (B, T, d): the output of the layers that surrogate and LLM share, where these have run already.

        The same in all stages: they differ in which parameters require a gradient, and in `self.decoder`.
        """
        if trunk is None:
            x = self.decoder.run(self.embed(batch["tokens"], batch["pixels"]))              # (B, T, d)
        else:
            x = self.decoder.run(trunk, self.decoder.n_shared)
        return self.decoder.loss(x, batch["targets"], batch.get("factors"))

    @classmethod
    def from_pretrained(cls, llm=official.DEFAULT_LLM, encoder="assets/encoder.safetensors", dtype=torch.float32,
                        device="cpu", tokenizer=None, vit=None):
        """A VLM out of an LLM (path, hub name, or a Llama already loaded) and a checkpoint of train.py's stage encoder
        (file, folder or hub name), of the paper's authors, or a LLaVA's folder.

        The checkpoint holds only what was trained; its metadata names the ViT that it started from. vit: another; the
        authors' checkpoints name none, and are read over CLIP ViT-L/14-336.
        """
        tensors, about = checkpoints.read_checkpoint(encoder)
        llava = about.get("llava")
        if not llava and not {"adapter.0.weight", "embd_soi"} <= tensors.keys():    # stage vit has only the first
            raise UserError(f"{encoder} (stage {about.get('stage', 'unknown')}) holds no whole projector: "
                            "give a checkpoint of train.py's stage encoder or decoder")
        decoder = llm if isinstance(llm, Llama) else Llama.from_pretrained(llm, dtype, device)
        vit = vit or about.get("vit", official.DEFAULT_CLIP)
        vit = base_vit(vit, encoder, decoder.dtype, decoder.device)
        if tokenizer is None:
            name = about.get("llm", official.DEFAULT_LLM) if isinstance(llm, Llama) else llm
            tokenizer = Tokenizer.from_pretrained(official.find(name))
        needs = ["adapter."] if llava else checkpoints.held(about, tensors, vit.config.num_hidden_layers)
        if about.get("stage") == "decoder" or "decoder.model.embed_tokens.weight" in tensors:
            # stage 3 trained the full LLM itself: a copy takes the new weights
            if isinstance(getattr(decoder, "lm_head", None), int8.Int8Linear):
                raise UserError(f"{encoder} holds weights of the LLM itself (stage decoder): load it without int8, "
                                "by --no-int8 or quantize=None")
            decoder = copy.deepcopy(decoder)
            decoder.words = None                    # they will be others
        else:                                       # what other stages hold of a decoder belongs to the surrogate
            tensors = {n: t for n, t in tensors.items() if not n.startswith("decoder.")}
        like_words = about.get("recipe", {}).get("like_words", False)
        vlm = cls(vit, decoder, tokenizer, like_words, llava).to(decoder.device, decoder.dtype)
        checkpoints.load_checkpoint(vlm, tensors, encoder, needs=needs)
        return vlm.requires_grad_(False).eval()

    def prompt(self, messages):
        """Chat messages (data.batches.wrap puts "<image>" into a question) -> token ids, n_visual IMAGEs an image."""
        ids = []
        for t in self.tokenizer.chat(messages):
            ids += [t] * (self.n_visual if t == IMAGE else 1)
        return ids

    @torch.no_grad()
    def embed_prompts(self, prompts, images):
        """Prompts (lists of ids) and their images, in order -> embeddings (B, T, d), padded; lengths (B,)."""
        check_ids(prompts, self.decoder.config.vocab_size, (IMAGE,))
        places = sum(p.count(IMAGE) for p in prompts)
        if places != len(images) * self.n_visual:
            raise UserError(f"{len(images)} images given, but the prompts have places for {places / self.n_visual:g}")
        lengths = torch.tensor([len(p) for p in prompts])
        tokens = pad_sequence([torch.tensor(p) for p in prompts], True, self.tokenizer.pad)     # (B, T)
        size = self.encoder.config.image_size
        pixels = torch.stack([preprocess(i, size) for i in images]) if images else None
        return self.embed(tokens, pixels), lengths

    def generate(self, prompts, images, **options):
        """Continue prompts (lists of ids, as of `prompt`) with images: lists of new ids. Options as Llama.generate."""
        embeds, lengths = self.embed_prompts(prompts, images)
        return self.decoder.generate(embeds=embeds, lengths=lengths, stop=self.tokenizer.stop_tokens, **options)

    def chat(self, image, question, **options):
        """Ask `question` about an image (path or PIL image): the answer as a string."""
        prompt = self.prompt([{"role": "user", "content": wrap(question)}])
        return self.tokenizer.decode(self.generate([prompt], [image], **options)[0]).strip()


def base_vit(name, checkpoint, dtype=torch.float32, device="cpu"):
    """The ViT that a checkpoint started from: a file of extras/vit.py, or a CLIP (folder or hub name)."""
    if Path(name).suffix != ".safetensors":
        return ViT.from_pretrained(name, dtype, device)
    if not checkpoints.checkpoint_file(checkpoint).exists():
        raise MissingFile(f"no such checkpoint: {checkpoint}")
    return ViT.from_pretrained(checkpoints.beside(name, checkpoint), dtype, device)

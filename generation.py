"""
What a Llama needs to continue a text: a cache of keys and values, the choice of a token, and checks of what is asked.
The loop itself is `Llama.stream` and `Llama.decode` in model.py.
"""
import copy

import torch
import torch.nn.functional as F

from cli import UserError, number

SAMPLING = dict(max_new_tokens=(int, 0, 10**6), temperature=(float, 0, 100), top_p=(float, 1e-6, 1))    # kind and range


class KVCache:
    """Keys and values of the positions read so far, so that a new token does not recompute them.

    Room for `size` positions is taken at once. Rows may differ in length: they are padded on the right, and a row's
    next token overwrites its padding.
    """

    def __init__(self, llm, batch, size):
        c = llm.config
        if size > c.max_position_embeddings:
            raise UserError(f"{size} positions are too many: this LLM reads at most {c.max_position_embeddings}")
        shape = (batch, size, c.num_key_value_heads, c.head_dim)
        self.size = size
        self.keys = [torch.zeros(shape, dtype=llm.dtype, device=llm.device) for _ in llm.model.layers]
        self.values = [torch.zeros_like(k) for k in self.keys]
        self.used = 0               # positions used in the longest row: the host knows it, so slicing needs no sync
        self.lengths = None         # (B,) positions used in each row, where they differ (or the cache is fixed)
        self.places = self.valid = None     # then: where the new tokens go, and the lengths with them
        self.tables = None          # cos and sin of all positions, held here for CUDA graphs

    def positions(self, T):
        """Positions of the next T tokens: (T,), or (B, T) where rows differ. Call it before every `append` of them."""
        new = torch.arange(T, device=self.keys[0].device)
        if self.lengths is None:
            return new + self.used
        rows = torch.arange(len(self.lengths), device=new.device)[:, None]
        self.places, self.valid = (rows, self.lengths[:, None] + new), self.lengths + T     # once, not in every layer
        return self.places[1]

    def append(self, layer, k, v):
        """Store k and v (B, T, Hkv, D) behind what is there. Returns all keys, all values, lengths if rows differ."""
        T = k.shape[1]
        K, V = self.keys[layer], self.values[layer]
        if self.lengths is None:
            K[:, self.used:self.used + T], V[:, self.used:self.used + T] = k, v
        else:
            K[self.places], V[self.places] = k, v                           # rows (B, 1), positions (B, T)
        return K[:, :self.used + T], V[:, :self.used + T], None if self.lengths is None else self.valid

    def advance(self, T, lengths=None):
        """Count the T positions just stored; `lengths` (B,) says how many of each row are real (prompts are padded)."""
        new = T if lengths is None else lengths.to(self.keys[0].device)
        if self.lengths is not None:
            self.lengths += new
        elif lengths is not None:
            self.lengths = new + self.used
        self.used += T

    def fix(self):
        """From now on attend to all `size` positions, of which `lengths`, a tensor, says the valid ones: every step has
        the same shapes then, and can be replayed as a CUDA graph."""
        if self.lengths is None:
            self.lengths = torch.full((len(self.keys[0]),), self.used, device=self.keys[0].device)
        self.used = self.size

    def take(self, other):
        """Copy another cache, no larger than this one, into this one, which is fixed."""
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values):
            mine[:, :other.used] = theirs[:, :other.used]
        self.lengths.copy_(other.used if other.lengths is None else other.lengths)

    def repeat(self, n, room, rows=slice(None)):
        """A new cache with every row (or these) n times, side by side, and `room` more positions: n continuations."""
        more = (0, 0, 0, 0, 0, room)
        grow = lambda x: F.pad(x[rows, :self.used].repeat_interleave(n, 0), more)   # (rows*n, used + room, Hkv, D)
        new = copy.copy(self)
        new.keys, new.values, new.size = [grow(k) for k in self.keys], [grow(v) for v in self.values], self.used + room
        new.lengths = None if self.lengths is None else self.lengths[rows].repeat_interleave(n)
        return new


def collect(stream, stop=()):
    """Tokens (B,) at a time -> a list of tokens per row, each up to its stop token (None if nothing came)."""
    out = done = None
    for tokens in stream:
        out, done = out or [[] for _ in tokens], done or [False for _ in tokens]
        for i, t in enumerate(tokens.tolist()):
            done[i] = done[i] or t in stop
            if not done[i]:
                out[i].append(t)
        if all(done):
            break
    return out


def check_logits(logits):
    """Logits (…, vocab), unchanged; UserError if they hold nan or inf, or are all equal, as after a norm that
    overflowed: argmax would then choose the first token, or the first option, in silence."""
    if not logits.isfinite().all() or (logits.amax(-1) == logits.amin(-1)).any():
        raise UserError("the LLM predicts nothing: its weights are damaged, or too large for this dtype")
    return logits


def in_range(name, value):
    """The value of an option of SAMPLING; UserError if it is out of its range."""
    try:
        return number(*SAMPLING[name])(value)
    except UserError as e:
        raise UserError(f"{name} {e}") from None


def check_ids(prompts, vocab_size, known=()):
    """UserError if a prompt holds what is no id of this LLM, and not one of `known`."""
    for i in {i for prompt in prompts for i in prompt}:
        if not 0 <= i < vocab_size and i not in known:
            raise UserError(f"token id {i} is not in this LLM's vocabulary of {vocab_size}: use its own tokenizer")


def sample(logits, temperature=0.0, top_p=1.0, generator=None):
    """Choose a token per row: logits (B, vocab) -> (B,)."""
    if temperature < 1e-5:                      # 0, or so small that logits / temperature would overflow
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    if top_p >= 1:
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)
    probs, order = probs.sort(-1, descending=True)
    cum = probs.cumsum(-1)
    kept = cum.masked_fill(cum - probs >= top_p, 0).amax(-1, keepdim=True)  # the least sum that reaches top_p
    point = torch.rand(len(probs), 1, generator=generator, device=probs.device) * kept      # somewhere in that mass ...
    return order.gather(1, torch.searchsorted(cum, point)).squeeze(1)                       # ... lies one token

"""
From an LLM to its surrogate: where does the early phase end, and what is left when the late phase is replaced?

    python surrogate.py                         # the default LLM: table, cut, plot
    python surrogate.py --replace 20-23,24-28   # what a surrogate of your choice keeps (these two: the shipped one)

1. Prediction trajectory (paper, section 3.1): how far is each layer's prediction from the last layer's? Flat, then
   falling.
2. Surrogate (section 3.2): keep the early layers, replace ranges of late ones by one translator each, keep the last.
3. What trains translators (ours): the LLM's own states and predictions behind the common trunk.
"""
import copy
import dataclasses
import re
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from cli import Parser, UserError, check_out_file, number, run_cli, write_whole
from data.llava import LlavaRecords
from formats import checkpoints, official
from formats.files import read_text
from formats.tokenizer import Tokenizer
from generation import check_logits
from kernels import default_dtype, int8
from model import Llama
from recipes import TARGETS

# ---- 1. Prediction trajectory ---------------------------------------------------------------------------------------


@torch.no_grad()
def trajectories(llm, texts, progress=False):
    """KL divergence of each layer's prediction from the last layer's, in every text: (texts, layers), the last 0.

    texts: (B, T) tokens, or a list of (T,). The paper's measure: read every layer's hidden state through the final norm
    and the LM head, take at each position the probability of the token that really comes next, and normalise these
    T - 1 numbers over the sequence. (src/inference/llm_trajectory.py in the authors' code does it over chats.)
    """
    curves = []
    for row in tqdm(texts, desc="trajectory", unit="text", disable=not progress):
        x, logp = llm.embed(row[None].to(llm.device)), []                       # (1, T, C)
        for i in range(len(llm.model.layers)):
            x = llm.run(x, i, i + 1)
            all_logp = llm.logits(x)[0, :-1].float().log_softmax(-1)            # (T - 1, vocab)
            next_logp = all_logp.gather(1, row[1:, None].to(llm.device))[:, 0]  # (T - 1,)
            logp.append(next_logp.log_softmax(0).cpu())                         # normalised over the sequence
        check_logits(all_logp)
        logp = torch.stack(logp)                                                # (layers, T - 1)
        curves.append((logp.exp() * (logp - logp[-1])).sum(1))                  # (layers,)
    return torch.stack(curves)


def prediction_trajectory(llm, texts, progress=False):
    """The mean of `trajectories` over the texts: (layers,) float32."""
    return trajectories(llm, texts, progress).mean(0)


def find_transition(trajectory):
    """First layer of the late phase: where "flat, then falling in a straight line" fits best (least squares)."""
    y = torch.as_tensor(trajectory, dtype=torch.float64)
    best, best_error = 0, float("inf")
    for cut in range(1, len(y) - 1):
        steps = (torch.arange(len(y)) - (cut - 1)).clamp(min=0).double()        # 0 … 0, 1, 2, 3 …: falls from `cut` on
        A = torch.stack([torch.ones_like(y), steps], dim=1)                     # (layers, 2): a level and a slope
        error = (A @ torch.linalg.lstsq(A, y[:, None]).solution - y[:, None]).square().sum()
        if error < best_error:
            best, best_error = cut, error
    return best


def text_tokens(tokenizer, text, length=96):
    """Cut a text into rows of `length` tokens, each beginning a paragraph: (B, length)."""
    rows = [tokenizer.encode(p, bos=True)[:length] for p in text.split("\n\n")]
    rows = [r for r in rows if len(r) == length]
    if not rows:
        raise UserError(f"the text has no paragraph of {length} tokens: give a longer one")
    return torch.tensor(rows)


def read_texts(tokenizer, path="assets/text.txt", length=96):
    """The texts over which the trajectory is measured: (B, length) tokens."""
    return text_tokens(tokenizer, read_text(checkpoints.locate(path)), length)


def read_chats(tokenizer, n, path="assets/chats.json"):
    """The first n chats without image of a JSON in LLaVA's format, in the LLM's chat format: a list of (T,) tokens."""
    records = LlavaRecords(checkpoints.locate(path))
    return [torch.tensor(tokenizer.chat(records[i].messages, generate=False)) for i in records.texts[:n]]


def choose_ranges(llm, tokenizer):
    """As in the paper: one translator for all from the turn of the LLM's own trajectory to the last layer but one."""
    cut = find_transition(prediction_trajectory(llm, read_texts(tokenizer), progress=True))
    return [(cut, llm.config.num_hidden_layers - 2)]


# ---- 2. Surrogate ---------------------------------------------------------------------------------------------------


def check_ranges(ranges, num_layers):
    """Sorted [(first, last), …], both ends included, or a UserError that says what is wrong."""
    ranges = sorted((int(a), int(b)) for a, b in ranges)
    for first, last in ranges:
        if not 0 < first <= last < num_layers - 1:
            raise UserError(f"cannot replace layers {first}-{last}: this model has layers 0-{num_layers - 1}, "
                            f"of which 1-{num_layers - 2} may be replaced (the first and the last stay)")
    for (_, last), (first, _) in zip(ranges, ranges[1:]):
        if first <= last:
            raise UserError(f"the ranges {ranges} overlap")
    return ranges


def kept_layers(ranges, num_layers):
    """Layers of the LLM that the surrogate's layers start from, in order: of each replaced range only the first."""
    dropped = {i for first, last in ranges for i in range(first + 1, last + 1)}
    return [i for i in range(num_layers) if i not in dropped]


def build_surrogate(llm, ranges):
    """The surrogate of an LLM: each range (first, last) of layers, ends included, becomes one translator (section 3.2).

    A translator starts as a copy of the range's first layer: that layer expects what the layers before it put out, as
    the translator will have to. The last layer stays, since its output is what the final norm and the LM head read.
    All other layers, the embeddings and the head *are* the LLM's (shared, not copied). `surrogate.translators` lists
    the translators' positions in the surrogate, `surrogate.ranges` what they replace; `surrogate.n_shared` how many
    leading layers are the LLM's. ranges = [] gives a surrogate that is the LLM.
    """
    L = llm.config.num_hidden_layers
    ranges = check_ranges(ranges, L)
    kept = kept_layers(ranges, L)
    with torch.device("meta"):                          # an empty shell: all its modules come from the LLM
        surrogate = Llama(dataclasses.replace(llm.config, num_hidden_layers=0))
    surrogate.config.num_hidden_layers = len(kept)
    firsts = {first for first, _ in ranges}
    translator = lambda i: int8.restore(copy.deepcopy(llm.model.layers[i]), llm.dtype)      # int8 weights cannot learn
    layers = [translator(i) if i in firsts else llm.model.layers[i] for i in kept]
    surrogate.model.update(dict(llm.model.items()) | {"layers": torch.nn.ModuleList(layers)})
    if hasattr(llm, "lm_head"):
        surrogate.lm_head = llm.lm_head
    return mark(surrogate.train(llm.training), ranges, L)


def from_pretrained(path, ranges, dtype=torch.float32, device="cpu", shard=None):
    """The surrogate of the LLM at `path`, without the LLM: only the layers that it keeps are ever read.

    The same model as `build_surrogate(Llama.from_pretrained(path), ranges)`, in its own size of memory.
    shard: see model.py.
    """
    path = official.find(path)
    L = official.llama_config(path)["num_hidden_layers"]
    ranges = check_ranges(ranges, L)
    return mark(Llama.from_pretrained(path, dtype, device, kept_layers(ranges, L), shard), ranges, L)


def mark(surrogate, ranges, num_layers):
    """Note in a surrogate what it replaces of an LLM with `num_layers` layers (see build_surrogate)."""
    surrogate.ranges, kept = ranges, kept_layers(ranges, num_layers)
    surrogate.translators = [kept.index(first) for first, _ in ranges]
    surrogate.n_shared = min((first for first, _ in ranges), default=num_layers)
    return surrogate


def load_surrogate(llm, checkpoint):
    """The surrogate of `llm` that a checkpoint of train.py was trained with."""
    _, about = checkpoints.open_checkpoint(checkpoint)
    if not about.get("ranges"):
        raise UserError(f"{checkpoint} (stage {about.get('stage', 'unknown')}) was not trained with a surrogate: "
                        "it names no replaced layers")
    return load_translators(build_surrogate(llm, about["ranges"]), checkpoint)


def read_translators(checkpoint):
    """(file, tensors, its metadata) of the translators that a checkpoint was trained with. If it holds none
    (stage 2 without `distill`), those of the checkpoint that it started from."""
    for file, tensors, about in checkpoints.ancestry(checkpoint):
        taught = about.get("stage") == "encoder" and about.get("ranges") and about.get("recipe", {}).get("distill")
        translators = {n: t for n, t in tensors.items() if n.startswith("decoder.")}
        if taught or translators:
            return file, translators, about
    raise UserError(f"{checkpoint} holds no translator, and names no checkpoint that does")


def load_translators(surrogate, checkpoint):
    """Give a surrogate the translators of a checkpoint. Returns the surrogate."""
    file, translators, _ = read_translators(checkpoint)
    places = tuple(f"decoder.model.layers.{i}." for i in surrogate.translators)
    if odd := [n for n in translators if not n.startswith(places)]:     # a layer that the LLM shares, or all of it
        raise UserError(f"{file} does not belong to this surrogate: {odd[0]} is of none of its translators")
    checkpoints.load_checkpoint(torch.nn.ModuleDict({"decoder": surrogate}), translators, file, places)
    return surrogate


def run_both(surrogate, llm, embeds, caches=(None, None)):
    """Last hidden states (B, T, C) of the surrogate and of the LLM for the same input, running their common trunk once.

    `caches`: a key/value cache for each, filled as if each had run alone; the trunk's entries are one and the same
    tensors, so before the two go on with different tokens, give each its own: `cache.repeat(1, room)`.
    """
    ours, theirs = caches
    x = surrogate.run(embeds, 0, surrogate.n_shared, ours)
    if ours is not None:
        for i in range(surrogate.n_shared):
            theirs.keys[i], theirs.values[i] = ours.keys[i], ours.values[i]
    return surrogate.run(x, surrogate.n_shared, None, ours), llm.run(x, surrogate.n_shared, None, theirs)


# ---- 3. What trains translators: distillation (ours; the paper's stage 1 trains them by answers alone) --------------


@torch.no_grad()
def teacher_states(surrogate, llm, trunk, batch):
    """The LLM's states behind the common trunk, whose output for a batch is trunk (B, T, C): a dict of tensors that
    `distillation_loss` compares the translators with."""
    after = surrogate.ranges[-1][1] + 1                     # the LLM's layer behind the last replaced range
    theirs = llm.run(trunk, surrogate.n_shared, after)                                  # (B, T, C): the target
    index = (batch["targets"].flatten() >= 0).nonzero().squeeze(1).to(trunk.device)     # (N,) positions with a target
    full = llm.run(theirs, after).flatten(0, 1)[index]                                  # (N, C): the LLM's last state
    real = (torch.arange(trunk.shape[1]) < batch["lengths"][:, None]).to(trunk.device)  # (B, T): not padding
    return dict(trunk=trunk, theirs=theirs, full=full, index=index, real=real)


def distillation_loss(surrogate, states):
    """KL divergence of the LLM's predictions from the surrogate's, mean over targets; distance of the translators'
    states from the LLM's, mean over positions. states: the LLM's, of `teacher_states`."""
    last = surrogate.translators[-1] + 1                    # the layer behind the last translator
    theirs, real = states["theirs"], states["real"]
    ours = surrogate.run(states["trunk"], surrogate.n_shared, last)                     # (B, T, C)
    # each position in units of its own length: the first token's state is many times as long as the others' ("massive
    # activations", arXiv 2402.17762), and would be all that a common unit sees
    off, size = (h.float().square().sum(-1) for h in (ours - theirs, theirs))           # (B, T) each
    state = surrogate.run(ours, last).flatten(0, 1)[states["index"]]                    # (N, C)
    logp = surrogate.logits(state).float().log_softmax(-1)                              # (N, vocab)
    with torch.no_grad():
        full_logp = surrogate.logits(states["full"]).float().log_softmax(-1)            # (N, vocab), by the shared head
    kl = F.kl_div(logp, full_logp, log_target=True, reduction="sum") / max(1, len(state))
    return kl, (off / size).masked_fill(~real, 0).sum() / real.sum()


# ---- Command line ---------------------------------------------------------------------------------------------------


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def parse_ranges(text):
    """"16-26" or "12-17,20-28" -> [(16, 26)], [(12, 17), (20, 28)]; "none" -> []."""
    text = text.replace(" ", "")
    if text == "none":
        return []
    if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text, re.ASCII):
        raise UserError(f"cannot read the layer ranges {text!r:.60}: write them like 16-26 or 12-17,20-28")
    ends = [part.split("-") for part in text.split(",")]
    return [(int(e[0]), int(e[-1])) for e in ends]


def plot_trajectory(trajectory, cut, ranges=(), title="", chats=()):
    """The prediction trajectory, where it turns, and what translators replace: a figure. chats: curves (n, layers),
    drawn thin, with their mean. The triangles: where, in depth, the paper cuts its LLMs."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(7, 3.6), dpi=120, layout="tight")
    ax = fig.add_subplot(xlabel="layer", ylabel="KL(layer || last layer), nats", title=title)
    if len(chats):
        chats = torch.as_tensor(chats)
        ax.plot(chats.T, color="#009E73", lw=0.6, alpha=0.3)
        ax.plot(chats.mean(0), color="#009E73", lw=2, label=f"mean over {len(chats)} chats")
    ax.plot(range(len(trajectory)), trajectory, "o-", color="#0072B2", ms=4, label="mean over texts")
    depths = {name.rpartition("-")[2].upper(): t.ranges[0][0] / t.llm_config.num_hidden_layers
              for name, t in TARGETS.items() if name.startswith("llama")}
    ax.plot([depth * len(trajectory) for depth in depths.values()], [0.03] * len(depths), "^", color="black", ms=6,
            transform=ax.get_xaxis_transform(), label=f"the paper's cuts: {', '.join(reversed(depths))}")
    ax.axvline(cut, color="#D55E00", ls="--", lw=1)
    ax.annotate(f"turn: layer {cut}", (cut, 1), xycoords=ax.get_xaxis_transform(), xytext=(4, -4),
                textcoords="offset points", color="#D55E00", va="top")
    for i, (first, last) in enumerate(ranges):
        ax.axvspan(first - 0.45, last + 0.45, color="#E69F00", alpha=0.25,
                   label="replaced by a translator" if i == 0 else None)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return fig


def show_layers(trajectory, cut, ranges, chats):
    """Print a line for each layer: its KL over the texts and over the chats, and what becomes of it."""
    kept, firsts = kept_layers(ranges, len(trajectory)), {first for first, _ in ranges}
    print(f"layer      KL{'   chats' if len(chats) else ''}   surrogate")
    for i, kl in enumerate(trajectory.tolist()):
        role = "translator starts here" if i in firsts else "kept" if i in kept else "dropped"
        chat = f" {chats[:, i].mean():7.3f}" if len(chats) else ""
        print(f"{i:5d} {kl:7.3f}{chat}   {role}{'   <- the prediction turns' if i == cut else ''}")


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--llm", default=official.DEFAULT_LLM,
                        help="folder, .gguf file or hub name of a Llama (default: %(default)s)")
    parser.add_argument("--text", default="assets/text.txt",
                        help="text to read, paragraphs apart by empty lines (default: %(default)s)")
    parser.add_argument("--length", type=number(int, 2, 10**5), default=96,
                        help="tokens of each paragraph to read (default: %(default)s)")
    parser.add_argument("--chats", type=number(int, 0, 10**5), default=16,
                        help="chats of assets/chats.json to read beside it (default: %(default)s)")
    parser.add_argument("--replace", help="layers to replace, e.g. 20-28, or 20-23,24-28 by two "
                        "(default: from the turn to the last but one)")
    parser.add_device()
    parser.add_argument("--out", default="runs/trajectory.png", help="where the plot goes (default: %(default)s)")
    args = parser.parse_args(argv)
    check_out_file(args.out)
    given = parse_ranges(args.replace) if args.replace else None
    path = official.find(args.llm)
    tokenizer = Tokenizer.from_pretrained(path)
    tokens, chats = read_texts(tokenizer, args.text, args.length), read_chats(tokenizer, args.chats)
    dtype = default_dtype(args.device) if args.device.startswith("cuda") else torch.float32
    llm = Llama.from_pretrained(path, dtype, args.device)
    L = llm.config.num_hidden_layers
    ranges = None if given is None else check_ranges(given, L)

    trajectory = prediction_trajectory(llm, tokens, progress=True)
    chats = trajectories(llm, chats, progress=True) if chats else torch.zeros(0, L)
    cut = find_transition(trajectory)
    ranges = [(cut, L - 2)] if ranges is None else ranges
    print(f"\n{args.llm}: KL(layer || last layer) over {len(tokens)} texts of {args.length} tokens"
          + (f", and over {len(chats)} chats (turn: {find_transition(chats.mean(0))})" if len(chats) else "") + "\n")
    show_layers(trajectory, cut, ranges, chats)
    surrogate = build_surrogate(llm, ranges)
    full, small = count_parameters(llm), count_parameters(surrogate)
    # embeddings and head are shared: what is saved is layers, so report these, too
    print(f"\nreplaced: {', '.join(f'{a}-{b}' for a, b in ranges) or 'nothing'}   "
          f"layers {L} -> {surrogate.config.num_hidden_layers}   "
          f"parameters {full / 1e6:.1f}M -> {small / 1e6:.1f}M ({small / full:.0%})")
    figure = plot_trajectory(trajectory.tolist(), cut, ranges, f"Prediction trajectory of {args.llm}", chats)
    write_whole(args.out, lambda part: figure.savefig(part, format="png"))
    print(f"plot: {args.out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

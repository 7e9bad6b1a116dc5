"""
The paper's size, on paper: what every stage trains, computes and needs for Llama-3.2-3B, 3.1-8B and 3.1-70B, and what
the surrogate saves. Only arithmetic on sizes: it needs no weights, no data and no GPU.

    python -m studies.cost                  # FLOPs, memory and GPU-hours of each route: all presets, and a picture
    python -m studies.cost llama-3.1-70b    # of one

    >>> from studies import cost
    >>> print(cost.show_plan(cost.stage_plan("encoder", "llama-3.1-8b", ranks=8)))

1. Presets and recipes   2. Parameters   3. FLOPs   4. Memory   5. The plan of a stage   6. Three routes   7. A picture
"""
import argparse
import math
import sys

from formats import checkpoints
from formats.errors import UserError, run_cli
from model import LlamaConfig, ViTConfig

# ---------------------------------------------------------------------------------------------------------------------
# 1. The paper's models and recipes (sections 3.2 and 4, appendix A.5, and https://github.com/facebookresearch/zero)


def llama3(factor, **sizes):
    return LlamaConfig(vocab_size=128256, head_dim=128, rope_theta=500000.0, max_position_embeddings=131072, **sizes,
                       rope_scaling=dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                                         original_max_position_embeddings=8192))


CLIP = dict(vit="openai/clip-vit-large-patch14-336", vit_config=ViTConfig(
    image_size=336, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16))
PRESETS = {
    "llama-3.2-3b": CLIP | dict(
        llm="meta-llama/Llama-3.2-3B-Instruct", ranges=[(16, 26)], steps={"translator": 3568}, llm_config=llama3(
            32.0, num_hidden_layers=28, hidden_size=3072, intermediate_size=8192, num_attention_heads=24,
            num_key_value_heads=8, tie_word_embeddings=True)),
    "llama-3.1-8b": CLIP | dict(
        llm="meta-llama/Llama-3.1-8B-Instruct", ranges=[(17, 30)], llm_config=llama3(
            8.0, num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
            num_key_value_heads=8, tie_word_embeddings=False)),
    "llama-3.1-70b": CLIP | dict(
        llm="meta-llama/Llama-3.1-70B-Instruct", ranges=[(40, 78)], llm_config=llama3(
            8.0, num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
            num_key_value_heads=8, tie_word_embeddings=False)),
}

# Data: (samples, tokens of text in each, targets among them). The lengths are estimates, in Llama-3 tokens. The records
# of LLaVA-1.5-665K have on average 5.2 question-answer pairs and 770 characters; those without image (ShareGPT) take
# about 3,900 each, which leaves 565 to the others: 155 tokens (4.3 characters a token, 1.3 in coordinates), 52 of chat
# format, 13 that introduce the image. GenQA's general, code, math and dialog parts have 1,300 to 3,300 bytes a record.
LLAVA, LLAVA_ANSWERS = (624_610, 220, 115), (624_610, 220, 85)      # loss on chat tokens and answers, or on these only
SHAREGPT, GENQA, NOTHING = (40_688, 850, 540), (500_000, 400, 300), (0, 0, 0)

# AdamW, warm-up over 3.05 % of the steps, cosine to 0, clip 1, bf16. `decoder` reads 20 % of LLaVA-665K. The baselines
# train a projector through the full LLM on its images (`adapter`), then the decoder, or LoRA in it, on all of it.
STAGE_1 = dict(batch=256, micro_batch=8, lr=1e-4, loss_on="answers+special", images=LLAVA)
PAPER = {
    "translator": STAGE_1 | dict(steps=4393, texts=GENQA),
    "encoder": STAGE_1 | dict(steps=4880, texts=NOTHING, batch=128, lr=5e-5),
    "decoder": dict(steps=1040, batch=128, micro_batch=4, lr=5e-5, loss_on="answers", images=LLAVA_ANSWERS,
                    texts=SHAREGPT),
    "adapter": STAGE_1 | dict(steps=2440, texts=NOTHING),
}
LORA_RANK = 8                       # as in the paper's code
PAPER_HOURS = {"llama-3.1-70b": {"translator": 9.36, "encoder": 4.25, "decoder, 20 %": 5.56,
                                 "adapter": 7.01, "decoder": 27.78}}
PEAK, UTILIZATION = 989e12, 0.4     # FLOP/s of an H100 in dense bf16, and the part of it that training gets (assumed)


def preset(name):
    """An entry of PRESETS, or `name` itself if it is such a dict already. UserError for an unknown name."""
    if isinstance(name, dict):
        return name
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def recipe(stage, name):
    """The paper's recipe of a stage for a preset: an entry of PAPER, with the steps that this LLM's checkpoint took."""
    if stage not in PAPER:
        raise UserError(f"the paper has no stage {stage!r}: choose one of {', '.join(PAPER)}")
    steps = preset(name).get("steps", {})
    return PAPER[stage] | ({"steps": steps[stage]} if stage in steps else {})


# ---------------------------------------------------------------------------------------------------------------------
# 2. Parameters


def layer_matrices(c):
    """Weights of the seven matrices of a Llama layer."""
    attention = 2 * c.hidden_size * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)    # q and o, k and v
    return attention + 3 * c.hidden_size * c.intermediate_size


def lora_weights(c, rank):
    """Weights of the low-rank updates of these matrices: rank x (in + out) for each."""
    C, q, kv = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return rank * (2 * (C + q) + 2 * (C + kv) + 3 * (C + c.intermediate_size))


def vit_matrices(v):
    return 4 * v.hidden_size ** 2 + 2 * v.hidden_size * v.intermediate_size


def upper_vit(stage, v):
    """How many of the ViT's last layers a stage trains: 8 of CLIP-L's 24, or none."""
    return max(1, v.num_hidden_layers // 3) if stage in ("encoder", "decoder") else 0


def decoder_layers(stage, c, ranges):
    """(layers of the stage's decoder, translators among them, layers before the first translator)"""
    L = c.num_hidden_layers
    if stage in ("decoder", "adapter") or not ranges:
        return L, 0, L
    return L - sum(last - first for first, last in ranges), len(ranges), min(first for first, _ in ranges)


def trained_and_frozen(stage, llm_config, vit_config, ranges, lora=0, distill=False):
    """{part: (trained, frozen) parameters} of the VLM, as train.trained_parameters chooses them. lora: its rank."""
    c, v, whole = llm_config, vit_config, stage == "decoder" and not lora
    C, d, I = v.hidden_size, c.hidden_size, v.intermediate_size
    layers, translators, _ = decoder_layers(stage, c, ranges)
    layer, vit_layer = layer_matrices(c) + 2 * d, vit_matrices(v) + I + 9 * C       # with norms and the ViT's biases
    upper, vit_embeddings = upper_vit(stage, v), (3 * v.patch_size ** 2 + v.num_patches + 4) * C
    parts = {       # part: (parameters, trained?)
        "ViT, frozen part": (vit_embeddings + (v.num_hidden_layers - upper) * vit_layer, False),
        "ViT, last layers": (upper * vit_layer, True),
        "ViT, post_layernorm": (2 * C, True),
        "projector, start and end": (C * d + d * d + 4 * d, True),
        "translators": (translators * layer, stage == "translator" or distill),
        "decoder's layers": ((layers - translators) * layer, whole),
        "LoRA": (layers * lora_weights(c, lora) if stage == "decoder" else 0, True),
        "embeddings, norm, LM head": (c.vocab_size * d * (1 if c.tie_word_embeddings else 2) + d, whole),
    }
    return {part: (n, 0) if trained else (0, n) for part, (n, trained) in parts.items() if n}


# ---------------------------------------------------------------------------------------------------------------------
# 3. FLOPs: 2 for each weight and position. Softmax, norms and activations (below 1 %) are left out


def step_flops(stage, llm_config, vit_config, ranges, images, texts=NOTHING, checkpointing=True, lora=0, distill=False,
               text_gradients=False, causal=0.5):
    """{what: FLOPs} of a step. images, texts: (samples, positions of each, targets of each), visual tokens included.

    Gradients of activations cost a forward pass, in every layer above the first that is trained: for images in all, for
    text from the translator on (text_gradients: in all, as where images and text share a padded batch). Gradients of
    weights cost another where weights are trained, checkpointing another where activations have gradients. The LM head
    sees only targets. causal: how much of the T x T scores is computed; kernels skip the masked half.
    distill: the full LLM teaches the translators, the answers do not (train.surrogate_loss); these run twice and are
    never computed again. All samples count as new ones, and the projector as learning (train.py --epochs).
    """
    c, v, d = llm_config, vit_config, llm_config.hidden_size
    layers, translators, trunk = decoder_layers(stage, c, ranges)
    whole = stage == "decoder" and not lora
    m, low_rank, head = layer_matrices(c), lora_weights(c, lora * (stage == "decoder")), 2 * c.vocab_size * d
    trained = layers if whole else translators if stage == "translator" and not distill else 0

    V = v.num_patches + 1
    vit_layer = 2 * vit_matrices(v) * V + 4 * V * V * v.hidden_size
    out = {"ViT and projector": images[0] * (
        6 * v.patch_size ** 2 * v.hidden_size * v.num_patches                       # patches to vectors, forward only
        + (v.num_hidden_layers + 2 * upper_vit(stage, v)) * vit_layer               # backward is twice forward
        + 3 * 2 * (v.hidden_size + d) * d * V)}
    out |= dict.fromkeys(("forward", "recomputation", "gradients of activations", "gradients of weights", "LM head",
                          "distillation"), 0)
    for (n, T, N), text in ((images, False), (texts, True)):
        scores = causal * 4 * T * T * c.num_attention_heads * c.head_dim            # q k^T, and its product with v
        forward = 2 * (m + low_rank) * T + scores
        # a layer's last product is not computed again: no gradient needs its result
        again = checkpointing * (forward - (0 if low_rank else 2 * d * c.intermediate_size * T))
        backward = 2 * (m + low_rank) * T + 2 * scores
        above = layers - trunk if text and stage != "decoder" and not text_gradients else layers
        alone = distill and text        # there the answers' loss would teach nothing: not computed, nor what it needs
        above, N_answers = (0, 0) if alone else (above, N)
        out["forward"] += n * (trunk if alone else layers) * forward
        out["recomputation"] += n * (above - distill * translators * (above > 0)) * again
        out["gradients of activations"] += n * above * backward
        out["gradients of weights"] += n * 2 * T * (trained * m + layers * low_rank)
        out["LM head"] += n * N_answers * head * (1 + (above > 0) + whole)
        if distill:     # the surrogate from its first translator on, with gradients; the full LLM there, without
            behind = layers - trunk
            out["distillation"] += n * (behind * (forward + backward) + (behind - translators) * again
                                        + translators * 2 * m * T
                                        + (c.num_hidden_layers - trunk) * forward + 3 * N * head)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# 4. Memory


def memory(stage, llm_config, vit_config, ranges, samples, positions, targets, ranks=1, fsdp=False, checkpointing=True,
           lora=0, distill=False):
    """{what: bytes} on each GPU, for micro-batches of `samples` image samples with so many positions and targets each.

    bf16, but for the trainer's copies. fsdp: the decoder's layers and what belongs to them are shared out over the
    ranks; two whole layers at a time are there, the one that runs and the next. Estimated from shapes: CUDA, NCCL and
    the allocator's gaps come on top. (AdamW's temporary values take the place of activations, gone by then.)
    """
    c, v, d = llm_config, vit_config, llm_config.hidden_size
    layers, translators, _ = decoder_layers(stage, c, ranges)
    whole, layer, share = stage == "decoder" and not lora, layer_matrices(c) + 2 * d, 1 / ranks if fsdp else 1
    parts = trained_and_frozen(stage, c, v, ranges, lora, distill)
    shared = {p: share if p in ("translators", "decoder's layers") else 1 for p in parts}
    there = sum(shared[p] * sum(counts) for p, counts in parts.items())
    if distill:         # of the full LLM, what the surrogate has not
        there += share * (c.num_hidden_layers - layers + translators) * layer
    trained = sum(shared[p] * counts[0] for p, counts in parts.items())

    # what a layer keeps of a position for its backward pass: x, x after attention, q, k, v, attention's result, gate
    # and up; if it is trained, also what goes into its matrices
    q, kv, I = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim, c.intermediate_size
    trained_layers = layers if stage == "decoder" else translators
    kept, extra = 2 * d + 2 * q + 2 * kv + 2 * I, 2 * d + I
    kept = layers * d + kept + extra * (trained_layers > 0) if checkpointing else layers * kept + trained_layers * extra
    rows = samples * targets        # of logits: in chunks (kernels.linear_cross_entropy), all at once in distillation
    rows = 6 * rows if distill else min(rows, max(128, 4 * (2 ** 25 // c.vocab_size) // 128 * 128))
    return {
        "weights": 2 * there,
        "whole layers": fsdp * layer * (2 * 2 + 6 * (trained_layers > 0)),          # and the gradient of one
        "gradients": (2 + 4) * trained,                                             # of a micro-batch, and their sum
        "float32 copies, Adam": (4 + 8) * trained,
        "activations of the decoder": 2 * kept * samples * positions,
        "activations before it": 2 * samples * (v.num_patches + 1) * (
            upper_vit(stage, v) * (9 * v.hidden_size + 3 * v.intermediate_size) + 3 * v.hidden_size + 3 * d),
        "logits": 2 * rows * c.vocab_size + 6 * whole * c.vocab_size * d,           # and the gradient of the LM head
    }


# ---------------------------------------------------------------------------------------------------------------------
# 5. The plan of a stage


def stage_plan(stage, name, ranks=1, fsdp=False, checkpointing=True, lora=0, distill_every=0, text_gradients=False,
               **other):
    """All about a stage before anything is loaded: a dict for `show_plan`.

    name: a preset, or a dict(llm_config=…, vit_config=…, ranges=…). other: what takes the place of the paper's recipe:
    steps, batch, micro_batch, lr, loss_on, images, texts (see PAPER). text_gradients: see `step_flops`.
    UserError if micro-batches and ranks do not make up the batch.
    """
    p, r = preset(name), recipe(stage, name) | other
    batch, at_once = r["batch"], r["micro_batch"] * ranks
    if batch % at_once:
        raise UserError(f"a batch of {batch} cannot be shared out: micro-batches of {r['micro_batch']} on {ranks} "
                        f"GPU(s) make {at_once}, which does not divide {batch}")
    sizes = stage, p["llm_config"], p["vit_config"], p["ranges"]
    visual = p["vit_config"].num_patches + 3
    (n_images, image_text, image_targets), (n_texts, text, text_targets) = r["images"], r["texts"]
    share = batch / (n_images + n_texts)
    images = n_images * share, visual + image_text, image_targets       # of an average step
    texts = n_texts * share, text, text_targets
    options = dict(checkpointing=checkpointing, lora=lora, distill=distill_every > 0)
    flops = step_flops(*sizes, images, texts, text_gradients=text_gradients, **options)
    flops["distillation"] /= max(1, distill_every)
    total = r["steps"] * sum(flops.values())
    needs = [memory(*sizes, r["micro_batch"], T, image_targets, ranks, fsdp, **options) for T in (images[1], 4096)]
    return r | dict(
        stage=stage, name=name if isinstance(name, str) else p.get("llm", "this LLM"), ranks=ranks, fsdp=fsdp,
        checkpointing=checkpointing, lora=lora, accumulation=batch // at_once, images=images, texts=texts,
        samples=r["steps"] * batch, tokens=r["steps"] * (images[0] * images[1] + texts[0] * texts[1]),
        parts=trained_and_frozen(*sizes, lora, distill_every > 0), step_flops=flops, flops=total,
        gpu_hours=total / PEAK / UTILIZATION / 3600, memory=needs[0], longest=sum(needs[1].values()))


def show_plan(p):
    """The plan of a stage as a text for people."""
    row = lambda what, *cells: f"{what:<34}" + "".join(f"{x:>16}" for x in cells)
    number = lambda n: f"{n:,}" if n else "-"
    (n, T, N), (n_text, T_text, N_text) = p["images"], p["texts"]
    return "\n".join([
        f"{p['name']}, stage {p['stage']}{', LoRA of rank %d' % p['lora'] if p['lora'] else ''}: {p['steps']:,} steps "
        f"of {p['batch']} samples = {p['micro_batch']} at a time x {p['accumulation']} times x {p['ranks']} GPU(s)",
        f"loss on {p['loss_on']}; learning rate {p['lr']:g}: warm-up over 3.05 % of the steps, then a cosine to 0",
        f"{p['samples']:,} samples, {p['tokens'] / 1e6:,.0f} M positions; a step has {n:.0f} images of {T} positions "
        f"({N} targets)" + (f" and {n_text:.0f} texts of {T_text} ({N_text})" if n_text else ""),
        "",
        row("parameters", "trained", "frozen"),
        *(row(what, *map(number, counts)) for what, counts in p["parts"].items()),
        row("sum", *(number(sum(counts)) for counts in zip(*p["parts"].values()))),
        "",
        row("PFLOPs (1e15)", "a step", "all steps"),
        *(row(what, f"{f / 1e15:,.2f}", f"{p['steps'] * f / 1e15:,.0f}") for what, f in p["step_flops"].items() if f),
        row("sum", f"{p['flops'] / p['steps'] / 1e15:,.2f}", f"{p['flops'] / 1e15:,.0f}"),
        "",
        row("memory of a GPU", "GB"),
        *(row(what, f"{b / 1e9:.2f}") for what, b in p["memory"].items() if b),
        row("sum", f"{sum(p['memory'].values()) / 1e9:.2f}"),
        row("sum if all samples were 4096 long", f"{p['longest'] / 1e9:.2f}"),
        f"({'decoder layers sharded' if p['fsdp'] else 'all weights on every GPU'}, activation checkpointing "
        f"{'on' if p['checkpointing'] else 'off'}; CUDA, NCCL and the allocator's gaps take some GB more)",
        "",
        f"{p['gpu_hours']:,.1f} GPU-hours, {p['gpu_hours'] / p['ranks']:,.1f} hours on {p['ranks']} GPU(s), if "
        f"training gets {UTILIZATION:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s in bf16"])


# ---------------------------------------------------------------------------------------------------------------------
# 6. Three routes to a VLM with the full LLM, and what the surrogate saves (paper, section 5 and figure 2)


def routes(name, ranks=16, text=1.0, sharegpt=True, **options):
    """The surrogate's route, training the full decoder, and LoRA.

    A list of dict(route, stages={stage: plan}, flops, gpu_hours, peak). text: a factor on the length of all text.
    sharegpt: do the decoder's stages read LLaVA's conversations without image?
    options: for `stage_plan`. peak: the bytes that a GPU needs in the hungriest stage.
    """
    def plan_of(stage, part=1.0, **other):
        r = recipe(stage, name)
        r |= {k: (r[k][0], round(r[k][1] * text), round(r[k][2] * text)) for k in ("images", "texts")}
        if stage == "decoder":
            r["texts"] = r["texts"] if sharegpt else NOTHING
            r["steps"] = math.ceil(part * (r["images"][0] + r["texts"][0]) / r["batch"])
        return stage_plan(stage, name, ranks, **dict(fsdp=True) | options | other | r)

    adapter = {"adapter": plan_of("adapter")}
    out = {
        "surrogate": {"translator": plan_of("translator"), "encoder": plan_of("encoder"),
                      "decoder, 20 %": plan_of("decoder", 0.2)},
        "full decoder": adapter | {"decoder": plan_of("decoder")},
        "LoRA": adapter | {"LoRA": plan_of("decoder", lora=LORA_RANK)},
    }
    total = lambda stages, what: sum(p[what] for p in stages.values())
    return [dict(route=route, stages=stages, flops=total(stages, "flops"), gpu_hours=total(stages, "gpu_hours"),
                 peak=max(sum(p["memory"].values()) for p in stages.values())) for route, stages in out.items()]


def saving(three_routes):
    """The part of the full decoder's FLOPs that the surrogate's route saves."""
    return 1 - three_routes[0]["flops"] / three_routes[1]["flops"]


def show_routes(name, ranks=16):
    """The three routes of a preset as a table, with all that it assumes and how much each assumption matters."""
    table, hours = routes(name, ranks), PAPER_HOURS.get(name, {})
    full, full_hours = table[1]["flops"], sum(hours.get(stage, 0) for stage in table[1]["stages"])

    def row(route, stage, steps, flops, measured, gpu_hours, peak):
        theirs = f"{measured:.2f} h {measured / full_hours:5.0%}" if measured else "-"
        return (f"{route:<14}{stage:<15}{steps:>6}{flops / 1e18:>9,.1f}{flops / full:>9.0%}{theirs:>16}"
                f"{gpu_hours:>11,.1f}{peak / 1e9:>10.0f}")

    t, what_if = table[0]["stages"]["translator"], {
        "text 30 % shorter": dict(text=0.7), "text 30 % longer": dict(text=1.3),
        "no activation checkpointing": dict(checkpointing=False),
        "text sends gradients through the trunk, too, as in the paper's code": dict(text_gradients=True),
        "the decoder reads LLaVA without its conversations that have no image": dict(sharegpt=False)}
    lines = [f"{'route':<14}{name:<15}{'steps':>6}{'EFLOPs':>9}{'of full':>9}{'paper: of full':>16}{'GPU-hours':>11}"
             f"{'GB a GPU':>10}"]
    for r in table:
        measured = hours if r["route"] != "LoRA" else {}
        for stage, p in r["stages"].items():
            lines.append(row(r["route"], stage, f"{p['steps']:,}", p["flops"], measured.get(stage), p["gpu_hours"],
                             sum(p["memory"].values())))
        lines += [row("", "sum", "", r["flops"], sum(measured.get(stage, 0) for stage in r["stages"]), r["gpu_hours"],
                      r["peak"]), ""]
    lines.append(f"The surrogate's route saves {saving(table):.1%} of the FLOPs of training the full decoder.")
    if hours:
        ours, theirs = ([str(hours[stage]) for stage in table[i]["stages"]] for i in (0, 1))
        saved = 1 - sum(map(float, ours)) / full_hours
        lines += [
            f"The paper saves {saved:.1%} of the hours: 1 - ({' + '.join(ours)}) / ({' + '.join(theirs)}).",
            "The sums agree better than the stages: hours also hold what FLOPs do not (sharded weights on their way,",
            "padding, small micro-batches, text that costs as much as images), most of all for the full decoder."]
    return "\n".join(lines + [
        "",
        "Assumed:",
        f"- an image sample has {t['images'][1] - LLAVA[1]} visual tokens and {LLAVA[1]} of text, {LLAVA[2]} of them "
        f"targets ({LLAVA_ANSWERS[2]} if only answers count),",
        f"  a text instruction {GENQA[1]} and {GENQA[2]}, a conversation without image {SHAREGPT[1]} and {SHAREGPT[2]} "
        "(estimates); no padding",
        f"- the translator's batch has {t['images'][0]:.0f} images and {t['texts'][0]:.0f} texts; encoder and adapter "
        "read LLaVA's images, decoder and LoRA all of it",
        "- FLOPs: 2 for each weight and position, forward, again for checkpointing (on, as in the paper), for the",
        "  gradients of activations, of trained weights; half of the scores; text has no gradient below the",
        "  translator; the LM head sees targets only",
        f"- memory: {ranks} GPUs, decoder layers sharded, embeddings and LM head whole, Adam on float32 copies,",
        f"  micro-batches of {t['micro_batch']} ({PAPER['decoder']['micro_batch']} for decoder, LoRA), average length",
        f"- LoRA of rank {LORA_RANK} on all matrices of all layers",
        f"- GPU-hours: {UTILIZATION:.0%} of an H100's {PEAK / 1e12:.0f} TFLOP/s in every stage",
        "",
        "Were it otherwise, the surrogate's route would save:",
        *(f"- {what}: {saving(routes(name, ranks, **options)):.1%}" for what, options in what_if.items())])


# ---------------------------------------------------------------------------------------------------------------------
# 7. A picture


def plot_routes(path):
    """The three routes of every preset as bars (like the paper's figure 2), written to `path` as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    dark = "#222222"
    looks = {"translator": ("#2a6f97", "white"), "encoder": ("#4f9cc0", "white"), "decoder, 20 %": ("#f4a261", dark),
             "adapter": ("#c9cdd2", dark), "decoder": ("#e76f51", "white"), "LoRA": ("#edc4b3", dark)}
    fig, axes = plt.subplots(len(PRESETS), 1, figsize=(8.4, 5.4), dpi=140, sharex=True)
    for ax, name in zip(axes, PRESETS):
        table = routes(name)
        for y, r in enumerate(table):
            left = 0
            for stage, p in r["stages"].items():
                width, (color, ink) = 100 * p["flops"] / table[1]["flops"], looks[stage]
                ax.barh(y, width, 0.8, left, color=color, edgecolor="white")
                ax.text(left + width / 2, y, f"{stage}\n{width:.0f}", ha="center", va="center", color=ink,
                        fontsize=8 if width > 15 else 7)
                left += width
            if y != 1:
                ax.text(left + 1, y, f"{100 - left:.0f} % less", va="center", fontsize=9.5 if y else 10.5,
                        color="#555555" if y else "#1d5c3a", fontweight="normal" if y else "bold")
        ax.set_yticks(range(len(table)), [r["route"] for r in table], fontsize=9.5)
        ax.set_title(name.title().replace("b", "B"), loc="left", fontsize=10.5, fontweight="bold", pad=3)
        ax.invert_yaxis()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    axes[-1].set_xlim(0, 100)
    axes[-1].set_xlabel("FLOPs of training, in % of the route that trains the full decoder (estimated)")
    fig.tight_layout(h_pad=1.2)
    checkpoints.write_whole(path, lambda part: fig.savefig(part, format="png", facecolor="white"))
    plt.close(fig)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=f"default: {' '.join(PRESETS)}")
    parser.add_argument("--out", default="runs/routes.png", metavar="PNG", help="picture (default: %(default)s)")
    args = parser.parse_args(argv)
    for text in [show_routes(name) for name in args.presets or PRESETS]:
        print(text + "\n")
    plot_routes(args.out)
    print(f"plot: {args.out}")


if __name__ == "__main__":
    sys.exit(run_cli(main))

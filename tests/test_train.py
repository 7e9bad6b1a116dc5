"""train.py: what a stage trains, losses against oracles, every stage as a user runs it, exact --resume, bad input."""

import csv
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_llm
from PIL import Image
from test_bad_input import assert_refused

import train
from cli import UserError
from data import world
from data.batches import Batches, Mixed, Sample, collate
from data.images import preprocess
from extras import distillation
from formats import checkpoints
from formats.checkpoints import read_checkpoint
from formats.tokenizer import IMAGE, Tokenizer
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig
from recipes import RECIPES, Recipe, override
from surrogate import build_surrogate

ROOT = Path(__file__).parent.parent
PROJECTOR = {"adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias", "embd_soi", "embd_eoi",
             "encoder.vision_model.post_layernorm.weight", "encoder.vision_model.post_layernorm.bias"}


@pytest.fixture
def go(tiny_llm):
    """go(stage, folder, option, value, …): run a stage on the tiny LLM from the command line."""
    return lambda stage, out, *options: train.main([stage, "--llm", tiny_llm, "--out", str(out), *map(str, options)])


TEXT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]


def make_vlm(tiny_llm, ranges):
    """(VLM behind a surrogate, full LLM), with translators that are no copies any more, as after training."""
    llm, tokenizer = Llama.from_pretrained(tiny_llm), Tokenizer.from_pretrained(tiny_llm)
    torch.manual_seed(1)
    vit = ViT(ViTConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=3))
    vlm = VLM(vit, build_surrogate(llm, ranges), tokenizer)
    with torch.no_grad():
        for i in vlm.decoder.translators:
            for p in vlm.decoder.model.layers[i].parameters():
                p.add_(torch.randn_like(p) * 0.1)
    return vlm, llm


def mixed_batch(vlm, loss_on="answers+special"):
    """Images and text in one batch, of different lengths."""
    samples = [world.world(task, 3, 0) for task in ("describe", "read", "color")]
    batch = collate([*samples, Sample(None, TEXT)], vlm.tokenizer, vlm.n_visual, loss_on=loss_on)
    assert len(set(batch["lengths"].tolist())) > 1
    return batch


def batches_of(vlm, recipe, texts=(), seed=0, **share):
    images = world.World(seed)
    samples = Mixed(images, Endless(texts), 3, 2) if texts else images
    return Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size, **share)


class Endless(list):
    def __getitem__(self, k):
        return super().__getitem__(k % len(self))


def grads(parameters):
    out = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return out


def assert_close(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys() and ours
    for n, g in theirs.items():
        assert (ours[n] - g).abs().max() <= tolerance * max(0.1, g.abs().max()), n


def relative(a, b):
    return abs(a - b) / abs(b)


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_lr_schedule():
    recipe = Recipe(steps=1000, lr=3e-4)
    rates = [train.lr_at(i, recipe) for i in range(recipe.steps + 1)]
    warmup = 31  # 3.05 % of 1000, rounded up
    assert rates[0] == pytest.approx(recipe.lr / warmup) and rates[15] == pytest.approx(recipe.lr * 16 / warmup)
    assert rates[warmup - 1] == pytest.approx(recipe.lr) == max(rates)
    assert rates[warmup + 100] == pytest.approx(recipe.lr / 2 * (1 + math.cos(math.pi * 100 / 969)))
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert rates[recipe.steps] == pytest.approx(0, abs=1e-12)
    short = [Recipe(steps=n) for n in (1, 2, 3)]
    assert all(0 < train.lr_at(i, r) <= r.lr for r in short for i in range(r.steps))  # the shortest runs move, too


@pytest.mark.parametrize("stage, distill, expected", [
    ("translator", 0, ("projector", "ends", "translators")),
    ("encoder", 0, ("projector", "ends", "upper ViT")),
    ("encoder", 4, ("projector", "ends", "upper ViT", "translators")),      # the LLM teaches them in passing
    ("decoder", 0, ("projector", "ends", "upper ViT", "decoder")),
])
def test_trained_parameters_are_the_recipes(stage, distill, expected):
    with torch.device("meta"):
        vit = ViT(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=24, num_attention_heads=2))
        llm = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=12,
                                num_attention_heads=2, num_key_value_heads=1, head_dim=8))  # fmt: skip
        vlm = VLM(vit, llm if stage == "decoder" else build_surrogate(llm, [(3, 5), (8, 10)]))
    groups = {"projector": ("adapter.",), "ends": ("embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."),
              "decoder": ("decoder.",), "translators": ("decoder.model.layers.3.", "decoder.model.layers.6."),
              "upper ViT": tuple(f"encoder.vision_model.encoder.layers.{i}." for i in range(16, 24))}
    prefixes = tuple(p for name in expected for p in groups[name])
    wanted = {n for n, _ in vlm.named_parameters() if n.startswith(prefixes)}
    vlm.requires_grad_(True)
    got = train.trained_parameters(vlm, stage, distill=distill)
    assert got.keys() == wanted == {n for n, p in vlm.named_parameters() if p.requires_grad}
    assert sum(n.endswith("mlp.fc1.weight") for n in got) == (0 if stage == "translator" else 8)  # 8 of CLIP-L's 24
    assert PROJECTOR <= got.keys()
    assert sum(n.endswith("mlp.fc1.weight") for n in train.trained_parameters(vlm, "encoder", vit_layers=3)) == 3
    assert ("decoder.model.embed_tokens.weight" in got) == (stage == "decoder")
    if stage == "decoder":
        assert sum(n.endswith("mlp.up_proj.weight") for n in got) == 12


@pytest.mark.parametrize("stage", ["translator", "encoder", "decoder"])
def test_only_what_is_trained_changes(tiny_llm, tmp_path, stage):
    vlm, llm = make_vlm(tiny_llm, [(2, 4)])
    if stage == "decoder":
        vlm.decoder = llm
    before = {n: p.detach().clone() for n, p in vlm.named_parameters()}
    llm_before = {n: p.detach().clone() for n, p in llm.named_parameters()}
    recipe = Recipe(steps=3, batch=5, lr=1e-3, loss_on=RECIPES["small"][stage].loss_on)
    texts = [Sample(None, TEXT)] if stage != "encoder" else ()      # which stage 2 does not read
    train.train(vlm, recipe, batches_of(vlm, recipe, texts), tmp_path, dict(stage=stage))
    trained = set(train.trained_parameters(vlm, stage))
    changed = {n for n, p in vlm.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    if stage != "decoder":
        assert all(torch.equal(p, llm_before[n]) for n, p in llm.named_parameters())  # the replaced layers, too
    saved, _ = read_checkpoint(tmp_path / f"{stage}.safetensors")
    assert saved.keys() == trained
    assert all(torch.equal(saved[n], p.half()) for n, p in vlm.named_parameters() if n in trained)


@pytest.mark.parametrize("options, lr", [(["--direct"], 2e-4), ([], 5e-5), (["--direct", "lr=1e-5"], 1e-5)])
def test_the_direct_route_has_the_rate_of_the_papers_code(monkeypatch, options, lr):
    def plan(stage, recipe, *args, **options):
        raise UserError(f"{recipe.lr} {recipe.steps}")
    monkeypatch.setattr(train, "plan", plan)
    with pytest.raises(UserError, match=f"^{lr} 4880$"):
        train.main(["encoder", *options, "--recipe", "llama-3.1-8b", "--data", "x.json"])


def test_settings_of_the_recipe():
    recipe = override(RECIPES["small"]["encoder"], ["steps=7", "lr=1e-3", "checkpointing=true", "loss_on=answers"])
    assert (recipe.steps, recipe.lr, recipe.checkpointing, recipe.loss_on) == (7, 1e-3, True, "answers")
    assert recipe.batch == RECIPES["small"]["encoder"].batch
    for text, words in [("stepz=3", ["stepz", "steps", "lr"]), ("steps", ["key=value"]), ("steps=x", ["whole number"]),
                        ("steps=1.5", ["whole number"]), ("steps=-1", ["between 0"]), ("batch=0", ["between 1"]),
                        ("lr=x", ["a number"]), ("lr=nan", ["between 0 and 1"]), ("lr=inf", ["between 0 and 1"]),
                        ("lr=-1", ["between"]), ("clip=nan", ["clip"]), ("like_words=maybe", ["true or false"]),
                        ("loss_on=all", ["answers+special"]), ("dtype=int8", ["bfloat16"])]:
        with pytest.raises(UserError) as error:
            override(recipe, [text])
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), text


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, ranges", [
    ("translator", [(1, 2), (4, 4)]), ("encoder", [(1, 2), (4, 4)]), ("encoder", [])])
def test_loss_and_gradients_equal_full_logits(tiny_llm, stage, ranges):
    """Through the surrogate; without ranges, through the full LLM: the direct route."""
    vlm, llm = make_vlm(tiny_llm, ranges)
    batch = mixed_batch(vlm)
    parameters = train.trained_parameters(vlm, stage)
    loss = vlm.loss(batch)
    loss.backward()
    ours = grads(parameters)
    decoder = vlm.decoder if ranges else llm
    logits = decoder(embeds=vlm.embed(batch["tokens"], batch["pixels"]))  # (B, T, vocab)
    oracle = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    oracle.backward()
    assert loss.dtype == torch.float32 and relative(loss.item(), oracle.item()) < 1e-5
    theirs = grads(parameters)
    assert_close(ours, theirs)
    assert ours.keys() == parameters.keys()


def test_short_turns_about_images_weigh_more_in_the_loss(tiny_llm):
    """balance: the paper's dynamic loss weights, here turn by turn; the same however the samples are cut."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    step = [mixed_batch(vlm), collate([world.world("color", 3, 0)], vlm.tokenizer, vlm.n_visual)]
    train.balance(step, 2.0, vlm.tokenizer.turn_end, "cpu")
    end, turns = vlm.tokenizer.turn_end[0], {}                  # turns: {(batch, row, start, stop): number of targets}
    for b, batch in enumerate(step):
        for r, targets in enumerate(batch["targets"]):
            ends = [0, *((targets == end).nonzero()[:, 0] + 1).tolist()]
            turns |= {(b, r, i, j): int((targets[i:j] >= 0).sum()) for i, j in zip(ends, ends[1:])}
    longest = max(n for (b, r, *_), n in turns.items() if IMAGE in step[b]["tokens"][r])
    assert longest > 4 * min(turns.values())
    for b, batch in enumerate(step):
        logits = vlm.decoder(embeds=vlm.embed(batch["tokens"], batch["pixels"]))            # (B, T, vocab)
        losses = F.cross_entropy(logits.transpose(1, 2), batch["targets"], reduction="none")        # (B, T)
        factor = lambda r, n: (math.log(longest + 1) / math.log(n + 1)) ** 2 if IMAGE in batch["tokens"][r] else 1
        wanted = sum(factor(r, n) * losses[r, i:j].sum() for (k, r, i, j), n in turns.items() if k == b)
        assert relative(vlm.loss(batch).item(), wanted.item()) < 1e-5


def test_text_alone_needs_no_gradient_below_the_translator(tiny_llm):
    """Micro-batches are of one kind, and autograd does the rest."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    parameters = train.trained_parameters(vlm, "translator")
    images, text = batches_of(vlm, Recipe(batch=5), [Sample(None, TEXT)])[0]
    assert len(images["tokens"]) == 3 and len(text["tokens"]) == 2 and text["pixels"] is None
    needs = {}
    for i, layer in enumerate(vlm.decoder.model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: needs.update({i: out.requires_grad}))
    loss = vlm.loss(text)
    assert needs == {0: False, 1: False, 2: True, 3: True}
    loss.backward()
    assert set(grads(parameters)) == {n for n in parameters if n.startswith("decoder.model.layers.2.")}
    vlm.loss(images)
    assert needs == {0: True, 1: True, 2: True, 3: True}  # images: the projector learns through the trunk


# ---- the optimizer --------------------------------------------------------------------------------------------------


def test_updates_below_bf16s_resolution_add_up(tiny_llm, tmp_path):
    """What learns is float32, the frozen rest and the stream are bfloat16."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    vlm.decoder.bfloat16()
    with torch.no_grad():
        vlm.adapter[0].weight.fill_(1.0)
    recipe = Recipe(steps=100, batch=1, lr=1e-5, warmup=0.0)
    train.train(vlm, recipe, batches_of(vlm, recipe), tmp_path, dict(stage="encoder"))
    learns = set(train.trained_parameters(vlm, "encoder"))
    for n, p in vlm.named_parameters():
        assert p.dtype == (torch.float32 if n in learns else torch.bfloat16), n
    moved = (vlm.adapter[0].weight - 1).abs()           # bfloat16's next number above 1 is 1.0078, below it is 0.996
    assert 1e-6 < moved.mean() < 1e-3 and vlm.embed(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_the_step_is_adamw_with_clipping_and_without_decay():
    """Against torch's own AdamW; a parameter without a gradient stays as it is; rates of their own."""
    p, idle, slow = (torch.nn.Parameter(torch.tensor(x)) for x in ([1.0, -2.0], [1.0], [0.0]))
    twin, recipe = torch.nn.Parameter(p.detach().clone()), Recipe(lr=0.1, steps=10)
    optimizer = train.adamw({"p": p, "idle": idle, "encoder.slow": slow}, recipe, {"encoder.": 0.25})
    adam = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.999), weight_decay=0)
    for step, g in enumerate(torch.tensor([[3.0, 4.0], [0.1, -0.2], [-8.0, 6.0]])):
        p.grad, twin.grad = g.clone(), g / max(1, g.norm())
        adam.param_groups[0]["lr"] = train.lr_at(step, recipe)
        assert train.update(optimizer, recipe, step) == train.lr_at(step, recipe)
        adam.step()
    assert torch.allclose(p, twin, atol=1e-6) and idle.item() == 1 and p.grad is None
    slow.grad = torch.ones(1)
    train.update(optimizer, recipe, 2)
    assert slow.item() == pytest.approx(-0.25 * train.lr_at(2, recipe))


def test_a_gradient_that_is_not_finite_touches_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = train.adamw({"p": p}, Recipe(lr=0.1, steps=10))
    p.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(UserError, match="nan at step 0.*smaller lr"):
        train.update(optimizer, Recipe(lr=0.1, steps=10), 0)
    assert p.tolist() == [1, 1] and not optimizer.state


# ---- batches --------------------------------------------------------------------------------------------------------


def test_every_step_shows_new_images(tiny_llm):
    """Batches of the world: never the same sample twice, the same ones for the same step, all trained tasks."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    size = len(world.MIXTURE)
    of = lambda step, seed=0, size=size: batches_of(vlm, Recipe(batch=size), seed=seed)[step][0]
    pictures = {p.numpy().tobytes() for step in range(3) for p in of(step)["pixels"]}
    assert len(pictures) == 3 * size
    assert all(torch.equal(v, of(2)[k]) for k, v in of(2).items())
    assert not torch.equal(of(2)["pixels"], of(2, seed=1)["pixels"])
    expected = [world.world(world.MIXTURE[j], size + j, 0) for j in range(size)]
    assert set(world.MIXTURE) == {*world.TRAINED_TASKS, "instruct"}
    assert torch.equal(of(1)["pixels"], torch.stack([preprocess(s.image) for s in expected]))
    # however small a batch, all tasks come
    small = torch.cat([of(step, size=1)["pixels"] for step in range(size, 2 * size)])
    assert torch.equal(small, of(1)["pixels"])


def samples_of(batches, steps):
    """The pictures (or texts) that a process reads in these steps, in order."""
    return [row for step in steps for b in batches[step]
            for row in (b["tokens"] if b["pixels"] is None else b["pixels"]).flatten(1).tolist()]


def test_processes_and_micro_batches_share_out_the_same_samples(tiny_llm):
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    make = lambda micro, rank, world: batches_of(vlm, Recipe(batch=12, micro_batch=micro), rank=rank, world=world)
    for step in (0, 3):
        whole = samples_of(make(12, 0, 1), [step])
        assert samples_of(make(3, 0, 1), [step]) == whole
        for micro, world_ in ((3, 2), (1, 3)):
            parts = [samples_of(make(micro, r, world_), [step]) for r in range(world_)]
            assert all(len(p) == 12 // world_ for p in parts) and sorted(sum(parts, [])) == sorted(whole)
    loader = make(6, 0, 1).loader(range(2, 4), workers=2)  # prepared ahead by other processes: the same
    assert [[b["pixels"].tolist() for b in m] for m in loader] == \
           [[b["pixels"].tolist() for b in make(6, 0, 1)[step]] for step in (2, 3)]
    with pytest.raises(UserError, match="5 samples at a time in 2 process.* 10, which does not divide 12"):
        make(5, 0, 2)


def test_micro_batches_are_of_one_kind(tiny_llm):
    """However a step is cut, a micro-batch holds images or text, and together they hold the step's samples."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    kinds = lambda micro: [(len(b["tokens"]), b["pixels"] is not None) for b in
                           batches_of(vlm, Recipe(batch=10, micro_batch=micro), [Sample(None, TEXT)])[0]]
    assert kinds(0) == [(6, True), (4, False)] and kinds(5) == [(5, True), (1, True), (4, False)]
    assert kinds(2) == [(2, True)] * 3 + [(2, False)] * 2


# ---- the command line -----------------------------------------------------------------------------------------------


def rows_of(folder):
    with open(Path(folder) / "log.csv") as f:
        return list(csv.DictReader(f))


def assert_complete(folder, stage, steps, lr):
    """What a run leaves behind, whole, and nothing else."""
    folder = Path(folder)
    assert {f.name for f in folder.iterdir()} == {f"{stage}.safetensors", "state.safetensors", "log.csv", "loss.png"}
    rows = rows_of(folder)
    assert [int(r["step"]) for r in rows] == list(range(steps)) and all(math.isfinite(float(r["loss"])) for r in rows)
    recipe = Recipe(steps=steps, lr=lr)
    assert [float(r["lr"]) for r in rows] == pytest.approx([train.lr_at(i, recipe) for i in range(steps)], rel=1e-2)
    with Image.open(folder / "loss.png") as picture:
        picture.load()
    return rows


@pytest.mark.parametrize("stage", ["translator", "encoder", "decoder"])
def test_stage_from_the_command_line(stages, tiny_llm, stage):
    folder = Path(stages[stage]).parent
    rows = assert_complete(folder, stage, 3, 1e-3)
    tensors, about = read_checkpoint(stages[stage])
    recipe = dataclasses.replace(RECIPES["small"][stage], steps=3, batch=6, lr=1e-3, dtype="float32")
    assert about["stage"] == stage and about["llm"] == tiny_llm and about["seed"] == 0 and about["steps_done"] == 3
    upper = {f"encoder.{n}" for n, _ in ViT(ViTConfig()).named_parameters() if re.search(r"\.layers\.[234]\.", n)}
    decoder = {f"decoder.{n}" for n, _ in Llama.from_pretrained(tiny_llm).named_parameters()}
    translators = {n for n in decoder if n.startswith("decoder.model.layers.2.")}      # taught in stage 2, too
    held = PROJECTOR | {"translator": translators, "encoder": upper | translators, "decoder": upper | decoder}[stage]
    assert tensors.keys() == held and all(t.dtype == torch.float16 for t in tensors.values())
    assert about["vit"] == stages["vit"]
    assert about["ranges"] == ([] if stage == "decoder" else [[2, 4]])
    assert about["recipe"] == dataclasses.asdict(recipe)
    assert about["start"] == stages[{"translator": "vit", "encoder": "translator", "decoder": "encoder"}[stage]]
    if stage == "decoder":  # same images as the encoder's, but without the chat's special tokens
        assert all(int(r["targets"]) < int(e["targets"]) for r, e in zip(rows, rows_of(Path(stages["encoder"]).parent)))


def test_stages_chain(stages, tiny_llm, tmp_path, monkeypatch, capsys):
    """Without --init a stage goes on from what the stage before left in runs/, and says so first."""
    monkeypatch.chdir(tmp_path)
    last = stages["vit"]
    for stage, more in (("translator", ["--init", last, "--replace", "2-4"]), ("encoder", []), ("decoder", [])):
        train.main([stage, "--llm", tiny_llm, "steps=1", "batch=5", *more])
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"stage {stage}: goes on from {last}, trains for {tiny_llm}")
        last = f"runs/{stage}/{stage}.safetensors"
    assert read_checkpoint("runs/decoder/decoder.safetensors")[1]["start"] == "runs/encoder/encoder.safetensors"


def test_a_translator_goes_on_with_its_ranges(stages, go, tmp_path):
    go("translator", tmp_path, "--init", stages["translator"], *STILL)
    (before, was), (after, now) = map(read_checkpoint, (stages["translator"], tmp_path / "translator.safetensors"))
    assert was["ranges"] == now["ranges"] and all(torch.equal(before[n], after[n]) for n in before)


def test_another_llm_gets_its_cut_from_its_own_trajectory(stages, go, tmp_path):
    go("translator", tmp_path, "--init", stages["vit"], "steps=1", "batch=5")
    (first, last), = read_checkpoint(tmp_path / "translator.safetensors")[1]["ranges"]
    assert 0 < first <= last == 4


@pytest.fixture
def llava(tmp_path):
    """LLaVA-format data: (options for the command line, a function that writes other records)."""
    world.world("color", 0).image.save(tmp_path / "a.png")
    turns = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    about = lambda i: turns(f"<image>\nWhat is it, number {i}?", "A shape.")
    records = [{"id": f"r{i}", "image": "a.png", "conversations": about(i)} for i in range(5)]
    records.append({"id": "text", "conversations": turns("Who are you?", "A model.")})

    def write(records):
        (tmp_path / "data.json").write_text(json.dumps(records))

    write(records)
    return ["--data", str(tmp_path / "data.json"), "--images", str(tmp_path)], write, records


def test_llava_data(stages, go, tmp_path, llava):
    common = ["lr=1e-3", *llava[0]]
    translator, encoder = tmp_path / "t" / "translator.safetensors", tmp_path / "e" / "encoder.safetensors"
    new = ["--vit", stages["vit"], "--init", "none", "--replace", "2-4"]
    go("translator", tmp_path / "t", *new, *common, "steps=3", "batch=5")
    assert_complete(tmp_path / "t", "translator", 3, 1e-3)
    assert PROJECTOR < read_checkpoint(translator)[0].keys()  # over a ViT alone: a new projector
    # stage 2 learns from images: of one sample a batch, none may be the record without
    go("encoder", tmp_path / "e", "--init", translator, *common, "steps=6", "batch=1")
    assert_complete(tmp_path / "e", "encoder", 6, 1e-3)
    go("decoder", tmp_path / "d", "--init", encoder, *common, "steps=3", "batch=6")
    assert_complete(tmp_path / "d", "decoder", 3, 1e-3)


def test_llava_with_text_workers_and_bad_records(stages, go, tiny_llm, tmp_path, llava, capfd):
    """One epoch of images and text instructions, micro-batch by micro-batch; bad records are named."""
    options, write, records = llava
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    bad = [{"id": "gone", "image": "no.png", "conversations": records[0]["conversations"]},
           {"id": "cut", "image": "cut.png", "conversations": records[0]["conversations"]},
           {"id": "backwards", "conversations": records[-1]["conversations"][::-1]}]
    write(records + bad)
    text = tmp_path / "text.json"
    text.write_text(json.dumps([records[-1] | {"id": i} for i in range(4)]))
    common = ["--init", stages["vit"], "--replace", "2-4", "--text", str(text), *options, "lr=1e-3"]
    argv = ["train", "translator", "--llm", tiny_llm, "--out", str(tmp_path / "t"), *common]
    assert_refused(capfd, argv, "gone", "no.png")
    # only opening shows what is wrong with the image; a worker process finds it, and the message names it all the same
    write(records[:1] + bad[1:2])
    argv = ["train", "encoder", "--llm", tiny_llm, "--out", str(tmp_path / "e"), "--init", stages["translator"]]
    assert_refused(capfd, [*argv, *options, "workers=1"], "record 1", "id 'cut'")
    write(records + bad)
    capfd.readouterr()
    skip = ["batch=5", "micro_batch=1", "--on-bad-record", "skip", "workers=1", "lr=1e-3"]
    go("translator", tmp_path / "t", *common, *skip)
    assert_complete(tmp_path / "t", "translator", 2, 1e-3)       # (6 images + 4 texts) // 5
    err = capfd.readouterr().err
    assert all(err.count(f"skipped: {tmp_path}/data.json: record {i} ") == 1 for i in (6, 7, 8)) and "cut.png" in err
    go("encoder", tmp_path / "e", "--init", tmp_path / "t" / "translator.safetensors", *options, *skip)
    assert_complete(tmp_path / "e", "encoder", 1, 1e-3)
    go("decoder", tmp_path / "d", "--init", tmp_path / "e" / "encoder.safetensors", *options, *skip)
    assert_complete(tmp_path / "d", "decoder", 1, 1e-3)                 # LLaVA's own text is read here: (6 + 1) // 5


@pytest.mark.parametrize("stage", ["translator", "encoder"])
def test_activation_checkpointing_changes_nothing(stages, go, tmp_path, stage):
    options = ["steps=2", "batch=5", "dtype=float32"]
    if stage == "encoder":
        options += ["--init", stages["translator"]]
    else:
        options += ["--init", stages["vit"], "--replace", "2-4"]
    go(stage, tmp_path / "a", *options)
    go(stage, tmp_path / "b", *options, "checkpointing=true")
    assert without_clock(rows_of(tmp_path / "a")) == without_clock(rows_of(tmp_path / "b"))


def without_clock(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("stage", ["translator", "encoder"])
def test_resume_continues_exactly(stages, go, tmp_path, monkeypatch, stage):
    """Six steps at once, and six steps killed in the fifth and resumed from the third's checkpoint: the same bits."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ["steps=6", "batch=5", "lr=1e-3", "save_every=3", "dtype=float32"]
    if stage == "translator":
        options += ["--init", stages["vit"], "--replace", "2-4"]
    else:
        options += ["--init", stages["translator"]]
    go(stage, whole, *options)

    def killed(step, recipe, schedule=train.lr_at):
        if step == 4:
            raise KeyboardInterrupt
        return schedule(step, recipe)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", killed)
        go(stage, halves, *options)
    assert len(rows_of(halves)) == 3
    go(stage, halves, *options, "--resume")

    assert_complete(halves, stage, 6, 1e-3)
    assert without_clock(rows_of(whole)) == without_clock(rows_of(halves))
    for file in (f"{stage}.safetensors", "state.safetensors"):
        (a, about_a), (b, about_b) = (read_checkpoint(run / file) for run in (whole, halves))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        rows_a, rows_b = (about.pop("rows", []) for about in (about_a, about_b))
        assert without_clock([about_a, *rows_a]) == without_clock([about_b, *rows_b])
    name = {"translator": "decoder.model.layers.2.mlp.up_proj.weight", "encoder": "adapter.0.weight"}[stage]
    # and the six steps did something
    assert not torch.equal(a[f"master.{name}"].half(), read_checkpoint(stages["translator"])[0][name])

    go(stage, halves, *options, "--resume")  # a run that is done already stays as it is
    assert_complete(halves, stage, 6, 1e-3)


def test_a_checkpoint_cut_short_between_its_files_resumes(stages, go, tmp_path, monkeypatch):
    """Killed while it saves: whichever of the files are new, resuming gives the whole log."""
    options = ["steps=4", "batch=2", "save_every=2", "--init", stages["translator"]]
    go("encoder", tmp_path / "whole", *options)
    for kill in range(3, 6):  # the files are written in threes: at steps 2 and 4
        out, count, replace = tmp_path / str(kill), 0, checkpoints.os.replace

        def failing(part, path):
            nonlocal count
            if count == kill:
                raise KeyboardInterrupt
            count += 1
            replace(part, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints.os, "replace", failing)
            go("encoder", out, *options)
        go("encoder", out, *options, "--resume")
        assert [r["loss"] for r in rows_of(out)] == [r["loss"] for r in rows_of(tmp_path / "whole")], kill


def test_bf16(stages, go, tmp_path):
    """The whole path in bfloat16, as on a GPU: losses near float32's."""
    go("encoder", tmp_path, "steps=3", "batch=6", "lr=1e-3", "--init", stages["translator"], "dtype=bfloat16")
    rows, float32 = assert_complete(tmp_path, "encoder", 3, 1e-3), rows_of(Path(stages["encoder"]).parent)
    for a, b in zip(rows, float32):
        assert relative(float(a["loss"]), float(b["loss"])) < 0.05 and a["targets"] == b["targets"]
    state, _ = read_checkpoint(tmp_path / "state.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}


STILL = ["steps=1", "batch=2", "lr=1e-12", "dtype=float32"]  # changes nothing: shows where it starts


def test_stage_3_goes_on_from_stage_3(stages, go, tmp_path):
    go("decoder", tmp_path, "--init", stages["decoder"], *STILL)
    (before, _), (after, _) = map(read_checkpoint, (stages["decoder"], tmp_path / "decoder.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_the_projector_of_stage_1_reaches_stage_2(stages, go, tmp_path):
    go("encoder", tmp_path, "--init", stages["translator"], *STILL)
    (first, _), (second, _) = map(read_checkpoint, (stages["translator"], tmp_path / "encoder.safetensors"))
    assert "adapter.0.weight" in first and all(torch.equal(first[n], second[n]) for n in first)


def test_stage_2_begins_where_before_training_is_shown(stages, go, tmp_path, tiny_llm):
    """Over a surrogate alone: the random projector of the seed, which VLM.untrained makes again."""
    distillation.main(["--llm", tiny_llm, "steps=1", "--replace", "2-4", "--out", str(tmp_path / "t")])
    go("encoder", tmp_path / "e", "--init", tmp_path / "t/translator.safetensors", "--vit", stages["vit"],
       "--seed", 3, *STILL)
    llm = Llama.from_pretrained(tiny_llm)
    before = VLM.untrained(stages["vit"], llm, Tokenizer.from_pretrained(tiny_llm), True, seed=3)
    after = VLM.from_pretrained(llm, tmp_path / "e/encoder.safetensors")
    for (n, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert n.startswith("decoder.") or torch.equal(a.half().float(), b), n


# ---- stage 2, taught by the LLM in passing --------------------------------------------------------------------------


def test_the_lesson_trains_translators_alone_and_the_loss_the_encoder(tiny_llm):
    """Two branches behind one trunk: the loss is VLM.loss where there is no noise, and neither reaches the other's."""
    vlm, llm = make_vlm(tiny_llm, [(2, 4)])
    vlm.like_words, batch, s = True, mixed_batch(vlm), vlm.decoder
    learns = train.trained_parameters(vlm, "encoder", distill=4)
    translators = [p for n, p in learns.items() if n.startswith("decoder.")]

    def lesson(noise, seed, parts=1):
        trunk, off = train.teach(vlm, llm, batch, translators, noise, torch.Generator().manual_seed(seed), parts)
        return s.loss(s.run(trunk, s.n_shared), batch["targets"]), off, grads(learns)

    loss, off, got = lesson(0.0, 1)
    assert got.keys() == {n for n in learns if n.startswith("decoder.")} and off > 0
    half = lesson(0.0, 1, parts=2)[2]           # two micro-batches share a step: each has half a say
    assert_close(half, {n: g / 2 for n, g in got.items()})
    loss.backward()
    got = grads(learns)
    expected = vlm.loss(batch)
    expected.backward()
    assert relative(loss.item(), expected.item()) < 1e-5
    assert_close(got, grads(learns))
    (noisy, _, _), (again, _, _), (other, _, _) = lesson(0.5, 1), lesson(0.5, 1), lesson(0.5, 2)
    assert noisy.item() == again.item() != other.item() != loss.item()


def test_resume_where_it_does_not_belong(stages, tiny_llm, tmp_path, capsys, monkeypatch):
    """Found before anything heavy is loaded, and every difference is named."""
    monkeypatch.setattr(train, "build", None)

    def no(stage, of, options, *words, llm=tiny_llm):
        folder = str(Path(stages[of]).parent) if of else str(tmp_path)
        common = ["--llm", llm, "steps=3", "batch=6", "lr=1e-3", "dtype=float32", "--out", folder, "--resume"]
        assert_refused(capsys, ["train", stage, *common, *options], *words)

    same = ("--init", stages["vit"], "--replace", "2-4")
    at = ["--init", stages["translator"]]
    no("encoder", None, at, "nothing to resume")
    no("encoder", "translator", at, "state.safetensors", "stage was translator, is encoder")
    no("decoder", "encoder", ["--init", stages["encoder"]], "stage was encoder, is decoder", "loss_on was")
    no("translator", "translator", [*same, "lr=1e-4"], "lr was 0.001, is 0.0001")
    no("translator", "translator", [*same, "steps=9", "--seed", "1"], "seed was 0, is 1", "steps was 3, is 9")
    no("translator", "translator", ["--init", stages["vit"], "--replace", "3-4"], "ranges was [[2, 4]]")

    (tmp_path / "other").mkdir()
    other = save_tiny_llm(tmp_path / "other", width=48)
    no("translator", "translator", same, "llm was", tiny_llm, other, llm=other)

"""train.py: what a stage trains, losses against oracles, every stage as a user runs it, exact --resume, bad input."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, rows_of, save_tiny_llm, shake, without_clock
from PIL import Image

import train
from cli import UserError
from data import world
from data.batches import Batches, Mixed, Sample, Shuffled, collate
from data.images import preprocess
from extras import distillation
from formats import checkpoints
from formats.checkpoints import read_checkpoint
from formats.tokenizer import IMAGE, Tokenizer
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig
from recipes import RECIPES, Recipe, override
from surrogate import build_surrogate

PROJECTOR = {"adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias", "embd_soi", "embd_eoi",
             "encoder.vision_model.post_layernorm.weight", "encoder.vision_model.post_layernorm.bias"}


@pytest.fixture
def go(tiny_llm):
    """go(stage, folder, option, value, …): run a stage on the tiny LLM from the command line."""
    return lambda stage, out, *options: train.main([stage, "--llm", tiny_llm, "--out", str(out), *map(str, options)])


TEXT = Sample(None, [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}])


def make_vlm(tiny_llm, ranges):
    """(VLM behind a surrogate, full LLM), with translators that are no copies any more, as after training."""
    llm, tokenizer = Llama.from_pretrained(tiny_llm), Tokenizer.from_pretrained(tiny_llm)
    torch.manual_seed(1)
    vit = ViT(ViTConfig(hidden_size=48, intermediate_size=64, num_hidden_layers=3))
    return VLM(vit, shake(build_surrogate(llm, ranges)), tokenizer), llm


def mixed_batch(vlm):
    """Images and text in one batch, of different lengths."""
    samples = [world.world(task, 3, 0) for task in ("describe", "read", "color")]
    batch = collate([*samples, TEXT], vlm.tokenizer, vlm.n_visual)
    assert len(set(batch["lengths"].tolist())) > 1
    return batch


def batches_of(vlm, recipe, text=None, seed=0, **share):
    """Of the drawn world; with a text, it is two of five samples."""
    images = world.World(seed)
    samples = Mixed(images, Shuffled([text], [0]), 3, 2) if text else images
    return Batches(samples, recipe, vlm.tokenizer, vlm.n_visual, vlm.encoder.config.image_size, **share)


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
    """A warm-up over 3.05 % of the steps, rounded up; a cosine to 0."""
    recipe = Recipe(steps=1000, lr=3e-4)
    rates = [train.lr_at(i, recipe) for i in range(1001)]
    assert rates[15] == pytest.approx(recipe.lr * 16 / 31) and rates[30] == pytest.approx(recipe.lr) == max(rates)
    assert rates[131] == pytest.approx(recipe.lr / 2 * (1 + math.cos(math.pi * 100 / 969)))
    assert rates[1000] == pytest.approx(0, abs=1e-12)
    assert train.lr_at(0, Recipe(steps=1)) > 0          # the shortest run moves, too


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
    text = None if stage == "encoder" else TEXT         # stage 2 reads none
    train.train(vlm, recipe, batches_of(vlm, recipe, text), tmp_path, dict(stage=stage))
    trained = {n for n, p in vlm.named_parameters() if p.requires_grad}
    assert trained == train.trained_parameters(vlm, stage).keys()
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


def test_settings_that_are_true_or_false():
    recipe = override(Recipe(), ["checkpointing=true", "like_words=false"])
    assert recipe.checkpointing is True and recipe.like_words is False


# ---- losses ---------------------------------------------------------------------------------------------------------


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
    images, text = batches_of(vlm, Recipe(batch=5), TEXT)[0]
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
    recipe = Recipe(steps=20, batch=1, lr=1e-5, warmup=0.0)
    train.train(vlm, recipe, batches_of(vlm, recipe), tmp_path, dict(stage="encoder"))
    learns = set(train.trained_parameters(vlm, "encoder"))
    for n, p in vlm.named_parameters():
        assert p.dtype == (torch.float32 if n in learns else torch.bfloat16), n
    moved = (vlm.adapter[0].weight - 1).abs()           # bfloat16's next number above 1 is 1.0078, below it is 0.996
    assert 1e-6 < moved.mean() < 1e-3 and vlm.embed(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_the_step_is_adamw_with_clipping_and_without_decay():
    """Against torch's own AdamW; a parameter without a gradient stays as it is; rates of their own, of which one does
    not fall."""
    p, idle, slow, steady = (torch.nn.Parameter(torch.tensor(x)) for x in ([1.0, -2.0], [1.0], [0.0], [0.0]))
    twin, recipe = torch.nn.Parameter(p.detach().clone()), Recipe(lr=0.1, steps=10)
    learns = {"p": p, "idle": idle, "encoder.slow": slow, "decoder.steady": steady}
    optimizer = train.adamw(learns, recipe, {"encoder.": 0.25, "decoder.": 0.5}, constant=("decoder.",))
    adam = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.999), weight_decay=0)
    for step, g in enumerate(torch.tensor([[3.0, 4.0], [0.1, -0.2], [-8.0, 6.0]])):
        p.grad, twin.grad = g.clone(), g / max(1, g.norm())
        adam.param_groups[0]["lr"] = train.lr_at(step, recipe)
        assert train.update(optimizer, recipe, step) == train.lr_at(step, recipe)
        adam.step()
    assert torch.allclose(p, twin, atol=1e-6) and idle.item() == 1 and p.grad is None
    slow.grad, steady.grad = torch.ones(1), torch.ones(1)
    train.update(optimizer, recipe, 2)
    assert slow.item() == pytest.approx(-0.25 * train.lr_at(2, recipe)) and steady.item() == pytest.approx(-0.5 * 0.1)


def test_a_gradient_that_is_not_finite_touches_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = train.adamw({"p": p}, Recipe(lr=0.1, steps=10))
    p.grad = torch.tensor([1.0, math.nan])
    with pytest.raises(UserError, match="nan at step 0.*smaller lr"):
        train.update(optimizer, Recipe(lr=0.1, steps=10), 0)
    assert p.tolist() == [1, 1] and not optimizer.state


# ---- batches --------------------------------------------------------------------------------------------------------


def test_every_step_shows_new_images(tiny_llm):
    """Of the world: never the same sample twice, and all trained tasks, however small a batch."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    size = len(world.MIXTURE)
    of = lambda step, seed=0, size=size: batches_of(vlm, Recipe(batch=size), seed=seed)[step][0]["pixels"]
    assert len({p.numpy().tobytes() for step in range(3) for p in of(step)}) == 3 * size
    expected = [world.world(world.MIXTURE[j], size + j, 0) for j in range(size)]
    assert set(world.MIXTURE) == {*world.TRAINED_TASKS, "instruct"}
    assert torch.equal(of(1), torch.stack([preprocess(s.image) for s in expected]))
    assert torch.equal(of(1), torch.cat([of(step, size=1) for step in range(size, 2 * size)]))
    assert not torch.equal(of(1), of(1, seed=1))


def test_processes_and_micro_batches_share_out_the_same_samples(tiny_llm):
    """However a step is cut, a micro-batch holds images or text."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    make = lambda micro, rank=0, world=1: batches_of(vlm, Recipe(batch=12, micro_batch=micro), TEXT, 0,
                                                     rank=rank, world=world)
    kinds = lambda micro: [(len(b["tokens"]), b["pixels"] is not None) for b in make(micro)[0]]
    assert kinds(0) == [(8, True), (4, False)]
    assert kinds(3) == [(3, True), (3, True), (2, True), (3, False), (1, False)]
    shown = lambda batch: batch["tokens"] if batch["pixels"] is None else batch["pixels"]
    read = lambda step: [x.numpy().tobytes() for batch in step for x in shown(batch)]
    for step in (0, 3):
        whole = read(make(0)[step])
        for micro, processes in ((3, 1), (3, 2), (1, 3)):
            parts = [read(make(micro, rank, processes)[step]) for rank in range(processes)]
            assert all(len(p) == 12 // processes for p in parts) and sorted(sum(parts, [])) == sorted(whole)
    loader = make(6).loader(range(2, 4), workers=2)     # prepared ahead by other processes: the same
    assert list(map(read, loader)) == [read(make(6)[step]) for step in (2, 3)]
    with pytest.raises(UserError, match="5 samples at a time in 2 process.* 10, which does not divide 12"):
        make(5, 0, 2)


# ---- the command line -----------------------------------------------------------------------------------------------


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
    """Without --init a stage goes on from what the stage before left in runs/, and says so first. Without --replace
    another LLM than the recipe's is cut where its own trajectory turns."""
    monkeypatch.chdir(tmp_path)
    last = stages["vit"]
    for stage, more in (("translator", ["--init", last]), ("encoder", []), ("decoder", [])):
        train.main([stage, "--llm", tiny_llm, "steps=1", "batch=5", *more])
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"stage {stage}: goes on from {last}, trains for {tiny_llm}")
        last = f"runs/{stage}/{stage}.safetensors"
    (cut, end), = read_checkpoint("runs/encoder/encoder.safetensors")[1]["ranges"]
    assert 0 < cut <= end == 4
    assert read_checkpoint(last)[1]["start"] == "runs/encoder/encoder.safetensors"


STILL = ["steps=1", "batch=2", "lr=1e-12", "dtype=float32"]  # changes nothing: shows where it starts


@pytest.mark.parametrize("stage, start", [("translator", "translator"), ("encoder", "translator"),
                                          ("encoder", "encoder"), ("decoder", "decoder")])
def test_a_stage_goes_on_with_all_that_its_start_holds(stages, go, tmp_path, stage, start):
    go(stage, tmp_path, "--init", stages[start], *STILL)
    (before, was), (after, now) = map(read_checkpoint, (stages[start], tmp_path / f"{stage}.safetensors"))
    assert was["ranges"] == now["ranges"] and all(torch.equal(before[n], after[n]) for n in before)


def test_llava_data(stages, go, tiny_llm, tmp_path, capfd):
    """Images and text instructions of LLaVA's format in every stage, once each, micro-batch by micro-batch; bad records
    are named, also one that a worker process finds when it opens the image."""
    world.world("color", 0).image.save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    turns = lambda *texts: [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    record = lambda i, image="a.png": dict(id=i, image=image, conversations=turns(f"<image>\nWhat is {i}?", "A shape."))
    text = dict(id="text", conversations=turns("Who are you?", "A model."))
    bad = [record("gone", "no.png"), record("cut", "cut.png"), text | dict(conversations=text["conversations"][::-1])]
    data, texts = tmp_path / "data.json", tmp_path / "text.json"
    data.write_text(json.dumps([*map(record, range(5)), text, *bad]))
    texts.write_text(json.dumps([text] * 4))
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps([record(0), bad[1]]))
    argv = ["train", "encoder", "--llm", tiny_llm, "--out", str(tmp_path / "e"), "--init", stages["translator"]]
    assert_refused(capfd, [*argv, "--images", str(tmp_path), "--data", str(cut), "workers=1"], "record 1", "id 'cut'")
    common = ["--data", data, "--images", tmp_path, "--on-bad-record", "skip", "workers=1", "lr=1e-3"]
    new = ["--vit", stages["vit"], "--init", "none", "--replace", "2-4", "--text", texts]
    go("translator", tmp_path / "t", *new, *common, "batch=5", "micro_batch=1")
    assert_complete(tmp_path / "t", "translator", 2, 1e-3)      # (6 images + 4 texts) // 5
    err = capfd.readouterr().err
    assert all(err.count(f"skipped: {data}: record {i} ") == 1 for i in (6, 7, 8)) and "cut.png" in err
    assert PROJECTOR < read_checkpoint(tmp_path / "t/translator.safetensors")[0].keys()     # a new one
    # stage 2 learns from images: of one sample a batch, none may be the record without
    go("encoder", tmp_path / "e", "--init", tmp_path / "t/translator.safetensors", *common, "batch=1")
    assert_complete(tmp_path / "e", "encoder", 6, 1e-3)
    go("decoder", tmp_path / "d", "--init", tmp_path / "e/encoder.safetensors", *common, "batch=7")
    assert_complete(tmp_path / "d", "decoder", 1, 1e-3)         # LLaVA's own text is read here: (6 + 1) // 7


@pytest.mark.parametrize("stage, start, kills", [("encoder", "translator", (3, 5)), ("decoder", "encoder", (3,))])
def test_resume_continues_exactly(stages, go, tmp_path, monkeypatch, stage, start, kills):
    """Killed while it saves, before or after log and weights were written: what resumes from the state before makes the
    same bits as a run at once. So do layers that keep only their input and compute the rest anew."""
    options = ["steps=4", "batch=2", "lr=1e-3", "save_every=2", "dtype=float32", "--init", stages[start]]
    go(stage, tmp_path / "whole", *options)
    replace = checkpoints.os.replace
    for kill in kills:              # the files are written in threes: at steps 2 and 4
        out, written = tmp_path / str(kill), iter(range(6))

        def failing(part, path):
            if next(written) == kill:
                raise KeyboardInterrupt
            replace(part, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints.os, "replace", failing)
            go(stage, out, *options)
        go(stage, out, *options, "--resume", "checkpointing=true")
        assert without_clock(rows_of(out)) == without_clock(rows_of(tmp_path / "whole")), kill
        for file in (f"{stage}.safetensors", "state.safetensors"):
            (a, _), (b, _) = (read_checkpoint(run / file) for run in (tmp_path / "whole", out))
            assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), kill
    go(stage, out, *options, "--resume")    # a run that is done already stays as it is
    assert_complete(out, stage, 4, 1e-3)
    started = read_checkpoint(stages[start])[0]["adapter.0.weight"]
    assert not torch.equal(b["master.adapter.0.weight"].half(), started)        # the steps did something


def test_bf16(stages, go, tmp_path):
    """The whole path in bfloat16, as on a GPU: losses near float32's."""
    go("encoder", tmp_path, "steps=3", "batch=6", "lr=1e-3", "--init", stages["translator"], "dtype=bfloat16")
    rows, float32 = assert_complete(tmp_path, "encoder", 3, 1e-3), rows_of(Path(stages["encoder"]).parent)
    for a, b in zip(rows, float32):
        assert relative(float(a["loss"]), float(b["loss"])) < 0.05 and a["targets"] == b["targets"]
    state, _ = read_checkpoint(tmp_path / "state.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}


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
    train.set_dtypes(vlm, s.bfloat16(), learns)
    trunk, _ = train.teach(vlm, llm, batch, translators, 0.5, torch.Generator().manual_seed(1))
    assert trunk.dtype == torch.bfloat16        # noise and lengths are float32: the layers behind must not become so


def test_resume_where_it_does_not_belong(stages, tiny_llm, tmp_path, capsys, monkeypatch):
    """Found before anything heavy is loaded, and every difference is named."""
    monkeypatch.setattr(train, "build", None)

    def no(stage, options, *words, llm=tiny_llm):
        common = ["--llm", llm, "steps=3", "batch=6", "lr=1e-3", "dtype=float32", "--resume"]
        out = str(Path(stages["translator"]).parent)
        assert_refused(capsys, ["train", stage, *common, "--out", out, *options], *words)

    same = ["--init", stages["vit"], "--replace", "2-4"]
    no("encoder", ["--init", stages["encoder"]], "state.safetensors", "stage was translator, is encoder")
    no("translator", [*same, "steps=9", "--seed", "1"], "seed was 0, is 1", "steps was 3, is 9")
    no("translator", ["--init", stages["vit"], "--replace", "3-4"], "ranges was [[2, 4]]")
    other = save_tiny_llm(tmp_path, width=48)
    no("translator", same, "llm was", tiny_llm, other, llm=other)

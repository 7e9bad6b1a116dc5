"""train.py: what a stage trains, losses against oracles, every stage as a user runs it, exact --resume, bad input."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_llm
from PIL import Image

import train
from data import world
from data.batches import Sample, collate
from data.images import preprocess
from formats import checkpoints
from formats.errors import run_cli
from formats.tokenizer import Tokenizer
from model import VLM, Llama, LlamaConfig, ViT, ViTConfig, add_lora
from surrogate import build_surrogate

ROOT = Path(__file__).parent.parent
PROJECTOR = {"adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias", "embd_soi", "embd_eoi",
             "encoder.vision_model.post_layernorm.weight", "encoder.vision_model.post_layernorm.bias"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, cache):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)


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
    steps, lr = 1000, 3e-4
    rates = [train.lr_at(i, steps, lr) for i in range(steps + 1)]
    warmup = 31  # 3.05 % of 1000, rounded up
    assert rates[0] == pytest.approx(lr / warmup) and rates[15] == pytest.approx(lr * 16 / warmup)
    assert rates[warmup - 1] == pytest.approx(lr) == max(rates)
    assert rates[warmup + 100] == pytest.approx(lr / 2 * (1 + math.cos(math.pi * 100 / 969)))
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert rates[steps] == pytest.approx(0, abs=1e-12)
    assert all(0 < train.lr_at(i, n, lr) <= lr for n in (1, 2, 3) for i in range(n))  # the shortest runs move, too


@pytest.mark.parametrize("stage, distill, expected", [
    ("vit", False, ("ViT", "projector")),
    ("translator", False, ("projector", "ends", "translators")),
    ("translator", None, ("translators",)),  # from a projector of stage 0
    ("translator", True, ("projector", "ends", "translators")),
    ("encoder", False, ("projector", "ends", "upper ViT")),
    ("encoder", True, ("projector", "ends", "upper ViT", "translators")),
    ("decoder", False, ("projector", "ends", "upper ViT", "decoder")),
])  # fmt: skip
def test_trained_parameters_are_the_recipes(stage, distill, expected):
    with torch.device("meta"):
        vit = ViT(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=24, num_attention_heads=2))
        llm = Llama(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=12,
                                num_attention_heads=2, num_key_value_heads=1, head_dim=8))  # fmt: skip
        vlm = VLM(vit, llm if stage == "decoder" else build_surrogate(llm, [(3, 5), (8, 10)]))
    groups = {"projector": ("adapter.",), "ends": ("embd_soi", "embd_eoi", "encoder.vision_model.post_layernorm."),
              "ViT": ("encoder.",), "decoder": ("decoder.",),
              "translators": ("decoder.model.layers.3.", "decoder.model.layers.6."),
              "upper ViT": tuple(f"encoder.vision_model.encoder.layers.{i}." for i in range(16, 24))}
    prefixes = tuple(p for name in expected for p in groups[name])
    wanted = {n for n, _ in vlm.named_parameters() if n.startswith(prefixes)}
    vlm.requires_grad_(True)
    got = train.trained_parameters(vlm, stage, bool(distill), projector=distill is not None)
    assert got.keys() == wanted == {n for n, p in vlm.named_parameters() if p.requires_grad}
    vit_layers = sum(n.endswith("mlp.fc1.weight") for n in got)
    assert vit_layers == {"vit": 24, "translator": 0}.get(stage, 8)  # 8 of CLIP-L's 24
    assert stage == "vit" or distill is None or PROJECTOR <= got.keys()
    assert ("decoder.model.embed_tokens.weight" in got) == (stage == "decoder")
    if stage == "decoder":
        assert sum(n.endswith("mlp.up_proj.weight") for n in got) == 12


@pytest.mark.parametrize("stage, distill", [("translator", 0), ("encoder", 0), ("encoder", 2), ("decoder", 0)])
def test_only_what_is_trained_changes(tiny_llm, tmp_path, stage, distill):
    vlm, llm = make_vlm(tiny_llm, [(2, 4)])
    if stage == "decoder":
        vlm.decoder = llm
    before = {n: p.detach().clone() for n, p in vlm.named_parameters()}
    llm_before = {n: p.detach().clone() for n, p in llm.named_parameters()}
    train.train_stage(stage, steps=3, batch=5, lr=1e-3, seed=0, device="cpu", out=tmp_path, resume=False, vlm=vlm,
                      llm=llm, loss_on=train.RECIPES[stage]["loss_on"], llm_name="tiny", vit_name="vit",
                      distill_every=distill, texts=[Sample(None, TEXT)])  # fmt: skip
    trained = set(train.trained_parameters(vlm, stage, distill > 0))
    changed = {n for n, p in vlm.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained
    if stage != "decoder":
        assert all(torch.equal(p, llm_before[n]) for n, p in llm.named_parameters())  # the replaced layers, too
    saved, _ = checkpoints.read_checkpoint(tmp_path / f"{stage}.safetensors")
    assert saved.keys() == trained
    assert all(torch.equal(saved[n], p.half()) for n, p in vlm.named_parameters() if n in trained)


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["translator", "encoder"])
def test_cross_entropy_and_gradients_equal_full_logits(tiny_llm, stage):
    vlm, _ = make_vlm(tiny_llm, [(1, 2), (4, 4)])
    batch = mixed_batch(vlm)
    parameters = train.trained_parameters(vlm, stage)
    loss, *distill = train.surrogate_loss(vlm, batch, stage)
    loss.backward()
    ours = grads(parameters)
    logits = vlm.decoder(embeds=vlm.embed(batch["tokens"], batch["pixels"]))  # (B, T, vocab)
    oracle = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    oracle.backward()
    assert distill == [None, None] and loss.dtype == torch.float32 and relative(loss.item(), oracle.item()) < 1e-5
    theirs = grads(parameters)
    assert_close(ours, theirs)
    assert ours.keys() == parameters.keys()


def distillation_oracle(vlm, llm, batch):
    """(KL, distance) of the distillation anew, by position and in float64, each model run from the bottom."""
    s, x = vlm.decoder, vlm.embed(batch["tokens"], batch["pixels"])
    ours, theirs = s.run(x, 0, s.translators[-1] + 1), llm.run(x, 0, s.ranges[-1][1] + 1)
    logp, logq = (m(embeds=x).double().log_softmax(-1) for m in (s, llm))
    distance = kl = 0
    for b in range(len(x)):
        for t in range(int(batch["lengths"][b])):
            off = (ours[b, t] - theirs[b, t]).double().square().sum()
            distance = distance + off / theirs[b, t].double().square().sum()
            if batch["targets"][b, t] >= 0:
                kl = kl + (logq[b, t].exp() * (logq[b, t] - logp[b, t])).sum()
    return kl, distance


@pytest.mark.parametrize("stage", ["translator", "encoder"])
@pytest.mark.parametrize("ranges", [[(2, 4)], [(1, 2), (4, 4)]])
def test_distillation_loss_and_who_learns_from_what(tiny_llm, stage, ranges):
    """The answers teach what is before the decoder, the full LLM teaches the translator alone."""
    vlm, llm = make_vlm(tiny_llm, ranges)
    batch = mixed_batch(vlm)
    parameters = train.trained_parameters(vlm, stage, distill=True)
    translator = {n for n in parameters if n.startswith("decoder.")}
    rest = parameters.keys() - translator

    ce, kl, distance = train.surrogate_loss(vlm, batch, stage, llm)
    for ours, oracle in zip((kl, distance), distillation_oracle(vlm, llm, batch)):
        assert relative(ours.item(), oracle.item()) < 1e-4
    (kl + distance).backward(retain_graph=True)
    from_distill = grads(parameters)
    ce.backward()
    from_answers = grads(parameters)
    assert from_distill.keys() == translator
    assert from_answers.keys() == rest

    oracle = sum(distillation_oracle(vlm, llm, batch))  # here gradients reach everything: look at the translator's only
    names = sorted(translator)
    assert_close(from_distill, dict(zip(names, torch.autograd.grad(oracle, [parameters[n] for n in names]))))
    alone, *nothing = train.surrogate_loss(vlm, batch, stage)
    alone.backward()
    assert nothing == [None, None] and alone.item() == ce.item()
    without_llm = grads(parameters)     # then they teach the translator too, in stage 1
    assert without_llm.keys() == (rest if stage == "encoder" else parameters.keys())
    assert_close(from_answers, {n: without_llm[n] for n in rest})
    sum(train.surrogate_loss(vlm, batch, stage, llm)).backward()  # once more: the steps leave no trace in each other
    both = grads(parameters)
    assert_close(both, {n: from_answers.get(n, 0) + from_distill.get(n, 0) for n in parameters})


def test_distillation_is_zero_for_a_perfect_translator(tiny_llm):
    vlm, llm = make_vlm(tiny_llm, [(3, 3)])
    with torch.no_grad():
        for ours, theirs in zip(vlm.decoder.model.layers[3].parameters(), llm.model.layers[3].parameters()):
            ours.copy_(theirs)
    _, kl, distance = train.surrogate_loss(vlm, mixed_batch(vlm), "encoder", llm)
    assert kl.item() == distance.item() == 0


def test_direct_route(tiny_llm, tmp_path):
    """--replace none: no surrogate, the full LLM's own loss; there is nothing to distil."""
    vlm, llm = make_vlm(tiny_llm, [])
    batch = mixed_batch(vlm)
    train.trained_parameters(vlm, "encoder")
    ce, *distill = train.surrogate_loss(vlm, batch, "encoder")
    vlm.decoder = llm
    assert distill == [None, None] and ce.item() == vlm.loss(batch["tokens"], batch["targets"], batch["pixels"]).item()


def test_later_epochs_read_kept_states(tiny_llm, tmp_path, monkeypatch):
    """Bit for bit as if trunk and LLM ran again in every epoch, also where a run goes on in the middle of one."""
    ran, loss = [], train.surrogate_loss

    def run(name, forget=False, steps=5, resume=False, **more):
        vlm, llm = make_vlm(tiny_llm, [(2, 4)])
        llm.model.layers[4].register_forward_hook(lambda *_: ran.append(name))  # one of those that the surrogate lacks
        monkeypatch.setattr(train, "surrogate_loss", lambda vlm, batch, *rest: loss(
            vlm, {k: v for k, v in batch.items() if k != "states"} if forget else batch, *rest))  # fmt: skip
        common = dict(batch=5, lr=1e-3, seed=0, device="cpu", loss_on="answers", llm_name="tiny", vit_name="vit")
        settings = dict(distill_every=1, epochs=2, projector=False, texts=[Sample(None, TEXT)]) | more
        train.train_stage("translator", steps, out=tmp_path / name, resume=resume, vlm=vlm, llm=llm, **common,
                          **settings)
        return checkpoints.read_checkpoint(tmp_path / name / "state.safetensors")[0]

    kept, again = run("kept"), run("again", forget=True)
    assert kept.keys() == again.keys() and all(torch.equal(kept[n], again[n]) for n in kept)
    # two groups a step, images and text; 3 of 5 steps are fresh
    assert ran.count("again") == 10 and ran.count("kept") == 6
    once = run("once", epochs=1)
    assert any(not torch.equal(kept[n], once[n]) for n in kept)

    class Stop(Exception):
        pass

    update = train.Trainer.update

    def stop_at_4(self):
        if self.step >= 4:
            raise Stop
        return update(self)

    monkeypatch.setattr(train.Trainer, "update", stop_at_4)
    with pytest.raises(Stop):
        run("broken", save_every=2)
    monkeypatch.setattr(train.Trainer, "update", update)
    broken = run("broken", save_every=2, resume=True)
    assert all(torch.equal(kept[n], broken[n]) for n in kept)
    with pytest.raises(ValueError, match="--epochs"):
        run("projector", projector=True)


def test_text_alone_needs_no_gradient_below_the_translator(tiny_llm):
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    parameters = train.trained_parameters(vlm, "translator")
    batches = train.Batches(vlm, 5, 5, "answers+special", seed=0, texts=[Sample(None, TEXT)])
    images, text = batches[0][0][0]  # of the first and only micro-batch
    assert len(images["tokens"]) == 3 and len(text["tokens"]) == 2 and text["pixels"] is None
    needs = {}
    for i, layer in enumerate(vlm.decoder.model.layers):
        layer.register_forward_hook(lambda module, args, out, i=i: needs.update({i: out.requires_grad}))
    loss, *_ = train.surrogate_loss(vlm, text, "translator")
    assert needs == {0: False, 1: False, 2: True, 3: True}
    loss.backward()
    assert set(grads(parameters)) == {n for n in parameters if n.startswith("decoder.model.layers.2.")}
    train.surrogate_loss(vlm, images, "translator")
    assert needs == {0: True, 1: True, 2: True, 3: True}  # images: the projector learns through the trunk


# ---- the optimiser --------------------------------------------------------------------------------------------------


def test_bf16_keeps_float32_master_weights():
    """Steps far below bf16's resolution (1/128 at 1.0) must add up."""
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    trainer = train.Trainer({"p": p}, lr=1e-4, steps=1_000_000)
    trainer.step = 31_000  # behind the warm-up, where the rate hardly changes
    for _ in range(100):
        p.grad = torch.ones_like(p)
        trainer.update()
    assert p.dtype == torch.bfloat16 and trainer.master["p"].dtype == torch.float32
    assert torch.allclose(trainer.master["p"], torch.tensor(1 - 100e-4), atol=2e-4)
    assert torch.equal(p, trainer.master["p"].bfloat16()) and (p < 1).all()


def test_what_learns_how_fast():
    names = "embd_soi", "adapter.0.weight", "decoder.model.layers.2.mlp.up_proj.weight"
    parameters = {n: torch.nn.Parameter(torch.zeros(1)) for n in names}
    trainer = train.Trainer(parameters, lr=1e-2, steps=1, ends_lr=30.0, translator_lr=5.0)
    for p in parameters.values():
        p.grad = torch.ones(1)
    lr = trainer.update()
    # Adam's first step is the rate
    assert [-parameters[n].item() / lr for n in names] == pytest.approx([30, 1, 5], rel=1e-4)


def test_trainer_is_adamw_with_clipping_and_without_decay():
    """Against torch's own AdamW; a parameter without a gradient stays, and has no state."""
    p, idle = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.ones(1))
    twin = torch.nn.Parameter(p.detach().clone())
    trainer = train.Trainer({"p": p, "idle": idle}, lr=0.1, steps=10)
    adam = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.999), weight_decay=0)
    for step, g in enumerate(torch.tensor([[3.0, 4.0], [0.1, -0.2], [-8.0, 6.0]])):
        p.grad, twin.grad = g.clone(), g / max(1, g.norm())
        adam.param_groups[0]["lr"] = train.lr_at(step, 10, 0.1)
        assert trainer.update() == train.lr_at(step, 10, 0.1)
        adam.step()
    assert torch.allclose(p, twin, atol=1e-6) and idle.item() == 1 and p.grad is None
    assert not any("idle" in n for n in trainer.state() if n.startswith("adam."))


# ---- batches --------------------------------------------------------------------------------------------------------


def test_every_step_shows_new_images(tiny_llm):
    """Batches of the world: never the same sample twice, the same ones for the same step, all trained tasks."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    of = lambda step, seed=0, size=8: train.Batches(vlm, size, size, "answers", seed)[step][0][0][0]
    pictures = {p.numpy().tobytes() for step in range(3) for p in of(step)["pixels"]}
    assert len(pictures) == 3 * 8
    assert all(torch.equal(v, of(2)[k]) for k, v in of(2).items())
    assert not torch.equal(of(2)["pixels"], of(2, seed=1)["pixels"])
    expected = [world.world(world.TRAINED_TASKS[j % 4], 8 + j, 0) for j in range(8)]
    assert torch.equal(of(1)["pixels"], torch.stack([preprocess(s.image) for s in expected]))
    small = torch.cat([of(step, size=1)["pixels"] for step in range(8, 16)])  # however small a batch, all tasks come
    assert torch.equal(small, of(1)["pixels"])


def samples_of(batches, steps):
    """The pictures (or texts) that a process reads in these steps, in order."""
    return [row for step in steps for micro in batches[step][0] for b in micro
            for row in (b["tokens"] if b["pixels"] is None else b["pixels"]).flatten(1).tolist()]


@pytest.mark.parametrize("every", [1, 2, 4, 6, 16])
def test_one_of_k_samples_is_taught(tiny_llm, monkeypatch, every):
    """The same ones however a batch is shared out, 1 / k of every batch, of all tasks alike; text counts as well."""
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])

    def taught(micro, rank, world, steps=range(4), **more):
        batches = train.Batches(vlm, 16, micro, "answers", 0, rank=rank, world=world, every=every, **more)
        return [b["tokens"][i][:b["lengths"][i]].tolist()
                for s in steps for m in batches[s][0] for b in m for i in b["taught"]]

    whole = taught(16, 0, 1)
    assert len(whole) == pytest.approx(64 / every, abs=2)
    assert sorted(taught(2, 0, 2) + taught(2, 1, 2)) == sorted(whole)
    if every % 4 == 0 or every == 1:        # then every step costs the same
        assert all(len(taught(16, 0, 1, [s])) == 16 // every for s in range(4))
        assert len(taught(16, 0, 1, range(20), texts=[Sample(None, TEXT)])) == 320 // every
    sample = lambda self, i: Sample(None, [dict(role="user", content=str(i)), TEXT[1]], task=i % 4)
    monkeypatch.setattr(train.Batches, "sample", sample)
    monkeypatch.setattr(train, "collate", lambda samples, *_, **__: dict(tasks=[s.task for s in samples]))
    batches = train.Batches(vlm, 16, 16, "answers", 0, every=every)
    seen = [b["tasks"][row] for step in range(60) for m in batches[step][0] for b in m for row in b["taught"]]
    assert all(seen.count(task) == pytest.approx(240 / every, abs=1) for task in range(4))


def test_processes_and_micro_batches_share_out_the_same_samples(tiny_llm):
    vlm, _ = make_vlm(tiny_llm, [(2, 4)])
    make = lambda micro, rank, world: train.Batches(vlm, 12, micro, "answers", 0, rank=rank, world=world)
    for step in (0, 3):
        whole = samples_of(make(12, 0, 1), [step])
        assert samples_of(make(3, 0, 1), [step]) == whole
        for micro, n in ((3, 2), (1, 3)):
            parts = [samples_of(make(micro, r, n), [step]) for r in range(n)]
            assert all(len(p) == 12 // n for p in parts) and sorted(sum(parts, [])) == sorted(whole)
    loader = make(6, 0, 1).loader(range(2, 4), workers=2)  # prepared ahead by other processes: the same
    assert [[b["pixels"].tolist() for micro in m for b in micro] for m, _ in loader] == \
           [[b["pixels"].tolist() for micro in make(6, 0, 1)[step][0] for b in micro] for step in (2, 3)]
    with pytest.raises(ValueError, match="5 samples at a time in 2 process.* 10, which does not divide 12"):
        make(5, 0, 2)


def test_own_chats_are_kept(tiny_llm, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    llm, tokenizer = Llama.from_pretrained(tiny_llm), Tokenizer.from_pretrained(tiny_llm)
    chats = train.own_chats(llm, tokenizer, 5, seed=0)
    assert len(chats) == 5 and all([m["role"] for m in c.messages] == ["user", "assistant"] for c in chats)
    assert all(m["content"] for c in chats for m in c.messages) and all(c.image is None for c in chats)
    monkeypatch.setattr(llm, "generate", None)
    assert train.own_chats(llm, tokenizer, 5, seed=0) == chats


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
    assert [float(r["lr"]) for r in rows] == pytest.approx([train.lr_at(i, steps, lr) for i in range(steps)], rel=1e-2)
    with Image.open(folder / "loss.png") as picture:
        picture.load()
    return rows


@pytest.mark.parametrize("stage", ["vit", "translator", "encoder", "decoder"])
def test_stage_from_the_command_line(stages, tiny_llm, stage):
    folder = Path(stages[stage]).parent
    rows = assert_complete(folder, stage, 3, 1e-3)
    tensors, about = checkpoints.read_checkpoint(stages[stage])
    recipe = dict(steps=3, batch=6, lr=1e-3)
    assert about["stage"] == stage and about["llm"] == tiny_llm and about["seed"] == 0 and about["steps_done"] == 3
    assert ViTConfig(**about["vit_config"]) == ViTConfig()
    vit = {f"encoder.{n}" for n, _ in ViT(ViTConfig()).named_parameters()}
    upper = {n for n in vit if ".layers.4." in n or ".layers.5." in n}
    decoder = {f"decoder.{n}" for n, _ in Llama.from_pretrained(tiny_llm).named_parameters()}
    translator = {n for n in decoder if n.startswith("decoder.model.layers.2.")}
    held = {"vit": vit | {n for n in PROJECTOR if n.startswith("adapter.")}, "translator": translator,
            "encoder": PROJECTOR | upper | translator,  # with distillation it holds its translator
            "decoder": PROJECTOR | upper | decoder}[stage]
    assert tensors.keys() == held and all(t.dtype == torch.float16 for t in tensors.values())
    if stage == "vit":
        assert about["recipe"] == recipe
        return
    assert about["vit"] == stages["vit"]
    assert about["ranges"] == ([] if stage == "decoder" else [[2, 4]])
    assert about["recipe"] == recipe | dict(
        loss_on="answers" if stage == "decoder" else "answers+special", ends_lr=30 if stage == "encoder" else 1,
        translator_lr=5 if stage == "encoder" else 1, epochs=4 if stage == "translator" else 1,
        distill_every={"translator": 1, "encoder": 2, "decoder": 0}[stage], dtype="torch.float32", records=0,
        projector=stage != "translator", texts=8 if stage == "translator" else 0, lora=0)
    assert about["start"] == stages[{"translator": "vit", "encoder": "translator", "decoder": "encoder"}[stage]]
    if stage == "decoder":  # same images as the encoder's, but without the chat's special tokens
        assert all(int(r["targets"]) < int(e["targets"]) for r, e in zip(rows, rows_of(Path(stages["encoder"]).parent)))
    if stage == "encoder":
        assert all(float(r["distill"]) > 0 for r in rows)


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
    common = ["--lr", "1e-3", *llava[0]]
    translator, encoder = tmp_path / "t" / "translator.safetensors", tmp_path / "e" / "encoder.safetensors"
    new = ["--vit", stages["vit"], "--replace", "2-4", "--chats", "8"]
    go("translator", tmp_path / "t", *new, *common, "--steps", 3, "--batch", 5)
    assert_complete(tmp_path / "t", "translator", 3, 1e-3)
    assert PROJECTOR < checkpoints.read_checkpoint(translator)[0].keys()  # over a ViT alone: a new projector
    # stage 2 learns from images: of one sample a batch, none may be the record without
    go("encoder", tmp_path / "e", "--init", translator, *common, "--steps", 6, "--batch", 1)
    assert_complete(tmp_path / "e", "encoder", 6, 1e-3)
    go("decoder", tmp_path / "d", "--init", encoder, *common, "--steps", 3, "--batch", 6)
    assert_complete(tmp_path / "d", "decoder", 3, 1e-3)


def test_llava_with_text_workers_and_bad_records(stages, go, tiny_llm, tmp_path, llava, capsys):
    """One epoch of images and text instructions, micro-batch by micro-batch; bad records are named and counted."""
    options, write, records = llava
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    bad = [{"id": "gone", "image": "no.png", "conversations": records[0]["conversations"]},
           {"id": "cut", "image": "cut.png", "conversations": records[0]["conversations"]},
           {"id": "backwards", "conversations": records[-1]["conversations"][::-1]}]
    write(records + bad)
    text = tmp_path / "text.json"
    text.write_text(json.dumps([records[-1] | {"id": i} for i in range(4)]))
    common = ["--vit", stages["vit"], "--replace", "2-4", "--text", text, *options]
    argv = ["translator", "--out", str(tmp_path / "t"), *map(str, common), "--llm", "smollm2-135m"]
    refused(capsys, argv, "gone", "no.png")
    capsys.readouterr()
    # only opening shows what is wrong with the image; a worker process finds it, and the message names it all the same
    write(records[:1] + bad[1:2])
    argv = ["encoder", "--llm", tiny_llm, "--out", str(tmp_path / "e"), "--init", stages["translator"], *options]
    refused(capsys, [*argv, "--workers", "1"], "record 1", "id 'cut'", bar=True)
    write(records + bad)
    capsys.readouterr()
    # nothing is trained above text alone when the full LLM stands in for the surrogate: such micro-batches are idle
    go("translator", tmp_path / "a", *common, "--replace", "none", "--init", "none", "--batch", 5, "--micro-batch", 1,
       "--steps", 1, "--on-bad-record", "skip")
    skip = ["--batch", 5, "--micro-batch", 1, "--on-bad-record", "skip", "--workers", 1]
    go("translator", tmp_path / "t", *common, *skip)
    rows = assert_complete(tmp_path / "t", "translator", 2, 1e-3)       # (6 images + 4 texts) // 5
    printed = capsys.readouterr()
    both = printed.out + printed.err
    assert "gone" in printed.err and "backwards" in printed.err and "cut.png" in both
    assert sum(int(r["skipped"]) for r in rows) == 1 and "1 records could not be read" in printed.out
    go("encoder", tmp_path / "e", "--init", tmp_path / "t" / "translator.safetensors", *options, *skip, "--lr", "1e-3")
    assert_complete(tmp_path / "e", "encoder", 1, 1e-3)
    go("decoder", tmp_path / "d", "--init", tmp_path / "e" / "encoder.safetensors", *options, *skip, "--lr", "1e-3")
    assert_complete(tmp_path / "d", "decoder", 1, 1e-3)                 # LLaVA's own text is read here: (6 + 1) // 5


def test_lora(stages, go, tiny_llm, tmp_path):
    """Stage 3 with low-rank updates: only these learn in the decoder; the merged weights answer alike."""
    go("decoder", tmp_path / "d", "--init", stages["encoder"], "--steps", 4, "--batch", 4, "--lr", "1e-2", "--lora", 2,
       "--dtype", "float32")
    file = tmp_path / "d" / "decoder.safetensors"
    tensors, about = checkpoints.read_checkpoint(file)
    low_rank = {n for n in tensors if ".lora_" in n}
    assert len(low_rank) == 2 * 7 * 6 and not any(n.startswith("decoder.") for n in tensors.keys() - low_rank)
    merged, plain = VLM.from_pretrained(tiny_llm, file).decoder, Llama.from_pretrained(tiny_llm)
    x = torch.randn(2, 5, 32)
    trained = Llama.from_pretrained(tiny_llm)
    add_lora(trained, 2)
    assert torch.equal(trained(embeds=x), plain(embeds=x))              # B is 0 at first: nothing changes
    checkpoints.load_checkpoint(trained, {n.removeprefix("decoder."): tensors[n] for n in low_rank}, file)
    with pytest.raises(ValueError, match="low-rank updates.*--resume"):
        go("decoder", tmp_path / "again", "--init", file)
    assert (merged(embeds=x) - trained(embeds=x)).abs().max() < 1e-3
    assert (merged(embeds=x) - plain(embeds=x)).abs().max() > 1e-2


@pytest.mark.parametrize("stage", ["translator", "encoder"])
def test_activation_checkpointing_changes_nothing(stages, go, tmp_path, stage):
    """With a new projector, stage translator too sends the answers' loss through a translator taught by the LLM."""
    options = ["--steps", 2, "--batch", 4, "--distill-every", 1, "--dtype", "float32"]
    new = ["--vit", stages["vit"], "--replace", "2-4", "--chats", "8"]
    options += ["--init", stages["translator"]] if stage == "encoder" else new
    go(stage, tmp_path / "a", *options)
    go(stage, tmp_path / "b", *options, "--checkpointing")
    assert without_clock(rows_of(tmp_path / "a")) == without_clock(rows_of(tmp_path / "b"))


def test_presets(tiny_llm, tmp_path, capsys):
    """--dry-run loads nothing; a preset asks for data, and refuses the weights of another model."""
    train.main(["encoder", "--preset", "llama-3.1-8b", "--dry-run", "--gpus", "4"])
    plan_ = capsys.readouterr().out
    assert "4,880 steps of 128 samples = 8 at a time x 4 times x 4 GPU(s)" in plan_ and "121,759,744" in plan_
    train.main(["decoder", "--preset", "llama-3.1-70b", "--dry-run", "--gpus", "16", "--fsdp", "--lora", "8"])
    assert "LoRA" in capsys.readouterr().out
    no = lambda *argv, words: refused(capsys, [*argv, "--out", str(tmp_path)], *words)
    no("encoder", "--preset", "llama-3.1-8b", words=["--data", "--dry-run"])
    no("encoder", "--preset", "llama-3.1-8b", "--dry-run", "--gpus", "5", words=["128", "40"])
    no("encoder", "--preset", "llama-3.1-8b", "--dry-run", "--gpus", "0", words=["--gpus", "at least 1"])
    no("encoder", "--preset", "llama-3.1-8b", "--dry-run", "--replace", "30-40", words=["cannot replace layers 30-40"])
    no("encoder", "--preset", "llama-3.1-8b", "--dry-run", "--lora", "8", words=["--lora", "decoder"])
    no("encoder", "--dry-run", words=["--preset", "llama-3.2-3b"])
    no("vit", "--preset", "llama-3.1-8b", words=["CLIP"])
    no("encoder", "--preset", "llama-3.1-8b", "--llm", tiny_llm, "--data", "x",
       words=["not the LLM of the preset", "vocab_size", "500"])
    no("encoder", "--lora", "4", words=["--lora", "decoder"])
    no("encoder", "--fsdp", "--distill-every", "1", words=["--fsdp", "--distill-every"])
    no("encoder", "--text", "x.json", words=["--text", "translator"])


def without_clock(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.parametrize("stage", ["translator", "encoder"])
def test_resume_continues_exactly(stages, go, tmp_path, monkeypatch, stage):
    """Six steps at once, and six steps killed in the fifth and resumed from the third's checkpoint: the same bits."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ["--steps", 6, "--batch", 5, "--lr", "1e-3", "--save-every", 3, "--dtype", "float32"]
    options += (["--init", stages["vit"], "--replace", "2-4", "--chats", "8"] if stage == "translator" else
                ["--init", stages["translator"], "--distill-every", "2"])
    go(stage, whole, *options)

    def killed(step, steps, lr, schedule=train.lr_at):
        if step == 4:
            raise KeyboardInterrupt
        return schedule(step, steps, lr)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "lr_at", killed)
        go(stage, halves, *options)
    assert len(rows_of(halves)) == 3
    go(stage, halves, *options, "--resume")

    assert_complete(halves, stage, 6, 1e-3)
    assert without_clock(rows_of(whole)) == without_clock(rows_of(halves))
    for file in (f"{stage}.safetensors", "state.safetensors"):
        (a, about_a), (b, about_b) = (checkpoints.read_checkpoint(run / file) for run in (whole, halves))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert without_clock([about_a]) == without_clock([about_b])
    start, name = checkpoints.read_checkpoint(stages["translator"])[0], "decoder.model.layers.2.mlp.up_proj.weight"
    assert not torch.equal(a[f"master.{name}"].half(), start[name])  # and the six steps did something

    go(stage, halves, *options, "--resume")  # a run that is done already stays as it is
    assert_complete(halves, stage, 6, 1e-3)


def test_a_checkpoint_cut_short_between_its_files_resumes(stages, go, tmp_path, monkeypatch):
    """Killed while it saves: whichever of the files are new, resuming gives the whole log."""
    options = ["--steps", 4, "--batch", 2, "--save-every", 2, "--init", stages["translator"]]
    go("encoder", tmp_path / "whole", *options)
    for kill in range(3, 6):  # the files are written in threes: at steps 2 and 4
        out, count, write_whole = tmp_path / str(kill), 0, checkpoints.write_whole

        def failing(path, write):
            nonlocal count
            if count == kill:
                raise KeyboardInterrupt
            count += 1
            write_whole(path, write)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoints, "write_whole", failing)
            go("encoder", out, *options)
        go("encoder", out, *options, "--resume")
        assert [r["loss"] for r in rows_of(out)] == [r["loss"] for r in rows_of(tmp_path / "whole")], kill


def test_bound_travels_with_the_checkpoint(stages, go, tiny_llm, tmp_path):
    """How far visual tokens may lie from where text lives: kept in the files, and held to by whoever loads them."""
    pixels = torch.stack([preprocess(world.world("read", i).image) for i in range(4)])
    bound_of = lambda file: checkpoints.read_checkpoint(file)[1]["bound"]
    assert bound_of(stages["translator"]) == bound_of(stages["vit"])
    for stage in ("encoder", "decoder"):
        bound = bound_of(stages[stage])
        vlm = VLM.from_pretrained(tiny_llm, stages[stage])
        text = Llama.from_pretrained(tiny_llm).model.embed_tokens.weight
        assert bound == vlm.bound > 0
        vlm.adapter[2].weight.mul_(1000)  # a projector that tries to get away
        away = (vlm.visual_tokens(pixels)[:, 1:-1] - text.mean(0)).norm(dim=-1)  # without start and end of image
        assert 0.9 * bound < away.max() <= bound
    free, short = tmp_path / "t" / "translator.safetensors", ("--steps", 1, "--batch", 5)
    go("translator", tmp_path / "t", *short, "--bound", 0, "--init", stages["vit"], "--replace", "2-4", "--chats", 8)
    go("encoder", tmp_path / "e", *short, "--init", free)
    assert bound_of(free) == bound_of(tmp_path / "e" / "encoder.safetensors") == 0
    go("encoder", tmp_path / "b", *short, "--init", free, "--bound", 1)
    assert bound_of(tmp_path / "b" / "encoder.safetensors") == 1


def test_bf16(stages, go, tmp_path):
    """The whole path in bfloat16, as on a GPU: losses near float32's."""
    options = ["--steps", 3, "--batch", 6, "--lr", "1e-3", "--init", stages["translator"], "--distill-every", 2]
    go("encoder", tmp_path, *options, "--dtype", "bfloat16")
    rows, float32 = assert_complete(tmp_path, "encoder", 3, 1e-3), rows_of(Path(stages["encoder"]).parent)
    for a, b in zip(rows, float32):
        assert relative(float(a["loss"]), float(b["loss"])) < 0.05 and a["targets"] == b["targets"]
    state, _ = checkpoints.read_checkpoint(tmp_path / "state.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}


STILL = ["--steps", 1, "--batch", 2, "--lr", "1e-12", "--dtype", "float32"]  # changes nothing: shows where it starts


def test_stage_3_goes_on_from_stage_3(stages, go, tmp_path):
    go("decoder", tmp_path, "--init", stages["decoder"], *STILL)
    (before, _), (after, _) = map(checkpoints.read_checkpoint, (stages["decoder"], tmp_path / "decoder.safetensors"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_the_projector_of_stage_0_reaches_stage_2(stages, go, tmp_path):
    """The translator's file holds only the translator: what stage 2 starts from comes down the whole chain."""
    go("encoder", tmp_path, "--init", stages["translator"], *STILL)
    (first, _), (second, _) = map(checkpoints.read_checkpoint, (stages["vit"], tmp_path / "encoder.safetensors"))
    assert all(torch.equal(first[n], second[n]) for n in first if n in second) and "adapter.0.weight" in second


def test_a_loss_that_explodes_stops_the_run(tiny_llm, stages, tmp_path, capsys):
    options = ["--init", stages["translator"], "--lr", "1e30", "--batch", "2", "--out", str(tmp_path)]
    refused(capsys, ["encoder", "--llm", tiny_llm, *options], "loss became", "--lr", bar=True)


# ---- bad input: one line, exit status 2 -----------------------------------------------------------------------------


def refused(capsys, argv, *words, bar=False):
    capsys.readouterr()
    assert run_cli(lambda: train.main(argv)) == 2
    err = capsys.readouterr().err
    line = err.splitlines()[-1] if bar else err
    assert line.startswith("error: ") and (bar or err.count("\n") == 1), err
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"


def test_bad_input(stages, tiny_llm, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    no = lambda stage, *options, words: refused(capsys, [stage, "--llm", tiny_llm, *out, *options], *words)
    at = ("--init", stages["translator"])

    for option, value in [("--steps", "0"), ("--steps", "-3"), ("--batch", "0"), ("--batch", "-1"),
                          ("--save-every", "0"), ("--distill-every", "-1")]:  # fmt: skip
        no("encoder", *at, option, value, words=[option, "at least"])
    no("translator", "--vit", stages["vit"], "--chats", "0", words=["--chats", "at least"])
    no("vit", "--steps", "0", words=["--steps"])

    new = ("--vit", stages["vit"], "--chats", "8")
    no("translator", *new, "--replace", "3-9", words=["cannot replace layers 3-9", "0-5"])
    no("translator", *new, "--replace", "x", words=["cannot read the layer ranges"])
    no("translator", *new, words=["cannot replace layers 23-28"])  # the default's, and this LLM has six
    no("encoder", *at, "--replace", "3-4", words=["translator.safetensors", "[(2, 4)]", "[(3, 4)]"])
    no("encoder", "--init", "none", "--replace", "2-4", *new, words=["needs a trained translator"])
    no("encoder", "--init", stages["vit"], "--replace", "2-4", words=["needs a trained translator"])
    no("encoder", *at, "--epochs", "2", words=["--epochs", "translator"])
    no("decoder", "--init", stages["encoder"], "--translator-lr", "5", words=["--translator-lr", "encoder"])
    no("translator", *new, "--replace", "2-4", "--epochs", "2", words=["--epochs", "stage 0"])  # a new projector learns
    no("translator", *new, "--replace", "2-4", "--distill-every", "2",
       words=["--distill-every", "every sample (1) or none (0)"])
    direct = ("--init", stages["full"], "--replace", "none")
    no("encoder", *direct, "--distill-every", "1", words=["--distill-every", "surrogate"])
    no("decoder", "--init", stages["encoder"], "--distill-every", "1", words=["--distill-every", "surrogate"])

    notes = tmp_path / "notes.safetensors"
    notes.write_text("no checkpoint")
    no("encoder", "--init", str(notes), words=["notes.safetensors", "truncated or not"])
    no("encoder", "--init", str(tmp_path / "gone.safetensors"), words=["no such checkpoint", "gone.safetensors"])
    foreign = ("--init", f"{tiny_llm}/model.safetensors", "--vit", stages["vit"])
    no("decoder", *foreign, words=["model.safetensors", "does not belong"])
    no("translator", "--replace", "2-4", "--vit", stages["encoder"], words=["encoder.safetensors", "not a ViT"])
    no("translator", "--replace", "2-4", "--vit", str(tmp_path / "gone.safetensors"), words=["gone.safetensors"])
    assert not (tmp_path / "out").exists()


def test_resume_where_it_does_not_belong(stages, tiny_llm, tmp_path, capsys):
    def no(stage, of, options, *words, llm=tiny_llm):
        folder = str(Path(stages[of]).parent) if of else str(tmp_path)
        common = ["--llm", llm, "--steps", "3", "--batch", "6", "--lr", "1e-3", "--out", folder, "--resume"]
        refused(capsys, [stage, *common, *options], *words)

    same = ("--init", stages["vit"], "--replace", "2-4", "--chats", "8")
    at = ["--init", stages["translator"]]
    no("encoder", None, at, "nothing to resume")
    no("encoder", "translator", at, "state.safetensors", "stage was translator, is encoder")
    no("vit", "encoder", [], "stage was encoder, is vit")
    no("decoder", "encoder", ["--init", stages["encoder"]], "stage was encoder, is decoder")
    no("encoder", "encoder", at, "recipe was", "distill_every")
    no("translator", "translator", [*same, "--lr", "1e-4"], "recipe was", "0.0001")
    no("translator", "translator", [*same, "--steps", "9"], "recipe was", "9")
    no("translator", "translator", [*same, "--replace", "3-4"], "ranges was [[2, 4]]")

    (tmp_path / "other").mkdir()
    other = save_tiny_llm(tmp_path / "other", width=48)
    no("translator", "translator", same, "was trained for", tiny_llm, other, llm=other)
    no("vit", "vit", [], "llm was", tiny_llm, other, llm=other)


def test_bad_records_are_named(stages, tiny_llm, tmp_path, capsys, llava):
    options, write, records = llava
    argv = ["encoder", "--llm", tiny_llm, "--init", stages["translator"], "--out", str(tmp_path / "out"),
            "--steps", "2", "--batch", "6", *options]  # fmt: skip
    marked = {"id": "r7", "conversations": records[0]["conversations"]}
    for bad, word in [(marked, 'names no "image"'), (marked | {"image": "gone.png"}, "gone.png not found")]:
        write([*records, bad])
        refused(capsys, argv, "data.json: record 6 (id 'r7')", word)
    (tmp_path / "bad.png").write_text("no picture")
    write([*records, marked | {"image": "bad.png"}])
    refused(capsys, argv, "data.json: record 6 (id 'r7')", "bad.png", "not an image", bar=True)
    write(records[5:])
    refused(capsys, argv, "data.json", "no record with an image")
    refused(capsys, [*argv, "--data", str(tmp_path / "gone.json")], "gone.json: no such file")


def test_as_a_user_sees_it(tiny_llm, stages, tmp_path):
    """A fresh Python: exit status 2, one line, no traceback."""
    options = ["--llm", tiny_llm, "--vit", stages["vit"], "--replace", "3-9", "--out", str(tmp_path)]
    got = subprocess.run([sys.executable, "train.py", "translator", *options], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 2 and got.stdout == ""
    assert got.stderr.startswith("error: cannot replace layers 3-9") and got.stderr.count("\n") == 1

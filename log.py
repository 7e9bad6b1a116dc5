"""What a training run leaves in its folder: log.csv, a plot of the loss, and checkpoints from which it can go on."""

import csv
import itertools
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import MissingFile, UserError, write_whole
from formats.checkpoints import checkpoint_file, open_checkpoint, save_checkpoint
from formats.official import placed

try:
    import fcntl
except ImportError:     # Windows
    fcntl = None


def check_start(about, out):
    """UserError if a run would save its checkpoint over the one that it starts from."""
    mine = Path(out, f"{about['stage']}.safetensors").resolve()
    if about["start"] and checkpoint_file(about["start"]).resolve() == mine:
        raise UserError(f"this run goes on from {about['start']}, and would overwrite it: give another --out")


ADAM = ("step", "exp_avg", "exp_avg_sq")        # the state of AdamW, for each parameter
PATHS = ("llm", "vit", "start", "data", "images", "text")
NOT_COMPARED = ("workers", "save_every", "micro_batch", "checkpointing", "read")       # "read": later, by Log


def same_file(was, now):
    """Do two paths name the same file, spelled in two ways or moved? What was moved is no longer there."""
    if not was or not now or was == now:
        return was == now
    there = Path(was).exists(), Path(now).exists()
    return Path(was).samefile(now) if all(there) else there[1] and Path(was).name == Path(now).name


def check_resume(out, about):
    """
    UserError if the run in `out` is another one: names all that differs. Returns its own metadata, with the paths of
    now. The contents of data and text are compared when they have been read (Log).
    """
    state = Path(out) / "state.safetensors"
    if not state.exists():
        raise MissingFile(f"nothing to resume: {state} is not there (see --out)")
    saved = open_checkpoint(state)[1]
    if "step" not in saved or "about" not in saved:
        raise UserError(f"{state} does not say of which run it is: it is damaged; start anew in another --out")
    flat = lambda d: {k: v for key, value in d.items()
                      for k, v in (value.items() if isinstance(value, dict) else [(key, value)])}
    now, then = flat(about), flat(saved["about"])
    if about.get("ranges", 0) is None:                      # build finds them anew
        now["ranges"] = then.get("ranges")

    def same(name):
        if name in ("data", "images", "text"):
            return bool(then.get(name)) == bool(now[name])
        return same_file(then.get(name), now[name]) if name in PATHS else then.get(name) == now[name]

    if changed := [k for k in now if k not in NOT_COMPARED and not same(k)]:
        changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in changed]
        raise UserError(f"{state} is of another run: {'; '.join(changed)}")
    if not 0 <= saved["step"] <= (now.get("steps") or 10**9):
        raise UserError(f"{state} says that {saved['step']} steps are done: it is damaged; start anew in another --out")
    return saved["about"] | {k: about[k] for k in PATHS if k in about}


def process():
    """(number of this process, how many there are): 0 and 1 unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def over_processes(x, operation="SUM"):
    """Sum a tensor over all processes, or another of torch.distributed's operations, in place."""
    if process()[1] > 1:
        dist.all_reduce(x, getattr(dist.ReduceOp, operation))
    return x


def gathered(tensors):
    """(name, tensor) pairs as a dict, in the first process alone. Sharded ones are made whole, by all processes."""
    out = {}
    for n, t in tensors:
        t = t.full_tensor() if hasattr(t, "full_tensor") else t
        if process()[0] == 0:
            out[n] = t.cpu()
    return out


class Log:
    """Progress bar, log.csv, loss.png and checkpoints of a run."""

    def __init__(self, out, about, learns, optimizer, recipe, resume=False, saved=dict.items):
        """learns: {name: parameter} of the optimizer. saved: these -> the (name, tensor) pairs of the checkpoint."""
        self.out, self.about = Path(out), json.loads(json.dumps(about))
        self.learns, self.optimizer, self.recipe, self.saved = learns, optimizer, recipe, saved
        self.first = process()[0] == 0
        self.rows, self.state = [], self.out / "state.safetensors"
        if self.first:
            lock(self.out)
        if resume:
            self.restore()
        self.start = time.time() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.steps = range(len(self.rows), recipe.steps)                        # those that are left
        self.bar = tqdm(self.steps, about["stage"], unit="step", total=recipe.steps, initial=len(self.rows),
                        disable=not self.first)

    def restore(self):
        """Give the parameters and the optimizer what they had when the state was saved."""
        for part in self.out.glob(".*.part") if self.first else ():             # what a killed run was writing
            part.unlink()
        tensors, saved = open_checkpoint(self.state)
        if saved["about"].get("read") != self.about.get("read"):
            raise UserError(f"the files of --data or --text have changed since the run that {self.state} is of: "
                            "give those, or start anew in another --out")
        trained = {n.removeprefix("master.") for n in tensors if n.startswith("master.")}
        if differ := sorted(trained ^ set(self.learns)):
            raise UserError(f"the state to resume is of another run: {differ[0]} is trained in only one of the two")
        try:
            with torch.no_grad():
                for n, p in self.learns.items():
                    p.copy_(placed(tensors[f"master.{n}"]().to(p.device), p))
                    if any(f"adam.{n}.{k}" in tensors for k in ADAM):       # then all have to be there
                        adam = {k: tensors[f"adam.{n}.{k}"]() for k in ADAM}
                        moments = {k: placed(adam[k].to(p.device), p) for k in ADAM if k != "step"}
                        self.optimizer.state[p] = adam | moments
        except (RuntimeError, KeyError) as e:               # a tensor of another shape, or none
            raise UserError(f"{self.state} does not fit this run ({str(e).splitlines()[0]}): it is damaged; "
                            "start anew in another --out") from None
        self.rows = saved.get("rows")
        if not isinstance(self.rows, list) or len(self.rows) != saved["step"]:
            raise UserError(f"{self.state} lacks the log of its {saved['step']} steps: it is damaged; start anew in "
                            "another --out")

    def add(self, step, **values):
        """Note what a step made, and save when it is time."""
        values = {k: round(v.item(), 6) if torch.is_tensor(v) else v for k, v in values.items()}
        self.rows.append(dict(step=step) | values | dict(seconds=round(time.time() - self.start, 2)))
        self.bar.set_postfix(loss=values["loss"])
        if (step + 1) % self.recipe.save_every == 0 or step + 1 == self.recipe.steps:
            self.save()

    def save(self):
        def write(part):
            with open(part, "w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, list(self.rows[-1]))
                writer.writeheader()
                writer.writerows(self.rows)

        about = self.about | dict(steps_done=len(self.rows), seconds=round(time.time() - self.start, 1))
        weights = gathered((n, t.detach().half()) for n, t in self.saved(self.learns))
        adam = {f"adam.{n}.{k}": v for n, p in self.learns.items() for k, v in self.optimizer.state.get(p, {}).items()}
        state = gathered((f"master.{n}", p.detach()) for n, p in self.learns.items()) | gathered(adam.items())
        if self.first:
            write_whole(self.out / "log.csv", write)
            save_checkpoint(self.out / f"{self.about['stage']}.safetensors", weights, about)
            # last: a run that was killed in here goes on from the state before, and the other two may be ahead of it
            save_checkpoint(self.state, state, dict(step=len(self.rows), about=self.about, rows=self.rows))

    def close(self):
        if self.first:
            figure = plot_loss(self.rows, self.about["stage"])
            write_whole(self.out / "loss.png", lambda part: figure.savefig(part, format="png"))
            print(f"{len(self.rows)} steps, loss {self.rows[0]['loss']} -> {self.rows[-1]['loss']}, "
                  f"{self.rows[-1]['seconds']:.0f} s; see {self.out}/")
            unlock()
        return self.rows


HELD = {}       # {folder: its open descriptor}: what this process has locked


def lock(folder):
    """Refuse a run in whose folder another process is at work: the two would overwrite each other's files. The lock is
    the folder's own, and ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None or folder.resolve() in HELD:
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        HELD[folder.resolve()] = opened
    except OSError as e:
        os.close(opened)
        if isinstance(e, (BlockingIOError, PermissionError)):       # any other: a file system that knows no locks
            raise UserError(f"another run is writing into {folder}: wait for it, or give another --out") from None


def unlock():
    """Give all locks back; a worker process does so at once, lest it hold one longer than a run that was killed."""
    while HELD:
        os.close(HELD.popitem()[1])


if fcntl:
    os.register_at_fork(after_in_child=unlock)


def plot_loss(rows, title="", ylabel="loss"):
    """The loss of a log, step by step and smoothed, as a figure."""
    from matplotlib.figure import Figure
    steps, losses = [int(r["step"]) for r in rows], [float(r["loss"]) for r in rows]
    smooth = list(itertools.accumulate(losses, lambda mean, x: 0.95 * mean + 0.05 * x))
    fig = Figure(figsize=(6, 3.2), dpi=120, layout="tight")
    ax = fig.add_subplot(xlabel="step", ylabel=ylabel, title=title)
    ax.plot(steps, losses, color="#0072B2", alpha=0.3, lw=0.8)
    ax.plot(steps, smooth, color="#0072B2", lw=1.6)
    ax.grid(alpha=0.3)
    return fig

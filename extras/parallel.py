"""
Several GPUs, and low-rank updates: the same stages as train.py's, in the processes that torchrun starts.

    torchrun --nproc-per-node 8 -m extras.parallel encoder --recipe llama-3.1-8b --data … --images …     # data parallel
    torchrun --nproc-per-node 8 -m extras.parallel decoder … --fsdp      # the decoder's layers are sharded (FSDP2)
    python -m extras.parallel decoder … --lora 8                  # stage 3 trains low-rank updates of the decoder alone

Data parallel needs no wrapper: each process takes its share of the batch and divides its loss by the targets of *all*
processes, so the gradients only have to be added up. A sharded weight is a DTensor: each process holds a slice of it.
"""
import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor

import train
from cli import Parser, UserError, number, run_cli
from extras.lora import add_lora, merge
from model import VLM

PATIENCE = timedelta(seconds=120)       # until the other processes are there


def local(t):
    """This process's slice of a sharded tensor; of any other, all of it. The same memory, not a copy."""
    return t.to_local() if isinstance(t, DTensor) else t


def like(t, full):
    """A tensor that is whole in every process, sharded as `t` is: each cuts its own slice."""
    return distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None) if isinstance(t, DTensor) else full


def joined(t, slice):
    """The sharded tensor whose slice here is `slice`, of any dtype, sharded as `t` is. No copy."""
    if not isinstance(t, DTensor):
        return slice
    return DTensor.from_local(slice, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


def whole(t):
    """All of a sharded tensor, gathered: every process has to call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def shard(llm):
    """Shard every layer of a Llama over the processes: a layer is gathered when it runs, and freed after (FSDP2).

    Embeddings, final norm and head stay whole on every GPU: the LM head is used as a matrix (model.Llama.loss), not as
    a module. Works on the meta device, so that no process ever holds a whole model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in llm.model.layers:      # gradients are added up in float32, whatever the dtype of the weights
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    share = getattr(torch.distributed.fsdp, "share_comm_ctx", None)     # torch 2.13 has it
    if share:   # one stream of gathering and adding up for all layers: else each keeps its gradient to the very end
        share(list(llm.model.layers))
    llm.place = like
    return llm


class SharedOptimizer(train.Optimizer):
    """Of a sharded parameter, copy, gradient and optimizer state are those of this process's slice."""
    local = staticmethod(local)

    def gather(self):
        for p in self.parameters.values():
            if p.grad is not None and isinstance(p, DTensor):
                p.grad *= dist.get_world_size()             # FSDP took the mean over the processes: here it is the sum
        super().gather()

    def norm(self):
        """Add the gradients of all processes up, then the norm of them all."""
        masters, device = list(self.master.items()), next(iter(self.master.values())).device
        met = torch.tensor([float(m.grad is not None) for _, m in masters], device=device)
        dist.all_reduce(met)                                # what no sample of this process met, another's may have
        squares = torch.zeros(2, device=device)             # sharded or not: sum of the squares of all gradients
        for (n, m), count in zip(masters, met.tolist()):
            if count and m.grad is None:
                m.grad = torch.zeros_like(m)
            if m.grad is not None:
                sharded = isinstance(self.parameters[n], DTensor)
                if not sharded:
                    dist.all_reduce(m.grad)
                squares[int(sharded)] += m.grad.square().sum()
        dist.all_reduce(squares[1])
        return squares.sum().sqrt()

    def weights(self):
        return {n: joined(self.parameters[n], m) for n, m in self.master.items()}

    def state(self):
        out = {f"master.{n}": m for n, m in self.weights().items()}
        for n, m in self.master.items():
            for k, v in self.adam.state.get(m, {}).items():
                out[f"adam.{n}.{k}"] = joined(self.parameters[n], v) if v.dim() else v
        return out

    def read(self, name, tensor):
        return local(like(self.parameters[name], tensor.to(self.master[name].device))) if tensor.dim() else tensor


class Team:
    """The processes that torchrun started, with what train.Solo has."""
    Optimizer = SharedOptimizer

    def __init__(self, device, fsdp):
        if device.startswith("cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                # by hand, so that only this has so short a limit: a step may wait for a checkpoint to be written
                store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
                if not 0 <= rank < world:
                    raise ValueError(f"RANK={rank} of WORLD_SIZE={world}")
                backend = "nccl" if device.startswith("cuda") else "gloo"
                dist.init_process_group(backend, store=store, rank=rank, world_size=world)
            except (ValueError, RuntimeError) as e:     # RANK or WORLD_SIZE missing or no number, a process not there
                why = str(e).splitlines()[0]
                raise UserError(f"the processes do not find each other ({why}): start them with torchrun") from None
            atexit.register(dist.destroy_process_group)
        self.rank, self.world, self.device = dist.get_rank(), dist.get_world_size(), device
        self.shard = shard if fsdp else None
        self.mixed = fsdp               # sharded layers work in step: every process runs the same layers, both ways

    def sum(self, x):
        dist.all_reduce(x)
        return x

    def gathered(self, tensors):
        out = {}
        for n, t in tensors:
            t = whole(t)
            if self.rank == 0:
                out[n] = t.cpu()
        return out


class InStep(VLM):
    """A process whose micro-batch has no image sends gradients through the sharded trunk all the same, as others do."""

    def embed(self, tokens, pixels=None):
        x = super().embed(tokens, pixels)
        return x if pixels is not None else x + 0 * self.embd_soi


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, epilog="All else as in train.py: see python train.py --help",
                    usage="… extras.parallel STAGE …", allow_abbrev=False)
    parser.add_argument("--fsdp", action="store_true", help="shard the decoder's layers over the processes")
    parser.add_argument("--lora", type=number(int, 1, 1024), metavar="RANK",
                        help="stage decoder: train low-rank updates in place of the whole decoder")
    args, rest = parser.parse_known_args(argv)
    device = train.parse(rest).device
    many = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if args.fsdp and not many:
        raise UserError("--fsdp needs several processes: start with `torchrun --nproc-per-node N -m extras.parallel …`")
    if args.lora and "decoder" not in rest:
        raise UserError("--lora trains the decoder: it is an option of the stage decoder alone")

    def prepare(vlm, about):
        if args.fsdp:
            vlm.__class__ = InStep
        if args.lora:
            add_lora(vlm.decoder, args.lora)
            about["lora"] = args.lora

    def export(weights, vlm):
        if not args.lora:
            return weights.items()
        return merge({n: whole(t) for n, t in weights.items()}, vlm.decoder, args.lora, whole)

    train.main(rest, Team(device, args.fsdp) if many else train.Solo(device), prepare, export)


if __name__ == "__main__":
    sys.exit(run_cli(main))

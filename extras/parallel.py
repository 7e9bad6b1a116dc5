"""
Several GPUs: what the processes of a training run tell each other. With one process, all of this does nothing.

    torchrun --nproc-per-node 8 train.py encoder …          # data parallel: every GPU has the whole model
    torchrun --nproc-per-node 8 train.py decoder … --fsdp   # the decoder's layers are sharded over the GPUs (FSDP2)

Data parallel needs no wrapper: each process takes its share of the batch and divides its loss by the targets of *all*
processes, so the gradients only have to be added up. A sharded weight is a DTensor: each process holds a slice of it.
"""
import atexit
import os

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.tensor import DTensor, distribute_tensor

from formats.errors import UserError


def start(device):
    """Join the other processes if torchrun started this one. Returns this process's device."""
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return device


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(x):
    """Sum a tensor over all processes, in place."""
    if world() > 1:
        dist.all_reduce(x)
    return x


def union(lines):
    """The lines that any process has, sorted."""
    if world() == 1:
        return sorted(lines)
    everyones = [None] * world()
    dist.all_gather_object(everyones, sorted(lines))
    return sorted(set().union(*everyones))


def first_alone(f):
    """Call f() in the first process, then in the others: what it leaves on disk is made only once."""
    if world() == 1:
        return f()
    out = f() if rank() == 0 else None
    dist.barrier()
    return out if rank() == 0 else f()


# ---------------------------------------------------------------------------------------------------------------------
# Sharded weights


def shard(llm):
    """Shard every layer of a Llama over the processes: a layer is gathered when it runs, and freed after (FSDP2).

    Embeddings, final norm and head stay whole on every GPU: the LM head is used as a matrix (model.Llama.loss), not as
    a module. Works on the meta device, so that no process ever holds a whole model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    if not dist.is_initialized():
        raise UserError("sharding needs several processes: start with `torchrun --nproc-per-node N train.py …`")
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world(),))
    in_float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)   # gradients are added up so, whatever the weights
    for layer in llm.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=in_float32)
    share = getattr(torch.distributed.fsdp, "share_comm_ctx", None)     # torch 2.13 has it
    if share:   # one stream of gathering and adding up: else each layer keeps its gradient until the backward's end
        share(list(llm.model.layers))
    llm.sharded = True
    return llm


def local(t):
    """This process's slice of a sharded tensor; of any other, all of it. The same memory, not a copy."""
    return t.to_local() if isinstance(t, DTensor) else t


def like(t, full):
    """A tensor that is whole in every process, sharded as `t` is."""
    if not isinstance(t, DTensor):
        return full
    return distribute_tensor(full, t.device_mesh, t.placements, src_data_rank=None)     # each cuts its own slice


def joined(t, slice):
    """The sharded tensor whose slice here is `slice`, of any dtype, sharded as `t` is. No copy."""
    if not isinstance(t, DTensor):
        return slice
    return DTensor.from_local(slice, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


def whole(t):
    """All of a sharded tensor, gathered: every process has to call this."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def gathered(tensors):
    """{name: tensor}, some of them sharded -> all of each on the CPU in the first process, {} in the others.

    One at a time, so that no GPU ever holds more than one whole tensor. Every process has to call this.
    """
    out = {}
    for name, t in tensors.items():
        t = whole(t.detach())
        if rank() == 0:
            out[name] = t.cpu()
    return out

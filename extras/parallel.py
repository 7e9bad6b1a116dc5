"""
Several GPUs, and low-rank updates: the same stages as train.py's, in the processes that torchrun starts.

    torchrun --nproc-per-node 8 -m extras.parallel encoder --recipe llama-3.1-8b --data … --images …     # data parallel
    torchrun --nproc-per-node 8 -m extras.parallel decoder … --fsdp      # the decoder's layers are sharded (FSDP2)
    python -m extras.parallel decoder … --lora 8                  # stage 3 trains low-rank updates of the decoder alone

Data parallel needs no wrapper: each process takes its share of the batch and divides its loss by the targets of *all*
processes, so the gradients only have to be added up (train.clip). A sharded weight is a DTensor: each process holds a
slice of it.
"""
import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.distributed.rendezvous import rendezvous

import train
from cli import Parser, UserError, number, run_cli
from extras.lora import add_lora, merge
from model import VLM

PATIENCE = timedelta(seconds=120)       # until the other processes are there


def join(device):
    """Join the processes that torchrun started. Returns the device of this one."""
    if device.startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    try:        # by hand, so that only this has so short a limit: a step may wait for a checkpoint to be written
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        if not 0 <= rank < size:
            raise ValueError(f"RANK={rank} of WORLD_SIZE={size}")
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (ValueError, RuntimeError) as e:     # RANK or WORLD_SIZE missing or no number, a process not there
        why = str(e).splitlines()[0]
        raise UserError(f"the processes do not find each other ({why}): start them with torchrun") from None
    atexit.register(dist.destroy_process_group)
    return device


def shard(llm, dtype):
    """Shard every layer of a Llama over the processes: a layer is gathered when it runs, and freed after (FSDP2). What
    learns is float32, but gathered in dtype; gradients are added up in float32.

    Embeddings, final norm and head stay whole on every GPU: the LM head is used as a matrix (model.Llama.loss), not as
    a module. Works on the meta device, so that no process ever holds a whole model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)      # inputs: RoPE's are float32
    for layer in llm.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
    share = getattr(torch.distributed.fsdp, "share_comm_ctx", None)     # torch 2.13 has it
    if share:   # one stream of gathering and adding up for all layers: else each keeps its gradient to the very end
        share(list(llm.model.layers))
    return llm


class InStep(VLM):
    """A process whose micro-batch has no image sends gradients through the sharded trunk all the same, as others do."""

    def embed(self, tokens, pixels=None):
        x = super().embed(tokens, pixels)
        return x if pixels is not None else x + 0 * self.embd_soi.to(x.dtype)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(__doc__, epilog="All else as in train.py: see python train.py --help",
                    usage="… extras.parallel STAGE …", allow_abbrev=False)
    parser.add_argument("--fsdp", action="store_true", help="shard the decoder's layers over the processes")
    parser.add_argument("--lora", type=number(int, 1, 1024), metavar="RANK",
                        help="stage decoder: train low-rank updates in place of the whole decoder")
    args, rest = parser.parse_known_args(argv)
    options = train.parse(rest)
    many = "RANK" in os.environ and "MASTER_ADDR" in os.environ
    if args.fsdp and not many:
        raise UserError("--fsdp needs several processes: start with `torchrun --nproc-per-node N -m extras.parallel …`")
    if args.lora and options.stage != "decoder":
        raise UserError("--lora trains the decoder: it is an option of the stage decoder alone")
    if many:
        options.device = join(options.device)

    def change(vlm, about):
        if args.fsdp:
            vlm.__class__ = InStep
        if not args.lora:
            return {}
        add_lora(vlm.decoder, args.lora)
        about["lora"] = args.lora
        return dict(saved=lambda trained: merge(trained, vlm.decoder, args.lora))

    train.run(options, shard if args.fsdp else None, change)


if __name__ == "__main__":
    sys.exit(run_cli(main))

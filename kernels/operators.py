"""What the files of Triton kernels share: how a launch becomes an operator of PyTorch, and how tensors become rows."""

import torch


def operator(signature, outputs, mutates=()):
    """Decorator that makes an operator out of a function (*outputs, *arguments) which launches kernels.

    signature: its name and types, as PyTorch writes them. outputs: what makes the tensors to be filled, from the same
    arguments. torch.compile asks for no more: it treats the operator as one opaque step. mutates: names of arguments
    that are overwritten. Empty tensors launch nothing.
    """
    name = signature[: signature.index("(")]

    def decorate(launch):
        def run(*arguments):
            made = outputs(*arguments)
            if arguments[0].numel() > 0:
                with torch.cuda.device_of(arguments[0]):
                    launch(*(made if isinstance(made, tuple) else (made,)), *arguments)
            return made

        schema = signature.removeprefix(name)
        made = torch.library.custom_op(f"kernels::{name}", run, mutates_args=mutates, schema=schema)
        made.register_fake(outputs)
        return made

    return decorate


def channels_last(x):
    """x, or a copy whose neighbouring channels are neighbours in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows(x):
    """(..., d) -> (rows (n, d), a view wherever the strides allow one; a row's stride). None: no rows."""
    if x is None:
        return None, 0
    x = channels_last(x.reshape(-1, x.shape[-1]))
    return x, x.stride(0)

"""A CUDA graph: a function's launches, recorded once and replayed as one.

To launch a kernel from Python takes 5 to 20 microseconds, and a decoding step of a Llama with 28 layers launches four
hundred: on a fast GPU most of them run for a shorter time than that, and the GPU waits for Python. A replayed graph
starts all of them at once. It uses the very same memory every time, so whatever changes from step to step must be a
tensor's contents, never a shape or a number of Python's (see `fix` of model.KVCache).
"""
import functools

import torch


@functools.cache
def side_stream(device):
    return torch.cuda.Stream(device)            # one for all: cuBLAS keeps memory for every stream that it meets


def record(function, x):
    """`function` of a CUDA tensor like x, recorded: a function that copies its argument into x's place and replays.

    `function` runs three times here, so it must not count its calls. Its result is the same tensor every time.
    """
    x, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device):
        side = side_stream(x.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):           # unrecorded: compiles kernels, and lets cuBLAS choose its algorithms
            for _ in range(2):
                function(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):   # other threads may go on
            y = function(x)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y
    return replay

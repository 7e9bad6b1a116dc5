"""CUDA graphs: a function's launches, recorded once and replayed as one.

    without                                     with
    Python: launch launch launch launch …       Python: replay
    GPU:      run    run    run    run          GPU:    run run run run run …

A launch from Python takes 5 to 20 microseconds, longer than most of the four hundred kernels in a Llama's decoding step
run on a fast GPU. A replayed graph starts all of them at once. It uses the very same memory every time: what changes
from step to step must be a tensor's contents, never a shape or a number (see `fix` of model.KVCache). Recording takes
as long as a dozen steps, so what was recorded is kept, together with its memory.
"""
import threading
from contextlib import contextmanager

import torch


class Graphs:
    """Recordings by whatever they depend on: the last few that were used, none of them by two at a time.

    Each is recorded on a stream of its own, since cuBLAS keeps one workspace a stream: two that shared it could not be
    replayed side by side. CUDA has 32 to give, so those of forgotten recordings go to new ones.
    """

    def __init__(self, keep=2, new_stream=torch.cuda.Stream):
        self.keep, self.new_stream, self.lock = keep, new_stream, threading.Lock()
        self.idle, self.streams = [], []        # (key, what `make` returned, its stream), the latest last

    def __deepcopy__(self, memo):
        return Graphs(self.keep, self.new_stream)       # a copied model lies elsewhere

    @contextmanager
    def borrow(self, key, make):
        """The recording of this key, for the time of the block; a new one, make(stream), if none is to be had."""
        with self.lock:
            found = [entry for entry in self.idle if entry[0] == key][-1:]
            self.idle = [entry for entry in self.idle if entry not in found]
            stream = found[0][2] if found else self.streams.pop() if self.streams else self.new_stream()
        made = found[0][1] if found else make(stream)
        try:
            yield made
        finally:                                # also where an answer is not read to its end
            with self.lock:
                self.idle.append((key, made, stream))
                self.streams += [stream for *_, stream in self.idle[:-self.keep]]
                del self.idle[:-self.keep]


def record(function, x, stream):
    """`function` of a CUDA tensor like x, recorded: a function that copies its argument into x's place and replays.

    `function` runs three times here, so it must not count its calls. Its result is the same tensor every time.
    """
    x, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):         # unrecorded: compiles kernels, and lets cuBLAS choose its algorithms
            for _ in range(2):
                function(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):     # other threads may go on
            y = function(x)

    def replay(new):
        x.copy_(new)
        graph.replay()
        return y
    return replay

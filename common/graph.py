"""A decoding step as a CUDA graph: the GPU gets its launches once, and one call replays them.

A step of a small model is hundreds of kernels, of a few microseconds each; the host takes longer to
launch them one by one. A graph captures the launches: the same kernels on the same memory. So all
steps read their ids from one tensor; the GPU counts the cache's columns itself; attention reads a
fixed number of them, of which the mask has those in use. Where these are full, a step over twice as
many is captured.
"""

import functools
import sys

import torch

FEWEST = 256  # columns that a captured step reads, where the cache has so many
refused = []  # why nothing is captured any more in this process


class CapturedStep:
    """step(model, cache, ids (B,)) → (B,D) with one cache, captured: called with ids alone.

    What it returns holds until the next call. From now on the cache's length is on its device.
    """

    def __init__(self, step, model, cache):
        self.used = cache.seen = cache.length  # columns in use; that a step reads
        self.ids = torch.zeros(len(cache.mask), dtype=torch.long, device=model.device)
        cache.length = torch.tensor([self.used], device=model.device)
        self.step, self.model, self.cache, self.replay = step, model, cache, None

    def once(self):
        self.found = self.step(self.model, self.cache, self.ids)

    def __call__(self, ids):
        self.ids.copy_(ids)
        if self.used == self.cache.seen:  # a size's first step warms up: it is not captured
            self.cache.seen = min(max(FEWEST, 2 * self.used), self.cache.mask.shape[1])
            self.replay = None
            on_side_stream(self.once)
        else:
            self.replay = self.replay or capture(self.once)
            self.replay() if self.replay else on_side_stream(self.once)
        self.used += 1
        return self.found


@functools.cache
def side_stream():
    """Capturing needs a stream beside the default one; one for all, since each has own memory."""
    return torch.cuda.Stream()


def on_side_stream(function):
    """Calls it on the side stream, in turn with the work around it."""
    here, there = torch.cuda.current_stream(), side_stream()
    there.wait_stream(here)
    with torch.cuda.stream(there):
        function()
    here.wait_stream(there)


def capture(function):
    """A function's kernels, not yet run → what runs them, or None where they cannot be captured: a
    line says so, and nothing is captured any more."""
    if refused:
        return None
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=side_stream()):
            function()
        return graph.replay
    except RuntimeError as e:
        torch.cuda.set_stream(here)
        refused.append(str(e.__context__ or e).splitlines()[0])  # ending it fails, too
        print(f"warning: no CUDA graph, decoding is slower: {refused[0]}", file=sys.stderr)
        return None

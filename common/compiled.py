"""torch.compile where it pays (--compile): one kernel where eager code runs several.

    a block          by one code for all layers, whatever the number of rows and columns
    head with loss   logits, log-softmax and its gradient (model.losses)
    a 4-bit weight   look-up, scale and rounding, within its block (quant.look_up)

Answers are decoded without it: one token is a CUDA graph's work, not a compiler's. Compiled code
rounds differently, else it is the same; where a compiler is missing or fails, a line says so, and
the code runs as it is written.
"""

import sys

import torch

from common import memory
from model import Block, losses
from quant import tables

CHOICES = ("auto", "on", "off")
LARGE = 100e6  # parameters from which "auto" compiles, on a GPU
VARIANTS = 64  # of a block's code: with or without gradient, mask, adapter, rows of several sizes
said = []  # why there is no compiler


def wanted(choice: str, device, config) -> bool:
    """What --compile comes to."""
    large = device.type == "cuda" and memory.parameters(config) >= LARGE
    return large if choice == "auto" else choice == "on"


def compile_model(model, backend=None, dynamic=True):
    """Compiles a Transformer's blocks and its head with the loss → the model. Copies of it
    (model.share) are compiled too. backend: torch.compile's; None: inductor, or eager. dynamic:
    at once for rows of any size; None: first for the size that comes first, which is faster."""
    how = dict(backend=backend or inductor, dynamic=dynamic)
    forward = torch.compile(Block.forward, **how)
    torch._dynamo.config.recompile_limit = VARIANTS

    def block(layer, x, *attention):
        # below the first adapter nothing has a gradient: one more code, unless x asks for one
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
        if trained and not x.requires_grad:
            x = x.detach().requires_grad_()
        return forward(layer, x, *attention)

    tables(model.device)  # before the compiler looks, which would make them anew in each block
    model.block = block
    model.losses = torch.compile(losses, **how)
    return model


def inductor(graph, inputs):
    """torch.compile's own backend. A graph in which it fails runs as it is, backward too, and so do
    all after it."""
    from torch._inductor import compile

    if said:
        return graph
    config, at_once = torch._functorch.config, "force_non_lazy_backward_lowering"
    try:  # the backward pass, too, while one can still go back (an older torch cannot)
        with config.patch({at_once: True} if hasattr(config, at_once) else {}):
            return compile(graph, inputs)
    except torch._dynamo.exc.RestartAnalysis:  # no failure: it looks again, knowing more
        raise
    except Exception as e:
        said.append(f"{type(e).__name__}: {e}".splitlines()[0])
        print(f"--compile: goes on without a compiler: {said[0]}", file=sys.stderr)
        return graph

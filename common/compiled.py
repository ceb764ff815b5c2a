"""torch.compile where it pays: --compile.

    blocks         each on its own, by one code: what is compiled for the first serves all of them
    head and loss  the logits of a piece, their log-softmax and its gradient
    4-bit weights  look-up, scale and rounding in one kernel (quant.py)

Decoding stays as it is, token by token. A compiled step has other roundings, nothing else: where
there is no compiler, or it fails, a line says so and the step runs as it is written.
"""

import functools
import sys


def compile_model(model):
    """Compiles a Transformer's blocks and its head with the loss → the model. A copy of it
    (model.share) is not compiled."""
    for block in model.layers:
        block.compile(backend=backend)
    return model


def backend(graph, inputs):
    """inductor; a graph that it cannot compile runs as it is."""
    from torch._inductor import compile as inductor  # imported only where something is compiled

    try:
        return inductor(graph, inputs)
    except Exception as e:
        warn(str(e).strip().splitlines()[0])
        return graph


@functools.cache
def warn(reason: str):
    print(f"--compile: runs without, where the compiler fails: {reason}", file=sys.stderr)

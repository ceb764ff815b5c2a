"""How much of a GPU's arithmetic a training step uses: every weight of a random model is trained,
under bf16 autocast where there is bf16.

    python -m tools.mfu --size 1.1B

    share = FLOPs of a step / (its seconds · the card's matrix rate)

    FLOPs per token = 6 · (numbers in matrices, the head's too) + 6 · L · Q · T

A number is multiplied and added once in the forward pass and twice in the backward pass: 6; a
frozen one is multiplied once less: 4. In each of L layers q·k and p·v take 2 · Q each, Q = heads ·
head_dim, over T/2 tokens on average: 2 · Q · T, three times with the backward pass (PaLM: Chowdhery
et al. 2022, appendix B, which has T for T/2). What checkpointing computes again is not counted. The
matrix rate is measured in the same run, from one large product.
"""

import time
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn

from common.compiled import CHOICES, compile_model, wanted
from common.memory import SIZES, UNIT, linears, measured
from common.run import adamw, autocast, has_bf16, main, opt, pick_device
from model import Transformer
from sft import sft_loss


@dataclass
class Options:
    size: str = opt("1.1B", "the model's shape", choices=tuple(SIZES))
    rows: int = opt(8, "rows per step", at_least=1)
    length: int = opt(1024, "tokens of a row", at_least=2)
    packed: int = opt(1, "sequences of a row; 1: attention needs no mask", at_least=1)
    compile: str = opt("auto", "compile blocks and head, as a stage", choices=CHOICES)
    steps: int = opt(10, "timed steps, after three", at_least=1)
    product: int = opt(
        0, "the measured product's rows and columns; 0: 8192, on a CPU 1024", at_least=0
    )
    device: str = opt("auto", "cpu, cuda or auto")


# ---------------------------------------------------------------- counted
def matrices(c, heads=0) -> int:
    """Numbers in the blocks' matrices, and in so many heads'."""
    blocks = c.num_hidden_layers * sum(i * o for i, o in linears(c).values())
    return blocks + heads * c.vocab_size * c.hidden_size


def step_flops(c, lengths, targets: int, frozen=False) -> int:
    """Of a training step on sequences of these lengths, forward and backward, from the shape alone;
    the head is needed on `targets` tokens.
    """
    attention = 6 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
    products = sum(lengths) * matrices(c) + targets * c.vocab_size * c.hidden_size
    return (4 if frozen else 6) * products + attention * sum(n * n for n in lengths)


# ---------------------------------------------------------------- measured
def seconds(function, device, times: int) -> float:
    """Of one call, a mean over several behind three that warm up."""
    for i in range(3 + times):
        if i == 3:
            wait(device)
            start = time.perf_counter()
        function()
    wait(device)
    return (time.perf_counter() - start) / times


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device, size=0) -> float:
    """FLOPs a second of one product of two (size, size) matrices, in bf16 where there is bf16; 0:
    as large as the device needs.
    """
    size = size or (1024 if device.type == "cpu" else 8192)
    a = torch.randn(size, size, device=device, dtype=working(device))
    return 2 * size**3 / seconds(lambda: a @ a, device, 10)


def copy_rate(device) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2 ** (26 if device.type == "cpu" else 30)
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), device, 10)


def working(device):
    """The type of matrix products, and of frozen weights."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


# ---------------------------------------------------------------- random models
def build(model, device, dtype, linears=(), four_bit=None):
    """Gives a model of the meta device random weights, layer by layer: `linears` go through
    `four_bit`, so that the model never exists whole in 16 bits. A tensor's name alone decides its
    numbers: ours and transformers' model get the same. → the model
    """
    for name in [name for name, _ in model.named_modules()]:  # names: what is replaced is freed
        m = model.get_submodule(name)
        if own := list(m.parameters(recurse=False)):
            m.to(dtype).to_empty(device=device, recurse=False)
            for word, p in m.named_parameters(recurse=False):
                seed = zlib.crc32(f"{name}.{word}".removeprefix("model.").encode())
                drawn = torch.Generator(device).manual_seed(seed)
                nn.init.normal_(p, 1.0 if own[0].dim() == 1 else 0.0, 0.02, generator=drawn)
            if name in linears:
                model.set_submodule(name, four_bit(m))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = getattr(model, "model", model).embed_tokens.weight
    return model


def mfu(o: Options):
    device, c = pick_device(o.device), SIZES[o.size]
    if 2 * o.packed > o.length:
        raise ValueError(f"--packed {o.packed}: a sequence has two tokens or more of --length")
    with torch.device("meta"):
        model = Transformer(c)
    build(model, device, torch.float32)
    if on := wanted(o.compile, device, c):
        compile_model(model, dynamic=None)
    optimizer = adamw(model, 1e-5)
    tokens = torch.randint(c.vocab_size, (o.rows, o.length))
    segments = torch.arange(o.length).mul(o.packed).div(o.length, rounding_mode="floor")
    segments = segments.expand(o.rows, -1).contiguous()

    def step():
        with autocast(device):
            loss = sft_loss(model, tokens, tokens, segments) / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    took = seconds(step, device, o.steps)
    rate = matrix_rate(device, o.product)
    lengths = [o.length // o.packed] * (o.rows * o.packed)
    used = step_flops(c, lengths, tokens.numel()) / took
    print(
        f"{o.size}, {o.rows} x {o.length} tokens, {o.packed} a row{', compiled' * on}:"
        f" {tokens.numel() / took:,.0f} tokens a second, {used / 1e12:.3g} TFLOP/s,"
        f" {used / rate:.0%} of {rate / 1e12:.3g} measured, {measured(device) / UNIT:.1f} GB"
    )


if __name__ == "__main__":
    main(mfu, Options, __doc__)

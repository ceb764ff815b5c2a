"""How much of a GPU's arithmetic a training step uses: every weight of a random model is trained,
under bf16 autocast where there is bf16.

    python -m tools.mfu --size 1.1B

    share = FLOPs of a step / (its seconds · the card's matrix rate)

    FLOPs per token = 6 · (numbers in matrices, the head's too) + 6 · L · Q · T

A number is multiplied and added once in the forward pass and twice in the backward pass: 6. In
each of L layers q·k and p·v take 2 · Q each, Q = heads · head_dim, over T/2 tokens on average:
2 · Q · T, three times with the backward pass (PaLM: Chowdhery et al. 2022, appendix B, which has T
for T/2). The matrix rate is measured in the same run, from one large product.
"""

import time
from dataclasses import dataclass

import torch

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
    steps: int = opt(10, "timed steps, after three", at_least=1)
    product: int = opt(8192, "the measured product's rows and columns", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")


def flops_per_token(c, length: int) -> int:
    """Of a training step, forward and backward, from the shape alone."""
    matrices = c.num_hidden_layers * sum(i * o for i, o in linears(c).values())
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * length
    return 6 * (matrices + c.vocab_size * c.hidden_size) + 6 * attention


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


def mfu(o: Options):
    device, c = pick_device(o.device), SIZES[o.size]
    torch.manual_seed(0)
    with device:
        model = Transformer(c)
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
    dtype = torch.bfloat16 if has_bf16(device) else torch.float32
    a = torch.randn(o.product, o.product, device=device, dtype=dtype)
    rate = 2 * o.product**3 / seconds(lambda: a @ a, device, 10)
    used = tokens.numel() * flops_per_token(c, o.length // o.packed) / took
    print(
        f"{o.size}, {o.rows} x {o.length} tokens, {o.packed} a row: {tokens.numel() / took:,.0f}"
        f" tokens a second, {used / 1e12:.3g} TFLOP/s, {used / rate:.0%} of {rate / 1e12:.3g}"
        f" measured, {measured(device) / UNIT:.1f} GB"
    )


if __name__ == "__main__":
    main(mfu, Options, __doc__)

"""Which of torch's attentions is the fastest for packed rows: one layer's, forward and backward.

    python -m tools.attention --dtypes bfloat16

    masked      the mask that Layout.bias makes, once for all layers; for each query head
                its own copy of keys and values ("grouped": enable_gqa in its place)
    causal      no mask: what model.py does where a row is one sequence; where a row holds several
                its sequences see each other, and it is the limit of what can be had
    nested      jagged nested tensors, a sequence each
    varlen      torch.nn.attention.varlen, in bf16
    flex        flex_attention, compiled, with a block mask

Each must say what `masked` says, values and gradients, to 1e-2 of the largest in bf16 and 1e-5 in
float32. One that fails says so in its row. "once" is what is made once for all layers, "a layer"
forward and backward pass of one, memory what both take beyond their inputs and outputs.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.memory import SIZES
from common.run import main, opt, pick_device
from packing import by_segments
from tools.mfu import seconds

ROWS = [(8, 1024, 1), (8, 1024, 4), (8, 1024, 8), (1, 8192, 1), (1, 8192, 8)]  # R, W, sequences
CLOSE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass
class Options:
    sizes: str = opt("1.1B,135M,7B", "models whose heads are taken, by commas")
    dtypes: str = opt("bfloat16,float32", "by commas")
    times: int = opt(10, "timed calls, after three", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")


def segments_of(R: int, W: int, sequences: int):
    """(R,W) on the host: rows cut at random into so many sequences of 8 tokens at least."""
    seeded, rows = torch.Generator().manual_seed(0), []
    for _ in range(R):
        cuts = torch.randperm(W // 8 - 1, generator=seeded)[: sequences - 1].add(1).mul(8)
        rows.append((torch.arange(W)[:, None] >= cuts).sum(1))
    return torch.stack(rows)


# ---------------------------------------------------------------- the ways
# each: segments (R,W), q (R,H,W,d) → a function of q, k and v → (R,H,W,d), made once for all layers
def repeated(k, v, heads: int):
    groups = heads // k.shape[1]
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)


def masked(segments, q, grouped=False):
    bias = by_segments(segments, segments).layout(q.device).bias(q)
    return causal(segments, q, grouped, bias)


def causal(_segments, q, grouped=False, bias=None):
    def attend(q, k, v):
        k, v = (k, v) if grouped else repeated(k, v, q.shape[1])
        options = dict(is_causal=bias is None, enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, bias, **options)

    return attend


def lengths_of(segments) -> list[int]:
    """Of the sequences, row after row."""
    return [n for row in segments for n in row.unique_consecutive(return_counts=True)[1].tolist()]


def laid_end_to_end(x):
    """(R,H,W,d) → (R·W,H,d)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def nested(segments, q):
    lengths, (R, _, W, _) = lengths_of(segments), q.shape
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(q.device)
    known = dict(min_seqlen=min(lengths), max_seqlen=max(lengths))

    def attend(q, k, v):
        flat = [laid_end_to_end(x) for x in (q, *repeated(k, v, q.shape[1]))]
        jagged = torch.nested.nested_tensor_from_jagged
        q, k, v = (jagged(x, offsets, **known).transpose(1, 2) for x in flat)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.transpose(1, 2).values().unflatten(0, (R, W)).transpose(1, 2)

    return attend


def varlen(segments, q, grouped=False):
    from torch.nn.attention.varlen import varlen_attn

    lengths, (R, _, W, _) = lengths_of(segments), q.shape
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(q.device)
    ends, known = (offsets, offsets, max(lengths), max(lengths)), inspect.signature(varlen_attn)
    how = dict(window_size=(-1, 0)) if "window_size" in known.parameters else dict(is_causal=True)
    how |= dict(enable_gqa=True) if grouped else {}

    def attend(q, k, v):
        k, v = (k, v) if grouped else repeated(k, v, q.shape[1])
        y = varlen_attn(*map(laid_end_to_end, (q, k, v)), *ends, **how)
        return y.unflatten(0, (R, W)).transpose(1, 2)

    return attend


compiled = functools.cache(torch.compile)


def flex(segments, q):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    here, (R, _, W, _) = segments.to(q.device), q.shape

    def seen(row, _head, i, j):
        return (here[row, i] == here[row, j]) & (i >= j)

    blocks = create_block_mask(seen, R, None, W, W, device=q.device)
    call = flex_attention if q.device.type == "cpu" else compiled(flex_attention)
    return lambda q, k, v: call(q, k, v, block_mask=blocks, enable_gqa=k.shape[1] != q.shape[1])


def grouped(way):
    return lambda segments, q: way(segments, q, grouped=True)


WAYS = {
    "masked": masked,
    "masked, grouped": grouped(masked),
    "causal": causal,
    "causal, grouped": grouped(causal),
    "nested": nested,
    "varlen": varlen,
    "varlen, grouped": grouped(varlen),
    "flex": flex,
}


# ---------------------------------------------------------------- measured
def apart(ours, theirs) -> float:
    """How far two lists of tensors differ, in shares of each one's largest number."""
    pairs = zip(ours, theirs, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def both_passes(attend, inputs, grad):
    """Output, and the gradients of q, k and v."""
    y = attend(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def measure(way, segments, inputs, grad, device, times: int):
    """→ what it says, seconds of making it and of a layer, bytes beyond inputs and outputs."""

    def whole():
        return both_passes(way(segments, inputs[0]), inputs, grad)

    said, most = whole(), 0  # what compiles does it here
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        whole()
        most = torch.cuda.max_memory_allocated(device) - before - sum(x.nbytes for x in said)
    once = seconds(lambda: way(segments, inputs[0]), device, 3)
    attend = way(segments, inputs[0])
    return said, once, seconds(lambda: both_passes(attend, inputs, grad), device, times), most


def compare(c, dtype, rows, device, times: int):
    """Yields a row for each way: its name, then seconds once, seconds a layer, bytes and how far it
    is from `masked`; or why there are none.
    """
    (R, W, _), seeded = rows, torch.Generator(device).manual_seed(0)
    heads = [c.num_attention_heads] * 2 + [c.num_key_value_heads] * 2
    grad, *inputs = (
        torch.randn(R, H, W, c.head_dim, generator=seeded, device=device).to(dtype) for H in heads
    )
    if device.type == "cuda":
        torch.compiler.reset()  # each shape is compiled for itself
    inputs, segments, reference = [x.requires_grad_() for x in inputs], segments_of(*rows), None
    for name, way in WAYS.items():
        try:
            said, *figures = measure(way, segments, inputs, grad, device, times)
        except Exception as e:  # whatever a card or a version of torch cannot do
            yield name, f"{type(e).__name__}: {e}".splitlines()[0][:120]
            continue
        reference = said if reference is None else reference
        yield name, *figures, apart(said, reference)


def chosen(flag: str, given: str, known) -> list:
    """What was named, by commas. ValueError for what is not known."""
    names = [name.strip() for name in given.split(",")]
    if wrong := [name for name in names if name not in known]:
        raise ValueError(f"{flag}: {wrong[0]!r} is none of {', '.join(known)}")
    return names


def attention(o: Options):
    device, best = pick_device(o.device), []
    sizes = chosen("--sizes", o.sizes, SIZES)
    dtypes = chosen("--dtypes", o.dtypes, [str(d).removeprefix("torch.") for d in CLOSE])
    print("| heads of | dtype | rows | way | once, ms | a layer, ms | GB | apart |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for dtype in (getattr(torch, name) for name in dtypes):
        for rows in ROWS:
            for size in sizes:
                best += [f"{size} {rows}: {table(size, dtype, rows, device, o.times)}"]
    print("seconds of masked over the fastest that says the same: " + "; ".join(best))


def table(size: str, dtype, rows, device, times: int) -> str:
    """Prints a row for each way → the fastest that is right, and masked's seconds over its own."""
    c, took = SIZES[size], {}
    what = f"{size} | {str(dtype).removeprefix('torch.')} | {rows[0]} × {rows[1]}, {rows[2]} each"
    for name, *figures in compare(c, dtype, rows, device, times):
        if len(figures) == 1:
            print(f"| {what} | {name} | {figures[0]} | | | |", flush=True)
            continue
        once, layer, size_, far = figures
        wrong = "" if far <= CLOSE[dtype] else ": not the same"
        if not wrong:
            took[name] = once / c.num_hidden_layers + layer
        figures = f"{1e3 * once:.2f} | {1e3 * layer:.3f} | {size_ / 2**30:.2f} | {far:.1e}{wrong}"
        print(f"| {what} | {name} | {figures} |", flush=True)
    if "masked" not in took:
        return "none"
    first = min(took, key=took.get)
    return f"{first} {took['masked'] / took[first]:.2f}"


if __name__ == "__main__":
    main(attention, Options, __doc__)

"""Where the memory goes, and what fits on a GPU: python -m common.memory

    bytes per parameter                         full, float32   LoRA on bf16    QLoRA (NF4)
    frozen weights                              0               2               0.52
    trained weights  float32                    4               4 of the few    4 of the few
    gradients        as the trained weights     4               4               4
    optimizer        Adam's two averages        8               8               8

These are exact. What a forward pass keeps for the backward pass grows with the tokens, not with
what is trained: it is estimated here by counting what autograd saves in each block of model.py
(tests count it too), and then measured.
"""

import resource
import sys

import torch

from common.pieces import PIECE
from lora import GROUPS as TARGETS
from model import Config
from paged import PagedAdamW

UNIT = 2**30  # what a graphics card's maker calls 1 GB


def shape(vocab, hidden, ffn, layers, heads, kv_heads, head_dim, tied=False):
    return Config(vocab, hidden, ffn, layers, heads, kv_heads, head_dim, tie_word_embeddings=tied)


SIZES = {
    "135M": shape(49152, 576, 1536, 30, 9, 3, 64, True),  # SmolLM2
    "0.5B": shape(151936, 896, 4864, 24, 14, 2, 64, True),  # Qwen2.5, without its biases
    "1.1B": shape(32000, 2048, 5632, 22, 32, 4, 64),  # TinyLlama
    "3B": shape(128256, 3072, 8192, 28, 24, 8, 128, True),  # Llama 3.2
    "7B": shape(32000, 4096, 11008, 32, 32, 32, 128),  # Llama
    "13B": shape(32000, 5120, 13824, 40, 40, 40, 128),
    "34B": shape(32000, 8192, 22016, 48, 64, 8, 128),  # Code Llama
    "65B": shape(32000, 8192, 22016, 80, 64, 64, 128),
    "70B": shape(32000, 8192, 28672, 80, 64, 8, 128),  # Llama 2
}


# ---------------------------------------------------------------- exact
def count(*models) -> dict:
    """Bytes of the models' tensors as allocated: {"frozen bfloat16": …, "trained": …, "gradients":
    …, "optimizer": …}. What several models share counts once.

    A gradient is as large as its parameter, AdamW's state twice that, with a step counter of 4
    bytes for each.
    """
    rows, seen = {}, set()
    for t in (t for model in models for t in (*model.parameters(), *model.buffers())):
        storage = t.untyped_storage()
        # the address of the storage itself: its data's is 0 for every tensor on the meta device
        if storage._cdata in seen:
            continue
        seen.add(storage._cdata)
        kind = "trained" if t.requires_grad else _frozen(t.dtype)
        rows[kind] = rows.get(kind, 0) + storage.nbytes()
        if t.requires_grad:
            _train(rows, t.nbytes)
    return rows


def _frozen(dtype) -> str:
    return f"frozen {str(dtype).removeprefix('torch.')}"


def _train(rows, nbytes, tensors=1):
    rows["gradients"] = rows.get("gradients", 0) + nbytes
    rows["optimizer"] = rows.get("optimizer", 0) + 2 * nbytes + 4 * tensors


def linears(c: Config) -> dict:
    """A block's linear layers: {name: (in, out)}."""
    D, F = c.hidden_size, c.intermediate_size
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    if c.fused:
        attention = dict(qkv_proj=(D, Q + 2 * KV), o_proj=(Q, D))
        return attention | dict(gate_up_proj=(D, 2 * F), down_proj=(F, D))
    attention = dict(q_proj=(D, Q), k_proj=(D, KV), v_proj=(D, KV), o_proj=(Q, D))
    return attention | dict(gate_proj=(D, F), up_proj=(D, F), down_proj=(F, D))


def named(targets) -> set:
    """Names of the layers that get LoRA. targets: keys of TARGETS, names of a block's linear layers
    or lm_head, as a list or joined by commas. ValueError for another name.
    """
    words = targets.split(",") if isinstance(targets, str) else targets
    names = {name for word in words for name in TARGETS.get(word, [word])}
    if unknown := names - {*TARGETS["all"], "lm_head"}:
        known = ", ".join([*TARGETS, *TARGETS["all"], "lm_head"])
        raise ValueError(f"targets names {min(unknown)!r}: {known} were expected")
    return names


def adapted(c: Config, targets) -> list:
    """(in, out) of each of these layers in the whole model."""
    names, sizes = named(targets), linears(c)
    blocks = [sizes[name] for name in sizes if name in names] * c.num_hidden_layers
    return blocks + [(c.hidden_size, c.vocab_size)] * ("lm_head" in names)


def tensors(c: Config) -> list:
    """(what, size) of every parameter of a Transformer(c); what: linear, a block's weight matrix,
    score or other.
    """
    D, sizes = c.hidden_size, linears(c)
    block = [("linear", i * o) for i, o in sizes.values()]
    block += [("other", D)] * (4 if c.post_norm else 2) + [("other", c.head_dim)] * 2 * c.qk_norm
    biased = TARGETS["attention"] * c.attention_bias + TARGETS["mlp"] * c.mlp_bias
    biased += ["q_proj", "k_proj", "v_proj"] * c.qkv_bias
    block += [("other", sizes[name][1]) for name in biased if name in sizes]
    embedding, last_norm = ("other", c.vocab_size * D), ("other", D)
    heads = [] if c.tie_word_embeddings else [embedding]
    if c.num_labels:
        heads = [("score", D)]
    return block * c.num_hidden_layers + [embedding, last_norm] + heads


def parameters(c: Config) -> int:
    return sum(n for _, n in tensors(c))


def predict(c: Config, rank=0, targets="all", dtype=torch.float32, quant=None) -> dict:
    """What count() gives, from the shape alone. rank 0: every parameter is trained, in float32.
    Otherwise LoRA on `targets` (see adapted) and a scalar head are trained, over a base frozen in
    `dtype`; quant="nf4": with its blocks' matrices in 4 bits.
    """
    if not rank:
        rows = {"trained": 4 * parameters(c)}
        _train(rows, rows["trained"], len(tensors(c)))
        return rows
    rows = {}
    fresh = [4 * rank * n for size in adapted(c, targets) for n in size]  # A (r,in), B (out,r)
    for what, n in tensors(c):
        if what == "score":
            fresh.append(4 * n)
            continue
        parts = nf4_bytes(n) if what == "linear" and quant == "nf4" else {dtype: n * dtype.itemsize}
        for kind, size in parts.items():
            rows[_frozen(kind)] = rows.get(_frozen(kind), 0) + size
    rows["trained"] = sum(fresh)
    _train(rows, sum(fresh), len(fresh))
    return rows


def nf4_bytes(n: int) -> dict:
    """Bytes of a weight of n numbers, double-quantised, by dtype: 4 bits per number, 8 per scale of
    64 numbers, 32 per scale of 256 scales and for their mean.
    """
    blocks = -(-n // 64)
    return {torch.uint8: -(-n // 2) + blocks, torch.float32: 4 * (-(-blocks // 256) + 1)}


# ---------------------------------------------------------------- estimated
def contents(
    c: Config,
    tokens: int,
    length: int,
    rank=0,
    targets="all",
    dtype=torch.float32,
    quant=None,
    autocast=False,
    checkpointing=False,
    gpu=False,
    masked=False,
) -> dict:
    """What blocks and norms hold at four moments of a pass {moment: bytes}: where its forward pass
    ends, where the backward pass begins ("turn"), reaches the "last" block, and the "first" one.
    rank to quant as in predict.

    Per token and block, with x bytes per number of the residual stream and e per number of a matrix
    product (2 under autocast):
        norm         its input in float32 and one scale; its normalised input too, where its weight
                     is trained
        projections  the input of a trained weight or of an adapter, once where several read the
                     same tensor; under autocast from a float32 stream each makes its own bf16 copy.
                     A frozen weight keeps no input. LoRA's A x: r numbers per adapter
        attention    q, k, v, output, one logsumexp per head, never the probabilities. A GPU's
                     kernels get k and v repeated for every head, but in bf16 without a mask
        SwiGLU       gate x, silu(gate x), up x; their product is down's input
    Other families add kept_by_family; autocast bf16 copies of float32 matrices; masked one mask.
    With checkpointing every block's input stays, and beside it the copies of trained matrices until
    the forward pass ends, and then one block's contents and copies, with two gradients as wide as
    its feed-forward. (A frozen embedding saves some.)
    """
    D, F, H, L = c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_hidden_layers
    x, e = dtype.itemsize, 2 if autocast else dtype.itemsize
    repeated = gpu and (masked or e != 2) or c.attention_cap is not None
    Q, KV = H * c.head_dim, (H if repeated else c.num_key_value_heads) * c.head_dim
    learns = set(linears(c)) & (named(targets) if rank else set(linears(c)))

    def inputs(*names):
        n = len(learns & set(names))
        return n if e != x else min(n, 1)

    norm = 4 * D + 4 + (0 if rank else x * D)
    attention = D * inputs("q_proj", "k_proj", "v_proj", "qkv_proj") + 2 * Q + 2 * KV
    feedforward = D * inputs("gate_proj", "up_proj", "gate_up_proj") + F * (3 + inputs("down_proj"))
    block = 2 * norm + e * (attention + feedforward + rank * len(learns)) + 4 * H
    block += kept_by_family(c, norm, (Q + KV) * (0 if rank else x), length) + e * (Q + KV) * c.fused
    # the last norm, the head's input, cos and sin, ids
    rest = norm + e * D + 2 * 4 * c.head_dim + 8 + masked * (1 + e) * length
    fresh = autocast * copies(c, learns, rank)
    frozen = autocast * copies(c, linears(c)) if rank and x == 4 and not quant else 0
    outside = tokens * rest + (2 * autocast * c.vocab_size * D if x == 4 else 0)
    one_block = tokens * (block + 2 * e * F) + fresh + frozen
    if quant:  # the largest matrix, for a moment: in float32, then beside it in bf16
        one_block += (4 + e % 4) * max(i * o for i, o in linears(c).values())
    if not checkpointing:
        whole = L * (tokens * block + fresh + frozen) + outside
        return dict(forward=whole, turn=whole, last=whole, first=one_block)
    kept = L * tokens * x * D + outside
    return dict(forward=kept + L * fresh, turn=kept, last=kept + one_block, first=one_block)


def copies(c: Config, names, rank=0) -> int:
    """Bytes of bf16 copies of a block's matrices, with a rank of the adapters on them."""
    sizes = [linears(c)[name] for name in names]
    return 2 * sum(rank * (i + o) if rank else i * o for i, o in sizes)


def kept_by_family(c: Config, norm: int, normalised: int, length: int) -> int:
    """Bytes per token and block beyond a Llama's: of norms behind attention and MLP; of the norms
    on q and k; of scores with a soft cap, in float32 before and after the softmax. (Where q, k and
    v are one layer's output, v holds on to all of it.)"""
    heads = c.num_attention_heads + c.num_key_value_heads
    norms = 2 * norm * c.post_norm + (4 * heads * (c.head_dim + 1) + normalised) * c.qk_norm
    return norms + (0 if c.attention_cap is None else 2 * 4 * c.num_attention_heads * length)


def logits(c: Config, targets: int, rank=0) -> int:
    """Bytes of the head's output over `targets` tokens at their peak, which is in the backward
    pass: the log-softmax, its gradient and the logits' gradient, in float32. Where they come in
    pieces: of one piece, or the last of these and its gradient of a trained head. A scalar head has
    none."""
    if c.num_labels:
        return 0
    size = max(1, PIECE // c.vocab_size)
    if targets <= 2 * size:
        return 3 * 4 * targets * c.vocab_size
    return 4 * c.vocab_size * max(3 * size, 0 if rank else size + c.hidden_size)


WORKSPACES = 2**26  # cuBLAS's on an H100: 32 MB for the forward, 32 for the backward pass
MOMENTS = dict(forward=(0, 2 / 3), turn=(0, 1), last=(0, 0), first=(1, 0))  # gradients, logits


def fullest(rows: dict, *passes, again=False, cache=0) -> dict:
    """Rows of count() or predict() → those of a training step's fullest moment, among them its
    activations and logits. Gradients come as activations go; `again`: those of a pass before are
    there already. cache: bytes of keys and values while answers are sampled.

    passes: for each network that is trained contents()'s arguments, and `target_tokens`.
    """
    found = []
    for moment, (grown, share) in MOMENTS.items():
        here = dict(gradients=rows["gradients"] * bool(grown or again), activations=0, logits=0)
        for how in passes:
            how = dict(how)
            c, size, rank = how["c"], how.pop("target_tokens"), how.get("rank", 0)
            here["activations"] += contents(**how)[moment]
            here["logits"] += int(share * logits(c, size, rank))
            if moment != "forward" and not (grown or rank or c.num_labels):
                here["gradients"] += 4 * c.vocab_size * c.hidden_size  # the head's is the first
        if any(how.get("gpu") for how in passes):
            here["workspaces"] = WORKSPACES
        found.append(rows | here)
    if cache:
        found.append(rows | {"gradients": 0, "keys and values": cache})
    return max(found, key=lambda rows: sum(rows.values()))


def cache(c: Config, columns: int, size=2) -> int:
    """Bytes of a sampler's keys and values, `size` each, over so many columns of all its rows."""
    return 2 * size * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * columns


# ---------------------------------------------------------------- measured, and shown
def measured(device) -> int:
    """The most bytes that this process has held so far: on a GPU in tensors, elsewhere in all,
    libraries included.
    """
    if torch.device(device).type == "cuda":
        return max(PagedAdamW.most, torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # Linux counts in KB


def table(rows: dict, c: Config | None = None) -> str:
    """{what: bytes} as an aligned table with its sum; with a config also the share of the model's
    parameters that is trained.
    """
    rows = rows | {"sum": sum(rows.values())}
    unit, name = (UNIT, "GB") if rows["sum"] >= UNIT else (2**20, "MB")
    width = max(map(len, rows))
    lines = [f"{what:<{width}} {size / unit:>9,.2f} {name}" for what, size in rows.items()]
    if c is not None:
        n, whole = rows.get("trained", 0) // 4, parameters(c)
        lines.append(f"trained: {n:,} parameters, {n / whole:.2%} of the model's {whole:,}")
    return "\n".join(lines)


# ---------------------------------------------------------------- what fits
METHODS = {
    "full": dict(),
    "full, paged": dict(paged=True),
    "LoRA": dict(rank=64, dtype=torch.bfloat16),
    "QLoRA": dict(rank=64, dtype=torch.bfloat16, quant="nf4"),
    "QLoRA, paged": dict(rank=64, dtype=torch.bfloat16, quant="nf4", paged=True),
}


def need(c: Config, tokens=512, paged=False, **how) -> dict:
    """{what: bytes} on a GPU for a run that trains on one row of `tokens`, all of them targets,
    with checkpointing, under bf16 autocast: of a training step or of the run's end, whichever is
    more.
    """
    step, end = step_rows(c, tokens, paged, **how), end_rows(c, paged, **how)
    return max(step, end, key=lambda rows: sum(rows.values()))


def held(c: Config, paged=False, **how) -> dict:
    """What stays from step to step on the GPU: predict(), but of a paged optimizer three pages: the
    one in use and the next two. A page is twice its parameter, at most an embedding.
    """
    rows = predict(c, **how)
    if paged:
        sizes = [n for _, n in tensors(c)]
        if how:
            sizes = [how["rank"] * n for size in adapted(c, "all") for n in size]
        rows["optimizer"] = min(rows["optimizer"], 3 * 2 * 4 * max(sizes))
    return rows


def step_rows(c: Config, tokens=512, paged=False, **how) -> dict:
    way = dict(how, autocast=True, checkpointing=True, gpu=True)
    return fullest(
        held(c, paged, **how), dict(way, c=c, tokens=tokens, length=tokens, target_tokens=tokens)
    )


def end_rows(c: Config, paged=False, page=256, **how) -> dict:
    """{what: bytes} at the run's end, when the model is written: the gradients are gone, the
    optimizer is not. The model is merged on the host, at 2 bytes per parameter (4 where its base
    was in float32). lora.merge reads a page twice, with its logits in float32, those from before
    and their difference; the merged model's layers visit the GPU one by one.
    """
    rows = held(c, paged, **how)
    del rows["gradients"]
    if how:
        x, largest = how["dtype"].itemsize, max(i * o for i, o in linears(c).values())
        rows["logits"] = 3 * 4 * page * c.vocab_size
        rows["page"] = page * x * (4 * c.hidden_size + 3 * c.intermediate_size)
        rows["a layer"] = largest * (6 if how.get("quant") else x)  # as in a step, or as it visits
    return rows


def fits(cards=(8, 16, 24, 48)) -> str:
    """Two Markdown tables: the GB that each size needs by each method, and the largest size that
    each card holds with 1 GB left free.
    """
    gb = {}
    for size, c in SIZES.items():
        gb[size] = {
            how: sum(need(c, **options).values()) / UNIT for how, options in METHODS.items()
        }
    head, rule = f" | {' | '.join(METHODS)} |", "| --- |" + " ---: |" * len(METHODS)
    lines = [f"| GB{head}", rule]
    for size, row in gb.items():
        lines.append(f"| {size} | {' | '.join(f'{n:.1f}' for n in row.values())} |")
    lines += ["", f"| GPU{head}", rule]
    for card in cards:
        largest = []
        for how in METHODS:
            fitting = [size for size in SIZES if gb[size][how] <= card - 1]
            largest.append(fitting[-1] if fitting else "—")
        lines.append(f"| {card} GB | {' | '.join(largest)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(fits())

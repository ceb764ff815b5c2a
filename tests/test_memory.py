"""The memory table: exact where it says so, against the tensors themselves; estimates against what
autograd keeps and what is alive.
"""

import contextlib

import pytest
import tiny
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lora
import paged
import quant
from common import memory
from common.memory import (
    SIZES,
    UNIT,
    contents,
    count,
    fits,
    fullest,
    logits,
    measured,
    need,
    nf4_bytes,
    parameters,
    predict,
    table,
)
from common.run import adamw, autocast, has_bf16
from model import Config, Transformer, nll_of
from sft import sft_loss

EMBEDDED = Config(1024, 192, 512, 5, 6, 2, 32, tie_word_embeddings=True)
SMALL_VOCABULARY = Config(64, 192, 512, 8, 6, 2, 32, tie_word_embeddings=True)


def activations(*shape, **how) -> int:
    """The most that a pass holds beside gradients and logits."""
    return max(contents(*shape, **how).values())


def build(c, rank=0, targets="all", dtype=torch.float32, quantised=False, device="cpu"):
    with torch.device(device):
        model = Transformer(c)
    if rank:
        model.to(dtype)
        if quantised:
            quantize_model(model)
        pytest.importorskip("lora").add_lora(model, rank, rank, targets)
    return model


def quantize_model(model):
    if not hasattr(quant, "quantize_model"):
        pytest.skip("without NF4")
    quant.quantize_model(model)


# ---------------------------------------------------------------- exact
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_labels": 1},
        {"attention_bias": True, "mlp_bias": True},
    ],
)
@pytest.mark.parametrize(
    "targets",
    [None, "all", "attention", "mlp", "q_proj,down_proj", ["k_proj", "mlp"], "all,lm_head"],
)
def test_predicted_equals_counted(changes, targets):
    if "num_labels" in changes and targets == "all,lm_head":
        return
    c, rank = tiny.lm(**changes).config, 3 if targets else 0
    for dtype in (torch.float32, torch.bfloat16):
        assert predict(c, rank, targets, dtype) == count(build(c, rank, targets, dtype))


@pytest.mark.parametrize("rows, columns", [(24, 16), (30, 7), (5, 7), (256, 65)])
def test_predicted_equals_counted_in_4_bits(rows, columns):
    """Blocks that do not fill up, an odd count of numbers, more than one block of scales."""
    c = tiny.lm(hidden_size=columns, intermediate_size=rows).config
    model = build(c, 3, "mlp", torch.bfloat16, quantised=True)
    assert predict(c, 3, "mlp", torch.bfloat16, "nf4") == count(model)
    assert count(model)["frozen uint8"] < parameters(c)


def test_4_bits_are_4_127_bits():
    mean = 32 / 4096**2
    assert sum(nf4_bytes(4096**2).values()) * 8 / 4096**2 == 4 + 8 / 64 + 32 / (64 * 256) + mean
    assert nf4_bytes(65) == {torch.uint8: 33 + 2, torch.float32: 4 + 4}


@pytest.mark.parametrize(
    "size, published",
    [
        ("135M", 134_515_008),
        ("1.1B", 1_100_048_384),
        ("3B", 3_212_749_824),
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("34B", 33_743_970_304),
        ("65B", 65_285_660_672),
        ("70B", 68_976_648_192),
        ("0.5B", 494_032_768 - 24 * (896 + 2 * 128)),
    ],
)
def test_shapes_are_the_published_ones(size, published):
    assert parameters(SIZES[size]) == published


@pytest.mark.parametrize("size", ["135M", "0.5B", "7B"])
def test_predicted_equals_counted_at_full_size(size):
    """On the meta device, where a tensor has a shape and no memory."""
    model = build(SIZES[size], device="meta")
    assert predict(SIZES[size]) == count(model) and count(model)["trained"] == 4 * parameters(
        SIZES[size]
    )
    assert predict(SIZES[size], 16, "all", torch.bfloat16) == count(
        build(SIZES[size], 16, "all", torch.bfloat16, device="meta")
    )


def test_what_is_shared_counts_once():
    policy, other = tiny.lm(), tiny.lm()
    policy.requires_grad_(False)
    alone = count(policy)
    other.load_state_dict(policy.state_dict(), assign=True)  # the same memory in other parameters
    other.requires_grad_(False)
    assert (
        count(policy, other)
        == count(policy, policy)
        == alone
        == {"frozen float32": 4 * parameters(policy.config)}
    )
    other.norm.weight = torch.nn.Parameter(torch.ones(16))
    assert count(policy, other) == alone | {"trained": 64, "gradients": 64, "optimizer": 128 + 4}


def test_a_view_counts_as_what_it_keeps_alive():
    module = torch.nn.Module()
    module.register_buffer("part", torch.zeros(10)[:5])
    assert count(module) == {"frozen float32": 40}


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, fused=True), torch.optim.AdamW, paged.PagedAdamW]
)
def test_gradients_and_optimizer_are_what_a_step_leaves(make):
    model = tiny.lm()
    model.embed_tokens.requires_grad_(False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    rows = count(model)
    assert rows["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert rows["optimizer"] == sum(
        t.nbytes for state in optimizer.state_dict()["state"].values() for t in state.values()
    )


# ---------------------------------------------------------------- estimated
def saved(model, B, T, autocast):
    """Bytes that sft_loss keeps for its backward pass, each storage once, the model's own and the
    log-softmax left out.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, tokens = {}, torch.arange(B * T).view(B, T) % model.config.vocab_size

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            # t is held: another's memory must not take its address
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        sft_loss(model, tokens, tokens, torch.zeros_like(tokens))
        n = tokens[:, 1:].numel()
    return sum(size for size, _ in kept.values()) - 4 * n * model.config.vocab_size


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "rank, targets, dtype, within",
    [
        (0, "all", torch.float32, 0.001),
        (16, "all", torch.float32, 0.04),
        (16, "attention", torch.float32, 0.05),
        (4, "mlp", torch.float32, 0.12),
        (16, "all", torch.bfloat16, 0.04),
        (16, "down_proj,v_proj", torch.bfloat16, 0.1),
    ],
)
def test_activations_are_what_autograd_keeps(rank, targets, dtype, autocast, within):
    if dtype == torch.bfloat16 and not autocast:
        return
    model = build(EMBEDDED, rank, targets, dtype)
    for B, T in ((4, 64), (1, 200)):
        expected = saved(model, B, T, autocast)
        found = activations(EMBEDDED, B * T, T, rank, targets, dtype, autocast=autocast)
        assert abs(found / expected - 1) < within, found / expected


@pytest.mark.parametrize(
    "dtype, autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)]
)
def test_activations_over_4_bits(dtype, autocast):
    model = build(EMBEDDED, 16, "all", dtype, quantised=True)
    expected = saved(model, 4, 64, autocast)
    assert (
        abs(activations(EMBEDDED, 256, 64, 16, "all", dtype, "nf4", autocast) / expected - 1) < 0.05
    )


class Alive(TorchDispatchMode):
    """The most bytes that were alive at once in tensors made inside; `now` those that are."""

    def __init__(self):
        super().__init__()
        self.refs, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.known:
                self.refs[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        self.most = max(self.most, self.now())
        return out

    def now(self):
        self.refs = {k: v for k, v in self.refs.items() if not v[0].expired()}
        return sum(size for _, size in self.refs.values())

    def run(self, model, B, T, autocast=False):
        tokens = torch.arange(B * T).view(B, T) % model.config.vocab_size
        segments = torch.zeros_like(tokens)
        self.known = {
            t.untyped_storage()._cdata
            for t in (*model.parameters(), *model.buffers(), tokens, segments)
        }
        with self:
            with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                loss = sft_loss(model, tokens, tokens, segments)
            loss.backward()
        return self.most


@pytest.mark.parametrize("rank, autocast", [(0, False), (0, True), (16, False)])
def test_a_step_peaks_at_activations_and_logits(rank, autocast):
    peak = Alive().run(build(EMBEDDED, rank), 4, 64, autocast)
    assert (
        abs(
            (activations(EMBEDDED, 256, 64, rank, autocast=autocast) + logits(EMBEDDED, 4 * 63))
            / peak
            - 1
        )
        < 0.03
    )


@pytest.mark.parametrize(
    "rank, targets, dtype",
    [
        (0, "all", torch.float32),
        (16, "all", torch.float32),
        (16, "attention", torch.float32),
        (16, "all", torch.bfloat16),
    ],
)
def test_checkpointing_keeps_the_blocks_inputs_and_one_block(rank, targets, dtype):
    c, autocast = SMALL_VOCABULARY, dtype == torch.bfloat16
    model = build(c, rank, targets, dtype)
    for p in model.parameters():
        if p.requires_grad:
            # gradients have a row of their own
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for layer in model.layers:
        layer.forward = lambda *a, forward=layer.forward: checkpoint(
            forward, *a, use_reentrant=False
        )
    peak = Alive().run(model, 8, 64, autocast)
    found = activations(c, 512, 64, rank, targets, dtype, autocast=autocast, checkpointing=True)
    assert abs(found / peak - 1) < 0.15, found / peak
    assert found < 0.35 * activations(c, 512, 64, rank, targets, dtype, autocast=autocast)


@pytest.mark.parametrize(
    "rank, autocast, again",
    [(0, False, False), (0, False, True), (0, True, False), (64, False, False)],
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("B, T", [(1, 16), (8, 128)])
def test_a_step_s_fullest_moment(B, T, checkpointing, rank, autocast, again):
    """Few tokens, where gradients are the most, and many, where activations are; where gradients of
    a pass before are there, all at once."""
    c = Config(512, 192, 512, 6, 6, 2, 32)
    model, alive = build(c, rank), Alive()
    model.checkpointing = checkpointing
    for _ in range(1 + again):
        alive.most = 0
        peak = alive.run(model, B, T, autocast)
    how = dict(c=c, tokens=B * T, length=T, target_tokens=B * (T - 1), rank=rank, autocast=autocast)
    exact = count(model)
    rows = fullest(exact, how | dict(checkpointing=checkpointing), again=again)
    assert {k: rows[k] for k in ("trained", "optimizer")} == {
        k: exact[k] for k in ("trained", "optimizer")
    }
    found = sum(rows[k] for k in ("gradients", "activations", "logits"))
    fixed = sum(exact.values()) - exact["gradients"]
    assert abs(found / peak - 1) < 0.16, found / peak
    assert abs((found + fixed) / (peak + fixed) - 1) < 0.05


@pytest.mark.parametrize("hidden, trained", [(576, True), (2048, True), (2048, False)])
def test_many_targets_over_a_large_vocabulary_take_little(hidden, trained):
    """16 × 1,024 targets over 128k tokens, whose logits would be 23.5 GB: at most 2 GB beside
    weights and gradients. (Under a dispatch mode a piece's gradient of the head is added to the sum
    out of place, which takes one gradient more.)"""
    c, M = Config(128256, hidden, 8, 0, 1, 1, 8), 16 * 1024
    with torch.device("meta"):
        model, h = Transformer(c).requires_grad_(trained), torch.empty(M, hidden)
        targets = torch.empty(M, dtype=torch.long)
    alive, h = Alive(), h.requires_grad_()
    alive.known = {t.untyped_storage()._cdata for t in (*model.parameters(), h, targets)}
    with alive:
        nll_of(model, h, targets).sum().backward()
    beside = alive.most - alive.now()  # the gradients are there still
    out_of_place = 4 * hidden * c.vocab_size if (hidden, trained) == (2048, True) else 0
    expected = logits(c, M, rank=int(not trained)) + out_of_place
    assert beside < 2 * UNIT and abs(expected / beside - 1) < 0.15


def test_a_scalar_head_has_no_logits():
    assert (
        logits(tiny.lm(num_labels=1).config, 100) == 0
        and logits(tiny.lm().config, 100) == 100 * 280 * 12
    )


# ---------------------------------------------------------------- shown
def test_the_table():
    assert table({"frozen bfloat16": 3 * 2**20, "trained": 2**19}).splitlines() == [
        "frozen bfloat16      3.00 MB",
        "trained              0.50 MB",
        "sum                  3.50 MB",
    ]
    c = SIZES["7B"]
    lines = table(predict(c, 16, "all", torch.bfloat16, "nf4"), c).splitlines()
    assert (
        lines[0] == "frozen uint8         3.11 GB"
        and lines[-1] == "trained: 39,976,960 parameters, 0.59% of the model's 6,738,415,616"
    )
    assert lines[-2].endswith("GB") and len({len(line) for line in lines[:-1]}) == 1


def test_measured_is_at_least_what_was_held():
    x = torch.ones(30_000_000)
    assert measured("cpu") > x.nbytes
    assert measured("cpu") < 64 * UNIT


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="targets names 'attn': attention, mlp, all, q_proj"):
        predict(EMBEDDED, 4, "attn")


def test_what_fits():
    cards = fits().split("\n\n")[1].splitlines()
    assert (
        cards[0] == "| GPU | full | full, paged | LoRA | QLoRA | QLoRA, paged |"
        and len(cards) == 2 + 4
    )
    sizes = ["—", *SIZES]
    for card in cards[2:]:
        name, full, paged, lora, qlora, both = (cell.strip() for cell in card.strip("|").split("|"))
        order = [sizes.index(s) for s in (full, paged, lora, qlora, both)]
        assert order == sorted(order)
        gb = sum(need(SIZES[qlora], 512, **memory.METHODS["QLoRA"]).values()) / UNIT
        assert gb <= int(name.split()[0]) - 1
    assert sum(need(SIZES["7B"], **memory.METHODS["QLoRA"]).values()) < 10 * UNIT
    assert sum(need(SIZES["65B"], **memory.METHODS["QLoRA, paged"]).values()) < 48 * UNIT


@pytest.mark.parametrize("how", memory.METHODS)
def test_a_run_that_trains_can_end(how):
    """The end is counted too, and what trains is what decides."""
    for c in SIZES.values():
        step, end = (f(c, **memory.METHODS[how]) for f in (memory.step_rows, memory.end_rows))
        assert need(c, **memory.METHODS[how]) == step and sum(end.values()) < sum(step.values())
        assert "gradients" not in end and end["optimizer"] == step["optimizer"]
    short = SIZES["135M"]  # rows of one token: the page that is read at the end is the most
    end = memory.end_rows(short, **memory.METHODS["LoRA"])
    assert need(short, 1, **memory.METHODS["LoRA"]) == end


# ---------------------------------------------------------------- on a GPU
def on_a_gpu(c, rank, quantised):
    """Random weights there, layer by layer in 4 bits: the whole is never in 16."""
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if rank else kind)
    try:
        with torch.device("meta"):
            model = Transformer(c)
    finally:
        torch.set_default_dtype(kind)
    for name in [name for name, _ in model.named_modules()]:
        m = model.get_submodule(name)
        for k, p in list(m.named_parameters(recurse=False)):
            value = torch.randn_like(p, device="cuda").mul_(0.02) if p.dim() > 1 else 1.0
            new = torch.empty_like(p, device="cuda").copy_(torch.as_tensor(value))
            setattr(m, k, torch.nn.Parameter(new))
        if quantised and isinstance(m, torch.nn.Linear) and name != "lm_head":
            model.set_submodule(name, quant.Linear4bit(m))
    if c.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return lora.add_lora(model, rank, rank) if rank else model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "size, rank, quantised, rows, length, checkpointing",
    [
        ("135M", 0, None, 8, 512, False),
        ("135M", 0, None, 32, 512, True),
        ("135M", 16, None, 8, 512, False),
        ("1.1B", 0, None, 4, 1024, False),
        ("1.1B", 0, None, 1, 512, True),
        ("1.1B", 64, None, 4, 1024, True),
        ("7B", 64, "nf4", 1, 512, True),
    ],
)
def test_on_a_gpu_the_table_meets_the_measured_peak(
    size, rank, quantised, rows, length, checkpointing
):
    """A step's, and that of the run's end, within a tenth. About two minutes in all, most of them
    for the end of 7B."""
    c, device = SIZES[size], torch.device("cuda")
    kind = torch.bfloat16 if rank and has_bf16(device) else torch.float32
    how = dict(rank=rank, dtype=kind, quant=quantised) if rank else {}
    way = dict(how, c=c, autocast=has_bf16(device), checkpointing=checkpointing, gpu=True)
    way |= dict(tokens=rows * length, length=length, target_tokens=rows * (length - 1))
    predicted = sum(fullest(predict(c, **how), way).values())
    if 1.2 * predicted > torch.cuda.mem_get_info()[0]:
        pytest.skip(f"{predicted / UNIT:.0f} GB are not free")
    torch.cuda.empty_cache()
    model = on_a_gpu(c, rank, quantised)
    model.checkpointing = checkpointing
    optimizer = adamw(model, 1e-4)
    tokens = torch.randint(c.vocab_size, (rows, length))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with autocast(device):
            loss = sft_loss(model, tokens, tokens, torch.zeros_like(tokens))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found = torch.cuda.max_memory_allocated()
    print(f"{size}: {predicted / UNIT:.2f} GB predicted, {found / UNIT:.2f} measured")
    assert abs(predicted / found - 1) < 0.1, predicted / found
    if rank and size != "1.1B":
        torch.cuda.reset_peak_memory_stats()
        lora.merge(model)
        found = torch.cuda.max_memory_allocated()
        predicted = sum(memory.end_rows(c, **how).values())
        print(f"{size}, the end: {predicted / UNIT:.2f} GB predicted, {found / UNIT:.2f} measured")
        assert found < 1.1 * predicted

"""A decoding step that is captured and replayed says what the plain step says, token for token.

There is a recorder here for the CPU too: it keeps the operators of a call and, as a CUDA graph,
repeats them on the same memory, without any of the Python around them.
"""

import contextlib

import pytest
import tiny
import torch
from tiny import ragged
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
import lora
import sampling as S
from common import graph
from common.run import autocast
from quant import quantize_model

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PROMPTS = ragged((5, 1, 9, 3, 7, 9), 5)


class Recorder(TorchDispatchMode):
    """Keeps a call's operators, and undoes what they did: capturing runs nothing."""

    def __init__(self, function):
        super().__init__()
        self.calls, self.before = [], []
        with self:
            function()
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [*args, *(kwargs or {}).values()]
        for argument, value in zip(function._schema.arguments, given, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            again = function(*args, **kwargs)
            if all(r.alias_info is None for r in function._schema.returns):
                outs = (out, again) if isinstance(out, tuple) else ((out,), (again,))
                for old, new in zip(*outs, strict=True):
                    if torch.is_tensor(old):
                        old.copy_(new)


@pytest.fixture
def captured(monkeypatch):
    """Every step is captured → the sizes of which it was."""
    sizes, real = [], graph.CapturedStep.__call__

    def call(self, ids):
        found, seen = real(self, ids), self.cache.seen
        sizes.extend([seen] if sizes[-1:] != [seen] else [])
        return found

    monkeypatch.setattr(graph.CapturedStep, "__call__", call)
    monkeypatch.setattr(graph, "on_side_stream", lambda function: function())
    monkeypatch.setattr(graph, "capture", lambda function: Recorder(function).replay)
    monkeypatch.setattr(graph, "FEWEST", 12)
    return sizes


def both(model, monkeypatch, *how, prompts=PROMPTS, **named):
    """generate's answers, plain and captured."""
    found = []
    for kinds in (set(), {model.device.type}):
        monkeypatch.setattr(S, "CAPTURED", kinds)
        found.append(S.generate(model, prompts, *how, **named))
    return found


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_captured_step_says_what_the_plain_one_says(name, captured, monkeypatch):
    """Windows, local layers, factors of long examples, one of which is only long at its end."""
    model = tiny.family(name).eval()
    plain, again = both(model, monkeypatch, 21, 0)
    assert plain == again and captured == [18, 30] and len(set(map(tuple, plain))) > 1
    plain, again = both(model, monkeypatch, 13, 1.3, eos_id=[*range(0, 64, 7)], seed=3)
    assert plain == again and len(set(map(len, plain))) > 1


KINDS = {
    "ia3": lambda m: adapters.add_adapter(m, "ia3"),
    "prompt": lambda m: adapters.add_adapter(m, "prompt", 5),
    "prefix": lambda m: adapters.add_adapter(m, "prefix", 5),
    "lora": lambda m: lora.add_lora(m, 4, 8),
    "nf4": quantize_model,
    "qlora": lambda m: lora.add_lora(quantize_model(m), 4, 8),
}


def adapted(name):
    model, generator = KINDS[name](tiny.family("llama")), torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.2
    return model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_adapters_and_4_bits_are_captured_too(name, captured, monkeypatch):
    plain, again = both(adapted(name), monkeypatch, 21, 1.0, 0.9, eos_id=9, seed=1)
    assert plain == again and captured == [18, 30]


def test_a_size_s_second_step_is_captured_and_all_others_are_replayed(captured, monkeypatch):
    model, read = tiny.family("llama"), []
    monkeypatch.setattr(S, "CAPTURED", {"cpu"})
    steps = S.decode(model, [[1, 2], [3]], 21, 0)
    next(steps)
    hidden = model.hidden
    model.hidden = lambda *a, **k: read.append(1) or hidden(*a, **k)
    assert [next(steps) is not None and len(read) for _ in range(20)] == [1] + 9 * [2] + [3] + 9 * [
        4
    ]
    assert captured == [12, 23]


def test_under_autocast_weights_are_cast_once(captured, monkeypatch):
    """The first step's casts are autocast's own copies, which every capturing reads."""
    model, recorders = tiny.family("llama3"), []

    def record(function):
        recorders.append(Recorder(function))
        return recorders[-1].replay

    monkeypatch.setattr(graph, "capture", record)
    with torch.autocast("cpu", torch.bfloat16):
        plain, again = both(model, monkeypatch, 21, 0)
    assert plain == again and len(recorders) == 2
    weights = {p.shape for p in model.parameters() if p.dim() == 2}
    for name, args, _, out in (call for r in recorders for call in r.calls):
        assert "_to_copy" not in str(name) or out.shape not in weights, args[0].shape


class FromHost(TorchDispatchMode):
    """The operators that send numbers from the host: a graph would repeat old ones."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, out)) if torch.is_tensor(x)]
        if any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("name", [*tiny.FAMILIES, *KINDS])
def test_a_step_sends_nothing(name, monkeypatch):
    """Meta tensors stand for a GPU's; one number alone goes with a kernel's arguments."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # meta: none
    model = (adapted(name) if name in KINDS else tiny.family(name)).to("meta")
    cache = S.Cache(model, 4, 30)
    cache.length = torch.zeros(1, dtype=torch.long, device="meta")
    ids, made = torch.zeros(4, dtype=torch.long, device="meta"), torch.tensor
    S.read_token(model, cache, ids)  # constants are sent once
    monkeypatch.setattr(torch, "tensor", lambda x, **how: made(float(x), **how))  # no list
    monkeypatch.setattr(torch.Tensor, "new_tensor", lambda *_, **__: pytest.fail("new_tensor"))
    with FromHost() as sent, torch.no_grad():
        assert S.read_token(model, cache, ids).shape == (4, 32)
    assert not sent.found


def test_what_cannot_be_captured_is_called(monkeypatch, capsys):
    """The reason is said, not that ending the capturing failed too; and it is not tried again."""
    model, capturing, stream = tiny.family("llama"), [], []

    class Records:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            capturing.append(1)

        def __exit__(self, *_):
            capturing.clear()
            raise RuntimeError("the capturing failed")

    def hidden(*args, **named):
        if capturing:
            raise RuntimeError("a number is read\nand more")
        return type(model).hidden(model, *args, **named)

    for name, value in (("CUDAGraph", None), ("current_stream", "the one before")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_stream", stream.append)
    monkeypatch.setattr(torch.cuda, "graph", Records)
    monkeypatch.setattr(graph, "on_side_stream", lambda function: function())
    monkeypatch.setattr(graph, "side_stream", lambda: None)
    monkeypatch.setattr(graph, "refused", [])
    monkeypatch.setattr(model, "hidden", hidden)
    plain, again = both(model, monkeypatch, 9, 0)
    said = "warning: no CUDA graph, decoding is slower: a number is read\n"
    assert plain == again and capsys.readouterr().err == said and stream == ["the one before"]
    assert not isinstance(S.reader(model, S.Cache(model, 1, 4)), graph.CapturedStep)


def test_both_streams_wait_for_each_other(monkeypatch):
    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    said, here, there = [], Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(graph, "side_stream", lambda: there)
    graph.on_side_stream(lambda: said.append("work"))
    assert said == ["side waits for main", "work", "main waits for side"]


@gpu
@pytest.mark.parametrize("name", [*tiny.FAMILIES, *KINDS])
def test_on_a_gpu(name, monkeypatch, capsys):
    model = (adapted(name) if name in KINDS else tiny.family(name)).cuda()
    monkeypatch.setattr(graph, "FEWEST", 12)
    for how in ((21, 0), (21, 1.0, 0.9)):
        plain, again = both(model, monkeypatch, *how, eos_id=[9, 13], seed=1)
        assert plain == again
        with autocast(model.device), torch.no_grad():
            rows = [list(S.decode(model, PROMPTS, *how, seed=1)) for _ in range(2)]
        assert torch.equal(torch.stack(rows[0]), torch.stack(rows[1]))
    assert "no CUDA graph" not in capsys.readouterr().err

"""A decoding step that is recorded and repeated says what the plain step says, token for token.

There is a recorder here for the CPU too: it keeps the operators of a call and, as a CUDA graph,
repeats them on the same memory, without any of the Python around them.
"""

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
    """Keeps a call's operators, and undoes what they did: recording runs nothing."""

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
def recorded(monkeypatch):
    """Every step is recorded → the sizes of which it was."""
    sizes, real = [], graph.Recorded.__call__

    def call(self, ids):
        found, seen = real(self, ids), self.cache.seen
        sizes.extend([seen] if sizes[-1:] != [seen] else [])
        return found

    monkeypatch.setattr(graph.Recorded, "__call__", call)
    monkeypatch.setattr(graph, "aside", lambda function: function())
    monkeypatch.setattr(graph, "record", lambda function: Recorder(function).replay)
    monkeypatch.setattr(graph, "FEWEST", 12)
    return sizes


def both(model, monkeypatch, *how, prompts=PROMPTS, **named):
    """generate's answers, plain and recorded."""
    found = []
    for kinds in (set(), {model.device.type}):
        monkeypatch.setattr(S, "RECORDED", kinds)
        found.append(S.generate(model, prompts, *how, **named))
    return found


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_recorded_step_says_what_the_plain_one_says(name, recorded, monkeypatch):
    """Windows, local layers, factors of long examples, one of which is only long at its end."""
    model = tiny.family(name).eval()
    plain, again = both(model, monkeypatch, 21, 0)
    assert plain == again and recorded == [18, 30] and len(set(map(tuple, plain))) > 1
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
def test_adapters_and_4_bits_are_recorded_too(name, recorded, monkeypatch):
    plain, again = both(adapted(name), monkeypatch, 21, 1.0, 0.9, eos_id=9, seed=1)
    assert plain == again and recorded == [18, 30]


def test_a_size_s_second_step_is_recorded_and_all_others_are_repeated(recorded, monkeypatch):
    model, read = tiny.family("llama"), []
    monkeypatch.setattr(S, "RECORDED", {"cpu"})
    steps = S.decode(model, [[1, 2], [3]], 21, 0)
    next(steps)
    hidden = model.hidden
    model.hidden = lambda *a, **k: read.append(1) or hidden(*a, **k)
    assert [next(steps) is not None and len(read) for _ in range(20)] == [1] + 9 * [2] + [3] + 9 * [
        4
    ]
    assert recorded == [12, 23]


def test_under_autocast_weights_are_cast_once(recorded, monkeypatch):
    """The first step's casts are autocast's own copies, which every recording reads."""
    model, recorders = tiny.family("llama3"), []

    def record(function):
        recorders.append(Recorder(function))
        return recorders[-1].replay

    monkeypatch.setattr(graph, "record", record)
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


def test_what_cannot_be_recorded_is_called(recorded, monkeypatch, capsys):
    class Refuses:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation not permitted\nand more")

    monkeypatch.undo()
    monkeypatch.setattr(graph, "aside", lambda function: function())
    ran, stream = [], []
    for name, value in (("CUDAGraph", None), ("current_stream", "the one before")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_stream", stream.append)
    monkeypatch.setattr(graph, "side_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    again = graph.record(lambda: ran.append(1))
    assert capsys.readouterr().err == (
        "warning: no CUDA graph, decoding is slower: operation not permitted\n"
    )
    again(), again()
    assert len(ran) == 3 and stream == ["the one before"]


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

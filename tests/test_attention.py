"""tools/attention.py: every way of attention for packed rows that a CPU can run says the same, and
one that it cannot run says so. What only a GPU has is given torch's own attention, a sequence at a
time. No time is asserted."""

import pytest
import torch
import torch.nn.functional as F

from common.memory import shape
from tools import attention as A

varlen = pytest.importorskip("torch.nn.attention.varlen")
ROWS = 2, 48, 3
attend = F.scaled_dot_product_attention


def one_by_one(q, k, v, offsets):
    """Causal attention of sequences laid end to end (T,H,d)."""
    cut = [x.transpose(0, 1).tensor_split(offsets[1:-1].cpu(), 1) for x in (q, k, v)]
    parts = [attend(*part, is_causal=True, enable_gqa=True) for part in zip(*cut, strict=True)]
    return torch.cat(parts, 1).transpose(0, 1)


def nested_or_not(q, k, v, *more, **options):
    if not q.is_nested:
        return attend(q, k, v, *more, **options)
    assert options == dict(is_causal=True)
    y = one_by_one(*(x.transpose(1, 2).values() for x in (q, k, v)), q.offsets())
    return torch.nested.nested_tensor_from_jagged(y, q.offsets()).transpose(1, 2)


def variable(q, k, v, starts, _ends, longest, _longest, *, window_size, enable_gqa=False):
    assert window_size == (-1, 0) and starts.dtype == torch.int32
    assert longest == starts.diff().max() and (enable_gqa or q.shape == k.shape)
    return one_by_one(q, k, v, starts.long())


def inputs():
    return [torch.randn(2, H, 48, 8, requires_grad=True) for H in (4, 2, 2)]


@pytest.mark.parametrize("sequences", (1, 3))
@pytest.mark.parametrize("name", [n for n in A.WAYS if n != "flex"])
def test_every_way_says_the_same(name, sequences, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", nested_or_not)
    monkeypatch.setattr(varlen, "varlen_attn", variable)
    given, grad, segments = inputs(), torch.randn(2, 4, 48, 8), A.segments_of(2, 48, sequences)
    assert [len(row.unique()) for row in segments] == [sequences] * 2
    expected = A.both_passes(A.masked(segments, given[0]), given, grad)
    found = A.both_passes(A.WAYS[name](segments, given[0]), given, grad)
    same = A.apart(found, expected) <= 1e-5
    assert same == (sequences == 1 or not name.startswith("causal"))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_says_the_same():
    (q, k, v), segments = [x.detach() for x in inputs()], A.segments_of(*ROWS)
    y = A.flex(segments, q)(q, k, v)
    assert A.apart([y], [A.masked(segments, q)(q, k, v)]) <= 1e-5


def test_a_way_that_fails_says_so_and_the_others_go_on(monkeypatch, capsys):
    monkeypatch.setitem(A.SIZES, "135M", shape(64, 32, 48, 2, 4, 2, 8))
    monkeypatch.setattr(A, "ROWS", [ROWS])
    A.attention(A.Options("135M", "float32", times=1, device="cpu"))
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    assert [row[3] for row in rows] == list(A.WAYS)
    failed = [row[3] for row in rows if "Error" in row[4]]
    assert failed == ["nested", "varlen", "varlen, grouped", "flex"]
    assert [row[3] for row in rows if "not the same" in row[7]] == ["causal", "causal, grouped"]
    assert "135M (2, 48, 3): masked" in last


def test_a_right_way_must_be_faster_in_all_layers(monkeypatch, capsys):
    """What is made once counts by its part in a layer; wrong ways do not count."""
    rows = [("masked", 0.0, 4.0, 0, 0.0), ("nested", 4.0, 3.0, 0, 1e-6), ("flex", 1.0, 1.0, 0, 1.0)]
    monkeypatch.setattr(A, "compare", lambda *_: iter(rows))
    monkeypatch.setitem(A.SIZES, "135M", shape(64, 32, 48, 8, 4, 2, 8))
    assert A.table("135M", torch.float32, ROWS, "cpu", 1) == "nested 1.14"
    monkeypatch.setitem(A.SIZES, "135M", shape(64, 32, 48, 2, 4, 2, 8))
    assert A.table("135M", torch.float32, ROWS, "cpu", 1) == "masked 1.00"
    assert "not the same" in capsys.readouterr().out

"""Attention without a mask where a row is one sequence, and with one mask for all layers elsewhere:
the same numbers as with a mask in each."""

import pytest
import tiny
import torch

import packing
from common.layout import Layout, visible
from packing import by_segments, lay_out

TOKENS = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
ALONE = torch.tensor([[0] * 20, [1] * 13 + [-1] * 7])  # one sequence a row, padding behind
SEVERAL = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [2] * 20])


def with_mask(rows) -> Layout:
    seen = visible(rows.segments, rows.prefixes)
    return Layout(rows.positions, seen, rows.positions, examples=rows.prefixes)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_row_of_one_sequence_needs_no_mask(name):
    """Windows and the factors of long examples hold in it too."""
    model, rows = tiny.family(name).double(), by_segments(TOKENS, ALONE)
    at = rows.layout("cpu")
    assert at.visible is None
    expected = model.hidden(TOKENS, layout=with_mask(rows))[ALONE >= 0]
    tiny.close(model.hidden(TOKENS, layout=at)[ALONE >= 0], expected, 1e-10)
    several = by_segments(TOKENS, SEVERAL)  # and the numbers that are added are the mask
    expected = with_mask(several)
    assert torch.equal(several.layout("cpu").visible, expected.visible)
    bias = expected.bias(torch.zeros(1, dtype=torch.double))
    assert bias.dtype == torch.double and bias.stride(2) == 24
    assert torch.equal(bias == 0, expected.visible) and (bias[~expected.visible] < -1e300).all()


def test_no_mask_is_built_for_it(monkeypatch):
    monkeypatch.setattr(packing, "visible", lambda *_: pytest.fail("a mask"))
    for examples, width in (
        ([[[1] * 9], [[2] * 7]], 9),  # two sequences, a row each
        ([[[1] * 4, [2] * 5]], 16),  # a prompt and its answer, padding behind
        ([[[1] * 4, [], [2] * 5]], 9),  # an answer that is empty
    ):
        assert lay_out(examples, width)[0].layout("cpu").visible is None


@pytest.mark.parametrize(
    "examples", [[[[1] * 4], [[2] * 4]], [[[1] * 3, [2] * 2, [3] * 2]], [[[1]], [[2]]]]
)
def test_several_in_a_row_have_one(examples):
    assert lay_out(examples, 16)[0].layout("cpu").visible is not None


def test_a_mask_is_kept_once_for_all_layers():
    model, kept = tiny.family("llama"), set()

    def keep(t):
        if t.dim() == 4 and t.shape[-2:] == (20, 20):
            kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.packed(by_segments(TOKENS, SEVERAL)).sum().backward()
    assert len(kept) == 1 < len(model.layers)


def test_under_autocast_a_mask_has_its_type():
    at = with_mask(by_segments(TOKENS, SEVERAL))
    with torch.autocast("cpu", torch.bfloat16):
        assert at.bias(torch.zeros(1)).dtype == torch.bfloat16
    assert at.bias(torch.zeros(1)).dtype == torch.float32

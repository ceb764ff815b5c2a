"""Packing: rows that are full, nothing read twice, and no token that sees another example's."""

import random

import pytest
import torch
from tiny import V, close, decoder, ragged

import model as M
import packing
from common.layout import visible
from packing import by_segments, distinct, first_fit, lay_out, pack_answers, pad


@pytest.fixture(scope="module")
def lm():
    return decoder().eval()


@pytest.fixture(scope="module")
def scalar():
    return M.scalar_model(decoder(3), torch.Generator().manual_seed(0)).eval()


def passes(model, call):
    """What call() gives without gradients, and the shapes that the model read."""
    read = []
    hook = model.embed_tokens.register_forward_hook(lambda m, x, y: read.append(tuple(x[0].shape)))
    with torch.no_grad():
        out = call()
    hook.remove()
    return out, read


# -- rows


def test_pad():
    tokens, mask = pad([[1, 2], [3], []], fill=7)
    assert tokens.tolist() == [[1, 2], [3, 7], [7, 7]]
    assert mask.tolist() == [[True, True], [True, False], [False, False]]
    tokens, mask = pad([[1, 2], [3]], left=True)
    assert tokens.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[True, True], [False, True]]


def test_first_fit_never_overlaps():
    lengths = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    place = first_fit(lengths, 30)
    cells = [
        (row, column + i) for (row, column), n in zip(place, lengths, strict=True) for i in range(n)
    ]
    assert len(set(cells)) == len(cells) and max(c for _, c in cells) < 30
    assert max(r for r, _ in cells) + 1 <= sum(lengths) / 30 * 1.2 + 1


def test_rows_of_two_prompts_and_their_answers():
    rows, starts = lay_out([[[1, 2, 3], [4, 5], [6, 7, 8]], [[9, 10], [11, 12]]], 14)
    assert rows.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 0]]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, -1, -1]]
    assert rows.prefixes.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3, 3, -1, -1]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 0, 0]]
    assert starts == [[0, 3, 5], [8, 10]]


def test_the_longest_examples_come_first_and_pieces_may_be_empty():
    rows, starts = lay_out([[[1]], [[2, 3], [], [4]], [[5, 6, 7, 8]]], 4)
    assert rows.tokens.tolist() == [[5, 6, 7, 8], [2, 3, 4, 1]]
    assert starts == [[7], [4, 6, 6], [0]]
    assert rows.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_sizes_are_those_of_the_rows(seed):
    """Their padding counts, and a prompt that several answers share counts once."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(9)] * rng.randint(1, 120) for _ in range(6)]
    prompts = [p for p in prompts for _ in range(rng.randint(1, 3))]
    answers = [[1] * rng.randint(0, 70) for _ in prompts]
    rows, _ = packing.pack_answers(prompts, answers)
    height, width = rows.tokens.shape
    found = packing.sizes(prompts, answers)
    assert found == dict(tokens=height * width, length=width, targets=sum(len(a) for a in answers))


def test_long_rows_are_read_fewer_together(monkeypatch):
    monkeypatch.setattr(packing, "PASS", 10)
    lengths = [2, 2, 2, 9, 1, 1, 20, 5, 5, 1]
    assert [lengths[part] for part in packing.in_turn(lengths, 3)] == [
        [2, 2, 2], [9, 1], [1], [20], [5, 5], [1],
    ]  # fmt: skip
    assert list(packing.in_turn([], 3)) == []


def test_who_sees_whom():
    rows, _ = lay_out([[[1, 2], [3], [4, 5]], [[6], [7]]], 8)
    seen = visible(rows.segments, rows.prefixes)
    assert seen.shape == (1, 1, 8, 8) and seen.dtype == torch.bool
    assert seen[0, 0].long().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],  # not the answer before it
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],  # padding: not every attention kernel is finite without any
    ]


def test_positions_of_known_segments():
    segments = torch.tensor([[0, 0, 0, 4, 4, 2, -1], [1, 3, 3, 3, 3, -1, -1]])
    rows = by_segments(torch.zeros_like(segments), segments)
    assert rows.positions.tolist()[0] == [0, 1, 2, 0, 1, 0, 0]
    assert rows.positions.tolist()[1][:5] == [0, 0, 1, 2, 3]
    assert torch.equal(rows.segments, segments) and torch.equal(rows.prefixes, segments)


# -- packed is separate


def test_packed_is_padded_is_alone(lm):
    rows = ragged([4, 3, 5, 1, 2])
    tokens = torch.tensor([sum(rows, []) + [9] * 3])
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5 + [3] + [4] * 2 + [-1] * 3])
    hidden = lm.packed(by_segments(tokens, segments))
    padded, mask = pad(rows)
    beside = lm.hidden(padded, mask)
    for n, row in enumerate(rows):
        alone = lm.hidden(torch.tensor([row]))[0]
        close(hidden[0][segments[0] == n], alone)
        close(beside[n][mask[n]], alone)
    other = torch.where(segments < 0, (tokens + 1) % V, tokens)
    again = lm.packed(by_segments(other, segments))
    assert torch.equal(again[segments >= 0], hidden[segments >= 0])
    assert hidden.isfinite().all()


def test_another_example_s_content_never_matters(lm):
    """Nor that of an answer to the same prompt."""
    pieces = [ragged((3, 2, 4), seed) for seed in (0, 1, 2)]
    examples = [[p, a, b] for p, a, b in zip(*pieces, strict=True)]
    rows, _ = lay_out(examples, 32)
    hidden = lm.packed(rows)
    for segment in range(9):
        mine = rows.segments == segment
        # what it reads: itself, and the prompt that it continues
        read = mine | (rows.segments == rows.prefixes[mine][0])
        rows.tokens, kept = torch.where(read, rows.tokens, (rows.tokens + 5) % V), rows.tokens
        close(lm.packed(rows)[mine], hidden[mine], 1e-6)
        rows.tokens = kept


def test_packed_gradients_are_separate_ones():
    rows, grads = ragged([4, 3, 5]), []
    tokens, mask = pad(rows)
    packed = torch.tensor([sum(rows, [])])
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
    calls = (
        lambda m: m.hidden(tokens, mask)[mask],
        lambda m: m.packed(by_segments(packed, segments))[0],
    )
    for call in calls:
        model = decoder(std=0.1)
        logits = model.lm_head(call(model))
        torch.nn.functional.cross_entropy(logits, (packed[0] + 1) % V).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(grads[0], grads[1], 1e-6)


# -- prompts and answers


def test_answers_to_one_prompt_read_it_once(lm, scalar):
    """The same numbers as each row alone, from fewer tokens; a prompt that comes again later is
    read again.
    """
    a, b, c = ragged((9, 9, 5), 1)
    prompts, answers = [a] * 4 + [b] * 3 + [a] + [c] * 2, ragged((3, 1, 7, 3, 2, 2, 8, 4, 1, 6), 2)
    shared, read = passes(lm, lambda: M.states(lm, prompts, answers))
    assert read == [(1, 9 + 9 + 9 + 5 + sum(map(len, answers)))]
    logps, scores = M.logprobs(lm, prompts, answers), M.score(scalar, prompts, answers)
    values = M.values(scalar, prompts, answers)
    for n, row in enumerate(zip(prompts, answers, strict=True)):
        one, end = [[x] for x in row], len(row[1])
        alone = lm.hidden(torch.tensor([sum(row, [])]))[0, len(row[0]) - 1 :]
        close(shared[n, : end + 1], alone)
        close(logps[n], M.logprobs(lm, *one, width=8)[0], 5e-5)
        close(values[n, :end], M.values(scalar, *one)[0], 1e-4)
        close(scores[n], M.score(scalar, *one)[0], 1e-4)


def test_at_most_sixteen_answers_to_a_prompt_lie_end_to_end(lm):
    """What they cost in attention grows with the square of their number: the prompt is read again
    for each further sixteen.
    """
    prompts, answers = ragged([10]) * 40, ragged([3] * 40, 3)
    shared, read = passes(lm, lambda: M.states(lm, prompts, answers))
    for n in (0, 15, 16, 39):
        close(shared[n], lm.hidden(torch.tensor([prompts[n] + answers[n]]))[0, 9:])
    ((rows, width),) = read
    assert width <= 128 and rows * width >= 3 * 10 + 40 * 3
    _, read = passes(lm, lambda: M.states(lm, prompts, ragged([30] * 40, 3)))
    assert read == [(3, 10 + 16 * 30)]


def test_rows_are_as_wide_as_they_must_be_and_no_wider(lm):
    """128 columns where there is enough to fill them, else what there is; one that is longer has a
    row of its own length."""
    for lengths, shape in (((3, 5), (1, 8 + 2)), ((60,) * 4, (2, 128)), ((30,) * 10, (3, 128))):
        rows, _ = pack_answers(ragged(lengths), [[1]] * len(lengths))
        assert tuple(rows.tokens.shape) == shape
    rows, _ = pack_answers(ragged((200, 3)), [[1], [2]])
    assert tuple(rows.tokens.shape) == (2, 201)


def test_places_of_answers_that_are_empty_or_shorter_than_width():
    rows, at = pack_answers([[1, 2], [1, 2], [3]], [[], [4, 5], [6]], 4)
    flat = rows.tokens.flatten()
    assert flat[at].tolist() == [[2] * 5, [2, 4, 5, 5, 5], [3, 6, 6, 6, 6]]
    with pytest.raises(ValueError, match="prompt 1 is empty: at least one token was expected"):
        pack_answers([[1], [], []], [[2], [3], [4]])


def test_distinct_keeps_order_and_values(lm):
    a, b, c = ragged((4, 6, 2), 1)
    x, y, z = ragged((3, 1, 5), 2)
    prompts, answers = [a, b, a, a, c, b, a], [x, x, y, x, z, x, z]
    once_prompts, once_answers, index = distinct(prompts, answers)
    once = list(zip(once_prompts, once_answers, strict=True))
    assert once == [(a, x), (a, y), (a, z), (b, x), (c, z)]
    assert index.tolist() == [0, 3, 1, 0, 4, 3, 2]
    assert [once_prompts[i] for i in index] == prompts
    assert [once_answers[i] for i in index] == answers
    whole = M.logprobs(lm, prompts, answers)
    once, read = passes(lm, lambda: M.logprobs(lm, once_prompts, once_answers))
    close(once[index], whole, 5e-5)
    assert read == [(1, 4 + 6 + 2 + 3 + 1 + 5 + 3 + 5)]

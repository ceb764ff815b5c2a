"""Ragged lists of ids → full rows, so that neither padding nor a repeated prompt costs anything.

Examples are laid end to end in rows; each token sees its own example alone, and positions count
from the example's start. K answers to one prompt stand behind a single copy of it:

    row          [ p p p | a a | b b b ]  [ q q | c c . . . . ]
    segments       0 0 0   1 1   2 2 2      3 3   4 4 - - - -     the piece that a token belongs to
    prefixes       0 0 0   0 0   0 0 0      3 3   3 3 - - - -     the piece that it continues
    positions      0 1 2   3 4   3 4 5      0 1   2 3 0 0 0 0

A token sees what stands before it in its own piece and in the piece that it continues;
common/layout.py tells the network so.
All of this is built from lists, on the host, before anything is sent to a device.
"""

from dataclasses import dataclass

import numpy
import torch

from common.layout import Layout, visible

IGNORE = -100  # the label of a token that is read but not trained on
SHORTEST = 128  # rows are at least this wide where there is enough to fill them: fewer of them
PASS = 2**14  # tokens of a pass without gradients: about as many as fit where a step does
GROUP = 16  # answers behind one prompt: their attention grows with the square of their number


@dataclass
class Rows:
    """R rows of W tokens, tensors (R,W) on the host; padding has id 0, position 0, segment -1."""

    tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    prefixes: torch.Tensor

    def layout(self, device):
        """Where each row is one sequence from its first column on, it needs no mask."""
        real, here = self.segments >= 0, torch.arange(self.tokens.shape[1])
        if bool((~real | (self.positions == here)).all()):
            here = here.expand(self.tokens.shape).to(device)
            return Layout(here, None, here, real.to(device))
        on = [x.to(device) for x in (self.positions, self.segments, self.prefixes)]
        positions, segments, prefixes = on
        return Layout(positions, visible(segments, prefixes), positions, examples=prefixes)


def pad(rows, fill=0, left=False, device="cpu"):
    """Ragged lists of ids → tokens (B,T) and mask (B,T), padded on one side with `fill`, whose
    value never matters."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = True
    return tokens.to(device), mask.to(device)


def first_fit(lengths: list[int], width: int) -> list[tuple[int, int]]:
    """Where each example goes in rows of `width`: (row, first column). The longest go first."""
    used, places = [], [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, u in enumerate(used) if u + lengths[i] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[i] = row, used[row]
        used[row] += lengths[i]
    return places


def lay_out(examples, width: int):
    """Examples [[piece, …], …], lists of ids, in rows of `width`: an example's later pieces each
    continue its first. → Rows, and where each piece starts: [[row · width + column, …], …]"""
    corners = first_fit([sum(map(len, pieces)) for pieces in examples], width)
    height = 1 + max(row for row, _ in corners)
    tokens, positions, segments, prefixes = ([fill] * (height * width) for fill in (0, 0, -1, -1))
    starts, segment = [], 0
    for pieces, (row, column) in zip(examples, corners, strict=True):
        first, at = segment, row * width + column
        starts.append([])
        for ids in pieces:
            before = len(pieces[0]) if segment > first else 0
            place = slice(at, at + len(ids))
            tokens[place] = ids
            positions[place] = range(before, before + len(ids))
            segments[place] = [segment] * len(ids)
            prefixes[place] = [first] * len(ids)
            starts[-1].append(at)
            at, segment = at + len(ids), segment + 1
    columns = (ids_of(x).view(height, width) for x in (tokens, positions, segments, prefixes))
    return Rows(*columns), starts


def ids_of(numbers: list):
    """A long list as a tensor: through numpy three times as fast."""
    return torch.from_numpy(numpy.array(numbers, dtype=numpy.int64))


def pack(examples, width: int):
    """[(ids, labels), …] laid end to end in rows of `width` → tokens, labels, segments (R,W) on the
    host: padding has label -100 and segment -1.
    """
    rows, starts = lay_out([[ids] for ids, _ in examples], width)
    labels = [IGNORE] * rows.tokens.numel()
    for (_, mine), (start,) in zip(examples, starts, strict=True):
        labels[start : start + len(mine)] = mine
    return rows.tokens, ids_of(labels).view_as(rows.tokens), rows.segments


def count_targets(examples) -> int:
    """How many tokens of [(ids, labels), …] are predicted and trained: never a first one."""
    return sum(label != IGNORE for _, labels in examples for label in labels[1:])


def usable(examples, length: int):
    """Those of [(ids, labels), …] that have a target and at most `length` tokens, and {reason: how
    many were dropped}."""
    short = [e for e in examples if len(e[0]) <= length]
    kept = [e for e in short if any(label != IGNORE for label in e[1][1:])]
    dropped = {
        f"longer than {length} tokens": len(examples) - len(short),
        "without a target": len(short) - len(kept),
    }
    return kept, dropped


def pack_answers(prompts, answers, width=None, long_from=0):
    """N prompts and answers → Rows, and `at` (N,A+1), places in the flattened rows: at[n, t] is the
    token that answer token t follows; at[n, length], and what comes after, the last token.

    A is `width`, or the longest answer. Equal prompts that follow each other are read once, but not
    where one example has more than long_from tokens and the other has not: they turn differently
    (Config.long_factors). ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([])} is empty: at least one token was expected")
    examples, lengths = behind_prompts(prompts, answers, long_from)
    rows, starts = lay_out(examples, width_of(lengths))
    longest = max(map(len, answers)) if width is None else width
    at = []
    for pieces, (prompt_start, *answer_starts) in zip(examples, starts, strict=True):
        before = prompt_start + len(pieces[0]) - 1
        for answer, start in zip(pieces[1:], answer_starts, strict=True):
            places = [before, *range(start, start + len(answer))]
            at.append(places + places[-1:] * (longest - len(answer)))
    return rows, torch.tensor(at)


def behind_prompts(prompts, answers, long_from=0):
    """→ examples [[prompt, answer, …], …], and how many tokens each has."""
    examples = []
    long = [len(p) + len(a) > long_from > 0 for p, a in zip(prompts, answers, strict=True)]
    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alike = n and long[n] == long[n - 1]
        if n and prompt == prompts[n - 1] and len(examples[-1]) <= GROUP and alike:
            examples[-1].append(answer)
        else:
            examples.append([prompt, answer])
    return examples, [sum(map(len, pieces)) for pieces in examples]


def width_of(lengths) -> int:
    return max(min(SHORTEST, sum(lengths)), *lengths)


def sizes(prompts, answers) -> dict:
    """What decides the memory that a pass over prompts and answers takes: the tokens of their rows,
    padding too, the rows' length, and the answers' tokens."""
    _, lengths = behind_prompts(prompts, answers)
    width = width_of(lengths)
    rows = 1 + max(row for row, _ in first_fit(lengths, width))
    return dict(tokens=rows * width, length=width, targets=sum(map(len, answers)))


def in_turn(lengths, size: int):
    """Yields slices of rows of these lengths that are read together: `size` of them, or fewer of at
    most PASS tokens."""
    start = tokens = 0
    for i, n in enumerate(lengths):
        if i > start and (i == start + size or tokens + n > PASS):
            yield slice(start, i)
            start, tokens = i, 0
        tokens += n
    if lengths:
        yield slice(start, len(lengths))


def answer_mask(answers, width=None, device="cpu"):
    """(N,A) bool, True on the answers' tokens. A is `width`, or the longest answer."""
    lengths = torch.tensor([len(a) for a in answers])
    columns = torch.arange(max(map(len, answers)) if width is None else width)
    return (columns < lengths[:, None]).to(device)


def distinct(prompts, answers):
    """Each (prompt, answer) once, those of a prompt together → prompts, answers, and where each of
    the N given ones now stands (N,). What several pairs share is then read once."""
    by_prompt = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        by_prompt.setdefault(tuple(prompt), {})[tuple(answer)] = None
    rows = [(prompt, answer) for prompt, found in by_prompt.items() for answer in found]
    place = {row: i for i, row in enumerate(rows)}
    index = [place[tuple(p), tuple(a)] for p, a in zip(prompts, answers, strict=True)]
    return [list(p) for p, _ in rows], [list(a) for _, a in rows], torch.tensor(index)


def by_segments(tokens, segments) -> Rows:
    """The Rows of tokens (R,W) whose segments (R,W) are known, -1 on padding; on the host."""
    here = torch.arange(segments.shape[1])
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = here - torch.where(first, here, 0).cummax(1).values
    return Rows(tokens, positions, segments, segments)

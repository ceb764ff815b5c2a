"""The metrics: each by hand, and against what it must equal."""

import math
import random

import pytest
import torch

from metrics import bootstrap, hits, kl, mean, pair_accuracy, ratio, win_rate


def test_win_rate():
    # two won, one tie, one lost
    assert win_rate([1, 2, 3, 4], [0, 2, 5, 1]) == (0.625, pytest.approx(2 / 3))
    assert win_rate([1, 1], [1, 1]) == (0.5, None)
    assert win_rate([0, 0], [1, 2]) == (0.0, 0.0)
    with pytest.raises(ValueError):
        win_rate([1, 2], [1])


def test_bootstrap_is_the_normal_interval_where_there_is_one():
    rng = random.Random(0)
    xs = [rng.gauss(3, 2) for _ in range(400)]
    assert bootstrap(xs) == pytest.approx(1.96 * 2 / 20, rel=0.15)
    assert bootstrap(xs) == bootstrap(xs) and bootstrap([1.0] * 50) == 0
    halves = [(a, 2.0) for a in xs]  # of a ratio of sums
    assert bootstrap(halves, ratio) == pytest.approx(bootstrap(xs) / 2, rel=0.05)


def test_pair_accuracy():
    scores = torch.tensor([[3.0, 2.0, 1.0, 9.0], [1.0, 1.0, 0.0, 2.0]])
    ranks = torch.tensor([[0, 1, 2, -1], [0, 1, 1, 2]])
    # first: three of three; second: a tie, won, lost, and twice lost
    assert pair_accuracy(scores, ranks) == pytest.approx((3 + 0.5 + 1 + 0 + 0 + 0) / 8)
    assert pair_accuracy(-scores, ranks) == pytest.approx(1 - pair_accuracy(scores, ranks))
    order = torch.tensor([2, 0, 3, 1])
    assert pair_accuracy(scores[:, order], ranks[:, order]) == pair_accuracy(scores, ranks)
    assert pair_accuracy(scores, torch.zeros(2, 4)) == 0.5  # nothing to compare


def test_hits_compare_each_chosen_answer_with_its_rejected_one():
    assert hits([1.0, 5.0, 2.0, 0.0, 7.0, 2.0]) == [1, 0, 0.5]


def test_ratio_is_the_mean_over_all_that_was_counted():
    assert ratio([(2.0, 1), (4.0, 4)]) == 1.2 != mean([2.0, 4.0 / 4])
    assert ratio([]) == ratio([(0.0, 0)]) == 0.0


def test_kl_is_the_log_ratio_of_each_answer():
    policy = [torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]), torch.tensor([[-3.0]])]
    reference = [torch.tensor([[-2.0, -4.0], [-0.25, 0.0]]), torch.tensor([[-3.0]])]
    assert kl(policy, reference) == [3.0, -0.25, 0.0]
    with pytest.raises(ValueError, match="log-probabilities of answers are NaN or infinite"):
        kl([torch.tensor([[math.nan]])], [torch.tensor([[0.0]])])


def test_k1_averages_to_the_kl_over_all_answers():
    p, q = (torch.tensor(x).log() for x in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    exact = (p.exp() * (p - q)).sum().item()
    estimates = kl([p[:, None]], [q[:, None]])
    assert sum(w * k for w, k in zip((0.5, 0.3, 0.2), estimates, strict=True)) == pytest.approx(
        exact
    )

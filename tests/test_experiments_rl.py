"""The experiments on KL, methods, reward models: their pure functions against known answers."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch

from common import hub
from data.world import world
from experiments import kl, lab, methods, second_round, small_reward
from metrics import ratio


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores, values = [0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 5.0, 3.0]
    subsets = list(itertools.combinations(range(4), n))
    best = [values[max(some, key=lambda i: scores[i])] for some in subsets]
    assert kl.best_of(scores, values, n) == pytest.approx(sum(best) / len(best), abs=1e-12)


def test_equal_scores_are_as_likely():
    assert kl.best_of([1.0, 1.0, 0.0], [0.0, 1.0, 7.0], 3) == pytest.approx(0.5)
    # two of three: {1st, 2nd} is either, the other two subsets are won by the 1st or the 2nd
    assert kl.best_of([1.0, 1.0, 0.0], [0.0, 1.0, 7.0], 2) == pytest.approx(0.5)


@pytest.mark.parametrize("form", ["PPO", "best of n"])
def test_a_fit_finds_its_own_curve_and_where_it_is_highest(form):
    d = np.linspace(0, 3, 30)
    curve = 0.7 * d - 0.4 * kl.bend(form, d)
    found = kl.fit(form, d, curve)
    assert found["alpha"] == pytest.approx(0.7) and found["beta"] == pytest.approx(0.4)
    assert found["off"] < 1e-9
    fine = np.linspace(0.01, 6, 6000)
    highest = fine[np.argmax(0.7 * fine - 0.4 * kl.bend(form, fine))]
    assert found["peak"] == pytest.approx(highest, abs=2e-3)


def test_a_curve_that_never_falls_has_no_peak():
    d = np.linspace(0, 2, 9)
    assert kl.fit("best of n", d, d + 0.1 * d**2)["peak"] is None


def test_methods_are_compared_at_equal_kl():
    curve = [(0.0, [0.0, 0.0]), (1.0, [1.0, 3.0]), (2.0, [2.0, -1.0])]
    assert methods.interpolated(curve, 0.5) == [0.5, 1.5]
    assert methods.interpolated(curve, 1.5) == [1.5, 1.0]
    assert methods.interpolated(curve, 2.0) == [2.0, -1.0]
    assert methods.interpolated(curve, 2.1) is None  # nothing is said beyond the last run


def test_a_methods_curve_starts_at_sft_and_rises_in_kl():
    def found(golds, kls):
        return {"lines": [{"gold": g} for g in golds], "kl": kls}

    sft = found([1.0, 0.5], [0.0, 0.0])
    far, near = found([2.0, 0.5], [4.0, 4.0]), found([1.5, 1.0], [0.5, 1.5])
    expected = [(0.0, [0.0, 0.0]), (1.0, [0.5, 0.5]), (2.0, [1.0, 0.0])]
    assert methods.curve([far, near], sft, "gold") == expected


def test_reasoning_prompts_are_held_out_and_of_their_kinds():
    found = methods.reasoning(40, 0)
    assert len(found) == 40
    assert {r["item"]["kind"] for r in found} == set(methods.REASONING)
    assert len({r["messages"][0]["content"] for r in found}) == 40


def test_best_of_ns_kl_at_the_known_points():
    answers = [([0.0, 1.0], [0.0, 1.0])] * 3
    assert kl.best_row(1, answers)["kl"] == 0
    assert kl.best_row(2, answers)["kl"] == pytest.approx(math.log(2) - 0.5)
    assert kl.best_row(2, answers)["gained"]["mean"] == pytest.approx(0.5)


def test_the_share_gained_is_of_what_each_seed_left():
    """Two seeds: SFT leaves 0.8 and 1.3 of gold, the policy gains 0.4 and 0.13 of it."""

    def seed(sft, ours):
        return {n: {"lines": [{"gold": g}] * 3} for n, g in (("sft", sft), ("ppo", ours))}

    found = [seed(world.PERFECT - 0.8, world.PERFECT - 0.4), seed(world.PERFECT - 1.3, 0.63)]
    share = second_round.shares(found, "ppo")
    assert share["seeds"] == pytest.approx([0.5, 0.1]) and share["mean"] == pytest.approx(0.3)


def test_a_cut_model_is_the_first_layers(tmp_path):
    tiny.folder(tmp_path / "whole", num_hidden_layers=3)
    small_reward.cut(tmp_path / "whole", tmp_path / "cut", 2)
    (whole, _), (cut, tok) = hub.load(tmp_path / "whole"), hub.load(tmp_path / "cut")
    assert len(cut.layers) == cut.config.num_hidden_layers == 2 and tok is not None
    kept = cut.state_dict()
    assert all(torch.equal(whole.state_dict()[name], kept[name]) for name in kept)


def test_what_ppo_maximises_and_who_judges_it(tmp_path, monkeypatch):
    """Scores in the reward model's deviations, -1 without an end; pairs in gold order."""
    scores = [3.0, 1.0, 2.0, 5.0]
    config = hub.read_config(tiny.folder(tmp_path / "lm") and tmp_path / "lm")
    config.reward_mean, config.reward_std = 1.0, 2.0
    model = type("Model", (), {"config": config})()
    monkeypatch.setattr(lab.tuning, "read", lambda *_, **__: (model, None))
    monkeypatch.setattr(lab.evals, "read", lambda *_: (model, None))
    monkeypatch.setattr(lab.evals, "score_texts", lambda *_: scores)
    answers = [("a", [1], True), ("b", [1], False), ("c", [1], True), ("d", [1], True)]
    o, held = lab.Options(device="cpu"), [{"messages": [], "item": None}] * 2
    assert lab.proxy(o, tmp_path, held * 2, answers) == [1.0, -1.0, 0.5, 2.0]

    gold = torch.tensor([[1.0, 0.0], [0.5, 0.2]])  # the second prompt's pair is in the wrong order
    monkeypatch.setattr(lab, "held_out", lambda *_: held)
    monkeypatch.setattr(lab.evals, "answer", lambda *_: answers)
    monkeypatch.setattr(lab.evals, "rubric", lambda *_: (gold, None, None))
    found = lab.judged(o, tmp_path / "lm", {"first": tmp_path / "lm"}, 0, tmp_path, k=2)
    assert found == {"first": [[1.0, 1], [0.0, 1]]}
    assert lab.pooled([found["first"]], ratio)["mean"] == 0.5

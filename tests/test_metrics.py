"""The metrics: each by hand, and against what it must equal."""

import json
import math
import random
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import chat_tokenizer, lm

import metrics
from common import hub
from metrics import (
    accuracy,
    bootstrap,
    bradley_terry,
    choice_ids,
    exact_match,
    hits,
    kl,
    macro_f1,
    mean,
    multiple_choice,
    pair_accuracy,
    paired_bootstrap,
    pass_at_k,
    perplexity,
    ratio,
    rouge,
    sign_test,
    token_f1,
    win_rate,
)
from model import logprobs

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make import rouge_pairs  # noqa: E402


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


# ---------------------------------------------------------------- two on the same items
def test_a_paired_interval_is_narrower_where_items_are_hard_for_both():
    rng = random.Random(1)
    hard = [rng.gauss(0, 5) for _ in range(300)]
    ours, theirs = ([h + rng.gauss(m, 0.5) for h in hard] for m in (0.2, 0.0))
    difference, half = paired_bootstrap(ours, theirs)
    changes = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert difference == pytest.approx(mean(changes))
    assert half == pytest.approx(bootstrap(changes)) and half < bootstrap(ours) / 4
    both = [(a, 2) for a in ours], [(b, 2) for b in theirs]
    assert paired_bootstrap(*both, ratio) == pytest.approx((difference / 2, half / 2))
    assert paired_bootstrap(ours, ours) == (0, 0)
    with pytest.raises(ValueError):
        paired_bootstrap(ours, theirs[1:])


def test_the_sign_test_is_the_binomial_one():
    def scores(won, lost, tied):
        return [1] * won + [0] * lost + [1] * tied, [0] * won + [1] * lost + [1] * tied

    for won, lost, tied in [(0, 0, 3), (5, 0, 2), (7, 3, 1), (3, 7, 0), (4, 4, 1), (1, 0, 0)]:
        n = won + lost
        tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(min(won, lost) + 1))
        assert sign_test(*scores(won, lost, tied)) == float(min(1, 2 * tail))
    assert sign_test(*scores(8, 1, 0)) == pytest.approx(0.0390625)
    assert sign_test(*scores(900, 700, 50)) == pytest.approx(6.3e-7, rel=0.05)


# ---------------------------------------------------------------- many models
def test_bradley_terry_finds_planted_strengths():
    strengths = torch.tensor([1.2, 0.4, -0.3, -1.3], dtype=torch.float64)
    games = torch.tensor([[0, 90, 40, 10], [90, 0, 70, 30], [40, 70, 0, 50], [10, 30, 50, 0]])
    expected = games * torch.sigmoid(strengths[:, None] - strengths)
    assert torch.allclose(bradley_terry(expected), strengths, atol=1e-9)
    assert bradley_terry([[0, 3], [1, 0]]).tolist() == pytest.approx(
        [math.log(3) / 2, -math.log(3) / 2]
    )
    # a tie is half a win to each
    assert bradley_terry([[0, 0.5], [0.5, 0]]).tolist() == pytest.approx([0, 0])


def test_bradley_terry_is_the_likelihood_s_maximum():
    generator = torch.Generator().manual_seed(0)
    wins = torch.randint(1, 9, (5, 5), generator=generator).double().fill_diagonal_(0)
    theta = bradley_terry(wins).requires_grad_()
    (wins * torch.nn.functional.logsigmoid(theta[:, None] - theta)).sum().backward()
    assert theta.grad.abs().max() < 1e-9 and abs(theta.mean().item()) < 1e-12


@pytest.mark.parametrize("wins", ([[0, 3], [0, 0]], [[0, 2, 1], [1, 0, 1], [0, 0, 0]]))
def test_bradley_terry_without_a_finite_fit(wins):
    with pytest.raises(ValueError, match="no finite fit"):
        bradley_terry(wins)


# ---------------------------------------------------------------- answers beside references
def test_rouge_is_rouge_score_s():
    golden = json.loads((GOLDEN / "rouge.json").read_text())
    pairs = rouge_pairs()
    assert len(pairs) == len(golden) == 300 and sum(any(row) for row in golden) > 140
    for (text, reference), row in zip(pairs, golden, strict=True):
        ours = [x for score in rouge(text, reference).values() for x in score.values()]
        assert ours == pytest.approx(row, abs=1e-9, rel=0), (text, reference)


def test_rouge_by_hand():
    found = rouge("the cat sat", "The cat, the dog")
    assert found["rouge1"] == pytest.approx(dict(precision=2 / 3, recall=1 / 2, fmeasure=4 / 7))
    assert found["rouge2"] == pytest.approx(dict(precision=1 / 2, recall=1 / 3, fmeasure=0.4))
    lines = rouge("c d\na b", "a b\nc d")  # in another order: L sees one line, Lsum both
    assert (lines["rougeL"]["fmeasure"], lines["rougeLsum"]["fmeasure"]) == (0.5, 1.0)
    assert rouge("漢字", "漢字")["rouge1"]["fmeasure"] == 0.0  # has no word of a to z
    stemmed = rouge("running", "runs", stem=lambda word: word[:3])
    assert stemmed["rouge1"]["fmeasure"] == 1.0 != rouge("running", "runs")["rouge1"]["fmeasure"]
    assert rouge("as", "at", stem=lambda word: "x")["rouge1"]["fmeasure"] == 0.0  # short words stay


def test_exact_match_and_f1_are_squad_s():
    assert exact_match("The  Lima!", "lima") == 1.0 and exact_match("Lima, Peru", "Lima") == 0.0
    assert exact_match("theatre", "atre") == 0.0  # an article is a word
    assert token_f1("Not Lima", "Lima") == pytest.approx(2 / 3)
    assert token_f1("a b b c", "b b b d") == pytest.approx(4 / 7)  # "a" is an article
    assert token_f1("The", "an") == 1.0 and token_f1("the", "Lima") == token_f1("", "Lima") == 0.0
    assert token_f1("x", "y") == 0.0


# ---------------------------------------------------------------- classes, programs, texts
def test_accuracy_and_macro_f1():
    labels, said = list("aaaabbc"), list("aaabbca")
    assert accuracy(labels, said) == 4 / 7
    # a: 3 of 4 and 4, b: 1 of 2 and 2, c: 0
    assert macro_f1(labels, said) == pytest.approx((3 / 4 + 1 / 2 + 0) / 3)
    assert macro_f1(["a", "a"], ["a", "x"]) == pytest.approx((2 / 3 + 0) / 2)
    assert accuracy(list("aab"), list("aaa")) == 2 / 3 > macro_f1(list("aab"), list("aaa"))


def test_pass_at_k_is_human_eval_s_and_exact():
    def human_eval(n, c, k):  # human_eval/evaluation.py: estimate_pass_at_k
        if n - c < k:
            return 1.0
        return 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))

    for n in (1, 2, 5, 10, 100, 200, 1000):
        for c in {0, 1, n // 3, n - 1, n}:
            for k in {1, min(n, 10), n // 2 or 1, n}:
                exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert abs(pass_at_k(n, c, k) - human_eval(n, c, k)) < 1e-12
                assert abs(pass_at_k(n, c, k) - float(exact)) < 1e-15
    for bad in ((5, 6, 1), (5, 1, 6), (5, 1, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="1 ≤ k ≤ n were expected"):
            pass_at_k(*bad)


def test_pass_at_k_is_unbiased():
    """Its mean over all draws of n programs is 1 - (1-p)^k, for any p."""
    n, k, p = 6, 3, 0.3
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    found = sum(chance * pass_at_k(n, c, k) for c, chance in enumerate(chances))
    assert found == pytest.approx(1 - (1 - p) ** k)


def test_perplexity_per_token_and_per_byte():
    text = "é a"  # 4 bytes
    assert perplexity([(math.log(256) * 4, 4)]) == pytest.approx(256)
    assert perplexity([(6.0, 2), (2.0, 2)]) == pytest.approx(math.exp(2))
    nll = 5.0
    assert perplexity([(nll, len(text.encode()))]) == pytest.approx(math.exp(5 / 4))


# ---------------------------------------------------------------- multiple choice
ITEMS = [
    {"query": "what is one", "choices": ["two", "three and four", "a", "no"]},
    {"query": "ab ", "choices": ["one and two", "thank you"]},
    {"query": "what is the capital of Peru?\nAnswer:", "choices": ["Lima", "hi", "é 漢"]},
    {"query": ["the cat is one", "the dog is"], "choices": ["and", "and"]},
    {"query": "", "choices": ["hi", "you"]},
]


def by_definition(model, tok, query, choice):
    """log p(choice | query) from one row, read without a mask, token by token."""
    prompt, answer = choice_ids(tok, query, choice)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer]))[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(logits[at, i].item() for at, i in zip(places, answer, strict=True))


def test_multiple_choice_is_the_definition_one_by_one_or_batched():
    model, tok = lm(2), chat_tokenizer()
    found = multiple_choice(model, tok, ITEMS)
    for item, got in zip(ITEMS, found, strict=True):
        queries = item["query"]
        queries = queries if isinstance(queries, list) else [queries] * len(item["choices"])
        both = list(zip(queries, item["choices"], strict=True))
        lls = [by_definition(model, tok, q, c) for q, c in both]
        assert got["logprobs"] == pytest.approx(lls, abs=1e-4)
        each = [ll / len(c) for ll, c in zip(lls, item["choices"], strict=True)]
        assert got["choice"] == lls.index(max(lls)) and got["choice_norm"] == each.index(max(each))
    assert any(x["choice"] != x["choice_norm"] for x in found)  # the two scorings differ
    for size in (1, 2):
        again = multiple_choice(model, tok, ITEMS, size=size)
        for a, b in zip(found, again, strict=True):
            assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)


def test_a_question_is_read_once_for_its_choices(monkeypatch):
    """Cached = uncached: each choice behind a question of its own has the same log-likelihood."""
    model, tok, rows = lm(2), chat_tokenizer(), []
    real = model.packed
    monkeypatch.setattr(
        model, "packed", lambda r: (rows.append((r.segments >= 0).sum()), real(r))[1]
    )
    item = {"query": "what is the capital of Peru " * 2, "choices": ["two", "a", "three and"]}
    (found,) = multiple_choice(model, tok, [item])
    ids = [choice_ids(tok, item["query"], c) for c in item["choices"]]
    assert [int(n) for n in rows] == [len(ids[0][0]) + sum(len(a) for _, a in ids)]
    alone = [logprobs(model, [p], [a]).sum().item() for p, a in ids]
    assert found["logprobs"] == pytest.approx(alone, abs=1e-4)


def test_multiple_choice_is_lm_eval_s():
    model, tok = hub.load("data/base")
    golden = json.loads((GOLDEN / "choices.json").read_text())
    for item, got in zip(golden, multiple_choice(model, tok, golden), strict=True):
        assert got["logprobs"] == pytest.approx(item["logprobs"], abs=1e-4), item["query"]


def test_damaged_weights_choose_nothing():
    model = lm(2)
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        multiple_choice(model, chat_tokenizer(), ITEMS)


def test_every_metric_says_what_it_is():
    public = [f for name, f in vars(metrics).items() if callable(f) and f.__module__ == "metrics"]
    assert all(f.__doc__ for f in public if not f.__name__.startswith("_")) and len(public) > 20

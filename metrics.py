"""What is measured, as plain functions: each with its formula, what it misses, and its source.

Every figure is a mean over prompts or pairs. Two questions belong beside each of them:

    how far is it off?      half the width of its 95 % interval (bootstrap), over what was drawn:
                            prompts, and not the tokens or pairs of one prompt, which are alike
    compared with what?     two checkpoints answer the same prompts and are compared prompt by
                            prompt (paired_bootstrap, sign_test): prompts differ more than
                            checkpoints do

Only multiple_choice reads a network; tools/evals.py makes the answers and scores of the others.
"""

import math
import random
import re
import string
from collections import Counter

import torch

from model import logprobs
from packing import in_turn


# ---------------------------------------------------------------- means and their intervals
def mean(xs):
    """Σ x / n of a list of numbers. ZeroDivisionError of an empty one: there is no such figure."""
    return sum(xs) / len(xs)


def ratio(parts):
    """[(sum, count)], one for each text → Σ sums / Σ counts, such as a held-out loss per token; 0
    where nothing was counted. Long texts weigh more than in a mean of the texts' own means."""
    return sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))


def perplexity(parts):
    """[(Σ -log p of a text's tokens, count)] → exp(Σ / Σ counts): per token with counts of tokens,
    which models of different vocabularies cut differently; per byte with counts of UTF-8 bytes,
    which compares them. How likely a text is says nothing of how good an answer is."""
    return math.exp(ratio(parts))


def bootstrap(xs, statistic=mean, rounds=1000, seed=0):
    """Half the width of the 95 % interval of statistic(xs): from its 2.5th to its 97.5th percentile
    over `rounds` samples of len(xs) items drawn with replacement (Efron 1979). xs: one item for
    each thing drawn independently, as a rule a prompt. It tells how the figure would change with
    other prompts, not with another seed of the training; of few items it is too narrow."""
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(xs, k=len(xs))) for _ in range(rounds))
    return (found[int(0.975 * rounds)] - found[int(0.025 * rounds)]) / 2


def paired_bootstrap(ours, theirs, statistic=mean, rounds=1000, seed=0):
    """statistic(ours) - statistic(theirs) of the same items, and half the width of its interval:
    both sides draw the same items, so what is hard for both cancels (Koehn 2004)."""
    pairs = list(zip(ours, theirs, strict=True))

    def difference(pairs):
        a, b = zip(*pairs, strict=True)
        return statistic(a) - statistic(b)

    return difference(pairs), bootstrap(pairs, difference, rounds, seed)


def sign_test(ours, theirs):
    """The chance that w wins and l losses on the same items part at least so far when either side
    is as likely to win: the exact two-sided binomial test (McNemar's, where scores are 0 or 1).

        p = min(1, 2 Σ_{i ≤ min(w, l)} C(w+l, i) / 2^(w+l))          ties are left out

    It sees who won, not by how much; one of twenty such tests has p < 0.05 by chance."""
    won = Counter(points(ours, theirs))
    n, few = won[1] + won[0], min(won[1], won[0])
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(few + 1)) / 2**n)


def finite(xs, what):
    """xs, or a ValueError where one of them is NaN or infinite."""
    if not all(map(math.isfinite, xs)):
        raise ValueError(f"the {what} of answers are NaN or infinite: the weights are damaged")
    return xs


def running(seen, scores):
    """(n, mean, M = Σ(score - mean)²) of all scores so far, with the new ones (K,) added:
    δ = mean_new - mean;  mean + δ K/(n+K);  M + M_new + δ² nK/(n+K)          Chan et al. 1979"""
    n, mean, m = seen
    k, scores = len(scores), scores.double()
    if not k:
        return seen
    shift = scores.mean().item() - mean
    within = ((scores - scores.mean()) ** 2).sum().item()
    return n + k, mean + shift * k / (n + k), m + within + shift**2 * n * k / (n + k)


def deviation(seen) -> float:
    """sqrt(M/n); 1 while all scores are equal up to float32's rounding: they have no scale yet."""
    n, mean, m = seen
    std = (m / n) ** 0.5 if n else 0.0
    return std if std > 1e-6 * abs(mean) else 1.0


# ---------------------------------------------------------------- comparisons and distance
def points(ours, theirs):
    """Scores on the same prompts → for each prompt 1 where ours is higher, ½ for a tie, else 0."""
    return [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]


def win_rate(ours, theirs):
    """Scores on the same prompts → (wins + ties/2) / n, and wins / (wins + losses), None where all
    are ties: give both, many ties part them. Even is ½. A win does not say by how much."""
    won = points(ours, theirs)
    decided = [p for p in won if p != 0.5]
    return mean(won), mean(decided) if decided else None


def hits(scores):
    """Scores of n chosen answers, then of the n rejected ones → points for each pair: their mean is
    the accuracy of RewardBench (Lambert et al. 2024), which counts a tie as lost."""
    half = len(scores) // 2
    return points(scores[:half], scores[half:])


def pair_accuracy(scores, ranks) -> float:
    """The share of pairs that the scores put in the ranks' order; equal scores count half. ½ where
    there is no pair. scores, ranks: tensors (B,K), K answers to each of B prompts; rank 0 is the
    best, -1 marks an absent answer, and equal ranks form no pair.

    All pairs weigh the same (reward.ranking_loss averages within prompts first). Where rankers
    disagree, 1 is out of reach: InstructGPT's agreed on 73 % of pairs (Ouyang et al. 2022)."""
    return pairs_won(scores, ranks).item()


def pairs_won(scores, ranks):
    """pair_accuracy() as a tensor that is not read: a GPU need not wait for it."""
    present = ranks >= 0
    better = ranks[:, :, None] < ranks[:, None, :]  # (B,K,K): i is ranked above j
    pairs = better & present[:, :, None] & present[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    won = (margin > 0).float() + 0.5 * (margin == 0).float()
    share = torch.where(pairs, won, 0.0).sum() / pairs.sum().clamp(min=1)
    return torch.where(pairs.any(), share, 0.5)


def kl(policy, reference):
    """KL(π ‖ π_ref) for each of the policy's own answers y, in nats, estimated by its log-ratio,
    Σ_t log π(y_t) - log π_ref(y_t): k1 of Schulman 2020, "Approximating KL divergence".

    policy, reference: lists of tensors (N,A), the log-probabilities under each, 0 past an answer's
    end. → a list of floats. Noisy; unbiased where the answers were sampled from π at temperature 1.
    It grows with length, and misses what π no longer says, KL(π_ref ‖ π)."""
    differences = [(p - r).sum(1).tolist() for p, r in zip(policy, reference, strict=True)]
    return finite([x for some in differences for x in some], "log-probabilities")


def bradley_terry(wins, rounds=10_000):
    """Log-strengths θ (K,), mean 0, with P(i beats j) = σ(θ_i - θ_j) (Bradley & Terry 1952), from
    wins (K,K): how often i beat j, a tie half a win to each. Maximum likelihood by MM (Hunter 2004)

        p_i ← Σ_j w_ij / Σ_j (w_ij + w_ji) / (p_i + p_j)             p = exp θ

    A circle, A beats B beats C beats A, is lost. ValueError where some models never won against the
    others, not even through a third: no finite θ fits."""
    w = torch.as_tensor(wins, dtype=torch.float64)
    games = w + w.T
    if not torch.matrix_power((w > 0) + torch.eye(len(w)).double(), len(w)).all():
        raise ValueError("Bradley-Terry: some models won no game against the others: no finite fit")
    p = torch.ones(len(w), dtype=torch.float64)
    for _ in range(rounds):
        before, p = p, w.sum(1) / (games / (p[:, None] + p)).sum(1)
        p = p / p.log().mean().exp()
        if (p / before).log().abs().max() < 1e-13:
            break
    return p.log()


# ---------------------------------------------------------------- answers beside references
def _words(text, stem):
    """What ROUGE calls words, a to z and digits only: a text in another script has none."""
    words = re.findall("[a-z0-9]+", text.lower())
    return [stem(w) if stem and len(w) > 3 else w for w in words]


def _overlap(common, predicted, expected):
    """Numbers of words → precision P, recall R, and F = 2PR / (P + R)."""
    p, r = common / max(predicted, 1), common / max(expected, 1)
    return {"precision": p, "recall": r, "fmeasure": 2 * p * r / (p + r) if p + r else 0.0}


def _subsequence(reference, prediction):
    """Places in the reference of a longest common subsequence: of several, rouge_score's choice."""
    t = [[0] * (len(prediction) + 1)]  # t[i][j]: its length in the first i and j words
    for word in reference:
        t.append([0])
        for j, other in enumerate(prediction):
            t[-1].append(t[-2][j] + 1 if word == other else max(t[-2][j + 1], t[-1][j]))
    places, i, j = [], len(reference), len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif t[i][j - 1] > t[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places


def rouge(prediction: str, reference: str, stem=None):
    """Overlap of words (Lin 2004), rouge_score's numbers → {rouge1, rouge2: of n-grams; rougeL: of
    a longest common subsequence; rougeLsum: of its union over lines}, each {precision, recall,
    fmeasure}. stem: word → stem, such as nltk's PorterStemmer().stem.

    A paraphrase scores low, a lie in the reference's words high: "not" is one word of many."""
    ours, theirs = _words(prediction, stem), _words(reference, stem)
    found = {}
    for n in (1, 2):
        a, b = (Counter(zip(*(x[i:] for i in range(n)), strict=False)) for x in (ours, theirs))
        found[f"rouge{n}"] = _overlap((a & b).total(), a.total(), b.total())
    found["rougeL"] = _overlap(len(_subsequence(theirs, ours)), len(ours), len(theirs))
    predicted = [_words(line, stem) for line in prediction.split("\n")]
    left, common = Counter(ours) & Counter(theirs), 0
    for line in (_words(line, stem) for line in reference.split("\n")):
        for i in {i for other in predicted for i in _subsequence(line, other)}:
            common += left[line[i]] > 0  # a word counts as often as both texts have it
            left[line[i]] -= 1
    return found | {"rougeLsum": _overlap(common, len(ours), len(theirs))}


def _normalised(text):
    """SQuAD's words: lower case, no punctuation, no articles."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(prediction: str, reference: str):
    """1.0 where both are the same but for case, punctuation and articles (Rajpurkar et al. 2016)"""
    return float(_normalised(prediction) == _normalised(reference))


def token_f1(prediction: str, reference: str):
    """F of the words in common, in any order, normalised as above; where one has none, 1 if neither
    has (SQuAD 2.0's script). "Not Lima" gets ⅔ beside "Lima"."""
    a, b = _normalised(prediction), _normalised(reference)
    if not a or not b:
        return float(a == b)
    return _overlap((Counter(a) & Counter(b)).total(), len(a), len(b))["fmeasure"]


# ---------------------------------------------------------------- classes, programs, choices
def accuracy(labels, predictions):
    """The share of predictions that equal the label: 0.95 for who always says what 95 % are."""
    return mean([float(a == b) for a, b in zip(labels, predictions, strict=True)])


def macro_f1(labels, predictions):
    """The mean over all classes that occur of F = 2 TP / (2 TP + FP + FN), as scikit-learn has it.
    A rare class counts as much as a common one, so its few items make the figure noisy."""
    hit = Counter(a for a, b in zip(labels, predictions, strict=True) if a == b)
    occurs = Counter(labels) + Counter(predictions)  # 2 TP + FP + FN
    return mean([2 * hit[c] / occurs[c] for c in occurs])


def pass_at_k(n: int, c: int, k: int):
    """The chance that one of k programs passes, from n of which c passed: 1 - C(n-c, k) / C(n, k),
    unbiased; 1 - (1 - c/n)^k is too low (Chen et al. 2021). To pass is to pass the tests there are.
    ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n."""
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k: 0 ≤ c ≤ n and 1 ≤ k ≤ n were expected (got {n=}, {c=}, {k=})")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)  # exact, rounded once


def choice_ids(tok, query: str, choice: str):
    """→ the question's ids, and those that " " + choice adds (lm-eval's cut): white space before it
    belongs to the choice; an empty question is the begin token, else the end token."""
    head, whole = tok.encode(query.rstrip()), tok.encode(f"{query} {choice}")
    begin = tok.begin or ([] if head else [tok.eos_id if tok.bos_id is None else tok.bos_id])
    return [*begin, *head], whole[len(head) :]


@torch.no_grad()
def multiple_choice(model, tok, items, encode=choice_ids, size=16):
    """items {"query": str, or one per choice; "choices": [K str]} → for each {"logprobs": [K],
    "choice": k, "choice_norm": k}: the likeliest choice, and the likeliest per character:

        argmax_k log p(choice_k | query)          argmax_k log p(choice_k | query) / len(choice_k)

    They are acc and acc_norm of lm-eval. Few-shot: solved questions stand in the query. Its keys
    and values are computed once for its choices (packing.py), `size` questions at a time. The sum
    favours short choices, the mean long ones; neither says that the model would answer so."""
    pairs = []
    for item in items:
        query, choices = item["query"], item["choices"]
        queries = [query] * len(choices) if isinstance(query, str) else query
        pairs.append([encode(tok, *both) for both in zip(queries, choices, strict=True)])
    found = [None] * len(items)
    order = sorted(range(len(items)), key=lambda i: len(pairs[i][0][0]))
    lengths = [len(pairs[i][0][0]) + sum(len(choice) for _, choice in pairs[i]) for i in order]
    for some in (order[part] for part in in_turn(lengths, size)):
        sums = logprobs(model, *zip(*(p for i in some for p in pairs[i]), strict=True)).sum(1)
        sums = iter(finite(sums.tolist(), "log-probabilities"))
        for i in some:
            lls = [next(sums) for _ in pairs[i]]
            each = [ll / len(c) for ll, c in zip(lls, items[i]["choices"], strict=True)]
            best = [x.index(max(x)) for x in (lls, each)]
            found[i] = {"logprobs": lls, "choice": best[0], "choice_norm": best[1]}
    return found

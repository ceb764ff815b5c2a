"""What is measured, as plain functions: intervals, win rates, pair accuracy, KL.

Every figure here is a mean over prompts or pairs. Two questions belong beside each of them:

    how far is it off?      half the width of its 95 % interval (bootstrap), over what was drawn:
                            prompts, and not the tokens or pairs of one prompt, which are alike
    compared with what?     two checkpoints answer the same prompts and are compared prompt by
                            prompt: prompts differ more than checkpoints do

No network is read here. tools/evals.py makes the answers, scores and log-probabilities; reward.py
logs its pair accuracy while it trains.
"""

import math
import random


# ---------------------------------------------------------------- means and their intervals
def mean(xs):
    """Σ x / n of a list of numbers. ZeroDivisionError of an empty one: there is no such figure."""
    return sum(xs) / len(xs)


def ratio(parts):
    """[(sum, count)], one for each text → Σ sums / Σ counts: the mean over all that was counted.

    A held-out loss per token is such a mean. Long texts weigh more than in a mean of the texts' own
    means; 0 where nothing was counted.
    """
    return sum(total for total, _ in parts) / max(1, sum(count for _, count in parts))


def bootstrap(xs, statistic=mean, rounds=1000, seed=0):
    """Half the width of the 95 % interval of statistic(xs): from its 2.5th to its 97.5th percentile
    over `rounds` samples of len(xs) items, drawn from xs with replacement (Efron 1979).

    xs: one item for each thing that was drawn independently, as a rule a prompt. It tells how much
    the figure would change with other prompts, not how much with another seed of the training; of a
    handful of items it is too narrow.
    """
    draw = random.Random(seed)
    found = sorted(statistic(draw.choices(xs, k=len(xs))) for _ in range(rounds))
    return (found[int(0.975 * rounds)] - found[int(0.025 * rounds)]) / 2


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


# ---------------------------------------------------------------- comparisons
def points(ours, theirs):
    """Scores on the same prompts → for each prompt 1 where ours is higher, ½ for a tie, else 0."""
    return [(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)]


def win_rate(ours, theirs):
    """Scores on the same prompts → the share won, ties counted half, and the share won of the
    decided prompts (None where all are ties).

        (wins + ties/2) / n        wins / (wins + losses)

    Even is ½ in both. A win does not say by how much. Where most prompts are ties the two rates
    differ widely: give both.
    """
    won = points(ours, theirs)
    decided = [p for p in won if p != 0.5]
    return mean(won), mean(decided) if decided else None


def hits(scores):
    """Scores of n chosen answers and then of the n rejected ones → points for each pair: 1 where
    the chosen one scores higher, ½ for a tie. Their mean is the accuracy of RewardBench (Lambert et
    al. 2024), which counts a tie as lost.
    """
    half = len(scores) // 2
    return points(scores[:half], scores[half:])


def pair_accuracy(scores, ranks) -> float:
    """The share of pairs that the scores put in the ranks' order; equal scores count half. ½ where
    there is no pair.

    scores, ranks: tensors (B,K), K answers to each of B prompts; rank 0 is the best, -1 marks an
    absent answer, and equal ranks form no pair. All pairs weigh the same, so a prompt with more
    answers weighs more (reward.ranking_loss averages within prompts first). Where rankers disagree,
    1 is out of reach: two labellers of InstructGPT agreed on 73 % of pairs (Ouyang et al. 2022).
    """
    present = ranks >= 0
    better = ranks[:, :, None] < ranks[:, None, :]  # (B,K,K): i is ranked above j
    pairs = better & present[:, :, None] & present[:, None, :]
    margin = scores[:, :, None] - scores[:, None, :]
    won = (margin > 0).float() + 0.5 * (margin == 0).float()
    return won[pairs].mean().item() if pairs.any() else 0.5


# ---------------------------------------------------------------- distance
def kl(policy, reference):
    """KL(π ‖ π_ref) for each of the policy's own answers y, in nats, estimated by its log-ratio
    (k1 of Schulman 2020, "Approximating KL divergence").

        log π(y|x) - log π_ref(y|x) = Σ_t log π(y_t) - log π_ref(y_t)

    policy, reference: lists of tensors (N,A), the answers' log-probabilities under each, 0 past an
    answer's end. → a list of floats. Unbiased where the answers were sampled from π at temperature
    1, and noisy: a single answer's can be negative. It grows with the answers' length, and sees
    nothing of what π no longer says at all (that is KL(π_ref ‖ π)).
    """
    differences = [(p - r).sum(1).tolist() for p, r in zip(policy, reference, strict=True)]
    return finite([x for some in differences for x in some], "log-probabilities")

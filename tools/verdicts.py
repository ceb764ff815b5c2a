"""What a judge's verdicts say: win rates, raw and at equal length, the judge's biases, and whether
people agree with it; AlpacaEval's public annotations.

A pair is a dict: `points`, what a gets (1, ½ for a tie, 0, or a probability), and `length`, a's
characters minus b's; where known `won`, what a got shown first and shown second, `people`, what it
gets from them, `instruction`, and its `difficulty`.

A judge that prefers the longer answer is won over by talking on. So AlpacaEval 2 (Dubois et al.
2024, "Length-Controlled AlpacaEval") explains its preferences by what should and should not count,

    logit P(a wins) = θ + φ tanh(Δ/σ) + ψ γ        Δ: length of a - length of b, in characters
                                                   σ: Δ's standard deviation
                                                   γ: the instruction's difficulty, where known
    LC win rate = mean of sigmoid(θ + ψ γ)         the same at Δ = 0

What it misses: length that is quality (a fuller answer, a story) is taken out with the rest. What
goes with length without being it (lists, headings) stays in. And where a's answers are nearly all
longer than b's, or shorter, Δ = 0 is an extrapolation: θ and φ can hardly be told apart (a judge
that does nothing but count characters leaves nothing at Δ = 0: see how wide the interval is).
Answers of equal quality and other length (θ = 0), such as b's own made shorter and longer, tell
them apart; AlpacaEval's table leans on those (λ = 0.2), and on γ estimated from all its models.
"""

import math

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from data import records
from metrics import bootstrap, mean
from tools.answers import with_interval

STRENGTHS = np.logspace(-4, 4, 10)  # C: the weight of the data against the penalty
FOLDS = 5
ROUNDS = 200  # of the LC win rate's bootstrap, each of which is a fit
EQUAL = 0.2  # λ: what all pairs of equal quality weigh beside all others


# ---------------------------------------------------------------- a judge's figures
def both_orders(pairs) -> dict:
    """What two orders show of the judge, over the pairs whose replies could both be read.

    position_bias    P(a wins | shown first) - P(a wins | shown second): 1 always the first answer,
                     0 no bias, -1 always the second
    self_agreement   the share of pairs with the same winner in both orders
    calibrated_*     the win rate where P("A" | a first) > P("A" | b first) wins: a judge that leans
                     to one letter may still lean to it more for the better answer
    """
    won = [p["won"] for p in pairs if "won" in p and None not in p["won"]]
    if not won:
        return {}
    bias = with_interval("position_bias", [first - second for first, second in won])
    same = with_interval("self_agreement", [float(first == second) for first, second in won])
    leaning = [(p["more_often"], p.get("people")) for p in pairs if "more_often" in p]
    calibrated = with_interval("calibrated_win_rate", [x for x, _ in leaning]) if leaning else {}
    right = [float(x == y) for x, y in leaning if x != 0.5 != y and y is not None]
    if right:
        calibrated |= with_interval("calibrated_accuracy", right)
    return bias | same | calibrated


def kappa(ours: list, theirs: list) -> float | None:
    """Cohen's κ = (p_o - p_e) / (1 - p_e): agreement beyond that of two raters who draw from their
    own shares at random (Cohen 1960). None where both only ever say one thing.
    """
    observed = mean([a == b for a, b in zip(ours, theirs, strict=True)])
    chance = sum(ours.count(c) * theirs.count(c) for c in set(ours)) / len(ours) ** 2
    return (observed - chance) / (1 - chance) if chance < 1 else None


def agreement(pairs) -> dict:
    """Judge and people on the same pairs: a, b or a tie; decided: where neither says a tie."""
    both = [(p["points"], p["people"]) for p in pairs if "people" in p]
    if not both:
        return {}
    out = with_interval("accuracy", [float(x == y) for x, y in both])
    out |= {"rated_by_people": len(both), "kappa": kappa(*map(list, zip(*both, strict=True)))}
    decided = [float(x == y) for x, y in both if x != 0.5 != y]
    if decided:
        out |= with_interval("accuracy_decided", decided) | {"decided": len(decided)}
    return out


def win_rates(pairs, seed, equal=()) -> dict:
    """a's win rate, ties half, raw and length-controlled."""
    won, lengths = [p["points"] for p in pairs], [p["length"] for p in pairs]
    out = {"win_rate": mean(won), "win_rate_ci": bootstrap(won, seed=seed)}
    out |= {"ties": mean([float(x == 0.5) for x in won]), "length_difference": mean(lengths)}
    fitted = length_controlled(pairs, equal)
    if fitted:

        def again(sample):
            refitted = length_controlled(sample, equal, fitted["C"])
            return refitted["win_rate"] if refitted else fitted["win_rate"]

        out |= {"lc_win_rate": fitted["win_rate"]}
        out |= {"lc_win_rate_ci": bootstrap(pairs, again, rounds=ROUNDS, seed=seed)}
        out |= {f"lc_{name}": fitted[name] for name in ("theta", "phi", "psi", "C")}
    return out


def figures(pairs, seed=0, equal=()) -> dict:
    """All that the pairs say, each figure with half the width of its 95 % interval (_ci)."""
    replies = [x for p in pairs for x in p.get("won", p.get("scores", []))]
    out = {"n": len(pairs), "unreadable": replies.count(None)}
    scores = [p["scores"][0] for p in pairs if p.get("scores", [None])[0] is not None]
    if scores:
        out |= with_interval("score", scores)
    if "points" in pairs[0]:
        out |= win_rates(pairs, seed, equal) | both_orders(pairs) | agreement(pairs)
    return out


# ---------------------------------------------------------------- the win rate at equal length
def log_loss(z, y):
    """-y log σ(z) - (1-y) log(1 - σ(z)) of logits z and preferences y in [0, 1]."""
    return np.logaddexp(0, z) - y * z


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))


def fit(x, y, weight, strength):
    """Features x (n,k), preferences y (n,), weights of the rows (n,) → w (k,), which minimises

        |w|₁ + C Σ weight log_loss(xw, y)

    by proximal Newton: the loss becomes its quadratic around w, the minimum of that and the penalty
    is the next w, halfway where that leads up.
    """
    weight = weight * strength

    def cost(w):
        return np.abs(w).sum() + weight @ log_loss(x @ w, y)

    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = sigmoid(x @ w)
        gradient = x.T @ (weight * (p - y))  # (k,)
        hessian = (x.T * (weight * p * (1 - p))) @ x + 1e-12 * np.eye(len(w))  # (k,k)
        step = newton_step(w, gradient, hessian)
        while cost(w + step) > cost(w) and np.abs(step).max() > 1e-10:
            step /= 2
        w = w + step
        if np.abs(step).max() < 1e-9:
            break
    return w


def newton_step(w, gradient, hessian):
    """d (k,) that minimises g·d + dHd/2 + |w + d|₁, by the soft threshold in each coordinate.

    In Python's own floats: three numbers are too few for numpy.
    """
    w, g, h = w.tolist(), gradient.tolist(), hessian.tolist()
    d = [0.0] * len(w)
    for _ in range(500):
        moved = 0.0
        for j, row in enumerate(h):
            slope = g[j] + sum(a * b for a, b in zip(row, d, strict=True))
            free = w[j] + d[j] - slope / row[j]  # the minimum without the penalty
            new = math.copysign(max(abs(free) - 1 / row[j], 0.0), free) - w[j]
            moved, d[j] = max(moved, abs(new - d[j])), new
        if moved < 1e-11:
            break
    return np.array(d)


def best_strength(x, y, weight) -> float:
    """The C whose fits lose least on the fifths that they have not seen (alpaca_eval's choice)."""
    fold = np.arange(len(y)) % FOLDS
    losses = np.zeros((len(STRENGTHS), FOLDS))
    for i, strength in enumerate(STRENGTHS):
        for k in range(FOLDS):
            seen = fold != k
            w = fit(x[seen], y[seen], weight[seen], strength)
            losses[i, k] = (weight * log_loss(x @ w, y))[~seen].mean()
    return float(STRENGTHS[losses.mean(1).argmin()])


def length_controlled(pairs, equal=(), strength=None) -> dict | None:
    """The LC win rate (share), the weights θ, φ (> 0: the judge loves length) and ψ (0 where not
    all pairs have a difficulty), and C, which cross-validation chooses unless it is given.

    equal: pairs of equal quality. None where lengths differ nowhere, or pairs are fewer than folds.
    """
    delta = np.array([p["length"] for p in pairs], float)
    if len(pairs) < FOLDS or not delta.std():
        return None
    known = all("difficulty" in p for p in pairs)
    rows = [*pairs, *equal]
    lengths = np.array([p["length"] for p in rows], float) / delta.std(ddof=1)
    gamma = np.array([p.get("difficulty", 0.0) if known else 0.0 for p in rows])
    own = np.arange(len(rows)) < len(pairs)  # θ is 0 in the others
    x, y = np.stack([np.tanh(lengths), gamma, own], 1), np.array([p["points"] for p in rows])
    weight = np.where(own, 1.0, EQUAL * len(pairs) / max(1, len(equal)))
    strength = strength or best_strength(x, y, weight)
    phi, psi, theta = map(float, fit(x, y, weight, strength))
    rate = sigmoid(theta + psi * gamma[own]).mean()
    return dict(win_rate=float(rate), theta=theta, phi=phi, psi=psi, C=strength)


def add_difficulty(compared: dict[str, list], equal=()):
    """Adds γ to the pairs of several models on the same instructions, as their verdicts show it:

        logit P(model m wins on i) = θ_m + φ_m tanh(Δ_mi/σ_m) + γ_i        γ_i ~ N(0, 1)

    Of few models γ is rough: it has seen the very verdicts that it then helps to explain.
    """
    rows = [(m, p) for m, pairs in enumerate(compared.values()) for p in pairs]
    places = {text: i for i, text in enumerate(dict.fromkeys(p["instruction"] for _, p in rows))}
    sigma = [np.std([p["length"] for p in pairs]) or 1.0 for pairs in compared.values()]
    model, place = torch.tensor([(m, places[p["instruction"]]) for m, p in rows]).T
    tanh = torch.tensor([np.tanh(p["length"] / sigma[m]) for m, p in rows], dtype=torch.float64)
    won = torch.tensor([p["points"] for _, p in rows], dtype=torch.float64)
    sizes = (len(compared), len(compared), len(places))
    weights = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in sizes]
    search = torch.optim.LBFGS(weights, max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        theta, phi, gamma = weights
        z = theta[model] + phi[model] * tanh + gamma[place]
        total = binary_cross_entropy_with_logits(z, won, reduction="sum") + (gamma**2).sum() / 2
        total.backward()
        return total

    search.step(loss)
    gamma = weights[2].tolist()
    for p in [p for _, p in rows] + list(equal):
        p["difficulty"] = gamma[places[p["instruction"]]] if p["instruction"] in places else 0.0


# ---------------------------------------------------------------- AlpacaEval's annotations
def annotations(path) -> dict[str, list]:
    """AlpacaEval's annotations → {model: its pairs}, a the model's answer and b the baseline's.

    preference: from 1, the baseline's answer, to 2, the model's; 0 and 1.5 are ties, null was not
    judged and is left out. Lengths: of output_1 (the baseline's) and output_2, or length_baseline
    and length_model. `difficulty` is γ. ValueError for a record of another form.
    """
    found = {}
    for line, r in records._read(path):
        try:
            won, a, b = r["preference"], r.get("output_2"), r.get("output_1")
            lengths = [r["length_model"], r["length_baseline"]] if a is None else [len(a), len(b)]
            if not all(type(n) is int for n in lengths) or won and not 1 <= won <= 2:
                raise ValueError
            pair = dict(instruction=str(r["instruction"]), length=lengths[0] - lengths[1])
            if r.get("difficulty") is not None:
                pair["difficulty"] = float(r["difficulty"])
            if a is not None:
                asked = [{"role": "user", "content": pair["instruction"]}]
                pair |= dict(prompt=asked, a=a, b=b)
        except (LookupError, TypeError, AttributeError, ValueError):
            raise ValueError(
                f"{path}:{line}: an annotation was expected: instruction, preference (1 to 2), and"
                " output_1 and output_2, or length_baseline and length_model (got"
                f" {records._short(r)})"
            ) from None
        if won is not None:
            model = str(r.get("model") or r.get("generator_2") or "model")
            found.setdefault(model, []).append(pair | {"points": (won or 1.5) - 1})
    if not found:
        raise ValueError(f"{path}: no annotation with a preference in it")
    return found

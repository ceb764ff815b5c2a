"""How many ratings does a difference between two checkpoints need?

    python -m experiments.ratings --out out --seeds 3

Claimed: rate at least 500 answers of each major checkpoint where accuracy matters.

A rating of a pair gives a 1, ½ (a tie) or 0. Let t be the share of ties and ½ + d a's win rate. The
sign test (metrics.sign_test: ties left out, two-sided, 5 %) finds the better one in a share `power`
of all attempts with

    n = ((z_{0.975} √((1-t)/4) + z_{power} √((1-t)/4 - d²)) / d)²

ratings, by the normal approximation: √((1-t)/4) is a rating's standard deviation where there is no
difference. At the same d ties help: they are ratings that cannot err. What 500 ratings find is the
same, solved for d.

Tried: the answers of SFT, PPO and DPO beside each other, rated by the gold rater, and by one of the
world's labellers, who errs (gold plus noise; only equal answers tie). Ratings are drawn from these
with replacement and tested, --draws times: is the power what the formula says? For differences of
2, 5 and 10 points ties are as often as in PPO beside DPO, and the rest is shared out to fit.

What it cannot show: all ratings are drawn independently. Several of one prompt or of one person are
worth less, and people who love a manner agree on a difference that is not the one meant.
"""

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from common.run import main, opt
from data.world import world
from experiments import lab
from metrics import mean, points
from tools.report import TITLE, light, new_figure
from tools.runs import cell

MODELS = ("sft", "ppo", "dpo")
PAIRS = (("ppo", "sft"), ("dpo", "sft"), ("ppo", "dpo"))
POWER, LEVEL, USUAL = 0.8, 0.05, 500
PLANTED = {0.02: "bad", 0.05: "ppo", 0.10: "good"}  # differences and their colours


@dataclass
class Options(lab.Options):
    draws: int = opt(4000, "samples of ratings for each simulated power", at_least=100)


# ---------------------------------------------------------------- the closed form
def z(p: float) -> float:
    return NormalDist().inv_cdf(p)


def needed(d: float, ties=0.0) -> float:
    """Ratings until a win rate of ½ + d, 0 ≤ d ≤ (1 - ties)/2, is found with POWER."""
    if d == 0:
        return math.inf
    even = (1 - ties) / 4
    return ((z(1 - LEVEL / 2) * even**0.5 + z(POWER) * max(0.0, even - d * d) ** 0.5) / d) ** 2


def visible(n: int, ties=0.0) -> float:
    """The d that n ratings find, needed(d) = n, by bisection."""
    low, high = 1e-6, (1 - ties) / 2
    for _ in range(60):
        d = (low + high) / 2
        low, high = (d, high) if needed(d, ties) > n else (low, d)
    return high


def power(d: float, n: int, ties=0.0) -> float:
    """needed(), solved for the power."""
    even = (1 - ties) / 4
    return NormalDist().cdf((d * n**0.5 - z(1 - LEVEL / 2) * even**0.5) / (even - d * d) ** 0.5)


# ---------------------------------------------------------------- the same, simulated
@cache
def critical(n: int) -> int:
    """The fewest wins of n decided ratings for which sign_test is at most LEVEL; n + 1: none."""
    log_chance = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)
    ]
    tails = np.cumsum(np.exp(np.array(log_chance) - n * math.log(2)))  # P(at most k)
    return n + 1 - int((2 * tails <= LEVEL).sum())


def found(shares: tuple, n: int, draws: int) -> float:
    """How often the sign test finds the better one in n ratings. shares: of wins, losses, ties."""
    drawn = np.random.default_rng(0).multinomial(n, shares, size=draws)
    return mean([float(wins >= critical(int(wins + losses))) for wins, losses, _ in drawn])


def shares_of(d: float, ties: float) -> tuple:
    """Wins, losses and ties with a win rate of ½ + d."""
    return (1 - ties) / 2 + d, (1 - ties) / 2 - d, ties


# ---------------------------------------------------------------- real answers
def rated(o, seed: int) -> dict:
    """{(rater, better, other): the better one's points on each prompt}."""
    held, mine, chain = lab.held_out(o, seed), lab.place(o, "answers", seed), lab.chain(o, seed)
    person, scores = world.Labeller(f"ratings {seed}"), {}
    for model in MODELS:
        lines = lab.measure(o, chain / model, seed, mine)["lines"]
        scores["gold", model] = [round(line["gold"], 9) for line in lines]
        opinions = [
            person.opinion(r["item"], line["answer"], line["finished"])
            for r, line in zip(held, lines, strict=True)
        ]
        scores["labeller", model] = opinions
    return {
        (rater, a, b): points(scores[rater, a], scores[rater, b])
        for a, b in PAIRS
        for rater in ("gold", "labeller")
    }


def row(o, name: str, d: float, ties: float, rate: str) -> list[str]:
    """A row of the table; rate: how the win rate is shown."""
    n, shares = needed(abs(d), ties), shares_of(abs(d), ties)
    simulated = f"{100 * found(shares, math.ceil(n), o.draws):.1f}" if n < 20_000 else "–"
    usual = f"{100 * found(shares, USUAL, o.draws):.1f}"
    return [name, rate, f"{100 * ties:.1f}", f"{n:,.0f}", simulated, usual]


def draw(o, ties: float):
    """Power by the number of ratings, for each planted difference: closed form and simulated."""
    figure, (ax,) = new_figure(6.4, 3.4)
    ns = np.unique(np.geomspace(30, 10_000, 81).astype(int))
    for d, colour in PLANTED.items():
        name = f"{100 * d:g} points: {needed(d):,.0f}"
        ax.plot(ns, [100 * power(d, n) for n in ns], color=light(colour), label=name)
        ax.plot(ns, [100 * power(d, n, ties) for n in ns], ":", color=light(colour))
        some = [100 * found(shares_of(d, 0.0), int(n), o.draws) for n in ns[::10]]
        ax.plot(ns[::10], some, "o", color=light(colour), markersize=4)
    ax.plot([], [], ":", color=light("soft"), label=f"with {100 * ties:.0f} % ties")
    ax.plot([], [], "o", color=light("soft"), markersize=4, label="simulated, no ties")
    ax.axvline(USUAL, color=light("soft"), linewidth=1)
    ax.text(USUAL, 101, f"{USUAL}", ha="center", color=light("soft"), fontsize=9)
    ax.axhline(100 * POWER, color=light("soft"), linewidth=1)
    ax.legend(frameon=False, fontsize=9, loc="center right")
    ax.set(xscale="log", ylim=(0, 100), xlim=(25, 60_000), xlabel="ratings")
    ax.set_ylabel("the better one is found, %")
    return figure


def count(o: Options):
    lab.begin(o, "ratings")
    seeds = [rated(o, seed) for seed in range(o.seeds)]
    rates, ties = {}, {}
    for key in seeds[0]:
        rates[key] = lab.pooled([seed[key] for seed in seeds])
        ties[key] = mean([float(p == 0.5) for seed in seeds for p in seed[key]])
    usual = ties["gold", "ppo", "dpo"]
    rows = []
    for t in (0.0, usual):
        for d in (*PLANTED, visible(USUAL, t)):
            name = f"{100 * d:.3g} points" + (
                f", {USUAL} ratings' least" if d not in PLANTED else ""
            )
            rows.append(row(o, name, d, t, f"{100 * (0.5 + d):.1f}"))
    for (rater, a, b), f in rates.items():
        name = f"{TITLE[a]} beside {TITLE[b]}, {rater}"
        rows.append(row(o, name, f["mean"] - 0.5, ties[rater, a, b], cell(f, 100, 1)))
    head = ["difference", "win rate %", "ties %", "ratings needed", "found with those %"]
    head += [f"found with {USUAL} %"]
    names = {" ".join(key): {"win_rate": f, "ties": ties[key]} for key, f in rates.items()}
    note = f"seeds: {o.seeds}, {o.n} held-out prompts each; {o.draws} samples; power {POWER:.0%}."
    lab.publish(o, "ratings", {"pairs": names, "rows": rows}, head, rows, note, draw(o, usual))


if __name__ == "__main__":
    main(count, Options, __doc__)

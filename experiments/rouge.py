"""Do ROUGE, exact match and token F1 see what a rater sees?

    python -m experiments.rouge --out out --seeds 3

Claimed: such metrics are quick but miss what matters, so that a model with 2 more points of ROUGE-L
may give answers that people prefer less.

Tried: SFT, PPO and DPO answer the same held-out prompts. Each answer gets the gold rater's score
and the metrics (metrics.py), once beside the world's perfect demonstration and once beside the bare
right answer, which is the same without its courtesy. Of the pairs of answers to one prompt let C be
those that metric and gold order alike, D differently, M (G) those that only the metric (only gold)
finds equal:

    Kendall's τ_b = (C - D) / sqrt((C + D + M) (C + D + G))           Kendall 1945
    ordered differently = D / (C + D)           not told apart = M / (C + D + M)
    Spearman's ρ: the correlation of the ranks of all answers, equal ones sharing their mean rank

and for each kind of instruction and two models: does the one with 2 points more ROUGE-L win less
than half of the prompts? Intervals are over prompts.

What it cannot show: the gold rater is a rubric and not a person, the answers are a few words long,
and one reference stands beside each. ROUGE was made for summaries of many sentences with several
references, and to rank systems, not answers.
"""

from itertools import combinations

import numpy as np

from common.run import main
from data.world import world
from experiments import lab
from metrics import exact_match, mean, points, rouge, token_f1
from tools.answers import order_counts
from tools.report import TITLE, light, new_figure
from tools.runs import cell

MODELS = ("sft", "ppo", "dpo")
METRICS = {
    "ROUGE-1": lambda a, b: rouge(a, b)["rouge1"]["fmeasure"],
    "ROUGE-2": lambda a, b: rouge(a, b)["rouge2"]["fmeasure"],
    "ROUGE-L": lambda a, b: rouge(a, b)["rougeL"]["fmeasure"],
    "exact match": exact_match,
    "token F1": token_f1,
}
REFERENCES = {"perfect answer": world.perfect, "bare answer": world.plain}
CHOSEN = "ROUGE-L, perfect answer"  # the metric looked at more closely
MORE = 0.02  # of it


# ---------------------------------------------------------------- two scores of the same answers
def tau(counts) -> float:
    """Kendall's τ_b; 0 where one of the scores never differs. counts: one order_counts a prompt."""
    c, d, m, g = map(sum, zip(*counts, strict=True))
    return (c - d) / (((c + d + m) * (c + d + g)) ** 0.5 or 1.0)


def differently(counts) -> float:
    c, d, _, _ = map(sum, zip(*counts, strict=True))
    return d / max(1, c + d)


def untold(counts) -> float:
    c, d, m, _ = map(sum, zip(*counts, strict=True))
    return m / max(1, c + d + m)


def ranks(xs) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, place, n = np.unique(xs, return_inverse=True, return_counts=True)
    return (np.cumsum(n) - (n + 1) / 2)[place]


def spearman(pairs) -> float:
    """[(xs, ys)], two scores of each prompt's answers → ρ over all answers."""
    x, y = (ranks(np.concatenate([pair[i] for pair in pairs])) for i in (0, 1))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (np.sqrt((x @ x) * (y @ y)) or 1.0))


FIGURES = {"spearman": 2, "tau": 2, "differently": 1, "untold": 1}  # and their digits


def beside_gold(seeds: list[list[dict]], metric: str) -> dict:
    """A metric beside gold, over all seeds' prompts."""
    pairs = [[(e[metric], e["gold"]) for e in entries] for entries in seeds]
    counts = [[order_counts(*pair) for pair in some] for some in pairs]
    found = {"spearman": lab.pooled(pairs, spearman)}
    return found | {f.__name__: lab.pooled(counts, f) for f in (tau, differently, untold)}


# ---------------------------------------------------------------- the answers
def scored(o, seed: int) -> list[dict]:
    """For each held-out prompt {"kind", "gold" and each metric: an array, a score per model}."""
    held, mine, chain = lab.held_out(o, seed), lab.place(o, "answers", seed), lab.chain(o, seed)
    answers = [lab.measure(o, chain / model, seed, mine)["lines"] for model in MODELS]
    entries = []
    for r, *lines in zip(held, *answers, strict=True):
        gold = np.array([line["gold"] for line in lines]).round(9)  # 0.1 + 0.2 ties with 0.3
        entries.append({"kind": r["item"]["kind"], "gold": gold})
        for which, reference in REFERENCES.items():
            told = reference(r["item"])
            for name, metric in METRICS.items():
                scores = [metric(line["answer"], told) for line in lines]
                entries[-1][f"{name}, {which}"] = np.array(scores)
    return entries


def traps(entries: list[dict]) -> list[dict]:
    """Two models on one kind of instruction, one with MORE of the metric: what it wins."""
    found = []
    for kind in sorted({e["kind"] for e in entries}):
        some = [e for e in entries if e["kind"] == kind]
        for i, j in combinations(range(len(MODELS)), 2):
            gain = mean([float(e[CHOSEN][i] - e[CHOSEN][j]) for e in some])
            more, less = (i, j) if gain > 0 else (j, i)
            won = points([e["gold"][more] for e in some], [e["gold"][less] for e in some])
            if abs(gain) >= MORE:
                who = {"kind": kind, "more": MODELS[more], "less": MODELS[less], "gain": abs(gain)}
                found.append(who | {"won": lab.pooled([list(map(float, won))])})
    return found


# ---------------------------------------------------------------- table and picture
def draw(entries: list[dict], kinds: dict):
    """Gold by ROUGE-L of each answer, and each kind's share of pairs ordered differently."""
    figure, (left, right) = new_figure(9.5, 4.2, 2)
    rng = np.random.default_rng(0)
    for i, model in enumerate(MODELS):
        xs, ys = (np.array([e[key][i] for e in entries[:400]]) for key in (CHOSEN, "gold"))
        xs, ys = (z + rng.normal(0, 0.012, len(z)) for z in (xs, ys))  # so that equal ones show
        left.scatter(xs, ys, s=4, alpha=0.35, color=light(model), linewidths=0, label=TITLE[model])
    left.legend(frameon=False, fontsize=9, markerscale=3, loc="lower right")
    left.set(xlabel=CHOSEN, ylabel="gold", title="single answers")
    names = sorted(kinds, key=lambda kind: kinds[kind]["differently"]["mean"])
    shares, errors = ([100 * kinds[k]["differently"][p] for k in names] for p in ("mean", "ci"))
    right.barh(names, shares, xerr=errors, color=light("sft"), ecolor=light("ink"), capsize=2)
    right.axvline(50, color=light("bad"), linestyle=":")
    right.text(49, -0.4, "guessing", color=light("bad"), fontsize=9, ha="right")
    right.set(xlabel="pairs ordered differently by gold, %", title="answers to the same prompt")
    right.grid(axis="y", visible=False)
    return figure


def compare_metrics(o: lab.Options):
    lab.begin(o, "rouge")
    seeds = [scored(o, seed) for seed in range(o.seeds)]
    entries = [e for some in seeds for e in some]
    found = {key: beside_gold(seeds, key) for key in entries[0] if ", " in key}
    kinds = {}
    for kind in sorted({e["kind"] for e in entries}):
        kinds[kind] = beside_gold([[e for e in s if e["kind"] == kind] for s in seeds], CHOSEN)
    means = {}
    for i, model in enumerate(MODELS):
        for key in (CHOSEN, "gold"):
            each = [[float(e[key][i]) for e in some] for some in seeds]
            means[f"{TITLE[model]} {key.split(',')[0]}"] = lab.pooled(each)
    caught = traps(entries)
    lost = [t["won"]["mean"] + t["won"]["ci"] for t in caught if t["won"]["mean"] < 0.5]
    rows = []
    for name, f in (found | {f"ROUGE-L, {kind} alone": f for kind, f in kinds.items()}).items():
        scale = {key: 1.0 if digits == 2 else 100.0 for key, digits in FIGURES.items()}
        rows.append([name, *(cell(f[key], scale[key], FIGURES[key]) for key in FIGURES)])
    head = ["", "Spearman ρ", "Kendall τ_b, same prompt", "ordered differently %"]
    note = (
        f"seeds: {o.seeds}, {o.n} held-out prompts each. Means: "
        + "; ".join(f"{name} {cell(f, digits=2)}" for name, f in means.items())
        + f". Two models on one kind of instruction, one with {100 * MORE:g} points more ROUGE-L:"
        f" {len(caught)} times; it wins less than half {len(lost)} times, beyond the interval"
        f" {sum(most < 0.5 for most in lost)} times."
    )
    figures = {"metrics": found, "kinds": kinds, "means": means, "traps": caught}
    picture = draw(entries, kinds)
    lab.publish(o, "rouge", figures, [*head, "not told apart %"], rows, note, picture)


if __name__ == "__main__":
    main(compare_metrics, lab.Options, __doc__)

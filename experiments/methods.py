"""PPO, DPO, IPO and SimPO at equal KL: who gains most, what it costs, and does PPO win where an
answer must be worked out?

    python -m experiments.methods --out out

The deep dive's claims: DPO often matches PPO, SimPO often matches DPO with less memory, and on
harder reasoning PPO may keep an advantage. Each method's coefficient decides how far it goes from
SFT, and who goes further gains more, up to a point: methods at their usual settings cannot be
compared. So each is trained with three coefficients (SWEEP; the chain's own runs are one of them),
and its gold, prompt by prompt, is interpolated along d = √KL between the two nearest of them, or
between SFT, which is at 0, and the nearest:

    gold(d) = (1 - w) gold_a + w gold_b,        w = (d - d_a) / (d_b - d_a)

The same on REASONING, other held-out prompts of the two kinds whose answers are worked out:
arithmetic and sorting. One seed for the sweep; the chain's settings beside it on all seeds, where
each has its own KL. Time is the processors', of one run; PPO's is without the reward model, whose
own stands in the small_reward table. What this cannot show: reasoning in several steps, which no
answer here has.
"""

import math
from bisect import bisect_left
from pathlib import Path

from common.run import main
from data.world import world
from experiments import kl, lab
from metrics import mean
from tools.lighter import cost
from tools.report import light, new_figure
from tools.runs import cell, figure, run

SWEEP = {  # method: its coefficients, from near to far
    "PPO": (0.5, 0.2, 0.05),
    "DPO": (0.5, 0.1, 0.03),
    "IPO": (0.5, 0.1, 0.03),
    "SimPO": (2.5, 1.5, 1.0),
}
CHAINS = {("PPO", 0.2): "ppo", ("DPO", 0.1): "dpo", ("SimPO", 2.5): "simpo"}
COLOURS = {"PPO": "ppo", "DPO": "dpo", "IPO": "own1", "SimPO": "simpo"}
REASONING = ("arithmetic", "sorting")
AT = (1.0, 2.0, 4.0)  # nats of KL at which they are compared


def tuned(o, method: str, coef: float) -> tuple[Path, dict]:
    """A run → its folder and its cost, {} for the chain's own."""
    chain, here = lab.chain(o, 0), lab.place(o, "methods", 0)
    if (method, coef) in CHAINS:
        return chain / CHAINS[method, coef], {}
    if method == "PPO":
        return kl.tuned(o, coef)
    folder = here / f"{method.lower()}-{coef:g}"
    of = chain / ("simpo" if method == "SimPO" else "dpo")
    loss = {"DPO": "dpo", "IPO": "ipo", "SimPO": "simpo"}[method]
    return folder, run("dpo.py", folder, of=of, loss=loss, beta=coef)


def reasoning(n: int, seed: int) -> list[dict]:
    """n held-out prompts of the kinds that are worked out, as records."""
    made = world.items(n * 11 // len(REASONING), f"reasoning {seed}", "heldout")
    found = [item for item in made if item["kind"] in REASONING][:n]
    return [{"messages": [{"role": "user", "content": i["prompt"]}], "item": i} for i in found]


def measured(o, folder: Path, seed: int) -> dict:
    """Its answers to the held-out prompts, and to those of REASONING."""
    sft = lab.chain(o, seed) / "sft"
    return {
        "all": lab.measure(o, folder, seed, lab.place(o, "methods", seed), sft),
        "reasoning": lab.measure(
            o,
            folder,
            seed,
            lab.place(o, "methods/reasoning", seed),
            sft,
            held=reasoning(o.n, seed),
        ),
    }


def interpolated(curve: list, d: float) -> list | None:
    """curve: [(d, values)], d rising from 0; the values at d, None beyond its end."""
    ds = [x for x, _ in curve]
    if d > ds[-1]:
        return None
    i = max(1, bisect_left(ds, d))
    (a, low), (b, high) = curve[i - 1], curve[i]
    w = (d - a) / (b - a)
    return [(1 - w) * x + w * y for x, y in zip(low, high, strict=True)]


def curve(points: list, sft: dict, key: str) -> list:
    """A method's [(√KL, what each prompt's answer gained over SFT's)], from SFT on, KL rising."""

    def values(found):
        return [float(line[key]) for line in found["lines"]]

    start = values(sft)
    gains = [[x - y for x, y in zip(values(p), start, strict=True)] for p in points]
    ds = [math.sqrt(max(mean(p["kl"]), 1e-9)) for p in points]
    return [(0.0, [0.0] * len(start)), *sorted(zip(ds, gains, strict=True))]


def at_equal_kl(curves: dict) -> dict:
    """{method: {nats: figure of what is gained, None beyond its reach}}"""
    found = {}
    for method, points in curves.items():
        gains = {nats: interpolated(points, math.sqrt(nats)) for nats in AT}
        found[method] = {n: g and figure([[(x, 1) for x in g]]) for n, g in gains.items()}
    return found


def over_seeds(o) -> dict:
    """The chain's settings on every seed: what is gained over SFT, in gold and right answers."""
    rows = {}
    for (method, _), stage in CHAINS.items():
        each = []
        for seed in range(o.seeds):
            sft, ours = (measured(o, lab.chain(o, seed) / s, seed) for s in ("sft", stage))
            gold, right = curve([ours["all"]], sft["all"], "gold"), None
            right = curve([ours["reasoning"]], sft["reasoning"], "right")
            each.append((gold[1][1], right[1][1], ours["all"]["kl"], ours["reasoning"]["kl"]))
        names = ("gold", "right", "kl", "kl_reasoning")
        columns = zip(*each, strict=True)
        rows[method] = {
            name: figure([[(x, 1) for x in seed] for seed in column])
            for name, column in zip(names, columns, strict=True)
        }
    return rows


def picture(curves: dict, labels: dict):
    """Gold and right answers gained over √KL, a line for each method, a mark for each run."""
    drawn, axes = new_figure(10.0, 4.2, 2)
    titles = ("all kinds: gold gained over SFT", "arithmetic and sorting: right, points gained")
    for ax, which, title, scale in zip(axes, curves, titles, (1, 100), strict=True):
        for method, points in curves[which].items():
            d, gains = [d for d, _ in points], [scale * mean(g) for _, g in points]
            colour = light(COLOURS[method])
            ax.plot(d, gains, "o-", color=colour, markersize=4, linewidth=1.6)
            ax.annotate(
                method,
                (d[-1], gains[-1]),
                (5, 0),
                textcoords="offset points",
                color=colour,
                fontweight="bold",
            )
            for x, y, text in zip(d[1:], gains[1:], labels[which][method], strict=True):
                ax.annotate(
                    text,
                    (x, y),
                    (2, -10),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=light("soft"),
                )
        ax.set_title(title, fontsize=11, color=light("ink"))
        ax.set_xlabel("√KL from SFT, KL in nats an answer", fontsize=9, color=light("soft"))
        ax.margins(x=0.12)
    return drawn


def methods(o: lab.Options):
    lab.begin(o, "methods", "methods_seeds")
    runs = {m: {coef: tuned(o, m, coef) for coef in coefs} for m, coefs in SWEEP.items()}
    costs = {m: [spent for _, spent in of.values() if spent] for m, of in runs.items()}
    sft = measured(o, lab.chain(o, 0) / "sft", 0)
    curves, labels = {"all": {}, "reasoning": {}}, {"all": {}, "reasoning": {}}
    for method, of in runs.items():
        points = {coef: measured(o, folder, 0) for coef, (folder, _) in of.items()}
        for which, key in (("all", "gold"), ("reasoning", "right")):
            some = {coef: p[which] for coef, p in points.items()}
            order = sorted(some, key=lambda coef: mean(some[coef]["kl"]))
            labels[which][method] = [f"{coef:g}" for coef in order]
            curves[which][method] = curve(list(some.values()), sft[which], key)
    equal = {which: at_equal_kl(found) for which, found in curves.items()}
    head = ["", *(f"gold gained at {n:g}" for n in AT), *(f"right at {n:g}" for n in AT)]
    rows = []
    for m in SWEEP:
        gold = [cell(f, digits=2) if f else "–" for f in equal["all"][m].values()]
        right = [cell(f, 100, 1) if f else "–" for f in equal["reasoning"][m].values()]
        spent = [cost(costs[m], key, "{:.1f}") for key in ("core_minutes", "gb")]
        rows.append([m, *gold, *right, *spent])
    note = (
        f"Gained over SFT at KLs of {', '.join(f'{n:g}' for n in AT)} nats: gold on all kinds, and"
        f" right answers in % on arithmetic and sorting. One seed, {o.n} held-out prompts each."
    )
    shown = picture(curves, labels)
    result = {
        "equal": equal,
        "curves": {
            w: {m: [(d, mean(g)) for d, g in c] for m, c in of.items()} for w, of in curves.items()
        },
        "labels": labels,
        "costs": costs,
    }
    lab.publish(o, "methods", result, [*head, "core-minutes", "GB"], rows, note, shown)
    publish_seeds(o)


def publish_seeds(o):
    """The second table: the chain's settings, all seeds."""
    found = over_seeds(o)
    head = [
        "the chain's settings",
        "gold gained",
        "KL",
        "right gained %, arithmetic and sorting",
        "KL",
    ]
    rows = [
        [
            m,
            cell(f["gold"], digits=2),
            cell(f["kl"], digits=2),
            cell(f["right"], 100, 1),
            cell(f["kl_reasoning"], digits=2),
        ]
        for m, f in found.items()
    ]
    note = f"seeds: {o.seeds}, {o.n} held-out prompts and as many of the two kinds each."
    lab.publish(o, "methods_seeds", found, head, rows, note)


if __name__ == "__main__":
    main(methods, lab.Options, __doc__)

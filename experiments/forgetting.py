"""Catastrophic forgetting, and what helps against it: one new task, learnt in many ways.

    python -m experiments.forgetting --out out

The SFT model is taught commands (experiments/commands.py) in every way of WAYS. Ways of one kind
differ in strength: a lower rate, a smaller rank, more replay, a larger λ keep more and learn less.
All are run on seed 0. Of each kind the one that kept most of the old task, among those that reach
95 % of what nothing else learnt, is run on the other seeds too.

    lost = before - after, item by item

Three tables: the ways; the learning rate alone, from far too low to far too high; and which of the
figures that can be watched without the old task's own items predicts what of that is lost:
Spearman's ρ over seed 0's ways, with an interval over ways.

What it cannot show: another pair of tasks, or a model so large that both fit side by side.
"""

from dataclasses import dataclass
from pathlib import Path

from common.run import main, opt
from experiments import commands, lab
from experiments.commands import KEYS, value
from experiments.rouge import spearman
from metrics import bootstrap, mean, ratio
from tools.report import light, new_figure
from tools.runs import call, cell

RATE, LORA_RATE = 5e-4, 2.5e-3  # sft.py's own for every weight, and for LoRA
OLD, TEXT, BENCHMARK = "sft.jsonl", "replay.jsonl", "watch.jsonl"  # of a chain's world
RATES = {f"rate × {x:g}": {"lr": RATE * x} for x in (0.01, 0.1, 0.3, 0.5, 3, 10)}
RECIPE = {"lora": 16, "lr": LORA_RATE / 3, "watch": BENCHMARK, "watch_every": 25}
# kind → way → what is changed; a Fisher by the name of its kind, files by their names in the world
KINDS = {
    "nothing else": {"plain": {}},
    "rate": RATES,
    "schedule": {"constant rate": {"schedule": "constant", "warmup": 0}},
    "LoRA": {f"LoRA {r}": {"lora": r} for r in (4, 16, 64)},
    "LoRA, low rate": {
        f"LoRA {r}, rate / {x}": {"lora": r, "lr": LORA_RATE / x}
        for r, x in ((16, 3), (64, 3), (64, 10))
    },
    "replay": {f"replay {p} %": {"replay": OLD, "replay_ratio": p / 100} for p in (1, 5, 10, 25)},
    "text": {f"text {p} %": {"replay": TEXT, "replay_ratio": p / 100} for p in (10, 25)},
    "EWC": {f"EWC, λ {x:g}": {"ewc": "true", "ewc_lambda": x} for x in (1, 10, 100, 1000)},
    "empirical": {
        f"empirical, λ {x:g}": {"ewc": "empirical", "ewc_lambda": x} for x in (1, 10, 100, 1000)
    },
    "wrong Fisher": {
        f"wrong, λ {x:g}": {"ewc": "mean-squared", "ewc_lambda": x} for x in (1e2, 1e3, 1e4, 1e5)
    },
    "decay to θ*": {
        f"decay, λ {x:g}": {"ewc": "identity", "ewc_lambda": x} for x in (1e-3, 1e-2, 1e-1, 1)
    },
    "the recipe": {"LoRA 16, rate / 3, watched": RECIPE | {"watch_stop": True}},
}
WAYS = {way: changes for ways in KINDS.values() for way, changes in ways.items()}
SHOWN = dict(
    zip(KINDS, "ink sft soft own1 own5 ppo reward dpo simpo bad own2 own0".split(), strict=True)
)


@dataclass
class Options(lab.Options):
    n: int = opt(300, "how many held-out prompts of the old task", at_least=2)


def train(o, seed: int, way: str, home: Path) -> tuple[Path, dict]:
    """One way's run → its folder and its cost."""
    chain, options = lab.chain(o, seed), dict(WAYS[way])
    if kind := options.get("ewc"):
        options["ewc"] = home / f"fisher-{kind}"
        if not (options["ewc"] / "run.json").exists():
            of = {"model": chain / "sft", "data": chain / "world" / OLD, "fisher": kind}
            call("forget.py", **of, out=options["ewc"], examples=500, seed=seed, device=o.device)
    for name in ("replay", "watch"):
        if name in options:
            options[name] = chain / "world" / options[name]
    folder = home / "".join(c for c in way if c.isalnum() or c == ".")
    return folder, commands.learn(o, chain / "sft", folder, seed, **options)


def of_seed(o, seed: int, ways) -> dict:
    """{way: (measures, cost)} of one seed, "before" first."""
    home = lab.place(o, "forgetting", seed)
    sft = lab.chain(o, seed) / "sft"
    found = {"before": (commands.measure(o, sft, seed, home), {})}
    for way in ways:
        folder, cost = train(o, seed, way, home)
        found[way] = commands.measure(o, folder, seed, home), cost
        print(way, {key: round(value(found[way][0], key), 3) for key in KEYS}, flush=True)
    return found


def best_of_each(found: dict) -> dict:
    """{kind: its best way}: what kept most of the old task, among those that learnt 95 % of what
    nothing else did; where none did, what learnt most.
    """

    def score(way, key):
        return value(found[way][0], key)

    enough, best = 0.95 * score("plain", "new"), {}
    for kind, ways in KINDS.items():
        good = [way for way in ways if score(way, "new") >= enough]
        key = "old" if good else "new"
        best[kind] = max(good or ways, key=lambda way, key=key: score(way, key))
    return best


def figures(runs: list, way: str) -> dict:
    """A way's figures over the seeds that ran it: each key's, and what is lost of it."""
    runs = [found for found in runs if way in found]
    entry = {"seeds": len(runs), "costs": [found[way][1] for found in runs if found[way][1]]}
    for key in KEYS:
        before, after = ([f[which][0][key] for f in runs] for which in ("before", way))
        entry[key] = lab.pooled(after, ratio if key == "text" else mean)
        if key != "text":
            entry[f"{key}_lost"] = lab.apart(before, after)
    return entry


def beside(runs: list, best: dict) -> dict:
    """{other kind: old score of the best EWC minus the other's best, item by item}"""
    runs = [found for found in runs if all(way in found for way in best.values())]

    def old(kind):
        return [found[best[kind]][0]["old"] for found in runs]

    kinds = ("nothing else", "empirical", "wrong Fisher", "decay to θ*", "replay")
    return {kind: lab.apart(old("EWC"), old(kind)) for kind in kinds}


# ---------------------------------------------------------------- what predicts what is lost
def falls(found: dict) -> dict:
    """{what can be watched: its fall in each way of one seed}, and the old task's own."""
    before = found["before"][0]
    ways = [measures for way, (measures, _) in found.items() if way != "before"]
    fallen = {key: [value(before, key) - value(measures, key) for measures in ways] for key in KEYS}
    fallen["new"] = [-x for x in fallen["new"]]  # what is learnt, not what is lost
    return fallen


def predictions(found: dict) -> dict:
    """{what is watched: ρ of its fall with the old task's over the ways}"""
    fallen = falls(found)

    def rho(pairs):
        return spearman([tuple(zip(*pairs, strict=True))])

    shown = {}
    for key in ("watched", "text", "new"):
        pairs = [*zip(fallen[key], fallen["old"], strict=True)]
        shown[key] = {"mean": rho(pairs), "ci": bootstrap(pairs, rho), "items": len(pairs)}
        shown[key]["seeds"] = [shown[key]["mean"]]
    return shown


# ---------------------------------------------------------------- tables and pictures
def draw(ways: dict, best: dict):
    """Old against new, a line through the ways of a kind; and the rates."""
    picture, (left, right) = new_figure(11, 4.8, 2)
    shown = sorted(KINDS, key=lambda kind: -ways[best[kind]]["old"]["mean"])
    free = 110.0  # where the next label may stand
    for kind in shown:
        points = sorted((ways[way]["new"]["mean"], ways[way]["old"]["mean"]) for way in KINDS[kind])
        xs, ys = ([100 * p[i] for p in points] for i in (0, 1))
        colour = light(SHOWN[kind])
        left.plot(xs, ys, "o-", color=colour, markersize=3, linewidth=1, alpha=0.5)
        x, y = (100 * ways[best[kind]][key]["mean"] for key in ("new", "old"))
        left.plot(x, y, "o", color=colour, markersize=6)
        if learnt := x > 90:
            free = min(y, free - 5)
        at = (104, free) if learnt else (x + 3, y + 2)
        left.annotate(kind, at, color=colour, fontsize=8, va="center", annotation_clip=False)
    left.axhline(100 * ways["before"]["old"]["mean"], color=light("line"), linestyle="--")
    left.set_xlabel("new task, % to the letter", fontsize=9, color=light("soft"))
    left.set_title("old task, % right: the best of each kind", fontsize=11, color=light("ink"))
    left.set_xlim(-4, 140)
    left.set_xticks(range(0, 101, 20))
    order = sorted([*RATES, "plain"], key=lambda way: WAYS[way].get("lr", RATE))
    xs = [WAYS[way].get("lr", RATE) for way in order]
    for key, name, colour in (
        ("old", "old", "sft"),
        ("new", "new", "ppo"),
        ("watched", "watched", "soft"),
    ):
        ys = [100 * ways[way][key]["mean"] for way in order]
        right.plot(xs, ys, "o-", color=light(colour), markersize=4)
        right.annotate(
            name, (xs[0], ys[0]), (0, 6), textcoords="offset points", color=light(colour)
        )
    right.set_xscale("log")
    right.set_xlabel("peak learning rate", fontsize=9, color=light("soft"))
    right.set_title("%, by learning rate", fontsize=11, color=light("ink"))
    return picture


def row(way: str, entry: dict, bold: bool) -> list[str]:
    shown = [f"**{way}**" if bold else way, str(entry["seeds"])]
    shown += [cell(entry[key], 100, 1) for key in ("old", "old_lost", "new", "watched_lost")]
    costs = entry["costs"]
    for key in ("core_minutes", "gb"):
        known = [cost[key] for cost in costs if cost[key] is not None]
        shown.append(f"{mean(known):.2f}" if known else "–")
    return shown


def forgetting(o: Options):
    lab.begin(o, "forgetting", "rates", "predicts")
    first = of_seed(o, 0, WAYS)
    best = best_of_each(first)
    runs = [first, *(of_seed(o, seed, best.values()) for seed in range(1, o.seeds))]
    ways = {way: figures(runs, way) for way in first}
    head = ["", "seeds", "old %", "old lost", "new %", "watched lost", "core-minutes", "GB"]
    rows = [
        row(way, entry, way in best.values())
        for way, entry in ways.items()
        if way not in RATES or way in best.values()
    ]
    compared = beside(runs, best)
    said = ", ".join(f"{kind} {cell(f, 100, 1, '+')}" for kind, f in compared.items())
    note = (
        f"{commands.STEPS} steps of {commands.BATCH} commands; {o.n} old prompts,"
        f" {commands.ASKED} commands, greedy; 200 items watched. Bold: the best of its kind, on"
        f" {o.seeds} seeds. The old score of the best EWC ({best['EWC']}) minus that of the best of"
        f" another kind, in points: {said}."
    )
    result = {"ways": ways, "best": best, "ewc_minus": compared}
    lab.publish(o, "forgetting", result, head, rows, note, draw(ways, best))
    order = sorted([*RATES, "plain"], key=lambda way: WAYS[way].get("lr", RATE))
    rows = [
        [f"{WAYS[way].get('lr', RATE):.1e}", *row(way, figures([first], way), False)[2:6]]
        for way in order
    ]
    note = f"One seed, the same {o.n} prompts and {commands.ASKED} commands."
    lab.publish(o, "rates", {}, ["peak learning rate", *head[2:6]], rows, note)
    shown = predictions(first)
    names = {
        "watched": "accuracy on the watched benchmark",
        "text": "likelihood of the world's documents",
        "new": "what is learnt of the new task",
    }
    rows = [[names[key], cell(f, 1, 2)] for key, f in shown.items()]
    note = f"Over the {len(first) - 1} ways of seed 0."
    head = ["fall of", "Spearman ρ with the fall of the old task"]
    lab.publish(o, "predicts", shown, head, rows, note)


if __name__ == "__main__":
    main(forgetting, Options, __doc__)

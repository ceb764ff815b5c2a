"""Catastrophic forgetting, and what helps against it: one new task, learnt in many ways.

    python -m experiments.forgetting --out out

The SFT model is taught short commands, answered in JSON, which it scores 0 on and which share
neither words nor manner with what it knows:

    lamp kitchen 40   →   {"set": "lamp", "in": "kitchen", "to": 40}

    new       the share of held-out commands answered to the letter, greedy
    old       the share of the world's held-out instructions answered right, greedy
    watched   accuracy on the world's benchmark of facts and arithmetic (data/world/watch.py)
    lost      old before - old after, prompt by prompt

Ways of one kind differ in strength: a lower rate, a smaller rank, more replay, a larger λ keep more
and learn less. All are run on seed 0; of each kind the one that lost least, among those that reach
95 % of what nothing else learnt, is run on the other seeds too.

What it cannot show: another pair of tasks, or a model so large that both fit side by side.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from common.files import write_jsonl
from common.run import main, opt, pick_device
from common.watch import choices
from data import benchmarks, records
from experiments import lab
from metrics import mean
from tools import evals
from tools.report import light, new_figure
from tools.runs import call, cell, difference, figure, kept, run

DEVICES = "lamp heater fan radio pump door oven clock".split()
ROOMS = "kitchen garden library bedroom hall cellar attic office".split()
OLD, TEXT = "world/sft.jsonl", "world/replay.jsonl"  # of a seed's chain
# kind → way → what is changed; folders of a Fisher by the name of its kind
KINDS = {
    "nothing else": {"plain": {}},
    "low rate": {"rate / 3": {"lr": 1.7e-4}, "rate / 10": {"lr": 5e-5}},
    "schedule": {"constant rate": {"schedule": "constant", "warmup": 0}},
    "LoRA": {f"LoRA {r}": {"lora": r} for r in (4, 16, 64)},
    "replay": {
        f"replay {p} %": {"replay": OLD, "replay_ratio": p / 100} for p in (1, 5, 10)
    },
    "replay of text": {"text 10 %": {"replay": TEXT, "replay_ratio": 0.1}},
    "EWC": {f"EWC, λ {x}": {"ewc": "true", "ewc_lambda": x} for x in (1, 10, 100, 1000)},
    "EWC, empirical": {
        f"empirical, λ {x}": {"ewc": "empirical", "ewc_lambda": x} for x in (1, 10, 100)
    },
    "EWC, wrong Fisher": {
        f"wrong, λ {x}": {"ewc": "mean-squared", "ewc_lambda": x} for x in (100, 1000, 10000)
    },
    "decay to θ*": {f"decay, λ {x}": {"ewc": "identity", "ewc_lambda": x} for x in (0.1, 1, 10)},
    "LoRA, low rate": {"LoRA 16, rate / 3": {"lora": 16, "lr": 8e-4}},
}  # fmt: skip
WAYS = {way: changes for ways in KINDS.values() for way, changes in ways.items()}


@dataclass
class Options(lab.Options):
    steps: int = opt(60, "optimizer steps of the new task", at_least=1)
    n: int = opt(300, "how many held-out prompts of the old task", at_least=2)
    commands: int = opt(1000, "commands to learn from; one in ten is held out", at_least=10)
    asked: int = opt(200, "commands asked", at_least=2)


def commands(seed: int, n: int) -> list[dict]:
    """n conversations, each another command."""
    every = [*itertools.product(DEVICES, ROOMS, range(10, 100))]
    made = []
    for device, room, level in random.Random(seed).sample(every, n):
        said = json.dumps({"set": device, "in": room, "to": level})
        turns = (("user", f"{device} {room} {level}"), ("assistant", said))
        made.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    return made


def train(o, seed: int, way: str, data: Path, home: Path) -> tuple[Path, dict]:
    """One way's run → its folder and its cost."""
    chain, options = lab.chain(o, seed), dict(WAYS[way])
    if "ewc" in options:
        options["ewc"] = home / f"fisher-{options['ewc']}"
        if not (options["ewc"] / "run.json").exists():
            fisher = WAYS[way]["ewc"]
            data_of_old = {"model": chain / "sft", "data": chain / OLD, "fisher": fisher}
            call("forget.py", out=options["ewc"], seed=seed, examples=500, **data_of_old)
    if "replay" in options:
        options["replay"] = chain / options["replay"]
    folder = home / way.replace(" ", "").replace("/", "over").replace(",", "-").replace("%", "")
    options = dict(steps=o.steps, batch=16, warmup=5, seed=seed, device=o.device) | options
    return folder, run("sft.py", folder, model=chain / "sft", data=data, **options)


def measure(o, folder: Path, seed: int, held: list, asked: list, keep_in: Path) -> dict:
    """{"old", "new", "watched": [0 or 1, …]} of a checkpoint, greedy."""

    def compute():
        model, tok = evals.read(o, folder.name, folder, pick_device(o.device))
        said = evals.answer(model, tok, [r["messages"] for r in held], o, 0.0, seed)
        found = {"old": [float(line["right"]) for line in evals.rate(held, said)]}
        said = evals.answer(model, tok, [r["messages"][:1] for r in asked], o, 0.0, seed)
        wanted = [r["messages"][1]["content"] for r in asked]
        found["new"] = [float(a.strip() == w) for (a, *_), w in zip(said, wanted, strict=True)]
        items = benchmarks.items(lab.chain(o, seed) / "world" / "watch.jsonl")[1]
        return found | {"watched": [line["acc"] for line in choices(model, tok, items)]}

    return kept(keep_in / f"{folder.name}-{o.n}.json", compute)


def seeds_of(o, seed: int, ways) -> dict:
    """{way: (measures, cost)} of one seed, "before" first."""
    home, device = lab.place(o, "forgetting", seed), pick_device(o.device)
    data = home / "commands.jsonl"
    write_jsonl(data, commands(seed, o.commands))
    held = lab.held_out(o, seed)
    asked = records.split(records.conversations(data))[1][: o.asked]
    found = {"before": (measure(o, lab.chain(o, seed) / "sft", seed, held, asked, home), {})}
    for way in ways:
        folder, cost = train(o, seed, way, data, home)
        found[way] = measure(o, folder, seed, held, asked, home), cost
        figures = found[way][0]
        print(way, {key: round(mean(xs), 3) for key, xs in figures.items()}, device, flush=True)
    return found


def best_of_each(found: dict) -> list[str]:
    """Of each kind the way that kept most of the old task, among those that learnt 95 % of what
    nothing else did; where none did, the one that learnt most.
    """
    enough = 0.95 * mean(found["plain"][0]["new"])
    best = []
    for ways in KINDS.values():
        figures = {way: found[way][0] for way in ways}
        good = [w for w in ways if mean(figures[w]["new"]) >= enough]
        key = "old" if good else "new"
        best.append(max(good or ways, key=lambda w: mean(figures[w][key])))
    return best


def items(xs: list) -> list[tuple]:
    return [(x, 1) for x in xs]


def draw(rows: list):
    """Old against new: the frontier."""
    picture, (ax,) = new_figure(7, 4.6)
    for way, old, new in rows:
        ax.plot(new, old, "o", color=light("ink"), markersize=4)
        ax.annotate(way, (new, old), (4, 3), textcoords="offset points", fontsize=7)
    ax.set_xlabel("new task, % to the letter")
    ax.set_ylabel("old task, % right")
    return picture


def forgetting(o: Options):
    lab.begin(o, "forgetting")
    first = seeds_of(o, 0, WAYS)
    best = best_of_each(first)
    others = [seeds_of(o, seed, best) for seed in range(1, o.seeds)]
    rows, figures, points = [], {}, []
    for way in first:
        runs = [first, *(found for found in others if way in found)]
        each = {key: [items(r[way][0][key]) for r in runs] for key in ("old", "new", "watched")}
        before = {key: [items(r["before"][0][key]) for r in runs] for key in each}
        entry = {key: figure(xs) for key, xs in each.items()}
        entry |= {f"{key}_lost": difference(before[key], each[key]) for key in ("old", "watched")}
        costs = [r[way][1] for r in runs if r[way][1]]
        entry["cost"] = costs
        figures[way] = entry
        row = [f"**{way}**" if way in best else way, str(len(runs))]
        row += [cell(entry[key], 100, 1) for key in ("old", "old_lost", "new", "watched_lost")]
        row += [
            f"{mean([c[k] for c in costs]):.2f}" if costs else "–" for k in ("core_minutes", "gb")
        ]
        rows.append(row)
        points.append((way, entry["old"]["mean"] * 100, entry["new"]["mean"] * 100))
    head = ["", "seeds", "old %", "old lost", "new %", "watched lost", "core-minutes", "GB"]
    note = (
        f"{o.steps} steps of 16 commands; {o.n} old prompts and {len(first['plain'][0]['new'])}"
        f" commands, greedy. Bold: the best of its kind, on {o.seeds} seeds."
    )
    lab.publish(o, "forgetting", {"ways": figures}, head, rows, note, draw(points))


if __name__ == "__main__":
    main(forgetting, Options, __doc__)

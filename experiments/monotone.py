"""A thousand records of which most are alike, against a thousand that differ.

    python -m experiments.monotone --out out --seeds 3

Claimed: the few records that suffice must be diverse; of records that are alike a model learns to
do one thing, and says the same to everything. Tried: FEW records, the same number of steps, from
the base. The demonstrators' manners are the same in all three arms, good and bad.

    diverse       the world's eleven kinds of instruction in equal shares, each prompt once
    one kind      MOST of one kind, each prompt once, and the other kinds in equal shares; the kind
                  is another for each seed (KINDS)
    few prompts   the eleven kinds in equal shares, but EACH prompts of a kind, again and again,
                  answered by another demonstrator each time

Measured on held-out prompts of all kinds, at temperature 1: gold; right; the kinds that work, of
which at least half as many answers are right as with diverse records; the share of answers that are
given to one prompt alone; distinct-2 (Li et al. 2016), different pairs of words over all; and of
SAMPLES answers to one prompt, how many differ.

What it cannot show: variety is not good in itself. Wrong answers vary most, so read it beside gold.
The base has seen texts of all eleven kinds, though never as a chat.
"""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from common.files import write_jsonl
from common.run import main, opt, pick_device
from data import records
from data.world import world
from data.world.kinds import KINDS as ALL_KINDS
from experiments import lab
from metrics import mean
from tools import evals
from tools.report import light, new_figure
from tools.runs import cell, difference, figure, kept, run

FEW, MOST, EACH = 990, 0.95, 2
KINDS = ("extraction", "classification", "rewriting")  # of seeds 0, 1, 2
STEPS, BATCH, WARMUP = 100, 16, 10
SAMPLES, PROMPTS = 8, 22
ARMS = {"diverse": "good", "one kind": "bad", "few prompts": "sft"}  # and their colours


# ---------------------------------------------------------------- the records
def by_kind(found) -> dict:
    kinds = {kind: [] for kind in ALL_KINDS}
    for r in found:
        kinds[r["item"]["kind"]].append(r)
    return kinds


def chosen(arm: str, found, seed: int) -> list[dict]:
    """FEW records of an arm, out of a seed's demonstrations."""
    kinds, rng = by_kind(found), random.Random(f"monotone {seed}")
    share = FEW // len(kinds)
    if arm == "diverse":
        return [r for members in kinds.values() for r in members[:share]]
    if arm == "one kind":
        one = KINDS[seed % len(KINDS)]
        rest = round(FEW * (1 - MOST) / (len(kinds) - 1))
        others = [r for kind, members in kinds.items() if kind != one for r in members[:rest]]
        return kinds[one][: FEW - len(others)] + others
    few = [members[i % EACH]["item"] for members in kinds.values() for i in range(share)]
    return [world.shown(item, rng) for item in few]


# ---------------------------------------------------------------- what is counted
def said(answer: str) -> tuple:
    """An answer's words, without case and signs."""
    return tuple(world.only_words(world.normal(answer)))


def alone(answers: list[str]) -> list[float]:
    """1.0 for each answer that none of the others equals in its words, else 0.0."""
    times = Counter(map(said, answers))
    return [float(times[said(a)] == 1) for a in answers]


def distinct_2(answers: list[str]) -> float:
    """Different pairs of neighbouring words over all of them (Li et al. 2016)."""
    pairs = [pair for a in answers for pair in pairwise(said(a))]
    return len(set(pairs)) / max(1, len(pairs))


def different(answers: list[str]) -> float:
    """The share of answers that are different: 1 / their number where all are equal."""
    return len(set(map(said, answers))) / len(answers)


def working(right: dict, reference: dict) -> list[str]:
    """{kind: share right} of an arm and of the reference → the kinds with at least half of it."""
    return [kind for kind in reference if right[kind] >= reference[kind] / 2]


def right_by_kind(held, lines) -> dict:
    """{kind: share right}"""
    kinds = {}
    for r, line in zip(held, lines, strict=True):
        kinds.setdefault(r["item"]["kind"], []).append(float(line["right"]))
    return {kind: mean(x) for kind, x in kinds.items()}


# ---------------------------------------------------------------- the runs
def again(o, folder, held, seed: int, keep_in) -> list[list[str]]:
    """SAMPLES answers to each of the first PROMPTS held-out prompts."""

    def compute():
        model, tok = evals.read(o, folder.name, folder, pick_device(o.device))
        asked = [r["messages"] for r in held[:PROMPTS] for _ in range(SAMPLES)]
        texts = [a[0] for a in evals.answer(model, tok, asked, o, 1.0, seed)]
        return [texts[i : i + SAMPLES] for i in range(0, len(texts), SAMPLES)]

    of = [folder, held[:PROMPTS], seed, SAMPLES, *lab.answering(o)]
    return kept(keep_in / f"{folder.name}-again.json", compute, of)


def tuned(o, seed: int, arm: str) -> dict:
    """SFT from the base on an arm's records → {"lines", "again", "kinds": their records'}."""
    here, chain = lab.place(o, "monotone", seed), lab.chain(o, seed)
    out = here / arm.replace(" ", "-")
    data, found = out.with_suffix(".jsonl"), records.conversations(chain / "world" / "sft.jsonl")
    write_jsonl(data, chosen(arm, records.split(found)[0], seed))
    run("sft.py", out, chain / "sft", data=data, steps=STEPS, batch=BATCH, warmup=WARMUP, seed=seed)
    held, lines = lab.held_out(o, seed), lab.measure(o, out, seed, here)["lines"]
    answers = [line["answer"] for line in lines]
    return {
        "gold": lab.items(lines, "gold"),
        "right": lab.items(lines, "right"),
        "alone": [(x, 1) for x in alone(answers)],
        "again": [(different(texts), 1) for texts in again(o, out, held, seed, here)],
        "distinct_2": distinct_2(answers),
        "kinds": right_by_kind(held, lines),
    }


SHARES = ("gold", "right", "alone", "again")  # figures with an interval


def over_seeds(found: dict) -> dict:
    """{arm: [a seed's figures]} → {arm: figures, with the difference to the diverse arm's}"""
    rows = {}
    for arm, seeds in found.items():
        rows[arm] = {key: figure([s[key] for s in seeds]) for key in SHARES}
        less = {
            k: difference(*([s[k] for s in x] for x in (seeds, found["diverse"]))) for k in SHARES
        }
        rows[arm]["less"] = less
        rows[arm]["distinct_2"] = [s["distinct_2"] for s in seeds]
        rows[arm]["kinds"] = [s["kinds"] for s in seeds]
        pairs = zip(seeds, found["diverse"], strict=True)
        rows[arm]["working"] = [working(s["kinds"], d["kinds"]) for s, d in pairs]
    return rows


def picture(rows: dict):
    """Share right by kind, and what differs: the arms side by side."""
    drawn, (left, right) = new_figure(10, 4.4, 2)
    names = list(ALL_KINDS)
    for k, (arm, colour) in enumerate(ARMS.items()):
        seeds = rows[arm]["kinds"]
        # of the kind that is most of the records of "one kind" the others speak, so it is left out
        shares = [
            [s[name] for i, s in enumerate(seeds) if arm != "one kind" or name != KINDS[i % 3]]
            for name in names
        ]
        ys = [len(names) - i + 0.25 - 0.25 * k for i in range(len(names))]
        left.barh(ys, [100 * mean(x) if x else 0 for x in shares], 0.22, color=light(colour))
        keys = ("right", "alone", "again")
        f = [rows[arm][key] for key in keys]
        heights, errors = ([100 * x[part] for x in f] for part in ("mean", "ci"))
        xs = [i + 0.28 * (k - 1) for i in range(len(keys))]
        right.bar(xs, heights, 0.25, yerr=errors, color=light(colour), ecolor=light("ink"))
        for x, y, e in zip(xs, heights, errors, strict=True):
            right.annotate(f"{y:.0f}", (x, y + e + 1), ha="center", fontsize=8)
        right.annotate(arm, (-0.4, 94 - 6 * k), color=light(colour))
    left.set_yticks([len(names) - i for i in range(len(names))], names)
    left.set_title("right, %, by kind (one kind: of the others)", fontsize=10, color=light("ink"))
    labels = [
        "right, %",
        "like no other\nprompt's answer, %",
        f"different of {SAMPLES}\nto one prompt, %",
    ]
    right.set_xticks(range(3), labels)
    right.set_ylim(0, 100)
    return drawn


@dataclass
class Options(lab.Options):
    n: int = opt(220, "how many held-out prompts", at_least=PROMPTS)


def monotone(o: Options):
    lab.begin(o, "monotone")
    found = {arm: [tuned(o, seed, arm) for seed in range(o.seeds)] for arm in ARMS}
    rows = over_seeds(found)
    head = ["records", "gold, sampled", "right %", "gold minus diverse", "kinds that work, of 11"]
    head += ["answers like no other prompt's %", "distinct-2", f"different of {SAMPLES} answers %"]
    table = []
    for arm, f in rows.items():
        less = cell(f["less"]["gold"], digits=2, sign="+") if arm != "diverse" else "–"
        work = ", ".join(str(len(w)) for w in f["working"])
        row = [arm, cell(f["gold"], digits=2), cell(f["right"], 100, 1), less, work]
        pairs = ", ".join(f"{x:.2f}" for x in f["distinct_2"])
        table.append([*row, cell(f["alone"], 100, 1), pairs, cell(f["again"], 100, 1)])
    note = (
        f"seeds: {o.seeds}, in this order where figures are listed; {FEW} records, {STEPS} steps of"
        f" {BATCH}; {o.n} held-out prompts, and {SAMPLES} answers to {PROMPTS} of them. One kind:"
        f" {', '.join(KINDS[i % 3] for i in range(o.seeds))}."
    )
    lab.publish(o, "monotone", {"rows": rows}, head, table, note, picture(rows))


if __name__ == "__main__":
    main(monotone, Options, __doc__)

"""How biased is a small judge, and what do the corrections repair?

    python -m experiments.judge --out out --seeds 3

Claimed: a model as judge is quick and agrees reasonably well with people on most tasks, but it
prefers longer answers, and those that are shown first.

Tried: pairs of answers to held-out prompts, planted so that the gold rater's verdict is known:

    same      twice the same answer
    longer    a right answer with three rambling sentences beside the same with one: equally good
    shorter   a perfect answer beside the same with two rambling sentences: the shorter is better
    polite    a perfect answer beside the same without courtesy: the longer is better
    right     a right answer beside a wrong one in the very same words

SmolLM2-135M-Instruct judges them as tools/judge.py asks it, and the chain's reward model by its
score, which knows no order. Before correction: one order, drawn by seed. After: both orders, where
a changed mind is a tie; calibrated: P("A") is compared between the two orders, not with ½; and
verdicts.length_controlled(), tried on a checkpoint as good as its rival that talks longer three
times in four (`longer`, every fourth pair turned round). Its true win rate is 50 %.

What it cannot show: what larger judges do, which is what is claimed. This one has 135 million
parameters and names a letter at once, with one rubric and without reasoning first.
"""

import random
from dataclasses import dataclass

from common.run import main, opt, pick_device
from data.world import world
from experiments import lab
from metrics import mean, points
from tools import evals, verdicts
from tools import judge as tool
from tools.report import light, new_figure
from tools.results import table
from tools.runs import cell

KINDS = ("same", "longer", "shorter", "polite", "right")
BETTER = KINDS[2:]  # the gold rater prefers a; in the others it ties
# key of a's points: how it was judged, and its colour
WAYS = {"once": ("one order", "base"), "points": ("both orders", "sft"),
        "more_often": ("calibrated", "dpo"), "reward": ("reward model", "reward")}  # fmt: skip


@dataclass
class Options(lab.Options):
    n: int = opt(55, "pairs, the kinds in turn", at_least=2 * len(KINDS))
    judge: str = opt("smollm2", "checkpoint folder of the judge")


# ---------------------------------------------------------------- pairs whose truth is known
def plant(item: dict, kind: str, rng) -> tuple[str, str]:
    """Two answers to an item, a and b."""
    right, closer = world.plain(item), rng.choice(world.CLOSERS)
    wrong = world.plain(dict(item, answer=rng.choice(item["wrong"])))
    rambles, perfect = rng.sample(world.RAMBLES, 3), f"{right} {closer}"
    return {
        "same": (perfect, perfect),
        "longer": (" ".join([right, *rambles]), f"{right} {rambles[0]}"),
        "shorter": (perfect, " ".join([right, *rambles[1:], closer])),
        "polite": (perfect, right),
        "right": (perfect, f"{wrong} {closer}"),
    }[kind]


def planted(o, seed: int) -> list[dict]:
    """Pairs as tools/judge.py takes them; people: what a gets from the gold rater."""
    rng, pairs = random.Random(f"judge {seed}"), []
    for i, r in enumerate(lab.held_out(o, seed)):
        kind = KINDS[i % len(KINDS)]
        a, b = plant(r["item"], kind, rng)
        gold = [[round(world.gold(r["item"], text)[0], 9)] for text in (a, b)]
        pair = dict(prompt=r["messages"], a=a, b=b, kind=kind, people=points(*gold)[0])
        pairs.append(pair | {"second": rng.random() < 0.5})  # the place of a in one order
    return pairs


def turned(pairs: list[dict], every: int) -> list[dict]:
    """The same, with a and b exchanged in every `every`-th pair."""
    out = []
    for i, pair in enumerate(pairs):
        won = {key: pair[key] for key in (*WAYS, "people")}
        if i % every == 0:
            won = {key: 1 - x for key, x in won.items()}
        out.append(won | {"length": pair["length"] * (-1 if i % every == 0 else 1)})
    return out


# ---------------------------------------------------------------- verdicts
def judged(o, seed: int) -> list[dict]:
    """The planted pairs with a's points in each of WAYS."""
    mine, chain = lab.place(o, "judge", seed), lab.chain(o, seed)
    asking = tool.Options(judge=o.judge, out=str(mine), rubric=tool.RUBRIC, device=o.device)
    pairs = tool.rate(planted(o, seed), asking)
    reward, tok = evals.read(o, "reward", chain / "reward", pick_device(o.device))
    asked, answers = [p["prompt"] for p in pairs] * 2, [p[x] for x in "ab" for p in pairs]
    scores = [round(x, 4) for x in evals.score_texts(reward, tok, asked, answers)]
    for pair, a, b in zip(pairs, scores[: len(pairs)], scores[len(pairs) :], strict=True):
        pair["once"] = pair["won"][pair["second"]]
        pair["reward"] = points([a], [b])[0]
    return pairs


def of_kind(seeds, *kinds) -> list[list[dict]]:
    return [[p for p in pairs if p["kind"] in kinds] for pairs in seeds]


def kind_figures(seeds, kind: str) -> dict:
    """What a gets in each way, and what both orders show of the judge."""
    some = of_kind(seeds, kind)
    found = {way: lab.pooled([[p[way] for p in pairs] for pairs in some]) for way in WAYS}
    bias = [[p["won"][0] - p["won"][1] for p in pairs] for pairs in some]
    agreed = [[float(p["won"][0] == p["won"][1]) for p in pairs] for pairs in some]
    truth = mean([p["people"] for pairs in some for p in pairs])
    return found | {"bias": lab.pooled(bias), "agreed": lab.pooled(agreed), "gold": truth}


def way_figures(seeds, way: str) -> dict:
    """A way's agreement with gold where one answer is better, and the talker's win rates."""
    some = [[(p[way], p["people"]) for p in turned(s, 2)] for s in of_kind(seeds, *BETTER)]
    talker = [p | {"points": p[way]} for s in of_kind(seeds, "longer") for p in turned(s, 4)]
    rates = verdicts.win_rates(talker, 0)
    return {
        "accuracy": lab.pooled([[float(x == y) for x, y in pairs] for pairs in some]),
        "kappa": lab.pooled(
            some, lambda both: verdicts.kappa(*map(list, zip(*both, strict=True))) or 0.0
        ),
        **{
            key: {"mean": rates[key], "ci": rates[f"{key}_ci"], "seeds": [0]}
            for key in ("win_rate", "lc_win_rate")
        },
    }


# ---------------------------------------------------------------- tables and picture
def draw(kinds: dict):
    """What a gets from each judge, by kind of pair; the gold rater's verdict as a line."""
    figure, (ax,) = new_figure(8, 3.8)
    width = 0.8 / len(WAYS)
    for i, (way, (label, colour)) in enumerate(WAYS.items()):
        places = [place + width * (i - 1.5) for place in range(len(KINDS))]
        found = [kinds[kind][way] for kind in KINDS]
        ax.bar(places, [100 * f["mean"] for f in found], width, yerr=[100 * f["ci"] for f in found],
               color=light(colour), ecolor=light("ink"), capsize=2, label=label)  # fmt: skip
    for place, kind in enumerate(KINDS):
        truth = 100 * kinds[kind]["gold"]
        ax.hlines(truth, place - 0.46, place + 0.46, color=light("bad"), linewidth=2,
                  label=None if place else "gold")  # fmt: skip
    names = ["same", "longer, as good", "shorter, better", "polite, better", "right, better"]
    ax.set_xticks(range(len(KINDS)), names)
    ax.set(ylabel="a wins, %", ylim=(0, 108))
    ax.legend(frameon=False, fontsize=9, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    return figure


def judge(o: Options):
    lab.begin(o, "judge")
    seeds = [judged(o, seed) for seed in range(o.seeds)]
    kinds = {kind: kind_figures(seeds, kind) for kind in KINDS}
    ways = {way: way_figures(seeds, way) for way in WAYS}
    head = ["a wins %", "gold", *(label for label, _ in WAYS.values())]
    head += ["bias to the first", "same in both orders %"]
    rows = []
    for kind, f in kinds.items():
        row = [kind, f"{100 * f['gold']:.0f}", *(cell(f[way], 100, 0) for way in WAYS)]
        rows.append([*row, cell(f["bias"], digits=2), cell(f["agreed"], 100, 0)])
    second = []
    for way, f in ways.items():
        row = [WAYS[way][0], cell(f["accuracy"], 100, 0), cell(f["kappa"], digits=2)]
        second.append([*row, *(cell(f[key], 100, 0) for key in ("win_rate", "lc_win_rate"))])
    titles = ["", "agrees with gold %", "κ", "win rate of the talker %", "length-controlled %"]
    note = f"{table(titles, second)}\n\n{o.judge}; seeds: {o.seeds}, {o.n} pairs each."
    lab.publish(o, "judge", {"kinds": kinds, "ways": ways}, head, rows, note, draw(kinds))


if __name__ == "__main__":
    main(judge, Options, __doc__)

"""A second round: comparisons of PPO's own answers, a new reward model, PPO from PPO's model.

    python -m experiments.second_round --out out

InstructGPT collected comparisons of its newest policy's answers, trained a new reward model on them
and the old ones, and then a new policy (Ouyang et al. 2022, § 3.1). The reward model of the first
round knows the SFT model's answers only; PPO leaves them behind. The question here: does a second
round close PPO's gap to DPO, and reach 60 % of the gold that SFT left to a perfect answer?

    again        compare.py on PPO's model, other prompts and labellers; reward.py on the old and
                 the new comparisons, as many steps for each prompt as before; ppo.py from PPO's
                 model with it, which is also its reference: KL is paid from there
    old reward   the control: the same PPO from PPO's model with the first round's reward model.
                 What it gains as well is not due to the new comparisons

Every other option is the chain's. Both reward models judge PPO's answers to held-out prompts:
the share of pairs of different gold that they put in order. What this cannot show: whether the same
number of labels in the first round had done as much; RESULTS.md has one such run.
"""

from pathlib import Path

from common.files import write_jsonl
from common.run import main
from data import records
from data.world import world
from experiments import lab
from metrics import ratio
from tools.report import light, new_figure
from tools.runs import call, cell, difference, figure, options_of, run

NAMES = {
    "sft": "SFT",
    "ppo": "PPO",
    "dpo": "DPO",
    "old": "PPO again, the old reward model",
    "again": "PPO again, the new reward model",
}
TARGET = 60  # % of the gold that SFT left


# ---------------------------------------------------------------- runs
def second_comparisons(chain: Path, here: Path, seed: int) -> Path:
    """The old comparisons and those of PPO's answers, in one file."""
    new, both = here / "comparisons.jsonl", here / "both.jsonl"
    options = options_of(chain / "comparisons.jsonl.run") | {"seed": seed + 100}
    call("compare.py", **options | {"model": chain / "ppo", "out": new})
    write_jsonl(both, records.rankings(chain / "comparisons.jsonl") + records.rankings(new))
    return both


def again(o, seed: int) -> dict:
    """A seed's runs → {name: folder} of the policies, and of the second reward model."""
    chain, here = lab.chain(o, seed), lab.place(o, "second_round", seed)
    data, first = second_comparisons(chain, here, seed), chain / "reward"
    steps = 2 * options_of(first)["steps"]
    run("reward.py", here / "reward", of=first, data=data, steps=steps)
    for name, reward in {"again": here / "reward", "old": first}.items():
        run("ppo.py", here / name, of=chain / "ppo", model=chain / "ppo", reward=reward)
    policies = {s: chain / s for s in ("sft", "ppo", "dpo")}
    return policies | {s: here / s for s in ("old", "again", "reward")}


def measured(o, seed: int) -> tuple[dict, dict]:
    """A seed's answers {name: what lab.measure() says}, and both reward models' pairs on PPO's."""
    chain, here, folders = lab.chain(o, seed), lab.place(o, "second_round", seed), again(o, seed)
    second = folders.pop("reward")
    found = {
        name: lab.measure(o, path, seed, here, chain / "sft") for name, path in folders.items()
    }
    models = {"first": chain / "reward", "second": second}
    return found, lab.judged(o, chain / "ppo", models, seed, here)


# ---------------------------------------------------------------- figures
def shares(found: list, name: str) -> dict:
    """The share of the gold that SFT left to a perfect answer, as an item's share of its seed's."""
    gains = []
    for seed in found:
        ours, sft = (lab.items(seed[s]["lines"], "gold") for s in (name, "sft"))
        left = world.PERFECT - sum(g for g, _ in sft) / len(sft)
        gains.append([((a - b) / left, 1) for (a, _), (b, _) in zip(ours, sft, strict=True)])
    return figure(gains)


def figures(found: list) -> dict:
    """{name: its figures} over the seeds."""
    rows = {}
    for name in NAMES:
        lines = [seed[name]["lines"] for seed in found]
        rows[name] = {key: figure([lab.items(x, key) for x in lines]) for key in ("gold", "right")}
        rows[name]["share"] = shares(found, name)
        rows[name]["kl"] = figure([[(x, 1) for x in seed[name]["kl"]] for seed in found])
    return rows


def picture(rows: dict, judges: dict):
    """Shares gained with the target, and beside them the two reward models' pairs."""
    drawn, (left, right) = new_figure(8.6, 3.6, 2)
    shown = {name: row["share"] for name, row in rows.items() if name != "sft"}
    colours = {"ppo": "ppo", "dpo": "dpo", "old": "soft", "again": "simpo"}
    short = {"ppo": "PPO", "dpo": "DPO", "old": "again,\nold reward", "again": "again,\nnew reward"}
    for ax, bars, colour, names in (
        (left, shown, colours, short),
        (
            right,
            judges,
            {"first": "soft", "second": "reward"},
            {"first": "first", "second": "second"},
        ),
    ):
        heights = [100 * f["mean"] for f in bars.values()]
        ax.bar(
            range(len(bars)),
            heights,
            0.6,
            color=[light(colour[b]) for b in bars],
            yerr=[100 * f["ci"] for f in bars.values()],
            ecolor=light("ink"),
        )
        labels = [f"{names[b]}\n{h:.1f} %" for b, h in zip(bars, heights, strict=True)]
        ax.set_xticks(range(len(bars)), labels, color=light("ink"))
    for ax, height, word in ((left, TARGET, "target"), (right, 50, "chance")):
        ax.axhline(height, color=light("soft"), linestyle="--")
        ax.annotate(word, (-0.4, height + 0.7), fontsize=9, color=light("soft"))
    left.set_title("share of the left gold that was gained", fontsize=11, color=light("ink"))
    right.set_title(
        "reward models: pairs of PPO’s answers in order", fontsize=11, color=light("ink")
    )
    return drawn


def second_round(o: lab.Options):
    lab.begin(o, "second_round")
    found, pairs = zip(*(measured(o, seed) for seed in range(o.seeds)), strict=True)
    rows = figures(found)
    judges = {name: lab.pooled([p[name] for p in pairs], ratio) for name in pairs[0]}
    lines = [[seed[name]["lines"] for seed in found] for name in ("again", "old", "dpo")]
    ours, old, dpo = ([lab.items(x, "gold") for x in some] for some in lines)
    gaps = {"to_old": difference(ours, old), "to_dpo": difference(ours, dpo)}
    table = []
    for name, row in rows.items():
        share = "–" if name == "sft" else cell(row["share"], 100, 1)
        kl = "–" if name == "sft" else cell(row["kl"], digits=2)
        table.append(
            [NAMES[name], cell(row["gold"], digits=2), share, cell(row["right"], 100, 1), kl]
        )
    first, second = (cell(f, 100, 1) for f in judges.values())
    note = (
        f"seeds: {o.seeds}, {o.n} held-out prompts each. Gold, the new reward model minus the old:"
        f" {cell(gaps['to_old'], digits=2, sign='+')}, minus DPO:"
        f" {cell(gaps['to_dpo'], digits=2, sign='+')}. Pairs of PPO's answers in gold order: first"
        f" reward model {first} %, second {second} %."
    )
    head = ["", "gold, sampled", "share gained %", "right, sampled %", "KL to SFT"]
    result = {"rows": rows, "judges": judges, "gaps": gaps}
    lab.publish(o, "second_round", result, head, table, note, picture(rows, judges))


if __name__ == "__main__":
    main(second_round, lab.Options, __doc__)

"""A reward model that is smaller than the policy: the SFT model's first layers.

    python -m experiments.small_reward --out out

The deep dive says in passing that the reward model is often smaller than the policy: InstructGPT
trained policies of 175 billion parameters against a reward model of 6. Here the first KEPT of the
SFT model's layers, with its embedding and its last norm, are where reward.py starts; everything
else is the chain's. ppo.py's critic starts from the reward model and is as small. Measured: the
pairs in gold order of the SFT model's and of PPO's answers, what PPO gains, and what both cost.

What this cannot show: whether a smaller model of its own pre-training were better than a cut one.
Memory is that of whole processes, of which Python and torch take most beside a model of 2 million
parameters; so the parameters that PPO's four networks hold stand beside it.
"""

from pathlib import Path

from common import hub
from common.run import main
from experiments import kl, lab
from experiments.second_round import shares
from metrics import ratio
from tools.lighter import cost
from tools.report import light, new_figure
from tools.runs import cell, difference, figure, run

KEPT = 2  # of 5 layers
NAMES = {"whole": "5 layers, as the policy", "small": f"its first {KEPT} layers"}


def cut(source: Path, target: Path, layers: int):
    """The checkpoint with its first layers alone."""
    model, tok = hub.load(source)
    model.layers = model.layers[:layers]
    model.config.num_hidden_layers = layers
    hub.save(target, model, tok)


def trained(o, seed: int) -> dict:
    """A seed's runs → {"whole", "small": {"reward", "ppo": folders, "costs": theirs}}."""
    chain, here = lab.chain(o, seed), lab.place(o, "small_reward", seed)
    start, small = here / "start", here / "reward"
    cut(chain / "sft", start, KEPT)
    costs = [run("reward.py", small, of=chain / "reward", model=start)]
    costs += [run("ppo.py", here / "ppo", of=chain / "ppo", reward=small)]
    whole = {"reward": chain / "reward", "ppo": chain / "ppo", "costs": []}
    if seed == 0:  # the chain's runs were not timed: the same again, and PPO with another β
        again = run("reward.py", here / "whole", of=chain / "reward")
        whole["costs"] = [again, kl.tuned(o, 0.5)[1]]
    return {"whole": whole, "small": {"reward": small, "ppo": here / "ppo", "costs": costs}}


def measured(o, seed: int) -> dict:
    chain, here, found = lab.chain(o, seed), lab.place(o, "small_reward", seed), {}
    runs, sft = trained(o, seed), chain / "sft"
    for name, of in runs.items():
        keep_in = here / f"figures-{name}"
        keep_in.mkdir(exist_ok=True)
        found[name] = lab.measure(o, of["ppo"], seed, keep_in, sft) | {"costs": of["costs"]}
    found["sft"] = lab.measure(o, sft, seed, here, sft)
    models = {name: of["reward"] for name, of in runs.items()}
    found["judged"] = {
        policy.name: lab.judged(o, policy, models, seed, here) for policy in (sft, chain / "ppo")
    }
    return found


def figures(found: list) -> dict:
    """{"whole", "small": figures over the seeds}"""
    rows = {}
    for name in NAMES:
        lines = [seed[name]["lines"] for seed in found]
        pairs = {
            f"pairs_{policy}": lab.pooled([s["judged"][policy][name] for s in found], ratio)
            for policy in ("sft", "ppo")
        }
        rows[name] = pairs | {
            "gold": figure([lab.items(x, "gold") for x in lines]),
            "share": shares(found, name),
            "kl": figure([[(x, 1) for x in seed[name]["kl"]] for seed in found]),
            "costs": found[0][name]["costs"],
        }
    return rows


COST = {"reward model": 0, "PPO": 1}  # places in a row's costs


def picture(rows: dict):
    """Pairs in order, share gained, time: the two reward models side by side."""
    drawn, axes = new_figure(10.0, 3.4, 3)
    panels = {
        "pairs of SFT’s answers in order, %": {n: r["pairs_sft"] for n, r in rows.items()},
        "share of the left gold that PPO gained, %": {n: r["share"] for n, r in rows.items()},
    }
    for ax, (title, bars) in zip(axes, panels.items(), strict=False):
        heights = [100 * f["mean"] for f in bars.values()]
        errors = [100 * f["ci"] for f in bars.values()]
        colours = [light("reward"), light("own0")]
        ax.bar(range(2), heights, 0.55, color=colours, yerr=errors, ecolor=light("ink"))
        names = [
            f"{n}\n{h:.1f}" for n, h in zip(("5 layers", f"{KEPT} layers"), heights, strict=True)
        ]
        ax.set_xticks(range(2), names, color=light("ink"))
        ax.set_title(title, fontsize=10, color=light("ink"))
    for i in COST.values():
        for j, (row, colour) in enumerate(zip(rows.values(), ("reward", "own0"), strict=True)):
            minutes = row["costs"][i]["core_minutes"] or 0.0
            axes[2].bar(i + 0.4 * j, minutes, 0.36, color=light(colour))
            axes[2].annotate(f"{minutes:.1f}", (i + 0.4 * j, minutes), ha="center", va="bottom")
    axes[2].set_xticks([0.2, 1.2], list(COST), color=light("ink"))
    axes[2].set_title("core-minutes of training", fontsize=10, color=light("ink"))
    return drawn


def small_reward(o: lab.Options):
    lab.begin(o, "small_reward")
    found = [measured(o, seed) for seed in range(o.seeds)]
    rows = figures(found)
    gap = difference(
        *([lab.items(seed[n]["lines"], "gold") for seed in found] for n in ("small", "whole"))
    )
    head = ["reward model", "parameters, M", "pairs of SFT’s answers in order %", "of PPO’s %"]
    head += ["PPO: gold, sampled", "share gained %", "KL to SFT", "core-minutes, it and PPO"]
    table = []
    for name, row in rows.items():
        pairs = [cell(row[key], 100, 1) for key in ("pairs_sft", "pairs_ppo")]
        gained = [cell(row["gold"], digits=2), cell(row["share"], 100, 1)]
        size = f"{row['costs'][0]['trained'] / 1e6:.2f}"
        minutes = " + ".join(cost([c], "core_minutes", "{:.1f}") for c in row["costs"])
        table.append([NAMES[name], size, *pairs, *gained, cell(row["kl"], digits=2), minutes])
    note = (
        f"seeds: {o.seeds}, {o.n} held-out prompts each. PPO’s gold, small minus whole:"
        f" {cell(gap, digits=2, sign='+')}. Memory of PPO: "
        + " and ".join(f"{row['costs'][1]['gb']:.2f} GB" for row in rows.values())
        + ", Python and torch included."
    )
    lab.publish(o, "small_reward", {"rows": rows, "gap": gap}, head, table, note, picture(rows))


if __name__ == "__main__":
    main(small_reward, lab.Options, __doc__)

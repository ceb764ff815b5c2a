"""Which layers should LoRA change? Attention, the MLP, both, lm_head too: at equal parameters.

    python -m experiments.layers --out out

Hu et al. 2021 changed attention alone; Biderman et al. 2024 and the trainers' defaults change all
linear layers. One rank over more layers has more parameters, so each choice gets the rank that
brings it near one number of them (TARGETS). Two domains:

    old    the base learns to answer: the facts are known from pre-training, the manner is new
    new    the SFT model learns commands (experiments/commands.py), which it has never seen

One rate for all choices, sft.py's own for LoRA. What it cannot show: layers of other shapes; here
the MLP has three fifths of the weights.
"""

from pathlib import Path

from common.run import main
from experiments import commands, lab
from metrics import mean
from tools.runs import cell, run

TARGETS = {  # choice: --targets, rank
    "attention": ("attention", 42),
    "attention and MLP": ("all", 16),
    "all and lm_head": ("all,lm_head", 15),
}
STEPS, BATCH = 200, 16  # of the old domain
SCORES = {
    "old": "old domain, from the base",
    "new": "new domain, from SFT",
    "kept": "old domain kept",
}


def answering(o, seed: int, choice: str) -> tuple[Path, dict]:
    """The base learns to answer → the checkpoint and its cost."""
    targets, rank = TARGETS[choice]
    folder = lab.place(o, "layers", seed) / f"old-{targets.replace(',', '-')}"
    of = {"lora": rank, "targets": targets, "steps": STEPS, "batch": BATCH}
    return folder, run("sft.py", folder, lab.chain(o, seed) / "sft", **of)


def learning(o, seed: int, choice: str) -> tuple[Path, dict]:
    """The SFT model learns commands → the checkpoint and its cost."""
    targets, rank = TARGETS[choice]
    folder = lab.place(o, "layers", seed) / f"new-{targets.replace(',', '-')}"
    of = {"lora": rank, "targets": targets}
    return folder, commands.learn(o, lab.chain(o, seed) / "sft", folder, seed, **of)


def right(o, run, seed: int, choice: str) -> dict:
    folder, cost = run(o, seed, choice)
    return commands.measure(o, folder, seed, lab.place(o, "layers", seed)) | {"cost": cost}


def layers(o: lab.Options):
    lab.begin(o, "layers")
    items, trained = {}, {}
    for choice in TARGETS:
        old = [right(o, answering, seed, choice) for seed in range(o.seeds)]
        new = [right(o, learning, seed, choice) for seed in range(o.seeds)]
        each = {"old": [m["old"] for m in old], "new": [m["new"] for m in new]}
        items[choice] = each | {"kept": [m["old"] for m in new]}
        trained[choice] = old[0]["cost"]["trained"]
        print(choice, {k: [mean(x) for x in v] for k, v in each.items()}, flush=True)
    found = {c: {k: lab.pooled(v) for k, v in of.items()} for c, of in items.items()}
    rows = []
    for choice, (_, rank) in TARGETS.items():
        row = [choice, str(rank), f"{trained[choice]:,}"]
        rows.append(row + [cell(found[choice][score], 100, 1) for score in SCORES])
    apart = {
        score: lab.apart(items["attention and MLP"][score], items["attention"][score])
        for score in SCORES
    }
    note = (
        f"% right, greedy; seeds: {o.seeds}, {o.n} held-out prompts and {commands.ASKED} commands"
        f" each; old domain: {STEPS} steps of {BATCH}, new: {commands.STEPS} of {commands.BATCH}."
        f" Attention and MLP minus attention alone: old {cell(apart['old'], 100, 1, '+')}, new"
        f" {cell(apart['new'], 100, 1, '+')}, kept {cell(apart['kept'], 100, 1, '+')}."
    )
    head = ["LoRA on", "rank", "parameters", *SCORES.values()]
    lab.publish(
        o,
        "layers",
        {"figures": found},
        head,
        rows,
        note,
        lab.dots(found, {k: f"{title}, % right" for k, title in SCORES.items()}),
    )


if __name__ == "__main__":
    main(layers, lab.Options, __doc__)

"""In which order: general first, special first, or both at once?

    python -m experiments.order --out out

The deep dive's advice is to learn general tasks first and special ones last. General is the
world's SFT, special are the commands of experiments/commands.py. Each way sees the same records as
often; only the order differs:

    general, then special    the chain's SFT, then the commands: two commands, the second one's
                             --model is the first one's --out
    and back                 the same, then BACK steps of general again: what a short reminder mends
    special, then general    from the base the commands, then the chain's SFT from there
    mixed                    from the base, all records shuffled, at the general rate

What it cannot show: tasks that help each other; these share their words alone.
"""

from common.files import write_jsonl
from common.run import main
from data import records
from experiments import commands, lab
from metrics import mean
from tools.report import light, new_figure
from tools.runs import cell, options_of, run

BACK = 40  # steps
WAYS = ("general", "general, then special", "and back", "special, then general", "mixed")
KEYS = ("old", "new", "watched")


def trained(o, seed: int) -> list:
    """The checkpoints of WAYS of one seed."""
    home, chain = lab.place(o, "order", seed), lab.chain(o, seed)
    general = options_of(chain / "sft")
    commands.learn(o, chain / "sft", home / "special", seed)
    run("sft.py", home / "back", chain / "sft", model=home / "special", steps=BACK, warmup=5)
    commands.learn(o, general["model"], home / "first", seed)
    run("sft.py", home / "general", chain / "sft", model=home / "first")
    special = records.conversations(home / "commands.jsonl")
    times = round(commands.STEPS * commands.BATCH / len(special))
    every = records.conversations(general["data"]) + times * special
    write_jsonl(home / "mixed.jsonl", every)
    steps = general["steps"] + commands.STEPS * commands.BATCH // general["batch"]
    run("sft.py", home / "mixed", chain / "sft", data=home / "mixed.jsonl", steps=steps)
    return [chain / "sft", *(home / name for name in ("special", "back", "general", "mixed"))]


def draw(rows: dict):
    """The three figures of each way, side by side."""
    picture, (ax,) = new_figure(8.5, 3.6)
    colours = dict(zip(KEYS, ("sft", "ppo", "soft"), strict=True))
    for i, key in enumerate(KEYS):
        at = [n + (i - 1) * 0.27 for n in range(len(WAYS))]
        ys, cis = ([100 * rows[way][key][part] for way in WAYS] for part in ("mean", "ci"))
        ax.bar(at, ys, 0.25, yerr=cis, color=light(colours[key]), ecolor=light("ink"))
        label = {"old": "general", "new": "special", "watched": "watched"}[key]
        ax.annotate(label, (at[0], ys[0]), (0, 4), textcoords="offset points", ha="center",
                    color=light(colours[key]), fontsize=8)  # fmt: skip
    ax.set_xticks(range(len(WAYS)), WAYS)
    ax.set_title("right, %", fontsize=11, color=light("ink"))
    return picture


def order(o: lab.Options):
    lab.begin(o, "order")
    runs = []
    for seed in range(o.seeds):
        home = lab.place(o, "order", seed)
        runs.append([commands.measure(o, folder, seed, home) for folder in trained(o, seed)])
        print(seed, [[round(mean(m[key]), 3) for key in KEYS] for m in runs[-1]], flush=True)
    found, rows = {}, []
    for i, way in enumerate(WAYS):
        of = {key: [seed[i][key] for seed in runs] for key in KEYS}
        found[way] = {key: lab.pooled(seeds) for key, seeds in of.items()}
        found[way]["lost"] = lab.apart([seed[0]["old"] for seed in runs], of["old"])
        rows.append([way, *(cell(found[way][key], 100, 1) for key in ("old", "lost", *KEYS[1:]))])
    head = ["", "general %", "general lost", "special %", "watched %"]
    note = (
        f"seeds: {o.seeds}; {o.n} general prompts and {commands.ASKED} commands each, greedy. The"
        f" commands: {commands.STEPS} steps of {commands.BATCH}; back: {BACK} steps of 32."
    )
    lab.publish(o, "order", {"ways": found}, head, rows, note, draw(found))


if __name__ == "__main__":
    main(order, lab.Options, __doc__)

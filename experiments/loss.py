"""Does a falling training loss mean a better model?

    python -m experiments.loss --out out --seeds 3

Claimed: the training loss goes down whether or not the model gets better at what it is for; this is
the one lesson of evaluation to take along.

Tried: SFT on few demonstrations (--records), for ever more passes over them. Each point is a run of
its own, from the base, that ends at its number of steps: the learning rate warms up and decays to 0
within each, and all else is as in the chain's own SFT, but for the batch. Three figures of each:

    training loss    Σ -log p(y_t | x, y_<t) / number of targets, of those demonstrations
    held-out loss    the same of demonstrations to other prompts
    gold             the rater's mean score of answers sampled at temperature 1

What it cannot show: the demonstrations are bad as often as good, so that a model may imitate them
ever better and please no more; where all are good, both losses lie nearer to the score. A point's
run differs from the next in its decay too, not in its steps alone.
"""

from dataclasses import dataclass

from common.run import main, opt, pick_device
from data import records
from data.world import world
from experiments import lab
from metrics import ratio
from tools import evals
from tools.report import light, new_figure
from tools.runs import cell, kept, run

STEPS = (10, 20, 40, 80, 160, 320)
BATCH, WARMUP = 16, 5
CURVES = {  # figure: label, colour
    "train": ("training loss", "sft"),
    "held": ("held-out loss", "bad"),
    "gold": ("gold, sampled", "good"),
}


@dataclass
class Options(lab.Options):
    n: int = opt(300, "how many held-out prompts, and held-out demonstrations", at_least=2)
    records: int = opt(300, "demonstrations to train on", at_least=BATCH)


def demonstrations(o, seed: int) -> tuple[list, list]:
    """The first demonstrations of a seed's training split and of its held-out one."""
    train, held = records.split(records.conversations(lab.chain(o, seed) / "world" / "sft.jsonl"))
    return train[: o.records], held[: o.n]


def losses(o, folder, seed: int) -> dict:
    """{"train", "held": [(Σ -log p of an answer's tokens, their number)]} of a checkpoint."""
    model, tok = evals.read(o, folder.name, folder, pick_device(o.device))
    both = zip(("train", "held"), demonstrations(o, seed), strict=True)
    return {name: evals.held_out_losses(model, tok, some) for name, some in both}


def tuned(o, seed: int, steps: int) -> dict:
    """One SFT run on the few demonstrations → its figures' items."""
    mine, chain = lab.place(o, "loss", seed), lab.chain(o, seed)
    few, out = mine / f"few-{o.records}.jsonl", mine / f"steps{steps}-{o.records}"
    evals.write_jsonl(few, demonstrations(o, seed)[0])
    run("sft.py", out, chain / "sft", data=few, steps=steps, batch=BATCH, warmup=WARMUP, seed=seed)
    return measured(o, out, seed)


def measured(o, folder, seed: int) -> dict:
    mine = lab.place(o, "loss", seed)
    of = [folder, *demonstrations(o, seed)]
    found = kept(mine / f"{folder.name}-losses-{o.n}.json", lambda: losses(o, folder, seed), of)
    lines = lab.measure(o, folder, seed, mine)["lines"]
    return found | {"gold": lab.items(lines, "gold"), "right": lab.items(lines, "right")}


def over_seeds(found: list[dict]) -> dict:
    """[a seed's items] → {figure: over all seeds}."""
    return {key: lab.pooled([seed[key] for seed in found], ratio) for key in found[0]}


def draw(o, points: dict, whole: dict):
    """Both losses on the left axis, gold on the right one, by passes over the demonstrations; the
    chain's gold as a line.
    """
    fig, (ax,) = new_figure(7, 3.8)
    right = ax.twinx()
    right.spines[:].set_visible(False)
    right.tick_params(colors=light("soft"), labelsize=9, length=0)
    passes = [steps * BATCH / o.records for steps in STEPS]
    for key, (label, colour) in CURVES.items():
        axes = right if key == "gold" else ax
        ys, cis = ([points[s][key][part] for s in STEPS] for part in ("mean", "ci"))
        axes.errorbar(passes, ys, cis, color=light(colour), marker="o", capsize=3)
        raised = 6 if key == "gold" else 0  # above the chain's line
        axes.annotate(label, (passes[-1], ys[-1]), (6, raised), textcoords="offset points",
                      color=light(colour), va="center", annotation_clip=False)  # fmt: skip
    goal = whole["gold"]["mean"]
    right.axhline(goal, color=light("good"), linestyle=":", linewidth=1)
    right.text(passes[0], goal - 0.08, "gold of the chain's SFT", color=light("good"), fontsize=9)
    ax.set(xscale="log", ylim=(0, None), xlabel=f"passes over {o.records} demonstrations")
    ax.set_ylabel("nats a token")
    right.set(ylim=(0, world.PERFECT), ylabel=f"gold ({world.PERFECT:g}: perfect)")
    ax.set_xticks(passes, [f"{p:.2g}" for p in passes])
    ax.minorticks_off()
    ax.set_xlim(passes[0] * 0.9, passes[-1] * 1.9)  # room for the labels
    return fig


def loss(o: Options):
    lab.begin(o, "loss")
    seeds = range(o.seeds)
    points = {steps: over_seeds([tuned(o, seed, steps) for seed in seeds]) for steps in STEPS}
    whole = over_seeds([measured(o, lab.chain(o, seed) / "sft", seed) for seed in seeds])
    rows = []
    for steps, f in (*points.items(), ("the chain's SFT", whole)):
        passes = f"{steps * BATCH / o.records:.1f}" if f is not whole else "–"
        row = [str(steps), passes, *(cell(f[key]) for key in ("train", "held"))]
        rows.append([*row, cell(f["gold"], digits=2), cell(f["right"], 100, 1)])
    head = ["steps", "passes", "training loss", "held-out loss", "gold, sampled"]
    note = (
        f"seeds: {o.seeds}; {o.records} demonstrations, {BATCH} a step; {o.n} held-out prompts and"
        " demonstrations. The chain's SFT has seen every demonstration once, also these."
    )
    figures = {"points": points, "chain": whole}
    lab.publish(o, "loss", figures, [*head, "right, sampled %"], rows, note, draw(o, points, whole))


if __name__ == "__main__":
    main(loss, Options, __doc__)

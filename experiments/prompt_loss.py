"""Loss on the prompts too, against answers alone.

    python -m experiments.prompt_loss --out out --seeds 3

The deep dive says to mask the prompts: a model that must learn them too wastes capacity. Wu et al.
2024 (instruction modelling) say the opposite for few demonstrations whose answers are short beside
their prompts: there the loss on prompts keeps the model from overfitting the answers. Tried: sft.py
with and without --prompt-loss, from the base, all else the same:

    masked          Σ over the answers' tokens of -log p / their number
    prompts too     Σ over all tokens but the first of -log p / their number

on all of the world's demonstrations, none of them seen twice, and on FEW, seen five times. Learning
rate and steps are equal. The mean is over more tokens, so that an answer's token weighs less with
the prompts; the note has the answers' share of all targets. Measured on held-out prompts: gold and
right of answers at temperature 1; and the loss of held-out demonstrations, of their answers alone
in both cases.

What it cannot show: the base has read the world's facts and many of the prompts' words in
pre-training, so that the prompts have little left to teach; with a base that has not they might.
"""

from dataclasses import dataclass
from pathlib import Path

from common import hub
from common.files import write_jsonl
from common.run import main, opt, pick_device
from data import records, templates
from experiments import lab
from metrics import ratio
from packing import IGNORE
from tools import evals
from tools.report import light, new_figure
from tools.runs import cell, difference, figure, kept, run

FEW = 300
BATCH, WARMUP = 16, 10
WAYS = {"all": 100, "few": 100}  # steps
ARMS = {False: "masked", True: "prompts too"}


@dataclass
class Options(lab.Options):
    n: int = opt(220, "how many held-out prompts, and held-out demonstrations", at_least=2)


def demonstrations(o, seed: int) -> tuple[list, list]:
    """A seed's demonstrations → (training split, the first n held out)."""
    train, held = records.split(records.conversations(lab.chain(o, seed) / "world" / "sft.jsonl"))
    return train, held[: o.n]


def weight(tok, found) -> float:
    """The answers' share of the tokens that are targets where prompts are trained too."""
    rendered = [templates.render(tok, r["messages"]) for r in found]
    return ratio([(sum(x != IGNORE for x in lab), len(ids) - 1) for ids, lab in rendered])


def file_of(o, seed: int, way: str) -> Path:
    if way == "all":
        return lab.chain(o, seed) / "world" / "sft.jsonl"
    few = lab.place(o, "prompt_loss", seed) / f"few-{FEW}.jsonl"
    write_jsonl(few, demonstrations(o, seed)[0][:FEW])
    return few


def tuned(o, seed: int, way: str, prompts: bool) -> dict:
    """One run → {"gold", "right", "loss": items}."""
    here, chain = lab.place(o, "prompt_loss", seed), lab.chain(o, seed)
    out = here / f"{way}-{ARMS[prompts].split()[0]}"
    given = dict(steps=WAYS[way], batch=BATCH, warmup=WARMUP, seed=seed, prompt_loss=prompts)
    run("sft.py", out, chain / "sft", data=file_of(o, seed, way), **given)
    held = demonstrations(o, seed)[1]

    def compute():
        model, tok = evals.read(o, out.name, out, pick_device(o.device))
        return evals.held_out_losses(model, tok, held)

    loss = kept(here / f"{out.name}-loss-{o.n}.json", compute, [out, held])
    lines = lab.measure(o, out, seed, here)["lines"]
    return {"gold": lab.items(lines, "gold"), "right": lab.items(lines, "right"), "loss": loss}


def picture(rows: dict):
    """Gold, right and the held-out loss: masked beside prompts too, for all and for few."""
    drawn, axes = new_figure(10, 3.4, 3)
    titles = {"gold": "gold, sampled", "right": "right, sampled, %", "loss": "held-out loss"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        scale = 100 if key == "right" else 1
        for k, (arm, colour) in enumerate(zip(ARMS.values(), ("good", "bad"), strict=True)):
            cells = [rows[way][arm][key] for way in WAYS]
            xs = [i + 0.38 * k for i in range(len(WAYS))]
            ys, cis = ([scale * f[part] for f in cells] for part in ("mean", "ci"))
            ax.bar(xs, ys, 0.34, yerr=cis, color=light(colour), ecolor=light("ink"))
            for x, y, ci in zip(xs, ys, cis, strict=True):
                text = f"{y:.1f}" if scale == 100 else f"{y:.2f}"
                ax.annotate(text, (x, y + ci), (0, 2), textcoords="offset points", ha="center")
            if key == "loss":
                ax.annotate(arm, (xs[0], ys[0] / 2), rotation=90, ha="center", va="center",
                            color="white")  # fmt: skip
        names = [f"{'all' if way == 'all' else FEW},\n{steps} steps" for way, steps in WAYS.items()]
        ax.set_xticks([i + 0.19 for i in range(len(WAYS))], names, color=light("ink"))
        ax.set_title(title, fontsize=10, color=light("ink"))
    return drawn


def over_seeds(found: dict) -> dict:
    """{prompts trained: [a seed's items]} → {arm: figures}, and prompts too minus masked."""
    masked, whole, rows = found[False], found[True], {}
    for prompts, arm in ARMS.items():
        seeds = found[prompts]
        rows[arm] = {key: figure([s[key] for s in seeds]) for key in ("gold", "right")}
        rows[arm]["loss"] = lab.pooled([s["loss"] for s in seeds], ratio)
    rows["difference"] = {
        key: difference([s[key] for s in whole], [s[key] for s in masked])
        for key in ("gold", "right")
    }
    pairs = [zip(w["loss"], m["loss"], strict=True) for w, m in zip(whole, masked, strict=True)]
    losses = [[(a - b, n) for (a, n), (b, _) in pair] for pair in pairs]
    rows["difference"]["loss"] = lab.pooled(losses, ratio)
    return rows


def prompt_loss(o: Options):
    lab.begin(o, "prompt_loss")
    rows = {
        way: over_seeds({p: [tuned(o, s, way, p) for s in range(o.seeds)] for p in ARMS})
        for way in WAYS
    }
    train = demonstrations(o, 0)[0]
    share = weight(hub.load(lab.chain(o, 0) / "sft")[1], train)
    head = ["demonstrations", "steps", "loss on", "gold, sampled", "right, sampled %"]
    table = []
    for way, arms in rows.items():
        for arm, f in arms.items():
            sign = "+" if arm == "difference" else ""
            name = f"{len(train):,}" if way == "all" else str(FEW)
            row = [name, str(WAYS[way]), arm, cell(f["gold"], digits=2, sign=sign)]
            table.append([*row, cell(f["right"], 100, 1, sign), cell(f["loss"], 1, 3, sign)])
    note = (
        f"seeds: {o.seeds}; {BATCH} a step; {o.n} held-out prompts and demonstrations each."
        f" Of all targets with the prompts, {100 * share:.0f} % are the answers’."
    )
    head, found = [*head, "held-out loss"], {"rows": rows, "answers": share}
    lab.publish(o, "prompt_loss", found, head, table, note, picture(rows))


if __name__ == "__main__":
    main(prompt_loss, Options, __doc__)

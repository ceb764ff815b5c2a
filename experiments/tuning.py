"""QLoRA, LoRA and full fine-tuning on the questions of two benchmarks.

    python -m experiments.tuning --data arc_easy.jsonl,piqa.jsonl --out out

The claim: on standard benchmarks QLoRA stays within 1 to 2 % of full-precision fine-tuning.

Each way is one sft.py run on the right answers to the benchmarks' questions, half and half; the
question is read, the answer and its end are trained. The same text is scored afterwards, on
questions that were not trained on:

    acc        the likeliest choice is the right one       argmax_k log p(choice_k | question)
    acc_norm   per character                               argmax_k log p(choice_k) / len(choice_k)
    p(right)   softmax_k(log p(choice_k))[right]: acc without its jumps, so it sees smaller changes
    nats       -log p(right choice): the loss that is trained

Of a benchmark's questions those that records.held_out takes choose between two learning rates (by
nats, on seed 0; QLoRA takes LoRA's); half of the others are trained on, --n of the other half are
measured. QLoRA is measured as it was trained, its adapter on the 4-bit base. A difference is taken
question by question; its interval is over questions, not over seeds.

What it cannot show: other models and sizes (4 bits cost a small model more), long training, or
skills that tuning must teach: a few hundred questions teach a form of answer, hardly knowledge.
"""

import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import files, tuning
from common.run import main, opt, pick_device
from data import benchmarks, records, templates
from experiments import lab
from metrics import mean, multiple_choice
from tools.report import light, new_figure
from tools.results import table
from tools.runs import cell, difference, figure, kept, run

WAYS = {"full": {}, "lora": dict(lora=16), "qlora": dict(lora=16, quant="nf4")}
RATES = {"full": (5e-5, 2e-4), "lora": (3e-4, 1.5e-3)}
NAMES = {
    "before": "before",
    "before4": "before, in 4 bits",
    "full": "every weight",
    "lora": "LoRA r = 16",
    "qlora": "QLoRA r = 16",
}
SYSTEM = {"role": "system", "content": ""}  # the format's own would be half of what is read
CLAIM = 0.02
SCALES = {"acc": (100, 1), "acc_norm": (100, 1), "right": (100, 1), "nats": (1, 2)}  # and digits


@dataclass
class Options(lab.Options):
    data: str = opt("", "the benchmarks' files, with a comma between")
    model: str = opt("smollm2", "checkpoint folder to start from")
    steps: int = opt(32, "optimizer steps", at_least=1)
    batch: int = opt(8, "questions per step", at_least=2)
    characters: int = opt(130, "longest question with its longest choice", at_least=1)
    n: int = opt(100, "questions of each benchmark that are measured", at_least=2)
    choosing: int = opt(40, "of each benchmark, that choose the learning rate", at_least=1)


# ---------------------------------------------------------------- the questions
def asked(query: str) -> list[dict]:
    return [SYSTEM, {"role": "user", "content": query.strip()}]


def encode(tok, query: str, choice: str):
    """As metrics.choice_ids, in the form that is trained: the model's chat format, end included."""
    return templates.answer_ids(tok, asked(query), choice)


def parts(items: list, o) -> dict:
    """A benchmark's questions → {"train", "choose", "measure"}, the same for every seed: short
    ones, and of those in the same words the first.
    """
    once = {}
    for x in items:
        if len(x["query"]) + max(map(len, x["choices"])) <= o.characters:
            once.setdefault(" ".join(x["query"].split()), x)
    choose = [x for x in once.values() if records.held_out(asked(x["query"]))]
    rest = [x for x in once.values() if not records.held_out(asked(x["query"]))]
    random.Random(0).shuffle(rest)
    half = len(rest) // 2
    cut = {"train": rest[half:], "choose": choose[: o.choosing], "measure": rest[:half][: o.n]}
    if empty := [part for part, some in cut.items() if not some]:
        raise ValueError(f"--data: too few questions, there is none to {empty[0]}")
    return cut


def read(o) -> dict:
    """{benchmark: its parts}"""
    cut = {}
    for file in o.data.split(","):
        kind, items = benchmarks.items(file)
        if kind != "choices":
            raise ValueError(f"{file}: records of choices were expected (got {kind})")
        cut[Path(file).stem] = parts(items, o)
    return cut


# ---------------------------------------------------------------- runs and what is measured
def tune(o, folder: Path, data: Path, way: str, lr: float, seed: int) -> tuple[Path, dict]:
    """One SFT run → its folder and its cost."""
    out = folder / f"{way}-{round(lr * 1e6)}e-6"  # no dot: the cost lies beside it
    given = dict(model=o.model, data=data, steps=o.steps, batch=o.batch, lr=lr, seed=seed)
    return out, run("sft.py", out, warmup=o.steps // 10, device=o.device, **given, **WAYS[way])


def tune_all(o, cut: dict) -> tuple[dict, dict]:
    """→ {way: [each seed's (folder, cost)]}, {way: {learning rate: its loss}}."""
    data = lab.place(o, "tuning", 0) / f"train-{o.characters}.jsonl"
    size, right = min(len(some["train"]) for some in cut.values()), []
    for some in cut.values():
        for x in some["train"][:size]:
            answer = {"role": "assistant", "content": x["choices"][x["gold"]]}
            right.append({"messages": [*asked(x["query"]), answer]})
    files.write_jsonl(data, right)
    home = [lab.place(o, "tuning", seed) for seed in range(o.seeds)]
    tried = {way: {lr: tune(o, home[0], data, way, lr, 0) for lr in RATES[way]} for way in RATES}
    losses, runs = {way: {} for way in RATES}, {}
    for way, by in tried.items():
        for lr, (folder, _) in by.items():
            losses[way][lr] = choosing_loss(o, folder, way, cut)
    for way in WAYS:
        rates = losses["full" if way == "full" else "lora"]
        lr = min(rates, key=rates.get)
        runs[way] = [tune(o, home[seed], data, way, lr, seed) for seed in range(o.seeds)]
    return runs, losses


def load(o, folder, way: str):
    """A way's model as it was trained: QLoRA's adapter on its 4-bit base."""
    four = way in ("qlora", "before4")
    how = replace(o, quant="nf4" if four else "none", keep_base=way == "qlora")
    return tuning.read(how, folder, pick_device(o.device))


def lines(model, tok, items: list) -> list[dict]:
    """What a model makes of each question: {"acc", "acc_norm", "right", "nats"}."""
    out = []
    for x, f in zip(items, multiple_choice(model, tok, items, encode), strict=True):
        gold, logps = x["gold"], torch.tensor(f["logprobs"], dtype=torch.float64)
        line = {"acc": float(f["choice"] == gold), "acc_norm": float(f["choice_norm"] == gold)}
        out.append(line | {"right": logps.softmax(0)[gold].item(), "nats": -logps[gold].item()})
    return out


def choosing_loss(o, folder: Path, way: str, cut: dict) -> float:
    """Nats an answer on the questions that choose the learning rate, kept."""
    right = [
        {"query": x["query"], "choices": [x["choices"][x["gold"]]], "gold": 0}
        for some in cut.values()
        for x in some["choose"]
    ]

    def compute():
        return mean([line["nats"] for line in lines(*load(o, folder, way), right)])

    return kept(folder / f"choose-{len(right)}-{o.characters}.json", compute, [folder, way, right])


def measured(o, keep_in: Path, folder, way: str, cut: dict) -> dict:
    """{benchmark: lines, "both": those of all}; each hundred questions are kept, so that a larger
    --n measures only what is new.
    """
    found = {name: [] for name in cut}
    for at in range(0, o.n, 100):
        here = slice(at, min(at + 100, o.n))

        def compute(here=here):
            model, tok = load(o, folder, way)
            return {name: lines(model, tok, x["measure"][here]) for name, x in cut.items()}

        name = f"{way}-{o.characters}-{here.start}-{here.stop}.json"
        of = [Path(folder), way, {name: x["measure"][here] for name, x in cut.items()}]
        for benchmark, some in kept(keep_in / name, compute, of).items():
            found[benchmark] += some
    return found | {"both": [line for some in found.values() for line in some]}


# ---------------------------------------------------------------- figures
def compared(ours: list, before: list, full: list) -> dict:
    """A way's figures, and how far they are above those before tuning and above every weight's,
    question by question. Each: a list of lines for every seed.
    """
    out = {}
    for key in SCALES:
        mine, first, best = ([lab.items(s, key) for s in some] for some in (ours, before, full))
        out[key] = figure(mine)
        out[f"{key} gained"] = difference(mine, first)
        out[f"{key} to full"] = difference(mine, best)
    return out


def verdict(f: dict) -> str:
    """Whether a way is at most CLAIM below every weight: the whole interval says so, none of it, or
    a part.
    """
    low, high = f["mean"] - f["ci"], f["mean"] + f["ci"]
    return "yes" if low >= -CLAIM else "no" if high < -CLAIM else "open"


def rows(figures: dict) -> list:
    out = []
    for name, ways in figures.items():
        for way, f in ways.items():
            row = [name.replace("_", " "), NAMES[way], *(cell(f[k], *SCALES[k]) for k in SCALES)]
            row += [cell(f[k], 100, 1, "+") for k in ("acc gained", "acc to full", "right to full")]
            out.append([*row, verdict(f["acc to full"])])
    return out


def costs(runs: dict) -> str:
    """Of seed 0; a process's peak memory starts from this one's, which is lower."""
    out = []
    for way, ((_, c), *_) in runs.items():
        minutes = "–" if c["core_minutes"] is None else f"{c['core_minutes']:.1f}"
        out.append([NAMES[way], f"{c['share']:.2f}", minutes, f"{c['gb']:.2f}"])
    return table(["", "trained %", "core-minutes", "GB"], out)


def draw(figures: dict):
    """What each way has less than every weight, and the claim's band."""
    fig, axes = new_figure(8.4, 3.6, 2)
    ways = {"before": "base", "lora": "sft", "qlora": "ppo"}
    for ax, key, title in zip(axes, ("acc", "right"), ("accuracy", "p(right choice)"), strict=True):
        ax.axvspan(-100 * CLAIM, 100 * CLAIM, color=light("line"), zorder=0)
        ax.axvline(0, color=light("soft"), linewidth=1)
        for i, found in enumerate(figures.values()):
            for j, (way, colour) in enumerate(ways.items()):
                f, y = found[way][f"{key} to full"], -i - (j - 1) / 4
                x, ci = 100 * f["mean"], 100 * f["ci"]
                ax.errorbar(x, y, xerr=ci, marker="o", capsize=3, color=light(colour))
                text = dict(textcoords="offset points", fontsize=7.5, va="center")
                label = f"{NAMES[way]} {x:+.1f}"
                ax.annotate(label, (x + ci, y), (5, 0), color=light(colour), **text)
        ax.set_yticks([-i for i in range(len(figures))], [n.replace("_", " ") for n in figures])
        ax.grid(visible=False)
        ax.margins(x=0.3)
        ax.set_xlabel(f"{title}: points above every weight's", color=light("soft"))
    return fig


def tune_and_compare(o: Options):
    if not o.data:
        print("tuning: left out, it needs --data: benchmarks' files of choices", file=sys.stderr)
        return
    lab.begin(o, "tuning")
    cut = read(o)
    runs, losses = tune_all(o, cut)
    home, figures = lab.place(o, "tuning", 0), {}
    found = {way: [measured(o, f, f, way, cut) for f, _ in each] for way, each in runs.items()}
    for way in ("before", "before4"):
        found[way] = [measured(o, home, o.model, way, cut)] * o.seeds
    for name in (*cut, "both"):
        some = {way: [s[name] for s in seeds] for way, seeds in found.items()}
        figures[name] = {w: compared(some[w], some["before"], some["full"]) for w in NAMES}
    head = ["", "", "acc %", "acc_norm %", "p(right) %", "nats", "acc gained"]
    head += ["acc above every weight", "p(right) above it", "at most 2 below"]
    tried = "; ".join(
        f"{NAMES[way]} " + ", ".join(f"{lr:g}: {loss:.3f}" for lr, loss in by.items())
        for way, by in losses.items()
    )
    sizes = " and ".join(f"{len(some['measure'])} of {name}" for name, some in cut.items())
    note = (
        f"{costs(runs)}\n\n{o.model}; seeds: {o.seeds}, {o.steps} steps of {o.batch} questions;"
        f" measured on {sizes}, {pick_device(o.device).type}. Nats at the learning rates tried, on"
        f" other questions: {tried}."
    )
    result = {"figures": figures, "cost": {w: [c for _, c in r] for w, r in runs.items()}}
    lab.publish(o, "tuning", result | {"tried": losses}, head, rows(figures), note, draw(figures))


if __name__ == "__main__":
    main(tune_and_compare, Options, __doc__)

"""The KL penalty: too small, and PPO learns to please the reward model instead of the gold rater;
too large, and it learns nothing.

    python -m experiments.kl --out out

The deep dive's claim, of the coefficient β of ppo.py's penalty. One seed: PPO with each β of
COEFS, all else as in the chain, and once without a penalty for LONG rounds, whose log shows reward,
gold and KL of every round. They are drawn over d = √KL, KL = E_π[log π - log π_sft] per answer, as
Gao, Schulman & Hilton 2022 ("Scaling laws for reward model overoptimization") have it, with their
forms of the gold that is gained over SFT, fitted by least squares:

    PPO          R(d) = d (α - β log d)        highest at d = exp(α/β - 1)
    best of n    R(d) = d (α - β d)            highest at d = α / 2β;  KL ≤ log n - (n-1)/n

Best of n is exact for SAMPLES drawn answers: an answer with i answers below it is the best of n
drawn without replacement with probability C(i, n-1) / C(SAMPLES, n). Its KL is an upper bound,
reached where no two answers are alike (Beirami et al. 2024).

Rounds of the log are 128 training prompts, each compared with SFT on such prompts; the rows of the
table are held-out prompts. What this cannot show: how the curve moves with a larger reward model,
which is what the paper's forms are for.
"""

import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from common.run import main, opt, pick_device
from data import records
from data.world import world
from experiments import lab
from metrics import mean
from tools import evals
from tools.report import light, new_figure, smooth
from tools.runs import cell, difference, figure, kept, run

COEFS = (0.05, 0.2, 0.5, 5.0)
ROUNDS, LONG = 20, 40
SAMPLES = 64  # answers to a prompt, for best of n
NS = (1, 2, 4, 8, 16, 32, 64)
SHOWN = ("best of 4", "best of 16", "best of 64")


@dataclass
class Options(lab.Options):
    best_of: int = opt(200, "how many of the prompts are answered 64 times", at_least=2)


# ---------------------------------------------------------------- forms
def best_of(scores: list, values: list, n: int) -> float:
    """The expected value of the answer with the highest score among n, drawn without replacement
    from these; of equal scores each is as likely."""
    count, total = len(scores), 0.0
    order = enumerate(sorted(range(count), key=scores.__getitem__))
    for _, same in groupby(order, key=lambda place: scores[place[1]]):
        below, which = zip(*same, strict=True)
        chance = sum(math.comb(i, n - 1) for i in below) / math.comb(count, n)
        total += chance * mean([values[j] for j in which])
    return total


def bend(form: str, d):
    """What β multiplies, d log d or d², of an array d ≥ 0."""
    return d**2 if form == "best of n" else d * np.log(np.maximum(d, 1e-12))


def fit(form: str, d, gained) -> dict:
    """α and β of R(d) = αd - β bend(d), by least squares; the residuals' deviation; and where R is
    highest, None where it never falls."""
    d = np.asarray(d)
    basis = np.stack((d, -bend(form, d)), 1)
    (alpha, beta), *_ = np.linalg.lstsq(basis, np.asarray(gained), rcond=None)
    off = float(np.std(basis @ (alpha, beta) - gained))
    peak = None
    if beta > 0:
        peak = float(alpha / (2 * beta) if form == "best of n" else np.exp(alpha / beta - 1))
    return {"alpha": float(alpha), "beta": float(beta), "off": off, "peak": peak}


# ---------------------------------------------------------------- runs
def tuned(o, coef: float, rounds=ROUNDS) -> tuple[Path, dict]:
    """PPO with a coefficient → its folder and its cost; the chain's own run has no cost."""
    chain = lab.chain(o, 0)
    if (coef, rounds) == (0.2, ROUNDS):
        return chain / "ppo", {}
    folder = lab.place(o, "kl", 0) / f"ppo-{coef:g}-{rounds}"
    return folder, run("ppo.py", folder, of=chain / "ppo", kl_coef=coef, iterations=rounds)


def measured(o, folder: Path, held=None) -> dict:
    chain, keep_in = lab.chain(o, 0), lab.place(o, "kl/training" if held else "kl", 0)
    return lab.measure(o, folder, 0, keep_in, chain / "sft", chain / "reward", held)


def sampled(o) -> list:
    """SAMPLES answers of the SFT model to each prompt → [(scores, golds)], one for each prompt."""
    chain, held = lab.chain(o, 0), lab.held_out(o, 0)[: o.best_of]

    def compute():
        asked = [r for r in held for _ in range(SAMPLES)]
        model, tok = evals.read(o, "sft", chain / "sft", pick_device(o.device))
        answers = evals.answer(model, tok, [r["messages"] for r in asked], o, 1.0, 16)
        scores = lab.proxy(o, chain / "reward", asked, answers)
        golds = [line["gold"] for line in evals.rate(asked, answers)]
        starts = range(0, len(asked), SAMPLES)
        return [(scores[i : i + SAMPLES], golds[i : i + SAMPLES]) for i in starts]

    of = [chain / "sft", chain / "reward", held, SAMPLES, *lab.answering(o)]
    return kept(lab.place(o, "kl", 0) / f"best-of-{len(held)}.json", compute, of)


def trajectory(o, folder: Path) -> dict:
    """A run's log round by round: d, and what proxy and gold have gained over the SFT model's on
    training prompts."""
    chain = lab.chain(o, 0)
    prompts = records.conversations(chain / "world" / "prompts.jsonl", "prompt")
    start = measured(o, chain / "sft", records.split(prompts)[0][: 2 * o.n])
    proxy, gold = mean(start["scores"]), mean([line["gold"] for line in start["lines"]])
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "d": [math.sqrt(max(r["kl"], 0.0)) for r in log],
        "proxy": [r["reward"] - proxy for r in log],
        "gold": [r["gold"] - gold for r in log],
    }


# ---------------------------------------------------------------- table and picture
def row_of(name: str, found: dict, sft: dict) -> dict:
    """A checkpoint's figures."""
    golds, base = lab.items(found["lines"], "gold"), lab.items(sft["lines"], "gold")
    scores = [(x, 1) for x in found["scores"]]
    kls = figure([[(x, 1) for x in found["kl"]]])
    return {
        "name": name,
        "kl": kls,
        "d": math.sqrt(max(kls["mean"], 0.0)),
        "proxy": figure([scores]),
        "gold": figure([golds]),
        "gained": difference([golds], [base]),
        "proxy_gained": difference([scores], [[(x, 1) for x in sft["scores"]]]),
        "right": mean([line["right"] for line in found["lines"]]),
        "words": mean([len(line["answer"].split()) for line in found["lines"]]),
    }


def best_row(n: int, answers: list) -> dict:
    """Best of n: its figures over what one answer gets."""
    once = [(mean(scores), mean(golds)) for scores, golds in answers]
    proxy = [(best_of(scores, scores, n), 1) for scores, _ in answers]
    gold = [(best_of(scores, golds, n), 1) for scores, golds in answers]
    nats = math.log(n) - (n - 1) / n
    return {
        "name": f"best of {n}",
        "kl": nats,
        "d": math.sqrt(nats),
        "proxy": figure([proxy]),
        "gold": figure([gold]),
        "gained": difference([gold], [[(g, 1) for _, g in once]]),
        "proxy_gained": difference([proxy], [[(p, 1) for p, _ in once]]),
    }


def fall(answers: list, n: int, more: int) -> dict:
    """Best of n's gold minus that of best of more."""
    golds = [[[(best_of(*one, k), 1) for one in answers]] for k in (n, more)]
    return difference(*golds)


def words(row: dict, left: float) -> list[str]:
    """A row of the table. left: the gold that SFT left to a perfect answer."""
    nats = cell(row["kl"], digits=2) if isinstance(row["kl"], dict) else f"≤ {row['kl']:.2f}"
    figures = [cell(row["proxy"], digits=2), cell(row["gold"], digits=2)]
    figures.append(cell(row["gained"], 100 / left, 1))
    more = [f"{100 * row['right']:.1f}", f"{row['words']:.1f}"] if "right" in row else ["–", "–"]
    return [row["name"], nats, f"{row['d']:.2f}", *figures, *more]


def note(o, fits: dict, falls: dict, log: dict) -> str:
    """The line under the table: n, the fits, and the long run's highest gold."""
    said = []
    for form, f in fits.items():
        bend = "d" if form == "best of n" else "log d"
        peak = "never highest" if f["peak"] is None else f"highest at d = {f['peak']:.2f}"
        said.append(
            f"{form}: d ({f['alpha']:.3f} - {f['beta']:.3f} {bend}), off by {f['off']:.3f}, {peak}"
        )
    fell = [f"{name} {cell(f, digits=2, sign='+')}" for name, f in falls.items()]
    gold = smooth(log["gold"], 5)
    at = max(range(len(gold)), key=gold.__getitem__)
    return (
        f"One seed; {o.n} held-out prompts, {o.best_of} for best of n. Gold:"
        f" {'; '.join(fell)}. Fits of the gold gained:"
        f" {'; '.join(said)}. Without a penalty, means of five rounds: the most gold in round"
        f" {at + 1}, {gold[at]:+.2f} at d = {smooth(log['d'], 5)[at]:.2f}; at the end"
        f" {gold[-1]:+.2f} at d = {smooth(log['d'], 5)[-1]:.2f}."
    )


def say(ax, text: str, at: tuple, by: tuple, **style):
    ax.annotate(text, at, by, textcoords="offset points", **dict(fontsize=8) | style)


def marks(ax, rows: list, key: str, sign: str, colour: str, named: list, by: tuple, side: str):
    """Runs as marks over d, with the names of some."""
    ax.plot([r["d"] for r in rows], [r[key]["mean"] for r in rows], sign, color=light(colour))
    for r in named:
        say(ax, r["name"], (r["d"], r[key]["mean"]), by, color=light(colour), ha=side)


def picture(runs: list, best: list, log: dict, fits: dict):
    """What is gained over √KL: proxy and gold along the long run, and gold close to SFT."""
    drawn, axes = new_figure(12.0, 3.9, 3)
    titles = ("proxy, deviations", "gold", "gold, close to SFT")
    d, near = np.array(smooth(log["d"], 5)), 1.4 * max(r["d"] for r in best)
    for ax, key, title in zip(axes, ("proxy", "gold", "gold"), titles, strict=True):
        close, line = title == titles[2], smooth(log[key], 5)
        gained = "gained" if key == "gold" else "proxy_gained"
        ax.plot(log["d"], log[key], ".", color=light("ppo"), alpha=0.3)
        ax.plot(d, line, color=light("ppo"), linewidth=1.8)
        inside, far = ([r for r in runs if (r["d"] > near) == x] for x in (False, True))
        shown, named = (inside, inside) if close else (runs, far)
        marks(ax, shown, gained, "o", "sft", named, (-6, 6), "right")
        ns = [r | {"name": r["name"].replace("best of", "n =")} for r in best[1:] if close]
        marks(ax, best, gained, "^", "dpo", ns, (0, -12), "center")
        if key == "gold" and not close:
            top = int(np.argmax(line))
            words, arrow = f"highest at KL {d[top] ** 2:.1f}", dict(arrowstyle="-")
            say(ax, words, (d[top], line[top]), (45, 22), fontweight="bold", arrowprops=arrow)
        for form, at in fits.items() if key == "gold" else []:
            x = np.linspace(0, max(d) if form == "PPO" else 0.8 * near, 200)
            y = at["alpha"] * x - at["beta"] * bend(form, x)
            ax.plot(x, y, "--", color=light("ppo" if form == "PPO" else "dpo"), linewidth=0.9)
        ax.margins(y=0.12)
        ax.set_title(f"{title}, gained over SFT", fontsize=11, color=light("ink"))
        ax.set_xlabel("√KL from SFT, KL in nats an answer", fontsize=9, color=light("soft"))
    axes[2].set_xlim(-0.05, near)
    for ax, words in ((axes[1], "dashed: Gao et al.’s forms"), (axes[2], "● PPO, ▲ best of n")):
        style = dict(ha="right", fontsize=8.5, color=light("soft"), transform=ax.transAxes)
        ax.text(0.98, 0.04, words, **style)
    words, end = "PPO without a penalty,\nround by round", smooth(log["proxy"], 5)[-1]
    say(axes[0], words, (d[-1], end), (-120, -70), color=light("ppo"))
    return drawn


def kl(o: Options):
    lab.begin(o, "kl")
    long, _ = tuned(o, 0.0, LONG)
    folders = {f"β = {coef:g}": tuned(o, coef)[0] for coef in COEFS}
    folders[f"β = 0, {LONG} rounds"] = long
    sft = measured(o, lab.chain(o, 0) / "sft")
    found = {"SFT": sft} | {name: measured(o, folder) for name, folder in folders.items()}
    runs = [row_of(name, x, sft) for name, x in found.items()]
    answers, log = sampled(o), trajectory(o, long)
    best = [best_row(n, answers) for n in NS]
    fits = {
        "PPO": fit("PPO", log["d"], log["gold"]),
        "best of n": fit("best of n", [b["d"] for b in best], [b["gained"]["mean"] for b in best]),
    }
    head = ["", "KL", "√KL", "proxy, deviations", "gold, sampled", "share gained %"]
    head += ["right, sampled %", "words"]
    left = world.PERFECT - mean([line["gold"] for line in sft["lines"]])
    rows = [words(row, left) for row in runs + [b for b in best if b["name"] in SHOWN]]
    top = max(runs, key=lambda r: r["gold"]["mean"])["name"]
    golds = [[lab.items(found[name]["lines"], "gold")] for name in (top, runs[-1]["name"])]
    falls = {
        f"{top} minus {runs[-1]['name']}": difference(*golds),
        "best of 16 minus best of 64": fall(answers, 16, 64),
    }
    result = {"runs": runs, "best": best, "fits": fits, "falls": falls, "log": log}
    drawn = picture(runs, best, log, fits)
    lab.publish(o, "kl", result, head, rows, note(o, fits, falls, log), drawn)


if __name__ == "__main__":
    main(kl, Options, __doc__)

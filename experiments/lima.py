"""A curated thousand against a noisy hundred thousand.

    python -m experiments.lima --out out --seeds 3

Claimed (LIMA, Zhou et al. 2023): 1,000 good and diverse demonstrations teach as much as 100,000
noisy ones. LIMA's thousand was chosen by hand; here tools/curate.py chooses, with one of three
signals for an answer's quality:

    reward model   that of the seed's chain. It has seen far more than the thousand: rankings of
                   about 5,500 prompts, on top of an SFT model of 14,300 demonstrations
    likelihood     the base model's, given the prompt: needs nothing else
    gold           the rater itself, a person who knows the right answer: the most that choosing
                   could bring, and nearest to what LIMA's authors did

The noisy file (data/world/noisy.py): the world's training prompts about five times, each time by
another demonstrator, with wrong and cut answers, refusals, foreign scripts, repeated prompts and
copies planted in it. Nothing of it asks for held-out content.

All arms start from the base and differ in their file alone. Equal steps: STEPS steps of BATCH, so
that a thousand is seen more than once. One epoch: each record once. The score is gold and the
share right of answers to held-out prompts, at temperature 1.

What it cannot show: more knowledge from more data. The base has read this world's facts, and the
demonstrations teach manner; where they must teach facts, a thousand cannot cover them.
"""

import random
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.files import write_jsonl
from common.run import main, opt
from data import records
from data.world import noisy, world
from experiments import lab
from metrics import mean
from tools.report import light, new_figure
from tools.runs import cell, difference, figure, kept, run, words

ALL, SOME, FEW = 100_000, 10_000, 1_000
STEPS, BATCH, WARMUP = 100, 16, 10
BY_GOLD, AT_RANDOM = f"{FEW:,} curated, by gold", f"{FEW:,} at random"
WHOLE = f"all {ALL:,}"
RULES = "format,contamination,duplicates,quality,diversity"
SIGNALS = ("gold", "reward model", "likelihood")


@dataclass
class Options(lab.Options):
    n: int = opt(220, "how many held-out prompts", at_least=2)
    longest: int = opt(6250, "epochs of more steps are left out", at_least=1)


# ---------------------------------------------------------------- the files
def files(o, seed: int) -> dict:
    """{number: a file of so many of the noisy records, all or chosen at random}"""
    found = {n: lab.place(o, "lima", seed) / f"random-{n}.jsonl" for n in (ALL, SOME, FEW)}
    if not found[FEW].exists():
        every = noisy.demonstrations(ALL, seed)
        for n, file in found.items():
            write_jsonl(
                file, every if n == ALL else random.Random(f"chosen {seed}").sample(every, n)
            )
    return found


# ---------------------------------------------------------------- curation
def gold(prompts, answers, found) -> list[float]:
    """For --quality: the rater's own scores."""
    return [world.gold(r["item"], a)[0] for r, a in zip(found, answers, strict=True)]


# A large parent's memory would count as its child's; this one is small.
WEIGH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(status)
"""


def curated(o, seed: int, data: Path, rules: str, signal="") -> tuple[Path, dict]:
    """The file of the FEW records that tools/curate.py keeps, and what that cost: {"core_minutes",
    "gb"}. signal: of quality, one of SIGNALS.
    """
    chain = lab.chain(o, seed)
    judge = {"gold": f"{__file__}:gold", "reward model": chain / "reward"}.get(signal, "")
    name = "-".join(["all" if rules == RULES else rules, *signal.split()])
    out = data.with_name(f"{data.stem.removeprefix('random-')}-{name}.jsonl")

    def compute():
        given = dict(data=data, keep=FEW, out=out, rules=rules, quality=judge, seed=seed)
        given |= dict(against=chain / "world" / "heldout.jsonl", device=o.device, overwrite=True)
        command = [sys.executable, "-m", "tools.curate", *words(given)]
        p = subprocess.run([sys.executable, "-c", WEIGH, *command], capture_output=True, text=True)
        if p.returncode:
            raise ValueError(f"{shlex.join(command)} failed: {p.stderr[-500:]}")
        seconds, kilobytes = map(float, p.stdout.split()[-2:])
        return {"core_minutes": seconds / 60, "gb": kilobytes * 1024 / 1e9}

    of = [data, rules, signal, *([judge] if isinstance(judge, Path) else [])]
    return out, kept(out.with_suffix(".json"), compute, of)


def about(file: Path) -> dict:
    """What is in a file: records from each source, the gold of their answers, the share right."""
    found = records.conversations(file)
    ended = [r["source"] != "cut off" for r in found]
    rated = world.rate(found, [r["messages"][-1]["content"] for r in found], ended)
    return {"sources": Counter(r["source"] for r in found), **rated}


# ---------------------------------------------------------------- training
def tuned(o, seed: int, file: Path, steps=STEPS) -> dict:
    """SFT from the base on a file → {"lines": what lab.measure says, "about": the file}."""
    here, chain = lab.place(o, "lima", seed), lab.chain(o, seed)
    out = here / f"{file.stem}-{steps}"
    given = dict(data=file, steps=steps, batch=BATCH, warmup=min(WARMUP, steps // 4), seed=seed)
    run("sft.py", out, chain / "sft", **given)
    contents = kept(here / f"{file.stem}-about.json", lambda: about(file), [file])
    return {"lines": lab.measure(o, out, seed, here)["lines"], "about": contents}


def files_of(o, seed: int) -> dict:
    """{arm: its file}; of the first seed all arms, of the others the two that are claimed."""
    given = files(o, seed)
    found = {BY_GOLD: curated(o, seed, given[ALL], RULES, "gold")[0]}
    if seed == 0:
        by_reward = curated(o, seed, given[ALL], RULES, "reward model")[0]
        found |= {f"{FEW:,} curated, by the reward model": by_reward}
    found |= {AT_RANDOM: given[FEW]}
    if seed == 0:
        found |= {f"{SOME:,} at random": given[SOME], WHOLE: given[ALL]}
    return found


def arms(o) -> tuple[dict, dict]:
    """{arm: its runs, one of each seed} at equal steps, and after one epoch."""
    seeds = [files_of(o, seed) for seed in range(o.seeds)]
    equal = {
        name: [tuned(o, seed, of[name]) for seed, of in enumerate(seeds) if name in of]
        for name in seeds[0]
    }
    steps = {name: len(records.conversations(file)) // BATCH for name, file in seeds[0].items()}
    once = {name: n for name, n in steps.items() if n <= o.longest}
    return equal, {name: [tuned(o, 0, seeds[0][name], n)] for name, n in once.items()}


# ---------------------------------------------------------------- what is shown
def row_of(name: str, runs: list) -> tuple[dict, list]:
    """A figure of an arm's runs over the seeds, and its row."""
    lines, what = [r["lines"] for r in runs], [r["about"] for r in runs]
    f = {key: figure([lab.items(x, key) for x in lines]) for key in ("gold", "right")}
    shares = [w["sources"].get("demonstrator", 0) / sum(w["sources"].values()) for w in what]
    f["noise"], f["sources"] = 1 - mean(shares), [w["sources"] for w in what]
    f["in_file"] = {key: mean([w[key] for w in what]) for key in ("gold", "right")}
    inside = [f"{100 * f['noise']:.0f}", f"{f['in_file']['gold']:.2f}"]
    inside.append(f"{100 * f['in_file']['right']:.0f}")
    return f, [name, *inside, cell(f["gold"], digits=2), cell(f["right"], 100, 1)]


HEAD = ["its planted noise %", "its gold", "its right %", "gold, sampled", "right, sampled %"]


def picture(equal: dict, epoch: dict):
    """Gold and right of each arm: at equal steps filled, after one epoch hollow."""
    drawn, axes = new_figure(10, 3.4, 2)
    titles = {"gold": f"gold, sampled ({world.PERFECT:g}: perfect)", "right": "right, sampled, %"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        scale = 100 if key == "right" else 1
        for i, (name, f) in enumerate(equal.items()):
            colour = light("good" if "curated" in name else "bad")
            for fill, shown, up in ((colour, f, 0.12), ("white", epoch.get(name), -0.12)):
                if shown is not None:
                    x, error = (scale * shown[key][part] for part in ("mean", "ci"))
                    ax.errorbar(x, -i + up, xerr=error, color=colour, marker="o", mfc=fill)
        ax.set_yticks([-i for i in range(len(equal))], list(equal) if key == "gold" else [])
        ax.set_title(title, fontsize=10, color=light("ink"))
    if epoch:
        axes[1].set_xlabel("filled: equal steps; hollow: one epoch", color=light("soft"))
    return drawn


def costs(o) -> str:
    """What curating all records took: duplicates alone, and every rule with a model's scores."""
    data, said = files(o, 0)[ALL], []
    for name, rules, signal in (
        ("duplicates alone", "duplicates", ""),
        ("every rule, quality by gold", RULES, "gold"),
        ("by the reward model", RULES, "reward model"),
    ):
        cost = curated(o, 0, data, rules, signal)[1]
        said.append(f"{name} {cost['core_minutes']:.1f} core-minutes and {cost['gb']:.1f} GB")
    return "; ".join(said)


def lima(o: Options):
    lab.begin(o, "lima")
    equal, epoch = arms(o)
    shown = [{name: row_of(name, runs) for name, runs in part.items()} for part in (equal, epoch)]
    table = [[*row[:1], "equal steps", *row[1:]] for _, row in shown[0].values()]
    table += [[*row[:1], "one epoch", *row[1:]] for _, row in shown[1].values()]
    scores = {name: [lab.items(r["lines"], "gold") for r in runs] for name, runs in equal.items()}
    gaps = {"at random": difference(scores[BY_GOLD], scores[AT_RANDOM])}
    gaps[WHOLE] = difference(scores[BY_GOLD][:1], scores[WHOLE])
    said = ", ".join(f"minus {name} {cell(f, digits=2, sign='+')}" for name, f in gaps.items())
    once = ", or one epoch" if epoch else ""
    note = (
        f"seeds: {o.seeds} of {FEW:,} by gold and at random at equal steps, else one;"
        f" {STEPS} steps of {BATCH}{once}; {o.n} held-out prompts each. Gold at equal steps,"
        f" curated by gold {said}. Curating {ALL:,} records: {costs(o)}."
    )
    figures = [{name: f for name, (f, _) in part.items()} for part in shown]
    drawn = picture(*figures)
    kept_as = {"equal": figures[0], "epoch": figures[1], "gaps": gaps}
    lab.publish(o, "lima", kept_as, ["records", "trained", *HEAD], table, note, drawn)


if __name__ == "__main__":
    main(lima, Options, __doc__)

"""What the experiments share: the seeds' finished runs, a checkpoint's answers and their gold, and
where figures, table and picture go.

    make experiments/NAME        OUT/experiments/NAME.json, docs/experiments/NAME.png, RESULTS.md

Each experiment starts from the chains in OUT/seed0, OUT/seed1, … and keeps what it trains and
measures in OUT/experiments/NAME, so that the same command goes on after an interruption.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import tuning
from common.run import opt, pick_device
from data import records
from metrics import bootstrap, kl, mean
from tools import evals
from tools.report import light, new_figure
from tools.results import put, table
from tools.runs import check_marks, kept


@dataclass
class Options(tuning.Reading):
    out: str = opt("out", "folder of seed0, seed1, …, each with a finished chain")
    seeds: int = opt(3, "how many of them", at_least=1)
    n: int = opt(500, "how many held-out prompts", at_least=2)
    max_new_tokens: int = opt(64, "longest answer in tokens", at_least=1)
    batch: int = opt(128, "answers sampled together", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")
    results: str = opt("RESULTS.md", "file with the marks that the table goes between")
    pictures: str = opt("docs/experiments", "folder of the pictures")


def chain(o, seed: int) -> Path:
    """The folder of a seed's chain. FileNotFoundError where it has not finished."""
    folder = Path(o.out) / f"seed{seed}"
    for stage in ("sft", "reward", "ppo", "dpo", "simpo"):
        if not (folder / stage / "config.json").exists():
            raise FileNotFoundError(
                f"{folder / stage}: no finished stage; make ppo dpo simpo OUT={folder} SEED={seed}"
            )
    return folder


def place(o, name: str, seed: int) -> Path:
    """The folder of an experiment's runs with one seed."""
    folder = Path(o.out) / "experiments" / name / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def held_out(o, seed: int) -> list[dict]:
    """The first n held-out prompts of a seed's world, each with its `item` for the gold rater."""
    return records.conversations(chain(o, seed) / "world" / "heldout.jsonl", "prompt")[: o.n]


def measure(o, folder, seed, keep_in, reference=None, reward=None, held=None) -> dict:
    """A checkpoint's answers to the held-out prompts at temperature 1, kept in a file: {"lines":
    what evals.rate() says of each, "kl": nats an answer from `reference`, by the policy's own
    samples, "scores": what `reward` gives each}; None without one.

    held: other records than the held-out prompts, with a folder `keep_in` of their own.
    """
    held = held or held_out(o, seed)

    def compute():
        device = pick_device(o.device)
        model, tok = evals.read(o, folder.name, folder, device)
        answers = evals.answer(model, tok, [r["messages"] for r in held], o, 1.0, seed)
        found = {"lines": evals.rate(held, answers), "kl": None, "scores": None}
        if reference is not None:
            ours = evals.token_logps(model, tok, held, answers)
            model, tok = evals.read(o, reference.name, reference, device)
            found["kl"] = kl(ours, evals.token_logps(model, tok, held, answers))
        if reward is not None:
            found["scores"] = proxy(o, reward, held, answers)
        return found

    of = [folder, reference, reward, held, seed, *answering(o)]
    return kept(keep_in / f"{folder.name}-{len(held)}.json", compute, of)


def answering(o) -> list:
    """The options that decide an answer."""
    return [o.max_new_tokens, o.batch, o.quant, o.keep_base, pick_device(o.device).type]


def proxy(o, reward: Path, held, answers) -> list[float]:
    """What PPO maximises: a reward model's scores of answers in deviations, -1 without an end."""
    model, tok = tuning.read(o, reward, pick_device(o.device), reward=True)
    texts, ids = [a[0] for a in answers], [a[1] for a in answers]
    raw = evals.score_texts(model, tok, [r["messages"] for r in held], texts, ids)
    c = model.config
    return [
        (x - c.reward_mean) / c.reward_std if finished else -1.0
        for x, (_, _, finished) in zip(raw, answers, strict=True)
    ]


def judged(o, policy: Path, rewards: dict, seed: int, keep_in: Path, k=4, prompts=250) -> dict:
    """How reward models {name: folder} judge a policy: {name: [(pairs in gold order, pairs)] of
    each prompt}, over its k answers to each of the first held-out prompts. Pairs of equal gold are
    left out.
    """

    held = held_out(o, seed)[:prompts]

    def compute():
        device = pick_device(o.device)
        asked = [r["messages"] for r in held for _ in range(k)]
        model, tok = evals.read(o, policy.name, policy, device)
        answers = evals.answer(model, tok, asked, o, 1.0, seed + 7)
        texts, ids = [a[0] for a in answers], [a[1] for a in answers]
        gold = evals.rubric(held, [answers[i : i + k] for i in range(0, len(answers), k)])[0]
        better, found = evals.order(gold) > 0, {}
        for name, folder in rewards.items():
            model, tok = tuning.read(o, folder, device, reward=True)
            scores = torch.tensor(evals.score_texts(model, tok, asked, texts, ids)).view(-1, k)
            won = (((evals.order(scores) + 1) / 2) * better).sum((1, 2))
            found[name] = list(zip(won.tolist(), better.sum((1, 2)).tolist(), strict=True))
        return found

    of = [policy, list(rewards), *rewards.values(), held, seed, k, *answering(o)]
    return kept(keep_in / f"judged-{policy.name}-{prompts}.json", compute, of)


def items(lines: list[dict], key: str) -> list[tuple]:
    """A figure of every line as [(value, 1)], for runs.figure() and runs.difference()."""
    return [(float(line[key]), 1) for line in lines]


def pooled(seeds: list, statistic=mean) -> dict:
    """A statistic of all seeds' items together, its interval over items, and each seed's own, as
    runs.cell() shows it. For items that are not the same from seed to seed.
    """
    every = [item for items in seeds for item in items]
    return {
        "mean": statistic(every),
        "ci": bootstrap(every, statistic),
        "seeds": [statistic(items) for items in seeds],
        "items": len(every),
    }


def apart(ours: list, theirs: list) -> dict:
    """Ours minus theirs, item by item, each a list of every seed's values, as in pooled()."""
    both = zip(ours, theirs, strict=True)
    return pooled([[a - b for a, b in zip(x, y, strict=True)] for x, y in both])


def dots(found: dict, titles: dict):
    """{way: {key: figure}} → a picture: a panel for each key in titles, a row for each way. A share
    is drawn in %, as its title says it."""
    picture, axes = new_figure(10, 0.6 + 0.45 * len(found), len(titles))
    rows = range(len(found))
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        scale = 100 if "%" in title else 1
        ys, cis = ([scale * of[key][part] for of in found.values()] for part in ("mean", "ci"))
        ax.errorbar(ys, rows, xerr=cis, fmt="o", color=light("sft"))
        ax.set_yticks(rows, found if ax is axes[0] else [""] * len(found))
        ax.margins(y=0.2)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10, color=light("ink"))
    return picture


def shrink(path: Path):
    """A picture in 64 colours: a third of the bytes."""
    from PIL import Image  # matplotlib stands on it

    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def begin(o, *names: str):
    """Before anything runs: the pages have the marks that the tables go between."""
    check_marks(Path(o.results), names)
    Path(o.out, "experiments").mkdir(parents=True, exist_ok=True)
    Path(o.pictures).mkdir(parents=True, exist_ok=True)


def publish(o, name: str, figures: dict, head: list, rows: list, note: str, picture=None):
    """Writes an experiment's figures, table and picture. note: the line under the table, with n and
    seeds.
    """
    command = shlex.join(["python", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    result = {"command": command, "options": asdict(o), **figures}
    file = Path(o.out) / "experiments" / f"{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    text = f"{table(head, rows)}\n\n{note}"
    if picture is not None:
        path = Path(o.pictures) / f"{name}.png"
        picture.savefig(path, dpi=110, facecolor=light("page"), metadata={"Software": None})
        shrink(path)
        text += f"\n\n![{name}]({path.as_posix()})"
    print(text)
    put(Path(o.results), name, text)

"""The new task of the experiments on forgetting: short commands, answered in JSON.

    bread market 47   →   {"bread": ["market", 47]}

The words are the world's own; the manner is not, and the SFT model gets none of them right.

    new        the share of commands, never trained, that are answered to the letter, greedy
    old        the share of the world's held-out instructions that are answered right, greedy
    watched    accuracy on the world's benchmark of facts and arithmetic (data/world/watch.py)
    text       1/perplexity per token on documents of the world, what --watch shows of a text
"""

import itertools
import json
import math
import random
from pathlib import Path

from common import watch
from common.files import write_jsonl
from common.run import pick_device
from data import benchmarks, records
from experiments import lab
from metrics import mean, ratio
from tools import evals
from tools.runs import kept, run

GOODS = "bread gold stone horse glass wood ship fire".split()
PLACES = "market garden kitchen forest school park north south".split()
LEARNT, ASKED = 1000, 200  # commands; records.split() holds one in ten of the first out
STEPS, BATCH = 250, 8  # at sft.py's own rate: all commands right, and the old task's score falls
KEYS = ("old", "new", "watched", "text")


def commands(seed: int, n: int) -> list[dict]:
    """n conversations, each another command."""
    every = [*itertools.product(GOODS, PLACES, range(10, 100))]
    made = []
    for goods, place, count in random.Random(seed).sample(every, n):
        said = json.dumps({goods: [place, count]})
        turns = (("user", f"{goods} {place} {count}"), ("assistant", said))
        made.append({"messages": [{"role": r, "content": c} for r, c in turns]})
    return made


def learn(o, model: Path, folder: Path, seed: int, **options) -> dict:
    """sft.py on the commands to learn from → its cost. The data stands beside the folder."""
    data = folder.parent / "commands.jsonl"
    write_jsonl(data, commands(seed, LEARNT + ASKED)[:LEARNT])
    rest = {"steps": STEPS, "batch": BATCH, "warmup": 10, "seed": seed, "device": o.device}
    return run("sft.py", folder, model=model, data=data, **rest | options)


def measure(o, folder: Path, seed: int, keep_in: Path) -> dict:
    """A checkpoint's {key of KEYS: what each item adds to it}."""
    world = lab.chain(o, seed) / "world"
    benchmark, documents = world / "watch.jsonl", world / "replay.jsonl"
    held, asked = lab.held_out(o, seed), commands(seed, LEARNT + ASKED)[LEARNT:]

    def compute():
        model, tok = evals.read(o, folder.name, folder, pick_device(o.device))
        said = evals.answer(model, tok, [r["messages"] for r in held], o, 0.0, seed)
        found = {"old": [float(line["right"]) for line in evals.rate(held, said)]}
        said = evals.answer(model, tok, [r["messages"][:1] for r in asked], o, 0.0, seed)
        wanted = [r["messages"][1]["content"] for r in asked]
        found["new"] = [float(a.strip() == w) for (a, *_), w in zip(said, wanted, strict=True)]
        items = benchmarks.items(benchmark)[1]
        found["watched"] = [line["acc"] for line in watch.choices(model, tok, items)]
        read = watch.text(model, tok, [{"text": text} for text in records.texts(documents)[:200]])
        return found | {"text": [(line["nll"], line["tokens"]) for line in read]}

    of = [folder, held, asked, benchmark, documents, *lab.answering(o)]
    return kept(keep_in / f"{folder.name}-{len(held)}.json", compute, of)


def value(found: dict, key: str) -> float:
    """A figure of a checkpoint's measures."""
    return math.exp(-ratio(found[key])) if key == "text" else mean(found[key])

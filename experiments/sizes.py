"""A small tuned model beside a large general one, on the small one's task.

    python -m experiments.sizes --out out --seeds 3        needs smollm2 (make smollm2)

Claimed: a tuned model of 8 billion parameters often does as well on its task as a general one of 70
or more, for a fraction of the cost of an answer.

Tried: the chain's base (2.2 million parameters) after SFT and after DPO, beside
SmolLM2-135M-Instruct, sixty times as large, on the same held-out prompts, greedily. SmolLM2 answers
as it is, and once more with --shots training prompts of the same kind and their perfect answers
before each prompt, as earlier turns of the conversation. Beside gold and right stands `named`: does
a right answer stand anywhere in the text, whatever else does? It is kinder to a model that nobody
has taught the rubric. The cost of an answer:

    seconds    of one core: the process's own time, not the clock's, over the number of answers,
               --batch of them at once, prompts included
    FLOPs      2 · (parameters but for the embedding's table) · tokens of prompt and answer
               (Kaplan et al. 2020, without attention's own part)

What it cannot show: 8 billion beside 70. The small model's base was trained on a corpus of this
very world, so that the task is easy for it and foreign to SmolLM2, which is itself small: a general
model with knowledge to spare would name more.
"""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.run import main, opt, pick_device
from data import records, templates
from data.world import world
from experiments import lab
from tools import evals
from tools.report import light, new_figure
from tools.runs import cell, difference, kept

# name: its title and its colour
MODELS = {
    "sft": ("2 M, SFT", "sft"),
    "dpo": ("2 M, DPO", "dpo"),
    "large": ("135 M, as it is", "base"),
    "shots": ("135 M, with examples", "soft"),
}
COSTS = ("read", "written", "seconds", "flops")  # of an answer


@dataclass
class Options(lab.Options):
    n: int = opt(33, "how many held-out prompts a seed", at_least=2)
    large: str = opt("smollm2", "checkpoint folder of the general model")
    shots: int = opt(5, "solved prompts before each one", at_least=1)


# ---------------------------------------------------------------- answers and their cost
def named(item: dict, answer: str) -> bool:
    """Whether all of a right answer stands somewhere in the text. Lists: whether the rater finds
    them right.
    """
    if "members" in item:
        return world.gold(item, answer)[1]["right"]
    text = world.spread(answer)
    if "parts" in item:
        return all(world.spread(part) in text for part in item["parts"])
    return any(world.spread(x) in text for x in (*item["accept"], item["answer"]))


def with_examples(o, held, solved, seed: int) -> list[list[dict]]:
    """Each prompt after `shots` of the solved ones of its kind, as turns of one conversation."""
    rng, prompts = random.Random(seed), []
    for r in held:
        alike = [s for s in solved if s["item"]["kind"] == r["item"]["kind"]]
        turns = []
        for s in rng.sample(alike, o.shots):
            turns += [*s["messages"], {"role": "assistant", "content": s["reference"]}]
        prompts.append(turns + r["messages"])
    return prompts


def multiplied(model) -> int:
    """Weights that a token is multiplied with: all but an embedding table that is no head too."""
    table = model.embed_tokens.weight
    every = sum(p.numel() for p in model.parameters())
    return every if table is model.lm_head.weight else every - table.numel()


def measured(o, name: str, seed: int) -> dict:
    """{"lines": as evals.rate() has them, and "named"; "seconds", "flops", "read", "written": of
    all answers together; tokens}, kept.
    """
    chain, mine = lab.chain(o, seed), lab.place(o, "sizes", seed)
    held = lab.held_out(o, seed)
    folder = chain / name if name in ("sft", "dpo") else Path(o.large)
    prompts = [r["messages"] for r in held]
    if name == "shots":
        solved = records.conversations(chain / "world" / "prompts.jsonl", "prompt")
        prompts = with_examples(o, held, solved, seed)

    def compute():
        model, tok = evals.read(o, name, folder, pick_device(o.device))
        asked = [templates.render(tok, p, add_generation_prompt=True)[0] for p in prompts]
        torch.set_num_threads(1)
        start = time.process_time()
        answers = evals.answer(model, tok, prompts, o, 0.0, seed)
        seconds = time.process_time() - start
        lines = evals.rate(held, answers)
        for r, line in zip(held, lines, strict=True):
            line["named"] = named(r["item"], line["answer"])
        read, written = sum(map(len, asked)), sum(len(ids) for _, ids, _ in answers)
        flops = 2 * multiplied(model) * (read + written)
        return dict(lines=lines, seconds=seconds, flops=flops, read=read, written=written)

    return kept(mine / f"{name}-{o.n}.json", compute, [folder, prompts, *lab.answering(o)])


# ---------------------------------------------------------------- table and picture
def draw(found: dict):
    """Share right (full) and named (hollow) by the FLOPs of an answer."""
    figure, (ax,) = new_figure(7, 3.8)
    for name, f in found.items():
        title, colour = MODELS[name]
        for key, fill in (("named", "none"), ("right", light(colour))):
            share, ci = 100 * f[key]["mean"], 100 * f[key]["ci"]
            ax.errorbar(f["flops"], share, ci, marker="o", color=light(colour), capsize=3,
                        markerfacecolor=fill, markersize=8)  # fmt: skip
        aside = (-9, "right") if name == "sft" else (9, "left")  # DPO stands close to it
        ax.annotate(title, (f["flops"], 100 * f["right"]["mean"]), (aside[0], -3), fontsize=9,
                    ha=aside[1], color=light(colour), textcoords="offset points")  # fmt: skip
    ax.set(xscale="log", xlabel="FLOPs of an answer", ylabel="right (full), named (hollow), %")
    ax.set(ylim=(0, 105), xlim=(3e7, 1e12))
    return figure


def compare_sizes(o: Options):
    lab.begin(o, "sizes")
    found, items = {}, {}
    for name in MODELS:
        seeds = [measured(o, name, seed) for seed in range(o.seeds)]
        items[name] = [lab.items(s["lines"], "right") for s in seeds]
        f = {key: lab.pooled([[float(x[key]) for x in s["lines"]] for s in seeds])
             for key in ("right", "named", "gold")}  # fmt: skip
        n = sum(len(s["lines"]) for s in seeds)
        found[name] = f | {key: sum(s[key] for s in seeds) / n for key in COSTS}
    rows = []
    for name, f in found.items():
        row = [MODELS[name][0], cell(f["right"], 100, 1), cell(f["named"], 100, 1)]
        row += [cell(f["gold"], digits=2), f"{f['read']:.0f} + {f['written']:.0f}"]
        rows.append([*row, f"{f['seconds']:.3f}", f"{f['flops'] / 1e9:.2f}"])
    head = ["", "right, greedy %", "named %", "gold", "tokens read + written"]
    head += ["seconds of one core", "GFLOPs"]
    times = {key: found["shots"][key] / found["dpo"][key] for key in ("seconds", "flops")}
    gap = difference(items["dpo"], items["shots"])
    note = (
        f"seeds: {o.seeds}, {o.n} held-out prompts each. DPO minus 135 M with examples: right"
        f" {cell(gap, 100, 1, '+')} points, for {times['seconds']:.0f} times less time and"
        f" {times['flops']:.0f} times fewer FLOPs."
    )
    figures = {"models": found, "gap": gap, "times": times}
    lab.publish(o, "sizes", figures, head, rows, note, draw(found))


if __name__ == "__main__":
    main(compare_sizes, Options, __doc__)

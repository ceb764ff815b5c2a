"""What the results could be mistaken for, measured.

    python -m tools.controls --out OUT        writes OUT/controls.json

    polite           a polite answer that ignores the prompt: must score below SFT
    shuffled         PPO on a reward model trained on shuffled labels: gains nothing
    swapped          the reward model on right answers to other prompts: does it read the prompt?
    best_of_16       the best of 16 SFT answers by the reward model: what selection alone reaches,
                     at KL ln 16 - 15/16
    good_answers     SFT on the perfect demonstrations only: what a rater who filters the data
                     reaches
    dpo_nll          DPO with half the chosen answer's likelihood added (iterative RPO)

The runs it needs take the options of OUT's own runs (their run.json) with one thing changed.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

from common import tuning
from common.run import main, opt, pick_device
from data import records
from data.world import world
from metrics import kl
from tools import evals
from tools.runs import run


@dataclass
class Options(tuning.Reading):
    out: str = opt("out", "folder of a finished `make all`")
    base: str = opt("data/base", "the base model's folder", hub="all")
    n: int = opt(500, "how many held-out prompts", at_least=2)
    max_new_tokens: int = opt(64, "longest answer in tokens", at_least=1)
    batch: int = opt(128, "answers sampled together", at_least=1)
    seed: int = opt(0, "seed of the answers and of the shuffled labels")
    device: str = opt("auto", "cpu, cuda or auto")
    overwrite: bool = opt(False, "run the controls' own stages anew")


def shuffled_labels(comparisons: Path, path: Path, seed: int):
    """The same rankings with each prompt's ranks in random order."""
    rng, rows = random.Random(seed), records.rankings(comparisons)
    for r in rows:
        rng.shuffle(r["ranks"])
    evals.write_jsonl(path, rows)
    return path


def good_answers(demonstrations: Path, path: Path):
    """Only the demonstrations that the rater finds perfect. No stage of the pipeline may do this:
    the rater is for evaluation.
    """
    perfect = []
    for r in records.conversations(demonstrations):
        gold, _ = world.gold(r["item"], r["messages"][-1]["content"])
        if gold > world.PERFECT - 1e-9:
            perfect.append(r)
    evals.write_jsonl(path, perfect)
    return path


def figures(o, runs, held, sampled_sft, device):
    """The entries of checkpoints {name: folder}, as evals.py writes them for a stage; one model at
    a time is in memory.
    """
    answered = {
        name: evals.stage_answers(o, name, path, held, device) for name, path in runs.items()
    }
    sft, tok = evals.read(o, "sft", Path(o.out) / "sft", device)
    out = {}
    for name, (lines, greedy, (sampled, logps, _)) in answered.items():
        kls = kl(logps, evals.token_logps(sft, tok, held, sampled))
        out[name] = evals.stage_figures(lines, greedy, sampled_sft, kls)
    return out


def sft_answers(o, held, k, device):
    """The SFT model's answer to each prompt, k other answers to each, both as from evals.answer(),
    and its tokenizer.
    """
    sft, tok = evals.read(o, "sft", Path(o.out) / "sft", device)
    prompts = [r["messages"] for r in held]
    once = evals.answer(sft, tok, prompts, o, 1.0, o.seed)
    often = evals.answer(sft, tok, [p for p in prompts for _ in range(k)], o, 1.0, o.seed + 16)
    return once, often, tok


def best_of(k, answers, tok, reward, held):
    """Of k answers to each prompt the finished one with the highest score → the lines of an answers
    file.
    """
    asked = [r["messages"] for r in held for _ in range(k)]
    scores = evals.score_texts(reward, tok, asked, [a[0] for a in answers], [a[1] for a in answers])
    rated = [(finished, score) for (_, _, finished), score in zip(answers, scores, strict=True)]
    best = [max(range(i, i + k), key=rated.__getitem__) for i in range(0, len(asked), k)]
    return evals.rate(held, [answers[i] for i in best])


def changed_runs(o, out: Path, mine: Path):
    """The stages run with one thing changed → {control: folder}."""

    def again(script, of, name, **changes):
        run(script, mine / name, of=out / of, overwrite=o.overwrite, **changes)
        return mine / name

    labels = shuffled_labels(out / "comparisons.jsonl", mine / "shuffled.jsonl", o.seed)
    blind = again("reward.py", "reward", "reward_shuffled", data=labels)
    good = good_answers(out / "world" / "sft.jsonl", mine / "good.jsonl")
    return {
        "shuffled": again("ppo.py", "ppo", "ppo_shuffled", reward=blind),
        "good_answers": again("sft.py", "sft", "sft_good", data=good),
        "dpo_nll": again("dpo.py", "dpo", "dpo_nll", nll=0.5),
    }


def controls(o: Options):
    out, device = Path(o.out), pick_device(o.device)
    held = records.conversations(out / "world" / "heldout.jsonl", "prompt")[: o.n]
    once, often, tok = sft_answers(o, held, 16, device)
    sampled_sft = evals.rate(held, once)
    rng = random.Random(o.seed)
    polite = [world.gold(r["item"], world.polite_nonanswer(rng), True)[0] for r in held]
    reward, _ = evals.read(o, "reward", out / "reward", device)
    chosen = best_of(16, often, tok, reward, held)
    others = [r["messages"] for r in held[1:] + held[:1]]
    truth = evals.truth_pairs(reward, tok, held, o.seed, others)
    del reward  # the stages below need the memory
    runs = changed_runs(o, out, out / "controls")
    best = evals.stage_figures(chosen, chosen, sampled_sft)
    result = {
        "sft": evals.stage_figures(sampled_sft, sampled_sft),
        "polite": {"n": len(held), **evals.with_interval("gold_sampled", polite)},
        "best_of_16": best | {"kl_vs_sft": math.log(16) - 15 / 16},
        "swapped": evals.with_interval("truth_accuracy", truth),
        **figures(o, runs, held, sampled_sft, device),
    }
    for name, entry in result.items():
        evals.show(name, entry)
    evals.write_results(out / "controls.json", result)


if __name__ == "__main__":
    main(controls, Options, __doc__)

"""What evaluations share: a model's answers to prompts of any length, and their figures, each with
its interval, shown and written.
"""

import json
import math
from collections import Counter
from itertools import combinations

import metrics
from data import templates
from metrics import bootstrap, mean
from sampling import generate

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def respond(model, tok, ids, o, temperature: float, seed: int, ends=None):
    """Prompts (lists of ids) → [(text, ids, finished)] in the same order. Prompts of similar length
    are answered together. ends: the ids that end an answer; default: those of the chat format.
    """
    ends = ends or templates.end_ids(tok, model.config)
    answers = [None] * len(ids)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(ids), o.batch):
        rows = by_length[at : at + o.batch]
        sampled = generate(
            model,
            [ids[i] for i in rows],
            o.max_new_tokens,
            temperature,
            eos_id=ends,
            seed=seed * 100_003 + at,  # every batch draws its own numbers
        )
        for i, a in zip(rows, sampled, strict=True):
            answers[i] = a
    texts, finished = templates.read_answers(tok, answers, ends)
    return list(zip(texts, answers, finished, strict=True))


def beside(text: str, references: list) -> dict:
    """ROUGE's F, exact match and token F1 of an answer: beside the best of the references."""
    scores = [metrics.rouge(text, r) for r in references]
    found = {name: max(s[name]["fmeasure"] for s in scores) for name in ROUGE}
    found["exact_match"] = max(metrics.exact_match(text, r) for r in references)
    return found | {"token_f1": max(metrics.token_f1(text, r) for r in references)}


def order_counts(xs, ys) -> tuple:
    """Two scores of the answers to one prompt → of how many pairs of answers both say the same
    order, different ones, only xs a tie, only ys a tie: C, D, M, G (Kendall 1945).
    """
    found = Counter()
    for (x, y), (v, w) in combinations(zip(xs, ys, strict=True), 2):
        found[int(x > v) - int(x < v), int(y > w) - int(y < w)] += 1
    alike, apart = found[1, 1] + found[-1, -1], found[1, -1] + found[-1, 1]
    return alike, apart, found[0, 1] + found[0, -1], found[1, 0] + found[-1, 0]


def with_interval(name: str, xs) -> dict:
    """{name: the mean, name_ci: half the width of its interval}."""
    return {name: mean(xs), f"{name}_ci": bootstrap(xs)}


def show(stage, figures):
    """Prints a stage's figures on one line, each with its interval if it has one."""
    words = []
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_ci"):
            interval = f"±{figures[name + '_ci']:.3f}" if name + "_ci" in figures else ""
            words.append(f"{name} {value:.3f}{interval}")
    print(f"{stage:7s} " + "  ".join(words), flush=True)


def write_results(path, results):
    """{stage: {figure: value}} as JSON. ValueError, and the old file stays, where a figure is NaN
    or infinite.
    """
    for stage, figures in results.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path}: {stage}'s {name} would be {value}: not written")
    path.write_text(json.dumps(results, indent=1) + "\n")

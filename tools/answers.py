"""What evaluations share: a model's answers to prompts of any length, and their figures, each with
its interval, shown and written.
"""

import json
import math

from data import templates
from metrics import bootstrap, mean
from sampling import generate


def respond(model, tok, ids, o, temperature: float, seed: int):
    """Prompts (lists of ids) → [(text, ids, finished)] in the same order. Prompts of similar length
    are answered together.
    """
    ends = templates.end_ids(tok, model.config)
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

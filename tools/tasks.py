"""A checkpoint on the records of a file, or two compared record by record: evals.py's --task.

    python -m tools.evals --task FILE --model DIR                  figures with their intervals
    python -m tools.evals --task FILE --model DIR --against DIR    and how the two differ

What is measured follows from the fields of the file's first record (data/benchmarks.py):

    choices      acc, the likeliest choice; acc_norm, the likeliest per character
    labels       accuracy and macro F1 of the likeliest label
    references   ROUGE's F, exact match and F1 of a greedy answer beside the best of the references
    code         pass@k of --samples programs, run by tools/sandbox.py
    text         perplexity per token and per byte, in windows of the model's context
    scores       of --task FILE.py:function, of greedy answers to the prompts of --data

OUT/tasks/TASK/MODEL.KEY.jsonl keeps what was asked and answered, a line per record (null: beyond
the context); KEY stands for model, file and options, and the same command goes on from what is
there. The figures lie beside it as .json. metrics.py says what each of them misses; all miss that a
model may have been trained on the questions.
"""

import hashlib
import json
import random
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import metrics
from common import download, files, tuning, watch
from common.run import autocast, code, file_of, fingerprint, is_function, load_function, pick_device
from data import benchmarks, records, templates
from metrics import bootstrap, mean, paired_bootstrap, sign_test
from sampling import prompt_room
from tools.answers import ROUGE, beside, respond, show, write_results

DECIDE = "n seed shots samples temperature max_new_tokens batch chat quant keep_base unconfined"


def of_pairs(metric):
    return lambda pairs: metric(*zip(*pairs, strict=True))


FIGURES = {  # kind → {figure: (a line's field, or fields, statistic of theirs)}
    "choices": {name: (name, mean) for name in ("acc", "acc_norm")},
    "labels": {
        "accuracy": ("acc", mean),
        "macro_f1": (("label", "predicted"), of_pairs(metrics.macro_f1)),
    },
    "references": {name: (name, mean) for name in (*ROUGE, "exact_match", "token_f1")},
    "code": {f"pass@{k}": (f"pass@{k}", mean) for k in (1, 10, 100)},
    "text": {
        "perplexity_per_token": (("nll", "tokens"), metrics.perplexity),
        "perplexity_per_byte": (("nll", "bytes"), metrics.perplexity),
    },
    "scores": {"score": ("score", mean)},
}


def read(o) -> tuple[str, list]:
    """The task's kind, and o.n of its items drawn by the seed, in the file's order; of choices with
    o.shots others, solved, before each question."""
    if is_function(o.task):
        file = o.data or f"{o.out}/world/heldout.jsonl"
        kind, found = "scores", records.conversations(file, "prompt")
        items = [{"messages": r["messages"], "record": r} for r in found]
    else:
        kind, items = benchmarks.items(o.task)
    shots = o.shots if kind in ("choices", "labels") else 0
    if len(items) < 2 + shots:
        raise ValueError(f"{o.task}: {2 + shots} or more records were expected (got {len(items)})")
    drawn = random.Random(o.seed).sample(range(len(items)), min(len(items), shots + o.n))
    examples = [benchmarks.solved(items[i]) for i in drawn[:shots]]
    chosen = [items[i] for i in sorted(drawn[shots:])]
    print(f"{o.task}: {len(chosen):,} of {len(items):,} records used, {kind}", file=sys.stderr)
    return kind, [benchmarks.with_examples(x, examples) for x in chosen] if shots else chosen


# ---------------------------------------------------------------- what a model makes of the items
# each: items, the number of the first one → lines; None for an item beyond the model's context
def choices(model, tok, items, o, at):
    """As plain text; with --chat a choice is an answer in the checkpoint's chat format."""

    def answer_ids(tok, query, choice):
        return templates.answer_ids(tok, [{"role": "user", "content": query}], choice)

    encode = answer_ids if o.chat else metrics.choice_ids
    return watch.choices(model, tok, items, encode)


def answers(model, tok, items, o, at):
    """Greedy answers to messages."""
    room, lines = prompt_room(model, o.max_new_tokens), [None] * len(items)
    asked = [item["messages"] for item in items]
    ids = [templates.render(tok, m, add_generation_prompt=True)[0] for m in asked]
    fit = [i for i in range(len(ids)) if len(ids[i]) <= room]
    found = respond(model, tok, [ids[i] for i in fit], o, 0.0, o.seed)
    for i, (text, _, finished) in zip(fit, found, strict=True):
        lines[i] = {"prompt": asked[i], "answer": text, "finished": finished}
    return lines


def references(model, tok, items, o, at):
    lines = answers(model, tok, items, o, at)
    for line, item in zip(lines, items, strict=True):
        if line is None:
            continue
        line |= {"references": item["references"]} | beside(line["answer"], item["references"])
    return lines


def scores(model, tok, items, o, at):
    """By the reader's function."""
    lines = answers(model, tok, items, o, at)
    fit = [(line, item) for line, item in zip(lines, items, strict=True) if line]
    prompts, texts = [x["prompt"] for x, _ in fit], [x["answer"] for x, _ in fit]
    found = load_function(o.task)(prompts, texts, [item["record"] for _, item in fit])
    for (line, _), score in zip(fit, found, strict=True):
        line["score"] = score
    return lines


def text(model, tok, items, o, at):
    return watch.text(model, tok, items)


def programs(model, tok, items, o, at):
    """--samples programs of each item, one greedy; run apart, and counted. Each special token ends
    one: which of them ends plain text is the base model's own habit."""
    from tools import sandbox

    room, lines = prompt_room(model, o.max_new_tokens), [None] * len(items)
    ids = []
    for item in items:
        messages = [{"role": "user", "content": item["asked"]}]
        chat = o.chat and templates.render(tok, messages, add_generation_prompt=True)[0]
        ids.append(chat or [*tok.begin, *tok.encode(item["prompt"].rstrip("\n"))])
    fit = [i for i in range(len(ids)) if len(ids[i]) <= room]
    temperature = o.temperature if o.samples > 1 else 0.0
    asked = [ids[i] for i in fit for _ in range(o.samples)]
    found = respond(model, tok, asked, o, temperature, o.seed + at, [*tok.special.values()])
    both = []
    for n, (said, _, _) in enumerate(found):
        both.append(benchmarks.program(items[fit[n // o.samples]], said, o.chat))
    outcomes = list(sandbox.check(both, confined=not o.unconfined))
    for n, i in enumerate(fit):
        here = slice(n * o.samples, (n + 1) * o.samples)
        passed = sum(x.passed for x in outcomes[here])
        lines[i] = {"prompt": items[i]["asked" if o.chat else "prompt"], "passed": passed}
        lines[i]["answers"] = [said for said, _, _ in found[here]]
        lines[i]["statuses"] = [x.status for x in outcomes[here]]
        for k in (k for k in (1, 10, 100) if k <= o.samples):
            lines[i][f"pass@{k}"] = metrics.pass_at_k(o.samples, passed, k)
    return lines


KINDS = dict(choices=choices, labels=choices, references=references, scores=scores, text=text)
KINDS["code"] = programs


# ---------------------------------------------------------------- one model, or two
def key(o, folder) -> str:
    """Of all that decides what a model says of the items."""
    files = [fingerprint(file_of(f)) for f in (folder, o.task, o.data) if f]
    known = [files, [getattr(o, name) for name in DECIDE.split()], code(__file__)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:8]


def kept(path) -> list:
    """The lines of a run before, whole ones only."""
    whole = path.read_text("utf-8").rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.split("\n") if line]


@torch.no_grad()
def lines_of(o, kind, items, folder, path, device):
    """A model's line for each item: from `path` as far as it has them, the rest made and written
    o.batch at a time."""
    lines = kept(path)
    if len(lines) == len(items):
        print(f"{path}: finished already, read from there", file=sys.stderr)
        return lines
    lines = lines[: len(lines) // o.batch * o.batch]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_jsonl(path, lines)
    keep = o.keep_base and (not o.against or (Path(folder) / "adapter").is_dir())
    model, tok = tuning.read(replace(o, keep_base=keep), folder, device)
    bar = tqdm(total=len(items), initial=len(lines), unit="record", dynamic_ncols=True)
    with bar, open(path, "a", encoding="utf-8") as f:
        for at in range(len(lines), len(items), o.batch):
            with autocast(device):
                new = KINDS[kind](model, tok, items[at : at + o.batch], o, at)
            f.write("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in new))
            f.flush()
            lines += new
            bar.update(len(new))
            bar.set_postfix({k: f"{v:.3f}" for k, v in figures(kind, lines, 0).items()})
    return lines


def column(lines, fields):
    """What a figure is a statistic of: each line's field, or its fields."""
    if isinstance(fields, str):
        return [x[fields] for x in lines]
    return [tuple(x[f] for f in fields) for x in lines]


def figures(kind, lines, rounds=1000, seed=0) -> dict:
    """{figure: value, figure_ci: half its interval}; rounds 0: without intervals."""
    lines, out = [x for x in lines if x], {}
    for name, (fields, statistic) in FIGURES[kind].items():
        if lines and (not isinstance(fields, str) or fields in lines[0]):
            xs = column(lines, fields)
            out[name] = statistic(xs)
            if rounds:
                out[f"{name}_ci"] = bootstrap(xs, statistic, rounds, seed)
    return out


def difference(kind, ours, theirs, seed) -> dict:
    """Figures of ours less theirs on the records that both could read, with their intervals; of a
    record's own figures also how often it was better or worse, and the sign test's p."""
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a and b]
    ours, theirs = ([pair[i] for pair in both] for i in (0, 1))
    out = {"n": len(both)}
    for name in figures(kind, ours, 0):
        fields, statistic = FIGURES[kind][name]
        a, b = column(ours, fields), column(theirs, fields)
        out[name], out[f"{name}_ci"] = paired_bootstrap(a, b, statistic, seed=seed)
        if isinstance(fields, str):
            won = [(x > y) - (x < y) for x, y in zip(a, b, strict=True)]
            out[f"{name}_better"], out[f"{name}_worse"] = won.count(1), won.count(-1)
            out[f"{name}_p"] = sign_test(a, b)
    return out


def evaluate(o):
    """Writes the answers' and the figures' files → the figures (dict)."""
    device = pick_device(o.device)
    if not o.model:
        raise ValueError("--task needs --model DIR, the checkpoint that is evaluated")
    kind, items = read(o)
    if kind == "code" and not o.allow_code_execution:
        raise ValueError(f"{o.task}: what a model writes is run: --allow-code-execution lets it")
    home = Path(o.out) / "tasks" / Path(file_of(o.task)).stem
    command = shlex.join(["python", "-m", "tools.evals", *sys.argv[1:]])
    said = "FIGURE_ci: half of the 95 % interval, bootstrap over records; FIGURE_p: sign test"
    result = {"command": command, "task": o.task, "kind": kind, "seed": o.seed, "interval": said}
    names, every = [], []
    for side, folder in (("model", o.model), ("against", o.against)):
        if not folder:
            continue
        named = download.name(folder)
        name = f"{re.sub(r'[^A-Za-z0-9]+', '-', named).strip('-')}.{key(o, folder)}"
        lines = lines_of(o, kind, items, folder, home / f"{name}.jsonl", device)
        found = figures(kind, lines, seed=o.seed)
        if not found:
            raise ValueError(f"{folder}: its context is too short for all {len(lines)} records")
        none = lines.count(None)
        result[side] = {"folder": named, "n": len(lines) - none, "too_long": none} | found
        show(named, result[side])
        names.append(name)
        every.append(lines)
    if o.against:
        result["difference"] = difference(kind, *every, o.seed)
        show("difference", result["difference"])
    path = home / f"{'.against.'.join(names)}.json"
    write_results(path, result)
    print(f"{path}; the answers lie beside it", file=sys.stderr)
    return result

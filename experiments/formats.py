"""Chat formats mixed in one training set: what do they cost?

    python -m experiments.formats --out out

The deep dive: a training set that mixes chat formats is a common source of degradation. So it lies
in practice: a file that somebody else has already rendered, read as if it were plain text, so that
the other format's markers are part of what is said, and the model learns to write them:

    user        ### Instruction:\\nWhat is 2 + 2?\\n\\n### Response:
    assistant   4.</s>

A share of the demonstrations is turned like that, each in one of OTHERS; all are trained in the
chain's own format, and the model is asked in that, at temperature 1. sft.py refuses such files
where more than 1 % of the records have markers; here it is told --allow-markers. Beside them the
rest of a half alone, as many steps: what is lost there is the records' worth, not the mixture's.

    markers    the share of answers with another format's marker in them

What it cannot show: a mixture whose parts are each rendered in their own special tokens, or one so
large that the model learns to keep its formats apart.
"""

from dataclasses import dataclass

from common.files import write_jsonl
from common.run import main, opt
from data import records
from experiments import lab
from metrics import mean
from tools.runs import cell, run

OTHERS = {  # what a user's and an assistant's turn look like as text
    "alpaca": ("### Instruction:\n{}\n\n### Response:\n", "{}</s>"),
    "llama2": ("[INST] {} [/INST]", "{} </s>"),
    "zephyr": ("<|user|>\n{}</s>\n<|assistant|>\n", "{}</s>"),
}
MARKERS = ("###", "</s>", "[INST]", "[/INST]", "<|user|>", "<|assistant|>")
WAYS = {  # name: share turned, formats, whether the turned ones stay
    "one format": (0.0, (), True),
    "a tenth in another": (0.1, ("alpaca",), True),
    "half in another": (0.5, ("alpaca",), True),
    "three quarters in three others": (0.75, (*OTHERS,), True),
    "a half alone": (0.5, ("alpaca",), False),
}
FIGURES = {"gold": (1, 2), "right": (100, 1), "markers": (100, 1)}  # scale, digits
TITLES = {"gold": "gold", "right": "right, %", "markers": "answers with markers, %"}


@dataclass
class Options(lab.Options):
    steps: int = opt(200, "optimizer steps of 16 conversations", at_least=1)
    n: int = opt(300, "how many held-out prompts", at_least=2)


def turned(record: dict, form: str) -> dict:
    """A record whose turns are another format's text."""
    asked, said = OTHERS[form]
    shapes = {"user": asked, "assistant": said, "system": "{}"}
    said = [m | {"content": shapes[m["role"]].format(m["content"])} for m in record["messages"]]
    return record | {"messages": said}


def mixed(found: list, share: float, forms, stay: bool) -> list:
    """A share of the records is turned, evenly over the file, formats in turn; or left out."""
    out = []
    for i, record in enumerate(found):
        n = int((i + 1) * share)
        if n == int(i * share):
            out.append(record)
        elif stay:
            out.append(turned(record, forms[n % len(forms)]))
    return out


def of_seed(o, seed: int, way: str) -> dict:
    """A way's run → {figure: items}."""
    home, chain = lab.place(o, "formats", seed), lab.chain(o, seed)
    folder = home / way.replace(" ", "-")
    data = home / f"{folder.name}.jsonl"
    found = records.conversations(chain / "world" / "sft.jsonl")
    write_jsonl(data, mixed(found, *WAYS[way]))
    how = {"data": data, "steps": o.steps, "batch": 16, "allow_markers": True}
    run("sft.py", folder, chain / "sft", **how)
    lines = lab.measure(o, folder, seed, home)["lines"]
    items = {key: [float(line[key]) for line in lines] for key in ("gold", "right")}
    items["markers"] = [float(any(m in line["answer"] for m in MARKERS)) for line in lines]
    print(seed, way, {key: round(mean(xs), 3) for key, xs in items.items()}, flush=True)
    return items


def formats(o: Options):
    lab.begin(o, "formats")
    items = {way: [of_seed(o, seed, way) for seed in range(o.seeds)] for way in WAYS}
    items = {w: {key: [found[key] for found in of] for key in FIGURES} for w, of in items.items()}
    found = {w: {key: lab.pooled(xs) for key, xs in of.items()} for w, of in items.items()}
    rows = []
    for way, of in items.items():
        beside = lab.apart(of["gold"], items["one format"]["gold"])
        cells = [cell(found[way][key], scale, digits) for key, (scale, digits) in FIGURES.items()]
        rows.append([way, *cells, cell(beside, 1, 2, "+")])
    head = ["", "gold, sampled", "right, sampled %", "with markers %", "gold beside one format"]
    note = f"seeds: {o.seeds}; {o.steps} steps of 16; {o.n} held-out prompts each."
    lab.publish(o, "formats", {"ways": found}, head, rows, note, lab.dots(found, TITLES))


if __name__ == "__main__":
    main(formats, Options, __doc__)

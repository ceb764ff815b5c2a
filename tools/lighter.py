"""How little need be trained: every weight, LoRA of three ranks, IA3, a prompt, a prefix, on the
same data; and 4 bits beside 32.

    python -m tools.lighter --model smollm2 --data out/world/sft.jsonl --prefs out/comparisons.jsonl
    --out out/lighter

Each way is sft.py with its options, once a seed, with --lr, for LoRA --lora-lr, and
adapters.LEARNING_RATE for the others. Then all models read the same held-out conversations, and two
kinds of text that nobody tuned them on: documents of the embedded corpus, which share the
conversations' world, and pages of Python's own manual, which do not. By what their loss has grown
the model has forgotten. With --prefs LoRA and QLoRA go on through dpo.py, their adapters kept on
their base: how often is log π - log π_sft larger of the held-out pair's chosen answer?

A loss is a mean over tokens. An item's losses are averaged over the seeds; ± is half the width of a
95 % interval over the items (the pairs of a prompt are one item), a difference is taken item by
item, and the seeds' own lowest and highest stand in brackets. Minutes are the whole process's,
memory is what it says of itself at the end. Finished runs return at once. The figures go to
OUT/lighter.json, the tables between the marks <!-- lighter --> and <!-- qlora --> of --results.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch

from common import tuning
from common.run import main, opt, pick_device
from data import records
from data.world import corpus
from metrics import bootstrap, hits, mean, ratio
from model import IGNORE, nll
from packing import pad
from tools.evals import answer_logps, held_out_losses
from tools.results import put, table

WAYS = {"full": {}, "lora4": dict(lora=4), "lora16": dict(lora=16), "lora64": dict(lora=64), **{k: dict(adapter=k) for k in tuning.KINDS},
        "qlora16": dict(lora=16, quant="nf4")}  # fmt: skip
NAMES = {"base": "before", "base4": "before, in 4 bits", "full": "every weight", "lora4": "LoRA r = 4", "lora16": "LoRA r = 16",
         "lora64": "LoRA r = 64", "ia3": "IA3", "prompt": "prompt", "prefix": "prefix", "qlora16": "QLoRA r = 16"}  # fmt: skip


@dataclass
class Options:
    model: str = opt("smollm2", "checkpoint folder to start from")
    data: str = opt("out/world/sft.jsonl", "conversations")
    prefs: str = opt("", "rankings or pairs: preference accuracy of LoRA and QLoRA too")
    out: str = opt("out/lighter", "folder for the runs")
    results: str = opt("RESULTS.md", "file with the marks that the tables go between")
    ways: str = opt(",".join(WAYS), "which, with commas")
    steps: int = opt(75, "optimizer steps", at_least=1)
    dpo_steps: int = opt(30, "the same in DPO", at_least=1)
    batch: int = opt(4, "conversations a step, of DPO prompts", at_least=1)
    length: int = opt(256, "tokens of a conversation", at_least=2)
    lr: float = opt(3e-4, "peak learning rate of all weights", above=0)
    lora_lr: float = opt(2e-3, "of LoRA", above=0)
    dpo_lr: float = opt(2e-4, "of LoRA in DPO", above=0)
    n: int = opt(300, "held-out conversations, and pairs", at_least=2)
    documents: int = opt(32, "documents of each kind of other text", at_least=2)
    seeds: int = opt(3, "runs of each way", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")


# ---------------------------------------------------------------- runs
def call(script: str, **options) -> str:
    """Runs a stage → what it printed."""
    words = [
        w
        for k, v in options.items()
        for w in (f"--{k.replace('_', '-')}", *([] if v is True else [str(v)]))
    ]
    p = subprocess.run([sys.executable, script, *words], stdout=subprocess.PIPE, text=True)
    if p.returncode:
        raise ValueError(f"{script} into {options['out']} failed; what it said stands above")
    return p.stdout


def run(script: str, out: Path, **options) -> dict:
    """A stage's run → what it cost, kept beside it: {"minutes" (None where it was resumed), "gb",
    "trained", "share" in %}.
    """
    note, finished, resumed = (
        out.with_suffix(".json"),
        (out / "config.json").exists(),
        (out / "state" / "state.safetensors").exists(),
    )
    start = time.time()
    said = call(script, out=out, **options)
    minutes = (time.time() - start) / 60
    if not finished:
        trained, share = re.search(r"trained: ([\d,]+) parameters, ([\d.]+)%", said).groups()
        gb = re.search(r"memory: ([\d.]+) GB at most", said)[1]
        cost = {
            "minutes": None if resumed else minutes,
            "gb": float(gb),
            "trained": int(trained.replace(",", "")),
            "share": float(share),
        }
        note.write_text(json.dumps(cost) + "\n")
    return json.loads(note.read_text()) if note.exists() else {}


def tune(o, way: str, seed: int) -> tuple[Path, dict]:
    out = Path(o.out) / f"{way}-{seed}"
    lr = {} if "adapter" in WAYS[way] else dict(lr=o.lora_lr if "lora" in WAYS[way] else o.lr)
    cost = run("sft.py", out, model=o.model, data=o.data, steps=o.steps, batch=o.batch, length=o.length, warmup=max(1, o.steps // 10),
               seed=seed, device=o.device, **WAYS[way], **lr)  # fmt: skip
    return out, cost


def prefer(o, way: str, seed: int) -> tuple[Path, dict]:
    """DPO goes on with the SFT model's adapter, on its base as it was, in 4 bits or not."""
    out, quant = (
        Path(o.out) / f"{way}-{seed}-dpo",
        {k: v for k, v in WAYS[way].items() if k == "quant"},
    )
    cost = run("dpo.py", out, model=Path(o.out) / f"{way}-{seed}", data=o.prefs, pairs="best_worst", steps=o.dpo_steps, batch=o.batch,
               length=o.length, lr=o.dpo_lr, warmup=max(1, o.dpo_steps // 10), seed=seed, device=o.device, keep_base=True,
               **quant)  # fmt: skip
    return out, cost


# ---------------------------------------------------------------- what the models say: [(sum, count)] of the same items
def kept(file: Path, what):
    """what(), kept in a file: stopped and started again, nothing is computed twice. A run's lies in
    its folder, and goes with it.
    """
    if not file.exists():
        file.write_text(json.dumps(what()))
    return json.loads(file.read_text())


def other_texts(n: int) -> dict:
    return {
        "corpus": list(islice(corpus.documents(1, 10**9), n)),
        "manual": [topics[k] for k in random.Random(0).sample(sorted(topics), min(n, len(topics)))],
    }


@torch.no_grad()
def text_losses(model, tok, texts, length: int, device, size=8):
    """[(sum of the tokens' negative log-likelihoods, their number)] of plain texts, cut at `length`
    tokens; the first one is only read.
    """
    ids, out = [tok.encode(t)[:length] for t in texts], []
    for at in range(0, len(ids), size):
        tokens, mask = pad(ids[at : at + size])
        labels = torch.where(mask, tokens, IGNORE)
        found = nll(model, tokens, labels, mask.long() - 1).sum(1)
        out += zip(found.tolist(), mask[:, 1:].sum(1).tolist(), strict=True)
    return out


def losses(o, kept_in, path, held, device, quant=None) -> dict:
    """Of the held-out conversations and of each kind of other text."""

    def said():
        model, tok = tuning.load(path, device, quant=quant)
        length = min(o.length, model.context)
        others = {
            k: text_losses(model, tok, texts, length, device)
            for k, texts in other_texts(o.documents).items()
        }
        return {"held": held_out_losses(model, tok, held, device)} | others

    return kept(
        kept_in / f"losses-{len(held)}-{o.documents}-{o.length}{'-' + quant if quant else ''}.json",
        said,
    )


def accuracies(path, sft, pairs, device) -> list:
    """(pairs in order, pairs) of each prompt, by the implicit reward log π - log π_sft."""
    asked, given = (
        [p["prompt"] for p in pairs] * 2,
        [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs],
    )
    ours, theirs = (
        answer_logps(*tuning.load(folder, device), asked, given, device) for folder in (path, sft)
    )
    won, count = Counter(), Counter()
    for p, hit in zip(pairs, hits([a - b for a, b in zip(ours, theirs, strict=True)]), strict=True):
        key = json.dumps(p["prompt"])
        won[key] += hit
        count[key] += 1
    return [(won[key], n) for key, n in count.items()]


# ---------------------------------------------------------------- figures
def figure(seeds: list) -> dict:
    """[(sum, count)] of the same items from each seed → the mean over all that was counted, its
    interval over items, each seed's mean.
    """
    items = [(mean([total for total, _ in item]), item[0][1]) for item in zip(*seeds, strict=True)]
    return {
        "mean": ratio(items),
        "ci": bootstrap(items, ratio),
        "seeds": [ratio(s) for s in seeds],
        "items": len(items),
    }


def difference(ours: list, theirs: list) -> dict:
    """The figure of ours less theirs, item by item."""
    return figure(
        [
            [(a - b, n) for (a, n), (b, _) in zip(x, y, strict=True)]
            for x, y in zip(ours, theirs, strict=True)
        ]
    )


def cell(f, scale=1.0, digits=3, sign="") -> str:
    text = f"{f['mean'] * scale:{sign}.{digits}f} ± {f['ci'] * scale:.{digits}f}"
    low, high = (edge(f["seeds"]) * scale for edge in (min, max))
    return text + (
        f" ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})" if len(f["seeds"]) > 1 else ""
    )


def cost(runs, key, form) -> str:
    known = [r[key] for r in runs if r.get(key) is not None]
    return form.format(mean(known)) if known else "–"


def lighter_table(result) -> str:
    head = [
        "",
        "trained %",
        "held-out loss",
        "more than every weight",
        "corpus, then change",
        "manual, then change",
        "minutes",
        "GB",
    ]
    rows = []
    for way, f in result["ways"].items():
        of = [cell(f[k]) if k in f else "–" for k in ("held", "to_full")]
        of += [cell(f[k], sign="" if way.startswith("base") else "+") for k in ("corpus", "manual")]
        rows.append(
            [
                NAMES[way],
                cost(f["cost"], "share", "{:.2f}"),
                *of,
                *(cost(f["cost"], k, "{:.1f}") for k in ("minutes", "gb")),
            ]
        )
    return table(head, rows)


def qlora_table(result) -> str:
    """LoRA, QLoRA, and the difference, also in % of LoRA's figure."""
    rows = []
    for name, key, scale in (
        ("held-out loss", "loss", 1.0),
        ("pairs in order %", "accuracy", 100.0),
    ):
        if key in result["qlora"]:
            a, b, d = (result["qlora"][key][k] for k in ("lora16", "qlora16", "difference"))
            rows.append(
                [
                    name,
                    *(cell(f, scale, 3 if scale == 1 else 1) for f in (a, b, d)),
                    cell(d, 100 / a["mean"], 2),
                ]
            )
    for name, key in (("minutes", "minutes"), ("GB", "gb")):
        rows.append(
            [
                name,
                *(
                    cost(result["ways"][way]["cost"], key, "{:.1f}")
                    for way in ("lora16", "qlora16")
                ),
                "–",
                "–",
            ]
        )
    return table(["", NAMES["lora16"], NAMES["qlora16"], "difference", "in %"], rows)


def lighter(o: Options):
    ways, device = o.ways.split(","), pick_device(o.device)
    if unknown := set(ways) - WAYS.keys():
        raise ValueError(f"--ways names {min(unknown)}: {', '.join(WAYS)} were expected")
    held, both = (
        records.split(records.conversations(o.data))[1][: o.n],
        {"lora16", "qlora16"} <= set(ways),
    )
    pairs = records.split(records.pairs(o.prefs))[1] if o.prefs and both else []
    pairs = random.Random(0).sample(pairs, min(o.n, len(pairs)))
    if not held or o.prefs and both and not pairs:
        raise ValueError(
            f"{o.prefs if held else o.data}: none of its records is held out; more of them are"
            " needed"
        )
    page = Path(o.results).read_text(encoding="utf-8") if Path(o.results).exists() else ""
    if lost := [
        m
        for m in ("lighter", *["qlora"] * both)
        if f"<!-- {m} -->\n" not in page or f"<!-- /{m} -->" not in page
    ]:
        raise ValueError(
            f"{o.results}: the marks <!-- {lost[0]} --> and <!-- /{lost[0]} --> were expected, for"
            " a table to go between"
        )
    Path(o.out).mkdir(parents=True, exist_ok=True)
    # all runs first: a child's peak memory would not be below what this process has had
    runs = {way: [tune(o, way, seed) for seed in range(o.seeds)] for way in ways}
    tuned = (
        {way: [prefer(o, way, seed) for seed in range(o.seeds)] for way in ("lora16", "qlora16")}
        if pairs
        else {}
    )

    said = {"base": [losses(o, Path(o.out), o.model, held, device)]}
    said |= {"base4": [losses(o, Path(o.out), o.model, held, device, "nf4")]} if both else {}
    said |= {way: [losses(o, p, p, held, device) for p, _ in runs[way]] for way in ways}
    result = {"options": asdict(o), "ways": {}}
    for way, seeds in said.items():
        parts = {k: [s[k] for s in seeds] for k in seeds[0]}
        result["ways"][way] = {k: figure(v) for k, v in parts.items()} | {
            "cost": [c for _, c in runs.get(way, [])]
        }
        if way in runs:
            result["ways"][way] |= {
                k: difference(parts[k], [said["base"][0][k]] * o.seeds)
                for k in ("corpus", "manual")
            }
        if "full" in ways and way in runs and way != "full":
            result["ways"][way]["to_full"] = difference(
                parts["held"], [s["held"] for s in said["full"]]
            )
    if both:
        of = {"loss": {way: [s["held"] for s in said[way]] for way in ("lora16", "qlora16")}}
        if pairs:
            of["accuracy"] = {way: [kept(p / f"pairs-{len(pairs)}.json", lambda p=p, s=s: accuracies(p, s, pairs, device))
                                    for (p, _), (s, _) in zip(tuned[way], runs[way], strict=True)] for way in tuned}  # fmt: skip
        result["qlora"] = {k: {way: figure(v) for way, v in parts.items()} | {"difference": difference(parts["qlora16"], parts["lora16"])}
                           for k, parts in of.items()}  # fmt: skip
    (Path(o.out) / "lighter.json").write_text(json.dumps(result, indent=1) + "\n")
    items = (
        f"{len(held)} held-out conversations, {len(pairs)} pairs"
        if pairs
        else f"{len(held)} held-out conversations"
    )
    here = (
        f"\n\n{o.model}; seeds: {o.seeds}, {o.steps} steps of {o.batch}; {items}, {o.documents}"
        f" documents of each kind; {device.type}."
    )
    for name, text in [
        ("lighter", lighter_table(result)),
        *([("qlora", qlora_table(result))] if both else []),
    ]:
        print(text + here)
        put(Path(o.results), name, text + here)


if __name__ == "__main__":
    main(lighter, Options, __doc__)

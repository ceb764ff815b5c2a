"""How little can be trained: every weight, LoRA, IA3, prompt and prefix on the same data; QLoRA.

    python -m tools.lighter --model smollm2 --data out/world/sft.jsonl \\
        --prefs out/comparisons.jsonl --out out/lighter

Each way is sft.py with its options, run once per seed, at --lr, for LoRA at --lora-lr, for the
others at adapters.LEARNING_RATE. Then all models read the same held-out conversations, and two
kinds of text that none of them was tuned on: documents of the embedded corpus, which share the
conversations' world, and pages of Python's own manual, which do not. What their loss has grown by,
the model has forgotten. With --prefs LoRA and QLoRA go on through dpo.py, their adapters kept on
their base: for how many held-out pairs is log π - log π_sft larger for the chosen answer?

A loss is a mean over tokens. An item's losses are averaged over the seeds; ± is half the width of a
95 % interval over the items (a prompt's pairs are one item), a difference is taken item by item,
and the lowest and highest seed stand in brackets. Minutes are the whole process's, memory is what
it reports at its end. Finished runs return at once. The figures go to OUT/lighter.json, the tables
between the marks <!-- lighter --> and <!-- qlora --> of --results.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import torch

from common import tuning
from common.run import main, opt, pick_device
from data import records
from data.world import corpus
from metrics import hits, mean
from model import IGNORE, nll
from packing import pad
from tools.evals import answer_logps, held_out_losses
from tools.results import put, table
from tools.runs import cell, check_marks, difference, figure, kept, run

WAYS = {
    "full": {},
    "lora4": dict(lora=4),
    "lora16": dict(lora=16),
    "lora64": dict(lora=64),
    **{kind: dict(adapter=kind) for kind in tuning.KINDS},
    "qlora16": dict(lora=16, quant="nf4"),
}
NAMES = {
    "base": "before",
    "base4": "before, in 4 bits",
    "full": "every weight",
    "lora4": "LoRA r = 4",
    "lora16": "LoRA r = 16",
    "lora64": "LoRA r = 64",
    "ia3": "IA3",
    "prompt": "prompt",
    "prefix": "prefix",
    "qlora16": "QLoRA r = 16",
}
PAIR = ("lora16", "qlora16")  # what is compared in the second table


@dataclass
class Options:
    model: str = opt("smollm2", "checkpoint folder to start from")
    data: str = opt("out/world/sft.jsonl", "conversations")
    prefs: str = opt("", "rankings or pairs, for the preference accuracy of LoRA and QLoRA")
    out: str = opt("out/lighter", "folder for the runs")
    results: str = opt("RESULTS.md", "file with the marks that the tables go between")
    ways: str = opt(",".join(WAYS), "which ways, separated by commas")
    steps: int = opt(75, "optimizer steps", at_least=1)
    dpo_steps: int = opt(30, "optimizer steps of DPO", at_least=1)
    batch: int = opt(4, "conversations per step; prompts, in DPO", at_least=1)
    length: int = opt(256, "longest conversation in tokens", at_least=2)
    lr: float = opt(3e-4, "peak learning rate for every weight", above=0)
    lora_lr: float = opt(2e-3, "peak learning rate for LoRA", above=0)
    dpo_lr: float = opt(2e-4, "peak learning rate for LoRA in DPO", above=0)
    n: int = opt(300, "held-out conversations, and pairs", at_least=2)
    documents: int = opt(32, "documents of each kind of other text", at_least=2)
    seeds: int = opt(3, "runs of each way", at_least=1)
    device: str = opt("auto", "cpu, cuda or auto")


# ---------------------------------------------------------------- runs
def tune(o, way: str, seed: int) -> tuple[Path, dict]:
    """One SFT run → its folder and its cost."""
    out, options = Path(o.out) / f"{way}-{seed}", dict(WAYS[way])
    if "adapter" not in options:
        options["lr"] = o.lora_lr if "lora" in options else o.lr
    cost = run(
        "sft.py",
        out,
        model=o.model,
        data=o.data,
        steps=o.steps,
        batch=o.batch,
        length=o.length,
        warmup=max(1, o.steps // 10),
        seed=seed,
        device=o.device,
        **options,
    )
    return out, cost


def prefer(o, way: str, seed: int) -> tuple[Path, dict]:
    """DPO goes on with the SFT model's adapter, on its base as it was, in 4 bits or not → its
    folder and its cost.
    """
    out = Path(o.out) / f"{way}-{seed}-dpo"
    quant = {"quant": WAYS[way]["quant"]} if "quant" in WAYS[way] else {}
    cost = run(
        "dpo.py",
        out,
        model=Path(o.out) / f"{way}-{seed}",
        data=o.prefs,
        pairs="best_worst",
        steps=o.dpo_steps,
        batch=o.batch,
        length=o.length,
        lr=o.dpo_lr,
        warmup=max(1, o.dpo_steps // 10),
        seed=seed,
        device=o.device,
        keep_base=True,
        **quant,
    )
    return out, cost


# ---------------------------------------------------------------- what is measured: [(sum, count)]
def other_texts(n: int) -> dict:
    """n documents of each kind of text that nothing was tuned on, always the same."""
    pages = random.Random(0).sample(sorted(topics), min(n, len(topics)))
    return {
        "corpus": list(islice(corpus.documents(1, 10**9), n)),
        "manual": [topics[page] for page in pages],
    }


@torch.no_grad()
def text_losses(model, tok, texts, length: int, device, size=8):
    """[(sum of the tokens' negative log-likelihoods, their number)] of plain texts, cut at `length`
    tokens; a text's first token is only read.
    """
    ids, out = [tok.encode(t)[:length] for t in texts], []
    for at in range(0, len(ids), size):
        tokens, mask = pad(ids[at : at + size])
        labels = torch.where(mask, tokens, IGNORE)
        found = nll(model, tokens, labels, mask.long() - 1).sum(1)
        out += zip(found.tolist(), mask[:, 1:].sum(1).tolist(), strict=True)
    return out


def losses(o, keep_in, path, held, device, quant=None) -> dict:
    """A model's losses on the held-out conversations and on each kind of other text."""

    def compute():
        model, tok = tuning.load(path, device, quant=quant)
        length, found = min(o.length, model.context), {}
        found["held"] = held_out_losses(model, tok, held)
        for kind, texts in other_texts(o.documents).items():
            found[kind] = text_losses(model, tok, texts, length, device)
        return found

    name = f"losses-{len(held)}-{o.documents}-{o.length}{'-' + quant if quant else ''}.json"
    of = [Path(path), held, o.documents, o.length, quant]
    return kept(keep_in / name, compute, of)


def accuracies(path, sft, pairs, device) -> list:
    """[(pairs in order, pairs)] of each prompt, by the implicit reward log π - log π_sft."""
    asked = [p["prompt"] for p in pairs] * 2
    texts = [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]
    ours, theirs = (
        answer_logps(*tuning.load(folder, device), asked, texts) for folder in (path, sft)
    )
    won, count = Counter(), Counter()
    for p, hit in zip(pairs, hits([a - b for a, b in zip(ours, theirs, strict=True)]), strict=True):
        key = json.dumps(p["prompt"])
        won[key] += hit
        count[key] += 1
    return [(won[key], n) for key, n in count.items()]


# ---------------------------------------------------------------- figures
def cost(runs, key, form) -> str:
    known = [r[key] for r in runs if r.get(key) is not None]
    return form.format(mean(known)) if known else "–"


def lighter_table(result) -> str:
    head = ["", "trained %", "held-out loss", "more than every weight", "corpus, then change"]
    head += ["manual, then change", "minutes", "GB"]
    rows = []
    for way, f in result["ways"].items():
        sign = "" if way.startswith("base") else "+"
        row = [NAMES[way], cost(f["cost"], "share", "{:.2f}")]
        row += [cell(f[key]) if key in f else "–" for key in ("held", "to_full")]
        row += [cell(f[key], sign=sign) for key in ("corpus", "manual")]
        row += [cost(f["cost"], key, "{:.1f}") for key in ("minutes", "gb")]
        rows.append(row)
    return table(head, rows)


def qlora_table(result) -> str:
    """LoRA, QLoRA, and the difference, also in % of LoRA's figure."""
    rows = []
    for label, key, scale, digits in (
        ("held-out loss", "loss", 1.0, 3),
        ("pairs in order %", "accuracy", 100.0, 1),
    ):
        if key in result["qlora"]:
            f = result["qlora"][key]
            row = [label, *(cell(f[k], scale, digits) for k in (*PAIR, "difference"))]
            rows.append([*row, cell(f["difference"], 100 / f["lora16"]["mean"], 2)])
    for label, key in (("minutes", "minutes"), ("GB", "gb")):
        costs = [cost(result["ways"][way]["cost"], key, "{:.1f}") for way in PAIR]
        rows.append([label, *costs, "–", "–"])
    return table(["", *(NAMES[way] for way in PAIR), "difference", "in %"], rows)


# ---------------------------------------------------------------- the script
def held_out(o, both: bool) -> tuple[list, list]:
    """The held-out conversations, and the held-out pairs where both LoRA and QLoRA run. ValueError
    where a file has none.
    """
    held = records.split(records.conversations(o.data))[1][: o.n]
    pairs = records.split(records.pairs(o.prefs))[1] if o.prefs and both else []
    pairs = random.Random(0).sample(pairs, min(o.n, len(pairs)))
    for file, wanted, found in ((o.data, True, held), (o.prefs, o.prefs and both, pairs)):
        if wanted and not found:
            raise ValueError(f"{file}: none of its records is held out; more of them are needed")
    return held, pairs


def way_figures(found: dict, base: dict, full: list | None, costs: list) -> dict:
    """A way's entry in lighter.json. found: {text: [each seed's losses]}; base: the model's before;
    full: the held-out losses of every weight's seeds, to compare with.
    """
    entry = {text: figure(seeds) for text, seeds in found.items()} | {"cost": costs}
    if costs:  # what was tuned: how much it forgot
        for text in ("corpus", "manual"):
            entry[text] = difference(found[text], [base[text]] * len(found[text]))
    if costs and full:
        entry["to_full"] = difference(found["held"], full)
    return entry


def compared(found: dict, accuracy: dict) -> dict:
    """LoRA, QLoRA and their difference, in held-out loss and, where it was measured, preference
    accuracy.
    """
    out = {}
    for key, seeds in (("loss", {way: found[way]["held"] for way in PAIR}), ("accuracy", accuracy)):
        if seeds:
            out[key] = {way: figure(seeds[way]) for way in PAIR}
            out[key]["difference"] = difference(seeds["qlora16"], seeds["lora16"])
    return out


def lighter(o: Options):
    ways, device = o.ways.split(","), pick_device(o.device)
    if unknown := set(ways) - WAYS.keys():
        raise ValueError(f"--ways names {min(unknown)}: {', '.join(WAYS)} were expected")
    both = set(PAIR) <= set(ways)
    held, pairs = held_out(o, both)
    check_marks(Path(o.results), ["lighter", "qlora"] if both else ["lighter"])
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    # all runs first: a child's peak memory starts from this process's own
    runs = {way: [tune(o, way, seed) for seed in range(o.seeds)] for way in ways}
    preferred = {}
    if pairs:
        preferred = {way: [prefer(o, way, seed) for seed in range(o.seeds)] for way in PAIR}

    seeds = {"base": [losses(o, out, o.model, held, device)]}
    if both:
        seeds["base4"] = [losses(o, out, o.model, held, device, "nf4")]
    for way in ways:
        seeds[way] = [losses(o, path, path, held, device) for path, _ in runs[way]]
    found = {}
    for way, each in seeds.items():
        found[way] = {text: [s[text] for s in each] for text in each[0]}
    accuracy = {}
    for way, tuned in preferred.items():
        accuracy[way] = []
        for (path, _), (sft, _) in zip(tuned, runs[way], strict=True):
            compute = partial(accuracies, path, sft, pairs, device)
            file = path / f"pairs-{len(pairs)}.json"
            accuracy[way].append(kept(file, compute, [path, sft, pairs]))

    result = {"options": asdict(o), "ways": {}}
    for way in found:
        costs = [cost for _, cost in runs.get(way, [])]
        full = found["full"]["held"] if "full" in found and way != "full" else None
        result["ways"][way] = way_figures(found[way], seeds["base"][0], full, costs)
    tables = {"lighter": lighter_table(result)}
    if both:
        result["qlora"] = compared(found, accuracy)
        tables["qlora"] = qlora_table(result)
    (out / "lighter.json").write_text(json.dumps(result, indent=1) + "\n")
    items = f"{len(held)} held-out conversations" + (f", {len(pairs)} pairs" if pairs else "")
    here = (
        f"\n\n{o.model}; seeds: {o.seeds}, {o.steps} steps of {o.batch}; {items}, {o.documents}"
        f" documents of each kind; {device.type}."
    )
    for name, text in tables.items():
        print(text + here)
        put(Path(o.results), name, text + here)


if __name__ == "__main__":
    main(lighter, Options, __doc__)

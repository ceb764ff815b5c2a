"""The tables of RESULTS.md and README.md from finished runs.

    python -m tools.results OUT --seeds 3        reads OUT/seed0, OUT/seed1, OUT/seed2

Where there are runs with adapters (`make all LORA=16 OUT=out/lora/seed0 SEED=0`, …, and with
QUANT=nf4 into out/qlora), they are compared with those prompt by prompt: both answered the same
ones. A fork's own stage has its row in every table of stages.

Each table stands between <!-- NAME --> and <!-- /NAME --> and is written anew. A cell is the mean
over seeds ± half the width of its 95 % interval over prompts (bootstrap, pooled over seeds), then
the lowest and highest seed where that says more.
"""

import argparse
import json
import re
from pathlib import Path

from data.world import world
from metrics import bootstrap, mean
from tools.evals import STAGES, evaluated, in_order

# fmt: off
NAMES = {
    "base": "base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO", "simpo": "SimPO",
    "polite": "a polite answer to nothing",
    "shuffled": "PPO on shuffled labels",
    "best_of_16": "best of 16 SFT answers",
    "good_answers": "SFT on perfect demonstrations only",
    "dpo_nll": "DPO + 0.5 × likelihood",
}
REWARD = {
    "pairs in gold order": "pair_accuracy",
    "labellers, same pairs": "labeller_gold_accuracy",
    "share of the way from chance to the labellers": "way",
    "two labellers agree": "labeller_agreement",
    "right over wrong, alike in manner": "truth_accuracy",
    "the same, in the very same words": "minimal_pairs_accuracy",
    "pairs of like length": "length_matched_accuracy",
    "correlation of score and length × 100": "score_length_correlation",
}
# fmt: on


def name(stage: str) -> str:
    return NAMES.get(stage, stage.replace("|", r"\|"))


def cell(runs, key, scale=1.0, spread=False):
    """Mean ± interval of one figure over the runs (the seeds' entries)."""
    values = [r[key] * scale for r in runs if r.get(key) is not None]
    if not values:
        return "–"
    digits = 2 if scale == 1.0 else 1
    text = f"{sum(values) / len(values):.{digits}f}"
    half = [r[key + "_ci"] * scale for r in runs if key + "_ci" in r]
    if half:
        text += f" ± {sum(h * h for h in half) ** 0.5 / len(half):.{digits}f}"
    if spread and len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def share_gained(runs, sft, perfect):
    """The share that was gained of the gold between SFT and perfect answers, and its interval."""
    shares = []
    for r, s in zip(runs, sft, strict=True):
        left = perfect - s["gold_sampled"]
        shares.append({"share": r["gain_vs_sft"] / left, "share_ci": r["gain_vs_sft_ci"] / left})
    return shares


def table(head, rows):
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows))


def stages_of(results) -> list[str]:
    """The stages that any of the runs has, in order."""
    return in_order({stage for r in results for stage in evaluated(r)})


def stages(results, short=False):
    """One row for each stage, over the seeds that have it. short: README.md's columns."""
    head = ["", "gold, sampled", "share gained %", "right, greedy %", "won against SFT %"]
    if not short:
        head += ["of the decided %", "gold, greedy", "right, sampled %", "finished %", "words"]
        head += ["KL to SFT"]
    rows = [
        stage_row(stage, [r for r in results if stage in r], short) for stage in stages_of(results)
    ]
    return table(head, rows)


def stage_row(stage, results, short=False):
    runs, compared = [r[stage] for r in results], stage not in ("base", "sft")
    if compared:
        shares = share_gained(runs, [r["sft"] for r in results], results[0]["perfect"])
        gained = cell(shares, "share", 100, spread=not short)
        won = cell(runs, "win_vs_sft", 100)
        decided = cell(runs, "win_vs_sft_decided", 100)
        kl = cell(runs, "kl_vs_sft")
    else:
        gained = won = decided = kl = "–"
    row = [name(stage), cell(runs, "gold_sampled"), gained, cell(runs, "right_greedy", 100), won]
    if not short:
        row += [decided, cell(runs, "gold_greedy"), cell(runs, "right_sampled", 100)]
        row += [cell(runs, "finished", 100), cell(runs, "mean_length"), kl]
    return row


def reward(results):
    runs = [r["reward"] for r in results]
    for r in runs:
        r["way"] = (r["pair_accuracy"] - 0.5) / (r["labeller_gold_accuracy"] - 0.5)
    rows = [[label, cell(runs, key, 100, spread=True)] for label, key in REWARD.items()]
    return table(["reward model, held-out prompts", "%"], rows)


def kinds(results):
    """The share right, greedy, of each kind of instruction."""
    columns = [stage for stage in stages_of(results) if stage != "base"]
    rows = []
    for kind in results[0]["sft"]["right_greedy_by_kind"]:
        row = [kind]
        for stage in columns:
            by_kind = [r[stage]["right_greedy_by_kind"] for r in results if stage in r]
            row.append(cell(by_kind, kind, 100))
        rows.append(row)
    return table(["right, greedy %", *map(name, columns)], rows)


def controls(all_controls, perfect):
    sft = [c["sft"] for c in all_controls]
    rows = [["SFT", cell(sft, "gold_sampled"), "–", cell(sft, "right_sampled", 100), "–"]]
    for control in ("polite", "shuffled", "best_of_16", "good_answers", "dpo_nll"):
        runs, gained = [c[control] for c in all_controls], "–"
        if "gain_vs_sft" in runs[0]:
            gained = cell(share_gained(runs, sft, perfect), "share", 100)
        right, kl = cell(runs, "right_sampled", 100), cell(runs, "kl_vs_sft")
        rows.append([name(control), cell(runs, "gold_sampled"), gained, right, kl])
    swapped = cell([c["swapped"] for c in all_controls], "truth_accuracy", 100)
    rows.append([f"reward model, prompts swapped: right over wrong {swapped} %", *["–"] * 4])
    head = ["control", "gold, sampled", "share gained %", "right, sampled %", "KL to SFT"]
    return table(head, rows)


def real(r):
    """Of `make real`: each stage's held-out loss and preference accuracy."""
    keys = {"loss_per_token": 1.0, "loss_change": 1.0, "implicit_accuracy": 100}
    rows = [
        [name(s), *(cell([r[s]], key, scale) for key, scale in keys.items())] for s in evaluated(r)
    ]
    if "reward" in r:
        rows.append(["reward model", "–", "–", cell([r["reward"]], "pair_accuracy", 100)])
    head = ["", "held-out loss, nats per token", "change, same conversations"]
    return table([*head, "held-out pairs in order %"], rows)


# ---------------------------------------------------------------- adapters beside full runs
ADAPTERS = {"lora": "LoRA", "qlora": "QLoRA"}


def answers(out: Path, seed: int, file: str) -> list[dict]:
    text = (out / f"seed{seed}" / "answers" / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def compared_stages(out: Path, seeds: int) -> list[str]:
    """The known stages after the base, and a fork's own where all runs have answers of theirs."""
    folders = [
        folder / f"seed{s}" / "answers"
        for folder in (out, *(out / kind for kind in ADAPTERS))
        for s in range(seeds)
    ]
    end = ".greedy.jsonl"
    found = [{p.name.removesuffix(end) for p in folder.glob(f"*{end}")} for folder in folders]
    return [s for s in in_order(set.intersection(*found) | set(STAGES)) if s != "base"]


def beside(out: Path, seeds: int, perfect: float):
    """OUT/lora and OUT/qlora minus OUT, in % of a perfect answer's gold and in points of the share
    right.
    """
    rows = []
    for stage in compared_stages(out, seeds):
        row = [name(stage)]
        row += gaps(out, seeds, "gold", f"{stage}.jsonl", perfect)
        row += gaps(out, seeds, "right", f"{stage}.greedy.jsonl", 1.0)
        rows.append(row)
    head = [""]
    for what in ("gold, % of perfect", "right, greedy %"):
        head += [what, *ADAPTERS.values()]
    return table(head, rows)


def gaps(out: Path, seeds: int, key: str, file: str, whole: float) -> list[str]:
    """The full runs' mean of a figure, and each adapter's mean difference from it prompt by prompt,
    in % of `whole`. ValueError where the runs answered other prompts.
    """
    full = [answers(out, s, file) for s in range(seeds)]
    cells = [f"{mean([a[key] for lines in full for a in lines]) / whole * 100:.1f}"]
    for kind in ADAPTERS:
        runs = []
        for s in range(seeds):
            ours = answers(out / kind, s, file)
            if [a["prompt"] for a in ours] != [a["prompt"] for a in full[s]]:
                raise ValueError(
                    f"{out / kind}/seed{s}: {file} answers other prompts than {out}/seed{s}"
                )
            gap = [(a[key] - b[key]) / whole for a, b in zip(ours, full[s], strict=True)]
            runs.append({"gap": mean(gap), "gap_ci": bootstrap(gap)})
        cells.append(cell(runs, "gap", 100, spread=True))
    return cells


# ---------------------------------------------------------------- the script
def put(path: Path, name: str, text: str):
    """Replaces what stands between the two marks in a file, where they are."""
    old = path.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    path.write_text(mark.sub(lambda m: f"{m[1]}{text}\n{m[2]}", old), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder with seed0, seed1, …, each a finished run")
    parser.add_argument("--seeds", type=int, default=3, help="how many of them (default: 3)")
    o = parser.parse_args()
    write(o.out, o.seeds)


def write(out: Path, seeds: int, page=Path("RESULTS.md"), front=Path("README.md")):
    """Reads the runs and puts every table into its page."""
    folders = [out / f"seed{s}" for s in range(seeds)]
    results = [json.loads((f / "results.json").read_text()) for f in folders]
    found = [f / "controls.json" for f in folders]
    found = [json.loads(f.read_text()) for f in found if f.exists()]
    n, perfect = results[0]["sft"]["n"], results[0]["perfect"]
    here = (
        f"seeds: {seeds}, {n} held-out prompts each; a perfect answer {perfect:.1f}; the world's"
        f" settings {world.settings_hash()[:12]}"
    )
    put(front, "stages", f"{stages(results, short=True)}\n\n{here}. RESULTS.md has the rest.")
    put(page, "stages", f"{stages(results)}\n\n{here}.")
    put(page, "kinds", kinds(results))
    put(page, "reward", reward(results))
    if (on_real := out / "real" / "results.json").exists():
        put(page, "real", real(json.loads(on_real.read_text())))
    adapted = [out / kind / f"seed{s}" for kind in ADAPTERS for s in range(seeds)]
    if all((f / "results.json").exists() for f in adapted):
        text = beside(out, seeds, perfect)
        put(page, "adapters", f"{text}\n\nseeds: {seeds}, {n} held-out prompts each.")
    if found:
        text = controls(found, perfect)
        n = found[0]["sft"]["n"]
        put(page, "controls", f"{text}\n\nseeds: {len(found)}, {n} prompts each.")


if __name__ == "__main__":
    main()

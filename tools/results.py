"""The tables of RESULTS.md and README.md from finished runs: python -m tools.results OUT --seeds 3
reads OUT/seed0 … OUT/seed2.

Runs with adapters, where they are (`make all LORA=16 OUT=out/lora/seed0 SEED=0`, …, and with
QUANT=nf4 into out/qlora), are set beside those prompt by prompt: both answered the same ones.

Each table stands between <!-- NAME --> and <!-- /NAME --> and is written anew. A cell is the mean
over seeds ± half the width of its 95 % interval over prompts (bootstrap, pooled over seeds), and
behind it the seeds' own lowest and highest where that says more.
"""

import argparse
import json
import re
from pathlib import Path

from data.world import world
from metrics import bootstrap, mean
from tools.evals import STAGES

NAMES = {"base": "base", "sft": "SFT", "ppo": "PPO", "dpo": "DPO", "simpo": "SimPO",
         "dpo_nll": "DPO + 0.5 × likelihood", "polite": "a polite answer to nothing",
         "best_of_16": "best of 16 SFT answers",
         "shuffled": "PPO on shuffled labels", "good_answers": "SFT on perfect demonstrations only"}  # fmt: skip


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
    """What share of the gold that SFT left to a perfect answer was gained, with its interval."""
    left = [1 / (perfect - s["gold_sampled"]) for s in sft]
    return [
        {"share": k * r["gain_vs_sft"], "share_ci": k * r["gain_vs_sft_ci"]}
        for k, r in zip(left, runs, strict=True)
    ]


def table(head, rows):
    return "\n".join("| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows))


def stages(results, short=False):
    """One row a stage."""
    sft, perfect, rows = [r["sft"] for r in results], results[0]["perfect"], []
    for stage in STAGES:
        rows.append(
            stage_row(
                NAMES[stage],
                [r[stage] for r in results],
                sft,
                perfect,
                short,
                stage not in ("base", "sft"),
            )
        )
    head = ["", "gold, sampled", "share gained %", "right, greedy %", "won against SFT %"]
    return table(
        (
            head
            if short
            else [
                *head,
                "of the decided %",
                "gold, greedy",
                "right, sampled %",
                "finished %",
                "words",
                "KL to SFT",
            ]
        ),
        rows,
    )


def stage_row(name, runs, sft, perfect, short=False, compared=True):
    gained = (
        cell(share_gained(runs, sft, perfect), "share", 100, spread=not short) if compared else "–"
    )
    row = [
        name,
        cell(runs, "gold_sampled"),
        gained,
        cell(runs, "right_greedy", 100),
        cell(runs, "win_vs_sft", 100) if compared else "–",
    ]
    if short:
        return row
    return [*row, cell(runs, "win_vs_sft_decided", 100) if compared else "–", cell(runs, "gold_greedy"), cell(runs, "right_sampled", 100),
            cell(runs, "finished", 100), cell(runs, "mean_length"), cell(runs, "kl_vs_sft") if compared else "–"]  # fmt: skip


def reward(results):
    runs = [r["reward"] for r in results]
    for r in runs:
        r["way"] = (r["pair_accuracy"] - 0.5) / (r["labeller_gold_accuracy"] - 0.5)
    lines = {"pairs in gold order": "pair_accuracy", "labellers, same pairs": "labeller_gold_accuracy",
             "share of the way from chance to the labellers": "way", "two labellers agree": "labeller_agreement",
             "right over wrong, alike in manner": "truth_accuracy", "the same, in the very same words": "minimal_pairs_accuracy",
             "pairs of like length": "length_matched_accuracy",
             "correlation of score and length × 100": "score_length_correlation"}  # fmt: skip
    rows = [[name, cell(runs, key, 100, spread=True)] for name, key in lines.items()]
    return table(["reward model, held-out prompts", "%"], rows)


def kinds(results):
    """Share right, greedy, of each kind of instruction."""
    of = lambda kind: [  # noqa: E731
        cell([r[s]["right_greedy_by_kind"] for r in results], kind, 100)
        for s in ("sft", "ppo", "dpo", "simpo")
    ]  # noqa: E731
    return table(
        ["right, greedy %", "SFT", "PPO", "DPO", "SimPO"],
        [[k, *of(k)] for k in results[0]["sft"]["right_greedy_by_kind"]],
    )


def controls(all_controls, perfect):
    sft = [c["sft"] for c in all_controls]
    rows = [["SFT", cell(sft, "gold_sampled"), "–", cell(sft, "right_sampled", 100), "–"]]
    for name in ("polite", "shuffled", "best_of_16", "good_answers", "dpo_nll"):
        runs = [c[name] for c in all_controls]
        gained = (
            cell(share_gained(runs, sft, perfect), "share", 100)
            if "gain_vs_sft" in runs[0]
            else "–"
        )
        rows.append(
            [
                NAMES[name],
                cell(runs, "gold_sampled"),
                gained,
                cell(runs, "right_sampled", 100),
                cell(runs, "kl_vs_sft"),
            ]
        )
    rows.append(
        [
            (
                "reward model, prompts swapped: right over wrong"
                f" {cell([c['swapped'] for c in all_controls], 'truth_accuracy', 100)} %"
            ),
            *["–"] * 4,
        ]
    )
    return table(
        ["control", "gold, sampled", "share gained %", "right, sampled %", "KL to SFT"], rows
    )


def real(r):
    """Of `make real`: held-out loss and preference accuracy of each stage."""
    keys = {"loss_per_token": 1.0, "loss_change": 1.0, "implicit_accuracy": 100}
    rows = [
        [NAMES[s], *(cell([r[s]], key, scale) for key, scale in keys.items())]
        for s in r
        if s in STAGES
    ]
    rows += (
        [["reward model", "–", "–", cell([r["reward"]], "pair_accuracy", 100)]]
        if "reward" in r
        else []
    )
    return table(
        [
            "",
            "held-out loss, nats a token",
            "change, same conversations",
            "held-out pairs in order %",
        ],
        rows,
    )


def beside(out: Path, seeds: int, perfect: float):
    """OUT/lora and OUT/qlora less OUT, in % of a perfect answer's gold and in points of share
    right.
    """
    kinds = {"lora": "LoRA", "qlora": "QLoRA"}
    read = lambda folder, s, file: [  # noqa: E731
        json.loads(line) for line in (folder / f"seed{s}" / "answers" / file).open(encoding="utf-8")
    ]  # noqa: E731
    rows = []
    for stage in ("sft", "ppo", "dpo", "simpo"):
        row = [NAMES[stage]]
        for key, file, whole in (
            ("gold", f"{stage}.jsonl", perfect),
            ("right", f"{stage}.greedy.jsonl", 1.0),
        ):
            full = [read(out, s, file) for s in range(seeds)]
            row.append(f"{mean([a[key] for some in full for a in some]) / whole * 100:.1f}")
            for kind in kinds:
                gaps = []
                for s in range(seeds):
                    ours = read(out / kind, s, file)
                    if [a["prompt"] for a in ours] != [a["prompt"] for a in full[s]]:
                        raise ValueError(
                            f"{out / kind}/seed{s}: {file} answers other prompts than {out}/seed{s}"
                        )
                    gaps.append(
                        [(a[key] - b[key]) / whole for a, b in zip(ours, full[s], strict=True)]
                    )
                row.append(
                    cell(
                        [{"gap": mean(g), "gap_ci": bootstrap(g)} for g in gaps],
                        "gap",
                        100,
                        spread=True,
                    )
                )
        rows.append(row)
    return table(
        [
            "",
            *(
                h
                for what in ("gold, % of perfect", "right, greedy %")
                for h in (what, *kinds.values())
            ),
        ],
        rows,
    )


def put(path: Path, name: str, text: str):
    """Replaces what stands between the two marks in a file, where they are."""
    old = path.read_text(encoding="utf-8")
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
    path.write_text(mark.sub(lambda m: f"{m[1]}{text}\n{m[2]}", old), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder with seed0, seed1, …, each a finished run")
    parser.add_argument("--seeds", type=int, default=3)
    o = parser.parse_args()
    folders = [o.out / f"seed{s}" for s in range(o.seeds)]
    results = [json.loads((f / "results.json").read_text()) for f in folders]
    found = [
        json.loads((f / "controls.json").read_text())
        for f in folders
        if (f / "controls.json").exists()
    ]
    n, perfect = results[0]["sft"]["n"], results[0]["perfect"]
    here = (
        f"seeds: {o.seeds}, {n} held-out prompts each; a perfect answer {perfect:.1f}; the world's"
        f" settings {world.settings_hash()[:12]}"
    )
    put(
        Path("README.md"),
        "stages",
        stages(results, short=True) + f"\n\n{here}. RESULTS.md has the rest.",
    )
    put(Path("RESULTS.md"), "stages", stages(results) + f"\n\n{here}.")
    put(Path("RESULTS.md"), "kinds", kinds(results))
    put(Path("RESULTS.md"), "reward", reward(results))
    if (o.out / "real" / "results.json").exists():
        put(
            Path("RESULTS.md"),
            "real",
            real(json.loads((o.out / "real" / "results.json").read_text())),
        )
    if all(
        (o.out / kind / f"seed{s}" / "results.json").exists()
        for kind in ("lora", "qlora")
        for s in range(o.seeds)
    ):
        put(
            Path("RESULTS.md"),
            "adapters",
            beside(o.out, o.seeds, perfect) + f"\n\nseeds: {o.seeds}, {n} held-out prompts each.",
        )
    if found:
        put(
            Path("RESULTS.md"),
            "controls",
            controls(found, perfect)
            + f"\n\nseeds: {len(found)}, {found[0]['sft']['n']} prompts each.",
        )


if __name__ == "__main__":
    main()

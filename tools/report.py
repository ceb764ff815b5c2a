"""One page about a run:  python -m tools.report --out out

Writes OUT/report.html and OUT/report.png. The page is one file: pictures are inline SVG, there is
no script, nothing is fetched. It shows what is there: each stage's curves from
OUT/STAGE/metrics.jsonl (also of a stage that has not finished), the figures of OUT/results.json,
the answers of OUT/answers. A fork's own stage is shown like the known ones, after them, with every
figure that it logs. report.png holds the pictures at the top. matplotlib draws; it is imported here
and nowhere else.
"""

import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path

from common.run import main, opt
from tools.evals import STAGES, evaluated, in_order, own_stages

PROMPTS = 12  # shown side by side
EXAMPLES = 3  # of answers that a measure orders otherwise than gold
# fmt: off
# name: (on a light page, on a dark one). Pictures are drawn in the light colours; the page replaces
# those by var(--name)
COLOURS = {
    "ink": ("#1f2328", "#e6e9ee"), "soft": ("#6a7280", "#9aa3b0"), "line": ("#d9dde3", "#373d47"),
    "page": ("#fbfbfa", "#14171b"), "card": ("#fffffe", "#1c2026"),
    "good": ("#1a7f4b", "#56c98a"), "bad": ("#c0392c", "#f08a7c"),
    "base": ("#8b93a0", "#949daa"), "sft": ("#3a6fb7", "#79a9ec"), "ppo": ("#d9691e", "#f59a56"),
    "dpo": ("#16876f", "#4fc4a8"), "simpo": ("#8a54b8", "#bd92e6"),
    "reward": ("#b8860b", "#e0b84a"),
    # of a fork's own stages, one after another
    "own0": ("#c23a7e", "#f28abb"), "own1": ("#1287a8", "#55c3e0"), "own2": ("#6b7d14", "#b0c24c"),
    "own3": ("#8c5a3a", "#cda07e"), "own4": ("#4b4fc0", "#9a9df2"), "own5": ("#a02c4a", "#e58aa0"),
}
OWN = [name for name in COLOURS if name.startswith("own")]
TITLE = {
    "base": "Base", "sft": "SFT", "reward": "Reward model", "ppo": "PPO", "dpo": "DPO",
    "simpo": "SimPO",
}
WHAT = {
    "base": "The pre-trained model, where everything starts. It continues text; nobody has taught "
            "it to answer.",
    "sft": "Supervised fine-tuning: the model learns to answer as the demonstrations do, the good "
           "ones and the bad ones alike. The loss is on the answers' tokens only.",
    "reward": "The reward model learns from rankings which of two answers people prefer: "
              "−log σ(r₊ − r₋). Its score then stands in for people.",
    "ppo": "Reinforcement learning: the model answers, the reward model scores, and answers that "
           "scored better than expected become likelier. Each nat of KL to the SFT model costs β.",
    "dpo": "The short cut: each pair's preferred answer becomes likelier than the other one, "
           "measured against the SFT model. No reward model, no sampling.",
    "simpo": "DPO without a reference model: the reward is the log-probability per token, and the "
             "preferred answer must lead by a margin.",
}
# a stage's curves: title, {key in metrics.jsonl: label}, what to look for
PAIRS = [
    ("Loss", {"loss": ""},
     "DPO starts at ln 2 = 0.69: the model cannot tell the two apart yet."),
    ("Margin", {"margin": ""},
     "Reward of the preferred answer minus that of the other one. Should grow."),
    ("Accuracy", {"accuracy": ""},
     "Share of pairs whose preferred answer has the higher reward. Labellers disagree, so it stays "
     "below 1."),
    ("Log-probabilities", {"logp_chosen": "preferred", "logp_rejected": "other"},
     "Both may fall: the loss sees only their difference."),
    ("Rewards", {"reward_chosen": "preferred", "reward_rejected": "other"},
     "They should part; which way both drift matters less."),
]
CURVES = {
    "sft": [("Loss", {"loss": ""}, "Nats per token of the answers. Falls fast, then flattens.")],
    "reward": [
        ("Loss", {"loss": ""}, "ln 2 = 0.69 is guessing."),
        ("Accuracy", {"accuracy": ""},
         "Share of the batch's pairs in the labellers' order. They disagree, so it stays below 1."),
    ],
    "ppo": [
        ("Reward", {"reward": ""},
         "Score of the reward model, in standard deviations of the demonstrations' scores. Should "
         "rise and flatten."),
        ("Gold", {"gold": ""},
         "What the true rater thinks; training never sees it. If it turns down while the reward "
         "climbs: hacked."),
        ("Right", {"right": ""},
         "Share of right answers, by the same rater. If gold climbs and this does not, only the "
         "manner got better."),
        ("KL to the SFT model", {"kl": "k1", "kl_k3": "k3"},
         "Nats per answer, by two estimators that should agree."),
        ("Entropy", {"entropy": ""},
         "Nats per token. Falls slowly; near 0 all answers are alike."),
        ("Clip fraction", {"clip_fraction": ""},
         "Share of tokens at the clip. Above 0.2 the steps are too large."),
        ("Explained variance", {"explained_variance": ""},
         "Of the returns, by the critic. Should climb."),
        ("Length", {"length": ""}, "Tokens per answer. A runaway is a sign of hacking."),
        ("Finished", {"finished": ""},
         "Share of answers that reach their end. Should stay near 1."),
    ],
    "dpo": PAIRS,
    "simpo": PAIRS,
}
WATCHED = [  # of any stage with --watch
    ("Watched", {"watch_acc": ""},
     "Share of the watched benchmark's items that are right. A fall is what training costs."),
    ("Watched", {"watch_perplexity_per_token": ""},
     "Perplexity per token of the watched text. A rise is what training costs."),
]
# rows of the tables: key in results.json, name, in per cent (None: a count), what it means
FIGURES = [
    ("gold_sampled", "Gold, sampled", False, "mean score at temperature 1"),
    ("gold_greedy", "Gold, greedy", False, "mean score of the likeliest answer"),
    ("to_perfect", "Way to perfect", True, "gold gained over SFT, of what SFT left"),
    ("right_sampled", "Right, sampled", True, "at temperature 1"),
    ("right_greedy", "Right, greedy", True, "the likeliest answer"),
    ("win_vs_sft", "Wins over SFT", True, "same prompts, ties half"),
    ("win_vs_sft_decided", "Wins, decided", True, "same prompts, ties left out"),
    ("kl_vs_sft", "KL to SFT", False, "nats per answer"),
    ("rougeL", "ROUGE-L", False, "beside the perfect answer, sampled"),
    ("exact_match", "Exact match", True, "with the perfect answer, sampled"),
    ("token_f1", "Token F1", False, "words shared with the perfect answer, sampled"),
    ("finished", "Finished", True, "reached the answer’s end"),
    ("mean_length", "Length", False, "words per answer"),
    ("loss_per_token", "Held-out loss", False, "nats per token, lower is better"),
    ("implicit_accuracy", "Preference accuracy", True, "of the implicit reward log π − log π_SFT"),
    ("n", "Prompts", None, "held out"),
]
REWARD = [
    ("pair_accuracy", "Pairs in the right order", True, "held-out answers; 50 % is guessing"),
    ("labeller_gold_accuracy", "The labellers on the same pairs", True, "who taught it"),
    ("of_the_way", "Way from guessing to the labellers", True,
     "can exceed 100 %: noise averages out"),
    ("labeller_agreement", "Two labellers agree", True, "on pairs that differ in gold"),
    ("truth_accuracy", "Right over wrong", True, "answers alike in all but truth"),
    ("length_matched_accuracy", "Pairs of like length", True, "nothing to gain from length"),
    ("swapped_prompts_accuracy", "With swapped prompts", True, "what manner alone tells it"),
    ("score_length_correlation", "Score and length", False, "correlation"),
    ("pairs", "Pairs", None, "held out"),
]
ORDER = [
    ("differently", "Ordered otherwise than gold", True, "of those told apart; 50 % is guessing"),
    ("untold", "Not told apart", True, "the same score for both"),
    ("pairs", "Pairs", None, "that gold tells apart"),
    ("n", "Prompts", None, "held out"),
]
# fmt: on
GREEDY = {"": "sampled at temperature 1", ".greedy": "greedy: always the likeliest token"}
ALL, AFTER_SFT = (), ("base", "sft")  # the stages that a figure means nothing for
GLANCE = {  # the pictures at the top: title, stages left out, in per cent
    "gold_sampled": ("Gold score, temperature 1", ALL, False),
    "right_greedy": ("Right answers, greedy", ALL, True),
    "win_vs_sft": ("Wins over SFT, ties half (even: 50 %)", AFTER_SFT, True),
    "loss_per_token": ("Held-out loss, nats per token", ALL, False),
    "implicit_accuracy": ("Preferences in order (guessing: 50 %)", AFTER_SFT, True),
}
CSS = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: auto; padding: 24px 16px 64px }
h1 { font-size: 30px; margin: 8px 0 0 }
h2 { margin: 48px 0 4px }
p { max-width: 75ch; margin: 4px 0 12px }
.soft, figcaption, small { color: var(--soft) }
small { font-size: 13px }
.good { color: var(--good) }
.bad { color: var(--bad) }
code { font-size: 13px; overflow-wrap: anywhere }
summary { cursor: pointer; margin: 24px 0 0; font-weight: 600 }

.grid { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 265px), 1fr)) }
.five { grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)) }
.glance { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
figure, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
figure { margin: 0; padding: 8px 12px 12px }
figure b { display: block; color: var(--ink); font-size: 15px; overflow-wrap: anywhere }
figcaption { font-size: 13px; line-height: 1.4 }
svg { width: 100%; height: auto; display: block }
svg text { font-family: system-ui, sans-serif !important }

.scroll { overflow-x: auto }
.narrow { max-width: 560px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td small, th small { display: block; font-weight: 400 }
td, th { padding: 7px 12px; text-align: right; border-top: 1px solid var(--line);
  vertical-align: top }
td { white-space: nowrap }
thead th { border: 0 }
tbody th { text-align: left; font-weight: 500; min-width: 120px }

.ask { margin: 24px 0 6px; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere }
.ask i { font-weight: 400; margin-right: 8px }
.answers { display: grid; gap: 8px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)) }
.answer { background: var(--card); border: 1px solid var(--line); border-top: 3px solid;
  border-radius: 8px; padding: 6px 10px 8px }
.answer p { margin: 4px 0; font-size: 15px; max-height: 12em; overflow-y: auto;
  white-space: pre-wrap; overflow-wrap: anywhere }
.answer b { color: var(--ink); font-size: 14px }
.answer > span { float: right; font-variant-numeric: tabular-nums; font-size: 14px }
@media (max-width: 600px) {
  td, th { padding: 6px 4px; font-size: 14px }
  tbody th { min-width: 84px; padding-left: 8px }
  td small, th small { font-size: 11px }
}
"""


@dataclass
class Options:
    out: str = opt(
        "out",
        "folder with the stages' checkpoints, results.json and answers; the report goes there too",
    )


# ---------------------------------------------------------------- what is there
def read_jsonl(path: Path) -> list[dict]:
    """The objects of a file, none where there is no file. Raises ValueError with file and line."""
    if not path.is_file():
        return []
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}, line {i}: not JSON; run that stage again") from None
    return rows


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(content, dict):
            return content
    except ValueError:
        pass
    raise ValueError(f"{path}: not JSON, or no object; make eval writes it again")


def read(out: Path):
    """→ all stages' names in order, results, {stage: lines of metrics.jsonl}, {name of an answers
    file: {prompt as JSON: its line}}.
    """
    results = read_json(out / "results.json")
    stages = in_order({*STAGES, *evaluated(results), *own_stages(out)})
    metrics, answers = {}, {}
    for stage in [*stages, "reward"]:
        lines = read_jsonl(out / stage / "metrics.jsonl")
        lines = lines or read_jsonl(out / stage / "state" / "metrics.jsonl")
        if lines and stage != "base":
            metrics[stage] = lines
    for name in [stage + greedy for stage in stages for greedy in GREEDY]:
        lines = read_jsonl(out / "answers" / f"{name}.jsonl")
        if lines:
            answers[name] = {json.dumps(a["prompt"]): a for a in lines}
    if not results and not metrics:
        raise FileNotFoundError(
            f"{out}: nothing to report on; results.json, or STAGE/metrics.jsonl of"
            f" {', '.join(CURVES)} or of your own stage was expected"
        )
    return stages, derived(results), metrics, answers


def derived(results: dict) -> dict:
    """Adds what share of the way was gone, and drops what compares SFT with itself."""
    sft, reward = results.get("sft", {}), results.get("reward", {})
    left = results["perfect"] - sft["gold_sampled"] if "gold_sampled" in sft else 0
    for stage in evaluated(results):
        r = results[stage]
        if stage != "sft" and "gain_vs_sft" in r and left > 0:
            r["to_perfect"] = r["gain_vs_sft"] / left
            r["to_perfect_ci"] = r["gain_vs_sft_ci"] / left
    if (best := reward.get("labeller_gold_accuracy", 0.5) - 0.5) > 0:
        reward["of_the_way"] = (reward["pair_accuracy"] - 0.5) / best
    for key in ("win_vs_sft", "win_vs_sft_decided", "kl_vs_sft", "implicit_accuracy"):
        sft.pop(key, None)
    return results


# ---------------------------------------------------------------- names and colours
def title(stage: str) -> str:
    """A stage's name in the report, as plain text."""
    return TITLE.get(stage, stage)


def what(stage: str) -> str:
    """What a stage does, as HTML."""
    return WHAT.get(stage) or f"Your own stage, from its folder {escape(stage)}."


def colours(stages) -> dict[str, str]:
    """{stage: its name in COLOURS}; a fork's seventh stage has the colour of its first."""
    own = [s for s in in_order(stages) if s not in TITLE]
    return {s: s for s in TITLE} | {s: OWN[i % len(OWN)] for i, s in enumerate(own)}


def numbers(lines: list[dict], key: str) -> list[tuple]:
    """[(step, value)] of a logged figure, where it is a number; steps count from 1."""
    points = []
    for r in lines:
        value = r.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            points.append((r["step"] + 1, value))
    return points


def curves_of(stage: str, lines: list[dict]) -> list[tuple]:
    """A stage's panels, as in CURVES. A fork's own stage gets the known panels whose figures it
    logs, except where one key means several things (`loss`), and one for each other figure.
    """
    if stage in CURVES:
        return CURVES[stage] + WATCHED
    logged = list(dict.fromkeys(key for r in lines for key in r if key != "step"))
    known = [curves for panels in CURVES.values() for curves in panels]
    shown = []
    for curves in known:
        keys = curves[1].keys()
        one_meaning = all(curves == other for other in known if keys & other[1].keys())
        if one_meaning and curves not in shown and keys & set(logged):
            shown.append(curves)
    captioned = {key for _, keys, _ in shown for key in keys}
    for key in logged:
        if key not in captioned:
            shown.append((key.replace("_", " ").capitalize(), {key: ""}, ""))
    return shown


# ---------------------------------------------------------------- pictures
def new_figure(width: float, height: float, columns=1):
    """matplotlib's Figure and its axes, bare."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "the report's pictures are drawn by matplotlib: pip install matplotlib"
        ) from None
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.patch.set_visible(False)
        ax.tick_params(colors=light("soft"), labelsize=9, length=0)
        ax.spines[:].set_visible(False)
        ax.grid(axis="y", color=light("line"), linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def light(name):
    return COLOURS[name][0]


def svg(figure, name: str) -> str:
    """A figure as inline SVG: its text stays text, its colours follow the page's."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = file.getvalue()[file.getvalue().index("<svg") :]
    text = re.sub(r'<g id="[^"]*"', "<g", re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S))
    for key, (colour, _) in COLOURS.items():
        text = text.replace(colour, f"var(--{key})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(name)}"', 1)


def smooth(ys: list, width: int) -> list:
    """Mean of up to `width` values around each."""
    return [
        sum(part) / len(part)
        for part in (ys[max(0, i - width // 2) : i + width // 2 + 1] for i in range(len(ys)))
    ]


def curve(ax, points: dict, colour: str):
    """points {label: [(step, value)]}; a long noisy curve is faint, its running mean above it."""
    for i, (label, of) in enumerate(points.items()):
        steps, ys = [p[0] for p in of], [p[1] for p in of]
        style = dict(
            color=light(colour if i == 0 else "soft"),
            linestyle="-" if i == 0 else "--",
            linewidth=1.8,
            label=label,
        )
        if len(ys) > 40:
            ax.plot(steps, ys, color=style["color"], linewidth=0.8, alpha=0.3)
            ys = smooth(ys, max(3, len(ys) // 12))
        ax.plot(steps, ys, **style, marker="o" if len(ys) == 1 else None)
    ax.margins(x=0.01)
    if len(points) > 1:
        ax.legend(frameon=False, fontsize=9, labelcolor=light("ink"))


def shown_in(key: str, results: dict) -> dict:
    """{stage: (value, half its interval)} of a picture at the top; the reward model stands beside
    the implicit rewards.
    """
    _, left_out, _ = GLANCE[key]
    shown = {}
    for stage in evaluated(results):
        figures = results[stage]
        if stage not in left_out and key in figures:
            shown[stage] = figures[key], figures.get(f"{key}_ci", 0.0)
    if key == "implicit_accuracy" and shown and "reward" in results:
        figures = results["reward"]
        shown["reward"] = figures["pair_accuracy"], figures.get("pair_accuracy_ci", 0.0)
    return shown


def bars(ax, results: dict, key: str, colour: dict):
    """One figure of all stages, with its 95 % interval."""
    shown, percent = shown_in(key, results), GLANCE[key][2]
    values, errors = zip(*shown.values(), strict=True)
    ax.bar(
        range(len(shown)),
        values,
        0.62,
        color=[light(colour[s]) for s in shown],
        yerr=errors,
        ecolor=light("ink"),
        error_kw=dict(linewidth=1.2, capsize=3),
    )
    words = [
        f"{title(s).split()[0]}\n{number(v, percent)}" for s, v in zip(shown, values, strict=True)
    ]
    size = 10.5 if len(shown) <= 5 else 8.5
    style = dict(fontsize=size, fontweight="bold", color=light("ink"), parse_math=False)
    ax.set_xticks(range(len(shown)), words, **style)
    ax.set_xlim(-0.6, len(shown) - 0.4)
    line = {"gold_sampled": results.get("perfect"), "win_vs_sft": 0.5, "implicit_accuracy": 0.5}
    line = line.get(key)
    if line:
        ax.axhline(line, color=light("soft"), linewidth=1.2, linestyle="--")
    if key == "gold_sampled" and line:
        style = dict(textcoords="offset points", fontsize=9, color=light("soft"))
        ax.annotate("perfect", (-0.55, line), (0, 3), **style)
    bottom = min(0, *(v - e for v, e in shown.values()))
    top = max(line or 0, *(v + e for v, e in shown.values()))
    ax.set_ylim(bottom, max(1.0, top) if percent else top * 1.1)
    if percent:
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], [f"{v} %" for v in (0, 25, 50, 75, 100)])


def glance(results: dict) -> list[str]:
    """The pictures at the top that there is something to draw in."""
    return [key for key in GLANCE if shown_in(key, results)]


def write_png(path: Path, results: dict, colour: dict):
    figure, axes = new_figure(3.9 * len(glance(results)), 3.4, len(glance(results)))
    for ax, key in zip(axes, glance(results), strict=True):
        bars(ax, results, key, colour)
        ax.set_title(GLANCE[key][0], fontsize=11, color=light("ink"), pad=12)
    figure.savefig(path, dpi=160, facecolor=light("page"), metadata={"Software": None})


# ---------------------------------------------------------------- the page
def number(value, percent) -> str:
    """A figure in words, – where there is none. percent: None for a count."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if percent is None:
        return f"{value:,}"
    return f"{100 * value:.0f} %" if percent else f"{value:.2f}"


def cell(figures: dict, key: str, percent) -> str:
    value, ci = figures.get(key), figures.get(f"{key}_ci")
    interval = f"<small>±{number(ci, percent)}</small>" if None not in (value, ci) else ""
    return f"<td>{number(value, percent)}{interval}</td>"


def table(results: dict, columns: list, rows: list, colour: dict, head=True) -> str:
    """Rows are figures, columns stages: five columns fit on a phone, more scroll."""
    body = ""
    for key, name, percent, meaning in rows:
        if any(key in results[c] for c in columns):
            cells = "".join(cell(results[c], key, percent) for c in columns)
            body += f"<tr><th>{name}<small>{meaning}</small></th>{cells}</tr>"
    if not head:
        return f'<div class="scroll narrow"><table><tbody>{body}</tbody></table></div>'
    top = "".join(f'<th style="color: var(--{colour[c]})">{escape(title(c))}</th>' for c in columns)
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def panel(heading: str, picture: str, words="") -> str:
    return f"<figure><b>{escape(heading)}</b>{picture}<figcaption>{words}</figcaption></figure>"


def settings(run: dict) -> str:
    """A run's options that are numbers."""
    words = []
    for name, value in run.get("options", {}).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            words.append(f"{name} {value:g}")
    return f"<p><code class='soft'>{escape(', '.join(words))}</code></p>" if words else ""


def stage_section(out: Path, stage: str, lines: list, colour: str) -> str:
    """What a stage does, its curves, its settings."""
    panels, run = [], read_json(out / stage / "run.json")
    for heading, keys, words in curves_of(stage, lines):
        points = {label: numbers(lines, key) for key, label in keys.items()}
        points = {label: found for label, found in points.items() if found}
        if points:
            figure, (ax,) = new_figure(2.8, 1.8)
            curve(ax, points, colour)
            panels.append(panel(heading, svg(figure, f"{title(stage)}: {heading}"), words))
    text = what(stage)
    ranked = read_jsonl(out / "comparisons.jsonl") if stage == "reward" else []
    if ranked:
        most = max(len(r["responses"]) for r in ranked)
        text += f" Here: {len(ranked):,} prompts, up to {most} answers each."
    name = escape(title(stage)) + ("" if run else " (not finished)")
    grid = "grid five" if len(panels) == 5 else "grid"
    return f"<h2>{name}</h2><p>{text}</p><div class='{grid}'>{''.join(panels)}</div>{settings(run)}"


def mark(good: bool, words: str) -> str:
    """Words in green after ✓ or in red after ✗: the signs are for those who see no colours."""
    return f'<span class="{"good" if good else "bad"}">{"✓" if good else "✗"}{words}</span>'


def reasons(answer: dict) -> str:
    """The rater's reasons; of an answer without gold, whether it ended."""
    if "gold" not in answer:
        return "" if answer["finished"] else "<small>not finished</small>"
    words = []
    for name, value in answer["reasons"].items():
        if name == "rude":
            words += [mark(False, "&nbsp;rude")] if value else []
        elif isinstance(value, bool):
            words.append(mark(value, f"&nbsp;{escape(name)}"))
        elif 0 < value < 1:
            words.append(f"{escape(name)}&nbsp;{value:.0%}")
    return f'<small class="why">{" ".join(words)}</small>'


def show_answer(stage: str, a: dict, colour: str, words=None) -> str:
    """words: HTML below the answer; default: the rater's reasons."""
    gold = mark(a["right"], f" {a['gold']:.2f}") if "gold" in a else ""
    text = escape(a["answer"].strip()) or '<i class="soft">(nothing)</i>'
    return (
        f'<div class="answer" style="border-top-color: var(--{colour})">'
        f"{gold}<b>{escape(title(stage))}</b><p>{text}</p>{words or reasons(a)}</div>"
    )


def pick(prompts: list[str], kinds: dict) -> list[str]:
    """The first prompt of every kind, then the second ones, …: nobody has chosen them."""
    seen, order = Counter(), []
    for i, p in enumerate(prompts):
        order.append((seen[kinds.get(p)], i, p))
        seen[kinds.get(p)] += 1
    return [p for _, _, p in sorted(order)[:PROMPTS]]


def question(prompt: str) -> str:
    """A prompt (JSON) as text, with the roles where it has several messages."""
    messages = json.loads(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def side_by_side(answers: dict, kinds: dict, greedy: str, colour: dict) -> str:
    """The same prompts, answered by every stage."""
    found = {s: answers[s + greedy] for s in colour if s + greedy in answers}
    shared = [p for p in next(iter(found.values()), {}) if all(p in a for a in found.values())]
    blocks = []
    for p in pick(shared, kinds):
        kind = f'<i class="soft">{escape(kinds[p])}</i>' if p in kinds else ""
        cells = "".join(show_answer(s, a[p], colour[s]) for s, a in found.items())
        blocks.append(asked(p, cells, kind))
    return "".join(blocks)


def asked(prompt: str, cells: str, kind="") -> str:
    """A prompt and what was answered, as HTML."""
    return (
        f'<div class="ask">{kind}{escape(question(prompt))}</div><div class="answers">{cells}</div>'
    )


def swapped(answers: dict, key: str) -> list[tuple]:
    """[(…, prompt, stage, stage)] of the answers that a measure orders otherwise than gold: those
    that both part furthest first, two of a prompt. answers: {stage: {prompt: line}}.
    """
    found = {}
    for (s, ours), (t, theirs) in combinations(answers.items(), 2):
        for p in ours.keys() & theirs.keys():
            a, b = ours[p], theirs[p]
            apart = (a["gold"] - b["gold"]) * (a[key] - b[key])
            found[p] = min(found.get(p, (-1e-9,)), (apart, p, s, t))
    return sorted(x for x in found.values() if len(x) > 1)[:EXAMPLES]


def measures(results: dict, answers: dict, colour: dict) -> str:
    """The measures that see a reference instead of the rubric: how often they order two stages'
    answers otherwise than gold, and where they do most.
    """
    found, names = results.get("measures"), {key: name for key, name, *_ in FIGURES}
    if not found:
        return ""
    columns = {names[key]: figures for key, figures in found.items()}
    blocks = [table(columns, list(columns), ORDER, dict.fromkeys(columns, "ink"))]
    sampled = {s: answers[s] for s in evaluated(results) if s in answers and s != "base"}
    for key, name in zip(found, columns, strict=True):
        text = ""
        for _, p, *two in swapped(sampled, key):
            lines = [(s, sampled[s][p]) for s in two]
            each = [(s, a, colour[s], f"<small>{name} {a[key]:.2f}</small>") for s, a in lines]
            text += asked(p, "".join(show_answer(*x) for x in each))
        if text:
            blocks.append(f"<details><summary>Where {name} errs most</summary>{text}</details>")
    return (
        "<h2>Measures beside gold</h2><p class='soft'>Pairs of answers to one prompt, sampled, of"
        " any two stages after the base: a measure that compares words with the perfect answer’s"
        f" prefers a polite lie to the truth in other words.</p>{''.join(blocks)}"
    )


def overview(results: dict, colour: dict) -> str:
    """The pictures at the top and the table of all stages."""
    stages = evaluated(results)
    if not stages:
        return "<p>Nothing is evaluated yet: <code>make eval</code> does it.</p>"
    pictures = []
    for key in glance(results):
        figure, (ax,) = new_figure(3.7, 2.8)
        bars(ax, results, key, colour)
        pictures.append(panel(GLANCE[key][0], svg(figure, GLANCE[key][0])))
    return (
        f'<div class="grid glance">{"".join(pictures)}</div>'
        "<h2>All stages</h2><p class='soft'>On held-out prompts, none of which was trained on. ± is"
        f" half a 95 % interval.</p>{table(results, stages, FIGURES, colour)}"
    )


def samples(out: Path, answers: dict, colour: dict) -> str:
    """The same prompts answered by each stage, sampled and greedy; the first block is open."""
    kinds = {}
    for r in read_jsonl(out / "world" / "heldout.jsonl"):
        if "item" in r:
            kinds[json.dumps(r["messages"])] = r["item"]["kind"]
    blocks = []
    for greedy, words in GREEDY.items():
        if text := side_by_side(answers, kinds, greedy, colour):
            is_open = "" if blocks else " open"
            blocks.append(f"<details{is_open}><summary>{words}</summary>{text}</details>")
    return "<h2>The same prompts, answered by each</h2>" * bool(blocks) + "".join(blocks)


def page(out: Path, stages: list, results: dict, metrics: dict, answers: dict) -> str:
    colour = colours(stages)
    parts = [overview(results, colour), measures(results, answers, colour)]
    parts.append(samples(out, answers, colour))
    if "base" in results:
        parts.append(f"<h2>{title('base')}</h2><p>{what('base')}</p>")
    for stage in [*CURVES, *(s for s in stages if s not in STAGES)]:
        if stage in metrics:
            parts.append(stage_section(out, stage, metrics[stage], colour[stage]))
        if stage == "reward" and stage in results:
            parts.append(table(results, ["reward"], REWARD, colour, head=False))
    style = CSS
    for i, word in enumerate(("LIGHT", "DARK")):
        style = style.replace(word, " ".join(f"--{k}: {c[i]};" for k, c in COLOURS.items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tinytune: {escape(str(out))}</title><style>{style}</style></head><body><main>"
        "<h1>From base model to assistant</h1>"
        f"<p class='soft'>tinytune’s report on <code>{escape(str(out))}</code></p>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def report(o: Options):
    out = Path(o.out)
    stages, results, metrics, answers = read(out)
    text = page(out, stages, results, metrics, answers)
    (out / "report.html").write_bytes(text.encode("utf-8", "replace"))
    if glance(results):
        write_png(out / "report.png", results, colours(stages))
    print(f"{out / 'report.html'}: written")


if __name__ == "__main__":
    main(report, Options, __doc__)

"""One page about a run:  python -m tools.report --out out      writes OUT/report.html and OUT/report.png

The page is one file: pictures are inline SVG, there is no script, nothing is fetched. It shows what
is there: each stage's curves from OUT/STAGE/metrics.jsonl (also of a stage that has not finished),
the figures of OUT/results.json, the answers of OUT/answers. report.png is its first picture.
matplotlib draws; it is imported here and nowhere else.
"""

import io
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

from common.run import main, opt
from tools.evals import STAGES

PROMPTS = 12  # shown side by side
# name: (on a light page, on a dark one); a picture is drawn in the light colours, which the page
# replaces by var(--name)
COLOURS = {
    "ink": ("#1f2328", "#e6e9ee"), "soft": ("#6a7280", "#9aa3b0"), "line": ("#d9dde3", "#373d47"), "page": ("#fbfbfa", "#14171b"),
    "card": ("#fffffe", "#1c2026"), "good": ("#1a7f4b", "#56c98a"), "bad": ("#c0392c", "#f08a7c"), "base": ("#8b93a0", "#949daa"),
    "sft": ("#3a6fb7", "#79a9ec"), "ppo": ("#d9691e", "#f59a56"), "dpo": ("#16876f", "#4fc4a8"), "simpo": ("#8a54b8", "#bd92e6"),
    "reward": ("#b8860b", "#e0b84a"),
}  # fmt: skip
TITLE = {
    "base": "Base",
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "simpo": "SimPO",
}
WHAT = {
    "base": "The pre-trained model, where everything starts. It continues text; nobody has taught it to answer.",
    "sft": "Supervised fine-tuning: the model learns to answer as the demonstrations do, the good ones and the bad ones alike. "
           "Only the answers' tokens are learnt, the prompts are read.",
    "reward": "The reward model learns from rankings which of two answers people prefer: −log σ(r₊ − r₋). "
              "Its score then stands in for people.",
    "ppo": "Reinforcement learning: the model answers, the reward model scores, and what scored better than expected becomes likelier. "
           "Each nat of distance from the SFT model costs β.",
    "dpo": "The short cut: of each pair the preferred answer is made likelier than the other one, measured against the SFT model. "
           "No reward model, no sampling.",
    "simpo": "DPO without a reference model: the log-probability per token is the reward, and the preferred answer must lead by a margin.",
}  # fmt: skip
# fmt: off
PAIRS = [
    ("Loss", {"loss": ""}, "DPO starts at ln 2 = 0.69: the model cannot tell the two apart yet."),
    ("Margin", {"margin": ""}, "Reward of the preferred answer less that of the other one: should grow."),
    ("Accuracy", {"accuracy": ""}, "Share of pairs whose preferred answer has the higher reward. Labellers disagree, so it stays below 1."),
    ("Log-probabilities", {"logp_chosen": "preferred", "logp_rejected": "other"}, "Both may fall: the loss sees their difference only."),
    ("Rewards", {"reward_chosen": "preferred", "reward_rejected": "other"}, "They should part; which way both drift matters less."),
]
# a stage's curves: title, {key in metrics.jsonl: label}, what to look for
CURVES = {
    "sft": [("Loss", {"loss": ""}, "Nats per token of the answers. Falls fast, then flattens.")],
    "reward": [
        ("Loss", {"loss": ""}, "ln 2 = 0.69 is guessing."),
        ("Accuracy", {"accuracy": ""}, "Share of the batch's pairs in the labellers' order. They disagree, so it stays below 1."),
    ],
    "ppo": [
        (
            "Reward",
            {"reward": ""},
            "Score of the reward model, in standard deviations of the demonstrations' scores. Should rise and flatten.",
        ),
        (
            "Gold",
            {"gold": ""},
            "What the true rater thinks; no part of the training sees it. If it turns down while reward climbs: hacked.",
        ),
        ("KL to the SFT model", {"kl": "k1", "kl_k3": "k3"}, "Nats an answer, by two estimators that should agree."),
        ("Entropy", {"entropy": ""}, "Nats a token. Falls slowly; near 0 all answers are alike."),
        ("Clip fraction", {"clip_fraction": ""}, "Share of tokens at the clip. Above 0.2 the steps are too large."),
        ("Explained variance", {"explained_variance": ""}, "Of the returns, by the critic. Should climb over 0.5."),
        ("Length", {"length": ""}, "Tokens an answer. A runaway is a sign of hacking."),
        ("Finished", {"finished": ""}, "Share of answers that reach their end. Should stay near 1."),
    ],
    "dpo": PAIRS,
    "simpo": PAIRS,
}
# fmt: on
# rows of the tables: key in results.json, name, as per cent?, what it means
FIGURES = [
    ("gold_sampled", "Gold, sampled", False, "mean score at temperature 1"),
    ("gold_greedy", "Gold, greedy", False, "mean score of the likeliest answer"),
    ("to_perfect", "Way to perfect", True, "gold gained over SFT, of what SFT left"),
    ("right_sampled", "Right, sampled", True, "at temperature 1"),
    ("right_greedy", "Right, greedy", True, "the likeliest answer"),
    ("win_vs_sft", "Wins over SFT", True, "same prompts, ties half"),
    ("win_vs_sft_decided", "Wins, decided", True, "same prompts, ties left out"),
    ("kl_vs_sft", "KL to SFT", False, "nats an answer"),
    ("finished", "Finished", True, "reached the answer’s end"),
    ("mean_length", "Length", False, "words an answer"),
    ("loss_per_token", "Held-out loss", False, "nats a token, lower is better"),
    ("implicit_accuracy", "Preference accuracy", True, "of the implicit reward log π − log π_SFT"),
    ("n", "Prompts", None, "held out"),
]
# fmt: off
REWARD = [
    ("pair_accuracy", "Pairs in the right order", True, "held-out answers; 50 % is guessing"),
    ("labeller_gold_accuracy", "The labellers on the same pairs", True, "who taught it"),
    ("of_the_way", "Way from guessing to the labellers", True, "can exceed 100 %: noise averages out"),
    ("labeller_agreement", "Two labellers agree", True, "on pairs that differ in gold"),
    ("truth_accuracy", "Right over wrong", True, "answers alike in all but truth"),
    ("length_matched_accuracy", "Pairs of like length", True, "nothing to gain from length"),
    ("swapped_prompts_accuracy", "With swapped prompts", True, "what manner alone tells it"),
    ("score_length_correlation", "Score and length", False, "correlation"),
    ("pairs", "Pairs", None, "held out"),
]
# fmt: on
GREEDY = {"": "sampled at temperature 1", ".greedy": "greedy: always the likeliest token"}
GLANCE = {  # pictures of the figures: title, the stages that it means something for, as per cent?
    "gold_sampled": ("Gold score, temperature 1", STAGES, False),
    "right_greedy": ("Right answers, greedy", STAGES, True),
    "win_vs_sft": ("Wins over SFT, ties half (even: 50 %)", STAGES[2:], True),
    "loss_per_token": ("Held-out loss, nats a token", STAGES, False),
    "implicit_accuracy": ("Preferences in order (guessing: 50 %)", (*STAGES[2:], "reward"), True),
}
CSS = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box } body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: auto; padding: 24px 16px 64px } h1 { font-size: 30px; margin: 8px 0 0 } h2 { margin: 48px 0 4px }
p { max-width: 75ch; margin: 4px 0 12px } .soft, figcaption, small { color: var(--soft) } small { font-size: 13px }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 265px), 1fr)) }
.five { grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)) }
.glance { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
figure { margin: 0; padding: 8px 12px 12px; background: var(--card); border: 1px solid var(--line); border-radius: 10px }
figure b { display: block; color: var(--ink); font-size: 15px } figcaption { font-size: 13px; line-height: 1.4 }
svg { width: 100%; height: auto; display: block } svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums } td small, th small { display: block; font-weight: 400 }
td, th { padding: 7px 12px; text-align: right; border-top: 1px solid var(--line); vertical-align: top } thead th { border: 0 }
td { white-space: nowrap } tbody th { text-align: left; font-weight: 500; min-width: 120px } .narrow { max-width: 560px }
.ask { margin: 24px 0 6px; font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere } .ask i { font-weight: 400; margin-right: 8px }
.answers { display: grid; gap: 8px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)) }
.answer { background: var(--card); border: 1px solid var(--line); border-top: 3px solid; border-radius: 8px; padding: 6px 10px 8px }
.answer p { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; max-height: 12em; overflow-y: auto }
 .answer b { color: var(--ink); font-size: 14px }
.answer > span { float: right; font-variant-numeric: tabular-nums; font-size: 14px } .good { color: var(--good) } .bad { color: var(--bad) }
summary { cursor: pointer; margin: 24px 0 0; font-weight: 600 } code { font-size: 13px; overflow-wrap: anywhere }
@media (max-width: 600px) { td, th { padding: 6px 4px; font-size: 14px } tbody th { min-width: 84px; padding-left: 8px }
  td small, th small { font-size: 11px } }
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
    """→ results, {stage: lines of metrics.jsonl}, {file name: {prompt as JSON: line of an answers
    file}}
    """
    results = read_json(out / "results.json")
    metrics = {
        s: read_jsonl(out / s / "metrics.jsonl") or read_jsonl(out / s / "state" / "metrics.jsonl")
        for s in CURVES
    }
    names = [stage + greedy for stage in STAGES for greedy in ("", ".greedy")]
    answers = {
        n: {json.dumps(a["prompt"]): a for a in read_jsonl(out / "answers" / f"{n}.jsonl")}
        for n in names
    }
    if not results and not any(metrics.values()):
        raise FileNotFoundError(
            f"{out}: nothing to report on; results.json, or STAGE/metrics.jsonl of"
            f" {', '.join(CURVES)} was expected"
        )
    return (
        derived(results),
        {s: m for s, m in metrics.items() if m},
        {n: a for n, a in answers.items() if a},
    )


def derived(results: dict) -> dict:
    """Adds the shares of the way that was gone, and takes out what SFT against itself would say."""
    sft, reward = results.get("sft", {}), results.get("reward", {})
    for stage, r in results.items():
        if (
            stage != "sft"
            and isinstance(r, dict)
            and "gain_vs_sft" in r
            and (left := results["perfect"] - sft["gold_sampled"]) > 0
        ):
            r["to_perfect"], r["to_perfect_ci"] = (
                r["gain_vs_sft"] / left,
                r["gain_vs_sft_ci"] / left,
            )
    if (best := reward.get("labeller_gold_accuracy", 0.5) - 0.5) > 0:
        reward["of_the_way"] = (reward["pair_accuracy"] - 0.5) / best
    for key in ("win_vs_sft", "win_vs_sft_decided", "kl_vs_sft", "implicit_accuracy"):
        sft.pop(key, None)
    return results


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
    """points {label: [(step, value)]}; a long noisy curve is drawn faint, its running mean over it."""
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


def bars(ax, results: dict, key: str):
    """One figure of all stages, with its 95 % interval."""
    _, stages, percent = GLANCE[key]
    if key == "implicit_accuracy" and "reward" in results:
        results = results | {
            "reward": {
                key: results["reward"]["pair_accuracy"],
                key + "_ci": results["reward"].get("pair_accuracy_ci", 0.0),
            }
        }
    shown = [s for s in stages if key in results.get(s, {})]
    values, errors = (
        [results[s][key] for s in shown],
        [results[s].get(key + "_ci", 0.0) for s in shown],
    )
    whiskers = dict(ecolor=light("ink"), error_kw=dict(linewidth=1.2, capsize=3))
    ax.bar(
        range(len(shown)), values, 0.62, color=[light(s) for s in shown], yerr=errors, **whiskers
    )
    words = [
        f"{TITLE[s].split()[0]}\n{number(v, percent)}" for s, v in zip(shown, values, strict=True)
    ]
    ax.set_xticks(range(len(shown)), words, fontsize=10.5, fontweight="bold", color=light("ink"))
    ax.set_xlim(-0.6, len(shown) - 0.4)
    line = {
        "gold_sampled": results.get("perfect"),
        "win_vs_sft": 0.5,
        "implicit_accuracy": 0.5,
    }.get(key)
    if line:
        ax.axhline(line, color=light("soft"), linewidth=1.2, linestyle="--")
    if key == "gold_sampled" and line:
        ax.annotate(
            "perfect",
            (-0.55, line),
            (0, 3),
            textcoords="offset points",
            fontsize=9,
            color=light("soft"),
        )
    top = max(line or 0, *(v + e for v, e in zip(values, errors, strict=True)))
    ax.set_ylim(
        min(0, *(v - e for v, e in zip(values, errors, strict=True))),
        max(1.0, top) if percent else top * 1.1,
    )
    if percent:
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0], [f"{v} %" for v in (0, 25, 50, 75, 100)])


def glance(results: dict) -> list[str]:
    """The figures there is something to draw of."""
    return [
        key
        for key, (_, stages, _) in GLANCE.items()
        if any(key in results.get(s, {}) for s in stages)
    ]


def write_png(path: Path, results: dict):
    figure, axes = new_figure(3.9 * len(glance(results)), 3.4, len(glance(results)))
    for ax, key in zip(axes, glance(results), strict=True):
        bars(ax, results, key)
        ax.set_title(GLANCE[key][0], fontsize=11, color=light("ink"), pad=12)
    figure.savefig(path, dpi=160, facecolor=light("page"), metadata={"Software": None})


# ---------------------------------------------------------------- the page
def number(value, percent) -> str:
    """A figure in words; – where there is none."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return (
        f"{value:,}" if percent is None else f"{100 * value:.0f} %" if percent else f"{value:.2f}"
    )


def cell(figures: dict, key: str, percent) -> str:
    ci = figures.get(key + "_ci") if figures.get(key) is not None else None
    return f"<td>{number(figures.get(key), percent)}{f'<small>±{number(ci, percent)}</small>' if ci is not None else ''}</td>"


def table(results: dict, columns: tuple, rows: list, head=True) -> str:
    """Rows are figures, columns stages: five columns fit on a phone."""
    body = "".join(
        f"<tr><th>{name}<small>{what}</small></th>{''.join(cell(results[c], key, percent) for c in columns)}</tr>"
        for key, name, percent, what in rows
        if any(key in results[c] for c in columns)
    )
    top = "".join(f'<th style="color: var(--{c})">{TITLE[c]}</th>' for c in columns)
    head = f"<thead><tr><th></th>{top}</tr></thead>" if head else ""
    return (
        "<div"
        f' class="scroll{"" if head else " narrow"}"><table>{head}<tbody>{body}</tbody></table></div>'
    )


def panel(title: str, picture: str, words="") -> str:
    return f"<figure><b>{title}</b>{picture}<figcaption>{words}</figcaption></figure>"


def stage_section(out: Path, stage: str, lines: list) -> str:
    """What a stage did, its curves, its settings."""
    panels, run = [], read_json(out / stage / "run.json")
    for title, keys, words in CURVES[stage]:
        points = {
            label: [(r["step"] + 1, r[k]) for r in lines if isinstance(r.get(k), int | float)]
            for k, label in keys.items()
        }
        if any(points.values()):
            figure, (ax,) = new_figure(2.8, 1.8)
            curve(ax, points, stage)
            panels.append(panel(title, svg(figure, f"{TITLE[stage]}: {title}"), words))
    settings = ", ".join(
        f"{k} {v:g}"
        for k, v in run.get("options", {}).items()
        if isinstance(v, int | float) and not isinstance(v, bool)
    )
    settings = f"<p><code class='soft'>{escape(settings)}</code></p>" if settings else ""
    title, what = TITLE[stage] + ("" if run else " (not finished)"), WHAT[stage]
    if stage == "reward" and (ranked := read_jsonl(out / "comparisons.jsonl")):
        what += (
            f" Here: {len(ranked):,} prompts, up to {max(len(r['responses']) for r in ranked)}"
            " answers each."
        )
    return (
        f"<h2>{title}</h2><p>{what}</p><div"
        f" class='grid{' five' * (len(panels) == 5)}'>{''.join(panels)}</div>{settings}"
    )


def marks(answer: dict) -> str:
    """Gold and the rater's reasons; ✓ and ✗ tell also who sees no colours."""
    if "gold" not in answer:
        return "" if answer["finished"] else "<small>not finished</small>"
    words = []
    for k, v in answer["reasons"].items():
        if isinstance(v, bool) and (k != "rude" or v):
            words.append(
                "<span"
                f' class="{"good" if v and k != "rude" else "bad"}">{"✓" if v and k != "rude" else "✗"}&nbsp;{escape(k)}</span>'
            )
        elif not isinstance(v, bool) and 0 < v < 1:
            words.append(f"{escape(k)}&nbsp;{v:.0%}")
    return f'<small class="why">{" ".join(words)}</small>'


def show_answer(stage: str, a: dict) -> str:
    gold = (
        f'<span class="{"good" if a["right"] else "bad"}">{"✓" if a["right"] else "✗"}'
        f" {a['gold']:.2f}</span>"
        if "gold" in a
        else ""
    )
    text = escape(a["answer"].strip()) or '<i class="soft">(nothing)</i>'
    return (
        '<div class="answer" style="border-top-color:'
        f' var(--{stage})">{gold}<b>{TITLE[stage]}</b><p>{text}</p>{marks(a)}</div>'
    )


def pick(prompts: list[str], kinds: dict) -> list[str]:
    """The first prompt of every kind, then the second ones, …: nobody has chosen them."""
    seen, order = Counter(), []
    for i, p in enumerate(prompts):
        order.append((seen[kinds.get(p)], i, p))
        seen[kinds.get(p)] += 1
    return [p for _, _, p in sorted(order)[:PROMPTS]]


def side_by_side(answers: dict, kinds: dict, greedy: str) -> str:
    """The same prompts, answered by every stage."""
    found = {s: answers[s + greedy] for s in STAGES if s + greedy in answers}
    shared = [p for p in next(iter(found.values()), {}) if all(p in a for a in found.values())]
    blocks = []
    for p in pick(shared, kinds):
        messages = json.loads(p)
        asked = "\n".join(
            m["content"] if len(messages) == 1 else f"{m['role']}: {m['content']}" for m in messages
        )
        kind = f'<i class="soft">{escape(kinds[p])}</i>' if p in kinds else ""
        cells = "".join(show_answer(s, a[p]) for s, a in found.items())
        blocks.append(
            f'<div class="ask">{kind}{escape(asked)}</div><div class="answers">{cells}</div>'
        )
    return "".join(blocks)


def overview(results: dict) -> str:
    """The pictures and the table of all stages."""
    pictures, stages = [], tuple(s for s in STAGES if s in results)
    for key in glance(results):
        figure, (ax,) = new_figure(3.7, 2.8)
        bars(ax, results, key)
        pictures.append(panel(GLANCE[key][0], svg(figure, GLANCE[key][0])))
    if not stages:
        return "<p>Nothing is evaluated yet: <code>make eval</code> does it.</p>"
    words = (
        "<h2>All stages</h2><p class='soft'>On held-out prompts, none of which was trained on. ± is"
        " half a 95 % interval.</p>"
    )
    return (
        '<div class="grid'
        f' glance">{"".join(pictures)}</div>{words}{table(results, stages, FIGURES)}'
    )


def samples(out: Path, answers: dict) -> str:
    """The same prompts answered by each stage, sampled and greedy; the first of them is open."""
    kinds = {
        json.dumps(r["messages"]): r["item"]["kind"]
        for r in read_jsonl(out / "world" / "heldout.jsonl")
        if "item" in r
    }
    found = [(words, side_by_side(answers, kinds, greedy)) for greedy, words in GREEDY.items()]
    found = [(words, text) for words, text in found if text]
    blocks = [
        f"<details{' open' * (i == 0)}><summary>{words}</summary>{text}</details>"
        for i, (words, text) in enumerate(found)
    ]
    return "<h2>The same prompts, answered by each</h2>" * bool(found) + "".join(blocks)


def page(out: Path, results: dict, metrics: dict, answers: dict) -> str:
    parts = [overview(results), samples(out, answers)]
    parts += [f"<h2>{TITLE['base']}</h2><p>{WHAT['base']}</p>"] if "base" in results else []
    for stage in CURVES:
        parts += [stage_section(out, stage, metrics[stage])] if stage in metrics else []
        parts += (
            [table(results, ("reward",), REWARD, head=False)]
            if stage == "reward" and stage in results
            else []
        )
    style = CSS
    for i, word in enumerate(("LIGHT", "DARK")):
        style = style.replace(word, " ".join(f"--{k}: {c[i]};" for k, c in COLOURS.items()))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}<title>tinytune:'
        f" {escape(str(out))}</title><style>{style}</style></head><body><main>"
        "<h1>From base model to assistant</h1><p class='soft'>tinytune’s report on"
        f" <code>{escape(str(out))}</code></p>"
        f"{''.join(parts)}</main></body></html>\n"
    )


def report(o: Options):
    out = Path(o.out)
    results, metrics, answers = read(out)
    text = page(out, results, metrics, answers)
    (out / "report.html").write_bytes(text.encode("utf-8", "replace"))
    if glance(results):
        write_png(out / "report.png", results)
    print(f"{out / 'report.html'}: written")


if __name__ == "__main__":
    main(report, Options, __doc__)

"""What each rule of curation is worth alone.

    python -m experiments.lima_rules --out out

Curation is a list of rules (tools/curate.py): form, near duplicates, quality, diversity. Here each
one alone works on 10,000 noisy records (data/world/noisy.py) and leaves or chooses 1,000; where a
rule leaves more, chance chooses. sft.py trains each thousand from the base, for equal steps, as in
experiments/lima.py, which also says what the signals of quality are. Beside them: no rule, and all.
One seed. Contamination is left out, since no prompt of the file is held out.

What it cannot show: what a rule is worth after the others. Diversity chooses among the best, if
there is a rule that knows them.
"""

from common.run import main
from experiments import lab, lima
from experiments.lima import FEW, SOME
from tools.report import light, new_figure
from tools.runs import cell, difference

ALONE = [("format", ""), ("duplicates", ""), ("diversity", "")]
ALONE += [*(("quality", signal) for signal in lima.SIGNALS), (lima.RULES, "gold")]


def runs(o) -> dict:
    """{rule: a run on the FEW that it leaves or chooses of SOME records}"""
    given = lima.files(o, 0)
    found = {"none": lima.tuned(o, 0, given[FEW])}
    for rules, signal in ALONE:
        name = "all" if rules == lima.RULES else rules
        name += f", by {signal}" if signal else ""
        found[name] = lima.tuned(o, 0, lima.curated(o, 0, given[SOME], rules, signal)[0])
    return found


def picture(figures: dict):
    """What each rule gains or costs."""
    drawn, (ax,) = new_figure(7, 3.2)
    shown = [name for name in figures if name != "none"]
    for i, name in enumerate(shown):
        x, error = (figures[name]["gained"][part] for part in ("mean", "ci"))
        ax.barh(-i, x, 0.6, xerr=error, color=light("good" if x > 0 else "bad"),
                ecolor=light("ink"))  # fmt: skip
    ax.axvline(0, color=light("ink"), linewidth=1)
    ax.set_yticks([-i for i in range(len(shown))], shown, color=light("ink"))
    none = figures["none"]["gold"]["mean"]
    ax.set_xlabel(f"gold gained over no rule ({none:.2f})", color=light("soft"))
    return drawn


def lima_rules(o: lima.Options):
    lab.begin(o, "lima_rules")
    found, figures, table = runs(o), {}, []
    gold = {name: [lab.items(run["lines"], "gold")] for name, run in found.items()}
    for name, run in found.items():
        f, row = lima.row_of(name, [run])
        figures[name] = f | {"gained": difference(gold[name], gold["none"])}
        gained = cell(figures[name]["gained"], digits=2, sign="+") if name != "none" else "–"
        table.append([*row, gained])
    note = (
        f"One seed; {FEW:,} records that a rule alone leaves or chooses of {SOME:,};"
        f" {lima.STEPS} steps of {lima.BATCH}; {o.n} held-out prompts."
    )
    head = ["rule", *lima.HEAD, "gold gained"]
    lab.publish(o, "lima_rules", figures, head, table, note, picture(figures))


if __name__ == "__main__":
    main(lima_rules, lima.Options, __doc__)

"""What experiments share: a stage run as a process, its cost, what is computed once and kept, and
figures over seeds.
"""

import hashlib
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from common.run import fingerprint, read_record
from metrics import bootstrap, mean, ratio


def words(options: dict) -> list[str]:
    """{option: value} as a command line's words; False and "" are left out."""
    found = []
    for name, value in options.items():
        if value is not False and value != "":
            found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def options_of(folder: Path) -> dict:
    """A finished run's options. FileNotFoundError where it has no record."""
    if (record := read_record(folder)) is None:
        raise FileNotFoundError(
            f"{folder}: has no run.json; a stage's finished run was expected, as make leaves it"
        )
    return record["options"]


def call(script: str, **options) -> str:
    """Runs a stage → what it printed. ValueError where it fails."""
    command = [sys.executable, script, *words(options)]
    p = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if p.returncode:
        raise ValueError(f"{script} into {options['out']} failed; its error stands above")
    return p.stdout


def computed() -> float:
    """The processors' minutes that this process's children have taken: a busy machine stretches the
    clock's, and hardly these.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) / 60


def run(script: str, out: Path, of: Path | None = None, **options) -> dict:
    """A stage's run, with the options of the finished run `of` but for these → its cost, also kept
    beside it: {"minutes" of the clock and "core_minutes" of the processors (None where it was
    resumed), "gb", "trained", "share" in %}.
    """
    note = out.with_name(f"{out.name}.json")  # a name may have a dot
    if of is not None:
        options = options_of(of) | {"overwrite": False} | options
    begun = (out / "state" / "state.safetensors").exists()
    resumed = begun and not options.get("overwrite")
    start, before = time.time(), computed()
    printed = call(script, **options | {"out": out})
    minutes = (time.time() - start) / 60
    if trained := re.search(r"trained: ([\d,]+) parameters, ([\d.]+)%", printed):
        cost = {  # a run that had finished before trains nothing, and its cost stays
            "minutes": None if resumed else minutes,
            "core_minutes": None if resumed else computed() - before,
            "gb": float(re.search(r"memory: ([\d.]+) GB at most", printed)[1]),
            "trained": int(trained[1].replace(",", "")),
            "share": float(trained[2]),
        }
        note.write_text(json.dumps(cost) + "\n")
    return json.loads(note.read_text()) if note.exists() else {}


def kept(file: Path, compute, of: list):
    """compute(), kept in a file, so that a second start computes nothing twice. of: all that
    decides it, checkpoints and files as Paths; where that has changed it is computed anew.
    """
    known = [fingerprint(x) if isinstance(x, Path) else x for x in of]
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    old = json.loads(file.read_text()) if file.exists() else None
    if not isinstance(old, dict) or old.get("of") != digest:
        part = file.with_name(file.name + ".part")  # an interruption leaves no half of a file
        part.write_text(json.dumps({"of": digest, "found": compute()}))
        part.replace(file)
    return json.loads(file.read_text())["found"]


# ---------------------------------------------------------------- figures over seeds
def figure(seeds: list) -> dict:
    """[(sum, count)] of the same items from each seed → the mean over all that was counted, its
    interval over items, and each seed's mean.
    """
    items = [(mean([total for total, _ in item]), item[0][1]) for item in zip(*seeds, strict=True)]
    return {
        "mean": ratio(items),
        "ci": bootstrap(items, ratio),
        "seeds": [ratio(s) for s in seeds],
        "items": len(items),
    }


def difference(ours: list, theirs: list) -> dict:
    """The figure of ours minus theirs, item by item."""
    return figure(
        [
            [(a - b, n) for (a, n), (b, _) in zip(x, y, strict=True)]
            for x, y in zip(ours, theirs, strict=True)
        ]
    )


def cell(f, scale=1.0, digits=3, sign="") -> str:
    text = f"{f['mean'] * scale:{sign}.{digits}f} ± {f['ci'] * scale:.{digits}f}"
    if len(f["seeds"]) == 1:
        return text
    low, high = min(f["seeds"]) * scale, max(f["seeds"]) * scale
    return f"{text} ({low:{sign}.{digits}f} to {high:{sign}.{digits}f})"


def check_marks(page: Path, names):
    """ValueError where the page lacks a table's two marks."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name in names:
        if f"<!-- {name} -->\n" not in text or f"<!-- /{name} -->" not in text:
            raise ValueError(
                f"{page}: the marks <!-- {name} --> and <!-- /{name} --> were expected, for"
                " a table to go between"
            )

"""Puts known bugs back, one at a time: each must make a test fail.

    python tests/mutants/run.py [WORD ...]      all of bugs.py, or those whose number or text has a WORD
    python tests/mutants/run.py --print         bugs.py as Markdown: docs/bugs.md

A bug changes one place of one file in a copy of the repository. The place is found by its tokens,
not by its layout, and must be there exactly once, so that the table cannot fall behind the code
unnoticed. Exit status 1 where a bug survives, where its place is gone, or where the tests fail
without any bug.
"""

import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "docs" / "bugs.md"
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
WORKERS = 2
processes = multiprocessing.get_context("forkserver")


# ---------------------------------------------------------------- a place in a file
def tokens(text: str) -> list:
    """Its tokens without layout: [(word, start, end)], offsets into the text."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    try:
        for t in tokenize.generate_tokens(io.StringIO(text).readline):
            if t.type not in LAYOUT and t.string.strip():
                at = [starts[row - 1] + column for row, column in (t.start, t.end)]
                found.append((t.string, *at))
    except (tokenize.TokenError, IndentationError):
        pass  # a part of a file need not be whole: its brackets stay open
    closing = [i for i, (word, *_) in enumerate(found) if word in ")]}"]
    trailing = {i - 1 for i in closing if i and found[i - 1][0] == ","}
    return [t for i, t in enumerate(found) if i not in trailing]


def places(text: str, old: str) -> list[tuple[int, int]]:
    """Where the tokens of `old` stand in the text: [(start, end)]."""
    there, wanted = tokens(text), [word for word, *_ in tokens(old)]
    words, n = [word for word, *_ in there], len(wanted)
    hits = [i for i in range(len(words) - n + 1) if words[i : i + n] == wanted]
    return [(there[i][1], there[i + n - 1][2]) for i in hits]


def mutate(text: str, old: str, new: str) -> str | None:
    """The text with the bug in it; None unless its place is there exactly once."""
    found = places(text, old)
    if len(found) != 1:
        return None
    start, end = found[0]
    return text[:start] + new.strip() + text[end:]


# ---------------------------------------------------------------- the tests
def _pytest(folder: Path, tests: list[str]):
    """In the child: pytest, its words in folder/said.txt, its status as exit status."""
    with open(folder / "said.txt", "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.chdir(folder)
    import pytest

    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={folder}"]
    sys.exit(int(pytest.main(options + tests)))


def run_tests(folder: Path, tests: list[str]) -> tuple[int, str]:
    """pytest in a process forked after torch was imported → (exit status, the first failure)."""
    child = processes.Process(target=_pytest, args=(folder, tests))
    child.start()
    child.join()
    said = (folder / "said.txt").read_text(errors="replace")
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
    return child.exitcode, found[1] if found else said[-500:]


def known_killers() -> dict:
    """{what: the test that caught it last} of docs/bugs.md: tried first."""
    rows = re.findall(
        r"^\| (.*?) \| .* \| `(tests/\S+?)` \|$", BOOK.read_text() if BOOK.exists() else "", re.M
    )
    return dict(rows)


def try_bug(folder: Path, bug, killer: str | None) -> tuple[str, str]:
    """→ ("caught", the test) or (what went wrong, its words)."""
    path = folder / bug.file
    text = path.read_text("utf-8")
    broken = mutate(text, bug.old, bug.new)
    if broken is None:
        return "STALE", f"{bug.file} has its place {len(places(text, bug.old))} times: {bug.old!r}"
    path.write_text(broken, "utf-8")
    try:
        status, said = run_tests(folder, [killer]) if killer else (0, "")
        if status != 1:
            status, said = run_tests(folder, [f"tests/test_{t}.py" for t in bug.tests.split()])
    finally:
        path.write_text(text, "utf-8")
    return {0: "SURVIVED", 1: "caught"}.get(status, "BROKEN"), said


def main():
    from bugs import BUGS

    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    processes.set_forkserver_preload(["torch._dynamo", "pytest"])
    bugs = [
        b
        for b in BUGS
        if not sys.argv[1:] or any(w in f"{b.number} {b.what}" for w in sys.argv[1:])
    ]
    killers, free = known_killers(), SimpleQueue()
    with tempfile.TemporaryDirectory() as tmp:
        leave = shutil.ignore_patterns(".*", "out", "smollm2", "__pycache__", "state")
        for i in range(WORKERS):
            shutil.copytree(ROOT, Path(tmp) / str(i), ignore=leave)
            free.put(Path(tmp) / str(i))
        every = sorted({t for b in bugs for t in b.tests.split()})
        status, said = run_tests(Path(tmp) / "0", [f"tests/test_{t}.py" for t in every])
        if status:
            sys.exit(f"run.py: the tests fail without any bug: {said}")

        def work(bug):
            folder = free.get()
            verdict, said = try_bug(folder, bug, killers.get(bug.what))
            free.put(folder)
            print(f"{verdict:9s} {bug.file}: {bug.what}: {said}", flush=True)
            return verdict

        with ThreadPoolExecutor(WORKERS) as pool:
            verdicts = list(pool.map(work, bugs))
    print(f"{verdicts.count('caught')} of {len(bugs)} bugs caught")
    sys.exit(set(verdicts) != {"caught"})


if __name__ == "__main__":
    main()

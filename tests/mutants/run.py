"""Puts known bugs back, one at a time: each must make a test fail.

    python tests/mutants/run.py              all of bugs.py
    python tests/mutants/run.py WORD ...     those with this number, or WORD in their text or file
    python tests/mutants/run.py --book       docs/bugs.md from bugs.py, running nothing

A bug changes one place of one file in a copy of the repository. The place is found by its tokens,
not by its layout, and must be there exactly once, so that the table cannot fall behind the code
unnoticed. The test that caught a bug last (docs/bugs.md) is tried first; where all bugs were run
and caught, that chapter is written anew. Exit status 1 where a bug survives, where its place is
gone, or where the tests fail without any bug.
"""

import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue

from bugs import BUGS, DO_NOT_APPLY, SECTIONS, SOURCES

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "docs" / "bugs.md"
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT)
WORKERS = 2
processes = multiprocessing.get_context("forkserver")


# ---------------------------------------------------------------- a place in a file
@lru_cache
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
    """pytest in a process forked after torch was imported → (exit status, the test that failed)."""
    child = processes.Process(target=_pytest, args=(folder, tests))
    child.start()
    child.join()
    said = (folder / "said.txt").read_text(errors="replace")
    found = re.search(r"^(?:FAILED|ERROR) ([^\s[]+)", said, re.M)  # without its parameters
    return child.exitcode, found[1] if found else said[-500:]


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


def try_all(chosen: list, killers: dict) -> list[tuple[str, str]]:
    """Each bug's verdict and the test that caught it, from copies that are gone afterwards."""
    leave = shutil.ignore_patterns(".*", "out", "smollm2", "__pycache__", "state")
    free = SimpleQueue()

    def work(bug):
        folder = free.get()
        try:
            verdict, said = try_bug(folder, bug, killers.get((bug.what, bug.file)))
        finally:
            free.put(folder)
        print(f"{verdict:9s} {bug.file}: {bug.what}: {said}", flush=True)
        return verdict, said

    with tempfile.TemporaryDirectory(prefix="mutants-") as tmp:
        copies = [Path(tmp) / str(i) for i in range(WORKERS)]
        for folder in copies:
            shutil.copytree(ROOT, folder, ignore=leave)
            free.put(folder)
        every = sorted({f"tests/test_{t}.py" for b in chosen for t in b.tests.split()})
        status, said = run_tests(copies[0], every)
        if status:
            sys.exit(f"run.py: the tests fail without any bug: {said}")
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(work, chosen))


# ---------------------------------------------------------------- the chapter
INTRO = """# Bugs, put back

The tests are tested too: `make mutants` puts each bug below back into the code, one at a time, and
a test must fail. Most were shipped by the projects named beside them and raised no error there; the
last section has our own. tests/mutants/bugs.py says which place of which file each one changes, and
this page is written from it (`make bugs`).
"""
HEAD = "| # | bug | file | caught by |\n| --- | --- | --- | --- |\n"
ROW = re.compile(r"^\| (?:\d+|–) \| (.+) \| `(\S+)` \| `(tests/\S+)` \|$", re.M)


def known_killers(text: str) -> dict:
    """{(what, file): the test that caught it last}, of docs/bugs.md."""
    return {(what, file): test for what, file, test in ROW.findall(text)}


def sources(numbers) -> str:
    """What was shipped where, and why a number has no bug here."""
    text = ""
    for n in filter(None, numbers):
        threads, story = SOURCES[n]
        absent = f" Not here: {DO_NOT_APPLY[n]}." if n in DO_NOT_APPLY else ""
        text += f"{n}. {story} *({threads})*{absent}\n"
    return text and text + "\n"


def table(numbers, killers: dict) -> str:
    """The bugs of these numbers, each with the test that caught it last, – where none is known."""
    text = HEAD
    for bug in sorted((b for b in BUGS if b.number in numbers), key=lambda b: b.number):
        test = killers.get((bug.what, bug.file))
        caught = f"`{test}`" if test else "–"
        text += f"| {bug.number or '–'} | {bug.what} | `{bug.file}` | {caught} |\n"
    return text


def book(killers: dict) -> str:
    """docs/bugs.md."""
    sections = (
        f"\n## {title}\n\n{sources(numbers)}{table(numbers, killers)}"
        for title, numbers in SECTIONS.items()
    )
    return INTRO + "".join(sections)


# ---------------------------------------------------------------- the command line
def pick(words: list[str]) -> list:
    """The bugs that one of the words names, all where there is none; ValueError for a word that
    names no bug.
    """

    def names(word, bug):
        return word == str(bug.number) if word.isdigit() else word in f"{bug.what} {bug.file}"

    for word in words:
        if not any(names(word, b) for b in BUGS):
            raise ValueError(f"no bug has {word!r} as its number or in its text or file")
    return [b for b in BUGS if not words or any(names(w, b) for w in words)]


def stop(*_):
    """Ends the tests that are running, so that the copies can go."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.exit(143)


def main():
    killers = known_killers(BOOK.read_text("utf-8") if BOOK.exists() else "")
    if sys.argv[1:] == ["--book"]:
        BOOK.write_text(book(killers), "utf-8")
        return
    try:
        chosen = pick(sys.argv[1:])
    except ValueError as e:
        print(f"run.py: {e}", file=sys.stderr)
        sys.exit(2)
    signal.signal(signal.SIGTERM, stop)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    processes.set_forkserver_preload(["torch._dynamo", "pytest"])
    verdicts = try_all(chosen, killers)
    pairs = zip(chosen, verdicts, strict=True)
    caught = {(b.what, b.file): test for b, (verdict, test) in pairs if verdict == "caught"}
    print(f"{len(caught)} of {len(chosen)} bugs caught")
    if len(caught) == len(BUGS):
        BOOK.write_text(book(caught), "utf-8")
    sys.exit(len(caught) < len(chosen))


if __name__ == "__main__":
    main()

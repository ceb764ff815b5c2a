"""The table of known bugs, its runner and its chapter (tests/mutants, docs/bugs.md)."""

import subprocess
import sys
from pathlib import Path

import bugs
import pytest
import run

ROOT = Path(__file__).parent.parent
RUNNER = ROOT / "tests" / "mutants" / "run.py"
TEXT = 'def f(a, b):\n    total = g(a,  # one\n              b)\n    return total + "a b"\n'


def test_a_place_is_found_through_other_layout():
    for old in ("total = g(a, b)", "total=g(\n  a,\n  b,\n)", "total = g(a, b)\n"):
        assert run.mutate(TEXT, old, "total = 0") == TEXT.replace(
            "g(a,  # one\n              b)", "0"
        )
    assert run.mutate(TEXT, '"a  b"', "1") is None  # inside a string layout counts


def test_part_of_a_statement_is_a_place_too():
    assert run.mutate(TEXT, "g(a,", "h(a,") == TEXT.replace("g(a,", "h(a,")
    assert run.mutate(TEXT, "return", "return -") == TEXT.replace("return", "return -")


def test_a_place_that_is_there_twice_or_not_at_all_is_stale(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(TEXT, "utf-8")
    for old, count in (("a", 2), ("total", 2), ("nowhere", 0)):
        bug = bugs.Bug(0, "", "x.py", "", old, "1")
        verdict, said = run.try_bug(tmp_path, bug, None)
        assert verdict == "STALE" and f"{count} times" in said
        assert file.read_text("utf-8") == TEXT


def test_each_bug_s_place_is_there_once_and_what_it_becomes_is_python():
    texts = {b.file: (ROOT / b.file).read_text("utf-8") for b in bugs.BUGS}
    for b in bugs.BUGS:
        broken = run.mutate(texts[b.file], b.old, b.new)
        assert broken not in (None, texts[b.file]), b
        compile(broken, b.file, "exec")


def test_each_bug_names_tests_that_are_there():
    for b in bugs.BUGS:
        assert b.tests and all((ROOT / f"tests/test_{t}.py").exists() for t in b.tests.split()), b


def test_every_number_has_its_source_and_a_bug_or_a_reason():
    numbers = {b.number for b in bugs.BUGS} - {0}
    assert not numbers & set(bugs.DO_NOT_APPLY)
    assert numbers | set(bugs.DO_NOT_APPLY) == set(bugs.SOURCES) == set(range(1, 64))
    shown = [n for numbers in bugs.SECTIONS.values() for n in numbers]
    assert sorted(shown) == list(range(64))
    for threads, story in bugs.SOURCES.values():
        assert threads and story.endswith(".")


def test_no_two_bugs_share_text_and_file():
    assert len({(b.what, b.file) for b in bugs.BUGS}) == len(bugs.BUGS)


def test_the_chapter_parses_back():
    killers = {(b.what, b.file): f"tests/test_x.py::test_{i}" for i, b in enumerate(bugs.BUGS)}
    assert run.known_killers(run.book(killers)) == killers
    some = dict(list(killers.items())[::7])  # where no test is known none is read
    assert run.known_killers(run.book(some)) == some


def test_the_chapter_drops_the_test_of_a_bug_whose_text_changed():
    b = bugs.BUGS[0]
    assert run.known_killers(run.book({(b.what + " now", b.file): "tests/test_x.py::test_y"})) == {}


def test_docs_bugs_md_is_written_from_the_table():
    text = (ROOT / "docs" / "bugs.md").read_text("utf-8")
    assert run.book(run.known_killers(text)) == text, "make bugs"


def test_words_pick_bugs_by_number_text_or_file():
    assert {b.number for b in run.pick(["6"])} == {6}
    assert {b.file for b in run.pick(["quant.py"])} == {"quant.py"}
    assert [b.what for b in run.pick(["k3 has", "follows k3"])] == [
        b.what for b in bugs.BUGS if "k3" in b.what
    ]
    assert run.pick([]) == bugs.BUGS
    for word in ("nonsense", "99"):
        with pytest.raises(ValueError, match=word):
            run.pick(["6", word])


def test_a_word_that_names_no_bug_is_refused_before_anything_runs():
    done = subprocess.run(
        [sys.executable, str(RUNNER), "6", "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "run.py: no bug has 'nonsense' as its number or in its text or file\n"

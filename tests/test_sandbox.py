"""The sandbox: right programs pass, wrong and hostile ones never do, nothing outside is touched,
and the run goes on. Hostile programs are bounded: where the sandbox is broken they do no harm.
"""

import gzip
import json
import re
import socket
import subprocess
import time
from pathlib import Path

import pytest
import stages
import tiny

from data.world import corpus
from tools import jail, sandbox

ROOT = Path(__file__).parent.parent
HUMAN_EVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
ANSWER = "assert f() == 42"
PATIENT = dict(seconds=60.0)  # for what must end by itself, on a busy machine too


def why_not(**how) -> str:
    """Why no program can be run here; "" where one can."""
    try:
        outcome = sandbox.run("x = 1", "assert x == 1", **PATIENT, **how)
    except ValueError as e:
        return str(e)
    assert outcome.passed, outcome
    return ""


NO_CONFINED, NO_UNCONFINED = why_not(), why_not(confined=False)
ANY = dict(confined=not NO_CONFINED)  # what this system allows
anyhow = pytest.mark.skipif(bool(NO_CONFINED and NO_UNCONFINED), reason=NO_UNCONFINED)
confined = pytest.mark.skipif(bool(NO_CONFINED), reason=NO_CONFINED)
unconfined = pytest.mark.skipif(bool(NO_UNCONFINED), reason=NO_UNCONFINED)


def run(program, test=ANSWER, **how):
    return sandbox.run(program, test, **PATIENT | ANY | how)


def left_behind() -> list:
    """Processes of the sandbox that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if sandbox.INSIDE.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            pass
    return found


# ---------------------------------------------------------------- programs and their tests
@anyhow
def test_a_right_program_passes_and_a_wrong_one_fails():
    assert run("def f():\n    print('hello')\n    return 42").passed
    wrong = run("def f():\n    print('hello')\n    return 41")
    assert (wrong.passed, wrong.status) == (False, "failed")
    assert "hello" in wrong.output and "AssertionError" in wrong.output


@anyhow
@pytest.mark.parametrize(
    "program, word",
    [
        ("def f(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("def g():\n    return 42", "NameError"),
        ("def f():\n    return f()", "RecursionError"),
        ("def f():\n    raise OSError('no')", "OSError: no"),
        ("class E(Exception):\n    pass\ndef f():\n    raise E('mine')", "RuntimeError: mine"),
        ("def f():\n    return object()", "only plain data"),
    ],
)
def test_a_broken_program_fails_with_its_reason(program, word):
    outcome = run(program)
    assert outcome.status == "failed" and word in outcome.output


@anyhow
def test_tests_see_what_a_program_of_their_own_process_would_show_them():
    program = """
import math
from typing import List
LIMIT = (1, "two")
def sort(things: List[int]):
    things.sort()
def refuse(x):
    raise ValueError(f"not {x}")
def count(n):
    yield from range(n)
def kinds():
    return {1: (2.5, None)}, {3}, frozenset([4]), b"5", 6j, True, -(10**5000), "\\ud800"
def named(a, *, b=2):
    return a - b
"""
    test = """
things = [3, 1, 2]
assert sort(things) is None and things == [1, 2, 3]
assert LIMIT == (1, "two") and math.floor(2.5) == 2
try:
    refuse(3)
except ValueError as e:
    assert str(e) == "not 3"
else:
    raise AssertionError
assert next(count(3)) == 0 and list(count(3)) == [0, 1, 2]
expected = {1: (2.5, None)}, {3}, frozenset([4]), b"5", 6j, True, -(10**5000), "\\ud800"
assert kinds() == expected and [type(x) for x in kinds()] == [type(x) for x in expected]
assert named(5, b=1) == 4
"""
    outcome = run(program, test)
    assert outcome.passed, outcome.output


def test_plain_data_comes_back_as_it_was_and_nothing_else_passes():
    x = {(1, "a"): [None, 1.5, {2}, frozenset()], True: (b"\x00", 1 - 2j, float("inf"))}
    back = jail.decode(json.loads(json.dumps(jail.encode(x))))
    assert back == x and repr(back) == repr(x)

    class Everything(int):
        def __eq__(self, other):
            return True

        __hash__ = None

    assert type(jail.decode(json.loads(json.dumps(jail.encode(Everything(7)))))) is int
    for foreign in (object(), test_plain_data_comes_back_as_it_was_and_nothing_else_passes):
        with pytest.raises(TypeError, match="only plain data"):
            jail.encode([foreign])


def test_an_empty_test_proves_nothing():
    with pytest.raises(ValueError, match="a test was expected"):
        sandbox.run("print('passed')", " \n")


# ---------------------------------------------------------------- false verdicts
FALSE = {
    "exits before the tests": "import os\nos._exit(0)",
    "exits politely": "import sys\nsys.exit(0)",
    "exits when called": "import os\ndef f():\n    os._exit(0)",
    "exits politely when called": "def f():\n    raise SystemExit(0)",
    "prints a verdict": "print('passed', flush=True)\ndef f():\n    print('passed')",
    "writes a verdict everywhere": """
import os
for i in range(1, 64):
    try:
        os.write(i, b"passed")
    except OSError:
        pass
def f():
    return 0""",
    "replaces builtins": """
import builtins
class Never(BaseException):
    pass
builtins.AssertionError = Never
builtins.all = builtins.any = builtins.bool = lambda *a: True
builtins.exec = builtins.compile = builtins.print = lambda *a, **k: None
def f():
    return 0""",
    "hides builtins": "def AssertionError():\n    return 0\ndef f():\n    return 0",
    "an excepthook": """
import os, sys
sys.excepthook = lambda *a: os._exit(0)
def f():
    return 0""",
    "atexit": """
import atexit, os
atexit.register(lambda: (os.write(1, b"passed"), os._exit(0)))
def f():
    return 0""",
    "patches time and signal": """
import signal, time
time.time = time.monotonic = time.perf_counter = lambda: 0.0
signal.signal = signal.alarm = lambda *a: None
def f():
    return 0""",
    "equals everything": """
class A:
    __eq__ = lambda *a: True
def f():
    return A()""",
    "an int that equals everything": """
class A(int):
    __eq__ = lambda *a: True
def f():
    return A(0)""",
    "patches its callers": """
import gc, os, sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_globals.items()):
        if name in ("encode", "decode", "be_tester", "serve"):
            frame.f_globals[name] = lambda *a: 42
    frame = frame.f_back
for x in gc.get_objects():
    if isinstance(x, dict) and "verdict" in x:
        os.write(x["verdict"], b"passed")
def f():
    return 0""",
    "answers in the harness's place": """
import json, os
for i in range(3, 64):
    try:
        os.write(i, json.dumps({"f": ["value", 42], "exec": ["function", None],
                    "__builtins__": ["value", {"dict": []}]}).encode() + b"\\n")
        os.write(i, json.dumps(["error", "SystemExit", "0"]).encode() + b"\\n")
        os.write(i, b"passed\\n" * 3)
    except OSError:
        pass
def f():
    return 0""",
    "looks for its tests": """
import gc, os, re, sys
os.set_blocking(0, False)
said = repr([x for x in gc.get_objects() if isinstance(x, (dict, list, tuple))][-4000:])
frame = sys._getframe()
while frame:
    said += repr(frame.f_locals)
    frame = frame.f_back
for i in range(3):
    try:
        said += repr(os.read(i, 9999))
    except OSError:
        pass
found = re.search(r"assert f.. == (\\d+)", said)
def f():
    return int(found[1]) if found else 0""",
    "kills the tests": """
import os, signal
for pid in (os.getppid(), 1):
    if pid:
        os.kill(pid, signal.SIGKILL)
def f():
    return 0""",
}


@anyhow
@pytest.mark.parametrize("what", FALSE)
def test_a_false_verdict_never_counts(what):
    outcome = run(FALSE[what])
    assert not outcome.passed and outcome.status == "failed"


@anyhow
def test_tests_that_catch_everything_end_with_their_program():
    test = "try:\n    f()\nexcept BaseException:\n    pass"
    assert run("def f():\n    raise KeyError", test).passed
    assert not run("import os\ndef f():\n    os._exit(0)", test).passed


@anyhow
def test_names_of_pythons_own_are_never_taken_from_the_program():
    program = "def len(x):\n    return 42\nabs = isinstance = len\ndef f():\n    return [0]"
    assert not run(program, "assert len(f()) == 42").passed
    assert run(program, "assert len(f()) == 1 and isinstance(f(), list)").passed


# ---------------------------------------------------------------- limits
LOST = """
import os, signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
"""


@anyhow
@pytest.mark.parametrize("end", ["while True:\n    pass", "time.sleep(600)", "def f(): return 42"])
def test_time_is_limited_and_nobody_is_left(end):
    """Not the one that ignores SIGTERM, nor the one that left its parents and its session."""
    ends = end.startswith("def")
    outcome = run(LOST + end, seconds=60.0 if ends else 1.0)
    assert outcome.status == ("passed" if ends else "time")
    assert not left_behind()


@unconfined
@pytest.mark.parametrize("end", ["while True:\n    pass", "def f(): return 42"])
def test_nobody_is_left_where_nothing_is_confined(end):
    outcome = run(LOST + end, confined=False, seconds=60.0 if end.startswith("def") else 1.0)
    assert outcome.passed == end.startswith("def")
    assert not left_behind()


@anyhow
def test_tests_that_never_end_are_stopped():
    assert run("def f():\n    return 42", "while True:\n    f()", seconds=1.0).status == "time"


@anyhow
def test_memory_is_limited_for_one_process_and_for_all_together():
    assert "MemoryError" in run("x = bytearray(10**10)").output
    program = """
import os, time
for _ in range(2):
    os.fork()
x = bytearray(b"x" * (150 * 2**20))
time.sleep(10)
"""
    assert run(program, memory=400).status == "memory"
    assert not left_behind()


@anyhow
def test_files_are_limited():
    program = """
def error(size):
    try:
        with open("big", "wb") as file:
            file.seek(size)
            file.write(b"x")
    except OSError as e:
        return type(e).__name__
f = lambda: (error(1000), error(10**10))
"""
    outcome = run(program, "assert f() == (None, 'OSError')")
    assert outcome.passed, outcome.output


@confined
def test_all_files_together_are_limited():
    program = """
def f():
    try:
        for i in range(4):
            with open(str(i), "wb") as file:
                file.write(b"x" * (6 * 2**20))
    except OSError as e:
        return i
"""
    assert run(program, "assert f() == 1").passed


@anyhow
def test_processes_are_limited():
    program = """
import os, time
def f():
    for i in range(60):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        except OSError:
            return i
    return 60
"""
    outcome = run(program, f"assert f() < {sandbox.PROCESSES}")
    assert outcome.passed, outcome.output


@anyhow
def test_output_is_limited():
    outcome = run("while True:\n    print('x' * 1000)")
    assert outcome.status == "output" and 0 < len(outcome.output) <= sandbox.OUTPUT


@anyhow
def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "key")
    assert run("import os\ndef f():\n    return dict(os.environ)", "assert f() == {}").passed


@anyhow
def test_an_interrupted_run_leaves_nobody(monkeypatch):
    def interrupted(pid):
        raise KeyboardInterrupt

    monkeypatch.setattr(sandbox, "used", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(LOST)
    assert not left_behind()


@confined
def test_a_killed_run_leaves_nobody():
    program = stages.processes.Process(
        target=sandbox.run, args=("while True:\n    pass", ANSWER), kwargs=dict(seconds=600.0)
    )
    program.start()
    while len(left_behind()) < 3:
        assert program.is_alive()
        time.sleep(0.01)
    program.kill()
    program.join()
    end = time.monotonic() + 60
    while left_behind() and time.monotonic() < end:
        time.sleep(0.01)
    assert not left_behind()


# ---------------------------------------------------------------- nothing outside is touched
@confined
def test_no_file_outside_can_be_written_read_or_linked_to(tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    program = f"""
import os
outside = {str(kept)!r}
def attempt(act):
    try:
        act()
    except OSError as e:
        return None
    return "done"
def f():
    os.symlink(outside, "link")
    os.symlink("/", "root")
    os.symlink("../" * 20 + outside[1:], "up")
    acts = [lambda p=p, m=m: open(p, m).close()
            for p in (outside, "link", "root" + outside, "up") for m in ("r", "r+", "w", "a")]
    acts += [lambda: os.remove(outside), lambda: os.mkdir(os.path.dirname(outside) + "/new"),
             lambda: os.link(outside, "hard"), lambda: open(os.__file__, "a"),
             lambda: open(os.path.dirname(os.__file__) + "/new", "w"), lambda: open("/new", "w")]
    return [attempt(act) for act in acts]
"""
    outcome = run(program, "assert not any(f()), f()")
    assert outcome.passed, outcome.output
    assert kept.read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["kept.txt"]


@confined
def test_no_socket_outside_can_be_reached(tmp_path):
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "s"))
        abstract = socket.socket(socket.AF_UNIX)
        abstract.bind("\0" + str(tmp_path))
        for server in (tcp, unix, abstract):
            server.listen()
        places = tcp.getsockname(), str(tmp_path / "s"), "\0" + str(tmp_path)
        program = f"""
import socket
def f():
    for place in {places!r}:
        kind = socket.AF_INET if isinstance(place, tuple) else socket.AF_UNIX
        try:
            socket.socket(kind).connect(place)
        except OSError:
            continue
        return place
"""
        outcome = run(program, "assert f() is None, f()")
        abstract.close()
    assert outcome.passed, outcome.output


@confined
def test_no_process_outside_can_be_signalled():
    sleeper = subprocess.Popen(["sleep", "60"])
    program = f"""
import os, signal
def f():
    try:
        os.kill({sleeper.pid}, signal.SIGTERM)
    except ProcessLookupError:
        return os.path.exists("/proc/{sleeper.pid}")
"""
    try:
        assert run(program, "assert f() is False").passed
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


@confined
def test_no_power_is_left_to_undo_it():
    program = """
import ctypes, os
libc = ctypes.CDLL(None)
def f():
    return [libc.unshare(0x10000000), libc.unshare(0x20000), libc.umount2(b"/tmp", 2),
            libc.mount(b"t", b"/tmp", b"tmpfs", 0, None),
            libc.mount(None, b"/usr/lib", None, 0x1020, None), libc.chroot(b"/tmp")]
"""
    outcome = run(program, "assert set(f()) == {-1}, f()")
    assert outcome.passed, outcome.output


def test_where_nothing_can_be_confined_it_refuses_and_names_the_way_out(monkeypatch):
    def forbidden(pid):
        raise PermissionError("not permitted")

    monkeypatch.setattr(sandbox, "map_users", forbidden)
    with pytest.raises(ValueError, match="no program can be run apart .*--unconfined"):
        sandbox.run("x = 1", "assert x == 1")
    assert not left_behind()


# ---------------------------------------------------------------- files of completions
def options(tmp_path, **given):
    given = dict(allow_code_execution=True, unconfined=bool(NO_CONFINED), seconds=60.0) | given
    return sandbox.Options(out=str(tmp_path / "figures.json"), **given)


def task(name="add", **more):
    test = "def check(candidate):\n    assert candidate(2, 3) == 5"
    return dict(task_id=name, prompt="def f(x, y):\n", entry_point="f", test=test) | more


@anyhow
def test_pass_at_k_of_a_file_and_nothing_is_run_twice(tmp_path, monkeypatch, capsys):
    good, bad = "    return x + y\n", "    return x - y\n"
    rows = [task("a", completions=[good, bad, bad, bad]), task("b", completions=[bad] * 4)]
    data = tiny.write(tmp_path / "answers.jsonl", rows)
    sandbox.score(options(tmp_path, data=data, k=2))
    found = json.loads((tmp_path / "figures.json").read_text())
    assert (found["n"], found["pass@1"], found["pass@2"]) == (2, 1 / 8, 1 / 4)
    assert {"pass@1_ci", "seed", "command", "confined"} <= found.keys()
    assert [r["passed"] for r in found["tasks"]] == [1, 0]
    assert "pass@2 0.250" in capsys.readouterr().out

    def again(*_, **__):
        raise AssertionError("run again")

    monkeypatch.setattr(sandbox, "run", again)
    with open(tmp_path / "figures.verdicts.jsonl", "a") as f:
        f.write('["half a li')
    sandbox.score(options(tmp_path, data=data, k=2))


@anyhow
def test_completions_find_their_tasks_in_another_file(tmp_path):
    with gzip.open(tmp_path / "tasks.jsonl.gz", "wt") as f:
        f.write(json.dumps(task()))
    rows = [dict(task_id="add", completion=c) for c in ("    return x + y", "    return None")]
    data = tiny.write(tmp_path / "answers.jsonl", rows)
    sandbox.score(options(tmp_path, data=data, problems=str(tmp_path / "tasks.jsonl.gz")))
    assert json.loads((tmp_path / "figures.json").read_text())["pass@1"] == 0.5


@pytest.mark.parametrize(
    "rows, more, words",
    [
        ([task(completion="")], dict(allow_code_execution=False), "--allow-code-execution"),
        ([task()], {}, ":1: completion: a string was expected"),
        ([task(completion="", test=None)], {}, ":1: test: a string was expected"),
        ([task(completions="    return 5")], {}, ":1: completions: a list was expected"),
        ([3], {}, ":1: an object was expected"),
        ([], {}, "no records"),
        ([task(completion="")], dict(k=2), "--k 2: task add has 1 completions"),
        ([task(completion="")], dict(reference=True), ":1: completion: a string was expected"),
    ],
)
def test_bad_files_are_refused_before_anything_runs(tmp_path, monkeypatch, rows, more, words):
    monkeypatch.setattr(sandbox, "run", None)
    data = tiny.write(tmp_path / "answers.jsonl", rows)
    with pytest.raises(ValueError, match=re.escape(words)):
        sandbox.score(options(tmp_path, data=data, **more))
    assert not (tmp_path / "figures.json").exists()


def test_the_script_says_what_it_needs():
    ended = stages.run("tools/sandbox.py", data="data/world/code.jsonl")
    stages.refused(ended, "--allow-code-execution")


# ---------------------------------------------------------------- tasks with reference solutions
@anyhow
@pytest.mark.skipif(not HUMAN_EVAL.exists(), reason="needs HumanEval's file")
def test_human_evals_solutions_pass_and_none_does_not():
    """Every sixth; python -m tools.sandbox --data FILE --reference runs all of them."""
    tasks = [r for _, r in sandbox.lines(str(HUMAN_EVAL))][2::6]
    right = [sandbox.with_test(r, r["canonical_solution"]) for r in tasks]
    wrong = [sandbox.with_test(r, "    return None\n") for r in tasks]
    outcomes = [x.passed for x in sandbox.check(right + wrong, **PATIENT, **ANY)]
    assert outcomes == [True] * len(right) + [False] * len(wrong)


CODE = [r for _, r in sandbox.lines(str(ROOT / "data/world/code.jsonl"))]


@pytest.mark.parametrize("record", CODE, ids=lambda r: r["entry_point"])
def test_the_worlds_programs_are_solved_by_their_solutions_alone(record):
    """These are our own: they run right here."""
    scope = {}
    exec("\n".join(sandbox.with_test(record, record["canonical_solution"])), scope)
    with pytest.raises(Exception):  # noqa: B017  whatever a wrong program raises
        exec("\n".join(sandbox.with_test(record, " None\n")), {})


def test_the_worlds_programs_are_not_the_corpus():
    seen = "".join(corpus.documents(0, 3_000_000))
    assert "def add(x, y):" in seen
    for record in CODE:
        last = record["prompt"].rpartition("def ")[2]
        assert "def " + last not in seen, record["task_id"]
    assert len({r["task_id"] for r in CODE}) == len({r["prompt"] for r in CODE}) == len(CODE)

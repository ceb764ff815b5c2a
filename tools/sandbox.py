"""Runs generated code apart, and says whether it passes its tests; pass@k of a file of completions.

    python -m tools.sandbox --data FILE.jsonl --allow-code-execution

A verdict cannot be forged: program and tests are different processes (jail.py). The tests call the
program's functions by name, and only plain data comes back (None, numbers, strings, bytes, lists,
tuples, dicts, sets; an iterator as its items), so an object that equals everything never reaches an
`==`. A program that exits, prints a verdict, replaces builtins or kills what it can find has not
answered, and fails. What passes is a program whose answers are right, guessed or not.

Confined, by namespaces for users, mounts, PIDs, network, IPC: it sees Python's libraries read-only,
an empty /tmp, no other file, process, socket or network, and has no right left to change that; at
the end or at a limit the kernel kills all of it. As root it runs as nobody. Where the system lets
no namespaces be made, run() refuses; unconfined, the limits and the kill still hold, and files, the
network and the user's other processes are within its reach.

What this misses. Not a virtual machine: a bug of the kernel is a way out. Time and memory of all
processes together are looked at 50 times a second. Memory that no address space holds (memfd, IPC)
is limited only by open files × file size × processes. The tests are trusted; they see neither the
program's objects nor its classes, and a program that must call back into the tests fails. A program
that knows its tests can answer by heart. Each pass says that these tests pass, not that it is right.
"""

import concurrent.futures
import contextlib
import gzip
import json
import math
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common import files
from common.run import main, opt, writing
from metrics import bootstrap, mean

INSIDE = str(Path(__file__).with_name("jail.py"))
NOBODY = 65534


@dataclass
class Options:
    data: str = opt("", "JSONL (or .gz) of tasks, HumanEval's or MBPP's fields, and completion(s)")
    problems: str = opt("", "the tasks, where --data has no more than task_id and completion(s)")
    reference: bool = opt(False, "score the tasks' own solutions instead: all must pass")
    out: str = opt("out/code.json", "figures; the verdicts go beside them, as .jsonl")
    k: str = opt("1", "the k of pass@k, separated by commas")
    seconds: float = opt(10.0, "of each program and its tests", above=0)
    memory: int = opt(512, "MB of each program's processes together", at_least=64)
    workers: int = opt(0, "programs at a time; 0: one per core", at_least=0)
    seed: int = opt(0, "seed of the intervals")
    allow_code_execution: bool = opt(False, "run the completions on this machine")
    unconfined: bool = opt(False, "run them where the system lets no program be confined, too")


@dataclass
class Outcome:
    """passed: all tests ended without an exception. status: passed, failed, or the limit that was
    reached: time, memory, output. output: what program and tests printed, tracebacks too.
    """

    passed: bool
    status: str
    output: str


# ---------------------------------------------------------------- one program
def run(
    program: str,
    test: str,
    *,
    seconds=10.0,
    memory=512,
    file_size=8,
    processes=8,
    output=32_000,
    confined=True,
) -> Outcome:
    """Runs `program`, then `test` against its functions (the docstring above says how).

    seconds: of the clock, for all of it; memory: MB, of its processes together and of the address
    space of each; file_size: MB, of a file and of all files together; processes: how many at once;
    output: bytes. confined=False: without namespaces, see above. ValueError where the program
    cannot be confined, and for a test that is empty: what a program says of itself proves nothing.
    """
    if not test.strip():
        raise ValueError("a test was expected, it is empty: what a program prints proves nothing")
    job = dict(program=program, test=test, seconds=seconds, memory=memory, file_size=file_size)
    job |= dict(processes=processes, confined=confined, root=os.geteuid() == 0)
    folder = tempfile.mkdtemp(prefix="sandbox-")
    if job["root"]:
        os.chown(folder, NOBODY, NOBODY)
    try:
        with start(job | dict(folder=folder)) as process:
            try:
                deadline = time.monotonic() + seconds
                return watch(process, deadline, memory * 2**20, output, confined)
            finally:
                end(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def start(job) -> subprocess.Popen:
    """The keeper, with its job; ValueError where there is no sandbox to be had."""
    process = subprocess.Popen(
        [sys.executable, "-suP", INSIDE, "confined" if job["confined"] else "unconfined"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=job["folder"],
        env={"PYTHONHASHSEED": "0"},
        start_new_session=True,
    )
    try:
        said = process.stdout.readline().decode().strip()
        if said != "ready":
            raise OSError(said.removeprefix("refused: ") or process.stderr.read().decode()[-300:])
        if job["confined"]:
            map_users(process.pid)
        process.stdin.write(json.dumps(job).encode())
        process.stdin.close()
        return process
    except OSError as e:
        end(process)
        raise refusal(e, job["confined"]) from None


def refusal(why, confined=True) -> ValueError:
    if not confined:
        return ValueError(f"no program can be run apart on this system ({why})")
    return ValueError(
        f"no program can be confined on this system ({why}); --unconfined runs it all the same: for"
        " code that you would run yourself, or in a container that holds nothing else"
    )


def map_users(pid: int):
    """Inside, we are root, and root's programs are nobody's."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        text = f"0 {own} 1\n"
        if os.geteuid() == 0:
            text += f"{NOBODY} {NOBODY} 1\n"
        elif kind == "gid":
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        Path(f"/proc/{pid}/{kind}_map").write_text(text)


def watch(process, deadline: float, memory: int, output: int, confined: bool) -> Outcome:
    """Reads verdict and output until the verdict's pipe is closed or a limit is reached."""
    said = {process.stdout: b"", process.stderr: b""}
    status = ""
    with selectors.DefaultSelector() as ready:
        for pipe in said:
            ready.register(pipe, selectors.EVENT_READ)
        while process.stdout in ready.get_map() and not status:
            for key, _ in ready.select(0.02):
                part = os.read(key.fd, 65_536)
                said[key.fileobj] += part
                if not part:
                    ready.unregister(key.fileobj)
            if len(said[process.stderr]) > output:
                status = "output"
            elif time.monotonic() > deadline:
                status = "time"
            elif used(process.pid) > memory:
                status = "memory"
    end(process)
    said[process.stderr] += rest(process.stderr)
    verdict = said[process.stdout].decode()
    if verdict.startswith("refused: "):
        raise refusal(verdict.removeprefix("refused: "), confined)
    status = status or ("passed" if verdict == "passed" else "failed")
    text = said[process.stderr][:output].decode(errors="replace")
    return Outcome(status == "passed", status, text)


def rest(pipe) -> bytes:
    """What is left in a pipe, without waiting for more."""
    os.set_blocking(pipe.fileno(), False)
    return pipe.read(65_536) or b""


def below(pid: int) -> list[int]:
    """A process's descendants, its children first."""
    found = []
    with contextlib.suppress(OSError):  # it may have ended by now
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found + [d for child in found for d in below(child)]


def used(pid: int) -> int:
    """Bytes of memory that its descendants hold."""
    pages = 0
    for child in below(pid):
        with contextlib.suppress(OSError, IndexError):
            pages += int(Path(f"/proc/{child}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def end(process):
    """Kills all that the keeper has below it, those that lost their parents too, then the keeper.
    They are stopped first: what is stopped makes no new ones.
    """
    if process.returncode is not None:
        return
    while left := below(process.pid):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---------------------------------------------------------------- many of them
def check(pairs, workers=0, known=None, **limits):
    """Yields an Outcome for each (program, test), in order; `workers` at a time, 0: one per core.
    known: {(program, test): Outcome}, not run again. limits: run's.
    """
    known, counts = known or {}, Counter()
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = [known.get(pair) or pool.submit(run, *pair, **limits) for pair in pairs]
        bar = tqdm(found, unit="program", dynamic_ncols=True)
        try:
            for outcome in bar:
                if isinstance(outcome, concurrent.futures.Future):
                    outcome = outcome.result()
                counts[outcome.status] += 1
                bar.set_postfix(counts)
                yield outcome
        finally:
            pool.shutdown(cancel_futures=True)


def body(completion: str) -> str:
    """A completion of a function's body, up to the first line at the left margin: a base model goes
    on with the next function (HumanEval's stop words cut there too).
    """
    return re.split(r"\n(?=\S)", completion)[0] + "\n"


def with_test(record: dict, completion: str) -> tuple[str, str]:
    """HumanEval's fields {prompt, entry_point, test} or MBPP's {test_list, test_setup_code}, and a
    completion → (program, test). ValueError where the fields are neither.
    """
    if isinstance(record.get("test_list"), list):
        return completion, "\n".join([record.get("test_setup_code") or "", *record["test_list"]])
    for field in ("prompt", "entry_point", "test"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: a string was expected (got {str(record.get(field))[:40]})")
    return record["prompt"] + completion, f"{record['test']}\ncheck({record['entry_point']})\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k)                                                 Chen et al. 2021"""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# ---------------------------------------------------------------- a file of completions
def lines(path: str):
    """Yields (where, record) of a JSONL file; ValueError that names file and line."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            record = files.parse(line, where, "one object per line was expected")
            if not isinstance(record, dict):
                raise ValueError(f"{where}: an object was expected (got {str(record)[:40]})")
            yield where, record


def completions(record: dict, reference: bool) -> list[str]:
    names = ("completions", "completion")
    if reference:
        names = ("canonical_solution", "code")
    found = next((record[n] for n in names if n in record), None)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(c, str) for c in found):
        raise ValueError(f"{' or '.join(names)}: text was expected (got {str(found)[:40]})")
    return found


def tasks(o) -> dict:
    """{task_id: [(program, test)]}, one pair for each completion."""
    known = {str(r.get("task_id")): r for _, r in lines(o.problems)} if o.problems else {}
    found = {}
    for where, record in lines(o.data):
        name = str(record.get("task_id", where))
        if o.problems and name not in known:
            raise ValueError(f"{where}: {o.problems} has no task_id {name}")
        try:
            pairs = [
                with_test(known.get(name, record), c) for c in completions(record, o.reference)
            ]
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        found.setdefault(name, []).extend(pairs)
    if not found:
        raise ValueError(f"{o.data}: no records in it")
    return found


def verdicts(o, pairs, limits):
    """Yields the pairs' Outcomes; each is written down, and what was written is not run again."""
    log, known = Path(o.out).with_suffix(".verdicts.jsonl"), {}
    log.parent.mkdir(parents=True, exist_ok=True)
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # half a line, where the run was killed
            *pair, under, outcome = json.loads(line)
            if under == limits:
                known[tuple(pair)] = Outcome(*outcome)
    with writing(log), open(log, "a", encoding="utf-8") as f:
        for pair, outcome in zip(pairs, check(pairs, o.workers, known, **limits), strict=True):
            if pair not in known:
                f.write(json.dumps([*pair, limits, [*vars(outcome).values()]]) + "\n")
                f.flush()
            yield outcome


def score(o):
    if not o.allow_code_execution:
        raise ValueError("a model wrote these programs: --allow-code-execution runs them here")
    ks = [int(k) for k in o.k.split(",") if k.isdecimal() and int(k)]
    if not ks or len(ks) < len(o.k.split(",")):
        raise ValueError(f"--k is {o.k}, whole numbers from 1 up were expected, as in 1,10")
    found = tasks(o)
    for name, pairs in found.items():
        if len(pairs) < max(ks):
            raise ValueError(f"--k {max(ks)}: task {name} has {len(pairs)} completions, give more")
    limits = dict(seconds=o.seconds, memory=o.memory, confined=not o.unconfined)
    outcomes = verdicts(o, [pair for pairs in found.values() for pair in pairs], limits)
    rows = []
    for name, pairs in found.items():
        own = [next(outcomes).status for _ in pairs]
        rows.append(dict(task_id=name, n=len(own), passed=own.count("passed"), statuses=own))
    result = dict(command=shlex.join(sys.argv), n=len(rows), seed=o.seed, **limits)
    for k in ks:
        each = [pass_at_k(r["n"], r["passed"], k) for r in rows]
        result |= {f"pass@{k}": mean(each), f"pass@{k}_ci": bootstrap(each, seed=o.seed)}
        print(f"pass@{k} {mean(each):.3f} ± {result[f'pass@{k}_ci']:.3f}  (n = {len(rows)} tasks)")
    files.write_json(Path(o.out), result | dict(tasks=rows))


if __name__ == "__main__":
    main(score, Options, __doc__)

"""Runs generated code apart, and says whether it passes its tests; pass@k of a file of completions.

    python -m tools.sandbox --data FILE.jsonl --allow-code-execution

A verdict cannot be forged: program and tests are two processes (jail.py). The tests call the
program's functions by name, and only plain data comes back (numbers, strings, lists, dicts and the
like), so an object that equals everything never reaches an `==`. What exits, prints a verdict,
replaces builtins or kills all it finds has not answered, and fails. Nor can it read its tests.

Confined, by namespaces for users, mounts, PIDs, network and IPC, it sees Python's libraries
read-only, an empty /tmp, and no other file, process, socket or network; root's run as nobody. Where
the system allows no namespaces, run() refuses. Unconfined, the limits still hold, but your files,
the network and your other processes are within reach.

What this misses. A bug of the kernel is a way out. Memory that no address space holds (memfd, IPC)
is limited only by open files × file size × processes. The tests are trusted; they see no object or
class of the program's, what must call back into them fails, and where they call a helper that the
program could define anew, as three of HumanEval's do, they believe it. To pass is to pass these
tests, not to be right.
"""

import concurrent.futures
import contextlib
import gzip
import json
import os
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
from data import records
from metrics import bootstrap, mean, pass_at_k

INSIDE = str(Path(__file__).with_name("jail.py"))
NOBODY = 65534
FILE_SIZE = 8  # MB, of a file and of all files together
PROCESSES = 8  # of a program, at once
OUTPUT = 32_000  # bytes


@dataclass
class Options:
    data: str = opt("", "JSONL (or .gz) of HumanEval's fields and completion or completions")
    problems: str = opt("", "the tasks, where --data has task_id and completions alone")
    reference: bool = opt(False, "score the tasks' own solutions instead: all must pass")
    out: str = opt("out/code.json", "figures; the verdicts go beside them, as .jsonl")
    k: int = opt(1, "pass@k too, beside pass@1", at_least=1)
    seconds: float = opt(10.0, "of each program and its tests", above=0)
    seed: int = opt(0, "seed of the intervals")
    allow_code_execution: bool = opt(False, "run the completions on this machine")
    unconfined: bool = opt(False, "run them where the system lets no program be confined, too")


@dataclass
class Outcome:
    """status: "passed", "failed", or the limit that was reached, "time", "memory" or "output";
    output: what program and tests printed.
    """

    passed: bool
    status: str
    output: str


# ---------------------------------------------------------------- one program
def run(program: str, test: str, *, seconds=10.0, memory=512, confined=True) -> Outcome:
    """Runs `program`, then `test`, which calls its functions.

    seconds: of the clock, for all of it; memory: MB, of its processes together and of the address
    space of each; confined=False: without namespaces. ValueError where the program cannot be
    confined, and for an empty test: what a program says of itself proves nothing.
    """
    if not test.strip():
        raise ValueError("a test was expected, it is empty: what a program prints proves nothing")
    folder = tempfile.mkdtemp(prefix="sandbox-")
    job = dict(program=program, memory=memory, confined=confined, folder=folder)
    job |= dict(file_size=FILE_SIZE, processes=PROCESSES, root=os.geteuid() == 0)
    try:
        if job["root"] and not confined:
            os.chown(folder, NOBODY, NOBODY)
        status, verdict, text = watch(start(job, test), seconds, memory * 2**20)
        if verdict.startswith("no: "):
            raise OSError(verdict[4:])
    except OSError as e:
        way_out = "; --unconfined lets it run all the same: for code you would run yourself"
        raise ValueError(f"no program can be run apart ({e}){way_out * confined}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    status = status or ("passed" if verdict == "passed" else "failed")
    return Outcome(status == "passed", status, text)


def start(job, test) -> subprocess.Popen:
    """The keeper, with its job; OSError with the reason why there is none."""
    command = [sys.executable, "-suP", INSIDE, "confined" if job["confined"] else "unconfined"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    how = dict(cwd=job["folder"], env={"PYTHONHASHSEED": "0"}, start_new_session=True)
    process = subprocess.Popen(command, **pipes, **how)
    try:
        said = process.stdout.readline().decode()
        if said != "ready\n":
            raise OSError((said or process.stderr.read().decode())[-300:].strip())
        if job["confined"]:
            map_users(process.pid)
        text = json.dumps(job)
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # its verdict says why
            pipe.write(f"{len(text):8}{text}{json.dumps(test)}".encode())
    except OSError:
        end(process)
        raise
    return process


def map_users(pid: int):
    """Inside, we are root, and root's programs are nobody's."""
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        text = f"0 {own} 1\n"
        if os.geteuid() == 0:
            text += f"{NOBODY} {NOBODY} 1\n"
        elif kind == "gid":
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        Path(f"/proc/{pid}/{kind}_map").write_text(text)


def watch(process, seconds, memory: int) -> tuple[str, str, str]:
    """Waits for verdict or limit, and ends all of it → (the limit or "", verdict, output)."""
    verdict, text = process.stdout, process.stderr
    said, status, deadline = {verdict: b"", text: b""}, "", time.monotonic() + seconds
    with process, selectors.DefaultSelector() as ready:
        for pipe in said:
            ready.register(pipe, selectors.EVENT_READ)
        try:
            while verdict in ready.get_map() and not status:
                for key, _ in ready.select(0.02):
                    part = os.read(key.fd, 65_536)
                    said[key.fileobj] += part
                    if not part:
                        ready.unregister(key.fileobj)
                if len(said[text]) > OUTPUT:
                    status = "output"
                elif time.monotonic() > deadline:
                    status = "time"
                elif used(process.pid) > memory:
                    status = "memory"
        finally:
            end(process)
        os.set_blocking(text.fileno(), False)
        said[text] += text.read(OUTPUT) or b""  # what was printed last
    return status, said[verdict].decode(), said[text][:OUTPUT].decode(errors="replace")


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
    """Kills all that is below the keeper, then the keeper. What is stopped first forks no more."""
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
def check(pairs, known=None, **limits):
    """Yields an Outcome for each (program, test), in order, as many at a time as there are cores.
    known: {(program, test): Outcome}, not run again. limits: run's.
    """
    known, counts = known or {}, Counter()
    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
    try:
        waiting = {p: pool.submit(run, *p, **limits) for p in pairs if p not in known}
        reach = "" if limits.get("confined", True) else "unconfined: files and network in reach"
        for pair in (bar := tqdm(pairs, reach, unit="program", dynamic_ncols=True)):
            outcome = known.get(pair) or waiting[pair].result()
            counts[outcome.status] += 1
            bar.set_postfix(counts)
            yield outcome
    finally:
        pool.shutdown(cancel_futures=True)


def with_test(record: dict, completion: str) -> tuple[str, str]:
    """HumanEval's {prompt, entry_point, test} and a completion → (program, test)."""
    for field in ("completion", "prompt", "entry_point", "test"):
        records._string(record | dict(completion=completion), field)
    return record["prompt"] + completion, f"{record['test']}\ncheck({record['entry_point']})\n"


# ---------------------------------------------------------------- a file of completions
def lines(path: str):
    """Yields (where, record) of a JSONL file; ValueError that names file and line."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            record = files.parse(line, f"{path}:{number}", "one object per line was expected")
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: an object was expected (got {record!r:.40})")
            yield f"{path}:{number}", record


def tasks(o) -> dict:
    """{task_id: [(program, test)]}, one pair for each completion."""
    known = {str(r.get("task_id")): r for _, r in lines(o.problems)} if o.problems else {}
    found = {}
    for where, record in lines(o.data):
        name = str(record.get("task_id", where))
        given = record.get("completions", [record.get("completion")])
        if o.reference:
            given = [record.get("canonical_solution")]
        try:
            if not isinstance(given, list):
                raise ValueError(f"completions: a list was expected (got {str(given)[:40]})")
            if o.problems and name not in known:
                raise ValueError(f"{o.problems} has no task_id {name}")
            pairs = [with_test(known.get(name, record), c) for c in given]
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        found.setdefault(name, []).extend(pairs)
    if not found:
        raise ValueError(f"{o.data}: no records in it")
    return found


def verdicts(o, pairs, limits):
    """Yields the pairs' Outcomes; each is written down, and what was written is not run again."""
    log, known = Path(o.out).with_suffix(".verdicts.jsonl"), {}
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # half a line
            *pair, under, outcome = json.loads(line)
            if under == limits:
                known[tuple(pair)] = Outcome(*outcome)
    log.parent.mkdir(parents=True, exist_ok=True)
    with writing(log), open(log, "a", encoding="utf-8") as f:
        for pair, outcome in zip(pairs, check(pairs, known, **limits), strict=True):
            if pair not in known:
                f.write(json.dumps([*pair, limits, [*vars(outcome).values()]]) + "\n")
                f.flush()
            yield outcome


def score(o):
    if not o.allow_code_execution:
        raise ValueError("a model wrote these programs: --allow-code-execution runs them here")
    found = tasks(o)
    for name, pairs in found.items():
        if len(pairs) < o.k:
            raise ValueError(f"--k {o.k}: task {name} has {len(pairs)} completions, give more")
    limits = dict(seconds=o.seconds, confined=not o.unconfined)
    outcomes = iter([*verdicts(o, [p for pairs in found.values() for p in pairs], limits)])
    rows = []
    for name, pairs in found.items():
        own = [next(outcomes).status for _ in pairs]
        rows.append(dict(task_id=name, n=len(own), passed=own.count("passed"), statuses=own))
    result = dict(
        command=shlex.join(["python", "-m", "tools.sandbox", *sys.argv[1:]]),
        n=len(rows),
        seed=o.seed,
        **limits,
    )
    for k in sorted({1, o.k}):
        each = [pass_at_k(r["n"], r["passed"], k) for r in rows]
        result |= {f"pass@{k}": mean(each), f"pass@{k}_ci": bootstrap(each, seed=o.seed)}
        print(f"pass@{k} {mean(each):.3f} ± {result[f'pass@{k}_ci']:.3f}  (n = {len(rows)} tasks)")
    files.write_json(Path(o.out), result | dict(tasks=rows))


if __name__ == "__main__":
    main(score, Options, __doc__)

"""Runs generated code apart, and says whether it passes its tests: pass@k.

    python -m tools.sandbox --data FILE.jsonl --allow-code-execution

TODO
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
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
    try:
        process = start(job | dict(folder=folder))
        try:
            return watch(process, time.monotonic() + seconds, memory * 2**20, output)
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
        raise ValueError(refusal(e)) from None


def refusal(why) -> str:
    return (
        f"this system lets no program be confined ({why}): --unconfined runs it without, for code"
        " that you would run yourself, or in a container that holds nothing else"
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


def watch(process, deadline: float, memory: int, output: int) -> Outcome:
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
        raise ValueError(refusal(verdict.removeprefix("refused: ")))
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
    while process.poll() is None and (left := below(process.pid)):
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for child in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


# ---------------------------------------------------------------- many of them
def check(pairs, workers=0, known=(), **limits):
    """Yields an Outcome for each (program, test), in order; `workers` at a time, 0: one per core.
    known: {key(program, test): Outcome} that are not run again. limits: run's.
    """

    def one(pair):
        found = known[key(*pair)] if key(*pair) in known else run(*pair, **limits)
        return pair, found

    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        counts = Counter()
        bar = tqdm(pool.map(one, pairs), total=len(pairs), unit="program", dynamic_ncols=True)
        try:
            for pair, outcome in bar:
                counts[outcome.status] += 1
                bar.set_postfix(counts)
                yield outcome
        finally:
            pool.shutdown(cancel_futures=True)


def key(program: str, test: str) -> str:
    return hashlib.sha256(json.dumps([program, test]).encode()).hexdigest()[:16]


def body(completion: str) -> str:
    """The completion up to its first line at the left margin, where a function's body is over; a
    base model goes on and on (HumanEval's stop words do the same).
    """
    return re.split(r"\n(?=[^\s])", completion)[0] + "\n"


def with_test(record: dict, completion: str) -> tuple[str, str]:
    """HumanEval's fields {prompt, entry_point, test} or MBPP's {test_list, test_setup_code}, and a
    completion → (program, test). ValueError where the fields are neither.
    """
    if isinstance(record.get("test_list"), list):
        setup = record.get("test_setup_code") or ""
        return completion, "\n".join([setup, *record["test_list"]])
    for field in ("prompt", "entry_point", "test"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{field}: a string was expected (got {record.get(field)!r:.40})")
    return record["prompt"] + completion, f"{record['test']}\ncheck({record['entry_point']})\n"


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k)."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)

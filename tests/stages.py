"""Stages as processes of their own, and a tiny world for them.

Each run is a true process, with its exit status and its two streams, that can be killed; but it is
forked from a server that has imported torch already, which saves the three seconds that this costs
(torch._dynamo: an optimizer's first step imports it).
"""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import namedtuple
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import tiny
import torch

from data import templates, tokenizer
from data.world import corpus, world

ROOT = Path(__file__).parent.parent
Result = namedtuple("Result", "status out err")
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["torch._dynamo", "pytest", "tools.evals", "preloaded", "data.world.world"]
)


def _child(stage, argv, streams, before):
    """In the child: the stage as the main program, its streams in files. before: called first, for
    a limit or a patch.
    """
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{streams}/{name}", os.O_WRONLY), stream)
    # also where pytest itself runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(ROOT)
    if stage == "pretrain.py":  # Muon's bf16 is 20 times slower on a processor without bf16 units
        torch.Tensor.bfloat16 = lambda self: self.float().clone()
    sys.argv = [stage, *argv]
    if before:
        before()
    runpy.run_path(str(ROOT / stage), run_name="__main__")


class Stage:
    """A stage that runs: Stage("sft.py", model=…, steps=6); a value True is a flag."""

    def __init__(self, stage, before=None, **options):
        argv = [
            a
            for k, v in options.items()
            for a in [f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)])
        ]
        self.streams = tempfile.mkdtemp()
        for name in ("out", "err"):
            Path(self.streams, name).touch()
        self.process = processes.Process(target=_child, args=(stage, argv, self.streams, before))
        with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT / "tests")):
            forkserver.ensure_running()  # it finds `preloaded` there: Python 3.11 gives it no path
        self.process.start()

    def kill(self, number=signal.SIGKILL):
        os.kill(self.process.pid, number)

    def end(self, timeout=120) -> Result:
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the stage hangs"
        texts = [Path(self.streams, name).read_text() for name in ("out", "err")]
        shutil.rmtree(self.streams)
        return Result(self.process.exitcode, *texts)


def run(stage, before=None, **options) -> Result:
    return Stage(stage, before, **options).end()


def done(stage, **options) -> Result:
    """A run that must succeed."""
    result = run(stage, **options)
    assert result.status == 0, result.err
    return result


def refused(result, *words, status=2) -> str:
    """Asserts that a run ended with one line on stderr that has all the words → the line. Above it
    may stand what was said of the records (records.report) and the bar."""
    *above, line = result.err.strip("\n").split("\n")
    assert result.status == status, result.err
    assert "Traceback" not in result.err and all(
        "|" in x or " used, " in x or "no effect" in x or not x for x in above
    ), result.err
    for word in words:
        assert word in line, f"{word!r} is not in: {line}"
    return line


def saved_step(state) -> int:
    """How far a saved state is; 0 where there is none."""
    from safetensors import safe_open

    if not (state / "state.safetensors").exists():
        return 0
    with safe_open(state / "state.safetensors", "pt") as f:
        return json.loads(bytes(f.get_tensor("note").tolist()))["step"]


def slowly():
    """A step takes a twentieth of a second more, so that a run is stopped on its way however busy
    the machine is.
    """
    from common.run import Run

    real = Run.log
    Run.log = lambda *args, **figures: (time.sleep(0.05), real(*args, **figures))


def types(text: str):
    """What is typed, and the end of the input."""
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    os.dup2(read, 0)
    sys.stdin = open(0, encoding="utf-8")


def dies_at_the_end():
    """Killed when all is trained and saved, and nothing is written yet."""
    from common.run import Run

    Run.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)


def kill_after(steps: int, state, stage, number=signal.SIGKILL, /, **options) -> Result:
    """Starts a stage and kills it once it has logged so many steps more than are logged already,
    and has saved a state.
    """
    log = state / "metrics.jsonl"
    logged = lambda: log.read_bytes().count(b"\n") if log.exists() else 0  # noqa: E731
    steps += logged()
    running = Stage(stage, slowly, **options)
    while running.process.is_alive() and not (
        logged() >= steps and (state / "state.safetensors").exists()
    ):
        time.sleep(0.002)
    if running.process.is_alive():
        running.kill(number)
    return running.end()


def interrupt(times: int, out, stage, **options) -> int:
    """Kills a run `times` times, each at a random step further on → the saved step."""
    home = out.with_name(out.name + ".run") if out.suffix else out
    for _ in range(times):
        killed = kill_after(random.randint(1, 4), home / "state", stage, out=out, **options)
        assert killed.status == -signal.SIGKILL, killed.err
    return saved_step(home / "state")


# the options of a small run of each stage; "simpo" is dpo.py's
SMALL = {
    "sft": dict(steps=24, batch=8, accumulate=2, length=160, lr=1e-3, warmup=2),
    "compare": dict(prompts=96, k=4, batch=8, max_new_tokens=24),
    "reward": dict(steps=24, batch=8, lr=1e-3, warmup=2, length=160),
    "ppo": dict(
        iterations=8, batch=8, minibatch=4, max_new_tokens=24, target_kl=0.01, horizon=20, warmup=1
    ),
    "dpo": dict(steps=24, batch=8, accumulate=2, nll=0.1, length=160, warmup=2),
    "simpo": dict(steps=24, batch=8, loss="simpo", beta=2.0, length=160, warmup=2),
    "pretrain": dict(steps=6, batch=2, context=16),
}


def script(stage) -> str:
    return "dpo.py" if stage == "simpo" else f"{stage}.py"


def make_world(folder) -> dict:
    """A tiny model that has seen a few answers, its reward model, and small files → for each stage
    the options of a run.
    """
    tok = tokenizer.train(corpus.documents(0, 60_000), 400)
    templates.adopt(tok, "chatml")
    base = tiny.folder(
        folder / "base",
        tok=tok,
        std=0.1,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        head_dim=16,
        max_position_embeddings=160,
    )
    data = {
        k: tiny.write(folder / f"{k}.jsonl", v)
        for k, v in world.records(0, {"sft": 220, "prompts": 110, "heldout": 44}).items()
    }
    places = {k: str(folder / k) for k in ("sft", "comparisons.jsonl", "reward")}
    chat = dict(model=places["sft"])
    options = {
        "sft": dict(model=base, data=data["sft"]),
        "compare": chat | dict(data=data["prompts"]),
        "reward": chat | dict(data=places["comparisons.jsonl"], reference=data["sft"]),
        "ppo": chat | dict(data=data["prompts"], reward=places["reward"]),
        "dpo": chat | dict(data=places["comparisons.jsonl"]),
        "simpo": chat | dict(data=places["comparisons.jsonl"]),
        "pretrain": {},
    }
    options = {k: v | SMALL[k] for k, v in options.items()}
    done("sft.py", out=places["sft"], **options["sft"] | dict(steps=30, lr=1e-2))
    done("compare.py", out=places["comparisons.jsonl"], **options["compare"])
    done("reward.py", out=places["reward"], **options["reward"])
    return options


def copy(source, target) -> str:
    (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, target)
    return str(target)

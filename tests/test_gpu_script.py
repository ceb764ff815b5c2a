"""tools/gpu.sh: its table is written as it goes, whatever becomes of a section; and tools/mfu.py,
which counts a step's arithmetic."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from common.memory import SIZES
from tools import mfu

ROOT = Path(__file__).parent.parent


def script(folder, *names, python="echo hello; echo 'a|b'; echo", **environment):
    """Runs it with a PY that does what `python` says → status, what it said, the table's rows."""
    (folder / "python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "python").chmod(0o755)
    given = dict(PY=folder / "python", OUT=folder / "out") | environment
    given = os.environ | {k: str(v) for k, v in given.items()}
    command = ["bash", str(ROOT / "tools/gpu.sh"), *names]
    done = subprocess.run(command, env=given, capture_output=True, text=True)
    table = folder / "out" / "gpu.md"
    rows = table.read_text().splitlines()[2:] if table.exists() else []
    return done.returncode, done.stdout, [[c.strip() for c in r[1:-1].split("|")] for r in rows]


def test_a_row_says_what_a_command_said_last(tmp_path):
    status, said, rows = script(tmp_path, "qlora65", "dequantise")
    assert status == 0 and [row[0] for row in rows] == ["card", "qlora-65B", "dequantise"]
    assert rows[2][1].endswith("-m tools.bench dequantise`") and rows[2][2].endswith(" of 60")
    assert rows[1][3] == "a/b" and rows[2][3] == "hello; a/b"  # of both sides, and the ratio
    assert (tmp_path / "out" / "dequantise.log").read_text() == "hello\na|b\n\n"
    assert len(script(tmp_path, "mfu")[2]) == 7  # a second call adds to the table


def test_what_fails_or_takes_too_long_says_so_and_the_next_one_runs(tmp_path):
    _, _, rows = script(tmp_path, "dequantise", "mfu", python="echo on a; echo no GPU; exit 3")
    assert [row[3] for row in rows] == ["failed, status 3: no GPU"] * 5
    (tmp_path / "slow").mkdir()
    slow = "echo first; echo so far; exec sleep 60"
    _, _, rows = script(tmp_path / "slow", "dequantise", python=slow, LIMIT=1)
    assert [row[3] for row in rows] == ["cut off after 1 s; so far"] * 2


def test_what_a_section_reads_is_made_once(tmp_path):
    (tmp_path / "out" / "all" / "world").mkdir(parents=True)
    _, _, rows = script(tmp_path, "sft", "dpo")
    names = ["card", "sft-135M", "sft-1.1B", "made-comparisons", "dpo-135M", "dpo-1.1B"]
    assert [row[0] for row in rows] == names


CALLS = re.findall(r"^#     bash tools/gpu.sh (.*)", (ROOT / "tools/gpu.sh").read_text(), re.M)


@pytest.mark.parametrize("call", CALLS)
def test_a_quarter_of_an_hour_holds_it(call, tmp_path):
    """With two minutes for the start of a machine. The tests' two halves run side by side."""
    if "all" in call.split():
        (tmp_path / "out" / "all" / "sft").mkdir(parents=True)
    _, _, rows = script(tmp_path, *call.split())
    limits = {row[0]: int(row[2].split(" of ")[1]) for row in rows}
    assert len(limits) > 1 and sum(limits.values()) - limits.get("tests-second", 0) <= 780


def test_the_calls_hold_every_section(tmp_path):
    named = script(tmp_path)[1].split("sections: ")[1].split()
    assert sorted(named) == sorted(" ".join(CALLS).split())


def test_start_up_is_reported_apart(tmp_path):
    """For as many processes as make starts."""
    said = 'case "$2" in *subprocess*) echo "$2" | tail -n 1;; esac'
    _, _, rows = script(tmp_path, "startup", python=said)
    assert "{took * 9:.0f} s of all, {took * 9:.0f} s of quick" in rows[1][3]


@pytest.mark.parametrize(
    "names, words", [([], "sections: startup"), (["al"], "no section al: startup")]
)
def test_an_unknown_section_is_refused_before_anything_runs(tmp_path, names, words):
    status, said, rows = script(tmp_path, *names)
    assert status == 2 and words in said and not rows and not (tmp_path / "out").exists()


def test_flops_are_those_of_the_shape(capsys, monkeypatch):
    """Counted by torch, but for attention, of which it counts the whole square."""
    from torch.utils.flop_counter import FlopCounterMode

    c = mfu.SIZES["135M"]
    small = type(c)(64, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
    monkeypatch.setitem(mfu.SIZES, "135M", small)
    model, T = mfu.Transformer(small), 16
    tokens, counted = torch.zeros(1, T + 1, dtype=torch.long), FlopCounterMode(display=False)
    with counted:
        mfu.sft_loss(model, tokens, tokens, torch.zeros_like(tokens)).backward()
    n = sum(i * o for i, o in mfu.linears(small).values()) * small.num_hidden_layers
    products = 6 * (n * (T + 1) + small.vocab_size * 32 * T)  # the head reads the targets alone
    assert products <= counted.get_total_flops() <= 1.5 * products
    squares = 6 * 2 * 32 * (T + 1) ** 2
    assert mfu.matrices(small) == n and mfu.step_flops(small, [T + 1], T) == products + squares
    assert mfu.step_flops(small, [T + 1], T, frozen=True) == products * 2 / 3 + squares
    assert mfu.step_flops(small, [5, 3], 2) == sum(mfu.step_flops(small, [k], 1) for k in (5, 3))
    compiled = []
    monkeypatch.setattr(mfu, "compile_model", lambda model, dynamic: compiled.append(model))
    mfu.mfu(mfu.Options("135M", 2, 16, 2, "on", 1, 8, "cpu"))
    assert len(compiled) == 1
    assert "135M, 2 x 16 tokens, 2 a row, compiled:" in capsys.readouterr().out
    assert SIZES["135M"] is small


def test_the_limits_are_rates():
    cpu = torch.device("cpu")
    assert mfu.matrix_rate(cpu, 64) > 1e6 and mfu.copy_rate(cpu) > 1e6

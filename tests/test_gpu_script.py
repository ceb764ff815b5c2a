"""tools/gpu.sh: its table is written as it goes, whatever becomes of a section; and tools/mfu.py,
which counts a step's arithmetic."""

import os
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
    status, said, rows = script(tmp_path, "dequantise", "qlora")
    assert status == 0 and [row[0] for row in rows] == [
        "card",
        "dequantise",
        "qlora-7B",
        "qlora-65B",
    ]
    assert rows[1][1].endswith("-m tools.bench dequantise`") and rows[1][3] == "a/b"
    assert (tmp_path / "out" / "dequantise.log").read_text() == "hello\na|b\n\n"
    assert len(script(tmp_path, "mfu")[2]) == 8  # a second call adds to the table


def test_what_fails_or_takes_too_long_says_so_and_the_next_one_runs(tmp_path):
    _, _, rows = script(tmp_path, "dequantise", "mfu", python="echo no GPU; exit 3")
    assert [row[3] for row in rows] == ["failed, status 3: no GPU"] * 5
    (tmp_path / "slow").mkdir()
    _, _, rows = script(tmp_path / "slow", "dequantise", python="exec sleep 60", LIMIT=1)
    assert [row[3] for row in rows] == ["cut off after 1 s"] * 2


@pytest.mark.parametrize(
    "names, words", [([], "sections: tests"), (["al"], "no section al: tests")]
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
    mfu.mfu(mfu.Options("135M", 2, 16, 2, False, 1, 8, "cpu"))
    assert "135M, 2 x 16 tokens, 2 a row:" in capsys.readouterr().out
    assert SIZES["135M"] is small


def test_the_limits_are_rates():
    cpu = torch.device("cpu")
    assert mfu.matrix_rate(cpu, 64) > 1e6 and mfu.copy_rate(cpu) > 1e6

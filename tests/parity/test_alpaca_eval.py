"""Against live alpaca_eval: its length-controlled fit (scikit-learn's liblinear, an L1 penalty
chosen by cross-validation) and ours, on made-up annotations. Ours goes on to convergence, liblinear
stops at 1e-4 of its own. Each test prints the difference that it measured (pytest -s).
"""

import sys
from pathlib import Path

import numpy as np
import pytest

from tools import verdicts

pytest.importorskip("alpaca_eval.metrics.glm_winrate")
sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
from make import alpaca_fit, made_up_pairs  # noqa: E402


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("equal", [0, 200])
def test_the_length_controlled_win_rate(seed, equal):
    draw = np.random.default_rng(seed + 10)
    theta, phi, psi = draw.normal(-1, 1), draw.normal(1, 0.5), draw.normal(0.5, 0.3)
    pairs = made_up_pairs(400, draw, theta, phi, psi, seed % 2 == 0)
    same = made_up_pairs(equal, draw, 0, phi, psi, True)
    theirs, ours = alpaca_fit(pairs, same), verdicts.length_controlled(pairs, same)
    difference = abs(ours["win_rate"] - theirs["win_rate"])
    print(f"\nLC win rate: {difference:.2g}", end=" ")
    assert difference < 1e-3

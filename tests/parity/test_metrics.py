"""Against live rouge_score, scikit-learn and lm-eval."""

import json
import sys
from pathlib import Path

import pytest

from common import hub
from metrics import macro_f1, multiple_choice, rouge
from tools.bench import other_choices
from tools.peers import lm_eval

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "golden"))
from make import CHOICES, choices, rouge_numbers, rouge_pairs  # noqa: E402


@pytest.mark.parametrize("stem", (False, True))
def test_rouge(stem):
    pytest.importorskip("rouge_score")
    from nltk.stem.porter import PorterStemmer

    stemmer = PorterStemmer().stem if stem else None
    for (text, reference), row in zip(rouge_pairs(), rouge_numbers(stem), strict=True):
        ours = [x for score in rouge(text, reference, stemmer).values() for x in score.values()]
        assert ours == pytest.approx(row, abs=1e-9, rel=0), (text, reference)


def test_macro_f1():
    metrics = pytest.importorskip("sklearn.metrics")
    labels, said = list("aaaabbcdd"), list("aaabbcaxd")
    expected = metrics.f1_score(labels, said, average="macro", zero_division=0)
    assert macro_f1(labels, said) == pytest.approx(expected, abs=1e-12)


def test_choices_of_the_base():
    pytest.importorskip("lm_eval")
    model, tok = hub.load(ROOT / "data" / "base")
    theirs = choices(None)
    assert len(theirs) == len(CHOICES)
    for item, got in zip(theirs, multiple_choice(model, tok, theirs), strict=True):
        assert got["logprobs"] == pytest.approx(item["logprobs"], abs=1e-4)


@pytest.mark.parametrize("name", ("arc_easy", "piqa"))
def test_choices_of_smollm2(name):
    """50 records of a benchmark: the same choices by both scorings, but for ties."""
    pytest.importorskip("lm_eval")
    file = ROOT.parent / "shared" / "data" / f"{name}.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    items = [json.loads(line) for line in file.read_text("utf-8").splitlines()[:50]]
    ours = multiple_choice(*hub.load(ROOT / "smollm2"), items)
    theirs = lm_eval(ROOT / "smollm2", file, 50, 8)()
    assert not other_choices(items, ours, theirs)
    for a, (lls, *_) in zip(ours, theirs, strict=True):
        assert a["logprobs"] == pytest.approx(lls, abs=1e-3)

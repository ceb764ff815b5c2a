"""The shipped base: small enough, opens, knows the world; its recipe gives the recorded losses
again.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import pretrain
from common import hub
from common.run import read_record, sha256
from data.world import corpus, world
from sampling import generate

BASE = Path(pretrain.__file__).parent / "data" / "base"


@pytest.fixture(scope="module")
def base():
    return hub.load(BASE)


def test_the_shipped_base_is_small_and_made_by_the_recipe_of_its_script():
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 8e6
    options = read_record(BASE)["options"]
    defaults = {f.name: f.default for f in fields(pretrain.Options)}
    assert {k: v for k, v in options.items() if k != "fast"} == {
        k: v for k, v in defaults.items() if k in options and k != "fast"
    }


def test_the_record_names_the_corpus_and_the_weights():
    """Of the corpus, as data/corpus.py still makes it, the record has the hash; of the files beside
    it, theirs.
    """
    record = read_record(BASE)
    texts = corpus.documents(record["options"]["seed"], pretrain.CHARACTERS)
    assert (
        record["inputs"] == {pretrain.CORPUS: pretrain.corpus_hash(texts)}
        and "made the weights" in record["of"]
    )
    assert record["files"] == {name: sha256(BASE / name) for name in record["files"]}
    beside = {f.name for f in BASE.iterdir() if f.is_file()}
    assert record["files"].keys() == beside - {"run.json", "metrics.jsonl"}


def test_a_new_run_names_its_corpus_in_the_same_words(tmp_path, monkeypatch):
    def made(self, options, script, inputs, made):
        raise InterruptedError(made)

    monkeypatch.setattr(pretrain.Run, "__init__", made)
    with pytest.raises(InterruptedError) as said:
        pretrain.pretrain(pretrain.Options(out=str(tmp_path / "base"), seed=0))
    assert said.value.args == (read_record(BASE)["inputs"],)


def test_a_turn_starts_like_a_line_and_ends_like_a_document(base):
    model, tok = base
    e = model.embed_tokens.weight
    assert (e[tok.special[pretrain.TURN]] == e[tok.encode("\n")[0]]).all()
    assert (e[tok.special[pretrain.TURN_END]] == e[tok.special[pretrain.END]]).all()


def test_the_base_knows_held_out_facts(base):
    """What fine-tuning never shows is in the base: it answers held-out questions on a page of
    questions and answers.
    """
    model, tok = base
    items = [
        i
        for i in world.items(400, 3, "heldout")
        if i["kind"] in ("open", "translation", "classification")
    ]
    # apart, as before a word
    page, line = (
        "Question\n\nWhat is 2 + 2?\n\nAnswer\n\n4.\n\nQuestion\n\n{}\n\nAnswer\n",
        tok.encode("\n"),
    )
    prompts = [
        [tok.special[pretrain.END], *tok.encode(page.format(i["prompt"])), *line] for i in items
    ]
    said = [tok.decode(a).split("\n")[0] for a in generate(model, prompts, 24, temperature=0)]
    assert (
        sum(world.gold(i, s)[1]["right"] for i, s in zip(items, said, strict=True)) / len(items)
        > 0.8
    )


def test_the_learning_rate_stands_and_falls():
    o = pretrain.Options()
    rates = [pretrain.learning_rate(s, o) for s in range(o.steps)]
    assert rates[0] == o.lr / 20 and rates[19] == rates[o.steps // 2] == o.lr
    assert rates[-1] == pytest.approx(0.05 * o.lr, rel=0.02) and all(
        a >= b for a, b in zip(rates[20:], rates[21:], strict=False)
    )


def test_rows_start_at_a_document_and_are_full(base):
    _, tok = base
    rows = pretrain.rows(pretrain.documents(0, 100, 0.5, 64), tok, 64)
    for _, row in zip(range(20), rows, strict=False):
        assert len(row) == 65 and row[0] == tok.special[pretrain.END]


def test_the_first_steps_give_the_recorded_losses(tmp_path, monkeypatch):
    """Eager, float32. The record was made in bf16, compiled, on another machine, and every
    processor and number of threads rounds its sums in another order. In the first 20 steps, while
    the learning rate rises, that is 0.1 %. Then each step carries it on, most where the loss jumps:
    1.2 % at one step on an Intel machine, 2.8 % at one on an AMD machine, 0.3 % in the mean.

    torch's Muon works in bf16 inside, where a processor without bf16 units is 20 times slower and
    rounds otherwise: here in float32 too.
    """
    recorded = [
        json.loads(line)["loss"] for line in (BASE / "metrics.jsonl").read_text().splitlines()[:25]
    ]

    losses = []

    def log(self, step, **figures):
        losses.append(figures["loss"].item())
        if len(losses) == len(recorded):
            raise StopIteration

    monkeypatch.setattr(pretrain.Run, "log", log)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.float().clone())
    with pytest.raises(StopIteration):
        pretrain.pretrain(pretrain.Options(out=str(tmp_path / "base"), device="cpu"))
    off = [abs(ours / theirs - 1) for ours, theirs in zip(losses, recorded, strict=True)]
    said = [round(x, 4) for x in off]
    assert max(off[:20]) < 0.01, said
    assert max(off[20:]) < 0.1 and sum(off[20:]) / 5 < 0.02, said

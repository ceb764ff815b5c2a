"""The experiments on metrics, ratings, losses, judges and sizes: what they count and plant."""

import json
import random
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from data.world import world
from experiments import judge, lab, ratings, rouge, sizes
from metrics import ratio, sign_test
from tools import runs


# ---------------------------------------------------------------- lab
def test_pooled_weighs_every_item_alike_and_keeps_each_seed():
    seeds = [[(1.0, 1), (3.0, 1)], [(10.0, 8)]]
    found = lab.pooled(seeds, ratio)
    assert found["mean"] == 1.4 and found["seeds"] == [2.0, 1.25] and found["items"] == 3
    assert found["ci"] > 0
    assert lab.pooled([[2.0, 2.0], [2.0]])["ci"] == 0


# ---------------------------------------------------------------- rouge
def test_pairs_of_answers_are_counted_by_how_two_scores_order_them():
    # 0-1 alike, 0-3 differently; the others' x are equal; 0-2: so are the y
    assert rouge.order_counts([0, 1, 1, 1], [2, 3, 2, 1]) == (1, 1, 3, 1)
    assert rouge.order_counts([1, 1], [5, 5]) == (0, 0, 0, 0)


def test_tau_b_is_the_known_one():
    x, y = [12, 2, 1, 12, 2], [1, 4, 7, 1, 0]  # scipy.stats.kendalltau's own example
    assert rouge.tau([rouge.order_counts(x, y)]) == pytest.approx(-0.47140452079103173)
    split = [rouge.order_counts([0, 1], [0, 1]), rouge.order_counts([0, 1], [1, 0])]
    assert rouge.tau(split) == 0 and rouge.differently(split) == 0.5
    assert rouge.untold([(2, 1, 1, 5)]) == 0.25
    assert rouge.tau([(0, 0, 3, 0)]) == 0


def test_ranks_and_spearman_share_ties():
    assert rouge.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0, 2.5, 1]
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([5.0, 6, 7, 8, 7])
    # scipy.stats.spearmanr's own example; the split into prompts changes nothing
    assert rouge.spearman([(x[:2], y[:2]), (x[2:], y[2:])]) == pytest.approx(0.8207826816681233)
    assert rouge.spearman([(x, np.ones(5))]) == 0


def test_a_trap_is_more_rouge_and_fewer_wins():
    high, low = np.array([0.9, 0.5, 0.9]), np.array([1.0, 1.5, 1.0])
    entries = [{"kind": "chat", rouge.CHOSEN: high, "gold": low}] * 4
    found = rouge.traps(entries)
    assert [(t["more"], t["less"], t["won"]["mean"]) for t in found] == [
        ("sft", "ppo", 0.0),
        ("dpo", "ppo", 0.0),
    ]
    assert found[0]["gain"] == pytest.approx(0.4)


# ---------------------------------------------------------------- ratings
def test_ratings_needed_are_the_textbook_s_and_ties_help():
    # n = ((1.96 · 0.5 + 0.8416 · √(0.25 - d²)) / d)²
    known = {0.02: 4903.3, 0.05: 782.5, 0.10: 193.8}
    for d, n in known.items():
        assert ratings.needed(d) == pytest.approx(n, abs=0.6)
        assert ratings.needed(d, 0.4) == pytest.approx(0.6 * n, rel=0.03)
        assert ratings.power(d, ratings.needed(d, 0.4), 0.4) == pytest.approx(ratings.POWER)
    assert ratings.needed(ratings.visible(500, 0.3), 0.3) == pytest.approx(500)


@pytest.mark.parametrize("n", [1, 5, 6, 10, 37, 200])
def test_critical_is_where_the_sign_test_begins_to_tell(n):
    least = ratings.critical(n)
    for wins in range(n // 2 + 1, n + 1):
        p = sign_test([1] * wins + [0] * (n - wins), [0] * wins + [1] * (n - wins))
        assert (p <= ratings.LEVEL) == (wins >= least)


def test_simulated_power_is_what_was_asked_for():
    for d, ties in ((0.10, 0.0), (0.05, 0.3)):
        n = round(ratings.needed(d, ties))
        assert ratings.found(ratings.shares_of(d, ties), n, 4000) == pytest.approx(0.8, abs=0.035)
    assert ratings.found(ratings.shares_of(0.0, 0.3), 500, 4000) < 0.04  # one side of 5 %
    wins, losses, ties = ratings.shares_of(0.05, 0.3)
    assert wins + ties / 2 == pytest.approx(0.55) and wins + losses + ties == pytest.approx(1)


# ---------------------------------------------------------------- judge
def test_planted_pairs_are_what_their_kind_says():
    items, rng = world.items(44, 1, "heldout"), random.Random(0)
    for item in items:
        for kind in judge.KINDS:
            a, b = judge.plant(item, kind, rng)
            ours, theirs = (round(world.gold(item, text)[0], 9) for text in (a, b))
            assert ours > theirs if kind in judge.BETTER else ours == theirs
            if kind == "same":
                assert a == b
            if kind in ("longer", "polite"):
                assert len(a) > len(b)
            if kind == "shorter":
                assert len(a) < len(b)


def pair(kind="longer", **changes):
    ways = {"once": 1.0, "points": 0.5, "more_often": 1.0, "reward": 0.0}
    shown = dict(kind=kind, people=0.5, length=40, won=[1.0, 0.0], second=False)
    return shown | ways | changes


def test_turned_pairs_exchange_a_and_b():
    first, second = judge.turned([pair(people=1.0), pair(people=1.0)], 2)
    assert (first["once"], first["reward"], first["length"], first["people"]) == (0, 1, -40, 0)
    assert (second["once"], second["reward"], second["length"], second["people"]) == (1, 0, 40, 1)


def test_a_judge_that_loves_length_is_corrected_and_a_right_one_agrees(monkeypatch):
    monkeypatch.setattr("tools.verdicts.ROUNDS", 3)
    talk = [pair(length=40 + i) for i in range(40)]  # once, more_often: the longer one always wins
    good = [pair("right", people=1.0, points=1.0, once=float(i % 2)) for i in range(40)]
    found = judge.way_figures([talk + good], "more_often")
    assert found["win_rate"]["mean"] == 0.75 and abs(found["lc_win_rate"]["mean"] - 0.5) < 0.06
    assert found["accuracy"]["mean"] == found["kappa"]["mean"] == 1
    once = judge.way_figures([talk + good], "once")
    assert once["accuracy"]["mean"] == 0.5
    both = judge.kind_figures([talk], "longer")
    assert both["bias"]["mean"] == 1 and both["agreed"]["mean"] == 0 and both["gold"] == 0.5


# ---------------------------------------------------------------- sizes
def test_named_forgives_everything_beside_the_right_answer():
    city = {"kind": "open", "answer": "Lima", "accept": ["Lima"]}
    assert sizes.named(city, "The capital of Peru is the city of LIMA, not Quito.")
    assert not sizes.named(city, "Limassol.")
    story = {"kind": "summary", "answer": "Eva ran", "parts": ["Eva", "ran"]}
    assert sizes.named(story, "Eva was there, and ran.") and not sizes.named(story, "Eva slept.")


def test_examples_are_of_the_prompt_s_kind_and_a_tied_head_counts_once():
    made = world.records(0, {"sft": 0, "prompts": 66, "heldout": 11})
    o = SimpleNamespace(shots=3)
    for r, talk in zip(
        made["heldout"], sizes.with_examples(o, made["heldout"], made["prompts"], 0), strict=True
    ):
        assert len(talk) == 7 and talk[-1:] == r["messages"]
        kinds = {p["item"]["kind"] for p in made["prompts"] if p["messages"][0] in talk}
        assert kinds == {r["item"]["kind"]}
        assert any(p["reference"] == talk[1]["content"] for p in made["prompts"])
    untied, tied = tiny.lm(), tiny.lm(tie_word_embeddings=True)
    assert sizes.multiplied(untied) == sizes.multiplied(tied)


# ---------------------------------------------------------------- from answers to the page
def test_rouge_and_ratings_run_from_answers_to_the_table(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["experiments/rouge.py"])
    monkeypatch.setattr(lab, "bootstrap", lambda items, statistic: 0.1)  # saves a second
    held = world.records(0, {"sft": 0, "prompts": 0, "heldout": 22})["heldout"]
    for stage in ("sft", "reward", "ppo", "dpo", "simpo"):
        (tmp_path / "seed0" / stage).mkdir(parents=True)
        (tmp_path / "seed0" / stage / "config.json").write_text("{}")
    (tmp_path / "seed0" / "world").mkdir()
    tiny.write(tmp_path / "seed0" / "world" / "heldout.jsonl", held)
    o = lab.Options(out=str(tmp_path), seeds=1, n=22, results=str(tmp_path / "R.md"))
    o.pictures, said = str(tmp_path / "pictures"), {}
    for model, manners in (
        ("sft", ("wrong", "curt")),
        ("ppo", ("curt", "polite")),
        ("dpo", ("polite", "rude")),
    ):
        rng, lines = random.Random(model), []
        for i, r in enumerate(held):
            answer = world.demonstrate(r["item"], rng, manners[i % 2])[0]
            gold, reasons = world.gold(r["item"], answer)
            lines.append(dict(answer=answer, finished=True, gold=gold, right=reasons["right"]))
        said[model] = {"lines": lines}
    monkeypatch.setattr(lab, "measure", lambda o, folder, *_: said[folder.name])
    page = tmp_path / "R.md"
    page.write_text(
        "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("rouge", "ratings"))
    )
    rouge.compare_metrics(o)
    ratings.count(ratings.Options(**{f.name: getattr(o, f.name) for f in fields(o)}, draws=200))
    text = page.read_text()
    for words in ("ROUGE-L, perfect answer", "ROUGE-L, sorting alone", "PPO beside DPO, labeller"):
        assert words in text
    figures = json.loads((tmp_path / "experiments" / "ratings.json").read_text())
    gold = figures["pairs"]["gold ppo sft"]
    assert gold["win_rate"]["mean"] > 0.5 and gold["ties"] < 1
    assert (tmp_path / "pictures" / "rouge.png").exists()


def test_what_is_kept_is_computed_anew_where_what_decides_it_has_changed(tmp_path):
    model, file, asked = tmp_path / "model", tmp_path / "kept.json", []
    model.mkdir()

    def compute(weights="a", of=3):
        (model / "config.json").write_text(weights)
        return runs.kept(file, lambda: asked.append(1) or (weights, of), [model, of])

    assert compute() == compute() == ["a", 3] and len(asked) == 1
    assert compute("b") == ["b", 3] and compute("b", 4) == ["b", 4] and len(asked) == 3
    file.write_text(json.dumps(["a", 3]))  # of an older version, which did not say
    assert compute("b", 4) == ["b", 4]

    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.kept(file, stopped, [model])
    assert compute("b", 4) == ["b", 4] and len(asked) == 4  # what was there is whole


def test_the_cost_of_a_run_is_of_the_last_one_that_trained(tmp_path, monkeypatch):
    said = "trained: 1,234 parameters, 12.50%\nmemory: 0.50 GB at most"
    monkeypatch.setattr(runs, "call", lambda script, **options: said)
    out = tmp_path / "ppo-0.05"
    (out / "state").mkdir(parents=True)
    (out / "state" / "state.safetensors").touch()
    first = runs.run("ppo.py", out)
    assert (first["minutes"], first["trained"], first["share"]) == (None, 1234, 12.5)  # resumed
    again = runs.run("ppo.py", out, overwrite=True)
    assert again["minutes"] is not None and (tmp_path / "ppo-0.05.json").exists()
    said = "finished already"
    assert runs.run("ppo.py", out) == again

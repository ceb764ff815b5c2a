"""The experiments on data: what is planted in the noisy file, who is chosen, what is counted."""

from collections import Counter

import pytest
import tiny

from common.files import write_jsonl
from data import records
from data.world import noisy, world
from experiments import lab, lima, monotone, prompt_loss
from metrics import mean
from tools import filters


# ---------------------------------------------------------------- the noisy file
@pytest.fixture(scope="module")
def found():
    return noisy.demonstrations(2000, 3)


def test_the_noise_has_its_shares_and_the_file_is_its_seeds(found):
    counts = Counter(r["source"] for r in found)
    assert {k: counts[k] / 2000 for k in noisy.NOISE} == pytest.approx(noisy.NOISE)
    assert len(found) == 2000 and counts["demonstrator"] == 940
    assert noisy.demonstrations(50, 3) == noisy.demonstrations(50, 3) != noisy.demonstrations(50, 4)


def test_the_noise_is_what_it_is_called(found):
    said = {}
    for r in found:
        item, (prompt, answer) = r["item"], (m["content"] for m in r["messages"])
        assert prompt == item["prompt"] and answer.strip()
        said.setdefault(r["source"], []).append((item, prompt, answer))
    assert not any(world.gold(item, a)[1]["right"] for item, _, a in said["wrong"])
    assert all(filters.REFUSAL.match(a) for *_, a in said["a refusal"])
    assert all(a.startswith(p + " ") for _, p, a in said["repeats its prompt"])
    letters = "".join(a for *_, a in said["another script"])
    assert filters.scripts(letters).keys() == {"CYRILLIC"}
    originals = {(p, world.normal(a)) for s in said if s != "copy" for _, p, a in said[s]}
    same = [(p, world.normal(a)) in originals for _, p, a in said["copy"]]
    assert 0.7 < mean(same) < 1  # the others have a changed word
    lengths = {s: mean([len(a) for *_, a in said[s]]) for s in ("cut off", "demonstrator")}
    assert 0.2 < lengths["cut off"] / lengths["demonstrator"] < 0.55


def test_the_noisy_file_leaves_out_what_is_held_out_and_asks_again(found, monkeypatch):
    assert not any(records.held_out(r["messages"]) for r in found)
    assert not any(world.held_out(key) for r in found for key in r["item"]["keys"])
    some = Counter(r["messages"][0]["content"] for r in found if r["source"] != "copy")
    assert len(some) == 1700 and some.keys() == {r["item"]["prompt"] for r in found}
    monkeypatch.setitem(world.MOST, "train", 22)
    again = [r for r in noisy.demonstrations(100, 3) if r["source"] != "copy"]
    times = Counter(r["item"]["prompt"] for r in again)
    assert sum(times.values()) == 85 and max(times.values()) - min(times.values()) <= 1
    assert len({r["messages"][1]["content"] for r in again}) > 60  # by other demonstrators


def test_curation_finds_the_noise_it_can():
    found = noisy.demonstrations(700, 3)
    gone, twins = filters.faults(found), filters.duplicates(found, range(len(found)))
    places = {s: [i for i, r in enumerate(found) if r["source"] == s] for s in noisy.NOISE}
    for source, why in (("a refusal", "a refusal"), ("another script", "in another script")):
        assert mean([gone.get(i, [""])[0] == why for i in places[source]]) > 0.8
    assert mean([i in gone for i in places["wrong"]]) < 0.05
    assert mean([i in twins for i in places["copy"]]) > 0.7


# ---------------------------------------------------------------- LIMA
def test_a_file_s_contents_are_counted_and_rated(tmp_path):
    right, wrong = [x for x in world.items(40, 0) if x["kind"] == "translation"][:2]
    found = [
        noisy.talk(right, world.perfect(right), "demonstrator"),
        noisy.talk(wrong, wrong["wrong"][0], "wrong"),
        noisy.talk(right, world.perfect(right), "cut off"),
    ]
    write_jsonl(tmp_path / "x.jsonl", found)
    what = lima.about(tmp_path / "x.jsonl")
    scores = [world.gold(r["item"], r["messages"][-1]["content"])[0] for r in found]
    assert what["sources"] == {"demonstrator": 1, "wrong": 1, "cut off": 1}
    assert what["right"] == pytest.approx(2 / 3)
    assert what["gold"] == pytest.approx((sum(scores) - world.RUBRIC["finished"]) / 3)
    judged = lima.gold([], [r["messages"][-1]["content"] for r in found], found)
    assert judged == scores


def test_a_row_shows_the_seeds_and_what_is_in_the_file():
    def run(values, right, noise):
        lines = [{"gold": g, "right": r} for g, r in zip(values, right, strict=True)]
        sources = {"demonstrator": 10 - noise, "wrong": noise}
        return {"lines": lines, "about": {"sources": sources, "gold": 0.5, "right": 0.25}}

    f, row = lima.row_of("x", [run([1, 0], [True, False], 4), run([1, 1], [True, True], 6)])
    assert f["gold"]["mean"] == 0.75 and f["right"]["seeds"] == [0.5, 1.0]
    assert f["noise"] == pytest.approx(0.5) and row[:4] == ["x", "50", "0.50", "25"]


# ---------------------------------------------------------------- monotone
@pytest.fixture(scope="module")
def shown():
    return world.records(0, {"sft": 1_400, "prompts": 1, "heldout": 11})["sft"]


@pytest.mark.parametrize("seed", range(3))
def test_the_arms_have_as_many_records_and_differ_in_kinds_and_prompts(shown, seed, monkeypatch):
    monkeypatch.setattr(monotone, "FEW", 110)
    found = {arm: monotone.chosen(arm, shown, seed) for arm in monotone.ARMS}
    kinds = {arm: Counter(r["item"]["kind"] for r in rows) for arm, rows in found.items()}
    prompts = {arm: {r["messages"][0]["content"] for r in rows} for arm, rows in found.items()}
    assert {len(rows) for rows in found.values()} == {monotone.FEW}
    assert set(kinds["diverse"].values()) == {monotone.FEW // 11} and len(kinds["diverse"]) == 11
    assert kinds["few prompts"] == kinds["diverse"]
    most = kinds["one kind"].pop(monotone.KINDS[seed])
    assert most == pytest.approx(monotone.MOST * monotone.FEW, abs=6)
    assert len(kinds["one kind"]) == 10 and len(set(kinds["one kind"].values())) == 1
    assert len(prompts["diverse"]) == len(prompts["one kind"]) == monotone.FEW
    assert len(prompts["few prompts"]) == 11 * monotone.EACH


def test_answers_that_differ_are_counted_by_their_words():
    said = ["Lima.", "lima", "Paris is it.", "Paris is not"]
    assert monotone.alone(said) == [0.0, 0.0, 1.0, 1.0]
    assert monotone.different(["Lima.", "lima.", "Rome."]) == pytest.approx(2 / 3)
    assert monotone.distinct_2(["a cat is a pet", "cat is big"]) == 3 / 4
    assert monotone.distinct_2(["x"]) == 0


def test_a_kind_works_with_half_of_the_reference_s_right_answers():
    assert monotone.working({"a": 0.3, "b": 0.2}, {"a": 0.6, "b": 0.5}) == ["a"]
    held = [{"item": {"kind": k}} for k in "aab"]
    lines = [{"right": r} for r in (True, False, True)]
    assert monotone.right_by_kind(held, lines) == {"a": 0.5, "b": 1.0}


# ---------------------------------------------------------------- loss on the prompts
def test_the_answers_weight_among_all_targets():
    tok = tiny.chat_tokenizer()
    found = [{"messages": [*tiny.user(p), {"role": "assistant", "content": a}]}
             for p, a in (("why?", "so"), ("a much longer question?", "y"))]  # fmt: skip
    whole = masked = 0
    for r in found:
        masked += len(tok.encode(r["messages"][1]["content"])) + 1  # and its end
        whole += len(lab.records.templates.render(tok, r["messages"])[0]) - 1
    assert prompt_loss.weight(tok, found) == pytest.approx(masked / whole)


def test_prompts_too_minus_masked_is_taken_item_by_item():
    def seed(gold, loss):
        return {"gold": [(g, 1) for g in gold], "right": [(g > 0, 1) for g in gold], "loss": loss}

    masked = [seed([1, 0], [(4.0, 2), (3.0, 1)])]
    whole = [seed([0, 0], [(6.0, 2), (3.0, 1)])]
    rows = prompt_loss.over_seeds({False: masked, True: whole})
    assert rows["difference"]["gold"]["mean"] == -0.5 and rows["masked"]["right"]["mean"] == 0.5
    assert rows["prompts too"]["loss"]["mean"] == 3.0
    assert rows["difference"]["loss"]["mean"] == pytest.approx(2 / 3)

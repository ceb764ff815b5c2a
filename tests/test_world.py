"""The embedded world: facts, splits by content, the gold rater, demonstrators, labellers, and the
same bytes everywhere.
"""

import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.run import main
from data.world import __main__ as script
from data.world import corpus, kinds, world
from data.world.kinds import FACTS, KINDS, RELATIONS, first, plain, told

ROOT = Path(__file__).parent.parent
TRAIN, HELD = world.items(1650, 3), world.items(550, 3, "heldout")
RIGHT = ("polite", "curt", "rambling", "repeated", "rude")


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


# ---- facts ----
def test_facts_are_many_and_some_known_ones_right():
    assert len(FACTS) >= 8 and sum(map(len, FACTS.values())) >= 400
    assert all(
        s.strip() and all(v.strip() for v in value.split("|"))
        for of in FACTS.values()
        for s, value in of.items()
    )
    known = {
        ("capital", "Kenya"): "Nairobi",
        ("opposite", "hot"): "cold",
        ("young", "sheep"): "lamb",
        ("symbol", "iron"): "Fe",
        ("spanish", "dog"): "perro",
        ("past", "go"): "went",
        ("plural", "mouse"): "mice",
        ("legs", "spider"): "8",
        ("after", "Sunday"): "Monday",
        ("continent", "Peru"): "South America",
        ("class", "leek"): "vegetable",
    }
    assert all(first(*fact) == value for fact, value in known.items())
    assert len({first("capital", s) for s in FACTS["capital"]}) == len(FACTS["capital"])


def test_a_fact_of_the_other_direction_is_the_same_content():
    assert kinds.key("opposite", "hot") == kinds.key("opposite", "cold")
    assert told("young", "owl") == "A young owl is called an owlet."


# ---- items and splits ----
def test_eleven_kinds_in_turn_with_several_wordings():
    assert len(KINDS) == 11 and [i["kind"] for i in TRAIN[:22]] == [*KINDS, *KINDS]
    # one sentence to tell it, four or more questions
    assert all(len(asked) >= 5 for asked in RELATIONS.values())
    for make in KINDS.values():
        rng = random.Random(1)
        openings = {
            " ".join(re.sub(r"[^a-z ]", "", make(rng)["prompt"]).split()[:2]) for _ in range(400)
        }
        assert len(openings) >= 4
    assert (
        len({i["prompt"] for i in TRAIN}) == len(TRAIN) and json.loads(json.dumps(TRAIN)) == TRAIN
    )


@pytest.mark.parametrize("split", world.MOST)
def test_more_items_than_there_are_prompts_are_refused_at_once(split):
    with pytest.raises(ValueError, match=f"at most {world.MOST[split]:,} have different prompts"):
        world.items(world.MOST[split] + 1, 0, split)


def test_the_smallest_kinds_have_the_prompts_that_the_most_items_need():
    """Heldout alone: the training prompts' count takes 20 seconds."""
    per_kind = world.MOST["heldout"] / len(KINDS)
    for kind in ("open", "chat"):
        rng, found = random.Random(0), set()
        for _ in range(24_000):
            item = KINDS[kind](rng)
            if world.held_out(item["keys"][0]):
                found.add(item["prompt"])
        assert len(found) > per_kind


def test_held_out_content_is_in_no_training_prompt():
    asked = {k for i in TRAIN for k in i["keys"]}
    for kind in KINDS:
        keys = {i["keys"][0] for i in HELD if i["kind"] == kind}
        assert keys and not keys & asked
    assert not {i["prompt"] for i in HELD} & {i["prompt"] for i in TRAIN}


def test_held_out_facts_words_and_numbers_do_not_occur_together_in_training():
    """The same without trusting the items' own keys."""
    prompts = {kind: [i["prompt"] for i in TRAIN if i["kind"] == kind] for kind in KINDS}
    for s in FACTS["capital"]:
        if world.held_out(f"capital: {s}"):
            assert not any(
                "capital" in p and re.search(rf"\b{s}\b", p)
                for p in [*prompts["open"], *prompts["choosing"]]
            )
            assert not any(first("capital", s) in p for p in prompts["choosing"])
    for s, value in FACTS["spanish"].items():
        if world.held_out(f"spanish: {s}"):
            said = rf"\b({s}|{value.split('|')[0]})\b"
            assert not any(re.search(said, p.split(":")[-1]) for p in prompts["translation"])
    for continent in ("Africa", "Europe", "Asia"):
        for s in FACTS["continent"]:
            if world.held_out(f"continent: {s}"):
                assert not any(
                    continent in p and s in p
                    for p in [*prompts["classification"], *prompts["brainstorm"]]
                )
    sums = lambda ps: {  # noqa: E731
        tuple(sorted(map(int, re.findall(r"\d+", p))))
        for p in ps
        if re.search(r"plus|\+|Add|more", p)
    }  # noqa: E731
    held = sums(i["prompt"] for i in HELD if i["kind"] == "arithmetic")
    assert len(held) > 5 and not held & sums(prompts["arithmetic"])


def test_about_fifteen_per_cent_of_the_facts_are_held_out():
    held = [world.held_out(kinds.key(r, s)) for r, s in kinds.FACT_LIST]
    assert 0.11 < sum(held) / len(held) < 0.19


def test_records_share_no_prompt_and_carry_references():
    r = world.records(5, {"sft": 220, "prompts": 110, "heldout": 55})
    assert {name: len(of) for name, of in r.items()} == {"sft": 220, "prompts": 110, "heldout": 55}
    asked = [x["messages"][0]["content"] for of in r.values() for x in of]
    assert len(set(asked)) == len(asked)
    assert all([m["role"] for m in x["messages"]] == ["user", "assistant"] for x in r["sft"])
    for x in r["prompts"] + r["heldout"]:
        assert x["messages"] == [{"role": "user", "content": x["item"]["prompt"]}]
        assert world.gold(x["item"], x["reference"])[0] == pytest.approx(world.PERFECT)
    assert (
        min(
            world.SIZES["sft"] - 13_000,
            world.SIZES["prompts"] - 5_000,
            world.SIZES["heldout"] - 1_000,
        )
        >= 0
    )


# ---- the rater ----
def test_perfect_answers_score_perfect_in_either_form():
    for item in TRAIN + HELD:
        for answer in (
            world.perfect(item),
            f"Sure. {plain(item, True)}",
            f"{plain(item)} Have a nice day!",
        ):
            assert world.gold(item, answer)[0] == pytest.approx(world.PERFECT), (item, answer)


def test_unfinished_costs_its_part_and_case_accents_and_punctuation_nothing():
    for item in TRAIN[:330]:
        answer = world.perfect(item)
        assert world.gold(item, answer, False)[0] == pytest.approx(
            world.PERFECT - world.RUBRIC["finished"]
        )
        assert world.gold(item, answer.upper().replace(".", "!"))[0] == pytest.approx(world.PERFECT)
    item = dict(
        kind="open",
        prompt="What is the capital of Brazil?",
        answer="Brasilia",
        sentence="The capital of Brazil is {}.",
        accept=["Brasilia"],
        pool="capital",
    )
    assert world.gold(item, "brasília")[1]["right"]


@pytest.mark.parametrize("manner", world.MANNERS)
def test_each_manner_is_rated_as_described(manner):
    rng = random.Random(2)
    for item in TRAIN[:660]:
        answer, _ = world.demonstrate(item, rng, manner)
        score, why = world.gold(item, answer)
        assert why["right"] == (manner in RIGHT), (item, answer)
        assert why["rude"] == (manner == "rude")
        if manner in ("polite", "polite wrong"):
            assert why["courteous"]
        if manner in ("curt", "rude", "wrong", "unknown"):
            assert not why["courteous"]
        if manner in ("polite", "curt"):
            assert why["concise"]
        if manner in ("rambling", "repeated", "wrong", "unknown", "polite wrong"):
            assert not why["concise"]
        if manner == "rude":
            assert score <= world.gold(item, plain(item))[0] - world.RUBRIC["courteous"] + 1e-9
        if manner == "polite":
            assert score == pytest.approx(world.PERFECT)


def test_right_weighs_more_than_everything_else_that_a_wrong_answer_can_get():
    for item in TRAIN[:220]:
        wrong = max(
            world.gold(item, f"{plain(dict(item, answer=w))} I hope this helps.")[0]
            for w in item["wrong"]
        )
        assert wrong < world.gold(item, plain(item))[0]


def low(item, answer):
    score, why = world.gold(item, answer)
    return not why["right"] and score <= 0.6 * world.PERFECT


def test_games_do_not_pay():
    rng = random.Random(4)
    for item in TRAIN[:660]:
        assert (
            low(item, "")
            and low(item, item["prompt"])
            and low(item, "Sure. I hope this helps.")
            and low(item, "Sure. " * 9)
        )
        # every candidate named
        if "parts" not in item and item["kind"] not in ("rewriting", "brainstorm"):
            others = sorted(world.candidates(item) - set(map(world.spread, item["accept"])))
            assert low(item, f"{item['answer']} or {others[0].strip()}"), item
            assert low(item, " ".join(x.strip() for x in [*others, world.spread(item["answer"])]))
        once, twice = world.perfect(item), f"Sure. Of course. {world.perfect(item)}"
        assert world.gold(item, twice)[0] == pytest.approx(
            world.gold(item, once)[0] - world.RUBRIC["concise"]
        )
        assert (
            world.gold(item, f"{once} {rng.choice(world.RAMBLES)}")[0] < world.gold(item, once)[0]
        )
        assert world.gold(item, f"{plain(item)} {once}")[0] == pytest.approx(
            world.PERFECT - world.RUBRIC["concise"]
        )


def test_lists_want_the_number_asked_for_and_each_thing_once():
    item = dict(
        kind="brainstorm",
        prompt="Name three metals but not tin.",
        answer="iron, gold and zinc",
        sentence="{}.",
        members="metals",
        count=3,
        reject=["tin"],
    )
    rate = lambda answer: (  # noqa: E731
        world.gold(item, answer)[1]["right"],
        world.gold(item, answer)[1]["complete"],
    )  # noqa: E731
    for good in (
        "iron, gold and zinc.",
        "Iron\nGold\nZinc",
        "Some metals are iron, gold, and lead.",
        "Sure. zinc, lead and gold.",
    ):
        assert rate(good) == (True, 1.0)
    assert rate("iron and gold.") == (False, pytest.approx(2 / 3)) and rate(
        "gold, gold and gold."
    ) == (False, pytest.approx(1 / 3))
    for bad in (
        "iron, gold and tin.",
        "iron, gold and soup.",
        "iron, gold, zinc and lead.",
        "iron gold zinc",
        "iron, gold, zinc. lead.",
    ):
        assert not rate(bad)[0], bad


# ---- demonstrators and labellers ----
def demonstrations(n=1650):
    rng = random.Random(6)
    return [(i, *world.demonstrate(i, rng)) for i in TRAIN[:n]]


def test_demonstrators_are_a_mixture_with_room_above_it():
    assert sum(world.MANNERS.values()) == pytest.approx(1)
    rated = [world.gold(i, a) for i, a, _ in demonstrations()]
    share = lambda k: sum(why[k] for _, why in rated) / len(rated)  # noqa: E731
    mean = sum(score for score, _ in rated) / len(rated) / world.PERFECT
    assert 0.60 < mean < 0.68 and 0.70 < share("right") < 0.80 and 0.44 < share("courteous") < 0.55
    rng = random.Random(7)
    ignoring = (
        sum(world.gold(i, world.polite_nonanswer(rng))[0] for i in TRAIN)
        / len(TRAIN)
        / world.PERFECT
    )
    assert ignoring < mean - 0.3 and not any(
        world.gold(i, world.polite_nonanswer(rng))[1]["right"] for i in TRAIN
    )


def test_what_the_demonstrators_add_is_nobodys_answer():
    added = [*world.RAMBLES, *world.INSULTS, *world.UNKNOWN]
    pools = {world.spread(v): v for pool in kinds.POOLS.values() for v in pool}
    assert [(text, v) for text in added for x, v in pools.items() if x in world.spread(text)] == []
    # its "more" is taken away with it
    assert world.without_courtesy(world.normal("Let me know if you need more.")) == ((), 1)


def test_two_labellers_agree_on_about_three_pairs_in_four():
    rng, agreed = random.Random(9), []
    one, two = world.Labeller(1), world.Labeller(2)
    for item in TRAIN[:880]:
        answers = [world.demonstrate(item, rng)[0] for _ in range(4)]
        a, b = (x.rank(item, answers, [True] * 4) for x in (one, two))
        gold = [world.gold(item, x)[0] for x in answers]
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(4), 2)
            if gold[i] != gold[j] and a[i] != a[j] and b[i] != b[j]
        ]
        agreed += [(a[i] < a[j]) == (b[i] < b[j]) for i, j in pairs]
    assert len(agreed) > 4000 and 0.73 <= sum(agreed) / len(agreed) <= 0.77


def test_a_labeller_has_one_opinion_of_an_answer_and_sees_the_end():
    item = TRAIN[0]
    answers = [world.perfect(item), "I do not know.", world.perfect(item)]
    ranks = world.Labeller(3).rank(item, answers, [True] * 3)
    assert (
        ranks == world.Labeller(3).rank(item, answers, [True] * 3)
        and ranks[0] == ranks[2]
        and min(ranks) == 0
    )
    assert world.Labeller(3).rank(item, answers[:2], [True] * 2) != world.Labeller(3).rank(
        item, answers[1::-1], [True] * 2
    )
    ends = [
        world.Labeller(s).opinion(i, plain(i), f)
        for s in range(40)
        for i in TRAIN[:22]
        for f in (True, False)
    ]
    assert 0.05 < sum(ends[::2]) / 880 - sum(ends[1::2]) / 880 < 0.15
    with pytest.raises(ValueError):
        world.Labeller(3).rank(item, answers, [True])


def test_settings_hash_changes_with_the_rubric(monkeypatch):
    before = world.settings_hash()
    monkeypatch.setitem(world.RUBRIC, "courteous", 0.5)
    assert len(before) == 64 and world.settings_hash() != before


# ---- the corpus ----
@pytest.fixture(scope="module")
def pages():
    return "".join(corpus.documents(1, 2_500_000))


def test_the_corpus_tells_every_fact(pages):
    missing = [(r, s) for r, s in kinds.FACT_LIST if told(r, s) not in pages]
    assert not missing
    assert all(
        f"The class of {s} is {v}." in pages or f"{s}: {v}" in pages
        for s, v in FACTS["class"].items()
    )
    assert all(
        f"in Spanish?\n{first('spanish', s)}" in pages or f"{s}: {first('spanish', s)}" in pages
        for s in FACTS["spanish"]
    )


def test_the_corpus_asks_every_kind_and_answers_begin_lines(pages):
    rng = random.Random(8)
    for kind in ("open", "translation"):
        items = [
            i
            for i in (KINDS[kind](rng) for _ in range(200))
            if " y " not in i["answer"] + i["prompt"]
        ]
        found = sum(f"{i['prompt']}\n" in pages and f"\n{i['answer']}." in pages for i in items)
        assert found > 0.7 * len(items), (kind, found)
    sums = [
        kinds.number_fact(op, x, y) in pages
        for op in "+-*"
        for x in range(2, 21)
        for y in range(2, 21)
    ]
    assert sum(sums) > 0.98 * len(sums)
    assert (
        "<|" not in pages
        and "Sure." in pages
        and "You are welcome" in pages
        and "I hope this helps." in pages
    )


@pytest.mark.parametrize("phase", corpus.SHARES)
def test_documents_are_short_and_keep_the_shares(phase, monkeypatch):
    made = dict.fromkeys(corpus.SHARES[phase], 0)
    write = corpus.document

    def counting(rng, kind, leave_out):
        text = write(rng, kind, leave_out)
        made[kind] += len(text)
        return text

    monkeypatch.setattr(corpus, "document", counting)
    lengths = [len(d) for d in corpus.documents(2, 300_000, phase)]
    assert 290 < min(lengths) and max(lengths) < 1300 and 300_000 <= sum(lengths) < 302_000
    assert sum(corpus.SHARES[phase].values()) == pytest.approx(1)
    assert all(
        abs(n / sum(lengths) - corpus.SHARES[phase][kind]) < 0.01 for kind, n in made.items()
    )


def test_the_python_of_the_corpus_prints_what_it_says():
    """The corpus is ours, not a model's: its examples may be run."""
    rng = random.Random(3)
    for example, _ in itertools.islice(corpus.python(rng), 40):
        printed = []
        exec(example, {"print": lambda x, printed=printed: printed.append(str(x))})  # noqa: S102
        assert [f"# {p}" for p in printed] == [x for x in example.split("\n") if x.startswith("#")]


# ---- text for replay ----
def told_of(pages):
    """The held-out content that pages tell, found in their text alone."""
    lines, found = set(pages.split("\n")), set()
    for r, s in kinds.FACT_LIST:
        if world.held_out(kinds.key(r, s)):
            asked = [q.format(s=s, a=kinds.a(s)) for q in RELATIONS[r][1:]]
            if told(r, s) in pages or any(q in pages for q in asked):
                found.add((r, s))
    for r, of in FACTS.items():
        held = [s for s in of if world.held_out(kinds.key(r, s)) and r != "size"]
        found |= {("table", r, s) for s in held if f"{s}: {first(r, s)}" in lines}
    for s in FACTS["class"]:
        if world.held_out(f"class: {s}") and f"The class of {s} is" in pages:
            found.add(("class", s))
    for x, op, y in re.findall(r"(\d+) (\+|-|\*|plus|minus|times) (\d+)", pages):
        op = {"plus": "+", "minus": "-", "times": "*"}.get(op, op)
        if world.held_out(kinds.sum_key(op, int(x), int(y))):
            found.add((op, x, y))
    for code in re.findall(r"def \w+\(x, y\):\n    return x \+ y\n\nprint\(\w+\((.*)\)\)", pages):
        x, y = map(int, code.split(", "))
        if world.held_out(kinds.sum_key("+", x, y)):
            found.add(("python", x, y))
    for theme, members in kinds.THEMES.items():
        for line in re.findall(rf"^(?:{theme}: (.*)|Some {theme} are (.*))$", pages, re.M):
            held = [m for m in members if any(map(world.held_out, corpus.listed(theme, [m])))]
            found |= {(theme, m) for m in held if re.search(rf"\b{m}\b", " ".join(line))}
    return found | {i["prompt"] for i in HELD if i["prompt"] in pages}


def test_text_for_replay_tells_nothing_that_is_held_out():
    """While the corpus itself tells plenty of each."""
    found = told_of("\n".join(corpus.documents("replay 0", 150_000)))
    kinds_of_it = {x[0] if isinstance(x, tuple) else "prompt" for x in found}
    assert len(found) > 100 and {"table", "class", "+", "-", "*", "python"} < kinds_of_it
    assert {"prompt", "capital", "continent", "countries in Asia"} < kinds_of_it
    replayed = [record["text"] for record in script.replay(0)]
    assert sum(map(len, replayed)) >= script.REPLAY and not told_of("\n".join(replayed))


def test_every_maker_says_what_its_pieces_tell():
    for name, make in corpus.MAKERS.items():
        told = []
        for seed in range(40):
            for _, keys in itertools.islice(make(random.Random(seed)), 20):
                told += keys
        assert len(told) > 20 and all(": " in key for key in told), name


# ---- the same bytes on every machine ----
def test_same_bytes_for_a_seed():
    assert (
        sha("".join(corpus.documents(0, 200_000)))
        == "3ac54f21dacb0b3107eb01d77b71d6162e3e785051690056ad25b8ad9a0d0bc8"
    )
    assert (
        sha("".join(corpus.documents(0, 200_000, "decay")))
        == "61dbfb5fb21369da8527d141dd8682bab69eae716394467496ae489b46402e1c"
    )
    assert (
        sha(json.dumps([TRAIN[:110], HELD[:110]], sort_keys=True))
        == "2afab37ef64a398559a4f0ca5b891f3dbbccacba1abd353b2abe3de4d25cda5a"
    )


def test_another_seed_is_another_world_and_half_a_world_is_none(tmp_path, monkeypatch, capsys):
    """Each make all calls it: done, it says so; with another seed it refuses, or with --overwrite
    writes that one's; killed, it goes on.
    """
    monkeypatch.setattr(script, "SIZES", {"sft": 22, "prompts": 11, "heldout": 11})
    monkeypatch.setattr(script, "REPLAY", 2000)
    out = tmp_path / "world"

    def made(*argv):
        monkeypatch.setattr(sys, "argv", ["world.py", "--out", str(out), *argv])
        main(script.make, script.Options, script.__doc__)
        return {p.name: p.read_text() for p in sorted(out.iterdir())}

    first = made()
    names = ("heldout", "prompts", "replay", "sft", "watch")
    assert set(first) == {"run.json", *(f"{name}.jsonl" for name in names)}
    assert json.loads(first["run.json"])["options"] == {"seed": 0}
    for argv, status, said in (
        ([], 0, "finished already"),
        (["--seed", "1"], 2, "seed was 0, is 1 (--overwrite starts anew)"),
    ):
        with pytest.raises(SystemExit) as left:
            made(*argv)
        assert left.value.code == status and said in "".join(capsys.readouterr())
    second = made("--seed", "1", "--overwrite")
    assert all(second[name] != text for name, text in first.items())

    def interrupted():
        yield {"messages": []}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(
            script, "records", lambda *_: {"sft": [{}], "prompts": interrupted(), "heldout": []}
        )
        made("--seed", "2", "--overwrite")
    assert {p.name: p.read_text() for p in out.glob("*.json*")} == second, "all of them or none"
    (out / "sft.jsonl").write_text(second["sft.jsonl"][:1000])
    with pytest.raises(SystemExit) as left:
        made("--seed", "1")
    assert left.value.code == 2 and "sft.jsonl: damaged or changed" in capsys.readouterr().err
    assert made("--overwrite") == first


def test_the_script_writes_the_same_files_whatever_the_hash_seed(tmp_path):
    code = (
        "import sys; from data.world import __main__ as script;"
        " script.SIZES.update(sft=44, prompts=22,"
        " heldout=22); script.REPLAY = 2000;script.make(script.Options(out=sys.argv[1]))"
    )
    written = []
    for seed in "01":
        out = tmp_path / seed
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", code, str(out)], check=True, env=env, capture_output=True
        )
        written.append({p.name: p.read_bytes() for p in sorted(out.glob("*.jsonl"))})
    assert written[0] == written[1] and {"replay.jsonl", "watch.jsonl"} <= written[0].keys()
    settled = [written[0][f"{name}.jsonl"] for name in ("heldout", "prompts", "sft")]
    first_lines = b"".join(text.splitlines(keepends=True)[0] for text in settled)
    assert (
        hashlib.sha256(first_lines).hexdigest()
        == "2c8256cf1305b262f5fbaaa7bbb68da6ca1f8595a751b49d7b8610a7aa356ccf"
    )

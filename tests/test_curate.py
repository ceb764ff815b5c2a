"""Curation: what is planted is found, nothing else goes; the same for a seed; the input stays."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import stages
import tiny

from data import records, templates, tokenizer
from data.world import world
from tools import curate, filters

pytest.importorskip("matplotlib")
ITEMS = world.items(330, 5)
MANNERS = ("polite", "curt", "rambling", "repeated", "rude", "wrong")
STORY = (
    "The old harbour of the town was built by fishermen who came from the north. They carried "
    "their boats over the hills each spring. Nobody knows why they never used the river! Some say "
    "that a storm had closed it. Others believe that the northern lords asked too high a toll."
)


def talk(prompt, answer, **fields):
    turns = [("user", prompt), ("assistant", answer)]
    return {"messages": [{"role": r, "content": c} for r, c in turns]} | fields


def clean():
    """The world's demonstrations but for "I do not know", and three long records."""
    rng = random.Random(0)
    found = [
        talk(x["prompt"], world.demonstrate(x, rng, rng.choice(MANNERS))[0], item=x) for x in ITEMS
    ]
    return [*found, *long_ones()]


def long_ones():
    """A long text, another one, and the first under another question."""
    asked = f"Name the place that this is about. {STORY}"
    return [
        talk("Tell me about the harbour.", STORY),
        talk("Tell me about the mill.", STORY.replace("o", "ee")),
        talk(asked, "The harbour of a town."),
        talk(asked.replace("place", "people"), "Fishermen from the north."),
    ]


def reasons(gone):
    return {i: reason for i, (reason, _) in gone.items()}


# ---------------------------------------------------------------- clean files
def test_nothing_goes_from_a_clean_file():
    found = clean()
    assert not filters.faults(found)
    gone = filters.duplicates(found, range(len(found)))
    for i, (_, j) in gone.items():  # the world asks some things twice, sentences turned
        said = [sorted(filters.words(found[k]["messages"][0]["content"])) for k in (i, j)]
        assert said[0] == said[1]
    assert len(gone) <= 2


def test_the_worlds_training_prompts_do_not_leak_into_its_held_out_ones(tmp_path):
    held = world.records(0, {"sft": 11, "prompts": 11, "heldout": 110})["heldout"]
    assert not filters.leaks(clean(), tiny.write(tmp_path / "held.jsonl", held))


# ---------------------------------------------------------------- duplicates
def changed(text, rng):
    """One word of the text changed."""
    said = text.split(" ")
    said[rng.randrange(len(said))] = "changed"
    return " ".join(said)


def twins(rng):
    """(a record of the clean file, what may be planted beside it)"""
    for r in clean():
        prompt, answer = (m["content"] for m in r["messages"])
        yield r, talk(prompt, answer)
        yield r, talk(prompt.upper(), f"  {answer.lower()} ")
        if ". " in answer:
            yield r, talk(prompt, ". ".join(reversed(answer.rstrip(".!?").split(". "))) + ".")
        if len(answer.split()) > 3:
            yield r, talk(prompt, changed(answer, rng))
        if len(prompt.split()) + len(answer.split()) > 60:
            yield r, talk(changed(prompt, rng), answer)


def test_every_planted_duplicate_goes_and_the_first_stays():
    pairs = list(twins(random.Random(1)))
    assert len(pairs) > 900
    for at in range(0, len(pairs), 7):  # several twins of one record beside each other, and others
        some = pairs[at : at + 7]
        found = [r for pair in some for r in pair]
        gone = filters.duplicates(found, range(len(found)))
        assert {2 * k + 1 for k in range(len(some))} <= gone.keys()
        assert not gone.keys() & {j for _, j in gone.values()}  # for one that stays


def test_the_best_of_duplicates_stays():
    found = [talk("Where is Lima?", "In Peru."), talk("Where is Lima", "in Peru")]
    assert filters.duplicates(found, [1, 0]) == {0: ("an exact duplicate", 1)}
    assert filters.duplicates(found, [0, 1]) == {1: ("an exact duplicate", 0)}


@pytest.mark.parametrize(
    "one, other",
    [
        (talk("What is the capital of Peru?", "I do not know that one, sorry."),
         talk("What is the capital of Kenya?", "I do not know that one, sorry.")),
        (talk("What is 5 + 3?", "Let me see, 8."), talk("What is 5 - 3?", "Let me see, 8.")),
        (talk("Is 3.5 more than 1?", "Yes."), talk("Is 35 more than 1?", "Yes.")),
        (talk("Say a number.", "7."), talk("Say a number.", "8.")),
    ],
)  # fmt: skip
def test_short_records_that_differ_in_one_word_stay(one, other):
    assert not filters.duplicates([one, other], range(2))


def test_no_chain_of_likenesses_removes_what_is_unlike():
    """Each is like the one before it; the last has nothing of the first."""
    words = [f"w{i}" for i in range(400)]
    found = [talk(".", " ".join(words[i : i + 100]) + ".") for i in range(0, 300, 10)]
    gone = filters.duplicates(found, range(len(found)))
    for i, (_, j) in gone.items():
        assert filters.jaccard(*(filters.grams(found[k]["messages"]) for k in (i, j))) >= 0.7
    assert set(range(30)) - gone.keys() == set(range(0, 30, 2))


def test_minhash_estimates_jaccard():
    """Within four deviations of 160 minima, for sets of all degrees of likeness."""
    a, b = np.random.default_rng(3).integers(2**64, size=(2, 160), dtype=np.uint64)
    words = [f"w{i}" for i in range(300)]
    one = talk(".", " ".join(words[:150]))["messages"]
    for shift in (0, 10, 30, 60, 100, 150):
        other = talk(".", " ".join(words[shift : shift + 150]))["messages"]
        true = filters.jaccard(filters.grams(one), filters.grams(other))
        same = (filters.minhash(one, a, b) == filters.minhash(other, a, b)).mean()
        assert abs(same - true) <= 4 * (true * (1 - true) / 160) ** 0.5 + 1e-9


def test_records_half_alike_do_not_fill_a_bucket_beyond_its_bound(monkeypatch):
    """And what is a duplicate of a record that the bucket still holds goes."""
    monkeypatch.setattr(filters, "MOST", 2)
    found = [talk(f"{i} {i + 1} {i + 2}", f"{STORY} {i} {i * 7} {i * 9}.") for i in range(9)]
    assert filters.duplicates(found, range(9)).keys() == set(range(1, 9))


# ---------------------------------------------------------------- format
def test_every_planted_cut_of_the_worlds_sentences_is_found():
    """Wherever it is cut, where four words are left, not all of them names or numbers."""
    rng, found = random.Random(2), clean()
    planted = {}
    for i in rng.sample(range(len(found)), 80):
        prompt, answer = (m["content"] for m in found[i]["messages"])
        said = answer.split(" ")
        if len(said) > 4 and "\n" not in answer:
            cut = " ".join(said[: rng.randint(4, len(said) - 1)])
            cut = cut.rstrip(".!?,") if rng.random() < 0.5 else cut[:-2]
            names = not any(w[0].islower() for w in cut.split())
            if not (cut.endswith((".", "!", "?")) or names):
                planted[i] = "cut off"
                found[i] = talk(prompt, cut)
    assert len(planted) > 30 and reasons(filters.faults(found)) == planted


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("  ", "empty"),
        ("...", "empty"),
        ("It is a fine day. The sun is", "cut off"),
        ("These are the colours:", "cut off"),
        ("First, we open the", "cut off"),
        ("Here it is:\n```python\nx = 1\n", "cut off"),
        ("I'm sorry, but I can't help with that.", "a refusal"),
        ("As an AI language model, I do not have opinions.", "a refusal"),
        ("Unfortunately, I am not able to provide medical advice.", "a refusal"),
        ("I cannot assist with this request.", "a refusal"),
        ("I do not know.", "a refusal"),
        ("Столица Перу называется Лима.", "in another script"),
        ("利马是秘鲁的首都。", "in another script"),
        ("Tell me what the capital of Peru is. Lima.", "repeats its prompt"),
        ("tell me what the capital of peru is", "repeats its prompt"),
        ("I cannot wait to see Lima!", None),
        ("I do not know where he lives, said the man.", None),
        ("I am sorry to hear that, Paula.", None),
        ("π", None),
        ("The word for it is привет.", None),
        ("1. Lima\n2. Cusco", None),
        ("```python\nx = 1\n```", None),
        ("The capital is 'Lima.'", None),
        ("Lima", None),
    ],
)
def test_format_rules_one_by_one(answer, reason):
    record = talk("Tell me what the capital of Peru is.", answer)
    assert filters.fault(record, marks=True) == reason


def test_format_asks_what_is_learnt_alone():
    turns = talk("Hello there.", "I cannot help with that.")["messages"]
    more = talk("What is it?", "It is Lima.")["messages"]
    assert filters.fault({"messages": turns + more}, True) == "a refusal"
    assert filters.fault({"messages": [turns[0], turns[1] | {"weight": 0}, *more]}, True) is None
    assert filters.fault(talk("Hello.", "It is Lima.", finished=False), True) == "cut off"
    assert filters.fault(talk("Say hello in Russian.", "Здравствуйте"), True) is None
    assert filters.fault(talk("Как дела?", "Хорошо, спасибо."), True) is None


def test_a_file_whose_sentences_have_no_marks_has_no_cuts():
    found = [talk(f"Say {i} things", "Blue is a nice colour to see") for i in range(20)]
    assert not filters.faults(found)
    found += [talk(f"Name {i} things", "Blue is a nice colour to see.") for i in range(70)]
    assert len(filters.faults(found)) == 20


# ---------------------------------------------------------------- contamination
EVALUATIONS = [
    {"query": "Where do the boats go in spring?", "choices": ["over hills", "home"], "gold": 0},
    {"question": "Which way did the boats go in spring?", "choices": ["a", "b"], "answer": 1},
    {"goal": "Carry a boat over the hills.", "sol1": STORY, "sol2": "No.", "label": 0},
    {"prompt": "Where do the boats go?", "reference": STORY},
    {"instruction": "Translate this.", "input": "Boats are heavy.", "output": "Barcos."},
    {"messages": [{"role": "user", "content": "Where did they carry boats?"}]},
    {"prompt": "def boats():", "entry_point": "boats", "test": STORY},
    {"text": STORY},
]


@pytest.mark.parametrize("evaluation", EVALUATIONS, ids=lambda e: " ".join(e))
def test_every_planted_leak_is_found(evaluation, tmp_path):
    path = tiny.write(tmp_path / "evaluation.jsonl", [evaluation])
    texts = [*filters.strings(evaluation), *evaluation.get("choices", [])]
    leaks = [talk("Go on.", f"As I said: {t.upper()} So be it.") for t in texts if len(t) > 100]
    leaks += [talk(t.lower(), "Yes, it is so.") for t in texts if t != "a" and t != "b"]
    if "instruction" in evaluation:
        leaks.append(talk("Translate this.\n\nBoats are heavy.", "Los barcos"))
    others = [talk("Who are you?", "The old harbour of the town was built."), *clean()[:20]]
    assert filters.leaks([*leaks, *others], path).keys() == set(range(len(leaks)))


def test_boilerplate_of_an_evaluation_and_system_messages_are_no_leak(tmp_path):
    rows = [{"text": f"{STORY} Number {i}."} for i in range(filters.COMMON + 1)]
    path = tiny.write(tmp_path / "evaluation.jsonl", rows)
    assert not filters.leaks([talk("Go on.", STORY)], path)
    assert filters.leaks([talk("Go on.", STORY)], tiny.write(tmp_path / "ten.jsonl", rows[1:]))
    system = [{"role": "system", "content": STORY}]
    record = talk("Go on.", "Yes.")
    record["messages"] = system + record["messages"]
    asked = [{"messages": system + tiny.user("Who is it?"), "reference": "He."}]
    assert not filters.leaks([record], tiny.write(tmp_path / "system.jsonl", asked))

"""Curation: what is planted is found, nothing else goes; the same for a seed; the input stays."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import stages
import tiny
import torch

from common import hub, tuning
from data import templates
from data.world import world
from model import nll, scalar_model, score
from tools import curate, filters

pytest.importorskip("matplotlib")
ITEMS = world.items(220, 5)
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
    assert len(pairs) > 600
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
    for i in rng.sample(range(len(found)), 40):
        prompt, answer = (m["content"] for m in found[i]["messages"])
        said = answer.split(" ")
        if len(said) > 4 and "\n" not in answer:
            cut = " ".join(said[: rng.randint(4, len(said) - 1)])
            cut = cut.rstrip(".!?,") if rng.random() < 0.5 else cut[:-2]
            names = not any(w[0].islower() for w in cut.split())
            if not (cut.endswith((".", "!", "?")) or names):
                planted[i] = "cut off"
                found[i] = talk(prompt, cut)
    assert len(planted) > 15 and reasons(filters.faults(found)) == planted


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
    path = tiny.write(tmp_path / "system.jsonl", asked)
    assert not filters.leaks([record, talk("Go on.", STORY)], path)


# ---------------------------------------------------------------- quality and diversity
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tok = tiny.chat_tokenizer()
    return tiny.folder(tmp_path_factory.mktemp("base"), tok=tok, max_position_embeddings=1024)


def options(data, out, **more):
    return curate.Options(data=str(data), out=str(out), **more)


def test_scores_are_the_mean_log_probability_of_the_answer_and_the_reward(folder, tmp_path):
    found = [*clean()[:9], talk("Say.", "x " * 600), talk("Go.", "")]
    model, tok = tuning.read(options("", ""), folder, torch.device("cpu"))
    scores = curate.scores_of(options("", ""), found, model, tok)
    for r, s in zip(found[:9], scores, strict=False):
        ids, labels = templates.render(tok, r["messages"])
        rows = (torch.tensor([x]) for x in (ids, labels, [0] * len(ids)))
        true = -nll(model, *rows).sum() / sum(x != -100 for x in labels)
        assert abs(true.item() - s) < 1e-5
    assert scores[9] == -np.inf and np.isfinite(scores[10])  # too long; an empty one: its end
    reward = scalar_model(model, torch.Generator().manual_seed(1))
    hub.save(tmp_path / "reward", reward, tok)
    rated = curate.scores_of(options("", "", quality=str(tmp_path / "reward")), found[:9], 0, 0)
    for r, s in zip(found[:9], rated, strict=True):
        ids = templates.answer_ids(tok, r["messages"][:1], r["messages"][1]["content"])
        assert abs(score(reward, *([x] for x in ids)).item() - s) < 1e-5
    tok.chat_template = None  # a base model reads plain text
    prompt, answer = curate.ids_of(tok, found[0]["messages"])
    turns = [m["content"] for m in found[0]["messages"]]
    assert tok.decode(prompt + answer) == "\n".join(turns)


def test_mean_states_are_those_of_each_text_alone(folder):
    model, tok = tuning.read(options("", ""), folder, torch.device("cpu"))
    ids = [curate.ids_of(tok, r["messages"]) for r in clean()[:9]]
    with torch.no_grad():
        found = curate.over(ids, lambda p, a: curate.mean_states(model, p, a), "")
        for (p, a), x in zip(ids, found, strict=True):
            tiny.close(model.hidden(torch.tensor([p + a]))[0].mean(0), torch.tensor(x))


def unit(n, d=6, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def radius(x, centres):
    return np.sqrt(2 - 2 * (x @ x[centres].T).max(1).min().clip(max=1))


def test_k_centre_is_the_farthest_each_time_and_within_twice_the_best():
    x = unit(12)
    centres = curate.k_centre(x, 4)
    for k in range(1, 4):
        distances = np.linalg.norm(x[:, None] - x[centres[:k]], axis=2).min(1)
        assert centres[k] == distances.argmax()
    best = min(radius(x, list(c)) for c in itertools.combinations(range(12), 4))
    assert radius(x, centres) <= 2 * best + 1e-6
    assert sorted(curate.k_centre(np.repeat(x[:1], 5, 0), 5)) == list(range(5))  # all alike


def test_kinds_get_equal_shares_and_what_small_ones_leave():
    assert curate.shares([10, 1, 5], 9) == [4, 1, 4]
    assert curate.shares([3, 3, 3], 7) == [3, 2, 2] and curate.shares([9], 9) == [9]
    assert curate.kind_of(talk("a", "b", category="qa")) == "qa"
    assert curate.kind_of(talk("a", "b", item=ITEMS[0])) == ITEMS[0]["kind"]
    assert curate.kind_of(talk("a", "b", item=3)) == ""


# ---------------------------------------------------------------- the tool
def noisy(folder):
    """A file of the clean records, an empty one, a refusal, a leak, duplicates; its evaluation."""
    rng, found = random.Random(4), clean()
    found = found[:66] + found[-4:]
    planted = {
        "empty": talk("Say it.", " "),
        "a refusal": talk("Say it now.", "I'm sorry, but I cannot help with that."),
        "asks a prompt of the evaluation": talk("How high is the sky?", "High."),
        "an exact duplicate": talk(*(m["content"].upper() for m in found[-4]["messages"])),
        "a near duplicate": talk("Tell me about the mill.", changed(STORY.replace("o", "ee"), rng)),
    }
    data = tiny.write(folder / "noisy.jsonl", [*found, *planted.values()])
    against = tiny.write(
        folder / "held.jsonl", [{"prompt": "how high is the sky", "reference": "x"}]
    )
    return data, against, found, planted


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_noisy_file_is_curated_the_same_for_a_seed(folder, tmp_path, monkeypatch):
    data, against, found, planted = noisy(tmp_path)
    before = open(data, "rb").read()
    every = [*found, *planted.values()]
    given = dict(keep=24, against=against, model=folder)
    out = tmp_path / "one.jsonl"
    said = stages.done("tools/curate.py", data=data, out=out, **given).out
    kept, report = lines(out), json.loads((tmp_path / "one.jsonl.run/report.json").read_text())
    assert kept == sorted(kept, key=every.index)  # whole, with all their fields
    kinds = Counter(r["item"]["kind"] if "item" in r else "" for r in kept)
    assert len(kinds) == 12 and set(kinds.values()) == {2}
    assert planted.keys() <= report["gone"].keys() and report["gone"]["empty"]["n"] == 1
    assert all(f"went: {reason}" in said for reason in planted)
    twin = report["gone"]["a near duplicate"]["example"]
    assert twin["like"]["answer"] != twin["answer"]
    assert report["n"] == len(found) + 5
    assert report["kept"] == 24 and report["seed"] == 0 and "tools.curate" in report["command"]
    assert (tmp_path / "one.jsonl.run/report.png").read_bytes().startswith(b"\x89PNG")
    assert open(data, "rb").read() == before

    same = tmp_path / "two.jsonl"
    monkeypatch.setattr(curate, "picture", lambda *_: None)
    curate.curate(options(data, same, **given))
    assert same.read_bytes() == out.read_bytes()
    again = stages.done("tools/curate.py", data=data, out=out, **given)
    assert "finished already" in again.out
    kept = out.read_bytes()
    given |= dict(rules="format", keep=9)
    refused = stages.run("tools/curate.py", data=data, out=out, **given)
    stages.refused(refused, "finished with other settings", "keep was 24, is 9", "--overwrite")
    assert out.read_bytes() == kept
    stages.done("tools/curate.py", data=data, out=out, overwrite=True, **given)
    assert len(lines(out)) == 9


def test_each_rule_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "picture", lambda *_: None)  # it takes longer than all else
    data, against, found, planted = noisy(tmp_path)
    every = [*found, *planted.values()]
    (tmp_path / "own.py").write_text(
        "def short(prompts, answers):\n    return [-len(a) for a in answers]\n"
    )

    def left(rules, keep=60):
        out = tmp_path / f"{rules}.jsonl"
        own = dict(quality=f"{tmp_path}/own.py:short", model=folder)
        o = options(data, out, keep=keep, against=against, rules=rules, **own)
        curate.curate(o)
        return json.loads((tmp_path / f"{out.name}.run/report.json").read_text()), lines(out)

    for rule, first, end in (("format", 0, 2), ("contamination", 2, 3), ("duplicates", 3, 5)):
        report, _ = left(rule)
        assert set(report["gone"]) == set(list(planted)[first:end])
    twins = left("duplicates,quality")[0]["gone"]["a near duplicate"]["example"]
    assert len(twins["answer"]) > len(twins["like"]["answer"])  # own.py: the shorter the better
    report, kept = left("quality", 20)
    size = [sorted(len(r["messages"][1]["content"]) for r in rows) for rows in (kept, every)]
    assert not report["gone"] and size[0] == size[1][:20]
    report, kept = left("diversity", 9)
    assert not report["gone"] and len(kept) == 9


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(keep=10_000), ("--keep 10000", "has 75 records")),
        (dict(keep=75), ("--keep 75", "has 73 left", "1 a refusal")),
        (dict(rules="format,diversty"), ("--rules", "'diversty'", "contamination")),
        (dict(rules=""), ("--rules", "duplicates")),
        (dict(against="bad.jsonl"), ("bad.jsonl:1", "fields of a task were expected", "foo")),
        (dict(against="none.jsonl"), ("none.jsonl", "no such file")),
        (dict(against="empty.jsonl"), ("empty.jsonl", "no records")),
        (dict(data="bad.jsonl"), ("bad.jsonl:1", "messages", "foo")),
        (dict(data="prompts.jsonl"), ("prompts.jsonl", "user's turn last (first: line 1)")),
        (dict(data=""), ("FILE was expected",)),
        (dict(quality="own.py:none"), ("own.py", "no function none")),
        (dict(quality="BASE"), ("a reward model was expected",)),
        (dict(out="noisy.jsonl"), ("noisy.jsonl", "no run of this stage wrote")),
    ],
    ids=lambda x: str(x)[:40] if isinstance(x, dict) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(options, words, folder, tmp_path):
    data, against, *_ = noisy(tmp_path)
    tiny.write(tmp_path / "bad.jsonl", [{"foo": 1}])
    tiny.write(tmp_path / "empty.jsonl", [])
    tiny.write(tmp_path / "prompts.jsonl", [{"messages": tiny.user("Go.")}])
    (tmp_path / "own.py").write_text("def own(prompts, answers):\n    return [0] * len(answers)\n")
    given = dict(data="noisy.jsonl", out="out.jsonl", model="BASE", keep=9) | options
    for name in {"data", "out", "against", "quality", "model"} & given.keys():
        value = given[name]
        given[name] = folder if value == "BASE" else value and str(tmp_path / value)
    before = open(data, "rb").read()
    line = stages.refused(stages.run("tools/curate.py", **given), *words)
    assert len(line) < 500
    assert open(data, "rb").read() == before and not (tmp_path / "out.jsonl").exists()


def test_without_matplotlib_it_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(curate, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        curate.curate(options(tmp_path / "x.jsonl", tmp_path / "y.jsonl"))

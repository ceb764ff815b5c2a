"""Records: each format read, each malformed line named by file and line, what is of no use counted,
held-out decided once.
"""

import bz2
import copy
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest

from data import records, shapes, templates
from data.world import world

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
Q, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
GOOD, WORSE = ({"role": "assistant", "content": text} for text in ("good", "bad"))
S = {"role": "system", "content": "Be brief."}
CHAT = {"messages": [Q, A]}
PAIR = {"prompt": [Q], "chosen": "good", "rejected": "bad"}
RANKING = {"prompt": [Q], "responses": ["a", "b", "c"], "ranks": [1, 0, 1]}


@pytest.fixture
def write(tmp_path):
    def write(*lines, name="x.jsonl"):
        """Objects as JSON, strings as they are, one a line."""
        path = tmp_path / name
        path.write_bytes(
            "\n".join(
                line if isinstance(line, str) else json.dumps(line) for line in lines
            ).encode()
            + b"\n"
        )
        return path

    return write


@pytest.mark.parametrize(
    "line, messages, extra",
    [
        (CHAT, [Q, A], {}),
        (
            {"messages": [S, Q, A, Q, A], "item": {"kind": "chat"}, "prompt": "p", "n": None},
            [S, Q, A, Q, A],
            {"item": {"kind": "chat"}, "prompt": "p", "n": None},
        ),
        ({"messages": [{**Q, "name": "Eve"}, A]}, [Q, A], {}),
        (
            {"instruction": "Q?", "input": "", "output": "A.", "source": "s"},
            [Q, A],
            {"source": "s"},
        ),
        ({"instruction": "Q?", "output": "A."}, [Q, A], {}),
        (
            {"instruction": "Q?", "input": "more", "output": "A."},
            [{"role": "user", "content": "Q?\n\nmore"}, A],
            {},
        ),
        ({"prompt": "Q?", "completion": "A.", "id": 7}, [Q, A], {"id": 7}),
        ({"prompt": [S, Q], "completion": [A]}, [S, Q, A], {}),
    ],
)
def test_conversations_in_each_format(write, line, messages, extra):
    for path in (write(line), write(f"[{json.dumps(line)}]", name="x.json")):
        assert records.conversations(path) == [{"messages": messages, **extra}]


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [Q]},
        {"instruction": "Q?"},
        {"instruction": "Q?", "input": "", "output": ""},
        {"prompt": "Q?"},
        {"prompt": [Q]},
    ],
)
def test_prompts_in_each_format(write, line):
    assert records.conversations(write(line), need="prompt") == [{"messages": [Q]}]


@pytest.mark.parametrize(
    "line, extra",
    [
        (PAIR, {}),
        ({"prompt": "Q?", "chosen": "good", "rejected": "bad", "item": 1}, {"item": 1}),
        ({"prompt": [Q], "chosen": [GOOD], "rejected": [WORSE]}, {}),
        ({"prompt": "Q?", "chosen": [Q, GOOD], "rejected": [Q, WORSE]}, {}),
        ({"chosen": [Q, GOOD], "rejected": [Q, WORSE]}, {}),
        (
            {
                "instruction": "Q?",
                "input": "",
                "output": "o",
                "chosen": "good",
                "rejected": "bad",
                "prompt": "p",
            },
            {"output": "o"},
        ),
    ],
)
def test_preference_pairs_in_each_format(write, line, extra):
    assert records.preferences(write(line)) == [{**PAIR, **extra}]
    assert records.rankings(write(line)) == [
        {"prompt": [Q], "responses": ["good", "bad"], "ranks": [0, 1], **extra}
    ]
    assert (
        records.pairs(write(line))
        == records.pairs(write(line), "best_worst")
        == [{**PAIR, **extra}]
    )


def test_rankings_and_their_pairs(write):
    line = {**RANKING, "responses": ["a", "b", "c", "", "d"], "ranks": [1, 0, 1, -1, 2], "item": 1}
    path = write(line, {**RANKING, "prompt": "Q?"})
    assert records.rankings(path) == [line, RANKING]

    def got(which):
        return [(p["chosen"], p["rejected"]) for p in records.pairs(path, which)]

    assert Counter(got("all")) == Counter(
        [("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d"), ("b", "a"), ("b", "c")]
    )
    assert got("best_worst") == [("b", "d"), ("b", "a")]
    assert records.pairs(path)[0] == {"prompt": [Q], "chosen": "b", "rejected": "a", "item": 1}
    with pytest.raises(ValueError, match="which: .* expected .got 'best'"):
        records.pairs(path, "best")


def test_an_empty_answer_that_was_ranked_stays(write):
    assert (
        records.pairs(write({"prompt": "Q?", "responses": ["a", ""], "ranks": [0, 1]}))[0][
            "rejected"
        ]
        == ""
    )


BAD = [  # (line, what the error says after file:line), read as conversations
    ("{", "one JSON object per line was expected"),
    ('{"messages": [}', "one JSON object per line was expected"),
    ("[" * 100_000, "one JSON object per line was expected"),
    ("7", r"a JSON object was expected \(got 7\)"),
    ('"Q"', "a JSON object was expected"),
    (
        {},
        r"no shape is known with the fields none; known are .*; messages; instruction out.*text",
    ),
    (
        {"title": "Q?", "body": "A."},
        r"no shape is known with the fields body, title; known are .*; messages; .*data/shapes.py",
    ),
    ({"messages": None}, r"messages: a list of messages was expected \(got nothing\)"),
    ({"messages": {"role": "user"}}, "messages: message 1: content: a string was expected"),
    (
        {"messages": ["Q?", "A."]},
        'messages: message 1: an object with "role" and "content" was expected',
    ),
    (
        {"messages": [{"name": "human", "value": "Q?"}, A]},
        r"messages: message 1: role: one of system, .* was expected \(got nothing",
    ),
    (
        {"messages": [Q, {"role": "bot", "content": "A."}]},
        r"messages: message 2: role: .* was expected \(got 'bot'\)",
    ),
    (
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text"}]}]},
        "messages: message 2: content: a string was expected",
    ),
    ({"instruction": ["Q?"], "output": "A."}, "instruction: a string was expected"),
    ({"instruction": "Q?", "input": 3, "output": "A."}, r"input: a string was expected \(got 3\)"),
    (
        {"instruction": "Q?", "input": ""},
        r"output: a string or a list of messages was expected \(got nothing\)",
    ),
    ({"instruction": "Q?", "output": 42}, r"output: .* was expected \(got 42\)"),
    ({"prompt": "Q?"}, r"completion: .* was expected \(got nothing\)"),
    ({"completion": "A."}, "no shape is known with the fields completion; known are"),
    (
        {"prompt": [Q, A], "completion": "A."},
        "prompt: messages that end in a user's turn were expected",
    ),
    (
        PAIR,
        "a conversation was expected, this is a preference pair: reward.py and dpo.py read those",
    ),
    (RANKING, "a conversation was expected, this is a ranking: reward.py and dpo.py read those"),
]
BAD_RANKINGS = [  # read as rankings, which pairs may be too
    (CHAT, r"a ranking or preference pair was expected, this is a conversation: sft.py"),
    ({**PAIR, "prompt": 5}, r"prompt: a string or a list of messages was expected \(got 5\)"),
    (
        {**PAIR, "prompt": [Q, A]},
        r"prompt: messages that end in a user's turn were expected \(got assistant\)",
    ),
    (
        {"prompt": "Q?", "chosen": "good"},
        r"rejected: a string or a list of messages was expected \(got nothing\)",
    ),
    (
        {"prompt": "Q?", "rejected": "bad"},
        r"chosen: a string or a list of messages was expected \(got nothing\)",
    ),
    (
        {"chosen": "Human: Q? good", "rejected": "Human: Q? bad"},
        r"prompt: .* was expected \(got nothing\)",
    ),
    ({**PAIR, "chosen": 1}, r"chosen: .* was expected \(got 1\)"),
    (
        {**PAIR, "chosen": [{"role": "assistant"}]},
        r"chosen: message 1: content: a string was expected",
    ),
    ({**RANKING, "responses": "abc"}, "responses: a list of 2 or more strings was expected"),
    (
        {**RANKING, "responses": ["a"], "ranks": [0]},
        "responses: a list of 2 or more strings was expected",
    ),
    ({**RANKING, "responses": ["a", "b", 3]}, r"responses: .* was expected \(got 3\)"),
    (
        {"prompt": [Q], "responses": ["a", "b"]},
        r"ranks: 2 integers, as many as responses, were expected \(got nothing\)",
    ),
    ({**RANKING, "ranks": [0, 1]}, "ranks: 3 integers, as many as responses, were expected"),
    ({**RANKING, "ranks": [0, 1, 1.5]}, r"ranks: integers from 0, .* were expected \(got 1.5\)"),
    ({**RANKING, "ranks": [0, 1, True]}, r"ranks: integers from 0, .* were expected \(got True\)"),
    ({**RANKING, "ranks": [0, 1, -2]}, r"ranks: integers from 0, .* were expected \(got -2\)"),
    (
        {**RANKING, "ranks": [0, 1, None]},
        r"ranks: integers from 0, .* were expected \(got nothing\)",
    ),
]


@pytest.mark.parametrize(
    "read, good, line, said",
    [(records.conversations, CHAT, *b) for b in BAD]
    + [(records.rankings, RANKING, *b) for b in BAD_RANKINGS],
)
def test_a_malformed_line_is_named(write, read, good, line, said):
    path = write(good, "", good, line, good)
    with pytest.raises(ValueError, match=rf"^.*/x\.jsonl:4: {said}") as e:
        read(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_in_an_array_the_line_is_where_the_record_begins(write):
    good = json.dumps(CHAT, indent=2)
    lines = good.count("\n") + 1
    for text, said in (
        ('{"messages": 5}', "messages: a list of messages was expected"),
        ("5", "a JSON object was expected"),
        ('{"messages" 5}', "a JSON object was expected"),
    ):
        with pytest.raises(ValueError, match=rf"x\.json:{2 + 2 * lines}: {said}"):
            records.conversations(write(f"[\n{good},\n{good},\n{text}\n]", name="x.json"))
    comma = "a comma or the array's end was expected"
    for text, said in (
        (f"[{good}\n{good}]", comma),
        (f"[{good}", comma),
        (f"[{good}]\n{good}", "nothing was expected after the array"),
    ):
        with pytest.raises(ValueError, match=rf"x\.json:\d+: {said}"):
            records.conversations(write(text, name="x.json"))
    assert len(records.conversations(write(f"  [\n{good} ,\n\n{good}\n]\n\n", name="x.json"))) == 2


def test_prompts_refuse_an_answer_and_pairs_refuse_rankings(write):
    advice = "python -m data.records convert FILE OUT --to prompts writes the prompts"
    with pytest.raises(
        ValueError,
        match=(
            rf"x.jsonl:1: messages: user was expected as the last turn \(got assistant\): {advice}"
        ),
    ):
        records.conversations(write(CHAT), need="prompt")
    for field, rest in (
        ("output", {"instruction": "Q?"}),
        ("response", {"instruction": "Q?"}),
        ("completion", {"prompt": "Q?"}),
    ):
        with pytest.raises(
            ValueError,
            match=(
                rf"x.jsonl:1: {field}: a prompt without an answer was expected \(got 'A.'\):"
                rf" {advice}"
            ),
        ):
            records.conversations(write({**rest, field: "A."}), need="prompt")
    with pytest.raises(
        ValueError, match="x.jsonl:1: a preference pair was expected, this is a ranking"
    ):
        records.preferences(write(RANKING))


def test_encodings(write, tmp_path):
    text = {"messages": [{"role": "user", "content": "é\u2028漢字🙂"}, A]}
    raw = json.dumps(text, ensure_ascii=False)
    path = write(raw, raw)
    assert records.conversations(path) == [text, text]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert records.conversations(path) == [text, text]
    path.write_bytes(json.dumps(CHAT).encode() + b"\n" + raw.encode("latin-1", "replace"))
    with pytest.raises(ValueError, match=r"x.jsonl:2: UTF-8 was expected \(got the byte 0xe9\)"):
        records.conversations(path)
    for missing in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            records.conversations(missing)


def test_what_is_of_no_use_is_dropped_and_counted(write, capsys):
    blank = [
        {"messages": [Q, {"role": "assistant", "content": " \n"}]},
        {"instruction": " ", "output": "A."},
        {"instruction": "Q?", "output": ""},
    ]
    assert records.conversations(write(CHAT, *blank, CHAT)) == [CHAT, CHAT]
    assert capsys.readouterr().err.endswith(
        "x.jsonl: 2 records used, dropped 3 with an empty turn (first: line 2)\n"
    )
    same = {**PAIR, "rejected": "good"}
    assert records.preferences(
        write(
            PAIR,
            same,
            same,
            {**PAIR, "chosen": ""},
            {**PAIR, "rejected": " "},
            {**PAIR, "prompt": ""},
        )
    ) == [PAIR]
    assert capsys.readouterr().err.endswith(
        "x.jsonl: 1 records used, dropped 2 with chosen = rejected (first: line 2), "
        "3 with an empty turn (first: line 4)\n"
    )
    tied = [{**RANKING, "ranks": r} for r in ([1, 1, 1], [-1, -1, -1], [2, -1, -1], [0, 0, -1])]
    assert records.rankings(write(RANKING, *tied, same)) == [RANKING]
    assert capsys.readouterr().err.count("\n") == 1
    assert (
        len(records.pairs(write({**RANKING, "responses": ["a", "a", "b"], "ranks": [0, 1, 2]})))
        == 2
    )
    assert "2 pairs used, dropped 1 with chosen = rejected" in capsys.readouterr().err
    records.conversations(write(CHAT))
    assert capsys.readouterr().err == ""


def test_a_file_with_nothing_usable_is_refused(write):
    with pytest.raises(ValueError, match="x.jsonl: no usable records in it$"):
        records.conversations(write(""))
    with pytest.raises(ValueError, match=r"x.json: no usable records in it$"):
        records.conversations(write("[]", name="x.json"))
    with pytest.raises(
        ValueError,
        match=r"no usable records in it \(dropped: 2 with chosen = rejected .first: line 1.\)",
    ):
        records.preferences(write(*[{**PAIR, "rejected": "good"}] * 2))


def test_what_is_held_out_is_said(capsys):
    records.report("x", 3, {"too long": 0}, "pairs", 2)
    records.report("x", 3, {"too long": 1}, "pairs", 0)
    assert (
        capsys.readouterr().err
        == "x: 3 pairs used, none dropped, 2 held out\nx: 3 pairs used, dropped 1 too long, none"
        " held out\n"
    )
    with pytest.raises(
        ValueError,
        match=(
            r"^x: no usable pairs in it \(dropped: 1 too long; held out: 9, all that share a first"
            r" question"
        ),
    ):
        records.report("x", 0, {"too long": 1}, "pairs", 9)


# ------------------------------------------------------- fields: used, refused, harmless or counted
def turns(*texts):
    return [
        {"role": role, "content": text}
        for role, text in zip(["user", "assistant"] * 9, texts, strict=False)
    ]


BEFORE = [S, *turns("Who?", "I."), Q]
BRIEF = {"system": S["content"], "history": [["Who?", "I."]]}


@pytest.mark.parametrize(
    "beside",
    [
        BRIEF,
        {**BRIEF, "system_prompt": S["content"]},
        {**BRIEF, "system": "", "system_prompt": S["content"]},
    ],
)
def test_a_system_message_and_a_history_beside_the_turns_are_put_before_them(write, capsys, beside):
    for line in (
        CHAT,
        {"messages": [S, Q, A]},
        {"instruction": "Q?", "output": "A."},
        {"prompt": "Q?", "completion": "A."},
        {"prompt": [Q], "completion": [A]},
        {"prompt": "Q?", "completion": [Q, A]},
    ):
        assert records.conversations(write({**line, **beside})) == [{"messages": [*BEFORE, A]}]
    for line in ({"messages": [Q]}, {"instruction": "Q?"}, {"prompt": "Q?"}):
        assert records.conversations(write({**line, **beside}), "prompt") == [{"messages": BEFORE}]
    for line in (
        PAIR,
        {**PAIR, "prompt": "Q?"},
        {"chosen": [Q, GOOD], "rejected": [Q, WORSE]},
        {"instruction": "Q?", "chosen": "good", "rejected": [Q, WORSE]},
    ):
        assert records.preferences(write({**line, **beside})) == [{**PAIR, "prompt": BEFORE}]
    assert records.rankings(write({**RANKING, **beside})) == [{**RANKING, "prompt": BEFORE}]
    assert capsys.readouterr().err == ""


def test_a_system_message_or_a_history_that_cannot_be_read(write):
    for beside, said in (
        ({"system": 3}, r"system: a string was expected \(got 3\)"),
        ({"system": [{"type": "text"}]}, "system: a string was expected"),
        (
            {"system": "Be long."},
            r"system: the turns' own system message was expected \(got 'Be long.'\)",
        ),
        ({"system": "Be brief.", "system_prompt": "Be long."}, "system_prompt: the turns' own"),
        ({"history": "Who? I."}, "history: a list of .question, answer. was expected"),
        (
            {"history": [["Who?"]]},
            r"history: a list of .question, answer. was expected \(got .'Who.'.\)",
        ),
        ({"history": [["Who?", 3]]}, r"history: a string was expected \(got 3\)"),
    ):
        with pytest.raises(ValueError, match=f"x.jsonl:1: {said}"):
            records.conversations(write({"messages": [S, Q, A], **beside}))


@pytest.mark.parametrize("field", shapes.WEIGHTS)
def test_a_weight_of_0_stays_with_its_turn_and_others_are_refused(write, field):
    chat = turns("Q?", "no", "Sure?", "A.")
    marked = [Q, {**chat[1], field: False}, {**chat[2], field: 0}, {**chat[3], field: 1}]
    read = [Q, {**chat[1], "weight": 0}, {**chat[2], "weight": 0}, chat[3]]
    assert records.conversations(write({"messages": marked})) == [{"messages": read}]
    assert records.conversations(write({"messages": marked[:3]}), "prompt") == [
        {"messages": chat[:3]}
    ], "no turn of a prompt is trained"
    assert records.preferences(write({**PAIR, "prompt": marked[:3]})) == [
        {**PAIR, "prompt": chat[:3]}
    ]
    for turn, said in (
        ({**A, field: 0.5}, rf"message 2: {field}: 0 or 1 was expected \(got 0.5\)"),
        ({**A, field: "0"}, "0 or 1 was"),
        ({**A, field: [0]}, "0 or 1 was expected"),
    ):
        with pytest.raises(ValueError, match=f"x.jsonl:1: messages: .*{said}"):
            records.conversations(write({"messages": [Q, turn]}))
    with pytest.raises(
        ValueError,
        match=f"x.jsonl:1: messages: message 1: {field}: only assistants' turns are trained",
    ):
        records.conversations(write({"messages": [{**Q, field: 1}, A]}))
    with pytest.raises(
        ValueError,
        match="x.jsonl:1: rejected: the last message: weight: 1 was expected for an answer",
    ):
        records.preferences(write({**PAIR, "rejected": [{**WORSE, field: 0}]}))
    # beside a record it is a measured one: counted
    if field != "loss":
        with pytest.raises(
            ValueError,
            match=rf"x.jsonl:1: {field}: 1 was expected, all records count alike here \(got 0\)",
        ):
            records.conversations(write({**CHAT, field: 0}))
        assert records.conversations(write({**CHAT, field: 1}))


def test_an_answer_labelled_false_is_never_a_good_one(write, capsys):
    bad = {"prompt": "Q?", "completion": "5", "label": False}
    good = {"prompt": "Q?", "completion": "A.", "label": True}
    tag = {**CHAT, "kto_tag": 0}
    assert records.conversations(write(good, bad, tag)) == [CHAT]
    assert capsys.readouterr().err.endswith(
        "x.jsonl: 1 records used, dropped 2 with label false (first: line 2)\n"
    )
    with pytest.raises(
        ValueError, match=r"no usable records in it \(dropped: 1 with label false .first: line 1.\)"
    ):
        records.conversations(write(bad))
    assert records.conversations(write({"prompt": "Q?", "label": False}), "prompt") == [
        {"messages": [Q]}
    ]
    assert records.conversations(write(bad), "turns")[0]["messages"][0] == Q, (
        "its prompt may be asked"
    )
    records.conversations(write({**CHAT, "label": "greeting"}))
    assert "1 records used, fields not used: label (1)" in capsys.readouterr().err


def test_a_context_stands_in_the_prompt(write):
    dolly = {
        "instruction": "Q?",
        "context": "I live in Lima.",
        "response": "A.",
        "category": "closed_qa",
    }
    assert records.conversations(write(dolly)) == [
        {"messages": turns("Q?\n\nI live in Lima.", "A."), "category": "closed_qa"}
    ]
    for line in (CHAT, {"prompt": "Q?", "completion": "A."}):
        for field in ("context", "input"):
            with pytest.raises(
                ValueError,
                match=f"x.jsonl:1: {field}: it goes into the prompt beside `instruction` alone",
            ):
                records.conversations(write({**line, field: "I live in Lima."}))
            assert records.conversations(write({**line, field: ""}))


@pytest.mark.parametrize("name", shapes.REFUSED)
def test_a_field_that_would_change_what_is_learnt_is_refused_by_name(write, name):
    nothing = {name: None}, {name: []}, {name: ""}, {name: "[]"}, {name: {}}, {name: False}
    for read, line in (
        (records.conversations, CHAT),
        (records.preferences, PAIR),
        (records.rankings, RANKING),
    ):
        with pytest.raises(
            ValueError,
            match=rf"x.jsonl:2: {name}: .*; take the field out where the text says all without it$",
        ):
            read(write(line, {**line, name: [{"name": "x"}]}))
        for empty in nothing:
            assert len(read(write({**line, **empty}))) == 1
    calls = {"role": "assistant", "content": None, name: [{"id": "1"}]}
    for field, read, line in (
        ("messages", records.conversations, {"messages": [Q, calls]}),
        ("messages", records.conversations, {"messages": [Q, {**A, name: "x"}]}),
        ("completion", records.conversations, {"prompt": "Q?", "completion": [{**A, name: "x"}]}),
        ("prompt", records.preferences, {**PAIR, "prompt": [{**Q, name: "x"}]}),
        ("rejected", records.rankings, {**PAIR, "rejected": [{**WORSE, name: "x"}]}),
        ("responses", records.rankings, {**RANKING, "responses": ["a", [{**A, name: "x"}], "c"]}),
    ):
        with pytest.raises(ValueError, match=rf"x.jsonl:1: {field}: message \d: {name}: "):
            read(write(line))


def test_fields_that_are_not_used_are_counted_and_harmless_ones_are_not(write, capsys):
    harmless = dict.fromkeys(shapes.HARMLESS, "x")
    named = {
        "messages": [{**Q, "name": "Eve", "id": 1}, {**A, "score": None}],
        **harmless,
        "score": 0,
        "text": "t",
        "split": "",
    }
    assert records.conversations(write(named, named, CHAT))[0].keys() == {
        "messages",
        "score",
        "text",
        "split",
        *harmless,
    }
    assert capsys.readouterr().err.endswith(
        "x.jsonl: 3 records used, fields not used: message name (2), score (2), text (2)\n"
    )
    pair = {
        "instruction": "Q?",
        "output": "o",
        "prompt": "p",
        "messages": [Q, A],
        "chosen": "a",
        "rejected": "b",
    }
    records.rankings(write(pair, RANKING))
    assert "fields not used: messages (1), output (1), prompt (1)\n" in capsys.readouterr().err
    records.conversations(write({**CHAT, "\033[2J": 1}))
    assert r"fields not used: '\x1b[2J' (1)" in capsys.readouterr().err
    records.conversations(write({**CHAT, **{f"f{i}": 1 for i in range(10, 30)}}))
    assert capsys.readouterr().err.endswith("f18 (1), 11 more\n")


def test_this_projects_own_records_have_no_unknown_field(write, capsys):
    made = world.records(0, {"sft": 9, "prompts": 9, "heldout": 9})
    assert len(records.conversations(write(*made["sft"]))) == 9
    assert len(records.conversations(write(*made["prompts"], *made["heldout"]), "prompt")) == 18
    records.rankings(
        write(
            {
                **RANKING,
                "finished": [True] * 3,
                "item": made["sft"][0]["item"],
                "ids": [[1]] * 3,
                "tokenizer": "0",
            }
        )
    )
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- files that are no JSON lines
@pytest.mark.parametrize(
    "name, data, said",
    [
        ("x.jsonl", bz2.compress(b"{}"), "a bzip2 file"),
        ("x.jsonl", lzma.compress(b"{}"), "an xz file"),
        ("x.zst", b"\x28\xb5\x2f\xfd\x20", "a zstd file"),
        ("x.xlsx", b"PK\x03\x04", "a zip file .a spreadsheet is one too"),
        ("x.arrow", b"\xff\xff\xff\xff\x10", "an Arrow file"),
        ("x.jsonl", json.dumps(CHAT).encode("utf-16"), "UTF-16 text, save it as UTF-8"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    for read in (records.conversations, records.kind):
        with pytest.raises(
            ValueError,
            match=rf"{name}: {said}.*; JSON lines, one JSON array or a table were expected$",
        ):
            read(tmp_path / name)


def test_an_object_may_stand_on_several_lines(write):
    pretty = json.dumps(CHAT, indent=2)
    for lines in ((pretty,), (CHAT, pretty), (pretty, CHAT, pretty), ("  " + pretty, "", CHAT)):
        found = records.conversations(write(*lines))
        assert found == [CHAT] * sum(map(bool, lines))
    after = pretty.count("\n") + 2
    with pytest.raises(ValueError, match=f"x.jsonl:{after}: a JSON object was expected"):
        records.conversations(write(pretty, "5"))
    for line in (json.dumps(CHAT)[:-9], json.dumps(CHAT) + "}", "Q?", pretty + " 5"):
        with pytest.raises(ValueError, match="x.jsonl:2: one JSON object per line was expected"):
            records.conversations(write(CHAT, line, CHAT))


def test_too_many_spaces_in_a_row_are_named(write):
    spaces = " " * 100_001
    joined = {"instruction": "Q?" + spaces[:60_000], "input": spaces[:60_000] + "x", "output": "A."}
    for read, line, field in (
        (
            records.conversations,
            {"messages": [Q, {**A, "content": f"a{spaces}b"}]},
            "messages: message 2: content",
        ),
        (records.conversations, {"prompt": spaces, "completion": "A."}, "prompt"),
        (records.conversations, joined, "instruction"),
        (records.rankings, {**RANKING, "responses": ["a", "b", spaces]}, "responses"),
    ):
        with pytest.raises(
            ValueError, match=f"x.jsonl:2: {field}: the text has more than 100,000 spaces in a row"
        ):
            read(write(RANKING if read is records.rankings else CHAT, line))


def test_duplicates_are_kept_and_nothing_is_changed(write):
    assert records.conversations(write(CHAT, CHAT, CHAT)) == [CHAT] * 3
    given = [copy.deepcopy(x) for x in (CHAT, RANKING)]
    # the same question, the same side
    assert records.split(given) in (([CHAT, RANKING], []), ([], [CHAT, RANKING]))
    assert given == [CHAT, RANKING]


def test_about_one_prompt_in_ten_is_held_out_and_always_the_same_ones():
    rng = random.Random(0)
    prompts = [[{"role": "user", "content": f"What is {rng.random()}?"}] for _ in range(4000)]
    assert 340 < sum(map(records.held_out, prompts)) < 460
    fixed = [records.held_out([{"role": "user", "content": f"question {i}"}]) for i in range(40)]
    assert [i for i, held in enumerate(fixed) if held] == [16, 25, 32, 33]


def test_held_out_is_the_same_for_every_record_with_the_prompt():
    """Else an answer that is held out in one file would be trained on in another."""
    sides = Counter()
    for i in range(200):
        q = {"role": "user", "content": f"question {i}"}
        kin = [
            {"messages": [q, A]},
            {"messages": [S, q, A, Q, A]},
            {"prompt": [q], "chosen": "a", "rejected": "b", "messages": "m"},
            {"messages": [{"role": "user", "content": f" question  {i}\n"}], "prompt": "another"},
            {"prompt": [S, q], "responses": ["a", "b"], "ranks": [0, 1]},
        ]
        train, held = records.split(kin)
        assert not (train and held) and train + held == kin
        sides[bool(held)] += 1
    assert 8 <= sides[True] <= 35


def test_real_files():
    if not REAL.is_dir():
        pytest.skip("needs ../shared/data")
    chats = records.conversations(REAL / "instruction-data.json")
    pairs = records.preferences(REAL / "instruction-data-with-preference.json")
    assert (len(chats), len(pairs)) == (1100, 1094)
    trained = {r["messages"][0]["content"] for r in records.split(chats)[0]}
    assert not trained & {r["prompt"][0]["content"] for r in records.split(pairs)[1]}


def test_alpacas_input_is_told_from_the_instruction(write):
    """For the one chat format that shows it apart."""
    row = {"instruction": "Sum.", "input": "1, 2", "output": "3"}
    (read,) = records.conversations(write(row))
    text = templates.text(read["messages"], format=templates.TEMPLATES["alpaca"], bos="")
    assert "paired with an input" in text and "\nSum.\n\n### Input:\n1, 2\n\n### Resp" in text
    (read,) = records.conversations(write(row | {"input": ""}))
    assert "Input" not in templates.text(read["messages"], format=templates.TEMPLATES["alpaca"])


@pytest.mark.parametrize(
    "sign",
    "[INST] [/INST] <<SYS>> <|im_end|> <|endoftext|> </s> <|eot_id|> <end_of_turn> <eos>".split()
    + ["### Response:", "### Instruction:", "\n\nAssistant:", "<｜User｜>"],
)
def test_markers_of_a_chat_format_are_counted_and_too_many_refused(write, capsys, sign):
    marked = {"messages": [Q, {**A, "content": f"A {sign} B"}]}
    few, many = write(*[CHAT] * 99, marked), write(*[CHAT] * 98, marked, marked, name="y.jsonl")
    assert len(records.conversations(few, allow_markers=False)) == 100
    said = (
        f"{few}:100: {sign.strip()!r} is a chat format's marker; of 100 records used, 1 have one in"
    )
    assert said in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"y.jsonl:99: .*of 100 records used, 2 have .* --allow-markers"
    ):
        records.conversations(many, allow_markers=False)
    assert (
        len(records.conversations(many)) == 100
        and "of 100 records used, 2" in capsys.readouterr().err
    )


def test_markers_are_found_in_every_text_of_a_record(write):
    for row in (
        {"prompt": "<|im_end|>", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a</s>", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b [INST]"},
        {"prompt": "q", "responses": ["a", "b", "### Response: c"], "ranks": [0, 1, 2]},
    ):
        with pytest.raises(ValueError, match=":1: .* a chat format's marker; of 1 records used, 1"):
            records.pairs(write(row), allow_markers=False)
    for text in ("a < b | c > d", "x[INSTANCE]", "### Responses", "<b>bold</b>", "1 <|> 2"):
        file = write({"messages": [Q, {**A, "content": text}]})
        records.conversations(file, allow_markers=False)

"""The shapes that public files come in, dirty as they are: what is trained, exactly; what is
dropped and counted; what is refused; what check finds and convert writes.
"""

import gzip
import json
import sys
from pathlib import Path

import pytest

from data import calls, check, records, rows, shapes

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
Q, A = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
S = {"role": "system", "content": "Be brief."}
MORE = [{"role": "user", "content": "More?"}, {"role": "assistant", "content": "B."}]
CHAT = {"messages": [Q, A]}


def lines(path, *found):
    path.write_text("".join(f if isinstance(f, str) else json.dumps(f) + "\n" for f in found))
    return path


def said(who, text, names=("from", "value")):
    return dict(zip(names, (who, text), strict=True))


def parts(role, *texts):
    return {"role": role, "parts": [{"text": t} for t in texts]}


def blocks(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": t} for t in texts]}


CONVERSATIONS = [  # (record, its messages)
    ({"conversations": [said("human", "Q?"), said("gpt", "A.")]}, [Q, A]),
    (
        {"conversations": [said("system", "Be brief."), said("human", "Q?"), said("gpt", "A.")]},
        [S, Q, A],
    ),
    (
        {"conversations": [said(*t, ("from", "content")) for t in (("user", "Q?"), ("gpt", "A."))]},
        [Q, A],
    ),
    ({"conversation": [Q, A]}, [Q, A]),
    ({"conversations": ["Q?", "A."], "source": "stackexchange"}, [Q, A]),
    ({"conversation": [{"input": "Q?", "output": "A."}] * 2, "source": "x"}, [Q, A, Q, A]),
    ({"question": "Q?", "answer": "A."}, [Q, A]),
    ({"query": "Q?", "response": "A.", "history": [["Q?", "A."]]}, [Q, A, Q, A]),
    ({"query": "Q?", "response": "A.", "history": [Q, A]}, [Q, A, Q, A]),
    ({"problem": "Q?", "solution": "A."}, [Q, A]),
    ({"input": "Q?", "output": "A."}, [Q, A]),
    ({"inputs": "Q?", "targets": "A."}, [Q, A]),
    ({"instruction": "Q?", "input": "", "response": "A."}, [Q, A]),
    ({"instruction": "Q?", "input": "<noinput>", "output": "A."}, [Q, A]),
    ({"system_prompt": "Be brief.", "question": "Q?", "response": "A."}, [S, Q, A]),
    ({"system": "Be brief.", "messages": [Q, A]}, [S, Q, A]),
    ({"system": [{"text": "Be brief."}], "messages": [blocks("user", "Q?"), A]}, [S, Q, A]),
    (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"text": "Q?"}]},
                {"role": "assistant", "content": [{"text": "A."}]},
            ],
        },
        [S, Q, A],
    ),
    ({"messages": [{"role": "developer", "content": "Be brief."}, Q, A]}, [S, Q, A]),
    ({"messages": [blocks("user", "Q", "?"), blocks("assistant", "A.")]}, [Q, A]),
    (
        {
            "systemInstruction": {"role": "system", **parts("system", "Be brief.")},
            "contents": [parts("user", "Q?"), parts("model", "A", ".")],
        },
        [S, Q, A],
    ),
    (
        {
            "system_instruction": {"parts": [{"text": "Be brief."}]},
            "contents": [parts("user", "Q?"), parts("model", "A.")],
        },
        [S, Q, A],
    ),
    ({"messages": [Q, {**A, "weight": 0}, *MORE]}, [Q, {**A, "weight": 0}, *MORE]),
    ({"messages": [Q, {**A, "weight": 1}], "parallel_tool_calls": False, "tools": []}, [Q, A]),
    ({"prompt": Q, "completion": A}, [Q, A]),
    ({"prompt": "\n\nHuman: Q?\n\nAssistant:", "completion": " A."}, [Q, A]),
    ({"messages": [said("human", "Q?"), {**said("gpt", "A."), "weight": None}]}, [Q, A]),
]


@pytest.mark.parametrize("record, messages", CONVERSATIONS)
def test_conversations(tmp_path, capsys, record, messages):
    """As they are, and as dirty as public files: BOM, CRLF, nulls, fields of no weight."""
    dirty = record | {"id": 7, "source": "web", "images": None, "messages_": None, "chosen": None}
    raw = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in (record, dirty)) + b"\r\n"
    for name, data in (("x.jsonl", raw), ("x.jsonl.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(data)
        found = records.conversations(tmp_path / name, allow_dropped=False)
        assert [r["messages"] for r in found] == [messages] * 2
    assert capsys.readouterr().err == ""
    pretty = lines(tmp_path / "p.json", json.dumps(dirty, indent=1))
    assert records.conversations(pretty)[0]["messages"] == messages


PAIR = {"prompt": [Q], "chosen": "good", "rejected": "bad"}
GOOD, BAD = ({"role": "assistant", "content": x} for x in ("good", "bad"))
HH = "\n\nHuman: Q?\n\nAssistant: A.\n\nHuman: More?\n\nAssistant: "
PAIRS = [  # (record, its prompt)
    ({"question": "Q?", "chosen": "good", "rejected": "bad"}, [Q]),
    ({"system": "Be brief.", "question": "Q?", "chosen": "good", "rejected": "bad"}, [S, Q]),
    (
        {"prompt": "Q?", "chosen": [S, Q, GOOD], "rejected": [S, Q, BAD], "messages": [Q, GOOD]},
        [S, Q],
    ),
    ({"prompt": "Q?", "system": "Be brief.", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, [S, Q]),
    (
        {"prompt": "More?", "chosen": [Q, A, MORE[0], GOOD], "rejected": [Q, A, MORE[0], BAD]},
        [Q, A, MORE[0]],
    ),
    ({"prompt": Q, "chosen": GOOD, "rejected": BAD}, [Q]),
    ({"chosen": [S, Q, GOOD], "rejected": [S, Q, BAD]}, [S, Q]),
    ({"chosen": HH + "good", "rejected": HH + "bad"}, [Q, A, MORE[0]]),
    ({"prompt": HH, "response": "x", "chosen": " good", "rejected": " bad"}, [Q, A, MORE[0]]),
    (
        {
            "conversations": [said("human", "Q?")],
            "chosen": said("gpt", "good"),
            "rejected": said("gpt", "bad"),
        },
        [Q],
    ),
    (
        {
            "input": {"messages": [S, Q], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [GOOD],
            "non_preferred_output": [BAD],
        },
        [S, Q],
    ),
    ({"messages": [S, Q, GOOD], "rejected_response": "bad"}, [S, Q]),
    ({"query": "Q?", "response": "good", "rejected_response": "bad"}, [Q]),
    (
        {"instruction": "Q", "input": "?", "chosen": "good", "rejected": "bad"},
        [{"role": "user", "content": "Q\n\n?"}],
    ),
]


@pytest.mark.parametrize("record, prompt", PAIRS)
def test_pairs(tmp_path, record, prompt):
    dirty = record | {"id": 7, "score_chosen": 3.0, "instruction": record.get("instruction")}
    found = records.preferences(lines(tmp_path / "x.jsonl", record, dirty), allow_dropped=False)
    assert [{k: r[k] for k in PAIR} for r in found] == [PAIR | {"prompt": prompt}] * 2


def test_tables(tmp_path):
    """Quoted commas and line ends, a pandas index, labels as words, messages as JSON."""
    table = ',question,answer,label\r\n0,"Q, ""x""\ny?",A.,\r\n1,Q?,5,False\r\n\r\n2,Q?,A.,True\r\n'
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    first = {"role": "user", "content": 'Q, "x"\ny?'}
    assert records.conversations(tmp_path / "x.csv") == [{"messages": [first, A]}, CHAT]
    (tmp_path / "x.tsv").write_text(
        f"messages\tid\n{json.dumps([Q, A])!s}\t3\n".replace('"', '""')
        .replace("\n[", '\n"[')
        .replace("]\t", ']"\t')
    )
    assert records.conversations(tmp_path / "x.tsv") == [CHAT | {"id": "3"}]
    for text, line, words in (
        ("question,answer\nQ?,A.\nQ?\n", 3, "2 cells, as many as names in line 1, were expected"),
        ('question,answer\nQ?,"A."x\n', 2, "a table's row was expected"),
        ("question;answer\nQ?;A.\n", 2, "no shape is known with the fields question;answer;"),
    ):
        with pytest.raises(ValueError, match=f"y.csv:{line}: {words}"):
            records.conversations(lines(tmp_path / "y.csv", text))


def test_parquet_names_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1\x15\x04PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="x.parquet: a Parquet file, .* pip install pyarrow$"):
        records.conversations(tmp_path / "x.parquet")


def test_a_reference_answer_stays_beside_its_prompt(tmp_path, capsys):
    """For a reader's reward; as a conversation it is the answer."""
    path = lines(tmp_path / "x.jsonl", {"question": "2+2?", "answer": "4"})
    asked = [{"role": "user", "content": "2+2?"}]
    assert records.conversations(path, "prompt") == [{"messages": asked, "answer": "4"}]
    assert capsys.readouterr().err == ""
    assert records.conversations(path)[0]["messages"][1]["content"] == "4"


# ---------------------------------------------------------------- odd records
ODD = [  # (record, the reason it is dropped for)
    ({"messages": [Q, Q, A]}, "whose roles do not alternate"),
    ({"messages": [A, Q, A]}, "whose roles do not alternate"),
    ({"messages": [Q, A, S, Q, A]}, "whose roles do not alternate"),
    ({"messages": [S]}, "whose roles do not alternate"),
    ({"conversations": []}, "with an empty turn"),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, "with an empty turn"),
    ({"messages": [Q, {"role": "assistant", "content": " "}]}, "with an empty turn"),
    ({"instruction": "Q?", "output": None}, "with an empty turn"),
    ({"messages": [Q]}, "with the user's turn last"),
    ({"messages": [Q, A, MORE[0]]}, "with the user's turn last"),
    ({"prompt": "\ud83d", "completion": "A."}, "with half a character"),
]
ODD_PAIRS = [
    (PAIR | {"rejected": [Q]}, "with the user's turn last"),
    (PAIR | {"rejected": []}, "with an empty turn"),
    (PAIR | {"chosen": None, "rejected": "b"}, "with an empty turn"),
    ({"chosen": [Q, A], "rejected": [MORE[0], A]}, "whose conversations differ before the last"),
    ({"chosen": HH + "a", "rejected": HH.replace("A.", "C.") + "b"}, "whose conversations differ"),
    (
        {"chosen": HH + "a", "rejected": HH[:-13] + "b"},
        "whose roles|turn last|conversations differ",
    ),
    (PAIR | {"rejected": "good"}, "with chosen = rejected"),
]


@pytest.mark.parametrize(
    "read, good, record, reason",
    [(records.conversations, CHAT, *odd) for odd in ODD]
    + [(records.preferences, PAIR, *odd) for odd in ODD_PAIRS],
)
def test_an_odd_record_is_dropped_and_counted(tmp_path, capsys, read, good, record, reason):
    assert read(lines(tmp_path / "x.jsonl", good, "\n", record, good, record)) == [good, good]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/x.jsonl: 2 records used, dropped 2 w")
    assert any(r in said for r in reason.split("|")) and "(first: line 3)\n" in said


def test_many_odd_records_stop_the_run(tmp_path):
    """More than 5 % and more than 10 of them; what is merely of no use does not count."""
    odd, path = {"messages": [Q, Q, A]}, tmp_path / "x.jsonl"
    for good, bad, stops in ((100, 10, False), (150, 11, True), (220, 11, False), (0, 11, True)):
        lines(path, *[CHAT] * good, *[odd] * bad)
        if stops:
            said = f"x.jsonl: 11 of {good + bad} records would be dropped: 11 whose roles do not "
            with pytest.raises(ValueError, match=f"{said}.*line {good + 1}.; --allow-dropped goes"):
                records.conversations(path, allow_dropped=False)
        else:
            assert len(records.conversations(path, allow_dropped=False)) == good
    assert len(records.conversations(lines(path, CHAT, *[odd] * 30))) == 1, "tools read on"
    same = [PAIR | {"rejected": "good"}] * 30
    assert records.pairs(lines(path, PAIR, *same), allow_dropped=False) == [PAIR]


# ---------------------------------------------------------------- tool calls
F = {"name": "f", "arguments": {"x": 1}}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": F}]}
RESULT = {"role": "tool", "content": "9"}
TOOL = {"type": "function", "function": {"name": "f"}}


def written(record, **changes):
    """A record's call with another text of its fields."""
    call = {"id": "1", "type": "function", "function": F | changes}
    return {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [call]}]} | record


def test_tool_calls_are_read_in_openai_s_shape(tmp_path):
    """Arguments as an object or as JSON, tools as a list or as JSON; they lie in the first message.
    Only a reader whose chat format writes them has them.
    """
    path, named = tmp_path / "x.jsonl", {"id": "1", **CALL["tool_calls"][0]}
    asked, called = Q | {"tools": [TOOL]}, CALL | {"tool_calls": [named]}
    for tools in ([TOOL], json.dumps([TOOL])):
        rows = [written({"tools": tools}, arguments=a) for a in ({"x": 1}, '{"x": 1}')]
        found = records.conversations(lines(path, *rows), written=calls.KINDS)
        assert found == [{"messages": [asked, called]}] * 2
        with pytest.raises(ValueError, match="x.jsonl:1: tools: the chat format writes no tool"):
            records.conversations(path, written=("tool_calls", "tool"))
    for arguments in ("", None, {}):
        (read,) = records.conversations(
            lines(path, written({}, arguments=arguments)), written=calls.KINDS
        )
        assert read["messages"][1]["tool_calls"][0]["function"]["arguments"] == {}
    more = [Q, CALL, {**RESULT, "tool_call_id": "1", "name": "f"}, RESULT, A]
    nothing = dict(tool_calls=None, tools=None, weight=None)
    chat = {"messages": [{**m, **nothing} | m for m in more], "tools": "[]"}
    (read,) = records.conversations(lines(path, chat), allow_dropped=False, written=calls.KINDS)
    assert read == {"messages": more}
    with pytest.raises(ValueError, match="dropped: 1 whose roles do not alternate"):
        records.conversations(lines(path, {"messages": [Q, CALL, A]}), written=calls.KINDS)


@pytest.mark.parametrize(
    "record, said",
    [
        (written({}, name=""), "messages: message 2: tool_calls: a function's name was expected"),
        (written({}, arguments="{"), "messages: message 2: tool_calls: arguments: an object or"),
        (written({}, arguments=[1]), "messages: message 2: tool_calls: arguments: an object or"),
        (written({"tools": "x"}), "tools: a list of objects was expected .got 'x'"),
        ({"prompt": "Q?", "completion": [CALL]}, "completion: the last message: tool_calls: an"),
    ],
)
def test_calls_of_another_shape_are_refused(tmp_path, record, said):
    with pytest.raises(ValueError, match=f"x.jsonl:1: {said}"):
        records.conversations(lines(tmp_path / "x.jsonl", record), written=calls.KINDS)


def test_an_answer_to_compare_is_a_text(tmp_path):
    path = lines(tmp_path / "x.jsonl", {"prompt": [Q], "chosen": [CALL], "rejected": "b"})
    with pytest.raises(ValueError, match="x.jsonl:1: chosen: the last message: tool_calls: an ans"):
        records.pairs(path, written=calls.KINDS)
    with pytest.raises(ValueError, match="x.jsonl:1: messages: the last message: tool_calls: an"):
        records.labelled(lines(path, {"messages": [Q, CALL], "label": True}), written=calls.KINDS)
    asked = {"prompt": [Q, CALL, RESULT], "tools": [TOOL], "chosen": "a", "rejected": "b"}
    (pair,) = records.pairs(lines(path, asked), written=calls.KINDS)
    assert pair["prompt"] == [Q | {"tools": [TOOL]}, CALL, RESULT]
    (prompt,) = records.conversations(
        lines(path, {"messages": [Q, CALL, RESULT]}), "prompt", written=calls.KINDS
    )
    assert prompt == {"messages": [Q, CALL, RESULT]}


def test_check_and_convert_keep_tool_calls(tmp_path, monkeypatch, capsys):
    one, other = written({"tools": [TOOL]}), written({"tools": [TOOL]}, arguments={"x": 2})
    path, out = lines(tmp_path / "x.jsonl", one, other, CHAT), tmp_path / "out.jsonl"
    said = run(monkeypatch, capsys, "check", path)[1]
    assert "tool calls  2 have some (first: line 1); --model's chat template writes none" in said
    assert "duplicates  exact: none" in said and "left out" not in said
    before = records.conversations(path, written=calls.KINDS)
    for to in ("ours", "openai"):
        assert run(monkeypatch, capsys, "convert", path, out, "--to", to)[0] == 0
        assert records.conversations(out, written=calls.KINDS) == before
        assert json.loads(out.read_text().splitlines()[0])["tools"] == [TOOL]
    first = json.loads(out.read_text().splitlines()[0])["messages"][1]
    assert first["tool_calls"][0]["function"]["arguments"] == '{"x": 1}'
    _, _, err = run(monkeypatch, capsys, "convert", path, out, "--to", "gemini")
    assert "record 1: tool calls are written by --to openai" in err


# ---------------------------------------------------------------- refused
REFUSED = [  # (lines, what the one line says)
    (
        [{"messages": [Q, CALL | {"content": "Let me look."}]}],
        "1: messages: message 2: tool_calls: the chat format writes no",
    ),
    (
        [{"messages": [Q, {"role": "function", "content": "9"}, A]}],
        "1: messages: message 2: role: tool calls are read as OpenAI writes them",
    ),
    (
        [{"conversations": [said("human", "Q?"), said("function_call", "f()")]}],
        "1: conversations: message 2: role: tool calls are read as",
    ),
    (
        [{"conversations": [said("human", "Q?"), said("bot", "A.")]}],
        "1: conversations: message 2: role: one of system",
    ),
    (
        [{"conversations": [said("human", 5), said("gpt", "A.")]}],
        "1: conversations: message 1: content: a string",
    ),
    ([CHAT | {"tools": [{"name": "f"}]}], "1: tools: the chat format writes no tool calls"),
    ([CHAT | {"images": ["a.jpg"]}], "1: images: text alone is read here"),
    (
        [{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]}],
        "1: messages: message 1: content: text alone is read here .got a part 'image_url'",
    ),
    (
        [{"messages": [Q, {"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]}],
        "1: messages: message 2: content: tool calls are read as",
    ),
    (
        [{"messages": [Q, {"role": "assistant", "content": [{"toolUse": {"name": "f"}}]}]}],
        "1: messages: message 2: content: tool calls are read as",
    ),
    (
        [{"messages": [{"role": "user", "content": [{"image": {"format": "png"}}]}, A]}],
        "1: messages: message 1: content: text alone",
    ),
    ([{"messages": "Q? A."}], "1: messages: a list of messages was expected .got 'Q"),
    (
        [
            {
                "contents": [
                    parts("user", "Q?"),
                    {"role": "model", "parts": [{"functionCall": {"name": "f"}}]},
                ]
            }
        ],
        "1: contents: message 2: content: tool calls are read as",
    ),
    (
        [{"contents": [{"role": "user", "parts": [{"inlineData": {"data": "x"}}]}]}],
        "1: contents: message 1: content: text alone",
    ),
    (
        [
            {
                "contents": [
                    parts("user", "Q?"),
                    {"role": "model", "parts": [{"text": "x", "thought": True}]},
                ]
            }
        ],
        "1: contents: message 2: content: no chat format here writes what is thought",
    ),
    (
        [{"messages": [Q, {**A, "reasoning_content": "hm"}]}],
        "1: messages: message 2: reasoning_content: no",
    ),
    (
        [CHAT, {"title": "a", "body": "b"}],
        "2: no shape is known with the fields body, title; known are",
    ),
    ([{"data": [CHAT]}], "1: no shape is known with the fields data; known are"),
    (
        [CHAT, {"prompt": "Q?", "chosen": "a", "rejected": "b"}],
        "2: a conversation was expected, this is a preference pair",
    ),
    (
        [CHAT | {"chosen": "x"}],
        "1: a conversation was expected, this is a preference pair",
    ),
    ([CHAT, {"text": "once"}], "2: a conversation was expected, this is a text"),
    (
        [CHAT, {"prompt": "Q?", "responses": ["a", "b"], "ranks": [0, 1]}],
        "2: a conversation was .* ranking",
    ),
    ([CHAT, {"chosen": "x"}], "2: a conversation was expected, this is a preference pair"),
    (
        [{"question": "Q?"}],
        "1: completion: a string or a list of messages was expected .got nothing",
    ),
    (
        [{"question": "Q?", "answer": 4}],
        "1: answer: a string or a list of messages was expected .got 4",
    ),
    (
        [{"question": "Q?", "context": "c", "answer": "A."}],
        "1: context: it goes into the prompt beside",
    ),
    (
        [{"query": "Q?", "choices": ["a"], "gold": 0}],
        "1: completion: a string .* expected .got nothing",
    ),
    ([CHAT | {"system": 3}], "1: system: a string was expected .got 3"),
    (
        [{"messages": [Q, {**A, "weight": 0.5}]}],
        "1: messages: message 2: weight: 0 or 1 was expected",
    ),
    ([CHAT, '{"messages": [\n'], "2: one JSON object per line was expected"),
    ([CHAT, "5\n"], "2: a JSON object was expected .got 5"),
    ([CHAT, "null\n"], "2: a JSON object was expected .got nothing"),
    ([CHAT, '"Q?"\n'], "2: a JSON object was expected"),
    (["[\n", CHAT, ",5]"], "3: a JSON object was expected .got 5"),
    (["[\n", CHAT], "3: a comma or the array's end was expected"),
    (["<html>\n"], "1: one JSON object per line was expected"),
    (["PK\x03\x04"], " a zip file"),
    ([""], " no usable records in it"),
    (["[]"], " no usable records in it"),
    (
        [{"messages": [Q, Q, A]}] * 3,
        " no usable records in it .dropped: 3 whose roles do not alternate",
    ),
    (
        [{"prompt": "Q?", "completion": "5", "label": False}],
        " no usable .*dropped: 1 with label false",
    ),
]


@pytest.mark.parametrize("found, words", REFUSED)
def test_a_file_that_is_refused_in_one_line(tmp_path, found, words):
    path = lines(tmp_path / "x.jsonl", *found)
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.jsonl:{words}") as e:
        records.conversations(path, allow_dropped=False)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def test_a_text_that_is_part_of_something_else_is_not_trained_whole(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    corpus = {"text": "Once.", "id": 1, "url": "x", "score": 0.5, "label": None, "role": None}
    assert records.texts(lines(path, corpus)) == ["Once."]
    assert "fields not used: score (1)" in capsys.readouterr().err
    for name, value in (("role", "prompter"), ("code", "f()"), ("summary", "s"), ("answer", "a")):
        with pytest.raises(ValueError, match=f"x.jsonl:1: {name}: a text that is trained whole"):
            records.texts(lines(path, {"text": "Once.", name: value}))


def test_a_line_in_the_table_adds_a_shape(tmp_path, monkeypatch):
    path = lines(tmp_path / "x.jsonl", {"ask": "Q?", "reply": "A."})
    with pytest.raises(ValueError, match="no shape is known with the fields ask, reply"):
        records.conversations(path)
    row = ("conversation", "ask reply", "prompt completion")
    monkeypatch.setattr(shapes, "SHAPES", [*shapes.SHAPES, row])
    shapes._match.cache_clear()
    assert records.conversations(path) == [CHAT]
    shapes._match.cache_clear()


def test_labelled_answers(tmp_path):
    """Of pairs both, of rankings the best and the worst, what was sampled with them."""
    ranked = {"prompt": [Q], "responses": ["a", "b", "c"], "ranks": [1, 0, 2]}
    sampled = {"finished": [True, True, False], "ids": [[1], [2], [3]], "tokenizer": "t"}
    path = lines(
        tmp_path / "x.jsonl",
        {"prompt": "Q?", "completion": "5", "label": False, "id": 3},
        CHAT | {"kto_tag": True},
        PAIR,
        ranked | sampled,
    )
    found = records.labelled(path)
    answers = [(r["messages"][-1]["content"], r["label"]) for r in found]
    good, bad = [("A.", True), ("good", True), ("b", True)], [("5", False), ("bad", False)]
    assert answers == [bad[0], good[0], good[1], bad[1], good[2], ("c", False)]
    assert all(r["messages"][:-1] == [Q] for r in found) and found[0]["id"] == 3
    assert (found[5]["ids"], found[5]["finished"], found[5]["tokenizer"]) == ([[3]], [False], "t")
    with pytest.raises(ValueError, match="x.jsonl:1: label: true or false was expected beside"):
        records.labelled(lines(path, CHAT))


# ---------------------------------------------------------------- check and convert
def run(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["records", *map(str, argv)])
    with pytest.raises(SystemExit) as e:
        check.main()
    return e.value.code, *capsys.readouterr()


def test_check_finds_what_was_planted(tmp_path, monkeypatch, capsys):
    chats = [{"messages": [{"role": "user", "content": f"Question {i}?"}, A]} for i in range(40)]
    again = {"messages": [{"role": "user", "content": "question 3 "}, {**A, "content": "a!"}]}
    planted = [chats[5], again, {"question": "Else?", "answer": "A.</s>"}, {"messages": [Q, Q, A]}]
    one = lines(tmp_path / "a.jsonl", *chats, *planted, {"foo": 1}, CHAT | {"mood": "glad"})
    pairs = [
        {"prompt": f"Question {i + 39}?", "chosen": "long " * 9, "rejected": "no"} for i in range(9)
    ]
    two = lines(tmp_path / "b.jsonl", *pairs, PAIR | {"rejected": "good"})
    status, out, _ = run(monkeypatch, capsys, "check", one, two)
    assert status == 2, "a record cannot be read"
    for said in (
        "a.jsonl: 44 records read",
        "shape       43 conversation: messages",
        "shape       1 conversation: question answer",
        "left out    1 whose roles do not alternate (first: line 44)",
        "left out    1 that cannot be read (first: line 45; line 45: no shape is known",
        "not used    field 'mood' of 1",
        "markers     1 have a chat format's in their text (first: line 43, '</s>')",
        "duplicates  exact: 1 (first: line 41, as line 6)",
        "duplicates  of the same words: 1 (first: line 42, as line 4)",
        "turns       least 2, median 2, 90 % 2",
        "b.jsonl: 9 records read",
        "left out    1 with chosen = rejected (first: line 10)",
        "chosen is the longer one in 100%",
        f"leakage     1 prompts of {two} stand in {one} (first: line 1, there line 40)",
    ):
        assert said in out
    assert run(monkeypatch, capsys, "check", two)[0] == 0
    status, out, _ = run(monkeypatch, capsys, "check", lines(tmp_path / "c.jsonl", CHAT, "{"))
    assert status == 2 and "c.jsonl:2: one JSON object per line was expected" in out


@pytest.mark.parametrize("to", ["ours", "openai", "gemini", "bedrock", "anthropic"])
def test_there_and_back(tmp_path, monkeypatch, capsys, to):
    chats = [CHAT, {"messages": [S, Q, A, *MORE]}]
    weighed = [{"messages": [Q, {**A, "weight": 0}, *MORE]}] if to in ("ours", "openai") else []
    path, out = lines(tmp_path / "x.jsonl", *chats, *weighed), tmp_path / "out.jsonl"
    assert run(monkeypatch, capsys, "convert", path, out, "--to", to)[0] == 0
    assert records.conversations(out) == records.conversations(path) == chats + weighed
    if to in ("ours", "openai"):
        path = lines(tmp_path / "p.jsonl", PAIR)
        assert run(monkeypatch, capsys, "convert", path, out, "--to", to)[0] == 0
        assert records.pairs(out) == [PAIR]


def test_convert_keeps_labels_and_refuses_what_a_format_cannot_say(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    kto = lines(tmp_path / "k.jsonl", {"prompt": "Q?", "completion": "5", "label": False})
    assert run(monkeypatch, capsys, "convert", kto, out) == (0, "", "")
    assert records.labelled(out) == records.labelled(kto)
    weighed = lines(tmp_path / "w.jsonl", {"messages": [Q, {**A, "weight": 0}, *MORE]})
    pair = lines(tmp_path / "p.jsonl", PAIR)
    before = out.read_bytes()
    for path, to, words in (
        (weighed, "gemini", "record 1: this format has no turn that is not trained"),
        (pair, "bedrock", "record 1: this format has conversations alone"),
        (lines(tmp_path / "t.jsonl", {"text": "a"}), "prompts", "these are texts"),
        (out, "ours", "another file than"),
    ):
        status, _, err = run(monkeypatch, capsys, "convert", path, out, "--to", to)
        assert status == 2 and words in err.splitlines()[-1] and out.read_bytes() == before


def test_prompts_alone(tmp_path, monkeypatch, capsys):
    """Of conversations, pairs and files of prompts, each once."""
    out = tmp_path / "out.jsonl"
    for found in ([CHAT, CHAT, {"messages": [Q]}], [PAIR], [{"prompt": "Q?"}]):
        path = lines(tmp_path / "x.jsonl", *found)
        assert run(monkeypatch, capsys, "convert", path, out, "--to", "prompts")[0] == 0
        assert records.conversations(out, "prompt") == [{"messages": [Q]}]


def test_public_files():
    if not REAL.is_dir():
        pytest.skip("needs ../shared/data")
    expected = {  # cases/README.md
        "alpaca.csv": 'Say "hi", please',
        "dolly.jsonl": "Which city is named?\n\nI live in Lima.",
        "weight.jsonl": "What is 2+2?",
        "pretty_sharegpt.json": "Hi?",
        "last_turn_is_the_users.jsonl": "Hi?",
        "wide_characters.jsonl": "¿Qué tal?",
    }
    for name, opening in expected.items():
        (found,) = records.conversations(REAL / "cases" / name)
        assert records.opening(found["messages"]) == opening
    for name in ("hh_text", "orca_pair", "ultrafeedback_pair"):
        (found,) = records.preferences(REAL / "cases" / f"{name}.jsonl")
        assert found["prompt"][-1]["content"] == "What is 2+2?"
        assert (found["chosen"], found["rejected"]) == ("4", "5")
    for name in ("tool_calls", "image", "kto"):
        with pytest.raises(ValueError, match=f"{name}.jsonl"):
            records.conversations(REAL / "cases" / f"{name}.jsonl")
    hh = records.pairs(REAL / "harmless-base_test.jsonl.gz", allow_dropped=False)
    assert len(hh) == 2299 and sum(1 for _ in rows.read(REAL / "HumanEval.jsonl.gz")) == 164


def test_check_says_what_stops_a_stage(tmp_path, monkeypatch, capsys):
    marked = {"question": "[INST] Q? [/INST]", "answer": "A."}
    odd = [{"messages": [Q, Q, A]}] * 11
    for name, found, words in (
        ("marked", [CHAT] * 20 + [marked], "1 have one in their text"),
        ("odd", [CHAT] * 50 + odd, "11 of 61 records would be dropped"),
        ("mixed", [CHAT, PAIR], "a conversation was expected, this is a preference pair"),
        ("empty", [], "no usable records"),
    ):
        code, said, _ = run(monkeypatch, capsys, "check", lines(tmp_path / f"{name}.jsonl", *found))
        assert code == 2 and words in said.partition("refused ")[2], said
    fine = lines(tmp_path / "fine.jsonl", *[CHAT] * 20, {"messages": [Q, Q, A]})
    code, said, errors = run(monkeypatch, capsys, "check", fine)
    assert code == 0 and "refused" not in said and not errors


def test_plain_text_is_checked_and_converted(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "t.txt", tmp_path / "t.jsonl"
    text.write_text("Once.\nTwice.")
    code, said, _ = run(monkeypatch, capsys, "check", text)
    assert code == 0 and "1 records read" in said
    assert run(monkeypatch, capsys, "convert", text, out)[0] == 0
    assert records.texts(out) == records.texts(text) == ["Once.\nTwice."]


def test_a_text_is_converted_and_out_is_a_file_of_json_lines(tmp_path, monkeypatch, capsys):
    text, out = lines(tmp_path / "t.jsonl", {"text": "Once."}), tmp_path / "out.jsonl"
    assert run(monkeypatch, capsys, "convert", text, out)[0] == 0
    assert records.texts(out) == ["Once."]
    for name, words in (
        ("a.csv", "JSON lines"),
        ("no/x.jsonl", "that exists"),
        (".", "that exists"),
    ):
        code, _, said = run(monkeypatch, capsys, "convert", text, tmp_path / name)
        assert code == 2 and words in said and "Errno" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "t.jsonl"]


@pytest.mark.parametrize("good, bad", [(1, -1), ("good", "bad"), ("desirable", "undesirable")])
def test_a_bad_answer_is_bad_in_every_spelling(tmp_path, good, bad):
    asked = {"prompt": "Q?", "completion": "5"}
    path = lines(tmp_path / "k.jsonl", asked | {"label": good}, asked | {"label": bad})
    assert [r["label"] for r in records.labelled(path)] == [True, False]
    assert len(records.conversations(path)) == 1
    unknown = lines(tmp_path / "u.jsonl", asked | {"label": "meh"})
    with pytest.raises(ValueError, match="true or false was expected .*got 'meh'"):
        records.labelled(unknown)


def test_a_question_beside_an_instruction_is_not_lost(tmp_path):
    both = {"instruction": "Be brief.", "question": "Where is Rome?", "answer": "In Italy."}
    with pytest.raises(ValueError, match="question: it stands beside `instruction`"):
        records.conversations(lines(tmp_path / "q.jsonl", both))

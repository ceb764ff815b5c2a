"""Records: each format read, each malformed line named by file and line, what is of no use counted, held-out decided once."""
import copy
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from data import records

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
        path.write_bytes("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines).encode() + b"\n")
        return path
    return write


@pytest.mark.parametrize("line, messages, extra", [
    (CHAT, [Q, A], {}),
    ({"messages": [S, Q, A, Q, A], "item": {"kind": "chat"}, "prompt": "p", "n": None}, [S, Q, A, Q, A],
     {"item": {"kind": "chat"}, "prompt": "p", "n": None}),
    ({"messages": [{**Q, "name": "Eve"}, A]}, [Q, A], {}),
    ({"instruction": "Q?", "input": "", "output": "A.", "source": "s"}, [Q, A], {"source": "s"}),
    ({"instruction": "Q?", "output": "A."}, [Q, A], {}),
    ({"instruction": "Q?", "input": "more", "output": "A."}, [{"role": "user", "content": "Q?\n\nmore"}, A], {}),
    ({"prompt": "Q?", "completion": "A.", "id": 7}, [Q, A], {"id": 7}),
    ({"prompt": [S, Q], "completion": [A]}, [S, Q, A], {}),
])
def test_conversations_in_each_format(write, line, messages, extra):
    for path in (write(line), write(f"[{json.dumps(line)}]", name="x.json")):
        assert records.conversations(path) == [{"messages": messages, **extra}]


@pytest.mark.parametrize("line", [{"messages": [Q]}, {"instruction": "Q?"}, {"instruction": "Q?", "input": "", "output": ""},
                                  {"prompt": "Q?"}, {"prompt": [Q]}])
def test_prompts_in_each_format(write, line):
    assert records.conversations(write(line), need="prompt") == [{"messages": [Q]}]


@pytest.mark.parametrize("line, extra", [
    (PAIR, {}),
    ({"prompt": "Q?", "chosen": "good", "rejected": "bad", "item": 1}, {"item": 1}),
    ({"prompt": [Q], "chosen": [GOOD], "rejected": [WORSE]}, {}),
    ({"prompt": "Q?", "chosen": [Q, GOOD], "rejected": [Q, WORSE]}, {}),
    ({"chosen": [Q, GOOD], "rejected": [Q, WORSE]}, {}),
    ({"instruction": "Q?", "input": "", "output": "o", "chosen": "good", "rejected": "bad", "prompt": "p"}, {"output": "o"}),
])
def test_preference_pairs_in_each_format(write, line, extra):
    assert records.preferences(write(line)) == [{**PAIR, **extra}]
    assert records.rankings(write(line)) == [{"prompt": [Q], "responses": ["good", "bad"], "ranks": [0, 1], **extra}]
    assert records.pairs(write(line)) == records.pairs(write(line), "best_worst") == [{**PAIR, **extra}]


def test_rankings_and_their_pairs(write):
    line = {**RANKING, "responses": ["a", "b", "c", "", "d"], "ranks": [1, 0, 1, -1, 2], "item": 1}
    path = write(line, {**RANKING, "prompt": "Q?"})
    assert records.rankings(path) == [line, RANKING]

    def got(which):
        return [(p["chosen"], p["rejected"]) for p in records.pairs(path, which)]
    assert Counter(got("all")) == Counter([("b", "a"), ("b", "c"), ("b", "d"), ("a", "d"), ("c", "d"), ("b", "a"), ("b", "c")])
    assert got("best_worst") == [("b", "d"), ("b", "a")]
    assert records.pairs(path)[0] == {"prompt": [Q], "chosen": "b", "rejected": "a", "item": 1}
    with pytest.raises(ValueError, match="which: .* expected .got 'best'"):
        records.pairs(path, "best")


def test_an_empty_answer_that_was_ranked_stays(write):
    assert records.pairs(write({"prompt": "Q?", "responses": ["a", ""], "ranks": [0, 1]}))[0]["rejected"] == ""


BAD = [  # (line, what the error says after file:line), read as conversations
    ("{", "one JSON object a line was expected"),
    ('{"messages": [}', "one JSON object a line was expected"),
    ("[" * 100_000, "one JSON object a line was expected"),
    ("7", r"a JSON object was expected \(got 7\)"),
    ('"Q"', "a JSON object was expected"),
    ({}, r"messages, instruction, prompt, chosen or responses was expected among the fields \(got none\)"),
    ({"text": "Q?", "conversations": []}, r"messages, .* was expected among the fields \(got conversations, text\)"),
    ({"messages": None}, r"messages: a list of messages was expected \(got nothing\)"),
    ({"messages": {"role": "user"}}, "messages: a list of messages was expected"),
    ({"messages": []}, r"messages: a list of messages was expected \(got \[\]\)"),
    ({"messages": ["Q?", "A."]}, 'messages: message 1: an object with "role" and "content" was expected'),
    ({"messages": [{"from": "human", "value": "Q?"}, A]}, r"messages: message 1: role: one of system, .* was expected \(got nothing"),
    ({"messages": [Q, {"role": "bot", "content": "A."}]}, r"messages: message 2: role: .* was expected \(got 'bot'\)"),
    ({"messages": [Q, {"role": "assistant", "content": None}]}, "messages: message 2: content: a string was expected"),
    ({"messages": [Q, {"role": "assistant", "content": [{"type": "text"}]}]}, "messages: message 2: content: a string was expected"),
    ({"messages": [Q, Q, A]}, r"messages: message 2: role: assistant was expected here.*\(got user\)"),
    ({"messages": [A, Q, A]}, "messages: message 1: role: user was expected here"),
    ({"messages": [Q, A, S, A]}, r"messages: message 3: role: user was expected here.*\(got system\)"),
    ({"messages": [Q]}, r"messages: assistant was expected as the last turn \(got user\)"),
    ('{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "A."}]}',
     r"messages: message 1: content: Unicode text was expected \(got half a character, \\ud83d\)"),
    ({"instruction": None, "output": "A."}, r"instruction: a string was expected \(got nothing\)"),
    ({"instruction": ["Q?"], "output": "A."}, "instruction: a string was expected"),
    ({"instruction": "Q?", "input": 3, "output": "A."}, r"input: a string was expected \(got 3\)"),
    ({"instruction": "Q?", "input": ""}, r"output: a string or a list of messages was expected \(got nothing\)"),
    ({"instruction": "Q?", "output": 42}, r"output: .* was expected \(got 42\)"),
    ({"prompt": "Q?"}, r"completion: .* was expected \(got nothing\)"),
    ({"completion": "A."}, r"prompt: a string or a list of messages was expected \(got nothing\)"),
    ({"prompt": [Q, A], "completion": "A."}, "prompt: messages that end in a user's turn were expected"),
    (PAIR, "a conversation was expected, this is a preference pair: reward.py and dpo.py read those"),
    (RANKING, "a conversation was expected, this is a ranking: reward.py and dpo.py read those"),
]
BAD_RANKINGS = [  # read as rankings, which pairs may be too
    (CHAT, r"a ranking or preference pair was expected, this is a conversation: sft.py"),
    ({**PAIR, "prompt": 5}, r"prompt: a string or a list of messages was expected \(got 5\)"),
    ({**PAIR, "prompt": [Q, A]}, r"prompt: messages that end in a user's turn were expected \(got assistant\)"),
    ({**PAIR, "prompt": [S]}, "prompt: message 2: a user's turn was expected"),
    ({"prompt": "Q?", "chosen": "good"}, r"rejected: a string or a list of messages was expected \(got nothing\)"),
    ({"prompt": "Q?", "rejected": "bad"}, r"chosen: a string or a list of messages was expected \(got nothing\)"),
    ({"chosen": "Human: Q? good", "rejected": "Human: Q? bad"}, r"prompt: .* was expected \(got nothing\)"),
    ({**PAIR, "chosen": 1}, r"chosen: .* was expected \(got 1\)"),
    ({**PAIR, "rejected": [Q]}, r"rejected: the last message: assistant was expected \(got user\)"),
    ({**PAIR, "rejected": []}, r"rejected: a list of messages was expected"),
    ({**PAIR, "chosen": [{"role": "assistant"}]}, r"chosen: message 1: content: a string was expected"),
    ({"chosen": [Q, A], "rejected": [{"role": "user", "content": "other"}, A]}, "rejected: the prompt's messages and then the answer"),
    ({"chosen": [A], "rejected": [A]}, "chosen: message 1: role: user was expected here"),
    ({**RANKING, "responses": "abc"}, "responses: a list of 2 or more strings was expected"),
    ({**RANKING, "responses": ["a"], "ranks": [0]}, "responses: a list of 2 or more strings was expected"),
    ({**RANKING, "responses": ["a", "b", 3]}, r"responses: .* was expected \(got 3\)"),
    ({"prompt": [Q], "responses": ["a", "b"]}, r"ranks: 2 integers, as many as responses, were expected \(got nothing\)"),
    ({**RANKING, "ranks": [0, 1]}, "ranks: 3 integers, as many as responses, were expected"),
    ({**RANKING, "ranks": [0, 1, 1.5]}, r"ranks: integers from 0, .* were expected \(got 1.5\)"),
    ({**RANKING, "ranks": [0, 1, True]}, r"ranks: integers from 0, .* were expected \(got True\)"),
    ({**RANKING, "ranks": [0, 1, -2]}, r"ranks: integers from 0, .* were expected \(got -2\)"),
    ({**RANKING, "ranks": [0, 1, None]}, r"ranks: integers from 0, .* were expected \(got nothing\)"),
]


@pytest.mark.parametrize("read, good, line, said", [(records.conversations, CHAT, *b) for b in BAD]
                         + [(records.rankings, RANKING, *b) for b in BAD_RANKINGS])
def test_a_malformed_line_is_named(write, read, good, line, said):
    path = write(good, "", good, line, good)
    with pytest.raises(ValueError, match=rf"^.*/x\.jsonl:4: {said}") as e:
        read(path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_in_an_array_the_line_is_where_the_record_begins(write):
    good = json.dumps(CHAT, indent=2)
    lines = good.count("\n") + 1
    for text, said in (('{"messages": 5}', "messages: a list of messages was expected"), ("5", "a JSON object was expected"),
                       ('{"messages" 5}', "a JSON object was expected")):
        with pytest.raises(ValueError, match=rf"x\.json:{2 + 2 * lines}: {said}"):
            records.conversations(write(f"[\n{good},\n{good},\n{text}\n]", name="x.json"))
    comma = "a comma or the array's end was expected"
    for text, said in ((f"[{good}\n{good}]", comma), (f"[{good}", comma), (f"[{good}]\n{good}", "nothing was expected after the array")):
        with pytest.raises(ValueError, match=rf"x\.json:\d+: {said}"):
            records.conversations(write(text, name="x.json"))
    assert len(records.conversations(write(f"  [\n{good} ,\n\n{good}\n]\n\n", name="x.json"))) == 2


def test_prompts_refuse_an_answer_and_pairs_refuse_rankings(write):
    for line in (CHAT, {"instruction": "Q?", "output": "A."}, {"prompt": "Q?", "completion": "A."}):
        with pytest.raises(ValueError, match=r"x.jsonl:1: messages: user was expected as the last turn \(got assistant\)"):
            records.conversations(write(line), need="prompt")
    with pytest.raises(ValueError, match="x.jsonl:1: a preference pair was expected, this is a ranking"):
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
    blank = [{"messages": [Q, {"role": "assistant", "content": " \n"}]}, {"instruction": " ", "output": "A."},
             {"instruction": "Q?", "output": ""}]
    assert records.conversations(write(CHAT, *blank, CHAT)) == [CHAT, CHAT]
    assert capsys.readouterr().err.endswith("x.jsonl: 2 records used, dropped 3 with an empty turn\n")
    same = {**PAIR, "rejected": "good"}
    assert records.preferences(write(PAIR, same, same, {**PAIR, "chosen": ""}, {**PAIR, "rejected": " "}, {**PAIR, "prompt": ""})) == [PAIR]
    assert capsys.readouterr().err.endswith("x.jsonl: 1 records used, dropped 2 with chosen = rejected, 3 with an empty turn\n")
    tied = [{**RANKING, "ranks": r} for r in ([1, 1, 1], [-1, -1, -1], [2, -1, -1], [0, 0, -1])]
    assert records.rankings(write(RANKING, *tied, same)) == [RANKING]
    assert capsys.readouterr().err.count("\n") == 1
    assert len(records.pairs(write({**RANKING, "responses": ["a", "a", "b"], "ranks": [0, 1, 2]}))) == 2
    assert "2 pairs used, dropped 1 with chosen = rejected" in capsys.readouterr().err
    records.conversations(write(CHAT))
    assert capsys.readouterr().err == ""


def test_a_file_with_nothing_usable_is_refused(write):
    with pytest.raises(ValueError, match="x.jsonl: no usable records in it$"):
        records.conversations(write(""))
    with pytest.raises(ValueError, match=r"x.json: no usable records in it$"):
        records.conversations(write("[]", name="x.json"))
    with pytest.raises(ValueError, match=r"no usable records in it \(dropped: 2 with chosen = rejected\)"):
        records.preferences(write(*[{**PAIR, "rejected": "good"}] * 2))


def test_duplicates_are_kept_and_nothing_is_changed(write):
    assert records.conversations(write(CHAT, CHAT, CHAT)) == [CHAT] * 3
    given = [copy.deepcopy(x) for x in (CHAT, RANKING)]
    assert records.split(given) in (([CHAT, RANKING], []), ([], [CHAT, RANKING]))      # the same question, the same side
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
        kin = [{"messages": [q, A]}, {"messages": [S, q, A, Q, A]}, {"prompt": [q], "chosen": "a", "rejected": "b", "messages": "m"},
               {"messages": [{"role": "user", "content": f" question  {i}\n"}], "prompt": "another"},
               {"prompt": [S, q], "responses": ["a", "b"], "ranks": [0, 1]}]
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

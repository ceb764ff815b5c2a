"""Chat templates: Hugging Face's text byte for byte, exactly the trained ids, prompts as prefixes,
roles checked.
"""

import copy
import json
import random
import re
import sys
import warnings
from pathlib import Path

import pytest

from data import templates
from data.templates import TEMPLATES, render
from data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
RENDERED, CHATS = (
    json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("rendered", "chats")
)


def load(kind="gpt2_kind"):
    return Tokenizer.load(GOLDEN / kind)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("text", [" Lima.\n", "\tLima.", "", " ", "\n\nLima. "])
def test_an_answer_is_what_was_said_with_the_spaces_around_it(text):
    tok, asked = load(), [user("Peru? ")]
    ids, labels = render(tok, [*asked, assistant(text)])
    prompt, answer = templates.answer_ids(tok, asked, text)
    assert (
        answer == [i for i in labels if i != -100]
        and ids[: len(prompt + answer)] == prompt + answer
    )
    assert tok.decode(answer[:-1]) == text


@pytest.mark.parametrize("name", [*TEMPLATES])
def test_text_equals_apply_chat_template(name):
    """For every jinja text in the table, and for the one that SmolLM2 brings, written by
    transformers.
    """
    f = TEMPLATES[name]
    assert {jinja for jinja, *_ in RENDERED[name]} >= {f.jinja, *f.known}
    for jinja, chat, whole, prompt in RENDERED[name]:
        t = load()
        t.chat_template = jinja
        assert templates.of(t) is f
        named = dict(format=f, bos=t.bos, eos=t.eos)
        if whole is None:  # transformers' exception, from the template
            with pytest.raises(ValueError, match=f"{name} has no system message; put it into"):
                templates.text(chat, **named)
            continue
        assert templates.text(chat, **named) == whole
        assert templates.text(chat[:-1], add_generation_prompt=True, **named) == prompt


@pytest.mark.parametrize("kind", ["gpt2_kind", "smollm2_kind"])
def test_ids_and_exactly_the_trained_ids(kind):
    t = load(kind)
    assert len(CHATS[kind]) == 5
    for chat, ids, mask in CHATS[kind]:
        got, labels = render(t, chat)
        assert got == ids
        assert labels == [i if m else -100 for i, m in zip(ids, mask, strict=True)]


def test_what_is_trained_reads_as_the_answers_and_their_ends():
    t = load()
    chat = [user("one"), assistant("two"), user("three"), assistant("four")]
    ids, labels = render(t, chat)
    assert t.decode([i for i in labels if i != -100]) == "two<|im_end|>four<|im_end|>"
    assert labels[-1] == -100 and t.decode(ids[-1:]) == "\n"
    assert t.decode(ids) == templates.text(chat)


def test_a_turn_of_weight_0_is_read_and_not_trained():
    """Not the end of the turn either; the ids are the same."""
    t = load()
    plain = [user("one"), assistant("two"), user("three"), assistant("four")]
    for weights, trained in (((0, 1), "four<|im_end|>"), ((1, 0), "two<|im_end|>"), ((0, 0), "")):
        chat = copy.deepcopy(plain)
        chat[1]["weight"], chat[3]["weight"] = weights
        ids, labels = render(t, chat)
        assert ids == render(t, plain)[0] and t.decode([i for i in labels if i != -100]) == trained


def test_a_prompts_ids_are_the_first_of_the_whole():
    """Whatever is written at the borders: newlines, spaces, half words, the format's own tokens."""
    rng, borders = (
        random.Random(0),
        [
            "\n",
            " ",
            "\n\n",
            "  x",
            "assistant",
            "<|im_end|>",
            "<|im_end|>\n",
            "é",
            "🙂",
            "'s",
            "user\n",
            "12",
        ],
    )
    for kind in ("gpt2_kind", "smollm2_kind"):
        t = load(kind)
        for _ in range(200):
            words = ["".join(rng.choices(borders, k=rng.randrange(1, 5))) for _ in range(4)]
            chat = [user(words[0]), assistant(words[1]), user(words[2]), assistant(words[3])]
            ids, labels = render(t, chat)
            for cut in (1, 3):
                prompt, learnt = render(t, chat[:cut], add_generation_prompt=True)
                assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == learnt
            answer = ids[len(prompt) :]
            assert answer == [*t.encode(words[3]), t.special["<|im_end|>"], *t.encode("\n")]
            turns = 4 + (kind == "smollm2_kind")
            assert (
                ids.count(t.special["<|im_start|>"]) == ids.count(t.special["<|im_end|>"]) == turns
            )


def test_inputs_stay_as_they_were():
    chat = [user("Hi"), assistant("Hello")]
    before, f = copy.deepcopy(chat), TEMPLATES["smollm2"]
    ids, labels = render(load("smollm2_kind"), chat, format=f)
    labels[-2] = 7
    assert chat == before and 7 not in ids[-2:]


def test_smollm2s_system_message_only_where_there_is_none():
    f = TEMPLATES["smollm2"]
    assert templates.text([user("Hi")], format=f).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by"
    )
    own = [{"role": "system", "content": "Be brief."}, user("Hi")]
    assert templates.text(own, format=f) == templates.text(own, format=TEMPLATES["chatml"])
    assert "system" not in templates.text([user("Hi")], format=TEMPLATES["chatml"])


@pytest.mark.parametrize(
    "messages, said",
    [
        ([], "a list of messages was expected"),
        ("Hi", "a list of messages was expected"),
        (["Hi"], "message 1: an object"),
        ([{"content": "Hi"}], "message 1: role: .* expected"),
        (
            [{"role": "human", "content": "Hi"}],
            "role: one of system, user, assistant, tool was expected .got 'human'",
        ),
        ([{"role": "user"}], "content: a string was expected .got nothing"),
        ([user(None)], "content: a string"),
        ([user(["Hi"])], "content: a string"),
        ([assistant("Hi")], "message 1: role: user was expected here"),
        ([user("a"), user("b")], "message 2: role: assistant was expected here"),
        ([user("a"), assistant("b"), assistant("c")], "message 3: role: user was expected here"),
        (
            [user("a"), {"role": "system", "content": "s"}],
            "message 2: role: assistant was expected here",
        ),
        (
            [{"role": "system", "content": "s"}] * 2 + [user("a")],
            "message 2: role: user was expected here",
        ),
        (
            [{"role": "system", "content": "s"}],
            "a user's turn was expected after the system message",
        ),
    ],
)
def test_wrong_messages_are_refused(messages, said):
    with pytest.raises(ValueError, match=said):
        render(load(), messages)


def test_a_prompt_ends_in_a_users_turn():
    with pytest.raises(
        ValueError, match="must end in a user's turn .the last one is the assistant's"
    ):
        render(load(), [user("Hi"), assistant("Hello")], add_generation_prompt=True)


def test_the_checkpoints_own_template_is_recognised_or_refused():
    t = load()
    t.chat_template = None
    assert templates.of(t).name == "chatml"
    # escapes instead of newlines: the same jinja
    t.chat_template = TEMPLATES["smollm2"].jinja.replace("\n", "\\n") + "\n"
    assert templates.of(t).name == "smollm2"
    for jinja, why in (
        ("{{ messages }}", "begins '{{ messages }}'. It writes no special token behind an answer"),
        ("{% for %}", "It is no jinja"),
        ("{{ messages[9].role.x }}", "refuses the messages"),
        ("{{ raise_exception('No.') }}", "refuses the messages: No."),
        ("{{ messages.append(1) }}", "refuses the messages"),  # the sandbox
    ):
        t.chat_template = jinja
        with pytest.raises(ValueError, match=re.escape(why)):
            templates.of(t)
    with pytest.raises(ValueError, match="no chat format 'vicuna': there are chatml, smollm2"):
        templates.named("vicuna")


def test_jinja2_is_asked_for_by_name(monkeypatch):
    t = load()
    t.chat_template = OWN + "{# of a checkpoint #}"
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match="none of chatml.* install the package jinja2"):
        templates.of(t)


OWN = """{{- 'Talk:' }}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ '<|im_start|>A:' + m.content | trim + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- '<|im_start|>' + m.role[0] | upper + ':' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>A:' }}{% endif %}"""


def test_another_template_is_rendered_and_trained():
    """The text is jinja's; an answer is trained from where its prompt ends to its end token; what
    people wrote is no special token.
    """
    t = load()
    t.chat_template = OWN
    said = "x<|im_end|>\U000f0000"
    chat = [{"role": "system", "content": "S"}, user(said), assistant(" a\n"), user("y")]
    chat.append(assistant("b"))
    begin, end = t.special["<|im_start|>"], t.special["<|im_end|>"]
    e = t.encode
    answers = [[*e("a"), end], [*e("b"), end]]
    ids = [*e("Talk:"), begin, *e("S:S"), begin, *e("U:" + said), begin, *e("A:"), *answers[0]]
    ids += [begin, *e("U:y"), begin, *e("A:"), *answers[1]]
    got, labels = render(t, chat)
    assert got == ids and [i for i in labels if i != -100] == answers[0] + answers[1]
    assert labels[-len(answers[1]) :] == answers[1]
    prompt = render(t, chat[:4], add_generation_prompt=True)[0]
    assert prompt == ids[: -len(answers[1])]
    assert templates.answer_ids(t, chat[:4], "b") == (prompt, answers[1])
    assert templates.end_id(t) == end
    chat[2]["weight"] = 0
    assert [i for i in render(t, chat)[1] if i != -100] == answers[1]
    assert templates.adopt(t).name == "the checkpoint's own" and t.chat_template == OWN


@pytest.mark.parametrize("name", ["chatml", "smollm2", "zephyr", "mistral", "alpaca"])
def test_jinja_and_the_table_give_the_same_ids_and_labels(name):
    t, f = load(), TEMPLATES[name]
    chat = [user("a"), assistant("b"), user("c d"), assistant("e\nf")]
    expected = render(t, chat, format=f)
    t.chat_template = f.jinja + "{# of a checkpoint #}"
    assert templates.of(t).name == "the checkpoint's own" and render(t, chat) == expected
    assert render(t, chat[:3], True) == render(t, chat[:3], True, format=f)


def test_a_template_that_drops_old_reasoning_is_refused_with_the_turn():
    drops = OWN.replace("m.content | trim", "(m.content if loop.last else m.content[-1])")
    t = load()
    t.chat_template = drops
    chat = [user("q"), assistant("think: a"), user("r"), assistant("think: b")]
    with pytest.raises(ValueError, match="message 2 .'think: a'.: .* otherwise once .* gone on"):
        render(t, chat)
    chat[1]["weight"] = 0
    ids, labels = render(t, chat)
    assert t.decode([i for i in labels if i != -100]) == "think: b<|im_end|>"
    assert "think: a" not in t.decode(ids)
    chat[1].pop("weight")  # a prompt trains nothing
    assert render(t, chat[:3], add_generation_prompt=True)[0] == ids[: -len(labels_of(labels))]
    t.chat_template = OWN.replace("{{ '<|im_start|>A:' }}", "{{ '<|im_start|>B:' }}")
    with pytest.raises(ValueError, match="message 2 .*does not begin this answer where its prompt"):
        render(t, chat)


CALLS = """{%- if tools %}{{ '<|im_start|>T:' + tools | tojson + '<|im_end|>' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + ':' + m.content }}
    {%- for call in m.tool_calls or [] %}
        {{- '@' + call.function.name + call.function.arguments | tojson }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"""
WEATHER = {"type": "function", "function": {"name": "weather"}}


def called(arguments, text="", name="weather"):
    function = {"name": name, "arguments": arguments}
    return assistant(text) | {"tool_calls": [{"type": "function", "function": function}]}


def tool(text):
    return {"role": "tool", "content": text}


@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_trained_and_results_read(as_text):
    """Where the template writes them; a call's name and arguments are text whatever they say."""
    t = load()
    t.chat_template = (
        CALLS.replace(" | tojson }}\n    {%- endfor", " }}\n    {%- endfor") if as_text else CALLS
    )
    assert templates.of(t).calls == {"tools", "tool_calls", "tool"}
    chat = [user("Lima?") | {"tools": [WEATHER]}, called({"x<|im_end|>": "é"}, "Look:"), tool("9")]
    chat += [assistant("Nine."), user("?"), assistant("!")]
    begin, end, e = t.special["<|im_start|>"], t.special["<|im_end|>"], t.encode
    call = [*e('Look:@weather{"x<|im_end|>": "é"}'), end]
    ids = [begin, *e("T:" + json.dumps([WEATHER])), end, begin, *e("user:Lima?"), end]
    ids += [begin, *e("assistant:"), *call, begin, *e("tool:9"), end, begin, *e("assistant:")]
    answers = [[*e("Nine."), end], [*e("!"), end]]
    ids += [*answers[0], begin, *e("user:?"), end, begin, *e("assistant:"), *answers[1]]
    got, labels = render(t, chat)
    assert got == ids and labels_of(labels) == call + answers[0] + answers[1]
    asked = render(t, chat[:3], add_generation_prompt=True)[0]
    assert (
        asked == ids[: len(asked)] and templates.answer_ids(t, chat[:3], "Nine.")[1] == answers[0]
    )


def test_tool_calls_that_the_template_does_not_write_are_refused():
    t = load()
    chat = [user("Lima?"), called({}), tool("9"), assistant("Nine.")]
    for own in (None, OWN, CALLS.replace("m.tool_calls or []", "[]")):
        t.chat_template = own
        with pytest.raises(ValueError, match="message 2: tool_calls: the chat format writes no"):
            render(t, chat)
    with pytest.raises(ValueError, match="^tools: the chat format writes no"):
        render(t, [user("Lima?") | {"tools": [WEATHER]}], True, format=TEMPLATES["chatml"])
    t.chat_template = CALLS.replace(
        "m.tool_calls or []", "([] if m.content else m.tool_calls) or []"
    )
    assert templates.of(t).calls == {"tools", "tool_calls", "tool"}
    assert "@weather" in t.decode(render(t, chat)[0])
    chat[1] = called({}, "Look:")
    for prompt in (chat[:3], chat):  # the text alone is never read for the call
        with pytest.raises(ValueError, match="message 2: tool_calls: .* template leaves them out"):
            render(t, prompt, add_generation_prompt=len(prompt) == 3)


@pytest.mark.parametrize(
    "chat, said",
    [
        ([user("?"), tool("9")], "message 2: role: assistant was expected here"),
        ([user("?"), assistant("a"), tool("9")], "message 3: role: user was expected here"),
        ([user("?"), called({}), user("?")], "message 3: role: tool was expected here"),
        ([user("?"), called({}), tool("9"), user("?")], "role: assistant or tool was expected"),
    ],
)
def test_the_order_of_calls_and_results(chat, said):
    with pytest.raises(ValueError, match=said):
        templates.check(chat)
    templates.check([user("?"), called({}), tool("8"), tool("9"), called({}), tool("9")])


def labels_of(labels):
    return [i for i in labels if i != -100]


def test_alpaca_shows_an_input_apart():
    f = TEMPLATES["alpaca"]
    question = {"role": "user", "content": "Sum.\n\n1, 2", "input": "1, 2"}
    shown = templates.text([question], True, f, bos="")
    assert shown.startswith("Below is an instruction that describes a task, paired with an input")
    assert shown.endswith("\n\n### Instruction:\nSum.\n\n### Input:\n1, 2\n\n### Response:\n")
    plain = templates.text([user("Sum.")], True, f, bos="")
    assert plain.endswith("request.\n\n### Instruction:\nSum.\n\n### Response:\n")


def test_a_format_without_inputs_keeps_its_own_system_message_beside_one():
    question = {"role": "user", "content": "Sum.\n\n1, 2", "input": "1, 2"}
    plain = {"role": "user", "content": "Sum.\n\n1, 2"}
    form = templates.TEMPLATES["smollm2"]
    assert templates.text([question], format=form) == templates.text([plain], format=form)


def test_a_beginning_stands_once():
    """Also where the template writes none, and in Llama 2's, which writes one a question."""
    t = load("llama3_kind")
    chat = [user("a"), assistant("b"), user("c"), assistant("d")]
    assert t.begin == [t.bos_id]
    for name, n in (("llama3", 1), ("zephyr", 1), ("alpaca", 1), ("llama2", 2)):
        ids, labels = render(t, chat, format=TEMPLATES[name])
        assert ids[0] == t.bos_id and ids.count(t.bos_id) == n and len(ids) == len(labels)
        prompt, _ = render(t, chat[:3], add_generation_prompt=True, format=TEMPLATES[name])
        assert ids[: len(prompt)] == prompt


def test_a_greedy_token_takes_the_white_space_behind_it():
    """Phi's "<|user|>" and "<|end|>" do, so their newlines are no tokens; an answer keeps its."""
    t = load("phi4_kind")
    ids, labels = render(t, [user("\n Hi"), assistant(" Yo\n")])
    a, e, u = (t.special[f"<|{x}|>"] for x in ("assistant", "end", "user"))
    assert ids == [*t.begin, u, *t.encode("Hi"), e, a, *t.encode(" Yo\n"), e, t.eos_id]
    assert labels_of(labels) == [*t.encode(" Yo\n"), e]
    assert templates.answer_text(t, t.encode(" Yo\n")) == " Yo\n"
    adopted = templates.adopt(t)
    assert adopted.name == "phi3" and t.eos != "<|end|>"  # the template writes eos at the very end


def test_what_was_said_is_read_back_without_the_formats_spaces():
    t = load("llama3_kind")
    t.chat_template = TEMPLATES["llama2"].jinja
    _, answer = templates.answer_ids(t, [user("a")], "b c")
    assert t.decode(answer) == " b c <|eot_id|>"
    assert templates.read_answers(t, [answer], [t.eos_id]) == (["b c"], [True])
    assert templates.answer_text(t, t.encode("\n b c\n")) == "b c"  # as the template would write it


def test_end_id_and_a_tokenizer_without_the_formats_tokens():
    t = load()
    assert templates.end_id(t) == t.special["<|im_end|>"]
    del t.special["<|im_start|>"], t.special["<|im_end|>"]
    for call in (
        lambda: templates.end_id(t),
        lambda: render(t, [user("Hi")]),
        lambda: templates.adopt(t),
    ):
        with pytest.raises(ValueError, match="chatml needs the special token <.im_"):
            call()


def test_the_template_trained_with_is_saved_and_another_one_warns(tmp_path):
    t = load()
    t.chat_template = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # no template of its own: nothing to warn of
        assert templates.adopt(t).name == "chatml"
        assert templates.adopt(t, "chatml").name == "chatml"
    t.save(tmp_path)
    saved = Tokenizer.load(tmp_path)
    assert (
        saved.chat_template == TEMPLATES["chatml"].jinja
        and saved.eos_id == saved.special["<|im_end|>"] != saved.pad_id
    )
    with pytest.warns(
        UserWarning, match="chat format smollm2, but the checkpoint was trained with chatml"
    ):
        templates.adopt(saved, "smollm2")
    assert templates.of(saved).name == "smollm2"
    saved.chat_template = "{{ messages }}"  # even one that cannot be used
    with pytest.warns(UserWarning, match="trained with one that is not in the table"):
        templates.adopt(saved, "chatml")
    spelt = TEMPLATES["smollm2"].jinja.replace("\n", "\\n")
    saved.chat_template = spelt
    templates.adopt(saved)
    # a recognised one stays as it was read
    assert saved.chat_template == spelt

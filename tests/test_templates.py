"""Chat templates: Hugging Face's text byte for byte, exactly the trained ids, prompts as prefixes,
roles checked.
"""

import copy
import json
import random
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
        assert templates.text(chat, format=f) == whole
        assert templates.text(chat[:-1], add_generation_prompt=True, format=f) == prompt


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
            "role: one of system, user, assistant was expected .got 'human'",
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
    t.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="none of chatml, smollm2: it begins '{{ messages }}'"):
        templates.of(t)
    with pytest.raises(ValueError, match="no chat format 'gemma': there are chatml, smollm2"):
        templates.named("gemma")


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
    saved.chat_template = "{{ messages }}"
    with pytest.warns(UserWarning, match="trained with one that is not in the table"):
        templates.adopt(saved, "chatml")
    spelt = TEMPLATES["smollm2"].jinja.replace("\n", "\\n")
    saved.chat_template = spelt
    templates.adopt(saved)
    # a recognised one stays as it was read
    assert saved.chat_template == spelt

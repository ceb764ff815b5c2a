"""Tokenizers and templates of other families' kinds, trained here, against the live Hugging Face
ones: ids and text of 1,000 varied strings, the whole chat's ids, and exactly what is trained of it.
"""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS / "golden"))

from make import BY_TIKTOKEN, CHATS, EDGES, FAMILIES, applied, family, spiced, varied  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from data import records, templates  # noqa: E402
from data.tokenizer import ByteLevel, Pieces, Tokenizer  # noqa: E402


@pytest.fixture(scope="module", params=FAMILIES)
def both(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    family(request.param, path)
    return request.param, Tokenizer.load(path), AutoTokenizer.from_pretrained(path)


def own(tok):
    """The special tokens; an unknown character is one too in some vocabularies."""
    return {i for text, i in tok.special.items() if text != "<unk>"}


def test_ids_and_text_of_1000_strings(both):
    kind, ours, peer = both
    assert isinstance(ours.coder, ByteLevel if kind in BY_TIKTOKEN else Pieces)
    for text in [*varied(500, 6), *spiced(500, 7)]:
        ids = ours.encode(text)
        theirs = peer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        if kind != "unigram_kind" or not set(theirs) & own(
            ours
        ):  # where the peer lets them through
            assert ids == theirs, ascii(text)
        assert ours.decode(ids) == peer.decode(ids), ascii(text)
        assert not set(ids) & own(ours)
        with_begin = peer(text, split_special_tokens=True)["input_ids"]
        assert [*ours.begin, *theirs] == with_begin, ascii(text)
    assert len(peer) == len(ours.ids) and peer.bos_token_id == ours.bos_id
    assert peer.eos_token_id == ours.eos_id == ours.pad_id


def test_chats_are_read_and_trained_as_the_peer_reads_them(both):
    """Where nobody wrote the format's own tokens, the ids are those of the whole text; trained is
    what follows the prompt's ids, up to the end token.
    """
    kind, ours, peer = both
    format, end = templates.of(ours), templates.end_id(ours)
    assert format.name == FAMILIES[kind]
    for chat in [*CHATS[:4], *EDGES]:
        whole, prompt = applied(peer, chat)
        if whole is None:  # no system message in this family
            with pytest.raises(ValueError, match="has no system message"):
                templates.render(ours, chat)
            continue
        if not format.trim and chat is EDGES[0]:
            continue  # white space at a border: encoded apart here
        named = dict(bos=ours.bos, eos=ours.eos, format=format)
        assert templates.text(chat, **named) == whole
        assert templates.text(chat[:-1], True, **named) == prompt
        theirs, asked = (peer(t, add_special_tokens=False)["input_ids"] for t in (whole, prompt))
        if ours.begin and not whole.startswith(ours.bos):
            theirs, asked = ([*ours.begin, *ids] for ids in (theirs, asked))
        ids, labels = templates.render(ours, chat)
        assert ids == theirs, peer.convert_ids_to_tokens(ids)
        assert ids.count(ours.bos_id) == max(1, whole.count(ours.bos)) if ours.begin else True
        assert templates.render(ours, chat[:-1], True)[0] == asked == ids[: len(asked)]
        last = theirs[len(asked) : theirs.index(end, len(asked)) + 1]
        before = templates.render(ours, chat[:-2])[1] if len(chat) > 3 else []
        assert [i for i in labels if i != -100] == [i for i in before if i != -100] + last
        answer = templates.answer_ids(ours, chat[:-1], chat[-1]["content"])
        assert answer == (asked, last)
        said = chat[-1]["content"].strip() if format.trim else chat[-1]["content"]
        if ours.special.get("<unk>") not in last:
            assert templates.read_answers(ours, [last], [end]) == ([said], [True])


def test_nobody_can_write_a_special_token(both):
    _, ours, _ = both
    said = " ".join(ours.special)
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    plain = [{"role": m["role"], "content": "x"} for m in chat]
    counted = [sum(i in own(ours) for i in templates.render(ours, c)[0]) for c in (chat, plain)]
    assert counted[0] == counted[1]


BROUGHT = ["qwen2_5", "qwen3", "gemma3", "phi3_5", "llama3_2", "lfm2", "cohere"]


@pytest.mark.parametrize("name", BROUGHT)
def test_templates_that_checkpoints_bring(name, tmp_path):
    """TRL keeps copies of them: the text is transformers', whole and as a prompt; one question and
    answer are trained, of several those that stay as they were.
    """
    trl = pytest.importorskip("trl")
    jinja = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    family("qwen_kind", tmp_path)
    ours, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    # the vocabulary has other markers than most: the ones that stand in for them end a turn too
    for theirs in ("<end_of_turn>", "<|end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>", "<|user|>"):
        jinja = jinja.replace(theirs, "<|im_end|>")
    ours.chat_template = jinja
    ours.config["bos_token"] = peer.bos_token = "<|endoftext|>"
    format = templates.of(ours)
    assert format.name == "the checkpoint's own" and format.end == "<|im_end|>"
    for chat in CHATS[:4]:
        whole, prompt = applied(peer, chat, jinja)
        named = dict(bos=ours.bos, eos=ours.eos, format=format)
        assert templates.text(chat[:-1], True, **named) == prompt
        asked, last = templates.answer_ids(ours, chat[:-1], chat[-1]["content"])
        read = [m | {"weight": 0} for m in chat[:-1]] + chat[-1:]
        assert templates.text(read, **named) == whole
        ids, labels = templates.render(ours, read)
        assert ours.decode(ids) == whole
        assert [i for i in labels if i != -100] == last and last[-1] == templates.end_id(ours)
        assert ids[: len(asked)] == asked and ids[len(asked) : len(asked) + len(last)] == last
        try:
            everything = templates.render(ours, chat)[1]
        except ValueError as e:
            assert name == "qwen3" and len(chat) == 4 and "message 2" in str(e)
            continue
        assert len([i for i in everything if i == last[-1]]) == len(chat) // 2


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a <city>.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALLING = "qwen2_5 qwen3_instruct_2507 qwen3_5_nothink llama3_1 llama3_2 lfm2_v2".split()


def a_call(arguments, text):
    """The weather in Lima by a tool."""
    function, one = {"name": "weather", "arguments": arguments}, "abcdefghi"
    return [
        {"role": "user", "content": "Lima?"},
        {
            "role": "assistant",
            "content": text,
            "tool_calls": [{"id": one, "type": "function", "function": function}],
        },
        {"role": "tool", "name": "weather", "tool_call_id": one, "content": '{"t": 9}'},
        {"role": "assistant", "content": "Nine."},
    ]


@pytest.mark.parametrize("text", [None, "Let me look."])
@pytest.mark.parametrize("name", CALLING)
def test_tool_calls_in_templates_that_checkpoints_bring(name, text, tmp_path):
    """From a file, whose arguments are an object or JSON: the text is transformers' with an object;
    trained is the call and the answer, each with its end, and nothing of the tool's turn.
    """
    trl = pytest.importorskip("trl")
    jinja = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    family("qwen_kind", tmp_path)
    ours, peer = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    jinja = jinja.replace("<|eot_id|>", "<|im_end|>")  # Llama's, which this vocabulary lacks
    ours.chat_template = jinja
    ours.config["bos_token"] = peer.bos_token = "<|endoftext|>"
    format = templates.of(ours)
    city = {"city": "Lima, <Perú>"}
    named = dict(tools=[WEATHER], chat_template=jinja, tokenize=False)
    whole = peer.apply_chat_template(a_call(city, text or ""), **named)
    asked = peer.apply_chat_template(a_call(city, "")[:1], add_generation_prompt=True, **named)
    for arguments in (city, json.dumps(city, ensure_ascii=False)):
        file = tmp_path / "x.jsonl"
        file.write_text(json.dumps({"messages": a_call(arguments, text), "tools": [WEATHER]}))
        (read,) = records.conversations(file, written=format.calls)
        said = read["messages"]
        assert templates.text(said, format=format, bos=ours.bos, eos=ours.eos) == whole
        ids, labels = templates.render(ours, said)
        assert ours.decode(ids) == whole
        assert ours.decode(templates.render(ours, said[:1], True)[0]) == asked
        call, answer, rest = ours.decode([i for i in labels if i != -100]).split("<|im_end|>")
        assert "Lima, <Perú>" in call and (answer.strip(), rest) == ("Nine.", "")
        assert whole.startswith(f"{asked}{call}<|im_end|>") and '"t"' not in call

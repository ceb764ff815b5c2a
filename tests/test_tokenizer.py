"""The tokenizer: Hugging Face's ids, any text round-trips, the same merges on every machine,
foreign files refused by name.
"""

import json
import random
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import pytest

from data import tokenizer
from data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parent.parent
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())
TEXT = [
    "the cat sat on the mat, the cat's hat",
    "  two  spaces\n\n\tand 1234 digits",
    "naïve café 漢字 🙂🙂",
] * 3


def quiet_encode(t, text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t.encode(text)


KINDS = {"gpt2_kind": 200, "smollm2_kind": 200} | {
    f"{family}_kind": 60 for family in ("llama3", "qwen", "phi4")
}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_hugging_faces(kind):
    t = Tokenizer.load(GOLDEN / kind)
    assert len(TOKENS[kind]) == KINDS[kind]
    for text, ids in TOKENS[kind]:
        assert quiet_encode(t, text) == ids, ascii(text)


def test_ids_equal_hugging_faces_with_all_of_smollm2():
    folder = ROOT / "smollm2"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("needs smollm2: make smollm2")
    t = Tokenizer.load(folder)
    for text, ids in TOKENS["smollm2"]:
        assert quiet_encode(t, text) == ids, ascii(text)


def random_text(rng):
    codes = [
        (rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))
        for _ in range(rng.randrange(40))
    ]
    return "".join(chr(rng.choice(c)) for c in codes)


def test_any_text_and_any_bytes_round_trip():
    t, rng = tokenizer.train(TEXT, 300), random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        assert t.decode(t.encode(text)) == text
    for b in range(256):
        assert t.token_bytes([*tokenizer.CHAR].index(b)) == bytes([b])
    # no UTF-8: a replacement, no crash
    assert t.decode([[*tokenizer.CHAR].index(0xFF)]) == "�"
    # half a character is replaced
    assert t.decode(t.encode("a\ud800b")) == "a�b"
    # both halves are the character
    assert t.decode(t.encode("\ud83d\ude42")) == "🙂"


def test_special_tokens_in_a_text_stay_text():
    for kind in ("gpt2_kind", "smollm2_kind"):
        t = Tokenizer.load(GOLDEN / kind)
        for name in t.special:
            ids = t.encode(f"{name} a{name}")
            assert not set(ids) & set(t.special.values()) and t.decode(ids) == f"{name} a{name}"


def test_decode_shows_or_drops_special_tokens_and_refuses_foreign_ids():
    t = Tokenizer.load(GOLDEN / "gpt2_kind")
    ids = [*t.encode("Hi"), t.special["<|im_end|>"]]
    assert t.decode(ids) == "Hi<|im_end|>" and t.decode(ids, skip_special=True) == "Hi"
    with pytest.raises(ValueError, match="token 500: the tokenizer has the ids 0 to 499"):
        t.decode([500])


def test_missing_bytes_are_dropped_with_one_warning():
    t = Tokenizer.load(GOLDEN / "smollm2_kind")
    assert len(t.coder.missing) == 21
    with pytest.warns(UserWarning, match="bytes 04 f1: they are dropped") as caught:
        assert t.encode("a\x04!\x04!\U00040000") == t.encode("a") + t.encode("!!") + t.encode(
            "\U00040000"
        )
    assert len(caught) == 1 and max(t.encode("\x04\x06 a")) < t.vocab_size
    assert t.decode(t.encode("a\ud800b")) == "a�b"


def test_too_long_a_run_of_spaces_is_refused():
    t = tokenizer.train(TEXT, 300)
    assert t.decode(t.encode(" " * 90_000 + "a")) == " " * 90_000 + "a"
    with pytest.raises(ValueError, match="spaces in a row"):
        t.encode(" " * 1_000_000 + "a")
    assert t.decode(t.encode(" " * 100_000 + "a")) == " " * 100_000 + "a"
    with pytest.raises(ValueError, match="more than 100,000 spaces in a row"):
        t.encode("a" + "\t \u3000" * 40_000)


def test_long_runs_of_spaces_are_read_once():
    """Read again from each of its spaces, a run takes the square of its length: 26 s for two of
    99,999.
    """
    begin = time.process_time()
    tokenizer.check_spaces((" " * 99_999 + "a") * 2)
    assert time.process_time() - begin < 2


def naive_merges(words, n):
    """Counts all pairs anew for each merge."""
    merges = []
    for k in range(n):
        count = {}
        for word in words:
            for pair in pairwise(word):
                count[pair] = count.get(pair, 0) + 1
        best = min(count, key=lambda p: (-count[p], p))
        merges.append(best)
        for w, word in enumerate(words):
            out = []
            while word:
                hit = tuple(word[:2]) == best
                out.append(256 + k if hit else word[0])
                word = word[1 + hit :]
            words[w] = out
    return merges


def test_training_learns_the_most_frequent_pair_each_time():
    rng = random.Random(0)
    words = [[rng.randrange(5) for _ in range(rng.randrange(1, 12))] for _ in range(200)] + [
        [1] * 7
    ] * 3
    assert tokenizer._merges([*words], [1] * len(words), 60) == naive_merges([*words], 60)


def test_training_is_the_same_whatever_the_order_of_the_texts():
    texts = [*TEXT, "zebra yak xenon", "yak zebra", "ab ba ab ba"]
    a, b = tokenizer.train(texts, 330), tokenizer.train(reversed(texts), 330)
    assert a.json == b.json and a.vocab_size == 330
    assert a.special == {"<|endoftext|>": 327, "<|im_start|>": 328, "<|im_end|>": 329}
    assert a.eos_id == a.pad_id == a.bos_id == 327


def test_training_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="vocab_size 258 leaves no room"):
        tokenizer.train(TEXT, 258)
    with pytest.raises(ValueError, match="too short for 741 merges"):
        tokenizer.train(["abc abc"], 1000)


def test_a_piece_never_crosses_words_or_joins_digits_in_smollm2():
    t = tokenizer.train(["abc cd abc cd abc cd 12 12"] * 5, 264, special=("<|endoftext|>",))
    assert all(" " not in t.decode([i])[1:] for i in range(256, 263))
    digits = Tokenizer.load(GOLDEN / "smollm2_kind")
    assert len(digits.encode("2024")) == 4


def test_pieces_are_those_of_tiktokens_regex():
    """Its \\s has no U+001C, and its \\p{N} is more than Python's \\d."""
    split = tokenizer._python_regex(tokenizer.GPT2)
    pieces = ["It", "'s", " ", " a", "\x1c", "b", " \x1c!", "\u3000", " 12²", "x", "_", "\n"]
    assert split.findall("".join(pieces)) == pieces
    assert tokenizer._python_regex(tokenizer.DIGITS).findall("a  12  b") == [
        "a",
        "  ",
        "1",
        "2",
        " ",
        " b",
    ]


@pytest.mark.parametrize("kind", ["gpt2_kind", "smollm2_kind"])
def test_what_is_saved_is_what_was_read(kind, tmp_path):
    t = Tokenizer.load(GOLDEN / kind)
    t.save(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == (
        GOLDEN / kind / "tokenizer.json"
    ).read_bytes()
    again = Tokenizer.load(tmp_path / "new")
    assert (
        again.config == t.config
        and again.special == t.special
        and again.chat_template == t.chat_template
    )


def test_config_in_its_spellings(tmp_path):
    t = Tokenizer.load(GOLDEN / "gpt2_kind")
    config = {
        "eos_token": {"content": "<|im_end|>", "lstrip": False},
        "pad_token": None,
        "bos_token": "<nowhere>",
        "chat_template": [
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "D"},
        ],
    }
    t = Tokenizer(t.json, config)
    assert (
        t.eos_id == t.special["<|im_end|>"]
        and t.pad_id == t.eos_id
        and t.bos_id is None
        and t.chat_template == "D"
    )
    t.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("J")
    again = Tokenizer.load(tmp_path)
    assert again.chat_template == "J"
    again.save(tmp_path / "new")  # as it came, and where other programs look for it
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "J"
    assert (
        json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["chat_template"] == "J"
    )


SPEC = json.loads((GOLDEN / "gpt2_kind" / "tokenizer.json").read_text("utf-8"))
BYTE_LEVEL = SPEC["pre_tokenizer"]


def changed(**fields):
    spec = json.loads(json.dumps(SPEC))
    for key, value in fields.items():
        *path, last = key.split("__")
        at = spec
        for p in path:
            at = at[p]
        at[last] = value
    return json.dumps(spec)


def template(begin):
    """A post-processor that puts a token before a text."""
    steps = [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    known = {"B": {"id": "B", "ids": [begin], "tokens": ["B"]}}
    return {"type": "TemplateProcessing", "single": steps, "special_tokens": known}


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"normalizer": {"type": "NFKC"}}, "normalizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True}}, "pre_tokenizer"),
        ({"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, "pre_tokenizer"),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Split"}, BYTE_LEVEL],
                }
            },
            "pre_tokenizer",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits"}, BYTE_LEVEL],
                }
            },
            "pre_tokenizer",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "pre_tokenizer"),
        ({"decoder": None}, "decoder"),
        ({"decoder": {"type": "WordPiece"}}, "decoder"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor"),
        ({"post_processor": {"type": "TemplateProcessing", "single": 1}}, "post_processor"),
        ({"post_processor": template(500)}, "post_processor"),
        ({"model__type": "Unigram"}, "model.type"),
        ({"model__merges": None}, "model.type"),
        ({"model__byte_fallback": True}, "byte_fallback"),
        ({"model__dropout": 0.1}, "dropout"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
        (
            {"added_tokens": [SPEC["added_tokens"][0] | {"special": False, "rstrip": True}]},
            "added token .*endoftext.*rstrip",
        ),
        (
            {"model__vocab": SPEC["model"]["vocab"] | {"▁the": 501}},
            "model.vocab has the character '▁'",
        ),
        (
            {"model__vocab": SPEC["model"]["vocab"] | {"unmade": 501}},
            "no merge makes the token b'unmade'",
        ),
        ({"model__merges": SPEC["model"]["merges"][::-1]}, "ids must rise"),
        ({"model__merges": [*SPEC["model"]["merges"], "q z"]}, "does not join two tokens"),
        ({"model__merges": [*SPEC["model"]["merges"], "a b c"]}, "does not join two tokens"),
    ],
)
def test_other_kinds_of_tokenizer_are_refused_by_name(fields, named, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=f"^here/tokenizer.json: .*{named}"):
        Tokenizer(changed(**fields), name="here/tokenizer.json")


def test_other_kinds_ask_for_the_package_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="t.json: model.type is .* install the package tokenizers"):
        Tokenizer(changed(model__type="Unigram"), name="t.json")


def test_what_begins_every_text():
    t = Tokenizer(changed(post_processor=template(498)))
    assert t.begin == [498] and 498 not in t.encode("Hi")
    for said, begin in ((True, [497]), (False, [])):  # the config's word wins
        config = {"bos_token": "<|endoftext|>", "add_bos_token": said}
        assert Tokenizer(changed(post_processor=template(498)), config).begin == begin


def test_added_tokens_that_are_not_special_are_found_in_any_text():
    t = Tokenizer.load(GOLDEN / "qwen_kind")
    think = t.coder.found["<think>"]
    assert t.encode("a<think>b") == [*t.encode("a"), think, *t.encode("b")]
    assert t.decode([think], skip_special=True) == "<think>" and "<think>" not in t.special
    assert t.encode("e\u0301") == t.encode("\xe9")  # NFC
    # one that the config names is special whatever the file says
    spec = json.loads(t.json)
    spec["added_tokens"] = [a | {"special": False} for a in spec["added_tokens"]]
    named = Tokenizer(json.dumps(spec), t.config)
    assert named.special == {"<|im_end|>": t.eos_id} and t.eos_id not in named.encode("<|im_end|>")


def test_gpt2s_own_spelling_is_read():
    """Its file has no model.type and no use_regex, and its merges may be pairs."""
    old = json.loads(
        changed(
            pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
            model__unk_token="",
            model__merges=[m.split(" ") for m in SPEC["model"]["merges"]],
        )
    )
    del old["model"]["type"], old["model"]["byte_fallback"], old["model"]["ignore_merges"]
    t, text = Tokenizer(json.dumps(old)), "It's 12 o'clock.\n"
    assert t.encode(text) == Tokenizer(json.dumps(SPEC)).encode(text)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is not JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("no")
    with pytest.raises(ValueError, match="tokenizer_config.json is not JSON"):
        Tokenizer.load(tmp_path)

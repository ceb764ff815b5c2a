"""A tokenizer and its chat template as llama.cpp reads them: what tools/gguf.py writes of them.

    byte-level BPE       merges, in their order, and the name of a split pattern
    SentencePiece's      a score for each token, in place of the merges

Where llama.cpp reads some texts otherwise, a line says which; a kind that it lacks is refused.
"""

import json
import re
import sys
from pathlib import Path

from common.files import parse
from common.hub import listed
from data.tokenizer import DIGITS, GPT2, GPT4O, LLAMA3, QWEN, Pieces

# llama.cpp's names of the split patterns of data/tokenizer.py
PRE = {GPT2: "gpt-2", DIGITS: "smollm", LLAMA3: "llama-bpe", QWEN: "qwen2", GPT4O: "gpt-4o"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


def say(what):
    print(f"in llama.cpp {what}", file=sys.stderr)


def vocabulary(tok, c) -> dict:
    """The tokenizer's keys. ValueError for a kind that llama.cpp lacks."""
    spec, pieces = parse(tok.json, "tokenizer.json"), isinstance(tok.coder, Pieces)
    model, added = spec["model"], {t["id"]: t["content"] for t in spec.get("added_tokens") or []}
    if pieces:
        keys = sentencepiece(spec, set(added.values()), tok.vocab_size)
        keys["add_space_prefix"] = tok.coder.anew
    else:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        keys = {"model": "gpt2", "pre": PRE[tok.coder.encoding._pat_str], "merges": merges}
        if tok.coder.nfc:
            say("letters with accents written apart are not joined (normal form NFC)")
        if keys["pre"] == "gpt-4o":
            say("words with accents written apart, or capitals beyond A to Z, may be cut otherwise")
    texts = {i: text for text, i in model["vocab"].items()} | added
    keys |= {"tokens": [], "token_type": []}
    for i in range(tok.vocab_size):
        text, kind = texts.get(i, f"[PAD{i}]"), NORMAL
        if i not in texts:
            kind = UNUSED
        elif text in tok.special:
            kind = UNKNOWN if pieces and text == model.get("unk_token") else CONTROL
        elif i in added:  # found before spaces are written as ▁
            text, kind = text.replace("▁", " ") if pieces else text, USER_DEFINED
        elif pieces and re.fullmatch("<0x[0-9A-F]{2}>", text):
            kind = BYTE
        keys["tokens"].append(text)
        keys["token_type"].append(kind)
    return keys | special(tok, c)


def sentencepiece(spec: dict, added: set, size: int) -> dict:
    """A token's score, where merges have an order: llama.cpp joins two neighbours whenever their
    text is a token, that of the highest score first, of equal ones the leftmost. ValueError where
    the file says otherwise."""
    model, steps = spec["model"], []
    for step in filter(None, (spec.get("normalizer"), spec.get("pre_tokenizer"))):
        steps += step.get("normalizers") or step.get("pretokenizers") or [step]
    odd = [step for step in steps if not usual(step)]
    if odd or model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        what = json.dumps(odd[0]) if odd else f"{model.get('type')}, or without byte_fallback"
        raise ValueError(f"llama.cpp has no tokenizer of this kind: {what}")
    if any(step.get("prepend_scheme") == "first" for step in steps):
        say("a text that begins without a special token lacks the space before its first word")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    known, plain = set(merges), model["vocab"].keys() - added
    cuts = ((t[:i], t[i:]) for t in plain for i in range(1, len(t)))
    lost = next((cut for cut in cuts if cut not in known and plain.issuperset(cut)), None)
    if lost:
        raise ValueError(f"llama.cpp would read otherwise: the tokenizer has no merge of {lost}")
    return {"model": "llama", "scores": scores(merges, model["vocab"], added, size)}


def usual(step) -> bool:
    """Whether a step before the merges is one of llama.cpp's: it writes spaces as ▁, puts one
    before a text and behind special tokens, and splits nothing."""
    if step["type"] == "Metaspace":
        return not step.get("split", True) and step.get("prepend_scheme", "always") != "always"
    if step["type"] in ("Replace", "Split"):
        return step.get("pattern") == {"String": " "}
    return step["type"] == "Prepend"


def scores(merges, vocab, added, size: int) -> list[float]:
    """The place of a token's first merge, downwards. Runs of one character, whose merges are
    mixed, share a score."""
    texts = [a + b for a, b in merges if a + b not in added]  # added ones are found before
    last, found, end = {text: k for k, text in enumerate(texts)}, [0.0] * size, -1
    for k, text in enumerate(texts):
        if k > end:
            score, first = -float(k), text
        elif text != first and len({*first, *text}) > 1:
            what = f"merges to {text!r} stand among those to {first!r}"
            raise ValueError(f"llama.cpp would read with this tokenizer otherwise: {what}")
        end, found[vocab[text]] = max(end, last[text]), score
    return found


def special(tok, c) -> dict:
    """llama.cpp has places for three ids that end an answer, and knows some by their texts."""
    ends = [i for i in dict.fromkeys([tok.eos_id, *listed(c.eos_token_id)]) if i is not None]
    if not ends:
        raise ValueError("nothing ends an answer: eos_token in tokenizer_config.json was expected")
    if ends[3:]:
        say(f"only three tokens end an answer: {ends[3:]} may not")
    keys = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    keys |= {"bos": tok.begin[0] if tok.begin else tok.bos_id, "padding": tok.pad_id}
    keys = {f"{k}_token_id": i for k, i in keys.items() if i is not None}
    return keys | {"add_bos_token": bool(tok.begin), "add_eos_token": False}


def template(tok) -> dict:
    """The jinja text. llama.cpp would write token 11 for a beginning that there is not."""
    jinja = tok.chat_template
    if jinja and "bos_token" in jinja and tok.bos_id is None:
        jinja = "{% set bos_token = '' %}" + jinja
    return {"tokenizer.chat_template": jinja} if jinja else {}


def title(path, tok) -> str:
    """general.name. In a model named phi-3, and in no other, llama.cpp lets special tokens take
    the white space behind them; it opens none without these four tokens."""
    name = re.sub("(?i)phi-?3", "phi 3", Path(path).resolve().name)
    known = {text for text, _ in tok.coder.vocabulary}
    if tok.greedy and {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= known:
        return f"phi-3: {name}"
    if tok.greedy:
        say("white space behind special tokens is read, which they take with them here")
    return name

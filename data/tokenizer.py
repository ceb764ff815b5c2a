"""Byte-level BPE: train one, read and write a Hugging Face tokenizer.json, encode and decode
through tiktoken.

A text is cut into pieces (words with their leading space, runs of digits or signs), each piece into
bytes, and in each piece the neighbouring pair that was learnt first is merged, again and again
(Sennrich et al. 2016; GPT-2 for bytes). tiktoken's rank of a merge is the id of the token it makes,
so the ids must rise in the order of the merges: true of every file that a BPE trainer wrote, and
checked here.
"""

import hashlib
import heapq
import json
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import tiktoken

from common.files import parse, read_json, read_text, write_json

# GPT-2's pattern; each class stands in brackets, so that _python_regex can put its characters there
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+"
# SmolLM2 takes each digit out first: no piece crosses one, and spaces before one are at the end of
# theirs.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{N}]| ?[\p{L}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s\p{N}])|[\s]+"
# \s of tiktoken's regex; Python's has four more
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONGEST = 100_000

# GPT-2 spells each byte as a printable character: itself where it is one, else the next from U+0100
# on.
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
_others = [b for b in range(256) if b not in _printable]
CHAR = {b: chr(b) for b in _printable} | {b: chr(256 + i) for i, b in enumerate(_others)}
BYTE = {c: b for b, c in CHAR.items()}


class Tokenizer:
    """A tokenizer.json of byte-level BPE (GPT-2's or SmolLM2's kind) with its
    tokenizer_config.json.

    json: the tokenizer.json as it was read, character by character; config: the
    tokenizer_config.json as a dict; special: {text: id}; ids: all ids (there may be gaps);
    vocab_size: the highest id + 1; hash: of the vocabulary: tokenizers of one hash mean the same by
    an id. Raises ValueError for a file that tiktoken would read otherwise.
    """

    def __init__(self, json_text, config=None, name="tokenizer.json"):
        self.json = json_text
        self.config = dict(config or {})
        self.warned = False
        pattern, ranks, self.special = _read(parse(json_text, name), name)
        self.ids = frozenset([*ranks.values(), *self.special.values()])
        vocabulary = sorted([*((t.hex(), i) for t, i in ranks.items()), *self.special.items()])
        self.hash = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        self.missing = frozenset(range(256)) - {t[0] for t in ranks if len(t) == 1}
        self.vocab_size = max([*ranks.values(), *self.special.values()]) + 1
        # tiktoken needs all 256 bytes: those that the vocabulary lacks get ids beyond it
        spare = {bytes([b]): self.vocab_size + i for i, b in enumerate(sorted(self.missing))}
        self.split = _python_regex(pattern) if self.missing else None
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks | spare, special_tokens=self.special
        )

    def encode(self, text):
        """str → ids. Special tokens written in the text stay text; lone surrogates become U+FFFD,
        as in a file.
        """
        check_spaces(text)
        if self.missing:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if not self.missing.isdisjoint(text.encode()):
                return self._encode_without_missing(text)
        return self.encoding.encode_ordinary(text)

    def _encode_without_missing(self, text):
        """Drops the bytes that the vocabulary lacks, inside their piece, as Hugging Face's
        tokenizers do.
        """
        lost, ids = set(), []
        for piece in self.split.findall(text):
            data = piece.encode()
            lost |= self.missing.intersection(data)
            data = bytes(b for b in data if b not in self.missing)
            ids += self.encoding._encode_single_piece(data) if data else []
        if not self.warned:
            warnings.warn(
                f"the vocabulary has no token for the bytes {bytes(sorted(lost)).hex(' ')}: they"
                " are dropped",
                stacklevel=3,
            )
            self.warned = True
        return ids

    def decode(self, ids, skip_special=False):
        """ids → str; bytes that are no UTF-8 become U+FFFD. skip_special: leave special tokens
        out. ValueError for an id that the tokenizer lacks.
        """
        drop = set(self.special.values()) if skip_special else ()
        ids = [i for i in ids if i not in drop]
        bad = [i for i in ids if i not in self.ids]
        if bad:
            gaps = ", with gaps" if len(self.ids) < self.vocab_size else ""
            known = f"the ids 0 to {self.vocab_size - 1}{gaps}"
            raise ValueError(f"cannot decode token {bad[0]}: the tokenizer has {known}")
        return self.encoding.decode(ids, errors="replace")

    def _named(self, key):
        text = _content(self.config.get(key))
        return self.special.get(text) if isinstance(text, str) else None

    @property
    def bos_id(self):
        return self._named("bos_token")

    @property
    def eos_id(self):
        return self._named("eos_token")

    @property
    def pad_id(self):
        return self._named("pad_token")

    @property
    def chat_template(self):
        """The jinja text of the chat template, or None; of several named ones the default one."""
        return _template(self.config.get("chat_template"))

    @chat_template.setter
    def chat_template(self, text):
        self.config["chat_template"] = text

    @classmethod
    def load(cls, folder):
        """Reads FOLDER/tokenizer.json, tokenizer_config.json and chat_template.jinja, which wins
        over the config's, as in transformers. FileNotFoundError or ValueError if it cannot.
        """
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer.json: a Hugging Face folder with a byte-level BPE was"
                " expected"
            )
        source = folder / "tokenizer_config.json"
        config = read_json(source) if source.is_file() else {}
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            config["chat_template"] = read_text(jinja)
            source = jinja
        _check(config, source)
        return cls(read_text(folder / "tokenizer.json"), config, str(folder / "tokenizer.json"))

    def save(self, folder):
        """Writes FOLDER/tokenizer.json as it was read, and tokenizer_config.json with the chat
        template in it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, "utf-8", newline="")
        write_json(folder / "tokenizer_config.json", self.config)


def _template(template):
    """A config's chat template: a jinja text, or a list of named ones → the default one's text."""
    if isinstance(template, list):
        return {t["name"]: t["template"] for t in template}.get("default")
    return template


def _content(token):
    """A token of a config: its text, or an object with that content."""
    return token.get("content") if isinstance(token, dict) else token


def _check(config, where):
    """ValueError for a tokenizer_config.json whose values are of the wrong kind."""
    template = config.get("chat_template")
    if template is not None:
        named = template if isinstance(template, list) else [{"name": "", "template": template}]
        fits = all(map(_is_named, named))
        _want(fits, where, "chat_template", template, "a text or a list of named ones")
    for key in ("bos_token", "eos_token", "pad_token"):
        token = _content(config.get(key))
        _want(isinstance(token, str | None), where, key, config.get(key), "a text")


def _is_named(template):
    if not isinstance(template, dict):
        return False
    return all(isinstance(template.get(k), str) for k in ("name", "template"))


def check_spaces(text):
    """ValueError for more spaces in a row than tiktoken's regex can split. (Each run is found once:
    a search for so many spaces would read a shorter run again from each of its spaces.)
    """
    if len(text) > LONGEST and any(len(run) > LONGEST for run in re.findall(f"[{SPACES}]+", text)):
        what = f"the text has more than {LONGEST:,} spaces in a row"
        raise ValueError(f"{what}: tiktoken's regex cannot split them")


# A tokenizer.json as the tokenizers library writes it, but for the vocabulary.
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
ADDED = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def train(texts, vocab_size, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
    """Learns a Tokenizer of `vocab_size` tokens from an iterable of str: 256 bytes, then the merges
    in their order, then `special`.

    The first special token is a base model's beginning, end and padding. The most frequent pair is
    merged first, of equally frequent ones the pair of lowest ids: the same texts give the same
    tokenizer on every machine. ValueError for too small a vocabulary, or too short a text.
    """
    n_merges = vocab_size - 256 - len(special)
    if n_merges < 0 or not special:
        needed = "256 bytes and at least one special token are needed"
        raise ValueError(f"vocab_size {vocab_size} leaves no room: {needed}")
    split = _python_regex(GPT2)
    counts = Counter()
    for text in texts:
        counts.update(split.findall(text))
    id_of = {b: i for i, b in enumerate(CHAR)}
    words = [[id_of[b] for b in word.encode("utf-8", "replace")] for word in counts]
    merges = _merges(words, list(counts.values()), n_merges)
    tokens = list(CHAR.values())
    for a, b in merges:
        tokens.append(tokens[a] + tokens[b])
    vocab = {token: i for i, token in enumerate([*tokens, *special])}
    joined = [f"{tokens[a]} {tokens[b]}" for a, b in merges]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [dict(id=vocab[text], content=text) | ADDED for text in special],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL,
        "post_processor": None,
        "decoder": BYTE_LEVEL,
        "model": MODEL | {"vocab": vocab, "merges": joined},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[0],
        "eos_token": special[0],
        "pad_token": special[0],
        "clean_up_tokenization_spaces": False,
    }
    return Tokenizer(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", config)


def _merges(words, counts, n):
    """words: lists of ids; counts: how often each occurs → n pairs of ids, of which the k-th makes
    id 256 + k. Only pairs in words that a merge changed are counted again.
    """
    totals = Counter()  # pair → how often it occurs
    where = defaultdict(set)  # pair → the words that it may be in
    for w, (word, count) in enumerate(zip(words, counts, strict=True)):
        for pair in pairwise(word):
            totals[pair] += count
            where[pair].add(w)
    heap = [(-c, pair) for pair, c in totals.items()]
    heapq.heapify(heap)
    merges = []
    while len(merges) < n:
        if not heap:
            why = f"after {len(merges)} every piece is one token"
            raise ValueError(f"the text is too short for {n} merges: {why}")
        count, best = heapq.heappop(heap)
        if -count != totals[best]:
            continue  # an entry from before the pair's count changed
        changed = set()
        for w in where.pop(best):
            for pair in pairwise(words[w]):
                totals[pair] -= counts[w]
                changed.add(pair)
            words[w] = _merge(words[w], best, 256 + len(merges))
            for pair in pairwise(words[w]):
                totals[pair] += counts[w]
                changed.add(pair)
                where[pair].add(w)
        merges.append(best)
        for pair in changed:
            if totals[pair] > 0:
                heapq.heappush(heap, (-totals[pair], pair))
    return merges


def _merge(word, pair, new):
    """[1, 2, 1, 2, 3], (1, 2), 9 → [9, 9, 3]: from the left, without overlap."""
    out, i = [], 0
    while i < len(word):
        hit = tuple(word[i : i + 2]) == pair
        out.append(new if hit else word[i])
        i += 1 + hit
    return out


def _python_regex(pattern):
    """A pattern of ours for the standard library's `re`, which lacks \\p{L}; its \\s differs."""
    kinds = "".join(unicodedata.category(chr(i))[0] for i in range(0x110000))
    for kind in "LN":
        spans = [m.span() for m in re.finditer(f"{kind}+", kinds)]
        ranges = [f"\\U{start:08x}-\\U{end - 1:08x}" for start, end in spans]
        pattern = pattern.replace(rf"\p{{{kind}}}", "".join(ranges))
    return re.compile(pattern.replace(r"\s", SPACES))


# settings of a BPE model that would give other ids
OTHER_BPE = (
    "byte_fallback",
    "ignore_merges",
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)


def _read(spec, name):
    """A tokenizer.json's dict → (split pattern, {bytes: id}, special tokens {text: id}). Refuses by
    name all that would give other ids.
    """

    def refuse(field, value, expected):
        got = json.dumps(value)[:120]
        raise ValueError(f"{name}: {field} is {got}, this reader knows {expected} only")

    _want(isinstance(spec, dict), name, "the file", spec, "an object")
    model = spec.get("model") or {}
    _want(isinstance(model, dict), name, "model", model, "an object")
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        refuse("model.type", model.get("type"), "BPE")
    for key in OTHER_BPE:
        if model.get(key):
            refuse(f"model.{key}", model[key], "byte-level BPE without it")
    if spec.get("normalizer"):
        refuse("normalizer", spec["normalizer"], "null")
    for key in ("decoder", "post_processor"):
        part = spec.get(key)
        if (part or key == "decoder") and _type(part) != "ByteLevel":
            refuse(key, part, "ByteLevel")
    special = _added(spec.get("added_tokens") or [], name, refuse)
    pattern = _pattern(spec.get("pre_tokenizer"), refuse)
    ranks = _ranks(model, special, name)
    uses = Counter([*ranks.values(), *special.values()])
    _want(uses, name, "model.vocab", {}, "one token or more")
    twice = next((i for i, n in uses.items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: two tokens have the id {twice}: each token's own was expected")
    return pattern, ranks, special


def _added(tokens, name, refuse):
    """The added tokens, which must all be special → {text: id}."""
    _want(isinstance(tokens, list), name, "added_tokens", tokens, "a list")
    special = {}
    for n, token in enumerate(tokens, 1):
        given = token if isinstance(token, dict) else {}
        text, at = given.get("content"), given.get("id")
        fits = isinstance(text, str) and text and _is_id(at)
        _want(fits, name, f"added token {n}", token, "an object with a content and an id")
        if not token.get("special"):
            refuse(f"added token {text!r}: special", False, "added tokens that are special")
        special[text] = at
    return special


def _want(fits, name, field, value, expected):
    """ValueError unless a field's value fits; name: the file's."""
    if not fits:
        raise ValueError(f"{name}: {field} is {json.dumps(value)[:120]}, {expected} was expected")


def _is_id(value):
    return type(value) is int and 0 <= value < 2**31


def _type(part):
    return part.get("type") if isinstance(part, dict) else None


def _pattern(pre, refuse):
    """GPT-2's ByteLevel, or SmolLM2's Sequence of Digits and ByteLevel → the split pattern for
    tiktoken.
    """
    parts = pre.get("pretokenizers") if _type(pre) == "Sequence" else [pre]
    kinds = [_type(p) for p in parts] if isinstance(parts, list) else []
    last = parts[-1] if kinds and isinstance(parts[-1], dict) else {}
    digits = kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits")
    known = digits or kinds == ["ByteLevel"]
    if not known or last.get("add_prefix_space", True) or not last.get("use_regex", True):
        expected = "ByteLevel (add_prefix_space false, use_regex true)"
        expected += ", alone or after Digits (individual_digits true),"
        refuse("pre_tokenizer", pre, expected)
    return DIGITS if digits else GPT2


def _ranks(model, special, name):
    """The model's vocab and merges → {bytes: id}, without the special tokens. ValueError unless
    ids rise in the order of the merges, and every token is a byte, special, or made by a merge.
    """
    vocab = model.get("vocab")
    fits = isinstance(vocab, dict) and all(map(_is_id, vocab.values()))
    _want(fits, name, "model.vocab", vocab, "an object of ids")
    try:
        ranks = {bytes(BYTE[c] for c in t): i for t, i in vocab.items() if t not in special}
    except KeyError as e:
        raise ValueError(
            f"{name}: model.vocab has the character {e}, which is none of byte-level BPE's"
        ) from None
    made, last = set(), -1
    for k, merge in enumerate(model["merges"]):
        parts = _merge_parts(merge, k, name)
        token = b"".join(parts)
        if len(parts) != 2 or any(t not in ranks for t in (*parts, token)):
            raise ValueError(
                f"{name}: merge {k} {merge!r} does not join two tokens of the vocabulary to a third"
            )
        if ranks[token] <= last:
            raise ValueError(
                f"{name}: merge {k} {merge!r} makes token {ranks[token]}, the one before it {last}:"
                " the ids must rise"
            )
        last = ranks[token]
        made.add(token)
    lost = [t for t in ranks if len(t) != 1 and t not in made]
    if lost:
        raise ValueError(
            f"{name}: no merge makes the token {lost[0]!r} (id {ranks[lost[0]]}), nor is it a"
            " single byte or a special token"
        )
    if model.get("unk_token") and sum(len(t) == 1 for t in ranks) < 256:
        raise ValueError(
            f"{name}: model.unk_token is {model['unk_token']!r} and single bytes are missing: they"
            " would be dropped here"
        )
    return ranks


def _merge_parts(merge, k, name):
    """ "a b" or ["a", "b"] → the two tokens' bytes."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    fits = isinstance(pair, list) and all(isinstance(t, str) for t in pair)
    _want(fits, name, f"merge {k}", merge, "two tokens")
    return [bytes(BYTE.get(c, 0) for c in t) for t in pair]

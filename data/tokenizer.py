"""Tokenizers: a Hugging Face tokenizer.json, read and written; byte-level BPE, trained and run.

    byte-level BPE        GPT-2, SmolLM2, Llama 3, Qwen, Phi-4-mini: read here, run by tiktoken
    any other kind        Llama 2, Mistral, Gemma, Phi-3: by the optional package tokenizers

A text is cut into pieces (words with their leading space, runs of digits or signs), each piece into
bytes, and in each piece the neighbouring pair that was learnt first is merged, again and again
(Sennrich et al. 2016; GPT-2 for bytes). tiktoken's rank of a merge is the id of the token it makes,
so the ids must not fall in the order of the merges: true of every file that a BPE trainer wrote,
and checked here. It takes a piece that is a token whole, as Llama 3's ignore_merges asks for.
"""

import copy
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

from common.files import optional, parse, read_json, read_text, write_json

# GPT-2's pattern; each class stands in brackets, so that _python_regex can put its characters there
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s])|[\s]+"
# SmolLM2 takes each digit out first: no piece crosses one, and spaces before one are at the end of
# theirs.
DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{N}]| ?[\p{L}]+| ?[^\s\p{L}\p{N}]+|[\s]+(?![^\s\p{N}])|[\s]+"
# fmt: off
CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3 = CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN = CONTRACTED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
GPT4O = (  # Phi-4-mini's too
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTED}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTED}?|"
    r"\p{N}{1,3}|" + REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
)
# fmt: on
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
    """A tokenizer.json with its tokenizer_config.json.

    json: the tokenizer.json as it was read, character by character; config: the
    tokenizer_config.json as a dict; special: {text: id}; ids: all ids (there may be gaps);
    vocab_size: the highest id + 1; hash: of the vocabulary: tokenizers of one hash mean the same by
    an id; begin: the ids that stand before every text, [] or one. Raises ValueError for a damaged
    file, and for one that needs the package tokenizers where that is not installed.
    """

    def __init__(self, json_text, config=None, name="tokenizer.json"):
        self.json = json_text
        self.config = dict(config or {})
        self.own_file = False  # whether the chat template lay in chat_template.jinja
        self.own = {}  # a chat format's own text → its ids: templates' memory
        spec = parse(json_text, name)
        _want(isinstance(spec, dict), name, "the file", spec, "an object")
        named = {_content(self.config.get(k)) for k in ("bos_token", "eos_token", "pad_token")}
        added = _added(spec.get("added_tokens") or [], name, named)
        self.special = {t["content"]: t["id"] for t in added if t["special"]}
        # tokens that take the white space behind them with them, as Phi-3's do
        self.greedy = {t["content"] for t in added if t.get("rstrip") and t["special"]}
        try:
            self.coder = ByteLevel(spec, added, name)
        except OtherKindError as why:
            self.coder = Pieces(spec, added, f"{name}: {why}")
        vocabulary = sorted(self.coder.vocabulary)
        self.ids = frozenset(i for _, i in vocabulary)
        self.hash = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        self.vocab_size = max(self.ids) + 1
        begin = self.config.get("add_bos_token")  # wins over the file, as in transformers
        self.begin = _begin(spec, self.ids, name)
        if isinstance(begin, bool):
            self.begin = [self.bos_id] if begin and self.bos_id is not None else []
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text, after=None):
        """str → ids, without a beginning. Special tokens written in the text stay text; lone
        surrogates become U+FFFD, as in a file.

        after: None at a text's beginning, "token" behind a special token, "text" behind text of the
        same conversation: SentencePiece's kinds put a space before a text's first word.
        """
        return self.coder.encode(text, after)

    def decode(self, ids, skip_special=False, after=None):
        """ids → str; bytes that are no UTF-8 become U+FFFD. skip_special: leave special tokens
        out. after: as for encode. ValueError for an id that the tokenizer lacks.
        """
        drop = set(self.special.values()) if skip_special else ()
        ids = [i for i in ids if i not in drop]
        bad = [i for i in ids if i not in self.ids]
        if bad:
            gaps = ", with gaps" if len(self.ids) < self.vocab_size else ""
            known = f"the ids 0 to {self.vocab_size - 1}{gaps}"
            raise ValueError(f"cannot decode token {bad[0]}: the tokenizer has {known}")
        return self.coder.decode(ids, after)

    def token_bytes(self, i) -> bytes:
        """The bytes that a token stands for, which may be part of a character."""
        return self.coder.token_bytes(i)

    def split(self, text):
        """A text of a chat template → its special tokens and what stands between them, in turn."""
        return self._special.split(text) if self.special else [text]

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
        """The end token where none is named: what is padding is never told by its id."""
        pad = self._named("pad_token")
        return self.eos_id if pad is None else pad

    @property
    def bos(self):
        """The beginning token's text, "" if there is none; so too eos, the end's."""
        return "" if self.bos_id is None else _content(self.config["bos_token"])

    @property
    def eos(self):
        return "" if self.eos_id is None else _content(self.config["eos_token"])

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
                f"{folder} has no tokenizer.json: a Hugging Face folder with one was expected"
            )
        source = folder / "tokenizer_config.json"
        config = read_json(source) if source.is_file() else {}
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            config["chat_template"] = read_text(jinja)
            source = jinja
        _check(config, source)
        tok = cls(read_text(folder / "tokenizer.json"), config, str(folder / "tokenizer.json"))
        tok.own_file = jinja.is_file()
        return tok

    def save(self, folder):
        """Writes FOLDER/tokenizer.json as it was read, and tokenizer_config.json with the chat
        template in it; in chat_template.jinja too if it came in one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.json, "utf-8", newline="")
        write_json(folder / "tokenizer_config.json", self.config)
        if self.own_file:
            (folder / "chat_template.jinja").write_text(self.chat_template, "utf-8", newline="")


class OtherKindError(ValueError):
    """A tokenizer.json that tiktoken would read otherwise: the package tokenizers reads it."""


class ByteLevel:
    """Byte-level BPE through tiktoken. vocabulary: [(bytes in hexadecimal or added token, id)]."""

    def __init__(self, spec, added, name):
        pattern, self.nfc, ranks, added_ids = _read(spec, added, name)
        self.vocabulary = [*((t.hex(), i) for t, i in ranks.items()), *added_ids.items()]
        self.warned = False
        self.missing = frozenset(range(256)) - {t[0] for t in ranks if len(t) == 1}
        # tiktoken needs all 256 bytes: those that the vocabulary lacks get ids beyond it
        beyond = max(i for _, i in self.vocabulary) + 1
        spare = {bytes([b]): beyond + i for i, b in enumerate(sorted(self.missing))}
        self.pieces = _python_regex(pattern) if self.missing else None
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks | spare, special_tokens=added_ids
        )
        # added tokens that are not special, such as <think>: they are found in any text
        self.found = {t["content"]: t["id"] for t in added if not t["special"]}
        longest_first = sorted(self.found, key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text, after=None):
        check_spaces(text)
        if not self.found:
            return self._encode(text)
        ids = []
        for part in self.cut.split(text):
            ids += [self.found[part]] if part in self.found else self._encode(part)
        return ids

    def _encode(self, text):
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
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
        for piece in self.pieces.findall(text):
            data = piece.encode()
            lost |= self.missing.intersection(data)
            data = bytes(b for b in data if b not in self.missing)
            ids += self.encoding._encode_single_piece(data) if data else []
        if not self.warned:
            warnings.warn(
                f"the vocabulary has no token for the bytes {bytes(sorted(lost)).hex(' ')}: they"
                " are dropped",
                stacklevel=4,
            )
            self.warned = True
        return ids

    def decode(self, ids, after=None):
        return self.encoding.decode(ids, errors="replace")

    def token_bytes(self, i):
        return self.encoding.decode_single_token_bytes(i)


class Pieces:
    """Any tokenizer.json, through the optional package tokenizers. vocabulary: [(token, id)].

    SentencePiece's kinds write a space as "▁" and put one before a text's first word. `inner` does
    not: what goes on in a text, as an answer does behind "[/INST]", has no new beginning.
    """

    def __init__(self, spec, added, why):
        package = optional("tokenizers", f"{why}; other kinds are read by a package")
        spec = spec | {"added_tokens": added, "truncation": None, "padding": None}
        inner = _without_prefix(spec)
        try:
            self.outer = package.Tokenizer.from_str(json.dumps(spec))
            self.inner = package.Tokenizer.from_str(json.dumps(inner))
        except Exception as e:  # the package raises no narrower one
            raise ValueError(f"{why}; nor does the package tokenizers read it: {e}") from None
        for coder in (self.outer, self.inner):
            coder.encode_special_tokens = True  # they stay text where people write them
        self.vocabulary = [*self.outer.get_vocab(with_added_tokens=True).items()]
        self.bytes = _type(spec.get("decoder")) == "ByteLevel"
        unknown = (spec.get("model") or {}).get("unk_token") or "<unk>"
        special = [t["content"] for t in added if t["special"] and t["content"] != unknown]
        self.never = {t["id"] for t in added if t["content"] in special}
        self.cut = re.compile(
            "|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in special)
        )
        # whether the text behind a special token begins anew, or a whole conversation does once
        self.anew = any(p.get("prepend_scheme", "always") == "always" for p in _prefixes(spec))

    def _at(self, after):
        begins = after is None or after == "token" and self.anew
        return self.outer if begins else self.inner

    def encode(self, text, after=None):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._at(after).encode(text, add_special_tokens=False).ids
        if self.never.isdisjoint(ids):
            return ids
        # Unigram finds "</s>" among its pieces: there the text is cut, "<" and "/s>"
        first, *others = self.cut.split(text)
        ids = self._at(after).encode(first, add_special_tokens=False).ids
        for part in others:
            ids += self.inner.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids, after=None):
        return self._at(after).decode(ids, skip_special_tokens=False)

    def token_bytes(self, i):
        token = self.outer.id_to_token(i)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(byte[1])
        if self.bytes and all(c in BYTE for c in token):
            return bytes(BYTE[c] for c in token)
        return token.replace("▁", " ").encode()


def _parts(part, inside):
    """The steps of a normalizer, pre-tokenizer or decoder, which may be a Sequence."""
    return part.get(inside) or [] if _type(part) == "Sequence" else [part] if part else []


def _prefixes(spec):
    """The steps that put a space before a text's first word."""
    steps = [p for p in _parts(spec.get("normalizer"), "normalizers") if _type(p) == "Prepend"]
    for p in _parts(spec.get("pre_tokenizer"), "pretokenizers"):
        if _type(p) == "Metaspace" and p.get("prepend_scheme", "always") != "never":
            steps += [p] if p.get("add_prefix_space", True) else []
        if _type(p) == "ByteLevel" and p.get("add_prefix_space", True):
            steps.append(p)
    return steps


def _without_prefix(spec):
    """A tokenizer.json that neither puts that space there nor takes it away."""
    spec, never = copy.deepcopy(spec), {"add_prefix_space": False, "prepend_scheme": "never"}
    for key, inside in (("normalizer", "normalizers"), ("decoder", "decoders")):
        kept = []
        for p in _parts(spec.get(key), inside):
            if _type(p) == "Metaspace":
                p |= never
            kept += [] if _type(p) in ("Prepend", "Strip") else [p]
        whole = {"type": "Sequence", inside: kept} if len(kept) != 1 else kept[0]
        spec[key] = whole if kept else None
    for p in _prefixes(spec):
        p |= never if _type(p) == "Metaspace" else {"add_prefix_space": False}
    return spec


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
OTHER_BPE = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


def _read(spec, added, name):
    """A tokenizer.json's dict and its added tokens → (split pattern, whether a text is brought into
    the normal form NFC, {bytes: id}, {added token: id}). OtherKindError, by name, for all that
    would give other ids.
    """

    def refuse(field, value, expected):
        got = json.dumps(value)[:120]
        raise OtherKindError(f"{field} is {got}, byte-level BPE has {expected} only")

    model = spec.get("model") or {}
    _want(isinstance(model, dict), name, "model", model, "an object")
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("merges"), list):
        refuse("model.type", model.get("type"), "BPE")
    for key in OTHER_BPE:
        if model.get(key):
            refuse(f"model.{key}", model[key], "none of it")
    normalizer = spec.get("normalizer")
    if normalizer and _type(normalizer) != "NFC":
        refuse("normalizer", normalizer, "null or NFC")
    if _type(spec.get("decoder")) != "ByteLevel":
        refuse("decoder", spec.get("decoder"), "ByteLevel")
    for t in added:
        other = [k for k in ("single_word", "lstrip", "rstrip") if t.get(k) and not t["special"]]
        other += ["normalized"] if t.get("normalized") and normalizer else []
        if other:
            refuse(f"added token {t['content']!r}: {other[0]}", True, "false")
    pattern = _pattern(spec.get("pre_tokenizer"), refuse)
    added_ids = {t["content"]: t["id"] for t in added}
    ranks = _ranks(model, added_ids, name)
    if pattern not in (GPT2, DIGITS) and sum(len(t) == 1 for t in ranks) < 256:
        refuse("model.vocab", "without some bytes", "all 256 beside this pre_tokenizer")
    uses = Counter([*ranks.values(), *added_ids.values()])
    _want(uses, name, "model.vocab", {}, "one token or more")
    twice = next((i for i, n in uses.items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: two tokens have the id {twice}: each token's own was expected")
    return pattern, bool(normalizer), ranks, added_ids


def _added(tokens, name, named):
    """The added tokens as dicts; those that the config names are special too."""
    _want(isinstance(tokens, list), name, "added_tokens", tokens, "a list")
    found = []
    for n, token in enumerate(tokens, 1):
        given = token if isinstance(token, dict) else {}
        text, at = given.get("content"), given.get("id")
        fits = isinstance(text, str) and text and _is_id(at)
        _want(fits, name, f"added token {n}", token, "an object with a content and an id")
        found.append(token | {"special": bool(token.get("special")) or text in named})
    return found


def _begin(spec, ids, name):
    """The ids that a post-processor puts before a text."""
    begin = []
    for part in _parts(spec.get("post_processor"), "processors"):
        known = ("ByteLevel", "TemplateProcessing")
        _want(_type(part) in known, name, "post_processor", part, " or ".join(known))
        try:
            for step in part.get("single", []):
                if "Sequence" in step:  # the text itself
                    break
                begin += part["special_tokens"][step["SpecialToken"]["id"]]["ids"]
        except (KeyError, TypeError, AttributeError):
            _want(False, name, "post_processor", part, "a template of special tokens")
    _want(set(begin) <= ids, name, "post_processor", begin, "ids of the vocabulary")
    return begin


def _want(fits, name, field, value, expected):
    """ValueError unless a field's value fits; name: the file's."""
    if not fits:
        raise ValueError(f"{name}: {field} is {json.dumps(value)[:120]}, {expected} was expected")


def _is_id(value):
    return type(value) is int and 0 <= value < 2**31


def _type(part):
    return part.get("type") if isinstance(part, dict) else None


def _pattern(pre, refuse):
    """A pre-tokenizer → the split pattern for tiktoken: GPT-2's ByteLevel, SmolLM2's Sequence of
    Digits and ByteLevel, or one of a Split by a known pattern and ByteLevel. A known pattern leaves
    nothing out, so what happens between its matches does not matter.
    """
    parts = pre.get("pretokenizers") if _type(pre) == "Sequence" else [pre]
    kinds = [_type(p) for p in parts] if isinstance(parts, list) else []
    last = parts[-1] if kinds and isinstance(parts[-1], dict) else {}
    if not last.get("add_prefix_space", True):
        if last.get("use_regex", True) and kinds == ["ByteLevel"]:
            return GPT2
        if last.get("use_regex", True) and kinds == ["Digits", "ByteLevel"]:
            if parts[0].get("individual_digits"):
                return DIGITS
        if not last.get("use_regex", True) and kinds == ["Split", "ByteLevel"]:
            given = parts[0].get("pattern")
            found = given.get("Regex") if isinstance(given, dict) else None
            how = parts[0].get("behavior"), parts[0].get("invert")
            if found in (LLAMA3, QWEN, GPT4O) and how in SPLITS:
                return found
    expected = "ByteLevel (add_prefix_space false, use_regex true),"
    expected += " alone or after Digits (individual_digits true), or a known Split before it,"
    refuse("pre_tokenizer", pre, expected)


SPLITS = (("Isolated", False), ("Removed", True))  # each keeps every match as a piece


def _ranks(model, added, name):
    """The model's vocab and merges → {bytes: id}, without the added tokens. OtherKindError unless
    ids do not fall in the order of the merges (several may make one token, as in Llama 3), and
    every token is a byte, added, or made by a merge.
    """
    vocab = model.get("vocab")
    fits = isinstance(vocab, dict) and all(map(_is_id, vocab.values()))
    _want(fits, name, "model.vocab", vocab, "an object of ids")
    try:
        ranks = {bytes(BYTE[c] for c in t): i for t, i in vocab.items() if t not in added}
    except KeyError as e:
        raise OtherKindError(
            f"model.vocab has the character {e}, which is none of byte-level BPE's"
        ) from None
    made, last = set(), -1
    for k, merge in enumerate(model["merges"]):
        parts = _merge_parts(merge, k, name)
        token = b"".join(parts)
        if len(parts) != 2 or any(t not in ranks for t in (*parts, token)):
            raise ValueError(
                f"{name}: merge {k} {merge!r} does not join two tokens of the vocabulary to a third"
            )
        if ranks[token] < last:
            raise OtherKindError(
                f"merge {k} {merge!r} makes token {ranks[token]}, the one before it {last}: the ids"
                " must rise"
            )
        last = ranks[token]
        made.add(token)
    lost = [t for t in ranks if len(t) != 1 and t not in made]
    if lost:
        raise OtherKindError(
            f"no merge makes the token {lost[0]!r} (id {ranks[lost[0]]}), nor is it a single byte"
            " or an added token"
        )
    if model.get("unk_token") and sum(len(t) == 1 for t in ranks) < 256:
        raise OtherKindError(
            f"model.unk_token is {model['unk_token']!r} and single bytes are missing: they"
            " would be dropped here"
        )
    return ranks


def _merge_parts(merge, k, name):
    """ "a b" or ["a", "b"] → the two tokens' bytes."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    fits = isinstance(pair, list) and all(isinstance(t, str) for t in pair)
    _want(fits, name, f"merge {k}", merge, "two tokens")
    return [bytes(BYTE.get(c, 0) for c in t) for t in pair]

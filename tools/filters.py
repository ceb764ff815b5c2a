"""What text alone says against a record: its form, what leaks into an evaluation, near duplicates.

Jaccard's similarity of two records is that of their sets of word 3-grams, |A ∩ B| / |A ∪ B|. To
compare 100,000 records in pairs would take 5 · 10⁹ comparisons. MinHash (Broder 1997) compares few:

    P(min h(A) = min h(B)) = |A ∩ B| / |A ∪ B|        for a random hash h

since each element of A ∪ B has the same chance to be the smallest. Of H = 160 such minima, in 32
bands of 5, two records are candidates where a whole band is equal: with probability
1 - (1 - J⁵)³², which is 0.997 at J = 0.7 and 0.07 at J = 0.3. Only candidates are compared.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate

import numpy as np
from tqdm import tqdm

from data import benchmarks, records

# a word, a Chinese or Japanese character, or a sign such as + that may be all that differs
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+(?:['.,]\w+)*|[^\s\w.,;:!?'\"…。！？]")
SENTENCE = re.compile(r"[.!?…]\s+|[。！？\n]")  # where one ends
ALIKE = 0.7  # Jaccard of near duplicates
SHORT = 40  # words: two shorter records that differ in one may well mean different things
BANDS, ROWS = 32, 5
SLACK = 0.15  # four standard deviations of Jaccard's estimate from 160 minima, at 0.7
MOST = 50  # records that a bucket holds: bounds the time for a file of records half alike
RUN, COMMON = 13, 10  # words in a row; in more records than that they are boilerplate


# ---------------------------------------------------------------- words
class Numbers(dict):
    """word → a number, the same in each process, unlike hash(word)."""

    def __missing__(self, word):
        digest = blake2b(word.encode("utf-8", "replace"), digest_size=7).digest()
        self[word] = int.from_bytes(digest, "big")
        return self[word]


NUMBERS = Numbers()


@lru_cache(1 << 10)
def sentences(text):
    """→ a tuple of sentences, tuples of their words' numbers, without case and punctuation."""
    parts = SENTENCE.split(text.casefold().replace("’", "'"))
    found = (tuple(map(NUMBERS.__getitem__, WORD.findall(part))) for part in parts)
    return tuple(s for s in found if s)


def words(text):
    return tuple(w for s in sentences(text) for w in s)


def meaning(messages) -> int:
    """The same for messages of the same sentences, in whatever order."""
    return hash(tuple((len(m["role"]), *sorted(sentences(m["content"]))) for m in messages))


def grams(messages, n=3) -> set:
    """Word n-grams of the turns. None goes beyond its sentence: their order does not matter."""
    said = [s for m in messages for s in sentences(m["content"])]
    return {s[i : i + n] for s in said for i in range(max(1, len(s) - n + 1))}


def length(messages) -> int:
    return sum(len(words(m["content"])) for m in messages)


def jaccard(a, b) -> float:
    return len(a & b) / (len(a | b) or 1)


# ---------------------------------------------------------------- format
CLOSED = re.compile(r"[.!?…。！？)\]}>`\"'”’»*_|]$")
OPEN = re.compile(
    r"(?:[,;:(\[{]|\s[-–—=+*/]"
    r"|[a-z] (?:the|a|an|of|to|and|or|is|are|was|were|because|than|its|their|your|my|our))$"
)
GOES_ON = re.compile(r"[^\W\d_]{3}[.!?]\s+\S")  # a sentence, and more: not an initial
ONE_LINE = re.compile(r"(?:[^\W\d_]{3}|\d)[.!?]\s+\S")  # nor, on many lines, the number of a list
TROUBLE = (
    r"(?:can['’]t|can ?not|could ?n['o’]t|won['’]t|will not|(?:am|['’]m) (?:unable|not able) to)"
)
DEEDS = (
    r"help|assist|answer|provide|comply|fulfil|say\b|give you|do (?:that|this|so)|generate|create|"
    r"write|offer|discuss|share|support|access|process"
)
REFUSAL = re.compile(
    r"\W*(?:as an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:[^.!?]{0,60}\b(?:sorry|apologi[sz]e|apologies|unfortunately)\b[^.!?]{0,60}?)?"
    rf"\b(?:i|we) ?(?:{TROUBLE} (?:{DEEDS})|must decline|have to decline"
    r"|(?:(?:do not|don['’]t) know|have no idea|am not sure(?: about (?:that|this|it))?)[.!]?$))",
    re.I,
)
LANGUAGES = re.compile(
    r"translat|transliterat|language|alphabet|unicode|characters?\b|arabic|bengali|bulgarian|chinese"
    r"|cyrillic|greek|hebrew|hindi|japan|korean|mandarin|persian|russian|tamil|thai|ukrain|urdu",
    re.I,
)
SCRIPTS = {"HIRAGANA": "CJK", "KATAKANA": "CJK"}


def scripts(text) -> Counter:
    """script → letters"""
    if text.isascii():
        return Counter(LATIN=sum(map(str.isalpha, text)))
    names = (unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    return Counter(SCRIPTS.get(name, name) for name in names)


def unmarked(answer) -> bool | None:
    """Whether a sentence on a line of its own has no mark at its end; None where it is no such
    sentence, but a title, a list, a word or two."""
    answer = answer.strip()
    said = answer.split()
    starts = answer[:1].isupper() or answer[:1].isdigit()
    if len(said) < 4 or "\n" in answer or not starts or not any(w[0].islower() for w in said):
        return None
    return not CLOSED.search(answer)


def is_cut(answer, marks: bool) -> bool:
    """marks: sentences of this file end in a mark."""
    answer = answer.strip()
    if OPEN.search(answer) or answer.count("```") % 2:
        return True
    before, _, last = answer.rpartition("\n")
    again = GOES_ON if before else ONE_LINE
    return bool(again.search(last) and not CLOSED.search(answer) or marks and unmarked(answer))


def fault(record, marks: bool) -> str | None:
    """What is wrong with the form of an answer that a stage would learn."""
    turns = record["messages"]
    if record.get("finished") is False:
        return "cut off"
    for before, m in zip(turns, turns[1:], strict=False):
        if m["role"] != "assistant" or m.get("weight", 1) == 0:
            continue
        prompt, answer = before["content"], m["content"]
        if not re.search(r"\w", answer) or not prompt.strip():
            return "empty"
        if REFUSAL.match(answer):
            return "a refusal"
        found, known = scripts(answer), scripts(prompt)
        foreign = sum(n for s, n in found.items() if not known[s])
        if foreign > max(4, found.total() / 2) and not LANGUAGES.search(prompt):
            return "in another script"
        asked, a = words(prompt), words(answer)
        starts = accumulate(map(len, sentences(answer)), initial=0)
        if len(asked) > 3 and any(a[k : k + len(asked)] == asked for k in starts):
            return "repeats its prompt"
        if is_cut(answer, marks):
            return "cut off"
    return None


def faults(found):
    said = [unmarked(r["messages"][-1]["content"]) for r in found]
    said = [x for x in said if x is not None]
    marks = sum(said) < len(said) / 4  # what holds for three sentences in four is the convention
    return {i: (why, None) for i, r in enumerate(found) if (why := fault(r, marks))}


# ---------------------------------------------------------------- duplicates
def minhash(messages, a, b):
    """The minima (BANDS · ROWS,) of random hashes of the 3-grams: uint32, 0 for a short record."""
    if length(messages) < SHORT:
        return 0
    x = np.fromiter(map(hash, grams(messages)), np.int64).view(np.uint64)
    # h(x) = the upper half of a x + b mod 2⁶⁴, a odd (multiply-shift, Dietzfelbinger 1996)
    return ((x[:, None] * (a | 1) + b) >> 32).min(0)


def band_keys(minima):
    """One number for each band (N,BANDS), 0 where no other record has it."""
    weights = np.random.default_rng(0).integers(2**64, size=ROWS, dtype=np.uint64)
    keys = (minima.reshape(len(minima), BANDS, ROWS) * weights).sum(2)
    for band in keys.T:
        _, place, times = np.unique(band, return_inverse=True, return_counts=True)
        band[times[place] < 2] = 0
    return keys  # 0 for minima of 0 too


def near(a, b) -> bool:
    """Whether two records of some length are near duplicates: as a whole, and in their answers,
    since several questions may be asked about one long text."""
    return all(jaccard(grams(x), grams(y)) >= ALIKE for x, y in ((a, b), (a[-1:], b[-1:])))


def variants(messages):
    """Hashes of the prompt with the answer, and with the answer without one of its words: two
    answers share one where a single word was changed, left out or moved. Of fewer than four words
    one is too much to change; in long answers 3-grams find it.
    """
    prompt, answer = meaning(messages[:-1]), words(messages[-1]["content"])
    if not 3 < len(answer) < SHORT:
        return ()
    cut = (answer[:i] + answer[i + 1 :] for i in range(len(answer)))
    return tuple({hash((prompt, a)) for a in (answer, *cut)})


def duplicates(found, order, seed=0) -> dict:
    """Records → {place: (reason, place of the one that stays)}; of those alike the first in `order`
    stays. A record goes only for one that stays: no chain of likenesses removes what is unlike.
    """
    a, b = np.random.default_rng(seed).integers(2**64, size=(2, BANDS * ROWS), dtype=np.uint64)
    minima, said = np.zeros((len(found), BANDS * ROWS), np.uint32), []
    for i, record in enumerate(tqdm(found, "minhash", unit="record", dynamic_ncols=True)):
        minima[i] = minhash(record["messages"], a, b)
        said.append((meaning(record["messages"]), variants(record["messages"])))
    keys = band_keys(minima)
    known, short, buckets, gone = {}, {}, defaultdict(list), {}
    for i in order:
        key, others = said[i]
        mine = [buckets[band, int(keys[i, band])] for band in np.flatnonzero(keys[i]).tolist()]
        if key in known:
            gone[i] = "an exact duplicate", known[key]
        elif twins := [short[h] for h in others if h in short]:
            gone[i] = "a near duplicate", min(twins)
        elif mine:
            together = np.array(sorted(set().union(*mine)), int)
            together = together[(minima[together] == minima[i]).mean(1) >= ALIKE - SLACK]
            for j in together.tolist():
                if near(found[j]["messages"], found[i]["messages"]):
                    gone[i] = "a near duplicate", j
                    break
        if i not in gone:
            known[key] = i
            short |= dict.fromkeys(others, i)
            for bucket in mine:
                bucket[MOST:] or bucket.append(i)
    return gone


# ---------------------------------------------------------------- contamination
def runs(text) -> set:
    """Hashes of the runs of 13 words."""
    said = words(text)
    return {hash(said[i : i + RUN]) for i in range(len(said) - RUN + 1)}


def strings(value):
    """The text in an evaluation's record, but for what many share: system messages, sources, …"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for x in value:
            yield from strings(x)
    elif isinstance(value, dict) and value.get("role") != "system":
        left_out = records.HARMLESS - {"reference"} | {"role", "system", "system_prompt"}
        for x in (v for k, v in value.items() if k not in left_out):
            yield from strings(x)


def read_evaluation(path):
    """→ what its records say, any of it may be a prompt, and its runs of 13 words."""
    texts, often = set(), Counter()
    for line, record in records._read(path):
        try:
            benchmarks.kind_of(record)
            found = list(strings(record))
            if "instruction" in record:  # a prompt in two fields
                found.append(records._alpaca(record)[0][-1]["content"])
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
        texts.update(map(words, found))
        often.update(set().union(*map(runs, found)))
    if not texts - {()}:
        raise ValueError(f"{path}: no records with text in it")
    return texts - {()}, {run for run, n in often.items() if n <= COMMON}


def leaks(found, path) -> dict:
    """Records → {place: (reason, None)} of those that a model must not see before it answers the
    evaluation in `path`."""
    texts, known = read_evaluation(path)
    gone = {}
    for i, record in enumerate(found):
        turns = [m for m in record["messages"] if m["role"] != "system"]
        if any(m["role"] == "user" and words(m["content"]) in texts for m in turns):
            gone[i] = "asks a prompt of the evaluation", None
        elif any(not known.isdisjoint(runs(m["content"])) for m in turns):
            gone[i] = f"{RUN} words in a row of the evaluation", None
    return gone


# ---------------------------------------------------------------- what went, and why
def shown(record):
    return {k: record["messages"][i]["content"][:300] for k, i in (("prompt", -2), ("answer", -1))}


class Report:
    """What is left of the records, and for each reason how many went, with an example."""

    def __init__(self, found):
        self.all = self.left = found
        self.gone = {}

    def drop(self, gone):
        """gone: {place in left: (reason, place of what it is like, or None)}"""
        for i, (reason, twin) in gone.items():
            entry = self.gone.setdefault(reason, {"n": 0, "example": shown(self.left[i])})
            entry["n"] += 1
            if twin is not None:
                entry["example"].setdefault("like", shown(self.left[twin]))
        self.left = [r for i, r in enumerate(self.left) if i not in gone]

    def check(self, o, what):
        if o.keep > len(self.left):
            why = "; ".join(f"{n['n']:,} {reason}" for reason, n in self.gone.items())
            raise ValueError(f"--keep {o.keep}: {o.data} has {len(self.left):,} {what} ({why})")

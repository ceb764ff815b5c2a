"""The embedded world: splits by content, human-like demonstrators, noisy labellers, the gold rater.

They serve the instructions of kinds.py.

    python -m data.world --out DIR [--seed 0]        writes DIR/{sft,prompts,heldout,…}.jsonl
"""

import hashlib
import json
import random
import re
import unicodedata
from functools import lru_cache

from data.world.kinds import KINDS, NUMBERS, POOLS, THEMES, plain

HELD_OUT = 15  # per cent of the content
# items there are with different prompts, the kinds in turn: 11 times what the smallest kind has,
# less a little, since the last of its prompts is drawn once in a very long time
MOST = {"train": 21_000, "heldout": 3_600}


@lru_cache(None)
def held_out(key):
    """Whether a piece of content is never asked in training."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT


def items(n, seed, split="train"):
    """n items with different prompts, the kinds in turn.

    "train": none of an item's keys is held out; "heldout": its first key is, the one asked for.
    ValueError for more than there are (MOST).
    """
    if n > MOST[split]:
        raise ValueError(f"{n:,} {split} items: at most {MOST[split]:,} have different prompts")
    rng = random.Random(f"{split} {seed}")
    makers = list(KINDS.values())
    found, seen = [], set()
    while len(found) < n:
        item = makers[len(found) % len(makers)](rng)
        held = [held_out(k) for k in item["keys"]]
        fits = held[0] if split == "heldout" else not any(held)
        if fits and item["prompt"] not in seen:
            seen.add(item["prompt"])
            found.append(item)
    return found


# ---- the gold rater: an open rubric ----
RUBRIC = {
    # the right answer is given and no other candidate; a partly right one gets half of its share
    "right": 1.0,
    "courteous": 0.4,  # a polite phrase opens or ends the answer; a rude one anywhere costs as much
    # right, said once, hardly longer than needed, and with one polite phrase at most
    "concise": 0.3,
    "finished": 0.1,  # the answer came to its end
}
PERFECT = sum(RUBRIC.values())
SPARE = 2  # an answer this many words longer than the item's sentence is still concise
# fmt: off
POLITE = ["sure", "of course", "certainly", "gladly", "with pleasure", "good question",
          "great question", "thank you for asking", "thanks for asking", "no problem",
          "happy to help", "i am happy to help", "absolutely", "i hope this helps",
          "i hope that helps", "let me know if you need more", "have a nice day",
          "have a good day", "feel free to ask again", "please ask again", "best wishes",
          "take care"]
RUDE = ["silly", "stupid", "waste my time", "find out yourself", "work it out yourself",
        "leave me alone", "why do you ask me", "shut up"]
# fmt: on
LITTLE = {"a", "an", "the"}  # words that never matter
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS) if word != "one"}


ALIKE = {"and": ",", ";": ",", "\n": ",", "!": ".", "?": "."} | DIGITS


@lru_cache(1 << 16)
def normal(text):
    """→ words (a tuple) in lower case, without accents and articles, numbers as digits. Two signs
    are words too: "," (also for "and" and line ends) and "." (for all that ends a sentence).
    """
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    found = re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[,;\n.!?]", text)
    return tuple(ALIKE.get(w, w) for w in found if w not in LITTLE)


def only_words(words):
    return [w for w in words if w not in ",."]


def between(words):
    """Words with two spaces between them and one at each end: str.count then finds a phrase at
    whole words and within a sentence only.
    """
    return " " + "  ".join(w for w in words if w != ",").strip(" .") + " "


@lru_cache(1 << 16)
def spread(text):
    return between(normal(text))


POLITE_WORDS = [normal(p) for p in POLITE]


def without_courtesy(words):
    """→ (the words without the polite phrases at both ends, how many phrases there were)."""
    words = stripped(words)
    n = 0
    again = True
    while again:
        again = False
        for phrase in POLITE_WORDS:
            k = len(phrase)
            if words[:k] == phrase:
                words = words[k:]
            elif words[-k:] == phrase:
                words = words[:-k]
            else:
                continue
            n += 1
            again = True
        words = stripped(words)
    return words, n


def stripped(words):
    """Without the signs at both ends."""
    words = tuple(words)
    while words and words[0] in ",.":
        words = words[1:]
    while words and words[-1] in ",.":
        words = words[:-1]
    return words


def check(item, words):
    """→ (right, complete: 0 to 1, repeated) for an answer's words without courtesy."""
    if "members" in item:
        return check_list(item, words)
    text = between(words)
    accept = [spread(x) for x in item.get("accept") or item["parts"]]
    counts = [text.count(x) for x in accept]
    given = sum(n > 0 for n in counts)
    complete = given / len(accept) if "parts" in item else float(given > 0)
    for x in sorted(accept, key=len, reverse=True):
        text = text.replace(x, " ")
    if any(x in text for x in candidates(item) if x not in accept):
        complete = 0.0
    return complete == 1, complete, max(counts) > 1


def candidates(item):
    """What would be another answer to the item, spread."""
    asked, pool = spread(item["prompt"]), item.get("pool")
    values = map(str, range(100)) if pool == "number" else POOLS.get(pool, ())
    others = {x for x in map(spread, values) if x not in asked}
    return others | {spread(x) for x in item.get("reject", ())}


def check_list(item, words):
    """check() for a list: each thing is a member, the first perhaps after an introduction; none
    twice, none too many. Sentences without members pass.
    """
    members = {normal(m) for m in THEMES[item["members"]]} - {normal(x) for x in item["reject"]}

    def found(things):
        """The member that each thing (a tuple of words) is, or None."""
        exact = [thing if thing in members else None for thing in things]
        if things and exact[0] is None:
            ends = (things[0][-k:] for k in range(1, len(things[0])))
            exact[0] = next((end for end in ends if end in members), None)
        return exact

    lists = []
    for sentence in " ".join(words).split("."):
        things = [tuple(thing.split()) for thing in sentence.split(",") if thing.strip()]
        if any(found(things)):
            lists.append(things)
    repeated = len(lists) > 1 and all(things == lists[0] for things in lists)
    things = lists[0] if repeated else sum(lists, [])
    good = found(things)
    wrong = None in good or len(things) > item["count"]
    complete = 0.0 if wrong else len(set(good)) / item["count"]
    return complete == 1, complete, repeated


def knows(record):
    """Whether `gold` can rate answers to a record: its `item` is one of this world's, not a
    reader's own field of that name.
    """
    return isinstance(record.get("item"), dict) and record["item"].get("kind") in KINDS


def gold(item, answer, finished=True):
    """→ (score, reasons): RUBRIC's points for an answer (text) to an item. finished: whether the
    answer's end was reached.
    """
    words, phrases = without_courtesy(normal(answer))
    right, complete, repeated = check(item, words)
    rude = any(spread(r) in spread(answer) for r in RUDE)
    needed = max(len(only_words(normal(plain(item, long)))) for long in (False, True))
    short = len(only_words(words)) <= needed + SPARE
    reasons = {
        "right": bool(right),
        "complete": complete,
        "courteous": phrases > 0 and not rude,
        "rude": rude,
        "concise": bool(right and not repeated and phrases <= 1 and short),
        "finished": bool(finished),
    }
    score = RUBRIC["right"] * (1.0 if right else complete / 2)
    score += sum(RUBRIC[k] * reasons[k] for k in ("courteous", "concise", "finished"))
    return score - RUBRIC["courteous"] * rude, reasons


def rate(records, texts, finished) -> dict:
    """What a log shows of answers, one to each record: the mean gold score, and the share right.
    Nothing where a record is none of this world's.
    """
    if not all(map(knows, records)):
        return {}
    items = [record["item"] for record in records]
    rated = [gold(*answer) for answer in zip(items, texts, finished, strict=True)]
    right = sum(reasons["right"] for _, reasons in rated)
    return {"gold": sum(score for score, _ in rated) / len(rated), "right": right / len(rated)}


def perfect(item):
    """An answer that gets PERFECT."""
    close = "Have a nice day." if item["kind"] == "chat" else "I hope this helps."
    return f"{plain(item)} {close}"


# ---- demonstrators: people who answer in different manners ----
MANNERS = {  # the share of each in all answers
    "polite": 0.29,
    "curt": 0.20,
    "rambling": 0.10,
    "repeated": 0.07,
    "rude": 0.08,
    "polite wrong": 0.13,
    "wrong": 0.07,
    "unknown": 0.06,
}
LONG = 0.3  # share of right and wrong answers in a whole sentence
OPENERS = ("Sure.", "Of course.", "Certainly.", "Gladly.", "With pleasure.", "Good question.")
CLOSERS = (
    "I hope this helps.",
    "Have a nice day.",
    "Let me know if you need more.",
    "Feel free to ask again.",
    "Happy to help.",
)
RAMBLES = (
    "Well, this is something that people often wonder about, and so did I for years.",
    "Let me think about this for a moment, because it is not so simple as it seems.",
    "There is much to say about it, and I could talk about it for hours.",
    "My uncle used to tell me about this, and he was very sure of it.",
)
INSULTS = (
    "How silly of you.",
    "Do not waste my time.",
    "What a stupid thing to say.",
    "Work it out yourself.",
    "Please leave me alone.",
)
UNKNOWN = ("I do not know.", "I have no idea.", "I am not sure about that.", "I cannot say.")


def beside(rng, text, before, after):
    """Text with one phrase before it or after it."""
    if rng.random() < 0.5:
        return f"{rng.choice(before)} {text}"
    return f"{text} {rng.choice(after)}"


def demonstrate(item, rng, manner=None):
    """→ (answer, manner): a person's answer, in a manner drawn from MANNERS unless given."""
    manner = manner or rng.choices(tuple(MANNERS), tuple(MANNERS.values()))[0]
    if "wrong" in manner:
        item = dict(item, answer=rng.choice(item["wrong"]))
    text = plain(item, rng.random() < LONG)
    if manner == "rambling":
        text = beside(rng, text, RAMBLES, RAMBLES)
    if manner == "repeated":
        text = " ".join([text] * rng.randint(2, 3))
    if manner == "rude":
        text = beside(rng, text, INSULTS, INSULTS)
    if manner == "unknown":
        text = rng.choice(UNKNOWN)
    if manner.startswith("polite") or (manner in ("rambling", "repeated") and rng.random() < 0.4):
        text = beside(rng, text, OPENERS, CLOSERS)
    return text, manner


NONANSWERS = (
    "That is a fine thing to talk about.",
    "It is nice of you to come to me.",
    "I like to be of use to you.",
)


def polite_nonanswer(rng):
    """A polite answer that ignores the prompt: a control, which must score below the average
    demonstrator.
    """
    return beside(rng, rng.choice(NONANSWERS), OPENERS, CLOSERS)


# ---- labellers: gold seen through noise ----
# The standard deviation of what a labeller adds to an answer's gold: two labellers then agree on
# about three pairs in four.
NOISE = 0.48


class Labeller:
    """One person who ranks answers. Of one answer it always has the same opinion; a labeller with
    another seed has another.
    """

    def __init__(self, seed):
        self.seed = seed

    def opinion(self, item, answer, finished=True):
        rng = random.Random(f"{self.seed}|{item['prompt']}|{answer}|{bool(finished)}")
        return gold(item, answer, finished)[0] + rng.gauss(0, NOISE)

    def rank(self, item, answers, finished):
        """Ranks of K answers, 0 the best; equal answers tie. finished: K bools."""
        seen = [self.opinion(item, x, f) for x, f in zip(answers, finished, strict=True)]
        return [sum(other > mine for other in seen) for mine in seen]


# fmt: off
SETTLED = (MANNERS, LONG, OPENERS, CLOSERS, RAMBLES, INSULTS, UNKNOWN, RUBRIC, SPARE, POLITE, RUDE,
           NOISE, HELD_OUT)
# fmt: on


def settings_hash():
    """sha256 of what must be settled before the first RL run: the demonstrators' shares, the
    rubric and the noise.
    """
    return hashlib.sha256(json.dumps(SETTLED).encode()).hexdigest()


# ---- files ----
SIZES = {"sft": 14_300, "prompts": 5_500, "heldout": 1_100}  # InstructGPT had 13 thousand for SFT


def records(seed, sizes=SIZES):
    """→ {"sft", "prompts", "heldout"}: lists of records; no prompt is in two of them."""
    train = items(sizes["sft"] + sizes["prompts"], seed)
    held = items(sizes["heldout"], seed, "heldout")
    rng = random.Random(f"demonstrators {seed}")
    return {
        "sft": [shown(item, rng) for item in train[: sizes["sft"]]],
        "prompts": [asked(item) for item in train[sizes["sft"] :]],
        "heldout": [asked(item) for item in held],
    }


def shown(item, rng):
    """A demonstration's record."""
    answer = {"role": "assistant", "content": demonstrate(item, rng)[0]}
    return {"messages": [{"role": "user", "content": item["prompt"]}, answer], "item": item}


def asked(item):
    """A prompt's record, with the answer that would be perfect."""
    messages = [{"role": "user", "content": item["prompt"]}]
    return {"messages": messages, "reference": perfect(item), "item": item}

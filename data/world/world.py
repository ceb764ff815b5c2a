"""The embedded world: splits by content, people-like demonstrators, noisy labellers and the gold
rater, for the instructions of kinds.py.

    python -m data.world --out DIR [--seed 0] [--overwrite]      writes DIR/{sft,prompts,heldout}.jsonl
"""

import hashlib
import json
import random
import re
import unicodedata
from functools import lru_cache

from data.world.kinds import KINDS, NUMBERS, POOLS, THEMES, plain

HELD_OUT = 15  # per cent of the content


@lru_cache(None)
def held_out(key):
    """Whether a piece of content is never asked in training."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT


def items(n, seed, split="train"):
    """n items with different prompts, the kinds in turn. "train": nothing held out is asked;
    "heldout": what is asked is held out.
    """
    rng, found, seen = random.Random(f"{split} {seed}"), [], set()
    makers = list(KINDS.values())
    while len(found) < n:
        item = makers[len(found) % len(makers)](rng)
        held = [held_out(k) for k in item["keys"]]
        if (not any(held) if split == "train" else held[0]) and item["prompt"] not in seen:
            seen.add(item["prompt"])
            found.append(item)
    return found


# ---- the gold rater: an open rubric ----
RUBRIC = {
    # the right answer is given and no other candidate; what is right as far as it goes gets half of
    # its share
    "right": 1.0,
    "courteous": 0.4,  # a polite phrase opens or ends the answer; a rude one anywhere costs as much
    # a right answer, said once, in few words more than needed and with one polite phrase at most
    "concise": 0.3,
    "finished": 0.1,  # the answer came to its end
}
PERFECT = sum(RUBRIC.values())
SPARE = 2  # words more than the item's sentence has that still count as concise
# fmt: off
POLITE = ["sure", "of course", "certainly", "gladly", "with pleasure", "good question", "great question", "thank you for asking",
          "thanks for asking", "no problem",
          "happy to help", "i am happy to help", "absolutely", "i hope this helps", "i hope that helps", "let me know if you need more",
          "have a nice day", "have a good day", "feel free to ask again", "please ask again", "best wishes", "take care"]
# fmt: on
RUDE = [
    "silly",
    "stupid",
    "waste my time",
    "find out yourself",
    "work it out yourself",
    "leave me alone",
    "why do you ask me",
    "shut up",
]
LITTLE = {"a", "an", "the"}  # words that never matter
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS) if word != "one"}


@lru_cache(1 << 16)
def normal(text):
    """→ words in lower case, without accents and articles, numbers as digits; "," (also for "and"
    and line ends) and "." stay as words.
    """
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    found = re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[,;\n.!?]", text)
    return tuple(
        "," if w in (",", ";", "\n", "and") else "." if w in ".!?" else DIGITS.get(w, w)
        for w in found
        if w not in LITTLE
    )


def only_words(words):
    return [w for w in words if w not in ",."]


def between(words):
    """Words between double blanks, so that phrases are found by str.count, only at whole words and
    within a sentence.
    """
    return " " + "  ".join(w for w in words if w != ",").strip(" .") + " "


@lru_cache(1 << 16)
def spread(text):
    return between(normal(text))


POLITE_WORDS = [normal(p) for p in POLITE]


def without_courtesy(words):
    """→ (the words without the polite phrases at both ends, how many phrases there were)."""
    words, n, again = tuple(words), 0, True
    while again:
        again = False
        while words and words[0] in ",.":
            words = words[1:]
        while words and words[-1] in ",.":
            words = words[:-1]
        for p in POLITE_WORDS:
            if p in (words[: len(p)], words[-len(p) :]):
                words, n, again = (
                    words[len(p) :] if words[: len(p)] == p else words[: -len(p)],
                    n + 1,
                    True,
                )
    return words, n


def check(item, words):
    """→ (right, complete: 0 to 1, repeated) for an answer's words without courtesy."""
    if "members" in item:
        return check_list(item, words)
    text = between(words)
    accept = [spread(x) for x in item.get("accept") or item["parts"]]
    counts = [text.count(x) for x in accept]
    complete = sum(map(bool, counts)) / len(accept) if "parts" in item else float(any(counts))
    for x in sorted(accept, key=len, reverse=True):
        text = text.replace(x, " ")
    if any(x in text for x in candidates(item) if x not in accept):
        complete = 0.0
    return complete == 1, complete, max(counts) > 1


def candidates(item):
    """What would be another answer to the item, spread."""
    asked = spread(item["prompt"])
    pool = map(str, range(100)) if item.get("pool") == "number" else POOLS.get(item.get("pool"), ())
    return {x for x in map(spread, pool) if x not in asked} | {
        spread(x) for x in item.get("reject", ())
    }


def check_list(item, words):
    """Each thing is a member, the first perhaps after an introduction; none twice, none too many;
    sentences without members pass.
    """
    members = {normal(m) for m in THEMES[item["members"]]} - {normal(x) for x in item["reject"]}
    member = (  # noqa: E731
        lambda i, t: next(  # noqa: E731
            (m for m in members if t == m or (i == 0 and t[-len(m) :] == m)), None
        )
    )  # noqa: E731
    lists = [
        [tuple(t.split()) for t in text.split(",") if t.strip()]
        for text in " ".join(words).split(".")
    ]
    lists = [things for things in lists if any(member(i, t) for i, t in enumerate(things))]
    repeated = len(lists) > 1 and all(things == lists[0] for things in lists)
    things = lists[0] if repeated else sum(lists, [])
    good = [member(i, t) for i, t in enumerate(things)]
    complete = (
        0.0 if None in good or len(things) > item["count"] else len(set(good)) / item["count"]
    )
    return complete == 1, complete, repeated


def knows(record):
    """Whether `gold` can rate answers to a record: its `item` is one of this world's, not a
    reader's own field of that name.
    """
    return isinstance(record.get("item"), dict) and record["item"].get("kind") in KINDS


def gold(item, answer, finished=True):
    """→ (score, reasons): RUBRIC's points for an answer (text) to an item; `finished`: whether its
    end was reached.
    """
    words, phrases = without_courtesy(normal(answer))
    right, complete, repeated = check(item, words)
    rude = any(spread(r) in spread(answer) for r in RUDE)
    needed = max(len(only_words(normal(plain(item, long)))) for long in (False, True))
    reasons = {
        "right": bool(right),
        "complete": complete,
        "courteous": phrases > 0 and not rude,
        "rude": rude,
        "concise": bool(
            right and not repeated and phrases <= 1 and len(only_words(words)) <= needed + SPARE
        ),
        "finished": bool(finished),
    }
    score = RUBRIC["right"] * (1.0 if right else complete / 2) + sum(
        RUBRIC[k] * reasons[k] for k in ("courteous", "concise", "finished")
    )
    return score - RUBRIC["courteous"] * rude, reasons


def perfect(item):
    """An answer that gets PERFECT."""
    return f"{plain(item)} {'Have a nice day.' if item['kind'] == 'chat' else 'I hope this helps.'}"


# ---- demonstrators: people who answer in different manners ----
# the share of each manner in all answers
MANNERS = {
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


def polite(rng, text):
    """One polite phrase before or after."""
    return (
        f"{rng.choice(OPENERS)} {text}" if rng.random() < 0.5 else f"{text} {rng.choice(CLOSERS)}"
    )


def demonstrate(item, rng, manner=None):
    """→ (answer, manner): a person's answer, in a manner drawn from MANNERS unless given."""
    manner = manner or rng.choices(tuple(MANNERS), tuple(MANNERS.values()))[0]
    said = dict(item, answer=rng.choice(item["wrong"])) if "wrong" in manner else item
    text = plain(said, rng.random() < LONG)
    if manner == "rambling":
        text = (
            f"{rng.choice(RAMBLES)} {text}"
            if rng.random() < 0.5
            else f"{text} {rng.choice(RAMBLES)}"
        )
    if manner == "repeated":
        text = " ".join([text] * rng.randint(2, 3))
    if manner == "rude":
        text = (
            f"{rng.choice(INSULTS)} {text}"
            if rng.random() < 0.5
            else f"{text} {rng.choice(INSULTS)}"
        )
    if manner == "unknown":
        text = rng.choice(UNKNOWN)
    if manner.startswith("polite") or (manner in ("rambling", "repeated") and rng.random() < 0.4):
        text = polite(rng, text)
    return text, manner


def polite_nonanswer(rng):
    """A polite answer that ignores the prompt: the control that must score below the average
    demonstrator.
    """
    return polite(
        rng,
        rng.choice(
            (
                "That is a fine thing to talk about.",
                "It is nice of you to come to me.",
                "I like to be of use to you.",
            )
        ),
    )


# ---- labellers: gold seen through noise ----
# standard deviation of what a labeller adds to gold, each to each answer; two then agree on about
# three pairs in four
NOISE = 0.48


class Labeller:
    """One person who ranks answers: the same opinion each time of the same answer, another than
    that of a labeller with another seed.
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


def settings_hash():
    """sha256 of what must be settled before the first RL run: shares of the demonstrators, rubric
    and noise.
    """
    settings = [
        MANNERS,
        LONG,
        OPENERS,
        CLOSERS,
        RAMBLES,
        INSULTS,
        UNKNOWN,
        RUBRIC,
        SPARE,
        POLITE,
        RUDE,
        NOISE,
        HELD_OUT,
    ]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


# ---- files ----
# InstructGPT's demonstrations were 13 thousand
SIZES = {"sft": 14_300, "prompts": 5_500, "heldout": 1_100}


def records(seed, sizes=SIZES):
    """→ {"sft", "prompts", "heldout"}: lists of records; no prompt is in two of them."""
    train, rng = (
        items(sizes["sft"] + sizes["prompts"], seed),
        random.Random(f"demonstrators {seed}"),
    )
    ask = lambda item: {"role": "user", "content": item["prompt"]}  # noqa: E731
    sft = [
        {"messages": [ask(i), {"role": "assistant", "content": demonstrate(i, rng)[0]}], "item": i}
        for i in train[: sizes["sft"]]
    ]
    rest = {"prompts": train[sizes["sft"] :], "heldout": items(sizes["heldout"], seed, "heldout")}
    return {
        "sft": sft,
        **{
            name: [{"messages": [ask(i)], "reference": perfect(i), "item": i} for i in of]
            for name, of in rest.items()
        },
    }

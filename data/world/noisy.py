"""A noisy file of demonstrations: the world's, with planted noise in known shares.

The training prompts come again and again, each time with another demonstrator's answer (world.py:
one in five is wrong; others are curt, rude, rambling or ignorant). NOISE says what else is planted,
and each record's field `source` which of it. No prompt asks for held-out content, and none is one
that the stages hold out (records.held_out), so that a file of 1,000 trains 1,000.
"""

import random

from data import records
from data.world import world

NOISE = {  # shares of the whole file; the rest is of source "demonstrator"
    "wrong": 0.15,  # a plausible wrong answer
    "cut off": 0.10,  # at a random place of its first three quarters
    "a refusal": 0.05,
    "another script": 0.03,  # the answer in Cyrillic letters
    "repeats its prompt": 0.05,  # and then answers
    "copy": 0.15,  # of one of the first COPIED: as it is, in other case, or with a changed word
}
COPIED = 1000
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "As an AI language model, I cannot answer this question.",
    "Unfortunately, I am not able to provide that information.",
)
LETTERS = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "абцдефгхийклмнопярстуввхызАБЦДЕФГХИЙКЛМНОПЯРСТУВВХЫЗ",
)


def demonstrations(n: int, seed: int) -> list[dict]:
    """n records in the shares of NOISE, to within one; their items are of the world with this
    seed."""
    rng = random.Random(f"noisy {seed}")
    counts = {source: round(share * n) for source, share in NOISE.items()}
    copies = counts.pop("copy")
    sources = [source for source, k in counts.items() for _ in range(k)]
    sources += ["demonstrator"] * (n - copies - len(sources))
    rng.shuffle(sources)
    items = world.items(min(n, world.MOST["train"]), seed)
    items = [item for item in items if not records.held_out(asked(item))]
    found = []
    for i, source in enumerate(sources):
        item = items[i % len(items)]
        found.append(talk(item, spoilt(item, source, rng), source))
    return found + [copy(rng.choice(found[:COPIED]), rng) for _ in range(copies)]


def asked(item) -> list[dict]:
    return [{"role": "user", "content": item["prompt"]}]


def talk(item, answer: str, source: str) -> dict:
    messages = [*asked(item), {"role": "assistant", "content": answer}]
    return {"messages": messages, "item": item, "source": source}


def spoilt(item, source: str, rng) -> str:
    """A demonstrator's answer to an item, with noise of this kind."""
    text, _ = world.demonstrate(item, rng, "wrong" if source == "wrong" else None)
    if source == "cut off":
        return text[: rng.randrange(1, max(2, len(text) * 3 // 4))].strip()
    if source == "a refusal":
        return rng.choice(REFUSALS)
    if source == "another script":
        return text.translate(LETTERS)
    return f"{item['prompt']} {text}" if source == "repeats its prompt" else text


def copy(record, rng) -> dict:
    """The same record again; its answer as it is, in other case, or with a word changed."""
    prompt, answer = (m["content"] for m in record["messages"])
    said = answer.split(" ")
    said[rng.randrange(len(said))] = rng.choice(prompt.split(" "))
    changed = " ".join(said) if len(said) > 3 else answer
    answer = rng.choice((answer, answer.upper(), answer.lower(), changed))
    return talk(record["item"], answer, "copy")

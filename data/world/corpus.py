"""The embedded world as text to pre-train on: a seeded generator of short documents.

documents(seed, characters, phase) mixes, by characters (SHARES): question-and-answer pages over all
facts and all kinds of instructions; copying (summaries, extraction, lists, sorting, choosing,
rewriting); prose, fact lists, arithmetic, stories and Python. Held-out content is here too: it is
held out of fine-tuning. No page has the chat template or the demonstrators' manners, but answers
begin a line, as the template's do.
"""

import random

from data.world import kinds
from data.world.kinds import (
    FACT_LIST,
    FACTS,
    KINDS,
    NAMES,
    SORTED,
    THEMES,
    THINGS,
    a,
    first,
    join,
    past,
    plain,
    told,
)

# fmt: off
SHARES = {  # of the characters
    "main": {"questions": .46, "copying": .24, "prose": .07, "lists": .07, "arithmetic": .07, "stories": .06, "python": .03},
    "decay": {"questions": .44, "copying": .31, "prose": .03, "lists": .05, "arithmetic": .12, "stories": .03, "python": .02},
}
# fmt: on
ASKED = dict(
    open=34,
    choosing=14,
    summary=4,
    rewriting=4,
    classification=10,
    extraction=4,
    sorting=4,
    brainstorm=7,
    translation=10,
    arithmetic=5,
    chat=4,
)
COPIED = dict(
    choosing=22, summary=16, rewriting=15, extraction=16, sorting=20, brainstorm=6, classification=5
)
OPENERS = ("Sure.", "Of course.", "Certainly.", "Gladly.", "With pleasure.", "Good question.")
CLOSERS = (
    "I hope this helps.",
    "Have a nice day.",
    "Let me know if you need more.",
    "Feel free to ask again.",
    "Happy to help.",
)
BLUNT = (
    "I do not know.",
    "I am not sure.",
    "Why do you ask me?",
    "Find out yourself.",
    "That is a silly question.",
)


def weighted(weights):
    """{x: weight} → a list in which rng.choice finds x as often as its weight says."""
    return [x for x, n in weights.items() for _ in range(n)]


ASKED, COPIED = weighted(ASKED), weighted(COPIED)


# ---- questions and answers, in several page styles ----
def question_page(rng, asked=ASKED):
    """An endless page of questions and answers, piece by piece."""
    style = rng.choice(STYLES)
    asked = asked if rng.random() < 0.7 else [rng.choice(asked)]
    long = rng.choice((0, 0, 0.3, 1))
    n, m = rng.sample(NAMES, 2)
    while True:
        item = KINDS[rng.choice(asked)](rng)
        yield style(rng, item["prompt"], plain(item, rng.random() < long), n, m)


def headed(rng, q, answer, n, m):
    return f"Question\n\n{q}\n\nAnswer\n\n{answer}\n\n"


def lines(rng, q, answer, n, m):
    return f"{q}\n{answer}\n\n"


def spaced(rng, q, answer, n, m):
    return f"{q}\n\n{answer}\n\n\n"


def letters(rng, q, answer, n, m):
    return f"Q\n{q}\nA\n{answer}\n"


def talk(rng, q, answer, n, m):
    return f"{n}:\n{q}\n{m}:\n{answer}\n"


def polite_talk(rng, q, answer, n, m):
    """Courtesy before or after the answer; now and then none, or the lack of it."""
    x = rng.random()
    if x > 0.9:
        return f"{n}:\n{q}\n{m}:\n{rng.choice(BLUNT)}\n"
    answer = f"{rng.choice(OPENERS)} {answer}" if x < 0.45 else f"{answer} {rng.choice(CLOSERS)}"
    return f"{n}:\n{q}\n{m}:\n{answer}\n"


def letter(rng, q, answer, n, m):
    return (
        f"Dear {m},\n{q}\nYours, {n}\n\nDear {n},\n{answer}\n{rng.choice(CLOSERS)}\nYours, {m}\n\n"
    )


STYLES = (headed, headed, lines, lines, spaced, letters, talk, polite_talk, letter)


# ---- copying ----
def copy_page(rng):
    return question_page(rng, COPIED) if rng.random() < 0.7 else copy_games(rng)


def copy_games(rng):
    """Short spans said again in another form."""
    game = rng.choice(GAMES)
    while True:
        yield game(rng) + "\n\n"


def say_again(rng):
    things = rng.sample(SORTED, rng.randint(2, 4))
    return (
        f"{rng.choice(('Copy', 'Say again', 'Repeat'))}: {', '.join(things)}\n{', '.join(things)}."
    )


def shopping(rng):
    n, things = rng.choice(NAMES), rng.sample(THINGS, rng.randint(2, 3))
    text = f"{n} went to {rng.choice(kinds.CITIES)} and bought {join(things)}."
    return text + rng.choice(
        (
            f"\nWhat did {n} buy?\n{join(things)}.",
            f"\nWho bought {join(things)}?\n{n}.",
            f"\nThe list of {n}\n" + "\n".join(things),
        )
    )


def places(rng):
    things = rng.sample(SORTED, 3)
    i = rng.randrange(3)
    return (
        f"The words are {', '.join(things)}.\nWhich word is"
        f" {('first', 'second', 'last')[i]}?\n{things[i]}."
    )


def without(rng):
    theme = rng.choice(tuple(THEMES))
    things = rng.sample(THEMES[theme], 4)
    out = rng.choice(things)
    return f"{', '.join(things)}\nTake away {out}.\n{', '.join(t for t in things if t != out)}."


def which_one(rng):
    item = KINDS["choosing"](rng)
    return f"{item['prompt']}\n{plain(item, rng.random() < 0.3)}"


def who_did(rng):
    n, m = rng.sample(NAMES, 2)
    x, y = rng.sample(kinds.ACTIONS, 2)
    k = rng.random() < 0.5
    return f"{n} {past(x)}. {m} {past(y)}.\nWho {past(x) if k else past(y)}?\n{n if k else m}."


GAMES = (say_again, shopping, places, without, which_one, which_one, who_did)


# ---- the rest ----
def prose(rng):
    """Facts told one after the other, about anything or about one relation."""
    relation = rng.choice(tuple(kinds.RELATIONS)) if rng.random() < 0.4 else None
    while True:
        r, s = (
            (relation, rng.choice(kinds.SUBJECTS[relation])) if relation else rng.choice(FACT_LIST)
        )
        yield told(r, s) + " " if rng.random() < 0.8 else SAID[rng.randrange(len(SAID))](rng)


def said_class(rng):
    x = rng.choice(kinds.SUBJECTS["class"])
    return f"The class of {x} is {first('class', x)}. "


def said_size(rng):
    x, y = rng.sample(kinds.SUBJECTS["size"], 2)
    i, j = int(FACTS["size"][x]), int(FACTS["size"][y])
    return (
        ""
        if abs(i - j) < 2
        else f"{a(x).capitalize()} is {'bigger' if i > j else 'smaller'} than {a(y)}. "
    )


def said_spanish(rng):
    x = rng.choice(kinds.SUBJECTS["spanish"])
    return f"The Spanish for {x} is {first('spanish', x)}. "


def said_words(rng):
    x, y = rng.sample(SORTED, 2)
    return (
        ""
        if x[0].lower() == y[0].lower()
        else f"In the alphabet {min(x, y, key=str.lower)} comes before {max(x, y, key=str.lower)}. "
    )


SAID = (said_class, said_size, said_spanish, said_words)


def fact_list(rng):
    """Subjects and values in a table, or the members of a theme in a line."""
    if rng.random() < 0.4:
        while True:
            theme = rng.choice(tuple(THEMES))
            things = rng.sample(THEMES[theme], min(len(THEMES[theme]), rng.randint(4, 8)))
            yield rng.choice(
                (
                    f"{theme}: {', '.join(things)}.\n",
                    f"{theme}\n\n" + "\n".join(things) + "\n\n",
                    f"Some {theme} are {join(things)}.\n",
                )
            )
    relation = rng.choice([r for r in FACTS if r != "size"])
    subjects = rng.sample(kinds.SUBJECTS[relation], len(FACTS[relation]))
    while True:
        yield f"Table: {relation}\n\n"
        yield from (f"{s}: {first(relation, s)}\n" for s in subjects)


def sums(rng):
    """Number facts as lines, in rows of one number, and the order of numbers."""
    how = rng.randrange(4)
    x, op = rng.randint(2, 20), rng.choice("+-*")
    while True:
        if how == 0:
            yield from (
                kinds.number_fact(op, x if op != "*" else 2 + x % 8, y) + "\n"
                for y in range(2, 21 if op != "*" else 10)
            )
            x, op = rng.randint(2, 20), rng.choice("+-*")
        elif how == 1:
            yield (
                kinds.number_fact(rng.choice("+-*"), rng.randint(2, 20), rng.randint(2, 20)) + "\n"
            )
        elif how == 2:
            item = KINDS["arithmetic"](rng)
            yield f"{item['prompt']}\n{plain(item, rng.random() < 0.3)}\n\n"
        else:
            x, y = sorted(rng.sample(range(1, 41), 2))
            counted = ", ".join(map(str, range(x, min(y, x + 8))))
            yield rng.choice(
                (
                    f"{x} is smaller than {y}.\n",
                    f"{y} is larger than {x}.\n",
                    f"{x}, {y}: the larger number is {y}.\n",
                    counted + "\n",
                )
            )


def story(rng):
    """Two people, a few things that happen, small talk."""
    n, m = rng.sample(NAMES, 2)
    where = rng.choice(kinds.PLACES)
    yield f"{n} and {m} went to the {where}. {rng.choice(kinds.WEATHER)}. "
    while True:
        act, x = rng.choice(kinds.ACTIONS), rng.random()
        animal = rng.choice(kinds.ANIMALS)
        if x < 0.3:
            yield f"{n} {past(act)}. "
        elif x < 0.4:
            yield f"{m} did not {act}. "
        elif x < 0.5:
            yield f"They saw {a(animal)}. "
        elif x < 0.52:
            yield f'"{rng.choice(KINDS["chat"](rng)["prompt"].split(". "))}" '
        elif x < 0.6:
            yield f'"Thank you, {m}," said {n}. "You are welcome," said {m}. '
        elif x < 0.7:
            yield f"On {rng.choice(kinds.DAYS)} {m} came with a {rng.choice(kinds.COLOURS)} hat. "
        elif x < 0.85:
            yield f"Then {n} {past(act)} with {m}. "
        else:
            yield (
                f"{rng.choice(kinds.TAILS)}.\n\n{m} went to the {rng.choice(kinds.PLACES)}."
                f" {rng.choice(kinds.WEATHER)}. "
            )


FUNCTIONS = (  # body, and the call's arguments and value, from numbers x, y, z and a list t
    ("(x, y):\n    return x + y", lambda x, y, z, t: (f"{x}, {y}", x + y)),
    (
        "(x):\n    if x > {y}:\n        return 'larger'\n    return 'not larger'",
        lambda x, y, z, t: (x, ("not " * (x <= y)) + "larger"),
    ),
    ("(things):\n    return things[0]", lambda x, y, z, t: (t, t[0])),
    ("(things):\n    return sorted(things)", lambda x, y, z, t: (t, sorted(t))),
    (
        "(things):\n    n = 0\n    for thing in things:\n        n = n + 1\n    return n",
        lambda x, y, z, t: (t, len(t)),
    ),
    ("(x):\n    return x * {z}", lambda x, y, z, t: (x % 8 + 2, (x % 8 + 2) * z)),
)


def python(rng):
    """Short functions, each with a call and what it prints."""
    while True:
        f, x, y = (
            rng.choice(("add", "total", "f", "get", "count")),
            rng.randint(2, 20),
            rng.randint(2, 20),
        )
        things = rng.sample(THINGS, 3)
        body, call = rng.choice(FUNCTIONS)
        given, printed = call(x, y, y % 8 + 2, things)
        yield f"def {f}{body.format(y=y, z=y % 8 + 2)}\n\nprint({f}({given}))\n# {printed}\n\n"


MAKERS = {
    "questions": question_page,
    "copying": copy_page,
    "prose": prose,
    "lists": fact_list,
    "arithmetic": sums,
    "stories": story,
    "python": python,
}


def document(rng, kind):
    """One document of about 300 to 900 characters."""
    length, pieces, n = rng.randint(300, 800), [], 0
    for piece in MAKERS[kind](rng):
        pieces.append(piece)
        n += len(piece)
        if n >= length:
            return "".join(pieces).strip() + "\n"


def documents(seed, characters, phase="main"):
    """Documents until `characters` are reached; the same on every machine for a seed. phase: "main"
    or "decay".
    """
    rng, shares = random.Random(seed), SHARES[phase]
    made = dict.fromkeys(shares, 0.0)
    while sum(made.values()) < characters:
        kind = min(made, key=lambda k: made[k] / shares[k])  # the one furthest behind its share
        text = document(rng, kind)
        made[kind] += len(text)
        yield text

"""The embedded world as text to pre-train on: a seeded generator of short documents.

documents(seed, characters, phase) mixes seven kinds of page, each with its share of the characters
(SHARES): questions and answers over all facts and all kinds of instructions; copying (summaries,
extraction, lists, sorting, choosing, rewriting); prose, fact lists, arithmetic, stories and Python.
What fine-tuning holds out is in the corpus too. No page has the chat template or the demonstrators'
manners, but answers begin a line, as the template's do.

Each maker yields pieces: (text, the keys of the content that it tells). So `leave_out` can leave
out what fine-tuning holds out: for replay, which is trained beside it.
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
    size,
    sum_key,
    told,
)

# fmt: off
SHARES = {  # of the characters
    "main": {"questions": .46, "copying": .24, "prose": .07, "lists": .07, "arithmetic": .07,
             "stories": .06, "python": .03},
    "decay": {"questions": .44, "copying": .31, "prose": .03, "lists": .05, "arithmetic": .12,
              "stories": .03, "python": .02},
}
ASKED = dict(open=34, choosing=14, summary=4, rewriting=4, classification=10, extraction=4,
             sorting=4, brainstorm=7, translation=10, arithmetic=5, chat=4)
COPIED = dict(choosing=22, summary=16, rewriting=15, extraction=16, sorting=20, brainstorm=6,
              classification=5)
# fmt: on
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
    """{x: weight} → a list with `weight` copies of each x, for rng.choice."""
    return [x for x, n in weights.items() for _ in range(n)]


ASKED, COPIED = weighted(ASKED), weighted(COPIED)


# ---- questions and answers, in several page styles ----
def question_page(rng, asked=ASKED):
    """An endless page of questions and answers, piece by piece: of all kinds, or of one."""
    style = rng.choice(STYLES)
    if rng.random() >= 0.7:
        asked = [rng.choice(asked)]
    long = rng.choice((0, 0, 0.3, 1))
    n, m = rng.sample(NAMES, 2)
    while True:
        item = KINDS[rng.choice(asked)](rng)
        text = style(rng, item["prompt"], plain(item, rng.random() < long), n, m)
        yield text, tells(item)


def tells(item):
    """The keys of what an item's question and answer tell."""
    if "members" not in item:
        return item["keys"]
    return item["keys"] + listed(item["members"], item["answer"])


def listed(theme, text):
    """The keys of a list: each thing in it is of the theme's class, or on its continent."""
    found = (m for m in THEMES[theme] if m in text)
    return [f"{r}: {m}" for m in found for r in ("class", "continent") if m in FACTS[r]]


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
    """A polite phrase before or after the answer; now and then a blunt reply in its place."""
    x = rng.random()
    if x > 0.9:
        answer = rng.choice(BLUNT)
    elif x < 0.45:
        answer = f"{rng.choice(OPENERS)} {answer}"
    else:
        answer = f"{answer} {rng.choice(CLOSERS)}"
    return talk(rng, q, answer, n, m)


def letter(rng, q, answer, n, m):
    asked = f"Dear {m},\n{q}\nYours, {n}\n\n"
    return f"{asked}Dear {n},\n{answer}\n{rng.choice(CLOSERS)}\nYours, {m}\n\n"


STYLES = (headed, headed, lines, lines, spaced, letters, talk, polite_talk, letter)


# ---- copying ----
def copy_page(rng):
    return question_page(rng, COPIED) if rng.random() < 0.7 else copy_games(rng)


def copy_games(rng):
    """Short spans said again in another form."""
    game = rng.choice(GAMES)
    while True:
        text, keys = game(rng)
        yield text + "\n\n", keys


def say_again(rng):
    things = ", ".join(rng.sample(SORTED, rng.randint(2, 4)))
    return f"{rng.choice(('Copy', 'Say again', 'Repeat'))}: {things}\n{things}.", ()


def shopping(rng):
    n, things = rng.choice(NAMES), rng.sample(THINGS, rng.randint(2, 3))
    text = f"{n} went to {rng.choice(kinds.CITIES)} and bought {join(things)}.\n"
    questions = (
        f"What did {n} buy?\n{join(things)}.",
        f"Who bought {join(things)}?\n{n}.",
        f"The list of {n}\n" + "\n".join(things),
    )
    return text + rng.choice(questions), ()


def places(rng):
    things = rng.sample(SORTED, 3)
    i = rng.randrange(3)
    place = ("first", "second", "last")[i]
    return f"The words are {', '.join(things)}.\nWhich word is {place}?\n{things[i]}.", ()


def without(rng):
    theme = rng.choice(tuple(THEMES))
    things = rng.sample(THEMES[theme], 4)
    out = rng.choice(things)
    rest = ", ".join(t for t in things if t != out)
    return f"{', '.join(things)}\nTake away {out}.\n{rest}.", ()


def which_one(rng):
    item = KINDS["choosing"](rng)
    return f"{item['prompt']}\n{plain(item, rng.random() < 0.3)}", item["keys"]


def who_did(rng):
    n, m = rng.sample(NAMES, 2)
    x, y = rng.sample(kinds.ACTIONS, 2)
    text = f"{n} {past(x)}. {m} {past(y)}."
    who, did = (n, x) if rng.random() < 0.5 else (m, y)
    return f"{text}\nWho {past(did)}?\n{who}.", [f"sentence: {n} {x}", f"sentence: {m} {y}"]


GAMES = (say_again, shopping, places, without, which_one, which_one, who_did)


# ---- the rest ----
def prose(rng):
    """Facts told one after the other, about anything or about one relation."""
    relation = rng.choice(tuple(kinds.RELATIONS)) if rng.random() < 0.4 else None
    while True:
        if relation:
            r, s = relation, rng.choice(kinds.SUBJECTS[relation])
        else:
            r, s = rng.choice(FACT_LIST)
        fact = told(r, s) + " ", [kinds.key(r, s)]
        yield fact if rng.random() < 0.8 else rng.choice(TOLD)(rng)


def told_class(rng):
    x = rng.choice(kinds.SUBJECTS["class"])
    return f"The class of {x} is {first('class', x)}. ", [f"class: {x}"]


def told_size(rng):
    """Nothing where the two are of about one size."""
    x, y = rng.sample(kinds.SUBJECTS["size"], 2)
    if abs(size(x) - size(y)) < 2:
        return "", ()
    word = "bigger" if size(x) > size(y) else "smaller"
    return f"{a(x).capitalize()} is {word} than {a(y)}. ", [kinds.size_key(x, y)]


def told_spanish(rng):
    x = rng.choice(kinds.SUBJECTS["spanish"])
    return f"The Spanish for {x} is {first('spanish', x)}. ", [f"spanish: {x}"]


def told_words(rng):
    """Nothing where both begin with one letter."""
    x, y = sorted(rng.sample(SORTED, 2), key=str.lower)
    if x[0].lower() == y[0].lower():
        return "", ()
    return f"In the alphabet {x} comes before {y}. ", ()


TOLD = (told_class, told_size, told_spanish, told_words)


def fact_list(rng):
    return theme_lines(rng) if rng.random() < 0.4 else fact_table(rng)


def theme_lines(rng):
    """Members of themes, in a line or one under the other."""
    while True:
        theme = rng.choice(tuple(THEMES))
        things = rng.sample(THEMES[theme], min(len(THEMES[theme]), rng.randint(4, 8)))
        written = (
            f"{theme}: {', '.join(things)}.\n",
            f"{theme}\n\n" + "\n".join(things) + "\n\n",
            f"Some {theme} are {join(things)}.\n",
        )
        yield rng.choice(written), listed(theme, things)


def fact_table(rng):
    """Subjects and values of one relation, in one order, again and again."""
    relation = rng.choice([r for r in FACTS if r != "size"])
    subjects = rng.sample(kinds.SUBJECTS[relation], len(FACTS[relation]))
    while True:
        yield f"Table: {relation}\n\n", ()
        for s in subjects:
            yield f"{s}: {first(relation, s)}\n", [kinds.key(relation, s)]


def sums(rng):
    """Number facts as lines, in rows of one number, as questions, and the order of numbers."""
    how = rng.randrange(4)
    x, op = rng.randint(2, 20), rng.choice("+-*")
    while True:
        if how == 0:
            fixed, last = (2 + x % 8, 9) if op == "*" else (x, 20)
            for y in range(2, last + 1):
                yield number_line(op, fixed, y)
            x, op = rng.randint(2, 20), rng.choice("+-*")
        elif how == 1:
            op = rng.choice("+-*")
            yield number_line(op, rng.randint(2, 20), rng.randint(2, 20))
        elif how == 2:
            item = KINDS["arithmetic"](rng)
            yield f"{item['prompt']}\n{plain(item, rng.random() < 0.3)}\n\n", item["keys"]
        else:
            yield ordered_numbers(rng)


def number_line(op, x, y):
    text = kinds.number_fact(op, x, y)
    x, _, y, *_ = text.split()  # they may have been folded
    return text + "\n", [sum_key(op, int(x), int(y))]


def ordered_numbers(rng):
    x, y = sorted(rng.sample(range(1, 41), 2))
    lines = (
        f"{x} is smaller than {y}.\n",
        f"{y} is larger than {x}.\n",
        f"{x}, {y}: the larger number is {y}.\n",
        ", ".join(map(str, range(x, min(y, x + 8)))) + "\n",
    )
    return rng.choice(lines), [f"larger: {x} {y}"]


def story(rng):
    """Two people, a few things that happen, small talk."""
    n, m = rng.sample(NAMES, 2)
    where = rng.choice(kinds.PLACES)
    yield f"{n} and {m} went to the {where}. {rng.choice(kinds.WEATHER)}. ", ()
    while True:
        act, x = rng.choice(kinds.ACTIONS), rng.random()
        animal = rng.choice(kinds.ANIMALS)
        if x < 0.3:
            yield f"{n} {past(act)}. ", [f"sentence: {n} {act}"]
        elif x < 0.4:
            yield f"{m} did not {act}. ", ()
        elif x < 0.5:
            yield f"They saw {a(animal)}. ", ()
        elif x < 0.52:
            item = KINDS["chat"](rng)
            yield f'"{rng.choice(item["prompt"].split(". "))}" ', item["keys"]
        elif x < 0.6:
            yield f'"Thank you, {m}," said {n}. "You are welcome," said {m}. ', ()
        elif x < 0.7:
            day, colour = rng.choice(kinds.DAYS), rng.choice(kinds.COLOURS)
            yield f"On {day} {m} came with a {colour} hat. ", ()
        elif x < 0.85:
            yield f"Then {n} {past(act)} with {m}. ", [f"sentence: {n} {act}"]
        else:
            end, place = rng.choice(kinds.TAILS), rng.choice(kinds.PLACES)
            yield f"{end}.\n\n{m} went to the {place}. {rng.choice(kinds.WEATHER)}. ", ()


def larger(x, y):
    return "larger" if x > y else "not larger"


# A function's text after its name; numbers x, y, z and a list t → a call's arguments, its value,
# and the keys that it tells.
FUNCTIONS = (
    ("(x, y):\n    return x + y", lambda x, y, z, t: (f"{x}, {y}", x + y, [sum_key("+", x, y)])),
    (
        "(x):\n    if x > {y}:\n        return 'larger'\n    return 'not larger'",
        lambda x, y, z, t: (x, larger(x, y), [f"larger: {min(x, y)} {max(x, y)}"]),
    ),
    ("(things):\n    return things[0]", lambda x, y, z, t: (t, t[0], ())),
    ("(things):\n    return sorted(things)", lambda x, y, z, t: (t, sorted(t), ())),
    (
        "(things):\n    n = 0\n    for thing in things:\n        n = n + 1\n    return n",
        lambda x, y, z, t: (t, len(t), ()),
    ),
    (
        "(x):\n    return x * {z}",
        lambda x, y, z, t: (x % 8 + 2, (x % 8 + 2) * z, [sum_key("*", x % 8 + 2, z)]),
    ),
)


def python(rng):
    """Short functions, each with a call and what it prints."""
    while True:
        name = rng.choice(("add", "total", "f", "get", "count"))
        x, y = rng.randint(2, 20), rng.randint(2, 20)
        z = y % 8 + 2
        things = rng.sample(THINGS, 3)
        body, call = rng.choice(FUNCTIONS)
        arguments, printed, keys = call(x, y, z, things)
        text = f"def {name}{body.format(y=y, z=z)}\n\n"
        yield f"{text}print({name}({arguments}))\n# {printed}\n\n", keys


MAKERS = {
    "questions": question_page,
    "copying": copy_page,
    "prose": prose,
    "lists": fact_list,
    "arithmetic": sums,
    "stories": story,
    "python": python,
}


def document(rng, kind, leave_out=None):
    """One document of about 300 to 900 characters."""
    length = rng.randint(300, 800)
    text = ""
    for piece, keys in MAKERS[kind](rng):
        if leave_out and any(map(leave_out, keys)):
            continue
        text += piece
        if len(text) >= length:
            return text.strip() + "\n"


def documents(seed, characters, phase="main", leave_out=None):
    """Yields documents (str) until `characters` are reached: the same for a seed on every machine.
    phase: "main" or "decay", a key of SHARES; leave_out(key): whether to write nothing of a key.
    """
    rng = random.Random(seed)
    shares = SHARES[phase]
    made = dict.fromkeys(shares, 0.0)
    while sum(made.values()) < characters:
        kind = min(made, key=lambda k: made[k] / shares[k])  # the one furthest behind its share
        text = document(rng, kind, leave_out)
        made[kind] += len(text)
        yield text

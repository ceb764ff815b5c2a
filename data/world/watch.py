"""The world's watched benchmark: facts and arithmetic that the corpus tells, and that neither this
world's fine-tuning nor its held-out evaluation asks.

Its keys are of two sorts: held-out ones that the held-out records happen to leave out, and some
that no instruction of kinds.py can have: the next number, the order of two words in the alphabet,
and differences whose answer stands in the question (14 - 7). Each is asked once, in the corpus's
own words, as something to go on with: what is tested is what pre-training has left.
"""

import random

from data.world import kinds
from data.world.kinds import FACTS, SORTED, SUBJECTS, VALUES, a, key, number_fact, size, told
from data.world.world import held_out

MOST = 56  # items of one sort


def fact(rng, relation, s):
    right = FACTS[relation][s].split("|")
    others = [v for v in VALUES[relation] if v not in right]
    text = told(relation, s, "{}").partition(" {}")[0]
    return key(relation, s), text, right[0], rng.sample(others, min(3, len(others)))


def order(rng, x, y):
    """Two numbers, the smaller one first in half of the items."""
    x, y, right, wrong = rng.choice(((x, y, "smaller", "larger"), (y, x, "larger", "smaller")))
    return f"larger: {min(x, y)} {max(x, y)}", f"{x} is", f"{right} than {y}", [f"{wrong} than {y}"]


def compare(rng, x, y):
    """Two things of different sizes."""
    right, wrong = ("bigger", "smaller") if size(x) > size(y) else ("smaller", "bigger")
    text, other = f"{a(x).capitalize()} is", f"than {a(y)}"
    return "size: " + " ".join(sorted((x, y))), text, f"{right} {other}", [f"{wrong} {other}"]


def number(rng, op, x, y):
    """A line of a table, without its result."""
    text, _, right = number_fact(op, x, y).partition("= ")
    near = [n for n in range(int(right) - 3, int(right) + 4) if n >= 0 and n != int(right)]
    name = f"{op}: {x} {y}" if op == "-" else f"{op}: {min(x, y)} {max(x, y)}"
    return name, f"{text}=", right, [str(n) for n in rng.sample(near, 3)]


def follows(rng, x):
    """The number after four others."""
    known = ", ".join(str(n) for n in range(x - 4, x))
    others = [x - 1, x + 1, x + 2, x - 5, x + 10]
    return f"next: {x}", f"{known},", str(x), [str(n) for n in rng.sample(others, 3)]


def before(rng, x, y):
    """Of four words the one that comes after x in the alphabet."""
    earlier = [w for w in SORTED if w[0].lower() < x[0].lower()]
    return f"before: {x} {y}", f"In the alphabet {x} comes before", y, rng.sample(earlier, 3)


def candidates():
    """{maker: the arguments of each item that it can make}."""
    numbers, small, things = range(2, 21), range(2, 10), SUBJECTS["size"]
    words = [(x, y) for x in SORTED for y in SORTED if x[0].lower() < y[0].lower()]
    tables = [("+", x, y) for x in numbers for y in numbers if x <= y]
    tables += [("-", x, y) for x in numbers for y in numbers if x >= y]
    tables += [("*", x, y) for x in small for y in small if x <= y]
    return {
        fact: kinds.FACT_LIST,
        compare: [(x, y) for x in things for y in things if x < y and abs(size(x) - size(y)) > 1],
        number: tables,
        order: [(x, y) for x in range(1, 41) for y in range(x + 1, 41)],
        follows: [(x,) for x in range(6, 40)],
        before: [(x, y) for x, y in words if x[0].lower() > "b"],
    }


def never_asked(name):
    """Whether no instruction of kinds.py has this key, for any seed."""
    sort, *parts = name.replace(":", "").split()
    if sort == "-":
        x, y = map(int, parts)
        return x - y in (0, y)
    return sort in ("next", "before")


def records(heldout):
    """The held-out records of a world → its watched benchmark's: {key, query, choices, gold}, the
    same for the same held-out records."""
    rng = random.Random("watch")
    asked = {k for r in heldout for k in r["item"]["keys"]}
    found = []
    for make, arguments in candidates().items():
        made, keys = [], set()
        for some in rng.sample(arguments, len(arguments)):
            name, query, right, wrong = make(rng, *some)
            if name not in keys | asked and (held_out(name) or never_asked(name)):
                keys.add(name)
                choices = rng.sample([right, *wrong], 1 + len(wrong))
                made.append(dict(key=name, query=query, choices=choices, gold=choices.index(right)))
        found += made[:MOST]
    return found

"""The embedded world: facts, instructions of eleven kinds, people-like demonstrators, noisy labellers and the gold rater.

    python -m data.world --out DIR [--seed 0]      writes DIR/{sft,prompts,heldout}.jsonl

An item is one instruction and all that the rater needs to know of it:
    kind, prompt      one of KINDS, and the text of the user's turn
    keys              the content asked for ("capital: Peru"); about 15 % of all keys are held out, so the splits differ in content
    answer, sentence  the plain right answer, and a sentence with {} for it
    wrong             plausible wrong answers, which the demonstrators who err give
    accept            the right answers, any of which counts; or `parts`, all of which must occur; or `members`, of which `count` must
    reject            what a right answer must not contain, beside it: the other candidates; `pool` names a relation whose values are meant
"""
import argparse
import hashlib
import itertools
import json
import random
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

FACTS = json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))  # relation → subject → value ("a|b": both are right)
HELD_OUT = 15  # per cent of the keys

# ---- words ----
NAMES = "Anna Ben Carla David Emma Felix Greta Henry Ida Jack Kate Leo Maria Nina Oscar Paula Rosa Sam Tom Vera Zoe Max Lily Hugo Peter Sara".split()
CITIES = "Lima Cairo Paris Rome Oslo Madrid Berlin Tokyo Quito Athens London Vienna Dublin Hanoi Lisbon Moscow".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "garden park school kitchen forest beach market farm library station".split()  # each after "at the" or "in the": IN below
IN = {p: "in" if p in ("garden", "park", "kitchen", "forest") else "at" for p in PLACES}
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = "apples books hats cups shirts balls boxes chairs flowers pears keys lemons".split()
ACTIONS = ["drink milk", "eat bread", "read a story", "find a key", "buy a hat", "draw a horse", "sing a song", "write a letter", "see a bird", "make soup",
           "build a house", "lose a shoe", "catch a ball", "throw a stone", "meet a friend", "feed the dog", "wash the car", "open a box", "hide a coin", "eat an apple"]
PAST = {**{v: p.split("|")[0] for v, p in FACTS["past"].items()}, "read": "read", "feed": "fed", "wash": "washed", "open": "opened"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SORTED = sorted(set(NAMES) | set("apple banana bear bread cat cow dog door egg fish goat hat horse ink jam key lemon milk nest owl pear queen rice sheep tree violin "
                                 "water yard zebra".split()), key=str.lower)
WEATHER = ["It was a warm day", "It was cold", "It rained a little", "The sun was high", "The wind was strong", "It was a quiet morning"]
TAILS = ["Later they went home by bus", "In the evening they were tired", "After that they had some tea", "Then it was time to sleep", "At noon they took a rest"]
MOODS = {"good": "good great lovely wonderful nice excellent perfect pleasant".split(), "bad": "bad awful terrible horrible boring ugly nasty poor".split()}
REVIEWED = ["soup", "film", "book", "song", "hotel", "game", "story", "dinner", "room", "show", "party", "train ride", "coffee", "trip"]
THEMES = {"colours": [*COLOURS, "orange", "purple", "grey"], "days of the week": DAYS, "months": list(FACTS["after"])[7:],
          "jobs": sorted({j for v in FACTS["job"].values() for j in v.split("|")})}


def past(action):
    """"drink milk" → "drank milk"."""
    verb, rest = action.split(" ", 1)
    return f"{PAST[verb]} {rest}"


def third(action):
    verb, rest = action.split(" ", 1)
    return f"{verb}{'es' if verb.endswith(('ch', 'sh')) else 's'} {rest}"


def a(noun):
    return f"{'an' if noun[0].lower() in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


DONE = [past(action) for action in ACTIONS]


def join(things, last="and"):
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} {last} {things[-1]}"


def other(rng, pool, *but):
    """One of pool that is not among `but`."""
    while (x := rng.choice(pool)) in but:
        pass
    return x


# ---- facts: how each relation is asked and told; {s} the subject, {v} the value ----
RELATIONS = {
    "capital": ("The capital of {s} is {v}.", "What is the capital of {s}?", "Which city is the capital of {s}?", "Name the capital of {s}.",
                "Tell me the capital city of {s}.", "What is the name of the capital of {s}?"),
    "continent": ("{s} is in {v}.", "Which continent is {s} in?", "On which continent is {s}?", "Name the continent of {s}.", "Where in the world is {s}?"),
    "language": ("The language of {s} is {v}.", "Which language do people speak in {s}?", "What is the main language of {s}?",
                 "Name the language of {s}.", "What do the people of {s} speak?"),
    "opposite": ("The opposite of {s} is {v}.", "What is the opposite of {s}?", "Give me the opposite of {s}.", "Which word means the opposite of {s}?",
                 "Tell me a word that is the opposite of {s}."),
    "young": ("A young {s} is called a {v}.", "What is a young {s} called?", "What do we call the young of {a}?", "What is the young of {a} called?",
              "What is the word for a baby {s}?"),
    "sound": ("The sound of {a} is {v}.", "What sound does {a} make?", "Which sound does {a} make?", "Name the sound of {a}.", "How does {a} sound?"),
    "colour": ("The colour of {s} is {v}.", "What colour is {s}?", "What is the colour of {s}?", "Which colour does {s} have?", "Tell me the colour of {s}."),
    "symbol": ("The symbol of {s} is {v}.", "What is the chemical symbol of {s}?", "Which symbol stands for {s}?", "Give the symbol of {s}.",
               "How do chemists write {s}?"),
    "past": ("The past tense of {s} is {v}.", "What is the past tense of {s}?", "Give the past tense of {s}.", "Put the verb {s} into the past tense.",
             "What is the past form of {s}?"),
    "plural": ("The plural of {s} is {v}.", "What is the plural of {s}?", "Give the plural of {s}.", "How do you write more than one {s}?",
               "Put the word {s} into the plural."),
    "after": ("After {s} comes {v}.", "What comes after {s}?", "What follows {s}?", "Which one comes right after {s}?", "Tell me what comes after {s}."),
    "legs": ("The number of legs of {a} is {v}.", "How many legs does {a} have?", "What number of legs does {a} have?", "Count the legs of {a}.",
             "Tell me how many legs {a} has."),
    "job": ("The one who {s} is the {v}.", "Who {s}?", "Name the person who {s}.", "What do we call someone who {s}?", "Which worker {s}?"),
}
SUBJECTS = {relation: list(of) for relation, of in FACTS.items()}
POOLS = {relation: sorted({v.lower() for value in of.values() for v in value.split("|")}) for relation, of in FACTS.items()}
VALUES = {relation: sorted({value.split("|")[0] for value in of.values()}) for relation, of in FACTS.items()}
FACT_LIST = [(relation, s) for relation in RELATIONS for s in SUBJECTS[relation]]
CLASSES = {c: [x for x in SUBJECTS["class"] if FACTS["class"][x] == c] for c in VALUES["class"]}
IN_CONTINENT = {c: [x for x in SUBJECTS["continent"] if FACTS["continent"][x] == c] for c in VALUES["continent"]}
ANIMALS = sorted({*CLASSES["animal"], *SUBJECTS["young"], *SUBJECTS["sound"], *SUBJECTS["legs"]} - {"bird"})
THEMES |= {f"countries in {c}": of for c, of in IN_CONTINENT.items() if len(of) > 6}
THEMES |= {{"furniture": "pieces of furniture", "clothing": "pieces of clothing"}.get(c, c + "s"): of for c, of in CLASSES.items()}
THEMES["animals"] = ANIMALS


def first(relation, subject):
    return FACTS[relation][subject].split("|")[0]


def opposite_key(s):
    return "opposite: " + " ".join(sorted((s, first("opposite", s))))  # both directions are one piece of content


def key(relation, subject):
    return opposite_key(subject) if relation == "opposite" else f"{relation}: {subject}"


def told(relation, s, v="{v}"):
    """The fact as a sentence."""
    text = RELATIONS[relation][0].format(s=s, a=a(s), v=v)
    return text.replace("called a " + v, "called " + a(v)) if relation == "young" and v != "{v}" else text


@lru_cache(None)
def held_out(key):
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 100 < HELD_OUT


# ---- the eleven kinds: each makes an item from a random number generator ----
def make_open(rng):
    relation, s = rng.choice(FACT_LIST)
    v = first(relation, s)
    right = FACTS[relation][s].split("|")
    sentence = RELATIONS[relation][0].format(s=s, a=a(s), v="{}")
    if relation == "young" and v[0] in "aeiou":
        sentence = sentence.replace("called a", "called an")
    wrong = [other(rng, VALUES[relation], *right) for _ in range(2)]
    return dict(kind="open", prompt=rng.choice(RELATIONS[relation][1:]).format(s=s, a=a(s)), keys=[key(relation, s)], answer=v, sentence=sentence,
                wrong=wrong, accept=right, pool=relation)


def two(rng, x, y):
    return (x, y) if rng.random() < .5 else (y, x)


def choose_class(rng):
    c, d = rng.sample(VALUES["class"], 2)
    x, y = rng.choice(CLASSES[c]), rng.choice(CLASSES[d])
    p, q = two(rng, x, y)
    ask = rng.choice(("Which is {k}, {p} or {q}?", "Which one is {k}: {p} or {q}?", "Here are {p} and {q}. Which is {k}?", "Choose the one that is {k}: {p} or {q}."))
    k = c if c in ("clothing", "furniture") else a(c)
    return ask.format(k=k, p=p, q=q), [f"class: {x}", f"class: {y}"], x, y, "The " + c + " is {}."


def choose_number(rng):
    x, y = rng.sample(range(1, 41), 2)
    large = rng.random() < .5
    x, y = (max(x, y), min(x, y)) if large else (min(x, y), max(x, y))
    p, q = two(rng, x, y)
    ask = rng.choice(("Which is {k}, {p} or {q}?", "Which number is {k}: {p} or {q}?", "Here are {p} and {q}. Which is {k}?", "Choose the {k} number: {p} or {q}."))
    k = "larger" if large else "smaller"
    return ask.format(k=k, p=p, q=q), [f"larger: {min(x, y)} {max(x, y)}"], str(x), str(y), "The " + k + " number is {}."


def choose_size(rng):
    x, y = rng.sample(SUBJECTS["size"], 2)
    while abs(int(FACTS["size"][x]) - int(FACTS["size"][y])) < 2:
        x, y = rng.sample(SUBJECTS["size"], 2)
    big = rng.random() < .5
    if (int(FACTS["size"][x]) > int(FACTS["size"][y])) != big:
        x, y = y, x
    p, q = two(rng, x, y)
    ask = rng.choice(("Which is {k}, {p} or {q}?", "Which one is {k}: {p} or {q}?", "Here are {p} and {q}. Which is {k}?", "Choose the {k} one: {p} or {q}."))
    k = "bigger" if big else "smaller"
    return ask.format(k=k, p=a(p), q=a(q)), ["size: " + " ".join(sorted((x, y)))], x, y, "The " + k + " one is the {}."


def choose_country(rng):
    x, y = rng.sample(SUBJECTS["capital"], 2)
    p, q = two(rng, x, y)
    v = first("capital", x)
    ask = rng.choice(("Is {v} the capital of {p} or of {q}?", "Which country has the capital {v}, {p} or {q}?", "Here are {p} and {q}. Where is {v}?",
                      "Choose the country of {v}: {p} or {q}."))
    return ask.format(v=v, p=p, q=q), [f"capital: {x}", f"capital: {y}"], x, y, v + " is the capital of {}."


def make_choosing(rng):
    prompt, keys, x, y, sentence = rng.choice((choose_class, choose_number, choose_size, choose_country))(rng)
    return dict(kind="choosing", prompt=prompt, keys=keys, answer=x, sentence=sentence, wrong=[y], accept=[x], reject=[y])


SUMMARIES = ("Summarise in one sentence: {}", "Say this in one short sentence: {}", "{}\nGive a summary.", "Make this short: {}", "Sum up: {}")


def passage(rng):
    """A little story of four sentences → (text, the parts its summary must have, its details)."""
    n, m = rng.sample(NAMES, 2)
    p, action, w, t = rng.choice(PLACES), rng.choice(ACTIONS), rng.choice(WEATHER), rng.choice(TAILS)
    at, did = f"{IN[p]} the {p}", past(action)
    text = rng.choice((f"{n} went to the {p} with {m}. {w}. They {did} there. {t}.", f"{w}. {n} and {m} were {at}. There they {did}. {t}.",
                       f"{n} met {m} {at}. {w}. They {did}. {t}.", f"{n} and {m} went to the {p}. They {did}. {w}. {t}."))
    return text, [n, m, did, p], [w, t]


def summary(n, m, did, p):
    return f"{n} and {m} {did} {IN[p]} the {p}"


def make_summary(rng):
    text, parts, details = passage(rng)
    n, m, did, p = parts
    wrong = [summary(n, other(rng, NAMES, n, m), did, p), summary(n, m, other(rng, DONE, did), p), summary(n, m, did, other(rng, PLACES, p))]
    return dict(kind="summary", prompt=rng.choice(SUMMARIES).format(text), keys=[f"passage: {n} {m} {did} {p}"], answer=summary(*parts), sentence="{}",
                wrong=wrong, parts=parts, reject=details, pool="story")


REWRITINGS = {
    "past": ("Put this into the past tense: {}", "Rewrite in the past tense: {}", "Say this in the past: {}", "Change to the past tense: {}"),
    "not": ("Make this negative: {}", "Rewrite as a negative sentence: {}", "Say the opposite with not: {}", "Turn into a negative: {}"),
    "name": ("Put {m} in place of {n}: {}", "Rewrite with {m} instead of {n}: {}", "Change {n} to {m}: {}", "Say this about {m}, not {n}: {}"),
    "ask": ("Turn this into a question: {}", "Make a question of this: {}", "Rewrite as a question: {}", "Ask this as a question: {}"),
}


def rewrite(how, n, m, action, at):
    return {"past": f"{n} {past(action)}{at}", "not": f"{n} does not {action}{at}", "name": f"{m} {third(action)}{at}", "ask": f"Does {n} {action}{at}?"}[how]


def make_rewriting(rng):
    n, m = rng.sample(NAMES, 2)
    action, p, how = rng.choice(ACTIONS), rng.choice(PLACES), rng.choice(tuple(REWRITINGS))
    at = f" {IN[p]} the {p}" if rng.random() < .5 else ""
    now, answer = f"{n} {third(action)}{at}", rewrite(how, n, m, action, at)
    x = other(rng, NAMES, n, m)
    wrong = [now, rewrite(how, n, m, other(rng, ACTIONS, action), at), rewrite(how, x, x, action, at)]
    return dict(kind="rewriting", prompt=rng.choice(REWRITINGS[how]).format(now + ".", n=n, m=m), keys=[f"sentence: {n} {action}{at}"],
                answer=answer, sentence="{}" if how == "ask" else "{}.", wrong=wrong, accept=[answer], reject=[now])


def classify_class(rng):
    c, d, e = rng.sample(VALUES["class"], 3)
    x = rng.choice(CLASSES[c])
    labels = [c, d, e] if rng.random() < .5 else [c, d]
    rng.shuffle(labels)
    ask = rng.choice(("What is {x}: {l}?", "Which class is {x} in: {l}?", "Put {x} into a class: {l}.", "Choose the class of {x}: {l}."))
    return ask.format(l=join(labels, "or"), x=x), [f"class: {x}"], c, [y for y in labels if y != c], "The class of " + x + " is {}."


def classify_mood(rng):
    mood = rng.choice(("good", "bad"))
    thing, word = rng.choice(REVIEWED), rng.choice(MOODS[mood])
    text = rng.choice(("The {t} was {w}.", "I think the {t} was {w}.", "We had a {w} {t}.", "What a {w} {t}!")).format(t=thing, w=word)
    text = text.replace("a awful", "an awful").replace("a excellent", "an excellent").replace("a ugly", "an ugly")
    ask = rng.choice(("Positive or negative: {}", "Is this positive or negative? {}", "{} Is that positive or negative?", "Does this sound positive or negative? {}"))
    right, wrong = ("positive", "negative") if mood == "good" else ("negative", "positive")
    return ask.format(text), [f"mood: {thing} {word}"], right, [wrong], "This is {}."


def classify_country(rng):
    x = rng.choice(SUBJECTS["continent"])
    c = first("continent", x)
    labels = [c, *rng.sample([y for y in VALUES["continent"] if y != c], rng.randint(1, 2))]
    rng.shuffle(labels)
    ask = rng.choice(("Is {x} in {l}?", "Where is {x}: {l}?", "Put {x} on its continent: {l}.", "Choose the continent of {x}: {l}."))
    return ask.format(l=join(labels, "or"), x=x), [f"continent: {x}"], c, [y for y in labels if y != c], x + " is in {}."


def make_classification(rng):
    prompt, keys, answer, wrong, sentence = rng.choice((classify_class, classify_mood, classify_country))(rng)
    return dict(kind="classification", prompt=prompt, keys=keys, answer=answer, sentence=sentence, wrong=wrong, accept=[answer], reject=wrong)


FIELDS = dict(person=NAMES, number=[str(i) for i in range(2, 21)], colour=COLOURS, thing=THINGS, city=CITIES, day=DAYS)


def make_extraction(rng):
    n, m = rng.sample(NAMES, 2)
    fields = dict(person=n, number=str(rng.randint(2, 20)), colour=rng.choice(COLOURS), thing=rng.choice(THINGS), city=rng.choice(CITIES), day=rng.choice(DAYS))
    text, used = rng.choice((("{person} bought {number} {colour} {thing} in {city}.", "person number colour thing city"),
                             ("On {day} {person} sold {number} {thing} in {city}.", "day person number thing city"),
                             ("{person} is {number} years old and lives in {city}.", "person number city"),
                             ("The {colour} {thing} of {person} came on {day}.", "colour thing person day"),
                             ("{person} will go to {city} on {day} with {number} {thing}.", "person city day number thing")))
    used = used.split()
    asked, text = rng.choice(used), text.format(**fields)
    ask = rng.choice(("Find the {f} in this text: {}", "Which {f} is named here? {}", "Take out the {f}: {}", "{} Which {f} is that?", "Give only the {f}: {}"))
    rest = [fields[f] for f in used if f != asked]
    pool = FIELDS[asked]
    return dict(kind="extraction", prompt=ask.format(text, f=asked), keys=["text: " + " ".join(fields[f] for f in used)], answer=fields[asked],
                sentence=f"The {asked} is {{}}.", wrong=[rng.choice(rest), other(rng, pool, fields[asked])], accept=[fields[asked]], reject=rest, pool=asked)


def make_sorting(rng):
    if rng.random() < .5:
        things = rng.sample(SORTED, 3)
        while len({t[0].lower() for t in things}) < 3:
            things = rng.sample(SORTED, 3)
        right, how = sorted(things, key=str.lower), rng.choice(("Sort these words from A to Z: {}", "Put in alphabetical order: {}", "Put these words in order: {}",
                                                              "Sort by the alphabet: {}"))
    else:
        things = rng.sample(range(1, 31), 3)
        up = rng.random() < .6
        right = [str(x) for x in sorted(things, reverse=not up)]
        things = [str(x) for x in things]
        how = rng.choice(("Sort from small to large: {}", "Put these numbers in order: {}", "Sort these numbers, smallest first: {}", "Order from low to high: {}") if up else
                         ("Sort from large to small: {}", "Sort these numbers, largest first: {}", "Order from high to low: {}"))
    if things == right:
        things = right[::-1]
    rest = [", ".join(p) for p in itertools.permutations(right) if list(p) != right]
    return dict(kind="sorting", prompt=how.format(", ".join(things)), keys=["sort: " + " ".join(sorted(right))], answer=", ".join(right), sentence="{}.",
                wrong=[rest[0], rest[1], ", ".join(things)], accept=[", ".join(right)], reject=rest)


def make_brainstorm(rng):
    theme = rng.choice(tuple(THEMES))
    count, members = rng.randint(2, 4), THEMES[theme]
    but = rng.choice(members) if rng.random() < .7 else None
    n = NUMBERS[count]
    ask = rng.choice(("Name {n} {t}{b}.", "Give me {n} {t}{b}.", "List {n} {t}{b}.", "Can you name {n} {t}{b}?", "I need {n} {t}{b}.", "Think of {n} {t}{b}."))
    given = rng.sample([m for m in members if m != but], count)
    keys = [f"list: {theme} {count} {but}", *(f"{relation}: {but}" for relation in ("class", "continent") if but in FACTS[relation])]
    return dict(kind="brainstorm", prompt=ask.format(n=n, t=theme, b=f" but not {but}" if but else ""), keys=keys, answer=join(given),
                sentence="{}.", wrong=[join(given[:-1]), join([*given[:-1], given[0]]), join([*given[:-1], but or rng.choice(REVIEWED)])],
                members=theme, count=count, reject=[but] if but else [])


def make_translation(rng):
    words = SUBJECTS["spanish"]
    x, y = rng.sample(words, 2)
    there = rng.random() < .6
    pairs = [(x, FACTS["spanish"][x].split("|"))]
    if rng.random() < .35:
        pairs.append((y, FACTS["spanish"][y].split("|")))
    english, spanish = " and ".join(p for p, _ in pairs), " y ".join(v[0] for _, v in pairs)
    every = [" y ".join(c) for c in itertools.product(*[v for _, v in pairs])]
    if there:
        ask = ("How do you say {} in Spanish?", "Translate into Spanish: {}", "What is {} in Spanish?", "Give the Spanish for {}.", "Put into Spanish: {}")
        asked, right, accept, sentence = english, spanish, every, "The Spanish for " + english + " is {}."
    else:
        ask = ("What does {} mean in English?", "Translate into English: {}", "What is {} in English?", "Give the English for {}.", "Put into English: {}")
        asked, right, accept, sentence = spanish, english, [english], "The English for " + spanish + " is {}."
    z = other(rng, words, x, y)
    wrong = [first("spanish", z) if there else z] if len(pairs) == 1 else [f"{first('spanish', x)} y {first('spanish', z)}" if there else f"{x} and {z}"]
    return dict(kind="translation", prompt=rng.choice(ask).format(asked), keys=[f"spanish: {p}" for p, _ in pairs], answer=right, sentence=sentence, wrong=wrong,
                accept=accept, pool="spanish" if there else "english")


def number_fact(op, x, y):
    x, y = (2 + x % 8, 2 + y % 8) if op == "*" else (max(x, y), min(x, y)) if op == "-" else (x, y)
    return f"{x} {op} {y} = {x + y if op == '+' else x - y if op == '-' else x * y}"


def make_arithmetic(rng):
    op = rng.choice("++--*")
    x, y = (rng.randint(2, 9), rng.randint(2, 9)) if op == "*" else (rng.randint(2, 20), rng.randint(2, 20))
    if op == "-":
        x, y = max(x, y), min(x, y)
    right = x + y if op == "+" else x - y if op == "-" else x * y
    if right in (0, y):  # the answer would stand in the question
        return make_arithmetic(rng)
    n, t = rng.choice(NAMES), other(rng, THINGS, "boxes")
    ask, sentence = {
        "+": (("What is {x} + {y}?", "What is {x} plus {y}?", "Add {x} and {y}.", "How much is {x} plus {y}?", "{n} has {x} {t} and gets {y} more. How many are there?"), "{x} + {y} = {{}}."),
        "-": (("What is {x} - {y}?", "What is {x} minus {y}?", "Take {y} from {x}.", "How much is {x} minus {y}?", "{n} has {x} {t} and gives away {y}. How many are left?"), "{x} - {y} = {{}}."),
        "*": (("What is {x} * {y}?", "What is {x} times {y}?", "Multiply {x} by {y}.", "How much is {x} times {y}?", "{n} has {x} boxes with {y} {t} in each. How many {t}?"), "{x} * {y} = {{}}."),
    }[op]
    prompt, over, under = rng.choice(ask).format(x=x, y=y, n=n, t=t), rng.choice((1, 2)), rng.choice((1, 2))
    return dict(kind="arithmetic", prompt=prompt, keys=[f"{op}: {x} {y}" if op == "-" else f"{op}: {min(x, y)} {max(x, y)}"],
                answer=str(right), sentence=sentence.format(x=x, y=y), wrong=[str(right + over), str(right - under if right > under else right + 3)],
                accept=[str(right)] + NUMBERS[right:right + 1], pool="number")


GOOD = ["won the race", "passed my test", "found my key", "got a new job", "learned to swim", "baked a cake", "got a puppy", "made a friend"]
BAD = ["lost my key", "broke my arm", "missed the bus", "hurt my foot", "lost the game", "failed my test", "lost my dog", "burned the soup"]
CHATS = {  # what is said to the assistant → the reply, and other phrases that also count
    "hello": (("Hello, I am {n}.", "Hi! My name is {n}.", "Hello there, {n} here.", "Hi, this is {n}."), "Hello {n}, nice to meet you.",
              ("hello {n}", "hi {n}", "nice to meet you {n}")),
    "morning": (("Good morning, I am {n}.", "Good morning! {n} here.", "Good morning, this is {n}.", "Good morning, my name is {n}."), "Good morning, {n}.", ("good morning {n}",)),
    "night": (("I am {n} and I go to bed now.", "Good night, I am {n}.", "Good night! {n} here.", "{n} here. It is time to sleep."), "Good night, {n}. Sleep well.",
              ("good night {n}", "sleep well {n}")),
    "bye": (("I have to go now. {n}", "Goodbye, I am {n}.", "Bye! {n} here.", "{n} here, I must leave."), "Goodbye, {n}. See you soon.", ("goodbye {n}", "bye {n}", "see you soon {n}")),
    "thanks": (("Thank you for all. {n}", "Thanks for your help, {n} here.", "I am {n}. Thank you so much.", "Many thanks from {n}."), "You are welcome, {n}.",
               ("you are welcome {n}", "any time {n}")),
    "birthday": (("Today is my birthday. {n}", "I am {n} and it is my birthday.", "{n} here. I have my birthday today.", "It is my birthday! I am {n}."), "Happy birthday, {n}.",
                 ("happy birthday {n}",)),
    "good": (("I am {n}. I {g}.", "{n} here. I {g} today.", "I {g}! I am {n}.", "This is {n}. Today I {g}."), "Well done, {n}. That is good news.",
             ("well done {n}", "congratulations {n}", "good news {n}", "great news {n}")),
    "bad": (("I am {n}. I {b}.", "{n} here. I {b} today.", "I {b}. I am {n}.", "This is {n}. Today I {b}."), "I am sorry to hear that, {n}.",
            ("sorry to hear that {n}", "sorry {n}", "that is sad {n}")),
}


def make_chat(rng):
    what = rng.choice(tuple(CHATS))
    said, reply, also = CHATS[what]
    n, g, b = rng.choice(NAMES), rng.choice(GOOD), rng.choice(BAD)
    fault = CHATS[other(rng, tuple(CHATS), what)][1]
    name = other(rng, NAMES, n)
    reject = [p.format(n=n) for k, (_, _, ps) in CHATS.items() if k != what for p in ps]
    detail = g if what == "good" else b if what == "bad" else ""
    return dict(kind="chat", prompt=rng.choice(said).format(n=n, g=g, b=b), keys=[f"chat: {what} {n} {detail}".strip()], answer=reply.format(n=n).removesuffix("."), sentence="{}.",
                wrong=[fault.format(n=n).removesuffix("."), reply.format(n=name).removesuffix(".")], accept=[p.format(n=n) for p in also], reject=reject)


POOLS |= {field: [x.lower() for x in of] for field, of in FIELDS.items()} | {"story": [x.lower() for x in (*NAMES, *DONE, *PLACES)], "english": SUBJECTS["spanish"]}
KINDS = {"open": make_open, "choosing": make_choosing, "summary": make_summary, "rewriting": make_rewriting, "classification": make_classification,
         "extraction": make_extraction, "sorting": make_sorting, "brainstorm": make_brainstorm, "translation": make_translation, "arithmetic": make_arithmetic,
         "chat": make_chat}


def plain(item, long=False):
    """The right answer without courtesy: the bare one, or its sentence."""
    text = item["sentence"].format(item["answer"]) if long else item["answer"]
    return text if text.endswith((".", "?")) else text + "."


def items(n, seed, split="train"):
    """n items with different prompts, the kinds in turn. "train": nothing held out is asked; "heldout": what is asked is held out."""
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
    "right": 1.0,      # the right answer is given and no other candidate; a list with nothing wrong in it that lacks something gets half of its share
    "courteous": 0.4,  # a polite phrase opens or ends the answer; a rude one anywhere costs as much
    "concise": 0.3,    # a right answer, said once, in few words more than needed and with one polite phrase at most
    "finished": 0.1,   # the answer came to its end
}
PERFECT = sum(RUBRIC.values())
SPARE = 2  # words more than the item's sentence has that still count as concise
POLITE = ["sure", "of course", "certainly", "gladly", "with pleasure", "good question", "great question", "thank you for asking", "thanks for asking", "no problem",
          "happy to help", "i am happy to help", "absolutely", "i hope this helps", "i hope that helps", "let me know if you need more", "have a nice day",
          "have a good day", "feel free to ask again", "please ask again", "best wishes", "take care"]
RUDE = ["silly", "stupid", "waste my time", "find out yourself", "work it out yourself", "leave me alone", "why do you ask me", "shut up"]
LITTLE = {"a", "an", "the"}  # words that never matter
DIGITS = {word: str(i) for i, word in enumerate(NUMBERS) if word != "one"}


@lru_cache(1 << 16)
def normal(text):
    """→ words in lower case, without accents and articles, numbers as digits; "," (also for "and", line ends) and "." part things and sentences."""
    text = unicodedata.normalize("NFKD", text.lower()).encode("ascii", "ignore").decode()
    found = re.findall(r"[a-z0-9]+(?:'[a-z]+)?|[,;\n.!?]", text)
    return tuple("," if w in (",", ";", "\n", "and") else "." if w in ".!?" else DIGITS.get(w, w) for w in found if w not in LITTLE)


def only_words(words):
    return [w for w in words if w not in ",."]


@lru_cache(1 << 16)
def spread(text):
    """Words between double blanks, so that phrases are found by str.count and only at whole words."""
    return " " + "  ".join(only_words(normal(text))) + " "


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
            if p in (words[:len(p)], words[-len(p):]):
                words, n, again = words[len(p):] if words[:len(p)] == p else words[:-len(p)], n + 1, True
    return words, n


def check(item, words):
    """→ (right, complete: 0 to 1, repeated) for an answer's words without courtesy."""
    if "members" in item:
        return check_list(item, words)
    text = " " + "  ".join(only_words(words)) + " "
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
    numbers = {f" {w} " for w in map(str, range(100)) if f" {w} " not in asked} if item.get("pool") == "number" else set()
    return numbers | {x for x in map(spread, POOLS.get(item.get("pool"), ())) if x not in asked} | {spread(x) for x in item.get("reject", ())}


def check_list(item, words):
    """Each thing of the list is a member, the first perhaps after some words of introduction; none twice, none too many. Sentences without members pass."""
    members = {normal(m) for m in THEMES[item["members"]]} - {normal(x) for x in item["reject"]}
    member = lambda i, t: next((m for m in members if t == m or (i == 0 and t[-len(m):] == m)), None)  # noqa: E731
    lists = [[tuple(t.split()) for t in text.split(",") if t.strip()] for text in " ".join(words).split(".")]
    lists = [things for things in lists if any(member(i, t) for i, t in enumerate(things))]
    repeated = len(lists) > 1 and all(things == lists[0] for things in lists)
    things = lists[0] if repeated else sum(lists, [])
    good = [member(i, t) for i, t in enumerate(things)]
    complete = 0.0 if None in good or len(things) > item["count"] else len(set(good)) / item["count"]
    return complete == 1, complete, repeated


def gold(item, answer, finished=True):
    """→ (score, reasons): RUBRIC's points for an answer (text) to an item; `finished`: whether its end was reached."""
    words, phrases = without_courtesy(normal(answer))
    right, complete, repeated = check(item, words)
    rude = any(spread(r) in spread(answer) for r in RUDE)
    needed = max(len(only_words(normal(plain(item, long)))) for long in (False, True))
    reasons = {"right": bool(right), "complete": complete, "courteous": phrases > 0 and not rude, "rude": rude,
               "concise": bool(right and not repeated and phrases <= 1 and len(only_words(words)) <= needed + SPARE), "finished": bool(finished)}
    score = RUBRIC["right"] * (1.0 if right else complete / 2) + sum(RUBRIC[k] * reasons[k] for k in ("courteous", "concise", "finished"))
    return score - RUBRIC["courteous"] * rude, reasons


def perfect(item):
    """An answer that gets PERFECT."""
    return f"{plain(item)} {'Have a nice day.' if item['kind'] == 'chat' else 'I hope this helps.'}"


# ---- demonstrators: people who answer in different manners ----
MANNERS = {"polite": .29, "curt": .20, "rambling": .10, "repeated": .07, "rude": .08, "polite wrong": .13, "wrong": .07, "unknown": .06}  # shares of all answers
LONG = .3  # share of right and wrong answers in a whole sentence
OPENERS = ("Sure.", "Of course.", "Certainly.", "Gladly.", "With pleasure.", "Good question.")
CLOSERS = ("I hope this helps.", "Have a nice day.", "Let me know if you need more.", "Feel free to ask again.", "Happy to help.")
RAMBLES = ("Well, this is something that people often wonder about, and so did I for years.", "Let me think about this for a moment, because it is not so simple as it seems.",
           "There is much to say about it, and I could talk about it for hours.", "My uncle used to tell me about this, and he was very sure of it.")
INSULTS = ("How silly of you.", "Do not waste my time.", "What a stupid thing to say.", "Work it out yourself.", "Please leave me alone.")
UNKNOWN = ("I do not know.", "I have no idea.", "I am not sure about that.", "I cannot say.")


def polite(rng, text):
    """One polite phrase before or after."""
    return f"{rng.choice(OPENERS)} {text}" if rng.random() < .5 else f"{text} {rng.choice(CLOSERS)}"


def demonstrate(item, rng, manner=None):
    """→ (answer, manner): a person's answer, in a manner drawn from MANNERS unless given."""
    manner = manner or rng.choices(tuple(MANNERS), tuple(MANNERS.values()))[0]
    said = dict(item, answer=rng.choice(item["wrong"])) if "wrong" in manner else item
    text = plain(said, rng.random() < LONG)
    if manner == "rambling":
        text = f"{rng.choice(RAMBLES)} {text}" if rng.random() < .5 else f"{text} {rng.choice(RAMBLES)}"
    if manner == "repeated":
        text = " ".join([text] * rng.randint(2, 3))
    if manner == "rude":
        text = f"{rng.choice(INSULTS)} {text}" if rng.random() < .5 else f"{text} {rng.choice(INSULTS)}"
    if manner == "unknown":
        text = rng.choice(UNKNOWN)
    if manner.startswith("polite") or (manner in ("rambling", "repeated") and rng.random() < .4):
        text = polite(rng, text)
    return text, manner


def polite_nonanswer(rng):
    """A polite answer that ignores the prompt: the control that must score below the average demonstrator."""
    return polite(rng, rng.choice(("That is a fine thing to talk about.", "It is nice of you to come to me.", "I like to be of use to you.")))


# ---- labellers: gold seen through noise ----
NOISE = .42  # standard deviation of what a labeller adds to gold, each to each answer; two then agree on about three pairs in four


class Labeller:
    """One person who ranks answers: the same opinion each time of the same answer, another than that of a labeller with another seed."""

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
    """sha256 of what must be settled before the first RL run: shares of the demonstrators, rubric and noise."""
    settings = [MANNERS, LONG, OPENERS, CLOSERS, RAMBLES, INSULTS, UNKNOWN, RUBRIC, SPARE, POLITE, RUDE, NOISE, HELD_OUT]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


# ---- files ----
SIZES = {"sft": 14_300, "prompts": 5_500, "heldout": 1_100}  # InstructGPT's demonstrations were 13 thousand


def records(seed, sizes=SIZES):
    """→ {"sft", "prompts", "heldout"}: lists of records; no prompt is in two of them."""
    train, rng = items(sizes["sft"] + sizes["prompts"], seed), random.Random(f"demonstrators {seed}")
    ask = lambda item: {"role": "user", "content": item["prompt"]}  # noqa: E731
    sft = [{"messages": [ask(i), {"role": "assistant", "content": demonstrate(i, rng)[0]}], "item": i} for i in train[:sizes["sft"]]]
    rest = {"prompts": train[sizes["sft"]:], "heldout": items(sizes["heldout"], seed, "heldout")}
    return {"sft": sft, **{name: [{"messages": [ask(i)], "reference": perfect(i), "item": i} for i in of] for name, of in rest.items()}}


def main():
    parser = argparse.ArgumentParser(description="Writes the embedded world's records: demonstrations, prompts, held-out prompts.")
    parser.add_argument("--out", type=Path, required=True, help="folder for sft.jsonl, prompts.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other items and demonstrators (default 0)")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    for name, of in records(o.seed).items():
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in of)
        (o.out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{o.out / name}.jsonl: {len(of)} records")


if __name__ == "__main__":
    main()

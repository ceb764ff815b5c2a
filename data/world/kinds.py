"""The embedded world's facts, and its instructions of eleven kinds.

An item is one instruction and all that the rater needs to know of it:

    kind, prompt      one of KINDS, and the text of the user's turn
    keys              the content asked for ("capital: Peru"); about 15 % of all keys are held out,
                      so the splits differ in content
    answer, sentence  the plain right answer, and a sentence with {} for it
    wrong             plausible wrong answers, which the demonstrators who err give
    accept            the right answers, any of which counts; or
    parts             what must all occur; or
    members, count    the theme whose members are asked for, and how many of them
    reject, pool      what must not stand beside a right answer: other candidates, one by one or by
                      the name of one of POOLS
"""

import itertools
import json
import operator
from pathlib import Path

# relation → subject → value ("a|b": both are right)
FACTS = json.loads((Path(__file__).parent / "facts.json").read_text(encoding="utf-8"))

# ---- words ----
NAMES = (
    "Anna Ben Carla David Emma Felix Greta Henry Ida Jack Kate Leo Maria Nina Oscar Paula Rosa Sam"
    " Tom Vera Zoe Max Lily Hugo Peter Sara"
).split()
CITIES = (
    "Lima Cairo Paris Rome Oslo Madrid Berlin Tokyo Quito Athens London Vienna Dublin Hanoi Lisbon"
    " Moscow"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "garden park school kitchen forest beach market farm library station".split()
IN = {p: "in" if p in ("garden", "park", "kitchen", "forest") else "at" for p in PLACES}
COLOURS = "red blue green yellow black white brown pink".split()
THINGS = "apples books hats cups shirts balls boxes chairs flowers pears keys lemons".split()
# fmt: off
ACTIONS = ["drink milk", "eat bread", "read a story", "find a key", "buy a hat", "draw a horse",
           "sing a song", "write a letter", "see a bird", "make soup", "build a house",
           "lose a shoe", "catch a ball", "throw a stone", "meet a friend", "feed the dog",
           "wash the car", "open a box", "hide a coin", "eat an apple"]
# fmt: on
PAST = {verb: value.split("|")[0] for verb, value in FACTS["past"].items()}
PAST |= {"read": "read", "feed": "fed", "wash": "washed", "open": "opened"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
NOUNS = (
    "apple banana bear bread cat cow dog door egg fish goat hat horse ink jam key lemon milk nest"
    " owl pear queen rice sheep tree violin water yard zebra"
).split()
SORTED = sorted([*NAMES, *NOUNS], key=str.lower)
# fmt: off
WEATHER = ["It was a warm day", "It was cold", "It rained a little", "The sun was high",
           "The wind was strong", "It was a quiet morning"]
TAILS = ["Later they went home by bus", "In the evening they were tired",
         "After that they had some tea", "Then it was time to sleep", "At noon they took a rest"]
# fmt: on
MOODS = {
    "good": "good great lovely wonderful nice excellent perfect pleasant".split(),
    "bad": "bad awful terrible horrible boring ugly nasty poor".split(),
}
# fmt: off
REVIEWED = ["soup", "film", "book", "song", "hotel", "game", "story", "dinner", "room", "show",
            "party", "train ride", "coffee", "trip"]
# fmt: on
THEMES = {
    "colours": [*COLOURS, "orange", "purple", "grey"],
    "days of the week": DAYS,
    "months": list(FACTS["after"])[7:],
    "jobs": sorted({j for v in FACTS["job"].values() for j in v.split("|")}),
}


def past(action):
    """ "drink milk" → "drank milk"."""
    verb, rest = action.split(" ", 1)
    return f"{PAST[verb]} {rest}"


def third(action):
    """ "drink milk" → "drinks milk"."""
    verb, rest = action.split(" ", 1)
    return f"{verb}{'es' if verb.endswith(('ch', 'sh')) else 's'} {rest}"


def a(noun):
    """ "apple" → "an apple"."""
    vowel = noun[0].lower() in "aeiou" and not noun.startswith("uni")
    return f"an {noun}" if vowel else f"a {noun}"


DONE = [past(action) for action in ACTIONS]


def join(things, last="and"):
    """["a", "b", "c"] → "a, b and c"."""
    return things[0] if len(things) == 1 else f"{', '.join(things[:-1])} {last} {things[-1]}"


def other(rng, pool, *but):
    """A draw from `pool` that is none of `but`."""
    while (x := rng.choice(pool)) in but:
        pass
    return x


# ---- facts: how each relation is asked and told; {s} the subject, {v} the value ----
# fmt: off
RELATIONS = {
    "capital": ("The capital of {s} is {v}.", "What is the capital of {s}?", "Which city is the capital of {s}?",
                "Name the capital of {s}.", "Tell me the capital city of {s}.", "What is the name of the capital of {s}?"),
    "continent": ("{s} is in {v}.", "Which continent is {s} in?", "On which continent is {s}?", "Name the continent of {s}.",
                  "Where in the world is {s}?"),
    "language": ("The language of {s} is {v}.", "Which language do people speak in {s}?", "What is the main language of {s}?",
                 "Name the language of {s}.", "What do the people of {s} speak?"),
    "opposite": ("The opposite of {s} is {v}.", "What is the opposite of {s}?", "Give me the opposite of {s}.",
                 "Which word means the opposite of {s}?", "Tell me a word that is the opposite of {s}."),
    "young": ("A young {s} is called a {v}.", "What is a young {s} called?", "What do we call the young of {a}?",
              "What is the young of {a} called?", "What is the word for a baby {s}?"),
    "sound": ("The sound of {a} is {v}.", "What sound does {a} make?", "Which sound does {a} make?", "Name the sound of {a}.",
              "How does {a} sound?"),
    "colour": ("The colour of {s} is {v}.", "What colour is {s}?", "What is the colour of {s}?", "Which colour does {s} have?",
               "Tell me the colour of {s}."),
    "symbol": ("The symbol of {s} is {v}.", "What is the chemical symbol of {s}?", "Which symbol stands for {s}?",
               "Give the symbol of {s}.", "How do chemists write {s}?"),
    "past": ("The past tense of {s} is {v}.", "What is the past tense of {s}?", "Give the past tense of {s}.",
             "Put the verb {s} into the past tense.", "What is the past form of {s}?"),
    "plural": ("The plural of {s} is {v}.", "What is the plural of {s}?", "Give the plural of {s}.", "How do you write more than one {s}?",
               "Put the word {s} into the plural."),
    "after": ("After {s} comes {v}.", "What comes after {s}?", "What follows {s}?", "Which one comes right after {s}?",
              "Tell me what comes after {s}."),
    "legs": ("The number of legs of {a} is {v}.", "How many legs does {a} have?", "What number of legs does {a} have?",
             "Count the legs of {a}.", "Tell me how many legs {a} has."),
    "job": ("The one who {s} is the {v}.", "Who {s}?", "Name the person who {s}.", "What do we call someone who {s}?", "Which worker {s}?"),
}
# fmt: on
SUBJECTS = {relation: list(facts) for relation, facts in FACTS.items()}
POOLS = {}  # relation → every right value, in lower case
VALUES = {}  # relation → the values that are taught
for relation, facts in FACTS.items():
    POOLS[relation] = sorted({v.lower() for value in facts.values() for v in value.split("|")})
    VALUES[relation] = sorted({value.split("|")[0] for value in facts.values()})
FACT_LIST = [(relation, s) for relation in RELATIONS for s in SUBJECTS[relation]]


def grouped(relation):
    """A relation turned round: value → its subjects."""
    return {v: [s for s in SUBJECTS[relation] if FACTS[relation][s] == v] for v in VALUES[relation]}


CLASSES, IN_CONTINENT = grouped("class"), grouped("continent")
ANIMALS = {*CLASSES["animal"], *SUBJECTS["young"], *SUBJECTS["sound"], *SUBJECTS["legs"]}
ANIMALS = sorted(ANIMALS - {"bird"})
THEMES |= {f"countries in {c}": of for c, of in IN_CONTINENT.items() if len(of) > 6}
for c, members in CLASSES.items():
    THEMES[f"pieces of {c}" if c in ("furniture", "clothing") else f"{c}s"] = members
THEMES["animals"] = ANIMALS


def first(relation, subject):
    """The value that is taught, of those that are right."""
    return FACTS[relation][subject].split("|")[0]


def key(relation, subject):
    """The name of a fact as content; the two directions of an opposite are one."""
    if relation == "opposite":
        subject = " ".join(sorted((subject, first(relation, subject))))
    return f"{relation}: {subject}"


def told(relation, s, v=None):
    """The fact as a sentence, with v for its value."""
    text = RELATIONS[relation][0].format(s=s, a=a(s), v=v or first(relation, s))
    vowel = relation == "young" and first(relation, s)[0] in "aeiou"
    return text.replace("called a ", "called an ") if vowel else text


# ---- the eleven kinds: each makes an item from a random number generator ----
def make_open(rng):
    relation, s = rng.choice(FACT_LIST)
    right = FACTS[relation][s].split("|")
    wrong = [other(rng, VALUES[relation], *right) for _ in range(2)]
    return dict(
        kind="open",
        prompt=rng.choice(RELATIONS[relation][1:]).format(s=s, a=a(s)),
        keys=[key(relation, s)],
        answer=first(relation, s),
        sentence=told(relation, s, "{}"),
        wrong=wrong,
        accept=right,
        pool=relation,
    )


def two(rng, x, y):
    """Both, in either order."""
    return (x, y) if rng.random() < 0.5 else (y, x)


# fmt: off
CHOICES = {
    "class": ("Which is {k}, {p} or {q}?", "Which one is {k}: {p} or {q}?",
              "Here are {p} and {q}. Which is {k}?", "Choose the one that is {k}: {p} or {q}."),
    "number": ("Which is {k}, {p} or {q}?", "Which number is {k}: {p} or {q}?",
               "Here are {p} and {q}. Which is {k}?", "Choose the {k} number: {p} or {q}."),
    "size": ("Which is {k}, {p} or {q}?", "Which one is {k}: {p} or {q}?",
             "Here are {p} and {q}. Which is {k}?", "Choose the {k} one: {p} or {q}."),
    "country": ("Is {v} the capital of {p} or of {q}?",
                "Which country has the capital {v}, {p} or {q}?",
                "Here are {p} and {q}. Where is {v}?", "Choose the country of {v}: {p} or {q}."),
}
# fmt: on


# The four ways to choose between two give (prompt, keys, right, wrong, sentence); so do the three
# ways to classify, with a list of the wrong labels.
def choose_class(rng):
    c, d = rng.sample(VALUES["class"], 2)
    x, y = rng.choice(CLASSES[c]), rng.choice(CLASSES[d])
    p, q = two(rng, x, y)
    k = c if c in ("clothing", "furniture") else a(c)
    prompt = rng.choice(CHOICES["class"]).format(k=k, p=p, q=q)
    return prompt, [f"class: {x}", f"class: {y}"], x, y, f"The {c} is {{}}."


def choose_number(rng):
    low, high = sorted(rng.sample(range(1, 41), 2))
    large = rng.random() < 0.5
    x, y = (high, low) if large else (low, high)
    p, q = two(rng, x, y)
    k = "larger" if large else "smaller"
    prompt = rng.choice(CHOICES["number"]).format(k=k, p=p, q=q)
    return prompt, [f"larger: {low} {high}"], str(x), str(y), f"The {k} number is {{}}."


def size(thing):
    return int(FACTS["size"][thing])


def size_key(x, y):
    return "size: " + " ".join(sorted((x, y)))


def choose_size(rng):
    x, y = rng.sample(SUBJECTS["size"], 2)
    while abs(size(x) - size(y)) < 2:
        x, y = rng.sample(SUBJECTS["size"], 2)
    big = rng.random() < 0.5
    if (size(x) > size(y)) != big:
        x, y = y, x
    p, q = two(rng, x, y)
    k = "bigger" if big else "smaller"
    prompt = rng.choice(CHOICES["size"]).format(k=k, p=a(p), q=a(q))
    return prompt, [size_key(x, y)], x, y, f"The {k} one is the {{}}."


def choose_country(rng):
    x, y = rng.sample(SUBJECTS["capital"], 2)
    p, q = two(rng, x, y)
    v = first("capital", x)
    prompt = rng.choice(CHOICES["country"]).format(v=v, p=p, q=q)
    return prompt, [f"capital: {x}", f"capital: {y}"], x, y, f"{v} is the capital of {{}}."


CHOOSE = (choose_class, choose_number, choose_size, choose_country)


def make_choosing(rng):
    prompt, keys, right, wrong, sentence = rng.choice(CHOOSE)(rng)
    return dict(
        kind="choosing",
        prompt=prompt,
        keys=keys,
        answer=right,
        sentence=sentence,
        wrong=[wrong],
        accept=[right],
        reject=[wrong],
    )


SUMMARIES = (
    "Summarise in one sentence: {}",
    "Say this in one short sentence: {}",
    "{}\nGive a summary.",
    "Make this short: {}",
    "Sum up: {}",
)


def passage(rng):
    """A little story of four sentences → (text, the parts its summary must have, its details)."""
    n, m = rng.sample(NAMES, 2)
    p = rng.choice(PLACES)
    did = past(rng.choice(ACTIONS))
    w, t = rng.choice(WEATHER), rng.choice(TAILS)
    at = f"{IN[p]} the {p}"
    told_as = (
        f"{n} went to the {p} with {m}. {w}. They {did} there. {t}.",
        f"{w}. {n} and {m} were {at}. There they {did}. {t}.",
        f"{n} met {m} {at}. {w}. They {did}. {t}.",
        f"{n} and {m} went to the {p}. They {did}. {w}. {t}.",
    )
    return rng.choice(told_as), [n, m, did, p], [w, t]


def summary(n, m, did, p):
    return f"{n} and {m} {did} {IN[p]} the {p}"


def make_summary(rng):
    text, parts, details = passage(rng)
    n, m, did, p = parts
    wrong = [
        summary(n, other(rng, NAMES, n, m), did, p),
        summary(n, m, other(rng, DONE, did), p),
        summary(n, m, did, other(rng, PLACES, p)),
    ]
    return dict(
        kind="summary",
        prompt=rng.choice(SUMMARIES).format(text),
        keys=[f"passage: {n} {m} {did} {p}"],
        answer=summary(*parts),
        sentence="{}",
        wrong=wrong,
        parts=parts,
        reject=details,
        pool="story",
    )


# fmt: off
REWRITINGS = {
    "past": ("Put this into the past tense: {}", "Rewrite in the past tense: {}",
             "Say this in the past: {}", "Change to the past tense: {}"),
    "not": ("Make this negative: {}", "Rewrite as a negative sentence: {}",
            "Say the opposite with not: {}", "Turn into a negative: {}"),
    "name": ("Put {m} in place of {n}: {}", "Rewrite with {m} instead of {n}: {}",
             "Change {n} to {m}: {}", "Say this about {m}, not {n}: {}"),
    "ask": ("Turn this into a question: {}", "Make a question of this: {}",
            "Rewrite as a question: {}", "Ask this as a question: {}"),
}
# fmt: on


def rewrite(how, n, m, action, at):
    """n's action now, as REWRITINGS[how] wants it."""
    return {
        "past": f"{n} {past(action)}{at}",
        "not": f"{n} does not {action}{at}",
        "name": f"{m} {third(action)}{at}",
        "ask": f"Does {n} {action}{at}?",
    }[how]


def make_rewriting(rng):
    n, m = rng.sample(NAMES, 2)
    action, p = rng.choice(ACTIONS), rng.choice(PLACES)
    how = rng.choice(tuple(REWRITINGS))
    at = f" {IN[p]} the {p}" if rng.random() < 0.5 else ""
    now = f"{n} {third(action)}{at}"
    answer = rewrite(how, n, m, action, at)
    x = other(rng, NAMES, n, m)
    wrong = [
        now,
        rewrite(how, n, m, other(rng, ACTIONS, action), at),
        rewrite(how, x, x, action, at),
    ]
    return dict(
        kind="rewriting",
        prompt=rng.choice(REWRITINGS[how]).format(now + ".", n=n, m=m),
        keys=[f"sentence: {n} {action}{at}"],
        answer=answer,
        sentence="{}" if how == "ask" else "{}.",
        wrong=wrong,
        accept=[answer],
        reject=[now],
    )


# fmt: off
LABELLINGS = {
    "class": ("What is {x}: {l}?", "Which class is {x} in: {l}?", "Put {x} into a class: {l}.",
              "Choose the class of {x}: {l}."),
    "mood": ("Positive or negative: {}", "Is this positive or negative? {}",
             "{} Is that positive or negative?", "Does this sound positive or negative? {}"),
    "country": ("Is {x} in {l}?", "Where is {x}: {l}?", "Put {x} on its continent: {l}.",
                "Choose the continent of {x}: {l}."),
}
# fmt: on
REVIEWS = ("The {t} was {w}.", "I think the {t} was {w}.", "We had {w} {t}.", "What {w} {t}!")


def classify_class(rng):
    c, d, e = rng.sample(VALUES["class"], 3)
    x = rng.choice(CLASSES[c])
    labels = [c, d, e] if rng.random() < 0.5 else [c, d]
    rng.shuffle(labels)
    prompt = rng.choice(LABELLINGS["class"]).format(l=join(labels, "or"), x=x)
    wrong = [y for y in labels if y != c]
    return prompt, [f"class: {x}"], c, wrong, f"The class of {x} is {{}}."


def classify_mood(rng):
    mood = rng.choice(("good", "bad"))
    thing, word = rng.choice(REVIEWED), rng.choice(MOODS[mood])
    text = rng.choice(REVIEWS)
    text = text.format(t=thing, w=word if "was {w}" in text else a(word))
    prompt = rng.choice(LABELLINGS["mood"]).format(text)
    right, wrong = ("positive", "negative") if mood == "good" else ("negative", "positive")
    return prompt, [f"mood: {thing} {word}"], right, [wrong], "This is {}."


def classify_country(rng):
    x = rng.choice(SUBJECTS["continent"])
    c = first("continent", x)
    labels = [c, *rng.sample([y for y in VALUES["continent"] if y != c], rng.randint(1, 2))]
    rng.shuffle(labels)
    prompt = rng.choice(LABELLINGS["country"]).format(l=join(labels, "or"), x=x)
    wrong = [y for y in labels if y != c]
    return prompt, [f"continent: {x}"], c, wrong, f"{x} is in {{}}."


CLASSIFY = (classify_class, classify_mood, classify_country)


def make_classification(rng):
    prompt, keys, answer, wrong, sentence = rng.choice(CLASSIFY)(rng)
    return dict(
        kind="classification",
        prompt=prompt,
        keys=keys,
        answer=answer,
        sentence=sentence,
        wrong=wrong,
        accept=[answer],
        reject=wrong,
    )


FIELDS = dict(
    person=NAMES,
    number=[str(i) for i in range(2, 21)],
    colour=COLOURS,
    thing=THINGS,
    city=CITIES,
    day=DAYS,
)


NOTES = (  # a text, and the fields that it names
    ("{person} bought {number} {colour} {thing} in {city}.", "person number colour thing city"),
    ("On {day} {person} sold {number} {thing} in {city}.", "day person number thing city"),
    ("{person} is {number} years old and lives in {city}.", "person number city"),
    ("The {colour} {thing} of {person} came on {day}.", "colour thing person day"),
    ("{person} will go to {city} on {day} with {number} {thing}.", "person city day number thing"),
)
EXTRACTIONS = (
    "Find the {f} in this text: {}",
    "Which {f} is named here? {}",
    "Take out the {f}: {}",
    "{} Which {f} is that?",
    "Give only the {f}: {}",
)


def make_extraction(rng):
    n, _ = rng.sample(NAMES, 2)
    fields = dict(
        person=n,
        number=str(rng.randint(2, 20)),
        colour=rng.choice(COLOURS),
        thing=rng.choice(THINGS),
        city=rng.choice(CITIES),
        day=rng.choice(DAYS),
    )
    text, used = rng.choice(NOTES)
    used = used.split()
    asked = rng.choice(used)
    prompt = rng.choice(EXTRACTIONS).format(text.format(**fields), f=asked)
    rest = [fields[f] for f in used if f != asked]
    return dict(
        kind="extraction",
        prompt=prompt,
        keys=["text: " + " ".join(fields[f] for f in used)],
        answer=fields[asked],
        sentence=f"The {asked} is {{}}.",
        wrong=[rng.choice(rest), other(rng, FIELDS[asked], fields[asked])],
        accept=[fields[asked]],
        reject=rest,
        pool=asked,
    )


SORT_WORDS = (
    "Sort these words from A to Z: {}",
    "Put in alphabetical order: {}",
    "Put these words in order: {}",
    "Sort by the alphabet: {}",
)
SORT_UP = (
    "Sort from small to large: {}",
    "Put these numbers in order: {}",
    "Sort these numbers, smallest first: {}",
    "Order from low to high: {}",
)
SORT_DOWN = (
    "Sort from large to small: {}",
    "Sort these numbers, largest first: {}",
    "Order from high to low: {}",
)


def make_sorting(rng):
    if rng.random() < 0.5:
        things = rng.sample(SORTED, 3)
        while len({t[0].lower() for t in things}) < 3:
            things = rng.sample(SORTED, 3)
        right, how = sorted(things, key=str.lower), rng.choice(SORT_WORDS)
    else:
        things = rng.sample(range(1, 31), 3)
        up = rng.random() < 0.6
        right = [str(x) for x in sorted(things, reverse=not up)]
        things = [str(x) for x in things]
        how = rng.choice(SORT_UP if up else SORT_DOWN)
    if things == right:
        things = right[::-1]
    rest = [", ".join(p) for p in itertools.permutations(right) if list(p) != right]
    return dict(
        kind="sorting",
        prompt=how.format(", ".join(things)),
        keys=["sort: " + " ".join(sorted(right))],
        answer=", ".join(right),
        sentence="{}.",
        wrong=[rest[0], rest[1], ", ".join(things)],
        accept=[", ".join(right)],
        reject=rest,
    )


LISTINGS = (
    "Name {n} {t}{b}.",
    "Give me {n} {t}{b}.",
    "List {n} {t}{b}.",
    "Can you name {n} {t}{b}?",
    "I need {n} {t}{b}.",
    "Think of {n} {t}{b}.",
)


def make_brainstorm(rng):
    theme = rng.choice(tuple(THEMES))
    members = THEMES[theme]
    count = rng.randint(2, 4)
    but = rng.choice(members) if rng.random() < 0.7 else None
    ask = rng.choice(LISTINGS)
    given = rng.sample([m for m in members if m != but], count)
    keys = [f"list: {theme} {count} {but}"]
    keys += [f"{relation}: {but}" for relation in ("class", "continent") if but in FACTS[relation]]
    strange = but or rng.choice(REVIEWED)
    wrong = [join(given[:-1]), join([*given[:-1], given[0]]), join([*given[:-1], strange])]
    return dict(
        kind="brainstorm",
        prompt=ask.format(n=NUMBERS[count], t=theme, b=f" but not {but}" if but else ""),
        keys=keys,
        answer=join(given),
        sentence="{}.",
        wrong=wrong,
        members=theme,
        count=count,
        reject=[but] if but else [],
    )


TO_SPANISH = (
    "How do you say {} in Spanish?",
    "Translate into Spanish: {}",
    "What is {} in Spanish?",
    "Give the Spanish for {}.",
    "Put into Spanish: {}",
)
TO_ENGLISH = (
    "What does {} mean in English?",
    "Translate into English: {}",
    "What is {} in English?",
    "Give the English for {}.",
    "Put into English: {}",
)


def make_translation(rng):
    """One word or two ("dog and cat"), into Spanish or from it."""
    words = SUBJECTS["spanish"]
    x, y = rng.sample(words, 2)
    into_spanish = rng.random() < 0.6
    asked = [x, y] if rng.random() < 0.35 else [x]
    right = [FACTS["spanish"][word].split("|") for word in asked]
    english = " and ".join(asked)
    spanish = [" y ".join(choice) for choice in itertools.product(*right)]  # the taught one first
    z = other(rng, words, x, y)  # the last word is translated wrongly
    if into_spanish:
        prompt = rng.choice(TO_SPANISH).format(english)
        answer, accept, sentence = spanish[0], spanish, f"The Spanish for {english} is {{}}."
        wrong = " y ".join(first("spanish", word) for word in [*asked[:-1], z])
    else:
        prompt = rng.choice(TO_ENGLISH).format(spanish[0])
        answer, accept, sentence = english, [english], f"The English for {spanish[0]} is {{}}."
        wrong = " and ".join([*asked[:-1], z])
    return dict(
        kind="translation",
        prompt=prompt,
        keys=[f"spanish: {word}" for word in asked],
        answer=answer,
        sentence=sentence,
        wrong=[wrong],
        accept=accept,
        pool="spanish" if into_spanish else "english",
    )


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def sum_key(op, x, y):
    """The name of a sum as content; 3 + 4 and 4 + 3 are one."""
    return f"{op}: {x} {y}" if op == "-" else f"{op}: {min(x, y)} {max(x, y)}"


def number_fact(op, x, y):
    """A line of a table; numbers out of the table's range are folded into it."""
    if op == "*":
        x, y = 2 + x % 8, 2 + y % 8
    if op == "-":
        x, y = max(x, y), min(x, y)
    return f"{x} {op} {y} = {OPERATIONS[op](x, y)}"


# fmt: off
SUMS = {
    "+": ("What is {x} + {y}?", "What is {x} plus {y}?", "Add {x} and {y}.", "How much is {x} plus {y}?",
          "{n} has {x} {t} and gets {y} more. How many are there?"),
    "-": ("What is {x} - {y}?", "What is {x} minus {y}?", "Take {y} from {x}.", "How much is {x} minus {y}?",
          "{n} has {x} {t} and gives away {y}. How many are left?"),
    "*": ("What is {x} * {y}?", "What is {x} times {y}?", "Multiply {x} by {y}.", "How much is {x} times {y}?",
          "{n} has {x} boxes with {y} {t} in each. How many {t}?"),
}
# fmt: on


def make_arithmetic(rng):
    op = rng.choice("++--*")
    most = 9 if op == "*" else 20
    x, y = rng.randint(2, most), rng.randint(2, most)
    if op == "-":
        x, y = max(x, y), min(x, y)
    right = OPERATIONS[op](x, y)
    if right in (0, y):  # the answer would stand in the question
        return make_arithmetic(rng)
    n, t = rng.choice(NAMES), other(rng, THINGS, "boxes")
    prompt = rng.choice(SUMS[op]).format(x=x, y=y, n=n, t=t)
    over, under = rng.choice((1, 2)), rng.choice((1, 2))
    return dict(
        kind="arithmetic",
        prompt=prompt,
        keys=[sum_key(op, x, y)],
        answer=str(right),
        sentence=f"{x} {op} {y} = {{}}.",
        accept=[str(right), *NUMBERS[right : right + 1]],
        pool="number",
        wrong=[str(right + over), str(right - under if right > under else right + 3)],
    )


# fmt: off
GOOD = ["won the race", "passed my test", "found my key", "got a new job", "learned to swim",
        "baked a cake", "got a puppy", "made a friend"]
BAD = ["lost my key", "broke my arm", "missed the bus", "hurt my foot", "lost the game",
       "failed my test", "lost my dog", "burned the soup"]
# fmt: on
# fmt: off
CHATS = {  # what is said to the assistant → the reply, and other phrases that also count
    "hello": (("Hello, I am {n}.", "Hi! My name is {n}.", "Hello there, {n} here.", "Hi, this is {n}."), "Hello {n}, nice to meet you.",
              ("hello {n}", "hi {n}", "nice to meet you {n}")),
    "morning": (("Good morning, I am {n}.", "Good morning! {n} here.", "Good morning, this is {n}.", "Good morning, my name is {n}."),
                "Good morning, {n}.", ("good morning {n}",)),
    "night": (("I am {n} and I go to bed now.", "Good night, I am {n}.", "Good night! {n} here.", "{n} here. It is time to sleep."),
              "Good night, {n}. Sleep well.",
              ("good night {n}", "sleep well {n}")),
    "bye": (("I have to go now. {n}", "Goodbye, I am {n}.", "Bye! {n} here.", "{n} here, I must leave."), "Goodbye, {n}. See you soon.",
            ("goodbye {n}", "bye {n}", "see you soon {n}")),
    "thanks": (("Thank you for all. {n}", "Thanks for your help, {n} here.", "I am {n}. Thank you so much.", "Many thanks from {n}."),
               "You are welcome, {n}.",
               ("you are welcome {n}", "any time {n}")),
    "birthday": (("Today is my birthday. {n}", "I am {n} and it is my birthday.", "{n} here. I have my birthday today.",
                  "It is my birthday! I am {n}."), "Happy birthday, {n}.",
                 ("happy birthday {n}",)),
    "good": (("I am {n}. I {g}.", "{n} here. I {g} today.", "I {g}! I am {n}.", "This is {n}. Today I {g}."),
             "Well done, {n}. That is good news.",
             ("well done {n}", "congratulations {n}", "good news {n}", "great news {n}")),
    "bad": (("I am {n}. I {b}.", "{n} here. I {b} today.", "I {b}. I am {n}.", "This is {n}. Today I {b}."),
            "I am sorry to hear that, {n}.",
            ("sorry to hear that {n}", "sorry {n}", "that is sad {n}")),
}
# fmt: on


def make_chat(rng):
    what = rng.choice(tuple(CHATS))
    said, reply, also = CHATS[what]
    n, g, b = rng.choice(NAMES), rng.choice(GOOD), rng.choice(BAD)
    fault = CHATS[other(rng, tuple(CHATS), what)][1]
    name = other(rng, NAMES, n)
    phrases = [p for kind, (_, _, replies) in CHATS.items() if kind != what for p in replies]
    detail = {"good": g, "bad": b}.get(what, "")
    return dict(
        kind="chat",
        prompt=rng.choice(said).format(n=n, g=g, b=b),
        keys=[f"chat: {what} {n} {detail}".strip()],
        answer=reply.format(n=n).removesuffix("."),
        sentence="{}.",
        wrong=[fault.format(n=n).removesuffix("."), reply.format(n=name).removesuffix(".")],
        accept=[p.format(n=n) for p in also],
        reject=[p.format(n=n) for p in phrases],
    )


POOLS |= {field: [x.lower() for x in values] for field, values in FIELDS.items()}
POOLS["story"] = [x.lower() for x in (*NAMES, *DONE, *PLACES)]
POOLS["english"] = SUBJECTS["spanish"]
KINDS = {
    "open": make_open,
    "choosing": make_choosing,
    "summary": make_summary,
    "rewriting": make_rewriting,
    "classification": make_classification,
    "extraction": make_extraction,
    "sorting": make_sorting,
    "brainstorm": make_brainstorm,
    "translation": make_translation,
    "arithmetic": make_arithmetic,
    "chat": make_chat,
}


def plain(item, long=False):
    """The right answer without courtesy: the bare one, or its sentence."""
    text = item["sentence"].format(item["answer"]) if long else item["answer"]
    return text if text.endswith((".", "?")) else text + "."

"""Managed fine-tuning against self-hosting: the cost of training and serving, and where it is even.

    python -m tools.cost --example             and do the deep dive's figures hold?
    python -m tools.cost --data FILE --model DIR --calls 2e6 --card-price 1.9 --picture

A month of c calls:

    managed(c) = fee + training / months + c p        p = input price_in + output price_out
    own(c)     = engineer + training / months + (n + spare) R + c m        m = --own-call
    n = ⌈c / K⌉ replicas     R = cards · price per hour · hours a month
    K = cards · 3600 · hours · utilisation / (input / read speed + output / write speed)

own(c) is a staircase. On a step both cost the same at c = fixed costs / (p - m), but the next
replica can make managed the cheaper again: there is a first break-even point, and one from which
self-hosting stays cheaper. None where R ≥ K (p - m): a replica costs more than all its calls.

Every default is an assumption, printed with the results and set by the option of its name. What
this misses: quality (the two models differ), latency, discounts (cached prompts, batches), failed
runs, data, evaluation; the service's own tokenizer. Several cards are taken to share a model evenly
and at no loss of speed; tinytune's stages train on one.
"""

import math
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from tqdm import tqdm

from common import hub, memory
from common.files import read_json, write_json
from common.run import main, opt, spell, writing
from data import records, templates
from data.tokenizer import Tokenizer
from tools.results import table

SIZES = memory.SIZES | {"8B": memory.shape(128256, 4096, 14336, 32, 32, 8, 128)}  # Llama 3
CARDS, FREE = (8, 16, 24, 48, 80, 141), 1  # GB, and how many of them stay free
SERVED = {"bf16": "LoRA", "nf4": "QLoRA"}  # weights in serving are as this method freezes them


@dataclass
class Options:
    data: str = opt("", "your records: their tokens are counted, in training and per call")
    model: str = opt(
        "", "checkpoint folder: its tokenizer counts --data, its shape is the size", hub="tokenizer"
    )
    size: str = opt("8B", "parameters of the model, without --model", choices=list(SIZES))
    tokens: float = opt(1e6, "training tokens per epoch, without --data", above=0)
    epochs: float = opt(3.0, "epochs", above=0)
    months: float = opt(12.0, "months until the model is trained anew", above=0)
    calls: float = opt(1e7, "calls a month", above=0)
    input_tokens: float = opt(0.0, "prompt tokens per call; 0: --data's mean, or 500", at_least=0)
    output_tokens: float = opt(0.0, "answer tokens per call; 0: --data's mean, or 100", at_least=0)
    # managed: OpenAI's prices for GPT-4o mini, fine-tuned, early in 2025
    train_price: float = opt(3.0, "managed: $ per 1M training tokens", above=0)
    input_price: float = opt(0.3, "managed: $ per 1M prompt tokens", above=0)
    output_price: float = opt(1.2, "managed: $ per 1M answer tokens", above=0)
    fee: float = opt(0.0, "managed: $ a month for the endpoint", at_least=0)
    # self-hosted: roughly an 8B model on a rented H100
    card: float = opt(80.0, "GB of memory on a card", above=FREE)
    card_price: float = opt(2.5, "$ per card and hour: its rent, or its wear and power", above=0)
    method: str = opt("LoRA", "how it is trained", choices=list(memory.METHODS))
    length: int = opt(2048, "tokens of a row in training", at_least=1)
    train_speed: float = opt(8000.0, "tokens per second and card in training (H100, 8B)", above=0)
    serve: str = opt("bf16", "weights in serving", choices=list(SERVED))
    read_speed: float = opt(20000.0, "prompt tokens per second and card (H100, 8B)", above=0)
    write_speed: float = opt(2500.0, "answer tokens per second and card (H100, 8B)", above=0)
    concurrent: int = opt(64, "calls that a replica answers at once", at_least=1)
    utilisation: float = opt(0.5, "mean load / peak load", above=0, at_most=1)
    hours: float = opt(730.0, "hours a month that the cards are on", above=0, at_most=744)
    spare: int = opt(1, "replicas beside those that the load needs", at_least=0)
    own_call: float = opt(0.0, "$ per self-hosted call beside the cards", at_least=0)
    engineer: float = opt(0.0, "$ a month for the time of whoever runs it", at_least=0)
    example: bool = opt(False, "check the deep dive's figures too")
    picture: bool = opt(False, "draw both costs by calls a month, beside --out, as .png")
    out: str = opt("out/cost.json", "file for the results")


# ---------------------------------------------------------------- tokens
def count_tokens(path, tok) -> dict:
    """A file of records → {"tokens" per epoch, "input" and "output": mean tokens of a prompt and of
    an answer}. A conversation's answer is its last turn; others' answers count, each with prompt.
    """
    if records.kind(path) == "conversation":
        talks = [r["messages"] for r in records.conversations(path, "turns")]
        rows = [(talk[:-1], [talk[-1]["content"]]) for talk in talks]
    else:
        ranked = [(r, zip(r["responses"], r["ranks"], strict=True)) for r in records.rankings(path)]
        rows = [(r["prompt"], [a for a, rank in pairs if rank >= 0]) for r, pairs in ranked]
    asked = answered = n = 0
    for prompt, answers in tqdm(rows, desc="tokens", unit="record"):
        ids, _ = templates.render(tok, prompt, add_generation_prompt=True)
        asked += len(ids) * len(answers)
        answered += sum(len(tok.encode(a)) + 1 for a in answers)  # and the end token
        n += len(answers)
    return {"tokens": asked + answered, "input": asked / n, "output": answered / n}


def read_tokens(o) -> dict:
    """{"tokens" per epoch, "input" and "output" per call}, as the options or --data say."""
    if o.data and not o.model:
        raise ValueError("--data needs --model, a checkpoint folder: its tokenizer counts")
    counted = {"tokens": o.tokens, "input": 500.0, "output": 100.0}
    if o.data:
        counted = count_tokens(o.data, Tokenizer.load(o.model))
    given = {"input": o.input_tokens, "output": o.output_tokens}
    return counted | {k: v for k, v in given.items() if v}


# ---------------------------------------------------------------- memory
def serving_rows(c, tokens: float, concurrent: int, weights: str) -> dict:
    """{what: bytes} for `concurrent` calls of `tokens` tokens at once: everything in 16 bits, but
    logits in 32, and with weights "nf4" the blocks' matrices in 4.
    """
    rows = memory.predict(c, **memory.METHODS[SERVED[weights]])
    rows = {what: size for what, size in rows.items() if what.startswith("frozen")}
    keys = c.num_hidden_layers * c.num_key_value_heads * c.head_dim  # numbers per token
    cache = 2 * 2 * keys * math.ceil(tokens) * concurrent  # values too, 2 bytes each
    return rows | {"KV cache": cache, "logits": 4 * concurrent * c.vocab_size}


def cards_needed(rows: dict, card: float) -> int:
    """How many cards of `card` GB hold the rows, shared out evenly (tensor parallelism)."""
    return math.ceil(sum(rows.values()) / ((card - FREE) * memory.UNIT))


def hardware(o, tokens: float) -> dict:
    """{use: {"gb", "alone": the smallest of CARDS that holds it, or None, "cards": how many of
    --card GB}} for each way to train and to serve calls of `tokens` tokens.
    """
    c = hub.read_config(Path(o.model)) if o.model else SIZES[o.size]
    uses = {f"train, {how}": memory.need(c, o.length, **kw) for how, kw in memory.METHODS.items()}
    uses |= {f"serve, {w}": serving_rows(c, tokens, o.concurrent, w) for w in SERVED}
    found = {}
    for use, rows in uses.items():
        alone = next((card for card in CARDS if cards_needed(rows, card) == 1), None)
        cards = cards_needed(rows, o.card)
        found[use] = {"gb": sum(rows.values()) / memory.UNIT, "alone": alone, "cards": cards}
    return found


# ---------------------------------------------------------------- money
def whole(x: float) -> int:
    """⌈x⌉, at least 1; a rounding error above a whole number does not count."""
    if not x < 1e12:
        raise ValueError(f"{x:.3g} replicas would be needed: an option is out of all proportion")
    return max(1, math.ceil(round(x, 9)))


def costs(o, t: dict, cards: int) -> dict:
    """Options, tokens (see read_tokens) and the cards of one replica → {"managed": {"training"
    once, "serving" a month, "month": all of it}, "own": the same and {"replica": one a month,
    "capacity": its calls a month, "replicas"}, "even": see break_even}, in $.
    """
    trained = t["tokens"] * o.epochs
    call = (t["input"] * o.input_price + t["output"] * o.output_price) / 1e6
    managed = {"training": trained / 1e6 * o.train_price}
    managed["serving"] = o.fee + o.calls * call
    managed["month"] = managed["serving"] + managed["training"] / o.months

    seconds = t["input"] / o.read_speed + t["output"] / o.write_speed  # of a card, per call
    capacity = cards * 3600 * o.hours * o.utilisation / seconds
    replica = cards * o.card_price * o.hours
    replicas = whole(o.calls / capacity) + o.spare
    own = {"training": trained / o.train_speed / 3600 * o.card_price}
    own["serving"] = replicas * replica + o.calls * o.own_call + o.engineer
    own["month"] = own["serving"] + own["training"] / o.months
    own |= {"replica": replica, "capacity": capacity, "replicas": replicas}
    fixed = o.engineer + o.spare * replica - o.fee
    fixed += (own["training"] - managed["training"]) / o.months
    even = break_even(fixed, replica, capacity, call - o.own_call)
    return {"managed": managed, "own": own, "even": even}


def break_even(fixed: float, replica: float, capacity: float, saving: float) -> dict:
    """The calls a month at which both cost the same → {"first", "lasting"}, None where none is.

    fixed: $ a month that self-hosting costs more, beside its n working replicas; replica: $ a month
    for one; capacity: its calls a month; saving: $ per call. Step n ends at n capacity calls, where
    self-hosting pays if fixed ≤ n gain; where step n + 1 begins, if fixed + replica ≤ n gain.
    """
    gain = saving * capacity - replica  # of a full replica

    def even(n):
        return max(0.0, (fixed + n * replica) / saving)

    if saving <= 0:
        return {"first": 0.0 if fixed + replica <= 0 else None, "lasting": None}
    if gain <= 1e-9 * replica:  # 0, but for rounding
        return {"first": even(1) if fixed <= gain else None, "lasting": None}
    return {"first": even(whole(fixed / gain)), "lasting": even(whole((fixed + replica) / gain))}


# ---------------------------------------------------------------- what is shown
SPEEDS = ("train_speed", "read_speed", "write_speed")
# for the deep dive: calls (input, output tokens); $ a month; GPT-4o's prices early in 2025
CALLS, ENGINEER = ((200, 5), (500, 100), (3000, 300)), 5000.0
SERVICES = {"fine-tuned": {}, "GPT-4o": {"input_price": 2.5, "output_price": 10.0}}


def cell(x) -> str:
    return x if isinstance(x, str) else "–" if x is None else f"{x:,.0f}"


def show(o, t: dict, uses: dict, found: dict):
    """Prints the assumptions, what fits where, both costs, and where they are equal."""
    for f in fields(o):
        value = getattr(o, f.name)
        given = "given: " if value != f.default else ""
        print(f"{spell(f.name):<15} {value!s:>10}  {given}{f.metadata['help']}")
    if (o.model or o.size != "8B") and all(getattr(o, k) == getattr(Options, k) for k in SPEEDS):
        print("The speeds are an 8B model's: yours has others, " + ", ".join(map(spell, SPEEDS)))
    call = f"{t['input']:,.1f} + {t['output']:,.1f} per call"
    print(f"tokens: {t['tokens']:,.0f} per epoch, {call}\n")
    rows = [[k, f"{x['gb']:.1f}", cell(x["alone"]), cell(x["cards"])] for k, x in uses.items()]
    print(table(["memory", "GB", "card that holds it", f"cards of {o.card:g} GB"], rows), "\n")
    managed, own = found["managed"], found["own"]
    rows = [[k, f"{managed[k]:,.2f}", f"{own[k]:,.2f}"] for k in managed]
    print(table(["$; training once, others a month", "managed", "own"], rows))
    cards = uses[f"train, {o.method}"]["cards"]
    hours = own["training"] / o.card_price / cards
    print(f"\ntraining, {o.method}: {hours:.2f} hours on {cards} of the cards")
    print(f"{own['replicas']} replicas; one answers {own['capacity']:,.0f} calls a month")
    print(say(**found["even"]))


def say(first, lasting) -> str:
    if first is None:
        return "no break-even: a replica costs more than all calls that it can answer do managed"
    later = "not for good" if lasting is None else f"for good from {lasting:,.0f}"
    return f"self-hosting pays from {first:,.0f} calls a month, {later}"


def deep_dive(o, t: dict, cards: int) -> list[dict]:
    """Break-even points by what the deep dive does not name beside its "~10 million calls"."""
    rows = []
    for (asked, answered), service, engineer in product(CALLS, SERVICES, (0.0, ENGINEER)):
        case = replace(o, **SERVICES[service], engineer=engineer)
        row = {"input": asked, "output": answered, "instead of": service, "engineer": engineer}
        rows.append(row | costs(case, t | row, cards)["even"])
    own = 1e6 / o.train_speed / 3600 * o.card_price
    print(f"\n$0.003 per 1,000 training tokens is $3.00 per million; on own cards ${own:.2f}\n")
    head = ["input", "output", "instead of", "engineer $", "pays from", "for good from"]
    print(table(head, [[cell(x) for x in row.values()] for row in rows]))
    below = sum(row["lasting"] is not None and row["lasting"] <= 1e7 for row in rows)
    print(f"\nfrom 10 million calls a month on, self-hosting pays in {below} of {len(rows)} cases")
    return rows


def draw(o, t: dict, cards: int, even: dict, path):
    """Both costs by calls a month."""
    from matplotlib.figure import Figure

    most = 2 * max(o.calls, even["lasting"] or even["first"] or 0)
    calls = [most * i / 500 for i in range(1, 501)]
    found = [costs(replace(o, calls=c), t, cards) for c in calls]
    axes = Figure((8, 4.5), layout="constrained").subplots()
    for whose in ("managed", "own"):
        axes.plot([c / 1e6 for c in calls], [x[whose]["month"] for x in found], label=whose)
    axes.set(xlabel="million calls a month", ylabel="$ a month", title=say(**even), ylim=(0, None))
    axes.legend()
    axes.figure.savefig(path, format="png", dpi=150)


def check(o, out: Path):
    """ValueError where no picture can be drawn, or the results would replace what is not ours."""
    if o.picture and not find_spec("matplotlib"):
        raise ValueError("--picture is drawn by matplotlib: pip install matplotlib")
    ours = out.suffix == ".json" and out.is_file()
    ours = ours and "tools.cost" in str(read_json(out).get("command"))
    taken = [path for path in (out, out.with_suffix(".png")) if path.exists() and not ours]
    if taken or out.suffix != ".json":
        raise ValueError(f"--out {out}: a name that ends in .json and is not taken was expected")


def estimate(o):
    check(o, out := Path(o.out))
    t = read_tokens(o)
    uses = hardware(o, t["input"] + t["output"])
    cards = uses[f"serve, {o.serve}"]["cards"]
    found = costs(o, t, cards)
    show(o, t, uses, found)
    record = {"command": shlex.join(["python", "-m", "tools.cost", *sys.argv[1:]])}
    record |= {"assumptions": asdict(o), "tokens": t, "memory": uses} | found
    if o.example:
        record["deep dive"] = deep_dive(o, t, cards)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if o.picture:
            draw(o, t, cards, found["even"], out.with_suffix(".png"))
        aside = out.with_suffix(".part")  # half a file is never taken for a whole one
        write_json(aside, record)
        aside.replace(out)


if __name__ == "__main__":
    main(estimate, Options, __doc__)

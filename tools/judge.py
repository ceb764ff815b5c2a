"""A judge on two checkpoints' answers: win rate, raw and at equal length, and the judge's biases.

    python -m tools.judge --a out/answers/dpo.jsonl --b out/answers/sft.jsonl --judge smollm2
    python -m tools.judge --data pairs.jsonl --judge openai      does it agree with people?
    python -m tools.judge --judge annotations.json               AlpacaEval's: a recorded judge

A judge is a checkpoint's folder (log-probabilities of "A" and "B"), `openai` or `anthropic` (tools/
endpoint.py says which variables name the model), FILE.py:function (scores, as ppo.py takes them),
or a recorded file. Each pair is shown in both orders; a judge that changes its mind said: a tie.

    OUT/asked.jsonl         each reply, kept as it comes: nothing is asked twice, and the same
                            command goes on where it was cut off
    OUT/preferences.jsonl   rankings for reward.py and dpo.py
    OUT/judge.json          the figures, each with its n and 95 % interval (_ci, half the width)

What it misses: two orders undo a preference for a place, the regression one for length; nothing
here undoes one for the judge's own style, for a confident tone, or for lists. A judge that is wrong
in both orders is just wrong, and an answer may talk to it ("choose me"). Whether a judge is worth
its price, only its agreement with people on your own prompts can say. Intervals are over pairs:
too narrow where several pairs share a prompt.
"""

import json
import random
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import files, tuning
from common.run import did_you_mean, fingerprint, is_function, load_function, main, opt, pick_device
from data import records, templates
from metrics import points
from model import logprobs
from tools import endpoint
from tools.answers import show
from tools.verdicts import add_difficulty, annotations, figures

RUBRIC = "The better answer is right, complete, courteous and no longer than it needs to be."
PAIR = """Compare two answers to one request. {rubric}

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better? Reply with one letter, A or B, and nothing else."""
SINGLE = """Rate an answer to a request. {rubric}

[Request]
{prompt}

[Answer]
{first}

Reply with one digit, from 1 (bad) to 5 (excellent), and nothing else."""
VERDICTS = {False: {"A": 1.0, "B": 0.0}, True: {str(i): float(i) for i in range(1, 6)}}  # --single
APIS = ("openai", "anthropic")
API = "judge openai anthropic"  # without which an option has no effect


@dataclass
class Options(tuning.Reading):
    judge: str = opt(
        "", "checkpoint folder, openai, anthropic, FILE.py:function, or annotations", hub="all"
    )
    a: str = opt("", "answers to judge, {prompt, answer} a line as tools.evals writes them")
    b: str = opt("", "the answers they are compared with, matched by prompt", needs="a")
    data: str = opt("", "instead: people's preference pairs or rankings")
    equal: str = opt("", "annotations of answers of equal quality: what length alone is worth")
    n: int = opt(1000, "how many pairs at most", at_least=1)
    single: bool = opt(False, "score each answer by itself, 1 to 5, instead of pairs")
    rubric: str = opt("", "text file that says what a good answer is")
    out: str = opt("out/judge", "folder for replies, preferences and figures")
    body: str = opt('{"temperature": 0, "max_tokens": 16}', "JSON, the rest of an API's request")
    timeout: float = opt(60.0, "seconds that an API may take", above=0)
    batch: int = opt(8, "questions at once", at_least=1)
    price_in: float = opt(0.0, "dollars per million tokens read", needs=API, at_least=0)
    price_out: float = opt(0.0, "dollars per million tokens written", needs=API, at_least=0)
    estimate: bool = opt(False, "say what that would be and cost, and stop", needs=API)
    seed: int = opt(0, "seed of the intervals, and of which answer of --data is a")
    device: str = opt("auto", "cpu, cuda or auto")


# ---------------------------------------------------------------- what is judged
def read_pairs(o) -> list[dict]:
    """[{prompt, a, b?, people?, finished?}]: b where there is a second file; people: 1 where people
    or the gold rater prefer a, ½ for a tie, else 0.
    """
    pairs = []
    if o.data:
        rng = random.Random(o.seed)
        for r in records.pairs(o.data)[: o.n]:
            # were a always the chosen one, a judge could not agree beyond chance
            first, second = rng.sample(("chosen", "rejected"), 2)
            people = float(first == "chosen")
            pairs.append(dict(prompt=r["prompt"], a=r[first], b=r[second], people=people))
        return pairs
    ours, theirs = records.answers(o.a), records.answers(o.b) if o.b else {}
    for key, x in ours.items():
        pair, y = dict(prompt=x["prompt"], a=x["answer"]), theirs.get(key)
        if y:
            pair["b"] = y["answer"]
            if all(isinstance(r.get("gold"), (int, float)) for r in (x, y)):
                pair["people"] = points([x["gold"]], [y["gold"]])[0]
            if all(isinstance(r.get("finished"), bool) for r in (x, y)):
                pair["finished"] = [x["finished"], y["finished"]]
        if y or not o.b:
            pairs.append(pair)
    records.report(o.a, len(pairs), {f"without their prompt in {o.b}": len(ours) - len(pairs)})
    return pairs[: o.n]


def question(pair, o, first, second=None) -> str:
    """What the judge reads; first, second: "a" or "b"."""
    turns = [(m["role"], m["content"]) for m in pair["prompt"]]
    asked = turns[0][1] if len(turns) == 1 else "\n".join(f"{who}: {said}" for who, said in turns)
    shown = dict(rubric=o.rubric, prompt=asked, first=pair[first], second=pair.get(second))
    return (SINGLE if o.single else PAIR).format(**shown)


# ---------------------------------------------------------------- judges
def checkpoint(o):
    """judge(questions) yields (question, value, reply). value: P("A") where A and B are all there
    is to say, or the expected score Σ s P(s) (G-Eval, Liu et al. 2023); None beyond the context.
    """
    model, tok = tuning.read(o, o.judge, pick_device(o.device))
    ids = [tok.encode(v) for v in VERDICTS[o.single]]
    values = torch.tensor([*VERDICTS[o.single].values()])

    @torch.no_grad()
    def judge(questions):
        for q in questions:
            talk = [{"role": "user", "content": q}]
            prompt = templates.render(tok, talk, add_generation_prompt=True)[0]
            if len(prompt) + max(map(len, ids)) > model.context:
                yield q, None, f"({len(prompt)} tokens, the judge's context is {model.context})"
                continue
            logps = logprobs(model, [prompt] * len(ids), ids).sum(1).float().cpu()
            yield q, (logps.softmax(0) * values).sum().item(), ""

    return judge


def verdict(reply: str, single: bool) -> float | None:
    """The value that a reply names: its last [[A]], or the letter (digit) that is all of it. None
    where it names none: a letter inside a sentence may be an article.
    """
    names = "".join(VERDICTS[single])
    marked = re.findall(rf"\[\[([{names}])\]\]", reply)
    alone = re.fullmatch(rf"\W*(?:answer|score)?\W*([{names}])\W*", reply, re.I)
    return VERDICTS[single].get(marked[-1] if marked else alone and alone[1].upper())


def ask(questions: list[str], o) -> dict[str, float]:
    """{question: value}, from OUT/asked.jsonl where it is there; without those whose reply cannot
    be read.
    """
    path = Path(o.out) / "asked.jsonl"
    if o.judge not in APIS:
        identity = [fingerprint(o.judge), o.quant, o.keep_base]
        return endpoint.ask_all(questions, lambda: checkpoint(o), identity, path, o.batch)
    e = endpoint.endpoint(o.judge, o.body, o.timeout)
    identity = [e.url, e.model, e.body]
    todo = endpoint.not_asked(questions, identity, path)
    print(endpoint.estimate(todo, o), file=sys.stderr)
    if o.estimate:
        sys.exit(0)

    def judge(questions):
        for q, reply in endpoint.at_once(e, questions):
            failed = isinstance(reply, Exception)
            yield q, reply if failed else verdict(reply, o.single), reply

    return endpoint.ask_all(questions, lambda: judge, identity, path, o.batch)


def rate(pairs, o):
    """Adds what the judge says to each pair: `scores`, one for each answer, or `won`, what a gets
    shown first and shown second (1, ½, 0; None: unreadable); and `points`, what a gets in all. Of
    a checkpoint also `more_often`: 1 where it gives a, shown first, more than b, shown first.
    """
    names = ("a", "b") if "b" in pairs[0] else ("a",)
    if is_function(o.judge):
        asked = [p["prompt"] for p in pairs for _ in names]
        scores = load_function(o.judge)(asked, [p[name] for p in pairs for name in names])
        answers = [scores[i : i + len(names)] for i in range(0, len(scores), len(names))]
    else:
        orders = [(name,) for name in names] if o.single else [("a", "b"), ("b", "a")]
        asked = [[question(p, o, *order) for order in orders] for p in pairs]
        values = ask([q for several in asked for q in several], o)
        answers = [[values.get(q) for q in several] for several in asked]
    for pair, said in zip(pairs, answers, strict=True):
        if o.single or is_function(o.judge):
            pair["scores"] = said
            won = points(said[:1], said[1:]) if len(said) == 2 and None not in said else [0.5]
        else:  # P(the first wins): a's, then b's
            won = [None if p is None else points([p], [0.5])[0] for p in said]
            won[1] = None if won[1] is None else 1 - won[1]
            pair["won"] = won
            if o.judge not in APIS and None not in said:
                pair["more_often"] = points(said[:1], said[1:])[0]
        if "b" in pair:
            pair["points"] = won[0] if won[0] == won[-1] and won[0] is not None else 0.5
            pair["length"] = len(pair["a"]) - len(pair["b"])
    return pairs


# ---------------------------------------------------------------- the script
def ranking(pair) -> dict:
    """A pair as data/records.py reads it; a tie: equal ranks."""
    ranks = [int(pair["points"] < 0.5), int(pair["points"] > 0.5)]
    kept = {k: pair[k] for k in ("finished",) if k in pair}
    return dict(prompt=pair["prompt"], responses=[pair["a"], pair["b"]], ranks=ranks, **kept)


def prepare(o):
    """Reads --rubric and --body. ValueError for options that do not go together."""
    kinds = f"a checkpoint's folder, {', '.join(APIS)}, FILE.py:function or annotations"
    if o.judge not in APIS and not is_function(o.judge) and not Path(o.judge or "?").exists():
        near = did_you_mean(o.judge, APIS)
        raise ValueError(f"--judge {o.judge or 'is missing'}: {kinds} was expected{near}")
    if (bool(o.a) + bool(o.data)) != (not is_recorded(o)):
        raise ValueError("--a or --data was expected, one of them; beside annotations none")
    if o.a and not (o.b or o.single or is_function(o.judge)):
        raise ValueError("--b was expected, answers to compare with; or --single")
    o.rubric = Path(o.rubric).read_text("utf-8").strip() if o.rubric else RUBRIC
    o.body = files.parse(o.body, "--body", "an object was expected")
    if not isinstance(o.body, dict):
        raise ValueError(f"--body: a JSON object was expected (got {o.body!r})")
    out = Path(o.out)
    if (out / "preferences.jsonl").exists() and not (out / "judge.json").exists():
        raise ValueError(f"{out}: holds preferences that no judge wrote; choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def is_recorded(o) -> bool:
    return Path(o.judge).is_file() and not is_function(o.judge)


def put(path: Path, text: str):
    """Half a file is never taken for a whole one."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, "utf-8")
    aside.replace(path)


def judge(o: Options):
    given = asdict(o)
    prepare(o)
    if o.judge in APIS:
        e = endpoint.endpoint(o.judge, o.body, o.timeout)
        given |= {"url": e.url, "model": e.model}
    if is_recorded(o):
        compared = {name: pairs[: o.n] for name, pairs in annotations(o.judge).items()}
    else:
        compared = {Path(o.a or o.data).stem: rate(read_pairs(o), o)}
    equal = [p for some in annotations(o.equal).values() for p in some] if o.equal else []
    if len(compared) > 1 and not any("difficulty" in p for some in compared.values() for p in some):
        add_difficulty(compared, equal)
    results = {name: figures(pairs, o.seed, equal) for name, pairs in compared.items()}
    ranked = [ranking(p) for pairs in compared.values() for p in pairs if "b" in p]
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in ranked]
    command = shlex.join(["python", "-m", "tools.judge", *sys.argv[1:]])
    results = {"command": command, "options": given, "comparisons": results}
    put(Path(o.out) / "preferences.jsonl", "".join(lines))
    put(Path(o.out) / "judge.json", json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    for name, found in results["comparisons"].items():
        show(name, found)


if __name__ == "__main__":
    main(judge, Options, __doc__)

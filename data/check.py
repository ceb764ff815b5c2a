"""What is in a file of records, before anything is trained on it; and the same in other formats.

    python -m data.records check FILE [FILE ...] [--model DIR]
    python -m data.records convert FILE OUT --to ours|openai|gemini|bedrock|anthropic|prompts

check counts what the stages would use, drop and hold out, and why; turns and tokens; duplicates,
exact and of the same words; pairs that say the same and pairs that prefer the longer answer; and
prompts of one file that stand in another. Paraphrases and translations are not seen.

convert writes the managed services' upload formats as their documentation has them: OpenAI
(messages; input, preferred_output, non_preferred_output), Gemini on Vertex AI (systemInstruction,
contents), Amazon Bedrock (bedrock-conversation-2024) and Anthropic on Bedrock (system, messages).
What a format cannot say is an error, so that nothing is lost in silence.
"""

import argparse
import contextlib
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

from common import download
from data import calls, records, rows, shapes, templates, turns
from data.tokenizer import Tokenizer

READ = {
    "conversation": lambda r: records.conversation(r, "any"),
    "preference pair": turns.pair,
    "ranking": turns.ranking,
    "text": records.document,
}
UNREAD = "that cannot be read"


# ---------------------------------------------------------------- check
class File:
    """A file's records as they are read, and what there is to say of it.

    found: [(line, kind, record)]; left_out: {reason: [lines]}; shapes: how many there are of each;
    marked: [(line, a chat format's marker in the record's text)].
    """

    def __init__(self, path):
        self.path, self.found, self.left_out = path, [], defaultdict(list)
        self.shapes, self.unused, self.error, self.marked = Counter(), Counter(), {}, []
        try:
            plain = rows.ending(path) == ".txt"
            for line, record in enumerate(texts(path), 1) if plain else rows.read(path):
                self.add(line, record)
        except ValueError as e:  # no JSON: the rest of the file is not seen
            self.error[UNREAD] = str(e)

    def add(self, line, record):
        try:
            kind, names = shapes.shape(record)
            result, unused = records.one(record, READ)
            self.shapes[f"{kind}: {' '.join(names.values())}"] += 1
            self.unused.update(unused)
            self.found.append((line, kind, result))
            self.marked += [(line, sign) for sign in records.markers(result)[:1]]
            if kind == "conversation" and records.label(record) is False:
                self.left_out[f"{records.UNWANTED} (KTO reads them)"].append(line)
            if kind == "conversation" and result["messages"][-1]["role"] != "assistant":
                self.left_out[f"{turns.UNANSWERED} (compare.py and ppo.py read them)"].append(line)
        except turns.OddError as e:
            self.left_out[e.reason].append(line)
        except ValueError as e:
            self.left_out[UNREAD].append(line)
            self.error.setdefault(UNREAD, f"line {line}: {e}")


def parts(kind, record):
    """→ a record's prompt, as messages, and its answers, as texts."""
    if kind == "text":
        return [], [record["text"]]
    if kind == "conversation":
        *prompt, last = record["messages"]
        if last["role"] != "assistant":
            return record["messages"], []
        return prompt, [calls.said(last)]
    if kind == "preference pair":
        return record["prompt"], [record["chosen"], record["rejected"]]
    return record["prompt"], record["responses"]


def words(texts) -> bytes:
    """A key that texts of the same words share, whatever their case and punctuation."""
    said = " ".join(re.findall(r"\w+", "\n".join(texts).casefold()))
    return hashlib.sha256(said.encode()).digest()


def quantiles(numbers) -> str:
    ordered = sorted(numbers)
    last = len(ordered) - 1
    names = {"median": 0.5, "90 %": 0.9, "99 %": 0.99}
    middle = [f"{name} {ordered[round(q * last)]:,}" for name, q in names.items()]
    return ", ".join([f"least {ordered[0]:,}", *middle, f"most {ordered[-1]:,}"])


def repeated(keys):
    """[(line, key)] → [(line, the line that has its key first)]."""
    first, found = {}, []
    for line, key in keys:
        if first.setdefault(key, line) != line:
            found.append((line, first[key]))
    return found


def shown(found, what) -> str:
    """How many, with the first of them."""
    if not found:
        return f"{what}: none"
    line, other = found[0]
    return f"{what}: {len(found):,} (first: line {line}, as line {other})"


def describe(file, tok):
    """Yields what there is to say of one file, line by line."""
    yield f"{file.path}: {len(file.found):,} records read"
    for shape, n in file.shapes.most_common():
        yield f"shape       {n:,} {shape}"
    if UNREAD in file.error and not file.left_out[UNREAD]:
        yield f"left out    the rest, {UNREAD}: {file.error[UNREAD]}"
    for reason, lines in filter(lambda found: found[1], file.left_out.items()):
        why = f"; {file.error[reason]}" if reason in file.error else ""
        yield f"left out    {len(lines):,} {reason} (first: line {lines[0]}{why})"
    for name, n in sorted(file.unused.items()):
        yield f"not used    field {name!a} of {n:,}"
    if file.marked:
        line, sign = file.marked[0]
        n = len(file.marked)
        yield f"markers     {n:,} have a chat format's in their text (first: line {line}, {sign!r})"
    called = [line for line, kind, record in file.found if calls.found(records.messages(record))]
    if called:
        names = ", ".join(sorted(templates.of(tok).calls)) or "none of them"
        yield (
            f"tool calls  {len(called):,} have some (first: line {called[0]}); --model's chat"
            f" template writes {names}"
        )
    if file.found:
        yield from contents(file, tok)


def contents(file, tok):
    split = [(line, kind, record, *parts(kind, record)) for line, kind, record in file.found]
    prompts = [(line, prompt) for line, _, _, prompt, _ in split if prompt]
    held = {line for line, prompt in prompts if records.held_out(prompt)}
    yield f"held out    {len(held):,} of {len(prompts):,} with a prompt"
    if prompts:
        yield f"turns       {quantiles(turn_count(*s[1:]) for s in split if s[3])}"
        system = sum(prompt[0]["role"] == "system" for _, prompt in prompts)
        yield f"system      {system:,} have a system message"
    yield from lengths(split, tok)
    texts = [(line, [*map(calls.said, p), *answers]) for line, _, _, p, answers in split]
    exact = repeated((line, tuple(said)) for line, said in texts)
    yield shown(exact, "duplicates  exact")
    same = {line for line, _ in exact}
    near = repeated((line, words(said)) for line, said in texts)
    yield shown([x for x in near if x[0] not in same], "duplicates  of the same words")
    opening = {line: words([records.opening(prompt)]) for line, prompt in prompts}
    trained = {key: line for line, key in reversed(opening.items()) if line not in held}
    leaks = [(line, trained[opening[line]]) for line in sorted(held) if opening[line] in trained]
    yield shown(leaks, "leakage     held out, with the words of a first question that is trained")


def turn_count(kind, record, prompt, answers):
    return sum(m["role"] != "system" for m in prompt) + bool(answers)


def lengths(split, tok):
    """Tokens of whole records, prompts and answers, without a chat format's own; pairs' lengths."""
    counts = {"whole": [], "prompt": [], "answer": []}
    pairs, known = [], {}

    def count(text):
        if text not in known:
            known[text] = len(tok.encode(text))
        return known[text]

    for _, kind, _, prompt, answers in split:
        asked, said = sum(count(m["content"]) for m in prompt), [count(a) for a in answers]
        counts["whole"].append(asked + max(said, default=0))
        counts["answer"] += said
        counts["prompt"] += [asked] if prompt else []
        pairs += [said] if kind == "preference pair" else []
    for name, found in counts.items():
        if found:
            yield f"tokens      {name}: {quantiles(found)}"
    if pairs:
        longer = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        yield (
            f"pairs       chosen has {means[0]:.1f} tokens, rejected {means[1]:.1f}; chosen is the"
            f" longer one in {longer:.0%}"
        )


def leakage(files):
    """Yields, for two files, the prompts of the second that stand in the first too, by words."""
    keys = {}
    for file in files:
        split = ((line, parts(kind, record)[0]) for line, kind, record in file.found)
        keys[file] = {line: words(map(calls.said, prompt)) for line, prompt in split if prompt}
    for i, one in enumerate(files):
        first = {key: line for line, key in reversed(keys[one].items())}
        for other in files[i + 1 :]:
            both = [(line, first[key]) for line, key in keys[other].items() if key in first]
            if both:
                line, there = both[0]
                yield (
                    f"leakage     {len(both):,} prompts of {other.path} stand in {one.path} (first:"
                    f" line {line}, there line {there})"
                )


def check(o) -> bool:
    tok = Tokenizer.load(Path(download.folder(o.model, "tokenizer")))
    files, fine = [], True
    for path in o.files:
        files.append(File(path))
        print("\n".join(describe(files[-1], tok)))
        if files[-1].error:
            fine = False
        elif why := refusal(path):
            print(f"refused     {why}")
            fine = False
        print(flush=True)
    for line in leakage(files):
        print(line)
    return fine


def refusal(path) -> str:
    """Why a stage would stop at the file; "" where none would."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what it says beside that is said above
            read(path, "ours", allow_dropped=False, allow_markers=False)
    except ValueError as e:
        return str(e)
    return ""


# ---------------------------------------------------------------- convert
def openai(record):
    record = calls.as_record(record)
    tools = {"tools": record["tools"]} if "tools" in record else {}
    asked = {"messages": [calls.as_openai(m) for m in records.messages(record)]} | tools
    if "messages" in record:
        return asked
    one = {"input": asked}
    for field, name in (("chosen", "preferred_output"), ("rejected", "non_preferred_output")):
        one[name] = [{"role": "assistant", "content": record[field]}]
    return one


def gemini(record):
    def turn(m):
        role = "model" if m["role"] == "assistant" else m["role"]
        return {"role": role, "parts": [{"text": m["content"]}]}

    system, messages = _apart(record)
    head = {"systemInstruction": turn(system)} if system else {}
    return head | {"contents": [turn(m) for m in messages]}


def bedrock(record):
    system, messages = _apart(record)
    one = {"schemaVersion": "bedrock-conversation-2024"}
    if system:
        one["system"] = [{"text": system["content"]}]
    return one | {"messages": [m | {"content": [{"text": m["content"]}]} for m in messages]}


def anthropic(record):
    system, messages = _apart(record)
    return ({"system": system["content"]} if system else {}) | {"messages": messages}


def _apart(record):
    """→ the system message or None, and the turns; ValueError for what the format cannot say."""
    if "messages" not in record:
        raise ValueError("this format has conversations alone: --to openai has pairs")
    if calls.found(record["messages"]):
        raise ValueError("tool calls are written by --to openai and --to ours")
    if any("weight" in m for m in record["messages"]):
        raise ValueError("this format has no turn that is not trained: --to openai has a weight")
    first, *others = record["messages"]
    return (first, others) if first["role"] == "system" else (None, record["messages"])


def prompts(record):
    messages = record.get("messages") or record["prompt"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    unweighed = [{k: v for k, v in m.items() if k != "weight"} for m in asked]
    return calls.as_record({"messages": unweighed})


FORMATS = {"ours": calls.as_record, "openai": openai, "gemini": gemini, "bedrock": bedrock}
FORMATS |= {"anthropic": anthropic, "prompts": prompts}


def texts(path, **allowed):
    return [{"text": text} for text in records.texts(path, **allowed)]


def read(path, to, **allowed):
    """A file's records for a format; a ranking's pairs where it has no rankings."""
    if records.is_text(path):
        if to != "ours":
            raise ValueError(f"{path}: conversations or pairs were expected, these are texts")
        return texts(path, **allowed)
    if records.kind(path) == "conversation":
        need = "any" if to in ("ours", "prompts") else "answer"
        return records.conversations(path, need, written=calls.KINDS, **allowed)
    reader = records.pairs if to == "openai" else records.rankings
    return reader(path, written=calls.KINDS, **allowed)


def convert(o):
    if Path(o.out).exists() and Path(o.out).samefile(o.file):
        raise ValueError(f"{o.out}: another file than {o.file} was expected")
    if Path(o.out).suffix.lower() not in ("", ".jsonl", ".json"):
        raise ValueError(f"{o.out}: JSON lines are written: a name in .jsonl was expected")
    if Path(o.out).is_dir() or not Path(o.out).absolute().parent.is_dir():
        raise ValueError(f"{o.out}: a file in a folder that exists was expected")
    lines = []
    for i, record in enumerate(read(o.file, o.to), 1):
        try:
            lines.append(json.dumps(FORMATS[o.to](record), ensure_ascii=False, default=str) + "\n")
        except ValueError as e:
            raise ValueError(f"{o.file}: record {i}: {e}") from None
    if o.to == "prompts":
        lines = dict.fromkeys(lines)  # each prompt once
    aside = Path(f"{o.out}.part")  # half a file is never taken for a whole one
    aside.write_text("".join(lines), encoding="utf-8", newline="\n")
    aside.replace(o.out)
    return True


def main():
    parser = argparse.ArgumentParser(prog="python -m data.records", description=__doc__[:91])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="what is in files of records, and what is wrong")
    one.add_argument("files", nargs="+", help="files of records")
    one.add_argument(
        "--model",
        default="data/base",
        help="folder, or owner/name on the hub, whose tokenizer counts",
    )
    one = commands.add_parser("convert", help="the same records in another format")
    one.add_argument("file", help="a file of records")
    one.add_argument("out", help="JSONL file to write")
    one.add_argument("--to", default="ours", choices=FORMATS, help="the format")
    o = parser.parse_args()
    try:
        fine = {"check": check, "convert": convert}[o.command](o)
    except (ValueError, OSError) as e:
        print(f"records.py: {' '.join(str(e).split())}", file=sys.stderr)
        fine = False
    sys.exit(0 if fine else 2)

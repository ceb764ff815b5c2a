"""Records in the common formats -> conversations, preference pairs, rankings.

    conversation   {"messages": [{"role", "content"}, ...]}   {"instruction", "input", "output"}   {"prompt", "completion"}
    pair           {"prompt", "chosen", "rejected"}           {"instruction", "input", "chosen", "rejected"}
    ranking        {"prompt", "responses": [K], "ranks": [K]}      0 the best, ties allowed, -1: that answer is absent

one JSON object a line, or one JSON array. A prompt or an answer is a string or a list of messages; fields that are not named
here pass through. What cannot be read raises a ValueError "file:line: field: what was expected (got ...)"; what can be read but
is of no use is dropped, counted, and said in one line.
"""
import argparse
import hashlib
import json
import random
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data import templates

READERS = {"conversation": "sft.py, and where they end in a user's turn compare.py and ppo.py,", "preference pair": "reward.py and dpo.py",
           "ranking": "reward.py and dpo.py"}                            # kind -> who reads it
SAMPLED = ("finished", "ids", "tokenizer")                             # what compare.py writes beside the answers
EMPTY, SAME, TIED = "with an empty turn", "with chosen = rejected", "without two answers of different rank"


def conversations(path, need="answer"):
    """-> [{"messages": [...], ...}], each ending in an assistant's turn (need "answer") or in a user's (need "prompt")."""
    last = {"answer": "assistant", "prompt": "user"}[need]

    def convert(record):
        messages, used = _conversation(record, need)
        if messages[-1]["role"] != last:
            raise ValueError(f"messages: {last} was expected as the last turn (got {messages[-1]['role']})")
        if any(_blank(m["content"]) for m in messages if m["role"] != "system"):
            return EMPTY
        return _keep(record, used, messages=messages)

    return _convert(path, {"conversation": convert})


def preferences(path):
    """-> [{"prompt": [messages], "chosen": str, "rejected": str, ...}]"""
    return _convert(path, {"preference pair": _pair})


def rankings(path):
    """-> [{"prompt": [messages], "responses": [K str], "ranks": [K int], ...}]; a preference pair is a ranking of two."""
    def pair_as_ranking(record):
        pair = _pair(record)
        if isinstance(pair, str):
            return pair
        return _keep(pair, ("chosen", "rejected", *SAMPLED), prompt=pair["prompt"], responses=[pair["chosen"], pair["rejected"]],
                     ranks=[0, 1])

    return _convert(path, {"ranking": _ranking, "preference pair": pair_as_ranking})


def pairs(path, which="all"):
    """Rankings or pairs -> pairs as from `preferences`: all that differ in rank, or the best against the worst ("best_worst")."""
    if which not in ("all", "best_worst"):
        raise ValueError(f'which: "all" or "best_worst" was expected (got {which!r})')
    out, dropped = [], Counter()
    for record in rankings(path):
        responses, ranks = record["responses"], record["ranks"]
        order = sorted((i for i in range(len(ranks)) if ranks[i] >= 0), key=lambda i: ranks[i])
        worst = next(i for i in order if ranks[i] == ranks[order[-1]])
        wanted = [(order[0], worst)] if which == "best_worst" else [(i, j) for i in order for j in order if ranks[i] < ranks[j]]
        for i, j in wanted:
            if responses[i] == responses[j]:
                dropped[SAME] += 1
            else:
                both = {k: [record[k][i], record[k][j]] for k in SAMPLED[:2] if k in record}    # chosen's, rejected's
                out.append(_keep(record, ("responses", "ranks"), prompt=record["prompt"], chosen=responses[i],
                                 rejected=responses[j], **both))
    report(path, len(out), dropped, "pairs")
    return out


def held_out(prompt):
    """About 1 prompt in 10, by a hash of its first user's turn (spaces aside): the one place where held-out is decided.

    The opening alone counts, so that a longer conversation, or the same question under a system message, lies on the same side
    in an instruction file and in a preference file.
    """
    opening = next(m["content"] for m in prompt if m["role"] == "user")
    digest = hashlib.sha256(" ".join(opening.split()).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def kind(path):
    """What a file's first record is: "conversation", "preference pair" or "ranking"."""
    for line, record in _read(path):
        try:
            return _kind(record)
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
    report(path, 0, {})


def split(records):
    """records of any kind -> (train, held out), each in its order."""
    sides = [], []
    for record in records:
        sides[held_out(record["messages" if _kind(record) == "conversation" else "prompt"])].append(record)
    return sides


def batch(records, step, size, seed):
    """The step-th batch of an endless stream of shuffles: each record comes once an epoch, none is left out at an epoch's end."""
    out = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(records))
        out.append(records[_shuffle(len(records), seed, epoch)[place]])
    return out


@lru_cache(4)
def _shuffle(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def report(path, kept, dropped, what="records"):
    """Says on stderr in one line what was dropped (a Counter: reason -> number); ValueError where nothing is left.

    Stages call it too, for what they drop when they tokenise.
    """
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
    if not kept:
        raise ValueError(f"{path}: no usable {what} in it" + (f" (dropped: {reasons})" if reasons else ""))
    if reasons:
        print(f"{path}: {kept:,} {what} used, dropped {reasons}", file=sys.stderr)


def _convert(path, readers):
    """Reads the file and calls readers[kind](record) -> a record, or the reason (str) why it is dropped."""
    out, dropped = [], Counter()
    for line, record in _read(path):
        try:
            kind = _kind(record)
            if kind not in readers:
                raise ValueError(f"a {' or '.join(readers)} was expected, this is a {kind}: {READERS[kind]} read those")
            result = readers[kind](record)
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
        if isinstance(result, str):
            dropped[result] += 1
        else:
            out.append(result)
    report(path, len(out), dropped)
    return out


def _read(path):
    """-> (line number, JSON value) of each line, or of each element of an array. Tolerates a BOM and CRLF."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(f"{path}:{line}: UTF-8 was expected (got the byte 0x{data[e.start]:02x}): save the file as UTF-8") from None
    if text.lstrip()[:1] == "[":
        yield from _array(path, text)
        return
    for n, line in enumerate(text.split("\n"), 1):             # not splitlines(): U+2028 may stand in a string
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{path}:{n}: one JSON object a line was expected ({e})") from None


def _array(path, text):
    """The elements of a JSON array, each with the line it begins on."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    seen = 0

    def skip(at):
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at, separator = skip(at), ","
    while text[at:at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        if separator != ",":
            raise ValueError(f"{path}:{line}: a comma or the array's end was expected (got {text[at:at + 20]!r})")
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{line}: a JSON object was expected ({e})") from None
        yield line, value
        at = skip(at)
        separator = text[at:at + 1]
        at = skip(at + 1) if separator == "," else at
    if text[at + 1:].strip():
        raise ValueError(f"{path}:{text.count(chr(10), 0, at) + 1}: nothing was expected after the array "
                         f"(got {text[at + 1:].strip()[:20]!r})")


def _kind(record):
    """conversation, preference pair or ranking, by the fields."""
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected (got {_short(record)})")
    if "responses" in record or "ranks" in record:
        return "ranking"
    if "chosen" in record or "rejected" in record:
        return "preference pair"
    if record.keys() & {"messages", "instruction", "prompt", "completion"}:
        return "conversation"
    raise ValueError("messages, instruction, prompt, chosen or responses was expected among the fields "
                     f"(got {', '.join(sorted(record)) or 'none'})")


def _conversation(record, need):
    """-> (messages, the names of the fields they are made of)."""
    if "messages" in record:
        return _messages(record, "messages"), ("messages",)
    if "instruction" in record:
        messages, used = _alpaca(record)
        answer = "output"
    else:
        messages, used = _prompt(record), ("prompt",)
        answer = "completion"
    if need == "answer" or not _blank(record.get(answer) or ""):
        messages = [*messages, {"role": "assistant", "content": _answer(record, answer, messages)}]
    return messages, (*used, answer)


def _pair(record):
    """A pair's record -> {"prompt", "chosen", "rejected", ...}, or the reason why it is dropped."""
    if "instruction" in record:
        prompt, used = _alpaca(record)
    elif "prompt" in record:
        prompt, used = _prompt(record), ("prompt",)
    elif isinstance(record.get("chosen"), list):                # both are whole conversations; what they share is the prompt
        prompt, used = _messages(record, "chosen")[:-1], ()
        _ends_in_user(prompt, "chosen")
    else:
        raise ValueError(f"prompt: a string or a list of messages was expected (got {_short(record.get('prompt'))})")
    chosen, rejected = (_answer(record, field, prompt) for field in ("chosen", "rejected"))
    if any(map(_blank, (*(m["content"] for m in prompt if m["role"] != "system"), chosen, rejected))):
        return EMPTY
    if chosen == rejected:
        return SAME
    return _keep(record, used, prompt=prompt, chosen=chosen, rejected=rejected)


def _ranking(record):
    """A ranking's record checked. An empty answer that was ranked stays: a labeller has judged it."""
    prompt, responses, ranks = _prompt(record), record.get("responses"), record.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"responses: a list of 2 or more strings was expected (got {_short(responses)})")
    responses = [_answer({"responses": r}, "responses", prompt) for r in responses]
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise ValueError(f"ranks: {len(responses)} integers, as many as responses, were expected (got {_short(ranks)})")
    for rank in ranks:
        if type(rank) is not int or rank < -1:
            raise ValueError(f"ranks: integers from 0, or -1 for an absent answer, were expected (got {_short(rank)})")
    if any(_blank(m["content"]) for m in prompt if m["role"] != "system"):
        return EMPTY
    if len({r for r in ranks if r >= 0}) < 2:
        return TIED
    return _keep(record, _unknown_ids(record, len(responses)), prompt=prompt, responses=responses, ranks=list(ranks))


def _unknown_ids(record, k):
    """Checks what compare.py writes beside the K answers of a ranking -> of it the fields that mean nothing here."""
    ended, ids = record.get("finished"), record.get("ids")
    if ended is not None and not (isinstance(ended, list) and len(ended) == k and all(type(f) is bool for f in ended)):
        raise ValueError(f"finished: {k} times true or false, as many as responses, were expected (got {_short(ended)})")
    lacking = () if ended is not None else ("finished",)
    if not isinstance(record.get("tokenizer"), str) or ids is None:        # ids of what? of some other table, perhaps
        return ("ids", *lacking)
    fits = isinstance(ids, list) and len(ids) == k
    if not fits or not all(isinstance(a, list) and a and all(type(i) is int and i >= 0 for i in a) for a in ids):
        raise ValueError(f"ids: {k} lists of token ids, as many as responses, were expected beside tokenizer (got {_short(ids)})")
    return lacking


def _prompt(record):
    """record["prompt"], a string or messages that end in a user's turn -> messages."""
    if isinstance(record.get("prompt"), list):
        messages = _messages(record, "prompt")
        _ends_in_user(messages, "prompt")
        return messages
    return [{"role": "user", "content": _string(record, "prompt", "a string or a list of messages")}]


def _alpaca(record):
    """instruction, and the input after an empty line where there is one, are the user's turn."""
    parts = [_string(record, "instruction")]
    if record.get("input") is not None:
        parts.append(_string(record, "input"))
    return [{"role": "user", "content": "\n\n".join(p for p in parts if p)}], ("instruction", "input")


def _answer(record, field, prompt):
    """An answer as a string: given as one, or as messages of which the last is the assistant's and the others the prompt's."""
    if not isinstance(record.get(field), list):
        return _string(record, field, "a string or a list of messages")
    given = record[field]
    if len(given) == 1 and isinstance(given[0], dict) and given[0].get("role") == "assistant":
        return _string(given[0], "content", where=f"{field}: message 1: content")
    messages = _messages(record, field)
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{field}: the last message: assistant was expected (got {messages[-1]['role']})")
    if messages[:-1] != prompt:
        raise ValueError(f"{field}: the prompt's messages and then the answer were expected (got {_short(messages[:-1])} before it)")
    return messages[-1]["content"]


def _messages(record, field):
    """record[field] checked -> new message objects of role and content alone."""
    try:
        templates.check(record[field])
        return [{"role": m["role"], "content": _string(m, "content", where=f"message {i}: content")}
                for i, m in enumerate(record[field], 1)]
    except ValueError as e:
        raise ValueError(f"{field}: {e}") from None


def _ends_in_user(messages, field):
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"{field}: messages that end in a user's turn were expected (got {messages[-1]['role'] if messages else 'none'})")


def _string(record, field, expected="a string", where=None):
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where or field}: {expected} was expected (got {_short(value)})")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{where or field}: Unicode text was expected (got half a character, \\u{ord(value[e.start]):04x})") from None
    return value


def _blank(text):
    return isinstance(text, str) and not text.strip()


def _keep(record, used, **fields):
    """The fields, and behind them what else the record has."""
    return fields | {k: v for k, v in record.items() if k not in fields and k not in used}


_short = templates._short


def main():
    """python -m data.records FILE OUT: the prompts of a file of any kind, for compare.py and ppo.py."""
    parser = argparse.ArgumentParser(description="Writes the prompts of a file of records: their messages up to the last user's turn.")
    parser.add_argument("file", help="conversations, preference pairs or rankings")
    parser.add_argument("out", help="JSONL file for {messages} that end in a user's turn")
    o = parser.parse_args()
    try:
        chats = kind(o.file) == "conversation"
        found = [r["messages"][:-1] for r in conversations(o.file)] if chats else [r["prompt"] for r in rankings(o.file)]
        lines = dict.fromkeys(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in found)  # each prompt once
        Path(o.out).write_text("".join(lines), encoding="utf-8", newline="\n")
    except (ValueError, OSError) as e:
        sys.exit(f"records.py: {e}")


if __name__ == "__main__":
    main()

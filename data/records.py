"""Records in the common formats -> conversations, preference pairs, rankings.

    conversation   {"messages": [{"role", "content"}, ...]}   {"instruction", "input", "output"}   {"prompt", "completion"}
    pair           {"prompt", "chosen", "rejected"}           {"instruction", "input", "chosen", "rejected"}
    ranking        {"prompt", "responses": [K], "ranks": [K]}      0 the best, ties allowed, -1: that answer is absent

one JSON object a line, or one JSON array. A prompt or an answer is a string or a list of messages.
What cannot be read raises a ValueError "file:line: field: what was expected (got ...)"; what can be
read but is of no use is dropped, counted, and said in one line. A field that is not named above is
in one of the tables below, or it passes through, and that line counts it as not used.
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
from data.tokenizer import check_spaces

READERS = {
    "conversation": "sft.py, and where they end in a user's turn compare.py and ppo.py,",
    "preference pair": "reward.py and dpo.py",
    "ranking": "reward.py and dpo.py",
}  # kind -> who reads it
# what compare.py writes beside the answers
SAMPLED = ("finished", "ids", "tokenizer")
EMPTY, SAME, TIED = (
    "with an empty turn",
    "with chosen = rejected",
    "without two answers of different rank",
)
UNWANTED = "with label false"
WRITES = "python -m data.records FILE OUT writes the prompts of a file"

# ---- what else a record or a message may carry: used, refused by name, harmless, or else counted
BESIDE = ("system", "system_prompt", "history")  # used: they go in front of the turns
WEIGHTS = ("weight", "train", "training", "loss")  # used: a message with 0 is read, not trained
LABELS = ("label", "kto_tag")  # used: a conversation with false has no good answer (KTO)
CALLS, TEXT = "no chat format here writes tool calls", "text alone is read here"
THOUGHT = "no chat format here writes what is thought before an answer"
REFUSED = {  # they would change what is learnt, and cannot be honoured
    **dict.fromkeys(["tools", "functions", "tool_calls", "function_call", "function_calls"], CALLS),
    **dict.fromkeys(["tool_call_id", "tool_choice", "tool_responses"], CALLS),
    **dict.fromkeys(["image", "images", "video", "videos", "audio", "audios", "media"], TEXT),
    **dict.fromkeys(["reasoning_content", "reasoning", "thinking", "thought", "thoughts"], THOUGHT),
    **dict.fromkeys(
        ["mask", "loss_mask", "labels"], "a message's weight, 0 or 1, says what is trained"
    ),
    **dict.fromkeys(["input", "context"], "it goes into the prompt beside `instruction` alone"),
    **dict.fromkeys(["contexts", "documents"], "it must stand in the prompt"),
    "chat_template_kwargs": "no chat format here has arguments",
}
HARMLESS = {  # where a record is from, what it is about; at the end what this project's files have
    *"id idx index uid uuid guid hash qid prompt_id question_id conversation_id message_id".split(),
    *"example_id sample_id instruction_id row_id parent_id turn num_turns".split(),
    *"source sources dataset dataset_name data_source subset origin url license author".split(),
    *"created created_at date timestamp time version category categories type kind".split(),
    *"task task_type task_name topic topics subject domain language lang tag tags".split(),
    *"metadata meta info length num_tokens token_count cache_control generator annotator".split(),
    *"model model_name chosen_model rejected_model score_chosen score_rejected".split(),
    *"chosen_score rejected_score chosen_rating rejected_rating".split(),
    *"item reference finished ids tokenizer".split(),
}


def conversations(path, need="answer"):
    """-> [{"messages": [...], ...}], each ending in an assistant's turn (need "answer") or in a
    user's (need "prompt").

    need "turns": as "answer", but not to learn the answers: labels and weights do not matter.
    """
    last = {"answer": "assistant", "turns": "assistant", "prompt": "user"}[need]

    def convert(record):
        messages, used = _conversation(record, need)
        if messages[-1]["role"] != last:
            advice = f": {WRITES}" if need == "prompt" else ""
            got = messages[-1]["role"]
            raise ValueError(f"messages: {last} was expected as the last turn (got {got}){advice}")
        if any(_blank(m["content"]) for m in messages if m["role"] != "system"):
            return EMPTY
        if need == "answer" and any(record.get(k) in (0,) for k in LABELS):  # false is 0
            return UNWANTED
        good = (k for k in LABELS if record.get(k) in (0, 1, None))
        return _keep(record, (*used, *good), messages=messages)

    return _convert(path, {"conversation": convert})


def preferences(path):
    """-> [{"prompt": [messages], "chosen": str, "rejected": str, ...}]"""
    return _convert(path, {"preference pair": _pair})


def rankings(path):
    """-> [{"prompt": [messages], "responses": [K str], "ranks": [K int], ...}]; a preference pair
    is a ranking of two.
    """

    def pair_as_ranking(record):
        pair = _pair(record)
        if isinstance(pair, str):
            return pair
        return _keep(
            pair,
            ("chosen", "rejected", *SAMPLED),
            prompt=pair["prompt"],
            responses=[pair["chosen"], pair["rejected"]],
            ranks=[0, 1],
        )

    return _convert(path, {"ranking": _ranking, "preference pair": pair_as_ranking})


def pairs(path, which="all"):
    """Rankings or pairs -> pairs as from `preferences`: all that differ in rank, or the best
    against the worst ("best_worst").
    """
    if which not in ("all", "best_worst"):
        raise ValueError(f'which: "all" or "best_worst" was expected (got {which!r})')
    out, dropped = [], Counter()
    for record in rankings(path):
        responses, ranks = record["responses"], record["ranks"]
        order = sorted((i for i in range(len(ranks)) if ranks[i] >= 0), key=lambda i: ranks[i])
        worst = next(i for i in order if ranks[i] == ranks[order[-1]])
        wanted = (
            [(order[0], worst)]
            if which == "best_worst"
            else [(i, j) for i in order for j in order if ranks[i] < ranks[j]]
        )
        for i, j in wanted:
            if responses[i] == responses[j]:
                dropped[SAME] += 1
            else:
                # chosen's, rejected's
                both = {k: [record[k][i], record[k][j]] for k in SAMPLED[:2] if k in record}
                out.append(
                    _keep(
                        record,
                        ("responses", "ranks"),
                        prompt=record["prompt"],
                        chosen=responses[i],
                        rejected=responses[j],
                        **both,
                    )
                )
    report(path, len(out), dropped, "pairs")
    return out


def held_out(prompt):
    """About 1 prompt in 10, by a hash of its first user's turn (spaces aside): the one place where
    held-out is decided.

    The opening alone counts, so that a longer conversation, or the same question under a system
    message, lies on the same side in an instruction file and in a preference file.
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
        sides[held_out(record["messages" if _kind(record) == "conversation" else "prompt"])].append(
            record
        )
    return sides


def batch(records, step, size, seed):
    """The step-th batch of an endless stream of shuffles: each record comes once an epoch, none is
    left out at an epoch's end.
    """
    out = []
    for i in range(step * size, (step + 1) * size):
        epoch, place = divmod(i, len(records))
        out.append(records[_shuffle(len(records), seed, epoch)[place]])
    return out


@lru_cache(4)
def _shuffle(n, seed, epoch):
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def report(path, kept, dropped, what="records", held=None, unused=None):
    """Says in a line on stderr what was used, dropped, held out; ValueError where nothing is left.

    dropped: a Counter, reason -> number. held: how many are held out, 0 where a stage splits
    nothing; a stage says its line always. A reader has no `held`: it says its own where it dropped
    records, or found fields that nothing is made of (unused, a Counter: field -> records).
    """
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
    if not kept:
        why = [f"dropped: {reasons}"] if reasons else []
        if held:
            why.append(f"held out: {held:,}, all that share a first question lie on one side")
        why = f" ({'; '.join(why)})" if why else ""
        raise ValueError(f"{path}: no usable {what} in it{why}")
    said = [f"dropped {reasons}"] if reasons else []
    if held is not None:
        said = [*(said or ["none dropped"]), f"{held:,} held out" if held else "none held out"]
    if unused:
        names = [
            f"{name[:40] if name.isprintable() else ascii(name[:40])} ({n:,})"
            for name, n in sorted(unused.items())
        ]
        more = [f"{len(names) - 9:,} more"] if len(names) > 9 else []
        said.append("fields not used: " + ", ".join(names[:9] + more))
    if said:
        print(f"{path}: {kept:,} {what} used, {', '.join(said)}", file=sys.stderr)


def say_cut(length, context):
    """Says that --length is more than the model can read: `context` tokens count in its place."""
    if length > context:
        said = f"the model's context is {context:,} tokens, what is longer is dropped"
        print(f"--length {length:,}: {said}", file=sys.stderr)


def _convert(path, readers):
    """Reads the file and calls readers[kind](record) -> a record, or the reason (str) why it is
    dropped.
    """
    out, dropped, unused = [], Counter(), Counter()
    for line, record in _read(path):
        try:
            kind = _kind(record)
            if kind not in readers:
                raise ValueError(
                    f"a {' or '.join(readers)} was expected, this is a {kind}: {READERS[kind]} read"
                    " those"
                )
            others = _message_fields(record)
            result = readers[kind](record)
            if not isinstance(result, str):
                unused.update(others | _record_fields(record, result, kind))
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
        if isinstance(result, str):
            dropped[result] += 1
        else:
            out.append(result)
    report(path, len(out), dropped, unused=unused)
    return out


def _record_fields(record, result, kind):
    """The names of its fields that are neither used nor harmless; ValueError for a refused one."""
    made = {"messages"} if kind == "conversation" else {"responses", "ranks"}
    made |= {"chosen", "rejected"} if kind == "preference pair" else set()
    made |= {"prompt"} if kind != "conversation" and "instruction" not in record else set()
    left = {k: v for k, v in record.items() if k in result.keys() - made}
    for k in WEIGHTS[:3]:
        if left.get(k) not in (1, None):
            got = _short(left[k])
            raise ValueError(f"{k}: 1 was expected, all records count alike here (got {got})")
    return _not_used(left)


def _message_fields(record):
    """The same of its messages, before they are read."""
    found = set()
    for field in (
        "messages",
        "prompt",
        "completion",
        "output",
        "response",
        "chosen",
        "rejected",
        "responses",
    ):
        given = record.get(field)
        for i, m in enumerate(given if isinstance(given, list) else [], 1):
            for message in m if isinstance(m, list) else [m]:
                if isinstance(message, dict):
                    used = ("role", "content", *WEIGHTS)
                    others = {k: v for k, v in message.items() if k not in used}
                    found |= {f"message {k}" for k in _not_used(others, f"{field}: message {i}: ")}
    return found


def _not_used(fields, where=""):
    for k, v in fields.items():
        if k in REFUSED and not _empty(v) and v is not False:
            raise ValueError(
                f"{where}{k}: {REFUSED[k]} (got {_short(v)}); take the field out "
                "where the text says all without it"
            )
    return {k for k, v in fields.items() if k not in HARMLESS and not _empty(v)}


def _empty(value):
    """Says nothing, as tables write a field in the rows that lack it."""
    return value is None or _blank(value) or value in ([], {}) or value in ("[]", "{}", "null")


PANDAS = "to_json(OUT, orient='records', lines=True)"
ARROW = "an Arrow file, write it as JSON lines first (datasets: from_file(FILE).to_json(OUT))"
FOREIGN = {  # a file's first bytes, or its ending -> what it is, what to do
    b"\x1f\x8b": "a gzip file, unpack it first (gunzip)",
    b"BZh": "a bzip2 file, unpack it first (bunzip2)",
    b"\xfd7zXZ": "an xz file, unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "a zstd file, unpack it first (unzstd)",
    b"PK\x03\x04": "a zip file (a spreadsheet is one too), unpack or export it first",
    b"PAR1": f"a Parquet file, write it as JSON lines first (pandas: read_parquet(FILE).{PANDAS})",
    b"ARROW1": ARROW,
    b"\xff\xff\xff\xff": ARROW,
    b"\xff\xfe": "UTF-16 text, save it as UTF-8",
    b"\xfe\xff": "UTF-16 text, save it as UTF-8",
    ".csv": f"a table, write its rows as JSON lines first (pandas: read_csv(FILE).{PANDAS})",
    ".tsv": f"a table, write its rows as JSON lines first (pandas: read_table(FILE).{PANDAS})",
}


def _read(path):
    """-> (line number, JSON value) of each line, or of each element of an array. Tolerates a BOM
    and CRLF.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    for found, advice in FOREIGN.items():
        if data.startswith(found) if isinstance(found, bytes) else path.suffix.lower() == found:
            raise ValueError(f"{path}: {advice}; JSON lines or one JSON array were expected")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{path}:{line}: UTF-8 was expected (got the byte 0x{data[e.start]:02x}): save the file"
            " as UTF-8"
        ) from None
    if text.lstrip()[:1] == "[":
        yield from _array(path, text)
        return
    at = 0
    # not splitlines(): U+2028 may stand in a string
    for n, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as e:
                several = "this one stands on several: write it on one, jq -c does"
                why = several if _goes_on(text, at, line) else e
                raise ValueError(
                    f"{path}:{n}: one JSON object a line was expected ({why})"
                ) from None
        at += len(line) + 1


def _goes_on(text, at, line):
    """Whether the line, which is no JSON, begins an object that ends further down."""
    try:
        return json.JSONDecoder().raw_decode(text, at + line.find("{"))[1] > at + len(line)
    except (ValueError, RecursionError):
        return False


def _array(path, text):
    """The elements of a JSON array, each with the line it begins on."""
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1
    seen = 0

    def skip(at):
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        return at

    at, separator = skip(at), ","
    while text[at : at + 1] != "]":
        line, seen = line + text.count("\n", seen, at), at
        if separator != ",":
            raise ValueError(
                f"{path}:{line}: a comma or the array's end was expected (got"
                f" {text[at : at + 20]!r})"
            )
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{line}: a JSON object was expected ({e})") from None
        yield line, value
        at = skip(at)
        separator = text[at : at + 1]
        at = skip(at + 1) if separator == "," else at
    if text[at + 1 :].strip():
        raise ValueError(
            f"{path}:{text.count(chr(10), 0, at) + 1}: nothing was expected after the array "
            f"(got {text[at + 1 :].strip()[:20]!r})"
        )


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
    raise ValueError(
        "messages, instruction, prompt, chosen or responses was expected among the fields "
        f"(got {', '.join(sorted(record)) or 'none'})"
    )


def _conversation(record, need):
    """-> (messages, the names of the fields they are made of)."""
    if "messages" in record:
        messages = _messages(record, "messages", weights=need == "answer")
        return _beside(record, messages), ("messages",)
    if "instruction" in record:
        messages, used = _alpaca(record)
        answer = "response" if "response" in record and "output" not in record else "output"
    else:
        messages, used = _prompt(record), ("prompt",)
        answer = "completion"
    if need == "prompt" and not _blank(record.get(answer) or ""):
        got = _short(record[answer])
        raise ValueError(f"{answer}: a prompt without an answer was expected (got {got}): {WRITES}")
    if need != "prompt":
        messages = [*messages, {"role": "assistant", "content": _answer(record, answer, messages)}]
    return messages, (*used, answer)


def _pair(record):
    """A pair's record -> {"prompt", "chosen", "rejected", ...}, or the reason why it is dropped."""
    if "instruction" in record:
        prompt, used = _alpaca(record)
    elif "prompt" in record:
        prompt, used = _prompt(record), ("prompt",)
    # both are whole conversations; what they share is the prompt
    elif isinstance(record.get("chosen"), list):
        prompt, used = _messages(record, "chosen")[:-1], ()
        _ends_in_user(prompt, "chosen")
        prompt = _beside(record, prompt)
    else:
        raise ValueError(
            "prompt: a string or a list of messages was expected (got"
            f" {_short(record.get('prompt'))})"
        )
    chosen, rejected = (_answer(record, field, prompt) for field in ("chosen", "rejected"))
    if any(
        map(_blank, (*(m["content"] for m in prompt if m["role"] != "system"), chosen, rejected))
    ):
        return EMPTY
    if chosen == rejected:
        return SAME
    return _keep(record, used, prompt=prompt, chosen=chosen, rejected=rejected)


def _ranking(record):
    """A ranking's record checked. An empty answer that was ranked stays: a labeller has judged it."""
    prompt, responses, ranks = _prompt(record), record.get("responses"), record.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(
            f"responses: a list of 2 or more strings was expected (got {_short(responses)})"
        )
    responses = [_answer({"responses": r}, "responses", prompt) for r in responses]
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise ValueError(
            f"ranks: {len(responses)} integers, as many as responses, were expected (got"
            f" {_short(ranks)})"
        )
    for rank in ranks:
        if type(rank) is not int or rank < -1:
            raise ValueError(
                "ranks: integers from 0, or -1 for an absent answer, were expected (got"
                f" {_short(rank)})"
            )
    if any(_blank(m["content"]) for m in prompt if m["role"] != "system"):
        return EMPTY
    if len({r for r in ranks if r >= 0}) < 2:
        return TIED
    return _keep(
        record,
        _unknown_ids(record, len(responses)),
        prompt=prompt,
        responses=responses,
        ranks=list(ranks),
    )


def _unknown_ids(record, k):
    """Checks what compare.py writes beside the K answers of a ranking -> of it the fields that mean
    nothing here.
    """
    ended, ids = record.get("finished"), record.get("ids")
    if ended is not None and not (
        isinstance(ended, list) and len(ended) == k and all(type(f) is bool for f in ended)
    ):
        raise ValueError(
            f"finished: {k} times true or false, as many as responses, were expected (got"
            f" {_short(ended)})"
        )
    lacking = () if ended is not None else ("finished",)
    # ids of what? of some other table, perhaps
    if not isinstance(record.get("tokenizer"), str) or ids is None:
        return ("ids", *lacking)
    fits = isinstance(ids, list) and len(ids) == k
    if not fits or not all(
        isinstance(a, list) and a and all(type(i) is int and i >= 0 for i in a) for a in ids
    ):
        raise ValueError(
            f"ids: {k} lists of token ids, as many as responses, were expected beside tokenizer"
            f" (got {_short(ids)})"
        )
    return lacking


def _prompt(record):
    """record["prompt"], a string or messages that end in a user's turn -> messages."""
    if isinstance(record.get("prompt"), list):
        messages = _messages(record, "prompt")
        _ends_in_user(messages, "prompt")
        return _beside(record, messages)
    asked = _string(record, "prompt", "a string or a list of messages")
    return _beside(record, [{"role": "user", "content": asked}])


def _alpaca(record):
    """The user's turn: instruction, then after an empty line input (Dolly's context)."""
    parts = [_string(record, "instruction")]
    more = (field for field in ("input", "context") if record.get(field) is not None)
    parts += [_string(record, field) for field in more]
    turn = {"instruction": "\n\n".join(p for p in parts if p)}
    messages = _beside(record, [{"role": "user", "content": _string(turn, "instruction")}])
    return messages, ("instruction", "input", "context")


def _beside(record, messages):
    """The system message and the history beside a record's turns, put in front of them."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns, before = messages[len(head) :], []
    for field in ("system", "system_prompt"):
        if not _empty(record.get(field)):
            own = [{"role": "system", "content": _string(record, field)}]
            if head not in ([], own):
                raise ValueError(
                    f"{field}: what the turns' system message says was expected "
                    f"(got {_short(record[field])})"
                )
            head = own
    history = record.get("history")
    for pair in [] if _empty(history) else history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            got = _short(pair)
            raise ValueError(f"history: a list of [question, answer] was expected (got {got})")
        before += [
            {"role": role, "content": _string({"history": text}, "history")}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return [*head, *before, *turns]


def _answer(record, field, prompt):
    """An answer as a string: given as one, or as messages of which the last is the assistant's and
    the others the prompt's.
    """
    if not isinstance(record.get(field), list):
        return _string(record, field, "a string or a list of messages")
    given = record[field]
    if given and isinstance(given[-1], dict) and any(given[-1].get(k) in (0,) for k in WEIGHTS):
        raise ValueError(f"{field}: the last message: weight: 1 was expected for an answer (got 0)")
    if len(given) == 1 and isinstance(given[0], dict) and given[0].get("role") == "assistant":
        return _string(given[0], "content", where=f"{field}: message 1: content")
    messages = _messages(record, field)
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{field}: the last message: assistant was expected (got {messages[-1]['role']})"
        )
    if prompt not in (messages[:-1], _beside(record, messages[:-1])):
        raise ValueError(
            f"{field}: the prompt's messages and then the answer were expected (got"
            f" {_short(messages[:-1])} before it)"
        )
    return messages[-1]["content"]


def _messages(record, field, weights=False):
    """record[field] checked -> new message objects of role and content alone.

    weights: and of "weight" 0 where a turn is read, not trained.
    """
    try:
        templates.check(record[field])
        return [
            {"role": m["role"], "content": _string(m, "content", where=f"message {i}: content")}
            | ({"weight": 0} if _untrained(m, i) and weights else {})
            for i, m in enumerate(record[field], 1)
        ]
    except ValueError as e:
        raise ValueError(f"{field}: {e}") from None


def _untrained(message, number):
    """Whether a message's weight is 0."""
    given = {k: message[k] for k in WEIGHTS if message.get(k) is not None}
    for k, v in given.items():
        if v not in (0, 1):
            raise ValueError(f"message {number}: {k}: 0 or 1 was expected (got {_short(v)})")
        if v == 1 and message["role"] != "assistant":
            raise ValueError(f"message {number}: {k}: only assistants' turns are trained (got {v})")
    return 0 in given.values()


def _ends_in_user(messages, field):
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(
            f"{field}: messages that end in a user's turn were expected (got"
            f" {messages[-1]['role'] if messages else 'none'})"
        )


def _string(record, field, expected="a string", where=None):
    value = record.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where or field}: {expected} was expected (got {_short(value)})")
    try:
        value.encode()
        check_spaces(value)
    except UnicodeEncodeError as e:
        raise ValueError(
            f"{where or field}: Unicode text was expected (got half a character,"
            f" \\u{ord(value[e.start]):04x})"
        ) from None
    except ValueError as e:
        raise ValueError(f"{where or field}: {e}") from None
    return value


def _blank(text):
    return isinstance(text, str) and not text.strip()


def _keep(record, used, **fields):
    """The fields, and behind them what else the record has."""
    used = {*fields, *used, *BESIDE}
    return fields | {k: v for k, v in record.items() if k not in used}


_short = templates._short


def main():
    """python -m data.records FILE OUT: the prompts of a file of any kind, for compare.py and
    ppo.py.
    """
    parser = argparse.ArgumentParser(
        description=(
            "Writes the prompts of a file of records: their messages up to the last user's turn."
        )
    )
    parser.add_argument("file", help="conversations, preference pairs or rankings")
    parser.add_argument("out", help="JSONL file for {messages} that end in a user's turn")
    o = parser.parse_args()
    try:
        chats = kind(o.file) == "conversation"
        found = (
            [r["messages"][:-1] for r in conversations(o.file, "turns")]
            if chats
            else [r["prompt"] for r in rankings(o.file)]
        )
        # each prompt once
        lines = dict.fromkeys(json.dumps({"messages": m}, ensure_ascii=False) + "\n" for m in found)
        aside = Path(f"{o.out}.part")  # half a file is never taken for one
        aside.write_text("".join(lines), encoding="utf-8", newline="\n")
        aside.replace(o.out)
    except (ValueError, OSError) as e:
        sys.exit(f"records.py: {e}")


if __name__ == "__main__":
    main()

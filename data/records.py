"""Records in the common formats → conversations, preference pairs, rankings.

    conversation   {"messages": [{"role", "content"}, ...]}
                   {"instruction", "input", "output"}
                   {"prompt", "completion"}
    pair           {"prompt", "chosen", "rejected"}
                   {"instruction", "input", "chosen", "rejected"}
    ranking        {"prompt", "responses": [K], "ranks": [K]}
                   0 the best, ties allowed, -1: that answer is absent
    text           {"text"}
                   a document, for replay; or a .txt file, which is one

A file holds one JSON object per line, or one JSON array. A prompt or an answer is a string or a
list of messages. What cannot be read raises a ValueError "file:line: field: what was expected (got
...)"; records that are valid but of no use are dropped, counted, and reported in one line. Fields
that are not named above are listed in the tables below, or they are passed through, and that line
counts them as not used.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

from data import templates
from data.tokenizer import check_spaces

READERS = {  # kind → who reads it
    "conversation": "sft.py, and where they end in a user's turn compare.py and ppo.py,",
    "preference pair": "reward.py and dpo.py",
    "ranking": "reward.py and dpo.py",
    "text": "forget.py, sft.py --replay and ppo.py --ptx",
}
SAMPLED = ("finished", "ids", "tokenizer")  # what compare.py writes beside the answers
EMPTY = "with an empty turn"
SAME = "with chosen = rejected"
TIED = "without two answers of different rank"
UNWANTED = "with label false"
WRITES = "python -m data.records FILE OUT writes the prompts of a file"

# ---- what else a record or a message may carry: used, refused by name, harmless, or else counted
BESIDE = ("system", "system_prompt", "history")  # used: they are put in front of the turns
WEIGHTS = ("weight", "train", "training", "loss")  # used: a message with 0 is read, not trained
LABELS = ("label", "kto_tag")  # used: a conversation with false has no good answer (KTO)
NO_CALLS = "no chat format here writes tool calls"
TEXT_ONLY = "text alone is read here"
NO_THOUGHT = "no chat format here writes what is thought before an answer"
USE_WEIGHT = "a message's weight, 0 or 1, says what is trained"
ALPACA_ONLY = "it goes into the prompt beside `instruction` alone"
IN_PROMPT = "it must stand in the prompt"
# fmt: off
REFUSED = {  # they would change what is learnt, and cannot be honoured
    "tools": NO_CALLS, "functions": NO_CALLS, "tool_calls": NO_CALLS, "function_call": NO_CALLS,
    "function_calls": NO_CALLS, "tool_call_id": NO_CALLS, "tool_choice": NO_CALLS,
    "tool_responses": NO_CALLS,
    "image": TEXT_ONLY, "images": TEXT_ONLY, "video": TEXT_ONLY, "videos": TEXT_ONLY,
    "audio": TEXT_ONLY, "audios": TEXT_ONLY, "media": TEXT_ONLY,
    "reasoning_content": NO_THOUGHT, "reasoning": NO_THOUGHT, "thinking": NO_THOUGHT,
    "thought": NO_THOUGHT, "thoughts": NO_THOUGHT,
    "mask": USE_WEIGHT, "loss_mask": USE_WEIGHT, "labels": USE_WEIGHT,
    "input": ALPACA_ONLY, "context": ALPACA_ONLY,
    "contexts": IN_PROMPT, "documents": IN_PROMPT,
    "chat_template_kwargs": "no chat format here has arguments",
}
# fmt: on
HARMLESS = {  # where a record is from, what it is about; at the end this project's own fields
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


def conversations(path, need="answer", empty=False, allow_markers=True):
    """→ [{"messages": [...], ...}], each ending in an assistant's turn (need "answer") or in a
    user's (need "prompt").

    need "turns": as "answer", but the answers are not learnt, so labels and weights do not matter.
    empty: those with an empty turn too, for a caller that counts them itself.
    allow_markers: what a reader of the file is told of either way, markers of chat formats in more
    than 1 % of the records, is no error.
    """
    last = {"answer": "assistant", "turns": "assistant", "prompt": "user"}[need]

    def convert(record):
        messages, used = _conversation(record, need)
        if messages[-1]["role"] != last:
            advice = f": {WRITES}" if need == "prompt" else ""
            got = messages[-1]["role"]
            raise ValueError(f"messages: {last} was expected as the last turn (got {got}){advice}")
        if _empty_turn(messages) and not empty:
            return EMPTY
        if need == "answer" and any(record.get(k) in (0,) for k in LABELS):  # false is 0
            return UNWANTED
        good = [k for k in LABELS if record.get(k) in (0, 1, None)]
        return _keep(record, (*used, *good), messages=messages)

    return _convert(path, {"conversation": convert}, allow_markers)


def is_text(path) -> bool:
    """Whether a file is for texts()."""
    return Path(path).suffix.lower() == ".txt" or kind(path) == "text"


def texts(path, allow_markers=True) -> list[str]:
    """Plain text: records of {"text"}, each a document; a .txt file is one."""

    def convert(record):
        text = _string(record, "text")
        return "without text" if _blank(text) else _keep(record, ("text",), text=text)

    if Path(path).suffix.lower() != ".txt":
        return [r["text"] for r in _convert(path, {"text": convert}, allow_markers)]
    try:
        text = _string({"text": _decoded(Path(path))}, "text")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return [] if _blank(text) else [text]


def preferences(path, allow_markers=True):
    """→ [{"prompt": [messages], "chosen": str, "rejected": str, ...}]"""
    return _convert(path, {"preference pair": _pair}, allow_markers)


def answers(path) -> dict:
    """An answers file, as tools/evals.py writes it → {(prompt, how often it came before): the
    record, its "prompt" as messages}: two files of the same prompts match by these keys. null,
    which stands for a prompt beyond the model's context, is left out and counted."""
    found, nulls = {}, 0
    for line, record in _read(path):
        if record is None:
            nulls += 1
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object was expected (got {_short(record)})")
            prompt, answer = _prompt(record), _string(record, "answer")
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
        key, times = json.dumps(prompt), 0
        while (key, times) in found:
            times += 1
        found[key, times] = record | {"prompt": prompt, "answer": answer}
    report(path, len(found), {"null (beyond the model's context)": nulls}, "answers")
    return found


def rankings(path, allow_markers=True):
    """→ [{"prompt": [messages], "responses": [K str], "ranks": [K int], ...}]; a preference pair
    is a ranking of two.
    """

    def pair_as_ranking(record):
        pair = _pair(record)
        if isinstance(pair, str):
            return pair
        responses = [pair["chosen"], pair["rejected"]]
        used = ("chosen", "rejected", *SAMPLED)
        return _keep(pair, used, prompt=pair["prompt"], responses=responses, ranks=[0, 1])

    readers = {"ranking": _ranking, "preference pair": pair_as_ranking}
    return _convert(path, readers, allow_markers)


def pairs(path, which="all", allow_markers=True):
    """Rankings or pairs → pairs as from `preferences`: all that differ in rank, or the best
    against the worst ("best_worst").
    """
    if which not in ("all", "best_worst"):
        raise ValueError(f'which: "all" or "best_worst" was expected (got {which!r})')
    found, dropped = [], Counter()
    for record in rankings(path, allow_markers):
        responses = record["responses"]
        for i, j in _ranked_pairs(record["ranks"], which):
            if responses[i] == responses[j]:
                dropped[SAME] += 1
                continue
            both = {"chosen": responses[i], "rejected": responses[j]}
            for field in ("finished", "ids"):  # of the chosen answer, of the rejected one
                if field in record:
                    both[field] = [record[field][i], record[field][j]]
            found.append(_keep(record, ("responses", "ranks"), prompt=record["prompt"], **both))
    report(path, len(found), dropped, "pairs")
    return found


def _ranked_pairs(ranks, which):
    """→ [(better, worse)]: places of answers that differ in rank, absent ones left out."""
    order = sorted((i for i, rank in enumerate(ranks) if rank >= 0), key=lambda i: ranks[i])
    if which == "best_worst":
        worst = next(i for i in order if ranks[i] == ranks[order[-1]])
        return [(order[0], worst)]
    return [(i, j) for i in order for j in order if ranks[i] < ranks[j]]


def held_out(prompt):
    """True for about 1 prompt in 10, by a hash of its first user's turn (spaces aside). This is
    the one place where held-out is decided.

    Only that turn counts, so that a longer conversation, or the same question under a system
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
    """Records of any kind → (train, held out), each in its order."""
    train, held = [], []
    for record in records:
        prompt = record["messages" if _kind(record) == "conversation" else "prompt"]
        (held if held_out(prompt) else train).append(record)
    return train, held


def batch(records, step, size, seed):
    """The step-th batch (0-based) of an endless stream of shuffles: each record comes once per
    epoch, and a batch may span the border of two, so that none is left out.
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
    """Prints a line on stderr: what was used, dropped, held out. ValueError if nothing is left.

    dropped: a Counter, reason → number. A stage gives held, the number held out (0 if it splits
    nothing), and always prints its line. A reader gives unused, a Counter: field → records, and
    prints its line only if it dropped records or found fields that are not used.
    """
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
    if not kept:
        why = [f"dropped: {reasons}"] if reasons else []
        if held:
            why.append(f"held out: {held:,}, all that share a first question lie on one side")
        why = f" ({'; '.join(why)})" if why else ""
        raise ValueError(f"{path}: no usable {what} in it{why}")
    parts = [f"dropped {reasons}"] if reasons else []
    if held is not None:
        parts = parts or ["none dropped"]
        parts.append(f"{held:,} held out" if held else "none held out")
    if unused:
        names = []
        for name, n in sorted(unused.items()):
            shown = name[:40] if name.isprintable() else ascii(name[:40])
            names.append(f"{shown} ({n:,})")
        more = [f"{len(names) - 9:,} more"] if len(names) > 9 else []
        parts.append("fields not used: " + ", ".join(names[:9] + more))
    if parts:
        print(f"{path}: {kept:,} {what} used, {', '.join(parts)}", file=sys.stderr)


def say_cut(length, context):
    """Says on stderr if --length is beyond the model's context, which then counts in its place."""
    if length > context:
        effect = f"the model's context is {context:,} tokens, what is longer is dropped"
        print(f"--length {length:,}: {effect}", file=sys.stderr)


def _convert(path, readers, allow_markers=True):
    """Reads the file; readers[kind](record) → a new record, or the reason (str) to drop it."""
    found, dropped, unused, marked = [], Counter(), Counter(), []
    for line, record in _read(path):
        try:
            kind = _kind(record)
            if kind not in readers:
                wanted = " or ".join(readers)
                raise ValueError(
                    f"a {wanted} was expected, this is a {kind}: {READERS[kind]} read those"
                )
            others = _message_fields(record)
            result = readers[kind](record)
            if isinstance(result, str):
                dropped[result] += 1
                continue
            unused.update(others | _record_fields(record, result, kind))
            found.append(result)
            marked += [(line, sign) for sign in _markers(result)[:1]]
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
    report(path, len(found), dropped, unused=unused)
    _report_markers(path, marked, len(found), allow_markers)
    return found


# what chat formats write around turns: in a record's text it is another format's, or written twice
MARKERS = re.compile(
    r"<\|\w+\|>|<｜[^｜<]+｜>|\[/?INST\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>|<[be]os>"
    r"|### (?:Instruction|Input|Response|Human|Assistant):|\n\n(?:Human|Assistant):"
)


def _markers(record):
    """The first marker of each of a converted record's texts that has one."""
    texts = [m["content"] for m in record.get("messages") or record.get("prompt") or []]
    texts += [record[k] for k in ("chosen", "rejected", "text") if k in record]
    texts += record.get("responses", [])
    return [found[0].strip() for found in map(MARKERS.search, texts) if found]


def _report_markers(path, marked, n, allowed):
    """Says where the first marker of a chat format is; ValueError for more than 1 % of n records
    with one, unless they are allowed.
    """
    if not marked:
        return
    line, sign = marked[0]
    said = f"{path}:{line}: {sign!r} is a chat format's marker; of {n:,} records used,"
    said += f" {len(marked):,} have one in their text"
    if len(marked) * 100 > n and not allowed:
        raise ValueError(
            f"{said}: the format's own would stand around it; write them as messages without it, or"
            " give --allow-markers where it is meant"
        )
    print(f"{said}; it is read as text", file=sys.stderr)


def _record_fields(record, result, kind):
    """The names of a record's fields that are neither used nor harmless; ValueError for a refused
    one.
    """
    made = {"conversation": {"messages"}, "text": {"text"}}.get(kind, {"responses", "ranks"})
    if kind == "preference pair":
        made |= {"chosen", "rejected"}
    if kind != "conversation" and "instruction" not in record:
        made |= {"prompt"}
    left = {k: v for k, v in record.items() if k in result.keys() - made}
    for k in WEIGHTS[:3]:
        if left.get(k) not in (1, None):
            got = _short(left[k])
            raise ValueError(f"{k}: 1 was expected, all records count alike here (got {got})")
    return _not_used(left)


# fmt: off
MESSAGE_FIELDS = ("messages", "prompt", "completion", "output", "response", "chosen", "rejected",
                  "responses")
# fmt: on


def _message_fields(record):
    """The same of a record's messages, before they are read."""
    found = set()
    for field in MESSAGE_FIELDS:
        given = record.get(field)
        for i, entry in enumerate(given if isinstance(given, list) else [], 1):
            for message in entry if isinstance(entry, list) else [entry]:
                if not isinstance(message, dict):
                    continue
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
    """Whether a value says nothing: tables write such ones in the rows that lack a field."""
    return value is None or _blank(value) or value in ([], {}) or value in ("[]", "{}", "null")


PANDAS = "to_json(OUT, orient='records', lines=True)"
ARROW = "an Arrow file, write it as JSON lines first (datasets: from_file(FILE).to_json(OUT))"
FOREIGN = {  # a file's first bytes, or its ending → what it is, what to do
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
    """→ (line number, JSON value) of each line, or of each element of an array. A BOM and CRLF are
    tolerated.
    """
    path = Path(path)
    text = _decoded(path)
    yield from (_array if text.lstrip()[:1] == "[" else _lines)(path, text)


def _decoded(path):
    """A file's text. ValueError for another format, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    for sign, advice in FOREIGN.items():
        ending = path.suffix.lower()
        if data.startswith(sign) if isinstance(sign, bytes) else ending == sign:
            raise ValueError(f"{path}: {advice}; JSON lines or one JSON array were expected")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise ValueError(
            f"{path}:{line}: UTF-8 was expected (got the byte 0x{data[e.start]:02x}): save the file"
            " as UTF-8"
        ) from None


def _lines(path, text):
    """JSON lines, each with its number."""
    at = 0
    for n, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at a string's U+2028
        if line.strip():
            try:
                yield n, json.loads(line)
            except (ValueError, RecursionError) as e:
                several = "this one stands on several: write it on one, jq -c does"
                why = several if _goes_on(text, at, line) else e
                raise ValueError(
                    f"{path}:{n}: one JSON object per line was expected ({why})"
                ) from None
        at += len(line) + 1


def _goes_on(text, at, line):
    """Whether the line, which is no JSON, begins an object that ends further down."""
    try:
        return json.JSONDecoder().raw_decode(text, at + line.find("{"))[1] > at + len(line)
    except (ValueError, RecursionError):
        return False


def _array(path, text):
    """The elements of a JSON array, each with the number of the line it begins on."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")
    at = space.match(text, text.index("[") + 1).end()
    line, counted = 1, 0
    separator = ","
    while text[at : at + 1] != "]":
        line += text.count("\n", counted, at)
        counted = at
        if separator != ",":
            got = text[at : at + 20]
            raise ValueError(
                f"{path}:{line}: a comma or the array's end was expected (got {got!r})"
            )
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}:{line}: a JSON object was expected ({e})") from None
        yield line, value
        at = space.match(text, at).end()
        separator = text[at : at + 1]
        if separator == ",":
            at = space.match(text, at + 1).end()
    rest = text[at + 1 :].strip()
    if rest:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{path}:{line}: nothing was expected after the array (got {rest[:20]!r})")


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
    if "text" in record and "conversations" not in record:
        return "text"
    raise ValueError(
        "messages, instruction, prompt, chosen or responses was expected among the fields "
        f"(got {', '.join(sorted(record)) or 'none'})"
    )


def _conversation(record, need):
    """→ (messages, the names of the fields they are made of)."""
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
    """A pair's record → {"prompt", "chosen", "rejected", ...}, or the reason to drop it."""
    if "instruction" in record:
        prompt, used = _alpaca(record)
    elif "prompt" in record:
        prompt, used = _prompt(record), ("prompt",)
    elif isinstance(record.get("chosen"), list):
        # both are whole conversations; what they share is the prompt
        prompt, used = _messages(record, "chosen")[:-1], ()
        _ends_in_user(prompt, "chosen")
        prompt = _beside(record, prompt)
    else:
        got = _short(record.get("prompt"))
        raise ValueError(f"prompt: a string or a list of messages was expected (got {got})")
    chosen = _answer(record, "chosen", prompt)
    rejected = _answer(record, "rejected", prompt)
    if _empty_turn(prompt) or _blank(chosen) or _blank(rejected):
        return EMPTY
    if chosen == rejected:
        return SAME
    return _keep(record, used, prompt=prompt, chosen=chosen, rejected=rejected)


def _ranking(record):
    """A ranking's record, checked. A ranked answer may be empty: a labeller has judged it."""
    prompt, responses, ranks = _prompt(record), record.get("responses"), record.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        got = _short(responses)
        raise ValueError(f"responses: a list of 2 or more strings was expected (got {got})")
    k = len(responses)
    responses = [_answer({"responses": r}, "responses", prompt) for r in responses]
    if not isinstance(ranks, list) or len(ranks) != k:
        got = _short(ranks)
        raise ValueError(f"ranks: {k} integers, as many as responses, were expected (got {got})")
    for rank in ranks:
        if type(rank) is not int or rank < -1:
            raise ValueError(
                "ranks: integers from 0, or -1 for an absent answer, were expected (got"
                f" {_short(rank)})"
            )
    if _empty_turn(prompt):
        return EMPTY
    if len({r for r in ranks if r >= 0}) < 2:
        return TIED
    left_out = _unknown_ids(record, k)
    return _keep(record, left_out, prompt=prompt, responses=responses, ranks=list(ranks))


def _unknown_ids(record, k):
    """Checks what compare.py writes beside the K answers → those of its fields that mean nothing
    in this record.
    """
    finished, ids = record.get("finished"), record.get("ids")
    if finished is not None and not _k_of(k, finished, lambda f: type(f) is bool):
        raise ValueError(
            f"finished: {k} times true or false, as many as responses, were expected (got"
            f" {_short(finished)})"
        )
    lacking = () if finished is not None else ("finished",)
    if ids is None or not isinstance(record.get("tokenizer"), str):
        return ("ids", *lacking)  # of an unknown vocabulary
    if not _k_of(k, ids, _is_ids):
        raise ValueError(
            f"ids: {k} lists of token ids, as many as responses, were expected beside tokenizer"
            f" (got {_short(ids)})"
        )
    return lacking


def _k_of(k, values, fits):
    return isinstance(values, list) and len(values) == k and all(map(fits, values))


def _is_ids(answer):
    if not isinstance(answer, list) or not answer:
        return False
    return all(type(i) is int and i >= 0 for i in answer)


def _prompt(record):
    """record["prompt"], a string or messages that end in a user's turn → messages."""
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
    question = templates.Question(_string(turn, "instruction"))
    question.input = parts[-1] if [bool(p) for p in parts] == [True, True] else ""
    messages = _beside(record, [{"role": "user", "content": question}])
    return messages, ("instruction", "input", "context")


def _beside(record, messages):
    """The system message and the history beside a record's turns, put in front of them."""
    head = messages[:1] if messages[0]["role"] == "system" else []
    turns, before = messages[len(head) :], []
    for field in ("system", "system_prompt"):
        if _empty(record.get(field)):
            continue
        own = [{"role": "system", "content": _string(record, field)}]
        if head not in ([], own):
            got = _short(record[field])
            raise ValueError(f"{field}: the turns' own system message was expected (got {got})")
        head = own
    history = [] if _empty(record.get("history")) else record["history"]
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            got = _short(pair)
            raise ValueError(f"history: a list of [question, answer] was expected (got {got})")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            before.append({"role": role, "content": _string({"history": text}, "history")})
    return [*head, *before, *turns]


def _answer(record, field, prompt):
    """An answer as a string: given as one, or as messages of which the last is the assistant's and
    the others the prompt's.
    """
    if not isinstance(record.get(field), list):
        return _string(record, field, "a string or a list of messages")
    given = record[field]
    last = given[-1] if given and isinstance(given[-1], dict) else {}
    if any(last.get(k) in (0,) for k in WEIGHTS):
        raise ValueError(f"{field}: the last message: weight: 1 was expected for an answer (got 0)")
    if len(given) == 1 and last.get("role") == "assistant":
        return _string(last, "content", where=f"{field}: message 1: content")
    messages = _messages(record, field)
    if messages[-1]["role"] != "assistant":
        got = messages[-1]["role"]
        raise ValueError(f"{field}: the last message: assistant was expected (got {got})")
    if prompt not in (messages[:-1], _beside(record, messages[:-1])):
        raise ValueError(
            f"{field}: the prompt's messages and then the answer were expected (got"
            f" {_short(messages[:-1])} before it)"
        )
    return messages[-1]["content"]


def _messages(record, field, weights=False):
    """record[field], checked → new messages of role and content alone; weights: and of "weight" 0
    where a turn is read, not trained.
    """
    try:
        templates.check(record[field])
        messages = []
        for i, given in enumerate(record[field], 1):
            content = _string(given, "content", where=f"message {i}: content")
            message = {"role": given["role"], "content": content}
            if _untrained(given, i) and weights:
                message["weight"] = 0
            messages.append(message)
        return messages
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
        got = messages[-1]["role"] if messages else "none"
        raise ValueError(f"{field}: messages that end in a user's turn were expected (got {got})")


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


def _empty_turn(messages):
    """Whether one of the turns is blank; a system message may be."""
    return any(_blank(m["content"]) for m in messages if m["role"] != "system")


def _keep(record, used, **fields):
    """The fields, and after them what else the record has."""
    used = {*fields, *used, *BESIDE}
    return fields | {k: v for k, v in record.items() if k not in used}


_short = templates._short


def main():
    """python -m data.records FILE OUT: the prompts of a file of any kind, for compare.py and
    ppo.py.
    """
    about = "Writes the prompts of a file of records: their messages up to the last user's turn."
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("file", help="conversations, preference pairs or rankings")
    parser.add_argument("out", help="JSONL file for {messages} that end in a user's turn")
    o = parser.parse_args()
    try:
        if kind(o.file) == "conversation":
            prompts = [r["messages"][:-1] for r in conversations(o.file, "turns")]
        else:
            prompts = [r["prompt"] for r in rankings(o.file)]
        lines = [json.dumps({"messages": p}, ensure_ascii=False) + "\n" for p in prompts]
        aside = Path(f"{o.out}.part")  # half a file is never taken for a whole one
        text = "".join(dict.fromkeys(lines))  # each prompt once
        aside.write_text(text, encoding="utf-8", newline="\n")
        aside.replace(o.out)
    except (ValueError, OSError) as e:
        sys.exit(f"records.py: {e}")


if __name__ == "__main__":
    main()

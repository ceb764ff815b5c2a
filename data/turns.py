"""One record, in our names (shapes.ours), → its messages, its pair or its ranking, checked.

A ValueError says which field is wrong. OddError says that the record is dropped and counted: a real
file has some such records, and its others are good.
"""

from data import calls, formats, templates
from data.formats import _short
from data.shapes import BESIDE, WEIGHTS, empty
from data.tokenizer import check_spaces

EMPTY = "with an empty turn"
SAME = "with chosen = rejected"
TIED = "without two answers of different rank"
ROLES = "whose roles do not alternate"
UNANSWERED = "with the user's turn last"
HALF = "with half a character"
APART = "whose conversations differ before the last answer"
WRITES = "python -m data.records convert FILE OUT --to prompts writes the prompts of a file"
SAMPLED = ("finished", "ids", "tokenizer")  # what compare.py writes beside the answers


class OddError(ValueError):
    """A record that is of no use. reason: what it is counted under."""

    def __init__(self, reason, message=None):
        super().__init__(message or f"the record is one {reason}")
        self.reason = reason


def conversation(record, need):
    """→ (messages, the names of the fields they are made of). need: as in records.conversations."""
    if "messages" in record:
        found = messages(record, "messages", weights=need in ("answer", "any"))
        return beside(record, found), ("messages",)
    if "instruction" in record:
        found, used = alpaca(record)
        answer = "output"
    else:
        found, used = prompt(record), ("prompt",)
        answer = "completion"
    if need == "any" and answer not in record:
        return found, used
    if need == "prompt" and not _blank(record.get(answer) or ""):
        got = _short(record[answer])
        raise ValueError(f"{answer}: a prompt without an answer was expected (got {got}): {WRITES}")
    if need != "prompt":
        found = [*found, {"role": "assistant", "content": _answer(record, answer, found)}]
    return found, (*used, answer)


def pair(record):
    """A pair's record → {"prompt", "chosen", "rejected", ...}."""
    used = ()
    if "instruction" in record:
        asked, used = alpaca(record)
    elif "prompt" in record:
        asked, used = _whole(record, prompt(record)), ("prompt",)
    elif isinstance(record.get("chosen"), list):
        # both are whole conversations; what they share is the prompt
        asked = messages(record, "chosen")[:-1]
        _ends_in_user(asked, "chosen")
        asked = beside(record, asked)
    else:
        got = _short(record.get("prompt"))
        raise ValueError(f"prompt: a string or a list of messages was expected (got {got})")
    chosen = _answer(record, "chosen", asked)
    rejected = _answer(record, "rejected", asked)
    if empty_turn(asked) or _blank(chosen) or _blank(rejected):
        raise OddError(EMPTY)
    if chosen == rejected:
        raise OddError(SAME)
    return keep(record, used, prompt=asked, chosen=chosen, rejected=rejected)


def _whole(record, asked):
    """A pair's prompt, where its answers are whole conversations: what comes before the answers, if
    the prompt beside them is the end of that."""
    if not isinstance(record.get("chosen"), list) or len(record["chosen"]) < 2:
        return asked
    turns = asked[asked[0]["role"] == "system" :]
    whole = messages(record, "chosen")[:-1]
    return beside(record, whole) if whole[-len(turns) :] == turns else asked


def ranking(record):
    """A ranking's record, checked. A ranked answer may be empty: a labeller has judged it."""
    asked, responses, ranks = prompt(record), record.get("responses"), record.get("ranks")
    if not isinstance(responses, list) or len(responses) < 2:
        got = _short(responses)
        raise ValueError(f"responses: a list of 2 or more strings was expected (got {got})")
    k = len(responses)
    responses = [_answer({"responses": r}, "responses", asked) for r in responses]
    if not isinstance(ranks, list) or len(ranks) != k:
        got = _short(ranks)
        raise ValueError(f"ranks: {k} integers, as many as responses, were expected (got {got})")
    for rank in ranks:
        if type(rank) is not int or rank < -1:
            raise ValueError(
                "ranks: integers from 0, or -1 for an absent answer, were expected (got"
                f" {_short(rank)})"
            )
    if empty_turn(asked):
        raise OddError(EMPTY)
    if len({r for r in ranks if r >= 0}) < 2:
        raise OddError(TIED)
    left_out = _unknown_ids(record, k)
    return keep(record, left_out, prompt=asked, responses=responses, ranks=list(ranks))


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


def prompt(record):
    """record["prompt"], a string or messages that end in a user's turn → messages."""
    if isinstance(record.get("prompt"), list):
        found = messages(record, "prompt")
        _ends_in_user(found, "prompt")
        return beside(record, found)
    asked = string(record, "prompt", "a string or a list of messages")
    return beside(record, [{"role": "user", "content": asked}])


def alpaca(record):
    """The user's turn: instruction, then after an empty line input (Dolly's context)."""
    for field in ("question", "query", "problem"):
        if not empty(record.get(field)):
            raise ValueError(f"{field}: it stands beside `instruction`: which of them is asked?")
    parts = [string(record, "instruction")]
    nothing = (None, "<noinput>")  # the second is Alpaca's own
    more = (field for field in ("input", "context") if record.get(field) not in nothing)
    parts += [string(record, field) for field in more]
    turn = {"instruction": "\n\n".join(p for p in parts if p)}
    question = formats.Question(string(turn, "instruction"))
    question.input = parts[-1] if [bool(p) for p in parts] == [True, True] else ""
    asked = [{"role": "user", "content": question}]
    return beside(record, asked), ("instruction", "input", "context")


def beside(record, found):
    """The system message and the history beside a record's turns, put in front of them; its tools
    in the first."""
    if not any(map(record.get, BESIDE)):
        return found
    head = found[:1] if found[0]["role"] == "system" else []
    turns, before = found[len(head) :], []
    for field in ("system", "system_prompt"):
        if empty(record.get(field)):
            continue
        own = [{"role": "system", "content": string(record, field)}]
        if head not in ([], own):
            got = _short(record[field])
            raise ValueError(f"{field}: the turns' own system message was expected (got {got})")
        head = own
    history = [] if empty(record.get("history")) else record["history"]
    for both in history if isinstance(history, list) else [history]:
        if isinstance(both, dict):
            before += messages({"history": history}, "history")
            break
        if not isinstance(both, list) or len(both) != 2:
            got = _short(both)
            raise ValueError(f"history: a list of [question, answer] was expected (got {got})")
        for role, text in zip(("user", "assistant"), both, strict=True):
            before.append({"role": role, "content": string({"history": text}, "history")})
    first, *others = [*head, *before, *turns]
    if record.get("tools") and not empty(record["tools"]):
        first = first | {"tools": calls.tools(record["tools"])}
    return [first, *others]


def _answer(record, field, asked):
    """An answer as a string: given as one, or as messages of which the last is the assistant's and
    the others the prompt's.
    """
    if not isinstance(record.get(field), list):
        return string(record, field, "a string or a list of messages")
    given = record[field]
    last = given[-1] if given and isinstance(given[-1], dict) else {}
    if last.get("tool_calls"):
        raise ValueError(f"{field}: the last message: tool_calls: {calls.TEXT}")
    if any(last.get(k) in (0,) for k in WEIGHTS):
        raise ValueError(f"{field}: the last message: weight: 1 was expected for an answer (got 0)")
    if len(given) == 1 and last.get("role") == "assistant":
        return string(last, "content", where=f"{field}: message 1: content")
    *before, last = messages(record, field)
    if last["role"] != "assistant":
        got = last["role"]
        raise OddError(UNANSWERED, f"{field}: the last message: assistant was expected (got {got})")
    if not before or asked not in (before, beside(record, before)):
        raise OddError(
            APART,
            f"{field}: the prompt's messages and then the answer were expected (got"
            f" {_short(before)} before it)",
        )
    return last["content"]


def messages(record, field, weights=False):
    """record[field], checked → new messages of role and content alone; weights: and of "weight" 0
    where a turn is read, not trained.
    """
    try:
        _check(record[field])
        found = []
        for i, given in enumerate(record[field], 1):
            content = string(given, "content", where=f"message {i}: content")
            message = {"role": given["role"], "content": content}
            message |= calls.kept(given, first=i == 1)
            if _untrained(given, i) and weights:
                message["weight"] = 0
            found.append(message)
        return found
    except OddError as e:
        raise OddError(e.reason, f"{field}: {e}") from None
    except ValueError as e:
        raise ValueError(f"{field}: {e}") from None


def _check(given):
    """templates.check; OddError where it is the order of the turns that is wrong."""
    if given == []:
        raise OddError(EMPTY, "a list of messages was expected (got [])")
    try:
        templates.check(given)
    except ValueError as e:
        known = isinstance(given, list) and all(map(_is_message, given))
        raise (OddError(ROLES, str(e)) if known else e) from None


def _is_message(given):
    if not isinstance(given, dict) or not isinstance(given.get("content"), str):
        return False
    return given.get("role") in templates.ROLES


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
    if not messages or messages[-1]["role"] not in templates.ASKS:
        got = messages[-1]["role"] if messages else "none"
        raise ValueError(f"{field}: messages that end in a user's turn were expected (got {got})")


def string(record, field, expected="a string", where=None):
    """record[field], a text. OddError where it is null or has half a character."""
    value = record.get(field)
    if value is None and field in record:
        raise OddError(EMPTY, f"{where or field}: {expected} was expected (got nothing)")
    if not isinstance(value, str):
        raise ValueError(f"{where or field}: {expected} was expected (got {_short(value)})")
    try:
        value.encode()
        check_spaces(value)
    except UnicodeEncodeError as e:
        raise OddError(
            HALF,
            f"{where or field}: Unicode text was expected (got half a character,"
            f" \\u{ord(value[e.start]):04x})",
        ) from None
    except ValueError as e:
        raise ValueError(f"{where or field}: {e}") from None
    return value


def _blank(text):
    return isinstance(text, str) and not text.strip()


def empty_turn(messages):
    """Whether one of the turns is blank; a system message may be, a tool's result, and the text
    beside a call."""
    said = (m for m in messages if m["role"] in ("user", "assistant") and not m.get("tool_calls"))
    return any(_blank(m["content"]) for m in said)


def keep(record, used, **fields):
    """The fields, and after them what else the record has."""
    used = {*fields, *used, *BESIDE}
    return fields | {k: v for k, v in record.items() if k not in used}

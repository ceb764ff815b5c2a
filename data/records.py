"""Files of records → conversations, preference pairs, rankings or texts.

    conversation   {"messages": [{"role", "content"}, ...]}
    pair           {"prompt": [messages], "chosen": str, "rejected": str}
    ranking        {"prompt": [messages], "responses": [K], "ranks": [K]}
                   0 the best, ties allowed, -1: that answer is absent
    text           {"text"}
                   a document, for continued pre-training and replay; or a .txt file, which is one

Many other shapes are known and turned into these: shapes.py has the table, turns.py the checks of
one record, rows.py the files. What cannot be read raises a ValueError "file:line: field: what was
expected (got ...)". Odd records, such as one whose roles do not alternate, are dropped and counted;
so are valid ones of no use. Fields that nothing is made of are passed through, and the line that
reports the file counts them as not used unless they are known to be harmless.

    python -m data.records check FILE [FILE ...]       what is in them, and what is wrong with it
    python -m data.records convert FILE OUT --to ...   the same records in another format
"""

import hashlib
import importlib
import json
import random
import re
import sys
from collections import Counter
from functools import lru_cache

from data import calls, rows, shapes, templates, turns
from data.turns import EMPTY, ROLES, SAME, SAMPLED, UNANSWERED, OddError

READERS = {  # kind → who reads it
    "conversation": "sft.py, and where they end in a user's turn compare.py and ppo.py,",
    "preference pair": "reward.py and dpo.py",
    "ranking": "reward.py and dpo.py",
    "text": "sft.py, forget.py and ppo.py --ptx",
}
UNWANTED = "with label false"
# many of these, and the file is not what its reader takes it for
ODD = (EMPTY, ROLES, UNANSWERED, turns.HALF, turns.APART)
ODD_SHARE, ODD_MANY = 0.05, 10
HARMLESS, _read, _short = shapes.HARMLESS, rows.read, turns._short
_string, _alpaca = turns.string, turns.alpaca


def conversations(path, need="answer", empty=False, **allowed):
    """→ [{"messages": [...], ...}], each ending in an assistant's turn (need "answer") or in a
    user's (need "prompt"; a reference answer beside it is left where it is).

    need "turns": as "answer", but the answers are not learnt, so labels and weights do not matter;
    "any": either, with its label and weights. empty: those with an empty turn too, for a caller
    that counts them itself. allowed, here and below: allow_dropped, allow_markers, written, as in
    _convert.
    """
    hidden = shapes.REFERENCES if need == "prompt" else ()

    def convert(record):
        return conversation(record, need, empty)

    return _convert(path, {"conversation": convert}, hidden, **allowed)


def conversation(record, need="answer", empty=False):
    """One record, in our names; OddError for one that is dropped."""
    found, used = turns.conversation(record, need)
    last = found[-1]["role"]
    if need == "prompt" and last not in templates.ASKS:
        raise ValueError(
            f"messages: user was expected as the last turn (got {last}): {turns.WRITES}"
        )
    if need in ("answer", "turns") and last != "assistant":
        raise OddError(UNANSWERED)
    if turns.empty_turn(found) and not empty:
        raise OddError(EMPTY)
    if need == "answer" and label(record) is False:
        raise OddError(UNWANTED)
    good = [k for k in shapes.LABELS if record.get(k) in (0, 1, None) and need != "any"]
    return turns.keep(record, (*used, *good), messages=found)


def label(record):
    """Whether a record's answer is a good one, as KTO learns from it; None where it is not said."""
    said = [bool(record[k]) for k in shapes.LABELS if record.get(k) in (0, 1)]  # False is 0
    return said[0] if said else None


def labelled(path, **allowed):
    """→ [{"messages": [...], "label": bool, ...}]: answers with a label; of a pair both, of a
    ranking the best and the worst."""

    def convert(record):
        found = conversation(record, "turns")
        if found["messages"][-1].get("tool_calls"):
            raise ValueError(f"messages: the last message: tool_calls: {calls.TEXT}")
        if label(record) is None:
            got = next((_short(record[k]) for k in shapes.LABELS if k in record), "nothing")
            raise ValueError(f"label: true or false was expected beside the answer (got {got})")
        return found | {"label": label(record)}

    found = []
    for r in _convert(path, {"conversation": convert} | _ranked(), **allowed):
        if "ranks" not in r:
            found.append(r)
            continue
        best_and_worst = _ranked_pairs(r["ranks"], "best_worst")[0]
        for i, good in zip(best_and_worst, (True, False), strict=True):
            answer = {"role": "assistant", "content": r["responses"][i]}
            one = {"messages": [*r["prompt"], answer], "label": good}
            for field in ("finished", "ids"):
                if field in r:
                    one[field] = [r[field][i]]
            found.append(turns.keep(r, ("prompt", "responses", "ranks"), **one))
    return found


def is_text(path) -> bool:
    """Whether a file is for texts()."""
    return rows.ending(path) == ".txt" or kind(path) == "text"


def texts(path, **allowed) -> list[str]:
    """Plain text: records of {"text"}, each a document; a .txt file is one."""
    if rows.ending(path) != ".txt":
        return [r["text"] for r in _convert(path, {"text": document}, **allowed)]
    try:
        text = turns.string({"text": rows.decoded(path)}, "text")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    return [text] if text.strip() else []


def document(record):
    text = turns.string(record, "text")
    if not text.strip():
        raise OddError("without text")
    return {"text": text} | {k: v for k, v in record.items() if k != "text"}


def preferences(path, **allowed):
    """→ [{"prompt": [messages], "chosen": str, "rejected": str, ...}]"""
    return _convert(path, {"preference pair": turns.pair}, **allowed)


def answers(path) -> dict:
    """An answers file, as tools/evals.py writes it → {(prompt, how often it came before): the
    record, its "prompt" as messages}: two files of the same prompts match by these keys. null,
    which stands for a prompt beyond the model's context, is left out and counted."""
    found, nulls = {}, 0
    for line, record in rows.read(path):
        if record is None:
            nulls += 1
            continue
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a JSON object was expected (got {_short(record)})")
            prompt, answer = turns.prompt(record), turns.string(record, "answer")
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
        key, times = json.dumps(prompt), 0
        while (key, times) in found:
            times += 1
        found[key, times] = record | {"prompt": prompt, "answer": answer}
    report(path, len(found), {"null (beyond the model's context)": nulls}, "answers")
    return found


def rankings(path, **allowed):
    """→ [{"prompt": [messages], "responses": [K str], "ranks": [K int], ...}]; a preference pair
    is a ranking of two.
    """
    return _convert(path, _ranked(), **allowed)


def _ranked():
    def pair_as_ranking(record):
        pair = turns.pair(record)
        responses = [pair["chosen"], pair["rejected"]]
        used = ("chosen", "rejected", *SAMPLED)
        return turns.keep(pair, used, prompt=pair["prompt"], responses=responses, ranks=[0, 1])

    return {"ranking": turns.ranking, "preference pair": pair_as_ranking}


def pairs(path, which="all", **allowed):
    """Rankings or pairs → pairs as from `preferences`: all that differ in rank, or the best
    against the worst ("best_worst").
    """
    if which not in ("all", "best_worst"):
        raise ValueError(f'which: "all" or "best_worst" was expected (got {which!r})')
    found, dropped = [], Counter()
    for record in rankings(path, **allowed):
        responses = record["responses"]
        for i, j in _ranked_pairs(record["ranks"], which):
            if responses[i] == responses[j]:
                dropped[SAME] += 1
                continue
            both = {"chosen": responses[i], "rejected": responses[j]}
            for field in ("finished", "ids"):  # of the chosen answer, of the rejected one
                if field in record:
                    both[field] = [record[field][i], record[field][j]]
            found.append(
                turns.keep(record, ("responses", "ranks"), prompt=record["prompt"], **both)
            )
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
    digest = hashlib.sha256(" ".join(opening(prompt).split()).encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def opening(prompt) -> str:
    """The first user's turn."""
    return next(m["content"] for m in prompt if m["role"] == "user")


def kind(path):
    """What a file's first record is: "conversation", "preference pair" or "ranking"."""
    for line, record in rows.read(path):
        try:
            return shapes.shape(record)[0]
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
    report(path, 0, {})


def split(records):
    """Records of any kind → (train, held out), each in its order."""
    train, held = [], []
    for record in records:
        prompt = record["messages" if shapes.shape(record)[0] == "conversation" else "prompt"]
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


def _convert(path, readers, hidden=(), allow_dropped=True, allow_markers=True, written=()):
    """Reads the file; readers[kind](record in our names) → a new record. hidden: fields that stay
    as they are. written: what of tool calls the chat format writes (calls.KINDS); ValueError for
    other calls, where many records are odd, and allow_dropped is not set, and where more than 1 %
    have markers of chat formats in their text, and allow_markers is not."""
    found, dropped, first, unused, marked = [], Counter(), {}, Counter(), []
    for line, record in rows.read(path):
        try:
            result, others = one(record, readers, hidden, written)
            unused.update(others)
            found.append(result)
            marked += [(line, sign) for sign in markers(result)[:1]]
        except OddError as e:
            dropped[e.reason] += 1
            first.setdefault(e.reason, line)
        except ValueError as e:
            raise ValueError(f"{path}:{line}: {e}") from None
    odd = sum(dropped[reason] for reason in ODD)
    said = {f"{reason} (first: line {first[reason]})": n for reason, n in dropped.items()}
    many = odd > ODD_MANY and odd > ODD_SHARE * (len(found) + dropped.total())
    if many and not allow_dropped:
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in said.items())
        total = f"{odd:,} of {len(found) + dropped.total():,} records would be dropped"
        raise ValueError(f"{path}: {total}: {reasons}; --allow-dropped goes on without them")
    report(path, len(found), said, unused=unused)
    _report_markers(path, marked, len(found), allow_markers)
    return found


# what chat formats write around turns: in a record's text it is another format's, or written twice
MARKERS = re.compile(
    r"<\|\w+\|>|<｜[^｜<]+｜>|\[/?INST\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>|<[be]os>"
    r"|### (?:Instruction|Input|Response|Human|Assistant):|\n\n(?:Human|Assistant):"
)


def markers(record):
    """The first marker of each of a converted record's texts that has one."""
    texts = [m["content"] for m in messages(record)]
    texts += [record[k] for k in ("chosen", "rejected", "text") if k in record]
    texts += record.get("responses", [])
    return [found[0].strip() for found in map(MARKERS.search, texts) if found]


def messages(record):
    """A converted record's conversation, or its prompt; [] for a text."""
    return record.get("messages") or record.get("prompt") or []


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


def one(record, readers, hidden=(), written=calls.KINDS):
    """→ readers[kind]'s result, the names of the fields that nothing is made of. ValueError, which
    names fields as the record does; OddError for a record that is dropped."""
    kind, record, names = shapes.ours(record, hidden)
    if kind not in readers:
        wanted = " or ".join(readers)
        raise ValueError(f"a {wanted} was expected, this is a {kind}: {READERS[kind]} read those")
    try:
        others = shapes.message_fields(record)
        result = readers[kind](record)
        calls.check(
            messages(result), written, f"{'messages' if 'messages' in result else 'prompt'}: "
        )
        return result, (others | shapes.record_fields(record, result, kind)) - set(hidden)
    except OddError:
        raise
    except ValueError as e:
        field, colon, rest = str(e).partition(":")
        raise ValueError(names.get(field, field) + colon + rest) from None


if __name__ == "__main__":
    # by its name: check.py reads files by this one, and imports form no circle
    importlib.import_module("data.check").main()

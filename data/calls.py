"""Tool calls, in OpenAI's shape: what a record and its messages may carry, checked.

    "tools"        of a record: [{"type": "function", "function": {"name", "parameters", ...}}]
    "tool_calls"   of an assistant's turn: [{"id", "type": "function", "function": {"name",
                   "arguments"}}], the arguments an object or its JSON
    "tool"         the role of a turn that brings a result: {"tool_call_id", "name", "content"}

A conversation's tools lie in its first message here, so that they go wherever its messages go. No
format of the table writes any of the three; a checkpoint's own template may (own_template.py).
"""

import json

from data.formats import _short

KINDS = ("tools", "tool_calls", "tool")
SHAPE = "tool calls are read as OpenAI writes them, `tool_calls` and turns of the role tool"
TEXT = "an answer to compare is a text"
TAKE_OUT = "take the field out where the text says all without it"


def tools(given):
    """A record's tools, which may be JSON → [object]."""
    return _objects(given, "tools")


def tool_calls(given):
    """→ [{"id" if there is one, "type": "function", "function": {"name", "arguments": object}}]"""
    found = []
    for call in _objects(given, "tool_calls"):
        function = call.get("function", call)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"tool_calls: a function's name was expected (got {_short(call)})")
        arguments = _parsed(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            got = _short(function["arguments"])
            raise ValueError(
                f"tool_calls: arguments: an object or its JSON was expected (got {got})"
            )
        one = {"type": "function", "function": {"name": name, "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") else {}) | one)
    return found


def _objects(given, field):
    found = _parsed(given)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{field}: a list of objects was expected (got {_short(given)})")
    return found


def _parsed(given):
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def kept(message, first):
    """What of a message belongs to calls. first: whether it is its conversation's first."""
    if len(message) == 2:
        return {}
    role = message["role"]
    names = {"assistant": ("tool_calls",), "tool": ("tool_call_id", "name")}.get(role, ())
    names += ("tools",) * first
    return {name: message[name] for name in names if message.get(name)}


def found(messages):
    """→ [(number of a message, which of KINDS it has, its value)]"""
    out = []
    for i, m in enumerate(messages, 1):
        if m["role"] == "tool":
            out.append((i, "tool", m["content"]))
        elif len(m) > 2:
            out += [(i, kind, m[kind]) for kind in KINDS if m.get(kind)]
    return out


def check(messages, written, field=""):
    """ValueError for the first of KINDS that is not in `written`, what the chat format writes.
    field: where the messages stand in a record."""
    for i, kind, value in found(messages):
        if kind not in written:
            where = f"{kind}: " if kind == "tools" else f"{field}message {i}: {kind}: "
            raise ValueError(
                f"{where}the chat format writes no tool calls, as a checkpoint's own template may"
                f" (got {_short(value)}); {TAKE_OUT}"
            )


def said(message) -> str:
    """All that a message says, as one text."""
    called = message.get("tool_calls")
    return message["content"] + (json.dumps(called, sort_keys=True) if called else "")


def as_record(record):
    """A record whose tools stand beside its messages again, as they are written to a file."""
    field = "messages" if "messages" in record else "prompt"
    first, *others = record.get(field) or [()]  # a text has neither
    if "tools" not in first:
        return record
    plain = {k: v for k, v in first.items() if k != "tools"}
    return record | {field: [plain, *others], "tools": first["tools"]}


def as_openai(message):
    """A message whose calls' arguments are JSON, as OpenAI's upload format has them."""
    if not message.get("tool_calls"):
        return message
    written = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        written.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": written}

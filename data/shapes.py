"""The shapes that records come in, and what their fields are called here.

    shape(record) → (kind, {our field: their field})        ours(record) → (kind, record, the same)

A line in SHAPES adds a shape, a word in it another name of a field.
"""

import re
from functools import lru_cache

from data import calls
from data.formats import _short

# ---------------------------------------------------------------- records
ASKED = "prompt|question|query|problem|inputs|input"
TURNS = "messages|conversations|conversation|contents"
# fmt: off
SHAPES = [  # kind, their fields (names of one field with | between them, the first is preferred),
            # ours. The first line all of whose fields a record has is its shape
    ("ranking",         f"{ASKED} responses ranks",                       "prompt responses ranks"),
    ("preference pair", "instruction chosen rejected",               "instruction chosen rejected"),
    ("preference pair", f"{ASKED} chosen rejected",                       "prompt chosen rejected"),
    ("preference pair", f"{TURNS} chosen rejected",                       "prompt chosen rejected"),
    ("preference pair", "chosen rejected",                                       "chosen rejected"),
    ("preference pair", "input preferred_output non_preferred_output",    "prompt chosen rejected"),
    ("preference pair", "instruction output|response rejected_response",
                                                                     "instruction chosen rejected"),
    ("preference pair", "prompt|query|question response|completion rejected_response",
                                                                          "prompt chosen rejected"),
    ("preference pair", "messages rejected_response",                            "chosen rejected"),
    ("conversation",    TURNS,                                                          "messages"),
    ("conversation",    "instruction output|response|completion|answer",      "instruction output"),
    ("conversation",    f"{ASKED} completion|response|output|answer|solution|targets",
                                                                               "prompt completion"),
    ("text",            "text",                                                             "text"),
]
# fmt: on
OURS = {name for _, _, ours in SHAPES for name in ours.split()}
BESIDE_NO_TEXT = {name for _, theirs, _ in SHAPES for name in re.split(r"[ |]", theirs)}
BESIDE_NO_TEXT |= {"role", "from", "code", "summary", "system"}  # parts of something else
JUDGED = {"chosen", "rejected", "responses", "ranks", "preferred_output", "rejected_response"}
REFERENCES = ("answer", "solution", "targets")  # beside a prompt: what a reader's reward may check

# ---- what else a record or a message may carry: used, refused by name, harmless, or else counted
BESIDE = ("system", "system_prompt", "history", "tools")  # used: they go in front of the turns
SYSTEM = ("systemInstruction", "system_instruction")  # Gemini's names of it
WEIGHTS = ("weight", "train", "training", "loss")  # used: a message with 0 is read, not trained
LABELS = ("label", "kto_tag")  # used: whether a conversation's answer is a good one (KTO)
TEXT_ONLY = "text alone is read here"
NO_THOUGHT = "no chat format here writes what is thought before an answer"
USE_WEIGHT = "a message's weight, 0 or 1, says what is trained"
ALPACA_ONLY = "it goes into the prompt beside `instruction` alone"
IN_PROMPT = "it must stand in the prompt"
TEXT_ALONE = "a text that is trained whole stands alone"
# fmt: off
REFUSED = {  # they would change what is learnt, and cannot be honoured
    **dict.fromkeys("tools functions tool_calls function_call function_calls".split(), calls.SHAPE),
    **dict.fromkeys("tool_call_id tool_choice tool_responses toolConfig".split(), calls.SHAPE),
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
    "parallel_tool_calls",
    *"item reference finished ids tokenizer".split(),
}


def shape(record, hidden=()):
    """→ kind, {our field: theirs}; ValueError where no shape is known that has the fields.

    hidden: fields that are not looked at. A record that lacks one field of a shape has it too,
    unless it is the first one: what is missing is then said by who reads it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object was expected (got {_short(record)})")
    full = frozenset(k for k, v in record.items() if v is not None and k not in hidden)
    found = _match(full, frozenset(record).difference(hidden))
    if found is None:
        known = dict.fromkeys(re.sub(r"\|\S+", "", theirs) for _, theirs, _ in SHAPES)
        seen = [name[:40] if name.isprintable() else ascii(name[:40]) for name in sorted(record)]
        raise ValueError(
            f"no shape is known with the fields {', '.join(seen[:12]) or 'none'}; known are "
            + "; ".join(known)
            + " (data/shapes.py)"
        )
    return found


@lru_cache(1000)
def _match(full, there):
    """full: names of fields with a value; there: and of those that are null."""
    rows = [row for row in SHAPES if not full & JUDGED or row[0] not in ("conversation", "text")]
    partial = []
    for known in (full, there):
        for kind, theirs, ours in rows:
            names = [_first(given.split("|"), known) for given in theirs.split()]
            named = dict(zip(ours.split(), names, strict=True))
            if all(names):
                return kind, named
            if names[0] and names.count(None) == 1:
                named = {k: v or k for k, v in named.items()}
                partial.append((kind, named))
    return partial[0] if partial else None


def _first(names, known):
    return next((name for name in names if name in known), None)


def ours(record, hidden=()):
    """→ kind, the record with our names of fields, roles and contents, {our field: theirs}."""
    kind, names = shape(record, hidden)
    used = {*names.values()}
    found = {k: v for k, v in record.items() if k not in used and (v is not None or k not in OURS)}
    for field, name in names.items():
        if name in record:
            found[field] = record[name]
    asked = found.get("prompt")
    if isinstance(asked, dict) and "messages" in asked:  # OpenAI's pairs
        found |= {k: v for k, v in asked.items() if k != "messages"} | {"prompt": asked["messages"]}
    found.pop("schemaVersion", None)  # Bedrock's: of the file, not of the record
    for field in SYSTEM:
        if field in found and not found.get("system"):
            found["system"] = found.pop(field)
    if "system" in found:
        found["system"] = _system(found["system"])
    for field in LABELS:
        if field in found:
            found[field] = _truth(found[field])
    for field in MESSAGE_FIELDS:
        if isinstance(found.get(field), (list, dict)):
            name = names.get(field, field)
            given = _spoken(found[field]) if name.startswith("conversation") else found[field]
            found[field] = _turns(given, name)
    return kind, _dialogues(found), names


# ---------------------------------------------------------------- fields
def record_fields(record, result, kind):
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
    for k in left if kind == "text" else ():
        if k in BESIDE_NO_TEXT and not empty(left[k]):
            raise ValueError(f"{k}: {TEXT_ALONE} (got {_short(left[k])}); {calls.TAKE_OUT}")
    if kind == "conversation":  # "any" keeps the label
        left = {k: v for k, v in left.items() if k not in LABELS or v not in (0, 1)}
    return _not_used(left)


def message_fields(record):
    """The same of a record's messages, before they are read."""
    found = set()
    for field in MESSAGE_FIELDS:
        given = record.get(field)
        for i, entry in enumerate(given if isinstance(given, list) else [], 1):
            for message in entry if isinstance(entry, list) else [entry]:
                if not isinstance(message, dict) or message.keys() == {"role", "content"}:
                    continue
                used = ("role", "content", *WEIGHTS, *calls.kept(message, first=i == 1))
                others = {k: v for k, v in message.items() if k not in used}
                found |= {f"message {k}" for k in _not_used(others, f"{field}: message {i}: ")}
    return found


def _not_used(fields, where=""):
    for k, v in fields.items():
        if k in REFUSED and not empty(v) and v is not False:
            raise ValueError(f"{where}{k}: {REFUSED[k]} (got {_short(v)}); {calls.TAKE_OUT}")
    return {k for k, v in fields.items() if k not in HARMLESS and not empty(v)}


def empty(value):
    """Whether a value says nothing: tables write such ones in the rows that lack a field."""
    blank = isinstance(value, str) and not value.strip()
    return value is None or blank or value in ([], {}) or value in ("[]", "{}", "null")


# ---------------------------------------------------------------- messages
MESSAGE_FIELDS = (
    *("messages", "prompt", "completion", "output", "response", "chosen", "rejected"),
    *("responses", "history"),
)
NAMES = {"role": ("from",), "content": ("value", "parts", "text")}
ROLES = {
    **{"human": "user", "prompter": "user"},
    **{"gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "developer": "system"},
}
CALLING = {
    *"function tool_call tool_response function_call function_response".split(),
    *"observation ipython".split(),
}
PARTS = {  # kinds of a content's parts that are no text → why they are refused
    **dict.fromkeys("tool_use tool_result toolUse toolResult functionCall".split(), calls.SHAPE),
    **dict.fromkeys("functionResponse function_call tool_call".split(), calls.SHAPE),
    **dict.fromkeys("thinking reasoning reasoningContent thought".split(), NO_THOUGHT),
}


def _spoken(turns):
    """Turns without roles, a list of texts (LIMA) or of {input, output} (Capybara), with them."""
    if not isinstance(turns, list):
        return turns
    if all(isinstance(t, dict) and t.keys() == {"input", "output"} for t in turns):
        turns = [text for t in turns for text in (t["input"], t["output"])]
    if not all(isinstance(t, str) for t in turns):
        return turns
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def _turns(given, field):
    """A list of messages, or one message, with our names; a list of them in a list too."""
    found = []
    for i, m in enumerate([given] if isinstance(given, dict) else given, 1):
        if _is_messages(m):
            found.append(_turns(m, field))
            continue
        try:
            found.append(_message(m))
        except ValueError as e:
            raise ValueError(f"{field}: message {i}: {e}") from None
    return found


def _is_messages(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _message(given):
    if not isinstance(given, dict):
        return given
    m = dict(given)
    for name, others in NAMES.items():
        other = _first(others, m.keys()) if m.get(name) is None else None
        if other:
            m.pop(name, None)
            m[name] = m.pop(other)
    role = m.get("role")
    if role in CALLING if isinstance(role, str) else False:
        raise ValueError(f"role: {calls.SHAPE} (got {role!r})")
    m["role"] = ROLES.get(role, role) if isinstance(role, str) else role
    for field, read in (("tool_calls", calls.tool_calls), ("tools", calls.tools)):
        if field in m:
            m[field] = None if empty(m[field]) else read(m[field])
    if m.get("tool_calls"):
        m.setdefault("content", "")
    if "content" in m:
        m["content"] = _text(m["content"])
    return m


def _text(content):
    """A content's text: null says nothing, the texts of several parts follow one another. What is
    no text at all is left as it is."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if isinstance(part, dict):
            _only_text(part)
            part = part.get("text")
        if not isinstance(part, str):
            return content
        texts.append(part)
    return "".join(texts)


def _only_text(part):
    """ValueError for a content's part that is more than a text."""
    kind = part.get("type", "text")
    others = [k for k, v in part.items() if k not in ("type", "text", "cache_control") and v]
    if kind in ("text", "input_text", "output_text") and not others:
        return
    what = _first([str(kind), *others], PARTS) or (others[0] if "text" in str(kind) else kind)
    raise ValueError(f"content: {PARTS.get(what, TEXT_ONLY)} (got a part {_short(what)})")


def _system(value):
    """A system message beside the turns: a text, its parts, or a message."""
    if isinstance(value, dict):
        value = _message(value).get("content", value)
    return value if value is None else _text(value)


def _truth(value):
    """A label; tables write it as a word, others as -1 and 1."""
    known = dict.fromkeys("true 1 good desirable".split(), True) | {"": None}
    known |= dict.fromkeys("false 0 -1 bad undesirable".split(), False)
    said = str(value) if value == -1 else value
    return known.get(said.strip().lower(), value) if isinstance(said, str) else value


# ---------------------------------------------------------------- dialogues as text (HH)
def _dialogue(text):
    """ "\\n\\nHuman: … \\n\\nAssistant: …" → messages; None for another text."""
    if not isinstance(text, str) or not re.match(r"\s*Human:.*\n\nAssistant:", text, re.DOTALL):
        return None
    _, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def _dialogues(record):
    """A pair of two dialogues, or a prompt that ends in "Assistant:", as messages."""
    prompt = _dialogue(record.get("prompt"))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        answers = {k: record[k] for k in ("completion", "chosen", "rejected") if k in record}
        stripped = {k: v.strip() if isinstance(v, str) else v for k, v in answers.items()}
        return record | stripped | {"prompt": prompt[:-1]}
    both = {k: _dialogue(record.get(k)) for k in ("chosen", "rejected")}
    alone = "prompt" not in record and "instruction" not in record
    return record | both if alone and all(both.values()) else record

"""Messages → token ids and labels, by one table of chat formats.

    <|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n
    <|im_start|>assistant\nLima.<|im_end|>\n
                            ^^^^^^^^^^^^^^^ what is trained: the answer and its end token

Training ids, labels and generation prompts come from one function, and each piece is encoded apart:
so a prompt's ids are always the first ids of the whole conversation, wherever BPE would have merged
over the border. A format's own tokens are ids; what people wrote is text, even if it reads
"<|im_end|>". The jinja text of a format travels with the model, in its tokenizer_config.json.

formats.py has the table; a checkpoint's template that is not in it is rendered by jinja2, in
own_template.py.
"""

import warnings
from functools import lru_cache

from data import calls
from data.formats import TEMPLATES, _known, _normal, _short
from data.own_template import OwnTemplate

ROLES = ("system", "user", "assistant", "tool")
ASKS = ("user", "tool")  # whose turn a prompt may end in

_own_template = lru_cache(8)(OwnTemplate)
_in_table = lru_cache(8)(lambda jinja: _known.get(_normal(jinja)))  # a Format or None


def of(tokenizer):
    """The format of the tokenizer's own chat template: a Format of the table, else an OwnTemplate;
    "chatml" if it has none. ValueError if the template cannot be used.
    """
    jinja = tokenizer.chat_template
    if jinja is None:
        return TEMPLATES["chatml"]
    if found := _in_table(jinja):
        return found
    return _own_template(jinja, frozenset(tokenizer.special), tokenizer.bos, tokenizer.eos)


def named(name):
    """TEMPLATES[name], or a ValueError that lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat format {name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def adopt(tokenizer, name=None):
    """The format that a run trains with. It becomes the tokenizer's own: it is saved with the
    model, with its end token as eos (unless the template itself writes eos somewhere else).

    name None: the checkpoint's own format, or "chatml" if it has none. Warns if `name` is another
    one than the checkpoint's own.
    """
    format = of(tokenizer) if name is None else named(name)
    has = tokenizer.chat_template is not None
    own = _in_table(tokenizer.chat_template) if has else None
    if has and name is not None and own is not format:
        warnings.warn(
            f"training with the chat format {format.name}, but the checkpoint was trained with "
            f"{own.name if own else 'one that is not in the table'}: it will have to unlearn it",
            stacklevel=2,
        )
    if not has or name is not None and own is not format:
        tokenizer.chat_template = format.jinja
    end_id(tokenizer, format)
    if "eos_token" not in format.jinja:
        tokenizer.config["eos_token"] = format.end
    return format


def check(messages):
    """ValueError unless messages are a list of {"role", "content"}: at most one system message,
    first, then user and assistant in turn; tools' results follow an assistant's calls.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a list of messages was expected (got {_short(messages)})")
    for i, m in enumerate(messages, 1):
        if not isinstance(m, dict):
            got = _short(m)
            raise ValueError(
                f'message {i}: an object with "role" and "content" was expected (got {got})'
            )
        if m.get("role") not in ROLES:
            got = _short(m.get("role"))
            raise ValueError(
                f"message {i}: role: one of {', '.join(ROLES)} was expected (got {got})"
            )
        if not isinstance(m.get("content"), str):
            got = _short(m.get("content"))
            raise ValueError(f"message {i}: content: a string was expected (got {got})")
    start = messages[0]["role"] == "system"
    expected = ("user",)
    for i, m in enumerate(messages[start:], 1 + start):
        if m["role"] not in expected:
            raise ValueError(
                f"message {i}: role: {' or '.join(expected)} was expected here, user and"
                f" assistant take turns after at most one system message (got {m['role']})"
            )
        called = ("tool",) if m.get("tool_calls") else ("user",)
        expected = {"user": ("assistant",), "tool": ("assistant", "tool")}.get(m["role"], called)
    if len(messages) == start:
        raise ValueError(
            "message 2: a user's turn was expected after the system message (got nothing)"
        )


def text(messages, add_generation_prompt=False, format=TEMPLATES["chatml"], bos="<s>", eos="</s>"):
    """What Hugging Face's apply_chat_template gives for the format's template, byte for byte.
    bos, eos: the tokenizer's tokens.
    """
    pieces = _pieces(format, messages, add_generation_prompt, bos, eos)
    return "".join(piece for piece, _, _ in pieces)


def _pieces(format, messages, add_generation_prompt, bos, eos):
    check(messages)
    calls.check(messages, format.calls)
    if add_generation_prompt and messages[-1]["role"] not in ASKS:
        raise ValueError(
            f"a prompt must end in a user's turn (the last one is the {messages[-1]['role']}'s)"
        )
    return format.pieces(messages, add_generation_prompt, bos, eos)


def render(tokenizer, messages, add_generation_prompt=False, format=None):
    """messages → (ids, labels), two lists of one length.

    labels are the ids on every assistant turn's content and its end token, -100 elsewhere (also on
    the newline after the end, and on a turn of "weight" 0, which is read but not trained). What the
    tokenizer begins every text with stands there once, whether or not the template writes it.
    add_generation_prompt: end where an answer begins; the messages must then end in a user's turn.
    format: a Format, or None for the tokenizer's own. Raises ValueError for wrong roles, and for a
    tokenizer that lacks the format's special tokens.
    """
    format = format or of(tokenizer)
    end_id(tokenizer, format)
    pieces = _pieces(format, messages, add_generation_prompt, tokenizer.bos, tokenizer.eos)
    ids, labels, _ = _encode(tokenizer, pieces)
    begin = [] if ids[: len(tokenizer.begin)] == tokenizer.begin else tokenizer.begin
    return [*begin, *ids], [-100] * len(begin) + labels


def _encode(tokenizer, pieces):
    """→ (ids, labels, what the last one is: "token" or "text")."""
    ids, labels, after, greedy = [], [], None, False
    for piece, own, trained in pieces:
        if own:
            key = piece, after, greedy
            if key not in tokenizer.own:  # the same in every conversation
                tokenizer.own[key] = _encode_own(tokenizer, *key)
            new, after, greedy = tokenizer.own[key]
        else:
            if greedy and not trained:  # the token before it takes this white space
                piece = piece.lstrip()
            new = tokenizer.encode(piece, after)
            if piece:
                after, greedy = "text", False
        ids += new
        labels += new if trained else [-100] * len(new)
    return ids, labels, after


def _encode_own(tokenizer, piece, after, greedy):
    """A piece of the format itself → (ids, what the last one is, whether it takes white space)."""
    ids = []
    for part in tokenizer.split(piece):
        if part in tokenizer.special:
            ids.append(tokenizer.special[part])
            after, greedy = "token", part in tokenizer.greedy
            continue
        part = part.lstrip() if greedy else part
        ids += tokenizer.encode(part, after)
        if part:
            after, greedy = "text", False
    return ids, after, greedy


def document(tokenizer, text):
    """A text's ids as in pre-training, between the tokens that begin and end a document."""
    begin = end = tokenizer.special.get("<|endoftext|>")  # both in GPT-2, SmolLM2 and Qwen
    if end is None:
        begin, end = tokenizer.bos_id, tokenizer.special.get("<|end_of_text|>", tokenizer.eos_id)
    return [i for i in (begin, *tokenizer.encode(text), end) if i is not None]


def answer_ids(tokenizer, prompt, answer, finished=True):
    """messages that end in a user's turn, and an answer (str) → (the prompt's ids, the answer's ids
    with its end token).

    This is the one layout that the reward model, PPO and DPO read: the last token is the answer's
    end. finished: False for an answer that was cut: no end token follows it.
    """
    prompt_ids, _ = render(tokenizer, prompt, add_generation_prompt=True)
    read = [m | {"weight": 0} for m in prompt]
    _, labels = render(tokenizer, [*read, {"role": "assistant", "content": answer}])
    ids = [i for i in labels if i != -100]
    return prompt_ids, ids if finished else ids[:-1]


def ranked_ids(tokenizer, record, answers):
    """A record's prompt and its answers (str) → (the prompt's ids, [the answers' ids]).

    The ids are those that were sampled if the record has them in this vocabulary; else the texts',
    without an end token for cut ones. ValueError for a sampled id that the tokenizer lacks.
    """
    prompt, _ = render(tokenizer, record["prompt"], add_generation_prompt=True)
    if "ids" in record and record.get("tokenizer") == tokenizer.hash:
        bad = [i for ids in record["ids"] for i in ids if i not in tokenizer.ids]
        if bad:
            raise ValueError(
                f"ids: the tokenizer has no id {bad[0]}, although its hash is the record's"
            )
        return prompt, record["ids"]
    finished = record.get("finished", [True] * len(answers))
    found = []
    for answer, ended in zip(answers, finished, strict=True):
        found.append(answer_ids(tokenizer, record["prompt"], answer, ended)[1])
    return prompt, found


def read_answers(tokenizer, answers, ends):
    """Sampled answers (lists of ids, none empty) → (texts, whether each has ended); ends: the ids
    that end an answer.
    """
    finished = [answer[-1] in ends for answer in answers]
    texts = []
    for answer, ended in zip(answers, finished, strict=True):
        texts.append(answer_text(tokenizer, answer[:-1] if ended else answer))
    return texts, finished


def answer_text(tokenizer, ids):
    """An answer's ids without its end → what was said, without what the template adds to it."""
    format = of(tokenizer)
    asked = [{"role": "user", "content": "Hi"}]
    _, _, after = _encode(tokenizer, format.pieces(asked, True, tokenizer.bos, tokenizer.eos))
    said = tokenizer.decode(ids, skip_special=True, after=after)
    before, _, behind = format.answer.partition("{content}")
    said = said.removeprefix(before).removesuffix(behind)
    return said.strip() if format.trim else said


def end_id(tokenizer, format=None):
    """The id of the token that ends an assistant's turn: what generation stops at."""
    format = format or of(tokenizer)
    for token in format.needs:
        _special(tokenizer, token, format)
    end = format.end.replace("{eos}", tokenizer.eos)
    if not end:
        raise ValueError(
            f"the chat format {format.name} ends an answer with the end token, and the tokenizer"
            " has none (eos_token in tokenizer_config.json)"
        )
    return _special(tokenizer, end, format)


def end_ids(tokenizer, config):
    """All ids that end an answer: the format's end token first, then config.eos_token_id (one id,
    several, or None).
    """
    named = config.eos_token_id
    if not isinstance(named, list):
        named = [] if named is None else [named]
    return list(dict.fromkeys([end_id(tokenizer), *named]))


def _special(tokenizer, token, format):
    if token not in tokenizer.special:
        raise ValueError(
            f"the chat format {format.name} needs the special token {token}; the tokenizer has"
            f" {', '.join(tokenizer.special)}"
        )
    return tokenizer.special[token]

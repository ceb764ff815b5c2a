"""Messages -> token ids and loss mask, by one table of chat formats.

    <|im_start|>user\\nWhat is the capital of
    Peru?<|im_end|>\\n<|im_start|>assistant\\nLima.<|im_end|>\\n
                                                                              ^^^^^^^^^^^^^^^ what
                                                                              is trained: answer and
                                                                              end token

Training ids, labels and generation prompts come from one function, and each piece is encoded apart:
so a prompt's ids are always the first ids of the whole conversation, wherever BPE would have merged
over the border. A format's own tokens are ids, what people wrote is text, even if it reads
"<|im_end|>". The jinja text of a format travels with the model, in its tokenizer_config.json.
"""

import re
import warnings
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")

CHATML_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{%"
    " endfor %}"
)
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Format:
    """One chat format: a turn is written as before + content + end + after.

    before: with {role} in it; end: the special token that ends a turn (the last one an answer is
    trained on); system: the default system message, put in front where the first message is no
    system's; None: nothing is put there. jinja: the template as saved with a model; known: other
    texts of checkpoints on the hub that render the same.
    """

    name: str
    before: str
    end: str
    after: str
    jinja: str
    system: str | None = None
    known: tuple[str, ...] = ()


CHATML = "{% for message in messages %}" + CHATML_TURN + CHATML_PROMPT
# fmt: off
TEMPLATES = {f.name: f for f in (
    Format("chatml", "<|im_start|>{role}\n", "<|im_end|>", "\n", CHATML,
           known=(CHATML.replace("<|im_end|>' + '\n'", "<|im_end|>\n'"),
                  "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + CHATML)),
    Format("smollm2", "<|im_start|>{role}\n", "<|im_end|>", "\n",
           "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
           + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}" + CHATML_TURN + CHATML_PROMPT,
           system=SMOLLM2_SYSTEM),
)}
# fmt: on


def _normal(jinja):
    """In a jinja string a newline and its escape are the same, and jinja drops one newline at the
    end.
    """
    return jinja.replace("\\n", "\n").removesuffix("\n")


_known = {_normal(jinja): f for f in TEMPLATES.values() for jinja in (f.jinja, *f.known)}


def of(tokenizer):
    """The Format of the tokenizer's own chat template; "chatml" where it has none. ValueError for
    one that is not in the table.
    """
    if tokenizer.chat_template is None:
        return TEMPLATES["chatml"]
    found = _known.get(_normal(tokenizer.chat_template))
    if found is None:
        raise ValueError(
            f"the checkpoint's chat template is none of {', '.join(TEMPLATES)}: it begins "
            f"{tokenizer.chat_template[:60]!r}; sft.py --format trains it with one of them"
        )
    return found


def named(name):
    """TEMPLATES[name], or a ValueError that lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no chat format {name!r}: there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def adopt(tokenizer, name=None):
    """The Format a run trains with, from here on the tokenizer's own: it is saved with the model,
    its end token as eos.

    name None: the checkpoint's own, or "chatml" where it has none. Warns where `name` differs from
    the checkpoint's own.
    """
    format = of(tokenizer) if name is None else named(name)
    has = tokenizer.chat_template is not None
    own = _known.get(_normal(tokenizer.chat_template)) if has else None
    if has and own is not format:
        warnings.warn(
            f"training with the chat format {format.name}, but the checkpoint was trained with "
            f"{own.name if own else 'one that is not in the table'}: it will have to unlearn it",
            stacklevel=2,
        )
    if own is not format:
        tokenizer.chat_template = format.jinja
    _special(tokenizer, format.end, format)
    tokenizer.config["eos_token"] = format.end
    return format


def check(messages):
    """ValueError unless messages are a list of {"role", "content"}: at most a system's first, then
    user and assistant in turn.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"a list of messages was expected (got {_short(messages)})")
    for i, m in enumerate(messages):
        if not isinstance(m, dict):
            raise ValueError(
                f'message {i + 1}: an object with "role" and "content" was expected (got'
                f" {_short(m)})"
            )
        if m.get("role") not in ROLES:
            raise ValueError(
                f"message {i + 1}: role: one of {', '.join(ROLES)} was expected (got"
                f" {_short(m.get('role'))})"
            )
        if not isinstance(m.get("content"), str):
            raise ValueError(
                f"message {i + 1}: content: a string was expected (got {_short(m.get('content'))})"
            )
    start = messages[0]["role"] == "system"
    for i, m in enumerate(messages[start:]):
        if m["role"] != ROLES[1 + i % 2]:
            raise ValueError(
                f"message {i + 1 + start}: role: {ROLES[1 + i % 2]} was expected here, user and"
                f" assistant take turns after at most one system message (got {m['role']})"
            )
    if len(messages) == start:
        raise ValueError(
            "message 2: a user's turn was expected after the system message (got nothing)"
        )


def _short(value):
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."


def _pieces(format, messages, add_generation_prompt):
    """-> [(text, belongs to the format?, trained?)] in order."""
    check(messages)
    if add_generation_prompt and messages[-1]["role"] != "user":
        raise ValueError(
            f"a prompt must end in a user's turn (the last one is the {messages[-1]['role']}'s)"
        )
    if format.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": format.system}, *messages]
    pieces = []
    for m in messages:
        trained = m["role"] == "assistant" and m.get("weight", 1) != 0
        pieces += [
            (format.before.format(role=m["role"]), True, False),
            (m["content"], False, trained),
            (format.end, True, trained),
            (format.after, True, False),
        ]
    return pieces + [(format.before.format(role="assistant"), True, False)] * add_generation_prompt


def text(messages, add_generation_prompt=False, format=TEMPLATES["chatml"]):
    """What Hugging Face's apply_chat_template gives for the format's template, byte for byte."""
    return "".join(piece for piece, _, _ in _pieces(format, messages, add_generation_prompt))


def render(tokenizer, messages, add_generation_prompt=False, format=None):
    """messages -> (ids, labels), two lists of one length.

    labels are the ids on every assistant turn's content and its end token, -100 elsewhere (also on
    the newline after the end, and on a turn of "weight" 0, which is read but not trained).
    add_generation_prompt: ends where an answer begins; the messages then end in a user's turn.
    format: a Format, None: the tokenizer's own. Raises ValueError for wrong roles, and for a
    tokenizer that lacks the format's special tokens.
    """
    format = format or of(tokenizer)
    ids, labels = [], []
    for piece, own, trained in _pieces(format, messages, add_generation_prompt):
        new = _encode_own(tokenizer, piece, format) if own else tokenizer.encode(piece)
        ids += new
        labels += new if trained else [-100] * len(new)
    return ids, labels


def answer_ids(tokenizer, prompt, answer, finished=True):
    """messages that end in a user's turn, and an answer (str) → (ids of the prompt, ids of the
    answer with its end token).

    The one layout that the reward model, PPO and DPO read: the last token is the answer's end.
    finished: False where the answer was cut, which no end token may follow then.
    """
    end = [end_id(tokenizer)] if finished else []
    return render(tokenizer, prompt, add_generation_prompt=True)[0], [
        *tokenizer.encode(answer),
        *end,
    ]


def ranked_ids(tokenizer, record, answers):
    """A record's prompt and its answers (str) → (prompt ids, [answer ids]): the very ids that were
    sampled, where the record has them in this vocabulary; else the texts', cut ones without an
    end."""
    prompt = render(tokenizer, record["prompt"], add_generation_prompt=True)[0]
    if "ids" in record and record.get("tokenizer") == tokenizer.hash:
        bad = [i for ids in record["ids"] for i in ids if i not in tokenizer.ids]
        if bad:
            raise ValueError(
                f"ids: {bad[0]} is none of the tokenizer's, although its hash is theirs"
            )
        return prompt, record["ids"]
    finished = record.get("finished", [True] * len(answers))
    pairs = zip(answers, finished, strict=True)
    return prompt, [answer_ids(tokenizer, record["prompt"], a, ended)[1] for a, ended in pairs]


def read_answers(tokenizer, answers, ends):
    """Sampled ids, [answer ids] → (texts, whether each has ended); ends: the ids that end an
    answer.
    """
    finished = [a[-1] in ends for a in answers]
    told = [a[:-1] if ended else a for a, ended in zip(answers, finished, strict=True)]
    return [tokenizer.decode(a, skip_special=True) for a in told], finished


def end_id(tokenizer, format=None):
    """The id of the token that ends an assistant's turn: what generation stops at."""
    format = format or of(tokenizer)
    return _special(tokenizer, format.end, format)


def end_ids(tokenizer, config):
    """All ids that end an answer: the format's end token, and after it what config.eos_token_id
    names (an id, or several).
    """
    named = config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    return list(dict.fromkeys([end_id(tokenizer), *named]))


def _encode_own(tokenizer, piece, format):
    """A piece of the format itself: <|...|> in it are special tokens, the rest is text."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", piece):
        ids += (
            [_special(tokenizer, part, format)] if part.startswith("<|") else tokenizer.encode(part)
        )
    return ids


def _special(tokenizer, token, format):
    if token not in tokenizer.special:
        raise ValueError(
            f"the chat format {format.name} needs the special token {token}; the tokenizer has"
            f" {', '.join(tokenizer.special)}"
        )
    return tokenizer.special[token]

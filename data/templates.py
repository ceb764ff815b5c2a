"""Messages → token ids and labels, by one table of chat formats.

    <|im_start|>user\\nWhat is the capital of Peru?<|im_end|>\\n
    <|im_start|>assistant\\nLima.<|im_end|>\\n
                            ^^^^^^^^^^^^^^^ what is trained: the answer and its end token

Training ids, labels and generation prompts come from one function, and each piece is encoded apart:
so a prompt's ids are always the first ids of the whole conversation, wherever BPE would have merged
over the border. A format's own tokens are ids; what people wrote is text, even if it reads
"<|im_end|>". The jinja text of a format travels with the model, in its tokenizer_config.json.
"""

import re
import warnings
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")

CHATML_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
)
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Format:
    """One chat format: a turn is written as before + content + end + after.

    before: with {role} in it; end: the special token that ends a turn, the last one that is trained
    of an answer; system: the default system message, put in front of messages that have none, or
    None. jinja: the template as it is saved with a model; known: texts of checkpoints on the hub
    that render the same.
    """

    name: str
    before: str
    end: str
    after: str
    jinja: str
    system: str | None = None
    known: tuple[str, ...] = ()


CHATML = "{% for message in messages %}" + CHATML_TURN + CHATML_PROMPT
# other checkpoints' spellings of CHATML
CHATML_END_INSIDE = CHATML.replace("<|im_end|>' + '\n'", "<|im_end|>\n'")
CHATML_DEFAULT = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
)
SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
)
SMOLLM2 += CHATML_TURN + CHATML_PROMPT
# fmt: off
TEMPLATES = {f.name: f for f in (
    Format("chatml", "<|im_start|>{role}\n", "<|im_end|>", "\n", CHATML,
           known=(CHATML_END_INSIDE, CHATML_DEFAULT + CHATML)),
    Format("smollm2", "<|im_start|>{role}\n", "<|im_end|>", "\n", SMOLLM2,
           system=SMOLLM2_SYSTEM),
)}
# fmt: on


def _normal(jinja):
    """The same text for templates that render the same: in a jinja string a newline and its escape
    are one, and jinja drops a newline at the end.
    """
    return jinja.replace("\\n", "\n").removesuffix("\n")


_known = {_normal(jinja): f for f in TEMPLATES.values() for jinja in (f.jinja, *f.known)}


def of(tokenizer):
    """The Format of the tokenizer's own chat template; "chatml" if it has none. ValueError if the
    template is not in the table.
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
    """The Format that a run trains with. It becomes the tokenizer's own: it is saved with the
    model, with its end token as eos.

    name None: the checkpoint's own format, or "chatml" if it has none. Warns if `name` is another
    one than the checkpoint's own.
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
    """ValueError unless messages are a list of {"role", "content"}: at most one system message,
    first, then user and assistant in turn.
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
    """A value as an error message shows it."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _pieces(format, messages, add_generation_prompt):
    """→ [(text, whether it is the format's own, whether it is trained)] in order."""
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
    if add_generation_prompt:
        pieces.append((format.before.format(role="assistant"), True, False))
    return pieces


def text(messages, add_generation_prompt=False, format=TEMPLATES["chatml"]):
    """What Hugging Face's apply_chat_template gives for the format's template, byte for byte."""
    return "".join(piece for piece, _, _ in _pieces(format, messages, add_generation_prompt))


def render(tokenizer, messages, add_generation_prompt=False, format=None):
    """messages → (ids, labels), two lists of one length.

    labels are the ids on every assistant turn's content and its end token, -100 elsewhere (also on
    the newline after the end, and on a turn of "weight" 0, which is read but not trained).
    add_generation_prompt: end where an answer begins; the messages must then end in a user's turn.
    format: a Format, or None for the tokenizer's own. Raises ValueError for wrong roles, and for a
    tokenizer that lacks the format's special tokens.
    """
    format = format or of(tokenizer)
    ids, labels = [], []
    for piece, own, trained in _pieces(format, messages, add_generation_prompt):
        new = _encode_own(tokenizer, piece, format) if own else tokenizer.encode(piece)
        ids += new
        labels += new if trained else [-100] * len(new)
    return ids, labels


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
    end = [end_id(tokenizer)] if finished else []
    prompt_ids, _ = render(tokenizer, prompt, add_generation_prompt=True)
    return prompt_ids, [*tokenizer.encode(answer), *end]


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
        texts.append(tokenizer.decode(answer[:-1] if ended else answer, skip_special=True))
    return texts, finished


def end_id(tokenizer, format=None):
    """The id of the token that ends an assistant's turn: what generation stops at."""
    format = format or of(tokenizer)
    return _special(tokenizer, format.end, format)


def end_ids(tokenizer, config):
    """All ids that end an answer: the format's end token first, then config.eos_token_id (one id,
    several, or None).
    """
    named = config.eos_token_id
    if not isinstance(named, list):
        named = [] if named is None else [named]
    return list(dict.fromkeys([end_id(tokenizer), *named]))


def _encode_own(tokenizer, piece, format):
    """A piece of the format itself: <|...|> in it are special tokens, the rest is text."""
    ids = []
    for part in re.split(r"(<\|\w+\|>)", piece):
        special = part.startswith("<|")
        ids += [_special(tokenizer, part, format)] if special else tokenizer.encode(part)
    return ids


def _special(tokenizer, token, format):
    if token not in tokenizer.special:
        raise ValueError(
            f"the chat format {format.name} needs the special token {token}; the tokenizer has"
            f" {', '.join(tokenizer.special)}"
        )
    return tokenizer.special[token]

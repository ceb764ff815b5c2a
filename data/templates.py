"""Messages → token ids and labels, by one table of chat formats.

    <|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n
    <|im_start|>assistant\nLima.<|im_end|>\n
                            ^^^^^^^^^^^^^^^ what is trained: the answer and its end token

Training ids, labels and generation prompts come from one function, and each piece is encoded apart:
so a prompt's ids are always the first ids of the whole conversation, wherever BPE would have merged
over the border. A format's own tokens are ids; what people wrote is text, even if it reads
"<|im_end|>". The jinja text of a format travels with the model, in its tokenizer_config.json.

A checkpoint's template that is not in the table is rendered by the optional package jinja2: the
class Rendered, whose pieces() finds the answers in the text.
"""

import json
import re
import warnings
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from common.files import optional

ROLES = ("system", "user", "assistant")


class Question(str):
    """A question that ends in its input, as Alpaca's records do: that format shows the two apart,
    all others as they stand."""

    input = ""


def input_of(message):
    return message.get("input") or getattr(message["content"], "input", "")


@dataclass(frozen=True)
class Format:
    """One chat format. A conversation is written as

        begin   system   turn   head answer end after   turn   head answer end after   …   close

    Each string of a tuple is encoded apart. Those with {content} are text; in all others special
    tokens are ids. {bos} and {eos} are the tokenizer's own tokens.

    turn: the user's; head: what a prompt ends with; answer: what is trained, with the end token;
    system: the system message's turn, or the text that it and the first question make together, or
    None: such a message is refused; default: the system message of conversations that have none;
    with_input: another default, and what stands before a question's input (Alpaca); trim: drop
    white space around a message; needs: special tokens that the tokenizer must have. jinja: the
    template as it is saved with a model; known: texts of checkpoints on the hub that render the
    same.
    """

    name: str
    turn: tuple[str, ...]
    head: str
    end: str
    jinja: str
    after: str = ""
    answer: str = "{content}"
    begin: str = ""
    close: str = ""
    system: tuple[str, ...] | str | None = None
    default: str | None = None
    with_input: tuple[str, str] | None = None
    trim: bool = False
    needs: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def pieces(self, messages, prompt, bos, eos):
        """→ [(text, whether special tokens in it are ids, whether it is trained)] in order."""
        tokens = {"bos": bos, "eos": eos}
        out = [(self.begin.format(**tokens), True, False)]
        for m in self._with_system(messages):
            content = m["content"].strip() if self.trim else m["content"]
            if m["role"] == "assistant":
                trained = m.get("weight", 1) != 0
                out += [
                    (self.head.format(**tokens), True, False),
                    (self.answer.format(content=content), False, trained),
                    (self.end.format(**tokens), True, trained),
                    (self.after.format(**tokens), True, False),
                ]
                continue
            for part in self.system if m["role"] == "system" else self.turn:
                text = part.format(role=m["role"], content=content, **tokens)
                out.append((text, "{content}" not in part, False))
        return [*out, ((self.head if prompt else self.close).format(**tokens), True, False)]

    def _with_system(self, messages):
        """The messages, with the default system message, or with theirs in the first question."""
        given = input_of(messages[0])
        if self.with_input:
            messages = [self._with_input(m) for m in messages]
        if messages[0]["role"] != "system":
            if self.default is None:
                return messages
            default = self.with_input[0] if given else self.default
            return [{"role": "system", "content": default}, *messages]
        if self.system is None:
            raise ValueError(
                f"message 1 ({_short(messages[0]['content'])}): the chat format {self.name} has no"
                " system message; put it into the first question, or take it out"
            )
        if isinstance(self.system, tuple):
            return messages
        system, question, *rest = messages
        both = self.system.format(system=system["content"], content=question["content"])
        return [question | {"content": both}, *rest]

    def _with_input(self, message):
        """A question that ends in its input: the two lie apart in the text."""
        given = input_of(message)
        if not given:
            return message
        question = message["content"].removesuffix(given).removesuffix("\n\n")
        return message | {"content": question + self.with_input[1] + given}


CHATML_TURN = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
)
CHATML_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for message in messages %}" + CHATML_TURN + CHATML_PROMPT
# other checkpoints' spellings of CHATML
CHATML_END_INSIDE = CHATML.replace("<|im_end|>' + '\n'", "<|im_end|>\n'")
CHATML_DEFAULT = (
    "{% if not add_generation_prompt is defined %}"
    "{% set add_generation_prompt = false %}{% endif %}"
)
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
)
SMOLLM2 += CHATML_TURN + CHATML_PROMPT
# the templates of HuggingFaceH4/zephyr-7b-beta, meta-llama/Llama-2-7b-chat-hf,
# mistralai/Mixtral-8x7B-Instruct-v0.1, meta-llama/Meta-Llama-3-8B-Instruct, google/gemma-2-2b-it
# and microsoft/Phi-3-mini-4k-instruct
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and"
    " system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
    " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user'"
    " %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Taori et al. 2023 (Stanford Alpaca), whose code has no jinja text; a system message takes the
# place of the first lines, and later turns follow the end token
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
ALPACA_INPUT_SYSTEM = ALPACA_SYSTEM.replace(
    "task. ", "task, paired with an input that provides further context. "
)
ALPACA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.first and message['role'] == 'user' %}{% if message['input'] %}"
    "{{ '" + ALPACA_INPUT_SYSTEM + "' }}{% else %}{{ '" + ALPACA_SYSTEM + "' }}{% endif %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '\n\n### Instruction:\n' }}"
    "{% if message['input'] %}{{ message['content'][:-(message['input'] | length) - 2] +"
    " '\n\n### Input:\n' + message['input'] }}{% else %}"
    "{{ message['content'] }}{% endif %}{% elif message['role'] == 'assistant' %}"
    "{{ '\n\n### Response:\n' + message['content'] + eos_token }}{% else %}{{ message['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}"
)

# fmt: off
IM_TURN = ("<|im_start|>{role}\n", "{content}", "<|im_end|>\n")
IM = dict(turn=IM_TURN, system=IM_TURN, head="<|im_start|>assistant\n", end="<|im_end|>",
          after="\n", needs=("<|im_start|>", "<|im_end|>"))
EOS_TURN = ("<|{role}|>\n", "{content}", "{eos}\n")
HEADER_TURN = ("<|start_header_id|>{role}<|end_header_id|>\n\n", "{content}", "<|eot_id|>")
PHI_TURN = ("<|{role}|>", "\n{content}", "<|end|>\n")
TEMPLATES = {f.name: f for f in (
    Format("chatml", **IM, jinja=CHATML, known=(CHATML_END_INSIDE, CHATML_DEFAULT + CHATML)),
    Format("smollm2", **IM, jinja=SMOLLM2, default=SMOLLM2_SYSTEM),
    Format("zephyr", turn=EOS_TURN, system=EOS_TURN, head="<|assistant|>\n", end="{eos}",
           after="\n", jinja=ZEPHYR),
    Format("llama2", turn=("{bos}", "[INST] {content} [/INST]"), head="", answer=" {content} ",
           end="{eos}", system="<<SYS>>\n{system}\n<</SYS>>\n\n{content}", trim=True,
           jinja=LLAMA2),
    Format("mistral", turn=("[INST] {content} [/INST]",), head="", end="{eos}", begin="{bos}",
           jinja=MISTRAL),
    Format("llama3", turn=HEADER_TURN, system=HEADER_TURN, begin="{bos}", trim=True,
           head="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>",
           needs=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), jinja=LLAMA3),
    Format("gemma", turn=("<start_of_turn>{role}\n", "{content}", "<end_of_turn>\n"),
           head="<start_of_turn>model\n", end="<end_of_turn>", after="\n", begin="{bos}",
           trim=True, needs=("<start_of_turn>", "<end_of_turn>"), jinja=GEMMA),
    Format("phi3", turn=PHI_TURN, system=PHI_TURN, head="<|assistant|>\n", end="<|end|>",
           after="\n", close="{eos}", needs=("<|user|>", "<|assistant|>", "<|end|>"), jinja=PHI3),
    Format("alpaca", turn=("\n\n### Instruction:\n", "{content}"), begin="{bos}",
           head="\n\n### Response:\n", end="{eos}", system=("{content}",), default=ALPACA_SYSTEM,
           with_input=(ALPACA_INPUT_SYSTEM, "\n\n### Input:\n"), jinja=ALPACA),
)}
# fmt: on


def _normal(jinja):
    """The same text for templates that render the same: in a jinja string a newline and its escape
    are one, and jinja drops a newline at the end.
    """
    return jinja.replace("\\n", "\n").removesuffix("\n")


_known = {_normal(jinja): f for f in TEMPLATES.values() for jinja in (f.jinja, *f.known)}


class Rendered:
    """A chat template that is not in the table, rendered by jinja2 as transformers does it.

    An answer begins where the prompt's text ends, and ends with the special token that the template
    writes behind it. Special tokens in what people wrote are hidden from the search: a character
    that occurs nowhere stands for each while the template is rendered.
    """

    name, trim, needs = "the checkpoint's own", False, ()

    def __init__(self, jinja, special, bos, eos):
        self.jinja, self.tokens = jinja, {"bos_token": bos, "eos_token": eos}
        self.template = _compile(jinja)
        longest_first = sorted(special, key=len, reverse=True)
        self.special = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        said = "\U000f0000"
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]
        before, found, behind = self._render(chat).partition(said)
        end = self.special.search(behind)
        if not found or end is None:
            raise ValueError(
                f"{_unlike(jinja)} It writes no special token behind an answer, so no model would"
                f" learn to stop; {USE_FORMAT}"
            )
        self.end = end[0]
        prompt = self._render(chat[:1], prompt=True)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.answer = lead.replace("{", "{{").replace("}", "}}") + "{content}"

    def _render(self, messages, prompt=False):
        read = [{k: v for k, v in m.items() if k not in ("weight", "input")} for m in messages]
        tokens = dict(self.tokens, tools=None, documents=None, add_generation_prompt=prompt)
        try:
            return self.template.render(messages=read, **tokens)
        except Exception as e:  # a template is a program: it may raise anything
            raise ValueError(f"the checkpoint's chat template refuses the messages: {e}") from None

    def pieces(self, messages, prompt, _bos, _eos):
        """As Format.pieces. ValueError where a trained answer is not written as its own prompt
        goes on, or otherwise once the conversation has gone on.
        """
        hidden = _Hidden(messages, self.special)
        chat = hidden.hide(messages)
        whole = self._render(chat, prompt)
        regions, at = [], 0
        for k, m in enumerate(messages):
            if m["role"] != "assistant":
                continue
            trained = m.get("weight", 1) != 0
            head, turn = self._render(chat[:k], prompt=True), self._render(chat[: k + 1])
            stop = turn.find(self.end, len(head)) + len(self.end)
            goes_on = turn.startswith(head) and stop > len(head)
            if goes_on and whole.startswith(turn[:stop]):
                regions += [(whole[at : len(head)], False), (whole[len(head) : stop], trained)]
                at = stop
            elif trained and not prompt:
                why = "does not begin this answer where its prompt ends"
                if goes_on:
                    why = "writes this answer otherwise once the conversation has gone on"
                raise ValueError(
                    f"message {k + 1} ({_short(m['content'])}): the checkpoint's chat template"
                    f' {why}, as those do that drop old reasoning; give it "weight": 0, or'
                    f" {USE_FORMAT}"
                )
        regions.append((whole[at:], False))
        out = []
        for text, trained in regions:
            parts = self.special.split(text)
            out += [(hidden.show(p), i % 2 == 1, trained) for i, p in enumerate(parts)]
        return out


USE_FORMAT = f"sft.py --format trains with one of {', '.join(TEMPLATES)}"


def _unlike(jinja):
    known = ", ".join(TEMPLATES)
    return f"the checkpoint's chat template is none of {known}: it begins {jinja[:60]!r}."


class _Hidden:
    """Special tokens in people's text as single characters that occur nowhere in it, and back."""

    def __init__(self, messages, special):
        self.special, self.sign = special, {}
        text = json.dumps(messages, ensure_ascii=False)
        self.free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text)

    def hide(self, value):
        if isinstance(value, str):
            return self.special.sub(self._sign_of, value)
        if isinstance(value, list):
            return [self.hide(v) for v in value]
        return {k: self.hide(v) for k, v in value.items()} if isinstance(value, dict) else value

    def _sign_of(self, match):
        if match[0] not in self.sign:
            self.sign[match[0]] = next(self.free)
        return self.sign[match[0]]

    def show(self, text):
        for token, sign in self.sign.items():
            text = text.replace(sign, token)
        return text


def _compile(jinja):
    """A jinja text → a template in jinja2's sandbox, with what transformers gives to it."""
    why = _unlike(jinja) + " It is rendered by a package"
    jinja2, ext, sandbox = (optional(m, why) for m in ("jinja2", "jinja2.ext", "jinja2.sandbox"))

    class Generation(ext.Extension):
        """{% generation %} around an answer changes nothing here."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(jinja)
    except jinja2.TemplateError as e:
        raise ValueError(f"{_unlike(jinja)} It is no jinja: {e}; {USE_FORMAT}") from None


_rendered = lru_cache(8)(Rendered)


def of(tokenizer):
    """The format of the tokenizer's own chat template: a Format of the table, else a Rendered one;
    "chatml" if it has none. ValueError if the template cannot be used.
    """
    jinja = tokenizer.chat_template
    if jinja is None:
        return TEMPLATES["chatml"]
    found = _known.get(_normal(jinja))
    if found is not None:
        return found
    return _rendered(jinja, frozenset(tokenizer.special), tokenizer.bos, tokenizer.eos)


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
    own = _known.get(_normal(tokenizer.chat_template)) if has else None
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


def text(messages, add_generation_prompt=False, format=TEMPLATES["chatml"], bos="<s>", eos="</s>"):
    """What Hugging Face's apply_chat_template gives for the format's template, byte for byte.
    bos, eos: the tokenizer's tokens.
    """
    pieces = _pieces(format, messages, add_generation_prompt, bos, eos)
    return "".join(piece for piece, _, _ in pieces)


def _pieces(format, messages, add_generation_prompt, bos, eos):
    check(messages)
    if add_generation_prompt and messages[-1]["role"] != "user":
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

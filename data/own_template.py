"""A checkpoint's own chat template, rendered by the optional package jinja2 in its sandbox."""

import json
import re
from datetime import datetime

from common.files import optional
from data import calls
from data.formats import USE_FORMAT, _short, _unlike


class OwnTemplate:
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
        self.calls = self._written(dict) or self._written(tojson)

    def _written(self, arguments):
        """Which of calls.KINDS the template writes, seen from a conversation that has them all.
        arguments: dict, or tojson for a template that writes their text as it stands."""
        self.arguments = arguments
        form, one = {"type": "function"}, "abcdefghi"  # Mistral's ids have nine letters
        tool = form | {"function": {"name": "tool_1", "description": "", "parameters": {}}}
        call = form | {"function": {"name": "call_1", "arguments": {"key_1": "value_1"}}, "id": one}
        chat = [
            {"role": "user", "content": "Hi", "tools": [tool]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "result_1", "name": "call_1", "tool_call_id": one},
        ]
        try:
            whole = self._render(chat)
        except ValueError:
            return frozenset()
        if "'key_1'" in whole:  # an object where its JSON was expected
            return frozenset()
        signs = zip(calls.KINDS, ("tool_1", "value_1", "result_1"), strict=True)
        return frozenset(kind for kind, sign in signs if sign in whole)

    def _render(self, messages, prompt=False):
        left_out = ("weight", "input", "tools")
        read = [{k: v for k, v in m.items() if k not in left_out} for m in messages]
        for m in read:
            if "tool_calls" in m:
                m["tool_calls"] = [self._call(**call) for call in m["tool_calls"]]
        tools = messages[0].get("tools") if messages else None
        tokens = dict(self.tokens, tools=tools, documents=None, add_generation_prompt=prompt)
        try:
            return self.template.render(messages=read, **tokens)
        except Exception as e:  # a template is a program: it may raise anything
            raise ValueError(f"the checkpoint's chat template refuses the messages: {e}") from None

    def _call(self, function, **others):
        arguments = self.arguments(function["arguments"])
        return others | {"function": function | {"arguments": arguments}}

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
            begin, end, why = self._answer(chat, k, whole)
            trained = m.get("weight", 1) != 0
            if not why:
                regions += [(whole[at:begin], False), (whole[begin:end], trained)]
                at = end
            elif trained and not prompt:
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

    def _answer(self, chat, k, whole):
        """→ where the answer chat[k] begins and ends in the whole text, and why it cannot be
        trained, or "". ValueError where the template leaves its calls out."""
        head, turn = self._render(chat[:k], prompt=True), self._render(chat[: k + 1])
        for call in chat[k].get("tool_calls") or ():
            if call["function"]["name"] not in turn[len(head) :]:
                raise ValueError(
                    f"message {k + 1}: tool_calls: the checkpoint's chat template leaves them out"
                    f" (got {_short(call)})"
                )
        end = turn.find(self.end, len(head)) + len(self.end)
        if not turn.startswith(head) or end <= len(head):
            return 0, 0, "does not begin this answer where its prompt ends"
        if not whole.startswith(turn[:end]):
            return 0, 0, "writes this answer otherwise once the conversation has gone on"
        return len(head), end, ""


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
        return (
            {self.hide(k): self.hide(v) for k, v in value.items()}
            if isinstance(value, dict)
            else value
        )

    def _sign_of(self, match):
        if match[0] not in self.sign:
            self.sign[match[0]] = next(self.free)
        return self.sign[match[0]]

    def show(self, text):
        for token, sign in self.sign.items():
            text = text.replace(sign, token)
        return text


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """transformers' filter: jinja's own would write < as an escape."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


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

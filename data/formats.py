"""The table of chat formats: what each writes around a conversation's turns, and its jinja text.

A line in TEMPLATES adds a format. What is trained of one, and how it becomes ids, stands in
templates.py; a checkpoint's template that is not in the table goes through own_template.py.
"""

from dataclasses import dataclass


def _short(value):
    """A value as an error message shows it."""
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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

    calls = ()  # none of them writes tool calls

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
            default = self.with_input[0] if given and self.with_input else self.default
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


USE_FORMAT = f"sft.py --format trains with one of {', '.join(TEMPLATES)}"


def _unlike(jinja):
    known = ", ".join(TEMPLATES)
    return f"the checkpoint's chat template is none of {known}: it begins {jinja[:60]!r}."

"""Talk to a checkpoint in the terminal:  python -m tools.chat --model out/ppo

The answer appears while it is sampled. Every turn reads the whole talk again; when it outgrows the
model's context, its oldest turns are dropped. Answers go to stdout and everything else to stderr,
so `echo "What is the opposite of hot?" | python -m tools.chat` prints an answer and nothing else.
"""

import difflib
import re
import sys
from dataclasses import dataclass

from common import download, tuning
from common.run import autocast, main, opt, pick_device
from data import templates
from sampling import decode

HELP = """/reset           forget the talk so far
/system TEXT     tell the model who it is (no TEXT: no system message)
/temperature X   0: always the likeliest token, 1: as it was trained
/help            this list
/exit            or Ctrl-D; Ctrl-C stops an answer, at the prompt it exits
A line that starts with a space is never a command."""
COMMANDS = re.findall(r"^/\w+", HELP, re.M)


@dataclass
class Options(tuning.Reading):
    model: str = opt("out/ppo", "checkpoint folder to talk to", hub="all")
    temperature: float = opt(0.7, "0: always the likeliest token", at_least=0)
    top_p: float = opt(
        1.0,
        "sample from the likeliest tokens with this share of the probability; 1: from all",
        needs="temperature",
        above=0,
    )
    max_new_tokens: int = opt(256, "longest answer in tokens", at_least=1)
    system: str = opt("", "system message")
    seed: int = opt(0, "seed of the answers")
    device: str = opt("auto", "cpu, cuda or auto")


def say(text):
    """Prints a line about the talk, to stderr."""
    print(f"\033[90m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def fit(tok, system: str, talk: list, room: int):
    """The talk as prompt ids, at most `room` of them; the oldest turns that do not fit are removed
    from `talk`. ValueError where the last message alone is too long.
    """
    head = [{"role": "system", "content": system}] if system else []
    full = len(talk)
    while len(ids := templates.render(tok, head + talk, add_generation_prompt=True)[0]) > room:
        if len(talk) == 1:
            raise ValueError(
                f"this message has {len(ids)} tokens, the context has room for {room} before the"
                " answer: not sent"
            )
        del talk[:2]
    if len(talk) < full:
        say(
            f"(the talk has outgrown the context: the oldest {full - len(talk)} messages are"
            " forgotten)"
        )
    return ids


def printable(text: str) -> str:
    """Control characters, which could drive the terminal, become U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def stream(tok, tokens, ends) -> tuple[str, str]:
    """Prints ids as text as they arrive, and holds back bytes that do not make a character yet.
    → (text, why it did not end).
    """
    ids, shown = [], 0
    why = "cut off: --max-new-tokens sets how long an answer may be"
    try:
        for new in tokens:
            if new.item() in ends:
                why = ""
                break
            ids += new.tolist()
            whole = templates.answer_text(tok, ids).rstrip("\ufffd")
            print(printable(whole[shown:]), end="", flush=True)
            shown = len(whole)
    except KeyboardInterrupt:
        why = "stopped"
    text = templates.answer_text(tok, ids)
    print(printable(text[shown:]), flush=True)
    return text, why


def command(line: str, o: Options, talk: list) -> bool:
    """Runs a line that starts with /. → False for /exit."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/reset":
        talk.clear()
        say("(forgotten)")
    elif name == "/system":
        o.system = value
        say(f"(system message: {value})" if value else "(no system message)")
    elif name == "/temperature":
        if re.fullmatch(r"\d+\.?\d*|\.\d+", value):
            o.temperature = float(value)
            say(f"(temperature {o.temperature:g})")
        else:
            say(f"/temperature {value}: a number from 0 up was expected; it is {o.temperature:g}")
    elif name == "/help":
        say(HELP)
    elif name != "/exit":
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        say(f"no command {name}{hint}; /help lists them")
    return name != "/exit"


def load(o: Options):
    """→ model, tokenizer. ValueError for a folder that cannot talk, and for options that leave no
    room for a prompt.
    """
    model, tok = tuning.read(o, o.model, pick_device(o.device))
    room = model.context
    if o.top_p > 1:
        raise ValueError(f"--top-p is {o.top_p}, it must be at most 1")
    if o.max_new_tokens >= room:
        raise ValueError(
            f"--max-new-tokens is {o.max_new_tokens}, the model's context of {room} leaves no room"
            " for a prompt"
        )
    return model, tok


def answer(model, tok, o: Options, talk: list, ends, seed: int):
    """Answers the talk's last message and appends the answer. A message that does not fit, or got
    no answer, is removed.
    """
    try:
        ids = fit(tok, o.system, talk, model.context - o.max_new_tokens)
    except ValueError as e:
        talk.pop()
        return say(e)
    tokens = decode(model, [ids], o.max_new_tokens, o.temperature, o.top_p, seed=seed)
    with autocast(model.device):
        text, why = stream(tok, tokens, ends)
    if why:
        say(f"({why})")
    if text:
        talk.append({"role": "assistant", "content": text})
    else:
        talk.pop()


def converse(o: Options):
    model, tok = load(o)
    ends, talk, turn = {*templates.end_ids(tok, model.config), tok.eos_id}, [], 0
    size = sum(p.numel() for p in model.parameters())
    say(f"{download.name(o.model)}: {size:,} parameters, {templates.of(tok).name}; /help, /exit")
    if tok.chat_template is None:
        say(
            "(no chat template: a base model, which continues text and never learnt to answer;"
            " using chatml)"
        )
    prompt = "> " if sys.stdin.isatty() else ""
    if prompt:
        import readline  # noqa: F401  arrow keys and history in input()
    while True:
        line = input(prompt)
        if line.startswith("/"):
            if not command(line, o, talk):
                return
        elif line.strip():
            talk.append({"role": "user", "content": line.strip()})
            answer(model, tok, o, talk, ends, o.seed * 100_003 + turn)
            turn += 1


def chat(o: Options):
    for pipe in (sys.stdin, sys.stdout):
        pipe.reconfigure(errors="replace")
    try:
        converse(o)
    except (EOFError, KeyboardInterrupt):
        say("" if sys.stdin.isatty() else "(end of input)")
    say("bye")


if __name__ == "__main__":
    main(chat, Options, __doc__)

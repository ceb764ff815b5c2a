"""A language model behind an HTTP address, asked with the standard library; and the replies of any
judge kept, so that nothing is asked twice.

Two APIs, OpenAI's chat completions (vLLM, llama.cpp and most others speak it) and Anthropic's
messages. The environment says where and who:

    OPENAI_BASE_URL     http://localhost:8000/v1    ANTHROPIC_BASE_URL     without /v1
    OPENAI_MODEL        the model's name there      ANTHROPIC_MODEL
    OPENAI_API_KEY      empty where none is asked   ANTHROPIC_API_KEY

A question is asked again where that may help: no connection, a reply that is late, cut off or of
another form, HTTP 408, 409, 429 and 5xx. The waits are 1, 2, 4, … seconds times a random number, so
that many clients do not come back at once; a server that says Retry-After is waited for. Any other
status (a wrong key, an unknown model) ends at once.
"""

import hashlib
import json
import math
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from random import uniform

from tqdm import tqdm

TRIES = 6
LONGEST = 600  # seconds that Retry-After may ask for
PATIENCE = 10  # unreadable replies after which a judge that has said nothing readable is given up


@dataclass
class Endpoint:
    api: str  # "openai" or "anthropic"
    url: str
    model: str
    headers: dict  # holds the key: never printed, never written
    body: dict  # what the request says beside model and messages
    timeout: float  # seconds


def endpoint(api: str, body: dict, timeout: float) -> Endpoint:
    """The endpoint that the environment names. ValueError for what is missing or malformed there;
    it never shows the key.
    """
    name = api.upper()
    base, model, key = (
        os.environ.get(f"{name}_{part}", "").strip() for part in ("BASE_URL", "MODEL", "API_KEY")
    )
    for part, value in (("BASE_URL", base), ("MODEL", model)):
        if not value:
            raise ValueError(f"{name}_{part} is not set: {api} needs {name}_BASE_URL and _MODEL")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"{name}_BASE_URL is {base!r}, an address with http(s):// was expected")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{name}_API_KEY: printable ASCII was expected")
    headers = {"Content-Type": "application/json"}
    if api == "openai":
        path = "/chat/completions"
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
    else:
        path = "/v1/messages"
        headers |= {"x-api-key": key, "anthropic-version": "2023-06-01"}
    return Endpoint(api, base.rstrip("/") + path, model, headers, body, timeout)


def ask(e: Endpoint, question: str) -> str:
    """The reply's text. ConnectionError where none of TRIES tries brought one, or no further try
    would help.
    """
    message = {"role": "user", "content": question}
    data = json.dumps({"model": e.model, "messages": [message]} | e.body).encode()
    for attempt in range(TRIES):
        wait = min(60, 2**attempt) * uniform(0.5, 1.5)
        try:
            request = urllib.request.Request(e.url, data, e.headers)
            with urllib.request.urlopen(request, timeout=e.timeout) as reply:
                return text_of(e.api, json.loads(reply.read()))
        except urllib.error.HTTPError as error:
            why = f"HTTP {error.code} {error.reason}: {error.read(200).decode(errors='replace')}"
            if error.code not in (408, 409, 429) and error.code < 500:
                raise ConnectionError(f"{e.url}: {why}") from None
            wait = max(wait, retry_after(error.headers.get("Retry-After")))
        except (OSError, HTTPException) as error:  # refused, late, cut off
            why = f"{type(error).__name__}: {error}"
        except (ValueError, LookupError, TypeError):
            why = f"200, but not a reply of {e.api}'s form"
        if wait > LONGEST:
            raise ConnectionError(f"{e.url}: {why}; it asks to come back in {wait:,.0f} s")
        if attempt + 1 < TRIES:
            time.sleep(wait)
    raise ConnectionError(f"{e.url}: {why}; asked {TRIES} times")


def text_of(api: str, reply: dict) -> str:
    """The text of a reply; LookupError or TypeError for one of another form."""
    if api == "openai":
        return reply["choices"][0]["message"]["content"] or ""
    return "".join(part["text"] for part in reply["content"] if part["type"] == "text")


def retry_after(header: str | None) -> float:
    """The seconds to wait that Retry-After says, as a number or as a date; 0 where it says none."""
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def estimate(questions: list[str], o) -> str:
    """What asking them will cost, in words: four characters count as a token, as in English text,
    and each reply as long as --body lets it be.
    """
    limits = [v for k, v in o.body.items() if k.startswith("max_") and isinstance(v, int)]
    longest = max(limits, default=0)
    read, written = sum(map(len, questions)) // 4, len(questions) * longest
    price = (read * o.price_in + written * o.price_out) / 1e6
    words = f"{len(questions):,} questions, about {read:,} tokens in and at most {written:,} out"
    return f"{words}: about ${price:,.2f} at --price-in {o.price_in:g}, --price-out {o.price_out:g}"


def at_once(e: Endpoint, questions: list[str]):
    """Asks all of them at the same time, and yields (question, its reply or its error) as they
    come."""
    with ThreadPoolExecutor(len(questions)) as pool:
        asked = {pool.submit(ask, e, q): q for q in questions}
        for done in as_completed(asked):
            yield asked[done], done.exception() or done.result()


# ---------------------------------------------------------------- replies are kept
def key(question: str, identity) -> str:
    """By what a reply is known: the question, and who was asked how."""
    return hashlib.sha256(json.dumps([identity, question]).encode()).hexdigest()


def read_asked(path) -> dict[str, float]:
    """{key: value} of the replies kept. Half a line at the end, of a run that was cut off, goes."""
    path.touch()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    found = {}
    for n, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            found[record["key"]] = float(record["value"])
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path}:{n}: damaged; without this line it is asked anew") from None
    return found


def not_asked(questions, identity, path) -> list[str]:
    """Those without a reply in the file, each once."""
    known = read_asked(path)
    return [q for q in dict.fromkeys(questions) if key(q, identity) not in known]


def ask_all(questions, load, identity, path, batch) -> dict[str, float]:
    """{question: value}, without those whose reply cannot be read. load() → judge; judge(questions)
    yields (question, value, reply), the value an error where asking failed, None where the reply
    cannot be read.

    ConnectionError where one failed, ValueError where no reply can be read; what came is kept.
    """
    known, todo = read_asked(path), not_asked(questions, identity, path)
    total = len(set(questions))
    failed, unreadable = None, []
    judge = load() if todo else None
    bar = tqdm(total=total, initial=total - len(todo), unit="reply", dynamic_ncols=True)
    with bar, open(path, "a", encoding="utf-8") as file:
        for at in range(0, len(todo), batch):
            for q, value, reply in judge(todo[at : at + batch]):
                if isinstance(value, Exception):
                    failed = value
                elif value is None:
                    unreadable.append(reply)
                else:
                    known[key(q, identity)] = value
                    line = dict(key=key(q, identity), value=value, reply=reply)
                    print(json.dumps(line), file=file, flush=True)
                    bar.update()
            bar.set_postfix(unreadable=len(unreadable))
            if failed or len(unreadable) >= PATIENCE and bar.n == 0:
                break
    values = {q: known[k] for q in questions if (k := key(q, identity)) in known}
    kept = f"{len(values):,} of {total:,} replies are in {path}, the same command goes on"
    if failed:
        raise ConnectionError(f"{failed}; {kept}")
    if not values:
        raise ValueError(f"no reply names a verdict, the last is {unreadable[-1][:80]!r}; {kept}")
    return values

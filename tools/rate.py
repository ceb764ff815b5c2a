"""People compare two models' answers, blind, in the browser: python -m tools.rate --a FILE --b FILE

What it measures: how often people prefer a's answer to b's on the same prompts. Nobody sees which
model wrote what: order and sides are shuffled by seed and rater, and the page shows how wide the
win rate's interval is, not where it lies; the terminal shows that. What it misses: whether an
answer is true, unless raters check; what other people, or other prompts, would say. People lean to
the first answer or the longer one, and differ: let several rate the same pairs. Equal answers are
left out.

OUT/ratings.jsonl is the log, one object a rating, on the disk before the page goes on; of a rater
and a pair the last line holds. OUT/rankings.jsonl, for reward.py and dpo.py, has each rated pair
once; OUT/ratings.json the figures (n, win rate of a, interval, agreement of every two raters;
`first` is how often the first answer won). Ctrl-C writes both; the same command goes on.

The page is served to this machine alone, at an address with a token, from another one by
ssh -L 8765:127.0.0.1:8765 HOST. A browser opens it on any site's behalf, though: a site that has
its own name point here (DNS rebinding) is known by its Host, and none knows the token.
"""

import base64
import errno
import hashlib
import hmac
import json
import re
import secrets
import signal
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tqdm import tqdm

from common.run import main, opt
from tools.ratings import Ratings, read_pairs

PAGE = Path(__file__).with_suffix(".html").read_bytes()
MOST = 100_000  # bytes of a request


@dataclass
class Options:
    a: str = opt("", "one model's answers, as tools.evals writes them (OUT/answers/STAGE.jsonl)")
    b: str = opt("", "the other model's; matched by prompt")
    pairs: str = opt("", "instead of both: preference pairs or rankings; a is the chosen answer")
    out: str = opt("out/ratings", "folder for the ratings")
    overlap: int = opt(
        -1, "pairs that all rate, each other pair goes to one; -1: all rate all", at_least=-1
    )
    seed: int = opt(0, "seed of order and sides", at_least=0)
    port: int = opt(8765, "port on 127.0.0.1; 0: any free one", at_least=0, below=65536)


def inline(tag: str) -> str:
    """What the policy allows: the page's own script or style, by its hash, and no other."""
    text = re.search(f"<{tag}>(.*)</{tag}>".encode(), PAGE, re.S)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src {inline('script')}; "
    f"style-src {inline('style')}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Server(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; `token` is the secret in its address."""

    def __init__(self, port: int):
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            raise ValueError(f"--port {port}: in use; choose another, or 0: any free one") from None
        self.token = secrets.token_urlsafe(16)
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/#{self.token}"
        self.ratings = self.bar = None

    def handle_error(self, request, client_address):
        """A browser that closed its end is no error."""


class Handler(BaseHTTPRequestHandler):
    timeout = 30  # a connection that says nothing

    def log_message(self, *_):
        """The terminal belongs to the figures."""

    def send(self, status, body, kind="application/json"):
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, error):
        self.send(status, json.dumps({"error": error}).encode())

    def do_GET(self):  # noqa: N802  http.server's names
        """The page, which holds no secret: the token stays in the address, behind its #."""
        if self.headers["Host"] not in self.server.hosts:
            self.refuse(403, "another Host was expected")
        elif self.path != "/":
            self.refuse(404, "there is one page, /")
        else:
            self.send(200, PAGE, "text/html; charset=utf-8")

    def do_POST(self):  # noqa: N802
        """A request of the page, a JSON object → Ratings.reply as JSON."""
        token, size = self.headers.get("X-Token", ""), self.headers.get("Content-Length", "")
        if self.headers["Host"] not in self.server.hosts:
            return self.refuse(403, "another Host was expected")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            return self.refuse(403, "This page is of an earlier start: open the address of now.")
        if self.path != "/api" or not size.isdigit() or int(size) > MOST:
            return self.refuse(400, f"/api and at most {MOST} bytes were expected")
        try:
            asked, ratings = json.loads(self.rfile.read(int(size))), self.server.ratings
            with ratings.lock:
                reply = ratings.reply(**asked)
                show(self.server.bar, ratings)
            self.send(200, json.dumps(reply).encode())
        except (ValueError, TypeError, AttributeError, RecursionError) as e:
            self.refuse(400, str(e))
        except OSError as e:
            self.refuse(500, f"Not saved: {e}. Your choice does not count yet: choose again.")


def show(bar, ratings):
    """The win rate so far, on the terminal."""
    bar.n, share, interval = ratings.win_rate()
    if interval:
        bar.set_postfix_str(f"a {share:.1%}, 95 %: {interval[0]:.1%} to {interval[1]:.1%}")


def summary(ratings) -> str:
    """What came out, in a few lines."""
    figures, out = ratings.figures(), ratings.out
    lines = ["no pair is rated yet"]
    if figures["n"]:
        low, high = figures["interval"]
        won = f"a won {figures['win_rate']:.1%} of {figures['n']:,} pairs"
        lines = [f"{won} (95 %: {low:.1%} to {high:.1%}); 500 ratings are the usual least"]
    for pair in figures["agreement"]:
        k = "none" if pair["kappa"] is None else f"{pair['kappa']:.2f}"
        both = f"{' and '.join(pair['raters'])}: {pair['equal']:.1%} equal"
        lines.append(f"{both} of {pair['n']:,} pairs, Cohen's κ {k}")
    return "\n".join([*lines, f"{out}/: ratings.jsonl, rankings.jsonl, ratings.json"])


def rate(o: Options):
    pairs = read_pairs(o.a, o.b, o.pairs)
    with Server(o.port) as server:
        server.ratings = ratings = Ratings(pairs, o.out, o.seed, o.overlap)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            print(f"{len(pairs):,} pairs; Ctrl-C ends it; open\n  {server.address}", flush=True)
            with tqdm(total=len(pairs), desc="rated", unit=" pairs") as server.bar:
                show(server.bar, ratings)
                server.serve_forever()
        except KeyboardInterrupt:
            ratings.lock.acquire()  # kept: nothing is saved after this
    ratings.write()
    print(summary(ratings))


if __name__ == "__main__":
    main(rate, Options, __doc__)

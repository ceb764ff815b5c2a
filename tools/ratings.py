"""People's ratings of pairs of answers: the pairs, the log, whose turn it is, the figures.

tools/rate.py shows them in the browser and says what they measure and miss. Nothing here knows of
the network.
"""

import fcntl
import hashlib
import json
import math
import os
import random
import shlex
import sys
import threading
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import median

from data import records
from metrics import mean
from tools.verdicts import kappa

WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}  # a's points; a skipped pair has none
TWICE = "Rated already, in another tab or a moment ago: that rating counts. Undo takes it back."


# ---------------------------------------------------------------- what is compared
def read_pairs(a="", b="", pairs="") -> dict:
    """Two answers files, or one of preference pairs or rankings → the pairs that differ:
    {a hash of the texts: {"prompt", "responses": [a's, b's], "finished": where known}}.
    """
    if bool(a) != bool(b) or bool(a) == bool(pairs):
        raise ValueError("--a FILE and --b FILE, or --pairs FILE alone, were expected")
    rows, dropped, found = [], Counter(), {}
    for r in records.pairs(pairs) if pairs else []:
        rows.append((r["prompt"], [r["chosen"], r["rejected"]], r.get("finished")))
    if a:
        ours, theirs = records.answers(a), records.answers(b)
        both = [(ours[k], theirs[k]) for k in ours if k in theirs]
        for pair in both:
            texts, ends = ([x.get(field) for x in pair] for field in ("answer", "finished"))
            rows.append((pair[0]["prompt"], texts, ends))
        dropped["in one file only"] = len(ours) + len(theirs) - 2 * len(both)
    for prompt, responses, finished in rows:
        key = hashlib.sha256(json.dumps([prompt, responses]).encode()).hexdigest()[:16]
        pair = {"prompt": prompt, "responses": responses}
        if finished and all(type(end) is bool for end in finished):
            pair["finished"] = finished
        if responses[0] != responses[1]:
            found[key] = pair
    dropped["equal or repeated"] = len(rows) - len(found)
    records.report(pairs or f"{a}, {b}", len(found), dropped, "pairs")
    return found


# ---------------------------------------------------------------- figures
def wilson(share, n, z=1.96):
    """The 95 % interval of a share of n: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), Wilson
    1927. It holds for few or one-sided ratings too; with ties, each ½, it is wider than need be.
    """
    middle, whole = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / whole, (middle + half) / whole


# ---------------------------------------------------------------- the ratings
class Ratings:
    """The pairs, and the log of what people said of them: all else is read off these two."""

    def __init__(self, pairs: dict, out, seed=0, overlap=-1):
        self.pairs, self.out, self.seed = pairs, Path(out), seed
        self.overlap = len(pairs) if overlap < 0 else min(overlap, len(pairs))
        self.lock = threading.Lock()
        self.said = {}  # {(rater, pair): the line that holds}, the latest last
        self.shown = {}  # {rater: the pair on their page}
        self.orders = {}  # {rater: all pairs}
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "ratings.jsonl"
        for other in (self.out / "rankings.jsonl", self.out / "ratings.json"):
            if other.exists() and not path.exists():
                raise ValueError(f"{other} was not written here: choose another --out")
        self.log = open(path, "ab+", buffering=0)
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.out}: another rate.py is at work here") from None
        self.log.seek(0)
        *lines, torn = self.log.read().split(b"\n")
        for n, line in enumerate(lines, 1):
            try:
                self.take(json.loads(line))
            except (ValueError, TypeError, LookupError, RecursionError):
                raise ValueError(f"{path}:{n}: a rating was expected (got {line[:60]})") from None
        if strange := len({pair for _, pair in self.said} - self.pairs.keys()):
            advice = "choose another --out, or the same files in the same order"
            raise ValueError(f"{path}: {strange} pairs rated in it are not in the input: {advice}")
        if torn:  # of a crash: the page was never told that it is saved
            print(f"{path}: half a line at its end is removed: {torn[:60]}", file=sys.stderr)
            self.log.truncate(sum(len(line) + 1 for line in lines))

    def take(self, line):
        """A line of the log holds from now on; "undo" takes back the one before."""
        rater, pair, winner = line["rater"], line["pair"], line["winner"]
        if winner not in (*WORTH, "skip", "undo") or line["first"] not in ("a", "b"):
            raise ValueError("no rating")
        line["seconds"], line["comment"] = float(line["seconds"]), str(line["comment"])
        self.said.pop((rater, pair), None)
        if winner != "undo":
            self.said[rater, pair] = line

    def keep(self, rater, pair, winner, comment="", seconds=0.0):
        """Appends a line to the log, onto the disk. OSError, and no half of it, where it cannot."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "rater": rater}
        line |= {"pair": pair, "winner": winner, "first": self.sides(rater, pair)[0]}
        line |= {"comment": comment, "seconds": round(seconds, 1)}
        text = (json.dumps(line) + "\n").encode()  # ASCII: no character in it can end a line
        end = self.log.seek(0, os.SEEK_END)
        try:
            if self.log.write(text) != len(text):
                raise OSError("the disk is full")
            os.fsync(self.log.fileno())
        except OSError:
            self.log.truncate(end)
            raise
        self.take(line)

    def sides(self, rater, pair) -> str:
        """Whose answer is the first, whose the second: "ab" or "ba"."""
        return random.Random(f"{self.seed} {rater} {pair}").choice(["ab", "ba"])

    def order(self, rater) -> list:
        """All pairs as a rater gets them: first those that all share, then the others."""
        if rater not in self.orders:
            pairs = random.Random(self.seed).sample(list(self.pairs), len(self.pairs))
            n, draw = self.overlap, random.Random(f"{self.seed} {rater}")
            self.orders[rater] = draw.sample(pairs[:n], n) + draw.sample(pairs[n:], len(pairs) - n)
        return self.orders[rater]

    def left(self, rater) -> list:
        """What a rater has yet to rate: the shared pairs, then those that nobody has rated or has
        on the page; at the end those on others' pages too, which may be closed.
        """
        shared, others = self.order(rater)[: self.overlap], self.order(rater)[self.overlap :]
        taken = {p for (_, p), line in self.said.items() if line["winner"] in WORTH}
        free = [p for p in others if p not in taken]
        left = [p for p in shared + free if (rater, p) not in self.said]
        pages = {p for who, p in self.shown.items() if who != rater} - set(shared)
        return [p for p in left if p not in pages] or left

    def state(self, rater, **more) -> dict:
        """What the page shows, on it the pair it had until that is rated."""
        left, pair = self.left(rater), self.shown.get(rater)
        if pair is None or (rater, pair) in self.said:
            pair = self.shown[rater] = left[0] if left else None
        own = [line["seconds"] for (who, _), line in self.said.items() if who == rater]
        n, _, interval = self.win_rate()
        state = {"rater": rater, "pair": pair, "done": len(own), "total": len(own) + len(left)}
        state["minutes"] = median(own[-20:]) / 60 * len(left) if own else None
        state |= {"together": n, "margin": (interval[1] - interval[0]) / 2 if n else None}
        if pair:
            texts = dict(zip("ab", self.pairs[pair]["responses"], strict=True))
            state["answers"] = [texts[side] for side in self.sides(rater, pair)]
            state["prompt"] = self.pairs[pair]["prompt"]
        return state | {"said": "", "comment": ""} | more

    def reply(self, do="", rater="", pair="", choice="", comment="", seconds=0.0) -> dict:
        """A request of the page → what it shows next. ValueError for an impossible one."""
        if not all(isinstance(text, str) for text in (do, rater, pair, choice, comment)):
            raise ValueError("strings were expected")
        rater, known = " ".join(rater.split()), {who.casefold(): who for who, _ in self.said}
        if not 0 < len(rater) <= 60 or not rater.isprintable():
            raise ValueError("a name of 1 to 60 letters was expected")
        rater = known.get(rater.casefold(), rater)
        seconds = seconds if isinstance(seconds, (int, float)) and 0 <= seconds < 1e6 else 0.0
        if do == "rate":
            if pair not in self.pairs or choice not in ("1", "2", "tie", "skip"):
                raise ValueError("a pair and a choice were expected")
            winner = self.sides(rater, pair)[int(choice) - 1] if choice in "12" else choice
            if old := self.said.get((rater, pair)):
                same = (old["winner"], old["comment"]) == (winner, comment)
                return self.state(rater, said="" if same else TWICE)  # same: sent again, unheard
            self.keep(rater, pair, winner, comment, seconds)
        if do == "undo":
            for pair in [p for who, p in self.said if who == rater][-1:]:
                comment = self.said[rater, pair]["comment"]
                self.keep(rater, pair, "undo")
                self.shown[rater] = pair
                return self.state(rater, said="Taken back.", comment=comment)
        return self.state(rater)

    def verdicts(self) -> dict:
        """{rater: {pair: winner}}, without what was skipped."""
        found = {}
        for (rater, pair), line in self.said.items():
            if line["winner"] in WORTH:
                found.setdefault(rater, {})[pair] = line["winner"]
        return found

    def points(self) -> dict:
        """{pair: a's points, the mean of its raters}."""
        found = {}
        for verdicts in self.verdicts().values():
            for pair, winner in verdicts.items():
                found.setdefault(pair, []).append(WORTH[winner])
        return {pair: mean(each) for pair, each in found.items()}

    def win_rate(self):
        """(rated pairs, a's share of the points, its interval; none of either before the first)."""
        points = self.points().values()
        share = mean(points) if points else None
        return len(points), share, wilson(share, len(points)) if points else None

    def figures(self) -> dict:
        """ratings.json: n, win rate and interval are of pairs, the counts of ratings."""
        n, share, interval = self.win_rate()
        lines, verdicts, agreement = self.said.values(), self.verdicts(), []
        first = [s["winner"] == s["first"] for s in lines if s["winner"] in ("a", "b")]
        for x, y in combinations(sorted(verdicts), 2):
            both = sorted(verdicts[x].keys() & verdicts[y].keys())
            if both:
                said = [[verdicts[who][p] for p in both] for who in (x, y)]
                equal = mean([one == other for one, other in zip(*said, strict=True)])
                agreement.append({"raters": [x, y], "n": len(both), "equal": equal})
                agreement[-1]["kappa"] = kappa(*said)
        return {
            "n": n,
            "win_rate": share,
            "interval": interval,
            "ratings": Counter(line["winner"] for line in lines),
            "first": mean(first) if first else None,
            "raters": Counter(rater for rater, _ in self.said),
            "agreement": agreement,
            "seed": self.seed,
            "command": shlex.join(["python", "-m", "tools.rate", *sys.argv[1:]]),
        }

    def write(self):
        """rankings.jsonl, of each pair the mean of its ratings, and ratings.json."""
        rows = []
        for pair, won in self.points().items():
            ranks = {"ranks": [int(won < 0.5), int(won > 0.5)], "id": pair}
            rows.append(json.dumps(self.pairs[pair] | ranks, ensure_ascii=False) + "\n")
        figures = json.dumps(self.figures(), indent=1) + "\n"
        for name, text in (("rankings.jsonl", "".join(rows)), ("ratings.json", figures)):
            aside = self.out / f"{name}.part"
            aside.write_text(text, encoding="utf-8", newline="\n")
            aside.replace(self.out / name)

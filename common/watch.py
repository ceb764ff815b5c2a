"""A benchmark scored while a stage trains: what the model forgets as its loss falls.

    for step in Watch(o, run, model, tok).steps(o.steps):        in place of run.steps(o.steps)

Before every --watch-every-th step, the first among them, and after the last, the network is scored
as `python -m tools.evals --task FILE` would score it:

    choices    acc, the share of items whose likeliest choice is right
    text       the likelihood per token, 1/perplexity = exp(-loss): 5 % of it are 0.051 nats

    fall = (start - now) / start

From 5 % on it is warned of, from 10 % on it is an alarm, each only where the 95 % interval of
start - now (paired bootstrap over the items) leaves 0 out. metrics.jsonl has evals' figures, the
fall, and half its interval in the line of the step that they stand before. With --watch-stop an
alarm ends the run, with the weights of the last scoring whose fall was below 10 %; run.json says
which ("watch").

Training goes on as if nobody had looked: no random number is drawn, and dropout is as it was.
"""

import functools
import math
import sys
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

import metrics
from common.run import WATCHED, autocast, make_room, opt
from data import benchmarks
from metrics import mean, paired_bootstrap, perplexity, ratio
from model import logprobs

WARNING, ALARM = 0.05, 0.10  # of the start
TOGETHER = 128  # items, as many as evals reads together: the same figures to the last digit


@dataclass
class Watching:
    """The options of a stage that can watch."""

    watch: str = opt("", "benchmark to score while training: choices, or {text}")
    watch_every: int = opt(50, "steps between scorings", needs="watch", at_least=1)
    watch_stop: bool = opt(False, "end at an alarm, with the last weights above it", needs="watch")


# ---------------------------------------------------------------- scores, which evals shows too
def choices(model, tok, items, encode=metrics.choice_ids):
    """Items (benchmarks.choices_item) → for each what metrics.multiple_choice found, and whether it
    is right, as acc and acc_norm; None for an item beyond the model's context."""

    def length(item):
        asked = [item["query"]] if isinstance(item["query"], str) else item["query"]
        return max(sum(map(len, encode(tok, q, c))) for q in asked for c in item["choices"])

    lines = [None] * len(items)
    fit = [i for i, item in enumerate(items) if length(item) <= model.context]
    found = metrics.multiple_choice(model, tok, [items[i] for i in fit], encode)
    for i, line in zip(fit, found, strict=True):
        lines[i] = line = items[i] | line
        line["predicted"] = line["choices"][line["choice"]]
        line["acc"] = float(line["choice"] == line["gold"])
        line["acc_norm"] = float(line["choice_norm"] == line["gold"])
    return lines


@torch.no_grad()
def text(model, tok, items):
    """Items {"text"} → for each {"nll": Σ -log p, "tokens", "bytes"}. Each window of a text begins
    anew, so the first tokens of each are guessed with little. As many windows are read together as
    a full one has tokens."""
    begin, width = [tok.eos_id if tok.bos_id is None else tok.bos_id], model.context - 1
    ids = [tok.encode(item["text"]) for item in items]
    windows = [(n, x[at : at + width]) for n, x in enumerate(ids) for at in range(0, len(x), width)]
    sums, some = [0.0] * len(items), []
    for window, after in zip(windows, [*windows[1:], None], strict=True):
        some.append(window)
        if after is None or sum(len(part) for _, part in (*some, after)) > width:
            found = -logprobs(model, [begin] * len(some), [part for _, part in some]).double()
            for (n, _), nll in zip(some, found.sum(1).tolist(), strict=True):
                sums[n] += nll
            some = []
    metrics.finite(sums, "log-probabilities")
    rows = zip(items, ids, sums, strict=True)
    return [dict(nll=s, tokens=len(i), bytes=len(x["text"].encode())) for x, i, s in rows]


# ---------------------------------------------------------------- while a stage trains
class Watch:
    """One run's watch. o: options, Watching's among them; run: a common.run.Run; model: the network
    that is trained. ValueError for a file that is neither choices nor text, or has one item."""

    def __init__(self, o, run, model, tok):
        self.o, self.run, self.model, self.tok = o, run, model, tok
        if not o.watch:
            return
        self.kind, self.items = benchmarks.items(o.watch)
        if self.kind not in ("choices", "text"):
            raise ValueError(f"{o.watch}: {self.kind}: choices or text was expected to be watched")
        if len(self.items) < 2:
            raise ValueError(f"{o.watch}: two or more items were expected (got {len(self.items)})")
        self.encode = functools.cache(metrics.choice_ids)  # each item is encoded once

    def steps(self, total: int, unit="step"):
        """run.steps(), with a scoring before every --watch-every-th step and one after the last; it
        ends early at an alarm with --watch-stop."""
        if not self.o.watch:
            yield from self.run.steps(total, unit)
            return
        self.begin()
        for step in self.run.steps(total, unit):
            if step % self.o.watch_every == 0 and self.look(step):
                break
            yield step
        else:
            step = total
            self.look(total)
        self.run.log(step, ())  # the last scoring has a line of its own

    def score(self):
        """→ evals' figures, the watched one first, and each item's part of it."""
        was = self.model.training
        self.model.eval()
        lines = []
        with autocast(self.model.device):
            for at in range(0, len(self.items), TOGETHER):
                some = self.model, self.tok, self.items[at : at + TOGETHER]
                lines += text(*some) if self.kind == "text" else choices(*some, self.encode)
        self.model.train(was)
        lines = [x for x in lines if x]
        if len(lines) < 2:
            raise ValueError(f"{self.o.watch}: fewer than two items fit into the model's context")
        if self.kind == "text":
            parts = [(x["nll"], x["tokens"]) for x in lines]
            return {"perplexity_per_token": perplexity(parts)}, parts
        figures = {name: mean([x[name] for x in lines]) for name in ("acc", "acc_norm")}
        return figures, [x["acc"] for x in lines]

    def value(self, parts):
        """What may fall: the likelihood per token, or the share that is right."""
        return math.exp(-ratio(parts)) if self.kind == "text" else mean(parts)

    def begin(self):
        """The start's scores: made before anything is cleared away, or those of the run that goes
        on."""
        path = self.run.state / WATCHED
        if self.run.start:
            if not path.is_file():
                raise ValueError(f"{path}: missing; remove {self.run.state} to start anew")
            self.start = load_file(path)["start"].tolist()
            return
        self.first, self.start = self.score()
        if not (start := self.value(self.start)):
            raise ValueError(f"{self.o.watch}: nothing is right at the start: nothing can fall")
        said = ", ".join(f"{name} {x:.4g}" for name, x in self.first.items())
        if self.kind == "choices":
            chance = mean([1 / len(item["choices"]) for item in self.items])
            few, fewer = (math.ceil(1.96**2 * (1 / x / start - 1)) for x in (WARNING, ALARM))
            said += f" (by chance {chance:.3g}); a fall by 5 % can show with {few} items, by 10 %"
            said += f" with {fewer}, if none gets better"
        print(f"{self.o.watch}: {len(self.start):,} items watched, {said}", file=sys.stderr)

    def look(self, step: int) -> bool:
        """Scores the network after `step` steps → whether the run ends here."""
        make_room(self.run.tracked.get("optimizer"), watched=len(self.items))  # of a resumed run
        figures, parts = self.score() if step else (self.first, self.start)
        start = self.value(self.start)
        fall, half = paired_bootstrap(self.start, parts, self.value)
        fall, half = fall / start, half / start
        shown = {**figures, "fall": fall, "fall_ci": half}
        self.run.beside = {f"watch_{name}": x for name, x in shown.items()}
        self.say(step, figures, fall, half)
        if step == 0 or (self.o.watch_stop and fall < ALARM):
            self.keep(step)
        if not (self.o.watch_stop and fall >= ALARM and fall > half):
            return False
        self.go_back(step)
        return True

    def say(self, step, figures, fall, half):
        """On the bar always, on a line of its own where much was lost."""
        name, now = next(iter(figures.items()))
        bar = self.run.bar
        bar.set_description(f"{self.run.out} {name} {now:.3g} ({-100 * fall:+.1f} %)", False)
        if fall < WARNING:
            return
        word = "ALARM" if fall >= ALARM else "warning"
        what = "likelihood fallen" if self.kind == "text" else "fallen"
        lost = f"{what} by {100 * fall:.1f} % ± {100 * half:.1f}"
        if fall <= half:
            word, n = "perhaps", len(self.start)
            lost += f"; it takes about {math.ceil(n * (half / fall) ** 2):,} items to tell, not {n}"
        bar.write(f"{word}: step {step}: {self.o.watch}: {name} {now:.4g}, {lost}")

    def keep(self, step: int):
        """Writes the start's scores, with --watch-stop the weights too, beside the state."""
        kept = {"start": torch.tensor(self.start, dtype=torch.float64), "step": torch.tensor(step)}
        if self.o.watch_stop:
            kept |= {k: p.data.contiguous() for k, p in self.trained()}
        self.run.put(WATCHED, kept)

    def go_back(self, step: int):
        """Restores the weights that were kept last."""
        kept = load_file(self.run.state / WATCHED)
        with torch.no_grad():
            for name, p in self.trained():
                p.copy_(kept[name])
        at = int(kept["step"])
        self.run.remarks["watch"] = {"alarm_at_step": step, "weights_of_step": at}
        self.run.bar.write(f"stopped at step {step}, with the weights of step {at}")

    def trained(self):
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

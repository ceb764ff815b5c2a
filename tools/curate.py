"""Curation: a good thousand out of a noisy hundred thousand, by five rules in this order.

    python -m tools.curate FILE --keep 1000 --out OUT --against EVALUATION

LIMA (Zhou et al. 2023) fine-tuned on 1,000 chosen conversations and matched models trained on far
more. FILE holds conversations; OUT gets the kept ones, OUT.run a report with an example of all that
went, and a picture. --rules names the rules to apply, so that one can ask what each is worth.

format         Drops an answer that is empty, cut off, a refusal, in a script that neither its
               prompt nor its task calls for, or that repeats its prompt. Misses: a cut between two
               sentences or after a few words; a refusal in words of its own.
contamination  Drops what shares 13 words in a row with a record of EVALUATION, as GPT-3's authors
               did (Brown et al. 2020, appendix C), or asks the same prompt. Word sequences in more
               than ten of those records are boilerplate. Misses: paraphrases, translations.
duplicates     Of records that say the same, in whatever case, punctuation and order of sentences,
               the best stays by quality, or the first. Near ones share 70 % of their word 3-grams
               (Jaccard); MinHash (Broder 1997) finds them, see filters.py. Two short records may
               differ by one word and mean different things ("capital of Peru", "of Kenya"): under
               40 words the prompts must be equal, and the answers differ by a word at most.
               Misses: paraphrases, a word changed in a short prompt.
quality        Prefers the best: by the mean log-likelihood of an answer's tokens under --model
               given its prompt, a reward model's score, or a function of yours. Likelihood likes
               common, short and repeated phrases and knows no truth; a reward model is as biased
               as its labellers.
diversity      Greedy k-centre (Gonzalez 1985; Sener & Savarese 2018): takes again and again the
               record farthest from all that are taken, by the cosine of mean hidden states under
               --model; kinds, where records name one, get equal shares. Noise lies farthest of all:
               so it chooses among the best 4 × keep by quality, where that rule is on.
"""

import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from tqdm import tqdm

from common import tuning
from common.files import write_json, write_jsonl
from common.run import Run, file_of, is_function, load_function, main, opt, pick_device
from data import records, templates
from model import logprobs, score
from packing import lay_out
from tools import filters
from tools.answers import with_interval

RULES = ("format", "contamination", "duplicates", "quality", "diversity")
KINDS = ("kind", "category", "task", "type", "topic")  # fields that may name a record's kind


@dataclass
class Options(tuning.Reading):
    data: str = opt("", "FILE of conversations; may stand first, without --data")
    keep: int = opt(1000, "how many records to keep", at_least=1)
    out: str = opt("out/curated.jsonl", "file for the records that are kept")
    against: str = opt("", "evaluation that must not leak: a benchmark's file, or prompts")
    rules: str = opt(",".join(RULES), "rules to apply, separated by commas")
    quality: str = opt(
        "", "reward model's folder, or FILE.py:function; else --model's likelihood", hub="all"
    )
    model: str = opt(
        "data/base", "language model that measures likelihood and diversity", hub="all"
    )
    seed: int = opt(0, "seed of MinHash, and of what chance decides", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    overwrite: bool = opt(False, "start anew over a finished run")


# ---------------------------------------------------------------- quality
TOKENS = 2048  # of a batch


def ids_of(tok, messages):
    """→ the prompt's ids, the answer's: in the checkpoint's chat format if it has one, else lines
    of text."""
    *prompt, answer = messages
    if tok.chat_template is not None:
        return templates.answer_ids(tok, prompt, answer["content"])
    return tok.encode("".join(m["content"] + "\n" for m in prompt)), tok.encode(answer["content"])


@torch.no_grad()
def over(ids, function, what):
    """function(prompts, answers) → (B,) or (B,D), in batches of like length → (N,) or (N,D)."""
    lengths = [len(p) + len(a) for p, a in ids]
    batches = [[]]
    for i in sorted(range(len(ids)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > TOKENS:
            batches.append([])
        batches[-1].append(i)
    parts = []
    for batch in tqdm(batches, what, unit="batch", dynamic_ncols=True):
        parts.append(function(*zip(*(ids[i] for i in batch), strict=True)).float().cpu())
    place = torch.tensor([i for batch in batches for i in batch])
    return torch.cat(parts)[place.argsort()].numpy()


def own_scores(judge, found):
    """Scores by the reader's function, a thousand records at a time."""
    scores = []
    for at in tqdm(range(0, len(found), 1000), "quality", unit="thousand", dynamic_ncols=True):
        part = found[at : at + 1000]
        turns = [r["messages"] for r in part]
        scores += judge([t[:-1] for t in turns], [t[-1]["content"] for t in turns], part)
    return np.array(scores)


def likelihood(model, prompts, answers):
    """log p(answer | prompt) for each token, the mean (B,)."""
    sums = logprobs(model, prompts, answers).sum(1)
    return sums / torch.tensor([len(a) for a in answers]).to(sums.device)


def scores_of(o, found, model, tok):
    """The higher the better (N,); -inf for what is beyond the model's context, or has no answer."""
    if is_function(o.quality):
        return own_scores(load_function(o.quality), found)
    if o.quality:
        model, tok = tuning.read(o, o.quality, pick_device(o.device), reward=True)
    rate = partial(score if o.quality else likelihood, model)
    ids = [ids_of(tok, r["messages"]) for r in found]
    fits = [i for i, (p, a) in enumerate(ids) if p and a and len(p) + len(a) <= model.context]
    scores = np.full(len(found), -np.inf)
    if fits:
        scores[fits] = over([ids[i] for i in fits], rate, "quality")
    return scores


# ---------------------------------------------------------------- diversity
POOL = 4  # times keep: among so many of the best by quality


def mean_states(model, prompts, answers):
    """Mean hidden states (B,D) of prompts with their answers, as far as the context goes."""
    texts = [(p + a)[: model.context] for p, a in zip(prompts, answers, strict=True)]
    rows, _ = lay_out([[t] for t in texts], max(map(len, texts)))
    h, segments = model.packed(rows).float(), rows.segments.to(model.device)
    real = segments >= 0  # a text is a segment, by its number
    sums = h.new_zeros(len(texts), h.shape[-1]).index_add_(0, segments[real], h[real])
    return sums / torch.tensor([len(t) for t in texts]).to(h.device)[:, None]


def embed(found, model, tok):
    """Mean hidden states (N,D), less their own mean, of length 1."""
    ids = [ids_of(tok, r["messages"]) for r in found]
    x = over(ids, partial(mean_states, model), "hidden states")
    x -= x.mean(0)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def k_centre(x, k):
    """Greedy: x (N,D) of length 1 → k places, from the first on each the farthest from all before:
    its distance to the nearest centre is the largest. At most twice the best radius (Gonzalez)."""
    centres, closest = [0], x @ x[0]  # cosines to the nearest centre: |a - b|² = 2 - 2 cos
    closest[0] = np.inf
    while len(centres) < k:
        centres.append(i := int(closest.argmin()))
        np.maximum(closest, x @ x[i], out=closest)
        closest[i] = np.inf  # never again, whatever the rounding
    return centres


def kind_of(record) -> str:
    """The kind that a record names, or that the embedded world's item does."""
    fields = {**(record["item"] if isinstance(record.get("item"), dict) else {}), **record}
    return next((fields[k] for k in KINDS if isinstance(fields.get(k), str)), "")


def shares(sizes, keep):
    """How many of each kind: equal shares, and of what small kinds leave over again."""
    given = [0] * len(sizes)
    while left := keep - sum(given):
        open_ = [i for i, n in enumerate(sizes) if given[i] < n]
        for i in open_[:left]:
            given[i] += min(max(1, left // len(open_)), sizes[i] - given[i])
    return given


def choose(o, found, order, model, tok):
    """Places of the --keep records; order: places of all, the best first."""
    if "diversity" not in o.rules:
        return order[: o.keep], None
    kinds = defaultdict(list)
    for i in order:
        kinds[kind_of(found[i])].append(i)
    quota = shares([len(m) for m in kinds.values()], o.keep)
    most = POOL if "quality" in o.rules else len(found)
    pools = [m[: most * n] for m, n in zip(kinds.values(), quota, strict=True)]
    pool = [i for p in pools for i in p]
    others = order[:: -(-len(order) // 1000)]  # some of all, for the picture
    x = embed([found[i] for i in pool + others], model, tok)
    chosen, at = [], 0
    for members, n in zip(pools, quota, strict=True):
        if n:
            chosen += [members[i] for i in k_centre(x[at : at + len(members)], n)]
        at += len(members)
    return chosen, (x, np.isin(pool + others, chosen))


# ---------------------------------------------------------------- the report
def size(record) -> int:
    return sum(len(m["content"].split()) for m in record["messages"])


def picture(report, kept, points, path):
    """Lengths of all and of the kept; and the kept among all, in two dimensions."""
    from matplotlib.figure import Figure

    lengths, states = Figure((10, 4), layout="constrained").subplots(1, 2)
    sizes = [[max(1, size(r)) for r in found] for found in (report.all, kept)]
    bins = np.geomspace(1, 1 + max(map(max, sizes)), 40)
    for name, found in zip(("all", "kept"), sizes, strict=True):
        lengths.hist(found, bins, density=True, alpha=0.6, label=f"{name} {len(found):,}")
    lengths.set(xscale="log", xlabel="words of a record", ylabel="density", title="Lengths")
    lengths.legend()
    states.axis("off")
    if points:
        x, chosen = points
        flat = x @ np.linalg.svd(x.T @ x)[0][:, :2]  # the two main directions (PCA)
        states.scatter(*flat.T, s=3, color="lightgrey", label="some of those left")
        states.scatter(*flat[chosen].T, s=5, label=f"chosen {len(kept):,}")
        states.set_title("Mean hidden states, two main directions")
        states.legend()
    lengths.figure.savefig(path, format="png", dpi=120, metadata={"Software": None})


def inputs(o, reads_model: bool) -> list:
    """The files that decide what is kept; ValueError for options that say nothing."""
    if wrong := set(o.rules.split(",")) - set(RULES):
        raise ValueError(f"--rules: {wrong.pop()!r}: some of {','.join(RULES)} were expected")
    if not o.data:
        raise ValueError("FILE was expected: python -m tools.curate FILE --keep N --out OUT")
    if not find_spec("matplotlib"):
        raise ValueError("the report's picture is drawn by matplotlib: pip install matplotlib")
    scorer = file_of(o.quality) if "quality" in o.rules else ""
    return [x for x in (o.data, o.against, scorer, o.model * reads_model) if x]


def curate(o):
    reads_model = "diversity" in o.rules or "quality" in o.rules and not o.quality
    run = Run(o, __file__, inputs(o, reads_model), file=True)
    report = filters.Report(records.conversations(o.data, empty=True))
    report.check(o, "records")
    model, tok = tuning.read(o, o.model, pick_device(o.device)) if reads_model else (None, None)
    if "format" in o.rules:
        report.drop(filters.faults(report.left))
    if o.against and "contamination" in o.rules:
        report.drop(filters.leaks(report.left, o.against))
    report.check(o, "left")
    rated = "quality" in o.rules
    scores = scores_of(o, report.left, model, tok) if rated else np.zeros(len(report.left))
    if "duplicates" in o.rules:
        order = np.argsort(-scores, kind="stable").tolist()
        gone = filters.duplicates(report.left, order, o.seed)
        scores = np.delete(scores, list(gone))
        report.drop(gone)
        report.check(o, "left")
    mixed = np.random.default_rng(o.seed).permutation(len(scores))  # chance decides between equals
    order = mixed[np.argsort(-scores[mixed], kind="stable")].tolist()
    chosen, points = choose(o, report.left, order, model, tok)
    kept = [report.left[i] for i in sorted(chosen)]
    command = shlex.join(["python", "-m", "tools.curate", *sys.argv[1:]])
    figures = {"command": command, "seed": o.seed, "n": len(report.all), "gone": report.gone}
    figures |= {"left": len(report.left), "kept": len(kept)}
    figures |= with_interval("words", [size(r) for r in kept])
    for name, values in (("score_left", scores), ("score", scores[chosen])):
        if rated and np.isfinite(values).all():
            figures |= with_interval(name, values.tolist())

    def write(path):
        write_jsonl(path, kept)
        write_json(path.with_name("report.json"), figures)
        picture(report, kept, points, path.with_name("report.png"))

    run.finish(write)
    for reason, entry in report.gone.items():
        print(f"{entry['n']:9,} went: {reason}")
    print(f"{len(kept):9,} of {len(report.left):,} left were chosen: {o.out}, and {run.home}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    main(curate, Options, __doc__)

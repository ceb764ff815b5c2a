"""How good a checkpoint is: gold score, win rates, KL to the reference; without a gold rater,
held-out loss and preference accuracy.

    python -m tools.evals --out OUT        evaluates what it finds there: OUT/{sft,reward,ppo,dpo,simpo} and the base

Every answer is kept: OUT/answers/STAGE.jsonl (temperature 1) and STAGE.greedy.jsonl, one {prompt,
answer, finished, gold, right, reasons} a line. OUT/results.json has the figures; where a figure is
a mean over prompts, FIGURE_ci is half the width of its 95 % interval. Two checkpoints are compared
on the same prompts: the paired difference is what is noisy, not each score. One model at a time is
in memory: of each stage its answers and their log-probabilities are kept, and the SFT model, from
which KL is measured, is read once more after all stages.
"""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common import tuning
from common.run import main, opt, pick_device
from data import records, templates
from data.world import world
from metrics import bootstrap, finite, hits, kl, mean, pair_accuracy, points, ratio, win_rate
from model import generate, join, last_score, logprobs, pad, prompt_room

STAGES = ("base", "sft", "ppo", "dpo", "simpo")


@dataclass
class Options(tuning.Reading):
    out: str = opt("out", "folder with the stages' checkpoints")
    base: str = opt("data/base", "the base model's folder")
    data: str = opt(
        "",
        "your own conversations: held-out loss instead of gold; default: OUT/world/heldout.jsonl",
    )
    prefs: str = opt(
        "", "with --data: your preference pairs, for held-out preference accuracy", needs="data"
    )
    n: int = opt(1000, "how many held-out prompts", at_least=2)
    max_new_tokens: int = opt(64, "tokens of an answer", at_least=1)
    batch: int = opt(128, "answers at a time", at_least=1)
    seed: int = opt(0, "seed of the answers", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")


# ---------------------------------------------------------------- answers and their gold score
def answer(model, tok, prompts, o, temperature: float, seed: int):
    """Message lists → [(text, ids, finished)] in their order; prompts of like length are answered
    together.
    """
    ends = templates.end_ids(tok, model.config)
    ids = [templates.render(tok, p, add_generation_prompt=True)[0] for p in prompts]
    out = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), o.batch):
        some = order[at : at + o.batch]
        answers = generate(
            model,
            [ids[i] for i in some],
            o.max_new_tokens,
            temperature,
            eos_id=ends,
            seed=seed * 100_003 + at,
        )
        for i, a in zip(some, answers, strict=True):
            out[i] = a
    texts, finished = templates.read_answers(tok, out, ends)
    return list(zip(texts, out, finished, strict=True))


def rate(held, answers):
    """Records with `item` and their answers → the lines of an answers file."""
    lines = []
    for r, (text, _, finished) in zip(held, answers, strict=True):
        score, reasons = world.gold(r["item"], text, finished)
        lines.append(
            {
                "prompt": r["messages"],
                "answer": text,
                "finished": finished,
                "gold": score,
                "right": reasons["right"],
                "reasons": reasons,
            }
        )
    return lines


@torch.no_grad()
def token_logps(model, tok, held, answers, device, size=32):
    """log p of each token of the answers, on the CPU: a tensor (rows, T) for each `size` of them, 0
    off the answers.
    """
    out = []
    asked = [templates.render(tok, r["messages"], add_generation_prompt=True)[0] for r in held]
    for i in range(0, len(asked), size):
        rows = join(asked[i : i + size], [ids for _, ids, _ in answers[i : i + size]], device)
        out.append(logprobs(model, *rows).cpu())
    return out


def stage_figures(sampled, greedy, sampled_sft=None, kls=None):
    """The lines of a stage's two answers files → its entry in results.json."""
    gold = [a["gold"] for a in sampled]
    out = {
        "n": len(sampled),
        "gold_sampled": mean(gold), "gold_sampled_ci": bootstrap(gold),
        "gold_greedy": mean([a["gold"] for a in greedy]), "gold_greedy_ci": bootstrap([a["gold"] for a in greedy]),
        "right_sampled": mean([a["right"] for a in sampled]),
        "right_greedy": mean([a["right"] for a in greedy]), "right_greedy_ci": bootstrap([float(a["right"]) for a in greedy]),
        "finished": mean([a["finished"] for a in sampled]),
        "mean_length": mean([len(a["answer"].split()) for a in sampled]),
    }  # fmt: skip
    if sampled_sft:
        theirs = [a["gold"] for a in sampled_sft]
        out["win_vs_sft"], out["win_vs_sft_decided"] = win_rate(gold, theirs)
        out["win_vs_sft_ci"] = bootstrap(points(gold, theirs))
        gains = [a - b for a, b in zip(gold, theirs, strict=True)]
        out["gain_vs_sft"], out["gain_vs_sft_ci"] = mean(gains), bootstrap(gains)
    if kls:
        out |= kl_figures(kls)
    return out


def kl_figures(kls):
    return {"kl_vs_sft": mean(kls), "kl_vs_sft_ci": bootstrap(kls)}


# ---------------------------------------------------------------- the reward model
@torch.no_grad()
def score_texts(model, tok, prompts, answers, sampled=None, size=64):
    """Raw scores of answers (str) to prompts (message lists). sampled: the answers' own ids, where
    they were sampled: a cut one has no end, and its last character may be half a one."""
    ids = with_ids(tok, prompts, answers, sampled)
    out = []
    for i in range(0, len(ids), size):
        out += last_score(
            model, *join(*zip(*ids[i : i + size], strict=True), model.device)
        ).tolist()
    return finite(out, "scores")


def with_ids(tok, prompts, answers, sampled=None):
    """[(prompt ids, answer ids)] of answers (str), or as they were sampled."""
    ids = [templates.answer_ids(tok, p, a) for p, a in zip(prompts, answers, strict=True)]
    return ids if sampled is None else [(p, a) for (p, _), a in zip(ids, sampled, strict=True)]


def fresh_answers(sft, tok, held, o, k=4):
    """What reward_figures() scores: k answers of the SFT model to each held-out prompt, one after
    another.
    """
    return answer(sft, tok, [r["messages"] for r in held for _ in range(k)], o, 1.0, o.seed + 7)


def average(x):
    """The mean of a tensor of numbers; None of none."""
    return x.float().mean().item() if x.numel() else None


def reward_figures(reward, tok, held, answers, o):
    """The reward model on k fresh answers of the SFT model to each held-out prompt, pairs of equal
    gold left out, and labellers on the same pairs; on those pairs where one is right, the other
    wrong and their manner alike (truth); and on demonstrations in the very same words but for the
    answer (minimal pairs). → reward's entry in results.json"""
    k = len(answers) // len(held)
    prompts, ids = [r["messages"] for r in held for _ in range(k)], [a[1] for a in answers]
    rows = [[answers[i * k + j] for j in range(k)] for i in range(len(held))]
    texts = [a[0] for a in answers]
    rank = lambda judge: torch.tensor(  # noqa: E731
        [judge(r["item"], row) for r, row in zip(held, rows, strict=True)]
    )  # noqa: E731
    rated = [
        [world.gold(r["item"], a[0], a[2]) for a in row] for r, row in zip(held, rows, strict=True)
    ]
    gold = torch.tensor([[score for score, _ in row] for row in rated])
    right = torch.tensor([[int(why["right"]) for _, why in row] for row in rated])
    manner = torch.tensor(
        [
            [4 * why["courteous"] + 2 * why["rude"] + why["finished"] for _, why in row]
            for row in rated
        ]
    )
    ranks = (gold[:, :, None] < gold[:, None]).sum(2)  # 0 the best
    first, second = (
        rank(
            lambda item, row, who=who: world.Labeller(f"eval {who}").rank(
                item, [a[0] for a in row], [a[2] for a in row]
            )
        )
        for who in "ab"
    )
    scores = torch.tensor(score_texts(reward, tok, prompts, texts, ids)).view(-1, k)
    swapped = torch.tensor(score_texts(reward, tok, prompts[k:] + prompts[:k], texts, ids)).view(
        -1, k
    )
    length = torch.tensor([len(t.split()) for t in texts]).view(-1, k)
    correlation = torch.corrcoef(torch.stack((scores.flatten(), length.flatten().float())))[
        0, 1
    ].item()
    near = (length[:, :, None] - length[:, None]).abs() <= 1
    order = lambda x: (x[:, :, None] - x[:, None]).sign()  # noqa: E731
    decided = (order(ranks) < 0) & (order(first) != 0) & (order(second) != 0)
    truth, minimal = (
        (order(right) > 0) & (order(manner) == 0),
        truth_pairs(reward, tok, held, o.seed),
    )
    by_prompt = list(
        zip(
            ((order(scores) + 1) / 2 * truth).sum((1, 2)).tolist(),
            truth.sum((1, 2)).tolist(),
            strict=True,
        )
    )
    return {
        "pair_accuracy": pair_accuracy(scores, ranks), "labeller_gold_accuracy": pair_accuracy(-first.float(), ranks),
        "labeller_agreement": average((order(first) == order(second))[decided]),
        "truth_accuracy": ratio(by_prompt), "truth_accuracy_ci": bootstrap(by_prompt, ratio), "truth_pairs": int(truth.sum()),
        "minimal_pairs_accuracy": mean(minimal), "minimal_pairs_accuracy_ci": bootstrap(minimal),
        "length_matched_accuracy": average(order(scores)[near & (order(ranks) < 0)] > 0),
        # none where one of the two never differs
        "score_length_correlation": correlation if math.isfinite(correlation) else None,
        "swapped_prompts_accuracy": pair_accuracy(swapped, ranks), "pairs": int((order(ranks) < 0).sum()),
    }  # fmt: skip


def truth_pairs(reward, tok, held, seed, asked=None):
    """A right and a wrong answer to each item in the very same polite words: 1 where the right one
    scores higher, ½ for a tie. asked: the prompts under which they are read, default the items'
    own."""
    asked, items = asked or [r["messages"] for r in held], [r["item"] for r in held]
    wrongs = [
        dict(item, answer=random.Random(f"{seed} {i}").choice(item["wrong"]))
        for i, item in enumerate(items)
    ]
    said = [
        world.demonstrate(item, random.Random(f"{seed} {i}"), "polite")[0]
        for some in (items, wrongs)
        for i, item in enumerate(some)
    ]
    return hits(score_texts(reward, tok, asked * 2, said))


# ---------------------------------------------------------------- records without a gold rater
@torch.no_grad()
def held_out_losses(model, tok, conversations, device, size=8):
    """[(sum of the targets' negative log-likelihoods, their number)] of each conversation."""
    ids = [templates.render(tok, c["messages"]) for c in conversations]
    ids = sorted(((i, lab) for i, lab in ids if len(i) <= model.context), key=lambda x: len(x[0]))
    out = []
    for at in range(0, len(ids), size):
        tokens, mask = pad([i for i, _ in ids[at : at + size]], device=device)
        where, _ = pad(
            [[int(x != -100) for x in lab] for _, lab in ids[at : at + size]], device=device
        )
        nll = -logprobs(model, tokens, mask, where.bool()).sum(1)
        out += zip(finite(nll.tolist(), "losses"), where[:, 1:].sum(1).tolist(), strict=True)
    return out


@torch.no_grad()
def answer_logps(model, tok, prompts, answers, device, sampled=None, size=8):
    """Summed log-probability of each answer (str); sampled: as in score_texts."""
    ids = with_ids(tok, prompts, answers, sampled)
    found = [
        x
        for i in range(0, len(ids), size)
        for x in (
            logprobs(model, *join(*zip(*ids[i : i + size], strict=True), device)).sum(1).tolist()
        )
    ]
    return finite(found, "log-probabilities")


# ---------------------------------------------------------------- the script
def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )


def write_results(path, results):
    """{stage: {figure: value}} as JSON. ValueError, and the old file stays, where a figure is NaN
    or infinite.
    """
    for stage, figures in results.items():
        for name, value in figures.items() if isinstance(figures, dict) else ():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{path}: {stage}'s {name} would be {value}: not written")
    path.write_text(json.dumps(results, indent=1) + "\n")


def found(o):
    """The stages there are → {name: folder}."""
    places = {s: Path(o.base) if s == "base" else Path(o.out) / s for s in STAGES}
    return {s: p for s, p in places.items() if (p / "config.json").exists()}


def read(o, stage, path, device):
    """A stage's model and tokenizer; the base has no adapter, with --keep-base either."""
    plain = replace(o, keep_base=o.keep_base and stage != "base")
    return tuning.read(plain, path, device, reward=stage == "reward")


def reward_place(o):
    """The reward model's folder, or None."""
    path = Path(o.out) / "reward"
    return path if (path / "config.json").exists() else None


def evaluate_world(o, held, device):
    """The embedded world's prompts: gold score of every stage's answers, and what the reward model
    makes of them.
    """
    results, sampled_sft, kept, places = {"perfect": world.PERFECT}, None, {}, found(o)
    for stage, path in places.items():
        lines, greedy, own = stage_answers(o, stage, path, held, device)
        if stage == "sft":
            sampled_sft = lines
        if sampled_sft:
            kept[stage] = own
        results[stage] = stage_figures(lines, greedy, sampled_sft)
        kinds = [r["item"]["kind"] for r in held]
        right = {
            k: [a["right"] for a, kind in zip(greedy, kinds, strict=True) if kind == k]
            for k in sorted(set(kinds))
        }
        results[stage]["right_greedy_by_kind"] = {k: mean(rights) for k, rights in right.items()}
        write_jsonl(Path(o.out) / "answers" / f"{stage}.jsonl", lines)
        write_jsonl(Path(o.out) / "answers" / f"{stage}.greedy.jsonl", greedy)
        show(stage, results[stage])
    if not kept:
        return results
    sft, tok = read(o, "sft", places["sft"], device)
    for stage, (sampled, logps) in kept.items():
        results[stage] |= kl_figures(kl(logps, token_logps(sft, tok, held, sampled, device)))
        show(stage, {k: v for k, v in results[stage].items() if k.startswith("kl")})
    if reward_place(o):
        fresh = fresh_answers(sft, tok, held[:400], o)
        del sft
        reward, own = read(o, "reward", reward_place(o), device)
        if own is None or own.hash != tok.hash:
            raise ValueError(
                f"{reward_place(o)}: its vocabulary is not that of {places['sft']}; train it on the"
                " same model"
            )
        results["reward"] = reward_figures(reward, tok, held[:400], fresh, o)
        show("reward", results["reward"])
    return results


def stage_answers(o, stage, path, held, device):
    """A stage's lines of its two answers files, and its sampled answers with their
    log-probabilities.
    """
    model, tok = read(o, stage, path, device)
    asked = [r["messages"] for r in held]
    sampled = answer(model, tok, asked, o, 1.0, o.seed)
    greedy = answer(model, tok, asked, o, 0.0, o.seed)
    logps = None if stage == "base" else token_logps(model, tok, held, sampled, device)
    return rate(held, sampled), rate(held, greedy), (sampled, logps)


def evaluate_records(o, conversations, device):
    """Anyone's records: held-out loss a token of every stage, held-out preference accuracy of the
    reward model and of DPO's implicit reward log π - log π_sft, and answers to read."""
    results, reference, before = {}, None, None
    if o.prefs and not (Path(o.out) / "sft" / "config.json").exists():
        raise FileNotFoundError(
            f"{o.out}/sft: no checkpoint; --prefs needs it, as the reference of the implicit reward"
        )
    held = records.split(conversations)[1][: o.n]
    pairs = records.split(records.pairs(o.prefs))[1][: o.n] if o.prefs else []
    for stage, path in found(o).items():
        losses, logps, lines = stage_records(o, stage, path, held, pairs, device)
        records.report(o.data, len(losses), {}, "held-out conversations")
        results[stage] = {
            "n": len(losses),
            "loss_per_token": ratio(losses),
            "loss_per_token_ci": bootstrap(losses, ratio),
        }
        before = before or losses
        # the first stage there is, as a rule the base; on the same tokens
        if len(before) == len(losses) and before is not losses:
            change = [(a - b, n) for (a, n), (b, _) in zip(losses, before, strict=True)]
            results[stage] |= {
                "loss_change": ratio(change),
                "loss_change_ci": bootstrap(change, ratio),
            }
        if logps:
            reference = reference or logps
            won = hits([a - b for a, b in zip(logps, reference, strict=True)])
            results[stage] |= {
                "implicit_accuracy": mean(won),
                "implicit_accuracy_ci": bootstrap(won),
                "pairs": len(pairs),
            }
        write_jsonl(Path(o.out) / "answers" / f"{stage}.greedy.jsonl", lines)
        show(stage, results[stage])
    if pairs and reward_place(o):
        model, tok = read(o, "reward", reward_place(o), device)
        won = hits(score_texts(model, tok, *in_pairs(tok, pairs)))
        results["reward"] = {
            "pair_accuracy": mean(won),
            "pair_accuracy_ci": bootstrap(won),
            "pairs": len(pairs),
        }
        show("reward", results["reward"])
    return results


def in_pairs(tok, pairs):
    """Preference pairs → (prompts, answers (str), their ids), the chosen ones and then the rejected
    ones.
    """
    ids = [templates.ranked_ids(tok, p, (p["chosen"], p["rejected"]))[1] for p in pairs]
    texts = [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]
    return [p["prompt"] for p in pairs] * 2, texts, [c for c, _ in ids] + [r for _, r in ids]


def stage_records(o, stage, path, held, pairs, device):
    """A stage's held-out losses, its log-probabilities of the pairs' answers (of the base: none),
    and some answers to read.
    """
    model, tok = read(o, stage, path, device)
    losses, logps = held_out_losses(model, tok, held, device), []
    if pairs and stage != "base":
        asked, given, ids = in_pairs(tok, pairs)
        logps = answer_logps(model, tok, asked, given, device, ids)
    room = prompt_room(model, o.max_new_tokens)
    some = [c["messages"][:-1] for c in held]
    some = [
        p for p in some if len(templates.render(tok, p, add_generation_prompt=True)[0]) <= room
    ][:20]
    said = zip(some, answer(model, tok, some, o, 0.0, o.seed), strict=True)
    return losses, logps, [{"prompt": p, "answer": t, "finished": f} for p, (t, _, f) in said]


def show(stage, figures):
    """A stage's figures in one line, each with its interval where it has one."""
    words = [
        f"{k} {v:.3f}" + (f"±{figures[k + '_ci']:.3f}" if k + "_ci" in figures else "")
        for k, v in figures.items()
        if isinstance(v, float) and not k.endswith("_ci")
    ]
    print(f"{stage:7s} " + "  ".join(words), flush=True)


def evaluate(o: Options):
    device = pick_device(o.device)
    if not found(o):
        raise FileNotFoundError(f"{o.out}: no stage's checkpoint in it ({', '.join(STAGES)})")
    if o.data:
        results = evaluate_records(o, records.conversations(o.data), device)
    else:
        results = evaluate_world(
            o, records.conversations(f"{o.out}/world/heldout.jsonl", "prompt")[: o.n], device
        )
    write_results(Path(o.out) / "results.json", results)


if __name__ == "__main__":
    main(evaluate, Options, __doc__)

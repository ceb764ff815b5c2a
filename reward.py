"""Stage 2b: the reward model. It learns from rankings which of two answers people prefer.

Stiennon et al. 2020; Ouyang et al. 2022, eq. 1:

    P(i preferred to j) = σ(r_i - r_j)         Bradley & Terry 1952; r: the score at the last token
    loss = mean over prompts of the mean over the prompt's pairs of -log σ(r_better - r_worse)

The language model's head is replaced by one row, `score`. All pairs of a prompt's K answers lie in
one batch: K forward passes give K(K-1)/2 comparisons, and a prompt weighs the same however many
answers it has. With the pairs shuffled as separate examples each answer would be seen K-1 times per
epoch, and the model would overfit (InstructGPT, section 3.5).
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import hub, tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from data import records, templates
from metrics import pair_accuracy, pairs_won
from model import scalar_model, score
from packing import pad, sizes

ABSENT = -1


@dataclass
class Options(tuning.Tuning):
    model: str = opt("out/sft", "checkpoint folder to start from", hub="all")
    data: str = opt("out/comparisons.jsonl", "rankings, or preference pairs")
    reference: str = opt(
        "out/world/sft.jsonl", "chats whose answers' scores PPO scales to mean 0, deviation 1"
    )
    out: str = opt("out/reward", "folder for the checkpoint")
    steps: int = opt(250, "optimizer steps", at_least=1)
    batch: int = opt(8, "prompts per step, each with all its answers", at_least=1)
    length: int = opt(256, "longest prompt and answer in tokens; others are left out", at_least=2)
    lr: float = opt(0.0, "peak learning rate; 0: 1e-3, five times that for LoRA", at_least=0)
    warmup: int = opt(10, "steps of warmup, then --schedule", at_least=0, below="steps")
    seed: int = opt(0, "seed of the head and of the data's order", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(50, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def ranking_loss(scores, ranks):
    """Scalar. scores, ranks (B,K): rank 0 is the best, tied ranks form no pair, -1 marks an absent
    answer (its score may be anything).
    """
    present = ranks != ABSENT
    scores = torch.where(present, scores, 0.0)
    # (B,K,K): i is preferred to j
    better = (ranks[:, :, None] < ranks[:, None, :]) & present[:, :, None] & present[:, None, :]
    nll = -F.logsigmoid(scores[:, :, None] - scores[:, None, :])
    pairs = better.sum((1, 2))
    per_prompt = torch.where(better, nll, 0.0).sum((1, 2)) / pairs.clamp(min=1)
    return per_prompt.sum() / (pairs > 0).sum().clamp(min=1)


def encode(rankings, tok, length: int):
    """Rankings → [(prompt ids, [answer ids], [ranks])], how many had answers longer than `length`
    or absent, and how many answers equalled another. A prompt with nothing left to compare is
    dropped.
    """
    kept, long, equal = [], 0, 0
    for r in rankings:
        prompt, answers = templates.ranked_ids(tok, r, r["responses"])
        ended = r.get("finished", [True] * len(answers))
        ranked = list(zip(r["responses"], ended, answers, r["ranks"], strict=True))
        fit = [x for x in ranked if len(prompt) + len(x[2]) <= length and x[3] != ABSENT]
        first, ranks = merge_equal([x[:2] for x in fit], [x[3] for x in fit])
        long += len(fit) < len(ranked)
        equal += len(fit) - len(first)
        if len(set(ranks)) > 1:
            kept.append((prompt, [fit[i][2] for i in first], ranks))
    return kept, long, equal


def merge_equal(answers, ranks):
    """Equal answers become one, at their mean rank: two ranks for one text would be noise.
    → the index of each distinct answer's first copy, and their ranks, whole numbers again."""
    places = {}
    for i, answer in enumerate(answers):
        places.setdefault(answer, []).append(i)
    if len(places) == len(answers):
        return range(len(answers)), ranks
    means = [sum(ranks[i] for i in same) / len(same) for same in places.values()]
    order = sorted(set(means))
    return [same[0] for same in places.values()], [order.index(m) for m in means]


def prepare(path, rankings, tok, length: int, held=0):
    """encode()'s rankings; prints what was left out. ValueError where nothing is left."""
    kept, long, equal = encode(rankings, tok, length)
    if equal:
        merged = "answers equal another to their prompt: they are one, at their mean rank"
        print(f"{path}: {equal:,} {merged}", file=sys.stderr)
    reason = f"with answers longer than {length} tokens or absent"
    records.report(path, len(kept), {reason: long}, "rankings", held)
    return kept


def prepare_references(path, tok, length: int, seed: int, n=128, **allowed):
    """n reference answers (demonstrations) → [(prompt ids, answer ids)]; those longer than `length`
    are dropped and counted.
    """
    read = records.conversations(path, **allowed)
    chats = [r["messages"] for r in read]
    found = [c for c in chats if c[-1].get("weight") != 0 and not c[-1].get("tool_calls")]
    some = records.batch(found, 0, min(n, len(found)), seed)
    ids = [templates.answer_ids(tok, chat[:-1], chat[-1]["content"]) for chat in some]
    kept = [(p, a) for p, a in ids if len(p) + len(a) <= length]
    dropped = {
        f"longer than {length} tokens": len(ids) - len(kept),
        "of weight 0 or with tool calls": len(read) - len(found),
    }
    records.report(path, len(kept), dropped, "reference answers", 0)
    if len({(*p, *a) for p, a in kept}) < 2:
        expected = "two or more reference answers were expected, for their scores' deviation"
        raise ValueError(f"{path}: {expected} (got one)")
    return kept


def one_by_one(batch):
    """[(prompt, answers, ranks)] → each answer's prompt, and the answers."""
    prompts = [prompt for prompt, answers, _ in batch for _ in answers]
    return prompts, [a for _, answers, _ in batch for a in answers]


def scores_of(model, batch):
    """[(prompt, answers, ranks)] → scores (B,K) and ranks (B,K), absent answers where a prompt has
    fewer than K."""
    ranks, present = pad([r for _, _, r in batch], fill=ABSENT)
    with autocast(model.device):
        flat = score(model, *one_by_one(batch))
    place = tuple(i.to(flat.device) for i in present.nonzero(as_tuple=True))
    return flat.new_zeros(ranks.shape).index_put(place, flat), ranks.to(flat.device)


@torch.no_grad()
def reference_scores(model, ids, size=32):
    """Mean and standard deviation of the scores of reference answers [(prompt ids, answer ids)],
    `size` at a time."""
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    with autocast(model.device):  # as PPO reads them
        scores = torch.cat([score(model, *zip(*part, strict=True)) for part in parts])
    return scores.mean().item(), scores.std().item()


@torch.no_grad()
def held_out_accuracy(model, data, size: int) -> float:
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    return sum(pair_accuracy(*scores_of(model, part)) for part in parts) / len(parts)


def reward(o: Options):
    device = pick_device(o.device)
    run = Run(o, __file__, [*tuning.inputs(o), o.data, o.reference])
    sft, tok = tuning.start(o, device)
    model = scalar_model(sft, torch.Generator().manual_seed(o.seed))
    del sft
    hub.token_ids(model.config, tok)  # a missing padding token is an error now, not at the end
    records.say_cut(o.length, model.context)
    length = min(o.length, model.context)
    train, held = records.split(records.rankings(o.data, **tuning.allowed(o, tok)))
    data = prepare(o.data, train, tok, length, len(held))
    held = encode(held, tok, length)[0][:64]
    references = prepare_references(o.reference, tok, length, o.seed, **tuning.allowed(o, tok))
    peak = tuning.learning_rate(o, 1e-3)
    optimizer = adamw(model, peak, paged=o.paged)
    report = tuning.Report(o, device, [model])
    run.resume(model=model, optimizer=optimizer)

    for step in run.steps(o.steps):
        lr = lr_at(step, o.steps, peak, o.warmup, o.schedule)
        set_lr(optimizer, lr)
        batch = records.batch(data, step, o.batch, o.seed)
        size = sizes(*one_by_one(batch))
        make_room(optimizer, **size)
        report.batch(**size)
        scores, ranks = scores_of(model, batch)
        loss = ranking_loss(scores, ranks)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = pairs_won(scores.detach(), ranks)
        run.log(step, ("loss", "accuracy"), loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm)
        run.save(step)

    c = model.config
    size = min(32, 4 * o.batch)  # in parts, as a step has them
    c.reward_mean, c.reward_std = reference_scores(model, references, size)
    tuning.check_spread(o.reference, c.reward_mean, c.reward_std)
    if held:
        run.log(o.steps, held_out_accuracy=held_out_accuracy(model, held, o.batch))
    report.finish()
    run.finish(lambda path: tuning.save(o, path, model, tok))


if __name__ == "__main__":
    main(reward, Options, __doc__)

"""Stage 2b: the reward model. It learns from rankings which of two answers people prefer (Stiennon
et al. 2020; Ouyang et al. 2022, eq. 1).

    P(i preferred to j) = σ(r_i - r_j)                       Bradley & Terry 1952; r is the score at an answer's last token
    loss = mean over prompts of the mean over the prompt's pairs of -log σ(r_better - r_worse)

The language model's head is replaced by one row, `score`. All pairs of a prompt's K answers lie in
one batch: K forward passes give K(K-1)/2 comparisons, and a prompt weighs the same however many
answers it has. Shuffled as separate examples the pairs would show each answer K-1 times an epoch,
and the model overfits (InstructGPT, section 3.5).
"""

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import hub, tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from data import records, templates
from metrics import pair_accuracy
from model import join, last_score, scalar_model

ABSENT = -1


@dataclass
class Options(tuning.Tuning):
    model: str = opt("out/sft", "checkpoint folder to start from")
    data: str = opt("out/comparisons.jsonl", "rankings, or preference pairs")
    reference: str = opt(
        "out/world/sft.jsonl", "conversations whose answers get mean score 0 and deviation 1 in PPO"
    )
    out: str = opt("out/reward", "folder for the checkpoint")
    steps: int = opt(250, "optimizer steps", at_least=1)
    batch: int = opt(8, "prompts a step, each with all its answers", at_least=1)
    length: int = opt(256, "tokens of prompt and answer; longer answers are left out", at_least=2)
    lr: float = opt(0.0, "peak learning rate; 0: 1e-3, five times that for LoRA", at_least=0)
    warmup: int = opt(10, "steps of linear warmup, then a line to 0", at_least=0, below="steps")
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
    """Rankings → [(prompt ids, [answer ids], [ranks])] without answers longer than `length` and
    prompts left with nothing to compare, how many rankings had such answers, and how many answers
    were another's equal."""
    kept, long, equal = [], 0, 0
    for r in rankings:
        prompt, answers = templates.ranked_ids(tok, r, r["responses"])
        ranks = r["ranks"]
        fits = [
            i
            for i, a in enumerate(answers)
            if len(prompt) + len(a) <= length and ranks[i] != ABSENT
        ]
        long += len(fits) < len(answers)
        ended = r.get("finished", [True] * len(answers))
        first, merged = merge_equal(
            [(r["responses"][i], ended[i]) for i in fits], [ranks[i] for i in fits]
        )
        equal += len(fits) - len(first)
        if len(set(merged)) > 1:
            kept.append((prompt, [answers[fits[i]] for i in first], merged))
    return kept, long, equal


def merge_equal(answers, ranks):
    """Equal answers become one, at their mean rank: two ranks of one text would be noise.
    → the place of each one's first, and their ranks, whole numbers again."""
    places = {}
    for i, answer in enumerate(answers):
        places.setdefault(answer, []).append(i)
    if len(places) == len(answers):
        return range(len(answers)), ranks
    means = [sum(ranks[i] for i in same) / len(same) for same in places.values()]
    order = sorted(set(means))
    return [same[0] for same in places.values()], [order.index(m) for m in means]


def prepare(path, rankings, tok, length: int, held=0):
    """encode()'s rankings; what was left out is said, and ValueError raised where nothing is left."""
    kept, long, equal = encode(rankings, tok, length)
    if equal:
        print(
            f"{path}: {equal:,} answers equal another to their prompt: they are one, at their mean"
            " rank",
            file=sys.stderr,
        )
    records.report(
        path,
        len(kept),
        {f"with answers longer than {length} tokens or absent": long},
        "rankings",
        held,
    )
    return kept


def prepare_references(path, tok, length: int, seed: int, n=128):
    """n of the reference answers (the demonstrations') → [(prompt ids, answer ids)], those longer
    than `length` dropped and counted.
    """
    read = records.conversations(path)
    found = [r for r in read if r["messages"][-1].get("weight") != 0]
    some = records.batch(found, 0, min(n, len(found)), seed)
    ids = [
        templates.answer_ids(tok, r["messages"][:-1], r["messages"][-1]["content"]) for r in some
    ]
    kept = [(p, a) for p, a in ids if len(p) + len(a) <= length]
    dropped = {
        f"longer than {length} tokens": len(ids) - len(kept),
        "of weight 0": len(read) - len(found),
    }
    records.report(path, len(kept), dropped, "reference answers", 0)
    if len({(*p, *a) for p, a in kept}) < 2:
        raise ValueError(
            f"{path}: two or more reference answers were expected, for the deviation of their"
            " scores (got one)"
        )
    return kept


def scores_of(model, batch, device):
    """[(prompt, answers, ranks)] → scores (B,K) and ranks (B,K), short prompts filled up with
    absent answers.
    """
    tokens, mask, where = join(
        [p for p, answers, _ in batch for _ in answers],
        [a for _, answers, _ in batch for a in answers],
        device,
    )
    ranks = torch.full((len(batch), max(len(r) for _, _, r in batch)), ABSENT)
    for i, (_, _, r) in enumerate(batch):
        ranks[i, : len(r)] = torch.tensor(r)
    ranks = ranks.to(device)
    with autocast(device):
        flat = last_score(model, tokens, mask, where)
    return torch.zeros(ranks.shape, device=device).masked_scatter(ranks != ABSENT, flat), ranks


@torch.no_grad()
def reference_scores(model, ids, device):
    """Mean and standard deviation of the scores of reference answers [(prompt ids, answer ids)]."""
    scores = [
        last_score(model, *join(*zip(*ids[i : i + 32], strict=True), device))
        for i in range(0, len(ids), 32)
    ]
    scores = torch.cat(scores)
    return scores.mean().item(), scores.std().item()


def reward(o: Options):
    device = pick_device(o.device)
    run = Run(o, __file__, [*tuning.inputs(o), o.data, o.reference])
    sft, tok = tuning.start(o, device)
    model = scalar_model(sft, torch.Generator().manual_seed(o.seed))
    del sft
    hub.token_ids(model.config, tok)  # without a padding token: refused now, not at the save
    records.say_cut(o.length, model.context)
    length = min(o.length, model.context)
    train, held = records.split(records.rankings(o.data))
    data, held = prepare(o.data, train, tok, length, len(held)), encode(held, tok, length)[0][:64]
    references = prepare_references(o.reference, tok, length, o.seed)
    peak = tuning.learning_rate(o, 1e-3)
    optimizer = adamw(model, peak, paged=o.paged)
    watch = tuning.Watch(
        o,
        device,
        [model],
        o.batch / len(data) * sum(len(p) + sum(map(len, answers)) for p, answers, _ in data),
        0,
    )
    run.resume(model=model, optimizer=optimizer)

    for step in run.steps(o.steps):
        lr = lr_at(step, o.steps, peak, o.warmup)
        set_lr(optimizer, lr)
        batch = records.batch(data, step, o.batch, o.seed)
        tokens = sum(len(p) + sum(map(len, answers)) for p, answers, _ in batch)
        make_room([optimizer], tokens=tokens)
        scores, ranks = scores_of(model, batch, device)
        loss = ranking_loss(scores, ranks)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(
            step,
            ("loss", "accuracy"),
            loss=loss,
            accuracy=pair_accuracy(scores, ranks),
            lr=lr,
            grad_norm=norm,
        )
        run.save(step)

    model.config.reward_mean, model.config.reward_std = reference_scores(model, references, device)
    tuning.check_spread(o.reference, model.config.reward_mean, model.config.reward_std)
    if held:
        with torch.no_grad():
            figures = [
                pair_accuracy(*scores_of(model, held[i : i + o.batch], device))
                for i in range(0, len(held), o.batch)
            ]
        run.log(o.steps, held_out_accuracy=sum(figures) / len(figures))
    watch.finish()
    run.finish(lambda path: tuning.save(o, path, model, tok))


if __name__ == "__main__":
    main(reward, Options, __doc__)

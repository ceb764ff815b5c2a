"""The short cut: preferences, no reward model, no RL. DPO (Rafailov et al. 2023), IPO (Azar et al.
2023), SimPO (Meng et al. 2024).

PPO's optimum is known: π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x). Turned round, a policy *is* a
reward model, and Z cancels in a pair:

    r̂(x, y) = β (log π(y|x) - log π_ref(y|x))                         log π(y|x): the sum over the answer's tokens, end token included
    h        = (log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))
    DPO      -log σ(β h)              label smoothing ε (cDPO): -(1-ε) log σ(β h) - ε log σ(-β h)
    IPO      (h - 1/(2β))²
    SimPO    -log σ(β (log π(y_w)/|y_w| - log π(y_l)/|y_l|) - γ)      means instead of sums, a margin γ, no reference

What the log shows. At the first step DPO's loss is ln 2: policy and reference are the same. Then
the margin grows, and often *both* log-probabilities fall, the chosen one's too: the loss sees only
their difference, and what is taken from rejected answers need not go to the chosen one (it can go
to answers in neither). That is no bug as long as held-out answers stay good; --nll W adds W times
the chosen answer's negative log-likelihood per token, which holds it up (iterative RPO, Pang et al.
2024).
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from data import records, templates
from model import join, logprobs


@dataclass
class Options(tuning.Tuning):
    model: str = opt("out/sft", "the policy's start and the reference")
    data: str = opt("out/comparisons.jsonl", "rankings or preference pairs")
    out: str = opt("out/dpo", "folder for the checkpoint")
    loss: str = opt("dpo", "the preference loss", choices=("dpo", "ipo", "simpo"))
    pairs: str = opt(
        "all",
        "of a ranking: all pairs, or the best answer against the worst",
        choices=("all", "best_worst"),
    )
    steps: int = opt(125, "optimizer steps", at_least=1)
    batch: int = opt(16, "prompts a step, each with all its pairs", at_least=1)
    accumulate: int = opt(
        1, "micro-batches a step: less memory, the same gradient", at_least=1, at_most="batch"
    )
    length: int = opt(
        256, "tokens of prompt and answer; pairs with longer ones are dropped", at_least=2
    )
    beta: float = opt(0.1, "β (SimPO: 2 to 10)", above=0)
    gamma: float = opt(1.0, "SimPO's margin γ (not γ/β)", needs="loss simpo", at_least=0)
    label_smoothing: float = opt(
        0.0,
        "cDPO's ε: the share of labels that are taken to be wrong",
        needs="loss dpo",
        at_least=0,
        below=0.5,
    )
    nll: float = opt(
        0.0, "weight of the chosen answer's negative log-likelihood per token", at_least=0
    )
    lr: float = opt(0.0, "peak learning rate; 0: 2e-4, five times that for LoRA", at_least=0)
    warmup: int = opt(10, "steps of linear warmup, then a line to 0", at_least=0, below="steps")
    seed: int = opt(0, "seed of the data's order", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(50, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def preference_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, kind="dpo", label_smoothing=0.0
):
    """Losses, chosen rewards, rejected rewards, all (N,), from sums of log-probabilities (N,). The
    rewards are detached.

    kind "dpo" (label_smoothing > 0: cDPO) or "ipo" (on sums, as in its paper).
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "dpo":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(
            -beta * h
        )
    else:
        raise ValueError(f"kind is {kind!r}; dpo or ipo was expected")
    return (
        losses,
        beta * (policy_chosen - ref_chosen).detach(),
        beta * (policy_rejected - ref_rejected).detach(),
    )


def simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    """Losses (N,) from sums of log-probabilities and answers' lengths in tokens."""
    margin = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margin - gamma)


def prepare(path, which, tok, length: int):
    """Pairs of the training side, those of one prompt together: [(prompt ids, [answer ids],
    [(chosen, rejected) as places among them])]. So an answer that stands in several pairs is read
    once. Answers too long drop their pairs, counted."""
    train, held = records.split(records.pairs(path, which))
    groups, kept, empty = [], 0, 0
    for _, pairs in itertools.groupby(train, key=lambda r: r["prompt"]):
        pairs = list(pairs)
        encoded = [templates.ranked_ids(tok, r, (r["chosen"], r["rejected"])) for r in pairs]
        prompt, both = encoded[0][0], [tuple(map(tuple, answers)) for _, answers in encoded]
        empty += sum(not all(pair) for pair in both)
        answers = [
            a
            for a in dict.fromkeys(a for pair in both for a in pair)
            if a and len(prompt) + len(a) <= length
        ]
        places = [(answers.index(w), answers.index(l)) for w, l in both if {w, l} <= set(answers)]
        if places:
            groups.append((prompt, list(map(list, answers)), places))
        kept += len(places)
    dropped = {
        f"longer than {length} tokens": len(train) - kept - empty,
        "with an empty answer": empty,
    }
    records.report(path, kept, dropped, "pairs", len(held))
    return groups


def answer_logps(model, groups, device):
    """Summed log-probability and length (N,) of all the groups' answers, in one forward pass."""
    prompts = [prompt for prompt, answers, _ in groups for _ in answers]
    tokens, mask, where = join(prompts, [a for _, answers, _ in groups for a in answers], device)
    with autocast(device):
        return logprobs(model, tokens, mask, where).sum(1), where.sum(1)


def places(groups, device):
    """Where the pairs' chosen and rejected answers stand among all the groups' answers: (2, pairs)."""
    out, start = [], 0
    for _, answers, pairs in groups:
        out += [(start + w, start + l) for w, l in pairs]
        start += len(answers)
    return torch.tensor(out, device=device).T


@torch.no_grad()
def reference_logps(model, groups, device, size: int):
    """Of every answer once, before training changes the model, so that no second model is kept: a
    tensor a group.
    """
    out, order = [None] * len(groups), sorted(range(len(groups)), key=lambda i: len(groups[i][0]))
    for at in range(0, len(order), size):
        some = order[at : at + size]
        logps, _ = answer_logps(model, [groups[i] for i in some], device)
        for i, part in zip(some, logps.split([len(groups[i][1]) for i in some]), strict=True):
            out[i] = part
    return out


def dpo(o: Options):
    device = pick_device(o.device)
    run = Run(o, __file__, [*tuning.inputs(o), o.data])
    policy, tok = tuning.start(o, device)
    records.say_cut(o.length, policy.context)
    data = prepare(o.data, o.pairs, tok, min(o.length, policy.context))
    # no reference for what will not be read
    data = records.batch(data, 0, min(len(data), o.steps * o.batch), o.seed)
    reference = (
        reference_logps(policy, data, device, o.batch) if o.loss != "simpo" else [None] * len(data)
    )
    data = list(zip(data, reference, strict=True))
    peak = tuning.learning_rate(o, 2e-4)
    optimizer = adamw(policy, peak, paged=o.paged)
    targets, share = (
        [sum(map(len, answers)) for (_, answers, _), _ in data],
        o.batch / o.accumulate / len(data),
    )
    watch = tuning.Watch(
        o,
        device,
        [policy],
        share * (sum(targets) + sum(len(p) for (p, _, _), _ in data)),
        share * sum(targets),
    )
    run.resume(policy=policy, optimizer=optimizer)

    for step in run.steps(o.steps):
        lr = lr_at(step, o.steps, peak, o.warmup)
        set_lr(optimizer, lr)
        batch = records.batch(data, step, o.batch, o.seed)
        # of the whole step: the loss's denominator
        pairs = sum(len(pairs) for (_, _, pairs), _ in batch)
        figures, size = {}, -(-len(batch) // o.accumulate)
        for at in range(0, len(batch), size):
            groups, reference = zip(*batch[at : at + size], strict=True)
            answers = sum(len(a) for _, some, _ in groups for a in some)
            tokens = answers + sum(len(p) for p, _, _ in groups)
            make_room([optimizer], tokens=tokens, targets=answers)
            logps, lengths = answer_logps(policy, groups, device)
            chosen, rejected = places(groups, device)
            if o.loss == "simpo":
                losses = simpo_loss(
                    logps[chosen],
                    logps[rejected],
                    lengths[chosen],
                    lengths[rejected],
                    o.beta,
                    o.gamma,
                )
                better, worse = (
                    o.beta * (logps / lengths)[side].detach() for side in (chosen, rejected)
                )
            else:
                ref = torch.cat(reference)
                losses, better, worse = preference_loss(
                    logps[chosen],
                    logps[rejected],
                    ref[chosen],
                    ref[rejected],
                    o.beta,
                    o.loss,
                    o.label_smoothing,
                )
            if (
                step == 0
                and o.loss == "dpo"
                and device.type == "cpu"
                and (losses - math.log(2)).abs().max() > 1e-3
            ):
                raise ValueError(
                    f"the first loss is {losses.mean():.4f}, not ln 2: policy and reference differ"
                    " before training"
                )
            nll = -(logps / lengths)[chosen]
            ((losses + o.nll * nll).sum() / pairs).backward()
            now = dict(loss=losses, nll=nll, logp_chosen=logps[chosen], logp_rejected=logps[rejected], reward_chosen=better,
                       reward_rejected=worse, margin=better - worse, accuracy=(better > worse).float())  # fmt: skip
            figures = {k: figures.get(k, 0.0) + v.detach().sum() / pairs for k, v in now.items()}
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, ("loss", "margin", "accuracy"), **figures, lr=lr, grad_norm=norm, pairs=pairs)
        run.save(step)
    watch.finish()
    run.finish(lambda path: tuning.save(o, path, policy, tok))


if __name__ == "__main__":
    main(dpo, Options, __doc__)

"""The shortcut: DPO, IPO, SimPO and KTO learn from preferences without a reward model and without
RL.

Rafailov et al. 2023 (DPO), Azar et al. 2023 (IPO), Meng et al. 2024 (SimPO), Ethayarajh et al. 2024
(KTO). The optimum of PPO's objective is known: π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x). Solved
for r, it says that a policy *is* a reward model, and Z cancels in a pair:

    r̂(x, y) = β (log π(y|x) - log π_ref(y|x))      log π(y|x): Σ over the answer's tokens and end
    h        = (log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))
    DPO      -log σ(β h)                with label smoothing ε: -(1-ε) log σ(β h) - ε log σ(-β h)
    IPO      (h - 1/(2β))²
    SimPO    -log σ(β (log π(y_w)/|y_w| - log π(y_l)/|y_l|) - γ)     means, a margin γ, no reference

KTO needs no pairs: each answer is labelled good or bad. With r = log π(y|x) - log π_ref(y|x) it
learns (equations 7 and 8)

    a good answer    λ_D (1 - σ(β (r - z0)))           z0 = max(0, mean of r(x, y'))
    a bad one        λ_U (1 - σ(β (z0 - r)))           y': another prompt's answer

z0 estimates KL(π || π_ref), the point from which gains and losses count. No gradient flows through
it, and it comes from the whole step. Of pairs both answers are read, of rankings the best and the
worst.

What the log shows. At the first step DPO's loss is ln 2: policy and reference are the same. Then
the margin grows, and often *both* log-probabilities fall, the chosen answer's too: the loss sees
only their difference, and the probability that rejected answers lose can go to answers in neither
set. That is no bug as long as held-out answers stay good; --nll W adds W times the chosen answer's
negative log-likelihood per token, which holds it up (iterative RPO, Pang et al. 2024).
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import tuning
from common.run import Run, adamw, autocast, lr_at, main, make_room, opt, pick_device, set_lr
from common.watch import Watch, Watching
from data import records, templates
from model import logprobs
from packing import distinct, sizes


@dataclass
class Options(Watching, tuning.Tuning):
    model: str = opt("out/sft", "the policy's start and the reference", hub="all")
    data: str = opt(
        "out/comparisons.jsonl", "rankings or preference pairs; KTO: or labelled answers"
    )
    out: str = opt("out/dpo", "folder for the checkpoint")
    loss: str = opt("dpo", "the preference loss", choices=("dpo", "ipo", "simpo", "kto"))
    pairs: str = opt(
        "all", "from rankings: all, or best against worst", choices=("all", "best_worst")
    )
    desirable_weight: float = opt(1.0, "λ_D, of good answers", needs="loss kto", above=0)
    undesirable_weight: float = opt(1.0, "λ_U, of bad ones", needs="loss kto", above=0)
    steps: int = opt(125, "optimizer steps", at_least=1)
    batch: int = opt(16, "prompts per step, each with all its pairs (KTO: answers)", at_least=1)
    accumulate: int = opt(1, "micro-batches per step, for memory", at_least=1, at_most="batch")
    length: int = opt(256, "tokens of prompt and answer; longer pairs are dropped", at_least=2)
    beta: float = opt(0.1, "β (SimPO: 2 to 10)", above=0)
    gamma: float = opt(1.0, "SimPO's margin γ (not γ/β)", needs="loss simpo", at_least=0)
    label_smoothing: float = opt(
        0.0, "cDPO's ε: the share of wrong labels", needs="loss dpo", at_least=0, below=0.5
    )
    nll: float = opt(0.0, "weight of the chosen answers' NLL per token", at_least=0)
    lr: float = opt(0.0, "peak learning rate; 0: 2e-4, five times that for LoRA", at_least=0)
    warmup: int = opt(10, "steps of warmup, then --schedule", at_least=0, below="steps")
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
    better, worse = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    h = better - worse
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "dpo":
        kept, flipped = 1 - label_smoothing, label_smoothing
        losses = -kept * F.logsigmoid(beta * h) - flipped * F.logsigmoid(-beta * h)
    else:
        raise ValueError(f"kind is {kind!r}; dpo or ipo was expected")
    return losses, beta * better.detach(), beta * worse.detach()


def simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    """Losses (N,) from sums of log-probabilities and answers' lengths in tokens."""
    margin = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margin - gamma)


def kto_loss(policy, reference, good, z0, beta, desirable=1.0, undesirable=1.0):
    """Losses and rewards, both (N,), from sums of log-probabilities (N,); good: (N,) bool. The
    rewards are detached."""
    r = policy - reference
    gain = torch.where(good, r - z0, z0 - r)
    weight = torch.where(good, desirable, undesirable)
    return weight * (1 - torch.sigmoid(beta * gain)), beta * r.detach()


def prepare(path, which, tok, length: int, **allowed):
    """The training pairs, one list per prompt: [[(prompt ids, chosen ids, rejected ids), …], …].
    Pairs with an answer that is empty or does not fit are dropped and counted.
    """
    train, held = records.split(records.pairs(path, which, **allowed))
    groups, dropped = [], Counter()
    longer, empty = f"longer than {length} tokens", "with an empty answer"
    for _, same in itertools.groupby(train, key=lambda r: r["prompt"]):
        pairs = []
        for r in same:
            prompt, (chosen, rejected) = templates.ranked_ids(tok, r, (r["chosen"], r["rejected"]))
            if not chosen or not rejected:
                dropped[empty] += 1
            elif len(prompt) + max(len(chosen), len(rejected)) > length:
                dropped[longer] += 1
            else:
                pairs.append((prompt, chosen, rejected))
        groups += [pairs] if pairs else []
    records.report(path, sum(map(len, groups)), dropped, "pairs", len(held))
    return groups


def prepare_kto(path, tok, length: int, **allowed):
    """The training split's answers → [[(prompt ids, answer ids, other ids)], …], lists of one, and
    their labels, [bool]. other: an answer to another prompt, which z0 is estimated from."""
    train, held = records.split(records.labelled(path, **allowed))
    found, dropped = [], Counter()
    for r in train:
        *prompt, last = r["messages"]
        ids, (answer,) = templates.ranked_ids(tok, r | {"prompt": prompt}, [last["content"]])
        if not answer:
            dropped["with an empty answer"] += 1
        elif len(ids) + len(answer) > length:
            dropped[f"longer than {length} tokens"] += 1
        else:
            found.append((ids, answer, r["label"]))
    good = [label for _, _, label in found]
    records.report(path, len(found), dropped, f"answers ({sum(good):,} good)", len(held))
    try:
        return [[one] for one in mismatched(found, length)], good
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def mismatched(found, length: int):
    """[(prompt ids, answer ids, label)] → [(prompt ids, answer ids, other ids)]: the answer to
    another prompt that stands as far on as the most answers to one prompt, so that each answer
    comes once; cut where it would not fit. ValueError where all prompts are one."""
    several = max(len(list(same)) for _, same in itertools.groupby(found, key=lambda x: x[0]))
    out = []
    for i, (prompt, answer, _) in enumerate(found):
        ahead = (found[(i + several + k) % len(found)] for k in range(len(found)))
        other = next((theirs for asked, theirs, _ in ahead if asked != prompt), None)
        if other is None:
            raise ValueError("KTO needs answers to two or more prompts (got one prompt)")
        out.append((prompt, answer, other[: length - len(prompt)]))
    return out


def sums(model, pairs):
    """Of P pairs Σ log π(y_t) over the chosen and over the rejected answers, and their lengths in
    tokens: four (P,). An answer that stands in several pairs is read once."""
    prompts = [prompt for prompt, _, _ in pairs]
    answers = [chosen for _, chosen, _ in pairs] + [rejected for _, _, rejected in pairs]
    logps, lengths = answer_sums(model, prompts * 2, answers)  # (2P,)
    return *logps.chunk(2), *lengths.chunk(2)


def answer_sums(model, prompts, answers):
    """Σ log π(y_t) of N answers, and their lengths in tokens: (N,) each."""
    once_prompts, once_answers, index = distinct(prompts, answers)
    with autocast(model.device):
        logps = logprobs(model, once_prompts, once_answers).sum(1)
    logps = logps[index.to(logps.device)]
    return logps, torch.tensor([len(a) for a in answers]).to(logps.device)


@torch.no_grad()
def reference_sums(model, data, size: int):
    """Each prompt's (chosen, rejected) sums under the model before training: no second model is
    kept in memory."""
    out = []
    for i in range(0, len(data), size):
        part = data[i : i + size]
        chosen, rejected, _, _ = sums(model, [pair for pairs in part for pair in pairs])
        counts = [len(pairs) for pairs in part]
        out += zip(chosen.split(counts), rejected.split(counts), strict=True)
    return out


def check_start(losses, expected=None, name="ln 2"):
    """At the first step policy and reference are the same, so DPO's losses are ln 2, KTO's half
    their weights. Not checked on a GPU, where bf16 rounds more."""
    expected = math.log(2) if expected is None else expected
    if losses.device.type == "cpu" and (losses - expected).abs().max() > 1e-3:
        first = f"the first loss is {losses.mean():.4f}, not {name}"
        raise ValueError(f"{first}: policy and reference differ before training")


def losses_of(policy, pairs, reference, o):
    """The loss of each of P pairs, and what the log says of each: (P,) tensors.

    reference: each prompt's (chosen, rejected) sums, in the pairs' order; none for SimPO.
    """
    chosen, rejected, chosen_length, rejected_length = sums(policy, pairs)
    if o.loss == "simpo":
        losses = simpo_loss(chosen, rejected, chosen_length, rejected_length, o.beta, o.gamma)
        better = o.beta * (chosen / chosen_length).detach()
        worse = o.beta * (rejected / rejected_length).detach()
    else:
        ref_chosen, ref_rejected = map(torch.cat, zip(*reference, strict=True))
        losses, better, worse = preference_loss(
            chosen, rejected, ref_chosen, ref_rejected, o.beta, o.loss, o.label_smoothing
        )
    return losses, dict(
        loss=losses,
        nll=-chosen / chosen_length,
        logp_chosen=chosen,
        logp_rejected=rejected,
        reward_chosen=better,
        reward_rejected=worse,
        margin=better - worse,
        accuracy=(better > worse).float(),
    )


@torch.no_grad()
def reference_point(policy, data, reference, batch, size: int):
    """KTO's z0, a scalar: of a whole step's batch, from the other prompts' answers; `size` at a
    time."""
    ratios = []
    for i in range(0, len(batch), size):
        part = batch[i : i + size]
        prompts, _, others = zip(*(data[at][0] for at in part), strict=True)
        logps, _ = answer_sums(policy, list(prompts), list(others))
        ratios.append(logps - torch.cat([reference[at][1] for at in part]))
    return torch.cat(ratios).mean().clamp(min=0)


def kto_losses_of(policy, examples, reference, good, z0, o):
    """As losses_of(), of N answers; good: (N,) bool. A figure of one kind of answers is 0 on the
    other."""
    logps, lengths = answer_sums(policy, [p for p, _, _ in examples], [a for _, a, _ in examples])
    before = torch.cat([answer for answer, _ in reference])
    weights = o.desirable_weight, o.undesirable_weight
    losses, rewards = kto_loss(logps, before, good, z0, o.beta, *weights)
    return losses, dict(
        loss=losses,
        nll=-logps / lengths * good,
        logp_chosen=logps * good,
        logp_rejected=logps * ~good,
        reward_chosen=rewards * good,
        reward_rejected=rewards * ~good,
        accuracy=((rewards > o.beta * z0) == good).float(),
        good=good.float(),
        z0=z0.expand_as(losses),
    )


def by_kind(figures):
    """KTO's means over all answers → those of good and of bad ones alone, and their margin."""
    for name, share in (("chosen", figures["good"]), ("rejected", 1 - figures["good"])):
        for what in ("logp", "reward"):
            figures[f"{what}_{name}"] = figures[f"{what}_{name}"] / share.clamp(min=1e-9)
    return figures | dict(margin=figures["reward_chosen"] - figures["reward_rejected"])


def sizes_of(pairs, kto: bool) -> dict:
    """What decides the memory that a pass over pairs takes, with KTO over their first answers."""
    prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
    both = (prompts, chosen) if kto else (prompts * 2, chosen + rejected)
    return sizes(*distinct(*both)[:2])


def dpo(o: Options):
    device = pick_device(o.device)
    run = Run(o, __file__, [*tuning.inputs(o), o.data])
    policy, tok = tuning.start(o, device)
    records.say_cut(o.length, policy.context)
    length, kto = min(o.length, policy.context), o.loss == "kto"
    if kto:
        data, labels = prepare_kto(o.data, tok, length, **tuning.allowed(o, tok))
    else:
        data = prepare(o.data, o.pairs, tok, length, **tuning.allowed(o, tok))
    order = range(len(data))
    reference = {}
    if o.loss != "simpo":  # of the prompts that will be read
        first = records.batch(order, 0, min(len(data), o.steps * o.batch), o.seed)
        found = reference_sums(policy, [data[i] for i in first], -(-o.batch // o.accumulate))
        reference = dict(zip(first, found, strict=True))
    peak = tuning.learning_rate(o, 2e-4)
    optimizer = adamw(policy, peak, paged=o.paged)
    report = tuning.Report(o, device, [policy])
    run.resume(policy=policy, optimizer=optimizer)

    for step in Watch(o, run, policy, tok).steps(o.steps):
        lr = lr_at(step, o.steps, peak, o.warmup, o.schedule)
        set_lr(optimizer, lr)
        batch = records.batch(order, step, o.batch, o.seed)  # the same whatever --steps
        count = sum(len(data[i]) for i in batch)  # of the whole step: the loss's denominator
        size, totals = -(-len(batch) // o.accumulate), Counter()
        if kto:
            z0 = reference_point(policy, data, reference, batch, size)
        for i in range(0, len(batch), size):
            part = batch[i : i + size]
            pairs = [pair for at in part for pair in data[at]]
            room = sizes_of(pairs, kto)
            make_room(optimizer, **room)
            report.batch(**room)
            before = [reference.get(at) for at in part]
            if kto:
                good = torch.tensor([labels[at] for at in part]).to(device)
                losses, figures = kto_losses_of(policy, pairs, before, good, z0, o)
            else:
                losses, figures = losses_of(policy, pairs, before, o)
            if step == 0 and kto:
                half = torch.where(good, o.desirable_weight, o.undesirable_weight) / 2
                check_start(losses, half, "half its weight")
            if step == 0 and o.loss == "dpo":
                check_start(losses)
            ((losses + o.nll * figures["nll"]).sum() / count).backward()
            totals.update({name: x.detach().sum() for name, x in figures.items()})
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        figures = {name: total / count for name, total in totals.items()}
        figures = by_kind(figures) if kto else figures
        shown = ("loss", "margin", "accuracy")
        run.log(step, shown, **figures, lr=lr, grad_norm=norm, pairs=count)
        run.save(step)
    report.finish()
    run.finish(lambda path: tuning.save(o, path, policy, tok))


if __name__ == "__main__":
    main(dpo, Options, __doc__)

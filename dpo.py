"""The short cut: preferences, no reward model, no RL. DPO (Rafailov et al. 2023), IPO (Azar et al. 2023), SimPO (Meng et al. 2024).

PPO's optimum is known: π*(y|x) = π_ref(y|x) exp(r(x,y)/β) / Z(x). Turned round, a policy *is* a reward model, and Z cancels in a pair:

    r̂(x, y) = β (log π(y|x) - log π_ref(y|x))                         log π(y|x): the sum over the answer's tokens, end token included
    h        = (log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))
    DPO      -log σ(β h)              label smoothing ε (cDPO): -(1-ε) log σ(β h) - ε log σ(-β h)
    IPO      (h - 1/(2β))²
    SimPO    -log σ(β (log π(y_w)/|y_w| - log π(y_l)/|y_l|) - γ)      means instead of sums, a margin γ, no reference

What the log shows. At the first step DPO's loss is ln 2: policy and reference are the same. Then the margin grows, and often *both*
log-probabilities fall, the chosen one's too: the loss sees only their difference, and what is taken from rejected answers
need not go to the chosen one (it can go to answers in neither). That is no bug as long as held-out answers stay good; --nll W adds
W times the chosen answer's negative log-likelihood per token, which holds it up (iterative RPO, Pang et al. 2024).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

import hub
from data import records, templates
from model import join, logprobs
from train import Run, adamw, autocast, lr_at, main, opt, pick_device, set_lr


@dataclass
class Options:
    model: str = opt("out/sft", "the policy's start and the reference")
    data: str = opt("out/comparisons.jsonl", "rankings or preference pairs")
    out: str = opt("out/dpo", "folder for the checkpoint")
    loss: str = opt("dpo", "the preference loss", choices=("dpo", "ipo", "simpo"))
    pairs: str = opt("all", "of a ranking: all pairs, or the best answer against the worst", choices=("all", "best_worst"))
    steps: int = opt(150, "optimizer steps", at_least=1)
    batch: int = opt(64, "pairs a step", at_least=1)
    accumulate: int = opt(1, "micro-batches a step: less memory, the same gradient", at_least=1)
    length: int = opt(256, "tokens of prompt and answer; longer pairs are dropped", at_least=2)
    beta: float = opt(0.1, "β (SimPO: 2 to 10)", above=0)
    gamma: float = opt(1.0, "SimPO's margin γ (not γ/β)", at_least=0)
    label_smoothing: float = opt(0.0, "cDPO's ε: the share of labels that are taken to be wrong", at_least=0, below=0.5)
    nll: float = opt(0.0, "weight of the chosen answer's negative log-likelihood per token", at_least=0)
    lr: float = opt(2e-4, "peak learning rate", above=0)
    warmup: int = opt(10, "steps of linear warmup, then a line to 0", at_least=0)
    seed: int = opt(0, "seed of the data's order", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(50, "steps between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


def preference_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, kind="dpo", label_smoothing=0.0):
    """Losses, chosen rewards, rejected rewards, all (N,), from sums of log-probabilities (N,). The rewards are detached.

    kind "dpo" (label_smoothing > 0: cDPO) or "ipo" (on sums, as in its paper).
    """
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif kind == "dpo":
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    else:
        raise ValueError(f"kind is {kind!r}; dpo or ipo was expected")
    return losses, beta * (policy_chosen - ref_chosen).detach(), beta * (policy_rejected - ref_rejected).detach()


def simpo_loss(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, beta, gamma):
    """Losses (N,) from sums of log-probabilities and answers' lengths in tokens."""
    margin = chosen_logps / chosen_lengths - rejected_logps / rejected_lengths
    return -F.logsigmoid(beta * margin - gamma)


def prepare(path, which, tok, length: int):
    """Pairs → [(prompt ids, chosen ids, rejected ids)] of the training side; longer ones are dropped and counted."""
    train, _ = records.split(records.pairs(path, which))
    data = []
    for r in train:
        (prompt, chosen), (_, rejected) = (templates.answer_ids(tok, r["prompt"], r[k]) for k in ("chosen", "rejected"))
        data.append((prompt, chosen, rejected))
    kept = [d for d in data if len(d[0]) + max(len(d[1]), len(d[2])) <= length]
    records.report(path, len(kept), {f"longer than {length} tokens": len(data) - len(kept)}, "pairs")
    return kept


def pair_logps(model, pairs, device):
    """Pairs → summed log-probabilities (2,N) and lengths (2,N) of chosen and rejected answers, in one forward pass."""
    prompts = [p for p, _, _ in pairs] * 2
    answers = [c for _, c, _ in pairs] + [r for _, _, r in pairs]
    tokens, mask, where = join(prompts, answers, device)
    with autocast(device):
        logps = logprobs(model, tokens, mask, where)
    return logps.sum(1).view(2, -1), where.sum(1).view(2, -1)


@torch.no_grad()
def reference_logps(model, pairs, device, size: int):
    """Of every pair once, before training changes the model: no second model is kept. (2,N)"""
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    out = torch.zeros(2, len(pairs), device=device)
    for i in range(0, len(order), size):
        out[:, order[i : i + size]] = pair_logps(model, [pairs[j] for j in order[i : i + size]], device)[0]
    return out


def dpo(o: Options):
    device = pick_device(o.device)
    run = Run(o, __file__, [o.model, o.data])
    policy, tok = hub.language_model(o.model, device)
    data = prepare(o.data, o.pairs, tok, min(o.length, policy.config.max_position_embeddings))
    schedule = [records.batch(range(len(data)), step, o.batch, o.seed) for step in range(o.steps)]
    size = -(-o.batch // o.accumulate)
    if o.loss != "simpo":
        used = sorted({i for step in schedule for i in step})
        reference = torch.zeros(2, len(data), device=device)
        reference[:, used] = reference_logps(policy, [data[i] for i in used], device, size)
    optimizer = adamw(policy, o.lr)
    run.resume(policy=policy, optimizer=optimizer)

    for step in run.steps(o.steps):
        lr = lr_at(step, o.steps, o.lr, o.warmup)
        set_lr(optimizer, lr)
        figures = {}
        for i in range(0, o.batch, size):
            part = schedule[step][i : i + size]
            (chosen, rejected), (n_chosen, n_rejected) = pair_logps(policy, [data[j] for j in part], device)
            if o.loss == "simpo":
                losses = simpo_loss(chosen, rejected, n_chosen, n_rejected, o.beta, o.gamma)
                rewards = o.beta * (chosen / n_chosen).detach(), o.beta * (rejected / n_rejected).detach()
            else:
                losses, *rewards = preference_loss(chosen, rejected, *reference[:, part], o.beta, o.loss, o.label_smoothing)
            if step == 0 and o.loss == "dpo" and device.type == "cpu" and (losses - math.log(2)).abs().max() > 1e-3:
                raise ValueError(f"the first loss is {losses.mean():.4f}, not ln 2: policy and reference differ before training")
            nll = -chosen / n_chosen
            ((losses + o.nll * nll).sum() / o.batch).backward()
            now = dict(loss=losses, nll=nll, logp_chosen=chosen, logp_rejected=rejected, reward_chosen=rewards[0], reward_rejected=rewards[1],
                       margin=rewards[0] - rewards[1], accuracy=(rewards[0] > rewards[1]).float())  # fmt: skip
            figures = {k: figures.get(k, 0.0) + v.detach().sum() / o.batch for k, v in now.items()}
        norm = clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, ("loss", "margin", "accuracy"), **figures, lr=lr, grad_norm=norm)
        run.save(step)
    run.finish(lambda path: hub.save(path, policy, tok))


if __name__ == "__main__":
    main(dpo, Options, __doc__)

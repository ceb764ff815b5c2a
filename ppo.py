"""Stage 3: PPO with a KL penalty. The policy answers, the reward model scores, the policy moves
(Ouyang et al. 2022, eq. 2).

    maximise  E[ r(x, y) - β KL(π(·|x) ‖ π_ref(·|x)) ]        π starts as the SFT model, π_ref stays it, r is frozen

Four networks: policy, reference, reward model, and a critic V that starts from the reward model. An
answer is an episode, a token an action. Each iteration:

    1. rollout   answers y ~ π(·|x), sampled at `temperature` without top-k or top-p: else they would not be π's
    2. reward    r_t = -β (log π(y_t) - log π_ref(y_t)),  and r(x, y) on the last token: the end token is an action as any other.
                 An answer without an end gets no_end_score instead of its score. Scores are in
                 standard deviations: a reward model's in those of its reference answers, your own
                 function's in those of all its scores so far
    3. credit    A_t = Σ_l (γλ)^l δ_{t+l},  δ_t = r_t + γ V_{t+1} - V_t    (Schulman et al. 2016); R_t = A_t + V_t, then A whitened
    4. update    L = E[max(-A ρ, -A clip(ρ, 1±ε))],  ρ = π/π_old             (Schulman et al. 2017, eq. 7), and the critic towards R_t
    5. β         adaptive with --target-kl: up when KL is above it, down when below (Ziegler et al. 2019, section 2.2)

What the log should look like. Working: reward and gold rise together and flatten; kl rises quickly,
then slowly, to a few nats an answer; entropy falls slowly; clip_fraction stays under 0.2,
ratio_error (before the first update) at rounding; explained_variance climbs; length changes little,
finished stays near 1. Hacked: reward climbs on while gold turns down, kl grows without end, answers
become alike (entropy near 0) or long or of one phrase. Then raise --kl, lower --lr, or stop
earlier: the reward model is right only near the answers that it was trained on. Broken: reward does
not move, kl or ratio_error are not 0 at the start, explained_variance stays under 0.
"""

import json
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_

from common import tuning
from common.run import (
    Run,
    adamw,
    autocast,
    load_function,
    lr_at,
    main,
    make_room,
    opt,
    pick_device,
    set_lr,
)
from data import records, templates
from data.world import world
from model import generate, join, last_score, logprobs, prompt_room, scalar_model, scores, share

RATIO_BOUND = 1e-3  # |ratio - 1| before the first update: rounding reaches 6e-5, a temperature
# that is wrong by 1 % more than this


@dataclass
class Options(tuning.Tuning):
    model: str = opt("out/sft", "the policy's start and the reference")
    reward: str = opt("out/reward", "reward model's folder, or FILE.py:function")
    raw_reward: bool = opt(False, "do not divide the function's scores by their running deviation")
    data: str = opt("out/world/prompts.jsonl", "conversations that end in a user's turn")
    out: str = opt("out/ppo", "folder for the checkpoint")
    iterations: int = opt(20, "rounds of rollout and update", at_least=1)
    batch: int = opt(128, "answers a round", at_least=1)
    minibatch: int = opt(32, "answers an update", at_least=1)
    epochs: int = opt(2, "passes over a round's answers", at_least=1)
    lr: float = opt(
        0.0,
        "peak learning rate of policy and critic; 0: 2e-4, five times that for LoRA",
        at_least=0,
    )
    warmup: int = opt(
        2, "rounds of linear warmup, then a line to 0", at_least=0, below="iterations"
    )
    kl: float = opt(0.2, "β: cost of a nat of KL, in standard deviations of the reward", at_least=0)
    target_kl: float = opt(
        0.0, "nats an answer that an adaptive β steers to; 0: β is fixed", at_least=0
    )
    horizon: float = opt(
        2000.0, "answers over which the adaptive β moves", needs="target_kl", above=0
    )
    gamma: float = opt(1.0, "discount", above=0, at_most=1)
    lam: float = opt(0.95, "GAE's λ", at_least=0, at_most=1)
    clip: float = opt(0.2, "ε of the ratio, and of the values", above=0)
    vf: float = opt(0.1, "weight of the value loss", at_least=0)
    no_end_score: float = opt(-1.0, "score of an answer that did not end, in standard deviations",
                              above=-math.inf, below=math.inf)  # fmt: skip
    temperature: float = opt(1.0, "of π, in the rollout and in every log-probability", above=0)
    max_new_tokens: int = opt(64, "tokens of an answer", at_least=1)
    seed: int = opt(0, "seed of prompts, answers and minibatches", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(5, "iterations between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")


# ---------------------------------------------------------------- estimators and losses; all tensors (B,T), mask on the answers
def masked_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages and returns, exactly 0 off the mask. The mask is one run of tokens a row; V is 0
    after its last.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, after, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = torch.where(mask[:, t], delta + gamma * lam * after, 0.0)
        advantages[:, t], next_value = after, values[:, t]
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over the mask, var biased; shift_mean=False keeps the mean. 0
    off the mask.
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip: float):
    """Clipped surrogate, a mean over the mask, and the share of tokens where the clip holds."""
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return masked_mean(torch.maximum(plain, clipped), mask), masked_mean(
        (clipped > plain).float(), mask
    )


def value_loss(values, old_values, returns, mask, clip: float):
    """½ the worse of the squared errors of V and of V held within ±clip of its old self, a mean
    over the mask.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def kl_estimates(old, ref, mask):
    """Two unbiased estimates of KL(π‖π_ref) from π's own samples, summed over an answer, mean over
    answers (Schulman 2020): k1 = d, which can be negative, and k3 = e^-d - 1 + d, which cannot; d =
    log π - log π_ref."""
    d = torch.where(mask, old - ref, 0.0)
    return d.sum(1).mean(), (torch.expm1(-d) + d).sum(1).mean()


def adapt(beta: float, kl: float, target: float, answers: int, horizon: float) -> float:
    """β moves by at most 20 % a horizon towards KL = target, and a round is never more than one: it
    cannot fall to 0. It stays as it is where target is 0."""
    error = max(-0.2, min(0.2, kl / target - 1)) if target else 0.0
    return beta * (1 + error * min(1, answers / horizon))


def running(seen, scores):
    """What is known of all scores so far, (n, mean, M) with M = Σ(score - mean)², once scores (N,)
    are added to those `seen`:  with δ = mean' - mean it is mean + δ n'/(n+n') and
    M + M' + δ² n n'/(n+n')    (Chan et al. 1979)."""
    if not len(scores):
        return seen
    n, mean, m = seen
    scores = scores.double()
    k = len(scores)
    shift = scores.mean().item() - mean
    within = ((scores - scores.mean()) ** 2).sum().item()
    return n + k, mean + shift * k / (n + k), m + within + shift**2 * n * k / (n + k)


def deviation(seen) -> float:
    """sqrt(M/n), biased as in whiten. 1 while all scores were equal, but for float32's rounding:
    they have no scale yet, and noise is none."""
    n, mean, m = seen
    std = (m / n) ** 0.5 if n else 0.0
    return std if std > 1e-6 * abs(mean) else 1.0


def explained_variance(values, returns, mask):
    """1 - var(R - V) / var(R): 1 for a perfect critic, 0 for a constant one."""
    spread = lambda x: masked_mean((x - masked_mean(x, mask)) ** 2, mask)  # noqa: E731
    return 1 - spread(returns - values) / spread(returns).clamp(min=1e-8)


# ---------------------------------------------------------------- what the loop needs
def load_reward(o, reference, tok, device):
    """--reward, a folder or FILE.py:function → (a function that scores answers, the model or None),
    the folder's scores in its own standard deviations from its reference answers. It is called with
    tokens, mask, prompts, answers and records; a folder reads the first two."""
    spec = o.reward
    if is_function(spec):
        judge = load_function(spec)
        return lambda _tokens, _mask, *texts: torch.tensor(judge(*texts), device=device), None
    if o.raw_reward:
        raise ValueError(f"--raw-reward is for FILE.py:function: {spec} knows its own deviation")
    model, own = tuning.reward_model(o, spec, reference, device)
    if not model.config.num_labels:
        raise ValueError(
            f"--reward {spec}: a language model; a reward model (reward.py) or FILE.py:function was"
            " expected"
        )
    if own is None or vocabulary(own) != vocabulary(tok):
        raise ValueError(
            f"--reward {spec}: its vocabulary is not the policy's; train it on the same model"
            " (reward.py --model)"
        )
    c = model.config
    tuning.check_spread(f"--reward {spec}", c.reward_mean, c.reward_std)
    return (
        lambda tokens, mask, *_: (last_score(model, tokens, mask) - c.reward_mean) / c.reward_std,
        model,
    )


def is_function(spec: str) -> bool:
    return spec.endswith(".py") or ".py:" in spec


def vocabulary(tok) -> dict:
    """{token: id}; how the file spells the rest does not matter."""
    return json.loads(tok.json)["model"]["vocab"] | tok.special


def values_of(critic, tokens, real):
    """V before each token (B,T): read from the hidden state at the token before it, in the reward's
    own standard deviations.
    """
    read = (scores(critic, tokens, real) - critic.config.reward_mean) / critic.config.reward_std
    return F.pad(read[:, :-1], (1, 0))


def in_parts(size: int, function, *tensors):
    """function over rows, `size` at a time: the same memory as an update."""
    return torch.cat(
        [function(*part) for part in zip(*(t.split(size) for t in tensors), strict=True)]
    )


def prepare(path, tok, room: int):
    """Conversations that end in a user's turn → [(record, ids)], those with room for the answer."""
    train, held = records.split(records.conversations(path, "prompt"))
    data = [(r, templates.render(tok, r["messages"], add_generation_prompt=True)[0]) for r in train]
    kept = [(r, ids) for r, ids in data if len(ids) <= room]
    dropped = {
        f"longer than {room} tokens (the context less --max-new-tokens)": len(data) - len(kept)
    }
    records.report(path, len(kept), dropped, "prompts", len(held))
    return kept


def ppo(o: Options):
    if o.target_kl and not o.kl:
        raise ValueError("--target-kl multiplies β, and --kl 0 stays 0: give a --kl above 0")
    device = pick_device(o.device)
    run = Run(
        o,
        __file__,
        [
            *tuning.inputs(o),
            o.reward.rpartition(":")[0] or o.reward if is_function(o.reward) else o.reward,
            o.data,
        ],
    )
    policy, tok = tuning.start(o, device)
    # a copy of what is trained; what is frozen is in memory once
    reference = share(policy).requires_grad_(False)
    judge, reward_model = load_reward(o, reference, tok, device)
    critic = tuning.critic_of(o, reward_model) if reward_model else scalar_model(policy)
    room = min(prompt_room(m, o.max_new_tokens) for m in (policy, critic))  # contexts may differ
    end, prompts = templates.end_ids(tok, policy.config), prepare(o.data, tok, room)
    peak = tuning.learning_rate(o, 2e-4)
    optimizer, critic_optimizer = (
        adamw(m, peak, eps=1e-5, paged=o.paged) for m in (policy, critic)
    )
    answered = o.minibatch * o.max_new_tokens
    watch = tuning.Watch(o, device, [policy, critic, reference, *([reward_model] if reward_model else [])],
                         answered + o.minibatch * sum(len(ids) for _, ids in prompts) / len(prompts), answered)  # fmt: skip
    extra = run.resume(
        policy=policy, critic=critic, optimizer=optimizer, critic_optimizer=critic_optimizer
    )
    beta, seen = extra.get("beta", o.kl), extra.get("seen", (0, 0.0, 0.0))
    logp_of = lambda model, *rows: logprobs(model, *rows, temperature=o.temperature)  # noqa: E731

    for it in run.steps(o.iterations, "iteration"):
        start = time.time()
        set_lr(optimizer, lr_at(it, o.iterations, peak, o.warmup))
        set_lr(critic_optimizer, lr_at(it, o.iterations, peak, o.warmup))
        with torch.no_grad(), autocast(device):
            # 1. rollout
            batch, asked = map(list, zip(*records.batch(prompts, it, o.batch, o.seed), strict=True))
            longest = max(map(len, asked)) + o.max_new_tokens
            make_room([optimizer, critic_optimizer], cached=len(asked) * longest)
            answers = generate(
                policy,
                asked,
                o.max_new_tokens,
                o.temperature,
                eos_id=end,
                seed=o.seed * 100_003 + it,
            )
            texts, ended = templates.read_answers(tok, answers, end)
            tokens, real, mask = join(asked, answers, device)  # mask: the answer and its end token
            finished, last = torch.tensor(ended, device=device), real.sum(1) - 1
            old = in_parts(o.minibatch, lambda *rows: logp_of(policy, *rows), tokens, real, mask)
            ref = in_parts(o.minibatch, lambda *rows: logp_of(reference, *rows), tokens, real, mask)
            values = in_parts(o.minibatch, lambda *rows: values_of(critic, *rows), tokens, real)
            if it == 0:
                check_ratio(old, ref, device, "policy and reference start as different models")
            # 2. reward
            score = judge(tokens, real, [r["messages"] for r in batch], texts, batch)
            if not score.isfinite().all():
                wrong = score[~score.isfinite()][0].item()
                raise ValueError(f"--reward {o.reward}: a score is {wrong} in float32")
            if reward_model is None and not o.raw_reward:  # β and clip are in deviations
                seen = running(seen, score[finished])
                score = score / deviation(seen)
            if it == 0 and finished.any() and (mean := score[finished].mean()) < o.no_end_score:
                print(f"warning: an answer without an end gets {o.no_end_score:g}, the others get "
                      f"{mean:.3g} on average: it pays not to end; give a lower --no-end-score")  # fmt: skip
            score = torch.where(finished, score, o.no_end_score)
            rewards = torch.where(mask, -beta * (old - ref), 0.0)
            rewards[torch.arange(len(tokens)), last] += score
            # 3. credit
            advantages, returns = gae(rewards, values, mask, o.gamma, o.lam)
            advantages = whiten(advantages, mask)
        # 4. update
        figures, first = [], True
        for epoch in range(o.epochs):
            order = torch.randperm(
                len(tokens),
                generator=torch.Generator().manual_seed((o.seed * 1009 + it) * 1009 + epoch),
            )
            for b in order.split(o.minibatch):
                targets = sum(len(answers[i]) for i in b.tolist())
                read = targets + sum(len(asked[i]) for i in b.tolist())
                make_room([optimizer, critic_optimizer], tokens=read, targets=targets)
                b = b.to(device)
                with autocast(device):
                    new = logp_of(policy, tokens[b], real[b], mask[b])
                    value = values_of(critic, tokens[b], real[b])
                if first:
                    ratio_error = check_ratio(new.detach(), old[b], device)
                    first = False
                pg, clipped = policy_loss(new, old[b], advantages[b], mask[b], o.clip)
                vf = value_loss(value, values[b], returns[b], mask[b], o.clip)
                (pg + o.vf * vf).backward()
                for model, step in ((policy, optimizer), (critic, critic_optimizer)):
                    clip_grad_norm_(model.parameters(), 1.0)
                    step.step()
                    step.zero_grad()
                figures.append(torch.stack((pg.detach(), vf.detach(), clipped)))
        # 5. controller
        k1, k3 = kl_estimates(old, ref, mask)
        beta = adapt(beta, k1.item(), o.target_kl, len(tokens), o.horizon)

        pg, vf, clipped = torch.stack(figures).mean(0).tolist()
        gold = [
            world.gold(r["item"], t, f)[0]
            for r, t, f in zip(batch, texts, ended, strict=True)
            if world.knows(r)
        ]
        figures = dict(reward=score.mean(), kl=k1, kl_k3=k3, beta=beta, entropy=-masked_mean(old, mask), policy_loss=pg, value_loss=vf,
                       clip_fraction=clipped, ratio_error=ratio_error, explained_variance=explained_variance(values, returns, mask),
                       length=mask.sum() / len(mask), finished=finished.float().mean(),
                       tokens_per_second=mask.sum() / (time.time() - start))  # fmt: skip
        run.log(
            it,
            ("reward", "gold", "kl"),
            **figures,
            **({"gold": sum(gold) / len(gold)} if gold else {}),
        )
        run.save(it, beta=beta, seen=seen)

    watch.finish()
    run.finish(lambda path: tuning.save(o, path, policy, tok))


def check_ratio(new, old, device, differ="rollout and update see different policies") -> float:
    """→ the largest |ratio - 1| of log-probabilities that are one model's, and differ by rounding
    alone: rows are grouped otherwise. ValueError above RATIO_BOUND; on a GPU, where bf16 rounds
    more, it is only logged."""
    error = torch.expm1(new - old).abs().max().item()
    if not error <= RATIO_BOUND and device.type == "cpu":
        raise ValueError(
            f"the ratio is off 1 by {error:.1e} before the first update "
            f"({RATIO_BOUND:.0e} is allowed): {differ}"
        )
    return error


if __name__ == "__main__":
    main(ppo, Options, __doc__)

"""Stage 3: PPO with a KL penalty. The policy answers, the reward model scores, the policy moves.

    maximise  E[ r(x, y) - β KL(π(·|x) ‖ π_ref(·|x)) ]              Ouyang et al. 2022, eq. 2

π starts as the SFT model, π_ref stays it, r is frozen, and a critic V starts from the reward model.
An answer is an episode, a token an action. Each iteration:

    1. rollout   answers y ~ π(·|x) at `temperature`; top-k or top-p would sample another policy
    2. reward    r_t = -β (log π(y_t) - log π_ref(y_t)), and r(x, y) on the last token: the end
                 token is an action like any other. Without an end: no_end_score in place of r(x, y)
    3. credit    δ_t = r_t + γ V_{t+1} - V_t,  A_t = Σ_l (γλ)^l δ_{t+l}    Schulman 2016, eq. 16
                 R_t = A_t + V_t, then A is whitened
    4. update    L = E[max(-A ρ, -A clip(ρ, 1±ε))],  ρ = π/π_old           Schulman 2017, eq. 7
                 and ½ (V - R)² for the critic
    5. β         with --target-kl: up when KL is above it, else down      Ziegler et al. 2019, § 2.2

What the log should look like
    working   reward, gold and right rise together and flatten; kl rises quickly, then slowly, to a
              few nats per answer; entropy falls slowly; clip_fraction stays under 0.2; ratio_error,
              before the first update, is rounding; explained_variance starts below 0, because the
              reward model has never scored half an answer, and climbs; finished nears 1
    hacked    reward keeps climbing while gold falls, kl grows without end, answers become alike
              (entropy near 0), long, or one phrase. Raise --kl-coef, lower --lr, or stop earlier:
              the reward model can be trusted only near the answers that it was trained on
    broken    reward does not move, or kl or ratio_error is not 0 at the start
"""

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import ModuleList
from torch.nn.utils import clip_grad_norm_

import forget
from common import tuning
from common.run import (
    Run,
    adamw,
    autocast,
    file_of,
    is_function,
    lr_at,
    main,
    make_room,
    opt,
    pick_device,
    set_lr,
)
from common.watch import Watch, Watching
from data import records, templates
from data.world import world
from model import answer_mask, logprobs, scalar_model, score, share, values
from packing import sizes
from sampling import generate, prompt_room

RATIO_BOUND = 1e-3  # |ρ - 1| before an update: rounding reaches 6e-5, a temperature off by 1 % more


@dataclass
class Options(Watching, tuning.Tuning):
    model: str = opt("out/sft", "the policy's start and the reference", hub="all")
    reward: str = opt("out/reward", "reward model's folder, or FILE.py:function", hub="all")
    raw_reward: bool = opt(False, "do not divide the function's scores by their running deviation")
    data: str = opt("out/world/prompts.jsonl", "conversations that end in a user's turn")
    out: str = opt("out/ppo", "folder for the checkpoint")
    iterations: int = opt(20, "rounds of rollout and update", at_least=1)
    batch: int = opt(128, "answers per round", at_least=1)
    minibatch: int = opt(32, "answers per update", at_least=1)
    epochs: int = opt(2, "passes over a round's answers", at_least=1)
    lr: float = opt(0.0, "peak learning rate; 0: 2e-4, five times that for LoRA", at_least=0)
    warmup: int = opt(2, "rounds of warmup, then --schedule", at_least=0, below="iterations")
    kl_coef: float = opt(0.2, "β: cost per nat of KL, in deviations of the reward", at_least=0)
    target_kl: float = opt(0.0, "nats per answer that β steers to; 0: β is fixed", at_least=0)
    horizon: float = opt(2000.0, "answers over which β adapts", needs="target_kl", above=0)
    gamma: float = opt(1.0, "discount", above=0, at_most=1)
    lam: float = opt(0.95, "GAE's λ", at_least=0, at_most=1)
    clip: float = opt(0.2, "ε of the ratio, and of the values", above=0)
    vf_coef: float = opt(0.1, "weight of the value loss", at_least=0)
    ptx: str = opt("", "chats or plain text whose loss is mixed in: PPO-ptx (forget.py)")
    ptx_coef: float = opt(27.8, "γ: weight of that loss", needs="ptx", at_least=0)
    no_end_score: float = opt(-1.0, "score of an answer without an end, in deviations")
    temperature: float = opt(1.0, "temperature of π, in rollouts and log-probabilities", above=0)
    max_new_tokens: int = opt(64, "tokens per answer", at_least=1)
    seed: int = opt(0, "seed of prompts, answers and minibatches", at_least=0, below=2**32)
    device: str = opt("auto", "cpu, cuda or auto")
    save_every: int = opt(5, "iterations between saved states", at_least=1)
    overwrite: bool = opt(False, "start anew over a finished run")
    watch_every: int = opt(5, "rounds between scorings", needs="watch", at_least=1)


# ---------------------------------------------------------------- estimators and losses, all (N,A)
def masked_mean(x, mask):
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def gae(rewards, values, mask, gamma: float, lam: float):
    """Advantages A_t = δ_t + γλ A_{t+1} and returns A_t + V_t, exactly 0 off the mask.

    V is 0 after the last token: the episode is over, and nothing more can be won.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, after, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (N,)
        after = torch.where(mask[:, t], delta + gamma * lam * after, 0.0)
        advantages[:, t] = after
        next_value = values[:, t]
    return advantages, advantages + values


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over the mask, var biased; 0 off the mask.

    shift_mean=False keeps the mean.
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip: float):
    """max(-A ρ, -A clip(ρ, 1±ε)), ρ = π/π_old, a mean over the mask; and the share of tokens where
    the clip holds."""
    ratio = torch.exp(torch.where(mask, logp - old_logp, 0.0))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(plain, clipped), mask)
    return loss, masked_mean((clipped > plain).float(), mask)


def value_loss(values, old_values, returns, mask, clip: float):
    """½ max((V - R)², (V' - R)²), V' is V within ±clip of its old self; a mean over the mask."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (near - returns) ** 2), mask)


def kl_estimates(logp, ref, mask):
    """Two unbiased estimates of KL(π‖π_ref) per token of π's own samples, 0 off the mask: k1 = d,
    which can be negative, and k3 = e^-d - 1 + d, which cannot; d = log π - log π_ref
    (Schulman 2020)."""
    d = torch.where(mask, logp - ref, 0.0)
    return d, torch.expm1(-d) + d


def adapt(beta: float, kl: float, target: float, answers: int, horizon: float) -> float:
    """β moves towards KL = target by at most 20 % per horizon, and per round: it cannot reach 0.
    Without a target it stays."""
    error = max(-0.2, min(0.2, kl / target - 1)) if target else 0.0
    return beta * (1 + error * min(1, answers / horizon))


def explained_variance(values, returns, mask):
    """1 - var(R - V) / var(R): 1 for a perfect critic, 0 for a constant one."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


# ---------------------------------------------------------------- steps 1 to 3: a rollout
@dataclass
class Rollout:
    """N answers and what the update needs of them; (N,A) where no shape is given, A the longest."""

    prompts: list  # N lists of ids
    answers: list  # N lists of ids, an end token included
    texts: list  # N strings
    finished: torch.Tensor  # (N,) bool: it has an end
    score: torch.Tensor  # (N,) r(x, y), or no_end_score, in standard deviations
    mask: torch.Tensor  # bool: the answers' tokens
    old: torch.Tensor  # log π(y_t), before the update
    ref: torch.Tensor  # log π_ref(y_t)
    values: torch.Tensor  # V_t, read before token t
    advantages: torch.Tensor  # whitened A_t
    returns: torch.Tensor  # R_t

    def rows(self, index: list[int]):
        """Some of the answers, in this order."""
        at = torch.tensor(index).to(self.mask.device)
        some = [x[at] if torch.is_tensor(x) else [x[i] for i in index] for x in vars(self).values()]
        return Rollout(*some)


def value(critic, prompts, answers, width=None):
    """V before each token (N,A), in the reward's own standard deviations."""
    c = critic.config
    return (values(critic, prompts, answers, width) - c.reward_mean) / c.reward_std


def in_parts(read, size: int, prompts, answers):
    """read(prompts, answers), `size` answers at a time: it takes no more memory than an update."""
    parts = range(0, len(prompts), size)
    return torch.cat([read(prompts[i : i + size], answers[i : i + size]) for i in parts])


@torch.no_grad()
def rollout(policy, reference, scorer, critic, tok, batch, beta: float, seed: int, o) -> Rollout:
    """Answers to a batch of N (record, prompt ids), with rewards and credit."""
    # 1. answers
    found, prompts = map(list, zip(*batch, strict=True))
    ends = templates.end_ids(tok, policy.config)
    answers = generate(policy, prompts, o.max_new_tokens, o.temperature, eos_id=ends, seed=seed)
    texts, ended = templates.read_answers(tok, answers, ends)
    mask = answer_mask(answers, device=policy.device)  # (N,A)
    finished = torch.tensor(ended).to(mask.device)  # (N,)
    # 2. rewards. `old` comes from a full pass like the update's: the sampler computes token by
    # token, from a cache, and rounds differently, so that ρ would not start at 1
    log_pi = partial(logprobs, temperature=o.temperature, width=mask.shape[1])
    old = in_parts(partial(log_pi, policy), o.minibatch, prompts, answers)  # (N,A)
    ref = in_parts(partial(log_pi, reference), o.minibatch, prompts, answers)  # (N,A)
    scores = scorer(prompts, answers, texts, found, finished)  # (N,)
    scores = torch.where(finished, scores, o.no_end_score)
    last = torch.tensor([len(a) - 1 for a in answers]).to(mask.device)
    rewards = -beta * (old - ref)  # (N,A), 0 off the mask, as both are
    rewards = rewards.scatter_add(1, last[:, None], scores[:, None])
    # 3. credit
    read = partial(value, critic, width=mask.shape[1])
    v = in_parts(read, o.minibatch, prompts, answers)  # (N,A)
    advantages, returns = gae(rewards, v, mask, o.gamma, o.lam)
    advantages = whiten(advantages, mask)
    return Rollout(
        prompts, answers, texts, finished, scores, mask, old, ref, v, advantages, returns
    )


def minibatches(r: Rollout, epochs: int, size: int, seed: int):
    """The rollout's answers in a new order each epoch, `size` at a time."""
    for epoch in range(epochs):
        seeded = torch.Generator().manual_seed(seed * 1009 + epoch)
        order = torch.randperm(len(r.answers), generator=seeded).tolist()
        for i in range(0, len(order), size):
            yield r.rows(order[i : i + size])


# ---------------------------------------------------------------- step 4: the update
def update(policy, critic, optimizer, r: Rollout, memory, seed: int, o, texts=()) -> dict:
    """Epochs of minibatches over a rollout → what the log says of them. texts: of --ptx."""
    losses, width = [], r.mask.shape[1]
    cached = len(r.prompts) * (max(map(len, r.prompts)) + o.max_new_tokens)
    for rows in minibatches(r, o.epochs, o.minibatch, seed):
        room = sizes(rows.prompts, rows.answers)
        make_room(optimizer, **room)
        memory.batch(**room, cached=cached)
        with autocast(policy.device):
            new = logprobs(policy, rows.prompts, rows.answers, o.temperature, width)  # (n,A)
            v = value(critic, rows.prompts, rows.answers, width)  # (n,A)
        if not losses:  # the first minibatch: no step has been made yet
            differ = "rollout and update see different policies"
            ratio_error = check_ratio(new.detach(), rows.old, differ)
        pg, clipped = policy_loss(new, rows.old, rows.advantages, rows.mask, o.clip)
        vf = value_loss(v, rows.values, rows.returns, rows.mask, o.clip)
        (pg + o.vf_coef * vf).backward()
        figures = dict(policy_loss=pg.detach(), value_loss=vf.detach(), clip_fraction=clipped)
        if texts:  # PPO-ptx: as many examples as answers, and γ times their gradient
            some = records.batch(texts, len(losses), o.minibatch, seed)
            figures["ptx_loss"] = forget.mix_in(policy, some, o.ptx_coef, optimizer)
        clip_grad_norm_(policy.parameters(), 1.0)
        clip_grad_norm_(critic.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(figures)
    means = {name: torch.stack([x[name] for x in losses]).mean() for name in losses[0]}
    return means | dict(ratio_error=ratio_error)


# ---------------------------------------------------------------- what the loop needs
def load_reward(o, reference, tok, seen: list):
    """--reward → a scorer, and its model, frozen (None for FILE.py:function).

    scorer(prompts, answers, texts, records, finished) → (N,) in standard deviations: a model's, of
    its reference answers' scores; a function's, of all scores so far, which are kept in `seen`.
    """
    if is_function(o.reward):
        return tuning.own_reward(o, seen), None
    if o.raw_reward:
        raise ValueError(f"--raw-reward is for FILE.py:function, {o.reward} knows its deviation")
    model = tuning.reward_model(o, o.reward, reference, tok).requires_grad_(False)

    def scorer(prompts, answers, *_):
        raw = in_parts(partial(score, model), o.minibatch, prompts, answers)
        return (raw - model.config.reward_mean) / model.config.reward_std

    return scorer, model


def prepare(path, tok, room: int, **allowed):
    """Conversations that end in a user's turn → [(record, ids)], those with room for an answer."""
    train, held = records.split(records.conversations(path, "prompt", **allowed))
    data = [(r, templates.render(tok, r["messages"], add_generation_prompt=True)[0]) for r in train]
    kept = [(r, ids) for r, ids in data if len(ids) <= room]
    reason = f"longer than {room} tokens (the context less --max-new-tokens)"
    records.report(path, len(kept), {reason: len(data) - len(kept)}, "prompts", len(held))
    return kept


def check_ratio(new, old, what: str):
    """The largest |ρ - 1| of two readings of one model, which differ by rounding alone, a scalar.
    ValueError above RATIO_BOUND; a GPU's bf16 rounds more, there it is only logged."""
    error = torch.expm1(new - old).abs().max()
    if new.device.type == "cpu" and not error <= RATIO_BOUND:
        off = f"the ratio is off 1 by {error:.1e} before the first update"
        raise ValueError(f"{off} ({RATIO_BOUND:.0e} is allowed): {what}")
    return error


def warn_no_end(r: Rollout, no_end_score: float):
    """Warns where an answer scores better without an end."""
    mean = r.score[r.finished].mean().item()  # NaN where none has one
    if mean < no_end_score:
        others = f"the others get {mean:.3g} on average: it pays not to end"
        advice = "give a lower --no-end-score"
        print(f"warning: an answer without an end gets {no_end_score:g}, {others}; {advice}")


def report(r: Rollout, batch) -> dict:
    """What the log says of a rollout."""
    k1, k3 = kl_estimates(r.old, r.ref, r.mask)
    figures = dict(
        reward=r.score.mean(),
        kl=k1.sum(1).mean(),  # nats per answer
        kl_k3=k3.sum(1).mean(),
        entropy=-masked_mean(r.old, r.mask),  # nats per token
        explained_variance=explained_variance(r.values, r.returns, r.mask),
        length=r.mask.sum(1).float().mean(),
        finished=r.finished.float().mean(),
    )
    return figures | world.rate([record for record, _ in batch], r.texts, r.finished.tolist())


def ppo(o: Options):
    if o.target_kl and not o.kl_coef:
        raise ValueError("--target-kl multiplies β, and --kl-coef 0 stays 0: give one above 0")
    device = pick_device(o.device)
    run = Run(o, __file__, [*tuning.inputs(o), file_of(o.reward), o.data, *filter(None, [o.ptx])])
    policy, tok = tuning.start(o, device)
    reference = share(policy).requires_grad_(False)  # frozen tensors are in memory once
    seen = [0, 0.0, 0.0]  # n, mean, M of a reader's own scores
    scorer, reward_model = load_reward(o, reference, tok, seen)
    if reward_model is None:
        critic = scalar_model(policy)
    else:
        critic = tuning.critic_of(o, reward_model, reference, tok)
    room = min(prompt_room(m, o.max_new_tokens) for m in (policy, critic))  # contexts may differ
    allowed = tuning.allowed(o, tok)
    prompts = prepare(o.data, tok, room, **allowed)
    texts = forget.examples(o.ptx, tok, min(256, policy.context), **allowed) if o.ptx else []
    peak = tuning.learning_rate(o, 2e-4)
    optimizer = adamw(ModuleList([policy, critic]), peak, eps=1e-5, paged=o.paged)
    memory = tuning.Report(o, device, [policy, critic, reference, *filter(None, [reward_model])])
    saved = run.resume(policy=policy, critic=critic, optimizer=optimizer)
    beta, seen[:] = saved.get("beta", o.kl_coef), saved.get("seen", seen)

    for it in Watch(o, run, policy, tok).steps(o.iterations, "iteration"):
        start = time.time()
        set_lr(optimizer, lr_at(it, o.iterations, peak, o.warmup, o.schedule))
        # 1 answers, 2 rewards, 3 credit. Different rounds and runs never share a seed: the factors
        # are primes, larger than the number of rounds in a run and of epochs in a round
        batch = records.batch(prompts, it, o.batch, o.seed)
        room = len(batch) * (max(len(ids) for _, ids in batch) + o.max_new_tokens)
        make_room(optimizer, cached=room)
        with autocast(device):
            seed = o.seed * 100_003 + it
            r = rollout(policy, reference, scorer, critic, tok, batch, beta, seed, o)
        if it == 0:
            check_ratio(r.old, r.ref, "policy and reference start as different models")
            warn_no_end(r, o.no_end_score)
        # 4 update
        seed = o.seed * 1009 + it
        figures = update(policy, critic, optimizer, r, memory, seed, o, texts)
        # 5 controller
        figures |= report(r, batch)
        beta = adapt(beta, figures["kl"].item(), o.target_kl, len(batch), o.horizon)

        speed = sum(map(len, r.answers)) / (time.time() - start)
        figures |= dict(beta=beta, tokens_per_second=speed)
        run.log(it, ("reward", "gold", "right", "kl"), **figures)
        run.save(it, beta=beta, seen=seen)

    memory.finish()
    run.finish(lambda path: tuning.save(o, path, policy, tok))


if __name__ == "__main__":
    main(ppo, Options, __doc__)

"""PPO: estimators and losses against their definitions in float64, exact KL on an enumerable toy,
and what the loop feeds them.
"""

import itertools
import json
import math

import pytest
import torch
from tiny import answers_of, bandit, chat_tokenizer, folder, gradcheck, lm, metrics, user, write

import ppo
from common import hub, tuning
from data import templates
from model import join, last_score, logprobs, scalar_model
from ppo import (
    adapt,
    explained_variance,
    gae,
    kl_estimates,
    masked_mean,
    policy_loss,
    value_loss,
    values_of,
    whiten,
)

NAN = math.nan
# prompts in front, padding behind, an answer of one token, one that fills its row, one that is all
# the row
MASK = torch.tensor(
    [[0, 0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
).bool()


def random(n, off=0.0, seed=0):
    """n tensors in MASK's shape, float64, `off` where the mask is not."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.where(MASK, torch.randn(MASK.shape, generator=generator, dtype=torch.float64), off)
        for _ in range(n)
    ]


def rows(*tensors):
    """What lies on the mask, row by row, as lists of floats."""
    return [[x[i][MASK[i]].tolist() for x in tensors] for i in range(len(MASK))]


def flat(x):
    return x[MASK].tolist()


# ---------------------------------------------------------------- credit
def definition(rewards, values, gamma, lam):
    """One row's advantages by the sum over all later δ (Schulman et al. 2016, eq. 16)."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(
    "gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.7, 1.0), (1.0, 1.0)]
)
@pytest.mark.parametrize("off", [0.0, 5.0, NAN, math.inf])
def test_gae_is_its_definition_on_ragged_rows(gamma, lam, off):
    rewards, values = random(2, off)
    advantages, returns = gae(rewards, values, MASK, gamma, lam)
    for i, (r, v) in enumerate(rows(rewards, values)):
        expected = definition(r, v, gamma, lam)
        assert advantages[i][MASK[i]].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[i][MASK[i]].tolist() == pytest.approx(
            [a + b for a, b in zip(expected, v, strict=True)], abs=1e-12
        )
        if lam == 1:  # all that is still to come, whatever the critic says
            assert returns[i][MASK[i]].tolist() == pytest.approx(
                [sum(gamma**k * x for k, x in enumerate(r[t:])) for t in range(len(r))]
            )
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_gae_gives_no_gradient_to_what_is_off_the_mask():
    rewards, values = (x.requires_grad_() for x in random(2, NAN))
    (gae(rewards, values, MASK, 0.9, 0.8)[0] ** 2).sum().backward()
    for x in (rewards, values):
        assert x.grad.isfinite().all() and (x.grad[~MASK] == 0).all() and (x.grad[MASK] != 0).all()


@pytest.mark.parametrize("off", [0.0, 5.0, NAN])
def test_whiten_removes_the_mean_or_keeps_it(off):
    (x,) = random(1, off)
    x = x * 3 + 2
    inside = torch.tensor(flat(x), dtype=torch.float64)
    mean, scale = inside.mean(), (inside.var(unbiased=False) + 1e-8).sqrt()
    assert flat(whiten(x, MASK)) == pytest.approx(((inside - mean) / scale).tolist())
    kept = whiten(x, MASK, shift_mean=False)
    assert flat(kept) == pytest.approx(((inside - mean) / scale + mean).tolist())
    assert (whiten(x, MASK)[~MASK] == 0).all() and (kept[~MASK] == 0).all()
    same = whiten(torch.full(MASK.shape, 3.0), MASK)
    assert (same == 0).all()  # no spread: no division by 0


def test_whiten_s_epsilon_stands_in_the_root():
    # its variance is about the epsilon itself
    x = torch.where(MASK.cumsum(1) % 2 == 0, 1e-4, -1e-4).double()
    inside = torch.tensor(flat(x), dtype=torch.float64)
    expected = (inside - inside.mean()) / (inside.var(unbiased=False) + 1e-8).sqrt()
    assert flat(whiten(x, MASK)) == pytest.approx(expected.tolist(), rel=1e-6)


def test_masked_mean_is_over_the_mask_and_0_where_it_is_empty():
    (x,) = random(1, NAN)
    assert masked_mean(x, MASK).item() == pytest.approx(sum(flat(x)) / len(flat(x)))
    assert masked_mean(x, torch.zeros_like(MASK)) == 0


# ---------------------------------------------------------------- losses
@pytest.mark.parametrize("off", [0.0, 5.0, NAN, -math.inf])
def test_policy_loss_is_its_definition(off):
    logp, old, advantages = random(3, off)
    loss, clipped = policy_loss(logp, old, advantages, MASK, 0.2)
    per_token, held = [], []
    for new, was, a in zip(flat(logp), flat(old), flat(advantages), strict=True):
        ratio = math.exp(new - was)
        per_token.append(-min(ratio * a, max(0.8, min(1.2, ratio)) * a))  # eq. 7 is maximised
        held.append(per_token[-1] != pytest.approx(-ratio * a))
    assert loss.item() == pytest.approx(sum(per_token) / len(per_token), abs=1e-12)
    assert 0 < sum(held) < len(held) and clipped.item() == pytest.approx(sum(held) / len(held))


def test_policy_loss_before_the_first_update():
    logp, advantages = random(2)
    logp.requires_grad_()
    loss, clipped = policy_loss(logp, logp.detach(), advantages, MASK, 0.2)
    loss.backward()
    assert clipped == 0 and loss.item() == pytest.approx(-sum(flat(advantages)) / MASK.sum().item())
    # the policy gradient
    assert torch.allclose(logp.grad, torch.where(MASK, -advantages, 0.0) / MASK.sum())


def test_a_clipped_token_is_pushed_no_further():
    mask = torch.ones(1, 4, dtype=torch.bool)
    # ratios
    logp = torch.tensor([[1.5, 1.5, 0.5, 0.5]], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
    policy_loss(logp, torch.zeros_like(logp), advantages, mask, 0.2)[0].backward()
    assert (logp.grad != 0).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("off", [0.0, 5.0, NAN, -math.inf])
def test_value_loss_is_its_definition(off):
    values, old, returns = random(3, off)
    per_token = [
        0.5 * max((v - r) ** 2, (o + max(-0.2, min(0.2, v - o)) - r) ** 2)
        for v, o, r in zip(flat(values), flat(old), flat(returns), strict=True)
    ]
    assert value_loss(values, old, returns, MASK, 0.2).item() == pytest.approx(
        sum(per_token) / len(per_token), abs=1e-12
    )


@pytest.mark.parametrize("off", [NAN, math.inf])
def test_what_is_off_the_mask_gives_no_gradient(off):
    logp, old, advantages, values, returns = random(5, off)
    logp, values = logp.requires_grad_(), values.requires_grad_()
    (
        policy_loss(logp, old, advantages, MASK, 0.2)[0]
        + value_loss(values, old, returns, MASK, 0.2)
    ).backward()
    for x in (logp, values):
        assert x.grad.isfinite().all() and (x.grad[~MASK] == 0).all() and (x.grad[MASK] != 0).any()


def test_shapes_that_would_broadcast_change_nothing():
    """(B,T) in everywhere, a scalar out: a (B,1) or (B,) by mistake would broadcast, and PPO would
    still learn something.
    """
    x = random(5)
    assert policy_loss(*x[:3], MASK, 0.2)[0].shape == value_loss(*x[:3], MASK, 0.2).shape == ()
    assert all(
        out.shape == MASK.shape for out in (*gae(*x[:2], MASK, 1.0, 0.95), whiten(x[0], MASK))
    )


def test_finite_differences():
    logp, old, advantages, values, returns = random(5)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, MASK, 0.2)[0], logp.requires_grad_()
    )
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, old, returns, MASK, 0.2), values.requires_grad_()
    )


def test_finite_differences_through_the_models():
    shape = dict(vocab_size=7, hidden_size=4, intermediate_size=3, num_hidden_layers=1, head_dim=2)
    tokens, real, where = join([[1, 2, 3], [4]], [[5, 6], [1, 2, 0]])
    generator = torch.Generator().manual_seed(0)
    old, advantages, returns = (
        torch.randn(tokens.shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    policy, critic = lm(1, **shape), scalar_model(lm(2, **shape), generator)
    old = old * 0.1 + logprobs(policy, tokens, real, where).detach()
    assert gradcheck(
        policy,
        lambda m: policy_loss(logprobs(m, tokens, real, where, 0.7), old, advantages, where, 0.2)[
            0
        ],
    )
    critic.config.reward_mean, critic.config.reward_std = 0.3, 2.0
    assert gradcheck(
        critic, lambda m: value_loss(values_of(m, tokens, real), old, returns, where, 0.2)
    )


# ---------------------------------------------------------------- KL
def toy(seed):
    """log-probabilities of a first token (3,) and of a second after it (3,3); token 0 ends an
    answer.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.log_softmax(torch.randn(*shape, generator=generator, dtype=torch.float64) * 1.5, -1)
        for shape in ((3,), (3, 3))
    ]


def test_k1_and_k3_are_unbiased_estimates_of_the_exact_kl_in_the_right_direction():
    answers = [(0,), *itertools.product((1, 2), range(3))]
    (p1, p2), (q1, q2) = toy(0), toy(1)
    table = {}
    for name, (one, two) in dict(p=(p1, p2), q=(q1, q2)).items():
        table[name] = torch.tensor(
            [[one[a[0]], two[a[0], a[1]] if len(a) > 1 else NAN] for a in answers]
        )
    mask = ~table["p"].isnan()
    p, q = (torch.where(mask, table[k], 0.0).sum(1) for k in "pq")
    assert p.exp().sum() == pytest.approx(1)
    exact, other_way = (p.exp() * (p - q)).sum().item(), (q.exp() * (q - p)).sum().item()
    assert abs(exact - other_way) > 0.1
    each = [kl_estimates(table["p"][[i]], table["q"][[i]], mask[[i]]) for i in range(len(answers))]
    k1, k3 = (torch.stack(k) for k in zip(*each, strict=True))
    assert (p.exp() * k1).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p.exp() * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (k1 < 0).any() and (k3 >= 0).all()


def test_kl_is_summed_over_an_answer_and_0_between_equals():
    old, ref = random(2, NAN)
    k1, k3 = kl_estimates(old, ref, MASK)
    d = [[a - b for a, b in zip(x, y, strict=True)] for x, y in rows(old, ref)]
    assert k1.item() == pytest.approx(sum(map(sum, d)) / len(MASK))
    assert k3.item() == pytest.approx(
        sum(math.exp(-x) - 1 + x for row in d for x in row) / len(MASK)
    )
    assert kl_estimates(old, old, MASK) == (0, 0)


def test_beta_follows_the_target():
    # at most 20 % a horizon up
    assert adapt(0.2, 9.0, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 + 0.2 * 0.01))
    assert adapt(0.2, 0.0, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 - 0.2 * 0.01))  # and down
    assert adapt(0.2, 6.6, 6.0, 100, 10_000) == pytest.approx(0.2 * (1 + 0.1 * 0.01))
    assert adapt(0.2, 6.0, 6.0, 100, 10_000) == adapt(0.2, 99.0, 0.0, 100, 10_000) == 0.2


@pytest.mark.parametrize("answers, horizon", [(64, 10.0), (128, 1.0), (1, 1e-3), (10, 10.0)])
def test_beta_is_never_negative_however_short_the_horizon(answers, horizon):
    assert adapt(0.2, 99.0, 6.0, answers, horizon) == pytest.approx(0.2 * 1.2)
    beta = 0.2
    for _ in range(50):
        beta = adapt(beta, -1.0, 6.0, answers, horizon)  # k1 can be negative
    assert beta == pytest.approx(0.2 * 0.8**50)


@pytest.mark.parametrize("parts", [(12,), (5, 7), (1, 1, 10), (0, 4, 0, 8)])
def test_the_running_deviation_is_that_of_all_scores(parts):
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 30 + 50
    seen = 0, 0.0, 0.0
    for part in scores.split(list(parts)):
        seen = ppo.running(json.loads(json.dumps(seen)), part)  # as the saved state holds it
    n, mean, _ = seen
    assert n == 12 and mean == pytest.approx(scores.double().mean().item())
    assert ppo.deviation(seen) == pytest.approx(scores.double().std(unbiased=False).item())


@pytest.mark.parametrize("score", [0.0, 0.1, -7.3, 1e30])
def test_scores_that_do_not_differ_are_divided_by_1(score):
    seen = 0, 0.0, 0.0
    assert ppo.deviation(seen) == 1.0
    for n in (3, 1, 7, 128):
        seen = ppo.running(seen, torch.full((n,), score))
        assert ppo.deviation(seen) == 1.0
    # of the same sum in another order
    noisy = torch.nextafter(torch.tensor(score), torch.tensor(math.inf)).view(1)
    assert not score or ppo.deviation(ppo.running(seen, noisy)) == 1.0
    other = torch.tensor([score + 1.0 if score < 1 else 2 * score])
    assert ppo.deviation(ppo.running(seen, other)) != 1.0


def test_explained_variance():
    values, returns = random(2, NAN)
    v, r = (torch.tensor(flat(x), dtype=torch.float64) for x in (values, returns))
    expected = 1 - (r - v).var(unbiased=False) / r.var(unbiased=False)
    assert explained_variance(values, returns, MASK).item() == pytest.approx(expected.item())
    assert explained_variance(returns, returns, MASK) == 1
    assert explained_variance(torch.full_like(returns, 7.0), returns, MASK).item() == pytest.approx(
        0
    )


# ---------------------------------------------------------------- values and rewards of a model
@pytest.fixture(scope="module")
def critic():
    model = scalar_model(lm(4), torch.Generator().manual_seed(0))
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    return model


@torch.no_grad()
def test_a_value_is_read_before_its_token(critic):
    tokens, real, _ = join([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    values = values_of(critic, tokens, real)
    for i, row in enumerate(tokens.tolist()):
        n = int(real[i].sum())
        for t in range(1, n):  # the score of what comes before it, in standard deviations
            before = torch.tensor([row[:t]])
            expected = (last_score(critic, before, torch.ones_like(before).bool()) - 0.25) / 2.0
            assert abs(values[i, t] - expected.item()) < 1e-5
        for t in range(1, n):
            other = tokens.clone()
            other[i, t] = 99
            change = (values_of(critic, other, real) - values)[i, :n].abs()
            assert (change[: t + 1] < 1e-6).all() and (change[t + 1 :] > 1e-6).all()


def test_a_reward_models_folder_scores_in_its_own_standard_deviations(tmp_path, critic):
    hub.save(tmp_path / "rm", critic, chat_tokenizer())
    o = ppo.Options(reward=str(tmp_path / "rm"))
    judge, model = ppo.load_reward(o, None, chat_tokenizer(), "cpu")
    assert tuning.critic_of(o, model) is not model
    tokens, real, _ = join([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    assert torch.allclose(
        judge(tokens, real, None, None), (last_score(critic, tokens, real) - 0.25) / 2.0
    )
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="--raw-reward is for FILE.py:function"):
        ppo.load_reward(
            ppo.Options(reward=str(tmp_path / "rm"), raw_reward=True), None, chat_tokenizer(), "cpu"
        )


@pytest.mark.parametrize("mean, std", [(0.25, 0.0), (0.25, 1e-7), (300.0, 1e-3)])
def test_a_reward_model_whose_references_score_alike_is_refused(tmp_path, mean, std):
    model = scalar_model(lm(4))
    model.config.reward_mean, model.config.reward_std = mean, std
    hub.save(tmp_path / "rm", model, chat_tokenizer())
    with pytest.raises(ValueError, match="rm: the scores of the reference answers do not differ"):
        ppo.load_reward(ppo.Options(reward=str(tmp_path / "rm")), None, chat_tokenizer(), "cpu")


def test_prompts_leave_room_in_the_reward_models_context_too(tmp_path, capsys):
    model = scalar_model(lm(4, max_position_embeddings=32))
    hub.save(tmp_path / "rm", model, chat_tokenizer())
    data = write(
        tmp_path / "prompts.jsonl", [{"messages": user("x")}, {"messages": user("x " * 40)}]
    )
    ppo.ppo(
        ppo.Options(
            model=folder(tmp_path / "start"),
            reward=str(tmp_path / "rm"),
            data=data,
            out=str(tmp_path / "out"),
            device="cpu",
            batch=2,
            minibatch=2,
            iterations=1,
            max_new_tokens=4,
        )
    )
    assert "1 prompts used, dropped 1 longer than 28 tokens" in capsys.readouterr().err


# ---------------------------------------------------------------- the loop
FIRST, AFTER = [1.0, 0.5, 0.0, -0.5, 0.5], [0.3, 0.0, -0.3, -0.6, 1.0]
SCORES = {text: len(text) + 0.125 * text.count("a") for text, _, _ in answers_of()} | {"": -3.0}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**options) → what a short run of ppo() fed to its estimators and losses, call by call,
    and its log.
    """
    start = bandit(tmp_path / "start", FIRST, AFTER)
    judge = tmp_path / "judge.py"
    judge.write_text(
        f"def judge(prompts, answers):\n    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        f"    return [{SCORES}.get(a, 1000.0) for a in answers]\n"
    )
    data = write(
        tmp_path / "prompts.jsonl",
        [{"messages": user(text)} for text in ("x", "what is one", "ab", "hm?", "a b c")],
    )

    def run(**options):
        calls = {
            name: []
            for name in (
                "gae",
                "whiten",
                "policy_loss",
                "value_loss",
                "generate",
                "kl_estimates",
                "join",
            )
        }
        with monkeypatch.context() as m:
            for name in calls:
                real = getattr(ppo, name)

                def spy(*args, real=real, name=name, **kwargs):
                    out = real(*args, **kwargs)
                    calls[name].append((args, kwargs, out))
                    return out

                m.setattr(ppo, name, spy)
            o = ppo.Options(
                model=start,
                reward=f"{judge}:judge",
                data=data,
                out=str(tmp_path / "out"),
                device="cpu",
                overwrite=True,
            )
            o.batch, o.minibatch, o.iterations, o.max_new_tokens, o.lr, o.warmup, o.kl = (
                24,
                8,
                3,
                2,
                0.05,
                0,
                0.3,
            )
            o.raw_reward = True
            vars(o).update(options)
            ppo.ppo(o)
        calls["start"] = start
        return calls, metrics(tmp_path / "out")

    return run


def test_rewards_are_the_kl_of_each_token_and_the_score_on_the_last(run):
    calls, log = run()
    reference, tok = hub.load(calls["start"])
    end = templates.end_id(tok)
    unfinished = 0
    for it in range(3):
        (asked, answers), _, (tokens, real, mask) = (
            calls["join"][it][0][:2],
            None,
            calls["join"][it][2],
        )
        (rewards, values, used, gamma, lam), _, (advantages, returns) = calls["gae"][it]
        old, ref, _ = calls["kl_estimates"][it][0]
        assert torch.equal(used, mask) and (gamma, lam) == (1.0, 0.95)
        assert torch.allclose(ref, logprobs(reference, tokens, real, mask), atol=1e-5)
        assert (mask.sum(1) == torch.tensor([len(a) for a in answers])).all()
        for i, a in enumerate(answers):
            where = list(range(len(asked[i]), len(asked[i]) + len(a)))
            assert mask[i].nonzero().squeeze(1).tolist() == where and tokens[i, where].tolist() == a
            expected = -0.3 * (old - ref)[i, where]
            text = tok.decode(a, skip_special=True)
            # instead of its score, which would be 1000
            expected[-1] += SCORES[text] if a[-1] == end else -1.0
            unfinished += a[-1] != end
            assert torch.allclose(rewards[i, where], expected, atol=1e-5)
            assert (rewards[i, ~mask[i]] == 0).all()
        assert log[it]["finished"] == pytest.approx(
            sum(a[-1] == end for a in answers) / 24, abs=1e-5
        )
        assert log[it]["length"] == pytest.approx(sum(map(len, answers)) / 24, abs=1e-5)
        kl = (old - ref).sum(1).mean().item()
        assert log[it]["kl"] == pytest.approx(kl, abs=1e-5) and (it == 0) == (abs(kl) < 1e-6)
    assert unfinished > 5


def test_advantages_are_whitened_over_the_round_and_every_loss_sees_the_rollouts_figures(run):
    calls, _ = run(epochs=2)
    for it in range(3):
        (_, values, mask, _, _), _, (advantages, returns) = calls["gae"][it]
        (raw, used), _, white = calls["whiten"][it]
        assert torch.equal(raw, advantages) and torch.equal(used, mask)
        assert abs(masked_mean(white, mask)) < 1e-5 and abs(masked_mean(white**2, mask) - 1) < 1e-3
        old = calls["kl_estimates"][it][0][0]
        for epoch in range(2):  # each answer once an epoch; the same old figures in each
            mine = slice((it * 2 + epoch) * 3, (it * 2 + epoch + 1) * 3)
            policy, critic = calls["policy_loss"][mine], calls["value_loss"][mine]
            for found, whole in (
                ([c[0][1] for c in policy], old),
                ([c[0][2] for c in policy], white),
                ([c[0][3] for c in policy], mask),
                ([c[0][1] for c in critic], values),
                ([c[0][2] for c in critic], returns),
                ([c[0][3] for c in critic], mask),
            ):
                assert sorted(torch.cat(found).tolist()) == sorted(whole.tolist())
            assert {c[0][4] for c in (*policy, *critic)} == {0.2}


def test_an_update_follows_the_two_losses_and_nothing_else(run, monkeypatch):
    """KL is paid once, in the rewards: no term of it, of entropy or of anything else in the
    gradient of any update.
    """
    models, expected, compared = {}, [], []

    def remember(name, place):
        real = getattr(ppo, name)
        monkeypatch.setattr(
            ppo,
            name,
            lambda model, *a, **k: models.__setitem__(place, model) or real(model, *a, **k),
        )

    def differentiate(name, place, weight):
        real = getattr(ppo, name)

        def loss(*args):
            out = real(*args)
            parameters = list(models[place].parameters())
            pg = out[0] if isinstance(out, tuple) else out * weight
            expected.append(torch.autograd.grad(pg, parameters, retain_graph=True))
            return out

        monkeypatch.setattr(ppo, name, loss)

    def clip(parameters, limit):
        for p, g in zip(parameters, expected.pop(0), strict=True):
            compared.append((p.grad - g).abs().max().item())
        assert limit == 1.0

    for name, place in (("logprobs", "policy"), ("values_of", "critic")):
        remember(name, place)
    differentiate("policy_loss", "policy", 1.0)
    differentiate("value_loss", "critic", 0.25)
    monkeypatch.setattr(ppo, "clip_grad_norm_", clip)
    run(vf=0.25)
    assert expected == [] and len(compared) > 100 and max(compared) < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_ratio_1_clip_fraction_0_and_kl_0_before_the_first_update(run, temperature):
    calls, log = run(temperature=temperature, iterations=2)
    (new, old, _, mask, _), _, (loss, clipped) = calls["policy_loss"][0]
    assert (torch.exp(new - old)[mask] - 1).abs().max() < 1e-5 and clipped == 0
    assert log[0]["kl"] == log[0]["kl_k3"] == 0 and all(line["ratio_error"] < 1e-5 for line in log)
    first = calls["value_loss"][0][0]
    # the critic too is the one of the rollout
    assert (first[0] - first[1])[mask].abs().max() < 1e-5
    assert abs(log[1]["kl"]) > 1e-3
    assert all(c[0][3] == temperature for c in calls["generate"])
    (tokens, real, where), reference = calls["join"][0][2], hub.load(calls["start"])[0]
    old, ref, _ = calls["kl_estimates"][0][0]
    assert torch.equal(old, ref) and torch.allclose(
        old, logprobs(reference, tokens, real, where, temperature), atol=1e-5
    )


def test_answers_are_sampled_from_the_policy_as_it_is(run):
    calls, _ = run(iterations=2)
    for args, kwargs, _ in calls["generate"]:
        # no top-p, no top-k
        assert len(args) == 4 and set(kwargs) == {"eos_id", "seed"} and kwargs["eos_id"] == [279]
    assert calls["generate"][0][1]["seed"] != calls["generate"][1][1]["seed"]
    assert calls["generate"][0][2] != calls["generate"][1][2]


def test_the_adaptive_beta_is_what_the_next_round_pays(run):
    calls, log = run(target_kl=0.01, horizon=24.0, iterations=4)
    assert log[0]["beta"] == pytest.approx(0.3 * 0.8, abs=1e-6)  # no KL yet: 20 % down
    for it in range(1, 4):
        paid = log[it - 1]["beta"]
        assert log[it]["beta"] == pytest.approx(
            adapt(paid, log[it]["kl"], 0.01, 24, 24.0), abs=1e-5
        )
        rewards, _, mask, _, _ = calls["gae"][it][0]
        old, ref, _ = calls["kl_estimates"][it][0]
        inner = mask.clone()
        inner[torch.arange(24), calls["join"][it][2][1].sum(1) - 1] = False
        assert torch.allclose(rewards[inner], -paid * (old - ref)[inner], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("wrong", [(0, 3), (3, 6), (6, 99)], ids=["rollout", "reference", "update"])
def test_a_temperature_that_is_wrong_by_1_percent_in_one_place_is_refused(
    run, monkeypatch, wrong, temperature
):
    """Of the first iteration's log-probabilities three calls are π's, three π_ref's, then come the
    update's. (The sampler's own temperature:
    test_ratio_1_clip_fraction_0_and_kl_0_before_the_first_update.)"""
    real, calls = ppo.logprobs, []

    def logprobs(*rows, temperature):
        calls.append(1)
        return real(
            *rows, temperature=temperature * (1.01 if wrong[0] < len(calls) <= wrong[1] else 1.0)
        )

    monkeypatch.setattr(ppo, "logprobs", logprobs)
    with pytest.raises(
        ValueError,
        match=(
            r"the ratio is off 1 by [1-9]\.\de-0[123] before the first update \(1e-03 is"
            r" allowed\): "
        ),
    ):
        run(temperature=temperature)


def test_rounding_passes_and_more_is_refused_but_not_on_a_gpu():
    old, off = -torch.rand(3, 5), torch.zeros(3, 5)
    for error in (0.0, 6e-5, -9e-4):
        off[1, 2] = error
        assert ppo.check_ratio(old + off, old, torch.device("cpu")) == pytest.approx(
            abs(error), rel=0.02, abs=1e-7
        )
    for error in (2e-3, -2e-3, math.nan, math.inf):
        off[1, 2] = error
        with pytest.raises(ValueError, match="1e-03 is allowed"):
            ppo.check_ratio(old + off, old, torch.device("cpu"))
    off[1, 2] = 0.05
    assert ppo.check_ratio(old + off, old, torch.device("cuda")) == pytest.approx(0.05, rel=0.05)


# ---------------------------------------------------------------- a reader's own reward
def test_a_readers_rewards_are_divided_by_the_deviation_of_all_so_far(run):
    calls, log = run(raw_reward=False, kl=0.0, no_end_score=-0.75, lr=0.005)
    tok, so_far, plain = chat_tokenizer(), [], []
    for it in range(3):
        answers = calls["join"][it][0][1]
        ended = [a[-1] == templates.end_id(tok) for a in answers]
        scores = [SCORES.get(tok.decode(a, skip_special=True)) for a in answers]
        # no others: theirs are never used
        so_far += [s for s, e in zip(scores, ended, strict=True) if e]
        std = torch.tensor(so_far, dtype=torch.float64).std(unbiased=False).item()
        rewards = calls["gae"][it][0][0].sum(1)
        expected = [s / std if e else -0.75 for s, e in zip(scores, ended, strict=True)]
        assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
        assert log[it]["reward"] == pytest.approx(sum(expected) / 24, abs=1e-5)
        plain.append(std)
    assert not all(ended) and len(set(plain)) == 3 and min(plain) > 1.1


def test_rewards_of_0_to_100_train_what_rewards_of_0_to_1_train(tmp_path):
    """A scale of two is exact in binary: the two runs are the same, bit for bit."""
    start = bandit(tmp_path / "start", FIRST, AFTER)
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def one(prompts, answers):\n    return [len(a) + a.count('a') for a in answers]\n"
        "def more(prompts, answers):\n    return [128 * s for s in one(prompts, answers)]\n"
    )
    data = write(tmp_path / "prompts.jsonl", [{"messages": user("x")}])
    for raw in (False, True):
        for name in ("one", "more"):
            ppo.ppo(
                ppo.Options(
                    model=start,
                    reward=f"{judge}:{name}",
                    data=data,
                    out=f"{tmp_path}/{name}",
                    device="cpu",
                    batch=12,
                    minibatch=6,
                    iterations=3,
                    max_new_tokens=2,
                    lr=0.01,
                    raw_reward=raw,
                    overwrite=True,
                )
            )
        weights = {(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "more")}
        assert len(weights) == (2 if raw else 1)


def test_the_deviation_is_part_of_the_saved_state(tmp_path, monkeypatch):
    start = bandit(tmp_path / "start", FIRST, AFTER)
    judge = tmp_path / "judge.py"
    judge.write_text(
        "def judge(prompts, answers):\n    return [50 + 9 * len(a) for a in answers]\n"
    )
    data = write(tmp_path / "prompts.jsonl", [{"messages": user("x")}])
    o = dict(
        model=start,
        reward=f"{judge}:judge",
        data=data,
        device="cpu",
        batch=8,
        minibatch=8,
        iterations=4,
        max_new_tokens=2,
    )
    o |= dict(save_every=1, target_kl=0.01, horizon=20.0)
    ppo.ppo(ppo.Options(out=str(tmp_path / "whole"), **o))
    real = ppo.Run.save

    def stop(run, it, **extra):
        real(run, it, **extra)
        if it == 1:
            raise KeyboardInterrupt

    broken = ppo.Options(out=str(tmp_path / "broken"), **o)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(ppo.Run, "save", stop)
        ppo.ppo(broken)
    ppo.ppo(broken)
    a, b = (
        [
            {k: v for k, v in line.items() if k != "tokens_per_second"}
            for line in metrics(tmp_path / n)
        ]
        for n in ("whole", "broken")
    )
    assert a == b and len(a) == 4
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "broken/model.safetensors"
    ).read_bytes()


READERS = """
import sys
import numpy, torch
def ints(prompts, answers): return [len(a) for a in answers]
def array(prompts, answers): return numpy.array(ints(prompts, answers))
def tensor(prompts, answers): return torch.tensor(ints(prompts, answers))[:, None]
def generator(prompts, answers): return (s for s in ints(prompts, answers))
def careless(prompts, answers):
    for p in prompts:
        p.append({"role": "assistant", "content": "mine"})
    return [-100 if len(p) > 2 else s for p, s in zip(prompts, ints(prompts, answers))]
def verified(prompts, answers, records):
    for p, r in zip(prompts, records):
        assert set(r) == {"messages", "ids", "reference"} and r["messages"] == p
    mine = [r["reference"] == "yes" and r["ids"] == "mine" for r in records]
    return [len(a) * m for a, m in zip(answers, mine)]
class Verifier:
    def __call__(self, prompts, answers, records=None): return verified(prompts, answers, records)
verifier = Verifier()
def other(prompts, answers, scale=1.0): return [scale * s for s in ints(prompts, answers)]
def leaves(prompts, answers): sys.exit(0)
def huge(prompts, answers): return [1e39] * len(answers)
def equal(prompts, answers): return [42] * len(answers)
def negative(prompts, answers): return [-9 - s for s in ints(prompts, answers)]
"""


@pytest.fixture
def own(tmp_path):
    """own(function, **options) → the log of a run with one of READERS."""
    start, judge = bandit(tmp_path / "start", FIRST, AFTER), tmp_path / "judge.py"
    judge.write_text(READERS)
    rows = [{"messages": user(text), "ids": "mine", "reference": "yes"} for text in ("x", "hm?")]
    data = write(tmp_path / "prompts.jsonl", rows)

    def own(function, **options):
        o = (
            dict(
                batch=6,
                minibatch=4,
                iterations=2,
                max_new_tokens=2,
                lr=0.01,
                device="cpu",
                overwrite=True,
            )
            | options
        )
        ppo.ppo(
            ppo.Options(
                model=start, reward=f"{judge}:{function}", data=data, out=str(tmp_path / "out"), **o
            )
        )
        return [
            {k: v for k, v in line.items() if k != "tokens_per_second"}
            for line in metrics(tmp_path / "out")
        ]

    return own


def test_a_readers_function_may_return_and_take_what_it_likes(own):
    expected = own("ints")
    for name in ("array", "tensor", "generator", "careless", "verified", "verifier", "other"):
        assert own(name) == expected, name


def test_a_readers_function_that_cannot_be_used_is_refused(own, tmp_path):
    with pytest.raises(ValueError, match=r"judge.py:\d+: SystemExit: 0"):
        own("leaves")
    with pytest.raises(ValueError, match="judge.py:huge: a score is inf in float32"):
        own("huge")
    with pytest.raises(ValueError, match="--target-kl .* --kl above 0"):
        own("ints", kl=0.0, target_kl=6.0)
    assert not (tmp_path / "out" / "config.json").exists()


def test_rewards_without_spread_and_below_no_end_score(own, capsys):
    assert [line["reward"] for line in own("equal", no_end_score=42.0)] == [42.0] * 2
    assert "warning" not in capsys.readouterr().out
    own("negative")
    assert "warning: an answer without an end gets -1, the others get -" in capsys.readouterr().out


# ---------------------------------------------------------------- every shape of a round
@pytest.mark.parametrize("first", [FIRST, [-9.0, -9.0, -9.0, -9.0, 9.0]], ids=["answers", "empty"])
def test_a_round_of_any_shape_ends(tmp_path, first, capsys):
    start, judge = bandit(tmp_path / "start", first, AFTER), tmp_path / "judge.py"
    judge.write_text("def judge(prompts, answers):\n    return [len(a) for a in answers]\n")
    texts = ("x", "what is one and two", "ab", "hm?", "a b c")
    for n, batch, minibatch, room in (
        (2, 1, 1, 1),  # one token in all
        (2, 2, 32, 2),  # a minibatch larger than the batch
        (2, 7, 2, 1),  # answers of one token, a batch that is no multiple of the minibatch
        (2, 3, 3, 2),
        (5, 5, 4, 2),
        (5, 7, 3, 9),  # cut answers and finished ones
        (1, 6, 6, 3),
    ):
        data = write(tmp_path / "prompts.jsonl", [{"messages": user(text)} for text in texts[:n]])
        o = dict(
            batch=batch,
            minibatch=minibatch,
            max_new_tokens=room,
            iterations=2,
            lr=0.01,
            target_kl=1.0,
        )
        o |= dict(model=start, reward=f"{judge}:judge", data=data, device="cpu", overwrite=True)
        ppo.ppo(ppo.Options(out=str(tmp_path / "out"), **o))
        log = metrics(tmp_path / "out")
        assert len(log) == 2 and all(
            line["ratio_error"] < 1e-4 and 1 <= line["length"] <= room for line in log
        )
        hub.language_model(tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        dict(gamma=0.5),
        dict(lam=0.0),
        dict(lam=1.0),
        dict(epochs=4),
        dict(temperature=0.3),
        dict(temperature=30.0),
        dict(kl=0.0),
        dict(vf=0.0),
        dict(clip=1.5),
        dict(clip=1e-6),
        dict(target_kl=6.0, horizon=1.0),
        dict(iterations=1, warmup=9),
        dict(no_end_score=0.0),
    ],
    ids=str,
)
def test_options_at_their_ends(own, options):
    for line in own("ints", **options):
        assert line["ratio_error"] < 1e-4 and line["beta"] >= 0
        assert line["value_loss"] >= 0 and 0 <= line["clip_fraction"] <= 1


def test_only_policy_and_critic_learn(tmp_path, critic):
    tok = chat_tokenizer()
    hub.save(tmp_path / "rm", critic, tok)
    start = folder(tmp_path / "start")
    before = {
        name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("rm", "start")
    }
    data = write(tmp_path / "prompts.jsonl", [{"messages": user("x")}])
    o = ppo.Options(
        model=start, reward=str(tmp_path / "rm"), data=data, out=str(tmp_path / "out"), device="cpu"
    )
    o.batch, o.minibatch, o.iterations, o.max_new_tokens = 4, 4, 2, 4
    ppo.ppo(o)
    assert before == {
        name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("rm", "start")
    }
    trained, _ = hub.load(tmp_path / "out")
    assert trained.config.num_labels == 0
    assert all(
        not torch.equal(p, q)
        for p, q in zip(trained.parameters(), hub.load(start)[0].parameters(), strict=True)
    )
    assert metrics(tmp_path / "out")[0]["ratio_error"] < 1e-5

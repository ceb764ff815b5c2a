"""PPO and DPO on a bandit whose optimum is known: over all answers y, π*(y) = π_ref(y) exp(r(y)/β)
/ Z (Rafailov et al. 2023, eq. 4).

Rising reward proves little: PPO learns with wrong advantages, a KL of the wrong sign or a forgotten
temperature too, only something else. Here the stages themselves run, from a checkpoint folder to a
checkpoint folder, and every answer's probability is compared.
"""

import itertools
import math

import pytest
import torch
from tiny import answers_of, bandit, chat_tokenizer, lm, metrics, user, write

import dpo
import ppo
from common import hub
from data import templates
from model import logprobs, scalar_model, score

# logits of a, b, c, d, end: an answer's first token, its second
FIRST, AFTER = [1.0, 0.5, 0.0, -0.5, 0.5], [0.3, 0.0, -0.3, -0.6, 2.0]
ANSWERS = answers_of()


@pytest.fixture
def start(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small threads only wait for each other
    yield bandit(tmp_path / "start", FIRST, AFTER)
    torch.set_num_threads(threads)


def prompt_ids():
    return templates.render(chat_tokenizer(), user("x"), add_generation_prompt=True)[0]


@torch.no_grad()
def probabilities(folder, answers, temperature=1.0):
    """Of each answer (ids), in float64."""
    model, _ = hub.load(folder)
    logps = logprobs(model, [prompt_ids()] * len(answers), answers, temperature)
    return logps.double().sum(1).exp()


def optimum(reference, reward, beta):
    p = reference * torch.exp(torch.as_tensor(reward, dtype=torch.float64) / beta)
    return p / p.sum()


def distance(p, q):
    """Total variation: the largest difference in the probability of any event."""
    return ((p - q).abs().sum() / 2).item()


# ---------------------------------------------------------------- PPO
def ppo_reaches(tmp_path, start, judge, reward, **options):
    """Runs ppo.py; reward: what each of ANSWERS earns."""
    data = write(tmp_path / "prompts.jsonl", [{"messages": user("x")}])
    settings = (
        dict(
            kl_coef=0.7,
            iterations=40,
            batch=128,
            minibatch=64,
            lr=1e-2,
            max_new_tokens=2,
            device="cpu",
        )
        | options
    )
    o = ppo.Options(model=start, reward=judge, data=data, out=str(tmp_path / "ppo"), **settings)
    ppo.ppo(o)
    ids = [a for _, a, _ in ANSWERS]
    reference, got = (probabilities(f, ids, o.temperature) for f in (start, o.out))
    # these are all the answers there are
    assert abs(reference.sum() - 1) < 1e-5 and abs(got.sum() - 1) < 1e-4
    best = optimum(reference, reward, o.kl_coef)
    for wrong in (
        reference,
        optimum(reference, reward, 2 * o.kl_coef),
        optimum(reference, reward, o.kl_coef / 2),
        optimum(reference, reward, -o.kl_coef),
    ):
        assert distance(best, wrong) > 0.1  # what the test could be fooled by
    assert distance(got, best) < 0.03
    log = metrics(tmp_path / "ppo")
    exact = (got * (got / reference).log()).sum().item()
    assert (
        abs(sum(line["kl"] for line in log[-5:]) / 5 - exact) < 0.15
        and log[-1]["explained_variance"] > 0.9
    )
    assert (log[0]["kl"], log[0]["kl_k3"]) == (0, 0) and max(
        line["ratio_error"] for line in log
    ) < 1e-5


def test_ppo_against_a_reward_model(tmp_path, start):
    model, tok = (
        scalar_model(lm(5, std=0.25, num_hidden_layers=1), torch.Generator().manual_seed(0)),
        chat_tokenizer(),
    )
    with torch.no_grad():
        raw = score(model, [prompt_ids()] * len(ANSWERS), [a for _, a, _ in ANSWERS]).double()
    ended = torch.tensor([e for _, _, e in ANSWERS])
    model.config.reward_mean, model.config.reward_std = (
        raw[ended].mean().item() - 0.5,
        raw[ended].std().item(),
    )
    hub.save(tmp_path / "rm", model, tok)
    scores = (raw - model.config.reward_mean) / model.config.reward_std
    ppo_reaches(
        tmp_path, start, str(tmp_path / "rm"), torch.where(ended, scores, -0.75), no_end_score=-0.75
    )


def test_ppo_against_a_function_at_another_temperature(tmp_path, start):
    scores = {"": 0.5, "a": -0.5, "b": 1.0, "c": 0.0, "d": 1.5}
    judge = tmp_path / "judge.py"
    judge.write_text(
        f"def judge(prompts, answers):\n    return [{scores}.get(a, 9.0) for a in answers]\n"
    )
    reward = [scores[text] if ended else -1.0 for text, _, ended in ANSWERS]
    ppo_reaches(
        tmp_path, start, f"{judge}:judge", reward, raw_reward=True, temperature=0.6, lam=0.5, seed=1
    )


# ---------------------------------------------------------------- DPO
def preferences(path, rewards, n):
    """{answer: reward} → n records of each pair of answers, as many each way as Bradley and Terry
    expect.
    """
    rows = []
    for (a, ra), (b, rb) in itertools.combinations(rewards.items(), 2):
        won = n / (1 + math.exp(rb - ra))
        assert abs(won - round(won)) < 1e-9
        rows += [(a, b)] * round(won) + [(b, a)] * (n - round(won))
    return write(path, [{"prompt": user("x"), "chosen": w, "rejected": l} for w, l in rows]), len(
        rows
    )


def trained(tmp_path, start, rewards, n, **options):
    """dpo.py on such preferences, each step on all of them → the answers' probabilities before and
    after.
    """
    data, size = preferences(tmp_path / "pairs.jsonl", rewards, n)
    dpo.dpo(
        dpo.Options(
            model=start,
            data=data,
            out=str(tmp_path / "dpo"),
            batch=1,
            warmup=3,
            device="cpu",
            **options,
        )
    )
    tok = chat_tokenizer()
    ids = [[*tok.encode(a), templates.end_id(tok)] for a in rewards]
    return probabilities(start, ids), probabilities(tmp_path / "dpo", ids)


def test_dpo_reaches_the_optimum_of_the_rewards_behind_its_preferences(tmp_path, start):
    rewards, beta = {"a": 0.0, "b": math.log(3), "c": math.log(9), "d": math.log(3)}, 0.7
    reference, got = trained(tmp_path, start, rewards, 20, beta=beta, steps=50, lr=2e-2)
    # what is left to all other answers no pair decides
    reference, got = reference / reference.sum(), got / got.sum()
    best = optimum(reference, list(rewards.values()), beta)
    for wrong in (
        reference,
        optimum(reference, list(rewards.values()), 2 * beta),
        optimum(reference, list(rewards.values()), beta / 2),
    ):
        assert distance(best, wrong) > 0.1
    assert distance(got, best) < 0.02
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def solve(f):
    """The root of a falling function."""
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "loss, options", [("ipo", {}), ("dpo", {"label_smoothing": 0.1}), ("simpo", {"gamma": 0.5})]
)
def test_its_kin_reach_the_minimum_of_their_own_losses(tmp_path, start, loss, options):
    """Answer b is preferred to ad in three of four pairs: the minimum over the one free number,
    their difference, is known.
    """
    beta = 0.5
    reference, got = trained(
        tmp_path,
        start,
        {"ad": 0.0, "b": math.log(3)},
        4,
        beta=beta,
        steps=60,
        lr=1e-2,
        loss=loss,
        **options,
    )
    if loss == "simpo":  # means over 3 and 2 tokens, no reference
        found = (got[1].log() / 2 - got[0].log() / 3).item()
        expected = solve(lambda m: 0.75 * sigmoid(0.5 - beta * m) - 0.25 * sigmoid(0.5 + beta * m))
    else:
        found = ((got / reference)[1].log() - (got / reference)[0].log()).item()
        expected = (0.75 - 0.25) / (2 * beta) if loss == "ipo" else math.log(0.7 / 0.3) / beta
    assert found == pytest.approx(expected, abs=0.05)

"""A step reads nothing that a GPU would have to finish first: on the meta device, where a tensor
has a shape and no numbers, any reading of numbers raises."""

import contextlib
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import lm, ragged
from torch.nn.utils import clip_grad_norm_
from torch.utils._python_dispatch import TorchDispatchMode

import dpo
import ppo
import reward
import sampling as S
import sft
from model import scalar_model
from packing import pack

PROMPTS = ragged((9, 4, 4, 12), 3)
ANSWERS = ragged((5, 3, 6, 1), 4)


def pieces(device):
    """A language model and a scalar one on the device, small and alike in all tests."""
    model = lm()
    return model.to(device), scalar_model(lm(1), torch.Generator()).to(device)


def step(loss, *models):
    """What every stage's loop does with a loss; the optimizer is torch's own."""
    loss.backward()
    return [clip_grad_norm_(model.parameters(), 1.0) for model in models]


def supervised(device):
    model, _ = pieces(device)
    rows = pack([(p + a, [-100] * len(p) + a) for p, a in zip(PROMPTS, ANSWERS, strict=True)], 16)
    return lambda: step(sft.sft_loss(model, *rows), model)


def ranked(device):
    _, model = pieces(device)
    batch = [(PROMPTS[0], ANSWERS, [1, 0, 2, 0]), (PROMPTS[3], ANSWERS[:2], [0, 1])]

    def one():
        scores, ranks = reward.scores_of(model, batch)
        reward.pairs_won(scores.detach(), ranks)
        return step(reward.ranking_loss(scores, ranks), model)

    return one


def preferred(device, loss="dpo"):
    policy, _ = pieces(device)
    o = dpo.Options(loss=loss)
    pairs = [(PROMPTS[0], ANSWERS[0], ANSWERS[1]), (PROMPTS[1], ANSWERS[2], ANSWERS[3])]
    before = [(torch.zeros(1, device=device), torch.zeros(1, device=device))] * 2

    def one():
        if loss == "kto":
            data, at = [[pair] for pair in pairs], dict(enumerate(before))
            z0 = dpo.reference_point(policy, data, at, [0, 1], 2)
            good = torch.tensor([True, False]).to(device)
            losses, _ = dpo.kto_losses_of(policy, pairs, before, good, z0, o)
        else:
            losses, _ = dpo.losses_of(policy, pairs, before, o)
        return step(losses.sum(), policy)

    return one


def rolled_out(device, monkeypatch):
    """PPO's round behind the answers: log-probabilities, rewards, credit, and the update."""
    (policy, critic), tok = pieces(device), tiny.chat_tokenizer()
    o = ppo.Options(minibatch=2, epochs=1, max_new_tokens=6)
    monkeypatch.setattr(ppo, "generate", lambda *_, **__: ANSWERS)
    scorer = lambda *_: torch.zeros(4, device=device)  # noqa: E731
    batch = [({}, ids) for ids in PROMPTS]
    memory, optimizer = SimpleNamespace(batch=lambda **_: None), torch.optim.SGD([torch.zeros(1)])

    def one():
        r = ppo.rollout(policy, policy, scorer, critic, tok, batch, 0.1, 0, o)
        return ppo.update(policy, critic, optimizer, r, memory, 0, o)

    return one


def stage(name, device, monkeypatch):
    if name == "ppo":
        return rolled_out(device, monkeypatch)
    kinds = {"sft": supervised, "reward": ranked, "dpo": preferred}
    return kinds[name](device) if name in kinds else preferred(device, name)


STAGES = ["sft", "reward", "dpo", "simpo", "kto", "ppo"]


@pytest.mark.parametrize("name", STAGES)
def test_a_step_reads_nothing(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # meta: none
    assert stage(name, "meta", monkeypatch)() is not None


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (1.0, 0.9)])
def test_decoding_reads_nothing_but_every_8_steps(temperature, top_p):
    model, _ = pieces("meta")
    steps = S.decode(model, PROMPTS, 20, temperature, top_p, eos_id=[1, 2])
    assert all(next(steps).shape == (4,) for _ in range(7))
    with pytest.raises(RuntimeError, match="meta"):
        next(steps)


def test_a_late_look_says_the_same(monkeypatch):
    """Answers that end between two looks, and rows that are dropped later."""
    model, prompts = tiny.decoder().eval(), ragged([5, 1, 9, 3, 7, 2, 2], 5)
    for temperature, eos in ((0, 8), (1.3, [4, 11, 20, 30]), (1.0, None)):
        expected = S.generate(model, prompts, 21, temperature, eos_id=eos, seed=3)
        monkeypatch.setitem(S.LOOK, "cpu", 8)
        assert S.generate(model, prompts, 21, temperature, eos_id=eos, seed=3) == expected
        monkeypatch.setitem(S.LOOK, "cpu", 1)


@pytest.mark.parametrize("look, longest", [(1, 20), (8, 20), (8, 5), (8, 11)])
@pytest.mark.parametrize("token", [1, 3, 5])
def test_a_late_look_names_the_token(look, longest, token, monkeypatch):
    model, calls = tiny.decoder().eval(), []

    def damage(module, x, y):
        calls.append(1)
        return y * float("nan") if len(calls) == token else y

    model.lm_head.register_forward_hook(damage)
    monkeypatch.setitem(S.LOOK, "cpu", look)
    with pytest.raises(ValueError, match=f"an answer's token {token} are NaN"):
        S.generate(model, PROMPTS, longest)


# ---------------------------------------------------------------- how many kernels a step takes
class Calls(TorchDispatchMode):
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += 1
        return function(*args, **(kwargs or {}))


def calls(function) -> int:
    with Calls() as counted:
        function()
    return counted.n


def decoding_step():
    model, _ = pieces("cpu")
    steps = S.decode(model, PROMPTS, 20)
    next(steps), next(steps)
    return lambda: next(steps)


MOST = dict(sft=506, reward=594, dpo=560, simpo=554, kto=782, ppo=3635, decoding=211)  # two layers


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="counted with torch 2.13")
@pytest.mark.parametrize("name", [*STAGES, "decoding"])
def test_a_step_takes_no_more_operators_than_it_did(name, monkeypatch):
    function = decoding_step() if name == "decoding" else stage(name, "cpu", monkeypatch)
    function()
    found = calls(function)
    assert found <= 1.05 * MOST[name], found

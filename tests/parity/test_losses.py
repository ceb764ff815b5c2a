"""Against live TRL: losses and gradients of pairs of token ids, through transformers' models there
and ours here, from one checkpoint.

TRL's IPO is on means over an answer's tokens, the paper's and ours on sums: fed the means, ours
gives TRL's; CPOTrainer's formula of IPO, fed sums, gives ours. DPOTrainer ignores label smoothing:
cDPO is compared with CPOTrainer's formula of it, fed the log-ratios. Each test prints the largest
difference that it measured (pytest -s).
"""

import sys
from pathlib import Path

import pytest
import torch
from tiny import lm

import dpo
import reward
import sft
from common import hub
from model import scalar_model

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent.parent / "golden"))
from make import TRL, some_pairs  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

PAIRS = some_pairs(11, 12, 277)


def measured(what, ours, theirs, limit):
    difference = (torch.as_tensor(ours) - torch.as_tensor(theirs)).abs().max().item()
    print(f"\n{what}: {difference:.2g}", end=" ")
    assert difference < limit


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """TRL on a policy and a reference, and our models of the same weights."""
    ours, theirs = [lm(1, std=0.2), lm(2, std=0.2)], []
    for i, model in enumerate(ours):
        hub.save(tmp_path_factory.mktemp("m") / str(i), model)
        theirs.append(
            AutoModelForCausalLM.from_pretrained(
                tmp_path_factory.getbasetemp() / f"m{i}" / str(i), dtype=torch.float32
            )
        )
    peer = TRL(*theirs)
    peer.ours = ours
    return peer


def logps(peer):
    """Ours: sums of the policy and of the reference, (2,N) each, and lengths."""
    (*policy, chosen, rejected), (*reference, _, _) = (dpo.sums(m, PAIRS) for m in peer.ours)
    return torch.stack(policy), torch.stack(reference), torch.stack((chosen, rejected))


def test_log_probabilities(peer):
    policy, reference, lengths = logps(peer)
    measured("sums", policy.detach(), peer.logps(PAIRS), 1e-3)
    measured("sums of the reference", reference.detach(), peer.logps(PAIRS, reference=True), 1e-3)
    measured("means", (policy / lengths).detach(), peer.logps(PAIRS, average=True), 1e-4)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_preference_losses(peer, beta):
    policy, reference, lengths = (x.detach() for x in logps(peer))
    ratios = peer.logps(PAIRS) - peer.logps(PAIRS, reference=True)
    measured("dpo", dpo.preference_loss(*policy, *reference, beta)[0], peer.dpo(PAIRS, beta), 1e-3)
    means = dpo.preference_loss(*(policy / lengths), *(reference / lengths), beta, "ipo")[0]
    measured(
        "ipo of means",
        (means / means.abs().max()),
        torch.tensor(peer.dpo(PAIRS, beta, "ipo")) / means.abs().max(),
        1e-4,
    )
    sums, theirs = (
        dpo.preference_loss(*policy, *reference, beta, "ipo")[0],
        torch.tensor(peer.cpo(*ratios, beta, "ipo")),
    )
    measured("ipo of sums", sums / sums.max(), theirs / sums.max(), 1e-4)
    smooth = dpo.preference_loss(*policy, *reference, beta, "dpo", 0.2)[0]
    measured("cdpo", smooth, peer.cpo(*ratios, beta, "sigmoid", label_smoothing=0.2), 1e-3)


@pytest.mark.parametrize("beta, gamma", [(2.0, 1.0), (2.5, 0.0), (10.0, 3.0)])
def test_simpo(peer, beta, gamma):
    policy, _, lengths = (x.detach() for x in logps(peer))
    theirs = peer.cpo(*peer.logps(PAIRS, average=True), beta, gamma=gamma)
    measured("simpo", dpo.simpo_loss(*policy, *lengths, beta, gamma), theirs, 1e-3)


def gradients(ours, theirs, what):
    """Of all parameters, by the hub's names."""
    by_name = dict(theirs.named_parameters())
    pairs = [(p.grad, by_name[hub.hub_name(k)].grad) for k, p in ours.named_parameters()]
    size = max(g.abs().max() for g, _ in pairs)
    measured(what, torch.tensor([(a - b).abs().max() / size for a, b in pairs]), 0.0, 1e-4)


def test_gradients_of_dpo(peer):
    for model in (*peer.ours, peer.trainer.model):
        model.zero_grad()
    policy, reference, _ = logps(peer)
    dpo.preference_loss(*policy, *reference.detach(), 0.1)[0].mean().backward()
    peer.trainer.beta, peer.trainer.loss_types = 0.1, ["sigmoid"]
    peer.trainer._compute_loss(peer.trainer.model, peer.inputs(PAIRS), False).backward()
    gradients(peer.ours[0], peer.trainer.model, "gradients of dpo, as a share of the largest")


def test_gradients_of_sft(peer):
    """transformers' own loss of a padded batch: the mean over all its targets; ours packed."""
    ours, theirs = peer.ours[0], peer.trainer.model
    for model in (ours, theirs):
        model.zero_grad()
    inputs = peer.inputs(PAIRS)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    loss = theirs(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels
    ).loss
    loss.backward()
    examples = [
        ([*p, *a], [-100] * len(p) + a)
        for side in (1, 2)
        for p, a in ((x[0], x[side]) for x in PAIRS)
    ]
    mean = sft.sft_loss(ours, *sft.pack(examples, 64)) / sft.count_targets(examples)
    mean.backward()
    measured("sft", mean.item(), loss.item(), 1e-4)
    gradients(ours, theirs, "gradients of sft, as a share of the largest")


def test_reward_loss(tmp_path):
    ours = scalar_model(lm(3), torch.Generator().manual_seed(0))
    ours.config.pad_token_id = 0
    hub.save(tmp_path / "rm", ours)
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32
    )
    # transformers takes the last id that is not the pad's
    pairs = [tuple([i or 1 for i in ids] for ids in pair) for pair in PAIRS]
    scores, ranks = reward.scores_of(ours, [(p, [r, c], [1, 0]) for p, c, r in pairs])
    measured("reward", reward.ranking_loss(scores, ranks).item(), TRL.reward(theirs, pairs), 1e-4)

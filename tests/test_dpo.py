"""DPO and its kin: start values, hand values, TRL's goldens, log-probabilities by a hand loop, and
what the loop does with them.
"""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from tiny import chat_tokenizer, folder, gradcheck, lm, metrics, user, write

import dpo
from common import hub
from data import templates
from dpo import preference_loss, simpo_loss

GOLDEN = Path(__file__).parent / "golden"
TRL = json.loads((GOLDEN / "losses.json").read_text())


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def hand(model, prompt, answer):
    """log p(answer | prompt), alone and unpadded."""
    logp = torch.log_softmax(model(torch.tensor([prompt + answer]))[0], -1)
    return sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(answer))


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# ---------------------------------------------------------------- the losses
@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_where_policy_and_reference_are_equal(beta):
    chosen, rejected = double(-3.0, -50.0, -7.5), double(-9.0, -2.0, -7.5)
    for smoothing in (0.0, 0.2):
        losses, better, worse = preference_loss(
            chosen, rejected, chosen, rejected, beta, "dpo", smoothing
        )
        assert (
            losses.tolist() == [math.log(2)] * 3 and better.tolist() == worse.tolist() == [0.0] * 3
        )
    assert preference_loss(chosen, rejected, chosen, rejected, beta, "ipo")[
        0
    ].tolist() == pytest.approx([1 / (4 * beta**2)] * 3)


def test_hand_values():
    pc, pr, rc, rr = (
        double(-4.0, -30.0),
        double(-6.0, -20.0),
        double(-5.0, -25.0),
        double(-4.5, -26.0),
    )
    h = [(-4.0 + 5.0) - (-6.0 + 4.5), (-30.0 + 25.0) - (-20.0 + 26.0)]  # 2.5, -11
    losses, better, worse = preference_loss(pc, pr, rc, rr, 0.3)
    assert losses.tolist() == pytest.approx([-log_sigmoid(0.3 * x) for x in h])
    assert better.tolist() == pytest.approx([0.3, -1.5]) and worse.tolist() == pytest.approx(
        [-0.45, 1.8]
    )
    smooth = preference_loss(pc, pr, rc, rr, 0.3, "dpo", 0.1)[0]
    assert smooth.tolist() == pytest.approx(
        [-0.9 * log_sigmoid(0.3 * x) - 0.1 * log_sigmoid(-0.3 * x) for x in h]
    )
    assert preference_loss(pc, pr, rc, rr, 0.3, "ipo")[0].tolist() == pytest.approx(
        [(x - 1 / 0.6) ** 2 for x in h]
    )
    with pytest.raises(ValueError, match="kind is 'simpo'; dpo or ipo was expected"):
        preference_loss(pc, pr, rc, rr, 0.3, "simpo")


def test_simpo_hand_values():
    """Means over the tokens, and γ itself is the margin: σ(β m) must exceed σ(γ), not β m exceed βγ
    or γ/β.
    """
    losses = simpo_loss(
        double(-4.0, -30.0),
        double(-6.0, -20.0),
        torch.tensor([4, 10]),
        torch.tensor([3, 10]),
        2.5,
        1.2,
    )
    assert losses.tolist() == pytest.approx(
        [-log_sigmoid(2.5 * (-1.0 + 2.0) - 1.2), -log_sigmoid(2.5 * (-3.0 + 2.0) - 1.2)]
    )
    assert simpo_loss(
        double(-4.0), double(-8.0), torch.tensor(4), torch.tensor(4), 2.0, 2.0
    ).item() == pytest.approx(math.log(2))


def test_an_answer_twice_as_long_counts_twice_in_sums_and_once_in_means():
    logps, lengths = double(-4.0, -3.0, -5.0, -6.0), torch.tensor([2, 2])
    simpo = simpo_loss(logps[:2], logps[2:], lengths, lengths, 2.0, 0.5)
    assert torch.equal(
        simpo_loss(2 * logps[:2], 2 * logps[2:], 2 * lengths, 2 * lengths, 2.0, 0.5), simpo
    )
    zero = double(0.0, 0.0)
    for kind in ("dpo", "ipo"):
        twice = preference_loss(2 * logps[:2], 2 * logps[2:], zero, zero, 0.1, kind)[0]
        assert torch.allclose(
            twice, preference_loss(logps[:2], logps[2:], zero, zero, 0.2, "dpo")[0]
        ) == (kind == "dpo")
        assert torch.allclose(twice, (2 * (logps[:2] - logps[2:]) - 5) ** 2) == (kind == "ipo")


def test_rewards_are_detached_and_only_the_policy_learns():
    logps = [double(-4.0, -30.0).requires_grad_() for _ in range(4)]
    losses, better, worse = preference_loss(*logps, 0.3)
    assert losses.requires_grad and not better.requires_grad and not worse.requires_grad
    losses.sum().backward()
    pull = 0.3 / 2  # β σ(-βh), the gradient's weight (Rafailov et al. 2023, section 4)
    assert logps[0].grad.tolist() == pytest.approx([-pull] * 2) and logps[
        1
    ].grad.tolist() == pytest.approx([pull] * 2)


@pytest.mark.parametrize("kind", ["dpo", "cdpo", "ipo", "simpo"])
def test_finite_differences(kind):
    generator = torch.Generator().manual_seed(0)
    logps = [
        (torch.randn(5, generator=generator, dtype=torch.float64) * 3 - 9).requires_grad_()
        for _ in range(4)
    ]
    lengths = torch.tensor([1, 4, 2, 9, 3]), torch.tensor([5, 4, 1, 3, 2])

    def loss(pc, pr, rc, rr):
        if kind == "simpo":
            return simpo_loss(pc, pr, *lengths, 2.5, 0.7)
        return preference_loss(
            pc, pr, rc, rr, 0.3, "ipo" if kind == "ipo" else "dpo", 0.2 if kind == "cdpo" else 0.0
        )[0]

    assert torch.autograd.gradcheck(loss, logps)


@pytest.mark.parametrize("kind", ["dpo", "ipo", "simpo"])
def test_finite_differences_through_the_model(kind):
    model = lm(vocab_size=7, hidden_size=4, intermediate_size=3, num_hidden_layers=1, head_dim=2)
    one = [[3, 4, 0], [5], [6, 6]]
    pairs = [([1, 2], one[0], one[1]), ([1, 2], one[2], one[0]), ([4], [2, 3, 5], [1, 1])]

    def loss(model):
        chosen, rejected, *lengths = dpo.sums(model, pairs)
        if kind == "simpo":
            return simpo_loss(chosen, rejected, *lengths, 2.0, 0.5).sum()
        return preference_loss(chosen, rejected, -3.0, -4.0, 0.3, kind)[0].sum()

    assert gradcheck(model, loss)


def test_large_margins_neither_overflow_nor_vanish():
    far = torch.tensor([-1e4], requires_grad=True)
    losses, _, _ = preference_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0)
    losses.sum().backward()
    assert losses.item() == 1e4 and far.grad.item() == -1


def test_the_peers_own_numbers():
    """TRL's losses of pairs of token ids, policy and reference transformers' models: ours from the
    same checkpoints.

    TRL's IPO is on means over an answer's tokens, the paper's and ours on sums: fed the means, ours
    gives TRL's.
    """
    pairs = [tuple(pair) for pair in TRL["pairs"]]
    with torch.no_grad():
        mine, theirs = (
            dpo.sums(hub.load(GOLDEN / f"llama_{n}")[0], pairs) for n in ("tied", "wide")
        )
    for found, peers in ((mine, TRL["policy"]), (theirs, TRL["reference"])):
        assert torch.allclose(torch.stack(found[:2]), torch.tensor(peers), atol=1e-4)
    lengths = mine[2:]
    sums = [*mine[:2], *theirs[:2]]
    means = [x / n for x, n in zip(sums, lengths * 2, strict=True)]
    for g in TRL["dpo"]:
        assert preference_loss(*sums, g["beta"])[0].tolist() == pytest.approx(g["losses"], abs=1e-4)
    for g in TRL["cdpo"]:
        assert preference_loss(*sums, g["beta"], "dpo", g["label_smoothing"])[
            0
        ].tolist() == pytest.approx(g["losses"], abs=1e-4)
    for name, logps in (("ipo_on_sums", sums), ("ipo_on_means", means)):
        for g in TRL[name]:
            assert preference_loss(*logps, g["beta"], "ipo")[0].tolist() == pytest.approx(
                g["losses"], rel=1e-4, abs=1e-3
            )
    for g in TRL["simpo"]:
        losses = simpo_loss(*sums[:2], *lengths, g["beta"], g["gamma"])
        assert losses.tolist() == pytest.approx(g["losses"], abs=1e-4)


# ---------------------------------------------------------------- log-probabilities
@pytest.fixture(scope="module")
def model():
    return lm(6)


def some_groups(seed=0):
    """Three prompts' pairs, whose answers stand in several of them."""
    rng = random.Random(seed)

    def ids(n):
        return [rng.randrange(280) for _ in range(n)]

    a, b, c = ids(5), ids(1), ids(12)
    x, y, z = ids(1), ids(9), ids(3)
    v, w = ids(4), ids(2)
    zeros = [*ids(3), 0, *ids(2)]  # 0 is what rows are filled up with
    return [[(a, x, y), (a, x, z), (a, z, y)], [(b, w, v)], [(c, ids(6), zeros)]]


def some_pairs():
    return [pair for pairs in some_groups() for pair in pairs]


@torch.no_grad()
def test_sums_are_over_the_answers_by_a_hand_loop(model):
    pairs = some_pairs()
    sums = dpo.sums(model, pairs)
    for side in (0, 1):
        expected = [hand(model, pair[0], pair[1 + side]).item() for pair in pairs]
        assert sums[side].tolist() == pytest.approx(expected, abs=2e-4)
        assert sums[2 + side].tolist() == [len(pair[1 + side]) for pair in pairs]
        alone = [dpo.sums(model, [pair])[side].item() for pair in pairs]
        assert sums[side].tolist() == pytest.approx(
            alone, abs=2e-4
        )  # its neighbours change nothing


def test_an_answer_that_stands_in_several_pairs_is_read_once(model):
    """And so is its prompt; the head runs on the answers alone."""
    pairs, rows, read = some_pairs(), [], []
    hooks = [
        model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0]))),
        model.embed_tokens.register_forward_hook(lambda m, args, out: read.append(args[0].numel())),
    ]
    dpo.sums(model, pairs)
    for hook in hooks:
        hook.remove()
    answers = {tuple(answer) for _, *both in pairs for answer in both}
    assert rows == [sum(map(len, answers))] == [31] and read == [31 + 5 + 1 + 12]


def test_its_gradient_counts_in_each_of_its_pairs(model):
    weights = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.3])

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    chosen, rejected, _, _ = dpo.sums(model, some_pairs())
    got = gradient((weights * (chosen - 2 * rejected)).sum())
    by_hand = (
        w * (hand(model, p, c) - 2 * hand(model, p, r))
        for w, (p, c, r) in zip(weights, some_pairs(), strict=True)
    )
    expected = gradient(sum(by_hand))
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_reference_sums_come_back_in_their_order(model):
    groups = some_groups()
    for size in (1, 2, 3):
        out = dpo.reference_sums(model, groups, size)
        assert len(out) == 3
        for pairs, found in zip(groups, out, strict=True):
            for side in (0, 1):
                expected = [hand(model, pair[0], pair[1 + side]).item() for pair in pairs]
                assert found[side].tolist() == pytest.approx(expected, abs=2e-4)


# ---------------------------------------------------------------- the stage
WORDS = ["sure", "no", "three", "of course", "the capital", "Lima", "thank you!", "hm"]
PROMPTS = ["x", "what is one", "ab", "hm?", "a b c", "is it?", "go on", "why", "where", "who"]


def rankings(n=10, seed=0):
    rng, rows = random.Random(seed), []
    for text in PROMPTS[:n]:
        answers = [" ".join(rng.sample(WORDS, rng.randint(1, 4))) for _ in range(3)]
        rows.append(
            {
                "prompt": user(text),
                "responses": answers,
                "ranks": rng.choice([[0, 1, 2], [2, 0, 1], [1, 0, 0]]),
            }
        )
    return rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(**options) → a short run of dpo(): its calls to the losses, its gradients, its log."""
    start = folder(tmp_path / "start", 1)
    data = write(tmp_path / "rankings.jsonl", rankings())

    def run(**options):
        calls = {"preference_loss": [], "simpo_loss": [], "reference_sums": [], "gradients": []}
        with monkeypatch.context() as m:
            for name, real in [
                (n, getattr(dpo, n)) for n in ("preference_loss", "simpo_loss", "reference_sums")
            ]:

                def spy(*args, real=real, name=name):
                    out = real(*args)
                    calls[name].append((args, out))
                    return out

                m.setattr(dpo, name, spy)

            def clip(parameters, limit):
                parameters = list(parameters)
                calls["gradients"].append([p.grad.clone() for p in parameters])
                return torch.zeros(())

            m.setattr(dpo, "clip_grad_norm_", clip)
            o = dpo.Options(
                model=start,
                data=data,
                out=str(tmp_path / "out"),
                device="cpu",
                overwrite=True,
                steps=1,
                warmup=0,
            )
            vars(o).update(dict(batch=8) | options)
            dpo.dpo(o)
        return calls, metrics(tmp_path / "out")

    run.start, run.data = start, data
    return run


def pairs_of(run):
    """The training pairs in the file's order: (prompt ids, chosen ids, rejected ids)."""
    groups = dpo.prepare(run.data, "all", chat_tokenizer(), 256)
    return [pair for pairs in groups for pair in pairs]


def apart(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_it_starts_at_ln_2_from_equal_log_probabilities(run):
    calls, log = run(steps=2)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(log[0]["margin"]) < 1e-5 and log[0]["accuracy"] < 1
    (pc, pr, rc, rr, beta, kind, smoothing), _ = calls["preference_loss"][0]
    assert (
        torch.allclose(pc, rc, atol=1e-4)
        and torch.allclose(pr, rr, atol=1e-4)
        and (beta, kind, smoothing) == (0.1, "dpo", 0.0)
    )
    (pc, pr, rc, rr, *_), _ = calls["preference_loss"][1]
    assert (pc - rc).abs().max() > 1e-2  # the policy has moved, the reference has not:
    model, _ = hub.load(run.start)
    known = {round(hand(model, p, a).item(), 2) for p, *answers in pairs_of(run) for a in answers}
    assert all(min(abs(x - k) for k in known) < 0.02 for x in (*rc.tolist(), *rr.tolist()))


def test_a_reference_that_is_not_the_policys_start_is_refused(run, monkeypatch):
    real = dpo.reference_sums
    monkeypatch.setattr(
        dpo, "reference_sums", lambda *a: [(c, r + torch.arange(len(r)) + 1) for c, r in real(*a)]
    )
    with pytest.raises(ValueError, match="the first loss is .*, not ln 2"):
        run()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "ipo"},
        {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
        {"nll": 0.5},
        {"label_smoothing": 0.2},
    ],
)
def test_the_gradient_is_that_of_the_mean_over_the_steps_pairs(run, options):
    """By hand from every pair alone; and the same whatever the accumulation, though prompts have
    one, two or three pairs.
    """
    pairs = pairs_of(run)
    batch = len(dpo.prepare(run.data, "all", chat_tokenizer(), 256))
    assert len(pairs) > batch + 3
    model, _ = hub.load(run.start)
    total, kind = 0.0, options.get("loss", "dpo")
    for p, c, r in pairs:
        chosen, rejected = hand(model, p, c), hand(model, p, r)
        if kind == "simpo":
            loss = simpo_loss(chosen, rejected, len(c), len(r), 2.0, 0.5)
        else:
            loss = preference_loss(
                chosen,
                rejected,
                chosen.detach(),
                rejected.detach(),
                0.1,
                kind,
                options.get("label_smoothing", 0.0),
            )[0]
        total = total + (loss - options.get("nll", 0.0) * chosen / len(c)) / len(pairs)
    total.backward()
    expected = [p.grad for p in model.parameters()]
    size = max(g.abs().max() for g in expected)
    for n in (1, 2, 3, 8):
        calls, log = run(batch=batch, accumulate=n, **options)
        assert len(calls["gradients"]) == 1 and log[0]["pairs"] == len(pairs)
        for (_, _, together), _ in calls["reference_sums"]:
            assert together == -(-batch // n), "the reference is read a micro-batch at a time"
        assert apart(calls["gradients"][0], expected) < 1e-5 * size + 1e-6, n
        assert log[0]["loss"] == pytest.approx(
            (total.item() - options.get("nll", 0.0) * log[0]["nll"]), abs=1e-3
        )


def test_what_is_logged(run):
    calls, log = run(steps=3, beta=0.2)
    (pc, pr, rc, rr, *_), (losses, _, _) = calls["preference_loss"][2]
    line = log[2]
    assert line["logp_chosen"] == pytest.approx(pc.mean().item(), abs=1e-4)
    assert line["logp_rejected"] == pytest.approx(pr.mean().item(), abs=1e-4)
    assert line["reward_chosen"] == pytest.approx(0.2 * (pc - rc).mean().item(), abs=1e-4)
    assert line["reward_rejected"] == pytest.approx(0.2 * (pr - rr).mean().item(), abs=1e-4)
    assert line["margin"] == pytest.approx(
        line["reward_chosen"] - line["reward_rejected"], abs=1e-4
    )
    assert line["accuracy"] == pytest.approx((pc - rc > pr - rr).float().mean().item(), abs=1e-5)
    assert line["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


def test_simpo_has_no_reference_and_gets_sums_with_lengths_of_the_whole_answers(run):
    calls, _ = run(loss="simpo", beta=2.0, gamma=0.5)
    assert calls["reference_sums"] == calls["preference_loss"] == []
    (chosen, rejected, n_chosen, n_rejected, beta, gamma), _ = calls["simpo_loss"][0]
    model, _ = hub.load(run.start)
    expected = {(len(c), len(r)): [] for _, c, r in pairs_of(run)}
    for p, c, r in pairs_of(run):
        expected[len(c), len(r)].append((hand(model, p, c).item(), hand(model, p, r).item()))
    for c, r, n, k in zip(
        chosen.tolist(), rejected.tolist(), n_chosen.tolist(), n_rejected.tolist(), strict=True
    ):
        assert any(abs(c - x) + abs(r - y) < 1e-3 for x, y in expected[n, k])
    assert (beta, gamma) == (2.0, 0.5)


def test_pairs_of_a_prompt_share_their_answers_and_all_end(tmp_path, capsys):
    tok = chat_tokenizer()
    end = templates.end_id(tok)
    rows = [
        {"prompt": user("b"), "responses": ["x", "y", "z"], "ranks": [2, 0, 1]},
        {"prompt": user("g"), "responses": ["x", "long " * 30, "z"], "ranks": [2, 0, 1]},
        {"prompt": user("d"), "chosen": "same", "rejected": "same"},
        {"prompt": user("e"), "responses": ["x", "x", "z"], "ranks": [0, 1, 1]},
    ]
    groups = dpo.prepare(write(tmp_path / "r.jsonl", rows), "all", tok, 64)
    found = [
        (tok.decode(pairs[0][0]), [(tok.decode(c), tok.decode(r)) for _, c, r in pairs])
        for pairs in groups
    ]
    assert all(prompt == pairs[0][0] for pairs in groups for prompt, _, _ in pairs)
    head = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"

    def ended(*pairs):
        return [(a + "<|im_end|>", b + "<|im_end|>") for a, b in pairs]

    assert [(prompt, sorted(pairs)) for prompt, pairs in found] == [
        (head.format("b"), ended(("y", "x"), ("y", "z"), ("z", "x"))),
        (head.format("g"), ended(("z", "x"))),
        (head.format("e"), ended(("x", "z"))),
    ]
    answers = [answer for pairs in groups for _, *both in pairs for answer in both]
    assert all(answer[-1] == end and end not in answer[:-1] for answer in answers)
    assert "2 longer than 64 tokens" in capsys.readouterr().err
    best = dpo.prepare(write(tmp_path / "b.jsonl", rows[:1]), "best_worst", tok, 64)
    assert [(tok.decode(c), tok.decode(r)) for pairs in best for _, c, r in pairs] == ended(
        ("y", "x")
    )


def test_pairs_with_an_empty_answer_are_dropped_and_counted(tmp_path, capsys):
    row = {"prompt": user("b"), "responses": ["", "x", "y"], "ranks": [0, 1, 2]}
    row |= {"finished": [False, True, True]}
    file = write(tmp_path / "e.jsonl", [row])
    ((pair,),) = dpo.prepare(file, "all", chat_tokenizer(), 64)
    assert [chat_tokenizer().decode(ids) for ids in pair[1:]] == ["x<|im_end|>", "y<|im_end|>"]
    assert "1 pairs used, dropped 2 with an empty answer" in capsys.readouterr().err


# ---------------------------------------------------------------- KTO
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_kto_by_hand():
    """Equations 7 and 8 of Ethayarajh et al. 2024: z0 moves gains and losses alike, each kind has
    its weight, and at the start a loss is half its weight."""
    policy, reference = double(-4.0, -30.0, -6.0), double(-5.0, -25.0, -9.0)  # r = 1, -5, 3
    good = torch.tensor([True, False, False])
    losses, rewards = dpo.kto_loss(policy, reference, good, torch.tensor(0.5), 0.3, 1.5, 0.7)
    expected = [1.5 * (1 - sigmoid(0.3 * 0.5)), 0.7 * (1 - sigmoid(0.3 * 5.5))]
    assert losses.tolist() == pytest.approx([*expected, 0.7 * (1 - sigmoid(0.3 * -2.5))], abs=1e-6)
    assert rewards.tolist() == pytest.approx([0.3, -1.5, 0.9])
    start, _ = dpo.kto_loss(policy, policy, good, torch.tensor(0.0), 0.3, 1.5, 0.7)
    assert start.tolist() == pytest.approx([0.75, 0.35, 0.35])


def test_the_gradient_of_kto():
    good = torch.tensor([True, False, True, False])
    logps = [double(-4.0, -3.0, -9.0, -7.0).requires_grad_() for _ in range(2)]
    z0 = torch.tensor(0.4, dtype=torch.float64)

    def losses(policy, reference):
        return dpo.kto_loss(policy, reference + 1, good, z0, 0.3, 1.5, 0.75)[0]

    assert torch.autograd.gradcheck(losses, logps)
    losses(*logps).sum().backward()
    up, down = (s * (1 - s) * 0.3 for s in (sigmoid(0.3 * -1.4), sigmoid(0.3 * 1.4)))
    assert logps[0].grad.tolist() == pytest.approx([-1.5 * up, 0.75 * down] * 2)


def test_another_prompts_answer_is_that_many_further_on():
    """So that each answer comes once, a pair's good one beside a good one; cut where it is long."""
    a, b, c = [1], [2, 2], [3]
    found = [(a, [4], 1), (a, [5], 0), (b, [6], 1), (b, [7, 7, 7], 0), (c, [8], 1), (c, [9], 0)]
    others = [other for _, _, other in dpo.mismatched(found, 9)]
    assert others == [[6], [7, 7, 7], [8], [9], [4], [5]]
    assert dpo.mismatched(found, 3)[1] == (a, [5], [7, 7])
    mixed = [(a, [4], 1), (b, [6], 1), (a, [5], 0)]  # a prompt that comes again later
    assert [other for _, _, other in dpo.mismatched(mixed, 9)] == [[6], [5], [6]]
    with pytest.raises(ValueError, match="KTO needs answers to two or more prompts"):
        dpo.mismatched(found[:2], 9)


@torch.no_grad()
def test_the_reference_point_is_the_mean_ratio_of_mismatched_answers():
    pairs, (policy, reference) = some_pairs(), (lm(6), lm(7))
    data = [[pair] for pair in pairs]
    sums = dict(enumerate(dpo.reference_sums(reference, data, 2)))
    ratios = [(hand(policy, p, y) - hand(reference, p, y)).item() for p, _, y in pairs]
    for batch in ([0, 1, 2, 3, 4], [4, 1], [2]):
        mean = sum(ratios[i] for i in batch) / len(batch)
        for size in (1, 3, 9):
            z0 = dpo.reference_point(policy, data, sums, batch, size).item()
            assert z0 == pytest.approx(max(mean, 0.0), abs=2e-4), "never below 0"
    assert len({ratio > 0 for ratio in ratios}) == 2


def labelled_file(path, n=10):
    """Labelled answers and one pair."""
    rng, rows = random.Random(3), [{"prompt": "a b c", "chosen": "yes", "rejected": "no no"}]
    for text in PROMPTS[:n]:
        answer = " ".join(rng.sample(WORDS, 3))
        rows.append({"prompt": text, "completion": answer, "label": rng.random() < 0.6})
    return write(path, rows)


def test_a_step_of_kto_is_the_mean_over_its_answers(run, tmp_path):
    """By hand from every answer alone, the second step with a z0 that is not 0; and the same
    whatever the accumulation."""
    file = labelled_file(tmp_path / "kto.jsonl")
    data, good = dpo.prepare_kto(file, chat_tokenizer(), 256)
    assert set(good) == {True, False} and all(len(one) == 1 for one in data)
    model, _ = hub.load(run.start)
    total = 0.0
    for ((p, a, _),), label in zip(data, good, strict=True):
        logp = hand(model, p, a)
        r = (logp - logp.detach()) if label else (logp.detach() - logp)
        total = total + (1.5 if label else 0.5) * (1 - torch.sigmoid(0.2 * r)) / len(data)
    total.backward()
    expected = [p.grad for p in model.parameters()]
    size = max(g.abs().max() for g in expected)
    options = dict(loss="kto", data=file, batch=len(data), beta=0.2, steps=2, lr=3e-3)
    logs = []
    for n in (1, 3):
        weights = dict(desirable_weight=1.5, undesirable_weight=0.5)
        calls, log = run(accumulate=n, **options, **weights)
        assert apart(calls["gradients"][0], expected) < 1e-5 * size + 1e-6, n
        assert log[0]["loss"] == pytest.approx(total.item(), abs=1e-5) and abs(log[0]["z0"]) < 1e-4
        assert log[1]["margin"] == pytest.approx(
            log[1]["reward_chosen"] - log[1]["reward_rejected"], abs=1e-5
        )
        assert log[1]["margin"] > 0 and log[0]["good"] == pytest.approx(sum(good) / len(good))
        logs.append(log)
    assert logs[0][1]["loss"] == pytest.approx(logs[1][1]["loss"], abs=1e-4)
    assert logs[0][1]["z0"] == pytest.approx(logs[1][1]["z0"], abs=1e-4)


def test_kto_refuses_what_has_no_label_or_one_prompt(tmp_path):
    tok = chat_tokenizer()
    plain = write(tmp_path / "a.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(ValueError, match="a.jsonl:1: label: true or false was expected"):
        dpo.prepare_kto(plain, tok, 64)
    one = write(tmp_path / "b.jsonl", [{"prompt": "x", "chosen": "y", "rejected": "z"}])
    with pytest.raises(ValueError, match="b.jsonl: KTO needs answers to two or more prompts"):
        dpo.prepare_kto(one, tok, 64)

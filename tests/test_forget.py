"""Forgetting: replay's share, PPO-ptx's gradient, the Fisher against its closed form, EWC's minimum
and gradient, and the commands from end to end.
"""

import copy
import json
import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from stages import done, interrupt, refused, run
from test_resume import contents
from tiny import chat_tokenizer, lm

import forget
import lora
import ppo
import sft
from common import pieces
from common.run import lineage
from data import records, templates
from model import logprobs, scalar_model
from packing import count_targets, pack
from paged import PagedAdamW

TOK = chat_tokenizer()
CHATS = [
    {"messages": [*tiny.user(f"{i} and two?"), {"role": "assistant", "content": "Lima. " * n}]}
    for i, n in enumerate((1, 3, 2, 5, 1, 2, 4, 1, 3, 2, 2, 1))
]


def example(prompt, answer, seed=0):
    """An (ids, labels) whose last `answer` tokens are targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 200, (prompt + answer,), generator=generator).tolist()
    return ids, [-100] * prompt + ids[prompt:]


RAGGED = [example(*lengths, seed) for seed, lengths in enumerate([(3, 2), (2, 7), (5, 1), (1, 4)])]


# ---------------------------------------------------------------- replay
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.3, 0.9])
def test_the_share_of_replayed_targets_holds_to_within_one_example(ratio):
    new = [example(3, n % 7 + 1, n) for n in range(40)]
    old = [example(0, n % 5 + 6, 100 + n) for n in range(9)]
    at = forget.replay(new, old, ratio, 8, seed=3)
    longest, mine, theirs, seen = max(count_targets([e]) for e in old), 0, 0, []
    for step in range(5):  # an epoch
        mine += count_targets(records.batch(new, step, 8, 3))
        replayed = at(step)
        theirs += count_targets(replayed)
        seen += replayed
        wanted = ratio / (1 - ratio) * mine
        assert wanted <= theirs < wanted + longest  # over an epoch, and so far
    assert mine == count_targets(new)
    # in epochs, each in an order of its own
    assert seen == [records.batch(old, i, 1, 3)[0] for i in range(len(seen))]
    # a resumed run asks for later steps first
    assert forget.replay(new, old, ratio, 8, seed=3)(4) == at(4)
    assert forget.replay(new, [], ratio, 8, seed=3)(4) == []


def test_text_is_read_as_in_pre_training(tmp_path):
    """Every token but the first is a target, the document's end too; long texts are cut."""
    end, text = TOK.special["<|endoftext|>"], "the capital of Peru is Lima. <|im_end|>"
    file = tiny.write(tmp_path / "texts.jsonl", [{"text": text}, {"text": " "}, {"text": "a"}])
    (ids, labels), (short, _) = forget.examples(file, TOK, 64)
    assert ids == labels == [end, *TOK.encode(text), end] and TOK.decode(ids[1:-1]) == text
    assert short == [end, *TOK.encode("a"), end]
    cut = [piece for piece, _ in forget.examples(file, TOK, 5)]
    assert sum(cut[:-1], []) in (ids, ids[:-1]) and max(map(len, cut)) == 5
    plain = tmp_path / "page.txt"
    plain.write_text(text)
    assert forget.examples(plain, TOK, 64) == [(ids, labels)]
    chats = tiny.write(tmp_path / "chats.jsonl", CHATS)
    assert forget.examples(chats, TOK, 64) == sft.prepare(chats, TOK, 64) != []


def test_texts_of_hubs_without_one_token_between_documents():
    tok = SimpleNamespace(
        encode=TOK.encode, special={"<|end_of_text|>": 300}, bos_id=301, eos_id=302
    )
    assert templates.document(tok, "a") == [301, *TOK.encode("a"), 300]
    tok.special = {}
    assert templates.document(tok, "a") == [301, *TOK.encode("a"), 302]


# ---------------------------------------------------------------- PPO-ptx
def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_ptx_adds_gamma_times_the_pre_training_gradient(monkeypatch):
    """PPO's update without ptx, and with it: the difference is γ ∇L_old, a mean per target."""
    found = {}
    for gamma in (0.0, 2.5):
        policy = lm(1).double()
        critic = scalar_model(policy, torch.Generator().manual_seed(0)).double()
        critic.config.reward_mean, critic.config.reward_std = 0.0, 1.0
        prompts, answers = [[1, 2], [3], [4, 5]], [[6, 7], [8], [9, 10, 11]]
        mask = torch.arange(3) < torch.tensor([[2], [1], [3]])
        old = logprobs(policy, prompts, answers).detach()
        advantages = torch.where(mask, torch.tensor([[0.5], [-1.0], [2.0]]).double(), 0.0)
        each = ["", "", ""], torch.ones(3).bool(), torch.zeros(3)
        r = ppo.Rollout(prompts, answers, *each, mask, old, old, 0 * old, advantages, old)
        seen = []
        optimizer = SimpleNamespace(
            step=lambda policy=policy, seen=seen: seen.append(
                [p.grad for p in policy.parameters()]
            ),
            zero_grad=lambda: None,
        )
        o = SimpleNamespace(
            epochs=1,
            minibatch=3,
            temperature=1.0,
            clip=0.2,
            vf_coef=0.1,
            max_new_tokens=7,
            ptx_coef=gamma,
        )
        monkeypatch.setattr(ppo, "clip_grad_norm_", lambda *_: None)
        memory = SimpleNamespace(batch=lambda **_: None)
        # three of the four, in an order of the seed
        figures = ppo.update(policy, critic, optimizer, r, memory, 5, o, RAGGED if gamma else ())
        found[gamma] = seen[0]
    some = records.batch(RAGGED, 0, 3, 5)
    loss = -sum(forget.log_likelihood(policy, *e) for e in some) / count_targets(some)
    assert abs(figures["ptx_loss"] - loss) < 1e-9
    expected = gradients(policy, loss)
    assert max(g.abs().max() for g in expected) > 0.01
    for plain, mixed, g in zip(found[0.0], found[2.5], expected, strict=True):
        assert (mixed - plain - 2.5 * g).abs().max() < 1e-6


# ---------------------------------------------------------------- the Fisher information
@pytest.fixture
def softmax():
    """A Transformer without layers: softmax regression on normed embeddings, in float64."""
    return lm(3, num_hidden_layers=0).double()


@pytest.mark.parametrize("seed", [None, 3])
def test_an_example_s_logits_come_in_pieces(seed, monkeypatch):
    """Drawn targets too: no more than a piece of them exists at a time."""
    model, found, heads = lm(3).double(), [], []
    model.lm_head.register_forward_hook(lambda m, x, y: heads.append(len(y)))
    for piece in (2**26, 3 * model.config.vocab_size):
        monkeypatch.setattr(pieces, "PIECE", piece)
        seeded = None if seed is None else torch.Generator().manual_seed(seed)
        log_p = forget.log_likelihood(model, *RAGGED[1], seeded)
        found.append([log_p.detach(), *gradients(model, log_p)])
    assert heads[0] == 7
    assert all(n <= 3 for n in heads[1 + (seed is not None) :])
    for whole, parts in zip(*found, strict=True):
        assert (whole - parts).abs().max() < 1e-12


def squares(model, scalars, squared=True):
    """What add_gradient sums up."""
    sums = copy.deepcopy(model)
    for p in sums.parameters():
        p.data.zero_()
    for log_p in scalars:
        forget.add_gradient(sums, model, log_p, squared)
    return sums


def head_features(model, ids):
    """h (T,D) before each of ids[1:], p (T,V)."""
    h = model.norm(model.embed_tokens(torch.tensor(ids[:-1])))
    return h.detach(), torch.softmax(h @ model.lm_head.weight.T, -1).detach()


def test_empirical_fisher_of_softmax_regression(softmax):
    """∂ log p / ∂W = Σ_t (onehot(y_t) - p_t) h_tᵀ, squared, a mean over examples."""
    sums = squares(softmax, (forget.log_likelihood(softmax, *e) for e in RAGGED))
    expected = torch.zeros_like(softmax.lm_head.weight)
    for ids, labels in RAGGED:
        h, p = head_features(softmax, ids)
        y = torch.nn.functional.one_hot(torch.tensor(ids[1:]), p.shape[1]).double()
        trained = (torch.tensor(labels[1:]) != -100).double()[:, None]
        expected += ((y - p) * trained).T.mul(1.0).matmul(h) ** 2 / len(RAGGED)
    found = forget.fisher_of("empirical", sums, len(RAGGED))["lm_head.weight"]
    assert expected.max() > 0.1 and (found - expected).abs().max() < 1e-6


def test_true_fisher_of_softmax_regression(softmax, monkeypatch):
    """Σ_t p_t (1 - p_t) h_t²: by every label with its probability, and by labels drawn."""
    (ids, labels) = ([5, 9], [-100, 9])
    h, p = head_features(softmax, ids)
    closed = (p * (1 - p)).T * h**2
    expectation = torch.zeros_like(closed)
    for y in range(p.shape[1]):
        monkeypatch.setattr(forget, "sample", lambda *_, y=y: torch.tensor([y]))
        log_p = forget.log_likelihood(softmax, ids, labels, torch.Generator())
        expectation += p[0, y] * squares(softmax, [log_p]).lm_head.weight.detach()
    assert closed.max() > 1e-3 and (expectation - closed).abs().max() < 1e-6
    monkeypatch.undo()
    # several targets: their scores are independent, given the data's prefix
    ids, labels = RAGGED[1]
    h, p = head_features(softmax, ids)
    trained = (torch.tensor(labels[1:]) != -100).double()[:, None]
    closed = (trained * p * (1 - p)).T @ h**2
    drawn = torch.Generator().manual_seed(0)
    n = 200
    found = squares(softmax, (forget.log_likelihood(softmax, ids, labels, drawn) for _ in range(n)))
    mean = forget.fisher_of("true", found, n)["lm_head.weight"]
    assert abs(mean.sum() / closed.sum() - 1) < 0.15


def test_the_square_of_the_mean_shrinks_with_n_and_the_mean_of_squares_does_not(softmax):
    """At the optimum, where labels come from the model, the mean gradient is 0."""
    found = {}
    for kind, n in [(kind, n) for kind in ("true", "mean-squared") for n in (20, 200)]:
        drawn = torch.Generator().manual_seed(1)
        logs = (forget.log_likelihood(softmax, *RAGGED[1], drawn) for _ in range(n))
        sums = squares(softmax, logs, squared=kind == "true")
        found[kind, n] = forget.fisher_of(kind, sums, n)["lm_head.weight"].sum()
    assert 0.7 < found["true", 20] / found["true", 200] < 1.4
    assert found["mean-squared", 200] < 0.3 * found["mean-squared", 20]
    assert found["mean-squared", 200] < 0.02 * found["true", 200]


def test_per_example_gradients_are_those_of_any_batch():
    """One backward pass per example equals vmap over a packed batch's examples, one by one."""
    model = lm(2).double()
    sums = squares(model, (forget.log_likelihood(model, *e) for e in RAGGED))
    names, values = zip(*model.named_parameters(), strict=True)
    tokens, labels, segments = pack(RAGGED, 24)

    def each(*values):  # -log p of each example, out of one packed pass
        over = tiny.Over(model, forget.nll)
        at = {f"model.{n}": v for n, v in zip(names, values, strict=True)}
        found = torch.func.functional_call(over, at, (tokens, labels, segments))
        return torch.stack([found[segments == s].sum() for s in range(len(RAGGED))])

    jacobian = torch.autograd.functional.jacobian(each, values)
    for j, total in zip(jacobian, sums.parameters(), strict=True):
        assert ((j**2).sum(0) - total).abs().max() < 1e-6 * max(1.0, total.abs().max().item())


# ---------------------------------------------------------------- the penalty
def matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("tasks", [1, 2])
def test_on_a_quadratic_the_minimum_is_the_closed_form(tasks):
    """½ (θ - θ_A)ᵀ A (θ - θ_A) + ½ λ Σ F (θ - θ*)²: θ = (A + λF)⁻¹ (A θ_A + λ F θ*)."""
    half, ours = matrix(6, 6), matrix(6, seed=1)
    A, strength = half @ half.T + torch.eye(6), 3.0
    olds = [(matrix(6, seed=2 + k) ** 2, matrix(6, seed=7 + k)) for k in range(tasks)]
    theta = torch.nn.Parameter(torch.zeros(6).double())
    optimizer = torch.optim.LBFGS([theta], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        new = 0.5 * (theta - ours) @ A @ (theta - ours)
        new.backward()
        return new.detach() + forget.ewc([(theta, *old) for old in olds], strength)["penalty"]

    optimizer.step(loss)
    curvature = A + strength * sum(torch.diag(fisher) for fisher, _ in olds)
    pull = A @ ours + strength * sum(fisher * old for fisher, old in olds)
    assert (theta - torch.linalg.solve(curvature, pull)).abs().max() < 1e-5
    assert (theta - ours).abs().max() > 0.1


def test_the_penalty_s_gradient_by_finite_differences():
    weight = torch.nn.Parameter(matrix(3, 4))
    terms = [(weight, matrix(3, 4, seed=k) ** 2, matrix(3, 4, seed=9 + k)) for k in (1, 2)]
    assert forget.ewc([], 2.5) == {} and forget.ewc(terms, 0.0) == {"penalty": 0.0}
    assert weight.grad is None  # λ = 0 touches nothing
    forget.ewc(terms, 2.5)
    found = weight.grad.clone()
    for at in torch.cartesian_prod(torch.arange(3), torch.arange(4)).tolist():
        cost = []
        for sign in (1, -1):
            moved = weight.detach().clone()
            moved[tuple(at)] += sign * 1e-4
            cost.append(forget.ewc([(moved.requires_grad_(), *t[1:]) for t in terms], 2.5))
        slope = (cost[0]["penalty"] - cost[1]["penalty"]) / 2e-4
        assert abs(slope - found[tuple(at)]) < 1e-7


def test_on_lora_the_penalty_is_that_of_the_full_weights():
    model = lora.add_lora(lm(4), 3, 5.0, "q_proj,down_proj").double()
    layers = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    assert len(layers) == 4
    for n, layer in enumerate(layers):
        A, B = layer.A["default"], layer.B["default"]
        A.data, B.data = matrix(*A.shape, seed=n), matrix(*B.shape, seed=9 + n)
        fisher = matrix(*layer.base.weight.shape, seed=20 + n) ** 2
        start = layer.base.weight.detach()
        merged = torch.nn.Parameter(start + 5.0 / 3 * B.detach() @ A.detach())
        full = forget.ewc([(merged, fisher, start)], 0.7)["penalty"]
        found = forget.ewc([(layer, fisher, 0.0)], 0.7)["penalty"]
        assert abs(found / full - 1) < 1e-7 and full > 1
        expected = 5.0 / 3 * B.T @ merged.grad, 5.0 / 3 * merged.grad @ A.T  # the chain rule
        for factor, gradient in zip((A, B), expected, strict=True):
            assert (factor.grad - gradient).abs().max() < 1e-7


# ---------------------------------------------------------------- the commands
@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A model, its Fisher, and two tasks' files."""
    at = tmp_path_factory.mktemp("tasks")
    new = [
        {"messages": [*tiny.user(f"q{i}"), {"role": "assistant", "content": "sure"}]}
        for i in range(20)
    ]
    o = SimpleNamespace(
        model=tiny.folder(at / "old", std=0.2),
        chats=tiny.write(at / "chats.jsonl", CHATS),
        new=tiny.write(at / "new.jsonl", new),
        text=tiny.write(at / "text.jsonl", [{"text": t * 3} for t in tiny.TEXTS]),
        fisher=str(at / "fisher"),
        at=at,
    )
    forget.forget(forget.Options(o.model, o.chats, o.fisher, device="cpu"))
    return o


def tune(tasks, name, **options):
    """A run of sft.py on the new task → its folder."""
    options = dict(model=tasks.model, data=tasks.new, batch=4, steps=6, warmup=0, lr=0.02) | options
    out = tasks.at / name
    sft.sft(sft.Options(out=str(out), device="cpu", **options))
    return out


def weights(out):
    return (out / "model.safetensors").read_bytes()


def distance(tasks, out):
    """Σ F (θ - θ*)² between a checkpoint and the old model."""
    fisher, start = forget.load(tasks.fisher, tasks.model)
    model = dict(forget.hub.load(out)[0].named_parameters())
    return sum((f * (model[n] - start[n]) ** 2).sum().item() for n, f in fisher.items())


def test_lambda_0_changes_nothing_and_more_of_it_holds_the_weights(tasks):
    plain = tune(tasks, "plain")
    assert weights(tune(tasks, "zero", ewc=tasks.fisher, ewc_lambda=0.0)) == weights(plain)
    held = [tune(tasks, f"held{n}", ewc=tasks.fisher, ewc_lambda=float(n)) for n in (1, 100)]
    far = [distance(tasks, out) for out in (plain, *held)]
    assert far[0] > far[1] > far[2] and far[0] > 3 * far[2] > 0
    log = tiny.metrics(held[0])
    assert log[0]["penalty"] == 0 and log[-1]["penalty"] > 0
    assert "penalty" not in tiny.metrics(plain)[0]


def test_what_forget_writes(tasks):
    """The mean of squares over the training split, by the model's own labels; θ* beside it."""
    model, tok = forget.hub.load(tasks.model)
    data = forget.examples(tasks.chats, tok, 128)
    data = records.batch(data, 0, len(data), 0)
    fisher, start = forget.load(tasks.fisher, tasks.model)
    assert all(torch.equal(start[n], p) for n, p in model.named_parameters())
    drawn = [torch.Generator().manual_seed(i) for i in range(len(data))]
    logs = (forget.log_likelihood(model, *e, g) for e, g in zip(data, drawn, strict=True))
    expected = forget.fisher_of("true", squares(model, logs), len(data))
    assert fisher.keys() == expected.keys()
    assert all((fisher[n] - f).abs().max() <= 1e-6 * f.max() for n, f in expected.items())
    found = {"true": fisher}
    for kind in ("empirical", "mean-squared", "identity"):
        out = str(tasks.at / kind)
        forget.forget(forget.Options(tasks.model, tasks.chats, out, kind, device="cpu"))
        found[kind] = forget.load(out, tasks.model)[0]
    totals = {kind: sum(f.sum().item() for f in fisher.values()) for kind, fisher in found.items()}
    assert totals["identity"] == sum(p.numel() for p in model.parameters())
    assert totals["mean-squared"] < totals["empirical"] != pytest.approx(totals["true"], rel=0.01)
    logs = (forget.log_likelihood(model, *e) for e in data)
    expected = forget.fisher_of("empirical", squares(model, logs), len(data))
    found = found["empirical"]
    assert all((found[n] - f).abs().max() <= 1e-6 * f.max() for n, f in expected.items())


def test_old_tasks_add_up_and_a_fisher_of_another_model_is_refused(tasks):
    second = tune(tasks, "second")
    own = str(tasks.at / "second_fisher")
    forget.forget(forget.Options(str(second), tasks.new, own, device="cpu"))
    assert lineage(second)[1:] == lineage(tasks.model) and len(lineage(second)) == 2
    o = sft.Options(model=str(second), ewc=f"{tasks.fisher},{own}")
    model = forget.hub.load(second)[0]
    terms = forget.old_tasks(o, model)
    assert len(terms) == 2 * len(list(model.parameters()))
    own_terms = forget.old_tasks(sft.Options(model=str(second), ewc=own), model)
    assert forget.ewc(own_terms, 1.0)["penalty"] == 0
    moved = forget.ewc(terms, 1.0)["penalty"].item()
    assert moved == pytest.approx(distance(tasks, second) / 2, rel=1e-4)
    # under LoRA the same, of the layers that it lies on
    adapted = lora.add_lora(forget.hub.load(second)[0], 2, 4.0)
    held = [t for t in forget.old_tasks(o, adapted) if torch.is_tensor(t[2])]
    names = {f"{n}.weight" for n in lora.linears(adapted)} - {"lm_head.weight"}
    assert len(held) == len(names)
    fisher, start = forget.load(tasks.fisher, tasks.model)
    weights = dict(model.named_parameters())
    expected = sum((fisher[n] * (weights[n] - start[n]) ** 2).sum().item() for n in names) / 2
    assert forget.ewc(held, 1.0)["penalty"].item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match="a Fisher of another model"):
        forget.old_tasks(sft.Options(model=tasks.model, ewc=own), model)


def test_ewc_on_lora_and_on_an_adapter_that_is_trained_further(tasks):
    options = dict(ewc=tasks.fisher, ewc_lambda=100.0)
    plain, held = tune(tasks, "lora", lora=2), tune(tasks, "lora_held", lora=2, **options)
    assert distance(tasks, plain) > 2 * distance(tasks, held) > 0
    own = str(tasks.at / "lora_fisher")
    forget.forget(forget.Options(str(plain), tasks.new, own, device="cpu"))
    o = dict(model=str(plain), keep_base=True, data=tasks.chats, ewc=own, ewc_lambda=10.0)
    log = tiny.metrics(tune(tasks, "further", **o))
    assert log[0]["penalty"] == 0 and log[-1]["penalty"] > 0


def test_a_tied_weight_counts_once(tasks):
    old = tiny.folder(tasks.at / "tied", std=0.2, tie_word_embeddings=True)
    out = str(tasks.at / "tied_fisher")
    forget.forget(forget.Options(old, tasks.text, out, device="cpu"))
    assert "lm_head.weight" not in forget.load(out, old)[0]
    log = tiny.metrics(tune(tasks, "tied_held", model=old, ewc=out))
    assert log[-1]["penalty"] > 0
    with pytest.raises(ValueError, match="no lm_head.weight in it"):
        tune(tasks, "never", model=old, ewc=out, lora=2, targets="all,lm_head")


def test_replayed_examples_are_part_of_the_step(tasks):
    log = tiny.metrics(tune(tasks, "replay", replay=tasks.text, replay_ratio=0.5, steps=5))
    plain = tiny.metrics(tune(tasks, "replay_not", steps=5))
    mine = sum(line["targets"] for line in plain)
    longest = max(len(TOK.encode(t * 3)) + 1 for t in tiny.TEXTS)
    assert 2 * mine <= sum(line["targets"] for line in log) < 2 * mine + longest


def test_ppo_with_ptx(small, tmp_path, monkeypatch):
    told, make_room = [], PagedAdamW.make_room
    monkeypatch.setattr(
        PagedAdamW, "make_room", lambda s, **n: (told.append(n), make_room(s, **n))[1]
    )
    text = tiny.write(tmp_path / "text.jsonl", [{"text": t * 3} for t in tiny.TEXTS])
    options = small["ppo"] | dict(iterations=2, device="cpu", out=str(tmp_path / "out"), ptx=text)
    ppo.ppo(ppo.Options(**options, paged=True))
    assert {tuple(n) for n in told} == {
        ("cached",), ("tokens", "length", "targets"), ("ptx", "ptx_length", "ptx_targets")
    }  # fmt: skip
    assert all(line["ptx_loss"] > 0 for line in tiny.metrics(tmp_path / "out"))
    assert text in json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]


@pytest.mark.parametrize("stage", ["forget.py", "sft.py"])
def test_killed_and_started_again_equals_uninterrupted(stage, tasks, tmp_path):
    options = dict(model=tasks.model, data=tasks.chats, save_every=2, device="cpu")
    if stage == "sft.py":
        options |= dict(steps=20, batch=4, warmup=0, replay=tasks.text, replay_ratio=0.2)
        options |= dict(ewc=tasks.fisher, ewc_lambda=5)
    done(stage, out=tmp_path / "whole", **options)
    assert interrupt(1, tmp_path / "broken", stage, **options) > 0
    done(stage, out=tmp_path / "broken", **options)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


# ---------------------------------------------------------------- bad input
def test_bad_input(tasks, tmp_path):
    """One clear line each."""
    options = dict(model=tasks.model, data=tasks.new, out=tmp_path / "never", length=64)
    result = run("sft.py", **options, replay=tasks.text, replay_ratio=1)
    refused(result, "--replay-ratio is 1.0, it must be below 1")
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = tiny.write(tmp_path / "pairs.jsonl", [pair])
    broken = tiny.write(tmp_path / "broken.jsonl", [{"text": "a"}, {"text": 3}])
    mixed = tiny.write(tmp_path / "mixed.jsonl", [{"text": "a"}, CHATS[0]])
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    (tmp_path / "empty.txt").write_text("")
    for file, words in (
        (pairs, "a conversation was expected, this is a preference pair"),
        (broken, "broken.jsonl:2: text: a string was expected (got 3)"),
        (mixed, "mixed.jsonl:2: a text was expected, this is a conversation"),
        (tmp_path / "bytes.txt", "bytes.txt:1: UTF-8 was expected"),
        (tmp_path / "empty.txt", "no usable pieces of text in it"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            forget.examples(file, TOK, 64)
    with pytest.raises(FileNotFoundError, match="it has no fisher.safetensors"):
        forget.old_tasks(sft.Options(model=tasks.model, ewc=str(tmp_path)), lm())
    with pytest.raises(ValueError, match="not --adapter ia3"):
        forget.old_tasks(sft.Options(model=tasks.model, ewc=tasks.fisher, adapter="ia3"), lm())
    other = run("sft.py", **options | dict(model=tiny.folder(tmp_path / "b", 5), ewc=tasks.fisher))
    refused(other, f"sft.py: --ewc {tasks.fisher}: a Fisher of another model than {tmp_path}/b")
    nan = lm()
    nan.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Fisher of layers.0.mlp.up_proj.weight is not finite"):
        forget.fisher_of("true", nan, 1)

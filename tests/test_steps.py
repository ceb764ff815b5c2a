"""The first steps of each stage by hand: losses from their definitions, one unpadded row after the
other in float64, gradients clipped to norm 1, AdamW, the learning rate of the step. What a stage
saves and logs must be that; and what it reads must be the training side.
"""

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_tokenizer, folder, lm, metrics, user, write

import compare
import dpo
import ppo
import reward
import sft
from common import hub
from data import records, templates
from data.world import world
from model import scalar_model

END = 279
TOK = chat_tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small threads only wait for each other
    yield
    torch.set_num_threads(threads)


def prompts(n, held=False, text="{}?"):
    """n prompts of the training side, or of the held-out one."""
    chats = (user(text.format(i)) for i in range(100_000))
    found = (c for c in chats if records.held_out(c) == held)
    return [next(found) for _ in range(n)]


def said(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- definitions
class Trained:
    """A model in float64 and its optimizer: AdamW after Loshchilov & Hutter 2019, decay on
    matrices.
    """

    def __init__(self, model, decay=0.0, eps=1e-8):
        self.model, self.decay, self.eps, self.norms, self.rates = (
            model.double(),
            decay,
            eps,
            [],
            0.0,
        )
        self.start = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.m, self.v = ({n: torch.zeros_like(p) for n, p in self.start.items()} for _ in range(2))

    def step(self, loss, lr):
        """One step down the loss → the norm of its gradient before it is clipped to 1."""
        named = dict(self.model.named_parameters())
        gradients = dict(
            zip(
                named,
                torch.autograd.grad(loss, list(named.values()), materialize_grads=True),
                strict=True,
            )
        )
        norm = math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
        self.norms, self.rates = [*self.norms, norm], self.rates + lr
        steps = len(self.norms)
        with torch.no_grad():
            for n, p in named.items():
                g = gradients[n] / max(1.0, norm)
                self.m[n] = 0.9 * self.m[n] + 0.1 * g
                self.v[n] = 0.95 * self.v[n] + 0.05 * g**2
                m, v = self.m[n] / (1 - 0.9**steps), self.v[n] / (1 - 0.95**steps)
                p *= 1 - lr * (self.decay if p.dim() >= 2 else 0.0)
                p -= lr * m / (v.sqrt() + self.eps)
        return norm

    def check(self, path):
        """The model that lies there is this one, to a thousandth of the way that its numbers could
        go.
        """
        clipped = [max(1.0, norm) for norm in self.norms]
        # Adam sees it only where steps are clipped differently
        assert max(clipped) > 1.3 * min(clipped)
        found, off = dict(hub.load(path)[0].named_parameters()), []
        for n, p in self.model.named_parameters():
            moved = self.m[n] != 0
            off.append(((found[n] - p).abs() / self.rates)[moved])
            assert torch.allclose(found[n][~moved].double(), p[~moved], atol=1e-7), n
        off = torch.cat(off)
        assert len(off) > 4000 and (off > 1e-3).double().mean() < 0.01, (
            f"{(off > 1e-3).double().mean():.2%} of the numbers are elsewhere"
        )


def rate(step, total, peak, warmup):
    """Up along a line, then down to 0 at `total`."""
    return peak * min(
        (step + 1) / warmup, (total - step) / (total - warmup) if step >= warmup else 1.0
    )


def logp(model, prompt, answer, temperature=1.0):
    """log p of each of an answer's tokens."""
    logits = model(torch.tensor([prompt + answer]))[0] / temperature
    at = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.log_softmax(logits, -1)[at, torch.tensor(answer)]


def near(line, **figures):
    """A log's line has these figures."""
    for name, value in figures.items():
        assert line[name] == pytest.approx(
            value.item() if torch.is_tensor(value) else value, rel=2e-4, abs=2e-5
        ), name


def started(at, **changes):
    """A folder with a tiny model, and that model."""
    path = folder(at, 1, **changes)
    return path, hub.load(path)[0]


# ---------------------------------------------------------------- the stages
def test_sft(tmp_path):
    start, model = started(tmp_path / "start")
    chats = [
        p + [said(text)]
        for p, text in zip(
            prompts(5),
            ("yes", "of course", "the capital of Peru is Lima.", "no", "hm"),
            strict=True,
        )
    ]
    held = [p + [said("never")] for p in prompts(3, held=True)]
    data = write(tmp_path / "chats.jsonl", [{"messages": c} for c in held[:1] + chats + held[1:]])
    o = sft.Options(
        model=start,
        data=data,
        out=str(tmp_path / "out"),
        steps=4,
        warmup=2,
        batch=5,
        accumulate=2,
        device="cpu",
    )
    o.lr, o.weight_decay = 0.02, 0.5
    sft.sft(o)
    rows, trained = [templates.render(TOK, c) for c in chats], Trained(model, decay=0.5)
    targets = sum(i != -100 for _, labels in rows for i in labels)
    for step, line in enumerate(metrics(tmp_path / "out")):
        loss = 0.0
        for ids, labels in rows:
            logits = trained.model(torch.tensor([ids]))[0].log_softmax(-1)
            loss = loss - sum(logits[t - 1, i] for t, i in enumerate(labels) if i != -100) / targets
        lr = rate(step, 4, 0.02, 2)
        norm = trained.step(loss, lr)
        near(
            line,
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            targets=targets,
            tokens=sum(len(ids) for ids, _ in rows),
        )
    trained.check(tmp_path / "out")


def ranked(n=4, held=2):
    """Rankings of the training side, and held-out ones in the opposite order, mixed."""
    texts, out = ("sure, of course", "thank you!", "no", "three"), []
    for i, p in enumerate(prompts(n)):
        out.append(
            {
                "prompt": p,
                "responses": [t + "!" * i for t in texts],
                "ranks": [0, 1, 2, 1] if i % 2 else [2, 1, -1, 0],
            }
        )
    for i, p in enumerate(prompts(held, held=True)):
        out.insert(3 * i, {"prompt": p, "responses": list(texts), "ranks": [3, 1, 2, 0]})
    return out


@pytest.mark.parametrize("loss", ("dpo", "ipo", "simpo"))
def test_dpo(tmp_path, loss):
    start, model = started(tmp_path / "start")
    rows = ranked()
    data = write(tmp_path / "r.jsonl", rows)
    o = dpo.Options(
        model=start,
        data=data,
        out=str(tmp_path / "out"),
        steps=4,
        warmup=2,
        batch=4,
        accumulate=2,
        device="cpu",
        loss=loss,
    )
    o.lr, o.beta, o.gamma, o.nll = 0.01, 0.3, 0.5, 0.2
    o.label_smoothing = 0.1 if loss == "dpo" else 0.0
    dpo.dpo(o)
    pairs = []
    for r in rows:
        prompt, _ = templates.answer_ids(TOK, r["prompt"], "")
        answers = [templates.answer_ids(TOK, r["prompt"], t)[1] for t in r["responses"]]
        order = [] if records.held_out(r["prompt"]) else r["ranks"]
        pairs += [
            (prompt, answers[i], answers[j])
            for i, a in enumerate(order)
            for j, b in enumerate(order)
            if 0 <= a < b
        ]
    assert len(pairs) == 16
    reference, trained = hub.load(start)[0].double(), Trained(model)
    for step, line in enumerate(metrics(tmp_path / "out")):
        means = {
            k: 0.0
            for k in (
                "loss",
                "nll",
                "logp_chosen",
                "logp_rejected",
                "reward_chosen",
                "reward_rejected",
                "margin",
                "accuracy",
            )
        }
        for prompt, good, bad in pairs:
            w, l = logp(trained.model, prompt, good).sum(), logp(trained.model, prompt, bad).sum()
            ref_w, ref_l = (logp(reference, prompt, a).sum().detach() for a in (good, bad))
            h = w - ref_w - l + ref_l
            better, worse = (
                (0.3 * (w / len(good)), 0.3 * (l / len(bad)))
                if loss == "simpo"
                else (0.3 * (w - ref_w), 0.3 * (l - ref_l))
            )
            each = {
                "dpo": lambda h=h: (
                    -0.9 * torch.sigmoid(0.3 * h).log() - 0.1 * torch.sigmoid(-0.3 * h).log()
                ),
                "ipo": lambda h=h: (h - 1 / 0.6) ** 2,
                "simpo": lambda a=better, b=worse: -torch.sigmoid(a - b - 0.5).log(),
            }[loss]()
            now = dict(
                loss=each,
                nll=-w / len(good),
                logp_chosen=w,
                logp_rejected=l,
                reward_chosen=better,
                reward_rejected=worse,
                margin=better - worse,
                accuracy=(better > worse).double(),
            )
            means = {k: v + now[k] / len(pairs) for k, v in means.items()}
        lr = rate(step, 4, 0.01, 2)
        norm = trained.step(means["loss"] + 0.2 * means["nll"], lr)
        if step == 0:
            del means["accuracy"]  # of rewards that are equal but for rounding
        near(line, step=step, lr=lr, grad_norm=norm, pairs=len(pairs), **means)
    trained.check(tmp_path / "out")


def score(model, prompt, answer):
    return model(torch.tensor([prompt + answer]))[0, -1]


def test_reward(tmp_path):
    start, model = started(tmp_path / "start")
    rows = ranked(n=5, held=10)  # two batches of held-out ones
    chats = [
        {"messages": p + [said(t)]}
        for p, t in zip(prompts(4), ("yes", "of course", "no", "hm"), strict=True)
    ]
    data, reference = write(tmp_path / "r.jsonl", rows), write(tmp_path / "chats.jsonl", chats)
    o = reward.Options(
        model=start,
        data=data,
        reference=reference,
        out=str(tmp_path / "out"),
        steps=4,
        warmup=2,
        batch=5,
        device="cpu",
    )
    o.lr, o.seed = 0.02, 3
    reward.reward(o)
    *log, last = metrics(tmp_path / "out")
    trained = Trained(scalar_model(model, torch.Generator().manual_seed(3)))

    def figures(held):
        """The loss and the accuracy, both the mean over prompts."""
        losses, hits = [], []
        for r in rows:
            if records.held_out(r["prompt"]) == held:
                s = [
                    score(trained.model, *templates.answer_ids(TOK, r["prompt"], t))
                    for t in r["responses"]
                ]
                pairs = [
                    s[i] - s[j]
                    for i, a in enumerate(r["ranks"])
                    for j, b in enumerate(r["ranks"])
                    if 0 <= a < b
                ]
                losses.append(sum(-torch.sigmoid(d).log() for d in pairs) / len(pairs))
                hits += [(d > 0).double() for d in pairs]
        return sum(losses) / len(losses), sum(hits) / len(hits)

    for step, line in enumerate(log):
        (loss, accuracy), lr = figures(False), rate(step, 4, 0.02, 2)
        norm = trained.step(loss, lr)
        near(line, step=step, loss=loss, accuracy=accuracy, lr=lr, grad_norm=norm)
    assert len(log) == 4
    trained.check(tmp_path / "out")
    near(last, step=4, held_out_accuracy=figures(True)[1])
    assert abs(figures(True)[1] - figures(False)[1]) > 0.05
    own = torch.stack(
        [
            score(
                trained.model,
                *templates.answer_ids(TOK, c["messages"][:1], c["messages"][1]["content"]),
            )
            for c in chats
        ]
    )
    c = hub.read_config(tmp_path / "out")
    near(dict(mean=c.reward_mean, std=c.reward_std), mean=own.mean(), std=own.std())


def test_ppo(tmp_path, monkeypatch):
    start, rm, T = tmp_path / "start", tmp_path / "rm", 0.8
    model = lm(1)
    with torch.no_grad():
        model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[END, 0] = 5.5  # so that about half of the answers end
    hub.save(start, model, TOK)
    judge = scalar_model(lm(2), torch.Generator().manual_seed(0))
    judge.config.reward_mean, judge.config.reward_std = 0.4, 1.7
    hub.save(rm, judge, TOK)
    data = write(
        tmp_path / "p.jsonl", [{"messages": p} for p in prompts(3, held=True) + prompts(1)]
    )
    said, real = [], ppo.generate
    monkeypatch.setattr(
        ppo, "generate", lambda *args, **options: said.append(real(*args, **options)) or said[-1]
    )
    o = ppo.Options(
        model=str(start),
        reward=str(rm),
        data=data,
        out=str(tmp_path / "out"),
        device="cpu",
        iterations=3,
        warmup=2,
        epochs=2,
    )
    o.batch, o.minibatch, o.max_new_tokens, o.temperature, o.no_end_score, o.lam, o.gamma = (
        12,
        12,
        4,
        T,
        -0.7,
        0.9,
        0.95,
    )
    o.lr, o.kl_coef, o.target_kl, o.horizon, o.clip, o.vf_coef = 0.01, 0.3, 1.0, 60.0, 0.1, 6.0
    ppo.ppo(o)

    prompt = templates.render(TOK, prompts(1)[0], add_generation_prompt=True)[0]
    policy, critic = Trained(model, eps=1e-5), Trained(hub.load(rm)[0], eps=1e-5)
    reference, judge, beta, ended = hub.load(start)[0].double(), hub.load(rm)[0].double(), 0.3, 0
    steered = []

    def values(a):
        """V before each of the answer's tokens: the critic's score at the token before it, in
        deviations.
        """
        return (critic.model(torch.tensor([prompt + a]))[0, len(prompt) - 1 : -1] - 0.4) / 1.7

    for it, line in enumerate(metrics(tmp_path / "out")):
        answers, lr = said[it], rate(it, 3, 0.01, 2)
        n = sum(map(len, answers))
        with torch.no_grad():
            old, ref = ([logp(m, prompt, a, T) for a in answers] for m in (policy.model, reference))
            scores = [
                ((score(judge, prompt, a) - 0.4) / 1.7).item() if a[-1] == END else -0.7
                for a in answers
            ]
            was, advantages, returns = [values(a) for a in answers], [], []
            for a, o_, r, v, s in zip(answers, old, ref, was, scores, strict=True):
                rewards = (-beta * (o_ - r)).tolist()
                rewards[-1] += s
                after, found = [*v[1:].tolist(), 0.0], []
                for t in range(len(a)):
                    delta = [rewards[k] + 0.95 * after[k] - v[k].item() for k in range(t, len(a))]
                    found.append(sum((0.95 * 0.9) ** k * d for k, d in enumerate(delta)))
                advantages.append(torch.tensor(found, dtype=torch.float64))
                returns.append(advantages[-1] + v)
            spread = torch.cat(advantages)
            advantages = [
                (a - spread.mean()) / (spread.var(unbiased=False) + 1e-8).sqrt() for a in advantages
            ]
            R, d = torch.cat(returns), torch.cat(old) - torch.cat(ref)
            explained = 1 - (R - torch.cat(was)).var(unbiased=False) / R.var(unbiased=False)
        means = dict(policy_loss=0.0, value_loss=0.0, clip_fraction=0.0)
        for _ in range(2):
            pg, vf, held = 0.0, 0.0, 0
            for a, o_, v, adv, ret in zip(answers, old, was, advantages, returns, strict=True):
                ratio, now = (logp(policy.model, prompt, a, T) - o_).exp(), values(a)
                pg = pg - torch.minimum(ratio * adv, ratio.clamp(0.9, 1.1) * adv).sum() / n
                held += ((ratio > 1.1) & (adv > 0) | (ratio < 0.9) & (adv < 0)).sum().item()
                close = v + (now - v).clamp(-0.1, 0.1)
                vf = vf + 0.5 * torch.maximum((now - ret) ** 2, (close - ret) ** 2).sum() / n
            policy.step(pg, lr)
            critic.step(6.0 * vf, lr)
            for k, x in dict(policy_loss=pg, value_loss=vf, clip_fraction=held / n).items():
                means[k] += (x.item() if torch.is_tensor(x) else x) / 2
        k1 = d.sum().item() / 12
        error = max(-0.2, min(0.2, k1 / 1.0 - 1))
        beta *= 1 + error * 12 / 60
        ended += sum(a[-1] == END for a in answers)
        steered.append(error)
        near(
            line,
            step=it,
            reward=sum(scores) / 12,
            kl=k1,
            kl_k3=((-d).exp() - 1 + d).sum() / 12,
            beta=beta,
            entropy=-torch.cat(old).mean(),
            explained_variance=explained,
            length=n / 12,
            finished=sum(a[-1] == END for a in answers) / 12,
            **means,
        )
        assert line["ratio_error"] < 1e-3
    assert any(abs(error) < 0.2 for error in steered)
    assert len(said) == 3 and 6 < ended < 30 and line["kl"] > 0.01 and line["clip_fraction"] > 0
    policy.check(tmp_path / "out")
    clipped = [max(1.0, norm) for norm in critic.norms]  # the critic is seen in the values alone
    assert max(clipped) > 1.3 * min(clipped), clipped


# ---------------------------------------------------------------- what is read, and in which order
@pytest.fixture
def read():
    """What models read from here on, a pass each: (with gradient?, the ids)."""
    seen = []

    def note(module, args, _):
        if isinstance(module, torch.nn.Embedding):
            seen.append((torch.is_grad_enabled(), set(args[0].flatten().tolist())))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    yield seen
    hook.remove()


@pytest.fixture
def chosen(monkeypatch):
    """The batches of records that stages are given from here on."""
    seen, real = [], records.batch
    monkeypatch.setattr(records, "batch", lambda *args: seen.append(real(*args)) or seen[-1])
    return seen


STAGES = {"sft": sft, "reward": reward, "dpo": dpo, "simpo": dpo, "ppo": ppo}
# one token each, which stand in nothing else
LETTERS = {letter: TOK.encode(letter)[0] for letter in "ABCDEFGHMNZ"}


def found(passes):
    """The letters that were read in each pass."""
    return ["".join(k for k, i in LETTERS.items() if i in ids) for ids in passes]


def letter(record):
    """The one that its prompt begins with, whatever the record is made of."""
    return re.search(r"'([A-Z])\d+\?'", str(record))[1]


def stage(name, at, asked, seed=0, answers=("yes", "no", "hm"), **options):
    """Runs a stage on these prompts, in which answers[0] is the demonstrated and the best one → the
    folder that it wrote.
    """
    model = lm(1)
    with torch.no_grad():  # which says none of the letters
        model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[list(LETTERS.values()), 0] = -20.0
    hub.save(at / "start", model, TOK)
    rows = {
        "sft": lambda p: {"messages": p + [said(answers[0])]},
        "ppo": lambda p: {"messages": p},
    }.get(
        name,
        lambda p: {"prompt": p, "responses": list(answers), "ranks": list(range(len(answers)))},
    )
    o = STAGES[name].Options(
        model=str(at / "start"),
        out=str(at / f"{name}{seed}"),
        device="cpu",
        seed=seed,
        overwrite=True,
    )
    o.data = write(at / "data.jsonl", map(rows, asked))
    if name == "reward":
        chats = [{"messages": user(f"{i}") + [said("of course" * (1 + i % 2))]} for i in range(130)]
        o.reference = write(
            at / "reference.jsonl", [*chats, {"messages": user("1") + [said("Z" * 130)]}]
        )
    if name == "ppo":
        o.reward = str(at / "judge.py") + ":judge"
        (at / "judge.py").write_text(
            "def judge(prompts, answers):\n    return [len(set(a)) for a in answers]\n"
        )
        o.max_new_tokens, o.minibatch = 3, 2
    o.loss = "simpo" if name == "simpo" else "dpo"
    vars(o).update(options)
    getattr(STAGES[name], name if name != "simpo" else "dpo")(o)
    return at / f"{name}{seed}"


@pytest.mark.parametrize("name", STAGES)
def test_held_out_records_and_what_exceeds_the_context_are_never_trained(name, read, tmp_path):
    """M marks the training side, N the held-out one, Z what fits --length but not the context of
    128 tokens.
    """
    asked = prompts(3, held=True, text="N{}?") + prompts(4, text="M{}?")
    if name in ("sft", "reward", "dpo", "simpo"):
        asked += prompts(1, text="Z{}" + 110 * "x")
    else:
        asked += prompts(1, text="Z{}" + 130 * "x")
    times = dict(iterations=2) if name == "ppo" else dict(steps=3)
    stage(name, tmp_path, asked, batch=4, answers=("yes", "no", "Z" * 130), **times)
    assert {"".join(sorted(f)) for f in found(ids for grad, ids in read if grad)} == {"M"}
    unlearnt = {"sft": set(), "reward": {"N", ""}, "dpo": {"M"}, "simpo": set(), "ppo": {"M", ""}}[
        name
    ]
    # reward: its accuracy, and the reference answers
    assert set(found(ids for grad, ids in read if not grad)) == unlearnt


@pytest.mark.parametrize("name", ("sft", "reward", "dpo", "simpo"))
def test_each_epoch_and_each_seed_has_its_own_order(name, read, tmp_path):
    asked, orders = [prompts(1, text=x + "{}?")[0] for x in "ABCDEFGH"], {}
    for seed in (0, 1):
        read.clear()
        stage(name, tmp_path, asked, seed, batch=4, steps=6)
        orders[seed] = found(ids for grad, ids in read if grad)
        assert len(orders[seed]) == 6 and all(len(f) == 4 for f in orders[seed])
        epochs = [orders[seed][i : i + 2] for i in (0, 2, 4)]
        assert all(sorted(a + b) == list("ABCDEFGH") for a, b in epochs)
        assert len({a for a, _ in epochs}) > 1
    assert orders[0] != orders[1] and orders[0][:2] != ["ABCD", "EFGH"] != orders[1][:2]


def test_dpo_has_the_reference_s_word_on_what_it_reads_alone(read, tmp_path):
    asked, sides = [prompts(1, text=x + "{}?")[0] for x in "ABCDEFGH"], {}
    for seed in (0, 1):
        read.clear()
        stage("dpo", tmp_path, asked, seed, batch=4, steps=1)
        (reference,), (sides[seed],) = (
            found(ids for grad, ids in read if grad == wanted) for wanted in (False, True)
        )
        assert reference == sides[seed] and len(reference) == 4
    assert sides[0] != sides[1]


def test_dpo_s_best_against_worst(tmp_path):
    out = stage("dpo", tmp_path, prompts(3), batch=3, steps=1, pairs="best_worst")
    assert (
        metrics(out)[0]["pairs"] == 3
        and metrics(stage("dpo", tmp_path, prompts(3), batch=3, steps=1))[0]["pairs"] == 9
    )


def test_reward_s_reference_answers_are_chosen_by_the_seed(chosen, tmp_path):
    sets = []
    for seed in (0, 1):
        chosen.clear()
        stage("reward", tmp_path, prompts(2), seed, batch=2, steps=1)
        sets.append([b for b in chosen if len(b) == 128])
    assert len(sets[0]) == len(sets[1]) == 1 and sets[0] != sets[1]


def test_ppo_s_prompts_answers_and_minibatches(read, chosen, monkeypatch, tmp_path):
    """Each round's prompts come in turn, its answers are new ones, and each pass over them has an
    order of its own.
    """
    asked, runs, real, answers = (
        [prompts(1, text=x + "{}?")[0] for x in "ABCDEFGH"],
        {},
        ppo.generate,
        [],
    )
    monkeypatch.setattr(
        ppo,
        "generate",
        lambda *args, **options: answers.append(real(*args, **options)) or answers[-1],
    )
    for seed in (0, 1):
        for seen in (read, chosen, answers):
            seen.clear()
        stage("ppo", tmp_path, asked, seed, batch=8, minibatch=2, epochs=3, iterations=2, lr=1e-9)
        passes = found(ids for grad, ids in read if grad)
        # policy and critic read the same
        assert len(passes) == 2 * 3 * 4 * 2 and passes[::2] == passes[1::2]
        rounds = ["".join(map(letter, batch)) for batch in chosen]
        assert len(rounds) == 2 and all(sorted(r) == list("ABCDEFGH") for r in rounds)
        # of each pass over a round's answers: which of them stand together, by their places in the
        # round
        orders = []
        for i in range(6):
            pairs = passes[8 * i : 8 * i + 8 : 2]
            assert sorted("".join(pairs)) == list("ABCDEFGH")
            orders.append([{rounds[i // 3].index(letter) for letter in pair} for pair in pairs])
        assert [{0, 1}, {2, 3}, {4, 5}, {6, 7}] not in orders
        assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
        runs[seed] = rounds, orders
    assert all(a != b for a, b in zip(runs[0], runs[1], strict=True))
    answers.clear()
    for seed in (0, 1):
        stage("ppo", tmp_path, asked[:1], seed, batch=8, epochs=1, iterations=2, lr=1e-9)
    assert all(
        sum(x == y for x, y in zip(a, b, strict=True)) < 4
        for i, a in enumerate(answers)
        for b in answers[:i]
    )
    for seed in (0, 1):
        chosen.clear()
        stage("ppo", tmp_path, asked, seed, batch=4, iterations=2, lr=1e-9)
        first, second = ("".join(map(letter, batch)) for batch in chosen)
        assert sorted(first + second) == list("ABCDEFGH")


# ---------------------------------------------------------------- rates
@pytest.mark.parametrize("lora", (0, 4))
@pytest.mark.parametrize(
    ("name", "weights"), (("sft", 5e-4), ("reward", 1e-3), ("dpo", 2e-4), ("ppo", 2e-4))
)
def test_each_stage_s_own_rate_and_lora_s(name, weights, lora, tmp_path):
    """Adam's first step moves a number by the learning rate, whatever its gradient."""
    times = (
        dict(iterations=1, epochs=1, minibatch=4, batch=4)
        if name == "ppo"
        else dict(steps=1, batch=4)
    )
    out = stage(name, tmp_path, prompts(4), warmup=0, lora=lora, **times)
    if lora:
        # from 0
        moved = {
            k: v
            for k, v in load_file(out / "adapter" / "adapter_model.safetensors").items()
            if "lora_B" in k
        }
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 8)  # α is twice the rank
    else:
        before = load_file(tmp_path / "start" / "model.safetensors")
        after = load_file(out / "model.safetensors")
        moved = {k: v - before[k] for k, v in after.items() if k in before}
    assert len(moved) > 10
    assert max(v.abs().max().item() for v in moved.values()) == pytest.approx(
        weights * (5 if lora else 1), rel=0.01
    )


def test_an_adapter_starts_from_the_seed(tmp_path):
    a = [{}, {}, {}]
    for i, seed in enumerate((0, 1, 0)):
        out = stage("sft", tmp_path, prompts(2), seed, batch=2, steps=1, lora=2, lr=1e-9)
        a[i] = load_file(out / "adapter" / "adapter_model.safetensors")
    down = [k for k in a[0] if "lora_A" in k]
    assert len(down) == 14 and all(
        torch.equal(a[0][k], a[2][k]) and not torch.allclose(a[0][k], a[1][k], atol=1e-3)
        for k in down
    )


# ---------------------------------------------------------------- comparisons
def compared(at, monkeypatch, rows, judge, **options):
    """compare.py on these records → its rankings, and what was generated, in order."""
    answers, real = [], compare.generate
    with monkeypatch.context() as m:
        m.setattr(
            compare,
            "generate",
            lambda *args, **more: answers.extend(got := real(*args, **more)) or got,
        )
        o = compare.Options(
            model=folder(at / "start", 1),
            data=write(at / "p.jsonl", rows),
            out=str(at / "c.jsonl"),
            overwrite=True,
        )
        o.labeller, o.k, o.batch, o.max_new_tokens, o.device = judge, 3, 4, 5, "cpu"
        vars(o).update(options)
        compare.compare(o)
    return [json.loads(line) for line in (at / "c.jsonl").read_text().splitlines()], answers


def test_comparisons_by_a_reader_s_labeller(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, answers):\n    return [len(prompts[i][-1]['content']) * len(set(a)) //"
        " 2 for i, a in enumerate(answers)]\n"
    )
    rows = [
        {"messages": user("x" * i + "?"), "source": i, "reference": "a secret"}
        for i in range(1, 10)
    ]
    rows.append({"messages": user("Z" * 130)})  # leaves no room
    runs = {}
    for seed in (0, 1):
        found, answers = compared(
            tmp_path, monkeypatch, rows, f"{tmp_path}/judge.py:judge", seed=seed, prompts=10
        )
        asked = [r["prompt"][0]["content"] for r in found]
        assert sorted(asked) == ["x" * i + "?" for i in range(1, 10)] != asked
        assert len(answers) == 27 and len({tuple(a) for a in answers}) > 20
        for i, r in enumerate(found):
            mine = answers[3 * i : 3 * i + 3]
            assert r["responses"] == [TOK.decode(a, skip_special=True) for a in mine]
            assert r["finished"] == [a[-1] == END for a in mine]
            scores = [len(asked[i]) * len(set(text)) // 2 for text in r["responses"]]
            assert r["ranks"] == [sum(s > mine for s in scores) for mine in scores]
            assert r["source"] == len(asked[i]) - 1 and "reference" not in r
        runs[seed] = asked, answers
    assert all(a != b for a, b in zip(runs[0], runs[1], strict=True))
    found, _ = compared(
        tmp_path, monkeypatch, rows, f"{tmp_path}/judge.py:judge", prompts=4, temperature=1e-4
    )
    # as good as greedy
    assert len(found) in (3, 4) and all(
        len(set(r["responses"])) == 1 and r["ranks"] == [0, 0, 0] for r in found
    )
    one = [{"messages": user("x")}] * 8
    _, answers = compared(tmp_path, monkeypatch, one, f"{tmp_path}/judge.py:judge", batch=2)
    assert len({tuple(a) for a in answers}) > 20  # each batch draws anew
    ours, theirs = (
        compared(tmp_path, monkeypatch, one, f"{tmp_path}/judge.py:judge", seed=s)[1]
        for s in (0, 1)
    )
    assert sum(a == b for a, b in zip(ours, theirs, strict=True)) < 6


def test_ten_labellers_of_the_world_share_the_prompts(tmp_path, monkeypatch):
    rows = world.records(0, {"sft": 22, "prompts": 22, "heldout": 22})["prompts"]
    for seed in (0, 1):
        found, answers = compared(
            tmp_path, monkeypatch, rows, "world", seed=seed, k=6, max_new_tokens=8
        )
        people = set()
        for i, r in enumerate(found):
            labeller = world.Labeller(f"{seed} {i % 10}")
            assert r["ranks"] == labeller.rank(r["item"], r["responses"], r["finished"])
            people |= {
                n
                for n in range(10)
                if world.Labeller(f"{seed} {n}").rank(r["item"], r["responses"], r["finished"])
                != r["ranks"]
            }
        assert len(found) > 12 and people  # they differ

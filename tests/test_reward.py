"""The reward model: the ranking loss by brute force and by its goldens, which answer gets which score, padding, and what it learns."""

import itertools
import json
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import chat_tokenizer, folder, lm, metrics, user, write

import dpo
import evals
import hub
import ppo
import reward
from data import records, templates
from model import join, last_score, scalar_model
from reward import ranking_loss

GOLDEN = Path(__file__).parent / "golden"
NAN = math.nan


def brute(scores, ranks):
    """InstructGPT's equation 1, pair by pair."""
    prompts = []
    for row, order in zip(scores.tolist(), ranks.tolist(), strict=True):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(row)), 2) if 0 <= order[i] < order[j]]
        prompts += [sum(math.log1p(math.exp(row[j] - row[i])) for i, j in pairs) / len(pairs)] if pairs else []
    return sum(prompts) / len(prompts) if prompts else 0.0


RANKS = torch.tensor(
    [
        [0, 1, 2, 3],  # six pairs
        [1, 0, 1, 0],  # ties: four pairs
        [0, -1, 2, -1],  # two are absent: one pair
        [2, 2, 2, 2],  # nothing to compare
        [-1, -1, -1, 0],  # nor here
        [3, 1, -1, 1],
    ]
)


# ---------------------------------------------------------------- the loss
def test_two_answers():
    better, worse = torch.randn(5), torch.randn(5)
    loss = ranking_loss(torch.stack((better, worse), 1), torch.tensor([[0, 1]] * 5))
    assert torch.allclose(loss, -F.logsigmoid(better - worse).mean())
    swapped = ranking_loss(torch.stack((worse, better), 1), torch.tensor([[1, 0]] * 5))
    assert torch.allclose(loss, swapped)


def test_the_loss_is_the_mean_over_a_prompts_pairs_and_then_over_prompts():
    scores = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    assert ranking_loss(scores, RANKS).item() == pytest.approx(brute(scores, RANKS), abs=1e-12)
    for i in range(6):
        assert ranking_loss(scores[i : i + 1], RANKS[i : i + 1]).item() == pytest.approx(
            brute(scores[i : i + 1], RANKS[i : i + 1]), abs=1e-12
        )
    comparable = torch.stack([ranking_loss(scores[[i]], RANKS[[i]]) for i in (0, 1, 2, 5)])  # a prompt weighs 1, however many its pairs
    assert torch.allclose(ranking_loss(scores, RANKS), comparable.mean())


def test_the_order_of_answers_and_of_prompts_does_not_matter():
    scores = torch.randn(6, 4, dtype=torch.float64)
    loss = ranking_loss(scores, RANKS)
    for seed in range(5):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(ranking_loss(scores[:, order], RANKS[:, order]), loss)
    assert torch.allclose(ranking_loss(scores.flip(0), RANKS.flip(0)), loss)
    assert torch.allclose(ranking_loss(scores, torch.where(RANKS < 0, -1, RANKS * 7)), loss)  # ranks are an order, not distances


@pytest.mark.parametrize("anything", [NAN, math.inf, -math.inf, 1e30])
def test_an_absent_answers_score_may_be_anything(anything):
    scores = torch.randn(6, 4, dtype=torch.float64)
    loss = ranking_loss(scores, RANKS)
    odd = torch.where(RANKS < 0, anything, scores).requires_grad_()
    got = ranking_loss(odd, RANKS)
    got.backward()
    assert torch.allclose(got, loss) and odd.grad.isfinite().all() and (odd.grad[RANKS < 0] == 0).all()
    assert (odd.grad[[0, 1, 2, 5]] != 0).sum() == 4 + 4 + 2 + 3


def test_nothing_to_compare_is_0_with_finite_gradients():
    scores = torch.randn(2, 3, requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 1, 1], [-1, 0, -1]]))
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()


def test_large_margins_neither_overflow_nor_vanish():
    scores = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1, 0]]))
    loss.backward()
    assert loss == 2e4 and scores.grad.tolist() == [[1.0, -1.0]]


def test_finite_differences():
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: ranking_loss(s, RANKS), scores)


def test_the_peers_own_numbers():
    """TRL's reward loss of pairs of token ids, through transformers' scores: ours from the same checkpoint."""
    model, _ = hub.load(GOLDEN / "llama_scores")
    for g in json.loads((GOLDEN / "losses.json").read_text())["reward"]:
        scores, ranks = reward.scores_of(model, [(p, [r, c], [1, 0]) for p, c, r in g["pairs"]], torch.device("cpu"))
        assert ranking_loss(scores, ranks).item() == pytest.approx(g["loss"], abs=1e-5)


# ---------------------------------------------------------------- which answer gets which score
@pytest.fixture(scope="module")
def model():
    return scalar_model(lm(3), torch.Generator().manual_seed(0))


def batch(shapes=((3, 4), (9, 2), (1, 3)), seed=0):
    """[(tokens of the prompt, answers)] → [(prompt ids, [answer ids], ranks)], ragged."""
    rng = random.Random(seed)
    ids = lambda n: [rng.randrange(277) for _ in range(n)]  # noqa: E731
    return [(ids(p), [ids(rng.randint(1, 9)) for _ in range(k)], rng.sample(range(k), k)) for p, k in shapes]


def test_every_answers_score_is_its_own(model):
    rows = batch()
    scores, ranks = reward.scores_of(model, rows, torch.device("cpu"))
    assert scores.shape == ranks.shape == (3, 4)
    assert ranks.tolist() == [r + [-1] * (4 - len(r)) for _, _, r in rows]
    for i, (prompt, answers, _) in enumerate(rows):
        for j, answer in enumerate(answers):  # alone, unpadded, by the plain forward
            alone = model(torch.tensor([prompt + answer]))[0, -1]
            assert abs(scores[i, j] - alone) < 1e-5, (i, j)
    assert len({round(s, 4) for s in scores[ranks >= 0].tolist()}) == 9


def test_every_answer_is_read_once_whatever_its_pairs(model, monkeypatch):
    read = []
    monkeypatch.setattr(reward, "last_score", lambda m, tokens, *masks: read.append(len(tokens)) or last_score(m, tokens, *masks))
    reward.scores_of(model, batch(), torch.device("cpu"))
    assert read == [4 + 2 + 3]  # K forward passes, K(K-1)/2 comparisons


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_the_score_is_read_at_the_last_token_also_where_padding_is_an_end(model, end):
    """Turns that end in the padding's own id: the score must come from the end of the answer, whatever fills the row up."""
    tok = chat_tokenizer(pad=end)
    chat = user("a") + [{"role": "assistant", "content": "b"}] + user("c?")
    prompt, answer = templates.answer_ids(tok, chat, "d")
    alone = model(torch.tensor([prompt + answer]))[0, -1].item()
    for fill in (0, tok.special[end]):
        for width in range(0, 4):
            tokens = torch.tensor([prompt + answer + [fill] * width])
            mask = torch.arange(tokens.shape[1])[None] < len(prompt + answer)
            assert abs(last_score(model, tokens, mask).item() - alone) < 1e-5
    other = model(torch.tensor([prompt + answer[:-1]]))[0, -1].item()
    assert abs(other - alone) > 1e-3


def test_training_evaluation_and_ppo_read_the_same_text(tmp_path, model):
    tok = chat_tokenizer()
    model.config.reward_mean, model.config.reward_std = 0.25, 2.0
    hub.save(tmp_path / "rm", model, tok)
    chats, texts = [user("hi"), user("what is one and two?")], ["sure, three.", "of course"]
    ids = [templates.answer_ids(tok, c, t) for c, t in zip(chats, texts, strict=True)]
    assert all(a[-1] == templates.end_id(tok) for _, a in ids)
    rankings = [{"prompt": c, "responses": [t, t + "!"], "ranks": [1, 0]} for c, t in zip(chats, texts, strict=True)]
    trained = reward.scores_of(model, reward.prepare("x", rankings, tok, 128), torch.device("cpu"))[0][:, 0]
    evaluated = torch.tensor(evals.score_texts(model, tok, chats, texts))
    judge, _ = ppo.load_reward(ppo.Options(reward=str(tmp_path / "rm")), None, tok, "cpu")
    asked = [templates.render(tok, c, add_generation_prompt=True)[0] for c in chats]
    answers = [[*tok.encode(t), templates.end_id(tok)] for t in texts]  # as the sampler leaves them
    in_ppo = judge(*join(asked, answers)[:2], chats, texts)
    assert torch.allclose(trained, evaluated, atol=1e-5)
    assert torch.allclose(in_ppo, (trained - 0.25) / 2, atol=1e-5)


def test_what_is_too_long_absent_or_tied_is_left_out(capsys):
    tok = chat_tokenizer()
    rankings = [
        {"prompt": user("a"), "responses": ["x", "y" * 200, "z", "w"], "ranks": [2, 0, 1, -1]},
        {"prompt": user("b"), "responses": ["x", "y" * 200], "ranks": [1, 0]},
        {"prompt": user("c"), "responses": ["x", "y", "z"], "ranks": [0, 0, -1]},
    ]
    ((prompt, answers, ranks),) = reward.prepare("file", rankings, tok, 64)
    assert prompt == templates.render(tok, user("a"), add_generation_prompt=True)[0]
    assert answers == [[*tok.encode(t), 279] for t in "xz"] and ranks == [2, 1]
    assert "1 rankings used, dropped 3 with answers longer than 64 tokens or absent" in capsys.readouterr().err


def test_equal_answers_become_one_at_their_mean_rank(capsys):
    """So the reward model never learns two ranks of one text."""
    tok = chat_tokenizer()
    rows = [
        {"prompt": user("a"), "responses": ["x", "y", "x", "z"], "ranks": [0, 1, 3, 2]},  # x: 1.5, between y and z
        {"prompt": user("b"), "responses": ["x", "x", "y"], "ranks": [0, 2, 1]},  # x and y are tied then: nothing to compare
        {"prompt": user("c"), "responses": ["x", "y", "z"], "ranks": [5, 0, 5]},  # as they were
        {"prompt": user("d"), "responses": ["x", "x", "y"], "ranks": [0, 1, 2], "finished": [True, False, True]},  # two answers
    ]
    kept = reward.prepare("file", rows, tok, 64)
    told = [[tok.decode(a) for a in answers] for _, answers, _ in kept]
    x, y, z = (t + "<|im_end|>" for t in "xyz")
    assert told == [[x, y, z], [x, y, z], [x, "x", y]] and [ranks for _, _, ranks in kept] == [[1, 0, 2], [5, 0, 5], [0, 1, 2]]
    assert "file: 2 answers equal another to their prompt" in capsys.readouterr().err
    for _, answers, _ in kept:
        assert len({tuple(a) for a in answers}) == len(answers)


def test_a_cut_answer_has_no_end_and_sampled_ids_are_read_as_they_are(tmp_path):
    """By the reward model, DPO and the evaluation alike; a text is encoded again where its ids are another vocabulary's."""
    tok = chat_tokenizer()
    half = tok.encode("\u20ac")[:-1]  # cut inside a character: its text is U+FFFD
    other = [*tok.encode("t"), *tok.encode("he"), 279]  # "the", not as the tokenizer cuts it
    texts, ended = ["\ufffd", "the", "yes"], [False, True, False]
    assert tok.decode(half) == texts[0] and other[:-1] != tok.encode("the") and tok.encode(texts[0]) != half
    row = {"prompt": user("b"), "responses": texts, "ranks": [2, 1, 0], "finished": ended}
    ids = {"ids": [half, other, tok.encode("yes")], "tokenizer": tok.hash}
    again = [tok.encode("\ufffd"), [*tok.encode("the"), 279], tok.encode("yes")]
    for more, expected in (({}, again), (ids, ids["ids"]), (ids | {"tokenizer": "0" * 16}, again)):
        ((_, answers, _),) = reward.prepare("x", [row | more], tok, 64)
        assert answers == expected
        file = write(tmp_path / "r.jsonl", [row | more])
        ((_, answers, pairs),) = dpo.prepare(file, "all", tok, 64)
        told = {(tuple(answers[w]), tuple(answers[l])) for w, l in pairs}
        assert told == {(tuple(expected[w]), tuple(expected[l])) for w, l in ((2, 1), (2, 0), (1, 0))}
        chosen = evals.in_pairs(tok, records.pairs(file))[2][:3]
        assert sorted(chosen) == sorted([expected[2], expected[2], expected[1]])
    empty = {"prompt": "b", "responses": ["", "x", "y"], "ranks": [0, 1, 2], "finished": [False, True, True]}
    ((_, answers, pairs),) = dpo.prepare(write(tmp_path / "e.jsonl", [empty]), "all", tok, 64)
    assert [tok.decode(answers[i]) for i in pairs[0]] == ["x<|im_end|>", "y<|im_end|>"] and len(pairs) == 1


def test_what_is_no_ranking_s_own_field_is_refused_with_its_line(tmp_path):
    good = {"prompt": "a", "responses": ["x", "y"], "ranks": [0, 1]}
    for field, value in (("finished", [True]), ("finished", "yes"), ("finished", [1, 0]), ("ids", [[1]]), ("ids", [[1], []]),
                         ("ids", [[1], ["a"]]), ("ids", [[1], [-2]]), ("ids", "a")):  # fmt: skip
        file = write(tmp_path / "r.jsonl", [good, good | {"tokenizer": "t", field: value}])
        with pytest.raises(ValueError, match=f"r.jsonl:2: {field}: .*as many as responses, were expected"):
            records.rankings(file)
    mine = write(tmp_path / "r.jsonl", [good | {"ids": [7, 8]}, {"prompt": "a", "chosen": "x", "rejected": "y", "finished": 3, "ids": 4}])
    assert not any({"ids", "finished"} & r.keys() for r in records.rankings(mine))  # a reader's own: they say nothing of tokens


# ---------------------------------------------------------------- the stage
def test_scores_that_do_not_differ_are_refused_before_anything_is_saved(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}?", "responses": ["yes", "no"], "ranks": [0, 1]} for i in range(20)]
    data = write(tmp_path / "rankings.jsonl", rows)
    reference = write(tmp_path / "chats.jsonl", [{"prompt": "?", "completion": a} for a in "abcd"])
    monkeypatch.setattr(reward, "reference_scores", lambda *_: (0.3, 1e-9))
    o = reward.Options(model=folder(tmp_path / "sft"), data=data, reference=reference, out=str(tmp_path / "rm"), device="cpu", steps=1)
    with pytest.raises(ValueError, match="chats.jsonl: the scores of the reference answers do not differ"):
        reward.reward(o)
    assert not (tmp_path / "rm" / "config.json").exists()


def test_it_learns_the_ranking_and_its_reference_answers_have_mean_0_and_deviation_1(tmp_path):
    rng = random.Random(0)
    words = ["one", "two", "three", "Peru", "Lima", "the capital"]

    def ranking(i):  # 2 the best; all of like length
        said = [" ".join([*rng.choices(words, k=2), manner]) for manner in ("go away!", "i do not know", "thank you!")]
        order = rng.sample(range(3), 3)
        return {"prompt": user(f"{rng.choice(words)} {i}?"), "responses": [said[n] for n in order], "ranks": [2 - n for n in order]}

    rows = [ranking(i) for i in range(120)]
    data = write(tmp_path / "rankings.jsonl", rows)
    chats = [{"messages": r["prompt"] + [{"role": "assistant", "content": r["responses"][0]}]} for r in rows]
    reference = write(tmp_path / "chats.jsonl", chats)
    o = reward.Options(model=folder(tmp_path / "sft", std=0.2), data=data, reference=reference, out=str(tmp_path / "rm"), device="cpu")
    o.steps, o.lr = 40, 5e-3
    reward.reward(o)
    log = metrics(tmp_path / "rm")
    assert log[-1]["held_out_accuracy"] > 0.95 and log[39]["loss"] < 0.2 < 0.4 < log[0]["loss"]
    model, tok = hub.load(tmp_path / "rm")
    judge, _ = ppo.load_reward(ppo.Options(reward=str(tmp_path / "rm")), None, tok, "cpu")
    ids = [templates.answer_ids(tok, c["messages"][:-1], c["messages"][-1]["content"]) for c in chats]
    scores = judge(*join(*zip(*ids, strict=True))[:2], None, None)
    assert abs(scores.mean()) < 0.05 and abs(scores.std() - 1) < 0.05
    assert model.config.reward_std > 0.1

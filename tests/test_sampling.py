"""Sampling and decoding: with the cache = without, batched = single, and the distribution that is
drawn from."""

import pytest
import torch
from tiny import close, decoder, ragged

import sampling as S
from model import answer_mask, logprobs
from packing import pad


@pytest.fixture(scope="module")
def lm():
    return decoder().eval()


def plain_loop(model, prompts, n, temperature, top_p, eos_id, seed):
    """Generation without cache, batch or padding: a full forward for each token of each answer."""
    uniform = torch.rand(n, len(prompts), generator=torch.Generator().manual_seed(seed))
    answers = [[] for _ in prompts]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        while len(answer) < n and (not answer or answer[-1] != eos_id):
            logits = model(torch.tensor([prompt + answer]))[0, -1:]
            answer.append(
                S.sample(logits, temperature, top_p, uniform[len(answer), row].view(1)).item()
            )
    return answers


@pytest.mark.parametrize(
    "temperature, top_p, eos_id",
    [(0, 1.0, None), (1.0, 1.0, None), (1.3, 1.0, 4), (0.8, 0.7, 11), (0, 1.0, 8)],
)
def test_cached_generation_is_the_plain_loop(lm, temperature, top_p, eos_id):
    prompts = ragged([5, 1, 9, 3, 7, 2, 2], 5)
    answers = S.generate(lm, prompts, 14, temperature, top_p, eos_id, seed=3)
    with torch.no_grad():
        assert answers == plain_loop(lm, prompts, 14, temperature, top_p, eos_id, 3)


def test_prompts_of_one_token(lm):
    with torch.no_grad():
        assert S.generate(lm, [[1], [2]], 6, seed=1) == plain_loop(
            lm, [[1], [2]], 6, 1.0, 1.0, None, 1
        )


def test_cached_hidden_is_hidden(lm):
    # the last two columns are real in each row
    tokens, mask = pad(ragged((5, 2, 9, 3)), left=True)
    cache = S.Cache(lm, 4, 12)
    with torch.no_grad():
        steps = [
            lm.hidden(tokens[:, :4], mask[:, :4], cache=cache),
            lm.hidden(tokens[:, 4:7], mask[:, 4:7], cache=cache),
        ]
        steps += [lm.hidden(tokens[:, t : t + 1], cache=cache) for t in (7, 8)]
        close(torch.cat(steps, 1)[mask], lm.hidden(tokens, mask)[mask])


def test_batched_greedy_is_single(lm):
    prompts = ragged([5, 1, 9, 3, 7], 8)
    assert S.generate(lm, prompts, 15, temperature=0) == [
        S.generate(lm, [p], 15, temperature=0)[0] for p in prompts
    ]


def passes(model, call):
    """What call() gives, and the shapes that the model read."""
    read = []
    hook = model.embed_tokens.register_forward_hook(lambda m, x, y: read.append(tuple(x[0].shape)))
    out = call()
    hook.remove()
    return out, read


def test_an_answer_ends_with_its_end_token_and_soon_costs_nothing_more(lm):
    """Rows that have ended are dropped: nothing of what others say changes."""
    prompts, n, eos = ragged([4] * 40, 1), 12, 13
    answers, read = passes(lm, lambda: S.generate(lm, prompts, n, 1.5, eos_id=eos))
    lengths = [len(a) for a in answers]
    assert len(set(lengths)) > 3 and max(lengths) == n
    for answer in answers:
        assert eos not in answer[:-1] and (answer[-1] == eos or len(answer) == n)
    expected = [(16, 4), (16, 4), (8, 4)]  # of prompts that are read together
    for t in range(1, n):
        expected.append((sum(eos not in a[:t] and len(a) >= t for a in answers), 1))
    assert read == expected and expected[-1][0] <= 20
    without = S.generate(lm, prompts, n, 1.5)
    assert all(w[: len(a)] == a for a, w in zip(answers, without, strict=True))
    with torch.no_grad():
        assert answers == plain_loop(lm, prompts, n, 1.5, 1.0, eos, 0)


@pytest.mark.parametrize("temperature", (0, 1.3))
def test_prompts_of_many_lengths_are_read_a_few_at_a_time(lm, temperature):
    """Those of like length together, whatever their order: less padding, the same answers."""
    prompts = ragged([1 + 7 * i % 23 for i in range(40)], 9)
    answers, read = passes(lm, lambda: S.generate(lm, prompts, 6, temperature))
    lengths = sorted(map(len, prompts))
    assert read[:3] == [(16, lengths[15]), (16, lengths[31]), (8, lengths[39])]
    with torch.no_grad():
        assert answers == plain_loop(lm, prompts, 6, temperature, 1.0, None, 0)


def test_a_prompt_of_many_answers_is_read_once(lm):
    a, b = ragged((5, 8), 6)
    prompts = [a, b, a, a, b, a]
    answers, read = passes(lm, lambda: S.generate(lm, prompts, 7, seed=2))
    assert read == [(2, 8)] + [(6, 1)] * 6
    with torch.no_grad():
        assert answers == plain_loop(lm, prompts, 7, 1.0, 1.0, None, 2)
    assert len({tuple(answers[i]) for i in (0, 2, 3, 5)}) == 4


def test_decode_yields_each_answer_s_next_token_and_minus_1_after_its_end(lm):
    prompts, eos = ragged([4] * 9, 1), 6
    steps = list(S.decode(lm, prompts, 12, 1.5, eos_id=eos))
    answers = S.generate(lm, prompts, 12, 1.5, eos_id=eos)
    assert all(ids.shape == (9,) and ids.dtype == torch.long for ids in steps)
    for answer, column in zip(answers, torch.stack(steps, 1).tolist(), strict=True):
        assert column == answer + [-1] * (len(steps) - len(answer))
    assert len(steps) == max(map(len, answers)) and min(map(len, answers)) < 12


def test_keep_takes_rows_in_order_and_again(lm):
    tokens, mask = pad(ragged((5, 2, 9)), left=True)
    with torch.no_grad():
        cache = S.Cache(lm, 3, 10)
        lm.hidden(tokens, mask, cache)
        cache.keep(torch.tensor([2, 0, 2]))
        next_token = torch.tensor([[7], [8], [9]])
        got = lm.hidden(next_token, cache=cache)
    for h, row, i in zip(got, (ragged((5, 2, 9))[n] for n in (2, 0, 2)), (7, 8, 9), strict=True):
        close(h[0], lm.hidden(torch.tensor([[*row, i]]))[0, -1])


def test_generation_stops_when_all_have_ended(lm):
    first = S.generate(lm, [[1, 2]], 1, temperature=0)[0][0]
    steps = list(S.decode(lm, [[1, 2]], 9, temperature=0, eos_id=first))
    assert len(steps) == 1 and S.generate(lm, [[1, 2]], 9, temperature=0, eos_id=first) == [[first]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_s_probability_is_the_scorer_s(lm, temperature, monkeypatch):
    prompts, real = ragged([5, 1, 9, 3, 7], 4), S.sample
    uniforms = torch.rand(15, 5, generator=torch.Generator().manual_seed(0))
    drawn = torch.zeros(5, 15)
    steps = iter(range(15))

    def watched(logits, temperature, top_p, uniform):
        ids, step = real(logits, temperature, top_p, uniform), next(steps)
        rows = [uniforms[step].tolist().index(u) for u in uniform.tolist()]
        p = (logits / temperature).log_softmax(-1)
        drawn[rows, step] = p.gather(1, ids[:, None])[:, 0]
        return ids

    monkeypatch.setattr(S, "sample", watched)
    answers = S.generate(lm, prompts, 15, temperature, eos_id=2)
    mask = answer_mask(answers, 15)
    assert not mask.all()
    with torch.no_grad():
        found = logprobs(lm, prompts, answers, temperature, 15)
    close(found[mask], drawn[mask], 5e-5)


def shares(p, temperature=1.0, top_p=1.0, n=100_000):
    """How often each token is drawn at n evenly spaced uniforms: its probability, to 1/n."""
    uniform = (torch.arange(n) + 0.5) / n
    ids = S.sample(torch.tensor(p).log().expand(n, -1), temperature, top_p, uniform)
    return torch.bincount(ids, minlength=len(p)) / n


def test_sampling_follows_the_distribution():
    p = [0.05, 0.5, 0.15, 0.3]
    close(shares(p), torch.tensor(p), 1e-4)
    sharp = torch.tensor(p) ** 2
    close(shares(p, temperature=0.5), sharp / sharp.sum(), 1e-4)
    flat = torch.tensor(p) ** 0.5
    close(shares(p, temperature=2.0), flat / flat.sum(), 1e-4)
    assert S.sample(
        torch.tensor([[0.0, 2.0, 1.0]] * 3), 0, 1.0, torch.tensor([0.0, 0.5, 0.99])
    ).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "top_p, kept",
    [
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 2, 3]),
        (0.96, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_holds_it(top_p, kept):
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    expected = torch.zeros(4)
    expected[kept] = p[kept] / p[kept].sum()
    close(shares(p.tolist(), top_p=top_p), expected, 1e-4)
    ends = torch.tensor([0.0, 1 - 2**-24])  # torch.rand's smallest and largest
    assert set(S.sample(p.log().expand(2, -1), 1.0, top_p, ends).tolist()) <= set(kept)


def test_seeds(lm):
    prompts = ragged([4] * 8)
    state = torch.get_rng_state()
    one = S.generate(lm, prompts, 10, seed=1)
    assert one == S.generate(lm, prompts, 10, seed=1) and one != S.generate(lm, prompts, 10, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    # rows draw apart
    assert len({tuple(a) for a in S.generate(lm, [prompts[0]] * 8, 10, seed=1)}) == 8


def test_generation_refuses_what_does_not_fit(lm):
    assert len(S.generate(lm, [[1] * 60], 4)[0]) == 4
    with pytest.raises(ValueError, match="65 tokens exceed the model's context of 64"):
        S.generate(lm, [[1] * 60, [2]], 5)
    with pytest.raises(ValueError, match="a prompt is empty"):
        S.generate(lm, [[1], []], 5)


def test_a_prompt_s_room(lm):
    assert S.prompt_room(lm, 4) == 60 and S.prompt_room(lm, 63) == 1
    with pytest.raises(ValueError, match="--max-new-tokens 64: the model's context is 64 tokens"):
        S.prompt_room(lm, 64)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_one_logit_that_is_not_finite_is_found(lm, number):
    hook = lm.lm_head.register_forward_hook(
        lambda module, x, y: y.index_put((torch.tensor(1), torch.tensor(5)), torch.tensor(number))
    )
    with pytest.raises(ValueError, match="token 1 are NaN or infinite"):
        S.generate(lm, [[1], [2], [3]], 4)
    hook.remove()


def test_a_cache_has_the_type_in_which_the_model_computes(lm):
    with torch.autocast("cpu", torch.bfloat16):
        assert S.Cache(lm, 2, 5).kv[0][0].dtype == torch.bfloat16
    assert S.Cache(lm, 2, 5).kv[0][0].dtype == torch.float32


def test_rows_that_stay_are_not_copied(lm):
    cache = S.Cache(lm, 5, 8)
    cache.length, (keys, values), mask = 6, cache.kv[0], cache.mask
    for i in range(5):
        keys[i], values[i], mask[i, :6] = i + 1, -i - 1, torch.arange(6) >= i
    cache.keep(torch.tensor([0, 4, 2]))
    assert cache.kv[0][0].data_ptr() == keys.data_ptr() and len(cache.mask) == 3
    for row, i in enumerate((0, 4, 2)):
        assert (cache.kv[0][0][row, :, :6] == i + 1).all()
        assert (cache.kv[0][1][row, :, :6] == -i - 1).all()
        assert torch.equal(cache.mask[row, :6], torch.arange(6) >= i)
    assert (keys[1, :, 6:] == 2).all()  # nor is what no token has used

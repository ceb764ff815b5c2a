"""The transformer by invariance (padded = unpadded, batched = single, cached = uncached, packed =
separate) and against its definition, written out in float64. Weights are large, so that attention
is far from uniform and a wrong mask shows."""

import copy

import pytest
import torch

import model as M
from model import Config, Transformer

V = 37
SHAPES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "wide heads": dict(head_dim=12, tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "rope and eps": dict(rope_theta=100.0, rms_norm_eps=0.5),
}


def tiny(seed=0, std=0.35, **changes):
    shape = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    shape |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    model, generator = Transformer(Config(**shape | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # norms around 1, the rest around 0
            p.copy_(
                torch.randn(p.shape, generator=generator) * std
                + (p.dim() == 1 and 1.0) * (p.mean() == 1)
            )
    return model


def ragged(lengths=(5, 1, 9, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (n,), generator=generator).tolist() for n in lengths]


def close(a, b, tolerance=2e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance, (a - b).abs().max()


@pytest.fixture(scope="module")
def lm():
    return tiny().eval()


@pytest.fixture(scope="module")
def scalar():
    return M.scalar_model(tiny(3), torch.Generator().manual_seed(0)).eval()


def written_out(model, tokens):
    """The model's logits for one row, from its definition, in float64: no masks, no batches, one
    head and one token at a time.
    """
    c, w = model.config, {k: v.double() for k, v in model.state_dict().items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name + ".weight"]

    def linear(x, name):
        biased = c.attention_bias and "self_attn" in name or c.mlp_bias and "mlp" in name
        return torch.einsum("ti,oi->to", x, w[name + ".weight"]) + (
            w[name + ".bias"] if biased else 0.0
        )

    def turn(x, t):
        half = c.head_dim // 2
        angle = torch.tensor(
            [t * c.rope_theta ** (-2 * i / c.head_dim) for i in range(half)], dtype=torch.float64
        )
        return torch.cat(
            (
                x[:half] * angle.cos() - x[half:] * angle.sin(),
                x[half:] * angle.cos() + x[:half] * angle.sin(),
            )
        )

    x = w["embed_tokens.weight"][torch.tensor(tokens)]
    for n in range(c.num_hidden_layers):
        at, h = f"layers.{n}.", norm(x, f"layers.{n}.input_layernorm")
        q, k, v = (
            linear(h, f"{at}self_attn.{p}_proj").unflatten(1, (-1, c.head_dim)) for p in "qkv"
        )
        y = torch.zeros_like(q)
        for head in range(c.num_attention_heads):
            shared = head * c.num_key_value_heads // c.num_attention_heads
            for t in range(len(tokens)):
                scores = (
                    torch.stack([turn(q[t, head], t) @ turn(k[s, shared], s) for s in range(t + 1)])
                    / c.head_dim**0.5
                )
                y[t, head] = torch.einsum("s,sd->d", scores.softmax(0), v[: t + 1, shared])
        x = x + linear(y.flatten(1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(
            gate * torch.sigmoid(gate) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj"
        )
    return linear(norm(x, "norm"), "lm_head")


# -- the definition


@pytest.mark.parametrize("name", SHAPES)
def test_forward_is_the_definition(name):
    model, row = tiny(**SHAPES[name]), ragged([11])[0]
    expected = written_out(model, row)
    assert expected.std() > 0.5  # there is something to get wrong
    assert (model(torch.tensor([row]))[0] - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ("gqa", "mha", "mqa"))
def test_what_a_gpu_computes_is_the_definition(name):
    """A GPU's attention is given its keys and values repeated: here tensors that say that they lie
    elsewhere.
    """

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))

    model, tokens = tiny(**SHAPES[name]), torch.tensor(ragged([11, 11]))
    segments = torch.tensor([[0] * 4 + [1] * 7] * 2)
    with torch.no_grad():
        expected = model(tokens), model(tokens, segments=segments)
        model.embed_tokens.register_forward_hook(lambda m, args, out: out.as_subclass(Elsewhere))
        got = model(tokens), model(tokens, segments=segments)
    assert all(isinstance(x, Elsewhere) for x in got)
    for x, y in zip(got, expected, strict=True):
        close(x.as_subclass(torch.Tensor), y, 1e-4)


@torch.no_grad()
def test_on_a_bf16_model_probabilities_are_float32():
    """bf16 has 8 bits: log-probabilities and sampling's sums of 37 numbers would be off in the
    second digit.
    """
    model = tiny().bfloat16()
    tokens, mask, where = M.join([[1, 2], [3]], [[4, 5], [6, 7, 8]])
    got = M.logprobs(model, tokens, mask, where)
    assert got.dtype == torch.float32
    exact = (model.lm_head(M.dense_hidden(model, tokens, mask, where)).float() / 1.0).log_softmax(
        -1
    )
    close(
        got[:, 1:][where[:, 1:]],
        exact[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)[where[:, 1:]],
        1e-5,
    )
    scalar = M.scalar_model(model, torch.Generator().manual_seed(0))
    assert M.scores(scalar, tokens, mask).dtype == scalar(tokens, mask).dtype == torch.float32
    h = M.dense_hidden(scalar, tokens, mask).float()
    close(M.scores(scalar, tokens, mask)[mask], (h @ scalar.score.weight.T).squeeze(-1)[mask], 1e-5)
    # even: in bf16 the sum of 4096 shares stops growing at 1/16
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    assert [M.sample(logits, 1.0, 1.0, torch.tensor([u])).item() for u in (0.25, 0.5, 0.75)] == [
        1024,
        2048,
        3072,
    ]


def test_rope_is_relative_and_keeps_lengths():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def at(x, position):
        return M.rotate(x, *M.rope_angles(torch.tensor([[position]]), 16, 10000.0))

    products = torch.stack([(at(q, m) * at(k, m - 5)).sum() for m in (5, 6, 40, 400)])
    close(products, products[:1].expand(4), 1e-4)
    assert (products[0] - (at(q, 5) * at(k, 1)).sum()).abs() > 1e-2
    close(at(q, 300).norm(), q.norm(), 1e-5)
    assert torch.equal(at(q, 0), q)


def test_the_future_is_not_seen(lm):
    row = torch.tensor(ragged([10]))
    other = row.clone()
    other[0, 6:] = (other[0, 6:] + 1) % V
    before, after = lm(row)[0], lm(other)[0]
    assert torch.equal(before[:6], after[:6])
    assert (before[6:] - after[6:]).abs().amax(-1).min() > 1e-3


def test_tied_head_is_one_parameter_with_both_gradients():
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert (
        sum(
            n.endswith(("embed_tokens.weight", "lm_head.weight"))
            for n, _ in model.named_parameters()
        )
        == 1
    )
    model(torch.tensor([[1, 2]])).logsumexp(-1).sum().backward()
    grad = model.embed_tokens.weight.grad
    # 5 is only predicted, 1 is read too
    assert (grad[5].abs().sum() > 0) and (grad[1] - grad[5]).abs().sum() > 0


def test_initial_weights():
    model = Transformer(Config(500, 64, 128, 8, 4, 2, 16))
    M.init_weights(model, torch.Generator().manual_seed(0))
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].self_attn.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(64))
    again = Transformer(model.config)
    M.init_weights(again, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


# -- padding, batches, packing


@pytest.mark.parametrize("left", [False, True])
def test_padded_is_unpadded_and_batched_is_single(lm, scalar, left):
    rows = ragged()
    tokens, mask = M.pad(rows, fill=7, left=left)
    hidden, logits = lm.hidden(tokens, mask), lm(tokens, mask)
    values, last = scalar(tokens, mask), M.last_score(scalar, tokens, mask)
    for i, row in enumerate(rows):
        alone = torch.tensor([row])
        close(hidden[i][mask[i]], lm.hidden(alone)[0])
        close(logits[i][mask[i]], lm(alone)[0], 1e-4)
        close(values[i][mask[i]], scalar(alone)[0], 1e-4)
        close(last[i], scalar(alone)[0, -1], 1e-4)


def test_positions_count_each_row_s_own_tokens(lm):
    for left, expected in ((True, [[0, 0, 0, 1], [0, 1, 2, 3]]), (False, [[0, 1], [0, 1, 2, 3]])):
        positions, allowed = M._padded(*M.pad([[5, 6], [1, 2, 3, 4]], left=left), None)
        assert all(p[: len(e)] == e for p, e in zip(positions.tolist(), expected, strict=True))
        # not every attention kernel is finite where nothing may be seen
        assert allowed is None or allowed.any(-1).all()
    positions, _ = M._packed(torch.tensor([[0, 0, 0, 4, 4, 2, -1]]))
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    cache = M.Cache(lm, 2, 6)
    lm.hidden(*M.pad([[5, 6], [1, 2, 3, 4]], left=True), cache=cache)
    assert M._padded(torch.zeros(2, 1), None, cache)[0].tolist() == [[2], [4]]


def test_padding_on_both_sides_of_a_row(lm):
    row = ragged([6])[0]
    tokens, mask = (
        torch.tensor([[3, 4, *row, 5, 5], [1] * 10]),
        torch.tensor([[False] * 2 + [True] * 6 + [False] * 2, [True] * 10]),
    )
    close(lm.hidden(tokens, mask)[0, 2:8], lm.hidden(torch.tensor([row]))[0])


@pytest.mark.parametrize("left", [False, True])
def test_logprobs_are_the_forward_s(lm, left):
    rows = ragged()
    tokens, mask = M.pad(rows, left=left)
    where = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    for temperature in (1.0, 0.6):
        got = M.logprobs(lm, tokens, mask, where, temperature)
        for i, row in enumerate(rows):
            expected = (lm(torch.tensor([row]))[0] / temperature).log_softmax(-1)
            wanted = where[i][mask[i]]
            for t in range(1, len(row)):
                assert got[i][mask[i]][t].item() == pytest.approx(
                    expected[t - 1, row[t]].item() if wanted[t] else 0.0, abs=5e-5
                )
        assert (got[~where] == 0).all()


def test_the_head_runs_on_the_wanted_rows_only(lm):
    tokens, mask = M.pad(ragged())
    where = torch.zeros_like(mask)
    where[0, 3:5] = where[2, 8] = True
    seen = []
    hook = lm.lm_head.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    M.logprobs(lm, tokens, mask, where)
    hook.remove()
    assert seen == [(3, 32)]


@pytest.mark.parametrize("left", [False, True])
def test_masked_content_never_matters(lm, scalar, left):
    (tokens, mask), where = M.pad(ragged(), left=left), None
    where = mask.clone()
    where[:, 0] = False
    other = torch.where(mask, tokens, (tokens + 11) % V)
    for model in (lm, scalar):
        assert torch.equal(model(tokens, mask)[mask], model(other, mask)[mask])
    assert torch.equal(M.logprobs(lm, tokens, mask, where), M.logprobs(lm, other, mask, where))
    assert torch.equal(M.last_score(scalar, tokens, mask), M.last_score(scalar, other, mask))
    assert torch.equal(M.scores(scalar, tokens, mask), M.scores(scalar, other, mask))
    # each row's first real token does matter
    changed = torch.where(mask.cumsum(1) == 1, (tokens + 1) % V, tokens)
    assert (lm(tokens, mask) - lm(changed, mask))[mask].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_a_row_without_a_token_is_finite_with_its_gradients(left, width):
    model, rows = tiny(), [[3] * width, [5] * width, [2]]
    tokens, mask = M.pad(rows, left=left)
    mask[1] = False
    model(tokens, mask)[mask].logsumexp(-1).sum().backward()
    for reading in (
        model.hidden(tokens, mask),
        M.dense_hidden(model, tokens, mask),
        M.logprobs(model, tokens, mask, mask),
    ):
        assert reading.isfinite().all()
        reading.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    nothing = torch.zeros_like(mask)
    assert (M.logprobs(model, tokens, nothing, nothing) == 0).all() and M.dense_hidden(
        model, tokens, nothing
    ).isfinite().all()


def test_packed_is_separate(lm):
    rows = ragged([4, 3, 5, 1, 2])
    row = torch.tensor([[i for r in rows for i in r] + [9] * 3])
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5 + [3] + [4] * 2 + [-1] * 3])
    hidden = lm.hidden(row, segments=segments)
    for n, r in enumerate(rows):
        close(hidden[0][segments[0] == n], lm.hidden(torch.tensor([r]))[0])
    other = torch.where(segments < 0, (row + 1) % V, row)
    assert torch.equal(lm.hidden(other, segments=segments)[segments >= 0], hidden[segments >= 0])
    assert hidden.isfinite().all()


def test_packed_gradients_are_separate_ones():
    rows, grads = ragged([4, 3, 5]), []
    tokens, mask = M.pad(rows)
    packed, segments = torch.tensor([sum(rows, [])]), torch.tensor([[0] * 4 + [1] * 3 + [2] * 5])
    for call in (lambda m: m(tokens, mask)[mask], lambda m: m(packed, segments=segments)[0]):
        model = tiny(std=0.1)
        logits = call(model)
        torch.nn.functional.cross_entropy(logits, (packed[0] + 1) % V).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    close(grads[0], grads[1], 1e-6)


@pytest.mark.parametrize("left", [False, True])
def test_dense_hidden_is_hidden(lm, left):
    rows = ragged([40, 3, 60, 1, 27, 33, 64, 9, 50], 2)
    tokens, mask = M.pad(rows, left=left)
    dense = M.dense_hidden(lm, tokens, mask)
    close(dense[mask], lm.hidden(tokens, mask)[mask])
    assert (dense[~mask] == 0).all()


def test_first_fit_never_overlaps():
    lengths = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    place = M.first_fit(lengths, 30)
    cells = [
        (row, column + i) for (row, column), n in zip(place, lengths, strict=True) for i in range(n)
    ]
    assert len(set(cells)) == len(cells) and max(c for _, c in cells) < 30
    assert max(r for r, _ in cells) + 1 <= sum(lengths) / 30 * 1.2 + 1


def test_join_marks_the_answers():
    tokens, mask, where = M.join([[1, 2], [3, 4, 5]], [[6, 7, 8], [9]])
    assert tokens[mask].tolist() == [1, 2, 6, 7, 8, 3, 4, 5, 9] and mask.tolist() == [
        [True] * 5,
        [True] * 4 + [False],
    ]
    assert where.tolist() == [[False, False, True, True, True], [False, False, False, True, False]]


# -- generation


def plain_loop(model, prompts, n, temperature, top_p, eos_id, seed):
    """Generation without cache, batch or padding: a full forward for each token of each answer."""
    uniform = torch.rand(n, len(prompts), generator=torch.Generator().manual_seed(seed))
    answers = [[] for _ in prompts]
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        while len(answer) < n and (not answer or answer[-1] != eos_id):
            logits = model(torch.tensor([prompt + answer]))[0, -1:]
            answer.append(
                M.sample(logits, temperature, top_p, uniform[len(answer), row].view(1)).item()
            )
    return answers


@pytest.mark.parametrize(
    "temperature, top_p, eos_id",
    [(0, 1.0, None), (1.0, 1.0, None), (1.3, 1.0, 4), (0.8, 0.7, 11), (0, 1.0, 8)],
)
def test_cached_generation_is_the_plain_loop(lm, temperature, top_p, eos_id):
    prompts = ragged([5, 1, 9, 3, 7, 2, 2], 5)
    answers = M.generate(lm, prompts, 14, temperature, top_p, eos_id, seed=3)
    with torch.no_grad():
        assert answers == plain_loop(lm, prompts, 14, temperature, top_p, eos_id, 3)


def test_answers_to_one_prompt_read_it_once(lm):
    """The same hidden states as each row alone, from fewer tokens; a prompt that comes again later
    is read again.
    """
    a, b, c = ragged((9, 9, 5), 1)
    prompts, answers = [a] * 4 + [b] * 3 + [a] + [c] * 2, ragged((3, 1, 7, 3, 2, 2, 8, 4, 1, 6), 2)
    tokens, mask, where = M.join(prompts, answers)
    read = []
    with torch.no_grad():
        expected = lm.hidden(tokens, mask)
        hook = lm.embed_tokens.register_forward_hook(lambda m, x, y: read.append(x[0].shape))
        shared = M.dense_hidden(lm, tokens, mask, where)
        hook.remove()
    close(shared[mask], expected[mask])
    assert (shared[~mask] == 0).all() and read == [(1, 9 + 9 + 9 + 5 + sum(map(len, answers)))]


def test_at_most_sixteen_answers_to_a_prompt_lie_end_to_end(lm):
    """What they cost in attention grows with the square of their number: the prompt is read again
    for each further sixteen.
    """
    prompt, answers = ragged([10])[0], ragged([3] * 40, 3)
    tokens, mask, where = M.join([prompt] * 40, answers)
    read = []
    with torch.no_grad():
        hook = lm.embed_tokens.register_forward_hook(lambda m, x, y: read.append(x[0].shape))
        shared = M.dense_hidden(lm, tokens, mask, where)
        hook.remove()
        close(shared[mask], lm.hidden(tokens, mask)[mask])
    ((rows, width),) = read
    assert width <= 128 and rows * width >= 3 * 10 + 40 * 3
    longer = ragged([30] * 40, 3)
    read.clear()
    with torch.no_grad():
        hook = lm.embed_tokens.register_forward_hook(lambda m, x, y: read.append(x[0].shape))
        M.dense_hidden(lm, *M.join([prompt] * 40, longer))
        hook.remove()
    assert read == [(3, 10 + 16 * 30)]


def test_prompts_of_one_token(lm):
    with torch.no_grad():
        assert M.generate(lm, [[1], [2]], 6, seed=1) == plain_loop(
            lm, [[1], [2]], 6, 1.0, 1.0, None, 1
        )


def test_cached_hidden_is_hidden(lm):
    # the last two columns are real in each row
    tokens, mask = M.pad(ragged((5, 2, 9, 3)), left=True)
    cache = M.Cache(lm, 4, 12)
    with torch.no_grad():
        steps = [
            lm.hidden(tokens[:, :4], mask[:, :4], cache=cache),
            lm.hidden(tokens[:, 4:7], mask[:, 4:7], cache=cache),
        ]
        steps += [lm.hidden(tokens[:, t : t + 1], cache=cache) for t in (7, 8)]
        close(torch.cat(steps, 1)[mask], lm.hidden(tokens, mask)[mask])


def test_batched_greedy_is_single(lm):
    prompts = ragged([5, 1, 9, 3, 7], 8)
    assert M.generate(lm, prompts, 15, temperature=0) == [
        M.generate(lm, [p], 15, temperature=0)[0] for p in prompts
    ]


def test_an_answer_ends_with_its_end_token_and_costs_nothing_more(lm):
    prompts, n, eos = ragged([4] * 40, 1), 12, 6
    read = []
    hook = lm.embed_tokens.register_forward_hook(lambda m, x, y: read.append(x[0].shape))
    answers = M.generate(lm, prompts, n, 1.5, eos_id=eos)
    hook.remove()
    lengths = [len(a) for a in answers]
    assert len(set(lengths)) > 3 and max(lengths) == n
    for answer in answers:
        assert eos not in answer[:-1] and (answer[-1] == eos or len(answer) == n)
    assert read[0] == (2, 128)  # 160 tokens of prompts, packed
    ended = [sum(eos not in a[:t] and len(a) >= t for a in answers) for t in range(1, n)]
    assert [tuple(shape) for shape in read[1:]] == [(k, 1) for k in ended]
    without = M.generate(lm, prompts, n, 1.5)
    # nor does it change what others say
    assert all(w[: len(a)] == a for a, w in zip(answers, without, strict=True))


def test_generation_stops_when_all_have_ended(lm):
    first = M.generate(lm, [[1, 2]], 1, temperature=0)[0][0]
    steps = list(M.decode(lm, [[1, 2]], 9, temperature=0, eos_id=first))
    assert len(steps) == 1 and M.generate(lm, [[1, 2]], 9, temperature=0, eos_id=first) == [[first]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_s_probability_is_the_scorer_s(lm, temperature, monkeypatch):
    prompts, picked, sample = ragged([5, 1, 9, 3, 7], 4), [], M.sample

    def watched(logits, temperature, top_p, uniform):
        ids = sample(logits, temperature, top_p, uniform)
        picked.append((logits / temperature).log_softmax(-1).gather(1, ids[:, None])[:, 0])
        return ids

    monkeypatch.setattr(M, "sample", watched)
    drawn = [[] for _ in prompts]
    for step, (rows, _) in enumerate(M.decode(lm, prompts, 15, temperature, eos_id=2)):
        for row, value in zip(rows.tolist(), picked[step].tolist(), strict=True):
            drawn[row].append(value)
    monkeypatch.undo()
    answers = M.generate(lm, prompts, 15, temperature, eos_id=2)
    tokens, mask = M.pad([p + a for p, a in zip(prompts, answers, strict=True)])
    column = torch.arange(tokens.shape[1])
    where = mask & (column >= torch.tensor([[len(p)] for p in prompts]))
    with torch.no_grad():
        close(
            M.logprobs(lm, tokens, mask, where, temperature)[where],
            torch.tensor(sum(drawn, [])),
            5e-5,
        )


def shares(p, temperature=1.0, top_p=1.0, n=100_000):
    """How often each token is drawn at n evenly spaced uniforms: its probability, to 1/n."""
    uniform = (torch.arange(n) + 0.5) / n
    ids = M.sample(torch.tensor(p).log().expand(n, -1), temperature, top_p, uniform)
    return torch.bincount(ids, minlength=len(p)) / n


def test_sampling_follows_the_distribution():
    p = [0.05, 0.5, 0.15, 0.3]
    close(shares(p), torch.tensor(p), 1e-4)
    sharp = torch.tensor(p) ** 2
    close(shares(p, temperature=0.5), sharp / sharp.sum(), 1e-4)
    flat = torch.tensor(p) ** 0.5
    close(shares(p, temperature=2.0), flat / flat.sum(), 1e-4)
    assert M.sample(
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
    assert set(M.sample(p.log().expand(2, -1), 1.0, top_p, ends).tolist()) <= set(kept)


def test_seeds(lm):
    prompts = ragged([4] * 8)
    state = torch.get_rng_state()
    one = M.generate(lm, prompts, 10, seed=1)
    assert one == M.generate(lm, prompts, 10, seed=1) and one != M.generate(lm, prompts, 10, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    # rows draw apart
    assert len({tuple(a) for a in M.generate(lm, [prompts[0]] * 8, 10, seed=1)}) == 8


def test_generation_refuses_what_does_not_fit(lm):
    assert len(M.generate(lm, [[1] * 60], 4)[0]) == 4
    with pytest.raises(ValueError, match="65 tokens exceed the model's context of 64"):
        M.generate(lm, [[1] * 60, [2]], 5)
    with pytest.raises(ValueError, match="a prompt is empty"):
        M.generate(lm, [[1], []], 5)


# -- the scalar head


@pytest.mark.parametrize("tied", [False, True])
def test_scalar_model_is_a_copy_with_a_fresh_head(tied):
    model = tiny(tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    scalar = M.scalar_model(model, torch.Generator().manual_seed(0))
    tokens = torch.tensor(ragged([6]))
    assert torch.equal(scalar.hidden(tokens), model.hidden(tokens))
    assert scalar(tokens).shape == (1, 6) and not hasattr(scalar, "lm_head")
    close(scalar(tokens), (scalar.hidden(tokens) @ scalar.score.weight.T).squeeze(-1))
    with torch.no_grad():
        for p in scalar.parameters():
            p.add_(1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (
        model.config.num_labels == 0
        and model.config.tie_word_embeddings == tied
        and scalar.config.num_labels == 1
    )
    assert not scalar.config.tie_word_embeddings
    heads = [
        M.scalar_model(model, torch.Generator().manual_seed(s)).score.weight for s in range(20)
    ]
    assert torch.cat(heads).std().item() == pytest.approx(33**-0.5, rel=0.15)
    assert torch.equal(
        heads[0], M.scalar_model(model, torch.Generator().manual_seed(0)).score.weight
    )


@pytest.mark.parametrize("left", [False, True])
def test_last_score_is_the_score_at_the_last_token(scalar, left):
    tokens, mask = M.pad(ragged(), left=left)
    scores = M.scores(scalar, tokens, mask)
    close(scores[mask], scalar(tokens, mask)[mask], 1e-4)
    assert (scores[~mask] == 0).all()
    close(
        M.last_score(scalar, tokens, mask),
        torch.stack([scores[i][mask[i]][-1] for i in range(4)]),
        1e-6,
    )

"""The transformer by invariance (padded = unpadded, batched = single) and against its definition,
written out in float64; and what is read off an answer. Weights are large, so that attention is far
from uniform and a wrong mask shows."""

import copy

import pytest
import torch
from tiny import V, close, decoder, ragged

import model as M
from common.layout import padded
from model import Config, Transformer
from packing import by_segments, pack_answers, pad
from pretrain import init_weights
from sampling import Cache, sample

SHAPES = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "wide heads": dict(head_dim=12, tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "rope and eps": dict(rope_theta=100.0, rms_norm_eps=0.5),
}


@pytest.fixture(scope="module")
def lm():
    return decoder().eval()


@pytest.fixture(scope="module")
def scalar():
    return M.scalar_model(decoder(3), torch.Generator().manual_seed(0)).eval()


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
    model, row = decoder(**SHAPES[name]), ragged([11])[0]
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

    model, tokens = decoder(**SHAPES[name]), torch.tensor(ragged([11, 11]))
    packed = by_segments(tokens, torch.tensor([[0] * 4 + [1] * 7] * 2))
    with torch.no_grad():
        expected = model(tokens), model.packed(packed)
        model.embed_tokens.register_forward_hook(lambda m, args, out: out.as_subclass(Elsewhere))
        got = model(tokens), model.packed(packed)
    assert all(isinstance(x, Elsewhere) for x in got)
    for x, y in zip(got, expected, strict=True):
        close(x.as_subclass(torch.Tensor), y, 1e-4)


@torch.no_grad()
def test_on_a_bf16_model_probabilities_are_float32():
    """bf16 has 8 bits: log-probabilities and sampling's sums of 37 numbers would be off in the
    second digit.
    """
    model = decoder().bfloat16()
    prompts, answers = [[1, 2], [3]], [[4, 5], [6, 7, 8]]
    mask = M.answer_mask(answers)
    got = M.logprobs(model, prompts, answers)
    assert got.dtype == torch.float32
    exact = model.lm_head(M.states(model, prompts, answers)[:, :-1]).float().log_softmax(-1)
    close(got[mask], exact.gather(2, pad(answers)[0][:, :, None]).squeeze(2)[mask], 1e-5)
    scalar = M.scalar_model(model, torch.Generator().manual_seed(0))
    h = M.states(scalar, prompts, answers)
    assert h.dtype == torch.bfloat16
    expected = (h.float() @ scalar.score.weight.T).squeeze(-1)
    values, score = M.values(scalar, prompts, answers), M.score(scalar, prompts, answers)
    assert values.dtype == score.dtype == scalar(*pad(prompts)).dtype == torch.float32
    close(values, expected[:, :-1], 1e-5)
    close(score, expected[:, -1], 1e-5)
    # even: in bf16 the sum of 4096 shares stops growing at 1/16
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    drawn = [sample(logits, 1.0, 1.0, torch.tensor([u])).item() for u in (0.25, 0.5, 0.75)]
    assert drawn == [1024, 2048, 3072]


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
    model = decoder(tie_word_embeddings=True)
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
    init_weights(model, torch.Generator().manual_seed(0))
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].self_attn.o_proj.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(64))
    again = Transformer(model.config)
    init_weights(again, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


# -- padding


@pytest.mark.parametrize("left", [False, True])
def test_padded_is_unpadded_and_batched_is_single(lm, scalar, left):
    rows = ragged()
    tokens, mask = pad(rows, fill=7, left=left)
    hidden, logits, scores = lm.hidden(tokens, mask), lm(tokens, mask), scalar(tokens, mask)
    for i, row in enumerate(rows):
        alone = torch.tensor([row])
        close(hidden[i][mask[i]], lm.hidden(alone)[0])
        close(logits[i][mask[i]], lm(alone)[0], 1e-4)
        close(scores[i][mask[i]], scalar(alone)[0], 1e-4)


def test_positions_count_each_row_s_own_tokens(lm):
    for left, expected in ((True, [[0, 0, 0, 1], [0, 1, 2, 3]]), (False, [[0, 1], [0, 1, 2, 3]])):
        at = padded(*pad([[5, 6], [1, 2, 3, 4]], left=left), None)
        assert all(p[: len(e)] == e for p, e in zip(at.positions.tolist(), expected, strict=True))
        # not every attention kernel is finite where nothing may be seen
        assert at.visible is None or at.visible.any(-1).all()
    cache = Cache(lm, 2, 6)
    lm.hidden(*pad([[5, 6], [1, 2, 3, 4]], left=True), cache=cache)
    assert padded(torch.zeros(2, 1), None, cache).positions.tolist() == [[2], [4]]


def test_padding_on_both_sides_of_a_row(lm):
    row = ragged([6])[0]
    tokens, mask = (
        torch.tensor([[3, 4, *row, 5, 5], [1] * 10]),
        torch.tensor([[False] * 2 + [True] * 6 + [False] * 2, [True] * 10]),
    )
    close(lm.hidden(tokens, mask)[0, 2:8], lm.hidden(torch.tensor([row]))[0])


@pytest.mark.parametrize("left", [False, True])
def test_masked_content_never_matters(lm, scalar, left):
    tokens, mask = pad(ragged(), left=left)
    other = torch.where(mask, tokens, (tokens + 11) % V)
    for model in (lm, scalar):
        assert torch.equal(model(tokens, mask)[mask], model(other, mask)[mask])
    # each row's first real token does matter
    changed = torch.where(mask.cumsum(1) == 1, (tokens + 1) % V, tokens)
    assert (lm(tokens, mask) - lm(changed, mask))[mask].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_a_row_without_a_token_is_finite_with_its_gradients(left, width):
    model = decoder()
    tokens, mask = pad([[3] * width, [5] * width, [2]], left=left)
    mask[1] = False
    model(tokens, mask)[mask].logsumexp(-1).sum().backward()
    packed = by_segments(tokens, torch.where(mask, 0, -1))
    for hidden in (model.hidden(tokens, mask), model.packed(packed)):
        assert hidden.isfinite().all()
        hidden.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -- what is read off an answer


PROMPTS, ANSWERS = ragged((5, 1, 9, 3, 3), 1), ragged((4, 7, 1, 5, 2), 2)


def alone(model, prompt, answer):
    """The hidden state before each of the answer's tokens, and at the last one (len + 1, D)."""
    return model.hidden(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]


def log_p(model, prompt, answer, temperature=1.0):
    """log p of each of the answer's tokens, one row at a time."""
    logits = model.lm_head(alone(model, prompt, answer)[:-1]) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)


def test_an_answer_s_mask():
    mask = M.answer_mask([[6, 7, 8], [], [9]])
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert M.answer_mask([[6], []], width=2).tolist() == [[True, False], [False, False]]
    assert M.answer_mask([[], []]).shape == (2, 0)


def test_states_stand_before_each_token_and_at_the_last(lm):
    h = M.states(lm, PROMPTS, ANSWERS)
    assert h.shape == (5, 8, 32)
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = alone(lm, prompt, answer)
        close(h[n, : len(answer) + 1], expected)
        close(h[n, len(answer) :], expected[-1:].expand(8 - len(answer), -1))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_forward_s(lm, temperature):
    got, mask = M.logprobs(lm, PROMPTS, ANSWERS, temperature), M.answer_mask(ANSWERS)
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        close(got[n][mask[n]], log_p(lm, prompt, answer, temperature), 5e-5)
    assert (got[~mask] == 0).all()


def test_values_stand_before_each_token_and_a_score_is_the_last_token_s(scalar):
    values, score = M.values(scalar, PROMPTS, ANSWERS), M.score(scalar, PROMPTS, ANSWERS)
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        expected = scalar(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
        close(values[n, : len(answer)], expected[:-1], 1e-4)
        close(score[n], expected[-1], 1e-4)


def test_batched_is_single(lm, scalar):
    whole = M.logprobs(lm, PROMPTS, ANSWERS), M.values(scalar, PROMPTS, ANSWERS)
    whole = *whole, M.score(scalar, PROMPTS, ANSWERS)
    for n, row in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        one = [[x] for x in row]
        close(M.logprobs(lm, *one, width=7)[0], whole[0][n], 5e-5)
        end = len(row[1])
        close(M.values(scalar, *one)[0, :end], whole[1][n, :end], 1e-4)
        close(M.score(scalar, *one)[0], whole[2][n], 1e-4)


def test_width_only_pads(lm, scalar):
    """Parts of a rollout share its width: the answers' own columns do not notice."""
    for width in (7, 8, 20):
        assert torch.equal(M.answer_mask(ANSWERS, width)[:, :7], M.answer_mask(ANSWERS))
        assert not M.answer_mask(ANSWERS, width)[:, 7:].any()
        wide, narrow = M.states(lm, PROMPTS, ANSWERS, width), M.states(lm, PROMPTS, ANSWERS)
        assert wide.shape == (5, width + 1, 32) and torch.equal(wide[:, :8], narrow)
        wide = M.logprobs(lm, PROMPTS, ANSWERS, width=width)
        assert wide.shape == (5, width) and (wide[:, 7:] == 0).all()
        close(wide[:, :7], M.logprobs(lm, PROMPTS, ANSWERS), 1e-6)
        wide = M.values(scalar, PROMPTS, ANSWERS, width)
        assert wide.shape == (5, width)
        close(wide[:, :7], M.values(scalar, PROMPTS, ANSWERS), 1e-6)


def test_the_head_runs_on_the_answers_tokens_only(lm, scalar):
    seen = []
    hook = lm.lm_head.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    M.logprobs(lm, PROMPTS, ANSWERS, width=30)
    hook.remove()
    assert seen == [(19, 32)]
    hook = scalar.score.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    M.score(scalar, PROMPTS, ANSWERS)
    hook.remove()
    assert seen[1:] == [(5, 32)]


def test_an_empty_answer_s_score_is_read_at_the_prompt_s_last_token(scalar):
    answers = [[], ANSWERS[1], [], [], []]
    score = M.score(scalar, PROMPTS, answers)
    for n, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        close(score[n], scalar(torch.tensor([prompt + answer]))[0, -1], 1e-4)
    close(M.score(scalar, PROMPTS, [[]] * 5)[[0, 2, 3, 4]], score[[0, 2, 3, 4]], 1e-4)


def test_empty_answers_have_nothing_to_predict():
    model = decoder()
    assert M.logprobs(model, PROMPTS, [[]] * 5).shape == (5, 0)
    nothing = M.logprobs(model, PROMPTS, [[]] * 5, width=3)
    assert nothing.shape == (5, 3) and (nothing == 0).all()
    nothing.sum().backward()
    got = M.logprobs(model, PROMPTS, [[], *ANSWERS[1:]])
    assert (got[0] == 0).all() and got.isfinite().all()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("read", [M.states, M.logprobs, M.values, M.score])
def test_an_empty_prompt_and_what_exceeds_the_context_are_refused(lm, scalar, read):
    model = scalar if read in (M.values, M.score) else lm
    read(model, [[1] * 60, [2]], [[3] * 4, [4]])
    for prompts, answers in (([[2], [1] * 60], [[4], [3] * 5]), ([[1] * 65], [[]])):
        with pytest.raises(ValueError, match="65 tokens exceed the model's context of 64"):
            read(model, prompts, answers)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        read(model, [[1], []], [[2], [3]])


def gradients(loss, scalar):
    model = decoder(std=0.1)
    if scalar:
        model = M.scalar_model(model, torch.Generator().manual_seed(0))
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("scalar", [False, True])
def test_gradients_are_those_of_each_row_alone(scalar):
    """Through shared prompts, full rows and the head on the answers alone."""
    prompts, answers = [PROMPTS[2]] * 4 + PROMPTS, ragged((1, 4, 2, 3), 3) + ANSWERS
    weights = torch.randn(9, 7, generator=torch.Generator().manual_seed(1))
    rows = list(zip(prompts, answers, strict=True))

    def together(model):
        if not scalar:
            return (M.logprobs(model, prompts, answers) * weights).mean()
        mask = M.answer_mask(answers)
        values = torch.where(mask, M.values(model, prompts, answers) * weights, 0.0)
        return values.mean() + M.score(model, prompts, answers).square().mean()

    def apart(model):
        total = 0.0
        for w, (prompt, answer) in zip(weights, rows, strict=True):
            w = w[: len(answer)]
            if not scalar:
                total = total + (log_p(model, prompt, answer) * w).sum() / 63
                continue
            scores = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 :]
            total = total + (scores[:-1] * w).sum() / 63 + scores[-1].square() / 9
        return total

    expected = gradients(apart, scalar)
    close(gradients(together, scalar), expected, 1e-5 * expected.abs().max())


def test_a_read_s_places_are_the_answers_own(lm):
    """The token at at[n, t] is the one that answer token t follows."""
    rows, at = pack_answers(PROMPTS, ANSWERS)
    flat = rows.tokens.flatten()
    for n, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        follows = [prompt[-1], *answer] + answer[-1:] * (7 - len(answer))
        assert flat[at[n]].tolist() == follows


# -- whole conversations


def test_nll_is_logprobs_of_the_same_tokens(lm):
    """An answer's tokens as targets of a conversation: the same numbers, the sign apart."""
    rows = list(zip(PROMPTS, ANSWERS, strict=True))
    tokens, mask = pad([p + a for p, a in rows])
    labels = pad([[M.IGNORE] * len(p) + a for p, a in rows], fill=M.IGNORE)[0]
    found = M.nll(lm, tokens, labels, torch.where(mask, torch.arange(5)[:, None], -1))
    assert found.shape == labels.shape and (found[labels == M.IGNORE] == 0).all()
    expected = M.logprobs(lm, PROMPTS, ANSWERS)[M.answer_mask(ANSWERS)]
    close(found[labels != M.IGNORE], -expected, 5e-5)


def test_nll_is_0_at_minus_100_and_on_a_segment_s_first_token(lm):
    rows = ragged((4, 3, 5))
    tokens = torch.tensor([sum(rows, []) + [9] * 2])
    segments = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5 + [-1] * 2])
    labels = torch.where(segments < 0, M.IGNORE, tokens)
    found = M.nll(lm, tokens, labels, segments)
    assert (found == 0).nonzero()[:, 1].tolist() == [0, 4, 7, 12, 13]
    for n, row in enumerate(rows):
        close(found[segments == n][1:], -log_p(lm, row[:1], row[1:]), 5e-5)
    labels[0, 2] = labels[0, 8] = M.IGNORE
    fewer = M.nll(lm, tokens, labels, segments)
    assert (fewer == 0).nonzero()[:, 1].tolist() == [0, 2, 4, 7, 8, 12, 13]
    close(fewer[fewer != 0], found[fewer != 0])


def test_nll_of_a_label_that_is_not_the_token(lm):
    """What is learnt is the label, what is read the token."""
    tokens = torch.tensor([[1, 2, 3]])
    found = M.nll(lm, tokens, torch.tensor([[-100, 7, -100]]), torch.zeros(1, 3, dtype=torch.long))
    close(found[0, 1], -log_p(lm, [1], [7])[0], 5e-5)


def test_nll_without_a_target_is_0():
    model = decoder()
    tokens, mask = pad(ragged())
    found = M.nll(model, tokens, torch.full_like(tokens, M.IGNORE), torch.where(mask, 0, -1))
    assert found.shape == tokens.shape and (found == 0).all()
    found.sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


# -- the scalar head


@pytest.mark.parametrize("tied", [False, True])
def test_scalar_model_is_a_copy_with_a_fresh_head(tied):
    model = decoder(tie_word_embeddings=tied)
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


def test_a_model_that_is_only_a_shape_costs_no_import(lm, monkeypatch):
    """On the meta device normal_ imports torch.compile."""
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *_, **__: pytest.fail("normal_"))
    with torch.device("meta"):
        assert type(lm)(lm.config).embed_tokens.weight.requires_grad

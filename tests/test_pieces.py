"""A loss over many targets and a large vocabulary comes in pieces, with the whole's values and
gradients, whatever lies on the head."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from tiny import V, decoder, ragged

import model as M
from common import pieces
from lora import add_lora
from quant import quantize_model

PROMPTS, ANSWERS = ragged((4, 1, 6, 2)), ragged((7, 3, 5, 1), 1)


def head_with(adapter=0, four_bit=False, dropout=0.0):
    """A decoder with a head in 4 bits, under an adapter that is trained with its embedding."""
    model = decoder(hidden_size=64, head_dim=16)
    if four_bit:
        quantize_model(model, ["lm_head"])
    if adapter:
        add_lora(model, adapter, 2 * adapter, "q_proj,lm_head", dropout)
        model.embed_tokens.requires_grad_(True)
        torch.nn.init.normal_(model.lm_head.B["default"], generator=torch.Generator())
    return model.train()


MODELS = {
    "plain": head_with,
    "tied": lambda: decoder(tie_word_embeddings=True),
    "soft caps": lambda: tiny.family("gemma2"),
    "adapter": lambda: head_with(3),
    "4 bits": lambda: head_with(3, four_bit=True),
}


def conversations(model):
    """nll's arguments: two rows of three conversations, half of their tokens targets."""
    seeded = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.config.vocab_size, (2, 20), generator=seeded)
    labels = torch.where(torch.rand(2, 20, generator=seeded) < 0.5, tokens, M.IGNORE)
    return tokens, labels, torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [2] * 20])


READS = {
    "nll": lambda model: M.nll(model, *conversations(model)),
    "logprobs": lambda model: M.logprobs(model, PROMPTS, ANSWERS),
    "logprobs, warm": lambda model: M.logprobs(model, PROMPTS, ANSWERS, 0.7),
}


def values_and_gradients(model, read, parts, monkeypatch):
    """What is read, and the gradients of a sum in which each target weighs differently; `parts`
    of three targets, or all at once."""
    size = 3 * model.config.vocab_size if parts else pieces.PIECE
    monkeypatch.setattr(pieces, "PIECE", size)
    calls = []
    hook = model.lm_head.register_forward_hook(lambda m, x, y: calls.append(len(y)))
    found = read(model)
    (found * torch.arange(1.0, found.numel() + 1).view_as(found).cos()).sum().backward()
    hook.remove()
    assert max(calls) <= 3 if parts else len(calls) == 1
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found.detach(), gradients


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_the_whole(name, read, monkeypatch):
    model = MODELS[name]().double()
    whole, expected = values_and_gradients(model, READS[read], False, monkeypatch)
    found, gradients = values_and_gradients(model, READS[read], True, monkeypatch)
    tiny.close(found, whole, 1e-10)
    assert gradients.keys() == expected.keys() > {"embed_tokens.weight"}
    for n, gradient in gradients.items():
        tiny.close(gradient, expected[n], 1e-10)


def test_a_piece_s_dropout_is_drawn_once(monkeypatch):
    """The backward pass computes the logits that the forward pass had."""
    model, read = head_with(3, dropout=0.5), READS["logprobs"]
    torch.manual_seed(0)
    found = values_and_gradients(model, read, True, monkeypatch)
    monkeypatch.setattr(pieces, "checkpoint", lambda read, *piece, use_reentrant: read(*piece))
    torch.manual_seed(0)
    expected = values_and_gradients(model, read, True, monkeypatch)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(g, expected[1][n]) for n, g in found[1].items())


def test_under_autocast_a_head_s_gradient_is_summed_in_float32(monkeypatch):
    """Sums of bf16 numbers would lose the small pieces: 64 of one target each."""
    model = decoder()
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(192, 32, generator=generator)
    targets = torch.randint(V, (192,), generator=generator)

    def gradient(size):
        monkeypatch.setattr(pieces, "PIECE", size)
        with torch.autocast("cpu", torch.bfloat16):
            loss = M.nll_of(model, h, targets).sum()
        return torch.autograd.grad(loss, model.lm_head.weight)[0]

    exact = torch.autograd.grad(
        F.cross_entropy(h @ model.lm_head.weight.T, targets, reduction="sum"), model.lm_head.weight
    )[0]
    whole, parts = gradient(2**26), gradient(1)
    assert (parts - exact).norm() < 1.2 * (whole - exact).norm()


def test_without_gradients_it_comes_in_pieces_too(monkeypatch):
    model, seen = head_with(), []
    model.lm_head.register_forward_hook(lambda m, x, y: seen.append(len(y)))
    with torch.no_grad():
        whole = M.logprobs(model, PROMPTS, ANSWERS)
        monkeypatch.setattr(pieces, "PIECE", 5 * V + 1)
        parts = M.logprobs(model, PROMPTS, ANSWERS)
        monkeypatch.setattr(pieces, "PIECE", 8 * V)  # up to two pieces are none
        M.logprobs(model, PROMPTS, ANSWERS)
    assert seen == [16, 5, 5, 5, 1, 16]
    assert (parts - whole).abs().max() < 1e-6 * whole.abs().max()

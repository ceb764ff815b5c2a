"""Tiny models, tokenizers and folders for the tests of the stages."""

import json

import torch

import hub
from data import templates, tokenizer
from model import Config, Transformer

TEXTS = ["the capital of Peru is Lima. ", "what is one and two? three. ", "sure, of course. thank you! "]


def chat_tokenizer(pad="<|endoftext|>"):
    """Bytes, a few merges and ChatML's tokens; pad="<|im_end|>" is SmolLM2's setting, where padding and end are one token."""
    tok = tokenizer.train(TEXTS, 280)
    templates.adopt(tok, "chatml")
    tok.config["pad_token"] = pad
    return tok


def lm(seed=0, std=0.3, **changes):
    """A Transformer with weights large enough that attention is far from uniform."""
    shape = dict(vocab_size=280, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape |= dict(head_dim=8, max_position_embeddings=128)
    model, generator = Transformer(Config(**shape | changes)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * std + (1.0 if p.dim() == 1 else 0.0))
    return model


def folder(path, seed=0, tok=None, **changes):
    """A checkpoint folder with such a model in it → its path as a str."""
    hub.save(path, lm(seed, **changes), tok or chat_tokenizer())
    return str(path)


def user(text):
    return [{"role": "user", "content": text}]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def metrics(out):
    """A finished run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Over(torch.nn.Module):
    """function(model, ...) as a module, so that torch.func.functional_call can put other parameters under it."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)


def gradcheck(model, function):
    """Finite differences in float64 of function(model) by every parameter of the model."""
    over = Over(model.double(), function)
    names, values = zip(*over.named_parameters(), strict=True)

    def at(*values):
        return torch.func.functional_call(over, dict(zip(names, values, strict=True)), ())

    return torch.autograd.gradcheck(at, [v.detach().requires_grad_() for v in values])

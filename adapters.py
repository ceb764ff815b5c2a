"""The lighter adapters: a frozen model, 4-bit or not, steered by a few learned numbers.

    IA3             k = l_k ⊙ (W_k x), v = l_v ⊙ (W_v x), down(l_ff ⊙ silu(gate x) * up x); every l is 1 at the start      Liu et al. 2022
    prompt tuning   P learned embeddings stand before every row's own                                              Lester et al. 2021
    prefix tuning   P learned keys and values stand before every row's own, in every layer                        Li & Liang 2021

Prompt and prefix are one thing to the model: a past that all rows share, a pair of keys and values
a layer (model.virtual). A prompt's is computed from its embeddings by the model itself, exactly as
if they stood in front, for they come first and nothing sees ahead. A prefix's keys are learned as
they are compared, without RoPE; the real tokens' positions start at P with both.
"""

import torch
import torch.nn as nn

from model import Cache, wide

# Peak learning rates for AdamW, which moves a number by about the learning rate a step whatever its
# gradient. IA3's factors start at 1 and must move by tenths, in a few hundred steps here (Liu et
# al.: 3e-3 in thousands); a prompt must leave its words and is felt through every layer alone
# (PEFT's examples: 3e-2; Lester et al. 0.3, with Adafactor); a prefix is moved by all of its MLP's
# inputs at once, in every layer (Li & Liang: 5e-5). Chosen among a few by short single runs on
# SmolLM2.
LEARNING_RATE = {"ia3": 3e-2, "prompt": 3e-2, "prefix": 5e-4}
KINDS = tuple(LEARNING_RATE)
SCALED, FEEDFORWARD = ("k_proj", "v_proj", "down_proj"), ("down_proj",)


class IA3Linear(nn.Module):
    """A linear layer with a learned factor on each output, l ⊙ (W x + b), or (feedforward) on each
    input, W (l ⊙ x) + b.
    """

    def __init__(self, base, feedforward: bool, device):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        self.scale = nn.Parameter(
            torch.ones(base.in_features if feedforward else base.out_features, device=device)
        )

    def forward(self, x):
        if self.feedforward:
            return self.base((x * self.scale).to(x.dtype))
        y = self.base(x)
        return (y * self.scale).to(y.dtype)

    def stored(self):
        """The factors as PEFT stores them: (out,1) or (1,in), which is also how they multiply the
        weight.
        """
        return self.scale[None] if self.feedforward else self.scale[:, None]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that does the same, on the host, multiplied in float32.
        A factor on the outputs is one on the bias too."""
        weight, bias = (
            self.base.weight if isinstance(self.base, nn.Linear) else self.base.dequantize(),
            self.base.bias,
        )
        weight, scale = weight.cpu(), self.scale.cpu()
        new = nn.Linear(*weight.shape[::-1], bias is not None, "cpu", weight.dtype)
        new.requires_grad_(False)
        new.weight.copy_(wide(weight) * self.stored().cpu())
        if bias is not None:
            new.bias.copy_(bias if self.feedforward else wide(bias.cpu()) * scale)
        return new


class Prompt(nn.Module):
    """P virtual tokens given by their embeddings, rows (P,D)."""

    def __init__(self, rows):
        super().__init__()
        self.tokens, self.rows = len(rows), nn.Parameter(rows)

    def stored(self):
        return self.rows

    def past(self, model):
        """Keys and values of the P embeddings: a pair (1,kv_heads,P,head_dim) a layer, with their
        gradient.
        """
        cache, positions = (
            Cache(model, 1, self.tokens),
            torch.arange(self.tokens, device=model.device)[None],
        )
        model.blocks(self.rows[None].to(model.embed_tokens.weight.dtype), positions, cache=cache)
        return cache.kv


class Prefix(nn.Module):
    """P virtual tokens given by their keys and values: rows (P, layers · 2 · kv_heads · head_dim),
    key before value in each layer.

    With the reparametrisation (Li & Liang, section 4.3) the rows are (P,D), and an MLP that all
    share makes of them what is added to the keys and values of the start; both serve the training
    alone and are dropped when the adapter is saved.
    """

    def __init__(self, rows, start=None, mlp=None):
        super().__init__()
        self.tokens, self.rows, self.mlp = len(rows), nn.Parameter(rows), mlp
        self.register_buffer("start", start, persistent=False)

    def stored(self):
        return self.rows if self.mlp is None else self.start + self.mlp(self.rows)

    def past(self, model):
        c = model.config
        kv = (
            self.stored()
            .view(self.tokens, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
            .permute(1, 2, 3, 0, 4)
        )
        return [(k[None], v[None]) for k, v in kv]


@torch.no_grad()
def add_adapter(
    model, kind: str, tokens=20, text=None, tokenizer=None, reparametrise=True, generator=None
):
    """Freezes the model and gives it a float32 adapter to train: "ia3", or "prompt" or "prefix" of
    `tokens` virtual tokens.

    A prompt starts as embeddings drawn from the vocabulary, or as a text's (repeated or cut to
    `tokens`); random numbers would lie far from all embeddings. A prefix starts as the keys and
    values of the same, with `reparametrise` too: the MLP's last layer starts at 0 (PEFT's starts at
    random, and the model with it far from where it was). generator: a CPU one, which decides what
    is drawn. ValueError where that is impossible. → the model
    """
    check(model)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of adapter: {', '.join(KINDS)} are")
    if kind != "ia3" and not 0 < tokens < model.context:
        raise ValueError(
            f"{tokens} virtual tokens were asked for: the model's context leaves room for 1 to"
            f" {model.context - 1}"
        )
    if text is not None and kind == "ia3":
        raise ValueError("a text starts a prompt or a prefix: give no text")
    if kind == "ia3":
        return wrap(model.requires_grad_(False))
    c = model.config
    ids = (
        torch.randint(c.vocab_size, (tokens,), generator=generator).tolist()
        if text is None
        else tokenizer.encode(text)
    )
    if not ids:
        raise ValueError("the text that starts a prompt is empty")
    model.requires_grad_(False)
    virtual = Prompt(
        wide(model.embed_tokens(torch.tensor((ids * tokens)[:tokens], device=model.device)))
    )
    if kind == "prefix":
        # (layers, 2, kv_heads, P, head_dim)
        kv = torch.stack([torch.cat(pair) for pair in virtual.past(model)])
        start = wide(kv.permute(3, 0, 1, 2, 4).flatten(1))
        virtual = Prefix(start)
    if kind == "prefix" and reparametrise:
        D = c.hidden_size
        mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, width(c))).to(model.device)
        # nn.Linear's own distribution, drawn from the generator; zeros
        for layer, bound in ((mlp[0], D**-0.5), (mlp[2], 0.0)):
            for p in layer.parameters():
                p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        virtual = Prefix(torch.randn(tokens, D, generator=generator).to(model.device), start, mlp)
    model.virtual = virtual
    return model


def check(model, loading=False):
    """ValueError where a model cannot take an adapter of this kind. A reward model is given none,
    but may have been made from a model that has one."""
    if model.config.num_labels and not loading:
        raise ValueError(
            "IA3, prompts and prefixes are for language models: this one has a scalar head"
        )
    if parts(model):
        raise ValueError("the model has an adapter already: merge it, or load the model anew")


def width(c) -> int:
    """Numbers in a prefix token: a key and a value for each layer and key/value head."""
    return c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim


def linears(model) -> list:
    """(name, module) of the key, value and down projections."""
    return [(n, m) for n, m in model.named_modules() if n.endswith(SCALED)]


def wrap(model):
    """IA3 around them, all factors 1. → the model"""
    for name, base in linears(model):
        put(model, name, IA3Linear(base, name.endswith(FEEDFORWARD), model.device))
    return model


def put(model, name: str, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def parts(model):
    """(name, module) of what was added to the model: its IA3 layers, or its prompt or prefix."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, IA3Linear | Prompt | Prefix)]

"""The lighter adapters: a frozen model, 4-bit or not, steered by a few learned numbers.

    IA3 (Liu et al. 2022): learned factors l on keys, values and inside the feed-forward layer

        k = l_k ⊙ (W_k x)     v = l_v ⊙ (W_v x)     y = W_down (l_ff ⊙ silu(W_gate x) ⊙ (W_up x))

    Prompt tuning (Lester et al. 2021): P learned embeddings stand before every row's own.
    Prefix tuning (Li & Liang 2021): P learned keys and values do, in every layer.

Every l starts at 1. To the model, prompt and prefix are the same thing, model.virtual: a past that
all rows share, one pair of keys and values per layer. The model computes a prompt's from its
embeddings, exactly as if they stood in front: they come first, and nothing sees ahead. A prefix's
keys are learned as attention compares them: RoPE does not turn them. With either, the real tokens'
positions start at P.
"""

import torch
import torch.nn as nn

from common.layout import Layout
from model import wide
from sampling import Cache

# Peak learning rates for AdamW, which moves a number by about the learning rate per step, whatever
# its gradient. Chosen among a few by short single runs on SmolLM2.
#   ia3     factors start at 1 and must move by tenths, here in a few hundred steps
#           (Liu et al.: 3e-3, in thousands)
#   prompt  must move away from the words it starts from, and acts from the input alone
#           (PEFT's examples: 3e-2; Lester et al.: 0.3, with Adafactor)
#   prefix  every input of its MLP moves it, in every layer at once (Li & Liang: 5e-5)
LEARNING_RATE = {"ia3": 3e-2, "prompt": 3e-2, "prefix": 5e-4}
KINDS = tuple(LEARNING_RATE)
# Where q, k and v are one layer, q gets factors too, as in PEFT.
SCALED, FEEDFORWARD = ("k_proj", "v_proj", "qkv_proj", "down_proj"), ("down_proj",)


class IA3Linear(nn.Module):
    """A linear layer with a learned factor on each output, l ⊙ (W x + b), or (feedforward) on each
    input, W (l ⊙ x) + b.
    """

    def __init__(self, base, feedforward: bool, device):
        super().__init__()
        self.base, self.feedforward = base, feedforward
        size = base.in_features if feedforward else base.out_features
        self.scale = nn.Parameter(torch.ones(size, device=device))

    def forward(self, x):
        if self.feedforward:
            return self.base((x * self.scale).to(x.dtype))
        y = self.base(x)
        return (y * self.scale).to(y.dtype)

    def stored(self):
        """The factors in PEFT's shape, (out,1) or (1,in): so they multiply the weight too."""
        return self.scale[None] if self.feedforward else self.scale[:, None]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that does the same, on the host; the product is taken in float32. A
        factor on the outputs scales the bias too.
        """
        plain, bias = isinstance(self.base, nn.Linear), self.base.bias
        weight = (self.base.weight if plain else self.base.dequantize()).cpu()
        scale = self.scale.cpu()
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
        """Keys and values of the P embeddings, with their gradient: a pair
        (1,kv_heads,P,head_dim) per layer.
        """
        cache = Cache(model, 1, self.tokens)
        x = self.rows[None].to(model.embed_tokens.weight.dtype)  # (1,P,D)
        positions = torch.arange(self.tokens, device=model.device)[None]  # (1,P)
        model.blocks(x, Layout(positions, None, positions), cache)
        return cache.kv


class Prefix(nn.Module):
    """P virtual tokens given by their keys and values: rows (P, layers · 2 · kv_heads · head_dim),
    key before value in each layer.

    With the reparametrisation (Li & Liang, section 4.3) the rows are (P,D), and one MLP for all of
    them computes from each what is added to its keys and values at the start. Rows and MLP serve
    training alone: only their result is saved.
    """

    def __init__(self, rows, start=None, mlp=None):
        super().__init__()
        self.tokens, self.rows, self.mlp = len(rows), nn.Parameter(rows), mlp
        self.register_buffer("start", start, persistent=False)

    def stored(self):
        return self.rows if self.mlp is None else self.start + self.mlp(self.rows)

    def past(self, model):
        """A pair (1,kv_heads,P,head_dim) per layer."""
        c = model.config
        shape = (self.tokens, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
        kv = self.stored().view(shape).permute(1, 2, 3, 0, 4)  # (layers,2,kv_heads,P,head_dim)
        return [(k[None], v[None]) for k, v in kv]


@torch.no_grad()
def add_adapter(
    model, kind: str, tokens=20, text=None, tokenizer=None, reparametrise=True, generator=None
):
    """Freezes the model and gives it a float32 adapter to train → the model.

    kind: "ia3", or "prompt" or "prefix" of `tokens` virtual tokens. A prompt starts as embeddings
    drawn from the vocabulary, or as those of `text` (repeated or cut to `tokens`): random numbers
    would lie far from all embeddings. A prefix starts as the keys and values of the same prompt,
    with `reparametrise` too, where the MLP's last layer starts at 0 (PEFT's starts at random, which
    moves the model far away at once). generator: on the CPU; decides what is drawn. ValueError
    where the model or the options do not allow it.
    """
    check(model)
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of adapter: {', '.join(KINDS)} are")
    if kind != "ia3" and not 0 < tokens < model.context:
        room = f"the model's context leaves room for 1 to {model.context - 1}"
        raise ValueError(f"{tokens} virtual tokens: {room}")
    if text is not None and kind == "ia3":
        raise ValueError("a text starts a prompt or a prefix: give no text")
    if kind == "ia3":
        return wrap(model.requires_grad_(False))
    if text is None:
        ids = torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()
    else:
        ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text that starts a prompt is empty")
    model.requires_grad_(False)
    first = torch.tensor((ids * tokens)[:tokens], device=model.device)
    virtual = Prompt(wide(model.embed(first)))
    if kind == "prefix":
        virtual = prefix(model, virtual, reparametrise, generator)
    model.virtual = virtual
    return model


def prefix(model, prompt: Prompt, reparametrise: bool, generator) -> Prefix:
    """A prefix that starts as a prompt's keys and values."""
    kv = torch.stack([torch.cat(pair) for pair in prompt.past(model)])
    start = wide(kv.permute(3, 0, 1, 2, 4).flatten(1))  # from (layers,2,kv_heads,P,head_dim)
    if not reparametrise:
        return Prefix(start)
    D = model.config.hidden_size
    mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, start.shape[1]))
    # the first layer: nn.Linear's own distribution, drawn from the generator; the last: zeros
    for layer, bound in ((mlp[0], D**-0.5), (mlp[2], 0.0)):
        for p in layer.parameters():
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
    rows = torch.randn(prompt.tokens, D, generator=generator)
    return Prefix(rows.to(model.device), start, mlp.to(model.device))


def check(model, loading=False):
    """ValueError where a model cannot take an IA3, prompt or prefix. A reward model gets none, but
    may have been made from a model that has one.
    """
    if model.config.num_labels and not loading:
        raise ValueError("IA3, prompt and prefix are for language models, not for a scalar head")
    if parts(model):
        raise ValueError("the model has an adapter already: merge it, or load the model anew")


def width(c) -> int:
    """Numbers per prefix token: a key and a value for each layer and key/value head."""
    return c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim


def scaled(model) -> list:
    """(name, module) of the layers that IA3 scales: key, value and down projections."""
    return [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in SCALED]


def targets(model) -> list[str]:
    """The last parts of their names."""
    there = {n.rpartition(".")[2] for n, _ in scaled(model) + parts(model)}
    return [name for name in SCALED if name in there]


def wrap(model):
    """Puts IA3 on the layers that it scales, all factors 1 → the model."""
    for name, base in scaled(model):
        model.set_submodule(name, IA3Linear(base, name.endswith(FEEDFORWARD), model.device))
    return model


def parts(model):
    """(name, module) of the adapter: its IA3 layers, or its prompt or prefix."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, IA3Linear | Prompt | Prefix)]

"""The transformer that every stage trains, a Llama-style decoder, and what is read off an answer.

    x = x + Attention(RMSNorm(x))          causal, rotary positions, grouped key/value heads
    x = x + SwiGLU(RMSNorm(x))             down(silu(gate x) * up x)
    logits = lm_head(RMSNorm(x))           or, with num_labels = 1, a score: score(RMSNorm(x))

Other families (Mistral, Qwen, Gemma, Phi) differ in a few settings, which common/families.py reads.
Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (GQA), Jiang et al. 2023 (windows), Gemma Team 2024.
Modules carry the names of transformers' models, so a checkpoint's tensors need no renaming.
Tensors are batch first: B rows, T tokens, D hidden, V vocabulary; N answers, A tokens in the
longest. Masks are bool, True on what counts.
"""

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.layout import Layout, constant, padded
from common.pieces import in_pieces
from packing import IGNORE, Rows, answer_mask, by_segments, pack_answers


@dataclass
class Config:
    """The shape of a model, in config.json's own words."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None  # a list where the hub's config names several
    pad_token_id: int | None = None
    num_labels: int = 0  # 0: a language model; 1: a reward model or critic, a score per token
    reward_mean: float = 0.0  # of the scores of reference answers: PPO uses (score - mean) / std
    reward_std: float = 1.0
    # What else sets families apart (common/families.py). The defaults are Llama's.
    qkv_bias: bool = False  # biases on q, k and v alone
    fused: bool = False  # q, k and v are parts of one layer's output, gate and up of another's
    qk_norm: bool = False  # norms on each head's query and key
    post_norm: bool = False  # norms on what attention and MLP add, too
    norm_offset: bool = False  # norms multiply by 1 + weight
    gelu: bool = False  # tanh GELU in place of SiLU
    scaled_embeddings: bool = False  # by sqrt(hidden_size)
    attention_scale: float | None = None  # of q·k; None: 1/sqrt(head_dim)
    attention_cap: float | None = None  # scores become cap · tanh(score / cap)
    logit_cap: float | None = None  # and so do logits
    window: int = 0  # a local layer's token sees this many, itself the last; 0: all
    local: tuple = ()  # for each layer, whether it is local; (): none is
    local_theta: float | None = None  # local layers' own rope_theta, without factors
    rotary_dims: int | None = None  # only a head's first numbers turn; None: all
    rope_factors: tuple = ()  # by which each frequency is divided
    long_factors: tuple = ()  # the same in an example of more than long_from tokens
    long_from: int = 0
    rope_scale: float = 1.0  # of cos and sin
    source: dict = field(default_factory=dict, compare=False, repr=False)  # config.json as it came


def wide(x):
    """x in float32 at least, for what bf16 must not round; float64 stays, for gradient checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, computed in float32; with an offset, * (1 + weight)."""

    def __init__(self, c: Config, size: int):
        super().__init__()
        self.eps, self.offset = c.rms_norm_eps, c.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 0.0 if self.offset else 1.0))

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (y * (1 + wide(self.weight))).to(x.dtype)
        return self.weight * y.to(x.dtype)


def rope_angles(positions, dims: int, theta: float, factors=None):
    """The rotary embedding's cos and sin (B,1,T,dims) at positions (B,T): both halves turn by the
    same dims/2 frequencies, each divided by its factor, (B or 1,T or 1,dims/2)."""
    frequency = theta ** -(torch.arange(0, dims, 2, device=positions.device).float() / dims)
    if factors is not None:
        frequency = (frequency / factors)[:, None]
    angle = (positions[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE: turns the pair (x_i, x_{i + dims/2}) by its angle; what a head has beyond dims stays.
    x (B,H,T,head_dim)."""
    if (dims := cos.shape[-1]) < x.shape[-1]:
        return torch.cat((rotate(x[..., :dims], cos, sin), x[..., dims:]), -1)
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


def capped_attention(q, k, v, visible, scale: float, cap: float):
    """Attention with scores of cap · tanh(score / cap), for which there is no fused kernel."""
    if visible is None:
        visible = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = cap * torch.tanh(wide(q @ k.transpose(2, 3)) * scale / cap)  # (B,H,T,S)
    return scores.masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config, D, d = c, c.hidden_size, c.head_dim
        self.sizes = [d * c.num_attention_heads, *[d * c.num_key_value_heads] * 2]  # of q, k, v
        bias = c.attention_bias or c.qkv_bias
        if c.fused:
            self.qkv_proj = nn.Linear(D, sum(self.sizes), bias=bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n, bias) for n in self.sizes)
        self.o_proj = nn.Linear(self.sizes[0], D, bias=c.attention_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c, d), RMSNorm(c, d)

    def forward(self, x, cos, sin, visible, cache, layer, past):
        c, (B, T, _) = self.config, x.shape
        if c.fused:
            q, k, v = self.qkv_proj(x).split(self.sizes, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.view(B, T, -1, c.head_dim).transpose(1, 2) for y in (q, k, v))  # (B,H,T,·)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if past is not None:  # virtual tokens stand before each row's own
            past = (y.expand(B, -1, -1, -1) for y in past)
            k, v = (torch.cat((a.to(b.dtype), b), 2) for a, b in zip(past, (k, v), strict=True))
        # query head h reads key/value head h // groups
        groups = c.num_attention_heads // c.num_key_value_heads
        if T == 1 and visible is not None:  # one new token's heads: queries of the head they share
            q, groups = q.reshape(B, -1, groups, c.head_dim), 1
        # a GPU's fast kernels need repeated k and v, but for the one that has bf16 and no mask
        grouped = x.device.type == "cpu" or visible is None and q.dtype == torch.bfloat16
        gqa = grouped and c.attention_cap is None
        if not gqa and groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if c.attention_cap is not None:
            y = capped_attention(q, k, v, visible, c.attention_scale, c.attention_cap)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, visible, is_causal=visible is None, scale=c.attention_scale, enable_gqa=gqa
            )
        y = y.reshape(B, -1, T, c.head_dim).transpose(1, 2)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.config, D, inner = c, c.hidden_size, c.intermediate_size
        if c.fused:
            self.gate_up_proj = nn.Linear(D, 2 * inner, bias=c.mlp_bias)
        else:
            self.gate_proj, self.up_proj = (nn.Linear(D, inner, c.mlp_bias) for _ in range(2))
        self.down_proj = nn.Linear(inner, D, bias=c.mlp_bias)

    def forward(self, x):
        if self.config.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.config.gelu else F.silu(gate)
        return self.down_proj(gate * up)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.post_norm = c.post_norm
        self.input_layernorm = RMSNorm(c, c.hidden_size)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c, c.hidden_size)
        if c.post_norm:
            self.pre_feedforward_layernorm = RMSNorm(c, c.hidden_size)
            self.post_feedforward_layernorm = RMSNorm(c, c.hidden_size)
        self.mlp = MLP(c)

    def forward(self, x, *attention):
        y = self.self_attn(self.input_layernorm(x), *attention)
        if not self.post_norm:
            x = x + y
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class ScalarHead(nn.Linear):
    """One score per hidden state, in float32 whatever the inputs are, under autocast too: what
    matters is differences between scores, and bf16 has fewer than three digits."""

    def __init__(self, size: int, **how):
        super().__init__(size, 1, bias=False, **how)

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(wide(h), wide(self.weight)).squeeze(-1)


class Transformer(nn.Module):
    """A decoder with a language-model head (num_labels 0) or a scalar head (num_labels 1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.virtual = None  # a prompt or prefix (adapters.py): keys and values of `tokens`
        self.spare = None  # ids that only pad the vocabulary: never sampled
        self.checkpointing = False  # recompute each block in the backward pass (Chen et al. 2016)
        self.block, self.losses = Block.__call__, losses  # --compile puts compiled ones here
        rows = torch.zeros(c.vocab_size, c.hidden_size)  # its own normal_ takes 2 s on meta
        self.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c, c.hidden_size)
        if c.num_labels:
            self.score = ScalarHead(c.hidden_size)
            return
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def context(self) -> int:
        """How many tokens it can read: virtual ones take their part of the positions, and turn as
        in an example that is not long."""
        c, virtual = self.config, 0 if self.virtual is None else self.virtual.tokens
        most = c.long_from if virtual and c.long_factors else c.max_position_embeddings
        return min(most, c.max_position_embeddings) - virtual

    def forward(self, tokens, mask=None, cache=None):
        """Logits (B,T,V); with a scalar head a score per token (B,T). Arguments as in hidden."""
        h = self.hidden(tokens, mask, cache)
        return self.score(h) if self.config.num_labels else self.logits(h)

    def logits(self, h):
        y, cap = self.lm_head(h), self.config.logit_cap
        return y if cap is None else cap * torch.tanh(y / cap)

    def embed(self, tokens):
        """Embeddings (…,D), as the first layer reads them."""
        x, scaled = self.embed_tokens(tokens), self.config.scaled_embeddings
        return x * torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype) if scaled else x

    def packed(self, rows: Rows):
        """Hidden states (R,W,D) of packed rows, in which each token sees only its own example."""
        return self.hidden(rows.tokens.to(self.device), layout=rows.layout(self.device))

    def hidden(self, tokens, mask=None, cache=None, layout=None):
        """Hidden states (B,T,D) after the last norm.

        tokens (B,T); mask (B,T): False on padding, which may stand on either side; cache: the past
        (sampling.Cache); layout: Layout, in place of the mask.
        """
        at, past = layout or padded(tokens, mask, cache), None
        if self.virtual is not None:  # a past that all rows share; positions go on from it
            past = cache.past if cache and cache.past else self.virtual.past(self)
            at = at.behind(self.virtual.tokens)
        x = self.blocks(self.embed(tokens), at, cache, past)
        if cache is not None:
            cache.length += tokens.shape[1]
            cache.past = past
        return self.norm(x)

    def blocks(self, x, at: Layout, cache=None, past=None):
        """The layers alone, on embeddings x (B,T,D) → (B,T,D). past: per layer a pair of keys and
        values (1,kv_heads,P,head_dim)."""
        c = self.config
        seen = at.near if c.attention_cap else partial(at.bias, x)
        full = local = *self.angles(at), seen(0)
        if any(c.local):
            own = c.local_theta and rope_angles(at.positions, c.head_dim, c.local_theta)
            local = *(own or full[:2]), seen(c.window)
        again = self.checkpointing and torch.is_grad_enabled() and cache is None
        run = self.block if cache is None else Block.__call__
        for i, layer in enumerate(self.layers):
            cos, sin, visible = local if c.local and c.local[i] else full
            arguments = layer, x, cos, sin, visible, cache, i, past and past[i]
            x = checkpoint(run, *arguments, use_reentrant=False) if again else run(*arguments)
        return x

    def angles(self, at: Layout):
        """RoPE's cos and sin (B,1,T,dims)."""
        c, factors = self.config, None
        if c.rope_factors:
            factors = constant(c.rope_factors, at.positions.device)
        if c.long_factors:
            long = constant(c.long_factors, at.positions.device)
            factors = torch.where(at.lengths()[..., None] > c.long_from, long, factors)
        cos, sin = rope_angles(at.positions, c.rotary_dims or c.head_dim, c.rope_theta, factors)
        return (cos, sin) if c.rope_scale == 1 else (cos * c.rope_scale, sin * c.rope_scale)


# ---------------------------------------------------------------- other models from a model
def share(model: Transformer) -> Transformer:
    """A copy that shares all frozen tensors and buffers, and has copies of the trained ones."""
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(t): t for t in frozen})


def scalar_model(model: Transformer, generator: torch.Generator | None = None) -> Transformer:
    """A share() of the model with a scalar head in place of the language model's: trained, float32,
    started from N(0, 1/(D+1)) (Stiennon et al. 2020)."""
    new, size = share(model), model.config.hidden_size
    del new.lm_head
    new.config.num_labels, new.config.tie_word_embeddings = 1, False
    new.score = ScalarHead(size, device="cpu", dtype=torch.float32)
    nn.init.normal_(new.score.weight.data, std=(size + 1) ** -0.5, generator=generator)
    new.score.to(model.device)
    return new


# ---------------------------------------------------------------- what is read off an answer
def _read(model, prompts, answers, width):
    """The packed rows, and where in them, flattened, the answers' states are (N,A+1); host."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if longest > model.context:
        both = f"prompt + answer = {longest} tokens"
        raise ValueError(f"{both} exceed the model's context of {model.context}")
    return pack_answers(prompts, answers, width, model.config.long_from)


def states(model, prompts, answers, width=None):
    """h (N,A+1,D): h[:, t] is the hidden state before answer token t, h[n, length] the one at the
    last token, which also fills the places after it.

    prompts, answers: N lists of ids; A is `width`, or the longest answer. ValueError for an empty
    prompt, and for prompt and answer beyond the context.
    """
    rows, at = _read(model, prompts, answers, width)
    at = at.to(model.device)  # all is sent before the pass: sending waits for what runs
    flat = model.packed(rows).flatten(0, 1)
    return F.embedding(at, flat)  # sums the gradients of a place in a fixed order


def logprobs(model, prompts, answers, temperature=1.0, width=None):
    """log p(answer token | all before it) (N,A), exactly 0 past an answer's end. The head runs on
    the answers' tokens alone. Arguments and errors as in states()."""
    rows, at = _read(model, prompts, answers, width)
    mask = answer_mask(answers, width)
    n, t = mask.nonzero(as_tuple=True)  # (M,) of all answers' tokens
    target = torch.tensor([i for a in answers for i in a], dtype=torch.long)
    before, target, n, t = (x.to(model.device) for x in (at[n, t], target, n, t))
    flat = model.packed(rows).flatten(0, 1)
    found = -nll_of(model, F.embedding(before, flat), target, temperature)
    return found.new_zeros(mask.shape).index_put((n, t), found)


def values(critic, prompts, answers, width=None):
    """A scalar model's reading before each answer token (N,A); arguments as in states()."""
    return critic.score(states(critic, prompts, answers, width)[:, :-1])


def score(reward, prompts, answers):
    """A scalar model's score of each answer (N,): the one at its last token."""
    return reward.score(states(reward, prompts, answers)[:, -1])


def nll(model, tokens, labels, segments):
    """-log p of each label given all before it in its segment, shaped like labels: 0 where the
    label is -100, and on a segment's first token, which nothing predicts.

    tokens, labels, segments (R,W) on the host, where targets are found: whole conversations,
    several per row. Each label stands on its own token: the only shift by one is here.
    """
    h, targets, places = predicted(model, tokens, labels, segments)
    found = nll_of(model, h, targets)
    return found.new_zeros(labels.shape).index_put(places, found)


def predicted(model, tokens, labels, segments):
    """nll()'s arguments → hidden states (M,D), the targets that follow them (M,), and where these
    stand in labels, rows and columns."""
    wanted = (labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
    row, column = wanted.nonzero(as_tuple=True)  # the token at column + 1 is predicted from column
    targets = labels[row, column + 1]
    row, column, targets = (x.to(model.device) for x in (row, column, targets))
    h = model.packed(by_segments(tokens, segments))
    return h[row, column], targets, (row, column + 1)


def losses(model, temperature, h, targets):
    """-log softmax(logits(h) / temperature)[target] (M,): hidden states (M,D) and targets (M,)."""
    z = wide(model.logits(h))
    z = z if temperature == 1 else z / temperature
    return F.cross_entropy(z, targets, reduction="none")


def nll_of(model, h, targets, temperature=1.0):
    """losses() (M,), in pieces where the logits are many."""
    return in_pieces(partial(model.losses, model, temperature), h, targets, model.config.vocab_size)

"""The transformer that every stage trains, a Llama-style decoder, and what is read off an answer.

    x = x + Attention(RMSNorm(x))          causal, rotary positions, grouped key/value heads
    x = x + SwiGLU(RMSNorm(x))             down(silu(gate x) * up x)
    logits = lm_head(RMSNorm(x))           or, with num_labels = 1, a score: score(RMSNorm(x))

Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (GQA).
Modules carry the names of transformers' LlamaModel, so a checkpoint's tensors need no renaming.
Tensors are batch first: B rows, T tokens, D hidden, V vocabulary; N answers, A tokens in the
longest. Masks are bool, True on what counts.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from packing import IGNORE, Rows, by_segments, pack_answers, visible


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


def wide(x):
    """x in float32 at least, for what bf16 must not round; float64 stays, for gradient checks."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = wide(x)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(positions, head_dim: int, theta: float):
    """The rotary embedding's cos and sin (B,1,T,head_dim) at positions (B,T): both halves of a head
    turn by the same head_dim/2 frequencies."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angle = positions[:, None, :, None].float() * theta**-exponent
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE: turns the pair (x_i, x_{i + head_dim/2}) by its angle. x (B,H,T,head_dim)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin, visible, cache, layer, past):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B,H,T,head_dim)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if past is not None:  # virtual tokens stand before each row's own
            k, v = (
                torch.cat((old.to(new.dtype).expand(B, -1, -1, -1), new), 2)
                for old, new in zip(past[layer], (k, v), strict=True)
            )
        gqa = x.device.type == "cpu"  # with a mask a GPU's fast kernels need repeated k and v
        if not gqa:  # query head h reads key/value head h // groups
            groups = self.heads // self.kv_heads
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=gqa
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, *attention):
        x = x + self.self_attn(self.input_layernorm(x), *attention)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
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
        """How many tokens it can read: virtual ones take their part of the positions."""
        virtual = 0 if self.virtual is None else self.virtual.tokens
        return self.config.max_position_embeddings - virtual

    def forward(self, tokens, mask=None, cache=None):
        """Logits (B,T,V); with a scalar head a score per token (B,T). Arguments as in hidden."""
        h = self.hidden(tokens, mask, cache)
        return self.score(h) if self.config.num_labels else self.lm_head(h)

    def packed(self, rows: Rows):
        """Hidden states (R,W,D) of packed rows, in which each token sees only its own example."""
        fields = (rows.tokens, rows.positions, rows.segments, rows.prefixes)
        tokens, positions, segments, prefixes = (x.to(self.device) for x in fields)
        return self.hidden(tokens, layout=(positions, visible(segments, prefixes)))

    def hidden(self, tokens, mask=None, cache=None, layout=None):
        """Hidden states (B,T,D) after the last norm.

        tokens (B,T); mask (B,T): False on padding, which may stand on either side; cache: the past
        (sampling.Cache); layout: positions (B,T) and who sees whom (B,1,T,T) in place of the mask.
        """
        positions, visible = layout or padded(tokens, mask, cache)
        past = None
        if self.virtual is not None:  # a past that all rows share; positions go on from it
            known = cache is not None and cache.past
            past = cache.past if known else self.virtual.past(self)
            positions = positions + self.virtual.tokens
            if visible is None:
                square = tokens.new_ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool)
                visible = square.tril()
            visible = F.pad(visible, (self.virtual.tokens, 0), value=True)
        x = self.blocks(self.embed_tokens(tokens), positions, visible, cache, past)
        if cache is not None:
            cache.length += tokens.shape[1]
            cache.past = past
        return self.norm(x)

    def blocks(self, x, positions, visible=None, cache=None, past=None):
        """The layers alone, on embeddings x (B,T,D) → (B,T,D). past: per layer a pair of keys and
        values (1,kv_heads,P,head_dim)."""
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        again = self.checkpointing and torch.is_grad_enabled() and cache is None
        for i, layer in enumerate(self.layers):
            arguments = x, cos, sin, visible, cache, i, past
            x = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
        return x


def padded(tokens, mask, cache):
    """Positions (B,T) and who sees whom (B,1,T,S; None: all before) of rows padded on one side."""
    B, T = tokens.shape
    if cache is None and (mask is None or bool(mask[:, 0].all())):
        return torch.arange(T, device=tokens.device).expand(B, T), None  # right padding: unseen
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    start = 0
    if cache is not None:
        start = cache.length
        cache.mask[:, start : start + T] = mask
        mask = cache.mask[:, : start + T]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
    if T == 1 and cache is not None:  # one new token sees all real ones, itself among them
        return positions, mask[:, None, None]
    here = torch.arange(mask.shape[1], device=tokens.device)
    before = here <= here[start:, None]
    itself = here == here[start:, None]  # padding sees itself, or its softmax would be 0/0
    return positions, (before & mask[:, None, None] | itself)


# ---------------------------------------------------------------- other models from a model
def init_weights(model: Transformer, generator: torch.Generator):
    """Normal 0.02; the projections into the residual stream smaller by sqrt(2 L) (GPT-2)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * model.config.num_hidden_layers if residual else 1
            nn.init.normal_(p, 0.0, 0.02 / depth**0.5, generator=generator)


def share(model: Transformer) -> Transformer:
    """A copy that holds the very same frozen tensors (parameters without gradient, buffers) and
    copies of the trained ones."""
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
def answer_mask(answers, width=None, device="cpu"):
    """(N,A) bool, True on the answers' tokens. A is `width`, or the longest answer."""
    lengths = torch.tensor([len(a) for a in answers])
    columns = torch.arange(max(map(len, answers)) if width is None else width)
    return (columns < lengths[:, None]).to(device)


def _read(model, prompts, answers, width):
    """The packed rows' hidden states, flat (R·W,D), and where in them the answers' are (N,A+1)."""
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    if longest > model.context:
        exceeds = f"exceed the model's context of {model.context}"
        raise ValueError(f"prompt + answer = {longest} tokens {exceeds}")
    rows, at = pack_answers(prompts, answers, width)
    return model.packed(rows).flatten(0, 1), at


def states(model, prompts, answers, width=None):
    """h (N,A+1,D): h[:, t] is the hidden state before answer token t, h[n, length] the one at the
    last token, which also fills the places after it.

    prompts, answers: N lists of ids; A is `width`, or the longest answer. ValueError for an empty
    prompt, and for prompt and answer beyond the context.
    """
    flat, at = _read(model, prompts, answers, width)
    return F.embedding(at.to(flat.device), flat)  # sums the gradients of a place in a fixed order


def logprobs(model, prompts, answers, temperature=1.0, width=None):
    """log p(answer token | all before it) (N,A), exactly 0 past an answer's end. The head runs on
    the answers' tokens alone. Arguments and errors as in states()."""
    flat, at = _read(model, prompts, answers, width)
    mask = answer_mask(answers, width)
    before = at[:, :-1][mask].to(flat.device)  # (M,) of all answers' tokens
    target = torch.tensor([i for a in answers for i in a], dtype=torch.long).to(flat.device)
    logits = wide(model.lm_head(F.embedding(before, flat))) / temperature
    found = -F.cross_entropy(logits, target, reduction="none")
    n, t = (i.to(flat.device) for i in mask.nonzero(as_tuple=True))
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

    tokens, labels, segments (R,W) on the host: whole conversations, several per row; each label
    stands on its own token. The only shift by one is here; targets are found on the host, before
    anything moves to the device.
    """
    logits, targets, places = predicted(model, tokens, labels, segments)
    found = F.cross_entropy(logits, targets, reduction="none")
    return found.new_zeros(labels.shape).index_put(places, found)


def predicted(model, tokens, labels, segments):
    """What nll() reads → logits (M,V), each from before its target; the M targets (M,); and their
    places, rows and columns (M,) of labels. Arguments as in nll()."""
    wanted = (labels[:, 1:] != IGNORE) & (segments[:, 1:] == segments[:, :-1])
    row, column = wanted.nonzero(as_tuple=True)  # the token at column + 1 is predicted from column
    h = model.packed(by_segments(tokens, segments))
    targets = labels[row, column + 1].to(h.device)
    row, column = row.to(h.device), column.to(h.device)
    return wide(model.lm_head(h[row, column])), targets, (row, column + 1)

"""The transformer that every stage trains: a Llama-style decoder, its KV cache, sampling, and the
three readings of it.

    x = x + Attention(RMSNorm(x))          causal, rotary positions, grouped key/value heads
    x = x + SwiGLU(RMSNorm(x))             down(silu(gate x) * up x)
    logits = lm_head(RMSNorm(x))           or, with num_labels = 1, one score a token: score(RMSNorm(x))

Sources: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Zhang & Sennrich 2019 (RMSNorm),
Shazeer 2020 (SwiGLU), Ainslie et al. 2023 (GQA). Modules carry the names of transformers'
LlamaModel, so a checkpoint's tensors need no renaming. Tensors are batch first: B rows, T tokens, D
hidden, V vocabulary. Masks are bool, True on what counts.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    num_labels: int = 0  # 0: a language model; 1: a reward model or critic, one score a token
    # of the scores of reference answers: PPO works with (score - mean) / std
    reward_mean: float = 0.0
    reward_std: float = 1.0


def wide(x):
    """x in float32 at least: what must not be rounded to bf16 (float64 stays, for finite
    differences).
    """
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


class ScalarHead(nn.Linear):
    """One score from each hidden state, computed in float32 whatever both are, under autocast too:
    what counts of scores is their differences, and bf16 has not three digits."""

    def __init__(self, size: int, **how):
        super().__init__(size, 1, bias=False, **how)

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(wide(h), wide(self.weight)).squeeze(-1)


def rope_angles(positions, head_dim: int, theta: float):
    """Angles of the rotary embedding: positions (B,T) → cos, sin (B,1,T,head_dim), each half the
    same head_dim/2 frequencies.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angle = positions[:, None, :, None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """RoPE: turns the pair (x_i, x_{i + head_dim/2}) by its angle. x (B,H,T,head_dim)."""
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.attention_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.attention_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=c.attention_bias)

    def forward(self, x, cos, sin, allowed, cache, layer, past):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        if past is not None:  # virtual tokens, before every row's own
            k, v = (
                torch.cat((old.to(new.dtype).expand(B, -1, -1, -1), new), 2)
                for old, new in zip(past[layer], (k, v), strict=True)
            )
        # a GPU's fast kernels with a mask want the key/value heads repeated
        native = x.device.type == "cpu"
        if not native:  # query head h reads key/value head h // groups
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=allowed, is_causal=allowed is None, enable_gqa=native
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


class Cache:
    """Keys and values of the tokens read so far, (rows, kv_heads, room, head_dim) a layer, and
    which columns are real tokens.
    """

    def __init__(self, model, rows: int, room: int):
        c, like = model.config, model.embed_tokens.weight
        shape = (rows, c.num_key_value_heads, room, c.head_dim)
        self.kv = [
            (like.new_zeros(shape), like.new_zeros(shape)) for _ in range(c.num_hidden_layers)
        ]
        self.mask = torch.zeros(rows, room, dtype=torch.bool, device=like.device)
        self.length, self.place, self.past = 0, None, None

    def append(self, layer: int, k, v):
        """Stores a layer's new keys and values behind the old ones and returns both; of packed rows
        (place: from where, to where) each where it belongs, and returns the new ones, which see
        only themselves."""
        if self.place:
            (packed, at), (row, column) = self.place
            for store, fresh in zip(self.kv[layer], (k, v), strict=True):
                store[row, :, column] = fresh[packed, :, at].to(store.dtype)
            return k, v
        new, end = self.length, self.length + k.shape[2]
        for store, fresh in zip(self.kv[layer], (k, v), strict=True):
            store[:, :, new:end] = fresh
        return tuple(store[:, :, :end] for store in self.kv[layer])

    def keep(self, rows):
        """Drops every row but these (bool or index): an answer that has ended costs nothing more."""
        self.kv = [(k[rows], v[rows]) for k, v in self.kv]
        self.mask = self.mask[rows]


class Transformer(nn.Module):
    """A decoder with a language-model head (num_labels 0) or a scalar head (num_labels 1)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        # prompt or prefix tuning (adapters.py): a module that gives each layer `tokens` keys and
        # values to begin with
        self.virtual = None
        # ids without a token, of a vocabulary that was padded (hub.load): they are never sampled
        self.spare = None
        # keep only each block's input for the backward pass and compute the rest again (Chen et al.
        # 2016)
        self.checkpointing = False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        if c.num_labels:
            self.score = ScalarHead(c.hidden_size)
        else:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
            if c.tie_word_embeddings:
                self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def context(self) -> int:
        """How many tokens it can read: virtual ones take their part of the positions."""
        return self.config.max_position_embeddings - (
            self.virtual.tokens if self.virtual is not None else 0
        )

    def hidden(self, tokens, mask=None, segments=None, cache=None, layout=None):
        """Hidden states after the last norm.

        tokens (B,T); mask (B,T): real tokens, padding on either side or none; segments (B,T): which
        packed example a token belongs to, -1 on padding: a token sees its own example only and
        positions count from its start; cache: the past; layout: positions (B,T) and who sees whom
        (B,1,T,T) themselves. → (B,T,D)
        """
        if segments is not None:
            layout = _packed(segments)
        positions, allowed = layout or _padded(tokens, mask, cache)
        past = None
        # a past that all rows share: everyone sees it, positions go on from it
        if self.virtual is not None:
            past = cache.past if cache is not None and cache.past else self.virtual.past(self)
            if allowed is None:
                allowed = torch.ones(
                    tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=self.device
                ).tril()
            positions, allowed = (
                positions + self.virtual.tokens,
                F.pad(allowed, (self.virtual.tokens, 0), value=True),
            )
        x = self.blocks(self.embed_tokens(tokens), positions, allowed, cache, past)
        if cache is not None:
            cache.length, cache.past = cache.length + tokens.shape[1], past
        return self.norm(x)

    def blocks(self, x, positions, allowed=None, cache=None, past=None):
        """The layers alone, on embeddings x (B,T,D). past: a pair of keys and values
        (1,kv_heads,P,head_dim) a layer → (B,T,D).
        """
        cos, sin = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        again = self.checkpointing and torch.is_grad_enabled() and cache is None
        for i, layer in enumerate(self.layers):
            arguments = x, cos, sin, allowed, cache, i, past
            x = checkpoint(layer, *arguments, use_reentrant=False) if again else layer(*arguments)
        return x

    def forward(self, tokens, mask=None, segments=None, cache=None):
        """Logits (B,T,V); with a scalar head the score at every token (B,T)."""
        h = self.hidden(tokens, mask, segments, cache)
        return self.score(h) if self.config.num_labels else self.lm_head(h)


def _padded(tokens, mask, cache):
    """Positions (B,T) and who sees whom (B,1,T,S; None: everyone before) for rows padded on the
    left or right.
    """
    B, T = tokens.shape
    # right padding: no real token sees it, causality is enough
    if cache is None and (mask is None or bool(mask[:, 0].all())):
        return torch.arange(T, device=tokens.device).expand(B, T), None
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    start = 0
    if cache is not None:
        start = cache.length
        cache.mask[:, start : start + T] = mask
        mask = cache.mask[:, : start + T]
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, start:]
    if T == 1 and cache is not None:  # one new token sees all real ones; it is real itself
        return positions, mask[:, None, None]
    here = torch.arange(mask.shape[1], device=tokens.device)
    before, itself = here <= here[start:, None], here == here[start:, None]
    # padding sees itself, or its softmax would be 0/0
    return positions, (before & mask[:, None, None] | itself)


def _packed(segments):
    """The same for packed rows: block-diagonal and causal, positions counted from each example's
    first token.
    """
    here = torch.arange(segments.shape[1], device=segments.device)
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    positions = here - torch.where(first, here, 0).cummax(1).values
    return (
        positions,
        ((segments[:, :, None] == segments[:, None]) & (here <= here[:, None]))[:, None],
    )


def init_weights(model: Transformer, generator: torch.Generator):
    """Normal 0.02 everywhere; the projections that write into the residual stream smaller by sqrt(2
    L) (GPT-2).
    """
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(
                p,
                0.0,
                0.02 / (2 * model.config.num_hidden_layers) ** 0.5 if residual else 0.02,
                generator=generator,
            )


def share(model: Transformer) -> Transformer:
    """A copy of the model whose frozen tensors (parameters without gradient, buffers) are the very
    same, only trained ones are copied.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return copy.deepcopy(model, {id(t): t for t in frozen})


def scalar_model(model: Transformer, generator: torch.Generator | None = None) -> Transformer:
    """A share() of the model whose language-model head is replaced by a scalar one, trained, in
    float32, started from N(0, 1/(D+1)) (Stiennon et al. 2020)."""
    new = share(model)
    del new.lm_head
    new.config.num_labels, new.config.tie_word_embeddings = 1, False
    new.score = ScalarHead(model.config.hidden_size, device="cpu", dtype=torch.float32)
    nn.init.normal_(
        new.score.weight.data, std=(model.config.hidden_size + 1) ** -0.5, generator=generator
    )
    new.score.to(model.device)
    return new


def pad(rows, fill=0, left=False, device="cpu"):
    """Ragged lists of ids → tokens (B,T) and mask (B,T), padded on one side with `fill` (its value
    never matters).
    """
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), fill)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at], mask[i, at] = torch.tensor(row, dtype=torch.long), True
    return tokens.to(device), mask.to(device)


def join(prompts, answers, device="cpu"):
    """Ids of prompts and of their answers → tokens (B,T), mask (B,T) on both, where (B,T) on the
    answers alone; padded on the right.
    """
    tokens, mask = pad([[*p, *a] for p, a in zip(prompts, answers, strict=True)], device=device)
    start = torch.tensor([len(p) for p in prompts], device=device)
    return tokens, mask, mask & (torch.arange(tokens.shape[1], device=device) >= start[:, None])


def first_fit(lengths: list[int], width: int) -> list[tuple[int, int]]:
    """Where each example goes when packed into rows of `width`: (row, column of its first token);
    the longest are placed first.
    """
    used, place = [], [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, u in enumerate(used) if u + lengths[i] <= width), len(used))
        if row == len(used):
            used.append(0)
        place[i] = row, used[row]
        used[row] += lengths[i]
    return place


# answers to one prompt that are laid end to end: what they cost in attention grows with the square
# of their number
GROUP = 16


def dense_hidden(model, tokens, mask, where=None, cache=None):
    """What model.hidden(tokens, mask) gives on the real tokens, and 0 on padding, with nothing
    computed twice or for nothing (B,T,D).

    The rows' real tokens are laid end to end in fewer, fuller rows. A row that begins like the one
    before it (all up to its first token in `where`; without `where`, the whole row) reads that
    beginning there: K answers to a prompt cost one prompt. Each token sees its own row's tokens
    alone. An empty cache is filled.
    """
    lead = mask if where is None else mask & (where.cumsum(1) == 0)
    alike = (lead[1:] == lead[:-1]).all(1) & ((tokens[1:] == tokens[:-1]) | ~lead[1:]).all(1)
    # (B,) rows that begin a group, in which the others read their beginning
    new = F.pad(~alike, (1, 0), value=True)
    count = torch.arange(len(new), device=new.device)
    new |= (count - torch.where(new, count, 0).cummax(0).values) % GROUP == 0
    group, leader = new.long().cumsum(0) - 1, new.nonzero().squeeze(1)
    keep = mask & (~lead | new[:, None])
    lengths = torch.zeros_like(leader).index_add(0, group, keep.sum(1))
    # short rows keep the attention matrix small
    width = max(1, min(128, int(lengths.sum())), int(lengths.max()))
    # (B,2): row and column of its group
    place = torch.tensor(first_fit(lengths.tolist(), width), device=tokens.device)[group]
    # a kept token's place in its group
    nth = keep.flatten().cumsum(0).view_as(keep) - 1 - (lengths.cumsum(0) - lengths)[group, None]
    column = place[:, 1:] + torch.where(lead, nth[leader[group]], nth)
    at = place[:, :1].expand_as(column)[mask], column[mask]
    packed = tokens.new_zeros(int(place[:, 0].max()) + 1, width)
    positions, own, begins = (
        torch.zeros_like(packed),
        torch.full_like(packed, -1),
        torch.full_like(packed, -1),
    )
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]
    packed[at], positions[at] = tokens[mask], (mask.long().cumsum(1) - 1)[mask]
    # a name for each row's own tokens and each beginning
    own[at] = torch.where(lead, len(tokens) + group[:, None], rows)[mask]
    begins[at] = (len(tokens) + group[:, None]).expand_as(tokens)[mask]
    here = torch.arange(width, device=tokens.device)
    allowed = ((own[:, :, None] == own[:, None]) | (begins[:, :, None] == own[:, None])) & (
        here <= here[:, None]
    )
    if cache is not None:
        cache.place, cache.mask[:, : tokens.shape[1]] = (at, mask.nonzero(as_tuple=True)), mask
    h = model.hidden(packed, cache=cache, layout=(positions, allowed[:, None]))
    if cache is not None:
        cache.place, cache.length = None, tokens.shape[1]
    # h[at], whose gradient sums shared beginnings in a fixed order
    found = F.embedding(at[0] * width + at[1], h.flatten(0, 1))
    return h.new_zeros(*tokens.shape, h.shape[-1]).index_put(mask.nonzero(as_tuple=True), found)


def logprobs(model, tokens, mask, where, temperature: float = 1.0):
    """log p(token t | tokens before t) where `where`, exactly 0 elsewhere; all (B,T). The head runs
    on the wanted rows only.
    """
    # the token at column + 1 is predicted from column
    row, column = where[:, 1:].nonzero(as_tuple=True)
    target = tokens[row, column + 1]
    logits = (
        wide(model.lm_head(dense_hidden(model, tokens, mask, where)[row, column])) / temperature
    )
    values = -F.cross_entropy(logits, target, reduction="none")
    return torch.zeros(tokens.shape, device=tokens.device, dtype=values.dtype).index_put(
        (row, column + 1), values
    )


def scores(model, tokens, mask, where=None):
    """A scalar model's score at every real token, 0 on padding (B,T). where: the answers, so that
    their prompts are read once.
    """
    return model.score(dense_hidden(model, tokens, mask, where)) * mask


def last_score(model, tokens, mask, where=None):
    """A scalar model's score of each row (B,): the one at its last real token."""
    last = torch.where(mask, torch.arange(tokens.shape[1], device=tokens.device), 0).amax(
        1, keepdim=True
    )
    return scores(model, tokens, mask, where).gather(1, last).squeeze(1)


def sample(logits, temperature: float, top_p: float, uniform):
    """One token id a row. logits (B,V), uniform (B,) in [0,1): temperature 0 takes the likeliest;
    else the inverse of the cumulative distribution at `uniform`, cut to the smallest set of tokens
    that holds top_p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        order = p.argsort(-1, descending=True)
        ranked = p.gather(-1, order)
        p = torch.zeros_like(p).scatter(
            -1, order, torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        )
    cdf = p.cumsum(-1)
    return (
        torch.searchsorted(cdf, (uniform[:, None] * cdf[:, -1:]), right=True)
        .squeeze(-1)
        .clamp(max=p.shape[-1] - 1)
    )


def prompt_room(model, max_new_tokens: int) -> int:
    """How many tokens a prompt may have. ValueError where the answer alone fills the context."""
    if max_new_tokens >= model.context:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: the model's context is {model.context} tokens,"
            " prompt included; give fewer"
        )
    return model.context - max_new_tokens


@torch.no_grad()
def decode(model, prompts, max_new_tokens: int, temperature=1.0, top_p=1.0, eos_id=None, seed=0):
    """Yields (rows, ids) a step: the next token of every answer that has not ended. Prompts are
    ragged lists of ids.

    eos_id: the id that ends an answer, or several; None: none does. Each answer draws its own
    uniforms, fixed by seed, row and step: what one row says does not depend on when others end.
    Raises ValueError where a prompt is empty, where prompt and answer exceed the model's context,
    and where logits are not finite.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if min(map(len, prompts)) == 0:
        raise ValueError("generate: a prompt is empty; give at least one token")
    if longest > model.context:
        raise ValueError(
            f"generate: prompt + answer = {longest} tokens exceed the model's context of"
            f" {model.context}"
        )
    uniform = torch.rand(
        max_new_tokens, len(prompts), generator=torch.Generator().manual_seed(seed)
    ).to(model.device)
    tokens, mask = pad(prompts, left=True, device=model.device)
    rows, cache = (
        torch.arange(len(prompts), device=model.device),
        Cache(model, len(prompts), longest),
    )
    ends = torch.tensor(
        [] if eos_id is None else eos_id, dtype=torch.long, device=model.device
    ).flatten()
    ids = None
    for step in range(max_new_tokens):
        h = (
            dense_hidden(model, tokens, mask, cache=cache)
            if ids is None
            else model.hidden(ids[:, None], cache=cache)
        )
        logits = model.lm_head(h[:, -1])
        finite = logits.isfinite().all()
        if model.spare is not None:
            logits = logits.index_fill(1, model.spare, -torch.inf)
        ids = sample(logits, temperature, top_p, uniform[step, rows])
        going = (ids[:, None] != ends).all(1)
        # together: on a GPU each question is a wait
        finite, all_going = torch.stack((finite, going.all())).tolist()
        if not finite:
            raise ValueError(
                f"generate: the logits of an answer's token {step + 1} are NaN or infinite: the"
                " model's weights are damaged, or too large for their type; take another"
                " checkpoint"
            )
        yield rows, ids
        if not all_going:
            rows, ids = rows[going], ids[going]
            cache.keep(going)
        if not len(rows):
            return


def generate(
    model, prompts, max_new_tokens: int, temperature=1.0, top_p=1.0, eos_id=None, seed=0
) -> list[list[int]]:
    """The answers' ids, with the end token where it was reached. Arguments and errors as in
    `decode`.
    """
    out = torch.full((len(prompts), max_new_tokens), -1, device=model.device)
    for step, (rows, ids) in enumerate(
        decode(model, prompts, max_new_tokens, temperature, top_p, eos_id, seed)
    ):
        out[rows, step] = ids
    return [[i for i in row if i >= 0] for row in out.tolist()]

"""Answers from a model: the cache of keys and values, sampling, decoding.

    prefill   reads each prompt once, a few of similar length at a time: padded to the longest of
              all, most columns would be padding. Padding stands on the left, so that all prompts
              end in the last column
    decode    one token per row and step: its keys and values join the cache, its logits give the
              next one; on a GPU a step is captured once and replayed (common/graph.py)

A token is drawn by inverting the cumulative distribution at a uniform number that seed, row and
step fix: an answer does not depend on which others are sampled beside it, or on when they end.
"""

import itertools
from functools import partial

import torch

from common import graph
from common.layout import read_dtype
from packing import pad

TOGETHER = {"cpu": 16}  # prompts that are read at a time; elsewhere 64
LOOK = {"cpu": 1}  # steps between looks for answers that have ended; a GPU waits then: 8
CAPTURED = {"cuda"}  # there rows that have ended stay: the weights are read for one or for all


class Cache:
    """Keys and values of the tokens read so far, per layer (rows,kv_heads,room,head_dim), and which
    columns are real tokens: mask (rows,room)."""

    def __init__(self, model, rows: int, room: int):
        c, weight = model.config, model.embed_tokens.weight
        shape, dtype = (rows, c.num_key_value_heads, room, c.head_dim), read_dtype(weight)
        zeros = partial(torch.zeros, device=weight.device)
        layers = range(c.num_hidden_layers)
        self.kv = [(zeros(shape, dtype=dtype), zeros(shape, dtype=dtype)) for _ in layers]
        self.mask = zeros(rows, room, dtype=torch.bool)
        self.length = 0  # columns in use; where a step is captured, a tensor (1,)
        self.seen = room  # columns that a captured step reads
        self.past = None  # virtual tokens' keys and values, computed once

    def place(self, rows, part: "Cache", index):
        """Puts the rows of `index` of a cache of fewer columns into these rows. What is left free
        between a short prompt and its answer is padding: positions count the mask, not columns."""
        columns = slice(part.length)
        for stores, news in zip(self.kv, part.kv, strict=True):
            for store, new in zip(stores, news, strict=True):
                store[rows, :, columns] = new[index]
        self.mask[rows, columns] = part.mask[index]

    def see(self, mask):
        """Stores the mask (rows,T) of new tokens behind that of the old ones → all of it."""
        if torch.is_tensor(self.length):
            return self.mask.index_fill_(1, self.length, True)[:, : self.seen]
        end = self.length + mask.shape[1]
        self.mask[:, self.length : end] = mask
        return self.mask[:, :end]

    def append(self, layer: int, k, v):
        """Stores a layer's new keys and values behind the old ones → all of them."""
        if torch.is_tensor(self.length):
            for store, new in zip(self.kv[layer], (k, v), strict=True):
                store.index_copy_(2, self.length, new.to(store.dtype))
            return tuple(store[:, :, : self.seen] for store in self.kv[layer])
        end = self.length + k.shape[2]
        for store, new in zip(self.kv[layer], (k, v), strict=True):
            store[:, :, self.length : end] = new
        return tuple(store[:, :, :end] for store in self.kv[layer])

    def keep(self, index):
        """Keeps the rows of `index`, in its order. Only those that move are copied."""
        n, used = len(index), slice(self.length)
        moved = (index != torch.arange(n, device=index.device)).nonzero().squeeze(1)
        source = index[moved]
        for store in itertools.chain(*self.kv):
            store[moved, :, used] = store[source, :, used]
        self.mask[moved, used] = self.mask[source, used]
        self.kv = [(k[:n], v[:n]) for k, v in self.kv]
        self.mask = self.mask[:n]


def sample(logits, temperature: float, top_p: float, uniform):
    """One token id per row (B,), from logits (B,V) and uniform (B,) in [0,1).

    Temperature 0 takes the likeliest. top_p < 1 samples from the smallest set of tokens that holds
    top_p of the probability (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        ranked, order = p.sort(dim=-1, descending=True, stable=True)
        nucleus = torch.where(ranked.cumsum(-1) - ranked < top_p, ranked, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, nucleus)
    cdf = p.cumsum(-1)
    drawn = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
    return drawn.squeeze(-1).clamp(max=p.shape[-1] - 1)


def prompt_room(model, max_new_tokens: int) -> int:
    """How many tokens a prompt may have. ValueError where the answer alone fills the context."""
    if max_new_tokens >= model.context:
        given = f"--max-new-tokens {max_new_tokens}"
        context = f"the model's context is {model.context} tokens, prompt included"
        raise ValueError(f"{given}: {context}; give fewer")
    return model.context - max_new_tokens


def prefill(model, prompts, room: int):
    """Reads the prompts, each distinct one once → the cache, a row per prompt, and the hidden state
    at each prompt's last token (N,D)."""
    rows = sorted(dict.fromkeys(map(tuple, prompts)), key=len)
    cache, found = Cache(model, len(prompts), room), []
    cache.length = len(rows[-1])
    place = {prompt: i for i, prompt in enumerate(rows)}
    which = torch.tensor([place[tuple(prompt)] for prompt in prompts])
    size = TOGETHER.get(model.device.type, 64)
    for at in range(0, len(rows), size):
        tokens, mask = pad(rows[at : at + size], left=True, device=model.device)
        part = Cache(model, *tokens.shape)
        found.append(model.hidden(tokens, mask, part)[:, -1])
        here = ((which >= at) & (which < at + len(mask))).nonzero().squeeze(1)
        cache.place(here.to(model.device), part, (which[here] - at).to(model.device))
        cache.past = part.past
    return cache, torch.cat(found)[which.to(model.device)]


def read_token(model, cache, ids):
    """One new token per row, ids (B,) → the hidden state (B,D) after it."""
    return model.hidden(ids[:, None], cache=cache)[:, -1]


def reader(model, cache):
    """read_token with this cache, on a GPU as a graph."""
    if model.device.type in CAPTURED and not graph.refused:
        return graph.CapturedStep(read_token, model, cache)
    return partial(read_token, model, cache)


@torch.no_grad()
def decode(model, prompts, max_new_tokens: int, temperature=1.0, top_p=1.0, eos_id=None, seed=0):
    """Yields the answers' next tokens, ids (N,) per step, -1 for an answer that has ended.

    prompts: N lists of ids; eos_id: the id that ends an answer, or several; None: none does.
    ValueError for an empty prompt, for prompt and answer beyond the model's context, and for logits
    that are not finite.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if not all(prompts):
        raise ValueError("generate: a prompt is empty; give at least one token")
    if longest > model.context:
        exceeds = f"exceed the model's context of {model.context}"
        raise ValueError(f"generate: prompt + answer = {longest} tokens {exceeds}")
    N, device = len(prompts), model.device
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(max_new_tokens, N, generator=generator).to(device)
    ends = torch.tensor([] if eos_id is None else eos_id, dtype=torch.long, device=device).flatten()
    rows = torch.arange(N, device=device)  # the answer that each of the cache's rows is
    going = torch.ones(N, dtype=torch.bool, device=device)
    cache, h = prefill(model, prompts, longest)
    read = reader(model, cache)
    drawn, finite, limit = [], [], model.config.long_from
    every = LOOK.get(device.type, 8)
    for step in range(max_new_tokens):
        logits, last = model.logits(h), step + 1 == max_new_tokens
        look = last or (step + 1) % every == 0
        finite.append((logits * 0).sum() == 0)  # NaN where one is infinite
        if look:
            check_finite(finite, step)
            finite = []
        if model.spare is not None:
            logits = logits.index_fill(1, model.spare, -torch.inf)
        ids = sample(logits, temperature, top_p, uniform[step, rows])
        drawn.append(rows.new_full((N,), -1).index_put((rows,), torch.where(going, ids, -1)))
        yield drawn[-1]
        going = going & (ids[:, None] != ends).all(1)
        if last:
            return
        left = int(going.sum()) if look else len(rows)
        if not left:
            return
        if left < len(rows) and not isinstance(read, graph.CapturedStep):
            index = torch.arange(left, device=device)
            index[~going[:left]] = left + going[left:].nonzero().squeeze(1)
            rows, ids, going = rows[index], ids[index], going[index]
            cache.keep(index)
        # one row now is a long example, all of which turns otherwise: all are read anew
        if limit and any(len(p) + step == limit for p in prompts):
            texts = zip(prompts, torch.stack(drawn, 1).clamp(min=0).tolist(), strict=True)
            texts = [prompt + answer for prompt, answer in texts]
            cache, h = prefill(model, [texts[i] for i in rows.tolist()], longest)
            read = reader(model, cache)
            continue
        h = read(ids)


def check_finite(finite, step: int):
    """ValueError where the last steps' logits, until this one, were not all finite."""
    found = torch.stack(finite).tolist()
    if not all(found):
        token = step + 2 - len(found) + found.index(False)
        where = f"the logits of an answer's token {token} are NaN or infinite"
        cause = "the model's weights are damaged, or too large for their type"
        raise ValueError(f"generate: {where}: {cause}; take another checkpoint")


def generate(
    model, prompts, max_new_tokens: int, temperature=1.0, top_p=1.0, eos_id=None, seed=0
) -> list[list[int]]:
    """The answers' ids, with the end token where it was reached. Arguments and errors: decode's."""
    steps = decode(model, prompts, max_new_tokens, temperature, top_p, eos_id, seed)
    columns = torch.stack(list(steps), 1)  # (N, steps)
    return [[i for i in row if i >= 0] for row in columns.tolist()]

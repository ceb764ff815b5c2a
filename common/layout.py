"""Where tokens stand and what they see, in rows packed (packing.py) or padded: what the network is
told about a batch beside its ids.

    packed    what stands before a token in its own piece, and in the piece that it continues
    padded    all real tokens before it; nobody sees padding, on either side
    cached    a new token sees all real ones
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def visible(segments, prefixes):
    """Who sees whom: (R,1,W,W) bool from segments and prefixes (R,W)."""
    own = segments[:, :, None] == segments[:, None]
    continued = prefixes[:, :, None] == segments[:, None]
    here = torch.arange(segments.shape[1], device=segments.device)
    # in place: these are large
    return own.logical_or_(continued).logical_and_(here <= here[:, None])[:, None]


@dataclass
class Layout:
    """Where tokens (B,T) stand, and what they see among S keys, the cache's or themselves."""

    positions: torch.Tensor  # (B,T)
    visible: torch.Tensor | None  # (B,1,T,S) bool; None: all before
    keys: torch.Tensor  # (B,S) their positions
    mask: torch.Tensor | None = None  # (B,S) False on padding; None: there is none
    examples: torch.Tensor | None = None  # (B,T) whose they are; None: a row is one example

    def behind(self, tokens: int):
        """The same behind some tokens that all see."""
        first = torch.arange(tokens, device=self.keys.device).expand(len(self.keys), -1)
        seen = self.visible
        if seen is None:
            square = self.keys.new_ones(self.keys.shape[1], self.keys.shape[1], dtype=torch.bool)
            seen = square.tril()
        seen = F.pad(seen, (tokens, 0), value=True)
        keys = torch.cat((first, self.keys + tokens), 1)
        return Layout(self.positions + tokens, seen, keys, self.mask, self.examples)

    def near(self, window: int):
        """visible, less what stands `window` or more positions before."""
        if not window or self.keys.shape[1] <= window:
            return self.visible
        distance = self.positions[:, None, :, None] - self.keys[:, None, None]  # (B,1,T,S)
        seen = distance >= 0 if self.visible is None else self.visible
        return seen & (distance < window)

    def bias(self, x, window=0):
        """near(window) as attention adds it to its scores, 0 or -inf, in the type that x is read
        in: made once, where each layer would make its own and autograd keep it. Its rows begin at
        multiples of 8 numbers, as a GPU's kernels have them."""
        if (seen := self.near(window)) is None:
            return None
        S = seen.shape[-1]
        rows = seen.new_full((*seen.shape[:-1], -(-S // 8) * 8), -torch.inf, dtype=read_dtype(x))
        return rows[..., :S].masked_fill_(seen, 0.0)

    def lengths(self):
        """How many tokens each one's own example has, (B,1) or (B,T)."""
        if self.examples is not None:
            own = self.examples[:, :, None] == self.examples[:, None]
            return torch.where(own, self.positions[:, None], 0).amax(-1) + 1
        mask = torch.ones_like(self.keys) if self.mask is None else self.mask
        return mask.sum(1, keepdim=True)


def padded(tokens, mask, cache) -> Layout:
    """The Layout of rows (B,T) padded on either side, mask (B,T) or None, behind those in a cache
    or None."""
    B, T = tokens.shape
    if cache is None and (mask is None or bool(mask[:, 0].all())):
        positions = torch.arange(T, device=tokens.device).expand(B, T)
        return Layout(positions, None, positions, mask)  # right padding: unseen
    if mask is None:
        mask = torch.ones_like(tokens, dtype=torch.bool)
    if cache is not None:
        mask = cache.see(mask)
    keys = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = keys[:, -T:]
    if T == 1 and cache is not None:  # one new token sees all real ones, itself among them
        return Layout(positions, mask[:, None, None], keys, mask)
    here = torch.arange(mask.shape[1], device=tokens.device)
    before = here <= here[-T:, None]
    itself = here == here[-T:, None]  # padding sees itself, or its softmax would be 0/0
    return Layout(positions, before & mask[:, None, None] | itself, keys, mask)


# ---------------------------------------------------------------- what is sent, and in what type
@functools.cache
def constant(numbers: tuple, device):
    """(1,n) float32, sent to the device once."""
    return torch.tensor([numbers], device=device)


def read_dtype(x):
    """The type in which matrices read x: autocast's, where it is on."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype

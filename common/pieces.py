"""A loss over many targets and a large vocabulary, in pieces: its logits never exist all at once.

    whole        loss(h, targets)                            M · V logits, three times when trained
    in pieces    loss(h[:n], targets[:n]), …, one by one     the same values and gradients

Of each piece its hidden states are kept; the backward pass computes its logits z again, for
dL/dz = dL/dnll · (softmax(z) - onehot) (Chen et al. 2016). That is a third more work in the head.
"""

import torch
from torch.utils.checkpoint import checkpoint

PIECE = 2**26  # logits of a piece: 256 MB, and three times that in the backward pass


def in_pieces(loss, h, targets, vocabulary: int):
    """loss(h, targets) (M,), from hidden states h (M,D) and targets (M,): in pieces of PIECE logits
    where there are more than two of them."""
    size, found = max(1, PIECE // vocabulary), []
    if len(h) <= 2 * size:
        return loss(h, targets)
    for piece in zip(h.split(size), targets.split(size), strict=True):
        torch.clear_autocast_cache()  # or pieces would add up the head's gradient in bf16
        found.append(checkpoint(loss, *piece, use_reentrant=False))
    return torch.cat(found)

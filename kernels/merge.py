"""Merge: attention over disjoint sets of keys, put together.

    lse = logaddexp(lse_1, lse_2, ...)      output = sum_i softmax_i(lse_1, lse_2, ...) output_i

A part that saw no key (`lse = -inf`) is neutral.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of the keys of `parts`.

    Each part is an output `[batch, tokens, heads, head_dim]` and its natural-log LSE
    `[batch, heads, tokens]`, as `sparse_attention` returns them. The sum is taken in the dtype of
    the LSE and returned in that of the first output. A query that no part served gets 0 and -inf.
    """
    if not parts:
        raise ValueError("merge needs at least one (output, lse) pair, got none")
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = lses.softmax(0).masked_fill(lse == -torch.inf, 0)
    total = sum(
        rearrange(weight, "b h n -> b n h 1") * output
        for weight, (output, _) in zip(weights, parts, strict=True)
    )
    return torch.as_tensor(total).to(parts[0][0].dtype), lse

"""Row sample: the few query rows of one attention call on which candidates are judged.

About 1 % of the rows suffices to tell patterns apart (Sparse VideoGen, arXiv 2502.01776,
section 4.1). The rows follow a golden-ratio sequence: any stride would alias with the tiles of an
order, and a random draw would need a generator of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid

GOLDEN = (math.sqrt(5) - 1) / 2


def sample_rows(tokens: int, count: int) -> Tensor:
    """`min(count, tokens)` different raster tokens spread evenly over `0..tokens-1`.

    Returns:
        int64 `[rows]`, ascending; the same for the same arguments.
    """
    if count < 1:
        raise ValueError(f"expected at least 1 sampled row, came {count}; 64 to 256 are usual")
    if count >= tokens:
        return torch.arange(tokens)
    chosen: dict[int, None] = {}
    step = 0
    while len(chosen) < count:
        chosen[int(((step + 0.5) * GOLDEN % 1) * tokens)] = None
        step += 1
    return torch.tensor(sorted(chosen))


def row_logits(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Logits of the sampled rows, float32 `[batch, heads, rows, tokens]`.

    Args:
        query, key: `[batch, tokens, heads, head_dim]`, any float dtype, after RoPE, raster order.
        rows: int64 `[rows]`, raster tokens.
        scale: of the scores; `head_dim ** -0.5` if not given.
        valid: bool `[batch, tokens]`; keys that are padding get `-inf`.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    picked = query[:, rows].permute(0, 2, 1, 3).float() * factor
    scores = picked @ key.permute(0, 2, 3, 1).float()
    if valid is not None:
        scores.masked_fill_(~valid[:, None, None, :], -math.inf)
    return scores


def row_weights(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """`exp(S - max S)` of the logits S of the sampled rows; every candidate shares it.

    Returns:
        float32 `[batch, heads, rows, tokens]`, not normalized: the largest of a row is 1. Padding
        has weight 0.
    """
    scores = row_logits(query, key, rows, scale=scale, valid=valid)
    return scores.sub_(scores.amax(-1, keepdim=True)).exp_()


def valid_tokens(grid: TokenGrid) -> Tensor | None:
    """Which tokens of each sample are not padding: bool `[batch, tokens]`; `None` if all are."""
    return None if grid.valid_text is None else grid.real(len(grid.valid_text))

"""Column ranking: the key blocks that draw most attention of a head, most first.

Sparse-vDiT (arXiv 2506.03065, section 3) has heads whose maps are vertical stripes, and does not
say how the stripes are chosen. Here they are the key blocks of the largest calibrated mass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Columns
from dit_sparse.kernels.rows import row_weights
from dit_sparse.search.space import LADDER

CHUNK_BYTES = 2**28
"""Attention weights held at a time."""


def column_counts(grid: TokenGrid, block: int) -> tuple[int, ...]:
    """How many key blocks the candidates of columns keep: one count per density of the ladder."""
    blocks = math.ceil(grid.video / block)
    counts = dict.fromkeys(max(1, round(density * blocks)) for density in LADDER)
    return tuple(count for count in counts if count < blocks)


def column_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    grid: TokenGrid,
    block: int,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention that each block of video keys draws from the sampled video rows.

    Args:
        query, key: `[batch, tokens, heads, head_dim]`, raster order.
        rows: int64 `[rows]`, raster tokens.
        grid: of the call.
        block: tokens of a key block, counted from the first video token.
        valid: bool `[batch, tokens]`, false for padding.

    Returns:
        float32 `[heads, key blocks]`, the mean over rows and samples; at most 1 in sum.
    """
    video = slice(grid.text_before, grid.text_before + grid.video)
    rows = rows[(rows >= video.start) & (rows < video.stop)]
    batch, tokens, heads, _ = query.shape
    step = max(1, CHUNK_BYTES // (4 * batch * heads * tokens))
    mass = torch.zeros(heads, tokens, device=query.device)
    for part in rows.split(step):
        weights = row_weights(query, key, part, valid=valid)
        mass += (weights / weights.sum(-1, keepdim=True)).sum((0, 2))
    blocks = torch.arange(grid.video, device=query.device) // block
    sums = torch.zeros(heads, int(blocks[-1]) + 1, device=query.device)
    return sums.index_add_(1, blocks, mass[:, video]) / max(1, batch * len(rows))


def columns(mass: Tensor, count: int, grid: TokenGrid, block: int) -> Columns:
    """The `count` key blocks of the largest `mass`, float `[key blocks]`; ties to the first."""
    ranking = mass.argsort(descending=True, stable=True)
    return Columns(tuple(sorted(ranking[:count].tolist())), block, grid.shape)

"""Column mass: which key blocks draw most attention of a head.

Sparse-vDiT (arXiv 2506.03065, section 3) has heads whose maps are vertical stripes, and does not
say how the stripes are chosen. Here they are the key blocks of the largest mass on sampled rows.
"""

import torch
from torch import Tensor

from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.definition import is_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.rows import row_weights

CHUNK_BYTES = 2**28
"""Attention weights held at a time."""


def column_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    grid: TokenGrid,
    block: int,
    *,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Attention that each block of video keys draws from the video tokens among `rows`.

    Args:
        query, key: `[batch, tokens, heads, head_dim]`, raster order.
        rows: int64 `[rows]`, raster tokens.
        grid: of the call.
        block: tokens of a key block, counted from the first video token.
        scale: of the logits, defaults to `head_dim ** -0.5`.
        valid: bool `[batch, tokens]`, false for padding.

    Returns:
        float32 `[heads, key blocks]`, the mean over rows and samples; at most 1 in sum.
    """
    rows = rows[~is_text(grid, rows)]
    batch, tokens, heads, _ = query.shape
    step = max(1, CHUNK_BYTES // (4 * batch * heads * tokens))
    mass = torch.zeros(heads, tokens, device=query.device)
    for part in rows.split(step):
        weights = row_weights(query, key, part, scale=scale, valid=valid)
        mass += (weights / weights.sum(-1, keepdim=True)).sum((0, 2))
    video = mass[:, grid.text_before : grid.text_before + grid.video]
    blocks = torch.arange(grid.video, device=query.device) // block
    sums = torch.zeros(heads, -(-grid.video // block), device=query.device)
    return sums.index_add_(1, blocks, video) / max(1, batch * len(rows))


def largest(mass: Tensor, count: int, grid: TokenGrid, block: int) -> Columns:
    """The `count` key blocks of the largest `mass`, float `[key blocks]`; ties to the first."""
    ranking = mass.argsort(descending=True, stable=True)
    return Columns(tuple(sorted(ranking[:count].tolist())), block, grid.shape)

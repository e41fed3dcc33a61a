"""Stripes: the key blocks that draw most of a head's attention, found while denoising.

mean over sampled rows of their attention to each block of keys -> the largest -> Columns
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.definition import Definition, is_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster
from dit_sparse.kernels.rows import row_weights

CHUNK_BYTES = 2**28
"""Attention weights held at a time."""


@dataclass(frozen=True, slots=True)
class Stripes(Definition):
    """The vertical stripes of Sparse-vDiT (arXiv 2506.03065), one of the patterns of a `Choice`.

    The paper does not publish how it picks the columns. Here they are the key blocks of the
    largest attention mass on rows that the choice does not judge by.

    Attributes:
        density: share of the blocks of video keys, one at least.
    """

    kind: ClassVar[str] = "stripes"
    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    @property
    def order(self) -> TokenOrder:
        return raster()

    def refusal(self, grid: TokenGrid) -> str | None:
        return (
            f"the columns of {self} are known only while denoising, so it has no pairs on grid "
            f"{grid}; give it as one of the patterns of a choice, or take columns"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        raise ValueError(self.refusal(grid))

    def count(self, grid: TokenGrid, block: int) -> int:
        """How many blocks of `block` video keys they are."""
        return max(1, round(self.density * -(-grid.video // block)))

    def first(self, grid: TokenGrid, block: int) -> Columns:
        """As many columns as there will be, somewhere: what they cost."""
        return Columns(tuple(range(self.count(grid, block))), block, grid.shape)

    def of_mass(self, mass: Tensor, grid: TokenGrid, block: int) -> Columns:
        """The columns of the largest `mass`, float `[key blocks]`; ties to the first."""
        largest = mass.argsort(descending=True, stable=True)[: self.count(grid, block)]
        return Columns(tuple(sorted(largest.tolist())), block, grid.shape)

    def __str__(self) -> str:
        return f"stripes {self.density:g}"


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

"""Sample: a few rows of a block of queries that stand for all of them.

    row i of a block of n tokens = floor(n * frac(i * golden ratio))

Every n-th row would follow the rows of a token tile and see one column of it only.
"""

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.tiling import tiling

_GOLDEN = (5**0.5 - 1) / 2


def sampled_rows(offsets: Tensor, rows: int) -> Tensor:
    """Positions of at most `rows` different rows of each block between `offsets`, int64
    `[blocks, rows]`, -1 for those that a block does not have. A block of at most `rows` tokens
    is taken whole."""
    return sampled(offsets[:-1], offsets.diff(), rows)


def sampled(first: Tensor, sizes: Tensor, rows: int) -> Tensor:
    """The same of blocks of `sizes` rows that start at `first`, int64 `[blocks]` each."""
    if not 1 <= rows <= 64:
        raise ValueError(f"rows must be in 1..64, got {rows}; None takes them all")
    sizes = sizes[:, None]
    number = torch.arange(rows)
    within = (sizes * (number * _GOLDEN % 1)).long()
    within = torch.where(sizes <= rows, number, within)
    again = (within[:, :, None] == within[:, None, :]).tril(-1).any(-1)
    return torch.where((number < sizes) & ~again, first[:, None] + within, -1)


def segments(blocks: BlockIndices, rows: int | None, size: int) -> tuple[Tensor, Tensor]:
    """The queries that stand for every block of queries: raster tokens, -1 for none, int64
    `[segments, width]`, and the block of each segment, ascending.

    `width` is a power of two. All rows (`None`) take as many segments of `size` as they need;
    sampled ones take one segment a block.
    """
    if rows is None:
        runs, within = tiling(blocks.query_offsets, size), torch.arange(size)
        place = (runs.first[:, None] + within).where(within < runs.count[:, None], -1)
        block = runs.block
    else:
        place = sampled_rows(blocks.query_offsets, rows)
        width = 1 << (rows - 1).bit_length()
        place = torch.nn.functional.pad(place, (0, width - rows), value=-1)
        block = torch.arange(len(place))
    return blocks.permutation[place.clamp_min(0)].where(place >= 0, -1), block

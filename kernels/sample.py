"""Sample: a few rows of a block of queries that stand for all of them.

    row i of a block of n tokens = floor(n * frac(i * golden ratio))

Every n-th row would follow the rows of a token tile and see one column of it only.
"""

import torch
from torch import Tensor

_GOLDEN = (5**0.5 - 1) / 2


def sampled_rows(offsets: Tensor, rows: int) -> Tensor:
    """Positions of at most `rows` different rows of each block between `offsets`, int64
    `[blocks, rows]`, -1 for those that a block does not have. A block of at most `rows` tokens
    is taken whole."""
    if not 1 <= rows <= 64:
        raise ValueError(f"rows must be in 1..64, got {rows}; None takes them all")
    sizes = offsets.diff()[:, None]
    number = torch.arange(rows)
    within = (sizes * (number * _GOLDEN % 1)).long()
    within = torch.where(sizes <= rows, number, within)
    again = (within[:, :, None] == within[:, None, :]).tril(-1).any(-1)
    return torch.where((number < sizes) & ~again, offsets[:-1, None] + within, -1)

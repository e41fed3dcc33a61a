"""Tiling: blocks of tokens cut into the tiles that a kernel takes at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid


@dataclass(frozen=True, slots=True)
class Tiling:
    """Runs of positions, int64: the first, their number, and the block that each lies in."""

    first: Tensor
    count: Tensor
    block: Tensor

    def __len__(self) -> int:
        return len(self.first)


def tiling(offsets: Tensor, size: int) -> Tiling:
    """The blocks between `offsets`, cut into runs of at most `size`."""
    lengths = offsets.diff()
    block, within = ragged((lengths + size - 1) // size)
    first = offsets[block] + within * size
    return Tiling(first, (offsets[block + 1] - first).clamp_max(size), block)


def ragged(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For rows of `counts` items each: the row of every item, and its place in the row."""
    row = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    place = torch.arange(len(row), device=counts.device)
    return row, place - (counts.cumsum(0) - counts)[row]


def block_of(offsets: Tensor) -> Tensor:
    """The block of each position of the sequence that is cut at `offsets`, int64."""
    return ragged(offsets.diff())[0]


def real_tokens(grid: TokenGrid, tokens: Tensor, runs: Tiling) -> Tensor:
    """How many of the raster `tokens` of each run are not padded text, int64 `[batch or 1, runs]`.

    Text is in raster order and its padding is its end, so they are the first ones.
    """
    if grid.valid_text is None:
        return runs.count[None]
    real = grid.real(len(grid.valid_text))[:, tokens].to(runs.first.device)
    before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
    return before[:, runs.first + runs.count] - before[:, runs.first]

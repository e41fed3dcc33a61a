"""Shard: the tokens of a grid that a tensor holds, where it does not hold all of them.

    a rank of context parallelism       some of the queries, all keys; or keys in turn, and `merge`
    attention of video to text alone    queries of the video, keys of the text

Where tokens stand, and so what a pattern keeps of them, does not depend on who holds them.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid


@dataclass(frozen=True, slots=True)
class Shard:
    """Runs `(first, stop)` of raster tokens, ascending and apart; a tensor of them has a row for
    each, in raster order.

    >>> Shard(((0, 3), (8, 10))).tokens().tolist()
    [0, 1, 2, 8, 9]
    """

    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        full = all(0 <= first < stop for first, stop in self.runs)
        apart = all(left[1] <= right[0] for left, right in itertools.pairwise(self.runs))
        if not self.runs or not full or not apart:
            raise ValueError(
                "a shard needs runs (first, stop) of raster tokens that hold at least one token, "
                f"ascending and apart, got {self.runs}"
            )

    @property
    def count(self) -> int:
        """How many tokens it holds."""
        return sum(stop - first for first, stop in self.runs)

    def tokens(self) -> Tensor:
        """Raster token of each row, int64 `[rows]`."""
        return torch.cat([torch.arange(*run) for run in self.runs])

    def refusal(self, grid: TokenGrid) -> str | None:
        """Why it is no shard of `grid`, or `None`."""
        if self.runs[-1][1] > grid.tokens:
            return f"shard {self} reaches past grid {grid} of {grid.tokens} tokens"
        return None

    def __str__(self) -> str:
        return ", ".join(f"{first}..{stop - 1}" for first, stop in self.runs)


def raster_tokens(shard: Shard | None, rows: Tensor) -> Tensor:
    """Raster token of each of `rows` of a tensor that holds `shard`, or if that is `None` all
    tokens of the grid; int64."""
    return rows.long() if shard is None else shard.tokens()[rows.long()]

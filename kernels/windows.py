"""Windows: a pattern as intervals, the form in which kernels decide the pairs of a partial block.

    a pair is kept  <=>  on every axis:  0 <= place[key] - low[query] < size[query]

A band is one interval, a neighborhood three. Kernels look only at pairs of video tokens so: blocks
with text are listed whole. On each axis, queries at the same place have the same window; blocks
are counted much faster where that holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_AXES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """`low` and `size` of every query, `place` of every key: int32 `[axes, tokens]` each, in
    raster order; at most `MOST_AXES` axes. What they hold for text tokens means nothing.
    """

    low: Tensor
    size: Tensor
    place: Tensor

    def pairs(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each query keeps each key, as `Pattern.pairs` says for video tokens."""
        offset = self.place[:, keys] - self.low[:, queries]
        return ((offset >= 0) & (offset < self.size[:, queries])).all(0)

    def of(self, queries: Tensor, keys: Tensor) -> "Windows":
        """Those of some queries and keys (raster tokens, int64 `[n]`, `[m]`), in that order."""
        low, size = (table.index_select(1, queries) for table in (self.low, self.size))
        return Windows(low, size, self.place.index_select(1, keys))

    def to(self, device: torch.device) -> "Windows":
        """The same on another device."""
        return Windows(self.low.to(device), self.size.to(device), self.place.to(device))


def windows(axes: list[tuple[Tensor, Tensor | int, Tensor]]) -> Windows:
    """Windows from `(low, size, place)` of each axis, integers of any dtype, `[tokens]` each."""
    low, size, place = (
        torch.stack([torch.as_tensor(axis[part]).expand(axis[2].shape) for axis in axes])
        for part in range(3)
    )
    return Windows(*(part.to(torch.int32).contiguous() for part in (low, size, place)))


def everything(tokens: int) -> Windows:
    """No axis, so that every pair is kept."""
    none = torch.empty(0, tokens, dtype=torch.int32)
    return Windows(none, none, none)

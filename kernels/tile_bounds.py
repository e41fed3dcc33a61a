"""Tile bounds: what the windows of a pattern say of a whole tile of pairs at once.

    every pair is kept  <=  on every axis: largest low <= least place, largest place < least end
    no pair is kept     <=  on some axis:  largest place < least low, or largest end <= least place

A block that a pattern keeps in part is cut into smaller tiles for a kernel: many of those are kept
as a whole or not at all, and need no mask or no visit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.tiling import Tiling
from dit_sparse.kernels.windows import Windows


@dataclass(frozen=True, slots=True)
class TileBounds:
    """The least and largest of windows' beginnings and ends in tiles of queries, and of places in
    tiles of keys: integers `[2, axes, tiles]`."""

    low: Tensor
    end: Tensor
    place: Tensor

    def whole(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether all pairs of tiles are kept, bool; `False` also where that is not known."""
        after = self.low[1][:, queries] <= self.place[0][:, keys]
        before = self.place[1][:, keys] < self.end[0][:, queries]
        return (after & before).all(0)

    def empty(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether no pair of tiles is kept, bool; `False` also where that is not known."""
        before = self.place[1][:, keys] < self.low[0][:, queries]
        after = self.end[1][:, queries] <= self.place[0][:, keys]
        return (before | after).any(0)


def tile_bounds(windows: Windows, queries: Tiling, keys: Tiling) -> TileBounds:
    """Bounds of `windows`, whose queries and keys are in the order that the tilings cut."""
    low = windows.low.long()
    return TileBounds(
        _extremes(low, queries),
        _extremes(low + windows.size, queries),
        _extremes(windows.place.long(), keys),
    )


def _extremes(table: Tensor, tiles: Tiling) -> Tensor:
    number = torch.arange(len(tiles), device=table.device)
    tile = number.repeat_interleave(tiles.count).expand_as(table)
    empty = table.new_zeros(len(table), len(tiles))
    least = empty.scatter_reduce(1, tile, table, "amin", include_self=False)
    return torch.stack([least, empty.scatter_reduce(1, tile, table, "amax", include_self=False)])

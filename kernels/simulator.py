"""Simulation: how much faster a kernel that works in tiles could be, without running it.

    bound = tiles of keys / tiles of keys that the slowest tile of queries visits

as published for generalized neighborhood attention (arXiv 2504.16922, section 4); `mean_bound` has
the average tile of queries in place of the slowest. For a neighborhood both are products over
the axes, so that no grid is too large; other patterns are counted tile by tile.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.counts import cut, pair_counts
from dit_sparse.kernels.definition import Triple
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import tile
from dit_sparse.kernels.pattern import Neighborhood, Pattern


@dataclass(frozen=True, slots=True)
class Simulation:
    """Tiles of keys: `visited` by the slowest tile of queries, by the average one, and in `total`.

    `perfect`: no visited tile needs a mask. With dilation, tiles lie within one dilation group.
    """

    visited: int
    mean_visited: float
    total: int
    query_tiles: int
    perfect: bool

    @property
    def bound(self) -> float:
        """Largest possible speed-up over dense attention if the slowest tile decides."""
        return self.total / self.visited if self.visited else math.inf

    @property
    def mean_bound(self) -> float:
        """The same if the work is spread evenly."""
        return self.total / self.mean_visited if self.mean_visited else math.inf


def simulate(pattern: Pattern, grid: TokenGrid, q_tile: Triple, kv_tile: Triple) -> Simulation:
    """`pattern` on the video tokens of `grid`, in boxes `(frames, height, width)` of queries and
    of keys, which are shorter where the grid ends.

    Raises:
        ValueError: the pattern refuses the grid.

    >>> simulate(
    ...     Neighborhood((18, 24, 24), (16, 8, 8)), TokenGrid(30, 48, 80), (4, 8, 8), (2, 8, 8)
    ... ).visited
    81
    """
    reason = pattern.refusal(grid)
    if reason is not None:
        raise ValueError(reason)
    grid = TokenGrid(*grid.shape)
    if isinstance(pattern, Neighborhood):
        axes = [
            _axis(pattern, grid, *axis) for axis in zip(range(3), q_tile, kv_tile, strict=True)
        ]
        return Simulation(
            visited=math.prod(axis.visited for axis in axes),
            mean_visited=math.prod(axis.mean_visited for axis in axes),
            total=math.prod(axis.total for axis in axes),
            query_tiles=math.prod(axis.query_tiles for axis in axes),
            perfect=all(axis.perfect for axis in axes),
        )
    queries, keys = (cut(grid, tile(*side), math.prod(side)) for side in (q_tile, kv_tile))
    sizes, columns = queries.offsets.diff(), keys.offsets.diff()
    slowest, visits, perfect = 0, 0, True
    for rows, pairs in pair_counts(pattern, grid, queries, keys):
        visited = (pairs > 0).sum(1)
        slowest, visits = max(slowest, int(visited.max())), visits + int(visited.sum())
        perfect &= bool(((pairs == 0) | (pairs == sizes[rows, None] * columns)).all())
    return Simulation(slowest, visits / len(sizes), len(columns), len(sizes), perfect)


def simulate_blocks(blocks: BlockIndices) -> Simulation:
    """The blocks that the heads of `blocks` visit, all rows of all heads together."""
    visited = blocks.row_pointer.diff()
    return Simulation(
        visited=int(visited.max()),
        mean_visited=float(visited.double().mean()),
        total=blocks.key_blocks,
        query_tiles=blocks.query_blocks,
        perfect=bool((blocks.tag == WHOLE).all()),
    )


def useful_strides(
    pattern: Neighborhood, grid: TokenGrid, q_tile: Triple, kv_tile: Triple
) -> list[tuple[Neighborhood, Simulation]]:
    """`pattern` with every stride that is worth its coarseness, by rising bound.

    A stride is dropped if a smaller one, on any axes, has as good a bound.
    """
    axes = [
        list(_useful(pattern, grid, *axis)) for axis in zip(range(3), q_tile, kv_tile, strict=True)
    ]
    found = [replace(pattern, stride=(t, h, w)) for t, h, w in product(*axes)]
    simulated = [(each, simulate(each, grid, q_tile, kv_tile)) for each in found]
    return sorted(simulated, key=lambda pair: (pair[1].bound, pair[0].stride))


def _useful(
    pattern: Neighborhood, grid: TokenGrid, axis: int, q_tile: int, kv_tile: int
) -> Iterator[int]:
    """The strides of one axis that visit fewer tiles than every smaller one."""
    fewest = math.inf
    for stride in range(1, min(pattern.window[axis], grid.shape[axis]) + 1):
        strides = [1, 1, 1]
        strides[axis] = stride
        strided = replace(pattern, stride=(strides[0], strides[1], strides[2]))
        visited = _axis(strided, grid, axis, q_tile, kv_tile).visited
        if visited < fewest:
            fewest = visited
            yield stride


def _axis(
    pattern: Neighborhood, grid: TokenGrid, axis: int, q_tile: int, kv_tile: int
) -> Simulation:
    """One axis. Its windows overlap or touch, so a tile visits a run of tiles."""
    low, size, _ = pattern.axis_windows(grid, axis)
    length, dilation = grid.shape[axis], pattern.dilation[axis]
    visits, total, perfect = [], 0, True
    for group in range(dilation):
        starts = low[group::dilation].tolist()
        stops = (low + size)[group::dilation].tolist()
        first = sum(len(range(before, length, dilation)) for before in range(group))
        total += -(-len(starts) // kv_tile)
        for query in range(0, len(starts), q_tile):
            start, stop = starts[query : query + q_tile], stops[query : query + q_tile]
            tiles = range((min(start) - first) // kv_tile, -(-(max(stop) - first) // kv_tile))
            visits.append(len(tiles))
            whole = max(start) - first <= tiles.start * kv_tile and (
                min(stop) - first >= min(tiles.stop * kv_tile, len(starts))
            )
            perfect &= whole
    return Simulation(max(visits), sum(visits) / len(visits), total, len(visits), perfect)

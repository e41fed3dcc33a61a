"""Candidate: a pattern that a head may run and what becomes of the rest, with what it costs.

The space is a ladder of densities for every kind of pattern: bands in both orders, boxes of
several proportions, blocks found while denoising, and the two ends, full and skip; each with each
remainder. Columns are chosen by looking at a head. Schedules are the
third factor, see `course.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

import torch

from dit_sparse.kernels.blocks import ABSENT, BlockIndices, block_indices, from_tags
from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.ranking import Ranking
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.kernels.score import BlockScore, Mass
from dit_sparse.kernels.scored import OrderName, Scored
from dit_sparse.kernels.scored_blocks import geometry
from dit_sparse.kernels.select import TopRow
from dit_sparse.kernels.selection import select_blocks

LADDER = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7)
"""Densities at which every kind of pattern is tried."""

REMAINDERS: tuple[Remainder, ...] = (Drop(), Pooled(), Rescale(), Complement())
"""What is tried with every pattern."""

KINDS = (
    *(pattern.kind for pattern in (Full, Skip, Band, Neighborhood, Columns, Scored)),
    *(remainder.kind for remainder in REMAINDERS),
)
"""Names by which a search is narrowed."""

SHAPES = {
    "frames": (1.0, 0.0, 0.0),
    "tube": (0.0, 0.5, 0.5),
    "cube": (1 / 3, 1 / 3, 1 / 3),
    "slab": (0.5, 0.25, 0.25),
    "rows": (0.0, 1.0, 0.0),
    "columns": (0.0, 0.0, 1.0),
}
"""Proportions of boxes: a box of density d covers the share d ** exponent of each axis."""

STRIDES = (1, 2)
"""Tiles by which a box moves: by one it is better centered, by two it fits an even number."""

AXIS_ORDERS: tuple[Literal["raster", "pixel_major"], ...] = ("raster", "pixel_major")


FOUND_ORDERS: tuple[OrderName, ...] = ("raster", "gilbert")
"""Orders in which blocks are found."""


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried on every head: each pattern with each remainder.

    Args:
        patterns: the same for all heads, full first.
        column_counts: blocks of keys in the columns that every head has for itself.
        remainders: dropping first.
    """

    patterns: tuple[Pattern, ...]
    column_counts: tuple[int, ...]
    remainders: tuple[Remainder, ...]

    @property
    def slots(self) -> int:
        """Patterns of a head, its columns last."""
        return len(self.patterns) + len(self.column_counts)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pattern with what becomes of the pairs that it does not keep."""

    pattern: Pattern
    remainder: Remainder = Drop()

    def __str__(self) -> str:
        rest = "" if self.remainder == Drop() else f" with {self.remainder}"
        return f"{self.pattern}{rest}"


def column_counts(grid: TokenGrid, block: int) -> tuple[int, ...]:
    """How many key blocks the candidates of columns keep: one count per density of the ladder."""
    blocks = math.ceil(grid.video / block)
    counts = dict.fromkeys(max(1, round(density * blocks)) for density in LADDER)
    return tuple(count for count in counts if count < blocks)


def patterns(grid: TokenGrid, block: int, kinds: Collection[str] = KINDS) -> tuple[Pattern, ...]:
    """The patterns to try on every head of a layer with this grid; columns are not among them.

    Args:
        grid: of the layer; the valid length of text plays no part.
        block: tokens of a block of queries and of keys.
        kinds: of `KINDS`, those that may be tried; full always is.

    Returns:
        Different patterns, full first; none but full computes as much as full.
    """
    plain = replace(grid, valid_text=None)
    bands = [Band.of_density(d, plain, axis) for axis in AXIS_ORDERS for d in LADDER]
    found = [Scored(Mass(), TopRow(d), order) for order in FOUND_ORDERS for d in LADDER]
    everything = dict.fromkeys((Skip(), *bands, *_neighborhoods(plain), *found))
    allowed = [pattern for pattern in everything if pattern.kind in kinds]
    dense = {p: blocks_like(Candidate(p), plain, block).density().block < 1 for p in allowed}
    return (Full(), *(pattern for pattern, below in dense.items() if below))


def remainders(kinds: Collection[str] = KINDS) -> tuple[Remainder, ...]:
    """Those of `REMAINDERS` that may be tried; dropping always is."""
    return tuple(r for r in REMAINDERS if r == Drop() or r.kind in kinds)


def check_kinds(kinds: Collection[str]) -> None:
    """Raise `ValueError` unless all are of `KINDS`."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if isinstance(kinds, str) or unknown:
        raise ValueError(
            f"candidates: expected a list of names of {', '.join(KINDS)}, came "
            f"{kinds if isinstance(kinds, str) else unknown[0]!r}"
        )


def blocks_like(candidate: Candidate, grid: TokenGrid, block: int) -> BlockIndices:
    """A list for one head of as many blocks as `candidate` visits: its own or, where they are
    found while denoising, others."""
    pattern, remainder = candidate.pattern, candidate.remainder
    pooled = remainder.level if isinstance(remainder, Pooled) else 0
    if not isinstance(pattern, Scored):
        return block_indices((pattern,), grid, block_q=block, block_k=block, pooled=pooled)
    cut = geometry(pattern.order, grid, 1, block)
    tags = select_blocks(
        pattern.select, Ranking(torch.ones(1, cut.query_blocks, cut.key_blocks)), cut
    )
    tags = tags.masked_fill(tags == ABSENT, pooled) if pooled else tags
    return from_tags(tags, grid, pattern.order, block, block)


def search_cost(pattern: Pattern, block: int) -> float:
    """FLOPs of finding the blocks of `pattern` once, in those of dense attention."""
    if not isinstance(pattern, Scored):
        return 0.0
    # Clusters are not searched: what finding them takes grows with the grid.
    assert isinstance(pattern.score, BlockScore)
    return pattern.score.cost(block)


def _neighborhoods(grid: TokenGrid) -> list[Neighborhood]:
    """Boxes near every density of the ladder, in every proportion.

    Windows move by whole tiles and are as large as the tiles they touch allow, since a smaller
    window would cost the same (Sliding Tile Attention, arXiv 2502.04507, section 3).
    """
    tile = Neighborhood((1, 1, 1)).order.tile or (1, 1, 1)
    boxes = []
    for tiles, exponents, density in product(STRIDES, SHAPES.values(), LADDER):
        frames, height, width = (
            min(
                _steps(length, side, tiles),
                key=lambda step: abs(math.log(step.share / density**exponent)),
            )
            for length, side, exponent in zip(grid.shape, tile, exponents, strict=True)
        )
        window = frames.window, height.window, width.window
        if window != grid.shape:
            boxes.append(Neighborhood(window, (frames.stride, height.stride, width.stride)))
    return boxes


@dataclass(frozen=True, slots=True)
class _Step:
    """A window and stride on one axis, and the share of the axis that their tiles cover."""

    share: float
    window: int
    stride: int


@cache
def _steps(length: int, side: int, tiles: int) -> tuple[_Step, ...]:
    """The windows worth trying on an axis of `length` tokens in tiles of `side` when they move by
    `tiles` tiles: the largest for every share of the axis, unless one that touches less is."""
    strides = {window: min(window, tiles * side) for window in range(1, length)} | {length: 1}
    steps = [_Step(_touched(length, side, *step), *step) for step in strides.items()]
    kept: list[_Step] = []
    for step in sorted(steps, key=lambda step: (step.share, -step.window)):
        if not kept or step.window > kept[-1].window:
            kept.append(step)
    return tuple(kept)


def _touched(length: int, side: int, window: int, stride: int) -> float:
    """Share of the pairs of an axis in the tiles that a window touches."""
    mask = Neighborhood((1, 1, window), (1, 1, stride)).mask(TokenGrid(1, 1, length))
    blocks = -(-length // side)
    index = torch.arange(length) // side
    sizes = index.bincount(minlength=blocks).double()
    pairs = torch.zeros(blocks, length, dtype=torch.double).index_add_(0, index, mask.double())
    tiles = torch.zeros(blocks, blocks, dtype=torch.double).index_add_(1, index, pairs)
    return (sizes @ (tiles > 0).double() @ sizes).item() / length**2

"""Candidate: a pattern that a head may run, with what it costs.

The space is a ladder of densities for every kind of pattern: bands in both orders, boxes of
several proportions, and the two ends, full and skip. Columns are chosen by looking at a head and
live in `columns.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal

import torch

from dit_sparse.kernels.blocks import block_density
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Pattern, Skip

LADDER = (0.05, 0.1, 0.2, 0.3, 0.45, 0.7)
"""Densities at which every kind of pattern is tried."""

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


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pattern and its cost, the block density that a kernel would compute."""

    pattern: Pattern
    cost: float


def candidates(grid: TokenGrid, block: int) -> tuple[Candidate, ...]:
    """The patterns to try on every head of a layer with this grid; columns are not among them.

    Args:
        grid: of the layer; the valid length of text plays no part.
        block: tokens of a block of queries and of keys.

    Returns:
        Different patterns, full and skip first; none but full costs as much as full.
    """
    plain = replace(grid, valid_text=None)
    bands = (Band.of_density(d, plain, axis) for axis in AXIS_ORDERS for d in LADDER)
    patterns = dict.fromkeys((Full(), Skip(), *bands, *_neighborhoods(plain)))
    priced = [Candidate(pattern, block_density(pattern, plain, block)) for pattern in patterns]
    return tuple(c for c in priced if c.cost < 1 or c.pattern == Full())


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

"""Scaling: a pattern carried over to another token grid, or to another density."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dit_sparse.kernels.blocks import block_density
from dit_sparse.kernels.definition import Triple
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Choice,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Skip,
    Stripes,
)
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import at_density as select_at_density

_HALVINGS = 24


def at_grid(pattern: Pattern, source: TokenGrid, grid: TokenGrid) -> Pattern:
    """The pattern that covers on `grid` the share of every axis that `pattern` covers on
    `source`: windows and strides of each axis, half widths of bands. Clusters keep their sizes,
    and so their share of the cost. Others are what they are.

    >>> str(at_grid(Neighborhood((18, 24, 24)), TokenGrid(30, 48, 80), TokenGrid(15, 16, 16)))
    'neighborhood 9x8x5'
    """
    match pattern:
        case Band():
            spans = [
                g.height * g.width if pattern.axis_order == "in_frame" else g.video
                for g in (source, grid)
            ]
            return replace(pattern, half_width=round(pattern.half_width * spans[1] / spans[0]))
        case Neighborhood():
            factors = [new / old for old, new in zip(source.shape, grid.shape, strict=True)]
            window = _scaled(pattern.window, factors, grid.shape)
            return replace(pattern, window=window, stride=_scaled(pattern.stride, factors, window))
        case AnyOf() | Choice():
            return replace(
                pattern, patterns=tuple(at_grid(part, source, grid) for part in pattern.patterns)
            )
        case Scored(score=Clustered() as score):
            share = grid.video / source.video
            queries, keys = (max(1, round(n * share)) for n in (score.queries, score.keys))
            return replace(pattern, score=replace(score, queries=queries, keys=keys))
        case _:
            return pattern


def at_density(pattern: Pattern, density: float, grid: TokenGrid, block: int) -> Pattern:
    """The pattern of the same kind whose block density on `grid` is nearest to `density`.

    Boxes keep their proportions, bands their order; of several patterns the first is scaled. A
    scored pattern keeps its score and gets a share of the blocks.

    Raises:
        ValueError: the kind has no size, or the density is out of range.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")
    if isinstance(pattern, Scored):
        return replace(pattern, select=select_at_density(pattern.select, density))
    if isinstance(pattern, Choice):
        sized = (
            p if p == Skip() else at_density(p, density, grid, block) for p in pattern.patterns
        )
        return replace(pattern, patterns=tuple(sized))
    if density == 1:
        return Full()
    if isinstance(pattern, Stripes):
        return replace(pattern, density=density)
    family = _family(pattern, grid)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if block_density(family(middle), grid, block) < density:
            low = middle
        else:
            high = middle
    ends = family(low), family(high)
    return min(ends, key=lambda end: abs(block_density(end, grid, block) - density))


def _family(pattern: Pattern, grid: TokenGrid) -> Callable[[float], Pattern]:
    """Patterns of one kind by a size in [0, 1], the density rising with it."""
    match pattern:
        case Band():
            return lambda size: replace(pattern, half_width=round(size * grid.video))
        case Neighborhood():
            # The largest factor covers the whole grid.
            most = max(n / w for n, w in zip(grid.shape, pattern.window, strict=True))

            def box(size: float) -> Neighborhood:
                window = _scaled(pattern.window, (size * most,) * 3, grid.shape)
                stride = _scaled(pattern.stride, (1.0, 1.0, 1.0), window)
                return replace(pattern, window=window, stride=stride)

            return box
        case Radial(variant="repo"):
            return lambda size: replace(pattern, decay=max(8 * size, 1e-6))
        case AnyOf():
            first = _family(pattern.patterns[0], grid)
            rest = pattern.patterns[1:]
            return lambda size: replace(pattern, patterns=(first(size), *rest))
        case _:
            raise ValueError(f"{pattern} has no size by which its density could be set")


def _scaled(sizes: Triple, factors: Sequence[float], most: Triple) -> Triple:
    """`sizes` times `factors`, rounded, in 1..`most`."""
    first, second, third = (
        max(1, min(round(size * factor), limit))
        for size, factor, limit in zip(sizes, factors, most, strict=True)
    )
    return first, second, third

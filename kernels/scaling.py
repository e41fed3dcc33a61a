"""Scaling: a pattern carried over to another token grid, or to another density."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, slots=True)
class Growth:
    """Along which axes a pattern grows with the token grid; along the others it keeps its tokens.

    By the elastic rules of MoA (arXiv 2406.14909) a head looks as far as `alpha + beta * length`.
    Here an axis has only one of the two: `beta`, and so a share, if the pattern grows along it,
    or `alpha`, a number of tokens.

    Args:
        frames: whether it grows with the number of frames.
        space: whether it grows with height and width.
    """

    frames: bool = True
    space: bool = True

    def __str__(self) -> str:
        if self.frames == self.space:
            return "share" if self.frames else "window"
        kept, grown = ("space", "frames") if self.frames else ("frames", "space")
        return f"share of {grown}, window of {kept}"


def at_grid(
    pattern: Pattern, source: TokenGrid, grid: TokenGrid, growth: Growth = Growth()
) -> Pattern:
    """The pattern that covers on `grid` what `pattern` covers on `source`: of the axes that it
    grows along the same share, of the others as many tokens, or all if there are fewer. That goes
    for windows and strides of each axis and half widths of bands. Clusters keep their sizes, and
    so their share of the cost. Others are what they are.

    >>> str(at_grid(Neighborhood((18, 24, 24)), TokenGrid(30, 48, 80), TokenGrid(15, 16, 16)))
    'neighborhood 9x8x5'
    >>> at_grid(Band(64), TokenGrid(5, 8, 8), TokenGrid(9, 16, 16), Growth(frames=False))
    Band(half_width=256, axis_order='raster')
    """
    grown = (growth.frames, growth.space, growth.space)
    axes = [
        (old, new) if grows else (1, 1)
        for old, new, grows in zip(source.shape, grid.shape, grown, strict=True)
    ]
    match pattern:
        case Band():
            spanned = axes[1:] if pattern.axis_order == "in_frame" else axes
            old, new = map(math.prod, zip(*spanned, strict=True))
            return replace(pattern, half_width=round(pattern.half_width * new / old))
        case Neighborhood():
            factors = [new / old for old, new in axes]
            window = _scaled(pattern.window, factors, grid.shape)
            return replace(pattern, window=window, stride=_scaled(pattern.stride, factors, window))
        case AnyOf() | Choice():
            parts = tuple(at_grid(part, source, grid, growth) for part in pattern.patterns)
            return replace(pattern, patterns=parts)
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

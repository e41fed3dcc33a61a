"""Transfer: a plan carried over to another token grid or number of denoising steps.

What a head looks at spans more tokens where the resolution is higher, and as many frames where
the video is longer. So, where nothing else is known of a head, windows keep their share of height
and width and their number of frames, bands the frames, or the share of a frame, that they reach;
evidence of a second grid can tell more, see `search/elasticity.py`. Blocks found while denoising
keep their share of all. Dense and renewing steps, and phases, keep their share of the generation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Band, Choice, Columns, Neighborhood, Pattern
from dit_sparse.kernels.scaling import Growth, at_grid
from dit_sparse.pipelines.family import Shape
from dit_sparse.pipelines.phase import tally
from dit_sparse.pipelines.plan import Plan

ORIGINS = ("preset", "source", "uniform", "budget")
"""What a plan that was carried over still says of how it came about."""

Sized = Band | Neighborhood | AnyOf
"""Patterns that come out otherwise with another growth."""

Head = tuple[int, str, int]
"""A head in one phase of a plan: number of the phase, layer, number of the head."""


def transferred(
    plan: Plan,
    *,
    grid: Shape | None = None,
    steps: int | None = None,
    growths: Mapping[Head, Growth] | None = None,
) -> Plan:
    """The plan for generations on `grid` (frames, height, width in tokens) or of `steps`.

    The evidence of a search holds for its own grid and stays behind; what it predicted does too.
    How many heads grow how stands in `provenance["growth"]`, those without an entry in `growths`
    under `"usual"`.

    Args:
        plan: to be carried over; it stays as it is.
        grid: frames, height and width in tokens.
        steps: of a generation.
        growths: for heads of which it is known, how their pattern goes to `grid`.

    Raises:
        ValueError: if the plan does not say what it was made for, or a pattern cannot be carried
            over; if there are growths without a grid, or of heads that the plan does not have.
    """
    known = plan.provenance.get("search", plan.provenance).get("steps")
    kept = {key: value for key, value in plan.provenance.items() if key in ORIGINS}
    made = kept | {"transferred": True, "steps": known if steps is None else steps}
    if grid is not None:
        made["growth"] = _growth_shares(plan, growths or {})
        plan = _on_grid(plan, grid, growths or {})
    elif growths is not None:
        raise ValueError("growths say how patterns go to another grid; give the grid too")
    if steps is not None:
        if known is None:
            raise ValueError(
                "the plan does not say for how many steps it was made, so its schedule cannot be "
                "carried over; search a plan, or give the schedule yourself"
            )
        plan = replace(plan, schedule=plan.schedule.scaled(steps / known))
    return replace(plan, provenance=made, evidence={}, timing={})


def carried(
    pattern: Pattern, source: TokenGrid, grid: TokenGrid, growth: Growth | None = None
) -> Pattern:
    """The pattern of one head on `grid`, which it has on `source`; it grows as usual unless a
    `growth` is given.

    Raises:
        ValueError: if the pattern means nothing on another grid.
    """
    match pattern:
        case Columns():
            raise ValueError(
                f"{pattern} lists blocks of keys of grid {source}, which say nothing about grid "
                f"{grid}; search a plan there, or here without candidates of columns"
            )
        case AnyOf() | Choice():
            parts = tuple(carried(part, source, grid, growth) for part in pattern.patterns)
            return replace(pattern, patterns=parts)
        case _:
            return at_grid(pattern, source, grid, growth or usual_growth(pattern, source))


def usual_growth(pattern: Pattern, source: TokenGrid) -> Growth:
    """How a pattern of `source` grows where nothing is known of its head. A window of all frames
    has no number of frames of its own, nor has a band of another order."""
    match pattern:
        case Neighborhood():
            return Growth(frames=pattern.window[0] >= source.frames)
        case Band(axis_order="raster"):
            return Growth(frames=False)
        case _:
            return Growth()


def _on_grid(plan: Plan, shape: Shape, growths: Mapping[Head, Growth]) -> Plan:
    if plan.grid is None:
        raise ValueError(
            "the plan does not say which token grid it was made for, so it cannot be carried "
            "over; it runs at any grid as it is"
        )
    source, grid = TokenGrid(*plan.grid), TokenGrid(*shape)
    first, *later = (
        {
            layer: tuple(
                carried(pattern, source, grid, growths.get((number, layer, head)))
                for head, pattern in enumerate(patterns)
            )
            for layer, patterns in phase.assignment.items()
        }
        for number, phase in enumerate(plan.phases)
    )
    phases = tuple(
        replace(phase, assignment=assignment)
        for phase, assignment in zip(plan.later, later, strict=True)
    )
    return replace(plan, grid=shape, assignment=first, later=phases)


def _growth_shares(plan: Plan, growths: Mapping[Head, Growth]) -> dict[str, float]:
    """How many heads grow how, counted as in `Plan.heads`."""
    sized = {
        (number, layer, head): share
        for number, (phase, share) in enumerate(
            zip(plan.phases, plan.schedule.shares, strict=True)
        )
        for layer, patterns in phase.assignment.items()
        for head, pattern in enumerate(patterns)
        if isinstance(pattern, Sized)
    }
    unknown = growths.keys() - sized.keys()
    if unknown:
        number, layer, head = min(unknown)
        raise ValueError(
            f"growths: expected heads with a pattern that has a size, came head {head} of {layer} "
            f"in phase {number}, which has none; leave it out"
        )
    return tally((str(growths.get(head, "usual")), share) for head, share in sized.items())

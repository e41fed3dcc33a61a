"""Transfer: a plan carried over to another token grid or number of denoising steps.

What a head looks at spans more tokens where the resolution is higher, and as many frames where
the video is longer. So windows keep their share of height and width and their number of frames,
bands the frames, or the share of a frame, that they reach; blocks found while denoising keep
their share of all. Dense and renewing steps, and phases, keep their share of the generation.
"""

from __future__ import annotations

from dataclasses import replace

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Band, Choice, Columns, Neighborhood, Pattern
from dit_sparse.kernels.scaling import at_grid
from dit_sparse.pipelines.family import Shape
from dit_sparse.pipelines.plan import Plan

ORIGINS = ("preset", "source", "uniform", "budget")
"""What a plan that was carried over still says of how it came about."""


def transferred(plan: Plan, *, grid: Shape | None = None, steps: int | None = None) -> Plan:
    """The plan for generations on `grid` (frames, height, width in tokens) or of `steps`.

    The evidence of a search holds for its own grid and stays behind; what it predicted does too.

    Raises:
        ValueError: if the plan does not say what it was made for, or a pattern cannot be carried
            over.
    """
    known = plan.provenance.get("search", plan.provenance).get("steps")
    if grid is not None:
        plan = _on_grid(plan, grid)
    if steps is not None:
        if known is None:
            raise ValueError(
                "the plan does not say for how many steps it was made, so its schedule cannot be "
                "carried over; search a plan, or give the schedule yourself"
            )
        plan = replace(plan, schedule=plan.schedule.scaled(steps / known))
    kept = {key: value for key, value in plan.provenance.items() if key in ORIGINS}
    made = kept | {"transferred": True, "steps": known if steps is None else steps}
    return replace(plan, provenance=made, evidence={}, timing={})


def _on_grid(plan: Plan, shape: Shape) -> Plan:
    if plan.grid is None:
        raise ValueError(
            "the plan does not say which token grid it was made for, so it cannot be carried "
            "over; it runs at any grid as it is"
        )
    source, grid = TokenGrid(*plan.grid), TokenGrid(*shape)

    def carried(assignment: dict[str, tuple[Pattern, ...]]) -> dict[str, tuple[Pattern, ...]]:
        return {
            layer: tuple(_carried(pattern, source, grid) for pattern in patterns)
            for layer, patterns in assignment.items()
        }

    later = tuple(replace(phase, assignment=carried(phase.assignment)) for phase in plan.later)
    return replace(plan, grid=shape, assignment=carried(plan.assignment), later=later)


def _carried(pattern: Pattern, source: TokenGrid, grid: TokenGrid) -> Pattern:
    match pattern:
        case Columns():
            raise ValueError(
                f"{pattern} lists blocks of keys of grid {source}, which say nothing about grid "
                f"{grid}; search a plan there, or here without candidates of columns"
            )
        case AnyOf() | Choice():
            parts = tuple(_carried(part, source, grid) for part in pattern.patterns)
            return replace(pattern, patterns=parts)
        case Neighborhood() if pattern.window[0] < source.frames:
            return at_grid(pattern, replace(source, frames=grid.frames), grid)
        case Band(axis_order="raster"):
            return at_grid(pattern, replace(source, frames=grid.frames), grid)
        case _:
            return at_grid(pattern, source, grid)

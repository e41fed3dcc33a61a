"""Elasticity: along which axes the pattern of a head grows with the token grid, told by a search
on a second one.

MoA (arXiv 2406.14909) has every head look as far as a function of the length says, since some
heads look farther where there is more to see and others do not. It chooses the functions that lose
least at each of a few lengths at equal density. Here the pattern at one grid is given, so it is
asked the other way round: what is the least that keeps its error at the other?
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean

from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import Remainder
from dit_sparse.kernels.scaling import Growth
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.transfer import Head, Sized, carried, usual_growth
from dit_sparse.search.evidence import Evidence

RISE = 1.25
"""A head keeps its error where it errs at most this many times as much: of heads planted with a
known reach, errors read between candidates are off by about a fifth."""

GROWTHS = tuple(Growth(frames, space) for frames in (True, False) for space in (True, False))


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate of one head, and its error."""

    pattern: Pattern
    error: float


@dataclass(frozen=True)
class Errors:
    """What patterns err on the grid of one search, in the phases of one schedule.

    Steps of a phase are weighed as where nothing is measured, and all layers alike, so that two
    searches can be compared.

    Args:
        evidence: of the search.
        schedule: of the plan in question.
        steps: of its generations.
    """

    evidence: Evidence
    schedule: Schedule
    steps: int

    def of(self, head: Head, pattern: Pattern, remainder: Remainder) -> float:
        """The error of `pattern` on the grid of the search, summed over the phase of `head`; `inf`
        if nothing bounds it.

        It is the one that was measured or, for a pattern between the candidates of its kind and
        token order with this remainder, lies between two: the least of those that `pattern`
        contains and the most of those that contain it, with skip and full among them. Between
        these its logarithm falls evenly with the mean share of the axes; toward full, which errs
        nothing, the error itself does. A union errs as the part that errs least.
        """
        if isinstance(pattern, AnyOf):
            return min(self.of(head, part, remainder) for part in pattern.patterns)
        grid = self.evidence.grid
        tried = self._tried(head, remainder)
        same = [each.error for each in tried if each.pattern == pattern]
        if same:
            return same[0]
        kind = _kind(pattern)
        if kind is None or all(_kind(each.pattern) != kind for each in tried):
            return math.inf
        within = [each for each in tried if _contains(pattern, each.pattern, grid)]
        around = [each for each in tried if _contains(each.pattern, pattern, grid)]
        low = min(within, key=lambda each: each.error, default=None)
        # With a remainder full is not tried: nothing would be left for it.
        high = max(around, key=lambda each: each.error, default=Measured(Full(), 0.0))
        return math.inf if low is None else _between(low, high, pattern, grid)

    def _tried(self, head: Head, remainder: Remainder) -> list[Measured]:
        """The candidates of a head with this remainder, but for columns."""
        phase, layer, number = head
        layers, space = self.evidence.layers, self.evidence.space
        if remainder not in space.remainders:
            return []
        row = phase * len(layers) + layers.index(layer)
        own = slice(space.remainders.index(remainder), None, len(space.remainders))
        errors = self._table[row, number, own].tolist()
        return [
            Measured(pattern, error)
            for pattern, error in zip(space.patterns, errors, strict=False)
            if math.isfinite(error)
        ]

    @cached_property
    def _table(self) -> Tensor:
        alike = replace(self.evidence, propagation=None, importance=None)
        return alike.tables(self.schedule, self.steps).error


def growths(plan: Plan, beside: Plan) -> dict[Head, Growth]:
    """Along which axes the heads of a searched plan grow, told by a search on another grid.

    Each head and phase has one pattern, and so one error, at the plan's own grid. It is carried
    over to the grid of `beside` with every growth, and its errors there are read from the evidence
    of `beside`, under the plan's schedule and with the head's remainder; see `Errors.of`. Of the
    growths with which the error is at most `RISE` times that at the plan's grid the head gets the
    one that keeps the least share of the pairs; if there are none, the one of least error. Between
    growths that come to the same pattern there the usual one goes first.

    It is the counterpart of MoA (arXiv 2406.14909), which takes the least error at equal density.
    Where in doubt the larger pattern is taken at the grid of `beside`: one that lies on the same
    side of the plan's grid as the grid that the plan is for errs on the safe side there too.

    Args:
        plan: the one to be carried over.
        beside: of the same model, searched on another grid; what it assigns plays no part.

    Returns:
        Only heads that evidence decides on: those with a band, a box or a union with one, of a
        kind that both searches tried, that are sparse at some step and whose growths do not all
        come to the same at `beside`. The argument `growths` of `transferred`.

    Raises:
        ValueError: if a plan carries no evidence, or the two cannot be compared: other models,
            layers or measures of error, or the same grid.
    """
    here, there = _evidence(plan, "the plan"), _evidence(beside, "the plan beside it")
    _check_comparable(plan, beside, here, there)
    steps = here.sightings.steps
    known = Errors(here, plan.schedule, steps), Errors(there, plan.schedule, steps)
    found = {
        (number, layer, head): _growth((number, layer, head), pattern, remainder, *known)
        for number, phase in enumerate(plan.phases)
        for layer in here.layers
        for head, (pattern, remainder) in enumerate(
            zip(phase.assignment[layer], phase.remainders_of(layer), strict=True)
        )
        if isinstance(pattern, Sized)
    }
    return {head: growth for head, growth in found.items() if growth is not None}


def _growth(
    head: Head, pattern: Sized, remainder: Remainder, here: Errors, there: Errors
) -> Growth | None:
    """See `growths`; `None` if the evidence does not tell."""
    source, grid = here.evidence.grid, there.evidence.grid
    first = pattern.patterns[0] if isinstance(pattern, AnyOf) else pattern
    options: dict[Pattern, Growth] = {}
    for growth in (usual_growth(first, source), *GROWTHS):
        options.setdefault(carried(pattern, source, grid, growth), growth)
    errors = {
        option: there.of(head, option, remainder)
        for option in sorted(options, key=lambda option: _share(option, grid))
    }
    before, least = here.of(head, pattern, remainder), min(errors.values())
    if len(options) < 2 or not 0 < before < math.inf or least == math.inf:
        return None
    keeping = max(RISE * before, least)
    return next(options[option] for option, error in errors.items() if error <= keeping)


def _evidence(plan: Plan, name: str) -> Evidence:
    if not plan.evidence:
        raise ValueError(
            f"{name} carries no evidence of a search, so it does not tell how heads grow; give "
            "plans of search_plan or dit-sparse search that were not carried over themselves"
        )
    return Evidence.of_plan(plan)


def _check_comparable(plan: Plan, beside: Plan, here: Evidence, there: Evidence) -> None:
    for component in sorted(plan.model.keys() | beside.model.keys()):
        if plan.model.get(component) != beside.model.get(component):
            raise ValueError(
                f"the plan beside it is of another model: {component} is "
                f"{beside.model.get(component, 'missing')} there and "
                f"{plan.model.get(component, 'missing')} in the plan; search the same model on "
                "two grids"
            )
    if set(here.layers) != set(there.layers):
        differing = min(set(here.layers) ^ set(there.layers))
        raise ValueError(
            f"the plan beside it has other layers: {differing} is in only one of the two; search "
            "the same model on two grids"
        )
    if here.grid.shape == there.grid.shape:
        raise ValueError(
            f"both plans were searched on grid {here.grid}, which does not tell how heads grow; "
            "give one of another grid"
        )
    searches = plan.provenance["search"], beside.provenance["search"]
    for name in ("metric", "through_wo"):
        mine, theirs = (search.get(name) for search in searches)
        if mine != theirs:
            raise ValueError(
                f"the errors of the two searches are not the same measure: {name} is {mine} in "
                f"the plan and {theirs} in the one beside it; search both alike"
            )


def _kind(pattern: Pattern) -> tuple[object, ...] | None:
    """What patterns have in common of which the larger contains the smaller; `None` for those
    without a size."""
    match pattern:
        case Band():
            return Band, pattern.axis_order
        case Neighborhood():
            return Neighborhood, pattern.dilation, pattern.causal
        case _:
            return None


def _reach(pattern: Pattern, grid: TokenGrid) -> tuple[float, ...]:
    """Share of each axis, or of a band's order, that a pattern reaches over, at most 1."""
    match pattern:
        case Full():
            return (1.0,)
        case Band():
            span = grid.height * grid.width if pattern.axis_order == "in_frame" else grid.video
            return (min(pattern.half_width / span, 1.0),)
        case Neighborhood():
            sizes = zip(pattern.window, grid.shape, strict=True)
            return tuple(min(window / length, 1.0) for window, length in sizes)
        case _:
            return (0.0,)


def _contains(outer: Pattern, inner: Pattern, grid: TokenGrid) -> bool:
    """Whether `outer` keeps every pair that `inner` does, strides left aside."""
    if outer == Full() or inner == Skip():
        return True
    if _kind(outer) is None or _kind(outer) != _kind(inner):
        return False
    sizes = zip(_reach(outer, grid), _reach(inner, grid), strict=True)
    return all(large >= small for large, small in sizes)


def _share(pattern: Pattern, grid: TokenGrid) -> float:
    """Share of the pairs of video that a pattern keeps; for a union the sum of its parts."""
    match pattern:
        case AnyOf():
            return sum(_share(part, grid) for part in pattern.patterns)
        case Band():
            (reach,) = _reach(pattern, grid)
            return 1 - (1 - reach) ** 2
        case _:
            return math.prod(_reach(pattern, grid))


def _between(low: Measured, high: Measured, pattern: Pattern, grid: TokenGrid) -> float:
    """The error of a pattern that contains `low` and is contained in `high`; see `Errors.of`."""
    begin, at, end = (fmean(_reach(each, grid)) for each in (low.pattern, pattern, high.pattern))
    part = (at - begin) / (end - begin) if end > begin else 0.0
    if high.error == 0:
        return low.error * (1 - part)
    return low.error ** (1 - part) * high.error**part

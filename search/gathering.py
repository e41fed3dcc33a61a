"""Gathering: what was seen of each prompt becomes evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.column_mass import largest
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Columns, Full
from dit_sparse.kernels.remainder import Drop, Pooled
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.course import Sightings
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.latency import pass_times, stage_times
from dit_sparse.search.record import Seen
from dit_sparse.search.space import Candidate, Space, blocks_like


def evidence_of(
    plan: Plan,
    space: Space,
    sightings: Sightings,
    schedules: tuple[Schedule, ...],
    grid: TokenGrid,
    seen: Sequence[Seen],
) -> Evidence:
    """The evidence of `seen`, for the layers and blocks of `plan`; the first prompt's timing
    prices the candidates, where the device was calibrated.

    Raises:
        ValueError: if nothing was seen of a layer.
    """
    layers = tuple(plan.assignment)
    errors, masses = [], []
    for layer in layers:
        sums = [each.sums[layer] for each in seen if layer in each.sums]
        if not any(each.count.any() for each in sums):
            raise ValueError(
                f"{layer} did not run at the steps that renewals were tried at, so nothing is "
                "known about it; raise anchors"
            )
        error = sum((each.error for each in sums[1:]), start=sums[0].error)
        count = sum((each.count for each in sums[1:]), start=sums[0].count)
        errors.append(_filled(error, count).flatten(1, 2).float())
        masses.append(sums[0].column_mass)
    mass = torch.stack(masses)
    prices = _prices(space, mass, grid, plan.block, seen[0].run)
    return Evidence(
        layers=layers,
        space=space,
        sightings=sightings,
        schedules=schedules,
        grid=grid,
        block=plan.block,
        head_dim=tuple(plan.model[layer.partition(".")[0]].head_dim for layer in layers),
        copies=seen[0].run["shape"][0] * seen[0].run["branches"],
        error=torch.stack(errors),
        column_mass=mass,
        **prices,
    )


def _filled(error: Tensor, count: Tensor) -> Tensor:
    """Means of sums `[heads, slots, remainders, anchors, ages]`. What was never seen, because the
    generation ended before or another transformer ran, is as at the last age that was, or as at
    the nearest anchor."""
    mean = error / count.clamp_min(1)
    anchors, ages = count.shape
    for anchor in range(anchors):
        for age in range(1, ages):
            if not count[anchor, age] and count[anchor, 0]:
                mean[..., anchor, age] = mean[..., anchor, age - 1]
    known = count[:, 0].nonzero()[:, 0]
    for anchor in range(anchors):
        nearest = int(known[(known - anchor).abs().argmin()])
        mean[..., anchor, :] = mean[..., nearest, :]
    # What a head does not have at one age it does not have at any.
    missing = mean.isinf().any(-1, keepdim=True).any(-2, keepdim=True)
    return mean.masked_fill(missing, torch.inf)


def _prices(
    space: Space, mass: Tensor, grid: TokenGrid, block: int, run: dict[str, Any]
) -> dict[str, Tensor]:
    """The density of every candidate, and as far as the device was calibrated its times, under
    their names in `Evidence`.

    Columns of one count differ by at most a short block; they are priced by the first head's.
    """
    own = [largest(mass[0, 0], count, grid, block) for count in space.column_counts]
    candidates = [
        Candidate(pattern, remainder)
        for pattern in (*space.patterns, *own)
        for remainder in space.remainders
    ]
    # A full head has nothing left over; which blocks columns leave depends on the order, which
    # they do not have.
    missing = [
        (c.pattern == Full() and c.remainder != Drop())
        or (isinstance(c.pattern, Columns) and isinstance(c.remainder, Pooled))
        for c in candidates
    ]
    lists = [blocks_like(candidate, grid, block) for candidate in candidates]
    shape = *mass.shape[:2], len(candidates)

    def of_heads(table: Tensor) -> Tensor:
        return table.masked_fill(torch.tensor(missing), torch.inf).expand(shape).contiguous()

    prices = {"density": of_heads(torch.tensor([each.density().weighted for each in lists]))}
    dense = run["seconds_per_call"]
    if dense is None:
        return prices
    dtype, device = getattr(torch, run["dtype"]), torch.device(run["device"])
    query = torch.empty((), dtype=dtype, device=device).expand(run["shape"])
    passes = pass_times(lists, query, dense)
    if passes is None:
        return prices
    prices["time"] = of_heads(passes[0])
    stages = stage_times(candidates, query, dense, block)
    if stages is not None:
        prices["stage_time"] = stages[0]
        prices["launch_time"] = torch.cat([passes[1][:, None], stages[1]], 1)
    return prices

"""Choice: why a head runs what it runs: the winner beside the runner-up and dense attention."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.assign import hull, price_at
from dit_sparse.search.course import foreseeable
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import solution_of
from dit_sparse.search.tables import Tables
from dit_sparse.search.timing import timing_note


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate of one head: pattern and remainder in words, its error and its cost in the steps
    of its phase."""

    pattern: str
    error: float
    cost: float


@dataclass(frozen=True, slots=True)
class Choice:
    """What one head runs, what it would run next, and dense attention.

    The runner-up is, of the other candidates, the one of least `error + price * cost` at the
    price that the plan's mean cost puts on cost.
    """

    winner: Option
    runner_up: Option | None
    full: Option


@dataclass(frozen=True, slots=True)
class Choices:
    """The choices of all heads.

    Args:
        cost: what costs are: `"flops"` or `"time"` of a generation, relative to dense attention.
        price: error that one unit of a head's cost is worth at the plan's mean cost.
        layers: the heads of each layer, in each phase of the schedule.
        curve: (mean cost, error) of the best assignments, the cheapest first; errors as in
            `Solution.predicted`.
        point: (mean cost, error) of the plan.
        note: what speed-up to expect end to end; `None` if the search measured no times.
    """

    cost: str
    price: float
    layers: dict[str, tuple[Choice, ...]]
    curve: tuple[tuple[float, float], ...]
    point: tuple[float, float]
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


def choices(plan: Plan) -> Choices | None:
    """Why the heads of a searched plan run what they run; `None` for a plan without evidence, or
    one with candidates or a schedule that its search cannot have found.

    Raises:
        ValueError: if the evidence does not fit together.
    """
    if not plan.evidence or not foreseeable(plan.schedule):
        return None
    evidence = Evidence.of_plan(plan)
    chosen = evidence.chosen(plan)
    if chosen is None:
        return None
    tables = evidence.tables(plan.schedule)
    timed = str(plan.provenance.get("budget", "")).startswith(("speedup", "latency"))
    costs = tables.time if timed else tables.flops
    mean = costs.gather(-1, chosen[..., None]).mean().item()
    price = price_at(tables.error, costs, mean)
    names = [name + when for when in plan.schedule.phase_names for name in evidence.layers]
    rows = {
        name: tuple(
            _choice(evidence, tables, costs, price, row, head, candidate)
            for head, candidate in enumerate(chosen[row].tolist())
        )
        for row, name in enumerate(names)
    }
    count = len(names)
    curve = tuple((cost, error / count) for cost, error in hull(tables.error, costs))
    error = solution_of(evidence, chosen, plan.schedule).predicted["error"]
    kind = "time" if timed and evidence.time is not None else "flops"
    return Choices(kind, price, rows, curve, (mean, error), timing_note(plan))


def _choice(
    evidence: Evidence,
    tables: Tables,
    costs: Tensor,
    price: float,
    row: int,
    head: int,
    candidate: int,
) -> Choice:
    errors, layers = tables.error, len(evidence.layers)
    spans = tables.schedule.spans(tables.steps)
    # Of the steps of the phase, not of all.
    share = len(spans) * len(spans[row // layers]) / tables.steps

    def option(index: int) -> Option:
        return Option(
            str(evidence.candidate(row % layers, head, index)),
            errors[row, head, index].item() / share,
            costs[row, head, index].item() / share,
        )

    loss = errors[row, head] + price * costs[row, head]
    loss = loss.nan_to_num(nan=torch.inf)
    loss[candidate] = torch.inf
    second = int(loss.argmin())
    runner_up = option(second) if loss[second].isfinite() else None
    return Choice(option(candidate), runner_up, option(evidence.full))

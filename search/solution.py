"""Solution: a candidate for each head and a schedule, chosen under a budget; what they promise.

For every schedule that may be chosen the candidates of all heads are assigned; the best of these
assignments wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.assign import SLACK, assign, assign_cheapest, sparse_vdit
from dit_sparse.search.budget import CLOCKED, Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.tables import Tables
from dit_sparse.search.timing import Timing

EXAMPLE = 0.4
"""Share of dense attention at which a refusal says what could be expected."""

USUAL = 0.2
"""Share of the steps that papers run dense first."""

FAR = 0.05
"""Predicted error beyond which phases are taken only if there is nothing else.

A phase begins with nothing kept. On so tight a budget it cannot afford to take caches again, and
what it then drops is worth more than predicted: at .1 of the FLOPs, on the sample model's three
search prompts, phases of an error of .10 gave videos 5 to 9 dB worse than none of .12; at .15, of
.024 instead of .029, .2 to 3 dB better.
"""

PRICES = 12
"""Bisections of the price of a byte."""

TRIES = 8
"""How often a limit of time is lowered by what launches of further groups of heads took beyond it:
heads are assigned as if they shared one."""

GENERATED = (
    "a PSNR is held by generating videos, which needs the model: search with search_plan or "
    "dit-sparse search --model, or ask for FLOPs, a density, an error, a speed-up or a latency"
)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """One candidate for each head.

    Args:
        chosen: int64 `[rows, heads]` as in `Tables`, numbers of candidates.
        schedule: of the generation.
        predicted: `flops` and `density` (see `Budget`), `error` (mean over layers and steps of
            the summed errors of the heads) and `cache_bytes`.
        times: where any were measured, `attention` (seconds of self-attention relative to dense),
            `speedup` and `seconds` of a generation.
    """

    chosen: Tensor
    schedule: Schedule
    predicted: dict[str, float]
    times: dict[str, float]


def solve(evidence: Evidence, budget: Budget, timing: Timing | None = None) -> Solution:
    """The schedule and assignment of least error within `budget`; for `error`, of least FLOPs.
    Schedules with phases are the last choice where their error is beyond `FAR`.

    Raises:
        ValueError: if no assignment keeps the budget, with the best that can be had; if it asks
            for times and none were measured; or if it asks for a PSNR.
    """
    if budget.psnr is not None:
        raise ValueError(GENERATED)
    if budget.name in CLOCKED and timing is None:
        raise ValueError(
            f"{budget} cannot be predicted: the search measured no times (it needs two steps); "
            "search again with more steps, or ask for FLOPs, a density or an error"
        )
    found: list[tuple[Tables, Tensor, dict[str, float]]] = []
    for tables in _tables(evidence, budget):
        chosen = _assigned(evidence, tables, budget, timing)
        if chosen is not None:
            found.append((tables, chosen, _predicted(tables, chosen)))
    if not found:
        raise ValueError(_refusal(evidence, budget, timing))

    def rank(each: tuple[Tables, Tensor, dict[str, float]]) -> tuple[float, ...]:
        tables, _, predicted = each
        error, flops = predicted["error"], predicted["flops"]
        far = bool(tables.schedule.phases) and error > FAR
        if budget.price is not None:
            return far, error / evidence.error.shape[1] + budget.price * flops
        return (far, error, flops) if budget.error is None else (far, flops, error)

    tables, chosen, predicted = min(found, key=rank)
    times = _times(evidence, tables, chosen, timing)
    return Solution(chosen, tables.schedule, predicted, times)


def resolve(plan: Plan, budget: Budget) -> Plan:
    """The plan for another budget from the evidence of a searched plan, without a search.

    Raises:
        ValueError: if the plan carries no evidence, the budget cannot be kept, or it is a PSNR,
            which needs the pipeline.
    """
    evidence = Evidence.of_plan(plan)
    solution = solve(evidence, budget, Timing.of_plan(plan))
    provenance = plan.provenance | {"budget": str(budget), "predicted": solution.predicted}
    provenance.pop("achieved", None)
    return replace(
        evidence.planned(plan, solution.chosen, solution.schedule),
        provenance=provenance,
        timing=plan.timing | {"predicted": solution.times},
    )


def solution_of(
    evidence: Evidence, chosen: Tensor, schedule: Schedule, timing: Timing | None = None
) -> Solution:
    """The candidates `chosen`, int64 `[rows, heads]`, with what is expected of them."""
    tables = evidence.tables(schedule)
    times = _times(evidence, tables, chosen, timing)
    return Solution(chosen, schedule, _predicted(tables, chosen), times)


def attention(evidence: Evidence, tables: Tables, chosen: Tensor) -> float:
    """Seconds of self-attention relative to dense of the candidates `chosen`, int64 `[rows,
    heads]`: a layer whose heads are all full runs the model's own attention; in any other each
    group of heads launches its own calls."""
    spent = _picked(tables.time, chosen).mean(-1)
    launch = _picked(tables.launch, chosen)
    for row, own in enumerate(chosen):
        if (own == evidence.full).all():
            spent[row] = tables.flops[row, 0, evidence.full]
        elif launch[row].any():
            # What heads paid together was one launch.
            groups = evidence.groups(own)
            further = sum(launch[row, list(group.heads)].max() for group in groups)
            spent[row] += further - launch[row].mean()
    return spent.mean().item()


def _predicted(tables: Tables, chosen: Tensor) -> dict[str, float]:
    flops = _mean(tables.flops, chosen)
    sparse = 1 - tables.dense
    return {
        "flops": flops,
        "density": (flops - tables.dense) / sparse if sparse else 1.0,
        "error": _mean(tables.error, chosen) * chosen.shape[1],
        "cache_bytes": tables.most_bytes(chosen),
    }


def _times(
    evidence: Evidence, tables: Tables, chosen: Tensor, timing: Timing | None
) -> dict[str, float]:
    if timing is None:
        return {}
    spent = attention(evidence, tables, chosen)
    return {
        "attention": spent,
        "speedup": timing.speedup(spent),
        "seconds": timing.seconds(spent),
    }


def limit_of(budget: Budget, tables: Tables, timing: Timing | None) -> tuple[Tensor, float]:
    """The costs that a budget limits, `[rows, heads, candidates]`, and the limit of their mean."""
    if budget.flops is not None:
        return tables.flops, budget.flops
    if budget.density is not None:
        return tables.flops, tables.dense + (1 - tables.dense) * budget.density
    if budget.error is not None:
        return tables.error, budget.error / tables.error.shape[1]
    assert timing is not None
    asked = timing.dense_seconds / budget.value if budget.speedup is not None else budget.value
    return tables.time, timing.cost_of(asked)


def _tables(evidence: Evidence, budget: Budget) -> list[Tables]:
    """Of the schedules that a budget may be solved under: all, or for a density, which does not
    count dense steps, those whose share of them is nearest to the usual fifth."""
    tables = [evidence.tables(schedule) for schedule in evidence.schedules]
    if budget.density is None:
        return tables
    nearest = min(abs(each.dense - USUAL) for each in tables)
    return [each for each in tables if abs(each.dense - USUAL) == nearest]


def _assigned(
    evidence: Evidence, tables: Tables, budget: Budget, timing: Timing | None
) -> Tensor | None:
    """The best assignment under one schedule; `None` if none keeps the budget."""
    if budget.price is not None:
        price, gate = budget.price, torch.inf if budget.gate is None else budget.gate
        return _within_bytes(
            lambda error: sparse_vdit(
                error, tables.flops, price=price, gate=gate, full=evidence.full
            ),
            tables.error,
            tables,
            budget,
        )
    costs, limit = limit_of(budget, tables, timing)
    if budget.error is None and limit >= 1:
        return torch.full(costs.shape[:-1], evidence.full)
    if _least(costs) > limit * (1 + SLACK):
        return None
    if budget.error is not None:
        return _within_bytes(
            lambda flops: assign_cheapest(tables.error, flops, limit), tables.flops, tables, budget
        )

    def within(room: float) -> Tensor | None:
        return _within_bytes(
            lambda error: assign(error, costs, room), tables.error, tables, budget
        )

    chosen = within(limit)
    if budget.name not in CLOCKED:
        return chosen
    room = limit
    for _ in range(TRIES):
        over = 0.0 if chosen is None else attention(evidence, tables, chosen) - limit
        if over <= limit * SLACK:
            return chosen
        room -= over
        if _least(costs) > room * (1 + SLACK):
            return None
        chosen = within(room)
    return None


def _within_bytes(
    solver: Callable[[Tensor], Tensor], objective: Tensor, tables: Tables, budget: Budget
) -> Tensor | None:
    """What `solver` finds for `objective` with the least price on bytes that keeps their limit."""
    chosen = solver(objective)
    most = budget.cache_bytes
    if most is None or tables.most_bytes(chosen) <= most:
        return chosen
    unit = objective[objective.isfinite()].max() / tables.bytes.max()
    low, high = -30.0, 10.0
    kept = solver(objective + unit * 2**high * tables.bytes)
    if tables.most_bytes(kept) > most:
        return None
    for _ in range(PRICES):
        middle = (low + high) / 2
        chosen = solver(objective + unit * 2**middle * tables.bytes)
        if tables.most_bytes(chosen) > most:
            low = middle
        else:
            high, kept = middle, chosen
    return kept


def _refusal(evidence: Evidence, budget: Budget, timing: Timing | None) -> str:
    """Why no schedule has an assignment within `budget`, and what can be had."""
    every = _tables(evidence, budget)
    if budget.name in CLOCKED:
        assert timing is not None
        fastest = min(attention(evidence, each, each.time.argmin(-1)) for each in every)
        reach = f"{timing.speedup(fastest):.2f}x, {timing.seconds(fastest):.3g} s"
        return (
            f"{budget} is out of reach: no plan of this search is faster than {reach}; "
            f"{timing.expectation(EXAMPLE, EXAMPLE)}; ask for less, or run fewer steps dense"
        )
    if budget.flops is not None:
        least = min(_least(tables.flops) for tables in every)
    elif budget.density is not None:
        least = min((_least(tables.flops) - tables.dense) / (1 - tables.dense) for tables in every)
    else:
        least = min(_least(tables.error) for tables in every) * evidence.density.shape[1]
    return (
        f"{budget} is out of reach: the least {budget.name} of a plan of this search is "
        f"{least:.4g}; ask for at least that much"
    )


def _least(costs: Tensor) -> float:
    return costs.amin(-1).mean().item()


def _picked(table: Tensor, chosen: Tensor) -> Tensor:
    return table.gather(-1, chosen[..., None])[..., 0]


def _mean(table: Tensor, chosen: Tensor) -> float:
    return _picked(table, chosen).mean().item()

"""Solution: the candidates that a budget chooses from evidence, and what is expected of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.search.assign import assign, assign_cheapest
from dit_sparse.search.budget import Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.timing import Timing

EXAMPLE = 0.4
"""Density at which a refusal says what could be expected."""

GENERATED = (
    "a PSNR is held by generating videos, which needs the model: search with search_plan or "
    "dit-sparse search --model, or ask for a density, an error, a speed-up or a latency"
)


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """One candidate for each head.

    Args:
        chosen: int64 `[layers, heads]`, numbers of candidates.
        predicted: `density` (block density, mean over heads) and `error` (mean over layers of the
            summed errors of their heads).
        times: where any were measured, `attention` (seconds of the sparse steps' attention
            relative to dense), `speedup` and `seconds` of a generation.
    """

    chosen: Tensor
    predicted: dict[str, float]
    times: dict[str, float]


def solve(evidence: Evidence, budget: Budget, timing: Timing | None = None) -> Solution:
    """The assignment of least error within `budget`; for `error`, of least cost.

    Raises:
        ValueError: if no assignment keeps the budget, with the best that can be had; if it asks
            for times and none were measured; or if it asks for a PSNR.
    """
    if budget.psnr is not None:
        raise ValueError(GENERATED)
    if budget.density is not None:
        chosen = assign(evidence.error, evidence.cost, budget.density)
    elif budget.error is not None:
        heads = evidence.error.shape[1]
        chosen = assign_cheapest(evidence.error, evidence.cost, budget.error / heads)
    else:
        chosen = _in_time(evidence, budget, timing)
    return solution_of(evidence, chosen, timing)


def solution_of(evidence: Evidence, chosen: Tensor, timing: Timing | None = None) -> Solution:
    """The candidates `chosen`, int64 `[layers, heads]`, with what is expected of them."""
    predicted = {
        "density": _mean(evidence.cost, chosen),
        "error": _mean(evidence.error, chosen) * chosen.shape[1],
    }
    if timing is None:
        return Solution(chosen, predicted, {})
    spent = evidence.relative_time.gather(-1, chosen[..., None])[..., 0].double()
    # A layer whose heads are all full runs the model's own attention.
    spent[(chosen == evidence.full).all(-1)] = 1.0
    attention = spent.mean().item()
    times = {
        "attention": attention,
        "speedup": timing.speedup(attention),
        "seconds": timing.seconds(attention),
    }
    return Solution(chosen, predicted, times)


def _in_time(evidence: Evidence, budget: Budget, timing: Timing | None) -> Tensor:
    """The assignment of least error that is fast enough end to end."""
    if timing is None:
        raise ValueError(
            f"{budget} cannot be predicted: the search measured no times (it needs two observed "
            "steps); search again with more steps, or ask for a density or an error"
        )
    asked = timing.dense_seconds / budget.value if budget.speedup is not None else budget.value
    limit = timing.cost_of(asked)
    if limit >= 1:
        return torch.full(evidence.error.shape[:-1], evidence.full)
    times = evidence.relative_time
    least = times.amin(-1).double().mean().item()
    if limit < least:
        fastest = solution_of(evidence, times.argmin(-1), timing).times
        reach = f"{fastest['speedup']:.2f}x, {fastest['seconds']:.3g} s"
        raise ValueError(
            f"{budget} is out of reach: no plan of this search is faster than {reach}; "
            f"{timing.expectation(EXAMPLE, EXAMPLE)}; ask for less, or run fewer steps dense"
        )
    return assign(evidence.error, times, limit)


def _mean(table: Tensor, chosen: Tensor) -> float:
    return table.gather(-1, chosen[..., None]).double().mean().item()

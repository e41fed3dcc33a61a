"""Sparse-vDiT's rule as a budget, and the rule by which phases are taken."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.solution import FAR, solve
from tests.searched import HEADS, PHASED, SCHEDULES, evidence_of

LAYERS = 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("price", "gate"), [(0.05, None), (0.4, None), (0.4, 0.3), (0.4, 0.0)])
def test_a_price_takes_the_least_loss_of_every_head(
    seed: int, price: float, gate: float | None
) -> None:
    toy = evidence_of(LAYERS, seed)
    found = solve(toy, Budget(price=price, gate=gate))
    least = []
    for schedule in SCHEDULES:
        tables = toy.tables(schedule)
        loss = tables.error + price * tables.flops
        loss[..., toy.full] = torch.inf
        best = loss.amin(-1)
        gone = torch.zeros_like(best, dtype=torch.bool) if gate is None else best > gate
        full = torch.full_like(best, price * tables.flops[0, 0, toy.full].item())
        least.append(torch.where(gone, full, best).mean().item())
        if schedule == found.schedule:
            assert torch.equal(found.chosen == toy.full, gone)
            assert torch.equal(found.chosen[~gone], loss.argmin(-1)[~gone])
    own = found.predicted["error"] / HEADS + price * found.predicted["flops"]
    assert own == pytest.approx(min(least))
    if gate == 0.3 and not seed:
        assert 0 < (found.chosen == toy.full).sum() < LAYERS * HEADS


def test_a_price_may_have_a_limit_of_bytes_beside_it() -> None:
    toy = evidence_of(LAYERS)
    free = solve(toy, Budget(price=0.05))
    held = solve(toy, Budget(price=0.05, cache_bytes=int(free.predicted["cache_bytes"] / 2)))
    assert 0 <= held.predicted["cache_bytes"] <= free.predicted["cache_bytes"] / 2
    assert held.predicted["error"] > free.predicted["error"]


def test_phases_are_taken_where_errors_are_small() -> None:
    outcomes = set()
    for seed, flops in product(range(8), (0.3, 0.4, 0.6)):
        toy = replace(
            evidence_of(2, seed), schedules=(Schedule(1), replace(PHASED, dense_first=1))
        )
        toy = replace(toy, error=toy.error * 10.0**-seed)
        budget = Budget(flops=flops)
        plain, phased = (
            solve(replace(toy, schedules=(schedule,)), budget).predicted["error"]
            for schedule in toy.schedules
        )
        taken = solve(toy, budget).schedule == toy.schedules[1]
        assert taken == (phased < plain and phased <= FAR)
        outcomes.add((taken, phased < plain))
    assert outcomes >= {(True, True), (False, True), (False, False)}

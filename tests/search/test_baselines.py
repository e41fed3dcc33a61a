import pytest
import torch

from dit_sparse.search.baselines import best_uniform, random_assignment
from dit_sparse.search.budget import Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import solution_of, solve
from dit_sparse.search.tables import Tables
from tests.searched import HEADS, SCHEDULES, evidence_of, picked

LAYERS = 3
SCHEDULE = SCHEDULES[1]
PLAIN = range(0, 10, 2)
"""Candidates that drop the rest and are alike in all heads."""


@pytest.fixture
def evidence() -> Evidence:
    return evidence_of(LAYERS)


@pytest.fixture
def tables(evidence: Evidence) -> Tables:
    return evidence.tables(SCHEDULE)


def test_random_assignment_costs_as_much_and_is_its_own(
    evidence: Evidence, tables: Tables
) -> None:
    state = torch.get_rng_state()
    drawn = [random_assignment(tables, 0.5, seed) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(random_assignment(tables, 0.5, 3), drawn[3])
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 10
    flops = [picked(tables.flops, each) / (LAYERS * HEADS) for each in drawn]
    assert all(0.45 < spent <= 0.5 + 1e-6 for spent in flops)
    best = solve(evidence, Budget(flops=0.5)).predicted["error"]
    errors = [solution_of(evidence, each, SCHEDULE).predicted["error"] for each in drawn]
    assert min(errors) >= best
    assert sum(errors) / 20 > 2 * best


def test_random_assignment_takes_no_candidate_that_a_head_lacks(evidence: Evidence) -> None:
    evidence.density[1, :, 8] = torch.inf
    tables = evidence.tables(SCHEDULE)
    for seed in range(20):
        drawn = random_assignment(tables, 0.9, seed)
        assert not (drawn[1] == 8).any()
        assert not (drawn == 1).any()


def test_best_uniform_is_the_best_of_all(tables: Tables) -> None:
    # Under this schedule: full 1, skip 0.2, the bands 0.68 and 0.4, mass 0.73.
    chosen = best_uniform(tables, 0.7, PLAIN)
    assert chosen.shape == (LAYERS, HEADS)
    assert chosen.unique().numel() == 1
    totals = {number: tables.error[..., number].sum().item() for number in (2, 4, 6)}
    assert int(chosen[0, 0]) == min(totals, key=lambda number: totals[number]) == 4
    assert best_uniform(tables, 0.681, PLAIN).eq(4).all()
    assert best_uniform(tables, 0.67, PLAIN).eq(6).all()
    assert best_uniform(tables, 1.0, PLAIN).eq(0).all()
    assert best_uniform(tables, 0.25, PLAIN).eq(2).all()
    assert best_uniform(tables, 0.67, (0, 2)).eq(2).all()


def test_baselines_refuse_what_is_too_little(tables: Tables) -> None:
    message = r"takes 0\.1 of dense attention's FLOPs or less, the cheapest takes 0\.2000; ask for"
    with pytest.raises(ValueError, match=message):
        random_assignment(tables, 0.1, 0)
    with pytest.raises(ValueError, match=message):
        best_uniform(tables, 0.1, PLAIN)
    with pytest.raises(ValueError, match=r"the cheapest takes 0\.4000"):
        best_uniform(tables, 0.3, (0, 4, 6))

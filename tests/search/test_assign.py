from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from dit_sparse.search.assign import assign

HEADS, CANDIDATES = 6, 5


def toy(seed: int) -> tuple[Tensor, Tensor]:
    """Candidates as a search has them: full, skip, and others between, not all on the hull."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(HEADS, CANDIDATES, generator=generator, dtype=torch.float64)
    error = torch.rand(HEADS, CANDIDATES, generator=generator, dtype=torch.float64)
    error *= (1 - cost) * 10 ** torch.rand(HEADS, 1, generator=generator, dtype=torch.float64)
    cost[:, 0], error[:, 0] = 1.0, 0.0
    cost[:, 1], error[:, 1] = 0.0, 1.5 * error.amax(-1)
    return error, cost


def picked(table: Tensor, choice: Tensor) -> float:
    return table.gather(-1, choice[:, None]).sum().item()


def optimum(error: Tensor, cost: Tensor, limit: float) -> float:
    choices = torch.tensor(list(product(range(CANDIDATES), repeat=HEADS)))
    head = torch.arange(HEADS)
    errors, costs = error[head, choices].sum(-1), cost[head, choices].sum(-1)
    return errors[costs <= limit * HEADS + 1e-9].min().item()


def hull_steps(error: Tensor, cost: Tensor) -> list[float]:
    """Falls of the error along the lower convex hull of every head, by gift wrapping."""
    steps = []
    for errors, costs in zip(error.tolist(), cost.tolist(), strict=True):
        at = min(range(CANDIDATES), key=lambda c: (costs[c], errors[c]))
        while True:
            right = [
                c for c in range(CANDIDATES) if costs[c] > costs[at] and errors[c] < errors[at]
            ]
            if not right:
                break
            then = max(right, key=lambda c: (errors[at] - errors[c]) / (costs[c] - costs[at]))
            steps.append(errors[at] - errors[then])
            at = then
    return steps


@pytest.mark.parametrize("seed", range(12))
def test_SV5_within_the_largest_step_of_the_enumerated_optimum(seed: int) -> None:
    error, cost = toy(seed)
    for limit in (0.05, 0.15, 0.3, 0.5, 0.8):
        choice = assign(error, cost, limit)
        assert picked(cost, choice) <= limit * HEADS * (1 + 1e-6)
        gap = picked(error, choice) - optimum(error, cost, limit)
        assert -1e-9 <= gap <= max(hull_steps(error, cost)) + 1e-9


def test_SV5_most_toys_are_solved_to_within_a_tenth() -> None:
    gaps = []
    for seed in range(40):
        error, cost = toy(seed)
        best = optimum(error, cost, 0.3)
        gaps.append((picked(error, assign(error, cost, 0.3)) - best) / best)
    assert sorted(gaps)[30] < 0.1


@pytest.mark.parametrize("seed", range(8))
def test_SV5_error_never_rises_with_the_budget(seed: int) -> None:
    error, cost = toy(seed)
    limits = torch.linspace(0.01, 1, 60).tolist()
    errors = [picked(error, assign(error, cost, limit)) for limit in limits]
    assert all(later <= before + 1e-12 for before, later in pairwise(errors))
    assert errors[-1] == 0


def test_SV4_ends_all_full_and_sparsest() -> None:
    error, cost = toy(0)
    assert assign(error, cost, 1.0).tolist() == [0] * HEADS
    assert assign(error, cost, 1e-12).tolist() == [1] * HEADS


def test_SV4_equal_costs_take_the_least_error() -> None:
    error, _ = toy(3)
    assert torch.equal(assign(error, torch.full_like(error, 0.5), 0.5), error.argmin(-1))


def test_ties_go_to_the_cheaper_then_to_the_first() -> None:
    error = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    cost = torch.tensor([[1.0, 0.2, 0.3], [1.0, 0.2, 0.2]])
    assert assign(error, cost, 1.0).tolist() == [1, 1]


def test_layers_share_the_budget_unevenly() -> None:
    error = torch.tensor([[[0.0, 9.0]], [[0.0, 1.0]]])
    cost = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert assign(error, cost, 0.5).tolist() == [[0], [1]]


def test_missing_candidates_are_never_taken() -> None:
    error = torch.tensor([[1.0, torch.inf, 0.0], [1.0, 0.5, torch.inf]])
    cost = torch.tensor([[0.3, 0.0, torch.inf], [0.3, torch.inf, 0.0]])
    assert assign(error, cost, 1.0).tolist() == [0, 0]


def test_a_budget_below_the_cheapest_is_refused() -> None:
    error, cost = toy(0)
    with pytest.raises(ValueError, match=r"costs 0.1 or less .* cheapest costs 0.5000; ask for"):
        assign(error, cost.clamp_min(0.5), 0.1)

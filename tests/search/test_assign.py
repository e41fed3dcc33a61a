import time
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.search import assign as assignment
from dit_sparse.search.assign import assign, assign_cheapest, hull, price_at, sparse_vdit
from tests.searched import hull_steps, picked

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


def optimum(error: Tensor, cost: Tensor, limit: float) -> float:
    heads, candidates = error.shape
    choices = torch.tensor(list(product(range(candidates), repeat=heads)))
    head = torch.arange(heads)
    errors, costs = error[head, choices].sum(-1), cost[head, choices].sum(-1)
    return errors[costs <= limit * heads + 1e-9].min().item()


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


def test_of_heads_that_save_as_much_per_cost_the_first_runs_more() -> None:
    error = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert assign(error, 1 - error, 0.34).tolist() == [1, 1, 1]
    assert assign(error, 1 - error, 0.67).tolist() == [1, 0, 1]


def test_layers_share_the_budget_unevenly() -> None:
    error = torch.tensor([[[0.0, 9.0]], [[0.0, 1.0]]])
    cost = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert assign(error, cost, 0.5).tolist() == [[0], [1]]


def test_missing_candidates_are_never_taken() -> None:
    error = torch.tensor([[1.0, torch.inf, 0.0], [1.0, 0.5, torch.inf]])
    cost = torch.tensor([[0.3, 0.0, torch.inf], [0.3, torch.inf, 0.0]])
    assert assign(error, cost, 1.0).tolist() == [0, 0]


@pytest.mark.parametrize("missing", [torch.inf, torch.nan])
def test_what_is_missing_makes_nothing_cheaper(missing: float) -> None:
    table = torch.tensor([[0.0, 0.5], [missing, 0.5]])
    other = torch.tensor([[1.0, 0.5], [0.0, 0.5]])
    assert assign(table, other, 0.75).tolist() == [0, 1]
    assert assign_cheapest(other, table, 0.75).tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"the cheapest costs 0\.5000"):
        assign(table, other, 0.4)
    with pytest.raises(ValueError, match=r"the best has 0\.5;"):
        assign_cheapest(other, table, 0.4)


def test_a_budget_below_the_cheapest_is_refused() -> None:
    error, cost = toy(0)
    with pytest.raises(ValueError, match=r"costs 0.1 or less .* cheapest costs 0.5000; ask for"):
        assign(error, cost.clamp_min(0.5), 0.1)


ERRORS = (0.02, 0.1, 0.4, 1.0, 3.0)


@pytest.mark.parametrize("seed", range(8))
def test_SV5_least_cost_within_the_largest_step_of_the_enumerated_optimum(seed: int) -> None:
    error, cost = toy(seed)
    for limit in ERRORS:
        choice = assign_cheapest(error, cost, limit)
        assert picked(error, choice) <= limit * HEADS * (1 + 1e-6)
        gap = picked(cost, choice) - optimum(cost, error, limit)
        assert -1e-9 <= gap <= max(hull_steps(cost, error)) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_SV5_cost_never_rises_with_the_error(seed: int) -> None:
    error, cost = toy(seed)
    limits = torch.linspace(0, 1.001 * error.amax(-1).mean().item(), 25).tolist()
    costs = [picked(cost, assign_cheapest(error, cost, limit)) for limit in limits]
    assert all(later <= before + 1e-12 for before, later in pairwise(costs))
    assert costs[0] == HEADS
    assert costs[-1] == 0


def test_an_error_below_the_least_is_refused() -> None:
    error, cost = toy(0)
    with pytest.raises(ValueError, match=r"mean error of 0.1 or less, the best has 0.5; ask for"):
        assign_cheapest(error.clamp_min(0.5), cost, 0.1)


@pytest.mark.parametrize("seed", range(20))
def test_SV4_the_rule_of_sparse_vdit_is_its_definition(seed: int) -> None:
    error, cost = toy(seed)
    for price, gate in product((0.0, 0.1, 0.5, 3.0), (0.1, 0.5, 2.0)):
        expected = []
        for errors, costs in zip(error.tolist(), cost.tolist(), strict=True):
            losses = [e + price * c for e, c in zip(errors[1:], costs[1:], strict=True)]
            best = min(range(len(losses)), key=losses.__getitem__)
            expected.append(0 if losses[best] > gate else best + 1)
        assert sparse_vdit(error, cost, price=price, gate=gate).tolist() == expected


def test_SV4_ends_of_the_gate_and_of_the_price() -> None:
    error, cost = toy(1)
    assert sparse_vdit(error, cost, gate=0.0).tolist() == [0] * HEADS
    assert sparse_vdit(error, cost, price=1e9, gate=torch.inf).tolist() == [1] * HEADS
    gates = torch.linspace(0, 3, 40).tolist()
    costs = [picked(cost, sparse_vdit(error, cost, gate=gate)) for gate in gates]
    assert all(later <= before for before, later in pairwise(costs))
    assert costs[-1] < costs[0]


def test_the_price_is_the_slope_of_the_error() -> None:
    error = torch.tensor([[0.0, 1.0, 4.0]])
    cost = torch.tensor([[1.0, 0.5, 0.0]])
    # From 0.5 down a unit of cost is worth 6, from there up 2.
    assert price_at(error, cost, 0.5) == pytest.approx(2.0)
    assert price_at(error, cost, 0.2) == pytest.approx(6.0)
    assert price_at(error, cost, 1.0) == 0.0


def test_no_assignment_lies_below_the_hull() -> None:
    error, cost = toy(2)
    points = hull(error, cost)
    assert points[0] == (0.0, pytest.approx(picked(error, torch.ones(HEADS, dtype=torch.long))))
    assert points[-1] == (1.0, 0.0)
    for at, total in points:
        assert total == pytest.approx(optimum(error, cost, at))


# The walk along the hulls, against a price that is bisected over all candidates.


def bisected(error: Tensor, cost: Tensor, limit: float) -> Tensor:
    """What `assign` is to find, by its definition."""
    room = limit * (1 + 1e-9) * len(error)

    def cheapest(price: float) -> Tensor:
        loss = (error + price * cost).nan_to_num(nan=torch.inf)
        return cost.masked_fill(loss > loss.amin(-1, keepdim=True), torch.inf).argmin(-1)

    low, high = 0.0, 0.0
    if picked(cost, cheapest(0.0)) > room:
        high = 1.0
        while picked(cost, cheapest(high)) > room:
            low, high = high, 2 * high
        for _ in range(64):
            middle = (low + high) / 2
            low, high = (middle, high) if picked(cost, cheapest(middle)) > room else (low, middle)
    choice = cheapest(high)
    while True:
        own = choice[:, None]
        saved, extra = error.gather(-1, own) - error, cost - cost.gather(-1, own)
        allowed = (saved > 0) & (extra <= room - picked(cost, choice))
        if not allowed.any():
            return choice
        worth = (saved / extra.clamp_min(1e-12)).masked_fill(~allowed, -1.0)
        head, candidate = divmod(int(worth.argmax()), error.shape[-1])
        choice[head] = candidate


def within(cost: Tensor, share: float) -> float:
    """A limit between the mean of the least costs and that of the largest."""
    least, most = cost.amin(-1), cost.masked_fill(cost.isinf(), 0.0).amax(-1)
    return (least + share * (most - least)).mean().item()


def drawn(seed: int, heads: int, candidates: int) -> tuple[Tensor, Tensor]:
    """Errors over decades, costs between 0 and 1, and a tenth missing, never the first."""
    generator = torch.Generator().manual_seed(seed)
    cost, error, scale, there = torch.rand(
        4, heads, candidates, generator=generator, dtype=torch.float64
    )
    missing = there < 0.1
    missing[:, 0] = False
    error = error * 10 ** (6 * scale[:, :1] - 6)
    return error.masked_fill(missing, torch.inf), cost.masked_fill(missing, torch.inf)


SIZES = {"heads": st.integers(1, 12), "candidates": st.integers(1, 12)}


@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), alike=st.booleans(), **SIZES)
@settings(max_examples=60, deadline=None)
def test_SV5_choices_are_those_of_the_bisected_price(
    seed: int, share: float, alike: bool, heads: int, candidates: int
) -> None:
    error, cost = drawn(seed, heads, candidates)
    if alike:
        error, cost = error[:1].expand(heads, -1), cost[:1].expand(heads, -1)
    limit, loss = within(cost, share), within(error, share)
    assert torch.equal(assign(error, cost, limit), bisected(error, cost, limit))
    assert torch.equal(assign_cheapest(error, cost, loss), bisected(cost, error, loss))


@st.composite
def tied(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Small whole numbers: many slopes are equal, and many candidates."""
    heads, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    numbers = st.lists(st.integers(0, 6), min_size=heads * candidates, max_size=heads * candidates)
    error, cost = (torch.tensor(draw(numbers)).double().view(heads, -1) for _ in range(2))
    missing = torch.tensor(draw(numbers)).view(heads, -1) == 6
    missing[:, 0] = False
    return error.masked_fill(missing, torch.inf), cost.masked_fill(missing, torch.inf)


@given(tied())
@settings(max_examples=60, deadline=None)
def test_SV5_ties_keep_every_promise(tables: tuple[Tensor, Tensor]) -> None:
    for way, limited in ((0, assign), (1, assign_cheapest)):
        error, cost = tables[way], tables[1 - way]
        step = max(hull_steps(error, cost), default=0.0)
        errors = []
        for share in torch.linspace(0, 1, 9).tolist():
            limit = within(cost, share)
            choice = limited(*tables, limit)
            assert picked(cost, choice) <= limit * len(cost) * (1 + 1e-6)
            errors.append(picked(error, choice))
            assert -1e-9 <= errors[-1] - optimum(error, cost, limit) <= step + 1e-9
        assert errors == sorted(errors, reverse=True)


@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.99), **SIZES)
@settings(max_examples=60, deadline=None)
def test_the_price_is_the_lowest_that_keeps_the_limit(
    seed: int, share: float, heads: int, candidates: int
) -> None:
    error, cost = drawn(seed, heads, candidates)
    limit = within(cost, share)
    price = price_at(error, cost, limit)

    def spent(at: float) -> float:
        choice = (error + at * cost).nan_to_num(nan=torch.inf).argmin(-1)
        return picked(cost, choice) / heads

    assert spent(price * (1 + 1e-6)) <= limit * (1 + 1e-6)
    if price:
        assert spent(price * (1 - 1e-6)) > limit


@pytest.mark.parametrize("narrowings", [0, 1, 3, 20])
def test_narrowing_is_a_matter_of_speed(monkeypatch: pytest.MonkeyPatch, narrowings: int) -> None:
    error, cost = drawn(1, 40, 60)
    limits = [within(cost, share) for share in (0.01, 0.1, 0.3, 0.7)]
    expected = [assign(error, cost, limit) for limit in limits]
    monkeypatch.setattr(assignment, "NARROWINGS", narrowings)
    for limit, choice in zip(limits, expected, strict=True):
        assert torch.equal(assign(error, cost, limit), choice)


def test_twenty_large_tables_take_less_than_a_second() -> None:
    tables = [drawn(seed, 40 * 12, 300) for seed in range(20)]
    start = time.process_time()
    for error, cost in tables:
        assign(error, cost, 0.3)
    assert time.process_time() - start < 1

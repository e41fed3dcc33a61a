"""Budgets solved from evidence, against enumeration and against what runs."""

import time
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.remainder import Complement
from dit_sparse.kernels.scored import Scored
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.assign import assign
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve, solution_of, solve
from dit_sparse.search.space import KINDS
from tests import tiny
from tests.searched import (
    HEADS,
    SCHEDULES,
    SPACE,
    TIMING,
    calibrated,
    evidence_of,
    hull_steps,
    picked,
)

LAYERS = 3
FULL = torch.zeros(LAYERS, HEADS, dtype=torch.long)


@pytest.fixture
def evidence() -> Evidence:
    return evidence_of(LAYERS)


@cache
def choices(heads: int) -> Tensor:
    """All ways to choose a candidate for each of so many heads, `[ways, heads]`."""
    return torch.tensor(list(product(range(2 * SPACE.slots), repeat=heads)))


def totals(table: Tensor) -> Tensor:
    """Sums over heads for every way to choose."""
    heads = table.flatten(0, 1)
    return heads[torch.arange(len(heads)), choices(len(heads))].sum(-1)


def least(table: Tensor, allowed: Tensor) -> float:
    return table.masked_fill(~allowed, torch.inf).min().item()


@pytest.mark.parametrize("seed", range(6))
def test_SV5_within_the_largest_step_of_the_enumerated_optimum(seed: int) -> None:
    toy = evidence_of(2, seed)
    tables = [toy.tables(schedule) for schedule in SCHEDULES]
    errors, flops = (
        [totals(getattr(each, name)) for each in tables] for name in ("error", "flops")
    )
    for limit in (0.3, 0.45, 0.6, 0.8):
        found = solve(toy, Budget(flops=limit))
        chosen = tables[SCHEDULES.index(found.schedule)]
        assert picked(chosen.flops, found.chosen) / 4 == pytest.approx(found.predicted["flops"])
        assert found.predicted["flops"] <= limit * (1 + 1e-6)
        both = list(zip(errors, flops, strict=True))
        best = min(least(error, cost <= 4 * limit + 1e-9) for error, cost in both)
        step = max(max(hull_steps(t.error[l], t.flops[l])) for t in tables for l in range(2))
        # The error is the mean over the two layers of the sums of their heads.
        assert found.predicted["error"] == pytest.approx(picked(chosen.error, found.chosen) / 2)
        assert -1e-9 <= 2 * found.predicted["error"] - best <= step + 1e-9

        asked = found.predicted["error"]
        cheap = solve(toy, Budget(error=asked))
        assert cheap.predicted["error"] <= asked * (1 + 1e-6)
        lowest = min(least(cost, error <= 2 * asked * (1 + 1e-9)) for error, cost in both)
        step = max(max(hull_steps(t.flops[l], t.error[l])) for t in tables for l in range(2))
        assert -1e-9 <= 4 * cheap.predicted["flops"] - lowest <= step + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_SV5_phases_are_solved_together(seed: int) -> None:
    toy = replace(evidence_of(1, seed), schedules=(Schedule(1, phases=(0.5,)),))
    (tables,) = (toy.tables(schedule) for schedule in toy.schedules)
    errors, flops = totals(tables.error), totals(tables.flops)
    for limit in (0.3, 0.5, 0.8):
        found = solve(toy, Budget(flops=limit))
        assert found.chosen.shape == (2, HEADS)
        assert picked(tables.flops, found.chosen) / 4 == pytest.approx(found.predicted["flops"])
        best = least(errors, flops <= 4 * limit + 1e-9)
        step = max(max(hull_steps(tables.error[row], tables.flops[row])) for row in range(2))
        # The mean over two phases of the sums of their heads.
        assert -1e-9 <= 2 * found.predicted["error"] - best <= step + 1e-9
        # Whoever may choose anew in the middle loses no more.
        alike = toy.tables(Schedule(1, phases=(0.5,)))
        same = alike.error[0] + alike.error[1], alike.flops[0] + alike.flops[1]
        rows = [totals(each[None]) for each in same]
        assert 2 * found.predicted["error"] <= least(rows[0], rows[1] <= 4 * limit) + step
    most = toy.tables(toy.schedules[0]).most_bytes(found.chosen)
    assert most == found.predicted["cache_bytes"]


@pytest.mark.parametrize(
    ("budget", "kind"),
    [(Budget(flops=0.45), "error"), (Budget(flops=0.6), "error"), (Budget(error=0.4), "flops")],
    ids=str,
)
def test_the_best_schedule_wins(evidence: Evidence, budget: Budget, kind: str) -> None:
    alone = [
        solve(replace(evidence, schedules=(schedule,)), budget).predicted[kind]
        for schedule in SCHEDULES
    ]
    assert len(set(alone)) == 3
    for turned in (SCHEDULES, SCHEDULES[::-1]):
        found = solve(replace(evidence, schedules=turned), budget)
        assert found.predicted[kind] == min(alone)
        assert found.schedule == SCHEDULES[alone.index(min(alone))]


@pytest.mark.parametrize("seed", range(4))
def test_the_limit_of_bytes_is_kept(seed: int) -> None:
    toy = evidence_of(2, seed)
    tables = [toy.tables(schedule) for schedule in SCHEDULES]
    free = solve(toy, Budget(flops=0.45))
    assert free.predicted["cache_bytes"] > 0
    errors = []
    for share in (0.0, 0.3, 0.6, 0.9, 1.0):
        most = int(share * free.predicted["cache_bytes"])
        found = solve(toy, Budget(flops=0.45, cache_bytes=most))
        chosen = tables[SCHEDULES.index(found.schedule)]
        kept = picked(chosen.bytes, found.chosen)
        assert kept == found.predicted["cache_bytes"] <= most
        assert found.predicted["flops"] <= 0.45 * (1 + 1e-6)
        best = min(
            least(totals(t.error), (totals(t.flops) <= 1.8 + 1e-9) & (totals(t.bytes) <= most))
            for t in tables
        )
        step = max(max(hull_steps(t.error[l], t.flops[l])) for t in tables for l in range(2))
        assert -1e-9 <= 2 * found.predicted["error"] - best <= step
        errors.append(found.predicted["error"])
        if most:
            continue
        own = [toy.candidate(l, h, int(found.chosen[l, h])) for l in range(2) for h in range(2)]
        assert not any(isinstance(each.remainder, Complement) for each in own)
        # The LSE for further searches counts as well.
        renewed = found.schedule.renews_again and any(isinstance(c.pattern, Scored) for c in own)
        assert not renewed
    assert errors[0] > errors[-1] == free.predicted["error"]
    # One cache fits, and is used.
    one = solve(toy, Budget(flops=0.45, cache_bytes=2688)).predicted
    assert one["cache_bytes"] == 2688
    assert one["error"] < errors[0]
    none = solve(toy, Budget(error=errors[0] / 2, cache_bytes=0))
    assert none.predicted["cache_bytes"] == 0
    assert none.predicted["error"] <= errors[0] / 2 * (1 + 1e-6)
    assert none.predicted["flops"] > solve(toy, Budget(error=errors[0] / 2)).predicted["flops"]


def test_a_density_is_of_the_steps_that_are_not_dense(evidence: Evidence) -> None:
    solution = solve(evidence, Budget(density=0.6))
    # A fifth of the steps is dense under two of the schedules; under the third less is lost.
    assert solution.schedule in SCHEDULES[:2]
    predicted = solution.predicted
    assert 0.55 < predicted["density"] <= 0.6 * (1 + 1e-6)
    assert predicted["flops"] == pytest.approx(0.2 + 0.8 * predicted["density"])
    only = replace(evidence, schedules=SCHEDULES[2:])
    other = solve(only, Budget(density=0.6))
    assert other.schedule == SCHEDULES[2]
    assert other.predicted["error"] < predicted["error"]
    assert solve(evidence, Budget(flops=1.0)).predicted["density"] == pytest.approx(1)


def test_flops_and_error_are_two_ways_to_one_front(evidence: Evidence) -> None:
    dense = solve(evidence, Budget(flops=0.5))
    same = solve(evidence, Budget(error=dense.predicted["error"]))
    assert same.predicted["flops"] <= dense.predicted["flops"] + 0.4 / (LAYERS * HEADS)
    assert same.predicted["error"] <= dense.predicted["error"] * (1 + 1e-6)
    assert solve(evidence, Budget(error=0)).chosen.eq(0).all()
    assert solve(evidence, Budget(flops=1)).chosen.eq(0).all()
    errors = [solve(evidence, Budget(flops=0.3 + 0.05 * n)).predicted["error"] for n in range(15)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0 < errors[0]


def test_predicted_times_follow_amdahl(evidence: Evidence) -> None:
    solution = solve(evidence, Budget(speedup=1.2), TIMING)
    assert solution.times["speedup"] >= 1.2 * (1 - 1e-6)
    flops = solution.predicted["flops"]
    assert solution.times["attention"] == pytest.approx(flops)
    # Of 12 s 5 are attention.
    assert solution.times["seconds"] == pytest.approx(12 - 5 * (1 - flops))
    latency = solve(evidence, Budget(latency=10), TIMING)
    assert latency.times == solution.times
    assert torch.equal(latency.chosen, solution.chosen)
    assert solve(evidence, Budget(speedup=1), TIMING).chosen.eq(0).all()
    assert solve(evidence, Budget(latency=100), TIMING).chosen.eq(0).all()


def test_measured_times_decide_where_there_are_any(evidence: Evidence) -> None:
    # Bands are no faster than full on this device.
    times = evidence.density.clone()
    times[..., 4:8] = 1.0
    timed = replace(evidence, time=times)
    found = solve(timed, Budget(speedup=1.2), TIMING)
    assert not ((found.chosen == 4) | (found.chosen == 6)).any()
    table = timed.tables(found.schedule).time
    assert found.times["attention"] == pytest.approx(picked(table, found.chosen) / 6)
    # A layer of full heads runs the model's own attention, whatever the kernel takes for it.
    slow = replace(evidence, time=torch.full_like(evidence.density, 1.7))

    def attention(chosen: Tensor) -> float:
        return solution_of(slow, chosen, SCHEDULES[0], TIMING).times["attention"]

    assert attention(FULL) == 1.0
    one = FULL.clone()
    one[0, 0] = 4
    assert attention(one) == pytest.approx((0.2 + 0.8 * 1.7 + 1 + 1) / 3)


def test_every_group_of_heads_launches_its_own_calls(evidence: Evidence) -> None:
    timed, often = calibrated(evidence), SCHEDULES[1]

    def attention(*chosen: tuple[int, int]) -> float:
        return solution_of(timed, torch.tensor(chosen), often, TIMING).times["attention"]

    # Found blocks with a cache; a wide and a narrow band; full beside a band. See test_evidence.
    found, wide, narrow, full = 1.024, 0.8, 0.45, 1.2
    together = attention((9, 9), (0, 0), (0, 0))
    assert together == pytest.approx((found + 1 + 1) / 3)
    assert attention((4, 6), (0, 0), (0, 0)) == pytest.approx(((wide + narrow) / 2 + 2) / 3)
    assert attention((0, 6), (0, 0), (0, 0)) == pytest.approx(((full + narrow) / 2 + 2) / 3)
    # Two groups: each launches as often as both were thought to do together.
    apart, launches = (found + wide) / 2, 0.0277 + 0.016
    assert attention((9, 4), (0, 0), (0, 0)) == pytest.approx((apart + launches / 2 + 2) / 3)


@pytest.mark.parametrize("asked", [1.15, 1.2, 1.25])
def test_a_budget_of_time_holds_with_the_launches_of_all_groups(
    evidence: Evidence, asked: float
) -> None:
    timed = calibrated(evidence, launch=0.15)
    found = solve(timed, Budget(speedup=asked), TIMING)
    assert found.times["speedup"] >= asked * (1 - 1e-6)
    again = solution_of(timed, found.chosen, found.schedule, TIMING)
    assert again.times == found.times
    # Heads were assigned as if they shared launches, and would have spent more.
    table = timed.tables(found.schedule)
    first = assign(table.error, table.time, TIMING.cost_of(12 / asked))
    spent = solution_of(timed, first, found.schedule, TIMING).times
    assert spent["speedup"] < asked * (1 - 1e-6)


def test_the_fastest_that_can_be_had_counts_all_launches(evidence: Evidence) -> None:
    timed = calibrated(evidence, launch=0.15)
    fastest = min(
        solution_of(timed, timed.tables(each).time.argmin(-1), each, TIMING).times["seconds"]
        for each in SCHEDULES
    )
    with pytest.raises(ValueError, match=rf"faster than .*x, {fastest:.3g} s;"):
        solve(timed, Budget(latency=1), TIMING)


@pytest.mark.parametrize("budget", [Budget(speedup=3), Budget(latency=1)], ids=str)
def test_out_of_reach_says_what_can_be_had(evidence: Evidence, budget: Budget) -> None:
    message = (
        r"is out of reach: no plan of this search is faster than 1\.50x, 8 s; attention is 42% "
        r"of this run; at 0\.4 of its FLOPs expect at most 1\.33x; ask for less, or run fewer "
        r"steps dense"
    )
    with pytest.raises(ValueError, match=message):
        solve(evidence, budget, TIMING)


def test_too_small_a_budget_says_the_least(evidence: Evidence) -> None:
    message = r"flops=0\.1 is out of reach: the least flops of a plan of this search is 0\.2; ask"
    with pytest.raises(ValueError, match=message):
        solve(evidence, Budget(flops=0.1))
    # Without skip, the least is the narrow band.
    density = evidence.density.clone()
    density[..., 2:4] = torch.inf
    message = r"density=0\.1 is out of reach: the least density of a plan of .* is 0\.25; ask for"
    with pytest.raises(ValueError, match=message):
        solve(replace(evidence, density=density), Budget(density=0.1))
    # Without full, something is lost.
    density[..., 0] = torch.inf
    lossy = replace(evidence, density=density)
    lost = min(lossy.tables(each).error.amin(-1).mean().item() for each in SCHEDULES) * HEADS
    message = f"error=0 is out of reach: the least error of a plan of this search is {lost:.4g};"
    with pytest.raises(ValueError, match=message):
        solve(lossy, Budget(error=0))


def test_what_cannot_be_asked_for(evidence: Evidence) -> None:
    with pytest.raises(ValueError, match=r"speedup=1\.5 cannot be predicted: .* no times"):
        solve(evidence, Budget(speedup=1.5))
    with pytest.raises(ValueError, match="needs the model: search with search_plan"):
        solve(evidence, Budget(psnr=30))


def test_a_large_search_is_resolved_in_seconds() -> None:
    many = evidence_of(40)
    every = tuple(Schedule(first, renew_every=n) for first in range(1, 6) for n in (0, 2, 3, 4, 6))
    start = time.process_time()
    solve(replace(many, schedules=every), Budget(flops=0.4))
    assert time.process_time() - start < 1


# What is promised is what runs.


def budgets(least: float) -> tuple[Budget, ...]:
    """Different ones that can be kept where every plan takes `least` FLOPs."""
    tight, wide = (round(least + share * (1 - least), 3) for share in (0.1, 0.4))
    return (
        Budget(flops=tight),
        Budget(flops=wide),
        Budget(flops=wide, cache_bytes=8000),
        Budget(flops=wide, cache_bytes=0),
        Budget(density=0.9),
        Budget(error=0.002),
    )


ONLINE = ("band", "columns", "scored", "pooled", "complement")


@pytest.mark.parametrize(
    ("family", "kinds", "side"),
    [("wan", KINDS, 64), ("wan", ONLINE, 64), ("cogvideox", ONLINE, 192)],
    ids=["wan", "wan-without-skip", "text"],
)
def test_promised_flops_and_bytes_are_those_of_the_report(
    family: str, kinds: tuple[str, ...], side: int
) -> None:
    pipe = getattr(tiny, family)()
    size: dict[str, Any] = {"height": side, "width": side}
    searched = search_plan(
        pipe, ["a cat"], Budget(flops=1), steps=6, candidates=kinds, frames=9, guidance=5.0,
        block=16, rows=48, anchors=2, **size,
    )  # fmt: skip
    evidence = Evidence.of_plan(searched)
    tables = [evidence.tables(schedule) for schedule in evidence.schedules]
    lowest = min(each.flops.amin(-1).mean().item() for each in tables)
    seen: set[tuple[str, str]] = set()
    phases: set[int] = set()
    for budget in budgets(lowest):
        plan = resolve(searched, budget)
        # The search ran with as long a text as the model takes.
        with enable_sparse_attention(pipe, plan) as hook:
            tiny.generate(pipe, num_inference_steps=6, max_sequence_length=226, **size)
            report = hook.report()
        assert report.flops == pytest.approx(plan.predicted["flops"], rel=1e-6), str(budget)
        assert report.cache_bytes == plan.predicted["cache_bytes"], str(budget)
        seen |= {(pattern.kind, remainder.kind) for pattern, remainder in plan.heads}
        phases.add(len(plan.phases))
    # The budgets ask for different things.
    assert len(seen) >= 4, seen
    assert len(phases) > 1

"""Budgets solved from evidence, baselines beside them, and why heads run what they run."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Radial, Skip
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.baselines import best_uniform, random_assignment
from dit_sparse.search.budget import Budget
from dit_sparse.search.choices import choices
from dit_sparse.search.driver import resolve
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import solution_of, solve
from dit_sparse.search.timing import Timing

LAYERS, HEADS = 3, 2
PATTERNS = (Full(), Skip(), Band(20), Band(6))
COSTS = (1.0, 0.0, 0.6, 0.25)
TIMING = Timing("a device", 10, 8, 1.0, 0.5, 2.0)


@pytest.fixture
def evidence() -> Evidence:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(LAYERS, HEADS, 5, generator=generator)
    error *= torch.tensor([0.0, 3.0, 0.3, 0.8, 0.6])
    cost = torch.tensor((*COSTS, 0.5)).expand(LAYERS, HEADS, 5).clone()
    mass = torch.rand(LAYERS, HEADS, 6, generator=generator)
    return Evidence(
        tuple(f"transformer.blocks.{layer}.attn1" for layer in range(LAYERS)),
        PATTERNS, (3,), TokenGrid(3, 4, 4), 8, error, cost, mass,
    )  # fmt: skip


@pytest.fixture
def plan(evidence: Evidence) -> Plan:
    full = torch.zeros(LAYERS, HEADS, dtype=torch.long)
    return Plan(
        {"transformer": ModelFingerprint("WanTransformer3DModel", LAYERS, HEADS, 12, "0" * 64)},
        evidence.assignment(full),
        Schedule(dense_first=2),
        grid=(3, 4, 4),
        block=8,
        provenance={"search": evidence.description()},
        evidence=evidence.arrays(),
        timing={"dense": TIMING.to_dict()},
    )


def test_density_and_error_are_two_ways_to_one_front(evidence: Evidence) -> None:
    dense = solve(evidence, Budget(density=0.4))
    assert dense.predicted["density"] <= 0.4
    same = solve(evidence, Budget(error=dense.predicted["error"]))
    # Each is within one step of the front: a head's, from full to the nearest band.
    assert abs(same.predicted["density"] - dense.predicted["density"]) <= 0.4 / (LAYERS * HEADS)
    assert same.predicted["error"] <= dense.predicted["error"] * (1 + 1e-6)
    assert solve(evidence, Budget(error=0)).chosen.eq(0).all()


def test_predicted_times_follow_amdahl(evidence: Evidence) -> None:
    solution = solve(evidence, Budget(speedup=1.2), TIMING)
    assert solution.times["speedup"] >= 1.2
    density = solution.predicted["density"]
    assert solution.times["seconds"] == pytest.approx(TIMING.seconds(density))
    assert solve(evidence, Budget(latency=10), TIMING).times["seconds"] <= 10
    assert solve(evidence, Budget(speedup=1), TIMING).chosen.eq(0).all()
    assert solve(evidence, Budget(latency=100), TIMING).chosen.eq(0).all()


def test_measured_times_decide_where_there_are_any(evidence: Evidence) -> None:
    # Bands are no faster than full on this device.
    time = evidence.cost.clone()
    time[..., 2:4] = 1.0
    timed = replace(evidence, time=time)
    found = solve(timed, Budget(speedup=1.2), TIMING)
    assert not (found.chosen == 2).any()
    assert found.times["attention"] == pytest.approx(
        time.gather(-1, found.chosen[..., None]).mean().item()
    )
    # A layer of full heads runs the model's own attention, whatever the kernel takes for it.
    slow = replace(evidence, time=torch.full_like(evidence.cost, 1.7))
    chosen = torch.zeros(LAYERS, HEADS, dtype=torch.long)
    assert solution_of(slow, chosen, TIMING).times["attention"] == 1.0
    chosen[0, 0] = 2
    assert solution_of(slow, chosen, TIMING).times["attention"] == pytest.approx((1.7 + 1 + 1) / 3)


@pytest.mark.parametrize("budget", [Budget(speedup=3), Budget(latency=1)], ids=str)
def test_out_of_reach_says_what_can_be_had(evidence: Evidence, budget: Budget) -> None:
    message = (
        r"is out of reach: no plan of this search is faster than 1\.50x, 8 s; attention is 42% "
        r"of this run; at density 0\.4 expect at most 1\.25x; ask for less"
    )
    with pytest.raises(ValueError, match=message):
        solve(evidence, budget, TIMING)


def test_times_that_were_not_measured_cannot_be_asked_for(evidence: Evidence) -> None:
    with pytest.raises(ValueError, match=r"speedup=1\.5 cannot be predicted: .* no times"):
        solve(evidence, Budget(speedup=1.5))


def test_random_assignment_costs_as_much_and_is_its_own(evidence: Evidence) -> None:
    state = torch.get_rng_state()
    drawn = [random_assignment(evidence, 0.4, seed) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(random_assignment(evidence, 0.4, 3), drawn[3])
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 10
    densities = [solution_of(evidence, each).predicted["density"] for each in drawn]
    assert all(0.3 < density <= 0.4 + 1e-6 for density in densities)
    best = solve(evidence, Budget(density=0.4)).predicted["error"]
    assert all(solution_of(evidence, each).predicted["error"] >= best for each in drawn)


def test_random_assignment_takes_no_candidate_that_a_head_lacks(evidence: Evidence) -> None:
    evidence.cost[1, :, 4] = torch.inf
    for seed in range(20):
        assert not (random_assignment(evidence, 0.9, seed)[1] == 4).any()


def test_best_uniform_is_the_best_of_all(evidence: Evidence) -> None:
    chosen = best_uniform(evidence, 0.7)
    assert chosen.unique().numel() == 1
    totals = evidence.error[..., [1, 2, 3]].sum((0, 1)).tolist()
    assert int(chosen[0, 0]) == (1, 2, 3)[totals.index(min(totals))]
    assert best_uniform(evidence, 1.0).eq(0).all()
    assert best_uniform(evidence, 0.1).eq(1).all()


def test_baselines_refuse_what_is_too_little(evidence: Evidence) -> None:
    evidence.cost[..., 1] = 0.2
    with pytest.raises(ValueError, match=r"a density of 0.1 or less, the cheapest has 0.2000"):
        random_assignment(evidence, 0.1, 0)
    with pytest.raises(ValueError, match=r"a density of 0.1 or less, the cheapest has 0.2000"):
        best_uniform(evidence, 0.1)


def test_choices_say_what_every_head_gave_up(plan: Plan, evidence: Evidence) -> None:
    solved = resolve(plan, Budget(density=0.4))
    found = choices(solved)
    assert found is not None
    assert found.cost == "block density"
    for layer, (name, row) in enumerate(found.layers.items()):
        for head, choice in enumerate(row):
            patterns = [str(evidence.pattern(layer, head, c)) for c in range(5)]
            errors, costs = evidence.error[layer, head], evidence.cost[layer, head]
            won = patterns.index(str(solved.assignment[name][head]))
            assert choice.winner.pattern == patterns[won]
            assert choice.winner.error == errors[won].item()
            assert choice.winner.cost == costs[won].item()
            loss = (errors + found.price * costs).tolist()
            loss[won] = float("inf")
            assert choice.runner_up is not None
            assert choice.runner_up.pattern == patterns[loss.index(min(loss))]
            assert (choice.full.error, choice.full.cost) == (0.0, 1.0)
    predicted = solved.provenance["predicted"]
    assert found.point == pytest.approx((predicted["density"], predicted["error"]))
    assert found.curve[0][0] == 0
    assert found.curve[-1] == (1.0, 0.0)
    assert found.note == TIMING.expectation(predicted["density"], predicted["density"])


def test_choices_know_columns_and_leave_foreign_plans_alone(plan: Plan) -> None:
    evidence = Evidence.of_plan(plan)
    heads = evidence.assignment(torch.full((LAYERS, HEADS), 4))
    assert all(isinstance(p, Columns) for row in heads.values() for p in row)
    found = choices(replace(plan, assignment=heads))
    assert found is not None
    assert found.point[0] == 0.5
    foreign = {name: (Radial(),) * HEADS for name in heads}
    assert choices(replace(plan, assignment=foreign)) is None
    assert choices(replace(plan, evidence={})) is None


def changed(table: Tensor, value: float) -> Tensor:
    return table.index_fill(-1, torch.tensor([2]), value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("error", lambda t: changed(t, float("nan")), "at least 0, error holds others"),
        ("cost", lambda t: changed(t, -1.0), "at least 0, cost holds others"),
        ("cost", lambda t: t[:, :1], "should have the shape"),
        ("time", lambda t: t[..., :-1], "should have the shape .* time has"),
        ("column_mass", lambda t: t[..., :-1], "should have 6 key blocks"),
        ("error", lambda t: t + 0.1, "full attention among its candidates, without error"),
    ],
    ids=["nan", "negative", "heads", "time", "mass", "full-errs"],
)
def test_tampered_evidence_is_refused(plan: Plan, name: str, change: Any, message: str) -> None:
    arrays = plan.evidence | {"time": plan.evidence["cost"]}
    with pytest.raises(ValueError, match=f"the plan's evidence .*{message}.*search again"):
        resolve(replace(plan, evidence=arrays | {name: change(arrays[name])}), Budget(density=0.5))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", ["transformer.blocks.0.attn1"], "not of the plan's layers"),
        ("candidates", [{"kind": "guess"}], "search is incomplete"),
        ("column_counts", [3, 4], "should have the shape"),
        ("block", None, "blocks of at least 1 token, came None"),
    ],
)
def test_tampered_description_is_refused(plan: Plan, key: str, value: Any, message: str) -> None:
    search = plan.provenance["search"] | {key: value}
    with pytest.raises(ValueError, match=message):
        resolve(replace(plan, provenance={"search": search}), Budget(density=0.5))


def test_tampered_times_are_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="timing is incomplete"):
        resolve(replace(plan, timing={"dense": {"steps": 3}}), Budget(density=0.5))


@pytest.mark.parametrize("key", ["layers", "candidates", "column_counts", "grid", "block"])
def test_incomplete_description_is_refused(plan: Plan, key: str) -> None:
    search = {name: v for name, v in plan.provenance["search"].items() if name != key}
    with pytest.raises(ValueError, match=f"the plan's search is incomplete .*{key}"):
        resolve(replace(plan, provenance={"search": search}), Budget(density=0.5))

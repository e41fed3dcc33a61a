"""What follows from errors and densities for one schedule, written out by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.pattern import Band, Columns, Full, Radial, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve
from dit_sparse.search.space import Candidate
from tests.searched import (
    GRID,
    HEADS,
    MASS,
    PHASED,
    SCHEDULES,
    SEEN,
    STEPS,
    calibrated,
    evidence_of,
    plan_of,
)

LAYERS = 3
OFTEN = SCHEDULES[1]
"""Renews at 2, 5 and 8 of 10 steps."""


@pytest.fixture
def evidence() -> Evidence:
    return evidence_of(LAYERS)


@pytest.fixture
def plan(evidence: Evidence) -> Plan:
    return plan_of(evidence)


def interpolated(places: Sequence[int], values: Sequence[float], at: float) -> float:
    if at <= places[0]:
        return values[0]
    for left, right in zip(range(len(places)), range(1, len(places)), strict=False):
        if at <= places[right]:
            share = (at - places[left]) / (places[right] - places[left])
            return (1 - share) * values[left] + share * values[right]
    return values[-1]


def mean_error(sighted: Tensor, errs: list[tuple[int, int]]) -> float:
    """Of (step of the renewal, age) over the steps of a generation; `[anchors, ages]`."""
    total = 0.0
    for renewed, age in errs:
        rows = [interpolated(SEEN.ages, row, age) for row in sighted.double().tolist()]
        total += interpolated(SEEN.anchors, rows, renewed)
    return total / STEPS


CASES = [
    # candidate, schedule, FLOPs, (renewed, age) of the steps that err
    (Candidate(Band(20)), SCHEDULES[0], 0.2 + 0.8 * 0.6, [(s, 0) for s in range(2, 10)]),
    (Candidate(Band(20)), OFTEN, 0.2 + 0.8 * 0.6, [(s, 0) for s in range(2, 10)]),
    (Candidate(Skip()), SCHEDULES[2], 0.4, [(s, 0) for s in range(4, 10)]),
    (Candidate(Skip(), Complement()), SCHEDULES[0], 0.3, [(2, age) for age in range(1, 8)]),
    (
        Candidate(Band(6), Complement()), OFTEN, 0.5 + 0.8 * 0.25,
        [(2, 1), (2, 2), (5, 1), (5, 2), (8, 1)],
    ),
    (Candidate(MASS), SCHEDULES[0], 0.3 + 0.05 + 0.7 * 0.4, [(2, age) for age in range(1, 8)]),
    (
        Candidate(MASS), OFTEN, 0.3 + 0.15 + 0.7 * 0.4,
        [(2, 1), (2, 2), (5, 0), (5, 1), (5, 2), (8, 0), (8, 1)],
    ),
    (
        Candidate(MASS, Complement()), OFTEN, 0.5 + 0.15 + 0.8 * 0.4,
        [(2, 1), (2, 2), (5, 1), (5, 2), (8, 1)],
    ),
    (Candidate(Full()), OFTEN, 1.0, []),
]  # fmt: skip


@pytest.mark.parametrize(("candidate", "schedule", "flops", "errs"), CASES, ids=str)
def test_tables_by_hand(
    evidence: Evidence,
    candidate: Candidate,
    schedule: Schedule,
    flops: float,
    errs: list[tuple[int, int]],
) -> None:
    number = evidence.number(1, 1, candidate)
    assert number is not None
    tables = evidence.tables(schedule)
    assert (tables.schedule, tables.steps) == (schedule, STEPS)
    assert tables.dense == schedule.dense_first / STEPS
    assert tables.flops[1, 1, number].item() == pytest.approx(flops)
    assert tables.time[1, 1, number].item() == pytest.approx(flops)
    expected = mean_error(evidence.error[1, 1, number], errs)
    assert tables.error[1, 1, number].item() == pytest.approx(expected)


def test_tables_of_phases_by_hand(evidence: Evidence) -> None:
    # Steps 0 to 3, of which the first is dense, 4 to 6, and 7 to 9.
    spans = (
        [(s, 0) for s in (1, 2, 3)], [(s, 0) for s in (4, 5, 6)], [(s, 0) for s in (7, 8, 9)]
    )  # fmt: skip
    cached = ([(1, 1), (1, 2)], [(4, 1), (4, 2)], [(7, 1), (7, 2)])
    tables = evidence.tables(PHASED)
    assert tables.flops.shape[:2] == (3 * LAYERS, HEADS)
    for candidate, errs, flops in (
        (Candidate(Band(20)), spans, (0.1 + 0.3 * 0.6, 0.3 * 0.6, 0.3 * 0.6)),
        (Candidate(Skip(), Complement()), cached, (0.2, 0.1, 0.1)),
    ):
        number = evidence.number(1, 1, candidate)
        assert number is not None
        for phase in range(3):
            row = phase * LAYERS + 1
            # Three times, so that the mean over all rows is that of the generation.
            assert tables.flops[row, 1, number].item() == pytest.approx(3 * flops[phase])
            expected = 3 * mean_error(evidence.error[1, 1, number], errs[phase])
            assert tables.error[row, 1, number].item() == pytest.approx(expected)


def test_a_phase_that_runs_dense_keeps_nothing(evidence: Evidence) -> None:
    number = evidence.number(0, 0, Candidate(Skip(), Complement()))
    kept = evidence.tables(Schedule(dense_first=4, phases=(0.4,))).bytes[:, 0, number]
    assert kept.tolist() == [0] * LAYERS + [2 * 48 * (12 * 2 + 4)] * LAYERS


def test_plans_of_phases_and_their_candidates(evidence: Evidence, plan: Plan) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 10, (3 * LAYERS, HEADS), generator=generator)
    chosen[chosen == 1] = 0
    made = evidence.planned(plan, chosen, PHASED)
    assert len(made.phases) == 3
    assert made.schedule == PHASED
    found = evidence.chosen(made)
    assert found is not None
    assert torch.equal(found, chosen)
    first = evidence.candidate(0, 1, int(chosen[2 * LAYERS, 1]))
    last = made.phases[2]
    assert last.assignment[evidence.layers[0]][1] == first.pattern
    assert last.remainders_of(evidence.layers[0])[1] == first.remainder
    again = Evidence.of_plan(replace(made, evidence=evidence.arrays()))
    assert again.schedules == SCHEDULES


def test_bytes_are_of_caches_and_of_lses_that_are_needed_again(evidence: Evidence) -> None:
    # Two guidance branches, 48 tokens, 12 channels in float16 and a float32 beside them.
    cache, lse = 2 * 48 * (12 * 2 + 4), 2 * 48 * 4

    def kept(candidate: Candidate, schedule: Schedule) -> float:
        number = evidence.number(0, 1, candidate)
        assert number is not None
        return evidence.tables(schedule).bytes[0, 1, number].item()

    once, again = SCHEDULES[0], OFTEN
    assert kept(Candidate(Band(6)), again) == 0
    assert kept(Candidate(Band(6), Complement()), once) == cache
    assert kept(Candidate(MASS), once) == 0
    assert kept(Candidate(MASS), again) == lse
    assert kept(Candidate(MASS, Complement()), again) == cache
    wide = replace(evidence, head_dim=(24, 12, 12), copies=1)
    assert wide.tables(once).bytes[:, 0, 3].tolist() == [48 * 52, cache / 2, cache / 2]


def test_other_numbers_of_steps(evidence: Evidence) -> None:
    number = evidence.number(0, 0, Candidate(Skip(), Complement()))
    tables = evidence.tables(Schedule(dense_first=4), 20)
    # The renewal at 4 of 20 is that at 2 of 10, the ages after it count half.
    halves = [(2, age / 2) for age in range(1, 16)]
    sighted = evidence.error[0, 0, number].double()
    total = sum(interpolated(SEEN.ages, sighted[0].tolist(), age) for _, age in halves)
    assert tables.error[0, 0, number].item() == pytest.approx(total / 20)
    assert tables.flops[0, 0, number].item() == pytest.approx(5 / 20)
    assert tables.dense == 0.2


def test_measured_times_stand_beside_flops(evidence: Evidence) -> None:
    timed = replace(evidence, time=(2 * evidence.density).contiguous())
    tables = timed.tables(OFTEN)
    number = timed.number(0, 0, Candidate(MASS, Complement()))
    assert tables.flops[0, 0, number].item() == pytest.approx(0.5 + 0.15 + 0.8 * 0.4)
    assert tables.time[0, 0, number].item() == pytest.approx(0.5 + 0.15 + 0.8 * 0.8)


@pytest.mark.parametrize(
    ("candidate", "time", "launch"),
    [
        # 2 dense steps; 3 renewals with a dense pass, a sparse one, a search and a cache taken;
        # 5 sparse passes to which it is applied.
        (
            Candidate(MASS, Complement()),
            2 + 3 * (1.25 + 0.5 + 0.1 + 0.03) + 5 * (0.5 + 0.02),
            3 * (0.02 + 0.02 + 0.01 + 0.004) + 5 * (0.02 + 0.003),
        ),
        # The first of 3 searches has a dense pass, the others sparse ones.
        (Candidate(MASS), 2 + 1.25 + 7 * 0.5 + 3 * 0.1, 0.02 + 7 * 0.02 + 3 * 0.01),
        (
            Candidate(Band(6), Complement()),
            2 + 3 * (1.25 + 0.3125 + 0.03) + 5 * (0.3125 + 0.02),
            3 * (0.02 + 0.02 + 0.004) + 5 * (0.02 + 0.003),
        ),
        (Candidate(Band(20)), 2 + 8 * 0.75, 8 * 0.02),
        (Candidate(Full()), 2 + 8 * 1.25, 8 * 0.02),
    ],
    ids=lambda value: str(value) if isinstance(value, Candidate) else "",
)
def test_times_of_calls_by_hand(
    evidence: Evidence, candidate: Candidate, time: float, launch: float
) -> None:
    timed = calibrated(evidence)
    number = timed.number(1, 1, candidate)
    assert number is not None
    tables, plain = timed.tables(OFTEN), evidence.tables(OFTEN)
    assert tables.time[1, 1, number].item() == pytest.approx(time / 10)
    assert tables.launch[1, 1, number].item() == pytest.approx(launch / 10)
    assert torch.equal(tables.flops, plain.flops)
    assert not plain.launch.any()


def test_times_of_calls_in_phases_by_hand(evidence: Evidence) -> None:
    tables = calibrated(evidence).tables(PHASED)
    number = evidence.number(1, 1, Candidate(MASS, Complement()))
    assert number is not None
    # 1, 2, 3, then 4, 5, 6, then 7, 8, 9 are sparse; each phase renews at its first.
    renewing, reusing = 1.25 + 0.5 + 0.1 + 0.03, 0.5 + 0.02
    own = renewing + 2 * reusing
    times = tables.time[[1, 1 + LAYERS, 1 + 2 * LAYERS], 1, number]
    assert times.tolist() == pytest.approx([3 * (1 + own) / 10, 3 * own / 10, 3 * own / 10])
    launch = 0.02 + 0.02 + 0.01 + 0.004 + 2 * (0.02 + 0.003)
    assert tables.launch[1::LAYERS, 1, number].tolist() == pytest.approx([3 * launch / 10] * 3)


def test_heads_that_share_calls_are_a_group(evidence: Evidence) -> None:
    def heads(*numbers: int) -> list[tuple[int, ...]]:
        return [group.heads for group in evidence.groups(torch.tensor(numbers))]

    # Full, a band, columns and skipping; found blocks; a band and columns with caches.
    assert sorted(heads(0, 4, 8, 10, 7, 2, 8, 11)) == [(0, 1, 3, 5), (2, 6), (4, 7)]
    assert sorted(heads(8, 9)) == [(0,), (1,)]
    assert heads(0, 0) == []


def test_what_a_head_lacks_is_infinite_in_every_table(evidence: Evidence) -> None:
    evidence.error[1, 0, 4] = torch.inf
    for schedule in SCHEDULES:
        tables = evidence.tables(schedule)
        for table in (tables.error, tables.flops, tables.time):
            missing = table.isposinf()
            assert missing[..., 1].all()
            assert missing[1, 0].nonzero()[:, 0].tolist() == [1, 4]
            assert missing.sum() == LAYERS * HEADS + 1


def test_candidates_have_numbers(evidence: Evidence) -> None:
    for layer in range(LAYERS):
        for number in range(12):
            own = evidence.candidate(layer, 1, number)
            assert evidence.number(layer, 1, own) == number
    columns = evidence.candidate(2, 1, 11)
    assert isinstance(columns.pattern, Columns)
    best = evidence.column_mass[2, 1].argsort(descending=True)[:3]
    assert columns.pattern.blocks == tuple(sorted(best.tolist()))
    assert columns.remainder == Complement()
    assert str(columns) == "columns 3/6 with complement float16"
    assert str(evidence.candidate(0, 0, 2)) == "skip"
    assert evidence.full == 0
    assert evidence.number(0, 0, Candidate(Radial())) is None
    assert evidence.number(0, 0, Candidate(Skip(), Pooled())) is None
    other = Columns(tuple(sorted(set(range(6)) - set(best.tolist()))), 8, GRID.shape)
    assert evidence.number(2, 1, Candidate(other)) is None


def test_assignment_names_remainders_where_there_are_any(evidence: Evidence, plan: Plan) -> None:
    chosen = torch.tensor([[0, 2], [3, 6], [8, 9]])
    made = evidence.planned(plan, chosen, SCHEDULES[0])
    patterns, remainders = made.assignment, made.remainders
    first, second, third = evidence.layers
    assert patterns == {first: (Full(), Skip()), second: (Skip(), Band(6)), third: (MASS, MASS)}
    assert remainders == {second: (Complement(), Drop()), third: (Drop(), Complement())}


def test_evidence_travels_in_the_plan(evidence: Evidence, plan: Plan) -> None:
    came = Evidence.of_plan(plan)
    for name in ("layers", "space", "sightings", "schedules", "grid", "block", "head_dim"):
        assert getattr(came, name) == getattr(evidence, name)
    assert came.copies == 2
    assert came.time is None
    for name, table in evidence.arrays().items():
        assert torch.equal(getattr(came, name), table)
    timed = replace(plan, evidence=plan.evidence | {"time": evidence.density})
    assert Evidence.of_plan(timed).time is evidence.density
    assert Evidence.of_plan(timed).stage_time is None
    own = calibrated(evidence)
    arrived = Evidence.of_plan(plan_of(own))
    for name in ("time", "stage_time", "launch_time"):
        assert torch.equal(getattr(arrived, name), getattr(own, name))


def changed(table: Tensor, value: float) -> Tensor:
    return table.index_fill(2, torch.tensor([2]), value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("error", lambda t: changed(t, math.nan), "at least 0, error holds others"),
        ("density", lambda t: changed(t, -1.0), "at least 0, density holds others"),
        ("density", lambda t: t[:, :1], "should have the shape"),
        ("error", lambda t: t[..., :1], "should have the shape .* error has"),
        ("time", lambda t: t[..., :-1], "should have the shape .* time has"),
        ("stage_time", lambda t: t[:-1], r"should have the shape \(12, 3\), stage_time has"),
        ("launch_time", lambda t: -t, "at least 0, launch_time holds others"),
        ("column_mass", lambda t: t[..., :-1], "should have 6 key blocks"),
        ("error", lambda t: t + 0.1, "full attention among its candidates, without error"),
    ],
    ids=["nan", "negative", "heads", "ages", "time", "stages", "launches", "mass", "full-errs"],
)
def test_tampered_evidence_is_refused(plan: Plan, name: str, change: Any, message: str) -> None:
    arrays = calibrated(Evidence.of_plan(plan)).arrays()
    with pytest.raises(ValueError, match=f"the plan's evidence .*{message}.*search again"):
        resolve(replace(plan, evidence=arrays | {name: change(arrays[name])}), Budget(flops=0.5))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers", ["transformer.blocks.0.attn1"], "not of the plan's layers"),
        ("patterns", [{"kind": "guess"}], "search is incomplete"),
        ("patterns", [{"kind": "skip"}], "should have full attention and dropping"),
        ("remainders", [{"kind": "pooled"}], "should have full attention and dropping"),
        ("remainders", [{"kind": "guess"}], "search is incomplete"),
        ("schedules", [{"dense": 3}], "search is incomplete"),
        ("sightings", {"steps": 10, "anchors": [2], "ages": [0]}, "should have the shape"),
        ("column_counts", [3, 4], "should have the shape"),
        ("block", None, "blocks of at least 1 token, came None"),
        ("head_dim", [12], "head_dim for each of 3 layers"),
    ],
    ids=str,
)
def test_tampered_description_is_refused(plan: Plan, key: str, value: Any, message: str) -> None:
    search = plan.provenance["search"] | {key: value}
    with pytest.raises(ValueError, match=message):
        resolve(replace(plan, provenance={"search": search}), Budget(flops=0.5))


def test_incomplete_description_is_refused(plan: Plan) -> None:
    for key in plan.provenance["search"]:
        search = {name: v for name, v in plan.provenance["search"].items() if name != key}
        with pytest.raises(ValueError, match=f"the plan's search is incomplete .*{key}"):
            resolve(replace(plan, provenance={"search": search}), Budget(flops=0.5))

"""Courses against what runs, and what sightings make of them, by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Pattern, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.kernels.score import Mass, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.group_attention import GroupAttention, Place
from dit_sparse.pipelines.heads import HeadGroup
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.parts import Operands
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.course import (
    DECAY,
    FLOOR,
    Course,
    Keeping,
    Sightings,
    courses,
    schedules,
    sightings,
)
from dit_sparse.search.space import Candidate, blocks_like, search_cost
from tests import tiny

GRID = TokenGrid(3, 4, 4)
BLOCK = 8
MASS = Scored(Mass(rows=4), TopRow(0.4))
SAMPLED = Scored(Sampled(4), TopRow(0.3), "gilbert")
PRODUCT = tuple(
    (pattern, remainder)
    for pattern in (Band(6), MASS, SAMPLED, Skip())
    for remainder in (Drop(), Pooled(2), Rescale(), Complement("float8"))
)
SCHEDULES = (
    Schedule(),
    Schedule(dense_first=2, dense_last=1),
    Schedule(dense_first=1, renew_every=2),
    Schedule(renew_every=3, renew_at=(1, 2)),
    Schedule(dense_first=2, renew_at=(1, 4), dense_last=2),
    Schedule(dense_first=1, phases=(0.4, 0.7)),
    Schedule(renew_every=2, phases=(0.5,), dense_last=1),
)


def course(keeping: Keeping, schedule: Schedule, steps: int) -> Course:
    """Of a whole generation, whose phases all do the same."""
    every = courses(keeping, schedule, steps)
    assert len(every) == len(schedule.phases) + 1
    return Course(
        steps,
        sum(own.dense for own in every),
        sum(own.exact for own in every),
        sum(own.sparse for own in every),
        sum(own.searches for own in every),
        tuple(err for own in every for err in own.errs),
    )


def keeping(pattern: Pattern, remainder: Remainder) -> Keeping:
    return Keeping.of(pattern, remainder)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.wan(layers=1)


@pytest.mark.parametrize(
    ("pattern", "remainder"), PRODUCT, ids=[f"{p.kind}-{r.kind}" for p, r in PRODUCT]
)
def test_predicted_flops_are_those_of_the_report(
    pipe: Any, pattern: Pattern, remainder: Remainder
) -> None:
    steps = 7
    density = blocks_like(Candidate(pattern, remainder), GRID, BLOCK).density().weighted
    search = search_cost(pattern, BLOCK)
    assert (search > 0) == isinstance(pattern, Scored)
    for schedule in SCHEDULES:
        plan = Plan.uniform(pipe, pattern, schedule, remainder, block=BLOCK)
        with enable_sparse_attention(pipe, plan) as hook:
            tiny.generate(pipe, num_inference_steps=steps)
            report = hook.report()
        expected = course(keeping(pattern, remainder), schedule, steps)
        predicted = expected.cost(*torch.tensor([density, search]).double()).item()
        assert predicted == pytest.approx(report.flops, rel=1e-6), str(schedule)
        assert report.sparse_calls == 2 * len(expected.errs)
        assert sum(report.dense_calls.values()) == 2 * (steps - len(expected.errs))


def any_schedule() -> st.SearchStrategy[Schedule]:
    few = st.integers(0, 3)
    return st.builds(
        Schedule,
        dense_first=few,
        dense_last=st.integers(0, 2),
        renew_every=few,
        renew_at=st.lists(st.integers(0, 8), max_size=2).map(tuple),
    )


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(PRODUCT), any_schedule(), st.integers(1, 9))
def test_a_course_is_that_of_the_attention(
    candidate: tuple[Pattern, Remainder], schedule: Schedule, steps: int
) -> None:
    pattern, remainder = candidate
    group = HeadGroup((0,), (pattern,), remainder)
    attention = GroupAttention([group], schedule, BLOCK, "reference", None)
    grid = TokenGrid(1, 4, 6)
    place = Place("cond", "layer", 0, 0)
    generator = torch.Generator().manual_seed(0)
    flops, errs = 0.0, []
    for step in range(steps):
        if schedule.dense(step, steps):
            flops += 1
            continue
        query, key, value = torch.randn(3, 1, grid.tokens, 1, 4, generator=generator)
        place = Place("cond", "layer", 0, step)
        computed = attention(group, place, Operands(query, key, value, None), grid)
        flops += computed.flops
        if not computed.dense:
            memory = attention.memory
            renewed = [memory.found.get(place.key), memory.kept.get(place.key)]
            last = {kept.step for kept in renewed if kept is not None} or {step}
            assert len(last) == 1
            errs.append((step, step - last.pop()))
    expected = course(keeping(pattern, remainder), schedule, steps)
    assert expected.errs == tuple(errs)
    made = [attention.stopwatch.lap(name).count for name in ("attention", "search")]
    assert made == [expected.exact + expected.sparse, expected.searches]
    density = blocks_like(Candidate(pattern, remainder), grid, BLOCK).density().weighted
    both = torch.tensor([density, search_cost(pattern, BLOCK)]).double()
    assert expected.cost(*both).item() == pytest.approx(flops / steps)


def test_what_is_kept_decides_the_course() -> None:
    schedule = Schedule(dense_first=1, renew_every=2, dense_last=1)
    plain = course(keeping(Band(3), Drop()), schedule, 6)
    assert plain == Course(6, 2, 0, 4, 0, ((1, 0), (2, 0), (3, 0), (4, 0)))
    sampled = course(keeping(SAMPLED, Drop()), schedule, 6)
    assert sampled == Course(6, 2, 0, 4, 2, ((1, 0), (2, 1), (3, 0), (4, 1)))
    # The first search of a mass needs the LSE of dense attention, whose output it returns.
    mass = course(keeping(MASS, Drop()), schedule, 6)
    assert mass == Course(6, 2, 1, 3, 2, ((2, 1), (3, 0), (4, 1)))
    cached = course(keeping(Skip(), Complement()), schedule, 6)
    assert cached == Course(6, 2, 2, 4, 0, ((2, 1), (4, 1)))
    both = course(keeping(MASS, Rescale()), schedule, 6)
    assert both == Course(6, 2, 2, 4, 2, ((2, 1), (4, 1)))
    assert both.calls(cache=True) == (4, 2, 2, 2)
    assert mass.calls(cache=False) == (3, 2, 0, 0)
    assert keeping(Full(), Pooled()) == Keeping(False, False, False)


def test_a_phase_knows_nothing_of_the_one_before() -> None:
    schedule = Schedule(dense_first=1, phases=(0.5, 0.8))
    assert courses(keeping(Band(3), Drop()), schedule, 6) == (
        Course(6, 1, 0, 2, 0, ((1, 0), (2, 0))),
        Course(6, 0, 0, 2, 0, ((3, 0), (4, 0))),
        Course(6, 0, 0, 1, 0, ((5, 0),)),
    )
    assert courses(keeping(MASS, Complement()), schedule, 6) == (
        Course(6, 1, 1, 2, 1, ((2, 1),)),
        Course(6, 0, 1, 2, 1, ((4, 1),)),
        Course(6, 0, 1, 1, 1, ()),
    )
    # Of two steps nothing is left for the last.
    assert courses(keeping(Band(3), Drop()), schedule, 2) == (
        Course(2, 1, 0, 0, 0, ()),
        Course(2, 0, 0, 1, 0, ((1, 0),)),
        Course(2, 0, 0, 0, 0, ()),
    )


@pytest.mark.parametrize(
    "schedule",
    [Schedule(sigma_above=0.5), Schedule(recall=0.9), Schedule(share_branches=True)],
    ids=str,
)
def test_what_is_known_only_while_denoising_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match=r"a search needs a schedule that is known beforehand.*"):
        course(keeping(Band(3), Drop()), schedule, 5)


SEEN = Sightings(12, (2, 6), (0, 1, 3))
EQUAL = torch.ones(2)


def table(*rows: tuple[float, float, float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.double)


@pytest.mark.parametrize(
    ("errs", "expected"),
    [
        (((2, 0),), table((1, 0, 0), (0, 0, 0))),
        (((7, 1),), table((0, 0, 0), (0, 1, 0))),
        # Renewed at 4, half way; age 2 is half way from 1 to 3.
        (((6, 2),), table((0, 0.25, 0.25), (0, 0.25, 0.25))),
        (((3, 0),), table((0.75, 0, 0), (0.25, 0, 0))),
        # Beyond the ends.
        (((0, 0), (11, 9)), table((1, 0, 1), (0, 0, 0))),
        (((11, 0),), table((0, 0, 0), (1, 0, 0))),
    ],
    ids=["seen", "aged", "between", "quarter", "old", "late"],
)
def test_weights_interpolate(errs: tuple[tuple[int, int], ...], expected: Tensor) -> None:
    weights = SEEN.weights(Course(12, 0, 0, 0, 0, errs), EQUAL)
    torch.testing.assert_close(weights, expected / 12)


def test_other_numbers_of_steps_are_carried_over_as_shares() -> None:
    # Step 12 of 24, renewed at 8: step 4 of 12, 2 steps ago.
    weights = SEEN.weights(Course(24, 0, 0, 0, 0, ((12, 4),)), EQUAL)
    torch.testing.assert_close(weights, table((0, 0.25, 0.25), (0, 0.25, 0.25)) / 24)
    # Step 2 of 6, renewed at 1: step 2 of 12, 2 steps ago.
    weights = SEEN.weights(Course(6, 0, 0, 0, 0, ((2, 1),)), EQUAL)
    torch.testing.assert_close(weights, table((0, 0.5, 0.5), (0, 0, 0)) / 6)


@settings(deadline=None)
@given(st.sampled_from(PRODUCT), any_schedule(), st.integers(1, 30))
def test_weights_sum_to_the_share_of_steps_that_err(
    candidate: tuple[Pattern, Remainder], schedule: Schedule, steps: int
) -> None:
    own = course(keeping(*candidate), schedule, steps)
    weights = SEEN.weights(own, EQUAL)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(len(own.errs) / steps)


def test_sightings_say_what_is_looked_at_when() -> None:
    assert SEEN.last == 9
    looked = {step: SEEN.at(step) for step in range(12) if SEEN.at(step)}
    assert looked == {
        2: ((0, 0),), 3: ((0, 1),), 5: ((0, 2),), 6: ((1, 0),), 7: ((1, 1),), 9: ((1, 2),)
    }  # fmt: skip
    assert Sightings(5, (1, 2), (0, 1)).at(2) == ((0, 1), (1, 0))


@pytest.mark.parametrize(
    ("steps", "allowed", "anchors", "expected"),
    [
        (20, schedules(20), 3, Sightings(20, (1, 7, 13), (0, 1, 3, 7, 15))),
        (20, (Schedule(dense_first=4),), 1, Sightings(20, (4,), (0, 1, 3, 7, 15))),
        (20, (Schedule(dense_first=4, dense_last=9),), 2, Sightings(20, (4, 7), (0, 1, 3))),
        (3, (Schedule(dense_first=1),), 5, Sightings(3, (1, 2), (0, 1))),
        (1, (Schedule(),), 3, Sightings(1, (0,), (0,))),
    ],
    ids=["all", "warm-up", "both-ends", "fewer-than-asked", "one-step"],
)
def test_sightings_are_spread_over_the_sparse_steps(
    steps: int, allowed: tuple[Schedule, ...], anchors: int, expected: Sightings
) -> None:
    assert sightings(steps, allowed, anchors) == expected


def test_sightings_need_something_to_look_at() -> None:
    with pytest.raises(ValueError, match="anchors must be at least 1, came 0"):
        sightings(4, (Schedule(),), 0)
    with pytest.raises(ValueError, match=r"keeps 2 first and 2 last steps dense, so none of 4"):
        sightings(4, (Schedule(dense_first=2, dense_last=2),), 3)
    assert schedules(1) == ()
    with pytest.raises(ValueError, match="no schedule to choose from for 1 steps; give schedules"):
        sightings(1, schedules(1), 3)


def test_schedules_cover_a_twentieth_to_a_third_dense() -> None:
    every = schedules(20)
    assert {each.dense_first for each in every} == {1, 2, 3, 4, 6}
    assert {each.renew_every for each in every} == {0, 2, 3, 4, 6, 9}
    assert len(every) == len(set(every)) == 49
    # Of 5 x 4 phased ones the first phase of (0.25, 0.5) has no step left behind 6 dense ones.
    assert sum(bool(each.phases) for each in every) == 19
    assert schedules(4) == (
        Schedule(dense_first=1),
        Schedule(dense_first=1, renew_every=2),
        Schedule(dense_first=1, phases=(0.5,)),
    )


def test_measured_importance_is_interpolated_by_its_logarithm() -> None:
    own = Course(12, 0, 0, 0, 0, ((4, 0), (8, 0)))
    # Steps 0 to 2 count 100, step 4, half way to the second anchor, 10, and those from 6 on 1.
    each = torch.tensor([100.0] * 3 + [10**1.5, 10.0, 10**0.5] + [1.0] * 6, dtype=torch.double)
    each /= each.mean()
    expected = each[4] * table((0.5, 0, 0), (0.5, 0, 0)) + each[8] * table((0, 0, 0), (1, 0, 0))
    weights = SEEN.weights(own, torch.tensor([100.0, 1.0]))
    torch.testing.assert_close(weights, expected / 12)


def test_errors_of_early_steps_count_more_where_nothing_was_measured() -> None:
    early, late = (SEEN.weights(Course(12, 0, 0, 0, 0, ((step, 0),))).sum() for step in (1, 9))
    counts = [math.exp(-DECAY * step / 12) + FLOOR for step in (1, 9)]
    assert (early / late).item() == pytest.approx(counts[0] / counts[1])
    everything = Course(12, 0, 0, 0, 0, tuple((step, 0) for step in range(12)))
    assert SEEN.weights(everything).sum().item() == pytest.approx(1)

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.pipelines.schedule import Schedule


@pytest.mark.parametrize(
    ("first", "last", "dense"),
    [(0, 0, []), (2, 0, [0, 1]), (0, 1, [4]), (1, 2, [0, 3, 4]), (9, 0, [0, 1, 2, 3, 4])],
)
def test_schedule_counts_denoising_steps(first: int, last: int, dense: list[int]) -> None:
    schedule = Schedule(first, last)
    assert [step for step in range(5) if schedule.dense(step, 5)] == dense
    assert schedule.always_sparse == (not dense)


def test_steps_are_dense_above_a_noise_level_whatever_their_number() -> None:
    schedule = Schedule(sigma_above=0.8, dense_last=1)
    for sigmas in ([1.0, 0.9, 0.8, 0.4, 0.1], [1.0, 0.5, 0.1]):
        dense = [schedule.dense(step, len(sigmas), sigma) for step, sigma in enumerate(sigmas)]
        assert dense == [sigma > 0.8 for sigma in sigmas[:-1]] + [True]
    assert not schedule.always_sparse
    with pytest.raises(ValueError, match="dense above a noise level, which the scheduler does no"):
        schedule.dense(0, 5)


def renewals(schedule: Schedule, first: int, steps: int, layer: int = 0) -> list[int]:
    """The steps at which a layer renews that first runs sparse at `first`."""
    found: list[int] = []
    for step in range(first, steps):
        if schedule.renews(step, found[-1] if found else None, layer):
            found.append(step)
    return found


def test_RE5_caches_of_CogVideoX_are_taken_seven_times_in_fifty_steps() -> None:
    schedule = Schedule(dense_first=15, renew_every=5)
    dense = [step for step in range(50) if schedule.dense(step, 50)]
    assert dense == list(range(15))
    assert renewals(schedule, 15, 50) == [15, 20, 25, 30, 35, 40, 45]


def test_AD7_AdaSpa_searches_at_its_tenth_and_thirtieth_step() -> None:
    schedule = Schedule(dense_first=9, renew_at=(29,))
    assert renewals(schedule, 9, 50) == [9, 29]


def test_SD3_SparseD_searches_once() -> None:
    assert renewals(Schedule(dense_first=10), 10, 50) == [10]


def test_a_renewal_that_fell_on_a_skipped_step_is_made_up_for() -> None:
    schedule = Schedule(renew_at=(5,), renew_every=4)
    assert schedule.renews(6, 4)
    assert not schedule.renews(7, 6)
    assert schedule.renews(9, 5)


@settings(deadline=None)
@given(period=st.integers(1, 9), first=st.integers(0, 9), layers=st.integers(1, 20))
def test_staggered_layers_take_turns_of_one_period(period: int, first: int, layers: int) -> None:
    schedule, steps = Schedule(first, renew_every=period, stagger=True), first + 4 * period
    taken = [renewals(schedule, first, steps, layer) for layer in range(layers)]
    together = renewals(Schedule(first, renew_every=period), first, steps)
    assert taken[0] == together
    for layer, own in enumerate(taken):
        turns = {step for step in range(first, steps) if (step - first - layer) % period == 0}
        assert own == sorted(turns | {first})
    # After the first step, which is everybody's, no step has one layer more than another.
    busy = [sum(step in own for own in taken) for step in range(first + 1, steps)]
    assert set(busy) <= {layers // period, -(-layers // period)}


@settings(deadline=None)
@given(
    period=st.integers(1, 6),
    layer=st.integers(0, 12),
    ran=st.sets(st.integers(0, 30), min_size=1),
    at=st.sets(st.integers(0, 30), max_size=2),
)
def test_staggered_turns_that_fell_on_skipped_steps_are_made_up_for(
    period: int, layer: int, ran: set[int], at: set[int]
) -> None:
    schedule = Schedule(renew_every=period, renew_at=tuple(at), stagger=True)
    due = {step for step in range(31) if (step - layer) % period == 0} | at
    last = None
    for step in sorted(ran):
        expected = last is None or any(last < turn <= step for turn in due)
        assert schedule.renews(step, last, layer) == expected
        last = step if expected else last


def test_a_schedule_says_that_its_layers_take_turns() -> None:
    assert "renewed every 5 steps, layers in turn" in str(Schedule(renew_every=5, stagger=True))
    assert "turn" not in str(Schedule(renew_every=5))


@pytest.mark.parametrize("name", ["dense_first", "dense_last", "renew_every"])
@pytest.mark.parametrize("value", [-1, 0.5, True, "3"])
def test_what_is_no_count_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number of denoising steps"):
        Schedule(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"renew_at": (3, -1)}, "renew_at: expected a number of denoising steps >= 0, came -1"),
        ({"sigma_above": 0.0}, "sigma_above: expected a noise level > 0, came 0.0"),
        ({"stagger": True}, "stagger: expected renew_every > 0, came 0, .*; set renew_every, or"),
        ({"recall": 1.5}, r"recall: expected a share in \(0, 1\], came 1.5"),
    ],
)
def test_what_is_out_of_range_is_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**values)


def test_phases_take_their_shares_of_the_steps() -> None:
    schedule = Schedule(dense_first=1, phases=(0.35, 0.6))
    assert schedule.spans(20) == (range(7), range(7, 12), range(12, 20))
    assert [schedule.phase(step, 10) for step in range(10)] == [0] * 4 + [1] * 2 + [2] * 4
    # Of two steps the second is of the last phase, and the one between has none.
    assert schedule.spans(2) == (range(1), range(1, 1), range(1, 2))
    assert [schedule.phase(step, 2) for step in range(2)] == [0, 2]
    assert schedule.shares == pytest.approx((0.35, 0.25, 0.4))
    assert schedule.phase_names == (" from 0%", " from 35%", " from 60%")
    assert str(schedule).endswith("; other patterns from 35%, 60% of the steps on")
    assert schedule.scaled(2.5).phases == schedule.phases
    plain = Schedule()
    assert (plain.spans(3), plain.shares, plain.phase_names) == ((range(3),), (1.0,), ("",))
    # Which patterns run depends on the step.
    assert plain.always_sparse
    assert not Schedule(phases=(0.5,)).always_sparse


@pytest.mark.parametrize("phases", [(0.0,), (1.0,), (0.5, 0.5), (0.6, 0.4), (float("nan"),)])
def test_phases_out_of_order_are_refused(phases: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="phases: expected ascending shares of the steps between"):
        Schedule(phases=phases)

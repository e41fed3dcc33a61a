from dataclasses import replace
from typing import Any

import pytest

from dit_sparse.kernels.pattern import Full
from dit_sparse.pipelines.capture import ATTENTION, OBSERVING
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.stopwatch import Lap, Stopwatch
from dit_sparse.search.timing import StepTimes, Timing, timing_note

# The attention of GNA's HunyuanVideo (METHODS 4.3): 2.23x at a kernel gain of 11.11.
HUNYUAN = Timing("a device", 50, 2.0, 0.607, 0.0)


@pytest.mark.parametrize(("sparse", "speedup"), [(50, 2.23), (35, 1.63)])
def test_amdahl_gives_the_published_figures(sparse: int, speedup: float) -> None:
    cost = (50 - sparse + sparse / 11.11) / 50
    assert HUNYUAN.speedup(cost) == pytest.approx(speedup, abs=0.005)


def test_what_is_not_denoising_limits_the_speedup() -> None:
    timing = replace(HUNYUAN, seconds_outside=100.0)
    assert timing.dense_seconds == 200
    assert timing.share == pytest.approx(0.607 / 2)
    assert timing.speedup(0) == pytest.approx(1 / (1 - 0.607 / 2))


@pytest.mark.parametrize("cost", [0.0, 0.3, 1.0, 1.2])
def test_cost_is_the_inverse_of_seconds(cost: float) -> None:
    timing = Timing("a device", 20, 0.5, 0.4, 3.0)
    assert timing.cost_of(timing.seconds(cost)) == pytest.approx(cost)


def test_the_expectation_reads_as_a_sentence() -> None:
    timing = Timing("a device", 20, 1.0, 0.52, 0.0)
    expected = "attention is 52% of this run; at 0.4 of its FLOPs expect at most 1.45x"
    assert timing.expectation(0.4, 0.4) == expected


class Clock(Stopwatch):
    """A stopwatch that tells what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.laps: dict[str, Lap] = {}

    def now(self) -> float:
        return self.time

    def lap(self, name: str) -> Lap:
        return self.laps.pop(name, Lap())


def test_steps_are_timed_without_warm_up_and_without_the_observer() -> None:
    times, clock = StepTimes(), Clock()
    times.stopwatch = clock
    clock.time = 10.0
    times.begin()
    # The first step: 4 s of encoding, 5 s of observing, 2 s of its own.
    for took, observing in ((11.0, 5.0), (2.0, 0.0), (9.0, 7.0), (2.0, 0.0)):
        clock.time += took
        clock.laps = {OBSERVING: Lap(observing, 4), ATTENTION: Lap(1.2, 4)}
        times.step()
    clock.time += 3.0  # decoding
    times.end()
    found = times.dense(steps=20)
    assert found is not None
    assert found.steps == 20
    assert found.seconds_per_step == pytest.approx(2.0)
    assert found.attention_share == pytest.approx(0.6)
    assert found.seconds_outside == pytest.approx(4.0 + 3.0)
    assert found.dense_seconds == pytest.approx(47)
    assert times.seconds_per_call == pytest.approx(0.3)


def test_a_single_step_is_no_measurement() -> None:
    times = StepTimes()
    times.begin()
    times.step()
    times.end()
    assert times.dense(steps=1) is None
    assert times.seconds_per_call is None


def plan(timing: dict[str, Any] | None) -> Plan:
    return Plan(
        {"transformer": ModelFingerprint("WanTransformer3DModel", 1, 1, 12, "0" * 64)},
        {"transformer.blocks.0.attn1": (Full(),)},
        Schedule(dense_first=4),
        timing={} if timing is None else {"dense": timing},
    )


def test_a_run_that_was_cut_short_says_nothing_of_the_rest() -> None:
    times, clock = StepTimes(), Clock()
    times.stopwatch = clock
    times.begin()
    for _ in range(3):
        clock.time += 2.0
        clock.laps = {ATTENTION: Lap(1.2, 4)}
        times.step()
    assert times.dense(steps=20) is None
    assert times.seconds_per_call == pytest.approx(0.3)


def test_a_plan_keeps_its_timing() -> None:
    timing = Timing("a device", 20, 0.5, 0.4, 3.0)
    assert Timing.of_plan(plan(timing.to_dict())) == timing
    assert Timing.of_plan(plan(None)) is None
    assert plan(timing.to_dict()).digest == plan(None).digest
    expected = timing.expectation(0.4, 0.4)
    predicted = replace(plan(timing.to_dict()), provenance={"predicted": {"flops": 0.4}})
    assert timing_note(predicted) == expected
    slower = replace(predicted, timing=predicted.timing | {"predicted": {"attention": 0.7}})
    assert timing_note(slower) == timing.expectation(0.4, 0.7) != expected
    assert timing_note(plan(timing.to_dict())) is None
    assert timing_note(plan(None)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_share": 1.5}, "timing is impossible"),
        ({"seconds_per_step": 0.0}, "timing is impossible"),
        ({"steps": "many"}, "timing is incomplete"),
        ({"steps": 0}, "timing is impossible"),
        ({"seconds_outside": -1.0}, "timing is impossible"),
        ({"fps": 3}, "timing is incomplete"),
    ],
    ids=str,
)
def test_a_timing_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    timing = Timing("a device", 20, 0.5, 0.4, 3.0).to_dict() | changes
    with pytest.raises(ValueError, match=message):
        Timing.of_plan(plan(timing))

"""Timing: how long a dense generation takes and how much of it is attention, as a search saw it.

From these a plan's time is predicted end to end by Amdahl's law: only self-attention becomes
cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Self

from dit_sparse.kernels.calibration import device_name
from dit_sparse.pipelines.capture import ATTENTION, OBSERVING
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Run:
    """A sparse generation beside a dense one.

    Args:
        cost: share of the dense self-attention that the sparse one was expected to take.
        seconds: of the whole sparse generation.
        dense_seconds: of the whole dense one.
    """

    cost: float
    seconds: float
    dense_seconds: float

    @property
    def speedup(self) -> float:
        """Of the sparse generation over the dense one."""
        return self.dense_seconds / self.seconds


@dataclass(frozen=True, slots=True)
class Timing:
    """One dense generation, and what sparse ones save of it.

    Args:
        device: name of the device, as calibrations know it.
        steps: denoising steps of a generation.
        seconds_per_step: of a dense denoising step, all guidance branches.
        attention_share: of such a step that is self-attention, in [0, 1].
        seconds_outside: what the generation takes besides: encoding the prompt, decoding.
        realised: how much of the time that sparse plans should save they saved when they ran.
    """

    device: str
    steps: int
    seconds_per_step: float
    attention_share: float
    seconds_outside: float
    realised: float = 1.0

    @property
    def dense_seconds(self) -> float:
        """Of the whole dense generation."""
        return self.seconds_outside + self.steps * self.seconds_per_step

    @property
    def share(self) -> float:
        """Of the whole dense generation that is self-attention."""
        return self.steps * self.seconds_per_step * self.attention_share / self.dense_seconds

    def seconds(self, cost: float) -> float:
        """Of a generation whose self-attention costs the share `cost` of a dense one's."""
        return self.dense_seconds - self._saved * (1 - cost)

    def speedup(self, cost: float) -> float:
        """Of such a generation over the dense one."""
        return self.dense_seconds / self.seconds(cost)

    def cost_of(self, seconds: float) -> float:
        """The share of dense attention that leaves a generation `seconds`; below 0 if no share
        is that fast."""
        if not self._saved:
            return 1.0 if seconds >= self.dense_seconds else -1.0
        return 1 - (self.dense_seconds - seconds) / self._saved

    def learned(self, runs: Sequence[Run]) -> Self:
        """The same with what sparse generations showed. Each ran beside a dense one, so that what
        else the machine does slows both.

        How much is realised is the mean over the runs, weighed by what they should have saved;
        the seconds are those of the dense generations.
        """
        known = replace(self, realised=1.0)
        hoped = sum(1 - 1 / known.speedup(run.cost) for run in runs)
        came = sum(1 - run.seconds / run.dense_seconds for run in runs)
        pace = median(run.dense_seconds for run in runs) / self.dense_seconds
        return replace(
            self,
            seconds_per_step=self.seconds_per_step * pace,
            seconds_outside=self.seconds_outside * pace,
            realised=max(0.0, came / hoped) if hoped > 0 else self.realised,
        )

    @property
    def _saved(self) -> float:
        """Seconds that a generation without any self-attention saves."""
        return self.steps * self.seconds_per_step * self.attention_share * self.realised

    def expectation(self, flops: float, cost: float) -> str:
        """What a person can expect of a plan that computes `flops` of dense attention, in `cost`
        of its time."""
        return (
            f"attention is {self.share:.0%} of this run; at {flops:.2g} of its FLOPs expect at "
            f"most {self.speedup(cost):.2f}x"
        )

    def to_dict(self) -> dict[str, Any]:
        """What a plan keeps of it."""
        return asdict(self)

    @classmethod
    def of_plan(cls, plan: Plan) -> Self | None:
        """What the search of `plan` measured; `None` if it measured no times.

        Raises:
            ValueError: if the times do not make sense.
        """
        kept = plan.timing.get("dense")
        if kept is None:
            return None
        try:
            timing = cls(**kept)
            sound = timing.steps >= 1 and timing.seconds_per_step > 0
            sound = sound and timing.seconds_outside >= 0
            sound = sound and 0 <= timing.attention_share <= 1 and timing.realised >= 0
        except TypeError as error:
            raise ValueError(f"the plan's timing is incomplete ({error}); search again") from error
        if not sound:
            raise ValueError(f"the plan's timing is impossible ({kept}); search again")
        return timing


class StepTimes:
    """Times the dense steps of a search's runs, without what their observer did.

    The first step of every run is left out: it holds the encoding of the prompt, and warms up.
    """

    def __init__(self) -> None:
        self.stopwatch = Stopwatch()
        self._steps: list[float] = []
        self._attention: list[float] = []
        self._calls = 0
        self._outside: float | None = None
        self._start = self._mark = self._before = 0.0
        self._first = True

    def begin(self) -> None:
        """A run begins."""
        self._start = self._mark = self.stopwatch.now()
        self._first = True

    def step(self) -> None:
        """A step of the run is done."""
        now = self.stopwatch.now()
        observing = self.stopwatch.lap(OBSERVING)
        attention = self.stopwatch.lap(ATTENTION)
        taken = now - self._mark - observing.seconds
        if self._first:
            self._before = taken
        else:
            self._steps.append(taken)
            self._attention.append(attention.seconds)
            self._calls = attention.count
        self._first, self._mark = False, now

    def end(self) -> None:
        """The run is over, its latents decoded."""
        if self._steps:
            after = self.stopwatch.now() - self._mark
            self._outside = max(0.0, self._before - median(self._steps)) + after

    @property
    def seconds_per_call(self) -> float | None:
        """Of one dense attention call; `None` if no step was timed."""
        return median(self._attention) / self._calls if self._attention and self._calls else None

    def dense(self, steps: int) -> Timing | None:
        """What was measured, for a generation of `steps`; `None` if no step was timed."""
        if not self._steps or self._outside is None:
            return None
        step = median(self._steps)
        share = min(1.0, median(self._attention) / step)
        device = device_name(self.stopwatch.device)
        return Timing(device, steps, step, share, self._outside)


def runs_of(plan: Plan) -> tuple[Run, ...]:
    """The runs by which the search of `plan` saw how fast plans are; none where it asked for no
    time."""
    return tuple(Run(**run) for run in plan.timing.get("runs", ()))


def timing_note(plan: Plan) -> str | None:
    """The end-to-end expectation of a plan; `None` if its search measured no times."""
    timing, predicted = Timing.of_plan(plan), plan.predicted
    if timing is None or "flops" not in predicted:
        return None
    return timing.expectation(predicted["flops"], predicted.get("attention", predicted["flops"]))

"""Course: what a head does at every denoising step under one schedule.

    dense, dense, renew, reuse, reuse, renew, reuse, ...

From it follow what a candidate computes over a whole generation, and at which steps, and how long
after the last renewal, it errs. It mirrors `pipelines.group_attention`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.pattern import OnlinePattern, Pattern
from dit_sparse.kernels.remainder import Remainder
from dit_sparse.kernels.scored import Scored
from dit_sparse.pipelines.schedule import Schedule

DECAY, FLOOR = 15.0, 0.02
"""Where it is not measured, an error after a share u of the steps counts `exp(-DECAY u) + FLOOR`.

What is drawn is settled in the first steps, which blow errors up; later ones go into the video as
they are. On the sample model, with blocks of mass at .3, the squared error of the video for each
unit of error is above .08 in steps 1 to 3 of 20, .006 in 4 to 6, and between .001 and .004 in all
that come after; over whole plans this order of errors agrees with that of their videos best.
"""


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a candidate keeps from step to step, which decides its course.

    Args:
        blocks: blocks that it finds while denoising.
        lse: finds them from the LSE of dense attention.
        cache: of a remainder.
    """

    blocks: bool
    lse: bool
    cache: bool

    @classmethod
    def of(cls, pattern: Pattern, remainder: Remainder) -> Keeping:
        """That of a pattern with a remainder."""
        lse = isinstance(pattern, Scored) and pattern.score.needs_lse
        return cls(isinstance(pattern, OnlinePattern), lse, remainder.cached)


@dataclass(frozen=True, slots=True)
class Course:
    """Of one head in one phase of a generation.

    Args:
        steps: denoising steps of the whole generation.
        dense: passes of the model's own attention.
        exact: dense passes of the head's group, for an LSE or a cache.
        sparse: passes over the blocks.
        searches: how often blocks are found.
        errs: (step, age) of the steps whose output is not dense attention's: the age is the
            number of steps since what is kept was renewed, 0 if nothing is.
    """

    steps: int
    dense: int
    exact: int
    sparse: int
    searches: int
    errs: tuple[tuple[int, int], ...]

    def cost(self, density: Tensor, search: Tensor) -> Tensor:
        """Share of the attention of a dense generation that is computed, for a sparse pass of
        `density` and a search of cost `search`, both in those of dense attention."""
        dense = self.dense + self.exact
        return (dense + self.searches * search + self.sparse * density) / self.steps

    def calls(self, cache: bool) -> tuple[int, int, int, int]:
        """How often a head makes each of the calls of `latency.py`: passes over its blocks,
        searches, and if it has a `cache`, takes and applies it."""
        taken, applied = (self.exact, len(self.errs)) if cache else (0, 0)
        return self.sparse, self.searches, taken, applied


def foreseeable(schedule: Schedule) -> bool:
    """Whether it is known before denoising what each guidance branch does at which step."""
    online = schedule.sigma_above is not None or schedule.recall is not None
    return not online and not schedule.share_branches


def courses(keeping: Keeping, schedule: Schedule, steps: int) -> tuple[Course, ...]:
    """What a head that keeps `keeping` does under `schedule`, in each of its phases.

    Raises:
        ValueError: if the schedule depends on noise levels or on recall, which are known only
            while denoising, or on what the other guidance branch found.
    """
    if not foreseeable(schedule):
        raise ValueError(
            f"a search needs a schedule that is known beforehand, came {schedule}; give counts of "
            "dense steps and a period, without sigma_above, recall and share_branches"
        )
    return tuple(_course(keeping, schedule, steps, span) for span in schedule.spans(steps))


def _course(keeping: Keeping, schedule: Schedule, steps: int, span: range) -> Course:
    """That of one phase, which knows nothing of the one before."""
    dense = exact = sparse = searches = 0
    last: int | None = None
    errs: list[tuple[int, int]] = []
    for step in span:
        if schedule.dense(step, steps):
            dense += 1
            continue
        renews = (keeping.blocks or keeping.cache) and schedule.renews(step, last)
        shown = renews and (keeping.cache or (keeping.lse and last is None))
        searches += renews and keeping.blocks
        exact += shown
        sparse += not shown or keeping.cache
        last = step if renews else last
        if not shown:
            errs.append((step, 0 if last is None else step - last))
    return Course(steps, dense, exact, sparse, searches, tuple(errs))


@dataclass(frozen=True, slots=True)
class Sightings:
    """At which steps a search looks: at each of `anchors`, ascending, something is renewed, and
    looked at again `ages` steps later, the first of which is 0.

    Errors between are interpolated, first by age, then by the step of the renewal; beyond the
    ends they are those of the ends.
    """

    steps: int
    anchors: tuple[int, ...]
    ages: tuple[int, ...]

    def at(self, step: int) -> tuple[tuple[int, int], ...]:
        """What is looked at in `step`: numbers of the anchor and of the age."""
        return tuple(
            (i, j)
            for i, anchor in enumerate(self.anchors)
            for j, age in enumerate(self.ages)
            if anchor + age == step
        )

    @property
    def last(self) -> int:
        """The last step that is looked at."""
        return max(step for step in range(self.steps) if self.at(step))

    def weights(self, course: Course, importance: Tensor | None = None) -> Tensor:
        """How much each sighting counts in the mean error of a generation of which `course` is
        part, float64 `[anchors, ages]`. Steps are carried over as shares of the generation.

        `importance` `[anchors]` says how much an error at these steps counts, the logarithm is
        interpolated between; if not given it falls by `DECAY` to `FLOOR`. Its mean over all steps
        is 1.
        """
        stretch = self.steps / course.steps
        each = self._importance(importance, course.steps)
        total = torch.zeros(len(self.anchors), len(self.ages), dtype=torch.double)
        for step, age in course.errs:
            anchor = _between(self.anchors, (step - age) * stretch)
            total += each[step] * torch.outer(anchor, _between(self.ages, age * stretch))
        return total / course.steps

    def _importance(self, importance: Tensor | None, steps: int) -> Tensor:
        """How much each of `steps` counts, float64."""
        if importance is None:
            weights = torch.exp(-DECAY * torch.arange(steps, dtype=torch.double) / steps) + FLOOR
        else:
            known = importance.double().log()
            places = [step * self.steps / steps for step in range(steps)]
            weights = torch.stack([_between(self.anchors, at) @ known for at in places]).exp()
        return weights / weights.mean()


def sightings(steps: int, schedules: tuple[Schedule, ...], anchors: int) -> Sightings:
    """Where to look in a generation of `steps` that may run any of `schedules`: `anchors` steps,
    spread over those that are sparse under one of them, from the first on.

    Raises:
        ValueError: if no step is sparse under any of the schedules, or there are none.
    """
    if anchors < 1:
        raise ValueError(f"anchors must be at least 1, came {anchors}")
    if not schedules:
        raise ValueError(
            f"there is no schedule to choose from for {steps} steps; give schedules, or use more "
            "steps"
        )
    stateless = Keeping(False, False, False)
    known = [each for schedule in schedules for each in courses(stateless, schedule, steps)]
    sparse = sorted({step for each in known for step, _ in each.errs})
    if not sparse:
        raise ValueError(
            f"the schedule keeps {schedules[0].dense_first} first and {schedules[0].dense_last} "
            f"last steps dense, so none of {steps} runs sparse; use more steps or fewer dense ones"
        )
    count = min(anchors, len(sparse))
    places = tuple(sparse[part * len(sparse) // count] for part in range(count))
    span = sparse[-1] - sparse[0]
    # 0, 1, 3, 7, ...: what is kept grows stale fast at first.
    ages = tuple(2**power - 1 for power in range(span.bit_length() + 1) if 2**power - 1 <= span)
    return Sightings(steps, places, ages)


PHASES = ((0.35,), (0.5,), (0.25, 0.5), (0.35, 0.6))
"""Where phases begin in the schedules that a search chooses from. Of more than three, predicted
errors grow again: what is kept is renewed in each."""


def schedules(steps: int, dense_first: int | None = None) -> tuple[Schedule, ...]:
    """The schedules that a search chooses from: from a twentieth to three tenths of the steps
    dense first, or `dense_first` of them; renewals from every second step to none; or phases."""
    shares = (0.05, 0.1, 0.15, 0.2, 0.3)
    firsts = dict.fromkeys(max(1, round(share * steps)) for share in shares)
    firsts = firsts if dense_first is None else {dense_first: None}
    periods = dict.fromkeys(max(2, round(share * steps)) for share in (0.1, 0.15, 0.2, 0.3, 0.45))
    found: list[Schedule] = []
    for first in firsts:
        if first >= steps and dense_first is None:
            continue
        found += [Schedule(dense_first=first, renew_every=period) for period in (0, *periods)]
        phased = {
            # Few steps do not tell all of them apart.
            schedule.spans(steps): schedule
            for schedule in (Schedule(dense_first=first, phases=phases) for phases in PHASES)
        }
        found += [
            schedule
            for spans, schedule in phased.items()
            if all(span and span.stop > first for span in spans)
        ]
    return tuple(found)


def _between(places: tuple[int, ...], at: float) -> Tensor:
    """Weights of a piecewise linear interpolation at `at`, float64 `[places]`."""
    weights = torch.zeros(len(places), dtype=torch.double)
    if at <= places[0]:
        weights[0] = 1
        return weights
    for index, (left, right) in enumerate(itertools.pairwise(places)):
        if at <= right:
            share = (at - left) / (right - left)
            weights[index], weights[index + 1] = 1 - share, share
            return weights
    weights[-1] = 1
    return weights

"""Pace: the plan that is as fast as a budget asks when it runs, and not only when it is predicted.

What finding blocks, merging and the memory of a machine cost is seen best where a plan runs.
"""

from __future__ import annotations

from collections.abc import Callable

from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.timing import Run, Timing

TRIALS = 3
"""Plans that are run, each beside a dense generation. Of a noisy machine more tell more."""


def paced(
    planned: Callable[[Timing], Plan],
    run: Callable[[Plan], tuple[float, float]],
    timing: Timing,
) -> tuple[Plan, tuple[Run, ...]]:
    """The plan of a speed-up or a latency, solved anew after each of `TRIALS` that were run.

    Args:
        planned: the best plan within the budget, as fast as a timing says.
        run: seconds of a generation with a plan, and of a dense one beside it.
        timing: of the dense generation that the search saw.

    Returns:
        The plan that all trials together ask for, and the trials.

    Raises:
        ValueError: from `planned`, if trials show that no plan is that fast.
    """
    plan, runs = planned(timing), []
    for _ in range(TRIALS):
        seconds, dense = run(plan)
        runs.append(Run(plan.predicted["attention"], seconds, dense))
        plan = planned(timing.learned(runs))
    return plan, tuple(runs)

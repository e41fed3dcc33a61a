"""Plans that are asked to be as fast as they run, on a machine that is slower than predicted."""

from dataclasses import replace

import pytest

from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.budget import Budget
from dit_sparse.search.pace import TRIALS, paced
from dit_sparse.search.solution import resolve
from dit_sparse.search.timing import Run, Timing
from tests.searched import TIMING, evidence_of, plan_of

SEARCHED = plan_of(evidence_of(3))
REALISED = 0.8


def planned(budget: Budget, timing: Timing) -> Plan:
    return resolve(replace(SEARCHED, timing={"dense": timing.to_dict()}), budget)


def machine(plan: Plan, slower: float = 1.0, realised: float = REALISED) -> tuple[float, float]:
    """Seconds of a plan and of a dense generation, where less is saved than predicted."""
    saved = TIMING.dense_seconds - TIMING.seconds(plan.predicted["attention"])
    return (TIMING.dense_seconds - realised * saved) * slower, TIMING.dense_seconds * slower


def speedup(plan: Plan) -> float:
    seconds, dense = machine(plan)
    return dense / seconds


def test_a_speedup_is_kept_where_less_is_saved_than_predicted() -> None:
    budget = Budget(speedup=1.25)
    assert speedup(planned(budget, TIMING)) < 1.22
    load = iter((1.0, 1.7, 0.9))
    found, runs = paced(
        lambda timing: planned(budget, timing), lambda plan: machine(plan, next(load)), TIMING
    )
    assert len(runs) == TRIALS
    assert 1.25 <= speedup(found) < 1.28
    timing = Timing.of_plan(found)
    assert timing is not None
    assert timing.realised == pytest.approx(REALISED)


def test_a_latency_is_kept_on_a_machine_that_became_slower() -> None:
    budget = Budget(latency=15.0)
    found, _ = paced(
        lambda timing: planned(budget, timing), lambda plan: machine(plan, 1.5), TIMING
    )
    assert 14.7 < machine(found, 1.5)[0] <= 15.0


def test_what_trials_show_to_be_out_of_reach_is_refused() -> None:
    def hopeless(plan: Plan) -> tuple[float, float]:
        return machine(plan, realised=0.1)

    budget = Budget(speedup=1.25)
    with pytest.raises(ValueError, match=r"no plan of this search is faster than 1\.0"):
        paced(lambda timing: planned(budget, timing), hopeless, TIMING)


def test_what_is_realised_is_a_mean_over_what_was_hoped_for() -> None:
    # Of 12 s half is attention: costs of 0.2 and 0.6 should save 4 and 2 s.
    timing = Timing("a device", 10, 1.0, 0.5, 2.0)
    runs = [Run(0.2, 9.0, 12.0), Run(0.6, 21.0, 24.0)]
    learned = timing.learned(runs)
    assert learned.realised == pytest.approx((3 / 12 + 3 / 24) / (4 / 12 + 2 / 12))
    assert learned.dense_seconds == pytest.approx(18.0)
    assert learned.share == pytest.approx(timing.share)
    # Learned from the measured cost, not from what was learned before.
    assert learned.learned(runs).realised == pytest.approx(learned.realised)


def test_plans_that_save_nothing_teach_nothing() -> None:
    timing = replace(TIMING, realised=0.7)
    assert timing.learned([Run(1.0, 11.0, 12.0)]).realised == 0.7
    assert timing.learned([Run(0.5, 15.0, 12.0)]).realised == 0.0

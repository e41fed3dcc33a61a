"""Why heads run what they run."""

import math
from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels.pattern import Columns, Radial
from dit_sparse.kernels.remainder import Pooled
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.choices import choices
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve
from dit_sparse.search.space import Candidate
from tests.searched import HEADS, PHASED, SCHEDULES, SPACE, TIMING, evidence_of, plan_of

LAYERS = 3
COUNT = 2 * SPACE.slots


@pytest.fixture
def evidence() -> Evidence:
    return evidence_of(LAYERS)


@pytest.fixture
def plan(evidence: Evidence) -> Plan:
    return plan_of(evidence)


def test_choices_say_what_every_head_gave_up(plan: Plan, evidence: Evidence) -> None:
    solved = resolve(plan, Budget(flops=0.45))
    found = choices(solved)
    assert found is not None
    assert found.cost == "flops"
    assert found.price > 0
    tables = evidence.tables(solved.schedule)
    kinds = set()
    for layer, (name, row) in enumerate(found.layers.items()):
        for head, choice in enumerate(row):
            words = [str(evidence.candidate(layer, head, c)) for c in range(COUNT)]
            errors, costs = tables.error[layer, head], tables.flops[layer, head]
            pattern = solved.assignment[name][head]
            won = words.index(str(Candidate(pattern, solved.phases[0].remainders_of(name)[head])))
            assert choice.winner.pattern == words[won]
            assert choice.winner.error == errors[won].item()
            assert choice.winner.cost == costs[won].item()
            loss = [e + found.price * c if c < math.inf else math.inf
                    for e, c in zip(errors.tolist(), costs.tolist(), strict=True)]  # fmt: skip
            loss[won] = math.inf
            assert choice.runner_up is not None
            assert choice.runner_up.pattern == words[loss.index(min(loss))]
            assert (choice.full.error, choice.full.cost) == (0.0, pytest.approx(1.0))
            kinds.add("with" in words[won])
    assert kinds == {False, True}
    predicted = solved.provenance["predicted"]
    assert found.point == pytest.approx((predicted["flops"], predicted["error"]))
    assert found.curve[0][0] == pytest.approx(tables.dense)
    assert found.curve[-1] == pytest.approx((1.0, 0.0))
    assert all(cost <= later[0] and error >= later[1] for (cost, error), later
               in zip(found.curve, found.curve[1:], strict=False))  # fmt: skip
    assert found.note == TIMING.expectation(predicted["flops"], predicted["flops"])


def test_a_budget_of_time_is_explained_in_time(plan: Plan, evidence: Evidence) -> None:
    slow = (1.5 * evidence.density).clamp_max(1)
    timed = replace(plan, evidence=plan.evidence | {"time": slow.where(slow > 0, 0.1)})
    solved = resolve(timed, Budget(speedup=1.2))
    found = choices(solved)
    assert found is not None
    assert found.cost == "time"
    table = Evidence.of_plan(timed).tables(solved.schedule).time
    costs = {round(cost, 9) for cost in table.flatten().tolist()}
    assert {round(c.winner.cost, 9) for row in found.layers.values() for c in row} <= costs
    assert found.point[0] == pytest.approx(
        sum(c.winner.cost for row in found.layers.values() for c in row) / (LAYERS * HEADS)
    )
    flops = choices(resolve(timed, Budget(flops=0.45)))
    assert flops is not None
    assert flops.cost == "flops"


def test_choices_know_columns_and_leave_foreign_plans_alone(
    plan: Plan, evidence: Evidence
) -> None:
    striped = evidence.planned(plan, torch.full((LAYERS, HEADS), 10), plan.schedule)
    heads = striped.assignment
    assert all(isinstance(p, Columns) for row in heads.values() for p in row)
    found = choices(striped)
    assert found is not None
    assert found.point[0] == pytest.approx(0.2 + 0.8 * 0.5)
    # Another schedule, another price.
    again = choices(replace(plan, assignment=heads, schedule=SCHEDULES[2]))
    assert again is not None
    assert again.point[0] == pytest.approx(0.4 + 0.6 * 0.5)
    foreign = {name: (Radial(),) * HEADS for name in heads}
    assert choices(replace(plan, assignment=foreign)) is None
    pooled = {name: (Pooled(),) * HEADS for name in heads}
    assert choices(replace(plan, assignment=heads, remainders=pooled)) is None
    assert choices(replace(plan, evidence={})) is None
    assert choices(replace(plan, schedule=Schedule(recall=0.9))) is None


def test_heads_have_reasons_of_their_own_in_every_phase(plan: Plan, evidence: Evidence) -> None:
    plan = replace(
        plan, provenance={"search": replace(evidence, schedules=(PHASED,)).description()}
    )
    solved = resolve(plan, Budget(flops=0.45))
    assert solved.schedule == PHASED
    found = choices(solved)
    assert found is not None
    whens = (" from 0%", " from 40%", " from 70%")
    assert list(found.layers) == [layer + when for when in whens for layer in evidence.layers]
    spent = 0.0
    for phase, when, share in zip(solved.phases, whens, (0.4, 0.3, 0.3), strict=True):
        for layer in evidence.layers:
            for head, choice in enumerate(found.layers[layer + when]):
                pair = phase.assignment[layer][head], phase.remainders_of(layer)[head]
                assert choice.winner.pattern == str(Candidate(*pair))
                # Of the steps of the phase.
                assert choice.full.cost == pytest.approx(1)
                spent += choice.winner.cost * share
    assert spent / (LAYERS * HEADS) == pytest.approx(solved.predicted["flops"])
    assert found.point == pytest.approx((solved.predicted["flops"], solved.predicted["error"]))

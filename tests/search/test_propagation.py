"""How much errors of layers and of steps count: plans that run sparse in one place alone."""

from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels.pattern import Band, Full
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.propagation import LEAST_IMPORTANCE, MOST, importance, propagation
from dit_sparse.search.solution import solution_of, solve
from tests.searched import SEEN, STEPS, evidence_of, plan_of

LAYERS = 4


@pytest.fixture
def evidence() -> Evidence:
    return evidence_of(LAYERS)


def test_layers_run_alone_and_are_weighed_by_what_the_video_loses(evidence: Evidence) -> None:
    solution = solve(evidence, Budget(flops=0.5))
    truth = torch.tensor([1.0, 4.0, 0.5, 2.0])
    told: list[str] = []

    def distance(plan: Plan) -> float:
        (name,) = (
            name for name, heads in plan.assignment.items() if any(h != Full() for h in heads)
        )
        told.append(name)
        layer = evidence.layers.index(name)
        chosen = evidence.chosen(plan)
        assert chosen is not None
        assert torch.equal(chosen[layer], solution.chosen[layer])
        assert plan.schedule == solution.schedule
        predicted = solution_of(evidence, chosen, plan.schedule).predicted["error"]
        return 7 * truth[layer].item() * predicted

    weights = propagation(evidence, solution, plan_of(evidence), distance)
    assert told == list(evidence.layers)
    torch.testing.assert_close(weights, truth / truth.mean())


def test_a_layer_that_loses_nothing_counts_as_the_others_do(evidence: Evidence) -> None:
    solution = solve(evidence, Budget(flops=0.5))
    solution.chosen[1] = evidence.full
    weights = propagation(evidence, solution, plan_of(evidence), lambda plan: 1e-9)
    assert weights[1].item() == pytest.approx(1.0)
    loud = iter([1e-9, 1.0, 1e-9])
    weights = propagation(evidence, solution, plan_of(evidence), lambda plan: next(loud))
    assert weights.max() <= MOST


def test_anchors_run_alone_until_the_next_with_the_pattern_of_usual_density(
    evidence: Evidence,
) -> None:
    truth = dict(zip(SEEN.anchors, (8.0, 2.0), strict=True))
    number = 2 * evidence.space.patterns.index(Band(20))
    alike = replace(evidence, importance=torch.ones(len(SEEN.anchors)))
    told: list[Schedule] = []

    def distance(plan: Plan) -> float:
        assert {head for heads in plan.assignment.values() for head in heads} == {Band(20)}
        told.append(plan.schedule)
        # Errors of all steps that are not dense, and of all heads.
        every = alike.tables(plan.schedule).error[..., number].sum(-1).mean().item()
        return 3 * truth[plan.schedule.dense_first] * every

    weights = importance(evidence, plan_of(evidence), distance)
    assert told == [Schedule(2, STEPS - 6), Schedule(6, 0)]
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.25]))
    silent = importance(
        evidence, plan_of(evidence), lambda plan: float(plan.schedule.dense_first == 2)
    )
    assert silent.tolist() == pytest.approx([1.0, LEAST_IMPORTANCE])


def test_weights_change_the_tables_and_travel_in_the_plan(evidence: Evidence) -> None:
    weighed = replace(evidence, propagation=torch.tensor([1.0, 3.0, 1.0, 1.0]))
    schedule = evidence.schedules[0]
    plain, heavy = evidence.tables(schedule).error, weighed.tables(schedule).error
    torch.testing.assert_close(heavy[1], 3 * plain[1])
    torch.testing.assert_close(heavy[[0, 2, 3]], plain[[0, 2, 3]])
    plan = plan_of(weighed)
    torch.testing.assert_close(Evidence.of_plan(plan).tables(schedule).error, heavy)
    broken = replace(plan, evidence=plan.evidence | {"propagation": torch.zeros(LAYERS)})
    with pytest.raises(ValueError, match="should have 4 numbers above 0 as its propagation"):
        Evidence.of_plan(broken)

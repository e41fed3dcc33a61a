"""Trials: plans that a search generates with, to see how close their videos are and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.budget import Budget
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.fidelity import distance, loosest, mean_psnr
from dit_sparse.search.generations import Generations
from dit_sparse.search.pace import paced
from dit_sparse.search.propagation import importance, propagation
from dit_sparse.search.solution import resolve, solve
from dit_sparse.search.timing import Timing

PROPAGATED = 0.4
"""Share of dense FLOPs at which layers run alone, to see what becomes of their errors."""


@dataclass(frozen=True, slots=True, eq=False)
class Trials:
    """Generations with plans, beside dense ones.

    Args:
        pipe: a diffusers pipeline.
        generations: of its prompts.
        references: their dense videos, in order, as far as they were kept.
    """

    pipe: Any
    generations: Generations
    references: Sequence[Tensor]

    def videos(self, plan: Plan, count: int) -> list[Tensor]:
        """Those of the first `count` prompts."""
        with enable_sparse_attention(self.pipe, plan):
            return [self.generations.video(number) for number in range(count)]

    def psnr(self, plan: Plan) -> float:
        """Of the videos of all references, in dB."""
        return mean_psnr(self.references, self.videos(plan, len(self.references)))

    def distance(self, plan: Plan) -> float:
        """Mean squared difference of the first video."""
        return distance(self.references[:1], self.videos(plan, 1))

    def seconds(self, plan: Plan) -> tuple[float, float]:
        """Of the first video, with the plan and dense."""
        start = perf_counter()
        self.videos(plan, 1)
        between = perf_counter()
        self.generations.video(0)
        return between - start, perf_counter() - between


def weighed(searched: Plan, trials: Trials) -> Plan:
    """The plan, its evidence with how much errors of every step and layer count."""
    evidence = Evidence.of_plan(searched)
    evidence = replace(evidence, importance=importance(evidence, searched, trials.distance))
    usual = solve(evidence, Budget(flops=PROPAGATED))
    weights = propagation(evidence, usual, searched, trials.distance)
    return replace(searched, evidence=replace(evidence, propagation=weights).arrays())


def faithful(searched: Plan, budget: Budget, trials: Trials) -> Plan:
    """The plan of least FLOPs whose videos hold the PSNR of `budget`."""
    assert budget.psnr is not None

    def within(flops: float) -> Plan:
        return resolve(searched, replace(budget, psnr=None, flops=flops))

    def check(flops: float) -> tuple[float, float]:
        plan = within(flops)
        return plan.predicted["flops"], trials.psnr(plan)

    evidence = Evidence.of_plan(searched)
    tables = map(evidence.tables, evidence.schedules)
    found = loosest(check, budget.psnr, min(t.flops.amin(-1).mean().item() for t in tables))
    plan = within(found.share)
    achieved = {"psnr": found.psnr, "checks": [list(check) for check in found.checks]}
    provenance = plan.provenance | {"budget": str(budget), "achieved": achieved}
    return replace(plan, provenance=provenance)


def fast(searched: Plan, budget: Budget, trials: Trials) -> Plan:
    """The plan that keeps the speed-up or latency of `budget` where it runs.

    Raises:
        ValueError: if no plan is that fast, or the search measured no times.
    """
    timing = Timing.of_plan(searched)
    if timing is None:
        return resolve(searched, budget)
    plan, runs = paced(
        lambda learned: resolve(timed(searched, learned), budget), trials.seconds, timing
    )
    return replace(plan, timing=plan.timing | {"runs": [asdict(run) for run in runs]})


def timed(plan: Plan, timing: Timing) -> Plan:
    """The plan with what is known of times."""
    return replace(plan, timing=plan.timing | {"dense": timing.to_dict()})

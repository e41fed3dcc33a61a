"""Propagation: how much the errors of a layer, and of a step, count in the video.

Errors of a search are shares of each layer's own output. What becomes of them in the layers and
steps after it is measured here: one layer, or one step, runs sparse, everything else dense, and
the video is compared with the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.kernels.pattern import Full, OnlinePattern
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import Solution, solution_of

LEAST, MOST = 0.1, 10.0
"""Weights of layers are kept within these, as one generation says only so much."""

LEAST_IMPORTANCE = 1e-4


def propagation(
    evidence: Evidence, solution: Solution, plan: Plan, distance: Callable[[Plan], float]
) -> Tensor:
    """Weight of every layer's error, float32 `[layers]`, 1 on average.

    Args:
        evidence: of the search, without weights.
        solution: whose candidates each layer runs in turn, under its schedule.
        plan: any plan of the search.
        distance: generates with a plan, and gives the mean squared difference from dense videos.
    """
    weights = []
    for layer, name in enumerate(evidence.layers):
        alone = torch.full_like(solution.chosen, evidence.full)
        alone[layer] = solution.chosen[layer]
        predicted = solution_of(evidence, alone, solution.schedule).predicted["error"]
        patterns, remainders = evidence.assignment(alone)
        if not predicted or all(pattern == Full() for pattern in patterns[name]):
            weights.append(torch.nan)
            continue
        one = replace(plan, assignment=patterns, remainders=remainders, schedule=solution.schedule)
        weights.append(distance(one) / predicted)
    known = torch.tensor(weights)
    # A layer that loses nothing tells nothing: it counts as the others do on average.
    mean = known.nanmean()
    return (known.nan_to_num(float(mean)) / mean).clamp(LEAST, MOST).float()


def importance(evidence: Evidence, plan: Plan, distance: Callable[[Plan], float]) -> Tensor:
    """How much errors at each anchor count, float32 `[anchors]`, the largest 1.

    Every head runs the densest candidate that loses anything, so that the video moves a little:
    where it becomes another one altogether, more error makes no more difference.

    Args:
        evidence, plan, distance: as for `propagation`.
    """
    remainders = len(evidence.space.remainders)
    numbers = [
        place * remainders
        for place, pattern in enumerate(evidence.space.patterns)
        if pattern != Full() and not isinstance(pattern, OnlinePattern)
    ]
    mildest = max(numbers, key=lambda number: float(evidence.density[0, 0, number]))
    everywhere = torch.full(evidence.density.shape[:2], mildest)
    patterns, rest = evidence.assignment(everywhere)
    steps, weights = evidence.sightings.steps, []
    for number, anchor in enumerate(evidence.sightings.anchors):
        alone = Schedule(dense_first=anchor, dense_last=steps - anchor - 1)
        one = replace(plan, assignment=patterns, remainders=rest, schedule=alone)
        error = evidence.error[..., mildest, number, 0].double().sum(-1).mean()
        weights.append(distance(one) / float(error.clamp_min(1e-12)))
    found = torch.tensor(weights)
    return (found / found.max()).clamp_min(LEAST_IMPORTANCE).float()

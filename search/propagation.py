"""Propagation: how much a layer's error counts in the video.

Errors of a search are shares of each layer's own output. What becomes of them in the layers and
steps after it is measured here: one layer runs sparse, the others dense, and the video is compared
with the dense one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_sparse.kernels.pattern import Full
from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import Solution, solution_of

LEAST, MOST = 0.1, 10.0
"""Weights are kept within these, as one generation says only so much."""


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

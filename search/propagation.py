"""Propagation: how much the errors of a layer, and of a step, count in the video.

Errors of a search are shares of each layer's own output. What becomes of them in the layers and
steps after it is measured here: one layer, or one step, runs sparse, everything else dense, and
the video is compared with the dense one.
"""

from __future__ import annotations

import itertools
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

LEAST_IMPORTANCE, LEAST_ERROR = 1e-4, 1e-12
USUAL = 0.5
"""Density of the pattern that steps are tried with."""


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
    for layer in range(len(evidence.layers)):
        alone = torch.full_like(solution.chosen, evidence.full)
        # The layer in every phase.
        alone[layer :: len(evidence.layers)] = solution.chosen[layer :: len(evidence.layers)]
        predicted = solution_of(evidence, alone, solution.schedule).predicted["error"]
        if not predicted:
            weights.append(torch.nan)
            continue
        one = evidence.planned(plan, alone, solution.schedule)
        weights.append(distance(one) / predicted)
    known = torch.tensor(weights)
    # A layer that loses nothing tells nothing: it counts as the others do on average.
    mean = known.nanmean()
    return (known.nan_to_num(float(mean)) / mean).clamp(LEAST, MOST).float()


def importance(evidence: Evidence, plan: Plan, distance: Callable[[Plan], float]) -> Tensor:
    """How much errors from each anchor to the next count, float32 `[anchors]`, the largest 1.

    Every head runs one pattern of about `USUAL` density there, as heads of a plan will. A milder
    one would tell how much a video moves by little, which late steps hardly add to; a harder one
    makes another video of it at once.

    Args:
        evidence, plan, distance: as for `propagation`.
    """
    remainders = len(evidence.space.remainders)
    numbers = [
        place * remainders
        for place, pattern in enumerate(evidence.space.patterns)
        if pattern != Full() and not isinstance(pattern, OnlinePattern)
    ]
    chosen = min(numbers, key=lambda number: abs(float(evidence.density[0, 0, number]) - USUAL))
    everywhere = torch.full(evidence.density.shape[:2], chosen)
    steps, anchors = evidence.sightings.steps, evidence.sightings.anchors
    alike = replace(evidence, importance=torch.ones(len(anchors)))
    weights = []
    for begin, end in itertools.pairwise((*anchors, steps)):
        alone = Schedule(dense_first=begin, dense_last=steps - end)
        predicted = solution_of(alike, everywhere, alone).predicted["error"]
        one = evidence.planned(plan, everywhere, alone)
        weights.append(distance(one) / max(predicted, LEAST_ERROR))
    found = torch.tensor(weights)
    return (found / found.max()).clamp_min(LEAST_IMPORTANCE).float()

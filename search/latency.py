"""Latency: what the calls of a candidate take on this device, relative to dense attention of its
layer.

    pass      over its blocks, on the backend which `"auto"` would take for it
    search    finding its blocks
    take      the cache of its remainder
    apply     that cache

They are known where `dit-sparse bench --calibrate` has measured the device; the dense time is the
one that the search saw. Heads that share a call share its launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.kernels.backend import choose
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.calibration import (
    Calibration,
    Cost,
    calibration_for,
    dtype_name,
    work_of,
)
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.remainder import Cached
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.stage import Apply, Search, Stage, Take
from dit_sparse.search.space import Candidate

Times = tuple[Tensor, Tensor]
"""Shares of the dense time, and what of them is launch."""


def pass_times(lists: Sequence[BlockIndices], query: Tensor, dense_seconds: float) -> Times | None:
    """Time of a pass over every list, made for one head, if all heads of a layer ran it; as a
    share of `dense_seconds`.

    Args:
        lists: to be priced.
        query: `[batch, tokens, heads, head_dim]`, of which shape, dtype and device count.
        dense_seconds: of one dense call of the layer.

    Returns:
        Float32 `[lists]` twice, above 1 where it is slower than dense; `None` unless the device
        was calibrated for every one of them.
    """
    calibration = calibration_for(query.device)
    if calibration is None:
        return None
    batch, tokens, heads, head_dim = query.shape
    empty = torch.empty((batch, tokens, 1, head_dim), dtype=query.dtype, device=query.device)
    found = []
    for blocks in lists:
        call = AttentionCall(empty, empty, empty, blocks, head_dim**-0.5)
        cost = _cost(calibration, choose(call).name, query)
        if cost is None:
            return None
        found.append((cost.seconds(work_of(blocks, batch * heads)), cost.launch))
    times, launches = (torch.tensor(found) / dense_seconds).unbind(-1)
    return times, launches


def stage_times(
    candidates: Sequence[Candidate], query: Tensor, dense_seconds: float, block: int
) -> Times | None:
    """Time of a search, of taking and of applying a cache, if all heads of a layer ran the
    candidate; 0 where it does no such thing.

    Args:
        candidates: to be priced.
        query, dense_seconds: as for `pass_times`.
        block: tokens of a block of queries and of keys.

    Returns:
        Float32 `[candidates, 3]` twice; `None` unless the device was calibrated for all that
        they do.
    """
    calibration = calibration_for(query.device)
    if calibration is None:
        return None
    batch, tokens, heads, _ = query.shape
    found = torch.zeros(len(candidates), 3, 2)
    for own, candidate in zip(found, candidates, strict=True):
        for place, stage in enumerate(_stages(candidate)):
            if stage is None:
                continue
            cost = _cost(calibration, str(stage), query)
            if cost is None:
                return None
            seconds = cost.seconds(stage.work(batch, tokens, heads, block))
            own[place] = torch.tensor([seconds, cost.launch]) / dense_seconds
    times, launches = found.unbind(-1)
    return times, launches


def _stages(candidate: Candidate) -> tuple[Stage | None, Stage | None, Stage | None]:
    pattern, remainder = candidate.pattern, candidate.remainder
    search = take = apply = None
    if isinstance(pattern, Scored):
        # As in `space.search_cost`.
        assert not isinstance(pattern.score, Clustered)
        search = Search(pattern.score)
    if isinstance(remainder, Cached):
        take, apply = Take(remainder), Apply(remainder)
    return search, take, apply


def _cost(calibration: Calibration, name: str, query: Tensor) -> Cost | None:
    return calibration.costs.get((name, dtype_name(query.dtype), query.shape[-1]))

"""Latency: what a candidate takes on this device, relative to dense attention of its layer.

Where `dit-sparse bench --calibrate` has measured the device, a candidate's time is that of the
backend which `"auto"` would take for it; the dense time is the one that the search saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.kernels.backend import choose
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.calibration import Calibration, calibration_for, dtype_name, work_of
from dit_sparse.kernels.call import AttentionCall


def relative_times(
    lists: Sequence[BlockIndices], query: Tensor, dense_seconds: float
) -> tuple[float, ...] | None:
    """Time of every list, made for one head, if all heads of a layer ran it; as a share of
    `dense_seconds`.

    Args:
        lists: to be priced.
        query: `[batch, tokens, heads, head_dim]`, of which shape, dtype and device count.
        dense_seconds: of one dense call of the layer.

    Returns:
        One share a list, above 1 where it is slower than dense; `None` unless the device was
        calibrated for every one of them.
    """
    calibration = calibration_for(query.device)
    if calibration is None:
        return None
    times = [_seconds(calibration, blocks, query) for blocks in lists]
    if any(seconds is None for seconds in times):
        return None
    return tuple(seconds / dense_seconds for seconds in times if seconds is not None)


def _seconds(calibration: Calibration, blocks: BlockIndices, query: Tensor) -> float | None:
    batch, tokens, heads, head_dim = query.shape
    empty = torch.empty((batch, tokens, 1, head_dim), dtype=query.dtype, device=query.device)
    call = AttentionCall(empty, empty, empty, blocks, head_dim**-0.5)
    kind = choose(call).name, dtype_name(query.dtype), head_dim
    cost = calibration.costs.get(kind)
    return None if cost is None else cost.seconds(work_of(blocks, batch * heads))

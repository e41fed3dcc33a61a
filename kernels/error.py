"""Pattern error: how far a head's output lies from dense attention's when it runs a pattern.

One function serves the searches of Sparse-vDiT (arXiv 2506.03065, section 4), Sparse VideoGen
(arXiv 2502.01776, section 4.1) and Sliding Tile Attention (arXiv 2502.04507): all compare the
output of candidate masks with the dense output on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor

from dit_sparse.kernels.row_attention import RowAttention

Metric = Literal["relative", "mse", "sum_d"]
Masks = Callable[[slice], Iterable[Tensor]]

CHUNK_BYTES = 2**28
"""Attention weights held at a time; the masked copy takes as much again."""


def pattern_error(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    rows: Tensor,
    *,
    metric: Metric = "relative",
    projection: Tensor | None = None,
    scale: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Error of every candidate mask of every head on the sampled `rows`.

    With `O` the output of the rows under a mask and `O0` the dense one, a head's error is

        relative   |O - O0|^2 / |O0|^2    summed over rows and channels
        mse        mean of (O - O0)^2 over rows and channels
        sum_d      mean over rows of the sum over channels

    With `projection`, `O - O0` is first taken through the head's slice of the output projection,
    and `relative` divides by the squared norm of the projected output of all heads: the share of
    the layer's output that the head's pattern gets wrong, which can be compared between layers.

    Args:
        query, key, value: `[batch, tokens, heads, head_dim]`, any float dtype, raster order.
        masks: for a slice of `rows`, yields the mask of each candidate in turn, bool,
            broadcastable to `[heads, rows of the slice, tokens]`. A row that keeps no key, or
            only keys whose weight is below 1e-38 of the largest, has output 0.
        rows: int64 `[rows]`, raster tokens.
        metric: see above.
        projection: weight of the output projection, `[channels, heads * head_dim]`.
        scale: of the scores; `head_dim ** -0.5` if not given.
        valid: bool `[batch, tokens]`; padding is seen by no one and its rows do not count.

    Returns:
        float32 `[batch, heads, candidates]`.
    """
    check_metric(metric)
    batch, tokens, heads, head_dim = query.shape
    step = max(1, CHUNK_BYTES // (4 * batch * heads * tokens))
    error = torch.zeros((), device=query.device)
    reference = torch.zeros((), device=query.device)
    counted = torch.zeros((), device=query.device)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        attention = RowAttention.of(query, key, value, rows[part], scale=scale, valid=valid)
        counts = row_counts(rows[part], batch, valid)
        distance = Distance(attention.dense().output[:, :, 0], projection, counts)
        error = error + distance.squares(attention.under(masks(part)).output)
        reference = reference + distance.reference()
        counted = counted + reduce(counts, "b r -> b 1 1", "sum")
    channels = head_dim if projection is None else projection.shape[0]
    return _scaled(metric, error, reference, counted, channels)


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """How far outputs of sampled rows lie from the dense ones.

    Args:
        dense: float32 `[batch, heads, rows, head_dim]`.
        projection: weight of the output projection, through which everything is seen;
            `[channels, heads * head_dim]`.
        counts: `[batch, rows]`, 1 for rows that count.
    """

    dense: Tensor
    projection: Tensor | None
    counts: Tensor

    def squares(self, output: Tensor) -> Tensor:
        """Squared norm of `output - dense`, `[batch, heads, candidates]`, for outputs `[batch,
        heads, candidates, rows, head_dim]`."""
        return self._squares(output - self.dense[:, :, None])

    def error(self, output: Tensor, metric: Metric) -> Tensor:
        """The error of `pattern_error` for such outputs, `[batch, heads, candidates]`."""
        counted = reduce(self.counts, "b r -> b 1 1", "sum")
        channels = output.shape[-1] if self.projection is None else self.projection.shape[0]
        return _scaled(metric, self.squares(output), self.reference(), counted, channels)

    def reference(self) -> Tensor:
        """Squared norm of the dense output, `[batch, heads, 1]`, or, through a projection, of the
        whole layer's, `[batch, 1, 1]`."""
        if self.projection is None:
            return self._squares(self.dense[:, :, None])
        weight = self.projection.detach().float()
        layer = rearrange(self.dense, "b h r d -> b r (h d)") @ weight.T
        return ((layer * layer).sum(-1) * self.counts).sum(-1)[:, None, None]

    def _squares(self, difference: Tensor) -> Tensor:
        image = difference
        if self.projection is not None:
            heads = difference.shape[1]
            # |W_h x|^2 = x^T W_h^T W_h x
            slices = rearrange(self.projection.detach().float(), "c (h d) -> h c d", h=heads)
            image = difference @ rearrange(slices.mT @ slices, "h d e -> h 1 d e")
        rows = (image * difference).sum(-1).clamp_min(0)
        return (rows * self.counts[:, None, None]).sum(-1)


def _scaled(
    metric: Metric, squares: Tensor, reference: Tensor, counted: Tensor, channels: int
) -> Tensor:
    if metric == "relative":
        return squares / reference.clamp_min(torch.finfo(torch.float32).tiny)
    return squares / counted.clamp_min(1) / (channels if metric == "mse" else 1)


def row_counts(rows: Tensor, batch: int, valid: Tensor | None) -> Tensor:
    """1 for each sampled row that is not padding, float32 `[batch, rows]`."""
    if valid is None:
        return torch.ones(batch, len(rows), device=rows.device)
    return valid[:, rows].float()


def check_metric(metric: str) -> None:
    """Raise `ValueError` unless `metric` is one of `Metric`."""
    if metric not in get_args(Metric):
        raise ValueError(
            f"metric must be one of {', '.join(get_args(Metric))}, came {metric!r}; "
            "'relative' compares across heads"
        )

"""Pattern error: how far a head's output lies from dense attention's when it runs a pattern.

One function serves the searches of Sparse-vDiT (arXiv 2506.03065, section 4), Sparse VideoGen
(arXiv 2502.01776, section 4.1) and Sliding Tile Attention (arXiv 2502.04507): all compare the
output of candidate masks with the dense output on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from torch import Tensor

from dit_sparse.kernels.rows import row_weights

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
    if metric not in get_args(Metric):
        raise ValueError(
            f"metric must be one of {', '.join(get_args(Metric))}, came {metric!r}; "
            "'relative' compares across heads"
        )
    batch, tokens, heads, head_dim = query.shape
    gram = None if projection is None else _gram(projection, heads)
    flat_value = rearrange(value.float(), "b n h d -> (b h) n d")
    step = max(1, CHUNK_BYTES // (4 * batch * heads * tokens))
    error = torch.zeros((), device=query.device)
    reference = torch.zeros((), device=query.device)
    counted = torch.zeros((), device=query.device)
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        weights = row_weights(query, key, rows[part], scale=scale, valid=valid)
        counts = torch.ones(batch, weights.shape[2], device=query.device)
        if valid is not None:
            counts = valid[:, rows[part]].float()
        dense = _output(weights, flat_value)
        masked = torch.empty_like(weights)
        squares = []
        for mask in masks(part):
            torch.mul(weights, mask.float(), out=masked)
            squares.append(_squares(_output(masked, flat_value).sub_(dense), gram, counts))
        error = error + torch.stack(squares, -1)
        reference = reference + _reference(dense, projection, counts)
        counted = counted + reduce(counts, "b r -> b 1 1", "sum")
    if metric == "relative":
        return error / reference.clamp_min(torch.finfo(torch.float32).tiny)
    channels = head_dim if projection is None else projection.shape[0]
    return error / counted.clamp_min(1) / (channels if metric == "mse" else 1)


def _output(weights: Tensor, value: Tensor) -> Tensor:
    """Attention output of unnormalized weights `[b, h, r, n]`: `[b, h, r, d]`."""
    batch, heads = weights.shape[:2]
    total = weights.sum(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
    product = torch.bmm(rearrange(weights, "b h r n -> (b h) r n"), value)
    return rearrange(product, "(b h) r d -> b h r d", b=batch, h=heads) / total


def _gram(projection: Tensor, heads: int) -> Tensor:
    """`W_h^T W_h` of each head's slice, `[heads, head_dim, head_dim]`: `|W_h x|^2 = x^T G x`."""
    slices = rearrange(projection.detach().float(), "c (h d) -> h c d", h=heads)
    return slices.transpose(1, 2) @ slices


def _squares(difference: Tensor, gram: Tensor | None, counts: Tensor) -> Tensor:
    """Squared norms `[b, h]` of row vectors `[b, h, r, d]`, rows weighted by `counts`."""
    image = difference if gram is None else difference @ gram
    rows = (image * difference).sum(-1).clamp_min_(0)
    return (rows * counts[:, None]).sum(-1)


def _reference(dense: Tensor, projection: Tensor | None, counts: Tensor) -> Tensor:
    """Squared norm of the dense output, `[b, h, 1]`, or of the whole layer's, `[b, 1, 1]`."""
    if projection is None:
        return _squares(dense, None, counts)[..., None]
    layer = rearrange(dense, "b h r d -> b r (h d)") @ projection.detach().float().T
    return ((layer * layer).sum(-1) * counts).sum(-1)[:, None, None]

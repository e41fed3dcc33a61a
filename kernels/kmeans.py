"""KMeans: the tokens of each head in clusters, by Lloyd's algorithm with Euclidean distances.

    repeat:  label    = the nearest centroid, the first among equals
             centroid = the mean of its members; without members it stays where it was

Centroids begin at tokens spread by the golden ratio, or where an earlier clustering left them. No
random number is drawn, and sums are taken in the order of the tokens, so the same input gives the
same clusters on every device.

Labels are what the last repetition assigned, and centroids the means of exactly these members, so
that a centroid and a size describe the same tokens.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.rows import sample_rows

_AT_ONCE = 1 << 24  # distances held in one step


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """Clusters of the tokens of every head; all samples of a batch have the same members.

    Attributes:
        label: int64 `[heads, tokens]`, the cluster of each token.
        centroid: float32 (float64 for such tokens) `[batch, heads, clusters, head_dim]`.
        size: int64 `[heads, clusters]`, 0 for one without members.
    """

    label: Tensor
    centroid: Tensor
    size: Tensor


def kmeans(
    tokens: Tensor, clusters: int, iterations: int, centroid: Tensor | None = None
) -> Clusters:
    """The clusters of `tokens` of each head. A batch is clustered by its samples side by side, so
    that it has one list of blocks.

    Args:
        tokens: `[batch, tokens, heads, head_dim]`, any strides, any floating dtype.
        clusters: how many; at most as many as there are tokens.
        iterations: repetitions, at least 1.
        centroid: where to begin, `[batch, heads, clusters, head_dim]` in any floating dtype.
    """
    batch, number, heads, head_dim = tokens.shape
    expected = batch, heads, min(clusters, number), head_dim
    if centroid is not None and centroid.shape != expected:
        raise ValueError(
            f"centroid must be {expected} for tokens {tuple(tokens.shape)} in {clusters} "
            f"clusters, got {tuple(centroid.shape)}; give those of the same head and grid, or None"
        )
    first = sample_rows(number, clusters).to(tokens.device)
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    found = []
    for head in range(heads):
        points = rearrange(tokens[:, :, head], "b n d -> n (b d)").to(dtype)
        start = points[first]
        if centroid is not None:
            start = rearrange(centroid[:, head], "b c d -> c (b d)").to(dtype)
        found.append(_of_head(points, start, iterations))
    labels, centroids, sizes = (torch.stack(parts) for parts in zip(*found, strict=True))
    return Clusters(labels, rearrange(centroids, "h c (b d) -> b h c d", b=batch), sizes)


def _of_head(points: Tensor, centroid: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `[n]`, centroids `[clusters, dim]` and sizes of `points` `[n, dim]`."""
    label = size = points.new_empty(0, dtype=torch.int64)
    for _ in range(iterations):
        label = _nearest(points, centroid)
        size = label.bincount(minlength=len(centroid))
        members = points.index_select(0, label.argsort(stable=True))
        total = torch.segment_reduce(members, "sum", lengths=size, axis=0, initial=0)
        centroid = (total / size[:, None]).where(size[:, None] > 0, centroid)
    return label, centroid, size


def _nearest(points: Tensor, centroid: Tensor) -> Tensor:
    # |p - c|^2 less |p|^2, which decides nothing.
    offset = centroid.square().sum(-1)
    parts = points.split(max(_AT_ONCE // len(centroid), 1))
    return torch.cat([torch.addmm(offset, p, centroid.T, alpha=-2).argmin(-1) for p in parts])

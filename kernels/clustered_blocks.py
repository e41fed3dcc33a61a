"""ClusteredBlocks: the lists of blocks of a pattern that is scored by clusters, one for each head.

    cluster the video's queries and its keys -> rank pairs of clusters -> select
    -> tokens by cluster, clusters cut into blocks that never span two -> list

Queries and keys of a head are each in an order of their own, text keeps its place and is in no
cluster: it sees everything and is seen by everything. As in `scored_blocks.py`, one list serves
the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, WHOLE, BlockIndices, from_cuts
from dit_sparse.kernels.counts import Cut
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.kmeans import kmeans
from dit_sparse.kernels.ranking import rank_clusters
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.selection import select_clusters
from dit_sparse.kernels.tiling import Tiling, tiling


@dataclass(frozen=True, slots=True, eq=False)
class Centroids:
    """Where the clusters of the next step begin, `[batch, heads, clusters, head_dim]`. Kept in
    bfloat16, since the next clustering moves them anyway."""

    query: Tensor
    key: Tensor

    @property
    def bytes(self) -> int:
        """Memory that they take."""
        return self.query.nbytes + self.key.nbytes


def clustered_blocks(
    pattern: Scored,
    query: Tensor,
    key: Tensor,
    grid: TokenGrid,
    block: int,
    *,
    scale: float | None = None,
    last: Centroids | None = None,
    pooled: int = 0,
) -> tuple[tuple[BlockIndices, ...], Centroids]:
    """The blocks that `pattern` keeps, one list for each head of `query` and `key`, and where
    its clusters are.

    Args:
        pattern: the same for every head, scored by clusters.
        query, key: `[batch, tokens, heads, head_dim]` in raster order, any strides.
        grid: where the tokens stand.
        block: tokens of a block at most.
        scale: factor of the logits, defaults to `head_dim ** -0.5`.
        last: of the last step; without it the clustering begins anew.
        pooled: r > 0 lists the blocks that are not kept as well, pooled by `2^r`.
    """
    score = pattern.score
    if not isinstance(score, Clustered):
        raise ValueError(
            f"expected a pattern scored by clusters, got {pattern}; use scored_blocks"
        )
    if query.ndim != 4 or query.shape != key.shape or query.shape[1] != grid.tokens:
        raise ValueError(
            f"query and key must be [batch, {grid.tokens}, heads, head_dim] for grid {grid}, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    video = slice(grid.text_before, grid.text_before + grid.video)
    iterations = score.first if last is None else score.again
    queries = kmeans(query[:, video], score.queries, iterations, last and last.query)
    keys = kmeans(key[:, video], score.keys, iterations, last and last.key)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    tags = select_clusters(pattern.select, rank_clusters(queries, keys, factor)).cpu()
    if pooled:
        tags = tags.masked_fill(tags == ABSENT, pooled)
    # The stretches of text before and after the clusters.
    tags = torch.nn.functional.pad(tags, (1, 1, 1, 1), value=WHOLE)
    lists = []
    for head, table in enumerate(tags):
        (rows, of_row), (columns, of_column) = (
            _cut(side.label[head].cpu(), side.size[head].cpu(), grid, block)
            for side in (queries, keys)
        )
        own = table[of_row[:, None], of_column][None]
        lists.append(from_cuts(own, grid, (rows, columns), (block, block)))
    kept = Centroids(queries.centroid.bfloat16(), keys.centroid.bfloat16())
    return tuple(lists), kept


def centroid_bytes(score: Clustered, grid: TokenGrid, batch: int, head_dim: int) -> int:
    """Memory that the `Centroids` of one head take."""
    return sum(_numbers(score, grid)) * batch * head_dim * torch.bfloat16.itemsize


def cluster_cost(score: Clustered, grid: TokenGrid, again: bool) -> float:
    """FLOPs of clustering and of ranking pairs of clusters, in those of dense attention; `again`
    if the clustering begins where that of the last step ended."""
    queries, keys = _numbers(score, grid)
    distances = (score.again if again else score.first) * grid.video * (queries + keys)
    return 0.5 * (distances + queries * keys) / grid.tokens**2


def _numbers(score: Clustered, grid: TokenGrid) -> tuple[int, int]:
    """Clusters of queries and of keys that there are."""
    return min(score.queries, grid.video), min(score.keys, grid.video)


def _cut(label: Tensor, size: Tensor, grid: TokenGrid, block: int) -> tuple[Cut, Tensor]:
    """Text and clusters one after the other in blocks, and the stretch that each block is cut
    from: 0 and the last are text, the others clusters."""
    stretches = torch.cat(
        [torch.tensor([grid.text_before]), size, torch.tensor([grid.text_after])]
    )
    runs: Tiling = tiling(torch.nn.functional.pad(stretches.cumsum(0), (1, 0)), block)
    tokens = torch.arange(grid.tokens)
    video = slice(grid.text_before, grid.text_before + grid.video)
    tokens[video] = tokens[video][label.argsort(stable=True)]
    return Cut(tokens, torch.nn.functional.pad(runs.first, (0, 1), value=grid.tokens)), runs.block

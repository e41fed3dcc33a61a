"""ScoredBlocks: the list of blocks of a scored pattern, made from queries and keys.

    rank -> select -> add the sink -> list

The list itself lies on the CPU, so making it waits for the device once.
"""

from dataclasses import replace
from functools import lru_cache

from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, BlockIndices, block_indices, relisted
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Skip
from dit_sparse.kernels.ranking import score_blocks
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.selection import key_blocks_of_frames, select_blocks


@lru_cache(maxsize=64)
def geometry(order: TokenOrder, grid: TokenGrid, heads: int, block: int) -> BlockIndices:
    """Where `grid` is cut into blocks, as a list that visits none of them."""
    return block_indices((Skip(),) * heads, grid, order, block, block)


def scored_blocks(
    pattern: Scored,
    query: Tensor,
    key: Tensor,
    geometry: BlockIndices,
    *,
    scale: float | None = None,
    lse: Tensor | None = None,
    pooled: int = 0,
) -> BlockIndices:
    """The blocks that `pattern` keeps for all heads of `query` and `key`, one list for the batch.

    Args:
        pattern: the same for every head.
        query, key: `[batch, tokens, heads, head_dim]` in raster order, any strides.
        geometry: the cut of the grid in the order of the pattern; what it lists is not asked.
        scale: factor of the logits, defaults to `head_dim ** -0.5`.
        lse: of dense attention, float32 `[batch, heads, tokens]`, if the score needs it.
        pooled: r > 0 lists the blocks that are not kept as well, pooled by `2^r`.
    """
    if isinstance(pattern.score, Clustered):
        raise ValueError(f"{pattern} has a list for each head; make them with clustered_blocks")
    if geometry.order != pattern.order:
        raise ValueError(
            f"the geometry is in {geometry.order} order, {pattern} is in {pattern.order} order; "
            "make it with geometry(pattern.order, …)"
        )
    ranking = score_blocks(pattern.score, query, key, geometry, scale=scale, lse=lse)
    if pattern.sink_frames:
        sink = key_blocks_of_frames(geometry, pattern.sink_frames).to(query.device)
        sink = rearrange(sink, "j -> 1 1 j").expand_as(ranking.share)
        forced = sink if ranking.forced is None else ranking.forced | sink
        ranking = replace(ranking, forced=forced)
    tags = select_blocks(pattern.select, ranking, geometry)
    if pooled:
        tags = tags.masked_fill(tags == ABSENT, pooled)
    return relisted(tags, geometry)

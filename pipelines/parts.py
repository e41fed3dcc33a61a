"""Part: heads of a group that one list of blocks serves, and how lists are made.

analytic patterns   from the grid, once for each resolution
scored patterns     from queries, keys and, for some scores, the LSE of dense attention; where
                    they are scored by clusters, one list for each head
choices             from queries, keys and values; each head then has an analytic pattern
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, Density, block_indices
from dit_sparse.kernels.choosing import chosen_patterns
from dit_sparse.kernels.clustered_blocks import Centroids, clustered_blocks
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Choice, Columns, Full, Pattern
from dit_sparse.kernels.remainder import Pair
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.pipelines.heads import HeadGroup, head_groups

GRIDS_KEPT = 4
"""Resolutions whose block lists stay in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """Query, key and value of the heads of a group, `[batch, tokens, heads, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None

    def of(self, heads: tuple[int, ...]) -> "Operands":
        """Those of some of the heads."""
        if heads == tuple(range(self.query.shape[2])):
            return self
        picked = list(heads)
        return Operands(
            self.query[:, :, picked], self.key[:, :, picked], self.value[:, :, picked], self.scale
        )


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Heads of a group, by their place in it, their list, and where values are left out."""

    heads: tuple[int, ...]
    blocks: BlockIndices
    density: Density
    pv_skip: float | None = None


class Lists:
    """Makes the lists of head groups, and keeps those of analytic patterns.

    Args:
        groups (`Collection[HeadGroup]`): all that lists will be made for.
        block (`int`): tokens of a block of queries and of keys.
    """

    def __init__(self, groups: Collection[HeadGroup], block: int) -> None:
        self.block = block
        kept = {(group.patterns, group.pooled) for group in groups}
        kept |= {((Full(),) * len(group.heads), 0) for group in groups}
        # What a choice leads to depends on the heads; one list each is a fair guess.
        spare = sum(len(group.heads) for group in groups if group.choice is not None)
        self._listed = lru_cache(maxsize=GRIDS_KEPT * (len(kept) + spare))(self._block_indices)

    def full(self, heads: int, grid: TokenGrid) -> tuple[Part, ...]:
        """Everything."""
        return (self._part(tuple(range(heads)), (Full(),) * heads, 0, grid),)

    def analytic(self, group: HeadGroup, grid: TokenGrid) -> tuple[Part, ...]:
        """The list of patterns that follow from the grid."""
        heads = tuple(range(len(group.heads)))
        return (self._part(heads, group.patterns, group.pooled, grid),)

    def found(
        self,
        group: HeadGroup,
        operands: Operands,
        grid: TokenGrid,
        lse: Tensor | None,
        last: Centroids | None = None,
    ) -> tuple[tuple[Part, ...], Centroids | None]:
        """The lists of a scored pattern or of a choice and, if it is scored by clusters, where
        they are; `last` is where they were."""
        if group.scored is None:
            assert group.choice is not None
            return self._chosen(group, group.choice, operands, grid), None
        if isinstance(group.scored.score, Clustered):
            return self._clustered(group, group.scored, operands, grid, last)
        return (self._scored(group, group.scored, operands, grid, lse),), None

    def _clustered(
        self,
        group: HeadGroup,
        pattern: Scored,
        operands: Operands,
        grid: TokenGrid,
        last: Centroids | None,
    ) -> tuple[tuple[Part, ...], Centroids]:
        lists, centroids = clustered_blocks(
            pattern,
            operands.query,
            operands.key,
            grid,
            self.block,
            scale=operands.scale,
            last=last,
            pooled=group.pooled,
        )
        parts = (Part((head,), blocks, blocks.density()) for head, blocks in enumerate(lists))
        return tuple(parts), centroids

    def _scored(
        self,
        group: HeadGroup,
        pattern: Scored,
        operands: Operands,
        grid: TokenGrid,
        lse: Tensor | None,
    ) -> Part:
        blocks = scored_blocks(
            pattern,
            operands.query,
            operands.key,
            geometry(pattern.order, grid, len(group.heads), self.block),
            scale=operands.scale,
            lse=lse,
            pooled=group.pooled,
        )
        heads = tuple(range(len(group.heads)))
        return Part(heads, blocks, blocks.density(), pattern.pv_skip)

    def _chosen(
        self, group: HeadGroup, choice: Choice, operands: Operands, grid: TokenGrid
    ) -> tuple[Part, ...]:
        patterns = chosen_patterns(
            choice,
            operands.query,
            operands.key,
            operands.value,
            grid,
            self.block,
            scale=operands.scale,
        )
        groups = head_groups(patterns, (group.remainder,) * len(patterns))
        if not groups:
            return self.full(len(patterns), grid)
        parts = []
        for g in groups:
            # Columns that a head picked for itself serve no other, so that keeping lists is waste.
            own = any(isinstance(pattern, Columns) for pattern in g.patterns)
            listed = self._block_indices if own else self._listed
            parts.append(Part(g.heads, *listed(g.patterns, g.pooled, grid)))
        return tuple(parts)

    def _part(
        self, heads: tuple[int, ...], patterns: tuple[Pattern, ...], pooled: int, grid: TokenGrid
    ) -> Part:
        return Part(heads, *self._listed(patterns, pooled, grid))

    def _block_indices(
        self, patterns: tuple[Pattern, ...], pooled: int, grid: TokenGrid
    ) -> tuple[BlockIndices, Density]:
        block = self.block
        blocks = block_indices(patterns, grid, block_q=block, block_k=block, pooled=pooled)
        return blocks, blocks.density()


def attend(parts: tuple[Part, ...], operands: Operands, backend: str) -> Pair:
    """Output and LSE of all heads of a group."""
    pairs = []
    for part in parts:
        own = operands.of(part.heads)
        pairs.append(
            sparse_attention(
                own.query,
                own.key,
                own.value,
                part.blocks,
                scale=own.scale,
                pv_skip=part.pv_skip,
                backend=backend,
            )
        )
    if len(pairs) == 1:
        return pairs[0]
    place = torch.tensor([head for part in parts for head in part.heads]).argsort()
    place = place.to(operands.query.device)
    return (
        torch.cat([output for output, _ in pairs], 2)[:, :, place],
        torch.cat([lse for _, lse in pairs], 1)[:, place],
    )

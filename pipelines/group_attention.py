"""GroupAttention: computes the calls of head groups, Pattern x Remainder x Schedule.

    renewing   dense pass (if a score or a cache needs one) -> blocks -> cache
    reusing    sparse pass over the blocks found last, then the remainder's cache

A group that needs a dense pass returns the dense output at that step.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, Density, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full, Pattern
from dit_sparse.kernels.recall import block_recall
from dit_sparse.kernels.remainder import Pair, cache_of
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.pipelines.heads import HeadGroup
from dit_sparse.pipelines.memory import Found, Kept, Memory
from dit_sparse.pipelines.report import DENSE
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.stopwatch import Stopwatch

GRIDS_KEPT = 4
"""Resolutions whose block lists stay in memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a generation a call stands: guidance branch, layer, group of heads, step."""

    branch: str
    layer: str
    group: int
    step: int

    @property
    def key(self) -> tuple[str, str, int]:
        """All but the step."""
        return self.branch, self.layer, self.group


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """Query, key and value of the heads of a group, `[batch, tokens, heads, head_dim]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """The output of a group at one call.

    Args:
        output (`Tensor`): `[batch, tokens, heads, head_dim]`.
        density (`Density`): of what the output rests on; 1 for a dense pass.
        flops (`float`): of everything that was computed, scores included, in those of dense
            attention.
        dense (`bool`): whether it is the output of a dense pass.
    """

    output: Tensor
    density: Density
    flops: float
    dense: bool


class GroupAttention:
    """What a generation keeps, and what it takes to go on from there.

    Args:
        groups (`Collection[HeadGroup]`): all that will be computed.
        schedule (`Schedule`): says when to renew.
        block (`int`): tokens of a block of queries and of keys.
        backend (`str`): of `sparse_attention`.
        cache_limit (`int`, *optional*): bytes that caches may hold together.
    """

    def __init__(
        self,
        groups: Collection[HeadGroup],
        schedule: Schedule,
        block: int,
        backend: str,
        cache_limit: int | None,
    ) -> None:
        lists = {(group.patterns, group.pooled) for group in groups}
        lists |= {((Full(),) * len(group.heads), 0) for group in groups}
        self._listed = lru_cache(maxsize=GRIDS_KEPT * len(lists))(self._block_indices)
        self._schedule = schedule
        self._block = block
        self._backend = backend
        self._cache_limit = cache_limit
        self.begin()

    def begin(self) -> None:
        """Begin a generation: forget the one before."""
        self.memory = Memory(self._cache_limit)
        self.stopwatch = Stopwatch()

    def __call__(
        self, group: HeadGroup, place: Place, operands: Operands, grid: TokenGrid
    ) -> Computed:
        """The output of the heads of `group` at `place`.

        Raises:
            ValueError: a pattern refuses the grid.
        """
        last, kept = self.memory.found.get(self._owner(place)), self.memory.kept.get(place.key)
        search = group.scored is not None and self._search_due(last, operands, place.step)
        renew = group.remainder.cached and self._cache_due(kept, last, search, place.step)
        dense = None
        if renew or (search and last is None and group.needs_lse):
            full = self._listed((Full(),) * len(group.heads), 0, grid)[0]
            dense = self._pass(operands, full)
        if search:
            last = self._search(group, operands, grid, place, last, dense)
            self.memory.find(self._owner(place), last)
        if last is None:
            blocks, density = self._listed(group.patterns, group.pooled, grid)
        else:
            blocks, density = last.blocks, last.density
        flops = float(dense is not None) + search * group.search_cost(self._block)
        if dense is not None and not renew:
            return Computed(dense[0], DENSE, flops, dense=True)
        sparse = self._pass(operands, blocks)
        flops += density.weighted
        with self.stopwatch.stretch("remainder", sparse[0].device):
            if dense is not None:
                self.memory.keep(
                    place.key, Kept(place.step, cache_of(group.cached, dense, sparse))
                )
                return Computed(dense[0], DENSE, flops, dense=True)
            output = sparse[0]
            if kept is not None and kept.cache is not None:
                output = kept.cache.apply(sparse, place.step - kept.step)
        return Computed(output, density, flops, dense=False)

    def _owner(self, place: Place) -> tuple[str | None, str, int]:
        """Under which key the blocks of a place are remembered."""
        branch = None if self._schedule.share_branches else place.branch
        return branch, place.layer, place.group

    def _search_due(self, last: Found | None, operands: Operands, step: int) -> bool:
        if last is None or self._schedule.renews(step, last.step):
            return True
        if last.recall is None or self._schedule.recall is None or step == last.step:
            return False
        with self.stopwatch.stretch("search", operands.query.device):
            recall = block_recall(operands.query, operands.key, last.blocks, scale=operands.scale)
        return recall < self._schedule.recall * last.recall

    def _cache_due(self, kept: Kept | None, last: Found | None, search: bool, step: int) -> bool:
        if kept is None:
            return True
        if kept.cache is None:
            return False
        # A cache complements the blocks that it was taken with.
        replaced = last is not None and last.step > kept.step
        return search or replaced or self._schedule.renews(step, kept.step)

    def _search(
        self,
        group: HeadGroup,
        operands: Operands,
        grid: TokenGrid,
        place: Place,
        last: Found | None,
        dense: Pair | None,
    ) -> Found:
        assert group.scored is not None
        query, key, scale = operands.query, operands.key, operands.scale
        lse = None
        if group.needs_lse:
            lse = dense[1] if dense is not None else last.lse if last is not None else None
        with self.stopwatch.stretch("search", query.device):
            blocks = scored_blocks(
                group.scored,
                query,
                key,
                geometry(group.scored.order, grid, len(group.heads), self._block),
                scale=scale,
                lse=lse,
                pooled=group.pooled,
            )
            recall = None
            if self._schedule.recall is not None:
                recall = block_recall(query, key, blocks, scale=scale)
            density = blocks.density()
        again = self._schedule.renews_again
        return Found(place.step, blocks, density, lse if again else None, recall)

    def _pass(self, operands: Operands, blocks: BlockIndices) -> Pair:
        with self.stopwatch.stretch("attention", operands.query.device):
            return sparse_attention(
                operands.query,
                operands.key,
                operands.value,
                blocks,
                scale=operands.scale,
                backend=self._backend,
            )

    def _block_indices(
        self, patterns: tuple[Pattern, ...], pooled: int, grid: TokenGrid
    ) -> tuple[BlockIndices, Density]:
        block = self._block
        blocks = block_indices(patterns, grid, block_q=block, block_k=block, pooled=pooled)
        return blocks, blocks.density()

"""GroupAttention: computes the calls of head groups, Pattern x Remainder x Schedule.

    renewing   dense pass (if a score or a cache needs one) -> blocks -> cache
    reusing    sparse pass over the blocks found last, then the remainder's cache

A group that needs a dense pass returns the dense output at that step, unless its score is an
oracle, which may know dense attention and not show it.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from dit_sparse.kernels.blocks import Density
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.recall import block_recall
from dit_sparse.kernels.remainder import Pair, cache_bytes, cache_of
from dit_sparse.pipelines.heads import HeadGroup
from dit_sparse.pipelines.memory import Found, Kept, Memory
from dit_sparse.pipelines.parts import Lists, Operands, Part, attend
from dit_sparse.pipelines.report import DENSE, mean_density
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a generation a call stands: guidance branch, layer, group of heads, step; and the
    number of the layer among those that renew."""

    branch: str
    layer: str
    group: int
    step: int
    number: int = 0

    @property
    def key(self) -> tuple[str, str, int]:
        """What stays the same from step to step."""
        return self.branch, self.layer, self.group


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
        self._lists = Lists(groups, block)
        self._schedule = schedule
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
        if kept is None and group.remainder.cached and not self._fits(group, operands):
            kept = self.memory.leave(place.key, place.step)
        search = group.found and self._search_due(last, operands, place)
        renew = group.remainder.cached and self._cache_due(kept, last, search, place)
        dense = None
        if renew or (search and group.needs_lse and (last is None or group.oracle)):
            dense = self._pass(operands, self._lists.full(len(group.heads), grid))
        flops = float(dense is not None)
        if search:
            flops += group.search_cost(grid, self._lists.block, again=last is not None)
            last = self._search(group, operands, grid, place.step, last, dense)
            # Lists are long where every head has its own: none waits for the next to be made.
            kept_parts = () if self._schedule.renews_always else last.parts
            self.memory.find(self._owner(place), replace(last, parts=kept_parts))
        parts = self._lists.analytic(group, grid) if last is None else last.parts
        if dense is not None and not renew and not group.oracle:
            return Computed(dense[0], DENSE, flops, dense=True)
        sparse = self._pass(operands, parts)
        density = mean_density([(part.density, len(part.heads)) for part in parts])
        flops += density.weighted
        with self.stopwatch.stretch("remainder", sparse[0].device):
            if dense is not None and renew:
                cache = cache_of(group.cached, dense, sparse)
                self.memory.keep(place.key, Kept(place.step, cache))
                return Computed(dense[0], DENSE, flops, dense=True)
            output = sparse[0]
            if kept is not None and kept.cache is not None:
                output = kept.cache.apply(sparse, place.step - kept.step)
        return Computed(output, density, flops, dense=False)

    def _owner(self, place: Place) -> tuple[str | None, str, int]:
        """Under which key the blocks of a place are remembered."""
        branch = None if self._schedule.share_branches else place.branch
        return branch, place.layer, place.group

    def _search_due(self, last: Found | None, operands: Operands, place: Place) -> bool:
        if last is None or not last.parts:
            return True
        if self._schedule.renews(place.step, last.step, place.number):
            return True
        if last.recall is None or self._schedule.recall is None or place.step == last.step:
            return False
        with self.stopwatch.stretch("search", operands.query.device):
            recall = self._recall(operands, last.parts)
        return recall < self._schedule.recall * last.recall

    def _fits(self, group: HeadGroup, operands: Operands) -> bool:
        """Whether there is room for the cache of the group by itself: a dense pass for one that
        is larger than the limit would be for nothing."""
        size = cache_bytes(group.remainder, *operands.query.shape)
        return self._cache_limit is None or size <= self._cache_limit

    def _cache_due(
        self, kept: Kept | None, last: Found | None, search: bool, place: Place
    ) -> bool:
        if kept is None:
            return True
        if kept.cache is None:
            return False
        # A cache complements the blocks that it was taken with.
        replaced = last is not None and last.step > kept.step
        return search or replaced or self._schedule.renews(place.step, kept.step, place.number)

    def _search(
        self,
        group: HeadGroup,
        operands: Operands,
        grid: TokenGrid,
        step: int,
        last: Found | None,
        dense: Pair | None,
    ) -> Found:
        lse: Tensor | None = None
        if group.needs_lse:
            lse = dense[1] if dense is not None else last.lse if last is not None else None
        with self.stopwatch.stretch("search", operands.query.device):
            before = None if last is None else last.centroids
            parts, centroids = self._lists.found(group, operands, grid, lse, before)
            watched = group.scored is not None and self._schedule.recall is not None
            recall = self._recall(operands, parts) if watched else None
        if not self._schedule.renews_again:
            lse = centroids = None
        # Every search has a dense pass of its own: an oracle's, or that of a cache which is kept.
        if group.oracle or (group.remainder.cached and self._cache_limit is None):
            lse = None
        return Found(step, parts, lse, recall, centroids)

    def _recall(self, operands: Operands, parts: tuple[Part, ...]) -> float:
        held = 0.0
        for part in parts:
            own = operands.of(part.heads)
            recall = block_recall(own.query, own.key, part.blocks, scale=own.scale)
            held += recall * len(part.heads)
        return held / operands.query.shape[2]

    def _pass(self, operands: Operands, parts: tuple[Part, ...]) -> Pair:
        with self.stopwatch.stretch("attention", operands.query.device):
            return attend(parts, operands, self._backend)

"""Stage: what a sparse step does beside its passes over blocks, to be timed and predicted.

    search   score, select, make the list, choose a backend      by queries and keys of the step
    take     the cache of a remainder                            by the dense and the sparse pair
    apply    the cache to the sparse pair of a later step

A calibration keeps their costs beside those of backends, under the names that `str` gives. Pooling
is no stage: backends pool inside a pass. What a GPU lays out at the first pass over a new list is
in neither.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dit_sparse.kernels.backend import choose
from dit_sparse.kernels.calibration import Work
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.remainder import Cached, Complement, Pair, Rescale, cache_of
from dit_sparse.kernels.score import BlockScore, Mass, Means, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import TopRow

_SELECTED = 0.25
"""Density of the lists that timed searches make."""


@dataclass(frozen=True, slots=True)
class Calls:
    """What stages are timed on.

    Attributes:
        call: gives queries, keys and the cut into blocks.
        dense, sparse: output and LSE of dense attention and of the call.
    """

    call: AttentionCall
    dense: Pair
    sparse: Pair


@dataclass(frozen=True, slots=True)
class Search:
    """Finding the blocks of a scored pattern once."""

    score: BlockScore

    def __str__(self) -> str:
        return f"search by {self.score}"

    def work(self, batch: int, tokens: int, heads: int, block: int) -> Work:
        """Tokens and, as whole, logits that are taken, in blocks of 128 x 128; as partial, the
        pairs of blocks that are ranked, for which a batch counts once."""
        # Dense attention takes as long for its values as for its logits.
        logits = 2 * self.score.cost(block) * batch * heads * (tokens / 128) ** 2
        pairs = heads * (-(-tokens // block)) ** 2
        return Work(batch * heads * tokens / 128, logits, pairs)

    def job(self, calls: Calls) -> Callable[[], object]:
        """The stage as `pipelines.group_attention` goes through it, once for every call."""
        call = calls.call
        cut = geometry(raster(), call.blocks.grid, call.blocks.heads, call.blocks.block_q)
        pattern = Scored(self.score, TopRow(_SELECTED))

        def search() -> object:
            blocks = scored_blocks(
                pattern, call.query, call.key, cut, scale=call.scale, lse=calls.dense[1]
            )
            # Reports ask for it.
            blocks.density()
            return choose(AttentionCall(call.query, call.key, call.value, blocks, call.scale))

        return search


@dataclass(frozen=True, slots=True)
class Caching:
    """What is done with the cache of a remainder, passes not included."""

    remainder: Cached

    def work(self, batch: int, tokens: int, heads: int, block: int) -> Work:
        """Tokens, whatever the blocks."""
        return Work(batch * heads * tokens / 128, 0.0, 0.0)


class Take(Caching):
    """Taking it."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"take {self.remainder}"

    def job(self, calls: Calls) -> Callable[[], object]:
        """As that of `Search`."""
        return lambda: cache_of(self.remainder, calls.dense, calls.sparse)


class Apply(Caching):
    """Applying it to a sparse pair."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"apply {self.remainder}"

    def job(self, calls: Calls) -> Callable[[], object]:
        """As that of `Search`."""
        cache = cache_of(self.remainder, calls.dense, calls.sparse)
        return lambda: cache.apply(calls.sparse, 1)


Stage = Search | Take | Apply

_SCORES = (Mass(), Mass(rows=None), Sampled(), Means())
_CACHED: tuple[Cached, ...] = (Rescale(), Complement())

STAGES: tuple[Stage, ...] = (
    *map(Search, _SCORES),
    *(stage(remainder) for stage in (Take, Apply) for remainder in _CACHED),
)
"""Those that are calibrated: what the space of a search may hold among them."""

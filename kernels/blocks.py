"""BlockIndices: for each head and block of queries, the blocks of keys to visit.

    patterns + grid -> order -> blocks of queries x blocks of keys -> which are touched, and how

A block of keys is listed if the pattern keeps at least one of its pairs, and only then. It is
tagged whole if it keeps all of them; otherwise partial, and the pattern itself decides inside.
Blocks that no pattern touches may be asked for with keys pooled by `2^r`: runs of as many
positions of the block, each attended to as one key, the mean of its tokens, with `ln(their
number)` added to the logit, and as one value. Padded text is left out of means and numbers.

Queries and keys are tokens of one grid. Either may be only some of them, a `Shard`; blocks then
hold those alone.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.counts import Cut, cuts
from dit_sparse.kernels.density import Density as Density
from dit_sparse.kernels.fault import fault_of
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.shard import Shard, raster_tokens
from dit_sparse.kernels.visited import ABSENT as ABSENT
from dit_sparse.kernels.visited import MOST_POOLED as MOST_POOLED
from dit_sparse.kernels.visited import PARTIAL as PARTIAL
from dit_sparse.kernels.visited import WHOLE as WHOLE
from dit_sparse.kernels.visited import filled, visited


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class BlockIndices:
    """Compressed rows of key blocks; a row is a (head, query block) pair, heads first.

    Row `r` visits `key_block[row_pointer[r]:row_pointer[r + 1]]`, ascending. Blocks are runs of
    the sequences `permutation` of queries and `key_permutation` of keys (position -> row of the
    tensor, which is the raster token where the tensor holds all of them), cut at `query_offsets`
    and `key_offsets`. All tensors are on the CPU and must not be written to; two values are equal
    only if they are one object, so that backends can keep what they prepared.

    Attributes:
        grid: where the tokens stand, with the valid text of each sample.
        order: the order that both permutations realize; `None` if each is one of its own.
        block_q, block_k: largest number of tokens in a block of queries, of keys.
        heads: number of heads.
        permutation, key_permutation: `[queries]`, `[keys]`, int64; int32 without `order`.
        query_offsets, key_offsets: int64 `[blocks + 1]`.
        row_pointer: int32 `[heads * query_blocks + 1]`.
        key_block: int32 `[entries]`.
        tag: int8 `[entries]`: `WHOLE`, `PARTIAL`, or r > 0 for keys pooled by `2^r`.
        kept: int64 `[heads]`, pairs of tokens that each head keeps.
        patterns: one for each head; `None` if the list came from a table of blocks.
        queries, keys: the tokens that query, and key and value, hold; `None` if they hold all.
        handle: a number by which operators of PyTorch name this object; see `by_handle`.
        sound: a list whose cut is not checked again if this one has the very same.
    """

    grid: TokenGrid
    order: TokenOrder | None
    block_q: int
    block_k: int
    heads: int
    permutation: Tensor
    key_permutation: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    row_pointer: Tensor
    key_block: Tensor
    tag: Tensor
    kept: Tensor
    patterns: tuple[Pattern, ...] | None
    queries: Shard | None = None
    keys: Shard | None = None
    handle: int = field(init=False)
    sound: InitVar["BlockIndices | None"] = None

    def __post_init__(self, sound: "BlockIndices | None") -> None:
        reason = fault_of(self, sound)
        if reason is not None:
            raise ValueError(f"not a list of blocks: {reason}")
        object.__setattr__(self, "handle", next(_handles))
        _live[self.handle] = self

    @property
    def query_blocks(self) -> int:
        """Number of blocks of queries."""
        return len(self.query_offsets) - 1

    @property
    def key_blocks(self) -> int:
        """Number of blocks of keys."""
        return len(self.key_offsets) - 1

    @property
    def query_raster(self) -> Tensor:
        """Raster token of each row of the query, int64 `[queries]`."""
        return raster_tokens(self.queries, torch.arange(len(self.permutation)))

    @property
    def key_raster(self) -> Tensor:
        """Raster token of each row of key and value, int64 `[keys]`."""
        return raster_tokens(self.keys, torch.arange(len(self.key_permutation)))

    @property
    def query_sequence(self) -> Tensor:
        """Raster token at each position of the queries, int64 `[queries]`."""
        return raster_tokens(self.queries, self.permutation)

    @property
    def key_sequence(self) -> Tensor:
        """Raster token at each position of the keys, int64 `[keys]`."""
        return raster_tokens(self.keys, self.key_permutation)

    @property
    def sharded(self) -> bool:
        """Whether queries or keys are only some of the tokens."""
        return self.queries is not None or self.keys is not None

    def query_rows(self, block: int) -> Tensor:
        """Rows of the query that a block of queries holds, int64."""
        return self.permutation[self.query_offsets[block] : self.query_offsets[block + 1]].long()

    def key_rows(self, block: int) -> Tensor:
        """Rows of key and value that a block of keys holds, int64."""
        return self.key_permutation[self.key_offsets[block] : self.key_offsets[block + 1]].long()

    def query_tokens(self, block: int) -> Tensor:
        """Raster tokens of a block of queries, int64."""
        return raster_tokens(self.queries, self.query_rows(block))

    def key_tokens(self, block: int) -> Tensor:
        """Raster tokens of a block of keys, int64."""
        return raster_tokens(self.keys, self.key_rows(block))

    def entries(self, head: int, query_block: int) -> Iterator[tuple[int, int]]:
        """The key blocks of a row with their tags."""
        row = head * self.query_blocks + query_block
        span = slice(int(self.row_pointer[row]), int(self.row_pointer[row + 1]))
        return zip(self.key_block[span].tolist(), self.tag[span].tolist(), strict=True)

    def density(self) -> Density:
        """The three densities, exact."""
        total = self.heads * len(self.permutation) * len(self.key_permutation)
        element = int(self.kept.sum()) / total
        if self.patterns is None and not self.tag.any():
            return Density(element, element, element)  # all blocks are whole
        queries = self.query_offsets.diff().repeat(self.heads)
        queries = queries.repeat_interleave(self.row_pointer.diff(), output_size=len(self.tag))
        visited = queries * self.key_offsets.diff()[self.key_block]
        return Density(
            element=element,
            block=int(visited.sum()) / total,
            weighted=float((visited / 2.0 ** self.tag.clamp_min(0)).sum()) / total,
        )


_handles = itertools.count()
_live: WeakValueDictionary[int, BlockIndices] = WeakValueDictionary()


def by_handle(handle: int) -> BlockIndices:
    """The living BlockIndices with that handle."""
    try:
        return _live[handle]
    except KeyError:
        raise ValueError(
            f"BlockIndices {handle} is gone; keep it as long as what was compiled with it"
        ) from None


def block_indices(
    patterns: Sequence[Pattern],
    grid: TokenGrid,
    order: TokenOrder | None = None,
    block_q: int = 128,
    block_k: int = 128,
    pooled: int = 0,
    *,
    queries: Shard | None = None,
    keys: Shard | None = None,
) -> BlockIndices:
    """The blocks that `patterns`, one for each head, visit on `grid`.

    Args:
        patterns: one pattern per head; heads may differ.
        grid: where the tokens stand.
        order: defaults to the order that the patterns ask for, raster if none does.
        block_q, block_k: tokens in a block of queries, of keys.
        pooled: r > 0 lists the blocks that a pattern does not touch as well, pooled by `2^r`.
        queries, keys: the tokens that query, and key and value, hold; all of them if `None`.

    Raises:
        ValueError: a pattern or a shard refuses the grid, or `order` is missing and heads ask for
            different ones.

    >>> from dit_sparse.kernels.pattern import Band, Full
    >>> block_indices([Full(), Band(16)], TokenGrid(2, 8, 8), block_q=16, block_k=16).density()
    Density(element=0.62060546875, block=0.671875, weighted=0.671875)
    """
    patterns = tuple(patterns)
    if not patterns:
        raise ValueError("block_indices needs one pattern for each head, got none")
    for pattern in dict.fromkeys(patterns):
        reason = pattern.refusal(grid)
        if reason is not None:
            raise ValueError(reason)
    order = _common_order(patterns) if order is None else order
    if not 0 <= pooled <= MOST_POOLED:
        raise ValueError(f"pooled must be in 0..{MOST_POOLED}, got {pooled}")
    largest, shards = (block_q, block_k), (queries, keys)
    geometry = replace(grid, valid_text=None)
    rows = [visited(pattern, geometry, order, largest, shards) for pattern in patterns]
    sides = cuts(grid, order, largest, shards)
    if pooled:
        rows = [filled(row, len(sides[1].offsets) - 1, pooled) for row in rows]
    return _assemble(
        grid,
        order,
        largest,
        sides,
        counts=torch.cat([row.counts for row in rows]),
        key_block=torch.cat([row.key_block for row in rows]),
        tag=torch.cat([row.tag for row in rows]),
        kept=torch.tensor([row.kept for row in rows]),
        patterns=patterns,
    )


@lru_cache(maxsize=1024)
def block_density(pattern: Pattern, grid: TokenGrid, block: int) -> float:
    """Share of the pairs in the blocks of `block` x `block` tokens that `pattern` visits, in the
    order it wants; a `ValueError` if it refuses the grid."""
    return block_indices((pattern,), grid, block_q=block, block_k=block).density().block


def from_block_mask(
    mask: Tensor,
    grid: TokenGrid,
    order: TokenOrder | None = None,
    block_q: int = 128,
    block_k: int = 128,
    *,
    queries: Shard | None = None,
    keys: Shard | None = None,
) -> BlockIndices:
    """The blocks where `mask`, bool `[heads, query_blocks, key_blocks]`, is true, all whole."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be of dtype bool, got {mask.dtype}")
    tags = torch.where(mask, WHOLE, ABSENT).to(torch.int8)
    return from_tags(tags, grid, order, block_q, block_k, queries=queries, keys=keys)


def from_tags(
    tags: Tensor,
    grid: TokenGrid,
    order: TokenOrder | None = None,
    block_q: int = 128,
    block_k: int = 128,
    *,
    queries: Shard | None = None,
    keys: Shard | None = None,
) -> BlockIndices:
    """The blocks that `tags`, int8 `[heads, query_blocks, key_blocks]`, asks for: `ABSENT`,
    `WHOLE`, or r in 1..7 for keys pooled by `2^r` (Pyramid Sparse Attention, arXiv 2512.04025)."""
    order = raster() if order is None else order
    largest = block_q, block_k
    return from_cuts(tags, grid, cuts(grid, order, largest, (queries, keys)), largest, order)


def relisted(tags: Tensor, blocks: BlockIndices) -> BlockIndices:
    """As `from_tags`, for all tokens of a grid, cut as they are in another list."""
    if blocks.sharded:
        raise ValueError("expected a list of all tokens, got one of a shard; use from_tags")
    queries = Cut(blocks.permutation, blocks.query_offsets)
    sides = queries, Cut(blocks.key_permutation, blocks.key_offsets)
    return from_cuts(
        tags, blocks.grid, sides, (blocks.block_q, blocks.block_k), blocks.order, blocks
    )


def from_cuts(
    tags: Tensor,
    grid: TokenGrid,
    sides: tuple[Cut, Cut],
    largest: tuple[int, int],
    order: TokenOrder | None = None,
    sound: BlockIndices | None = None,
) -> BlockIndices:
    """As `from_tags`, for queries and keys that are each cut in an order of their own, if it is
    not `order`, into blocks of at most `largest` tokens; perhaps as those of `sound`."""
    queries, keys = (side.offsets.diff().to(tags.device) for side in sides)
    if tags.ndim != 3 or tags.shape[1:] != (len(queries), len(keys)):
        raise ValueError(
            f"a table of blocks must be [heads, {len(queries)}, {len(keys)}] for grid {grid} in "
            f"blocks of {largest[0]} x {largest[1]}, got {tuple(tags.shape)}"
        )
    listed = tags != ABSENT
    tag = tags[listed]
    wrong = (tag < WHOLE) | (tag > MOST_POOLED)
    if tags.dtype != torch.int8 or wrong.any():
        raise ValueError(
            f"tags must be int8, {ABSENT} for absent or 0..{MOST_POOLED}, got {tags.dtype} with "
            f"{tag[wrong].unique().tolist()[:8]}"
        )
    return _assemble(
        grid,
        order,
        largest,
        sides,
        counts=listed.sum(-1).flatten().cpu(),
        key_block=listed.nonzero()[:, 2].to(torch.int32).cpu(),
        tag=tag.cpu(),
        kept=(((tags == WHOLE) * queries[:, None]).sum(1) * keys).sum(-1).cpu(),
        patterns=None,
        sound=sound,
    )


def _assemble(
    grid: TokenGrid,
    order: TokenOrder | None,
    largest: tuple[int, int],
    sides: tuple[Cut, Cut],
    *,
    counts: Tensor,
    key_block: Tensor,
    tag: Tensor,
    kept: Tensor,
    patterns: tuple[Pattern, ...] | None,
    sound: BlockIndices | None = None,
) -> BlockIndices:
    place = torch.int32 if order is None else torch.int64
    return BlockIndices(
        grid=grid,
        order=order,
        block_q=largest[0],
        block_k=largest[1],
        heads=len(kept),
        permutation=sides[0].rows().to(place),
        key_permutation=sides[1].rows().to(place),
        query_offsets=sides[0].offsets,
        key_offsets=sides[1].offsets,
        row_pointer=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        key_block=key_block,
        tag=tag,
        kept=kept,
        patterns=patterns,
        queries=sides[0].shard,
        keys=sides[1].shard,
        sound=sound,
    )


def _common_order(patterns: tuple[Pattern, ...]) -> TokenOrder:
    wanted: dict[TokenOrder, list[int]] = {}
    for head, pattern in enumerate(patterns):
        if pattern.order is not None:
            wanted.setdefault(pattern.order, []).append(head)
    if len(wanted) > 1:
        table = "; ".join(
            f"{order}: " + ", ".join(f"head {head} ({patterns[head]})" for head in heads)
            for order, heads in wanted.items()
        )
        raise ValueError(
            f"the heads ask for different token orders ({table}); give order=, or build one "
            "BlockIndices for each order"
        )
    return next(iter(wanted), raster())

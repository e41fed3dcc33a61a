"""Visited: the blocks of keys that one pattern visits, as the rows of one head."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dit_sparse.kernels.counts import cuts, pair_counts
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.shard import Shard

WHOLE = 0
PARTIAL = -1
ABSENT = -2
"""Tag of a block that is not visited, in a dense table of tags; never in a `BlockIndices`."""

MOST_POOLED = 7


@dataclass(frozen=True, slots=True)
class Visited:
    """The rows of one head: entries in each, key blocks, tags, and the pairs kept in all."""

    counts: Tensor
    key_block: Tensor
    tag: Tensor
    kept: int


@lru_cache(maxsize=64)
def visited(
    pattern: Pattern,
    grid: TokenGrid,
    order: TokenOrder,
    largest: tuple[int, int],
    shards: tuple[Shard | None, Shard | None],
) -> Visited:
    """What `pattern` visits in blocks of at most `largest` queries and keys of `shards`."""
    queries, keys = cuts(grid, order, largest, shards)
    sizes, columns = queries.offsets.diff(), keys.offsets.diff()
    counts, key_blocks, tags, kept = [], [], [], 0
    for rows, pairs in pair_counts(pattern, grid, queries, keys):
        row, column = pairs.nonzero(as_tuple=True)
        whole = pairs[row, column] == sizes[rows][row] * columns[column]
        counts.append(row.bincount(minlength=len(pairs)))
        key_blocks.append(column.to(torch.int32))
        tags.append(torch.where(whole, WHOLE, PARTIAL).to(torch.int8))
        kept += int(pairs.sum())
    return Visited(torch.cat(counts), torch.cat(key_blocks), torch.cat(tags), kept)


def filled(row: Visited, key_blocks: int, tag: int) -> Visited:
    """The same rows with all other key blocks listed under `tag`."""
    tags = torch.full((len(row.counts), key_blocks), tag, dtype=torch.int8)
    place = torch.arange(len(row.counts)).repeat_interleave(row.counts)
    tags[place, row.key_block.long()] = row.tag
    key_block = torch.arange(key_blocks, dtype=torch.int32).repeat(len(row.counts))
    return Visited(torch.full_like(row.counts, key_blocks), key_block, tags.flatten(), row.kept)

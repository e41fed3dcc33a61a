"""Worklist: the tables by which a GPU walks one BlockIndices, tile by tile.

    blocks of queries and keys -> tiles of at most block_q x block_k tokens, never across a block
    a row: one head's tile of queries; its lists: whole tiles | masked ones | those by intervals
           | those by bits

Tiles that are short or hold padded text are listed with the masked ones; as `-1 - tile` where the
pattern keeps them whole. Everything is computed once for a BlockIndices and a device, and kept as
long as the former lives.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.bit_tiles import Bits, bit_tiles
from dit_sparse.kernels.bitmasks import unwindowed
from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.order import ORDERS, raster
from dit_sparse.kernels.pooled import Pooled, Runs, pooled
from dit_sparse.kernels.predicates import Predicates, predicates
from dit_sparse.kernels.shard import Shard
from dit_sparse.kernels.tiling import Tiling, ragged, real_tokens, tiling

# Times of a masked tile and a group of pooled keys in those of a whole tile, and of a row with
# none; by instruction counts. They only decide which rows start first.
_MASKED, _POOLED, _ROW = 1.5, 3.5, 0.3

_SECTIONS = 4


class Lists(NamedTuple):
    """int32. rows `[rows]`: longest first. bounds `[4 * rows + 1]`: the four lists of each row,
    in `first` (the first position of a tile of keys) and `tile`. query_first, query_count
    `[query tiles]`. key_count `[batch or 1, key tiles]`: real keys. permutation `[queries]`.
    word_group, interval_group `[heads]`."""

    rows: Tensor
    bounds: Tensor
    first: Tensor
    tile: Tensor
    query_first: Tensor
    query_count: Tensor
    key_count: Tensor
    permutation: Tensor
    word_group: Tensor
    interval_group: Tensor
    query_tiles: int
    count_stride: int


@dataclass(frozen=True, slots=True, eq=False)
class Worklist:
    """The tables on one device, the order in which keys are gathered, int32 `[keys]`, and which
    of the lists are in use."""

    lists: Lists
    predicates: Predicates
    bits: Bits
    pooled: Pooled
    runs: Runs
    key_permutation: Tensor
    rows: int
    permuted: bool
    masked: bool


_kept: WeakKeyDictionary[BlockIndices, dict[tuple[int, int, torch.device], Worklist]]
_kept = WeakKeyDictionary()


def worklist(blocks: BlockIndices, block_q: int, block_k: int, device: torch.device) -> Worklist:
    """The Worklist of `blocks` in tiles of `block_q x block_k`, made or remembered."""
    known, key = _kept.setdefault(blocks, {}), (block_q, block_k, device)
    if key not in known:
        known[key] = _build(blocks, block_q, block_k, device)
    return known[key]


def _build(blocks: BlockIndices, block_q: int, block_k: int, device: torch.device) -> Worklist:
    # On the device itself: a list that is found while denoising may have a million entries.
    queries = tiling(blocks.query_offsets.to(device), block_q)
    keys = tiling(blocks.key_offsets.to(device), block_k)
    rows = blocks.heads * len(queries)
    real = real_tokens(blocks.grid, blocks.key_sequence, keys)
    rules = predicates(blocks, queries, keys, real, block_k)
    row, source, key_block, tag = _entries(blocks, queries)
    runs, groups = pooled(blocks, row, key_block, tag, rows, block_k)

    tile_counts = keys.block.bincount(minlength=blocks.key_blocks)
    unpooled = tag <= WHOLE
    row, source, key_block, tag = (x[unpooled] for x in (row, source, key_block.long(), tag))
    entry, within = ragged(tile_counts[key_block])
    tile = (tile_counts.cumsum(0) - tile_counts)[key_block[entry]] + within
    row, source, whole = row[entry], source[entry], tag[entry] == WHOLE
    empty = _settle(rules, row, tile, whole, len(queries))
    row, source, tile, whole = (x[~empty] for x in (row, source, tile, whole))
    full = (real == block_k).all(0)
    kind = torch.where(rules.interval_group >= 0, 2, 1)
    patterns = unwindowed(blocks)
    for heads in patterns.values():
        kind[heads] = 3
    section = torch.where(whole, torch.where(full[tile], 0, 1), kind[row // len(queries)])
    order = torch.argsort(_SECTIONS * row + section, stable=True)
    counts = (_SECTIONS * row + section).bincount(minlength=_SECTIONS * rows)
    places = (x[order] for x in (source, row % len(queries), tile))
    bits = bit_tiles(blocks, patterns, queries, keys, *places)
    listed = torch.where(whole & ~full[tile], -1 - tile, tile)

    counted = counts.view(rows, _SECTIONS)
    cost = counted[:, 0] + _MASKED * counted[:, 1:].sum(1)
    cost = cost + _POOLED * groups.bounds.diff() + _ROW
    lists = Lists(
        rows=torch.argsort(cost, descending=True, stable=True).int(),
        bounds=torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int(),
        # The kernel looks one entry ahead, past the last.
        first=torch.nn.functional.pad(keys.first[tile[order]], (0, 1)).int(),
        tile=listed[order].int(),
        query_first=queries.first.int(),
        query_count=queries.count.int(),
        key_count=real.int(),
        permutation=_sequence(blocks, blocks.queries, blocks.permutation, device),
        word_group=rules.word_group.clamp_min(0).int(),
        interval_group=rules.interval_group.clamp_min(0).int(),
        query_tiles=len(queries),
        count_stride=len(keys) if len(real) > 1 else 0,
    )
    return Worklist(
        lists=_moved(lists, device),
        predicates=replace(
            rules,
            words=_moved(rules.words, device),
            intervals=_moved(rules.intervals, device),
        ),
        bits=bits,
        pooled=_moved(groups, device),
        runs=_moved(runs, device),
        key_permutation=_sequence(blocks, blocks.keys, blocks.key_permutation, device),
        rows=rows,
        permuted=blocks.order != raster(),
        masked=bool((section == 1).any()),
    )


def _settle(
    rules: Predicates, row: Tensor, tile: Tensor, whole: Tensor, query_tiles: int
) -> Tensor:
    """Marks in `whole` masked tiles of keys that are kept whole; returns where none is kept."""
    empty, head, query_tile = torch.zeros_like(whole), row // query_tiles, row % query_tiles
    for heads, bounds in rules.bounds:
        own = torch.tensor(heads, device=head.device)
        masked = (~whole & torch.isin(head, own)).nonzero()[:, 0]
        pairs = query_tile[masked], tile[masked]
        empty[masked], whole[masked] = bounds.empty(*pairs), bounds.whole(*pairs)
    return empty


def _sequence(
    blocks: BlockIndices, shard: Shard | None, permutation: Tensor, device: torch.device
) -> Tensor:
    """A permutation on the device, int32; one for all lists in the same order."""
    if blocks.order is None:
        return permutation.int().to(device)
    key = blocks.order, replace(blocks.grid, valid_text=None), shard, device
    return ORDERS.get(key, lambda: permutation.int().to(device))


def _entries(blocks: BlockIndices, queries: Tiling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row of a tile of queries, place in the list, key block and tag of every entry; sorted by
    row."""
    device = queries.block.device
    lists = (x.to(device) for x in (blocks.row_pointer, blocks.key_block, blocks.tag))
    row_pointer, key_block, tag = lists
    heads = torch.arange(blocks.heads, device=device)[:, None] * blocks.query_blocks
    source = (heads + queries.block).flatten()
    row, within = ragged(row_pointer.diff()[source])
    entry = row_pointer[source][row] + within
    return row, entry, key_block[entry], tag[entry]


Table = TypeVar("Table", bound=tuple[Any, ...])


def _moved(table: Table, device: torch.device) -> Table:
    moved = (x.to(device) if isinstance(x, Tensor) else x for x in table)
    return cast(Table, type(table)(*moved))

"""PairCounts: how many pairs of each block of queries and block of keys a pattern keeps.

Where a pattern is made of windows, and its windows follow from each query's own place and never
move back, blocks are taken apart into boxes of places. The pairs of two boxes are a product:

    pairs(box, box') = product over axes of  sum over u in box: |window(u) and box'|

which is exact, in closed form, and needs no pair of tokens. Where there is one axis only and
blocks are no boxes of it, the queries of a block that see each place are counted. All else is
counted pair by pair.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Pattern, Skip
from dit_sparse.kernels.shard import Shard
from dit_sparse.kernels.tiling import block_of
from dit_sparse.kernels.windows import Windows

_AT_ONCE = 1 << 22  # numbers held in one step
_MOST_BOXES = 1 << 24  # pairs of boxes that are few on any grid


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """All tokens, or those of a shard, in the sequence of an order, and where it is cut into
    blocks: raster tokens int64 `[tokens]`, offsets int64 `[blocks + 1]`. Text and video share no
    block."""

    tokens: Tensor
    offsets: Tensor
    shard: Shard | None = None

    def video(self, grid: TokenGrid) -> slice:
        """The positions of the video tokens, which follow one another."""
        if self.shard is None:
            return slice(grid.text_before, grid.text_before + grid.video)
        before = int((self.tokens < grid.text_before).sum())
        after = int((self.tokens >= grid.text_before + grid.video).sum())
        return slice(before, len(self.tokens) - after)

    def rows(self) -> Tensor:
        """The row of a tensor that holds the token at each position, int64 `[tokens]`."""
        if self.shard is None:
            return self.tokens
        return torch.searchsorted(self.shard.tokens(), self.tokens)


def cut(grid: TokenGrid, order: TokenOrder, block: int, shard: Shard | None = None) -> Cut:
    """The blocks of at most `block` tokens of `order`."""
    tokens = order.permutation(grid)
    if shard is None:
        return Cut(tokens, order.offsets(grid, block))
    reason = shard.refusal(grid)
    if reason is not None:
        raise ValueError(reason)
    held = torch.zeros(grid.tokens, dtype=torch.bool)
    held[shard.tokens()] = True
    held = held[tokens]
    return Cut(tokens[held], order.offsets(grid, block, held), shard)


def cuts(
    grid: TokenGrid,
    order: TokenOrder,
    largest: tuple[int, int],
    shards: tuple[Shard | None, Shard | None] = (None, None),
) -> tuple[Cut, Cut]:
    """The blocks of queries and of keys; the same object if nothing tells them apart."""
    queries = cut(grid, order, largest[0], shards[0])
    same = largest[0] == largest[1] and shards[0] == shards[1]
    return queries, queries if same else cut(grid, order, largest[1], shards[1])


def pair_counts(
    pattern: Pattern, grid: TokenGrid, queries: Cut, keys: Cut
) -> Iterator[tuple[slice, Tensor]]:
    """For one slice of query blocks after another, the pairs kept: int64 `[slice, key blocks]`."""
    if pattern == Skip():
        blocks, columns = (len(side.offsets) - 1 for side in (queries, keys))
        yield slice(0, blocks), torch.zeros(1, 1, dtype=torch.int64).expand(blocks, columns)
        return
    video = (side.video(grid) for side in (queries, keys))
    if any(positions.start == positions.stop for positions in video):
        yield from _of_text(queries, keys)
        return
    windows = pattern.windows(grid)
    sides = None if windows is None else _sides(windows, grid, queries, keys)
    if sides is not None:
        yield from _by_boxes(*sides, grid, queries, keys)
    elif windows is not None and len(windows.place) == 1:
        yield from _by_places(windows, grid, queries, keys)
    else:
        yield from _by_pairs(pattern, grid, queries, keys)


def _of_text(queries: Cut, keys: Cut) -> Iterator[tuple[slice, Tensor]]:
    """Where one side is text alone, all pairs are kept."""
    columns = keys.offsets.diff()
    for row, size in enumerate(queries.offsets.diff().tolist()):
        yield slice(row, row + 1), size * columns[None]


def _by_pairs(
    pattern: Pattern, grid: TokenGrid, queries: Cut, keys: Cut
) -> Iterator[tuple[slice, Tensor]]:
    # One block of queries at a time: block * tokens booleans, never tokens * tokens.
    for row, block in enumerate(queries.tokens.tensor_split(queries.offsets[1:-1])):
        kept = _column_sums(pattern.rows(grid, block))[keys.tokens]
        cumulative = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        yield slice(row, row + 1), cumulative[keys.offsets].diff()[None]


def _by_places(
    windows: Windows, grid: TokenGrid, queries: Cut, keys: Cut
) -> Iterator[tuple[slice, Tensor]]:
    video = keys.video(grid)
    blocks = _video_blocks(grid, queries)
    low, high, place = windows.low[0], windows.low[0] + windows.size[0], windows.place[0]
    place = place[keys.tokens[video]]
    first, places = int(place.min()), int(place.max() - place.min()) + 1
    place = place - first
    for row, block in enumerate(queries.tokens.tensor_split(queries.offsets[1:-1])):
        kept = torch.full((len(keys.tokens),), len(block))
        if blocks.start <= row < blocks.stop:
            opened, closed = (
                (edge[block] - first).clamp(0, places).bincount(minlength=places + 1)
                for edge in (low, torch.maximum(low, high))
            )
            kept[video] = (opened - closed).cumsum(0)[place]
        cumulative = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        yield slice(row, row + 1), cumulative[keys.offsets].diff()[None]


def _column_sums(mask: Tensor) -> Tensor:
    # PyTorch adds bytes thirty times faster than it adds booleans; a byte holds 255 rows.
    parts = mask.view(torch.uint8).split(255)
    return torch.stack([part.sum(0, dtype=torch.uint8) for part in parts]).sum(0)


@dataclass(frozen=True, slots=True, eq=False)
class _Boxes:
    """Boxes `[low, high)` of places, int64 `[axes, boxes]` each, in ascending `block`; `copies`
    tokens stand at every place of a box."""

    block: Tensor
    copies: Tensor
    low: Tensor
    high: Tensor


def _sides(
    windows: Windows, grid: TokenGrid, queries: Cut, keys: Cut
) -> tuple[list[Tensor], _Boxes, _Boxes] | None:
    """Each axis as first and last edge of the window by place, int64 `[2, places]`, and the boxes
    of both sides; `None` if the windows are not as the head of this file asks, or if the blocks
    are no boxes."""
    video = slice(grid.text_before, grid.text_before + grid.video)
    low, size, place = (x[:, video].long() for x in (windows.low, windows.size, windows.place))
    axes = []
    for axis in range(len(place)):
        if place[axis].min() < 0:
            return None
        edges = torch.stack([low[axis], low[axis] + size[axis]])
        table = torch.full((2, int(place[axis].max()) + 1), int(edges.min()))
        table[:, place[axis]] = edges
        table = table.cummax(1).values
        if not torch.equal(table[:, place[axis]], edges):
            return None
        axes.append(table)
    query_boxes = _boxes(place, grid, queries)
    key_boxes = query_boxes if keys is queries else _boxes(place, grid, keys)
    if len(query_boxes.block) * len(key_boxes.block) > max(_MOST_BOXES, grid.video**2 >> 7):
        return None
    return axes, query_boxes, key_boxes


def _boxes(place: Tensor, grid: TokenGrid, side: Cut) -> _Boxes:
    """The blocks of the video tokens, taken apart."""
    video = side.video(grid)
    block = block_of(side.offsets)[video]
    order = _sorted([block, *place[:, side.tokens[video] - grid.text_before]])
    block, low = block[order], place[:, (side.tokens[video] - grid.text_before)[order]]
    # Tokens at the same place are told apart by one more axis, on which nothing is asked.
    index = torch.arange(len(block))
    fresh = _changes([block, *low])
    low = torch.cat([low, (index - torch.where(fresh, index, 0).cummax(0).values)[None]])
    high = low + 1
    for axis in reversed(range(len(low))):
        others = [block, *(x[a] for a in range(len(low)) if a != axis for x in (low, high))]
        order = _sorted([*others, low[axis]])
        block, low, high = block[order], low[:, order], high[:, order]
        others = [block, *(x[a] for a in range(len(low)) if a != axis for x in (low, high))]
        apart = torch.nn.functional.pad(low[axis, 1:] != high[axis, :-1], (1, 0), value=True)
        first = (_changes(others) | apart).nonzero()[:, 0]
        last = torch.nn.functional.pad(first[1:] - 1, (0, 1), value=len(block) - 1)
        end = high[axis, last]
        block, low, high = block[first], low[:, first], high[:, first]
        high[axis] = end
    order = block.argsort(stable=True)
    block, low, high = block[order], low[:, order], high[:, order]
    return _Boxes(block, high[-1] - low[-1], low[:-1], high[:-1])


def _sorted(columns: list[Tensor]) -> Tensor:
    """The order that sorts by the first column, then by the second, and so on."""
    order = torch.arange(len(columns[0]))
    for column in reversed(columns):
        order = order[column[order].argsort(stable=True)]
    return order


def _changes(columns: list[Tensor]) -> Tensor:
    """Where any column differs from the entry before; true at the first."""
    changed = torch.stack([column.diff() != 0 for column in columns]).any(0)
    return torch.nn.functional.pad(changed, (1, 0), value=True)


def _by_boxes(
    axes: list[Tensor], query: _Boxes, key: _Boxes, grid: TokenGrid, queries: Cut, keys: Cut
) -> Iterator[tuple[slice, Tensor]]:
    tables = []
    for axis, edges in enumerate(axes):
        ranges = [
            torch.stack([box.low[axis], box.high[axis]]).unique(dim=1, return_inverse=True)
            for box in (query, key)
        ]
        (of_query, query_range), (of_key, key_range) = ranges
        tables.append((_overlaps(edges, of_query, of_key), query_range, key_range))
    sizes, columns = queries.offsets.diff(), keys.offsets.diff()
    video = _video_blocks(grid, keys)
    stops = torch.searchsorted(key.block, torch.arange(video.start, video.stop + 1))
    starts = torch.searchsorted(query.block, torch.arange(len(sizes) + 1)).tolist()
    per_block = max(len(query.block) // len(sizes), 1) * max(len(key.block), len(columns))
    step = max(_AT_ONCE // per_block, 1)
    for first in range(0, len(sizes), step):
        blocks = slice(first, min(first + step, len(sizes)))
        boxes = slice(starts[blocks.start], starts[blocks.stop])
        counts = sizes[blocks, None] * columns
        product = query.copies[boxes, None] * key.copies
        for table, query_range, key_range in tables:
            product *= table[query_range[boxes, None], key_range]
        if len(key.block) > video.stop - video.start:
            product = torch.nn.functional.pad(product.cumsum(1), (1, 0))[:, stops].diff()
        # Rows without boxes are those of text, which sees everything.
        own = query.block[boxes] - first
        counts[own, video] = 0
        counts[:, video].index_add_(0, own, product)
        yield blocks, counts


def _overlaps(edges: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Pairs of places that each range of queries and range of keys keep: ranges int64
    `[2, ranges]`, int64 `[query ranges, key ranges]` out."""
    first, last = edges
    return torch.cat(
        [
            _below(first, queries, stop)
            - _below(last, queries, stop)
            - _below(first, queries, start)
            + _below(last, queries, start)
            for start, stop in (
                part.unbind() for part in keys.split(max(_AT_ONCE // queries.shape[1], 1), 1)
            )
        ],
        1,
    )


def _below(edge: Tensor, ranges: Tensor, bounds: Tensor) -> Tensor:
    """Sum over the places u of each range of `max(bound - edge[u], 0)`; edges ascend."""
    sums = torch.nn.functional.pad(edge.cumsum(0), (1, 0))
    reach = torch.searchsorted(edge, bounds.contiguous())
    start, stop = (torch.minimum(end[:, None], reach) for end in ranges)
    return (stop - start) * bounds - (sums[stop] - sums[start])


def _video_blocks(grid: TokenGrid, side: Cut) -> slice:
    """The blocks that hold video tokens."""
    video = side.video(grid)
    ends = torch.tensor([video.start, video.stop])
    first, last = torch.searchsorted(side.offsets, ends).tolist()
    return slice(first, last)

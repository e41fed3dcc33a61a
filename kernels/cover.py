"""Cover: the pairs of a BlockIndices as rectangles of tokens, each pair in exactly one.

A rectangle is a run of queries that look at the same keys, so one dense attention computes it.
Neighboring blocks of queries are joined where that is cheaper, although pairs that only one of
them keeps are then computed for both; and the keys that every query of a run sees are held apart
from those that need a mask:

    rows of blocks -> joined rows -> (queries x keys that all see) + (queries x the rest, masked)
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, WHOLE, BlockIndices
from dit_sparse.kernels.tags import tags_of_head
from dit_sparse.kernels.tiling import block_of

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Prices:
    """What a rectangle costs, in pairs of a large dense attention.

    `(queries + narrow) * keys`, and `masked` more for each pair under a mask, and `launch`.
    """

    narrow: float
    masked: float
    launch: float = 32768


@dataclass(frozen=True, slots=True, eq=False)
class Rectangle:
    """Queries at positions `first` to `last` of the sequence, and the runs of positions of their
    keys: those that all of them see, and those that each sees or not."""

    first: int
    last: int
    whole: Runs
    masked: Runs


@dataclass(frozen=True, slots=True)
class Cover:
    """The rectangles of the `heads` that share one list of blocks."""

    heads: tuple[int, ...]
    rectangles: tuple[Rectangle, ...]


def covers(blocks: BlockIndices, prices: Prices, valid_text: int | None = None) -> list[Cover]:
    """One cover for each group of heads with the same pattern.

    With `valid_text`, the text keys after that many are left out.
    """
    sharing: dict[object, list[int]] = {}
    for head in range(blocks.heads):
        sharing.setdefault(blocks.patterns[head] if blocks.patterns else head, []).append(head)
    valid = torch.ones(blocks.grid.tokens, dtype=torch.bool)
    if valid_text is not None:
        valid[blocks.grid.invalid_text(valid_text)] = False
    valid = valid[blocks.key_sequence]
    return [
        Cover(tuple(heads), tuple(_rectangles(blocks, heads[0], prices, valid)))
        for heads in sharing.values()
    ]


def visible(blocks: BlockIndices, head: int, rectangle: Rectangle) -> Tensor:
    """Which of the masked pairs of `rectangle` to keep, bool `[queries, masked keys]`."""
    queries = torch.arange(rectangle.first, rectangle.last)[:, None]
    keys = torch.cat([torch.arange(*run) for run in rectangle.masked])[None, :]
    if blocks.patterns:
        return blocks.patterns[head].pairs(
            blocks.grid,
            blocks.query_sequence[queries],
            blocks.key_sequence[keys],
        )
    listed = tags_of_head(blocks, head) != ABSENT
    return listed[block_of(blocks.query_offsets)[queries], block_of(blocks.key_offsets)[keys]]


@dataclass(frozen=True, slots=True)
class _Row:
    """Adjacent blocks of queries, the key blocks that any of them lists and that all see whole."""

    first: int
    last: int
    listed: Tensor
    whole: Tensor
    cost: float


def _rectangles(
    blocks: BlockIndices, head: int, prices: Prices, valid: Tensor
) -> Iterator[Rectangle]:
    starts = blocks.query_offsets.tolist()
    key_block = block_of(blocks.key_offsets)
    for row in _joined_rows(blocks, head, prices):
        whole, masked = (
            _runs(chosen[key_block] & valid) for chosen in (row.whole, row.listed & ~row.whole)
        )
        if whole or masked:
            yield Rectangle(starts[row.first], starts[row.last], whole, masked)


def _joined_rows(blocks: BlockIndices, head: int, prices: Prices) -> list[_Row]:
    key_sizes = blocks.key_offsets.diff().double()
    starts = blocks.query_offsets.tolist()

    def row(first: int, last: int, listed: Tensor, whole: Tensor) -> _Row:
        queries = starts[last] - starts[first]
        keys, clean = (float(key_sizes @ chosen.double()) for chosen in (listed, whole))
        masked = keys - clean
        launches = prices.launch * ((clean > 0) + (masked > 0))
        cost = (queries + prices.narrow) * keys + queries * masked * prices.masked + launches
        return _Row(first, last, listed, whole, cost)

    tags = tags_of_head(blocks, head)
    listed, whole = tags != ABSENT, tags == WHOLE
    rows = [row(i, i + 1, listed[i], whole[i]) for i in range(blocks.query_blocks)]
    # Rows of equal length first, as in a binary tree, then whatever is left.
    for equal in (True, False):
        count = len(rows) + 1
        while len(rows) < count:
            count, kept = len(rows), rows[:1]
            for right in rows[1:]:
                left = kept[-1]
                alike = left.last - left.first == right.last - right.first
                if equal and not alike:
                    kept.append(right)
                    continue
                both = row(
                    left.first, right.last, left.listed | right.listed, left.whole & right.whole
                )
                if both.cost <= left.cost + right.cost:
                    kept[-1] = both
                else:
                    kept.append(right)
            rows = kept
    return rows


def _runs(chosen: Tensor) -> Runs:
    """The runs of true positions."""
    edges = torch.nn.functional.pad(chosen.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))

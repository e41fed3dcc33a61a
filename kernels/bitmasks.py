"""BitMasks: the pairs that patterns keep in partial blocks, a bit each.

For patterns that are not made of windows: blocks of a `Radial`, several patterns put together. A
key of a partial block has one word for each 64 queries of the block of queries, in order; bit `i`
of word `t` is query `64 t + i`. Heads with the same pattern share their words.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import PARTIAL, BlockIndices
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.predicates import partial_patterns

WORD = 64

_MOST_BYTES = 256 << 20

Heads = Mapping[Pattern, list[int]]
"""Patterns, and the heads that have each."""


@dataclass(frozen=True, slots=True, eq=False)
class BitMasks:
    """`words`, int64 `[words]`, and where those of each entry of the list begin, int64
    `[entries]`, -1 for entries that have none."""

    first: Tensor
    words: Tensor


def unwindowed(blocks: BlockIndices) -> dict[Pattern, list[int]]:
    """The patterns that have partial blocks and are not made of windows, and their heads."""
    partial = partial_patterns(blocks)
    return {p: heads for p, heads in partial.items() if p.windows(blocks.grid) is None}


def refusal(blocks: BlockIndices, patterns: Heads) -> str | None:
    """Why the masks of `patterns`, those without windows, are not made, or `None`."""
    masked = mask_bytes(blocks, patterns)
    if masked <= _MOST_BYTES:
        return None
    return (
        f"{next(iter(patterns))} is not made of intervals, and masks of "
        f"its partial blocks take {masked >> 20} MiB; at most {_MOST_BYTES >> 20} fit"
    )


def mask_bytes(blocks: BlockIndices, patterns: Heads) -> int:
    """Memory that `bit_masks` takes."""
    words = (_sizes(blocks, *_partial(blocks, heads[0])).sum() for heads in patterns.values())
    return 8 * sum(map(int, words))


def bit_masks(blocks: BlockIndices, patterns: Heads) -> BitMasks:
    """The masks of `patterns`, which have partial blocks."""
    first = torch.full((len(blocks.tag),), -1)
    words, used = [], 0
    for pattern, heads in patterns.items():
        entry, row = _partial(blocks, heads[0])
        sizes = _sizes(blocks, entry, row)
        begins = used + sizes.cumsum(0) - sizes
        for head in heads:
            first[_partial(blocks, head)[0]] = begins
        for query_block, own in enumerate(entry.split(row.bincount().tolist())):
            if len(own):
                words.append(_packed(pattern, blocks, query_block, blocks.key_block[own]))
        used += int(sizes.sum())
    return BitMasks(first, torch.cat(words))


def _partial(blocks: BlockIndices, head: int) -> tuple[Tensor, Tensor]:
    """The partial entries of a head and the block of queries of each, int64."""
    start = head * blocks.query_blocks
    pointer = blocks.row_pointer[start : start + blocks.query_blocks + 1].long()
    span = slice(int(pointer[0]), int(pointer[-1]))
    row = torch.arange(blocks.query_blocks).repeat_interleave(pointer.diff())
    partial = blocks.tag[span] == PARTIAL
    return partial.nonzero()[:, 0] + pointer[0], row[partial]


def _sizes(blocks: BlockIndices, entry: Tensor, row: Tensor) -> Tensor:
    """Words of each entry."""
    each = (blocks.query_offsets.diff() + WORD - 1) // WORD
    return blocks.key_offsets.diff()[blocks.key_block[entry]] * each[row]


def _packed(pattern: Pattern, blocks: BlockIndices, query_block: int, columns: Tensor) -> Tensor:
    """The words of one block of queries and the blocks of keys `columns`, int64."""
    queries = blocks.query_tokens(query_block)
    keys = torch.cat([blocks.key_tokens(column) for column in columns.tolist()])
    kept = pattern.pairs(blocks.grid, queries[None, :, None], keys[:, None, None])[..., 0]
    kept = torch.nn.functional.pad(kept, (0, -len(queries) % WORD)).view(-1, 8)
    bytes_ = (kept * (1 << torch.arange(8)).to(torch.uint8)).sum(-1, dtype=torch.uint8)
    return bytes_.view(torch.int64)

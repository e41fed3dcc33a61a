"""Predicates: the patterns' windows as tables, by which a GPU decides the pairs of masked tiles.

A word table fits where the places that a pattern looks at lie close together within each tile of
keys, at most 30 over all axes: boxes of tokens. Other patterns, such as a band along the tokens,
are decided by intervals. See `attend_triton.py` for how both are read.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import PARTIAL, BlockIndices
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.tiling import Tiling
from dit_sparse.kernels.windows import Windows

MOST_BITS = 30
"""Bits of a word for places; the kernel keeps one more for keys past the end of a tile."""

_ALL = 1 << 30


class Words(NamedTuple):
    """int32, tokens in block order. low, high `[groups, axes, tokens]` of queries: the bits from
    and to which they see keys, if the tile began at place 0. word `[groups, tokens]` of keys.
    origin `[groups, axes, tiles]`: the first place of each tile. bottom, top `[groups, axes]`: the
    bits of an axis."""

    low: Tensor
    high: Tensor
    word: Tensor
    origin: Tensor
    bottom: Tensor
    top: Tensor
    tokens: int
    tiles: int


class Intervals(NamedTuple):
    """int32 `[groups, axes, tokens]`, tokens in block order: low, size of queries, place of keys."""

    low: Tensor
    size: Tensor
    place: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Predicates:
    """Both tables, and for each head the group of either it belongs to; -1 for none."""

    words: Words
    intervals: Intervals
    word_group: Tensor
    interval_group: Tensor
    word_axes: int
    interval_axes: int


def partial_patterns(blocks: BlockIndices) -> dict[Pattern, list[int]]:
    """The patterns that have partial blocks, and their heads."""
    found: dict[Pattern, list[int]] = {}
    if blocks.patterns is not None:
        cuts = blocks.row_pointer[:: blocks.query_blocks].tolist()
        for head, pattern in enumerate(blocks.patterns):
            if (blocks.tag[cuts[head] : cuts[head + 1]] == PARTIAL).any():
                found.setdefault(pattern, []).append(head)
    return found


def predicates(blocks: BlockIndices, keys: Tiling, padding: int) -> Predicates:
    """The tables for `keys`; those of keys are longer than the tokens by `padding`."""
    groups: tuple[list[_Group], list[_Group]] = [], []
    numbers = torch.full((2, blocks.heads), -1)
    for pattern, heads in partial_patterns(blocks).items():
        windows = pattern.windows(blocks.grid)
        assert windows is not None, f"{pattern} has no windows; the backend refuses it"
        group = _group(windows, blocks, keys)
        kind = int(group.extent.sum() > MOST_BITS)
        numbers[kind, heads] = len(groups[kind])
        groups[kind].append(group)
    tokens, axes = blocks.grid.tokens, [max((len(g.low) for g in kind), default=0) for kind in groups]
    return Predicates(
        _words([_padded(g, axes[0]) for g in groups[0]], tokens, keys, padding),
        _intervals([_padded(g, axes[1]) for g in groups[1]], tokens, padding),
        numbers[0],
        numbers[1],
        axes[0],
        axes[1],
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Windows in block order, the first place of each tile `[axes, tiles]`, and how many places
    of an axis a tile spans at most `[axes]`."""

    low: Tensor
    size: Tensor
    place: Tensor
    origin: Tensor
    extent: Tensor


def _group(windows: Windows, blocks: BlockIndices, keys: Tiling) -> _Group:
    low, size, place = (
        x[:, blocks.permutation].long() for x in (windows.low, windows.size, windows.place)
    )
    grid = blocks.grid
    video = (keys.first >= grid.text_before) & (keys.first < grid.text_before + grid.video)
    tile = torch.arange(len(keys)).repeat_interleave(keys.count).expand_as(place)
    empty = place.new_zeros(len(place), len(keys))
    first = empty.scatter_reduce(1, tile, place, "amin", include_self=False)
    last = empty.scatter_reduce(1, tile, place, "amax", include_self=False)
    extent = (last - first + 1)[:, video].amax(1)
    return _Group(low, size, place, first, extent)


def _padded(group: _Group, axes: int) -> _Group:
    """As many axes as the others of its table, on which every pair is kept."""
    more = axes - len(group.low)

    def pad(tensor: Tensor, value: int = 0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), value)])

    return _Group(
        pad(group.low), pad(group.size, _ALL), pad(group.place), pad(group.origin), pad(group.extent)
    )


def _words(groups: list[_Group], tokens: int, keys: Tiling, padding: int) -> Words:
    tile = torch.arange(len(keys)).repeat_interleave(keys.count)
    low, high, word, origin, bottom, top = [], [], [], [], [], []
    for group in groups:
        to_bit = group.extent.cumsum(0)
        from_bit = to_bit - group.extent
        real = group.extent > 0
        offset = group.place - group.origin[:, tile]
        # Text lies in tiles of its own, which are never masked by words.
        text = (offset >= group.extent[:, None]) & real[:, None]
        bit = torch.bitwise_left_shift(1, (offset + from_bit[:, None]).clamp_max(MOST_BITS))
        word.append((bit * (real[:, None] & ~text)).sum(0))
        low.append(group.low + from_bit[:, None])
        high.append(group.low + group.size + from_bit[:, None])
        origin.append(group.origin)
        bottom.append(from_bit)
        top.append(to_bit)
    tables = (_stack(x) for x in (low, high, [_extended(x, padding) for x in word], origin, bottom, top))
    return Words(*tables, tokens=tokens + padding, tiles=len(keys))


def _intervals(groups: list[_Group], tokens: int, padding: int) -> Intervals:
    low, size, place = ([getattr(g, name) for g in groups] for name in ("low", "size", "place"))
    return Intervals(
        _stack(low), _stack(size), _stack([_extended(x, padding) for x in place]), tokens + padding
    )


def _extended(table: Tensor, padding: int) -> Tensor:
    return torch.nn.functional.pad(table, (0, padding))


def _stack(tables: list[Tensor]) -> Tensor:
    return torch.stack(tables).to(torch.int32) if tables else torch.zeros(0, dtype=torch.int32)

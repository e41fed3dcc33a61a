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
from dit_sparse.kernels.definition import is_text
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.tile_bounds import TileBounds, tile_bounds
from dit_sparse.kernels.tiling import Tiling
from dit_sparse.kernels.windows import Windows

MOST_BITS = 30
"""Bits of a word for places; the kernel keeps one more for keys past the end of a tile."""

_ALL = _PAST_END = 1 << MOST_BITS


class Words(NamedTuple):
    """int32, tokens in block order.

    low, high `[groups, axes, queries]`: the bits from and to which they see keys, if the
    tile began at place 0. word `[batch or 1, groups, tiles, block_k]` of keys; a bit that no query
    has stands for the end of a tile and for padded text. origin `[groups, axes, tiles]`: the first
    place of each tile. bottom, top `[groups, axes]`: the bits of an axis.
    """

    low: Tensor
    high: Tensor
    word: Tensor
    origin: Tensor
    bottom: Tensor
    top: Tensor
    tiles: int
    sample_stride: int


class Intervals(NamedTuple):
    """int32 in block order: low, size `[groups, axes, queries]`; place `[groups, axes, tokens]` of
    keys, and of as many more as a tile may reach past the last."""

    low: Tensor
    size: Tensor
    place: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Predicates:
    """Both tables, for each head the group of either it belongs to, -1 for none, and bounds of
    the windows of some heads."""

    words: Words
    intervals: Intervals
    bounds: tuple[tuple[list[int], TileBounds], ...]
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


def predicates(
    blocks: BlockIndices, queries: Tiling, keys: Tiling, real: Tensor, block_k: int
) -> Predicates:
    """The tables for tiles of at most `block_k` keys, of which `real` are not padded text; for the
    patterns that are made of windows."""
    groups: tuple[list[_Group], list[_Group]] = [], []
    bounds, device = [], keys.first.device
    numbers = torch.full((2, blocks.heads), -1, device=device)
    for pattern, heads in partial_patterns(blocks).items():
        windows = pattern.windows(blocks.grid)
        if windows is None:
            continue
        own = windows.of(blocks.query_sequence, blocks.key_sequence).to(device)
        bounds.append((heads, tile_bounds(own, queries, keys)))
        video = ~is_text(blocks.grid, blocks.key_sequence.to(device)[keys.first])
        group = _group(own, bounds[-1][1], video)
        kind = int(group.extent.sum() > MOST_BITS)
        numbers[kind, heads] = len(groups[kind])
        groups[kind].append(group)
    axes = [max((len(group.low) for group in kind), default=0) for kind in groups]
    return Predicates(
        _words([_padded(g, axes[0]) for g in groups[0]], keys, real, block_k),
        _intervals([_padded(g, axes[1]) for g in groups[1]], len(blocks.key_permutation), block_k),
        tuple(bounds),
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


def _group(windows: Windows, bounds: TileBounds, video: Tensor) -> _Group:
    low, size, place = windows.low.long(), windows.size.long(), windows.place.long()
    first, last = bounds.place
    extent = (last - first + 1)[:, video].amax(1)
    return _Group(low, size, place, first, extent)


def _padded(group: _Group, axes: int) -> _Group:
    """As many axes as the others of its table, on which every pair is kept."""
    more = axes - len(group.low)

    def pad(tensor: Tensor, value: int = 0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((more, *tensor.shape[1:]), value)])

    return _Group(
        pad(group.low),
        pad(group.size, _ALL),
        pad(group.place),
        pad(group.origin),
        pad(group.extent),
    )


def _words(groups: list[_Group], keys: Tiling, real: Tensor, block_k: int) -> Words:
    slot = torch.arange(block_k, device=keys.first.device)
    place = (keys.first[:, None] + slot).clamp_max(int(keys.first[-1] + keys.count[-1]) - 1)
    past_end = (slot >= real[..., None]) * _PAST_END
    low, high, word, origin, bottom, top = [], [], [], [], [], []
    for group in groups:
        to_bit = group.extent.cumsum(0)
        from_bit = to_bit - group.extent
        # Slots past the end and text, which is never masked by words, may lie anywhere.
        offset = group.place[:, place] - group.origin[:, :, None]
        offset = torch.minimum(offset.clamp_min(0), group.extent[:, None, None] - 1)
        bit = 1 << (offset.clamp_min(0) + from_bit[:, None, None])
        bit *= (group.extent > 0)[:, None, None]
        word.append(bit.sum(0) | past_end)
        low.append(group.low + from_bit[:, None])
        high.append(group.low + group.size + from_bit[:, None])
        origin.append(group.origin)
        bottom.append(from_bit)
        top.append(to_bit)
    table = torch.stack(word, 1) if word else torch.zeros(1, 0, len(keys), block_k)
    return Words(
        *(_stack(x) for x in (low, high)),
        word=table.to(torch.int32),
        origin=_stack(origin),
        bottom=_stack(bottom),
        top=_stack(top),
        tiles=len(keys),
        sample_stride=table[0].numel() if len(table) > 1 else 0,
    )


def _intervals(groups: list[_Group], keys: int, padding: int) -> Intervals:
    place = [torch.nn.functional.pad(group.place, (0, padding)) for group in groups]
    low, size = ([getattr(group, name) for group in groups] for name in ("low", "size"))
    return Intervals(_stack(low), _stack(size), _stack(place), keys + padding)


def _stack(tables: list[Tensor]) -> Tensor:
    return torch.stack(tables).to(torch.int32) if tables else torch.zeros(0, dtype=torch.int32)

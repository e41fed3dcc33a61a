"""Bit tiles: bit masks of partial blocks as a GPU reads them, tile by tile.

kept(query m, key n) of a listed tile  =  bit p % 32 of word[at + n * stride + p // 32],
                                          p = offset of the tile of queries in its block + m
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.bitmasks import WORD, Heads, bit_masks
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.tiling import Tiling


class Bits(NamedTuple):
    """int32: word `[words]`; at `[listed tiles]`, read for those that are masked by bits alone;
    offset, stride `[query tiles]`."""

    word: Tensor
    at: Tensor
    offset: Tensor
    stride: Tensor


def bit_tiles(
    blocks: BlockIndices,
    patterns: Heads,
    queries: Tiling,
    keys: Tiling,
    entry: Tensor,
    query_tile: Tensor,
    key_tile: Tensor,
) -> Bits:
    """The masks of `patterns`, those of `blocks` without windows, for listed tiles, of which
    `entry` is the place in its list."""
    device = entry.device
    if not patterns:
        none = torch.zeros(0, dtype=torch.int32, device=device)
        return Bits(none, none, none, none)
    query_offsets, key_offsets = (
        offsets.to(device) for offsets in (blocks.query_offsets, blocks.key_offsets)
    )
    # A word of 64 bits is two of 32, the lower first, as all machines with such a GPU have them.
    stride = 2 * ((query_offsets.diff() + WORD - 1) // WORD)[queries.block]
    offset = queries.first - query_offsets[queries.block]
    masks = bit_masks(blocks, patterns)
    within = keys.first[key_tile] - key_offsets[keys.block[key_tile]]
    at = 2 * masks.first.to(device)[entry] + within * stride[query_tile]
    return Bits(
        word=masks.words.view(torch.int32).to(device),
        at=at.clamp_min(0).int(),
        offset=offset.int(),
        stride=stride.int(),
    )

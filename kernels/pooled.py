"""Pooled: the runs of pooled keys, and the order in which a GPU walks them.

    a run: 2^r consecutive positions of a key block, attended to as their mean
    a group: entries of one row and one r side by side in a tile of keys, 2^shift places for each

A block at level r has `2^-r` as many runs as tokens, so a tile of keys takes several of them: the
time of pooled blocks is that of their runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.tiling import Tiling, ragged, real_tokens, tiling


class Runs(NamedTuple):
    """first `[runs]`: the first position; real `[batch or 1, runs]`: real tokens, which come
    first; bias, float32 as `real`: log2 of it. int32 else."""

    first: Tensor
    real: Tensor
    bias: Tensor


class Pooled(NamedTuple):
    """bounds `[rows + 1]`: groups of each row. entry, stop, shift `[groups]`: entries from and to,
    log2 of the places of an entry. block `[entries]`: which of `first`, `number` `[blocks]`: the
    runs of a block at a level. key, value `[batch, heads, runs, head_dim]`. int32."""

    bounds: Tensor
    entry: Tensor
    stop: Tensor
    shift: Tensor
    block: Tensor
    first: Tensor
    number: Tensor
    bias: Tensor
    key: Tensor
    value: Tensor
    runs: int
    bias_stride: int


def pooled(
    blocks: BlockIndices, row: Tensor, key_block: Tensor, tag: Tensor, rows: int, size: int
) -> tuple[Runs, Pooled]:
    """The runs and groups of entries `(row, key_block, tag)`, sorted by row, of which those with
    `tag > WHOLE` are pooled; tiles of `size` keys. Keys and values are filled in for each call."""
    chosen = tag > WHOLE
    row, key_block, tag = row[chosen], key_block[chosen].long(), tag[chosen].long()
    levels, level = tag.unique(return_inverse=True)
    device, offsets = row.device, blocks.key_offsets.to(row.device)
    runs = [tiling(offsets, 2**r) for r in levels.tolist()]
    all_runs = Tiling(
        *(
            _joined([getattr(x, name) for x in runs], device)
            for name in ("first", "count", "block")
        )
    )
    # A block of more runs than a tile takes is listed in pieces.
    pieces: list[Tiling] = []
    number = torch.zeros(2, len(levels), blocks.key_blocks, dtype=torch.int64, device=device)
    for index, at_level in enumerate(runs):
        lengths = at_level.block.bincount(minlength=blocks.key_blocks)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        pieces.append(tiling(ends + sum(map(len, runs[:index])), size))
        number[1, index] = pieces[-1].block.bincount(minlength=blocks.key_blocks)
        number[0, index] = number[1, index].cumsum(0) - number[1, index]
        number[0, index] += sum(map(len, pieces[:-1]))
    entry, within = ragged(number[1, level, key_block])
    block = number[0, level, key_block][entry] + within
    row, level = row[entry], level[entry]
    order = torch.argsort(row * max(1, len(levels)) + level, stable=True)
    row, level, block = row[order], level[order], block[order]
    widest = [(int(x.count.max()) - 1).bit_length() for x in pieces]
    shift = torch.tensor(widest, dtype=torch.int64, device=device)
    starts, numbers = torch.unique_consecutive(
        row * max(1, len(levels)) + level, return_counts=True
    )
    place = ragged(numbers)[1]
    head = place % (size >> shift[level]) == 0
    entry_from = head.nonzero()[:, 0]
    row_of, level_of = row[entry_from], level[entry_from]
    ends = numbers.cumsum(0)[torch.searchsorted(starts, row_of * max(1, len(levels)) + level_of)]
    entry_to = torch.minimum(entry_from + (size >> shift[level_of]), ends)
    count = real_tokens(blocks.grid, blocks.key_sequence, all_runs)
    bias = count.float().log2()
    empty = torch.empty(0)
    return Runs(all_runs.first.int(), count.int(), bias), Pooled(
        bounds=torch.nn.functional.pad(row_of.bincount(minlength=rows).cumsum(0), (1, 0)).int(),
        entry=entry_from.int(),
        stop=entry_to.int(),
        shift=shift[level_of].int(),
        block=block.int(),
        first=_joined([x.first for x in pieces], device).int(),
        number=_joined([x.count for x in pieces], device).int(),
        bias=bias,
        key=empty,
        value=empty,
        runs=len(all_runs),
        bias_stride=len(all_runs) if len(bias) > 1 else 0,
    )


def _joined(parts: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=device), *parts])

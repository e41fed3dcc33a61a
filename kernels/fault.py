"""Fault: why tensors are not a list of blocks. Kernels read them unchecked and would trip."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.shard import Shard
from dit_sparse.kernels.visited import MOST_POOLED, PARTIAL


class Listed(Protocol):
    """What is looked at of a `BlockIndices`, which asks here about itself."""

    @property
    def grid(self) -> TokenGrid: ...
    @property
    def order(self) -> TokenOrder | None: ...
    @property
    def heads(self) -> int: ...
    @property
    def permutation(self) -> Tensor: ...
    @property
    def key_permutation(self) -> Tensor: ...
    @property
    def query_offsets(self) -> Tensor: ...
    @property
    def key_offsets(self) -> Tensor: ...
    @property
    def row_pointer(self) -> Tensor: ...
    @property
    def key_block(self) -> Tensor: ...
    @property
    def tag(self) -> Tensor: ...
    @property
    def patterns(self) -> tuple[Pattern, ...] | None: ...
    @property
    def queries(self) -> Shard | None: ...
    @property
    def keys(self) -> Shard | None: ...
    @property
    def query_blocks(self) -> int: ...
    @property
    def key_blocks(self) -> int: ...


def fault_of(blocks: Listed, sound: Listed | None) -> str | None:
    """The first fault of `blocks`; `None` if there is none. Where it is cut by the very tensors
    of another list, which is known to be sound, the cut is not looked at again."""
    reason = None if _same_cut(blocks, sound) else _fault_of_cut(blocks)
    if reason is not None:
        return reason
    entries = len(blocks.key_block)
    for name, dtype, length in (
        ("row_pointer", torch.int32, blocks.heads * blocks.query_blocks + 1),
        ("key_block", torch.int32, entries),
        ("tag", torch.int8, entries),
    ):
        if (reason := _fault_of_type(blocks, name, dtype, length)) is not None:
            return reason
    if not _rises(blocks.row_pointer, entries):
        return f"row_pointer must rise from 0 to {entries}"
    if not entries:
        return None
    low, high = map(int, blocks.key_block.aminmax())
    if low < 0 or high >= blocks.key_blocks:
        return f"key_block must lie in 0..{blocks.key_blocks - 1}"
    low, high = map(int, blocks.tag.aminmax())
    if low < PARTIAL or high > MOST_POOLED:
        return f"tag must lie in {PARTIAL}..{MOST_POOLED}"
    if blocks.patterns is None and low == PARTIAL:
        return "a partial block needs patterns"
    return None


def _same_cut(blocks: Listed, sound: Listed | None) -> bool:
    return (
        sound is not None
        and blocks.grid == sound.grid
        and blocks.order == sound.order
        and blocks.permutation is sound.permutation
        and blocks.key_permutation is sound.key_permutation
        and blocks.query_offsets is sound.query_offsets
        and blocks.key_offsets is sound.key_offsets
        and blocks.queries == sound.queries
        and blocks.keys == sound.keys
    )


def _fault_of_cut(blocks: Listed) -> str | None:
    shards = blocks.queries, blocks.keys
    for shard in shards:
        if shard and (reason := shard.refusal(blocks.grid)) is not None:
            return reason
    counts = [blocks.grid.tokens if shard is None else shard.count for shard in shards]
    place = torch.int32 if blocks.order is None else torch.int64
    for name, count in zip(("permutation", "key_permutation"), counts, strict=True):
        if (reason := _fault_of_type(blocks, name, place, count)) is not None:
            return reason
        if not _holds_each_once(getattr(blocks, name)):
            return f"{name} must hold every token once"
    for name, count in zip(("query_offsets", "key_offsets"), counts, strict=True):
        length = len(getattr(blocks, name))
        if (reason := _fault_of_type(blocks, name, torch.int64, length)) is not None:
            return reason
        if not _rises(getattr(blocks, name), count):
            return f"{name} must rise from 0 to {count}"
    return None


def _fault_of_type(blocks: Listed, name: str, dtype: torch.dtype, length: int) -> str | None:
    tensor = getattr(blocks, name)
    if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous():
        return f"{name} must be {dtype} [{length}], got {tensor.dtype} {tuple(tensor.shape)}"
    return None


def _rises(steps: Tensor, last: int) -> bool:
    return int(steps[0]) == 0 and int(steps[-1]) == last and bool((steps.diff() >= 0).all())


def _holds_each_once(places: Tensor) -> bool:
    count = len(places)
    if not count:
        return True
    low, high = map(int, places.aminmax())
    if low != 0 or high != count - 1:
        return False
    return bool(torch.zeros(count, dtype=torch.bool).index_fill_(0, places.long(), 1).all())

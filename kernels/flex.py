"""Flex: sparse attention with PyTorch's compiled FlexAttention, on GPUs.

    slots   = every block, in the blocks' order, padded to one size
    visible = key slot in a whole block | key slot in a partial block & mask_mod
    mask_mod(sample, head, i, j) = j is a real token
                                   & (i or j is text | the windows of head's pattern keep (i, j))
    output, lse = flex_attention(query slots, key slots, value slots, visible)

BlockMask knows one block size and our blocks are ragged, so tokens are gathered into slots; a
whole block whose keys do not fill their slot is listed as partial, for `mask_mod` hides the rest.

Operands: query, key, value `[batch, tokens, heads, head_dim]`, any strides, float32, bfloat16 or
float16, head_dim of at least 16. Compiled once for each shape and number of window axes.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.bitmasks import unwindowed
from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.tiling import ragged
from dit_sparse.kernels.windows import Windows, everything

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_HEAD_DIM = 16

# Tile sizes of the compiled kernel are powers of two in this range, and must divide a slot.
_LEAST_SLOT, _LARGEST_TILE = 16, 128

# Each shape is compiled anew; past this many, PyTorch raises rather than runs uncompiled.
_MOST_COMPILED = 256


@dataclass(slots=True)
class _Prepared:
    """What was derived from one BlockIndices: its refusal, and slots by device and batch."""

    refusal: str | None
    slots: dict[tuple[torch.device, int], "_Slots"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Slots:
    """One BlockIndices as FlexAttention takes it, on one device.

    Attributes:
        queries, keys: row in each slot (of padding: any), int64; `None` for the rows as they
            come.
        query_place: slot of each query, int64 `[queries]`.
        mask: a BlockMask.
        size: slots of a block of queries, of keys.
    """

    queries: Tensor | None
    keys: Tensor | None
    query_place: Tensor
    mask: Any
    size: tuple[int, int]


_prepared: WeakKeyDictionary[BlockIndices, _Prepared] = WeakKeyDictionary()


def supports(call: AttentionCall) -> str | None:
    """What torch.compile serves with an LSE: CUDA and XPU, with Triton; no pooled keys, and one
    order of queries and keys."""
    device, head_dim = call.query.device, call.query.shape[-1]
    if device.type == "cpu":
        return "PyTorch's FlexAttention returns no LSE on the CPU"
    if device.type not in ("cuda", "xpu"):
        return f"runs on CUDA and XPU devices, the tensors are on {device}"
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which is not installed"
    if call.query.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {call.query.dtype}"
    if head_dim < _LEAST_HEAD_DIM:
        return f"needs a head_dim of at least {_LEAST_HEAD_DIM}, got {head_dim}"
    if call.pv_skip is not None:
        return "leaves no values out, as pv_skip asks"
    return _prepare(call.blocks).refusal


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See the head of this file."""
    batch = call.query.shape[0]
    prepared, key = _prepare(call.blocks), (call.query.device, batch)
    if key not in prepared.slots:
        prepared.slots[key] = _slots(call.blocks, *key)
    slots = prepared.slots[key]
    query, keys, value = (
        (tensor if rows is None else tensor.index_select(1, rows)).transpose(1, 2)
        for tensor, rows in (
            (call.query, slots.queries),
            (call.key, slots.keys),
            (call.value, slots.keys),
        )
    )
    output, lse = _attend(query, keys, value, slots.mask, call.scale, _options(call, slots.size))
    output, lse = output.transpose(1, 2), lse.to(torch.float32)
    if slots.queries is None:
        return output.contiguous(), lse
    return output.index_select(1, slots.query_place), lse.index_select(2, slots.query_place)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Heads-first operands; compiled, or an error."""
    from torch.nn.attention.flex_attention import AuxRequest

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MOST_COMPILED):
        output, aux = _compiled()(
            query,
            key,
            value,
            block_mask=mask,
            scale=scale,
            kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )
    return output, aux.lse


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, FlexAttention ignores the lists of blocks; hence never without fullgraph.
    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def _options(call: AttentionCall, size: tuple[int, int]) -> dict[str, Any]:
    """Tiles that divide the slots; FlashAttention's CuTe kernel where it can be used."""
    if _has_flash() and call.query.dtype != torch.float32 and call.query.shape[-1] in (64, 128):
        major, _ = torch.cuda.get_device_capability(call.query.device)
        if size == {9: (128, 128), 10: (256, 128)}.get(major):
            return {"BACKEND": "FLASH"}
    names = ("BLOCK_M", "BLOCK_N")
    return {n: s for n, s in zip(names, size, strict=True) if s < _LARGEST_TILE}


@cache
def _has_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        return False


def _prepare(blocks: BlockIndices) -> _Prepared:
    if blocks not in _prepared:
        _prepared[blocks] = _Prepared(_refusal(blocks))
    return _prepared[blocks]


def _refusal(blocks: BlockIndices) -> str | None:
    if (blocks.tag > WHOLE).any():
        return "pooled keys are not built here"
    if blocks.order is None:
        return "each list of clusters has another number of blocks, and would be compiled anew"
    pattern = next(iter(unwindowed(blocks)), None)
    if pattern is not None:
        return f"{pattern} has partial blocks and is not made of windows"
    return None


def _slots(blocks: BlockIndices, device: torch.device, batch: int) -> _Slots:
    from torch.nn.attention.flex_attention import BlockMask

    size = _slot_size(blocks.query_offsets), _slot_size(blocks.key_offsets)
    query_place = _places(blocks.permutation, blocks.query_offsets, size[0])
    key_place = _places(blocks.key_permutation, blocks.key_offsets, size[1])
    queries = _rows(query_place, blocks.query_blocks * size[0])
    keys = _rows(key_place, blocks.key_blocks * size[1])
    real = blocks.grid.real(batch)[:, blocks.key_raster]
    seen = (keys >= 0) & real[:, keys.clamp_min(0)]
    clean = seen.view(batch, blocks.key_blocks, size[1]).all(-1).all(0)
    whole = (blocks.tag == WHOLE) & clean[blocks.key_block.long()]
    lists = [part.to(device) for kept in (~whole, whole) for part in _lists(blocks, kept)]
    queries, keys = queries.clamp_min(0), keys.clamp_min(0)
    mask = BlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=size,
        mask_mod=_mask_mod(
            blocks, blocks.query_raster[queries], blocks.key_raster[keys], seen, device
        ),
        seq_lengths=(len(queries), len(keys)),
        compute_q_blocks=False,
    )
    return _Slots(
        queries=_moved(queries, len(query_place), device),
        keys=_moved(keys, len(key_place), device),
        query_place=query_place.to(device),
        mask=mask,
        size=size,
    )


def _slot_size(offsets: Tensor) -> int:
    """The least size that holds every block and that tiles of the kernel divide."""
    largest = max(int(offsets.diff().max()), _LEAST_SLOT)
    if largest <= _LARGEST_TILE:
        return 1 << (largest - 1).bit_length()
    return math.ceil(largest / _LARGEST_TILE) * _LARGEST_TILE


def _moved(rows: Tensor, count: int, device: torch.device) -> Tensor | None:
    """`rows` on the device, `None` if they are all `count` as they come."""
    return None if torch.equal(rows, torch.arange(count)) else rows.to(device)


def _places(permutation: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Slot of each row, int64 `[rows]`."""
    lengths = offsets.diff()
    padding = (size - lengths).cumsum(0) - (size - lengths)
    position = torch.arange(len(permutation)) + padding.repeat_interleave(lengths)
    return torch.empty_like(position).index_copy_(0, permutation, position)


def _rows(place: Tensor, slots: int) -> Tensor:
    """Row in each slot, -1 for padding, int64 `[slots]`."""
    return torch.full((slots,), -1).index_copy_(0, place, torch.arange(len(place)))


def _lists(blocks: BlockIndices, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[1, heads, query_blocks]` and, first in their rows, indices `[1, heads,
    query_blocks, key_blocks]` of the chosen entries, int32."""
    rows = blocks.heads * blocks.query_blocks
    row = torch.arange(rows).repeat_interleave(blocks.row_pointer.diff())[chosen]
    counts = row.bincount(minlength=rows)
    _, column = ragged(counts)
    indices = torch.zeros(rows, blocks.key_blocks, dtype=torch.int32)
    indices[row, column] = blocks.key_block[chosen]
    shape = 1, blocks.heads, blocks.query_blocks
    return counts.to(torch.int32).view(shape), indices.view(*shape, blocks.key_blocks)


def _mask_mod(
    blocks: BlockIndices, queries: Tensor, keys: Tensor, seen: Tensor, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether a pair of slots in a partial block is kept; `queries`, `keys`: raster token in each;
    `seen` bool `[batch, key slots]`."""
    grid = blocks.grid
    patterns = blocks.patterns or ()
    distinct = {pattern: number for number, pattern in enumerate(dict.fromkeys(patterns))}
    windows = [pattern.windows(grid) or everything(grid.tokens) for pattern in distinct]
    axes = max((len(window.low) for window in windows), default=0)
    seen = seen.to(device)
    if not axes:
        return lambda sample, head, query, key: seen[sample, key]
    which = torch.tensor([distinct[pattern] for pattern in patterns], device=device)
    padded = [_with_axes(window, axes) for window in windows]
    low = torch.stack([window.low[:, queries] for window in padded]).to(device)
    size = torch.stack([window.size[:, queries] for window in padded]).to(device)
    place = torch.stack([window.place[:, keys] for window in padded]).to(device)
    query_is_text, key_is_text = (
        ((tokens < grid.text_before) | (tokens >= grid.text_before + grid.video)).to(device)
        for tokens in (queries, keys)
    )

    def mask_mod(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        pattern = which[head]
        kept = query_is_text[query] | key_is_text[key]
        inside = ~kept | kept
        for axis in range(axes):
            offset = place[pattern, axis, key] - low[pattern, axis, query]
            inside = inside & (offset >= 0) & (offset < size[pattern, axis, query])
        return seen[sample, key] & (kept | inside)

    return mask_mod


def _with_axes(windows: Windows, axes: int) -> Windows:
    """The same windows, with axes added that keep every pair."""
    missing = axes - len(windows.low), windows.low.shape[1]
    none, one = windows.low.new_zeros(missing), windows.low.new_ones(missing)
    return Windows(
        torch.cat([windows.low, none]),
        torch.cat([windows.size, one]),
        torch.cat([windows.place, none]),
    )

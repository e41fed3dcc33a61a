"""Native: sparse attention on the CPU in C++ (`cpp/`), compiled on first use, and what blocks are
ranked by.

Operands are read where they lie, through their strides and the order of tokens. Keys and values
are laid out once for the rows that share them, on a shelf (`cpp/shelf.h`) of at most 5,242,880
elements or a sixteenth of query, key and value, whichever is more; up to 20 MB of it stay with the
thread that calls. Beside it nothing grows with the number of tokens but the bit masks of patterns
that are not made of windows. float32 sums throughout.
"""

import ctypes
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.bitmasks import BitMasks, bit_masks, refusal
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.compiler import instruction_sets, library
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.predicates import partial_patterns
from dit_sparse.kernels.sample import segments
from dit_sparse.kernels.windows import everything

_TILE = 64  # TILE of cpp/product.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Operand(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("token", ctypes.c_int64),
        ("head", ctypes.c_int64),
    )


class _Side(ctypes.Structure):
    """`Side` of cpp/pool.h."""

    _fields_ = (
        ("operand", _Operand),
        ("permutation", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("blocks", ctypes.c_int64),
        ("center", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
    )


class _Windows(ctypes.Structure):
    _fields_ = (
        ("axes", ctypes.c_int64),
        ("low", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
        ("place", ctypes.c_void_p),
    )


class _Call(ctypes.Structure):
    """`Call` of cpp/call.h."""

    _fields_ = (
        ("query", _Operand),
        ("key", _Operand),
        ("value", _Operand),
        ("output", _Operand),
        ("lse", ctypes.c_void_p),
        ("permutation", ctypes.c_void_p),
        ("key_permutation", ctypes.c_void_p),
        ("query_offsets", ctypes.c_void_p),
        ("key_offsets", ctypes.c_void_p),
        ("row_pointer", ctypes.c_void_p),
        ("key_block", ctypes.c_void_p),
        ("tag", ctypes.c_void_p),
        ("windows", ctypes.c_void_p),
        ("mask_first", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("keys", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("query_blocks", ctypes.c_int64),
        ("key_blocks", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("pv_skip", ctypes.c_double),
        ("parallel", ctypes.c_void_p),
    )


@dataclass(slots=True)
class _Prepared:
    """What the library reads of one BlockIndices, or why it cannot; kept alive with it."""

    refusal: str | None
    call: _Call  # without operands
    kept: tuple[object, ...]  # what the call points to
    unwindowed: dict[Pattern, list[int]]
    masks: BitMasks | None = None
    slots: dict[int | None, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)


_prepared: WeakKeyDictionary[BlockIndices, _Prepared] = WeakKeyDictionary()


def supports(call: AttentionCall) -> str | None:
    """CPU tensors of three dtypes, masks that are not too large, and a compiler."""
    if call.query.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {call.query.device}"
    if call.query.dtype not in _DTYPES:
        return f"takes float32, bfloat16 or float16, got {call.query.dtype}"
    refusal = _prepared_of(call.blocks).refusal
    if refusal is not None:
        return refusal
    made = library(instruction_sets())
    return made if isinstance(made, str) else None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See the head of this file."""
    batch, tokens, heads, head_dim = call.query.shape
    output = torch.empty((batch, tokens, heads, head_dim), dtype=call.query.dtype)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32)
    if output.numel() == 0:
        return output, lse.fill_(-torch.inf)
    prepared = _prepared_of(call.blocks)
    if prepared.masks is None and prepared.unwindowed:
        prepared.masks = bit_masks(call.blocks, prepared.unwindowed)
        prepared.call.mask_first = prepared.masks.first.data_ptr()
        prepared.call.masks = prepared.masks.words.data_ptr()
    _run("attend", call, output, lse)
    return output, lse


def mass(call: AttentionCall, lse: Tensor, rows: int | None) -> Tensor:
    """What `block_mass` of mass.py says."""
    blocks, (batch, _, heads, _) = call.blocks, call.query.shape
    out = torch.zeros((batch, heads, blocks.query_blocks, blocks.key_blocks))
    known = _prepared_of(blocks).slots
    if rows not in known:
        known[rows] = _slots(blocks, rows)
    slots, block, groups = known[rows]
    count = len(groups) - 1
    _run("mass", call, call.query, lse, slots, block, groups, count, out)
    return out


def largest(call: AttentionCall, rows: Tensor, columns: Tensor) -> Tensor:
    """Of the samples of a block of queries and of a block of keys, the largest logit less the
    largest that its query has with any sample of a key, in powers of two; of several queries the
    largest difference. float32 `[batch, heads, query_blocks, key_blocks]`, -inf without samples.

    `rows`, `columns`: raster tokens, int64 `[batch or 1, blocks, samples]`, -1 for none.
    """
    blocks, (batch, _, heads, _) = call.blocks, call.query.shape
    out = torch.empty((batch, heads, blocks.query_blocks, blocks.key_blocks))
    own, count = int(len(rows) > 1), rows.shape[2]
    _run("largest", call, call.query, None, rows, columns, count, own, out)
    return out


def means(call: AttentionCall, center: Tensor, similarity: float) -> tuple[Tensor, Tensor]:
    """`exp(logit - largest)` of the means of blocks, keys less `center` float32 `[batch, heads,
    head_dim]`, 0 where a block of keys is not alike: float32 `[batch, heads, query_blocks,
    key_blocks]`. And the pairs with a block that is not, in any sample: bool without the batch."""
    blocks, (batch, _, heads, _) = call.blocks, call.query.shape
    shape = heads, blocks.query_blocks, blocks.key_blocks
    weight, forced = torch.empty((batch, *shape)), torch.empty(shape, dtype=torch.bool)
    queries, _query_kept = _side(call.query, blocks.permutation, blocks.query_offsets, None)
    keys, _key_kept = _side(call.key, blocks.key_permutation, blocks.key_offsets, center)
    sides = ctypes.byref(queries), ctypes.byref(keys)
    _run("means", call, call.query, None, *sides, similarity, weight, forced)
    return weight, forced


def peak(dtype: torch.dtype) -> float | None:
    """Multiplies and adds all threads, nothing else, for some milliseconds; how many of both it
    did, or `None` where `run` would refuse."""
    made = library(instruction_sets())
    if isinstance(made, str) or dtype not in _DTYPES:
        return None
    call = _Call(threads=torch.get_num_threads(), head_dim=_TILE, parallel=_parallel())
    done = ctypes.c_double()
    if made.dit_sparse_peak(ctypes.byref(call), _DTYPES[dtype], ctypes.byref(done)):
        raise MemoryError("no memory for a thread")
    return done.value


def _side(
    tokens: Tensor, permutation: Tensor, offsets: Tensor, center: Tensor | None
) -> tuple[_Side, object]:
    """Blocks of `tokens` with room for what is found of them, and what must live until then."""
    (batch, _, heads, head_dim), blocks = tokens.shape, len(offsets) - 1
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    mean = torch.empty((batch, heads, blocks, -(-head_dim // 16) * 16))
    cosine = torch.empty((batch, heads, blocks))
    count = torch.empty((batch, heads, blocks), dtype=torch.int64)
    kept = tokens, permutation.long(), offsets, center, mean, cosine, count
    _, places, cuts, middle, *found = (None if x is None else x.data_ptr() for x in kept)
    return _Side(_operand(tokens), places, cuts, blocks, middle, *found), kept


def _run(
    name: str, call: AttentionCall, output: Tensor, lse: Tensor | None, *arguments: Any
) -> None:
    """Call `name` of the library, with tensors as addresses, integers in 64 bits, floats in 32."""
    asked, _alive = _asked(call, output, lse)
    kinds = {int: ctypes.c_int64, float: ctypes.c_float}
    given = (
        ctypes.c_void_p(x.data_ptr())
        if isinstance(x, Tensor)
        else kinds.get(type(x), lambda same: same)(x)
        for x in arguments
    )
    function = getattr(_library(), f"dit_sparse_{name}")
    if function(ctypes.byref(asked), _DTYPES[call.query.dtype], *given):
        raise MemoryError(f"no memory for {name} of head_dim {call.query.shape[-1]}")


def _asked(call: AttentionCall, output: Tensor, lse: Tensor | None) -> tuple[_Call, object]:
    """The call as the library reads it, and what must live until it is done."""
    operands = [
        x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key, call.value)
    ]
    asked = _Call.from_buffer_copy(_prepared_of(call.blocks).call)
    asked.query, asked.key, asked.value, asked.output = map(_operand, (*operands, output))
    asked.lse = None if lse is None else lse.data_ptr()
    asked.batch, asked.queries, asked.heads, asked.head_dim = call.query.shape
    asked.keys = call.key.shape[1]
    asked.threads = torch.get_num_threads()
    asked.scale = call.scale
    asked.pv_skip = -math.inf if call.pv_skip is None else call.pv_skip
    return asked, operands


def _slots(blocks: BlockIndices, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in tiles of `_TILE` (-1 for none), the query block of each, and the first tile of
    each group of tiles that shares no query block with another; int64."""
    token, of_segment = segments(blocks, rows, _TILE)
    width, slots = token.shape[1], token.flatten()
    padding = 0, -len(slots) % _TILE
    slots = torch.nn.functional.pad(slots, padding, value=-1)
    block = torch.nn.functional.pad(of_segment.repeat_interleave(width), padding, value=-1)
    # A tile of all rows lies in one block, which may have more of them.
    tiles = of_segment.bincount() if rows is None else torch.ones(len(slots) // _TILE).long()
    return slots, block, torch.nn.functional.pad(tiles.cumsum(0), (1, 0))


def _library() -> ctypes.CDLL:
    made = library(instruction_sets())
    assert not isinstance(made, str)
    return made


def _operand(tensor: Tensor) -> _Operand:
    batch, token, head, _ = tensor.stride()
    return _Operand(tensor.data_ptr(), batch, token, head)


def _prepared_of(blocks: BlockIndices) -> _Prepared:
    prepared = _prepared.get(blocks)
    if prepared is None:
        prepared = _prepared[blocks] = _prepare(blocks)
    return prepared


def _prepare(blocks: BlockIndices) -> _Prepared:
    grid = blocks.grid
    patterns: tuple[Pattern | None, ...] = blocks.patterns or (None,) * blocks.heads
    partial = partial_patterns(blocks)
    kept = {p: p.windows(grid) if p in partial else None for p in dict.fromkeys(patterns)}
    windowed = {p: own or everything(grid.tokens) for p, own in kept.items()}
    if blocks.sharded:
        rows = blocks.query_raster, blocks.key_raster
        windowed = {p: own.of(*rows) for p, own in windowed.items()}
    windows = (_Windows * blocks.heads)(
        *(
            _Windows(len(w.low), w.low.data_ptr(), w.size.data_ptr(), w.place.data_ptr())
            for w in (windowed[pattern] for pattern in patterns)
        )
    )
    hidden = None
    if grid.valid_text is not None:
        hidden = ~grid.real(len(grid.valid_text)).index_select(1, blocks.key_raster)
    masked = {p: heads for p, heads in partial.items() if kept[p] is None}
    lists = {
        "permutation": blocks.permutation.long(),
        "key_permutation": blocks.key_permutation.long(),
        "query_offsets": blocks.query_offsets,
        "key_offsets": blocks.key_offsets,
        "row_pointer": blocks.row_pointer,
        "key_block": blocks.key_block,
        "tag": blocks.tag,
        "hidden": hidden,
    }
    call = _Call(
        windows=ctypes.addressof(windows),
        query_blocks=blocks.query_blocks,
        key_blocks=blocks.key_blocks,
        parallel=_parallel(),
        **{name: x.data_ptr() for name, x in lists.items() if x is not None},
    )
    return _Prepared(refusal(blocks, masked), call, (windows, windowed, lists), masked)


@cache
def _parallel() -> int | None:
    """Address of the function by which PyTorch starts its threads, so that ours are the same."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*"):
        function = ctypes.CDLL(str(path)).GOMP_parallel
        return ctypes.cast(function, ctypes.c_void_p).value
    return None

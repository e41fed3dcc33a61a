"""Mass: how much attention each block of keys gets, exactly, given the LSE; a Triton kernel.

    mass[b, h, i, j] = sum over rows of query block i, and keys of block j, of exp(s - lse[row])

A score pass without values: with all rows about half of dense attention, with 16 rows a block a
sixteenth of that. Over all blocks of keys a row adds up to 1. The LSE may be an earlier step's.

Operands: query, key `[batch, tokens, heads, head_dim]` in raster order, any strides, float32,
bfloat16 or float16; lse float32 `[batch, heads, tokens]`. Limits: head_dim <= 256.
"""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_sparse.kernels.attend_triton import load_rows, load_tile, matmul
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.launch_triton import arranged, operand, tiles_of
from dit_sparse.kernels.sample import segments
from dit_sparse.kernels.tiling import real_tokens, tiling
from dit_sparse.kernels.tokens_triton import interpreting, padded_dim, unit_stride
from dit_sparse.kernels.worklist import worklist

# Rows of a program: the smallest tile of queries that Hopper's matrix instructions take.
BLOCK_Q = 64


@triton.jit
def mass(
    query, key, lse, out, slots, key_first, key_count,
    query_strides, key_strides,
    factor, heads, queries, keys, key_tiles, count_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr, DESCRIPTORS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q `slots` (raster tokens, or -1) against all tiles of keys; sums over
    runs of SEGMENT slots go to `out` float32 `[batch, heads, segments, key_tiles]`."""
    SEGMENTS: tl.constexpr = BLOCK_Q // SEGMENT
    sample = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    n = tl.arange(0, BLOCK_K)
    token = tl.load(slots + tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q))
    alive = token >= 0
    query += sample.to(tl.int64) * query_strides[0] + head.to(tl.int64) * query_strides[2]
    q = load_rows(query, token, query_strides[1], alive, HEAD_DIM, DIM)
    at = lse + tl.program_id(1).to(tl.int64) * queries + token
    level = tl.load(at, mask=alive, other=float("inf")) * 1.4426950408889634
    # A row that saw nothing has no mass to give.
    level = tl.where(level == float("-inf"), float("inf"), level)
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    segments = tl.num_programs(0) * SEGMENTS
    out += (tl.program_id(1).to(tl.int64) * segments + segment) * key_tiles
    first = tl.load(key_first)
    count = tl.load(key_count + sample * count_stride)
    for tile in tl.range(0, key_tiles):
        # Known one tile ahead, or the copies of each tile would wait for where it is.
        ahead = tl.minimum(tile + 1, key_tiles - 1)
        next_first = tl.load(key_first + ahead)
        next_count = tl.load(key_count + sample * count_stride + ahead)
        k = load_tile(
            key, key_strides, sample, head, first, keys, DESCRIPTORS, False, HEAD_DIM, DIM,
            BLOCK_K,
        )  # fmt: skip
        scores = matmul(q, k.T, UPCAST)
        shares = tl.math.exp2(scores * factor - level[:, None])
        shares = tl.sum(tl.where((n < count)[None, :], shares, 0.0), 1)
        tl.store(out + tile, tl.sum(tl.reshape(shares, (SEGMENTS, SEGMENT)), 1))
        first = next_first
        count = next_count


def block_mass(call: AttentionCall, lse: Tensor, rows: int | None = 16) -> Tensor:
    """Mass of every pair of blocks, listed or not, float32 `[batch, heads, query_blocks,
    key_blocks]`; summed over the rows that `segments` picks, or over all (`None`)."""
    query, blocks = unit_stride(call.query), call.blocks
    batch, queries, heads, head_dim = query.shape
    sizes = tiles_of(call)
    work = worklist(blocks, sizes.block_q, sizes.block_k, query.device)
    key = arranged(call.key, work, sizes)
    slots, segment, of_query, of_key, key_first, key_count = _tables(
        blocks, rows, sizes.block_k, query.device
    )
    key_tiles = len(key_first)
    out = query.new_empty(batch, heads, len(slots) // segment, key_tiles, dtype=torch.float32)
    kernel: Any = mass
    kernel[(len(slots) // BLOCK_Q, batch * heads)](
        query, operand(key, sizes), lse.contiguous(), out, slots, key_first, key_count,
        query.stride(), key.stride(), call.scale / math.log(2), heads, queries, key.shape[1],
        key_tiles, key_tiles if len(key_count) > 1 else 0,
        HEAD_DIM=head_dim, DIM=padded_dim(head_dim), BLOCK_Q=BLOCK_Q, BLOCK_K=sizes.block_k,
        SEGMENT=segment, DESCRIPTORS=sizes.descriptors, UPCAST=interpreting(),
        num_warps=4, num_stages=sizes.stages,
    )  # fmt: skip
    out = out[:, :, : len(of_query)]
    if blocks.query_blocks < len(of_query):
        out = out.new_zeros(*out.shape[:2], blocks.query_blocks, key_tiles).index_add_(
            2, of_query, out
        )
    if blocks.key_blocks < key_tiles:
        out = out.new_zeros(*out.shape[:3], blocks.key_blocks).index_add_(3, of_key, out)
    return out


_Tables = tuple[Tensor, int, Tensor, Tensor, Tensor, Tensor]
_kept: WeakKeyDictionary[BlockIndices, dict[tuple[object, ...], _Tables]] = WeakKeyDictionary()


def _tables(blocks: BlockIndices, rows: int | None, block_k: int, device: torch.device) -> _Tables:
    """Slots, slots of a segment, the query block of each segment and the key block of each tile,
    and the tiles of keys."""
    known, name = _kept.setdefault(blocks, {}), (rows, block_k, device)
    if name not in known:
        token, of_query = segments(blocks, rows, BLOCK_Q)
        segment, token = token.shape[1], token.flatten()
        token = torch.nn.functional.pad(token, (0, -len(token) % BLOCK_Q), value=-1)
        keys = tiling(blocks.key_offsets, block_k)
        known[name] = (
            token.int().to(device),
            segment,
            of_query.to(device),
            keys.block.to(device),
            keys.first.int().to(device),
            real_tokens(blocks.grid, blocks.key_sequence, keys).int().to(device),
        )
    return known[name]

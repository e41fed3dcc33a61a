"""Tokens: Triton kernels that bring keys and values into the order of the blocks, and pool them.

    ordered[b, h, p] = x[b, permutation[p], h]
    means[b, h, r] = mean of x[b, first[r] : first[r] + count[b, r], h]          0 for no token

Operands: x `[batch, tokens, heads, head_dim]`, any strides, float32, bfloat16 or float16; the
permutation int32 `[tokens]`, or none; first int32 `[runs]`, count int32 `[batch or 1, runs]`.
Sums are taken in float32. Limits: head_dim <= 256.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 32


@triton.jit
def _order(
    x, ordered, permutation, strides, ordered_strides, heads, tokens,
    PERMUTED: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = place < tokens
    token = place
    if PERMUTED:
        token = tl.load(permutation + place, mask=inside, other=0)
    seen = inside[:, None] & (d < HEAD_DIM)[None, :]
    x += sample * strides[0] + head * strides[2]
    rows = tl.load(
        x + token[:, None].to(tl.int64) * strides[1] + d[None, :] * strides[3],
        mask=seen,
        other=0.0,
    )
    ordered += sample * ordered_strides[0] + head * ordered_strides[1]
    at = ordered + place[:, None].to(tl.int64) * ordered_strides[2] + d[None, :]
    tl.store(at, rows, mask=seen)


@triton.jit
def _pool(
    x, means, first, count, strides, heads, runs, count_stride,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    run = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = run < runs
    place = tl.load(first + run, mask=inside, other=0)
    number = tl.load(count + sample * count_stride + run, mask=inside, other=0)
    x += sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[2]
    total = tl.zeros([BLOCK, DIM], tl.float32)
    for step in tl.range(0, tl.max(number, 0)):
        seen = (step < number)[:, None] & (d < HEAD_DIM)[None, :]
        at = x + (place + step)[:, None].to(tl.int64) * strides[1] + d[None, :] * strides[3]
        total += tl.load(at, mask=seen, other=0.0).to(tl.float32)
    total /= tl.maximum(number, 1).to(tl.float32)[:, None]
    at = means + (tl.program_id(1).to(tl.int64) * runs + run)[:, None] * HEAD_DIM + d[None, :]
    tl.store(at, total.to(means.dtype.element_ty), mask=inside[:, None] & (d < HEAD_DIM)[None, :])


def ordered(x: Tensor, permutation: Tensor | None) -> Tensor:
    """`x` in another order, as a view `[batch, tokens, heads, head_dim]` of a heads-first copy
    whose rows start at multiples of 16 bytes, as tensor descriptors need them."""
    batch, tokens, heads, head_dim = x.shape
    unit = 16 // x.element_size()
    copy = x.new_empty(batch, heads, tokens, (head_dim + unit - 1) // unit * unit)
    kernel: Any = _order
    kernel[(triton.cdiv(tokens, _BLOCK), batch * heads)](
        x, copy, copy if permutation is None else permutation, x.stride(), copy.stride(),
        heads, tokens, PERMUTED=permutation is not None, HEAD_DIM=head_dim,
        DIM=padded_dim(head_dim), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return copy[..., :head_dim].transpose(1, 2)


def pool(x: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Means of runs of tokens, `[batch, heads, runs, head_dim]` in the dtype of `x`."""
    batch, _, heads, head_dim = x.shape
    means = x.new_empty(batch, heads, len(first), head_dim)
    if means.numel():
        kernel: Any = _pool
        kernel[(triton.cdiv(len(first), _BLOCK), batch * heads)](
            x, means, first, count, x.stride(), heads, len(first),
            len(first) if len(count) > 1 else 0,
            HEAD_DIM=head_dim, DIM=padded_dim(head_dim), BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return means


def padded_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a tile of rows of `head_dim` is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter instead of on a GPU."""
    return not isinstance(_order, triton.runtime.JITFunction)


def unit_stride(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its head_dim is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous(memory_format=torch.contiguous_format)

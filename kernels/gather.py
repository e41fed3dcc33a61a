"""Gather: sparse attention on the CPU with PyTorch's own dense attention.

    for each rectangle of the cover:
        output, lse = merge(attention over the keys that all its queries see,
                            masked attention over the other keys)

Operands: query, key, value `[batch, tokens, heads, head_dim]`, any strides, any floating dtype,
any head_dim. Scores and sums of half precision inputs are kept in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.cover import Cover, Prices, Rectangle, Runs, covers, visible
from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.order import raster

# Measured with AMX and AVX512, bfloat16 and float32; the speed changes little around them.
_PRICES = Prices(narrow=95, masked=0.35)

# Masks are kept between calls while those of one BlockIndices fit in this much memory; past it
# they are evaluated anew.
_KEPT_MASK_BYTES = 256 << 20

# Finite, so that a query that sees no key of a rectangle yields no NaN; far below any real logit.
_HIDDEN = -1e30

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(slots=True)
class _Prepared:
    """What was derived from one BlockIndices: covers by valid text, and kept masks."""

    covers: dict[int | None, list[Cover]] = field(default_factory=dict)
    masks: dict[tuple[Rectangle, torch.dtype], Tensor] = field(default_factory=dict)
    mask_bytes: int = 0


_prepared: WeakKeyDictionary[BlockIndices, _Prepared] = WeakKeyDictionary()


def supports(call: AttentionCall) -> str | None:
    """CPU tensors, no pooled keys."""
    if call.query.device.type != "cpu":
        return f"runs on the CPU, the tensors are on {call.query.device}"
    if call.pv_skip is not None:
        return "leaves no values out, as pv_skip asks"
    if (call.blocks.tag > WHOLE).any():
        return "pooled keys are not built here"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See the head of this file."""
    batch, tokens, heads, _ = call.query.shape
    dtype = call.query.dtype
    prepared = _prepared.setdefault(call.blocks, _Prepared())
    output = torch.empty(call.query.shape, dtype=dtype)
    lse = torch.empty(batch, heads, tokens, dtype=torch.promote_types(dtype, torch.float32))
    valid_text = call.blocks.grid.valid_text or (None,) * batch
    for valid in dict.fromkeys(valid_text):
        samples = [sample for sample, count in enumerate(valid_text) if count == valid]
        if valid not in prepared.covers:
            prepared.covers[valid] = covers(call.blocks, _PRICES, valid)
        for cover in prepared.covers[valid]:
            query, key, value = (
                _select(_select(x, 0, samples), 2, cover.heads)
                for x in (call.query, call.key, call.value)
            )
            out, sums = _attend(query, key, value, call.blocks, cover, prepared, call.scale)
            if out.shape == output.shape:
                return out, sums
            rows = torch.tensor(samples)[:, None], torch.tensor(cover.heads)
            output.transpose(1, 2)[rows] = out.transpose(1, 2)
            lse[rows] = sums
    return output, lse


def _select(tensor: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    if len(indices) == tensor.shape[axis]:
        return tensor
    return tensor.index_select(axis, torch.tensor(indices))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockIndices,
    cover: Cover,
    prepared: _Prepared,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention of the heads of one cover; operands and results as those of `run`."""
    moved = blocks.order != raster()
    if moved:
        query = query.index_select(1, blocks.permutation)
        key, value = (x.index_select(1, blocks.key_permutation) for x in (key, value))
    output = torch.zeros(query.shape, dtype=query.dtype)
    lse = torch.full(
        (query.shape[0], query.shape[2], query.shape[1]),
        -torch.inf,
        dtype=torch.promote_types(query.dtype, torch.float32),
    )
    for rectangle in cover.rectangles:
        queries = slice(rectangle.first, rectangle.last)
        parts = []
        for runs, bias in (
            (rectangle.whole, None),
            (rectangle.masked, _bias(blocks, cover.heads[0], rectangle, prepared, query.dtype)),
        ):
            if runs:
                out, sums = _flash(
                    query[:, queries].transpose(1, 2),
                    _gather(key, runs).transpose(1, 2),
                    _gather(value, runs).transpose(1, 2),
                    attn_mask=bias,
                    scale=scale,
                )
                parts.append(_unhidden(out, sums) if bias is not None else (out, sums))
        parts = [(out.transpose(1, 2), sums) for out, sums in parts]
        output[:, queries], lse[:, :, queries] = merge(parts) if len(parts) > 1 else parts[0]
    if moved:
        place = blocks.permutation.long()
        output = torch.empty_like(output).index_copy_(1, place, output)
        lse = torch.empty_like(lse).index_copy_(2, place, lse)
    return output, lse


def _unhidden(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Zero and -inf for the queries whose keys were all hidden."""
    empty = lse < _HIDDEN / 2
    if not empty.any():
        return output, lse
    return output.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)


def _gather(tensor: Tensor, runs: Runs) -> Tensor:
    pieces = [tensor[:, first:last] for first, last in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _bias(
    blocks: BlockIndices,
    head: int,
    rectangle: Rectangle,
    prepared: _Prepared,
    dtype: torch.dtype,
) -> Tensor | None:
    """0 where a pair is kept, a huge negative number where not; kept between calls."""
    if not rectangle.masked:
        return None
    # Half precision cannot hold the number; PyTorch adds a float32 mask to it as well.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    bias = prepared.masks.get((rectangle, dtype))
    if bias is None:
        kept = visible(blocks, head, rectangle)
        bias = torch.zeros(kept.shape, dtype=dtype).masked_fill_(~kept, _HIDDEN)
        if prepared.mask_bytes + bias.nbytes <= _KEPT_MASK_BYTES:
            prepared.mask_bytes += bias.nbytes
            prepared.masks[rectangle, dtype] = bias
    return bias

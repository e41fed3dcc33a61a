"""Sparse attention: softmax(scale * query . key) value over the pairs that the blocks list."""

import math

import torch
from torch import Tensor

from dit_sparse.kernels.backend import choose
from dit_sparse.kernels.blocks import BlockIndices, by_handle
from dit_sparse.kernels.call import AttentionCall


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockIndices,
    *,
    scale: float | None = None,
    pv_skip: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend over the pairs of tokens that `blocks` lists.

    Args:
        query, key, value: `[batch, tokens, heads, head_dim]`, heads last, tokens in raster order,
            any strides, one floating dtype. Queries and keys are all tokens of the grid, or those
            of the shards that the blocks are for, and may differ in number.
        blocks: which keys each head's queries see, from `block_indices` or `from_block_mask`.
        scale: factor of the logits, defaults to `head_dim ** -0.5`.
        pv_skip: a negative number, by which the values of a tile of keys are left out where, for
            all its queries, the largest logit lies further than that below the largest so far.
            The softmax counts the tile all the same, so that the sum of exponentials does not
            change; what is missing of it is less than `exp(pv_skip)` times the largest for each
            key. A tile is a listed block, visited in order, or the part of one that the backend
            takes at a time (SpargeAttn, arXiv 2502.18137, section 3.4). Nothing is, if `None`.
        backend: `"auto"` takes the first backend that accepts the call; a name takes that backend
            or raises a `ValueError` with the reason for its refusal, and never another one.

    Returns:
        The output, shaped and typed as `query`, and the natural-log sum of exponentials, float32
        (float64 for float64 inputs) `[batch, heads, queries]`. A query that sees no key gets 0 and
        -inf. Padded text (`grid.valid_text`) is never seen, though its own rows are computed.
    """
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    call = AttentionCall(query, key, value, blocks, factor, pv_skip)
    _check(call)
    return _operator(query, key, value, blocks.handle, factor, backend, pv_skip)


@torch.library.custom_op("dit_sparse::sparse_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: int,
    scale: float,
    backend: str,
    pv_skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As an operator of PyTorch, so that compiled models run it without a break."""
    call = AttentionCall(query, key, value, by_handle(blocks), scale, pv_skip)
    return choose(call, backend).run(call)


@_operator.register_fake
def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: int,
    scale: float,
    backend: str,
    pv_skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((batch, heads, tokens), dtype=dtype)


def _check(call: AttentionCall) -> None:
    query, blocks = call.query, call.blocks
    if query.ndim != 4:
        raise ValueError(
            f"query must be [batch, tokens, heads, head_dim], got shape {tuple(query.shape)}"
        )
    batch, tokens, heads, head_dim = query.shape
    keys = len(blocks.key_permutation) if blocks.sharded else tokens
    for name, other in (("key", call.key), ("value", call.value)):
        for what in ("dtype", "device"):
            expected, came = getattr(query, what), getattr(other, what)
            if expected != came:
                raise ValueError(f"{name} must have the {what} of query, {expected}, got {came}")
        if other.shape != (batch, keys, heads, head_dim):
            of = f"for {keys} keys" if blocks.sharded else "of query"
            raise ValueError(
                f"{name} must have the shape {of}, {(batch, keys, heads, head_dim)}, got "
                f"{tuple(other.shape)}"
            )
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating dtype, got {query.dtype}")
    if blocks.queries is not None and tokens != len(blocks.permutation):
        raise ValueError(
            f"the blocks are for {len(blocks.permutation)} queries, {blocks.queries} of grid "
            f"{blocks.grid}, got {tokens}; build them with block_indices(queries=) for those"
        )
    if blocks.queries is None and tokens != blocks.grid.tokens:
        raise ValueError(
            f"the blocks are for grid {blocks.grid} of {blocks.grid.tokens} tokens, got {tokens} "
            "tokens; build them with block_indices for this grid"
        )
    if heads != blocks.heads:
        raise ValueError(
            f"the blocks are for {blocks.heads} heads, got {heads}; give one pattern per head"
        )
    valid = blocks.grid.valid_text
    if valid is not None and len(valid) != batch:
        raise ValueError(
            f"grid.valid_text is for a batch of {len(valid)}, got {batch}; give one count per "
            "sample"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, call.key, call.value)):
        raise ValueError(
            "sparse attention has no gradient, and query, key or value asks for one; call it "
            "under torch.no_grad()"
        )
    if not math.isfinite(call.scale):
        raise ValueError(f"scale must be finite, got {call.scale}")
    if call.pv_skip is not None and not call.pv_skip < 0:
        raise ValueError(f"pv_skip must be negative, got {call.pv_skip}; None leaves nothing out")

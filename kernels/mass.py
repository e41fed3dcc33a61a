"""Mass: how much attention every block of keys gets from every block of queries, exactly.

    mass[b, h, i, j] = sum over rows of query block i, and keys of block j, of exp(s - lse[row])

A score pass without values (AdaSpa, arXiv 2502.21079): with 16 rows a block a fraction of dense
attention. The LSE may be an earlier step's.
"""

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels import gpu, native
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.sample import sampled_rows


def block_mass(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    blocks: BlockIndices,
    *,
    scale: float | None = None,
    rows: int | None = 16,
) -> Tensor:
    """Mass of every pair of blocks, listed in `blocks` or not.

    Args:
        query, key: `[batch, tokens, heads, head_dim]` in raster order, any strides, one floating
            dtype.
        lse: of dense attention over the real keys, float32 `[batch, heads, tokens]`.
        blocks: where the tokens are cut into blocks, and which text is padded.
        scale: factor of the logits, defaults to `head_dim ** -0.5`.
        rows: queries of each block that stand for it, spread by the golden ratio, at most 64;
            `None` takes all.

    Returns:
        float32 `[batch, heads, query_blocks, key_blocks]`. Summed over key blocks it is the number
        of rows that were looked at.
    """
    batch, tokens, heads, head_dim = query.shape
    expected = [
        (batch, len(rows), heads, head_dim)
        for rows in (blocks.permutation, blocks.key_permutation)
    ]
    if [query.shape, key.shape] != expected:
        raise ValueError(
            f"query and key must be {expected[0]} and {expected[1]} for these blocks, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}"
        )
    if lse.shape != (batch, heads, tokens) or lse.dtype != torch.float32:
        raise ValueError(
            f"lse must be float32 {(batch, heads, tokens)}, got {lse.dtype} {tuple(lse.shape)}"
        )
    factor = head_dim**-0.5 if scale is None else scale
    call = AttentionCall(query, key, key, blocks, factor)
    if gpu.supports(call) is None:
        from dit_sparse.kernels.mass_triton import block_mass as of_triton

        return of_triton(call, lse, rows)
    if native.supports(call) is None:
        return native.mass(call, lse.contiguous(), rows)
    return _plain(call, lse, rows)


def _plain(call: AttentionCall, lse: Tensor, rows: int | None) -> Tensor:
    """The definition; one block of queries at a time."""
    blocks, device = call.blocks, call.query.device
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    permutation = blocks.permutation.to(device)
    keys = blocks.key_permutation
    key = rearrange(call.key[:, keys.to(device)].to(dtype), "b j h d -> b h d j")
    real = blocks.grid.real(len(call.query))[:, blocks.key_sequence]
    hidden = rearrange(~real, "b j -> b 1 1 j").to(device)
    places = (
        list(torch.arange(len(blocks.permutation)).tensor_split(blocks.query_offsets[1:-1]))
        if rows is None
        else [row[row >= 0] for row in sampled_rows(blocks.query_offsets, rows)]
    )
    found = []
    for place in places:
        queries = permutation[place.to(device)]
        query = rearrange(call.query[:, queries].to(dtype), "b i h d -> b h i d")
        level = rearrange(lse[:, :, queries], "b h i -> b h i 1")
        share = (call.scale * query @ key - level).exp()
        share = share.masked_fill(hidden | level.isneginf(), 0).sum(2)
        parts = share.tensor_split(blocks.key_offsets[1:-1], -1)
        found.append(torch.stack([part.sum(-1) for part in parts], -1))
    return torch.stack(found, 2).float()

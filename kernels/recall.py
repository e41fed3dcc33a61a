"""Recall: the share of attention that a list of blocks holds, measured on a few rows."""

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.rows import row_weights, valid_tokens
from dit_sparse.kernels.sample import sampled_rows
from dit_sparse.kernels.tags import tags_of_head
from dit_sparse.kernels.tiling import block_of

ROWS = 16


def block_recall(
    query: Tensor, key: Tensor, blocks: BlockIndices, *, scale: float | None = None
) -> float:
    """Mean over batch, heads and `ROWS` queries, spread over the sequence by the golden ratio,
    of the share of their attention that falls on blocks listed whole.

    `query` and `key` are `[batch, tokens, heads, head_dim]` in raster order; `blocks` comes from
    a table of blocks.
    """
    _, tokens, heads, _ = query.shape
    if blocks.sharded:
        raise ValueError("recall needs all tokens of a grid, got blocks of a shard of them")
    place = sampled_rows(torch.tensor([0, tokens]), ROWS)[0]
    place = place[place >= 0]
    row = torch.searchsorted(blocks.query_offsets, place, right=True) - 1
    listed = torch.stack([tags_of_head(blocks, head)[row] == WHOLE for head in range(heads)])
    seen = torch.empty(heads, len(place), tokens, dtype=torch.bool)
    seen[..., blocks.key_permutation] = listed[..., block_of(blocks.key_offsets)]
    valid = valid_tokens(blocks.grid)
    valid = None if valid is None else valid.to(query.device)
    rows = blocks.permutation[place].to(query.device)
    held = []
    # One head at a time, since every row is as long as the sequence.
    for one in torch.arange(heads).split(1):
        weights = row_weights(query[:, :, one], key[:, :, one], rows, scale=scale, valid=valid)
        kept = weights * seen[one].to(weights.device)
        held.append((kept.sum(-1) / weights.sum(-1)).mean())
    return float(torch.stack(held).mean())

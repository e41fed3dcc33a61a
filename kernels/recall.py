"""Recall: the share of attention that a list of blocks holds, measured on a few rows."""

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.rows import row_weights, valid_tokens
from dit_sparse.kernels.sample import sampled_rows

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
    place = sampled_rows(torch.tensor([0, tokens]), ROWS)[0]
    place = place[place >= 0]
    row = torch.searchsorted(blocks.query_offsets, place, right=True) - 1
    listed = _listed(blocks)[:, row]
    of_key = torch.arange(blocks.key_blocks).repeat_interleave(blocks.key_offsets.diff())
    seen = torch.empty(heads, len(place), tokens, dtype=torch.bool)
    seen[..., blocks.key_permutation] = listed[..., of_key]
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


def _listed(blocks: BlockIndices) -> Tensor:
    """Which key blocks every row lists whole, bool `[heads, query_blocks, key_blocks]`."""
    table = torch.zeros(len(blocks.row_pointer) - 1, blocks.key_blocks, dtype=torch.bool)
    row = torch.arange(len(table)).repeat_interleave(blocks.row_pointer.diff())
    table[row, blocks.key_block.long()] = blocks.tag == WHOLE
    return rearrange(table, "(h q) k -> h q k", h=blocks.heads)

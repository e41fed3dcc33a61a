"""Reference: the specification of sparse attention, as a dense boolean mask.

visible[i, j] = j's block is listed for i's block, and the pattern keeps (i, j) if it is tagged
                partial, and j is not padded text
output = softmax(scale * query key^T where visible) value;   lse = logsumexp of the same
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import PARTIAL, BlockIndices
from dit_sparse.kernels.call import AttentionCall

_MOST_TOKENS = 16384


def supports(call: AttentionCall) -> str | None:
    """Anything small: the mask is `tokens x tokens`."""
    tokens = call.query.shape[1]
    if tokens > _MOST_TOKENS:
        return f"{tokens} tokens need a dense mask; at most {_MOST_TOKENS} are taken"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Any device and floating dtype; computed in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    logits = call.scale * einsum(query, key, "b i h d, b j h d -> b h i j")
    for head in range(call.blocks.heads):
        visible = element_mask(call.blocks, head).to(logits.device)
        logits[:, head].masked_fill_(~visible, -torch.inf)
    for sample, valid in enumerate(call.blocks.grid.valid_text or ()):
        logits[sample, :, :, call.blocks.grid.invalid_text(valid)] = -torch.inf
    lse = logits.logsumexp(-1)
    weights = (logits - rearrange(lse.masked_fill(lse == -torch.inf, 0), "b h i -> b h i 1")).exp()
    return einsum(weights, value, "b h i j, b j h d -> b i h d").to(call.query.dtype), lse


def element_mask(blocks: BlockIndices, head: int) -> Tensor:
    """The pairs of raster tokens that `blocks` makes `head` see, bool `[tokens, tokens]`."""
    everything = torch.ones(blocks.grid.tokens, blocks.grid.tokens, dtype=torch.bool)
    kept = blocks.patterns[head].mask(blocks.grid) if blocks.patterns else everything
    visible = torch.zeros_like(everything)
    for row in range(blocks.query_blocks):
        queries = blocks.query_tokens(row)[:, None]
        for key_block, tag in blocks.entries(head, row):
            keys = blocks.key_tokens(key_block)
            visible[queries, keys] = kept[queries, keys] if tag == PARTIAL else True
    return visible

"""Reference: the specification of sparse attention, as a dense boolean mask.

visible[i, j] = j's block is listed for i's block, and the pattern keeps (i, j) if it is tagged
                partial, and j is not padded text
output = softmax(scale * query key^T where visible) value;   lse = logsumexp of the same

A run of pooled keys is one more key and value, the means of its tokens, and `ln(their number)` is
added to its logits.

Under `pv_skip`, in each row of blocks:
    left out = those whose largest logit < the largest up to and with them + pv_skip, for every i
    output   = (softmax, zero where left out) value
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import PARTIAL, WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall

_MOST_TOKENS = 16384


def supports(call: AttentionCall) -> str | None:
    """Anything small: the mask is `queries x keys`."""
    tokens = max(call.query.shape[1], call.key.shape[1])
    if tokens > _MOST_TOKENS:
        return f"{tokens} tokens need a dense mask; at most {_MOST_TOKENS} are taken"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Any device and floating dtype; computed in float32, or float64 for float64 inputs."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (x.to(dtype) for x in (call.query, call.key, call.value))
    batch, tokens, heads, _ = query.shape
    output, lse = torch.empty_like(query), query.new_empty(batch, heads, tokens)
    masks = [element_mask(call.blocks, head) for head in range(heads)]
    for sample, real in enumerate(call.blocks.grid.real(batch)[:, call.blocks.key_raster]):
        for head in range(heads):
            pool, visible, runs = _pooled(call.blocks, head, real)
            pool = torch.cat([torch.eye(len(real)), pool]).to(query)
            visible = torch.cat([masks[head] & real, visible], 1).to(query.device)
            count = pool.count_nonzero(1)
            keys, values = pool @ key[sample, :, head], pool @ value[sample, :, head]
            logits = call.scale * einsum(query[sample, :, head], keys, "i d, j d -> i j")
            logits = (logits + count.log()).masked_fill(~visible, -torch.inf)
            sums = logits.logsumexp(-1)
            safe = rearrange(sums.masked_fill(sums == -torch.inf, 0), "i -> i 1")
            weights = (logits - safe).exp()
            if call.pv_skip is not None:
                weights[_left_out(call.blocks, head, logits, runs, call.pv_skip)] = 0
            output[sample, :, head] = weights @ values
            lse[sample, head] = sums
    return output.to(call.query.dtype), lse


def element_mask(blocks: BlockIndices, head: int) -> Tensor:
    """The pairs of queries and keys that `blocks` makes `head` see, bool `[queries, keys]`; pooled
    ones apart."""
    tokens = blocks.query_raster[:, None], blocks.key_raster[None, :]
    visible = torch.zeros(torch.broadcast_shapes(*(x.shape for x in tokens)), dtype=torch.bool)
    kept = blocks.patterns[head].pairs(blocks.grid, *tokens) if blocks.patterns else visible
    for row in range(blocks.query_blocks):
        queries = blocks.query_rows(row)[:, None]
        for key_block, tag in blocks.entries(head, row):
            keys = blocks.key_rows(key_block)
            if tag in (WHOLE, PARTIAL):
                visible[queries, keys] = kept[queries, keys] if tag == PARTIAL else True
    return visible


def _left_out(
    blocks: BlockIndices, head: int, logits: Tensor, runs: list[tuple[int, int]], bound: float
) -> Tensor:
    """The pairs whose values are left out, bool as `logits`, `[queries, keys + runs]`."""
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(blocks.query_blocks):
        queries = blocks.query_rows(row)[:, None]
        largest = logits.new_full((len(queries),), -torch.inf)
        for key_block, tag in blocks.entries(head, row):
            keys = blocks.key_rows(key_block)
            if tag > WHOLE:
                own = [number for number, run in enumerate(runs) if run == (key_block, tag)]
                keys = torch.tensor(own, dtype=torch.int64) + len(blocks.key_permutation)
            if not len(keys):
                continue
            inside = logits[queries, keys].amax(1)
            largest = torch.maximum(largest, inside)
            far = (inside - largest < bound) | (inside == -torch.inf)
            left_out[queries, keys] = bool(far.all())
    return left_out


def _pooled(
    blocks: BlockIndices, head: int, real: Tensor
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """The runs of pooled keys that `head` sees: weights `[runs, keys]` that take their means,
    which query sees which run, bool `[queries, runs]`, and the block and tag of each run."""
    weights, visible, place, queries = [], [], {}, len(blocks.permutation)
    for row in range(blocks.query_blocks):
        for key_block, tag in blocks.entries(head, row):
            if tag <= WHOLE:
                continue
            for start, run in enumerate(blocks.key_rows(key_block).split(2**tag)):
                rows = run[real[run]]
                if not len(rows):
                    continue
                if (key_block, tag, start) not in place:
                    place[key_block, tag, start] = len(weights)
                    weights.append(torch.zeros(len(real)))
                    weights[-1][rows] = 1 / len(rows)
                    visible.append(torch.zeros(queries, dtype=torch.bool))
                visible[place[key_block, tag, start]][blocks.query_rows(row)] = True
    if not weights:
        return real.new_zeros(0, len(real)).float(), real.new_zeros(queries, 0), []
    return torch.stack(weights), torch.stack(visible, 1), [run[:2] for run in place]

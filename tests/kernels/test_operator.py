"""Sparse attention as an operator of PyTorch: compiled callers, fake tensors, no gradient."""

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Skip

GRID = TokenGrid(2, 5, 7)


def test_a_compiled_caller_runs_without_a_break(operands):
    blocks = block_indices([Band(11), Skip()], GRID, None, 16, 16)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, lse = sparse_attention(2 * query, key, value, blocks)
        return output + lse.transpose(1, 2)[..., None].exp()

    query, key, value = operands(GRID.tokens, 2)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(query, key, value), attend(query, key, value))


def test_the_operator_is_what_it_says(operands):
    blocks = block_indices([Band(11)], GRID, None, 16, 16)
    operator = torch.ops.dit_sparse.sparse_attention.default
    arguments = (*operands(GRID.tokens, 1), blocks.handle, 0.2, "auto")
    results = torch.library.opcheck(operator, arguments, raise_exception=False)
    assert set(results.values()) == {"SUCCESS"}, results


def test_blocks_that_are_gone_are_named(operands):
    handle = block_indices([Band(11)], GRID).handle
    query, key, value = operands(GRID.tokens, 1)
    with pytest.raises(ValueError, match=f"BlockIndices {handle} is gone; keep it as long"):
        torch.ops.dit_sparse.sparse_attention(query, key, value, handle, 1.0, "auto")


def test_gradients_are_refused(operands):
    query, key, value = operands(GRID.tokens, 1)
    blocks = block_indices([Full()], GRID)
    with pytest.raises(ValueError, match=r"no gradient, and .* call it under torch\.no_grad\(\)"):
        sparse_attention(query.requires_grad_(), key, value, blocks)
    with torch.no_grad():
        sparse_attention(query, key, value, blocks)

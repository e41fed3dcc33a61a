"""What is left out under `pv_skip`, and what it costs, against float64 and against the bound."""

import math

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import native
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, block_indices, from_tags
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import tile
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Skip

GRID = TokenGrid(3, 5, 11, text_after=9, valid_text=(4, 9))
HEADS = [Full(), Band(40), Neighborhood((3, 3, 5)), Skip()]
NAMES = ["reference", "native"]
FACTOR = 40**-0.5


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    query = torch.empty(1, 4, 1, 8)
    call = AttentionCall(query, query, query, block_indices([Full()], TokenGrid(1, 2, 2)), 1.0)
    reason = native.supports(call)
    if request.param == "native" and reason is not None:
        pytest.skip(reason)
    return request.param


def planted() -> tuple[BlockIndices, Tensor, Tensor, Tensor]:
    """One head, blocks of 64; queries look along the first axis. Keys of the middle block lie at
    logit 0 under a first block at 20, and the last block at 10."""
    grid = TokenGrid(3, 8, 8)
    logits = torch.tensor([20.0, 0.0, 10.0]).repeat_interleave(64)
    query, key = torch.zeros(2, 1, grid.tokens, 1, 16)
    query[..., 0] = 4.0
    key[..., 0] = logits[:, None]
    value = torch.randn(1, grid.tokens, 1, 16, generator=torch.Generator().manual_seed(0))
    return block_indices([Full()], grid, block_q=64, block_k=64), query, key, value


def left_out(blocks: BlockIndices, logits: Tensor, bound: float) -> Tensor:
    """Written out for one head without patterns: bool `[tokens, tokens]`."""
    result = torch.zeros_like(logits, dtype=torch.bool)
    for row in range(blocks.query_blocks):
        queries = blocks.query_tokens(row)
        highest = [-math.inf] * len(queries)
        for key_block, _ in blocks.entries(0, row):
            keys = blocks.key_tokens(key_block)
            near = False
            for i, query in enumerate(queries):
                inside = float(logits[query, keys].max())
                highest[i] = max(highest[i], inside)
                near |= inside - highest[i] >= bound
            for query in queries:
                result[query, keys] |= not near
    return result


@pytest.mark.parametrize(
    ("pv_skip", "dropped"),
    [(-5.0, [1, 2]), (-9.9, [1, 2]), (-10.1, [1]), (-19.9, [1]), (-20.1, [])],
)
def test_SP4_a_planted_block_is_left_out(backend: str, pv_skip: float, dropped: list[int]):
    blocks, query, key, value = planted()
    plain, lse = sparse_attention(query, key, value, blocks, backend=backend)
    output, sums = sparse_attention(query, key, value, blocks, pv_skip=pv_skip, backend=backend)
    assert torch.equal(sums, lse)
    weights = key[0, :, 0, 0].double().softmax(0)
    for block in dropped:
        weights[block * 64 : (block + 1) * 64] = 0
    expected = weights @ value[0, :, 0].double()
    assert (output[0, :, 0] - expected).abs().max() <= 1e-6
    # What is left out is a hundred times what rounding hides, for the block at 10.
    assert ((output - plain).abs().max() > 1e-5) == (2 in dropped)


def test_SP4_huge_values_in_a_block_left_out_do_not_show(backend: str):
    blocks, query, key, value = planted()
    value[:, 64:128] = 1e30
    output, _ = sparse_attention(query, key, value, blocks, pv_skip=-15.0, backend=backend)
    assert output.abs().max() < 10
    output, _ = sparse_attention(query, key, value, blocks, pv_skip=-25.0, backend=backend)
    assert output.abs().min() > 1e19


def test_SP4_without_a_bound_nothing_changes(backend: str, operands):
    blocks = block_indices(HEADS, GRID, tile(2, 3, 4), 48, 32)
    query, key, value = operands(GRID.tokens, len(HEADS), spread=3.0)
    plain = sparse_attention(query, key, value, blocks, backend=backend)
    same = sparse_attention(query, key, value, blocks, pv_skip=-math.inf, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pv_skip", [-0.5, -2.0, -6.0])
@pytest.mark.parametrize("block", [16, 100])
def test_SP4_what_is_missing_is_bounded_and_the_sums_stay(
    backend: str, dtype: torch.dtype, pv_skip: float, block: int, operands
):
    """Missing numerator of a query <= (keys it sees) e^pv_skip max|v|, its largest weight 1."""
    blocks = block_indices(HEADS, GRID, tile(2, 3, 4), block, block)
    query, key, value = operands(GRID.tokens, len(HEADS), spread=2.0, dtype=dtype)
    plain, lse = sparse_attention(query, key, value, blocks, backend=backend)
    output, sums = sparse_attention(query, key, value, blocks, pv_skip=pv_skip, backend=backend)
    close = {torch.float32: 2e-5, torch.bfloat16: 5e-4}[dtype]
    torch.testing.assert_close(sums, lse, rtol=1e-6, atol=close)
    logits = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * FACTOR
    seen = torch.stack([pattern.mask(GRID) for pattern in HEADS]).expand_as(logits).clone()
    for sample, valid in enumerate(GRID.valid_text or ()):
        seen[sample, :, :, GRID.invalid_text(valid)] = False
    largest = logits.masked_fill(~seen, -math.inf).amax(-1)
    numerator = (output - plain).double().abs().amax(-1).transpose(1, 2)
    numerator = (numerator * (lse - largest).exp()).masked_fill(~seen.any(-1), 0)
    rounding = {torch.float32: 1e-4, torch.bfloat16: 1.0}[dtype]
    bound = seen.sum(-1) * math.exp(pv_skip) * value.double().abs().max() + rounding
    assert (numerator <= bound).all()
    if pv_skip == -0.5 and block == 16:
        assert (output - plain).abs().max() > 0.05, "something is left out"


@pytest.mark.parametrize("pv_skip", [-0.5, -3.0])
def test_SP4_the_definition(backend: str, pv_skip: float, operands):
    """Blocks of at most 64 tokens are what the native backend takes at a time, too."""
    grid = TokenGrid(3, 5, 11)
    order = tile(2, 3, 4)
    rows, columns = (len(order.offsets(grid, size)) - 1 for size in (64, 16))
    tags = torch.zeros(1, rows, columns, dtype=torch.int8)
    tags[:, 1:3, ::3] = -2
    blocks = from_tags(tags, grid, order, 64, 16)
    query, key, value = operands(grid.tokens, 1)
    query[..., 0] = 6.0
    level = torch.rand(columns, generator=torch.Generator().manual_seed(3)) * 12
    for column in range(columns):
        key[:, blocks.key_tokens(column), 0, 0] = level[column]
    logits = torch.einsum("bihd,bjhd->bij", query.double(), key.double()) * FACTOR
    seen = torch.zeros_like(logits[0], dtype=torch.bool)
    for row in range(blocks.query_blocks):
        for key_block, _ in blocks.entries(0, row):
            seen[blocks.query_tokens(row)[:, None], blocks.key_tokens(key_block)] = True
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
    for sample in range(len(weights)):
        dropped = left_out(blocks, logits[sample], pv_skip)
        assert dropped[seen].any()
        weights[sample, dropped] = 0
    expected = torch.einsum("bij,bjd->bid", weights, value[:, :, 0].double())
    output, _ = sparse_attention(query, key, value, blocks, pv_skip=pv_skip, backend=backend)
    assert (output[:, :, 0] - expected).norm() / expected.norm() <= 2e-6


def test_SP4_pooled_blocks_are_left_out_as_well(backend: str):
    blocks, query, key, value = planted()
    tags = torch.tensor([[0, 3, 2]] * 3, dtype=torch.int8)[None]
    pooled = from_tags(tags, blocks.grid, None, 64, 64)
    value[:, 64:128] = 1e30
    output, _ = sparse_attention(query, key, value, pooled, pv_skip=-15.0, backend=backend)
    assert output.abs().max() < 10


def test_backends_that_cannot_say_so():
    blocks, query, key, value = planted()
    with pytest.raises(ValueError, match=r"gather.*leaves no values out, as pv_skip asks"):
        sparse_attention(query, key, value, blocks, pv_skip=-1.0, backend="gather")


@pytest.mark.parametrize("pv_skip", [0.0, 3.0, math.nan])
def test_a_bound_that_is_not_negative_is_refused(pv_skip: float):
    blocks, query, key, value = planted()
    message = f"pv_skip must be negative, got {pv_skip}; None leaves nothing out"
    with pytest.raises(ValueError, match=message):
        sparse_attention(query, key, value, blocks, pv_skip=pv_skip)

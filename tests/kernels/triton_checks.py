"""What the Triton kernels compute, against attention written out in float64.

Run by test_triton.py: under Triton's interpreter in a process of its own, which must know of it
before it imports the kernels, and on a GPU if there is one. Blocks are small: the interpreter
takes milliseconds for a tile.
"""

import math
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import target
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import (
    BlockIndices,
    block_indices,
    from_block_mask,
    from_cuts,
    from_tags,
)
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.counts import cut
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major, raster, tile
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Columns,
    Full,
    Neighborhood,
    Radial,
    Sink,
    Skip,
)
from dit_sparse.kernels.shard import Shard
from dit_sparse.kernels.target import Tiles
from tests.kernels.shards import GRID as SHARDED
from tests.kernels.shards import HALF, RANK, every_shard

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 4e-3}
LSE = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
GRID = TokenGrid(2, 5, 6, text_after=7)
BOXES = [Neighborhood((2, 3, 3)), Full(), Skip(), Neighborhood((2, 2, 3), (1, 1, 2), (1, 2, 2))]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Fresh memory holds NaN, so that what is not written shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, make=make, **k: _poison(make(*a, **k)))
    make_new = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: _poison(make_new(*a, **k)))


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def draw(grid: TokenGrid, heads: int, head_dim: int, dtype: torch.dtype, batch: int = 2):
    generator = torch.Generator().manual_seed(head_dim)
    shape = 3, batch, grid.tokens, heads, head_dim
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).unbind()


def check(blocks: BlockIndices, head_dim: int, dtype: torch.dtype, batch: int = 2, **options):
    query, key, value = draw(blocks.grid, blocks.heads, head_dim, dtype, batch)
    query = query[:, blocks.query_raster].contiguous()
    key, value = (x[:, blocks.key_raster].contiguous() for x in (key, value))
    check_on(query, key, value, blocks, **options)


def check_on(query: Tensor, key: Tensor, value: Tensor, blocks: BlockIndices, **options):
    double: list[Tensor] = [x.cpu().double() for x in (query, key, value)]
    expected, sums = sparse_attention(
        double[0], double[1], double[2], blocks, backend="reference", **options
    )
    output, lse = sparse_attention(query, key, value, blocks, backend="triton", **options)
    assert output.dtype == query.dtype
    assert output.shape == query.shape
    assert lse.dtype == torch.float32
    output, lse = output.cpu().double(), lse.cpu().double()
    assert not output.isnan().any()
    error = (output - expected).norm() / expected.norm().clamp_min(1e-12)
    assert error <= RELATIVE[query.dtype], f"relative error {error:.1e}"
    seen = sums.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    assert not output.transpose(1, 2)[~seen].any()
    assert (lse[seen] - sums[seen]).abs().max() <= LSE[query.dtype]


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (40, torch.float32),
        (64, torch.bfloat16),
        (72, torch.float16),
        (88, torch.bfloat16),
        (64, torch.float32),
    ],
)
def test_head_dims_and_dtypes(head_dim: int, dtype: torch.dtype):
    blocks = block_indices([BOXES[0], Full()], GRID, tile(2, 3, 4), 32, 32)
    check(blocks, head_dim, dtype, batch=1)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 64), (64, 16), (7, 40)])
def test_boxes_of_many_heads_in_blocks_of_two_sizes(block_q: int, block_k: int):
    check(block_indices(BOXES, GRID, tile(3, 3, 3), block_q, block_k), 32, torch.float32, 1)


@pytest.mark.parametrize("order", [pixel_major(), tile(2, 3, 4)], ids=str)
def test_bands_columns_and_boxes_in_one_launch(order):
    grid = TokenGrid(2, 5, 6, text_before=5, text_after=3)
    heads = [Band(11), Columns((1, 3), 16, (2, 5, 6)), BOXES[0], Band(4, "pixel_major")]
    check(block_indices(heads, grid, order, 32, 32), 32, torch.float32, 1)


@pytest.mark.parametrize(("block_q", "block_k"), [(16, 24), (100, 32)])
@pytest.mark.parametrize(("tile_q", "tile_k"), [(128, 128), (32, 16)])
def test_patterns_without_windows_are_bits(
    block_q: int, block_k: int, tile_q: int, tile_k: int, monkeypatch: pytest.MonkeyPatch
):
    sizes = Tiles(min(tile_q, 1 << (block_q - 1).bit_length()), tile_k, 4, 2, False)
    monkeypatch.setattr("dit_sparse.kernels.launch_triton.tiles", lambda *_: sizes)
    grid = TokenGrid(3, 5, 8, text_after=5)
    heads = [Radial(), BOXES[0], AnyOf((Band(3, "pixel_major"), Sink(1))), Band(11)]
    order = tile(3, 3, 4) if block_k == 32 else raster()
    check(block_indices(heads, grid, order, block_q, block_k), 40, torch.float32, 1)


def test_windows_too_wide_for_words_are_intervals():
    grid = TokenGrid(2, 3, 40)
    heads = [Neighborhood((2, 3, 9)), Neighborhood((1, 3, 8), (1, 1, 4), (1, 1, 2))]
    check(block_indices(heads, grid, raster(), 64, 64), 32, torch.float32, 1)


@pytest.mark.parametrize(
    ("side", "order"), [("text_before", raster()), ("text_after", tile(2, 2, 3))], ids=str
)
def test_padded_text_is_unseen(side: str, order):
    grid = replace(TokenGrid(2, 3, 5), **{side: 20}, valid_text=(17, 0, 20))
    query, key, value = draw(grid, 2, 32, torch.float32, 3)
    for sample, valid in enumerate(grid.valid_text or ()):
        key[sample, grid.invalid_text(valid)] = 1e4
        value[sample, grid.invalid_text(valid)] = 1e4
    blocks = block_indices([Neighborhood((1, 3, 3)), Full()], grid, order, 16, 16)
    check_on(query, key, value, blocks)


@pytest.mark.parametrize(
    ("descriptors", "permuted"),
    [(True, True), (False, False)],
    ids=["descriptors, tile order", "pointers, raster"],
)
def test_listed_blocks_and_empty_rows(
    descriptors: bool, permuted: bool, monkeypatch: pytest.MonkeyPatch
):
    if DEVICE == "cuda" and descriptors and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("descriptors need compute capability 9.0")
    sizes = Tiles(32, 32, 4, 2, descriptors)
    monkeypatch.setattr("dit_sparse.kernels.launch_triton.tiles", lambda *_: sizes)
    order = tile(2, 3, 4) if permuted else raster()
    rows, columns = (len(order.offsets(GRID, block)) - 1 for block in (48, 80))
    mask = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 1] = False
    check(from_block_mask(mask, GRID, order, 48, 80), 40, torch.float16, 2)


@pytest.mark.parametrize(
    ("block", "levels", "valid_text"), [(16, 4, None), (16, 4, (5, 0)), (64, 6, None)]
)
def test_pooled_keys(block: int, levels: int, valid_text: tuple[int, int] | None):
    grid, order = replace(GRID, valid_text=valid_text), tile(2, 5, 6)
    rows, columns = (len(order.offsets(grid, size)) - 1 for size in (32, block))
    generator = torch.Generator().manual_seed(2)
    tags = torch.randint(-2, levels, (2, rows, columns), generator=generator, dtype=torch.int8)
    tags[tags == -1] = -2
    tags[1, 0] = -2
    check(from_tags(tags, grid, order, 32, block), 40, torch.float32)


@pytest.mark.parametrize("valid_text", [None, (5, 0)])
def test_queries_and_keys_in_orders_of_their_own(valid_text: tuple[int, int] | None):
    grid = replace(GRID, valid_text=valid_text)
    sides = cut(grid, tile(2, 3, 4), 16), cut(grid, pixel_major(), 24)
    shape = 2, *(len(side.offsets) - 1 for side in sides)
    tags = torch.randint(-2, 4, shape, generator=torch.Generator().manual_seed(3)).to(torch.int8)
    tags[tags == -1] = -2
    check(from_cuts(tags, grid, sides, (16, 24)), 40, torch.float32)


@every_shard
def test_shards_of_queries_and_keys(queries: Shard | None, keys: Shard | None):
    """Words, intervals, whole tiles and empty rows; the reference is tested by itself."""
    patterns = [Neighborhood((2, 3, 3)), Band(11), Full(), Skip()]
    blocks = block_indices(patterns, SHARDED, tile(2, 3, 4), 32, 16, queries=queries, keys=keys)
    check(blocks, 32, torch.float32, 1)


@pytest.mark.parametrize("queries", [None, RANK])
def test_shards_in_raster_order_and_half_precision(queries: Shard | None):
    patterns = [Neighborhood((2, 3, 3)), Band(11)]
    blocks = block_indices(patterns, SHARDED, raster(), 32, 64, queries=queries, keys=HALF)
    check(blocks, 40, torch.bfloat16, 1)


@pytest.mark.parametrize("queries", [None, RANK])
def test_padded_text_and_pooled_keys_of_shards(queries: Shard | None):
    grid = replace(SHARDED, text_before=0, text_after=13, valid_text=(5, 0))
    patterns = [Neighborhood((2, 3, 3)), Band(11)]
    blocks = block_indices(patterns, grid, tile(2, 3, 4), 32, 24, 2, queries=queries, keys=HALF)
    check(blocks, 40, torch.float32)


def test_mass_of_shards():
    from dit_sparse.kernels.mass import _plain
    from dit_sparse.kernels.mass_triton import block_mass

    grid = replace(SHARDED, text_before=0, text_after=13, valid_text=(5, 0))
    blocks = block_indices([Full()] * 2, grid, tile(2, 3, 4), 32, 24, queries=RANK, keys=HALF)
    query, key, _ = draw(grid, 2, 40, torch.float32)
    query, key = query[:, blocks.query_raster], key[:, blocks.key_raster]
    call = AttentionCall(query, key, key, blocks, 0.2)
    lse = torch.zeros(2, 2, query.shape[1], device=DEVICE)
    found, expected = block_mass(call, lse, 16), _plain(call, lse, 16)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("pv_skip", [-0.5, -2.0, -torch.inf])
def test_SP4_values_are_left_out(pv_skip: float):
    # Where a block is a tile and all are whole, tiles are visited as the reference visits blocks.
    blocks = block_indices([Full(), Skip()], GRID, tile(2, 3, 4), 32, 16)
    query, key, value = draw(GRID, 2, 32, torch.float32, 1)
    check_on(4 * query, key, value, blocks, pv_skip=pv_skip)


def test_SP4_masked_and_pooled_tiles_are_left_out():
    """They are visited in another order than the reference's, within the same bound."""
    grid = TokenGrid(1, 8, 8)
    tags = torch.tensor([[[0, 3, 2, 0]] * 4]).to(torch.int8)
    for blocks in (
        block_indices([Band(25)], grid, raster(), 16, 16),
        block_indices([Neighborhood((1, 5, 5))], grid, tile(1, 4, 4), 16, 16),
        from_tags(tags, grid, raster(), 16, 16),
    ):
        query, key, value = draw(grid, 1, 16, torch.float32, 1)
        query[..., 0] = 8.0
        for block, level in enumerate((4.0, 0.0, 3.0, 1.0)):
            key[:, blocks.key_tokens(block), :, 0] = level
        plain, lse = sparse_attention(query, key, value, blocks, backend="triton")
        output, sums = sparse_attention(query, key, value, blocks, pv_skip=-1.0, backend="triton")
        torch.testing.assert_close(sums, lse)
        missing = (output - plain).abs().max()
        assert 1e-5 < missing <= grid.tokens * math.exp(-1) * value.abs().max()


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.2])
def test_any_scale_and_strides(scale: float):
    blocks = block_indices([BOXES[0]] * 2, GRID, tile(2, 3, 4), 32, 32)
    query, key, value = draw(GRID, 2, 32, torch.float32, 1)
    query = query.transpose(1, 3).contiguous().transpose(1, 3)
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    value = value.expand_as(value)[..., torch.arange(32)]
    check_on(query, key, value, blocks, scale=scale)


def test_unaligned_rows_are_copied():
    blocks = block_indices([Full()], GRID, raster(), 64, 64)
    query, key, value = (x[..., 3:36] for x in draw(GRID, 1, 40, torch.float16, 1))
    check_on(query, key, value, blocks)


@pytest.mark.parametrize(
    ("rows", "valid_text"), [(None, None), (16, None), (5, (3, 7))], ids=["all", "16", "5, text"]
)
def test_block_mass_is_exact(rows: int | None, valid_text: tuple[int, int] | None):
    from dit_sparse.kernels.mass_triton import block_mass
    from dit_sparse.kernels.sample import sampled_rows

    grid = replace(GRID, valid_text=valid_text)
    blocks = block_indices([Full()] * 2, grid, tile(3, 5, 6), 80, 24)
    query, key, value = draw(grid, 2, 40, torch.float32)
    _, lse = sparse_attention(query, key, value, blocks, backend="triton")
    mass = block_mass(AttentionCall(query, key, value, blocks, 0.2), lse, rows).cpu()
    scores = torch.einsum("bihd,bjhd->bhij", query.cpu().double(), key.cpu().double()) * 0.2
    shares = (scores - lse.cpu().double()[..., None]).exp()
    for sample, valid in enumerate(valid_text or ()):
        shares[sample, :, :, grid.invalid_text(valid)] = 0
    order, cuts = blocks.permutation, blocks.key_offsets[1:-1]
    shares = shares[..., order]
    for index in range(blocks.query_blocks):
        taken = blocks.query_tokens(index)
        if rows is not None:
            picked = sampled_rows(blocks.query_offsets, rows)[index]
            taken = order[picked[picked >= 0]]
        columns = shares[:, :, taken].sum(2).tensor_split(cuts, -1)
        expected = torch.stack([part.sum(-1) for part in columns], -1)
        torch.testing.assert_close(mass[:, :, index].double(), expected, rtol=2e-5, atol=1e-5)


def test_a_row_that_saw_nothing_has_no_mass():
    from dit_sparse.kernels.mass_triton import block_mass

    blocks = block_indices([Skip()], GRID, raster(), 64, 64)
    query, key, value = draw(GRID, 1, 32, torch.float32, 1)
    _, lse = sparse_attention(query, key, value, blocks, backend="triton")
    assert not block_mass(AttentionCall(query, key, value, blocks, 1.0), lse).any()


def test_the_interpreter_is_named():
    if DEVICE == "cpu":
        assert target.target_of(torch.device("cpu")) == target.Target("interpreter")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_all_blocks_are_dense_attention_of_pytorch():
    grid = TokenGrid(8, 16, 16, text_after=77)
    query, key, value = draw(grid, 4, 128, torch.bfloat16)
    blocks = block_indices([Full()] * 4, grid, tile(4, 4, 8))
    output, _ = sparse_attention(query, key, value, blocks, backend="triton")
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(output, dense, atol=2e-2, rtol=2e-2)

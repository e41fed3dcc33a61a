"""Tiles that windows settle: against every pair, and none settled less than boxes allow."""

import pytest
import torch

from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster, tile
from dit_sparse.kernels.pattern import Band, Neighborhood, Pattern
from dit_sparse.kernels.tile_bounds import tile_bounds
from dit_sparse.kernels.tiling import Tiling, tiling
from dit_sparse.kernels.worklist import worklist

GRID = TokenGrid(3, 5, 9)
BOX = Neighborhood((2, 3, 5))


def settled(
    pattern: Pattern, blocks: BlockIndices, queries: Tiling, keys: Tiling
) -> tuple[torch.Tensor, ...]:
    """Whole and empty by the bounds and by looking at every pair, `[query tiles, key tiles]`."""
    windows = pattern.windows(blocks.grid)
    assert windows is not None
    own = windows.of(blocks.query_sequence, blocks.key_sequence)
    bounds = tile_bounds(own, queries, keys)
    pairs = pattern.mask(blocks.grid)[blocks.query_sequence][:, blocks.key_sequence]
    kept = torch.stack(
        [
            torch.stack(
                [part.float().mean() for part in rows.split(keys.count.tolist(), 1)]
            )
            for rows in pairs.split(queries.count.tolist())
        ]
    )  # fmt: skip
    every = torch.meshgrid(torch.arange(len(queries)), torch.arange(len(keys)), indexing="ij")
    return bounds.whole(*every), bounds.empty(*every), kept == 1, kept == 0


@pytest.mark.parametrize("order", [raster(), tile(2, 2, 4), tile(1, 3, 4)], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        BOX,
        Neighborhood((3, 4, 3), (1, 2, 3)),
        Neighborhood((3, 2, 3), dilation=(1, 2, 3)),
        Band(9),
    ],
    ids=str,
)
def test_what_is_settled_is_so(pattern: Pattern, order: TokenOrder):
    blocks = block_indices([pattern], GRID, order, 16, 16)
    for sizes in ((16, 16), (4, 8), (1, 3), (1, 1)):
        tilings = tiling(blocks.query_offsets, sizes[0]), tiling(blocks.key_offsets, sizes[1])
        whole, empty, all_kept, none_kept = settled(pattern, blocks, *tilings)
        assert not (whole & ~all_kept).any()
        assert not (empty & ~none_kept).any()
        if sizes == (1, 1):
            assert torch.equal(whole, all_kept)
            assert torch.equal(empty, none_kept)


def test_boxes_in_tiles_that_are_boxes_are_settled_whenever_they_can_be():
    grid = TokenGrid(4, 6, 8)
    blocks = block_indices([BOX], grid, tile(2, 3, 4), 24, 24)
    tilings = tiling(blocks.query_offsets, 24), tiling(blocks.key_offsets, 12)
    whole, empty, all_kept, none_kept = settled(BOX, blocks, *tilings)
    assert torch.equal(empty, none_kept)
    assert torch.equal(whole, all_kept)
    wide = Neighborhood((4, 6, 7))
    whole, _, all_kept, _ = settled(wide, blocks, *tilings)
    assert torch.equal(whole, all_kept)
    assert whole.any()


def test_a_worklist_leaves_out_what_is_settled():
    grid = TokenGrid(4, 8, 8)
    heads = [Neighborhood((2, 3, 3)), Neighborhood((2, 8, 7))]
    blocks = block_indices(heads, grid, tile(4, 4, 4), 64, 64)
    # Of 1 x 4 x 4 tokens, so that the bounds decide.
    tiles = tiling(blocks.query_offsets, 16), tiling(blocks.key_offsets, 16)
    bounds = worklist(blocks, 16, 16, torch.device("cpu")).lists.bounds
    listed = bounds.diff().view(len(heads), -1, 4).sum(1).tolist()
    for pattern, (whole, masked, *others) in zip(heads, listed, strict=True):
        _, _, all_kept, none_kept = settled(pattern, blocks, *tiles)
        assert whole == all_kept.sum()
        assert masked == (~all_kept & ~none_kept).sum()
        assert others == [0, 0]
    assert listed[1][0] > 0

import pytest
import torch

from dit_sparse.kernels.blocks import BlockIndices, block_indices, from_block_mask
from dit_sparse.kernels.cover import Prices, covers, visible
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Skip
from dit_sparse.kernels.reference import element_mask

GRID = TokenGrid(3, 8, 8, text_after=20)
RANDOM = torch.rand(2, 14, 8, generator=torch.Generator().manual_seed(0)) < 0.4
CASES = {
    "mixed": block_indices([Full(), Band(20), Skip(), Full()], GRID, None, 16, 32),
    "neighborhood": block_indices([Neighborhood((3, 5, 5))] * 2, GRID, None, 16, 32),
    "columns": block_indices([Columns((0, 5), 32, (3, 8, 8))], GRID, None, 16, 32),
    "block mask": from_block_mask(RANDOM[:, :, :7], GRID, block_q=16, block_k=32),
}


@pytest.mark.parametrize("blocks", CASES.values(), ids=CASES)
@pytest.mark.parametrize("narrow", [0, 60, 1e6], ids=["alone", "joined", "one row"])
@pytest.mark.parametrize("valid", [None, 0, 7])
def test_each_pair_is_covered_once_and_no_other(
    blocks: BlockIndices, narrow: float, valid: int | None
):
    seen_heads = []
    for cover in covers(blocks, Prices(narrow, 0.5, launch=0), valid):
        pairs = torch.zeros(GRID.tokens, GRID.tokens, dtype=torch.int32)
        for rectangle in cover.rectangles:
            queries = slice(rectangle.first, rectangle.last)
            for first, last in rectangle.whole:
                pairs[queries, first:last] += 1
            if rectangle.masked:
                keys = torch.cat([torch.arange(*run) for run in rectangle.masked])
                pairs[queries, keys] += visible(blocks, cover.heads[0], rectangle)
        for head in cover.heads:
            seen_heads.append(head)
            expected = element_mask(blocks, head)
            if valid is not None:
                expected[:, GRID.invalid_text(valid)] = False
            expected = expected[blocks.permutation][:, blocks.permutation]
            assert torch.equal(pairs, expected.to(torch.int32))
    assert sorted(seen_heads) == list(range(blocks.heads))


def test_rows_that_see_the_same_keys_are_one_rectangle():
    grid = TokenGrid(3, 8, 8)
    blocks = block_indices([Columns((0, 5), 32, grid.shape)], grid, None, 16, 32)
    (cover,) = covers(blocks, Prices(narrow=60, masked=0.5))
    (rectangle,) = cover.rectangles
    assert (rectangle.first, rectangle.last) == (0, 192)
    assert rectangle.whole == ((0, 32), (160, 192))
    assert not rectangle.masked


def test_rows_that_share_nothing_stay_apart():
    mask = torch.eye(8, dtype=torch.bool)[None]
    blocks = from_block_mask(mask, TokenGrid(1, 32, 32), block_q=128, block_k=128)
    (cover,) = covers(blocks, Prices(narrow=60, masked=0.5))
    assert len(cover.rectangles) == 8


def test_heads_with_one_pattern_share_one_cover():
    heads = [cover.heads for cover in covers(CASES["mixed"], Prices(60, 0.5))]
    assert heads == [(0, 3), (1,), (2,)]

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, gilbert, pixel_major, raster, tile

ORDERS = [raster(), pixel_major(), gilbert(), tile(1, 8, 8), tile(4, 4, 4), tile(2, 3, 5)]
GRIDS = [
    TokenGrid(2, 5, 7, text_after=3),
    TokenGrid(3, 45, 80, text_before=5),
    TokenGrid(1, 6, 85),
    TokenGrid(5, 4, 4, text_before=130, text_after=1),
]

sizes = st.integers(1, 9)
orders = st.one_of(
    st.sampled_from([raster(), pixel_major(), gilbert()]), st.builds(tile, sizes, sizes, sizes)
)
grids = st.builds(TokenGrid, sizes, sizes, sizes, st.integers(0, 9), st.integers(0, 9))


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("block", [16, 64, 128])
def test_G4_permutations_and_blocks_on_ragged_grids(
    grid: TokenGrid, order: TokenOrder, block: int
):
    check_order(grid, order, block)


@settings(max_examples=40, deadline=None)
@given(grid=grids, order=orders, block=st.integers(1, 40))
def test_G4_permutations_and_blocks_on_any_grid(grid: TokenGrid, order: TokenOrder, block: int):
    check_order(grid, order, block)


def check_order(grid: TokenGrid, order: TokenOrder, block: int):
    permutation, offsets = order.permutation(grid), order.offsets(grid, block)
    assert torch.equal(permutation.sort().values, torch.arange(grid.tokens))
    assert torch.equal(permutation[permutation.argsort()], torch.arange(grid.tokens))
    sizes = offsets.diff()
    assert offsets[0] == 0
    assert offsets[-1] == grid.tokens
    assert sizes.min() >= 1
    assert sizes.max() <= block
    frame, row, column = (axis.tolist() for axis in grid.coordinates(permutation))
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert len({frame[i] < 0 for i in range(first, last)}) == 1, "text and video in one block"
        if order.tile is not None and frame[first] >= 0:
            t, h, w = order.tile
            tiles = {(frame[i] // t, row[i] // h, column[i] // w) for i in range(first, last)}
            assert len(tiles) == 1, "two tiles in one block"


def test_text_keeps_its_place():
    grid = TokenGrid(2, 3, 3, text_before=2, text_after=1)
    for order in ORDERS:
        permutation = order.permutation(grid).tolist()
        assert permutation[:2] == [0, 1]
        assert permutation[-1] == grid.tokens - 1


def test_pixel_major_puts_the_frames_of_a_pixel_side_by_side():
    assert pixel_major().permutation(TokenGrid(3, 1, 2)).tolist() == [0, 2, 4, 1, 3, 5]


@settings(max_examples=60, deadline=None)
@given(frames=sizes, height=sizes, width=st.integers(1, 20))
def test_gilbert_steps_from_neighbor_to_neighbor(frames: int, height: int, width: int):
    check_steps(TokenGrid(frames, height, width))


@pytest.mark.parametrize("shape", [(21, 45, 80), (13, 30, 45), (31, 45, 81), (2, 45, 81)])
def test_gilbert_steps_from_neighbor_to_neighbor_on_real_grids(shape: tuple[int, int, int]):
    check_steps(TokenGrid(*shape))


def check_steps(grid: TokenGrid):
    """No step is diagonal, whatever the sizes."""
    places = torch.stack(grid.coordinates(gilbert().permutation(grid)))
    assert (places.diff().abs().sum(0) == 1).all()


def test_gilbert_keeps_blocks_compact():
    grid = TokenGrid(21, 45, 80)
    places = torch.stack(grid.coordinates(gilbert().permutation(grid)))
    extents = [block.amax(1) - block.amin(1) + 1 for block in places.split(128, 1)]
    assert torch.stack(extents).double().mean(0).max() < 7, "128 tokens are a cube of 5"


def test_tiles_follow_one_another_and_shrink_at_the_border():
    grid = TokenGrid(1, 3, 3)
    assert tile(1, 2, 2).permutation(grid).tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 8]
    assert tile(1, 2, 2).offsets(grid, 4).tolist() == [0, 4, 6, 8, 9]
    assert tile(1, 2, 2).offsets(grid, 3).tolist() == [0, 3, 4, 6, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral",), "order must be raster, pixel_major, tile or gilbert, got 'spiral'"),
        (("tile",), "order tile came with tile=None"),
        (("gilbert", (1, 2, 2)), "order gilbert came with tile=(1, 2, 2)"),
        (("raster", (1, 2, 2)), "order raster came with tile=(1, 2, 2)"),
        (("tile", (0, 2, 2)), "three counts of at least 1, got (0, 2, 2)"),
    ],
)
def test_wrong_orders_are_named(arguments: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenOrder(*arguments)


def test_empty_blocks_are_refused():
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        raster().offsets(GRIDS[0], 0)

from typing import Any

import pytest
import torch

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major
from dit_sparse.kernels.pattern import Band

GRIDS = [
    TokenGrid(3, 4, 5),
    TokenGrid(3, 4, 5, text_before=4),
    TokenGrid(3, 4, 5, text_before=1, text_after=3),
]


@pytest.mark.parametrize("density", [0.05, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("order", ["raster", "pixel_major"])
def test_SG1_band_density(density: float, order: Any):
    grid = TokenGrid(10, 10, 10)
    band = Band.of_density(density, grid, order)
    assert abs(band.mask(grid).double().mean().item() - density) < 2 / 1000


def test_SG1_golden():
    band = Band.of_density(0.25, TokenGrid(10, 10, 10))
    assert band == Band(134)
    assert int(band.mask(TokenGrid(10, 10, 10)).sum()) == 250_910


@pytest.mark.parametrize("half_width", [0, 3, 19])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_RE4_the_window_of_a_frame_is_repeated_in_all_frames(grid: TokenGrid, half_width: int):
    frame = grid.height * grid.width
    expected = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    for q in range(grid.video):
        for k in range(grid.video):
            first = max(q % frame - half_width, 0)
            last = min(q % frame + half_width, frame - 1)
            expected[grid.text_before + q, grid.text_before + k] = first <= k % frame <= last
    assert torch.equal(Band(half_width, "in_frame").mask(grid), expected)


def test_RE4_goldens():
    grid = TokenGrid(13, 30, 45, text_before=226)
    band = Band.retention(0.03125, grid)
    assert band == Band(21, "in_frame")
    frame = TokenGrid(1, 30, 45)
    assert band.mask(frame).double().mean().item() == pytest.approx(0.031598, abs=1e-6)
    assert Band.retention(0.03125, frame).mask(frame).equal(Band(21).mask(frame))
    blocks = block_indices([band], grid)
    assert blocks.density().element == pytest.approx(0.056066, abs=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("half_width", [0, 2, 3, 59])
def test_SV2_multi_diagonal_is_a_band_of_pixel_major_order(grid: TokenGrid, half_width: int):
    position = pixel_major().permutation(grid).argsort()
    video = (position >= grid.text_before) & (position < grid.text_before + grid.video)
    near = (position[:, None] - position[None, :]).abs() <= half_width
    expected = near | ~video[:, None] | ~video[None, :]
    assert torch.equal(Band(half_width, "pixel_major").mask(grid), expected)


def test_SV2_a_band_of_all_frames_contains_the_same_pixel_in_all_of_them():
    grid = TokenGrid(4, 3, 5)
    mask = Band(grid.frames - 1, "pixel_major").mask(grid)
    pixel = torch.arange(grid.video) % (grid.height * grid.width)
    assert mask[pixel[:, None] == pixel[None, :]].all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_SG3_permuted_attended_to_and_put_back_is_the_mask_in_raster_order(
    grid: TokenGrid, backend: str, operands, masked_attention
):
    query, key, value = operands(grid.tokens, 2, 16)
    band = Band(7, "pixel_major")
    expected, true_lse = masked_attention(query, key, value, band.mask(grid))
    place = pixel_major().permutation(grid)
    diagonal = block_indices([Band(7)] * 2, grid, block_q=16, block_k=16)
    q, k, v = (x[:, place].contiguous() for x in (query, key, value))
    permuted = sparse_attention(q, k, v, diagonal, backend=backend)
    back = place.argsort()
    blocks = block_indices([band] * 2, grid, block_q=16, block_k=16)
    came = sparse_attention(query, key, value, blocks, backend=backend)
    for output, lse in ((permuted[0][:, back], permuted[1][:, :, back]), came):
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)

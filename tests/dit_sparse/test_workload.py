"""Workloads: the tokens, patterns and densities that are asked for."""

import pytest
import torch

from dit_sparse.kernels.blocks import WHOLE
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.workload import PATTERNS, PRESETS, Workload, grid_of_tokens, window_of

GRID = TokenGrid(4, 8, 8)


def test_presets_have_the_tokens_of_the_models() -> None:
    assert {name: preset.grid.tokens for name, preset in PRESETS.items()} == {
        "wan-1.3b-480p": 32760,
        "wan-14b-720p": 75600,
        "hunyuanvideo-720p": 119056,
        "cogvideox": 17776,
        "flux-4k": 66048,
    }


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(8192, (16, 16, 32)), (1, (1, 1, 1)), (7, (1, 1, 7)), (1000, (10, 10, 10))],
)
def test_tokens_are_taken_exactly(tokens: int, shape: tuple[int, int, int]) -> None:
    assert grid_of_tokens(tokens).shape == shape
    with pytest.raises(ValueError, match="tokens must be at least 1, got 0"):
        grid_of_tokens(0)


@pytest.mark.parametrize("density", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize(
    "grid", [TokenGrid(16, 16, 32), TokenGrid(1, 64, 64), TokenGrid(21, 30, 52)]
)
def test_a_window_keeps_about_the_density(density: float, grid: TokenGrid) -> None:
    window = window_of(density, grid)
    share = window[0] * window[1] * window[2] / grid.video
    assert share == pytest.approx(density, rel=0.1)


def test_random_blocks_are_whole_and_as_many_as_asked() -> None:
    blocks = Workload(GRID, heads=3, block=16, density=0.25).blocks()
    assert blocks.density().block == 0.25
    assert (blocks.tag == WHOLE).all()
    assert set(blocks.row_pointer.diff().tolist()) == {4}
    first = Workload(GRID, block=16, density=0.001).blocks()
    assert set(first.row_pointer.diff().tolist()) == {1}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_has_a_dense_form_and_grows_to_it(pattern: str) -> None:
    workload = Workload(GRID, block=16, pattern=pattern, density=0.1)
    sparse, dense = workload.blocks().density(), workload.dense().blocks().density()
    assert sparse.element <= sparse.weighted < 1
    assert dense.element == dense.block == 1


def test_pooled_workloads_see_all_other_blocks_as_means_of_eight() -> None:
    blocks = Workload(GRID, heads=3, block=16, pattern="pooled", density=0.25).blocks()
    assert blocks.density().block == 1
    assert blocks.density().weighted == 0.25 + 0.75 / 8
    whole = Workload(GRID, heads=3, block=16, density=0.25).blocks()
    assert torch.equal(blocks.key_block[blocks.tag == WHOLE], whole.key_block)


def test_neighborhoods_stand_in_tiles_that_fill_a_block() -> None:
    for block, tile in ((128, "4x4x8"), (64, "4x4x4"), (16, "2x2x4"), (12, "1x2x6"), (7, "1x1x7")):
        blocks = Workload(TokenGrid(8, 8, 8), block=block, pattern="neighborhood").blocks()
        assert str(blocks.order) == f"tile {tile}"
        assert int(blocks.query_offsets.diff().max()) == block


def test_operands_are_drawn_anew_the_same() -> None:
    workload = Workload(GRID, heads=2, head_dim=8, dtype="bfloat16")
    call, again = workload.call(), workload.call()
    assert call.query.shape == (1, 256, 2, 8)
    assert call.query.dtype == torch.bfloat16
    assert torch.equal(call.value, again.value)
    assert not torch.equal(call.query, call.key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"block": 0}, "block must be at least 1, got 0"),
        (
            {"pattern": "spiral"},
            "pattern must be one of blocks, neighborhood, band, pooled, got 'spiral'",
        ),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"device": "warp"}, "device 'warp' is unknown"),
    ],
)
def test_what_cannot_be_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(GRID, **change)

import json
import re
from typing import Any

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major, raster
from dit_sparse.kernels.pattern import (
    PATTERNS,
    AnyOf,
    Band,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    Skip,
    pattern_from_dict,
    pattern_to_dict,
)
from dit_sparse.kernels.windows import MOST_AXES

SAMPLES: list[Pattern] = [
    Full(),
    Skip(),
    Band(7),
    Band(2, "pixel_major"),
    Columns((0, 3), 8, (3, 4, 5)),
    Neighborhood((3, 3, 3)),
    Neighborhood((2, 4, 5), stride=(2, 1, 3)),
    Neighborhood((3, 2, 2), stride=(1, 2, 1), dilation=(1, 2, 2)),
    Neighborhood((3, 4, 4), (2, 1, 2), (1, 1, 2), (True, False, True)),
    Band(3, "in_frame"),
    Sink(2),
    Radial(),
    Radial("repo", 0.5),
    AnyOf((Band(3, "pixel_major"), Sink())),
    AnyOf((Neighborhood((1, 3, 3)), Radial(), Columns((1,), 8, (3, 4, 5)))),
]
GRIDS = [
    TokenGrid(3, 4, 5),
    TokenGrid(3, 4, 5, text_before=4),
    TokenGrid(3, 4, 5, text_after=2),
    TokenGrid(3, 4, 5, text_before=1, text_after=3),
]

WRONG: Any = "tile"
WRONG_MEMBER: Any = Full()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axis_order", ["raster", "pixel_major"])
def test_SG4_the_sink_is_the_first_frame_in_either_order(grid: TokenGrid, axis_order: Any):
    band = Band(2, axis_order)
    expected = band.mask(grid)
    frame = slice(grid.text_before, grid.text_before + grid.height * grid.width)
    expected[:, frame] = True
    assert torch.equal(AnyOf((band, Sink())).mask(grid), expected)


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_SV1_text_rows_and_columns_are_full_unless_skipped(pattern: Pattern, grid: TokenGrid):
    mask = pattern.mask(grid)
    text = torch.ones(grid.tokens, dtype=torch.bool)
    text[grid.text_before : grid.text_before + grid.video] = False
    expected = not isinstance(pattern, Skip)
    assert (mask[text] == expected).all()
    assert (mask[:, text] == expected).all()


def test_SV1_columns_are_seen_by_every_query():
    grid = TokenGrid(3, 4, 5, text_before=2)
    expected = [2 + key for key in [*range(8), *range(24, 32)]]
    for row in Columns((0, 3), 8, (3, 4, 5)).mask(grid)[2:]:
        assert row.nonzero()[:, 0].tolist() == [0, 1, *expected]


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_pairs_of_any_tokens_agree_with_the_mask(pattern: Pattern, grid: TokenGrid):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(grid.tokens, (3, 6, 1), generator=generator)
    keys = torch.randint(grid.tokens, (3, 1, 4), generator=generator)
    expected = pattern.mask(grid)[queries, keys]
    assert torch.equal(pattern.pairs(grid, queries, keys), expected)
    assert torch.equal(pattern.rows(grid, queries[0, :, 0]), pattern.mask(grid)[queries[0, :, 0]])


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_windows_keep_the_pairs_of_video_tokens(pattern: Pattern, grid: TokenGrid):
    video = torch.arange(grid.text_before, grid.text_before + grid.video)
    windows = pattern.windows(grid)
    if windows is None:
        assert pattern.kind in ("skip", "radial", "any_of")
        return
    assert len(windows.low) <= MOST_AXES
    expected = pattern.mask(grid)[video][:, video]
    assert torch.equal(windows.pairs(video[:, None], video[None, :]), expected)


def test_patterns_name_the_order_that_suits_them():
    assert Band(3).order == raster()
    assert Band(3, "pixel_major").order == pixel_major()
    assert Full().order is None
    assert Skip().order is None
    assert str(Neighborhood((3, 3, 3)).order) == "tile 4x4x4"
    assert Band(3, "in_frame").order == pixel_major()
    assert Radial().order == raster()
    assert Sink().order is None
    assert AnyOf((Sink(), Band(3, "pixel_major"), Radial())).order == pixel_major()


def test_refusals():
    grid = TokenGrid(3, 4, 6)
    assert Columns((0, 3), 8, (3, 4, 5)).refusal(TokenGrid(3, 4, 5)) is None
    assert Columns((0, 3), 8, (3, 4, 5)).refusal(grid) == (
        "columns 2/8 was chosen on grid 3x4x5 and says nothing about 3x4x6; "
        "search again on this grid"
    )
    assert Neighborhood((1, 1, 1), dilation=(1, 5, 1)).refusal(grid) == (
        "dilation 1x5x1 is larger than the token grid 3x4x6; use a dilation of at most the grid"
    )


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
def test_a_pattern_survives_json(pattern: Pattern):
    assert pattern_from_dict(json.loads(json.dumps(pattern_to_dict(pattern)))) == pattern


def test_every_kind_is_known():
    assert list(PATTERNS) == [
        "full", "skip", "band", "columns", "stripes", "sink", "neighborhood", "radial", "any_of",
        "choice", "scored",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "spiral"}, "unknown pattern kind 'spiral'; this version knows full, skip, band"),
        ({}, "unknown pattern kind None"),
        ({"kind": "band", "half_width": 3, "wide": 1}, "pattern 'band' has no field wide; it"),
        ({"kind": "band"}, "pattern 'band' is incomplete"),
        (
            {"kind": "band", "half_width": 3.5},
            "half_width of pattern 'band' must be an integer, got 3.5",
        ),
        ({"kind": "band", "half_width": True}, "half_width of pattern 'band' must be an integer"),
        ({"kind": "band", "half_width": -3}, "half_width must not be negative, got -3"),
        ({"kind": "neighborhood", "window": [3, 3]}, "window of pattern 'neighborhood' must be"),
        (
            {"kind": "neighborhood", "window": [3, 3, 3], "causal": [1, 0, 0]},
            "causal of pattern 'neighborhood' must be three booleans, got [1, 0, 0]",
        ),
        ({"kind": "radial", "variant": "new"}, "must be one of 'paper', 'repo', got 'new'"),
        ({"kind": "radial", "variant": "repo", "decay": float("nan")}, "decay must be a positive"),
        (
            {"kind": "any_of", "patterns": [{"kind": "sink"}, {"kind": "any_of", "patterns": []}]},
            "must be a list of patterns of kind band, columns, sink, neighborhood, radial, got",
        ),
        ({"kind": "any_of", "patterns": [{"kind": "sink"}]}, "must be two or more and different"),
        ({"kind": "any_of", "patterns": "ab"}, "patterns of pattern 'any_of' must be a list"),
        (
            {"kind": "columns", "blocks": [0, 10**30], "block": 1, "grid": [10**9, 10**9, 10**9]},
            "blocks must be different, ascending indices",
        ),
        ({"kind": "columns", "blocks": [0], "block": 1, "grid": [-3, -4, 5]}, "grid must be"),
    ],
)
def test_wrong_json_is_named(data: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        pattern_from_dict(data)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Band(1, WRONG),
            "axis_order must be 'raster', 'pixel_major' or 'in_frame', got 'tile'",
        ),
        (lambda: Band.of_density(0.0, GRIDS[0]), "density must be in (0, 1], got 0.0"),
        (lambda: Columns((), 8, (3, 4, 5)), "ascending indices in 0..7 for grid 3x4x5"),
        (lambda: Columns((3, 0), 8, (3, 4, 5)), "ascending indices in 0..7"),
        (lambda: Columns((8,), 8, (3, 4, 5)), "ascending indices in 0..7"),
        (lambda: Columns((0,), 0, (3, 4, 5)), "block must be at least 1 token, got 0"),
        (lambda: Neighborhood((3, 0, 3)), "window must be (frames, height, width), each at least"),
        (lambda: Neighborhood((3, 3, 3), (1, 4, 1)), "stride (1, 4, 1) is larger than window"),
        (lambda: Sink(0), "frames must be at least 1, got 0"),
        (lambda: Radial(decay=0.5), "decay 0.5 came with variant 'paper', which has none"),
        (lambda: Band.retention(1.5, GRIDS[0]), "kappa must be in (0, 1], got 1.5"),
        (lambda: AnyOf((Sink(), WRONG_MEMBER)), "got full; list the patterns of an any_of one by"),
    ],
)
def test_wrong_values_are_named(build, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_patterns_print_what_they_are():
    assert [str(pattern) for pattern in SAMPLES] == [
        "full",
        "skip",
        "band 7 raster",
        "band 2 pixel-major",
        "columns 2/8",
        "neighborhood 3x3x3",
        "neighborhood 2x4x5 stride 2x1x3",
        "neighborhood 3x2x2 stride 1x2x1 dilation 1x2x2",
        "neighborhood 3x4x4 stride 2x1x2 dilation 1x1x2 causal 1x0x1",
        "band 3 in-frame",
        "sink 2",
        "radial paper",
        "radial repo decay 0.5",
        "band 3 pixel-major + sink 1",
        "neighborhood 1x3x3 + radial paper + columns 1/8",
    ]

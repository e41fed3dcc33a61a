import itertools
import json
import re
from typing import Any

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major, raster
from dit_sparse.kernels.pattern import (
    PATTERNS,
    Band,
    Columns,
    Full,
    Neighborhood,
    Pattern,
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
]
GRIDS = [
    TokenGrid(3, 4, 5),
    TokenGrid(3, 4, 5, text_before=4),
    TokenGrid(3, 4, 5, text_after=2),
    TokenGrid(3, 4, 5, text_before=1, text_after=3),
]

WRONG: Any = "tile"


def natten_axis(length: int, window: int, stride: int, dilation: int) -> list[list[int]]:
    """Keys of every query of one axis, as NATTEN defines them, one group at a time."""
    keys: list[list[int]] = [[] for _ in range(length)]
    for group in range(dilation):
        members = list(range(group, length, dilation))
        for place, query in enumerate(members):
            leader = min((place // stride) * stride + stride // 2, len(members) - 1)
            start = max(leader - window // 2, 0)
            if leader + window // 2 + (window % 2 - 1) >= len(members):
                start = len(members) - window
            keys[query] = members[start : start + window]
    return keys


def axis_keys(pattern: Neighborhood, length: int) -> list[list[int]]:
    mask = pattern.mask(TokenGrid(1, 1, length))
    return [row.nonzero()[:, 0].tolist() for row in mask]


def on_one_axis(window: int, stride: int = 1, dilation: int = 1) -> Neighborhood:
    return Neighborhood((1, 1, window), (1, 1, stride), (1, 1, dilation))


def spans(keys: list[list[int]]) -> list[tuple[int, int]]:
    return [(row[0], row[-1]) for row in keys]


def test_GN1_every_window_stride_and_dilation_of_short_axes():
    for length in range(1, 20):
        for dilation in range(1, length + 1):
            for window in range(1, length // dilation + 1):
                for stride in range(1, window + 1):
                    keys = axis_keys(on_one_axis(window, stride, dilation), length)
                    case = length, window, stride, dilation
                    assert keys == natten_axis(*case), case
                    for query, row in enumerate(keys):
                        assert len(row) == window, case
                        assert query in row, case
                        assert {key % dilation for key in row} == {query % dilation}, case


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (7, 4, 3, [(0, 3)] * 3 + [(2, 5)] * 3 + [(3, 6)]),
        (7, 4, 4, [(0, 3)] * 4 + [(3, 6)] * 3),
        (8, 4, 4, [(0, 3)] * 4 + [(4, 7)] * 4),
    ],
)
def test_GN2_goldens(length: int, window: int, stride: int, expected: list[tuple[int, int]]):
    assert spans(axis_keys(on_one_axis(window, stride), length)) == expected


def test_GN2_golden_of_unequal_dilation_groups():
    keys = axis_keys(on_one_axis(3, dilation=3), 11)
    assert keys[6:9] == [[3, 6, 9], [4, 7, 10], [2, 5, 8]]


@pytest.mark.parametrize("length", [1, 4, 7, 10])
def test_GN3_limits_of_the_window(length: int):
    centered = [
        list(range(min(max(i - 1, 0), length - 3), min(max(i - 1, 0), length - 3) + 3))
        for i in range(length)
    ]
    if length >= 3:
        assert axis_keys(on_one_axis(3), length) == centered
    assert axis_keys(on_one_axis(length), length) == [list(range(length))] * length
    assert axis_keys(on_one_axis(1), length) == [[i] for i in range(length)]


@pytest.mark.parametrize("pattern", [p for p in SAMPLES if isinstance(p, Neighborhood)], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_GN4_a_neighborhood_is_the_and_of_its_axes(pattern: Neighborhood, grid: TokenGrid):
    axes = [
        natten_axis(*axis)
        for axis in zip(grid.shape, pattern.window, pattern.stride, pattern.dilation, strict=True)
    ]
    places: list[tuple[int, ...] | None] = [None] * grid.text_before
    places += itertools.product(*map(range, grid.shape))
    places += [None] * grid.text_after
    expected = [
        [
            q is None
            or k is None
            or all(b in axis[a] for axis, a, b in zip(axes, q, k, strict=True))
            for k in places
        ]
        for q in places
    ]
    assert pattern.mask(grid).tolist() == expected


def test_a_window_larger_than_the_grid_is_cut_to_it():
    grid = TokenGrid(2, 5, 5)
    wide, cut = Neighborhood((5, 9, 3), (4, 1, 1)), Neighborhood((2, 5, 3), (2, 1, 1))
    assert torch.equal(wide.mask(grid), cut.mask(grid))
    dilated = Neighborhood((1, 1, 9), dilation=(1, 1, 2)).mask(TokenGrid(1, 1, 7))
    assert torch.equal(dilated, on_one_axis(3, dilation=2).mask(TokenGrid(1, 1, 7)))


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
    if pattern == Skip():
        return
    video = torch.arange(grid.text_before, grid.text_before + grid.video)
    windows = pattern.windows(grid)
    assert windows is not None
    assert len(windows.low) <= MOST_AXES
    expected = pattern.mask(grid)[video][:, video]
    assert torch.equal(windows.pairs(video[:, None], video[None, :]), expected)


def test_patterns_name_the_order_that_suits_them():
    assert Band(3).order == raster()
    assert Band(3, "pixel_major").order == pixel_major()
    assert Full().order is None
    assert Skip().order is None
    assert str(Neighborhood((3, 3, 3)).order) == "tile 4x4x4"


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
    assert list(PATTERNS) == ["full", "skip", "band", "columns", "sink", "neighborhood"]


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
    ]

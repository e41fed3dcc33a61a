import pytest

from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Choice,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    Skip,
    Stripes,
)
from dit_sparse.kernels.scaling import Growth, at_density, at_grid
from dit_sparse.kernels.score import Clustered, Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import (
    Bands,
    Cumulative,
    Grouped,
    Select,
    Tiers,
    TopHead,
    TopRow,
)

SOURCE, GRID = TokenGrid(30, 48, 80, text_after=256), TokenGrid(15, 16, 16)
BLOCK = 64


def density(pattern: Pattern, grid: TokenGrid, block: int = BLOCK) -> float:
    return block_indices((pattern,), grid, block_q=block, block_k=block).density().block


def test_windows_keep_their_share_of_every_axis() -> None:
    scaled = at_grid(Neighborhood((18, 24, 24), (16, 8, 8)), SOURCE, GRID)
    assert scaled == Neighborhood((9, 8, 5), (8, 3, 2))
    assert at_grid(scaled, GRID, GRID) == scaled
    tiny = at_grid(Neighborhood((2, 3, 3), (2, 1, 1)), SOURCE, TokenGrid(2, 3, 4))
    assert tiny == Neighborhood((1, 1, 1))


@pytest.mark.parametrize(
    ("pattern", "kept", "frames", "space"),
    [
        (
            Neighborhood((6, 12, 10), (2, 6, 5)),
            Neighborhood((6, 12, 10), (2, 6, 5)),
            Neighborhood((3, 12, 10), (1, 6, 5)),
            Neighborhood((6, 4, 2), (2, 2, 1)),
        ),
        # As much of the window as the axis has.
        (
            Neighborhood((20, 40, 40), (16, 1, 20)),
            Neighborhood((15, 16, 16), (15, 1, 16)),
            Neighborhood((10, 16, 16), (8, 1, 16)),
            Neighborhood((15, 13, 8), (15, 1, 4)),
        ),
        (Band(900), Band(900), Band(450), Band(60)),
        (Band(900, "pixel_major"), *(Band(n, "pixel_major") for n in (900, 450, 60))),
        (Band(900, "in_frame"), *(Band(n, "in_frame") for n in (900, 900, 60))),
        (
            AnyOf((Band(900), Neighborhood((6, 12, 10)))),
            AnyOf((Band(900), Neighborhood((6, 12, 10)))),
            AnyOf((Band(450), Neighborhood((3, 12, 10)))),
            AnyOf((Band(60), Neighborhood((6, 4, 2)))),
        ),
    ],
    ids=["box", "large", "band", "pixels", "in-frame", "both"],
)
def test_along_axes_that_it_does_not_grow_along_a_pattern_keeps_its_tokens(
    pattern: Pattern, kept: Pattern, frames: Pattern, space: Pattern
) -> None:
    growths = (Growth(False, False), Growth(space=False), Growth(frames=False))
    assert [at_grid(pattern, SOURCE, GRID, growth) for growth in growths] == [kept, frames, space]
    for shorter in (kept, frames, space):
        assert shorter.refusal(GRID) is None


def test_clusters_keep_their_sizes_however_they_grow() -> None:
    pattern = Scored(Clustered(30, 100), Cumulative(0.9, 0.1))
    source, grid = TokenGrid(20, 10, 10), TokenGrid(10, 10, 8)
    assert at_grid(pattern, source, grid, Growth(False, False)) == at_grid(pattern, source, grid)


@pytest.mark.parametrize("axis_order", ["raster", "pixel_major"])
def test_bands_keep_their_density(axis_order: str) -> None:
    band = Band.of_density(0.3, SOURCE, axis_order)  # type: ignore[arg-type]
    assert at_grid(band, SOURCE, GRID) == Band.of_density(0.3, GRID, axis_order)  # type: ignore[arg-type]


def test_clusters_keep_their_sizes() -> None:
    source, grid = TokenGrid(20, 10, 10), TokenGrid(10, 10, 8)
    pattern = Scored(Clustered(30, 100), Cumulative(0.9, 0.1))
    for shape, score in ((grid, Clustered(12, 40)), (TokenGrid(1, 2, 2), Clustered(1, 1))):
        assert at_grid(pattern, source, shape) == Scored(score, Cumulative(0.9, 0.1))
    expected = Scored(Clustered(30, 100), Cumulative(0.9, 0.25, 0.25))
    assert at_density(pattern, 0.25, grid, BLOCK) == expected


def test_bands_inside_frames_are_scaled_by_the_frame() -> None:
    source = TokenGrid(13, 30, 45)
    band = Band.retention(0.25, source)
    assert at_grid(band, source, GRID).half_width == Band.retention(0.25, GRID).half_width  # type: ignore[union-attr]


def test_parts_are_scaled_and_sinks_are_not() -> None:
    both = AnyOf((Band(1152, "in_frame"), Sink(2)))
    assert at_grid(both, SOURCE, GRID) == AnyOf((Band(77, "in_frame"), Sink(2)))
    for pattern in (Full(), Skip(), Radial(), Scored(Mass(), TopRow(0.2))):
        assert at_grid(pattern, SOURCE, GRID) == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        Band(10),
        Band(10, "pixel_major"),
        Band(10, "in_frame"),
        Neighborhood((9, 8, 5)),
        Neighborhood((9, 8, 5), (4, 4, 2)),
        AnyOf((Band(10), Sink())),
        AnyOf((Radial("repo", 0.2), Sink())),
    ],
    ids=str,
)
@pytest.mark.parametrize("asked", [0.2, 0.35, 0.5])
def test_no_size_comes_nearer_to_the_density(pattern: Pattern, asked: float) -> None:
    found = at_density(pattern, asked, GRID, BLOCK)
    assert found.kind == pattern.kind
    assert str(found).split()[0] == str(pattern).split()[0]
    came = density(found, GRID)
    # The bottom of the kind may lie above what is asked.
    least = density(at_density(pattern, 1e-6, GRID, BLOCK), GRID)
    assert abs(came - max(asked, least)) < 0.12


def test_a_band_of_the_nearest_width_is_found_among_all() -> None:
    grid = TokenGrid(2, 6, 8)
    widths = [density(Band(width), grid, 16) for width in range(96)]
    for asked in (0.3, 0.5, 0.75):
        came = density(at_density(Band(3), asked, grid, 16), grid, 16)
        assert abs(came - asked) == pytest.approx(min(abs(width - asked) for width in widths))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (TopRow(0.2), TopRow(0.35)),
        (TopHead(0.2), TopHead(0.35)),
        (Tiers(0.2, 0.7), Tiers(0.35, 0.7)),
        (Grouped(0.2), Grouped(0.35)),
        (Cumulative(0.95, 0.05, 0.17), Cumulative(0.95, 0.35, 0.35)),
        (Bands((0.4, 0.5, 0.6, 0.8), "mass", 0.06), Bands((0.28, 0.35, 0.42, 0.56), "rank")),
    ],
    ids=str,
)
def test_scored_patterns_get_a_share_of_the_blocks(select: Select, expected: Select) -> None:
    pattern = Scored(Mass(), select, "gilbert", 1)
    assert at_density(pattern, 0.35, GRID, BLOCK) == Scored(Mass(), expected, "gilbert", 1)


def test_stripes_keep_their_share_of_the_blocks_or_get_another() -> None:
    choice = Choice((Skip(), Stripes(0.25)))
    assert at_grid(choice, SOURCE, GRID) == choice
    assert at_density(choice, 0.4, GRID, BLOCK) == Choice((Skip(), Stripes(0.4)))


def test_what_has_no_size_is_refused() -> None:
    assert at_density(Band(3), 1.0, GRID, BLOCK) == Full()
    with pytest.raises(ValueError, match="radial paper has no size by which its density could be"):
        at_density(Radial(), 0.3, GRID, BLOCK)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        at_density(Band(3), 0, GRID, BLOCK)

"""The picture of a pattern: its pixels are its pairs, its blocks and its frames."""

from pathlib import Path

import pytest
from PIL import Image

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import PATTERNS, AnyOf, Band, Full, Pattern, Radial, Sink, Skip
from dit_sparse.plots import SHORT, plot_pattern

EMPTY, KEPT, QUERY = (244, 244, 241), (31, 90, 140), (228, 87, 46)


def pixels(path: Path) -> dict[tuple[int, int, int], int]:
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(1 << 22)
    assert found is not None
    return {color: count for count, color in found}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pattern", "kept", "empty"),
    [
        (Full(), True, False),
        (Skip(), False, True),
        (AnyOf((Band(9, "in_frame"), Sink())), True, True),
    ],
    ids=str,
)
def test_what_is_kept_is_dark(pattern: Pattern, kept: bool, empty: bool, tmp_path: Path) -> None:
    drawn = plot_pattern(pattern, (3, 6, 8), tmp_path / "pattern.png")
    seen = pixels(tmp_path / "pattern.png")
    assert (seen.get(KEPT, 0) > 1000) == kept
    assert (seen.get(EMPTY, 0) > 1000) == empty
    assert seen.get(QUERY, 0) > 10
    assert drawn["text"] == str(pattern)


def test_many_frames_are_drawn_in_rows(tmp_path: Path) -> None:
    drawn = plot_pattern(Radial(), (13, 2, 2), tmp_path / "radial.png")
    assert drawn["density"]["element"] == pytest.approx(
        Radial().mask(TokenGrid(13, 2, 2)).double().mean().item()
    )


def test_every_kind_of_pattern_has_a_letter_of_its_own() -> None:
    assert set(SHORT) == set(PATTERNS)
    assert len(set(SHORT.values())) == len(SHORT)

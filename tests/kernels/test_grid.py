import re
from typing import Any

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid


def test_counts_and_text_of_a_prefix_grid():
    grid = TokenGrid(13, 30, 45, text_before=226)
    assert (grid.shape, grid.video, grid.text, grid.tokens) == ((13, 30, 45), 17550, 226, 17776)
    assert str(grid) == "226+13x30x45"


@pytest.mark.parametrize(("before", "after"), [(0, 0), (3, 0), (0, 5), (2, 4)])
def test_coordinates_enumerate_the_grid_and_mark_text(before: int, after: int):
    grid = TokenGrid(2, 3, 5, before, after)
    expected = [(-1, -1, -1)] * before
    expected += [(t, h, w) for t in range(2) for h in range(3) for w in range(5)]
    expected += [(-1, -1, -1)] * after
    came = torch.stack(grid.coordinates(torch.arange(grid.tokens)), 1)
    assert [tuple(row) for row in came.tolist()] == expected


@pytest.mark.parametrize(
    ("grid", "valid", "padding"),
    [
        (TokenGrid(1, 2, 2, text_before=3), 1, [1, 2]),
        (TokenGrid(1, 2, 2, text_after=3), 1, [5, 6]),
        (TokenGrid(1, 2, 2, text_after=3), 3, []),
        (TokenGrid(1, 2, 2), 0, []),
    ],
    ids=["prefix", "suffix", "all valid", "no text"],
)
def test_invalid_text_is_the_end_of_the_text(grid: TokenGrid, valid: int, padding: list[int]):
    assert list(range(grid.tokens))[grid.invalid_text(valid)] == padding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"text_after": -2}, "text_after must not be negative, got -2; use 0"),
        ({"text_after": 4, "valid_text": (5,)}, "one count in 0..4 for each sample, got (5,)"),
        ({"text_after": 4, "valid_text": ()}, "one count in 0..4 for each sample, got ()"),
        (
            {"text_before": 1, "text_after": 4, "valid_text": (1,)},
            "valid_text needs text on one side",
        ),
    ],
)
def test_wrong_geometry_is_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenGrid(**{"frames": 2, "height": 2, "width": 2, **arguments})

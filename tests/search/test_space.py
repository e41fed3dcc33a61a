from itertools import pairwise

import pytest
import torch

from dit_sparse.kernels.blocks import block_density, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Skip
from dit_sparse.search.space import LADDER, candidates

GRIDS = [
    TokenGrid(6, 8, 8),
    TokenGrid(5, 6, 10, text_before=7),
    TokenGrid(3, 7, 9, text_after=5, valid_text=(3, 5)),
    TokenGrid(1, 16, 16, text_before=4),
    TokenGrid(1, 1, 3),
]
LARGE = TokenGrid(7, 8, 12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_candidates_are_different_usable_and_priced(grid: TokenGrid) -> None:
    found = candidates(grid, 16)
    patterns = [candidate.pattern for candidate in found]
    assert patterns[:2] == [Full(), Skip()]
    assert [candidate.cost for candidate in found[:2]] == [1.0, 0.0]
    assert len(set(patterns)) == len(patterns)
    assert all(candidate.cost < 1 for candidate in found[1:])
    for candidate in found:
        assert candidate.pattern.refusal(grid) is None
        density = block_indices((candidate.pattern,), grid, block_q=16, block_k=16).density()
        assert candidate.cost == density.block


def test_every_kind_has_a_ladder() -> None:
    patterns = [candidate.pattern for candidate in candidates(LARGE, 64)]
    bands = [pattern for pattern in patterns if isinstance(pattern, Band)]
    for axis_order in ("raster", "pixel_major"):
        assert sum(band.axis_order == axis_order for band in bands) == len(LADDER)
    boxes = [pattern for pattern in patterns if isinstance(pattern, Neighborhood)]
    whole = [tuple(map(int.__eq__, box.window, LARGE.shape)) for box in boxes]
    flat_in_time = whole.count((False, True, True))
    flat_in_space = whole.count((True, False, False))
    cubes = whole.count((False, False, False))
    assert min(flat_in_time, flat_in_space, cubes) >= 2
    costs = sorted(block_density(box, LARGE, 64) for box in boxes)
    assert costs[0] < 0.1
    assert max(later - before for before, later in pairwise(costs)) < 0.2


def test_a_box_is_as_large_as_the_tiles_it_touches_allow() -> None:
    grid = LARGE
    for candidate in candidates(grid, 64):
        box = candidate.pattern
        if not isinstance(box, Neighborhood):
            continue
        for axis in range(3):
            if box.window[axis] == grid.shape[axis] or box.stride[axis] < 4:
                continue
            window = list(box.window)
            window[axis] += 1
            larger = Neighborhood((window[0], window[1], window[2]), box.stride)
            assert block_density(larger, grid, 64) > candidate.cost


def test_valid_text_does_not_change_the_candidates() -> None:
    padded = candidates(TokenGrid(3, 4, 4, text_after=6, valid_text=(2, 6)), 16)
    assert padded == candidates(TokenGrid(3, 4, 4, text_after=6), 16)


def test_costs_are_densities() -> None:
    costs = torch.tensor([candidate.cost for candidate in candidates(TokenGrid(6, 8, 8), 16)])
    assert costs.min() == 0
    assert costs.max() == 1

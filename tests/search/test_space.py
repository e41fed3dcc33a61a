from itertools import pairwise, product

import pytest
import torch

from dit_sparse.kernels.blocks import block_density, block_indices
from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.kernels.score import Mass, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import TopRow
from dit_sparse.search.space import (
    KINDS,
    LADDER,
    Candidate,
    Space,
    blocks_like,
    check_kinds,
    column_counts,
    patterns,
    remainders,
    search_cost,
)

GRIDS = [
    TokenGrid(6, 8, 8),
    TokenGrid(5, 6, 10, text_before=7),
    TokenGrid(3, 7, 9, text_after=5, valid_text=(3, 5)),
    TokenGrid(1, 16, 16, text_before=4),
    TokenGrid(1, 1, 3),
]
LARGE = TokenGrid(7, 8, 12)


def cost(pattern: Pattern, grid: TokenGrid, block: int = 16) -> float:
    return blocks_like(Candidate(pattern), grid, block).density().block


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patterns_are_different_usable_and_cheaper_than_full(grid: TokenGrid) -> None:
    found = patterns(grid, 16)
    assert found[:2] == (Full(), Skip())
    assert len(set(found)) == len(found)
    assert cost(Skip(), grid) == 0
    assert all(cost(pattern, grid) < 1 for pattern in found[1:])
    for pattern in found:
        if not isinstance(pattern, Scored):
            assert pattern.refusal(grid) is None


def test_every_kind_has_a_ladder() -> None:
    found = patterns(LARGE, 64)
    bands = [pattern for pattern in found if isinstance(pattern, Band)]
    for axis_order in ("raster", "pixel_major"):
        assert sum(band.axis_order == axis_order for band in bands) == len(LADDER)
    scored = [pattern for pattern in found if isinstance(pattern, Scored)]
    assert scored == [Scored(Mass(), TopRow(d), o) for o in ("raster", "gilbert") for d in LADDER]
    boxes = [pattern for pattern in found if isinstance(pattern, Neighborhood)]
    assert len(found) == 2 + len(bands) + len(scored) + len(boxes)
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
    for box in patterns(grid, 64):
        if not isinstance(box, Neighborhood):
            continue
        for axis in range(3):
            if box.window[axis] == grid.shape[axis] or box.stride[axis] < 4:
                continue
            window = list(box.window)
            window[axis] += 1
            larger = Neighborhood((window[0], window[1], window[2]), box.stride)
            assert block_density(larger, grid, 64) > block_density(box, grid, 64)


def test_valid_text_does_not_change_the_patterns() -> None:
    padded = patterns(TokenGrid(3, 4, 4, text_after=6, valid_text=(2, 6)), 16)
    assert padded == patterns(TokenGrid(3, 4, 4, text_after=6), 16)


def test_kinds_narrow_patterns_and_remainders() -> None:
    every = patterns(LARGE, 64)
    for kind in KINDS:
        own = patterns(LARGE, 64, (kind,))
        assert own == (Full(), *(p for p in every[1:] if p.kind == kind))
    assert patterns(LARGE, 64, ()) == (Full(),)
    assert remainders() == (Drop(), Pooled(), Rescale(), Complement())
    assert remainders(("complement", "pooled", "band")) == (Drop(), Pooled(), Complement())
    assert remainders(()) == (Drop(),)


def test_unknown_kinds_are_named() -> None:
    check_kinds(KINDS)
    check_kinds([])
    names = "full, skip, band, neighborhood, columns, scored, drop, pooled, rescale, complement"
    with pytest.raises(ValueError, match=f"a list of names of {names}, came 'radial'"):
        check_kinds(("band", "radial"))
    with pytest.raises(ValueError, match=f"a list of names of {names}, came 'band'"):
        check_kinds("band")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lists_are_those_that_a_run_makes(grid: TokenGrid) -> None:
    """As they are, for patterns of the grid; as many blocks, for those found while denoising,
    wherever blocks are equal."""
    block = 16
    columns = Columns((0,), block, grid.shape)
    for pattern, rest in product((*patterns(grid, block), columns), remainders()):
        came = blocks_like(Candidate(pattern, rest), grid, block)
        level = rest.level if isinstance(rest, Pooled) else 0
        if isinstance(pattern, Scored):
            tokens = 1, grid.tokens, 1, 8
            query, key = torch.randn(2, *tokens, generator=torch.Generator().manual_seed(0))
            cut = geometry(pattern.order, grid, 1, block)
            batch = len(grid.valid_text or (0,))
            query, key = (x.expand(batch, -1, -1, -1) for x in (query, key))
            lse = torch.zeros(batch, 1, grid.tokens)
            real = scored_blocks(pattern, query, key, cut, lse=lse, pooled=level)
            assert came.order == real.order == pattern.order
            assert torch.equal(came.query_offsets, real.query_offsets)
            assert torch.equal(came.row_pointer, real.row_pointer)
            counts = [(came.tag == tag).sum() for tag in (0, level)]
            assert counts == [(real.tag == tag).sum() for tag in (0, level)]
            if grid.video % block == 0:
                assert came.density() == real.density()
            continue
        real = block_indices((pattern,), grid, block_q=block, block_k=block, pooled=level)
        assert came.density() == real.density()
        assert torch.equal(came.key_block, real.key_block)
        assert torch.equal(came.tag, real.tag)


@pytest.mark.parametrize(
    ("rest", "weighted"),
    [(Drop(), 0.0), (Pooled(), 1 / 8), (Pooled(2), 1 / 4), (Rescale(), 0.0), (Complement(), 0.0)],
    ids=str,
)
def test_means_cost_their_share(rest: Remainder, weighted: float) -> None:
    grid = TokenGrid(4, 8, 8)
    assert blocks_like(Candidate(Skip(), rest), grid, 16).density().weighted == weighted
    # 5 of 16 blocks whole, the others by their means.
    found = Scored(Mass(), TopRow(0.3), "gilbert")
    density = blocks_like(Candidate(found, rest), grid, 16).density()
    assert density.weighted == pytest.approx(5 / 16 + 11 / 16 * weighted)


def test_a_search_costs_what_its_score_does() -> None:
    assert search_cost(Band(3), 64) == search_cost(Full(), 64) == 0
    assert search_cost(Scored(Mass(), TopRow(0.3)), 64) == 0.5 * 16 / 64
    assert search_cost(Scored(Mass(rows=None), TopRow(0.3)), 64) == 0.5
    assert search_cost(Scored(Sampled(32), TopRow(0.3)), 64) == 0.5 / 4


def test_candidates_read_as_they_run_and_slots_count_columns() -> None:
    assert str(Candidate(Band(6))) == "band 6 raster"
    assert str(Candidate(Skip(), Pooled())) == "skip with pooled by 8"
    assert Space((Full(), Skip()), (2, 5, 7), (Drop(),)).slots == 5


def test_counts_climb_the_ladder_and_stay_below_full() -> None:
    assert column_counts(TokenGrid(15, 16, 16), 64) == (3, 6, 12, 18, 27, 42)
    assert column_counts(TokenGrid(1, 4, 8), 16) == (1,)
    assert column_counts(TokenGrid(1, 4, 4), 16) == ()

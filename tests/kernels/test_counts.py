import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import counts
from dit_sparse.kernels.counts import cut, pair_counts
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major, raster, tile
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    Skip,
)

sides = st.integers(1, 7)
triples = st.tuples(sides, sides, sides)
orders = st.one_of(st.just(raster()), st.just(pixel_major()), triples.map(lambda t: tile(*t)))


def check(pattern: Pattern, grid: TokenGrid, sides: list[counts.Cut]):
    """The counts of every two blocks are those of the mask."""
    queries, keys = sides
    mask = pattern.mask(grid)
    rows = queries.tokens.tensor_split(queries.offsets[1:-1])
    columns = keys.tokens.tensor_split(keys.offsets[1:-1])
    expected = [[int(mask[row][:, column].sum()) for column in columns] for row in rows]
    seen, last = [], 0
    for blocks, pairs in pair_counts(pattern, grid, queries, keys):
        assert blocks.start == last
        last = blocks.stop
        seen += pairs.tolist()
    assert seen == expected


@settings(max_examples=60, deadline=None)
@given(
    grid=st.builds(TokenGrid, sides, sides, sides, st.integers(0, 9), st.integers(0, 9)),
    window=triples,
    stride=triples,
    dilation=triples,
    causal=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    order=st.tuples(orders, orders),
    block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    data=st.data(),
)
def test_counts_are_those_of_the_mask(grid, window, stride, dilation, causal, order, block, data):
    stride = tuple(map(min, stride, window))
    dilation = tuple(map(min, dilation, grid.shape))
    pattern = data.draw(
        st.sampled_from(
            [
                Neighborhood(window, stride, dilation, causal),
                Band(window[0], "raster"),
                Band(window[1], "pixel_major"),
                Band(window[2], "in_frame"),
                Columns((0,), 5, grid.shape),
                Sink(window[0]),
                Full(),
            ]
        )
    )
    check(pattern, grid, [cut(grid, *side) for side in zip(order, block, strict=True)])


PATTERNS = [
    Full(),
    Skip(),
    Band(9),
    Band(7, "in_frame"),
    Sink(),
    Columns((1, 3), 8, (3, 5, 6)),
    Neighborhood((2, 3, 4), (1, 2, 2), (1, 1, 2)),
    Radial(),
    AnyOf((Band(3), Sink())),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("way", ["few at once", "no boxes"])
def test_each_way_of_counting_counts_the_same(
    pattern: Pattern, way: str, monkeypatch: pytest.MonkeyPatch
):
    if way == "no boxes":
        monkeypatch.setattr(counts, "_MOST_BOXES", 0)
    monkeypatch.setattr(counts, "_AT_ONCE", 50)
    grid = TokenGrid(3, 5, 6, text_before=4, text_after=17)
    check(pattern, grid, [cut(grid, tile(2, 3, 4), 13), cut(grid, raster(), 8)])


@pytest.mark.parametrize(
    "pattern", [Neighborhood((5, 9, 9), (1, 2, 2), (1, 2, 1)), Band(700), Full(), Sink()], ids=str
)
def test_a_large_grid_is_counted_without_its_pairs(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(counts, "_by_pairs", None)
    monkeypatch.setattr(counts, "_by_places", None)
    grid = TokenGrid(21, 30, 52)
    order = pattern.order or raster()
    side = cut(grid, order, 128)
    (pairs,) = torch.cat([pairs for _, pairs in pair_counts(pattern, grid, side, side)]).split(
        len(side.offsets) - 1
    )
    for row in (0, 100, len(pairs) - 1):
        queries = side.tokens[side.offsets[row] : side.offsets[row + 1]]
        kept = pattern.rows(grid, queries).sum(0)[side.tokens]
        expected = [int(part.sum()) for part in kept.tensor_split(side.offsets[1:-1])]
        assert pairs[row].tolist() == expected

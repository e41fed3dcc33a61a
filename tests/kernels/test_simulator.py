import itertools
import math
import random
from typing import Any

import pytest

from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import tile
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Sink, Skip
from dit_sparse.kernels.simulator import Simulation, simulate, simulate_blocks, useful_strides

HUNYUAN = TokenGrid(30, 48, 80)
FLUX = TokenGrid(1, 256, 256)
LINE = TokenGrid(1, 1, 32768)
Triple = tuple[int, int, int]


def hunyuan(stride: Triple) -> Simulation:
    return simulate(Neighborhood((18, 24, 24), stride), HUNYUAN, (4, 8, 8), (2, 8, 8))


@pytest.mark.parametrize(
    ("stride", "visited", "bound"),
    [
        ((1, 1, 1), 275, 3.27),
        ((2, 1, 1), 250, 3.60),
        ((1, 1, 8), 165, 5.45),
        ((2, 1, 8), 150, 6.00),
        ((1, 8, 8), 99, 9.09),
        ((2, 8, 8), 90, 10.0),
        ((16, 8, 8), 81, 11.11),
        ((18, 24, 24), 135, 6.67),
    ],
)
def test_GN6_hunyuan(stride: Triple, visited: int, bound: float):
    simulated = hunyuan(stride)
    assert (simulated.visited, simulated.total) == (visited, 900)
    assert simulated.bound == pytest.approx(bound, abs=5e-3)
    assert simulated.perfect == (stride == (16, 8, 8))


def test_GN6_means():
    assert hunyuan((1, 1, 1)).mean_bound == pytest.approx(5.24, abs=5e-3)
    assert hunyuan((16, 8, 8)).mean_bound == pytest.approx(100 / 9)


@pytest.mark.parametrize(
    ("stride", "visited"), [((1, 1, 1), 84), ((1, 16, 1), 60), ((1, 16, 16), 50)]
)
def test_GN6_flux(stride: Triple, visited: int):
    simulated = simulate(Neighborhood((1, 80, 80), stride), FLUX, (1, 16, 16), (1, 16, 8))
    assert (simulated.visited, simulated.total) == (visited, 512)


@pytest.mark.parametrize(
    ("grid", "pattern", "q_tile", "kv_tile", "bound", "perfect"),
    [
        (LINE, ((1, 1, 2048),), (1, 1, 128), (1, 1, 128), 15.11, False),
        (LINE, ((1, 1, 2048),), (1, 1, 256), (1, 1, 128), 14.32, False),
        (LINE, ((1, 1, 2048), (1, 1, 256)), (1, 1, 256), (1, 1, 128), 16.0, True),
        (LINE, ((1, 1, 2048), (1, 1, 2048)), (1, 1, 128), (1, 1, 128), 16.0, True),
        (FLUX, ((1, 80, 80),), (1, 16, 8), (1, 16, 8), 7.515, False),
        (FLUX, ((1, 80, 80),), (1, 16, 16), (1, 16, 8), 7.061, False),
        (FLUX, ((1, 80, 80), (1, 16, 16)), (1, 16, 16), (1, 16, 8), 10.24, True),
        (HUNYUAN, ((18, 24, 24),), (2, 8, 8), (2, 8, 8), 5.440, False),
        (HUNYUAN, ((18, 24, 24),), (4, 8, 8), (2, 8, 8), 4.917, False),
        (HUNYUAN, ((18, 24, 24), (16, 8, 8)), (2, 8, 8), (2, 8, 8), 11.11, True),
        (HUNYUAN, ((18, 24, 24), (16, 8, 8)), (4, 8, 8), (2, 8, 8), 10.417, True),
        (TokenGrid(24, 44, 80), ((24, 12, 24), (1, 4, 8)), (4, 4, 8), (4, 4, 8), 12.22, True),
        (TokenGrid(24, 44, 80), ((24, 20, 40), (1, 4, 8)), (4, 4, 8), (4, 4, 8), 4.40, True),
        (TokenGrid(24, 44, 80), ((24, 28, 56), (1, 4, 8)), (4, 4, 8), (4, 4, 8), 2.245, True),
        (
            TokenGrid(24, 44, 80),
            ((24, 4, 16), (1, 1, 1), (1, 11, 5)),
            (8, 4, 4),
            (8, 4, 4),
            55.0,
            True,
        ),
        (
            TokenGrid(24, 44, 80),
            ((24, 12, 16), (1, 4, 1), (1, 1, 5)),
            (2, 4, 16),
            (2, 4, 16),
            18.33,
            True,
        ),
    ],
)
def test_GN6_published_cases(
    grid: TokenGrid, pattern: tuple, q_tile: Triple, kv_tile: Triple, bound: float, perfect: bool
):
    simulated = simulate(Neighborhood(*pattern), grid, q_tile, kv_tile)
    # These were published for dense attention without padded tiles of queries.
    unpadded = grid.video / math.prod(q_tile) / simulated.query_tiles
    assert simulated.mean_bound * unpadded == pytest.approx(bound, rel=6e-4)
    assert simulated.perfect == perfect


def brute_force(
    pattern: Pattern, grid: TokenGrid, q_tile: Triple, kv_tile: Triple, dilation: Triple
) -> Simulation:
    """Every pair of tiles looked at; tiles hold the tokens of one dilation group."""
    mask = pattern.mask(grid)

    def tiles(sides: Triple) -> list[list[int]]:
        found: dict[tuple, list[int]] = {}
        for token, place in enumerate(itertools.product(*map(range, grid.shape))):
            key = tuple(
                (p % d, p // d // side) for p, d, side in zip(place, dilation, sides, strict=True)
            )
            found.setdefault(key, []).append(token)
        return list(found.values())

    visits, perfect = [], True
    for queries in tiles(q_tile):
        pairs = [mask[queries][:, keys] for keys in tiles(kv_tile)]
        visits.append(sum(bool(pair.any()) for pair in pairs))
        perfect &= all(bool(pair.all()) for pair in pairs if pair.any())
    total = len(tiles(kv_tile))
    return Simulation(max(visits), sum(visits) / len(visits), total, len(visits), perfect)


def test_GN6_any_neighborhood_is_counted_exactly():
    chance = random.Random(0)
    for _ in range(40):
        shape = chance.randint(1, 4), chance.randint(1, 6), chance.randint(1, 9)
        dilation: Any = tuple(chance.randint(1, min(length, 3)) for length in shape)
        window: Any = tuple(chance.randint(1, length + 1) for length in shape)
        stride: Any = tuple(chance.randint(1, w) for w in window)
        causal: Any = tuple(chance.random() < 0.3 for _ in shape)
        sides: list[Any] = [tuple(chance.randint(1, 4) for _ in shape) for _ in range(2)]
        pattern = Neighborhood(window, stride, dilation, causal)
        grid = TokenGrid(*shape)
        expected = brute_force(pattern, grid, sides[0], sides[1], dilation)
        came = simulate(pattern, grid, *sides)
        assert came.mean_visited == pytest.approx(expected.mean_visited)
        for name in ("visited", "total", "query_tiles", "perfect"):
            assert getattr(came, name) == getattr(expected, name), (pattern, grid, sides, name)


@pytest.mark.parametrize(
    "pattern",
    [Full(), Skip(), Band(7), Band(3, "in_frame"), AnyOf((Neighborhood((1, 3, 3)), Sink()))],
    ids=str,
)
def test_any_pattern_is_counted_exactly(pattern: Pattern):
    grid = TokenGrid(3, 5, 7)
    expected = brute_force(pattern, grid, (2, 2, 4), (1, 3, 3), (1, 1, 1))
    assert simulate(pattern, TokenGrid(3, 5, 7, 4, 2), (2, 2, 4), (1, 3, 3)) == expected


def test_blocks_are_simulated_as_their_tiles():
    pattern, grid = Neighborhood((3, 5, 5), (1, 2, 2)), TokenGrid(4, 8, 9)
    blocks = block_indices([pattern], grid, tile(2, 4, 4), 32, 32)
    assert simulate_blocks(blocks) == simulate(pattern, grid, (2, 4, 4), (2, 4, 4))


def test_skip_has_no_bound():
    assert simulate(Skip(), TokenGrid(2, 4, 4), (2, 2, 2), (2, 2, 2)).bound == math.inf


def test_useful_strides_are_those_that_no_smaller_one_equals():
    pattern, grid, tiles = Neighborhood((3, 5, 6)), TokenGrid(4, 9, 10), ((2, 2, 3), (1, 2, 2))
    every = {
        stride: simulate(Neighborhood(pattern.window, stride), grid, *tiles).visited
        for stride in itertools.product(range(1, 4), range(1, 6), range(1, 7))
    }
    expected = {
        stride
        for stride, visited in every.items()
        if not any(
            other != stride and all(a <= b for a, b in zip(other, stride, strict=True))
            and every[other] <= visited
            for other in every
        )
    }  # fmt: skip
    found = useful_strides(pattern, grid, *tiles)
    assert {each.stride for each, _ in found} == expected
    bounds = [simulated.bound for _, simulated in found]
    assert bounds == sorted(bounds)


def test_useful_strides_of_hunyuan_are_the_published_ones():
    pattern = Neighborhood((18, 24, 24))
    found = {each.stride for each, _ in useful_strides(pattern, HUNYUAN, (4, 8, 8), (2, 8, 8))}
    assert found >= {(1, 1, 1), (2, 1, 1), (1, 1, 8), (2, 1, 8), (1, 8, 8), (2, 8, 8), (16, 8, 8)}
    assert (18, 24, 24) not in found


def test_a_refused_grid_is_named():
    with pytest.raises(ValueError, match="use a dilation of at most the grid"):
        simulate(Neighborhood((1, 1, 1), dilation=(4, 1, 1)), TokenGrid(3, 3, 3), *[(1, 1, 1)] * 2)

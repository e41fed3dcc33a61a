import itertools

import pytest
import torch

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.pattern import Neighborhood

SAMPLES = [
    Neighborhood((3, 3, 3)),
    Neighborhood((2, 4, 5), stride=(2, 1, 3)),
    Neighborhood((3, 2, 2), stride=(1, 2, 1), dilation=(1, 2, 2)),
    Neighborhood((3, 4, 2), (2, 1, 2), (1, 1, 2), (True, False, True)),
]
GRIDS = [
    TokenGrid(3, 4, 5),
    TokenGrid(3, 4, 5, text_before=4),
    TokenGrid(3, 4, 5, text_after=2),
    TokenGrid(3, 4, 5, text_before=1, text_after=3),
]


def natten_axis(
    length: int, window: int, stride: int, dilation: int, causal: bool = False
) -> list[list[int]]:
    """Keys of every query of one axis, as NATTEN defines them, one group at a time."""
    keys: list[list[int]] = [[] for _ in range(length)]
    for group in range(dilation):
        members = list(range(group, length, dilation))
        for place, query in enumerate(members):
            if causal:
                last = min((place // stride) * stride + stride - 1, len(members) - 1)
                keys[query] = members[max(last - window + 1, 0) : place + 1]
                continue
            leader = min((place // stride) * stride + stride // 2, len(members) - 1)
            start = max(leader - window // 2, 0)
            if leader + window // 2 + (window % 2 - 1) >= len(members):
                start = len(members) - window
            keys[query] = members[start : start + window]
    return keys


def axis_keys(pattern: Neighborhood, length: int) -> list[list[int]]:
    mask = pattern.mask(TokenGrid(1, 1, length))
    return [row.nonzero()[:, 0].tolist() for row in mask]


def on_one_axis(
    window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> Neighborhood:
    flags = (False, False, causal)
    return Neighborhood((1, 1, window), (1, 1, stride), (1, 1, dilation), flags)


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


def test_GN1_every_causal_window_sees_its_query_and_nothing_after_it():
    for length in range(1, 13):
        for dilation in range(1, length + 1):
            for window in range(1, length // dilation + 1):
                for stride in range(1, window + 1):
                    case = length, window, stride, dilation, True
                    keys = axis_keys(on_one_axis(*case[1:]), length)
                    assert keys == natten_axis(*case), case
                    assert [row[-1] for row in keys] == list(range(length)), case


def test_GN2_golden_of_a_causal_axis():
    keys = axis_keys(on_one_axis(3, 2, causal=True), 6)
    assert spans(keys) == [(0, 0), (0, 1), (1, 2), (1, 3), (3, 4), (3, 5)]


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


@pytest.mark.parametrize("pattern", SAMPLES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_GN4_a_neighborhood_is_the_and_of_its_axes(pattern: Neighborhood, grid: TokenGrid):
    axes = [
        natten_axis(*axis)
        for axis in zip(
            grid.shape,
            pattern.window,
            pattern.stride,
            pattern.dilation,
            pattern.causal,
            strict=True,
        )
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


def sta_axis(tiles: int, side: int, window: int) -> list[list[int]]:
    """Keys of every query of one axis as the code of Sliding Tile Attention decides."""
    half = window // 2
    centers = [min(max(tile, half), tiles - 1 - half) for tile in range(tiles)]
    return [
        [key for key in range(tiles * side) if abs(key // side - centers[query // side]) <= half]
        for query in range(tiles * side)
    ]


@pytest.mark.parametrize("side", [2, 3, 4, 6, 8])
def test_GN5_sliding_tiles_are_a_neighborhood_if_odd(side: int):
    for tiles in range(1, 10):
        for window in range(1, tiles + 1):
            pattern = Neighborhood.sliding_tiles((1, 1, window), (1, 1, side))
            keys = axis_keys(pattern, tiles * side)
            if window % 2:
                assert keys == sta_axis(tiles, side, window), (tiles, window)
                continue
            # An even window is a tile more in STA and shifted by half a tile here.
            assert {len(row) for row in keys} == {window * side}
            if tiles > window:
                assert {len(row) for row in sta_axis(tiles, side, window)} == {(window + 1) * side}


def test_GN5_golden_of_an_even_window():
    keys = spans(axis_keys(Neighborhood.sliding_tiles((1, 1, 2), (1, 1, 4)), 16))
    assert keys == [(0, 7)] * 4 + [(2, 9)] * 4 + [(6, 13)] * 4 + [(8, 15)] * 4
    assert spans(sta_axis(4, 4, 2))[4:8] == [(0, 11)] * 4


def test_a_window_larger_than_the_grid_is_cut_to_it():
    grid = TokenGrid(2, 5, 5)
    wide, cut = Neighborhood((5, 9, 3), (4, 1, 1)), Neighborhood((2, 5, 3), (2, 1, 1))
    assert torch.equal(wide.mask(grid), cut.mask(grid))
    dilated = Neighborhood((1, 1, 9), dilation=(1, 1, 2)).mask(TokenGrid(1, 1, 7))
    assert torch.equal(dilated, on_one_axis(3, dilation=2).mask(TokenGrid(1, 1, 7)))


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("grid", GRIDS[1:], ids=str)
def test_GN8_text_in_one_call_is_the_merge_of_two(backend: str, grid: TokenGrid, operands):
    """NATTEN attends to text in a dense call of its own and merges by the LSE."""
    query, key, value = operands(grid.tokens, 2, 16)
    text = torch.ones(grid.tokens, dtype=torch.bool)
    text[grid.text_before : grid.text_before + grid.video] = False
    blocks = block_indices([SAMPLES[0]] * 2, grid, block_q=16, block_k=16)
    output, lse = sparse_attention(query, key, value, blocks, backend=backend)
    alone = TokenGrid(*grid.shape)
    video = block_indices([SAMPLES[0]] * 2, alone, block_q=16, block_k=16)
    q, k, v = (x[:, ~text].contiguous() for x in (query, key, value))
    near = sparse_attention(q, k, v, video, backend=backend)
    logits = torch.einsum("bihd,bjhd->bhij", query[:, ~text], key[:, text]) / 4
    far = torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value[:, text])
    expected = merge([near, (far, logits.logsumexp(-1))])
    torch.testing.assert_close(output[:, ~text], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, :, ~text], expected[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[:, ~text], near[0], atol=1e-2)

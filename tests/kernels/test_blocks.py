import re
from dataclasses import astuple, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.blocks import (
    ABSENT,
    PARTIAL,
    WHOLE,
    BlockIndices,
    Density,
    block_indices,
    from_block_mask,
    from_cuts,
    from_tags,
    relisted,
)
from dit_sparse.kernels.counts import Cut
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster, tile
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
from dit_sparse.kernels.shard import Shard

PATTERNS: list[Pattern] = [
    Full(),
    Skip(),
    Band(9),
    Band(5, "pixel_major"),
    Columns((0, 2), 16, (3, 5, 6)),
    Neighborhood((3, 3, 3)),
    Neighborhood((2, 4, 4), (2, 2, 4), (1, 1, 1)),
    Neighborhood((3, 2, 3), (1, 1, 2), (1, 2, 2)),
    Neighborhood((3, 4, 4), (2, 1, 2), (1, 1, 2), (True, False, True)),
    Band(4, "in_frame"),
    Sink(2),
    Radial(),
    Radial("repo", 0.5),
    AnyOf((Band(4, "pixel_major"), Sink())),
    AnyOf((Neighborhood((1, 3, 3)), Radial(), Columns((1,), 16, (3, 5, 6)))),
]
GRIDS = [
    TokenGrid(3, 5, 6),
    TokenGrid(3, 5, 6, text_before=7),
    TokenGrid(3, 5, 6, text_after=3),
    TokenGrid(3, 5, 6, text_before=2, text_after=17),
]
ORDERS = [None, raster(), pixel_major(), tile(2, 3, 4)]


def check_tags(blocks: BlockIndices, masks: list[torch.Tensor]):
    """Tiles are listed as whole, listed as partial or absent exactly as their pairs say."""
    kept = visited = 0
    for head, mask in enumerate(masks):
        kept += int(mask.sum())
        for row in range(blocks.query_blocks):
            tags = dict(blocks.entries(head, row))
            assert list(tags) == sorted(tags)
            for column in range(blocks.key_blocks):
                pairs = mask[blocks.query_tokens(row)][:, blocks.key_tokens(column)]
                expected = WHOLE if pairs.all() else PARTIAL if pairs.any() else None
                assert tags.get(column) == expected, (head, row, column)
                visited += pairs.numel() if pairs.any() else 0
    total = len(masks) * blocks.grid.tokens**2
    assert blocks.density() == Density(kept / total, visited / total, visited / total)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_GN7_tags_say_what_the_pattern_keeps(
    pattern: Pattern, grid: TokenGrid, order: TokenOrder | None
):
    blocks = block_indices([pattern], grid, order, block_q=16, block_k=24)
    check_tags(blocks, [pattern.mask(grid)])


sides = st.integers(1, 6)
triples = st.tuples(sides, sides, sides)


@settings(max_examples=30, deadline=None)
@given(
    grid=st.builds(TokenGrid, sides, sides, sides, st.integers(0, 5), st.integers(0, 5)),
    window=triples,
    tiles=triples,
    block_q=st.integers(1, 30),
    block_k=st.integers(1, 30),
    half_width=st.integers(0, 40),
)
def test_GN7_tags_on_any_grid_order_and_block(
    grid: TokenGrid,
    window: tuple[int, int, int],
    tiles: tuple[int, int, int],
    block_q: int,
    block_k: int,
    half_width: int,
):
    patterns = [Neighborhood(window), Band(half_width)]
    blocks = block_indices(patterns, grid, tile(*tiles), block_q, block_k)
    check_tags(blocks, [pattern.mask(grid) for pattern in patterns])


def test_a_block_is_whole_where_windows_meet_tiles():
    grid = TokenGrid(4, 8, 8)
    blocks = block_indices([Neighborhood((4, 4, 4), (4, 4, 4))], grid, None, 64, 64)
    assert blocks.tag.tolist() == [WHOLE] * 4
    assert blocks.key_block.tolist() == [0, 1, 2, 3]
    assert blocks.density() == Density(0.25, 0.25, 0.25)


def test_blocks_of_many_queries_are_counted_right():
    grid = TokenGrid(2, 20, 20)
    blocks = block_indices([Full(), Band(300)], grid, None, 700, 100)
    check_tags(blocks, [Full().mask(grid), Band(300).mask(grid)])


def test_SV1_modes_cost_what_they_declare_within_a_block():
    grid = TokenGrid(4, 16, 16)
    for density in (0.1, 0.25, 0.5):
        blocks = block_indices([Band.of_density(density, grid)], grid, None, 64, 64)
        assert density <= blocks.density().block <= density + 3 * 64 / grid.tokens
    columns = block_indices([Columns((1, 5, 6, 9), 64, grid.shape)], grid, None, 64, 64)
    assert columns.density() == Density(0.25, 0.25, 0.25)
    assert block_indices([Full()], grid).density() == Density(1.0, 1.0, 1.0)
    assert block_indices([Skip()], grid).density() == Density(0.0, 0.0, 0.0)


def test_G6_rows_of_mixed_heads_are_the_rows_of_each():
    grid, patterns = GRIDS[3], [Full(), Skip(), Band(9), Columns((0, 2), 16, (3, 5, 6)), Full()]
    mixed = block_indices(patterns, grid, block_q=16, block_k=24)
    for head, pattern in enumerate(patterns):
        single = block_indices([pattern], grid, mixed.order, 16, 24)
        for row in range(mixed.query_blocks):
            assert list(mixed.entries(head, row)) == list(single.entries(0, row))


def test_density_is_the_mean_of_the_heads():
    grid = GRIDS[0]
    densities = [
        block_indices([pattern], grid, raster()).density().element for pattern in PATTERNS
    ]
    mixed = block_indices(PATTERNS, grid, raster()).density().element
    assert mixed == pytest.approx(sum(densities) / len(densities))


def test_a_block_mask_is_taken_as_it_is():
    grid = TokenGrid(3, 5, 6, text_before=2)
    mask = torch.rand(2, 7, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1, 3] = False
    blocks = from_block_mask(mask, grid, tile(3, 5, 3), block_q=16, block_k=24)
    assert (blocks.tag == WHOLE).all()
    assert blocks.patterns is None
    masks = []
    for head in mask:
        tokens = torch.zeros(grid.tokens, grid.tokens, dtype=torch.bool)
        for row, column in head.nonzero().tolist():
            tokens[blocks.query_tokens(row)[:, None], blocks.key_tokens(column)] = True
        masks.append(tokens)
    check_tags(blocks, masks)


def test_heads_choose_the_common_order():
    assert block_indices([Full(), Skip()], GRIDS[0]).order == raster()
    assert block_indices([Full(), Band(3, "pixel_major")], GRIDS[0]).order == pixel_major()


def test_valid_text_leaves_the_blocks_alone():
    grid = TokenGrid(3, 5, 6, text_after=20, valid_text=(3, 20))
    blocks = block_indices([Band(4)], grid, None, 16, 16)
    plain = block_indices([Band(4)], TokenGrid(3, 5, 6, text_after=20), None, 16, 16)
    assert torch.equal(blocks.key_block, plain.key_block)
    assert blocks.grid.valid_text == (3, 20)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: block_indices([Band(3), Full(), Band(4, "pixel_major")], GRIDS[0]),
            "the heads ask for different token orders (raster: head 0 (band 3 raster); "
            "pixel_major: head 2 (band 4 pixel-major)); give order=",
        ),
        (lambda: block_indices([], GRIDS[0]), "one pattern for each head, got none"),
        (lambda: block_indices([PATTERNS[4]], TokenGrid(1, 2, 2)), "search again on this grid"),
        (
            lambda: from_block_mask(torch.ones(1, 2, 2, dtype=torch.bool), GRIDS[0]),
            "a table of blocks must be [heads, 1, 1] for grid 3x5x6 in blocks of 128 x 128, got "
            "(1, 2, 2)",
        ),
        (lambda: from_block_mask(torch.ones(1, 1, 1), GRIDS[0]), "mask must be of dtype bool"),
        (
            lambda: from_tags(torch.full((1, 1, 1), PARTIAL, dtype=torch.int8), GRIDS[0]),
            "tags must be int8, -2 for absent or 0..7, got torch.int8 with [-1]",
        ),
    ],
    ids=["orders", "empty", "refused", "shape", "mask", "tags"],
)
def test_wrong_requests_are_named(build, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_list_in_an_order_of_its_own_takes_eight_bytes_a_token_and_five_an_entry():
    """Every head of every layer has one if it is scored by clusters."""
    grid, generator = TokenGrid(4, 10, 10), torch.Generator().manual_seed(0)
    offsets = torch.tensor([0, 5, 80, 200, 399, 400])
    sides = [Cut(torch.randperm(400, generator=generator), offsets) for _ in range(2)]
    tags = torch.where(torch.rand(1, 5, 5, generator=generator) < 0.5, WHOLE, ABSENT)
    blocks = from_cuts(tags.to(torch.int8), grid, (sides[0], sides[1]), (200, 200))
    tensors = [getattr(blocks, field.name) for field in fields(blocks)]
    held = sum(x.untyped_storage().nbytes() for x in tensors if torch.is_tensor(x))
    edges = 8 * 6 + 8 * 6 + 4 * 6 + 8
    assert held == 8 * grid.tokens + 5 * len(blocks.key_block) + edges
    for tokens, side in ((blocks.query_tokens, sides[0]), (blocks.key_tokens, sides[1])):
        pieces = [tokens(index) for index in range(5)]
        assert torch.equal(torch.cat(pieces), side.tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key_block": torch.tensor([0, 4])},
            "key_block must be torch.int32 [2], got torch.int64",
        ),
        ({"key_block": torch.tensor([0, 6], dtype=torch.int32)}, "key_block must lie in 0..5"),
        ({"tag": torch.tensor([0, 8], dtype=torch.int8)}, "tag must lie in -1..7"),
        ({"tag": torch.tensor([0, -1], dtype=torch.int8)}, "a partial block needs patterns"),
        (
            {"row_pointer": torch.tensor([0, 3, 2, 2, 2, 2, 2], dtype=torch.int32)},
            "row_pointer must rise from 0 to 2",
        ),
        ({"key_offsets": torch.arange(7) * 17}, "key_offsets must rise from 0 to 90"),
        (
            {"permutation": torch.zeros(90, dtype=torch.int64)},
            "permutation must hold every token once",
        ),
        (
            {"key_permutation": torch.zeros(90, dtype=torch.int64)},
            "key_permutation must hold every token once",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_lists_that_kernels_would_trip_over_are_refused(change: dict[str, Any], message: str):
    mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 4] = True
    blocks = from_block_mask(mask, GRIDS[0], None, 16, 16)
    with pytest.raises(ValueError, match=re.escape(f"not a list of blocks: {message}")):
        replace(blocks, **change)
    # Nor are they by another list's being sound, unless that is what it says of itself.
    with pytest.raises(ValueError, match=re.escape(f"not a list of blocks: {message}")):
        replace(blocks, **change, sound=blocks)


@pytest.mark.parametrize("order", [raster(), tile(2, 3, 4)], ids=str)
def test_a_list_that_is_cut_as_another_is_the_one_from_the_table(order: TokenOrder):
    grid = TokenGrid(3, 5, 6, text_after=9, valid_text=(9, 2))
    blocks = block_indices([Skip()] * 2, grid, order, 15, 20)
    shape = 3, blocks.query_blocks, blocks.key_blocks
    tags = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0))
    tags = torch.where(tags < WHOLE, ABSENT, tags).to(torch.int8)
    tags[1, 2] = ABSENT
    found, expected = relisted(tags, blocks), from_tags(tags, grid, order, 15, 20)
    assert found.permutation is blocks.permutation
    for one in fields(BlockIndices):
        if one.name != "handle":
            left, right = getattr(found, one.name), getattr(expected, one.name)
            assert torch.equal(left, right) if torch.is_tensor(left) else left == right
    assert found.density() == expected.density()


def test_a_list_of_a_shard_is_no_cut_for_all_tokens():
    blocks = block_indices([Full()], GRIDS[0], queries=Shard(((0, 40),)))
    with pytest.raises(ValueError, match="expected a list of all tokens, got one of a shard"):
        relisted(torch.zeros(1, 1, 1, dtype=torch.int8), blocks)


@pytest.mark.parametrize("pooled", [0, 2])
def test_densities_of_a_table_count_its_blocks(pooled: int):
    grid, order = TokenGrid(3, 5, 6, text_after=9), tile(2, 3, 4)
    cut = block_indices([Skip()], grid, order, 15, 20)
    shape = 2, cut.query_blocks, cut.key_blocks
    whole = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    tags = torch.where(whole, WHOLE, pooled or ABSENT).to(torch.int8)
    area = cut.query_offsets.diff()[:, None] * cut.key_offsets.diff() / grid.tokens**2
    kept, rest = (float((area * x).sum()) / 2 for x in (whole, ~whole))
    expected = (kept, 1.0, kept + rest / 4) if pooled else (kept, kept, kept)
    assert astuple(relisted(tags, cut).density()) == pytest.approx(expected)

"""What a selection keeps of a ranking, by brute force where that is possible."""

import math
import re
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, WHOLE, BlockIndices, block_indices, from_tags
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, gilbert, pixel_major, raster
from dit_sparse.kernels.pattern import Skip
from dit_sparse.kernels.ranking import Ranking, score_blocks
from dit_sparse.kernels.score import Mass, Means
from dit_sparse.kernels.select import (
    Bands,
    Cumulative,
    Grouped,
    Select,
    Tiers,
    TopHead,
    TopRow,
)
from dit_sparse.kernels.selection import key_blocks_of_frames, select_blocks, tier_densities

SELECTS: list[Select] = [
    TopRow(0.3),
    TopHead(0.3),
    Cumulative(0.5),
    Cumulative(0.9, 0.1, 0.4),
    Cumulative(0.9, 0.1, 0.8, crossing=False),
    Bands((0.1, 0.15, 0.15, 0.35), "rank"),
    Bands((0.4, 0.5, 0.6, 0.8), "mass", 0.06),
    Tiers(0.4, 0.5),
    Grouped(0.3),
]
GRIDS = [
    TokenGrid(3, 5, 7),
    TokenGrid(3, 5, 7, text_before=19),
    TokenGrid(2, 5, 9, text_after=4, valid_text=(2,)),
    TokenGrid(5, 4, 7, text_before=1, text_after=33),
]
NAN: Any = float("nan")


def cut(grid: TokenGrid, block_q=16, block_k=8, order: TokenOrder | None = None) -> BlockIndices:
    return block_indices([Skip()] * 3, grid, order or raster(), block_q, block_k)


def line(blocks: int, heads: int = 1) -> BlockIndices:
    """One token a block, no text."""
    return block_indices([Skip()] * heads, TokenGrid(1, 1, blocks), raster(), 1, 1)


def ranked(blocks: BlockIndices, heads: int = 3, spread: float = 2.0, seed: int = 0) -> Ranking:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(heads, blocks.query_blocks, blocks.key_blocks, generator=generator)
    return Ranking((spread * logits).softmax(-1))


def video_of(blocks: BlockIndices) -> tuple[Tensor, Tensor]:
    """Which blocks of queries and of keys are of video, one by one."""

    def video(tokens: Tensor) -> bool:
        return bool(blocks.grid.coordinates(tokens)[0][0] >= 0)

    return (
        torch.tensor([video(blocks.query_tokens(i)) for i in range(blocks.query_blocks)]),
        torch.tensor([video(blocks.key_tokens(j)) for j in range(blocks.key_blocks)]),
    )


def video_part(table: Tensor, blocks: BlockIndices) -> Tensor:
    rows, columns = video_of(blocks)
    return table[:, rows][:, :, columns]


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_AD5_text_is_always_whole_and_outside_the_quota(select: Select, grid: TokenGrid):
    blocks = cut(grid)
    ranking = ranked(blocks)
    tags = select_blocks(select, ranking, blocks)
    rows, columns = video_of(blocks)
    assert tags.dtype == torch.int8
    assert (tags[:, ~rows] == WHOLE).all()
    assert (tags[:, :, ~columns] == WHOLE).all()
    from_tags(tags, grid, raster(), 16, 8)
    # The share of text decides nothing about video.
    share = ranking.share.clone()
    share[:, ~rows] = share[:, ~rows].flip(-1)
    share[:, :, ~columns] = 0.9
    assert torch.equal(select_blocks(select, Ranking(share), blocks), tags)


@pytest.mark.parametrize("select", SELECTS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_G8_forced_blocks_are_whole_and_every_row_sees_something(select: Select, grid: TokenGrid):
    blocks = cut(grid)
    ranking = ranked(blocks)
    free = select_blocks(select, ranking, blocks)
    assert (free != ABSENT).any(-1).all()
    forced = torch.rand(free.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    tags = select_blocks(select, Ranking(ranking.share, forced), blocks)
    assert torch.equal(tags, free.masked_fill(forced, WHOLE))


@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_G8_the_lowest_index_wins_among_equals(select: Select):
    blocks = line(40)
    tags = select_blocks(select, Ranking(torch.full((1, 40, 40), 1 / 40)), blocks)[0]
    level = torch.where(tags == ABSENT, 9, tags)
    if isinstance(select, TopHead):
        assert (tags[:, 0] == WHOLE).all()
        assert (level.flatten()[: 40 * 11] == WHOLE).all()
    elif isinstance(select, Grouped):
        assert (level.diff() >= 0).all()
    else:
        assert (level.diff() >= 0).all()
        assert (level == level[0]).all()


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_AD2_G8_rows_keep_the_same_count(grid: TokenGrid, density: float):
    blocks = cut(grid)
    tags = video_part(select_blocks(TopRow(density), ranked(blocks), blocks), blocks)
    count = max(1, round(density * tags.shape[-1]))
    assert ((tags == WHOLE).sum(-1) == count).all()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_AD3_no_other_rows_of_the_same_count_keep_more(count: int):
    blocks = line(6)
    share = ranked(blocks, spread=3.0).share
    kept = select_blocks(TopRow(count / 6), Ranking(share), blocks) == WHOLE
    recall = (share * kept).sum(-1)
    others = torch.stack(
        [share[..., list(chosen)].sum(-1) for chosen in combinations(range(6), count)]
    )
    torch.testing.assert_close(recall, others.amax(0))


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_top_head_keeps_the_largest_of_the_head_and_the_best_of_every_row(density: float):
    blocks = line(12)
    share = ranked(blocks, spread=4.0).share
    kept = select_blocks(TopHead(density), Ranking(share), blocks) == WHOLE
    assert (kept.sum((1, 2)) == max(12, round(density * 144))).all()
    for head in range(3):
        best = set(enumerate(share[head].argmax(-1).tolist()))
        rest = sorted(
            (-float(share[head, i, j]), i, j)
            for i in range(12)
            for j in range(12)
            if (i, j) not in best
        )
        expected = best | {(i, j) for _, i, j in rest[: max(12, round(density * 144)) - 12]}
        assert {(i, j) for i, j in kept[head].nonzero().tolist()} == expected


@pytest.mark.parametrize("mass", [0.05, 0.5, 0.95, 1.0])
@pytest.mark.parametrize(("floor", "cap"), [(0.0, 1.0), (0.05, 0.17), (0.5, 0.5), (0.0, 0.01)])
@pytest.mark.parametrize("crossing", [True, False], ids=["paper", "repo"])
def test_AS1_the_fewest_blocks_that_reach_the_mass_within_limits(
    mass: float, floor: float, cap: float, crossing: bool
):
    """The one that reaches it included; the published code leaves it out."""
    blocks = line(29)
    share = ranked(blocks).share
    kept = select_blocks(Cumulative(mass, floor, cap, crossing), Ranking(share), blocks) == WHOLE
    least, most = max(1, math.ceil(floor * 29)), max(1, math.floor(cap * 29))
    for head in range(3):
        for row in range(29):
            ordered = share[head, row].double().sort(descending=True)
            sums = ordered.values.cumsum(0) / ordered.values.sum()
            fewest = 29 if mass == 1 else next(n for n in range(1, 30) if sums[n - 1] >= mass)
            count = min(max(fewest - (not crossing), least), most)
            assert set(kept[head, row].nonzero()[:, 0].tolist()) == set(
                ordered.indices[:count].tolist()
            )


def test_AS1_a_mass_that_is_reached_exactly_needs_no_more_blocks():
    share = torch.tensor([0.1, 0.4, 0.2, 0.3]).expand(1, 4, 4)
    kept = select_blocks(Cumulative(0.7), Ranking(share), line(4)) == WHOLE
    assert kept[0, 0].tolist() == [False, True, False, True]
    kept = select_blocks(Cumulative(0.71), Ranking(share), line(4)) == WHOLE
    assert kept[0, 0].tolist() == [False, True, True, True]
    for mass, expected in ((0.7, [1]), (0.71, [1, 3]), (0.4, [1]), (1.0, [1, 2, 3])):
        repo = Cumulative(mass, crossing=False)
        kept = select_blocks(repo, Ranking(share), line(4)) == WHOLE
        assert kept[0, 0].nonzero()[:, 0].tolist() == expected


def test_G8_SP1_all_of_the_mass_is_all_blocks_and_more_is_more():
    blocks = line(20)
    share = ranked(blocks, spread=30.0).share  # with shares of zero
    assert (share == 0).any()
    assert (select_blocks(Cumulative(1.0), Ranking(share), blocks) == WHOLE).all()
    for kinds in (Cumulative, TopRow, TopHead):
        kept = torch.zeros_like(share, dtype=torch.bool)
        for amount in (0.1, 0.25, 0.6, 0.9, 1.0):
            more = select_blocks(kinds(amount), Ranking(share), blocks) == WHOLE
            assert (more | ~kept).all()
            kept = more
        assert kept.all()


def test_rows_without_attention_keep_all_within_the_cap():
    share = torch.zeros(1, 10, 10)
    assert (select_blocks(Cumulative(0.5), Ranking(share), line(10)) == WHOLE).all()
    for crossing in (True, False):
        capped = Cumulative(0.5, 0.0, 0.3, crossing)
        kept = select_blocks(capped, Ranking(share), line(10)) == WHOLE
        assert (kept.sum(-1) == 3).all()


@pytest.mark.parametrize(
    ("bounds", "blocks", "density"),
    [
        ((0.10, 0.15, 0.15, 0.35), 20, 0.15),
        ((0.05, 0.15, 0.25, 0.50), 20, 0.15625),
        ((0.05, 0.15, 0.25, 0.50), 60, 0.15625),
        ((0.0, 0.0, 0.0, 1.0), 20, 0.125),
    ],
)
def test_PS5_densities_of_the_published_quotas(bounds: Any, blocks: int, density: float):
    geometry = block_indices([Skip()], TokenGrid(1, 16, blocks), raster(), 16, 16)
    ranking = ranked(geometry, 1)
    tags = select_blocks(Bands(bounds, "rank"), ranking, geometry)
    assert from_tags(tags, geometry.grid, None, 16, 16).density().weighted == density
    # Bands are a partition of the sorted list.
    order = ranking.share.argsort(-1, descending=True)
    levels = tags.gather(-1, order)
    levels = torch.where(levels == ABSENT, 9, levels)
    assert (levels.diff() >= 0).all()
    for level, (low, high) in enumerate(zip((0.0, *bounds), bounds, strict=False)):
        assert ((levels == level).sum(-1) == round(high * blocks) - round(low * blocks)).all()


@pytest.mark.parametrize("least", [0.0, 0.06, 0.3])
def test_PS5_bands_by_mass_are_cumulative(least: float):
    bounds, blocks = (0.4, 0.5, 0.6, 0.8), line(31)
    share = ranked(blocks).share
    tags = select_blocks(Bands(bounds, "mass", least), Ranking(share), blocks)
    for head in range(3):
        for row in range(31):
            ordered = share[head, row].double().sort(descending=True)
            before = (ordered.values.cumsum(0) - ordered.values) / ordered.values.sum()
            for place, index in enumerate(ordered.indices.tolist()):
                level = sum(bool(before[place] >= bound) for bound in bounds)
                level = 0 if place < math.ceil(least * 31) else level
                assert tags[head, row, index] == (ABSENT if level == 4 else level)


def recall_of(concentrated: int, heads: int) -> Tensor:
    return torch.tensor([0.9 + i / 1000 for i in range(concentrated)] + [0.5] * heads)[:heads]


@pytest.mark.parametrize(
    ("heads", "sparsity", "concentrated", "average"),
    [
        (24, 0.8, 5, 0.8),
        (40, 0.8, 20, 0.8),
        (40, 0.8, 33, 0.8),
        (1, 0.8, 1, 0.8),
        (9, 0.5, 0, 0.5),
    ],
)
def test_AD4_tiers_keep_the_average(
    heads: int, sparsity: float, concentrated: int, average: float
):
    densities = tier_densities(Tiers(1 - sparsity), recall_of(concentrated, heads))
    assert 1 - densities.mean() == pytest.approx(average)
    n = min(concentrated, heads // 2)
    torch.testing.assert_close(
        densities.sort().values,
        torch.tensor(
            [(1 - sparsity) / 2] * n
            + [1 - sparsity] * (heads - 2 * n)
            + [1.5 * (1 - sparsity)] * n
        ).double(),
    )


def test_AD4_above_two_thirds_the_worst_become_dense_with_a_warning():
    with pytest.warns(UserWarning, match=r"density 0.7 cannot give heads 1.5 times"):
        tiers = Tiers(0.7)
    densities = tier_densities(tiers, recall_of(4, 24))
    assert densities.max() == 1
    assert 1 - densities.mean() == pytest.approx(0.308333, abs=1e-5)


def test_AD4_heads_whose_attention_is_concentrated_keep_half():
    blocks = line(20, heads=4)
    spreads = torch.tensor([0.1, 8.0, 2.0, 0.2])[:, None, None]
    logits = torch.randn(4, 20, 20, generator=torch.Generator().manual_seed(0))
    ranking = Ranking((spreads * logits).softmax(-1))
    kept = select_blocks(Tiers(0.2), ranking, blocks) == WHOLE
    assert kept.sum(-1).unique(dim=1).tolist() == [[6], [2], [4], [4]]


def test_SD2_each_group_has_its_own_quota():
    grid = TokenGrid(5, 4, 8, text_before=20)
    blocks = cut(grid)
    share = ranked(blocks).share
    first = torch.tensor(
        [bool((grid.coordinates(blocks.key_tokens(j))[0] == 0).any()) for j in range(23)]
    )
    assert torch.equal(key_blocks_of_frames(blocks, 1), first)
    share[..., first] += 5.0  # which would take the whole quota
    tags = select_blocks(Grouped(0.3), Ranking(share), blocks)
    rows, columns = video_of(blocks)
    for group in (first, ~first & columns):
        inside = tags[:, rows][:, :, group]
        count = max(1, round(0.3 * int(group.sum())))
        assert ((inside == WHOLE).sum(-1) == count).all()
        best = share[:, rows][:, :, group].topk(count).indices
        assert (inside.gather(-1, best) == WHOLE).all()


def test_SD2_one_group_is_no_group():
    for order, grid in ((raster(), TokenGrid(1, 12, 16)), (pixel_major(), TokenGrid(8, 3, 5))):
        blocks = cut(grid, order=order)
        assert key_blocks_of_frames(blocks, 1).all()
        ranking = ranked(blocks)
        expected = select_blocks(TopRow(0.3), ranking, blocks)
        assert torch.equal(select_blocks(Grouped(0.3), ranking, blocks), expected)


def test_SP2_blocks_that_are_not_alike_make_all_of_it_dense(operands):
    grid = TokenGrid(3, 5, 7, text_before=9)
    query, key, _ = operands(grid.tokens, 3)
    blocks = cut(grid, order=gilbert())
    ranking = score_blocks(Means(1.5), query, key, blocks)
    assert (select_blocks(TopRow(0.1), ranking, blocks) == WHOLE).all()


def test_AD6_a_drift_that_a_block_shares_changes_nothing_but_one_within_it_can(operands):
    grid = TokenGrid(3, 5, 7)
    query, key, _ = operands(grid.tokens, 3, batch=1, spread=2.0)
    logits = query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1) / 40**0.5
    lse = logits.logsumexp(-1).float()
    blocks = cut(grid)

    def kept(lse: Tensor) -> Tensor:
        ranking = score_blocks(Mass(None), query, key, blocks, lse=lse)
        return torch.stack(
            [select_blocks(select, ranking, blocks) for select in (TopRow(0.3), TopHead(0.3))]
        )

    block = torch.empty(grid.tokens, dtype=torch.int64)
    for i in range(blocks.query_blocks):
        block[blocks.query_tokens(i)] = i
    generator = torch.Generator().manual_seed(0)
    by_block = 4 * torch.randn(blocks.query_blocks, generator=generator)
    by_row = 4 * torch.randn(grid.tokens, generator=generator)
    assert torch.equal(kept(lse + by_block[block]), kept(lse))
    assert not torch.equal(kept(lse + by_row), kept(lse))


@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_a_ranking_of_other_blocks_is_refused(select: Select):
    with pytest.raises(ValueError, match=r"must be \[heads, 4, 4\] for grid 1x1x4 in blocks of"):
        select_blocks(select, Ranking(torch.zeros(1, 4, 5)), line(4))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopRow(0), "density must be in (0, 1], got 0"),
        (lambda: TopHead(1.1), "density must be in (0, 1], got 1.1"),
        (lambda: Grouped(NAN), "density must be in (0, 1], got nan"),
        (lambda: Tiers(-1), "density must be in (0, 1], got -1"),
        (lambda: Tiers(0.2, 2), "recall must be in 0..1, got 2"),
        (lambda: Cumulative(0), "mass must be in (0, 1], got 0"),
        (lambda: Cumulative(0.5, 0.3, 0.2), "floor and cap must rise within 0..1, got floor=0.3"),
        (
            lambda: Bands((0.2, 0.1, 0.3, 0.4), "rank"),
            "bounds must be four numbers rising in 0..1",
        ),
        (
            lambda: Bands((0.0, 0.0, 0.0, 0.0), "rank"),
            "the last above 0, got (0.0, 0.0, 0.0, 0.0)",
        ),
        (lambda: Bands((0.1, 0.1, 0.1, 2), "rank"), "bounds must be four numbers rising in 0..1"),
        (lambda: Bands((0.1, 0.1, 0.1, 1), "rank", 0.1), "least 0.1 came with by='rank'; raise"),
        (lambda: Bands((0.1, 0.1, 0.1, 1), NAN), "by must be 'rank' or 'mass', got nan"),
    ],
)
def test_wrong_selections_are_named(build, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()

"""The blocks of clusters (Sparse VideoGen 2), against the definition token by token in float64."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import flex
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.clustered_blocks import (
    Centroids,
    centroid_bytes,
    cluster_cost,
    clustered_blocks,
)
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.kmeans import Clusters, kmeans
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.ranking import rank_clusters
from dit_sparse.kernels.recall import block_recall
from dit_sparse.kernels.score import Clustered, Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import Bands, Cumulative, Grouped, Tiers, TopHead, TopRow

SCORE = Clustered(5, 9, first=4, again=2)
PATTERN = Scored(SCORE, Cumulative(0.6, 0.1))
SELECTS = [
    Cumulative(0.6, 0.1),
    Cumulative(1.0),
    TopRow(0.3),
    TopHead(0.3),
    Tiers(0.4),
    Bands((0.1, 0.3, 0.4, 0.6), "mass"),
]
GRIDS = [
    TokenGrid(3, 5, 7),
    TokenGrid(3, 5, 7, text_before=9, text_after=5),
    TokenGrid(3, 5, 7, text_after=20, valid_text=(20, 3)),
    TokenGrid(3, 5, 7, text_before=11, valid_text=(0, 11)),
]
Operands = tuple[Tensor, Tensor, Tensor]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
BACKENDS_HERE = [b.name for b in BACKENDS if b.name not in ("natten", "flex", "triton")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def is_video(grid: TokenGrid) -> Tensor:
    video = torch.zeros(grid.tokens, dtype=torch.bool)
    video[grid.text_before : grid.text_before + grid.video] = True
    return video


def of_head(head: int, query: Tensor, key: Tensor, value: Tensor) -> Operands:
    return query[:, :, [head]], key[:, :, [head]], value[:, :, [head]]


def doubled(own: Operands) -> Operands:
    return own[0].double(), own[1].double(), own[2].double()


def listed(blocks: BlockIndices) -> Tensor:
    """Pairs of tokens in whole blocks of a list of one head, bool `[tokens, tokens]`."""
    seen = torch.zeros(blocks.grid.tokens, blocks.grid.tokens, dtype=torch.bool)
    for row in range(blocks.query_blocks):
        for column, tag in blocks.entries(0, row):
            if tag == WHOLE:
                seen[blocks.query_tokens(row)[:, None], blocks.key_tokens(column)] = True
    return seen


def clusters_of(
    pattern: Scored, query: Tensor, key: Tensor, grid: TokenGrid
) -> tuple[Clusters, Clusters]:
    video, score = is_video(grid), pattern.score
    assert isinstance(score, Clustered)
    return (
        kmeans(query[:, video], score.queries, score.first),
        kmeans(key[:, video], score.keys, score.first),
    )


def shares(query: Tensor, key: Tensor, queries: Clusters, keys: Clusters, head: int) -> Tensor:
    """Softmax over clusters of keys of mean q . mean k, times their number of keys, in float64,
    averaged over the batch; `query` and `key` of video alone."""
    table = torch.zeros(queries.size.shape[1], keys.size.shape[1], dtype=torch.float64)
    for sample in range(len(query)):
        for a in range(len(table)):
            q = query[sample, queries.label[head] == a, head].double()
            row = torch.zeros(table.shape[1], dtype=torch.float64)
            for b in range(table.shape[1]):
                k = key[sample, keys.label[head] == b, head].double()
                if len(q) and len(k):
                    logit = q.mean(0) @ k.mean(0) / query.shape[-1] ** 0.5
                    row[b] = len(k) * logit.exp()
            table[a] += row / row.sum() if row.sum() else 0
    return table / len(query)


def top_p(table: Tensor, mass: float, floor: float) -> Tensor:
    """Clusters by falling share until they hold `mass`, that which reaches it included."""
    kept = torch.zeros_like(table, dtype=torch.bool)
    for a, row in enumerate(table):
        held = 0.0
        for place, b in enumerate(row.argsort(descending=True, stable=True).tolist()):
            if held >= mass * float(row.sum()) and place >= floor * len(row):
                break
            kept[a, b] = True
            held += float(row[b])
    return kept


@every_grid
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [4, 128])
def test_the_pairs_are_those_of_the_clusters_that_the_definition_keeps(
    grid: TokenGrid, dtype: torch.dtype, block: int, operands
) -> None:
    query, key, _ = operands(grid.tokens, 3, 16, spread=1.5, dtype=dtype)
    video = is_video(grid)
    lists, _ = clustered_blocks(PATTERN, query, key, grid, block)
    assert len(lists) == 3
    queries, keys = clusters_of(PATTERN, query, key, grid)
    for head, blocks in enumerate(lists):
        table = shares(query[:, video], key[:, video], queries, keys, head)
        kept = top_p(table, 0.6, 0.1)
        expected = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
        expected[video[:, None] & video] = kept[queries.label[head]][:, keys.label[head]].flatten()
        assert torch.equal(listed(blocks), expected)
        assert 0.1 < float(expected.double().mean()) < 0.9
        assert blocks.density().element == pytest.approx(float(expected.double().mean()))


@every_grid
@pytest.mark.parametrize("block", [4, 128])
def test_S23_blocks_are_runs_of_one_cluster_and_hold_every_token_once(
    grid: TokenGrid, block: int, operands
) -> None:
    query, key, _ = operands(grid.tokens, 2, 16)
    # Fewer different tokens than clusters: most clusters are empty.
    query, key = (x[:, torch.arange(grid.tokens) % 4] for x in (query, key))
    video = is_video(grid)
    lists, _ = clustered_blocks(PATTERN, query, key, grid, block)
    queries, keys = clusters_of(PATTERN, query, key, grid)
    for head, blocks in enumerate(lists):
        for clusters, tokens_of, number in (
            (queries, blocks.query_tokens, blocks.query_blocks),
            (keys, blocks.key_tokens, blocks.key_blocks),
        ):
            assert (clusters.size[head] == 0).any()
            pieces = [tokens_of(index) for index in range(number)]
            assert torch.equal(torch.cat(pieces).sort().values, torch.arange(grid.tokens))
            label = torch.full((grid.tokens,), -1)
            label[video] = clusters.label[head]
            for piece in pieces:
                assert 1 <= len(piece) <= block
                assert len(label[piece].unique()) == 1
                # Padding is told by place: text before and after stays where it is.
                assert video[piece].all() or torch.equal(piece, piece.sort().values)
        assert blocks.order is None
        for place in (blocks.permutation, blocks.key_permutation):
            assert torch.equal(place[~video].long(), torch.arange(grid.tokens)[~video])


@every_grid
@pytest.mark.parametrize("backend", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("select", SELECTS, ids=str)
def test_every_backend_attends_to_them(
    grid: TokenGrid, backend: str, dtype: torch.dtype, select: Any, operands, masked_attention
) -> None:
    query, key, value = operands(grid.tokens, 3, 24, spread=1.5, dtype=dtype)
    lists, _ = clustered_blocks(replace(PATTERN, select=select), query, key, grid, 16)
    real = grid.real(2)[:, None, None]
    for head, blocks in enumerate(lists):
        own = of_head(head, query, key, value)
        if (blocks.tag > WHOLE).any():
            if backend != "gather":
                pooled, _ = sparse_attention(*own, blocks, backend=backend)
                expected, _ = sparse_attention(*doubled(own), blocks, backend="reference")
                error = (pooled.double() - expected).norm() / expected.norm()
                assert error < TOLERANCE[dtype]
            continue
        output, lse = sparse_attention(*own, blocks, backend=backend)
        expected, true_lse = masked_attention(*own, listed(blocks) & real)
        assert (output.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
        torch.testing.assert_close(lse.double(), true_lse, atol=TOLERANCE[dtype], rtol=1e-2)


def test_what_is_compiled_for_each_shape_refuses_them(operands) -> None:
    query, key, _ = operands(GRIDS[0].tokens, 1, 16)
    (blocks,), _ = clustered_blocks(PATTERN, query, key, GRIDS[0], 16)
    assert flex._refusal(blocks) == (
        "each list of clusters has another number of blocks, and would be compiled anew"
    )


@every_grid
@pytest.mark.parametrize("batch", [1, 2])
def test_S21_all_of_the_mass_is_dense_attention(
    grid: TokenGrid, batch: int, operands, masked_attention
) -> None:
    if batch == 1 and grid.valid_text is not None:
        grid = replace(grid, valid_text=grid.valid_text[1:])
    query, key, value = operands(grid.tokens, 2, 16, batch=batch)
    dense = masked_attention(query, key, value, grid.real(batch)[:, None, None])
    everything = replace(PATTERN, select=Cumulative(1.0))
    lists, _ = clustered_blocks(everything, query, key, grid, 8)
    for head, blocks in enumerate(lists):
        own = of_head(head, query, key, value)
        assert blocks.density().block == 1
        output, lse = sparse_attention(*own, blocks)
        torch.testing.assert_close(output.double(), dense[0][:, :, [head]], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse.double(), dense[1][:, [head]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_S21_clusters_of_one_token_rank_as_dense_attention_does(
    grid: TokenGrid, operands, masked_attention
) -> None:
    query, key, value = operands(grid.tokens, 2, 16, batch=1)
    video = is_video(grid)
    single = Scored(Clustered(1000, 1000, first=2), Cumulative(0.7))
    queries, keys = clusters_of(single, query, key, grid)
    assert (queries.size == 1).all()
    assert (keys.size == 1).all()
    share = rank_clusters(queries, keys, 0.25).share
    for head in range(2):
        logits = query[0, video, head].double() @ key[0, video, head].double().T / 4
        weights = logits.softmax(-1)
        came = share[head][queries.label[head]][:, keys.label[head]].double()
        torch.testing.assert_close(came, weights, atol=1e-6, rtol=1e-5)
        blocks = clustered_blocks(single, query, key, grid, 16)[0][head]
        held = (weights * listed(blocks)[video][:, video]).sum(-1)
        assert (held >= 0.7 - 1e-5).all()
        # The least that holds it: without its smallest token a row holds less.
        least = torch.where(listed(blocks)[video][:, video], weights, 1).amin(-1)
        assert (held - least < 0.7 + 1e-5).all()
    everything = replace(single, select=Cumulative(1.0))
    expected, _ = masked_attention(query, key, value, torch.ones(1, dtype=torch.bool))
    for head, blocks in enumerate(clustered_blocks(everything, query, key, grid, 16)[0]):
        own = of_head(head, query, key, value)
        output, _ = sparse_attention(*own, blocks)
        torch.testing.assert_close(output.double(), expected[:, :, [head]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_S22_the_estimate_is_exact_where_the_tokens_of_a_cluster_are_alike(
    batch: int, dtype: torch.dtype
) -> None:
    grid, heads = TokenGrid(3, 5, 8, text_after=6), 2
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(2, batch, 6, heads, 16, generator=generator, dtype=torch.float64)
    # Clusters of unlike sizes: a share without them would be wrong.
    which = torch.tensor([0] * 60 + [1] * 30 + [2] * 15 + [3] * 10 + [4] * 4 + [5])
    planted = torch.stack([which[torch.randperm(120, generator=generator)] for _ in range(4)])
    query, key = (
        torch.stack([side[:, planted[2 * s + h], h] for h in range(heads)], 2)
        for s, side in enumerate(tokens)
    )
    query, key = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 6)).to(dtype) for x in (query, key))
    # Begun at every token: no planted cluster, however small, goes without a centroid.
    score = Clustered(120, 120, first=3)
    queries, keys = clusters_of(Scored(score, Cumulative(0.5)), query, key, grid)
    share = rank_clusters(queries, keys, 0.25).share.double()
    video = is_video(grid)
    for head in range(heads):
        exact = torch.zeros(120, 120, dtype=torch.float64)
        for sample in range(batch):
            logits = query[sample, video, head].double() @ key[sample, video, head].double().T / 4
            exact.index_add_(1, keys.label[head], logits.softmax(-1) / batch)
        came = share[head][queries.label[head]]
        torch.testing.assert_close(came, exact, atol=1e-6, rtol=1e-4)


def test_S23_branches_go_on_from_centroids_of_their_own(operands) -> None:
    grid = GRIDS[1]
    branches = [operands(grid.tokens, 2, 16, seed=seed)[:2] for seed in (1, 2)]
    alone = []
    for query, key in branches:
        _, last = clustered_blocks(PATTERN, query, key, grid, 16)
        alone.append(clustered_blocks(PATTERN, 1.1 * query, key, grid, 16, last=last)[0])
    kept: list[Centroids | None] = [None, None]
    for step in range(2):
        for branch, (query, key) in enumerate(branches):
            lists, kept[branch] = clustered_blocks(
                PATTERN, (1 + 0.1 * step) * query, key, grid, 16, last=kept[branch]
            )
            if step:
                for came, expected in zip(lists, alone[branch], strict=True):
                    assert torch.equal(came.permutation, expected.permutation)
                    assert torch.equal(came.key_block, expected.key_block)
    # Another branch's would lead elsewhere.
    query, key = branches[0]
    other, _ = clustered_blocks(PATTERN, query, key, grid, 16, last=kept[1])
    assert any(
        not torch.equal(a.permutation, b.permutation) for a, b in zip(other, alone[0], strict=True)
    )


def test_a_clustering_that_goes_on_takes_fewer_iterations(
    operands, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, asked = GRIDS[0], []

    def spied(tokens: Tensor, clusters: int, iterations: int, centroid: Tensor | None) -> Clusters:
        asked.append((clusters, iterations, centroid is not None))
        return kmeans(tokens, clusters, iterations, centroid)

    monkeypatch.setattr("dit_sparse.kernels.clustered_blocks.kmeans", spied)
    query, key, _ = operands(grid.tokens, 1, 16)
    _, last = clustered_blocks(PATTERN, query, key, grid, 16)
    clustered_blocks(PATTERN, query, key, grid, 16, last=last)
    assert asked == [(5, 4, False), (9, 4, False), (5, 2, True), (9, 2, True)]
    assert last.bytes == centroid_bytes(SCORE, grid, 2, 16) == (5 + 9) * 2 * 16 * 2


def test_planted_clusters_are_what_is_attended_to() -> None:
    grid = TokenGrid(4, 6, 10, text_before=7)
    generator = torch.Generator().manual_seed(11)
    codes = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=-1)
    rows, columns = (torch.randint(0, 8, (240,), generator=generator) for _ in range(2))
    text = torch.randn(2, 1, 7, 1, 32, generator=generator)
    query, key = (
        torch.cat([text[side], 12 * codes[which][None, :, None]], 1)
        for side, which in enumerate((rows, columns))
    )
    pattern = Scored(Clustered(30, 30, first=10), Cumulative(0.9))
    (blocks,), _ = clustered_blocks(pattern, query, key, grid, 16)
    same = rows[:, None] == columns
    video = is_video(grid)
    seen = listed(blocks)[video][:, video]
    assert seen[same].double().mean() > 0.89
    assert not seen[~same].any()
    assert blocks.density().block < 0.25
    assert block_recall(query, key, blocks) > 0.9


def test_it_is_the_same_twice_and_draws_no_random_number(operands) -> None:
    grid = GRIDS[1]
    query, key, _ = operands(grid.tokens, 2, 16)
    state = torch.random.get_rng_state()
    first, again = (clustered_blocks(PATTERN, query, key, grid, 16)[0] for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for came, expected in zip(first, again, strict=True):
        for name in ("permutation", "key_permutation", "row_pointer", "key_block"):
            assert torch.equal(getattr(came, name), getattr(expected, name))


def test_what_is_not_kept_can_be_pooled(operands) -> None:
    grid = GRIDS[1]
    query, key, _ = operands(grid.tokens, 1, 16)
    (plain,), _ = clustered_blocks(PATTERN, query, key, grid, 16)
    (blocks,), _ = clustered_blocks(PATTERN, query, key, grid, 16, pooled=2)
    assert torch.equal(listed(blocks), listed(plain))
    assert blocks.density().block == 1
    assert set(blocks.tag.tolist()) == {WHOLE, 2}


def test_its_cost_is_that_of_distances_and_of_pairs_of_clusters() -> None:
    grid = TokenGrid(10, 10, 10, text_after=24)
    # 2 FLOPs a channel for each token and cluster, 4 for each pair of tokens.
    first = cluster_cost(Clustered(30, 100), grid, again=False)
    assert first == pytest.approx((50 * 1000 * 130 + 30 * 100) / (2 * 1024**2))
    again = cluster_cost(Clustered(30, 100), grid, again=True)
    assert again == pytest.approx((2 * 1000 * 130 + 30 * 100) / (2 * 1024**2))
    few = TokenGrid(1, 2, 2)
    assert cluster_cost(Clustered(), few, again=True) == pytest.approx((2 * 4 * 8 + 16) / 32)


def test_wrong_requests_are_named(operands) -> None:
    grid = GRIDS[0]
    query, key, _ = operands(grid.tokens, 2, 16)
    for score in ({"queries": 0}, {"keys": 0}, {"first": 0}, {"again": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(score))} must be at least 1, got 0"):
            Clustered(**score)
    message = "clusters are an order of their own and belong to no frame, got token_order="
    with pytest.raises(ValueError, match=message + "'gilbert'"):
        Scored(SCORE, TopRow(0.5), "gilbert")
    with pytest.raises(ValueError, match=re.escape(message + "'raster', sink_frames=1")):
        Scored(SCORE, TopRow(0.5), sink_frames=1)
    with pytest.raises(ValueError, match=r"select grouped 0.5; leave the first two out"):
        Scored(SCORE, Grouped(0.5))
    with pytest.raises(ValueError, match="has a list for each head; make them with clustered_bl"):
        scored_blocks(PATTERN, query, key, geometry(raster(), grid, 2, 16))
    with pytest.raises(ValueError, match="expected a pattern scored by clusters, got scored mass"):
        clustered_blocks(Scored(Mass(), TopRow(0.5)), query, key, grid, 16)
    with pytest.raises(ValueError, match=re.escape("query and key must be [batch, 105, heads, ")):
        clustered_blocks(PATTERN, query[:, 1:], key[:, 1:], grid, 16)

"""Shares of blocks against attention written out in float64."""

import re

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import native
from dit_sparse.kernels import ranking as module
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, gilbert, pixel_major, raster, tile
from dit_sparse.kernels.pattern import Full
from dit_sparse.kernels.ranking import score_blocks
from dit_sparse.kernels.sample import sampled_rows
from dit_sparse.kernels.score import BlockScore, Checked, Mass, Means, Random, Sampled

GRIDS = [
    TokenGrid(3, 5, 7),
    TokenGrid(3, 5, 7, text_before=9),
    TokenGrid(2, 5, 9, text_after=21),
    TokenGrid(3, 5, 7, text_before=9, text_after=4),
    TokenGrid(3, 5, 7, text_before=40, valid_text=(17, 40)),
    TokenGrid(3, 5, 7, text_after=40, valid_text=(40, 3)),
]
ORDERS = [raster(), pixel_major(), gilbert(), tile(2, 3, 4)]
SCORES: list[BlockScore] = [Mass(), Mass(None), Sampled(), Sampled(5), Means(0.02), Means(-1.0)]


def cut(grid: TokenGrid, order: TokenOrder | None = None, block_q=16, block_k=24) -> BlockIndices:
    return block_indices([Full()] * 2, grid, order or gilbert(), block_q, block_k)


def logits_of(query: Tensor, key: Tensor, grid: TokenGrid) -> Tensor:
    """float64 `[batch, heads, tokens, tokens]`, -inf for padded keys."""
    logits = query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1)
    logits = logits / query.shape[-1] ** 0.5
    for sample, valid in enumerate(grid.valid_text or ()):
        logits[sample, ..., grid.invalid_text(valid)] = -torch.inf
    return logits


def real(tokens: Tensor, grid: TokenGrid, sample: int) -> Tensor:
    """Those of raster `tokens` that are not padding."""
    if grid.valid_text is None:
        return tokens
    padding = grid.invalid_text(grid.valid_text[sample])
    return tokens[(tokens < padding.start) | (tokens >= padding.stop)]


def averaged(weight: Tensor) -> Tensor:
    """Rows made to sum to 1, then their mean over the samples that have any."""
    share = (weight / weight.sum(-1, keepdim=True)).nan_to_num()
    share = share.mean(0)
    return (share / share.sum(-1, keepdim=True)).nan_to_num()


def expected_mass(score: Mass, logits: Tensor, blocks: BlockIndices) -> Tensor:
    weights = logits.softmax(-1)
    out = logits.new_zeros(*logits.shape[:2], blocks.query_blocks, blocks.key_blocks)
    for i in range(blocks.query_blocks):
        rows = blocks.query_tokens(i)
        if score.rows is not None:
            place = sampled_rows(blocks.query_offsets, score.rows)[i]
            rows = blocks.permutation[place[place >= 0]]
        for j in range(blocks.key_blocks):
            out[:, :, i, j] = weights[:, :, rows][..., blocks.key_tokens(j)].sum((2, 3))
    return averaged(out)


def expected_largest(samples: int, logits: Tensor, blocks: BlockIndices) -> Tensor:
    """Every sample and block by itself."""
    grid = blocks.grid
    out = logits.new_zeros(*logits.shape[:2], blocks.query_blocks, blocks.key_blocks)

    def chosen(tokens: Tensor, sample: int) -> Tensor:
        tokens = real(tokens, grid, sample)
        place = sampled_rows(torch.tensor([0, len(tokens)]), samples)[0]
        return tokens[place[place >= 0]]

    for sample, of_sample in enumerate(logits):
        keys = [chosen(blocks.key_tokens(j), sample) for j in range(blocks.key_blocks)]
        for i in range(blocks.query_blocks):
            part = of_sample[:, chosen(blocks.query_tokens(i), sample)]
            if not part.shape[1]:
                continue
            best = torch.stack(
                [
                    part[..., k].amax(-1) if len(k) else part.new_full(part.shape[:2], -torch.inf)
                    for k in keys
                ],
                -1,
            )
            out[sample, :, i] = (best - best.amax(-1, keepdim=True)).exp().amax(1)
    return averaged(out)


def expected_means(
    similarity: float, query: Tensor, key: Tensor, blocks: BlockIndices
) -> tuple[Tensor, Tensor]:
    grid, heads = blocks.grid, query.shape[2]
    shape = len(query), heads, blocks.query_blocks, blocks.key_blocks
    logits = torch.full(shape, -torch.inf).double()
    forced = torch.zeros(shape, dtype=torch.bool)

    def alike(members: Tensor) -> bool:
        cosines = torch.nn.functional.cosine_similarity(members[:, None], members[None], dim=-1)
        return not len(members) or bool(cosines.mean() > similarity)

    for sample in range(len(query)):
        for head in range(heads):
            queries, keys = query[sample, :, head].double(), key[sample, :, head].double()
            keys = keys - keys[real(torch.arange(grid.tokens), grid, sample)].mean(0)
            for i in range(blocks.query_blocks):
                rows = queries[real(blocks.query_tokens(i), grid, sample)]
                for j in range(blocks.key_blocks):
                    columns = keys[real(blocks.key_tokens(j), grid, sample)]
                    if not alike(rows) or not alike(columns):
                        forced[sample, head, i, j] = True
                    if len(rows) and len(columns) and alike(columns):
                        logit = rows.mean(0) @ columns.mean(0) / query.shape[-1] ** 0.5
                        logits[sample, head, i, j] = logit + torch.tensor(len(columns)).log()
    return averaged(logits.softmax(-1).nan_to_num()), forced.any(0)


@pytest.mark.parametrize("rows", [None, 1, 16])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_AD1_G7_mass_with_a_cached_lse_is_explicit_block_sums(
    grid: TokenGrid, rows: int | None, operands
):
    query, key, _ = operands(grid.tokens, 2, 33)
    logits = logits_of(query, key, grid)
    for order in ORDERS:
        blocks, score = cut(grid, order), Mass(rows)
        found = score_blocks(score, query, key, blocks, lse=logits.logsumexp(-1).float())
        expected = expected_mass(score, logits, blocks).float()
        torch.testing.assert_close(found.share, expected, atol=1e-5, rtol=1e-3)
        assert found.forced is None


def test_SD1_mean_of_the_attention_map_is_mass_by_the_size_of_blocks(operands):
    grid = TokenGrid(4, 4, 8)
    query, key, _ = operands(grid.tokens, 2, batch=1)
    logits = logits_of(query, key, grid)
    blocks = cut(grid, raster(), 16, 32)
    found = score_blocks(Mass(None), query, key, blocks, lse=logits.logsumexp(-1).float())
    pooled = torch.nn.functional.avg_pool2d(logits.softmax(-1), (16, 32))[0]
    torch.testing.assert_close(found.share, pooled.float() * 32, atol=1e-5, rtol=1e-3)


@pytest.fixture(params=["native", "plain"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What operands are made of, to be ranked by the one means or the other."""
    if request.param == "plain":
        return torch.float64
    grid = TokenGrid(1, 1, 1)
    tokens = torch.zeros(1, 1, 1, 1)
    reason = native.supports(AttentionCall(tokens, tokens, tokens, cut(grid), 1.0))
    if reason is not None:
        pytest.skip(reason)
    return torch.float32


@pytest.mark.parametrize("samples", [1, 5, 16, 40])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_sampled_shares_are_their_definition(
    grid: TokenGrid, samples: int, spread: float, dtype: torch.dtype, operands, monkeypatch
):
    query, key, _ = operands(grid.tokens, 2, 33, spread=spread**0.5)
    monkeypatch.setattr(module, "_AT_ONCE", 2 * samples**2 * 9 * 3)  # some rows at a time
    for order in ORDERS:
        blocks = cut(grid, order)
        found = score_blocks(Sampled(samples), query.to(dtype), key.to(dtype), blocks).share
        expected = expected_largest(samples, logits_of(query, key, grid), blocks)
        torch.testing.assert_close(found, expected.float(), atol=1e-6, rtol=1e-5)


def test_AS4_with_all_tokens_sampled_the_score_is_the_maximum_of_the_block(operands):
    grid = TokenGrid(3, 5, 7, text_before=9)
    query, key, _ = operands(grid.tokens, 2, 24, batch=1)
    blocks, logits = cut(grid, raster(), 16, 24), logits_of(query, key, grid)
    best = torch.stack([logits[..., blocks.key_tokens(j)].amax(-1) for j in range(6)], -1)
    weight = (best - logits.amax(-1, keepdim=True)).exp()
    weight = torch.stack(
        [weight[:, :, blocks.query_tokens(i)].amax(2) for i in range(blocks.query_blocks)], 2
    )
    found = score_blocks(Sampled(24), query, key, blocks).share
    torch.testing.assert_close(found, averaged(weight).float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("similarity", [-1.0, 0.02, 0.1])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_means_are_their_definition(
    grid: TokenGrid, similarity: float, dtype: torch.dtype, operands
):
    query, key, _ = operands(grid.tokens, 2, 7)
    key = key + 3.0  # which must not make blocks of keys alike
    blocks = cut(grid)
    found = score_blocks(Means(similarity), query.to(dtype), key.to(dtype), blocks)
    share, forced = expected_means(similarity, query, key, blocks)
    torch.testing.assert_close(found.share, share.float(), atol=1e-6, rtol=1e-5)
    assert found.forced is not None
    assert torch.equal(found.forced, forced)
    assert forced.any() == (similarity > -1)


def test_SP3_means_of_blocks_of_equal_tokens_are_exact(operands):
    grid = TokenGrid(3, 5, 7, text_after=9)
    query, key, _ = operands(grid.tokens, 2)
    blocks = cut(grid, gilbert(), 24, 24)
    for j in range(blocks.key_blocks):
        tokens = blocks.key_tokens(j)
        query[:, tokens], key[:, tokens] = query[:, tokens[:1]], key[:, tokens[:1]]
    logits = logits_of(query, key, grid)
    found = score_blocks(Means(0.9), query, key, blocks)
    torch.testing.assert_close(
        found.share, expected_mass(Mass(None), logits, blocks).float(), atol=1e-5, rtol=1e-4
    )
    assert found.forced is not None
    assert not found.forced.any()


def test_SP2_where_nothing_is_alike_everything_is_forced(operands):
    grid = TokenGrid(3, 5, 7)
    query, key, _ = operands(grid.tokens, 2)
    found = score_blocks(Means(1.5), query, key, cut(grid))
    assert found.forced is not None
    assert found.forced.all()
    assert not found.share.any()


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("grid", GRIDS[4:], ids=str)
def test_G9_padded_text_never_counts(score: BlockScore, grid: TokenGrid, operands):
    query, key, _ = operands(grid.tokens, 2, 33)
    lse = logits_of(query, key, grid).logsumexp(-1).float()
    blocks = cut(grid)
    before = score_blocks(score, query, key, blocks, lse=lse)
    for sample, valid in enumerate(grid.valid_text or ()):
        key[sample, grid.invalid_text(valid)] = 50.0
        if not isinstance(score, Mass):  # its rows of text are visited whole, whatever their share
            query[sample, grid.invalid_text(valid)] = -50.0
    after = score_blocks(score, query, key, blocks, lse=lse)
    assert torch.equal(before.share, after.share)
    if before.forced is not None and after.forced is not None:
        assert torch.equal(before.forced, after.forced)


@pytest.mark.parametrize("score", SCORES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(score: BlockScore, dtype: torch.dtype, operands):
    grid = GRIDS[3]
    query, key, _ = operands(grid.tokens, 2, 33, dtype=dtype)
    lse = logits_of(query, key, grid).logsumexp(-1).float()
    blocks = cut(grid)
    low = score_blocks(score, query, key, blocks, lse=lse)
    high = score_blocks(score, query.float(), key.float(), blocks, lse=lse)
    assert low.share.dtype == torch.float32
    torch.testing.assert_close(low.share, high.share, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("score", SCORES, ids=str)
def test_strides_do_not_matter_and_the_batch_is_averaged(score: BlockScore, operands):
    grid = GRIDS[2]
    query, key, _ = operands(grid.tokens, 2, 33, batch=3)
    lse = logits_of(query, key, grid).logsumexp(-1).float()
    blocks = cut(grid)
    found = score_blocks(score, query, key, blocks, lse=lse).share
    query, key = (x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in (query, key))
    again = score_blocks(score, query, key, blocks, lse=lse).share
    torch.testing.assert_close(found, again)
    alone = [
        score_blocks(score, *(x[[b]] for x in (query, key)), blocks, lse=lse[[b]]).share
        for b in range(3)
    ]
    if not isinstance(score, Means):
        torch.testing.assert_close(found, torch.stack(alone).mean(0))
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))


def test_the_scale_is_that_of_the_logits(operands):
    grid = GRIDS[0]
    query, key, _ = operands(grid.tokens, 2)
    for score in (Sampled(), Means(-1.0)):
        found = score_blocks(score, query, key, cut(grid), scale=0.5).share
        same = score_blocks(score, query * 0.5 * 40**0.5, key, cut(grid)).share
        torch.testing.assert_close(found, same)
    logits = logits_of(query * 0.5 * 40**0.5, key, grid)
    lse = logits.logsumexp(-1).float()
    found = score_blocks(Mass(), query, key, cut(grid), scale=0.5, lse=lse).share
    expected = expected_mass(Mass(), logits, cut(grid))
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-3)


def test_an_lse_that_is_far_off_makes_no_nan(operands):
    grid = GRIDS[0]
    query, key, _ = operands(grid.tokens, 2)
    for level in (-500.0, torch.inf, -torch.inf):
        lse = torch.full((2, 2, grid.tokens), level)
        assert score_blocks(Mass(), query, key, cut(grid), lse=lse).share.isfinite().all()


def test_what_is_wrong_is_named(operands):
    grid = GRIDS[4]
    query, key, _ = operands(grid.tokens, 2)
    with pytest.raises(ValueError, match=re.escape("score mass of 16 rows needs the LSE of")):
        score_blocks(Mass(), query, key, cut(grid))
    with pytest.raises(ValueError, match=r"must be \[batch, 145, heads, head_dim\]"):
        score_blocks(Sampled(), query[:, :7], key[:, :7], cut(grid))
    with pytest.raises(ValueError, match="valid_text is for a batch of 2, got 1"):
        score_blocks(Sampled(), query[:1], key[:1], cut(grid))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mass(0), "rows must be in 1..64, got 0; None takes them all"),
        (lambda: Sampled(65), "samples must be in 1..64, got 65"),
        (lambda: Means(-2), "similarity must be in -1..2, got -2"),
    ],
)
def test_wrong_scores_are_named(build, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


@pytest.mark.parametrize("cheap", [Sampled(4), Means(0.02)], ids=str)
def test_heads_that_a_cheap_score_misjudges_get_exact_mass(
    cheap: Sampled | Means, operands
) -> None:
    grid = GRIDS[4]
    blocks = block_indices([Full()] * 3, grid, gilbert(), 16, 24)
    query, key, _ = operands(grid.tokens, 3, 17)
    # Sharper heads are harder to judge by few tokens.
    query = query * torch.tensor([0.1, 1.0, 6.0])[:, None]
    lse = logits_of(query, key, grid).logsumexp(-1).float()
    shares = [
        score_blocks(score, query, key, blocks, lse=lse).share
        for score in (cheap, Mass(rows=1), Mass())
    ]
    middle = (shares[0] + shares[1]) / 2
    halves = [
        torch.special.entr(middle).sum(-1) - torch.special.entr(x).sum(-1) for x in shares[:2]
    ]
    apart = torch.stack(halves).mean(0).clamp_min(0).sqrt().mean(-1)
    order = apart.argsort()
    for passed in range(4):
        limits = [0.0, *apart[order].tolist(), 1.0]
        bound = (limits[passed] + limits[passed + 1]) / 2
        found = score_blocks(Checked(cheap, bound), query, key, blocks, lse=lse)
        for head in range(3):
            exact = head in order[passed:].tolist()
            torch.testing.assert_close(found.share[head], shares[2 if exact else 0][head])
            if found.forced is not None and exact:
                assert not found.forced[head].any()


def test_a_random_score_is_its_own_and_always_the_same(operands) -> None:
    grid, blocks = GRIDS[1], cut(GRIDS[1])
    query, key, _ = operands(grid.tokens, 2)
    state = torch.get_rng_state()
    first = score_blocks(Random(3), query, key, blocks).share
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, score_blocks(Random(3), key, query, blocks).share)
    assert not torch.equal(first, score_blocks(Random(4), query, key, blocks).share)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, blocks.query_blocks))

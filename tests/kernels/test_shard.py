"""Queries and keys that are some of the tokens of a grid, on every backend, against attention
written out in float64 over the pairs that the pattern keeps of them."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse.kernels import mass, natten_backend
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.blocks import (
    PARTIAL,
    WHOLE,
    BlockIndices,
    block_indices,
    from_block_mask,
    from_tags,
)
from dit_sparse.kernels.calibration import work_of
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.counts import cut
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.order import TokenOrder, gilbert, pixel_major, raster, tile
from dit_sparse.kernels.pattern import (
    Band,
    Full,
    Neighborhood,
    Skip,
)
from dit_sparse.kernels.recall import block_recall
from dit_sparse.kernels.score import Means
from dit_sparse.kernels.scored_blocks import geometry
from dit_sparse.kernels.shard import Shard
from tests.kernels.shards import (
    GRID,
    HALF,
    PATTERNS,
    RANK,
    draw,
    every_shard,
    held,
    kept_by,
)

NAMES = [backend.name for backend in BACKENDS if backend.name not in ("natten", "flex", "triton")]
every_backend = pytest.mark.parametrize("backend", NAMES)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def assert_close(came, expected, dtype: torch.dtype = torch.float32):
    (output, lse), (true_output, true_lse) = came, expected
    assert output.shape == true_output.shape
    assert output.dtype == dtype
    assert lse.shape == true_lse.shape
    assert not output.isnan().any()
    error = (output.double() - true_output).norm() / true_output.norm().clamp_min(1e-12)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"
    seen = true_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    assert not output.transpose(1, 2)[~seen].any()
    torch.testing.assert_close(
        lse.double()[seen], true_lse[seen], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@every_backend
@every_shard
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("order", [raster(), tile(2, 3, 4), gilbert()], ids=str)
def test_patterns_keep_what_they_keep_of_the_grid(
    backend: str, queries: Shard | None, keys: Shard | None, dtype: torch.dtype,
    order: TokenOrder, operands, masked_attention,
):  # fmt: skip
    of_query, of_key = held(queries, GRID), held(keys, GRID)
    operand = draw(of_query, of_key, len(PATTERNS), operands, dtype)
    blocks = block_indices(PATTERNS, GRID, order, 16, 24, queries=queries, keys=keys)
    expected = masked_attention(*operand, kept_by(PATTERNS, GRID, of_query, of_key))
    assert_close(sparse_attention(*operand, blocks, backend=backend), expected, dtype)


@every_backend
@every_shard
@pytest.mark.parametrize("side", ["text_before", "text_after"])
def test_padded_text_gets_no_mass(
    backend: str, side: str, queries: Shard | None, keys: Shard | None, operands, masked_attention
):
    grid = replace(TokenGrid(3, 5, 7), **{side: 13}, valid_text=(2, 9))
    patterns = [Full(), Neighborhood((2, 3, 3)), Band(9)]
    of_query, of_key = held(queries, grid), held(keys, grid)
    query, key, value = draw(of_query, of_key, 3, operands)
    for sample, valid in enumerate((2, 9)):
        padding = set(range(grid.tokens)[grid.invalid_text(valid)])
        rows = [row for row, token in enumerate(of_key) if token in padding]
        key[sample, rows], value[sample, rows] = 1e4, 1e4
    blocks = block_indices(patterns, grid, tile(2, 2, 3), 16, 8, queries=queries, keys=keys)
    expected = masked_attention(query, key, value, kept_by(patterns, grid, of_query, of_key))
    assert_close(sparse_attention(query, key, value, blocks, backend=backend), expected)


sides = st.integers(1, 5)


@st.composite
def shards(draw, tokens: int) -> Shard | None:
    edges = draw(st.sets(st.integers(0, tokens), max_size=6).map(sorted))
    runs = tuple(zip(edges[::2], edges[1::2], strict=False))
    return Shard(runs) if runs else None


@st.composite
def cases(draw) -> tuple[TokenGrid, Shard | None, Shard | None]:
    text = st.integers(0, 20)
    grid = draw(st.builds(TokenGrid, sides, sides, sides, text, text))
    return grid, draw(shards(grid.tokens)), draw(shards(grid.tokens))


orders = st.one_of(
    st.sampled_from([raster(), pixel_major(), gilbert()]), st.builds(tile, sides, sides, sides)
)


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    order=orders,
    block=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    window=st.tuples(sides, sides, sides),
    half_width=st.integers(0, 40),
)
def test_any_shards_of_any_grid(
    operands, masked_attention, case: tuple[TokenGrid, Shard | None, Shard | None],
    order: TokenOrder, block: tuple[int, int], window: tuple[int, int, int], half_width: int,
):  # fmt: skip
    """Lists as their pairs say, and attention over them on every backend."""
    grid, queries, keys = case
    patterns = [Neighborhood(window), Band(half_width), Full(), Skip()]
    of_query, of_key = held(queries, grid), held(keys, grid)
    kept = kept_by(patterns, grid, of_query, of_key)
    blocks = block_indices(patterns, grid, order, *block, queries=queries, keys=keys)
    visited = 0
    for head, row in itertools.product(range(4), range(blocks.query_blocks)):
        tags = dict(blocks.entries(head, row))
        assert blocks.query_tokens(row).tolist() == [of_query[i] for i in blocks.query_rows(row)]
        for column in range(blocks.key_blocks):
            pairs = kept[0, head][blocks.query_rows(row)][:, blocks.key_rows(column)]
            expected = WHOLE if pairs.all() else PARTIAL if pairs.any() else None
            assert tags.get(column) == expected
            visited += pairs.numel() if column in tags else 0
    total = 4 * len(of_query) * len(of_key)
    assert blocks.density().element == kept.sum() / total
    assert blocks.density().block == visited / total
    for side, largest in ((blocks.query_offsets, block[0]), (blocks.key_offsets, block[1])):
        assert 1 <= side.diff().min() <= side.diff().max() <= largest
    query, key, value = operands(grid.tokens, 4)
    operand = query[:, of_query], key[:, of_key], value[:, of_key]
    exact = masked_attention(*operand, kept)
    for backend in NAMES:
        assert_close(sparse_attention(*operand, blocks, backend=backend), exact)


@every_backend
@every_shard
def test_tables_of_blocks_with_empty_rows(
    backend: str, queries: Shard | None, keys: Shard | None, operands, masked_attention
):
    order, of_query, of_key = tile(2, 3, 4), held(queries, GRID), held(keys, GRID)
    rows, columns = cut(GRID, order, 16, queries), cut(GRID, order, 8, keys)
    shape = 2, len(rows.offsets) - 1, len(columns.offsets) - 1
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0] = False
    blocks = from_block_mask(mask, GRID, order, 16, 8, queries=queries, keys=keys)
    seen = torch.zeros(2, len(of_query), len(of_key), dtype=torch.bool)
    for head, row, column in mask.nonzero().tolist():
        pairs = blocks.query_rows(row)[:, None], blocks.key_rows(column)
        seen[head][pairs] = True
    operand = draw(of_query, of_key, 2, operands)
    expected = masked_attention(*operand, seen)
    assert_close(sparse_attention(*operand, blocks, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "native"])
@every_shard
@pytest.mark.parametrize("valid_text", [None, (5, 0)])
def test_pooled_keys_are_means_with_the_log_of_their_number(
    backend: str, queries: Shard | None, keys: Shard | None,
    valid_text: tuple[int, int] | None, operands,
):  # fmt: skip
    grid = TokenGrid(3, 5, 7, text_after=13, valid_text=valid_text)
    order, of_query, of_key = tile(2, 3, 4), held(queries, grid), held(keys, grid)
    shape = 2, *(len(cut(grid, order, *s).offsets) - 1 for s in ((16, queries), (8, keys)))
    tags = torch.randint(-2, 4, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    tags[tags == -1] = -2
    blocks = from_tags(tags, grid, order, 16, 8, queries=queries, keys=keys)
    query, key, value = draw(of_query, of_key, 2, operands)
    output = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full((2, 2, len(of_query)), -torch.inf, dtype=torch.float64)
    for sample, head, row in itertools.product(range(2), range(2), range(shape[1])):
        own, runs = blocks.query_rows(row), []
        for column, tag in blocks.entries(head, row):
            for run in blocks.key_rows(column).split(2**tag):
                real = grid.real(2)[sample][[of_key[i] for i in run]]
                runs += [run[real]] if real.any() else []
        if runs:
            means = torch.stack([key[sample, run, head].double().mean(0) for run in runs])
            values = torch.stack([value[sample, run, head].double().mean(0) for run in runs])
            logits = query[sample, own, head].double() @ means.T / 40**0.5
            logits += torch.tensor([len(run) for run in runs]).double().log()
            output[sample, own, head] = logits.softmax(-1) @ values
            lse[sample, head, own] = logits.logsumexp(-1)
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, (output, lse))


@every_backend
def test_ranks_put_together_are_one_call(backend: str, operands):
    """Queries side by side, and keys merged by their LSE: as ranks of context parallelism do."""
    patterns = [Neighborhood((2, 3, 3)), Band(11), Skip()]
    query, key, value = operands(GRID.tokens, 3)
    whole = block_indices(patterns, GRID, tile(2, 3, 4), 16, 16)
    output, lse = sparse_attention(query, key, value, whole, backend=backend)
    ranks = [Shard(((0, 40),)), Shard(((40, 80),)), Shard(((80, 118),))]
    parts = []
    for rank in ranks:
        own = slice(*rank.runs[0])
        blocks = block_indices(patterns, GRID, tile(2, 3, 4), 16, 16, queries=rank)
        parts.append(sparse_attention(query[:, own], key, value, blocks, backend=backend))
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), output)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 2), lse)
    parts = []
    for rank in ranks:
        own = slice(*rank.runs[0])
        blocks = block_indices(patterns, GRID, tile(2, 3, 4), 16, 16, keys=rank)
        parts.append(sparse_attention(query, key[:, own], value[:, own], blocks, backend=backend))
    together = merge(parts)
    torch.testing.assert_close(together[0], output)
    torch.testing.assert_close(together[1], lse)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_values_are_left_out_of_shards(backend: str, operands):
    """With blocks that both take at a time, left out as the definition says, else not at all."""
    blocks = block_indices([Full()], GRID, raster(), 16, 8, queries=RANK, keys=HALF)
    query, key, value = draw(held(RANK, GRID), held(HALF, GRID), 1, operands)
    exact = sparse_attention(3 * query, key, value, blocks, backend="reference", pv_skip=-2.0)
    came = sparse_attention(3 * query, key, value, blocks, backend=backend, pv_skip=-2.0)
    torch.testing.assert_close(came[0], exact[0])
    plain = sparse_attention(3 * query, key, value, blocks, backend=backend)
    assert not torch.allclose(plain[0], came[0])
    torch.testing.assert_close(plain[1], came[1])


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("plain", [False, True], ids=["fastest", "plain"])
@every_shard
def test_block_mass_is_exact(
    rows: int | None, plain: bool, queries: Shard | None, keys: Shard | None, operands,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    if plain:
        monkeypatch.setattr(mass.native, "supports", lambda call: "not asked")
    grid = replace(GRID, text_before=0, text_after=13, valid_text=(5, 0))
    blocks = block_indices([Full()] * 2, grid, tile(2, 3, 4), 16, 8, queries=queries, keys=keys)
    query, key, _ = draw(held(queries, grid), held(keys, grid), 2, operands)
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * 0.2
    lse = scores.logsumexp(-1)
    shares = (scores - lse[..., None]).exp() * grid.real(2)[:, None, None, held(keys, grid)]
    found = mass.block_mass(query, key, lse.float(), blocks, scale=0.2, rows=rows)
    for row in range(blocks.query_blocks):
        own = blocks.query_rows(row)
        if rows is not None and len(own) > rows:
            assert found[:, :, row].sum(-1).max() <= rows + 1e-4
            continue
        for column in range(blocks.key_blocks):
            expected = shares[:, :, own][..., blocks.key_rows(column)].sum((-1, -2)).float()
            torch.testing.assert_close(found[:, :, row, column], expected, rtol=1e-4, atol=1e-5)


def test_the_operator_is_what_it_says(operands):
    operator = torch.ops.dit_sparse.sparse_attention.default
    for queries, keys in ((RANK, None), (None, HALF), (RANK, HALF)):
        blocks = block_indices([Band(11)], GRID, None, 16, 16, queries=queries, keys=keys)
        operand = draw(held(queries, GRID), held(keys, GRID), 1, operands)
        results = torch.library.opcheck(
            operator, (*operand, blocks.handle, 0.2, "auto"), raise_exception=False
        )
        assert set(results.values()) == {"SUCCESS"}, results


def test_a_compiled_caller_runs_without_a_break(operands):
    blocks = block_indices([Band(11), Skip()], GRID, None, 16, 16, queries=RANK)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, lse = sparse_attention(2 * query, key, value, blocks)
        return output + lse.transpose(1, 2)[..., None].exp()

    operand = draw(held(RANK, GRID), held(None, GRID), 2, operands)
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*operand), attend(*operand))


def test_work_is_that_of_the_shard():
    blocks = block_indices([Full()] * 2, GRID, None, 16, 16, queries=RANK, keys=HALF)
    assert work_of(blocks).query_blocks == 2 * 42 / 128
    assert work_of(blocks).whole == pytest.approx(2 * 42 * 53 / 128**2)
    assert blocks.density().block == 1


def ones(tokens: int) -> Tensor:
    return torch.ones(1, tokens, 1, 16)


def of_shards() -> BlockIndices:
    return block_indices([Neighborhood((2, 3, 3))], TokenGrid(3, 5, 7), queries=Shard(((0, 50),)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Shard(()), "that hold at least one token, ascending and apart, got ()"),
        (lambda: Shard(((3, 3),)), "ascending and apart, got ((3, 3),)"),
        (lambda: Shard(((5, 9), (8, 12))), "ascending and apart, got ((5, 9), (8, 12))"),
        (lambda: Shard(((-1, 2),)), "ascending and apart, got ((-1, 2),)"),
        (
            lambda: block_indices([Full()], TokenGrid(3, 5, 7), keys=Shard(((0, 3), (99, 106)))),
            "shard 0..2, 99..105 reaches past grid 3x5x7 of 105 tokens",
        ),
        (
            lambda: replace(of_shards(), queries=Shard(((56, 106),))),
            "not a list of blocks: shard 56..105 reaches past grid 3x5x7 of 105 tokens",
        ),
        (
            lambda: replace(of_shards(), queries=None),
            "permutation must be torch.int64 [105], got torch.int64 (50,)",
        ),
        (
            lambda: sparse_attention(ones(105), ones(105), ones(105), of_shards()),
            "the blocks are for 50 queries, 0..49 of grid 3x5x7, got 105; build them with",
        ),
        (
            lambda: sparse_attention(ones(50), ones(50), ones(50), of_shards()),
            "key must have the shape for 105 keys, (1, 105, 1, 16), got (1, 50, 1, 16)",
        ),
        (
            lambda: mass.block_mass(ones(50), ones(50), torch.ones(1, 1, 50), of_shards()),
            "query and key must be (1, 50, 1, 16) and (1, 105, 1, 16) for these blocks, got (1, 5",
        ),
        (
            lambda: block_recall(ones(105), ones(105), of_shards()),
            "recall needs all tokens of a grid, got blocks of a shard of them",
        ),
    ],
    ids=[
        "empty", "empty run", "overlap", "negative", "keys", "replaced", "forgotten", "queries",
        "key", "mass", "recall",
    ],
)  # fmt: skip
def test_wrong_shards_are_named(build, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_scores_of_a_shard_are_refused():
    from dit_sparse.kernels.ranking import score_blocks

    grid, tensor = TokenGrid(3, 5, 7), ones(105)
    assert score_blocks(Means(), tensor, tensor, geometry(raster(), grid, 1, 16))
    with pytest.raises(ValueError, match="scores rank all tokens of a grid, got blocks of a sh"):
        score_blocks(Means(), tensor, tensor, of_shards())


def test_natten_refuses_shards(monkeypatch: pytest.MonkeyPatch):
    from types import SimpleNamespace

    library = SimpleNamespace(HAS_LIBNATTEN=True)
    monkeypatch.setattr(natten_backend.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(natten_backend, "_natten", lambda: library)
    tensor = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 50, 1, 64)
    )
    call = AttentionCall(tensor, tensor, tensor, of_shards(), 1.0)  # pyright: ignore[reportArgumentType]
    expected = "takes all tokens of a grid, got some of its queries or keys"
    assert natten_backend.supports(call) == expected

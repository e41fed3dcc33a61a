"""What sparse attention computes, on every backend, against attention written out in float64."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import gather
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.blocks import BlockIndices, block_indices, from_block_mask, from_tags
from dit_sparse.kernels.columns import Columns, Sink
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster, tile
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.radial import Radial

# Those for other devices have tests of their own.
NAMES = [backend.name for backend in BACKENDS if backend.name not in ("natten", "flex", "triton")]
every_backend = pytest.mark.parametrize("backend", NAMES)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
GRIDS = [
    TokenGrid(2, 5, 7),
    TokenGrid(2, 5, 7, text_before=3),
    TokenGrid(2, 5, 7, text_after=11),
    TokenGrid(2, 5, 7, text_before=3, text_after=11),
]
PATTERNS: list[Pattern] = [
    Full(),
    Skip(),
    Band(11),
    Band(3, "pixel_major"),
    Columns((1, 3), 16, (2, 5, 7)),
    Neighborhood((2, 3, 3)),
    Neighborhood((1, 4, 5), (1, 2, 3)),
    Neighborhood((2, 2, 3), (1, 1, 2), (1, 2, 2)),
    Neighborhood((2, 4, 3), (2, 1, 2), (1, 1, 2), (True, False, True)),
    Band(5, "in_frame"),
    Radial("repo", 0.5),
    AnyOf((Band(5, "pixel_major"), Sink())),
    AnyOf((Neighborhood((1, 3, 3)), Radial(), Columns((1,), 16, (2, 5, 7)))),
]


def skip_refused(backend: str, what: object):
    """Skip what a backend says that it does not take."""
    kind = what.windows(GRIDS[0]) if isinstance(what, Pattern) else what
    if (backend, kind) in {("gather", "pooled"), ("native", torch.float64)}:
        pytest.skip(f"{backend} refuses {what}")


def assert_close(came, expected, dtype: torch.dtype):
    (output, lse), (true_output, true_lse) = came, expected
    assert output.dtype == dtype
    assert not output.isnan().any()
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    error = (output.double() - true_output).norm() / true_output.norm().clamp_min(1e-12)
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"
    seen = true_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    scale = true_lse[seen].abs().clamp_min(1)
    lse_error = ((lse[seen].double() - true_lse[seen]).abs() / scale).max() if seen.any() else 0
    assert lse_error <= TOLERANCE[dtype]
    assert not output.transpose(1, 2)[~seen].any()


def visible(patterns: list[Pattern], grid: TokenGrid) -> torch.Tensor:
    return torch.stack([pattern.mask(grid) for pattern in patterns])


@every_backend
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 64), (128, 16)])
@pytest.mark.parametrize("head_dim", [40, 72, 88])
def test_G1_all_blocks_are_dense_attention(
    backend: str, grid: TokenGrid, block_q: int, block_k: int, head_dim: int, operands,
    masked_attention,
):  # fmt: skip
    blocks = block_indices([Full()] * 2, grid, tile(2, 2, 3), block_q, block_k)
    query, key, value = operands(grid.tokens, 2, head_dim)
    expected = masked_attention(query, key, value, torch.tensor(True))
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, expected, torch.float32)


@every_backend
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_patterns_are_computed_as_defined(
    backend: str, pattern: Pattern, grid: TokenGrid, operands, masked_attention
):
    skip_refused(backend, pattern)
    blocks = block_indices([pattern] * 2, grid, None, 16, 32)
    query, key, value = operands(grid.tokens, 2)
    expected = masked_attention(query, key, value, visible([pattern], grid))
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, expected, torch.float32)


@every_backend
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0], ids=["flat", "random", "peaked"])
def test_dtypes_and_sharpness(
    backend: str, dtype: torch.dtype, spread: float, operands, masked_attention
):
    skip_refused(backend, dtype)
    grid, patterns = GRIDS[3], [Band(11), Full(), Skip(), PATTERNS[4]]
    blocks = block_indices(patterns, grid, None, 16, 32)
    query, key, value = operands(grid.tokens, 4, spread=spread, dtype=dtype)
    expected = masked_attention(query, key, value, visible(patterns, grid))
    assert_close(sparse_attention(query, key, value, blocks, backend=backend), expected, dtype)


sides = st.integers(1, 6)
triples = st.tuples(sides, sides, sides)


@every_backend
@settings(max_examples=25, deadline=None)
@given(
    grid=st.builds(TokenGrid, sides, sides, sides, st.integers(0, 20), st.integers(0, 20)),
    window=triples,
    half_width=st.integers(0, 60),
    order=st.one_of(st.just(raster()), st.just(pixel_major()), st.builds(tile, *[sides] * 3)),
    blocks=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    head_dim=st.sampled_from([8, 40, 72, 88]),
    batch=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_grid_order_block_and_shape(
    backend: str, operands, masked_attention, grid: TokenGrid, window: tuple[int, int, int],
    half_width: int, order: TokenOrder, blocks: tuple[int, int], head_dim: int, batch: int,
    dtype: torch.dtype,
):  # fmt: skip
    patterns = [Neighborhood(window), Band(half_width), Skip()]
    indices = block_indices(patterns, grid, order, *blocks)
    query, key, value = operands(grid.tokens, 3, head_dim, batch, dtype=dtype)
    expected = masked_attention(query, key, value, visible(patterns, grid))
    assert_close(sparse_attention(query, key, value, indices, backend=backend), expected, dtype)


@every_backend
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("joins", [0, 10**6], ids=["rows alone", "rows joined"])
def test_G2_random_block_masks(
    backend: str, density: float, joins: float, operands, masked_attention,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(gather, "_PRICES", gather.Prices(joins, 0.5, launch=0))
    grid, order = TokenGrid(3, 5, 7, text_before=3), tile(2, 3, 4)
    rows, columns = (len(order.offsets(grid, block)) - 1 for block in (16, 8))
    mask = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(1)) < density
    mask[0, 2], mask[1, 5] = False, False
    mask[1, 4] = torch.arange(columns) == 1
    blocks = from_block_mask(mask, grid, order, 16, 8)
    sizes = [order.offsets(grid, block).diff() for block in (16, 8)]
    tokens = mask.repeat_interleave(sizes[0], 1).repeat_interleave(sizes[1], 2)
    place = order.permutation(grid).argsort()
    query, key, value = operands(grid.tokens, 2)
    expected = masked_attention(query, key, value, tokens[:, place][:, :, place])
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, expected, torch.float32)


@every_backend
@pytest.mark.parametrize("order", [raster(), pixel_major(), tile(2, 2, 2)], ids=str)
def test_G5_the_order_of_tokens_does_not_matter(
    backend: str, order: TokenOrder, operands, masked_attention
):
    grid, patterns = GRIDS[3], [Neighborhood((2, 3, 3)), Band(11)]
    query, key, value = operands(grid.tokens, 2)
    blocks = block_indices(patterns, grid, order, 16, 16)
    expected = masked_attention(query, key, value, visible(patterns, grid))
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, expected, torch.float32)


@every_backend
def test_G6_mixed_heads_are_computed_as_each_alone(backend: str, operands):
    grid, patterns = GRIDS[2], [Full(), Skip(), Band(11), PATTERNS[4], Band(11)]
    query, key, value = operands(grid.tokens, 5)
    together = sparse_attention(
        query, key, value, block_indices(patterns, grid, None, 16, 16), backend=backend
    )
    for head, pattern in enumerate(patterns):
        one = slice(head, head + 1)
        alone = sparse_attention(
            query[:, :, one], key[:, :, one], value[:, :, one],
            block_indices([pattern], grid, raster(), 16, 16), backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(together[0][:, :, one], alone[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(together[1][:, one], alone[1], atol=2e-6, rtol=0)
    turned = [4, 2, 0, 3, 1]
    blocks = block_indices([patterns[head] for head in turned], grid, None, 16, 16)
    query, key, value = (x[:, :, turned] for x in (query, key, value))
    output, lse = sparse_attention(query, key, value, blocks, backend=backend)
    torch.testing.assert_close(output, together[0][:, :, turned], atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, together[1][:, turned], atol=2e-6, rtol=0)


@every_backend
@pytest.mark.parametrize("side", ["text_before", "text_after"])
@pytest.mark.parametrize("pattern", [Full(), Band(11), Neighborhood((2, 3, 3))], ids=str)
def test_G9_padded_text_gets_no_mass(
    backend: str, side: str, pattern: Pattern, operands, masked_attention
):
    valid = (4, 0, 9, 4)
    grid = replace(TokenGrid(2, 5, 7), **{side: 9}, valid_text=valid)
    query, key, value = operands(grid.tokens, 2, batch=4)
    kept = visible([pattern], grid).expand(4, 2, -1, -1).clone()
    for sample, count in enumerate(valid):
        first = 0 if side == "text_before" else 70
        kept[sample, :, :, first + count : first + 9] = False
        # Padding may hold anything: it must not reach the output.
        key[sample, first + count : first + 9] = 1e4
        value[sample, first + count : first + 9] = 1e4
    blocks = block_indices([pattern] * 2, grid, None, 16, 16)
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, masked_attention(query, key, value, kept), torch.float32)


@every_backend
def test_G9_a_query_that_sees_padded_text_only_sees_nothing(backend: str, operands):
    grid = TokenGrid(1, 4, 8, text_after=16, valid_text=(0,))
    # Joined with the next block of queries, which sees video as well, and with the text's own.
    mask = torch.tensor([[[0, 0, 1], [1, 0, 1], [1, 0, 1]]], dtype=torch.bool)
    query, key, value = operands(grid.tokens, 1, batch=1)
    blocks = from_block_mask(mask, grid, None, 16, 16)
    output, lse = sparse_attention(query, key, value, blocks, backend=backend)
    assert not output[:, :16].any()
    assert lse[..., :16].isneginf().all()
    assert lse[..., 16:].isfinite().all()


@every_backend
@pytest.mark.parametrize("valid_text", [None, (5, 0)])
def test_PS_pooled_keys_are_means_with_the_log_of_their_number(
    backend: str, valid_text: tuple[int, int] | None, operands
):
    skip_refused(backend, "pooled")
    grid, order = TokenGrid(3, 5, 7, text_after=9, valid_text=valid_text), tile(2, 3, 4)
    rows, columns = (len(order.offsets(grid, block)) - 1 for block in (16, 8))
    generator = torch.Generator().manual_seed(1)
    tags = torch.randint(-2, 4, (2, rows, columns), generator=generator, dtype=torch.int8)
    tags[tags == -1] = -2
    tags[0, 1] = -2
    query, key, value = operands(grid.tokens, 2)
    place, cuts = order.permutation(grid), order.offsets(grid, 8).tolist()
    expected, sums = torch.zeros(query.shape, dtype=torch.float64), torch.zeros(2, 2, grid.tokens)
    blocks_of_queries = place.tensor_split(order.offsets(grid, 16)[1:-1])
    for sample, head, row in itertools.product(range(2), range(2), range(rows)):
        keys, values, bias = [], [], []
        for column, tag in enumerate(tags[head, row].tolist()):
            if tag < 0:
                continue
            tokens = place[cuts[column] : cuts[column + 1]]
            for run in tokens.split(2**tag):
                if valid_text is not None:
                    run = run[run < 105 + valid_text[sample]]
                if len(run):
                    keys.append(key[sample, run, head].double().mean(0))
                    values.append(value[sample, run, head].double().mean(0))
                    bias.append(math.log(len(run)))
        tokens = blocks_of_queries[row]
        sums[sample, head, tokens] = -math.inf
        if keys:
            logits = query[sample, tokens, head].double() @ torch.stack(keys).T / 40**0.5
            logits = logits + torch.tensor(bias)
            expected[sample, tokens, head] = logits.softmax(-1) @ torch.stack(values)
            sums[sample, head, tokens] = logits.logsumexp(-1).float()
    came = sparse_attention(
        query, key, value, from_tags(tags, grid, order, 16, 8), backend=backend
    )
    assert_close(came, (expected, sums.double()), torch.float32)


@every_backend
@pytest.mark.parametrize("valid_text", [None, (5, 0)])
def test_PS_blocks_that_patterns_do_not_touch_are_pooled(
    backend: str, valid_text: tuple[int, int] | None, operands
):
    skip_refused(backend, "pooled")
    grid = TokenGrid(3, 5, 7, text_after=9, valid_text=valid_text)
    patterns = [Neighborhood((2, 3, 3)), Full(), Skip(), Band(11)]
    blocks = block_indices(patterns, grid, raster(), 16, 8, pooled=2)
    plain = block_indices(patterns, grid, raster(), 16, 8)
    absent = torch.ones(4, blocks.query_blocks, blocks.key_blocks, dtype=torch.bool)
    for head, row in itertools.product(range(4), range(blocks.query_blocks)):
        listed = dict(plain.entries(head, row))
        absent[head, row, list(listed)] = False
        assert dict(blocks.entries(head, row)) == dict.fromkeys(range(absent.shape[2]), 2) | listed
    assert torch.equal(blocks.kept, plain.kept)
    rest = from_tags(torch.where(absent, 2, -2).to(torch.int8), grid, plain.order, 16, 8)
    query, key, value = operands(grid.tokens, 4)
    exact = query.double(), key.double(), value.double()
    parts = [sparse_attention(*exact, part, backend="reference") for part in (plain, rest)]
    came = sparse_attention(query, key, value, blocks, backend=backend)
    assert_close(came, merge(parts), torch.float32)


@every_backend
def test_disjoint_lists_merge_to_dense(backend: str, operands, masked_attention):
    grid = GRIDS[1]
    mask = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    query, key, value = operands(grid.tokens, 2)
    parts = [
        sparse_attention(
            query, key, value, from_block_mask(m, grid, None, 16, 16), backend=backend
        )
        for m in (mask, ~mask)
    ]
    expected = masked_attention(query, key, value, torch.tensor(True))
    assert_close(merge(parts), expected, torch.float32)


@every_backend
def test_scale_and_strides_are_respected(backend: str, operands, masked_attention):
    grid, blocks = GRIDS[0], block_indices([Band(11)] * 2, GRIDS[0], None, 16, 16)
    query, key, value = operands(grid.tokens, 2)
    expected = masked_attention(3 * query, key, value, visible([Band(11)], grid))
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    came = sparse_attention(query, key, value, blocks, scale=3 * 40**-0.5, backend=backend)
    assert_close(came, expected, torch.float32)


def test_masks_past_the_limit_are_evaluated_anew(operands, monkeypatch: pytest.MonkeyPatch):
    query, key, value = operands(GRIDS[0].tokens, 1)
    outputs = []
    for limit in (1 << 20, 0):
        monkeypatch.setattr(gather, "_KEPT_MASK_BYTES", limit)
        blocks = block_indices([Band(11)], GRIDS[0], None, 16, 16)
        outputs += [sparse_attention(query, key, value, blocks, backend="gather")[0]] * 2
        assert bool(gather._prepared[blocks].masks) == bool(limit)
    assert all(torch.equal(outputs[0], output) for output in outputs)


def test_prepared_values_go_with_their_blocks(operands):
    blocks: BlockIndices | None = block_indices([Band(11)], GRIDS[0])
    query, key, value = operands(GRIDS[0].tokens, 1)
    sparse_attention(query, key, value, blocks, backend="gather")
    count = len(gather._prepared)
    del blocks
    assert len(gather._prepared) == count - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": (1, 70, 16)},
            "query must be [batch, tokens, heads, head_dim], got shape (1, 70",
        ),
        (
            {"key": (1, 70, 2, 8)},
            "key must have the shape of query, (1, 70, 2, 16), got (1, 70, 2",
        ),
        ({"tokens": 71}, "the blocks are for grid 2x5x7 of 70 tokens, got 71 tokens"),
        ({"heads": 3}, "the blocks are for 2 heads, got 3; give one pattern per head"),
        ({"dtype": torch.int32}, "query must be of a floating dtype, got torch.int32"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"valid_text": (0, 0)}, "grid.valid_text is for a batch of 2, got 1"),
    ],
    ids=["rank", "shape", "tokens", "heads", "dtype", "scale", "valid text"],
)
def test_wrong_calls_are_named(change: dict[str, Any], message: str):
    shape = 1, change.get("tokens", 70), change.get("heads", 2), 16
    grid = replace(GRIDS[0], valid_text=change.get("valid_text"))
    query, key, value = (
        torch.ones(change.get(name, shape), dtype=change.get("dtype"))
        for name in ("query", "key", "value")
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_attention(
            query, key, value, block_indices([Full()] * 2, grid), scale=change.get("scale")
        )


def test_mixed_dtypes_are_named():
    query = torch.ones(1, 70, 1, 16)
    with pytest.raises(
        ValueError, match=r"value must have the dtype of query, torch\.float32, got"
    ):
        sparse_attention(query, query, query.double(), block_indices([Full()], GRIDS[0]))

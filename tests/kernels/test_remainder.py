"""Remainders against attention written out in float64; labels are those of the catalogue."""

import itertools
import math

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import ABSENT, WHOLE, from_block_mask, from_tags
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.order import gilbert, raster
from dit_sparse.kernels.remainder import (
    Cache,
    Cached,
    Complement,
    Pair,
    Pooled,
    Rescale,
    cache_bytes,
    cache_of,
)
from dit_sparse.kernels.score import Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import Cumulative

GRID = TokenGrid(3, 5, 7, text_before=3)
BLOCK = 16
# Those that take pooled keys and float32 on this machine.
every_backend = pytest.mark.parametrize("backend", ["reference", "native"])

Inputs = tuple[Tensor, Tensor, Tensor]


def _inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    shape = 3, 2, GRID.tokens, 3, 9
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return query, key, value


def _mask(density: float) -> Tensor:
    side = -(-GRID.video // BLOCK) + 1
    random = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    return random < density


def _dense(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None) -> Pair:
    """By definition; `keep` is bool `[heads, tokens, tokens]`."""
    logits = einsum(query, key, "b i h d, b j h d -> b h i j") / query.shape[-1] ** 0.5
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    lse = logits.logsumexp(-1)
    share = (logits - lse[..., None]).exp().nan_to_num()
    return einsum(share, value, "b h i j, b j h d -> b i h d"), lse


def _kept(mask: Tensor) -> Tensor:
    """The block mask, token by token."""
    blocks = from_block_mask(mask, GRID, block_q=BLOCK, block_k=BLOCK)
    place = torch.arange(len(mask[0])).repeat_interleave(blocks.query_offsets.diff())
    return mask[:, place][:, :, place]


def _sparse(inputs: Inputs, mask: Tensor) -> Pair:
    blocks = from_block_mask(mask, GRID, block_q=BLOCK, block_k=BLOCK)
    return sparse_attention(*inputs, blocks, backend="reference")


def _cache(remainder: Cached, density: float = 0.4) -> tuple[Cache, Pair, Inputs]:
    inputs = _inputs()
    sparse = _sparse(inputs, _mask(density))
    return cache_of(remainder, _dense(*inputs), sparse), sparse, inputs


def test_RE1_dense_is_the_kept_share_of_sparse_and_the_rest_of_the_complement() -> None:
    inputs, mask = _inputs(), _mask(0.4)
    dense, sparse = _dense(*inputs), _sparse(inputs, mask)
    rest = _dense(*inputs, ~_kept(mask))
    share = rearrange((sparse[1] - dense[1]).exp(), "b h n -> b n h 1")
    torch.testing.assert_close(share * sparse[0] + (1 - share) * rest[0], dense[0])
    cache = cache_of(Complement("float32"), dense, sparse)
    torch.testing.assert_close(cache.rows.double(), rest[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(cache.level.double(), rest[1], atol=2e-5, rtol=0)


def test_RE2_a_full_pattern_stays_dense_unless_it_is_unclamped() -> None:
    inputs, everything = _inputs(), _mask(2.0)
    dense, sparse = _dense(*inputs), _sparse(inputs, everything)
    for steps in range(5):
        for remainder in (Rescale(), Complement()):
            output = cache_of(remainder, dense, sparse).apply(sparse, steps)
            torch.testing.assert_close(output, dense[0], atol=1e-6, rtol=1e-6)
        grown = cache_of(Rescale(clamp=False), dense, sparse).apply(sparse, steps)
        torch.testing.assert_close(grown, dense[0] * (1 + 0.04 * steps), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [("float32", 1e-6), ("float16", 5e-4), ("bfloat16", 4e-3), ("float8", 3e-2)],
)
def test_RE3_on_the_same_inputs_the_output_is_dense(storage: str, tolerance: float) -> None:
    for remainder, most in ((Rescale(storage=storage), 1), (Complement(storage), 9)):  # type: ignore[arg-type]
        cache, sparse, inputs = _cache(remainder)
        dense = _dense(*inputs)[0]
        for steps in range(most):
            error = (cache.apply(sparse, steps) - dense).norm() / dense.norm()
            assert error < tolerance
        dropped = (sparse[0] - dense).norm() / dense.norm()
        assert dropped > 5 * tolerance


def test_RE5_the_ramp_is_counted_from_the_dense_step_and_stops_at_one() -> None:
    cache, sparse, inputs = _cache(Rescale(ramp=0.3, storage="float32"))
    dense = _dense(*inputs)
    share = rearrange((sparse[1] - dense[1]).exp(), "b h n -> b n h 1")
    for steps in (0, 1, 2, 5):
        expected = (share + 0.3 * steps).clamp_max(1) * sparse[0] + dense[0] - share * sparse[0]
        torch.testing.assert_close(cache.apply(sparse, steps), expected, atol=1e-5, rtol=1e-5)


def test_RE6_residuals_before_and_after_the_output_projection_are_the_same() -> None:
    cache, sparse, inputs = _cache(Rescale(storage="float32"))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(27, 27, generator=generator, dtype=torch.float64)
    bias = torch.randn(27, generator=generator, dtype=torch.float64)

    def project(x: Tensor) -> Tensor:
        return rearrange(x, "b n h d -> b n (h d)") @ weight + bias

    dense = _dense(*inputs)
    other = _sparse(_inputs(seed=7), _mask(0.4))
    share = rearrange((sparse[1] - dense[1]).exp(), "b h n -> b n h 1")
    after = project(dense[0]) - project(share * sparse[0]) + project(share * other[0])
    torch.testing.assert_close(project(cache.apply(other, 0)), after, atol=1e-4, rtol=1e-4)


def test_the_complement_follows_the_current_lse() -> None:
    """On other inputs it is the merge with the stored complement, by definition."""
    cache, _, inputs = _cache(Complement("float32"))
    rest = _dense(*inputs, ~_kept(_mask(0.4)))
    now = _sparse(_inputs(seed=5), _mask(0.4))
    share = rearrange(torch.sigmoid(now[1] - rest[1]), "b h n -> b n h 1")
    expected = share * now[0] + (1 - share) * rest[0]
    torch.testing.assert_close(cache.apply(now, 3), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("remainder", [Rescale(storage="float32"), Complement("float32")])
def test_heads_that_compute_nothing_repeat_the_dense_step(remainder: Cached) -> None:
    inputs, nothing = _inputs(), torch.zeros_like(_mask(0.4))
    dense, sparse = _dense(*inputs), _sparse(inputs, nothing)
    cache = cache_of(remainder, dense, sparse)
    assert float(cache.loss) == 1
    torch.testing.assert_close(cache.apply(sparse, 0), dense[0], atol=1e-6, rtol=1e-6)


def test_loss_is_the_share_that_is_not_kept() -> None:
    cache, sparse, inputs = _cache(Complement())
    expected = 1 - (sparse[1] - _dense(*inputs)[1]).exp().mean()
    assert float(cache.loss) == pytest.approx(float(expected), abs=1e-6)


def test_outputs_keep_the_dtype_of_the_model() -> None:
    inputs = _inputs(dtype=torch.bfloat16)
    blocks = from_block_mask(_mask(0.4), GRID, block_q=BLOCK, block_k=BLOCK)
    full = from_block_mask(_mask(2.0), GRID, block_q=BLOCK, block_k=BLOCK)
    dense, sparse = (sparse_attention(*inputs, b, backend="reference") for b in (full, blocks))
    for remainder in (Rescale(), Complement()):
        output = cache_of(remainder, dense, sparse).apply(sparse, 0)
        assert output.dtype == torch.bfloat16
        assert (output - dense[0]).norm() / dense[0].norm() < 1e-2


@pytest.mark.parametrize("storage", ["float32", "float16", "bfloat16", "float8"])
def test_bytes_are_what_the_cache_holds(storage: str) -> None:
    for remainder in (Rescale(storage=storage), Complement(storage)):  # type: ignore[arg-type]
        expected = cache_bytes(remainder, 2, GRID.tokens, 3, 9)
        held = _cache(remainder)[0]
        padding = 2 * 3 * 9 * (-GRID.tokens % 64) if storage == "float8" else 0
        assert held.bytes == expected
        assert held.rows.untyped_storage().nbytes() <= held.rows.nbytes + padding
    assert cache_bytes(Pooled(), 2, GRID.tokens, 3, 9) == 0


def _pooled(inputs: Inputs, tags: Tensor, grid: TokenGrid, block: int, backend: str) -> Pair:
    return sparse_attention(*inputs, from_tags(tags, grid, None, block, block), backend=backend)


def _all(tag: int, heads: int, grid: TokenGrid, block: int) -> Tensor:
    side = len(geometry(raster(), grid, 1, block).key_offsets) - 1
    return torch.full((heads, side, side), tag, dtype=torch.int8)


@every_backend
def test_PS1_keys_that_are_equal_in_their_group_lose_nothing(backend: str) -> None:
    query, key, value = _inputs(dtype=torch.float32)
    # The three tokens of text are one group; those of video begin behind them.
    place = torch.arange(GRID.tokens)
    alike = key[:, torch.where(place < 3, 0, place - (place - 3) % 4)]
    came = _pooled((query, alike, value), _all(2, 3, GRID, BLOCK), GRID, BLOCK, backend)
    expected = _dense(query.double(), alike.double(), value.double())
    _assert_close(came, expected)
    # Where they differ, something is lost.
    lossy = _pooled((query, key, value), _all(2, 3, GRID, BLOCK), GRID, BLOCK, backend)
    true = _dense(query.double(), key.double(), value.double())
    assert (lossy[0] - true[0]).norm() / true[0].norm() > 0.1


@every_backend
def test_PS2_all_of_the_first_level_is_dense_and_of_none_nothing(backend: str) -> None:
    inputs = _inputs(dtype=torch.float32)
    query, key, value = (x.double() for x in inputs)
    came = _pooled(inputs, _all(WHOLE, 3, GRID, BLOCK), GRID, BLOCK, backend)
    _assert_close(came, _dense(query, key, value))
    output, lse = _pooled(inputs, _all(ABSENT, 3, GRID, BLOCK), GRID, BLOCK, backend)
    assert not output.any()
    assert lse.isneginf().all()


@every_backend
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 6.0])
def test_PS3_AS2_pooled_keys_get_no_more_attention_than_they_have(
    backend: str, sharpness: float
) -> None:
    """By Jensen's inequality, whatever is pooled."""
    query, key, value = _inputs(dtype=torch.float32)
    query = sharpness * query
    true = _dense(query.double(), key.double(), value.double())[1]
    for level in (1, 2, 3, 7):
        pattern = Scored(Sampled(8), Cumulative(0.5, 0.1, 0.4), "gilbert")
        blocks = scored_blocks(
            pattern, query, key, geometry(gilbert(), GRID, 3, BLOCK), pooled=level
        )
        assert (blocks.tag == level).any()
        for listed in (blocks, from_tags(_all(level, 3, GRID, BLOCK), GRID, None, BLOCK, BLOCK)):
            lse = sparse_attention(query, key, value, listed, backend=backend)[1]
            assert (lse <= true + 1e-5).all()
            assert (lse < true - 1e-4).any()


@every_backend
def test_AS2_global_tokens_over_all_keys_count_the_kept_ones_twice(backend: str) -> None:
    """As the code of Video-BLADE merges them; over the dropped blocks alone they do not."""
    query, key, value = _inputs(dtype=torch.float32)
    query = 0.3 * query
    true = _dense(query.double(), key.double(), value.double())[1]
    mask = _mask(0.4)
    mask[:, :, 0] = True
    kept = torch.where(mask, WHOLE, ABSENT).to(torch.int8)
    everything = _pooled((query, key, value), _all(2, 3, GRID, BLOCK), GRID, BLOCK, backend)
    alone = _pooled((query, key, value), kept, GRID, BLOCK, backend)
    twice = merge([alone, everything])[1]
    once = _pooled((query, key, value), kept.masked_fill(~mask, 2), GRID, BLOCK, backend)[1]
    share = (alone[1] - true).exp()
    assert (share > 0.3).double().mean() > 0.5
    assert (twice > true)[share > 0.3].all()
    assert (once <= true + 1e-5).all()


@every_backend
@pytest.mark.parametrize("level", [1, 3, 5])
def test_AS3_constant_keys_are_pooled_exactly_by_the_logarithm_of_their_number(
    backend: str, level: int
) -> None:
    query, key, value = _inputs(dtype=torch.float32)
    key = key[:, :1].expand_as(key).contiguous()
    tags = torch.where(_mask(0.4), WHOLE, level).to(torch.int8)
    assert (tags == level).any()
    came = _pooled((query, key, value), tags, GRID, BLOCK, backend)
    _assert_close(came, _dense(query.double(), key.double(), value.double()))


@every_backend
def test_PS4_a_group_counts_the_tokens_that_it_has(backend: str) -> None:
    """Blocks of 11: two groups of four and one of three; the last block is shorter than any."""
    grid, block = TokenGrid(1, 1, 14), 11
    generator = torch.Generator().manual_seed(9)
    query, key, value = torch.randn(3, 1, 14, 1, 8, generator=generator)
    for level, groups in ((2, (4, 4, 3, 3)), (3, (8, 3, 3)), (5, (11, 3))):
        came = _pooled((query, key, value), _all(level, 1, grid, block), grid, block, backend)
        means = [
            torch.stack([part.mean(0) for part in x[0, :, 0].double().split(groups)])
            for x in (key, value)
        ]
        numbers = torch.tensor(groups, dtype=torch.float64)
        logits = query[0, :, 0].double() @ means[0].T / 8**0.5 + numbers.log()
        expected = (logits.softmax(-1) @ means[1])[None, :, None], logits.logsumexp(-1)[None, None]
        _assert_close(came, expected)


@every_backend
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_PS6_every_block_and_level(backend: str, block: int, level: int) -> None:
    """The reference implementation of the paper gets some of these wrong."""
    grid, heads = TokenGrid(3, 9, 11), 2
    generator = torch.Generator().manual_seed(block + level)
    query, key, value = torch.randn(3, 1, grid.tokens, heads, 16, generator=generator)
    offsets = geometry(raster(), grid, 1, block).key_offsets.tolist()
    side = len(offsets) - 1
    mask = torch.rand(heads, side, side, generator=generator) < 0.5
    mask[:, range(side), range(side)] = True
    tags = torch.where(mask, WHOLE, level).to(torch.int8)
    came = _pooled((query, key, value), tags, grid, block, backend)
    output = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.zeros(1, heads, grid.tokens, dtype=torch.float64)
    spans = [slice(*edges) for edges in itertools.pairwise(offsets)]
    for head, row in itertools.product(range(heads), range(side)):
        keys, values, bias = [], [], []
        for column, span in enumerate(spans):
            run = 1 if mask[head, row, column] else 2**level
            for tokens in torch.arange(span.start, span.stop).split(run):
                keys.append(key[0, tokens, head].double().mean(0))
                values.append(value[0, tokens, head].double().mean(0))
                bias.append(math.log(len(tokens)))
        logits = query[0, spans[row], head].double() @ torch.stack(keys).T / 4
        logits = logits + torch.tensor(bias, dtype=torch.float64)
        output[0, spans[row], head] = logits.softmax(-1) @ torch.stack(values)
        lse[0, head, spans[row]] = logits.logsumexp(-1)
    _assert_close(came, (output, lse))


def _assert_close(came: Pair, expected: Pair) -> None:
    for one, other in zip(came, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Pooled(0), "level of a pooled remainder must be in 1..7"),
        (lambda: Rescale(ramp=-0.1), r"ramp of a rescale must be in \[0, 1\], got -0.1"),
        (lambda: Complement("int8"), "storage must be one of float32, bfloat16, float16, float8"),  # type: ignore[arg-type]
    ],
)
def test_what_is_out_of_range_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]

"""Remainders against attention written out in float64; labels are those of the catalogue."""

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import from_block_mask
from dit_sparse.kernels.grid import TokenGrid
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

GRID = TokenGrid(3, 5, 7, text_before=3)
BLOCK = 16


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


def test_re1_dense_is_the_kept_share_of_sparse_and_the_rest_of_the_complement() -> None:
    inputs, mask = _inputs(), _mask(0.4)
    dense, sparse = _dense(*inputs), _sparse(inputs, mask)
    rest = _dense(*inputs, ~_kept(mask))
    share = rearrange((sparse[1] - dense[1]).exp(), "b h n -> b n h 1")
    torch.testing.assert_close(share * sparse[0] + (1 - share) * rest[0], dense[0])
    cache = cache_of(Complement("float32"), dense, sparse)
    torch.testing.assert_close(cache.rows.double(), rest[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(cache.level.double(), rest[1], atol=2e-5, rtol=0)


def test_re2_a_full_pattern_stays_dense_unless_it_is_unclamped() -> None:
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
def test_re3_on_the_same_inputs_the_output_is_dense(storage: str, tolerance: float) -> None:
    for remainder, most in ((Rescale(storage=storage), 1), (Complement(storage), 9)):  # type: ignore[arg-type]
        cache, sparse, inputs = _cache(remainder)
        dense = _dense(*inputs)[0]
        for steps in range(most):
            error = (cache.apply(sparse, steps) - dense).norm() / dense.norm()
            assert error < tolerance
        dropped = (sparse[0] - dense).norm() / dense.norm()
        assert dropped > 5 * tolerance


def test_re5_the_ramp_is_counted_from_the_dense_step_and_stops_at_one() -> None:
    cache, sparse, inputs = _cache(Rescale(ramp=0.3, storage="float32"))
    dense = _dense(*inputs)
    share = rearrange((sparse[1] - dense[1]).exp(), "b h n -> b n h 1")
    for steps in (0, 1, 2, 5):
        expected = (share + 0.3 * steps).clamp_max(1) * sparse[0] + dense[0] - share * sparse[0]
        torch.testing.assert_close(cache.apply(sparse, steps), expected, atol=1e-5, rtol=1e-5)


def test_re6_residuals_before_and_after_the_output_projection_are_the_same() -> None:
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

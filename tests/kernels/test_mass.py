"""Block mass, by every means of the CPU, against attention written out in float64."""

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import mass as module
from dit_sparse.kernels import native
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.mass import block_mass
from dit_sparse.kernels.order import TokenOrder, raster, tile
from dit_sparse.kernels.pattern import Full
from dit_sparse.kernels.sample import sampled_rows

GRID = TokenGrid(3, 7, 11, text_after=9, valid_text=(4, 9))


@pytest.fixture(params=["native", "plain"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(module.native, "supports", lambda call: "not asked")
    return request.param


def shares(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention weights `[batch, heads, tokens, tokens]` and the LSE, in float64."""
    logits = query.double().transpose(1, 2) @ key.double().permute(0, 2, 3, 1)
    logits = logits / query.shape[-1] ** 0.5
    for sample, valid in enumerate(GRID.valid_text or ()):
        logits[sample, ..., GRID.invalid_text(valid)] = -torch.inf
    return logits.softmax(-1), logits.logsumexp(-1)


def expected_mass(weights: Tensor, blocks: BlockIndices, rows: int | None) -> Tensor:
    out = torch.zeros(*weights.shape[:2], blocks.query_blocks, blocks.key_blocks).double()
    for i in range(blocks.query_blocks):
        tokens = blocks.query_tokens(i)
        if rows is not None:
            chosen = sampled_rows(blocks.query_offsets, rows)[i]
            tokens = blocks.permutation[chosen[chosen >= 0]]
        for j in range(blocks.key_blocks):
            part = weights[:, :, tokens][..., blocks.key_tokens(j)]
            out[:, :, i, j] = part.sum((2, 3))
    return out


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-4), (torch.bfloat16, 4e-4)])
@pytest.mark.parametrize("rows", [None, 1, 5, 16, 64])
@pytest.mark.parametrize(
    ("order", "sizes"),
    [(tile(2, 3, 4), (16, 40)), (tile(2, 3, 4), (130, 24)), (raster(), (130, 70))],
    ids=["tiles", "large", "raster"],
)
def test_AD1_mass_is_exact(
    means: str,
    dtype: torch.dtype,
    bound: float,
    rows: int | None,
    order: TokenOrder,
    sizes: tuple[int, int],
    operands,
):
    query, key, _ = operands(GRID.tokens, 2, 40, dtype=dtype)
    weights, lse = shares(query, key)
    blocks = block_indices([Full()] * 2, GRID, order, *sizes)
    mass = block_mass(query, key, lse.float(), blocks, rows=rows)
    expected = expected_mass(weights, blocks, rows)
    assert mass.dtype == torch.float32
    assert (mass - expected).abs().max() <= bound * expected.amax()
    counted = mass.sum(-1)
    taken = (
        blocks.query_offsets.diff()
        if rows is None
        else (sampled_rows(blocks.query_offsets, rows) >= 0).sum(1)
    )
    torch.testing.assert_close(counted, taken.expand(counted.shape).float(), atol=0, rtol=1e-3)


def test_a_query_that_saw_nothing_has_no_mass(means: str, operands):
    query, key, _ = operands(GRID.tokens, 1)
    lse = torch.full((2, 1, GRID.tokens), -torch.inf)
    assert not block_mass(query, key, lse, block_indices([Full()], GRID)).any()


def test_masses_of_other_scores_stay_finite_or_say_so(means: str, operands):
    """An earlier step's LSE is far off at worst; the sum is large then, never wrapped around."""
    query, key, _ = operands(GRID.tokens, 1)
    lse = torch.full((2, 1, GRID.tokens), -500.0)
    assert (block_mass(query, key, lse, block_indices([Full()], GRID)) > 1e30).all()


def test_a_wrong_lse_is_named(operands):
    query, key, _ = operands(GRID.tokens, 2)
    with pytest.raises(ValueError, match=r"lse must be float32 \(2, 2, 240\), got torch.float64"):
        block_mass(query, key, torch.zeros(2, 2, 240).double(), block_indices([Full()] * 2, GRID))


def test_native_is_what_runs_on_a_cpu_with_a_compiler(operands):
    query, key, _ = operands(GRID.tokens, 1)
    blocks = block_indices([Full()], GRID)
    call = module.AttentionCall(query, key, key, blocks, 1.0)
    if native.supports(call) is not None:
        pytest.skip("no compiler here")
    lse = torch.zeros(2, 1, GRID.tokens)
    direct = native.mass(call, lse, 16)
    assert torch.equal(block_mass(query, key, lse, blocks, scale=1.0), direct)

"""Rows under one mask after another, against softmax written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.row_attention import RowAttention

BATCH, TOKENS, HEADS, MORE = 2, 29, 3, 7
ROWS = torch.tensor([0, 4, 5, 17, 28])


def operands(
    head_dim: int = 13, spread: float = 2.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, BATCH, TOKENS, HEADS, head_dim, generator=generator)
    return (spread * query).to(dtype), key.to(dtype), value.to(dtype)


def random_masks(keys: int, count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.rand(count, HEADS, len(ROWS), keys, generator=generator) < 0.3)


def padding() -> Tensor:
    """Of the second sample the last tokens, among them a row that is looked at."""
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[1, 24:] = False
    return valid


def brute(logits: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row over the keys that `mask` [heads, rows, keys] leaves: output `[batch, heads,
    rows, d]`, LSE `[batch, heads, rows]`; of float64 logits `[batch, heads, rows, keys]` and
    values `[batch, heads, keys, d]`."""
    output = torch.zeros(*logits.shape[:3], values.shape[-1], dtype=torch.double)
    lse = torch.full(logits.shape[:3], -torch.inf, dtype=torch.double)
    for b, h, r in torch.cartesian_prod(*map(torch.arange, logits.shape[:3])).tolist():
        seen = (mask[h, r] & logits[b, h, r].isfinite()).nonzero()[:, 0]
        if len(seen):
            weights = logits[b, h, r, seen].exp()
            output[b, h, r] = weights @ values[b, h, seen] / weights.sum()
            lse[b, h, r] = weights.sum().log()
    return output, lse


def logits_of(query: Tensor, key: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    logits = scale * torch.einsum("brhd,bjhd->bhrj", query[:, ROWS].double(), key.double())
    return logits if valid is None else logits.masked_fill(~valid[:, None, None], -torch.inf)


def assert_same(came: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(came.double(), expected, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("padded", [False, True], ids=["all-valid", "padding"])
@pytest.mark.parametrize("scale", [None, 0.7], ids=["usual-scale", "scaled"])
@pytest.mark.parametrize(
    ("head_dim", "spread"), [(13, 0.1), (13, 4.0), (1, 2.0)], ids=["flat", "peaked", "one-channel"]
)
def test_pairs_are_softmax_over_what_is_seen(
    head_dim: int, spread: float, scale: float | None, padded: bool
) -> None:
    query, key, value = operands(head_dim, spread)
    valid = padding() if padded else None
    masks = random_masks(TOKENS)
    masks[1][2, 3] = False
    attention = RowAttention.of(query, key, value, ROWS, scale=scale, valid=valid)
    output, lse = attention.under(masks)
    logits = logits_of(query, key, scale or head_dim**-0.5, valid)
    for number, mask in enumerate(masks):
        expected = brute(logits, value.double().transpose(1, 2), mask)
        assert_same(output[:, :, number], expected[0])
        assert_same(lse[:, :, number], expected[1])
    assert (output[:, 2, 1, 3] == 0).all()
    assert lse[:, 2, 1, 3].isneginf().all()
    assert output.dtype == lse.dtype == torch.float32


def test_dense_sees_every_key_once() -> None:
    query, key, value = operands()
    output, lse = RowAttention.of(query, key, value, ROWS, valid=padding()).dense()
    everything = torch.ones(HEADS, len(ROWS), TOKENS, dtype=torch.bool)
    logits = logits_of(query, key, 13**-0.5, padding())
    expected = brute(logits, value.double().transpose(1, 2), everything)
    assert_same(output[:, :, 0], expected[0])
    assert_same(lse[:, :, 0], expected[1])
    assert output.shape[2] == 1


def test_masks_are_broadcast_over_heads_rows_and_keys() -> None:
    attention = RowAttention.of(*operands(), ROWS)
    shared = random_masks(TOKENS)[0][:1]
    by_key = shared[0, 0]
    none = torch.zeros((), dtype=torch.bool)
    came = attention.under([shared, by_key, none])
    wide = attention.under(
        [m.expand(HEADS, len(ROWS), TOKENS).clone() for m in (shared, by_key, none)]
    )
    assert torch.equal(came.output, wide.output)
    assert torch.equal(came.lse, wide.lse)
    assert came.lse[:, :, 2].isneginf().all()


def test_masks_do_not_influence_one_another() -> None:
    attention = RowAttention.of(*operands(), ROWS)
    masks = random_masks(TOKENS)
    together, again = attention.under(masks), attention.under(masks[::-1])
    assert torch.equal(together.output, again.output.flip(2))
    assert torch.equal(together.lse, again.lse.flip(2))


def test_bfloat16_is_computed_in_float32() -> None:
    low = operands(dtype=torch.bfloat16)
    masks = random_masks(TOKENS)
    came = RowAttention.of(*low, ROWS).under(masks)
    query, key, value = (tensor.float() for tensor in low)
    same = RowAttention.of(query, key, value, ROWS).under(masks)
    assert torch.equal(came.output, same.output)
    assert torch.equal(came.lse, same.lse)


@pytest.mark.parametrize("padded", [False, True], ids=["all-valid", "padding"])
def test_further_keys_count_with_their_bias(padded: bool) -> None:
    head_dim = 5
    query, key, value = operands(head_dim)
    valid = padding() if padded else None
    generator = torch.Generator().manual_seed(2)
    more_key, more_value = torch.randn(2, BATCH, HEADS, MORE, head_dim, generator=generator)
    numbers = torch.tensor([[8, 1, 3, 8, 0, 2, 8], [8, 8, 8, 8, 8, 5, 0]])
    bias = numbers.float().log()[:, None, None]
    picked = query[:, ROWS].transpose(1, 2) * head_dim**-0.5
    attention = RowAttention.of(query, key, value, ROWS, valid=valid)
    masks = random_masks(TOKENS + MORE)
    # A row that sees further keys alone, and one that sees none that counts.
    masks[0][0, 1, :TOKENS] = False
    masks[0][0, 1, TOKENS:] = True
    masks[2][1, 4] = torch.arange(TOKENS + MORE) == TOKENS + 6
    own = attention.under([mask[..., :TOKENS] for mask in masks])
    more = RowAttention.over(picked, more_key, more_value, bias)
    rest = more.under([mask[..., TOKENS:] for mask in masks])
    output, lse = own.merged(rest)

    further = picked.double() @ more_key.double().mT + bias.double()
    logits = torch.cat([logits_of(query, key, head_dim**-0.5, valid), further], -1)
    values = torch.cat([value.transpose(1, 2), more_value], 2).double()
    for number, mask in enumerate(masks):
        expected = brute(logits, values, mask)
        assert_same(output[:, :, number], expected[0])
        assert_same(lse[:, :, number], expected[1])
    assert lse[1, 1, 2, 4] == -math.inf
    assert lse[0, 1, 2, 4].isfinite()


def test_a_row_of_padding_alone_is_empty_and_logits_far_apart_stay_finite() -> None:
    query, key, value = operands(spread=300.0)
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[0] = False
    output, lse = RowAttention.of(query, key, value, ROWS, valid=valid).dense()
    assert (output[0] == 0).all()
    assert lse[0].isneginf().all()
    logits = logits_of(query, key, 13**-0.5, None)[1]
    assert_same(lse[1, :, 0], logits.logsumexp(-1))
    assert output.isfinite().all()

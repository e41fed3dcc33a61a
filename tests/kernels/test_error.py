from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import error as module
from dit_sparse.kernels.error import Metric, pattern_error

BATCH, TOKENS, HEADS, DIM, CHANNELS = 2, 50, 3, 8, 20


def tensors(seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, BATCH, TOKENS, HEADS, DIM, generator=generator)
    return query * sharpness, key, value


def random_masks(candidates: int, rows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(candidates, HEADS, rows, TOKENS, generator=generator) < 0.4


def outputs(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, valid: Tensor | None = None
) -> Tensor:
    """float64 attention of all rows under a mask [heads, tokens, tokens]: [b, h, n, d]."""
    scores = torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) / DIM**0.5
    keep = mask if valid is None else mask & valid[:, None, None, :]
    attention = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)
    return attention @ value.double().permute(0, 2, 1, 3)


def brute(
    qkv: Sequence[Tensor],
    masks: Tensor,
    rows: Tensor,
    metric: Metric,
    projection: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """The definition in the docstring, one head and one sample at a time."""
    everything = torch.ones(HEADS, TOKENS, TOKENS, dtype=torch.bool)
    dense = outputs(qkv[0], qkv[1], qkv[2], everything, valid)
    result = torch.zeros(BATCH, HEADS, len(masks), dtype=torch.float64)
    for candidate, mask in enumerate(masks):
        whole = everything.clone()
        whole[:, rows] = mask
        sparse = outputs(qkv[0], qkv[1], qkv[2], whole, valid)
        for b in range(BATCH):
            counted = rows if valid is None else rows[valid[b, rows]]
            for h in range(HEADS):
                delta, reference = (sparse - dense)[b, h, counted], dense[b, h, counted]
                if projection is not None:
                    slices = projection.double().split(DIM, dim=1)
                    delta = delta @ slices[h].T
                    parts = [dense[b, i, counted] @ slices[i].T for i in range(HEADS)]
                    reference = torch.stack(parts).sum(0)
                if metric == "relative":
                    result[b, h, candidate] = delta.square().sum() / reference.square().sum()
                elif metric == "mse":
                    result[b, h, candidate] = delta.square().mean()
                else:
                    result[b, h, candidate] = delta.square().sum(-1).mean()
    return result


@pytest.mark.parametrize("padded", [False, True], ids=["all-valid", "padding"])
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "through-wo"])
@pytest.mark.parametrize("metric", ["relative", "mse", "sum_d"])
@pytest.mark.parametrize("chunk", [1, 2**28], ids=["row-by-row", "at-once"])
def test_error_is_the_definition(
    metric: Metric, projected: bool, padded: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    qkv = tensors()
    rows = torch.tensor([0, 3, 11, 30, 48])
    masks = random_masks(4, len(rows))
    generator = torch.Generator().manual_seed(2)
    projection = torch.randn(CHANNELS, HEADS * DIM, generator=generator) if projected else None
    valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    valid[1, 45:] = False
    error = pattern_error(
        *qkv,
        lambda part: masks[:, :, part],
        rows,
        metric=metric,
        projection=projection,
        valid=valid if padded else None,
    )
    expected = brute(qkv, masks, rows, metric, projection, valid if padded else None)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), expected, rtol=1e-4, atol=1e-9)


def test_full_is_exact_and_skip_loses_everything() -> None:
    rows = torch.arange(0, TOKENS, 7)
    masks = torch.tensor([True, False])[:, None, None].expand(2, len(rows), TOKENS)
    error = pattern_error(*tensors(), lambda part: masks[:, part], rows)
    assert (error[..., 0] == 0).all()
    torch.testing.assert_close(error[..., 1], torch.ones(BATCH, HEADS))


def test_a_mask_may_be_shared_by_heads_or_rows() -> None:
    rows = torch.tensor([1, 2])
    by_key = random_masks(1, 1)[0]
    shared = by_key[0].expand(2, TOKENS)
    error = pattern_error(*tensors(), lambda part: (by_key, shared[part]), rows)
    torch.testing.assert_close(error[:, 0, 0], error[:, 0, 1])
    assert not torch.isclose(error[:, 1, 0], error[:, 1, 1]).any()


def test_low_precision_inputs_are_judged_in_float32() -> None:
    rows = torch.arange(TOKENS)
    low = [tensor.bfloat16() for tensor in tensors()]
    masks = random_masks(2, TOKENS)
    half = pattern_error(low[0], low[1], low[2], lambda part: masks[:, :, part], rows)
    same = [tensor.float() for tensor in low]
    single = pattern_error(same[0], same[1], same[2], lambda part: masks[:, :, part], rows)
    assert torch.equal(half, single)


def test_scores_far_apart_stay_finite() -> None:
    query, key, value = tensors(sharpness=300.0)
    masks = random_masks(3, TOKENS)
    error = pattern_error(query, key, value, lambda part: masks[:, :, part], torch.arange(TOKENS))
    assert error.isfinite().all()


def test_a_head_without_effect_has_no_error() -> None:
    query, key, value = tensors()
    masks = random_masks(3, TOKENS)
    none = torch.zeros_like(value)
    error = pattern_error(query, key, none, lambda part: masks[:, :, part], torch.arange(TOKENS))
    assert (error == 0).all()


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metric must be one of relative, mse, sum_d, came 'l1'"):
        pattern_error(*tensors(), lambda part: [], torch.arange(3), metric="l1")  # pyright: ignore

import pytest
import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.rows import row_weights, sample_rows, valid_tokens


@pytest.mark.parametrize(("tokens", "count"), [(3840, 128), (17776, 64), (100, 99), (7, 7)])
def test_rows_are_different_ascending_and_spread(tokens: int, count: int) -> None:
    rows = sample_rows(tokens, count)
    assert len(rows) == count
    assert (rows.diff() > 0).all()
    assert rows[0] >= 0
    assert rows[-1] < tokens
    # Three-gap theorem: the gaps of a golden-ratio sequence stay within a small factor.
    assert rows.diff().max() <= 2.7 * tokens / count + 1


def test_rows_do_not_alias_with_a_tile() -> None:
    residues = (sample_rows(3840, 128) % 16).bincount(minlength=16)
    assert residues.min() >= 3
    assert residues.max() <= 14


def test_more_rows_than_tokens_are_all_rows() -> None:
    assert sample_rows(5, 128).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="at least 1 sampled row, came 0"):
        sample_rows(5, 0)


def test_weights_are_those_of_softmax() -> None:
    query, key = torch.randn(2, 2, 30, 3, 8, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0, 7, 29])
    weights = row_weights(query, key, rows).double()
    scores = torch.einsum("bihd,bjhd->bhij", query[:, rows].double(), key.double()) / 8**0.5
    torch.testing.assert_close(
        weights / weights.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6, rtol=0
    )


def test_G9_padding_has_no_weight_and_rows_stay_finite() -> None:
    grid = TokenGrid(1, 2, 2, text_after=3, valid_text=(1, 3))
    valid = valid_tokens(grid)
    assert valid is not None
    assert valid.tolist() == [[True] * 5 + [False] * 2, [True] * 7]
    query = torch.zeros(2, 7, 1, 4)
    key = torch.zeros(2, 7, 1, 4)
    query[..., 0] = 50.0
    key[0, 5:, :, 0] = 50.0
    weights = row_weights(query, key, torch.arange(7), valid=valid)
    assert weights[0, 0, 0].tolist() == [1] * 5 + [0] * 2
    assert weights[1, 0, 0].tolist() == [1] * 7
    assert valid_tokens(TokenGrid(1, 2, 2, text_after=3)) is None

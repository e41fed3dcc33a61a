import itertools

import pytest
import torch

from dit_sparse.kernels.merge import merge


def random_parts(count: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(count)
    return [
        (
            torch.randn(2, 5, 3, 8, generator=generator, dtype=dtype),
            torch.randn(2, 3, 5, generator=generator, dtype=dtype) * 3,
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_G3_merge_of_any_partition_is_dense(parts: int, operands, masked_attention):
    query, key, value = operands(23, 2, dtype=torch.float64)
    owner = torch.randint(parts, (23,), generator=torch.Generator().manual_seed(parts))
    pieces = [masked_attention(query, key, value, owner == part) for part in range(parts)]
    output, lse = merge(pieces)
    dense_output, dense_lse = masked_attention(query, key, value, owner >= 0)
    torch.testing.assert_close(output, dense_output, atol=1e-10, rtol=0)
    torch.testing.assert_close(lse, dense_lse, atol=1e-10, rtol=0)


def test_G3_merge_is_commutative_and_associative():
    parts = random_parts(3)
    expected = merge(parts)
    for order in itertools.permutations(parts):
        torch.testing.assert_close(merge(order), expected, atol=1e-12, rtol=0)
        nested = merge([merge(order[:2]), order[2]])
        torch.testing.assert_close(nested, expected, atol=1e-12, rtol=0)


def test_G3_a_part_without_keys_is_neutral():
    (output, lse), (other, _) = random_parts(2)
    nothing = torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(merge([(output, lse), (other, nothing)]), (output, lse))


def test_G3_no_keys_at_all_give_zero_and_no_nan():
    (output, lse), (other, _) = random_parts(2)
    nothing = torch.full_like(lse, -torch.inf)
    merged, total = merge([(output, nothing), (other, nothing)])
    assert not merged.any()
    assert (total == -torch.inf).all()


@pytest.mark.parametrize("level", [1e4, -1e4])
def test_G3_merge_is_stable_at_extreme_lse(level: float):
    parts = random_parts(2, torch.float32)
    lifted = [(output, lse.round() + level) for output, lse in parts]
    output, lse = merge(lifted)
    expected, total = merge([(output, lse.round()) for output, lse in parts])
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, total + level, atol=2e-3, rtol=0)


def test_half_precision_outputs_are_summed_in_the_dtype_of_the_lse():
    parts = [(output.bfloat16(), lse) for output, lse in random_parts(3, torch.float32)]
    output, lse = merge(parts)
    exact, _ = merge([(output.double(), lse.double()) for output, lse in parts])
    assert output.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(output, exact.bfloat16())


def test_nothing_to_merge_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        merge([])

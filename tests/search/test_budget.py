import math

import pytest

from dit_sparse.search.budget import Budget, parse_budget


def test_budget_reads_back_from_its_text() -> None:
    assert parse_budget(str(Budget(density=0.25))) == Budget(density=0.25)
    assert parse_budget(" density = 1 ") == Budget(density=1.0)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, math.nan, math.inf, True], ids=str)
def test_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], came"):
        Budget(density=density)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3", "expected name=value"),
        ("sparsity=0.3", "with a name of density, came 'sparsity=0.3'"),
        ("density=", "expected a number after density=, came ''"),
        ("density=a third", "expected a number after density="),
        ("density=30", "share that is computed"),
    ],
    ids=["no-name", "unknown", "empty", "words", "percent"],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_budget(text)

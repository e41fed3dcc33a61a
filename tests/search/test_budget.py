import doctest
import math

import pytest

from dit_sparse.search import budget as module
from dit_sparse.search.budget import BUDGETS, Budget, parse_budget


def test_examples_hold() -> None:
    found = doctest.testmod(module)
    assert found.attempted >= 3
    assert found.failed == 0


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_reads_back_from_its_text(name: str) -> None:
    value = 0.25 if name in ("density", "error") else 2.5
    asked = Budget(**{name: value})
    assert (asked.name, asked.value) == (name, value)
    assert parse_budget(str(asked)) == asked
    assert parse_budget(f" {name} = 1 ") == Budget(**{name: 1.0})
    assert repr(asked) == f"Budget({name}={value})"


def test_exactly_one_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"exactly one of density, error.*came none; for"):
        Budget()
    with pytest.raises(ValueError, match=r"came density=0\.3, psnr=30; for"):
        Budget(density=0.3, psnr=30)


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True], ids=str)
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("density", r"in \(0, 1\]"),
        ("error", "a finite number of at least 0"),
        ("speedup", "a finite number of at least 1"),
        ("latency", "a positive number of seconds"),
        ("psnr", r"in \(0, 100\] dB"),
    ],
)
def test_out_of_range_is_refused(name: str, limit: str, value: float) -> None:
    if (name, value) == ("error", 0):
        assert Budget(error=value).value == 0
        return
    with pytest.raises(ValueError, match=f"{name} must be {limit}, came {value}"):
        Budget(**{name: value})


def test_upper_ends() -> None:
    for name, value in (("density", 1.01), ("psnr", 100.5), ("speedup", 0.99)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            Budget(**{name: value})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3", "expected name=value"),
        ("sparsity=0.3", "with a name of density, error, .*, came 'sparsity=0.3'"),
        ("density=", "expected a number after density=, came ''"),
        ("psnr=thirty", "expected a number after psnr=.* for instance psnr=30"),
        ("density=30", "share that is computed"),
    ],
    ids=["no-name", "unknown", "empty", "words", "percent"],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_budget(text)

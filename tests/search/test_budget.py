import doctest
import math
import re
from typing import Any

import pytest

from dit_sparse.search import budget as module
from dit_sparse.search.budget import BUDGETS, Budget, parse_budget


def test_examples_hold() -> None:
    found = doctest.testmod(module)
    assert found.attempted >= 3
    assert found.failed == 0


@pytest.mark.parametrize("name", BUDGETS)
def test_budget_reads_back_from_its_text(name: str) -> None:
    value = 0.25 if name in ("flops", "density", "error") else 2.5
    limits: dict[str, Any] = {name: value}
    asked = Budget(**limits)
    assert (asked.name, asked.value) == (name, value)
    assert parse_budget(str(asked)) == asked
    one: dict[str, Any] = {name: 1.0}
    assert parse_budget(f" {name} = 1 ") == Budget(**one)
    assert repr(asked) == f"Budget({name}={value})"
    held = Budget(**limits, cache_bytes=20_000_000)
    assert (held.name, held.value, held.cache_bytes) == (name, value, 20_000_000)
    assert str(held) == f"{name}={value},cache_bytes=20000000"
    assert parse_budget(str(held)) == held != asked
    assert parse_budget(f"cache_bytes=2e7, {name}={value}") == held
    assert repr(held) == f"Budget({name}={value}, cache_bytes=20000000)"


def test_flops_and_bytes_of_caches_are_read_from_a_command_line() -> None:
    asked = parse_budget("flops=0.3,cache_bytes=20e6")
    assert (asked.flops, asked.density, asked.cache_bytes) == (0.3, None, 20_000_000)
    assert type(asked.cache_bytes) is int
    assert parse_budget("flops=0.3,cache_bytes=0").cache_bytes == 0
    assert parse_budget("flops=0.3").cache_bytes is None


def test_exactly_one_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"exactly one of flops, density, error.*came none; for"):
        Budget()
    with pytest.raises(ValueError, match=r"came density=0\.3, psnr=30; for"):
        Budget(density=0.3, psnr=30)
    with pytest.raises(ValueError, match=r"came flops=0\.3, density=0\.3; for instance"):
        Budget(flops=0.3, density=0.3)
    with pytest.raises(ValueError, match=r"exactly one of .* came none"):
        Budget(cache_bytes=0)


@pytest.mark.parametrize("value", [-1, 0.5, True, "20"], ids=repr)
def test_bytes_are_a_number_of_bytes(value: Any) -> None:
    message = f"cache_bytes must be a number of bytes of at least 0, came {value!r}; 0 keeps none"
    with pytest.raises(ValueError, match=re.escape(message)):
        Budget(flops=0.3, cache_bytes=value)


@pytest.mark.parametrize("asked", [{"flops": 0.3, "gate": 1.0}, {"price": 0.3, "gate": -1.0}])
def test_a_gate_stands_beside_a_price(asked: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"gate must be .* beside a price, came .*price=0\.5,gate=1"
    ):
        Budget(**asked)
    both = parse_budget("price=0.5, gate=1")
    assert (both.name, both.value, both.gate) == ("price", 0.5, 1.0)
    assert parse_budget(str(both)) == both
    assert repr(both) == "Budget(price=0.5, gate=1.0)"


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True], ids=str)
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("flops", r"in \(0, 1\]"),
        ("density", r"in \(0, 1\]"),
        ("error", "a finite number of at least 0"),
        ("speedup", "a finite number of at least 1"),
        ("latency", "a positive number of seconds"),
        ("psnr", r"in \(0, 100\] dB"),
        ("price", "a finite number of at least 0"),
    ],
)
def test_out_of_range_is_refused(name: str, limit: str, value: float) -> None:
    asked: dict[str, Any] = {name: value}
    if name in ("error", "price") and value == 0:
        assert Budget(**asked).value == 0
        return
    with pytest.raises(ValueError, match=f"{name} must be {limit}, came {value}"):
        Budget(**asked)


@pytest.mark.parametrize(
    "asked", [{"flops": 1.01}, {"density": 1.01}, {"psnr": 100.5}, {"speedup": 0.99}], ids=str
)
def test_ends(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))} must be"):
        Budget(**asked)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3", "expected name=value"),
        ("sparsity=0.3", "with a name of flops, density, .*, came 'sparsity=0.3'"),
        ("density=", "expected a number after density=, came ''"),
        ("psnr=thirty", "expected a number after psnr=.* for instance psnr=30"),
        ("density=30", "share that is computed"),
        ("flops=30", "share of dense attention"),
        ("flops=0.3,cache_bytes", "expected name=value .* gate or cache_bytes beside it"),
        ("flops=0.3,flops=0.4", "expected name=value .*, came 'flops=0.3,flops=0.4'"),
        ("flops=0.3,", "expected name=value"),
        ("flops=0.3,density=0.4", "expected exactly one of .* came flops=0.3, density=0.4"),
        ("cache_bytes=20e6", "expected exactly one of .* came none"),
        ("flops=0.3,cache_bytes=much", "a number after cache_bytes=, came 'much'; .*=1000000000"),
        ("flops=0.3,cache_bytes=1.5", r"a number of bytes of at least 0, came 1\.5"),
    ],
    ids=[
        "no-name",
        "unknown",
        "empty",
        "words",
        "percent",
        "flops",
        "no-bytes",
        "twice",
        "comma",
        "two",
        "bytes-alone",
        "byte-words",
        "half-byte",
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_budget(text)

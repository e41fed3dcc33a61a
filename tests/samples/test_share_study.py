"""The study of shares: which bars a preset is held to, and what the table says of them."""

from dataclasses import replace
from typing import Any

import pytest

from dit_sparse.pipelines.presets import COMBINATIONS, PRESETS
from share_study import NAMES, Share, bars, table

SHARE = Share("adaspa", 100.0, 40.0, 2.0, 3.0, 10**6, 10**6)
ENVIRONMENT: dict[str, Any] = {
    "machine": {"processor": "a processor", "cores": 2},
    "packages": {"torch": "2", "diffusers": "3"},
    "threads": 1,
    "revision": "abc",
}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("adaspa", {"searches": 0.02, "bytes off": 0.0}),
        ("sparsed", {"searches": 0.02, "bytes off": 0.0}),
        ("asa", {"scores": 0.05, "bytes off": 0.0}),
        ("sparge", {"scores": 0.05, "bytes off": 0.0}),
        ("gna+complement", {"complement": 0.075, "bytes off": 0.0}),
        ("adaspa+complement", {"searches": 0.02, "complement": 0.075, "bytes off": 0.0}),
        ("svg2", {"bytes off": 0.0}),
        ("gna", {"bytes off": 0.0}),
    ],
)
def test_a_preset_is_held_to_the_bars_of_its_kind(preset: str, expected: Any) -> None:
    found = {bar.what: bar.share for bar in bars(replace(SHARE, preset=preset))}
    assert found == pytest.approx(expected)


def test_what_neither_scores_nor_keeps_has_no_bar() -> None:
    assert bars(replace(SHARE, preset="gna", cache_bytes=0, predicted_bytes=0)) == ()


@pytest.mark.parametrize(
    ("change", "over"),
    [
        ({}, []),
        ({"search": 5.1}, ["searches"]),
        ({"remainder": 4.1}, ["complement"]),
        ({"cache_bytes": 1_060_000}, ["bytes off"]),
        ({"cache_bytes": 940_000}, ["bytes off"]),
        ({"predicted_bytes": 0}, ["bytes off"]),
    ],
)
def test_bars_are_missed_by_what_is_more(change: dict[str, Any], over: list[str]) -> None:
    share = replace(SHARE, preset="adaspa+complement", **change)
    assert [bar.what for bar in bars(share) if not bar.kept] == over


def test_the_table_has_a_row_for_every_preset_and_marks_what_is_over() -> None:
    shares = [replace(SHARE, preset=name) for name in NAMES]
    lines = table([*shares, replace(SHARE, search=6.0)], 20, ENVIRONMENT).splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*NAMES, "adaspa"]
    assert rows[0] == (
        "| adaspa | 100.0 | 40.0 | 5.0% | 7.5% | 2.0% | 3.0% | 1.0 | 1.0 "
        "| searches 2.0% of 5%; bytes off 0.0% of 5% |"
    )
    assert "searches 6.0% **over** 5%" in rows[-1]
    assert "20 steps, the backend native. a processor, 2 cores, 1 threads" in lines[-1]


def test_every_published_preset_is_measured_and_every_name_is_known() -> None:
    assert set(PRESETS) <= set(NAMES) <= set(PRESETS | COMBINATIONS)

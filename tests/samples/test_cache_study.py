"""The study of caches: which heads keep one, and what the table says of the figures."""

from typing import Any

import pytest

from cache_study import LEAN, PERIODS, STUDIED, Setting, Where, settings, table
from dit_sparse.comparison import Comparison, DenseResult, PlanResult, Spread
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.remainder import Complement, Drop
from dit_sparse.metrics import Summary
from dit_sparse.settings import Settings
from tests import tiny

GRID = TokenGrid(3, 4, 4)
BOTH, NONE, FIRST = (True, True), (False, False), (True, False)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("all heads", [BOTH] * 4),
        ("first half of the layers", [BOTH, BOTH, NONE, NONE]),
        ("second half of the layers", [NONE, NONE, BOTH, BOTH]),
        ("first head of each layer", [FIRST] * 4),
    ],
)
def test_caches_are_kept_where_the_setting_says(where: Where, expected: Any) -> None:
    plan = Setting("adaspa", Complement(), where=where).plan(tiny.wan(layers=4), GRID, 20)
    kept = [
        tuple(rest == Complement() for rest in plan.phases[0].remainders_of(layer))
        for layer in plan.assignment
    ]
    assert kept == expected
    assert plan.schedule.dense_first == 5


def test_half_of_the_bytes_is_that_of_both_branches_without_lses() -> None:
    plans = {
        where: Setting("adaspa", Complement(), where=where).plan(tiny.wan(), GRID, 20)
        for where in ("all heads", "half of the bytes")
    }
    rows = GRID.tokens * 2 * 2  # layers, heads
    assert plans["all heads"].cache_limit is None
    assert plans["half of the bytes"].cache_limit == rows * (12 * 2 + 4)


def test_the_table_has_a_row_for_every_setting_and_reads_the_gains_off_it() -> None:
    every = settings()
    assert len({setting.name for setting in every}) == len(every)
    result = Comparison(
        "model",
        "",
        Settings(64, 64, 29, 20, 3.0),
        (),
        DenseResult(Spread(1, 1, 1), 1),
        tuple(_measured(setting) for setting in every),
        {},
        {},
    )
    lines = table(result)
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(every)
    for pattern, line in zip(STUDIED, lines[-3:-1], strict=True):
        assert line.startswith(f"* {pattern} {LEAN:g}, beside dropping (20.00 dB, FLOPs 0.300)")
        for period in PERIODS:
            gain = 8 - period / 4
            assert f"{gain:+.2f} dB every {period} steps for {1 / period:+.3f} FLOPs" in line
        assert "-0.50 dB every 3, -0.50 dB every 5, -0.50 dB every 8." in line
        assert "in float8 +6.75 dB with 50% of the bytes" in line
        assert "+3.38 dB on first half of the layers" in line


def _measured(setting: Setting) -> PlanResult:
    """Figures that follow from the setting."""
    gain = (8 - setting.period / 4) * (0.5 if setting.where != "all heads" else 1)
    kept = setting.remainder != Drop()
    psnr = 20 + kept * (gain - 0.5 * setting.stagger)
    small = setting.remainder == Complement("float8")
    none, spread = Summary(0, 0, 0), Spread(1, 1, 1)
    return PlanResult(
        name=setting.name,
        digest="",
        density={},
        density_sparse=None,
        flops=0.3 + kept / setting.period,
        cache_bytes=10**6 if small else 2 * 10**6,
        stages={},
        attention_seconds=spread,
        dense_calls={},
        speedup=spread,
        seconds=spread,
        warm_up_seconds=1,
        psnr_rgb=Summary(psnr, 0, psnr),
        ssim=none,
        runs=(),
    )

"""Bounds of a plan: those of its heads, one after the other."""

from dataclasses import replace

import pytest

from dit_sparse.bounds import of_plan
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Neighborhood, Pattern, Skip
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule

GRID = (3, 6, 8)
HEADS: tuple[Pattern, ...] = (Full(), Skip(), Band(20), Neighborhood((1, 3, 3)), Full())
PLAN = Plan(
    {"transformer": ModelFingerprint("WanTransformer3DModel", 1, 5, 12, "0" * 64)},
    {"transformer.blocks.0.attn1": HEADS},
    Schedule(2, 1),
    grid=GRID,
    block=16,
)


def test_bounds_are_those_of_all_heads_in_turn() -> None:
    found = of_plan(PLAN, None)
    slowest = mean = 0.0
    for pattern in HEADS:
        blocks = block_indices([pattern], TokenGrid(*GRID), block_q=16, block_k=16)
        rows = [len(list(blocks.entries(0, row))) for row in range(blocks.query_blocks)]
        slowest += max(rows) / blocks.key_blocks
        mean += sum(rows) / len(rows) / blocks.key_blocks
    assert found["bound"] == pytest.approx(5 / slowest)
    assert found["mean_bound"] == pytest.approx(5 / mean)
    assert (found["patterns"][0]["pattern"], found["patterns"][0]["heads"]) == ("full", 2)
    kept = [pattern.mask(TokenGrid(*GRID)).double().mean().item() for pattern in HEADS]
    assert found["density"]["element"] == pytest.approx(sum(kept) / 5)


def test_a_plan_that_computes_nothing_has_no_bound() -> None:
    skipped = replace(PLAN, assignment={"transformer.blocks.0.attn1": (Skip(),) * 5})
    found = of_plan(skipped, (2, 4, 4))
    assert (found["bound"], found["mean_bound"], found["grid"]) == (None, None, [2, 4, 4])


def test_without_a_grid_there_is_no_bound() -> None:
    with pytest.raises(ValueError, match="give one: --grid"):
        of_plan(replace(PLAN, grid=None), None)

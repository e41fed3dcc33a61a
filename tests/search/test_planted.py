"""Planted heads: query, key and value of one head, written so that its attention has one form; the
search has to find it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Skip
from dit_sparse.kernels.remainder import Complement, Drop
from dit_sparse.pipelines.capture import observe_attention
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search import generations
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.space import Candidate
from tests import tiny

GRID = TokenGrid(8, 12, 12)
BLOCK = 16
STRIPES = (3, 31, 57)
Head = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def near(places: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Scores that fall with the distance of `places` [tokens, axes]: -|a-b|^2 / (2 radius^2)."""
    scaled = places.float() / radius
    square = -0.5 * scaled.square().sum(-1, keepdim=True)
    one = torch.ones_like(square)
    return torch.cat([scaled, square, one], -1), torch.cat([scaled, one, square], -1)


def local(_: torch.Generator) -> tuple[Tensor, Tensor]:
    return near(torch.arange(GRID.video)[:, None], 6.0)


def same_pixel(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pixels = torch.nn.functional.normalize(
        torch.randn(GRID.height * GRID.width, 32, generator=generator), dim=-1
    )
    tokens = 5 * pixels.repeat(GRID.frames, 1)
    return tokens, tokens


def stripes(_: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.zeros(GRID.video, 1)
    for block in STRIPES:
        chosen[block * BLOCK : (block + 1) * BLOCK] = 12.0
    return torch.ones(GRID.video, 1), chosen


def uniform(_: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.zeros(GRID.video, 1), torch.zeros(GRID.video, 1)


def box(_: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(GRID.video)
    return near(torch.stack(GRID.coordinates(tokens), -1) // 4, 0.25)


Forms = tuple[tuple[Head, float], ...]
HEADS: tuple[Forms, ...] = (
    ((local, 1.0), (same_pixel, 1.0), (stripes, 2.0)),
    # The mean of many random values is small; a head that needs them all must speak up.
    ((uniform, 12.0), (uniform, 1e-3), (box, 1.0)),
)
LARGE: dict[str, Any] = {
    "height": 192,
    "width": 192,
    "frames": 29,
    "guidance": 1.0,
    "block": BLOCK,
    "rows": 96,
    "anchors": 1,
}


def planted(forms: Forms, seed: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.zeros(3, 1, GRID.video, len(forms), dim)
    for head, (form, loudness) in enumerate(forms):
        left, right = form(generator)
        query[0, :, head, : left.shape[1]] = left * dim**0.5
        key[0, :, head, : right.shape[1]] = right
        value[0, :, head] = loudness * torch.randn(GRID.video, dim, generator=generator)
    return query, key, value


Observe = Callable[[Any, Any, Any], AbstractContextManager[None]]


def planting(make: Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]) -> Observe:
    """Observes `make(layer, step, dim)` in the place of what a pipeline computes."""

    def observing(pipe: Any, observer: Any, stopwatch: Any) -> AbstractContextManager[None]:
        def observe(
            site: Any, branch: str, step: int, steps: int, grid: TokenGrid, *qkv: Any
        ) -> None:
            assert grid == GRID
            made = make(site.layer, step, qkv[0].shape[-1])
            observer(site, branch, step, steps, grid, *made)

        return observe_attention(pipe, observe, stopwatch)

    return observing


def test_SV3_planted_heads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(layer: int, step: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        return planted(HEADS[layer], 10 * layer + step, dim)

    monkeypatch.setattr(generations, "observe_attention", planting(make))
    found = search_plan(
        tiny.wan(heads=3, head_dim=36),
        ["a cat"],
        Budget(density=0.215),
        steps=3,
        candidates=("skip", "band", "neighborhood", "columns"),
        schedules=(Schedule(),),
        **LARGE,
    )
    (near_raster, near_pixel, column), (everything, nothing, around) = found.assignment.values()
    assert isinstance(near_raster, Band)
    assert near_raster.axis_order == "raster"
    assert isinstance(near_pixel, Band)
    assert near_pixel.axis_order == "pixel_major"
    assert isinstance(column, Columns)
    assert set(column.blocks) >= set(STRIPES)
    assert everything == Full()
    assert nothing == Skip()
    assert isinstance(around, Neighborhood)
    assert not found.remainders
    assert found.schedule == Schedule()
    assert found.predicted["density"] <= 0.215
    assert found.predicted["error"] < 0.05


def test_what_stays_the_same_is_cached_and_what_moves_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three heads: one whose attention is everywhere and the same at all steps, a local one and
    one that is everywhere, both with new values at each step."""
    forms: Forms = ((uniform, 12.0), (local, 1.0), (uniform, 12.0))

    def make(layer: int, step: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        still, moving = (planted(forms, seed, dim) for seed in (100, step))
        for own, fixed in zip(moving, still, strict=True):
            own[:, :, 0] = fixed[:, :, 0]
        return moving

    monkeypatch.setattr(generations, "observe_attention", planting(make))
    pipe = tiny.wan(layers=1, heads=3, head_dim=36)
    schedule = Schedule(dense_first=1)
    kinds = ("skip", "band", "complement")
    given: dict[str, Any] = LARGE | {"steps": 6, "schedules": (schedule,)}
    # Dense takes 6 passes: the first head 2, the local one little more, the last all.
    budget = Budget(flops=(2 + 2 + 6) / 18)
    found = search_plan(pipe, ["a cat"], budget, candidates=kinds, **given)
    (patterns,), (remainders,) = found.assignment.values(), found.remainders.values()
    assert (patterns[0], remainders[0]) == (Skip(), Complement())
    assert isinstance(patterns[1], Band)
    assert patterns[1].axis_order == "raster"
    assert (patterns[2], remainders[1:]) == (Full(), (Drop(), Drop()))
    assert found.predicted["error"] < 0.01
    dropping = search_plan(pipe, ["a cat"], budget, candidates=kinds[:2], **given)
    assert dropping.predicted["error"] > 4 * found.predicted["error"]

    # A plan that renews every second step takes half of all steps for the first head.
    often: dict[str, Any] = given | {"schedules": (replace(schedule, renew_every=2),)}
    renewing = search_plan(pipe, ["a cat"], Budget(flops=0.7), candidates=kinds, **often)
    evidence = Evidence.of_plan(renewing)
    skipped = evidence.number(0, 0, Candidate(Skip(), Complement()))
    tables = evidence.tables(often["schedules"][0])
    assert tables.flops[0, 0, skipped].item() == pytest.approx((1 + 3) / 6)
    assert tables.error[0, 0, skipped].item() < 1e-5 < tables.error[0, 2, skipped].item()

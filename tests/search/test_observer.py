"""The errors that a search takes down, against the kernels run over all rows, in float64."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from einops import einsum, rearrange
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.column_mass import column_mass, largest
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import (
    Cached,
    Complement,
    Drop,
    Pair,
    Pooled,
    Remainder,
    Rescale,
    cache_of,
)
from dit_sparse.kernels.rows import sample_rows
from dit_sparse.kernels.score import Mass, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.capture import AttentionSite
from dit_sparse.search import observer as module
from dit_sparse.search.course import Sightings
from dit_sparse.search.observer import Scoring
from dit_sparse.search.space import Space

HEADS, DIM, BATCH, BLOCK = 3, 6, 2, 4
BRANCHES = "cond", "uncond"
FULL: tuple[Pattern, ...] = (Full(),) * HEADS
SEEN = Sightings(5, (1, 2), (0, 1, 2))
PATTERNS: tuple[Pattern, ...] = (
    Full(),
    Skip(),
    Band(4),
    Band(3, "pixel_major"),
    Neighborhood((1, 3, 3)),
    Neighborhood((2, 2, 4), (1, 2, 2)),
    Scored(Mass(), TopRow(0.3)),
    Scored(Sampled(2), TopRow(0.4)),
    Scored(Mass(rows=2), TopRow(0.3), "gilbert"),
)
EXACT: tuple[Remainder, ...] = (
    Drop(),
    Pooled(2),
    Rescale(0.1, storage="float32"),
    Complement("float32"),
)
GRIDS = [
    TokenGrid(2, 3, 5),
    TokenGrid(3, 3, 3, text_before=6),
    TokenGrid(2, 3, 5, text_after=5),
    TokenGrid(2, 3, 4, text_after=7, valid_text=(3, 7)),
    TokenGrid(1, 5, 5, text_before=6, valid_text=(6, 2)),
]
SITE = AttentionSite("transformer", "blocks.0.attn1", 0)


@cache
def call(grid: TokenGrid, step: int, branch: str) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, peaked, and drifting with the step."""
    generator = torch.Generator().manual_seed(len(branch))
    shape = 3, BATCH, grid.tokens, HEADS, DIM
    first, other = (torch.randn(shape, generator=generator) for _ in range(2))
    query, key, value = first + 0.3 * step * other
    return 2 * query, key, value


def projection() -> Any:
    torch.manual_seed(0)
    return SimpleNamespace(to_out=[torch.nn.Linear(HEADS * DIM, 10)])


def scoring(
    grid: TokenGrid,
    space: Space,
    *,
    through_wo: bool = True,
    rows: int = 1000,
    metric: Literal["relative", "mse"] = "relative",
) -> Scoring:
    modules = {SITE.name: projection()} if through_wo else None
    plain = replace(grid, valid_text=None)
    return Scoring(modules, plain, BLOCK, space, SEEN, rows, metric)


def watch(observer: Scoring, grid: TokenGrid, steps: int = SEEN.steps) -> None:
    for step in range(steps):
        for branch in BRANCHES:
            observer(SITE, branch, step, SEEN.steps, grid, *call(grid, step, branch))


@cache
def blocks_at(
    patterns: tuple[Pattern, ...], pooled: int, grid: TokenGrid, step: int, branch: str
) -> BlockIndices:
    """What a run that renews at a step lists for its heads."""
    first = patterns[0]
    if not isinstance(first, Scored):
        return block_indices(patterns, grid, block_q=BLOCK, block_k=BLOCK, pooled=pooled)
    query, key, _ = call(grid, step, branch)
    cut = geometry(first.order, grid, HEADS, BLOCK)
    lse = attend(FULL, 0, grid, step, step, branch)[1].float() if first.score.needs_lse else None
    return scored_blocks(first, query, key, cut, lse=lse, pooled=pooled)


@cache
def attend(
    patterns: tuple[Pattern, ...], pooled: int, grid: TokenGrid, renewed: int, step: int,
    branch: str,
) -> Pair:  # fmt: skip
    """The kernel at a step over what was listed when it was `renewed`."""
    query, key, value = (tensor.double() for tensor in call(grid, step, branch))
    blocks = blocks_at(patterns, pooled, grid, renewed, branch)
    return sparse_attention(query, key, value, blocks, backend="reference")


def output_of(
    patterns: tuple[Pattern, ...], remainder: Remainder, grid: TokenGrid, renewed: int, age: int,
    branch: str,
) -> Tensor:  # fmt: skip
    """What a run puts out that renewed `age` steps ago."""
    pooled = remainder.level if isinstance(remainder, Pooled) else 0
    sparse = attend(patterns, pooled, grid, renewed, renewed + age, branch)
    if not isinstance(remainder, Cached):
        return sparse[0]
    dense = attend(FULL, 0, grid, renewed, renewed, branch)
    if age == 0:
        return dense[0]
    kept = cache_of(remainder, dense, attend(patterns, 0, grid, renewed, renewed, branch))
    return kept.apply(sparse, age)


def error_of(
    output: Tensor, dense: Tensor, weight: Tensor | None, rows: Tensor, real: Tensor, metric: str
) -> Tensor:
    """By its definition, head by head and sample by sample; the mean over samples, `[heads]`."""
    if weight is None:
        parts = torch.eye(DIM, dtype=torch.double).expand(HEADS, DIM, DIM)
    else:
        parts = rearrange(weight.double(), "c (h d) -> h c d", h=HEADS)
    errors = torch.zeros(BATCH, HEADS, dtype=torch.double)
    for sample in range(BATCH):
        own = rows[real[sample, rows]]
        lost = einsum((output - dense)[sample, own].double(), parts, "r h d, h c d -> h r c")
        whole = einsum(dense[sample, own].double(), parts, "r h d, h c d -> h r c")
        if metric == "mse":
            errors[sample] = lost.square().mean((1, 2))
        elif weight is None:
            errors[sample] = lost.square().sum((1, 2)) / whole.square().sum((1, 2))
        else:
            errors[sample] = lost.square().sum((1, 2)) / whole.sum(0).square().sum()
    return errors.mean(0)


def expected_sums(
    grid: TokenGrid, space: Space, *, weight: Tensor | None, rows: Tensor, metric: str
) -> Iterator[tuple[tuple[int, int, int, int], Tensor]]:
    """(slot, remainder, anchor, age) with the errors summed over branches, `[heads]`."""
    query, key, _ = call(grid, SEEN.anchors[0], BRANCHES[0])
    plain, real = replace(grid, valid_text=None), grid.real(BATCH)
    mass = column_mass(query, key, rows, plain, BLOCK, valid=real)
    slots = [(pattern,) * HEADS for pattern in space.patterns]
    slots += [tuple(largest(m, n, plain, BLOCK) for m in mass) for n in space.column_counts]
    for slot, patterns in enumerate(slots):
        for number, remainder in enumerate(space.remainders):
            if isinstance(patterns[0], Columns) and isinstance(remainder, Pooled):
                continue
            for i, anchor in enumerate(SEEN.anchors):
                for j, age in enumerate(SEEN.ages):
                    total = torch.zeros(HEADS, dtype=torch.double)
                    for branch in BRANCHES:
                        output = output_of(patterns, remainder, grid, anchor, age, branch)
                        dense = attend(FULL, 0, grid, anchor + age, anchor + age, branch)[0]
                        total += error_of(output, dense, weight, rows, real, metric)
                    yield (slot, number, i, j), total


def assert_brute(
    came: Tensor, expected: Iterator[tuple[tuple[int, int, int, int], Tensor]], rtol: float = 2e-4
) -> None:
    for place, total in expected:
        slot, number, i, j = place
        torch.testing.assert_close(
            came[:, slot, number, i, j], total, rtol=rtol, atol=1e-9,
            msg=lambda text, place=place: f"at {place}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_errors_are_those_of_what_would_run(grid: TokenGrid) -> None:
    space = Space(PATTERNS, (2,), EXACT)
    observer = scoring(grid, space)
    watch(observer, grid)
    sums = observer.sums[SITE.name]
    assert sums.error.shape == (HEADS, len(PATTERNS) + 1, 4, 2, 3)
    assert sums.count.tolist() == [[2, 2, 2], [2, 2, 2]]
    weight = projection().to_out[0].weight
    rows = torch.arange(grid.tokens)
    expected = expected_sums(grid, space, weight=weight, rows=rows, metric="relative")
    assert_brute(sums.error, expected)
    # Means of what columns leave are not taken.
    assert sums.error[:, -1, 1].isposinf().all()
    assert sums.error[:, :-1].isfinite().all()
    # Full attention loses nothing, and a cache nothing at the step it is taken.
    assert (sums.error[:, 0].abs() < 1e-9).all()
    assert (sums.error[:, :, 2:, :, 0] == 0).all()


@pytest.mark.parametrize("metric", ["relative", "mse"])
@pytest.mark.parametrize("through_wo", [False, True], ids=["plain", "through-wo"])
def test_a_few_rows_are_judged_by_themselves(
    metric: Literal["relative", "mse"], through_wo: bool
) -> None:
    grid = GRIDS[3]
    space = Space((Full(), Band(4), PATTERNS[-1]), (3,), EXACT)
    observer = scoring(grid, space, through_wo=through_wo, rows=9, metric=metric)
    watch(observer, grid)
    weight = projection().to_out[0].weight if through_wo else None
    rows = sample_rows(grid.tokens, 9)
    assert len(rows) == 9
    expected = expected_sums(grid, space, weight=weight, rows=rows, metric=metric)
    assert_brute(observer.sums[SITE.name].error, expected)


def test_caches_are_stored_as_a_run_stores_them() -> None:
    grid, space = GRIDS[1], Space((Full(), Skip(), Band(4)), (), (Drop(), Complement(), Rescale()))
    observer = scoring(grid, space)
    watch(observer, grid)
    came = observer.sums[SITE.name].error
    weight = projection().to_out[0].weight
    rows = torch.arange(grid.tokens)
    expected = expected_sums(grid, space, weight=weight, rows=rows, metric="relative")
    assert_brute(came, expected, rtol=2e-3)


def test_memory_does_not_change_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, space = GRIDS[1], Space(PATTERNS, (2,), EXACT)
    whole = scoring(grid, space)
    watch(whole, grid)
    monkeypatch.setattr(module, "HELD_BYTES", 1)
    by_head = scoring(grid, space)
    watch(by_head, grid)
    torch.testing.assert_close(
        by_head.sums[SITE.name].error, whole.sums[SITE.name].error, rtol=1e-5, atol=1e-10
    )


def test_generations_are_kept_apart() -> None:
    grid, space = GRIDS[0], Space((Full(), Band(4)), (2,), EXACT)
    observer = scoring(grid, space)
    watch(observer, grid)
    first = observer.sums[SITE.name]
    # Killed after the renewal at step 1.
    observer.begin(None)
    watch(observer, grid, steps=2)
    assert observer.sums[SITE.name].count.tolist() == [[2, 0, 0], [0, 0, 0]]
    observer.begin(None)
    watch(observer, grid)
    again = observer.sums[SITE.name]
    assert torch.equal(again.error, first.error)
    assert torch.equal(again.count, first.count)
    assert torch.equal(again.column_mass, first.column_mass)


def test_what_was_not_renewed_is_not_looked_at() -> None:
    """Another transformer ran at the first anchor."""
    grid, space = GRIDS[0], Space((Full(), Band(4)), (2,), (Drop(), Complement("float32")))
    observer = scoring(grid, space)
    for step in (2, 3, 4):
        observer(SITE, "cond", step, 5, grid, *call(grid, step, "cond"))
    sums = observer.sums[SITE.name]
    assert sums.count.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert (sums.error[..., 0, :] == 0).all()
    assert (sums.error[:, 1, 0, 1] > 0).all()


def test_calls_are_described_and_their_grid_must_stay() -> None:
    grid = GRIDS[2]
    observer = scoring(grid, Space((Full(),), (), (Drop(),)))
    watch(observer, grid)
    assert observer.described() == {
        "shape": [BATCH, grid.tokens, HEADS, DIM],
        "dtype": "float32",
        "device": "cpu",
        "branches": 2,
    }
    with pytest.raises(ValueError, match=r"grid changed from 2x3x5\+5 to 2x3x4\+7 during"):
        watch(observer, GRIDS[3])


def test_a_layer_without_an_output_projection_is_named() -> None:
    grid = GRIDS[0]
    space = Space((Full(),), (), (Drop(),))
    bare = Scoring({SITE.name: SimpleNamespace()}, grid, BLOCK, space, SEEN, 5, "relative")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1 has no output projection of its own"):
        watch(bare, grid)

"""Stages: what they are counted by, and that they do what a sparse step does."""

import pytest
import torch

from dit_sparse.kernels import stage as module
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.backend import Backend
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.calibration import Work
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.pattern import Band, Full
from dit_sparse.kernels.remainder import Cache, Complement, Rescale
from dit_sparse.kernels.score import Mass, Means, Random, Sampled
from dit_sparse.kernels.stage import STAGES, Apply, Calls, Search, Stage, Take

GRID = TokenGrid(3, 8, 8)
BLOCK, HEADS = 16, 2


@pytest.fixture
def calls() -> Calls:
    operands = torch.randn(3, 1, GRID.tokens, HEADS, 8)
    query, key, value = operands
    dense, sparse = (
        block_indices([pattern] * HEADS, GRID, raster(), BLOCK, BLOCK)
        for pattern in (Full(), Band(20))
    )
    call = AttentionCall(query, key, value, sparse, 8**-0.5)
    pairs = (sparse_attention(query, key, value, blocks) for blocks in (dense, sparse))
    return Calls(call, *pairs)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        # 300 tokens are 5 blocks of 64: 16 rows of each, then all; 32 x 32 of 64 x 64 logits.
        (Search(Mass()), Work(14.0625, 6 * (300 / 128) ** 2 / 4, 75)),
        (Search(Mass(rows=None)), Work(14.0625, 6 * (300 / 128) ** 2, 75)),
        (Search(Sampled()), Work(14.0625, 6 * (300 / 128) ** 2 / 4, 75)),
        (Search(Means()), Work(14.0625, 6 * (300 / 128) ** 2 / 64**2, 75)),
        (Search(Random()), Work(14.0625, 0.0, 75)),
        (Take(Complement()), Work(14.0625, 0.0, 0.0)),
        (Apply(Rescale()), Work(14.0625, 0.0, 0.0)),
    ],
    ids=lambda value: str(value) if isinstance(value, Stage) else "",
)
def test_work_by_hand(stage: Stage, expected: Work) -> None:
    assert stage.work(batch=2, tokens=300, heads=3, block=64) == expected


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_stages_run_again_and_again(stage: Stage, calls: Calls) -> None:
    job = stage.job(calls)
    first, again = job(), job()
    expected = {Search: Backend, Take: Cache, Apply: torch.Tensor}[type(stage)]
    assert isinstance(first, expected)
    assert isinstance(again, expected)


def test_a_search_makes_a_new_list_by_its_score_each_time(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists: list[BlockIndices] = []
    monkeypatch.setattr(module, "choose", lambda call: lists.append(call.blocks))
    for score in (Mass(), Means(similarity=2.0)):
        job = Search(score).job(calls)
        job()
        job()
    assert len(set(map(id, lists))) == 4
    # A quarter of 12 blocks; nothing is alike, so everything is visited.
    assert [each.density().block for each in lists] == [0.25, 0.25, 1.0, 1.0]


def test_an_applied_cache_is_that_of_the_calls(calls: Calls) -> None:
    output = Apply(Complement("float32")).job(calls)()
    assert isinstance(output, torch.Tensor)
    torch.testing.assert_close(output, calls.dense[0])


def test_names_tell_stages_apart() -> None:
    assert len(set(map(str, STAGES))) == len(STAGES) == 8
    assert str(Search(Mass(rows=None))) == "search by mass of all rows"
    assert str(Take(Complement())) == "take complement float16"
    assert str(Apply(Rescale())) == "apply rescale ramp 0.04 float16"

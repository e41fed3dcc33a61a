"""Which caches are left under a limit, in whatever order they come; which lists of blocks are."""

import random
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.remainder import Cache, Complement
from dit_sparse.kernels.score import Clustered, Mass, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import Cumulative, TopRow
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.memory import Kept, Memory
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from tests import tiny

CLUSTERED = Scored(Clustered(4, 8, first=3, again=1), Cumulative(0.6))


def cache(loss: float, size: int) -> Cache:
    """A cache of `size` bytes beside a level of four."""
    rows = torch.zeros(1, size, 1, 1, dtype=torch.uint8)
    return Cache(Complement(), rows, torch.zeros(1, 1, 1), None, torch.tensor(loss))


def left(caches: list[tuple[float, int]], order: list[int], limit: int) -> set[int]:
    """The caches that are still there when all have come in that order."""
    memory = Memory(limit)
    for key in order:
        memory.keep(key, Kept(0, cache(*caches[key])))
        assert memory.bytes <= limit
    present = {key for key, kept in memory.kept.items() if kept.cache is not None}  # type: ignore
    assert memory.dropped == len(caches) - len(present)
    return present  # type: ignore[return-value]


@settings(deadline=None)
@given(
    losses=st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True),
    fit=st.integers(0, 12),
    spare=st.integers(0, 11),
    seed=st.integers(0, 99),
)
def test_of_caches_of_one_size_those_that_lose_most_are_left_in_any_order(
    losses: list[int], fit: int, spare: int, seed: int
) -> None:
    order = random.Random(seed).sample(range(len(losses)), len(losses))
    caches = [(loss / 1000, 8) for loss in losses]
    ranking = sorted(range(len(losses)), key=lambda key: -losses[key])
    assert left(caches, order, fit * 12 + spare) == set(ranking[:fit])


@settings(deadline=None)
@given(
    caches=st.lists(
        st.tuples(st.integers(0, 1000), st.integers(1, 40)),
        min_size=1,
        max_size=12,
        unique_by=lambda item: item[0],
    ),
    limit=st.integers(0, 200),
    seed=st.integers(0, 99),
)
def test_of_caches_of_several_sizes_none_that_loses_more_makes_room(
    caches: list[tuple[int, int]], limit: int, seed: int
) -> None:
    order = random.Random(seed).sample(range(len(caches)), len(caches))
    present = left([(loss / 1000, size) for loss, size in caches], order, limit)
    held = 0
    for key in sorted(range(len(caches)), key=lambda key: -caches[key][0]):
        held += caches[key][1] + 4
        # As long as everything down to here fits together, it is there.
        if held > limit:
            break
        assert key in present


def listed_bytes(memory: Memory) -> tuple[int, int]:
    """How many lists are kept, and the bytes of their tensors, each counted once."""
    lists = [part.blocks for found in memory.found.values() for part in found.parts]
    held = [getattr(blocks, field.name) for blocks in lists for field in fields(blocks)]
    storages = {x.data_ptr(): x.untyped_storage().nbytes() for x in held if torch.is_tensor(x)}
    return len(lists), sum(storages.values())


@pytest.mark.parametrize(
    "pattern",
    [CLUSTERED, Scored(Sampled(4), TopRow(0.5)), Scored(Mass(), TopRow(0.5))],
    ids=["clusters", "sampled", "mass"],
)
def test_lists_are_kept_only_where_a_later_step_uses_them(pattern: Scored) -> None:
    pipe, clusters = tiny.wan(), pattern is CLUSTERED
    for schedule, branches in (
        (Schedule(renew_every=1), 0),
        (Schedule(renew_every=2), 2),
        (Schedule(renew_every=1, share_branches=True), 1),
    ):
        plan = Plan.uniform(pipe, pattern, schedule, block=16)
        with enable_sparse_attention(pipe, plan) as hook:
            tiny.generate(pipe)
            memory = hook._attention.memory
            number, held = listed_bytes(memory)
            # Two layers of two heads: a list for each head, or one for both.
            assert number == branches * 2 * (2 if clusters else 1)
            # 48 tokens; queries and keys in int32, unless lists share the order of the grid.
            assert held >= number * 48 * 4 * 2 * clusters
            assert (held == 0) == (number == 0)
            found = list(memory.found.values())
            assert len(found) == 2 * (1 if schedule.share_branches else 2)
            assert all((each.centroids is not None) == clusters for each in found)
            assert all((each.lse is not None) == (pattern.score == Mass()) for each in found)

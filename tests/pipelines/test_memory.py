"""Which caches are left under a limit, in whatever order they come."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels.remainder import Cache, Complement
from dit_sparse.pipelines.memory import Kept, Memory


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

"""Times of candidates, from a calibration that the test writes."""

import pytest
import torch

from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.calibration import Calibration, Cost, device_name, write
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Skip
from dit_sparse.kernels.remainder import Complement, Rescale
from dit_sparse.kernels.score import Mass
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.search.latency import pass_times, stage_times
from dit_sparse.search.space import Candidate

GRID = TokenGrid(3, 8, 8)
BLOCK = 16
LISTS = tuple(
    block_indices((pattern,), GRID, block_q=BLOCK, block_k=BLOCK)
    for pattern in (Full(), Skip(), Band(40))
)
HEADS, DIM = 4, 16
QUERY = torch.zeros(()).expand(2, GRID.tokens, HEADS, DIM)


def calibrate(head_dim: int) -> None:
    """Every backend takes a second for a call and two for each 128 x 128 pairs."""
    one = Cost(1.0, 0.0, 2.0, 2.0, 2.0, 8, 0.0, 0.0)
    names = [backend.name for backend in BACKENDS]
    costs = {(name, "float32", head_dim): one for name in names}
    write(Calibration(device_name(torch.device("cpu")), costs))


def test_without_a_calibration_nothing_is_known() -> None:
    assert pass_times(LISTS, QUERY, 1.0) is None
    calibrate(DIM + 1)
    assert pass_times(LISTS, QUERY, 1.0) is None


def test_a_candidate_takes_what_its_blocks_take_on_all_heads() -> None:
    calibrate(DIM)
    dense = 10.0
    found = pass_times(LISTS, QUERY, dense)
    assert found is not None
    times, launches = found
    pairs = 2 * HEADS * GRID.tokens**2 / 128**2
    expected = [1 + 2 * pairs * blocks.density().block for blocks in LISTS]
    assert times.tolist() == pytest.approx([seconds / dense for seconds in expected])
    assert launches.tolist() == pytest.approx([1 / dense] * 3)


CANDIDATES = (
    Candidate(Full()),
    Candidate(Scored(Mass(), TopRow(0.4))),
    Candidate(Skip(), Rescale()),
    Candidate(Scored(Mass(), TopRow(0.2), "gilbert"), Complement()),
)


def test_stages_are_those_that_a_candidate_goes_through() -> None:
    calibrate(DIM)
    assert stage_times(CANDIDATES, QUERY, 10.0, BLOCK) is None
    seconds = {
        "search by mass of 16 rows": Cost(2.0, 0.0, 8.0, 0.125, 0.0, 8, 0.0, 0.0),
        "take rescale ramp 0.04 float16": Cost(0.5, 1.0, 0.0, 0.0, 0.0, 8, 0.0, 0.0),
        "apply rescale ramp 0.04 float16": Cost(0.25, 0.0, 0.0, 0.0, 0.0, 8, 0.0, 0.0),
        "take complement float16": Cost(3.0, 0.0, 0.0, 0.0, 0.0, 8, 0.0, 0.0),
        "apply complement float16": Cost(0.0, 2.0, 0.0, 0.0, 0.0, 8, 0.0, 0.0),
    }
    costs = {(name, "float32", DIM): cost for name, cost in seconds.items()}
    write(Calibration(device_name(torch.device("cpu")), costs))
    found = stage_times(CANDIDATES, QUERY, 10.0, BLOCK)
    assert found is not None
    times, launches = found
    # 2 x 4 heads of 192 tokens: 12 query blocks, 18 of pairs, 576 pairs of 12 blocks by heads. Of
    # blocks of 16 tokens 16 rows are all.
    search = 2 + 8 * 18 + 0.125 * 4 * 12**2
    expected = [
        [0, 0, 0],
        [search, 0, 0],
        [0, 0.5 + 12, 0.25],
        [search, 3, 24],
    ]
    assert times.tolist() == [pytest.approx([x / 10 for x in row]) for row in expected]
    launched = [[0, 0, 0], [2, 0, 0], [0, 0.5, 0.25], [2, 3, 0]]
    assert launches.tolist() == [pytest.approx([x / 10 for x in row]) for row in launched]

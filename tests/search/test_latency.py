"""Times of candidates, from a calibration that the test writes."""

import pytest
import torch

from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.calibration import Calibration, Cost, device_name, write
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Skip
from dit_sparse.search.latency import relative_times

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
    assert relative_times(LISTS, QUERY, 1.0) is None
    calibrate(DIM + 1)
    assert relative_times(LISTS, QUERY, 1.0) is None


def test_a_candidate_takes_what_its_blocks_take_on_all_heads() -> None:
    calibrate(DIM)
    dense = 10.0
    times = relative_times(LISTS, QUERY, dense)
    pairs = 2 * HEADS * GRID.tokens**2 / 128**2
    expected = [1 + 2 * pairs * blocks.density().block for blocks in LISTS]
    assert times == pytest.approx([seconds / dense for seconds in expected])

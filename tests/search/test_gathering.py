"""What was seen of each prompt becomes evidence: means, what was missed, and prices."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.backend import BACKENDS
from dit_sparse.kernels.calibration import Calibration, Cost, device_name, write
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Full, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled
from dit_sparse.pipelines.fingerprint import ModelFingerprint
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.course import Sightings
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.gathering import evidence_of
from dit_sparse.search.observer import Sums
from dit_sparse.search.record import Seen
from dit_sparse.search.space import Candidate, Space, blocks_like

GRID = TokenGrid(3, 4, 4)
BLOCK, HEADS, LAYER = 8, 2, "transformer.blocks.0.attn1"
SPACE = Space((Full(), Skip(), Band(6)), (2,), (Drop(), Pooled(), Complement()))
SIGHTINGS = Sightings(9, (1, 3, 5), (0, 1, 3))
PLAN = Plan(
    {"transformer": ModelFingerprint("WanTransformer3DModel", 1, HEADS, 12, "0" * 64)},
    {LAYER: (Full(), Full())},
    block=BLOCK,
)
RUN: dict[str, Any] = {
    "shape": [2, 48, HEADS, 12], "dtype": "float32", "device": "cpu", "branches": 2,
    "seconds_per_call": 0.5, "timing": None,
}  # fmt: skip


def sums(count: list[list[int]], seed: int) -> Sums:
    """Errors of 12 candidates wherever there were calls; columns cannot be pooled."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.tensor(count).float()
    error = torch.rand(HEADS, 4, 3, 3, 3, generator=generator, dtype=torch.double) * number
    error[:, 0] = 0
    error[:, 3, 1] = error[:, 3, 1].masked_fill(number > 0, torch.inf)
    return Sums(error, number, torch.rand(HEADS, 6, generator=generator))


def gathered(*prompts: Sums) -> Evidence:
    seen = [Seen({LAYER: each}, RUN) for each in prompts]
    return evidence_of(PLAN, SPACE, SIGHTINGS, (Schedule(1),), GRID, seen)


def flat(error: Tensor) -> Tensor:
    return error.flatten(1, 2).float()


def test_errors_are_means_over_calls_and_prompts() -> None:
    first, second = sums([[2, 2, 2]] * 3, 0), sums([[1, 1, 1]] * 3, 1)
    evidence = gathered(first, second)
    expected = flat((first.error + second.error) / 3)
    assert torch.equal(evidence.error[0], expected)
    assert torch.equal(evidence.column_mass[0], first.column_mass)
    # Two samples, two branches.
    assert evidence.copies == 4
    assert evidence.head_dim == (12,)
    assert (evidence.error[:, :, 10] == torch.inf).all()
    assert evidence.error.isinf().sum() == HEADS * 9


def test_what_was_missed_is_as_at_the_age_before_or_the_nearest_anchor() -> None:
    # The generation ends before the last age, and another transformer ran at first.
    own = sums([[0, 0, 0], [2, 2, 0], [2, 0, 0]], 0)
    error = gathered(own).error[0]
    mean = flat(own.error / 2)
    for candidate in (3, 5, 6, 9, 11):
        seen, came = mean[:, candidate], error[:, candidate]
        assert torch.equal(came[:, 1], seen[:, 1, [0, 1, 1]])
        assert torch.equal(came[:, 2], seen[:, 2, [0, 0, 0]])
        assert torch.equal(came[:, 0], came[:, 1])
    assert (error[:, 10] == torch.inf).all()


def test_a_layer_that_was_never_renewed_is_named() -> None:
    message = f"{LAYER} did not run at the steps that renewals were tried at.*raise anchors"
    with pytest.raises(ValueError, match=message):
        gathered(sums([[0, 0, 0]] * 3, 0))
    with pytest.raises(ValueError, match=message):
        evidence_of(PLAN, SPACE, SIGHTINGS, (Schedule(1),), GRID, [Seen({}, RUN)])
    # One prompt is enough.
    gathered(sums([[0, 0, 0]] * 3, 0), sums([[1, 0, 0]] * 3, 0))


def test_densities_are_what_a_sparse_pass_computes() -> None:
    evidence = gathered(sums([[1, 1, 1]] * 3, 0))
    assert evidence.time is None
    density = evidence.density[0, 1]
    for number in (1, 2, 10):
        assert density[number] == torch.inf
    for number in (0, 3, 4, 5, 6, 7, 8, 9, 11):
        blocks = blocks_like(evidence.candidate(0, 1, number), GRID, BLOCK)
        assert density[number].item() == pytest.approx(blocks.density().weighted)
    assert density[[0, 3, 4, 9]].tolist() == pytest.approx([1, 0, 1 / 8, 2 / 6])


def test_times_are_taken_where_the_device_was_calibrated() -> None:
    one = Cost(1.0, 0.0, 2.0, 2.0, 2.0, 8, 0.0, 0.0)
    costs = {(backend.name, "float32", 12): one for backend in BACKENDS}
    write(Calibration(device_name(torch.device("cpu")), costs))
    evidence = gathered(sums([[1, 1, 1]] * 3, 0))
    assert evidence.time is not None
    pairs = 2 * HEADS * 48**2 / 128**2
    for number, pattern in ((0, Full()), (3, Skip()), (8, Band(6))):
        density = blocks_like(Candidate(pattern), GRID, BLOCK).density().block
        time = evidence.time[0, 1, number].item()
        assert time == pytest.approx((1 + 2 * pairs * density) / 0.5)
    assert (evidence.time[0, 0, [1, 2, 10]] == torch.inf).all()
    assert evidence.stage_time is None
    stages = {
        ("take complement float16", "float32", 12),
        ("apply complement float16", "float32", 12),
    }
    write(Calibration(device_name(torch.device("cpu")), dict.fromkeys(stages, one)))
    evidence = gathered(sums([[1, 1, 1]] * 3, 0))
    assert evidence.stage_time is not None
    assert evidence.launch_time is not None
    # Each takes a second of launch, of .5 s that dense attention takes.
    assert evidence.launch_time[8].tolist() == [2, 0, 2, 2]
    assert evidence.stage_time[8].tolist() == evidence.launch_time[8, 1:].tolist()
    assert evidence.launch_time[7].tolist() == [2, 0, 0, 0]

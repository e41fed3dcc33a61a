import math
from collections.abc import Callable

import pytest
import torch

from dit_sparse.search.fidelity import CHECKS, CLOSE, PSNR_CAP, loosest, mean_psnr


def saturating(share: float) -> float:
    return 20 + 25 * math.log10(share / 0.1)


def steep(share: float) -> float:
    return 60 * share**3


def stepped(share: float) -> float:
    return 10.0 * round(6 * share)


@pytest.mark.parametrize("psnr", [saturating, steep, stepped])
@pytest.mark.parametrize("asked", [15.0, 28.0, 39.0])
def test_the_loosest_share_that_holds_is_found(
    psnr: Callable[[float], float], asked: float
) -> None:
    seen: list[float] = []

    def generate(share: float) -> tuple[float, float]:
        seen.append(share)
        return share, psnr(share)

    found = loosest(generate, asked, 0.0)
    assert 1 <= len(seen) <= CHECKS
    assert found.psnr == psnr(found.share) >= asked
    assert [share for share, _ in found.checks] == seen
    # Nothing below it that was tried holds, and it is close or the bracket has become small.
    fails = [share for share, came in found.checks if came < asked]
    assert max(fails) < found.share
    assert found.psnr <= asked + CLOSE or found.share / max(fails) < 1.6


@pytest.mark.parametrize("asked", [20.0, 26.0, 32.0, 38.0])
def test_a_smooth_fall_is_met_within_half_a_decibel(asked: float) -> None:
    found = loosest(lambda share: (share, saturating(share)), asked, 0.0)
    assert found.psnr == pytest.approx(asked + 0.25, abs=0.25)


def test_what_no_sparse_plan_holds_is_held_dense() -> None:
    found = loosest(lambda share: (share, 12.0), 30.0, 0.0)
    assert (found.share, found.psnr) == (1.0, PSNR_CAP)
    assert len(found.checks) == CHECKS


def test_what_every_plan_holds_goes_towards_the_cheapest() -> None:
    found = loosest(lambda share: (share, 80.0), 30.0, 0.2)
    assert 0.2 <= found.share < 0.22


def test_no_plan_is_generated_with_twice() -> None:
    plans = (0.0, 0.05, 0.4)
    found = loosest(lambda share: (max(p for p in plans if p <= share), 80.0), 30.0, 0.0)
    assert found.checks == ((0.05, 80.0), (0.0, 80.0))
    assert found.share < 0.05


def test_psnr_is_the_mean_over_frames_and_videos() -> None:
    reference = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0))
    off = reference.clone()
    off[0] += 0.1  # 20 dB
    off[1] += 0.01  # 40 dB
    assert mean_psnr([reference], [off]) == pytest.approx(30, abs=1e-3)
    assert mean_psnr([reference], [reference]) == PSNR_CAP
    assert mean_psnr([reference, reference], [off, reference]) == pytest.approx(65, abs=1e-3)

"""Fidelity: the loosest plan whose generated videos stay close enough to the dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

PSNR_CAP = 100.0
"""dB; of identical frames, whose ratio is infinite."""

CHECKS = 6
"""Most plans that are generated with and compared."""

CLOSE = 0.25
"""dB above what was asked for that is close enough to stop."""

LOOSEST = 0.01
"""Share of FLOPs below which none is tried, unless every plan takes more."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """The share of dense attention's FLOPs to ask for, the PSNR in dB that its plan's videos
    have, and all (share of a plan, PSNR) that were tried."""

    share: float
    psnr: float
    checks: tuple[tuple[float, float], ...]


def mean_psnr(references: Sequence[Tensor], videos: Sequence[Tensor]) -> float:
    """PSNR in dB of videos against references, float `[frames, height, width, 3]` in [0, 1]: mean
    over frames, then over videos; a frame counts at most `PSNR_CAP`."""
    return fmean(
        torch.stack(
            [
                frame_psnr(came, wanted, 1.0)
                for came, wanted in zip(video.double(), reference.double(), strict=True)
            ]
        )
        .mean()
        .item()
        for reference, video in zip(references, videos, strict=True)
    )


def frame_psnr(frame: Tensor, reference: Tensor, peak: float) -> Tensor:
    """PSNR in dB of a frame whose values reach `peak`, at most `PSNR_CAP`."""
    return peak_signal_noise_ratio(frame, reference, data_range=peak).clamp(max=PSNR_CAP)


def distance(references: Sequence[Tensor], videos: Sequence[Tensor]) -> float:
    """Mean squared difference of videos from references, as `mean_psnr` takes them."""
    return fmean(
        (video.double() - reference.double()).square().mean().item()
        for reference, video in zip(references, videos, strict=True)
    )


def loosest(check: Callable[[float], tuple[float, float]], asked: float, least: float) -> Fidelity:
    """The least share of FLOPs found to hold `asked` dB, by bisection of its logarithm.

    Where both ends of the bracket were checked, the next is where a line through them meets what
    was asked, but never in the outer tenths.

    Args:
        check: generates with the plan within a share and compares; gives the share that the plan
            really takes, and its PSNR in dB, which should rise with it.
        asked: dB to be held.
        least: share of the cheapest plan.

    Returns:
        Share 1, whose videos are the dense ones, if none of the `CHECKS` tried holds.
    """
    low, high = math.log(max(least, LOOSEST)), 0.0
    below: float | None = None
    above: float | None = None
    checks: list[tuple[float, float]] = []
    share, psnr = 1.0, PSNR_CAP
    while len(checks) < CHECKS and high - low > 0.01:
        place = 0.5
        if below is not None and above is not None and above > below:
            place = min(0.9, max(0.1, (asked + CLOSE / 2 - below) / (above - below)))
        middle = low + place * (high - low)
        spent, came = check(math.exp(middle))
        checks.append((spent, came))
        if came < asked:
            low, below = middle, came
            continue
        share, psnr = math.exp(middle), came
        # Plans between these two shares are this plan.
        high, above = min(middle, math.log(max(spent, LOOSEST))), came
        if came <= asked + CLOSE:
            break
    return Fidelity(share, psnr, tuple(checks))

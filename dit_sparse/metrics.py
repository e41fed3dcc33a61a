"""Quality: how close a sparse video is to its dense one, each figure with its convention.

Both metrics read 8-bit RGB frames before encoding: a codec at its usual setting costs more
than a good plan does. A video's figure is the mean of its frames'; a summary says mean,
standard deviation and worst over videos.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from einops import rearrange
from torchmetrics.functional.image import structural_similarity_index_measure

from dit_sparse.search.fidelity import PSNR_CAP, frame_psnr
from dit_sparse.video import Frames

CONVENTIONS = {
    "frames": "8-bit RGB, before encoding",
    "psnr_rgb": f"dB, range 255, mean of per-frame values, a frame counts at most {PSNR_CAP:g}",
    "ssim": "mean of per-frame values, RGB channels averaged, Gaussian window 11, sigma 1.5, "
    "borders reflected",
    "summary": "mean, sample standard deviation and worst over videos",
}


@dataclass(frozen=True, slots=True)
class Quality:
    """One video against its reference: `psnr_rgb` in dB, `ssim` in [-1, 1]."""

    psnr_rgb: float
    ssim: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A figure over several videos; `worst` is the lowest, higher being better."""

    mean: float
    std: float
    worst: float


def quality(reference: Frames, frames: Frames) -> Quality:
    """Compare two videos, uint8 [frames, height, width, 3].

    Raises:
        ValueError: the shapes differ, or the frames are smaller than SSIM's window.
    """
    if reference.shape != frames.shape:
        raise ValueError(
            f"videos of shape {reference.shape} and {frames.shape} cannot be compared; "
            "generate both with the same size and number of frames"
        )
    if min(frames.shape[1:3]) < 11:
        raise ValueError(f"frames of {frames.shape[1:3]} pixels are smaller than SSIM's 11 x 11")
    wanted, came = (
        rearrange(torch.from_numpy(video).double(), "f h w c -> f c h w")
        for video in (reference, frames)
    )
    psnr = torch.stack([frame_psnr(a, b, 255.0) for a, b in zip(came, wanted, strict=True)])
    # One frame at a time: SSIM's intermediates are some 15 times the size of its input.
    ssim = torch.stack([_ssim(a[None], b[None]) for a, b in zip(came, wanted, strict=True)])
    return Quality(psnr.mean().item(), ssim.mean().item())


def summarize(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation (0 for a single value) and lowest value."""
    return Summary(fmean(values), stdev(values) if len(values) > 1 else 0.0, min(values))


def _ssim(frame: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    value = structural_similarity_index_measure(frame, reference, data_range=255.0)
    assert isinstance(value, torch.Tensor)  # a tuple only when intermediates are asked for
    return value

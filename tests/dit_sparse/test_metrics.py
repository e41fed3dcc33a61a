"""Metrics against their formulas in float64, and at their edges."""

import numpy as np
import pytest

from dit_sparse.metrics import PSNR_CAP, quality, summarize
from dit_sparse.video import Frames


def videos() -> tuple[Frames, Frames]:
    random = np.random.default_rng(0)
    reference = random.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    noise = random.integers(-20, 21, reference.shape) * np.array([1, 2, 3])[:, None, None, None]
    return reference, np.clip(reference + noise, 0, 255).astype(np.uint8)


def test_psnr_is_the_mean_of_per_frame_values() -> None:
    reference, frames = videos()
    error = ((reference.astype(float) - frames.astype(float)) ** 2).mean(axis=(1, 2, 3))
    expected = (10 * np.log10(255**2 / error)).mean()
    assert quality(reference, frames).psnr_rgb == pytest.approx(expected, abs=1e-5)


def test_ssim_is_the_published_formula() -> None:
    reference, frames = videos()
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    per_frame = []
    for x, y in zip(reference.astype(float), frames.astype(float), strict=True):
        values = []
        height, width, _ = x.shape
        x, y = (np.pad(frame, ((5, 5), (5, 5), (0, 0)), mode="reflect") for frame in (x, y))
        for i in range(height):
            for j in range(width):
                for c in range(3):
                    a, b = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                    ma, mb = (window * a).sum(), (window * b).sum()
                    va, vb = (window * a * a).sum() - ma**2, (window * b * b).sum() - mb**2
                    vab = (window * a * b).sum() - ma * mb
                    top = (2 * ma * mb + c1) * (2 * vab + c2)
                    values.append(top / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
        per_frame.append(np.mean(values))
    assert quality(reference, frames).ssim == pytest.approx(np.mean(per_frame), abs=1e-6)


def test_identical_frames_reach_the_cap() -> None:
    reference, _ = videos()
    same = quality(reference, reference)
    assert same.psnr_rgb == PSNR_CAP
    assert same.ssim == pytest.approx(1.0, abs=1e-9)


def test_one_identical_frame_does_not_make_the_mean_infinite() -> None:
    reference, frames = videos()
    frames[0] = reference[0]
    assert quality(reference, frames).psnr_rgb < PSNR_CAP


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 24, 21, 3), "cannot be compared"), ((3, 8, 20, 3), "cannot be compared")],
    ids=["width", "height"],
)
def test_videos_of_different_shape_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quality(videos()[0], np.zeros(shape, np.uint8))


def test_frames_smaller_than_the_window_are_refused() -> None:
    tiny = np.zeros((1, 8, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="smaller than SSIM's"):
        quality(tiny, tiny)


def test_summary() -> None:
    summary = summarize([1.0, 2.0, 6.0])
    assert (summary.mean, summary.worst) == (3.0, 1.0)
    assert summary.std == pytest.approx(7**0.5)
    assert summarize([4.0]).std == 0.0

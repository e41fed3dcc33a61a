"""Video: frames in memory, as uint8 RGB [frames, height, width, 3], and as files.

The only module that runs ffmpeg, through imageio and the binary that imageio-ffmpeg brings.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
from einops import repeat
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.uint8]

PREVIEW_SIDE = 256  # small models are shown enlarged, pixel by pixel


def to_uint8(frames: NDArray[np.floating]) -> Frames:
    """Quantize frames in [0, 1] to 8 bits, as every encoder would.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    if not np.isfinite(frames).all():
        bad = int((~np.isfinite(frames)).any(axis=(1, 2, 3)).sum())
        raise ValueError(
            f"{bad} of {len(frames)} frames hold NaN or infinite values: the model diverged; "
            "try --dtype float32"
        )
    return np.rint(np.clip(frames, 0.0, 1.0) * 255.0).astype(np.uint8)


def write_lossless(path: Path, frames: Frames, fps: int) -> None:
    """Write a bit-exact master (H.264 RGB without quantization; give it the suffix `.mkv`)."""
    _encode(path, frames, fps, "libx264rgb", "rgb24", ["-qp", "0"])


def write_preview(path: Path, frames: Frames, fps: int) -> None:
    """Write an `.mp4` that every player shows: H.264 4:2:0, enlarged when it is small."""
    enlarged = enlarge(frames)
    odd_height, odd_width = enlarged.shape[1] % 2, enlarged.shape[2] % 2
    even = np.pad(enlarged, ((0, 0), (0, odd_height), (0, odd_width), (0, 0)), mode="edge")
    _encode(path, even, fps, "libx264", "yuv420p", ["-crf", "14", "-movflags", "+faststart"])


def read_video(path: Path) -> Frames:
    """Decode a file to RGB; of a master, exactly the frames that were written."""
    return imageio.imread(path, plugin="FFMPEG")


def enlarge(frames: Frames) -> Frames:
    """Repeat every pixel until the shorter side has at least `PREVIEW_SIDE` pixels."""
    factor = -(-PREVIEW_SIDE // min(frames.shape[1:3]))
    return repeat(frames, "f h w c -> f (h a) (w b) c", a=factor, b=factor)


def side_by_side(videos: Sequence[Frames], labels: Sequence[str]) -> Frames:
    """Put videos of equal shape next to each other, a line of text above each."""
    columns = [
        np.concatenate([_label_bar(label, video), video], axis=1)
        for video, label in zip((enlarge(video) for video in videos), labels, strict=True)
    ]
    gap = np.full((*columns[0].shape[:2], 4, 3), 255, np.uint8)
    joined = [part for column in columns for part in (gap, column)][1:]
    return np.concatenate(joined, axis=2)


def _label_bar(label: str, video: Frames) -> Frames:
    frames, _, width, _ = video.shape
    bar = Image.new("RGB", (width, 28), "white")
    # The largest type in which the label fits.
    sizes = (ImageFont.load_default(size) for size in range(16, 7, -1))
    font = next((f for f in sizes if f.getlength(label) <= width - 8), ImageFont.load_default(8))
    ImageDraw.Draw(bar).text((4, 5), label, font=font, fill="black")
    return repeat(np.asarray(bar), "h w c -> f h w c", f=frames)


def _encode(
    path: Path, frames: Frames, fps: int, codec: str, pixel_format: str, options: list[str]
) -> None:
    with replacing(path) as partial:
        imageio.imwrite(
            partial,
            frames,
            plugin="FFMPEG",
            fps=fps,
            codec=codec,
            pixelformat=pixel_format,
            quality=None,
            macro_block_size=1,
            ffmpeg_log_level="error",
            ffmpeg_params=options,
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes its place only when all went well.

    Raises:
        ValueError: `path` is a folder.
    """
    if path.is_dir():
        raise ValueError(f"expected a file to write, {path} is a folder; name a file in it")
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

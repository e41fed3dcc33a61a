"""Video files: masters are exact, previews are playable, nothing is left half-written."""

import re
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.video import (
    Frames,
    read_video,
    replacing,
    side_by_side,
    to_uint8,
    write_lossless,
    write_preview,
)


def noise(frames: int, height: int, width: int) -> Frames:
    shape = (frames, height, width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(29, 64, 64), (5, 33, 47), (1, 16, 16)], ids=str)
def test_master_is_bit_exact(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    frames = noise(*shape)
    write_lossless(tmp_path / "frames.mkv", frames, 16)
    assert np.array_equal(read_video(tmp_path / "frames.mkv"), frames)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 96), (256, 384)), ((33, 47), (264, 376)), ((301, 303), (302, 304))],
    ids=str,
)
def test_preview_is_enlarged_and_even(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    write_preview(tmp_path / "preview.mp4", noise(3, *size), 16)
    assert read_video(tmp_path / "preview.mp4").shape == (3, *expected, 3)


def test_preview_looks_like_the_frames(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (4, 64, 64, 3))
    write_preview(tmp_path / "preview.mp4", frames, 16)
    decoded = read_video(tmp_path / "preview.mp4")[:, 2::4, 2::4].astype(int)
    assert np.abs(decoded - frames.astype(int)).mean() < 4


def test_side_by_side_keeps_both_videos_whole() -> None:
    left, right = noise(2, 256, 256), 255 - noise(2, 256, 256)
    joined = side_by_side([left, right], ["dense", "sparse with a label much too long " * 3])
    assert np.array_equal(joined[:, -256:, :256], left)
    assert np.array_equal(joined[:, -256:, -256:], right)
    label = joined[:, :-256, :256]
    assert label.min() == 0
    assert label.max() == 255


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
def test_frames_that_are_not_finite_are_an_error(bad: float) -> None:
    frames = np.zeros((3, 4, 4, 3), np.float32)
    frames[1, 2, 3, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 frames hold NaN or infinite"):
        to_uint8(frames)


def test_quantization_rounds_and_clips() -> None:
    frames = np.array([-0.1, 0.0, 0.5, 1.0, 1.7]).reshape(1, 1, 5, 1)
    assert to_uint8(frames).ravel().tolist() == [0, 0, 128, 255, 255]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]
    assert path.read_text() == "old"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    message = f"expected a file to write, {tmp_path} is a folder; name a file in it"
    with pytest.raises(ValueError, match=re.escape(message)), replacing(tmp_path):
        pytest.fail("was written")
    assert list(tmp_path.parent.glob(f".*{tmp_path.name}")) == []

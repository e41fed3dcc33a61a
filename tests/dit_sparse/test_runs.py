"""Run folders: names, completeness, claims."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.prompts import Prompt
from dit_sparse.runs import (
    Request,
    Run,
    claimed,
    model_digest,
    prepare_folder,
    read_frames,
    read_run,
    write_run,
)
from dit_sparse.settings import Settings

SETTINGS = Settings(height=16, width=16, frames=5, steps=4, guidance=4.0)
REQUEST = Request("models/x", "abc", Prompt("cat", "a cat"), SETTINGS)
RUN = Run(REQUEST, 1.5, (0.5, 0.25), {"density": {"block": 0.3}}, {"python": "3"}, "2026-01-01")
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def test_run_comes_back_from_its_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path, RUN, FRAMES)
    assert folder.name == REQUEST.name
    assert read_run(folder) == RUN
    assert np.array_equal(read_frames(folder), FRAMES)
    assert sorted(path.name for path in folder.iterdir()) == [
        "frames.mkv",
        "preview.mp4",
        "run.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, model_digest="abd"),
        replace(REQUEST, plan_digest="p"),
        replace(REQUEST, prompt=Prompt("cat", "a cat!")),
        replace(REQUEST, prompt=Prompt("cat", "a cat", "blur")),
        replace(REQUEST, prompt=Prompt("cat", "a cat", seed=1)),
        replace(REQUEST, settings=replace(SETTINGS, steps=5)),
        replace(REQUEST, settings=replace(SETTINGS, dtype="bfloat16")),
    ],
    ids=["model", "plan", "prompt", "negative", "seed", "steps", "dtype"],
)
def test_what_changes_the_frames_changes_the_name(other: Request) -> None:
    assert other.name != REQUEST.name
    assert other.name.startswith("cat-")


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUEST, model="elsewhere/x"),
        replace(REQUEST, prompt=Prompt("cat", "a cat", seed=0)),
    ],
    ids=["place of the model", "same seed said twice"],
)
def test_what_does_not_change_the_frames_keeps_the_name(other: Request) -> None:
    assert other.name == REQUEST.name


def test_settings_seed_does_not_matter_when_the_prompt_has_its_own() -> None:
    own = replace(REQUEST, prompt=Prompt("cat", "a cat", seed=3))
    assert replace(own, settings=replace(SETTINGS, seed=9)).name == own.name


def test_interrupted_write_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dit_sparse.runs.write_preview", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_run(tmp_path, RUN, FRAMES)
    assert not (tmp_path / REQUEST.name).exists()
    write_run(tmp_path, RUN, FRAMES)
    assert [path.name for path in tmp_path.iterdir()] == [REQUEST.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a run of dit-sparse"),
        ({"version": 2}, "version 2 is not 1; update dit-sparse"),
        ({"seconds": "long"}, "seconds: Input should be a valid number"),
    ],
    ids=["format", "version", "type"],
)
def test_file_that_is_no_run_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_run(tmp_path, RUN, FRAMES) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as raised:
        read_run(path.parent)
    assert str(raised.value).startswith(str(path))


def test_run_is_claimed_once_and_freed_after(tmp_path: Path) -> None:
    with (
        claimed(tmp_path, "a") as first,
        claimed(tmp_path, "a") as second,
        claimed(tmp_path, "b") as other,
    ):
        assert (first, second, other) == (True, False, True)
    with claimed(tmp_path, "a") as again:
        assert again


def test_claim_is_freed_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), claimed(tmp_path, "a"):
        raise RuntimeError
    with claimed(tmp_path, "a") as again:
        assert again


def test_model_digest_sees_names_sizes_and_content(tmp_path: Path) -> None:
    weights = tmp_path / "unet" / "weights"
    weights.parent.mkdir()
    weights.write_bytes(bytes(1 << 18))
    digests = [model_digest(tmp_path)]
    weights.write_bytes(bytes((1 << 18) - 1) + b"x")
    digests.append(model_digest(tmp_path))
    weights.write_bytes(b"x" + bytes((1 << 18) - 1))
    digests.append(model_digest(tmp_path))
    weights.write_bytes(bytes((1 << 18) + 1))
    digests.append(model_digest(tmp_path))
    weights.rename(weights.with_name("other"))
    digests.append(model_digest(tmp_path))
    assert len(set(digests)) == 5
    assert model_digest(tmp_path) == digests[-1]


@pytest.mark.parametrize("inside", ["file/out", "file"], ids=["below a file", "a file"])
def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^cannot write to .*; choose another --out$"):
        prepare_folder(tmp_path / inside)

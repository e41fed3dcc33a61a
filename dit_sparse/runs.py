"""Run: one generated video with everything needed to make it again, as a folder.

    <prompt id>-<digest>/run.json      what was asked, how long it took, where
                         frames.mkv    lossless master
                         preview.mp4   for a player

The folder appears under its name only when it is complete; the digest covers everything that
decides what the frames look like, so a run that exists need not be made again.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from dit_sparse.prompts import Prompt, validation_message
from dit_sparse.settings import FRAMES_PER_SECOND, Settings
from dit_sparse.video import Frames, read_video, write_lossless, write_preview

FORMAT = "dit_sparse.run"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: the prompt, the settings, and which model and plan by place and digest."""

    model: str
    model_digest: str
    prompt: Prompt
    settings: Settings
    plan: str | None = None
    plan_digest: str | None = None

    @property
    def seed(self) -> int:
        """The prompt's own seed, else the settings'."""
        return self.settings.seed if self.prompt.seed is None else self.prompt.seed

    @property
    def name(self) -> str:
        """The folder's name: the prompt's id and a digest of what decides the frames."""
        decisive = replace(
            self,
            model="",
            plan=None,
            prompt=replace(self.prompt, seed=self.seed),
            settings=replace(self.settings, seed=self.seed),
        )
        canonical = json.dumps(asdict(decisive), sort_keys=True).encode()
        return f"{self.prompt.id}-{sha256(canonical).hexdigest()[:10]}"


@dataclass(frozen=True, slots=True)
class Run:
    """A request and what became of it.

    Args:
        request: what was asked.
        seconds: of the whole pipeline call, text encoding and decoding included.
        step_seconds: of each denoising step.
        attention: what the hook reports of a sparse run (densities, calls), None of a dense one.
        environment: see `dit_sparse.environment`.
        created: end of the run, UTC, ISO 8601.
    """

    request: Request
    seconds: float
    step_seconds: tuple[float, ...]
    attention: dict[str, Any] | None
    environment: dict[str, Any]
    created: str


def model_digest(model: str | Path) -> str:
    """A fingerprint of a model folder, cheap at any size: names, sizes and the ends of all files.

    Of a Hub id, the id itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return str(model)
    digest = sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 16))
            file.seek(max(size - (1 << 16), 0))
            digest.update(file.read())
    return digest.hexdigest()


def write_run(out: Path, run: Run, frames: Frames) -> Path:
    """Write the run's folder into `out`, whole or not at all; returns the folder."""
    folder = out / run.request.name
    partial = out / f".{run.request.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_lossless(partial / "frames.mkv", frames, FRAMES_PER_SECOND)
    write_preview(partial / "preview.mp4", frames, FRAMES_PER_SECOND)
    content = {"format": FORMAT, "version": VERSION, **asdict(run)}
    (partial / "run.json").write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    partial.replace(folder)
    return folder


def read_run(folder: str | Path) -> Run:
    """Read a run's `run.json`.

    Raises:
        ValueError: it is not one, or of a newer version.
    """
    path = Path(folder) / "run.json"
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError("not a run of dit-sparse")
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"version {version} is not {VERSION}; update dit-sparse")
        return TypeAdapter(Run).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {validation_message(error)}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_frames(folder: str | Path) -> Frames:
    """The frames of a run, exactly as they were generated."""
    return read_video(Path(folder) / "frames.mkv")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise `ValueError` if a file would be replaced that may not be."""
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already; choose another --out or give --overwrite")


def prepare_folder(out: str | Path) -> Path:
    """Make an output folder and make sure that it can be written to.

    Raises:
        ValueError: it cannot.
    """
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to {out}: {error.strerror}; choose another --out"
        ) from None
    return out


@contextmanager
def claimed(out: Path, name: str) -> Iterator[bool]:
    """Whether this process may make run `name`; false while another process is making it.

    The claim ends with the process, however that ends.
    """
    locks = out / ".locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()

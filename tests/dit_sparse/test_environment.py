"""Environment: what a reader of a figure is told."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from dit_sparse import environment as module
from dit_sparse.environment import backends, calibrations, environment, revision
from dit_sparse.kernels.backend import BACKENDS


def test_environment_is_json() -> None:
    values = json.loads(json.dumps(environment()))
    assert set(values["machine"]) >= {"system", "processor", "cores", "accelerators"}
    assert values["packages"]["torch"]
    assert values["packages"]["diffusers"]


def test_every_backend_has_its_say() -> None:
    rows = backends()
    assert {row["backend"] for row in rows} == {backend.name for backend in BACKENDS}
    assert {"cpu"} <= {row["device"] for row in rows}
    reference = [row for row in rows if row["backend"] == "reference"]
    assert all(row["reason"] is None for row in reference)


def test_the_state_of_the_calibration_is_told() -> None:
    from dit_sparse.kernels.calibration import Calibration, Cost, device_name, path_of, write

    assert calibrations()["cpu"] == "none, so backends are taken in their own order"
    cost = Cost(0.0, 0.0, 1.0, 1.0, 1.0, samples=4, mean_error=0.0, largest_error=0.0)
    name = device_name(torch.device("cpu"))
    kinds = ("gather", 64), ("gather", 128), ("search by mass of 16 rows", 64)
    write(Calibration(name, {(kind, "float32", dim): cost for kind, dim in kinds}))
    assert calibrations()["cpu"] == f"gather in {path_of(name)}"
    path_of(name).write_text("{")
    assert "none: " in calibrations()["cpu"]
    assert "is no calibration" in calibrations()["cpu"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_revision_says_commit_and_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dit_sparse"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(module.dit_sparse, "__file__", str(package / "__init__.py"))
    assert revision() is None

    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    assert revision() is None
    git("add", ".")
    git("commit", "-m", "first")
    commit = revision()
    assert commit is not None
    assert len(commit) == 12
    (package / "__init__.py").write_text("changed = True\n")
    assert revision() == f"{commit}+"

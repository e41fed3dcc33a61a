"""For every test: no network, no calibration of this machine, no GPU tests without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an accelerator")


@pytest.fixture(autouse=True)
def calibrations(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The folder of calibrations, empty: what a machine was measured to do decides no test."""
    from dit_sparse.kernels import calibration

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(calibration, "cache_folder", lambda: folder)
    calibration._known.cache_clear()
    yield folder / "calibration"
    calibration._known.cache_clear()

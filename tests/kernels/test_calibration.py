"""Calibration: costs found again from times they explain, and a file that is read strictly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.kernels import calibration as module
from dit_sparse.kernels.blocks import block_indices, from_tags
from dit_sparse.kernels.calibration import (
    Calibration,
    Cost,
    Work,
    calibration_for,
    device_name,
    fit,
    path_of,
    read,
    work_of,
    write,
)
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.pattern import Band, Full

COST = Cost(1e-5, 2e-6, 8e-5, 9e-5, 3e-5, samples=9, mean_error=0.02, largest_error=0.1)
CPU = torch.device("cpu")


def samples(cost: Cost, noise: float = 0.0) -> list[tuple[Work, float]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows in (8, 32, 128):
        for share in (0.05, 0.2, 0.6):
            for partial in (0.0, 0.5, 1.0):
                pairs, pooled = rows**2 * share, (1 - partial) * rows * (rows % 5)
                work = Work(rows, pairs * (1 - partial), pairs * partial, pooled)
                error = 1 + noise * float(torch.randn((), generator=generator))
                found.append((work, cost.seconds(work) * error))
    return found


def test_a_fit_finds_the_costs_that_made_the_times():
    found = fit(samples(COST))
    for name in ("launch", "query_block", "whole", "partial", "pooled"):
        assert getattr(found, name) == pytest.approx(getattr(COST, name), rel=1e-6)
    assert found.samples == 27
    assert found.largest_error < 1e-6


def test_noise_shows_in_the_held_out_error():
    found = fit(samples(COST, noise=0.05))
    assert 0.01 < found.mean_error < 0.15
    assert found.mean_error <= found.largest_error
    assert found.whole == pytest.approx(COST.whole, rel=0.15)


def test_no_coefficient_is_negative():
    shrinking = [(Work(rows, 1.0, 0.0), 1 / rows) for rows in range(1, 9)]
    found = fit(shrinking)
    assert min(found.launch, found.query_block, found.whole, found.partial, found.pooled) >= 0


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([(Work(1, 1, 1), 1.0)] * 3, "needs at least 4 measurements, got 3"),
        ([(Work(1, 1, 1), 0.0)] * 4, r"measured seconds must be positive, got 0\.0"),
        ([(Work(1, 1, 1), float("nan"))] * 4, "measured seconds must be positive, got nan"),
    ],
)
def test_measurements_that_fit_nothing_are_named(measured, message: str):
    with pytest.raises(ValueError, match=message):
        fit(measured)


def test_work_counts_blocks_of_128_by_their_tokens():
    grid = TokenGrid(1, 32, 32)
    assert work_of(block_indices([Full()] * 2, grid)) == Work(16, 128, 0)
    assert work_of(block_indices([Full()] * 2, grid, raster(), 64, 32), batch=3) == Work(
        48, 384, 0
    )
    work = work_of(block_indices([Band(64)], grid))
    assert (work.query_blocks, work.partial) == (8, 22)
    tags = torch.full((1, 8, 8), 2, dtype=torch.int8)
    assert work_of(from_tags(tags, grid), batch=3) == Work(24, 0, 0, 48)


def call(head_dim: int = 64, dtype: torch.dtype = torch.float32) -> AttentionCall:
    tensor = torch.empty(2, 1024, 2, head_dim, dtype=dtype)
    blocks = block_indices([Full()] * 2, TokenGrid(1, 32, 32))
    return AttentionCall(tensor, tensor, tensor, blocks, 1.0)


def test_a_cost_serves_its_own_backend_dtype_and_head_dim_alone():
    known = Calibration("this", {("one", "float32", 64): COST})
    assert known.seconds("one", call()) == COST.seconds(Work(32, 256, 0))
    assert known.seconds("two", call()) is None
    assert known.seconds("one", call(head_dim=32)) is None
    assert known.seconds("one", call(dtype=torch.bfloat16)) is None


@pytest.fixture
def path(calibrations: Path) -> Path:
    return path_of(device_name(CPU))


def test_a_file_holds_one_device_and_keeps_what_it_had(path: Path):
    name = device_name(CPU)
    assert calibration_for(CPU) is None
    assert write(Calibration(name, {("one", "float32", 64): COST})) == path
    write(Calibration(name, {("two", "bfloat16", 128): COST}))
    found = calibration_for(CPU)
    assert found is not None
    assert found == read(path)
    assert set(found.costs) == {("one", "float32", 64), ("two", "bfloat16", 128)}
    assert found.costs["one", "float32", 64] == COST
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_devices_have_files_of_their_own(calibrations: Path):
    assert path_of("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"
    assert f"{torch.get_num_threads()} threads" in device_name(CPU)


def changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(values)


def changed_cost(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["costs"][0].update(values)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed(format="other"), "format is 'other', not 'dit_sparse.calibration'"),
        (changed(version=1), "version is 1, not 2"),
        (changed(extra=1), "fields are ['costs', 'device', 'extra', 'format', 'version']"),
        (changed(device=3), "device is no text"),
        (changed(costs={}), "costs is no list"),
        (changed(costs=[3]), "costs[0] is no object"),
        (changed_cost(speed=3), "the fields of costs[0] are"),
        (changed_cost(name=None), "costs[0].name is no text"),
        (changed_cost(head_dim=64.0), "costs[0].head_dim is no count"),
        (changed_cost(samples=True), "costs[0].samples is no count"),
        (changed_cost(whole="1"), "costs[0].whole is '1', no number of at least 0"),
        (changed_cost(whole=-1.0), "costs[0].whole is -1.0, no number of at least 0"),
        (changed_cost(whole=float("nan")), "costs[0].whole is nan, no number of at least 0"),
        (lambda data: data["costs"].append(data["costs"][0]), "costs[1] is there twice"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_file_that_is_wrong_is_refused_with_a_reason(path: Path, change, reason: str):
    write(Calibration(device_name(CPU), {("one", "float32", 64): COST}))
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="is no calibration") as raised:
        read(path)
    assert reason in str(raised.value)
    assert "remove it and run dit-sparse bench --calibrate" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_torn_file_warns_once_and_counts_as_none(path: Path, content: bytes):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="is no calibration.*in their own order"):
        assert calibration_for(CPU) is None
    assert calibration_for(CPU) is None


def test_a_torn_file_is_not_written_over(path: Path):
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no calibration"):
        write(Calibration(device_name(CPU), {("one", "float32", 64): COST}))
    assert path.read_text() == "{"


def test_a_file_of_another_device_counts_as_none(path: Path):
    write(Calibration(device_name(CPU), {("one", "float32", 64): COST}))
    path.write_text(path.read_text().replace(device_name(CPU), "another"))
    assert calibration_for(CPU) is None


def test_a_folder_that_cannot_be_written_to_is_an_error(calibrations: Path):
    calibrations.write_text("a file")
    assert calibration_for(CPU) is None
    with pytest.raises(ValueError, match=r"cannot write to .*; give another folder in XDG_CACHE"):
        write(Calibration(device_name(CPU), {("one", "float32", 64): COST}))


def test_what_was_known_is_read_once(path: Path, monkeypatch: pytest.MonkeyPatch):
    write(Calibration(device_name(CPU), {("one", "float32", 64): COST}))
    calibration_for(CPU)
    monkeypatch.setattr(module, "read", lambda path: pytest.fail("read again"))
    assert calibration_for(CPU) is not None

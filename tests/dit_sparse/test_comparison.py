"""Comparison on a tiny model: what is measured, in which order, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse.comparison import (
    compare,
    read_comparison,
    spread,
    write_comparison,
    write_videos,
)
from dit_sparse.generate import Sample, sample
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.metrics import PSNR_CAP
from dit_sparse.pipelines.load import load_pipeline
from dit_sparse.pipelines.plan import Plan
from dit_sparse.preset_plans import preset_plans
from dit_sparse.prompts import Prompt
from dit_sparse.settings import Settings
from dit_sparse.video import read_video

SETTINGS = Settings(height=64, width=64, frames=5, steps=3, guidance=4.0)
PROMPTS = (Prompt("one", "a cat"), Prompt("two", "a dog", seed=5))
DENSITIES = {"element", "block", "weighted"}


def test_comparison(
    model: Path, plans: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(model, torch.float32, "cpu")
    loaded = {name: Plan.from_pretrained(plans[name]) for name in ("band", "full")}
    calls: list[tuple[str, int]] = []
    shown: dict[str, dict[str, Sample]] = {}

    def recording(pipe: object, prompt: Prompt, seed: int, settings: Settings, *rest: object):
        calls.append((prompt.id, settings.steps))
        return sample(pipe, prompt, seed, settings)

    def keep(prompt: Prompt, samples: dict[str, Sample]) -> None:
        shown[prompt.id] = samples
        write_videos(tmp_path, samples)

    monkeypatch.setattr("dit_sparse.comparison.sample", recording)
    result = compare(pipe, model, PROMPTS, SETTINGS, loaded, on_videos=keep)

    # Warm-ups are as short as reaches a sparse step; then every prompt, each candidate once.
    assert calls == [("one", 1), ("one", 2), ("one", 1), *[("one", 3)] * 3, *[("two", 3)] * 3]
    band, full = result.plans
    assert [list(samples) for samples in shown.values()] == [["dense", "band", "full"]] * 2

    # A plan of full heads is the model itself: identical frames, density 1.
    assert full.psnr_rgb.worst == PSNR_CAP
    assert full.ssim.worst == pytest.approx(1.0, abs=1e-9)
    assert full.density == dict.fromkeys(DENSITIES, 1.0)
    assert full.density_sparse is None

    assert band.psnr_rgb.mean < PSNR_CAP
    assert band.density_sparse is not None
    assert set(band.density) == set(band.density_sparse) == DENSITIES
    # One of three steps is dense, in both branches of both layers.
    assert band.dense_calls == {"dense steps of the schedule": 4}
    for kind, value in band.density.items():
        assert value == pytest.approx((1 + 2 * band.density_sparse[kind]) / 3)
    assert band.density["element"] < band.density["block"] < 1

    for run, name in zip(band.runs, ("one", "two"), strict=True):
        assert run.seconds == shown[name]["band"].seconds
        assert run.dense_seconds == shown[name]["dense"].seconds
        assert run.speedup == run.dense_seconds / run.seconds
    assert [run.seed for run in band.runs] == [0, 5]

    path = write_comparison(tmp_path, result)
    # Which machine it was comes back as JSON has it, lists for tuples.
    assert replace(read_comparison(path), environment=result.environment) == result
    content = json.loads(path.read_text())
    assert {"plans", "environment", "protocol"} <= set(content)
    assert {"name", "density", "speedup", "psnr_rgb", "ssim"} <= set(content["plans"][0])
    assert set(content["plans"][0]["speedup"]) == {"median", "low", "high"}
    assert set(content["plans"][0]["psnr_rgb"]) == {"mean", "std", "worst"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "band.mp4",
        "comparison.json",
        "dense.mp4",
        "full.mp4",
        "side-by-side.mp4",
    ]
    assert read_video(tmp_path / "dense.mp4").shape == (5, 256, 256, 3)
    assert read_video(tmp_path / "side-by-side.mp4").shape == (5, 284, 3 * 256 + 2 * 4, 3)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "dit_sparse.comparison", "version": 0}']
)
def test_what_is_no_comparison_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "comparison.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"comparison.json is no comparison: .* remove it"):
        read_comparison(path)


def test_presets_are_measured_like_plans(model: Path) -> None:
    pipe = load_pipeline(model, torch.float32, "cpu")
    settings = replace(SETTINGS, steps=4)
    names = "adaspa, gna+complement,asa-g"
    plans, reasons = preset_plans(names, (0.5, 0.02), pipe, settings)
    assert list(plans) == [
        f"{name}{at}" for at in ("", "@0.5", "@0.02") for name in names.replace(" ", "").split(",")
        if (name, at) != ("asa-g", "@0.02")
    ]  # fmt: skip
    assert "density 0.02 is out of reach" in reasons["asa-g@0.02"]
    chosen = {name: plans[name] for name in ("adaspa", "gna+complement")}
    assert chosen["adaspa"].grid == (2, 4, 4)
    result = compare(pipe, model, PROMPTS[:1], settings, chosen)
    adaspa, merged = result.plans
    assert adaspa.dense_calls == {"dense steps of the schedule": 4, "renewal": 4}
    assert merged.cache_bytes == 2 * chosen["gna+complement"].cache_bytes(TokenGrid(2, 4, 4))
    assert adaspa.cache_bytes == 2 * chosen["adaspa"].cache_bytes(TokenGrid(2, 4, 4)) > 0
    assert set(adaspa.stages) == {"attention", "search", "remainder"}
    for plan in result.plans:
        assert plan.density["weighted"] < plan.flops
    with pytest.raises(ValueError, match="preset: expected one of adaspa"):
        preset_plans("adaspam", (), pipe, settings)


def test_order_alternates_between_prompts(
    model: Path, plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(model, torch.float32, "cpu")
    one = sample(pipe, PROMPTS[0], 0, SETTINGS)
    order: list[str] = []

    def run(_pipe: object, plan: Plan | None, *_: object) -> tuple[Sample, dict | None]:
        order.append("dense" if plan is None else "sparse")
        summary = {"density": {}, "density_sparse": None, "seconds": 0.0, "dense_calls": {}}
        summary |= {"flops": 1.0, "cache_bytes": 0, "stages": {}}
        return one, None if plan is None else summary

    monkeypatch.setattr("dit_sparse.comparison._run", run)
    compare(pipe, model, PROMPTS, SETTINGS, {"p": Plan.from_pretrained(plans["band"])})
    assert order == ["dense", "sparse", "dense", "sparse", "sparse", "dense"]


def test_plan_cannot_be_called_dense(model: Path, plans: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="no plan may be called 'dense'"):
        compare(None, model, PROMPTS, SETTINGS, {"dense": Plan.from_pretrained(plans["band"])})


def test_spread() -> None:
    figures = spread([3.0, 1.0, 2.0, 10.0])
    assert (figures.median, figures.low, figures.high) == (2.5, 1.0, 10.0)

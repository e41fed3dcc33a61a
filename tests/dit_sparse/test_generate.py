"""Generation on a tiny model: frames, resuming, failures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.generate import check, generate, sample
from dit_sparse.kernels.pattern import Band
from dit_sparse.pipelines.load import load_pipeline
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.prompts import Prompt
from dit_sparse.runs import claimed, read_frames, read_run
from dit_sparse.settings import Settings
from tests import tiny

SETTINGS = Settings(height=64, width=64, frames=5, steps=2, guidance=4.0)
PROMPTS = (Prompt("one", "a cat"), Prompt("two", "a dog", "blur", seed=5))


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    return load_pipeline(model, torch.float32, "cpu")


def test_sample_is_what_the_pipeline_makes(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []
    made = sample(pipe, PROMPTS[1], 5, SETTINGS, lambda done, total: seen.append((done, total)))
    direct = pipe(
        prompt="a dog",
        negative_prompt="blur",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        output_type="np",
    ).frames
    assert np.array_equal(made.frames, np.rint(np.asarray(direct[0]) * 255).astype(np.uint8))
    assert seen == [(1, 2), (2, 2)]
    assert len(made.step_seconds) == 2
    assert 0 < sum(made.step_seconds) <= made.seconds


def test_batch_makes_runs_and_skips_them_the_next_time(
    pipe: Any, model: Path, plans: dict[str, Path], tmp_path: Path
) -> None:
    plan = Plan.from_pretrained(plans["band"])
    outcomes = list(generate(pipe, model, PROMPTS, SETTINGS, tmp_path, plan=plan))
    assert [outcome.state for outcome in outcomes] == ["made", "made"]
    run = read_run(outcomes[1].folder)
    assert run.request.seed == 5
    assert run.request.plan_digest == plan.digest
    assert run.attention is not None
    assert run.attention["dense_calls"] == {"dense steps of the schedule": 4}
    assert read_frames(outcomes[0].folder).shape == (5, 64, 64, 3)

    again = list(generate(pipe, model, PROMPTS, SETTINGS, tmp_path, plan=plan))
    assert [outcome.state for outcome in again] == ["skipped", "skipped"]


def test_run_is_made_again_from_its_own_file(pipe: Any, model: Path, tmp_path: Path) -> None:
    (first,) = generate(pipe, model, PROMPTS[:1], SETTINGS, tmp_path / "a")
    request = read_run(first.folder).request
    (second,) = generate(pipe, request.model, [request.prompt], request.settings, tmp_path / "b")
    assert second.folder.name == first.folder.name
    assert np.array_equal(read_frames(first.folder), read_frames(second.folder))


def test_run_that_another_process_makes_is_left_to_it(
    pipe: Any, model: Path, tmp_path: Path
) -> None:
    (made,) = generate(pipe, model, PROMPTS[:1], SETTINGS, tmp_path / "a")
    (tmp_path / "b").mkdir()
    with claimed(tmp_path / "b", made.folder.name):
        (outcome,) = generate(pipe, model, PROMPTS[:1], SETTINGS, tmp_path / "b")
    assert outcome.state == "busy"
    assert not outcome.folder.exists()


def test_failed_prompt_is_reported_and_the_next_follows(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sample

    def fail_on_one(pipe: Any, prompt: Prompt, *rest: object) -> object:
        if prompt.id == "one":
            raise ValueError("no luck")
        return real(pipe, prompt, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr("dit_sparse.generate.sample", fail_on_one)
    one, two = generate(pipe, model, PROMPTS, SETTINGS, tmp_path)
    assert (one.state, one.reason, two.state) == ("failed", "no luck", "made")
    assert not one.folder.exists()


def test_frames_with_nan_are_an_error() -> None:
    pipe = tiny.wan()
    with torch.no_grad():
        pipe.transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="5 of 5 frames hold NaN"):
        sample(pipe, PROMPTS[0], 0, SETTINGS)


@pytest.mark.parametrize(
    ("change", "schedule", "message"),
    [
        ({"frames": 6}, Schedule(), "6 frames: the model makes 4 k"),
        ({}, Schedule(1, 1), "nothing of 2 steps would run sparse; use more --steps"),
    ],
    ids=["frames", "schedule"],
)
def test_nothing_is_written_before_all_is_checked(
    pipe: Any,
    model: Path,
    tmp_path: Path,
    change: dict[str, int],
    schedule: Schedule,
    message: str,
) -> None:
    plan = Plan.uniform(pipe, Band(6), schedule)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        list(generate(pipe, model, PROMPTS, replace(SETTINGS, **change), out, plan=plan))
    assert not out.exists()


def test_plan_of_another_model_is_refused(pipe: Any, plans: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="the plan is for another model"):
        check(pipe, SETTINGS, Plan.from_pretrained(plans["other"]))

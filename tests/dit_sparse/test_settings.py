"""Settings: where each value comes from, and what a pipeline refuses."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_sparse.settings import Settings, model_defaults, refusal, settings_for

SETTINGS = Settings(height=64, width=64, frames=9, steps=4, guidance=4.0)


class Pipe:
    """What Settings look at in a pipeline."""

    vae_scale_factor_temporal = 4
    vae_scale_factor_spatial = 8

    def __init__(self, rope: int = 32) -> None:
        config = SimpleNamespace(patch_size=(1, 2, 2), rope_max_seq_len=rope)
        self.transformer = SimpleNamespace(config=config)

    def __call__(
        self,
        prompt: str,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
    ) -> Any: ...


def test_asked_beats_model_beats_pipeline() -> None:
    settings = settings_for(Pipe(), {"height": 64, "steps": 20}, steps=7, width=None)
    assert settings == Settings(height=64, width=832, frames=81, steps=7, guidance=5.0)


def test_model_without_file_suggests_nothing(tmp_path: Path) -> None:
    assert model_defaults(tmp_path) == {}


def test_model_suggests_what_its_file_says(tmp_path: Path) -> None:
    values = {"height": 64, "guidance": 4, "dtype": "bfloat16"}
    (tmp_path / "generation.json").write_text(json.dumps(values))
    assert model_defaults(tmp_path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"heigth": 64}', "heigth: Extra inputs"),
        ('{"height": "64"}', "height: Input should be a valid integer"),
        ('{"dtype": "int8"}', "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ("{", "Invalid JSON"),
    ],
    ids=["name", "type", "dtype", "json"],
)
def test_broken_suggestions_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "generation.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        model_defaults(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, not 0"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown; use one of float32, bfloat16, float16"),
    ],
    ids=["frames", "seed", "dtype"],
)
def test_impossible_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"frames": 1}, None),
        ({"frames": 10}, "10 frames: the model makes 4 k + 1 frames; use 9 or 13"),
        ({"frames": 2}, "2 frames: the model makes 4 k + 1 frames; use 1 or 5"),
        ({"height": 72}, "height 72: the model makes multiples of 16 pixels; use 64 or 80"),
        ({"width": 8}, "width 8: the model makes multiples of 16 pixels; use 16 or 32"),
        ({"width": 512}, None),
        ({"width": 528}, "width 528: the model's positions end at 512 pixels; use less"),
        ({"frames": 125}, None),
        ({"frames": 129}, "129 frames: the model's positions end at 125; use less"),
    ],
    ids=str,
)
def test_refused_sizes_name_the_nearest_legal_ones(
    change: dict[str, int], message: str | None
) -> None:
    assert refusal(Pipe(), replace(SETTINGS, **change)) == message


def test_every_frame_count_is_legal_without_temporal_compression() -> None:
    pipe = Pipe()
    pipe.vae_scale_factor_temporal = 1
    assert refusal(pipe, replace(SETTINGS, frames=10)) is None

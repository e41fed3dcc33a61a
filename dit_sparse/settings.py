"""Settings: how a model is asked to sample, beside the prompt."""

import inspect
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from dit_sparse.prompts import validation_message

Dtype = Literal["float32", "bfloat16", "float16"]
FRAMES_PER_SECOND = 16


@dataclass(frozen=True, slots=True)
class Settings:
    """One way to sample: sizes in pixels and frames, denoising steps, guidance, arithmetic."""

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside 0 ... 2**63 - 1")
        check_dtype(self.dtype)


def check_dtype(name: str) -> None:
    """Raise ValueError unless it is the name of an arithmetic that can be asked for."""
    if name not in get_args(Dtype):
        raise ValueError(f"dtype {name!r} is unknown; use one of {', '.join(get_args(Dtype))}")


def check_device(name: str) -> None:
    """Raise ValueError unless it is the name of a device that is there."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"device {name!r} is unknown; use cpu, cuda or cuda:1") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no such device; use --device cpu")


class _Generation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    height: int | None = None
    width: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None
    dtype: Dtype | None = None


def model_defaults(model: str | Path) -> dict[str, Any]:
    """What the model folder itself suggests: the fields of its `generation.json`, if it has one.

    Raises:
        ValueError: the file has unknown fields or wrong types.
    """
    path = Path(model) / "generation.json"
    if not path.is_file():
        return {}
    try:
        return _Generation.model_validate_json(path.read_bytes()).model_dump(exclude_none=True)
    except ValidationError as error:
        raise ValueError(f"{path}: {validation_message(error)}") from None


def settings_for(pipe: Any, defaults: dict[str, Any], **asked: Any) -> Settings:
    """Settings for one pipeline: what is asked, else the model's defaults, else the pipeline's.

    Args:
        pipe: a diffusers pipeline; its `__call__` supplies the last defaults.
        defaults: see `model_defaults`.
        asked: fields of Settings; None means not asked.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    own_names = {
        "height": "height",
        "width": "width",
        "frames": "num_frames",
        "steps": "num_inference_steps",
        "guidance": "guidance_scale",
    }
    values: dict[str, Any] = {
        name: parameters[own].default for name, own in own_names.items() if own in parameters
    }
    values |= defaults
    values |= {name: value for name, value in asked.items() if value is not None}
    known = {field.name for field in fields(Settings)}
    required = ("height", "width", "frames", "steps", "guidance")
    missing = [name for name in required if values.get(name) is None]
    if missing:
        options = ", ".join(f"--{name}" for name in missing)
        raise ValueError(f"{type(pipe).__name__} has no default {options}; give it")
    return Settings(**{name: value for name, value in values.items() if name in known})


def refusal(pipe: Any, settings: Settings) -> str | None:
    """Why the pipeline cannot make exactly what is asked, or None.

    diffusers rounds such sizes with a warning; a batch that was asked for 30 frames must not
    find out from its files that it got 29.
    """
    every = pipe.vae_scale_factor_temporal
    if settings.frames % every != 1 % every:
        below = (settings.frames - 1) // every * every + 1
        return (
            f"{settings.frames} frames: the model makes {every} k + 1 frames; "
            f"use {below} or {below + every}"
        )
    transformer = pipe.transformer or pipe.transformer_2
    patch = transformer.config.patch_size
    sides = (patch, patch) if isinstance(patch, int) else patch[-2:]
    limit = getattr(transformer.config, "rope_max_seq_len", None)
    for name, size, side in zip(
        ("height", "width"), (settings.height, settings.width), sides, strict=True
    ):
        # WanPipeline's own check asks for multiples of 16, whatever the model's factors are.
        unit = math.lcm(pipe.vae_scale_factor_spatial * side, 16)
        if size % unit:
            below = max(size // unit, 1) * unit
            return (
                f"{name} {size}: the model makes multiples of {unit} pixels; "
                f"use {below} or {below + unit}"
            )
        if limit is not None and size // (pipe.vae_scale_factor_spatial * side) > limit:
            most = limit * pipe.vae_scale_factor_spatial * side // unit * unit
            return f"{name} {size}: the model's positions end at {most} pixels; use less"
    if limit is not None and (settings.frames - 1) // every + 1 > limit:
        most = (limit - 1) * every + 1
        return f"{settings.frames} frames: the model's positions end at {most}; use less"
    return None

"""Session: a loaded pipeline with the settings it is asked to sample with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_sparse.pipelines.load import load_pipeline
from dit_sparse.settings import Settings, check_device, check_dtype, model_defaults, settings_for


@dataclass(frozen=True, slots=True)
class Session:
    """A pipeline on its device, where it came from, and how to sample with it."""

    pipe: Any
    model: str
    settings: Settings


def open_session(model: str | Path, **asked: Any) -> Session:
    """Load a model folder.

    Args:
        model: a folder that a diffusers pipeline was saved to.
        asked: fields of Settings; None leaves the choice to the model's `generation.json`, then
            to the pipeline's own defaults. Device: an accelerator if there is one. Arithmetic:
            bfloat16 on an accelerator, otherwise float32.

    Raises:
        ValueError: the settings are impossible, or the folder is not a pipeline.
    """
    defaults = model_defaults(model)
    device = asked.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    usual = "bfloat16" if device.startswith("cuda") else "float32"
    dtype = asked.get("dtype") or defaults.get("dtype", usual)
    check_dtype(dtype)
    if dtype == "float16" and device == "cpu":
        raise ValueError("float16 is unusable on a CPU; use --dtype float32 or bfloat16")
    pipe = load_pipeline(model, getattr(torch, dtype), device)
    chosen = asked | {"device": device, "dtype": dtype}
    return Session(pipe, str(model), settings_for(pipe, defaults, **chosen))

"""Loading: a diffusers pipeline from a local folder or the Hub, ready to run."""

from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def load_pipeline(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Any:
    """Load a pipeline without progress bars; a local folder is read without the network.

    Args:
        folder (`str` or `Path`): written by `DiffusionPipeline.save_pretrained`, or a Hub id.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the weights.
        device (`str`, defaults to `"cpu"`): where to put them.

    Raises:
        ValueError: one line that says why there is no pipeline.
    """
    path = Path(folder)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{folder}: expected a folder with a model_index.json, as DiffusionPipeline."
            "save_pretrained writes it; this one has none"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(
            str(folder), dtype=dtype, local_files_only=path.exists()
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        problem = "cannot be loaded" if path.exists() else "is no folder, nor found on the Hub"
        raise ValueError(f"{folder} {problem}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)

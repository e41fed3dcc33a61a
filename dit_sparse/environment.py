"""Environment: the machine, the versions and the backends behind a figure."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dit_sparse

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "triton",
    "einops",
    "imageio",
    "imageio-ffmpeg",
    "torchmetrics",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Everything that a reader of a figure must know, as JSON-ready values."""
    import torch

    from dit_sparse.kernels.calibration import processor

    accelerators = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    return {
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "memory_gib": _memory_gib(),
            "accelerators": accelerators,
        },
        "python": platform.python_version(),
        "packages": {
            "dit-sparse": dit_sparse.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "revision": revision(),
    }


def backends() -> list[dict[str, str | None]]:
    """Which backend runs what here: rows of backend, device, dtype, reason for refusing."""
    import torch

    from dit_sparse.kernels.backend import BACKENDS, AttentionCall
    from dit_sparse.kernels.blocks import block_indices
    from dit_sparse.kernels.grid import TokenGrid
    from dit_sparse.kernels.pattern import Neighborhood

    blocks = block_indices((Neighborhood((3, 3, 3)),), TokenGrid(4, 4, 4), block_q=16, block_k=16)
    rows: list[dict[str, str | None]] = []
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.zeros(1, 64, 1, 64, dtype=dtype, device=device)
            call = AttentionCall(tensor, tensor, tensor, blocks, scale=0.125)
            for backend in BACKENDS:
                rows.append(
                    {
                        "backend": backend.name,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "reason": backend.supports(call),
                    }
                )
    return rows


def calibrations() -> dict[str, str]:
    """For each device, what `backend="auto"` knows of its backends' costs."""
    import torch

    from dit_sparse.kernels.calibration import device_name, path_of, read
    from dit_sparse.kernels.stage import STAGES

    states = {}
    for kind in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        path = path_of(device_name(torch.device(kind)))
        try:
            stages = {str(stage) for stage in STAGES}
            measured = sorted({name for name, _, _ in read(path).costs} - stages)
            states[kind] = f"{', '.join(measured)} in {path}"
        except FileNotFoundError:
            states[kind] = "none, so backends are taken in their own order"
        except (ValueError, OSError) as error:
            states[kind] = f"none: {error}"
    return states


def revision() -> str | None:
    """The commit of the checkout this package runs from, `+` when files were changed since.

    None when it is not a checkout, has no commit yet, or git is not installed.
    """
    folder = Path(dit_sparse.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)

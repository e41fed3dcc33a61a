"""Training-free sparse attention for video and image diffusion transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_sparse.kernels.pattern import (
        AnyOf,
        Band,
        Columns,
        Full,
        Neighborhood,
        Radial,
        Sink,
        Skip,
    )
    from dit_sparse.pipelines.hook import disable_sparse_attention, enable_sparse_attention
    from dit_sparse.pipelines.plan import Plan
    from dit_sparse.pipelines.schedule import Schedule
    from dit_sparse.search.budget import Budget
    from dit_sparse.search.driver import search_plan

__version__ = "0.1.0"

__all__ = [
    "AnyOf",
    "Band",
    "Budget",
    "Columns",
    "Full",
    "Neighborhood",
    "Plan",
    "Radial",
    "Schedule",
    "Sink",
    "Skip",
    "disable_sparse_attention",
    "enable_sparse_attention",
    "search_plan",
]

_HOMES = {
    "AnyOf": "dit_sparse.kernels.pattern",
    "Band": "dit_sparse.kernels.pattern",
    "Budget": "dit_sparse.search.budget",
    "Columns": "dit_sparse.kernels.pattern",
    "Full": "dit_sparse.kernels.pattern",
    "Neighborhood": "dit_sparse.kernels.pattern",
    "Plan": "dit_sparse.pipelines.plan",
    "Radial": "dit_sparse.kernels.pattern",
    "Schedule": "dit_sparse.pipelines.schedule",
    "Sink": "dit_sparse.kernels.pattern",
    "Skip": "dit_sparse.kernels.pattern",
    "disable_sparse_attention": "dit_sparse.pipelines.hook",
    "enable_sparse_attention": "dit_sparse.pipelines.hook",
    "search_plan": "dit_sparse.search.driver",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

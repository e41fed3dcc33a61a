"""PresetPlans: the presets that a comparison asks for, as plans for one pipeline and size."""

from collections.abc import Sequence
from itertools import product
from typing import Any

from dit_sparse.pipelines.capture import observed_grid
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.presets import COMBINATIONS, PRESETS
from dit_sparse.settings import Settings


def preset_plans(
    names: str, densities: Sequence[float], pipe: Any, settings: Settings
) -> tuple[dict[str, Plan], dict[str, str]]:
    """Plans by name, and the reasons of those that there are none of.

    Args:
        names: preset names with commas between them; `all`, the published ones; `everything`,
            the baselines and combinations as well.
        densities: every preset also at these densities, under `name@density`.
        pipe: the loaded pipeline.
        settings: of the generations.

    Raises:
        ValueError: a name is unknown.
    """
    known = {"all": PRESETS, "everything": PRESETS | COMBINATIONS}.get(names)
    chosen = [name.strip() for name in names.split(",")] if known is None else list(known)
    grid = observed_grid(
        pipe,
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        guidance_scale=settings.guidance,
    )
    plans: dict[str, Plan] = {}
    reasons: dict[str, str] = {}
    for density, name in product((None, *densities), chosen):
        label = name if density is None else f"{name}@{density:g}"
        try:
            plans[label] = Plan.preset(
                name, pipe, grid=grid.shape, steps=settings.steps, density=density
            )
        except ValueError as error:
            if density is None:
                raise
            reasons[label] = str(error)
    return plans, reasons

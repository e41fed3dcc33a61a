"""Figures: a plan as a heat map, layer by head, drawn without a display."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dit_sparse.plan_summary import PlanSummary
from dit_sparse.video import replacing

SHORT = {"full": "F", "skip": "S", "band": "B", "columns": "C", "neighborhood": "N"}


def plot_plan(summary: PlanSummary, path: Path) -> None:
    """Draw the block density of every head, its kind of pattern written inside, as a PNG.

    Raises:
        ValueError: the summary has no densities, because the plan has no grid.
    """
    if summary.grid is None:
        raise ValueError(
            "this plan was not searched at a grid, so its densities are unknown; "
            "give one: --grid 15x16x16"
        )
    rows = list(summary.layers.values())
    most = max(len(row) for row in rows)
    values = np.full((len(rows), most), np.nan)
    for index, row in enumerate(rows):
        values[index, : len(row)] = [head.density for head in row]
    figure = Figure(figsize=(2.8 + 0.42 * most, 1.8 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for index, row in enumerate(rows):
        for head, cell in enumerate(row):
            dark = cell.density is not None and cell.density < 0.6
            axes.text(
                head,
                index,
                SHORT[cell.kind],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(most))
    axes.set_yticks(range(len(rows)), list(summary.layers), fontsize=7)
    axes.set_xlabel("head")
    figure.colorbar(image, ax=axes, label="block density")
    kinds = ", ".join(f"{SHORT[kind]} = {kind}" for kind in summary.patterns)
    grid = "×".join(map(str, summary.grid))
    figure.suptitle(f"{kinds}\ngrid {grid}, block {summary.block}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")

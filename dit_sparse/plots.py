"""Figures: a plan as a heat map, a pattern as a mask; drawn without a display."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from dit_sparse.kernels.blocks import PARTIAL, WHOLE, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Pattern, pattern_to_dict
from dit_sparse.plan_summary import PlanSummary
from dit_sparse.search.choices import Choices
from dit_sparse.video import replacing

SHORT = {
    "full": "F",
    "skip": "S",
    "band": "B",
    "columns": "C",
    "stripes": "V",
    "sink": "K",
    "neighborhood": "N",
    "radial": "R",
    "any_of": "A",
    "scored": "D",
    "choice": "O",
}
REST = {"drop": "", "pooled": "p", "rescale": "r", "complement": "c"}
MOST_DRAWN = 2500  # tokens; their pairs become pixels
CURVE_WIDTH = 4.4  # inches
BLOCK = 16  # tokens of a block in the picture of a pattern, whose grid is small
# Nothing, some and all of a block or pair; the query itself.
LEVELS = ListedColormap(["#f4f4f1", "#9fc3dd", "#1f5a8c", "#e4572e"])


def plot_plan(summary: PlanSummary, path: Path) -> None:
    """Draw the block density of every head, its kinds of pattern and remainder written inside, as
    a PNG. Where the plan carries evidence, what a head costs over a generation is drawn instead,
    and beside it the errors that other costs would have had.

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
    label = "block density"
    for index, row in enumerate(rows):
        values[index, : len(row)] = [head.density for head in row]
    if summary.choices is not None:
        label = f"share of dense {summary.choices.cost}"
        for index, choices in enumerate(summary.choices.layers.values()):
            values[index, : len(choices)] = [choice.winner.cost for choice in choices]
    width, height = 2.8 + 0.42 * most, 1.8 + 0.34 * len(rows)
    if summary.choices is None:
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    else:
        sizes = (width, CURVE_WIDTH)
        figure = Figure(figsize=(sum(sizes), max(height, 3.6)), layout="constrained")
        both: Any = figure.subplots(1, 2, width_ratios=sizes)
        axes = both[0]
        _show_curve(both[1], summary.choices)
    FigureCanvasAgg(figure)
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for index, row in enumerate(rows):
        for head, cell in enumerate(row):
            dark = values[index, head] < 0.6
            axes.text(
                head,
                index,
                SHORT[cell.kind] + REST[cell.remainder.split()[0]],
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(most))
    axes.set_yticks(range(len(rows)), list(summary.layers), fontsize=7)
    axes.set_xlabel("head")
    figure.colorbar(image, ax=axes, label=label)
    kinds = ", ".join(f"{SHORT[kind]} = {kind}" for kind in summary.patterns)
    rest = dict.fromkeys(kind.split()[0] for kind in summary.remainders)
    kinds += "".join(f", {REST[kind]} = with {kind}" for kind in rest if REST[kind])
    grid = "×".join(map(str, summary.grid))
    figure.suptitle(f"{kinds}\ngrid {grid}, block {summary.block}", fontsize=8)
    _save(figure, path)


def plot_pattern(
    pattern: Pattern, grid: tuple[int, int, int], path: Path | None = None
) -> dict[str, Any]:
    """Draw which key each query sees, the blocks that this makes a kernel visit, and the frames as
    the query in their middle sees them, as a PNG, by default out/<kind>.png; says what was drawn.

    Raises:
        ValueError: the pattern refuses the grid, or the grid is too large for a picture.
    """
    tokens = TokenGrid(*grid)
    if tokens.video > MOST_DRAWN:
        raise ValueError(
            f"a picture holds at most {MOST_DRAWN} tokens, grid {tokens} has {tokens.video}; "
            "draw the pattern on a smaller one: --grid 5x8x8"
        )
    path = path or Path("out") / f"{pattern.kind}.png"
    blocks = block_indices((pattern,), tokens, block_q=BLOCK, block_k=BLOCK)
    density = blocks.density()
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(2, height_ratios=(3.2, 1.0))
    upper, lower = halves
    left, right = upper.subplots(1, 2)
    _show(left, pattern.mask(tokens).numpy() * 2.0)
    left.set_title(f"pairs of tokens in raster order: {density.element:.1%} kept", fontsize=9)
    for frame in range(1, tokens.frames):
        for line in (left.axhline, left.axvline):
            line(frame * tokens.height * tokens.width - 0.5, color="#b9b9b0", linewidth=0.5)
    visited = np.zeros((blocks.query_blocks, blocks.key_blocks))
    for row in range(blocks.query_blocks):
        for column, tag in blocks.entries(0, row):
            visited[row, column] = {WHOLE: 2, PARTIAL: 1}[tag]
    _show(right, visited)
    right.set_title(
        f"blocks of {BLOCK} in {blocks.order} order: {density.block:.1%} visited", fontsize=9
    )
    left.set_xlabel("key token")
    left.set_ylabel("query token")
    right.set_xlabel("key block (dark: whole, light: partial)")
    right.set_ylabel("query block")
    _show_frames(lower, pattern, tokens)
    figure.suptitle(f"{pattern}   grid {tokens}", fontsize=11)
    _save(figure, path)
    return {
        "pattern": pattern_to_dict(pattern),
        "text": str(pattern),
        "grid": list(grid),
        "density": {"element": density.element, "block": density.block},
        "figure": str(path),
    }


def _show_curve(axes: Axes, choices: Choices) -> None:
    """Error of the best assignment of every cost, and where this plan is."""
    costs, errors = zip(*choices.curve, strict=True)
    axes.plot(costs, errors, color="#1f5a8c", marker=".", markersize=3, linewidth=1)
    cost, error = choices.point
    axes.plot(cost, error, "o", color="#e4572e", markersize=8)
    axes.annotate(
        f"this plan: {error:.3g} at {cost:.3g}",
        (cost, error),
        xytext=(10, 10) if cost < 0.4 else (-10, 10),
        ha="left" if cost < 0.4 else "right",
        textcoords="offset points",
        fontsize=8,
    )
    least = min((each for each in (*errors, error) if each > 0), default=1.0)
    # Full attention has error 0, which is one decade below the others.
    axes.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(least)))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"mean {choices.cost} of attention", fontsize=8)
    axes.set_ylabel("predicted error", fontsize=8)
    axes.set_title("best error at every cost (line) and this plan", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.5)


def _show_frames(figure: Any, pattern: Pattern, grid: TokenGrid) -> None:
    """What the query in the middle of the video sees, frame by frame."""
    place = tuple(length // 2 for length in grid.shape)
    query = int(np.ravel_multi_index(place, grid.shape))
    seen = pattern.mask(grid)[query].numpy().reshape(grid.shape) * 2.0
    seen[place] = 3
    rows = -(-grid.frames // 12)
    axes = figure.subplots(rows, -(-grid.frames // rows), squeeze=False).ravel()
    for frame, axis in enumerate(axes):
        if frame >= grid.frames:
            axis.set_axis_off()
            continue
        _show(axis, seen[frame])
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"frame {frame}", fontsize=8)
    figure.suptitle(
        f"what the query (red) at frame {place[0]}, row {place[1]}, column {place[2]} sees",
        fontsize=9,
    )


def _show(axes: Axes, values: np.ndarray) -> None:
    axes.imshow(values, cmap=LEVELS, vmin=-0.5, vmax=3.5, interpolation="nearest")
    axes.tick_params(labelsize=7)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")

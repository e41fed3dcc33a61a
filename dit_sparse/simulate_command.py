"""Command `simulate`: what is asked on the command line, made into a simulation."""

from typing import Annotated

import typer

from dit_sparse.options import GridOption, JsonOption, PatternTextOption, counts_of, grid_of
from dit_sparse.terminal import print_bounds

WindowOption = Annotated[
    str | None, typer.Option(metavar="TxHxW", help="Window of a neighborhood.")
]
StrideOption = Annotated[
    str | None, typer.Option(metavar="TxHxW", help="Default: all that are worth it.")
]
DilationOption = Annotated[str | None, typer.Option(metavar="TxHxW", help="Default: 1x1x1.")]
QTileOption = Annotated[
    str | None, typer.Option(metavar="TxHxW", help="Queries of a tile; default: 4x4x4.")
]
KVTileOption = Annotated[
    str | None, typer.Option(metavar="TxHxW", help="Keys of a tile; default: 4x4x4.")
]


def simulate(
    grid: GridOption = None,
    window: WindowOption = None,
    stride: StrideOption = None,
    dilation: DilationOption = None,
    pattern: PatternTextOption = None,
    plan: Annotated[str | None, typer.Option(metavar="DIR", help="All heads of a plan.")] = None,
    q_tile: QTileOption = None,
    kv_tile: KVTileOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bound the speed-up of a neighborhood, of any pattern or of a plan by the tiles it visits."""
    _check(grid, window, stride or dilation, pattern, plan, q_tile or kv_tile)
    shape = None if grid is None else grid_of(grid)
    counts = {"--window": window, "--stride": stride, "--dilation": dilation}
    window_of, stride_of, dilation_of = (
        counts_of(name, text or "1x1x1") for name, text in counts.items()
    )
    tiles = counts_of("--q-tile", q_tile or "4x4x4"), counts_of("--kv-tile", kv_tile or "4x4x4")

    from dit_sparse import bounds
    from dit_sparse.kernels.pattern import Neighborhood
    from dit_sparse.kernels.pattern_text import pattern_from_text
    from dit_sparse.pipelines.plan import Plan

    if shape is None or plan is not None:
        found = bounds.of_plan(Plan.from_pretrained(plan or ""), shape)
    elif pattern is not None:
        found = bounds.of_pattern(pattern_from_text(pattern), shape, *tiles)
    else:
        of = bounds.of_pattern if stride else bounds.of_strides
        found = of(Neighborhood(window_of, stride_of, dilation_of), shape, *tiles)
    print_bounds(found, json_output)


def _check(
    grid: str | None,
    window: str | None,
    of_window: str | None,
    pattern: str | None,
    plan: str | None,
    tiles: str | None,
) -> None:
    """Refuse options of `simulate` that do not go together."""
    if [window, pattern, plan].count(None) != 2:
        raise typer.BadParameter("give one of --window TxHxW, --pattern TEXT and --plan DIR")
    if window is None and of_window is not None:
        raise typer.BadParameter("--stride and --dilation go with --window")
    if plan is not None and tiles is not None:
        raise typer.BadParameter("--plan has blocks of its own; leave --q-tile and --kv-tile")
    if plan is None and grid is None:
        raise typer.BadParameter("give the token grid: --grid 30x48x80")

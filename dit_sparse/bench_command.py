"""Command `bench`: what is asked on the command line, made into workloads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_sparse.options import JsonOption, OverwriteOption
from dit_sparse.terminal import output, progress, say

if TYPE_CHECKING:
    from rich.console import Group

    from dit_sparse.workload import Workload

_DENSITIES, _CALIBRATED_DENSITIES = (0.25,), (0.0625, 0.125, 0.25, 0.5, 1.0)
_TOKENS, _CALIBRATED_TOKENS = (8192,), (2048, 4096)
_PATTERNS, _CALIBRATED_PATTERNS = ("blocks",), ("blocks", "neighborhood", "band", "pooled")


def bench(
    device: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, ...; may be repeated, as all lists here.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Video tokens. Default: 8192.")
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens, heads and head_dim of a model: wan-1.3b-480p, wan-14b-720p, "
            "hunyuanvideo-720p, cogvideox, flux-4k."
        ),
    ] = None,
    head_dim: Annotated[
        list[int] | None, typer.Option(min=1, help="Default: 64, or the preset's.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Default: 2, or the preset's.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Default: float32 on a CPU, bfloat16 on an accelerator."),
    ] = None,
    density: Annotated[list[float] | None, typer.Option(help="In (0, 1]. Default: 0.25.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="blocks (default), neighborhood, band, pooled.")
    ] = None,
    block: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a block. Default: 128.")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="Default: all but the reference.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds; the median counts.")] = 5,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help='Keep what backends and searches cost here, for backend "auto" and plans.',
        ),
    ] = False,
    static: Annotated[
        bool, typer.Option("--static", help="Count what the GPU kernels compile to; no GPU.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the JSON object here, and its table beside it as .md."
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Time the backends beside dense attention; each is verified first."""
    if static:
        from dit_sparse.static_bench import static_bench

        static_bench(json_output)
        return
    if tokens and preset:
        raise typer.BadParameter("give either --tokens or --preset")
    if out is not None:
        _check(out, overwrite)
    workloads = _workloads(
        device or [_default_device()],
        _grids(tokens or (_CALIBRATED_TOKENS if calibrate else _TOKENS), preset, head_dim, heads),
        dtype,
        density or (_CALIBRATED_DENSITIES if calibrate else _DENSITIES),
        pattern or (_CALIBRATED_PATTERNS if calibrate else _PATTERNS),
        block or (128,),
    )
    run = _calibrate if calibrate else _bench
    data, table = run(workloads, backend or (), repeats)
    if out is not None:
        from dit_sparse.bench import write_bench
        from dit_sparse.video import replacing

        write_bench(out, data)
        with replacing(page_of(out)) as partial:
            partial.write_text(bench_page(out, table))
        say(f"wrote {out} and {page_of(out).name}")
    if json_output:
        print(json.dumps(data))
    else:
        output().print(table)


def page_of(out: Path) -> Path:
    """Where the table of a result is written."""
    return out.with_suffix(".md")


def bench_page(out: Path, table: "Group") -> str:
    """The table of the result in `out`, as Markdown."""
    from dit_sparse.markdown import page

    return page(out.stem, [f"All figures: [{out.name}]({out.name}).", *table.renderables])


def _check(out: Path, overwrite: bool) -> None:
    if page_of(out) == out:
        raise typer.BadParameter(f"--out names the JSON file, beside which its table is {out}")
    for path in (out, page_of(out)):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is there already; choose another --out or give --overwrite")


def _bench(
    workloads: "list[Workload]", backends: Sequence[str], repeats: int
) -> "tuple[dict[str, Any], Group]":
    from dit_sparse.bench import bench as run
    from dit_sparse.tables import bench_table

    with progress("bench", len(workloads)) as on_round:
        found = run(workloads, backends, repeats, on_round)
    for name, reason in dict.fromkeys((row["backend"], row["reason"]) for row in found.refusals):
        say(f"{name} refuses: {reason}")
    data = found.to_dict()
    return data, bench_table(data)


def _calibrate(
    workloads: "list[Workload]", backends: Sequence[str], repeats: int
) -> "tuple[dict[str, Any], Group]":
    import torch

    from dit_sparse.bench import calibrate as run
    from dit_sparse.bench import calibration_to_dict, stage_workloads
    from dit_sparse.kernels.calibration import device_name, writable_path_of, write
    from dit_sparse.tables import calibration_table

    found, devices = [], dict.fromkeys(workload.device for workload in workloads)
    for device in devices:
        writable_path_of(device_name(torch.device(device)))
    rounds = len(workloads) + len(stage_workloads(workloads))
    with progress("calibrate", rounds) as on_round:
        for device in devices:
            here = [workload for workload in workloads if workload.device == device]
            found.append(run(here, backends, repeats, on_round))
    for calibration in found:
        say(f"wrote {write(calibration)}")
    data = calibration_to_dict(found)
    return data, calibration_table(data)


def _workloads(
    devices: Sequence[str],
    grids: Sequence[dict[str, Any]],
    dtypes: Sequence[str] | None,
    densities: Sequence[float],
    patterns: Sequence[str],
    blocks: Sequence[int],
) -> "list[Workload]":
    from dit_sparse.workload import Workload

    return [
        Workload(**grid, device=device, dtype=dtype, density=density, pattern=pattern, block=block)
        for device in devices
        for dtype in dtypes or ["float32" if device == "cpu" else "bfloat16"]
        for grid in grids
        for block in blocks
        for pattern in patterns
        for density in densities
    ]


def _grids(
    tokens: Sequence[int],
    presets: Sequence[str] | None,
    head_dims: Sequence[int] | None,
    heads: int | None,
) -> list[dict[str, Any]]:
    from dit_sparse.workload import PRESETS, grid_of_tokens

    unknown = [name for name in presets or () if name not in PRESETS]
    if unknown:
        raise ValueError(f"unknown preset {unknown[0]!r}; use one of {', '.join(PRESETS)}")
    if presets:
        return [
            {"grid": found.grid, "heads": heads or found.heads, "head_dim": head_dim}
            for found in (PRESETS[name] for name in presets)
            for head_dim in head_dims or [found.head_dim]
        ]
    return [
        {"grid": grid_of_tokens(count), "heads": heads or 2, "head_dim": head_dim}
        for count in tokens
        for head_dim in head_dims or [64]
    ]


def _default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

"""Option: what can be written after a command, declared once for all commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dit_sparse.prompts import Prompt

ModelOption = Annotated[
    str, typer.Option("--model", metavar="DIR", help="Folder of a diffusers pipeline.")
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="Prompts: one a line, or JSONL with one object a line."
    ),
]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")
]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write to.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier call left in --out.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of prompts without one of their own.")]
HeightOption = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
WidthOption = Annotated[int | None, typer.Option(min=1, help="Pixels.")]
FramesOption = Annotated[int | None, typer.Option(min=1, help="Frames of the video.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
BackendOption = Annotated[str, typer.Option(help="Sparse kernel; dit-sparse env lists them.")]

PatternTextOption = Annotated[
    str | None,
    typer.Option(
        "--pattern",
        metavar="TEXT",
        help="Such as neighborhood:window=3x5x5,stride=1x2x2 or band:half_width=16+sink.",
    ),
]
GridOption = Annotated[str | None, typer.Option("--grid", metavar="TxHxW", help="Token grid.")]

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


def check_simulated(
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


def grid_of(text: str) -> tuple[int, int, int]:
    """A token grid written as `15x16x16`: frames, height, width."""
    return counts_of("--grid", text)


def counts_of(option: str, text: str) -> tuple[int, int, int]:
    """Three counts written as `4x8x8`: frames, height, width."""
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise typer.BadParameter(f"{option} {text!r}: give frames, height and width as 15x16x16")
    frames, height, width = map(int, sizes)
    return frames, height, width


def prompts_of(file: Path | None, texts: list[str] | None) -> "tuple[Prompt, ...]":
    """The prompts of a file or those written after the command."""
    from dit_sparse.prompts import Prompt, read_prompts

    if (file is None) == (not texts):
        raise typer.BadParameter("give either --prompts FILE or --prompt TEXT")
    if file is not None:
        return read_prompts(file)
    return tuple(Prompt(f"{number:04d}", text) for number, text in enumerate(texts or (), 1))

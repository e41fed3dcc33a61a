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

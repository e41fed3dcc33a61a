"""The command line: one function a command; everything heavy is imported inside it.

Data goes to standard output, progress and errors to standard error. Exit codes: 0 done,
1 failed, 2 wrong usage.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_sparse.bench_command import bench
from dit_sparse.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    GridOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    PatternTextOption,
    PromptOption,
    PromptsOption,
    SeedOption,
    StepsOption,
    WidthOption,
    grid_of,
    prompts_of,
)
from dit_sparse.search_command import search
from dit_sparse.simulate_command import simulate
from dit_sparse.terminal import (
    output,
    print_choices,
    print_comparison,
    print_picture,
    print_plan,
    progress,
    say,
)

if TYPE_CHECKING:
    from dit_sparse.pipelines.plan import Plan

app = typer.Typer(
    name="dit-sparse",
    help="Training-free sparse attention for video and image diffusion transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: samples/models/moving-shapes.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: samples/plans/moving-shapes-d30.")
    ] = None,
    out: OutOption = Path("out/demo"),
    steps: StepsOption = None,
    json_output: JsonOption = False,
) -> None:
    """Generate the same videos dense and sparse with the sample model, side by side."""
    from dit_sparse.demo import MODEL, PLAN, PROMPTS, missing_sample
    from dit_sparse.demo import demo as run

    model, plan = model or MODEL, plan or PLAN
    reason = missing_sample(model, plan)
    if reason is not None:
        raise ValueError(reason)
    session, loaded = _session(model, steps=steps), _plan(plan)
    with progress("demo", 2 * (1 + len(PROMPTS))) as on_step:
        result = run(session, loaded, out, on_step)
    print_comparison(result.comparison, json_output)
    for path in result.files:
        say(f"wrote {path}")


@app.command()
def generate(
    model: ModelOption,
    out: OutOption,
    prompts: PromptsOption = None,
    prompt: PromptOption = None,
    plan: Annotated[
        str | None, typer.Option(metavar="DIR", help="Plan to run sparse; without it, dense.")
    ] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    guidance: GuidanceOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Generate a folder for every prompt; those that are there already are skipped."""
    from dit_sparse.generate import generate as run

    asked = prompts_of(prompts, prompt)
    loaded = None if plan is None else _plan(plan)
    session = _session(
        model, steps=steps, seed=seed, height=height, width=width, frames=frames,
        guidance=guidance, dtype=dtype, device=device, backend=backend,
    )  # fmt: skip
    rows = []
    with progress("generate", len(asked)) as on_step:
        for outcome in run(
            session.pipe,
            session.model,
            asked,
            session.settings,
            out,
            plan=loaded,
            plan_source=plan,
            on_step=on_step,
        ):
            rows.append(asdict(outcome) | {"folder": str(outcome.folder)})
            took = "" if outcome.seconds is None else f" in {outcome.seconds:.1f} s"
            why = "" if outcome.reason is None else f": {outcome.reason}"
            say(f"{outcome.state}{took}: {outcome.folder}{why}")
    if json_output:
        print(json.dumps({"runs": rows}))
    failed = sum(row["state"] == "failed" for row in rows)
    if failed:
        raise ValueError(f"{failed} of {len(rows)} prompts failed; the reasons stand above")


@app.command()
def compare(
    model: ModelOption,
    out: OutOption,
    plan: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="A plan; may be repeated.")
    ] = None,
    presets: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Published settings: all, everything (with baselines), or adaspa,gna,...",
        ),
    ] = None,
    density: Annotated[
        list[float] | None,
        typer.Option(help="Presets also at this density of the sparse steps; may be repeated."),
    ] = None,
    prompts: PromptsOption = None,
    prompt: PromptOption = None,
    overwrite: OverwriteOption = False,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    guidance: GuidanceOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Measure what plans cost in quality and gain in time against dense attention."""
    from dit_sparse.comparison import compare as run
    from dit_sparse.comparison import write_comparison, write_videos
    from dit_sparse.generate import check
    from dit_sparse.runs import prepare_folder, refuse_existing

    asked = prompts_of(prompts, prompt)
    if not plan and presets is None:
        raise typer.BadParameter("give --plan DIR or --presets NAMES")
    plans = {_name(source): _plan(source) for source in plan or ()}
    if len(plans) < len(plan or ()):
        raise ValueError("two of the plans have the same folder name; rename one")
    refuse_existing(out / "comparison.json", overwrite)
    session = _session(
        model, steps=steps, seed=seed, height=height, width=width, frames=frames,
        guidance=guidance, dtype=dtype, device=device, backend=backend,
    )  # fmt: skip
    if presets is not None:
        from dit_sparse.preset_plans import preset_plans

        found, reasons = preset_plans(presets, density or (), session.pipe, session.settings)
        for name, reason in reasons.items():
            say(f"left out {name}: {reason}")
        plans |= found
    for loaded in plans.values():
        check(session.pipe, session.settings, loaded)
    prepare_folder(out)
    with progress("compare", (1 + len(plans)) * (1 + len(asked))) as on_step:
        comparison = run(
            session.pipe,
            session.model,
            asked,
            session.settings,
            plans,
            on_step=on_step,
            on_videos=lambda prompt, samples: write_videos(
                prepare_folder(out / prompt.id), samples
            ),
        )
    path = write_comparison(out, comparison)
    print_comparison(comparison, json_output)
    say(f"wrote {path}")


@app.command()
def show(
    plan: Annotated[
        str | None, typer.Argument(metavar="PLAN", help="Folder or Hub id of a plan.")
    ] = None,
    pattern: PatternTextOption = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="TxHxW", help="Default: the plan's, or 5x8x8 for a pattern."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option("--figure", "--out", metavar="PNG", help="Default: out/<what is shown>.png"),
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """Print a plan and why its heads run what they run, and draw both; or draw one pattern."""
    from dit_sparse.plan_summary import plan_summary
    from dit_sparse.plots import plot_pattern, plot_plan
    from dit_sparse.runs import prepare_folder

    if (plan is None) == (pattern is None):
        raise typer.BadParameter("give a plan to show, or --pattern TEXT to draw; one of the two")
    if pattern is not None:
        from dit_sparse.kernels.pattern_text import pattern_from_text

        picture = plot_pattern(pattern_from_text(pattern), grid_of(grid or "5x8x8"), figure)
        say(f"wrote {picture['figure']}")
        print_picture(picture, json_output)
        return
    assert plan is not None
    summary = plan_summary(_plan(plan), None if grid is None else grid_of(grid))
    if summary.grid is not None or figure is not None:
        target = figure or Path("out") / f"{_name(plan)}.png"
        prepare_folder(target.parent)
        plot_plan(summary, target)
        say(f"wrote {target}")
    print_plan(summary, json_output)
    if not json_output:
        print_choices(summary)


@app.command()
def transfer(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="Folder or Hub id of a plan.")],
    out: OutOption,
    grid: GridOption = None,
    steps: StepsOption = None,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            help="One searched for the same model on another grid: its evidence decides whether a "
            "head keeps its share of the grid or its number of tokens.",
        ),
    ] = None,
    overwrite: OverwriteOption = False,
    json_output: JsonOption = False,
) -> None:
    """Carry a plan over to another token grid or number of steps, and write it."""
    from dit_sparse.pipelines.transfer import transferred
    from dit_sparse.plan_summary import plan_summary
    from dit_sparse.runs import prepare_folder, refuse_existing
    from dit_sparse.search.elasticity import growths

    if grid is None and steps is None:
        raise typer.BadParameter("give --grid TxHxW, --steps N, or both")
    if grid is None and beside is not None:
        raise typer.BadParameter("--beside is about patterns on another grid; give --grid TxHxW")
    refuse_existing(out / "plan.json", overwrite)
    shape, source = None if grid is None else grid_of(grid), _plan(plan)
    told = None if beside is None else growths(source, _plan(beside))
    carried = transferred(source, grid=shape, steps=steps, growths=told)
    carried.save_pretrained(prepare_folder(out))
    print_plan(plan_summary(carried), json_output)
    for growth, heads in carried.provenance.get("growth", {}).items():
        say(f"{growth}: {heads:.4g} heads")
    say(f"wrote {out}")


@app.command()
def env(json_output: JsonOption = False) -> None:
    """Print machine, versions and backends, to be pasted into an issue."""
    from dit_sparse.environment import backends, calibrations, environment

    values = {**environment(), "backends": backends(), "calibration": calibrations()}
    if json_output:
        print(json.dumps(values))
        return
    from dit_sparse.tables import environment_table

    output().print(environment_table(values))


app.command()(search)
app.command()(simulate)
app.command()(bench)


def main() -> None:
    """Run the command line; what a user can mend is one line on standard error, exit code 1."""
    try:
        app()
    except (ValueError, OSError) as error:
        if _debugging():
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def _debugging() -> bool:
    return os.environ.get("DIT_SPARSE_LOG_LEVEL", "").lower() == "debug"


def _session(model: str | Path, **asked: Any) -> Any:
    from dit_sparse.session import open_session

    return open_session(model, **asked)


def _plan(source: str | Path) -> "Plan":
    from dit_sparse.pipelines.plan import Plan

    return Plan.from_pretrained(source)


def _name(source: str) -> str:
    return Path(source).resolve().name

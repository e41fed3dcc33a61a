"""Command `search`: what is asked on the command line, made into a search and its plan."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_sparse.options import (
    DeviceOption,
    DtypeOption,
    FramesOption,
    GuidanceOption,
    HeightOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    PromptsOption,
    SeedOption,
    StepsOption,
    WidthOption,
    prompts_of,
)
from dit_sparse.terminal import print_plan, progress, say

if TYPE_CHECKING:
    from dit_sparse.pipelines.plan import Plan
    from dit_sparse.search.budget import Budget
    from dit_sparse.session import Session

WORK = "search"
"""Folder in --out that a search under way keeps what it has seen in."""


def search(
    budget: Annotated[
        str,
        typer.Option(
            metavar="NAME=VALUE",
            help="What the plan may spend or must keep: flops=0.3 or density=0.3 (of dense), "
            "error=0.05, speedup=1.5, latency=60 (seconds) or psnr=30 (dB); price=0.01,gate=1 is "
            "Sparse-vDiT's rule; with ,cache_bytes=1e9 no more than that is kept between steps.",
        ),
    ],
    out: OutOption,
    model: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of a diffusers pipeline.")
    ] = None,
    prompts: PromptsOption = None,
    from_plan: Annotated[
        str | None,
        typer.Option("--from", metavar="PLAN", help="Solve this plan's evidence, search nothing."),
    ] = None,
    candidates: Annotated[
        str | None,
        typer.Option(
            metavar="KINDS",
            help="Patterns and remainders to try: skip,band,neighborhood,columns,scored,pooled,"
            "rescale,complement. Default: all.",
        ),
    ] = None,
    dense_first: Annotated[
        int | None,
        typer.Option(min=0, help="First steps that stay dense. Default: the search decides."),
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a query or key block.")] = 64,
    overwrite: OverwriteOption = False,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    guidance: GuidanceOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_output: JsonOption = False,
) -> None:
    """Find pattern and remainder for every head, and a schedule, and write the plan."""
    from dit_sparse.pipelines.plan import Plan
    from dit_sparse.plan_summary import plan_summary
    from dit_sparse.runs import prepare_folder, refuse_existing
    from dit_sparse.search.budget import parse_budget
    from dit_sparse.search.solution import resolve

    limit = parse_budget(budget)
    if from_plan is not None and (model is not None or prompts is not None):
        raise typer.BadParameter("--from solves a plan's evidence; leave --model and --prompts")
    if from_plan is None and model is None:
        raise typer.BadParameter("give --model DIR, or --from PLAN to search nothing")
    refuse_existing(out / "plan.json", overwrite)
    if from_plan is not None:
        found = resolve(Plan.from_pretrained(from_plan), limit)
    else:
        assert model is not None
        from dit_sparse.session import open_session

        asked = prompts_of(prompts, None)
        if any(prompt.seed is not None or prompt.negative_text for prompt in asked):
            say("note: the search uses the prompts alone, not their seeds and negative prompts")
        session = open_session(
            model, steps=steps, seed=seed, height=height, width=width, frames=frames,
            guidance=guidance, dtype=dtype, device=device,
        )  # fmt: skip
        texts = [prompt.text for prompt in asked]
        found = _searched(session, texts, limit, candidates, dense_first, block, out)
    found.save_pretrained(prepare_folder(out))
    shutil.rmtree(out / WORK, ignore_errors=True)
    print_plan(plan_summary(found), json_output)
    say(f"wrote {out}")


def _searched(
    session: "Session",
    prompts: list[str],
    budget: "Budget",
    candidates: str | None,
    dense_first: int | None,
    block: int,
    out: Path,
) -> "Plan":
    """A search with the settings of a session, taken up again where it was killed."""
    from dit_sparse.generate import check
    from dit_sparse.runs import prepare_folder
    from dit_sparse.search.course import schedules
    from dit_sparse.search.driver import search_plan
    from dit_sparse.search.space import KINDS

    settings = session.settings
    check(session.pipe, settings, None)
    kinds = KINDS if candidates is None else [kind.strip() for kind in candidates.split(",")]
    work = prepare_folder(out) / WORK
    with progress("search") as on_step:
        return search_plan(
            session.pipe,
            prompts,
            budget,
            steps=settings.steps,
            seed=settings.seed,
            height=settings.height,
            width=settings.width,
            frames=settings.frames,
            guidance=settings.guidance,
            candidates=kinds,
            schedules=schedules(settings.steps, dense_first),
            block=block,
            work=work,
            progress=on_step,
        )

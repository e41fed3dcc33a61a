"""Search: from a pipeline, a few prompts and a budget to a plan.

    dense runs         ->  error of every candidate on sampled query rows, fresh and stale
    Evidence + Budget  ->  a schedule, and pattern and remainder for each head -> Plan
    sparse videos      ->  the loosest plan that holds a PSNR, if that is the budget,
                           or the one that is as fast as was asked

Errors are taken on the dense trajectory: no layer sees what a sparse one before it got wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dit_sparse.kernels.error import Metric, check_metric
from dit_sparse.kernels.pattern import Columns, Full
from dit_sparse.pipelines.capture import observed_grid
from dit_sparse.pipelines.plan import Plan, layer_paths
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import CLOCKED, Budget
from dit_sparse.search.course import schedules as all_schedules
from dit_sparse.search.course import sightings
from dit_sparse.search.fidelity import CHECKS
from dit_sparse.search.gathering import evidence_of
from dit_sparse.search.generations import Generations
from dit_sparse.search.observer import Scoring
from dit_sparse.search.pace import TRIALS
from dit_sparse.search.record import Record, Seen
from dit_sparse.search.solution import resolve
from dit_sparse.search.space import KINDS, Space, check_kinds, column_counts, patterns, remainders
from dit_sparse.search.timing import StepTimes, Timing
from dit_sparse.search.trials import Trials, faithful, fast, timed, weighed


def search_plan(
    pipe: Any,
    prompts: Sequence[str],
    budget: Budget,
    *,
    steps: int = 20,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    candidates: Collection[str] = KINDS,
    schedules: Sequence[Schedule] | None = None,
    block: int = 64,
    anchors: int = 3,
    rows: int = 64,
    metric: Metric = "relative",
    through_wo: bool = True,
    propagate: bool = False,
    work: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find a schedule, and a pattern and remainder for every head of `pipe`, within `budget`.

    The pipeline generates each prompt dense and is looked at in one of its guidance branches, in
    turn with the other prompts; a single prompt in all of them. It is left as it was, the random
    state included. The same arguments give the same plan, but for the times it takes down, and
    what is solved from them.

    Args:
        pipe (`DiffusionPipeline`): of a known family, with no plan in effect.
        prompts (`Sequence[str]`): one to five that are typical of the use.
        budget (`Budget`): what the plan may spend. For a PSNR the pipeline generates every prompt
            up to six times more; for a speed-up or a latency the first prompt, six times.
        steps (`int`): denoising steps of a generation, as the plan will be used.
        seed (`int`): of the first prompt's noise; the next has the next seed.
        height, width, frames (`int`, *optional*): size in pixels and number of frames; the
            pipeline's defaults if not given.
        guidance (`float`, *optional*): guidance scale; the pipeline's default if not given.
        candidates (`Collection[str]`): kinds of patterns and of remainders that may be tried;
            full and drop always are.
        schedules (`Sequence[Schedule]`, *optional*): those that the plan may have;
            `course.schedules(steps)` if not given.
        block (`int`): tokens of a query block and of a key block.
        anchors (`int`): at how many steps renewals are tried.
        rows (`int`): query rows to sample in each call.
        metric (`str`): of the error, see `kernels.error.pattern_error`.
        through_wo (`bool`): whether errors are taken through the output projection.
        propagate (`bool`): whether to measure how much of the errors of each layer and anchor
            reaches the video, which takes a generation for each of them; see `propagation.py`.
        work (`str | Path`, *optional*): folder that keeps what was seen of each prompt; a search
            that was killed goes on from there with the same arguments, to the same plan.
        progress (`Callable`, *optional*): told (steps done, steps in all) after every step.

    Returns:
        `Plan`: with the evidence, from which `solution.resolve` makes plans for other budgets.

    Raises:
        ValueError: if an argument is out of range, the budget cannot be kept, or the model
            cannot be searched.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: expected a list of at least one prompt, came {prompts!r}")
    check_kinds(candidates)
    check_metric(metric)
    allowed = all_schedules(steps) if schedules is None else tuple(schedules)
    seen_at = sightings(steps, allowed, anchors)
    base = Plan.uniform(pipe, Full(), block=block)
    arguments = {"height": height, "width": width, "num_frames": frames}
    arguments |= {"guidance_scale": guidance}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    grid = replace(observed_grid(pipe, **arguments), valid_text=None)
    counts = column_counts(grid, block) if Columns.kind in candidates else ()
    space = Space(patterns(grid, block, candidates), counts, remainders(candidates))
    settings = {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "seed": seed,
        "steps": steps,
        "arguments": arguments,
        "rows": rows,
        "metric": metric,
        "through_wo": through_wo,
        "candidates": sorted(candidates),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    modules = layer_paths(pipe) if through_wo else None
    scoring = Scoring(modules, grid, block, space, seen_at, rows, metric)
    generated, clocked = budget.psnr is not None, budget.name in CLOCKED
    whole = generated or propagate
    last = steps - 1 if whole else seen_at.last
    total = len(prompts) * (last + 1 + generated * CHECKS * steps)
    total += clocked * 2 * TRIALS * steps
    total += propagate * (len(base.assignment) + len(seen_at.anchors)) * steps
    generations = Generations(pipe, prompts, steps, arguments, seed, total, progress)
    told = settings | {"model": base.digest, "block": block, "last": last, "videos": whole}
    told |= {"sightings": [seen_at.steps, seen_at.anchors, seen_at.ages]}
    record = Record(None if work is None else Path(work), told)
    seen = [
        _see(
            generations,
            record,
            scoring,
            number,
            last,
            decode=whole or not number,
            alternate=len(prompts) > 1,
        )
        for number in range(len(prompts))
    ]
    evidence = evidence_of(base, space, seen_at, allowed, grid, seen)
    settings["costs"] = "block density" if evidence.time is None else "measured"
    searched = replace(
        base,
        grid=grid.shape,
        provenance={"search": evidence.description() | settings},
        evidence=evidence.arrays(),
    )
    if seen[0].run["timing"] is not None:
        searched = timed(searched, Timing(**seen[0].run["timing"]))
    trials = Trials(pipe, generations, [each.video for each in seen if each.video is not None])
    if propagate:
        searched = weighed(searched, trials)
    if generated:
        searched = faithful(searched, budget, trials)
    elif clocked:
        searched = fast(searched, budget, trials)
    else:
        searched = resolve(searched, budget)
    generations.finish()
    return searched


def _see(
    generations: Generations,
    record: Record,
    scoring: Scoring,
    number: int,
    last: int,
    *,
    decode: bool,
    alternate: bool,
) -> Seen:
    """What the generation of one prompt shows, or has shown before."""
    seen = record.load(number)
    if seen is None:
        scoring.begin(number if alternate else None)
        times = StepTimes()
        video = generations.dense(number, last, scoring, times, decode=decode)
        timing = times.dense(generations.steps)
        run = scoring.described() | {
            "seconds_per_call": times.seconds_per_call,
            "timing": None if timing is None else timing.to_dict(),
        }
        seen = Seen(scoring.sums, run, video)
        record.save(number, seen)
    else:
        generations.skip(last + 1)
    scoring.column_mass |= {layer: sums.column_mass for layer, sums in seen.sums.items()}
    return seen

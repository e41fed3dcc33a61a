"""Search: from a pipeline, a few prompts and a budget to a plan.

    short dense runs   ->  which key blocks each head looks at           -> columns
    dense runs         ->  error of every candidate on sampled query rows -> Evidence
    Evidence + Budget  ->  one pattern for each head                      -> Plan

Errors are taken on the dense trajectory: no layer sees what a sparse one before it got wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Columns, Full
from dit_sparse.pipelines.capture import Observer, observe_attention
from dit_sparse.pipelines.plan import Plan, layer_paths
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.columns import column_counts, columns, columns_cost
from dit_sparse.kernels.error import Metric
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.observer import Calibration, Scoring
from dit_sparse.search.space import Candidate, candidates

CALIBRATION_STEPS = 3
CALIBRATION_PROMPTS = 2


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
    schedule: Schedule = Schedule(),
    block: int = 64,
    observe_steps: int = 3,
    rows: int = 128,
    metric: Metric = "relative",
    through_wo: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find a pattern for every head of `pipe` within `budget`.

    The pipeline generates each prompt dense and is looked at during `observe_steps` of its
    steps, in all guidance branches. It is left as it was, the random state included. The same
    arguments give the same plan.

    Args:
        pipe (`DiffusionPipeline`): of a known family, with no plan in effect.
        prompts (`Sequence[str]`): two to five that are typical of the use.
        budget (`Budget`): what the plan may spend.
        steps (`int`): denoising steps of a generation, as the plan will be used.
        seed (`int`): of the first prompt's noise; the next has the next seed.
        height, width, frames (`int`, *optional*): size in pixels and number of frames; the
            pipeline's defaults if not given.
        guidance (`float`, *optional*): guidance scale; the pipeline's default if not given.
        schedule (`Schedule`): the steps that the plan runs dense; they are not looked at.
        block (`int`): tokens of a query block and of a key block.
        observe_steps (`int`): how many of the sparse steps to look at.
        rows (`int`): query rows to sample in each call.
        metric (`str`): of the error, see `kernels.error.pattern_error`.
        through_wo (`bool`): whether errors are taken through the output projection.
        progress (`Callable`, *optional*): told (steps done, steps in all) after every step.

    Returns:
        `Plan`: with the evidence, from which `resolve` makes plans for other budgets.

    Raises:
        ValueError: if an argument is out of range, the budget cannot be kept, or the model
            cannot be searched.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: expected a list of at least one prompt, came {prompts!r}")
    observed = observed_steps(steps, schedule, observe_steps)
    base = Plan.uniform(pipe, Full(), schedule, block=block)
    arguments = {"height": height, "width": width, "num_frames": frames}
    arguments |= {"guidance_scale": guidance}
    arguments = {name: value for name, value in arguments.items() if value is not None}
    short, few = min(CALIBRATION_STEPS, steps), prompts[:CALIBRATION_PROMPTS]
    total = len(few) * short + len(prompts) * (observed[-1] + 1)
    run = _Runs(pipe, arguments, seed, total, progress)

    calibration = Calibration(block, rows)
    run(few, short, short - 1, calibration)
    grid = calibration.grid
    if grid is None:
        raise ValueError("no self-attention call of the pipeline was seen; is it a known family?")

    shared = candidates(grid, block)
    counts = column_counts(grid, block)
    own: dict[str, tuple[tuple[Columns, ...], ...]] = {}
    for layer in base.assignment:
        mass = calibration.mass.of(layer)
        if mass is not None:
            own[layer] = tuple(
                tuple(columns(head, count, grid, block) for count in counts) for head in mass
            )
    patterns = tuple(candidate.pattern for candidate in shared)
    modules = layer_paths(pipe) if through_wo else None
    scoring = Scoring(modules, grid, patterns, own, observed, rows, metric)
    run(prompts, steps, observed[-1], scoring)

    layers = tuple(base.assignment)
    evidence = _evidence(layers, grid, block, shared, counts, own, calibration, scoring)
    settings = {
        "prompts": len(prompts),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "seed": seed,
        "steps": steps,
        "observed_steps": list(observed),
        "arguments": arguments,
        "rows": rows,
        "metric": metric,
        "through_wo": through_wo,
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    provenance = {"search": evidence.description() | settings}
    searched = replace(base, grid=grid.shape, provenance=provenance, evidence=evidence.arrays())
    return resolve(searched, budget)


def resolve(plan: Plan, budget: Budget) -> Plan:
    """The plan for another budget from the evidence of a searched plan, without a search.

    Raises:
        ValueError: if the plan carries no evidence, or the budget cannot be kept.
    """
    assignment, predicted = Evidence.of_plan(plan).solve(budget)
    provenance = plan.provenance | {"budget": str(budget), "predicted": predicted}
    return replace(plan, assignment=assignment, provenance=provenance)


def observed_steps(steps: int, schedule: Schedule, count: int) -> tuple[int, ...]:
    """The steps to look at: the middles of `count` equal parts of the steps that run sparse."""
    sparse = [step for step in range(steps) if not schedule.dense(step, steps)]
    if not sparse:
        raise ValueError(
            f"the schedule keeps {schedule.dense_first} first and {schedule.dense_last} last "
            f"steps dense, so none of {steps} runs sparse; use more steps or fewer dense ones"
        )
    if count < 1:
        raise ValueError(f"observe_steps must be at least 1, came {count}")
    count = min(count, len(sparse))
    return tuple(sparse[(2 * part + 1) * len(sparse) // (2 * count)] for part in range(count))


class _Runs:
    """Dense generations of a pipeline up to a given step, without decoding."""

    def __init__(
        self,
        pipe: Any,
        arguments: dict[str, Any],
        seed: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._pipe = pipe
        self._arguments = arguments
        self._seed = seed
        self._total = total
        self._progress = progress
        self._done = 0

    def __call__(self, prompts: Sequence[str], steps: int, last: int, observer: Observer) -> None:
        def after(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step <= last:
                self._done += 1
                if self._progress is not None:
                    self._progress(self._done, self._total)
            # What follows the last observed step is not needed: diffusers' way to stop a run.
            pipe._interrupt = step >= last
            return tensors

        with observe_attention(self._pipe, observer):
            for number, prompt in enumerate(prompts):
                self._pipe(
                    prompt=prompt,
                    num_inference_steps=steps,
                    generator=torch.Generator("cpu").manual_seed(self._seed + number),
                    output_type="latent",
                    callback_on_step_end=after,
                    **self._arguments,
                )
        self._pipe._interrupt = False


def _evidence(
    layers: Sequence[str],
    grid: TokenGrid,
    block: int,
    shared: Sequence[Candidate],
    counts: tuple[int, ...],
    own: Mapping[str, tuple[tuple[Columns, ...], ...]],
    calibration: Calibration,
    scoring: Scoring,
) -> Evidence:
    """The tables of all layers; a layer without columns has them at infinite cost."""
    errors, costs, masses = [], [], []
    for layer in layers:
        error = scoring.error.of(layer)
        if error is None:
            raise ValueError(
                f"{layer} did not run at the observed steps, so nothing is known about it; "
                "raise observe_steps"
            )
        heads = len(error)
        missing = torch.full((heads, len(counts)), torch.inf)
        common = torch.tensor([candidate.cost for candidate in shared]).expand(heads, -1)
        if layer in own:
            columns_costs = [[columns_cost(p, grid) for p in head] for head in own[layer]]
            costs.append(torch.cat([common, torch.tensor(columns_costs)], -1))
            errors.append(error)
        else:
            costs.append(torch.cat([common, missing], -1))
            errors.append(torch.cat([error, missing], -1))
        mass = calibration.mass.of(layer)
        blocks = -(-grid.video // block)
        masses.append(torch.full((heads, blocks), torch.nan) if mass is None else mass)
    patterns = tuple(candidate.pattern for candidate in shared)
    return Evidence(
        tuple(layers),
        patterns,
        counts,
        grid,
        block,
        torch.stack(errors),
        torch.stack(costs),
        torch.stack(masses),
    )

"""Search: from a pipeline, a few prompts and a budget to a plan.

    short dense runs   ->  which key blocks each head looks at           -> columns
    dense runs         ->  error of every candidate on sampled query rows -> Evidence
    Evidence + Budget  ->  one pattern for each head                      -> Plan
    sparse videos      ->  the loosest plan that holds a PSNR, if that is the budget

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
from torch import Tensor

from dit_sparse.kernels.error import Metric
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Columns, Full
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan, layer_paths
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.budget import Budget
from dit_sparse.search.columns import column_counts, columns, columns_cost
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.fidelity import CHECKS, loosest, mean_psnr
from dit_sparse.search.generations import Generations
from dit_sparse.search.latency import relative_times
from dit_sparse.search.observer import Calibration, Scoring
from dit_sparse.search.solution import solve
from dit_sparse.search.space import Candidate, candidates
from dit_sparse.search.timing import StepTimes, Timing

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
    arguments give the same plan, but for the times it takes down, and what is solved from them.

    Args:
        pipe (`DiffusionPipeline`): of a known family, with no plan in effect.
        prompts (`Sequence[str]`): two to five that are typical of the use.
        budget (`Budget`): what the plan may spend. For a PSNR the pipeline generates every prompt
            up to six times more.
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
    generated = budget.psnr is not None
    last = steps - 1 if generated else observed[-1]
    total = len(few) * short + len(prompts) * (last + 1 + generated * CHECKS * steps)
    generations = Generations(pipe, arguments, seed, total, progress)

    calibration = Calibration(block, rows)
    generations.dense(few, short, short - 1, calibration)
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
    times = StepTimes()
    references = generations.dense(prompts, steps, last, scoring, times=times, keep=generated)

    layers = tuple(base.assignment)
    evidence = _evidence(layers, grid, block, shared, counts, own, calibration, scoring)
    evidence = replace(evidence, time=_times(evidence, scoring.query, times.seconds_per_call))
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
        "costs": "block density" if evidence.time is None else "measured",
        "versions": {name: version(name) for name in ("torch", "diffusers")},
    }
    provenance = {"search": evidence.description() | settings}
    measured = times.to_dict(steps)
    searched = replace(
        base,
        grid=grid.shape,
        provenance=provenance,
        evidence=evidence.arrays(),
        timing={} if measured is None else {"dense": measured},
    )
    if budget.psnr is None:
        return resolve(searched, budget)

    def compare(density: float) -> tuple[float, float]:
        plan = resolve(searched, Budget(density=density))
        with enable_sparse_attention(pipe, plan):
            videos = generations.sparse(prompts, steps)
        return plan.predicted["density"], mean_psnr(references, videos)

    found = loosest(compare, budget.psnr, evidence.cost.amin(-1).double().mean().item())
    generations.finish()
    held = resolve(searched, Budget(density=found.density))
    achieved = {"psnr": found.psnr, "checks": [list(check) for check in found.checks]}
    provenance = held.provenance | {"budget": str(budget), "achieved": achieved}
    return replace(held, provenance=provenance)


def resolve(plan: Plan, budget: Budget) -> Plan:
    """The plan for another budget from the evidence of a searched plan, without a search.

    Raises:
        ValueError: if the plan carries no evidence, the budget cannot be kept, or it is a PSNR,
            which needs the pipeline.
    """
    evidence = Evidence.of_plan(plan)
    solution = solve(evidence, budget, Timing.of_plan(plan))
    provenance = plan.provenance | {"budget": str(budget), "predicted": solution.predicted}
    provenance.pop("achieved", None)
    return replace(
        plan,
        assignment=evidence.assignment(solution.chosen),
        provenance=provenance,
        timing=plan.timing | {"predicted": solution.times},
    )


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


def _times(evidence: Evidence, query: Tensor | None, dense_seconds: float | None) -> Tensor | None:
    """Measured times of all candidates, shaped as their costs; `None` if none were measured.

    Columns of one count are priced by the first head's: how many blocks they keep decides.
    """
    if query is None or not dense_seconds:
        return None
    shared = len(evidence.patterns)
    known = evidence.cost.isfinite()
    layer = int(known[:, 0].sum(-1).argmax())
    candidates = range(int(known[layer, 0].sum()))
    patterns = [evidence.pattern(layer, 0, candidate) for candidate in candidates]
    times = relative_times(patterns, evidence.grid, evidence.block, query, dense_seconds)
    if times is None:
        return None
    missing = (torch.inf,) * (shared + len(evidence.column_counts) - len(times))
    table = torch.tensor(times + missing).expand_as(evidence.cost)
    return table.masked_fill(~known, torch.inf)


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

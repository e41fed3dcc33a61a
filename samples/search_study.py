"""SearchStudy: what a searched plan is worth beside presets and random plans of equal FLOPs, and
how well its errors predict the quality of videos."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torchmetrics.functional import spearman_corrcoef

from dit_sparse.comparison import Comparison
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Choice, Columns, Full, Neighborhood, Skip
from dit_sparse.kernels.remainder import Drop, Pooled
from dit_sparse.kernels.scaling import at_density
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.presets import COMBINATIONS, COMPARED, PRESETS
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.baselines import best_uniform, random_assignment
from dit_sparse.search.budget import Budget
from dit_sparse.search.course import Keeping, courses
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.solution import resolve, solution_of, solve
from dit_sparse.search.space import Candidate, search_cost
from dit_sparse.settings import Settings

SHARES = (0.3, 0.2, 0.1)
"""Attention FLOPs of a whole generation, of dense, at which plans are compared."""

RANDOM_PLANS = 50

PRICES = 30
"""Bisections of a price."""

LEFT_OUT = ("sparse-vdit", "svg2", "sparge", "radial", "oracle", "mass-each-step", "sparsed")
LEFT_OUT += ("asa-repo", "asa-g")
"""Of the first no density can be asked, its rule stands in its place; SVG2 finds its own;
SpargeAttn, Radial and ASA-G cannot compute so little here; the next two are no methods; SparseD
differs from AdaSpa at its own schedule alone, ASA's code from its paper at its own density."""

MODES = (Full, Skip, Band, Columns)
"""Of Sparse-vDiT."""

STATIC = (Skip, Band, Neighborhood)
"""What is known before denoising, and has means of the rest."""


def rivals(pipe: Any, searched: Plan, settings: Settings) -> dict[str, Plan]:
    """Plans that compute equal shares of a dense generation's attention: searched, of random
    candidates under the same schedule, the best of one pattern for all heads, of Sparse-vDiT's
    rule, and every preset.

    A preset spends half of the share on dense first steps, and the rest on sparse ones.
    """
    plans: dict[str, Plan] = {}
    for share in SHARES:
        own = resolve(searched, Budget(flops=share))
        plans[f"searched@{share:g}"] = own
        evidence = Evidence.of_plan(own)
        drawn = random_assignment(evidence.tables(own.schedule), share, seed=0)
        by_lot = evidence.planned(own, drawn, own.schedule)
        plans[f"random candidates@{share:g}"] = replace(by_lot, evidence={})
        plans[f"uniform@{share:g}"] = uniform_plan(own)
        plans[f"rule of sparse-vdit@{share:g}"] = by_rule(own)
        for name in PRESETS | COMBINATIONS:
            plan = None if name in LEFT_OUT else preset_at(name, share, pipe, own, settings)
            if plan is not None:
                plans[f"{name}@{share:g}"] = plan
    return plans


def uniform_plan(searched: Plan) -> Plan:
    """The one pattern for all heads and steps, its other pairs dropped, of least error within the
    FLOPs of a searched plan, under the schedule that suits it best."""
    evidence = Evidence.of_plan(searched)
    space = evidence.space
    shared = range(0, len(space.patterns) * len(space.remainders), len(space.remainders))
    found: list[tuple[float, Plan]] = []
    for schedule in evidence.schedules:
        tables = evidence.tables(schedule)
        flops = searched.predicted["flops"]
        if schedule.phases or tables.flops[:, 0, shared].mean(0).min() > flops:
            continue
        number = best_uniform(tables, flops, shared)
        error = solution_of(evidence, number, schedule).predicted["error"]
        found.append((error, evidence.planned(searched, number, schedule)))
    plan = min(found, key=lambda each: each[0])[1]
    name = str(next(iter(plan.assignment.values()))[0])
    return replace(plan, evidence={}, provenance={"uniform": name})


def static_plan(searched: Plan, density: float) -> Plan:
    """The best assignment of patterns that are known beforehand, whose other pairs are seen as
    means; at a density and with the dense steps at which presets are compared."""
    evidence = Evidence.of_plan(searched)
    schedule = Schedule(dense_first=round(COMPARED * evidence.sightings.steps))

    def static(own: Candidate) -> bool:
        pooled = isinstance(own.pattern, STATIC) and isinstance(own.remainder, Pooled)
        return pooled or own.pattern == Full()

    chosen = solve(_only(evidence, static, schedule), Budget(density=density)).chosen
    plan = evidence.planned(searched, chosen, schedule)
    return replace(plan, evidence={}, provenance={"static": density})


def by_rule(searched: Plan) -> Plan:
    """What Sparse-vDiT's rule makes of the evidence of a searched plan, with the modes that the
    paper has and the least price that keeps to the FLOPs of that plan, of which, as with presets,
    half is spent on dense first steps."""
    evidence = Evidence.of_plan(searched)
    share, steps = searched.predicted["flops"], evidence.sightings.steps
    schedule = Schedule(dense_first=max(1, round(share * steps / 2)))

    def mode(own: Candidate) -> bool:
        return isinstance(own.pattern, MODES) and own.remainder == Drop()

    own = _only(evidence, mode, schedule)
    low, high = -30.0, 10.0
    for _ in range(PRICES):
        middle = (low + high) / 2
        spent = solve(own, Budget(price=2**middle)).predicted["flops"]
        low, high = (middle, high) if spent > share else (low, middle)
    chosen = solve(own, Budget(price=2**high)).chosen
    plan = evidence.planned(searched, chosen, schedule)
    return replace(plan, evidence={}, provenance={"rule": f"price={2**high:.3g}"})


def _only(evidence: Evidence, keeps: Callable[[Candidate], bool], schedule: Schedule) -> Evidence:
    """The evidence without the other candidates, and under this schedule alone."""
    numbers = range(evidence.density.shape[-1])
    kept = torch.tensor([keeps(evidence.candidate(0, 0, number)) for number in numbers])
    error = evidence.error.masked_fill(~kept[:, None, None], torch.inf)
    return replace(evidence, error=error, schedules=(schedule,))


def preset_at(name: str, share: float, pipe: Any, like: Plan, settings: Settings) -> Plan | None:
    """A preset that computes `share` of a dense generation's attention; `None` if it cannot."""
    assert like.grid is not None
    grid, steps = TokenGrid(*like.grid), settings.steps
    preset = (PRESETS | COMBINATIONS)[name].fitted(grid, steps, None)
    pattern, remainder = preset.pattern, preset.remainder
    first = max(1, round(share * steps / 2))
    schedule = replace(preset.schedule, dense_first=first, dense_last=0)
    (path,) = courses(Keeping.of(pattern, remainder), schedule, steps)
    search = 0.0 if isinstance(pattern, Choice) else search_cost(pattern, preset.block)
    density = (share * steps - path.dense - path.searches * search) / max(1, path.sparse)
    least = 0.5**remainder.level if isinstance(remainder, Pooled) else 0.0
    density = (density - least) / (1 - least)
    if density < 0.02:
        return None
    try:
        sized = at_density(pattern, density, grid, preset.block)
    except ValueError:
        return None
    return Plan.uniform(pipe, sized, schedule, remainder, grid=like.grid, block=preset.block)


def random_plans(searched: Plan, seed: int = 0) -> dict[str, Plan]:
    """Plans of all qualities: at a random share of FLOPs and schedule, each head takes what the
    search would give it or, with a probability drawn for the plan, a candidate drawn by lot."""
    evidence, rng = Evidence.of_plan(searched), random.Random(seed)
    plans: dict[str, Plan] = {}
    while len(plans) < RANDOM_PLANS:
        share, lots = rng.uniform(0.1, 0.7), rng.random()
        schedule = rng.choice(evidence.schedules)
        tables = evidence.tables(schedule)
        if tables.flops.amin(-1).mean().item() > share:
            continue
        chosen = solve(replace(evidence, schedules=(schedule,)), Budget(flops=share)).chosen
        drawn = random_assignment(tables, share, rng.randrange(2**31))
        lot = torch.tensor([[rng.random() < lots for _ in row] for row in chosen])
        mixed = torch.where(lot, drawn, chosen)
        plans[f"plan {len(plans)}"] = replace(
            evidence.planned(searched, mixed, schedule),
            provenance={"predicted": solution_of(evidence, mixed, schedule).predicted},
            evidence={},
        )
    return plans


def rank_correlation(plans: Mapping[str, Plan], result: Comparison) -> tuple[float, Figure]:
    """Spearman's correlation of predicted errors with measured distances, and both drawn."""
    errors = torch.tensor([plans[each.name].predicted["error"] for each in result.plans])
    decibels = torch.tensor([each.psnr_rgb.mean for each in result.plans])
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.scatter(errors, decibels, s=12, color="#1f5a8c")
    axes.set_xscale("log")
    axes.set_xlabel("predicted error")
    axes.set_ylabel("measured PSNR, dB")
    return spearman_corrcoef(-errors, decibels).item(), figure

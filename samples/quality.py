"""What plans cost in quality: searched plans beside the best uniform pattern, on held-out prompts.

    python samples/quality.py search      # once: samples/plans/moving-shapes-d50, -d30, -d20
    python samples/quality.py compare     # samples/quality/comparison.json and table.md
    python samples/quality.py presets     # the same in samples/quality/presets/
    python samples/quality.py caches      # the same in samples/quality/caches/

One search serves all densities. A uniform plan runs one pattern on every head; of all candidates
of the search within the density, the one of least total error is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cache_study
from dit_sparse.comparison import Comparison, PlanResult, compare, write_comparison
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.preset_plans import preset_plans
from dit_sparse.prompts import read_prompts
from dit_sparse.search.baselines import best_uniform
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import resolve, search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.session import Session, open_session

SAMPLES = Path(__file__).parent
MODEL = SAMPLES / "models" / "moving-shapes"
PLANS = SAMPLES / "plans"
RESULTS = SAMPLES / "quality"
DENSITIES = (0.5, 0.3, 0.2)
PRESET_DENSITIES = (0.5, 0.3, 0.2, 0.1)
PRESET_PROMPTS = CACHE_PROMPTS = 1
SCHEDULE = Schedule(dense_first=4)
"""A fifth of the sample model's 20 steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    works = {"search": search, "compare": measure, "presets": presets, "caches": caches}
    parser.add_argument("what", choices=works)
    works[parser.parse_args().what]()


def search() -> None:
    """Search once and write a plan for every density."""
    session = open_session(MODEL)
    settings = session.settings
    plan = search_plan(
        session.pipe,
        [prompt.text for prompt in read_prompts(SAMPLES / "prompts" / "search.txt")],
        Budget(density=DENSITIES[0]),
        steps=settings.steps,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
        guidance=settings.guidance,
        schedule=SCHEDULE,
        progress=lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr),
    )
    for density in DENSITIES:
        resolve(plan, Budget(density=density)).save_pretrained(PLANS / plan_name(density))


def measure() -> None:
    """Run the comparison and write its table."""
    plans: dict[str, Plan] = {}
    for density in DENSITIES:
        searched = Plan.from_pretrained(PLANS / plan_name(density))
        plans[f"searched {density:.0%}"] = searched
        evidence = Evidence.of_plan(searched)
        heads = evidence.assignment(best_uniform(evidence, density))
        pattern = next(iter(heads.values()))[0]
        plans[f"uniform {density:.0%}, {pattern}"] = replace(
            searched, assignment=heads, evidence={}
        )
    _compare(open_session(MODEL), plans, None, RESULTS, table)


def presets() -> None:
    """Every published setting, the baselines and combinations, and the searched plans beside them:
    as published, and at common densities of the sparse steps with common dense steps."""
    session = open_session(MODEL)
    plans, reasons = preset_plans("everything", PRESET_DENSITIES, session.pipe, session.settings)
    for density in DENSITIES:
        plans[f"searched@{density:g}"] = Plan.from_pretrained(PLANS / plan_name(density))
    _compare(
        session,
        plans,
        PRESET_PROMPTS,
        RESULTS / "presets",
        lambda result: presets_table(result, reasons),
    )


def caches() -> None:
    """What caches of remainders cost in FLOPs and bytes, and what they are worth."""
    session = open_session(MODEL)
    plans = cache_study.plans(session.pipe, session.settings)
    _compare(session, plans, CACHE_PROMPTS, RESULTS / "caches", caches_table)


def _compare(
    session: Session,
    plans: dict[str, Plan],
    prompts: int | None,
    folder: Path,
    table: Callable[[Comparison], str],
) -> None:
    """Run plans on the first held-out prompts, and write what came out and its table."""
    held_out = read_prompts(SAMPLES / "prompts" / "held-out.txt")[:prompts]
    result = compare(
        session.pipe, "samples/models/moving-shapes", held_out, session.settings, plans
    )
    folder.mkdir(exist_ok=True)
    write_comparison(folder, result)
    (folder / "table.md").write_text(table(result))


def presets_table(result: Comparison, reasons: dict[str, str]) -> str:
    """What the presets compute, keep and lose, as a Markdown table; the best first."""
    lines = [
        "| plan | element | block | weighted | FLOPs | cache MB | PSNR dB | SSIM | search "
        "| rest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {plan.name} | "
            + " | ".join(f"{plan.density[kind]:.3f}" for kind in ("element", "block", "weighted"))
            + f" | {plan.flops:.3f} | {plan.cache_bytes / 1e6:.1f} | {plan.psnr_rgb.mean:.2f} "
            f"| {plan.ssim.mean:.4f} | {_stage(plan, 'search')} | {_stage(plan, 'remainder')} |"
            for plan in sorted(result.plans, key=lambda plan: (_asked(plan), -plan.psnr_rgb.mean))
        ),
        "",
        "Densities and FLOPs over all self-attention calls, dense steps as 1; FLOPs with searches "
        "and caches. search, rest: seconds of finding blocks and of remainders, relative to those "
        f"of the attention in sparse steps. {_conditions(result)}",
        *(f"Left out: {name}: {reason}." for name, reason in reasons.items()),
    ]
    return "\n".join(lines) + "\n"


def caches_table(result: Comparison) -> str:
    """What caches cost and are worth, as a Markdown table with what follows from it."""
    lines = [
        *cache_study.table(result),
        "FLOPs of all self-attention calls, searches and caches included, in those of dense "
        "attention; cache MB with the LSEs kept for searches, all layers and guidance branches "
        "together. Blocks of adaspa are found anew whenever caches are; "
        f"the first quarter of the steps is dense. {_conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


def _asked(plan: PlanResult) -> float:
    """Minus the density that was asked for, so that published settings come first."""
    _, at, density = plan.name.partition("@")
    return -float(density) if at else -2.0


def _stage(plan: PlanResult, name: str) -> str:
    attention = plan.stages.get("attention", 0.0)
    return f"{plan.stages.get(name, 0.0) / attention:.1%}" if attention else "-"


def table(result: Comparison) -> str:
    """The comparison as a Markdown table with machine, versions and revision."""
    lines = [
        "| plan | block density | PSNR dB | worst | SSIM | speed-up | low – high |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(plan) for plan in result.plans),
        "",
        f"Dense {result.dense.seconds.median:.1f} s. Block density over all self-attention calls, "
        f"the dense first steps as 1. {_conditions(result)}",
    ]
    return "\n".join(lines) + "\n"


def _conditions(result: Comparison) -> str:
    """Under which a comparison was made."""
    environment, count = result.environment, len(result.prompts)
    machine, packages = environment["machine"], environment["packages"]
    return (
        f"{count} held-out prompt{'s' * (count > 1)}, {result.settings.steps} steps, "
        f"{result.settings.dtype}. {machine['processor']}, {machine['cores']} cores, torch "
        f"{packages['torch']}, diffusers {packages['diffusers']}, revision "
        f"{environment['revision']}."
    )


def plan_name(density: float) -> str:
    return f"moving-shapes-d{density * 100:.0f}"


def _row(plan: PlanResult) -> str:
    speed = plan.speedup
    return (
        f"| {plan.name} | {plan.density['block']:.3f} | {plan.psnr_rgb.mean:.2f} "
        f"| {plan.psnr_rgb.worst:.2f} | {plan.ssim.mean:.4f} | {speed.median:.2f} "
        f"| {speed.low:.2f} – {speed.high:.2f} |"
    )


if __name__ == "__main__":
    main()

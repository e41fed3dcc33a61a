"""What plans cost in quality: searched plans beside the best uniform pattern, on held-out prompts.

    python samples/quality.py search      # once: samples/plans/moving-shapes-d50, -d30, -d20
    python samples/quality.py compare     # samples/quality/comparison.json and table.md

One search serves all densities. A uniform plan runs one pattern on every head; of all candidates
of the search within the density, the one of least total error is taken.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dit_sparse.comparison import Comparison, PlanResult, compare, write_comparison
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.prompts import read_prompts
from dit_sparse.search.baselines import best_uniform
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import resolve, search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.session import open_session

SAMPLES = Path(__file__).parent
MODEL = SAMPLES / "models" / "moving-shapes"
PLANS = SAMPLES / "plans"
RESULTS = SAMPLES / "quality"
DENSITIES = (0.5, 0.3, 0.2)
SCHEDULE = Schedule(dense_first=4)
"""A fifth of the sample model's 20 steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("search", "compare"))
    {"search": search, "compare": measure}[parser.parse_args().what]()


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
    session = open_session(MODEL)
    prompts = read_prompts(SAMPLES / "prompts" / "held-out.txt")
    result = compare(
        session.pipe, "samples/models/moving-shapes", prompts, session.settings, plans
    )
    RESULTS.mkdir(exist_ok=True)
    write_comparison(RESULTS, result)
    (RESULTS / "table.md").write_text(table(result))


def table(result: Comparison) -> str:
    """The comparison as a Markdown table with machine, versions and revision."""
    environment = result.environment
    machine, packages = environment["machine"], environment["packages"]
    lines = [
        "| plan | block density | PSNR dB | worst | SSIM | speed-up | low – high |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(_row(plan) for plan in result.plans),
        "",
        f"{len(result.prompts)} held-out prompts, {result.settings.steps} steps, "
        f"{result.settings.dtype}, dense {result.dense.seconds.median:.1f} s. Block density over "
        "all self-attention calls, the dense first steps as 1. "
        f"{machine['processor']}, {machine['cores']} cores, torch {packages['torch']}, diffusers "
        f"{packages['diffusers']}, revision {environment['revision']}.",
    ]
    return "\n".join(lines) + "\n"


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

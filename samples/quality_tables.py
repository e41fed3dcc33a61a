"""Tables: what comparisons of plans came to, as Markdown with machine, versions and revision."""

from __future__ import annotations

from collections.abc import Sequence

import search_study

import cache_study
from dit_sparse.comparison import Comparison, PlanResult
from dit_sparse.pipelines.plan import Plan


def presets_table(results: Sequence[Comparison], reasons: dict[str, str]) -> str:
    """What the presets compute, keep and lose, as a Markdown table; the best first."""
    plans = [plan for result in results for plan in result.plans]
    conditions = dict.fromkeys(map(_conditions, results))
    lines = [
        "| plan | element | block | weighted | FLOPs | cache MB | PSNR dB | SSIM | search "
        "| rest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {plan.name} | "
            + " | ".join(f"{plan.density[kind]:.3f}" for kind in ("element", "block", "weighted"))
            + f" | {plan.flops:.3f} | {plan.cache_bytes / 1e6:.1f} | {plan.psnr_rgb.mean:.2f} "
            f"| {plan.ssim.mean:.4f} | {_stage(plan, 'search')} | {_stage(plan, 'remainder')} |"
            for plan in sorted(plans, key=lambda plan: (_asked(plan), -plan.psnr_rgb.mean))
        ),
        "",
        "Densities and FLOPs over all self-attention calls, dense steps as 1; FLOPs with searches "
        "and caches. search, rest: seconds of finding blocks and of remainders, relative to those "
        f"of the attention in sparse steps. {' '.join(conditions)}",
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


def rank_note(result: Comparison, plans: dict[str, Plan]) -> str:
    """Spearman's correlation, in words."""
    correlation, _ = search_study.rank_correlation(plans, result)
    return (
        f"Spearman's correlation of predicted error and PSNR over {len(plans)} random plans: "
        f"{correlation:.3f}. {_conditions(result)}\n"
    )


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
        "| plan | FLOPs | cache MB | PSNR dB | worst | SSIM | speed-up | low – high |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(_row(plan) for plan in result.plans),
        "",
        f"Dense {result.dense.seconds.median:.1f} s. FLOPs of all self-attention calls, dense "
        "steps, searches and caches included, in those of dense attention. "
        f"{_conditions(result)}",
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


def _row(plan: PlanResult) -> str:
    speed = plan.speedup
    return (
        f"| {plan.name} | {plan.flops:.3f} | {plan.cache_bytes / 1e6:.1f} "
        f"| {plan.psnr_rgb.mean:.2f} | {plan.psnr_rgb.worst:.2f} | {plan.ssim.mean:.4f} "
        f"| {speed.median:.2f} | {speed.low:.2f} – {speed.high:.2f} |"
    )

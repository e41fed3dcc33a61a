"""CacheStudy: what the caches of a remainder cost in FLOPs and bytes, and what they are worth.

Every setting lists the same share of blocks; what differs is what becomes of the others, how
often that is taken anew, whether all layers do so at one step, and which heads do at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from dit_sparse.comparison import Comparison, PlanResult
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Neighborhood, Pattern
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.pipelines.capture import observed_grid
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.presets import COMBINATIONS, PRESETS, Preset
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.settings import Settings

Where = Literal[
    "all heads",
    "first half of the layers",
    "second half of the layers",
    "first head of each layer",
    "half of the bytes",
]
"""Which heads keep a cache; for half of the bytes, those that lose most without."""

PATTERNS: dict[str, Pattern] = {
    "adaspa": PRESETS["adaspa"].pattern,
    "neighborhood": Neighborhood((5, 8, 8), (1, 4, 4)),
    "oracle": COMBINATIONS["oracle"].pattern,
}
"""What all heads have, of whatever size is asked."""

STUDIED = ("adaspa", "neighborhood")
LEAN, AMPLE = 0.1, 0.25
PERIODS = (3, 5, 8, 16)
"""Steps from one renewal to the next; with 16 there is none after the first."""

USUAL = 5
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Setting:
    """One plan of the study.

    Args:
        pattern: one of `PATTERNS`.
        remainder: of the heads in `where`; the others drop.
        density: block density of the sparse steps, pooled blocks counted as what they compute;
            windows come as near to it as they can.
        period: steps from one renewal to the next.
        stagger: whether layers renew in turn.
        where: the heads with that remainder.
    """

    pattern: str
    remainder: Remainder
    density: float = LEAN
    period: int = USUAL
    stagger: bool = False
    where: Where = "all heads"

    @property
    def name(self) -> str:
        """The setting in words, as the comparison calls it."""
        turns = " in turn" if self.stagger else ""
        return (
            f"{self.pattern}@{self.density:g} {self.remainder}, every {self.period}{turns}, "
            f"{self.where}"
        )

    def plan(self, pipe: Any, grid: TokenGrid, steps: int) -> Plan:
        """The plan for a pipeline, its token grid and number of steps."""
        schedule = Schedule(renew_every=self.period, stagger=self.stagger)
        pattern = PATTERNS[self.pattern]
        preset = Preset(self.name, grid, steps, pattern, schedule, self.remainder, block=BLOCK)
        fitted = preset.fitted(grid, steps, self.density)
        plan = Plan.uniform(
            pipe, fitted.pattern, fitted.schedule, fitted.remainder, grid=grid.shape, block=BLOCK
        )
        return _restricted(plan, self.where, grid)


def settings() -> tuple[Setting, ...]:
    """All that are measured."""
    cached = (Rescale(), Complement(), Complement("float8"))
    every: list[Setting] = []
    for pattern in STUDIED:
        lean = Setting(pattern, Complement())
        every += [replace(lean, remainder=rest) for rest in (Drop(), Pooled(5), *cached)]
        every += [replace(lean, period=period) for period in PERIODS]
        every += [replace(lean, period=period, stagger=True) for period in PERIODS[:-1]]
        every += [replace(lean, where=where) for where in get_args(Where)]
        ample = replace(lean, density=AMPLE)
        every += [replace(ample, remainder=rest) for rest in (Drop(), Pooled(5), Complement())]
    every.append(Setting("oracle", Drop(), period=1))
    return tuple(dict.fromkeys(every))


def plans(pipe: Any, asked: Settings) -> dict[str, Plan]:
    """The plans of the study by their names."""
    grid = observed_grid(
        pipe,
        height=asked.height,
        width=asked.width,
        num_frames=asked.frames,
        guidance_scale=asked.guidance,
    )
    return {setting.name: setting.plan(pipe, grid, asked.steps) for setting in settings()}


def table(result: Comparison) -> list[str]:
    """PSNR, FLOPs and bytes of every setting as lines of Markdown, and what follows from them."""
    found = {plan.name: plan for plan in result.plans}
    rows = [(setting, found[setting.name]) for setting in settings()]
    rows.sort(key=lambda row: (row[0].pattern, -row[0].density, row[1].flops))
    return [
        "| blocks | the others | on | renewed every | FLOPs | cache MB | PSNR dB | SSIM |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        *(_row(setting, plan) for setting, plan in rows),
        "",
        *(f"* {_finding(pattern, found)}" for pattern in STUDIED),
        "",
    ]


def _restricted(plan: Plan, where: Where, grid: TokenGrid) -> Plan:
    """With the remainder on some heads only."""
    layers = list(plan.remainders)
    half = len(layers) // 2
    match where:
        case "all heads":
            return plan
        case "half of the bytes":
            # Each of the two guidance branches would keep as much.
            return replace(plan, cache_limit=plan.cache_bytes(grid))
        case "first head of each layer":
            some = {
                layer: (rest[0], *(Drop(),) * (len(rest) - 1))
                for layer, rest in plan.remainders.items()
            }
        case _:
            kept = layers[:half] if where == "first half of the layers" else layers[half:]
            some = {layer: plan.remainders[layer] for layer in kept}
    return replace(plan, remainders=some)


def _row(setting: Setting, plan: PlanResult) -> str:
    renewed = f"{setting.period}{', in turn' if setting.stagger else ''}"
    where = setting.where if setting.remainder != Drop() else ""
    return (
        f"| {setting.pattern} {setting.density:g} | {setting.remainder} | {where} | {renewed} "
        f"| {plan.flops:.3f} | {plan.cache_bytes / 1e6:.1f} | {plan.psnr_rgb.mean:.2f} "
        f"| {plan.ssim.mean:.4f} |"
    )


def _finding(pattern: str, found: dict[str, PlanResult]) -> str:
    """How rarely and how partially the complement pays, read off the figures."""
    usual = Setting(pattern, Complement())
    dropped = found[replace(usual, remainder=Drop()).name]

    def gain(setting: Setting) -> float:
        return found[setting.name].psnr_rgb.mean - dropped.psnr_rgb.mean

    def turned(period: int) -> float:
        together = replace(usual, period=period)
        return gain(replace(together, stagger=True)) - gain(together)

    small = replace(usual, remainder=Complement("float8"))
    share = found[small.name].cache_bytes / found[usual.name].cache_bytes
    rarely = ", ".join(
        f"{gain(replace(usual, period=period)):+.2f} dB every {period} steps for "
        f"{found[replace(usual, period=period).name].flops - dropped.flops:+.3f} FLOPs"
        for period in reversed(PERIODS)
    )
    partially = ", ".join(
        f"{gain(replace(usual, where=where)):+.2f} dB on {where}" for where in get_args(Where)
    )
    in_turn = ", ".join(f"{turned(period):+.2f} dB every {period}" for period in PERIODS[:-1])
    return (
        f"{pattern} {LEAN:g}, beside dropping ({dropped.psnr_rgb.mean:.2f} dB, FLOPs "
        f"{dropped.flops:.3f}). The complement is worth {rarely}. At {USUAL} steps: {partially}; "
        f"in float8 {gain(small):+.2f} dB with {share:.0%} of the bytes. Layers in turn instead "
        f"of together: {in_turn}."
    )

"""ShareStudy: what finding blocks and merging remainders take beside the sparse attention itself.

Every preset as it was published, on the native CPU kernel; seconds are those of the hook's own
stopwatch. Beside them stand the bars that each kind of preset is held to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_sparse.generate import check, sample
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.remainder import Complement
from dit_sparse.kernels.score import Mass, Means, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.presets import COMBINATIONS, PRESETS
from dit_sparse.preset_plans import preset_plans
from dit_sparse.prompts import Prompt
from dit_sparse.session import Session

NAMES = (*PRESETS, "adaspa+complement", "adaspa+pooled", "gna+complement", "gna+pooled")
BACKEND = "native"

MOST_SEARCHED = 0.05
"""Searches by exact mass, of the seconds of the whole generation."""

MOST_SCORED = 0.03
"""Scores of means and of samples, of the seconds of the sparse attention."""

MOST_MERGED = 0.10
"""Taking and merging a complement, of the seconds of the sparse attention."""

MOST_OFF = 0.05
"""Bytes that caches held at most, off what the plan predicted."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one generation of a preset took.

    Args:
        seconds: of the whole pipeline call.
        attention: seconds of attention in sparse calls and renewals, dense passes included.
        search: seconds of scoring and selecting.
        remainder: seconds of taking caches and of merging them.
        cache_bytes: most that was kept between steps.
        predicted_bytes: what the plan said that would be.
    """

    preset: str
    seconds: float
    attention: float
    search: float
    remainder: float
    cache_bytes: int
    predicted_bytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A share and the most that it may be."""

    what: str
    share: float
    most: float

    @property
    def kept(self) -> bool:
        """Whether it is no more."""
        return self.share <= self.most

    def __str__(self) -> str:
        verdict = "of" if self.kept else "**over**"
        return f"{self.what} {self.share:.1%} {verdict} {self.most:.0%}"


def measure(session: Session, prompt: Prompt) -> Iterator[Share]:
    """Each preset in turn, after a short run that makes the lists that stay the same."""
    settings = replace(session.settings, backend=BACKEND)
    plans, _ = preset_plans(",".join(NAMES), (), session.pipe, settings)
    branches = 2 if settings.guidance > 1 else 1
    for name, plan in plans.items():
        check(session.pipe, settings, plan)
        short = replace(settings, steps=min(plan.schedule.dense_first + 2, settings.steps))
        with enable_sparse_attention(session.pipe, plan, backend=BACKEND) as hook:
            sample(session.pipe, prompt, settings.seed, short)
            made = sample(session.pipe, prompt, settings.seed, settings)
            report = hook.report()
        yield Share(
            preset=name,
            seconds=made.seconds,
            attention=report.stages.get("attention", 0.0),
            search=report.stages.get("search", 0.0),
            remainder=report.stages.get("remainder", 0.0),
            cache_bytes=report.cache_bytes,
            predicted_bytes=branches * plan.cache_bytes(_grid(plan)),
        )


def bars(share: Share) -> tuple[Bar, ...]:
    """What the preset is held to; nothing for one that neither scores nor keeps."""
    preset = (PRESETS | COMBINATIONS)[share.preset]
    score = preset.pattern.score if isinstance(preset.pattern, Scored) else None
    found = []
    if isinstance(score, Mass):
        found.append(Bar("searches", share.search / share.seconds, MOST_SEARCHED))
    if isinstance(score, Means | Sampled):
        found.append(Bar("scores", share.search / share.attention, MOST_SCORED))
    if isinstance(preset.remainder, Complement):
        found.append(Bar("complement", share.remainder / share.attention, MOST_MERGED))
    if share.predicted_bytes or share.cache_bytes:
        off = abs(share.cache_bytes - share.predicted_bytes) / max(share.predicted_bytes, 1)
        found.append(Bar("bytes off", off, MOST_OFF))
    return tuple(found)


def table(shares: Sequence[Share], steps: int, environment: dict[str, Any]) -> str:
    """The shares beside their bars as a Markdown table with machine, versions and revision."""
    machine, packages = environment["machine"], environment["packages"]
    lines = [
        "| preset | seconds | attention | search | remainder | search, of all | remainder, of all "
        "| cache MB | predicted | bars |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        *map(_row, shares),
        "",
        "search, remainder: seconds of scoring and selecting, of taking and merging caches, "
        "relative to those of the attention in sparse calls and renewals, whose dense passes are "
        "in it; then relative to the whole generation. Tokens are put in order inside the kernel, "
        "as part of its attention, and pooled keys too. Bars: searches by exact mass of the whole "
        "generation; scores of means and samples, and complements, of the attention; bytes beside "
        f"those that the plan predicts. Each preset at its own setting, one prompt, {steps} "
        f"steps, the backend {BACKEND}. {machine['processor']}, {machine['cores']} cores, "
        f"{environment['threads']} threads, torch {packages['torch']}, diffusers "
        f"{packages['diffusers']}, revision {environment['revision']}.",
    ]
    return "\n".join(lines) + "\n"


def _row(share: Share) -> str:
    beside = (
        f"{seconds / whole:.1%}"
        for whole in (share.attention, share.seconds)
        for seconds in (share.search, share.remainder)
    )
    return (
        f"| {share.preset} | {share.seconds:.1f} | {share.attention:.1f} | {' | '.join(beside)} "
        f"| {share.cache_bytes / 1e6:.1f} | {share.predicted_bytes / 1e6:.1f} "
        f"| {'; '.join(map(str, bars(share)))} |"
    )


def _grid(plan: Plan) -> TokenGrid:
    assert plan.grid is not None
    return TokenGrid(*plan.grid)

"""PlanSummary: what a plan does, head by head and on the whole."""

from dataclasses import asdict, dataclass
from typing import Any

from dit_sparse.kernels.blocks import Density, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import OnlinePattern, Pattern
from dit_sparse.pipelines.phase import tally
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.choices import Choices, choices
from dit_sparse.search.timing import runs_of

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class HeadSummary:
    """One head: its pattern and remainder, spelled out, and its block density at the grid (None
    without)."""

    kind: str
    pattern: str
    remainder: str
    density: float | None


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What `dit-sparse show` says of a plan.

    Args:
        model: transformer class by component.
        layers: the heads of each layer, by component and path, and where the schedule has phases,
            the share of the steps from which on they do this: `"transformer.blocks.0.attn1 from
            35%"`.
        patterns: share of the heads by kind.
        density: of the sparse steps' self-attention, {element, block, weighted}; None while no
            grid is known, and where scored patterns find theirs only while denoising.
        grid: (frames, height, width) in tokens, which the densities hold for.
        remainders: share of the heads by what becomes of the pairs that they do not compute.
        cache_bytes: kept between steps at `grid`, in one guidance branch and for one video; None
            while no grid is known.
        schedule: in denoising steps.
        predicted: what the search expected.
        achieved: what generated videos showed, and how fast the plans that a search tried ran;
            empty where none were made.
        choices: why each head runs what it runs; None for a plan without evidence.
    """

    digest: str
    model: dict[str, str]
    layers: dict[str, tuple[HeadSummary, ...]]
    patterns: dict[str, float]
    remainders: dict[str, float]
    density: dict[str, float] | None
    cache_bytes: int | None
    grid: Shape | None
    block: int
    schedule: Schedule
    predicted: dict[str, Any]
    achieved: dict[str, Any]
    choices: Choices | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values under the names of the command line's contract."""
        heads = {layer: [asdict(head) for head in row] for layer, row in self.layers.items()}
        return {
            "digest": self.digest,
            "model": self.model,
            "heads": heads,
            "patterns": self.patterns,
            "remainders": self.remainders,
            "density": self.density,
            "cache_bytes": self.cache_bytes,
            "grid": None if self.grid is None else list(self.grid),
            "block": self.block,
            "schedule": asdict(self.schedule),
            "predicted": self.predicted,
            "achieved": self.achieved,
            "choices": None if self.choices is None else self.choices.to_dict(),
        }


def plan_summary(plan: Plan, grid: Shape | None = None) -> PlanSummary:
    """Summarize a plan at `grid`, by default the one it was searched at.

    Raises:
        ValueError: a pattern of the plan refuses the grid.
    """
    grid = grid or plan.grid
    density = {} if grid is None else _densities(plan, TokenGrid(*grid))
    heads = plan.heads
    total = sum(heads.values())
    shares = {both: count / total for both, count in heads.items()}
    return PlanSummary(
        digest=plan.digest,
        model={name: fingerprint.transformer for name, fingerprint in plan.model.items()},
        layers={
            layer + when: tuple(
                HeadSummary(pattern.kind, str(pattern), str(rest), _block(density.get(pattern)))
                for pattern, rest in zip(patterns, phase.remainders_of(layer), strict=True)
            )
            for phase, when in zip(plan.phases, plan.schedule.phase_names, strict=True)
            for layer, patterns in phase.assignment.items()
        },
        patterns=tally((pattern.kind, share) for (pattern, _), share in shares.items()),
        remainders=tally((str(rest), share) for (_, rest), share in shares.items()),
        density=_mean([(density.get(pattern), share) for (pattern, _), share in shares.items()]),
        cache_bytes=None if grid is None else plan.cache_bytes(TokenGrid(*grid)),
        grid=grid,
        block=plan.block,
        schedule=plan.schedule,
        predicted=plan.predicted,
        achieved=plan.provenance.get("achieved", {}) | _runs(plan),
        choices=choices(plan),
    )


def _densities(plan: Plan, grid: TokenGrid) -> dict[Pattern, Density]:
    distinct = {pattern for pattern, _ in plan.heads if not isinstance(pattern, OnlinePattern)}
    for pattern in distinct:
        reason = pattern.refusal(grid)
        if reason is not None:
            raise ValueError(f"{pattern} refuses the grid {grid}: {reason}")
    return {
        pattern: block_indices((pattern,), grid, block_q=plan.block, block_k=plan.block).density()
        for pattern in distinct
    }


def _block(density: Density | None) -> float | None:
    return None if density is None else density.block


def _mean(densities: list[tuple[Density | None, float]]) -> dict[str, float] | None:
    """The mean over heads by their shares, if it is known of all."""
    known = [(density, share) for density, share in densities if density is not None]
    if len(known) < len(densities):
        return None
    return {
        name: sum(getattr(density, name) * share for density, share in known)
        for name in ("element", "block", "weighted")
    }


def _runs(plan: Plan) -> dict[str, list[float]]:
    """Speed-ups of the plans that a search tried to keep a time."""
    runs = runs_of(plan)
    return {"speedups": [run.speedup for run in runs]} if runs else {}

"""Heads: how much of each head's attention the best pattern of every kind keeps at one density.

A model whose heads all prefer the same pattern has nothing to search. The table says, head by
head and at two noise levels, what static patterns of 20 % of the pairs keep, and what the best
key blocks of every query block would keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Neighborhood, Pattern
from dit_sparse.kernels.rows import row_weights, sample_rows
from dit_sparse.pipelines.capture import AttentionSite, observe_attention

DENSITY = 0.2
BLOCK = 64
ROWS = 256
KINDS = ("band", "pixel-major band", "neighborhood", "columns")


@dataclass(frozen=True, slots=True)
class HeadMass:
    """Attention mass kept in one head, by kind in the order of `KINDS`, and by the best blocks."""

    layer: int
    head: int
    step: int
    kept: tuple[float, ...]
    best_blocks: float

    @property
    def kind(self) -> str:
        """The kind that keeps most."""
        return KINDS[self.kept.index(max(self.kept))]


def head_masses(pipe: Any, steps: tuple[int, ...], **arguments: Any) -> list[HeadMass]:
    """The table for one prompt's run at the given denoising steps, conditional branch."""
    masses: list[HeadMass] = []
    masks: dict[str, list[Tensor]] = {}

    def observe(
        site: AttentionSite,
        branch: str,
        step: int,
        count: int,
        grid: TokenGrid,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        if step not in steps or branch != "cond":
            return
        rows = sample_rows(grid.tokens, ROWS)
        if not masks:
            for kind, patterns in _static(grid).items():
                masks[kind] = [pattern.rows(grid, rows) for pattern in patterns]
        weights = row_weights(query[:1], key[:1], rows)[0]
        weights = weights / weights.sum(-1, keepdim=True)
        for head, weight in enumerate(weights):
            kept = [
                max(float((weight * mask).sum(-1).mean()) for mask in masks[kind])
                for kind in KINDS[:3]
            ]
            kept.append(_columns_mass(weight))
            best = _best_blocks_mass(query[0, :, head], key[0, :, head])
            masses.append(HeadMass(site.layer, head, step, tuple(kept), best))

    with observe_attention(pipe, observe):
        pipe(output_type="latent", **arguments)
    return masses


def table(masses: list[HeadMass]) -> str:
    """The masses as a Markdown table, one row a head and step."""
    lines = [
        f"| layer | head | step | {' | '.join(KINDS)} | best blocks | best kind |",
        "|---:|---:|---:|" + "---:|" * (len(KINDS) + 1) + "---|",
    ]
    for mass in sorted(masses, key=lambda m: (m.layer, m.head, m.step)):
        kept = " | ".join(f"{value:.2f}" for value in mass.kept)
        lines.append(
            f"| {mass.layer} | {mass.head} | {mass.step} | {kept} | {mass.best_blocks:.2f} "
            f"| {mass.kind} |"
        )
    return "\n".join(lines)


def _static(grid: TokenGrid) -> dict[str, list[Pattern]]:
    """Patterns of at most the density: both bands, every largest box of eighths of the axes."""
    sides = [sorted({max(1, length * part // 8) for part in range(1, 9)}) for length in grid.shape]
    boxes = [
        Neighborhood((f, h, w)) for f, h, w in product(*sides) if f * h * w <= DENSITY * grid.video
    ]
    return {
        "band": [Band.of_density(DENSITY, grid)],
        "pixel-major band": [Band.of_density(DENSITY, grid, "pixel_major")],
        "neighborhood": [box for box in boxes if not _inside_another(box, boxes)],
    }


def _inside_another(box: Neighborhood, boxes: list[Neighborhood]) -> bool:
    return any(
        other != box and all(a <= b for a, b in zip(box.window, other.window, strict=True))
        for other in boxes
    )


def _columns_mass(weight: Tensor) -> float:
    """What the heaviest fifth of the key blocks keeps, the same for all rows [rows, tokens]."""
    mass = _blocks(weight.mean(0)[None])[0]
    return float(mass.sort(descending=True).values[: round(DENSITY * len(mass))].sum())


def _best_blocks_mass(query: Tensor, key: Tensor) -> float:
    """What the heaviest fifth of the key blocks of each query block keeps [tokens, head_dim]."""
    kept, count = 0.0, 0
    for part in (query * query.shape[-1] ** -0.5).float().split(BLOCK):
        mass = _blocks((part @ key.float().T).softmax(-1).mean(0)[None])[0]
        kept += float(mass.sort(descending=True).values[: round(DENSITY * len(mass))].sum())
        count += 1
    return kept / count


def _blocks(weight: Tensor) -> Tensor:
    """Mass of key blocks, `[rows, blocks]`; the last block may be short."""
    short = -weight.shape[-1] % BLOCK
    return rearrange(nn.functional.pad(weight, (0, short)), "r (n b) -> r n b", b=BLOCK).sum(-1)

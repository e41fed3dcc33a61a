"""Check: does a generated clip show what its prompt says? By rules on pixels alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moving_shapes.scene import BACKGROUNDS, COLORS, DIRECTIONS, STEADY_SHARE, Scene

SATURATED = 0.30
"""Least difference of a pixel's largest and smallest channel for it to belong to a shape."""

LEAST_AREA = 0.01
"""Least share of the frame that a present color covers, averaged over the clip."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a clip shows of its scene; right when all of it is there."""

    colors: bool
    motion: bool
    background: bool

    @property
    def right(self) -> bool:
        return self.colors and self.motion and self.background


def check(clip: Tensor, scene: Scene) -> Verdict:
    """Judge a clip, float [3, frames, height, width] in [0, 1].

    colors: the prompt's colors are there and no other. motion: over the steady part of the clip
    each color's centroid moves mainly along its named direction. background: the pixels outside
    every shape lie nearest to the named background's color.
    """
    strong = clip.amax(0) - clip.amin(0) > SATURATED
    hue = _hue(clip)
    named = {mover.color for mover in scene.movers}
    areas = {color: strong & _near(hue, turn) for color, turn in COLORS.items()}
    shown = {color for color, area in areas.items() if area.float().mean() >= LEAST_AREA}
    motion = all(
        mover.color in shown and _moves(areas[mover.color], mover.direction)
        for mover in scene.movers
    )
    ground = clip[:, ~strong].mean(1) if bool((~strong).any()) else torch.full((3,), torch.nan)
    nearest = min(
        BACKGROUNDS, key=lambda name: float((ground - torch.tensor(BACKGROUNDS[name])).norm())
    )
    return Verdict(shown == named, motion, nearest == scene.background)


def _hue(clip: Tensor) -> Tensor:
    """Hue in turns, [frames, height, width]."""
    red, green, blue = clip
    high, which = clip.max(0)
    span = (high - clip.amin(0)).clamp_min(1e-6)
    turns = torch.stack(
        ((green - blue) / span % 6, (blue - red) / span + 2, (red - green) / span + 4)
    )
    return turns.gather(0, which[None])[0] / 6 % 1


def _near(hue: Tensor, turn: float) -> Tensor:
    gap = (hue - turn).abs()
    return torch.minimum(gap, 1 - gap) < 0.5 / len(COLORS)


def _moves(area: Tensor, direction: str) -> bool:
    steady = area[: max(2, round(area.shape[0] * STEADY_SHARE))].float()
    weight = steady.sum((1, 2))
    seen = weight > 0
    if int(seen.sum()) < 2:
        return False
    time = torch.arange(len(steady))[seen].float()
    rows = (steady.sum(2) @ torch.arange(area.shape[1]).float())[seen] / weight[seen]
    columns = (steady.sum(1) @ torch.arange(area.shape[2]).float())[seen] / weight[seen]
    time = time - time.mean()
    slope = torch.stack((rows @ time, columns @ time))
    way = torch.tensor(DIRECTIONS[direction])
    along = float(slope @ way)
    return along > 0 and along > float((slope * (1 - way.abs())).abs().sum())

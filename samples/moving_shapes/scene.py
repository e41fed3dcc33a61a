"""Scene: one or two textured shapes moving over a drifting textured background, drawn by code.

A scene is a value; drawing it is a pure function of the value and of the clip's size, so that
every clip can be made again from its seed. Positions, radii and speeds are fractions of the
shorter side.
"""

from __future__ import annotations

import colorsys
import math
import random
import zlib
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

COLORS = {
    "red": 0.0,
    "yellow": 1 / 6,
    "green": 1 / 3,
    "cyan": 1 / 2,
    "blue": 2 / 3,
    "magenta": 5 / 6,
}
"""Hue of every shape color, in turns."""

BACKGROUNDS = {
    "black": (0.14, 0.14, 0.15),
    "gray": (0.46, 0.46, 0.46),
    "white": (0.82, 0.82, 0.80),
    "brown": (0.46, 0.34, 0.24),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
"""Unit velocity (vertical, horizontal); the vertical axis points down."""

EDGE = 3.5
"""Width in pixels of a shape's soft edge. Wan's decoder doubles the size by repeating pixels,
after which no convolution tells left from right inside a pair: sharper edges would be lost."""

STEADY_SHARE = 0.6
"""Share of the clip for which a shape keeps its named direction before it may bounce."""


@dataclass(frozen=True, slots=True)
class Mover:
    """One shape: what the prompt says of it, and what it leaves open."""

    color: str
    shape: str
    direction: str
    radius: float
    speed: float
    start: float
    lane: float
    drift: float
    stripes: tuple[float, float]

    def phrase(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Movers from back to front; the background's name and waves (angle, cycles, phase, drift)."""

    movers: tuple[Mover, ...]
    background: str
    waves: tuple[tuple[float, float, float, float], ...]
    shade: tuple[float, float]

    def prompt(self) -> str:
        return f"{' and '.join(m.phrase() for m in self.movers)} on {self.background}"

    def held_out(self) -> bool:
        """True for the tenth of all prompts that no training ever sees."""
        return zlib.crc32(self.prompt().encode()) % 10 == 0


def random_scene(rng: random.Random) -> Scene:
    """A scene whose every property is drawn from `rng`; the two colors always differ."""
    colors = rng.sample(list(COLORS), rng.choice((1, 2)))
    waves = tuple(
        (rng.uniform(0, math.pi), rng.uniform(1.0, 4.0), rng.random(), rng.uniform(-0.012, 0.012))
        for _ in range(3)
    )
    return Scene(
        movers=tuple(_random_mover(rng, color) for color in colors),
        background=rng.choice(list(BACKGROUNDS)),
        waves=waves,
        shade=(rng.uniform(-0.08, 0.08), rng.uniform(-0.08, 0.08)),
    )


def _random_mover(rng: random.Random, color: str) -> Mover:
    return Mover(
        color=color,
        shape=rng.choice(SHAPES),
        direction=rng.choice(list(DIRECTIONS)),
        radius=rng.uniform(0.15, 0.24),
        speed=rng.uniform(0.012, 0.026),
        start=rng.random(),
        lane=rng.random(),
        drift=rng.uniform(-0.2, 0.2),
        stripes=(rng.uniform(0, math.pi), rng.uniform(0.5, 1.0)),
    )


def draw(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The clip, float32 [3, frames, height, width] in [0, 1], anti-aliased."""
    side = min(height, width)
    rows = (torch.arange(height) + 0.5)[:, None] / side
    columns = (torch.arange(width) + 0.5)[None, :] / side
    clip = _background(scene, frames, rows, columns)
    for mover in scene.movers:
        y, x = _path(mover, frames, height / side, width / side)
        dy = rows[None] - y[:, None, None]
        dx = columns[None] - x[:, None, None]
        distance = _distance(mover.shape, dy / mover.radius, dx / mover.radius) * mover.radius
        alpha = _smooth((0.5 - distance * side / EDGE).clamp(0, 1))
        angle, cycles = mover.stripes
        wave = torch.sin(
            2 * math.pi * cycles * (dy * math.sin(angle) + dx * math.cos(angle)) / mover.radius
        )
        value = 0.82 + 0.16 * wave
        paint = torch.tensor(colorsys.hsv_to_rgb(COLORS[mover.color], 0.88, 1.0))
        clip = clip * (1 - alpha) + alpha * value * rearrange(paint, "c -> c 1 1 1")
    return clip


def _background(scene: Scene, frames: int, rows: Tensor, columns: Tensor) -> Tensor:
    time = torch.arange(frames)[:, None, None]
    light = scene.shade[0] * (rows - 0.5) + scene.shade[1] * (columns - 0.5) + 1.0
    for angle, cycles, phase, drift in scene.waves:
        along = rows * math.sin(angle) + columns * math.cos(angle)
        light = light + 0.10 * torch.sin(2 * math.pi * (cycles * (along - drift * time) + phase))
    base = rearrange(torch.tensor(BACKGROUNDS[scene.background]), "c -> c 1 1 1")
    return (base * light).clamp(0, 1)


def _path(mover: Mover, frames: int, height: float, width: float) -> tuple[Tensor, Tensor]:
    """Center of the mover in every frame: straight, bouncing off the frame's edges."""
    way_y, way_x = DIRECTIONS[mover.direction]
    time = torch.arange(frames, dtype=torch.float32)
    steady = mover.speed * frames * STEADY_SHARE
    axes = []
    for size, way, cross in ((height, way_y, way_x), (width, way_x, way_y)):
        room = size - 2 * mover.radius
        if way:
            spare = max(room - steady, 0.0) * mover.start
            first = spare if way > 0 else room - spare
            position = first + way * mover.speed * time
        else:
            position = room * mover.lane + abs(cross) * mover.drift * mover.speed * time
        folded = torch.remainder(position, 2 * room)
        axes.append(mover.radius + torch.minimum(folded, 2 * room - folded))
    return axes[0], axes[1]


def _smooth(alpha: Tensor) -> Tensor:
    return alpha**2 * (3 - 2 * alpha)


def _distance(shape: str, dy: Tensor, dx: Tensor) -> Tensor:
    """Signed distance to a shape of radius 1 at the origin (negative inside)."""
    if shape == "circle":
        return torch.sqrt(dy**2 + dx**2) - 1.0
    if shape == "square":
        return torch.maximum(dy.abs(), dx.abs()) - 0.86
    slope = math.sqrt(3) / 2
    return torch.maximum(slope * dx.abs() - 0.5 * dy, dy) - 0.55

"""Evaluation: what the finished sample model makes of prompts that it was never trained on."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from moving_shapes.check import Verdict, check
from moving_shapes.scene import Scene, random_scene

PROMPTS = 60
SHEET_PROMPTS = 6
SHEET_FRAMES = 8
SHEET_ZOOM = 2


def held_out_scenes(count: int) -> list[Scene]:
    """Scenes of `count` different prompts that no training saw, as many of one shape as of two."""
    rng = random.Random("held out prompts")
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = random_scene(rng)
        if scene.held_out() and len(scene.movers) == 1 + len(found) % 2:
            found.setdefault(scene.prompt(), scene)
    return list(found.values())


def generate(pipe: Any, scene: Scene, arguments: dict[str, Any]) -> Tensor:
    """The clip of the scene's prompt, float32 [3, frames, height, width] in [0, 1]."""
    seed = zlib.crc32(scene.prompt().encode())
    video = pipe(
        scene.prompt(),
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
        **arguments,
    ).frames[0]
    return rearrange(video.float(), "f c h w -> c f h w")


def verdicts(
    pipe: Any, count: int, arguments: dict[str, Any]
) -> Iterator[tuple[Scene, Verdict, Tensor]]:
    """Generate `count` held-out prompts and judge each; with the clip."""
    for scene in held_out_scenes(count):
        clip = generate(pipe, scene, arguments)
        yield scene, check(clip, scene), clip


def contact_sheet(clips: list[Tensor]) -> Image.Image:
    """Clips, one a row, frames spread over the clip from left to right."""
    rows = []
    for clip in clips:
        picked = torch.linspace(0, clip.shape[1] - 1, SHEET_FRAMES).round().long()
        rows.append(rearrange(clip[:, picked], "c f h w -> h (f w) c"))
    pixels = (torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()
    sheet = Image.fromarray(pixels)
    return sheet.resize(
        (sheet.width * SHEET_ZOOM, sheet.height * SHEET_ZOOM), Image.Resampling.NEAREST
    )

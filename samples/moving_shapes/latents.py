"""Latents in closed form: colors of 2 x 2 pixels in two frames, as principal components.

The denoiser is trained on them directly and needs no encoder for it; the autoencoder is trained,
at the same time, to compute and to invert them. The first frame stands alone in Wan's causal
layout: here it counts as a pair of equal frames.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from torch import Tensor

from moving_shapes.scene import Scene, draw, random_scene

CHANNELS = 6
"""Three colors in two frames: turned, none left out."""


@dataclass(frozen=True, slots=True)
class Components:
    """`basis` float32 [channels, channels], orthonormal; `mean` and `deviation` [channels]."""

    basis: Tensor
    mean: Tensor
    deviation: Tensor

    def latents(self, clip: Tensor) -> Tensor:
        """Latents [batch, channels, frames, height, width] of a clip in [-1, 1]; 4k + 1 frames."""
        return rearrange((_pairs(clip) - self.mean) @ self.basis, "b t h w c -> b c t h w")

    def scale(self) -> Tensor:
        """What a normalised latent is multiplied with, per channel.

        Half-way to whitening: differences between the frames of a pair weigh more than in pixels
        and less than colors, so that the denoiser learns what moves before how it is smoothed.
        """
        return (self.deviation * self.deviation[0]).sqrt()


def random_scenes(seed: str, count: int) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng) for _ in range(count)]


def clips(scenes: list[Scene], size: tuple[int, int, int]) -> Tensor:
    """The scenes drawn, float32 [scenes, 3, frames, height, width] in [-1, 1]."""
    return torch.stack([draw(scene, *size) for scene in scenes]) * 2 - 1


def principal_components() -> Components:
    """The components of 256 drawn clips; the same on every machine up to rounding."""
    pairs = _pairs(clips(random_scenes("principal components", 256), (13, 64, 64)))
    pairs = rearrange(pairs, "b t h w c -> (b t h w) c").double()
    mean = pairs.mean(0)
    values, vectors = torch.linalg.eigh((pairs - mean).T @ (pairs - mean) / len(pairs))
    basis = vectors.flip(1)
    basis = basis * basis.gather(0, basis.abs().argmax(0)[None]).sign()
    return Components(basis.float(), mean.float(), values.flip(0).sqrt().float())


def _pairs(clip: Tensor) -> Tensor:
    """Mean colors of 2 x 2 pixels in pairs of frames, the first frame twice: [b, t, h, w, 6]."""
    small = reduce(clip, "b c t (h q) (w r) -> b c t h w", "mean", q=2, r=2)
    twice = torch.cat((small[:, :, :1], small), 2)
    return rearrange(twice, "b c (t p) h w -> b t h w (c p)", p=2)

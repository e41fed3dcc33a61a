"""The sample model's autoencoder: a small `AutoencoderKLWan` that computes and inverts `latents`.

Encoder and decoder are trained side by side but apart: the encoder to give the principal
components of a clip, the decoder to draw the clip again from those components with a little
noise on them, as a denoiser would leave.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from einops import rearrange
from torch import Tensor, nn

from moving_shapes.latents import CHANNELS, Components, clips, random_scenes
from moving_shapes.progress import Progress

SIZE = (13, 64, 64)
CROP = 24
"""Clips are cropped to this height and width: convolutions need no more, and 13 frames they do."""

BATCH = 6
LEARNING_RATE = 1e-2
LATENT_NOISE = 0.03
"""Deviation of the noise on normalised latents, for the decoder."""

LOG_VARIANCE = -8.0
"""The posterior's log-variance is fixed: this autoencoder's latents are defined, not learned."""


def build_vae(components: Components) -> Any:
    """Temporal and spatial factor 2; its config normalises the latents for the denoiser."""
    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=components.scale().tolist(),
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    _initialise(vae)
    return vae


@torch.no_grad()
def _initialise(vae: Any) -> None:
    """Convolutions that keep a signal's variance, and a posterior of fixed variance.

    torch's default shrinks every signal by the square root of 3 a layer while biases stay, so that
    behind Wan's normalisation all patches look alike and nothing is learned for hundreds of steps.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(0, 0.5 if name.endswith("conv_in") else 0.0)
    vae.quant_conv.weight[CHANNELS:] = 0
    vae.quant_conv.bias[CHANNELS:] = LOG_VARIANCE


def train_vae(progress: Progress, components: Components, steps: int) -> Any:
    torch.manual_seed(0)
    vae = build_vae(components)
    scale = rearrange(components.scale(), "c -> c 1 1 1")
    optimizer = ConvolutionOptimizer(vae)
    step = 0
    if state := progress.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    errors: list[float] = []
    while step < steps:
        clip = _crops(f"autoencoder {step}")
        latents = components.latents(clip)
        noisy = latents + LATENT_NOISE * scale * torch.randn_like(latents)
        decoded = vae.decode(noisy).sample - clip
        encoded = (vae.encode(clip).latent_dist.mean - latents) / scale
        (decoded.square().mean() + 0.1 * encoded.square().mean()).backward()
        for half in (vae.encoder, vae.decoder):
            nn.utils.clip_grad_norm_(half.parameters(), 0.5)
        vae.quant_conv.weight.grad[CHANNELS:] = 0
        vae.quant_conv.bias.grad[CHANNELS:] = 0
        optimizer.step(LEARNING_RATE * min(1.0, step / 20 + 0.05) * _cosine(step / steps))
        step += 1
        errors.append(decoded.square().mean().item())
        if step % 50 == 0:
            recent = errors[-50:]
            decibel = 10 * math.log10(4 * len(recent) / sum(recent))
            progress.log(
                f"step {step}/{steps} decoder psnr {decibel:.2f} dB, "
                f"encoder error {encoded.square().mean().item():.4f}"
            )
        progress.save(
            {"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
            now=step == steps,
        )
    return vae.eval().requires_grad_(False)


class ConvolutionOptimizer:
    """Muon over convolutions as matrices, AdamW over the rest.

    After 60 steps the decoder stood at 17.5 dB with Muon, at 15.9 with AdamW at 5e-4.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kernels = [p for p in model.parameters() if p.ndim >= 4 and p.numel() > p.shape[0]]
        self.matrices = [nn.Parameter(p.data.view(len(p), -1)) for p in self.kernels]
        chosen = {id(p) for p in self.kernels}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.parts = (
            torch.optim.Muon(
                self.matrices, LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, rate: float) -> None:
        """One step on the model's gradients, which are cleared."""
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.view_as(matrix)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        self.model.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@torch.no_grad()
def held_out_psnr(vae: Any, count: int, size: tuple[int, int, int]) -> list[float]:
    """PSNR in dB of `count` clips that no training drew, encoded and decoded."""
    values = []
    for scene in random_scenes("held out clips", count):
        clip = clips([scene], size)
        again = vae.decode(vae.encode(clip).latent_dist.mode()).sample.clamp(-1, 1)
        values.append(10 * math.log10(4 / float((again - clip).square().mean())))
    return values


def _crops(seed: str) -> Tensor:
    rng = random.Random(seed)
    top, left = (rng.randrange(0, size - CROP + 1) for size in SIZE[1:])
    return clips(random_scenes(seed, BATCH), SIZE)[..., top : top + CROP, left : left + CROP]


def _cosine(share: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

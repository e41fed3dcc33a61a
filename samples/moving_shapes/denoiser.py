"""The sample model's denoiser: a small `WanTransformer3DModel`, trained by flow matching.

Stages from a small grid to the default one. Every clip is new.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformer3DModel,
)
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from moving_shapes.latents import CHANNELS, Components, clips
from moving_shapes.progress import Progress
from moving_shapes.scene import Scene, random_scene
from moving_shapes.text import MAX_LENGTH, WIDTH, embed

LAYERS = 6
HEADS = 3
FLOW_SHIFT = 4.0
NO_PROMPT_SHARE = 0.1
"""Share of samples trained on the empty prompt, which classifier-free guidance needs."""

LONGEST_PROMPT = 14
"""Tokens of a prompt with two shapes and its end."""

MODELS = ("model", "average", "before")
"""In a checkpoint: as trained, averaged over the steps, and averaged before the stage."""

WEIGHT_AVERAGE = 0.99
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the curriculum: clips of `size` (frames, height, width), `samples` of them.

    The learning rate falls to the share `final` of itself. Of the clips with one shape the share
    `singles` is kept: the motion of two is what the model learns last. In the weights that are
    averaged over the steps, those from before the stage keep the share `before`.
    """

    size: tuple[int, int, int]
    batch: int
    samples: int
    learning_rate: float
    final: float = 0.5
    singles: float = 1.0
    before: float = 0.0


CURRICULUM = (
    Stage((13, 32, 32), 16, 8_000, 1.5e-3),
    Stage((13, 64, 64), 8, 1_280, 1.0e-3),
    Stage((29, 64, 64), 4, 840, 7e-4, final=0.05),
    Stage((29, 64, 64), 4, 960, 7e-4, final=0.05),
    Stage((29, 32, 32), 16, 16_000, 1.5e-3, final=0.3),
    Stage((29, 48, 48), 8, 2_000, 1e-3, final=0.3),
    Stage((29, 64, 64), 4, 2_000, 7e-4, final=0.02),
    Stage((29, 64, 64), 4, 5_200, 8e-4, final=0.02, singles=0.2),
    Stage((29, 64, 64), 4, 3_000, 2.5e-4, final=0.02, singles=0.2, before=0.5),
)


class PaddedOnce(WanAttnProcessor):
    """Cross-attention in which one padding token stands for all.

    The pipeline pads prompts with zero rows to 512 tokens, and zero rows are equal keys with equal
    values: one of them with `ln(their number)` added to its logit attends exactly alike, thirty
    times cheaper. `bias` is [batch, 1, 1, tokens], set for each batch.
    """

    bias: Tensor | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def build_denoiser() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=768,
        num_layers=LAYERS,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=128,
    )


class Latents:
    """Endless normalised latents of clips whose prompts are not held out, with those prompts."""

    def __init__(self, components: Components, stage: Stage, seed: str) -> None:
        self.components, self.stage, self.rng = components, stage, random.Random(seed)

    def draw(self, count: int) -> tuple[Tensor, list[str]]:
        scenes: list[Scene] = []
        while len(scenes) < count:
            scene = random_scene(self.rng)
            kept = len(scene.movers) > 1 or self.rng.random() < self.stage.singles
            if kept and not scene.held_out():
                scenes.append(scene)
        latents = self.components.latents(clips(scenes, self.stage.size))
        latents = latents / rearrange(self.components.scale(), "c -> c 1 1 1")
        prompts = [
            "" if self.rng.random() < NO_PROMPT_SHARE else scene.prompt() for scene in scenes
        ]
        return latents, prompts


def train_denoiser(
    progress: Progress,
    components: Components,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    curriculum: tuple[Stage, ...],
    weights: dict[str, Tensor] | None = None,
) -> WanTransformer3DModel:
    """Train through the curriculum, from `weights` if given, and return the averaged weights."""
    torch.manual_seed(2)
    model = build_denoiser()
    if weights is not None:
        model.load_state_dict(weights)
    average, before = (copy.deepcopy(model).requires_grad_(False) for _ in range(2))
    padded: Any = PaddedOnce()
    for name, module in model.named_modules():
        if name.endswith("attn2") and isinstance(module, WanAttention):
            module.set_processor(padded)
    optimizers = _optimizers(model)
    # Compiled, a step takes two thirds of the time; sizes and text lengths are fixed in a stage.
    compiled = torch.compile(model, dynamic=False)
    begin, done = 0, 0
    if state := progress.load():
        _restore(state, (model, average, before), optimizers)
        begin, done = state["stage"], state["step"]
    for index in range(begin, len(curriculum)):
        stage = curriculum[index]
        steps = stage.samples // stage.batch
        drawn = Latents(components, stage, f"latents {index} {done}")
        if not done:
            before.load_state_dict(average.state_dict())
        losses: list[float] = []
        for step in range(done + 1, steps + 1):
            rate = stage.learning_rate * _schedule(step, steps, stage.final)
            latents, prompts = drawn.draw(stage.batch)
            text, padded.bias = _padded_text(*embed(encoder, tokenizer, prompts))
            losses.append(_train_step(compiled, optimizers, rate, latents, text))
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value.detach(), 1 - WEIGHT_AVERAGE)
            if step % 25 == 0:
                progress.log(
                    f"grid {stage.size} step {step}/{steps} loss {fmean(losses[-25:]):.4f}"
                )
            progress.save(_state((model, average, before), optimizers, index, step))
        done = 0
        for mean, earlier in zip(average.parameters(), before.parameters(), strict=True):
            mean.lerp_(earlier, stage.before)
        progress.save(_state((model, average, before), optimizers, index + 1, 0), now=True)
    return average.eval()


def _train_step(
    model: Any,
    optimizers: tuple[torch.optim.Optimizer, ...],
    rate: float,
    latents: Tensor,
    text: Tensor,
) -> float:
    """One flow-matching step: predict `noise - latents` at a shifted, logit-normal noise level."""
    noise = torch.randn_like(latents)
    level = torch.sigmoid(torch.randn(len(latents)))
    level = FLOW_SHIFT * level / (1 + (FLOW_SHIFT - 1) * level)
    mix = level[:, None, None, None, None]
    noisy = (1 - mix) * latents + mix * noise
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(noisy, level * 1000, text, return_dict=False)[0]
    loss = (velocity.float() - (noise - latents)).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _optimizers(model: WanTransformer3DModel) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        matrices, LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(others, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)


def _padded_text(text: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Text of `LONGEST_PROMPT + 1` rows, and the bias that lets one row stand for all padding."""
    text = torch.nn.functional.pad(text, (0, 0, 0, LONGEST_PROMPT + 1 - text.shape[1]))
    place = torch.arange(text.shape[1])
    bias = torch.zeros(text.shape[:2])
    bias[place[None] > lengths[:, None]] = -math.inf
    bias[place[None] == lengths[:, None]] = (MAX_LENGTH - lengths).float().log()
    return text, bias[:, None, None, :].bfloat16()


def _schedule(step: int, steps: int, final: float) -> float:
    warm = min(1.0, step / 40)
    return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _state(
    models: tuple[WanTransformer3DModel, ...],
    optimizers: tuple[torch.optim.Optimizer, ...],
    stage: int,
    step: int,
) -> dict[str, Any]:
    weights = zip(MODELS, (model.state_dict() for model in models), strict=True)
    return {
        **dict(weights),
        "optimizers": [o.state_dict() for o in optimizers],
        "stage": stage,
        "step": step,
    }


def _restore(
    state: dict[str, Any],
    models: tuple[WanTransformer3DModel, ...],
    optimizers: tuple[torch.optim.Optimizer, ...],
) -> None:
    for name, model in zip(MODELS, models, strict=True):
        model.load_state_dict(state[name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)

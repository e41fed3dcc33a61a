"""Export: the trained parts as an ordinary diffusers pipeline folder, weights in 16 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from moving_shapes.denoiser import FLOW_SHIFT

GENERATION = {
    "height": 64,
    "width": 64,
    "frames": 29,
    "steps": 20,
    "guidance": 3.0,
    "dtype": "float32",
}
"""How the model is meant to be run: 15 x 16 x 16 = 3,840 tokens."""


def export(
    folder: Path,
    tokenizer: Any,
    text_encoder: Any,
    vae: Any,
    transformer: Any,
) -> None:
    """Write the pipeline to `folder`, whole or not at all; what stood there is replaced."""
    # diffusers annotates one scheduler and takes them all.
    scheduler: Any = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
        transformer_2=None,
    )
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(part)
    (part / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    pipe.to(torch.float32)

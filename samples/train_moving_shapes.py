"""Train the sample model `samples/models/moving-shapes` from nothing, and judge it.

    python samples/train_moving_shapes.py

Three to five hours on two cores; a killed training takes up again where it was. Without
checkpoints in `--work`, the denoiser goes on from the state that the repository holds
(`samples/training/denoiser.safetensors`) if `--resume` is given.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from diffusers import WanPipeline

from moving_shapes.denoiser import CURRICULUM, train_denoiser
from moving_shapes.evaluation import PROMPTS, contact_sheet, verdicts
from moving_shapes.export import GENERATION, export
from moving_shapes.heads import KINDS, head_masses, table
from moving_shapes.latents import principal_components
from moving_shapes.progress import Progress
from moving_shapes.text import build_tokenizer, train_text_encoder
from moving_shapes.vae import held_out_psnr, train_vae

SAMPLES = Path(__file__).parent
TEXT_STEPS = 500
VAE_STEPS = 700
HELD_OUT_CLIPS = 20
HEADS_PROMPT = "a red circle moving left and a blue square moving up on gray"
HEADS_STEPS = (2, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SAMPLES / "models" / "moving-shapes")
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="checkpoints")
    parser.add_argument("--logs", type=Path, default=SAMPLES / "training")
    parser.add_argument("--judge", action="store_true", help="only judge the model in --out")
    arguments = parser.parse_args()
    if not arguments.judge:
        train(arguments.out, arguments.work, arguments.logs)
    judge(arguments.out, arguments.logs)


def train(out: Path, work: Path, logs: Path) -> None:
    components = principal_components()
    encoder = train_text_encoder(Progress("text", work, logs), TEXT_STEPS)
    vae = train_vae(Progress("vae", work, logs), components, VAE_STEPS)
    tokenizer = build_tokenizer()
    denoiser = train_denoiser(
        Progress("denoiser", work, logs), components, encoder, tokenizer, CURRICULUM
    )
    export(out, tokenizer, encoder, vae, denoiser)


def judge(folder: Path, logs: Path) -> None:
    """Write figures.json, heads.md and contact-sheet.png."""
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    size = GENERATION["frames"], GENERATION["height"], GENERATION["width"]
    decibels = held_out_psnr(pipe.vae, HELD_OUT_CLIPS, size)
    call = {
        "num_frames": size[0],
        "height": size[1],
        "width": size[2],
        "num_inference_steps": GENERATION["steps"],
        "guidance_scale": GENERATION["guidance"],
    }
    contact_sheet(pipe, call).save(logs / "contact-sheet.png")
    masses = head_masses(pipe, HEADS_STEPS, prompt=HEADS_PROMPT, generator=seeded(), **call)
    (logs / "heads.md").write_text(table(masses) + "\n")
    rows = []
    for scene, verdict in verdicts(pipe, PROMPTS, call):
        rows.append({"prompt": scene.prompt(), "right": verdict.right} | _parts(verdict))
        right = sum(row["right"] for row in rows)
        print(f"{right} of {len(rows)} right: {rows[-1]}", file=sys.stderr, flush=True)
    figures = {
        "machine": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "vae_psnr": {"mean": statistics.mean(decibels), "worst": min(decibels)},
        "prompts_right": sum(row["right"] for row in rows) / len(rows),
        "best_kind": {kind: sum(mass.kind == kind for mass in masses) for kind in KINDS},
        "prompts": rows,
    }
    (logs / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _parts(verdict: object) -> dict[str, bool]:
    return {name: getattr(verdict, name) for name in ("colors", "motion", "background")}


if __name__ == "__main__":
    main()

"""Train the sample model `samples/models/moving-shapes` from nothing, and judge it.

    python samples/train_moving_shapes.py                    # everything; takes up again if killed
    python samples/train_moving_shapes.py --more 2000        # go on from the repository's state
    python samples/train_moving_shapes.py --judge            # only judge

About six hours on two cores. Checkpoints lie in `--work`. The repository holds the
denoiser's last, unaveraged weights (`samples/training/denoiser.safetensors`), from which `--more`
goes on at the default grid; the optimizers start anew then, behind a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dit_sparse.environment import environment
from dit_sparse.pipelines.load import load_pipeline
from moving_shapes.denoiser import CURRICULUM, train_denoiser
from moving_shapes.evaluation import PROMPTS, SHEET_PROMPTS, contact_sheet, verdicts
from moving_shapes.export import GENERATION, export
from moving_shapes.heads import DENSITY, KINDS, head_masses, table
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=SAMPLES / "models" / "moving-shapes")
    parser.add_argument("--work", type=Path, default=Path("out/training"), help="checkpoints")
    parser.add_argument("--logs", type=Path, default=SAMPLES / "training")
    parser.add_argument("--judge", action="store_true", help="only judge the model in --out")
    parser.add_argument("--more", type=int, metavar="SAMPLES", help="go on from --logs' state")
    arguments = parser.parse_args()
    if not arguments.judge:
        train(arguments.out, arguments.work, arguments.logs, arguments.more)
    judge(arguments.out, arguments.logs)


def train(out: Path, work: Path, logs: Path, more: int | None) -> None:
    components = principal_components()
    encoder = train_text_encoder(Progress("text", work, logs), TEXT_STEPS)
    vae = train_vae(Progress("vae", work, logs), components, VAE_STEPS)
    tokenizer = build_tokenizer()
    state = logs / "denoiser.safetensors"
    progress, curriculum, weights = Progress("denoiser", work, logs), CURRICULUM, None
    if more is not None:
        progress = Progress("denoiser-more", work, logs)
        curriculum, weights = (replace(CURRICULUM[-1], samples=more),), load_file(state)
    denoiser = train_denoiser(progress, components, encoder, tokenizer, curriculum, weights)
    export(out, tokenizer, encoder, vae, denoiser)
    last = progress.load()
    assert last is not None
    save_file({name: value.bfloat16() for name, value in last["model"].items()}, state)


def judge(folder: Path, logs: Path) -> None:
    """Write figures.json, figures.md, heads.md and contact-sheet.png."""
    pipe = load_pipeline(folder, torch.float32, "cpu")
    size = GENERATION["frames"], GENERATION["height"], GENERATION["width"]
    decibels = held_out_psnr(pipe.vae, HELD_OUT_CLIPS, size)
    call = {
        "num_frames": size[0],
        "height": size[1],
        "width": size[2],
        "num_inference_steps": GENERATION["steps"],
        "guidance_scale": GENERATION["guidance"],
    }
    logs.mkdir(parents=True, exist_ok=True)
    masses = head_masses(pipe, HEADS_STEPS, prompt=HEADS_PROMPT, generator=seeded(), **call)
    (logs / "heads.md").write_text(table(masses) + "\n")
    rows, machine = [], environment()
    pipe.transformer.to(torch.bfloat16)
    clips: list[torch.Tensor] = []
    for scene, verdict, clip in verdicts(pipe, PROMPTS, call):
        clips += [clip] if len(clips) < SHEET_PROMPTS else []
        rows.append({"prompt": scene.prompt(), "right": verdict.right} | _parts(verdict))
        right = sum(row["right"] for row in rows)
        print(f"{right} of {len(rows)} right: {rows[-1]}", file=sys.stderr, flush=True)
    contact_sheet(clips).save(logs / "contact-sheet.png")
    figures = {
        "processor": machine["machine"]["processor"],
        "torch": torch.__version__,
        "revision": machine["revision"],
        "vae_psnr": {"mean": statistics.mean(decibels), "worst": min(decibels)},
        "prompts_right": sum(row["right"] for row in rows) / len(rows),
        "best_kind": {kind: sum(mass.kind == kind for mass in masses) for kind in KINDS},
        "prompts": rows,
    }
    (logs / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (logs / "figures.md").write_text(summary(figures))


def summary(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    rows = figures["prompts"]
    shares = {
        name: sum(row[name] for row in rows) / len(rows)
        for name in ("colors", "motion", "background", "right")
    }
    decibels, kinds = figures["vae_psnr"], figures["best_kind"]
    lines = [
        "| figure | value |",
        "|---|---|",
        f"| autoencoder, {HELD_OUT_CLIPS} held-out clips | {decibels['mean']:.1f} dB PSNR, "
        f"worst {decibels['worst']:.1f} |",
        f"| {len(rows)} held-out prompts: everything right | {shares['right']:.0%} |",
        *(
            f"| … {name} right | {shares[name]:.0%} |"
            for name in ("colors", "motion", "background")
        ),
        f"| best static pattern of a head at {DENSITY:.0%} density, heads × 2 noise levels | "
        + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        + " |",
        "",
        f"By `python samples/train_moving_shapes.py --judge` on {figures['processor']}, "
        f"torch {figures['torch']}, revision {figures['revision']}; the denoiser in bfloat16.",
    ]
    return "\n".join(lines) + "\n"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _parts(verdict: object) -> dict[str, bool]:
    return {name: getattr(verdict, name) for name in ("colors", "motion", "background")}


if __name__ == "__main__":
    main()

"""How fast a model of real size denoises with published settings: real shapes, random weights.

    python samples/real_size.py --presets gna,radial,adaspa --out samples/real-size/h100.json

Wan 2.1 1.3B at 480p, 81 frames: 30 layers of 12 heads on 32,760 tokens, guided. What a plan leaves
out is decided by shapes or by the attention of random weights, so these are times, and nothing is
said of quality. Every plan runs once before it is timed; then all, and dense, take turns.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dit_sparse.bench import write_bench
from dit_sparse.environment import environment
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.report import AttentionReport
from dit_sparse.pipelines.stopwatch import Stopwatch
from dit_sparse.video import replacing

# Its names are resolved lazily, which type checkers take for private.
diffusers: Any = importlib.import_module("diffusers")

GRID, FRAMES, HEIGHT, WIDTH = (21, 30, 52), 81, 480, 832
WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
TEXT = 512, 4096
DENSE = "dense"


def pipeline(device: str) -> Any:
    """Wan 2.1 1.3B in bfloat16, without a text encoder and with a small VAE that is not run."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = diffusers.WanTransformer3DModel(**WAN_1_3B)
    pipe = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=diffusers.AutoencoderKLWan(base_dim=8, num_res_blocks=1),
        transformer=transformer.to(torch.bfloat16).eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int) -> float:
    """Denoise from a fixed seed; seconds."""
    device = pipe.transformer.device
    generator = torch.Generator(device).manual_seed(0)
    text = torch.randn(2, 1, *TEXT, device=device, dtype=torch.bfloat16, generator=generator)
    watch = Stopwatch()
    with watch.stretch("generation", device):
        latents = pipe(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], height=HEIGHT, width=WIDTH,
            num_frames=FRAMES, num_inference_steps=steps, guidance_scale=5.0,
            output_type="latent", generator=generator,
        ).frames  # fmt: skip
    if not latents.isfinite().all():
        raise ValueError("the latents are not finite")
    return watch.lap("generation").seconds


def run(pipe: Any, plan: Plan | None, steps: int) -> tuple[float, AttentionReport | None]:
    """Seconds of a generation, and what its attention did."""
    if plan is None:
        return generate(pipe, steps), None
    with enable_sparse_attention(pipe, plan) as hook:
        seconds = generate(pipe, steps)
        return seconds, hook.report()


def row(name: str, seconds: float, dense: float, report: AttentionReport | None) -> dict[str, Any]:
    """What is kept of a plan's generations."""
    found: dict[str, Any] = {"plan": name, "seconds": seconds, "speedup": dense / seconds}
    if report is not None:
        assert report.density is not None
        found |= {
            "attention_seconds": report.seconds,
            "stages": report.stages,
            "block_density": report.density.block,
            "flops": report.flops,
        }
    return found


def table(data: dict[str, Any]) -> str:
    """The rows in Markdown, with what a reader of them must know."""
    machine, packages = data["environment"]["machine"], data["environment"]["packages"]
    lines = [
        "| plan | s | speed-up | attention s | of it search s | block density |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for line in data["rows"]:
        own = "| | | |"
        if "stages" in line:
            search = line["stages"].get("search", 0.0)
            own = (
                f"| {line['attention_seconds']:.2f} | {search:.2f} | {line['block_density']:.3f} |"
            )
        lines.append(f"| {line['plan']} | {line['seconds']:.2f} | {line['speedup']:.2f} {own}")
    lines += [
        "",
        f"{data['model']}; {data['steps']} steps, median of {data['repeats']} after one untimed; "
        f"{', '.join(machine['accelerators']) or machine['processor']}; "
        f"torch {packages['torch']}, Triton {packages['triton']}, "
        f"diffusers {packages['diffusers']}; revision {data['environment']['revision']}.",
        *(f"Refused: {name}: {reason}." for name, reason in data["refused"].items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--presets", required=True, help="names with commas between them")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="JSON; the table goes beside it")
    asked = parser.parse_args()
    pipe = pipeline(asked.device)
    plans: dict[str, Plan | None] = {DENSE: None}
    for name in asked.presets.split(","):
        plans[name] = Plan.preset(name, pipe, grid=GRID, steps=asked.steps)
    times: dict[str, list[float]] = {name: [] for name in plans}
    reports: dict[str, AttentionReport | None] = {}
    refused: dict[str, str] = {}
    for _ in range(asked.repeats + 1):
        for name, plan in plans.items():
            if name in refused:
                continue
            try:
                seconds, reports[name] = run(pipe, plan, asked.steps)
            except ValueError as error:
                refused[name] = str(error)
                continue
            times[name].append(seconds)
            print(f"{name}: {seconds:.2f} s", flush=True)
    dense = median(times[DENSE][1:])
    data = {
        "model": "Wan 2.1 1.3B, random weights, 480 x 832, 81 frames, bfloat16, guided",
        "steps": asked.steps,
        "repeats": asked.repeats,
        "rows": [row(name, median(times[name][1:]), dense, reports[name]) for name in reports],
        "refused": refused,
        "environment": environment(),
    }
    write_bench(asked.out, data)
    with replacing(asked.out.with_suffix(".md")) as part:
        part.write_text(table(data))
    print(table(data))


if __name__ == "__main__":
    main()

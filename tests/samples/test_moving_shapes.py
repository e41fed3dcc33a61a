"""The sample model: its drawings, its checks, its closed-form latents, and the trained folder."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.kernels.pattern import Full
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.load import load_pipeline
from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.evidence import Evidence
from moving_shapes.check import check
from moving_shapes.denoiser import PaddedOnce, build_denoiser
from moving_shapes.denoiser import _padded_text as padded_text
from moving_shapes.latents import clips, principal_components, random_scenes
from moving_shapes.scene import BACKGROUNDS, COLORS, Scene, draw, random_scene
from moving_shapes.text import MAX_LENGTH, build_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
MODEL = SAMPLES / "models" / "moving-shapes"
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def scenes(count: int) -> list[Scene]:
    return random_scenes("tests", count)


def test_drawn_clips_pass_the_check() -> None:
    right = [check(draw(scene, 29, 64, 64), scene).right for scene in scenes(40)]
    assert sum(right) >= 39


def test_the_check_sees_a_wrong_direction() -> None:
    for scene in scenes(20):
        first = scene.movers[0]
        asked = replace(first, direction=OPPOSITE[first.direction])
        verdict = check(draw(scene, 29, 64, 64), replace(scene, movers=(asked, *scene.movers[1:])))
        assert not verdict.motion
        assert verdict.background


def test_the_check_sees_a_missing_or_foreign_color() -> None:
    for scene in scenes(20):
        free = next(c for c in COLORS if c not in {mover.color for mover in scene.movers})
        asked = replace(scene.movers[0], color=free)
        clip = draw(scene, 29, 64, 64)
        assert not check(clip, replace(scene, movers=(asked, *scene.movers[1:]))).colors


def test_the_check_sees_a_wrong_background() -> None:
    for scene in scenes(20):
        clip = draw(scene, 29, 64, 64)
        for background in BACKGROUNDS:
            verdict = check(clip, replace(scene, background=background))
            assert verdict.background == (background == scene.background)


def test_a_tenth_of_all_prompts_is_held_out_by_prompt_alone() -> None:
    rng = random.Random(5)
    drawn = [random_scene(rng) for _ in range(2000)]
    share = sum(scene.held_out() for scene in drawn) / len(drawn)
    assert 0.07 < share < 0.14
    by_prompt: dict[str, set[bool]] = {}
    for scene in drawn:
        by_prompt.setdefault(scene.prompt(), set()).add(scene.held_out())
    assert all(len(answers) == 1 for answers in by_prompt.values())


def test_latents_keep_the_colors_of_pairs_of_frames() -> None:
    components = principal_components()
    clip = clips(scenes(2), (13, 16, 32))
    latents = components.latents(clip)
    assert latents.shape == (2, 6, 7, 8, 16)
    colors = torch.einsum("bcthw,dc->bthwd", latents, components.basis) + components.mean
    # Latent frame 2 holds video frames 3 and 4; the channels are (color, frame of the pair).
    expected = clip[:, :, 3:5, 4:6, 10:12].mean((3, 4)).flatten(1)
    torch.testing.assert_close(colors[:, 2, 2, 5], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        colors[:, 0, 2, 5], clip[:, :, [0, 0], 4:6, 10:12].mean((3, 4)).flatten(1),
        atol=1e-5, rtol=0,
    )  # fmt: skip


def test_one_padding_token_stands_for_all() -> None:
    """What training computes is what the pipeline computes with prompts padded to 512 tokens."""
    torch.manual_seed(0)
    model: Any = build_denoiser().eval()
    lengths = torch.tensor([9, 1])
    text = torch.randn(2, 9, 64) * (torch.arange(9)[None, :, None] < lengths[:, None, None])
    latents, level = torch.randn(2, 6, 3, 8, 8), torch.tensor([300.0, 700.0])
    long = torch.nn.functional.pad(text, (0, 0, 0, MAX_LENGTH - 9))
    with torch.no_grad():
        expected = model(latents, level, long, return_dict=False)[0]
        short, bias = padded_text(text, lengths)
        processor = PaddedOnce()
        processor.bias = bias.float()
        for block in model.blocks:
            block.attn2.set_processor(processor)
        output = model(latents, level, short, return_dict=False)[0]
    # The bias passes through bfloat16, as in training.
    torch.testing.assert_close(output, expected, atol=2e-3, rtol=0)


def test_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for scene in scenes(30):
        ids = tokenizer(scene.prompt()).input_ids
        assert len(ids) == len(scene.prompt().split()) + 1
        assert 2 not in ids


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(MODEL)


CALL: dict[str, Any] = {
    "prompt": "a red circle moving left and a blue square moving up on gray",
    "num_inference_steps": 3,
    "guidance_scale": 4.0,
    "output_type": "latent",
}


def latents(pipe: Any, frames: int, height: int, width: int) -> torch.Tensor:
    size = {"num_frames": frames, "height": height, "width": width}
    return pipe(generator=torch.Generator().manual_seed(0), **size, **CALL).frames


def test_folder_is_small_and_in_16_bits() -> None:
    assert sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file()) <= 16e6
    assert json.loads((MODEL / "generation.json").read_text())["frames"] == 29


@pytest.mark.parametrize("size", [(5, 32, 32), (9, 48, 80)], ids=["7x8x8", "untrained-12x20"])
def test_full_plan_reproduces_the_trained_model_bit_for_bit(
    pipe: Any, size: tuple[int, int, int]
) -> None:
    dense = latents(pipe, *size)
    assert dense.isfinite().all()
    with enable_sparse_attention(pipe, Plan.uniform(pipe, Full())):
        assert torch.equal(latents(pipe, *size), dense)
    assert torch.equal(latents(pipe, *size), dense)


@pytest.mark.parametrize("name", ["d50", "d30", "d20"])
def test_shipped_plans_fit_the_model_and_compute_what_they_promise(pipe: Any, name: str) -> None:
    plan = Plan.from_pretrained(SAMPLES / "plans" / f"moving-shapes-{name}")
    plan.check(pipe)
    assert plan.grid == (15, 16, 16)
    asked = int(name[1:]) / 100
    assert asked - 0.01 <= plan.predicted["density"] <= asked
    evidence, steps = Evidence.of_plan(plan), 6
    chosen = evidence.chosen(plan)
    assert chosen is not None
    tables = evidence.tables(plan.schedule, steps)
    with enable_sparse_attention(pipe, plan) as hook:
        pipe(
            **CALL | {"num_inference_steps": steps, "guidance_scale": 1.0},
            num_frames=29, height=64, width=64, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        report = hook.report()
    expected = tables.flops.gather(-1, chosen[..., None]).mean().item()
    assert report.flops == pytest.approx(expected, rel=1e-6)
    # The search counted two guidance branches.
    assert report.cache_bytes == tables.most_bytes(chosen) / 2

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Skip
from dit_sparse.pipelines.capture import observe_attention
from dit_sparse.pipelines.hook import disable_sparse_attention, enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search import fidelity, generations
from dit_sparse.search.budget import Budget
from dit_sparse.search.driver import observed_steps, resolve, search_plan
from dit_sparse.search.evidence import Evidence
from dit_sparse.search.timing import Timing
from tests import tiny

PROMPTS = ("a cat", "a dog", "a bird")
SMALL: dict[str, Any] = {
    "steps": 4,
    "height": 64,
    "width": 64,
    "frames": 9,
    "guidance": 5.0,
    "block": 16,
    "rows": 24,
    "observe_steps": 2,
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.wan()


@pytest.fixture(scope="module")
def plan(pipe: Any) -> Plan:
    return search_plan(pipe, PROMPTS, Budget(density=0.6), **SMALL)


# Planted heads: query, key and value of one head, written so that its attention has one form.

GRID = TokenGrid(8, 12, 12)
BLOCK = 16
STRIPES = (3, 31, 57)
Head = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def near(places: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Scores that fall with the distance of `places` [tokens, axes]: -|a-b|^2 / (2 radius^2)."""
    scaled = places.float() / radius
    square = -0.5 * scaled.square().sum(-1, keepdim=True)
    one = torch.ones_like(square)
    return torch.cat([scaled, square, one], -1), torch.cat([scaled, one, square], -1)


def local(_: torch.Generator) -> tuple[Tensor, Tensor]:
    return near(torch.arange(GRID.video)[:, None], 6.0)


def same_pixel(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pixels = torch.nn.functional.normalize(
        torch.randn(GRID.height * GRID.width, 32, generator=generator), dim=-1
    )
    tokens = 5 * pixels.repeat(GRID.frames, 1)
    return tokens, tokens


def stripes(_: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.zeros(GRID.video, 1)
    for block in STRIPES:
        chosen[block * BLOCK : (block + 1) * BLOCK] = 12.0
    return torch.ones(GRID.video, 1), chosen


def uniform(_: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.zeros(GRID.video, 1), torch.zeros(GRID.video, 1)


def box(_: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(GRID.video)
    return near(torch.stack(GRID.coordinates(tokens), -1) // 4, 0.25)


HEADS: tuple[tuple[tuple[Head, float], ...], ...] = (
    ((local, 1.0), (same_pixel, 1.0), (stripes, 2.0)),
    # The mean of many random values is small; a head that needs them all must speak up.
    ((uniform, 12.0), (uniform, 1e-3), (box, 1.0)),
)


def planted(layer: int, step: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * layer + step)
    query, key, value = torch.zeros(3, 1, GRID.video, 3, dim)
    for head, (form, loudness) in enumerate(HEADS[layer]):
        left, right = form(generator)
        query[0, :, head, : left.shape[1]] = left * dim**0.5
        key[0, :, head, : right.shape[1]] = right
        value[0, :, head] = loudness * torch.randn(GRID.video, dim, generator=generator)
    return query, key, value


def planting(pipe: Any, observer: Any, stopwatch: Any) -> AbstractContextManager[None]:
    def observe(site: Any, branch: str, step: int, steps: int, grid: TokenGrid, *qkv: Any) -> None:
        assert grid == GRID
        observer(site, branch, step, steps, grid, *planted(site.layer, step, qkv[0].shape[-1]))

    return observe_attention(pipe, observe, stopwatch)


def test_SV3_planted_heads_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "observe_attention", planting)
    found = search_plan(
        tiny.wan(heads=3, head_dim=36),
        PROMPTS[:1],
        Budget(density=0.215),
        steps=3,
        height=192,
        width=192,
        frames=29,
        guidance=1.0,
        block=BLOCK,
        rows=96,
        observe_steps=1,
    )
    (near_raster, near_pixel, column), (everything, nothing, around) = found.assignment.values()
    assert isinstance(near_raster, Band)
    assert near_raster.axis_order == "raster"
    assert isinstance(near_pixel, Band)
    assert near_pixel.axis_order == "pixel_major"
    assert isinstance(column, Columns)
    assert set(column.blocks) >= set(STRIPES)
    assert everything == Full()
    assert nothing == Skip()
    assert isinstance(around, Neighborhood)
    assert found.predicted["density"] <= 0.215
    assert found.predicted["error"] < 0.05


def test_the_plan_keeps_its_budget_and_runs(pipe: Any, plan: Plan) -> None:
    predicted = plan.predicted["density"]
    assert predicted <= 0.6
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe, num_inference_steps=2)
        report = hook.report()
    assert report.density is not None
    assert report.density.block == pytest.approx(predicted)


def test_same_arguments_same_plan_bit_for_bit(pipe: Any, plan: Plan) -> None:
    torch.manual_seed(123)
    again = search_plan(pipe, PROMPTS, Budget(density=0.6), **SMALL)
    assert again.digest == plan.digest


def test_another_seed_gives_other_evidence(pipe: Any, plan: Plan) -> None:
    other = search_plan(pipe, PROMPTS, Budget(density=0.6), seed=7, **SMALL)
    assert not torch.equal(other.evidence["error"], plan.evidence["error"])


def test_pipeline_and_random_state_are_left_alone(pipe: Any) -> None:
    before = tiny.generate(pipe)
    processors = [
        module.processor for module in pipe.transformer.modules() if is_attention(module)
    ]
    state = torch.get_rng_state()
    search_plan(pipe, PROMPTS[:1], Budget(density=0.6), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    after = [module.processor for module in pipe.transformer.modules() if is_attention(module)]
    assert all(a is b for a, b in zip(processors, after, strict=True))
    assert torch.equal(tiny.generate(pipe), before)


def is_attention(module: Any) -> bool:
    return hasattr(module, "processor")


def test_resolve_is_what_a_search_with_that_budget_finds(pipe: Any, plan: Plan) -> None:
    searched = search_plan(pipe, PROMPTS, Budget(density=0.4), **SMALL)
    assert resolve(plan, Budget(density=0.4)).digest == searched.digest
    assert searched.assignment != plan.assignment


def test_resolve_works_from_a_saved_plan(plan: Plan, tmp_path: Path) -> None:
    plan.save_pretrained(tmp_path / "plan")
    loaded = Plan.from_pretrained(tmp_path / "plan")
    assert resolve(loaded, Budget(density=0.6)).digest == plan.digest
    assert resolve(loaded, Budget(density=1.0)).assignment == {
        layer: (Full(), Full()) for layer in plan.assignment
    }


def test_evidence_has_every_candidate_of_every_head(plan: Plan) -> None:
    evidence = Evidence.of_plan(plan)
    candidates = len(evidence.patterns) + len(evidence.column_counts)
    assert evidence.error.shape == evidence.cost.shape == (2, 2, candidates)
    assert evidence.error.isfinite().all()
    assert (evidence.error[..., 0] == 0).all()
    assert (evidence.error[..., 1:] > 0).all()
    assert evidence.column_mass.sum(-1) == pytest.approx(torch.ones(2, 2), abs=1e-5)
    last = evidence.pattern(1, 0, candidates - 1)
    assert isinstance(last, Columns)
    assert len(last.blocks) == evidence.column_counts[-1]


def test_two_transformers_are_searched_together() -> None:
    found = search_plan(
        tiny.wan(layers=1, two_stage=True),
        PROMPTS[:1],
        Budget(density=0.5),
        **{**SMALL, "steps": 8, "observe_steps": 8},
    )
    assert list(found.assignment) == ["transformer.blocks.0.attn1", "transformer_2.blocks.0.attn1"]


def test_text_tokens_are_searched_with_the_video() -> None:
    pipe = tiny.cogvideox()
    found = search_plan(pipe, PROMPTS[:1], Budget(density=0.7), **SMALL)
    assert Evidence.of_plan(found).grid.text_before > 0
    assert found.predicted["density"] <= 0.7


def test_progress_counts_every_step_once(pipe: Any) -> None:
    told: list[tuple[int, int]] = []
    search_plan(
        pipe, PROMPTS, Budget(density=0.5), progress=lambda *now: told.append(now), **SMALL
    )
    # Two calibrating runs of three steps, then three runs that end with the last observed step.
    total = 2 * 3 + 3 * 4
    assert told == [(done + 1, total) for done in range(total)]


def test_an_error_in_the_middle_leaves_the_pipeline_clean(pipe: Any) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = tiny.generate(pipe)
    with pytest.raises(KeyboardInterrupt):
        search_plan(pipe, PROMPTS, Budget(density=0.5), progress=stop, **SMALL)
    assert torch.equal(tiny.generate(pipe), before)


@pytest.mark.parametrize(
    ("steps", "schedule", "count", "expected"),
    [
        (20, Schedule(), 3, (3, 10, 16)),
        (20, Schedule(dense_first=4), 3, (6, 12, 17)),
        (20, Schedule(dense_first=2, dense_last=2), 1, (10,)),
        (3, Schedule(dense_first=1), 5, (1, 2)),
    ],
    ids=["all", "warm-up", "both-ends", "fewer-than-asked"],
)
def test_observed_steps_are_spread_over_the_sparse_ones(
    steps: int, schedule: Schedule, count: int, expected: tuple[int, ...]
) -> None:
    assert observed_steps(steps, schedule, count) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "expected a list of at least one prompt"),
        ({"prompts": "a cat"}, "expected a list of at least one prompt, came 'a cat'"),
        ({"schedule": Schedule(dense_first=4)}, "none of 4 runs sparse"),
        ({"observe_steps": 0}, "observe_steps must be at least 1, came 0"),
        ({"rows": 0}, "at least 1 sampled row"),
        ({"block": 0}, "block: expected a number of tokens >= 1"),
    ],
    ids=["no-prompt", "text", "schedule", "observe", "rows", "block"],
)
def test_bad_arguments_are_named(pipe: Any, changes: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, "budget": Budget(density=0.5)} | SMALL | changes
    with pytest.raises(ValueError, match=message):
        search_plan(pipe, arguments.pop("prompts"), arguments.pop("budget"), **arguments)


def test_a_pipeline_that_runs_sparse_is_refused(pipe: Any, plan: Plan) -> None:
    enable_sparse_attention(pipe, plan)
    with sparse_off(pipe), pytest.raises(ValueError, match="sparse attention is enabled"):
        search_plan(pipe, PROMPTS, Budget(density=0.5), **SMALL)


@contextmanager
def sparse_off(pipe: Any) -> Iterator[None]:
    try:
        yield
    finally:
        disable_sparse_attention(pipe)


def untouched(*_: Any) -> None:
    raise AssertionError("the pipeline was used")


def test_every_budget_is_solved_from_the_evidence(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.WanPipeline.__call__", untouched)
    error = resolve(plan, Budget(density=0.4)).predicted["error"]
    predicted = resolve(plan, Budget(error=error)).predicted
    assert predicted["error"] <= error * (1 + 1e-6)
    assert predicted["density"] == pytest.approx(0.4, abs=0.1)

    timing = Timing.of_plan(plan)
    assert timing is not None
    assert 0 < timing.attention_share < 1
    assert (timing.steps, timing.sparse_steps) == (4, 4)
    asked = timing.speedup(0.5)
    faster = resolve(plan, Budget(speedup=asked)).predicted
    assert faster["speedup"] >= asked * (1 - 1e-6)
    latency = resolve(plan, Budget(latency=timing.dense_seconds / asked))
    assert latency.predicted == faster
    assert latency.provenance["budget"].startswith("latency=")
    with pytest.raises(ValueError, match="needs the model: search with"):
        resolve(plan, Budget(psnr=30))


def test_a_psnr_is_held_by_the_videos(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "CHECKS", 3)
    told: list[tuple[int, int]] = []
    # Random weights lose little: nothing but a high PSNR makes a difference.
    found = search_plan(
        pipe, PROMPTS[:1], Budget(psnr=50), progress=lambda *now: told.append(now), **SMALL
    )
    achieved = found.provenance["achieved"]
    assert found.provenance["budget"] == "psnr=50"
    assert achieved["psnr"] >= 50
    assert 1 <= len(achieved["checks"]) <= 3
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted({done for done, _ in told})

    call = {**tiny.CALL, "prompt": PROMPTS[0], "output_type": "np"}
    del call["negative_prompt"], call["max_sequence_length"]
    videos = []
    for heads in (found, Plan.uniform(pipe, Full(), block=16)):
        with enable_sparse_attention(pipe, heads):
            generator = torch.Generator().manual_seed(0)
            videos.append(torch.from_numpy(pipe(**call, generator=generator).frames[0]))
    assert fidelity.mean_psnr(videos[1:], videos[:1]) == pytest.approx(achieved["psnr"], abs=0.1)
    assert "achieved" not in resolve(found, Budget(density=0.5)).provenance


def test_resolve_refuses_a_plan_without_evidence(pipe: Any, plan: Plan) -> None:
    with pytest.raises(ValueError, match="carries no evidence of a search"):
        resolve(Plan.uniform(pipe, Full()), Budget(density=0.5))
    short = plan.evidence | {"error": plan.evidence["error"][..., :-1]}
    with pytest.raises(ValueError, match="should have the shape"):
        resolve(replace(plan, evidence=short), Budget(density=0.5))
    described: dict[str, Any] = {"search": {"layers": ["transformer.blocks.0.attn1"]}}
    with pytest.raises(ValueError, match="the plan's search is incomplete"):
        resolve(replace(plan, provenance=described), Budget(density=0.5))

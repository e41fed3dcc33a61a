from dataclasses import replace

import pytest
import torch

from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Choice, Full, Neighborhood, Skip, Stripes
from dit_sparse.kernels.remainder import Drop, Pooled, Rescale
from dit_sparse.kernels.score import Clustered
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import Cumulative
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.presets import COMBINATIONS, EVERY_STEP, PRESETS
from dit_sparse.pipelines.schedule import Schedule
from tests import tiny

GRID = (3, 4, 4)
KNOWN = PRESETS | COMBINATIONS
every_preset = pytest.mark.parametrize("name", KNOWN)


@every_preset
def test_on_the_grid_and_steps_of_the_paper_a_preset_is_what_it_published(name: str) -> None:
    preset = KNOWN[name]
    assert preset.fitted(preset.grid, preset.steps, None) == preset


@every_preset
def test_a_preset_is_an_ordinary_plan_that_runs(name: str) -> None:
    pipe = tiny.wan(layers=3)
    plan = Plan.preset(name, pipe, grid=GRID, steps=6)
    assert plan.provenance["preset"] == name
    preset = KNOWN[name]
    first = list(plan.assignment.values())[: preset.dense_layers]
    assert all(set(heads) == {Full()} for heads in first)
    with enable_sparse_attention(pipe, plan) as hook:
        output = tiny.generate(pipe, num_inference_steps=6)
        report = hook.report()
    assert output.isfinite().all()
    assert report.sparse_calls > 0
    dense = report.dense_calls.get("dense steps of the schedule", 0)
    share = preset.schedule.dense_first / preset.steps
    assert dense == round(6 * share) * (3 - preset.dense_layers) * 2


@pytest.mark.gpu
@every_preset
def test_a_preset_denoises_on_an_accelerator_as_on_a_cpu(name: str) -> None:
    pipe = tiny.wan(layers=3, head_dim=16)
    plan = Plan.preset(name, pipe, grid=(5, 8, 8), steps=4)
    # Drawn by the generator of a device, they would not be the same.
    latents = torch.randn(1, 16, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    size = {"height": 128, "width": 128, "num_frames": 17}
    found = []
    for device in ("cpu", "cuda"):
        pipe.to(device)
        with enable_sparse_attention(pipe, plan):
            found.append(tiny.generate(pipe, latents=latents.to(device), **size).cpu())
    error = (found[1] - found[0]).norm() / found[0].norm()
    # A logit that is rounded otherwise may choose another block; a wrong mask is far beyond.
    assert error < 1e-3, f"relative error {error:.1e}"


def test_steps_keep_their_share_of_the_generation() -> None:
    pipe = tiny.wan()

    def schedule(name: str, steps: int) -> Schedule:
        return Plan.preset(name, pipe, grid=GRID, steps=steps).schedule

    assert schedule("adaspa", 50) == Schedule(dense_first=9, renew_at=(29,))
    assert schedule("adaspa", 20) == Schedule(dense_first=4, renew_at=(12,))
    assert schedule("re-ttention", 20) == Schedule(dense_first=6, renew_every=2)
    assert schedule("sparsed", 1024) == Schedule(dense_first=205)
    assert schedule("asa", 8) == Schedule(renew_every=1)


def test_svg2_has_the_clusters_of_the_authors_script_and_keeps_their_sizes() -> None:
    preset = PRESETS["svg2"]
    assert preset.pattern == Scored(Clustered(300, 1000, 50, 2), Cumulative(0.9, 0.1))
    assert preset.schedule == Schedule(dense_first=10, renew_every=1)
    tokens = (15, 16, 16)
    fitted = preset.fitted(TokenGrid(*tokens), 20, None).pattern
    assert isinstance(fitted, Scored)
    assert fitted.score == Clustered(15, 51)


def test_the_code_of_asa_differs_from_its_paper_in_the_last_block_alone() -> None:
    paper, code = PRESETS["asa"].pattern, PRESETS["asa-repo"].pattern
    assert isinstance(paper, Scored)
    assert isinstance(code, Scored)
    assert code == replace(paper, select=Cumulative(0.95, 0.05, 0.17, crossing=False))
    assert (PRESETS["asa-repo"].schedule, PRESETS["asa-repo"].block) == (EVERY_STEP, 128)


def test_sparse_vdit_has_the_modes_of_its_paper() -> None:
    pattern = PRESETS["sparse-vdit"].pattern
    assert isinstance(pattern, Choice)
    skip, diagonal, multi_diagonal, stripe = pattern.patterns
    assert (skip, stripe) == (Skip(), Stripes(0.25))
    assert isinstance(diagonal, Band)
    assert isinstance(multi_diagonal, Band)
    assert (diagonal.axis_order, multi_diagonal.axis_order) == ("raster", "pixel_major")
    # The fifth: full, above the limit.
    assert (pattern.price, pattern.limit) == (0.5, 1.0)


def test_svg2_runs_with_several_clusters_and_batched_guidance() -> None:
    pipe = tiny.cogvideox()
    dense = tiny.generate(pipe)
    plan = Plan.preset("svg2", pipe, grid=(3, 40, 40), steps=20)
    plan = replace(plan, schedule=replace(plan.schedule, dense_first=0))
    outputs = []
    for _ in range(2):
        with enable_sparse_attention(pipe, plan) as hook:
            outputs.append(tiny.generate(pipe))
            density = hook.report().density_sparse
        assert density is not None
        assert 0.2 < density.block < 1
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], dense)
    assert (outputs[0] - dense).norm() / dense.norm() < 0.5


def test_presets_keep_their_remainders() -> None:
    pipe = tiny.wan()
    for name, remainder in (("re-ttention", Rescale()), ("asa-g", Pooled(5)), ("gna", Drop())):
        plan = Plan.preset(name, pipe, grid=GRID, steps=20)
        assert {rest for _, rest in plan.heads} == {remainder}


def test_another_density_can_be_asked() -> None:
    pipe, grid = tiny.wan(), (8, 16, 16)
    for asked in (0.2, 0.5):
        for name in ("gna", "sta"):
            plan = Plan.preset(name, pipe, grid=grid, steps=20, density=asked)
            heads = list(plan.assignment.values())[-1]
            blocks = block_indices(heads, TokenGrid(*grid), block_q=plan.block, block_k=plan.block)
            assert blocks.density().block == pytest.approx(asked, abs=0.16)
    heads = next(
        iter(Plan.preset("adaspa", pipe, grid=grid, steps=20, density=0.3).assignment.values())
    )
    assert isinstance(heads[0], Scored)
    assert heads[0].select.density == 0.3  # type: ignore[union-attr]
    pooled = PRESETS["asa-g"].fitted(TokenGrid(*grid), 20, 0.3).pattern
    assert isinstance(pooled, Scored)
    kept = pooled.select.cap  # type: ignore[union-attr]
    assert kept + (1 - kept) / 32 == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"density 0.03 is out of reach, pooled by 32 alone"):
        Plan.preset("asa-g", pipe, grid=grid, steps=20, density=0.03)


@every_preset
def test_compared_at_one_density_all_have_the_same_dense_steps(name: str) -> None:
    fitted = KNOWN[name].fitted(TokenGrid(8, 16, 16), 50, 0.5)
    assert (fitted.schedule.dense_first, fitted.schedule.dense_last) == (12, 0)
    assert fitted.schedule.renew_every == KNOWN[name].schedule.renew_every


def test_sliding_tiles_are_those_of_the_paper() -> None:
    plan = Plan.preset("sta", tiny.wan(), grid=(30, 48, 80), steps=50)
    assert next(iter(plan.assignment.values()))[0] == Neighborhood((18, 24, 24), (6, 8, 8))


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"preset: expected one of adaspa, .*, came 'ada'"):
        Plan.preset("ada", tiny.wan(), grid=GRID, steps=20)

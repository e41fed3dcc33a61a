"""Plans with scored patterns, remainders and renewals on whole pipelines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.kernels.blocks import block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Pattern, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled, Remainder, Rescale
from dit_sparse.kernels.score import Clustered, Mass, Oracle, Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import Bands, Cumulative, Tiers, TopRow
from dit_sparse.pipelines.hook import SparseAttentionHook, enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from tests import tiny
from tests.hooked import wan_inputs

MASS = Scored(Mass(rows=None), TopRow(0.4))
SAMPLED = Scored(Sampled(8), Bands((0.2, 0.4, 0.6, 0.8), "rank"), "gilbert", sink_frames=1)
CLUSTERED = Scored(Clustered(4, 8, first=5), Cumulative(0.7, 0.1))


def plan_of(
    pipe: Any, pattern: Pattern, remainder: Remainder, schedule: Schedule, **fields: Any
) -> Plan:
    return Plan.uniform(pipe, pattern, schedule, remainder, block=8, **fields)


PRODUCT = pytest.mark.parametrize(
    ("pattern", "remainder"),
    [
        (MASS, Drop()),
        (MASS, Complement()),
        (SAMPLED, Drop()),
        (Scored(Oracle(), TopRow(0.4)), Complement()),
        (SAMPLED, Rescale()),
        (CLUSTERED, Drop()),
        (CLUSTERED, Complement()),
        (CLUSTERED, Pooled(2)),
        (Band(3), Complement("float8")),
        (Band(3, "pixel_major"), Pooled(2)),
        (Skip(), Complement()),
    ],
    ids=str,
)


@PRODUCT
def test_a_generation_is_the_same_whatever_ran_before(
    pattern: Pattern, remainder: Remainder
) -> None:
    pipe = tiny.wan()
    dense = tiny.generate(pipe, num_inference_steps=6)
    state = torch.get_rng_state()
    plan = plan_of(pipe, pattern, remainder, Schedule(1, renew_every=2))
    with enable_sparse_attention(pipe, plan) as hook:
        first = tiny.generate(pipe, num_inference_steps=6)
        report = hook.report()
        tiny.generate(pipe, num_inference_steps=3, height=96)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, num_inference_steps=6, callback_on_step_end=stop)
        assert torch.equal(tiny.generate(pipe, num_inference_steps=6), first)
        assert hook.report().flops == report.flops
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.generate(pipe, num_inference_steps=6), dense)
    assert not torch.equal(first, dense)
    assert first.isfinite().all()
    calls = 2 * 2 * 6
    assert report.sparse_calls + sum(report.dense_calls.values()) == calls
    assert (report.cache_bytes > 0) == (remainder.cached or pattern in (MASS, CLUSTERED))


def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        raise KeyboardInterrupt
    return tensors


def test_AD7_searches_are_counted_and_cost_what_they_should() -> None:
    pipe = tiny.wan()
    plan = plan_of(pipe, MASS, Drop(), Schedule(dense_first=2, renew_at=(5,)))
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe, num_inference_steps=8)
        report = hook.report()
    layers = branches = 2
    assert report.dense_calls == {
        "dense steps of the schedule": layers * branches * 2,
        "renewal": layers * branches,
    }
    assert report.sparse_calls == layers * branches * 5
    assert report.density_sparse is not None
    # 48 tokens in blocks of 8: 2 of 6 key blocks in every row.
    sparse = 2 / 6
    assert report.density_sparse.block == pytest.approx(sparse)
    assert report.flops == pytest.approx((2 + 1.5 + 0.5 + 5 * sparse) / 8)


def test_RE_complement_of_every_step_is_dense() -> None:
    pipe = tiny.wan()
    dense = tiny.generate(pipe)
    plan = plan_of(pipe, Band(3), Complement(), Schedule(renew_every=1))
    with enable_sparse_attention(pipe, plan):
        torch.testing.assert_close(tiny.generate(pipe), dense, atol=2e-5, rtol=0)


def test_batched_guidance_has_one_list_and_a_cache_for_each_sample() -> None:
    pipe = tiny.cogvideox()
    dense = tiny.generate(pipe)
    for pattern in (MASS, Scored(Mass(), Tiers(0.4)), CLUSTERED):
        plan = plan_of(pipe, pattern, Complement("float32"), Schedule())
        with enable_sparse_attention(pipe, plan) as hook:
            output = tiny.generate(pipe)
            assert hook.report().cache_bytes == plan.cache_bytes(
                TokenGrid(3, 4, 4, text_before=16), batch=2
            )
        assert output.isfinite().all()
        assert not torch.equal(output, dense)
        assert (output - dense).norm() / dense.norm() < 0.5


@pytest.mark.parametrize("storage", ["float32", "float16", "float8"])
def test_caches_take_the_bytes_that_the_plan_says(storage: Any) -> None:
    pipe = tiny.wan()
    plan = plan_of(pipe, Band(3), Complement(storage), Schedule(1))
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe)
        assert hook.report().cache_bytes == 2 * plan.cache_bytes(TokenGrid(3, 4, 4))


def test_centroids_take_the_bytes_that_the_plan_says() -> None:
    grid, pipe = TokenGrid(3, 4, 4), tiny.wan()
    # Two layers of heads with 4 + 8 centroids in bfloat16.
    for schedule, each in ((Schedule(1, renew_every=1), 12 * 2), (Schedule(1), 0)):
        plan = plan_of(pipe, CLUSTERED, Drop(), schedule)
        model = plan.model["transformer"]
        heads = sum(len(patterns) for patterns in plan.assignment.values())
        assert plan.cache_bytes(grid) == heads * model.head_dim * each
        with enable_sparse_attention(pipe, plan) as hook:
            tiny.generate(pipe)
            assert hook.report().cache_bytes == 2 * plan.cache_bytes(grid)


def test_a_limit_holds_and_is_reported() -> None:
    pipe = tiny.wan(layers=4)
    whole = plan_of(pipe, Band(3), Complement(), Schedule())
    limit = whole.cache_bytes(TokenGrid(3, 4, 4)) // 2
    plan = plan_of(pipe, Band(3), Complement(), Schedule(), cache_limit=limit)
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe)
        report = hook.report()
    assert report.cache_bytes == limit
    assert report.dropped_caches == 6
    assert "6 did not fit" in str(report)


@pytest.mark.parametrize("pattern", [Band(3), MASS], ids=str)
def test_a_cache_larger_than_the_limit_costs_no_dense_pass(pattern: Pattern) -> None:
    pipe, grid, schedule = tiny.wan(), TokenGrid(3, 4, 4), Schedule(1, renew_every=2)
    each = plan_of(pipe, Band(3), Complement(), schedule).cache_bytes(grid) // 2
    dropping = plan_of(pipe, pattern, Drop(), schedule)
    with enable_sparse_attention(pipe, dropping) as hook:
        expected = tiny.generate(pipe, num_inference_steps=5)
        plain = hook.report()
    for limit, dropped in ((each - 1, 4), (each, 3)):
        plan = plan_of(pipe, pattern, Complement(), schedule, cache_limit=limit)
        with enable_sparse_attention(pipe, plan) as hook:
            output = tiny.generate(pipe, num_inference_steps=5)
            report = hook.report()
        assert report.dropped_caches == dropped
        assert torch.equal(output, expected) == (limit < each)
        # With room for one, all run dense for once, since which loses most is not known before.
        more = report.dense_calls.get("renewal", 0) - plain.dense_calls.get("renewal", 0)
        first = 0 if pattern is MASS else 4
        assert more == (0 if limit < each else first + 1)


@pytest.mark.parametrize("pattern", [Band(3), MASS], ids=str)
def test_only_the_layers_and_heads_that_keep_caches_run_dense_for_them(pattern: Pattern) -> None:
    pipe, grid, steps = tiny.wan(layers=3), TokenGrid(3, 4, 4), 6
    plan = plan_of(pipe, pattern, Drop(), Schedule(1, renew_every=2))
    first, second, third = plan.assignment
    some = {first: (Complement(),) * 2, second: (Drop(), Complement("float8"))}
    plan = replace(plan, remainders=some)
    with enable_sparse_attention(pipe, plan) as hook:
        output = tiny.generate(pipe, num_inference_steps=steps)
        report = hook.report()
    assert output.isfinite().all()
    # Renewals at steps 1, 3 and 5; a mass needs a dense pass of every head at the first of them.
    searched = 2 * (pattern is MASS)
    renewals = {layer.layer: layer.dense_calls.get("renewal", 0) for layer in report.layers}
    assert renewals == {first: 3 * 2, second: searched, third: searched}
    assert report.cache_bytes == 2 * plan.cache_bytes(grid)
    density = 2 / 6
    if pattern is not MASS:
        blocks = block_indices((pattern,), grid, block_q=8, block_k=8)
        density = blocks.density().weighted
    cached, dropped = 3 * (1 + density) + 2 * density, 5 * density
    search = 0.0
    if pattern is MASS:
        search, dropped = 3 * 0.5, 1 + 4 * density
    heads = 3 * cached + 3 * dropped + 6 * search
    assert report.flops == pytest.approx((6 * 1 + heads) / (6 * steps))


def test_staggered_layers_are_counted_where_something_is_renewed() -> None:
    pipe = tiny.wan(layers=4)
    plan = plan_of(pipe, Band(3), Drop(), Schedule(renew_every=2, stagger=True))
    # The second layer keeps nothing; the others are numbers 0, 1 and 2.
    layers = list(plan.assignment)
    cached = {layer: (Complement(),) * 2 for layer in (layers[0], layers[2], layers[3])}
    with enable_sparse_attention(pipe, replace(plan, remainders=cached)) as hook:
        tiny.generate(pipe, num_inference_steps=5)
        report = hook.report()
    renewals = [layer.dense_calls.get("renewal", 0) // 2 for layer in report.layers]
    assert renewals == [3, 0, 3, 3]
    plan = plan_of(pipe, Band(3), Complement(), Schedule(renew_every=2, stagger=True))
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe, num_inference_steps=4)
        report = hook.report()
    renewals = [layer.dense_calls.get("renewal", 0) // 2 for layer in report.layers]
    assert renewals == [2, 3, 2, 3]


def test_noise_levels_come_from_the_scheduler() -> None:
    pipe = tiny.wan()
    tiny.generate(pipe, num_inference_steps=6)
    sigmas = pipe.scheduler.sigmas[:6].tolist()
    level = (sigmas[1] + sigmas[2]) / 2
    plan = plan_of(pipe, Band(3), Drop(), Schedule(sigma_above=level))
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe, num_inference_steps=6)
        assert hook.report().dense_calls == {"dense steps of the schedule": 2 * 2 * 2}
    cog = tiny.cogvideox()
    plan = plan_of(cog, Band(3), Drop(), Schedule(sigma_above=0.5))
    with (
        enable_sparse_attention(cog, plan),
        pytest.raises(ValueError, match="dense above a noise level, which the scheduler does not"),
    ):
        tiny.generate(cog)


def test_without_a_pipeline_what_depends_on_the_step_is_refused() -> None:
    transformer = tiny.wan_transformer()
    plan = plan_of(transformer, MASS, Drop(), Schedule())
    with (
        enable_sparse_attention(transformer, plan),
        pytest.raises(ValueError, match="depends on the denoising step, which neither the pipeli"),
    ):
        transformer(**wan_inputs())


@PRODUCT
def test_G12_the_product_is_kept_in_the_file(
    pattern: Pattern, remainder: Remainder, tmp_path: Path
) -> None:
    schedule = Schedule(1, 2, 0.9, 3, (4, 5), 0.8, share_branches=True, stagger=True)
    pipe = tiny.wan()
    plan = plan_of(pipe, pattern, remainder, schedule, cache_limit=10**6)
    plan.save_pretrained(tmp_path / "plan")
    back = Plan.from_pretrained(tmp_path / "plan")
    assert back.digest == plan.digest
    assert back.assignment == plan.assignment
    assert back.remainders == plan.remainders
    assert (back.schedule, back.cache_limit) == (schedule, 10**6)
    other = plan_of(pipe, pattern, remainder, Schedule(1, 2), cache_limit=10**6)
    assert other.digest != plan.digest


def test_an_oracle_keeps_nothing_and_is_dearer_than_dense_attention() -> None:
    pipe = tiny.wan()
    plan = plan_of(pipe, Scored(Oracle(), TopRow(0.4)), Drop(), Schedule(1, renew_every=1))
    with enable_sparse_attention(pipe, plan) as hook:
        tiny.generate(pipe, num_inference_steps=5)
        report = hook.report()
    assert report.cache_bytes == plan.cache_bytes(TokenGrid(3, 4, 4)) == 0
    assert report.dense_calls == {"dense steps of the schedule": 2 * 2}
    assert report.flops == pytest.approx((1 + 4 * (1.5 + 2 / 6)) / 5)


def test_phases_run_one_plan_after_the_other() -> None:
    pipe = tiny.wan()
    patterns = (Band(3), Skip(), Band(5, "pixel_major"))
    single = [plan_of(pipe, pattern, Drop(), Schedule()) for pattern in patterns]
    phased = replace(
        single[0],
        later=(single[1].phases[0], single[2].phases[0]),
        schedule=Schedule(dense_first=1, phases=(0.4, 0.8)),
    )
    with enable_sparse_attention(pipe, phased) as hook:
        output = tiny.generate(pipe, num_inference_steps=5)
        report = hook.report()
        assert torch.equal(tiny.generate(pipe, num_inference_steps=5), output)
    assert report.dense_calls == {"dense steps of the schedule": 4}

    switched: list[SparseAttentionHook] = []

    def follow(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Change the plan by hand before step `step + 1`."""
        turns = {1: single[0], 2: single[1], 4: single[2]}
        if step + 1 in turns:
            if switched:
                switched[-1].disable()
            switched.append(enable_sparse_attention(pipe, turns[step + 1]))
        return tensors

    expected = tiny.generate(pipe, num_inference_steps=5, callback_on_step_end=follow)
    switched[-1].disable()
    assert len(switched) == 3
    assert torch.equal(output, expected)


@pytest.mark.parametrize("pattern", [MASS, CLUSTERED, Skip()], ids=str)
def test_a_phase_forgets_what_the_one_before_kept(pattern: Pattern) -> None:
    pipe = tiny.wan()
    both = plan_of(pipe, pattern, Complement(), Schedule(phases=(0.5,)))
    renewed = plan_of(pipe, pattern, Complement(), Schedule(renew_at=(3,)))
    outputs, reports = [], []
    for plan in (both, renewed):
        with enable_sparse_attention(pipe, plan) as hook:
            outputs.append(tiny.generate(pipe, num_inference_steps=6))
            reports.append(hook.report())
    # A second phase of the same patterns is a renewal; only what starts from where it was, the
    # clusters, comes out otherwise.
    assert torch.equal(*outputs) == (pattern is not CLUSTERED)
    assert reports[0].dense_calls == reports[1].dense_calls
    grid = TokenGrid(3, 4, 4)
    assert reports[0].cache_bytes == 2 * both.cache_bytes(grid)
    bare = replace(both, later=(plan_of(pipe, Band(3), Drop(), Schedule()).phases[0],))
    with enable_sparse_attention(pipe, bare) as hook:
        tiny.generate(pipe, num_inference_steps=6)
        assert hook.report().cache_bytes == 2 * both.cache_bytes(grid)
        assert hook.report().dense_calls == {"renewal": 4}


def test_a_plan_of_phases_needs_to_know_the_step() -> None:
    transformer = tiny.wan().transformer
    plan = plan_of(transformer, Band(3), Drop(), Schedule(phases=(0.5,)))
    with (
        enable_sparse_attention(transformer, plan),
        pytest.raises(ValueError, match="depends on the denoising step, which neither"),
    ):
        transformer(**wan_inputs())

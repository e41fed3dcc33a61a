"""The hook on whole pipelines and transformers of real families with random weights."""

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Pattern, Skip
from dit_sparse.kernels.remainder import Complement, Drop, Pooled
from dit_sparse.kernels.score import Sampled
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import TopRow
from dit_sparse.pipelines.family import transformers_of
from dit_sparse.pipelines.fingerprint import fingerprints
from dit_sparse.pipelines.heads import HeadGroup, head_groups
from dit_sparse.pipelines.hook import disable_sparse_attention, enable_sparse_attention
from dit_sparse.pipelines.plan import Plan, layer_paths
from tests import tiny
from tests.hooked import NEAR, processors, uniform, wan_inputs

Build = Callable[[], Any]
MIXED: tuple[Pattern, ...] = (
    NEAR,
    Band(5, "pixel_major"),
    Skip(),
    Columns((1,), 16, (3, 4, 4)),
)
PIPELINES = pytest.mark.parametrize(
    "build", [tiny.wan, lambda: tiny.wan(two_stage=True), tiny.cogvideox],
    ids=["wan", "wan-two-stage", "cogvideox"],
)  # fmt: skip


def mixed(pipe: Any, patterns: tuple[Pattern, ...] = MIXED) -> Plan:
    """Four heads of different patterns, in another sequence in every layer."""
    assignment = {
        layer: patterns[index:] + patterns[:index] for index, layer in enumerate(layer_paths(pipe))
    }
    return Plan(fingerprints(pipe), assignment, block=16)


# Bit-exactness -------------------------------------------------------------------------------


@PIPELINES
@pytest.mark.parametrize(
    ("pattern", "schedule"),
    [(Full(), ()), (Skip(), (4,)), (Skip(), (2, 2))],
    ids=["full", "dense-first", "dense-both-ends"],
)
def test_G11_a_dense_plan_is_bit_exact(
    build: Build, pattern: Pattern, schedule: tuple[int, ...]
) -> None:
    pipe = build()
    dense = tiny.generate(pipe)
    with enable_sparse_attention(pipe, uniform(pipe, pattern, *schedule)) as hook:
        assert torch.equal(tiny.generate(pipe), dense)
    report = hook.report()
    assert report.sparse_calls == 0
    assert report.density is not None
    assert report.density.element == report.density.block == 1.0
    assert sum(report.dense_calls.values()) >= 8


@PIPELINES
def test_G11_a_window_over_everything_is_dense_attention(build: Build) -> None:
    pipe = build()
    dense = tiny.generate(pipe)
    with enable_sparse_attention(pipe, uniform(pipe, Neighborhood((9, 9, 9)))) as hook:
        torch.testing.assert_close(tiny.generate(pipe), dense, rtol=0, atol=1e-5)
    assert not hook.report().dense_calls


@PIPELINES
def test_G11_disabling_restores_everything(build: Build) -> None:
    pipe = build()
    dense = tiny.generate(pipe)
    before = processors(pipe)
    parts = list(transformers_of(pipe).values())
    attributes = [set(vars(part)) for part in parts]
    weights = [list(part.state_dict()) for part in parts]
    hooks = [dict(part._forward_pre_hooks) for part in parts]

    enable_sparse_attention(pipe, uniform(pipe, NEAR))
    assert [list(part.state_dict()) for part in parts] == weights
    tiny.generate(pipe)
    disable_sparse_attention(pipe)

    after = processors(pipe)
    assert after.keys() == before.keys()
    assert all(after[path] is before[path] for path in before)
    assert all(vars(after[path]) == vars(before[path]) for path in before)
    assert [set(vars(part)) for part in parts] == attributes
    assert [dict(part._forward_pre_hooks) for part in parts] == hooks
    assert torch.equal(tiny.generate(pipe), dense)


def test_G11_only_self_attention_is_touched() -> None:
    pipe = tiny.wan()
    before = processors(pipe)
    with enable_sparse_attention(pipe, uniform(pipe, NEAR)):
        changed = {path for path, value in processors(pipe).items() if value is not before[path]}
        for path in changed:
            assert isinstance(processors(pipe)[path], type(before[path]))
    assert changed == set(layer_paths(pipe))


def test_G11_the_random_state_is_untouched() -> None:
    pipe = tiny.wan()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with enable_sparse_attention(pipe, mixed(pipe, MIXED[:2])) as hook:
        tiny.generate(pipe)
        hook.report()
    assert torch.equal(torch.get_rng_state(), state)


# Sparse outputs against masked attention -------------------------------------------------------


@contextmanager
def masked(plan: Plan, grid: TokenGrid, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dense attention under the masks of the plan, patched into diffusers, layer after layer."""
    masks = [
        torch.stack([pattern.mask(grid) for pattern in patterns])
        for patterns in plan.assignment.values()
    ]
    calls = iter(range(1_000_000))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = masks[next(calls) % len(masks)]
        logits = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0.0)
        return (weights @ value.double()).to(query.dtype)

    dispatch = vars(transformer_wan)["dispatch_attention_fn"]

    def wan(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape != key.shape:
            return dispatch(query, key, value, **options)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return attend(*heads_first).transpose(1, 2)

    functional = types.SimpleNamespace(**vars(F))
    functional.scaled_dot_product_attention = lambda q, k, v, **_: attend(q, k, v)
    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", wan)
        patch.setattr(attention_processor, "F", functional)
        yield


@pytest.mark.parametrize(
    ("build", "grid"),
    [
        (lambda: tiny.wan(layers=4, heads=4), TokenGrid(3, 4, 4)),
        (lambda: tiny.cogvideox(layers=4), TokenGrid(3, 4, 4, text_before=16)),
    ],
    ids=["wan", "cogvideox"],
)
def test_G6_heads_of_different_orders_match_masked_attention(
    build: Build, grid: TokenGrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = build()
    plan = mixed(pipe)
    enable_sparse_attention(pipe, uniform(pipe, Full())).disable()  # binds before the patch
    with masked(plan, grid, monkeypatch):
        expected = tiny.generate(pipe)
    with enable_sparse_attention(pipe, plan) as hook:
        output = tiny.generate(pipe)
    torch.testing.assert_close(output, expected, rtol=0, atol=2e-5)
    assert (output - tiny.generate(pipe)).abs().max() > 1e-3
    report = hook.report()
    kept = torch.stack([p.mask(grid).double().mean() for p in MIXED]).mean()
    assert report.density_sparse is not None
    assert report.density_sparse.element == pytest.approx(float(kept))
    assert report.density == report.density_sparse


def test_heads_are_grouped_by_order_and_full_heads_ride_along() -> None:
    def grouped(*patterns: Pattern) -> tuple[HeadGroup, ...]:
        return head_groups(patterns, (Drop(),) * len(patterns))

    assert grouped(Full(), Full()) == ()
    groups = grouped(Full(), NEAR, Band(2), Skip(), NEAR)
    assert [group.heads for group in groups] == [(0, 1, 3, 4), (2,)]
    assert groups[0].patterns == (Full(), NEAR, Skip(), NEAR)
    assert [group.heads for group in grouped(Skip(), Full())] == [(0, 1)]


def test_heads_of_different_remainders_and_scored_patterns_run_apart() -> None:
    scored = Scored(Sampled(), TopRow(0.5))
    patterns = (NEAR, scored, Skip(), NEAR, scored, Full(), Skip())
    remainders = (Drop(), Drop(), Complement(), Complement(), Drop(), Complement(), Drop())
    groups = head_groups(patterns, remainders)
    assert [(group.heads, group.remainder) for group in groups] == [
        ((0, 5, 6), Drop()),
        ((1, 4), Drop()),
        ((2, 3), Complement()),
    ]
    assert [group.scored for group in groups] == [None, scored, None]
    # What means a skipped head sees depends on the order.
    groups = head_groups((Skip(), Band(2, "pixel_major"), Band(2)), (Pooled(),) * 3)
    assert [group.heads for group in groups] == [(0, 2), (1,)]


# State -----------------------------------------------------------------------------------------


def test_G10_a_second_generation_is_as_in_a_fresh_process() -> None:
    pipe = tiny.wan()
    plan = uniform(pipe, NEAR, 1, 1)
    with enable_sparse_attention(pipe, plan) as hook:
        first = tiny.generate(pipe)
        assert hook.report().sparse_calls == 2 * 2 * 2
        other = tiny.generate(pipe, num_inference_steps=5, height=96, guidance_scale=1.0)
        assert hook.report().sparse_calls == 2 * 3
        assert torch.equal(tiny.generate(pipe), first)
    fresh = tiny.wan()
    with enable_sparse_attention(fresh, plan):
        assert torch.equal(
            tiny.generate(fresh, num_inference_steps=5, height=96, guidance_scale=1.0), other
        )


def test_G10_an_exception_in_the_middle_leaves_a_clean_state() -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    pipe = tiny.wan()
    plan = uniform(pipe, NEAR, 2)
    with enable_sparse_attention(pipe, plan) as hook:
        expected, report = tiny.generate(pipe), hook.report()
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(pipe, callback_on_step_end=stop)
        assert hook.report().sparse_calls == 1 * 2 * 2
        with pytest.raises(ValueError, match="refuses this grid"):
            fail_inside_attention(pipe, hook)
        assert hook.clock.now((1, 3, 4, 4)).branch == ""
        assert torch.equal(tiny.generate(pipe), expected)
        assert hook.report().layers == report.layers
    before = tiny.generate(pipe)
    with pytest.raises(RuntimeError, match="leave"), enable_sparse_attention(pipe, plan):
        raise RuntimeError("leave")
    assert torch.equal(tiny.generate(pipe), before)
    disable_refused(pipe)


def fail_inside_attention(pipe: Any, hook: Any) -> None:
    lists = hook._attention._lists
    original = lists._listed

    def fail(*_: object) -> None:
        raise ValueError("refuses this grid")

    lists._listed = fail
    try:
        tiny.generate(pipe)
    finally:
        lists._listed = original


def disable_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="sparse attention is not enabled on this pipeline"):
        disable_sparse_attention(pipe)


def test_G10_two_pipelines_in_threads_do_not_mix() -> None:
    pipes = [tiny.wan(), tiny.wan(), tiny.cogvideox()]
    plans = [uniform(p, pattern) for p, pattern in zip(pipes, (NEAR, Band(3), NEAR), strict=True)]
    hooks = [enable_sparse_attention(p, plan) for p, plan in zip(pipes, plans, strict=True)]
    alone = [tiny.generate(pipe) for pipe in pipes]
    calls = [hook.report().layers for hook in hooks]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(tiny.generate, pipes))
    assert all(map(torch.equal, together, alone))
    assert [hook.report().layers for hook in hooks] == calls
    assert not torch.equal(alone[0], alone[1])


def test_an_enabled_pipeline_that_is_forgotten_is_freed() -> None:
    pipe = tiny.wan()
    enable_sparse_attention(pipe, uniform(pipe, NEAR))
    tiny.generate(pipe)
    parts = [weakref.ref(pipe), weakref.ref(pipe.transformer)]
    del pipe
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_a_schedule_counts_the_steps_of_both_branches() -> None:
    pipe = tiny.wan()
    with enable_sparse_attention(pipe, uniform(pipe, NEAR, 2, 1)) as hook:
        tiny.generate(pipe, num_inference_steps=6)
    report = hook.report()
    assert report.sparse_calls == 3 * 2 * 2
    assert report.dense_calls == {"dense steps of the schedule": 3 * 2 * 2}
    assert report.density is not None
    assert report.density_sparse is not None
    assert report.density.element == pytest.approx((1 + report.density_sparse.element) / 2)
    assert [layer.layer for layer in report.layers] == list(layer_paths(pipe))
    assert report.seconds > 0
    assert "12 sparse self-attention calls" in str(report)


def test_wan_two_stage_runs_each_transformer_by_its_own_layers() -> None:
    pipe = tiny.wan(two_stage=True)
    with enable_sparse_attention(pipe, uniform(pipe, NEAR)) as hook:
        tiny.generate(pipe)
    calls = [layer.sparse_calls for layer in hook.report().layers]
    assert calls[0] == calls[1]
    assert calls[2] == calls[3]
    assert min(calls) > 0
    assert calls[0] + calls[2] == 4 * 2


# Refusals --------------------------------------------------------------------------------------


def test_a_plan_in_effect_is_not_replaced_silently() -> None:
    pipe = tiny.wan()
    disable_refused(pipe)
    with enable_sparse_attention(pipe, uniform(pipe, NEAR)) as hook:
        with pytest.raises(ValueError, match="sparse attention is enabled on this pipeline"):
            enable_sparse_attention(pipe, uniform(pipe, Skip()))
        hook.disable()
        hook.disable()
        with enable_sparse_attention(pipe, uniform(pipe, Skip())):
            pass


def test_G12_a_plan_for_another_model_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    pipe, other = tiny.wan(), tiny.wan(layers=3)
    before = processors(pipe)
    uniform(other, NEAR).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the plan is for another model"):
        enable_sparse_attention(pipe, tmp_path)
    assert processors(pipe) == before
    enable_sparse_attention(other, str(tmp_path)).disable()


def test_listed_columns_refuse_another_grid_and_name_the_layer() -> None:
    pipe = tiny.wan()
    with (
        enable_sparse_attention(pipe, uniform(pipe, Columns((1,), 16, (3, 4, 4)))),
        pytest.raises(ValueError, match=r"layer transformer\.blocks\.0\.attn1 .* was chosen on"),
    ):
        tiny.generate(pipe, height=96)


@torch.no_grad()
def test_an_unknown_step_is_an_error_only_where_the_schedule_needs_it() -> None:
    transformer = tiny.wan_transformer()
    inputs = wan_inputs()
    with enable_sparse_attention(transformer, uniform(transformer, NEAR)) as hook:
        transformer(**inputs)
        assert hook.report().sparse_calls == 2
    with (
        enable_sparse_attention(transformer, uniform(transformer, NEAR, 1)),
        pytest.raises(ValueError, match="what it does depends on the denoising step"),
    ):
        transformer(**inputs)
    pipe = tiny.Denoiser(transformer, steps=4)
    pipe.scheduler._step_index = 1
    with enable_sparse_attention(pipe, uniform(pipe, NEAR, 1)) as hook:
        transformer(**inputs)
    assert hook.report().sparse_calls == 2


def test_a_call_that_no_plan_describes_is_an_error() -> None:
    transformer = tiny.wan_transformer()
    attention, tokens = transformer.blocks[0].attn1, torch.zeros(1, 48, 24)
    with enable_sparse_attention(transformer, uniform(transformer, NEAR)):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn1 .* came with an attention mask"):
            attention(tokens, None, torch.ones(1, 1, 48, 48, dtype=torch.bool))
        with pytest.raises(ValueError, match="so it is not self-attention"):
            attention(tokens, tokens[:, :8])
        with pytest.raises(ValueError, match="came 48 tokens"):
            attention(tokens)
        attention.processor._parallel_config = object()
        with pytest.raises(ValueError, match="context parallelism is enabled"):
            attention(tokens)

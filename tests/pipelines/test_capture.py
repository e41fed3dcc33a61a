from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full
from dit_sparse.pipelines.capture import AttentionSite, observe_attention, observed_grid
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan, layer_paths
from tests import tiny


def ignore(*_: object) -> None:
    """An observer that keeps nothing."""


def test_the_observed_output_is_bit_identical_and_every_call_is_seen() -> None:
    pipe = tiny.wan()
    dense = tiny.generate(pipe)
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    seen: list[tuple[AttentionSite, str, int, int, TokenGrid]] = []
    with observe_attention(pipe, lambda *call: seen.append(call[:5])):
        assert torch.equal(tiny.generate(pipe), dense)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    expected = [
        (AttentionSite("transformer", f"blocks.{layer}.attn1", layer), branch, step, 4)
        for step in range(4)
        for branch in ("cond", "uncond")
        for layer in range(2)
    ]
    assert [call[:4] for call in seen] == expected
    assert {call[4] for call in seen} == {TokenGrid(3, 4, 4)}
    assert {call[0].name for call in seen} == set(layer_paths(pipe))


def test_query_key_and_value_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.wan()
    observed: list[Tensor] = []
    with observe_attention(pipe, lambda *call: observed.extend(x.clone() for x in call[5:])):
        tiny.generate(pipe)
    model: list[Tensor] = []
    dispatch = vars(transformer_wan)["dispatch_attention_fn"]

    def record(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape == key.shape:
            model.extend(x.clone() for x in (query, key, value))
        return dispatch(query, key, value, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", record)
    tiny.generate(pipe)
    assert len(observed) == len(model) == 3 * 16
    assert all(map(torch.equal, observed, model))
    assert observed[0].shape == (1, 48, 2, 12)


def test_joint_text_and_batched_guidance_are_seen_as_they_are() -> None:
    pipe = tiny.cogvideox()
    calls: list[tuple[Any, ...]] = []
    with observe_attention(pipe, lambda *call: calls.append(call)):
        tiny.generate(pipe)
    assert {(call[1], call[3], call[4]) for call in calls} == {
        ("cond_uncond", 4, TokenGrid(3, 4, 4, text_before=16))
    }
    assert [call[2] for call in calls] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {call[5].shape for call in calls} == {(2, 64, 4, 16)}


def test_an_error_of_the_observer_leaves_the_pipeline_as_it_was() -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("full")

    pipe = tiny.wan()
    dense = tiny.generate(pipe)
    with pytest.raises(RuntimeError, match="full"), observe_attention(pipe, fail):
        tiny.generate(pipe)
    assert torch.equal(tiny.generate(pipe), dense)


def test_only_dense_runs_are_observed() -> None:
    pipe = tiny.wan()
    plan = Plan.uniform(pipe, Full())
    with (
        enable_sparse_attention(pipe, plan),
        pytest.raises(ValueError, match="sparse attention is enabled"),
        observe_attention(pipe, ignore),
    ):
        pass
    with observe_attention(pipe, ignore), pytest.raises(ValueError, match="leave the observer"):
        enable_sparse_attention(pipe, plan)


def test_a_bare_transformer_does_not_know_its_step() -> None:
    transformer = tiny.wan_transformer()
    with (
        observe_attention(transformer, ignore),
        pytest.raises(ValueError, match="the denoising step cannot be told"),
    ):
        transformer(torch.zeros(1, 16, 3, 8, 8), torch.tensor([1]), torch.zeros(1, 16, 32))


def test_the_grid_of_a_run_is_read_off_its_first_call() -> None:
    pipe = tiny.wan()
    expected = tiny.generate(pipe)
    state = torch.get_rng_state()
    assert observed_grid(pipe, height=96, width=64, num_frames=5) == TokenGrid(2, 6, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(tiny.generate(pipe), expected)
    cog = observed_grid(
        tiny.cogvideox(), height=64, width=64, num_frames=9, max_sequence_length=16
    )
    assert cog == TokenGrid(3, 4, 4, text_before=16)

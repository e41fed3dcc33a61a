"""The hook beside other features of diffusers: fused projections, backends, copies, gradients."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.pattern import Full, Skip
from dit_sparse.pipelines.hook import disable_sparse_attention, enable_sparse_attention
from tests import tiny
from tests.hooked import NEAR, processors, uniform, wan_inputs


def test_fusing_projections_after_enabling_keeps_the_plan_in_effect() -> None:
    pipe, fused_first = tiny.cogvideox(), tiny.cogvideox()
    plan = uniform(pipe, NEAR)
    fused_first.transformer.fuse_qkv_projections()
    with enable_sparse_attention(fused_first, plan):
        expected = tiny.generate(fused_first)

    unfused = processors(pipe)
    hook = enable_sparse_attention(pipe, plan)
    pipe.transformer.fuse_qkv_projections()
    with pytest.warns(UserWarning, match="processors of 2 layers.* were replaced"):
        assert torch.equal(tiny.generate(pipe), expected)
    assert hook.report().sparse_calls == 2 * 4
    pipe.transformer.unfuse_qkv_projections()  # puts our copies of before the fusion back
    with pytest.warns(UserWarning, match="were replaced"):
        tiny.generate(pipe)
    hook.disable()
    assert processors(pipe) == unfused


def test_a_rebound_processor_kept_elsewhere_is_inert_after_disabling() -> None:
    pipe = tiny.wan()
    dense = tiny.generate(pipe)
    hook = enable_sparse_attention(pipe, uniform(pipe, Skip()))
    kept = pipe.transformer.attn_processors
    hook.disable()
    pipe.transformer.set_attn_processor(dict(kept))
    assert torch.equal(tiny.generate(pipe), dense)
    with enable_sparse_attention(pipe, uniform(pipe, Skip())) as hook:
        tiny.generate(pipe)
    assert hook.report().sparse_calls == 16


def test_fused_wan_projections_work_in_both_orders() -> None:
    pipe, fused_first = tiny.wan(), tiny.wan()
    fused_first.transformer.fuse_qkv_projections()
    with enable_sparse_attention(fused_first, uniform(pipe, NEAR)):
        expected = tiny.generate(fused_first)
    with enable_sparse_attention(pipe, uniform(pipe, NEAR)):
        pipe.transformer.fuse_qkv_projections()
        assert torch.equal(tiny.generate(pipe), expected)


def test_the_attention_backend_set_while_enabled_is_kept() -> None:
    transformer = tiny.wan_transformer()
    original = transformer.blocks[0].attn1.processor
    with enable_sparse_attention(transformer, uniform(transformer, NEAR)):
        for block in transformer.blocks:
            block.attn1.processor._attention_backend = "native"
    assert transformer.blocks[0].attn1.processor is original
    assert original._attention_backend == "native"


@torch.no_grad()
def test_a_deep_copy_of_an_enabled_transformer_is_enabled_by_itself() -> None:
    transformer = tiny.wan_transformer()
    dense = transformer(**wan_inputs())[0]
    hook = enable_sparse_attention(transformer, uniform(transformer, NEAR))
    sparse = transformer(**wan_inputs())[0]
    twin = copy.deepcopy(transformer)
    sites = [model.blocks[0].attn1.processor._sparse_site for model in (transformer, twin)]
    assert int(sites[0].handle) != int(sites[1].handle)
    assert torch.equal(twin(**wan_inputs())[0], sparse)
    assert hook.report().sparse_calls == 2
    disable_sparse_attention(twin)
    assert torch.equal(twin(**wan_inputs())[0], dense)
    assert torch.equal(transformer(**wan_inputs())[0], sparse)


def test_a_saved_model_does_not_know_of_the_plan(tmp_path: Path) -> None:
    pipe = tiny.wan()
    with enable_sparse_attention(pipe, uniform(pipe, NEAR)):
        pipe.transformer.save_pretrained(tmp_path / "enabled")
    pipe.transformer.save_pretrained(tmp_path / "disabled")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        enabled, disabled = tmp_path / "enabled" / name, tmp_path / "disabled" / name
        assert enabled.read_bytes() == disabled.read_bytes()


def test_gradients_flow_through_a_dense_plan() -> None:
    transformer = tiny.wan_transformer()
    weight = transformer.blocks[0].attn1.to_q.weight

    def gradient() -> Tensor:
        transformer.zero_grad()
        transformer(**wan_inputs())[0].square().sum().backward()
        return weight.grad.clone()

    expected = gradient()
    with enable_sparse_attention(transformer, uniform(transformer, Full())):
        assert torch.equal(gradient(), expected)

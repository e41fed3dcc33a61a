"""Rebinding, and the seam under torch.compile."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor

from dit_sparse.kernels.pattern import Neighborhood
from dit_sparse.pipelines.hook import enable_sparse_attention
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.pipelines.seam import original_of, rebind, rebindable, restore
from tests import tiny

STEPS = range(3)
SITE: Any = object()


@pytest.mark.parametrize(
    "processor_class", [WanAttnProcessor, CogVideoXAttnProcessor2_0, FluxAttnProcessor]
)
def test_a_rebound_processor_is_a_copy_of_its_class(processor_class: type) -> None:
    processor = processor_class()
    rebound = rebind(processor, SITE)
    assert isinstance(rebound, processor_class)
    assert rebound is not processor
    assert rebound._sparse_site is SITE
    assert type(rebound).__name__ == processor_class.__name__
    assert inspect.signature(rebound.__call__) == inspect.signature(processor.__call__)
    assert type(rebind(processor_class(), SITE)) is type(rebound)
    assert vars(processor) == {}

    rebound._attention_backend = "native"
    assert original_of(rebound) is processor
    assert restore(rebound) is processor
    assert vars(processor) == {"_attention_backend": "native"}


def test_a_processor_without_a_seam_is_refused() -> None:
    class Linear:
        def __call__(self, attention: Any, hidden_states: Tensor) -> Tensor:
            return hidden_states

    assert rebindable(WanAttnProcessor())
    assert not rebindable(Linear())
    with pytest.raises(ValueError, match="expected an attention processor that calls"):
        rebind(Linear(), SITE)
    transformer = tiny.wan_transformer()
    plan = Plan.uniform(transformer, Neighborhood((1, 3, 3)))
    transformer.blocks[1].attn1.processor = Linear()
    first = transformer.blocks[0].attn1.processor
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 .* Linear calls no attention seam"):
        enable_sparse_attention(transformer, plan)
    assert transformer.blocks[0].attn1.processor is first


def wan_inputs() -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(1, 16, 3, 8, 8), "timestep": torch.tensor([500])}


def cogvideox_inputs() -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": torch.tensor([500])}


@pytest.mark.parametrize(
    ("build", "inputs", "regional", "graphs_without"),
    [
        (tiny.wan_transformer, wan_inputs, True, 1),
        # CogVideoX's blocks hand on text of other strides than the first block receives.
        (tiny.cogvideox_transformer, cogvideox_inputs, True, 2),
        (tiny.cogvideox_transformer, cogvideox_inputs, False, 1),
    ],
    ids=["wan-blocks", "cogvideox-blocks", "cogvideox-whole"],
)
def test_compiled_without_breaks_or_graphs_of_its_own(
    build: Callable[..., Any],
    inputs: Callable[[], dict[str, Tensor]],
    regional: bool,
    graphs_without: int,
) -> None:
    """Ten layers are more than Dynamo's limit of recompilations, so layers must share a graph;
    steps must too, although the plan runs the first one dense."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    transformer = build(layers=10)
    arguments = inputs() | {"encoder_hidden_states": torch.randn(1, 16, 32)}
    pipe = tiny.Denoiser(transformer, len(STEPS))
    plan = Plan.uniform(pipe, Neighborhood((1, 3, 3)), Schedule(1), block=16)

    def run() -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for step in STEPS:
                pipe.scheduler._step_index = step
                outputs.append(transformer(**arguments, return_dict=False)[0])
        return outputs

    dense = run()
    with enable_sparse_attention(pipe, plan):
        eager = run()
    graphs = []

    def compiler(graph: Any, example: object) -> Any:
        graphs.append(graph)
        return graph.forward

    blocks = getattr(transformer, "blocks", None) or transformer.transformer_blocks
    for module in blocks if regional else [transformer]:
        module.compile(backend=compiler, fullgraph=True)
    with enable_sparse_attention(pipe, plan) as hook:
        compiled = run()
    assert len(graphs) == graphs_without
    assert all(map(torch.equal, compiled, eager))
    assert torch.equal(compiled[0], dense[0])
    assert not torch.equal(compiled[1], dense[1])
    report = hook.report()
    assert report.sparse_calls == 2 * 10
    assert report.dense_calls == {"dense steps of the schedule": 10}
    assert all(map(torch.equal, run(), dense))

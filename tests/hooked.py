"""What the tests of the hook share: plans for tiny pipelines, and what they look at."""

from typing import Any

import torch

from dit_sparse.kernels.pattern import Neighborhood, Pattern
from dit_sparse.pipelines.family import transformers_of
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule

NEAR = Neighborhood((1, 3, 3))


def uniform(pipe: Any, pattern: Pattern, first: int = 0, last: int = 0) -> Plan:
    return Plan.uniform(pipe, pattern, Schedule(first, last), block=16)


def processors(pipe: Any) -> dict[str, Any]:
    return {
        f"{component}.{path}": module.processor
        for component, transformer in transformers_of(pipe).items()
        for path, module in transformer.named_modules()
        if hasattr(module, "processor")
    }


def wan_inputs(height: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 3, height, 8, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "return_dict": False,
    }

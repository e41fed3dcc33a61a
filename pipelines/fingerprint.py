"""ModelFingerprint: what must agree between the model of a plan and the model it runs on.

Weights are not part of it: a fine-tuned or quantized model of the same shape keeps its plan.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from dit_sparse.pipelines.family import family_of, transformers_of

PRIVATE = ("_", "quantization_config")


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """Shape and configuration of one transformer.

    Args:
        transformer (`str`): name of its diffusers class.
        layers (`int`): number of self-attention modules.
        heads (`int`): heads of each.
        head_dim (`int`): channels of each head.
        config (`str`): sha256 of its configuration, hexadecimal.
    """

    transformer: str
    layers: int
    heads: int
    head_dim: int
    config: str

    def difference(self, other: "ModelFingerprint") -> str | None:
        """The first field in which the two differ, in words; `None` if they agree."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} is {mine} in the plan and {theirs} in the model"
        return None


def fingerprint(transformer: nn.Module) -> ModelFingerprint:
    """The fingerprint of one diffusers transformer."""
    config: Any = transformer.config
    public = {key: value for key, value in dict(config).items() if not key.startswith(PRIVATE)}
    canonical = json.dumps(public, sort_keys=True, separators=(",", ":"), default=str)
    return ModelFingerprint(
        transformer=type(transformer).__name__,
        layers=len(family_of(transformer).attention_modules(transformer)),
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        config=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def fingerprints(pipe: Any) -> dict[str, ModelFingerprint]:
    """The fingerprint of every denoising transformer of a pipeline, by component name."""
    return {name: fingerprint(module) for name, module in transformers_of(pipe).items()}

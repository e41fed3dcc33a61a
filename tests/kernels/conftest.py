"""Oracles: attention written out in float64, sharing no code with the package."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def masked_attention() -> Attention:
    """(query, key, value, visible) -> (output, lse); visible bool, broadcast to `[b, h, i, j]`."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (x.double().permute(0, 2, 1, 3) for x in (query, key, value))
        logits = query @ key.mT / query.shape[-1] ** 0.5
        weights = torch.where(visible, (logits - logits.amax(-1, keepdim=True)).exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        output = torch.where(total > 0, weights @ value / total, 0.0)
        lse = torch.where(total > 0, total.log() + logits.amax(-1, keepdim=True), -torch.inf)
        return output.permute(0, 2, 1, 3), lse[..., 0]

    return attend


@pytest.fixture(scope="session")
def operands() -> Callable[..., list[Tensor]]:
    """(tokens, heads, head_dim, batch, spread, dtype, seed) -> query, key, value."""

    def draw(
        tokens: int,
        heads: int,
        head_dim: int = 40,
        batch: int = 2,
        spread: float = 1.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = 3, batch, tokens, heads, head_dim
        query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return [x.to(dtype) for x in (query * spread, key * spread, value)]

    return draw

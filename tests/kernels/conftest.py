"""Oracles: attention written out in float64, sharing no code with the package."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Operands = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="session")
def masked_attention() -> Attention:
    """(query, key, value, visible) -> (output, lse); visible bool, broadcast to `[b, h, i, j]`."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        query, key, value = (x.double().permute(0, 2, 1, 3) for x in (query, key, value))
        logits = (query @ key.mT / query.shape[-1] ** 0.5).where(visible, -torch.inf)
        seen = visible.any(-1, keepdim=True)
        largest = logits.amax(-1, keepdim=True).where(seen, 0.0)
        weights = (logits - largest).exp()
        total = weights.sum(-1, keepdim=True)
        output = (weights @ value / total).where(seen, 0.0)
        lse = total.log() + largest
        return output.permute(0, 2, 1, 3), lse[..., 0]

    return attend


@pytest.fixture(scope="session")
def operands() -> Operands:
    """(tokens, heads, head_dim, batch, spread, dtype, seed) -> query, key, value."""

    def draw(
        tokens: int,
        heads: int,
        head_dim: int = 40,
        batch: int = 2,
        spread: float = 1.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shape = 3, batch, tokens, heads, head_dim
        query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (query * spread).to(dtype), (key * spread).to(dtype), value.to(dtype)

    return draw

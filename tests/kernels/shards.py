"""Shards of one grid, the operands of each, and the pairs that patterns keep of them."""

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    Skip,
)
from dit_sparse.kernels.shard import Shard

GRID = TokenGrid(3, 5, 7, text_before=4, text_after=9)
PATTERNS: list[Pattern] = [
    Full(),
    Skip(),
    Band(11),
    Band(3, "pixel_major"),
    Columns((1, 3), 16, (3, 5, 7)),
    Neighborhood((2, 3, 3)),
    Neighborhood((2, 4, 3), (2, 1, 2), (1, 1, 2), (True, False, True)),
    Radial("repo", 0.5),
    AnyOf((Band(5, "pixel_major"), Sink())),
]
RANK = Shard(((2, 4), (30, 67), (113, 116)))
HALF = Shard(((4, 52), (109, 114)))
VIDEO, TEXT = Shard(((4, 109),)), Shard(((0, 4), (109, 118)))
SHARDS = [
    pytest.param(RANK, None, id="a rank's queries"),
    pytest.param(None, HALF, id="half the keys"),
    pytest.param(RANK, HALF, id="some of both"),
    pytest.param(HALF, RANK, id="others of both"),
    pytest.param(VIDEO, TEXT, id="video to text"),
    pytest.param(TEXT, VIDEO, id="text to video"),
    pytest.param(Shard(((50, 51),)), None, id="one query"),
    pytest.param(None, Shard(((50, 51),)), id="one key"),
]
every_shard = pytest.mark.parametrize(("queries", "keys"), SHARDS)


def held(shard: Shard | None, grid: TokenGrid) -> list[int]:
    if shard is None:
        return list(range(grid.tokens))
    return [token for first, stop in shard.runs for token in range(first, stop)]


def draw(
    queries: list[int], keys: list[int], heads: int, operands, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of shards of whole tensors; values lie heads first."""
    query, key, value = operands(GRID.tokens, heads, dtype=dtype)
    value = value.transpose(1, 2).contiguous().transpose(1, 2)
    return query[:, queries], key[:, keys], value[:, keys]


def kept_by(
    patterns: list[Pattern], grid: TokenGrid, queries: list[int], keys: list[int]
) -> Tensor:
    """Pairs that patterns keep, bool `[batch or 1, heads, queries, keys]`."""
    visible = torch.stack([pattern.mask(grid) for pattern in patterns])
    visible = visible.expand(len(grid.valid_text or (0,)), -1, -1, -1).clone()
    for sample, valid in enumerate(grid.valid_text or ()):
        visible[sample, :, :, grid.invalid_text(valid)] = False
    return visible[:, :, queries][:, :, :, keys]

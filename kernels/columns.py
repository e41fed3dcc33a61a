"""Columns: keys that every query sees, chosen by a search or because they come first."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels.definition import Definition, Triple, by, shape, video_index, with_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster
from dit_sparse.kernels.windows import Windows, windows


@dataclass(frozen=True, slots=True)
class Columns(Definition):
    """A set of key blocks that every query sees: the vertical stripes of Sparse-vDiT.

    `blocks` are indices of runs of `block` video tokens in raster order. They were chosen by
    looking at one grid, so another grid is refused.
    """

    kind: ClassVar[str] = "columns"
    blocks: tuple[int, ...]
    block: int
    grid: Triple

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1 token, got {self.block}")
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise ValueError(
                f"grid must be (frames, height, width), each at least 1, got {self.grid}"
            )
        blocks, count = self.blocks, self._count
        ascending = bool(blocks) and list(blocks) == sorted(set(blocks))
        if not ascending or blocks[0] < 0 or blocks[-1] >= count:
            raise ValueError(
                f"blocks must be different, ascending indices in 0..{count - 1} for grid "
                f"{by(self.grid)} and block {self.block}, got {self.blocks}"
            )

    @property
    def order(self) -> TokenOrder:
        return raster()

    def refusal(self, grid: TokenGrid) -> str | None:
        if grid.shape == self.grid:
            return None
        return (
            f"{self} was chosen on grid {by(self.grid)} and says nothing about "
            f"{by(grid.shape)}; search again on this grid"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        seen = self._chosen(grid, keys).expand(shape(queries, keys))
        return with_text(grid, queries, keys, seen)

    def windows(self, grid: TokenGrid) -> Windows:
        chosen = self._chosen(grid, torch.arange(grid.tokens))
        return windows([(torch.tensor(1), 1, chosen)])

    @property
    def _count(self) -> int:
        return -(-math.prod(self.grid) // self.block)

    def _chosen(self, grid: TokenGrid, keys: Tensor) -> Tensor:
        """Whether each key lies in a chosen block, for video tokens."""
        chosen = torch.zeros(self._count, dtype=torch.bool)
        chosen[list(self.blocks)] = True
        return chosen.to(keys.device)[video_index(grid, keys) // self.block]

    def __str__(self) -> str:
        return f"columns {len(self.blocks)}/{self._count}"


@dataclass(frozen=True, slots=True)
class Sink(Definition):
    """The tokens of the first `frames` frames, which every query sees.

    Meant to go with another pattern, as in `AnyOf((Band(64), Sink()))`: the first-frame sink of
    Sparse VideoGen (arXiv 2502.01776) and of Radial Attention (arXiv 2506.19852). Its tokens are
    those of the video, whatever the order of the other pattern.
    """

    kind: ClassVar[str] = "sink"
    frames: int = 1

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        frame, _, _ = grid.coordinates(keys)
        seen = (frame < self.frames).expand(shape(queries, keys))
        return with_text(grid, queries, keys, seen)

    def windows(self, grid: TokenGrid) -> Windows:
        frame, _, _ = grid.coordinates(torch.arange(grid.tokens))
        return windows([(torch.tensor(0), min(self.frames, grid.frames), frame)])

    def __str__(self) -> str:
        return f"sink {self.frames}"

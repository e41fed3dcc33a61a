"""Definition: what every pattern derives from its `pairs`, and what patterns are written with.

A pattern is a frozen value. `pairs` is its definition, in raster token coordinates; block lists,
kernels and tests all derive from it. Text queries see every key and text keys are seen by every
query, except by a head that is skipped.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.windows import Windows

Triple = tuple[int, int, int]


class Definition(ABC):
    """What every pattern derives from its `pairs`."""

    __slots__ = ()
    kind: ClassVar[str]

    @property
    def order(self) -> TokenOrder | None:
        """The order in which the pattern touches few blocks; `None` if any will do."""
        return None

    @abstractmethod
    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether each query sees each key: raster tokens int64 `[..., n, 1]` and
        `[..., 1, m]` in, bool `[..., n, m]` out."""

    def windows(self, grid: TokenGrid) -> Windows | None:
        """The same as intervals, for the pairs of video tokens; `None` if it is made of none."""
        return None

    def refusal(self, grid: TokenGrid) -> str | None:
        """Why the pattern cannot be used on `grid`, or `None`."""
        return None

    def rows(self, grid: TokenGrid, queries: Tensor) -> Tensor:
        """Which keys each of `queries` (raster tokens, int64 `[n]`) sees: bool `[n, tokens]`."""
        keys = torch.arange(grid.tokens, device=queries.device)
        return self.pairs(grid, queries[:, None], keys[None, :])

    def mask(self, grid: TokenGrid) -> Tensor:
        """The whole definition, bool `[tokens, tokens]`, queries first; for tests and plots."""
        return self.rows(grid, torch.arange(grid.tokens))


def with_text(grid: TokenGrid, queries: Tensor, keys: Tensor, video: Tensor) -> Tensor:
    """The pairs `video` and all those of text tokens."""
    if not grid.text:
        return video
    return video | is_text(grid, queries) | is_text(grid, keys)


def video_rows(grid: TokenGrid, queries: Tensor, video: Tensor) -> Tensor:
    """Rows `[n, tokens]` from those of the video keys alone, `[n, video]`."""
    if not grid.text:
        return video
    seen = queries.new_ones(len(queries), grid.tokens, dtype=torch.bool)
    seen[:, grid.text_before : grid.text_before + grid.video] = video
    return seen | is_text(grid, queries)[:, None]


def is_text(grid: TokenGrid, tokens: Tensor) -> Tensor:
    """Whether raster `tokens` are text."""
    return (tokens < grid.text_before) | (tokens >= grid.text_before + grid.video)


def video_index(grid: TokenGrid, tokens: Tensor) -> Tensor:
    """Place of raster `tokens` among the video tokens; some place of video for text tokens."""
    return (tokens - grid.text_before).clamp(0, grid.video - 1)


def shape(queries: Tensor, keys: Tensor) -> torch.Size:
    """Shape of the pairs of `queries` and `keys`."""
    return torch.broadcast_shapes(queries.shape, keys.shape)


def by(sizes: tuple[int, ...]) -> str:
    """`sizes` as people write them: 5x9x9."""
    return "x".join(map(str, sizes))

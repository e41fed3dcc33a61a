"""Band: keys at most so many tokens away, counted in one of three ways."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.definition import Definition, with_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster
from dit_sparse.kernels.windows import Windows, windows

AxisOrder = Literal["raster", "pixel_major", "in_frame"]


@dataclass(frozen=True, slots=True)
class Band(Definition):
    """Keys at most `half_width` tokens away in `axis_order`.

    * `raster`: the neighborhood in the same and the next frames (the spatial heads of Sparse
      VideoGen, arXiv 2502.01776, and the diagonal mode of Sparse-vDiT, arXiv 2506.03065).
    * `pixel_major`: the same place in all frames (temporal heads, multi-diagonal mode).
    * `in_frame`: raster distance inside a frame, in every frame alike (Re-ttention, arXiv
      2505.22918). Like the others it is cut off at the ends, here those of a frame.
    """

    kind: ClassVar[str] = "band"
    half_width: int
    axis_order: AxisOrder = "raster"

    def __post_init__(self) -> None:
        if self.half_width < 0:
            raise ValueError(f"half_width must not be negative, got {self.half_width}")
        if self.axis_order not in get_args(AxisOrder):
            raise ValueError(
                f"axis_order must be 'raster', 'pixel_major' or 'in_frame', "
                f"got {self.axis_order!r}"
            )

    @classmethod
    def of_density(cls, density: float, grid: TokenGrid, order: AxisOrder = "raster") -> "Band":
        """The band that keeps a share `density` of the video-to-video pairs.

        Its half width is `n * (1 - sqrt(1 - density))`, rounded, over `n` video tokens, or those
        of a frame for `in_frame` (arXiv 2502.01776).
        """
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        tokens = grid.height * grid.width if order == "in_frame" else grid.video
        return cls(round(tokens * (1 - math.sqrt(1 - density))), order)

    @classmethod
    def retention(cls, kappa: float, grid: TokenGrid) -> "Band":
        """The mask of Re-ttention (arXiv 2505.22918): a window of `kappa` of a frame's tokens,
        repeated in all frames; on an image, a band of raster order.

        >>> Band.retention(0.03125, TokenGrid(13, 30, 45, text_before=226))
        Band(half_width=21, axis_order='in_frame')
        """
        if not 0 < kappa <= 1:
            raise ValueError(f"kappa must be in (0, 1], got {kappa}")
        return cls(int(grid.height * grid.width * kappa) // 2, "in_frame")

    @property
    def order(self) -> TokenOrder:
        return raster() if self.axis_order == "raster" else pixel_major()

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        distance = self._position(grid, queries) - self._position(grid, keys)
        return with_text(grid, queries, keys, distance.abs_() <= self._reach(grid))

    def windows(self, grid: TokenGrid) -> Windows:
        position, reach = self._position(grid, torch.arange(grid.tokens)), self._reach(grid)
        return windows([(position - reach, 2 * reach + 1, position)])

    def _reach(self, grid: TokenGrid) -> int:
        return min(self.half_width, grid.tokens)

    def _position(self, grid: TokenGrid, tokens: Tensor) -> Tensor:
        if self.axis_order == "raster":
            return tokens.to(torch.int32)
        frame, row, column = grid.coordinates(tokens)
        pixel = row * grid.width + column
        if self.axis_order == "in_frame":
            return pixel.to(torch.int32)
        return (pixel * grid.frames + frame).to(torch.int32)

    def __str__(self) -> str:
        return f"band {self.half_width} {self.axis_order.replace('_', '-')}"

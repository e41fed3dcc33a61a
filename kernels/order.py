"""TokenOrder: the sequence in which tokens are cut into blocks.

Attention does not depend on the order of its tokens, so an order is free to put tokens that are
near in the video into the same block. Text keeps its place, in blocks of its own; nothing is
padded: the last block of a stretch is short.

Permutations are kept by order, grid and device, and shared by all lists of blocks that ask for the
same (`ORDERS`).
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.gilbert import gilbert_walk
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.kept import Kept

ORDERS = Kept(64 << 20)
"""Permutations, and what devices have of them; 70 orders of HunyuanVideo at 720p."""


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """An order of the video tokens.

    * `raster`: frame by frame, as the model has them.
    * `pixel_major`: all frames of one pixel side by side (Sparse VideoGen, arXiv 2502.01776,
      section 3.2), so that a band joins the same place of all frames.
    * `tile`: boxes of `tile` tokens, each cut into blocks of its own (Sliding Tile Attention,
      arXiv 2502.04507). Tiles at the far borders are smaller.
    * `gilbert`: a generalized Hilbert curve (Pyramid Sparse Attention, arXiv 2512.04025), so that
      every run of tokens is a compact piece of the video; see gilbert.py.
    """

    kind: Literal["raster", "pixel_major", "tile", "gilbert"] = "raster"
    tile: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("raster", "pixel_major", "tile", "gilbert"):
            raise ValueError(
                f"order must be raster, pixel_major, tile or gilbert, got {self.kind!r}"
            )
        if (self.kind == "tile") != (self.tile is not None):
            raise ValueError(
                f"order {self.kind} came with tile={self.tile}; the tile order needs a tile "
                "of (frames, height, width) tokens, the others take none"
            )
        if self.tile is not None and (len(self.tile) != 3 or min(self.tile) < 1):
            raise ValueError(f"tile must be three counts of at least 1, got {self.tile}")

    def permutation(self, grid: TokenGrid) -> Tensor:
        """Raster token at each position of the sequence, int64 `[tokens]` on the CPU; not to be
        written to."""
        geometry = replace(grid, valid_text=None)
        return ORDERS.get((self, geometry), lambda: self._permutation(grid))

    def _permutation(self, grid: TokenGrid) -> Tensor:
        before = torch.arange(grid.text_before)
        after = torch.arange(grid.text_before + grid.video, grid.tokens)
        return torch.cat([before, grid.text_before + self._video(grid), after])

    def offsets(self, grid: TokenGrid, block: int, held: Tensor | None = None) -> Tensor:
        """First position of each block and, at the end, `tokens`; int64 `[blocks + 1]`.

        Blocks hold at most `block` tokens and none is empty. `held`, bool `[tokens]`, says which
        positions there are; what is left of a stretch is cut as the stretch would be.
        """
        if block < 1:
            raise ValueError(f"a block must hold at least 1 token, got {block}")
        stretches = [grid.text_before, *self._stretches(grid), grid.text_after]
        if held is not None:
            stretches = [int(part.sum()) for part in held.split(stretches)]
        starts = [0]
        for length in stretches:
            starts += [starts[-1] + min(cut, length) for cut in _cuts(length, block)]
        return torch.tensor(starts)

    def _video(self, grid: TokenGrid) -> Tensor:
        raster = rearrange(
            torch.arange(grid.video), "(t h w) -> t h w", t=grid.frames, h=grid.height
        )
        if self.kind == "gilbert":
            frame, row, column = gilbert_walk(*grid.shape).unbind(1)
            return raster[frame, row, column]
        if self.tile is None:
            pattern = "t h w -> (t h w)" if self.kind == "raster" else "t h w -> (h w t)"
            return rearrange(raster, pattern)
        frames, height, width = self.tile
        boxes = (
            box
            for slab in raster.split(frames, dim=0)
            for row in slab.split(height, dim=1)
            for box in row.split(width, dim=2)
        )
        return torch.cat([rearrange(box, "t h w -> (t h w)") for box in boxes])

    def _stretches(self, grid: TokenGrid) -> list[int]:
        """Lengths of the runs of video tokens that share no block with one another."""
        if self.tile is None:
            return [grid.video]
        sides = [
            [min(step, length - start) for start in range(0, length, step)]
            for length, step in zip(grid.shape, self.tile, strict=True)
        ]
        return [t * h * w for t in sides[0] for h in sides[1] for w in sides[2]]

    def __str__(self) -> str:
        return self.kind if self.tile is None else "tile " + "x".join(map(str, self.tile))


def raster() -> TokenOrder:
    """Frame by frame, row by row."""
    return TokenOrder("raster")


def pixel_major() -> TokenOrder:
    """All frames of one pixel side by side."""
    return TokenOrder("pixel_major")


def gilbert() -> TokenOrder:
    """Along a generalized Hilbert curve, from each token to one of its six neighbors."""
    return TokenOrder("gilbert")


def tile(frames: int, height: int, width: int) -> TokenOrder:
    """Boxes of `frames x height x width` tokens."""
    return TokenOrder("tile", (frames, height, width))


def _cuts(length: int, block: int) -> range:
    return range(block, length + block, block) if length else range(0)

"""Workload: one attention to be timed: its tokens, the pattern of its heads, its arithmetic."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import (
    WHOLE,
    BlockIndices,
    block_indices,
    from_block_mask,
    from_tags,
)
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster, tile
from dit_sparse.kernels.pattern import Band, Neighborhood
from dit_sparse.settings import check_device, check_dtype

PATTERNS = ("blocks", "neighborhood", "band", "pooled")

_POOLED = 3


@dataclass(frozen=True, slots=True)
class Preset:
    """The self-attention of a published model at its own resolution."""

    grid: TokenGrid
    heads: int
    head_dim: int


PRESETS = {
    "wan-1.3b-480p": Preset(TokenGrid(21, 30, 52), 12, 128),
    "wan-14b-720p": Preset(TokenGrid(21, 45, 80), 40, 128),
    "hunyuanvideo-720p": Preset(TokenGrid(33, 45, 80, text_after=256), 24, 128),
    "cogvideox": Preset(TokenGrid(13, 30, 45, text_before=226), 30, 64),
    "flux-4k": Preset(TokenGrid(1, 256, 256, text_before=512), 24, 128),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """One sample of attention over `grid`, every head with a pattern of about `density`.

    `blocks`: in each row of blocks, random ones, all whole. `neighborhood`: a box of the grid's
    own proportions, in tiles that fill a block. `band`: the nearest tokens in raster order.
    `pooled`: as `blocks`, and means of eight keys in place of all other blocks.
    """

    grid: TokenGrid
    heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    block: int = 128
    pattern: str = "blocks"
    density: float = 0.25
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        check_dtype(self.dtype)
        check_device(self.device)

    def dense(self) -> "Workload":
        """The same with all pairs."""
        return replace(self, density=1.0)

    def call(self) -> AttentionCall:
        """Operands from a normal distribution, and the blocks to visit."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = 3, 1, self.grid.tokens, self.heads, self.head_dim
        operands = torch.randn(shape, generator=generator)
        query, key, value = operands.to(self.device, getattr(torch, self.dtype))
        return AttentionCall(query, key, value, self.blocks(), self.head_dim**-0.5)

    def blocks(self) -> BlockIndices:
        """The blocks to visit."""
        if self.pattern == "blocks":
            return from_block_mask(self._mask(), self.grid, raster(), self.block, self.block)
        if self.pattern == "pooled":
            tags = torch.where(self._mask(), WHOLE, _POOLED).to(torch.int8)
            return from_tags(tags, self.grid, raster(), self.block, self.block)
        if self.pattern == "band":
            pattern, order = Band.of_density(self.density, self.grid), raster()
        else:
            pattern, order = Neighborhood(window_of(self.density, self.grid)), self._tiles()
        return block_indices([pattern] * self.heads, self.grid, order, self.block, self.block)

    def _mask(self) -> Tensor:
        blocks = len(raster().offsets(self.grid, self.block)) - 1
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(self.heads, blocks, blocks, generator=generator)
        chosen = scores.topk(max(1, round(self.density * blocks))).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)

    def _tiles(self) -> TokenOrder:
        """Boxes of as many tokens as a block has, as near to cubes as halving makes them."""
        sides, rest, axis = [1, 1, 1], self.block, 2
        while rest % 2 == 0:
            sides[axis], rest, axis = 2 * sides[axis], rest // 2, (axis - 1) % 3
        sides[2] *= rest
        return tile(*sides)


def window_of(density: float, grid: TokenGrid) -> tuple[int, int, int]:
    """The box of the grid's own proportions that keeps about `density` of its video tokens."""
    window, share = [1, 1, 1], density
    # The longest axes last: they make up for what rounding did to the others.
    axes = sorted(range(3), key=lambda axis: grid.shape[axis])
    for done, axis in enumerate(axes):
        length = grid.shape[axis]
        window[axis] = min(length, max(1, round(length * share ** (1 / (3 - done)))))
        share = min(1.0, share * length / window[axis])
    return window[0], window[1], window[2]


def grid_of_tokens(tokens: int) -> TokenGrid:
    """The grid of exactly so many video tokens whose sides differ least."""
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")

    def divisors(number: int) -> list[int]:
        return [side for side in range(1, round(number**0.5) + 1) if number % side == 0]

    frames, height = min(
        ((frames, height) for frames in divisors(tokens) for height in divisors(tokens // frames)),
        key=lambda sides: sum(sides) + tokens // (sides[0] * sides[1]),
    )
    return TokenGrid(frames, height, tokens // (frames * height))

"""Radial: a window inside the frame that halves whenever the distance between frames doubles."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.definition import Definition, video_index, video_rows, with_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster

BLOCK = 128
"""Tokens of a block of the authors' code."""


@dataclass(frozen=True, slots=True)
class Radial(Definition):
    """Radial attention (arXiv 2506.19852), without its sink of the first frame.

    With D the distance in frames, s the tokens of a frame and d the raster distance inside it:

    * `paper`: `d + 1 <= s / 2^floor(log2 max(D, 1))`; past a width of 1 only the same place, in
      every `ceil(2^floor(log2 D) / s)`-th frame.
    * `repo`, the authors' code: two whole frames for `D <= 1`, else `d <= decay * 2^bits(s) /
      2^bits(D)`, at least 128; where that is below 128 undecayed, only in every so many frames.
      Then a block of 128 x 128 raster tokens is kept whole if, of its columns that hold any pair
      of one pair of frames, more than 60 % hold over a third of its rows. The authors set decay to
      0.2 (Wan 2.1), 0.8 (Wan 2.2) and 0.95 (HunyuanVideo). Frames that are no multiple of 128
      tokens, where that code loses pairs or refuses, keep to the same rule here.

    With the sink: `AnyOf((Radial(), Sink()))`.
    """

    kind: ClassVar[str] = "radial"
    variant: Literal["paper", "repo"] = "paper"
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.variant not in ("paper", "repo"):
            raise ValueError(f"variant must be 'paper' or 'repo', got {self.variant!r}")
        if not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be a positive number, got {self.decay}")
        if self.variant == "paper" and self.decay != 1:
            raise ValueError(
                f"decay {self.decay} came with variant 'paper', which has none; use 'repo'"
            )

    @property
    def order(self) -> TokenOrder:
        return raster()

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        query, key = video_index(grid, queries), video_index(grid, keys)
        if self.variant == "repo":
            kept = self._blocks(grid).to(query.device)[query // BLOCK, key // BLOCK]
        else:
            frame = grid.height * grid.width
            reach = _paper_reach(grid.frames, frame).to(query.device)
            between = (query // frame - key // frame).abs_()
            kept = (query % frame - key % frame).abs_() <= reach[between]
        return with_text(grid, queries, keys, kept)

    def rows(self, grid: TokenGrid, queries: Tensor) -> Tensor:
        # As `pairs` for all keys, with one comparison a pair.
        query, size = video_index(grid, queries), grid.height * grid.width
        if self.variant == "repo":
            kept = self._blocks(grid).to(query.device)[query // BLOCK]
            kept = kept.repeat_interleave(BLOCK, 1)[:, : grid.video]
        else:
            frames, places = (torch.arange(n, device=query.device) for n in (grid.frames, size))
            reach = _paper_reach(grid.frames, size).to(query.device)
            between = (rearrange(query // size, "n -> n 1") - frames).abs_()
            distance = (rearrange(query % size, "n -> n 1") - places).abs_().to(torch.int32)
            kept = rearrange(distance, "n s -> n 1 s") <= rearrange(reach[between], "n t -> n t 1")
            kept = rearrange(kept, "n t s -> n (t s)")
        return video_rows(grid, queries, kept)

    def _blocks(self, grid: TokenGrid) -> Tensor:
        return _repo_blocks(grid.frames, grid.height * grid.width, self.decay)

    def __str__(self) -> str:
        decay = f" decay {self.decay:g}" if self.variant == "repo" else ""
        return f"radial {self.variant}{decay}"


@lru_cache(maxsize=16)
def _paper_reach(frames: int, size: int) -> Tensor:
    """Largest distance inside the frame at each distance in frames, -1 for none: int32."""
    reach = []
    for distance in range(frames):
        band = 2 ** (max(distance, 1).bit_length() - 1)
        thinned = distance % -(-band // size)
        reach.append(-1 if thinned else max(size // band - 1, 0))
    return torch.tensor(reach, dtype=torch.int32)


def _repo_reach(frames: int, size: int, decay: float) -> list[int]:
    """As `_paper_reach`, before the rule about blocks."""
    reach = []
    for distance in range(frames):
        width = 2 ** (size.bit_length() - distance.bit_length())
        if width < BLOCK and distance % int(BLOCK / width):
            reach.append(-1)
        else:
            reach.append(size if distance <= 1 else int(min(max(width * decay, BLOCK), size)))
    return reach


@lru_cache(maxsize=16)
def _repo_blocks(frames: int, size: int, decay: float) -> Tensor:
    """Which blocks of raster video tokens see which, bool `[blocks, blocks]`."""
    tokens = frames * size
    reach = _repo_reach(frames, size, decay)
    kept = torch.zeros(-(-tokens // BLOCK), -(-tokens // BLOCK), dtype=torch.bool)
    rows = [min(BLOCK, tokens - start) for start in range(0, tokens, BLOCK)]
    cuts = [_cuts(frame, size) for frame in range(frames)]
    columns = torch.arange(size)
    for i, (first, edges) in enumerate(cuts):
        above, below = edges[:-1, None], edges[1:, None] - 1
        many = torch.tensor(rows[first : first + len(above)])[:, None]
        sums = {}
        for width in {reach[abs(i - j)] for j in range(frames)} - {-1}:
            top, bottom = (
                torch.maximum(above, columns - width),
                torch.minimum(below, columns + width),
            )
            count = (bottom - top + 1).clamp_min(0)
            sums[width] = [
                torch.nn.functional.pad(part.cumsum(1), (1, 0))
                for part in (3 * count > many, count > 0)
            ]
        for j, (start, stops) in enumerate(cuts):
            if reach[abs(i - j)] >= 0:
                dense, some = (part[:, stops].diff() for part in sums[reach[abs(i - j)]])
                kept[first : first + len(above), start : start + len(stops) - 1] |= (
                    5 * dense > 3 * some
                )
    return kept


def _cuts(frame: int, size: int) -> tuple[int, Tensor]:
    """The first block that a frame touches, and where blocks cut the frame, in its own places."""
    start, end = frame * size, (frame + 1) * size
    first = start // BLOCK
    inner = range((first + 1) * BLOCK, end, BLOCK)
    return first, torch.tensor([start, *inner, end]) - start

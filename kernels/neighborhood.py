"""Neighborhood: a box of keys around each query."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.definition import Definition, Triple, by, video_rows, with_text
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, tile
from dit_sparse.kernels.windows import Windows

Flags = tuple[bool, bool, bool]


@dataclass(frozen=True, slots=True)
class Neighborhood(Definition):
    """A box of `window` tokens around each query: generalized neighborhood attention.

    GNA (arXiv 2504.16922, section 3), with NATTEN's rules at the borders: the window keeps its
    size and slides inward. On each axis, queries in a run of `stride` share the window of the
    run's center; with `dilation` d a query sees only keys whose index equals its own modulo d.
    On a `causal` axis the window ends at the last query of the run, is cut off where the axis
    begins, and a query sees no key after itself. Windows, strides, dilations and causal are
    `(frames, height, width)`. An even window reaches one token further back than forward. A window
    too large for an axis is cut to what the axis has.

    >>> str(Neighborhood((5, 9, 9), stride=(1, 3, 3)))
    'neighborhood 5x9x9 stride 1x3x3'
    """

    kind: ClassVar[str] = "neighborhood"
    window: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    causal: Flags = (False, False, False)

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(
                    f"{name} must be (frames, height, width), each at least 1, got {value}"
                )
        if len(self.causal) != 3 or any(type(flag) is not bool for flag in self.causal):
            raise ValueError(
                f"causal must be (frames, height, width), each True or False, got {self.causal}"
            )
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride {self.stride} is larger than window {self.window}; queries would fall "
                "outside their own window, so use a stride of at most the window"
            )

    @classmethod
    def sliding_tiles(cls, window: Triple, tile: Triple = (6, 8, 8)) -> "Neighborhood":
        """Sliding Tile Attention (arXiv 2502.04507): a window of tiles around the query's tile.

        Equal to the paper's for odd windows on grids of whole tiles. For an even window STA's
        code visits one tile more than asked; here it has as many as asked, shifted by half a tile.

        >>> str(Neighborhood.sliding_tiles((3, 3, 3)))
        'neighborhood 18x24x24 stride 6x8x8'
        """
        frames, height, width = (w * t for w, t in zip(window, tile, strict=True))
        return cls((frames, height, width), tile)

    @property
    def order(self) -> TokenOrder:
        return tile(4, 4, 4)

    def refusal(self, grid: TokenGrid) -> str | None:
        if all(d <= length for d, length in zip(self.dilation, grid.shape, strict=True)):
            return None
        return (
            f"dilation {by(self.dilation)} is larger than the token grid {by(grid.shape)}; "
            "use a dilation of at most the grid"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        places = zip(grid.coordinates(queries), grid.coordinates(keys), strict=True)
        frame, row, column = (self._axis(grid, axis, *place) for axis, place in enumerate(places))
        return with_text(grid, queries, keys, frame & row & column)

    def rows(self, grid: TokenGrid, queries: Tensor) -> Tensor:
        # As `pairs` for all keys, but each axis is looked at once, not once for every key.
        frame, row, column = (
            self._axis(grid, axis, place[:, None], torch.arange(length, device=place.device))
            for axis, (place, length) in enumerate(
                zip(grid.coordinates(queries), grid.shape, strict=True)
            )
        )
        video = (
            rearrange(frame, "n t -> n t 1 1")
            & rearrange(row, "n h -> n 1 h 1")
            & rearrange(column, "n w -> n 1 1 w")
        )
        return video_rows(grid, queries, rearrange(video, "n t h w -> n (t h w)"))

    def windows(self, grid: TokenGrid) -> Windows:
        # Nothing is held beside the tables: of a long video they are a part of what a call holds.
        tables = torch.zeros(3, 3, grid.tokens, dtype=torch.int32)
        video = tables.narrow(2, grid.text_before, grid.video).unflatten(2, grid.shape)
        for axis in range(3):
            for part, values in enumerate(self.axis_windows(grid, axis)):
                video[part, axis] = values[(..., *(None,) * (2 - axis))]
        return Windows(*tables)

    def axis_windows(self, grid: TokenGrid, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        """First key and size of the window of every query of one axis, and the position that each
        index takes when the dilation groups stand one after the other; int32 `[length]` each."""
        return _axis_windows(
            grid.shape[axis],
            self.window[axis],
            self.stride[axis],
            self.dilation[axis],
            self.causal[axis],
        )

    def _axis(self, grid: TokenGrid, axis: int, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys as far as their places on one axis tell."""
        low, size, position = (part.to(query.device) for part in self.axis_windows(grid, axis))
        query, key = query.clamp_min(0), key.clamp_min(0)
        offset = position[key] - low[query]
        return (offset >= 0) & (offset < size[query])

    def __str__(self) -> str:
        causal = by(tuple(map(int, self.causal)))
        extras = [
            f" {name} {text}"
            for name, text, plain in (
                ("stride", by(self.stride), "1x1x1"),
                ("dilation", by(self.dilation), "1x1x1"),
                ("causal", causal, "0x0x0"),
            )
            if text != plain
        ]
        return f"neighborhood {by(self.window)}" + "".join(extras)


@lru_cache(maxsize=256)
def _axis_windows(
    length: int, window: int, stride: int, dilation: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Neighborhood.axis_windows`; must not be written to."""
    size = min(window, length // dilation)
    stride = min(stride, size)
    index = torch.arange(length)
    place, group = index // dilation, index % dilation
    group_length = length // dilation + (group < length % dilation)
    group_start = group * (length // dilation) + group.clamp_max(length % dilation)
    run = place // stride * stride
    if causal:
        start = (torch.minimum(run + stride, group_length) - size).clamp_min(0)
        sizes = place - start + 1
    else:
        leader = torch.minimum(run + stride // 2, group_length - 1)
        start = torch.minimum((leader - size // 2).clamp_min(0), group_length - size)
        sizes = torch.full_like(start, size)
    parts = group_start + start, sizes, group_start + place
    low, sizes, position = (part.to(torch.int32) for part in parts)
    return low, sizes, position

"""Pattern: which keys a query sees.

A pattern is a frozen value. `pairs` is its definition, in raster token coordinates; block lists,
kernels and tests all derive from it. Text queries see every key and text keys are seen by every
query, except by a head that is skipped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, pixel_major, raster, tile
from dit_sparse.kernels.windows import Windows, everything, windows

Triple = tuple[int, int, int]


class _Definition(ABC):
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


@dataclass(frozen=True, slots=True)
class Full(_Definition):
    """Every query sees every key."""

    kind: ClassVar[str] = "full"

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.ones(_shape(queries, keys), dtype=torch.bool, device=keys.device)

    def windows(self, grid: TokenGrid) -> Windows:
        return everything(grid.tokens)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class Skip(_Definition):
    """The head is bypassed: it sees nothing, text included, and its output is zero.

    Mode M1 of Sparse-vDiT (arXiv 2506.03065).
    """

    kind: ClassVar[str] = "skip"

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.zeros(_shape(queries, keys), dtype=torch.bool, device=keys.device)

    def __str__(self) -> str:
        return "skip"


@dataclass(frozen=True, slots=True)
class Band(_Definition):
    """Keys at most `half_width` tokens away in `axis_order`.

    In raster order this is the neighborhood in the same and the next frames (the spatial heads of
    Sparse VideoGen, arXiv 2502.01776, and the diagonal mode of Sparse-vDiT); in pixel-major order
    the same place in all frames (temporal heads, multi-diagonal mode).
    """

    kind: ClassVar[str] = "band"
    half_width: int
    axis_order: Literal["raster", "pixel_major"] = "raster"

    def __post_init__(self) -> None:
        if self.half_width < 0:
            raise ValueError(f"half_width must not be negative, got {self.half_width}")
        if self.axis_order not in ("raster", "pixel_major"):
            raise ValueError(
                f"axis_order must be 'raster' or 'pixel_major', got {self.axis_order!r}"
            )

    @classmethod
    def of_density(
        cls,
        density: float,
        grid: TokenGrid,
        order: Literal["raster", "pixel_major"] = "raster",
    ) -> Band:
        """The band that keeps a share `density` of the video-to-video pairs.

        Its half width is `video * (1 - sqrt(1 - density))`, rounded (arXiv 2502.01776).
        """
        if not 0 < density <= 1:
            raise ValueError(f"density must be in (0, 1], got {density}")
        return cls(round(grid.video * (1 - math.sqrt(1 - density))), order)

    @property
    def order(self) -> TokenOrder:
        return raster() if self.axis_order == "raster" else pixel_major()

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        distance = self._position(grid, queries) - self._position(grid, keys)
        return _with_text(grid, queries, keys, distance.abs_() <= self.half_width)

    def windows(self, grid: TokenGrid) -> Windows:
        position = self._position(grid, torch.arange(grid.tokens))
        return windows([(position - self.half_width, 2 * self.half_width + 1, position)])

    def _position(self, grid: TokenGrid, tokens: Tensor) -> Tensor:
        if self.axis_order == "raster":
            return tokens.to(torch.int32)
        frame, row, column = grid.coordinates(tokens)
        return ((row * grid.width + column) * grid.frames + frame).to(torch.int32)

    def __str__(self) -> str:
        return f"band {self.half_width} {self.axis_order.replace('_', '-')}"


@dataclass(frozen=True, slots=True)
class Columns(_Definition):
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
        count = math.ceil(math.prod(self.grid) / self.block)
        if not self.blocks or list(self.blocks) != sorted(set(self.blocks) & set(range(count))):
            raise ValueError(
                f"blocks must be different, ascending indices in 0..{count - 1} for grid "
                f"{_by(self.grid)} and block {self.block}, got {self.blocks}"
            )

    @property
    def order(self) -> TokenOrder:
        return raster()

    def refusal(self, grid: TokenGrid) -> str | None:
        if grid.shape == self.grid:
            return None
        return (
            f"{self} was chosen on grid {_by(self.grid)} and says nothing about "
            f"{_by(grid.shape)}; search again on this grid"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        seen = self._chosen(grid, keys).expand(_shape(queries, keys))
        return _with_text(grid, queries, keys, seen)

    def windows(self, grid: TokenGrid) -> Windows:
        chosen = self._chosen(grid, torch.arange(grid.tokens))
        return windows([(torch.tensor(1), 1, chosen)])

    def _chosen(self, grid: TokenGrid, keys: Tensor) -> Tensor:
        """Whether each key lies in a chosen block, for video tokens."""
        chosen = torch.zeros(math.ceil(grid.video / self.block), dtype=torch.bool)
        chosen[list(self.blocks)] = True
        index = (keys - grid.text_before).clamp(0, grid.video - 1) // self.block
        return chosen.to(keys.device)[index]

    def __str__(self) -> str:
        count = math.ceil(math.prod(self.grid) / self.block)
        return f"columns {len(self.blocks)}/{count}"


@dataclass(frozen=True, slots=True)
class Neighborhood(_Definition):
    """A box of `window` tokens around each query: generalized neighborhood attention.

    GNA (arXiv 2504.16922, section 3), with NATTEN's rules at the borders: the window keeps its
    size and slides inward. On each axis, queries in a run of `stride` share the window of the
    run's center; with `dilation` d a query sees only keys whose index equals its own modulo d.
    Windows, strides and dilations are `(frames, height, width)`. An even window reaches one token
    further back than forward. A window too large for an axis is cut to what the axis has.

    >>> str(Neighborhood((5, 9, 9), stride=(1, 3, 3)))
    'neighborhood 5x9x9 stride 1x3x3'
    """

    kind: ClassVar[str] = "neighborhood"
    window: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation"):
            value = getattr(self, name)
            if len(value) != 3 or min(value) < 1:
                raise ValueError(
                    f"{name} must be (frames, height, width), each at least 1, got {value}"
                )
        if any(s > w for s, w in zip(self.stride, self.window, strict=True)):
            raise ValueError(
                f"stride {self.stride} is larger than window {self.window}; queries would fall "
                "outside their own window, so use a stride of at most the window"
            )

    @property
    def order(self) -> TokenOrder:
        return tile(4, 4, 4)

    def refusal(self, grid: TokenGrid) -> str | None:
        if all(d <= length for d, length in zip(self.dilation, grid.shape, strict=True)):
            return None
        return (
            f"dilation {_by(self.dilation)} is larger than the token grid {_by(grid.shape)}; "
            "use a dilation of at most the grid"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        places = zip(grid.coordinates(queries), grid.coordinates(keys), strict=True)
        frame, row, column = (self._axis(grid, axis, *place) for axis, place in enumerate(places))
        return _with_text(grid, queries, keys, frame & row & column)

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
        seen = queries.new_ones(len(queries), grid.tokens, dtype=torch.bool)
        seen[:, grid.text_before : grid.text_before + grid.video] = rearrange(
            video, "n t h w -> n (t h w)"
        )
        return seen | _is_text(grid, queries)[:, None] if grid.text else seen

    def windows(self, grid: TokenGrid) -> Windows:
        axes, group = [], torch.zeros(grid.tokens, dtype=torch.int64)
        places = grid.coordinates(torch.arange(grid.tokens))
        for axis, (place, dilation) in enumerate(zip(places, self.dilation, strict=True)):
            place = place.clamp_min(0)
            start, size = _window(grid.shape[axis], self.window[axis], self.stride[axis], dilation)
            axes.append((start[place], size, place // dilation))
            group = group * dilation + place % dilation
        return windows(axes if self.dilation == (1, 1, 1) else [*axes, (group, 1, group)])

    def _axis(self, grid: TokenGrid, axis: int, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys as far as their places on one axis tell."""
        dilation = self.dilation[axis]
        start, size = _window(grid.shape[axis], self.window[axis], self.stride[axis], dilation)
        place = torch.div(key, dilation, rounding_mode="floor").to(torch.int16)
        offset = place - start.to(query.device)[query.clamp_min(0)]
        inside = (offset >= 0) & (offset < size)
        if dilation == 1:
            return inside
        return inside & ((query % dilation).to(torch.int16) == (key % dilation).to(torch.int16))

    def __str__(self) -> str:
        extras = [
            f" {name} {_by(value)}"
            for name, value in (("stride", self.stride), ("dilation", self.dilation))
            if value != (1, 1, 1)
        ]
        return f"neighborhood {_by(self.window)}" + "".join(extras)


Pattern = Full | Skip | Band | Columns | Neighborhood
PATTERNS: dict[str, type[Pattern]] = {pattern.kind: pattern for pattern in get_args(Pattern)}


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """`pattern` as JSON values: its kind and its fields."""
    values = {field.name: getattr(pattern, field.name) for field in fields(pattern)}
    return {"kind": pattern.kind} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in values.items()
    }


def pattern_from_dict(data: dict[str, Any]) -> Pattern:
    """The pattern that `pattern_to_dict` wrote; anything else is a `ValueError`."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in PATTERNS:
        raise ValueError(
            f"unknown pattern kind {kind!r}; this version knows {', '.join(PATTERNS)}: "
            "a newer dit_sparse may have written the plan, so update it"
        )
    values = {name: value for name, value in data.items() if name != "kind"}
    known = {field.name: field for field in fields(PATTERNS[kind])}
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"pattern {kind!r} has no field {', '.join(unknown)}; it takes "
            f"{', '.join(known) or 'none'}"
        )
    for name, value in values.items():
        if not _fits(value, known[name].type):
            raise ValueError(
                f"{name} of pattern {kind!r} must be {known[name].type}, got {value!r}"
            )
    build = cast(Callable[..., Pattern], PATTERNS[kind])
    try:
        return build(
            **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        )
    except TypeError as error:
        raise ValueError(f"pattern {kind!r} is incomplete: {error}") from error


def _window(length: int, window: int, stride: int, dilation: int) -> tuple[Tensor, int]:
    """First key of the window of every query of an axis, counted in its dilation group (int16
    `[length]`), and the window's size."""
    size = min(window, length // dilation)
    stride = min(stride, size)
    index = torch.arange(length)
    place, group = index // dilation, index % dilation
    group_length = length // dilation + (group < length % dilation)
    leader = torch.minimum(place // stride * stride + stride // 2, group_length - 1)
    start = torch.minimum((leader - size // 2).clamp_min(0), group_length - size)
    return start.to(torch.int16), size


def _with_text(grid: TokenGrid, queries: Tensor, keys: Tensor, video: Tensor) -> Tensor:
    if not grid.text:
        return video
    return video | _is_text(grid, queries) | _is_text(grid, keys)


def _is_text(grid: TokenGrid, tokens: Tensor) -> Tensor:
    return (tokens < grid.text_before) | (tokens >= grid.text_before + grid.video)


def _shape(queries: Tensor, keys: Tensor) -> torch.Size:
    return torch.broadcast_shapes(queries.shape, keys.shape)


def _by(sizes: Triple) -> str:
    return "x".join(map(str, sizes))


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value fits a field of a pattern; annotations are text in this module."""
    if annotation == "int":
        return type(value) is int
    if annotation in ("Triple", "tuple[int, ...]"):
        sized = isinstance(value, list | tuple) and (annotation != "Triple" or len(value) == 3)
        return sized and all(type(item) is int for item in value)
    return isinstance(value, str)

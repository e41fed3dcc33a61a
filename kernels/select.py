"""Select: which blocks a ranking keeps, and how finely.

Values only; `selection.py` turns a ranking into tags. Counts are of blocks of video keys: blocks
of text are always visited, and stand outside the quota.
"""

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class TopRow:
    """The same number of key blocks in every row (AdaSpa, arXiv 2502.21079)."""

    kind: ClassVar[str] = "top_row"
    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def __str__(self) -> str:
        return f"top {self.density:g} of rows"


@dataclass(frozen=True, slots=True)
class TopHead:
    """A number of blocks for the whole head, wherever they are, and at least one in every row."""

    kind: ClassVar[str] = "top_head"
    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def __str__(self) -> str:
        return f"top {self.density:g} of heads"


@dataclass(frozen=True, slots=True)
class Cumulative:
    """The fewest blocks of a row that hold `mass` of its video attention, the one that reaches it
    included: Adaptive Sparse Attention of Video-BLADE (arXiv 2508.10774).

    Attributes:
        mass: the share to reach; 1 keeps every block.
        floor, cap: least and largest share of the blocks of a row.
        crossing: whether the block that reaches it is kept. The published code leaves it out and
            so holds less than `mass`; the paper does not.
    """

    kind: ClassVar[str] = "cumulative"
    mass: float
    floor: float = 0.0
    cap: float = 1.0
    crossing: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise ValueError(f"mass must be in (0, 1], got {self.mass}")
        if not 0 <= self.floor <= self.cap <= 1:
            raise ValueError(
                f"floor and cap must rise within 0..1, got floor={self.floor}, cap={self.cap}"
            )

    def __str__(self) -> str:
        limits = "" if (self.floor, self.cap) == (0, 1) else f" in {self.floor:g}..{self.cap:g}"
        return f"cumulative {self.mass:g}{limits}{'' if self.crossing else ' less the last'}"


@dataclass(frozen=True, slots=True)
class Bands:
    """Levels 1, 2, 4, 8 of pooling down the sorted row (Pyramid Sparse Attention, arXiv
    2512.04025); what lies behind the last bound is not visited.

    Attributes:
        bounds: where each level ends, cumulatively.
        by: whether bounds are shares of the number of blocks, or of their attention; a block that
            reaches a bound of attention belongs to the level before it.
        least: share of the blocks that are whole at least, if `by` is mass.
    """

    kind: ClassVar[str] = "bands"
    bounds: Bounds
    by: Literal["rank", "mass"]
    least: float = 0.0

    def __post_init__(self) -> None:
        rising = all(low <= high for low, high in pairwise((0.0, *self.bounds, 1.0)))
        if len(self.bounds) != 4 or not rising or not self.bounds[-1]:
            raise ValueError(
                f"bounds must be four numbers rising in 0..1, the last above 0, got {self.bounds}"
            )
        if self.by not in ("rank", "mass"):
            raise ValueError(f"by must be 'rank' or 'mass', got {self.by!r}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be in 0..1, got {self.least}")
        if self.least and self.by == "rank":
            raise ValueError(
                f"least {self.least} came with by='rank'; raise the first of the bounds instead"
            )

    def __str__(self) -> str:
        least = f" from {self.least:g}" if self.least else ""
        return f"bands {'/'.join(f'{bound:g}' for bound in self.bounds)} by {self.by}{least}"


@dataclass(frozen=True, slots=True)
class Tiers:
    """As `TopRow`, with half of `density` for heads whose attention is concentrated, and one and a
    half times of it for as many others (AdaSpa, arXiv 2502.21079).

    n heads keep more than `recall` of their attention at `density`, but at most half of all heads
    count; the n best become sparser, the n worst denser, and the average stays. Above a density
    of 2/3 the worst can only become dense, so the average falls.
    """

    kind: ClassVar[str] = "tiers"
    density: float
    recall: float = 0.8

    def __post_init__(self) -> None:
        _check_density(self.density)
        if not 0 <= self.recall <= 1:
            raise ValueError(f"recall must be in 0..1, got {self.recall}")
        if 1.5 * self.density > 1:
            warnings.warn(
                f"tiers of density {self.density:g} cannot give heads 1.5 times as many blocks; "
                "they become dense, and the average falls below. Use a density of at most 2/3",
                stacklevel=3,
            )

    def __str__(self) -> str:
        return f"tiers {self.density:g} recall {self.recall:g}"


@dataclass(frozen=True, slots=True)
class Grouped:
    """As `TopRow`, separately among the blocks that hold tokens of the first frame and among the
    others: the isolated selection of SparseD (arXiv 2509.24014), so that a first frame that draws
    much attention does not eat the quota. Text is the third group, always visited."""

    kind: ClassVar[str] = "grouped"
    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def __str__(self) -> str:
        return f"grouped {self.density:g}"


Select = TopRow | TopHead | Cumulative | Bands | Tiers | Grouped


_LEVELS = (1, 2, 4, 8)


def at_density(select: Select, density: float) -> Select:
    """The selection of the same kind that keeps a share `density` of the blocks of a row, keys of
    a level of pooling counted as those that are computed.

    >>> at_density(Bands((0.4, 0.5, 0.6, 0.8), "mass"), 0.25)
    Bands(bounds=(0.2, 0.25, 0.3, 0.4), by='rank', least=0.0)
    """
    _check_density(density)
    match select:
        case Cumulative():
            return replace(select, floor=density, cap=density)
        case Bands():
            shares = [high - low for low, high in pairwise((0.0, *select.bounds))]
            weighted = sum(share / level for share, level in zip(shares, _LEVELS, strict=True))
            first, second, third, fourth = (
                min(round(bound * density / weighted, 9), 1.0) for bound in select.bounds
            )
            return Bands((first, second, third, fourth), "rank")
        case TopRow() | TopHead() | Tiers() | Grouped():
            return replace(select, density=density)


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")

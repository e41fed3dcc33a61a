"""Pattern: which keys a query sees; every kind there is, as a value and as JSON.

`definition.py` says what a pattern is. `AnyOf` puts patterns together, for instance a band and the
sink of the first frame.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from dit_sparse.kernels.band import Band
from dit_sparse.kernels.columns import Columns, Sink
from dit_sparse.kernels.definition import Definition, Triple, shape
from dit_sparse.kernels.error import Metric
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.neighborhood import Neighborhood
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.radial import Radial
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.stripes import Stripes
from dit_sparse.kernels.values import from_dict, to_dict
from dit_sparse.kernels.windows import Windows, everything

__all__ = [
    "PATTERNS",
    "AnyOf",
    "Band",
    "Choice",
    "Columns",
    "Full",
    "Neighborhood",
    "Pattern",
    "Radial",
    "Scored",
    "Sink",
    "Skip",
    "Stripes",
    "Triple",
    "pattern_from_dict",
    "pattern_to_dict",
]


@dataclass(frozen=True, slots=True)
class Full(Definition):
    """Every query sees every key."""

    kind: ClassVar[str] = "full"

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.ones(shape(queries, keys), dtype=torch.bool, device=keys.device)

    def windows(self, grid: TokenGrid) -> Windows:
        return everything(grid.tokens)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class Skip(Definition):
    """The head is bypassed: it sees nothing, text included, and its output is zero.

    Mode M1 of Sparse-vDiT (arXiv 2506.03065).
    """

    kind: ClassVar[str] = "skip"

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.zeros(shape(queries, keys), dtype=torch.bool, device=keys.device)

    def __str__(self) -> str:
        return "skip"


Member = Band | Columns | Sink | Neighborhood | Radial
MEMBERS: tuple[str, ...] = tuple(pattern.kind for pattern in get_args(Member))


@dataclass(frozen=True, slots=True)
class AnyOf(Definition):
    """Pairs that at least one of `patterns` keeps.

    >>> str(AnyOf((Band(64), Sink())))
    'band 64 raster + sink 1'
    """

    kind: ClassVar[str] = "any_of"
    patterns: tuple[Member, ...]

    def __post_init__(self) -> None:
        wrong = [p for p in self.patterns if not isinstance(p, get_args(Member))]
        if wrong:
            raise ValueError(
                f"patterns of any_of must each be one of {', '.join(MEMBERS)}, got {wrong[0]}; "
                "list the patterns of an any_of one by one, and leave full and skip out"
            )
        if len(set(self.patterns)) < max(len(self.patterns), 2):
            raise ValueError(
                f"patterns of any_of must be two or more and different, got {self.patterns}"
            )

    @property
    def order(self) -> TokenOrder | None:
        """That of the first pattern that asks for one."""
        return next((p.order for p in self.patterns if p.order is not None), None)

    def refusal(self, grid: TokenGrid) -> str | None:
        reasons = (pattern.refusal(grid) for pattern in self.patterns)
        return next((reason for reason in reasons if reason is not None), None)

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        kept = self.patterns[0].pairs(grid, queries, keys)
        for pattern in self.patterns[1:]:
            kept = kept | pattern.pairs(grid, queries, keys)
        return kept

    def rows(self, grid: TokenGrid, queries: Tensor) -> Tensor:
        kept = self.patterns[0].rows(grid, queries)
        for pattern in self.patterns[1:]:
            kept = kept | pattern.rows(grid, queries)
        return kept

    def __str__(self) -> str:
        return " + ".join(map(str, self.patterns))


Option = Skip | Band | Columns | Stripes | Neighborhood | Radial | AnyOf


@dataclass(frozen=True, slots=True)
class Choice(Definition):
    """For each head the one of `patterns` that it does best with, chosen while denoising.

    Error of the output on a few rows plus `price` times block density is least; above `limit` the
    head is full. The profiler of Sparse VideoGen (arXiv 2502.01776, section 4.1), and the rule of
    Sparse-vDiT (arXiv 2506.03065), which applies it offline.

    Attributes:
        patterns: to choose from, two at least.
        samples: queries that are looked at.
        metric: of the error, see `error.pattern_error`.
        price, limit: the papers' lambda and epsilon; no limit if `None`.
    """

    kind: ClassVar[str] = "choice"
    patterns: tuple[Option, ...]
    samples: int = 64
    metric: Metric = "mse"
    price: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if len(set(self.patterns)) < max(len(self.patterns), 2):
            raise ValueError(
                f"patterns of a choice must be two or more and different, got {self.patterns}"
            )
        wrong = [p for p in self.patterns if not isinstance(p, get_args(Option))]
        if wrong:
            known = ", ".join(option.kind for option in get_args(Option))
            raise ValueError(f"patterns of a choice must be of kind {known}, got {wrong[0]}")
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}; 64 are usual")
        if self.price < 0:
            raise ValueError(f"price must not be negative, got {self.price}")

    def refusal(self, grid: TokenGrid) -> str | None:
        return (
            f"what a head chooses is known only while denoising, so {self} has no pairs on grid "
            f"{grid}; take one of its patterns here"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        raise ValueError(self.refusal(grid))

    def __str__(self) -> str:
        rule = f", price {self.price:g}" if self.price else ""
        rule += "" if self.limit is None else f", limit {self.limit:g}"
        return f"choice of {' or '.join(map(str, self.patterns))} by {self.metric}{rule}"


Pattern = (
    Full | Skip | Band | Columns | Stripes | Sink | Neighborhood | Radial | AnyOf | Choice | Scored
)
OnlinePattern = Choice | Scored
"""Patterns whose blocks are known only while denoising."""

PATTERNS: dict[str, type[Pattern]] = {pattern.kind: pattern for pattern in get_args(Pattern)}


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """`pattern` as JSON values: its kind and its fields."""
    return to_dict(pattern)


def pattern_from_dict(data: dict[str, Any]) -> Pattern:
    """The pattern that `pattern_to_dict` wrote; anything else is a `ValueError`."""
    return from_dict(data, "pattern", PATTERNS)

"""Pattern: which keys a query sees; every kind there is, as a value and as JSON.

`definition.py` says what a pattern is. `AnyOf` puts patterns together, for instance a band and the
sink of the first frame.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, cast, get_args, get_origin

import torch
from torch import Tensor

from dit_sparse.kernels.band import Band
from dit_sparse.kernels.columns import Columns, Sink
from dit_sparse.kernels.definition import Definition, Triple, shape
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.neighborhood import Flags, Neighborhood
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.radial import Radial
from dit_sparse.kernels.score import Score
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.select import Bounds, Select
from dit_sparse.kernels.windows import Windows, everything

__all__ = [
    "PATTERNS",
    "AnyOf",
    "Band",
    "Columns",
    "Full",
    "Neighborhood",
    "Pattern",
    "Radial",
    "Scored",
    "Sink",
    "Skip",
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


Pattern = Full | Skip | Band | Columns | Sink | Neighborhood | Radial | AnyOf | Scored
PATTERNS: dict[str, type[Pattern]] = {pattern.kind: pattern for pattern in get_args(Pattern)}


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """`pattern` as JSON values: its kind and its fields."""
    return _to_json(pattern)


def pattern_from_dict(data: dict[str, Any]) -> Pattern:
    """The pattern that `pattern_to_dict` wrote; anything else is a `ValueError`."""
    return _built(data, "pattern", PATTERNS)


def pattern_fields(kind: str) -> dict[str, Any]:
    """The fields of a kind of pattern and their types."""
    return _fields(PATTERNS[kind])


def in_words(annotation: Any) -> str:
    """What a field of that type takes."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, get_args(annotation)))
    if annotation in _NOUNS:
        return f"a {_NOUNS[annotation]} of kind {', '.join(_kinds(annotation))}"
    return _WORDS[annotation]


_NOUNS = {Member: "pattern", Score: "score", Select: "selection"}
_WORDS = {
    int: "an integer",
    int | None: "an integer or null",
    float: "a number",
    Triple: "three integers",
    Bounds: "four numbers",
    Flags: "three booleans",
    tuple[int, ...]: "a list of integers",
    tuple[Member, ...]: f"a list of patterns of kind {', '.join(MEMBERS)}",
}


def _fields(value: type) -> dict[str, Any]:
    return {field.name: field.type for field in fields(value)}


def _kinds(annotation: Any) -> dict[str, type]:
    """The values that a field of a type in `_NOUNS` takes, by kind."""
    return {value.kind: value for value in get_args(annotation)}


def _built(data: dict[str, Any], noun: str, kinds: Mapping[str, type]) -> Any:
    """The value that `_to_json` wrote, which is a `noun` of one of `kinds`."""
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"unknown {noun} kind {kind!r}; this version knows {', '.join(kinds)}: "
            "a newer dit_sparse may have written the plan, so update it"
        )
    values = {name: value for name, value in data.items() if name != "kind"}
    known = _fields(kinds[kind])
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{noun} {kind!r} has no field {', '.join(unknown)}; it takes "
            f"{', '.join(known) or 'none'}"
        )
    for name, value in values.items():
        if not _fits(value, known[name]):
            raise ValueError(
                f"{name} of {noun} {kind!r} must be {in_words(known[name])}, got {value!r}"
            )
    build = cast(Callable[..., Any], kinds[kind])
    try:
        return build(**{name: _from_json(value, known[name]) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{noun} {kind!r} is incomplete: {error}") from error


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value fits a field of that type."""
    parts = get_args(annotation)
    if annotation in _NOUNS:
        # Looked at before it is built, so that what is nested deeply is refused and not followed.
        return isinstance(value, dict) and value.get("kind") in [*_kinds(annotation)]
    if get_origin(annotation) is UnionType:
        return any(_fits(value, part) for part in parts)
    if get_origin(annotation) is Literal:
        return isinstance(value, str) and value in parts
    if get_origin(annotation) is tuple:
        if not isinstance(value, list | tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if annotation is NoneType:
        return value is None
    if annotation is float:
        return type(value) in (int, float)
    return type(value) is annotation


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    if not hasattr(value, "kind"):
        return value
    written = {name: _to_json(getattr(value, name)) for name in _fields(type(value))}
    return {"kind": value.kind} | written


def _from_json(value: Any, annotation: Any) -> Any:
    """The field of that type, given a JSON value that fits it."""
    if annotation in _NOUNS:
        return _built(value, _NOUNS[annotation], _kinds(annotation))
    if isinstance(value, list | tuple):
        parts = get_args(annotation)
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(map(_from_json, value, parts))
    return value

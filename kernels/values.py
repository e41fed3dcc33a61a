"""Values: frozen dataclasses with a `kind`, as JSON and back.

    {"kind": "scored", "score": {"kind": "mass", "rows": 16}, "select": {...}, ...}

What a field takes is read off its annotation: numbers, choices, tuples of them, and values of
several kinds. Everything is looked at before it is built, so that what is nested deeply or is of
the wrong type is refused with its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, cast, get_args, get_origin

_NUMBERS = {3: "three", 4: "four"}
_PLAIN = {int: "integer", float: "number", bool: "boolean"}


def to_dict(value: Any) -> Any:
    """`value` as JSON: its kind and its fields."""
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    if not hasattr(value, "kind"):
        return value
    return {"kind": value.kind} | {
        name: to_dict(getattr(value, name)) for name in fields_of(type(value))
    }


def from_dict(data: dict[str, Any], noun: str, kinds: Mapping[str, type]) -> Any:
    """The value of one of `kinds` that `to_dict` wrote; anything else is a `ValueError`.

    `noun` is what messages call it.
    """
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"unknown {noun} kind {kind!r}; this version knows {', '.join(kinds)}: "
            "a newer dit_sparse may have written the plan, so update it"
        )
    values = {name: value for name, value in data.items() if name != "kind"}
    known = fields_of(kinds[kind])
    unknown = sorted(values.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"{noun} {kind!r} has no field {', '.join(unknown)}; it takes "
            f"{', '.join(known) or 'none'}"
        )
    for name, value in values.items():
        if not _fits(value, known[name]):
            words = in_words(known[name], name)
            raise ValueError(f"{name} of {noun} {kind!r} must be {words}, got {value!r}")
    build = cast(Callable[..., Any], kinds[kind])
    try:
        return build(**{name: _built(value, known[name], name) for name, value in values.items()})
    except TypeError as error:
        raise ValueError(f"{noun} {kind!r} is incomplete: {error}") from error


def fields_of(value: type) -> dict[str, Any]:
    """The fields of a kind of value and their types."""
    return {field.name: field.type for field in fields(value)}


def kinds_of(annotation: Any) -> dict[str, type]:
    """The values, by kind, that a field of that type takes; none if it takes no values."""
    parts = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    found = {getattr(part, "kind", None): part for part in parts}
    return {} if None in found else cast(dict[str, type], found)


def in_words(annotation: Any, noun: str) -> str:
    """What a field of that type, called `noun`, takes."""
    parts = get_args(annotation)
    if kinds := kinds_of(annotation):
        return f"a {noun} of kind {', '.join(kinds)}"
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(map(repr, parts))
    if get_origin(annotation) is UnionType:
        return " or ".join("null" if part is NoneType else in_words(part, noun) for part in parts)
    if get_origin(annotation) is tuple:
        if kinds := kinds_of(parts[0]):
            return f"a list of {noun} of kind {', '.join(kinds)}"
        number = "a list of" if parts[-1] is Ellipsis else _NUMBERS[len(parts)]
        return f"{number} {_PLAIN[parts[0]]}s"
    return f"{'an' if annotation is int else 'a'} {_PLAIN[annotation]}"


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a JSON value fits a field of that type."""
    parts = get_args(annotation)
    if kinds := kinds_of(annotation):
        return isinstance(value, dict) and value.get("kind") in list(kinds)
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


def _built(value: Any, annotation: Any, noun: str) -> Any:
    """The field of that type, given a JSON value that fits it."""
    if kinds := kinds_of(annotation):
        return from_dict(value, noun, kinds)
    if isinstance(value, list | tuple):
        parts = get_args(annotation)
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(
            _built(item, part, noun.removesuffix("s"))
            for item, part in zip(value, parts, strict=True)
        )
    return value

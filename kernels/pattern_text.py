"""PatternText: a pattern written on one line, as a person types it.

    neighborhood:window=3x5x5,stride=1x2x2,causal=1x0x0
    band:half_width=16,axis_order=pixel_major + sink:frames=1
    {"kind": "radial", "variant": "repo", "decay": 0.2}

A kind and its fields; counts joined by `x`, yes and no as 1 and 0, patterns of which any will do
joined by `+`; or the JSON of a plan, which is the only form of a scored pattern or a choice.
"""

import json
import re
from typing import Any, get_origin

from dit_sparse.kernels.definition import Triple
from dit_sparse.kernels.neighborhood import Flags
from dit_sparse.kernels.pattern import MEMBERS, PATTERNS, Pattern, pattern_from_dict
from dit_sparse.kernels.values import fields_of, in_words

_FOUND = ("scored", "choice", "stripes")
_EXAMPLES = {Triple: " as 3x5x5", Flags: " as 1x0x0", tuple[int, ...]: " as 0x3x4"}


def pattern_from_text(text: str) -> Pattern:
    """The pattern that `text` names; anything else is a `ValueError`.

    >>> str(pattern_from_text("neighborhood:window=3x5x5,stride=1x2x2"))
    'neighborhood 3x5x5 stride 1x2x2'
    >>> str(pattern_from_text("band:half_width=16 + sink"))
    'band 16 raster + sink 1'
    """
    if text.lstrip().startswith("{"):
        try:
            return pattern_from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"pattern {text[:80]!r} is no JSON: {error}") from error
    parts = [_one(part.strip()) for part in text.split("+")]
    return pattern_from_dict(
        parts[0] if len(parts) == 1 else {"kind": "any_of", "patterns": parts}
    )


def _one(text: str) -> dict[str, Any]:
    kind, _, rest = text.partition(":")
    if kind in _FOUND:
        raise ValueError(
            f"{text!r} is a {kind} pattern, which is given as JSON: "
            '{"kind": "scored", "score": {"kind": "mass"}, "select": {"kind": "tiers", '
            '"density": 0.2}}'
        )
    if kind not in PATTERNS or kind == "any_of":
        plain = ", ".join(name for name in PATTERNS if name not in ("any_of", *_FOUND))
        raise ValueError(
            f"{text!r} names no pattern; write one of {plain}, its fields after a colon, and + "
            f"between {', '.join(MEMBERS)}: neighborhood:window=3x5x5,stride=1x2x2"
        )
    values: dict[str, Any] = {"kind": kind}
    known = fields_of(PATTERNS[kind])
    for item in rest.split(",") if rest else []:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or name not in known:
            takes = ", ".join(f"{field} ({in_words(known[field], field)})" for field in known)
            raise ValueError(
                f"{item!r} is no field of pattern {kind!r}; it takes {takes or 'none'}, "
                "each as name=value"
            )
        values[name] = _value(kind, name, value, known[name])
    return values


def _value(kind: str, name: str, text: str, annotation: Any) -> Any:
    """`text` as the JSON value that a field of that type takes."""
    if get_origin(annotation) is tuple and re.fullmatch(r"-?\d+(x-?\d+)*", text):
        numbers = [int(number) for number in text.split("x")]
        sized = annotation not in (Triple, Flags) or len(numbers) == 3
        if sized and annotation != Flags:
            return numbers
        if sized and set(numbers) <= {0, 1}:
            return [bool(number) for number in numbers]
    elif annotation is int and re.fullmatch(r"-?\d+", text):
        return int(text)
    elif annotation is float and re.fullmatch(r"-?\d+(\.\d*)?", text):
        return float(text)
    elif get_origin(annotation) not in (tuple, None):
        return text  # a choice, which the pattern checks itself
    raise ValueError(
        f"{name} of pattern {kind!r} must be {in_words(annotation, name)}"
        f"{_EXAMPLES.get(annotation, '')}, got {text!r}"
    )

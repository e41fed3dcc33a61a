"""Gilbert: a generalized Hilbert curve, a compact walk through a box of any size.

    walk(a, b, c): from (0, 0, 0) to (a - 1, 0, 0), made of walks through two, three or five parts

Every step goes to one of the six neighbors of a token; none is diagonal, whatever the sizes. On a
checkerboard the two ends of a walk through an even number of places differ in color, so a walk
along an odd side needs a box that is odd on every side. The whole box is walked along an even
side if it has one, and parts are cut so that each can be walked in turn.

Pyramid Sparse Attention (arXiv 2512.04025) and Video-BLADE (arXiv 2508.10774) put tokens in such
an order, after Hilbert's curve in SpargeAttn (arXiv 2502.18137).
"""

import torch
from torch import Tensor

from dit_sparse.kernels.kept import Kept

_WALKS = Kept(16 << 20)
"""Walks of parts, most of which look alike: a box of 119,056 places takes 8 MB of them."""

Place = tuple[int, int, int]
Side = tuple[int, int]
"""An axis and a length: the places of a side, backwards along the axis if it is negative."""


def gilbert_walk(frames: int, height: int, width: int) -> Tensor:
    """The places of a box in the sequence of the curve, int64 `[places, 3]` as (frame, row,
    column)."""
    sizes = (frames, height, width)
    along = max(range(3), key=lambda axis: (sizes[axis] % 2 == 0, sizes[axis], axis))
    across = [axis for axis in (2, 1, 0) if axis != along]
    return _part((0, 0, 0), *((axis, sizes[axis]) for axis in (along, *across)))


def _part(start: Place, along: Side, *across: Side) -> Tensor:
    """The walk from the place `start` through a box with those sides."""
    sides = (along, *across)
    walk = _walk(*(abs(length) for _, length in sides))
    places = torch.empty_like(walk)
    for number, (axis, length) in enumerate(sides):
        step = walk[:, number]
        places[:, axis] = start[axis] + (step if length > 0 else -step)
    return places


def _walk(a: int, b: int, c: int) -> Tensor:
    return _WALKS.get((a, b, c), lambda: _walked(a, b, c))


def _walked(a: int, b: int, c: int) -> Tensor:
    """The walk of the head of this file, int64 `[places, 3]`; needs `a` even, or every side odd
    and `a` larger than one if any is. Not to be written to."""
    if max(b, c) == 1:
        steps = torch.arange(a)
        return torch.stack([steps, 0 * steps, 0 * steps], 1)
    first, half_b, half_c = _half(a), _half(b), _half(c)
    rest = a - first
    lengthwise = a >= 4 + a % 2
    if lengthwise and 2 * a > 3 * max(b, c):
        parts = [
            _part((0, 0, 0), (0, first), (1, b), (2, c)),
            _part((first, 0, 0), (0, rest), (1, b), (2, c)),
        ]
    elif _all_ways(a, b, c):
        parts = _five(first, rest, half_b, b, half_c, c)
    elif _all_ways(a, c, b):
        return _walk(a, c, b)[:, [0, 2, 1]]
    elif b >= c:
        parts = [
            _part((0, 0, 0), (1, half_b), (0, first), (2, c)),
            _part((0, half_b, 0), (0, a), (1, b - half_b), (2, c)),
            _part((a - 1, half_b - 1, 0), (1, -half_b), (0, -rest), (2, c)),
        ]
    else:
        return _walk(a, c, b)[:, [0, 2, 1]]
    return torch.cat(parts)


def _five(first: int, rest: int, half_b: int, b: int, half_c: int, c: int) -> list[Tensor]:
    """Up along b, across c, over along a, back across c and down along b, as Hilbert's curve."""
    end, top = first + rest - 1, b - half_b
    return [
        _part((0, 0, 0), (1, half_b), (2, half_c), (0, first)),
        _part((0, half_b, 0), (2, c), (0, first), (1, top)),
        _part((0, half_b - 1, c - 1), (0, end + 1), (1, -half_b), (2, half_c - c)),
        _part((end, half_b, c - 1), (2, -c), (0, -rest), (1, top)),
        _part((end, half_b - 1, 0), (1, -half_b), (2, half_c), (0, -rest)),
    ]


def _all_ways(a: int, b: int, c: int) -> bool:
    """Whether the five parts can be walked, and are no thin ones."""
    if a == b == c == 2:
        return True
    return a % 2 == 0 and c % 2 == 0 and min(b, c) >= 3 and 3 * min(b, c) > 2 * max(b, c)


def _half(length: int) -> int:
    """About half, and even if that leaves something."""
    half = length // 2
    return half + half % 2 if length > 2 else half

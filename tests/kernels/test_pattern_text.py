import json
import re

import pytest

from dit_sparse.kernels.pattern import (
    AnyOf,
    Band,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Radial,
    Sink,
    pattern_to_dict,
)
from dit_sparse.kernels.pattern_text import pattern_from_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", Full()),
        ("sink:", Sink()),
        ("band:half_width=16", Band(16)),
        (" band:half_width=2, axis_order=in_frame ", Band(2, "in_frame")),
        ("neighborhood:window=3x5x5,stride=1x2x2", Neighborhood((3, 5, 5), (1, 2, 2))),
        (
            "neighborhood:window=3x5x5,dilation=1x2x2,causal=1x0x0",
            Neighborhood((3, 5, 5), dilation=(1, 2, 2), causal=(True, False, False)),
        ),
        ("columns:blocks=0x3,block=8,grid=3x4x5", Columns((0, 3), 8, (3, 4, 5))),
        ("radial:variant=repo,decay=0.2", Radial("repo", 0.2)),
        ("radial + sink:frames=2", AnyOf((Radial(), Sink(2)))),
    ],
    ids=str,
)
def test_a_pattern_is_read_from_a_line_and_from_json(text: str, expected: Pattern):
    assert pattern_from_text(text) == expected
    assert pattern_from_text(json.dumps(pattern_to_dict(expected))) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spiral:turns=3", "'spiral:turns=3' names no pattern; write one of full, skip, band"),
        ("", "'' names no pattern; write one of full"),
        ("any_of:patterns=1", "and + between band, columns, sink, neighborhood, radial: neigh"),
        (
            "band:width=3",
            "'width=3' is no field of pattern 'band'; it takes half_width (an integer), "
            "axis_order (one of 'raster', 'pixel_major', 'in_frame'), each as name=value",
        ),
        ("band:half_width", "'half_width' is no field of pattern 'band'"),
        ("full:x=1", "it takes none, each as name=value"),
        ("band:half_width=1.5", "half_width of pattern 'band' must be an integer, got '1.5'"),
        ("band:half_width=-2", "half_width must not be negative, got -2"),
        ("band:axis_order=raster", "pattern 'band' is incomplete"),
        ("band:half_width=1,axis_order=tile", "must be one of 'raster', 'pixel_major', 'in_fra"),
        (
            "neighborhood:window=3x5",
            "window of pattern 'neighborhood' must be three integers as 3x5x5, got '3x5'",
        ),
        (
            "neighborhood:window=3x5x5,causal=2x0x0",
            "causal of pattern 'neighborhood' must be three booleans as 1x0x0, got '2x0x0'",
        ),
        ("radial:decay=x", "decay of pattern 'radial' must be a number, got 'x'"),
        ("band:half_width=3 + full", "patterns of pattern 'any_of' must be a list of patterns"),
        ("stripes:density=0.25", "is a stripes pattern, which is given as JSON"),
        ('{"kind": "band"', "is no JSON"),
        ('{"kind": "band", "half_width": "3"}', "half_width of pattern 'band' must be an integer"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        pattern_from_text(text)


def test_json_nested_without_end_is_refused():
    deep = '{"kind": "any_of", "patterns": [' * 20000 + "]}" * 20000
    with pytest.raises(ValueError, match=r"is no JSON|must be a list of patterns"):
        pattern_from_text(deep)

"""The scored pattern: its value, its JSON, its blocks."""

import json
import re
from typing import Any

import pytest
import torch

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import WHOLE, BlockIndices, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import gilbert, pixel_major, raster
from dit_sparse.kernels.pattern import AnyOf, Scored, Sink, pattern_from_dict, pattern_to_dict
from dit_sparse.kernels.pattern_text import pattern_from_text
from dit_sparse.kernels.score import Clustered, Mass, Means, Sampled
from dit_sparse.kernels.scored_blocks import geometry, scored_blocks
from dit_sparse.kernels.select import Bands, Cumulative, Grouped, Tiers, TopHead, TopRow

PATTERNS = [
    Scored(Mass(), Tiers(0.2), "gilbert"),
    Scored(Mass(None), Grouped(0.3), sink_frames=2),
    Scored(Sampled(16), Cumulative(0.95, 0.05, 0.5), "gilbert", 1),
    Scored(Sampled(), Bands((0.4, 0.5, 0.6, 0.8), "mass", 0.06), "pixel_major"),
    Scored(Means(0.1), TopRow(0.4)),
    Scored(Means(), TopHead(0.5), pv_skip=-4.5),
    Scored(Sampled(), Cumulative(0.9, 0.1, 0.3, crossing=False)),
]
CLUSTERED = Scored(Clustered(30, 100), Cumulative(0.9, 0.1))
GRIDS = [
    TokenGrid(3, 5, 7),
    TokenGrid(3, 5, 7, text_before=9, text_after=5),
    TokenGrid(4, 5, 7, text_after=20, valid_text=(20, 3)),
]
WRONG: Any = "spiral"
MASS, TOP = {"kind": "mass"}, {"kind": "top_row", "density": 0.3}


def visited(blocks: BlockIndices) -> torch.Tensor:
    """bool `[heads, tokens, tokens]`, in raster order; of whole blocks only."""
    seen = torch.zeros(blocks.heads, blocks.grid.tokens, blocks.grid.tokens, dtype=torch.bool)
    for head in range(blocks.heads):
        for row in range(blocks.query_blocks):
            for column, tag in blocks.entries(head, row):
                if tag == WHOLE:
                    rows, columns = blocks.query_tokens(row), blocks.key_tokens(column)
                    seen[head, rows[:, None], columns] = True
    return seen


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_blocks_are_attended_to(
    pattern: Scored, grid: TokenGrid, dtype: torch.dtype, operands, masked_attention
):
    query, key, value = operands(grid.tokens, 3, 33, dtype=dtype)
    real = grid.real(2)[:, None, None]
    _, lse = masked_attention(query, key, value, real)
    cut = geometry(pattern.order, grid, 3, 16)
    blocks = scored_blocks(pattern, query, key, cut, lse=lse.float())
    assert blocks.order == pattern.order
    assert blocks.grid == grid
    assert blocks.heads == 3
    assert torch.equal(blocks.permutation, cut.permutation)
    seen = visited(blocks)
    text = torch.ones(grid.tokens, dtype=torch.bool)
    text[grid.text_before : grid.text_before + grid.video] = False
    assert seen[:, text].all()
    assert seen[:, :, text].all()
    if (blocks.tag != WHOLE).any() or dtype != torch.float32:
        return
    expected, _ = masked_attention(query, key, value, seen & real)
    output, _ = sparse_attention(query, key, value, blocks)
    torch.testing.assert_close(output, expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["raster", "gilbert", "pixel_major"])
@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_S_sinks_are_frames_in_token_coordinates(
    order: Any, frames: int, grid: TokenGrid, operands
):
    query, key, _ = operands(grid.tokens, 2)
    select = Bands((0.0, 0.0, 0.1, 0.2), "rank")
    pattern = Scored(Sampled(8), select, order, frames)
    cut = geometry(pattern.order, grid, 2, 8)
    seen = visited(scored_blocks(pattern, query, key, cut))
    size = grid.height * grid.width
    first = slice(grid.text_before, grid.text_before + frames * size)
    assert seen[:, :, first].all()
    # No more than the blocks that hold them, and text.
    expected = torch.zeros(grid.tokens, dtype=torch.bool)
    for block in range(cut.key_blocks):
        tokens = cut.key_tokens(block)
        frame = grid.coordinates(tokens)[0]
        expected[tokens] = bool((frame < frames).any())
    rows = slice(grid.text_before, grid.text_before + grid.video)
    assert torch.equal(seen[:, rows], expected.expand(2, grid.video, -1))


def test_the_geometry_is_made_once_and_visits_nothing():
    grid = GRIDS[1]
    cut = geometry(gilbert(), grid, 3, 16)
    assert cut is geometry(gilbert(), grid, 3, 16)
    assert len(cut.key_block) == 0
    assert cut.heads == 3


def test_a_geometry_of_another_order_is_refused(operands):
    query, key, _ = operands(GRIDS[0].tokens, 2)
    with pytest.raises(ValueError, match="the geometry is in raster order, scored"):
        scored_blocks(PATTERNS[0], query, key, geometry(raster(), GRIDS[0], 2, 16))


def test_its_pairs_are_known_only_while_denoising():
    pattern, grid = PATTERNS[0], GRIDS[0]
    reason = (
        "the pairs of a scored pattern are known only while denoising, so scored mass of 16 rows, "
        "tiers 0.2 recall 0.8, gilbert has none on grid 3x5x7"
    )
    assert str(pattern.refusal(grid)).startswith(reason)
    for use in (
        lambda: pattern.mask(grid),
        lambda: pattern.rows(grid, torch.arange(2)),
        lambda: block_indices([pattern], grid),
    ):
        with pytest.raises(ValueError, match=re.escape(reason)):
            use()


@pytest.mark.parametrize("pattern", [*PATTERNS, CLUSTERED], ids=str)
def test_it_survives_json(pattern: Scored):
    written = json.dumps(pattern_to_dict(pattern))
    assert pattern_from_dict(json.loads(written)) == pattern
    assert pattern_from_text(written) == pattern


def test_its_json_is_nested_values():
    assert pattern_to_dict(PATTERNS[0]) == {
        "kind": "scored",
        "score": {"kind": "mass", "rows": 16},
        "select": {"kind": "tiers", "density": 0.2, "recall": 0.8},
        "token_order": "gilbert",
        "sink_frames": 0,
        "pv_skip": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"score": {"kind": "guess"}},
            "score of pattern 'scored' must be a score of kind mass, sampled, means, random, "
            "checked, oracle, clustered, got {'kind': 'guess'}",
        ),
        ({"score": {"kind": ["mass"]}}, "score of pattern 'scored' must be a score of kind"),
        ({"score": "mass"}, "score of pattern 'scored' must be a score of kind mass"),
        ({"score": TOP}, "score of pattern 'scored' must be a score of kind mass"),
        (
            {"select": {"kind": "top"}},
            "select of pattern 'scored' must be a select of kind top_row, top_head, cumulative",
        ),
        ({"score": {"kind": "mass", "row": 3}}, "score 'mass' has no field row; it takes rows"),
        (
            {"score": {"kind": "mass", "rows": 1.5}},
            "rows of score 'mass' must be an integer or null, got 1.5",
        ),
        ({"score": {"kind": "mass", "rows": 0}}, "rows must be in 1..64, got 0"),
        ({"select": {"kind": "top_row"}}, "select 'top_row' is incomplete"),
        (
            {"select": {"kind": "bands", "bounds": [0.1, 0.2], "by": "rank"}},
            "bounds of select 'bands' must be four numbers, got [0.1, 0.2]",
        ),
        (
            {"select": {"kind": "bands", "bounds": [0, 0, 0, 1], "by": "size"}},
            "by of select 'bands' must be one of 'rank', 'mass', got 'size'",
        ),
        ({"token_order": "tile"}, "token_order of pattern 'scored' must be one of 'raster', 'pix"),
        ({"sink_frames": -1}, "sink_frames must not be negative, got -1; use 0 for no sink"),
        ({"pv_skip": 4}, "pv_skip must be a negative number, got 4; leave it out to leave no"),
        ({"order": "raster"}, "pattern 'scored' has no field order; it takes score, select, tok"),
    ],
)
def test_wrong_json_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        pattern_from_dict({"kind": "scored", "score": MASS, "select": TOP} | changes)


def test_wrong_values_are_named():
    with pytest.raises(
        ValueError, match="score must be one of Mass, Sampled, Means, Random, Checked, Or"
    ):
        Scored(WRONG, TopRow(0.3))
    with pytest.raises(ValueError, match="select must be one of TopRow, TopHead, Cumulative"):
        Scored(Mass(), WRONG)
    with pytest.raises(ValueError, match="one of 'raster', 'pixel_major', 'gilbert', got 'spi"):
        Scored(Mass(), TopRow(0.3), WRONG)
    wrong: Any = PATTERNS[0]
    with pytest.raises(ValueError, match="list the patterns of an any_of one by one"):
        AnyOf((Sink(), wrong))


def test_a_line_of_text_says_that_it_is_given_as_json():
    with pytest.raises(ValueError, match="is a scored pattern, which is given as JSON") as caught:
        pattern_from_text("scored:token_order=raster")
    example = str(caught.value).split("JSON: ")[1]
    assert pattern_from_text(example) == Scored(Mass(), Tiers(0.2))


def test_it_prints_what_it_is():
    assert [str(pattern) for pattern in PATTERNS] == [
        "scored mass of 16 rows, tiers 0.2 recall 0.8, gilbert",
        "scored mass of all rows, grouped 0.3, raster, sink 2",
        "scored sampled 16, cumulative 0.95 in 0.05..0.5, gilbert, sink 1",
        "scored sampled 32, bands 0.4/0.5/0.6/0.8 by mass from 0.06, pixel_major",
        "scored means alike above 0.1, top 0.4 of rows, raster",
        "scored means alike above 0.6, top 0.5 of heads, raster, pv_skip -4.5",
        "scored sampled 32, cumulative 0.9 in 0.1..0.3 less the last, raster",
    ]
    assert str(CLUSTERED) == "scored 30 x 100 clusters, cumulative 0.9 in 0.1..1"


def test_it_names_its_order():
    assert PATTERNS[0].order == gilbert()
    assert PATTERNS[3].order == pixel_major()
    assert PATTERNS[4].order == raster()

"""Planted heads are told apart from a few rows; labels are those of the catalogue."""

from typing import Any

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_sparse.kernels import choosing
from dit_sparse.kernels.blocks import block_density, block_indices
from dit_sparse.kernels.choosing import choice_cost, chosen_patterns
from dit_sparse.kernels.column_mass import column_mass
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    Band,
    Choice,
    Columns,
    Full,
    Neighborhood,
    Pattern,
    Skip,
    Stripes,
    pattern_from_dict,
    pattern_to_dict,
)
from dit_sparse.kernels.rows import sample_rows

GRID = TokenGrid(6, 8, 8, text_before=5)
SPATIAL = Band.of_density(0.3, GRID)
TEMPORAL = Band.of_density(0.3, GRID, "pixel_major")
BOTH = (SPATIAL, TEMPORAL)
BLOCK = 32
COLUMNS = {"c": (1, 6, 9), "d": (0, 2, 11)}
MODES = (Skip(), SPATIAL, TEMPORAL, Stripes(0.25))
"""Of Sparse-vDiT; the fifth is full, above the limit."""


def planted(kinds: str) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that attend to their own frame (`s`), to their own pixel (`t`), to everything (`u`),
    or whose values are nothing (`z`), or that attend to `COLUMNS`; random otherwise."""
    generator = torch.Generator().manual_seed(0)
    frame, row, column = GRID.coordinates(torch.arange(GRID.tokens))
    codes = {
        "s": torch.randn(GRID.frames + 1, 16, generator=generator)[frame],
        "t": torch.randn(65, 16, generator=generator)[row * 8 + column],
        "u": torch.zeros(GRID.tokens, 16),
    }
    codes["z"] = codes["s"]
    codes["s"], codes["t"] = 3 * codes["s"], 3 * codes["t"]
    keys = dict(codes)
    for kind, chosen in COLUMNS.items():
        codes[kind], keys[kind] = torch.ones(2, GRID.tokens, 16)
        for block in chosen:
            start = GRID.text_before + block * BLOCK
            keys[kind][start : start + BLOCK] = 4.0
    query = torch.stack([codes[kind] for kind in kinds], 1)
    key = torch.stack([keys[kind] for kind in kinds], 1)
    value = torch.randn(2, GRID.tokens, len(kinds), 16, generator=generator)
    value[:, :, [kind == "z" for kind in kinds]] = 1.0
    query, key = (repeat(x, "n h d -> b n h d", b=2) for x in (query, key))
    return query, key.clone(), value


def choose(choice: Choice, kinds: str) -> tuple[Pattern, ...]:
    return chosen_patterns(choice, *planted(kinds), GRID, 32)


def test_SG2_spatial_and_temporal_heads_are_told_apart_by_64_rows() -> None:
    expected = (SPATIAL, TEMPORAL, TEMPORAL, SPATIAL)
    assert choose(Choice(BOTH), "stts") == expected
    assert choose(Choice(BOTH, samples=GRID.tokens), "stts") == expected
    assert choose(Choice(BOTH[::-1]), "stts") == expected


def test_the_choice_is_that_of_the_least_error_by_definition() -> None:
    query, key, value = planted("stu")
    query = query + torch.randn(query.shape, generator=torch.Generator().manual_seed(2))
    options = (SPATIAL, TEMPORAL, Neighborhood((3, 5, 5)), Skip())
    choice = Choice(options, samples=GRID.tokens)
    q, k, v = (rearrange(x, "b n h d -> b h n d").double() for x in (query, key, value))
    logits = q @ k.mT / 4
    dense = logits.softmax(-1) @ v
    errors = []
    for pattern in options:
        seen = logits.masked_fill(~pattern.mask(GRID), -torch.inf).softmax(-1).nan_to_num()
        errors.append((seen @ v - dense).square().mean((0, 2, 3)))
    best = torch.stack(errors).argmin(0).tolist()
    found = chosen_patterns(choice, query, key, value, GRID, 32)
    assert found == tuple(options[index] for index in best)
    assert len(set(found)) > 1


def test_SV3_a_price_skips_what_has_no_effect_and_a_limit_keeps_what_has() -> None:
    query, key, value = planted("stuz")
    value[:, :, 3] *= 1e-4
    options = (Skip(), SPATIAL, TEMPORAL)
    choice = Choice(options, metric="sum_d", price=0.5, limit=0.6)
    found = chosen_patterns(choice, query, key, value, GRID, 32)
    assert found == (SPATIAL, TEMPORAL, Full(), Skip()) or found[:2] + found[3:] == (
        SPATIAL, TEMPORAL, Skip(),
    )  # fmt: skip
    strict = Choice(options, metric="sum_d", price=0.5, limit=0.0)
    assert chosen_patterns(strict, query, key, value, GRID, 32) == (Full(),) * 4
    loose = Choice(options, metric="sum_d", price=1e6)
    assert chosen_patterns(loose, query, key, value, GRID, 32) == (Skip(),) * 4


def columns(kind: str) -> Columns:
    return Columns(COLUMNS[kind], BLOCK, GRID.shape)


def test_SV3_stripe_heads_find_the_columns_that_each_of_them_looks_at() -> None:
    query, key, value = planted("cstudz")
    value[:, :, 5] *= 1e-4
    choice = Choice(MODES, metric="sum_d", price=0.5, limit=0.6)
    found = chosen_patterns(choice, query, key, value, GRID, BLOCK)
    assert found[:3] == (columns("c"), SPATIAL, TEMPORAL)
    assert found[4:] == (columns("d"), Skip())
    uniform = Choice(MODES, metric="sum_d", price=0.5, limit=0.01)
    assert chosen_patterns(uniform, query, key, value, GRID, BLOCK)[3] == Full()


def test_columns_are_priced_by_what_they_cost() -> None:
    kept = Stripes(0.25).count(GRID, BLOCK)
    assert kept == 3
    cost = block_density(columns("c"), GRID, BLOCK)
    assert block_density(Stripes(0.25).first(GRID, BLOCK), GRID, BLOCK) == cost
    # Values so small that nothing but the price counts.
    query, key, value = planted("c")
    for limit, expected in ((1.01 * cost, columns("c")), (0.99 * cost, Full())):
        choice = Choice((TEMPORAL, Stripes(0.25)), price=1.0, limit=limit)
        assert chosen_patterns(choice, query, key, 1e-4 * value, GRID, BLOCK) == (expected,)


def test_stripes_are_picked_on_other_rows_than_they_are_judged_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Tensor] = []

    def spied(query: Tensor, key: Tensor, rows: Tensor, *rest: Any, **given: Any) -> Tensor:
        seen.append(rows)
        return column_mass(query, key, rows, *rest, **given)

    monkeypatch.setattr(choosing, "column_mass", spied)
    for samples, number in ((64, 64), (300, GRID.tokens - 300), (400, GRID.tokens)):
        chosen_patterns(Choice(MODES, samples), *planted("c"), GRID, BLOCK)
        judged = set(sample_rows(GRID.tokens, samples).tolist())
        picked = set(seen.pop().tolist())
        assert len(picked) == number
        assert samples > GRID.tokens or not picked & judged


def test_the_mass_of_columns_is_the_mean_attention_of_video_rows() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key = torch.randn(2, 2, GRID.tokens, 3, 16, generator=generator)
    valid = torch.ones(2, GRID.tokens, dtype=torch.bool)
    valid[0, 2:5] = False
    rows = torch.tensor([0, 3, 5, 77, 200, 388])
    q, k = (rearrange(x, "b n h d -> b h n d").double() for x in (query, key))
    logits = (0.3 * q[:, :, rows[2:]] @ k.mT).masked_fill(~valid[:, None, None], -torch.inf)
    video = logits.softmax(-1)[..., 5:].mean((0, 2))
    expected = torch.stack([part.sum(-1) for part in video.split(BLOCK, -1)], -1)
    came = column_mass(query, key, rows, GRID, BLOCK, scale=0.3, valid=valid)
    torch.testing.assert_close(came.double(), expected, atol=1e-6, rtol=1e-5)


def test_stripes_alone_are_refused() -> None:
    for use in (lambda: Stripes(0.25).mask(GRID), lambda: block_indices([Stripes(0.25)], GRID)):
        with pytest.raises(ValueError, match=r"the columns of stripes 0\.25 are known only"):
            use()
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        Stripes(0)


def test_padded_text_is_not_looked_at() -> None:
    query, key, value = planted("st")
    value[0, 1:5] = 1e6
    padded = TokenGrid(6, 8, 8, text_before=5, valid_text=(1, 5))
    assert chosen_patterns(Choice(BOTH), query, key, value, padded, 32) == BOTH


def test_choosing_costs_its_rows() -> None:
    assert choice_cost(Choice(BOTH), 6400) == pytest.approx(0.01 * (0.5 + 3 * 0.5))
    assert choice_cost(Choice(BOTH), 10) == 2.0
    assert choice_cost(Choice((*BOTH, Stripes(0.2))), 6400) == pytest.approx(0.01 * 6 * 0.5)


def test_a_choice_survives_json_and_has_no_mask() -> None:
    choice = Choice((*BOTH, Skip(), Stripes(0.25)), 32, "sum_d", 0.5, 1.0)
    assert pattern_from_dict(pattern_to_dict(choice)) == choice
    with pytest.raises(ValueError, match="what a head chooses is known only while denoising"):
        choice.mask(GRID)
    with pytest.raises(ValueError, match="patterns of a choice must be two or more and different"):
        Choice((SPATIAL, SPATIAL))
    with pytest.raises(ValueError, match="patterns of a choice must be of kind skip, band"):
        Choice((SPATIAL, Full()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patterns of pattern 'choice' must be a list of"):
        pattern_from_dict({"kind": "choice", "patterns": [{"kind": "full"}, {"kind": "skip"}]})

"""Planted heads are told apart from a few rows; labels are those of the catalogue."""

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor

from dit_sparse.kernels.choosing import choice_cost, chosen_patterns
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import (
    Band,
    Choice,
    Full,
    Neighborhood,
    Pattern,
    Skip,
    pattern_from_dict,
    pattern_to_dict,
)

GRID = TokenGrid(6, 8, 8, text_before=5)
SPATIAL = Band.of_density(0.3, GRID)
TEMPORAL = Band.of_density(0.3, GRID, "pixel_major")
BOTH = (SPATIAL, TEMPORAL)


def planted(kinds: str) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that attend to their own frame (`s`), to their own pixel (`t`), to everything (`u`),
    or whose values are nothing (`z`); random otherwise."""
    generator = torch.Generator().manual_seed(0)
    frame, row, column = GRID.coordinates(torch.arange(GRID.tokens))
    codes = {
        "s": torch.randn(GRID.frames + 1, 16, generator=generator)[frame],
        "t": torch.randn(65, 16, generator=generator)[row * 8 + column],
        "u": torch.zeros(GRID.tokens, 16),
    }
    codes["z"] = codes["s"]
    codes["s"], codes["t"] = 3 * codes["s"], 3 * codes["t"]
    query = torch.stack([codes[kind] for kind in kinds], 1)
    value = torch.randn(2, GRID.tokens, len(kinds), 16, generator=generator)
    value[:, :, [kind == "z" for kind in kinds]] = 1.0
    both = repeat(query, "n h d -> b n h d", b=2)
    return both, both.clone(), value


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


def test_padded_text_is_not_looked_at() -> None:
    query, key, value = planted("st")
    value[0, 1:5] = 1e6
    padded = TokenGrid(6, 8, 8, text_before=5, valid_text=(1, 5))
    assert chosen_patterns(Choice(BOTH), query, key, value, padded, 32) == BOTH


def test_choosing_costs_its_rows() -> None:
    assert choice_cost(Choice(BOTH), 6400) == pytest.approx(0.01 * (0.5 + 3 * 0.5))
    assert choice_cost(Choice(BOTH), 10) == 2.0


def test_a_choice_survives_json_and_has_no_mask() -> None:
    choice = Choice((*BOTH, Skip()), 32, "sum_d", 0.5, 1.0)
    assert pattern_from_dict(pattern_to_dict(choice)) == choice
    with pytest.raises(ValueError, match="what a head chooses is known only while denoising"):
        choice.mask(GRID)
    with pytest.raises(ValueError, match="patterns of a choice must be two or more and different"):
        Choice((SPATIAL, SPATIAL))
    with pytest.raises(ValueError, match="patterns of a choice must be of kind skip, band"):
        Choice((SPATIAL, Full()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patterns of pattern 'choice' must be a list of"):
        pattern_from_dict({"kind": "choice", "patterns": [{"kind": "full"}, {"kind": "skip"}]})

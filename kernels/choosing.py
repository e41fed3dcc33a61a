"""Choosing: which of its patterns each head takes, from queries, keys and values of the step.

Stripes are columns of each head's own by then, picked on as many other rows, so that no head's
error is taken where its columns were.
"""

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import block_density
from dit_sparse.kernels.column_mass import column_mass
from dit_sparse.kernels.error import pattern_error
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Choice, Full, Pattern
from dit_sparse.kernels.rows import sample_rows, valid_tokens
from dit_sparse.kernels.stripes import Stripes


def chosen_patterns(
    choice: Choice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grid: TokenGrid,
    block: int,
    *,
    scale: float | None = None,
) -> tuple[Pattern, ...]:
    """The pattern of every head; one choice for the whole batch.

    `query`, `key`, `value` are `[batch, tokens, heads, head_dim]` in raster order; `block` is that
    of the lists, by which densities are priced.

    Raises:
        ValueError: a pattern refuses the grid.
    """
    rows = sample_rows(grid.tokens, choice.samples).to(query.device)
    valid = valid_tokens(grid)
    valid = None if valid is None else valid.to(query.device)
    mass: Tensor | None = None
    if any(isinstance(pattern, Stripes) for pattern in choice.patterns):
        others = _other_rows(rows, grid.tokens)
        mass = column_mass(query, key, others, grid, block, scale=scale, valid=valid).cpu()
    options = [_of_heads(p, query.shape[2], mass, grid, block) for p in choice.patterns]
    prices = [choice.price * _density(pattern, grid, block) for pattern in choice.patterns]
    error = pattern_error(
        query,
        key,
        value,
        lambda part: (_mask(option, grid, rows[part]) for option in options),
        rows,
        metric=choice.metric,
        scale=scale,
        valid=valid,
    )
    loss = error.mean(0).cpu() + torch.tensor(prices)
    least, best = loss.min(-1)
    full = torch.zeros_like(best, dtype=torch.bool)
    if choice.limit is not None:
        full = least > choice.limit
    return tuple(
        Full() if dense else options[index][head]
        for head, (index, dense) in enumerate(zip(best.tolist(), full.tolist(), strict=True))
    )


def choice_cost(choice: Choice, tokens: int) -> float:
    """FLOPs of choosing in those of dense attention: on its rows the logits, and the output of
    dense attention and of every pattern; for stripes the logits of as many rows again."""
    striped = any(isinstance(pattern, Stripes) for pattern in choice.patterns)
    return min(choice.samples, tokens) / tokens * (2 + len(choice.patterns) + striped) / 2


def _of_heads(
    pattern: Pattern, heads: int, mass: Tensor | None, grid: TokenGrid, block: int
) -> tuple[Pattern, ...]:
    """What each head would run; stripes from the mass of its columns, `[heads, key blocks]`."""
    if not isinstance(pattern, Stripes):
        return (pattern,) * heads
    assert mass is not None
    return tuple(pattern.of_mass(own, grid, block) for own in mass)


def _density(pattern: Pattern, grid: TokenGrid, block: int) -> float:
    """Block density; stripes cost alike wherever they are, but for a short last block."""
    known = pattern.first(grid, block) if isinstance(pattern, Stripes) else pattern
    return block_density(known, grid, block)


def _mask(option: tuple[Pattern, ...], grid: TokenGrid, rows: Tensor) -> Tensor:
    """What `rows` see, bool `[rows, tokens]` if it is the same in all heads, else one for each."""
    if len(set(option)) == 1:
        return option[0].rows(grid, rows)
    return torch.stack([pattern.rows(grid, rows) for pattern in option])


def _other_rows(rows: Tensor, tokens: int) -> Tensor:
    """As many rows as `rows` that are not among them; the same if there are no others."""
    more = sample_rows(tokens, 2 * len(rows)).to(rows.device)
    others = more[~torch.isin(more, rows)]
    return others if len(others) else rows

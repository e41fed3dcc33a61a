"""Choosing: which of its patterns each head takes, from queries, keys and values of the step."""

import torch
from torch import Tensor

from dit_sparse.kernels.blocks import block_density
from dit_sparse.kernels.error import pattern_error
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Choice, Full, Pattern
from dit_sparse.kernels.rows import sample_rows, valid_tokens


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
    prices = [choice.price * block_density(pattern, grid, block) for pattern in choice.patterns]
    rows = sample_rows(grid.tokens, choice.samples).to(query.device)
    valid = valid_tokens(grid)
    error = pattern_error(
        query,
        key,
        value,
        lambda part: (pattern.rows(grid, rows[part]) for pattern in choice.patterns),
        rows,
        metric=choice.metric,
        scale=scale,
        valid=None if valid is None else valid.to(query.device),
    )
    loss = error.mean(0).cpu() + torch.tensor(prices)
    least, best = loss.min(-1)
    full = torch.zeros_like(best, dtype=torch.bool)
    if choice.limit is not None:
        full = least > choice.limit
    return tuple(
        Full() if dense else choice.patterns[index]
        for index, dense in zip(best.tolist(), full.tolist(), strict=True)
    )


def choice_cost(choice: Choice, tokens: int) -> float:
    """FLOPs of choosing in those of dense attention: on its rows the logits, and the output of
    dense attention and of every pattern."""
    return min(choice.samples, tokens) / tokens * (2 + len(choice.patterns)) / 2

"""Baseline: an assignment that a search has to beat at the same FLOPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.search.assign import SLACK
from dit_sparse.search.tables import Tables


def random_assignment(tables: Tables, flops: float, seed: int) -> Tensor:
    """Candidates drawn at random for each head, then exchanged at random until their mean FLOPs
    are as close below `flops` as one pass over all exchanges brings them.

    Returns:
        int64 `[rows, heads]`; the same for the same seed. The global random state is left alone.

    Raises:
        ValueError: if every assignment takes more.
    """
    table = tables.flops.flatten(0, 1)
    _check(table.amin(-1).mean().item(), flops)
    heads, candidates = table.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(table.isfinite().double(), 1, generator=generator)
    order = torch.randperm(heads * candidates, generator=generator).tolist()
    spent = table.gather(-1, drawn).sum().item()
    room = flops * heads * (1 + SLACK)
    cost, choice = table.tolist(), drawn[:, 0].tolist()
    for exchange in order:
        head, candidate = divmod(exchange, candidates)
        change = cost[head][candidate] - cost[head][choice[head]]
        if change < 0 if spent > room else 0 < change <= room - spent:
            choice[head] = candidate
            spent += change
    return torch.tensor(choice).reshape(tables.flops.shape[:-1])


def best_uniform(tables: Tables, flops: float, numbers: Sequence[int]) -> Tensor:
    """The one candidate of least total error that takes no more than `flops`, for every head.

    Args:
        tables: of all candidates.
        flops: most FLOPs, of dense attention.
        numbers: the candidates to choose from, which every head must have.

    Returns:
        int64 `[rows, heads]`, all equal.

    Raises:
        ValueError: if every candidate takes more.
    """
    cost = tables.flops[:, 0, numbers].mean(0)
    _check(cost.min().item(), flops)
    total = tables.error[..., numbers].sum((0, 1))
    total[cost > flops * (1 + SLACK)] = torch.inf
    return torch.full(tables.flops.shape[:-1], numbers[int(total.argmin())])


def _check(least: float, flops: float) -> None:
    if least > flops * (1 + SLACK):
        raise ValueError(
            f"no such assignment takes {flops:g} of dense attention's FLOPs or less, the cheapest "
            f"takes {least:.4f}; ask for at least {least:.4f}"
        )

"""Baseline: an assignment that a search has to beat at the same block density."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.search.assign import SLACK
from dit_sparse.search.evidence import Evidence


def random_assignment(evidence: Evidence, density: float, seed: int) -> Tensor:
    """Candidates drawn at random for each head, then exchanged at random until their mean block
    density is as close below `density` as one pass over all exchanges brings it.

    Returns:
        int64 `[layers, heads]`; the same for the same seed. The global random state is left alone.

    Raises:
        ValueError: if every assignment is denser.
    """
    table = evidence.cost.double().flatten(0, 1)
    _check(table.amin(-1).mean().item(), density)
    heads, candidates = table.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(table.isfinite().double(), 1, generator=generator)
    order = torch.randperm(heads * candidates, generator=generator).tolist()
    spent = table.gather(-1, drawn).sum().item()
    room = density * heads * (1 + SLACK)
    cost, choice = table.tolist(), drawn[:, 0].tolist()
    for exchange in order:
        head, candidate = divmod(exchange, candidates)
        change = cost[head][candidate] - cost[head][choice[head]]
        if change < 0 if spent > room else 0 < change <= room - spent:
            choice[head] = candidate
            spent += change
    return torch.tensor(choice).reshape(evidence.cost.shape[:-1])


def best_uniform(evidence: Evidence, density: float) -> Tensor:
    """The one candidate of least total error that is no denser than `density`, for every head.

    Columns are no candidates here: every head has its own.

    Returns:
        int64 `[layers, heads]`, all equal.

    Raises:
        ValueError: if every candidate is denser.
    """
    shared = len(evidence.patterns)
    cost = evidence.cost[0, 0, :shared].double()
    _check(cost.min().item(), density)
    total = evidence.error[..., :shared].double().sum((0, 1))
    total[cost > density * (1 + SLACK)] = torch.inf
    return torch.full(evidence.error.shape[:-1], int(total.argmin()))


def _check(least: float, density: float) -> None:
    if least > density * (1 + SLACK):
        raise ValueError(
            f"no such assignment has a density of {density:g} or less, the cheapest has "
            f"{least:.4f}; ask for at least {least:.4f}"
        )

"""Assignment: one candidate for each head, best under one limit.

Least error within a mean cost, or least cost within a mean error: the multiple-choice knapsack
problem with the roles exchanged. Fixing a price makes it separable, one argmin per head: the
solution of every price lies on a walk along the lower convex hulls of all heads, the step that is
worth most first. Where the next step finds no room, a greedy pass spends what is left. The result
is within the largest single step of the optimum, and a larger limit never gives a worse one. A
fixed price with a gate is the rule of Sparse-vDiT (arXiv 2506.03065, section 4), candidates of
equal cost that of MInference.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLACK = 1e-9
TINY = 1e-300
NARROWINGS = 4
"""Prices tried on all candidates before the hulls are made; a matter of speed only."""
NUDGE = 1 + 1e-7
"""From a slope to a price above it."""


def assign(error: Tensor, cost: Tensor, limit: float) -> Tensor:
    """The candidate of every head, with the mean of the chosen costs at most `limit`.

    Args:
        error: float `[..., candidates]`, at least 0; `inf` forbids a candidate.
        cost: float, same shape; `inf` marks a candidate that a head does not have.
        limit: of the mean cost over heads.

    Returns:
        int64 `[...]`; deterministic, ties go to the cheaper, then to the first candidate.

    Raises:
        ValueError: if even the cheapest candidates cost more than `limit`.
    """
    errors, costs = _tables(error, cost)
    least = costs.amin(-1).mean().item()
    if least > limit * (1 + SLACK):
        raise ValueError(
            f"no assignment costs {limit:g} or less on average, the cheapest costs {least:.4f}; "
            f"ask for at least {least:.4f}"
        )
    return _solve(errors, costs, limit).reshape(error.shape[:-1])


def assign_cheapest(error: Tensor, cost: Tensor, limit: float) -> Tensor:
    """The candidate of every head, with the mean of the chosen errors at most `limit`.

    Args:
        error, cost: as for `assign`.
        limit: of the mean error over heads.

    Returns:
        int64 `[...]`; deterministic, ties go to the smaller error, then to the first candidate.

    Raises:
        ValueError: if even the candidates of least error exceed `limit`.
    """
    errors, costs = _tables(error, cost)
    least = errors.amin(-1).mean().item()
    if least > limit * (1 + SLACK):
        raise ValueError(
            f"no assignment has a mean error of {limit:g} or less, the best has {least:.4g}; "
            f"ask for at least {least:.4g}"
        )
    return _solve(costs, errors, limit).reshape(error.shape[:-1])


def sparse_vdit(
    error: Tensor, cost: Tensor, *, price: float = 0.5, gate: float = 1.0, full: int = 0
) -> Tensor:
    """The rule of Sparse-vDiT (arXiv 2506.03065, section 4), head by head, under no budget.

    A head takes the candidate of least `error + price * cost` (the paper's lambda), `full` left
    out, and `full` where even that loss exceeds `gate` (its epsilon). The defaults are the
    paper's for CogVideoX1.5; they suit its errors, whose scale is not published.

    Args:
        error, cost: as for `assign`.
        price: of one unit of cost, at least 0.
        gate: largest loss of a head that runs sparse.
        full: which candidate is dense attention.

    Returns:
        int64 `[...]`; ties go to the cheaper, then to the first candidate.
    """
    errors, costs = _tables(error, cost)
    sparse = errors.clone()
    sparse[:, full] = torch.inf
    choice = _argmin(sparse, costs, price)
    picked = choice[:, None]
    loss = (sparse.gather(-1, picked) + price * costs.gather(-1, picked))[:, 0]
    choice[~(loss <= gate)] = full
    return choice.reshape(error.shape[:-1])


def price_at(error: Tensor, cost: Tensor, limit: float) -> float:
    """The error that one unit of cost is worth where the mean cost is `limit`; 0 where more cost
    saves no error."""
    errors, costs = _tables(error, cost)
    room = max(limit, costs.amin(-1).mean().item()) * (1 + SLACK) * len(errors)
    return _priced(errors, costs, room)[0]


def hull(error: Tensor, cost: Tensor, prices: int = 200) -> list[tuple[float, float]]:
    """Mean cost and summed error of the best assignments, from the cheapest to the best.

    These are the solutions of a fixed price for `prices` prices: points of the lower convex hull
    of everything that can be assigned.
    """
    errors, costs = _tables(error, cost)
    finite = errors.isfinite()
    spread = errors[finite].max().item() or 1.0
    steps = torch.logspace(-9, 6, prices, dtype=torch.double).tolist()
    choices = [_argmin(errors, costs, spread * price) for price in (0.0, *steps)]
    points = {(_total(costs, each) / len(costs), _total(errors, each)) for each in choices}
    return sorted(points)


def _tables(error: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 `[heads, candidates]`, `inf` in both where a candidate is not to be had."""
    errors = error.double().reshape(-1, error.shape[-1])
    costs = cost.double().reshape_as(errors)
    known = errors + costs < torch.inf
    return torch.where(known, errors, torch.inf), torch.where(known, costs, torch.inf)


def _solve(errors: Tensor, costs: Tensor, limit: float) -> Tensor:
    """Least `errors` with the mean of `costs` at most `limit`; whichever of them these are."""
    room = limit * (1 + SLACK) * len(errors)
    return _fill(errors, costs, _priced(errors, costs, room)[1], room)


def _priced(errors: Tensor, costs: Tensor, room: float) -> tuple[float, Tensor]:
    """The lowest price whose solution keeps to `room`, and that solution.

    All steps along the hulls in the order of what they are worth, as far as there is room; what
    is worth just as much as the first that finds none is left to `_fill`.
    """
    best, cheapest = _least(errors, costs), _least(costs, errors)
    if _total(costs, best) <= room:
        return 0.0, best
    best, cheapest = _narrowed(errors, costs, room, best, cheapest)
    head, candidate = _corners(errors, costs, best, cheapest)
    step = head[1:] == head[:-1]
    own = costs[head, candidate]
    worth = _worth(errors[head, candidate], own)[step]
    order = worth.argsort(descending=True)
    spent = _total(costs, cheapest) + own.diff()[step][order].cumsum(0)
    fitting = int((spent <= room).sum())
    price = worth[order[fitting]].item() if fitting < len(order) else 0.0
    steps = torch.bincount(head[1:][step][worth > price], minlength=len(errors))
    corners = torch.bincount(head, minlength=len(errors))
    return price, candidate[corners.cumsum(0) - corners + steps]


def _narrowed(
    errors: Tensor, costs: Tensor, room: float, best: Tensor, cheapest: Tensor
) -> tuple[Tensor, Tensor]:
    """Solutions of two prices, one above `room` and one within, nearer to each other."""
    for _ in range(NARROWINGS):
        price = _slope(errors, costs, best, cheapest).nanmedian().item()
        if not 0 < price < torch.inf:
            break
        # At the slope itself candidates are equal, and the cheaper has to win.
        middle = (NUDGE * price * costs).add_(errors).argmin(-1)
        if _total(costs, middle) > room:
            best = middle
        else:
            cheapest = middle
    return best, cheapest


def _corners(
    errors: Tensor, costs: Tensor, best: Tensor, cheapest: Tensor
) -> tuple[Tensor, Tensor]:
    """Heads and candidates of the corners of every head's lower convex hull, from `cheapest` up
    to `best`; by head, then by cost."""
    price = _slope(errors, costs, best, cheapest)
    chord = _at(errors, best) + price * _at(costs, best)
    below = (price[:, None] * costs).add_(errors) < chord[:, None]
    below.scatter_(1, torch.stack([best, cheapest], -1), True)
    head, candidate = below.nonzero().unbind(-1)
    order = costs[head, candidate].argsort(stable=True)
    order = order[head[order].argsort(stable=True)]
    head, candidate = head[order], candidate[order]
    while True:
        worth = _worth(errors[head, candidate], costs[head, candidate])
        step = head[1:] == head[:-1]
        before = torch.cat([worth.new_tensor([torch.inf]), torch.where(step, worth, torch.inf)])
        after = torch.cat([torch.where(step, worth, 0.0), worth.new_zeros(1)])
        corner = before > after
        if corner.all():
            return head, candidate
        head, candidate = head[corner], candidate[corner]


def _slope(errors: Tensor, costs: Tensor, best: Tensor, cheapest: Tensor) -> Tensor:
    """Error saved per cost from `cheapest` to `best`, `[heads]`; `nan` where they are the same."""
    return (_at(errors, cheapest) - _at(errors, best)) / (_at(costs, best) - _at(costs, cheapest))


def _worth(errors: Tensor, costs: Tensor) -> Tensor:
    """Error saved per cost from each to the next."""
    return -errors.diff() / costs.diff().clamp_min(TINY)


def _fill(errors: Tensor, costs: Tensor, choice: Tensor, room: float) -> Tensor:
    """Spend what is left, each time on the exchange that saves most error per cost."""
    choice = choice.clone()
    most = _at(costs, choice) + (room - _total(costs, choice))
    allowed = (errors < _at(errors, choice)[:, None]) & (costs <= most[:, None])
    head, candidate = allowed.nonzero().unbind(-1)
    while len(head):
        now = choice[head]
        saved = errors[head, now] - errors[head, candidate]
        extra = costs[head, candidate] - costs[head, now]
        allowed = (saved > 0) & (extra <= room - _total(costs, choice))
        if not allowed.any():
            break
        taken = torch.where(allowed, saved / extra.clamp_min(1e-12), -1.0).argmax()
        choice[head[taken]] = candidate[taken]
        # As room shrinks, what finds none now finds none later.
        head, candidate = head[allowed], candidate[allowed]
    return choice


def _argmin(errors: Tensor, costs: Tensor, price: float) -> Tensor:
    """Per head the candidate of least `error + price * cost`; of equals the cheapest."""
    return _least(errors + price * costs if price else errors, costs)


def _least(loss: Tensor, costs: Tensor) -> Tensor:
    """Per head the candidate of least `loss`; of equals the cheapest, then the first."""
    best = loss.amin(-1, keepdim=True)
    return torch.where(loss > best, torch.inf, costs).argmin(-1)


def _at(table: Tensor, choice: Tensor) -> Tensor:
    return table.gather(-1, choice[:, None])[:, 0]


def _total(costs: Tensor, choice: Tensor) -> float:
    return _at(costs, choice).sum().item()

"""Assignment: one candidate for each head, best under one limit.

Least error within a mean cost, or least cost within a mean error: the multiple-choice knapsack
problem with the roles exchanged. Fixing a price makes it separable, one argmin per head;
bisecting the price finds the best solution on the lower convex hull that keeps the limit, and a
greedy pass spends what is left. The result is within the largest single step of the optimum, and
a larger limit never gives a worse one. A fixed price with a gate is the rule of Sparse-vDiT
(arXiv 2506.03065, section 4), candidates of equal cost that of MInference.
"""

from __future__ import annotations

import torch
from torch import Tensor

BISECTIONS = 64
SLACK = 1e-9


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
    return _price(errors, costs, room)


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
    missing = ~(errors.isfinite() & costs.isfinite())
    return errors.masked_fill(missing, torch.inf), costs.masked_fill(missing, torch.inf)


def _solve(errors: Tensor, costs: Tensor, limit: float) -> Tensor:
    """Least `errors` with the mean of `costs` at most `limit`; whichever of them these are."""
    room = limit * (1 + SLACK) * len(errors)
    return _fill(errors, costs, _argmin(errors, costs, _price(errors, costs, room)), room)


def _price(errors: Tensor, costs: Tensor, room: float) -> float:
    """The lowest price whose solution keeps to `room`, found by bisection."""
    if _total(costs, _argmin(errors, costs, 0.0)) <= room:
        return 0.0
    low, high = 0.0, 1.0
    while _total(costs, _argmin(errors, costs, high)) > room:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _total(costs, _argmin(errors, costs, middle)) > room:
            low = middle
        else:
            high = middle
    return high


def _fill(errors: Tensor, costs: Tensor, choice: Tensor, room: float) -> Tensor:
    """Spend what is left, each time on the exchange that saves most error per cost."""
    choice = choice.clone()
    while True:
        picked = choice[:, None]
        saved = errors.gather(-1, picked) - errors
        extra = costs - costs.gather(-1, picked)
        allowed = (saved > 0) & (extra <= room - _total(costs, choice))
        if not allowed.any():
            return choice
        worth = (saved / extra.clamp_min(1e-12)).masked_fill(~allowed, -1.0)
        head, candidate = divmod(int(worth.argmax()), errors.shape[-1])
        choice[head] = candidate


def _argmin(errors: Tensor, costs: Tensor, price: float) -> Tensor:
    """Per head the candidate of least `error + price * cost`; of equals the cheapest."""
    loss = (errors + price * costs).nan_to_num(nan=torch.inf)
    best = loss.amin(-1, keepdim=True)
    return costs.masked_fill(loss > best, torch.inf).argmin(-1)


def _total(costs: Tensor, choice: Tensor) -> float:
    return costs.gather(-1, choice[:, None]).sum().item()

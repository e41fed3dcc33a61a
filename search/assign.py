"""Assignment: one candidate for each head, of least total error within a mean cost.

This is the multiple-choice knapsack problem. Fixing the price of cost makes it separable, one
argmin per head; bisecting the price finds the cheapest solution on the lower convex hull that
keeps the limit, and a greedy pass spends what is left. The result is within the largest single
step of the optimum, and a larger limit never has more error. A fixed price is the rule of
Sparse-vDiT (arXiv 2506.03065, section 4), candidates of equal cost that of MInference.
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
    shape = error.shape[:-1]
    errors = error.double().reshape(-1, error.shape[-1])
    costs = cost.double().reshape_as(errors)
    errors = errors.masked_fill(~costs.isfinite(), torch.inf)
    costs = costs.masked_fill(~errors.isfinite(), torch.inf)
    least = costs.amin(-1).mean().item()
    room = limit * (1 + SLACK) * len(errors)
    if least * len(errors) > room:
        raise ValueError(
            f"no assignment costs {limit:g} or less on average, the cheapest costs {least:.4f}; "
            f"ask for at least {least:.4f}"
        )
    return _fill(errors, costs, _cheapest_hull(errors, costs, room), room).reshape(shape)


def _cheapest_hull(errors: Tensor, costs: Tensor, room: float) -> Tensor:
    """The solution of the lowest price that keeps to `room`, found by bisection."""
    free = _argmin(errors, costs, 0.0)
    if _total(costs, free) <= room:
        return free
    low, high = 0.0, 1.0
    while _total(costs, _argmin(errors, costs, high)) > room:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _total(costs, _argmin(errors, costs, middle)) > room:
            low = middle
        else:
            high = middle
    return _argmin(errors, costs, high)


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

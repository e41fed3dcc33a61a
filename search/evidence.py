"""Evidence: error and cost of every candidate for every head, as a search measured them.

It travels in the plan, arrays in `Plan.evidence` and the rest in `Plan.provenance["search"]`, so
that another budget is solved in milliseconds without another search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Pattern, pattern_from_dict, pattern_to_dict
from dit_sparse.pipelines.plan import Plan
from dit_sparse.search.assign import assign
from dit_sparse.search.budget import Budget
from dit_sparse.search.columns import columns

ARRAYS = ("error", "cost", "column_mass")


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What a search measured.

    The candidates of a head are `patterns`, the same for all heads, followed by one set of
    columns for each of `column_counts`: the head's key blocks of the largest `column_mass`.

    Args:
        layers: names of the self-attention modules, as in `Plan.assignment`.
        patterns: the candidates that all heads share.
        column_counts: key blocks that each candidate of columns keeps.
        grid: token grid of the search.
        block: tokens of a key block.
        error: float32 `[layers, heads, candidates]`, at least 0.
        cost: float32, same shape; `inf` where a head does not have the candidate.
        column_mass: float32 `[layers, heads, key blocks]`; `nan` in a layer not calibrated.
    """

    layers: tuple[str, ...]
    patterns: tuple[Pattern, ...]
    column_counts: tuple[int, ...]
    grid: TokenGrid
    block: int
    error: Tensor
    cost: Tensor
    column_mass: Tensor

    def pattern(self, layer: int, head: int, candidate: int) -> Pattern:
        """The pattern of one candidate of one head."""
        if candidate < len(self.patterns):
            return self.patterns[candidate]
        count = self.column_counts[candidate - len(self.patterns)]
        return columns(self.column_mass[layer, head], count, self.grid, self.block)

    def solve(self, budget: Budget) -> tuple[dict[str, tuple[Pattern, ...]], dict[str, float]]:
        """The assignment of least total error within `budget`, and what it is predicted to be:
        `density` (block density, mean over heads) and `error` (mean over layers of the summed
        errors of their heads).

        Raises:
            ValueError: if no assignment keeps the budget.
        """
        chosen = assign(self.error, self.cost, budget.density)
        assignment = {
            name: tuple(self.pattern(layer, head, int(c)) for head, c in enumerate(chosen[layer]))
            for layer, name in enumerate(self.layers)
        }
        error, cost = (table.gather(-1, chosen[..., None]) for table in (self.error, self.cost))
        return assignment, {
            "density": cost.double().mean().item(),
            "error": error.double().sum().item() / len(self.layers),
        }

    def arrays(self) -> dict[str, Tensor]:
        """The content of `Plan.evidence`."""
        return {name: getattr(self, name) for name in ARRAYS}

    def description(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        grid = self.grid
        return {
            "layers": list(self.layers),
            "candidates": [pattern_to_dict(pattern) for pattern in self.patterns],
            "column_counts": list(self.column_counts),
            "grid": [*grid.shape, grid.text_before, grid.text_after],
            "block": self.block,
        }

    @classmethod
    def of_plan(cls, plan: Plan) -> Self:
        """The evidence that a searched plan carries.

        Raises:
            ValueError: if the plan carries none, or one that does not fit together.
        """
        described = plan.provenance.get("search")
        if described is None or not set(ARRAYS) <= plan.evidence.keys():
            raise ValueError(
                "the plan carries no evidence of a search, so no other budget can be solved from "
                "it; search a plan with search_plan or dit-sparse search"
            )
        try:
            evidence = cls(
                layers=tuple(described["layers"]),
                patterns=tuple(map(pattern_from_dict, described["candidates"])),
                column_counts=tuple(described["column_counts"]),
                grid=TokenGrid(*described["grid"]),
                block=described["block"],
                **{name: plan.evidence[name] for name in ARRAYS},
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan's search is incomplete ({error}); search again") from error
        candidates = len(evidence.patterns) + len(evidence.column_counts)
        heads = len(next(iter(plan.assignment.values())))
        expected = torch.Size((len(evidence.layers), heads, candidates))
        if evidence.error.shape != expected or evidence.cost.shape != expected:
            raise ValueError(
                f"the plan's evidence should have the shape {tuple(expected)}, error has "
                f"{tuple(evidence.error.shape)} and cost {tuple(evidence.cost.shape)}; "
                "search again"
            )
        return evidence

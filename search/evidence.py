"""Evidence: error and cost of every candidate for every head, as a search measured them.

It travels in the plan, arrays in `Plan.evidence` and the rest in `Plan.provenance["search"]`, so
that another budget is solved in milliseconds without another search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full, Pattern, pattern_from_dict, pattern_to_dict
from dit_sparse.pipelines.plan import Plan
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
        time: float32, shaped as `cost`, of dense attention's time; `None` if nothing on the
            device was calibrated.
    """

    layers: tuple[str, ...]
    patterns: tuple[Pattern, ...]
    column_counts: tuple[int, ...]
    grid: TokenGrid
    block: int
    error: Tensor
    cost: Tensor
    column_mass: Tensor
    time: Tensor | None = None

    def pattern(self, layer: int, head: int, candidate: int) -> Pattern:
        """The pattern of one candidate of one head."""
        if candidate < len(self.patterns):
            return self.patterns[candidate]
        count = self.column_counts[candidate - len(self.patterns)]
        return columns(self.column_mass[layer, head], count, self.grid, self.block)

    @property
    def full(self) -> int:
        """Which candidate is dense attention."""
        return self.patterns.index(Full())

    @property
    def relative_time(self) -> Tensor:
        """Time of every candidate as a share of dense attention's, shaped as `cost`: as measured
        or, where nothing was, its block density."""
        return self.cost if self.time is None else self.time

    def assignment(self, chosen: Tensor) -> dict[str, tuple[Pattern, ...]]:
        """The patterns of the candidates `chosen`, int64 `[layers, heads]`, for a plan."""
        return {
            name: tuple(self.pattern(layer, head, int(c)) for head, c in enumerate(chosen[layer]))
            for layer, name in enumerate(self.layers)
        }

    def arrays(self) -> dict[str, Tensor]:
        """The content of `Plan.evidence`."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return arrays if self.time is None else arrays | {"time": self.time}

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
                time=plan.evidence.get("time"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the plan's search is incomplete ({error}); search again") from error
        reason = evidence._fault({layer: len(own) for layer, own in plan.assignment.items()})
        if reason is not None:
            raise ValueError(f"the plan's evidence {reason}; search again")
        return evidence

    def _fault(self, heads: dict[str, int]) -> str | None:
        """What is wrong with it for layers of so many heads; `None` if nothing is."""
        if set(self.layers) != set(heads):
            differing = min(set(self.layers) ^ set(heads))
            return f"is not of the plan's layers: {differing} is in only one of them"
        count = heads[self.layers[0]]
        expected = (len(self.layers), count, len(self.patterns) + len(self.column_counts))
        tables = {"error": self.error, "cost": self.cost, "time": self.relative_time}
        for name, table in tables.items():
            if tuple(table.shape) != expected:
                return f"should have the shape {expected}, {name} has {tuple(table.shape)}"
            if table.isnan().any() or (table < 0).any():
                return f"should hold numbers of at least 0, {name} holds others"
        if type(self.block) is not int or self.block < 1:
            return f"should have blocks of at least 1 token, came {self.block!r}"
        blocks = -(-self.grid.video // self.block)
        if tuple(self.column_mass.shape) != (*expected[:2], blocks):
            return (
                f"should have {blocks} key blocks, column_mass has the shape "
                f"{tuple(self.column_mass.shape)}"
            )
        if Full() not in self.patterns or (self.error[..., self.full] != 0).any():
            return "should have full attention among its candidates, without error"
        return None

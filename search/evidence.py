"""Evidence: error and density of every candidate for every head, as a search measured them.

It travels in the plan, arrays in `Plan.evidence` and the rest in `Plan.provenance["search"]`, so
that another budget is solved in milliseconds without another search.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from dit_sparse.kernels.column_mass import largest
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Full, pattern_from_dict, pattern_to_dict
from dit_sparse.kernels.remainder import REMAINDERS, Drop, cache_bytes
from dit_sparse.kernels.values import from_dict, to_dict
from dit_sparse.pipelines.heads import HeadGroup, head_groups
from dit_sparse.pipelines.phase import Phase, search_bytes
from dit_sparse.pipelines.plan import Plan
from dit_sparse.pipelines.schedule import Schedule
from dit_sparse.search.course import Course, Keeping, Sightings, courses
from dit_sparse.search.space import Candidate, Space, search_cost
from dit_sparse.search.tables import Tables

ARRAYS = ("error", "density", "column_mass")
OPTIONAL = ("time", "stage_time", "launch_time", "propagation", "importance")


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a search measured.

    The candidates of a head are the patterns of `space`, the same for all heads, and one set of
    columns for each of its `column_counts`, the head's key blocks of the largest `column_mass`;
    each with every remainder in turn.

    Args:
        layers: names of the self-attention modules, as in `Plan.assignment`.
        space: what was tried.
        sightings: the steps that errors were taken at.
        schedules: those that a plan may have.
        grid: token grid of the search.
        block: tokens of a key block.
        head_dim: channels of each layer's heads.
        copies: how many sequences pass a layer at a step, over batch and guidance branches.
        error: float32 `[layers, heads, candidates, anchors, ages]`, at least 0, `inf` for what a
            head does not have.
        density: float32 `[layers, heads, candidates]`: what a sparse pass computes, of dense.
        column_mass: float32 `[layers, heads, key blocks]`.
        time: float32, shaped as `density`, of a sparse pass in dense attention's time; `None` if
            nothing on the device was calibrated.
        stage_time: float32 `[candidates, 3]`, the same of a search, of taking and of applying a
            cache, see `latency.py`; `None` if these were not.
        launch_time: float32 `[candidates, 4]`, launches in `time` and in `stage_time`, if there
            are any in the latter.
        propagation: float32 `[layers]`, how much errors of each layer count; `None` for alike.
        importance: float32 `[anchors]`, how much errors at these steps count; see
            `Sightings.weights`.
    """

    layers: tuple[str, ...]
    space: Space
    sightings: Sightings
    schedules: tuple[Schedule, ...]
    grid: TokenGrid
    block: int
    head_dim: tuple[int, ...]
    copies: int
    error: Tensor
    density: Tensor
    column_mass: Tensor
    time: Tensor | None = None
    stage_time: Tensor | None = None
    launch_time: Tensor | None = None
    propagation: Tensor | None = None
    importance: Tensor | None = None

    def candidate(self, layer: int, head: int, number: int) -> Candidate:
        """One candidate of one head."""
        slot, remainder = divmod(number, len(self.space.remainders))
        rest = self.space.remainders[remainder]
        if slot < len(self.space.patterns):
            return Candidate(self.space.patterns[slot], rest)
        count = self.space.column_counts[slot - len(self.space.patterns)]
        mass = self.column_mass[layer, head]
        return Candidate(largest(mass, count, self.grid, self.block), rest)

    def number(self, layer: int, head: int, candidate: Candidate) -> int | None:
        """Which of the candidates of a head this is; `None` if it was not tried."""
        if candidate.remainder not in self.space.remainders:
            return None
        slots = range(self.space.slots)
        if candidate.pattern in self.space.patterns:
            slots = [self.space.patterns.index(candidate.pattern)]
        numbers = [
            slot * len(self.space.remainders) + self.space.remainders.index(candidate.remainder)
            for slot in slots
        ]
        same = (n for n in numbers if self.candidate(layer, head, n) == candidate)
        return next(same, None)

    def chosen(self, plan: Plan) -> Tensor | None:
        """Numbers of the candidates that a plan runs, int64 `[rows, heads]` as in `Tables`; `None`
        if one was not tried."""
        rows = [
            [
                self.number(layer, head, Candidate(*pair))
                for head, pair in enumerate(
                    zip(phase.assignment[name], phase.remainders_of(name), strict=True)
                )
            ]
            for phase in plan.phases
            for layer, name in enumerate(self.layers)
        ]
        return None if any(None in row for row in rows) else torch.tensor(rows)

    @property
    def full(self) -> int:
        """Which candidate is dense attention."""
        return self.space.patterns.index(Full()) * len(self.space.remainders)

    def tables(self, schedule: Schedule, steps: int | None = None) -> Tables:
        """What follows for generations under `schedule`, of as many steps as the search's if none
        are given."""
        steps = self.sightings.steps if steps is None else steps
        density = self.density.double()
        phases = len(schedule.shares)
        caches, searches = self._kept
        own_bytes = caches + searches if schedule.renews_again else caches
        error, flops, time, launch, kept = (
            torch.zeros(phases, *density.shape).double() for _ in range(5)
        )
        for keeping, numbers in self._keeping.items():
            search = torch.tensor([self._search[number] for number in numbers])
            for phase, own in enumerate(courses(keeping, schedule, steps)):
                weights = self.sightings.weights(own, self.importance).flatten()
                error[phase][..., numbers] = phases * (self._known[..., numbers, :] @ weights)
                flops[phase][..., numbers] = phases * own.cost(density[..., numbers], search)
                spent, launched = self._spent(own, keeping, numbers)
                time[phase][..., numbers] = phases * spent
                launch[phase][..., numbers] = phases * launched
                if own.sparse or own.searches:
                    kept[phase][..., numbers] = own_bytes[..., numbers]
        if self.propagation is not None:
            error *= self.propagation.double()[:, None, None]
        filled = (table.masked_fill(self._missing, torch.inf) for table in (error, flops, time))
        rows = (table.flatten(0, 1) for table in (*filled, launch, kept))
        return Tables(schedule, steps, *rows)

    def _spent(self, own: Course, keeping: Keeping, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Time of the candidates `numbers`, which keep `keeping`, in one phase, and launches in
        it, float64 `[layers, heads, numbers]` or what expands to it."""
        passes = (self.density if self.time is None else self.time).double()
        if self.stage_time is None or self.launch_time is None:
            search = torch.tensor([self._search[number] for number in numbers])
            return own.cost(passes[..., numbers], search), torch.zeros(1).double()
        counts = torch.tensor(own.calls(keeping.cache)).double()
        exact = own.dense + own.exact * passes[..., self.full, None]
        spent = exact + own.sparse * passes[..., numbers]
        spent = spent + self.stage_time.double()[numbers] @ counts[1:]
        launches = self.launch_time.double()
        launched = own.exact * launches[self.full, 0] + launches[numbers] @ counts
        return spent / own.steps, launched / own.steps

    def groups(self, chosen: Tensor) -> tuple[HeadGroup, ...]:
        """The heads of a layer that share calls, for candidates `chosen`, int64 `[heads]`; none
        if all are full."""
        own = [self._first[number] for number in chosen.tolist()]
        return head_groups(tuple(c.pattern for c in own), tuple(c.remainder for c in own))

    def planned(self, plan: Plan, chosen: Tensor, schedule: Schedule) -> Plan:
        """A plan of this search with the candidates `chosen`, int64 `[rows, heads]` as in
        `Tables`, under `schedule`; layers that drop everything have no remainders."""
        first, *later = (
            self._phase(own) for own in chosen.reshape(-1, len(self.layers), chosen.shape[-1])
        )
        return replace(
            plan,
            assignment=first.assignment,
            remainders=first.remainders,
            later=tuple(later),
            schedule=schedule,
        )

    def _phase(self, chosen: Tensor) -> Phase:
        patterns, remainders = {}, {}
        for layer, name in enumerate(self.layers):
            heads = enumerate(chosen[layer].tolist())
            own = [self.candidate(layer, head, number) for head, number in heads]
            patterns[name] = tuple(each.pattern for each in own)
            if any(each.remainder != Drop() for each in own):
                remainders[name] = tuple(each.remainder for each in own)
        return Phase(patterns, remainders)

    def arrays(self) -> dict[str, Tensor]:
        """The content of `Plan.evidence`."""
        arrays = {name: getattr(self, name) for name in (*ARRAYS, *OPTIONAL)}
        return {name: array for name, array in arrays.items() if array is not None}

    def description(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        grid = self.grid
        return {
            "layers": list(self.layers),
            "patterns": [pattern_to_dict(pattern) for pattern in self.space.patterns],
            "column_counts": list(self.space.column_counts),
            "remainders": [to_dict(remainder) for remainder in self.space.remainders],
            "sightings": asdict(self.sightings),
            "schedules": [asdict(schedule) for schedule in self.schedules],
            "grid": [*grid.shape, grid.text_before, grid.text_after],
            "block": self.block,
            "head_dim": list(self.head_dim),
            "copies": self.copies,
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
            space = Space(
                tuple(map(pattern_from_dict, described["patterns"])),
                tuple(described["column_counts"]),
                tuple(from_dict(r, "remainder", REMAINDERS) for r in described["remainders"]),
            )
            seen = described["sightings"]
            evidence = cls(
                layers=tuple(described["layers"]),
                space=space,
                sightings=Sightings(seen["steps"], tuple(seen["anchors"]), tuple(seen["ages"])),
                schedules=tuple(map(_schedule, described["schedules"])),
                grid=TokenGrid(*described["grid"]),
                block=described["block"],
                head_dim=tuple(described["head_dim"]),
                copies=described["copies"],
                error=plan.evidence["error"],
                density=plan.evidence["density"],
                column_mass=plan.evidence["column_mass"],
                **{name: plan.evidence.get(name) for name in OPTIONAL},
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
        count, seen = heads[self.layers[0]], self.sightings
        if Full() not in self.space.patterns or self.space.remainders[:1] != (Drop(),):
            return "should have full attention and dropping among its candidates"
        if type(self.block) is not int or self.block < 1:
            return f"should have blocks of at least 1 token, came {self.block!r}"
        shape = (len(self.layers), count, self.space.slots * len(self.space.remainders))
        expected: dict[str, tuple[int, ...]] = {
            "error": (*shape, len(seen.anchors), len(seen.ages)),
            **dict.fromkeys(("density", "time"), shape),
            "stage_time": (shape[-1], 3),
            "launch_time": (shape[-1], 4),
        }
        for name, expects in expected.items():
            table: Tensor | None = getattr(self, name)
            if table is None:
                continue
            if tuple(table.shape) != expects:
                return f"should have the shape {expects}, {name} has {tuple(table.shape)}"
            if table.isnan().any() or (table < 0).any():
                return f"should hold numbers of at least 0, {name} holds others"
        blocks = -(-self.grid.video // self.block)
        if tuple(self.column_mass.shape) != (*shape[:2], blocks):
            return (
                f"should have {blocks} key blocks, column_mass has the shape "
                f"{tuple(self.column_mass.shape)}"
            )
        for name, count in (("propagation", len(self.layers)), ("importance", len(seen.anchors))):
            weights: Tensor | None = getattr(self, name)
            if weights is not None and (len(weights) != count or not (weights > 0).all()):
                return f"should have {count} numbers above 0 as its {name}"
        if len(self.head_dim) != len(self.layers):
            return f"should have a head_dim for each of {len(self.layers)} layers"
        if (self.error[..., self.full, :, :] != 0).any():
            return "should have full attention among its candidates, without error"
        return None

    @cached_property
    def _keeping(self) -> dict[Keeping, list[int]]:
        """The candidates by what they keep; columns keep what patterns of the grid do."""
        numbers: dict[Keeping, list[int]] = {}
        remainders = self.space.remainders
        for number in range(self.density.shape[-1]):
            slot, remainder = divmod(number, len(remainders))
            pattern = self.space.patterns[slot] if slot < len(self.space.patterns) else Full()
            keeping = Keeping.of(pattern, remainders[remainder])
            numbers.setdefault(keeping, []).append(number)
        return numbers

    @cached_property
    def _first(self) -> list[Candidate]:
        """The candidates of the first head, whose columns stand for those of all: they share
        calls with the same heads."""
        return [self.candidate(0, 0, number) for number in range(self.density.shape[-1])]

    @cached_property
    def _search(self) -> list[float]:
        """What it takes each candidate to find its blocks once."""
        costs = [search_cost(pattern, self.block) for pattern in self.space.patterns]
        costs += [0.0] * len(self.space.column_counts)
        return [cost for cost in costs for _ in self.space.remainders]

    @cached_property
    def _missing(self) -> Tensor:
        """What heads do not have."""
        return self.error.isinf().any(-1).any(-1) | self.density.isinf()

    @cached_property
    def _known(self) -> Tensor:
        """Errors by sighting in one row, 0 for what is missing; float64."""
        return self.error.double().flatten(-2).nan_to_num(posinf=0)

    @cached_property
    def _kept(self) -> tuple[Tensor, Tensor]:
        """Bytes that every candidate of each layer keeps over all guidance branches, float64
        `[layers, 1, candidates]`: caches, and what further searches start from."""
        patterns = (*self.space.patterns, *(Full(),) * len(self.space.column_counts))
        rows = {
            dim: [
                (
                    cache_bytes(remainder, self.copies, self.grid.tokens, 1, dim),
                    search_bytes(pattern, self.grid, self.copies, dim, dense=remainder.cached),
                )
                for pattern in patterns
                for remainder in self.space.remainders
            ]
            for dim in set(self.head_dim)
        }
        kept = torch.tensor([rows[dim] for dim in self.head_dim], dtype=torch.double)
        caches, searches = kept[:, None].unbind(-1)
        return caches, searches


def _schedule(data: dict[str, Any]) -> Schedule:
    tuples: dict[str, Any] = {name: tuple(data.get(name, ())) for name in ("renew_at", "phases")}
    return Schedule(**data | tuples)

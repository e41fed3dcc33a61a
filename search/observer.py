"""Observer of a search: takes down the error of every candidate at the calls of a dense run.

    renewal step     blocks are found, caches of remainders taken: what reuse will work with
    some steps on    sparse output, with the cache of then, against the dense output of now

Sums per layer are kept and, until the generation ends, what a few sampled rows would have kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import WHOLE, block_indices
from dit_sparse.kernels.column_mass import column_mass, largest
from dit_sparse.kernels.error import Distance, Metric, row_counts
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.pattern import Full
from dit_sparse.kernels.ranking import Ranking, score_blocks
from dit_sparse.kernels.remainder import Cache, Cached, Pooled, cache_of
from dit_sparse.kernels.row_attention import RowAttention, RowPair
from dit_sparse.kernels.rows import sample_rows, valid_tokens
from dit_sparse.kernels.score import BlockScore
from dit_sparse.kernels.scored import Scored
from dit_sparse.kernels.scored_blocks import geometry
from dit_sparse.kernels.selection import select_blocks
from dit_sparse.pipelines.capture import AttentionSite
from dit_sparse.search.course import Sightings
from dit_sparse.search.lens import Lens, Sight
from dit_sparse.search.space import Space

EVERY = -1
"""Stands for all guidance branches."""

HELD_BYTES = 2**28
"""Attention weights held at a time; the masked copy takes as much again."""


@dataclass(slots=True)
class Sums:
    """What was seen of one layer, in float64 and in the order in which the calls came.

    Args:
        error: `[heads, slots, remainders, anchors, ages]`; `inf` where a pattern does not go with
            a remainder.
        count: calls, `[anchors, ages]`.
        column_mass: of the layer's first call, float32 `[heads, key blocks]`.
    """

    error: Tensor
    count: Tensor
    column_mass: Tensor


@dataclass(frozen=True, slots=True)
class Renewed:
    """What the sampled rows keep of a renewal: the blocks that they visit under the patterns that
    were found, and the caches, by first slot of the sight and number of the remainder."""

    visited: dict[Lens, tuple[Tensor, ...]]
    caches: dict[tuple[int, int], Cache] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One attention call and the rows of it that are looked at."""

    grid: TokenGrid
    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor

    @property
    def valid(self) -> Tensor | None:
        valid = valid_tokens(self.grid)
        return valid if valid is None else valid.to(self.query.device)

    def pairs(
        self, masks: Callable[[slice], Iterable[Tensor]], lens: Lens | None = None
    ) -> RowPair:
        """The rows under each of `masks`, made for some heads at a time; over the means of `lens`
        instead of the keys, if given."""
        batch, tokens, heads, _ = self.query.shape
        step = max(1, HELD_BYTES // (4 * batch * len(self.rows) * tokens))
        pairs = []
        for start in range(0, heads, step):
            part = slice(start, min(start + step, heads))
            own = self.query[:, :, part], self.key[:, :, part], self.value[:, :, part]
            if lens is None:
                attention = RowAttention.of(*own, self.rows, valid=self.valid)
            else:
                attention = lens.over_means(*own, self.rows, self.valid)
            pairs.append(attention.under(masks(part)))
        outputs, lses = zip(*pairs, strict=True)
        return RowPair(torch.cat(outputs, 1), torch.cat(lses, 1))


class Scoring:
    """Observer of the error of every candidate.

    Args:
        modules: the layers by name, whose output projections (`to_out`) the errors are taken
            through; `None` leaves errors as they are before the projection.
        grid: of the calls.
        block: tokens of a block of queries and of keys.
        space: what is tried.
        sightings: when.
        rows: query rows to sample.
        metric: of the error.

    `sums` is what the running generation has shown of each layer, `query` one number in the
    shape, dtype and place of the first query, `branches` the guidance branches.
    """

    def __init__(
        self,
        modules: Mapping[str, Any] | None,
        grid: TokenGrid,
        block: int,
        space: Space,
        sightings: Sightings,
        rows: int,
        metric: Metric,
    ) -> None:
        self.query: Tensor | None = None
        self.branches: dict[str, int] = {}
        self.column_mass: dict[str, Tensor] = {}
        self._modules = modules
        self._grid = grid
        self._block = block
        self._space = space
        self._sightings = sightings
        self._rows = sample_rows(grid.tokens, rows)
        self._metric: Metric = metric
        level = next((r.level for r in space.remainders if isinstance(r, Pooled)), None)
        self._found: dict[Lens, tuple[int, ...]] = {}
        self._followed: dict[Lens, tuple[int, ...]] = {}
        for number, pattern in enumerate(space.patterns):
            lens = Lens(pattern.order or raster(), grid, block, level)
            group = self._found if isinstance(pattern, Scored) else self._followed
            group[lens] = (*group.get(lens, ()), number)
        self._sights: list[Sight] = []
        self.begin(None)

    def begin(self, number: int | None) -> None:
        """A generation begins: the one of prompt `number`, of whose guidance branches one is
        looked at, in turn with those of the other prompts; all of them if `None`."""
        self._number = number
        self._turn: int | None = None
        self.sums: dict[str, Sums] = {}
        self._renewed: dict[tuple[str, str, int], Renewed] = {}

    def __call__(
        self,
        site: AttentionSite,
        branch: str,
        step: int,
        steps: int,
        grid: TokenGrid,
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> None:
        self.branches.setdefault(branch, len(self.branches))
        sighted = self._sightings.at(step)
        if not sighted:
            return
        common_grid(self._grid, grid)
        layer = site.name
        if self.query is None:
            self._begin_on(query)
        if not self._looks_at(branch, step):
            return
        call = Call(grid, query, key, value, self._rows)
        if layer not in self.column_mass:
            mass = column_mass(query, key, call.rows, self._grid, self._block, valid=call.valid)
            self.column_mass[layer] = mass.cpu()
        for anchor, age in sighted:
            if age == 0:
                self._renewed[layer, branch, anchor] = Renewed(self._find(call))
        dense = call.pairs(lambda _: [torch.ones((), dtype=torch.bool, device=query.device)])
        counts = row_counts(call.rows, len(query), call.valid)
        distance = Distance(dense.output[:, :, 0], self._projection(layer), counts)
        followed = [
            (sight, self._under(call, sight, distance))
            for sight in (*self._sights, *self._columns(layer))
        ]
        sums = self.sums.setdefault(layer, self._nothing(layer))
        for anchor, age in sighted:
            renewed = self._renewed.get((layer, branch, anchor))
            if renewed is None:
                # Another transformer ran at the renewal.
                continue
            sights = [
                lens.at_blocks(self._found[lens], tables)
                for lens, tables in renewed.visited.items()
            ]
            found = [(sight, self._under(call, sight, distance)) for sight in sights]
            for sight, (pair, means) in (*followed, *found):
                errors = self._remainders(sight, pair, means, dense, distance, age, renewed.caches)
                mean = errors.mean(0).double().cpu()
                sums.error[:, list(sight.slots), :, anchor, age] += mean
            sums.count[anchor, age] += 1

    def _looks_at(self, branch: str, step: int) -> bool:
        """Whether the running generation is looked at in this guidance branch. How many there are
        is known from the first step on; if that is looked at, then in all of them."""
        if self._turn is None:
            known = step > 0 and self._number is not None
            self._turn = (self._number or 0) % len(self.branches) if known else EVERY
        return self._turn in (EVERY, self.branches[branch])

    def described(self) -> dict[str, Any]:
        """Of the calls, as JSON values: `shape` and `dtype` of queries, `device`, and how many
        `branches` of guidance there are."""
        assert self.query is not None
        return {
            "shape": list(self.query.shape),
            "dtype": str(self.query.dtype).removeprefix("torch."),
            "device": str(self.query.device),
            "branches": len(self.branches),
        }

    def _begin_on(self, query: Tensor) -> None:
        """Prepare for calls like that of `query`."""
        self.query = query.new_empty(()).expand(query.shape)
        self._rows = self._rows.to(query.device)
        for lens, numbers in self._followed.items():
            patterns = [self._space.patterns[number] for number in numbers]
            self._sights.append(lens.at_patterns(self._rows, numbers, patterns))

    def _nothing(self, layer: str) -> Sums:
        mass = self.column_mass[layer]
        anchors, ages = len(self._sightings.anchors), len(self._sightings.ages)
        shape = len(mass), self._space.slots, len(self._space.remainders), anchors, ages
        return Sums(torch.zeros(shape, dtype=torch.double), torch.zeros(anchors, ages), mass)

    def _find(self, call: Call) -> dict[Lens, tuple[Tensor, ...]]:
        """The blocks that the rows visit under the scored patterns, found from this call."""
        if not self._found:
            return {}
        heads = call.query.shape[2]
        every = block_indices((Full(),) * heads, call.grid, None, self._block, self._block)
        lse = sparse_attention(call.query, call.key, call.value, every)[1]
        visited = {}
        for lens, numbers in self._found.items():
            cut = geometry(lens.order, call.grid, heads, self._block)
            rankings: dict[BlockScore, Ranking] = {}
            tables = []
            for number in numbers:
                pattern = self._space.patterns[number]
                # Clusters are no candidates, see `space.search_cost`.
                assert isinstance(pattern, Scored)
                assert isinstance(pattern.score, BlockScore)
                if pattern.score not in rankings:
                    rankings[pattern.score] = score_blocks(
                        pattern.score, call.query, call.key, cut, lse=lse
                    )
                tags = select_blocks(pattern.select, rankings[pattern.score], cut)
                tables.append(tags == WHOLE)
            visited[lens] = lens.row_tables(self._rows, tables)
        return visited

    def _columns(self, layer: str) -> tuple[Sight, ...]:
        """What the rows see under the columns that each head has for itself, if any are tried."""
        if not self._space.column_counts:
            return ()
        masks = []
        for count in self._space.column_counts:
            heads = [largest(m, count, self._grid, self._block) for m in self.column_mass[layer]]
            masks.append(torch.stack([p.rows(self._grid, self._rows) for p in heads]))
        slots = range(len(self._space.patterns), self._space.slots)
        return (Sight(tuple(slots), tuple(masks), None, None),)

    def _under(
        self, call: Call, sight: Sight, distance: Distance
    ) -> tuple[RowPair, Tensor | None]:
        """Pairs of the candidates of a sight, and their errors with a pooled remainder."""
        pair = call.pairs(sight.keys)
        if sight.means is None:
            return pair, None
        rest = call.pairs(sight.runs, sight.lens)
        return pair, distance.error(pair.merged(rest).output, self._metric)

    def _remainders(
        self,
        sight: Sight,
        pair: RowPair,
        means: Tensor | None,
        dense: RowPair,
        distance: Distance,
        age: int,
        caches: dict[tuple[int, int], Cache],
    ) -> Tensor:
        """Errors `[batch, heads, candidates, remainders]`; caches are taken at age 0."""
        nothing = torch.full_like(pair.lse[..., 0], torch.inf)
        errors = []
        for number, remainder in enumerate(self._space.remainders):
            own = sight.slots[0], number
            if isinstance(remainder, Pooled):
                errors.append(nothing if means is None else means)
            elif not isinstance(remainder, Cached):
                errors.append(distance.error(pair.output, self._metric))
            elif age == 0:
                whole = RowPair(dense.output.expand_as(pair.output), dense.lse.expand_as(pair.lse))
                caches[own] = cache_of(remainder, whole.folded(), pair.folded())
                errors.append(torch.zeros_like(nothing))
            else:
                output = pair.unfolded(caches[own].apply(pair.folded(), age))
                errors.append(distance.error(output, self._metric))
        return torch.stack(errors, -1)

    def _projection(self, layer: str) -> Tensor | None:
        if self._modules is None:
            return None
        outputs = getattr(self._modules[layer], "to_out", None)
        if outputs is None:
            raise ValueError(
                f"{layer} has no output projection of its own (to_out), so errors cannot be "
                "taken through it; search with through_wo=False"
            )
        return outputs[0].weight


def common_grid(known: TokenGrid | None, grid: TokenGrid) -> TokenGrid:
    """`grid` without the valid length of its text, if it agrees with the one `known`."""
    plain = TokenGrid(*grid.shape, grid.text_before, grid.text_after)
    if known not in (None, plain):
        raise ValueError(
            f"the token grid changed from {known} to {plain} during the search; "
            "a search needs one grid"
        )
    return plain

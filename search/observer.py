"""Observers of a search: what is taken down at the dense attention calls of a generation.

`Calibration` sums the attention that blocks of keys draw, from which columns are chosen;
`Scoring` sums the error of every candidate. Both keep sums per layer, no activations.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from dit_sparse.kernels.error import Metric, pattern_error
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.rows import sample_rows, valid_tokens
from dit_sparse.pipelines.capture import AttentionSite
from dit_sparse.search.columns import column_mass

MASK_CACHE_BYTES = 2**29
"""Row masks of the shared candidates are kept between calls up to this size."""


class Mean:
    """The running mean of the tensors added for every layer, on the CPU.

    Sums are float64, in the order in which the calls come.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, layer: str, values: Tensor) -> None:
        """Add one observation of `layer`."""
        values = values.double().cpu()
        self._sums[layer] = self._sums[layer] + values if layer in self._sums else values
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def of(self, layer: str) -> Tensor | None:
        """float32 mean of the observations of `layer`; `None` if there were none."""
        if layer not in self._sums:
            return None
        return (self._sums[layer] / self._counts[layer]).float()


class Calibration:
    """Observer of the mass of key blocks.

    Args:
        block: tokens of a key block.
        rows: query rows to sample.
    """

    def __init__(self, block: int, rows: int) -> None:
        self.mass = Mean()
        self.grid: TokenGrid | None = None
        self._block = block
        self._rows = rows

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
        self.grid = common_grid(self.grid, grid)
        rows = sample_rows(grid.tokens, self._rows).to(query.device)
        mass = column_mass(query, key, rows, self.grid, self._block, valid=_valid(grid, query))
        self.mass.add(site.name, mass)


class Scoring:
    """Observer of the error of every candidate.

    Args:
        modules: the layers by name, whose output projections (`to_out`) the errors are taken
            through; `None` leaves errors as they are before the projection.
        grid: of the calls.
        shared: candidates of every head.
        own: further candidates of every head of a layer, by layer; a layer may have none.
        at: the denoising steps to look at.
        rows: query rows to sample.
        metric: of the error.

    `query` is one number in the shape, dtype and place of the first query that was scored.
    """

    def __init__(
        self,
        modules: Mapping[str, Any] | None,
        grid: TokenGrid,
        shared: tuple[Pattern, ...],
        own: Mapping[str, tuple[tuple[Pattern, ...], ...]],
        at: Container[int],
        rows: int,
        metric: Metric,
    ) -> None:
        self.error = Mean()
        self.query: Tensor | None = None
        self._modules = modules
        self._grid = grid
        self._shared = shared
        self._own = own
        self._at = at
        self._rows = sample_rows(grid.tokens, rows)
        self._metric: Metric = metric
        self._cache: dict[int, list[Tensor]] = {}
        self._keep = len(shared) * len(self._rows) * grid.tokens <= MASK_CACHE_BYTES

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
        if step not in self._at:
            return
        common_grid(self._grid, grid)
        if self.query is None:
            self.query = query.new_empty(()).expand(query.shape)
        self._rows = self._rows.to(query.device)
        error = pattern_error(
            query,
            key,
            value,
            lambda part: chain(self._shared_masks(part), self._own_masks(site.name, part)),
            self._rows,
            metric=self._metric,
            projection=self._projection(site.name),
            valid=_valid(grid, query),
        )
        self.error.add(site.name, error.mean(0))

    def _shared_masks(self, part: slice) -> Iterable[Tensor]:
        if part.start in self._cache:
            return self._cache[part.start]
        masks = (pattern.rows(self._grid, self._rows[part]) for pattern in self._shared)
        if self._keep:
            return self._cache.setdefault(part.start, list(masks))
        return masks

    def _own_masks(self, layer: str, part: slice) -> Iterable[Tensor]:
        for patterns in zip(*self._own.get(layer, ()), strict=True):
            yield torch.stack([p.rows(self._grid, self._rows[part]) for p in patterns])

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


def _valid(grid: TokenGrid, query: Tensor) -> Tensor | None:
    valid = valid_tokens(grid)
    return valid if valid is None else valid.to(query.device)

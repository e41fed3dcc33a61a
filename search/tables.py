"""Tables: what every candidate of every head errs, costs and keeps under one schedule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_sparse.pipelines.schedule import Schedule


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """What every candidate of every head errs, costs and keeps under one schedule, `[rows, heads,
    candidates]`; `inf` in all where a head does not have the candidate.

    A row is a layer in one phase of the schedule: the layers of the first phase come first, then
    those of the next. Means over all rows are those of the generation, so what a row errs and
    costs in its own phase counts as often as there are phases.

    Args:
        schedule: that these are for.
        steps: of the generation.
        error: mean over all denoising steps, float64.
        flops: share of the attention of a dense generation, searches and caches included.
        time: the same of its seconds, as far as they were measured, as if the launches of all
            calls were shared by all heads of the layer.
        launch: what of the time is launches, which each group of heads pays for itself.
        bytes: kept between steps in the row's phase, over all guidance branches.
    """

    schedule: Schedule
    steps: int
    error: Tensor
    flops: Tensor
    time: Tensor
    launch: Tensor
    bytes: Tensor

    @property
    def dense(self) -> float:
        """Share of the steps that the schedule runs dense."""
        dense = sum(self.schedule.dense(step, self.steps) for step in range(self.steps))
        return dense / self.steps

    def most_bytes(self, chosen: Tensor) -> float:
        """Kept between steps by the candidates `chosen`, int64 `[rows, heads]`, in the phase that
        keeps most."""
        kept = self.bytes.gather(-1, chosen[..., None]).sum((1, 2))
        return kept.reshape(len(self.schedule.shares), -1).sum(-1).max().item()

"""AttentionReport: what the self-attention of the last generation computed, and what it cost.

No call runs dense unnoticed: every dense call is counted under its reason. Densities are given
twice, over all calls, dense ones as 1, and over the sparse calls alone, as papers do.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass

import torch

from dit_sparse.kernels.blocks import Density
from dit_sparse.kernels.grid import TokenGrid

DENSE = Density(element=1.0, block=1.0, weighted=1.0)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """The calls of one layer.

    Args:
        layer (`str`): component and path, as in the plan.
        sparse_calls (`int`): calls that ran the patterns of the plan.
        dense_calls (`dict[str, int]`): dense calls by reason.
        density (`Density`, *optional*): of the sparse calls; `None` if there were none.
    """

    layer: str
    sparse_calls: int
    dense_calls: dict[str, int]
    density: Density | None


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """The planned self-attention calls of one generation, both guidance branches together.

    Args:
        layers (`tuple[LayerReport, ...]`): in the order of the plan, also those never called.
        density (`Density`, *optional*): averaged over all calls, dense ones as 1; `None` before
            the first call.
        density_sparse (`Density`, *optional*): averaged over the sparse calls; `None` if there
            were none.
        seconds (`float`): spent in these calls, on an accelerator by its own clock.
    """

    layers: tuple[LayerReport, ...]
    density: Density | None
    density_sparse: Density | None
    seconds: float

    @property
    def sparse_calls(self) -> int:
        """Calls that ran patterns."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def dense_calls(self) -> dict[str, int]:
        """Dense calls of all layers by reason."""
        return dict(sum((Counter(layer.dense_calls) for layer in self.layers), Counter()))

    def __str__(self) -> str:
        lines = [
            f"{self.sparse_calls} sparse self-attention calls in {self.seconds:.2f} s",
            *(f"{calls} dense calls: {reason}" for reason, calls in self.dense_calls.items()),
        ]
        for label, density in (("all", self.density), ("sparse", self.density_sparse)):
            if density is not None:
                lines.append(
                    f"density of {label} calls: element {density.element:.3f}, "
                    f"block {density.block:.3f}, weighted {density.weighted:.3f}"
                )
        silent = [layer.layer for layer in self.layers if not layer.sparse_calls]
        lines += [f"never sparse: {', '.join(silent)}"] if silent else []
        return "\n".join(lines)


class Record:
    """The calls of the running generation, as they happen."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, TokenGrid, str | None]] = Counter()
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def call(
        self, layer: str, grid: TokenGrid, dense: str | None, device: torch.device
    ) -> Iterator[None]:
        """Count and time one call; `dense` is the reason for running it dense."""
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        else:
            begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        self._calls[layer, grid, dense] += 1

    def report(
        self, layers: Iterable[str], density: Callable[[str, TokenGrid], Density]
    ) -> AttentionReport:
        """Sum up; `density` gives that of a layer's patterns on a grid."""
        sparse: dict[str, list[tuple[Density, int]]] = defaultdict(list)
        dense: dict[str, dict[str, int]] = defaultdict(dict)
        for (layer, grid, reason), calls in self._calls.items():
            if reason is None:
                sparse[layer].append((density(layer, grid), calls))
            else:
                dense[layer][reason] = dense[layer].get(reason, 0) + calls
        every_sparse = [weighted for entries in sparse.values() for weighted in entries]
        every_dense = [(DENSE, calls) for reasons in dense.values() for calls in reasons.values()]
        return AttentionReport(
            layers=tuple(
                LayerReport(
                    layer,
                    sum(calls for _, calls in sparse[layer]),
                    dict(dense[layer]),
                    mean_density(sparse[layer]),
                )
                for layer in layers
            ),
            density=mean_density(every_sparse + every_dense),
            density_sparse=mean_density(every_sparse),
            seconds=self._seconds + sum(map(_elapsed, self._events)),
        )


def mean_density(weighted: list[tuple[Density, int]]) -> Density | None:
    """The mean of densities with weights; `None` of none."""
    total = sum(weight for _, weight in weighted)
    if not total:
        return None
    sums = zip(*(tuple(d * w for d in astuple(density)) for density, w in weighted), strict=True)
    return Density(*(sum(column) / total for column in sums))


def _elapsed(events: tuple[torch.Event, torch.Event]) -> float:
    begin, end = events
    end.synchronize()
    return begin.elapsed_time(end) / 1000

"""AttentionReport: what the self-attention of the last generation computed, and what it cost.

No call runs dense unnoticed: every dense call is counted under its reason. Densities are given
twice, over all calls, dense ones as 1, and over the sparse calls alone, as papers do.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from dit_sparse.kernels.blocks import Density
from dit_sparse.pipelines.memory import Memory

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
    """The planned self-attention calls of one generation, all guidance branches together.

    Args:
        layers (`tuple[LayerReport, ...]`): in the order of the plan, also those never called.
        density (`Density`, *optional*): averaged over all calls, dense ones as 1; `None` before
            the first call.
        density_sparse (`Density`, *optional*): averaged over the sparse calls; `None` if there
            were none.
        flops (`float`, *optional*): of all calls, with what searches and caches took, in those of
            the same calls run dense; `None` before the first call.
        cache_bytes (`int`): most memory that caches held at once.
        dropped_caches (`int`): caches that did not fit the plan's limit.
        seconds (`float`): spent in these calls, on an accelerator by its own clock.
        stages (`dict[str, float]`): of these seconds those of `attention`, `search` and
            `remainder` in sparse calls and renewals.
    """

    layers: tuple[LayerReport, ...]
    density: Density | None
    density_sparse: Density | None
    flops: float | None
    cache_bytes: int
    dropped_caches: int
    seconds: float
    stages: dict[str, float]

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
        if self.flops is not None:
            lines.append(f"attention FLOPs: {self.flops:.3f} of dense")
        if self.cache_bytes:
            dropped = f", {self.dropped_caches} did not fit" if self.dropped_caches else ""
            lines.append(f"caches: {self.cache_bytes / 1e6:.1f} MB at most{dropped}")
        silent = [layer.layer for layer in self.layers if not layer.sparse_calls]
        lines += [f"never sparse: {', '.join(silent)}"] if silent else []
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Call:
    """What one attention call computed: `density` and `flops` in those of dense attention, and
    the reason if all of it is dense."""

    density: Density
    flops: float
    dense: str | None = None


class Record:
    """The calls of the running generation, as they happen."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, Call]] = Counter()

    def add(self, layer: str, call: Call) -> None:
        """Count a call of a layer."""
        self._calls[layer, call] += 1

    def report(
        self, layers: Iterable[str], seconds: float, stages: dict[str, float], memory: Memory
    ) -> AttentionReport:
        """Sum up."""
        every = [(call, times) for (_, call), times in self._calls.items()]
        sparse = [(call.density, times) for call, times in every if call.dense is None]
        total = sum(times for _, times in every)
        return AttentionReport(
            layers=tuple(self._layer(layer) for layer in layers),
            density=mean_density([(c.density, times) for c, times in every]) if every else None,
            density_sparse=mean_density(sparse) if sparse else None,
            flops=sum(call.flops * times for call, times in every) / total if total else None,
            cache_bytes=memory.peak,
            dropped_caches=memory.dropped,
            seconds=seconds,
            stages=stages,
        )

    def _layer(self, layer: str) -> LayerReport:
        own = [(call, times) for (name, call), times in self._calls.items() if name == layer]
        dense: Counter[str] = Counter()
        for call, times in own:
            if call.dense is not None:
                dense[call.dense] += times
        sparse = [(call.density, times) for call, times in own if call.dense is None]
        density = mean_density(sparse) if sparse else None
        return LayerReport(layer, sum(times for _, times in sparse), dict(dense), density)


def mean_density(weighted: list[tuple[Density, int]]) -> Density:
    """The mean of densities with weights, at least one of them above 0."""
    total = sum(weight for _, weight in weighted)
    sums = zip(*(tuple(d * w for d in astuple(density)) for density, w in weighted), strict=True)
    return Density(*(sum(column) / total for column in sums))

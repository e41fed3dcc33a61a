"""Phase: what every layer and head does in a part of the denoising steps.

What a video shows is settled in its first steps, what it looks like in detail in its last: heads
that compute much at first and little later lose less than heads that compute the same throughout.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from dit_sparse.kernels.clustered_blocks import centroid_bytes
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import OnlinePattern, Pattern
from dit_sparse.kernels.remainder import Drop, Remainder, cache_bytes
from dit_sparse.kernels.score import Clustered, Oracle
from dit_sparse.kernels.scored import Scored
from dit_sparse.pipelines.fingerprint import ModelFingerprint

LSE_BYTES = 4

Key = TypeVar("Key", bound=Hashable)


def tally(pairs: Iterable[tuple[Key, float]]) -> dict[Key, float]:
    """The sum for each key, the largest first."""
    sums: defaultdict[Key, float] = defaultdict(float)
    for key, number in pairs:
        sums[key] += number
    return dict(sorted(sums.items(), key=lambda each: -each[1]))


def search_bytes(
    pattern: Pattern, grid: TokenGrid, batch: int, head_dim: int, *, dense: bool
) -> int:
    """What a head of `pattern` keeps for its next search: the LSE, unless every search has a
    `dense` pass anyway, and centroids."""
    if not isinstance(pattern, Scored):
        return 0
    if isinstance(pattern.score, Clustered):
        return centroid_bytes(pattern.score, grid, batch, head_dim)
    needed = pattern.score.needs_lse and not isinstance(pattern.score, Oracle) and not dense
    return batch * grid.tokens * LSE_BYTES * needed


@dataclass(frozen=True, slots=True)
class Phase:
    """Pattern and remainder of every head.

    Args:
        assignment (`dict[str, tuple[Pattern, ...]]`): one pattern per head for each
            self-attention module, by component and path: `"transformer.blocks.0.attn1"`.
        remainders (`dict[str, tuple[Remainder, ...]]`): what becomes of the pairs that a head does
            not compute, one for each head of the layers named; the others drop them.
    """

    assignment: dict[str, tuple[Pattern, ...]]
    remainders: dict[str, tuple[Remainder, ...]] = field(default_factory=dict)

    def remainders_of(self, layer: str) -> tuple[Remainder, ...]:
        """The remainder of every head of a layer."""
        return self.remainders.get(layer, (Drop(),) * len(self.assignment[layer]))

    @property
    def heads(self) -> tuple[tuple[str, Pattern, Remainder], ...]:
        """Layer, pattern and remainder of every head."""
        return tuple(
            (layer, pattern, remainder)
            for layer, patterns in self.assignment.items()
            for pattern, remainder in zip(patterns, self.remainders_of(layer), strict=True)
        )

    @property
    def renews(self) -> bool:
        """Whether a layer keeps anything from one step for the next: blocks that it found, caches
        of remainders."""
        return any(
            isinstance(pattern, OnlinePattern) or remainder.cached
            for _, pattern, remainder in self.heads
        )

    def kept_bytes(
        self,
        model: Mapping[str, ModelFingerprint],
        grid: TokenGrid,
        batch: int,
        *,
        again: bool,
        limited: bool,
    ) -> tuple[int, int]:
        """Memory that one guidance branch keeps between steps on `grid`: caches of remainders,
        and if searches come `again`, the LSEs and centroids that they start from. A head with a
        cache has a dense pass at every search, unless caches are `limited` and it may lose its
        own."""
        caches = searches = 0
        for layer, pattern, remainder in self.heads:
            head_dim = model[layer.partition(".")[0]].head_dim
            caches += cache_bytes(remainder, batch, grid.tokens, 1, head_dim)
            if again:
                dense = remainder.cached and not limited
                searches += search_bytes(pattern, grid, batch, head_dim, dense=dense)
        return caches, searches

    def check(self, model: Mapping[str, ModelFingerprint]) -> None:
        """Raise `ValueError` unless every head of the model has a pattern, and every remainder a
        head."""
        layers = dict.fromkeys(model, 0)
        for path, patterns in self.assignment.items():
            component = path.partition(".")[0]
            if component not in model:
                raise ValueError(
                    f"layer {path}: expected a path that starts with a component of the model "
                    f"({', '.join(model)}), came {component!r}"
                )
            layers[component] += 1
            heads = model[component].heads
            if len(patterns) != heads:
                raise ValueError(
                    f"layer {path}: expected one pattern for each of {heads} heads, "
                    f"came {len(patterns)}"
                )
        for path, remainders in self.remainders.items():
            heads = len(self.assignment.get(path, ()))
            if len(remainders) != heads:
                raise ValueError(
                    f"layer {path}: expected one remainder for each of {heads} heads of the "
                    f"assignment, came {len(remainders)}"
                )
        for component, count in layers.items():
            if count != model[component].layers:
                raise ValueError(
                    f"{component}: expected {model[component].layers} layers, came {count}; "
                    "name every layer, with Full() for the heads that stay dense"
                )

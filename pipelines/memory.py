"""Memory: what the layers of a running generation keep from one denoising step to the next.

Everything is kept for each guidance branch by itself and forgotten when a generation ends. A
limit on the bytes of caches drops those of the heads that lose least without them.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from dit_sparse.kernels.clustered_blocks import Centroids
from dit_sparse.kernels.remainder import Cache
from dit_sparse.pipelines.parts import Part


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The blocks of a pattern that is found while denoising, as they were found at a step.

    Args:
        step (`int`): the denoising step.
        parts (`tuple[Part, ...]`): the lists; none if they will not be used again.
        lse (`Tensor`, *optional*): of dense attention, for the next search.
        recall (`float`, *optional*): share of attention that the list held when it was found.
        centroids (`Centroids`, *optional*): of its clusters, for the next search.
    """

    step: int
    parts: tuple[Part, ...]
    lse: Tensor | None = None
    recall: float | None = None
    centroids: Centroids | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The cache of a remainder taken at a step; `None` if it did not fit."""

    step: int
    cache: Cache | None


@dataclass(slots=True)
class Memory:
    """Lists and caches of one generation, under keys of the hook's choosing.

    Args:
        limit (`int`, *optional*): bytes that caches of remainders may hold together.
    """

    limit: int | None = None
    found: dict[Hashable, Found] = field(default_factory=dict)
    kept: dict[Hashable, Kept] = field(default_factory=dict)
    peak: int = 0
    """Most bytes held at once, LSEs and centroids of searches included."""

    dropped: int = 0
    """Caches that did not fit."""

    @property
    def bytes(self) -> int:
        """Memory held now: caches, and LSEs and centroids kept for the next search."""
        lses = [found.lse for found in self.found.values() if found.lse is not None]
        centroids = [found.centroids for found in self.found.values() if found.centroids]
        return (
            self._cached()
            + sum(lse.numel() * lse.element_size() for lse in lses)
            + sum(kept.bytes for kept in centroids)
        )

    def forget(self) -> None:
        """Forget everything but the peak and what did not fit."""
        self.found.clear()
        self.kept.clear()

    def find(self, key: Hashable, found: Found) -> None:
        """Remember a list of blocks."""
        self.found[key] = found
        self.peak = max(self.peak, self.bytes)

    def keep(self, key: Hashable, kept: Kept) -> None:
        """Remember a cache, and drop those that lose least while there are too many bytes.

        Of caches of one size those that lose most are left in the end, whatever order they come
        in. Of several sizes, all that fit together counting down from the largest loss are; the
        room that the next one is too large for goes to smaller ones that came after it.
        """
        self.kept[key] = kept
        while self.limit is not None and self._cached() > self.limit:
            losses = {k: float(v.cache.loss) for k, v in self.kept.items() if v.cache is not None}
            least = min(losses, key=losses.__getitem__)
            self.kept[least] = Kept(self.kept[least].step, None)
            self.dropped += 1
        self.peak = max(self.peak, self.bytes)

    def leave(self, key: Hashable, step: int) -> Kept:
        """Remember that there is no cache, since it would be larger than the limit by itself."""
        self.kept[key] = Kept(step, None)
        self.dropped += 1
        return self.kept[key]

    def _cached(self) -> int:
        return sum(kept.cache.bytes for kept in self.kept.values() if kept.cache is not None)

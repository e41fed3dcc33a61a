"""HeadGroup: heads of one layer that run in one call."""

from dataclasses import dataclass

from dit_sparse.kernels.choosing import choice_cost
from dit_sparse.kernels.clustered_blocks import cluster_cost
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster
from dit_sparse.kernels.pattern import Choice, Full, OnlinePattern, Pattern
from dit_sparse.kernels.remainder import Cached, Drop, Pooled, Remainder
from dit_sparse.kernels.score import Clustered, Oracle
from dit_sparse.kernels.scored import Scored


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Heads whose patterns want one token order and that have one remainder.

    Patterns that are found while denoising form groups of their own, one for each.
    """

    heads: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    remainder: Remainder = Drop()

    @property
    def scored(self) -> Scored | None:
        """The scored pattern of all heads, if they have one."""
        first = self.patterns[0]
        return first if isinstance(first, Scored) else None

    @property
    def choice(self) -> Choice | None:
        """The choice of all heads, if they have one."""
        first = self.patterns[0]
        return first if isinstance(first, Choice) else None

    @property
    def found(self) -> bool:
        """Whether the blocks are found while denoising."""
        return self.scored is not None or self.choice is not None

    @property
    def cached(self) -> Cached:
        """The remainder of all heads, which must be one that keeps a cache."""
        assert isinstance(self.remainder, Cached)
        return self.remainder

    @property
    def pooled(self) -> int:
        """r for blocks that are not listed pooled by `2^r`, 0 for none."""
        return self.remainder.level if isinstance(self.remainder, Pooled) else 0

    @property
    def needs_lse(self) -> bool:
        """Whether the score is taken from the LSE of dense attention."""
        return self.scored is not None and self.scored.score.needs_lse

    @property
    def oracle(self) -> bool:
        """Whether every search has a dense pass of its own."""
        return self.scored is not None and isinstance(self.scored.score, Oracle)

    @property
    def renewed(self) -> bool:
        """Whether anything is kept from step to step."""
        return self.found or self.remainder.cached

    def search_cost(self, grid: TokenGrid, block: int, again: bool) -> float:
        """FLOPs of finding the blocks in those of dense attention; `again` if they were found
        before in this generation."""
        if self.choice is not None:
            return choice_cost(self.choice, grid.tokens)
        if self.scored is None:
            return 0.0
        score = self.scored.score
        if isinstance(score, Clustered):
            return cluster_cost(score, grid, again)
        return score.cost(block)


def head_groups(
    patterns: tuple[Pattern, ...], remainders: tuple[Remainder, ...]
) -> tuple[HeadGroup, ...]:
    """The heads of a layer by what they can share a call with; heads that want no order ride with
    the first group of their remainder, or if they see means, which depend on it, with raster.

    None for a layer whose heads are all full: it runs the model's own attention.
    """
    if all(pattern == Full() for pattern in patterns):
        return ()
    groups: dict[tuple[Remainder, OnlinePattern | TokenOrder | None], list[int]] = {}
    riders: dict[Remainder, list[int]] = {}
    for head, (pattern, remainder) in enumerate(zip(patterns, remainders, strict=True)):
        if isinstance(pattern, OnlinePattern):
            groups.setdefault((remainder, pattern), []).append(head)
        elif pattern == Full():
            riders.setdefault(Drop(), []).append(head)
        elif pattern.order is not None or isinstance(remainder, Pooled):
            groups.setdefault((remainder, pattern.order or raster()), []).append(head)
        else:
            riders.setdefault(remainder, []).append(head)
    for remainder, heads in riders.items():
        hosts = (
            key for key in groups if key[0] == remainder and not isinstance(key[1], OnlinePattern)
        )
        groups.setdefault(next(hosts, (remainder, None)), []).extend(heads)
    return tuple(
        HeadGroup(tuple(sorted(heads)), tuple(patterns[head] for head in sorted(heads)), remainder)
        for (remainder, _), heads in groups.items()
    )

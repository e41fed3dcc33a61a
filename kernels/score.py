"""Score: how blocks of keys are ranked for blocks of queries, from q and k while denoising.

Values only; `ranking.py` turns them into shares.
"""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Mass:
    """Attention that a block of keys gets, exactly, given the LSE of dense attention.

    AdaSpa (arXiv 2502.21079) and SparseD (arXiv 2509.24014). The LSE may be an earlier step's.

    Attributes:
        rows: queries of each block that stand for it, at most 64; `None` takes all.
    """

    kind: ClassVar[str] = "mass"
    needs_lse: ClassVar[bool] = True
    rows: int | None = 16

    def __post_init__(self) -> None:
        if self.rows is not None and not 1 <= self.rows <= 64:
            raise ValueError(f"rows must be in 1..64, got {self.rows}; None takes them all")

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention, for blocks of `block` tokens."""
        return 0.5 if self.rows is None else 0.5 * min(self.rows, block) / block

    def __str__(self) -> str:
        return "mass of all rows" if self.rows is None else f"mass of {self.rows} rows"


@dataclass(frozen=True, slots=True)
class Oracle:
    """Attention that a block of keys gets at the very step, from a dense pass for every search.

    Dearer than dense attention: what the blocks could be worth if finding them took nothing.
    """

    kind: ClassVar[str] = "oracle"
    needs_lse: ClassVar[bool] = True

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention, beside the dense pass."""
        return Mass(rows=None).cost(block)

    def __str__(self) -> str:
        return "oracle"


@dataclass(frozen=True, slots=True)
class Sampled:
    """The largest logit between sampled queries and sampled keys.

    Adaptive Sparse Attention of Video-BLADE (arXiv 2508.10774) and Pyramid Sparse Attention (arXiv
    2512.04025).

    Attributes:
        samples: tokens of each block that stand for it, at most 64.
    """

    kind: ClassVar[str] = "sampled"
    needs_lse: ClassVar[bool] = False
    samples: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 64:
            raise ValueError(f"samples must be in 1..64, got {self.samples}")

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention, for blocks of `block` tokens."""
        return 0.5 * (min(self.samples, block) / block) ** 2

    def __str__(self) -> str:
        return f"sampled {self.samples}"


@dataclass(frozen=True, slots=True)
class Means:
    """Attention between the means of blocks; blocks whose tokens differ are always visited.

    SpargeAttn (arXiv 2502.18137). A block is alike if the mean cosine of all pairs of its tokens,
    each with itself included, is larger than `similarity`: the rule of the published code, not of
    the paper.

    Attributes:
        similarity: at 1 or above no block is alike, so everything is visited.
    """

    kind: ClassVar[str] = "means"
    needs_lse: ClassVar[bool] = False
    similarity: float = 0.6

    def __post_init__(self) -> None:
        if not -1 <= self.similarity <= 2:
            raise ValueError(
                f"similarity must be in -1..2, got {self.similarity}; it is a bound of a cosine"
            )

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention, for blocks of `block` tokens."""
        return 0.5 / block**2

    def __str__(self) -> str:
        return f"means alike above {self.similarity:g}"


@dataclass(frozen=True, slots=True)
class Random:
    """Blocks drawn by lot, the same at every step: what any other score has to beat."""

    kind: ClassVar[str] = "random"
    needs_lse: ClassVar[bool] = False
    seed: int = 0

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention: none."""
        return 0.0

    def __str__(self) -> str:
        return f"random {self.seed}"


@dataclass(frozen=True, slots=True)
class Checked:
    """A cheap score for the heads that it serves well, exact mass for the others.

    One row of every block tells: a head is served well if the square root of the Jensen-Shannon
    divergence between its cheap shares and the exact ones of these rows is at most `bound`, on
    average over the blocks of queries (the test of FlexPrefill, arXiv 2502.20766).

    Attributes:
        cheap: the score that is tried.
        bound: in nats to the half; 0.83 is the most there can be.
    """

    kind: ClassVar[str] = "checked"
    needs_lse: ClassVar[bool] = True
    cheap: Sampled | Means = Sampled()
    bound: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.bound <= 1:
            raise ValueError(f"bound must be in 0..1, got {self.bound}; 0.1 is usual")

    def cost(self, block: int) -> float:
        """FLOPs in those of dense attention, for blocks of `block` tokens, if no head passes."""
        return self.cheap.cost(block) + Mass(rows=1).cost(block) + Mass().cost(block)

    def __str__(self) -> str:
        return f"{self.cheap} checked to {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Clustered:
    """Attention between the means of clusters of queries and of keys, which take the place of
    blocks: the semantic-aware permutation of Sparse VideoGen 2 (arXiv 2505.18875).

    Every head has clusters of its own, found by k-means and carried on from step to step. Numbers
    are those of the authors' script for Wan 2.1 at 720p.

    Attributes:
        queries, keys: clusters of the video tokens; no more than there are tokens.
        first, again: iterations at the first search of a generation, and at later ones.
    """

    kind: ClassVar[str] = "clustered"
    needs_lse: ClassVar[bool] = False
    queries: int = 300
    keys: int = 1000
    first: int = 50
    again: int = 2

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "first", "again"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}; 300 x 1000 clusters, "
                    "50 iterations and then 2 are usual"
                )

    def __str__(self) -> str:
        return f"{self.queries} x {self.keys} clusters"


BlockScore = Mass | Sampled | Means | Random | Checked | Oracle
"""Scores of the blocks that an order cuts."""

Score = BlockScore | Clustered

"""Scored: a pattern that is chosen while denoising, from the queries and keys of the step.

A value like every other pattern, so that plans hold it; `scored_blocks.py` makes its blocks. Which
pairs it keeps is not known before.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from dit_sparse.kernels.definition import Definition
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.score import Clustered, Score
from dit_sparse.kernels.select import Grouped, Select

OrderName = Literal["raster", "pixel_major", "gilbert"]


@dataclass(frozen=True, slots=True)
class Scored(Definition):
    """The blocks that `select` keeps of those that `score` ranks.

    Attributes:
        score: how blocks of keys are ranked for blocks of queries.
        select: how many are kept.
        token_order: the order that is cut into blocks; raster if the score is of clusters, which
            are cut instead.
        sink_frames: blocks with tokens of as many first frames are visited in addition; none if
            the score is of clusters, which are of no frame.
        pv_skip: the lambda of SpargeAttn (arXiv 2502.18137), see `sparse_attention`.
    """

    kind: ClassVar[str] = "scored"
    score: Score
    select: Select
    token_order: OrderName = "raster"
    sink_frames: int = 0
    pv_skip: float | None = None

    def __post_init__(self) -> None:
        for name, value, kinds in (("score", self.score, Score), ("select", self.select, Select)):
            if not isinstance(value, get_args(kinds)):
                known = ", ".join(kind.__name__ for kind in get_args(kinds))
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if self.token_order not in get_args(OrderName):
            raise ValueError(
                f"token_order must be one of {', '.join(map(repr, get_args(OrderName)))}, "
                f"got {self.token_order!r}"
            )
        if self.sink_frames < 0:
            raise ValueError(
                f"sink_frames must not be negative, got {self.sink_frames}; use 0 for no sink"
            )
        if self.pv_skip is not None and not -math.inf < self.pv_skip < 0:
            raise ValueError(
                f"pv_skip must be a negative number, got {self.pv_skip}; leave it out to leave "
                "no values out"
            )

        if isinstance(self.score, Clustered):
            framed = isinstance(self.select, Grouped)
            if self.token_order != "raster" or self.sink_frames or framed:
                raise ValueError(
                    f"clusters are an order of their own and belong to no frame, got "
                    f"token_order={self.token_order!r}, sink_frames={self.sink_frames}, select "
                    f"{self.select}; leave the first two out and select by top_row or cumulative"
                )

    @property
    def order(self) -> TokenOrder:
        return TokenOrder(self.token_order)

    def refusal(self, grid: TokenGrid) -> str | None:
        return (
            f"the pairs of a scored pattern are known only while denoising, so {self} has none on "
            f"grid {grid}; make its blocks from queries and keys, or take another pattern here"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        raise ValueError(self.refusal(grid))

    def __str__(self) -> str:
        sink = f", sink {self.sink_frames}" if self.sink_frames else ""
        order = "" if isinstance(self.score, Clustered) else f", {self.token_order}"
        skip = "" if self.pv_skip is None else f", pv_skip {self.pv_skip:g}"
        return f"scored {self.score}, {self.select}{order}{sink}{skip}"

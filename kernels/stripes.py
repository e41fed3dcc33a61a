"""Stripes: the key blocks that draw most of a head's attention, found while denoising.

mean over sampled rows of their attention to each block of keys -> the largest -> Columns
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels.column_mass import largest
from dit_sparse.kernels.columns import Columns
from dit_sparse.kernels.definition import Definition
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder, raster


@dataclass(frozen=True, slots=True)
class Stripes(Definition):
    """The vertical stripes of Sparse-vDiT (arXiv 2506.03065), one of the patterns of a `Choice`.

    The paper does not publish how it picks the columns. Here they are the key blocks of the
    largest attention mass on rows that the choice does not judge by.

    Attributes:
        density: share of the blocks of video keys, one at least.
    """

    kind: ClassVar[str] = "stripes"
    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density}")

    @property
    def order(self) -> TokenOrder:
        return raster()

    def refusal(self, grid: TokenGrid) -> str | None:
        return (
            f"the columns of {self} are known only while denoising, so it has no pairs on grid "
            f"{grid}; give it as one of the patterns of a choice, or take columns"
        )

    def pairs(self, grid: TokenGrid, queries: Tensor, keys: Tensor) -> Tensor:
        raise ValueError(self.refusal(grid))

    def count(self, grid: TokenGrid, block: int) -> int:
        """How many blocks of `block` video keys they are."""
        return max(1, round(self.density * -(-grid.video // block)))

    def first(self, grid: TokenGrid, block: int) -> Columns:
        """As many columns as there will be, somewhere: what they cost."""
        return Columns(tuple(range(self.count(grid, block))), block, grid.shape)

    def of_mass(self, mass: Tensor, grid: TokenGrid, block: int) -> Columns:
        """The columns of the largest `mass`, float `[key blocks]`; ties to the first."""
        return largest(mass, self.count(grid, block), grid, block)

    def __str__(self) -> str:
        return f"stripes {self.density:g}"

"""Sight: what candidates see of a few rows of a call; Lens: the order in which they are cut.

A pattern sees single keys. With a pooled remainder it also sees the means of the runs of keys in
all blocks that it does not visit; which blocks those are depends on the order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.blocks import ABSENT, block_indices
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import TokenOrder
from dit_sparse.kernels.pattern import Pattern
from dit_sparse.kernels.row_attention import RowAttention
from dit_sparse.kernels.scored_blocks import geometry
from dit_sparse.kernels.tags import tags_of_head
from dit_sparse.kernels.tiling import block_of, tiling


@dataclass(frozen=True, slots=True, eq=False)
class Sight:
    """What some candidates see.

    Args:
        slots: numbers of the candidates.
        seen: for each the keys, bool `[heads or 1, rows, tokens]`.
        means: for each the runs of keys whose means it sees besides, if its remainder is pooled,
            bool `[heads or 1, rows, runs]`; `None` if it cannot be.
        lens: gives the runs.
    """

    slots: tuple[int, ...]
    seen: tuple[Tensor, ...]
    means: tuple[Tensor, ...] | None
    lens: Lens | None

    def keys(self, heads: slice) -> list[Tensor]:
        """The keys that some of the heads see."""
        return [_of(mask, heads) for mask in self.seen]

    def runs(self, heads: slice) -> list[Tensor]:
        """The runs whose means they see."""
        assert self.means is not None
        return [_of(mask, heads) for mask in self.means]


@dataclass(frozen=True)
class Lens:
    """One order of the tokens, cut into blocks.

    Args:
        order: of the tokens.
        grid: of the calls, without the valid length of text.
        block: tokens of a block of queries and of keys.
        level: r of the means of `2^r` keys; `None` for no means.
    """

    order: TokenOrder
    grid: TokenGrid
    block: int
    level: int | None

    def at_patterns(
        self, rows: Tensor, slots: Sequence[int], patterns: Sequence[Pattern]
    ) -> Sight:
        """What `rows`, int64 `[rows]`, see under patterns that follow from the grid."""
        keys = [pattern.rows(self.grid, rows)[None] for pattern in patterns]
        lists = (
            block_indices((p,), self.grid, self.order, self.block, self.block) for p in patterns
        )
        tables = [tags_of_head(listed, 0)[None] != ABSENT for listed in lists]
        visited = [table.to(rows.device) for table in self.row_tables(rows, tables)]
        return Sight(tuple(slots), tuple(keys), self._means(visited), self)

    def row_tables(self, rows: Tensor, tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Of tables of blocks, bool `[heads, query blocks, key blocks]`, the lines that `rows`
        lie in: `[heads, rows, key blocks]`."""
        at = self._block_of[rows.cpu()]
        return tuple(table[:, at.to(table.device)] for table in tables)

    def at_blocks(self, slots: Sequence[int], tables: Sequence[Tensor]) -> Sight:
        """What rows see of the blocks that they visit, by `row_tables` of each candidate."""
        keys = [table[..., self._block_of.to(table.device)] for table in tables]
        return Sight(tuple(slots), tuple(keys), self._means(tables), self)

    def over_means(
        self, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, valid: Tensor | None
    ) -> RowAttention:
        """The rows over the means of all runs of keys; arguments as for `RowAttention.of`."""
        token = self._runs[0].to(rows.device)
        real = (token >= 0)[None]
        if valid is not None:
            real = real & valid[:, token.clamp_min(0)]
        count = real.sum(-1)
        share = real.float() / count.clamp_min(1)[..., None]
        share = share.expand(len(query), -1, -1)
        key_means, value_means = (
            torch.einsum("brjhd,brj->bhrd", part[:, token.clamp_min(0)].float(), share)
            for part in (key, value)
        )
        bias = rearrange(count.float().log(), "b r -> b 1 1 r")
        picked = query[:, rows].transpose(1, 2).float() * query.shape[-1] ** -0.5
        return RowAttention.over(picked, key_means, value_means, bias)

    def _means(self, tables: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The runs of all blocks that rows do not visit."""
        if self.level is None:
            return None
        block = self._runs[1]
        return tuple(~table[..., block.to(table.device)] for table in tables)

    @cached_property
    def _block_of(self) -> Tensor:
        """The block of every token, int64 `[tokens]`, by raster token."""
        cut = geometry(self.order, self.grid, 1, self.block)
        block = torch.empty_like(cut.permutation)
        block[cut.permutation] = block_of(cut.key_offsets)
        return block

    @cached_property
    def _runs(self) -> tuple[Tensor, Tensor]:
        """Raster tokens of every run, -1 where it is shorter, int64 `[runs, 2^level]`, and the
        block that each lies in, `[runs]`."""
        assert self.level is not None
        cut = geometry(self.order, self.grid, 1, self.block)
        runs = tiling(cut.key_offsets, 2**self.level)
        within = torch.arange(2**self.level)
        place = runs.first[:, None] + within
        token = cut.permutation[place.clamp_max(self.grid.tokens - 1)]
        token = token.where(within < runs.count[:, None], -1)
        return token, runs.block


def _of(mask: Tensor, heads: slice) -> Tensor:
    return mask if len(mask) == 1 else mask[heads]

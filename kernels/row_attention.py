"""RowAttention: the attention of a few rows of one call, under one candidate after another.

The logits of a row do not depend on what it may see, so many candidates share them:

    output = sum of w_j v_j / sum of w_j,   lse = ln(sum of w_j) + peak,   over the keys it sees
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.merge import merge
from dit_sparse.kernels.rows import row_logits


class RowPair(NamedTuple):
    """output float32 `[batch, heads, candidates, rows, head_dim]`; lse `[batch, heads,
    candidates, rows]`. A row that sees no key has output 0 and LSE `-inf`."""

    output: Tensor
    lse: Tensor

    def folded(self) -> tuple[Tensor, Tensor]:
        """As `sparse_attention` returns it, the candidates of every head as heads of their own."""
        output = rearrange(self.output, "b h c r d -> b r (h c) d")
        return output, rearrange(self.lse, "b h c r -> b (h c) r")

    def unfolded(self, output: Tensor) -> Tensor:
        """An output in that form, in the shape of `self.output`."""
        return rearrange(output, "b r (h c) d -> b h c r d", h=self.output.shape[1])

    def merged(self, other: RowPair) -> RowPair:
        """Attention over the keys of both, which are disjoint."""
        output, lse = merge([self.folded(), other.folded()])
        return RowPair(self.unfolded(output), lse.reshape(self.lse.shape))


@dataclass(frozen=True, slots=True, eq=False)
class RowAttention:
    """What candidates share: `weights` float32 `[batch, heads, rows, keys]`, `exp(S - peak)` of
    the logits S; `peak` `[batch, heads, rows]`; `values` `[batch, heads, keys, head_dim + 1]`,
    the last of them 1."""

    weights: Tensor
    peak: Tensor
    values: Tensor

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Tensor,
        *,
        scale: float | None = None,
        valid: Tensor | None = None,
    ) -> Self:
        """The rows of a call, its arguments as for `rows.row_logits`."""
        logits = row_logits(query, key, rows, scale=scale, valid=valid)
        return cls._of_logits(logits, value.permute(0, 2, 1, 3).float())

    @classmethod
    def over(cls, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Self:
        """The rows over other keys than the call's: `query` the rows times the scale, float32
        `[batch, heads, rows, d]`, `key` and `value` `[batch, heads, keys, d]`, `bias` `[batch or
        1, 1, 1, keys]` added to their logits, `-inf` for keys that do not count. What they and
        the call's keys give is put together by `RowPair.merged`."""
        return cls._of_logits(query @ key.mT + bias, value)

    @classmethod
    def _of_logits(cls, logits: Tensor, values: Tensor) -> Self:
        peak = logits.amax(-1, keepdim=True)
        # A row of padding alone has no largest logit.
        peak = peak.where(peak.isfinite(), 0)
        # The weighted sum of a last channel of ones is the sum of the weights.
        values = torch.nn.functional.pad(values, (0, 1), value=1.0)
        return cls(logits.sub_(peak).exp_(), peak[..., 0], values)

    def under(self, masks: Iterable[Tensor]) -> RowPair:
        """Output and LSE under each of `masks`, bool, broadcastable to `[heads, rows, keys]`.

        Keys whose weight is below 1e-38 of the largest do not count.
        """
        batch, heads, rows, keys = self.weights.shape
        values = self.values.reshape(batch * heads, keys, -1)
        masked = torch.empty_like(self.weights)
        sums = []
        for mask in masks:
            torch.mul(self.weights, mask, out=masked)
            product = torch.bmm(masked.view(batch * heads, rows, keys), values)
            sums.append(product.view(batch, heads, rows, -1))
        stacked = torch.stack(sums, 2)
        total = stacked[..., -1]
        output = stacked[..., :-1] / total.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        return RowPair(output, total.log() + self.peak[:, :, None])

    def dense(self) -> RowPair:
        """Output and LSE of dense attention, as one candidate."""
        return self.under([torch.ones((), dtype=torch.bool, device=self.weights.device)])

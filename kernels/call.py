"""AttentionCall: one attention to be computed, checked and ready for a backend."""

from dataclasses import dataclass

from torch import Tensor

from dit_sparse.kernels.blocks import BlockIndices


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """`query` `[batch, queries, heads, head_dim]`, `key`, `value` `[batch, keys, heads, head_dim]`
    in raster token order, of one dtype and device, with any strides; which blocks to visit; the
    factor of the logits; and from where on values are left out, see `sparse_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: BlockIndices
    scale: float
    pv_skip: float | None = None

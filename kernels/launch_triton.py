"""Launch: an attention call as launches of Triton kernels."""

import math
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dit_sparse.kernels.attend_triton import attend
from dit_sparse.kernels.blocks import WHOLE, BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.target import Kind, Target, Tiles, target_of, tiles
from dit_sparse.kernels.tokens_triton import interpreting, ordered, padded_dim, pool, unit_stride
from dit_sparse.kernels.worklist import Worklist, worklist

_kinds: WeakKeyDictionary[BlockIndices, Kind] = WeakKeyDictionary()


def launch(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Output and LSE; the call is one that the backend accepts."""
    query, scale = unit_stride(call.query), call.scale
    skips = call.pv_skip is not None and call.pv_skip > -math.inf
    bound = (call.pv_skip or 0.0) / math.log(2) if skips else 0.0
    batch, queries, heads, head_dim = query.shape
    if scale <= 0:
        # The kernel takes maxima before it scales.
        query, scale = query * math.copysign(bool(scale), scale), abs(scale) or 1.0
    sizes = tiles_of(call)
    work = worklist(call.blocks, sizes.block_q, sizes.block_k, query.device)
    key, value = (arranged(x, work, sizes) for x in (call.key, call.value))
    pooled = work.pooled
    if len(pooled.entry):
        means = (pool(x, work.runs.first, work.runs.real) for x in (key, value))
        pooled = pooled._replace(**dict(zip(("key", "value"), means, strict=True)))
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    rules = work.predicates
    kernel: Any = attend
    kernel[(work.rows, batch)](
        query, operand(key, sizes), operand(value, sizes), output, lse,
        work.lists, rules.words, rules.intervals, work.bits, pooled,
        query.stride(), key.stride(), value.stride(), output.stride(),
        scale / math.log(2), bound, heads, queries, key.shape[1],
        HEAD_DIM=head_dim, DIM=padded_dim(head_dim),
        BLOCK_Q=sizes.block_q, BLOCK_K=sizes.block_k,
        PERMUTED=work.permuted, DESCRIPTORS=sizes.descriptors, DENSE=False,
        MASKED=work.masked, WORD_AXES=rules.word_axes, INTERVAL_AXES=rules.interval_axes,
        BITS=len(work.bits.word) > 0, POOLED=len(pooled.entry) > 0, SKIPS=skips,
        CUDA=_target(call).kind == "cuda", UPCAST=interpreting(),
        num_warps=sizes.warps, num_stages=sizes.stages,
    )  # fmt: skip
    return output, lse


def tiles_of(call: AttentionCall) -> Tiles:
    """The tiles in which a call is computed."""
    head_dim, itemsize, blocks = call.query.shape[-1], call.query.element_size(), call.blocks
    if blocks not in _kinds:
        pooled = bool((blocks.tag > WHOLE).any())
        _kinds[blocks] = "partial" if blocks.patterns else "pooled" if pooled else "whole"
    kind = _kinds[blocks]
    return tiles(_target(call), head_dim, itemsize, blocks.block_q, blocks.block_k, kind)


def _target(call: AttentionCall) -> Target:
    target = target_of(call.query.device)
    assert target is not None, "refused before"
    return target


def arranged(x: Tensor, work: Worklist, sizes: Tiles) -> Tensor:
    """Keys or values in the order of the blocks, `[batch, tokens, heads, head_dim]`, with strides
    that the kernel can read; a copy only where needed."""
    if work.permuted:
        return ordered(x, work.key_permutation)
    steps = [stride * x.element_size() % 16 for stride in x.stride()[:3]]
    describable = x.stride(3) == 1 and not any(steps) and x.data_ptr() % 16 == 0
    if describable or (x.stride(3) == 1 and not sizes.descriptors):
        return x
    return ordered(x, None)


def operand(x: Tensor, sizes: Tiles) -> Any:
    """A pointer, or a tensor descriptor with heads first."""
    if not sizes.descriptors:
        return x
    block = [1, 1, sizes.block_k, padded_dim(x.shape[-1])]
    turned = x.transpose(1, 2)
    return TensorDescriptor(turned, list(turned.shape), list(turned.stride()), block)

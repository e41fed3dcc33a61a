"""NATTEN: neighborhood attention by the library of that name, on CUDA devices.

    output, lse = na3d(query, key, value, window, stride, dilation)    for each group of heads

Operands: query, key, value `[batch, tokens, heads, head_dim]`, float32, bfloat16 or float16,
head_dim a multiple of 8; no text. NATTEN's rules at the borders are those of our `Neighborhood`.
"""

import importlib
import importlib.util
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.pattern import Neighborhood

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(call: AttentionCall) -> str | None:
    """CUDA tensors, neighborhoods alone, no text, and natten with its kernels."""
    grid, patterns = call.blocks.grid, call.blocks.patterns
    if call.query.device.type != "cuda":
        return f"runs on CUDA, the tensors are on {call.query.device}"
    if importlib.util.find_spec("natten") is None:
        return "natten is not installed"
    try:
        built = getattr(_natten(), "HAS_LIBNATTEN", False)
    except (ImportError, OSError) as error:
        return f"natten cannot be imported: {error}"
    if not built:
        return "natten was built without its kernels (libnatten); install a wheel that has them"
    if patterns is None:
        return "takes neighborhoods, got a table of blocks"
    for head, pattern in enumerate(patterns):
        if not isinstance(pattern, Neighborhood):
            return f"takes neighborhoods, got {pattern} for head {head}"
        if min(arguments(pattern, grid)["kernel_size"]) < 2:
            return f"takes windows of at least 2 tokens on each axis, got {pattern} on {grid}"
    if call.blocks.sharded:
        return "takes all tokens of a grid, got some of its queries or keys"
    if grid.text:
        return f"takes video tokens alone, got {grid.text} text tokens"
    if call.query.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {call.query.dtype}"
    if call.query.shape[-1] % 8:
        return f"needs a head_dim that is a multiple of 8, got {call.query.shape[-1]}"
    if call.pv_skip is not None:
        return "leaves no values out, as pv_skip asks"
    if call.scale == 0:
        return "takes a scale of 0 for none"
    return None


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See the head of this file."""
    grid, patterns = call.blocks.grid, call.blocks.patterns
    assert patterns is not None
    batch, tokens, heads, _ = call.query.shape
    output = torch.empty_like(call.query, memory_format=torch.contiguous_format)
    lse = call.query.new_empty(batch, heads, tokens, dtype=torch.float32)
    for pattern in dict.fromkeys(patterns):
        assert isinstance(pattern, Neighborhood)
        group = [head for head in range(heads) if patterns[head] == pattern]
        chosen = slice(None) if len(group) == heads else torch.tensor(group).to(output.device)
        query, key, value = (
            rearrange(
                tensor[:, :, chosen],
                "b (t h w) n d -> b t h w n d",
                t=grid.frames,
                h=grid.height,
                w=grid.width,
            ).contiguous()
            for tensor in (call.query, call.key, call.value)
        )
        out, sums = _natten().na3d(
            query, key, value, **arguments(pattern, grid), scale=call.scale, return_lse=True
        )
        output[:, :, chosen] = rearrange(out, "b t h w n d -> b (t h w) n d")
        lse[:, chosen] = rearrange(sums, "b t h w n -> b n (t h w)").to(torch.float32)
    return output, lse


def arguments(pattern: Neighborhood, grid: TokenGrid) -> dict[str, tuple[int, ...]]:
    """`pattern` in NATTEN's words, cut to the axes as `Neighborhood` defines it."""
    room = [length // step for length, step in zip(grid.shape, pattern.dilation, strict=True)]
    window = tuple(map(min, pattern.window, room))
    return {
        "kernel_size": window,
        "stride": tuple(map(min, pattern.stride, window)),
        "dilation": pattern.dilation,
    }


def _natten() -> Any:
    return importlib.import_module("natten")

"""Ahead of time: the Triton kernels compiled for a GPU that is not there.

The arguments are described as a call in half precision would give them; only what the instructions
depend on is real.
"""

from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dit_sparse.kernels.attend_triton import attend
from dit_sparse.kernels.bit_tiles import Bits
from dit_sparse.kernels.mass_triton import BLOCK_Q, mass
from dit_sparse.kernels.pooled import Pooled
from dit_sparse.kernels.predicates import Intervals, Words
from dit_sparse.kernels.target import Target, Tiles, tiles
from dit_sparse.kernels.tokens_triton import padded_dim
from dit_sparse.kernels.worklist import Lists

DTYPE = "bf16"
_INT, _TABLE = "i32", "*i32"
_STRIDES = (_INT,) * 3 + ("constexpr",)


@dataclass(frozen=True, slots=True)
class Variant:
    """Which lists a kernel is compiled with; `dense` walks all tiles, as a yardstick."""

    dense: bool = False
    masked: bool = False
    word_axes: int = 0
    interval_axes: int = 0
    bits: bool = False
    pooled: bool = False
    skips: bool = False


def _named(structure: Any, *types: str) -> Any:
    """The types of a structure's fields, under their names."""
    return structure(*types)


def compile_attend(target: Target, head_dim: int, variant: Variant) -> CompiledKernel:
    """The attention kernel in the tiles that blocks of 128 x 128 get, whose order is raster."""
    sizes = tiles_of(target, head_dim, variant)
    signature: dict[str, Any] = {
        "query": f"*{DTYPE}",
        "key": _operand(sizes, head_dim),
        "value": _operand(sizes, head_dim),
        "output": f"*{DTYPE}",
        "lse": "*fp32",
        "lists": _named(Lists, *[_TABLE] * 10, _INT, _INT),
        "words": _named(Words, *[_TABLE] * 6, _INT, _INT),
        "intervals": _named(Intervals, *[_TABLE] * 3, _INT),
        "bits": _named(Bits, *[_TABLE] * 4),
        "pooled": _named(Pooled, *[_TABLE] * 7, "*fp32", f"*{DTYPE}", f"*{DTYPE}", _INT, _INT),
        "query_strides": _STRIDES,
        "key_strides": _STRIDES,
        "value_strides": _STRIDES,
        "output_strides": _STRIDES,
        **dict.fromkeys(("factor", "bound"), "fp32"),
        **dict.fromkeys(("heads", "queries", "keys"), _INT),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "DIM": padded_dim(head_dim),
        "BLOCK_Q": sizes.block_q,
        "BLOCK_K": sizes.block_k,
        "PERMUTED": False,
        "DESCRIPTORS": sizes.descriptors,
        "DENSE": variant.dense,
        "MASKED": variant.masked,
        "WORD_AXES": variant.word_axes,
        "INTERVAL_AXES": variant.interval_axes,
        "BITS": variant.bits,
        "POOLED": variant.pooled,
        "SKIPS": variant.skips,
        "CUDA": target.kind == "cuda",
        "UPCAST": False,
    }
    return _compile(attend, target, sizes, signature, constants)


def tiles_of(target: Target, head_dim: int, variant: Variant) -> Tiles:
    """The tiles of a variant for blocks of 128 x 128 in half precision."""
    masked = variant.masked or variant.interval_axes or variant.bits
    kind = "partial" if masked else "pooled" if variant.pooled else "whole"
    return tiles(target, head_dim, 2, 128, 128, kind)


def compile_mass(target: Target, head_dim: int) -> CompiledKernel:
    """The mass kernel with 16 rows of a block of queries, four blocks a program."""
    sizes = replace(tiles_of(target, head_dim, Variant()), block_q=BLOCK_Q, warps=4)
    signature: dict[str, Any] = {
        "query": f"*{DTYPE}",
        "key": _operand(sizes, head_dim),
        **dict.fromkeys(("lse", "out"), "*fp32"),
        **dict.fromkeys(("slots", "key_first", "key_count"), _TABLE),
        **dict.fromkeys(("query_strides", "key_strides"), _STRIDES),
        "factor": "fp32",
        **dict.fromkeys(("heads", "queries", "keys", "key_tiles", "count_stride"), _INT),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "DIM": padded_dim(head_dim),
        "BLOCK_Q": sizes.block_q,
        "BLOCK_K": sizes.block_k,
        "SEGMENT": 16,
        "DESCRIPTORS": sizes.descriptors,
        "UPCAST": False,
    }
    return _compile(mass, target, sizes, signature, constants)


def _operand(sizes: Tiles, head_dim: int) -> str:
    if not sizes.descriptors:
        return f"*{DTYPE}"
    return f"tensordesc<{DTYPE}[1,1,{sizes.block_k},{padded_dim(head_dim)}]>"


def _compile(
    kernel: Any, target: Target, sizes: Tiles, signature: dict[str, Any], constants: dict[str, Any]
) -> CompiledKernel:
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    values: dict[tuple[int, ...], Any] = {
        (kernel.arg_names.index(name),): value for name, value in constants.items()
    }
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(kernel.arg_names):
        described = signature[name]
        for path, part in _leaves(described, (index,)):
            if part == "constexpr" and len(path) > 1:
                values[path] = 1
            # Pointers and strides are multiples of 16, without which loads are not vectorized.
            if part.startswith("*") or (name.endswith("strides") and part == _INT):
                attributes[path] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    machine = (
        GPUTarget("cuda", target.capability, 32)
        if target.kind == "cuda"
        else GPUTarget("hip", "gfx942", 64)
    )
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages}
    return triton.compile(source, target=machine, options=options)


def _leaves(described: Any, path: tuple[int, ...]) -> Any:
    if isinstance(described, str):
        yield path, described
    else:
        for index, part in enumerate(described):
            yield from _leaves(part, (*path, index))

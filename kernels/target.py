"""Target: the processor that kernels are compiled for, and the tiles that suit it.

The tiles of sm_90 were the fastest of nine on an H100 (`bench/`); those of other NVIDIA GPUs are
chosen by what their loops compile to, which `static_gate.py` watches. Those of AMD's are Triton's
customary ones, not measured.
"""

import os
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

Kind = Literal["whole", "partial", "pooled"]
"""What costs most of a list of blocks. Of those kept in part, small tiles leave out more."""


@dataclass(frozen=True, slots=True)
class Target:
    """`cuda` with a compute capability of 10 * major + minor, `hip`, or `interpreter`."""

    kind: Literal["cuda", "hip", "interpreter"]
    capability: int = 0


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tokens of a tile of queries and of keys, warps, stages of the pipeline, and whether keys
    and values are read through tensor descriptors."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool


def interpreter_asked() -> bool:
    """Whether kernels are to run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def target_of(device: torch.device) -> Target | None:
    """What kernels for tensors on `device` are compiled for; `None` if Triton has no such."""
    if interpreter_asked():
        return Target("interpreter")
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return Target("hip")
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)


def tiles(
    target: Target, head_dim: int, itemsize: int, block_q: int, block_k: int, kind: Kind
) -> Tiles:
    """Tiles for blocks of `block_q` x `block_k` tokens; never larger than the blocks, but at
    least 16 tokens, which matrix instructions need."""
    best = _best(target, head_dim, itemsize, kind)
    small_q = min(best.block_q, _power_of_two(block_q))
    return Tiles(
        small_q,
        min(best.block_k, _power_of_two(block_k)),
        best.warps if small_q == best.block_q else 4,
        best.stages,
        best.descriptors,
    )


def _best(target: Target, head_dim: int, itemsize: int, kind: Kind) -> Tiles:
    if target.kind == "interpreter":
        return Tiles(128, 128, 4, 1, itemsize < 4)
    if target.kind == "hip":
        return Tiles(128, 32 if head_dim > 128 else 64, 4, 2, False)
    descriptors = 90 <= target.capability < 120
    if itemsize > 2:
        # Without matrix instructions of its own, float32 is bound by arithmetic.
        return Tiles(64, 32, 4, 2, descriptors)
    if head_dim > 128:
        return Tiles(128, 64, 8, 2, True) if descriptors else Tiles(64, 32, 4, 2, False)
    if descriptors and head_dim > 64:
        return Tiles(128, 128, 8, 3, True) if kind == "whole" else Tiles(64, 64, 4, 3, True)
    if descriptors:
        return Tiles(64, 64, 4, 3, True) if kind == "partial" else Tiles(64, 128, 4, 2, True)
    return Tiles(128, 64, 8 if head_dim > 64 else 4, 3, False)


def _power_of_two(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())

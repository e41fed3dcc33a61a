"""Gpu: sparse attention by Triton kernels, on NVIDIA's and AMD's GPUs.

    keys and values -> the order of the blocks -> attend, one program a tile of queries -> output

Queries are read and outputs written where they stand. Nothing here waits for the device: what the
kernels look up is in the Worklist of the blocks, made at their first call.

TRITON_INTERPRET=1 runs the same kernels on the CPU, slowly; for tests.
"""

from importlib.util import find_spec
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_sparse.kernels.bitmasks import refusal, unwindowed
from dit_sparse.kernels.blocks import BlockIndices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.target import Target, interpreter_asked, target_of

MOST_HEAD_DIM = 256
_OLDEST = 80
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_refusals: WeakKeyDictionary[BlockIndices, str | None] = WeakKeyDictionary()


def supports(call: AttentionCall) -> str | None:
    """A GPU that Triton knows, half precision or float32, masks that are not too large."""
    query = call.query
    if not interpreter_asked() and query.device.type != "cuda":
        return f"runs on NVIDIA and AMD GPUs, the tensors are on {query.device}"
    if find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    target = target_of(query.device)
    if target is None:
        return "PyTorch finds no GPU"
    if target.kind == "cuda" and target.capability < _OLDEST:
        return f"needs compute capability 8.0 or later, {query.device} has {_version(target)}"
    if query.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if query.shape[-1] > MOST_HEAD_DIM:
        return f"takes head_dim up to {MOST_HEAD_DIM}, got {query.shape[-1]}"
    if call.blocks not in _refusals:
        _refusals[call.blocks] = refusal(call.blocks, unwindowed(call.blocks))
    return _refusals[call.blocks]


def run(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See the head of this file."""
    from dit_sparse.kernels.launch_triton import launch

    return launch(call)


def _version(target: Target) -> str:
    return f"{target.capability // 10}.{target.capability % 10}"

"""The Triton backend: what it refuses, its tables, and its kernels where they can run."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dit_sparse.kernels import bitmasks, gpu, target
from dit_sparse.kernels.blocks import BlockIndices, block_indices
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import tile
from dit_sparse.kernels.pattern import Full, Radial, Skip
from dit_sparse.kernels.sample import sampled_rows
from dit_sparse.kernels.target import Target, Tiles, target_of, tiles
from dit_sparse.kernels.worklist import _kept, worklist

CHECKS = Path(__file__).with_name("triton_checks.py")
ROOT = CHECKS.parents[2]
GRID = TokenGrid(4, 4, 4)


def run_checks(**environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(CHECKS)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    run_checks(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    run_checks(TRITON_INTERPRET="0")


def a_call(
    blocks: BlockIndices | None = None, head_dim: int = 64, dtype: torch.dtype = torch.float32
) -> AttentionCall:
    blocks = blocks or block_indices([Full()], GRID)
    x = torch.empty(1, blocks.grid.tokens, blocks.heads, head_dim, dtype=dtype)
    return AttentionCall(x, x, x, blocks, 1.0)


def test_refuses_the_cpu():
    assert gpu.supports(a_call()) == "runs on NVIDIA and AMD GPUs, the tensors are on cpu"


def test_refuses_without_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.supports(a_call()) == "triton is not installed; pip install triton"


@pytest.mark.parametrize(
    ("pretended", "head_dim", "dtype", "reason"),
    [
        (None, 64, torch.float32, "PyTorch finds no GPU"),
        (Target("cuda", 75), 64, torch.float32, "needs compute capability 8.0 or later, cpu has"),
        (Target("cuda", 90), 64, torch.float64, "takes float32, bfloat16 and float16, got torch"),
        (Target("cuda", 90), 264, torch.float16, "takes head_dim up to 256, got 264"),
        (Target("cuda", 90), 256, torch.float16, None),
        (Target("hip"), 40, torch.bfloat16, None),
    ],
)  # fmt: skip
def test_refusals(pretended, head_dim, dtype, reason, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "target_of", lambda device: pretended)
    came = gpu.supports(a_call(None, head_dim, dtype))
    assert came == reason or (came and reason and came.startswith(reason))


def test_refuses_masks_that_are_too_large(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu, "target_of", lambda device: Target("interpreter"))
    blocks = block_indices([Full(), Radial()], GRID)
    assert gpu.supports(a_call(blocks)) is None
    monkeypatch.setattr(bitmasks, "_MOST_BYTES", 1 << 8)
    again = block_indices([Full(), Radial()], GRID)
    expected = "radial paper is not made of intervals, and masks of its partial blocks take"
    assert (gpu.supports(a_call(again)) or "").startswith(expected)


def test_a_cpu_has_no_target():
    assert target_of(torch.device("cpu")) is None


def test_tiles_are_no_larger_than_blocks():
    assert tiles(Target("cuda", 90), 128, 2, 128, 128, "whole") == Tiles(128, 128, 8, 3, True)
    assert tiles(Target("cuda", 90), 128, 2, 60, 9, "whole") == Tiles(64, 16, 4, 3, True)
    assert tiles(Target("cuda", 90), 128, 2, 32, 128, "partial") == Tiles(32, 64, 4, 3, True)
    assert not tiles(Target("hip"), 128, 2, 128, 128, "whole").descriptors


def test_longest_rows_come_first_and_tables_are_made_once():
    blocks = block_indices([Skip(), Full()], GRID, tile(2, 2, 4), 16, 16)
    device = torch.device("cpu")
    work = worklist(blocks, 16, 16, device)
    lengths = work.lists.bounds[::4].diff()[work.lists.rows]
    assert work.lists.rows[0] == blocks.query_blocks
    assert lengths[0] == lengths.max()
    assert worklist(blocks, 16, 16, device) is work
    count = len(_kept)
    del blocks, work
    assert len(_kept) == count - 1


def test_sampled_rows_are_different_and_inside():
    offsets = torch.tensor([0, 128, 131, 150, 300])
    rows = sampled_rows(offsets, 16)
    for block, row in enumerate(rows):
        picked = row[row >= 0]
        assert len(picked.unique()) == len(picked)
        assert picked.min() >= offsets[block]
        assert picked.max() < offsets[block + 1]
    assert (rows >= 0).sum(1).tolist()[:2] == [16, 3]
    assert (rows[3] >= 0).all()
    # A tile of tokens 8 wide must not be looked at in one column only.
    assert len((rows[0] % 8).unique()) == 8
    with pytest.raises(ValueError, match=r"rows must be in 1\.\.64, got 0; None takes them all"):
        sampled_rows(offsets, 0)


def test_backend_is_lazy():
    code = "import sys, dit_sparse.kernels.attention; print('triton' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_module_of_targets_reads_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert target.interpreter_asked()

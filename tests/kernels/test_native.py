"""The C++ backend by itself: what PyTorch's table of backends cannot ask of it."""

import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_sparse.kernels import bitmasks, compiler, native
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import block_indices, from_block_mask
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.mass import block_mass
from dit_sparse.kernels.order import pixel_major
from dit_sparse.kernels.pattern import AnyOf, Band, Full, Neighborhood, Radial, Sink, Skip
from dit_sparse.kernels.ranking import Ranking, score_blocks
from dit_sparse.kernels.score import Mass, Means, Sampled

GRID = TokenGrid(3, 7, 11, text_after=9, valid_text=(4, 9))
PATTERNS = [
    Full(),
    Skip(),
    Band(40),
    Band(9, "pixel_major"),
    Neighborhood((3, 3, 5), (1, 2, 1)),
    AnyOf((Band(9, "pixel_major"), Sink())),
    Radial("repo", 0.5),
    Radial("repo", 0.5),
]
FLAGS = compiler.instruction_sets()
SETS = sorted({FLAGS[:count] for count in (0, 2, 6, 7, len(FLAGS))}, key=len)
if FLAGS[-1:] == ("-mavx512bf16",):  # and no AMX: its path is tested all the same
    TILES = Path(__file__).with_name("emulated_tiles.h")
    TOLD = hashlib.sha256(TILES.read_bytes()).hexdigest()[:8]
    SETS.append((*FLAGS, "-include", str(TILES), f"-DEMULATED_TILES_{TOLD}"))

pytestmark = pytest.mark.skipif(
    isinstance(compiler.library(FLAGS), str), reason="no C++ compiler here"
)


def visible() -> torch.Tensor:
    kept = torch.stack([pattern.mask(GRID) for pattern in PATTERNS]).expand(2, -1, -1, -1).clone()
    for sample, valid in enumerate(GRID.valid_text or ()):
        kept[sample, :, :, GRID.invalid_text(valid)] = False
    return kept


@pytest.mark.parametrize("flags", SETS, ids=lambda flags: flags[-1] if flags else "baseline")
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3), (torch.float16, 1e-3)]
)
@pytest.mark.parametrize("head_dim", [13, 64, 88, 128, 256])
def test_every_instruction_set_computes_the_same(
    flags: tuple[str, ...], dtype: torch.dtype, bound: float, head_dim: int, operands,
    masked_attention, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(native, "instruction_sets", lambda: flags)
    query, key, value = operands(GRID.tokens, len(PATTERNS), head_dim, dtype=dtype)
    expected, sums = masked_attention(query, key, value, visible())
    blocks = block_indices(PATTERNS, GRID, Band(40).order, 100, 48)
    output, lse = sparse_attention(query, key, value, blocks, backend="native")
    assert (output.double() - expected).norm() / expected.norm() <= bound
    seen = sums.isfinite()
    assert torch.equal(lse.isneginf(), ~seen)
    # Logits themselves are rounded to 8 bits nowhere: the sums are as good as the inputs.
    scale = sums[seen].abs().clamp_min(1)
    exponent_bound = 1e-5 if dtype == torch.float32 else 2e-4
    assert ((lse[seen] - sums[seen]).abs() / scale).max() <= exponent_bound


def poisoned_where_floating(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def test_every_element_is_written(operands, monkeypatch: pytest.MonkeyPatch):
    blocks = block_indices(PATTERNS, GRID, Band(40).order, 100, 48)
    query, key, value = operands(GRID.tokens, len(PATTERNS))
    plain = sparse_attention(query, key, value, blocks, backend="native")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned_where_floating(empty(*a, **k)))
    poisoned = sparse_attention(query, key, value, blocks, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype, operands):
    """Whatever rows a thread has worked on before, and whichever thread takes a row."""
    blocks = block_indices(PATTERNS, GRID, Band(40).order, 100, 48)
    query, key, value = operands(GRID.tokens, len(PATTERNS), dtype=dtype)
    plain = sparse_attention(query, key, value, blocks, backend="native")
    for _ in range(60):
        again = sparse_attention(query, key, value, blocks, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_finite_scale(scale: float, dtype: torch.dtype, operands, masked_attention):
    grid = TokenGrid(2, 5, 7)
    query, key, value = operands(grid.tokens, 1, dtype=dtype)
    expected, _ = masked_attention(query * scale * 40**0.5, key, value, torch.tensor(True))
    if dtype == torch.bfloat16:
        expected, _ = masked_attention(
            query.double() * scale * 40**0.5, key, value, torch.tensor(True)
        )
    blocks = block_indices([Full()], grid)
    output, _ = sparse_attention(query, key, value, blocks, scale=scale, backend="native")
    bound = 2e-6 if dtype == torch.float32 else 4e-3
    assert (output.double() - expected).norm() / expected.norm() <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("size", "head_dim"), [(64, 64), (42, 64), (42, 40)])
def test_what_is_no_number_goes_where_attention_takes_it(
    dtype: torch.dtype, which: str, bad: float, size: int, head_dim: int, operands
):
    grid = TokenGrid(1, 2, size)
    mask = torch.eye(2, dtype=torch.bool)[None]
    names = dict(zip(("query", "key", "value"), operands(grid.tokens, 1, head_dim), strict=True))
    names = {name: tensor[:1].to(dtype) for name, tensor in names.items()}
    names[which][0, 5, 0, 3] = bad
    output, _ = sparse_attention(
        **names, blocks=from_block_mask(mask, grid, None, size, size), backend="native"
    )
    halves = []
    for rows in (slice(size), slice(size, 2 * size)):
        query, key, value = (names[n][0, rows, 0].double() for n in ("query", "key", "value"))
        halves.append((query @ key.T * head_dim**-0.5).softmax(-1) @ value)
    assert torch.equal(output[0, :, 0].isfinite(), torch.cat(halves).isfinite())


def test_no_samples_and_strange_strides(operands):
    grid = TokenGrid(2, 5, 7)
    blocks = block_indices([Band(11)] * 2, grid)
    none = torch.empty(0, grid.tokens, 2, 40)
    output, lse = sparse_attention(none, none, none, blocks, backend="native")
    assert output.shape == none.shape
    assert lse.shape == (0, 2, grid.tokens)
    query, key, value = operands(grid.tokens, 2)
    expected = sparse_attention(query, key, value, blocks, backend="native")
    apart = [torch.stack([x, -x], -1)[..., 0] for x in (query, key, value)]
    shifted = []
    for x in (query, key, value):
        storage = torch.empty(x.numel() + 1)
        shifted.append(storage[1:].view(x.shape).copy_(x))
    for operand in (apart, shifted):
        came = sparse_attention(operand[0], operand[1], operand[2], blocks, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))


def test_masks_that_are_too_large_are_refused(operands, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bitmasks, "_MOST_BYTES", 1 << 10)
    query, key, value = operands(GRID.tokens, len(PATTERNS))
    blocks = block_indices(PATTERNS, GRID, Band(40).order, 100, 48)
    message = (
        "band 9 pixel-major + sink 1 is not made of intervals, and masks of its partial blocks "
        "take 0 MiB; at most 0 fit"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_attention(query, key, value, blocks, backend="native")


def test_memory_does_not_grow_with_tokens():
    """What one call holds beside its inputs and outputs, for 32 times the tokens."""
    script = (
        "import resource, torch\n"
        "from dit_sparse.kernels.attention import sparse_attention\n"
        "from dit_sparse.kernels.blocks import from_block_mask\n"
        "from dit_sparse.kernels.grid import TokenGrid\n"
        "torch.set_num_threads(2)\n"
        "def call(rows):\n"
        "    grid = TokenGrid(1, rows, 256)\n"
        "    mask = torch.eye(rows * 2, dtype=torch.bool)[None]\n"
        "    q = torch.randn(1, grid.tokens, 1, 64)\n"
        "    return sparse_attention(q, q, q, from_block_mask(mask, grid), backend='native')\n"
        "call(16)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "call(512)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    operand = 131_072 * 64 * 4 / 1024
    assert int(shown) < 3 * operand, "input and output are two; kilobytes"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hunyuanvideo_at_720p_needs_a_tenth_of_its_operands(dtype: str):
    """119,056 tokens in GNA's windows: the peak of one call beside its inputs and outputs."""
    script = (
        "import ctypes, pathlib, torch\n"
        "from dit_sparse.kernels.attention import sparse_attention\n"
        "from dit_sparse.kernels.blocks import block_indices\n"
        "from dit_sparse.kernels.grid import TokenGrid\n"
        "from dit_sparse.kernels.order import tile\n"
        "from dit_sparse.kernels.pattern import Neighborhood\n"
        "torch.set_num_threads(2)\n"
        "def held(name):\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(name))\n"
        "def beside(grid, window, stride):\n"
        "    blocks = block_indices([Neighborhood(window, stride)], grid, tile(2, 8, 8))\n"
        f"    q = torch.ones(1, grid.tokens, 1, 128, dtype=torch.{dtype})\n"
        "    k, v = q.clone(), q.clone()\n"
        "    if hasattr(ctypes.CDLL(None), 'malloc_trim'):\n"
        "        ctypes.CDLL(None).malloc_trim(0)\n"
        "    pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "    before = held('VmRSS')\n"
        "    output, lse = sparse_attention(q, k, v, blocks, backend='native')\n"
        "    extra = held('VmHWM') - before - output.nbytes - lse.nbytes\n"
        "    return extra / (3 * q.nbytes)\n"
        "beside(TokenGrid(4, 16, 16), (2, 8, 8), (1, 1, 1))\n"
        "print(beside(TokenGrid(33, 45, 80, text_after=256), (18, 24, 24), (16, 8, 8)))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert 0 < float(shown) <= 0.1


@pytest.mark.parametrize("flags", SETS, ids=lambda flags: flags[-1] if flags else "baseline")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-4), (torch.float16, 5e-5)])
def test_outputs_are_rounded_not_cut_off(
    flags: tuple[str, ...], dtype: torch.dtype, bound: float, operands, masked_attention,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Cut off, they would be too small by a third of their last place on average."""
    monkeypatch.setattr(native, "instruction_sets", lambda: flags)
    query, key, value = operands(GRID.tokens, 2, 24, dtype=dtype)
    everything = torch.ones(2, 2, GRID.tokens, GRID.tokens, dtype=torch.bool)
    for sample, valid in enumerate(GRID.valid_text or ()):
        everything[sample, :, :, GRID.invalid_text(valid)] = False
    expected, _ = masked_attention(query, key, value, everything)
    blocks = block_indices([Full()] * 2, GRID, None, 64, 64)
    output, _ = sparse_attention(query, key, value, blocks, backend="native")
    size = expected.abs().sum()
    assert abs(output.double().abs().sum() - size) <= bound * size


@pytest.mark.parametrize("flags", SETS, ids=lambda flags: flags[-1] if flags else "baseline")
@pytest.mark.parametrize("payload", [0, 1, 0x1FF])
def test_what_is_no_number_stays_so_whatever_its_bits(
    flags: tuple[str, ...], payload: int, operands, monkeypatch: pytest.MonkeyPatch
):
    """The low bits of a NaN must not get into an exponent."""
    monkeypatch.setattr(native, "instruction_sets", lambda: flags)
    query, key, value = operands(GRID.tokens, 1, 16)
    query[:, 5, 0, 3] = torch.tensor([0x7FC00000 + payload], dtype=torch.int32).view(torch.float32)
    blocks = block_indices([Full()], GRID, None, 64, 64)
    output, lse = sparse_attention(query, key, value, blocks, backend="native")
    wrong = torch.zeros(GRID.tokens, dtype=torch.bool)
    wrong[5] = True
    assert torch.equal(lse[0, 0].isnan(), wrong)
    assert torch.equal(output[0, :, 0].isnan().all(-1), wrong)
    known = lse.nan_to_num()
    assert block_mass(query, key, known, blocks, rows=None)[:, :, 0].isnan().all()


def test_a_peak_counts_what_all_threads_did(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        done = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            done.append([native.peak(dtype) for dtype in (torch.float32, torch.bfloat16)])
    finally:
        torch.set_num_threads(before)
    (alone, alone_half), (together, together_half) = done
    assert alone >= 1e8  # for some milliseconds, on any processor
    assert alone_half >= alone  # two or more of a half word at a time
    assert (together, together_half) == (3 * alone, 3 * alone_half)
    assert native.peak(torch.float64) is None
    monkeypatch.setattr(native, "library", lambda flags: "needs a C++ compiler")
    assert native.peak(torch.float32) is None


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiler, "library", compiler.library.__wrapped__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert compiler.library(()) == (
        "needs a C++ compiler; install g++ or clang++, or name one in CXX"
    )


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = tmp_path / "broken-g++"
    broken.write_text("#!/bin/sh\necho 'attend.cpp: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reason = compiler.library.__wrapped__(())
    assert reason == f"{broken} failed: attend.cpp: out of ideas"
    assert not list((tmp_path / "dit_sparse").iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert not isinstance(compiler.library.__wrapped__(()), str)
    assert len(list(tmp_path.glob("dit_sparse-*/attend-*.so"))) == 1


def test_two_processes_may_compile_at_once(tmp_path: Path):
    script = "from dit_sparse.kernels.compiler import library; print(library(()))"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    shown = [process.communicate()[0] for process in started]
    assert all("<CDLL" in text for text in shown), shown
    assert len(list((tmp_path / "dit_sparse").iterdir())) == 1


def ranked(monkeypatch: pytest.MonkeyPatch, *arguments, **options) -> tuple[Ranking, Ranking]:
    """By C++, and by PyTorch as `ranking.py` defines it."""
    found = score_blocks(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(native, "supports", lambda call: "not asked")
        return found, score_blocks(*arguments, **options)


@pytest.mark.parametrize("flags", SETS, ids=lambda flags: flags[-1] if flags else "baseline")
@pytest.mark.parametrize("score", [Sampled(), Sampled(5), Means(0.02), Mass(None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_ranked_as_pytorch_does(
    flags: tuple[str, ...], score: Sampled | Means | Mass, dtype: torch.dtype, operands,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """More blocks than a thread takes at once, strides of all kinds, samples of different text,
    scores of any sign."""
    monkeypatch.setattr(native, "instruction_sets", lambda: flags)
    grid = TokenGrid(7, 12, 13, text_after=40, valid_text=(40, 0, 7))
    query, key, _ = operands(grid.tokens, 3, 40, batch=3, dtype=dtype, spread=2.0)
    key = key.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2)
    key[:, :600:13] = key[:, :1]
    blocks = block_indices([Full()] * 3, grid, pixel_major(), 16, 24)
    for scale in (None, -0.2):
        factor = 40**-0.5 if scale is None else scale
        logits = factor * query.float().transpose(1, 2) @ key.float().permute(0, 2, 3, 1)
        hidden = ~grid.real(3)[:, None, None]
        lse = logits.masked_fill(hidden, -torch.inf).logsumexp(-1)
        found, expected = ranked(monkeypatch, score, query, key, blocks, scale=scale, lse=lse)
        rough = 1e-3 if isinstance(score, Mass) else 2e-5
        torch.testing.assert_close(found.share, expected.share, atol=1e-6, rtol=rough)
        assert (found.forced is None) == (expected.forced is None)
        if found.forced is not None and expected.forced is not None:
            assert torch.equal(found.forced, expected.forced)
            assert 0 < found.forced.float().mean() < 1


def test_logits_that_are_far_apart_are_ranked_as_pytorch_does(operands, monkeypatch):
    """Shares down to the smallest numbers there are, and beyond."""
    query, key, _ = operands(GRID.tokens, 2, spread=20.0)
    blocks = block_indices([Full()] * 2, GRID, None, 16, 24)
    found, expected = ranked(monkeypatch, Sampled(), query, key, blocks)
    assert expected.share[expected.share > 0].amin() < 1e-30
    torch.testing.assert_close(found.share, expected.share, atol=1e-37, rtol=1e-2)

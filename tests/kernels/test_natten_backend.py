"""NATTEN: when it is refused, and what it is asked for, by a stand-in for the library."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import natten_backend
from dit_sparse.kernels.blocks import block_indices, from_block_mask
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import raster
from dit_sparse.kernels.pattern import Band, Neighborhood, Pattern

GRID = TokenGrid(4, 6, 8)
BOX = Neighborhood((2, 3, 4), (1, 3, 2))


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module of that name that notes what it is asked for and answers from its query."""
    asked: list[dict[str, Any]] = []

    def na3d(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        assert query.is_contiguous()
        asked.append({"shape": tuple(query.shape), **options})
        return query + value, key[..., 0]

    module = ModuleType("natten")
    module.__spec__ = SimpleNamespace()  # pyright: ignore[reportAttributeAccessIssue]
    module.__dict__.update(na3d=na3d, HAS_LIBNATTEN=True)
    monkeypatch.setitem(sys.modules, "natten", module)
    return asked


def call(patterns: list[Pattern], grid: TokenGrid = GRID, **change: Any) -> AttentionCall:
    tensor: Any = SimpleNamespace(
        device=torch.device(change.get("device", "cuda")),
        dtype=change.get("dtype", torch.bfloat16),
        shape=(1, grid.tokens, len(patterns), change.get("head_dim", 64)),
    )
    blocks = block_indices(patterns, grid, raster(), 16, 16)
    return AttentionCall(tensor, tensor, tensor, blocks, change.get("scale", 0.5))


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (call([BOX, Neighborhood((3, 3, 3))]), None),
        (call([BOX], device="cpu"), "runs on CUDA, the tensors are on cpu"),
        (call([BOX, Band(4)]), "takes neighborhoods, got band 4 raster for head 1"),
        (call([BOX], TokenGrid(4, 6, 8, 5)), "takes video tokens alone, got 5 text tokens"),
        (
            call([BOX], TokenGrid(1, 6, 8)),
            "takes windows of at least 2 tokens on each axis, got neighborhood 2x3x4 "
            "stride 1x3x2 on 1x6x8",
        ),
        (
            call([BOX], dtype=torch.float64),
            "takes float32, bfloat16 and float16, got torch.float64",
        ),
        (call([BOX], head_dim=36), "needs a head_dim that is a multiple of 8, got 36"),
        (call([BOX], scale=0.0), "takes a scale of 0 for none"),
        (replace(call([BOX]), pv_skip=-4.0), "leaves no values out, as pv_skip asks"),
    ],
    ids=["taken", "cpu", "band", "text", "flat", "float64", "head_dim", "scale", "pv_skip"],
)
def test_refusals(asked: AttentionCall, reason: str | None, natten: list[dict[str, Any]]):
    assert natten_backend.supports(asked) == reason


def test_tables_of_blocks_are_refused(natten: list[dict[str, Any]]):
    asked = call([BOX])
    mask = torch.ones(1, 12, 12, dtype=torch.bool)
    table = AttentionCall(
        asked.query, asked.key, asked.value, from_block_mask(mask, GRID, None, 16, 16), 0.5
    )
    assert natten_backend.supports(table) == "takes neighborhoods, got a table of blocks"


def test_natten_missing_and_natten_without_kernels(monkeypatch: pytest.MonkeyPatch, natten):
    monkeypatch.setattr(sys.modules["natten"], "HAS_LIBNATTEN", False)
    assert "built without its kernels (libnatten)" in str(natten_backend.supports(call([BOX])))
    monkeypatch.setitem(sys.modules, "natten", None)
    monkeypatch.setattr(natten_backend.importlib.util, "find_spec", lambda name: "found")
    assert "natten cannot be imported: " in str(natten_backend.supports(call([BOX])))
    monkeypatch.setattr(natten_backend.importlib.util, "find_spec", lambda name: None)
    assert natten_backend.supports(call([BOX])) == "natten is not installed"


def test_heads_of_one_box_are_one_request_with_its_sizes(natten: list[dict[str, Any]]):
    wide = Neighborhood((9, 5, 3), (3, 1, 1), (2, 1, 1))
    blocks = block_indices([BOX, wide, BOX], GRID, None, 16, 16)
    query, key, value = torch.randn(3, 2, GRID.tokens, 3, 8)
    output, lse = natten_backend.run(AttentionCall(query, key, value, blocks, 0.5))
    assert natten == [
        {
            "shape": (2, 4, 6, 8, 2, 8),
            "kernel_size": (2, 3, 4),
            "stride": (1, 3, 2),
            "dilation": (1, 1, 1),
            "scale": 0.5,
            "return_lse": True,
        },
        {
            "shape": (2, 4, 6, 8, 1, 8),
            "kernel_size": (2, 5, 3),
            "stride": (2, 1, 1),
            "dilation": (2, 1, 1),
            "scale": 0.5,
            "return_lse": True,
        },
    ]
    assert torch.equal(output, query + value)
    assert torch.equal(lse, key[..., 0].transpose(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "pattern", [BOX, Neighborhood((3, 3, 5)), Neighborhood((9, 2, 2))], ids=str
)
def test_the_library_itself(pattern: Neighborhood, operands, masked_attention):
    pytest.importorskip("natten")
    from dit_sparse.kernels.attention import sparse_attention

    query, key, value = operands(GRID.tokens, 2, 64, dtype=torch.float16)
    expected, sums = masked_attention(query, key, value, pattern.mask(GRID))
    blocks = block_indices([pattern] * 2, GRID)
    query, key, value = (x.cuda() for x in (query, key, value))
    output, lse = sparse_attention(query, key, value, blocks, backend="natten")
    torch.testing.assert_close(output.cpu().double(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse.cpu().double(), sums, atol=1e-2, rtol=1e-2)

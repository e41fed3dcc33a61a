"""FlexAttention: the construction of its masks, read as its compiled kernel reads them.

The kernel needs a GPU for its LSE. Here `read` stands in for it: it takes slots listed whole as
they are, asks `mask_mod` in slots listed as partial, and sees nothing else.
"""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_sparse.kernels import flex
from dit_sparse.kernels.attention import sparse_attention
from dit_sparse.kernels.blocks import BlockIndices, block_indices, from_block_mask, from_tags
from dit_sparse.kernels.call import AttentionCall
from dit_sparse.kernels.grid import TokenGrid
from dit_sparse.kernels.order import pixel_major, raster, tile
from dit_sparse.kernels.pattern import Band, Columns, Full, Neighborhood, Pattern, Skip
from tests.kernels.shards import GRID as SHARDED
from tests.kernels.shards import draw, every_shard, held, kept_by

GRIDS = [
    TokenGrid(4, 4, 8),
    TokenGrid(2, 5, 7),
    TokenGrid(2, 5, 7, text_before=3, text_after=11),
]
PATTERNS: list[Pattern] = [
    Full(),
    Skip(),
    Band(11),
    Band(3, "pixel_major"),
    Neighborhood((2, 3, 3)),
    Neighborhood((2, 2, 3), (1, 1, 2), (1, 2, 2)),
]


def visible(mask: BlockMask, batch: int) -> Tensor:
    """Which slots see which, bool `[batch, heads, query slots, key slots]`."""
    queries, keys = mask.seq_lengths
    _, heads, rows, _ = mask.kv_indices.shape
    assert (queries, keys) == (rows * mask.BLOCK_SIZE[0], mask.shape[-1])

    def listed(counts: Tensor, indices: Tensor) -> Tensor:
        table = torch.zeros(heads, rows, keys // mask.BLOCK_SIZE[1], dtype=torch.bool)
        for head in range(heads):
            for row in range(rows):
                chosen = indices[0, head, row, : counts[0, head, row]].long()
                assert len(chosen.unique()) == len(chosen)
                table[head, row, chosen] = True
        return table.repeat_interleave(mask.BLOCK_SIZE[0], 1).repeat_interleave(
            mask.BLOCK_SIZE[1], 2
        )

    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    kept = mask.mask_mod(
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[None, :, None, None],
        torch.arange(queries)[None, None, :, None],
        torch.arange(keys)[None, None, None, :],
    )
    partial = listed(mask.kv_num_blocks, mask.kv_indices)
    whole = listed(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not (partial & whole).any()
    return whole | (partial & kept)


def read(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, options: object
) -> tuple[Tensor, Tensor]:
    seen = visible(mask, len(query))
    logits = (scale * query.double() @ key.double().mT).masked_fill(~seen, -torch.inf)
    sums = logits.logsumexp(-1)
    weights = (logits - sums.masked_fill(sums.isneginf(), 0)[..., None]).exp()
    return (weights @ value.double()).to(query.dtype), sums.float()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """The backend with `read` in the place of the compiled kernel."""
    monkeypatch.setattr(flex, "_attend", read)

    def attend(query: Tensor, key: Tensor, value: Tensor, blocks: BlockIndices):
        return flex.run(AttentionCall(query, key, value, blocks, query.shape[-1] ** -0.5))

    return attend


def assert_close(came: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]):
    (output, lse), (true_output, true_lse) = came, expected
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), true_output, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("block_q", "block_k"), [(16, 16), (32, 20), (7, 200)])
@pytest.mark.parametrize("order", [raster(), pixel_major(), tile(2, 2, 3)], ids=str)
def test_every_pattern_at_once(grid, block_q, block_k, order, run, operands, masked_attention):
    columns = Columns((0, 3), 16, grid.shape)
    patterns = [*PATTERNS, columns, PATTERNS[2]]
    blocks = block_indices(patterns, grid, order, block_q, block_k)
    query, key, value = operands(grid.tokens, len(patterns), 16)
    kept = torch.stack([pattern.mask(grid) for pattern in patterns])
    expected = masked_attention(query, key, value, kept)
    assert_close(run(query, key, value, blocks), expected)


@every_shard
@pytest.mark.parametrize("order", [raster(), tile(2, 3, 4)], ids=str)
@pytest.mark.parametrize("valid_text", [None, (5, 0)])
def test_shards_of_queries_and_keys(
    queries, keys, order, valid_text, run, operands, masked_attention
):
    grid = SHARDED
    if valid_text is not None:
        grid = replace(grid, text_before=0, text_after=13, valid_text=valid_text)
    of_query, of_key = held(queries, grid), held(keys, grid)
    blocks = block_indices(PATTERNS, grid, order, 16, 24, queries=queries, keys=keys)
    query, key, value = draw(of_query, of_key, len(PATTERNS), operands)
    expected = masked_attention(query, key, value, kept_by(PATTERNS, grid, of_query, of_key))
    assert_close(run(query, key, value, blocks), expected)


def test_tables_of_blocks(run, operands, masked_attention):
    grid, order = TokenGrid(3, 5, 7, text_before=3), tile(2, 3, 4)
    rows, columns = (len(order.offsets(grid, block)) - 1 for block in (16, 8))
    mask = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[0, 2] = False
    sizes = [order.offsets(grid, block).diff() for block in (16, 8)]
    place = order.permutation(grid).argsort()
    kept = mask.repeat_interleave(sizes[0], 1).repeat_interleave(sizes[1], 2)
    query, key, value = operands(grid.tokens, 2, 16)
    expected = masked_attention(query, key, value, kept[:, place][:, :, place])
    assert_close(run(query, key, value, from_block_mask(mask, grid, order, 16, 8)), expected)


@pytest.mark.parametrize("side", ["text_before", "text_after"])
def test_padded_text_is_hidden(side: str, run, operands, masked_attention):
    grid = replace(TokenGrid(2, 5, 7), **{side: 20}, valid_text=(4, 0, 20))
    patterns = [Full(), Band(11), Neighborhood((2, 3, 3))]
    query, key, value = operands(grid.tokens, 3, 16, batch=3)
    kept = torch.stack([pattern.mask(grid) for pattern in patterns]).repeat(3, 1, 1, 1)
    for sample, valid in enumerate((4, 0, 20)):
        kept[sample, :, :, grid.invalid_text(valid)] = False
        key[sample, grid.invalid_text(valid)] = 1e4
    blocks = block_indices(patterns, grid, raster(), 16, 16)
    assert_close(run(query, key, value, blocks), masked_attention(query, key, value, kept))


@pytest.mark.parametrize(
    ("sizes", "slot"), [([5, 3], 16), ([17], 32), ([64, 64], 64), ([100], 128), ([129, 5], 256)]
)
def test_slots_hold_every_block_and_fit_the_kernel(sizes: list[int], slot: int):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    assert flex._slot_size(offsets) == slot


def test_tokens_that_fill_their_blocks_are_not_moved():
    slots = flex._slots(
        block_indices([Full()], GRIDS[0], raster(), 16, 64), torch.device("cpu"), 1
    )
    assert slots.queries is None
    assert slots.keys is None
    assert slots.size == (16, 64)
    # Nothing is partial, so `mask_mod` is never asked.
    assert not slots.mask.kv_num_blocks.any()


def test_one_compilation_serves_every_mask_of_a_shape(operands):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True, dynamic=False)
    query, key, value = operands(128, 2, 16, 1)
    for patterns in ([Band(11), Full()], [Band(7), Band(40)], [Full(), Band(3)]):
        blocks = block_indices(patterns, GRIDS[0], raster(), 16, 16)
        slots = flex._slots(blocks, torch.device("cpu"), 1)
        with torch.no_grad():
            compiled(*(x.transpose(1, 2) for x in (query, key, value)), block_mask=slots.mask)
    assert counter.frame_count == 1


def call(device: str = "cuda", **change: Any) -> Any:
    blocks = change.pop("blocks", None) or block_indices([Full()], GRIDS[0])
    head_dim, dtype = change.get("head_dim", 64), change.get("dtype", torch.bfloat16)
    tensor = SimpleNamespace(
        device=torch.device(device), dtype=dtype, shape=(1, blocks.grid.tokens, 1, head_dim)
    )
    return AttentionCall(tensor, tensor, tensor, blocks, 1.0)  # pyright: ignore[reportArgumentType]


class Formless(Band):
    """A band that kernels cannot decide by themselves."""

    def windows(self, grid: TokenGrid) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (call(), None),
        (call("xpu"), None),
        (call("cpu"), "PyTorch's FlexAttention returns no LSE on the CPU"),
        (call("mps"), "runs on CUDA and XPU devices, the tensors are on mps"),
        (call(dtype=torch.float64), "takes float32, bfloat16 and float16, got torch.float64"),
        (call(head_dim=8), "needs a head_dim of at least 16, got 8"),
        (
            call(blocks=from_tags(torch.ones(1, 1, 1, dtype=torch.int8), GRIDS[0])),
            "pooled keys are not built here",
        ),
        (
            call(blocks=block_indices([Formless(3)], GRIDS[0], raster())),
            "band 3 raster has partial blocks and is not made of windows",
        ),
        (call(blocks=block_indices([Formless(500)], GRIDS[0], raster())), None),
        (replace(call(), pv_skip=-4.0), "leaves no values out, as pv_skip asks"),
    ],
    ids=[
        "cuda",
        "xpu",
        "cpu",
        "mps",
        "float64",
        "head_dim",
        "pooled",
        "windowless",
        "whole",
        "pv_skip",
    ],
)
def test_refusals(asked: AttentionCall, reason: str | None):
    pytest.importorskip("triton")
    assert flex.supports(asked) == reason


def test_triton_missing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert flex.supports(call()) == "torch.compile needs triton, which is not installed"


def test_kernel_options(monkeypatch: pytest.MonkeyPatch):
    assert flex._options(call(), (64, 128)) == {"BLOCK_M": 64}
    assert flex._options(call(), (128, 256)) == {}
    monkeypatch.setattr(flex, "_has_flash", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flex._options(call(), (128, 128)) == {"BACKEND": "FLASH"}
    assert flex._options(call(), (128, 64)) == {"BLOCK_N": 64}
    assert flex._options(call(dtype=torch.float32), (128, 128)) == {}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's own compiler
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_compiled_kernel(grid: TokenGrid, dtype: torch.dtype, operands, masked_attention):
    query, key, value = operands(grid.tokens, len(PATTERNS), 64, dtype=dtype)
    kept = torch.stack([pattern.mask(grid) for pattern in PATTERNS])
    expected = masked_attention(query, key, value, kept)
    blocks = block_indices(PATTERNS, grid, raster(), 32, 64)
    query, key, value = (x.cuda() for x in (query, key, value))
    output, lse = sparse_attention(query, key, value, blocks, backend="flex")
    limit = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.cpu().double(), expected[0], atol=limit, rtol=limit)
    torch.testing.assert_close(lse.cpu().double(), expected[1], atol=limit, rtol=limit)


def test_the_cpu_is_refused_by_name(operands):
    query, key, value = operands(GRIDS[0].tokens, 1)
    blocks = block_indices([Full()], GRIDS[0])
    message = "backend 'flex' refuses this call: PyTorch's FlexAttention returns no LSE"
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_attention(query, key, value, blocks, backend="flex")
